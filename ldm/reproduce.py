"""Measure the paper's claims at small scale: `python reproduce.py` writes results/ldm.json and its figures.

    python reproduce.py                          # tier small: 3 seeds of every claim, about two CPU hours in all
    python reproduce.py --claims L1 L2           # some of them
    python reproduce.py --tier smoke             # what CI runs, about 2 minutes

Budgets are CPU seconds of one thread, so other load on the machine does not change what an arm gets. Every finished
(claim, seed) is kept in runs/reproduce/, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import run_main
from common.ledger import Claim, Condition, PaperValue, Target, Tier
from common.paths import REPOSITORY, RESULTS
from common.reproduction import chosen_claims, ledger_path, measure_claims, options_parser
from ldm.config import DataConfig

if TYPE_CHECKING:
    from ldm.autoencoder import FirstStage
    from ldm.experiments import Arm

FIGURES = RESULTS / "figures" / "ldm"
EMOJI = DataConfig(name="emoji", size=32, eval_images=1000)
SCENES = DataConfig(name="shapes", size=32, train_images=12000, eval_images=1000)
SEEDS = {"smoke": (0,), "small": (0, 1, 2)}


STAGE_SECONDS = 150.0  # CPU seconds of each first stage that L4, L6 and L7 share


@dataclass(frozen=True)
class Budget:
    """CPU seconds of an arm and images per measurement.

    L1 and L2: autoencoder and denoiser together. L3: autoencoder. The others: denoiser, on a first stage that stands.
    """

    seconds: float
    images: int


BUDGETS: dict[str, dict[str, Budget]] = {
    "small": {
        "L1": Budget(150, 500),
        "L2": Budget(150, 500),
        "L3": Budget(30, 600),
        "L4": Budget(90, 500),
        "L5": Budget(90, 300),
        "L6": Budget(50, 300),
        "L7": Budget(45, 300),
        "L8": Budget(60, 300),
    },
    "smoke": {"L1": Budget(24, 100), "L8": Budget(18, 60)},
}


def claims(tier: Tier) -> dict[str, Claim]:
    """The claims with their targets, fixed before the run (specification section 6)."""

    def make(id: str, statement: str, paper: PaperValue, target: Target) -> Claim:
        return Claim(id, statement, paper, target, tier)

    entries = [
        make(
            "L1",
            "At equal training time, autoencoder included, a latent model (f = 4) beats the same U-Net on pixels, and "
            "samples faster.",
            PaperValue(
                "FID gap of 38 between LDM-1 and LDM-8 after 2M steps; inpainting FID 24.74 against 15.21", "F 6, T 6"
            ),
            Target(
                "FID at least 15 % lower and sampling at least 4x faster per image",
                "fid_drop",
                ">=",
                0.15,
                (Condition("sampling_speedup", ">=", 4.0),),
            ),
        ),
        make(
            "L2",
            "The down-sampling factor has an inner optimum: of f = 1, 2, 4, 8 at equal time, 2 or 4 is best; "
            "reconstruction gets worse and throughput better with f.",
            PaperValue("LDM-4 and LDM-8 dominate; f = 1, 2 learn slowly, f = 32 stalls", "F 6, F 7, T 8"),
            Target(
                "best FID at f in {2, 4} (margin over the better of f = 1 and f = 8 above 0); rFID rises with f; "
                "training throughput rises with f",
                "inner_margin",
                ">",
                0.0,
                (Condition("rfid_rises", ">=", 1.0), Condition("throughput_rises", ">=", 1.0)),
            ),
        ),
        make(
            "L3",
            "Mild regularisation keeps detail (KL weight 1e-6 against 1e-1); perceptual and adversarial terms lower "
            "rFID at the cost of PSNR; a larger codebook reconstructs better.",
            PaperValue(
                "KL weight 1e-6; f8 VQ with 16384 codes rFID 1.14, PSNR 23.07, with 256 codes 1.49, 22.35",
                "S 3.1, G, T 8",
            ),
            Target(
                "PSNR(1e-6) at least 2 dB above PSNR(1e-1); perceptual + GAN: rFID lower and PSNR lower than L1 only; "
                "1024 codes: PSNR above 16 codes",
                "psnr_gain_mild_kl",
                ">=",
                2.0,
                (
                    Condition("rfid_drop_gan", ">", 0.0),
                    Condition("psnr_loss_gan", ">", 0.0),
                    Condition("psnr_gain_codebook", ">", 0.0),
                ),
            ),
        ),
        make(
            "L4",
            "Classifier-free guidance trades recall for precision: scales 1, 1.5 and 3 raise precision and class "
            "accuracy and lower recall; FID at 1.5 is no worse than at 1.",
            PaperValue(
                "ImageNet LDM-4: FID 10.56 -> 3.60, precision .71 -> .87, recall .62 -> .48 at scale 1.5", "T 3, T 10"
            ),
            Target(
                "precision and class accuracy rise from 1 to 3, recall falls, FID(1.5) <= FID(1)",
                "accuracy_gain",
                ">",
                0.0,
                (
                    Condition("precision_gain", ">", 0.0),
                    Condition("recall_drop", ">", 0.0),
                    Condition("fid_gain_1p5", ">=", 0.0),
                ),
            ),
        ),
        make(
            "L5",
            "Cross-attention conditions on tokens: with layout tokens the colours land in their boxes, and wrong "
            "captions cost a text model loss.",
            PaperValue("layout-to-image COCO FID 40.91, text-to-image COCO FID 12.63", "T 9, T 2"),
            Target(
                "colour-in-box accuracy at least 0.5 on 9 cells; loss with another image's caption at least 3 % above "
                "the loss with its own",
                "colour_in_box",
                ">=",
                0.5,
                (Condition("wrong_caption_penalty", ">=", 0.03),),
            ),
        ),
        make(
            "L6",
            "x4 super-resolution: latent diffusion wins FID, regression wins PSNR and SSIM; latent beats pixel "
            "diffusion at equal compute.",
            PaperValue("FID 2.8 (LDM-4) / 15.2 (regression) / 5.1 (pixel DM); PSNR 24.4 / 27.9 / 24.1", "T 5, T 11"),
            Target(
                "FID: latent below regression and below pixel diffusion; PSNR and SSIM: regression above latent",
                "fid_gain_over_regression",
                ">",
                0.0,
                (
                    Condition("fid_gain_over_pixel", ">", 0.0),
                    Condition("psnr_regression_gain", ">", 0.0),
                    Condition("ssim_regression_gain", ">", 0.0),
                ),
            ),
        ),
        make(
            "L7",
            "Inpainting in latent space trains and samples at least 2.7 times faster than on pixels and reaches a "
            "lower FID in the same time; leaving attention out of the first stage costs little.",
            PaperValue("speed-up at least 2.7x, FID@2k 24.74 -> 14.99, attention-free 15.95", "T 6"),
            Target(
                "training and sampling throughput at least 2.7x; FID ratio at least 1.3; attention-free first stage "
                "within 10 % of the FID with attention",
                "train_speedup",
                ">=",
                2.7,
                (
                    Condition("sampling_speedup", ">=", 2.7),
                    Condition("fid_ratio", ">=", 1.3),
                    Condition("noattn_fid_ratio", "<=", 1.1),
                ),
            ),
        ),
        make(
            "L8",
            "A spatially conditioned model synthesises images twice as large as it was trained on; rescaled latents "
            "are better than raw ones.",
            PaperValue(
                "semantic synthesis at 512x1024 from 256 crops; rescaling changes convolutional samples",
                "F 9, D.1, F 15",
            ),
            Target(
                "map agreement at 2x at least 0.9 of that at 1x; agreement at 2x higher with rescaled than raw latents",
                "agreement_ratio",
                ">=",
                0.9,
                (Condition("rescaled_gain", ">", 0.0),),
            ),
        ),
    ]
    return {claim.id: claim for claim in entries}


def measure_l1(seed: int, budget: Budget) -> dict[str, float]:
    """Latent (f = 4) against pixels."""
    latent, pixel = f_arm(4, seed, budget), f_arm(1, seed, budget)
    return {
        "fid_drop": 1 - latent["fid"] / pixel["fid"],
        "sampling_speedup": latent["sample_speed"] / pixel["sample_speed"],
        **{f"{key}_f4": latent[key] for key in ("fid", "kid_x1000", "psnr", "rfid", "sample_speed", "train_speed")},
        **{f"{key}_f1": pixel[key] for key in ("fid", "kid_x1000", "sample_speed", "train_speed")},
    }


LATENT_CHANNELS = {1: 3, 2: 3, 4: 4, 8: 16}


def f_arm(f: int, seed: int, budget: Budget) -> dict[str, float]:
    """One arm of L1 and L2, kept on disk because both read it: scenes without captions, all in one time budget."""
    from ldm import experiments as x

    store = working_folder() / f"f{f}-{budget.seconds:g}s-seed{seed}.json"
    if store.is_file():
        return json.loads(store.read_text())
    config = x.base_config("unconditional", SCENES, f, LATENT_CHANNELS[f], seed)
    task = x.open_task(config)
    ae_seconds = x.AUTOENCODER_SHARE * budget.seconds if f > 1 else 0.0
    stage, notes = x.autoencoder(config, x.in_memory(task.train), ae_seconds)
    arm = x.train_denoiser(config, task, stage, budget.seconds - notes["ae_seconds"])
    real = task.reference.columns["image"][: budget.images]
    fake, speed = arm.samples(budget.images)
    if seed == 0:
        keep_samples(f"unconditional_f{f}", fake[:32])
    result = {
        **x.distances(fake, real),
        **x.reconstruction(stage, real),
        "sample_speed": speed,
        "train_speed": arm.images_per_second,
        "steps": float(arm.steps),
        **notes,
    }
    save_json(store, result)
    return result


def measure_l2(seed: int, budget: Budget) -> dict[str, float]:
    """The sweep over f."""
    arms = {f: f_arm(f, seed, budget) for f in (1, 2, 4, 8)}
    inner = min(arms[2]["fid"], arms[4]["fid"])
    outer = min(arms[1]["fid"], arms[8]["fid"])
    rising = lambda key: float(all(arms[a][key] < arms[b][key] for a, b in ((1, 2), (2, 4), (4, 8))))  # noqa: E731
    result = {
        "inner_margin": 1 - inner / outer,
        "rfid_rises": rising("rfid"),
        "throughput_rises": rising("train_speed"),
    }
    for f, arm in arms.items():
        result |= {
            f"{key}_f{f}": arm[key]
            for key in ("fid", "kid_x1000", "rfid", "psnr", "train_speed", "sample_speed", "steps")
        }
    return result


def measure_l3(seed: int, budget: Budget) -> dict[str, float]:
    """Five first stages of f = 4 that differ in one option each."""
    from ldm import experiments as x

    arms: dict[str, dict[str, Any]] = {
        "mild": {},
        "strong": {"kl_weight": 0.1},
        "gan": {"perceptual": 0.3, "disc_weight": 0.5, "disc_start": 200, "disc_width": 16},
        "vq1024": {"kind": "vq", "n_embed": 1024},
        "vq16": {"kind": "vq", "n_embed": 16},
    }
    result: dict[str, float] = {}
    base = x.base_config("unconditional", EMOJI, 4, 4, seed)
    task = x.open_task(base)
    real = task.reference.columns["image"][: budget.images]
    for name, options in arms.items():
        config = dataclasses.replace(base, first_stage=dataclasses.replace(base.first_stage, **options))
        stage, notes = x.autoencoder(config, x.in_memory(task.train), budget.seconds)
        result |= {f"{key}_{name}": value for key, value in x.reconstruction(stage, real).items()}
        result[f"steps_{name}"] = notes["ae_steps"]
        if seed == 0:
            from ldm.first_stage import reconstruct

            keep_samples(f"first_stage_{name}", reconstruct(stage, real[:32]))
    return {
        "psnr_gain_mild_kl": result["psnr_mild"] - result["psnr_strong"],
        "rfid_drop_gan": result["rfid_mild"] - result["rfid_gan"],
        "psnr_loss_gan": result["psnr_mild"] - result["psnr_gan"],
        "psnr_gain_codebook": result["psnr_vq1024"] - result["psnr_vq16"],
        **result,
    }


def emoji_first_stage(**options: Any) -> tuple[FirstStage, Any]:
    """A first stage of f = 4 on emoji, trained once per tier and reused by every seed of L4, L6 and L7.

    The paper's economy: one first stage serves many denoisers, so its cost is not counted in theirs (L1 and L2 do
    count it). Weights and cost stay in the working folder.
    """
    from safetensors.torch import load_file, save_file

    from common.files import write_atomically
    from ldm import experiments as x
    from ldm.first_stage import build_first_stage, freeze

    seconds = STAGE_SECONDS
    config = x.base_config("unconditional", EMOJI, 4, 4, 0)
    config.first_stage = dataclasses.replace(config.first_stage, **options)
    name = "-".join(f"{key}_{value}" for key, value in sorted(options.items())) or "kl"
    store = working_folder() / f"stage-{name}-{seconds:g}s.safetensors"
    if not store.is_file():
        task = x.open_task(config)
        stage, notes = x.autoencoder(config, x.in_memory(task.train), seconds)
        real = task.reference.columns["image"][:600]
        write_atomically(store, lambda path: save_file(stage.state_dict(), path))
        save_json(store.with_suffix(".json"), {**notes, **x.reconstruction(stage, real)})
    stage = build_first_stage(config.first_stage, EMOJI.size)
    stage.load_state_dict(load_file(store))
    return freeze(stage), config.first_stage


def measure_l4(seed: int, budget: Budget) -> dict[str, float]:
    """Class-conditional EmojiGroups at three guidance scales; the classifier is a probe on the judge's features."""
    from sklearn.linear_model import LogisticRegression

    from ldm import experiments as x

    stage, first = emoji_first_stage()
    config = x.base_config(
        "class", DataConfig(name="emoji_groups", size=32, eval_images=1000), 4, 4, seed, first_stage=first
    )
    task = x.open_task(config)
    arm = x.train_denoiser(config, task, stage, budget.seconds)
    train = x.in_memory(task.train).columns
    train_images, train_labels = train["image"][:2000], train["label"][:2000]
    probe = LogisticRegression(max_iter=300, C=0.1)
    features = x.real_features(train_images)
    mean, spread = features.mean(0), features.std(0) + 1e-6
    probe.fit(((features - mean) / spread).numpy(), train_labels.numpy())
    real = task.reference.columns["image"][: budget.images]
    labels = task.reference.columns["label"][: budget.images].numpy()
    result: dict[str, float] = {}
    for scale, name in ((1.0, "1"), (1.5, "1p5"), (3.0, "3")):
        fake, _ = arm.samples(budget.images, guidance=scale)
        found = x.extract(fake, x.judge())
        accuracy = float((probe.predict(((found - mean) / spread).numpy()) == labels).mean())
        result |= {f"{key}_{name}": value for key, value in x.distances(fake, real).items()}
        result[f"accuracy_{name}"] = accuracy
        if seed == 0:
            keep_samples(f"class_guidance_{name}", fake[:32])
    result["accuracy_real"] = float((probe.predict(((x.real_features(real) - mean) / spread).numpy()) == labels).mean())
    return {
        "accuracy_gain": result["accuracy_3"] - result["accuracy_1"],
        "precision_gain": result["precision_3"] - result["precision_1"],
        "recall_drop": result["recall_1"] - result["recall_3"],
        "fid_gain_1p5": result["fid_1"] - result["fid_1p5"],
        **result,
    }


