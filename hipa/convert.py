"""Adaptors between the layouts that are in use, merged into their teacher, and taken out again.

    python hipa/convert.py --lora FILE --teacher FOLDER --out FILE2.safetensors --layout kohya   # for other programs
    python hipa/convert.py --lora FILE --teacher FOLDER --out FOLDER2 --layout fused       # merged into the teacher
    python hipa/convert.py --lora FILE --teacher FOLDER2 --out FOLDER3 --layout unfused    # the teacher again

Adaptors are read in diffusers', peft's and kohya's layout, with their alphas, and written with a strength that every
reader understands (common/adaptors.py). What they are for travels in the file's header.
"""

from __future__ import annotations

from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_main


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--lora", type=Path, required=True, help="adaptors: a folder or a .safetensors file")
    parser.add_argument("--teacher", type=Path, required=True, help="pipeline folder that they were made for")
    parser.add_argument("--out", type=Path, required=True, help="folder or file to write")
    parser.add_argument(
        "--layout", choices=("diffusers", "kohya", "fused", "unfused"), default="diffusers", help="what is written"
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")

    from common.adaptors import merge_adaptors, read_adaptors, write_with_card
    from common.teacher import Teacher
    from hipa.export import CARD, card_of, one_step_scheduler, read_card, write_pipeline
    from hipa.model import bare_copy

    teacher = Teacher.load(options.teacher, pictures=True)
    unet = bare_copy(teacher)
    adaptors = read_adaptors(options.lora, unet)
    card, task = read_card(options.lora)
    if options.layout in ("diffusers", "kohya"):
        return write_with_card(options.out, adaptors, card, CARD, options.layout)
    fuse = options.layout == "fused"
    merge_adaptors(unet, adaptors, 1.0 if fuse else -1.0)
    known = card_of(teacher, task, 1.0, teacher.schedule.steps - 1) | card
    scheduler = one_step_scheduler(teacher.schedule) if fuse else teacher.scheduler_config
    return write_pipeline(unet, teacher, options.out, task, scheduler, known if fuse else {})


if __name__ == "__main__":
    run_main(main)
