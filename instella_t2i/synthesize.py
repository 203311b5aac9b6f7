"""Draw the pictures of the second data stage: one a prompt, by any diffusers text-to-image folder at its defaults.

    python instella_t2i/synthesize.py --teacher FLUX_FOLDER --prompts prompts.txt --out synthetic/flux
    python instella_t2i/synthesize.py --teacher ldm/pretrained/shapes32-v --count 500 --out synthetic/shapes
    torchrun --nproc-per-node 8 instella_t2i/synthesize.py --teacher SD35 --prompts prompts.txt --out synthetic/sd35

Processes deal the prompts out among themselves. Picture i depends on (--seed, i) and its prompt alone; what is there
already is kept, so that an interrupted start goes on. The folder is what `--codes.synthetic` takes, and any program
that reads an image folder: PNG files and metadata.jsonl. The paper's sources are FLUX.1-schnell, SD3.5-Large-Turbo,
SD3.5-Medium and PixArt-Sigma, one picture of each for every prompt of DiffusionDB: run it once for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Seed

LIST, ABOUT = "metadata.jsonl", "synthetic.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of a diffusers text-to-image pipeline")
    parser.add_argument(
        "--prompts", default="shapes", help="text file, one a line; or shapes, emoji: training captions"
    )
    parser.add_argument("--count", type=Count, help="prompts that are taken; default: all of a file, 1000 else")
    parser.add_argument("--out", type=Path, required=True, help="image folder to write")
    parser.add_argument("--steps", type=Count, help="of the sampler; default: the pipeline's own")
    parser.add_argument("--batch_size", type=Count, default=8, help="pictures at once")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one, each process its own")
    options = parser.parse_args(argv)

    import os

    import torch

    from common.data.cache import MODEL, fingerprint_path
    from common.data.pairs import prompt_list
    from common.processes import process_place

    if not (options.teacher / "model_index.json").is_file():
        raise UserError(
            f"--teacher {options.teacher}: no model_index.json; expected the folder of a diffusers pipeline"
        )
    prompts = prompt_list(options.prompts, options.count or 1000)
    prompts = prompts[: options.count] if options.count else prompts
    about = {
        "teacher": fingerprint_path(options.teacher, MODEL),
        "seed": options.seed,
        "steps": options.steps,
    }
    check_folder(options.out, about, prompts)
    rank, ranks = process_place()
    gpu = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    device = options.device or (gpu if torch.cuda.is_available() else "cpu")
    todo = [i for i in range(rank, len(prompts), ranks) if not (options.out / name_of(i)).is_file()]
    if todo:
        draw_missing(options.teacher, prompts, todo, options.out, device, options)
    if rank == 0:
        print(f"{options.out}: {len(prompts)} prompts, {len(todo)} pictures drawn by this process of {ranks}")
    return len(todo)


def name_of(number: int) -> str:
    return f"{number // 10_000:04d}/{number:08d}.png"


def check_folder(out: Path, about: dict[str, Any], prompts: Sequence[str]) -> None:
    """Begin the folder, or see that it was begun with the same teacher, seed and prompts.

    Raises:
        UserError: it was begun with others.
    """
    from common.files import locked, read_object, write_atomically, write_json

    lines = "".join(json.dumps({"file_name": name_of(i), "text": prompt}) + "\n" for i, prompt in enumerate(prompts))
    with locked(out / ABOUT):
        if (out / ABOUT).is_file():
            there = read_object(out / ABOUT)
            others = [key for key, value in about.items() if there.get(key) != value]
            same = (out / LIST).is_file() and (out / LIST).read_text(encoding="utf-8") == lines
            others += [] if same else ["list of prompts"]
            if others:
                raise UserError(f"--out {out} was begun with another {', '.join(others)}; choose another folder")
            return
        write_atomically(out / LIST, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        write_json(out / ABOUT, about)


def draw_missing(teacher: Path, prompts: Sequence[str], todo: list[int], out: Path, device: str, options: Any) -> None:
    """Draw and write the pictures of these numbers."""
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image

    from common.data.sampling import step_generator
    from common.errors import first_line
    from common.images import save_png
    from common.pretrained import from_folder, quiet_libraries

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        pipeline = from_folder(DiffusionPipeline, teacher, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"--teacher {teacher}: no pipeline that diffusers can read ({first_line(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    more = {"num_inference_steps": options.steps} if options.steps else {}
    for first in range(0, len(todo), options.batch_size):
        rows = todo[first : first + options.batch_size]
        noises = [step_generator(options.seed, i) for i in rows]  # on the CPU: the same on every device
        with quiet_libraries():
            pictures = pipeline([prompts[i] for i in rows], generator=noises, output_type="np", **more).images
        for i, picture in zip(rows, pictures):
            if not np.isfinite(picture).all():
                raise UserError(f"--teacher {teacher}: its picture of {prompts[i]!r} has numbers that are not finite")
            save_png(Image.fromarray((picture * 255).round().astype(np.uint8)), out / name_of(i))


if __name__ == "__main__":
    run_main(main)
