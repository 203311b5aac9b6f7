"""What a run costs, worked out before it starts: U-Net forward-equivalents, FLOP and GPU-days of every stage.

    make instaflow-plan  # the published schedule, beside the paper's 199.2 A100 days
    python instaflow/plan.py --gpu h100 --gpus 8 --utilisation 0.5
    python instaflow/plan.py --config instaflow/configs/small.yaml --teacher ldm/pretrained/shapes32-v

Columns
  samples     pairs made, or batch x iterations
  forwards    U-Net forward-equivalents a sample: solver steps (twice with guidance), 3 for a training step
  total       samples x forwards, in millions
  PFLOP       that times the U-Net's forward (2 FLOP per multiply-add), plus the decoder's share of the perceptual stage
              (target forward, student forward and its gradient with respect to the latent: 3 forwards)
  GPU-days    PFLOP / (peak x utilisation)
  paper       its A100 days (model card), and the FLOP/s on one A100 that these mean

Nothing is allocated: the networks are built on the meta device. Text encoding and data loading are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import costs
from common.errors import run_main
from common.files import read_object
from instaflow.config import InstaFlowConfig

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = costs.Cluster("a100", 8, 0.4)
# Model card of instaflow_0_9B_from_sd_1_5: 199.2 A100 days in all, 16 of them for both pair sets (200k pairs a day).
PAPER_DAYS = {
    "pairs": 8.0,
    "reflow 1": 11.2,
    "reflow 1, then": 64.0,
    "pairs of 2-RF": 8.0,
    "distil": 54.4,
    "perceptual": 53.6,
}
TRAIN_STEP = 3  # forward and backward


@dataclass(frozen=True)
class Stage:
    """One line of the plan."""

    name: str
    samples: int
    forwards: float
    decoder_forwards: int
    flop: float
    gpu_days: float
    paper_days: float | None
    paper_tflops: float | None


@cache
def forward_flop(teacher: str) -> tuple[int, int]:
    """(FLOP of one U-Net forward, FLOP of decoding one latent): of a teacher directory, or of Stable Diffusion 1.5."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from common.stable_diffusion import stable_diffusion_unet, stable_diffusion_vae

    folder, tokens = Path(teacher), 77
    with torch.device("meta"), torch.no_grad():
        if (folder / "unet" / "config.json").is_file():
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
            tokens = read_object(folder / "tokenizer" / "tokenizer_config.json", kinds={"model_max_length": int})[
                "model_max_length"
            ]
        else:
            unet, vae = stable_diffusion_unet(), stable_diffusion_vae()
        side = unet.config.sample_size
        latent = torch.empty(1, unet.config.in_channels, side, side)
        states = torch.empty(1, tokens, unet.config.cross_attention_dim)
        return costs.flop(lambda: unet(latent, torch.zeros(1), states)), costs.flop(lambda: vae.decode(latent))


def schedule(config: InstaFlowConfig) -> list[tuple[str, int, float, int]]:
    """(stage, samples, U-Net forwards a sample, decoder forwards a sample) in the order of the run."""
    reflow, distil, perceptual, pairs = config.reflow, config.distil, config.perceptual, config.pairs
    own = pairs.steps * (2 if pairs.guidance > 1 else 1)
    flow = distil.teacher_steps * (2 if distil.alpha > 1 else 1)
    fit = TRAIN_STEP + (own if pairs.online else 0)
    student = TRAIN_STEP * (1 if config.student.stack == "none" else 2)
    lines: list[tuple[str, int, float, int]] = [] if pairs.online else [("pairs", pairs.count, own, 0)]
    for number in range(1, reflow.rounds + 1):
        if number > 1 and not pairs.online:
            lines.append((f"pairs of {number}-RF", pairs.count, flow, 0))
        lines.append((f"reflow {number}", reflow.steps * reflow.batch_size, fit, 0))
        if (then := reflow.then) is not None:
            lines.append((f"reflow {number}, then", then.steps * then.batch_size, fit, 0))
    if reflow.rounds:
        lines.append((f"pairs of {reflow.rounds + 1}-RF", distil.pairs, flow, 0))
    lines.append(("distil", distil.steps * distil.batch_size, student, 0))
    if perceptual.steps:
        lines.append(("perceptual", perceptual.steps * perceptual.batch_size, student, TRAIN_STEP))
    return lines


def plan(config: InstaFlowConfig, cluster: costs.Cluster = DEFAULT) -> list[Stage]:
    """Every stage of a run, in order."""
    unet_flop, decoder_flop = forward_flop(config.teacher)
    # The paper's days belong to its own schedule.
    published = (config.reflow.steps, config.distil.steps, config.perceptual.steps) == (70_000, 21_500, 18_000)
    stages = []
    for name, samples, forwards, decodes in schedule(config):
        flop = float(samples) * (forwards * unet_flop + decodes * decoder_flop)
        days = PAPER_DAYS.get(name) if published else None
        implied = flop / (days * 86400) / 1e12 if days else None
        stages.append(Stage(name, samples, forwards, decodes, flop, cluster.gpu_days(flop), days, implied))
    return stages


def table(stages: Sequence[Stage], cluster: costs.Cluster) -> str:
    """The plan as aligned text."""
    head = f"stage|samples|forwards|total M|PFLOP|{cluster.gpu}-days|paper's A100-days|means TFLOP/s"
    rows = [
        [
            stage.name,
            f"{stage.samples:,}",
            f"{stage.forwards:g}" + (f" + {stage.decoder_forwards} decodes" if stage.decoder_forwards else ""),
            f"{stage.samples * stage.forwards / 1e6:,.1f}",
            f"{stage.flop / 1e15:,.4g}",
            f"{stage.gpu_days:,.2g}",
            "-" if stage.paper_days is None else f"{stage.paper_days:g}",
            costs.number(stage.paper_tflops, 0),
        ]
        for stage in stages
    ]
    paper = [stage.paper_days for stage in stages if stage.paper_days is not None]
    days = sum(stage.gpu_days for stage in stages)
    total = sum(stage.samples * stage.forwards for stage in stages) / 1e6
    flop = sum(stage.flop for stage in stages) / 1e15
    paper_total = costs.number(sum(paper) if paper else None)
    rows.append(["all", "", "", f"{total:,.1f}", f"{flop:,.4g}", f"{days:,.2g}", paper_total, ""])
    wall = f"wall clock: {days / cluster.gpus:.2g} days on {cluster.describe()}"
    return costs.aligned([head.split("|"), *rows]) + "\n" + wall


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    config, cluster, as_json = costs.plan_options(__doc__, DEFAULT, InstaFlowConfig, CONFIGS / "paper.yaml", argv)
    stages = plan(config, cluster)
    costs.show(stages, table(stages, cluster), as_json)
    return [asdict(stage) for stage in stages]


if __name__ == "__main__":
    run_main(main)
