"""Pictures with captions: emoji, drawn scenes, or the user's own; framed to squares of any size.

Shape suffixes: n pictures, C channels, S side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.data.cache import fingerprint_strings
from common.data.rows import FEWEST_IMAGES, hold_out
from common.data.sampling import LazyTable, Table, TensorTable
from common.errors import UserError
from instella_t2i.config import DataConfig

Part = Literal["train", "test"]
IN_MEMORY = 2**30  # bytes of pictures that are held; more of the user's own are read step by step


@dataclass
class Pictures:
    """Pictures of one part.

    Args:
        captions: one a picture, "" where there is none.
        images: numbers -> uint8 [n, 3, S, S].
        fingerprint: of pictures and order.
    """

    captions: list[str]
    images: Callable[[Sequence[int]], Tensor]
    fingerprint: str
    size: int

    def __len__(self) -> int:
        return len(self.captions)

    def all(self) -> Tensor:
        """All of them, uint8 [n, 3, S, S]."""
        return self.images(range(len(self)))

    def table(self) -> Table:
        """One column, `image`, in memory if it fits."""
        if len(self) * 3 * self.size**2 <= IN_MEMORY:
            return TensorTable({"image": self.all()})
        return LazyTable(len(self), lambda i: {"image": self.images([i])[0]})


def open_pictures(data: DataConfig, part: Part, size: int | None = None, seed: int = 0) -> Pictures:
    """What the `data` options describe; train and test share no picture.

    Args:
        size: side, in place of `data.size`.

    Raises:
        UserError: an option or a file of the user's is wrong.
    """
    size = size or data.size
    limit = data.images if part == "train" else data.eval_images
    if data.name == "shapes":
        from common.data.shapes import Shapes

        scenes = Shapes(part, limit, size)
        pixels = torch.from_numpy(np.ascontiguousarray(scenes.images))
        return Pictures(list(scenes.captions), lambda rows: pixels[[*rows]], f"shapes-{part}-{limit}-{size}", size)
    if data.name == "emoji":
        from common.data.emoji import EmojiCap

        emoji = EmojiCap(part, size=size)
        count = min(len(emoji), limit or len(emoji))
        # Spread over the whole set: its order is that of styles.
        rows = torch.arange(len(emoji)) if count == len(emoji) else torch.arange(count) * len(emoji) // count
        drawn = torch.from_numpy(emoji.images[rows.numpy()]).permute(0, 3, 1, 2).contiguous()
        captions = [emoji.captions[i] for i in rows.tolist()]
        return Pictures(
            captions, lambda rows: drawn[[*rows]], fingerprint_strings([f"emoji-{part}-{size}", *captions]), size
        )
    if data.path is None:
        raise UserError("--data.name folder needs --data.path: an image folder, or a table with pictures")
    from common.data.folders import Framing, Images, open_source

    source = open_source(data.path, image=data.image_column, text=data.text_column)
    kept, held_out = hold_out(source)
    if not held_out:
        raise UserError(
            f"--data.path {data.path}: {len(source)} pictures are too few; expected {FEWEST_IMAGES} or more"
        )
    images = Images(source, Framing(size), seed).part((kept if part == "train" else held_out)[: limit or None])
    return Pictures(
        images.captions(),
        lambda rows: torch.stack([images[row]["image"] for row in rows]),
        images.fingerprint,
        size,
    )
