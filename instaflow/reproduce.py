"""Measure the paper's claims at small scale; writes results/instaflow.json and its figures.

    python instaflow/reproduce.py                # tier small: 3 seeds of every claim, about 45 core-minutes in all
    python instaflow/reproduce.py --claims I1 I2 # some of them
    python instaflow/reproduce.py --tier smoke   # what CI runs, about a minute

The claims, with targets, sizes and budgets (pairs and optimiser steps), are in claims.yaml. The teacher is the real one
of ldm/pretrained (a captioned Shapes scene is not a function of its caption). Every arm's cost in U-Net
forward-equivalents is on record. Every finished (claim, seed) is kept in runs/reproduce/, so an interrupted run
continues where it stopped; another teacher starts afresh.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import reproduction
from common.cli import Parser
from common.cpu import tune_allocator
from common.errors import run_main
from common.paths import REPOSITORY
from common.study import open_sizes
from common.teacher import Teacher
from instaflow.experiments import Sizes, Study
from instaflow.flow import transport_cost

TEACHER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"
FEW = (1, 2, 4)


def i1(study: Study, seed: int) -> dict[str, float]:
    """Straightness of the teacher's flow and of the 2-rectified flow."""
    teacher, rectified = study.straightness_of("teacher", seed), study.straightness_of("reflow", seed)
    return {
        "straightness_ratio": rectified / teacher,
        "straightness_teacher": teacher,
        "straightness_2rf": rectified,
        "training_forwards": study.cost("reflow"),
    }


def i2(study: Study, seed: int) -> dict[str, float]:
    """FD against steps: 2-RF, teacher by DDIM, teacher by DPM-Solver++, all with the guidance of the pairs."""
    result: dict[str, float] = {}
    ratios = []
    for steps in FEW:
        ours = study.fd("reflow", seed, steps)
        ddim, dpm = study.teacher_fd(steps, "DDIMScheduler"), study.teacher_fd(steps)
        ratios += [ours["fd_data"] / other["fd_data"] for other in (ddim, dpm)]
        for name, found in (("2rf", ours), ("ddim", ddim), ("dpm", dpm)):
            result |= {f"{key}_{name}_{steps}": found[key] for key in ("fd_data", "fd_teacher", "accuracy")}
    ours, teacher = study.fd("reflow", seed, study.sizes.many), study.teacher_fd(study.sizes.solver_steps)
    result |= {"fd_data_2rf_25": ours["fd_data"], "fd_data_dpm_25": teacher["fd_data"]}
    result |= {"accuracy_2rf_25": ours["accuracy"], "accuracy_dpm_25": teacher["accuracy"]}
    return {
        "worst_few_step_ratio": max(ratios),
        "fd_ratio_25": ratio_many(study, seed),
        **result,
        "training_forwards": study.cost("reflow"),
    }


def ratio_many(study: Study, seed: int) -> float:
    """FD of the 2-RF with many steps over the teacher's: is the marginal preserved?"""
    teacher = study.teacher_fd(study.sizes.solver_steps)
    return study.fd("reflow", seed, study.sizes.many)["fd_data"] / teacher["fd_data"]


def distilled(study: Study, seed: int) -> dict[str, float]:
    """Direct distillation and reflow + distillation: errors to the own teacher, FD and gaps."""
    steps = study.sizes.many
    own = {"direct": study.teacher_latents(study.sizes.solver_steps), "instaflow": study.latents("reflow", seed, steps)}
    teacher_fd = {"direct": study.teacher_fd(study.sizes.solver_steps), "instaflow": study.fd("reflow", seed, steps)}
    result: dict[str, float] = {}
    for name in ("direct", "instaflow"):
        found = study.fd(name, seed, 1)
        result |= {
            f"error_{name}": study.one_step_error(name, seed, own[name]),
            f"gap_{name}": found["fd_data"] - teacher_fd[name]["fd_data"],
            f"fd_to_own_teacher_{name}": study.distance_between(
                study.images(name, seed, 1), study.teacher.decode(own[name])
            ),
            f"fd_data_{name}": found["fd_data"],
            f"accuracy_{name}": found["accuracy"],
            f"training_forwards_{name}": study.cost(name),
        }
    return result


def i3(study: Study, seed: int) -> dict[str, float]:
    """Is the straightened flow easier to distil?"""
    found = distilled(study, seed)
    return {
        "regression_error_ratio": found["error_instaflow"] / found["error_direct"],
        "gap_reduction": found["gap_direct"] - found["gap_instaflow"],
        **found,
    }


def i3c(study: Study, seed: int) -> dict[str, float]:
    """Are its one-step images better?"""
    found = distilled(study, seed)
    return {"fd_gain_over_direct": found["fd_data_direct"] - found["fd_data_instaflow"], **found}


def i4(study: Study, seed: int) -> dict[str, float]:
    """Transport cost of the couplings on the evaluation noises."""
    noise = study.evaluation.noise
    old, new = study.teacher_latents(study.sizes.solver_steps), study.latents("reflow", seed, study.sizes.many)
    result = {}
    for power in (1.0, 2.0, 4.0):
        before, after = (float(transport_cost(noise, ends, power)) for ends in (old, new))
        result[f"transport_ratio_p{power:g}"] = after / before
    return {
        "transport_ratio": result["transport_ratio_p2"],
        "fd_ratio_25": ratio_many(study, seed),
        "transport_teacher": float(transport_cost(noise, old)),
        "transport_2rf": float(transport_cost(noise, new)),
        **result,
    }


def i5(study: Study, seed: int) -> dict[str, float]:
    """The same student continued with either loss."""
    found = {name: study.fd(f"continued_{name}", seed, 1) for name in ("l2", "perceptual")}
    before = study.fd("instaflow", seed, 1)
    return {
        "fd_gain_perceptual": found["l2"]["fd_data"] - found["perceptual"]["fd_data"],
        "fd_data_before": before["fd_data"],
        **{f"{key}_{name}": v[key] for name, v in found.items() for key in ("fd_data", "hf_error", "accuracy")},
    }


def i6(study: Study, seed: int) -> dict[str, float]:
    """Single and stacked student of the same 2-RF."""
    ends = study.latents("reflow", seed, study.sizes.flow_steps)
    errors = {name: study.one_step_error(name, seed, ends) for name in ("stacked", "instaflow")}
    found = {name: study.fd(name, seed, 1) for name in errors}
    return {
        "regression_error_ratio": errors["stacked"] / errors["instaflow"],
        "error_stacked": errors["stacked"],
        "error_single": errors["instaflow"],
        "fd_data_stacked": found["stacked"]["fd_data"],
        "fd_data_single": found["instaflow"]["fd_data"],
        "latency_ratio": study.latency("stacked", seed) / study.latency("instaflow", seed),
        "training_forwards_stacked": study.cost("stacked"),
    }


def figures(study: Study, ledger: Path) -> None:
    from instaflow.figures import draw_figures

    draw_figures(ledger, study, study.figures)


def options(parser: Parser) -> None:
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="a diffusers directory that knows Shapes")


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(Teacher.load(given.teacher), open_sizes(Sizes, "instaflow", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "instaflow",
        __doc__,
        (i1, i2, i3, i3c, i4, i5, i6),
        open_study,
        figures=figures,
        options=options,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
