"""Latent tokens that start out looking at a place each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from instella_t2i.aiming import aim, normal, places, turns
from instella_t2i.tokenizer import Tokenizer, rotary_table, rotate
from tests.instella_t2i.test_tokenizer import TINY

SMALL = replace(
    TINY,
    patch=8,
    tokens=16,
    encoder_heads=4,
    encoder_head_dim=32,
    decoder_head_dim=32,
    axes=[8, 12, 12],
    theta=30.0,
    scale=128.0,
    rotary="pairs",
)


def tokenizers(**changes: Any) -> tuple[Tokenizer, Tokenizer]:
    """As drawn, and aimed."""
    made = []
    for aimed in (False, True):
        torch.manual_seed(0)
        made.append(Tokenizer(replace(SMALL, **changes), size=64).eval())
        if aimed:
            aim(made[-1])
    return made[0], made[1]


def looked_at(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Weights [B, A, K, P] of the first block's attention from latent tokens to image tokens."""
    encoder, config = tokenizer.encoder, tokenizer.config
    image_BPE = encoder.patch_embedder(images).flatten(2).transpose(1, 2)
    x_BLE = torch.cat([encoder.latent_tokens.expand(len(images), -1, -1), image_BPE], 1)
    block, side = encoder.transformer_blocks[0], images.shape[-1] // config.patch
    table = encoder.table(config.tokens, side, side, config.scale and config.scale / config.patch, x_BLE)
    x_BLE = block.input_layernorm(x_BLE)
    q, k = (
        rotate(norm(project(x_BLE).unflatten(-1, (config.encoder_heads, -1)).transpose(1, 2)), table, True)
        for project, norm in ((block.attn.q_proj, block.attn.norm_q), (block.attn.k_proj, block.attn.norm_k))
    )
    scores = q[:, :, : config.tokens] @ k[:, :, config.tokens :].mT / config.encoder_head_dim**0.5
    return scores.softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize(("size", "scale"), [(64, 128.0), (96, 128.0), (64, None)])
def test_every_token_looks_at_its_own_place_in_any_picture(size: int, scale: float | None) -> None:
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn, aimed = (looked_at(tokenizer, images) for tokenizer in tokenizers(scale=scale))
    side = size // SMALL.patch
    middles = (torch.arange(side) + 0.5) / side
    place_P2 = torch.stack(torch.meshgrid(middles, middles, indexing="ij"), -1).flatten(0, 1)
    centre = (aimed @ place_P2 - places(16)).norm(dim=-1)
    assert float(centre.mean()) < 0.16 < 0.25 < float((drawn @ place_P2 - places(16)).norm(dim=-1).mean())
    entropy = [float(-(weights * weights.log()).sum(-1).mean()) for weights in (drawn, aimed)]
    assert entropy[1] < 0.6 * math.log(side**2) < 0.8 * math.log(side**2) < entropy[0]


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_share_a_token_s_cell_out_evenly(heads: int) -> None:
    """Their mean looks at the middle of it, however many there are."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    _, aimed = tokenizers(encoder_heads=heads)
    middles = (torch.arange(8) + 0.5) / 8
    place_P2 = torch.stack(torch.meshgrid(middles, middles, indexing="ij"), -1).flatten(0, 1)
    off = (looked_at(aimed, images) @ place_P2).mean((0, 1)) - places(16)
    assert float(off.mean(0).abs().max()) < 0.04  # of a picture; a cell is 0.25 wide


@torch.no_grad()
def test_other_inputs_are_asked_for_as_before() -> None:
    """Queries change along the latent tokens' directions alone."""
    drawn, aimed = tokenizers()
    before, after = (t.encoder.transformer_blocks[0].attn.q_proj.weight for t in (drawn, aimed))
    latents = normal(drawn.encoder.latent_tokens[0])
    other = torch.randn(5, 128) @ (torch.eye(128) - torch.linalg.pinv(latents) @ latents)
    torch.testing.assert_close(other @ after.T, other @ before.T, atol=1e-4, rtol=1e-4)
    assert (latents @ after.T - latents @ before.T).abs().mean() > 0.1


def test_more_tokens_than_the_width_holds_are_aimed_as_near_as_they_can_be() -> None:
    _, aimed = tokenizers(tokens=150)
    assert all(weight.isfinite().all() for weight in aimed.parameters())
    assert aimed.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 150, 8)


def test_weights_alone_tell_an_aimed_tokenizer() -> None:
    """The layout of the network is the paper's: an aimed one's weights load into one that was not."""
    drawn, aimed = tokenizers()
    drawn.load_state_dict(aimed.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(drawn.encode(x), aimed.encode(x))


@pytest.mark.parametrize("pairs", [True, False])
def test_turns_are_the_rotation_as_matrices(pairs: bool) -> None:
    table = rotary_table(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), [4, 2, 2], 100.0)
    x = torch.randn(2, 8)
    torch.testing.assert_close((turns(table, pairs) @ x[..., None])[..., 0], rotate(x, table, pairs))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 16, 32])
def test_places_are_inside_apart_and_as_many_as_asked(count: int) -> None:
    found = places(count)
    assert found.shape == (count, 2) and float(found.min()) > 0 and float(found.max()) < 1
    assert count == 1 or float(torch.pdist(found).min()) > 0.5 * count**-0.5
