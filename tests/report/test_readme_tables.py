"""The READMEs' tables: they say what results/ says, are made anew in place, and a stale one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from common.ledger import Claim, Condition, PaperValue, Target, bench_row, read_claims, record, write_claims, write_rows
from common.paths import REPOSITORY, papers
from report.build import load, waiting
from report.papers import all_papers
from report.readme_tables import NOT_MEASURED, filled, main, readme_files, runs_table
from tests.refusals import refused

README = """# Front door
Before.
<!-- papers -->
<!-- end -->
After.
"""
ROOM = """# LDM
<!-- claims:ldm -->
| typed by hand |
<!-- end -->
<!-- bench:ldm -->
<!-- end -->
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ldm").mkdir()
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    (tmp_path / "ldm" / "README.md").write_text(ROOM, encoding="utf-8")
    (tmp_path / "ldm" / "model.py").touch()
    return tmp_path


def measure(root: Path, drop: float = 0.2) -> None:
    """L1 in two tiers (holds), L2 with one bar missed, a diverged seed in L3; two bench rows."""
    condition = (Condition("speed_up", ">", 4.0),)

    def rec(name: str, bar: float, rows: list[dict[str, float]], tier: str = "small") -> dict[str, object]:
        target = Target(f"drop of {bar} | or more", "fd_drop", ">=", bar, condition)
        claim = Claim(name, "latent | space <b>beats</b> pixels", PaperValue("38 lower", "Fig. 6"), target, tier)  # type: ignore[arg-type]
        return record(claim, rows, seconds=1.0, peak_memory_bytes=1)

    seeds = [{"fd_drop": drop + d, "speed_up": 20.0 + 10 * d} for d in (-0.01, 0.0, 0.01)]
    write_claims(
        root / "results" / "ldm.json",
        [
            rec("L1", 0.15, seeds),
            rec("L1", 0.1, [{"fd_drop": 0.9, "speed_up": 9.0}], "smoke"),
            rec("L2", 0.95, seeds),
            rec("L3", 0.1, [*seeds[:2], {"fd_drop": float("nan"), "speed_up": 1.0}]),
        ],
    )
    rows = [
        bench_row("training", 13.0, 10.0, "images/s", target=1.3),
        bench_row("memory", 3.0, 2.0, "GiB", higher_is_better=False),
    ]
    write_rows(root / "results" / "bench_ldm.json", rows)


@pytest.fixture
def tables(root: Path) -> Path:
    """The root, measured, with its tables."""
    measure(root)
    run(root)
    return root


def run(root: Path, *options: str) -> None:
    main(["--root", str(root), "--results", str(root / "results"), *options])


def text_of(root: Path, name: str = "ldm/README.md") -> str:
    return (root / name).read_text(encoding="utf-8")


def test_without_results_the_tables_say_so_and_the_text_around_them_stays(root: Path) -> None:
    run(root)
    assert text_of(root).count("not measured yet") == 2
    assert "typed by hand" not in text_of(root)
    front = text_of(root, "README.md")
    assert front.startswith("# Front door\nBefore.\n<!-- papers -->\n|")
    assert front.endswith("|\n<!-- end -->\nAfter.\n")
    assert front.count("\n| ") == 1 + len(all_papers())
    assert front.count("not built yet") == len(all_papers()) - 1
    assert "[`ldm`](ldm/README.md)" in front


def test_claims_table_shows_mean_std_seeds_and_verdict_of_the_most_thorough_tier(tables: Path) -> None:
    rows = {line.split(" | ")[0]: line for line in text_of(tables).splitlines() if line.startswith("| L")}
    assert set(rows) == {"| L1", "| L2", "| L3"}
    assert rows["| L1"].startswith("| L1 | yes | latent")
    assert rows["| L1"].endswith("| FD drop 0.200 ± 0.010 (≥ 0.15); 1 more met |")
    assert rows["| L2"].startswith("| L2 | **no** | latent")
    assert rows["| L2"].endswith("| FD drop 0.200 ± 0.010 (≥ 0.95); 1 more met |")
    assert (
        rows["| L3"].endswith("| FD drop not finite (≥ 0.1); speed up not finite (> 4) |")
        or "1 more met" in rows["| L3"]
    )
    assert "over 3 seeds" in text_of(tables)


def test_a_cell_can_neither_break_the_table_nor_carry_a_tag(tables: Path) -> None:
    row = next(line for line in text_of(tables).splitlines() if line.startswith("| L1 |"))
    assert "latent \\| space" in row
    assert "<b>" not in row
    assert "&lt;b>beats" in row


def test_bench_table_shows_ratio_target_and_verdict(tables: Path) -> None:
    for row in ("| training | 13 images/s | 10 (1.3x ≥ 1.3) | - |", "| memory | 3 GiB | 2 (0.667x) | - |"):
        assert row in text_of(tables)


def test_front_table_counts_the_claims_that_hold(tables: Path) -> None:
    row = next(line for line in text_of(tables, "README.md").splitlines() if line.startswith("| [`ldm`]"))
    assert row.endswith("| 1 of 3 claims hold |")


def test_what_is_counted_names_the_claims_that_nobody_measured(tables: Path) -> None:
    findings = load(tables / "results")["ldm"]
    assert waiting(findings, REPOSITORY / "ldm") == f", {len(read_claims('ldm', 'small')) - 3} not measured yet"
    assert waiting(findings, tables / "ldm") == ""


