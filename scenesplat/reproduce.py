"""Measure the paper's claims at small scale: `python scenesplat/reproduce.py` writes results/scenesplat.json.

    python scenesplat/reproduce.py                          # tier small: 3 seeds of every claim
    python scenesplat/reproduce.py --claims A D             # some of them
    python scenesplat/reproduce.py --tier smoke             # what CI runs
    python scenesplat/reproduce.py --ablations              # the table of ablations, results/ablations_scenesplat.md

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
from common.files import write_atomically
from common.publishing import markdown_table
from common.study import open_sizes
from scenesplat import fit_experiments
from scenesplat.experiments import ARMS, SYNONYMS, Sizes, Study, lifting_against_passing
from scenesplat.figures import draw_figures
from scenesplat.rooms import STRUCTURE
from scenesplat.self_experiments import ROOMS, SCRATCH, SELF_ARMS, gains

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


def pm(study: Study, seed: int) -> dict[str, float]:
    """Gaussians that grow against a fixed number."""
    return fit_experiments.growing(study, seed)


def pd(study: Study, seed: int) -> dict[str, float]:
    """Fits with and without the depth loss."""
    return fit_experiments.with_depth(study, seed)


def pq(study: Study, seed: int) -> dict[str, float]:
    """Fitted rooms against sampled ones, before a network of sampled ones."""
    return fit_experiments.loss_of_quality(study, seed)


def pf(study: Study, seed: int) -> dict[str, float]:
    """A network of fitted rooms against one of sampled ones, before fitted ones."""
    return fit_experiments.trained_on_fitted(study, seed)


def pg(study: Study, seed: int) -> dict[str, float]:
    """Quality of the fits."""
    return fit_experiments.by_length(study, seed)


def tuned(study: Study, seed: int, name: str, *others: str) -> dict[str, float]:
    """mIoU of an encoder fine-tuned on a few rooms minus that of the best other one, in points, and all of them."""
    found = {arm: study.self_supervised.tuned(arm, seed)["miou"] for arm in (name, *others)}
    return {"gain": gains(found, name, others), **{f"miou_{arm}": value for arm, value in found.items()}}


def f(study: Study, seed: int) -> dict[str, float]:
    """Pre-training without labels against none, at four labelled rooms; two and eight beside it."""
    values = tuned(study, seed, "ssl", SCRATCH)
    result = {"gain_of_pretraining": values.pop("gain"), **values}
    for rooms in (2, 8):
        for arm in ("ssl", SCRATCH):
            result[f"miou_{arm}_{rooms}"] = study.self_supervised.tuned(arm, seed, rooms)["miou"]
    return result


def fr(study: Study, seed: int) -> dict[str, float]:
    """Effective rank of the decoder's features with masked modelling alone, and without it."""
    arms = {"masked": "ssl_masked", "distilled": "ssl_no_masked", "whole": "ssl"}
    return {f"rank_{key}": study.self_supervised.seen(arm, seed)["rank_decoder"] for key, arm in arms.items()}


def fh(study: Study, seed: int) -> dict[str, float]:
    """Error at hidden Gaussians of unseen rooms: heads that train against heads that stay as they were drawn."""
    trained, frozen = (study.self_supervised.seen(arm, seed) for arm in ("ssl", "ssl_frozen_heads"))
    return {
        "error_ratio": trained["hidden_error"] / frozen["hidden_error"],
        "error_trained": trained["hidden_error"],
        "error_frozen": frozen["hidden_error"],
        "error_mean": trained["mean_error"],
    }


def fm(study: Study, seed: int) -> dict[str, float]:
    """Share of what is hidden: 0.6 against 0.3 and 0.8."""
    values = tuned(study, seed, "ssl", "ssl_ratio_30", "ssl_ratio_80")
    return {"gain_of_ratio": values.pop("gain"), **values}


def fl(study: Study, seed: int) -> dict[str, float]:
    """With the language alignment against without it."""
    values = tuned(study, seed, "ssl", "ssl_no_language")
    return {"gain_of_language": values.pop("gain"), **values}


def f3(study: Study, seed: int) -> dict[str, float]:
    """Codes learned from lifted features against codes learned from those of pictures."""
    values = tuned(study, seed, "ssl", "ssl_pictures")
    return {"gain_of_lifted": values.pop("gain"), **values}


def f64(study: Study, seed: int) -> dict[str, float]:
    """Codes of 64 against codes of 16, and 64 reduced to 16 in a second step."""
    values = tuned(study, seed, "ssl_64_16", "ssl_64")
    wide = study.self_supervised.tuned("ssl", seed)["miou"]
    gain = POINTS * (values["miou_ssl_64"] - wide)
    return {"gain_of_two_steps": values.pop("gain"), "gain_of_width": gain, **values, "miou_ssl": wide}


def ablations(study: Study, given: argparse.Namespace) -> bool:
    """With --ablations: one table over the options of both trainings, one seed; instead of the claims."""
    if not given.ablations:
        return False
    rows = []
    for name in ARMS:
        score = study.score(name, 0)
        rows.append([name, _in_words(ARMS[name]), f"{score['f_miou']:.3f}", f"{score['f_macc']:.3f}"])
    tuned_rows = []
    for name in (SCRATCH, *SELF_ARMS):
        score, words = study.self_supervised.tuned(name, 0), _in_words(SELF_ARMS.get(name, {}))
        seen = study.self_supervised.seen(name, 0) if name != SCRATCH else {}
        told = [f"{seen[key]:.3f}" if key in seen else "" for key in ("rank_decoder", "hidden_error")]
        tuned_rows.append([name, words, f"{score['miou']:.3f}", f"{score['f_miou']:.3f}", *told])
    sizes, own = study.sizes, study.sizes.self_supervision
    text = "\n\n".join(
        [
            markdown_table(["language arm", "differs in", "f-mIoU", "f-mAcc"], rows),
            f"Zero-shot on {sizes.eval_rooms} unseen rooms after {sizes.steps} steps of {sizes.batch} rooms, one seed.",
            markdown_table(
                [
                    "self-supervised arm",
                    "differs in",
                    "mIoU",
                    "f-mIoU",
                    "rank of the decoder",
                    "error at what is hidden",
                ],
                tuned_rows,
            ),
            f"{own.steps} steps of {own.batch} rooms without labels, then {own.tune_steps} of two on {ROOMS} labelled "
            "rooms, one seed.",
        ]
    )
    path = study.results / "ablations_scenesplat.md"
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))
    print(text)
    return True


def _in_words(arm: dict[str, Any]) -> str:
    changes = [f"{key} {value}" for part in arm.values() for key, value in part.items()]
    return ", ".join(changes) or "-"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ablations", action="store_true", help="measure the table of ablations instead of the claims")


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(open_sizes(Sizes, "scenesplat", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "scenesplat",
        __doc__,
        (a, a45, b, c, d, e, f, f3, f64, fh, fl, fm, fr, g, gk, gs, h, hu, pm, pd, pq, pf, pg),
        open_study,
        figures=lambda study, ledger: draw_figures(ledger, study.figures),
        options=options,
        instead=ablations,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
