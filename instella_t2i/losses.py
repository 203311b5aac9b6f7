"""Losses of the tokenizer's first stage, and how well its codes are used.

Shape suffixes: B batch, C channels, H, W pictures; N codes, L tokens, D bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEAD = 0.01  # share of the rarer value below which a bit says nothing
FEW_ALIVE, FEW_JOINT = 0.5, 0.1  # shares below which codes are said to die


class Discriminator(nn.Module):
    """PatchGAN: a logit for every overlapping patch, by four 4 x 4 convolutions, three of them strided.

    Group norms in place of batch norms: its judgement of a picture depends on no other picture of the batch.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(2):
            before, after = width * 2**number, width * 2 ** (number + 1)
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(1, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width * 4, 1, 3, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: 1/2 (mean max(0, 1 - D(x)) + mean max(0, 1 + D(reconstruction)))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def gan_weight(step: int, start: int, warmup: int) -> float:
    """0 before the discriminator's start, then rising linearly to 1 over `warmup` steps."""
    return 0.0 if step < start else min(1.0, (step - start + 1) / (warmup + 1))


def pixel_loss(x_BCHW: Tensor, y_BCHW: Tensor, beta: float) -> Tensor:
    """Smooth L1: quadratic below `beta`, linear above."""
    return F.smooth_l1_loss(y_BCHW.float(), x_BCHW.float(), beta=beta)


def temperature(step: int, steps: int, start: float, end: float, share: float) -> float:
    """tau of the Bernoulli noise: from `start` to `end` linearly over `share` of the steps, then `end`."""
    return start + (end - start) * min(1.0, step / max(1.0, share * steps))


@torch.no_grad()
def code_usage(codes_NLD: Tensor) -> dict[str, float]:
    """How many of the bits carry something, over N pictures.

    Returns:
        live_bits: share of the (token, bit) places whose rarer value makes up more than 1 %; bit_entropy: mean entropy
        of a place, in bits; joint_entropy: entropy of whole tokens as they occur, in bits, and joint_share: over the
        most that so many tokens can show; distinct: share of the pictures whose codes no other picture has.
    """
    pictures, tokens, bits = codes_NLD.shape
    p_LD = codes_NLD.float().mean(0)
    rarer_LD = torch.minimum(p_LD, 1 - p_LD)
    entropy_LD = (torch.special.entr(p_LD) + torch.special.entr(1 - p_LD)) / math.log(2)
    _, counts = torch.unique(codes_NLD.flatten(0, 1).bool(), dim=0, return_counts=True)
    share = counts.double() / counts.sum()
    joint = float(-(share * share.log2()).sum())
    most = min(math.log2(max(2, pictures * tokens)), bits)
    _, twins = torch.unique(codes_NLD.flatten(1).bool(), dim=0, return_counts=True)
    return {
        "live_bits": float((rarer_LD > DEAD).float().mean()),
        "bit_entropy": float(entropy_LD.mean()),
        "joint_entropy": joint,
        "joint_share": joint / most,
        "distinct": float((twins == 1).sum()) / pictures,
    }


def dying(usage: dict[str, float]) -> str:
    """One sentence where codes die, else nothing."""
    if usage["live_bits"] >= FEW_ALIVE and usage["joint_share"] >= FEW_JOINT:
        return ""
    return (
        f"codes are dying: {usage['live_bits']:.0%} of the bits vary, whole tokens have {usage['joint_share']:.0%} of "
        "the entropy they could have; a lower --tokenizer.lr, a smaller --tokenizer.code or a longer "
        "--tokenizer.tau_share help"
    )
