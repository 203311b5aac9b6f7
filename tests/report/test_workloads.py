"""Bench rows by workload: which pair is shown as users run it, which is the peer at its best, what memory joins."""

from __future__ import annotations

from typing import Any

from common.ledger import bench_row
from report.build import Findings
from report.readme_tables import MOST_ROWS, bench_table
from report.workloads import cells, ratio_text, workloads

SIZE = " (small: width 8)"


def rows_of_a_benchmark(size: str = SIZE) -> list[dict[str, Any]]:
    """As `benchmarks.arms.beside_the_peer` names them."""
    speed = [
        bench_row(f"training, default against default: ours bf16, peer fp32{size}", 30.0, 10.0, "images/s", target=1.3),
        bench_row(f"training, both bf16{size}", 30.0, 20.0, "images/s"),
        bench_row(f"training, both fp32{size}", 12.0, 10.0, "images/s"),
    ]
    memory = [
        bench_row(f"peak memory of training, ours bf16, peer fp32{size}", 3.0, 4.0, "MiB", higher_is_better=False),
        bench_row(f"peak memory of training, both fp32{size}", 5.0, 4.0, "MiB", target=1.0, higher_is_better=False),
    ]
    return [*speed, *memory, bench_row(f"fraction of the matmul peak in bf16, training{size}", 1.0, 3.0, "GFLOP/s")]


def test_the_peer_stands_as_users_run_it_and_at_its_best_and_memory_joins_its_workload() -> None:
    (training,) = workloads(rows_of_a_benchmark())
    assert cells(training, with_memory=True) == [
        "training (small: width 8)",
        "30 images/s",
        "10 (3x ≥ 1.3)",
        "20 (1.5x, both bf16)",
        "5 to 4 MiB (**0.8x < 1**)",
    ]


def test_rows_against_the_compiled_and_the_better_peer_belong_to_their_workload() -> None:
    rows = rows_of_a_benchmark()
    rows += [
        bench_row(f"training, bf16, ours eager against peer compiled{SIZE}", 30.0, 25.0, "images/s"),
        bench_row(f"training, both bf16, against the better peer{SIZE}", 30.0, 25.0, "images/s", target=1.5),
        bench_row(f"training, float32, ours eager against peer compiled{SIZE}", 12.0, 11.0, "images/s"),
        bench_row(f"training, both fp32, against the better peer{SIZE}", 12.0, 11.0, "images/s", target=1.15),
    ]
    (training,) = workloads(rows)
    assert len(training.rows) == 7 and training.missed()
    assert cells(training, with_memory=False)[3] == "25 (**1.2x < 1.5**, both bf16, against the better peer)"


def test_where_the_better_peer_met_another_form_of_ours_both_numbers_are_shown() -> None:
    rows = rows_of_a_benchmark()
    rows.append(bench_row(f"training, both bf16, against the better peer{SIZE}", 40.0, 25.0, "images/s", target=1.5))
    (training,) = workloads(rows)
    assert cells(training, with_memory=False)[3] == "40 to 25 (1.6x ≥ 1.5, both bf16, against the better peer)"


def test_pairs_with_other_numbers_of_ours_are_workloads_of_their_own() -> None:
    seconds = {"higher_is_better": False}
    rows = [
        bench_row("seconds, resident, against ZeRO-0 (32)", 1.0, 3.0, "s", **seconds),
        bench_row("seconds, resident, against ZeRO-2 (32)", 1.0, 2.0, "s", **seconds),
        bench_row("caption to image, 1 step against 25, batch 1 (s)", 8.0, 2.0, "images/s"),
        bench_row("caption to image, 1 step against 25, batch 16 (s)", 9.0, 2.0, "images/s"),
    ]
    both, one, sixteen = (cells(workload, with_memory=False) for workload in workloads(rows))
    assert both == ["seconds, resident (32)", "1 s", "3 (3x, against ZeRO-0)", "2 (2x, against ZeRO-2)"]
    assert one[0] == "caption to image, 1 step, against 25, batch 1 (s)" and one[3] == "-"
    assert sixteen[1:3] == ["9 images/s", "2 (4.5x)"]


def test_a_ratio_has_so_many_digits_that_its_verdict_can_be_seen() -> None:
    assert ratio_text(bench_row("a", 0.9996, 1.0, "images/s", target=1.0)) == "**0.9996x < 1**"
    assert ratio_text(bench_row("a", 1.0004, 1.0, "images/s", target=1.0)) == "1x ≥ 1"


def test_a_table_has_at_most_twelve_rows_names_what_is_left_out_and_keeps_what_missed() -> None:
    rows = [row for number in range(20) for row in rows_of_a_benchmark(f" (size {number})")[:1]]
    rows.append(bench_row("sampling", 1.0, 2.0, "images/s", target=1.3))
    note, _, _, _, *shown = bench_table(Findings(rows=rows))
    assert len(shown) == MOST_ROWS and "**0.5x < 1.3**" in shown[-1]
    assert "9 further rows are on the report page" in note
    note, *_ = bench_table(Findings(rows=rows), only="size 1")
    assert "10 further rows are on the report page (1 of them missed)" in note
    assert len(bench_table(Findings(rows=rows), only=r"size [12]\)|sampling")[4:]) == 3
