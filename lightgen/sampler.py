"""Decoding: all tokens of a picture in K iterations, each from those drawn before (section 5.1).

What is exact and saves time: encoder and decoder never see the text, so both halves of guidance share them; the cross
stage looks at each position alone, so it runs where a token is drawn now; keys and values of the text are made once;
an iteration that draws nothing is skipped; before the first token all samples are the same one.

Shape suffixes: B batch, N tokens, M tokens drawn now, P numbers of a token, L text tokens, D width, R = B M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.sampling import step_generator
from lightgen.config import SamplingConfig
from lightgen.diffusion import short_chain
from lightgen.head import RegressionHead
from lightgen.model import Fluid, Grid, KeysValues, Mar, gathered
from lightgen.schedules import guidance_at, remaining_after

ORDER, NOISE = 0, 1  # streams of a picture's random numbers
# (number of the iteration, head steps, tokens a sample, numbers of a token) -> start [B, M, P], noises [S, B, M, P]
Noises = Callable[[int, int, int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Randomness:
    """Of some pictures: order and noises are functions of (seed, number of the picture) alone, not of the batch."""

    seed: int
    pictures: Sequence[int]

    def orders(self, tokens: int) -> Tensor:
        """[B, N]: positions in the order in which they are masked; they are drawn from the end on."""
        each = [torch.randperm(tokens, generator=self._generator(ORDER, i)) for i in self.pictures]
        return torch.stack(each)

    def noises(self) -> Noises:
        generators = [self._generator(NOISE, i) for i in self.pictures]

        def draw(_: int, steps: int, count: int, width: int) -> tuple[Tensor, Tensor]:
            both = torch.stack([torch.randn(steps + 1, count, width, generator=g) for g in generators], dim=1)
            return both[0], both[1:]

        return draw

    def _generator(self, stream: int, picture: int) -> torch.Generator:
        return step_generator(self.seed * 2 + stream, picture)


def head_steps_at(options: SamplingConfig, known: float) -> int:
    """Head steps of an iteration before which this share of the tokens is known: late tokens need fewer."""
    last = options.head_steps if options.last_head_steps is None else options.last_head_steps
    return max(1, round(options.head_steps + (last - options.head_steps) * known))


def _drawing(whole: int, iterations: int) -> Iterator[tuple[int, int, int]]:
    """(number, masked tokens before, after) of each iteration that draws something."""
    now = whole
    for step, after in enumerate(remaining_after(whole, iterations)):
        after = 0 if step == iterations - 1 else min(after, now)
        if after < now:
            yield step, now, after
        now = after


@torch.no_grad()
def decode_tokens(
    model: Fluid,
    text_BLD: Tensor,
    grid: Grid,
    options: SamplingConfig,
    order_BN: Tensor,
    noises: Noises,
    known_BNP: Tensor | None = None,
    hole: int | None = None,
    watch: Callable[[int, Tensor, Tensor], object] = lambda *_: None,
) -> Tensor:
    """Tokens [B, N, P] of aligned text.

    Args:
        order_BN: positions of each sample; those at its end are drawn first.
        known_BNP: with `hole`: tokens of a picture; only the first `hole` positions of the order are drawn anew.
        watch: (iteration, z [R or 2 R, D], tokens [B, M, P]) of each iteration that draws.
    """
    batch, length, _ = text_BLD.shape
    count, width = grid[0] * grid[1], model.head.token
    device = text_BLD.device
    guided = options.guidance != 1
    text = torch.cat([text_BLD, model.null(batch, length).to(text_BLD)]) if guided else text_BLD
    made = model.keys_values(text)
    tokens = torch.zeros(batch, count, width, device=device) if known_BNP is None else known_BNP.float().clone()
    if model.config.order == "raster":
        return _raster(model, tokens, made, grid, options, noises, watch)
    order_BN = order_BN.to(device)
    for step, now, after in _drawing(count if hole is None else hole, options.iterations):
        known_BK, at_BM = order_BN[:, now:].sort(1)[0], order_BN[:, after:now].sort(1)[0]
        alike = known_BK.shape[1] == 0  # nothing is known: one sample stands for all
        shown_BK, shown = (known_BK[:1], tokens[:1]) if alike else (known_BK, tokens)
        x_BMD = gathered(model.decode(model.encode(shown, shown_BK, grid), shown_BK, grid), at_BM)
        if guided:
            x_BMD, at = torch.cat([x_BMD, x_BMD]), torch.cat([at_BM, at_BM])
        else:
            at = at_BM
        z_RD = model.conditions(x_BMD, at, made, grid).flatten(0, 1)
        # The last step's ramp ends where the schedule's mask does, at one token.
        scale = guidance_at(options.guidance, options.guidance_schedule, count, max(1, after)) if guided else 1.0
        steps = head_steps_at(options, 1 - now / count)
        drawn_BMP = _drawn(model, z_RD, batch, options, scale, steps, noises, step)
        watch(step, z_RD, drawn_BMP)
        tokens = tokens.scatter(1, at_BM[:, :, None].expand_as(drawn_BMP), drawn_BMP)
    return tokens


@torch.no_grad()
def decode_classes(
    model: Mar,
    labels_B: Tensor | None,
    options: SamplingConfig,
    order_BN: Tensor,
    noises: Noises,
    watch: Callable[[int, Tensor, Tensor], object] = lambda *_: None,
) -> Tensor:
    """Tokens [B, N, P] of classes by MAR, the ancestor; labels None: of no class.

    Args:
        order_BN, noises, watch: as in `decode_tokens`.
    """
    batch, count = order_BN.shape
    guided = options.guidance != 1
    tokens = torch.zeros(batch, count, model.head.token, device=order_BN.device)
    for step, now, after in _drawing(count, options.iterations):
        at_BM = order_BN[:, after:now].sort(1)[0]
        masked_BN = torch.zeros_like(order_BN, dtype=torch.bool).scatter(1, order_BN[:, :now], True)
        halves = (labels_B, None) if guided else (labels_B,)
        z_RD = torch.cat([gathered(model(tokens, masked_BN, half), at_BM).flatten(0, 1) for half in halves])
        scale = guidance_at(options.guidance, options.guidance_schedule, count, max(1, after)) if guided else 1.0
        steps = head_steps_at(options, 1 - now / count)
        drawn_BMP = _drawn(model, z_RD, batch, options, scale, steps, noises, step)
        watch(step, z_RD, drawn_BMP)
        tokens = tokens.scatter(1, at_BM[:, :, None].expand_as(drawn_BMP), drawn_BMP)
    return tokens


def _drawn(
    model: Fluid | Mar,
    z_RD: Tensor,
    batch: int,
    options: SamplingConfig,
    scale: float,
    steps: int,
    noises: Noises,
    iteration: int,
) -> Tensor:
    """Tokens [B, M, P] of their conditions; the rows of the null text stand last."""
    guided = options.guidance != 1
    rows = len(z_RD) // (2 if guided else 1)
    head, shape = model.head, (batch, rows // batch, model.head.token)
    if guided and scale == 1:
        z_RD = z_RD[:rows]
    if isinstance(head, RegressionHead):
        return head.sample(z_RD, scale).view(shape)
    chain = short_chain(options.head_chain or f"{steps}")
    ddim = options.sampler == "ddim"
    start, noise = noises(iteration, 0 if ddim else len(chain), shape[1], shape[2])
    drawn_RP = head.sample(
        z_RD,
        chain,
        start.to(z_RD.device).reshape(rows, -1),
        None if ddim else noise.to(z_RD.device).reshape(len(chain), rows, -1),
        scale,
        options.temperature,
        options.clip,
    )
    return drawn_RP.view(shape)


def _raster(
    model: Fluid,
    tokens: Tensor,
    made: list[KeysValues],
    grid: Grid,
    options: SamplingConfig,
    noises: Noises,
    watch: Callable[[int, Tensor, Tensor], object],
) -> Tensor:
    """A token at a time from the top left on, of a causal network."""
    batch, count, _ = tokens.shape
    guided = options.guidance != 1
    for position in range(count):
        shown = tokens[:, : position + 1]
        z = model.causal(torch.cat([shown, shown]) if guided else shown, made, grid)[:, -1]
        scale = guidance_at(options.guidance, options.guidance_schedule, count, count - position - 1) if guided else 1.0
        drawn = _drawn(model, z, batch, options, scale, head_steps_at(options, position / count), noises, position)
        watch(position, z, drawn)
        tokens[:, position] = drawn[:, 0]
    return tokens
