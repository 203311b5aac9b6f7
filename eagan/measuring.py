"""Pictures of a generator, and what they are worth: IS and FID at equal counts, from the same z for everybody.

Normalisation: `to_rgb` of a supernet is shared by all its generators, so that its running statistics are nobody's.
`batch_norm` genotype estimates them anew for the generator at hand, over pictures of its own; running takes the shared
ones, as the released code does; batch takes those of each batch.

Shape suffixes: N pictures, Z latent, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.costs import parameter_count
from common.data.classes import Pictures
from common.images import make_grid, save_png, to_uint8
from common.metrics.distribution import fid, inception_score
from common.metrics.features import Extractor, class_probabilities, extract
from common.metrics.measures import fixed_noise
from common.weights import read_weights, save_weights
from eagan.config import BatchNorm, NetworkConfig
from eagan.data import Real, take
from eagan.genotypes import Genes
from eagan.judge import open_judge
from eagan.model import Generator, inherit
from eagan.training import placed

STATISTICS_SEED = 4711  # of the z that statistics of normalisation are estimated from
STATISTICS = 512  # pictures for that
LATENT_SEED = 90211  # of the z that everybody is measured with


@torch.no_grad()
def estimate_statistics(generator: Generator, batch_size: int) -> None:
    """Set the running statistics of the generator's normalisation to those of pictures of its own, exactly."""
    norm = generator.to_rgb[0]
    assert isinstance(norm, nn.BatchNorm2d)
    count, total, squares = 0, torch.zeros(()), torch.zeros(())

    def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal count, total, squares
        x = given[0].double()
        count += x.numel() // x.shape[1]
        total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))

    hook = norm.register_forward_pre_hook(see)
    device = norm.weight.device
    for z_NZ in fixed_noise(STATISTICS, (generator.config.latent_dim,), STATISTICS_SEED).split(batch_size):
        generator(z_NZ.to(device))
    hook.remove()
    mean = total / count
    norm.running_mean.copy_(mean)  # type: ignore[union-attr]
    norm.running_var.copy_((squares / count - mean.square()).clamp_min(0) * count / (count - 1))  # type: ignore[union-attr]


@torch.no_grad()
def draw(generator: Generator, z_NZ: Tensor, batch_norm: BatchNorm, batch_size: int) -> Tensor:
    """uint8 [N, 3, S, S] on the CPU of a generator that stands alone. With `genotype` its statistics change."""
    if batch_norm == "genotype":
        generator.eval()
        estimate_statistics(generator, batch_size)
    generator.train(batch_norm == "batch")
    running = {name: value.clone() for name, value in generator.named_buffers()}
    device = next(generator.parameters()).device
    parts = [to_uint8(generator(part.to(device))).cpu() for part in z_NZ.split(batch_size)]
    for name, value in generator.named_buffers():
        value.copy_(running[name])
    generator.eval()
    return torch.cat(parts)


def latents(count: int, width: int) -> Tensor:
    """The z [N, Z] that everybody is measured with; row i is a function of i alone."""
    return fixed_noise(count, (width,), LATENT_SEED)


@dataclass(frozen=True)
class Scores:
    """What is known of a set of generated pictures.

    Args:
        inception_score: over `splits` parts, and its spread over them; NaN where the judge has no classes.
        fid: to as many real pictures as there are generated ones.
        images: of each side; judge, resize, batch_norm: how they were measured. Scores that differ in one of these are
            not to be compared.
    """

    inception_score: float
    inception_score_std: float
    fid: float
    images: int
    splits: int
    judge: str
    resize: str
    batch_norm: str


def score(images: Tensor, real_ND: Tensor, judge: Extractor, splits: int, batch_norm: str) -> Scores:
    """IS of pictures, and FID to the first as many real ones (their features)."""
    return score_features(extract(images, judge), real_ND, judge, splits, batch_norm)


