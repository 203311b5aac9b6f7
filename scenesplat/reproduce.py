"""Measure the paper's claims at small scale: `python scenesplat/reproduce.py` writes results/scenesplat.json.

    python scenesplat/reproduce.py                          # tier small: 3 seeds of every claim
    python scenesplat/reproduce.py --claims A D             # some of them
    python scenesplat/reproduce.py --tier smoke             # what CI runs

The claims, with targets, sizes and budgets (optimiser steps), are in claims.yaml. Every finished (claim, seed) is kept
in runs/reproduce/, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from common import reproduction
from common.cpu import tune_allocator
from common.errors import run_main
from common.study import open_sizes
from scenesplat import fit_experiments
from scenesplat.experiments import SYNONYMS, Sizes, Study, lifting_against_passing
from scenesplat.figures import draw_figures
from scenesplat.rooms import STRUCTURE

POINTS = 100.0


def a(study: Study, seed: int) -> dict[str, float]:
    """The trained network against the baselines."""
    found, baselines = study.score("recipe", seed), study.baselines(seed)
    best = max(baselines.values())
    return {**_plain(found), **baselines, "times_baseline": found["f_miou"] / max(1e-9, best)}


def _plain(found: dict[str, float]) -> dict[str, float]:
    return {key: float(found[key]) for key in ("f_miou", "f_macc", "miou", "macc", "accuracy")}


def a45(study: Study, seed: int) -> dict[str, float]:
    """The same, against a bar of its own."""
    return _plain(study.score("recipe", seed))


def b(study: Study, seed: int) -> dict[str, float]:
    """The network against the labels of the unseen rooms."""
    network, labels = study.score("recipe", seed), study.labels_score()
    return {
        "gain_over_labels": POINTS * (network["f_miou"] - labels["f_miou"]),
        "f_miou_network": network["f_miou"],
        "f_miou_labels": labels["f_miou"],
    }


def against(study: Study, seed: int, name: str, *others: str) -> dict[str, float]:
    """f-mIoU of an arm minus that of the best other one, in points, and all of them."""
    found = {arm: study.score(arm, seed)["f_miou"] for arm in (name, *others)}
    gain = POINTS * (found[name] - max(found[arm] for arm in others))
    return {"gain": gain, **{f"f_miou_{arm}": value for arm, value in found.items()}}


def c(study: Study, seed: int) -> dict[str, float]:
    """11 attributes against those of points."""
    found = against(study, seed, "recipe", "colour", "colour_normal")
    return {"gain_over_points": found.pop("gain"), **found}


def d(study: Study, seed: int) -> dict[str, float]:
    """The contrastive loss: late against never and always."""
    found = against(study, seed, "recipe", "never", "always")
    return {"gain_of_late": found.pop("gain"), **found}


def e(study: Study, seed: int) -> dict[str, float]:
    """Time of lifting and of a pass."""
    return lifting_against_passing(seed=seed)


def g(study: Study, seed: int) -> dict[str, float]:
    """Quality of the Gaussians."""
    return study.by_quality(seed)


def gk(study: Study, seed: int) -> dict[str, float]:
    """Votes of 1, 5, 9 and 25 neighbours."""

    def made() -> dict[str, float]:
        model = study.model("recipe", study.trained("recipe", seed).network)
        found = study.found(model, study.text.embed(study.names))
        return {f"f_miou_{k}": study.metrics(found, k)["f_miou"] for k in (1, 5, 9, 25)}

    values = study.values(f"votes-seed{seed}", made, study.settings)
    return {"gain_of_votes": POINTS * (values["f_miou_25"] - values["f_miou_1"]), **values}


def gs(study: Study, seed: int) -> dict[str, float]:
    """Many rooms against few."""
    found = against(study, seed, "recipe", "few_rooms")
    return {"gain_of_rooms": found.pop("gain"), **found}


def h(study: Study, seed: int) -> dict[str, float]:
    """Other words for the classes, none of which any label had."""

    def made() -> dict[str, float]:
        model = study.model("recipe", study.trained("recipe", seed).network)
        words = [SYNONYMS.get(name, name) for name in study.names]
        asked = torch.tensor([name in SYNONYMS for name in study.names])
        result = {}
        for kind, names in (("names", study.names), ("synonyms", words)):
            found = study.found(model, study.text.embed(names))
            rights = []
            for labels, room in zip(found, study.rooms):
                truth = room.gaussians.labels_N
                assert truth is not None
                inside = asked[truth.clamp(min=0)] & (truth >= len(STRUCTURE))
                rights.append((labels == truth)[inside])
            result[f"accuracy_{kind}"] = float(torch.cat(rights).float().mean())
        return result

    values = study.values(f"synonyms-seed{seed}", made, study.settings)
    return {"synonym_ratio": values["accuracy_synonyms"] / max(1e-9, values["accuracy_names"]), **values}


def hu(study: Study, seed: int) -> dict[str, float]:
    """Classes that no training room has."""
    return study.unknown(seed)


def fm(study: Study, seed: int) -> dict[str, float]:
    """Gaussians that grow against a fixed number."""
    return fit_experiments.growing(study, seed)


def fd(study: Study, seed: int) -> dict[str, float]:
    """Fits with and without the depth loss."""
    return fit_experiments.with_depth(study, seed)


def fq(study: Study, seed: int) -> dict[str, float]:
    """Fitted rooms against sampled ones, before a network of sampled ones."""
    return fit_experiments.loss_of_quality(study, seed)


def ff(study: Study, seed: int) -> dict[str, float]:
    """A network of fitted rooms against one of sampled ones, before fitted ones."""
    return fit_experiments.trained_on_fitted(study, seed)


def gf(study: Study, seed: int) -> dict[str, float]:
    """Quality of the fits."""
    return fit_experiments.by_length(study, seed)


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(open_sizes(Sizes, "scenesplat", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "scenesplat",
        __doc__,
        (a, a45, b, c, d, e, g, gk, gs, h, hu, fm, fd, fq, ff, gf),
        open_study,
        figures=lambda study, ledger: draw_figures(ledger, study.figures),
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
