"""Measure the paper's claims at small scale: `python ldm/reproduce.py` writes results/ldm.json and its figures.

    python ldm/reproduce.py                          # tier small: 3 seeds of every claim, about two CPU hours in all
    python ldm/reproduce.py --claims L1 L2           # some of them
    python ldm/reproduce.py --tier smoke             # what CI runs, about 2 minutes

The claims, with targets and budgets, are in claims.yaml. Budgets are CPU seconds of one thread, so other load on the
machine does not change what an arm gets. Every finished (claim, seed) is kept in runs/reproduce/, so an interrupted run
continues where it stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common import reproduction
from common.data.shapes_verifier import colour_in_boxes
from common.errors import run_main
from common.metrics.image import psnr, ssim
from common.study import labelled
from ldm.config import DataConfig
from ldm.experiments import (
    EMOJI,
    FACTORS,
    SHAPES,
    Study,
    base_config,
    in_memory,
    open_task,
    regress,
    shapes_first_stage,
)
from ldm.first_stage import reconstruct
from ldm.followed import ClassProbe, map_overlap
from ldm.sample import draw, draw_boxes


def l1(study: Study, seed: int) -> dict[str, float]:
    """Latent (f = 4) against pixels."""
    latent, pixel = study.f_arm(4, seed, "L1"), study.f_arm(1, seed, "L1")
    return {
        "fid_drop": 1 - latent["fid"] / pixel["fid"],
        "sampling_speedup": latent["sample_speed"] / pixel["sample_speed"],
        **labelled(latent, "f4", "fid", "kid_x1000", "psnr", "rfid", "sample_speed", "train_speed"),
        **labelled(pixel, "f1", "fid", "kid_x1000", "sample_speed", "train_speed"),
    }


def l2(study: Study, seed: int) -> dict[str, float]:
    """The sweep over f."""
    arms = {f: study.f_arm(f, seed, "L2") for f in FACTORS}
    inner = min(arms[2]["fid"], arms[4]["fid"])
    outer = min(arms[1]["fid"], arms[8]["fid"])

    def rising(key: str) -> float:
        return float(all(arms[a][key] < arms[b][key] for a, b in ((1, 2), (2, 4), (4, 8))))

    result = {
        "inner_margin": 1 - inner / outer,
        "rfid_rises": rising("rfid"),
        "throughput_rises": rising("train_speed"),
    }
    for f, arm in arms.items():
        result |= labelled(arm, f"f{f}", "fid", "kid_x1000", "rfid", "psnr", "train_speed", "sample_speed", "steps")
    return result


def l3(study: Study, seed: int) -> dict[str, float]:
    """Five first stages of f = 4 that differ in one option each."""
    size = study.sizes["L3"]
    arms: dict[str, dict[str, Any]] = {
        "mild": {},
        "strong": {"kl_weight": 0.1},
        "gan": {"perceptual": 0.3, "disc_weight": 0.5, "disc_start": 200, "disc_width": 16},
        "vq1024": {"kind": "vq", "n_embed": 1024},
        "vq16": {"kind": "vq", "n_embed": 16},
    }
    result: dict[str, float] = {}
    base = base_config("unconditional", EMOJI, seed=seed)
    task = open_task(base)
    real = task.reference.columns["image"][: size.images]
    for name, options in arms.items():
        config = dataclasses.replace(base, first_stage=dataclasses.replace(base.first_stage, **options))
        stage, notes = study.autoencoder(f"L3-{name}", config, in_memory(task.train), size.seconds)
        result |= labelled(study.reconstruction(stage, real), name) | {f"steps_{name}": notes["ae_steps"]}
        study.show(seed, f"first_stage_{name}", reconstruct(stage, real[:32]))
    return {
        "psnr_gain_mild_kl": result["psnr_mild"] - result["psnr_strong"],
        "rfid_drop_gan": result["rfid_mild"] - result["rfid_gan"],
        "psnr_loss_gan": result["psnr_mild"] - result["psnr_gan"],
        "psnr_gain_codebook": result["psnr_vq1024"] - result["psnr_vq16"],
        **result,
    }


def l4(study: Study, seed: int) -> dict[str, float]:
    """Class-conditional EmojiGroups at three guidance scales; the classifier is a probe on the judge's features."""
    size = study.sizes["L4"]
    stage, first = study.emoji_first_stage()
    data = DataConfig(name="emoji_groups", size=32, eval_images=1000)
    config = base_config("class", data, seed=seed, first_stage=first)
    task = open_task(config)
    arm = study.denoiser("L4-class", config, task, stage, size.seconds)
    train, reference = in_memory(task.train).columns, task.reference.columns
    real, labels = reference["image"][: size.images], reference["label"][: size.images]
    features = study.judge.features_of_real(train["image"][:2000])
    probe = ClassProbe(features, train["label"][:2000])

    result: dict[str, float] = {}
    for scale, name in ((1.0, "1"), (1.5, "1p5"), (3.0, "3")):
        fake, _ = arm.samples(size.images, guidance=scale)
        result |= labelled(study.judge.distances(fake, real), name)
        result[f"accuracy_{name}"] = probe.right(study.judge.features(fake), labels)
        study.show(seed, f"class_guidance_{name}", fake[:32])
    result["accuracy_real"] = probe.right(study.judge.features_of_real(real), labels)
    return {
        "accuracy_gain": result["accuracy_3"] - result["accuracy_1"],
        "precision_gain": result["precision_3"] - result["precision_1"],
        "recall_drop": result["recall_1"] - result["recall_3"],
        "fid_gain_1p5": result["fid_1"] - result["fid_1p5"],
        **result,
    }


