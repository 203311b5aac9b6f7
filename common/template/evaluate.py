"""The data (handwritten digits of scikit-learn, 8 x 8), and how close a denoiser comes to clean ones."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.data.classes import open_classes
from common.data.sampling import TensorTable, step_generator


def digits(part: str) -> TensorTable:
    """One column, image: float32 [N, 1, 8, 8] in [0, 1]. part: train or test."""
    pictures = getattr(open_classes("digits", 8), part)
    return TensorTable({"image": pictures.source.take(pictures.index_N).float() / 255})


@torch.no_grad()
def measure(network: nn.Module, sigma: float) -> dict[str, float]:
    """Mean squared errors, and PSNR in dB, on the test pictures; the noise is the same for all networks."""
    x_BCHW = digits("test").columns["image"]
    y_BCHW = x_BCHW + sigma * torch.randn(x_BCHW.shape, generator=step_generator(0, 0))
    mse, mse_noisy = (float(F.mse_loss(picture, x_BCHW)) for picture in (network.eval()(y_BCHW), y_BCHW))
    return {"mse": mse, "mse_noisy": mse_noisy, "psnr": -10 * math.log10(mse)}
