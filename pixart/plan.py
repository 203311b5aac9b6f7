"""What the paper's training costs, stage by stage, on a named cluster; needs no GPU and no memory.

    make pixart-plan  # the table, for 64 x A100
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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common import costs
from common.errors import UserError, run_main
from common.files import read_yaml
from common.options import NotNegative
from pixart.config import PixArtConfig
from pixart.model import DiT, PixArt

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

# Utilisation: what transformers of this width reach.
DEFAULT = costs.Cluster("a100", 64, 0.4)
WATTS = {"v100": 300, "a100": 400, "h100": 700, "h200": 700}  # of a board, the maker's data sheets
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


@cache
def network(config: PixArtConfig) -> DiT | PixArt:
    with torch.device("meta"):
        return DiT(config) if config.classes else PixArt(config)


@cache
def forward_flop(config: PixArtConfig, rows: int, columns: int, caption_tokens: int = 0) -> int:
    """FLOP of a forward pass of one image of `rows` x `columns` tokens; padding of captions is not work."""
    net, p = network(config), config.patch_size
    with torch.device("meta"), torch.no_grad():
        x_BCHW, t_B = torch.empty(1, config.in_channels, rows * p, columns * p), torch.empty(1)
        if isinstance(net, DiT):
            return costs.flop(lambda: net(x_BCHW, t_B, torch.zeros(1, dtype=torch.long)))
        more = {"size_B2": torch.ones(1, 2), "ratio_B1": torch.ones(1, 1)} if config.multi_scale else {}
        caption_BLC = torch.empty(1, caption_tokens, config.caption_channels)
        return costs.flop(lambda: net(x_BCHW, t_B, caption_BLC, **more))


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
    return read_yaml(path)


def stage_network(stage: dict[str, Any]) -> PixArtConfig:
    """The network of a stage at full scale: T5 captions, the factor-8 autoencoder, ImageNet's classes in stage 1."""
    return PixArtConfig(
        input_size=stage["data"]["size"] // CODEC_FACTOR,
        caption_channels=CAPTION_CHANNELS,
        classes=IMAGENET_CLASSES if stage["kind"] == "class" else 0,
        **stage["network"],
    )


