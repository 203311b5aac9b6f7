"""Measure the paper's claims at small scale: `python reproduce.py` writes results/instaflow.json and its figures.

    python reproduce.py                          # tier small: 3 seeds of every claim, about 45 core-minutes in all
    python reproduce.py --claims I1 I2           # some of them
    python reproduce.py --tier smoke             # what CI runs, about a minute

The teacher is the real one of ldm/pretrained (a captioned Shapes scene is not a function of its caption). Budgets are
pairs and optimiser steps, and every arm's cost in U-Net forward-equivalents is on record. Every finished (claim, seed)
is kept in runs/reproduce/, named after the teacher's checksum, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import run_main
from common.ledger import Claim, Condition, PaperValue, Target, Tier
from common.paths import REPOSITORY, RESULTS
from common.reproduction import chosen_claims, ledger_path, measure_claims, options_parser

if TYPE_CHECKING:
    from instaflow.experiments import Lab

TEACHER = REPOSITORY / "ldm" / "pretrained" / "shapes32-v"
FIGURES = RESULTS / "figures" / "instaflow"
SEEDS = {"smoke": (0,), "small": (0, 1, 2)}
SMOKE = {
    "pairs": 128,
    "solver_steps": 8,
    "flow_steps": 4,
    "many": 8,
    "reflow": 40,
    "distil": 40,
    "more": 10,
    "batch": 16,
    "images": 96,
    "paths": 32,
    "path_steps": 20,
    "tune": False,
    "lr": 1e-3,
}
CLAIMS = {"small": ("I1", "I2", "I3", "I3c", "I4", "I5", "I6"), "smoke": ("I1", "I3")}
FEW = (1, 2, 4)


def claims(tier: Tier) -> dict[str, Claim]:
    """The claims with their targets, fixed before the run (specification section 6)."""

    def make(id: str, statement: str, paper: PaperValue, target: Target) -> Claim:
        return Claim(id, statement, paper, target, tier)

    entries = [
        make(
            "I1",
            "Reflow straightens: the 2-rectified flow's paths are at most half as curved as the teacher's probability "
            "flow, measured by S on fixed noises.",
            PaperValue("with 4 or fewer steps 2-RF draws recognisable images where SD 1.5 is still noise", "S 4"),
            Target("S(2-RF) at most 0.5 of S(1-flow)", "straightness_ratio", "<=", 0.5),
        ),
        make(
            "I2",
            "With 1, 2 and 4 steps the 2-rectified flow beats the teacher under DDIM and DPM-Solver++ with as many "
            "steps; with 25 it keeps the teacher's quality (the marginal is preserved).",
            PaperValue("2-RF FID-5k 47.0 at 1 step, 31.35 at 2, 21.5 at 25; SD 1.5 DPM-Solver 20.1 at 25", "T 1"),
            Target(
                "FD of 2-RF below that of both solvers at 1, 2 and 4 steps (largest ratio below 1); at 25 steps within "
                "1.3 of the teacher's",
                "worst_few_step_ratio",
                "<",
                1.0,
                (Condition("fd_ratio_25", "<=", 1.3),),
            ),
        ),
        make(
            "I3",
            "Reflow before distillation: with the same optimiser steps and teacher pairs, the one-step regression "
            "error to the respective teacher is at most half, and the student stays closer to its teacher in FD.",
            PaperValue("teacher-student FID gap 18.1 without reflow, 8.9 with it", "preliminary study"),
            Target(
                "regression error after reflow at most 0.5 of direct distillation's; FD gap smaller",
                "regression_error_ratio",
                "<=",
                0.5,
                (Condition("gap_reduction", ">", 0.0),),
            ),
        ),
        make(
            "I3c",
            "The outcome of I3 in image quality: one-step FD of reflow + distillation is lower than that of direct "
            "distillation.",
            PaperValue("FID-5k 31.0 against 40.9 (U-Net)", "preliminary study"),
            Target("one-step FD lower than direct distillation's", "fd_gain_over_direct", ">", 0.0),
        ),
        make(
            "I4",
            "Transport cost falls: the new coupling costs no more than the old one on the same prompts and noises.",
            PaperValue("lower E[c(X1 - X0)] for every convex c", "section 2"),
            Target(
                "mean squared distance at most 1.01 of the teacher's; FD at 25 steps within 1.3 of the teacher's",
                "transport_ratio",
                "<=",
                1.01,
                (Condition("fd_ratio_25", "<=", 1.3),),
            ),
        ),
        make(
            "I5",
            "L2, then perceptual: continuing the distillation with the perceptual loss lowers FD against continuing "
            "with L2 for as many steps.",
            PaperValue("final model: 21.5k L2 steps, then 18k LPIPS steps; FID-5k 23.4", "T 3"),
            Target("FD lower than with L2", "fd_gain_perceptual", ">", 0.0),
        ),
        make(
            "I6",
            "Two stacked U-Nets distil better than one at equal steps.",
            PaperValue("FID-5k 24.6 (stacked) against 31.0; latency 0.12 s against 0.09 s", "preliminary study, T 1"),
            Target("one-step regression error lower than the single U-Net's", "regression_error_ratio", "<", 1.0),
        ),
    ]
    return {claim.id: claim for claim in entries}


def measure_i1(lab: Lab, seed: int) -> dict[str, float]:
    """Straightness of the teacher's flow and of the 2-rectified flow."""
    teacher, rectified = lab.straightness_of("teacher", seed), lab.straightness_of("reflow", seed)
    return {
        "straightness_ratio": rectified / teacher,
        "straightness_teacher": teacher,
        "straightness_2rf": rectified,
        "training_forwards": lab.cost("reflow"),
    }


