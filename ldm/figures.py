"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

from pathlib import Path

from common.figures import BLUE, bars, curve, keep_captions, panels, save_figure, small_claims

# Pictures that the runs and the claims' programs drew.
GRIDS = {
    "default_run.png": "What `make ldm-train` ends with: unseen pairs of emoji and style.",
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


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results`, and the captions of all pictures."""
    claims = small_claims(results)
    keep_captions(folder, GRIDS)
    if "L2" in claims:
        figure, axes = panels(3, 10 / 3)
        factors = [1, 2, 4, 8]
        titles = {
            "fid": "FID of samples",
            "rfid": "FID of reconstructions",
            "sample_speed": "samples per CPU second",
        }
        for axis, (metric, title) in zip(axes, titles.items()):
            curve(axis, claims["L2"], {f: f"{metric}_f{f}" for f in factors}, color=BLUE)
            axis.set_xscale("log", base=2)
            axis.set_xticks(factors, [str(f) for f in factors])
            axis.set_xlabel("f")
            axis.set_title(title)
        axes[2].set_yscale("log")
        caption = (
            "L1, L2: FID, reconstruction FID and speed against the down-sampling factor f, at equal training time "
            "(mean and standard deviation over seeds; logarithmic axes)."
        )
        save_figure(figure, folder / "f_sweep.png", caption)
    if "L4" in claims:
        figure, (axis,) = panels(width=5)
        for metric, label in (("precision", "precision"), ("recall", "recall"), ("accuracy", "class accuracy")):
            scales = {1.0: f"{metric}_1", 1.5: f"{metric}_1p5", 3.0: f"{metric}_3"}
            curve(axis, claims["L4"], scales, label=label)
        axis.set_xlabel("guidance scale")
        axis.legend()
        caption = "L4: guidance trades recall for precision and class accuracy."
        save_figure(figure, folder / "guidance.png", caption)

    def draw_arms(claim: str, name: str, arms: list[str], metrics: dict[str, str], caption: str) -> None:
        if claim in claims:
            figure, axes = panels(2, 4)
            for axis, (metric, title) in zip(axes, metrics.items()):
                bars(axis, claims[claim], {arm.replace("_", "\n"): f"{metric}_{arm}" for arm in arms}, title)
            save_figure(figure, folder / name, caption)

    draw_arms(
        "L3",
        "first_stage_arms.png",
        ["mild", "strong", "gan", "vq1024", "vq16"],
        {"psnr": "PSNR (dB)", "rfid": "FID of reconstructions"},
        "L3: PSNR and rFID of five first stages that differ in one option each.",
    )
    draw_arms(
        "L6",
        "superres.png",
        ["latent", "regression", "pixel"],
        {"fid": "FID", "psnr": "PSNR (dB)"},
        "L6: FID and PSNR of x4 super-resolution by latent diffusion, regression and pixel diffusion.",
    )
    draw_arms(
        "L7",
        "inpainting.png",
        ["pixel", "kl", "vq", "vq_noattn"],
        {"fid": "FID", "train_speed": "training images per CPU second"},
        "L7: inpainting FID and training speed on pixels and in three latent spaces.",
    )
