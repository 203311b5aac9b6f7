"""The first stage's losses, the PatchGAN and the LPIPS form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common.metrics.lpips import LPIPS, VGG16Trunk, unit_normalise
from common.metrics.perceptual import official_lpips
from ldm.autoencoder import AutoencoderKL, DiagonalGaussian, Quantized, VQModel
from ldm.config import AutoencoderOptions
from ldm.losses import (
    KLPerceptualLoss,
    PatchDiscriminator,
    VQPerceptualLoss,
    adaptive_weight,
    hinge_discriminator_loss,
    vanilla_discriminator_loss,
)
from tests.refusals import refused

WIDTHS = (4, 4, 6, 6, 8)


class ToyDecoder(nn.Module):
    """One convolution, so that W of the adaptive weight is its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.h = torch.randn(2, 4, 16, 16)
        self.x = torch.rand(2, 3, 16, 16) * 2 - 1

    def rec(self) -> Tensor:
        return self.conv(self.h)

    def loss(
        self,
        criterion: KLPerceptualLoss | VQPerceptualLoss,
        regulariser: Any = None,
        discriminator: PatchDiscriminator | None = None,
        step: int = 0,
        *weights: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The autoencoder's loss and logs on the toy's own image and reconstruction."""
        made = quantized() if isinstance(criterion, VQPerceptualLoss) else posterior()
        w = None if discriminator is None else self.conv.weight
        return criterion.autoencoder(self.x, self.rec(), regulariser or made, discriminator, w, step, *weights)


def posterior() -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(2, 8, 4, 4))


def quantized() -> Quantized:
    return Quantized(torch.randn(2, 3, 4, 4), torch.tensor(0.25), torch.tensor([[0, 0, 1, 1]]))


def test_patchgan_has_the_official_names_and_size() -> None:
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    convolutions = [i for i, m in enumerate(discriminator.main) if isinstance(m, nn.Conv2d)]
    assert convolutions == [0, 2, 5, 8, 11]
    assert discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert discriminator.main[5].weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5])
def test_patchgan_strides_once_per_layer_and_caps_its_width(n_layers: int) -> None:
    discriminator = PatchDiscriminator(ndf=4, n_layers=n_layers)
    strides = [m.stride[0] for m in discriminator.main if isinstance(m, nn.Conv2d)]
    assert strides == [2] * n_layers + [1, 1]
    assert discriminator.main[-1].in_channels == 4 * min(2**n_layers, 8)


def test_kl_loss_sums_over_pixels_and_vq_loss_averages() -> None:
    toy = ToyDecoder()
    l1 = (toy.x - toy.rec()).abs().detach()
    torch.testing.assert_close(toy.loss(KLPerceptualLoss())[1]["nll_loss"], l1.sum() / 2)
    torch.testing.assert_close(toy.loss(VQPerceptualLoss(n_embed=4))[1]["nll_loss"], l1.mean())
    squared = toy.loss(VQPerceptualLoss(n_embed=4, pixel_loss="l2"))[1]["nll_loss"]
    torch.testing.assert_close(squared, l1.square().mean())


def test_kl_term_is_summed_over_dimensions_and_averaged_over_images() -> None:
    q = posterior()
    loss, logs = ToyDecoder().loss(KLPerceptualLoss(kl_weight=0.01), q)
    torch.testing.assert_close(logs["kl_loss"], q.kl().sum() / 2)
    torch.testing.assert_close(loss.detach(), logs["nll_loss"] + 0.01 * q.kl().mean())


def test_codebook_loss_and_usage_are_logged() -> None:
    loss, logs = ToyDecoder().loss(VQPerceptualLoss(n_embed=4, codebook_weight=2.0))
    torch.testing.assert_close(loss.detach(), logs["nll_loss"] + 0.5)
    assert logs["cluster_usage"].item() == 2
    assert logs["perplexity"].item() == pytest.approx(2.0, abs=1e-4)


def test_lpips_is_added_to_every_pixel_with_its_weight() -> None:
    toy, lpips = ToyDecoder(), LPIPS(VGG16Trunk(WIDTHS))
    distance, l1 = lpips(toy.x, toy.rec()).detach().mean(), (toy.x - toy.rec()).abs().detach().mean()
    _, logs = toy.loss(VQPerceptualLoss(lpips, n_embed=4, perceptual_weight=0.7))
    torch.testing.assert_close(logs["p_loss"], distance)
    torch.testing.assert_close(logs["rec_loss"], l1 + 0.7 * distance)


def test_adaptive_weight_is_clamped_before_disc_weight() -> None:
    w = torch.ones(2, requires_grad=True)
    nll, small_gan = (3.0 * w).sum(), (1e-9 * w).sum()
    assert adaptive_weight(nll, (w * 2.0).sum(), w, 0.5).item() == pytest.approx(0.75, rel=1e-3)
    assert adaptive_weight(1e6 * nll, small_gan, w, 0.5).item() == pytest.approx(0.5e4)
    assert not adaptive_weight(nll, small_gan, w, 0.5).requires_grad


def test_pixel_weights_do_not_change_the_adaptive_weight() -> None:
    toy, discriminator = ToyDecoder(), PatchDiscriminator(ndf=4, n_layers=1)
    criterion = KLPerceptualLoss(disc_start=0, kl_weight=0.0)
    q = posterior()
    _, plain = toy.loss(criterion, q, discriminator)
    _, weighted = toy.loss(criterion, q, discriminator, 0, torch.full((1, 1, 16, 16), 3.0))
    torch.testing.assert_close(plain["d_weight"], weighted["d_weight"])
    gan = plain["d_weight"] * plain["g_loss"]
    torch.testing.assert_close(weighted["total_loss"] - gan, 3.0 * (plain["total_loss"] - gan))


def test_discriminator_starts_at_disc_start_autoencoder_steps_in_both_of_its_uses() -> None:
    """Alternating the two optimisers, the n-th pair of steps passes n: the GAN must start at pair `disc_start`."""
    toy, discriminator = ToyDecoder(), PatchDiscriminator(ndf=4, n_layers=1)
    criterion = KLPerceptualLoss(disc_start=3, disc_factor=0.5)
    factors, active = [], []
    for step in range(5):
        _, logs = toy.loss(criterion, None, discriminator, step)
        loss, _ = criterion.discriminator(toy.x, toy.rec(), discriminator, step)
        factors.append(logs["disc_factor"].item())
        active.append(loss.item() > 0)
    assert factors == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert active == [False, False, False, True, True]


def test_before_disc_start_the_discriminator_is_not_run_and_the_loss_is_the_same() -> None:
    toy, discriminator = ToyDecoder(), PatchDiscriminator(ndf=4, n_layers=1).eval()
    calls = []
    discriminator.register_forward_hook(lambda *_: calls.append(1))
    q = posterior()
    results = [
        toy.loss(KLPerceptualLoss(disc_start=10, log_inactive_gan=log), q, discriminator, 9) for log in (False, True)
    ]
    assert len(calls) == 1
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1]["d_weight"] == 0 < results[1][1]["d_weight"]


def test_evaluation_without_gradients_has_no_adaptive_weight() -> None:
    toy, discriminator = ToyDecoder(), PatchDiscriminator(ndf=4, n_layers=1).eval()
    with torch.no_grad():
        loss, logs = toy.loss(KLPerceptualLoss(disc_start=0), None, discriminator, 5)
    assert logs["d_weight"] == 0
    assert torch.isfinite(loss)


def test_discriminator_losses_prefer_right_answers() -> None:
    real, fake = torch.tensor([2.0]), torch.tensor([-2.0])
    assert hinge_discriminator_loss(real, fake) == 0
    assert hinge_discriminator_loss(fake, real).item() == pytest.approx(3.0)
    expected = F.binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(vanilla_discriminator_loss(real, torch.tensor([-1.0])), expected)


def test_discriminator_step_leaves_the_autoencoder_without_gradient() -> None:
    toy, discriminator = ToyDecoder(), PatchDiscriminator(ndf=4, n_layers=1)
    loss, logs = VQPerceptualLoss(n_embed=4, disc_loss="vanilla").discriminator(toy.x, toy.rec(), discriminator, 0)
    loss.backward()
    assert toy.conv.weight.grad is None
    assert discriminator.main[0].weight.grad.abs().sum() > 0
    assert set(logs) == {"disc_loss", "logits_real", "logits_fake"}


def test_logvar_learns_only_on_request() -> None:
    toy = ToyDecoder()
    for learn in (False, True):
        criterion = KLPerceptualLoss(logvar_init=0.3, learn_logvar=learn)
        loss, logs = toy.loss(criterion)
        loss.backward()
        assert (criterion.logvar.grad is not None) == learn
        assert logs["logvar"].item() == pytest.approx(0.3)


@pytest.mark.parametrize("options", [{"disc_loss": "wasserstein"}, {"pixel_loss": "l3"}])
def test_unknown_loss_names_are_refused(options: dict[str, str]) -> None:
    refused(next(iter(options.values())), VQPerceptualLoss, n_embed=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_few_steps_of_adversarial_training_lower_the_error(kind: str) -> None:
    discriminator = PatchDiscriminator(ndf=8, n_layers=1)
    lpips = LPIPS(VGG16Trunk(WIDTHS))
    sizes = AutoencoderOptions(ch=16, ch_mult=[1, 1], norm_groups=16, z_channels=4, n_embed=16)
    model = (AutoencoderKL if kind == "kl" else VQModel)(sizes, resolution=16)
    criterion = (
        KLPerceptualLoss(lpips, perceptual_weight=0.1, disc_start=5)
        if kind == "kl"
        else VQPerceptualLoss(lpips, perceptual_weight=0.1, disc_start=5, n_embed=16)
    )
    optimisers = [torch.optim.Adam(m.parameters(), 4e-3, betas=(0.5, 0.9)) for m in (model, discriminator)]
    x = F.interpolate(torch.rand(4, 3, 3, 3) * 2 - 1, size=16, mode="bilinear")
    errors = []
    for step in range(25):
        rec, regulariser = model(x)
        loss, logs = criterion.autoencoder(x, rec, regulariser, discriminator, model.last_layer, step)
        optimisers[0].zero_grad()
        loss.backward()
        optimisers[0].step()
        loss, _ = criterion.discriminator(x, rec, discriminator, step)
        optimisers[1].zero_grad()
        loss.backward()
        optimisers[1].step()
        errors.append(logs["rec_loss"].item())
    assert errors[-1] < 0.7 * errors[0]
    assert logs["d_weight"] > 0


def test_lpips_is_zero_for_equal_images_symmetric_and_grows_with_noise() -> None:
    lpips = LPIPS(VGG16Trunk(WIDTHS))
    a, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    assert torch.equal(lpips(a, a), torch.zeros(2))
    near, far = lpips(a, a + 0.05 * noise), lpips(a, a + 0.5 * noise)
    assert ((near > 0) & (far > near)).all()
    torch.testing.assert_close(lpips(a + 0.5 * noise, a), far)


def test_uniform_weights_give_twice_the_cosine_distance() -> None:
    class OneTap(nn.Module):
        name = "identity"

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x]

    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    lpips = LPIPS(OneTap())
    torch.testing.assert_close(lpips(a, b), 2 * (1 - F.cosine_similarity(a, b, dim=1)).mean((1, 2)))
    assert lpips.name == "lpips-identity-uniform"
    weighted = LPIPS(OneTap(), [torch.tensor([0.0, 0.0, 2.0])])
    expected = 2 * (unit_normalise(a) - unit_normalise(b))[:, 2].square().mean((1, 2))
    torch.testing.assert_close(weighted(a, b), expected)
    assert weighted.name == "lpips-identity"


def test_lpips_gradient_is_finite_where_every_feature_is_off() -> None:
    trunk = VGG16Trunk(WIDTHS)
    for parameter in trunk.parameters():
        parameter.data.neg_().clamp_(max=0.0)
    image = torch.ones(1, 3, 16, 16, requires_grad=True)
    LPIPS(trunk)(image, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert image.grad is not None and torch.isfinite(image.grad).all()


def test_lpips_trunk_is_frozen_and_stays_in_eval_mode() -> None:
    lpips = LPIPS(nn.Sequential(nn.BatchNorm2d(3)))
    criterion = KLPerceptualLoss(lpips).train()
    assert criterion.training and not lpips.net[0].training
    assert [p for p in criterion.parameters() if p.requires_grad] == []


def official_files(folder: Path) -> tuple[Path, Path, LPIPS]:
    """The user's two files, in torchvision's and the LPIPS code's layout, with narrow widths."""
    trunk = VGG16Trunk(WIDTHS)
    heads = [torch.rand(1, width, 1, 1) for width in WIDTHS]
    vgg, lin = folder / "vgg16.pth", folder / "vgg.safetensors"
    torch.save({**trunk.state_dict(), "classifier.0.weight": torch.zeros(2, 2)}, vgg)
    save_file({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, lin)
    return vgg, lin, LPIPS(trunk, heads)


def test_official_lpips_loads_from_torchvision_weights_and_heads(tmp_path: Path) -> None:
    vgg, lin, expected = official_files(tmp_path)
    a, b = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    loaded = official_lpips(vgg, lin)
    torch.testing.assert_close(loaded(a, b), expected(a, b))
    assert loaded.name == "lpips-vgg16"
    assert official_lpips(vgg).name == "lpips-vgg16-uniform"


def test_wrong_lpips_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    vgg, lin, _ = official_files(tmp_path)
    refused(r"features\.0\.weight", official_lpips, lin)
    refused("no such file", official_lpips, tmp_path / "absent.pth")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(vgg.read_bytes()[:200])
    refused(r"truncated\.pth", official_lpips, truncated)
    pickled = tmp_path / "pickled.pth"
    torch.save({"model": nn.Linear(2, 2)}, pickled)
    refused("refused", official_lpips, pickled)
    short = tmp_path / "short.safetensors"
    save_file({f"lin{i}.model.1.weight": torch.ones(1, 3, 1, 1) for i in range(5)}, short)
    refused("lin0 has 3 channel weights; tap 0 has 4", official_lpips, vgg, short)
    refused("at least 16x16", official_lpips(vgg), torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_vgg16_taps_halve_the_resolution_and_have_the_official_layout() -> None:
    taps = VGG16Trunk(WIDTHS)(torch.zeros(1, 3, 32, 32))
    assert [tuple(tap.shape[1:]) for tap in taps] == [(w, 32 // 2**i, 32 // 2**i) for i, w in enumerate(WIDTHS)]
    numbers = [int(name) for name in VGG16Trunk(WIDTHS).features]
    assert numbers == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    with torch.device("meta"):
        assert sum(p.numel() for p in VGG16Trunk().parameters()) == 14_714_688
