"""The frozen networks that judge images: pluggable, and named in every number they produce.

`load_extractor("lite0")` needs only the packaged weights; `load_extractor("inception:PATH")` reads the weight file of
pytorch-fid (`pt_inception-2015-12-05-*.pth`), and only then may a number be called FID and compared with a paper's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.images import as_uint8, folder_batches, resize_clean
from common.metrics.inception import FEATURES as INCEPTION_FEATURES
from common.metrics.inception import SIZE as INCEPTION_SIZE
from common.metrics.inception import InceptionV3
from common.metrics.lite0 import FEATURES as LITE0_FEATURES
from common.metrics.lite0 import Lite0Trunk, load_lite0, normalise

__all__ = [
    "Extractor",
    "InceptionExtractor",
    "Lite0Extractor",
    "Lite0Trunk",
    "class_probabilities",
    "extract",
    "folder_features",
    "load_extractor",
]


@runtime_checkable
class Extractor(Protocol):
    """What every metric needs of a judge. An extractor may also have `logits(features [N,D]) -> [N,classes]`."""

    name: str  # short, goes into metric names: fid_<name>
    dim: int
    resize: str  # the resize rule in words, for reports

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N,3,H,W] of any size -> float32 features [N,D] on the CPU."""
        ...


class Lite0Extractor:
    """EfficientNet-Lite0, ImageNet weights, 1280 pooled features; about 6 ms an image at 112 on one CPU core.

    On flat artwork it punishes faint background noise as hard as a strong blur (sigma 2 of 255 on emoji: KID 0.36).
    size: side the images are resized to; 112 is the project's setting, other sizes are named lite0@SIZE.
    """

    dim = LITE0_FEATURES

    def __init__(self, size: int = 112, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        self.name = "lite0" if size == 112 else f"lite0@{size}"
        self.size, self.device, self.batch_size = size, torch.device(device), batch_size
        self.resize = f"anti-aliased bicubic in float to {size} (clean-fid rule)"
        self.net = load_lite0().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        def features(x: Tensor) -> Tensor:
            return self.net(normalise(resize_clean(x, self.size)).contiguous(memory_format=torch.channels_last))

        return _batched(features, images, self.batch_size, self.device, self.dim)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """ImageNet-1k logits [N,1000]."""
        return self.net.logits(features.to(self.device)).cpu()


class InceptionExtractor:
    """Inception-v3 of the FID literature: 2048 pooled features, pytorch-fid's resize and input range.

    path: pytorch-fid's state dict (.pth) or the same tensors as .safetensors.
    Raises UserError when the file is missing, unreadable or another network.
    """

    name = "inception"
    dim = INCEPTION_FEATURES
    resize = f"bilinear without anti-aliasing to {INCEPTION_SIZE} (pytorch-fid rule)"

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", batch_size: int = 32) -> None:
        self.device, self.batch_size = torch.device(device), batch_size
        with torch.device("meta"):
            net = InceptionV3()
        net.load_state_dict(_inception_weights(Path(path), net.state_dict()), assign=True)
        self.net = net.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        def features(x: Tensor) -> Tensor:
            size = (INCEPTION_SIZE, INCEPTION_SIZE)
            resized = F.interpolate(x.float() / 255, size, mode="bilinear", align_corners=False)
            return self.net(2 * resized - 1)

        return _batched(features, images, self.batch_size, self.device, self.dim)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """TensorFlow-graph logits [N,1008] without bias, as the published Inception Scores use them."""
        return self.net.logits(features.to(self.device)).cpu()


def _inception_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected pytorch-fid's pt_inception-2015-12-05-*.pth")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a plain weight file (damaged, or a pickle); expected pytorch-fid's pt_inception-*.pth"
        ) from error
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds a {type(weights).__name__}, expected a dictionary of tensors (a state dict)")
    # Old files lack the batch counters, which evaluation never reads.
    counters = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked")}
    weights = {**counters, **weights}
    missing = sorted(expected.keys() - weights.keys())
    extra = sorted(weights.keys() - expected.keys())
    wrong = sorted(
        key for key in expected.keys() & weights.keys() if getattr(weights[key], "shape", None) != expected[key].shape
    )
    for what, keys in (("lacks", missing), ("has the unknown tensor", extra), ("has another shape for", wrong)):
        if keys:
            raise UserError(
                f"{path}: {what} {keys[0]} ({len(keys)} such); expected pytorch-fid's Inception-v3 "
                "(torchvision's ImageNet file is another network and gives other distances)"
            )
    return weights


def _batched(
    network: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device, dim: int
) -> Tensor:
    batch = as_uint8(images)
    parts = [network(part.to(device)).float().cpu() for part in batch.split(batch_size)]
    return torch.cat(parts) if len(batch) else torch.zeros(0, dim)


def load_extractor(spec: str = "lite0", device: str | torch.device = "cpu") -> Extractor:
    """`lite0`, `lite0@SIZE` or `inception:PATH`. Raises UserError for anything else."""
    kind, _, path = spec.partition(":")
    if kind == "inception" and path:
        return InceptionExtractor(path, device)
    if spec == "lite0":
        return Lite0Extractor(device=device)
    if spec.startswith("lite0@") and spec[6:].isdigit() and int(spec[6:]) >= 32:
        return Lite0Extractor(int(spec[6:]), device)
    raise UserError(f'unknown feature extractor "{spec}": use lite0, lite0@SIZE (SIZE >= 32) or inception:PATH')


def extract(images: Tensor | np.ndarray, extractor: Extractor) -> Tensor:
    """Features [N,D] of images in any form that `common.images.as_uint8` takes."""
    return extractor(as_uint8(images))


def folder_features(files: Sequence[Path | bytes], extractor: Extractor) -> Tensor:
    """Features [N,D] in the order of `files`; images may differ in size. Raises UserError naming a broken file."""
    features = torch.zeros(len(files), extractor.dim)
    for indices, images in folder_batches(files):
        features[indices] = extractor(images)
    return features


def class_probabilities(features: Tensor, extractor: Extractor) -> Tensor | None:
    """Softmax class probabilities [N,C] for the Inception-Score form; None when the extractor has no classifier."""
    logits = getattr(extractor, "logits", None)
    return None if logits is None else logits(features).double().softmax(1)
