"""Preference pairs: the given picture wins, the model's own sample of the same caption loses (section 4.2).

Shape suffixes: N pairs, B batch, C, H, W latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.data.cache import FeatureCache, fingerprint_module, fingerprint_strings
from common.data.sampling import TensorTable
from common.errors import UserError
from common.images import resize_uint8
from lightgen.data import Captioned
from lightgen.painter import Painter

SHARD = 128
LOSER_SEED = 5113  # of the samples that lose: none that is measured
Accept = Callable[[Tensor, Sequence[str]], Sequence[bool]]  # pictures and captions -> which are kept


@dataclass
class Pairs:
    """Latents of winners and losers, never mirrored, with the captions that they share.

    Args:
        table: columns winner, loser [N, C, H, W] and prompt [N], a number of `captions`.
    """

    captions: list[str]
    table: TensorTable

    @property
    def winners(self) -> TensorTable:
        """As the training of the stages reads pictures."""
        columns = self.table.columns
        return TensorTable({"latent": columns["winner"][:, None], "prompt": columns["prompt"]})


def build_pairs(
    painter: Painter, given: Captioned, folder: Path, accept: Accept | None = None, progress: bool = True
) -> Pairs:
    """The pairs of the given pictures, kept below `folder`; what is missing or damaged there is made again.

    Losers go through the autoencoder as winners do: decoded to a picture and encoded.

    Args:
        accept: the hook for a filter of given pictures (the paper asks a vision-language model whether picture and
            caption belong together); None keeps all.

    Raises:
        UserError: the filter leaves nothing.
    """
    size = painter.size
    model = fingerprint_strings([fingerprint_module(painter.model), f"{asdict(painter.sampling)}", f"{LOSER_SEED}"])
    encoder = fingerprint_strings([model, painter.text.fingerprint, painter.autoencoder.fingerprint])

    def make(rows: list[int]) -> dict[str, Tensor]:
        pictures = resize_uint8(given.images(rows), size)
        captions = [given.captions[row] for row in rows]
        good = [True] * len(rows) if accept is None else list(accept(pictures, captions))
        own = painter.draw(captions, LOSER_SEED, first=rows[0])  # a shard's rows follow each other
        return {
            "winner": painter.autoencoder.encode(pictures).cpu(),
            "loser": painter.autoencoder.encode(own).cpu(),
            "kept": torch.tensor(good),
        }

    cache = FeatureCache.open_or_build(folder, len(given), encoder, given.fingerprint, make, SHARD, progress)
    columns = cache[slice(None)]
    kept = columns.pop("kept").nonzero()[:, 0]
    if not len(kept):
        raise UserError("the filter of preferences keeps none of the given pictures")
    table = TensorTable({**{name: column[kept] for name, column in columns.items()}, "prompt": torch.arange(len(kept))})
    return Pairs([given.captions[row] for row in kept.tolist()], table)
