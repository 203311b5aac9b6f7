"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SAMPLES = "held-out captions, guidance 3, 20 DPM-Solver steps, first seed"
CAPTIONS = {
    "default_run_stage1.png": "Default run, stage 1: single objects by class.",
    "default_run_stage2.png": "Default run, stage 2: held-out dense captions, 32 px, averaged weights.",
    "default_run_stage3a.png": "Default run, stage 3a: held-out captions of richer scenes, 32 px.",
    "default_run_stage3b.png": "Default run, stage 3b: the same kind at 64 px (the weights of pretrained/shapes).",
    "training_curves.png": "P1 to P3: held-out noise error and wrong-caption penalty during training, an arm a line "
    "(mean and standard deviation over seeds; fixed times and noise).",
    "captions.png": "P3: wrong-caption penalty and alignment after training on dense and on LAION-like captions.",
    "guidance.png": "P6: FID, alignment and recall against the guidance scale (mean and deviation over seeds).",
    "samplers.png": "P6: FID of three samplers on one model, and their network calls.",
    "reparameterisation.png": "P2: held-out noise error and FID of three starts.",
    "captions_dense.png": f"P3, dense captions: {SAMPLES}.",
    "captions_web.png": f"P3, LAION-like captions, the same prompts: {SAMPLES}.",
    "reparam.png": f"P2, from the re-parameterised DiT: {SAMPLES}.",
    "scratch.png": f"P2, from scratch at equal steps: {SAMPLES}.",
    "scratch_extra_steps.png": f"P2, from scratch with stage 1's steps on top: {SAMPLES}.",
    "adaln_single.png": f"P1, adaLN-single: {SAMPLES}.",
    "adaln_block.png": f"P1, an adaLN MLP a block: {SAMPLES}.",
    "emoji_dense.png": f"P3 on emoji, dense captions: {SAMPLES}.",
    "emoji_web.png": f"P3 on emoji, LAION-like captions: {SAMPLES}.",
    "hq_stages.png": f"P4, three stages: {SAMPLES}.",
    "hq_mixed.png": f"P4, one mixed stage in the same CPU seconds: {SAMPLES}.",
    "64px_s2.png": f"P5, 64 px after the short fine-tuning with interpolated positions: {SAMPLES}.",
    "64px_s1.png": f"P5, 64 px after the same fine-tuning without interpolation: {SAMPLES}.",
    "2to1_buckets.png": f"P5, pictures twice as high as wide after bucketed training: {SAMPLES}.",
    "2to1_square.png": f"P5, the same after square training: {SAMPLES}.",
    "guidance_1.png": "P6, guidance 1, first seed.",
    "guidance_3.png": "P6, guidance 3, first seed.",
    "guidance_4p5.png": "P6, guidance 4.5, first seed.",
    "guidance_7.png": "P6, guidance 7, first seed.",
    "sampler_iddpm.png": "P6, 100 steps of iDDPM, guidance 3, first seed.",
    "sampler_sa.png": "P6, 25 steps of SA-Solver, guidance 3, first seed.",
}
# Arms of the training curves and what to call them.
ARMS = {
    "dense": "dense captions, from scratch",
    "web": "LAION-like captions, from scratch",
    "reparam": "dense, re-parameterised DiT",
    "block": "dense, adaLN a block",
}
SCALES = {"1": 1.0, "3": 3.0, "4p5": 4.5, "7": 7.0}
GRID_TITLES = {"fid": "FID (Lite0 features)", "alignment": "alignment", "recall": "recall"}


