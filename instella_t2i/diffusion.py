"""Binary diffusion: bits that are replaced by fair coins, and how they are found again (section 2.4 of our notes).

Forward, t in [0, 1]: x_t ~ Bernoulli((1 - t) x_0 + t / 2), bit by bit. The network answers with logits that a bit was
flipped (target epsilon) or that it is set (target x). Draws are `u < p` with uniform numbers u that the caller gives.
Shape suffixes: B batch, K tokens, D bits, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError

Target = Literal["epsilon", "x"]
TimeLaw = Literal["logistic_normal", "uniform"]
Protocol = Literal["renoise", "approximate", "exact"]


def training_times(u_B: Tensor, law: TimeLaw, shift: float = 1.0) -> Tensor:
    """t of uniform numbers: sigmoid of a unit normal (quartiles 0.338, 0.5, 0.662), or the numbers themselves.

    Args:
        shift: s of s t / (1 + (s - 1) t), which moves t towards 1 (ours; 1 leaves it). Where 1,024 bits were replaced
            with t = 0.8 they still carry 30 bits of information, more than any data set needs to name a picture: what
            is drawn is decided at larger t, which the released law draws in one step of twelve.
    """
    t_B = u_B if law == "uniform" else torch.sigmoid(torch.special.ndtri(u_B))
    return t_B if shift == 1 else shift * t_B / (1 + (shift - 1) * t_B)


def keep(t: Tensor | float) -> Tensor | float:
    """1 - t: probability that a bit is still its own at t; else it is a fair coin."""
    return 1 - t


def noised(p: Tensor, t: Tensor | float) -> Tensor:
    """(1 - t) p + t / 2: probability that a bit is set at t where it is set at 0 with probability p."""
    return keep(t) * p + t / 2


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Bernoulli bits [u < p], float."""
    return (u < p).to(p.dtype)


def add_noise(x0_BKD: Tensor, t_B: Tensor, u_BKD: Tensor) -> Tensor:
    """x_t of clean bits."""
    return draw(noised(x0_BKD, t_B[:, None, None]), u_BKD)


def clean_logits(net_BKD: Tensor, x_BKD: Tensor, target: Target) -> Tensor:
    """Logits of x_0: of target epsilon the network's sign is turned where the noisy bit is set."""
    return net_BKD if target == "x" else (1 - 2 * x_BKD) * net_BKD


