"""The smoke reproduction: the most robust claim at a budget of seconds, and what the plan counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from slam import reproduce
from tests.claims import smoke_records


@pytest.mark.smoke
def test_the_error_rises_along_the_sub_path_and_the_released_form_starts_wrong(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["S3"] and found["S3"]["tier"] == "smoke" and found["S3"]["holds"]
    measured = found["S3"]["measured"][0]
    assert measured["rising_slam"] >= 0.9 and measured["rising_released"] < 0.5
    assert measured["error_released_0"] > 10 * measured["error_slam_1"]
    assert measured["error_released_1"] < 2 * measured["error_slam_1"]  # at gamma = 1 both forms are one


def test_the_plan_counts_the_published_model() -> None:
    from slam import plan

    (line,) = plan.main(["--json"])
    assert line["parameters"] == 859_520_964 + 256 * 320 == line["trained"]
    assert line["samples"] == 80_000 * 48 and line["forwards"] == 6 and line["paper_days"] == 6.0
    # One U-Net forward of Stable Diffusion 1.5 at 64 x 64 is some 0.8 TFLOP.
    assert line["pflop"] * 1e15 / line["samples"] / 6 == pytest.approx(0.8e12, rel=0.1)