def measure_i2(lab: Lab, seed: int) -> dict[str, float]:
    """FD against steps: 2-RF, teacher by DDIM, teacher by DPM-Solver++, all with the guidance of the pairs."""
    result: dict[str, float] = {}
    ratios = []
    for steps in FEW:
        ours = lab.fd("reflow", seed, steps)
        ddim, dpm = lab.teacher_fd(steps, "DDIMScheduler"), lab.teacher_fd(steps)
        ratios += [ours["fd_data"] / other["fd_data"] for other in (ddim, dpm)]
        for name, found in (("2rf", ours), ("ddim", ddim), ("dpm", dpm)):
            result |= {f"{key}_{name}_{steps}": found[key] for key in ("fd_data", "fd_teacher", "accuracy")}
    ours, teacher = lab.fd("reflow", seed, lab.budget.many), lab.teacher_fd(lab.budget.solver_steps)
    result |= {"fd_data_2rf_25": ours["fd_data"], "fd_data_dpm_25": teacher["fd_data"]}
    result |= {"accuracy_2rf_25": ours["accuracy"], "accuracy_dpm_25": teacher["accuracy"]}
    return {
        "worst_few_step_ratio": max(ratios),
        "fd_ratio_25": ratio_many(lab, seed),
        **result,
        "training_forwards": lab.cost("reflow"),
    }


def ratio_many(lab: Lab, seed: int) -> float:
    """FD of the 2-RF with many steps over the teacher's: is the marginal preserved?"""
    teacher = lab.teacher_fd(lab.budget.solver_steps)
    return lab.fd("reflow", seed, lab.budget.many)["fd_data"] / teacher["fd_data"]


def distilled(lab: Lab, seed: int) -> dict[str, float]:
    """Direct distillation and reflow + distillation: errors to the own teacher, FD and gaps."""
    steps = lab.budget.many
    own = {"direct": lab.teacher_latents(lab.budget.solver_steps), "instaflow": lab.latents("reflow", seed, steps)}
    teacher_fd = {"direct": lab.teacher_fd(lab.budget.solver_steps), "instaflow": lab.fd("reflow", seed, steps)}
    result: dict[str, float] = {}
    for name in ("direct", "instaflow"):
        found = lab.fd(name, seed, 1)
        result |= {
            f"error_{name}": lab.one_step_error(name, seed, own[name]),
            f"gap_{name}": found["fd_data"] - teacher_fd[name]["fd_data"],
            f"fd_to_own_teacher_{name}": lab.distance_between(lab.images(name, seed, 1), lab.teacher.decode(own[name])),
            f"fd_data_{name}": found["fd_data"],
            f"accuracy_{name}": found["accuracy"],
            f"training_forwards_{name}": lab.cost(name),
        }
    return result


def measure_i3(lab: Lab, seed: int) -> dict[str, float]:
    """Is the straightened flow easier to distil?"""
    found = distilled(lab, seed)
    return {
        "regression_error_ratio": found["error_instaflow"] / found["error_direct"],
        "gap_reduction": found["gap_direct"] - found["gap_instaflow"],
        **found,
    }


