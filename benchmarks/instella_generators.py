"""The generators' part of `benchmarks.instella_t2i`: training step, tokens against a grid, cached keys, drawing.

Training: equal networks, pictures, captions, noise. The peer is the released example's loop as described: pictures
go through the tokenizer and captions through the language model in every step, one AdamW for all; eager as users run it
(float32 on a CPU), and at its best (same precision, compiled). Drawing: pictures a second from captions, both ways,
beside the latent diffusion of `ldm/pretrained/emoji64` with DPM-Solver++ in 20 guided steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import (
    Arm,
    Pace,
    Step,
    bench_parser,
    in_turns,
    mixed,
    noted,
    parse,
    serve_or_measure,
    training_rows,
    where_of,
)
from common.cli import parse_config
from common.costs import flop
from common.errors import run_main
from common.images import to_uint8, to_unit
from common.kernels.products import plain_products
from common.ledger import bench_row
from common.paths import REPOSITORY
from common.solvers import stock_pipeline
from common.teacher import Teacher
from instella_t2i import autoregression
from instella_t2i.codes import pack_bits, unpack_bits
from instella_t2i.config import InstellaConfig
from instella_t2i.diffusion import add_noise, diffusion_loss, sample, training_times
from instella_t2i.generators import Autoregressor, Denoiser, Shape
from instella_t2i.text import CausalText, FeatureTable
from instella_t2i.tokenizer import Tokenizer

CONFIGS = REPOSITORY / "instella_t2i" / "configs"
ENCODER = REPOSITORY / "instella_t2i" / "pretrained" / "captions"
TEACHER = REPOSITORY / "ldm" / "pretrained" / "emoji64"
FILES = {"small": "small.yaml", "released": "paper.yaml"}
SIZES = {"small": 32, "released": 4}  # samples of a step
STEP_SPEEDUP, GRID_SPEEDUP, CACHE_SPEEDUP = 1.3, 3.0, 4.0
FEW, GRID = 8, 64  # tokens
DRAWN = 16  # pictures at once
CAPTIONS = (
    "red heart, flat style",
    "woman astronaut, shaded style",
    "a blue ring above a green cross",
    "clock, blob style",
)


def config_of(size: str) -> InstellaConfig:
    """The options of a size's configuration file."""
    return parse_config(InstellaConfig, None, "", ["--config", str(CONFIGS / FILES[size])])[0]


def recipe(size: str) -> InstellaConfig:
    """The run's options, with the language model that comes along."""
    config = config_of(size)
    config.text = replace(config.text, encoder=str(ENCODER), cache_gb=1.0)
    return config


def given(arm: Arm, config: InstellaConfig) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """(uint8 pictures, captions, t, uniforms): the same on both sides."""
    torch.manual_seed(1)
    count, side, network = SIZES[arm.size], config.data.size, config.network
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    t, uniform = torch.rand(count), torch.rand(count, network.tokens, network.bits)
    return images.to(arm.device), prompts, t.to(arm.device), uniform.to(arm.device)


def denoiser(config: InstellaConfig, width: int, tokens: int | None = None) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(config.stream, Shape(tokens or config.network.tokens, config.network.bits, width))


def tokenizer_of(config: InstellaConfig) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(config.network, config.data.size).eval().requires_grad_(False)


def ours(arm: Arm) -> Step:
    """The trainer's own step, without Lightning around it: codes and features lie ready."""
    config = recipe(arm.size)
    images, prompts, t, uniform = given(arm, config)
    tokens, bits = config.network.tokens, config.network.bits
    packed = pack_bits(tokenizer_of(config).to(arm.device).encode(to_unit(images))).to(arm.device)
    reader = CausalText(config.text, config.stream.layers, arm.device)
    table, numbers = FeatureTable(reader, prompts), torch.arange(len(prompts))
    network = denoiser(config, reader.width).to(arm.device)
    if arm.compiled:  # what the trainer does with --trainer.compile true
        network.compile()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, foreach=True)

    def step(_: int) -> Tensor:
        x0 = unpack_bits(packed, tokens, bits)
        x = add_noise(x0, training_times(t, "logistic_normal"), uniform)
        with mixed(arm.device, arm.bf16):
            net = network(x, training_times(t, "logistic_normal"), table(numbers).to(arm.device))
            loss = diffusion_loss(net, x, x0, "epsilon")[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def peer(arm: Arm) -> Step:
    """The plain loop, with torch's own layers."""
    config = recipe(arm.size)
    images, prompts, t, uniform = given(arm, config)
    tokenizer = plain_products(tokenizer_of(config)).to(arm.device)
    reader = CausalText(config.text, config.stream.layers, arm.device)
    network = plain_products(denoiser(config, reader.width)).to(arm.device)
    call = torch.compile(network) if arm.compiled else network
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)

    def step(_: int) -> Tensor:
        with mixed(arm.device, arm.bf16):
            x0 = tokenizer.encode(to_unit(images)).float()
            text = reader.encode(prompts).to(arm.device)
            x = add_noise(x0, torch.sigmoid(torch.special.ndtri(t)), uniform)
            net = call(x, torch.sigmoid(torch.special.ndtri(t)), text)
            loss = diffusion_loss(net, x, x0, "epsilon")[0]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    return step


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a size."""
    config, count = recipe(size), SIZES[size]
    reader = CausalText(config.text, config.stream.layers)

    @torch.no_grad()
    def work() -> float:
        text, network = reader.encode(given(Arm("ours", size, "cpu"), config)[1]), denoiser(config, reader.width)
        x = torch.zeros(count, config.network.tokens, config.network.bits)
        return 3 * flop(lambda: network(x, torch.zeros(count), text))

    label, step = "training step of the denoiser against a plain loop", "denoiser's training step"
    given_to = ("benchmarks.instella_generators", size, device, folder, pace, count)
    yield training_rows(*given_to, label, STEP_SPEEDUP, work, step)[0]
    yield [grid_row(config, reader, device, f"{size}, batch {count}", max(3, pace.rounds))]
    yield [cache_row(config, reader, device, size, max(3, pace.rounds))]
    if size == "small":
        yield drawing_rows(config, reader, device, max(3, pace.rounds))


def grid_row(config: InstellaConfig, reader: CausalText, device: str, what: str, rounds: int) -> dict[str, Any]:
    """A training step with few tokens against the grid's, same width and captions."""
    count = int(what.rpartition(" ")[2])
    text = reader.encode([CAPTIONS[i % len(CAPTIONS)] for i in range(count)]).to(device)

    def arm(tokens: int) -> Callable[[], object]:
        network = denoiser(config, reader.width, tokens).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), foreach=True)
        x0 = (torch.rand(count, tokens, config.network.bits, device=device) < 0.5).float()
        t = torch.rand(count, device=device)

        def step() -> None:
            loss, _ = diffusion_loss(network(x0, t, text), x0, x0, "epsilon")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return step

    found = in_turns({"few": arm(FEW), "grid": arm(GRID)}, rounds, device)
    name = f"{where_of(device)}training the denoiser with {FEW} tokens against a grid of {GRID}, same width ({what})"
    return bench_row(name, count / found["few"], count / found["grid"], "images/s", target=GRID_SPEEDUP)


