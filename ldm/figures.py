"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

CAPTIONS = {
    "emoji64.png": "Teacher emoji64: six seeds a prompt, guidance 3.",
    "shapes32-v.png": "Teacher shapes32-v: six seeds a prompt, guidance 3.",
    "shapes32-eps.png": "Teacher shapes32-eps: six seeds a prompt, guidance 3.",
    "default_run.png": "What `make ldm-train` ends with: unseen pairs of emoji and style.",
    "emoji64-reconstruction.png": "First stage of emoji64: pictures (above) and their reconstructions (below).",
    "f_sweep.png": "L1, L2: FID, reconstruction FID and speed against the down-sampling factor f, at equal training "
    "time (mean and standard deviation over seeds; logarithmic axes).",
    "first_stage_arms.png": "L3: PSNR and rFID of five first stages that differ in one option each.",
    "guidance.png": "L4: guidance trades recall for precision and class accuracy.",
    "superres.png": "L6: FID and PSNR of x4 super-resolution by latent diffusion, regression and pixel diffusion.",
    "inpainting.png": "L7: inpainting FID and training speed on pixels and in three latent spaces.",
    "unconditional_f1.png": "Samples on pixels (f = 1), first seed.",
    "unconditional_f4.png": "Samples in latent space (f = 4), same budget, first seed.",
    "class_guidance_3.png": "Class-conditional samples at guidance 3, first seed.",
    "layout.png": "L5: boxes and what was drawn into them (pairs), first seed.",
    "semantic_2x_rescaled.png": "L8: maps of twice the training size and their syntheses (pairs), rescaled latents.",
    "superres_latent.png": "L6: latent super-resolution, first seed.",
    "superres_regression.png": "L6: regression, the same images.",
    "superres_truth.png": "L6: the true images.",
    "inpaint_kl.png": "L7: inpainting in the KL latent space, first seed.",
}


def _series(claim: dict[str, Any], keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over seeds of several metrics."""
    values = np.array([[row[key] for key in keys] for row in claim["measured"]], dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(keys))


def _bars(axis: Any, claim: dict[str, Any], metric: str, arms: list[str], title: str) -> None:
    mean, spread = _series(claim, [f"{metric}_{arm}" for arm in arms])
    axis.bar(range(len(arms)), mean, yerr=spread, capsize=3, color="#4878a8")
    axis.set_xticks(range(len(arms)), [arm.replace("_", "\n") for arm in arms])
    axis.set_title(title)


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results`, and captions.json for the report."""
    claims = {c["id"]: c for c in json.loads(results.read_text())["claims"] if c["tier"] == "small"}
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, figure: Any) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
        plt.close(figure)

    if "L2" in claims:
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
        factors = [1, 2, 4, 8]
        for axis, metric, title in (
            (axes[0], "fid", "FID of samples"),
            (axes[1], "rfid", "FID of reconstructions"),
            (axes[2], "sample_speed", "samples per CPU second"),
        ):
            mean, spread = _series(claims["L2"], [f"{metric}_f{f}" for f in factors])
            axis.errorbar(factors, mean, yerr=spread, marker="o", capsize=3, color="#4878a8")
            axis.set_xscale("log", base=2)
            axis.set_xticks(factors, [str(f) for f in factors])
            axis.set_xlabel("f")
            axis.set_title(title)
        axes[2].set_yscale("log")
        save("f_sweep.png", figure)
    if "L3" in claims:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
        arms = ["mild", "strong", "gan", "vq1024", "vq16"]
        _bars(axes[0], claims["L3"], "psnr", arms, "PSNR (dB)")
        _bars(axes[1], claims["L3"], "rfid", arms, "FID of reconstructions")
        save("first_stage_arms.png", figure)
    if "L4" in claims:
        figure, axis = plt.subplots(figsize=(5, 3.2))
        scales = {"1": 1.0, "1p5": 1.5, "3": 3.0}
        for metric, label in (("precision", "precision"), ("recall", "recall"), ("accuracy", "class accuracy")):
            mean, spread = _series(claims["L4"], [f"{metric}_{name}" for name in scales])
            axis.errorbar(list(scales.values()), mean, yerr=spread, marker="o", capsize=3, label=label)
        axis.set_xlabel("guidance scale")
        axis.legend()
        save("guidance.png", figure)
    if "L6" in claims:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
        arms = ["latent", "regression", "pixel"]
        _bars(axes[0], claims["L6"], "fid", arms, "FID")
        _bars(axes[1], claims["L6"], "psnr", arms, "PSNR (dB)")
        save("superres.png", figure)
    if "L7" in claims:
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
        arms = ["pixel", "kl", "vq", "vq_noattn"]
        _bars(axes[0], claims["L7"], "fid", arms, "FID")
        _bars(axes[1], claims["L7"], "train_speed", arms, "training images per CPU second")
        save("inpainting.png", figure)
    known = folder / "captions.json"
    captions = json.loads(known.read_text()) if known.is_file() else {}
    captions = {**{k: v for k, v in CAPTIONS.items() if (folder / k).is_file()}, **captions}
    known.write_text(json.dumps(captions, indent=1, ensure_ascii=False) + "\n")
