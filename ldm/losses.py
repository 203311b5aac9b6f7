"""Losses of the first stage (paper appendix G): pixels + LPIPS, a PatchGAN, and the KL or codebook regulariser.

A step of the autoencoder (the GAN's generator) calls `autoencoder`, a step of the discriminator `discriminator`; both
return (loss, logs) and take the number of AUTOENCODER steps done so far: `disc_start` counts those, not the steps of
both optimisers.

Shape suffixes: B batch, C channels, H W height and width. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batch_norm import SharedBatchNorm
from common.errors import UserError
from common.steps import mean_over_processes
from ldm.autoencoder import DiagonalGaussian, Quantized, codebook_usage

Logs = dict[str, Tensor]


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per overlapping patch. 4x4 convolutions, `n_layers` of them strided.

    Image [B, input_nc, H, W] to logits [B, 1, h, w]. BatchNorm sees a real and a fake batch separately in train mode,
    each that of all processes inside `synchronised_statistics` (the authors' sees each process's own).
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            wider = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, padding=1, bias=False), SharedBatchNorm(wider)]
            layers += [nn.LeakyReLU(0.2)]
            width = wider
        layers += [nn.Conv2d(width, 1, 4, stride=1, padding=1)]
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.main(x_BCHW)


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The original GAN's binary cross-entropy."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_discriminator_loss,
    "vanilla": vanilla_discriminator_loss,
}


def adaptive_weight(nll: Tensor, g_loss: Tensor, last_layer: Tensor, disc_weight: float) -> Tensor:
    """disc_weight * clamp(|grad_W nll| / (|grad_W g| + 1e-4), 0, 1e4), W the last decoder layer (VQGAN, eq. 7).

    The clamp comes before disc_weight, as in the authors' code; the gradients are those of the global batch.
    """
    (nll_grad,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    nll_grad, g_grad = mean_over_processes(torch.stack([nll_grad.float(), g_grad.float()]))
    ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
    return disc_weight * ratio.clamp(0.0, 1e4).detach()


class AdversarialReconstruction(nn.Module):
    """What the KL and VQ losses share: pixel + perceptual error, the discriminator and when it starts.

    `lpips` maps two images to a distance [B]; None leaves pixels only. `disc_start` counts autoencoder steps; before it
    the GAN term is exactly 0 and not even computed, unless `log_inactive_gan` asks for its logs.
    """

    def __init__(
        self,
        lpips: nn.Module | None,
        *,
        disc_start: int,
        disc_weight: float,
        perceptual_weight: float = 1.0,
        pixel_loss: str = "l1",
        disc_factor: float = 1.0,
        disc_loss: str = "hinge",
        log_inactive_gan: bool = False,
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise UserError(f'disc_loss is "{disc_loss}"; expected one of: {", ".join(DISCRIMINATOR_LOSSES)}')
        if pixel_loss not in ("l1", "l2"):
            raise UserError(f'pixel_loss is "{pixel_loss}"; expected "l1" or "l2"')
        self.perceptual_loss = lpips
        self.perceptual_weight = perceptual_weight
        self.pixel_loss = pixel_loss
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.disc_loss = disc_loss
        self.log_inactive_gan = log_inactive_gan

    def gan_factor(self, step: int) -> float:
        """0 before `disc_start` autoencoder steps, then `disc_factor`."""
        return self.disc_factor if step >= self.disc_start else 0.0

    def reconstruction_error(self, x_BCHW: Tensor, rec_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Per-pixel error [B, C, H, W] with the image's LPIPS added to each pixel; and the LPIPS [B]."""
        difference_BCHW = x_BCHW.float() - rec_BCHW.float()
        error_BCHW = difference_BCHW.abs() if self.pixel_loss == "l1" else difference_BCHW.square()
        if self.perceptual_loss is None or self.perceptual_weight <= 0:
            return error_BCHW, error_BCHW.new_zeros(x_BCHW.shape[0])
        p_B = self.perceptual_loss(x_BCHW, rec_BCHW)
        return error_BCHW + self.perceptual_weight * p_B.view(-1, 1, 1, 1), p_B

    def gan_term(
        self, nll: Tensor, rec_BCHW: Tensor, discriminator: nn.Module | None, last_layer: Tensor | None, step: int
    ) -> tuple[Tensor, Logs]:
        """w_d * disc_factor * g with g = -mean D(rec). Without a graph to `last_layer` (evaluation) w_d is 0."""
        factor = 0.0 if discriminator is None else self.gan_factor(step)
        g_loss, weight = nll.new_zeros(()), nll.new_zeros(())
        if discriminator is not None and (factor > 0 or self.log_inactive_gan):
            g_loss = -discriminator(rec_BCHW).float().mean()
            if last_layer is not None and nll.requires_grad and self.disc_factor > 0:
                weight = adaptive_weight(nll, g_loss, last_layer, self.disc_weight)
        logs = {"g_loss": g_loss.detach(), "d_weight": weight, "disc_factor": nll.new_tensor(factor)}
        return weight * factor * g_loss, logs

    def discriminator(
        self, x_BCHW: Tensor, rec_BCHW: Tensor, discriminator: nn.Module, step: int
    ) -> tuple[Tensor, Logs]:
        """The discriminator's loss (0 before `disc_start`) and its mean logits."""
        logits_real = discriminator(x_BCHW.detach()).float()
        logits_fake = discriminator(rec_BCHW.detach()).float()
        loss = self.gan_factor(step) * DISCRIMINATOR_LOSSES[self.disc_loss](logits_real, logits_fake)
        logs = {"disc_loss": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}


