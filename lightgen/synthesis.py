"""A synthetic set: a teacher's pictures of captions, as an image folder in parts that carry checksums (section 4.3).

Shape suffixes: B batch, H, W sides.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.cache import fingerprint_path
from common.data.pairs import noise
from common.data.sampling import step_generator
from common.errors import UserError
from common.files import file_sha256, locked, read_object, write_atomically, write_json
from common.images import save_png
from common.processes import process_place
from common.solvers import DiffusionSource
from common.teacher import Teacher, open_pipeline

PART = 256  # pictures
RECORD, METADATA = "provenance.json", "metadata.jsonl"
Draw = Callable[[Sequence[int], Sequence[str]], Tensor]  # numbers and captions -> uint8 [B, 3, H, W]


def distil(draw: Draw, identity: dict[str, Any], captions: Sequence[str], folder: Path, progress: bool = True) -> Path:
    """Make what `folder` lacks of a set; returns it when all of it is there, in every process.

    Args:
        identity: everything that the pictures depend on, as plain values.

    Raises:
        UserError: the folder holds another set.
    """
    text = "\n".join(captions)
    about = {**identity, "count": len(captions), "captions_sha256": hashlib.sha256(text.encode()).hexdigest()}
    about = json.loads(json.dumps(about))
    with locked(folder / RECORD):
        if not (folder / RECORD).is_file():
            if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
                raise UserError(f"{folder} holds other files; choose another folder")
            write_json(folder / RECORD, about)
    found = read_object(folder / RECORD)
    if found != about:
        changed = [key for key in about if found.get(key) != about[key]]
        raise UserError(f"{folder} holds another set ({', '.join(changed)} differ): choose another folder")
    rank, world = process_place()
    parts = range(-(-len(captions) // PART))
    for part in parts[rank::world]:
        if _whole(folder, part) is None:
            started = time.perf_counter()
            rows = range(part * PART, min(len(captions), (part + 1) * PART))
            _make(draw, folder, part, rows, captions)
            if progress:
                rate = len(rows) / (time.perf_counter() - started)
                print(f"distil: {rows.stop} of {len(captions)} pictures, {rate:.1f} a second", flush=True)
    while any(_whole(folder, part, quick=True) is None for part in parts):
        time.sleep(1)  # other processes are still at theirs
    if rank == 0 and not (folder / METADATA).is_file():
        records = [record for part in parts for record in _whole(folder, part, quick=True) or ()]
        lines = [{"file_name": r["file_name"], "text": captions[i]} for i, r in enumerate(records)]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(folder / METADATA, lambda temporary: temporary.write_text(content, encoding="utf-8"))
    while not (folder / METADATA).is_file():
        time.sleep(0.2)
    return folder


def _record_of(folder: Path, part: int) -> Path:
    return folder / ".parts" / f"{part:05d}.json"


def _whole(folder: Path, part: int, quick: bool = False) -> list[dict[str, str]] | None:
    """The records of a finished part, None where it has to be made; `quick` looks at no picture."""
    path = _record_of(folder, part)
    if not path.is_file():
        return None
    try:
        records = read_object(path, kinds={"pictures": list})["pictures"]
        if not quick:
            for record in records:
                file = folder / record["file_name"]
                if not file.is_file() or file_sha256(file) != record["sha256"]:
                    return None
    except (UserError, KeyError, TypeError):
        return None
    return list(records)


def _make(draw: Draw, folder: Path, part: int, rows: Sequence[int], captions: Sequence[str]) -> None:
    images = draw(rows, [captions[i] for i in rows])
    records = []
    for row, image in zip(rows, images):
        name = f"images-{part:05d}/{row:07d}.png"
        file = save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / name)
        records.append({"file_name": name, "sha256": file_sha256(file)})
    write_json(_record_of(folder, part), {"pictures": records})


def unet_teacher(
    teacher: Teacher, steps: int, guidance: float, seed: int, batch_size: int = 64
) -> tuple[Draw, dict[str, Any]]:
    """(draw, identity) of a teacher of Stable Diffusion's kind: guided DDIM."""
    source = DiffusionSource(teacher, "DDIMScheduler", steps, guidance, options={"timestep_spacing": "trailing"})

    def draw(rows: Sequence[int], captions: Sequence[str]) -> Tensor:
        start = torch.stack([noise(seed, row, teacher.latent_shape).float() for row in rows])
        return teacher.draw(source, captions, start, batch_size)

    return draw, {"teacher": source.describe(), "seed": seed}


def pipeline_teacher(
    folder: Path, steps: int, guidance: float, seed: int, size: int | None, device: str
) -> tuple[Draw, dict[str, Any]]:
    """(draw, identity) of any other text-to-image pipeline of diffusers (Flux, Stable Diffusion 3, PixArt, ...)."""
    pipeline = open_pipeline(folder, device)
    sides = {} if size is None else {"height": size, "width": size}

    def draw(rows: Sequence[int], captions: Sequence[str]) -> Tensor:
        found = []
        for row, caption in zip(rows, captions):
            drawn = pipeline(
                caption,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=step_generator(seed, row),
                output_type="np",
                **sides,
            ).images[0]
            found.append(torch.from_numpy(np.asarray(drawn)).mul(255).round().to(torch.uint8).permute(2, 0, 1))
        return torch.stack(found)

    about = {"folder": fingerprint_path(folder), "steps": steps, "guidance": guidance, "size": size}
    return draw, {"teacher": about, "seed": seed}
