"""The first stages: shapes, names, gradients, the two regularisers, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import yaml

from common.errors import UserError
from ldm.autoencoder import (
    AutoencoderKL,
    DiagonalGaussian,
    Downsample,
    IdentityFirstStage,
    VectorQuantizer,
    VQModel,
    codebook_usage,
    group_count,
)
from ldm.official import autoencoder_of
from ldm.plan import FIRST_STAGES
from tests.ldm.networks import FIRST_STAGE
from tests.refusals import refused

PUBLISHED = yaml.safe_load(FIRST_STAGES.read_text())


def small(levels: int = 2, **changes: object) -> dict:
    sizes = {"z_channels": 4, "resolution": 16, "ch": 16, "ch_mult": [1] * levels}
    return {**FIRST_STAGE, **sizes, **changes}


def published(name: str) -> AutoencoderKL | VQModel:
    entry = PUBLISHED[name]
    return autoencoder_of(entry["ddconfig"], entry["embed_dim"], entry.get("n_embed"))


def kl(ddconfig: dict, embed_dim: int = 4) -> AutoencoderKL:
    model = autoencoder_of(ddconfig, embed_dim)
    assert isinstance(model, AutoencoderKL)
    return model


def small_vq(**changes: object) -> VQModel:
    model = autoencoder_of(small(double_z=False, z_channels=3, **changes), embed_dim=3, n_embed=12)
    assert isinstance(model, VQModel)
    return model


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_every_downsampling_factor_encodes_to_its_grid_and_back(levels: int) -> None:
    f = 2 ** (levels - 1)
    model = kl(small(levels), embed_dim=5)
    x = torch.randn(2, 3, 64, 32)
    z = model.encode_latent(x)
    assert model.downsampling == f
    assert z.shape == (2, 5, 64 // f, 32 // f)
    assert model.decode_latent(z).shape == x.shape


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_first_stages_have_the_downsampling_of_their_name(name: str) -> None:
    with torch.device("meta"):
        model = published(name)
        z = model.encode_latent(torch.empty(1, 3, 256, 256))
        f = int(name.split("-")[1][1:])
        assert model.downsampling == f
        assert z.shape == (1, model.embed_dim, 256 // f, 256 // f)
        assert model.decode_latent(z).shape == (1, 3, 256, 256)


def test_published_parameter_totals_match_the_papers_order_of_size() -> None:
    with torch.device("meta"):
        totals = {name: sum(p.numel() for p in published(name).parameters()) / 1e6 for name in ("kl-f8", "vq-f4")}
    assert totals["kl-f8"] == pytest.approx(83.65, abs=0.01)
    assert totals["vq-f4"] == pytest.approx(55.32, abs=0.01)


def test_pixels_are_their_own_latent() -> None:
    model, x = IdentityFirstStage(), torch.randn(1, 3, 5, 7)
    assert torch.equal(model.decode_latent(model.encode_latent(x)), x)
    assert torch.equal(model.latent_from_moments(model.moments(x)), x)


def test_state_dict_has_the_official_names() -> None:
    names = set(small_vq(ch_mult=[1, 2]).state_dict())
    for name in (
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.0.downsample.conv.bias",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.1.attn.0.proj_out.weight",
        "encoder.mid.attn_1.q.weight",
        "encoder.norm_out.weight",
        "decoder.mid.block_2.conv2.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.0.block.1.conv1.weight",
        "decoder.conv_out.bias",
        "quantize.embedding.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    ):
        assert name in names, name
    assert not any(name.startswith(("encoder.down.1.downsample", "decoder.up.0.upsample")) for name in names)


def test_attention_free_network_has_no_attention_parameters() -> None:
    model = autoencoder_of(small(attn_type="none"), embed_dim=4)
    assert not [name for name, _ in model.named_parameters() if "attn" in name]
    assert [name for name, _ in autoencoder_of(small(), 4).named_parameters() if "attn" in name]


def test_attention_is_placed_by_nominal_resolution() -> None:
    """16 px nominal with attention at 8: the second level of both sides attends, also on larger images."""
    encoder, decoder = kl(small()).encoder, kl(small()).decoder
    assert [len(level.attn) for level in encoder.down] == [0, 1]
    assert [len(level.attn) for level in decoder.up] == [0, 2]
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 16, 16)


def test_downsampling_pads_right_and_bottom_only() -> None:
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    corner = torch.zeros(1, 1, 4, 4)
    corner[0, 0, 0, 0] = 1.0
    # With symmetric padding the first window would be centred on (0, 0) and this one would stay out of the window.
    inside = torch.zeros(1, 1, 4, 4)
    inside[0, 0, 2, 2] = 1.0
    assert layer(corner)[0, 0].tolist() == [[1, 0], [0, 0]]
    assert layer(inside)[0, 0].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (32, 32), (16, 16), (48, 24), (40, 20), (37, 1), (7, 7)])
def test_group_norm_uses_32_groups_or_the_largest_divisor(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize("ch", [16, 24, 40])
def test_narrow_widths_build_and_train(ch: int) -> None:
    model = kl(small(ch=ch, ch_mult=[1, 2]))
    rec, posterior = model(torch.randn(2, 3, 16, 16))
    (rec.square().mean() + 1e-3 * posterior.kl().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


def test_size_that_the_factor_does_not_divide_is_refused() -> None:
    model = autoencoder_of(small(3), embed_dim=4)
    refused(r"18x16 is not a multiple .* factor 4; .* 16x16", model.encode_latent, torch.zeros(1, 3, 18, 16))
    refused("not a multiple", small_vq().encode_latent, torch.zeros(1, 3, 15, 16))


def test_wrong_options_are_refused_by_name() -> None:
    refused("bogus", autoencoder_of, small(bogus=1), embed_dim=4)
    refused("z_channels", autoencoder_of, {k: v for k, v in small().items() if k != "z_channels"}, embed_dim=4)
    with pytest.raises(UserError, match="ch_mult"):
        autoencoder_of({k: v for k, v in small(double_z=False).items() if k != "ch_mult"}, embed_dim=4, n_embed=3)
    refused('"linear"; expected "vanilla" or "none"', autoencoder_of, small(attn_type="linear"), embed_dim=4)
    refused("double_z", autoencoder_of, small(double_z=False), embed_dim=4)
    refused("double_z", autoencoder_of, small(double_z=True), embed_dim=4, n_embed=8)


def test_posterior_sample_follows_the_given_noise_and_generator() -> None:
    moments = torch.randn(2, 6, 4, 4)
    posterior = DiagonalGaussian(moments)
    noise = torch.randn(2, 3, 4, 4)
    expected = moments[:, :3] + torch.exp(0.5 * moments[:, 3:]) * noise
    torch.testing.assert_close(posterior.sample(noise), expected)
    draws = [posterior.sample(generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(posterior.mode(), moments[:, :3])


def test_kl_sums_over_dimensions_and_matches_torch_distributions() -> None:
    moments, other = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    p, q = DiagonalGaussian(moments), DiagonalGaussian(other)
    as_normal = lambda d: torch.distributions.Normal(d.mean, d.std)  # noqa: E731
    standard = torch.distributions.Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(p.kl(), kl(as_normal(p), standard).sum((1, 2, 3)))
    torch.testing.assert_close(p.kl(q), kl(as_normal(p), as_normal(q)).sum((1, 2, 3)))
    x = torch.randn_like(p.mean)
    torch.testing.assert_close(p.nll(x), -as_normal(p).log_prob(x).sum((1, 2, 3)))
    assert torch.equal(DiagonalGaussian(torch.full((1, 2, 1, 1), 99.0)).logvar, torch.full((1, 1, 1, 1), 20.0))


def test_quantiser_picks_the_nearest_entry() -> None:
    quantizer = VectorQuantizer(50, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 4, 3, 5)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.embedding.weight)
    quantized = quantizer(z)
    assert torch.equal(quantized.indices.flatten(), distances.argmin(1))
    torch.testing.assert_close(quantized.z, quantizer.lookup(quantized.indices))


def test_gradient_passes_straight_through_and_reaches_the_codebook() -> None:
    quantizer = VectorQuantizer(8, 3)
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    upstream = torch.randn(1, 3, 2, 2)
    quantized = quantizer(z)
    (gradient,) = torch.autograd.grad((quantized.z * upstream).sum(), z, retain_graph=True)
    assert torch.equal(gradient, upstream)
    quantized.loss.backward()
    used = set(quantized.indices.flatten().tolist())
    grad = quantizer.embedding.weight.grad
    assert grad is not None
    assert {i for i in range(8) if grad[i].abs().sum() > 0} == used


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_weighs_the_codebook_term_in_legacy_form_and_the_commitment_term_otherwise(legacy: bool) -> None:
    quantizer = VectorQuantizer(6, 3, beta=0.1, legacy=legacy)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantized = quantizer(z)
    quantized.loss.backward()
    entry = quantizer.lookup(quantized.indices).detach()
    full = 2.0 * (z.detach() - entry) / z.numel()
    assert z.grad is not None and quantizer.embedding.weight.grad is not None
    torch.testing.assert_close(z.grad, full * (1.0 if legacy else 0.1))
    codebook = torch.zeros(6, 3).index_add_(0, quantized.indices.flatten(), -full.permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(quantizer.embedding.weight.grad, codebook * (0.1 if legacy else 1.0))
    torch.testing.assert_close(quantized.loss.detach(), 1.1 * F.mse_loss(z.detach(), entry))


def test_codebook_usage_counts_codes() -> None:
    perplexity, used = codebook_usage(torch.tensor([[0, 0], [3, 3]]), 5)
    assert used.item() == 2
    assert perplexity.item() == pytest.approx(2.0, abs=1e-4)
    assert VectorQuantizer(5, 2).usage(torch.arange(5))[0].item() == pytest.approx(5.0, abs=1e-4)


def test_vq_latent_is_taken_before_the_quantiser_and_quantised_by_the_decoder() -> None:
    model = small_vq().eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        z = model.encode_latent(x)
        assert torch.equal(z, model.moments(x))
        assert not torch.allclose(z, model.quantize(z).z, atol=1e-3)
        rec, quantized = model(x)
        torch.testing.assert_close(model.decode_latent(z), rec)
        torch.testing.assert_close(model.decode(model.quantize.lookup(quantized.indices)), rec)


def test_moments_give_back_the_same_latent_later() -> None:
    model = kl(small()).eval()
    x, noise = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.latent_from_moments(model.moments(x), noise), model.encode_latent(x, noise))


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_bfloat16_autocast_stays_close_to_float32(kind: str) -> None:
    model = (kl(small()) if kind == "kl" else small_vq()).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        z = model.moments(x)
        full = model.decode(z[:, : model.embed_dim])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z_16 = model.moments(x)
            latent = model.encode_latent(x)
            low = model.decode(z[:, : model.embed_dim])
            model.decode_latent(latent)
    assert z_16.dtype == torch.bfloat16
    assert latent.dtype == torch.float32
    assert (z_16.float() - z).abs().max() < 0.05 * z.abs().max() + 0.02
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max() + 0.02


def test_quantiser_indices_do_not_depend_on_autocast() -> None:
    quantizer = VectorQuantizer(512, 3)
    z = torch.randn(1, 3, 8, 8) / 512
    expected = quantizer(z).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z).indices, expected)
