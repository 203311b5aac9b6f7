"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.figures import (
    BLUE,
    bars,
    curve,
    keep_captions,
    kept_logs,
    panels,
    save_figure,
    small_claims,
    training_curve,
)

SAMPLES = "held-out captions, guidance 3, 20 DPM-Solver steps, first seed"
# Grids that the claims' program drew. Their arms train for minutes and draw blots, not shapes: what differs between two
# arms is how far colour and place follow the words.
GRIDS = {
    "captions_dense.png": f"P3, dense captions: blots, but of the colour and about where the words say; {SAMPLES}.",
    "captions_web.png": f"P3, LAION-like captions, the same prompts: colours do not follow the words; {SAMPLES}.",
    "reparam.png": f"P2, from the re-parameterised DiT: blots of mixed colours; {SAMPLES}.",
    "scratch.png": f"P2, from scratch at equal steps: noise, nothing learned yet; {SAMPLES}.",
    "scratch_extra_steps.png": f"P2, from scratch with stage 1's steps on top: blots as from the DiT; {SAMPLES}.",
    "adaln_single.png": f"P1, adaLN-single: blots, level with the larger network's; {SAMPLES}.",
    "adaln_block.png": f"P1, an adaLN MLP a block: {SAMPLES}.",
    "emoji_dense.png": f"P3 on emoji, dense captions: coloured patches, no emoji; {SAMPLES}.",
    "emoji_web.png": f"P3 on emoji, LAION-like captions: the same patches, so the words are not used; {SAMPLES}.",
    "hq_stages.png": f"P4, three stages: blots; {SAMPLES}.",
    "hq_mixed.png": f"P4, one mixed stage in the same CPU seconds: blots of clearer colours; {SAMPLES}.",
    "64px_s2.png": f"P5, 64 px after the short fine-tuning with interpolated positions: splinters; {SAMPLES}.",
    "64px_s1.png": f"P5, 64 px after the same fine-tuning without interpolation: finer splinters; {SAMPLES}.",
    "2to1_buckets.png": f"P5, pictures twice as high as wide after bucketed training: {SAMPLES}.",
    "2to1_square.png": f"P5, the same after square training: {SAMPLES}.",
    "guidance_1.png": "P6, guidance 1: the colours of several objects run into one another. First seed, as all of P6.",
    "guidance_3.png": "P6, guidance 3: the colours follow the words better.",
    "guidance_4p5.png": "P6, guidance 4.5: first pictures go empty.",
    "guidance_7.png": "P6, guidance 7: too much, colours flood or vanish.",
    "sampler_iddpm.png": "P6, 100 steps of iDDPM, guidance 3: smoother blots for five times the calls.",
    "sampler_sa.png": "P6, 25 steps of SA-Solver, guidance 3.",
}
# Arms of the training curves and what to call them.
ARMS = {
    "dense": "dense captions, from scratch",
    "web": "LAION-like captions, from scratch",
    "reparam": "dense, re-parameterised DiT",
    "block": "dense, adaLN a block",
}
SCALES = {"1": 1.0, "3": 3.0, "4p5": 4.5, "7": 7.0}


def draw_figures(results: Path, folder: Path, arms: Path) -> None:
    """Write every figure whose claim is in `results`, and the captions of all pictures.

    Args:
        arms: folder of the trained arms' logs (`experiments.Study.train`); curves of arms that are not there are left
            out.
    """
    claims = small_claims(results)
    keep_captions(folder, GRIDS)
    if (figure := _training_curves(arms)) is not None:
        caption = (
            "P1 to P3: held-out noise error and wrong-caption penalty during training, an arm a line (mean and "
            "standard deviation over seeds; fixed times and noise)."
        )
        save_figure(figure, folder / "training_curves.png", caption)
    if "P2" in claims:
        caption = "P2: held-out noise error and FID of three starts."
        names = {"reparam": "reparam", "scratch": "scratch", "scratch\nextra steps": "scratch_extra_steps"}
        figure = _bars_of(claims["P2"], {"mse": "held-out eps-MSE", "fid": "FID"}, names)
        save_figure(figure, folder / "reparameterisation.png", caption)
    if "P3" in claims:
        caption = "P3: wrong-caption penalty and alignment after training on dense and on LAION-like captions."
        titles = {"penalty": "wrong-caption penalty", "alignment": "alignment"}
        save_figure(_bars_of(claims["P3"], titles, {"dense": "dense", "web": "web"}), folder / "captions.png", caption)
    if "P6" in claims:
        titles = {"fid": "FID (Lite0 features)", "alignment": "alignment", "recall": "recall"}
        figure, axes = panels(3, 10 / 3)
        for axis, (metric, title) in zip(axes, titles.items()):
            curve(axis, claims["P6"], {x: f"{metric}_guidance_{n}" for n, x in SCALES.items()}, color=BLUE)
            axis.set_xlabel("guidance scale")
            axis.set_title(title)
        caption = "P6: FID, alignment and recall against the guidance scale (mean and deviation over seeds)."
        save_figure(figure, folder / "guidance.png", caption)
        figure, (axis,) = panels()
        calls = {"DPM-Solver\n20 calls": "guidance_3", "SA-Solver\n25 calls": "sa", "iDDPM\n100 calls": "iddpm"}
        bars(axis, claims["P6"], {label: f"fid_{name}" for label, name in calls.items()}, "FID at guidance 3")
        caption = "P6: FID of three samplers on one model, and their network calls."
        save_figure(figure, folder / "samplers.png", caption)


def _training_curves(arms: Path) -> Any:
    found = {label: kept_logs(arms, f"{name}-seed*.json") for name, label in ARMS.items()}
    if not any(found.values()):
        return None
    figure, axes = panels(2, height=3.4)
    for axis, metric, title in zip(axes, ("mse", "penalty"), ("held-out eps-MSE", "wrong-caption penalty")):
        for label, logs in found.items():
            if logs:
                training_curve(axis, logs, metric, label=label)
        axis.set_title(title)
        axis.set_xlabel("text-to-image steps")
    axes[0].set_yscale("log")
    axes[1].axhline(0, color="grey", linewidth=0.5)
    axes[0].legend(fontsize=8)
    return figure


def _bars_of(claim: dict[str, Any], titles: dict[str, str], names: dict[str, str]) -> Any:
    figure, axes = panels(len(titles), 4.2)
    for axis, (metric, title) in zip(axes, titles.items()):
        bars(axis, claim, {label: f"{metric}_{name}" for label, name in names.items()}, title)
    return figure
