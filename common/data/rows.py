"""Rows of tables that hold pictures, captions and labels: which columns do, and what their cells may be.

Tables come from `datasets` (a name on the hub, a folder saved to disk) and from parquet files; the rows of image
folders (`common.data.folders`) go through the same rules. A cell that breaks them is a broken picture: counted,
passed over, and refused when there are many.
"""

from __future__ import annotations

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
from common.errors import UserError, first_line
from common.images import CorruptImage, list_files

HELD_OUT_SHARE = 10  # of data without splits, one in ten is held out
FEWEST_IMAGES = 20  # of fewer images none can be held out
MOST_CLASSES = 1_000_000  # a larger label is a mistake, not a class
LEFT_OUT = ""  # in place of a column's name: do not read one

# Names that columns go by where `image`, `text` or `label` is missing, and those that hold no captions.
_IMAGE_NAMES = {"image", "img", "image_path", "img_path", "path", "file", "file_name", "filename", "filepath"}
_TEXT_NAMES = {"caption", "captions", "prompt", "prompts", "description", "sentence", "sentences"}
_LABEL_NAMES = {"labels", "class", "class_id", "class_name", "class_label", "category", "category_id", "target"}
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
    """

    classes: list[str]
    splits: Sequence[str]
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


def choose_column(
    where: str, kind: str, wanted: str | None, names: Sequence[str], candidates: Sequence[str], need: bool = False
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
        raise UserError(f"{where}: {found}; its columns are {listed}; name one with --data.{option}_column")
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
    chosen = choose_column(where, "image", image, names, ["image"] if "image" in names else bare or paths, True)
    assert chosen is not None
    kinds = [n for n in names if isinstance(features[n], datasets.ClassLabel)]
    scalars = [n for n in names if "int" in dtype(n) or dtype(n) in ("string", "large_string")]
    label = choose_column(where, "label", label, names, label_candidates(scalars, names, kinds), "label" in need)
    left = [n for n in names if n not in (chosen, label) and strings(n)]
    text = choose_column(where, "caption", text, names, text_candidates(left, names), "caption" in need)
    return Columns(chosen, text, label)


def text_candidates(strings: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which of some columns of strings may hold captions: `text`, or those called so, or those not called otherwise."""
    if "text" in names:
        return ["text"]
    known = [name for name in strings if name.lower() in _TEXT_NAMES]
    return known or [name for name in strings if name.lower() not in _KEY_NAMES]


def label_candidates(scalars: Sequence[str], names: Sequence[str], classes: Sequence[str] = ()) -> list[str]:
    """Which of some columns of integers and strings may hold labels; `classes` are known to.

    A column called `label` does in any case, so that cells of another type are refused and not overlooked.
    """
    if "label" in names:
        return ["label"]
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
    if cell is None:
        return -1
    if isinstance(cell, str) and cell in number_of:
        return number_of[cell]
    if isinstance(cell, int) and not isinstance(cell, bool) and -1 <= cell < MOST_CLASSES:
        return cell
    raise CorruptImage(f'"{column}" must be an integer from 0 to {MOST_CLASSES - 1} or a string, got {cell!r}')


def class_names(labels: Iterable[Any]) -> list[str]:
    """The sorted names among labels; empty where they are numbers."""
    return sorted({label for label in labels if isinstance(label, str)})


def class_words(name: str) -> str:
    """A class name as a caption."""
    return name.replace("_", " ").replace("-", " ")


class Table:
    """A `Source` of the tables of `datasets`, one a split ("" where there are no splits).

    Args:
        folder: what relative paths of pictures are relative to.
        image, text, label: names of columns; None finds them, LEFT_OUT reads none.

    Raises:
        UserError: a column is missing or cannot be told, or there is no row.
    """

    def __init__(
        self,
        name: str,
        tables: Mapping[str, Any],
        folder: Path | None = None,
        image: str | None = None,
        text: str | None = None,
        label: str | None = None,
    ) -> None:
        import datasets

        self.name, self.folder = name, folder
        tables = {split: table for split, table in tables.items() if len(table)}
        if not tables:
            raise UserError(f"{name}: it has no row")
        first = next(iter(tables.values()))
        self.columns = find_columns(name, first.features, image, text, label)
        self._ends = list(accumulate(len(table) for table in tables.values()))
        wanted = [column for column in (self.columns.text, self.columns.label) if column]
        self._pictures, self._words = [], []
        for split, table in tables.items():
            for column in (self.columns.image, *wanted):
                if column not in table.column_names:
                    raise UserError(f"{name}: the split {split!r} has no column {column!r}, others have")
            bare = table.select_columns([self.columns.image])
            if isinstance(table.features[self.columns.image], datasets.Image):
                bare = bare.cast_column(self.columns.image, datasets.Image(decode=False))
            self._pictures.append(bare)
            self._words.append(table.select_columns(wanted) if wanted else None)
        self.splits: Sequence[str] = []
        if "" not in tables:
            self.splits = [split for split, table in tables.items() for _ in range(len(table))]
        feature = first.features[self.columns.label] if self.columns.label else None
        self.classes: list[str] = list(getattr(feature, "names", []))  # of a ClassLabel
        if not self.classes and "string" in str(getattr(feature, "dtype", "")):
            self.classes = class_names(label for t in tables.values() for label in t.unique(self.columns.label))
        self._number_of = {name: number for number, name in enumerate(self.classes)}
        counts = ", ".join(f"{split} {len(table)}" for split, table in tables.items()) if self.splits else len(self)
        self.about = f"{name}: a table of {counts} rows, {self.columns.about}"
        self._tables = tables

    @cached_property
    def fingerprint(self) -> str:
        """Of the cells that are read, by split, and of the names of the classes, wherever the table lies."""
        parts = [repr(self.columns), *self.classes]
        for (split, table), pictures, words in zip(self._tables.items(), self._pictures, self._words):
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

    def __len__(self) -> int:
        return self._ends[-1]

    def _row(self, tables: Sequence[Any], index: int) -> dict[str, Any]:
        part = bisect_right(self._ends, index)
        table = tables[part]
        return {} if table is None else table[index - (self._ends[part - 1] if part else 0)]

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
        return str(index)


def _cell_checksums(words: Any) -> Iterator[str]:
    if words is not None:
        yield from (json.dumps(row, sort_keys=True, default=str) for row in words)


def load_tables(name: str) -> dict[str, Any]:
    """The tables of a hub name, a folder saved by `datasets`, a parquet file or a folder of them, by split.

    Raises:
        UserError: nothing of the kind can be reached or read.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    path = Path(name)
    try:
        if is_saved(path):
            loaded = datasets.load_from_disk(name)
        elif path.exists():
            files = parquet_files(path) if path.is_dir() else [path]
            splits = splits_of([file.relative_to(path) for file in files], strict=False) if path.is_dir() else []
            by_split: dict[str, list[str]] = {}
            for file, split in zip(files, splits or ["train"] * len(files)):
                by_split.setdefault(split, []).append(str(file))
            by_split.pop("", None)
            loaded = datasets.load_dataset("parquet", data_files=by_split)
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
        return {"": loaded}
    return {split_of([split])[0] or split: table for split, table in loaded.items()}


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `datasets`' save_to_disk."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def parquet_files(path: Path) -> list[Path]:
    """The parquet files below a folder that are not an image folder's metadata."""
    return [file for file in list_files(path) if file.suffix.lower() == ".parquet" and file.stem != "metadata"]
