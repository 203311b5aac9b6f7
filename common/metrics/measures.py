"""What a few-step sampler is judged by: fidelity to data and to the teacher, prompts, variety, detail.

Every number is deterministic, on fixed prompts and fixed noises, so that arms differ in nothing but their weights.

Shape suffixes: N images, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data.sampling import step_generator
from common.data.shapes import Shapes, Spec
from common.data.shapes_verifier import free_attribute_entropy, score
from common.metrics.distribution import fid
from common.metrics.features import Extractor, extract

EVALUATION_SEED = 90210  # of the held-out scenes and of their noises: the same for every method, never trained on


@dataclass
class PromptSet:
    """Fixed prompts, noises and, where there are some, real images that fit them.

    Args:
        prompts: one for each image.
        noise: [N, C, H, W], unit normal; row i belongs to prompt i, whatever N is.
        reference: uint8 [N, 3, h, w], held-out images of the same prompts, or None.
        specs: what each image must show (Shapes), or None.
    """

    prompts: list[str]
    noise: Tensor
    reference: Tensor | None = None
    specs: list[Spec] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def head(self, n: int) -> PromptSet:
        """The first n entries."""
        reference = None if self.reference is None else self.reference[:n]
        specs = None if self.specs is None else self.specs[:n]
        return PromptSet(self.prompts[:n], self.noise[:n], reference, specs)


def fixed_noise(n: int, shape: Sequence[int], seed: int = EVALUATION_SEED) -> Tensor:
    """Unit-normal [n, *shape]; row i is a function of (seed, i) alone."""
    return torch.stack([torch.randn(*shape, generator=step_generator(seed, i)) for i in range(n)])


def shapes_prompts(n: int, latent_shape: Sequence[int], size: int = 32, seed: int = EVALUATION_SEED) -> PromptSet:
    """Captions of n held-out scenes of the training world; the scenes themselves are the reference."""
    data = Shapes("test", n, size, seed=seed)
    images = torch.from_numpy(np.ascontiguousarray(data.images))
    return PromptSet(data.captions, fixed_noise(n, latent_shape, seed), images, [data.spec(i) for i in range(n)])


def held_out_prompts(
    name: str, count: int, latent_shape: Sequence[int], size: int = 32, text: str | None = None
) -> PromptSet:
    """Prompts that nothing is trained on, with fixed noises and, where there are some, real images of them.

    Args:
        name: shapes, emoji, or a file of prompts (`common.data.pairs.prompt_list`); text: its column of prompts.
    """
    if name == "shapes":
        return shapes_prompts(count, latent_shape, size)
    if name == "emoji":
        from common.data.emoji import EmojiCap

        data = EmojiCap("test", size=size)
        items = [data[i] for i in range(min(count, len(data)))]
        reference = torch.stack([item["image"] for item in items])
        return PromptSet([item["caption"] for item in items], fixed_noise(len(items), latent_shape), reference)
    from common.data.pairs import prompt_list

    prompts = prompt_list(name, count, "test", text)[:count]
    return PromptSet(prompts, fixed_noise(len(prompts), latent_shape))


def high_frequency_energy(images: Tensor) -> float:
    """Power of uint8 [N, 3, H, W] (as [0, 1]) above H / 8 cycles per image (HiPA's band): mean over images, colours."""
    x_NCHW = images.double() / 255
    spectrum_NCHW = torch.fft.fft2(x_NCHW, norm="ortho").abs().square()
    frequency_H = torch.fft.fftfreq(x_NCHW.shape[-2], dtype=torch.float64) * x_NCHW.shape[-2]
    frequency_W = torch.fft.fftfreq(x_NCHW.shape[-1], dtype=torch.float64) * x_NCHW.shape[-1]
    radius_HW = (frequency_H[:, None].square() + frequency_W.square()).sqrt()
    return float((spectrum_NCHW * (radius_HW > x_NCHW.shape[-2] / 8)).sum((-1, -2)).mean())


def high_frequency_error(images: Tensor, reference: Tensor) -> float:
    """|log(E_hf(images) / E_hf(reference))|."""
    tiny = 1e-12  # flat images have no energy there at all
    return abs(float(np.log((high_frequency_energy(images) + tiny) / (high_frequency_energy(reference) + tiny))))


def variety(images: Tensor) -> float:
    """Mean normalised entropy of texture, background, colour, position and size over the images (Shapes)."""
    entropy = free_attribute_entropy(images.numpy())
    return float(np.mean([value for name, value in entropy.items() if name != "empty"]))


@dataclass
class Yardstick:
    """Measures images of one prompt set; features of the references are computed once.

    Args:
        teacher_images: the teacher's many-step images from the same prompts and noises, uint8 [N, 3, h, w].
        distance: perceptual distance of images in [-1, 1] (LPIPS form), or None.
    """

    prompts: PromptSet
    judge: Extractor
    teacher_images: Tensor | None = None
    distance: Any = None
    _features: dict[str, Tensor] = field(default_factory=dict)

    def _reference(self, name: str, images: Tensor) -> Tensor:
        if name not in self._features:
            self._features[name] = extract(images, self.judge)
        return self._features[name]

    def measure(self, images: Tensor) -> dict[str, float]:
        """All numbers of one arm's images, uint8 [N, 3, h, w], N at most the prompt set's.

        fd_data, fd_teacher: Frechet distance in float64 to held-out images and to the teacher's; accuracy: mean over
        tasks of the share of images that show what was asked for; entropy: variety of the free attributes; hf_error:
        against the teacher; perceptual: mean distance to the teacher's image of the same noise.
        """
        n = len(images)
        found = extract(images, self.judge)
        result: dict[str, float] = {}
        prompts = self.prompts.head(n)
        if prompts.reference is not None:
            result["fd_data"] = fid(self._reference("data", prompts.reference)[:n], found)
        if self.teacher_images is not None:
            teacher = self.teacher_images[:n]
            result["fd_teacher"] = fid(self._reference("teacher", self.teacher_images)[:n], found)
            result["hf_error"] = high_frequency_error(images, teacher)
            if self.distance is not None:
                result["perceptual"] = mean_distance(self.distance, images, teacher)
        if prompts.specs is not None:
            result["accuracy"] = score(images.numpy(), prompts.specs)["mean"]
            result["entropy"] = variety(images)
        return result


@torch.inference_mode()
def mean_distance(distance: Any, a: Tensor, b: Tensor, batch: int = 128) -> float:
    """Mean perceptual distance of two equally long uint8 sets."""
    total = 0.0
    for x, y in zip(a.split(batch), b.split(batch)):
        total += float(distance(x.float() / 127.5 - 1, y.float() / 127.5 - 1).double().sum())
    return total / len(a)
