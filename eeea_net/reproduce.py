"""Measure the paper's claims at small scale; writes results/eeea_net.json and its figures.

    python eeea_net/reproduce.py                 # tier small: 3 seeds of every claim
    python eeea_net/reproduce.py --claims E1 E4  # some of them
    python eeea_net/reproduce.py --tier smoke    # what CI runs
    python eeea_net/reproduce.py --official      # the authors' selection beside the paper's, a table

The claims, with targets, sizes and budgets (steps of training a network), are in claims.yaml. Every network that was
trained and every finished (claim, seed) is kept in runs/reproduce/, so an interrupted run goes on where it stopped;
searches of one seed share the networks that they have in common.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

from common import reproduction
from common.cli import Parser
from common.errors import run_main
from common.files import write_atomically
from common.ledger import read_claims
from common.publishing import markdown_table
from common.study import open_sizes
from eeea_net import scores, table
from eeea_net.experiments import Sizes, Study
from eeea_net.table import SETS
from eeea_net.transfer_config import Task


def costs_of(study: Study, name: str, seed: int) -> dict[str, float]:
    """What an arm trained, over what the search without a filter trained."""
    ours, theirs = study.search(name, seed).costs(), study.search("unfiltered", seed).costs()
    return {
        "parameters_ratio": ours["parameters_m"] / theirs["parameters_m"],
        "macs_ratio": ours["macs_m"] / theirs["macs_m"],
        "seconds_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],
        "evaluations": ours["evaluations"],
        "evaluations_unfiltered": theirs["evaluations"],
        "accepted": study.search(name, seed).generations[0].accepted or 0.0,
    }


def e1(study: Study, seed: int) -> dict[str, float]:
    """Cost with early-exit initialisation."""
    return costs_of(study, "beta30", seed)


def e1f(study: Study, seed: int) -> dict[str, float]:
    """Cost where children are filtered too."""
    return costs_of(study, "beta30-children", seed)


def errors(study: Study, seed: int, *names: str) -> dict[str, float]:
    """Best validation errors of arms, in per cent."""
    return {f"error_{name}": 100 * study.search(name, seed).best_error() for name in names}


def e2(study: Study, seed: int) -> dict[str, float]:
    """Quality with beta at the median."""
    found = errors(study, seed, "beta50", "unfiltered", "random")
    gaps = {
        "error_gap": found["error_beta50"] - found["error_unfiltered"],
        "random_gap": found["error_beta50"] - found["error_random"],
    }
    return {**gaps, **found}


def e3(study: Study, seed: int) -> dict[str, float]:
    """A small against a large beta."""
    found = errors(study, seed, "beta30", "beta70")
    return {"error_gap": found["error_beta30"] - found["error_beta70"], **found}


def e4(study: Study, seed: int) -> dict[str, float]:
    """Hypervolume against random search."""
    ours, theirs = study.search("unfiltered", seed), study.search("random", seed)
    volumes = [generation.hypervolume for generation in ours.generations]
    random = theirs.generations[-1].hypervolume
    return {
        "hypervolume_ratio": volumes[-1] / random if random else float("nan"),
        "falls": float(sum(after < before - 1e-12 for before, after in pairwise(volumes))),
        "hypervolume": volumes[-1],
        "hypervolume_random": random,
        **{f"hypervolume_{number}": value for number, value in enumerate(volumes)},
    }


def e5(study: Study, seed: int) -> dict[str, float]:
    """Re-calibration of an elastic network's members."""
    found = study.recalibration(seed)
    errors_of = {"error_before": found["before"], "error_after": found["after"]}
    return {"recalibration_gain": found["before"] - found["after"], **errors_of}


def gap(study: Study, seed: int, task: Task, metric: str) -> dict[str, float]:
    """A task's metric with the searched backbone above that with MobileNetV3's blocks, in points."""
    found = study.transfer(task, seed)
    return {f"{metric}_gap": found[f"{metric}_searched"] - found[f"{metric}_mobilenetv3"], **found}


def e6(study: Study, seed: int) -> dict[str, float]:
    """Transfer to detection."""
    return gap(study, seed, "detection", "ap50")


def e6s(study: Study, seed: int) -> dict[str, float]:
    """Transfer to segmentation."""
    return gap(study, seed, "segmentation", "miou")


def e6p(study: Study, seed: int) -> dict[str, float]:
    """Transfer to the pose."""
    return gap(study, seed, "pose", "ap")


def table_ratio(found: dict[str, float], what: str, arm: str, other: str) -> float:
    """Geometric mean over the sets of a table."""
    return exp(fmean(log(found[f"{what}_{arm}_{name}"] / found[f"{what}_{other}_{name}"]) for name in SETS))


def e1t(study: Study, seed: int) -> dict[str, float]:
    """Parameters of all networks that a search over a table looks at."""
    found = study.table(seed)
    return {"parameters_ratio": table_ratio(found, "parameters", "early_exit", "nsga2"), **found}


def e2t(study: Study, seed: int) -> dict[str, float]:
    """Hypervolume with and without the filter, over a table."""
    found = study.table(seed)
    return {"hypervolume_kept": table_ratio(found, "hypervolume", "early_exit", "nsga2"), **found}


def e4t(study: Study, seed: int) -> dict[str, float]:
    """Hypervolume against random search, over a table."""
    found = study.table(seed)
    return {"hypervolume_ratio": table_ratio(found, "hypervolume", "nsga2", "random"), **found}


def official(study: Study, given: argparse.Namespace) -> bool:
    """With --official: hypervolume and best error of the authors' selection beside the paper's, over the seeds."""
    if not given.official:
        return False
    rows = []
    for seed in read_claims("eeea_net", given.tier)["E4"].seeds:
        for name in ("unfiltered", "official", "random"):
            found = study.search(name, seed)
            volume, error = found.generations[-1].hypervolume, found.best_error()
            rows.append([str(seed), name, f"{volume:.4f}", f"{100 * error:.2f}"])
    text = markdown_table(["seed", "selection", "hypervolume", "best validation error %"], rows) + "\n"
    write_atomically(study.results / "selection_eeea_net.md", lambda temporary: temporary.write_text(text))
    print(text)
    return True


def figures(study: Study, ledger: Path) -> None:
    from eeea_net.figures import draw_figures

    draw_figures(ledger, study.figures)


def options(parser: Parser) -> None:
    parser.add_argument(
        "--official", action="store_true", help="compare the authors' selection with the paper's instead of the claims"
    )


def _without() -> dict[str, str]:
    """Claims that need an extra which is not installed."""
    found = (
        {}
        if table.installed()
        else dict.fromkeys(("E1t", "E2t", "E4t"), f"nas-bench-graph is missing; {table.INSTALL}")
    )
    if not scores.installed():
        found |= dict.fromkeys(("E6", "E6p"), f"faster-coco-eval is missing; {scores.INSTALL}")
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "eeea_net",
        __doc__,
        (e1, e1f, e2, e3, e4, e5, e6, e6s, e6p, e1t, e2t, e4t),
        lambda given: Study(open_sizes(Sizes, "eeea_net", given.tier, given.rung), given.folder),
        figures=figures,
        options=options,
        instead=official,
        without=_without(),
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
