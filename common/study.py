"""What claims are measured on, in one vocabulary.

Sizes: a dataclass of a paper, filled from its claims.yaml. Study: a folder in which everything that claims share is
made once and kept. Arm: a trained network, what it cost and how it did while it trained. Watch: the callback that books
an arm's CPU seconds, measures it and ends it with its budget. Judge: distances of pictures.

What is kept stands beside the settings that it was made with, and is made again when they differ.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from common.data.sampling import generator_step
from common.errors import UserError
from common.files import read_object, write_json
from common.images import save_grid
from common.ledger import Tier, peak_memory, read_sizes
from common.metrics.distribution import fid, kid, precision_recall
from common.metrics.features import extract, load_extractor
from common.options import TrainerOptions
from common.paths import cache_dir
from common.training import build_trainer, fit, latest_checkpoint
from common.weights import load_weights, read_weights, save_weights

ENDLESS = 10**6  # steps: a budget of CPU seconds ends training

S = TypeVar("S")
Network = TypeVar("Network", bound=nn.Module)


def open_sizes(sizes: type[S], paper: str | Path, tier: Tier) -> S:
    """What claims.yaml says of a tier's shared sizes and budget, as the paper's own dataclass.

    Raises:
        UserError: a field is missing, unknown or of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(sizes)
    try:
        found = parser.instantiate_classes(parser.parse_object(read_sizes(paper, tier)))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{paper}: sizes and budget of tier {tier} in claims.yaml: {reason}") from None
    return sizes(**vars(found))


def kept(path: Path, make: Callable[[], Mapping[str, Any]], settings: Any = None) -> dict[str, Any]:
    """Values in a JSON file: read if it holds these settings, else made and written. Null is read as NaN."""
    settings = _plain(settings)
    found = read_object(path) if path.is_file() else None
    if found is None or found.get("settings") != settings:
        write_json(path, ({} if settings is None else {"settings": settings}) | dict(make()))
        found = read_object(path)  # what is made is what will be read
    return {key: float("nan") if value is None else value for key, value in found.items() if key != "settings"}


def kept_tensors(path: Path, make: Callable[[], Mapping[str, Tensor]], settings: Any = None) -> dict[str, Tensor]:
    """Tensors in a safetensors file: read if it was written with these settings, else made and written."""
    note = {"settings": json.dumps(_plain(settings))}
    if path.is_file():
        tensors, found = read_weights(path)
        if found == note:
            return tensors
    save_weights(path, make(), note)
    return read_weights(path)[0]


def _plain(settings: Any) -> Any:
    """As it is after a round trip through JSON."""
    return json.loads(json.dumps(settings))


def labelled(values: Mapping[str, float], label: str, *keys: str) -> dict[str, float]:
    """`KEY_LABEL` for these keys (all by default), as the ledger names what was measured of an arm."""
    return {f"{key}_{label}": values[key] for key in keys or values}


