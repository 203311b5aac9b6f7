"""An endless stream over shards (parquet files, URLs, image folders) for data that does not fit one disk."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from common.data.cache import file_checksums, fingerprint_strings
from common.data.folders import Framing, Policy, read_folder, stop_if_many
from common.data.rows import (
    LEFT_OUT,
    Source,
    caption_of,
    class_names,
    find_columns,
    has_pictures,
    is_saved,
    label_of,
    picture_of,
    splits_of,
    table_files,
)
from common.errors import UserError, first_line
from common.images import WHITE, CorruptImage, decoded
from common.processes import say_once

Row = tuple[Path | bytes, str, int]  # undecoded picture, caption, label


class _ParquetShard:
    """One parquet file, local or any URL that fsspec opens (hf://, s3://, https://, ...).

    number_of: class numbers by name, which only all shards together know.
    """

    split = ""

    def __init__(
        self, path: str, image: str | None, caption: str | None, label: str | None, need: Sequence[str]
    ) -> None:
        import datasets

        self.name, self.folder = path, None if "://" in path else Path(path).parent
        self.number_of: dict[str, int] = {}
        with self._open() as file:
            features = datasets.Features.from_arrow_schema(file.schema_arrow)
            self.columns = find_columns(path, features, image, caption, label, need)
            self.named = "string" in str(getattr(features.get(self.columns.label), "dtype", ""))
            self.groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        import fsspec
        import pyarrow
        import pyarrow.parquet

        try:
            with fsspec.open(self.name, "rb") as handle:
                yield pyarrow.parquet.ParquetFile(handle)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{self.name}: not a whole parquet file ({first_line(error)}); fetch it again") from error

    def __len__(self) -> int:
        return sum(self.groups)

    def rows(self, start: int) -> Iterator[tuple[str, Callable[[], Row]]]:
        """(name, what gives the row or raises CorruptImage) from row `start` on; groups before it are not read."""
        columns = [self.columns.image, self.columns.text, self.columns.label]
        with self._open() as file:
            first = 0
            for group, count in enumerate(self.groups):
                if first + count > start:
                    table = file.read_row_group(group, columns=[c for c in columns if c])
                    for row in range(max(0, start - first), count):
                        cells = [table[column][row] if column else None for column in columns]
                        yield f"{self.name} row {first + row}", partial(self._row, *cells)
                first += count

    def _row(self, *cells: Any) -> Row:
        try:
            image, text, label = (cell.as_py() if cell is not None else None for cell in cells)
        except UnicodeDecodeError as error:
            raise CorruptImage(f"a string in it is not UTF-8 ({error.reason})") from None
        return (
            picture_of(image, self.folder),
            caption_of(text, self.columns.text or "text"),
            label_of(label, self.number_of, self.columns.label or "label"),
        )

    def captions(self) -> Iterator[str]:
        """Of every row, without reading the images; "" where there is none."""
        for cell in self._column(self.columns.text):
            with contextlib.suppress(CorruptImage):
                yield caption_of(cell)

    def labels(self) -> Iterator[Any]:
        """The cells of every row, without reading the images."""
        return self._column(self.columns.label)

    def _column(self, name: str | None) -> Iterator[Any]:
        if name is None:
            yield from (None for _ in range(len(self)))
            return
        with self._open() as file:
            for group in range(len(self.groups)):
                yield from file.read_row_group(group, columns=[name])[name].to_pylist()


class _FolderShard:
    """The pictures of one split of an image folder, or of all of it."""

    named = False

    def __init__(self, source: Source, split: str = "") -> None:
        self.source, self.split = source, split
        self.name = os.path.join(source.name, split) if split else source.name
        self.numbers = [row for row in range(len(source)) if not split or source.splits[row] == split]

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, start: int) -> Iterator[tuple[str, Callable[[], Row]]]:
        for index in self.numbers[start:]:
            yield self.source.where(index), lambda index=index: (self.source.raw(index), *self.source.label(index))  # type: ignore[misc]

    def captions(self) -> Iterator[str]:
        return (self.source.label(index)[0] for index in self.numbers)

    def labels(self) -> Iterator[int]:
        return (self.source.label(index)[1] for index in self.numbers)


class ShardedImages(IterableDataset[dict[str, Any]]):
    """An endless stream over shards, for data that does not fit one disk; each shard is read in one go.

    Shards are parquet files (local, or any URL of fsspec: `hf://datasets/user/name/**/*.parquet`, `s3://...`) or image
    folders (`metadata.jsonl` each). Every epoch permutes the shards, deals them to the ranks and their workers, and
    shuffles each reader's rows within blocks of `buffer`. What batch number `step` of a rank holds is a pure function
    of (seed, batch_size, world, workers, buffer, step): after `seek(step)` the stream goes on exactly where a run that
    was stopped had been, with as much reading as one buffer.

    Args:
        shards: paths, URLs or glob patterns.
        size, policy, background, flip: see `Framing`.
        batch_size: of this rank; must be the DataLoader's.
        workers: `num_workers` of the DataLoader; checked when iteration begins.
        rank, world: this process among the processes of the run.
        buffer: rows per shuffled block (held undecoded in memory); 1 keeps the order of the files.
        seed: of the order and of the crops.
        image_column, caption_column, label_column: names of columns; None finds them, LEFT_OUT reads none. An image is
            bytes, a path or a struct with `bytes`.
        need: kinds of columns (caption, label) that must be found.
        repeat: go on with the next epoch for ever. With False, one epoch; ranks may then differ in length.

    Raises:
        UserError: no shard found, a column is missing, a file is truncated, or more than 1 % broken images.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        size: int,
        batch_size: int,
        policy: Policy = "centre",
        background: tuple[int, int, int] = WHITE,
        flip: bool = False,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int = 1024,
        seed: int = 0,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = LEFT_OUT,
        need: Sequence[str] = (),
        repeat: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1 or buffer < 1 or not 0 <= rank < world:
            raise UserError(
                f"need batch_size >= 1, buffer >= 1, 0 <= rank < world; got {batch_size}, {buffer}, {rank}, {world}"
            )
        self.framing = Framing(size, policy, background, flip)
        self.batch_size, self.workers, self.rank, self.world = batch_size, workers, rank, world
        self.buffer, self.seed, self.repeat = buffer, seed, repeat
        self._step = 0
        names = _expand([shards] if isinstance(shards, str | Path) else shards)

        def open_shard(name: str) -> list[_ParquetShard | _FolderShard]:
            if is_saved(Path(name)) or Path(name).suffix.lower() in (".arrow", ".jsonl", ".csv", ".tsv"):
                raise UserError(f"{name}: shards are parquet files or image folders; open it with --data.name hf")
            if not Path(name).is_dir():
                return [_ParquetShard(name, image_column, caption_column, label_column, need)]
            source = read_folder(Path(name), caption_column, label_column or None)
            say_once(source.about)
            return [_FolderShard(source, split) for split in dict.fromkeys(source.splits or [""])]

        with ThreadPoolExecutor(16) as pool:
            self.shards = [shard for shards in pool.map(open_shard, names) for shard in shards]
        if not sum(map(len, self.shards)):
            raise UserError(f"{names[0]}: the {len(names)} shards hold no image")
        named = [shard for shard in self.shards if isinstance(shard, _ParquetShard) and shard.named]
        self.classes = class_names(label for shard in named for label in shard.labels())
        for shard in named:
            shard.number_of = {name: number for number, name in enumerate(self.classes)}
        self.population = self.rows()  # what 1 % of broken images is a share of
        self._root = _root_of(names)
        self._contents = _Contents(self.shards, self._root)

    @property
    def fingerprint(self) -> str:
        """Of the shards' names, wherever they lie, and lengths and of the framing."""
        names = [f"{_below(self._root, shard.name)}:{len(shard)}" for shard in self.shards]
        return fingerprint_strings([repr(self.framing), *names])

    @property
    def contents(self) -> str:
        """Fingerprint of all shards, held-out ones too: of their bytes, or of what their server says of remote ones."""
        return fingerprint_strings([*self.classes, self._contents.fingerprint])

    def rows(self) -> int:
        """Images of one epoch, over all ranks."""
        return sum(map(len, self.shards))

    def captions(self, limit: int) -> list[str]:
        """Those of the first `limit` rows in the shards' own order; no image is read."""
        return list(itertools.islice((text for shard in self.shards for text in shard.captions()), limit))

    def class_count(self) -> int:
        """One more than the largest label of all shards; 0 where no row has one. No image is read.

        Raises:
            UserError: two image folders number their classes differently.
        """
        folders = {tuple(shard.source.classes): shard.name for shard in self.shards if isinstance(shard, _FolderShard)}
        if len(folders) > 1:
            first, second, *_ = folders.values()
            raise UserError(f"{first} and {second} have other class names: labels of one would mean another class")
        highest = len(self.classes) - 1
        for label in (label for shard in self.shards if not shard.named for label in shard.labels()):
            with contextlib.suppress(CorruptImage):
                highest = max(highest, label_of(label, {}))
        return highest + 1

    def hold_out(self, shards: str | Path | None = None) -> tuple[ShardedImages, ShardedImages]:
        """(the stream to train on, one epoch in order to measure by), which share no shard.

        Args:
            shards: which are held out; by default those whose names say test, or else validation, or else the last.

        Raises:
            UserError: nothing is left to train on.
        """
        if shards is not None:
            wanted = {_place(name) for name in _expand([shards])}
            held_out = [shard for shard in self.shards if _given(shard) in wanted]
            train = [shard for shard in self.shards if _given(shard) not in wanted]
        else:
            names = [PurePath(shard.split, "*") if shard.split else PurePath(_below(self._root, shard.name))
                     for shard in self.shards]  # fmt: skip
            splits = splits_of(names, strict=False)
            by_split = {name: [s for s, split in zip(self.shards, splits) if split == name] for name in splits}
            held_out = by_split.get("test") or by_split.get("validation") or self.shards[-1:]
            train = by_split.get("train") or self.shards
            train = [shard for shard in train if shard not in held_out]
        if not train:
            raise UserError(f"{self.shards[0].name}: no shard is left to train on")
        apart = ", ".join(os.path.basename(shard.name) for shard in held_out[:3]) + (", ..." if held_out[3:] else "")
        rows = [sum(map(len, part)) for part in (train, held_out)]
        say_once(f"{train[0].name}, ...: {len(train)} shards of {rows[0]} rows; held out: {apart} ({rows[1]} rows)")
        parts = copy.copy(self), copy.copy(self)
        parts[0].shards, parts[1].shards = train, held_out
        parts[1].buffer, parts[1].repeat = 1, False
        return parts

    def seek(self, step: int) -> None:
        """Begin the next iteration with batch number `step` of this rank."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self._step = step

    def state_dict(self, step: int) -> dict[str, Any]:
        """What has to be equal for a resume to be exact, and the number of batches this rank has used."""
        layout = {"batch_size": self.batch_size, "workers": self.workers, "world": self.world}
        return {"step": step, "seed": self.seed, "buffer": self.buffer, "order": self.fingerprint, **layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume; UserError names what differs from the run that was stopped."""
        now = self.state_dict(state["step"])
        for key, value in now.items():
            if state.get(key, value) != value:  # the order is not in states of before it had that name
                raise UserError(
                    f"the stream was saved with {key}={state.get(key)} but now has {key}={value}: use the same"
                )
        self.seek(state["step"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        actual, worker = (info.num_workers, info.id) if info is not None else (0, 0)
        if actual != self.workers:
            raise UserError(
                f"ShardedImages was made for workers={self.workers}, but the DataLoader has num_workers={actual}"
            )
        # The DataLoader takes batches from its workers in turn, beginning with worker 0 whatever the step is.
        readers = max(1, self.workers)
        role = (worker + self._step) % readers
        batches_before = (self._step - role + readers - 1) // readers
        yield from self._stream(self.rank * readers + role, self.world * readers, batches_before * self.batch_size)

    def _stream(self, reader: int, readers: int, position: int) -> Iterator[dict[str, Any]]:
        health = _StreamHealth(self.shards[0].name, self.population)
        epoch = 0
        while True:
            parts = self._parts(epoch, reader, readers)
            length = sum(len(rows) for _, rows in parts)
            if self.rows() < readers:
                raise UserError(
                    f"{self.rows()} images are too few for {readers} readers; use fewer workers or processes"
                )
            if position >= length:
                position -= length
            else:
                yield from self._epoch(epoch, reader, parts, position, health)
                position = 0
            if not self.repeat:
                return
            epoch += 1

    def _parts(self, epoch: int, reader: int, readers: int) -> list[tuple[int, range]]:
        """(shard, its rows) that this reader reads in an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        if len(order) >= readers:
            return [(shard, range(len(self.shards[shard]))) for shard in order[reader::readers]]
        # Fewer shards than readers: everyone reads every shard but keeps only every readers-th row of the epoch.
        parts, before = [], 0
        for shard in order:
            count = len(self.shards[shard])
            parts.append((shard, range((reader - before) % readers, count, readers)))
            before += count
        return parts

    def _epoch(
        self, epoch: int, reader: int, parts: list[tuple[int, range]], position: int, health: _StreamHealth
    ) -> Iterator[dict[str, Any]]:
        block, offset = divmod(position, self.buffer)
        raw = self._raw(parts, block * self.buffer)
        while True:
            rows = [row for _, row in zip(range(self.buffer), raw)]
            if not rows:
                return
            order = list(range(len(rows)))
            if self.buffer > 1:
                order = np.random.default_rng([self.seed, epoch, reader, block]).permutation(len(rows)).tolist()
            for place in range(offset, len(rows)):
                item = self._first_good(rows, order, place, (epoch, reader, block * self.buffer + place), health)
                if item is not None:
                    yield item
                elif self.repeat:
                    raise UserError(f"{rows[0][0]}: none of {len(rows)} images in a row can be read")
            block, offset = block + 1, 0

    def _raw(self, parts: list[tuple[int, range]], start: int) -> Iterator[tuple[str, Callable[[], Row]]]:
        for shard, wanted in parts:
            if start >= len(wanted):
                start -= len(wanted)
                continue
            for number, row in enumerate(self.shards[shard].rows(wanted[start])):
                if number % wanted.step == 0:
                    yield row
            start = 0

    def _first_good(
        self,
        rows: list[tuple[str, Callable[[], Row]]],
        order: Sequence[int],
        place: int,
        key: tuple[int, ...],
        health: _StreamHealth,
    ) -> dict[str, Any] | None:
        """The image at a place of the shuffled block, or the next one of the block that can be decoded."""
        health.seen += 1
        for step in range(len(rows)):
            name, read = rows[order[(place + step) % len(rows)]]
            if name in health.bad:
                continue
            try:
                raw, caption, label = read()
                with decoded(raw, self.framing.background, self.framing.size) as picture:
                    image = self.framing(picture, np.random.default_rng([self.seed, *key]))
            except CorruptImage as error:
                warnings.warn(f"skipped {name}: {error}", stacklevel=2)
                health.add(name)
                continue
            return {"image": image, "caption": caption, "label": label}
        return None


class _Contents:
    """What shards hold, computed once for a set and its parts."""

    def __init__(self, shards: Sequence[_ParquetShard | _FolderShard], root: str) -> None:
        self.shards, self.root = shards, root

    @cached_property
    def fingerprint(self) -> str:
        import fsspec

        here = [Path(shard.name) for shard in self.shards if Path(shard.name).is_file()]
        checksums = file_checksums(here)
        parts = []
        for shard in self.shards:
            if isinstance(shard, _FolderShard):
                told = shard.source.fingerprint
            elif Path(shard.name) in checksums:
                told = checksums[Path(shard.name)]
            else:
                filesystem, path = fsspec.core.url_to_fs(shard.name)
                about = filesystem.info(path)
                told = json.dumps(
                    [about.get(key) for key in ("size", "ETag", "etag", "sha256", "blob_id")], default=str
                )
            parts.append(f"{_below(self.root, shard.name)}:{told}")
        return fingerprint_strings(parts)


class _StreamHealth:
    """Counts the broken images of one reader; the verdict waits for 1,000 images, or all of a smaller set."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows, self.seen = name, rows, 0
        self.bad: dict[str, None] = {}

    def add(self, name: str) -> None:
        self.bad[name] = None
        stop_if_many(self.name, list(self.bad), min(self.rows, max(self.seen, 1000)))


def _expand(patterns: Sequence[str | Path]) -> list[str]:
    import fsspec

    names: list[str] = []
    for pattern in map(str, patterns):
        if any(sign in pattern for sign in "*?["):
            filesystem, path = fsspec.core.url_to_fs(pattern)
            found = sorted(filesystem.glob(path))
            if "://" in pattern:
                found = [filesystem.unstrip_protocol(name) for name in found]
        else:
            if "://" not in pattern and not Path(pattern).exists():
                raise UserError(f"{pattern}: there is no such shard")
            tables = table_files(Path(pattern)) if Path(pattern).is_dir() else []
            found = [str(file) for file in tables if file.suffix.lower() == ".parquet" and has_pictures(file)] or [
                pattern
            ]
        if not found:
            raise UserError(f"{pattern}: no shard matches")
        names += found
    if not names:
        raise UserError("no shard was given")
    return [*{_place(name): name for name in names}.values()]


def _given(shard: _ParquetShard | _FolderShard) -> str:
    return _place(shard.source.name if isinstance(shard, _FolderShard) else shard.name)


def _root_of(names: Sequence[str]) -> str:
    """The folder that all names lie in, "" where there is none."""
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # some are relative, others not
        return ""


def _below(root: str, name: str) -> str:
    return os.path.relpath(name, root) if root else name


def _place(name: str) -> str:
    return name if "://" in name else os.path.realpath(name)
