"""The user's own images: an image folder, a Hugging Face data set, parquet files.

Every item is a dict(image=uint8 [3, S, S], caption=str, label=int); label is -1 where there are no classes.

    open_images("my/photos", size=64)               # an image folder, or a data set saved to disk
    open_images("user/dataset", size=64)            # by name, through `datasets`
    open_source("my/photos")                        # the same without decoding: files, captions, labels, splits

Image folders follow the convention of `datasets` ("imagefolder") and of kohya's trainers; see `read_folder`. One line
on stderr says what was taken for what. Broken images are named in a warning, counted, and replaced by the next good
one; more than 1 % of them stop the run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from common.data.cache import file_checksums, fingerprint_strings
from common.data.lines import read_lines, read_rows
from common.data.rows import (
    LEFT_OUT,
    TABLE_SUFFIXES,
    Source,
    Table,
    caption_of,
    choose_column,
    class_names,
    class_words,
    has_pictures,
    is_saved,
    label_candidates,
    label_of,
    load_tables,
    split_of,
    splits_of,
    table_files,
    text_candidates,
    typed,
)
from common.errors import UserError
from common.files import is_text, list_files, write_json
from common.images import IMAGE_SUFFIXES, OTHER_PICTURES, WHITE, CorruptImage, decoded
from common.paths import cache_dir
from common.processes import say_once

MAX_CORRUPT_SHARE = 0.01  # of pictures that cannot be read: they are passed over and said; more are refused
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

Policy = Literal["centre", "random", "pad"]


@dataclass(frozen=True)
class Framing:
    """How a picture of any shape becomes a square.

    size: side in pixels.
    policy: "centre" scales the shortest side to `size` and cuts the middle out, "random" cuts a random place out,
        "pad" scales the longest side to `size` and fills up with the background.
    background: colour behind transparent pixels and around padded pictures, RGB 0-255.
    flip: mirror half of the pictures (off by default: letters and captions that say left or right suffer).
    """

    size: int
    policy: Policy = "centre"
    background: tuple[int, int, int] = WHITE
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"the image size must be positive, got {self.size}")
        if self.policy not in ("centre", "random", "pad"):
            raise UserError(f"unknown resize policy {self.policy!r}; choose centre, random or pad")

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, size, size] of a picture in RGB; `rng` decides crop and flip."""
        width, height = picture.size
        if self.policy == "pad":
            w, h = (max(1, round(side * self.size / max(width, height))) for side in (width, height))
            square = Image.new("RGB", (self.size, self.size), self.background)
            scaled = picture.resize((w, h), Image.Resampling.LANCZOS)
            square.paste(scaled, ((self.size - w) // 2, (self.size - h) // 2))
        else:
            side = min(width, height)
            x, y = (rng.random(), rng.random()) if self.policy == "random" else (0.5, 0.5)
            left, top = x * (width - side), y * (height - side)
            # Cutting out while scaling never makes the whole scaled picture, which a very long strip would blow up.
            box = (left, top, left + side, top + side)
            square = picture.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box)
        if self.flip and rng.random() < 0.5:
            square = ImageOps.mirror(square)
        return torch.from_numpy(np.array(square).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Record:
    """One picture of an image folder."""

    path: Path
    caption: str = ""
    label: int = -1


@dataclass
class Folder:
    """An image folder as a `Source`; made by `read_folder`.

    unnamed: pictures that the metadata does not name, so that they do not count.
    empty: folders beside those of the classes that hold no picture.
    """

    root: Path
    records: list[Record]
    splits: Sequence[str]
    classes: list[str]
    captions_from: str
    about: str
    unnamed: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.root)

    @cached_property
    def fingerprint(self) -> str:
        """Of the pictures' names below the folder and their bytes, captions, labels and classes, wherever it lies."""
        checksums = file_checksums([record.path for record in self.records])
        parts = list(self.classes)
        for index, record in enumerate(self.records):
            parts += [self.key(index), checksums[record.path], record.caption, str(record.label)]
        return fingerprint_strings(parts)

    def __len__(self) -> int:
        return len(self.records)

    def raw(self, index: int) -> Path:
        return self.records[index].path

    def label(self, index: int) -> tuple[str, int]:
        return self.records[index].caption, self.records[index].label

    def where(self, index: int) -> str:
        return str(self.records[index].path)

    @cached_property
    def _first_alike(self) -> list[int]:
        """Of every row the first one with the same file, which several links or lines may lead to."""
        first: dict[tuple[int, int], int] = {}
        stats = (record.path.stat() for record in self.records)
        return [first.setdefault((stat.st_dev, stat.st_ino), row) for row, stat in enumerate(stats)]

    def key(self, index: int) -> str:
        return self.records[self._first_alike[index]].path.relative_to(self.root).as_posix()


def read_folder(
    where: str | Path, text: str | None = None, label: str | None = None, need: Sequence[str] = ()
) -> Folder:
    """The pictures of an image folder by the convention of `datasets` ("imagefolder"), without decoding any.

    - Folders train, validation (val, valid, dev) and test (eval, ...) at any level are splits; files called so too
      ("train-01.png"), if all are. A folder "train" beside other pictures is a class of that name.
    - metadata.jsonl, .csv or .parquet at any level: `file_name` (relative to the file's own folder), a caption column,
      `label` (an integer or a class name). Only pictures that it names count; the nearest file wins.
    - Else the folder that a picture lies in is its class, if all lie at the same depth in more than one folder, and
      its name in words the caption.
    - kohya's captions: the first line of `a.txt` beside `a.png`, where no metadata gives captions.

    Hidden files and folders never count.

    Args:
        text, label: columns of the metadata; None finds them, LEFT_OUT reads none.
        need: kinds of columns (caption, label) of which there may not be several candidates.

    Raises:
        UserError: no picture, or naming the line of the metadata: not JSON, a key is missing or of the wrong type,
            the file does not exist, or its name leads out of the folder.
    """
    root = Path(where)
    if not root.exists():
        raise UserError(f"{root}: there is no such folder")
    if not root.is_dir():
        raise UserError(
            f"{root}: not a folder; give the folder that holds the images, or a table ({', '.join(TABLE_SUFFIXES)})"
        )
    files = list_files(root)
    metadata = [file for file in files if file.name in METADATA]
    if metadata:
        rows, captions_from = _read_metadata(root, metadata, text, label, need)
    else:
        rows, captions_from = [_Row(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES], ""
    if not rows:
        raise UserError(
            f"{root}: no images in it; expected pictures with metadata.jsonl, with a .txt of the same name beside "
            "each, or in one folder per class"
        )
    splits = splits_of([row.picture.relative_to(root) for row in rows])
    rows = [row for row, split in zip(rows, splits or "-" * len(rows)) if split]
    splits = [split for split in splits if split]
    empty: list[Path] = []
    if not metadata:
        names = _class_folders([row.picture.relative_to(root) for row in rows], bool(splits))
        rows = [replace(row, label=name) for row, name in zip(rows, names)]
        empty = _empty_folders(rows)
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    beside = {texts[row.picture.with_suffix("")] for row in rows if row.picture.with_suffix("") in texts}
    if beside and not captions_from and text != LEFT_OUT:
        bare = [row.picture for row in rows if row.picture.with_suffix("") not in texts]
        if bare and not isinstance(rows[0].label, str):
            raise UserError(
                f"{root}: {len(bare)} of {len(rows)} pictures have no .txt beside them, the first is {bare[0]}"
            )
        rows = [replace(row, caption=_caption_beside(row.picture, texts, row.caption)) for row in rows]
        captions_from = "the .txt beside each picture"
    classes = class_names(row.label for row in rows)
    for name in classes:
        if not is_text(name):
            raise UserError(f"{root}: the name of the class {name!r} is not UTF-8 text; rename its folder")
    number_of = {name: number for number, name in enumerate(classes)}
    records = []
    for row in rows:
        words = class_words(row.label) if isinstance(row.label, str) else ""
        caption = words if row.caption is None else row.caption
        records.append(Record(row.picture, caption, label_of(row.label, number_of)))
    used = {record.path for record in records} | {*metadata}
    used |= beside if captions_from.startswith("the .txt") else set()
    unused = [file for file in files if file not in used]
    about = _about(root, splits, records, len(classes), captions_from, unused)
    if empty:
        about += f"; {len(empty)} folders without pictures: {', '.join(folder.name for folder in empty[:3])}"
    unnamed = [file for file in unused if metadata and file.suffix.lower() in IMAGE_SUFFIXES]
    return Folder(root, records, splits, classes, captions_from, about, unnamed, empty)


@dataclass(frozen=True)
class _Row:
    picture: Path
    caption: str | None = None
    label: Any = None


def _about(
    root: Path, splits: list[str], records: list[Record], classes: int, captions_from: str, unused: list[Path]
) -> str:
    counts = ", ".join(f"{split} {splits.count(split)}" for split in dict.fromkeys(splits))
    parts = [f"{len(records)} pictures"]
    parts += [f"{len(set(splits))} splits ({counts})"] if splits else []
    parts += [f"{classes} classes"] if classes else []
    source = captions_from or ("the names of the classes" if classes else "")
    about = f"{root}: {', '.join(parts)}, {f'captions from {source}' if source else 'no captions'}"
    empty = sum(not record.caption.strip() for record in records) if captions_from else 0
    about += f" ({empty} of them empty)" if empty else ""
    if unused:
        about += f"; {len(unused)} files passed over: "
        about += ", ".join(file.relative_to(root).as_posix() for file in unused[:3])
        about += ", ..." if len(unused) > 3 else ""
    return about


def _caption_beside(picture: Path, texts: Mapping[Path, Path], otherwise: str | None) -> str | None:
    path = texts.get(picture.with_suffix(""))
    return otherwise if path is None else next((line.strip() for _, line in read_lines(path)), "")


def _class_folders(names: Sequence[PurePath], split: bool) -> Sequence[str | None]:
    """The class of every picture by its folder, or None for all; folders of splits do not count."""
    below = [name.parts[split_of(name.parts[:-1])[1] + 1 :] if split else name.parts for name in names]
    folders = {parts[-2] if len(parts) > 1 else None for parts in below}
    if None in folders or len({len(parts) for parts in below}) > 1:
        return [None] * len(names)
    # Of cat/images/1.png and dog/images/1.png the folders that differ are the classes.
    place = -2 if len(folders) > 1 else 0
    return [parts[place] for parts in below] if len({parts[place] for parts in below}) > 1 else [None] * len(names)


def _empty_folders(rows: Sequence[_Row]) -> list[Path]:
    """Folders beside those of the classes that hold no picture, as an unpacking that stopped leaves them."""
    above: dict[Path, set[str]] = {}
    for row in rows:
        if isinstance(row.label, str):
            folder = next(folder for folder in row.picture.parents if folder.name == row.label)
            above.setdefault(folder.parent, set()).add(row.label)
    found = [folder for place, known in above.items() for folder in place.iterdir() if folder.name not in known]
    return sorted(folder for folder in found if _is_empty_class(folder))


def _is_empty_class(folder: Path) -> bool:
    if not folder.is_dir() or folder.name.startswith((".", "__")) or split_of([folder.name])[0]:
        return False
    files = list_files(folder)
    return not files or any(file.suffix.lower() in OTHER_PICTURES for file in files)


def _read_metadata(
    root: Path, files: list[Path], text: str | None, label: str | None, need: Sequence[str]
) -> tuple[list[_Row], str]:
    """The rows of the metadata files, and where captions are from."""
    kinds = sorted({file.name for file in files})
    if len(kinds) > 1:
        raise UserError(f"{root}: {' and '.join(kinds)} lie in it; keep the metadata in files of one kind")
    found: dict[Path, list[_Row]] = {}  # by file: a picture may have several rows in one
    taken: dict[Path, Path] = {}  # picture -> the nearest file that names it
    captions_from, faults = "", list[str]()
    for file in sorted(files, key=lambda file: (-len(file.parts), file)):
        table = list(read_rows(file))
        names = list(dict.fromkeys(name for _, row in table for name in row))
        picture_column = "file_name"
        if picture_column not in names:
            picture_column = next((name for name in names if name.endswith("_file_name")), picture_column)
        strings = [name for name in names if any(_is_text(row.get(name)) for _, row in table)]
        scalars = [name for name in names if all(isinstance(row.get(name), int | str | None) for _, row in table)]
        several = label_candidates(scalars, names)
        label_column = choose_column(str(file), "label", label, names, several, "label" in need and len(several) > 1)
        strings = [name for name in strings if name not in (picture_column, label_column)]
        several = text_candidates(strings, names)
        text_column = choose_column(str(file), "caption", text, names, several, "caption" in need and len(several) > 1)
        cells = [row.get(label_column or "") for _, row in table]
        if label is None and text_column and all(isinstance(cell, list | dict | bool | None) for cell in cells):
            label_column = None  # several labels a picture, or a flag: captions do without
        captions_from = file.name if text_column else captions_from
        labels = [row.get(label_column or "") for _, row in table]
        labels = typed(labels) if file.suffix == ".csv" else [None if cell == "" else cell for cell in labels]
        found[file] = []
        for (where, row), cell in zip(table, labels):
            try:
                picture = _named_picture(where, row, picture_column, file.parent)
                if text_column and text_column not in row:
                    raise CorruptImage(f'"{text_column}" is missing')
                caption = caption_of(row[text_column], text_column) if text_column else None
                if not isinstance(cell, str):
                    cell = label_of(cell, {}, label_column or "label")
            except CorruptImage as error:
                faults.append(f"{where}: {error}")
                continue
            if taken.setdefault(picture, file) == file:
                found[file].append(_Row(picture, caption, None if cell == -1 else cell))
    total = len(faults) + sum(map(len, found.values()))
    if len(faults) > MAX_CORRUPT_SHARE * total:
        more = f" ({len(faults)} of {total} lines are wrong)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}")
    for fault in faults:
        warnings.warn(f"skipped {fault}", stacklevel=5)
    rows = [row for file in files for row in found[file]]
    if not rows:
        raise UserError(f'{files[0]}: it has no line; write one {{"file_name": ..., "text": ...}} per image')
    if len({isinstance(row.label, str) for row in rows}) > 1:
        raise UserError(f'{files[0]}: "label" is a string on some lines and an integer or missing on others')
    return rows, captions_from


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) or (isinstance(cell, list) and bool(cell) and isinstance(cell[0], str))