class Watch(pl.Callback):
    """Books an arm's CPU seconds, measures it at some steps and at the end, and stops it when its budget is spent.

    Measuring is free. What was booked and measured is part of the checkpoint.

    Args:
        measure: of the step; called after each of `looks` and at the end.
        budget: CPU seconds; None lets the trainer's number of steps decide.
    """

    def __init__(
        self,
        looks: Iterable[int] = (),
        measure: Callable[[int], Mapping[str, float]] | None = None,
        budget: float | None = None,
    ) -> None:
        self.looks, self.measure, self.budget = set(looks), measure, budget
        self.seconds = self._last = 0.0
        self.steps = 0
        self.curve: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seconds += time.process_time() - self._last
        self.steps = generator_step(trainer)
        if self.steps in self.looks:
            self._look()
        if self.budget is not None and self.seconds >= self.budget:
            trainer.should_stop = True
        self._last = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look()

    def _look(self) -> None:
        if self.measure is not None and (not self.curve or self.curve[-1]["step"] != self.steps):
            self.curve.append({"step": self.steps, "seconds": self.seconds, **self.measure(self.steps)})

    def record(self) -> dict[str, Any]:
        """What is kept of the arm beside its weights."""
        return {
            "steps": self.steps,
            "cpu_seconds": self.seconds,
            "peak_bytes": peak_memory(),
            "curve": self.curve,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.curve = state_dict["seconds"], list(state_dict["curve"])


def fit_arm(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    watch: Watch,
    options: TrainerOptions,
    *,
    batch_size: int,
    grad_clip: float,
    steps: int = ENDLESS,
    folder: Path | None = None,
    checkpoint_every: int = 0,
) -> None:
    """Train an arm without logs; with `checkpoint_every` it goes on from its last checkpoint in `folder`."""
    folder = folder or cache_dir("experiments")
    trainer = build_trainer(
        folder,
        options,
        steps=steps,
        batch_size=batch_size,
        grad_clip=grad_clip,
        logs=False,
        callbacks=[watch],
        checkpoint_every=checkpoint_every,
    )
    fit(trainer, module, data, latest_checkpoint(folder) if checkpoint_every else None)


@dataclass
class Arm(Generic[Network]):
    """A trained network, what it cost, and its held-out measurements during training (`Watch.record`)."""

    name: str
    network: Network
    record: dict[str, Any]

    @property
    def steps(self) -> int:
        return int(self.record["steps"])

    @property
    def seconds(self) -> float:
        """CPU seconds of training."""
        return float(self.record["cpu_seconds"])

    @property
    def curve(self) -> list[dict[str, float]]:
        return list(self.record["curve"])

    @property
    def last(self) -> dict[str, float]:
        return self.curve[-1]

    def at(self, step: int) -> dict[str, float]:
        """The measurements after so many steps."""
        return next(point for point in self.curve if point["step"] == step)

    def costs(self) -> dict[str, float]:
        """Steps, CPU seconds and whatever else the record counts, each key ending in the arm's name."""
        name = self.name.replace("-", "_")
        left_out = ("curve", "peak_bytes")
        return {f"{key}_{name}": float(value) for key, value in self.record.items() if key not in left_out}


class Study(Generic[S]):
    """What the claims of a tier share, in one folder; everything is made when first asked for.

    Args:
        sizes: the tier's own (`open_sizes`); folder: where arms, values and tensors are kept.
    """

    def __init__(self, sizes: S, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        # Where tables and pictures go; `common.reproduction` has them beside the ledger in tier small.
        self.results = self.figures = folder
        self._arms: dict[tuple[str, int], Arm[Any]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What all measurements depend on beside the sizes and budget of their claim."""
        return asdict(self.sizes) if is_dataclass(self.sizes) else {}  # type: ignore[arg-type]

    def values(self, name: str, make: Callable[[], Mapping[str, Any]], settings: Any = None) -> dict[str, Any]:
        """Numbers made once (`kept`)."""
        return kept(self.folder / f"{name}.json", make, settings)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]], settings: Any = None) -> dict[str, Tensor]:
        """Tensors made once (`kept_tensors`)."""
        return kept_tensors(self.folder / f"{name}.safetensors", make, settings)

    def arm(
        self,
        name: str,
        seed: int,
        build: Callable[[], Network],
        train: Callable[[Network, Path], tuple[nn.Module, Mapping[str, Any]]],
        settings: Any = None,
    ) -> Arm[Network]:
        """An arm: read from disk if it was trained with these settings, else trained and kept.

        Args:
            build: the network with its starting weights.
            train: takes that network and a folder for checkpoints, which goes afterwards; returns the network whose
                weights are kept and the arm's record.
        """
        if (name, seed) in self._arms:
            return self._arms[name, seed]
        network = build()
        place = self.folder / "arms" / f"{name}-seed{seed}"
        store, weights = (place.with_name(f"{place.name}.{kind}") for kind in ("json", "safetensors"))

        def trained() -> Mapping[str, Any]:
            made, record = train(network, self.workplace(f"arms/{place.name}", settings))
            store.unlink(missing_ok=True)  # no record of other settings beside these weights
            save_weights(weights, made.state_dict())
            return record

        record = kept(store, trained, settings)
        shutil.rmtree(place, ignore_errors=True)
        load_weights(network, weights, against="the study's network")
        self._arms[name, seed] = Arm(name, network.eval(), record)
        return self._arms[name, seed]

    def workplace(self, name: str, settings: Any = None) -> Path:
        """A folder for work that goes on by itself after an interruption; work begun with other settings goes."""
        folder = self.folder / name
        begun, wanted = folder / "settings.json", _plain(settings)
        if folder.is_dir() and (not begun.is_file() or read_object(begun) != wanted):
            shutil.rmtree(folder)
        write_json(begun, wanted)
        return folder

    def forget(self) -> None:
        """Drop the networks from memory (they stay on disk)."""
        self._arms.clear()

    def show(
        self,
        seed: int,
        name: str,
        images: Tensor,
        columns: int = 16,
        captions: Sequence[str] | None = None,
        tile: int = 64,
    ) -> None:
        """A grid of samples among the figures; of the first seed, others are not shown."""
        if seed == 0:
            save_grid(images, self.figures / f"{name}.png", columns=columns, captions=captions, tile=tile)


class Judge:
    """FID, KID, precision and recall of uint8 pictures on the features of a frozen network."""

    def __init__(self, extractor: str = "lite0") -> None:
        self.extractor_name = extractor
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @cached_property
    def extractor(self) -> Any:
        return load_extractor(self.extractor_name)

    def features(self, images: Tensor) -> Tensor:
        return extract(images, self.extractor)

    def features_of_real(self, images: Tensor) -> Tensor:
        """The same, computed once for a set of pictures that stays in memory."""
        key = (images.data_ptr(), len(images))
        if key not in self._known:
            self._known[key] = images, self.features(images)  # while it is kept its address is its own
        return self._known[key][1]

    def distances(self, fake: Tensor, real: Tensor) -> dict[str, float]:
        """FID, KID (x 1000), precision and recall of samples to the first as many real pictures."""
        theirs, ours = self.features_of_real(real)[: len(fake)], self.features(fake)
        manifold = precision_recall(theirs, ours)
        return {
            "fid": fid(theirs, ours),
            "kid_x1000": 1000 * kid(theirs, ours).value,
            "precision": manifold.precision,
            "recall": manifold.recall,
        }
