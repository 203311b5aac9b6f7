"""SE-MoE's benchmark compares like with like, and reports what it compared. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import se_moe as bench
from se_moe.config import Switches
from tests.refusals import refused


def measured(tokens: float, cpu: float, peak: int, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens,
        "cpu_seconds_per_1000_tokens": cpu,
        "peak_bytes": peak,
        "loss": losses[-1],
        "losses": losses,
    }


def test_every_ablation_arm_lacks_exactly_its_switch() -> None:
    arms, on = bench.ablation_arms(), Switches()
    for name in bench.ABLATED:
        arm = arms[f"without {name}"]
        assert arm.switches is not None
        changed = {key for key, value in vars(arm.switches).items() if value != getattr(on, key)}
        assert changed == {name} and arm.arm == "ours"
    assert arms["everything on"].switches == on
    assert arms["tiers alone"].switches is not None and arms["tiers alone"].switches.tiers


def test_all_arms_train_the_same_model_on_the_same_batches(tmp_path: Path) -> None:
    arms = bench.deepspeed_arms() | bench.ablation_arms() | {"zero2": bench.Arm("deepspeed", zero_stage=2)}
    runs = [bench.configuration(arm, tmp_path, 5, "cpu", 8) for arm in arms.values()]
    for run in runs[1:]:
        for part in ("model", "data", "optimiser", "batch", "steps", "seed"):
            assert getattr(run, part) == getattr(runs[0], part), part


def test_rows_say_whether_ours_needs_three_quarters_of_the_time_and_82_percent_of_the_memory() -> None:
    found = {
        "resident": measured(100, 0.74, 81 << 20, [3.0, 2.0]),
        "zero2": measured(80, 1.0, 100 << 20, [3.0, 2.0001]),
        "naive": measured(50, 2.0, 90 << 20, [3.0, 2.0]),
    }
    rows = bench.deepspeed_rows(found, "tiny")
    of_deepspeed = [row for row in rows if "ZeRO-2" in row["name"]]
    assert [row["holds"] for row in of_deepspeed if row["target"] is not None] == [True, True, True]
    assert [row["target"] for row in rows if "every switch off" in row["name"]] == [None, None, None, 0.999]
    assert any(row.get("note") == "largest difference of any step's loss: 1.00e-04" for row in of_deepspeed)
    found["resident"]["peak_bytes"], found["resident"]["cpu_seconds_per_1000_tokens"] = 83 << 20, 0.76
    missed = [row for row in bench.deepspeed_rows(found, "tiny") if row["holds"] is False]
    assert len(missed) == 2 and all("ZeRO-2" in row["name"] for row in missed)


def test_the_ablation_table_shows_every_arm() -> None:
    text = bench.ablation_table({"everything on": measured(1234, 0.5, 3 << 20, [2.5])}, "2 ranks")
    assert text.splitlines()[0] == "2 ranks"
    assert text.splitlines()[-1].split() == ["everything", "on", "1,234", "0.500", "3.0", "2.50000"]


def test_two_arms_run_and_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "deepspeed_arms", lambda: {n: bench.Arm(n) for n in ("resident", "naive")})
    output = tmp_path / "bench.json"
    rows = bench.main(
        ["--parts", "deepspeed", "--steps", "4", "--rounds", "1", "--experts", "4", "--output", str(output)]
    )
    assert json.loads(output.read_text())["rows"] == rows and len(rows) == 4
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
    refused("at least 3", bench.main, ["--steps", "2"])
