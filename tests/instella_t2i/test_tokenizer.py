"""The tokenizer: positions, sizes, codes, folders, released layout; the quantizers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from instella_t2i import convert
from instella_t2i.config import NetworkConfig
from instella_t2i.losses import code_usage, dying
from instella_t2i.quantizers import (
    RESTART_EVERY,
    BinaryQuantizer,
    VectorQuantizer,
    bits_of,
    index_of,
    lookup_free,
    make_quantizer,
    spherical,
    vector_quantize,
)
from instella_t2i.tokenizer import Tokenizer, image_positions, load_tokenizer, rotary_table, rotate, save_tokenizer
from tests.refusals import refused

TINY = NetworkConfig(
    patch=4,
    tokens=4,
    bits=8,
    encoder_layers=2,
    encoder_heads=2,
    encoder_head_dim=8,
    decoder_layers=3,
    decoder_heads=1,
    decoder_head_dim=8,
    down_after=[0],
    up_after=[1],
    axes=[4, 2, 2],
    scale=32.0,
)
KINDS: tuple[Any, ...] = ("binary", "vq", "lfq", "bsq")


def tiny(**changes: Any) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(replace(TINY, **changes), size=16).eval()


@pytest.mark.parametrize("layout", ["line", "grid"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_bits_and_what_the_decoder_sees_is_a_function_of_them(kind: str, layout: str) -> None:
    tokenizer = tiny(quantizer=kind, layout=layout)
    x = torch.randn(3, 3, 16, 24)
    codes = tokenizer.encode(x)
    assert codes.shape == (3, 4, 8) and set(codes.unique().tolist()) <= {0.0, 1.0}
    with torch.no_grad():
        found = tokenizer(x)
    torch.testing.assert_close(tokenizer.quantizer.values(codes), found.quantized.values_BLE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokenizer.decode(codes, (16, 24)), found.pixels_BCHW, rtol=1e-5, atol=1e-5)
    for size in (16, 40, (24, 8 * 5)):
        height, width = (size, size) if isinstance(size, int) else size
        assert tokenizer.decode(codes, size).shape == (3, 3, height, width)


def test_stretched_coordinates_cover_the_same_range_at_every_size() -> None:
    for rows, columns in ((2, 2), (4, 7), (64, 64)):
        positions = image_positions(rows, columns, 64.0)
        assert positions.amin(0).tolist() == [0, 0, 0] and positions.amax(0).tolist() == [0, 63, 63]
    assert image_positions(3, 2, None).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1]]
    refused("1 x 3 image tokens: stretched coordinates", image_positions, 1, 3, 64.0)


def test_the_released_turn_is_no_rotation_and_the_other_is() -> None:
    table = rotary_table(torch.tensor([[0.0, 1.0, 2.0], [5.0, 3.0, 1.0]]), [4, 2, 2], 10_000.0)
    x = torch.randn(1, 1, 2, 8)
    assert rotate(x, table, pairs=True).norm(dim=-1) == pytest.approx(x.norm(dim=-1), rel=1e-5)
    assert (rotate(x, table, pairs=False).norm(dim=-1) - x.norm(dim=-1)).abs().max() > 1e-2
    codes = [tiny(rotary=turn).encode(torch.ones(1, 3, 16, 16)) for turn in ("released", "pairs")]
    assert codes[0].shape == codes[1].shape


def test_a_rotation_is_the_same_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rotary_table(torch.tensor([[0.0, 1.0, 2.0], [5.0, 3.0, 1.0]]), [4, 2, 2], 30.0)
    x = torch.randn(2, 2, 3, 8).transpose(1, 2).requires_grad_()
    factor, found = torch.randn(2, 3, 2, 8), []
    for compiling in (False, True):
        monkeypatch.setattr("torch.compiler.is_compiling", lambda compiling=compiling: compiling)
        turned = rotate(x, table, pairs=True)
        found.append((turned, *torch.autograd.grad((turned * factor).sum(), x)))
    torch.testing.assert_close(found[0], found[1])
    assert rotate(x.bfloat16(), table, pairs=True).dtype == torch.bfloat16


def test_the_scale_reaches_the_encoder_too() -> None:
    x = torch.randn(2, 3, 16, 16)
    a, b = tiny(), tiny(scale=None)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        assert not torch.allclose(a.encoder(x), b.encoder(x), atol=1e-3)


def test_a_decoder_without_upsampling_and_an_encoder_without_downsampling_run() -> None:
    tokenizer = tiny(down_after=[], up_after=[])
    assert tokenizer.multiple == 4
    assert tokenizer(torch.randn(1, 3, 8, 12)).pixels_BCHW.shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": [4, 4]}, "--network.axes .4, 4.: expected three even numbers"),
        ({"axes": [3, 3, 2]}, "three even numbers that add up to --network.encoder_head_dim 8"),
        ({"down_after": [2]}, "--network.down_after .2.: expected rising numbers below --network.encoder_layers 2"),
        ({"layout": "grid", "tokens": 8}, "--network.tokens 8: --network.layout grid needs a square number"),
        ({"quantizer": "vq", "bits": 17}, "--network.bits 17: --network.quantizer vq looks at all"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    refused(sentence, Tokenizer, replace(TINY, **changes))


def test_a_size_has_to_suit_the_way_it_goes_alone() -> None:
    tokenizer = tiny(down_after=[], up_after=[1])
    codes = tokenizer.encode(torch.randn(1, 3, 20, 12))  # patches of 4, nothing halved
    assert codes.shape == (1, 4, 8) and tokenizer.multiple == 8
    refused("a picture of 20 x 12 pixels: expected multiples of 8", tokenizer.decode, codes, (20, 12))
    refused("a picture of 20 x 12 pixels: expected multiples of 8", tokenizer, torch.randn(1, 3, 20, 12))
    tokenizer = tiny(down_after=[0], up_after=[])
    refused("a picture of 12 x 16 pixels: expected multiples of 8", tokenizer.encode, torch.randn(1, 3, 12, 16))
    assert tokenizer.decode(codes, (20, 12)).shape == (1, 3, 20, 12)


def test_double_precision_gives_what_single_gives_to_its_digits() -> None:
    tokenizer, x = tiny(), torch.randn(2, 3, 16, 16)
    wanted = tokenizer(x)
    found = tokenizer.double()(x.double())
    assert torch.equal(found.quantized.codes_BLD, wanted.quantized.codes_BLD)
    assert found.pixels_BCHW.dtype == torch.float64
    torch.testing.assert_close(found.pixels_BCHW.float(), wanted.pixels_BCHW, rtol=1e-4, atol=1e-4)


def test_wrong_sizes_and_codes_are_sentences() -> None:
    tokenizer = tiny()
    refused("a picture of 20 x 16 pixels: expected multiples of 8", tokenizer.encode, torch.zeros(1, 3, 20, 16))
    refused("pictures of the shape .1, 1, 16, 16.: expected .pictures, 3", tokenizer, torch.zeros(1, 1, 16, 16))
    refused("codes of the shape .1, 4, 9.: expected", tokenizer.decode, torch.zeros(1, 4, 9), 16)
    refused("1 x 1 image tokens", tokenizer.decode, torch.zeros(1, 4, 8), 8)


def test_a_folder_gives_the_same_tokenizer_back(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    for kind in KINDS:
        ours = tiny(quantizer=kind)
        again = load_tokenizer(save_tokenizer(ours, tmp_path / kind))
        assert again.size == 16 and again.config == ours.config
        assert torch.equal(again.encode(x), ours.encode(x))
        assert torch.equal(again.decode(ours.encode(x), 24), ours.decode(ours.encode(x), 24))
        assert not any(p.requires_grad for p in again.parameters())
    refused("no config.json there", load_tokenizer, tmp_path)
    config = tmp_path / "binary" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "network": {**content["network"], "tokens": 5}}))
    refused("latent_tokens has the shape", load_tokenizer, tmp_path / "binary")
    config.write_text(json.dumps({**content, "network": {"tokenz": 5}}))
    refused("has other options than expected", load_tokenizer, tmp_path / "binary")


def test_released_weights_come_and_go_unchanged(tmp_path: Path) -> None:
    from common.weights import read_weights, save_weights

    ours = tiny()
    state = {**ours.state_dict(), "decoder.repa_proj.0.weight": torch.zeros(2, 2)}
    save_weights(tmp_path / "released.safetensors", state)
    told = ["--down_after", "0", "--up_after", "1", "--axes", "4", "2", "2", "--scale", "32", "--size", "16"]
    out = convert.main(["--released", str(tmp_path / "released.safetensors"), "--out", str(tmp_path / "folder"), *told])
    again = load_tokenizer(out)
    assert again.config == ours.config
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(again.decode(again.encode(x), 16), ours.decode(ours.encode(x), 16))
    back = convert.main(["--model", str(out), "--out", str(tmp_path / "back.safetensors")])
    found = read_weights(back)[0]
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.state_dict().items())
    once_more = load_tokenizer(convert.main(["--released", str(back), "--out", str(tmp_path / "once-more")]))
    assert once_more.config == ours.config and once_more.size == again.size  # as its header tells
    other = save_tokenizer(tiny(quantizer="lfq"), tmp_path / "lfq")
    refused(
        "the released layout knows quantizer binary",
        convert.main,
        ["--model", str(other), "--out", str(tmp_path / "no.safetensors")],
    )


def test_the_released_network_has_the_counted_parameters() -> None:
    from instella_t2i import plan

    found = {line["stage"]: line for line in plan.main(["--json"])}
    assert found["tokenizer"]["parameters"] == 427_754_560 == found["tokenizer"]["trained"]
    assert found["decoder"]["trained"] == 307_800_576
    with torch.device("meta"):
        released = Tokenizer(NetworkConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in released.named_children()}
    assert {name: round(value / 1e6, 1) for name, value in count.items()} == {
        "encoder": 119.9,
        "decoder": 307.0,
        "quantizer": 0.1,
        "to_pixel": 0.8,
    }


# Quantizers ----------------------------------------------------------------------------------------------------------


def test_a_token_without_set_bits_is_the_zero_vector() -> None:
    assert torch.equal(BinaryQuantizer(6, 5).values(torch.zeros(1, 2, 5)), torch.zeros(1, 2, 6))


def test_the_straight_through_gradient_knows_no_tau() -> None:
    torch.manual_seed(0)
    quantizer, h = BinaryQuantizer(6, 5), torch.randn(2, 3, 6)
    gradients = []
    for tau in (0.1, 1.0):
        x = h.clone().requires_grad_()
        quantizer(x, torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)), tau).values_BLE.sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_bit_that_is_sure_has_no_gradient_but_that_of_its_logit() -> None:
    torch.manual_seed(0)
    quantizer, h = BinaryQuantizer(6, 5), torch.randn(2, 3, 6)
    with torch.no_grad():
        quantizer.proj[0].bias += 200
    found = quantizer(h.requires_grad_(), torch.rand(2, 3, 5), 1.0)
    (gone,) = torch.autograd.grad(found.values_BLE.sum() + found.loss, h, retain_graph=True)
    (left,) = torch.autograd.grad(found.terms["logits"], h)
    assert float(gone.abs().max()) == 0 and float(left.abs().min()) > 0


def test_noise_at_tau_zero_is_the_threshold_and_half_of_the_bits_flip_at_a_high_tau() -> None:
    torch.manual_seed(0)
    quantizer, h, u = BinaryQuantizer(8, 64), torch.randn(8, 16, 8), torch.rand(8, 16, 64)
    still = quantizer(h).codes_BLD
    assert torch.equal(quantizer(h, u, 0.0).codes_BLD, still)
    assert float((quantizer(h, u, 1e4).codes_BLD != still).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((quantizer(h, u, 1e-3).codes_BLD != still).float().mean()) < 0.01


def test_indices_and_bits_are_inverse() -> None:
    index = torch.arange(1024).view(2, -1)
    assert torch.equal(index_of(bits_of(index, 10)), index) and bits_of(torch.tensor(6), 4).tolist() == [0, 1, 1, 0]


def test_entries_that_nobody_chooses_become_states() -> None:
    torch.manual_seed(0)
    quantizer, generator = VectorQuantizer(6, 4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        quantizer.codebook[1:] = -quantizer.codebook[:1]  # all but one entry are one point
    h = torch.randn(4, 16, 6)
    before = index_of(quantizer.train()(h).codes_BLD).unique().numel()
    for _ in range(RESTART_EVERY):
        quantizer(h)
        quantizer.after_step(generator)
    after = index_of(quantizer(h).codes_BLD).unique().numel()
    assert before <= 2 and after > 8
    assert quantizer.chosen.sum() > 0 and int(quantizer.steps) == RESTART_EVERY


def test_entropy_terms_have_their_known_values() -> None:
    far = lookup_free(torch.tensor([[[5.0, 5.0], [5.0, -5.0], [-5.0, 5.0], [-5.0, -5.0]]]))
    assert float(far.sample_entropy) == pytest.approx(0, abs=1e-6)
    assert float(far.codebook_entropy) == pytest.approx(math.log(4), abs=1e-4)  # all four codes alike
    near = spherical(torch.zeros(1, 3, 4), group=2)
    assert float(near.sample_entropy) == pytest.approx(2 * math.log(4), abs=1e-4) == float(near.codebook_entropy)


def test_codes_in_parts_have_the_entropies_of_their_parts() -> None:
    z = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 20
    whole, parts = lookup_free(z, codebooks=3), lookup_free(z.reshape(2, 15, 2))
    for name in ("sample_entropy", "codebook_entropy", "commit", "aux"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    assert torch.equal(whole.z_q, parts.z_q.view_as(z)) and whole.aux.dtype == torch.float64
    # Bits of one sample are independent: the entropy of all is the sum over the bits.
    p = torch.sigmoid(4 * z / 0.01)
    each = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    torch.testing.assert_close(lookup_free(z).sample_entropy, each.sum(-1).mean(), rtol=1e-6, atol=1e-9)
    refused("6 bits in 4 codebooks: expected a number that divides 6", lookup_free, z, codebooks=4)
    refused("6 bits in groups of 4: expected", spherical, z, 4)
    torch.testing.assert_close(spherical(z, 3).loss.float(), spherical(z.float(), 3).loss, rtol=1e-5, atol=1e-6)


def test_every_quantizer_passes_gradients_to_the_states() -> None:
    for kind in KINDS:
        torch.manual_seed(0)
        quantizer = make_quantizer(kind, 6, 8)
        h = torch.randn(2, 3, 6, requires_grad=True)
        found = quantizer(h, torch.rand(2, 3, 8), 0.5)
        (found.values_BLE.square().sum() + found.loss).backward()
        assert h.grad is not None and float(h.grad.abs().sum()) > 0, kind


def test_the_quantizers_are_those_of_the_library() -> None:
    """`vector-quantize-pytorch` has the lookup-free, spherical and cosine codebooks: equal codes and values."""
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    z = torch.randn(2, 5, 6)
    lfq = library.LFQ(dim=6, codebook_size=64, spherical=False).eval()
    assert torch.equal(lfq(z)[0], lookup_free(z).z_q)
    assert torch.equal(lfq(z)[1], index_of(lookup_free(z).codes.flip(-1)))  # its first dimension counts most
    sphere = torch.nn.functional.normalize(z, dim=-1)
    bsq = library.LFQ(dim=6, codebook_size=64, spherical=True).eval()
    torch.testing.assert_close(bsq(z)[0], spherical(sphere, group=6).z_q)
    cosine = library.VectorQuantize(dim=6, codebook_size=8, use_cosine_sim=True).eval()
    found = vector_quantize(z, cosine.codebook)
    assert torch.equal(cosine(z)[1], found.entry)
    torch.testing.assert_close(cosine(z)[0], torch.nn.functional.normalize(cosine.codebook, dim=-1)[found.entry])


def test_codes_that_die_are_counted_and_said() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(2, (64, 4, 8), generator=generator).float()
    usage = code_usage(random)
    assert usage["live_bits"] == 1 and usage["bit_entropy"] > 0.97 and usage["distinct"] == 1 and dying(usage) == ""
    assert usage["joint_entropy"] > 6.5
    one = torch.zeros(64, 4, 8)
    usage = code_usage(one)
    assert usage == {"live_bits": 0, "bit_entropy": 0, "joint_entropy": 0, "joint_share": 0, "distinct": 0}
    assert dying(usage).startswith("codes are dying: 0% of the bits vary")
    half = torch.cat([random[:, :, :3], one[:, :, 3:]], 2)
    assert code_usage(half)["live_bits"] == 3 / 8 and "38% of the bits" in dying(code_usage(half))
