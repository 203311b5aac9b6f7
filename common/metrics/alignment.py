"""Does a picture show its caption? A small CLIP-like scorer: frozen Lite0 and MiniLM, two trained MLPs.

    python -m common.metrics.alignment train      # about 5 minutes on one CPU core

The towers map Lite0 features (1280, standardised) and MiniLM sentence vectors (384) to a shared 128-d unit sphere, with
the symmetric contrastive loss of CLIP (Radford et al. 2021, Figure 3). They are trained only on EmojiCap pairs that are
training data in both of its protocols, so that two accuracies on real pairs are honest ceilings for a generator:
`unseen_concepts` (test side of `concept`: what the scorer can do for new prompts) and `unseen_pairs` (test side of
`combo` without those concepts: known concepts in a style it has not seen them in). They travel inside the weight file
and stand beside every score. Never train a generator on the scorer that evaluates it.

Shape suffixes: N pairs, D features, E shared embedding.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.cli import Parser
from common.data.text import TextEncoder
from common.errors import UserError, run_main, stop_if_not_finite
from common.metrics.features import Lite0Extractor, extract
from common.metrics.lite0 import FEATURES
from common.options import Count, Seed
from common.weights import save_weights

if TYPE_CHECKING:
    from common.data.emoji import EmojiCap

WEIGHTS = Path(__file__).with_name("alignment_lite0_minilm.safetensors")
NAME = "lite0-minilm"
TEXT_DIM, EMBEDDING = 384, 128
CANDIDATES = 100

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 1500, 256, 2e-3, 0.1, 0.3
SIZES = (64, 32)  # pixels: both are what the small generators draw
STYLE_DROP = 0.3  # share of training captions without their style words


Scores = dict[str, Any]


class TwoTowers(nn.Module):
    """The trained part: 0.85 M parameters."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        self.image = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(FEATURES, 512), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(512, EMBEDDING)
        )
        self.text = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(TEXT_DIM, 256), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(256, EMBEDDING)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, features_ND: Tensor) -> Tensor:
        """Lite0 features [N,1280] -> unit vectors [N,128]."""
        return F.normalize(self.image((features_ND - self.mean) / self.std), dim=1)

    def embed_texts(self, vectors_ND: Tensor) -> Tensor:
        """MiniLM sentence vectors [N,384] -> unit vectors [N,128]."""
        return F.normalize(self.text(vectors_ND), dim=1)


def rank_scores(
    images_NE: Tensor, texts_NE: Tensor, captions: Sequence[str], candidates: int = CANDIDATES, seed: int = 0
) -> dict[str, float | int]:
    """Retrieval numbers of embedded pairs; distractors are drawn from the other distinct captions of the same set.

    Returns cosine (mean over true pairs), r_at_1 (the own caption beats all of `candidates` - 1 random other ones),
    right_beats_random (mean over those of winning against one), n and the number of candidates really used.
    Raises UserError for fewer than two distinct captions.
    """
    if not len(images_NE) == len(texts_NE) == len(captions):
        raise UserError(f"{len(images_NE)} images but {len(captions)} captions: give one caption per image")
    first = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    if len(first) < 2:
        raise UserError(
            f"text-image alignment needs at least 2 distinct captions, got {len(first)}: score more prompts"
        )  # fmt: skip
    pool_ME = texts_NE[torch.tensor(list(first.values()))]
    position = {caption: index for index, caption in enumerate(first)}
    own_N1 = torch.tensor([position[caption] for caption in captions])[:, None]
    cosines_NM = images_NE @ pool_ME.T
    # The own caption sorts last, so the first columns of a random order are distractors.
    keys_NM = torch.rand(cosines_NM.shape, generator=torch.Generator().manual_seed(seed)).scatter_(1, own_N1, 2.0)
    count = min(candidates, len(first)) - 1
    distractors_NK = cosines_NM.gather(1, keys_NM.argsort(1)[:, :count])
    own_cosine_N1 = cosines_NM.gather(1, own_N1)
    wins_NK = (own_cosine_N1 > distractors_NK + 1e-6).double()  # a tie up to rounding is no win
    return {
        "cosine": own_cosine_N1.double().mean().item(),
        "r_at_1": (wins_NK.min(1).values).mean().item(),
        "right_beats_random": wins_NK.mean().item(),
        "candidates": count + 1,
        "n": len(captions),
    }


