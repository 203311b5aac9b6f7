"""Facts about the networks that the recorded cases do not pin."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pixart.config import PixArtConfig
from pixart.model import DiT, PixArt, attend, position_embedding

TINY = PixArtConfig(input_size=8, width=24, depth=2, heads=2, caption_channels=16, caption_tokens=6)


M = TypeVar("M", bound=torch.nn.Module)


def filled(net: M, seed: int = 0) -> M:
    """Every parameter random, so that every path counts (many are zero at the start)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(config: PixArtConfig, count: int = 3, side: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(count, config.in_channels, side, side, generator=generator)
    t_B = 999 * torch.rand(count, generator=generator)
    caption_BLC = torch.randn(count, config.caption_tokens, config.caption_channels, generator=generator)
    lengths = torch.tensor([2, config.caption_tokens, 4])[:count]
    mask_BL = (torch.arange(config.caption_tokens) < lengths[:, None]).long()
    return x_BCHW, t_B, caption_BLC, mask_BL


@pytest.mark.parametrize("adaln", ["single", "block"])
def test_padding_changes_nothing(adaln: Any) -> None:
    """Batched with longer captions, a sample gives what it gives alone without any padding; junk in the padding too."""
    config = PixArtConfig(**{**vars(TINY), "adaln": adaln})
    net = filled(PixArt(config))
    x, t, caption, mask = batch(config)
    together = net(x, t, caption, mask)
    junk = torch.where(mask[..., None] == 0, torch.full_like(caption, 1e4), caption)
    torch.testing.assert_close(net(x, t, junk, mask), together)
    for i in range(len(x)):
        kept = caption[i : i + 1, mask[i] == 1]
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1], kept), together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_a_mask_may_keep_tokens_anywhere() -> None:
    net = filled(PixArt(TINY))
    x, t, caption, mask = batch(TINY)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1]])
    together = net(x, t, caption, mask)
    alone = net(x[:1], t[:1], caption[:1, [1, 4, 5]])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_multiplying_features_by_zero_is_not_masking() -> None:
    net = filled(PixArt(TINY))
    x, t, caption, mask = batch(TINY)
    assert (net(x, t, caption * mask[..., None]) - net(x, t, caption, mask)).abs().max() > 1e-3


def test_the_caption_is_projected_once_for_all_steps_of_a_sampler() -> None:
    net = filled(PixArt(TINY))
    x, t, caption, mask = batch(TINY)
    calls: list[str] = []
    for name, part in net.named_modules():
        if name.endswith(("kv_linear", "y_proj")):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        expected = net(x, t, caption, mask)
        calls.clear()
        context = net.encode_caption(caption, mask)
        for _ in range(5):
            torch.testing.assert_close(net(x, t, context), expected)
    assert sorted(calls) == ["blocks.0.cross_attn.kv_linear", "blocks.1.cross_attn.kv_linear", "y_embedder.y_proj"]


def test_no_work_is_spent_on_padding() -> None:
    """Rows of the products over captions: the kept tokens and at most an eighth, in few different sizes."""
    config = PixArtConfig(**{**vars(TINY), "caption_tokens": 40})
    net = filled(PixArt(config))
    rows: list[int] = []
    for name in ("blocks.0.cross_attn.kv_linear", "y_embedder.y_proj.fc1"):
        net.get_submodule(name).register_forward_hook(
            lambda module, given, out: rows.append(given[0].numel() // given[0].shape[-1])
        )
    sizes = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 12, (32, 1), generator=generator)
        caption, mask = torch.randn(32, 40, 16, generator=generator), torch.arange(40) < lengths
        net(torch.randn(32, 4, 2, 2), torch.zeros(32), caption, mask)
        kept = int(mask.sum())
        assert all(kept <= count <= 1.125 * kept for count in rows[-2:])
        sizes |= set(rows)
    assert len(sizes) <= 4
    rows.clear()
    net(torch.randn(1, 4, 8, 8), torch.zeros(1), caption[:1], mask[:1])
    assert set(rows) == {int(mask[0].sum())}


def test_dropped_captions_are_the_null_caption_under_the_sample_s_own_mask() -> None:
    net = filled(PixArt(TINY))
    x, t, caption, mask = batch(TINY)
    null = net.y_embedder.y_embedding.expand_as(caption)
    some = torch.tensor([True, False, False])
    out = net(x, t, caption, mask, drop_B=some)
    torch.testing.assert_close(out[0], net(x, t, null, mask)[0])
    torch.testing.assert_close(out[1:], net(x, t, caption, mask)[1:])
    # A shorter caption tensor takes as many tokens of the null caption.
    torch.testing.assert_close(
        net(x[:1], t[:1], caption[:1, :2], drop_B=torch.tensor([True])), out[:1], rtol=1e-4, atol=1e-5
    )


