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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from common.cpu import cpu_kind
from common.data.sampling import generator_step
from common.errors import UserError
from common.files import locked, read_object, write_atomically, write_json
from common.images import save_grid
from common.ledger import Tier, peak_memory, provenance, read_precision, read_sizes
from common.metrics.distribution import fid, kid, precision_recall
from common.metrics.features import extract, load_extractor
from common.options import Precision, TrainerOptions
from common.paths import cache_dir
from common.precision import BF16, FLOAT32, bf16_possible
from common.training import train
from common.weights import load_weights, read_weights, save_weights

ENDLESS = 10**6  # steps: a budget of CPU seconds ends training
CHECKPOINT_EVERY = 200  # steps of an arm between checkpoints

S = TypeVar("S")
T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
Other = TypeVar("Other", bound="Study[Any]")


def open_sizes(sizes: type[S], paper: str | Path, tier: Tier, rung: int = 1) -> S:
    """What claims.yaml says of a tier's shared sizes and budget, as the paper's own dataclass.

    Args:
        rung: the budget is multiplied by it.

    Raises:
        UserError: a field is missing, unknown or of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(sizes)
    try:
        found = parser.instantiate_classes(parser.parse_object(read_sizes(paper, tier, rung)))
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{paper}: sizes and budget of tier {tier} in claims.yaml: {reason}") from None
    return sizes(**vars(found))


@cache
def claims_precision(paper: str) -> Precision:
    """Of all arms of a paper's claims: bf16 where the budgets were set in it and this CPU has it, else float32."""
    return BF16 if read_precision(paper) == BF16 and bf16_possible("cpu") else FLOAT32


def kept(path: Path, make: Callable[[], Mapping[str, Any]], settings: Any = None) -> dict[str, Any]:
    """Values in a JSON file: read if it holds these settings, else made and written. Null is read as NaN.

    Of several processes that want the same one makes it and the others wait.
    """
    settings = _plain(settings)

    def read() -> dict[str, Any] | None:
        found = read_object(path) if path.is_file() else None
        return found if found is not None and found.get("settings") == settings else None

    found = read()
    if found is None:
        with locked(path):
            if (found := read()) is None:
                write_json(path, ({} if settings is None else {"settings": settings}) | dict(make()))
                found = read_object(path)  # what is made is what will be read
    return {key: float("nan") if value is None else value for key, value in found.items() if key != "settings"}


