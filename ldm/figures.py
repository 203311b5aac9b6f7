"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

from pathlib import Path

from common.figures import BLUE, bars, curve, keep_captions, panels, save_figure, small_claims

# Pictures that the runs and the claims' programs drew. Arms of claims train for minutes.
GRIDS = {
    "default_run.png": "What `make ldm-train` ends with after a quarter of an hour: colours and outlines of "
    "unseen pairs of emoji and style, no detail yet.",
    "first_stage_mild.png": "L3: held-out emoji through the first stage with KL weight 1e-6, first seed.",
    "first_stage_strong.png": "L3: the same with KL weight 0.1: hardly blurrier, which is why the target is missed.",
    "first_stage_gan.png": "L3: the same with perceptual and adversarial loss: too few steps, colours go astray.",
    "first_stage_vq1024.png": "L3: the same with a codebook of 1024 entries.",
    "first_stage_vq16.png": "L3: the same with a codebook of 16 entries: reds turn brown.",
    "unconditional_f1.png": "L1, L2: samples on pixels (f = 1) after 150 CPU seconds: noise, no shapes. First seed.",
    "unconditional_f2.png": "L2: the same budget at f = 2: backgrounds and blots of one colour.",
    "unconditional_f4.png": "L1, L2: the same budget at f = 4: plain backgrounds with blots that are not yet shapes.",
    "unconditional_f8.png": "L2: the same budget at f = 8: dark blots without an edge.",
    "class_guidance_1.png": "L4: class-conditional samples, guidance 1: blots after 90 CPU seconds, no class seen.",
    "class_guidance_1p5.png": "L4: the same noises, guidance 1.5.",
    "class_guidance_3.png": "L4: the same noises, guidance 3: more contrast, still no class; L4 holds by numbers only.",
    "layout.png": "L5: boxes and, right of each, what was drawn for them: the boxes are ignored, as the claim says.",
    "semantic_2x_rescaled.png": "L8: maps of twice the training size and, right of each, what was drawn, rescaled "
    "latents: specks, no shapes yet.",
    "semantic_2x_raw.png": "L8: the same with raw latents.",
    "superres_truth.png": "L6, x4 super-resolution: the true pictures.",
    "superres_regression.png": "L6: by regression: blurred, and ahead in FID, PSNR and SSIM.",
    "superres_latent.png": "L6: by latent diffusion after 50 CPU seconds: some right colours, else patterns.",
    "superres_pixel.png": "L6: by pixel diffusion in the same time: noise.",
    "inpaint_pixel.png": "L7, inpainting: on pixels, the holes are filled with noise.",
    "inpaint_kl.png": "L7: the same holes in the KL latent space: smears instead of noise.",
    "inpaint_vq.png": "L7: in the VQ latent space.",
    "inpaint_vq_noattn.png": "L7: in a VQ latent space without attention in the first stage.",
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
