"""Inpainting masks in the style of LaMa (appendix E.2.2), deterministic from a seed; 1 marks what is to be painted.

Inside the model a mask is -1 (known) and +1 (to be painted), resized to the latent's size by nearest neighbour, and
the pixels to be painted are black (-1) before encoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from common.errors import UserError

MaskKind = Literal["mixed", "irregular", "boxes", "outpainting"]


def _strokes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One to five random walks of thick, rounded lines."""
    side = min(height, width)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        thickness = max(1.0, rng.uniform(0.06, 0.2) * side)
        angle = rng.uniform(0, 2 * math.pi)
        for _ in range(rng.integers(2, 7)):
            angle += rng.uniform(-1.2, 1.2)
            length = rng.uniform(0.1, 0.4) * side
            to_x = float(np.clip(x + length * math.cos(angle), 0, width))
            to_y = float(np.clip(y + length * math.sin(angle), 0, height))
            pen.line((x, y, to_x, to_y), fill=1, width=max(1, round(thickness)))
            for cx, cy in ((x, y), (to_x, to_y)):
                radius = thickness / 2
                pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=1)
            x, y = to_x, to_y
    return np.asarray(canvas)


def _boxes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One to four rectangles of 15 to 60 % of each side."""
    mask = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 5)):
        h = max(1, round(rng.uniform(0.15, 0.6) * height))
        w = max(1, round(rng.uniform(0.15, 0.6) * width))
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        mask[y : y + h, x : x + w] = 1
    return mask


def _outpainting(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Everything outside a border-touching part: one or two sides of 20 to 50 % are to be painted."""
    mask = np.zeros((height, width), np.uint8)
    for side in rng.permutation(4)[: rng.integers(1, 3)]:
        share = rng.uniform(0.2, 0.5)
        rows, columns = max(1, round(share * height)), max(1, round(share * width))
        if side == 0:
            mask[:rows] = 1
        elif side == 1:
            mask[-rows:] = 1
        elif side == 2:
            mask[:, :columns] = 1
        else:
            mask[:, -columns:] = 1
    return mask


def random_mask(
    size: int | tuple[int, int],
    seed: int,
    kind: MaskKind = "mixed",
    coverage: tuple[float, float] = (0.05, 0.6),
) -> Tensor:
    """Float mask [height, width], 1 where the image is to be painted.

    Args:
        kind: mixed draws strokes or boxes with equal chance (LaMa's training masks), and outpainting once in ten.
        coverage: limits of the painted share; masks outside are drawn again.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 4:
        raise UserError(f"inpainting masks need at least 4 pixels a side, got {height}x{width}")
    rng = np.random.default_rng(seed)
    draw = {"irregular": _strokes, "boxes": _boxes, "outpainting": _outpainting}
    if kind != "mixed" and kind not in draw:
        raise UserError(f"mask kind {kind!r} is unknown: use mixed, irregular, boxes or outpainting")
    for _ in range(100):
        chosen = kind if kind != "mixed" else rng.choice(["irregular", "boxes", "outpainting"], p=[0.45, 0.45, 0.1])
        mask = draw[str(chosen)](rng, height, width)
        if coverage[0] <= mask.mean() <= coverage[1]:
            return torch.from_numpy(mask.astype(np.float32))
    raise UserError(
        f"no {kind} mask covers between {coverage[0]:.0%} and {coverage[1]:.0%} of the image: widen the limits"
    )


def signed_mask(hole: Tensor) -> Tensor:
    """Library. {0, 1} -> {-1, +1}, the form in which the denoiser sees a mask."""
    return hole * 2.0 - 1.0


def resize_mask(mask_B1HW: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest-neighbour resize to the latent's (height, width)."""
    return F.interpolate(mask_B1HW.float(), size=tuple(size), mode="nearest")


def paste_known(painted_BCHW: Tensor, image_BCHW: Tensor, hole_B1HW: Tensor) -> Tensor:
    """The result with the known pixels of the image put back."""
    return torch.where(hole_B1HW > 0.5, painted_BCHW, image_BCHW)


def outpainting_canvas(image_CHW: Tensor, size: tuple[int, int], top: int, left: int) -> tuple[Tensor, Tensor]:
    """Library. Place an image on a larger black canvas [C, H', W']; also the hole around it [1, H', W']."""
    height, width = image_CHW.shape[-2:]
    if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
        raise UserError(f"a {height}x{width} image at ({top}, {left}) does not fit a {size[0]}x{size[1]} canvas")
    canvas = image_CHW.new_full((image_CHW.shape[0], *size), -1.0)
    hole = torch.ones(1, *size, device=image_CHW.device)
    canvas[:, top : top + height, left : left + width] = image_CHW
    hole[:, top : top + height, left : left + width] = 0.0
    return canvas, hole
