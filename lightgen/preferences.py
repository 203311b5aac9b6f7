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
from common.data.sampling import TensorTable, step_generator
from common.errors import UserError
from common.images import resize_uint8
from lightgen.data import Captioned
from lightgen.diffusion import STEPS
from lightgen.losses import noise_errors, preference
from lightgen.model import Fluid, patchify
from lightgen.painter import Painter
from lightgen.schedules import mask_law, masked_count

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
    # Pairs that were drawn before there was such an option are the same ones.
    sampling = {key: value for key, value in asdict(painter.sampling).items() if key != "head_chain" or value}
    model = fingerprint_strings([fingerprint_module(painter.model), f"{sampling}", f"{LOSER_SEED}"])
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


@torch.no_grad()
def held_out_accuracy(
    policy: Fluid, reference: Fluid, pairs: Pairs, states: Callable[[Tensor], Tensor], seed: int, times: int = 4
) -> dict[str, float]:
    """How a policy judges pairs: implicit accuracy over pairs, and how both raw errors moved.

    Args:
        times: masks, times and noises that each pair's errors are the mean of.
    """
    generator = step_generator(seed, 0)
    patch, columns = policy.config.patch, pairs.table.columns
    grid = (columns["winner"].shape[2] // patch, columns["winner"].shape[3] // patch)
    sides = {name: patchify(columns[name].float(), patch) for name in ("winner", "loser")}
    rows, tokens, width = sides["winner"].shape
    law, text = mask_law(), states(columns["prompt"])
    sums = {(name, side): torch.zeros(rows) for name in ("policy", "reference") for side in sides}
    for _ in range(times):
        count = masked_count(tokens, float(law.ppf(torch.rand((), generator=generator).item())))
        order = torch.rand(rows, tokens, generator=generator).argsort(1)
        t = (torch.rand(rows, 1, generator=generator) * STEPS).long().expand(-1, count)
        noise = torch.randn(rows, count, width, generator=generator)
        for name, model in (("policy", policy), ("reference", reference)):
            aligned = model.text(text)
            for side, found in sides.items():
                sums[name, side] += noise_errors(model, found, order, count, aligned, t, noise, grid) / times
    change = {side: sums["policy", side] - sums["reference", side] for side in sides}
    (policy_w, policy_l), (reference_w, reference_l) = (
        (sums[name, "winner"], sums[name, "loser"]) for name in ("policy", "reference")
    )
    judged = preference(policy_w, policy_l, reference_w, reference_l, beta=1.0)
    return {
        "held_out_accuracy": float(judged.accuracy),
        "winner_change": float(change["winner"].mean()),
        "loser_change": float(change["loser"].mean()),
        "winner_error": float(sums["reference", "winner"].mean()),
        "loser_error": float(sums["reference", "loser"].mean()),
    }
