"""The user's own images: an image folder with captions, class folders, a Hugging Face data set, or sharded streams.

Every item is a dict(image=uint8 [3, S, S], caption=str, label=int); label is -1 where there are no classes.

    open_images("my/photos", size=64)               # metadata.jsonl or class folders or a data set saved to disk
    open_images("user/dataset", size=64)            # by name, through `datasets`
    ShardedImages("mount/*.parquet", size=64, ...)  # too large for one disk

Broken images are named in a warning, counted, and replaced by the next good one; more than 1 % of them stop the run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from common.data.cache import fingerprint_strings
from common.errors import UserError
from common.files import write_json
from common.paths import cache_dir

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 100_000_000  # a file that unpacks to more is refused as a decompression bomb, not decoded
MAX_CORRUPT_SHARE = 0.01

Policy = Literal["centre", "random", "pad"]


class CorruptImage(Exception):
    """One image that cannot be decoded; the data sets count it and go on."""


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
    background: tuple[int, int, int] = (255, 255, 255)
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


def decode(source: Path | bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode one image to 8-bit RGB: EXIF orientation applied, alpha laid on `background`, 16-bit scaled to 8.

    Raises:
        CorruptImage: no image, truncated, or more than MAX_PIXELS pixels. The message says which without the name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise CorruptImage(f"{picture.width} x {picture.height} pixels, the limit is {MAX_PIXELS:,}")
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture), background)
    except CorruptImage:
        raise
    except FileNotFoundError as error:
        raise CorruptImage("the file is missing") from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... for bad bytes
        raise CorruptImage((str(error).splitlines() or [type(error).__name__])[0]) from error


def _to_rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        # 16-bit greys arrive as I;16 or I; float images are taken to be in [0, 1].
        scale = 255.0 if picture.mode == "F" else 255.0 / 65535.0
        return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return picture.convert("RGB")


@dataclass(frozen=True)
class Record:
    """One line of a data set: where the image is, what it shows."""

    path: Path
    caption: str
    label: int = -1


def read_metadata(root: Path) -> tuple[list[Record], list[str]]:
    """Records of an image folder with `metadata.jsonl` (`file_name`, `text`, optional integer or string `label`).

    Returns:
        the records in the file's order, and the class names (empty when there are no string labels).

    Raises:
        UserError: naming the line: not JSON, a key is missing or of the wrong type, the file does not exist, or its
            name leads out of the folder.
    """
    source = root / "metadata.jsonl"
    rows: list[tuple[Path, str, Any]] = []
    with source.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{source} line {number}"
            try:
                entry = json.loads(raw)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error})") from error
            if not isinstance(entry, dict):
                raise UserError(f'{where}: expected an object like {{"file_name": "a.png", "text": "a cat"}}')
            for key in ("file_name", "text"):
                if key not in entry:
                    raise UserError(f'{where}: "{key}" is missing')
                if not isinstance(entry[key], str):
                    raise UserError(f'{where}: "{key}" must be a string, got {entry[key]!r}')
            path = root / entry["file_name"]
            # Lexically: links that the user made inside the folder may lead anywhere, a name in the file may not.
            if Path(entry["file_name"]).is_absolute() or os.path.normpath(entry["file_name"]).startswith(".."):
                raise UserError(f'{where}: "file_name" {entry["file_name"]!r} leads out of the folder')
            if not path.is_file():
                raise UserError(f"{where}: {entry['file_name']} does not exist in {root}")
            label = entry.get("label", -1)
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise UserError(f'{where}: "label" must be an integer or a string, got {label!r}')
            rows.append((path, entry["text"], label))
    kinds = {type(label) for _, _, label in rows if label != -1}
    if len(kinds) > 1 or (kinds == {str} and any(label == -1 for _, _, label in rows)):
        raise UserError(f'{source}: "label" is a string on some lines and an integer or missing on others')
    if not rows:
        raise UserError(f'{source}: it has no line; write one {{"file_name": ..., "text": ...}} per image')
    classes = sorted({label for _, _, label in rows}) if kinds == {str} else []
    number_of = {name: index for index, name in enumerate(classes)}
    return [Record(path, text, number_of.get(label, label)) for path, text, label in rows], classes


def read_class_folders(root: Path) -> tuple[list[Record], list[str]]:
    """Records of `root/<class>/**/<image>`: the label is the folder's number, the caption its name in words.

    Raises:
        UserError: there is no subfolder with images, or images lie beside the class folders without any caption.
    """
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    records = []
    for label, name in enumerate(classes):
        caption = name.replace("_", " ").replace("-", " ")
        records += [Record(path, caption, label) for path in _image_files(root / name)]
    if not records:
        loose = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in root.iterdir())
        if loose:
            raise UserError(
                f"{root}: {loose} images but no metadata.jsonl; write one line "
                '{"file_name": "a.png", "text": "a cat"} per image, or sort them into one folder per class'
            )
        raise UserError(
            f"{root}: no images in it; expected metadata.jsonl with images, or one folder of images per class"
        )
    return records, classes


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


class _Source(Protocol):
    """What `Images` needs to know of a data set: names, raw images, captions."""

    name: str
    classes: list[str]

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def raw(self, index: int) -> Path | bytes: ...
    def label(self, index: int) -> tuple[str, int]: ...
    def where(self, index: int) -> str: ...


class _FolderSource:
    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise UserError(f"{root}: there is no such folder")
        if not root.is_dir():
            raise UserError(f"{root}: not a folder; give the folder that holds the images")
        has_metadata = (root / "metadata.jsonl").is_file()
        self.records, self.classes = (read_metadata if has_metadata else read_class_folders)(root)
        self.name = str(root)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, sizes, times of change, captions and labels; not of the pixels, which would take minutes."""
        parts = []
        for record in self.records:
            stat = record.path.stat()
            parts += [str(record.path), f"{stat.st_size}:{stat.st_mtime_ns}", record.caption, str(record.label)]
        return fingerprint_strings(parts)

    def __len__(self) -> int:
        return len(self.records)

    def raw(self, index: int) -> Path:
        return self.records[index].path

    def label(self, index: int) -> tuple[str, int]:
        return self.records[index].caption, self.records[index].label

    def where(self, index: int) -> str:
        return str(self.records[index].path)


