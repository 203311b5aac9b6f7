"""Rows of tables that hold pictures, captions and labels: which columns do, and what their cells may be.

Tables come from `datasets` (a name on the hub, a folder saved to disk) and from files (.parquet, .arrow, .jsonl, .csv,
.tsv); the rows of image folders (`common.data.folders`) go through the same rules. A cell that breaks them is a broken
picture: counted, passed over, and refused when there are many.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any, Protocol

from common.data.cache import file_checksums, fingerprint_strings, remembered
from common.data.lines import read_rows
from common.errors import UserError, first_line
from common.files import list_files, write_json
from common.images import CorruptImage
from common.paths import cache_dir
from common.processes import say_once

HELD_OUT_SHARE = 10  # of data without splits, one in ten is held out
FEWEST_IMAGES = 20  # of fewer images none can be held out
TABLE_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv")
MOST_CLASSES = 1_000_000  # a larger label is a mistake, not a class
LEFT_OUT = ""  # in place of a column's name: do not read one

# Names that columns go by where `image`, `text` or `label` is missing, and those that hold no captions.
_IMAGE_NAMES = {"image", "img", "image_path", "img_path", "path", "file", "file_name", "filename", "filepath"}
_TEXT_NAMES = {"caption", "captions", "prompt", "prompts", "description", "sentence", "sentences"}
_LABEL_NAMES = {"label", "labels", "class", "class_id", "class_name", "class_label", "category", "category_id"}
_LABEL_NAMES.add("target")
_KEY_NAMES = {*_IMAGE_NAMES, "id", "key", "url", "uri", "hash", "md5", "sha256", "source", "license", "split"}

# Words in the names of folders and files that say which split they are, as `datasets` has them.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class Source(Protocol):
    """Pictures with captions and labels, by number; what `Images` and pixart read.

    splits: of every row, or empty where the data have none. about: one line on what was taken for what.
    captions_from: the files or the column with the captions, "" where they are classes' names or missing.
    """

    classes: list[str]
    splits: Sequence[str]
    captions_from: str
    about: str

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def raw(self, index: int) -> Path | bytes:
        """The undecoded picture; raises CorruptImage."""
        ...

    def label(self, index: int) -> tuple[str, int]:
        """Caption ("" where there is none) and class (-1 where there is none); raises CorruptImage."""
        ...

    def where(self, index: int) -> str: ...
    def key(self, index: int) -> str:
        """What the row is told apart by wherever the data lie."""
        ...


def split_of(parts: Iterable[str]) -> tuple[str, int]:
    """(split, position) of the first part of a path that names one; ("", -1) where none does."""
    for position, part in enumerate(parts):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word], position
    return "", -1


def splits_of(names: Sequence[PurePath], strict: bool = True) -> list[str]:
    """The split of every file of a data set, by its folders or else by the files' own names.

    Files outside all splits are of none ("") beside a split `train`, and of `train` beside only others. A folder
    `train` beside files outside is a class of that name.

    Args:
        strict: names of files count only where all have a split (a picture may well be called "crash test.png").

    Returns:
        one a name, or an empty list where there are no splits.
    """
    found = [split_of(name.parts[:-1])[0] for name in names]
    if not any(found):
        found = [split_of(name.parts[-1:])[0] for name in names]
        if strict and (not all(found) or len(set(found)) < 2):
            return []
    kinds = set(found)
    if kinds <= {""} or kinds == {"", "train"}:
        return []
    return found if "train" in kinds else [split or "train" for split in found]


def rows_to_measure(source: Source) -> list[int]:
    """The rows that a program which trains nothing compares with: the held-out split, or all where there are none."""
    held_out = [split for split in ("test", "validation") if split in source.splits]
    return [row for row in range(len(source)) if not held_out or source.splits[row] == held_out[0]]


def hold_out(source: Source) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to measure by, which are disjoint.

    Splits of the data are honoured: `test`, or else `validation`, is held out. Where there is neither, one row in ten
    is, by the hash of its name; none of fewer than FEWEST_IMAGES.

    Raises:
        UserError: the data have splits, but none is `train`.
    """
    rows: list[int] = list(range(len(source)))
    if source.splits:
        by_split: dict[str, list[int]] = {}
        for row, split in enumerate(source.splits):
            by_split.setdefault(split, []).append(row)
        if "train" not in by_split:
            raise UserError(f"{source.name}: no split 'train'; it has {', '.join(by_split)}")
        held_out = by_split.get("test") or by_split.get("validation")
        if held_out:
            return by_split["train"], held_out
        rows = by_split["train"]
    if len(rows) < FEWEST_IMAGES:
        return rows, []
    keys = {row: source.key(row) for row in rows}
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(keys[row].encode("utf-8", "surrogatepass")).digest())
    chosen = {keys[row] for row in by_hash[: -(-len(rows) // HELD_OUT_SHARE)]}  # all rows of one picture go together
    return [row for row in rows if keys[row] not in chosen], [row for row in rows if keys[row] in chosen]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None where there is none."""

    image: str
    text: str | None
    label: str | None

    @property
    def about(self) -> str:
        parts = [f"pictures from {self.image}"]
        parts += [f"captions from {self.text}"] if self.text else []
        parts += [f"labels from {self.label}"] if self.label else []
        return ", ".join(parts)


class NoCandidate(UserError):
    """No column may be of a kind that is needed."""


def choose_column(
    where: str,
    kind: str,
    wanted: str | None,
    names: Sequence[str],
    candidates: Sequence[str],
    need: bool = False,
    prefix: str = "data.",
) -> str | None:
    """The column of a kind (image, caption, label): the one that is wanted, or the one candidate.

    Raises:
        UserError: the wanted one is not there, or one is needed and there is no single candidate.
    """
    if wanted == LEFT_OUT:
        return None
    listed = ", ".join(names)
    if wanted is not None and wanted not in names:
        raise UserError(f"{where}: no {kind} column {wanted!r}; its columns are {listed}")
    if wanted is None and len(candidates) != 1 and need:
        option = {"caption": "text"}.get(kind, kind)
        found = f"{' and '.join(candidates)} may be the {kind} column" if candidates else f"no {kind} column was found"
        kind_of_error = UserError if candidates else NoCandidate
        raise kind_of_error(f"{where}: {found}; its columns are {listed}; name one with --{prefix}{option}_column")
    return wanted or (candidates[0] if len(candidates) == 1 else None)


def find_columns(
    where: str,
    features: Mapping[str, Any],
    image: str | None,
    text: str | None,
    label: str | None,
    need: Sequence[str] = (),
) -> Columns:
    """The columns of a table by their `datasets` features; None finds one by itself, LEFT_OUT reads none.

    A column called `image`, `text` or `label` is taken; else the only one of a fitting type and name.

    Args:
        need: kinds (caption, label) without which the task cannot be.
    """
    import datasets

    names = list(features)

    def dtype(name: str) -> str:
        return str(getattr(features[name], "dtype", ""))

    def strings(name: str) -> bool:
        inner = getattr(features[name], "feature", features[name])
        inner = inner[0] if isinstance(inner, list) and inner else inner
        return "string" in str(getattr(inner, "dtype", ""))

    bare = [n for n in names if isinstance(features[n], datasets.Image) or "binary" in dtype(n)]
    bare += [n for n in names if isinstance(features[n], dict) and "bytes" in features[n]]
    paths = [n for n in names if n.lower() in _IMAGE_NAMES and "string" in dtype(n)]
    called = [name for name in names if name.lower() == "image"]
    chosen = choose_column(where, "image", image, names, called or bare or paths, True)
    assert chosen is not None
    kinds = [n for n in names if isinstance(features[n], datasets.ClassLabel)]
    scalars = [n for n in names if "int" in dtype(n) or dtype(n) in ("string", "large_string")]
    named = label is not None or "label" in need
    found = label_candidates(scalars, names, kinds)
    label = choose_column(where, "label", label, names, found, "label" in need)
    left = [n for n in names if n not in (chosen, label) and strings(n)]
    text = choose_column(where, "caption", text, names, text_candidates(left, names), "caption" in need)
    if text and label and not named and label not in [*kinds, *scalars]:
        label = None  # several labels a picture, a flag, a score: captions do without
    return Columns(chosen, text, label)


def text_candidates(strings: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which of some columns of strings may hold captions: `text`, or those called so, or those not called otherwise."""
    if called := [name for name in names if name.lower() == "text"]:
        return called
    known = [name for name in strings if name.lower() in _TEXT_NAMES]
    return known or [name for name in strings if name.lower() not in _KEY_NAMES]


def label_candidates(scalars: Sequence[str], names: Sequence[str], classes: Sequence[str] = ()) -> list[str]:
    """Which of some columns of integers and strings may hold labels; `classes` are known to.

    A column called `label` does in any case, so that cells of another type are refused and not overlooked.
    """
    if called := [name for name in names if name.lower() == "label"]:
        return called
    return list(classes) or [name for name in scalars if name.lower() in _LABEL_NAMES]


def picture_of(cell: Any, folder: Path | None = None) -> Path | bytes:
    """The undecoded picture of a cell: bytes, a path, or a struct of the two as `datasets` writes it.

    Args:
        folder: what relative paths are relative to, if the file is there; they may not lead out of it.

    Raises:
        CorruptImage: there is none in the cell.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if isinstance(cell, str) and cell:
        if not os.path.isabs(cell) and os.path.normpath(cell).startswith(".."):
            raise CorruptImage(f"the path {cell!r} leads out of the folder")
        beside = folder / cell if folder is not None else Path(cell)
        return beside if beside.is_file() else Path(cell)
    if cell is None or cell in ("", b""):
        raise CorruptImage("it has no picture")
    raise CorruptImage(f"its picture is neither bytes nor a path but {type(cell).__name__}")


def caption_of(cell: Any, column: str = "text") -> str:
    """The caption of a cell: a string; of a list (several captions of one picture, as in COCO) the first; "" of null.

    Raises:
        CorruptImage: another kind of value.
    """
    if isinstance(cell, list | tuple):
        cell = next((entry for entry in cell if entry), None)
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise CorruptImage(f'"{column}" must be a string, got {cell!r}')
    return cell


def label_of(cell: Any, number_of: Mapping[str, int], column: str = "label") -> int:
    """The class of a cell: a whole number or a class name; -1 of null.

    Raises:
        CorruptImage: another kind of value, an unknown name, or a number that is none of a class.
    """
    if isinstance(cell, float) and (math.isnan(cell) or cell.is_integer()):
        cell = None if math.isnan(cell) else int(cell)  # tables with gaps keep whole numbers as floats
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return -1
    if isinstance(cell, str) and cell.strip() in number_of:
        return number_of[cell.strip()]
    if isinstance(cell, int) and not isinstance(cell, bool) and -1 <= cell < MOST_CLASSES:
        return cell
    raise CorruptImage(f'"{column}" must be an integer from 0 to {MOST_CLASSES - 1} or a string, got {cell!r}')


def class_names(labels: Iterable[Any]) -> list[str]:
    """The sorted names among labels, without spaces around them; empty where they are numbers."""
    return sorted({label.strip() for label in labels if isinstance(label, str)} - {""})


def typed(cells: Sequence[str | None]) -> list[Any]:
    """A column of a file that knows strings only (.csv, .tsv): numbers where all are, else the strings, trimmed.

    None where a cell is empty.
    """
    trimmed = [cell.strip() or None if cell is not None else None for cell in cells]
    try:
        numbers = [None if cell is None else float(cell) for cell in trimmed]
    except ValueError:
        return list(trimmed)
    whole = [cell is not None and len(cell) < 20 and cell.lstrip("+-").isdecimal() for cell in trimmed]
    return [int(cell) if is_whole else number for cell, is_whole, number in zip(trimmed, whole, numbers)]  # type: ignore[arg-type]


def class_words(name: str) -> str:
    """A class name as a caption."""
    return name.replace("_", " ").replace("-", " ")


def read_captioned(path: Path, text: str | None = None) -> Iterator[tuple[str, dict[str, Any], str]]:
    """("FILE line N", row, caption) of a .jsonl, .csv, .tsv or .parquet file without pictures.

    Args:
        text: the column of the captions; None takes `text`, or the one that may be it.

    Raises:
        UserError: no such column, or a cell of another kind than `caption_of` reads, by line.
    """
    rows = list(read_rows(path))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    strings = [name for name in names if any(isinstance(row.get(name), str | list) for _, row in rows)]
    column = choose_column(str(path), "caption", text, names, text_candidates(strings, names), need=True, prefix="")
    for where, row in rows:
        if column not in row:
            raise UserError(f'{where}: "{column}" is missing')
        try:
            yield where, row, caption_of(row[column], str(column))
        except CorruptImage as error:
            raise UserError(f"{where}: {error}") from None


class Table:
    """A `Source` of the tables of `datasets`, one or several a split ("" where there are no splits).

    Args:
        folder: what relative paths of pictures are relative to.
        image, text, label: names of columns; None finds them, LEFT_OUT reads none.
        need: kinds of columns (caption, label) of which there may not be several candidates.

    Raises:
        UserError: a column is missing or cannot be told, or there is no row.
    """

    def __init__(
        self,
        name: str,
        tables: Sequence[tuple[str, Any]],
        folder: Path | None = None,
        image: str | None = None,
        text: str | None = None,
        label: str | None = None,
        need: Sequence[str] = (),
    ) -> None:
        import datasets

        self.name, self.folder = name, folder
        tables = [(split, table) for split, table in tables if len(table)]
        if not tables:
            raise UserError(f"{name}: it has no row")
        first = tables[0][1]
        self.columns = find_columns(name, first.features, image, text, label)
        if missing := [k for k in need if (self.columns.text if k == "caption" else self.columns.label) is None]:
            with contextlib.suppress(NoCandidate):
                find_columns(name, first.features, image, text, label, missing)
        self.captions_from = self.columns.text or ""
        self._ends = list(accumulate(len(table) for _, table in tables))
        wanted = [column for column in (self.columns.text, self.columns.label) if column]
        self._pictures, self._words = [], []
        for split, table in tables:
            for column in (self.columns.image, *wanted):
                if column not in table.column_names:
                    raise UserError(f"{name}: the split {split!r} has no column {column!r}, others have")
            bare = table.select_columns([self.columns.image])
            if isinstance(table.features[self.columns.image], datasets.Image):
                bare = bare.cast_column(self.columns.image, datasets.Image(decode=False))
            self._pictures.append(bare)
            self._words.append(table.select_columns(wanted) if wanted else None)
        self.splits: Sequence[str] = []
        if all(split for split, _ in tables):
            self.splits = [split for split, table in tables for _ in range(len(table))]
        feature = first.features[self.columns.label] if self.columns.label else None
        self.classes: list[str] = list(getattr(feature, "names", []))  # of a ClassLabel
        if not self.classes and "string" in str(getattr(feature, "dtype", "")):
            self.classes = class_names(label for _, t in tables for label in t.unique(self.columns.label))
        self._number_of = {name: number for number, name in enumerate(self.classes)}
        counts = ", ".join(f"{s} {self.splits.count(s)}" for s in dict.fromkeys(self.splits)) or str(len(self))
        self.about = f"{name}: a table of {counts} rows, {self.columns.about}"
        self.about += f", {len(self.classes)} classes" if self.classes else ""
        if empty := sum(_empty_cells(table, self.columns.text) for table in self._words if self.columns.text):
            self.about += f", {empty} captions are empty"
        self._tables = tables

    @cached_property
    def fingerprint(self) -> str:
        """Of the cells that are read, by split, and of the names of the classes, wherever the table lies."""
        parts = [repr(self.columns), *self.classes]
        for (split, table), pictures, words in zip(self._tables, self._pictures, self._words):
            # Cells that are paths say nothing of the pictures, so that what is remembered of the table would not do.
            inside = not isinstance(self._cell(pictures[0]), Path)
            files = [Path(file["filename"]) for file in table.cache_files if inside]

            def read(pictures: Any = pictures, words: Any = words) -> str:
                return fingerprint_strings([*self._picture_checksums(pictures), *_cell_checksums(words)])

            parts += [split, str(len(table)), remembered(files, repr(self.columns) + split, read)]
        return fingerprint_strings(parts)

    def _cell(self, row: dict[str, Any]) -> Path | bytes:
        try:
            return picture_of(row[self.columns.image], self.folder)
        except CorruptImage as error:
            return str(error).encode()

    def _picture_checksums(self, pictures: Any) -> Iterator[str]:
        files: list[Path] = []
        for picture in map(self._cell, pictures):
            if isinstance(picture, bytes):
                yield hashlib.sha256(picture).hexdigest()
            else:
                files += [picture] if picture.is_file() else []
                yield picture.name
        yield from file_checksums(files).values()

    @cached_property
    def _first_alike(self) -> list[int]:
        """Of every row the first row with the same picture: a picture with several captions has several rows.

        Remembered under the cache, since all bytes are read.
        """
        path = cache_dir("scans") / f"{self.fingerprint}-alike.json"
        with contextlib.suppress(OSError, ValueError):
            again = {int(row): first for row, first in json.loads(path.read_text(encoding="utf-8")).items()}
            return [again.get(row, row) for row in range(len(self))]
        seen: dict[bytes | Path, int] = {}
        cells = (self._cell(row) for table in self._pictures for row in table)
        first = [
            seen.setdefault(hashlib.sha256(cell).digest() if isinstance(cell, bytes) else cell, row)
            for row, cell in enumerate(cells)
        ]
        with contextlib.suppress(UserError):  # a full or read-only cache
            write_json(path, {str(row): other for row, other in enumerate(first) if row != other})
        return first

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, tables: Sequence[Any], index: int) -> dict[str, Any]:
        part = bisect_right(self._ends, index)
        table = tables[part]
        try:
            return {} if table is None else table[index - (self._ends[part - 1] if part else 0)]
        except UnicodeDecodeError as error:
            raise CorruptImage(f"a string in it is not UTF-8 ({error.reason})") from None

    def raw(self, index: int) -> Path | bytes:
        return picture_of(self._row(self._pictures, index)[self.columns.image], self.folder)

    def label(self, index: int) -> tuple[str, int]:
        row = self._row(self._words, index)
        text, column = self.columns.text, self.columns.label
        label = label_of(row[column], self._number_of, column) if column else -1
        if text:
            return caption_of(row[text], text), label
        return class_words(self.classes[label]) if 0 <= label < len(self.classes) else "", label

    def where(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        split = f" ({self.splits[index]})" if self.splits else ""
        return f"{self.name}{split} row {index - (self._ends[part - 1] if part else 0)}"

    def key(self, index: int) -> str:
        return str(self._first_alike[index])


def _cell_checksums(words: Any) -> Iterator[str]:
    if words is not None:
        yield from (json.dumps(row, sort_keys=True, default=str) for row in words)


def _empty_cells(table: Any, column: str) -> int:
    """Cells without text of a column of strings, null or blank; of lists those that are null."""
    import pyarrow
    import pyarrow.compute

    cells = table.with_format("arrow")[:][column]
    blank = 0
    if pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
        with contextlib.suppress(pyarrow.ArrowInvalid):  # not UTF-8, which is refused where it is read
            trimmed = pyarrow.compute.utf8_trim_whitespace(cells)
            blank = pyarrow.compute.sum(pyarrow.compute.equal(trimmed, "")).as_py() or 0
    return cells.null_count + blank


def load_tables(name: str) -> list[tuple[str, Any]]:
    """(split, table) of a hub name, a folder saved by `datasets`, a file of TABLE_SUFFIXES or a folder of tables.

    Raises:
        UserError: nothing of the kind can be reached or read.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    path = Path(name)
    try:
        if is_saved(path):
            loaded = datasets.load_from_disk(name)
        elif path.exists() and path.suffix.lower() in (".jsonl", ".csv", ".tsv"):
            loaded = _read_table(path)
        elif path.exists():
            files = table_files(path) if path.is_dir() else [path]
            splits = splits_of([file.relative_to(path) for file in files], strict=False) if path.is_dir() else []
            by_split: dict[str, list[str]] = {}
            for file, split in zip(files, splits or ["train"] * len(files)):
                by_split.setdefault(split, []).append(str(file))
            if outside := by_split.pop("", []):
                say_once(f"{name}: {len(outside)} tables of no split passed over, the first is {outside[0]}")
            loaded = datasets.load_dataset(files[0].suffix.lower()[1:], data_files=by_split)
            if not splits:
                loaded = loaded["train"]
        else:
            loaded = datasets.load_dataset(name)
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: neither a folder on this machine nor a Hugging Face data set that can be reached now; check the "
            "name, the network and HF_HUB_OFFLINE, or download it elsewhere and give its folder"
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{name}: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        return [("", loaded)]
    return [(split_of([split])[0] or split, table) for split, table in loaded.items()]


def _read_table(path: Path) -> Any:
    """A .jsonl, .csv or .tsv file as a table of `datasets`."""
    import datasets
    import pyarrow

    rows = list(read_rows(path))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    columns = {name: [row.get(name) for _, row in rows] for name in names}
    if path.suffix.lower() != ".jsonl":
        strings = {"text", *_TEXT_NAMES, *_IMAGE_NAMES}
        columns = {name: cells if name.lower() in strings else typed(cells) for name, cells in columns.items()}
    for name, cells in columns.items():
        try:
            pyarrow.array(cells)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
            raise UserError(f"{path}: the cells of {name!r} are not of one kind ({first_line(error)})") from None
    return datasets.Dataset.from_dict(columns)


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def table_files(path: Path) -> list[Path]:
    """The tables below a folder that are not an image folder's metadata: parquet files, or else arrow files."""
    files = [file for file in list_files(path) if file.stem != "metadata"]
    kinds = [[file for file in files if file.suffix.lower() == suffix] for suffix in (".parquet", ".arrow")]
    return kinds[0] or kinds[1]


def has_pictures(file: Path) -> bool:
    """Whether a parquet or arrow file has a column that may hold pictures."""
    import pyarrow
    import pyarrow.parquet

    try:
        if file.suffix.lower() == ".arrow":
            with pyarrow.memory_map(str(file)) as source:
                schema = pyarrow.ipc.open_stream(source).schema
        else:
            schema = pyarrow.parquet.read_schema(file)
    except (OSError, pyarrow.ArrowInvalid):
        return True  # a damaged table is refused by name where it is read
    return any("binary" in str(field.type) or field.name.lower() in _IMAGE_NAMES for field in schema)
