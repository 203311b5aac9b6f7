"""The caption scorer: its arithmetic on made-up embeddings, its training on a made-up task, and the shipped weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from common.errors import UserError
from common.metrics.alignment import (
    EMBEDDING,
    TEXT_DIM,
    WEIGHTS,
    AlignmentScorer,
    TwoTowers,
    contrastive_loss,
    fit_towers,
    rank_scores,
)
from common.metrics.lite0 import FEATURES


def unit(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, EMBEDDING, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def scorer() -> AlignmentScorer:
    return AlignmentScorer()


def test_perfect_embeddings_score_one_and_unrelated_ones_score_chance():
    texts = unit(300, 0)
    captions = [f"caption {index}" for index in range(300)]
    perfect = rank_scores(texts, texts, captions)
    assert (perfect["r_at_1"], perfect["right_beats_random"]) == (1.0, 1.0)
    assert perfect["cosine"] == pytest.approx(1.0)
    assert (perfect["candidates"], perfect["n"]) == (100, 300)
    chance = rank_scores(unit(300, 1), texts, captions)
    assert chance["r_at_1"] < 0.05
    assert chance["right_beats_random"] == pytest.approx(0.5, abs=0.06)


def test_images_that_share_a_caption_are_not_each_others_distractors():
    texts = unit(2, 0)[[0, 0, 1, 1]]
    result = rank_scores(texts, texts, ["a", "a", "b", "b"])
    assert result["candidates"] == 2
    assert result["r_at_1"] == 1.0


def test_ties_do_not_count_as_wins():
    same = unit(1, 0).expand(5, -1)
    assert rank_scores(same, same, list("abcde"))["right_beats_random"] == 0.0


def test_contrastive_loss_of_one_to_one_matches_is_clips():
    cosines = torch.tensor([[0.5, 0.1], [-0.2, 0.4]])
    logits, target = cosines * 3.0, torch.arange(2)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss = contrastive_loss(cosines, torch.eye(2).bool(), torch.tensor(math.log(3.0)))
    torch.testing.assert_close(loss, expected)


def test_images_of_one_caption_share_the_target():
    every = torch.ones(3, 3, dtype=torch.bool)
    loss = contrastive_loss(torch.zeros(3, 3), every, torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(3))


def test_towers_learn_a_task_they_can_learn():
    """Concept and style vectors, mixed by fixed random matrices into 'features': held-out noise must not matter."""
    generator = torch.Generator().manual_seed(0)
    concepts, styles = torch.arange(60) // 2, torch.arange(60) % 2
    vectors = torch.randn(60, TEXT_DIM, generator=generator)
    mix = torch.randn(TEXT_DIM, FEATURES, generator=generator) / TEXT_DIM**0.5
    clean = vectors @ mix
    features = torch.stack([clean + 0.3 * torch.randn(clean.shape, generator=generator) for _ in range(2)])
    plain = vectors[concepts * 2]
    towers = fit_towers(features, vectors, plain, concepts, styles, torch.ones(60), steps=60)
    fresh = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    captions = [f"{c} {s}" for c, s in zip(concepts.tolist(), styles.tolist())]
    scores = rank_scores(towers.embed_images(fresh), towers.embed_texts(vectors), captions)
    untrained = TwoTowers().eval()
    blank = rank_scores(untrained.embed_images(fresh), untrained.embed_texts(vectors), captions)
    assert scores["r_at_1"] > 0.8 > 0.3 > blank["r_at_1"]


def test_shipped_weights_are_small_and_state_their_ceilings(scorer):
    assert WEIGHTS.stat().st_size < 4_000_000
    for kind, least in (("unseen_concepts", 0.15), ("unseen_pairs", 0.5)):
        for size in ("64px", "32px"):
            ceiling = scorer.ceiling[kind][size]
            assert ceiling["candidates"] == 100 and ceiling["n"] > 300
            assert least < ceiling["r_at_1"] < 1 and 0.8 < ceiling["right_beats_random"] < 1


def test_shipped_scorer_prefers_true_captions_of_unseen_emoji_and_reports_the_ceilings(scorer):
    from common.data.emoji import EmojiCap

    data = EmojiCap("test", "concept", 32, skin_tones="none")
    rows = list(range(0, len(data), 6))
    images, captions = data.images[rows], [data.captions[row] for row in rows]
    right = scorer.score(images, captions)
    wrong = scorer.score(images, captions[7:] + captions[:7])
    assert right["right_beats_random"] > 0.75 > wrong["right_beats_random"]
    assert right["cosine"] > wrong["cosine"] + 0.1
    assert right["r_at_1"] > wrong["r_at_1"] + 0.1
    assert right["ceiling"] == scorer.ceiling and right["scorer"] == "lite0-minilm"


def test_unusable_input_is_refused(scorer, tmp_path):
    with pytest.raises(UserError, match="2 images but 1 captions"):
        scorer.score(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["one"])
    with pytest.raises(UserError, match="at least 2 distinct captions"):
        rank_scores(unit(3, 0), unit(3, 0), ["same"] * 3)
    other = tmp_path / "other.safetensors"
    with pytest.raises(UserError, match="no such file"):
        AlignmentScorer(other)
    other.write_bytes(b"\x00" * 64)
    with pytest.raises(UserError, match="not the weights of this scorer"):
        AlignmentScorer(other)
