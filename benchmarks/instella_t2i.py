"""The binary tokenizer's training step against a plain loop, and its throughput beside a KL autoencoder of its size.

    python -m benchmarks.instella_t2i                         # writes results/bench_instella_t2i.json; some minutes
    python -m benchmarks.instella_t2i --sizes small --rounds 3
    python -m benchmarks.instella_t2i --sizes released --devices cuda      # the released network, random weights

Training: equal networks, pictures, uniforms and losses (pixels, perceptual, adversarial). The peer is the loop as one
writes it: tables of positions made in every pass, discriminator with gradients of its own in the tokenizer's step, one
AdamW for all; eager as users run it (float32 on a CPU), and at its best (same precision, compiled). Encoding and
decoding: pictures a second beside diffusers' AutoencoderKL of as many parameters, reported without a target. The rows
of the generators: `benchmarks.instella_generators`, part of the same run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import instella_generators
from benchmarks.arms import (
    Arm,
    Pace,
    Step,
    bench_parser,
    in_turns,
    mixed,
    parse,
    serve_or_measure,
    training_rows,
    where_of,
)
from common.costs import flop, parameter_count
from common.data.sampling import derive_seed
from common.errors import run_main
from common.images import to_unit
from common.kernels.products import plain_products
from common.ledger import bench_row
from common.metrics.perceptual import perceptual_distance
from instella_t2i import tokenizer as tokenizer_module
from instella_t2i.config import InstellaConfig
from instella_t2i.losses import Discriminator, hinge_loss, pixel_loss
from instella_t2i.tokenizer import Tokenizer
from instella_t2i.trainer import TokenizerTraining

SIZES = {"small": 16, "released": 4}  # pictures of a step
STEP_SPEEDUP = 1.3
WEIGHT = 0.05  # of the adversarial term


def recipe(arm: Arm) -> InstellaConfig:
    """The run's options, with the perceptual network that comes along."""
    config = instella_generators.config_of(arm.size)
    config.tokenizer = replace(config.tokenizer, perceptual_trunk="trained", gan_start=0.0, optimiser="adamw")
    return config


def given(arm: Arm, config: InstellaConfig) -> tuple[Tensor, Tensor]:
    """(uint8 pictures, uniforms): the same on both sides."""
    torch.manual_seed(1)
    count, side, network = SIZES[arm.size], config.data.size, config.network
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    return images.to(arm.device), torch.rand(count, network.tokens, network.bits).to(arm.device)