def plan(name: str, cluster: costs.Cluster = DEFAULT, strategy: str = "ddp") -> Plan:
    """Cost of one stage on a cluster.

    Raises:
        UserError: no such stage or strategy, or one image does not fit.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    stage = load_stage(name)
    config = stage_network(stage)
    side = config.input_size // config.patch_size
    text = 0 if config.classes else config.caption_tokens
    parameters, flop = costs.parameter_count(network(config)), forward_flop(config, side, side, text)
    batch, steps = stage["trainer"]["batch_size"], stage["trainer"]["max_steps"]
    state = state_bytes(parameters, cluster.gpus, strategy)
    kept, recomputed = (activation_bytes(config, side * side, text, again) for again in (False, True))
    sample = f"one image of {name} with --strategy {strategy} (fsdp shares most)"
    held = costs.fit(cluster, batch, state, kept, recomputed, what=sample)
    work = 3 * flop * batch * steps
    v100_days = V100_DAYS.get(name)
    nodes, devices = max(1, cluster.gpus // 8), min(cluster.gpus, 8)
    return Plan(
        name=name,
        pixels=stage["data"]["size"],
        tokens=side * side,
        parameters=parameters,
        forward_flop=flop,
        batch_size=batch,
        steps=steps,
        train_step_flop=3 * flop * batch,
        state_bytes=state,
        activation_bytes_per_image=recomputed if held.recomputed else kept,
        memory_gb_per_gpu=held.memory_gb,
        needs_checkpointing=held.recomputed,
        micro_batches=held.micro_batches,
        gpu_days=cluster.gpu_days(work * (4 / 3 if held.recomputed else 1)),
        paper_v100_days=v100_days,
        paper_a100_days=None if v100_days is None else v100_days / V100_PER_A100,
        paper_implied_tflops=None if v100_days is None else work / (v100_days * 86400) / 1e12,
        command=f"torchrun --nnodes {nodes} --nproc-per-node {devices} pixart/train.py "
        f"--config pixart/configs/paper/{name}.yaml --config pixart/configs/cluster/{strategy}.yaml "
        f"--trainer.devices {devices} --trainer.num_nodes {nodes}"
        + (f" --trainer.accumulate {held.micro_batches}" if held.micro_batches > 1 else ""),
    )


def bill(gpu_days: float, gpu: str, price: float, carbon: float = CARBON) -> tuple[float, float]:
    """(dollars, kg CO2e) of so many GPU-days."""
    hours = 24 * gpu_days
    return hours * price, hours * WATTS[gpu] / 1000 * OVERHEAD * carbon


def table(plans: Sequence[Plan], cluster: costs.Cluster, strategy: str, price: float) -> str:
    """The plans, their sum and the bill as aligned text."""
    number = costs.number
    head = "stage|px|tokens|params M|GFLOP/img|batch|steps|TFLOP/step|GB/GPU|GPU-days|A100-days (paper)|implied TFLOP/s"
    rows = [
        [
            p.name,
            str(p.pixels),
            str(p.tokens),
            number(p.parameters / 1e6),
            number(p.forward_flop / 1e9),
            number(p.batch_size, 0),
            number(p.steps, 0),
            number(p.train_step_flop / 1e12),
            str(costs.Fit(p.memory_gb_per_gpu, p.needs_checkpointing, p.micro_batches)),
            *(number(value) for value in (p.gpu_days, p.paper_a100_days, p.paper_implied_tflops)),
        ]
        for p in plans
    ]
    days = sum(p.gpu_days for p in plans)
    paper = [p.paper_a100_days for p in plans if p.paper_a100_days is not None]
    total = ["together", *[""] * 8, number(days), number(sum(paper)) if paper else "-", ""]
    dollars, kilograms = bill(days, cluster.gpu, price)
    _, paper_kilograms = bill(A100_DAYS, "a100", PRICE)
    _, sd_kilograms = bill(SD_A100_DAYS, "a100", PRICE)
    return "\n".join(
        [
            f"cluster: {cluster.describe()}, {strategy}; '-': the paper does not say",
            costs.aligned([head.split("|"), *rows, total]),
            "",
            f"time: {days / cluster.gpus:,.1f} days on this cluster",
            f"bill: ${dollars:,.0f} at ${price:.2f} a GPU-hour, {kilograms / 1000:,.1f} t CO2e at {WATTS[cluster.gpu]} "
            f"W a GPU, {OVERHEAD} overhead and {CARBON} kg a kWh",
            f"paper: {A100_DAYS} A100 days, ${DOLLARS:,} (${PRICE:.2f} an hour); at the same power "
            f"{paper_kilograms / 1000:,.1f} t CO2e, {paper_kilograms / sd_kilograms:.0%} of Stable Diffusion v1.5's "
            f"{SD_A100_DAYS:,} days (${SD_DOLLARS:,}, {sd_kilograms / 1000:,.1f} t)",
            "",
            *(p.command for p in plans),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument("stages", nargs="*", help="names in pixart/configs/paper (default: all five)")
    parser.add_argument("--strategy", default="ddp", help=f"one of {', '.join(STRATEGIES)}, files in configs/cluster")
    parser.add_argument("--price", type=NotNegative, default=PRICE, help="dollars a GPU-hour; the paper's is for A100")
    options = parser.parse_args(arguments)
    cluster = costs.cluster_of(options)
    plans = [plan(name, cluster, options.strategy) for name in options.stages or stage_names()]
    costs.show(plans, table(plans, cluster, options.strategy, options.price), options.json)


if __name__ == "__main__":
    run_main(main)