def cache_row(config: InstellaConfig, reader: CausalText, device: str, size: str, rounds: int) -> dict[str, Any]:
    """Autoregression with kept keys against whole passes; the bits are compared."""
    torch.manual_seed(0)
    network = config.network
    model = Autoregressor(config.stream, Shape(network.tokens, network.bits, reader.width)).eval().to(device)
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(DRAWN)]
    memory = model.requires_grad_(False).read_text(reader.encode([*prompts, *[""] * DRAWN]).to(device))
    uniform = torch.rand(DRAWN, network.tokens, network.bits, device=device)
    codes: dict[str, Tensor] = {}

    def arm(name: str) -> Callable[[], object]:
        def draw() -> None:
            codes[name] = autoregression.sample(model, memory, uniform, w=1.5, cached=name == "cached")

        return draw

    found = in_turns({name: arm(name) for name in ("cached", "whole")}, rounds, device)
    equal = float((codes["cached"] == codes["whole"]).float().mean())
    what = f"{network.tokens} tokens ({size}, batch {DRAWN})"
    name = f"{where_of(device)}autoregression with kept keys against whole passes, {what}"
    row = bench_row(name, DRAWN / found["cached"], DRAWN / found["whole"], "images/s", target=CACHE_SPEEDUP)
    return noted(row, f"{equal:.2%} of the sampled bits are the same")


def drawing_rows(config: InstellaConfig, reader: CausalText, device: str, rounds: int) -> list[dict[str, Any]]:
    """Captions to pictures, both ways, beside latent diffusion with its best sampler."""
    torch.manual_seed(0)
    tokenizer, sampling, network = tokenizer_of(config).to(device), config.sampling, config.network
    shape = Shape(network.tokens, network.bits, reader.width)
    models = [kind(config.stream, shape).eval().requires_grad_(False).to(device) for kind in (Denoiser, Autoregressor)]
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(DRAWN)]
    pipeline = stock_pipeline(Teacher.load(TEACHER, device), "DPMSolverMultistepScheduler")

    @torch.no_grad()
    def draw(model: Denoiser | Autoregressor) -> Tensor:
        memory = model.read_text(reader.encode([*prompts, *[""] * DRAWN]).to(device))
        if isinstance(model, Denoiser):
            uniform = torch.rand(sampling.steps, DRAWN, network.tokens, network.bits, device=device)
            codes = sample(lambda x, t: model(x, t, memory), uniform, w=sampling.guidance)
        else:
            uniform = torch.rand(DRAWN, network.tokens, network.bits, device=device)
            codes = autoregression.sample(model, memory, uniform, w=sampling.ar_guidance)
        return to_uint8(tokenizer.decode(codes, config.data.size))

    found = in_turns(
        {
            "diffusion": lambda: draw(models[0]),
            "autoregression": lambda: draw(models[1]),
            "peer": lambda: pipeline(prompts, num_inference_steps=20, guidance_scale=3.0, output_type="np"),
        },
        rounds,
        device,
    )
    label = f"against latent diffusion in 20 guided steps (64 px, batch {DRAWN})"
    return [
        bench_row(
            f"{where_of(device)}drawing by {kind} {label}", DRAWN / found[kind], DRAWN / found["peer"], "images/s"
        )
        for kind in ("diffusion", "autoregression")
    ]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = bench_parser(__doc__, "bench_instella_t2i.json", SIZES, ["small"], steps=3)
    return serve_or_measure(parse(parser, argv), {"ours": ours, "peer": peer}, parts)


if __name__ == "__main__":
    run_main(main)
