"""The real pictures: options -> those that are learned from and those held out, and the batches of a step.

Shape suffixes: N pictures, B batch, C channels, S side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.cache import fingerprint_files, fingerprint_strings
from common.data.classes import ImageSet, InMemory, OnDisk, Pictures, Source, open_classes
from common.data.sampling import StepBatchSampler
from common.errors import UserError
from common.images import resize_uint8, to_unit
from common.paths import existing_path
from eagan.config import DataConfig

STL_SIDE = 96
IN_MEMORY = 2**31  # bytes of pictures that are held in memory; those of larger folders are decoded batch by batch


@dataclass(frozen=True)
class Real:
    """A set of pictures of one side.

    Args:
        classed: the same set with its classes, from which the classifier that judges is trained; None without classes.
        contents: fingerprint of what was read.
    """

    name: str
    train: Pictures
    held_out: Pictures
    classed: ImageSet | None
    contents: str


def take(pictures: Pictures, rows: Tensor) -> Tensor:
    """uint8 [B, 3, S, S]; grey pictures get three equal channels."""
    return pictures.source.take(pictures.index_N[rows]).expand(-1, 3, -1, -1)


class RealBatches:
    """Pictures in [-1, 1] as a function of (seed, step): each epoch in an order of its own."""

    def __init__(self, pictures: Pictures, batch_size: int, steps: int, seed: int) -> None:
        self.pictures = pictures
        self._sampler = StepBatchSampler(len(pictures), batch_size, steps, seed)

    def batch(self, step: int) -> Tensor:
        """float32 [B, 3, S, S]."""
        return to_unit(take(self.pictures, torch.tensor(self._sampler.batch(step))))


def open_pictures(config: DataConfig, side: int) -> Real:
    """What the `data` options describe; the two parts share no picture.

    Raises:
        UserError: an option or a file of the user's is wrong, or the pictures are too few.
    """
    if config.only and config.name in ("folder", "stl10"):
        raise UserError(
            f"--data.only {config.only}: --data.name {config.name} has no classes to choose from; give --data.only '[]'"
        )
    if config.name == "folder":
        real = _folder(config, side)
    elif config.name == "stl10":
        real = _stl10(config, side)
    else:
        real = _classes(config, side)
    if config.images and config.images < len(real.train):
        spread = torch.linspace(0, len(real.train) - 1, config.images).long()
        real = Real(real.name, real.train.part(spread), real.held_out, real.classed, real.contents)
    return real


def _classes(config: DataConfig, side: int) -> Real:
    found = open_classes(config.name, side, config.path)  # type: ignore[arg-type]
    both = (found.train, found.validation)  # the validation of classification is training here
    index_N, order = torch.cat([part.index_N for part in both]).sort()
    train = Pictures(found.train.source, index_N, torch.cat([part.labels_N for part in both])[order])
    held_out = found.test
    if config.only:
        if unknown := [name for name in config.only if name not in found.classes]:
            raise UserError(f"--data.only {unknown[0]}: {config.name} has the classes {', '.join(found.classes)}")
        wanted = torch.tensor([found.classes.index(name) for name in config.only])
        train, held_out = (p.part(torch.isin(p.labels_N, wanted).nonzero()[:, 0]) for p in (train, held_out))
    contents = fingerprint_strings([found.contents, str(side), *config.only])
    return Real(found.name, train, held_out, found, contents)


def _folder(config: DataConfig, side: int) -> Real:
    """The user's pictures, cut to the middle square; splits of the data are honoured, else a tenth is held out."""
    from common.data.folders import Framing, Images, open_source
    from common.data.rows import FEWEST_IMAGES, LEFT_OUT, hold_out

    if config.path is None:
        raise UserError("--data.name folder needs --data.path: a folder of pictures, or a table with a column of them")
    where = existing_path(config.path)
    source = open_source(where.absolute() if where.exists() else config.path, config.image_column, LEFT_OUT, LEFT_OUT)
    rows, held_out = hold_out(source)
    if not held_out:
        raise UserError(
            f"--data.path {config.path}: {len(source)} pictures are too few; expected {FEWEST_IMAGES} or more"
        )
    images = Images(source, Framing(side))

    def part(chosen: list[int]) -> Pictures:
        # Rows of one picture (several captions) are one picture; broken ones are left out.
        once = {source.key(row): row for row in reversed(chosen) if not images.corrupt[row]}
        found: Source = OnDisk(images.part(sorted(once.values())))
        if len(found) * 3 * side**2 <= IN_MEMORY:
            found = InMemory(torch.cat([found.take(some) for some in torch.arange(len(found)).split(256)]))
        return Pictures(found, torch.arange(len(found)), torch.full((len(found),), -1))

    return Real(source.name, part(rows), part(held_out), None, images.fingerprint)


def _stl10(config: DataConfig, side: int) -> Real:
    """STL-10's binary version: the 105,000 training and unlabelled pictures, the 8,000 test pictures held out."""
    if config.path is None:
        raise UserError("--data.name stl10 needs --data.path, the folder of its binary version (train_X.bin, ...)")
    root = existing_path(config.path)
    files = {"train": ["train_X.bin", "unlabeled_X.bin"], "test": ["test_X.bin"]}

    def part(names: list[str]) -> Pictures:
        images = torch.cat([_stl10_pictures(root / name, side) for name in names])
        return Pictures(InMemory(images), torch.arange(len(images)), torch.full((len(images),), -1))

    contents = fingerprint_files([root / name for names in files.values() for name in names], root)
    return Real("STL-10", part(files["train"]), part(files["test"]), None, f"{contents}-{side}")


def _stl10_pictures(path: Path, side: int) -> Tensor:
    """uint8 [N, 3, S, S] of a file whose pictures are stored column by column."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the binary version of STL-10")
    width = 3 * STL_SIDE**2
    if path.stat().st_size == 0 or path.stat().st_size % width:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes are no whole number of pictures of {width}; fetch it again"
        )
    rows = np.memmap(path, np.uint8, "r").reshape(-1, 3, STL_SIDE, STL_SIDE)
    parts = (torch.from_numpy(np.array(rows[i : i + 512]).swapaxes(2, 3).copy()) for i in range(0, len(rows), 512))
    return torch.cat([resize_uint8(part, side) for part in parts])
