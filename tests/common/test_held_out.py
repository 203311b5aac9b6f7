"""No loader of any paper shows in training what it holds out, told by the pixels, however the user's data are laid out.

A paper whose data may be a `folder` has `tests/<paper>/own_pictures.py` with LOADERS: for every kind of its own data a
function from a path to the grey levels of the pictures to train on and of those held out.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from common.data.folders import open_source
from common.data.rows import rows_to_measure
from common.errors import UserError
from common.images import open_rgb
from common.metrics.evaluate import open_measured
from common.paths import papers
from tests.common.pictures import parquet, pictures, png

Loader = Callable[[Path], tuple[set[int], set[int]]]


def _with_own_pictures() -> list[str]:
    found = []
    for paper in papers():
        options = getattr(importlib.import_module(f"{paper}.config"), "DataConfig", None)
        names = get_args(get_type_hints(options).get("name")) if options else ()
        found += [paper] if "folder" in names else []
    return found


def loaders() -> dict[str, Loader]:
    return {
        f"{paper}: {name}": loader
        for paper in _with_own_pictures()
        for name, loader in importlib.import_module(f"tests.{paper}.own_pictures").LOADERS.items()
    }


@pytest.fixture(autouse=True)
def _no_cache_of_others(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


LEVELS = range(0, 240, 4)  # a picture's grey level is its name
TRAIN, TEST = LEVELS[:48], LEVELS[48:]


def columns(levels: range) -> dict[str, Any]:
    labels = [level // 4 % 2 for level in levels]
    return {"image": pictures(levels), "text": [f"grey {level}" for level in levels], "label": labels}


def write(folder: Path, levels: range) -> Path:
    for level in levels:
        path = folder / ("even", "odd")[level // 4 % 2] / f"{level}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(level))
    return folder


def saved(root: Path, **splits: range) -> Path:
    import datasets

    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    tables = {
        name: datasets.Dataset.from_dict(columns(levels), features=datasets.Features(features))
        for name, levels in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(root)
    return root


def only_train(root: Path) -> Path:
    return saved(root, train=LEVELS)


def train_and_validation(root: Path) -> Path:
    return saved(root, train=TRAIN, validation=TEST)


def parts_of_splits(root: Path) -> Path:
    """Two tables of one split beside each other, under two names."""
    return saved(root, train=TRAIN[:20], train_extra=TRAIN[20:], val=TEST[:6], dev=TEST[6:])


def files_of_splits(root: Path) -> Path:
    parquet(root / "data" / "train-00000-of-00002.parquet", **columns(TRAIN[:20]))
    parquet(root / "data" / "train-00001-of-00002.parquet", **columns(TRAIN[20:]))
    parquet(root / "data" / "test-00000-of-00001.parquet", **columns(TEST))
    return root


def folders_of_splits(root: Path) -> Path:
    write(root / "training", TRAIN)
    write(root / "eval", TEST)
    return root


def folders_of_classes(root: Path) -> Path:
    return write(root, LEVELS)


def several_captions(root: Path) -> Path:
    """Every picture has three rows."""
    rows = {name: [cell for cell in cells for _ in range(3)] for name, cells in columns(LEVELS).items()}
    parquet(root / "0.parquet", **rows)
    return root


def paths_in_a_table(root: Path) -> Path:
    write(root, LEVELS)
    files = [path.relative_to(root) for path in sorted(root.rglob("*.png")) for _ in range(2)]
    rows = [{"image_path": str(file), "caption": file.stem, "category": str(file.parent)} for file in files]
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "list.jsonl"


LAYOUTS = [
    *(only_train, train_and_validation, parts_of_splits, files_of_splits),
    *(folders_of_splits, folders_of_classes, several_captions, paths_in_a_table),
]
OF_SPLITS = (train_and_validation, parts_of_splits, files_of_splits, folders_of_splits)


@pytest.mark.filterwarnings("ignore:.*held-out images")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("loader", loaders())
def test_what_is_held_out_is_not_trained_on(loader: str, layout: Callable[[Path], Path], tmp_path: Path) -> None:
    where = layout(tmp_path / "data")
    try:
        train, held_out = loaders()[loader](where)
    except UserError as error:
        if "shards" not in loader or layout in (files_of_splits, folders_of_splits):
            raise
        assert "shard" in str(error) or "no images" in str(error) or "parquet" in str(error), error
        return
    assert not train & held_out and train | held_out == set(LEVELS)
    if layout in OF_SPLITS:
        assert held_out == set(TEST)


@pytest.mark.parametrize("layout", OF_SPLITS, ids=lambda layout: layout.__name__)
def test_programs_that_train_nothing_measure_by_the_held_out_split(
    layout: Callable[[Path], Path], tmp_path: Path
) -> None:
    where = layout(tmp_path / "data")
    assert {int(open_rgb(raw)[0, 0, 0]) for raw in open_measured(where, held_out=True).pictures} == set(TEST)
    assert len(open_measured(where).pictures) == len(LEVELS)
    assert rows_to_measure(open_source(folders_of_classes(tmp_path / "plain"))) == list(range(len(LEVELS)))