def test_the_null_caption_is_saved_and_never_optimised() -> None:
    net = PixArt(TINY)
    assert "y_embedder.y_embedding" in net.state_dict()
    assert "y_embedder.y_embedding" not in dict(net.named_parameters())
    big = PixArt(PixArtConfig(**{**vars(TINY), "caption_channels": 4096, "caption_tokens": 120}))
    assert big.y_embedder.y_embedding.std().item() == pytest.approx(1 / 64, rel=0.02)


@pytest.mark.parametrize("adaln", ["single", "block"])
def test_initialisation_is_the_authors(adaln: Any) -> None:
    torch.manual_seed(0)
    config = PixArtConfig(
        input_size=8, width=192, depth=2, heads=4, caption_channels=64, caption_tokens=6, multi_scale=True, adaln=adaln
    )
    net = PixArt(config)
    parameters = dict(net.named_parameters())
    zeros = {name for name, p in parameters.items() if not p.any()}
    biases = {name for name in parameters if name.endswith("bias")}
    closed = {f"blocks.{i}.cross_attn.proj.weight" for i in range(2)} | {"final_layer.linear.weight"}
    if adaln == "block":
        closed |= {name for name in parameters if "adaLN_modulation.1.weight" in name}
    assert zeros == biases | closed
    normal = [f"{n}_embedder.mlp.{i}.weight" for n in ("t", "csize", "ar") for i in (0, 2)]
    normal += [f"y_embedder.y_proj.fc{i}.weight" for i in (1, 2)]
    normal += ["t_block.1.weight"] if adaln == "single" else []
    for name in normal:
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.06), name
    if adaln == "single":
        table = torch.stack([parameters[f"blocks.{i}.scale_shift_table"] for i in range(2)])
        assert table.std().item() == pytest.approx(192**-0.5, rel=0.06)
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "x_embedder.proj.weight"):
        weight = parameters[name].flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02), name
    # An untrained network predicts zeros.
    x, t, caption, mask = batch(config)
    assert not net(x, t, caption, mask, size_B2=torch.full((3, 2), 64.0), ratio_B1=torch.ones(3, 1)).any()


def test_adaln_single_saves_a_quarter_of_the_parameters() -> None:
    with torch.device("meta"):
        single, block = (
            sum(p.numel() for p in PixArt(PixArtConfig(adaln=a)).parameters()) for a in ("single", "block")
        )
    assert single == 610_856_096 and block == 828_494_240  # figure 6: 611M against 833M
    assert single / block < 0.74


def test_any_grid_is_accepted_and_positions_interpolate() -> None:
    net = filled(PixArt(TINY))
    _, t, caption, mask = batch(TINY)
    wide = torch.randn(3, 4, 4, 16)
    assert net(wide, t, caption, mask).shape == (3, 8, 4, 16)
    # Rows and columns of any grid span the training grid's coordinates; the scale divides them.
    four, eight = position_embedding(24, 4, 4, 4), position_embedding(24, 8, 8, 4)
    torch.testing.assert_close(eight.view(8, 8, 24)[::2, ::2], four.view(4, 4, 24))
    torch.testing.assert_close(position_embedding(24, 8, 8, 8, 2.0), eight)


def test_learning_sigma_doubles_the_channels() -> None:
    x, t, caption, mask = batch(TINY)
    assert PixArt(TINY)(x, t, caption, mask).shape == (3, 8, 8, 8)
    assert PixArt(PixArtConfig(**{**vars(TINY), "learn_sigma": False}))(x, t, caption, mask).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    x, t, caption, mask = batch(TINY)
    gradients = []
    for checkpointing in (False, True):
        net: Any
        inputs: tuple[Tensor, ...]
        if kind == "pixart":
            net, inputs = filled(PixArt(TINY)), (x, t, caption, mask)
        else:
            net = filled(DiT(PixArtConfig(**{**vars(TINY), "classes": 5})))
            inputs = (x, t, torch.tensor([0, 5, 2]))
        net.gradient_checkpointing = checkpointing
        net(*inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name} gets no gradient"
        torch.testing.assert_close(gradient, gradients[1][name])


