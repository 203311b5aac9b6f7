"""Data distillation: captions to a teacher's pictures, as an image folder that any trainer here reads (section 4.3).

    python lightgen/distil.py --teacher ldm/pretrained/shapes32-v --captions shapes --count 4000 --out runs/distilled
    python lightgen/distil.py --teacher FLUX_FOLDER --captions PROMPTS.txt --count 2000000 --size 512 --out SET
    python lightgen/distil.py --teacher renderer --captions shapes --count 4000 --size 32 --out runs/rendered
    torchrun --nproc-per-node 8 lightgen/distil.py --teacher FOLDER --captions PROMPTS.txt --count 100000 --out SET

Picture i depends on (--seed, i) and its caption alone. The set is dealt over the processes in parts of 256, which carry
checksums: started again, the program makes what is missing or damaged. provenance.json says what drew it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Range, Seed
from lightgen.config import DataConfig

RENDERER = "renderer"


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--teacher", required=True, help=f"a diffusers text-to-image directory, or {RENDERER}")
    parser.add_argument("--captions", required=True, help="shapes, emoji, or a file with one prompt a line or a table")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--count", type=Count, default=4000, help="pictures to draw; captions are repeated where they are fewer"
    )
    parser.add_argument("--steps", type=Count, default=10, help="sampling steps of the teacher")
    parser.add_argument("--guidance", type=Annotated[float, Range(1, 100)], default=2.0, help="the teacher's scale")
    parser.add_argument("--size", type=Count, help="side in pixels; default: the teacher's own")
    parser.add_argument("--world", choices=("full", "small"), default="full", help="of captions shapes")
    parser.add_argument("--seed", type=Seed, default=0, help="of the noises")
    parser.add_argument("--device", help="cpu or cuda")
    options = parser.parse_args(argv)

    import torch

    from common.files import read_object
    from common.teacher import Teacher
    from lightgen.data import captions_to_draw, scenes
    from lightgen.synthesis import distil, pipeline_teacher, unet_teacher

    if options.teacher == RENDERER and options.captions != "shapes":
        raise UserError(f"--teacher {RENDERER} draws --captions shapes only")
    data = DataConfig(captions=options.captions, world=options.world, images=options.count)
    captions = captions_to_draw(data)
    if options.teacher == RENDERER:
        size = options.size or 32
        rendered = scenes("train", options.count, size, options.world)
        identity: dict[str, Any] = {"teacher": RENDERER, "size": size, "world": options.world}
        print(distil(lambda rows, _: rendered.images(list(rows)), identity, captions, options.out))
        return options.out
    folder, device = Path(options.teacher), options.device or ("cuda" if torch.cuda.is_available() else "cpu")
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
