"""LightGen's training step against the plain loop, and fast decoding against the official schedule.

    python -m benchmarks.lightgen                          # writes results/bench_lightgen.json; some ten minutes
    python -m benchmarks.lightgen --sizes small --rounds 2 --steps 1
    python -m benchmarks.lightgen --sizes large --devices cuda      # the released network at 256 px, random weights
    python -m benchmarks.lightgen --model runs/lightgen-small/model # scores beside the speeds, over three seeds

Training: equal networks, masks, times and noises. The peer is the released loop as written: every token goes through
cross stage and head, known ones are multiplied by zero, z is projected anew for each of a token's times; eager, and
compiled in the same precision. Decoding: the peer is the released one, 64 iterations of 100 head steps, both halves of
guidance through the whole network, every position, in every iteration; ours is how the model is exported, and beside
it the released schedule with nothing but the exact shortcuts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import (
    Arm,
    Pace,
    Step,
    bench_parser,
    fill_zero_weights,
    in_turns,
    mixed,
    noted,
    parse,
    record,
    serve_or_measure,
    training_rows,
    training_step,
    where_of,
)
from common.data.shapes import prompts
from common.errors import run_main
from common.kernels.products import plain_products
from common.ledger import bench_row
from lightgen.config import NetworkConfig, SamplingConfig
from lightgen.data import WORLDS
from lightgen.diffusion import short_chain
from lightgen.evaluate import measured
from lightgen.head import DiffusionHead
from lightgen.losses import masked_loss
from lightgen.model import Fluid, Grid, gathered, preset, unpatchify
from lightgen.painter import Painter
from lightgen.plan import model_of as on_meta
from lightgen.plan import step_flop
from lightgen.sampler import Noises, Randomness, decode_tokens
from lightgen.schedules import guidance_at, remaining_after

STEP_SPEEDUP, DECODING_SPEEDUP, SEEDS = 1.3, 8.0, 3
OFFICIAL = SamplingConfig(iterations=64, head_steps=100, guidance=4.0)
FAST = SamplingConfig(iterations=12, head_steps=20, last_head_steps=10, guidance=4.0, clip=4.0)
TIMES, MASKED = 4, 0.867  # batch multiplier, mean share of masked tokens


@dataclass(frozen=True)
class Size:
    """Network, latent channels, text width and length, grid, batch of a step, pictures drawn at once."""

    network: NetworkConfig
    channels: int
    text: int
    length: int
    grid: Grid
    batch: int
    drawn: int


_SMALL = NetworkConfig(
    width=160,
    encoder_heads=5,
    decoder_heads=5,
    cross_heads=5,
    encoder_depth=2,
    decoder_depth=3,
    cross_depth=2,
    text_depth=1,
    dropout=0.0,
    grid=4,
    head_width=192,
    head_depth=3,
)
SIZES = {
    "small": Size(_SMALL, 8, 384, 24, (4, 4), 64, 16),
    "grid8": Size(replace(_SMALL, patch=1, grid=8), 8, 384, 24, (8, 8), 16, 4),
    "large": Size(replace(preset("large"), dropout=0.0), 16, 4096, 128, (16, 16), 8, 2),
}


def model_of(size: Size, device: str) -> Fluid:
    """Random weights, none at zero."""
    torch.manual_seed(0)
    model = Fluid(size.network, size.channels, size.text)
    fill_zero_weights(model)
    return model.to(device)


def inputs(size: Size, device: str) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor]:
    """(tokens, order, masked count, states, times, noises): the same on both sides."""
    generator = torch.Generator().manual_seed(1)
    count, token = size.grid[0] * size.grid[1], size.channels * size.network.patch**2
    masked = round(MASKED * count)
    tokens = torch.randn(size.batch, count, token, generator=generator)
    order = torch.rand(size.batch, count, generator=generator).argsort(1)
    states = torch.randn(size.batch, size.length, size.text, generator=generator)
    t = torch.randint(1000, (TIMES, size.batch, count), generator=generator)
    noise = torch.randn(TIMES, size.batch, count, token, generator=generator)
    return tokens.to(device), order.to(device), masked, states.to(device), t.to(device), noise.to(device)


def ours(arm: Arm) -> Step:
    """The trainer's own loss on the masked tokens."""
    size = SIZES[arm.size]
    model = model_of(size, arm.device)
    if arm.compiled:  # what the trainer does with --trainer.compile true
        for block in model.blocks():
            block.compile(dynamic=True)
    tokens, order, count, states, t, noise = inputs(size, arm.device)
    at = order[:, :count]
    t = t.gather(2, at.expand(TIMES, -1, -1))
    noise = noise.gather(2, at[None, :, :, None].expand(TIMES, -1, -1, noise.shape[3]))

    def loss(_: int) -> Tensor:
        with mixed(arm.device, arm.bf16):
            return masked_loss(model, tokens, order, count, model.text(states), t, noise, size.grid)

    return training_step(model, loss, 1e-4, 0.02, fused=True)


