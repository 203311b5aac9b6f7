"""Measure the paper's claims at small scale: `python lightgen/reproduce.py` writes results/lightgen.json and figures.

    python lightgen/reproduce.py                          # tier small: 3 seeds of every claim
    python lightgen/reproduce.py --claims C D             # what preferences repair
    python lightgen/reproduce.py --tier smoke             # what CI runs

The claims, with targets, sizes and budgets (optimiser steps), are in claims.yaml. Every finished (claim, seed) is kept
in runs/reproduce/, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import reproduction
from common.cpu import tune_allocator
from common.errors import run_main
from common.paths import REPOSITORY
from common.study import labelled, open_sizes
from lightgen.experiments import Sizes, Study
from lightgen.figures import draw_figures
from lightgen.geneval import COLUMNS

AUTOENCODER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"


def score_of(study: Study, name: str, seed: int, images: str | None = None, **changes: Any) -> dict[str, float]:
    """Numbers of a pre-trained arm."""
    label = name if images is None else f"{name}-{images}"
    return study.scored(label, lambda: study.pretrained(name, seed, images).network, seed, **changes)


def p(study: Study, seed: int) -> dict[str, float]:
    """Implicit accuracy on pairs that were not trained on."""
    return study.held_out_preference("plain", seed)


def a(study: Study, seed: int) -> dict[str, float]:
    """Diverse against many, on unseen combinations."""
    found = {name: score_of(study, name, seed, split="heldout") for name in ("diverse", "volume")}
    result = {"gain": found["diverse"]["overall"] - found["volume"]["overall"]}
    for name, values in found.items():
        result |= labelled(values, name, *COLUMNS)
    return result


def b(study: Study, seed: int) -> dict[str, float]:
    """Score against the number of pictures."""
    sizes = study.sizes.set_sizes
    found = {size: score_of(study, "plain", seed, str(size))["overall"] for size in sizes}
    return {
        "last_gain": found[sizes[-1]] - found[sizes[-2]],
        "first_gain": found[1000] - found[100],
        **{f"overall_{size}": value for size, value in found.items()},
    }


def c(study: Study, seed: int) -> dict[str, float]:
    """Left and right after mirrored training, and after preferences."""
    found = before_and_after(study, seed) | {"plain": score_of(study, "plain", seed)}
    found["dpo_x10"] = study.scored(
        "flip-dpo-x10", lambda: study.preferred("flip", "dpo", seed, times=10).network, seed
    )
    result = {"sides_rise": found["dpo"]["sides"] - found["flip"]["sides"]}
    result |= {f"fall_{column}": found["flip"][column] - found["dpo"][column] for column in ("single", "two", "colors")}
    for name, values in found.items():
        result |= labelled(values, name, "sides", "position", "overall")
    return result


def d(study: Study, seed: int) -> dict[str, float]:
    """DPO against as many steps on the winners."""
    found = before_and_after(study, seed)
    result = {"gain_over_sft": found["dpo"]["overall"] - found["sft"]["overall"]}
    for name, values in found.items():
        result |= labelled(values, "before" if name == "flip" else name, *COLUMNS)
    for kind in ("dpo", "sft"):
        result[f"lr_{kind}"] = study.preference_rate("flip", kind)
    return result


def before_and_after(study: Study, seed: int) -> dict[str, dict[str, float]]:
    """The mirrored model, and what comes of it."""

    def scored(kind: str) -> dict[str, float]:
        return study.scored(f"flip-{kind}", lambda: study.preferred("flip", kind, seed).network, seed)

    return {"flip": score_of(study, "flip", seed), "dpo": scored("dpo"), "sft": scored("sft")}


def e(study: Study, seed: int) -> dict[str, float]:
    """Rising resolution against full resolution at equal FLOP."""
    return against(study, seed, "staged", "plain")


def f(study: Study, seed: int) -> dict[str, float]:
    """Iterations of decoding."""
    steps = study.sizes.iterations
    found = {k: score_of(study, "plain", seed, sampling={"iterations": k}) for k in steps}
    result = {
        "gain": found[steps[-1]]["overall"] - found[steps[0]]["overall"],
        "slower": found[steps[-1]]["seconds"] / found[steps[0]]["seconds"],
    }
    for k, values in found.items():
        result |= labelled(values, f"{k}", "overall", "seconds")
    return result


def g(study: Study, seed: int) -> dict[str, float]:
    """Masked against causal in raster order."""
    return against(study, seed, "plain", "raster")


def h(study: Study, seed: int) -> dict[str, float]:
    """The diffusion head against regression."""
    return against(study, seed, "plain", "regression")


def against(study: Study, seed: int, ours: str, other: str) -> dict[str, float]:
    """Overall of one arm less another's, with all columns."""
    found = {name: score_of(study, name, seed) for name in (ours, other)}
    result = {"gain": found[ours]["overall"] - found[other]["overall"]}
    for name, values in found.items():
        result |= labelled(values, name, *COLUMNS) | {f"lr_{name}": study.learning_rate(name)}
    return result


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autoencoder", type=Path, default=AUTOENCODER, help="a diffusers directory whose vae/ makes the latents"
    )


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(str(given.autoencoder), open_sizes(Sizes, "lightgen", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "lightgen",
        __doc__,
        (p, a, b, c, d, e, f, g, h),
        open_study,
        figures=lambda study, ledger: draw_figures(ledger, study, study.figures),
        options=options,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