def ours(arm: Arm) -> Step:
    """The trainer's own step, without Lightning around it."""
    config = recipe(arm)
    torch.manual_seed(0)
    network = Tokenizer(config.network, config.data.size)
    stage = config.tokenizer
    module = TokenizerTraining(network, stage, stage, config.data, config.trainer, 0).to(arm.device)
    if arm.compiled:  # what the trainer does with --trainer.compile true
        network.compile()
    assert module.discriminator is not None
    module.frozen[0].to(arm.device)
    images, uniforms = given(arm, config)
    optimiser, against = module.configure_optimizers()
    discriminator = module.discriminator

    def step(_: int) -> Tensor:
        discriminator.requires_grad_(False)
        with mixed(arm.device, arm.bf16):
            loss, y_bCHW, _, _ = module.tokenizer_loss(images, uniforms, config.data.size, 0, WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        discriminator.requires_grad_(True)
        with mixed(arm.device, arm.bf16):
            real, fake = discriminator(to_unit(images)).float(), discriminator(y_bCHW.detach()).float()
            second = hinge_loss(real, fake)
        second.backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        against.step()
        module.zero_grad()
        return loss.detach()

    return step


def peer(arm: Arm) -> Step:
    """The plain loop, with torch's own layers."""
    config = recipe(arm)
    torch.manual_seed(0)
    network = plain_products(Tokenizer(config.network, config.data.size)).to(arm.device)
    torch.manual_seed(derive_seed(0, 1))  # the trainer's
    discriminator = Discriminator(config.tokenizer.gan_width).to(arm.device)
    distance = perceptual_distance("trained").to(arm.device)
    call = torch.compile(network) if arm.compiled else network
    images, uniforms = given(arm, config)
    losses = config.tokenizer
    optimiser = torch.optim.AdamW(network.parameters(), lr=losses.lr, betas=(0.9, 0.99), weight_decay=0.0)
    against = torch.optim.AdamW(discriminator.parameters(), lr=losses.gan_lr, betas=(0.5, 0.9), weight_decay=0.0)

    def step(_: int) -> Tensor:
        tokenizer_module._table.cache_clear()
        x = images.float() / 127.5 - 1
        with mixed(arm.device, arm.bf16):
            y, quantized = call(x, uniforms, losses.tau_start)
            y = y.float()
            loss = pixel_loss(x, y, losses.pixel_beta) + losses.perceptual * distance(x, y).mean()
            loss = loss + losses.code * quantized.loss + losses.logit * quantized.terms["logits"]
            loss = loss - WEIGHT * discriminator(y).float().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        with mixed(arm.device, arm.bf16):
            real, fake = discriminator(x).float(), discriminator(y.detach()).float()
            second = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        against.zero_grad()
        second.backward()
        torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
        against.step()
        return loss.detach()

    return step


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a size: training speed and memory, share of the peak, throughput."""
    arm = Arm("ours", size, "cpu")

    @torch.no_grad()
    def work() -> float:
        config = recipe(arm)
        network, x = Tokenizer(config.network, config.data.size), to_unit(given(arm, config)[0])
        return 3 * flop(lambda: network(x))

    label, images = "training step of the tokenizer against a plain loop", SIZES[size]
    yield training_rows("benchmarks.instella_t2i", size, device, folder, pace, images, label, STEP_SPEEDUP, work)[0]
    yield throughput_rows(arm, device, max(5, pace.rounds))
    yield from instella_generators.parts(size, device, folder, pace)


def kl_autoencoder(parameters: int, patch: int) -> Any:
    """diffusers' AutoencoderKL with about as many parameters and the same reduction."""
    from diffusers import AutoencoderKL

    levels = max(1, patch.bit_length() - 1)

    def made(width: int) -> Any:
        widths = [width * min(2**level, 4) for level in range(levels + 1)]
        return AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            norm_num_groups=8,
            latent_channels=16,
        )

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameter_count(made(width))

    return made(min(range(8, 257, 8), key=lambda width: abs(count(width) - parameters)))


def throughput_rows(arm: Arm, device: str, rounds: int) -> list[dict[str, Any]]:
    """Pictures a second, encoded and decoded."""
    config = recipe(arm)
    network = Tokenizer(config.network, config.data.size).eval().to(device)
    other = kl_autoencoder(parameter_count(network), config.network.patch).eval().to(device)
    x = to_unit(given(replace(arm, device=device), config)[0])
    codes, latents = network.encode(x), other.encode(x).latent_dist.mode()
    work = {
        "encoding": (lambda: network.encode(x), lambda: other.encode(x).latent_dist.mode()),
        "decoding": (lambda: network.decode(codes, config.data.size), lambda: other.decode(latents).sample),
    }
    rows = []
    for kind, pair in work.items():
        with torch.inference_mode():
            found = in_turns(dict(zip(("ours", "peer"), pair)), rounds, device)
        name = f"{where_of(device)}{kind} against AutoencoderKL of as many parameters ({arm.size}, batch {len(x)})"
        rows.append(bench_row(name, len(x) / found["ours"], len(x) / found["peer"], "images/s"))
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = bench_parser(__doc__, "bench_instella_t2i.json", SIZES, ["small"], steps=3)
    return serve_or_measure(parse(parser, argv), {"ours": ours, "peer": peer}, parts)


if __name__ == "__main__":
    run_main(main)