def measure_l5(seed: int, budget: Budget) -> dict[str, float]:
    """Layout tokens on 3x3 grids, and captions; both on the committed Shapes autoencoder."""
    import numpy as np
    import torch

    from common.data.shapes_verifier import colour_in_boxes
    from common.images import to_unit
    from ldm import experiments as x

    stage, first = x.shapes_first_stage()
    data = DataConfig(name="shapes", size=32, train_images=12000, eval_images=600, tasks=["grid3"])
    config = x.base_config("layout", data, 4, 8, seed, first_stage=first)
    task = x.open_task(config)
    arm = x.train_denoiser(config, task, stage, budget.seconds)
    columns = task.reference.columns
    fake, _ = arm.samples(budget.images, guidance=2.0)
    colours = columns["colours"][: budget.images].numpy()
    boxes = columns["boxes"][: budget.images].numpy()
    inside = colour_in_boxes(fake, boxes, colours)
    shuffled = colour_in_boxes(fake.roll(1, 0), boxes, colours)
    if seed == 0:
        from ldm.sample import draw_boxes

        keep_samples(
            "layout",
            torch.stack([draw_boxes(columns["boxes"][:16], columns["classes"][:16], 32), fake[:16]], 1).flatten(0, 1),
        )
    data = DataConfig(name="shapes", size=32, train_images=12000, eval_images=600)
    text_config = x.base_config("text", data, 4, 8, seed, first_stage=first)
    text = x.open_task(text_config)
    model = x.train_denoiser(text_config, text, stage, budget.seconds)
    reference = text.reference.columns
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        z = model.ldm.encode(to_unit(reference["image"]), torch.zeros(len(reference["image"]), 8, 8, 8))
        t = torch.randint(300, 900, (len(z),), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        losses = []
        for shift in (0, 1):
            tokens = reference["tokens"][:, 0].roll(shift, 0)
            losses.append(float(model.ldm.loss(z, t, noise, model.ldm.conditioning({"condition": tokens}))[0]))
    return {
        "colour_in_box": float(np.nanmean(inside)),
        "colour_in_box_shuffled": float(np.nanmean(shuffled)),
        "wrong_caption_penalty": losses[1] / losses[0] - 1,
        "loss_right_caption": losses[0],
        "layout_steps": float(arm.steps),
        "text_steps": float(model.steps),
    }


def measure_l6(seed: int, budget: Budget) -> dict[str, float]:
    """x4 super-resolution: latent diffusion, regression, pixel diffusion."""
    from common.metrics.image import psnr, ssim
    from ldm import experiments as x

    stage, first = emoji_first_stage()
    images: dict[str, Any] = {}
    config = x.base_config("superres", EMOJI, 4, 4, seed, first_stage=first)
    task = x.open_task(config)
    real = task.reference.columns["image"][: budget.images]
    arm = x.train_denoiser(config, task, stage, budget.seconds)
    images["latent"], _ = arm.samples(budget.images)
    pixel_config = x.base_config("superres", EMOJI, 1, 3, seed)
    pixel_task = x.open_task(pixel_config)
    pixel = x.train_denoiser(pixel_config, pixel_task, x.IdentityFirstStage(), budget.seconds)
    images["pixel"], _ = pixel.samples(budget.images)
    network = x.train_regression(config, task, budget.seconds)
    images["regression"] = x.regress(network, task.reference.columns["low"][: budget.images], 32)
    result: dict[str, float] = {}
    for name, fake in images.items():
        result |= {
            f"{key}_{name}": value for key, value in x.distances(fake, real).items() if key in ("fid", "kid_x1000")
        }
        result[f"psnr_{name}"] = float(psnr(fake, real).mean())
        result[f"ssim_{name}"] = float(ssim(fake, real).mean())
        if seed == 0:
            keep_samples(f"superres_{name}", fake[:32])
    if seed == 0:
        keep_samples("superres_truth", real[:32])
    return {
        "fid_gain_over_regression": result["fid_regression"] - result["fid_latent"],
        "fid_gain_over_pixel": result["fid_pixel"] - result["fid_latent"],
        "psnr_regression_gain": result["psnr_regression"] - result["psnr_latent"],
        "ssim_regression_gain": result["ssim_regression"] - result["ssim_latent"],
        **result,
    }


def measure_l7(seed: int, budget: Budget) -> dict[str, float]:
    """Inpainting on pixels and in three latent spaces: KL, VQ, attention-free VQ."""
    from ldm import experiments as x

    spaces: dict[str, dict[str, Any] | None] = {
        "pixel": None,
        "kl": {},
        "vq": {"attention": True, "kind": "vq", "n_embed": 1024},
        "vq_noattn": {"kind": "vq", "n_embed": 1024},
    }
    result: dict[str, float] = {}
    for name, options in spaces.items():
        if options is None:
            config = x.base_config("inpaint", EMOJI, 1, 3, seed)
            stage = x.IdentityFirstStage()
        else:
            stage, first = emoji_first_stage(**options)  # type: ignore[assignment]
            config = x.base_config("inpaint", EMOJI, 4, 4, seed, first_stage=first)
        task = x.open_task(config)
        arm: Arm = x.train_denoiser(config, task, stage, budget.seconds)
        fake, speed = arm.samples(budget.images)
        real = task.reference.columns["image"][: budget.images]
        result |= {
            f"{key}_{name}": value for key, value in x.distances(fake, real).items() if key in ("fid", "kid_x1000")
        }
        result |= {f"train_speed_{name}": arm.images_per_second, f"sample_speed_{name}": speed}
        if seed == 0:
            keep_samples(f"inpaint_{name}", fake[:32])
    return {
        "train_speedup": result["train_speed_kl"] / result["train_speed_pixel"],
        "sampling_speedup": result["sample_speed_kl"] / result["sample_speed_pixel"],
        "fid_ratio": result["fid_pixel"] / result["fid_kl"],
        "noattn_fid_ratio": result["fid_vq_noattn"] / result["fid_vq"],
        **result,
    }


def measure_l8(seed: int, budget: Budget) -> dict[str, float]:
    """Semantic synthesis at 1x and 2x the training size, with rescaled and with raw latents."""
    import torch
    import torch.nn.functional as F

    from ldm import experiments as x
    from ldm.sample import draw

    stage, first = x.shapes_first_stage()
    data = DataConfig(name="shapes", size=32, train_images=12000, eval_images=600)
    result: dict[str, float] = {}
    for name, rescaled in (("rescaled", True), ("raw", False)):
        config = x.base_config("semantic", data, 4, 8, seed, first_stage=first)
        config.diffusion = dataclasses.replace(config.diffusion, scale_by_std=rescaled)
        task = x.open_task(config)
        arm = x.train_denoiser(config, task, stage, budget.seconds)
        maps = task.reference.columns["label_map"]
        count = budget.images
        fake, _ = arm.samples(count)
        result[f"agreement_1x_{name}"] = agreement(fake, maps[:count])
        # Four training-size maps side by side make one map of twice the size.
        tiles = maps[: count // 4 * 4].reshape(-1, 2, 2, 32, 32)
        large = tiles.permute(0, 1, 3, 2, 4).reshape(-1, 64, 64)
        images = draw(arm.ldm, "semantic", {"label_map": large}, len(large), (64, 64), config.sampling, seed=2)
        result[f"agreement_2x_{name}"] = agreement(images, large)
        result[f"latent_std_{name}"] = float(1 / arm.ldm.scale_factor)
        if seed == 0:
            shown = F.interpolate((large[:8, None] > 0).float() * 255, 64).expand(-1, 3, -1, -1).to(torch.uint8)
            keep_samples(f"semantic_2x_{name}", torch.stack([shown, images[:8]], 1).flatten(0, 1), columns=8)
    return {
        "agreement_ratio": result["agreement_2x_rescaled"] / result["agreement_1x_rescaled"],
        "rescaled_gain": result["agreement_2x_rescaled"] - result["agreement_2x_raw"],
        **result,
    }


def agreement(images: Any, maps: Any) -> float:
    """Intersection over union of the drawn objects with the map's (mean over images)."""
    from ldm.experiments import foreground

    drawn, wanted = foreground(images), maps > 0
    union = (drawn | wanted).sum((1, 2)).clamp(min=1)
    return float(((drawn & wanted).sum((1, 2)) / union).mean())


MEASURES: dict[str, Callable[[int, Budget], dict[str, float]]] = {
    "L1": measure_l1,
    "L2": measure_l2,
    "L3": measure_l3,
    "L4": measure_l4,
    "L5": measure_l5,
    "L6": measure_l6,
    "L7": measure_l7,
    "L8": measure_l8,
}

_folder = REPOSITORY / "runs" / "reproduce" / "ldm-small"


def working_folder() -> Path:
    """Where finished pieces of this tier are kept."""
    _folder.mkdir(parents=True, exist_ok=True)
    return _folder


def save_json(path: Path, content: Any) -> None:
    from common.files import write_json

    write_json(path, content)


def keep_samples(name: str, images: Any, columns: int = 16) -> None:
    """A grid of the first seed's samples, into results/figures/ldm/ (small tier) or the working folder."""
    from common.images import save_grid

    folder = FIGURES if "small" in _folder.name else _folder
    save_grid(images, folder / f"{name}.png", columns=columns, tile=64)


def reproduce(tier: Tier, names: list[str], output: Path) -> list[dict[str, Any]]:
    """Measure the named claims over the tier's seeds and write the ledger after each claim."""
    import torch

    global _folder
    _folder = REPOSITORY / "runs" / "reproduce" / f"ldm-{tier}"
    torch.set_num_threads(1)  # budgets are CPU seconds: one thread makes them seconds of work
    known = claims(tier)
    records = measure_claims(
        [known[name] for name in names],
        lambda _: SEEDS[tier],
        lambda name, seed: MEASURES[name](seed, BUDGETS[tier][name]),
        working_folder(),
        output,
    )
    if tier == "small":
        from ldm.figures import draw_figures

        draw_figures(output, FIGURES)
    return records


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options_parser("ldm", __doc__)
    options = parser.parse_args(argv)
    names = chosen_claims(options, list(BUDGETS[options.tier]))
    return reproduce(options.tier, names, ledger_path(options, "ldm"))


if __name__ == "__main__":
    run_main(main)