def draw_figures(results: Path, folder: Path, arms: Path) -> None:
    """Write every figure whose claim is in `results`, and captions.json for the report.

    Args:
        arms: folder of the trained arms' logs (`experiments.Study.train`); curves of arms that are not there are left
            out.
    """
    claims = {c["id"]: c for c in json.loads(results.read_text())["claims"] if c["tier"] == "small"}
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "training_curves.png": _training_curves(arms),
        "reparameterisation.png": _bars_of(
            claims.get("P2"), {"mse": "held-out eps-MSE", "fid": "FID"}, ["reparam", "scratch", "scratch_extra_steps"]
        ),
        "captions.png": _bars_of(
            claims.get("P3"), {"penalty": "wrong-caption penalty", "alignment": "alignment"}, ["dense", "web"]
        ),
        "guidance.png": _guidance(claims.get("P6")),
        "samplers.png": _samplers(claims.get("P6")),
    }
    for name, figure in plots.items():
        if figure is not None:
            figure.tight_layout()
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            plt.close(figure)
    known = folder / "captions.json"
    captions = json.loads(known.read_text()) if known.is_file() else {}
    captions = {**{k: v for k, v in CAPTIONS.items() if (folder / k).is_file()}, **captions}
    known.write_text(json.dumps(captions, indent=1, ensure_ascii=False) + "\n")


def _series(claim: dict[str, Any], keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over seeds of several metrics."""
    values = np.array([[row[key] for key in keys] for row in claim["measured"]], dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(keys))


def _training_curves(arms: Path) -> Any:
    found: dict[str, list[list[dict[str, float]]]] = {}
    for name in ARMS:
        logs = [json.loads(path.read_text())["curve"] for path in sorted(arms.glob(f"{name}-seed*.json"))]
        # Arms of one name have the same checkpoints; a log of other settings would not stack.
        logs = [log for log in logs if [p["step"] for p in log] == [p["step"] for p in logs[0]]]
        if logs:
            found[name] = logs
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, logs in found.items():
        steps = [point["step"] for point in logs[0]]
        for axis, key in zip(axes, ("mse", "penalty")):
            values = np.array([[point[key] for point in log] for log in logs])
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            axis.errorbar(steps, values.mean(0), yerr=spread, marker=".", capsize=2, label=ARMS[name])
    axes[0].set_yscale("log")
    axes[0].set_title("held-out eps-MSE")
    axes[1].set_title("wrong-caption penalty")
    axes[1].axhline(0, color="grey", linewidth=0.5)
    for axis in axes:
        axis.set_xlabel("text-to-image steps")
    axes[0].legend(fontsize=8)
    return figure


def _bars_of(claim: dict[str, Any] | None, metrics: dict[str, str], names: list[str]) -> Any:
    if claim is None:
        return None
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.2))
    for axis, (metric, title) in zip(axes, metrics.items()):
        mean, spread = _series(claim, [f"{metric}_{name}" for name in names])
        axis.bar(range(len(names)), mean, yerr=spread, capsize=3, color="#4878a8")
        axis.set_xticks(range(len(names)), [name.replace("_", "\n", 1).replace("_", " ") for name in names])
        axis.set_title(title)
    return figure


def _guidance(claim: dict[str, Any] | None) -> Any:
    if claim is None:
        return None
    figure, axes = plt.subplots(1, len(GRID_TITLES), figsize=(10, 3.2))
    for axis, (metric, title) in zip(axes, GRID_TITLES.items()):
        mean, spread = _series(claim, [f"{metric}_guidance_{name}" for name in SCALES])
        axis.errorbar(list(SCALES.values()), mean, yerr=spread, marker="o", capsize=3, color="#4878a8")
        axis.set_xlabel("guidance scale")
        axis.set_title(title)
    return figure


def _samplers(claim: dict[str, Any] | None) -> Any:
    if claim is None:
        return None
    names = {"guidance_3": "DPM-Solver\n20 calls", "sa": "SA-Solver\n25 calls", "iddpm": "iDDPM\n100 calls"}
    mean, spread = _series(claim, [f"fid_{name}" for name in names])
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    axis.bar(range(len(names)), mean, yerr=spread, capsize=3, color="#4878a8")
    axis.set_xticks(range(len(names)), list(names.values()))
    axis.set_title("FID at guidance 3")
    return figure
