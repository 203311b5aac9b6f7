"""Fingerprints of data: the same wherever the data lie, another for anything that training would see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from common.data.classes import open_classes
from common.data.folders import open_source
from common.data.rows import LEFT_OUT
from common.data.shards import ShardedImages
from tests.common.pictures import captioned, parquet, pictures, png


def folder(root: Path) -> None:
    captioned(root, 3)


def class_folders(root: Path) -> None:
    for number in range(24):
        place = root / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(number))


def saved(root: Path) -> None:
    table = datasets.Dataset.from_dict({"image": pictures(range(3)), "text": ["a", "b", "c"]})
    table.save_to_disk(root)


def shards(root: Path) -> None:
    for name in "ab":
        parquet(root / f"{name}.parquet", image=pictures(range(2)), text=[f"{name}1", f"{name}2"])


def of_source(root: Path) -> str:
    return open_source(root).fingerprint


def of_classes(root: Path) -> str:
    return open_classes("folder", 8, str(root)).contents


def of_shards(root: Path) -> str:
    return ShardedImages(f"{root}/*.parquet", 8, 1, label_column=LEFT_OUT).contents


SETS: dict[str, tuple[Callable[[Path], None], Callable[[Path], str]]] = {
    "folder": (folder, of_source),
    "class folders": (class_folders, of_source),
    "classes": (class_folders, of_classes),
    "saved": (saved, of_source),
    "tables": (shards, of_source),
    "shards": (shards, of_shards),
}


def same_size_and_time(path: Path, content: bytes) -> None:
    """Other bytes under a file's name, size and time of change."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_caption(root: Path) -> None:
    path = root / "metadata.jsonl"
    same_size_and_time(path, path.read_bytes().replace(b"grey 1", b"grey 9"))


def other_picture(root: Path) -> None:
    size = (root / "001.png").stat().st_size
    same_size_and_time(root / "001.png", next(png(i) for i in range(2, 256) if len(png(i)) == size))


def other_row(root: Path) -> None:
    shutil.rmtree(root)
    datasets.Dataset.from_dict({"image": pictures(range(3)), "text": ["a", "b", "x"]}).save_to_disk(root)


CHANGES: list[tuple[str, Callable[[Path], object]]] = [
    ("folder", other_caption),
    ("folder", other_picture),
    ("class folders", lambda root: (root / "cat").rename(root / "eel")),
    ("classes", lambda root: (root / "cat").rename(root / "eel")),
    ("classes", lambda root: (root / "dog" / "99.png").write_bytes(png(99))),
    ("saved", other_row),
    ("tables", lambda root: parquet(root / "b.parquet", image=pictures(range(2)), text=["b2", "b1"])),
    ("shards", lambda root: parquet(root / "b.parquet", image=pictures(range(2)), text=["b2", "b1"])),
    ("shards", lambda root: parquet(root / "c.parquet", image=pictures(range(2)), text=["b2", "b1"])),
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_fingerprint_follows_what_is_read_and_not_where_it_lies(
    kind: str, change: Callable[[Path], object], tmp_path: Path, own_cache: None
) -> None:
    make, fingerprint = SETS[kind]
    make(tmp_path / "data")
    first = fingerprint(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere" / "moved")
    assert fingerprint(tmp_path / "elsewhere" / "moved") == first
    change(tmp_path / "data")
    assert fingerprint(tmp_path / "data") != first
