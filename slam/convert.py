"""Students and adaptors between the layouts that are in use.

    python slam/convert.py --unet slam-sd1.5 --teacher SD15_FOLDER --out slam-pipeline     # a published U-Net, complete
    python slam/convert.py --lora FILE --teacher FOLDER --out FILE2 --layout kohya         # adaptors for other programs
    python slam/convert.py --lora FILE --teacher FOLDER --out FOLDER2 --layout fused       # merged into the teacher

Adaptors are read in diffusers', peft's and kohya's layout, with their alphas; published SLAM U-Nets have diffusers'
keys and one more, time_embedding.cond_proj.weight. The sub-paths that adaptors were trained on travel with them.
"""

from __future__ import annotations

from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_main


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--unet", type=Path, help="folder of a student's U-Net (config.json and weights)")
    source.add_argument("--lora", type=Path, help="adaptors: a folder or a .safetensors file")
    parser.add_argument("--teacher", type=Path, required=True, help="pipeline folder that they were made from")
    parser.add_argument("--out", type=Path, required=True, help="folder or file to write")
    parser.add_argument(
        "--layout",
        choices=("diffusers", "kohya", "fused"),
        default="diffusers",
        help="of adaptors",
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        raise UserError(f"--out {options.out} exists; choose another name")

    from common.adaptors import adaptor_card, merge_adaptors, read_adaptors, write_with_card
    from common.files import replace_folder
    from common.teacher import Teacher
    from slam.export import CARD, load_student, paths_of, student_card, write_pipeline
    from slam.model import copy_unet

    teacher = Teacher.load(options.teacher)
    if options.unet:
        student, _ = load_student(options.unet, teacher)
        card = {"guidance_scale": 1.0, "solver_steps": student.paths.steps} | student_card(options.unet)
        replace_folder(
            options.out,
            lambda place: write_pipeline(student.unet, teacher, student.paths, place, card, student.reading),
        )
        return options.out
    unet = copy_unet(teacher, None)
    adaptors = read_adaptors(options.lora, unet)
    known = adaptor_card(options.lora, CARD)
    if options.layout == "fused":
        merge_adaptors(unet, adaptors)
        paths = paths_of(teacher.schedule, known)
        card = {"guidance_scale": 1.0, "solver_steps": paths.steps} | known
        replace_folder(options.out, lambda place: write_pipeline(unet, teacher, paths, place, card))
        return options.out
    return write_with_card(options.out, adaptors, known, CARD, options.layout)


if __name__ == "__main__":
    run_main(main)
