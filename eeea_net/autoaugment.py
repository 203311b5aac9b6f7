"""AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019, table 7): 25 pairs of operations, each with its probability and
strength. Strengths are those of the published ranges, filled with grey 128 where a picture is moved.

Shape suffixes: B batch, C channels, H W sides in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

GREY = 128
# (operation, probability, strength 0..9) twice a line.
POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)
ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
    "brightness": ImageEnhance.Brightness,
}


def apply(picture: Image.Image, name: str, strength: int, sign: int) -> Image.Image:
    """One operation; `sign` is the direction of those that have two.

    Ranges over strengths 0 to 9: shear 0.3, translation 150/331 of the side, rotation 30 degrees, enhancement by 0.9,
    posterisation from 8 to 4 bits, solarisation from 256 to 0.
    """
    share = strength / 9
    if name in ENHANCERS:
        return ENHANCERS[name](picture).enhance(1 + sign * 0.9 * share)
    if name == "rotate":
        return picture.rotate(sign * 30 * share, fillcolor=_grey(picture))
    if name in ("shear_y", "translate_x", "translate_y"):
        amount = sign * share * (0.3 if name.startswith("shear") else 150 / 331 * picture.width)
        rows = {
            "shear_y": (1, 0, 0, amount, 1, 0),
            "translate_x": (1, 0, amount, 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, amount),
        }
        resample = Image.Resampling.BICUBIC if name.startswith("shear") else Image.Resampling.NEAREST
        return picture.transform(picture.size, Image.Transform.AFFINE, rows[name], resample, fillcolor=_grey(picture))
    if name == "posterize":
        return ImageOps.posterize(picture, round(8 - 4 * share))
    if name == "solarize":
        return ImageOps.solarize(picture, math.floor(256 - 256 * share))
    return {"invert": ImageOps.invert, "equalize": ImageOps.equalize, "autocontrast": ImageOps.autocontrast}[name](
        picture
    )


def _grey(picture: Image.Image) -> int | tuple[int, ...]:
    return GREY if picture.mode == "L" else (GREY,) * len(picture.getbands())


def cifar_policy(x_BCHW: Tensor, draws_BD: Tensor) -> Tensor:
    """The policy on uint8 pictures.

    Args:
        draws_BD: [B, 8] uniform numbers: which pair, then whether and in which direction each of the two.
    """
    changed = []
    for x_CHW, draw in zip(x_BCHW, draws_BD.tolist()):
        pair = POLICY[min(int(draw[0] * len(POLICY)), len(POLICY) - 1)]
        array = x_CHW.permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        for (name, probability, strength), whether, direction in zip(pair, draw[1:3], draw[3:5]):
            if whether < probability:
                picture = apply(picture, name, strength, 1 if direction < 0.5 else -1)
        values = np.array(picture)
        changed.append(torch.from_numpy(values[:, :, None] if values.ndim == 2 else values).permute(2, 0, 1))
    return torch.stack(changed)
