"""What the claims about fitting are measured on: rooms fitted from their pictures, asked by networks of the study.

Fits of claims Pm and Pd take the study's optimiser steps, so that they climb its rungs; rooms that networks are trained
on or asked about are fitted with the default options of `data.gaussians fitted`, on every rung.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from common.data.sampling import derive_seed
from scenesplat.data import TEST_SEEDS, open_scenes
from scenesplat.data_config import DataConfig
from scenesplat.evaluate import Asked, counts_of, summed
from scenesplat.experiments import Study
from scenesplat.export import SceneModel
from scenesplat.fit_config import FitConfig, GrowthConfig, LossConfig, PicturesConfig
from scenesplat.fitted import DENSE, fit_room, fitted_quality
from scenesplat.fitting import Fitting, labelled
from scenesplat.inference import scene_classes
from scenesplat.photos import room_photos
from scenesplat.protocol import VOTERS, excluded_classes
from scenesplat.rooms import STRUCTURE, Room, make_room

ROOMS = 3  # that a claim about the fit itself is measured on, other ones for each seed
LENGTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the fits whose quality is compared
FIT = FitConfig(first=3000, most=6000, progress=False, pictures=PicturesConfig(views=40, width=96))
# Every arm differs from that in what stands here. The fixed number starts with as many as the growing one may end with.
FITS: dict[str, dict[str, Any]] = {
    "mcmc": {},
    "fixed": {"growth": GrowthConfig(kind="fixed"), "first": FIT.most},
    "without_depth": {"loss": LossConfig(depth=0.0)},
}


def fit_score(study: Study, name: str, seed: int) -> dict[str, float]:
    """Means over rooms of an arm's PSNR, SSIM and depth error on held-out pictures, after the study's steps."""

    def made() -> dict[str, float]:
        found = []
        for number in range(ROOMS):
            place = derive_seed(seed, number) % TEST_SEEDS
            room = make_room(place, "test", DENSE)
            options = replace(FIT, seed=seed, steps=study.sizes.steps, **FITS[name])
            # the start is points of the depth pictures in every arm, whatever the loss sees
            folder = study.workplace(f"fits/{name}-{seed}-{number}", study.settings)
            fitting = Fitting(room_photos(room, options.pictures, place), options, folder, "cpu")
            fitting.run()
            found.append(fitting.measure())
        return {key: statistics.fmean(values[key] for values in found) for key in found[0]}

    return study.values(f"fit-{name}-seed{seed}", made, study.settings)


def growing(study: Study, seed: int) -> dict[str, float]:
    """Claim Pm."""
    found = {name: fit_score(study, name, seed) for name in ("mcmc", "fixed")}
    each = {f"psnr_{name}": values["psnr"] for name, values in found.items()}
    return {"gain_psnr": each["psnr_mcmc"] - each["psnr_fixed"], **each}


def with_depth(study: Study, seed: int) -> dict[str, float]:
    """Claim Pd."""
    with_, without = (fit_score(study, name, seed) for name in ("mcmc", "without_depth"))
    return {
        "depth_ratio": with_["depth_l1"] / max(1e-9, without["depth_l1"]),
        "cost_psnr": without["psnr"] - with_["psnr"],
        "depth_l1_with": with_["depth_l1"],
        "depth_l1_without": without["depth_l1"],
        "psnr_with": with_["psnr"],
        "psnr_without": without["psnr"],
    }


def fitted_options(study: Study, name: str = "recipe") -> DataConfig:
    return replace(study.data_options(name), gaussians="fitted")


@cache
def fitted_rooms(study: Study) -> list[Room]:
    """The study's unseen rooms, fitted."""
    return open_scenes(fitted_options(study), "test", study.text, 0).rooms


def score_of(study: Study, model: SceneModel, rooms: list[Room], texts_KD: Tensor) -> float:
    """f-mIoU of a network on rooms."""
    counts = [
        counts_of(
            scene_classes(model, room.gaussians, texts_KD, limit=4),
            room.gaussians,
            Asked.of(room),
            len(study.names),
            VOTERS,
        )
        for room in rooms
    ]
    return summed(counts).metrics(excluded_classes(study.names, STRUCTURE))["f_miou"]


def on_fitted(study: Study, seed: int, arm: str = "recipe") -> dict[str, float]:
    """An arm's f-mIoU on the unseen rooms as they were sampled, and as they were fitted."""

    def made() -> dict[str, float]:
        model = study.model(arm, study.trained(arm, seed).network)
        texts, rooms = study.text.embed(study.names), fitted_rooms(study)
        quality = [
            fitted_quality(TEST_SEEDS + number, "test", fitted_options(study), room)["psnr"]
            for number, room in enumerate(rooms)
        ]
        return {"f_miou": score_of(study, model, rooms, texts), "psnr": statistics.fmean(quality)}

    return study.values(f"fitted-{arm}-seed{seed}", made, study.settings)


def loss_of_quality(study: Study, seed: int) -> dict[str, float]:
    """Claim Pq."""
    sampled, found = study.score("recipe", seed)["f_miou"], on_fitted(study, seed)
    return {
        "kept_share": found["f_miou"] / max(1e-9, sampled),
        "f_miou_sampled": sampled,
        "f_miou_fitted": found["f_miou"],
        "psnr_fitted": found["psnr"],
    }


def trained_on_fitted(study: Study, seed: int) -> dict[str, float]:
    """Claim Pf."""
    found = {name: on_fitted(study, seed, name)["f_miou"] for name in ("fitted", "recipe")}
    gain = 100 * (found["fitted"] - found["recipe"])
    return {"gain_of_fitted": gain, **{f"f_miou_{name}": value for name, value in found.items()}}


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; 0 where one of the two stays the same."""
    return float(spearmanr(a, b).statistic) if len({*a}) > 1 and len({*b}) > 1 else 0.0


def by_length(study: Study, seed: int) -> dict[str, float]:
    """Claim Pg: over fits of some rooms that were stopped at several lengths."""

    def made() -> dict[str, float]:
        model = study.model("recipe", study.trained("recipe", seed).network)
        texts, options = study.text.embed(study.names), fitted_options(study)
        psnrs: list[list[float]] = []
        scores: list[list[float]] = []
        for number in range(min(ROOMS, len(study.rooms))):
            fitting = fit_room(TEST_SEEDS + number, "test", options)
            psnrs.append([])
            scores.append([])
            for length in LENGTHS:
                fitting.run(max(1, int(length * fitting.config.steps)))
                assert fitting.photos.room is not None
                scene = labelled(fitting.scene(), fitting.photos.room).gaussians
                room = replace(study.rooms[number], gaussians=scene)
                psnrs[-1].append(fitting.measure()["psnr"])
                scores[-1].append(score_of(study, model, [room], texts))
        means = torch.tensor(psnrs).mean(0), torch.tensor(scores).mean(0)
        found = {"spearman_fits": statistics.fmean(correlation(a, b) for a, b in zip(psnrs, scores))}
        for name, values in zip(("psnr", "f_miou"), means):
            found |= {f"{name}_{kind}": float(values[at]) for kind, at in (("shortest", 0), ("longest", -1))}
        return found

    return study.values(f"lengths-seed{seed}", made, study.settings)