def test_no_class_of_a_dit_is_a_class_of_its_own() -> None:
    net = filled(DiT(PixArtConfig(**{**vars(TINY), "classes": 5})))
    x, t, _, _ = batch(TINY)
    dropped, left_out = net(x, t, torch.full((3,), 5)), net(x, t)
    assert (dropped - left_out).abs().max() > 1e-3
    assert (dropped - net(x, t, torch.zeros(3, dtype=torch.long))).abs().max() > 1e-3


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 24), (640, 512)])
@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_attention_on_cpu_agrees_with_float32(queries: int, keys: int, masked: bool) -> None:
    """All ways of computing it, forward and backward; 640 x 512 scores are more than are written out at once."""
    q, k, v = (torch.randn(2, n, 2, 16).bfloat16().requires_grad_() for n in (queries, keys, keys))
    bias = None
    if masked:
        bias = torch.zeros(2, 1, 1, keys)
        bias[0, ..., keys // 2 :] = -torch.inf
    exact = attend(q.float(), k.float(), v.float(), bias)
    close = attend(q, k, v, bias)
    assert close.dtype == torch.bfloat16
    torch.testing.assert_close(close.float(), exact, rtol=0.03, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, bias).float(), exact, rtol=0.03, atol=0.02)
    dy = torch.randn_like(exact)
    for dx, exact_dx in zip(
        torch.autograd.grad(close, (q, k, v), dy.bfloat16()), torch.autograd.grad(exact, (q, k, v), dy)
    ):
        torch.testing.assert_close(dx.float(), exact_dx.float(), rtol=0.05, atol=0.05)


def test_float16_attention_survives_products_beyond_its_range() -> None:
    q = k = torch.full((1, 4, 1, 16), 200.0, dtype=torch.float16)  # 640,000 a product; float16 ends at 65,504
    v = torch.randn(1, 4, 1, 16).half()
    out = attend(q, k, v)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out[0, 0].float(), v.float().mean(1).flatten(), rtol=1e-2, atol=1e-3)


def test_bfloat16_autocast_follows_float32() -> None:
    net = filled(PixArt(TINY))
    x, t, caption, mask = batch(TINY)
    with torch.no_grad():
        exact, context = net(x, t, caption, mask), net.encode_caption(caption, mask)
        with torch.autocast("cpu", torch.bfloat16):
            for given in (net(x, t, caption, mask), net(x, t, context)):
                assert (given.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_be_stored_in_half_precision(dtype: torch.dtype) -> None:
    config = PixArtConfig(**{**vars(TINY), "multi_scale": True})
    net = filled(PixArt(config))
    x, t, caption, mask = batch(config)
    more = {"size_B2": torch.full((3, 2), 64.0), "ratio_B1": torch.ones(3, 1)}
    with torch.no_grad():
        exact = net(x, t, caption, mask, **more)
        out = net.to(dtype)(x, t, net.encode_caption(caption, mask), **more)
    assert out.dtype == dtype
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_misuse_is_explained() -> None:
    net = PixArt(TINY)
    x, t, caption, mask = batch(TINY)
    with pytest.raises(ValueError, match=r"caption 1 of the batch has no token"):
        net(x, t, caption, mask * torch.tensor([1, 0, 1])[:, None])
    with pytest.raises(ValueError, match="belong to encode_caption"):
        net(x, t, net.encode_caption(caption), mask)
    with pytest.raises(ValueError, match="3 latents were given with 2 captions"):
        net(x, t, caption[:2])
    with pytest.raises(ValueError, match="multiples of 2"):
        net(x[..., :7], t, caption)
    with pytest.raises(ValueError, match="size_B2"):
        PixArt(PixArtConfig(**{**vars(TINY), "multi_scale": True}))(x, t, caption)
    with pytest.raises(ValueError, match="multiple of heads"):
        PixArtConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="use DiT"):
        PixArt(PixArtConfig(classes=3))
    net.has_null_caption = False
    with pytest.raises(ValueError, match="empty prompt"):
        net(x, t, caption, drop_B=torch.tensor([True, False, False]))


def test_the_mlp_in_parts_is_the_mlp() -> None:
    from pixart.model import MLP_ROWS, Mlp

    mlp, x = Mlp(8, 32, 6), torch.randn(3, MLP_ROWS // 2, 8)
    whole = mlp(x)
    with torch.no_grad():
        parts = mlp(x)
    assert parts.shape == whole.shape and not parts.requires_grad
    torch.testing.assert_close(parts, whole.detach(), rtol=1e-6, atol=1e-6)