def l5(study: Study, seed: int) -> dict[str, float]:
    """Layout tokens on 3x3 grids, and captions; both on the committed Shapes autoencoder."""
    size = study.sizes["L5"]
    stage, first = shapes_first_stage()
    grids = base_config("layout", dataclasses.replace(SHAPES, tasks=["grid3"]), z=8, seed=seed, first_stage=first)
    layouts = open_task(grids)
    arm = study.denoiser("L5-layout", grids, layouts, stage, size.seconds)
    columns = {name: column[: size.images] for name, column in layouts.reference.columns.items()}
    fake, _ = arm.samples(size.images, guidance=2.0)
    boxes, colours = columns["boxes"].numpy(), columns["colours"].numpy()
    drawn = draw_boxes(columns["boxes"][:16], columns["classes"][:16], 32, columns["colours"][:16])
    study.show(seed, "layout", torch.stack([drawn, fake[:16]], 1).flatten(0, 1))
    captions = base_config("text", SHAPES, z=8, seed=seed, first_stage=first)
    text = open_task(captions)
    model = study.denoiser("L5-text", captions, text, stage, size.seconds)
    right, wrong = model.caption_losses(text.reference.columns)
    return {
        "colour_in_box": float(np.nanmean(colour_in_boxes(fake, boxes, colours))),
        "colour_in_box_shuffled": float(np.nanmean(colour_in_boxes(fake.roll(1, 0), boxes, colours))),
        "wrong_caption_penalty": wrong / right - 1,
        "loss_right_caption": right,
        "layout_steps": float(arm.steps),
        "text_steps": float(model.steps),
    }


def l6(study: Study, seed: int) -> dict[str, float]:
    """x4 super-resolution: latent diffusion, regression, pixel diffusion."""
    size = study.sizes["L6"]
    stage, first = study.emoji_first_stage()
    config = base_config("superres", EMOJI, seed=seed, first_stage=first)
    task = open_task(config)
    real, low = (task.reference.columns[key][: size.images] for key in ("image", "low"))
    pixels = base_config("superres", EMOJI, 1, 3, seed)
    images = {
        "latent": study.denoiser("L6-latent", config, task, stage, size.seconds).samples(size.images)[0],
        "pixel": study.denoiser("L6-pixel", pixels, open_task(pixels), None, size.seconds).samples(size.images)[0],
        "regression": regress(study.regression("L6-regression", config, task, size.seconds), low, 32),
    }
    result: dict[str, float] = {}
    for name, fake in images.items():
        result |= labelled(study.judge.distances(fake, real), name, "fid", "kid_x1000")
        result |= {f"psnr_{name}": float(psnr(fake, real).mean()), f"ssim_{name}": float(ssim(fake, real).mean())}
        study.show(seed, f"superres_{name}", fake[:32])
    study.show(seed, "superres_truth", real[:32])
    return {
        "fid_gain_over_regression": result["fid_regression"] - result["fid_latent"],
        "fid_gain_over_pixel": result["fid_pixel"] - result["fid_latent"],
        "psnr_regression_gain": result["psnr_regression"] - result["psnr_latent"],
        "ssim_regression_gain": result["ssim_regression"] - result["ssim_latent"],
        **result,
    }