def peer(arm: Arm) -> Step:
    """The released loop: all tokens, weighed, with torch's own layers."""
    size = SIZES[arm.size]
    model = plain_products(model_of(size, arm.device))
    tokens, order, count, states, t, noise = inputs(size, arm.device)
    batch, total = order.shape
    known, every = order[:, count:].sort(1)[0], torch.arange(total, device=arm.device).expand(batch, -1)
    mask = torch.zeros(batch, total, device=arm.device).scatter(1, order[:, :count], 1.0)
    head = model.head
    assert isinstance(head, DiffusionHead)

    def forward() -> Tensor:
        x = model.decode(model.encode(tokens, known, size.grid), known, size.grid)
        z = model.conditions(x, every, model.text(states), size.grid)
        rows = z.flatten(0, 1).repeat(TIMES, 1)
        target = tokens.flatten(0, 1).repeat(TIMES, 1)
        weight = mask.flatten().repeat(TIMES)
        each = head.loss(target, rows, t.flatten(), noise.flatten(0, 2))
        return (each * weight).sum() / weight.sum()

    call = torch.compile(forward) if arm.compiled else forward

    def loss(_: int) -> Tensor:
        with mixed(arm.device, arm.bf16):
            return call()

    return training_step(model, loss, 1e-4, 0.02, fused=False)


@torch.no_grad()
def released_decoding(
    model: Fluid, text: Tensor, grid: Grid, options: SamplingConfig, orders: Tensor, noises: Noises
) -> Tensor:
    """As it is written there, but for iterations that draw nothing, in which its head would fail on no rows."""
    batch, total = orders.shape
    tokens, now = torch.zeros(batch, total, model.head.token, device=text.device), total
    every = torch.arange(total, device=text.device).expand(2 * batch, -1)
    chain, head = short_chain(f"{options.head_steps}"), model.head
    assert isinstance(head, DiffusionHead)
    for step, after in enumerate(remaining_after(total, options.iterations)):
        drawn_to = 0 if step == options.iterations - 1 else after
        both, halves = torch.cat([text, model.null(batch, text.shape[1])]), torch.cat([tokens, tokens])
        known = orders[:, now:].sort(1)[0].repeat(2, 1)
        x = model.decode(model.encode(halves, known, grid), known, grid)
        z = model.conditions(x, every, both, grid)
        at = orders[:, drawn_to:now].sort(1)[0]
        if not at.shape[1]:
            continue
        scale = guidance_at(options.guidance, options.guidance_schedule, total, after)
        ddim, device = options.sampler == "ddim", text.device
        start, noise = noises(step, 0 if ddim else len(chain), at.shape[1], head.token)
        start, noises_of = start.flatten(0, 1).to(device), None if ddim else noise.flatten(1, 2).to(device)
        rows = gathered(z, at.repeat(2, 1)).flatten(0, 1)
        drawn = head.sample(rows, chain, start, noises_of, scale, options.temperature, options.clip)
        drawn = drawn.view(batch, -1, head.token)
        tokens, now = tokens.scatter(1, at[:, :, None].expand_as(drawn), drawn), drawn_to
    return tokens


