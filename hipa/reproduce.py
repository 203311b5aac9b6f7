"""Measure the paper's claims at small scale: `python hipa/reproduce.py` writes results/hipa.json and its figures.

    python hipa/reproduce.py                          # tier small: 3 seeds of every claim
    python hipa/reproduce.py --claims H1 H3           # some of them
    python hipa/reproduce.py --ablations              # the ablation table, results/ablations_hipa.md
    python hipa/reproduce.py --tier smoke             # what CI runs

The claims, with targets, sizes and budgets (optimiser steps), are in claims.yaml; the teachers are those of
ldm/pretrained. Every finished (claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it
stopped; another teacher starts afresh.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import reproduction
from common.cpu import tune_allocator
from common.errors import run_main
from common.files import write_atomically
from common.metrics.measures import EVALUATION_SEED, fixed_noise
from common.paths import REPOSITORY
from common.publishing import markdown_table
from common.study import labelled, open_sizes
from common.teacher import Teacher
from hipa.analyse import Exchange, compare
from hipa.experiments import ABLATIONS, ARMS, TASKS, Sizes, Study
from hipa.figures import draw_figures

TEACHERS = REPOSITORY / "ldm" / "pretrained"


def on_emoji(study: Study) -> Study:
    """The same study on the teacher of emoji, in a folder of its own."""
    return study.beside(Study(Teacher.load(TEACHERS / "emoji64"), study.sizes, study.folder / "emoji64", "emoji"))


def few_parameters(study: Study, seed: int) -> dict[str, float]:
    """Adapted one step against the frozen model with one step and with two."""
    ours = study.measures("hipa", seed)
    frozen, guided, two, many = (study.frozen_measures(name) for name in ("one", "guided", "two", "many"))
    bands = [f"coherence_{i}" for i in range(5)]
    return {
        "fd_ratio": ours["fd_data"] / min(frozen["fd_data"], guided["fd_data"]),
        "two_steps_ratio": ours["fd_data"] / two["fd_data"],
        **study.forwards("hipa"),
        **labelled(ours, "hipa", "fd_data", "fd_teacher", "hf_error", "perceptual", *bands),
        **labelled(frozen, "frozen", "fd_data", "fd_teacher", "hf_error", "perceptual", *bands),
        **{f"fd_data_{name}": of["fd_data"] for name, of in (("guided", guided), ("two", two), ("many", many))},
        "lr_hipa": study.learning_rate("hipa"),
    }


def h1(study: Study, seed: int) -> dict[str, float]:
    """On Shapes."""
    return few_parameters(study, seed)


def h1e(study: Study, seed: int) -> dict[str, float]:
    """On emoji."""
    return few_parameters(on_emoji(study), seed)


def high_frequency_loss(study: Study, seed: int) -> dict[str, float]:
    """The whole loss against its parts, after equal steps, each at its own rate."""
    found = {name: study.measures(name, seed) for name in ("hipa", "spatial", "pixel")}
    ours, others = found["hipa"], [found["spatial"], found["pixel"]]
    result = {
        "fd_ratio": max(ours["fd_data"] / other["fd_data"] for other in others),
        "energy_ratio": max(ours["hf_error"] / other["hf_error"] for other in others),
    }
    for name, values in found.items():
        result |= labelled(values, name, "fd_data", "hf_error", *(f"coherence_{i}" for i in range(5)))
        result |= labelled(values, name, *(key for key in ("accuracy", "entropy") if key in values))
        result[f"lr_{name}"] = study.learning_rate(name)
    return result


def h2(study: Study, seed: int) -> dict[str, float]:
    """On Shapes."""
    return high_frequency_loss(study, seed)


def h2e(study: Study, seed: int) -> dict[str, float]:
    """On emoji."""
    return high_frequency_loss(on_emoji(study), seed)


def what_one_step_lacks(study: Study, seed: int) -> dict[str, float]:
    """The frozen model's one step against its many steps, from noises of their own for each seed."""

    def made() -> dict[str, float]:
        whole = study.evaluation
        own = replace(whole, noise=fixed_noise(len(whole), study.teacher.latent_shape, EVALUATION_SEED + 10 + seed))
        one, many = study.drawn(study.frozen(), own), study.drawn(study.many_steps(study.sizes.solver_steps), own)
        assert whole.reference is not None
        found = compare(one, many, whole.reference, study.judge, one.shape[-2] / 8)
        turns = Exchange(one, many, whole.reference, study.judge).turning_radius()
        return {
            "error_ratio": found["error_above"] / found["error_below"],
            "exchange_ratio": found["fd_low_one_high_many"] / found["fd_low_many_high_one"],
            **{key: found[key] for key in ("fd_one", "fd_many", "fd_low_one_high_many", "fd_low_many_high_one")},
            **{f"error_{i}": value for i, value in enumerate(found["error"])},
            **{f"coherence_{i}": value for i, value in enumerate(found["coherence"])},
            "turning_radius": float("nan") if turns is None else turns,
        }

    return study.values(f"lacking-seed{seed}", made, study.settings)


