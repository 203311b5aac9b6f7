"""One network of the search, trained from scratch for a few steps and compared on the validation pictures.

It is a job of `common.jobs`: a function of its options alone. All networks of a search see the same batches in the same
order and start from the same seed, so that they differ by their cells; batches are drawn once in each process.

Shape suffixes: B batch, C channels, H W sides, K classes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cpu import tune_allocator
from common.data.augmentation import Batches, evaluation_batches
from common.data.classes import ImageSet
from common.data.sampling import derive_seed
from common.errors import UserError, stop_if_not_finite
from common.jobs import Job
from eeea_net.config import DataConfig, ProxyOptions
from eeea_net.data import augmentation, open_data
from eeea_net.genotypes import Genotype
from eeea_net.losses import training_loss
from eeea_net.model import Network

JOB = "eeea_net.proxy.evaluate"
STREAM = 1  # of random numbers
EVALUATION_BATCH = 250
KEPT_BYTES = 2**29  # of batches that a process keeps


@dataclass(frozen=True)
class Setting:
    """What all networks of a search have in common."""

    data: DataConfig
    proxy: ProxyOptions
    seed: int
    device: str = "cpu"

    def job(self, genotype: Genotype) -> Job:
        options = {"data": asdict(self.data), "proxy": asdict(self.proxy), "seed": self.seed, "device": self.device}
        return Job(JOB, {"genotype": genotype.fields(), **options})


class Lesson:
    """The batches that every network of a search is trained on, and the pictures that it is compared on."""

    def __init__(self, setting: Setting, data: ImageSet | None = None) -> None:
        options = setting.proxy
        self.data = data or open_data(setting.data, setting.seed)
        self._device = setting.device
        augment = augmentation(setting.data, options.cutout)
        stream = derive_seed(setting.seed, STREAM)
        self._batches = Batches(self.data, self.data.train, options.batch_size, stream, augment, device=setting.device)
        self.steps = options.steps or self._batches.steps_per_epoch
        picture = 4 * self.data.channels * self.data.size**2
        self._keeps = self.steps * options.batch_size * picture <= KEPT_BYTES
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._validation: list[tuple[Tensor, Tensor]] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(pictures [B, C, H, W], classes [B]) of a step."""
        if not self._keeps:
            return self._batches.batch(step)
        while len(self._kept) <= step:
            self._kept.append(self._batches.batch(len(self._kept)))
        return self._kept[step]

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """All validation pictures and their classes, in batches."""
        if not self._validation:
            pictures = self.data.validation
            self._validation = list(evaluation_batches(self.data, pictures, EVALUATION_BATCH, self._device))
        return self._validation


@lru_cache(maxsize=1)
def _lesson(text: str) -> Lesson:
    found = json.loads(text)
    return Lesson(Setting(DataConfig(**found["data"]), ProxyOptions(**found["proxy"]), found["seed"], found["device"]))


def evaluate(
    genotype: dict[str, Any], data: Mapping[str, Any], proxy: Mapping[str, Any], seed: int, device: str
) -> dict[str, float]:
    """The job: error and loss on the validation pictures after training, and what it cost."""
    tune_allocator()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker is one core, and the numbers do not depend on how many there are
    try:
        lesson = _lesson(json.dumps({"data": data, "proxy": proxy, "seed": seed, "device": device}, sort_keys=True))
        return train_and_compare(Genotype.of(genotype), ProxyOptions(**proxy), lesson, seed, device)
    finally:
        torch.set_num_threads(threads)


def train_and_compare(
    genotype: Genotype,
    options: ProxyOptions,
    lesson: Lesson,
    seed: int,
    device: str = "cpu",
    fused: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, float]:
    """Train a network on a lesson; error 0..1 and mean loss on the validation pictures, NaN where it diverged.

    Args:
        fused: the optimiser's form; the other one, parameter by parameter, is what speed is measured against.
        layout: of weights, and with them of all maps: a depthwise convolution of few channels goes back up to seven
            times as fast with channels last. The other one is what speed is measured against.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(derive_seed(seed, STREAM, 0))
    network = Network(genotype, options.network(len(lesson.data.classes), lesson.data.channels))
    network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    loss = fit(network, options, lesson, fused)
    error, validation_loss = compare(network, lesson.validation()) if math.isfinite(loss) else (math.nan, math.nan)
    return {
        "error": error,
        "loss": validation_loss,
        "training_loss": loss,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def fit(network: Network, options: ProxyOptions, lesson: Lesson, fused: bool = True) -> float:
    """SGD with a cosine over the steps of the lesson; returns the last training loss, NaN as soon as it is not finite.

    A network that diverges is the worst of its generation, not the end of the search.
    """
    weights = list(network.parameters())
    # The fused form takes all tensors in one call: these networks have hundreds of small ones.
    optimiser = torch.optim.SGD(
        weights,
        options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov and options.momentum > 0,
        fused=fused,
        foreach=False,
    )
    network.train()
    value = math.nan
    for step in range(lesson.steps):
        optimiser.param_groups[0]["lr"] = options.lr * (1 + math.cos(math.pi * step / lesson.steps)) / 2
        x_BCHW, y_B = lesson.batch(step)
        optimiser.zero_grad(set_to_none=True)
        loss = training_loss(*network.with_auxiliary(x_BCHW), y_B, options.auxiliary)
        loss.backward()
        if options.grad_clip:
            nn.utils.clip_grad_norm_(weights, options.grad_clip, foreach=True)
        optimiser.step()
        value = float(loss.detach())
        try:
            stop_if_not_finite(value, step + 1)
        except UserError:
            return math.nan
    return value


@torch.no_grad()
def compare(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(error 0..1, mean cross-entropy) of a network in eval mode."""
    network.eval()
    wrong, loss, count = 0, 0.0, 0
    for x_BCHW, y_B in batches:
        logits_BK = network(x_BCHW)
        wrong += int((logits_BK.argmax(1) != y_B).sum())
        loss += float(F.cross_entropy(logits_BK, y_B, reduction="sum"))
        count += len(y_B)
    mean = loss / count
    return (wrong / count, mean) if math.isfinite(mean) else (math.nan, math.nan)