def test_rewriting_is_idempotent_and_check_tells_stale_from_fresh(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(root)
    before = text_of(root)
    with pytest.raises(SystemExit) as stopped:
        run(root, "--check")
    assert stopped.value.code == 1
    assert "README.md: its tables are stale" in capsys.readouterr().out
    assert text_of(root) == before, "--check must not write"
    run(root)
    once = text_of(root)
    run(root, "--check")
    run(root)
    assert text_of(root) == once
    measure(root, drop=0.3)
    with pytest.raises(SystemExit):
        run(root, "--check")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- claims:ldm -->\nno end\n", r"line 1: <!-- claims:ldm --> is never closed"),
        ("<!-- papers -->\n<!-- bench:ldm -->\n<!-- end -->\n", r"line 2: .* before the table of line 1"),
        ("text\n<!-- end -->\n", r"line 2: <!-- end --> closes no table"),
        ("<!-- claims:lmd -->\n<!-- end -->\n", r"no paper is called 'lmd'"),
        ("<!-- bench -->\n<!-- end -->\n", r"bench needs a name"),
    ],
)
def test_a_wrong_marker_is_named_with_its_line(root: Path, text: str, message: str) -> None:
    path = root / "README.md"
    path.write_text(text, encoding="utf-8")
    refused(message, filled, path, root, {})


def test_markers_inside_a_code_block_are_text(root: Path) -> None:
    path = root / "README.md"
    path.write_text("```\n<!-- papers -->\n<!-- end -->\n```\n", encoding="utf-8")
    assert filled(path, root, {}) == path.read_text(encoding="utf-8")


def test_the_repository_has_the_tables_that_its_readers_expect() -> None:
    texts = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in readme_files(REPOSITORY)}
    assert "<!-- papers -->" in texts["README.md"]
    assert "<!-- claims:ldm -->" in texts["ldm/README.md"]
    assert "<!-- bench:ldm -->" in texts["ldm/README.md"]


def test_a_text_file_of_the_results_is_quoted_and_quoted_anew(root: Path) -> None:
    readme = root / "ldm" / "README.md"
    readme.write_text("<!-- text:plan_ldm -->\n<!-- end -->\nafter\n", encoding="utf-8")
    run(root)
    assert text_of(root).splitlines() == ["<!-- text:plan_ldm -->", "not measured yet", "<!-- end -->", "after"]
    for content in ("stage  days\nstage1  40\n", "stage  days\nstage1  41\n"):
        (root / "results").mkdir(exist_ok=True)
        (root / "results" / "plan_ldm.txt").write_text(content, encoding="utf-8")
        run(root)
        quoted = ["```text", *content.splitlines(), "```"]
        assert text_of(root).splitlines() == ["<!-- text:plan_ldm -->", *quoted, "<!-- end -->", "after"]


def test_named_figures_of_a_paper_are_shown_with_their_captions_and_at_most_six(root: Path) -> None:
    readme = root / "ldm" / "README.md"
    readme.write_text("<!-- figures:ldm b a -->\n<!-- end -->\n", encoding="utf-8")
    run(root)
    assert text_of(root).splitlines() == ["<!-- figures:ldm b a -->", "not measured yet", "<!-- end -->"]
    folder = root / "results" / "figures" / "ldm"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (2, 2)).save(folder / f"{name}.png")
    (folder / "captions.json").write_text('{"b.png": "Second.", "a.png": "First."}', encoding="utf-8")
    run(root)
    shown = ["Second.", "", "![b](../results/figures/ldm/b.png)", ""]
    shown += ["First.", "", "![a](../results/figures/ldm/a.png)"]
    assert text_of(root).splitlines() == ["<!-- figures:ldm b a -->", *shown, "<!-- end -->"]
    for names in ("c", "", "a a a a a a a"):
        readme.write_text(f"<!-- figures:ldm {names} -->\n<!-- end -->\n", encoding="utf-8")
        refused("expected one to 6 of b, a", run, root)


def test_a_room_says_how_it_is_called_and_takes_the_place_of_its_plan(tmp_path: Path) -> None:
    room = tmp_path / "hipa"
    room.mkdir()
    for name in ("train.py", "config.py"):
        (room / name).touch()
    refused(r"hipa.paper\.yaml: no such file; expected the paper's title", all_papers, tmp_path)
    (room / "paper.yaml").write_text("title: HiPA\nvenue: arXiv\n", encoding="utf-8")
    refused(r"expected the texts arxiv, idea, start, title, venue of hipa", all_papers, tmp_path)
    (room / "paper.yaml").write_text("title: HiPA\nvenue: arXiv\narxiv: 1\nidea: fast\nstart: go\n", encoding="utf-8")
    found = all_papers(tmp_path)
    assert found[0].title == "HiPA" and [paper.key for paper in found].count("hipa") == 1


def test_a_default_run_says_what_it_does_and_has_its_time_on_both_kinds_of_cpu(tmp_path: Path) -> None:
    starts = {paper.key: paper.start for paper in all_papers() if paper.start}
    assert tuple(starts) == papers()
    assert len(runs_table(tmp_path)) == 2 + len(starts)
    fast = {"seconds": {"total": 1020.0}, "precision": "bf16-mixed", "hardware": "A, 2 cores"}
    (tmp_path / "ldm-small.json").write_text(json.dumps(fast))
    (tmp_path / "ldm-small-without-bf16.json").write_text(json.dumps({"seconds": 1800, "hardware": "B"}))
    (tmp_path / "pixart-small.json").write_text(
        json.dumps({"stages": {"a": {"seconds": {"training": 60.0, "evaluation": 30.0}}}})
    )
    rows = runs_table(tmp_path)
    assert f"| `make ldm-train` | {starts['ldm']} | 17 min, bf16-mixed, A, 2 cores | 30 min, B |" in rows
    assert f"| `make pixart-train` | {starts['pixart']} | 2 min | {NOT_MEASURED} |" in rows
