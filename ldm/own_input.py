"""A task's condition from the user's own pictures or words, for `sample.py`.

    class      --label cat                          a class by its name or number
    layout     --layout "red circle 0.1 0.1 0.5 0.6; blue ring 0.5 0.4 0.9 0.8"     names and corners x0 y0 x1 y1
               --layout layouts.jsonl               a line {"labels": ["red circle"], "boxes": [[0.1, 0.1, 0.5, 0.6]]}
    semantic   --mask labels.png                    a label number a pixel, 0 for the background
    superres   --image small.png                    comes back larger by the factor of the run
    inpaint    --image photo.png --mask hole.png    white where it is to be painted

A folder in place of a file gives all of its pictures; masks are found by the pictures' names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.data.lines import read_json_lines
from common.data.photos import CATEGORIES
from common.data.shapes import COLOURS, SHAPES
from common.errors import UserError
from common.images import MAX_PIXELS, image_files, open_rgb, resize_uint8
from ldm.tasks import NO_OBJECT, layout_columns

if TYPE_CHECKING:
    from ldm.run import Run

# Options of `sample.py` that a task's condition is made of.
OPTIONS = {
    "unconditional": (),
    "class": ("label",),
    "text": ("prompt", "prompts"),
    "layout": ("layout",),
    "semantic": ("mask",),
    "superres": ("image",),
    "inpaint": ("image", "mask"),
}
Sides = tuple[int, int]


@dataclass
class OwnInput:
    """One condition: the columns of one row [1, ...], what it is called, and the size of its picture in pixels."""

    name: str
    columns: dict[str, Tensor]
    side: Sides


def refuse_other_options(options: argparse.Namespace, task: str, model: Path) -> None:
    """Raise UserError where an option is given that the task does not take."""
    every = {name for names in OPTIONS.values() for name in names}
    for name in sorted(every - set(OPTIONS[task])):
        if getattr(options, name):
            takes = " and ".join(f"--{other}" for other in OPTIONS[task]) or "no condition"
            raise UserError(f"--{name}: {model} was trained for task {task}, which takes {takes}")


def own_inputs(options: argparse.Namespace, run: Run, size: Sides | None, multiple: int) -> list[OwnInput]:
    """What the options describe; empty where they describe nothing.

    Args:
        size: of the pictures, (height, width) in pixels; None takes the run's, in super-resolution each picture's.
        multiple: of which both sides must be.

    Raises:
        UserError: a file or word that the task cannot use.
    """
    task, side = run.config.task, size or (run.config.data.size, run.config.data.size)
    if task == "class":
        return [OwnInput(name, {"label": _label(name, run)}, side) for name in options.label or ()]
    if task == "layout":
        return [OwnInput(name, columns, side) for word in options.layout or () for name, columns in _layouts(word, run)]
    if task == "semantic":
        paths = _pictures(options.mask, "--mask")
        return [OwnInput(path.stem, {"label_map": _label_map(path, run, side)}, side) for path in paths]
    if task == "superres":
        return [_enlarged(path, run, size, multiple) for path in _pictures(options.image, "--image")]
    if task == "inpaint" and (options.image or options.mask):
        if not (options.image and options.mask):
            raise UserError("inpainting needs --image and --mask")
        pairs = [(path, _mask_of(path, options.mask)) for path in _pictures(options.image, "--image")]
        return [OwnInput(path.stem, _holed(path, mask, side), side) for path, mask in pairs]
    return []


def _pictures(path: Path | None, option: str) -> list[Path]:
    if path is None:
        return []
    if not path.exists():
        raise UserError(f"{option} {path}: no such file or folder")
    return image_files(path) if path.is_dir() else [path]


def _mask_of(picture: Path, masks: Path) -> Path:
    if not masks.is_dir():
        return _pictures(masks, "--mask")[0]
    found = [path for path in image_files(masks) if path.stem == picture.stem]
    if not found:
        raise UserError(f"--mask {masks}: it has no mask named {picture.stem}, for {picture}")
    return found[0]


def _read(path: Path) -> Tensor:
    """uint8 [1, 3, H, W]."""
    return torch.from_numpy(open_rgb(path).copy()).permute(2, 0, 1)[None]


def _covering(image_1CHW: Tensor, side: Sides) -> Tensor:
    """The middle of a picture scaled to cover `side`, as the pictures of the training were cut."""
    height, width = image_1CHW.shape[-2:]
    scale = max(side[0] / height, side[1] / width)
    scaled = max(side[0], round(height * scale)), max(side[1], round(width * scale))
    resized = resize_uint8(image_1CHW, scaled)
    top, left = (scaled[0] - side[0]) // 2, (scaled[1] - side[1]) // 2
    return resized[..., top : top + side[0], left : left + side[1]]


def _holed(picture: Path, mask: Path, side: Sides) -> dict[str, Tensor]:
    image, hole = _read(picture), _read(mask)
    if image.shape != hole.shape:
        raise UserError(
            f"--mask {mask} has {hole.shape[3]}x{hole.shape[2]} pixels, {picture} {image.shape[3]}x{image.shape[2]}: "
            "expected equal sizes"
        )
    bright = _covering(hole, side).float().mean(1, keepdim=True) > 127
    if not bright.any():
        raise UserError(f"--mask {mask}: nothing in it is white, so nothing is to be painted")
    return {"image": _covering(image, side), "hole": bright.float()}


def _enlarged(path: Path, run: Run, size: Sides | None, multiple: int) -> OwnInput:
    low, factor = _read(path), run.config.conditioner.scale
    if size is not None:
        low = _covering(low, (max(1, size[0] // factor), max(1, size[1] // factor)))
    height, width = (side * factor // multiple * multiple for side in low.shape[-2:])
    if not height or not width:
        raise UserError(
            f"{path}: {low.shape[3]}x{low.shape[2]} pixels are too few; enlarged {factor} times both sides must have "
            f"{multiple} at least"
        )
    rows, columns = height // factor, width // factor
    top, left = (low.shape[-2] - rows) // 2, (low.shape[-1] - columns) // 2
    low = low[..., top : top + rows, left : left + columns]
    f = run.latent_factor
    return OwnInput(path.stem, {"low": F.interpolate(low, (height // f, width // f), mode="nearest")}, (height, width))


def _label_map(path: Path, run: Run, side: Sides) -> Tensor:
    """uint8 [1, H, W] of a picture with a number or a colour of its palette a pixel."""
    try:
        with Image.open(path) as file:
            mode, pixels = file.mode, file.width * file.height
            if mode in ("P", "L", "1", "I", "I;16") and pixels <= MAX_PIXELS:
                numbers = np.array(file).astype(np.int64)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--mask {path}: cannot be read as a picture ({error})") from None
    if mode not in ("P", "L", "1", "I", "I;16") or pixels > MAX_PIXELS:
        raise UserError(f"--mask {path}: it has the mode {mode}; expected one label number a pixel (grey or palette)")
    names = ("background", *(SHAPES if run.config.data.name == "shapes" else CATEGORIES))
    wrong = np.argwhere((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        y, x = wrong[0]
        known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
        raise UserError(f"--mask {path}: the label {numbers[y, x]} at ({x}, {y}) is unknown; expected {known}")
    small = F.interpolate(torch.from_numpy(numbers).float()[None, None], side, mode="nearest-exact")
    return small[0].to(torch.uint8)


def class_names(run: Run) -> list[str]:
    """Of a run of task class; numbers where its data name none."""
    count = (run.task.num_classes or 1) - 1  # without the null class
    names = [str(name) for name in run.task.classes][:count]
    return [*names, *map(str, range(len(names), count))]


def _label(word: str, run: Run) -> Tensor:
    names = class_names(run)
    if word in names:
        return torch.tensor([names.index(word)])
    if word.isdecimal() and int(word) < len(names):
        return torch.tensor([int(word)])
    listed = ", ".join(names[:12]) + (", ..." if names[12:] else "")
    raise UserError(
        f"--label {word}: not a class of this run; expected one of {listed}, or a number below {len(names)}"
    )


def object_names(run: Run) -> dict[str, tuple[int, int]]:
    """(class, colour) of everything that a layout may name; colour -1 where there is none."""
    if run.config.data.name == "shapes":
        pairs = [(shape, colour) for shape in range(len(SHAPES)) for colour in range(len(COLOURS))]
        return {f"{COLOURS[colour]} {SHAPES[shape]}": (shape, colour) for shape, colour in pairs}
    return {name: (number, -1) for number, name in enumerate(CATEGORIES)}


def _layouts(word: str, run: Run) -> list[tuple[str, dict[str, Tensor]]]:
    """(name, columns) of the layouts in a .jsonl file, or of the one that is written out."""
    if word.endswith(".jsonl"):
        found = []
        for number, (where, row) in enumerate(read_json_lines(word), 1):
            labels, boxes = row.get("labels"), row.get("boxes")
            if not (isinstance(labels, list) and isinstance(boxes, list) and len(labels) == len(boxes)):
                raise UserError(f'{where}: expected "labels" and "boxes", lists of one length')
            found.append((f"{Path(word).stem}-{number}", _boxes(labels, boxes, where, run)))
        return found
    labels, boxes = [], []
    for entry in word.split(";"):
        words = entry.split()
        if words:
            labels.append(" ".join(words[:-4]))
            boxes.append(words[-4:])
    return [("layout", _boxes(labels, boxes, f"--layout {word!r}", run))]


def _boxes(labels: Sequence[Any], boxes: Sequence[Any], where: str, run: Run) -> dict[str, Tensor]:
    names, most = object_names(run), run.task.reference.columns["boxes"].shape[1]
    if not 1 <= len(labels) <= most:
        raise UserError(f"{where}: {len(labels)} objects; expected 1 to {most}")
    item = {"boxes": torch.zeros(most, 4)}
    item |= {name: torch.full((most,), NO_OBJECT) for name in ("classes", "colours")}
    for place, (label, box) in enumerate(zip(labels, boxes)):
        if label not in names:
            listed = ", ".join(list(names)[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(f"{where}: {label!r} is no object of this run; expected one of {listed}")
        try:
            x0, y0, x1, y1 = (float(value) for value in box)
        except (TypeError, ValueError):
            raise UserError(f"{where}: the box of {label} is {box}; expected x0 y0 x1 y1") from None
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise UserError(f"{where}: the box of {label} is {box}; expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")
        item["boxes"][place] = torch.tensor([x0, y0, x1, y1])
        item["classes"][place], item["colours"][place] = names[label]
    if run.config.data.name != "shapes":
        item["categories"] = item.pop("classes")
        del item["colours"]
    return {name: column[None] for name, column in layout_columns(item).items()}