class _HuggingFaceSource:
    def __init__(
        self, name: str, split: str, image_column: str, caption_column: str | None, label_column: str | None
    ) -> None:
        import datasets

        self.name = f"{name} ({split})"
        table = _load_table(name, split)
        columns = list(table.column_names)
        if image_column not in columns:
            raise UserError(f"{name}: no image column {image_column!r}; its columns are {', '.join(columns)}")
        for option, column in (("caption", caption_column), ("label", label_column)):
            if column is not None and column not in columns:
                raise UserError(f"{name}: no {option} column {column!r}; its columns are {', '.join(columns)}")
        if caption_column is None and "text" in columns:
            caption_column = "text"
        if label_column is None and "label" in columns:
            label_column = "label"
        if not len(table):
            raise UserError(f"{name}: the split {split!r} is empty")
        self.fingerprint = fingerprint_strings([str(table._fingerprint), image_column, str(caption_column)])
        feature = table.features[label_column] if label_column else None
        self.classes: list[str] = list(feature.names) if isinstance(feature, datasets.ClassLabel) else []
        self.image_column, self.caption_column, self.label_column = image_column, caption_column, label_column
        self.table = table.cast_column(image_column, datasets.Image(decode=False))
        self.words = table.select_columns([column for column in (caption_column, label_column) if column])

    def __len__(self) -> int:
        return len(self.table)

    def raw(self, index: int) -> Path | bytes:
        image = self.table[index][self.image_column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"])

    def label(self, index: int) -> tuple[str, int]:
        row = self.words[index] if self.words.column_names else {}
        label = int(row[self.label_column]) if self.label_column and row[self.label_column] is not None else -1
        if self.caption_column:
            caption = row[self.caption_column]
            if isinstance(caption, list):  # several captions for one image, as in COCO: the first one
                caption = caption[0] if caption else ""
            return str(caption or ""), label
        return (self.classes[label].replace("_", " ") if self.classes and label >= 0 else ""), label

    def where(self, index: int) -> str:
        return f"{self.name} row {index}"


def _load_table(name: str, split: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    path = Path(name)
    try:
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            saved = datasets.load_from_disk(name)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise UserError(f"{name}: no split {split!r}; it has {', '.join(saved)}")
            return saved[split]
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=name, split="train")
        if path.is_dir() and any(path.glob("*.parquet")):
            return datasets.load_dataset("parquet", data_files=sorted(map(str, path.glob("*.parquet"))), split="train")
        return datasets.load_dataset(name, split=split)
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: neither a folder on this machine nor a Hugging Face data set that can be reached now; check the "
            "name, the network and HF_HUB_OFFLINE, or download it elsewhere and give its folder"
        ) from error
    except ValueError as error:
        raise UserError(f"{name}: {(str(error).splitlines() or ['cannot be loaded'])[0]}") from error


