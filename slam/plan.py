"""What a run costs, worked out before it starts: U-Net forward-equivalents, FLOP, memory and GPU-days.

    make slam-plan                                        # the published recipe, beside the paper's 6 A100 days
    python slam/plan.py --gpu h100 --gpus 8 --utilisation 0.5
    python slam/plan.py --config slam/configs/small.yaml --teacher ldm/pretrained/shapes32-v

A sample costs 2 forwards of the teacher, 1 of the averaged student and 3 for the student's step. Nothing is allocated:
the networks are built on the meta device. Text encoding and the latents (once) are left out.
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
from common.stable_diffusion import stable_diffusion_unet
from slam.config import SlamConfig

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = costs.Cluster("a100", 4, 0.4)
PAPER_DAYS = 6.0  # A100 days, abstract
FORWARDS = 2 + 1 + 3
BYTES = 4  # of a float32 number


@dataclass(frozen=True)
class Plan:
    """One student. Gigabytes are those of weights, averages, gradients and AdamW, without activations."""

    student: str
    parameters: int
    trained: int
    samples: int
    forwards: int
    pflop: float
    weights_gb: float
    gpu_days: float
    paper_days: float | None


def networks(teacher: str, width: int) -> tuple[Any, Any, int]:
    """(teacher's U-Net, student's U-Net, text tokens) on the meta device; Stable Diffusion 1.5 where no folder is."""
    from diffusers import UNet2DConditionModel

    folder, tokens = Path(teacher), 77
    with torch.device("meta"):
        if (folder / "unet" / "config.json").is_file():
            config = UNet2DConditionModel.load_config(folder / "unet")
            pair = [UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": w}) for w in (None, width)]
            tokenizer = read_object(folder / "tokenizer" / "tokenizer_config.json", kinds={"model_max_length": int})
            tokens = tokenizer["model_max_length"]
        else:
            pair = [stable_diffusion_unet(), stable_diffusion_unet(time_cond_proj_dim=width)]
    return pair[0], pair[1], tokens


def plan(config: SlamConfig, cluster: costs.Cluster = DEFAULT) -> list[Plan]:
    """The students of a run."""
    from common.adaptors import add_adaptors

    before, after, tokens = networks(config.teacher, config.student.embedding_width)
    side = before.config.sample_size
    with torch.device("meta"), torch.no_grad():
        latent = torch.empty(1, before.config.in_channels, side, side)
        states = torch.empty(1, tokens, before.config.cross_attention_dim)
        flop = costs.flop(lambda: before(latent, torch.zeros(1), states))
    whole = costs.parameter_count(after)
    trained = whole
    if config.student.kind == "lora":
        with torch.device("meta"):
            add_adaptors(before, config.student.targets, config.student.rank)
        trained = sum(p.numel() for p in before.parameters() if p.requires_grad)
        whole = costs.parameter_count(before)
    samples = config.trainer.max_steps * config.trainer.batch_size
    total = float(samples) * FORWARDS * flop
    weights = BYTES * (2 * whole + 4 * trained) / 1e9  # teacher and student; average, gradient, two moments
    published = (config.trainer.max_steps, config.student.kind) == (80_000, "full")
    names = ["SLAM", "LCM"] if config.baseline else ["SLAM"]
    return [
        Plan(
            name,
            whole,
            trained,
            samples,
            FORWARDS,
            total / 1e15,
            weights,
            cluster.gpu_days(total),
            PAPER_DAYS if published and name == "SLAM" else None,
        )
        for name in names
    ]


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"student|parameters|trained|samples|forwards|PFLOP|weights GB|{cluster.gpu}-days|paper's A100-days"
    rows = [
        [
            line.student,
            f"{line.parameters:,}",
            f"{line.trained:,}",
            f"{line.samples:,}",
            str(line.forwards),
            f"{line.pflop:,.4g}",
            f"{line.weights_gb:.3g}",
            f"{line.gpu_days:,.2g}",
            "-" if line.paper_days is None else f"{line.paper_days:g}",
        ]
        for line in plans
    ]
    return costs.aligned([head.split("|"), *rows]) + f"\n{cluster.describe()}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    config, cluster, as_json = costs.plan_options(__doc__, DEFAULT, SlamConfig, CONFIGS / "paper.yaml", argv)
    plans = plan(config, cluster)
    costs.show(plans, table(plans, cluster), as_json)
    return [asdict(line) for line in plans]


if __name__ == "__main__":
    run_main(main)
