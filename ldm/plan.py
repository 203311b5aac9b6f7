"""What the published models cost, computed from their configurations on the meta device (no memory, no GPU needed).

    make ldm-plan  # the table, for 8 x H100
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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common import costs
from common.errors import UserError, run_main
from ldm.autoencoder import AutoencoderKL, VQModel
from ldm.conditioners import ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm.convert import read_config
from ldm.official import autoencoder_of, unet_of

PAPER_CONFIGS = Path(__file__).resolve().parent / "configs" / "paper"
FIRST_STAGES = PAPER_CONFIGS / "first_stages.yaml"
# Utilisation: what a tuned convolutional U-Net of this size reaches.
DEFAULT = costs.Cluster("h100", 8, 0.35)


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
    if name not in paper_config_names():
        raise UserError(f"no published model {name!r}; there are: {', '.join(paper_config_names())}")
    return read_config(PAPER_CONFIGS / f"{name}.yaml")


def build_conditioner(options: dict[str, Any] | None, logits_head: bool = False) -> nn.Module | None:
    """The trained part of a condition; None where the condition is an image or comes from a frozen network."""
    arguments = dict(options or {})
    kind = arguments.pop("kind", None)
    if kind == "tau":
        return TransformerEmbedder(**arguments, logits_head=logits_head)
    known: dict[str | None, type[nn.Module]] = {"class": ClassEmbedder, "rescaler": SpatialRescaler}
    return known[kind](**arguments) if kind in known else None


def context_tokens(options: dict[str, Any] | None) -> int:
    """Tokens that the U-Net attends to."""
    options = options or {}
    tokens = {"class": 1, "tau": options.get("max_seq_len", 0), "retrieval": options.get("tokens", 0)}
    return tokens.get(options.get("kind", ""), 0)


def build_first_stage(options: dict[str, Any]) -> AutoencoderKL | VQModel:
    return autoencoder_of(options["ddconfig"], options["embed_dim"], options.get("n_embed"))


class Costs(NamedTuple):
    """Parameters, FLOP of one image's forward pass, and bytes that one image keeps for backward in bf16."""

    unet: int
    conditioner: int
    unused_head: int
    first_stage: int
    unet_flop: int
    conditioner_flop: int
    encode_flop: int
    kept: int
    kept_with_checkpointing: int


@cache
def count(name: str) -> Costs:
    """Counted on the meta device."""
    config = load_paper_config(name)
    options, tokens, width = config["unet"], context_tokens(config["conditioner"]), config["unet"].get("context_dim")

    def kept(module: nn.Module, *inputs: Any) -> int:
        return costs.kept_bytes(lambda: module(*inputs), module.parameters(), costs.half_bytes)

    with torch.device("meta"):
        x_BCHW = torch.empty(1, options["in_channels"], options["image_size"], options["image_size"])
        inputs = x_BCHW, torch.zeros(1), torch.empty(1, tokens, width) if width else None
        unet, checkpointed = (unet_of({**options, "use_checkpoint": again}).train() for again in (False, True))
        with torch.no_grad():
            unet_flop = costs.flop(lambda: unet(*inputs))
        conditioner = build_conditioner(config["conditioner"])
        with_head = build_conditioner(config["conditioner"], logits_head=True)
        conditioner_flop = conditioner_kept = stage_parameters = encode_flop = 0
        if isinstance(conditioner, TransformerEmbedder):
            ids_BL = torch.zeros(1, tokens, dtype=torch.long)
            conditioner_flop, conditioner_kept = costs.flop(lambda: conditioner(ids_BL)), kept(conditioner, ids_BL)
        if config["first_stage"] is not None:
            first_stage = build_first_stage(config["first_stage"])
            side, channels = config["resolution"], config["first_stage"]["ddconfig"]["in_channels"]
            stage_parameters = costs.parameter_count(first_stage)
            encode_flop = costs.flop(lambda: first_stage.encoder(torch.empty(1, channels, side, side)))
        return Costs(
            costs.parameter_count(unet),
            costs.parameter_count(conditioner),
            costs.parameter_count(with_head) - costs.parameter_count(conditioner),
            stage_parameters,
            unet_flop,
            conditioner_flop,
            encode_flop,
            # The conditioner's own activations stay: only the U-Net's blocks are recomputed.
            kept(unet, *inputs) + conditioner_kept,
            kept(checkpointed, *inputs) + conditioner_kept,
        )


def plan(name: str, cluster: costs.Cluster = DEFAULT, cached_latents: bool = False) -> Plan:
    """Cost of one published model on a cluster."""
    config, cost = load_paper_config(name), count(name)
    batch, iterations = config["optimizer"]["batch_size"], config["optimizer"]["iterations"]
    v100_days = config["paper"]["v100_days"]
    state = 20 * (cost.unet + cost.conditioner) + 4 * cost.first_stage
    held: costs.Fit | None = None
    step_flop = work = None
    if batch is not None:
        per_image = 3 * (cost.unet_flop + cost.conditioner_flop) + (0 if cached_latents else cost.encode_flop)
        step_flop = batch * per_image
        held = costs.fit(cluster, batch, state, cost.kept, cost.kept_with_checkpointing, split=False)
    if step_flop is not None and iterations is not None:
        work = step_flop * iterations
    return Plan(
        name,
        *cost[:7],
        batch,
        iterations,
        step_flop,
        cost.kept,
        state,
        None if held is None else held.memory_gb,
        held is not None and held.recomputed,
        None if work is None else cluster.gpu_days(work),
        config["paper"]["parameters"],
        v100_days,
        None if work is None or v100_days is None else work / (v100_days * 86400) / 1e12,
    )


def table(plans: Sequence[Plan], cluster: costs.Cluster) -> str:
    """The plans as aligned text."""
    head = "model|U-Net M|cond M|stage1 M|GFLOP/img|batch|TFLOP/step|GB/GPU|GPU-days|V100-days (paper)|implied TFLOP/s"
    rows = [
        [
            p.name,
            *(costs.number(n / 1e6) for n in (p.unet_parameters, p.conditioner_parameters, p.first_stage_parameters)),
            costs.number(p.unet_forward_flop / 1e9),
            costs.number(p.batch_size, 0),
            costs.number(None if p.train_step_flop is None else p.train_step_flop / 1e12),
            costs.number(p.memory_gb_per_gpu) + (" +ckpt" if p.needs_checkpointing else ""),
            *(costs.number(value) for value in (p.gpu_days, p.paper_v100_days, p.paper_implied_tflops)),
        ]
        for p in plans
    ]
    return f"cluster: {cluster.describe()}; '-': not published\n" + costs.aligned([head.split("|"), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = costs.plan_parser(__doc__, DEFAULT)
    parser.add_argument("models", nargs="*", help="names in ldm/configs/paper (default: all)")
    parser.add_argument("--cached-latents", action="store_true", help="the first stage has encoded the images before")
    options = parser.parse_args(arguments)
    cluster = costs.cluster_of(options)
    plans = [plan(name, cluster, options.cached_latents) for name in options.models or paper_config_names()]
    costs.show(plans, table(plans, cluster), options.json)


if __name__ == "__main__":
    run_main(main)