class Images(Dataset[dict[str, Any]]):
    """A map-style data set of the user's images; made by `open_images`.

    An item is dict(image=uint8 [3, S, S], caption=str, label=int). `data[i]` is a pure function of (seed, i);
    `data[i, step]` also takes the training step, so that a random crop differs between epochs and yet replays exactly.

    With scan=True every image is decoded once when the data set is opened (the result is remembered under the cache,
    keyed by names, sizes and times of change); with scan=False broken images show only when they are drawn, and all
    worker processes share one count.
    """

    def __init__(
        self, source: _Source, framing: Framing, seed: int = 0, scan: bool = True, progress: bool = True
    ) -> None:
        self.source, self.framing, self.seed = source, framing, seed
        self.classes = source.classes
        self.corrupt = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        if scan:
            self._scan(progress)

    @property
    def fingerprint(self) -> str:
        """Of the files, captions and framing: what a cache of features has to be keyed by."""
        return fingerprint_strings([self.source.fingerprint, repr(self.framing), str(self.seed)])

    def __len__(self) -> int:
        return len(self.source)

    def captions(self) -> list[str]:
        """The captions of all items, in their order, without decoding any image."""
        return [self.source.label(self._good(index))[0] for index in range(len(self))]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        position, *step = index if isinstance(index, tuple) else (index,)
        if not -len(self) <= position < len(self):
            raise IndexError(f"item {position} is outside the {len(self)} images of {self.source.name}")
        position %= len(self)
        rng = np.random.default_rng([self.seed, position, *step])
        while True:
            good = self._good(position)
            try:
                picture = decode(self.source.raw(good), self.framing.background)
            except CorruptImage as error:
                warnings.warn(f"skipped {self.source.where(good)}: {error}", stacklevel=2)
                self.corrupt[good] = True
                self._stop_if_many(len(self))
                continue
            caption, label = self.source.label(good)
            return {"image": self.framing(picture, rng), "caption": caption, "label": label}

    def _good(self, index: int) -> int:
        """The index itself, or the next one whose image is not known to be broken."""
        for step in range(len(self)):
            if not self.corrupt[(index + step) % len(self)]:
                return (index + step) % len(self)
        raise UserError(f"{self.source.name}: none of the {len(self)} images can be read")

    def _stop_if_many(self, total: int) -> None:
        bad = torch.nonzero(self.corrupt).flatten().tolist()
        if len(bad) > MAX_CORRUPT_SHARE * total:
            raise UserError(_too_many(self.source.name, [self.source.where(i) for i in bad], total))

    def _scan(self, progress: bool) -> None:
        path = cache_dir("scans") / f"{self.source.fingerprint}.json"
        try:
            bad: dict[str, str] = json.loads(path.read_text())["corrupt"]
        except (OSError, ValueError, KeyError):
            bad = self._decode_all(progress)
            write_json(path, {"source": self.source.name, "images": len(self), "corrupt": bad})
        for index, reason in bad.items():
            self.corrupt[int(index)] = True
            if len(bad) <= MAX_CORRUPT_SHARE * len(self):
                warnings.warn(f"skipped {self.source.where(int(index))}: {reason}", stacklevel=4)
        self._stop_if_many(len(self))

    def _decode_all(self, progress: bool) -> dict[str, str]:
        from tqdm import tqdm

        def fault(index: int) -> str | None:
            try:
                decode(self.source.raw(index), self.framing.background)
                return None
            except CorruptImage as error:
                return str(error)

        faults: dict[str, str] = {}
        bar = tqdm(
            total=len(self), desc=f"checking {self.source.name}", unit="image", disable=not progress or len(self) < 1000
        )
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter lock
            for start in range(0, len(self), 1024):
                part = range(start, min(start + 1024, len(self)))
                faults |= {
                    str(index): reason for index, reason in zip(part, pool.map(fault, part)) if reason is not None
                }
                bar.update(len(part))
        return faults


