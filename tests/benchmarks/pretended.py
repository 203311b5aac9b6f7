"""Timings without a clock: our arms take one second a step, all others two; and what every list of rows must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.arms import Pace, Timing

PACE = Pace(rounds=2, steps=2, threads=1)


def timings(arms: Mapping[str, Any], warm_up: int | Mapping[str, int] = 0) -> dict[str, Timing]:
    first = dict.fromkeys(arms, warm_up) if isinstance(warm_up, int) else warm_up
    seconds = {name: 1.0 if name.startswith("ours") else 2.0 for name in arms}
    memory = {name: int(s * 2**30) for name, s in seconds.items()}
    return {n: Timing(s, s, memory[n], [1.0] * first[n], s / 2, memory[n]) for n, s in seconds.items()}


def pretend(bench: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No arm of the benchmark is started; returns those that would have been, which fill it."""
    seen: dict[str, Any] = {}

    def take_turns(
        module: str, arms: Mapping[str, Any], pace: Pace, warm_up: Any, folder: Path, *options: str, steps: Any = None
    ) -> dict[str, Timing]:
        seen.update(arms)
        assert steps is None or set(arms) == set(steps) == set(warm_up)
        return timings(arms, warm_up)

    patch.setattr(bench, "take_turns", take_turns)
    return seen


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Every row says what it compared; ours is twice as fast in half the memory, where at most the peer's is asked."""
    json.dumps(rows)
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(row["note"] and row["hardware"] and row["commit"] for row in rows)
    assert {row["ratio"] for row in rows if row["unit"] in ("images/s", "tokens/s", "MiB")} == {2.0}
    assert {row["target"] for row in rows if row["unit"] == "MiB"} == {1.0}


def check_precisions(seen: Mapping[str, Any], ours: str = "ours", peer: str = "peer") -> None:
    """Where both sides have the same precision in the name they have it in the arms."""
    for precision in ("bf16", "fp32"):
        assert seen[f"{ours} {precision}"].bf16 == seen[f"{peer} {precision}"].bf16 == (precision == "bf16")
