"""Measure the paper's claims at small scale: `python slam/reproduce.py` writes results/slam.json and its figures.

    python slam/reproduce.py                          # tier small: 3 seeds of every claim
    python slam/reproduce.py --claims S1 S3           # some of them
    python slam/reproduce.py --ablations              # the ablation table, results/ablations_slam.md
    python slam/reproduce.py --tier smoke             # what CI runs

The claims, with targets, sizes and budgets (optimiser steps), are in claims.yaml; the teachers are those of
ldm/pretrained. Every finished (claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it
stopped; another teacher starts afresh.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from common import reproduction
from common.cpu import tune_allocator
from common.errors import run_main
from common.files import write_atomically
from common.paths import REPOSITORY
from common.publishing import markdown_table
from common.study import open_sizes
from common.teacher import Teacher
from slam.decomposition import GAMMAS, end_to_end, errors_along
from slam.experiments import ABLATIONS, ARMS, FEW, Sizes, Study
from slam.figures import PICTURES, draw_figures, subpaths_shown

TEACHERS = REPOSITORY / "ldm" / "pretrained"
SOLVERS = {"ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler"}


def against_lcm(study: Study, seed: int) -> dict[str, float]:
    """SLAM over LCM after equal steps, data, draws and tuning: FD to data, geometric mean over 2 and 4 steps."""
    result = {"fd_ratio": math.exp(study.log_fd("slam", seed) - study.log_fd("lcm", seed))}
    for name in ("slam", "lcm"):
        for steps in FEW:
            found = study.measures(name, seed, steps)
            result |= {f"{key}_{name}_{steps}": found[key] for key in ("fd_data", "accuracy", "entropy")}
        result[f"lr_{name}"] = study.learning_rate(name)
    return result


def s1(study: Study, seed: int) -> dict[str, float]:
    """On the v-prediction teacher."""
    return against_lcm(study, seed)


def s1e(study: Study, seed: int) -> dict[str, float]:
    """On the epsilon teacher."""
    return against_lcm(other_teacher(study, "shapes32-eps"), seed)


def s2(study: Study, seed: int) -> dict[str, float]:
    """Steps that SLAM needs for the 4-step FD that LCM ends with, over LCM's own."""
    final = study.student("lcm", seed).last["fd_4"]
    steps = {name: study.steps_to(name, seed, final) for name in ("slam", "lcm")}
    # Where SLAM never gets there the ratio is not a number's: twice LCM's budget stands for it.
    ours = min(steps["slam"], 2.0 * study.sizes.steps)
    return {
        "steps_ratio": ours / steps["lcm"],
        "steps_slam": ours,
        "steps_lcm": steps["lcm"],
        "fd_4_lcm": final,
        "fd_4_slam": study.student("slam", seed).last["fd_4"],
    }


def s3(study: Study, seed: int) -> dict[str, float]:
    """Error along the line before training, in the form of the recipe and in the released one."""
    teacher, w, count = study.teacher, study.sizes.guidance, min(PICTURES, study.sizes.images)
    rows = study.data.__getitems__([(seed * count + i) % len(study.data) for i in range(count)])
    states, noise = study.states(rows["prompt"]), study.evaluation.noise[:count]
    result: dict[str, float] = {}
    for name in ("slam", "released"):
        student = study.training(name, seed, 0.0, 1).target
        indices = subpaths_shown(student.paths.steps)
        found = errors_along(student, teacher, rows["x1"].float(), noise, states, w, indices)
        result |= {f"error_{name}_{g:g}": float(v) for g, v in zip(GAMMAS, found.along.mean(0))}
        result[f"rising_{name}"] = found.rising
    return {"dist_0_share": result["error_slam_0"] / result["error_slam_1"], **result}


def s3e(study: Study, seed: int) -> dict[str, float]:
    """Distance of one jump's end to the end of the teacher's path, after training."""
    count = min(PICTURES, study.sizes.images)
    noise = study.evaluation.noise[:count]
    states = study.teacher.encode(study.evaluation.prompts[:count]).float()
    result: dict[str, float] = {}
    for name in ("slam", "lcm"):
        student = study.student(name, seed).network
        ends = end_to_end(student, study.teacher, noise, states, study.sizes.guidance + 1, (999, 599, 259))
        result |= {f"end_error_{name}_{t}": value for t, value in ends.items()}
        result[f"end_error_{name}"] = sum(ends.values()) / len(ends)
    return {"end_error_ratio": result["end_error_slam"] / result["end_error_lcm"], **result}


def s4(study: Study, seed: int) -> dict[str, float]:
    """Few steps of SLAM against the guided teacher with as many steps of two solvers."""
    result, ratios = {}, []
    for steps in FEW:
        ours = study.measures("slam", seed, steps)["fd_data"]
        result[f"fd_slam_{steps}"] = ours
        result[f"fd_lcm_{steps}"] = study.measures("lcm", seed, steps)["fd_data"]
        for name, solver in SOLVERS.items():
            result[f"fd_{name}_{steps}"] = study.teacher_measures(solver, steps)["fd_data"]
            ratios.append(ours / result[f"fd_{name}_{steps}"])
    return {"worst_ratio": max(ratios), **result}


def other_teacher(study: Study, name: str) -> Study:
    """The same study on another teacher of the repository, in a folder of its own."""
    return study.beside(Study(Teacher.load(TEACHERS / name), study.sizes, study.folder / name))


def ablations(study: Study, given: argparse.Namespace) -> bool:
    """With --ablations: one table over all options of section 6.5, one seed, equal tuning; instead of the claims."""
    if not given.ablations:
        return False
    rows = []
    for name in ("slam", "lcm", "released", *ABLATIONS):
        found = {steps: study.measures(name, 0, steps) for steps in FEW}
        fd = [f"{found[steps]['fd_data']:.2f}" for steps in FEW]
        rows.append([name, _in_words(name), f"{study.learning_rate(name):g}", *fd, f"{found[4]['accuracy']:.3f}"])
    head = ["arm", "differs in", "learning rate", "FD, 2 steps", "FD, 4 steps", "accuracy, 4 steps"]
    text = f"{markdown_table(head, rows)}\n\n{study.sizes.steps} steps of {study.sizes.batch}, one seed.\n"
    path = study.results / "ablations_slam.md"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(text)
    return True


def _in_words(name: str) -> str:
    changes = [f"{key} {value}" for part in ARMS[name].values() for key, value in part.items()]
    return ", ".join(changes) or "-"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher", type=Path, default=TEACHERS / "shapes32-v", help="a diffusers directory that knows Shapes"
    )
    parser.add_argument("--ablations", action="store_true", help="measure the table of ablations instead of the claims")


def open_study(given: argparse.Namespace) -> Study:
    tune_allocator()
    return Study(Teacher.load(given.teacher), open_sizes(Sizes, "slam", given.tier, given.rung), given.folder)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "slam",
        __doc__,
        (s1, s1e, s2, s3, s3e, s4),
        open_study,
        figures=lambda study, ledger: draw_figures(ledger, study, study.figures),
        options=options,
        instead=ablations,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
