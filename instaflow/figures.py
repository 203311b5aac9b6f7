"""Pictures made by the code that makes the numbers: side-by-side grids, trajectories, plots of the claims."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.files import write_json
from common.images import make_grid, save_png
from instaflow.flow import TeacherFlow, Velocity, conditioned, euler_path

if TYPE_CHECKING:
    from instaflow.experiments import Study

SHOWN = 8  # prompts of a grid
PATHS = 12  # noises whose paths are drawn

CAPTIONS = {
    "default_run.png": "Default run, same prompts and noises: teacher with 25 steps and 1, 2-RF and InstaFlow with 1.",
    "comparison.png": "Same prompts, same noises: teacher with 25 steps and 1, 2-rectified flow and InstaFlow with 1.",
    "trajectories.png": "Paths of the same noises: progress along Z1 - Z0 against the main sideways direction (25 "
    "Euler steps; a straight flow runs along the axis).",
    "straightness.png": "I1: straightness S of the teacher's flow and of the 2-RF (mean and spread over seeds).",
    "fd_against_steps.png": "I2: Frechet distance to held-out data against the number of steps.",
    "distillation.png": "I3, I3c: regression error to the own teacher and one-step FD, with and without reflow.",
    "losses.png": "I5, I6: one-step FD after continuing with L2 or with the perceptual loss; regression error of the "
    "single and of the stacked student.",
}


def comparison_grid(arms: Mapping[str, Tensor], prompts: Sequence[str], count: int, path: Path, tile: int = 96) -> Path:
    """One row an arm, one column a prompt, the same noises throughout; the caption names both."""
    # Different prompts show more than repeats of one.
    first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:count]
    rows = torch.cat([images[first] for images in arms.values()])
    captions = [f"{arm}: {prompts[i]}" for arm in arms for i in first]
    return save_png(make_grid(rows, len(first), captions, tile, caption_lines=3), path)


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


def draw_trajectories(flows: Mapping[str, Velocity], z0_BCHW: Tensor, path: Path, steps: int = 25) -> Path:
    """Paths of the same noises under several flows, side by side."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(flows), figsize=(4.5 * len(flows), 3.2), sharey=True, squeeze=False)
    for axis, (name, velocity) in zip(axes[0], flows.items()):
        along, across = sideways(velocity, z0_BCHW, steps)
        for x, y in zip(along.cpu(), across.cpu()):
            axis.plot(x, y, marker=".", markersize=3, linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("progress from noise to data")
    axes[0, 0].set_ylabel("sideways")
    return _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
    return path


def _series(claim: Mapping[str, Any], keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation over seeds of several metrics."""
    values = torch.tensor([[float("nan") if row[k] is None else row[k] for k in keys] for row in claim["measured"]])
    return values.mean(0), values.std(0) if len(values) > 1 else torch.zeros(len(keys))


def _bars(axis: Any, claim: Mapping[str, Any], metrics: Mapping[str, str], title: str) -> None:
    mean, spread = _series(claim, list(metrics.values()))
    axis.bar(range(len(metrics)), mean, yerr=spread, capsize=3, color="#4878a8")
    axis.set_xticks(range(len(metrics)), list(metrics))
    axis.set_title(title)


def draw_claims(claims: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Every plot whose claim is there."""
    plt = _pyplot()
    if "I1" in claims:
        figure, axis = plt.subplots(figsize=(4, 3.2))
        _bars(axis, claims["I1"], {"teacher": "straightness_teacher", "2-RF": "straightness_2rf"}, "straightness S")
        _save(figure, folder / "straightness.png")
    if "I2" in claims:
        figure, axis = plt.subplots(figsize=(5, 3.4))
        for name, label in (("ddim", "teacher, DDIM"), ("dpm", "teacher, DPM-Solver++"), ("2rf", "2-RF, Euler")):
            steps = [1, 2, 4] + ([] if name == "ddim" else [25])
            mean, spread = _series(claims["I2"], [f"fd_data_{name}_{n}" for n in steps])
            axis.errorbar(steps, mean, yerr=spread, marker="o", capsize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([1, 2, 4, 25], ["1", "2", "4", "25"])
        axis.set_xlabel("steps")
        axis.set_title("FD to held-out data")
        axis.legend()
        _save(figure, folder / "fd_against_steps.png")
    if "I3" in claims:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
        arms = {"direct": "direct", "reflow first": "instaflow"}
        for axis, key, title in ((axes[0], "error", "one-step regression error"), (axes[1], "fd_data", "one-step FD")):
            _bars(axis, claims["I3"], {label: f"{key}_{arm}" for label, arm in arms.items()}, title)
        _save(figure, folder / "distillation.png")
    if "I5" in claims and "I6" in claims:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
        bars = {"before": "fd_data_before", "L2": "fd_data_l2", "perceptual": "fd_data_perceptual"}
        _bars(axes[0], claims["I5"], bars, "one-step FD")
        _bars(axes[1], claims["I6"], {"single": "error_single", "stacked": "error_stacked"}, "regression error")
        _save(figure, folder / "losses.png")


def draw_figures(results: Path, study: Study, folder: Path, seed: int = 0) -> None:
    """Plots of the claims in `results`, and pictures of the study's first seed; captions.json for the report."""
    claims = {c["id"]: c for c in json.loads(results.read_text())["claims"] if c["tier"] == "small"}
    folder.mkdir(parents=True, exist_ok=True)
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
    if "I1" in claims:
        noise, states = study.evaluation.noise[:PATHS], study.evaluation_states[:PATHS]
        flows = {
            "teacher (1-flow)": conditioned(
                TeacherFlow(study.teacher), states, study.teacher.null(PATHS), study.sizes.guidance
            ),
            "2-rectified flow": conditioned(study.flow("reflow", seed), states),
        }
        draw_trajectories(flows, noise, folder / "trajectories.png")
    listing = folder / "captions.json"
    earlier = json.loads(listing.read_text()) if listing.is_file() else {}
    captions = {**earlier, **CAPTIONS}
    write_json(listing, {name: text for name, text in captions.items() if (folder / name).is_file()})
