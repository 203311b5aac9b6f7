"""Captioned pictures and their latents: drawn scenes, emoji, or the user's own.

Shape suffixes: N pictures, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.data.cache import FeatureCache, fingerprint_strings
from common.data.rows import FEWEST_IMAGES, hold_out
from common.data.sampling import LazyTable, Table, TensorTable
from common.errors import UserError
from common.paths import cache_dir
from common.teacher import Teacher, module_checksum

Part = Literal["train", "test"]
IN_MEMORY = 2**31  # bytes of latents that are held in memory; larger sets stay in the cache's files


@dataclass
class Captioned:
    """Pictures of one part.

    Args:
        images: numbers -> uint8 [n, 3, H, W].
        fingerprint: of pictures and order.
    """

    captions: list[str]
    images: Callable[[list[int]], Tensor]
    fingerprint: str


def open_captioned(
    name: str,
    part: Part,
    size: int,
    limit: int,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    seed: int = 0,
    option: str = "--data.path",
) -> Captioned:
    """Pictures framed to `size` pixels; train and test share none.

    Args:
        name: shapes, emoji, or the user's own: an image folder with captions, a parquet file or a data set's name.
        limit: how many are drawn (shapes), or at most taken (the others); 0 takes all.
        image_column, text_column: of a table; found by themselves where there is one candidate.
        option: that named them, for messages.

    Raises:
        UserError: an option or a file of the user's is wrong.
    """
    if name == "shapes":
        from common.data.shapes import Shapes

        scenes = Shapes(part, limit, size)
        pixels = torch.from_numpy(np.ascontiguousarray(scenes.images))
        return Captioned(list(scenes.captions), lambda rows: pixels[rows], f"shapes-{part}-{limit}-{size}")
    if name == "emoji":
        from common.data.emoji import EmojiCap

        emoji = EmojiCap(part, size=size)
        items = [emoji[i] for i in range(min(len(emoji), limit or len(emoji)))]
        pixels = torch.stack([item["image"] for item in items])
        captions = [item["caption"] for item in items]
        return Captioned(captions, lambda rows: pixels[rows], fingerprint_strings([f"emoji-{size}", *captions]))
    from common.data.folders import Framing, Images, need_words, open_source

    source = open_source(name, image=image_column, text=text_column)
    rows, held_out = hold_out(source)
    if not held_out:
        raise UserError(f"{option} {name}: {len(source)} pictures are too few; expected {FEWEST_IMAGES} or more")
    chosen = (rows if part == "train" else held_out)[: limit or None]
    need_words(source, chosen)
    images = Images(source, Framing(size), seed).part(chosen)
    return Captioned(
        images.captions(),
        lambda rows: torch.stack([images[row]["image"] for row in rows]),
        images.fingerprint,
    )


def latents(pictures: Captioned, teacher: Teacher, progress: bool = True) -> Table:
    """Latents (posterior means, scaled as the U-Net sees them) with their captions' numbers: columns x1 and prompt.

    Encoded once and kept in the cache, by autoencoder and pictures.
    """
    encoder = fingerprint_strings([module_checksum(teacher.vae), str(teacher.vae.config.scaling_factor)])

    def encode(rows: list[int]) -> dict[str, Tensor]:
        return {"x1": teacher.encode_images(pictures.images(rows).float() / 127.5 - 1).cpu()}

    folder = cache_dir("latents", fingerprint_strings([encoder, pictures.fingerprint])[:16])
    count = len(pictures.captions)
    cache = FeatureCache.open_or_build(folder, count, encoder, pictures.fingerprint, encode, progress=progress)
    if cache[0]["x1"].nbytes * count <= IN_MEMORY:
        return TensorTable({"x1": cache[slice(None)]["x1"], "prompt": torch.arange(count)})
    return LazyTable(count, lambda i: {"x1": cache[i]["x1"], "prompt": torch.tensor(i)})
