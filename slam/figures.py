"""Plots made by the code that makes the numbers: error along the sub-path, error of the jumps, FD against steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.figures import bars, curve, panels, save_figure, small_claims
from common.metrics.measures import PromptSet
from slam.decomposition import GAMMAS, Errors, end_to_end, errors_along

if TYPE_CHECKING:
    from slam.experiments import Study
    from slam.model import Student
    from slam.run import Run

PICTURES = 64  # on which the mechanism is measured
SHARES = (0.1, 0.4, 0.7, 1.0)  # of the grid, at which sub-paths are shown


def subpaths_shown(steps: int) -> list[int]:
    """Numbers of a few sub-paths, from clean to noisy."""
    return sorted({max(0, round(share * steps) - 1) for share in SHARES})


def draw_errors(found: Mapping[str, Errors], ends: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """Left: error along the line, one curve a sub-path; middle: dist_0 and dist_Delta; right: error of the jumps."""
    figure, (along, parts, jumps) = panels(3)
    styles = {name: style for name, style in zip(found, ("-", "--", ":"))}
    for name, errors in found.items():
        for number, time in enumerate(errors.times):
            colour = f"C{number}"
            along.plot(GAMMAS, errors.along[number], styles[name], color=colour, label=f"{name}, t = {time}")
        parts.plot(errors.times, errors.dist_0, styles[name], color="C0", label=f"{name}: dist 0")
        parts.plot(errors.times, errors.dist_delta, styles[name], color="C1", label=f"{name}: dist Delta")
    along.set_xlabel("gamma")
    along.set_ylabel("E|f(x_gamma, gamma, t) - target|")
    parts.set_xlabel("t")
    parts.set_ylabel("parts of the error")
    for name, by_time in ends.items():
        jumps.plot(list(by_time), list(by_time.values()), marker="o", label=name)
    jumps.set_xlabel("t")
    jumps.set_ylabel("E|f(x_t, 1, t) - teacher's end point|")
    for axis in (along, parts, jumps):
        axis.legend(fontsize=7)
    caption = (
        "Error along the sub-path (it should rise with gamma), its parts dist 0 and dist Delta over t, and how far one "
        "jump ends from the teacher's path."
    )
    return save_figure(figure, path, caption)


def errors_figure(run: Run, students: Mapping[str, Student], prompts: PromptSet) -> Path:
    """`errors.png` of a run: its students after training, on held-out prompts and training latents."""
    from common.data.captioned import latents

    teacher, w = run.teacher, run.config.loss.guidance
    table = latents(run.pictures, teacher, progress=False)
    count = min(PICTURES, len(table), len(prompts))
    x1 = table.__getitems__(range(count))["x1"].float().to(teacher.device)
    noise = prompts.noise[:count].to(teacher.device)
    states = teacher.encode(run.pictures.captions[:count]).float()
    own = teacher.encode(prompts.prompts[:count]).float()
    found, ends = {}, {}
    for name, student in students.items():
        indices = subpaths_shown(student.paths.steps)
        found[name] = errors_along(student, teacher, x1, noise, states, w, indices)
        times = [int(student.paths.start_N[i]) for i in indices]
        ends[name] = end_to_end(student, teacher, noise, own, w + 1, times)
    return draw_errors(found, ends, run.folder / "errors.png")


def draw_figures(ledger: Path, study: Study, folder: Path) -> None:
    """What the ledger allows: FD against steps (S4), FD while training (S2), the error along the line (S3)."""
    claims = small_claims(ledger)
    if "S4" in claims:
        figure, (axis,) = panels()
        for name, label in (
            ("ddim", "teacher, DDIM"),
            ("dpm", "teacher, DPM-Solver++"),
            ("slam", "SLAM"),
            ("lcm", "LCM"),
        ):
            curve(axis, claims["S4"], {steps: f"fd_{name}_{steps}" for steps in (2, 4)}, label=label, marker="o")
        axis.set_xlabel("steps")
        axis.set_ylabel("FD to held-out data")
        axis.set_xticks((2, 4))
        axis.legend()
        save_figure(figure, folder / "few_steps.png", "FD of students and of the teacher's solvers with 2 and 4 steps.")
    if {"S3", "S3e"} <= claims.keys():
        figure, (along, jumps) = panels(2)
        for name in ("slam", "released"):
            curve(along, claims["S3"], {g: f"error_{name}_{g:g}" for g in GAMMAS}, label=name, marker="o")
        along.set_xlabel("gamma")
        along.set_ylabel("E|f - target|")
        along.legend()
        ends = {"SLAM": "end_error_slam", "LCM": "end_error_lcm"}
        bars(jumps, claims["S3e"], ends, "distance to the teacher's end")
        caption = (
            "Before training: the copied teacher's error along the line in both forms. After it: the jumps' errors."
        )
        save_figure(figure, folder / "errors.png", caption)
