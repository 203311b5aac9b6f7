"""The training losses: masked tokens (Equation 6) and preferences (Equation 7).

Shape suffixes: B batch, N tokens, M masked ones, P numbers of a token, L text tokens, D width, U times drawn a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lightgen.head import DiffusionHead
from lightgen.model import Fluid, Grid, gathered


def masked_loss(
    model: Fluid,
    tokens_BNP: Tensor,
    order_BN: Tensor,
    count: int,
    text_BLD: Tensor,
    t_UBM: Tensor,
    noise_UBMP: Tensor,
    grid: Grid,
) -> Tensor:
    """Equation 6: the mean over masked tokens and times. What is not masked costs nothing.

    Args:
        count: masked tokens, the first of each sample's order; all of them in raster order.
    """
    if model.config.order == "raster":
        z_BMD, target_BMP = model.causal(tokens_BNP, text_BLD, grid), tokens_BNP
    else:
        z_BMD = model.masked(tokens_BNP, order_BN, count, text_BLD, grid)
        target_BMP = gathered(tokens_BNP, order_BN[:, :count])
    target = target_BMP.flatten(0, 1).repeat(len(t_UBM), 1)
    return model.head.loss(target, z_BMD.flatten(0, 1), t_UBM.flatten(), noise_UBMP.flatten(0, 2)).mean()


def noise_errors(
    model: Fluid,
    tokens_BNP: Tensor,
    order_BN: Tensor,
    count: int,
    text_BLD: Tensor,
    t_BM: Tensor,
    noise_BMP: Tensor,
    grid: Grid,
) -> Tensor:
    """Each sample's mean squared error of the noise over masked tokens [B]: L_d of Equation 7, without the bound."""
    z_BMD = model.masked(tokens_BNP, order_BN, count, text_BLD, grid)
    target_BMP = gathered(tokens_BNP, order_BN[:, :count])
    assert isinstance(model.head, DiffusionHead)
    error_R, _, _ = model.head.terms(
        target_BMP.flatten(0, 1), z_BMD.flatten(0, 1), t_BM.flatten(), noise_BMP.flatten(0, 1)
    )
    return error_R.view(t_BM.shape).mean(1)


@dataclass(frozen=True)
class Preference:
    """What a batch of pairs says.

    Args:
        inside: [B] what the logarithm of the sigmoid is taken of: positive where the winner has gained more.
        loss: mean over pairs.
    """

    inside: Tensor
    loss: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of pairs whose winner has gained more than its loser; a tie is a half."""
        return (self.inside > 0).float().mean() + 0.5 * (self.inside == 0).float().mean()


def preference(policy_w: Tensor, policy_l: Tensor, reference_w: Tensor, reference_l: Tensor, beta: float) -> Preference:
    """Equation 7 in Diffusion-DPO's form, pair by pair, with constant weighting.

    Args:
        policy_w, ...: [B] mean squared errors on winners and losers.
    """
    gain = (policy_w - policy_l) - (reference_w - reference_l)
    inside = -0.5 * beta * gain
    return Preference(inside, -F.logsigmoid(inside).mean())
