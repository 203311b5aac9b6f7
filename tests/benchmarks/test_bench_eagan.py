"""EAGAN's speed benchmark compares like with like and says what it compared. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import eagan as bench
from benchmarks.arms import Timing
from benchmarks.eagan import Arm
from tests.drills import words


@pytest.mark.parametrize("what", ["search", "training"])
def test_both_forms_take_the_same_steps(what: str) -> None:
    losses = {}
    for name, arm in (
        ("ours", Arm("ours", "tiny", what, "cpu")),
        ("peer", Arm("peer", "tiny", what, "cpu")),
        ("last", Arm("peer", "tiny", what, "cpu", last=True)),
    ):
        step = getattr(bench, arm.side)(arm)
        losses[name] = torch.stack([step(i) for i in range(3)])
    torch.testing.assert_close(losses["ours"], losses["peer"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses["ours"], losses["last"], rtol=1e-4, atol=1e-4)
    assert len(set(losses["peer"].tolist())) == 3


def test_losses_that_differ_stop_the_benchmark() -> None:
    one = {"ours fp32": Timing(1, 1, 1, [2.0], 1), "peer fp32": Timing(1, 1, 1, [2.1], 1)}
    with pytest.raises(RuntimeError, match=r"the first losses differ: 2.0 and 2.1"):
        bench.agree(one)


def test_a_population_has_torchmetrics_scores(tmp_path: Path) -> None:
    row = bench.evaluation_row("tiny", "cpu", tmp_path, 1)  # it raises where they differ
    assert row["target"] == 1.5 and "2 generators, 40 pictures" in row["name"]


@pytest.mark.slow
def test_rows_name_size_target_and_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    rows = bench.main(words(sizes="tiny", devices="cpu", output=output, rounds=1, steps=1, threads=1))
    assert json.loads(output.read_text())["rows"] == rows
    targets = {row["name"].split(" (tiny")[0]: row["target"] for row in rows}
    assert targets["search step of the supernet, both fp32"] == 1.3
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
