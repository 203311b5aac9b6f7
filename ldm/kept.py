"""What a run folder keeps of its data, so that it draws without them: its first held-out items and its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from common.weights import read_weights, save_weights
from ldm.tasks import Task

FILE = "conditions.safetensors"
ITEMS = 64


class KeptItems(Dataset[dict[str, Any]]):
    """Held-out items as their data set gave them, with `captions` and `classes`; serves both parts of `build_task`."""

    def __init__(self, columns: dict[str, Tensor], captions: list[str], classes: list[str]) -> None:
        self.columns, self.captions, self.classes = columns, captions, classes

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {name: column[index] for name, column in self.columns.items()}
        return {**item, "caption": self.captions[index]} if self.captions else item


def keep_items(task: Task, folder: Path) -> None:
    """Write a task's first held-out items (their images, labels, boxes, maps, captions) and its classes' names."""
    items = [task.reference_dataset[i] for i in range(min(ITEMS, len(task.reference)))]
    columns: dict[str, Tensor] = {}
    for name, first in items[0].items():
        if not isinstance(first, (Tensor, int)) or not all(name in item for item in items):
            continue
        values = [torch.as_tensor(item[name]) for item in items]
        if len({(value.shape, value.dtype) for value in values}) == 1:
            columns[name] = torch.stack(values)
    names = getattr(task.reference_dataset, "classes", None) or getattr(task.reference_dataset, "class_names", None)
    count = 0 if task.num_classes is None else task.num_classes - 1  # without the null class
    classes = [*map(str, list(names or ())[:count])]
    notes = {
        "captions": json.dumps(list(task.captions[: len(items)])),
        "classes": json.dumps([*classes, *map(str, range(len(classes), count))]),
    }
    save_weights(folder / FILE, columns, notes)


def kept_items(folder: Path) -> KeptItems | None:
    """What `keep_items` wrote; None in the folder of an older run.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    columns, notes = read_weights(path)
    try:
        return KeptItems(columns, json.loads(notes["captions"]), json.loads(notes["classes"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it to read the data") from None
