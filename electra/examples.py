"""Pre-training examples as the official `build_pretraining_dataset.py` cuts them, and a store of them on disk.

Lines (sentences) of a document are gathered until a target length is reached, then cut into
    [CLS] first segment [SEP]   or   [CLS] first segment [SEP] second segment [SEP]
with no next-sentence task. Rows are stored without padding.

Shape suffixes: R rows, T tokens of all rows together, L tokens of one row.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import file_sha256, read_object, sweep, unfinished, write_json
from common.processes import is_main_process
from electra.wordpiece import Tokenizer

FORMAT = 1
_MANIFEST = "manifest.json"
_FILES = {"ids": np.int32, "offsets": np.int64, "first_lengths": np.int32}

SINGLE_SEGMENT = 0.1  # probability of an example with one segment only
RANDOM_LENGTH = 0.05  # probability of a target length drawn from [5, max_length]
JOIN_OVERLONG = 0.5  # probability that a sentence crossing the middle still joins the first segment


@dataclass(frozen=True)
class Example:
    """Token ids of the two segments, without special tokens; `second` is empty for single-segment examples."""

    first: list[int]
    second: list[int]


class _Tokens:
    """Lines joined to one, from whose front tokens are taken without copying the rest: a line may be a whole book."""

    def __init__(self, line: Sequence[int] = ()) -> None:
        self._parts: deque[tuple[Sequence[int], int]] = deque([(line, 0)] if len(line) else [])
        self._length = len(line)

    def __len__(self) -> int:
        return self._length

    def extend(self, other: _Tokens) -> None:
        self._parts.extend(other._parts)
        self._length += len(other)

    def take(self, count: int) -> list[int]:
        """The first `count` tokens, or as many as there are; they are gone from here."""
        taken: list[int] = []
        while self._parts and len(taken) < count:
            line, start = self._parts.popleft()
            stop = start + count - len(taken)
            taken += line[start:stop]
            if stop < len(line):
                self._parts.appendleft((line, stop))
        self._length -= len(taken)
        return taken


class ExampleBuilder:
    """Cuts a stream of token lines into examples.

    Args:
        max_length: longest row, special tokens included.
        rng: its draws decide about single segments, the middle and random lengths. `random.Random(s)` reproduces the
            official builder after `random.seed(s)`.
        keep_overflow: False drops the tokens beyond `max_length`, as the official code does; True starts the next
            example with them, so that a small corpus loses nothing.
    """

    def __init__(self, max_length: int, rng: random.Random, keep_overflow: bool = False) -> None:
        if max_length < 8:
            raise UserError(f"max_length={max_length} is too short for an example; 8 is the least")
        self.max_length = max_length
        self.keep_overflow = keep_overflow
        self._rng = rng
        self._target = max_length
        self._lines: list[_Tokens] = []
        self._length = 0

    def add(self, ids: Sequence[int]) -> list[Example]:
        """Add the tokens of one line; returns the examples that became complete. `finish` ends the document."""
        self._lines.append(_Tokens(ids))
        self._length += len(ids)
        made = []
        while self._length >= self._target:
            made.append(self._cut())
        return made

    def finish(self) -> list[Example]:
        """End the document: whatever is gathered becomes examples."""
        made = []
        while self._length:
            made.append(self._cut())
        return made

    def document(self, lines: Iterable[Sequence[int]]) -> Iterator[Example]:
        """The examples of one whole document."""
        for ids in lines:
            yield from self.add(ids)
        yield from self.finish()

    def _cut(self) -> Example:
        # Two segments share the target; three places go to [CLS] and two [SEP].
        single = self._rng.random() < SINGLE_SEGMENT
        middle = float("inf") if single else (self._target - 3) // 2
        first, second = _Tokens(), _Tokens()
        for line in self._lines:
            joins = (
                not first
                or len(first) + len(line) < middle
                or (not second and len(first) < middle and self._rng.random() < JOIN_OVERLONG)
            )
            (first if joins else second).extend(line)
        kept_first = first.take(self.max_length - 2)
        kept_second = second.take(max(0, self.max_length - len(kept_first) - 3))
        self._lines = [part for part in (first, second) if part] if self.keep_overflow else []
        self._length = sum(map(len, self._lines))
        if self._rng.random() < RANDOM_LENGTH:
            self._target = self._rng.randint(5, self.max_length)
        else:
            self._target = self.max_length
        return Example(kept_first, kept_second)


def row_of(example: Example, cls_id: int, sep_id: int) -> tuple[list[int], int]:
    """Ids [CLS] A [SEP] (B [SEP]) of an example, and how many of them are of type 0 (up to the first [SEP])."""
    row = [cls_id, *example.first, sep_id]
    first_length = len(row)
    if example.second:
        row += [*example.second, sep_id]
    return row, first_length


class ExampleStore:
    """Rows on disk, memory-mapped: `store[i]` is (ids int32 [L], length of the first segment with [CLS] and [SEP]).

    `lengths` is int64 [R]; `fingerprint` names the corpus, vocabulary and settings that the rows come from. Types of a
    row are 0 for its first `first_length` tokens and 1 after them.
    """

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: there are no pre-training examples here; build them first")
        self.folder = folder
        self.fingerprint = str(manifest["fingerprint"])
        self.statistics: dict[str, float] = dict(manifest["statistics"])
        arrays: dict[str, np.ndarray] = {}
        for name in _FILES:
            path = folder / f"{name}.npy"
            record = manifest["files"][name]
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                raise UserError(f"{path}: missing or truncated; delete {folder} to build the examples anew")
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        self.ids_T, self.offsets, self.first_lengths_R = arrays["ids"], arrays["offsets"], arrays["first_lengths"]
        self.lengths = np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.first_lengths_R)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside the {len(self)} rows of {self.folder}")
        return self.ids_T[self.offsets[row] : self.offsets[row + 1]], int(self.first_lengths_R[row])

    def verify(self) -> None:
        """Compare checksums with the manifest; raises UserError naming the first file that differs."""
        manifest = _read_manifest(self.folder)
        assert manifest is not None
        for name in _FILES:
            if file_sha256(self.folder / f"{name}.npy") != manifest["files"][name]["sha256"]:
                raise UserError(f"{self.folder / name}.npy: damaged (its checksum differs from {_MANIFEST})")


def build_store(
    folder: Path,
    documents: Iterable[Sequence[str]],
    source_fingerprint: str,
    tokenizer: Tokenizer,
    max_length: int,
    seed: int = 0,
    keep_overflow: bool = True,
    max_tokens: int | None = None,
) -> ExampleStore:
    """Open the examples in `folder` if they are of these settings and whole; otherwise build them there.

    Args:
        folder: the store's own folder; parallel processes that ask for the same one wait for the first.
        documents: each a sequence of sentences; consumed only if the store must be built, in one pass, so that a
            corpus larger than memory streams through.
        source_fingerprint: of the documents.
        seed: of the builder's draws.
        max_tokens: stop once so many tokens are stored (a stream without end).

    Raises:
        UserError: the documents are empty, or the folder cannot be written.
    """
    settings = [FORMAT, source_fingerprint, tokenizer.fingerprint, max_length, seed, keep_overflow, max_tokens]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); REPRO_CACHE moves the cache") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = _read_manifest(folder)
        if manifest is not None and manifest["fingerprint"] == fingerprint:
            try:
                store = ExampleStore(folder)
                if is_main_process():
                    store.verify()
                return store
            except UserError as error:
                warnings.warn(f"{error}; the examples are built anew", stacklevel=2)
        sweep(folder.parent)
        with unfinished(folder, folder=True) as place:
            work = place / "store"
            work.mkdir()
            try:
                builder = ExampleBuilder(max_length, random.Random(seed), keep_overflow)
                _write_rows(work, documents, tokenizer, builder, max_tokens, fingerprint)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error}); is the disk full?") from error
            if folder.exists():
                os.replace(folder, place / "replaced")
            os.replace(work, folder)
    return ExampleStore(folder)


def _write_rows(
    work: Path,
    documents: Iterable[Sequence[str]],
    tokenizer: Tokenizer,
    builder: ExampleBuilder,
    max_tokens: int | None,
    fingerprint: str,
) -> None:
    offsets, first_lengths, words, unknown = [0], [], 0, 0
    flat = work / "ids.raw"
    with flat.open("wb") as file:
        for document in documents:
            lines = [ids for ids in tokenizer.ids_of_many(list(document)) if ids]
            words += sum(line.count(" ") + 1 for line in document)
            for example in builder.document(lines):
                row, first_length = row_of(example, tokenizer.cls_id, tokenizer.sep_id)
                array = np.asarray(row, np.int32)
                unknown += int((array == tokenizer.unk_id).sum())
                file.write(array.tobytes())
                offsets.append(offsets[-1] + len(row))
                first_lengths.append(first_length)
            if max_tokens is not None and offsets[-1] >= max_tokens:
                break
    if not first_lengths:
        raise UserError(
            "no text was found to build pre-training examples from: the corpus is empty, or too short to train on a "
            "part of it and to hold out another"
        )
    ids_T = np.memmap(flat, np.int32, "r", shape=(offsets[-1],))
    np.save(work / "ids.npy", ids_T, allow_pickle=False)
    del ids_T
    flat.unlink()
    np.save(work / "offsets.npy", np.asarray(offsets, np.int64), allow_pickle=False)
    np.save(work / "first_lengths.npy", np.asarray(first_lengths, np.int32), allow_pickle=False)
    files = {}
    for name in _FILES:
        path = work / f"{name}.npy"
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    statistics = {
        "rows": len(first_lengths),
        "tokens": offsets[-1],
        "tokens_per_word": round(offsets[-1] / max(1, words), 4),
        "unknown_share": round(unknown / offsets[-1], 6),
    }
    write_json(
        work / _MANIFEST, {"format": FORMAT, "fingerprint": fingerprint, "statistics": statistics, "files": files}
    )


def _read_manifest(folder: Path) -> dict | None:  # type: ignore[type-arg]
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    advice = f"not a manifest of pre-training examples; delete {folder} to build them anew"
    manifest = read_object(path, kinds={"fingerprint": str, "files": dict}, advice=advice)
    if set(manifest["files"]) != set(_FILES):
        raise UserError(f"{path}: {advice}")
    return manifest
