"""Conditioners: facts that the recorded cases do not cover."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.conditioners import (
    ClassEmbedder,
    LayoutObject,
    LayoutTokenizer,
    SpatialRescaler,
    TransformerEmbedder,
    retrieve,
)
from tests.refusals import refused


def test_class_is_one_token_and_the_last_class_is_null() -> None:
    embedder = ClassEmbedder(8, n_classes=1001)
    tokens = embedder(torch.tensor([3, 1000]))
    assert tokens.shape == (2, 1, 8)
    assert torch.equal(tokens[1, 0], embedder.embedding.weight[1000])


def test_every_text_token_sees_every_other() -> None:
    tau = TransformerEmbedder(16, 2, vocab_size=20, max_seq_len=6).eval()
    tokens = torch.arange(6)[None]
    changed = tokens.clone()
    changed[0, 5] = 19
    assert (tau(tokens) - tau(changed)).abs().amax(dim=2).min() > 1e-4


def test_unused_logits_head_of_official_checkpoints_is_skipped() -> None:
    official = TransformerEmbedder(16, 1, vocab_size=20, max_seq_len=6, logits_head=True)
    ours = TransformerEmbedder(16, 1, vocab_size=20, max_seq_len=6)
    state = official.state_dict()
    assert "transformer.to_logits.weight" in state
    ours.load_state_dict(state)
    tokens = torch.arange(6)[None]
    assert torch.equal(ours(tokens), official(tokens))
    with pytest.raises(RuntimeError, match="something"):
        ours.load_state_dict({**state, "transformer.something": torch.zeros(1)})


def test_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens"):
        TransformerEmbedder(16, 1, vocab_size=20, max_seq_len=6)(torch.zeros(1, 7, dtype=torch.long))


def test_rescaler_halves_step_by_step_without_smoothing() -> None:
    x = torch.randn(1, 2, 16, 16)
    halved = SpatialRescaler(n_stages=2, in_channels=2)(x)
    # Bilinear halving is the mean of 2x2 cells; twice is the mean of 4x4, which quartering at once is not.
    torch.testing.assert_close(halved, F.avg_pool2d(x, 4))
    assert not torch.allclose(halved, F.interpolate(x, scale_factor=0.25, mode="bilinear"))
    assert SpatialRescaler(1, in_channels=2, out_channels=5)(x).shape == (1, 5, 8, 8)


def test_published_layouts_have_92_tokens_on_a_grid_of_90_cells() -> None:
    published = LayoutTokenizer(n_categories=600)
    assert (published.length, published.cells, published.padding) == (92, 90, 8191)


@pytest.mark.parametrize("flip", [False, True])
def test_layouts_survive_encoding_up_to_the_grid(flip: bool) -> None:
    tokenizer = LayoutTokenizer(n_categories=10, max_objects=4, no_tokens=1024, use_additional_parameters=True)
    objects = [
        LayoutObject(3, (0.1, 0.2, 0.5, 0.3), is_group_of=True),
        LayoutObject(9, (0.0, 0.0, 1.0, 1.0), is_occluded=True, is_inside=True),
    ]
    crop = (0.05, 0.1, 0.8, 0.9)
    tokens = tokenizer.encode_objects(objects, crop, flip)
    assert tokens[6:12] == [1023] * 6
    decoded, decoded_crop = tokenizer.decode(tokens)
    assert decoded_crop is not None
    for got, expected in zip([*(o.box for o in decoded), decoded_crop], [*(o.box for o in objects), crop], strict=True):
        left = 1 - expected[0] - expected[2] if flip else expected[0]
        assert got == pytest.approx((left, *expected[1:]), abs=1 / 31)
    flags = ("category", "is_group_of", "is_occluded", "is_depiction", "is_inside")
    assert [[getattr(o, f) for f in flags] for o in decoded] == [[getattr(o, f) for f in flags] for o in objects]


def test_objects_outside_the_crop_and_beyond_the_limit_are_dropped() -> None:
    tokenizer = LayoutTokenizer(n_categories=5, max_objects=2, no_tokens=100, encode_crop=False)
    boxes = [(0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 0.5, 0.5), (0.6, 0.6, 0.1, 0.1)]
    decoded, crop = tokenizer.decode(tokenizer.encode([0, 1, 2], boxes, crop=(0.5, 0.5, 0.5, 0.5)))
    assert [o.category for o in decoded] == [1]
    assert decoded[0].box == pytest.approx((0, 0, 1, 1))
    assert crop is None


def test_shuffling_keeps_the_set_of_objects() -> None:
    tokenizer = LayoutTokenizer(n_categories=50, max_objects=20, no_tokens=400)
    boxes = [(i / 20, 0.1, 0.05, 0.5) for i in range(20)]
    plain = tokenizer.encode(list(range(20)), boxes)
    shuffled = tokenizer.encode(list(range(20)), boxes, generator=torch.Generator().manual_seed(0))
    triples = [{tuple(t[i : i + 3]) for i in range(0, 60, 3)} for t in (plain, shuffled)]
    assert plain != shuffled
    assert triples[0] == triples[1]


def test_impossible_layouts_are_refused() -> None:
    refused("raise no_tokens", LayoutTokenizer, n_categories=600, no_tokens=1024)
    tokenizer = LayoutTokenizer(n_categories=5, no_tokens=100)
    refused(r"class 5 is outside 0\.\.4", tokenizer.encode, [5], [(0, 0, 1, 1)])
    refused("3 tokens, expected 92", tokenizer.decode, [1, 2, 3])


def test_retrieval_finds_the_same_neighbours_in_chunks() -> None:
    database, query = torch.randn(40, 6), torch.randn(3, 2, 6)
    whole, parts = retrieve(query, database, 5), retrieve(query, database, 5, chunk=4)
    assert torch.equal(whole.neighbours, parts.neighbours)
    similarity = F.normalize(query[:, 0], dim=-1) @ F.normalize(database, dim=-1).T
    assert torch.equal(whole.neighbours, similarity.argsort(dim=1, descending=True)[:, :5])
    assert torch.equal(whole.context[:, :2], query)
    torch.testing.assert_close(whole.context[:, 2:].norm(dim=-1), torch.ones(3, 5))
    refused("41 neighbours", retrieve, query, database, 41)