def open_images(
    where: str | Path,
    size: int,
    policy: Policy = "centre",
    background: tuple[int, int, int] = (255, 255, 255),
    flip: bool = False,
    seed: int = 0,
    split: str = "train",
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    scan: bool = True,
    progress: bool = True,
) -> Images:
    """Open the user's own images as a map-style data set.

    Args:
        where: a folder with `metadata.jsonl`, a folder of class folders, a data set saved by `datasets` or parquet
            files, or the name of a Hugging Face data set.
        size, policy, background, flip: see `Framing`.
        seed: of random crops and flips.
        split, image_column, caption_column, label_column: for Hugging Face data sets; the columns `text` and `label`
            are taken by default where they exist.
        scan: decode everything once on opening to find broken files (remembered); see `Images`.
        progress: show a bar while scanning.

    Raises:
        UserError: nothing there, a bad metadata line, a missing column, or more than 1 % broken images.
    """
    framing = Framing(size, policy, background, flip)
    path = Path(where)
    saved = path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    source: _Source
    if saved or (path.is_dir() and any(path.glob("*.parquet"))) or (path.is_file() and path.suffix == ".parquet"):
        source = _HuggingFaceSource(str(where), split, image_column, caption_column, label_column)
    elif path.exists() or path.is_absolute() or str(where).startswith(".") or str(where).count("/") > 1:
        source = _FolderSource(path)
    else:
        source = _HuggingFaceSource(str(where), split, image_column, caption_column, label_column)
    return Images(source, framing, seed, scan, progress)


class _ParquetShard:
    """One parquet file, local or any URL that fsspec opens (hf://, s3://, https://, ...)."""

    def __init__(self, path: str, image_column: str, caption_column: str | None, label_column: str | None) -> None:
        self.name, self.columns = path, (image_column, caption_column, label_column)
        with self._open() as file:
            names = file.schema_arrow.names
            for column in filter(None, self.columns):
                if column not in names:
                    raise UserError(f"{path}: no column {column!r}; its columns are {', '.join(names)}")
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
            raise UserError(f"{self.name}: not a whole parquet file ({_first_line(error)}); fetch it again") from error

    def __len__(self) -> int:
        return sum(self.groups)

    def rows(self, start: int) -> Iterator[tuple[str, Path | bytes, str, int]]:
        """(name, raw image, caption, label) from row `start` on; row groups before it are not read."""
        image_column, caption_column, label_column = self.columns
        with self._open() as file:
            first = 0
            for group, count in enumerate(self.groups):
                if first + count > start:
                    table = file.read_row_group(group, columns=[c for c in self.columns if c])
                    for row in range(max(0, start - first), count):
                        image = table[image_column][row].as_py()
                        raw = image if isinstance(image, bytes) else (image or {}).get("bytes") or b""
                        label = table[label_column][row].as_py() if label_column else -1
                        caption = table[caption_column][row].as_py() if caption_column else ""
                        yield (
                            f"{self.name} row {first + row}",
                            raw,
                            str(caption or ""),
                            int(-1 if label is None else label),
                        )
                first += count

    def captions(self) -> Iterator[str]:
        """Of every row, without reading the images."""
        return (str(caption or "") for caption in self._column(self.columns[1]))

    def labels(self) -> Iterator[int]:
        """Of every row, -1 where there is none, without reading the images."""
        return (-1 if label is None else int(label) for label in self._column(self.columns[2]))

    def _column(self, name: str | None) -> Iterator[Any]:
        if name is None:
            yield from (None for _ in range(len(self)))
            return
        with self._open() as file:
            for group in range(len(self.groups)):
                yield from file.read_row_group(group, columns=[name])[name].to_pylist()


