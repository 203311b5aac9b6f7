"""The smoke reproduction: the most robust claim at a budget of a minute, and what the plan counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenesplat import reproduce
from tests.claims import smoke_records


@pytest.mark.smoke
def test_a_short_training_is_already_better_than_every_baseline(cache: None, tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path, "A")
    assert list(found) == ["A"] and found["A"]["tier"] == "smoke" and found["A"]["holds"]
    measured = found["A"]["measured"][0]
    assert measured["f_miou"] > max(measured["f_miou_most_frequent"], measured["f_miou_untrained"])


@pytest.mark.smoke
def test_heads_that_train_are_soon_better_than_heads_that_do_not(cache: None, tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path, "Fh")["Fh"]
    assert found["tier"] == "smoke" and found["holds"], found["measured"]
    assert found["measured"][0]["error_frozen"] > found["measured"][0]["error_trained"] > 0


def test_every_claim_on_self_supervision_names_arms_that_exist_and_differ() -> None:
    from scenesplat.config import NetworkConfig
    from scenesplat.self_experiments import SELF_ARMS, SelfSizes, SelfSupervised

    sizes = SelfSizes(2, 0.004, 0.002, 64, 16, 0.006, 0.002, 10, 10)
    arms = SelfSupervised(None, sizes, NetworkConfig(), {})  # type: ignore[arg-type]
    options = [repr(arms.options(name)) for name in SELF_ARMS]
    assert len(set(options)) == len(options)
    assert arms.network.mask_token and arms.network.pooling == "max"


def test_the_plan_counts_the_published_networks() -> None:
    from scenesplat import plan

    lines = {line["network"]: line for line in plan.main(["--json"])}
    language = lines["language model, 11 attributes"]
    assert language["parameters"] == 91_712_800 and 74.0e6 < language["decoder"] < 74.2e6
    assert lines["five stages, 11 attributes"]["parameters"] == 46_186_272
    assert lines["five stages, 14 attributes"]["parameters"] == 46_198_272
    assert language["paper_gpu_days"] == 56.0 and language["crop_gflop"] > 1000