def _named_picture(where: str, row: Mapping[str, Any], column: str, folder: Path) -> Path:
    """The file of a line; UserError where it leads out of the folder, CorruptImage where there is none."""
    name = row.get(column)
    if name is None:
        raise CorruptImage(f'"{column}" is missing; its columns are {", ".join(row)}')
    if not isinstance(name, str):
        raise CorruptImage(f'"{column}" must be a string, got {name!r}')
    # Lexically: links that the user made inside the folder may lead anywhere, a name in the file may not.
    inside = os.path.normpath(name)
    if os.path.isabs(name) or inside == ".." or inside.startswith("../"):
        raise UserError(f'{where}: "{column}" {name!r} leads out of the folder')
    try:
        there = (folder / inside).is_file()
    except (OSError, ValueError) as error:  # too long, or a zero byte
        raise CorruptImage(f'"{column}" is no name of a file ({error})') from None
    if not there:
        raise CorruptImage(f"{name} does not exist in {folder}")
    return folder / inside


def open_source(
    where: str | Path,
    image: str | None = None,
    text: str | None = None,
    label: str | None = None,
    need: Sequence[str] = (),
) -> Source:
    """The user's pictures, undecoded, and one line on stderr about them.

    Args:
        where: an image folder (`read_folder`), a data set saved by `datasets`, a folder of parquet or arrow files, one
            table (.parquet, .arrow, .jsonl, .csv, .tsv), or the name of a Hugging Face data set.
        image, text, label: names of columns; None finds them, LEFT_OUT reads none.
        need: kinds of columns (caption, label) of which there may not be several candidates.

    Raises:
        UserError: nothing there, a bad line of metadata, a column that is missing or cannot be told.
    """
    path = Path(where)
    if path.is_dir():
        is_table = is_saved(path) or _is_table(path, image)
    else:
        is_table = path.suffix.lower() in TABLE_SUFFIXES if path.exists() else not _is_path(str(where))
    source: Source
    if is_table:
        folder = path if path.is_dir() else path.parent
        source = Table(str(where), load_tables(str(where)), folder, image, text, label, need)
    else:
        source = read_folder(path, text, label, need)
    say_once(source.about)
    return source


