"""The search network's speed benchmark compares like with like and says what it compared. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import pc_darts as bench
from benchmarks.arms import Pace
from benchmarks.pc_darts import Arm
from tests.drills import words


@pytest.mark.parametrize("partial", [1, 4])
def test_both_forms_have_the_same_gradients(partial: int) -> None:
    assert bench.gradient_difference("tiny", partial, "cpu") < bench.GRADIENT_TOLERANCE


def test_gradients_that_differ_stop_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "gradient_difference", lambda *_: 2e-5)
    with pytest.raises(RuntimeError, match=r"tiny, K = 4: gradients differ by 2e-05"):
        next(bench.rows_of("tiny", "cpu", tmp_path, Pace(1, 1, 1)))


def test_both_forms_take_the_same_steps() -> None:
    losses = {}
    for side, last in (("plain", False), ("plain", True), ("fused", False)):
        step = bench.search_step(Arm(side, "tiny", "cpu", last=last))
        losses["last" if last else side] = torch.stack([step(i) for i in range(3)])
    torch.testing.assert_close(losses["fused"], losses["plain"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses["last"], losses["plain"], rtol=1e-4, atol=1e-4)
    assert len(set(losses["plain"].tolist())) == 3


@pytest.mark.parametrize("size", ["small", "medium"])
def test_the_larger_batch_fills_about_the_memory_of_darts(size: str) -> None:
    spec = bench.SIZES[size]
    darts, filled = bench.kept_bytes(size, 1, spec.batch), bench.kept_bytes(size, 4, spec.filling)
    assert 0.75 < filled / darts <= 1.05


def test_rows_name_size_target_and_both_sides(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    once = {"rounds": 1, "steps": 1, "threads": 1}
    rows = bench.main(words(sizes="tiny", devices="cpu", output=output, **once))
    assert json.loads(output.read_text())["rows"] == rows
    targets = {row["name"].split(" (tiny")[0]: row["target"] for row in rows}
    assert targets["search step, K=4, batched against op by op"] == 1.5
    assert targets["search step, K=4, both fp32, against the better peer"] == 1.15
    assert targets["search step, K=4, batched against op by op with channels last"] is None
    assert targets["memory kept for the backward pass, K=4 against DARTS (K=1), same batch"] == 2.5
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
