"""The smoke reproduction: the most robust claim at a budget of a minute, and what the plan counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenesplat import reproduce
from tests.claims import smoke_records


@pytest.mark.smoke
def test_a_short_training_is_already_better_than_every_baseline(cache: None, tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["A"] and found["A"]["tier"] == "smoke" and found["A"]["holds"]
    measured = found["A"]["measured"][0]
    assert measured["f_miou"] > max(measured["f_miou_most_frequent"], measured["f_miou_untrained"])


def test_the_plan_counts_the_published_networks() -> None:
    from scenesplat import plan

    lines = {line["network"]: line for line in plan.main(["--json"])}
    language = lines["language model, 11 attributes"]
    assert language["parameters"] == 91_712_800 and 74.0e6 < language["decoder"] < 74.2e6
    assert lines["five stages, 11 attributes"]["parameters"] == 46_186_272
    assert lines["five stages, 14 attributes"]["parameters"] == 46_198_272
    assert language["paper_gpu_days"] == 56.0 and language["crop_gflop"] > 1000