def diffusion_loss(net_BKD: Tensor, x_BKD: Tensor, x0_BKD: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(binary cross-entropy of x_0, share of bits on the right side), means over everything, in float32."""
    logits_BKD = clean_logits(net_BKD.float(), x_BKD, target)
    accuracy = ((logits_BKD > 0) == (x0_BKD > 0.5)).float().mean()
    return F.binary_cross_entropy_with_logits(logits_BKD, x0_BKD), accuracy


def guided(net: Tensor, w: float, temperature: float) -> Tensor:
    """Probabilities from logits of rows [conditional; unconditional]: divided by the temperature first, then
    (1 + w) c - w u (so the usual guidance scale is 1 + w), then the sigmoid; temperature 0 is its limit, a step."""
    c, u = (net.float() / (temperature or 1.0)).chunk(2)
    logits = (1 + w) * c - w * u
    return torch.sigmoid(logits) if temperature else (logits > 0).float()


def sampling_times(steps: int, rho: float = 1.0) -> Tensor:
    """t_i = (1 - i / N)^rho, from 1 down; after the last comes 0. [N], float32."""
    return (1 - torch.arange(steps, dtype=torch.float64) / steps).pow(rho).float()


def posterior(x_BKD: Tensor, p_BKD: Tensor, kept: float | Tensor) -> Tensor:
    """P(bit set at t' | x at t), by Bayes' rule.

    Args:
        p_BKD: P(bit set at t'), before x was seen.
        kept: probability that a bit keeps its value from t' to t; else it is a fair coin.
    """
    one = p_BKD * (kept * x_BKD + (1 - kept) / 2)
    zero = (1 - p_BKD) * (kept * (1 - x_BKD) + (1 - kept) / 2)
    return one / (one + zero)


def step_back(x_BKD: Tensor, p0_BKD: Tensor, t: float, t_next: float, protocol: Protocol) -> Tensor:
    """Probability that a bit is set at t_next < t, from x at t and P(x_0 = 1).

    renoise (released protocol 1) forgets x; approximate (2) keeps a bit with 1 - (t - t_next) where exact (3) has the
    process's own (1 - t) / (1 - t_next).
    """
    p_BKD = noised(p0_BKD, t_next)
    if protocol == "renoise":
        return p_BKD
    return posterior(x_BKD, p_BKD, 1 - (t - t_next) if protocol == "approximate" else (1 - t) / (1 - t_next))


@torch.no_grad()
def sample(
    net: Callable[[Tensor, Tensor], Tensor],
    uniform_NBKD: Tensor,
    *,
    w: float,
    temperature: float = 1.0,
    rho: float = 1.0,
    protocol: Protocol = "renoise",
    target: Target = "epsilon",
    trace: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Codes [B, K, D] in as many steps as there are uniform numbers; the first of them draw the beginning, fair coins.

    Args:
        net: (bits [2 B, K, D], t [2 B]) -> logits of rows [conditional; unconditional].
        w: of the guidance, see `guided`.
        trace: called with each step's bits [B, K, D] and logits [2 B, K, D].
    """
    times = [*sampling_times(len(uniform_NBKD), rho).tolist(), 0.0]
    z_BKD = draw(torch.full_like(uniform_NBKD[0], 0.5), uniform_NBKD[0])
    for i, (t, t_next) in enumerate(pairwise(times)):
        logits = net(torch.cat([z_BKD, z_BKD]), torch.full((2 * len(z_BKD),), t, device=z_BKD.device))
        if trace is not None:
            trace(z_BKD, logits)
        p = guided(logits, w, temperature)
        p0_BKD = p if target == "x" else p * (1 - z_BKD) + (1 - p) * z_BKD
        if i + 1 == len(uniform_NBKD):
            return (p0_BKD > 0.5).float()
        z_BKD = draw(step_back(z_BKD, p0_BKD, t, t_next, protocol), uniform_NBKD[i + 1])
    raise AssertionError("no steps")


def binary_latent_schedule(steps: int, kind: Literal["linear", "cos", "sigmoid"]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the ancestor, Binary Latent Diffusion, in discrete steps 0 (clean) to N: (k, b, beta), each [N + 1], float64.

    P(x_t = 1) = k_t x_0 + b_t, b = (1 - k) / 2; beta_t = k_t / k_(t-1) is the share kept in step t. `linear` is the
    process above at t = i / N; `cos` and `sigmoid` are the halves of a cosine and of a sigmoid (of 3 t / 0.8, scaled to
    fall from 1 to 0).
    """
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    if kind == "linear":
        k = 1 - share
    elif kind == "cos":
        k = 0.5 * (1 + torch.cos(math.pi * share))
    elif kind == "sigmoid":
        curve = torch.sigmoid(3 * share / 0.8)
        k = (curve[-1] - curve) / (curve[-1] - curve[0])
    else:
        raise UserError(f"schedule {kind!r} of binary latent diffusion: expected linear, cos or sigmoid")
    beta = torch.cat([torch.ones(1, dtype=torch.float64), k[1:] / k[:-1]])
    return k, (1 - k) / 2, beta


def binary_latent_posterior(
    x_BKD: Tensor, p0_BKD: Tensor, k: Tensor, t: Sequence[int], t_prev: Sequence[int]
) -> Tensor:
    """The ancestor's step from t to t_prev (any number of steps), row by row of B."""
    k_t, k_prev = (k[torch.as_tensor(steps)][:, None, None].to(x_BKD.dtype) for steps in (t, t_prev))
    return posterior(x_BKD, k_prev * p0_BKD + (1 - k_prev) / 2, k_t / k_prev)