def _is_table(folder: Path, image: str | None) -> bool:
    """Whether the tables of a folder are its data: they hold pictures, or there is nothing else."""
    tables = table_files(folder)
    if not tables or image is not None or has_pictures(tables[0]):
        return bool(tables)
    return not any(file.suffix.lower() in IMAGE_SUFFIXES for file in list_files(folder))


def need_words(source: Source, rows: Sequence[int]) -> None:
    """Raise UserError, saying what would give them, where no row has a caption or a class."""

    def words(row: int) -> bool:
        with contextlib.suppress(CorruptImage):
            return source.label(row) != ("", -1)
        return False

    if not any(map(words, rows)):
        raise UserError(
            f"{source.name}: {len(source)} images but no metadata.jsonl; write one line "
            '{"file_name": "a.png", "text": "a cat"} per image, give each a .txt of its name, or sort them into one '
            f"folder per class ({source.about})"
        )


def _is_path(where: str) -> bool:
    """Whether what is not there was meant as a path, not as a name on the hub."""
    suffixes = {*TABLE_SUFFIXES, *IMAGE_SUFFIXES}
    return os.path.isabs(where) or where.startswith(".") or where.count("/") > 1 or Path(where).suffix in suffixes


class Images(Dataset[dict[str, Any]]):
    """A map-style data set of the user's images; made by `open_images`.

    An item is dict(image=uint8 [3, S, S], caption=str, label=int). `data[i]` is a pure function of (seed, i);
    `data[i, step]` also takes the training step, so that a random crop differs between epochs and yet replays exactly.

    `part` gives some of them; a broken image is never replaced by one of another part.

    With scan=True every image is decoded once when the data set is opened (the result is remembered under the cache,
    keyed by names, sizes and times of change); with scan=False broken images show only when they are drawn, and all
    worker processes share one count.
    """

    def __init__(
        self, source: Source, framing: Framing, seed: int = 0, scan: bool = True, progress: bool = True
    ) -> None:
        self.source, self.framing, self.seed = source, framing, seed
        self.rows: Sequence[int] = range(len(source))
        self.classes = source.classes
        self.corrupt = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        if scan:
            self.corrupt[list(broken_rows(source, progress))] = True

    @property
    def fingerprint(self) -> str:
        """Of the files, captions and framing: what a cache of features has to be keyed by."""
        rows = [] if isinstance(self.rows, range) else [repr(self.rows)]
        return fingerprint_strings([self.source.fingerprint, repr(self.framing), str(self.seed), *rows])

    def part(self, rows: Sequence[int]) -> Images:
        """The images of some rows of the source; they share one count of broken ones."""
        part = copy.copy(self)
        part.rows = list(rows)
        return part

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        """The captions of all items, in their order, without decoding any image."""
        return [self.source.label(self._good(index))[0] for index in range(len(self))]

    def labels(self) -> list[int]:
        """The classes of all items, alike."""
        return [self.source.label(self._good(index))[1] for index in range(len(self))]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        position, *step = index if isinstance(index, tuple) else (index,)
        if not -len(self) <= position < len(self):
            raise IndexError(f"item {position} is outside the {len(self)} images of {self.source.name}")
        position %= len(self)
        rng = np.random.default_rng([self.seed, self.rows[position], *step])
        while True:
            good = self._good(position)
            try:
                caption, label = self.source.label(good)
                with decoded(self.source.raw(good), self.framing.background, self.framing.size) as picture:
                    return {"image": self.framing(picture, rng), "caption": caption, "label": label}
            except CorruptImage as error:
                warnings.warn(f"skipped {self.source.where(good)}: {error}", stacklevel=2)
                self.corrupt[good] = True
                bad = torch.nonzero(self.corrupt).flatten().tolist()
                stop_if_many(self.source.name, [self.source.where(row) for row in bad], len(self.source))

    def _good(self, position: int) -> int:
        """The row at a position, or the next one whose image is not known to be broken."""
        for step in range(len(self)):
            row = self.rows[(position + step) % len(self)]
            if not self.corrupt[row]:
                return row
        raise UserError(f"{self.source.name}: none of the {len(self)} images can be read")


