"""Pictures made by the code that makes the numbers: side-by-side grids, trajectories, plots of the claims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.figures import bars, curve, keep_captions, panels, save_figure, small_claims
from common.images import comparison_grid
from instaflow.flow import TeacherFlow, Velocity, conditioned, euler_path

if TYPE_CHECKING:
    from instaflow.experiments import Study

SHOWN = 8  # prompts of a grid
PATHS = 12  # noises whose paths are drawn


def sideways(velocity: Velocity, z0_BCHW: Tensor, steps: int = 25) -> tuple[Tensor, Tensor]:
    """Each path in its own plane: progress along Z1 - Z0 (0 to 1) and the main direction across it, [B, steps + 1].

    The second coordinate is in units of |Z1 - Z0| and signed so that its largest value is positive.
    """
    with torch.no_grad():
        points = torch.stack([z0_BCHW, *(z for z, _ in euler_path(velocity, z0_BCHW, steps))], 1).flatten(2).double()
    line = points[:, -1:] - points[:, :1]
    length = line.norm(dim=2, keepdim=True).clamp(min=1e-12)
    offset = points - points[:, :1]
    along = (offset * line).sum(2, keepdim=True) / length.square()
    residual = offset - along * line
    _, _, directions = torch.linalg.svd(residual, full_matrices=False)
    across = (residual @ directions[:, 0, :, None]) / length
    peak = across.gather(1, across.abs().argmax(1, keepdim=True))
    return along.squeeze(2), (across * torch.where(peak < 0, -1.0, 1.0)).squeeze(2)


def trajectories(flows: Mapping[str, Velocity], z0_BCHW: Tensor, steps: int = 25) -> Figure:
    """Paths of the same noises under several flows, side by side."""
    figure, axes = panels(len(flows), sharey=True)
    for axis, (name, velocity) in zip(axes, flows.items()):
        along, across = sideways(velocity, z0_BCHW, steps)
        for x, y in zip(along.cpu(), across.cpu()):
            axis.plot(x, y, marker=".", markersize=3, linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("progress from noise to data")
    axes[0].set_ylabel("sideways")
    return figure


def draw_claims(claims: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Every plot whose claim is there."""
    if "I1" in claims:
        figure, (axis,) = panels(width=4)
        bars(axis, claims["I1"], {"teacher": "straightness_teacher", "2-RF": "straightness_2rf"}, "straightness S")
        caption = "I1: straightness S of the teacher's flow and of the 2-RF (mean and spread over seeds)."
        save_figure(figure, folder / "straightness.png", caption)
    if "I2" in claims:
        figure, (axis,) = panels(width=5, height=3.4)
        for name, label in (("ddim", "teacher, DDIM"), ("dpm", "teacher, DPM-Solver++"), ("2rf", "2-RF, Euler")):
            steps = [1, 2, 4] + ([] if name == "ddim" else [25])
            curve(axis, claims["I2"], {n: f"fd_data_{name}_{n}" for n in steps}, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([1, 2, 4, 25], ["1", "2", "4", "25"])
        axis.set_xlabel("steps")
        axis.set_title("FD to held-out data")
        axis.legend()
        caption = "I2: Frechet distance to held-out data against the number of steps."
        save_figure(figure, folder / "fd_against_steps.png", caption)
    if "I3" in claims:
        figure, axes = panels(2, 4)
        for axis, key, title in zip(axes, ("error", "fd_data"), ("one-step regression error", "one-step FD")):
            bars(axis, claims["I3"], {"direct": f"{key}_direct", "reflow first": f"{key}_instaflow"}, title)
        caption = "I3, I3c: regression error to the own teacher and one-step FD, with and without reflow."
        save_figure(figure, folder / "distillation.png", caption)
    if "I5" in claims and "I6" in claims:
        figure, axes = panels(2, 4)
        arms = {"before": "fd_data_before", "L2": "fd_data_l2", "perceptual": "fd_data_perceptual"}
        bars(axes[0], claims["I5"], arms, "one-step FD")
        bars(axes[1], claims["I6"], {"single": "error_single", "stacked": "error_stacked"}, "regression error")
        caption = (
            "I5, I6: one-step FD after continuing with L2 or with the perceptual loss; regression error of the single "
            "and of the stacked student."
        )
        save_figure(figure, folder / "losses.png", caption)


def draw_figures(results: Path, study: Study, folder: Path, seed: int = 0) -> None:
    """Plots of the claims in `results`, and pictures of the study's first seed, each with its caption."""
    claims = small_claims(results)
    draw_claims(claims, folder)
    if "I3" in claims:
        prompts = study.evaluation
        first = [prompts.prompts.index(prompt) for prompt in dict.fromkeys(prompts.prompts)][:SHOWN]
        rows = torch.tensor(first)
        source = study.source(1)
        with torch.no_grad():
            one = source(prompts.noise[rows], study.evaluation_states[rows])
        arms = {
            f"teacher {study.sizes.solver_steps} steps": study.teacher_latents(study.sizes.solver_steps)[rows],
            "teacher 1 step": one,
            "2-RF 1 step": study.latents("reflow", seed, 1)[rows],
            "InstaFlow 1 step": study.latents("instaflow", seed, 1)[rows],
        }
        images = {name: study.teacher.decode(latents.clone()) for name, latents in arms.items()}
        comparison_grid(images, [prompts.prompts[i] for i in first], SHOWN, folder / "comparison.png")
        caption = "Same prompts, same noises: teacher with 25 steps and 1, 2-rectified flow and InstaFlow with 1."
        keep_captions(folder, {"comparison.png": caption})
    if "I1" in claims:
        noise, states = study.evaluation.noise[:PATHS], study.evaluation_states[:PATHS]
        teacher = conditioned(TeacherFlow(study.teacher), states, study.teacher.null(PATHS), study.sizes.guidance)
        flows = {"teacher (1-flow)": teacher, "2-rectified flow": conditioned(study.flow("reflow", seed), states)}
        caption = (
            "Paths of the same noises: progress along Z1 - Z0 against the main sideways direction (25 Euler steps; a "
            "straight flow runs along the axis)."
        )
        save_figure(trajectories(flows, noise), folder / "trajectories.png", caption)