def decoding_rows(name: str, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Pictures a second: ours, and the released schedule with exact shortcuts, against the released decoding."""
    size = SIZES[name]
    model = model_of(size, device).eval()
    draws = Randomness(0, range(size.drawn))
    orders = draws.orders(size.grid[0] * size.grid[1]).to(device)
    with torch.no_grad():
        text = model.text(torch.randn(size.drawn, size.length, size.text, device=device))

    def arm(draw: Any, options: SamplingConfig) -> Callable[[], object]:
        return lambda: draw(model, text, size.grid, options, orders, draws.noises())

    arms = {
        "fast": arm(decode_tokens, FAST),
        "same": arm(decode_tokens, OFFICIAL),
        "peer": arm(released_decoding, OFFICIAL),
    }
    seconds = in_turns(arms, rounds, device)
    what = f"({name}, {size.drawn} pictures of {size.grid[0] * size.grid[1]} tokens)"
    for side, label, target in (
        (
            "fast",
            f"{FAST.iterations} iterations of {FAST.head_steps} to {FAST.last_head_steps} head steps",
            DECODING_SPEEDUP,
        ),
        ("same", "the same schedule with exact shortcuts", None),
    ):
        row = f"{where_of(device)}decoding, {label}, against the released one {what}"
        found = bench_row(row, size.drawn / seconds[side], size.drawn / seconds["peer"], "images/s", target=target)
        yield noted(found, "the peer takes 64 iterations of 100 head steps")


def score_rows(model: Path, per_task: int) -> list[dict[str, Any]]:
    """Speed and overall score of a trained model, ours against the released decoding, over seeds."""
    painter = Painter.load(model)
    specs = prompts(per_task, "test", **WORLDS["small"])
    captions = [spec.caption for spec in specs]
    grid, found = painter.grid(painter.size, painter.size), dict[str, list[float]](ours=[], peer=[])
    fast = painter.sampling
    # The released schedule clips nothing; weights of minutes then draw noise, so it gets the same clip.
    official = replace(OFFICIAL, guidance=fast.guidance, clip=fast.clip)
    seconds = dict.fromkeys(found, 0.0)
    for seed in range(SEEDS):
        for side, draw, options in (("ours", decode_tokens, fast), ("peer", released_decoding, official)):
            started, images = time.perf_counter(), []
            for first in range(0, len(captions), 50):
                chosen = captions[first : first + 50]
                draws = Randomness(seed, range(first, first + len(chosen)))
                orders = draws.orders(grid[0] * grid[1])
                with torch.no_grad():
                    text = painter.model.text(painter.text(chosen))
                tokens = draw(painter.model, text, grid, options, orders, draws.noises())
                images.append(painter.autoencoder.decode(unpatchify(tokens, grid, painter.model.config.patch)))
            seconds[side] += time.perf_counter() - started
            found[side].append(measured(torch.cat(images), captions, specs)["overall"])
    overall = {side: statistics.fmean(values) for side, values in found.items()}
    images_each = SEEDS * len(captions)
    what = f"(trained model, {images_each} pictures, prompt to picture)"
    note = f"{asdict(fast)}; overall per seed: {found}"
    speed = bench_row(
        f"decoding as exported against the released one {what}",
        images_each / seconds["ours"],
        images_each / seconds["peer"],
        "images/s",
        target=DECODING_SPEEDUP,
    )
    # Within one point: the ratio that a score of one point less has.
    bar = (overall["peer"] - 0.01) / overall["peer"] if overall["peer"] > 0 else 1.0
    score = bench_row(f"overall as exported {what}", overall["ours"], overall["peer"], "share of prompts", target=bar)
    return [noted(speed, note), noted(score, note)]


def parts(size: str, device: str, folder: Path, pace: Pace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a size: training speed and memory, share of the peak, decoding."""
    found, label = SIZES[size], "training step against the released loop"

    def work() -> float:
        model = on_meta(found.network, found.channels, found.text)
        return round(found.batch * step_flop(model, found.length, found.grid))

    yield training_rows("benchmarks.lightgen", size, device, folder, pace, found.batch, label, STEP_SPEEDUP, work)[0]
    yield list(decoding_rows(size, device, pace.rounds))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = bench_parser(__doc__, "bench_lightgen.json", SIZES, ["small", "grid8"], steps=3)
    parser.add_argument("--model", type=Path, help="a trained model, whose scores are measured too")
    options = parse(parser, argv)
    rows = serve_or_measure(options, {"ours": ours, "peer": peer}, parts)
    if options.model:
        found = score_rows(options.model, 50)
        record(found, options.output)
        rows += found
    return rows


if __name__ == "__main__":
    run_main(main)
