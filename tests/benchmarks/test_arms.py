"""The rows that benchmarks of training steps share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import arms
from tests.benchmarks.pretended import PACE, check_precisions, check_rows, timings


@pytest.mark.parametrize("flop", [None, lambda: 1e9])
def test_rows_of_a_training_step_say_what_was_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flop: Any
) -> None:
    seen: dict[str, arms.Arm] = {}

    def take_turns(module: str, given: dict[str, arms.Arm], *_: Any, steps: dict[str, int]) -> dict[str, arms.Timing]:
        seen.update(given)
        assert steps == {name: 4 if name.startswith("peak") else PACE.steps for name in given}
        return timings(given)

    monkeypatch.setattr(arms, "take_turns", take_turns)
    rows, found = arms.training_rows("module", "small", "cpu", tmp_path, PACE, 4, "step against plain", 1.3, flop)
    check_rows(rows)
    check_precisions(seen)
    assert set(found) == set(seen)
    first = "step against plain, default against default: ours bf16, peer fp32 (small, batch 4)"
    assert (rows[0]["name"], rows[0]["target"], rows[0]["ours"]) == (first, 1.3, 4.0)
    peaks = ["share of the matmul peak, training step, bf16 (small, batch 4)"] if flop else []
    assert [row["name"] for row in rows if "peak," in row["name"] and "bf16" in row["name"]] == peaks