def kept_tensors(path: Path, make: Callable[[], Mapping[str, Tensor]], settings: Any = None) -> dict[str, Tensor]:
    """Tensors in a safetensors file: read if it was written with these settings, else made and written (by one)."""
    note = {"settings": json.dumps(_plain(settings))}

    def read() -> dict[str, Tensor] | None:
        tensors, found = read_weights(path) if path.is_file() else ({}, None)
        return tensors if found == note else None

    if (tensors := read()) is not None:
        return tensors
    with locked(path):
        if (tensors := read()) is None:
            save_weights(path, make(), note)
            tensors = read_weights(path)[0]
    return tensors


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
            self.look()
        if self.budget is not None and self.seconds >= self.budget:
            trainer.should_stop = True
        self._last = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look()

    def look(self) -> None:
        """Measure now, unless that was done after this very step."""
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
        return {"seconds": self.seconds, "steps": self.steps, "curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.curve = state_dict["seconds"], list(state_dict["curve"])
        self.steps = state_dict["steps"]


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
    train(
        folder or cache_dir("experiments"),
        module,
        data,
        replace(options, checkpoint_every=checkpoint_every or options.checkpoint_every),
        steps=steps,
        batch_size=batch_size,
        grad_clip=grad_clip,
        callbacks=[watch],
        logs=False,
        checkpoints=checkpoint_every > 0,
    )
    watch.look()  # a training that was complete but for this is not begun again by Lightning


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
        left_out = ("curve", "peak_bytes", "made")
        return {f"{key}_{name}": float(value) for key, value in self.record.items() if key not in left_out}


@dataclass
class _Piece:
    """One that is being made: seconds that pieces inside it took, and which it needs."""

    inside: float = 0.0
    needs: set[Path] = field(default_factory=set)


class Study(Generic[S]):
    """What the claims of a tier share, in one folder; everything is made when first asked for.

    All of it is made in one precision on one kind of CPU: both are part of the settings of whatever is kept, so that an
    arm begun on another kind is begun again.

    Args:
        sizes: the tier's own (`open_sizes`); folder: where arms, values and tensors are kept.
    """

    paper = ""  # whose claims.yaml says in which precision the budgets were set; float32 without one

    def __init__(self, sizes: S, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        # Where tables and pictures go; `common.reproduction` has them beside the ledger in tier small.
        self.results = self.figures = folder
        self.finished_arms: Path | None = None  # where finished arms are noted, if they are
        self._arms: dict[tuple[str, int], Arm[Any]] = {}
        self._used: dict[Path, float] = {}  # what the pieces that a measurement read had taken to make, in seconds
        self._making: list[_Piece] = []  # pieces that are being made, each inside the one before
        self._beside: list[Study[Any]] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What all measurements depend on beside the sizes and budget of their claim."""
        return asdict(self.sizes) if is_dataclass(self.sizes) else {}  # type: ignore[arg-type]

    @property
    def precision(self) -> Precision:
        """Of all arms (`claims_precision`)."""
        return claims_precision(self.paper) if self.paper else FLOAT32

    def here(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Settings with the precision and the kind of CPU in which things are made now."""
        return {"precision": self.precision, "cpu": cpu_kind(), **(settings or {})}

    def values(
        self, name: str, make: Callable[[], Mapping[str, Any]], settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Numbers made once (`kept`)."""
        path = self.folder / f"{name}.json"
        with self._timed(path, make) as made:
            return kept(path, made, self.here(settings))

    def tensors(
        self, name: str, make: Callable[[], Mapping[str, Tensor]], settings: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Tensors made once (`kept_tensors`)."""
        path = self.folder / f"{name}.safetensors"
        with self._timed(path, make) as made:
            return kept_tensors(path, made, self.here(settings))

    def arm(
        self,
        name: str,
        seed: int,
        build: Callable[[], Network],
        train: Callable[[Network, Path], tuple[nn.Module, Mapping[str, Any]]],
        settings: Mapping[str, Any] | None = None,
    ) -> Arm[Network]:
        """An arm: read from disk if it was trained with these settings, else trained and kept.

        Args:
            build: the network with its starting weights.
            train: takes that network and a folder for checkpoints, which goes afterwards; returns the network whose
                weights are kept and the arm's record.
        """
        place = self.folder / "arms" / f"{name}-seed{seed}"
        store, weights = (place.with_name(f"{place.name}.{kind}") for kind in ("json", "safetensors"))
        if (name, seed) in self._arms:
            self._use(store)
            return self._arms[name, seed]
        network = build()

        def trained() -> Mapping[str, Any]:
            made, record = train(network, self.workplace(f"arms/{place.name}", settings))
            store.unlink(missing_ok=True)  # no record of other settings beside these weights
            save_weights(weights, made.state_dict())
            return {**record, "made": provenance(self.precision)}

        with self._timed(store, trained) as made:
            record = kept(store, made, self.here(settings))
        self.note(name, seed, settings, record)
        shutil.rmtree(place, ignore_errors=True)
        load_weights(network, weights, against="the study's network")
        self._arms[name, seed] = Arm(name, network.eval(), record)
        return self._arms[name, seed]

    def note(self, name: str, seed: int, settings: Mapping[str, Any] | None, values: Mapping[str, Any]) -> None:
        """Write down a finished arm among the results, once: its settings and what was measured of it.

        Args:
            values: with `made` (`provenance`), where they are older than this moment.
        """
        if self.finished_arms is None:
            return
        path = self.finished_arms / f"{name}-seed{seed}.json"
        values = dict(values)
        made = values.pop("made", None) or provenance(self.precision)
        entry = {"arm": name, "seed": seed, "settings": settings, "values": values, **made}

        def facts(of: Mapping[str, Any]) -> str:
            return json.dumps([of.get(key) for key in ("settings", "values", "precision", "cpu")]).replace(
                "NaN", "null"
            )

        if not path.is_file() or facts(read_object(path)) != facts(entry):
            write_json(path, entry)

    def workplace(self, name: str, settings: Mapping[str, Any] | None = None) -> Path:
        """A folder for work that goes on by itself after an interruption; work begun with other settings goes."""
        folder = self.folder / name
        begun, wanted = folder / "settings.json", _plain(self.here(settings))
        if folder.is_dir() and (not begun.is_file() or read_object(begun) != wanted):
            shutil.rmtree(folder)
        write_json(begun, wanted)
        return folder

    @contextmanager
    def _timed(self, path: Path, make: Callable[[], T]) -> Iterator[Callable[[], T]]:
        """`make`, timed: what it takes is written down for the claims that will read the piece instead, beside the
        pieces that it needs, whose time is written down with them."""

        def made() -> T:
            self._making.append(piece := _Piece())
            started = time.perf_counter()
            try:
                found = make()
            finally:
                self._making.pop()
                taken = time.perf_counter() - started
                if self._making:
                    self._making[-1].inside += taken
            needs = sorted(needed.relative_to(self.folder).as_posix() for needed in piece.needs)
            write_json(self._booked(path), {"seconds": taken - piece.inside, "needs": needs})
            self._used[path] = 0.0  # the measurement's own clock counts it
            return found

        yield made
        self._use(path)

    def _booked(self, path: Path) -> Path:
        return self.folder / "seconds" / path.relative_to(self.folder).with_suffix(".json")

    def _use(self, path: Path) -> None:
        """Count what a piece took, with all that it needs: each of them once."""
        if self._making:
            self._making[-1].needs.add(path)
        left = [path]
        while left:
            piece = left.pop()
            if piece in self._used:
                continue
            file = self._booked(piece)
            booked: dict[str, Any] = read_object(file) if file.is_file() else {}
            self._used[piece] = float(booked.get("seconds", 0.0))
            left += [self.folder / name for name in booked.get("needs", ())]

    @contextmanager
    def counted(self, folder: Path) -> Iterator[None]:
        """Work that keeps itself in a folder of its own and goes on there: what it took at earlier starts is counted
        as part of what a claim costs, as `values` and `arm` count what they read."""
        booked = folder / "seconds.txt"
        before = float(booked.read_text()) if booked.is_file() else 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = before + time.perf_counter() - started
            write_atomically(booked, partial(Path.write_text, data=str(spent)))
        self._used.setdefault(booked, before)  # the measurement's own clock counts the rest

    def beside(self, study: Other) -> Other:
        """Another study of the same measurement (another teacher or task): its pieces count as this one's do."""
        self._beside.append(study)
        return study

    @property
    def reused_seconds(self) -> float:
        """What the pieces took that were read, not made, since the last `forget`: part of what a claim costs."""
        return sum(self._used.values()) + sum(study.reused_seconds for study in self._beside)

    def forget(self) -> None:
        """Drop the networks from memory (they stay on disk), and what was read so far."""
        self._arms.clear()
        self._used.clear()
        self._beside.clear()

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
