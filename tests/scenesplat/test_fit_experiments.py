"""What the claims about fitting measure, at a size of seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from scenesplat import fit_experiments, fitted
from scenesplat.data_config import DataConfig
from scenesplat.experiments import Sizes, Study
from scenesplat.fit_config import PicturesConfig
from scenesplat.self_experiments import SelfSizes

SELF = SelfSizes(2, 0.004, 0.002, 8, 4, 0.006, 0.002, 1, 1)
SIZES = Sizes(rooms=1, few_rooms=1, eval_rooms=1, batch=1, lr=0.006, block_lr=0.003, steps=2, self_supervision=SELF)


@pytest.fixture
def study(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> Study:
    small = replace(fit_experiments.FIT, first=150, most=300, pictures=PicturesConfig(views=6, width=32, test_every=3))
    monkeypatch.setattr(fit_experiments, "FIT", small)
    monkeypatch.setitem(fit_experiments.FITS["fixed"], "first", 300)
    monkeypatch.setattr(fit_experiments, "ROOMS", 1)
    monkeypatch.setattr(fit_experiments, "LENGTHS", (0.25, 1.0))
    for module in (fit_experiments, fitted):
        monkeypatch.setattr(module, "DENSE", 60.0)

    def options(study: Study, name: str = "recipe") -> DataConfig:
        few = replace(study.data_options(name), gaussians="fitted", fit_steps=4, fit_views=6)
        return replace(few, fit_width=32, fit_most=300, views=2, view_size=32)

    monkeypatch.setattr(fit_experiments, "fitted_options", options)
    return Study(SIZES, tmp_path / "study")


def test_arms_of_the_fit_differ_in_one_thing_and_are_measured_on_pictures_that_were_held_out(study: Study) -> None:
    grown = fit_experiments.growing(study, 0)
    assert grown["gain_psnr"] == pytest.approx(grown["psnr_mcmc"] - grown["psnr_fixed"])
    depth = fit_experiments.with_depth(study, 0)
    assert depth["psnr_with"] == grown["psnr_mcmc"]  # one and the same arm
    assert depth["depth_ratio"] > 0 and depth["depth_l1_with"] != depth["depth_l1_without"]
    assert fit_experiments.growing(study, 0) == grown


def test_the_loss_of_quality_is_the_share_that_is_left_on_fitted_rooms(study: Study) -> None:
    found = fit_experiments.loss_of_quality(study, 0)
    assert 0 <= found["f_miou_fitted"] <= 1 and math.isfinite(found["psnr_fitted"])
    assert found["kept_share"] == pytest.approx(found["f_miou_fitted"] / max(1e-9, found["f_miou_sampled"]))
    lengths = fit_experiments.by_length(study, 0)
    assert {"psnr_shortest", "psnr_longest", "f_miou_shortest", "f_miou_longest", "spearman_fits"} == {*lengths}
    assert lengths["psnr_shortest"] != lengths["psnr_longest"]
