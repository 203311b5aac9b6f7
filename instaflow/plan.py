"""What a run costs, worked out before it starts: U-Net forward-equivalents, FLOP and GPU-days of every stage.

    make instaflow-plan                                   the published schedule, beside the paper's 199.2 A100 days
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

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.cli import parse_config
from common.errors import UserError, run_main
from instaflow.config import InstaFlowConfig

CONFIGS = Path(__file__).parent / "configs"
GPUS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}  # peak TFLOP/s in bf16, dense
UTILISATION = 0.4
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


@lru_cache(maxsize=4)
def costs(teacher: str) -> tuple[float, float]:
    """(FLOP of one U-Net forward, FLOP of decoding one latent): of a teacher directory, or of Stable Diffusion 1.5."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from instaflow.student import stable_diffusion_unet

    folder, tokens = Path(teacher), 77
    with torch.device("meta"):
        if (folder / "unet" / "config.json").is_file():
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
            tokens = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
        else:
            unet = stable_diffusion_unet()
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                sample_size=512,
            )
        side = unet.config.sample_size
        latent = torch.empty(1, unet.config.in_channels, side, side)
        states = torch.empty(1, tokens, unet.config.cross_attention_dim)
        found = []
        for run in (lambda: unet(latent, torch.zeros(1), states), lambda: vae.decode(latent)):
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                run()
            found.append(float(counter.get_total_flops()))
    return found[0], found[1]


def plan(config: InstaFlowConfig, gpu: str = "a100", utilisation: float = UTILISATION) -> list[Stage]:
    """Every stage of a run, in order.

    Raises:
        UserError: an unknown GPU, or a utilisation outside (0, 1].
    """
    if gpu not in GPUS or not 0 < utilisation <= 1:
        raise UserError(f"--gpu {gpu} --utilisation {utilisation}: know {', '.join(GPUS)}, and a fraction above 0")
    unet_flop, decoder_flop = costs(config.teacher)
    guided = 2 if config.pairs.guidance > 1 else 1
    flow_guided = 2 if config.distil.alpha > 1 else 1
    width = 1 if config.student.stack == "none" else 2
    own = config.pairs.steps * guided
    online = own if config.pairs.online else 0
    lines: list[tuple[str, int, float, int]] = []
    direct = config.reflow.rounds == 0
    first = config.pairs.count if not config.pairs.online else 0
    if first:
        lines.append(("pairs", first, own, 0))
    for number in range(1, config.reflow.rounds + 1):
        if number > 1 and not config.pairs.online:
            flow = config.distil.teacher_steps * flow_guided
            lines.append((f"pairs of {number}-RF", config.pairs.count, flow, 0))
        lines.append((f"reflow {number}", config.reflow.steps * config.reflow.batch_size, TRAIN_STEP + online, 0))
        if (then := config.reflow.then) is not None:
            lines.append((f"reflow {number}, then", then.steps * then.batch_size, TRAIN_STEP + online, 0))
    if not direct:
        flow = config.distil.teacher_steps * flow_guided
        lines.append((f"pairs of {config.reflow.rounds + 1}-RF", config.distil.pairs, flow, 0))
    lines.append(("distil", config.distil.steps * config.distil.batch_size, TRAIN_STEP * width, 0))
    if config.perceptual.steps:
        lines.append(
            ("perceptual", config.perceptual.steps * config.perceptual.batch_size, TRAIN_STEP * width, TRAIN_STEP)
        )
    # The paper's days belong to its own schedule.
    published = (config.reflow.steps, config.distil.steps, config.perceptual.steps) == (70_000, 21_500, 18_000)
    stages = []
    for name, samples, forwards, decodes in lines:
        flop = samples * (forwards * unet_flop + decodes * decoder_flop)
        days = PAPER_DAYS.get(name) if published else None
        stages.append(
            Stage(
                name,
                samples,
                forwards,
                decodes,
                flop,
                flop / (GPUS[gpu] * 1e12 * utilisation) / 86400,
                days,
                flop / (days * 86400) / 1e12 if days else None,
            )
        )
    return stages


def table(stages: Sequence[Stage], gpu: str, gpus: int, utilisation: float) -> str:
    """The plan as aligned text."""
    head = ["stage", "samples", "forwards", "total M", "PFLOP", f"{gpu}-days", "paper's A100-days", "means TFLOP/s"]
    rows = [head]
    for stage in stages:
        rows.append(
            [
                stage.name,
                f"{stage.samples:,}",
                f"{stage.forwards:g}" + (f" + {stage.decoder_forwards} decodes" if stage.decoder_forwards else ""),
                f"{stage.samples * stage.forwards / 1e6:,.1f}",
                f"{stage.flop / 1e15:,.4g}",
                f"{stage.gpu_days:,.2g}",
                "-" if stage.paper_days is None else f"{stage.paper_days:g}",
                "-" if stage.paper_tflops is None else f"{stage.paper_tflops:.0f}",
            ]
        )
    paper = [stage.paper_days for stage in stages if stage.paper_days is not None]
    days = sum(stage.gpu_days for stage in stages)
    total = sum(stage.samples * stage.forwards for stage in stages) / 1e6
    flop = sum(stage.flop for stage in stages) / 1e15
    paper_total = f"{sum(paper):.1f}" if paper else "-"
    rows.append(["all", "", "", f"{total:,.1f}", f"{flop:,.4g}", f"{days:,.2g}", paper_total, ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    wall = f"{days / gpus:.2g} days on {gpus} x {gpu} at {utilisation:.0%} of {GPUS[gpu]:g} TFLOP/s"
    return "\n".join([*lines, f"wall clock: {wall}"])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "paper.yaml")
    parser.add_argument("--teacher", help="a diffusers directory (default: the config's; absent: Stable Diffusion 1.5)")
    parser.add_argument("--gpu", default="a100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="fraction of the peak that is reached")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(argv)
    given = ["--config", str(options.config)] + (["--teacher", options.teacher] if options.teacher else [])
    config, _ = parse_config(InstaFlowConfig, None, "", given)
    stages = plan(config, options.gpu, options.utilisation)
    records = [asdict(stage) for stage in stages]
    if options.json:
        print(json.dumps(records, indent=2))
    else:
        print(table(stages, options.gpu, options.gpus, options.utilisation))
    return records


if __name__ == "__main__":
    run_main(main)