def score_features(found_ND: Tensor, real_ND: Tensor, judge: Extractor, splits: int, batch_norm: str) -> Scores:
    """The same, of features."""
    probabilities = class_probabilities(found_ND, judge)
    splits = min(splits, len(found_ND))
    estimate = None if probabilities is None else inception_score(probabilities, splits)
    return Scores(
        math.nan if estimate is None else estimate.value,
        math.nan if estimate is None else estimate.std,
        fid(real_ND[: len(found_ND)], found_ND),
        len(found_ND),
        splits,
        judge.name,
        judge.resize,
        batch_norm,
    )


class Reference:
    """Features of real pictures in a run's folder: of training pictures, which everything is compared with, and of
    others (held out, or of the rest), whose distance is the floor that a perfect generator would reach.
    """

    def __init__(self, path: Path) -> None:
        tensors, notes = read_weights(path)
        self.judge, self.train_ND, self.other_ND = notes["judge"], tensors["train"], tensors["other"]

    @classmethod
    def of(cls, path: Path, real: Real, judge: Extractor, count: int) -> Reference:
        """The one in a file, or made: `count` training pictures in an order of their own, and as many others, held out
        or of the rest, of which there may be fewer. The first ones are the same for every count.
        """
        if path.is_file() and len((found := cls(path)).train_ND) >= min(count, len(real.train)):
            return found
        order = torch.randperm(len(real.train), generator=torch.Generator().manual_seed(0))
        held_out = torch.arange(min(len(real.held_out), count))
        rest = order[count:][: count - len(held_out)]

        def features(pictures: Pictures, rows: Tensor) -> Tensor:
            return torch.cat([extract(take(pictures, some), judge) for some in rows.split(500)])

        other = [features(p, rows) for p, rows in ((real.held_out, held_out), (real.train, rest)) if len(rows)]
        tensors = {"train": features(real.train, order[:count]), "other": torch.cat(other)}
        save_weights(path, tensors, {"judge": judge.name})
        return cls(path)

    def floor(self, judge: Extractor, splits: int, count: int) -> Scores:
        """Real against real, at this count or as many as there are."""
        count = min(count, len(self.other_ND), len(self.train_ND))
        return score_features(self.other_ND[:count], self.train_ND, judge, splits, "real pictures")


# Jobs of a population -------------------------------------------------------------------------------------------------


@cache
def _open(judge: str, reference: str, device: str, _: float) -> tuple[Extractor, Reference]:
    """Once for all jobs of a process; the last argument tells whether the file is still the same."""
    return open_judge(judge, device), Reference(Path(reference))


@contextmanager
def one_thread() -> Iterator[None]:
    """Equal results in whatever process: sums of several threads have other roundings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_individual(
    weights: str,
    prefix: str,
    supernet: bool,
    genes: list[list[int]],
    network: Mapping[str, Any],
    reference: str,
    judge: str,
    images: int,
    splits: int,
    batch_norm: BatchNorm,
    batch_size: int,
    sheet: int,
    strip: str,
    device: str,
) -> dict[str, Any]:
    """A job: the scores of one generator.

    Args:
        weights: file with the tensors; prefix: of this generator's; supernet: whether it has to be taken out of one.
        sheet: pictures that are kept side by side in the file `strip`.

    Returns:
        `Scores`, parameters; or {"failed_because": why} where pictures are not finite.
    """
    config = NetworkConfig(**network)
    genotype: Genes = tuple(tuple(cell) for cell in genes)
    with one_thread():
        generator = Generator(config, genotype)
        tensors = {k.removeprefix(prefix): v for k, v in read_weights(Path(weights))[0].items() if k.startswith(prefix)}
        if supernet:
            inherit(generator, tensors)
        else:
            generator.load_state_dict(tensors)
        parameters = parameter_count(generator)
        if not all(torch.isfinite(tensor).all() for tensor in generator.state_dict().values()):
            return {"failed_because": "its weights are not finite"}
        found, real = _open(judge, reference, device, Path(reference).stat().st_mtime)
        placed(generator, torch.device(device))
        pictures = draw(generator, latents(images, config.latent_dim), batch_norm, batch_size)
        save_png(make_grid(pictures[:sheet], columns=sheet, padding=0), strip)
        return {**asdict(score(pictures, real.train_ND, found, splits, batch_norm)), "parameters": parameters}