class AlignmentScorer:
    """The frozen scorer. `ceiling` holds its own accuracy on real pairs it never saw, see `train`.

    weights: a file made by the train command. Raises UserError when it is missing or not one.
    """

    name = NAME

    def __init__(self, weights: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> None:
        path = Path(weights)
        advice = "make it with `python -m common.metrics.alignment train`"
        if not path.is_file():
            raise UserError(f"{path}: no such file; {advice}")
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
                self.ceiling: dict[str, Any] = json.loads((file.metadata() or {})["ceiling"])
            self.towers = TwoTowers()
            self.towers.load_state_dict(tensors)
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: not the weights of this scorer; {advice}") from error
        self.towers.eval().requires_grad_(False)
        self.images = Lite0Extractor(device=device)
        self.texts = TextEncoder(device=device)

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Captions as unit vectors [N,128]; each distinct caption is encoded once."""
        distinct = list(dict.fromkeys(captions))
        row = {caption: index for index, caption in enumerate(distinct)}
        return self.towers.embed_texts(self.texts.sentence(distinct))[[row[caption] for caption in captions]]

    @torch.no_grad()
    def score_features(self, features_ND: Tensor, captions: Sequence[str], candidates: int = CANDIDATES) -> Scores:
        """`score` for Lite0 features [N,1280] that are already at hand."""
        if len(features_ND) != len(captions):
            raise UserError(f"{len(features_ND)} images but {len(captions)} captions: give one caption per image")
        images_NE, texts_NE = self.towers.embed_images(features_ND), self.embed_texts(captions)
        numbers = rank_scores(images_NE, texts_NE, captions, candidates)
        return {"scorer": self.name, **numbers, "ceiling": self.ceiling}

    def score(
        self, images: Tensor | np.ndarray, captions: Sequence[str], candidates: int = CANDIDATES
    ) -> Scores:  # fmt: skip
        """`rank_scores` of images with their captions, plus the scorer's name and its ceilings.

        images: any form of `common.images.as_uint8`, one caption each.
        """
        if len(images) != len(captions):
            raise UserError(f"{len(images)} images but {len(captions)} captions: give one caption per image")
        return self.score_features(extract(images, self.images), captions, candidates)


def contrastive_loss(cosines_TI: Tensor, matches_TI: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over captions x images where several images may match one caption (and the reverse).

    matches_TI: bool; every row and column holds at least one match, and matches share the probability evenly.
    """
    logits = cosines_TI * log_scale.exp().clamp(max=100)  # the clamp is CLIP's, Section 2.5
    matches = matches_TI.float()
    rows = -(matches / matches.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(matches / matches.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def fit_towers(
    features_SND: Tensor,
    styled_ND: Tensor,
    plain_ND: Tensor,
    concepts_N: Tensor,
    styles_N: Tensor,
    weights_N: Tensor,
    steps: int = STEPS,
    seed: int = 0,
) -> TwoTowers:
    """Train the two MLPs (AdamW, cosine decay) on frozen features.

    features_SND: Lite0 features of N images at S sizes; styled_ND, plain_ND: vectors of the captions with and without
    style words; concepts_N, styles_N: integers that say which captions fit which image; weights_N: sampling weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        towers = TwoTowers().train()
        towers.mean.copy_(features_SND.mean((0, 1)))
        towers.std.copy_(features_SND.std((0, 1)).clamp_min(1e-3))
        optimizer = torch.optim.AdamW(towers.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        batch = min(BATCH, len(styled_ND))
        for step in tqdm(range(steps), desc="alignment scorer", mininterval=1):
            rows = torch.multinomial(weights_N, batch, generator=generator)
            sizes = torch.randint(len(features_SND), (batch,), generator=generator)
            plain = torch.rand(batch, generator=generator) < STYLE_DROP
            texts = torch.where(plain[:, None], plain_ND[rows], styled_ND[rows])
            same_concept = concepts_N[rows][:, None] == concepts_N[rows]
            same_style = styles_N[rows][:, None] == styles_N[rows]
            cosines = towers.embed_texts(texts) @ towers.embed_images(features_SND[sizes, rows]).T
            loss = contrastive_loss(cosines, same_concept & (same_style | plain[:, None]), towers.log_scale)
            stop_if_not_finite(float(loss.detach()), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return towers.eval().requires_grad_(False)


def _emoji_features() -> dict[str, dict[str, Any]]:
    """Frozen features of EmojiCap in three disjoint parts: train, unseen_concepts, unseen_pairs."""
    from common.data.emoji import EmojiCap  # here, so that scoring does not need the data set

    combo_test = {(r.hexcode, r.style) for r in EmojiCap("test", "combo", SIZES[0], skin_tones="all").records}

    def rows(data: EmojiCap, pairs_of_combo_test: bool) -> list[int]:
        return [i for i, r in enumerate(data.records) if ((r.hexcode, r.style) in combo_test) == pairs_of_combo_test]

    def part(split: Literal["train", "test"], tones: Literal["all", "balanced"], combo: bool | None) -> dict[str, Any]:
        sets = [EmojiCap(split, "concept", size, skin_tones=tones) for size in SIZES]
        chosen = list(range(len(sets[0]))) if combo is None else rows(sets[0], combo)
        return _features_of(sets, chosen)

    return {
        "train": part("train", "all", False),
        "unseen_concepts": part("test", "balanced", None),
        "unseen_pairs": part("train", "balanced", True),
    }


def _features_of(sets: Sequence[EmojiCap], rows: Sequence[int]) -> dict[str, Any]:
    """Frozen features of the same rows of one EmojiCap at several sizes, with what `fit_towers` needs."""
    extractor, encoder = Lite0Extractor(), TextEncoder()
    records = [sets[0].records[row] for row in rows]
    parts = []
    for data in sets:
        chunks = [list(rows[start : start + 256]) for start in range(0, len(rows), 256)]
        progress = tqdm(chunks, desc=f"Lite0 features, {data.split}, {data.size} px", mininterval=1)
        parts.append(torch.cat([extract(data.images[chunk], extractor) for chunk in progress]))
    captions = [sets[0].captions[row] for row in rows]
    plain = [record.concept for record in records]
    distinct = list(dict.fromkeys(plain))
    plain_vectors = encoder.sentence(distinct)
    index = {concept: row for row, concept in enumerate(distinct)}
    styles = sorted({record.style for record in records})
    # A skin-tone variant counts as much as its share of the (emoji, style) it belongs to.
    counts = Counter((record.base, record.style) for record in records)
    return {
        "features": torch.stack(parts),
        "captions": captions,
        "styled": encoder.sentence(captions),
        "plain": plain_vectors[[index[concept] for concept in plain]],
        "concepts": torch.tensor([index[concept] for concept in plain]),
        "styles": torch.tensor([styles.index(record.style) for record in records]),
        "weights": torch.tensor([1.0 / counts[record.base, record.style] for record in records]),
    }


def train(output: str | Path = WEIGHTS, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Train on the pairs that neither protocol of EmojiCap holds out, measure on both, save as fp16.

    Returns the ceilings: {"unseen_concepts" | "unseen_pairs": {"64px" | "32px": `rank_scores`}}.
    """
    parts = _emoji_features()
    data = parts.pop("train")
    towers = fit_towers(
        data["features"], data["styled"], data["plain"], data["concepts"], data["styles"], data["weights"], steps, seed
    )
    towers.half().float()  # measure what is stored
    ceiling = {
        name: {
            f"{size}px": rank_scores(
                towers.embed_images(features), towers.embed_texts(part["styled"]), part["captions"]
            )
            for size, features in zip(SIZES, part["features"])
        }
        for name, part in parts.items()
    }
    metadata = {"ceiling": json.dumps(ceiling), "steps": str(steps), "seed": str(seed)}
    save_weights(Path(output), towers.state_dict(), metadata, torch.float16)
    return ceiling


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m common.metrics.alignment", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train the scorer on EmojiCap and store its weights")
    command.add_argument("--output", type=Path, default=WEIGHTS, help="weight file to write")
    command.add_argument("--steps", type=Count, default=STEPS, help="of the optimiser")
    command.add_argument("--seed", type=Seed, default=0, help="of the weights' start and the scenes")
    options = parser.parse_args(arguments)
    ceiling = train(options.output, options.steps, options.seed)
    print(json.dumps(ceiling, indent=2))


if __name__ == "__main__":
    run_main(main)
