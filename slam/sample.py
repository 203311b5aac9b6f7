"""Prompts (and pictures) to pictures in a few steps.

    python slam/sample.py --model runs/slam-small/slam/pipeline --prompt "a red star" --steps 4 --out star.png
    python slam/sample.py --model FOLDER --prompt "a blue ring" --image drawing.png --strength 0.5     # image-to-image
    python slam/sample.py --model TEACHER --lora runs/slam/slam/lora --prompt "a bell"                 # adaptors
    python slam/sample.py --model slam-sd1.5 --teacher SD15_FOLDER --prompt "a fox"                    # published U-Net

Picture i of a run depends on (--seed, i) and its prompt alone. Guidance is inside these students: there is nothing to
set, and negative prompts do nothing. One that was trained with LCM's range of guidances takes --guidance from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Portion, Seed, Whole

if TYPE_CHECKING:
    from common.teacher import Teacher
    from slam.model import Student


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a student's folder; with --lora: the teacher's")
    parser.add_argument("--lora", type=Path, help="adaptors: a folder or a .safetensors file")
    parser.add_argument("--teacher", type=Path, help="pipeline folder around a --model that is a U-Net alone")
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--negative", default="", help="refused: guidance is inside the student")
    parser.add_argument("--guidance", type=NotNegative, help="only for students trained with a range of guidances")
    parser.add_argument("--image", type=Path, help="picture to begin from")
    parser.add_argument(
        "--strength",
        type=Portion,
        default=0.5,
        help="share of the noise added to --image",
    )
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    parser.add_argument("--count", type=Count, default=8, help="pictures a prompt")
    parser.add_argument("--steps", type=Count, default=4, help="evaluations of the network, 1 to 8")
    parser.add_argument(
        "--times", type=Whole, nargs="+", help="training steps to jump from, falling, instead of --steps"
    )
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--device", help="cpu or cuda")
    options = parser.parse_args(argv)
    options.prompt = prompts_of(options.prompt, options.prompts, "a red star")
    if options.negative:
        raise UserError(
            "--negative does nothing here: the guidance against the empty prompt is inside the student's weights; "
            "leave it out, or draw with the teacher"
        )
    student, around, w = open_model(options)

    import torch

    from common.data.sampling import derive_seed
    from common.images import open_rgb, resize_clean, save_grid
    from common.metrics.measures import fixed_noise
    from slam.evaluate import few_step_source
    from slam.sampler import sample

    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    noise = fixed_noise(len(prompts), around.latent_shape, derive_seed(options.seed, 1))
    if options.image is None:
        draw = few_step_source(student, options.steps, w, options.times)
    else:
        height, width = around.image_size
        pixels = torch.from_numpy(open_rgb(options.image).copy()).permute(2, 0, 1)[None]
        unit = resize_clean(pixels, (height, width)).float() / 127.5 - 1
        start = around.encode_images(unit)

        def draw(noise_BCHW: torch.Tensor, states_BLD: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(derive_seed(options.seed, 2))
            first = start.expand_as(noise_BCHW)
            return sample(
                student,
                noise_BCHW,
                states_BLD,
                options.steps,
                start_BCHW=first,
                strength=options.strength,
                w=w,
                times=options.times,
            )

    images = around.draw(draw, prompts, noise)
    tile = max(images.shape[-1], 128 // images.shape[-1] * images.shape[-1])
    print(save_grid(images, options.out, columns=options.count, captions=prompts, tile=tile))
    return options.out


def open_model(options: argparse.Namespace) -> tuple[Student, Teacher, float | None]:
    """(student, what stands around it, w that it is told or None).

    Raises:
        UserError: a guidance that the student was not trained with.
    """
    import torch

    from common.adaptors import adaptor_card, merge_adaptors, read_adaptors, refuse_as_model
    from common.teacher import Teacher
    from slam.export import CARD, load_student, paths_of, student_card
    from slam.model import Student, copy_unet

    refuse_as_model(options.model)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.lora:
        around = Teacher.load(options.model, device)
        unet = copy_unet(around, None)
        merge_adaptors(unet, read_adaptors(options.lora, unet))
        card = adaptor_card(options.lora, CARD)
        student = Student(unet.eval().requires_grad_(False), paths_of(around.schedule, card))
    else:
        teacher = Teacher.load(options.teacher, device) if options.teacher else None
        student, around = load_student(options.model, teacher)
        card = student_card(options.model)
    trained = card.get("guidance_scale", 1.0)
    w = None
    if isinstance(trained, list):
        guidance = sum(trained) / 2 if options.guidance is None else options.guidance
        if not trained[0] <= guidance <= trained[1]:
            raise UserError(f"--guidance {guidance}: this student was trained with {trained[0]:g} to {trained[1]:g}")
        w = guidance - 1
    elif options.guidance not in (None, 1.0):
        inside = card.get("guidance_inside", "its own")
        raise UserError(
            f"--guidance {options.guidance}: guidance ({inside}) is inside this student's weights, and more would burn "
            "the picture; leave the option out"
        )
    return student.to(device), around.to(device), w


if __name__ == "__main__":
    run_main(main)
