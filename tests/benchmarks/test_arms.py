"""The rows that benchmarks of training steps share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import arms
from common.ledger import bench_row
from common.paths import REPOSITORY
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
    first = "step against plain, default against default: ours fp32, peer fp32 (small, batch 4)"  # equally fast
    assert (rows[0]["name"], rows[0]["target"], rows[0]["ours"]) == (first, 1.3, 4.0)
    peaks = ["share of the matmul peak, training step, bf16 (small, batch 4)"] if flop else []
    assert [row["name"] for row in rows if "peak," in row["name"] and "bf16" in row["name"]] == peaks


@pytest.mark.parametrize(
    ("device", "bf16", "taken"), [("cpu", 0.8, "bf16"), ("cpu", 0.95, "fp32"), ("cuda", 2.0, "bf16")]
)
def test_our_default_is_the_precision_that_auto_takes(
    device: str, bf16: float, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {f"{side} {p}": 2.0 for side in ("ours", "peer") for p in arms.PRECISIONS}
    given |= {"ours fp32": 1.0, "ours bf16": bf16}
    timings_of = {name: arms.Timing(wall, wall, 2**20, [], wall) for name, wall in given.items()}

    def row(form: str, mine: arms.Timing, theirs: arms.Timing, bar: float | None) -> dict[str, Any]:
        return bench_row(f"step, {form}", 1 / mine.wall, 1 / theirs.wall, "images/s", target=bar)

    first, *_ = arms.beside_the_peer(timings_of, device, "fp32", row, 1.3, "memory", "small")
    assert first["name"] == f"step, default against default: ours {taken}, peer fp32"
    assert first["ratio"] == pytest.approx(2.0 / given[f"ours {taken}"])
    other = first["name"].replace(f"ours {taken}", "ours bf16" if taken == "fp32" else "ours fp32")
    arms.record([{**first, "name": other}], tmp_path / "bench.json")
    arms.record([first], tmp_path / "bench.json")
    assert [kept["name"] for kept in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [first["name"]]


def test_the_target_counts_for_the_faster_form_of_ours_against_the_faster_one_of_the_peers() -> None:
    seconds = {"ours": 2.0, "eager": 4.0, "compiled": 3.0, "ours compiled": 1.0}
    given = {name: arms.Timing(wall, wall, 2**20, [], wall) for name, wall in seconds.items()}

    def row(form: str, ours: arms.Timing, peer: arms.Timing, bar: float | None) -> dict[str, Any]:
        return {"form": form, "ratio": peer.wall / ours.wall, "target": bar}

    found = list(arms.at_its_best("bf16", row, 1.5, *given.values()))
    assert [(each["form"], each["ratio"], each["target"]) for each in found] == [
        ("bf16, ours eager against peer compiled", 1.5, None),
        ("bf16, both compiled", 3.0, None),
        ("both bf16, against the better peer", 3.0, 1.5),
    ]
    assert found[-1]["note"].endswith("the better one is compiled, ours is compiled (compiled: 1 MiB beside its 1)")
    eager = list(arms.at_its_best("bf16", row, 1.5, *list(given.values())[:3]))
    assert len(eager) == 2 and eager[-1]["ratio"] == 1.5 and eager[-1]["note"].endswith("the better one is compiled")


STEPS = """
import torch
from benchmarks.arms import Turns
weights = torch.ones(50 * 2**18)
Turns("cpu").serve(lambda index: torch.ones((20 + 40 * index) * 2**18).sum())
"""


def test_what_steps_add_is_not_what_lived_before_them() -> None:
    # In a process of its own, as an arm is: what other tests have told the allocator stays with theirs.
    command = [sys.executable, "-c", STEPS]
    done = subprocess.run(command, input="1\n2\n", capture_output=True, text=True, cwd=REPOSITORY, check=True)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["added"] / 2**20 == pytest.approx(20, abs=12) and len(second["losses"]) == 2
    assert second["added"] / 2**20 == pytest.approx(100, abs=30)
    assert second["memory"] >= second["added"] + 50 * 2**20
