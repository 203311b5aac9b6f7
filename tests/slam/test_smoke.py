"""The smoke reproduction: the most robust claim at a budget of seconds, and what the plan counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from slam import reproduce
from tests.claims import smoke_records


@pytest.mark.smoke
def test_a_few_steps_of_the_student_beat_as_many_of_the_teachers_solvers(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["S4"] and found["S4"]["tier"] == "smoke"
    measured = found["S4"]["measured"][0]
    assert found["S4"]["holds"] and measured["worst_ratio"] < 1
    assert {f"fd_{name}_{steps}" for name in ("slam", "lcm", "ddim", "dpm") for steps in (2, 4)} <= measured.keys()


def test_the_plan_counts_the_published_model() -> None:
    from slam import plan

    (line,) = plan.main(["--json"])
    assert line["parameters"] == 859_520_964 + 256 * 320 == line["trained"]
    assert line["samples"] == 80_000 * 48 and line["forwards"] == 6 and line["paper_days"] == 6.0
    # One U-Net forward of Stable Diffusion 1.5 at 64 x 64 is some 0.8 TFLOP.
    assert line["pflop"] * 1e15 / line["samples"] / 6 == pytest.approx(0.8e12, rel=0.1)
