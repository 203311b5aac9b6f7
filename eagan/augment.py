"""Random changes of real and generated pictures before the discriminator, through which gradients flow.

Not in the paper: sets of few thousand pictures are learned by heart without it (Zhao et al. 2020, DiffAugment). Every
record of a run says which changes were made.

Shape suffixes: B batch, C channels, H W sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eagan.config import Change

SHIFT = 1 / 8  # of the side, at most
CUT = 1 / 2  # side of the square that is blanked out


def augmented(x_BCHW: Tensor, changes: Sequence[Change], generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1] changed in the order colour, translation, cutout; draws come from `generator` (a CPU's)."""
    for name in ("colour", "translation", "cutout"):
        if name in changes:
            draws_B3 = torch.rand(len(x_BCHW), 3, generator=generator).to(x_BCHW.device)
            x_BCHW = {"colour": _colour, "translation": _translation, "cutout": _cutout}[name](x_BCHW, draws_B3)
    return x_BCHW


def _colour(x_BCHW: Tensor, draws_B3: Tensor) -> Tensor:
    """Brightness by up to 0.5 either way, then saturation by 0 to 2 and contrast by 0.5 to 1.5."""
    brightness, saturation, contrast = draws_B3.T[:, :, None, None, None]
    x_BCHW = x_BCHW + (brightness - 0.5)
    grey = x_BCHW.mean(1, keepdim=True)
    x_BCHW = grey + (x_BCHW - grey) * (2 * saturation)
    mean = x_BCHW.mean((1, 2, 3), keepdim=True)
    return mean + (x_BCHW - mean) * (contrast + 0.5)


def _translation(x_BCHW: Tensor, draws_B3: Tensor) -> Tensor:
    """Shifted by whole pixels; what comes in is zero, mid-grey."""
    height, width = x_BCHW.shape[2:]
    margin = int(SHIFT * height + 0.5)
    shift_B2 = (draws_B3[:, :2] * (2 * margin + 1)).long().clamp_max(2 * margin)
    row_BH = shift_B2[:, :1] + torch.arange(height, device=x_BCHW.device)
    column_BW = shift_B2[:, 1:] + torch.arange(width, device=x_BCHW.device)
    sample_B = torch.arange(len(x_BCHW), device=x_BCHW.device)[:, None, None]
    padded = F.pad(x_BCHW, (margin,) * 4).permute(0, 2, 3, 1)
    return padded[sample_B, row_BH[:, :, None], column_BW[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x_BCHW: Tensor, draws_B3: Tensor) -> Tensor:
    """A square with its centre anywhere is blanked out."""
    height, width = x_BCHW.shape[2:]
    half = CUT * height / 2
    row_BH = (torch.arange(height, device=x_BCHW.device) - draws_B3[:, :1] * height).abs() >= half
    column_BW = (torch.arange(width, device=x_BCHW.device) - draws_B3[:, 1:2] * width).abs() >= half
    return x_BCHW * (row_BH[:, :, None] | column_BW[:, None, :])[:, None]