def h3(study: Study, seed: int) -> dict[str, float]:
    """Errors by band."""
    return what_one_step_lacks(study, seed)


def h3x(study: Study, seed: int) -> dict[str, float]:
    """Exchange of bands."""
    return what_one_step_lacks(study, seed)


def h3e(study: Study, seed: int) -> dict[str, float]:
    """Both on emoji."""
    return what_one_step_lacks(on_emoji(study), seed)


def h4(study: Study, seed: int) -> dict[str, float]:
    """Against progressive distillation with ten times the U-Net evaluations."""
    ours, theirs, costs = study.measures("hipa", seed), study.progressive(seed), study.forwards("hipa")
    return {
        "fd_ratio": ours["fd_data"] / theirs["fd_data"],
        "forwards_ratio": costs["forwards"] / theirs["forwards"],
        **costs,
        "forwards_progressive": theirs["forwards"],
        "fd_data_hipa": ours["fd_data"],
        "fd_data_progressive": theirs["fd_data"],
    }


def h6(study: Study, seed: int) -> dict[str, float]:
    """Editing, inpainting and super-resolution, each on its own base with an adaptor of its own."""
    result: dict[str, float] = {}
    distances, gains = [], []
    for name, task in TASKS.items():
        own = study.beside(Study(study.teacher, study.sizes, study.folder / name, study.data, task))
        ours, frozen, many = own.measures("hipa", seed), own.frozen_measures("one"), own.frozen_measures("many")
        distances.append(ours["perceptual"] / frozen["perceptual"])
        gains.append(ours["accuracy"] - frozen["accuracy"])
        result |= labelled(ours, f"{name}_hipa", "perceptual", "accuracy", "fd_data")
        result |= labelled(frozen, f"{name}_frozen", "perceptual", "accuracy", "fd_data")
        result |= labelled(many, f"{name}_many", "accuracy", "fd_data")
        result[f"fd_to_many_{name}"] = ours["fd_data"] / many["fd_data"]
    return {"distance_ratio": max(distances), "accuracy_gain": min(gains), **result}


def ablations(study: Study, given: argparse.Namespace) -> bool:
    """With --ablations: one table over all options of section 6.5, one seed, equal tuning; instead of the claims."""
    if not given.ablations:
        return False
    rows = []
    for name in ("hipa", "spatial", "pixel", *ABLATIONS):
        found, costs = study.measures(name, 0), study.forwards(name)
        values = [f"{found[key]:.4g}" for key in ("fd_data", "hf_error", "perceptual", "coherence_3")]
        share = f"{100 * costs['trained_share']:.1f} %"
        rows.append([name, _in_words(name), share, f"{study.learning_rate(name):g}", *values])
    head = ["arm", "differs in", "trained", "learning rate", "FD", "energy error", "distance", "coherence, high"]
    text = f"{markdown_table(head, rows)}\n\n{study.sizes.steps} steps of {study.sizes.batch}, one seed.\n"
    path = study.results / "ablations_hipa.md"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(text)
    return True


def _in_words(name: str) -> str:
    if ARMS[name].get("arm"):
        return f"{ARMS[name]['arm']} loss only"
    changes = [f"{key} {value}" for part in ARMS[name].values() for key, value in part.items()]
    return ", ".join(changes) or "-"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher", type=Path, default=TEACHERS / "shapes32-v", help="a diffusers directory that knows Shapes"
    )
    parser.add_argument("--ablations", action="store_true", help="measure the table of ablations instead of the claims")


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(Teacher.load(given.teacher), open_sizes(Sizes, "hipa", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "hipa",
        __doc__,
        (h1, h1e, h2, h2e, h3, h3x, h3e, h4, h6),
        open_study,
        figures=lambda study, ledger: draw_figures(ledger, study.figures),
        options=options,
        instead=ablations,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