class KLPerceptualLoss(AdversarialReconstruction):
    """The KL autoencoder's loss: nll SUMMED over pixels, mean over images, + kl_weight * KL + the GAN term.

    `logvar` is the scalar s of rec/exp(s) + s. The authors declare it trainable but give it to no optimiser, so it
    stays at its start value; `learn_logvar` lets it learn.
    """

    def __init__(
        self,
        lpips: nn.Module | None = None,
        *,
        kl_weight: float = 1e-6,
        logvar_init: float = 0.0,
        learn_logvar: bool = False,
        disc_start: int = 50001,
        disc_weight: float = 0.5,
        **shared: Any,
    ) -> None:
        super().__init__(lpips, disc_start=disc_start, disc_weight=disc_weight, **shared)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)

    def autoencoder(
        self,
        x_BCHW: Tensor,
        rec_BCHW: Tensor,
        posterior: DiagonalGaussian,
        discriminator: nn.Module | None,
        last_layer: Tensor | None,
        step: int,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """Loss and logs of an autoencoder step; `weights` (broadcast to [B, C, H, W]) weighs pixels, not w_d."""
        error_BCHW, p_B = self.reconstruction_error(x_BCHW, rec_BCHW)
        nll_BCHW = error_BCHW / self.logvar.exp() + self.logvar
        batch = x_BCHW.shape[0]
        nll = nll_BCHW.sum() / batch
        weighted_nll = nll if weights is None else (weights * nll_BCHW).sum() / batch
        kl = posterior.kl().mean()
        gan, logs = self.gan_term(nll, rec_BCHW, discriminator, last_layer, step)
        loss = weighted_nll + self.kl_weight * kl + gan
        return loss, {
            "total_loss": loss.detach(),
            "nll_loss": nll.detach(),
            "rec_loss": error_BCHW.detach().mean(),
            "p_loss": p_B.detach().mean(),
            "kl_loss": kl.detach(),
            "logvar": self.logvar.detach(),
            **logs,
        }


class VQPerceptualLoss(AdversarialReconstruction):
    """The VQ autoencoder's loss: nll is the MEAN over pixels, + codebook_weight * codebook loss + the GAN term."""

    def __init__(
        self,
        lpips: nn.Module | None = None,
        *,
        n_embed: int,
        codebook_weight: float = 1.0,
        disc_start: int = 0,
        disc_weight: float = 0.75,
        **shared: Any,
    ) -> None:
        super().__init__(lpips, disc_start=disc_start, disc_weight=disc_weight, **shared)
        self.n_embed = n_embed
        self.codebook_weight = codebook_weight

    def autoencoder(
        self,
        x_BCHW: Tensor,
        rec_BCHW: Tensor,
        quantized: Quantized,
        discriminator: nn.Module | None,
        last_layer: Tensor | None,
        step: int,
    ) -> tuple[Tensor, Logs]:
        """Loss and logs of an autoencoder step, with the batch's codebook perplexity and number of codes in use."""
        error_BCHW, p_B = self.reconstruction_error(x_BCHW, rec_BCHW)
        nll = error_BCHW.mean()
        gan, logs = self.gan_term(nll, rec_BCHW, discriminator, last_layer, step)
        loss = nll + gan + self.codebook_weight * quantized.loss
        perplexity, cluster_usage = codebook_usage(quantized.indices, self.n_embed)
        return loss, {
            "total_loss": loss.detach(),
            "nll_loss": nll.detach(),
            "rec_loss": error_BCHW.detach().mean(),
            "p_loss": p_B.detach().mean(),
            "quant_loss": quantized.loss.detach(),
            "perplexity": perplexity,
            "cluster_usage": cluster_usage,
            **logs,
        }