def measure_i3c(lab: Lab, seed: int) -> dict[str, float]:
    """Are its one-step images better?"""
    found = distilled(lab, seed)
    return {"fd_gain_over_direct": found["fd_data_direct"] - found["fd_data_instaflow"], **found}


def measure_i4(lab: Lab, seed: int) -> dict[str, float]:
    """Transport cost of the couplings on the evaluation noises."""
    from instaflow.flow import transport_cost

    noise = lab.evaluation.noise
    old, new = lab.teacher_latents(lab.budget.solver_steps), lab.latents("reflow", seed, lab.budget.many)
    result = {}
    for power in (1.0, 2.0, 4.0):
        before, after = (float(transport_cost(noise, ends, power)) for ends in (old, new))
        result[f"transport_ratio_p{power:g}"] = after / before
    return {
        "transport_ratio": result["transport_ratio_p2"],
        "fd_ratio_25": ratio_many(lab, seed),
        "transport_teacher": float(transport_cost(noise, old)),
        "transport_2rf": float(transport_cost(noise, new)),
        **result,
    }


def measure_i5(lab: Lab, seed: int) -> dict[str, float]:
    """The same student continued with either loss."""
    found = {name: lab.fd(f"continued_{name}", seed, 1) for name in ("l2", "perceptual")}
    before = lab.fd("instaflow", seed, 1)
    return {
        "fd_gain_perceptual": found["l2"]["fd_data"] - found["perceptual"]["fd_data"],
        "fd_data_before": before["fd_data"],
        **{f"{key}_{name}": v[key] for name, v in found.items() for key in ("fd_data", "hf_error", "accuracy")},
    }


def measure_i6(lab: Lab, seed: int) -> dict[str, float]:
    """Single and stacked student of the same 2-RF."""
    ends = lab.latents("reflow", seed, lab.budget.flow_steps)
    errors = {name: lab.one_step_error(name, seed, ends) for name in ("stacked", "instaflow")}
    found = {name: lab.fd(name, seed, 1) for name in errors}
    return {
        "regression_error_ratio": errors["stacked"] / errors["instaflow"],
        "error_stacked": errors["stacked"],
        "error_single": errors["instaflow"],
        "fd_data_stacked": found["stacked"]["fd_data"],
        "fd_data_single": found["instaflow"]["fd_data"],
        "latency_ratio": lab.latency("stacked", seed) / lab.latency("instaflow", seed),
        "training_forwards_stacked": lab.cost("stacked"),
    }


MEASURES: dict[str, Callable[[Lab, int], dict[str, float]]] = {
    "I1": measure_i1,
    "I2": measure_i2,
    "I3": measure_i3,
    "I3c": measure_i3c,
    "I4": measure_i4,
    "I5": measure_i5,
    "I6": measure_i6,
}


def open_lab(tier: Tier, teacher: Path, root: Path) -> Lab:
    """The lab of a tier; its folder is named after the checksums of the teacher and of the budget."""
    import torch

    from common.cpu import tune_allocator
    from common.teacher import Teacher
    from instaflow.experiments import Budget, Lab

    torch.set_num_threads(1)
    tune_allocator()
    loaded = Teacher.load(teacher)
    budget = Budget(**SMOKE) if tier == "smoke" else Budget()  # type: ignore[arg-type]
    key = hashlib.sha256(repr(budget).encode()).hexdigest()[:6]
    folder = root / f"instaflow-{tier}-{loaded.checksum()[:12]}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return Lab(loaded, budget, folder)


def reproduce(tier: Tier, names: list[str], output: Path, teacher: Path, root: Path) -> list[dict[str, Any]]:
    """Measure the named claims over the tier's seeds and write the ledger after each claim."""
    known = claims(tier)
    lab = open_lab(tier, teacher, root)
    records = measure_claims(
        [known[name] for name in names],
        lambda _: SEEDS[tier],
        lambda name, seed: MEASURES[name](lab, seed),
        lab.folder,
        output,
    )
    if tier == "small":
        from instaflow.figures import draw_figures

        draw_figures(output, lab, FIGURES)
    return records


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options_parser("instaflow", __doc__)
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="a diffusers directory that knows Shapes")
    options = parser.parse_args(argv)
    names = chosen_claims(options, CLAIMS[options.tier])
    root = REPOSITORY / "runs" / "reproduce"
    return reproduce(options.tier, names, ledger_path(options, "instaflow"), options.teacher, root)


if __name__ == "__main__":
    run_main(main)