class _FolderShard:
    def __init__(self, root: Path) -> None:
        self.source = _FolderSource(root)
        self.name = str(root)

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, start: int) -> Iterator[tuple[str, Path | bytes, str, int]]:
        for index in range(start, len(self.source)):
            yield self.source.where(index), self.source.raw(index), *self.source.label(index)

    def captions(self) -> Iterator[str]:
        return (record.caption for record in self.source.records)

    def labels(self) -> Iterator[int]:
        return (record.label for record in self.source.records)


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
        image_column, caption_column, label_column: for parquet; an image is bytes or a struct with `bytes`; None for
            data without captions or labels.
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
        background: tuple[int, int, int] = (255, 255, 255),
        flip: bool = False,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int = 1024,
        seed: int = 0,
        image_column: str = "image",
        caption_column: str | None = "text",
        label_column: str | None = None,
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

        def open_shard(name: str) -> _ParquetShard | _FolderShard:
            if Path(name).is_dir():
                return _FolderShard(Path(name))
            return _ParquetShard(name, image_column, caption_column, label_column)

        with ThreadPoolExecutor(16) as pool:
            self.shards = list(pool.map(open_shard, names))
        if not sum(map(len, self.shards)):
            raise UserError(f"{names[0]}: the {len(names)} shards hold no image")

    @property
    def fingerprint(self) -> str:
        """Of the shards' names and lengths and of the framing."""
        return fingerprint_strings([repr(self.framing)] + [f"{shard.name}:{len(shard)}" for shard in self.shards])

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
        named = {tuple(shard.source.classes): shard.name for shard in self.shards if isinstance(shard, _FolderShard)}
        if len(named) > 1:
            first, second, *_ = named.values()
            raise UserError(f"{first} and {second} have other class names: labels of one would mean another class")
        return 1 + max((label for shard in self.shards for label in shard.labels()), default=-1)

    def seek(self, step: int) -> None:
        """Begin the next iteration with batch number `step` of this rank."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        self._step = step

    def state_dict(self, step: int) -> dict[str, Any]:
        """What has to be equal for a resume to be exact, and the number of batches this rank has used."""
        layout = {"batch_size": self.batch_size, "workers": self.workers, "world": self.world}
        return {"step": step, "seed": self.seed, "buffer": self.buffer, "shards": self.fingerprint, **layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume; UserError names what differs from the run that was stopped."""
        now = self.state_dict(state["step"])
        for key, value in now.items():
            if state.get(key) != value:
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
        health = _StreamHealth(self.shards[0].name, self.rows())
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
                yield self._first_good(rows, order, place, (epoch, reader, block * self.buffer + place), health)
            block, offset = block + 1, 0

    def _raw(self, parts: list[tuple[int, range]], start: int) -> Iterator[tuple[str, Path | bytes, str, int]]:
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
        rows: list[tuple[str, Path | bytes, str, int]],
        order: Sequence[int],
        place: int,
        key: tuple[int, ...],
        health: _StreamHealth,
    ) -> dict[str, Any]:
        """The image at a place of the shuffled block, or the next one of the block that can be decoded."""
        health.seen += 1
        for step in range(len(rows)):
            name, raw, caption, label = rows[order[(place + step) % len(rows)]]
            if name in health.bad:
                continue
            try:
                picture = decode(raw, self.framing.background)
            except CorruptImage as error:
                warnings.warn(f"skipped {name}: {error}", stacklevel=2)
                health.add(name)
                continue
            image = self.framing(picture, np.random.default_rng([self.seed, *key]))
            return {"image": image, "caption": caption, "label": label}
        raise UserError(f"{rows[0][0]}: none of {len(rows)} images in a row can be read")


class _StreamHealth:
    """Counts the broken images of one reader; the verdict waits for 1,000 images, or all of a smaller set."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows, self.seen = name, rows, 0
        self.bad: dict[str, None] = {}

    def add(self, name: str) -> None:
        self.bad[name] = None
        total = min(self.rows, max(self.seen, 1000))
        if len(self.bad) > MAX_CORRUPT_SHARE * total:
            raise UserError(_too_many(self.name, list(self.bad), total))


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
            found = [pattern]
        if not found:
            raise UserError(f"{pattern}: no shard matches")
        names += found
    if not names:
        raise UserError("no shard was given")
    return names


def _too_many(name: str, bad: Sequence[str], total: int) -> str:
    listed = "".join(f"\n  {where}" for where in bad[:50]) + (
        f"\n  ... and {len(bad) - 50} more" if len(bad) > 50 else ""
    )
    return f"{name}: {len(bad)} of {total} images cannot be read, more than 1 %; repair or remove them:{listed}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
