"""Measure the paper's claims at small scale; writes results/eagan.json and its figures.

    python eagan/reproduce.py                     # tier small: 3 seeds of every claim
    python eagan/reproduce.py --claims E3 E4      # some of them
    python eagan/reproduce.py --tier smoke        # what CI runs

The claims, with targets, sizes and budgets, are in claims.yaml. One thread; budgets are steps. Every stage, training
and finished (claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it stopped; stages are
shared between claims (E1 to E5 begin with one generator search a seed).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from common import reproduction
from common.errors import run_main
from common.study import open_sizes
from eagan.experiments import Sizes, Study, mean_of_rows, population_fid
from eagan.figures import draw_figures
from eagan.genotypes import PUBLISHED

BASE = PUBLISHED["base_D"]


def e1(study: Study, seed: int) -> dict[str, float]:
    """The searched generator against random ones, all trained from scratch with equal steps."""
    found = study.first_stage(seed)
    assert found.generator is not None
    searched = study.retrained("searched", seed, found.generator, BASE)["fid"]
    random = [
        study.retrained(f"random{n}", seed, genes, BASE)["fid"] for n, genes in enumerate(study.random_generators(seed))
    ]
    return {
        "fid_ratio": searched / fmean(random),
        "fid_searched": searched,
        "fid_random": fmean(random),
        "best_random": min(random),
        "floor": study.floor(study.sizes.final_images),
    }


def e2(study: Study, seed: int) -> dict[str, float]:
    """The found pair against the found generator with the fixed discriminator."""
    before = study.first_stage(seed)
    found = study.found(study.stage("d-with", "discriminator", seed, before))
    assert before.generator is not None
    pair = study.retrained("pair", seed, before.generator, found.discriminator)["fid"]
    fixed = study.retrained("searched", seed, before.generator, BASE)["fid"]
    floor = study.floor(study.sizes.final_images)
    return {"fid_ratio": pair / fixed, "fid_pair": pair, "fid_fixed": fixed, "floor": floor}


def e3(study: Study, seed: int) -> dict[str, float]:
    """Stage 2 with and without weight resetting, all else equal."""
    before = study.first_stage(seed)
    measured: dict[str, float] = {}
    for arm, reset in (("with", True), ("without", False)):
        search = study.stage(f"d-{arm}", "discriminator", seed, before, weight_resetting=reset)
        study.found(search)
        measured[f"spread_{arm}"] = search.history[0]["spread"]
        fids = population_fid(search)
        last = fids[len(fids) // 2 :]
        measured |= {f"fid_{arm}": fmean(last), f"std_{arm}": pstdev(last)}
        measured |= {f"fid_{arm}_round_{n}": fid for n, fid in enumerate(fids)}
    return {
        "fid_ratio": measured["fid_with"] / measured["fid_without"],
        "std_ratio": measured["std_with"] / max(measured["std_without"], 1e-9),
        "floor": study.floor(study.sizes.images),
        **measured,
    }


def e4(study: Study, seed: int) -> dict[str, float]:
    """Generator, then discriminator, against both at once with as many rounds and steps."""
    before = study.first_stage(seed)
    stage_1 = study.stage("g", "generator", seed)
    stage_2 = study.stage("d-with", "discriminator", seed, before)
    coupled = study.stage("coupled", "both", seed, rounds=2 * study.sizes.rounds)
    for search in (stage_1, stage_2, coupled):
        study.found(search)
    fids = {"decoupled": population_fid(stage_1) + population_fid(stage_2), "coupled": population_fid(coupled)}
    last = {arm: values[study.sizes.rounds :] for arm, values in fids.items()}
    curves = {f"fid_{arm}_round_{n}": fid for arm, values in fids.items() for n, fid in enumerate(values)}
    return {
        "std_ratio": pstdev(last["decoupled"]) / max(pstdev(last["coupled"]), 1e-9),
        "final_ratio": last["decoupled"][-1] / last["coupled"][-1],
        "floor": study.floor(study.sizes.images),
        **{f"final_{arm}": values[-1] for arm, values in last.items()},
        **curves,
    }


def e5(study: Study, seed: int) -> dict[str, float]:
    """Selection by three objectives against selection by FID alone."""
    found = {}
    for arm, selection in (("g", "nsga2"), ("g-fid", "fid")):
        search = study.stage(arm, "generator", seed, selection=selection)
        study.found(search)
        found[arm] = search.history[-1]["fid_best"], search.history[-1]["size_median"]
    return {
        "size_ratio": found["g"][1] / found["g-fid"][1],
        "fid_ratio": found["g"][0] / found["g-fid"][0],
        "fid_pareto": found["g"][0],
        "floor": study.floor(study.sizes.images),
        "size_pareto": found["g"][1],
        "size_fid_only": found["g-fid"][1],
    }


def e6(study: Study, seed: int) -> dict[str, float]:
    """A discriminator searched against an untrained generator, and what a generator then learns from it."""
    first = study.stage("d-first", "discriminator", seed)
    found = study.found(first)
    after = study.stage("g-after-d", "generator", seed, found)
    study.found(after)
    study.first_stage(seed)
    usual = study.stage("g", "generator", seed)
    study.found(usual)
    norms = {name: mean_of_rows(search, "g_norm", 0) for name, search in (("after", after), ("usual", usual))}
    return {
        "norm_ratio": norms["after"] / norms["usual"],
        "d_loss": mean_of_rows(first, "d_loss", study.sizes.rounds - 1),
        "g_norm_d_first": norms["after"],
        "g_norm_g_first": norms["usual"],
    }


def open_study(given: argparse.Namespace) -> Study:
    return Study(open_sizes(Sizes, "eagan", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    def figures(study: Study, ledger: Path) -> None:
        draw_figures(ledger, study.figures)

    return reproduction.main("eagan", __doc__, (e1, e2, e3, e4, e5, e6), open_study, figures=figures, argv=argv)


if __name__ == "__main__":
    run_main(main)
