"""The adaptation loss: a perceptual distance, and what lies at high frequencies (section 2.4).

Pictures are in [0, 1] and never clamped here, which would stop gradients. By Parseval the squared difference of two
high-pass pictures is a sum over the kept frequencies of one transform: no inverse is needed.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from common.metrics.perceptual import perceptual_distance
from hipa.config import LossConfig
from hipa.dists import Dists, dists
from hipa.frequency import edges, high_pass, radii

Parts = dict[str, Tensor]  # name -> scalar; "loss" is what is minimised


def fourier_loss(x_BCHW: Tensor, y_BCHW: Tensor, radius: float, kind: str = "mse", gaussian: bool = False) -> Tensor:
    """L_fourier above `radius` cycles per picture: mean squared difference of high-pass pictures, or mean absolute
    difference of the kept coefficients or of their amplitudes."""
    height, width = x_BCHW.shape[-2:]
    if gaussian:
        return (high_pass(x_BCHW - y_BCHW, radius, gaussian=True)).square().mean()
    if kind == "mse":
        distance_HF = radii(height, width, half=True).to(x_BCHW.device)
        difference = torch.fft.rfft2(x_BCHW.float() - y_BCHW.float(), norm="ortho")
        # Every column of the half spectrum but the first, and the last of an even width, stands for two.
        twice_F = torch.full((distance_HF.shape[1],), 2.0, device=x_BCHW.device)
        twice_F[0] = 1.0
        if width % 2 == 0:
            twice_F[-1] = 1.0
        power = (difference.real.square() + difference.imag.square()) * ((distance_HF > radius) * twice_F)
        return power.sum() / x_BCHW.numel()
    above_HW = radii(height, width).to(x_BCHW.device) > radius
    x, y = (torch.fft.fft2(z.float(), norm="ortho")[..., above_HW] for z in (x_BCHW, y_BCHW))
    return (x - y).abs().mean() if kind == "l1_complex" else (x.abs() - y.abs()).abs().mean()


def edge_loss(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """L_edge: mean squared difference of Sobel magnitudes."""
    return (edges(x_BCHW) - edges(y_BCHW)).square().mean()


class AdaptationLoss:
    """L_spatial + weight (L_fourier + L_edge), with its parts.

    Args:
        decode: latents to pictures in [-1, 1], differentiable; not called for the space `latents`.

    Raises:
        UserError: a perceptual loss in latents, or a mask that does not go with the Fourier loss.
    """

    def __init__(self, options: LossConfig, decode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.options, self.decode = options, decode
        self.perceptual: Dists | None = None
        self.lpips = None
        if options.space == "latents" and (options.spatial != "mse" or options.edge == "dists"):
            raise UserError(
                "--loss.space latents has no picture to look at: expected --loss.spatial mse, --loss.edge mse or none"
            )
        if options.mask == "gaussian" and options.fourier not in ("mse", "none"):
            raise UserError(f"--loss.mask gaussian goes with --loss.fourier mse, not {options.fourier}")
        if options.spatial == "dists" or options.edge == "dists":
            self.perceptual = dists(options.trunk).to(device)
        if options.spatial == "lpips":
            self.lpips = perceptual_distance(options.trunk).to(device)

    def __call__(self, latents_BCHW: Tensor, target_BCHW: Tensor, picture_BCHW: Tensor | None = None) -> Parts:
        """Of one-step latents and the target's latents.

        Args:
            picture_BCHW: the target decoded to [0, 1], where it is known already.
        """
        if self.options.space == "latents":
            return self.of_pictures(latents_BCHW, target_BCHW)
        if picture_BCHW is None:
            with torch.no_grad():
                picture_BCHW = (self.decode(target_BCHW) + 1) / 2
        size = self.options.at_once or len(latents_BCHW)
        if size >= len(latents_BCHW) or not (torch.is_grad_enabled() and latents_BCHW.requires_grad):
            return self._of_latents(latents_BCHW, picture_BCHW)
        names: list[str] = []
        values = _InParts.apply(latents_BCHW, picture_BCHW, size, self._of_latents, names)
        return dict(zip(names, values, strict=True))

    def _of_latents(self, latents_BCHW: Tensor, picture_BCHW: Tensor) -> Parts:
        if self.options.recompute:
            drawn_BCHW = checkpoint(self.decode, latents_BCHW, use_reentrant=False)
        else:
            drawn_BCHW = self.decode(latents_BCHW)
        # Blurs and small convolutions of the features take twice as long back in bfloat16 as in float32 on CPUs.
        with torch.autocast("cpu", enabled=False) if drawn_BCHW.device.type == "cpu" else nullcontext():
            return self.of_pictures((drawn_BCHW.float() + 1) / 2, picture_BCHW.float())

    def of_pictures(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Parts:
        """Of pictures in [0, 1] (or of latents, in their own range)."""
        options, height = self.options, x_BCHW.shape[-2]
        parts: Parts = {"spatial": self._spatial(x_BCHW, y_BCHW)}
        loss = parts["spatial"]
        if options.weight > 0:
            if options.fourier != "none":
                gaussian = options.mask == "gaussian"
                # Rounded: a share like 13 / 45 of 45 rows is 13 cycles, not a little less.
                radius = round(options.radius * height, 9)
                parts["fourier"] = fourier_loss(x_BCHW, y_BCHW, radius, options.fourier, gaussian)
            if options.edge == "mse":
                parts["edge"] = edge_loss(x_BCHW, y_BCHW)
            elif options.edge == "dists":
                assert self.perceptual is not None
                parts["edge"] = self.perceptual(edges(x_BCHW), edges(y_BCHW)).mean()
            for name in ("fourier", "edge"):
                if name in parts:
                    loss = loss + options.weight * parts[name]
        return {"loss": loss, **parts}

    def _spatial(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        if self.options.spatial == "mse":
            return (x_BCHW - y_BCHW).square().mean()
        if self.options.spatial == "lpips":
            assert self.lpips is not None
            return self.lpips(2 * x_BCHW - 1, 2 * y_BCHW - 1).mean()
        assert self.perceptual is not None
        with torch.no_grad():
            wanted = self.perceptual.features(y_BCHW)
        return self.perceptual.between(self.perceptual.features(x_BCHW), wanted).mean()


class _InParts(torch.autograd.Function):
    """A loss that is a mean over pictures, a few pictures at a time.

    Each part goes back to its latents at once, so that what decoder and features keep for it is gone before the next
    one comes; nothing is computed twice.

    Only "loss" has a gradient; the other values are for logs.
    """

    @staticmethod
    def forward(
        context: Any,
        latents_BCHW: Tensor,
        picture_BCHW: Tensor,
        size: int,
        of_latents: Callable[[Tensor, Tensor], Parts],
        names: list[str],
    ) -> tuple[Tensor, ...]:
        total: Parts = {}
        gradients = []
        for part_bCHW, wanted_bCHW in zip(latents_BCHW.split(size), picture_BCHW.split(size), strict=True):
            part_bCHW = part_bCHW.detach().requires_grad_()
            share = len(part_bCHW) / len(latents_BCHW)
            with torch.enable_grad():
                parts = {name: share * value for name, value in of_latents(part_bCHW, wanted_bCHW).items()}
            gradients += torch.autograd.grad(parts["loss"], part_bCHW)
            total = {name: total.get(name, 0.0) + value.detach() for name, value in parts.items()}
        context.save_for_backward(torch.cat(gradients))
        names += total
        outputs = tuple(total.values())
        context.mark_non_differentiable(*(value for name, value in total.items() if name != "loss"))
        return outputs

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BCHW,) = context.saved_tensors
        return upstream[0] * gradient_BCHW, None, None, None, None
