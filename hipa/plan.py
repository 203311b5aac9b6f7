"""What a run costs, worked out before it starts: parameters, U-Net evaluations, FLOP, memory and GPU-days.

    make hipa-plan                                        # the published scale, beside the paper's 3.8 A100 days
    python hipa/plan.py --gpu h100 --gpus 8 --utilisation 0.5
    python hipa/plan.py --config hipa/configs/small.yaml --teacher ldm/pretrained/shapes32-v

A pair costs the solver's steps, twice with guidance; a sample of the training 3 U-Net forwards and 3 of the decoder
(its own forward and backward, and the target's forward; 4 where the decoder is run twice). Frozen weights get no
gradient, so that a backward counts for less: the plan is an upper bound. Progressive distillation stands beside it as
the paper gives it: nine halvings of Stable Diffusion, a whole U-Net each. Nothing is allocated: the networks are built
on the meta device. Text encoding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common import costs
from common.errors import run_main
from common.files import read_object
from common.stable_diffusion import stable_diffusion_unet, stable_diffusion_vae
from hipa.config import PLACEMENTS, HipaConfig

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = costs.Cluster("a100", 4, 0.4)
PAPER_DAYS, PROGRESSIVE_DAYS = 3.8, 108.8  # A100 days, abstract
ROUNDS = 9  # halvings from 512 steps to 1
TRAIN_STEP, DECODES = 3, 3
BYTES = 4  # of a float32 number
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}


@dataclass(frozen=True)
class Stage:
    """One line of the plan. Gigabytes are those of weights, gradients and AdamW, without activations."""

    name: str
    trained: int
    samples: int
    forwards: int
    pflop: float
    weights_gb: float
    gpu_days: float
    paper_days: float | None


def networks(teacher: str) -> tuple[Any, Any, int]:
    """(U-Net, autoencoder, text tokens) on the meta device; Stable Diffusion 2.1 where no folder is."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = Path(teacher)
    with torch.device("meta"):
        if not (folder / "unet" / "config.json").is_file():
            return stable_diffusion_unet(**SD21), stable_diffusion_vae(), 77
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    tokenizer = read_object(folder / "tokenizer" / "tokenizer_config.json", kinds={"model_max_length": int})
    return unet, vae, tokenizer["model_max_length"]


def plan(config: HipaConfig, cluster: costs.Cluster = DEFAULT) -> list[Stage]:
    """Pairs, the adaptor, and progressive distillation as the paper gives it."""
    from common.adaptors import add_adaptors

    unet, vae, tokens = networks(config.teacher)
    side, whole = unet.config.sample_size, costs.parameter_count(unet)
    with torch.device("meta"), torch.no_grad():
        latent = torch.empty(1, unet.config.in_channels, side, side)
        states = torch.empty(1, tokens, unet.config.cross_attention_dim)
        forward = costs.flop(lambda: unet(latent, torch.zeros(1), states))
        decode = costs.flop(lambda: vae.decode(latent[:, : unet.config.out_channels]))
        if config.adaptor.placement != "full":
            add_adaptors(unet, PLACEMENTS[config.adaptor.placement], config.adaptor.rank)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    pairs, trainer = config.pairs, config.trainer
    solver = pairs.steps * (2 if pairs.guidance > 1 else 1)
    samples = trainer.max_steps * trainer.batch_size
    decodes = 0 if config.loss.space == "latents" else DECODES + config.loss.recompute
    weights = BYTES * (whole + 3 * trained) / 1e9  # the frozen U-Net; gradient and two moments of what is trained
    published = not (Path(config.teacher) / "unet").is_dir()
    stages = []
    if pairs.target == "teacher":
        flop = float(pairs.count) * (solver * forward)
        frozen = BYTES * whole / 1e9
        stages.append(Stage("pairs", 0, pairs.count, solver, flop / 1e15, frozen, cluster.gpu_days(flop), None))
    flop = float(samples) * (TRAIN_STEP * forward + decodes * decode)
    stages.append(
        Stage(
            "adaptor",
            trained,
            samples,
            TRAIN_STEP,
            flop / 1e15,
            weights,
            cluster.gpu_days(flop),
            PAPER_DAYS if published else None,
        )
    )
    if published:
        progressive = BYTES * 5 * whole / 1e9  # teacher, student, gradient, two moments
        stages.append(Stage("progressive distillation", ROUNDS * whole, 0, 0, 0.0, progressive, 0.0, PROGRESSIVE_DAYS))
    return stages


def table(stages: Sequence[Stage], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"stage|trained|samples|U-Net forwards|PFLOP|weights GB|{cluster.gpu}-days|paper's A100-days"
    rows = [
        [
            line.name,
            f"{line.trained:,}",
            f"{line.samples:,}" if line.samples else "-",
            f"{line.forwards}" if line.samples else "-",
            f"{line.pflop:,.4g}" if line.samples else "-",
            f"{line.weights_gb:.3g}",
            f"{line.gpu_days:,.2g}" if line.samples else "-",
            costs.number(line.paper_days),
        ]
        for line in stages
    ]
    return costs.aligned([head.split("|"), *rows]) + f"\n{cluster.describe()}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    config, cluster, as_json = costs.plan_options(__doc__, DEFAULT, HipaConfig, CONFIGS / "paper.yaml", argv)
    stages = plan(config, cluster)
    costs.show(stages, table(stages, cluster), as_json)
    return [asdict(line) for line in stages]


if __name__ == "__main__":
    run_main(main)
