"""The smoke reproduction: the most robust claims at a budget of seconds, through the same program as the small tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from instaflow import reproduce
from tests.claims import smoke_records


@pytest.mark.smoke
def test_reflow_straightens_and_makes_distillation_easier(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    straight, easier = found["I1"], found["I3"]
    assert len(found) == 2 and straight["tier"] == "smoke"
    assert straight["measured"][0]["straightness_ratio"] <= 0.5
    assert easier["measured"][0]["regression_error_ratio"] < 1.0


def test_plan_adds_up_to_the_papers_gpu_days() -> None:
    from instaflow import plan

    stages = plan.main(["--json"])
    assert sum(stage["paper_days"] for stage in stages) == pytest.approx(199.2)
    by_name = {stage["name"]: stage for stage in stages}
    assert by_name["pairs"]["samples"] * by_name["pairs"]["forwards"] == 1_600_000 * 50
    assert by_name["reflow 1, then"]["samples"] == 1024 * 25_000
    # One U-Net forward of Stable Diffusion 1.5 at 64 x 64 is some 0.8 TFLOP.
    assert by_name["reflow 1"]["flop"] / by_name["reflow 1"]["samples"] / 3 == pytest.approx(0.8e12, rel=0.1)