def l7(study: Study, seed: int) -> dict[str, float]:
    """Inpainting on pixels and in three latent spaces: KL, VQ, attention-free VQ."""
    size = study.sizes["L7"]
    spaces: dict[str, dict[str, Any] | None] = {
        "pixel": None,
        "kl": {},
        "vq": {"attention": True, "kind": "vq", "n_embed": 1024},
        "vq_noattn": {"kind": "vq", "n_embed": 1024},
    }
    result: dict[str, float] = {}
    for name, options in spaces.items():
        if options is None:
            stage, config = None, base_config("inpaint", EMOJI, 1, 3, seed)
        else:
            stage, first = study.emoji_first_stage(**options)
            config = base_config("inpaint", EMOJI, seed=seed, first_stage=first)
        task = open_task(config)
        arm = study.denoiser(f"L7-{name}", config, task, stage, size.seconds)
        fake, speed = arm.samples(size.images)
        real = task.reference.columns["image"][: size.images]
        result |= labelled(study.judge.distances(fake, real), name, "fid", "kid_x1000")
        result |= {f"train_speed_{name}": arm.images_per_second, f"sample_speed_{name}": speed}
        study.show(seed, f"inpaint_{name}", fake[:32])
    return {
        "train_speedup": result["train_speed_kl"] / result["train_speed_pixel"],
        "sampling_speedup": result["sample_speed_kl"] / result["sample_speed_pixel"],
        "fid_ratio": result["fid_pixel"] / result["fid_kl"],
        "noattn_fid_ratio": result["fid_vq_noattn"] / result["fid_vq"],
        **result,
    }


def l8(study: Study, seed: int) -> dict[str, float]:
    """Semantic synthesis at 1x and 2x the training size, with rescaled and with raw latents."""
    size = study.sizes["L8"]
    stage, first = shapes_first_stage()
    result: dict[str, float] = {}
    for name, rescaled in (("rescaled", True), ("raw", False)):
        config = base_config("semantic", SHAPES, z=8, seed=seed, first_stage=first)
        config.diffusion = dataclasses.replace(config.diffusion, scale_by_std=rescaled)
        task = open_task(config)
        arm = study.denoiser(f"L8-{name}", config, task, stage, size.seconds)
        maps = task.reference.columns["label_map"][: size.images]
        fake, _ = arm.samples(size.images)
        # Four training-size maps side by side make one map of twice the size.
        tiles = maps[: size.images // 4 * 4].reshape(-1, 2, 2, 32, 32)
        large = tiles.permute(0, 1, 3, 2, 4).reshape(-1, 64, 64)
        images = draw(arm.network, "semantic", {"label_map": large}, len(large), (64, 64), config.sampling, seed=2)
        result |= {f"agreement_1x_{name}": map_overlap(fake, maps), f"agreement_2x_{name}": map_overlap(images, large)}
        result[f"latent_std_{name}"] = float(1 / arm.network.scale_factor)
        shown = F.interpolate((large[:8, None] > 0).float() * 255, 64).expand(-1, 3, -1, -1).to(torch.uint8)
        study.show(seed, f"semantic_2x_{name}", torch.stack([shown, images[:8]], 1).flatten(0, 1), columns=8)
    return {
        "agreement_ratio": result["agreement_2x_rescaled"] / result["agreement_1x_rescaled"],
        "rescaled_gain": result["agreement_2x_rescaled"] - result["agreement_2x_raw"],
        **result,
    }


def figures(study: Study, ledger: Path) -> None:
    from ldm.figures import draw_figures

    draw_figures(ledger, study.figures)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main(
        "ldm",
        __doc__,
        (l1, l2, l3, l4, l5, l6, l7, l8),
        lambda options: Study(options.tier, options.folder, options.rung),
        figures=figures,
        argv=argv,
    )


if __name__ == "__main__":
    run_main(main)
