"""What the paper's training costs, stage by stage, on a named cluster; needs no GPU and no memory.

    make pixart-plan                                      the table, for 64 x A100
    python pixart/plan.py --gpu h100 --gpus 16 --strategy deepspeed
    python pixart/plan.py --json stage2 stage3c

The stages are the files that would run, pixart/configs/paper/stage*.yaml. Columns:
  params M         trained parameters; stage 1 is the class-conditional DiT
  GFLOP/img        forward of one image with its whole caption (2 FLOP a multiply-add)
  TFLOP/step       three forwards (forward and backward) of the global batch
  GB/GPU           state (20 bytes a parameter: float32 weights, gradients, AdamW moments and average, shared out as the
                   strategy does) and the activations of the GPU's share of the batch in bfloat16. "+ckpt": activations
                   only fit when each block is computed again in the backward pass; a third more work. "x N": so many
                   micro-batches a step
  GPU-days         work / (peak x utilisation)
  A100-days        the paper's: its V100 days (table 4) / 2.2, the ratio behind its 753 A100 days (table 2)
  implied          TFLOP/s a V100 that the paper's days mean
Features of images and captions are extracted beforehand and not counted, as in the paper. Below the table: money and
CO2 at the stated price, power and carbon intensity, beside the paper's 753 A100 days and $28,400.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path[0:0] = [] if __package__ else [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_main
from pixart.config import PixArtConfig
from pixart.model import FREQUENCIES, DiT, PixArt

CONFIGS = Path(__file__).resolve().parent / "configs"
STAGES = CONFIGS / "paper"
CLUSTERS = CONFIGS / "cluster"

# Table 4.
V100_DAYS = {"stage1": 88, "stage2": 672, "stage3a": 416, "stage3b": 320, "stage3c": 160}
# Table 2 and the abstract (ICLR version): 1656 V100 days count as 753 A100 days, which cost $28,400.
A100_DAYS, V100_PER_A100, DOLLARS = 753, 2.2, 28_400
# Abstract: Stable Diffusion v1.5.
SD_A100_DAYS, SD_DOLLARS = 6_250, 320_000

CAPTION_CHANNELS = 4096  # T5-XXL
CODEC_FACTOR = 8
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Gpu:
    """Memory in GB, dense half-precision peak in TFLOP/s and board power in watts (the makers' data sheets)."""

    memory_gb: float
    peak_tflops: float
    watts: float


GPUS = {
    "v100": Gpu(32, 125, 300),
    "a100": Gpu(80, 312, 400),
    "h100": Gpu(80, 989, 700),
    "h200": Gpu(141, 989, 700),
}
# Fraction of the peak that transformers of this width reach; --utilisation overrides it.
UTILISATION = 0.4
# Dollars an A100-hour that the paper's $28,400 for 753 days mean.
PRICE = DOLLARS / A100_DAYS / 24
# kg CO2e a kWh (about the world's average electricity) and power of the data centre a watt of GPU: assumptions.
CARBON, OVERHEAD = 0.44, 1.2

STRATEGIES = ("ddp", "deepspeed", "fsdp")


@dataclass
class Plan:
    """Cost of one stage; see the module's text for the columns. None: the paper does not say."""

    name: str
    pixels: int
    tokens: int
    parameters: int
    forward_flop: int
    batch_size: int
    steps: int
    train_step_flop: int
    state_bytes: int
    activation_bytes_per_image: int
    memory_gb_per_gpu: float
    needs_checkpointing: bool
    micro_batches: int
    gpu_days: float
    paper_v100_days: float | None
    paper_a100_days: float | None
    paper_implied_tflops: float | None
    command: str


def forward_flop(config: PixArtConfig, rows: int, columns: int, caption_tokens: int = 0) -> int:
    """FLOP of a forward pass of one image in closed form (matrix products only, 2 FLOP a multiply-add)."""
    n, d, text = rows * columns, config.width, caption_tokens
    patch = config.patch_size**2
    hidden = int(d * config.mlp_ratio)
    block = n * (3 * d * d + d * d) + 2 * n * n * d + 2 * n * d * hidden  # self-attention, MLP
    outer = n * patch * config.in_channels * d + n * d * patch * config.out_channels
    outer += FREQUENCIES * d + d * d  # time
    per_block_modulation = bool(config.classes) or config.adaln == "block"
    if not config.classes:
        block += 2 * n * d * d + text * 2 * d * d + 2 * n * text * d  # cross-attention
        outer += text * (config.caption_channels * d + d * d)
    if per_block_modulation:
        block += 6 * d * d
        outer += 2 * d * d
    else:
        outer += 6 * d * d
    if config.multi_scale:
        outer += 3 * (FREQUENCIES * (d // 3) + (d // 3) ** 2)  # height, width, ratio
    return 2 * (config.depth * block + outer)


def activation_bytes(config: PixArtConfig, tokens: int, caption_tokens: int, checkpointing: bool) -> int:
    """Bytes that the backward pass of one image needs, under bfloat16 autocast with the fused kernels.

    A block keeps, an image token: the residual stream in float32 before both norms (8 D bytes); in bfloat16 what goes
    into qkv, q, k, v, the attention's output, both gated branches, the cross-attention's input, q and output
    (2 D each: 20 D), the MLP's input and twice its hidden layer (2 D + 4 x mlp_ratio D). A caption token: input, key
    and value (6 D). With checkpointing the residual stream of every block (4 D) and one whole block.
    """
    d = config.width
    image = 8 * d + 22 * d + 4 * int(config.mlp_ratio * d)
    if config.classes:
        image -= 6 * d  # no cross-attention
        caption_tokens = 0
    block = tokens * image + caption_tokens * 6 * d
    outer = tokens * d * 8
    if checkpointing:
        return config.depth * tokens * d * 4 + block + outer
    return config.depth * block + outer


def state_bytes(parameters: int, gpus: int, strategy: str) -> int:
    """Bytes of weights, gradients, AdamW moments and moving average that one GPU holds, all in float32."""
    if strategy == "fsdp":
        return math.ceil(16 * parameters / gpus)  # no moving average, see configs/cluster/fsdp.yaml
    if strategy == "deepspeed":
        return 8 * parameters + math.ceil(12 * parameters / gpus)
    return 20 * parameters


def stage_names() -> list[str]:
    """The stages of the paper's recipe, in their order."""
    return [name for name in V100_DAYS if (STAGES / f"{name}.yaml").is_file()]


def load_stage(name: str) -> dict[str, Any]:
    """One stage file of configs/paper."""
    path = STAGES / f"{name}.yaml"
    if name not in stage_names():
        raise UserError(f"no stage {name!r} in {STAGES.name}/; there are: {', '.join(stage_names())}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def stage_network(stage: dict[str, Any]) -> PixArtConfig:
    """The network of a stage at full scale: T5 captions, the factor-8 autoencoder, ImageNet's classes in stage 1."""
    return PixArtConfig(
        input_size=stage["data"]["size"] // CODEC_FACTOR,
        caption_channels=CAPTION_CHANNELS,
        classes=IMAGENET_CLASSES if stage["kind"] == "class" else 0,
        **stage["network"],
    )


def count_parameters(config: PixArtConfig) -> int:
    with torch.device("meta"):
        network = DiT(config) if config.classes else PixArt(config)
    return sum(parameter.numel() for parameter in network.parameters())


def plan(name: str, gpu: str = "a100", gpus: int = 64, utilisation: float = UTILISATION, strategy: str = "ddp") -> Plan:
    """Cost of one stage on a cluster of `gpus` x `gpu`.

    Raises:
        UserError: no such stage, GPU or strategy, or numbers out of range.
    """
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    if gpus < 1 or not 0 < utilisation <= 1:
        raise UserError(f"--gpus must be at least 1 and --utilisation in (0, 1], got {gpus} and {utilisation}")
    stage = load_stage(name)
    config = stage_network(stage)
    side = config.input_size // config.patch_size
    text = 0 if config.classes else config.caption_tokens
    parameters, flop = count_parameters(config), forward_flop(config, side, side, text)
    batch, steps = stage["trainer"]["batch_size"], stage["trainer"]["max_steps"]
    state = state_bytes(parameters, gpus, strategy)
    share = math.ceil(batch / gpus)
    room = 0.9 * GPUS[gpu].memory_gb * 1e9  # a tenth for the allocator, workspaces and the batch itself
    needs_checkpointing, micro_batches = False, 1
    per_image = activation_bytes(config, side * side, text, False)
    if state + share * per_image > room:
        needs_checkpointing = True
        per_image = activation_bytes(config, side * side, text, True)
        fits = int((room - state) // per_image)
        if fits < 1:
            raise UserError(f"{name}: one image does not fit a {gpu} with strategy {strategy}; try --strategy fsdp")
        micro_batches = math.ceil(share / fits)
    at_once = math.ceil(share / micro_batches)
    step_flop = 3 * flop * batch
    work = step_flop * steps * (4 / 3 if needs_checkpointing else 1)
    v100_days = V100_DAYS.get(name)
    nodes = max(1, gpus // 8)
    return Plan(
        name=name,
        pixels=stage["data"]["size"],
        tokens=side * side,
        parameters=parameters,
        forward_flop=flop,
        batch_size=batch,
        steps=steps,
        train_step_flop=step_flop,
        state_bytes=state,
        activation_bytes_per_image=per_image,
        memory_gb_per_gpu=(state + at_once * per_image) / 1e9,
        needs_checkpointing=needs_checkpointing,
        micro_batches=micro_batches,
        gpu_days=work / (GPUS[gpu].peak_tflops * 1e12 * utilisation) / 86400,
        paper_v100_days=v100_days,
        paper_a100_days=None if v100_days is None else v100_days / V100_PER_A100,
        paper_implied_tflops=None if v100_days is None else step_flop * steps / (v100_days * 86400) / 1e12,
        command=f"torchrun --nnodes {nodes} --nproc-per-node {min(gpus, 8)} pixart/train.py "
        f"--config pixart/configs/paper/{name}.yaml --config pixart/configs/cluster/{strategy}.yaml "
        f"--trainer.devices {min(gpus, 8)} --trainer.num_nodes {nodes}"
        + (f" --trainer.accumulate {micro_batches}" if micro_batches > 1 else ""),
    )


def bill(gpu_days: float, gpu: str, price: float, carbon: float = CARBON) -> tuple[float, float]:
    """(dollars, kg CO2e) of so many GPU-days."""
    hours = 24 * gpu_days
    return hours * price, hours * GPUS[gpu].watts / 1000 * OVERHEAD * carbon


def table(plans: Sequence[Plan], gpu: str, gpus: int, utilisation: float, strategy: str, price: float) -> str:
    """The plans, their sum and the bill as aligned text."""

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    head = "stage|px|tokens|params M|GFLOP/img|batch|steps|TFLOP/step|GB/GPU|GPU-days|A100-days (paper)|implied TFLOP/s"
    rows = [head.split("|")]
    for p in plans:
        memory = number(p.memory_gb_per_gpu) + (" +ckpt" if p.needs_checkpointing else "")
        rows.append(
            [
                p.name,
                str(p.pixels),
                str(p.tokens),
                number(p.parameters / 1e6),
                number(p.forward_flop / 1e9),
                number(p.batch_size, 0),
                number(p.steps, 0),
                number(p.train_step_flop / 1e12),
                memory + (f" x {p.micro_batches}" if p.micro_batches > 1 else ""),
                number(p.gpu_days),
                number(p.paper_a100_days),
                number(p.paper_implied_tflops),
            ]
        )
    days = sum(p.gpu_days for p in plans)
    paper = [p.paper_a100_days for p in plans if p.paper_a100_days is not None]
    total = ["together", *[""] * (len(rows[0]) - 4), number(days), number(sum(paper)) if paper else "-", ""]
    rows.append(total)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    card = GPUS[gpu]
    cluster = (
        f"{gpus} x {gpu} ({card.memory_gb:.0f} GB, {card.peak_tflops:.0f} TFLOP/s peak) at {utilisation:.0%} of peak"
    )
    dollars, kilograms = bill(days, gpu, price)
    _, paper_kilograms = bill(A100_DAYS, "a100", PRICE)
    _, sd_kilograms = bill(SD_A100_DAYS, "a100", PRICE)
    lines += [
        "",
        f"time: {days / gpus:,.1f} days on this cluster",
        f"bill: ${dollars:,.0f} at ${price:.2f} a GPU-hour, {kilograms / 1000:,.1f} t CO2e at {card.watts:.0f} W a "
        f"GPU, {OVERHEAD} overhead and {CARBON} kg a kWh",
        f"paper: {A100_DAYS} A100 days, ${DOLLARS:,} (${PRICE:.2f} an hour); at the same power "
        f"{paper_kilograms / 1000:,.1f} t CO2e, {paper_kilograms / sd_kilograms:.0%} of Stable Diffusion v1.5's "
        f"{SD_A100_DAYS:,} days (${SD_DOLLARS:,}, {sd_kilograms / 1000:,.1f} t)",
        "",
        *(p.command for p in plans),
    ]
    return "\n".join([f"cluster: {cluster}, {strategy}; '-': the paper does not say", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="names in pixart/configs/paper (default: all five)")
    parser.add_argument("--gpu", default="a100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="fraction of the peak that is reached")
    parser.add_argument("--strategy", default="ddp", help=f"one of {', '.join(STRATEGIES)}, files in configs/cluster")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars a GPU-hour (default: the paper's for A100)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    cluster = options.gpu, options.gpus, options.utilisation, options.strategy
    plans = [plan(name, *cluster) for name in options.stages or stage_names()]
    if options.json:
        print(json.dumps([asdict(p) for p in plans], indent=2))
    else:
        print(table(plans, *cluster, options.price))


if __name__ == "__main__":
    run_main(main)
