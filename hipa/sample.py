"""Prompts (and pictures) to pictures in one step.

    python hipa/sample.py --model runs/hipa-small/hipa/pipeline --prompt "a red star" --out star.png
    python hipa/sample.py --model TEACHER --lora runs/hipa-small/hipa/lora --prompt "a bell"
    python hipa/sample.py --model EDITING --prompt "a blue ring" --image drawing.png                  # editing
    python hipa/sample.py --model PIPELINE --prompt "a ring" --image drawing.png --invert TEACHER     # from T alone
    python hipa/sample.py --model PIPELINE --prompt "a ring" --image drawing.png --mask hole.png      # inpainting
    python hipa/sample.py --model SUPERRES --prompt "a ring" --image small.png                        # super-resolution

What a folder is for stands in its card (hipa.json); --task says it for one without. A mask is white where it is to be
painted. On a base for text the drawn latents are blended into the picture's, on an inpainting base it sees them.
Picture i depends on (--seed, i) and its prompt alone. Guidance is inside these adaptors, and negative prompts do
nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Seed, device

if TYPE_CHECKING:
    from torch import Tensor

    from common.teacher import Teacher
    from hipa.config import TaskConfig
    from hipa.model import OneStep

INVERSION_STEPS = 25


def adapted(teacher: Teacher, lora: Path, time: int | None = None) -> OneStep:
    """A teacher with the adaptors of a file merged into a copy of it."""
    from common.adaptors import merge_adaptors, read_adaptors
    from hipa.model import OneStep, bare_copy

    unet = bare_copy(teacher)
    merge_adaptors(unet, read_adaptors(lora, unet))
    return OneStep(unet, teacher.schedule, time)


def parser_of() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a pipeline folder; with --lora: the teacher's")
    parser.add_argument("--lora", type=Path, help="adaptors: a folder or a .safetensors file")
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--negative", default="", help="refused: guidance is inside the adaptors")
    parser.add_argument("--guidance", type=NotNegative, help="refused but for 1: guidance is inside the adaptors")
    parser.add_argument("--image", type=Path, help="picture to begin from")
    parser.add_argument("--mask", type=Path, help="for inpainting: white where it is to be painted")
    parser.add_argument("--invert", type=Path, help="for editing from T: the frozen teacher, which finds the noise")
    parser.add_argument(
        "--task", choices=("text", "editing", "inpainting", "superres"), help="of files without a card (default: text)"
    )
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    parser.add_argument("--count", type=Count, default=8, help="pictures a prompt")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: the GPU where there is one)")
    return parser


def main(argv: list[str] | None = None) -> Path:
    options = parser_of().parse_args(argv)
    options.prompt = prompts_of(options.prompt, options.prompts, "a red star")
    if options.negative:
        raise UserError(
            "--negative does nothing here: the guidance against the empty prompt is inside the adaptors; leave it out, "
            "or draw with the teacher"
        )
    student, around, task = open_model(options)
    student = student.recorded()

    from common.data.sampling import derive_seed
    from common.images import save_grid
    from common.metrics.measures import fixed_noise

    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    noise = fixed_noise(len(prompts), around.latent_shape, derive_seed(options.seed, 1))
    start, finish = beginning(options, student, around, task, noise)
    images = around.draw(lambda x, states: finish(student(x, states)), prompts, start)
    tile = max(images.shape[-1], 128 // images.shape[-1] * images.shape[-1])
    print(save_grid(images, options.out, columns=options.count, captions=prompts, tile=tile))
    return options.out


def open_model(options: argparse.Namespace) -> tuple[OneStep, Teacher, TaskConfig]:
    """(student, what stands around it, what it is for).

    Raises:
        UserError: a guidance that the adaptors were not trained with, or a task that the files are not for.
    """
    import torch

    from common.adaptors import refuse_as_model
    from common.teacher import Teacher
    from hipa.export import read_card
    from hipa.model import OneStep
    from hipa.tasks import has_picture_input, start_time

    refuse_as_model(options.model)
    card, task = read_card(options.lora or options.model)
    if not card:
        task = replace(task, name=options.task or "text")
    if options.task not in (None, task.name):
        raise UserError(f"--task {options.task}: these files are for {task.name}")
    if options.guidance not in (None, 1.0):
        inside = card.get("guidance_inside", "its own")
        raise UserError(
            f"--guidance {options.guidance}: guidance ({inside}) is inside these adaptors, which were trained to draw "
            "with 1 alone; more would burn the picture; leave the option out"
        )
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    around = Teacher.load(options.model, place, pictures=True)
    if has_picture_input(task, around) is False and task.name == "superres":
        raise UserError(f"--model {options.model}: its U-Net takes no small picture; expected a super-resolution base")
    time = start_time(task, around.schedule)
    if options.lora:
        return adapted(around, options.lora, time), around, task
    return OneStep(around.unet, around.schedule, time), around, task


def beginning(
    options: argparse.Namespace, student: OneStep, around: Teacher, task: TaskConfig, noise: Tensor
) -> tuple[Tensor, Any]:
    """(what the one step starts from, what is done with its latents).

    Raises:
        UserError: a picture or mask that the task needs is missing, or does not fit.
    """
    import torch

    from common.images import open_rgb, resize_clean
    from common.teacher import Teacher
    from hipa.tasks import blended, has_picture_input, inverted, masked_input, noised, small_input

    unchanged = lambda latents: latents  # noqa: E731
    if options.image is None:
        if options.mask or options.invert or task.name != "text":
            raise UserError(f"--image is missing: {task.name if task.name != 'text' else 'this'} begins with a picture")
        return noise, unchanged

    def pixels(path: Path) -> Tensor:
        return torch.from_numpy(open_rgb(path).copy()).permute(2, 0, 1)[None]

    count, image = len(noise), pixels(options.image)
    if task.name == "superres":
        beside = small_input(around, image, task.scale)
        return torch.cat([noise, beside.cpu().expand(count, -1, -1, -1)], 1), unchanged
    unit = resize_clean(image, around.image_size) / 127.5 - 1
    if task.name == "editing":
        return noised(around, unit, noise.to(around.device), student.time).cpu(), unchanged
    if options.invert:
        teacher = Teacher.load(options.invert, around.device)
        return inverted(teacher, unit, teacher.null().float(), INVERSION_STEPS).cpu().expand_as(noise), unchanged
    if options.mask is None:
        raise UserError(
            "--image needs --mask (inpainting), --invert TEACHER (editing from T), or files for editing or superres"
        )
    mask = (resize_clean(pixels(options.mask), around.image_size).mean(1, keepdim=True) > 127.5).float()

    def kept(latents: Tensor) -> Tensor:
        return blended(around, latents, unit, mask)

    if task.name == "inpainting" and has_picture_input(task, around):
        return torch.cat([noise, masked_input(around, unit, mask).cpu().expand(count, -1, -1, -1)], 1), kept
    return noise, kept


if __name__ == "__main__":
    run_main(main)