def broken_rows(source: Source, progress: bool = False) -> dict[int, str]:
    """What is wrong with the rows of a source that cannot be read; each is named in a warning.

    Every picture is decoded once; the result is remembered under the cache, by the source's fingerprint.

    Raises:
        UserError: more than 1 % are broken.
    """
    path = cache_dir("scans") / f"{source.fingerprint}-2.json"  # 2: the rules of `decoded`
    try:
        bad = {int(row): reason for row, reason in json.loads(path.read_text(encoding="utf-8"))["corrupt"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        bad = _decode_all(source, progress)
        with contextlib.suppress(UserError):  # a full or read-only cache: decoded again next time
            write_json(path, {"source": source.name, "images": len(source), "corrupt": bad})
    for row, reason in [*bad.items()][:50]:
        warnings.warn(f"skipped {source.where(row)}: {reason}", stacklevel=4)
    stop_if_many(source.name, [f"{source.where(row)}: {reason}" for row, reason in bad.items()], len(source))
    return bad


def _decode_all(source: Source, progress: bool) -> dict[int, str]:
    from tqdm import tqdm

    def fault(row: int) -> str | None:
        try:
            source.label(row)
            with decoded(source.raw(row), side=64):
                return None
        except CorruptImage as error:
            return str(error)

    faults: dict[int, str] = {}
    quiet = not progress or len(source) < 1000
    bar = tqdm(total=len(source), desc=f"checking {source.name}", unit="image", disable=quiet)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter lock
        for start in range(0, len(source), 1024):
            part = range(start, min(start + 1024, len(source)))
            faults |= {row: reason for row, reason in zip(part, pool.map(fault, part)) if reason is not None}
            bar.update(len(part))
    return faults


def open_images(
    where: str | Path,
    size: int,
    policy: Policy = "centre",
    background: tuple[int, int, int] = WHITE,
    flip: bool = False,
    seed: int = 0,
    split: str | None = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    scan: bool = True,
    progress: bool = True,
) -> Images:
    """Open the user's own images as a map-style data set.

    Args:
        where, image_column, caption_column, label_column: see `open_source`.
        size, policy, background, flip: see `Framing`.
        seed: of random crops and flips.
        split: of data that have splits; None opens all of them.
        scan: decode everything once on opening to find broken files (remembered); see `Images`.
        progress: show a bar while scanning.

    Raises:
        UserError: nothing there, neither captions nor classes, a bad metadata line, a missing column, or more than
            1 % broken images.
    """
    framing = Framing(size, policy, background, flip)
    source = open_source(where, image_column, caption_column, label_column)
    images = Images(source, framing, seed, scan, progress)
    need_words(source, [row for row in images.rows if not images.corrupt[row]])
    if split is None or not source.splits:
        return images
    rows = [row for row, name in enumerate(source.splits) if name == split]
    if not rows:
        raise UserError(f"{where}: no split {split!r}; it has {', '.join(dict.fromkeys(source.splits))}")
    return images.part(rows)


def stop_if_many(name: str, bad: Sequence[str], total: int) -> None:
    """Raise UserError with the list of broken images where they are more than 1 %."""
    if len(bad) > MAX_CORRUPT_SHARE * total:
        listed = "".join(f"\n  {where}" for where in bad[:50])
        listed += f"\n  ... and {len(bad) - 50} more" if len(bad) > 50 else ""
        raise UserError(
            f"{name}: {len(bad)} of {total} images cannot be read, more than 1 %; repair or remove them:{listed}"
        )
