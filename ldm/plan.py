"""What the published models cost, computed from their configurations on the meta device (no memory, no GPU needed).

    make ldm-plan                                    the table, for 8 x H100
    python ldm/plan.py --gpu v100 --gpus 1 cin256-v2 lsun_churches
    python ldm/plan.py --json

Columns
  U-Net, cond, stage1  parameters in millions (stage1: the frozen autoencoder; cond: what is trained with the U-Net)
  GFLOP/img            forward of the U-Net for one image (2 FLOP per multiply-add)
  TFLOP/step           one training step of the whole batch: 3 forwards of U-Net and conditioner (forward and backward),
                       and one encoding of the image by the first stage unless the latents are cached (--cached-latents)
  GB/GPU               weights, gradients, AdamW moments and EMA in float32 (20 bytes a trained parameter), the frozen
                       first stage in float32, and the activations that backward keeps (in bf16, for the GPU's share of
                       the batch); data parallel without sharding. "+ckpt" where only activation checkpointing fits
  GPU-days             TFLOP/step x iterations / (peak x utilisation)
  V100-days            the paper's (table 18), and the FLOP/s that these would mean on one V100
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError, run_main
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.conditioners import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm.convert import read_config
from ldm.official import autoencoder_of, unet_of

PAPER_CONFIGS = Path(__file__).resolve().parent / "configs" / "paper"
FIRST_STAGES = PAPER_CONFIGS / "first_stages.yaml"


@dataclass(frozen=True)
class Gpu:
    """Memory in GB and dense half-precision tensor-core peak in TFLOP/s (the makers' data sheets)."""

    memory_gb: float
    peak_tflops: float


GPUS = {
    "v100": Gpu(32, 125),
    "a100": Gpu(80, 312),
    "h100": Gpu(80, 989),
    "h200": Gpu(141, 989),
}
# Fraction of the peak that a tuned convolutional U-Net of this size reaches; --utilisation overrides it.
UTILISATION = 0.35


@dataclass
class Plan:
    """Cost of one published model; see the module's text for the columns. None: not published."""

    name: str
    unet_parameters: int
    conditioner_parameters: int
    unused_head_parameters: int
    first_stage_parameters: int
    unet_forward_flop: int
    conditioner_forward_flop: int
    first_stage_encode_flop: int
    batch_size: int | None
    iterations: int | None
    train_step_flop: int | None
    activation_bytes_per_image: int
    state_bytes: int
    memory_gb_per_gpu: float | None
    needs_checkpointing: bool
    gpu_days: float | None
    paper_parameters: int | None
    paper_v100_days: float | None
    paper_implied_tflops: float | None


def paper_config_names() -> list[str]:
    """Published models that have a file in configs/paper."""
    return sorted(path.stem for path in PAPER_CONFIGS.glob("*.yaml") if path != FIRST_STAGES)


def load_paper_config(name: str) -> dict[str, Any]:
    """The configuration of one published model; its `first_stage` is looked up in first_stages.yaml."""
    path = PAPER_CONFIGS / f"{name}.yaml"
    if name not in paper_config_names():
        raise UserError(f"no published model {name!r}; there are: {', '.join(paper_config_names())}")
    return read_config(path)


def parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def build_conditioner(options: dict[str, Any] | None, logits_head: bool = False) -> nn.Module | None:
    """The trained part of a condition; None where the condition is an image or comes from a frozen network."""
    if options is None:
        return None
    arguments = {k: v for k, v in options.items() if k != "kind"}
    if options["kind"] == "class":
        return ClassEmbedder(**arguments)
    if options["kind"] == "tau":
        return TransformerEmbedder(**arguments, logits_head=logits_head)
    if options["kind"] == "rescaler":
        return SpatialRescaler(**arguments)
    return None


def context_tokens(options: dict[str, Any] | None) -> int:
    """Tokens that the U-Net attends to."""
    kind = (options or {}).get("kind")
    return {
        "class": 1,
        "tau": (options or {}).get("max_seq_len", 0),
        "retrieval": (options or {}).get("tokens", 0),
    }.get(str(kind), 0)


def build_first_stage(options: dict[str, Any] | None) -> AutoencoderKL | VQModel | None:
    if options is None:
        return None
    return autoencoder_of(options["ddconfig"], options["embed_dim"], options.get("n_embed"))


def forward_flop(module: nn.Module, *inputs: Tensor | None) -> int:
    """FLOP of one call (2 per multiply-add; convolutions, matrix products and attention)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def saved_bytes(module: nn.Module, *inputs: Tensor | None, bytes_per_value: int = 2) -> int:
    """Bytes of activations that autograd keeps for the backward pass, parameters excluded, each storage once."""
    kept: dict[int, int] = {}
    holders: list[Tensor] = []  # keeps storages alive, so that their addresses stay distinct
    own = {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes() // max(1, tensor.element_size()) * bytes_per_value
            holders.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    return sum(kept.values())


@lru_cache(maxsize=64)
def _unet_costs(unet_json: str, tokens: int) -> tuple[int, int, int, int]:
    """(parameters, forward FLOP, activation bytes, the same with checkpointing) of one image."""
    options = json.loads(unet_json)
    with torch.device("meta"):
        unet = unet_of(options)
        side = options["image_size"]
        x_BCHW = torch.empty(1, options["in_channels"], side, side)
        context = torch.empty(1, tokens, options["context_dim"]) if options.get("context_dim") else None
        t_B = torch.zeros(1)
        flop = forward_flop(unet.eval(), x_BCHW, t_B, context)
        unet.train()
        plain = saved_bytes(unet, x_BCHW, t_B, context)
        checkpointed = unet_of({**options, "use_checkpoint": True}).train()
        return parameters(unet), flop, plain, saved_bytes(checkpointed, x_BCHW, t_B, context)


@lru_cache(maxsize=16)
def _first_stage_costs(options_json: str, side: int) -> tuple[int, int]:
    """(parameters, FLOP to encode one image)."""
    with torch.device("meta"):
        first_stage = build_first_stage(json.loads(options_json))
        if first_stage is None:
            return 0, 0
        channels = json.loads(options_json)["ddconfig"]["in_channels"]
        flop = forward_flop(first_stage.encoder, torch.empty(1, channels, side, side))
        return parameters(first_stage), flop


def plan(
    name: str, gpu: str = "h100", gpus: int = 8, utilisation: float = UTILISATION, cached_latents: bool = False
) -> Plan:
    """Cost of one published model on a cluster of `gpus` x `gpu`."""
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    if gpus < 1 or not 0 < utilisation <= 1:
        raise UserError(f"--gpus must be at least 1 and --utilisation in (0, 1], got {gpus} and {utilisation}")
    config = load_paper_config(name)
    tokens = context_tokens(config["conditioner"])
    unet_n, unet_flop, activations, checkpointed = _unet_costs(json.dumps(config["unet"], sort_keys=True), tokens)
    stage_n, encode_flop = _first_stage_costs(json.dumps(config["first_stage"], sort_keys=True), config["resolution"])
    with torch.device("meta"):
        conditioner = build_conditioner(config["conditioner"])
        conditioner_n, conditioner_flop, unused = parameters(conditioner), 0, 0
        if isinstance(conditioner, TransformerEmbedder):
            ids_BL = torch.zeros(1, tokens, dtype=torch.long)
            conditioner_flop = forward_flop(conditioner, ids_BL)
            activations += saved_bytes(conditioner, ids_BL)
            # The conditioner's own activations stay: only the U-Net's blocks are recomputed.
            checkpointed += saved_bytes(conditioner, ids_BL)
            unused = parameters(build_conditioner(config["conditioner"], logits_head=True)) - conditioner_n

    optimizer, paper = config["optimizer"], config["paper"]
    batch, iterations, v100_days = optimizer["batch_size"], optimizer["iterations"], paper["v100_days"]
    step_flop = days = memory = implied = None
    state_bytes = 20 * (unet_n + conditioner_n) + 4 * stage_n
    needs_checkpointing = False
    if batch is not None:
        per_image = 3 * (unet_flop + conditioner_flop) + (0 if cached_latents else encode_flop)
        step_flop = batch * per_image
        share = math.ceil(batch / gpus)
        memory = (state_bytes + share * activations) / 1e9
        if memory > 0.9 * GPUS[gpu].memory_gb:  # a tenth for the allocator, cuDNN workspaces and the batch itself
            needs_checkpointing = True
            memory = (state_bytes + share * checkpointed) / 1e9
    if step_flop is not None and iterations is not None:
        days = step_flop * iterations / (GPUS[gpu].peak_tflops * 1e12 * utilisation) / 86400
        if v100_days is not None:
            implied = step_flop * iterations / (v100_days * 86400) / 1e12
    return Plan(
        name,
        unet_n,
        conditioner_n,
        unused,
        stage_n,
        unet_flop,
        conditioner_flop,
        encode_flop,
        batch,
        iterations,
        step_flop,
        activations,
        state_bytes,
        memory,
        needs_checkpointing,
        days,
        paper["parameters"],
        v100_days,
        implied,
    )


def table(plans: Sequence[Plan], gpu: str, gpus: int, utilisation: float) -> str:
    """The plans as aligned text."""

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    head = "model|U-Net M|cond M|stage1 M|GFLOP/img|batch|TFLOP/step|GB/GPU|GPU-days|V100-days (paper)|implied TFLOP/s"
    rows = [head.split("|")]
    for p in plans:
        rows.append(
            [
                p.name,
                number(p.unet_parameters / 1e6),
                number(p.conditioner_parameters / 1e6),
                number(p.first_stage_parameters / 1e6),
                number(p.unet_forward_flop / 1e9),
                number(p.batch_size, 0),
                number(None if p.train_step_flop is None else p.train_step_flop / 1e12),
                number(p.memory_gb_per_gpu) + (" +ckpt" if p.needs_checkpointing else ""),
                number(p.gpu_days),
                number(p.paper_v100_days),
                number(p.paper_implied_tflops),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    cluster = (
        f"{gpus} x {gpu} ({GPUS[gpu].memory_gb:.0f} GB, {GPUS[gpu].peak_tflops:.0f} TFLOP/s peak) at {utilisation:.0%}"
    )
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([f"cluster: {cluster} of peak; '-': not published", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names in ldm/configs/paper (default: all)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="fraction of the peak that is reached")
    parser.add_argument("--cached-latents", action="store_true", help="the first stage has encoded the images before")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    names = options.models or paper_config_names()
    plans = [plan(name, options.gpu, options.gpus, options.utilisation, options.cached_latents) for name in names]
    if options.json:
        print(json.dumps([asdict(p) for p in plans], indent=2))
    else:
        print(table(plans, options.gpu, options.gpus, options.utilisation))


if __name__ == "__main__":
    run_main(main)
