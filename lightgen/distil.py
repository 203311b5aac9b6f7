"""Data distillation: captions to a teacher's pictures, as an image folder that any trainer here reads (section 4.3).

    python lightgen/distil.py --teacher ldm/pretrained/shapes32-v --captions shapes --count 4000 --out runs/distilled
    python lightgen/distil.py --teacher FLUX_FOLDER --captions PROMPTS.txt --count 2000000 --size 512 --out SET
    python lightgen/distil.py --teacher renderer --captions shapes --count 4000 --size 32 --out runs/rendered
    torchrun --nproc-per-node 8 lightgen/distil.py --teacher FOLDER --captions PROMPTS.txt --count 100000 --out SET

Picture i depends on (--seed, i) and its caption alone. The set is dealt over the processes in parts of 256, which carry
checksums: started again, the program makes what is missing or damaged. provenance.json says what drew it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Range, Seed
from lightgen.config import DataConfig, LightgenConfig

if TYPE_CHECKING:
    from torch import Tensor

RENDERER = "renderer"
PART = 256  # pictures
RECORD, METADATA = "provenance.json", "metadata.jsonl"
Draw = Callable[[Sequence[int], Sequence[str]], "Tensor"]  # numbers and captions -> uint8 [B, 3, H, W]


def distil(draw: Draw, identity: dict[str, Any], captions: Sequence[str], folder: Path, progress: bool = True) -> Path:
    """Make what `folder` lacks of a set; returns it when all of it is there, in every process.

    Args:
        identity: everything that the pictures depend on, as plain values.

    Raises:
        UserError: the folder holds another set.
    """
    from common.files import locked, read_object, write_atomically, write_json
    from common.processes import process_place

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
    from common.files import file_sha256, read_object

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
    from PIL import Image

    from common.files import file_sha256, write_json
    from common.images import save_png

    images = draw(rows, [captions[i] for i in rows])
    records = []
    for row, image in zip(rows, images):
        name = f"images-{part:05d}/{row:07d}.png"
        file = save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), folder / name)
        records.append({"file_name": name, "sha256": file_sha256(file)})
    write_json(_record_of(folder, part), {"pictures": records})


def unet_teacher(teacher: Any, steps: int, guidance: float, seed: int, batch_size: int = 64) -> tuple[Draw, dict]:
    """(draw, identity) of a teacher of Stable Diffusion's kind: guided DDIM."""
    import torch

    from common.data.pairs import noise
    from common.solvers import DiffusionSource

    source = DiffusionSource(teacher, "DDIMScheduler", steps, guidance, options={"timestep_spacing": "trailing"})

    def draw(rows: Sequence[int], captions: Sequence[str]) -> Tensor:
        start = torch.stack([noise(seed, row, teacher.latent_shape).float() for row in rows])
        return teacher.draw(source, captions, start, batch_size)

    return draw, {"teacher": source.describe(), "seed": seed}


def pipeline_teacher(
    folder: Path, steps: int, guidance: float, seed: int, size: int | None, device: str
) -> tuple[Draw, dict]:
    """(draw, identity) of any other text-to-image pipeline of diffusers (Flux, Stable Diffusion 3, PixArt, ...)."""
    import numpy as np
    import torch

    from common.data.cache import fingerprint_path
    from common.data.sampling import step_generator
    from common.teacher import open_pipeline

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


def distilled(config: LightgenConfig) -> Path:
    """The set that a run's teacher draws, in the cache: runs with equal teacher, captions and seed share it."""
    from common.paths import cache_dir
    from common.teacher import Teacher
    from lightgen.data import captions_to_draw

    data = config.data
    teacher = Teacher.load(config.teacher, "cpu" if config.trainer.accelerator == "cpu" else _device())
    draw, identity = unet_teacher(teacher, data.teacher_steps, data.teacher_guidance, config.seed)
    captions = captions_to_draw(data)
    key = hashlib.sha256(json.dumps([identity, captions], sort_keys=True).encode()).hexdigest()[:16]
    return distil(draw, identity, captions, cache_dir("lightgen", "distilled", key), config.trainer.progress)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--teacher", required=True, help=f"a diffusers text-to-image directory, or {RENDERER}")
    parser.add_argument("--captions", required=True, help="shapes, emoji, or a file with one prompt a line or a table")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--count", type=Count, default=4000, help="pictures; captions are repeated where they are fewer"
    )
    parser.add_argument("--steps", type=Count, default=10, help="sampling steps of the teacher")
    parser.add_argument("--guidance", type=Annotated[float, Range(1, 100)], default=2.0, help="the teacher's scale")
    parser.add_argument("--size", type=Count, help="side in pixels; default: the teacher's own")
    parser.add_argument("--world", choices=("full", "small"), default="full", help="of captions shapes")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--device", help="cpu or cuda")
    options = parser.parse_args(argv)

    from common.files import read_object
    from common.teacher import Teacher
    from lightgen.data import captions_to_draw, scenes

    data = DataConfig(captions=options.captions, world=options.world, images=options.count)
    captions = captions_to_draw(data)
    if options.teacher == RENDERER:
        if options.captions != "shapes":
            raise UserError(f"--teacher {RENDERER} draws --captions shapes only")
        size = options.size or 32
        rendered = scenes("train", options.count, size, options.world)
        identity: dict[str, Any] = {"teacher": RENDERER, "size": size, "world": options.world}
        print(distil(lambda rows, _: rendered.images(list(rows)), identity, captions, options.out))
        return options.out
    folder, device = Path(options.teacher), options.device or _device()
    index = read_object(folder / "model_index.json", f"--teacher {folder} is not a diffusers directory")
    if index.get("_class_name") == "StableDiffusionPipeline" and options.size is None:
        teacher = Teacher.load(folder, device)
        draw, identity = unet_teacher(teacher, options.steps, options.guidance, options.seed)
    else:
        draw, identity = pipeline_teacher(folder, options.steps, options.guidance, options.seed, options.size, device)
    print(distil(draw, identity, captions, options.out))
    return options.out


if __name__ == "__main__":
    run_main(main)
