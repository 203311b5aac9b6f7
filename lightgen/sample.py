"""Prompts to pictures, and pictures with a hole to whole ones.

    python lightgen/sample.py --model runs/lightgen-small/model --prompt "a red star" --out star.png
    python lightgen/sample.py --model MODEL --prompt "a blue ring" --iterations 64 --head_steps 100 --sampler ancestral
    python lightgen/sample.py --model MODEL --prompt "a blue ring" --image drawing.png --mask hole.png
    python lightgen/sample.py --model MODEL --prompt "a blue ring" --image drawing.png --outpaint 8
    python lightgen/sample.py --model MODEL --prompt "a blue ring" --size 32x64

Picture i of a run depends on (--seed, i) and its prompt alone. White in --mask is drawn anew; --outpaint takes the
picture as the middle and draws so many pixels on every side. What is not given is as the model was exported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from common.cli import Parser
from common.data.lines import prompts_of
from common.errors import UserError, run_main
from common.options import Count, NotNegative, Range, Seed

if TYPE_CHECKING:
    from torch import Tensor

    from lightgen.painter import Painter


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model (RUN/model)")
    parser.add_argument("--prompt", action="append", help="what to draw; repeat it for several prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--count", type=Count, default=8, help="pictures a prompt")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels; default: the model's own")
    parser.add_argument("--iterations", type=Count, help="in which all tokens are drawn")
    parser.add_argument("--head_steps", type=Annotated[int, Range(1, 1000)], help="of the head, in the first iteration")
    parser.add_argument("--last_head_steps", type=Annotated[int, Range(1, 1000)], help="of the head, in the last one")
    parser.add_argument("--head_chain", metavar="CHAIN", help="of the head, instead: ddim25, or 10,15 for two sections")
    parser.add_argument("--sampler", choices=("ancestral", "ddim"), help="steps of the head")
    parser.add_argument("--guidance", type=Annotated[float, Range(1, 100)], help="scale against the null text")
    parser.add_argument("--guidance_schedule", choices=("constant", "linear"), help="over the iterations")
    parser.add_argument("--temperature", type=Annotated[float, Range(0, 10)], help="of the head's noise")
    parser.add_argument("--clip", type=NotNegative, help="largest absolute value of a token's estimate; 0: none")
    parser.add_argument("--image", type=Path, help="picture to fill or to extend")
    parser.add_argument("--mask", type=Path, help="white where --image is to be drawn")
    parser.add_argument("--outpaint", type=Count, help="pixels to draw around --image, on every side")
    parser.add_argument("--seed", type=Seed, default=0, help="of orders and noises")
    parser.add_argument("--device", help="cpu or cuda")
    options = parser.parse_args(argv)
    options.prompt = prompts_of(options.prompt, options.prompts, "a red star")
    if (options.image is None) != (options.mask is None and options.outpaint is None):
        raise UserError("--image goes with --mask or --outpaint, and they with it")
    if options.mask is not None and options.outpaint is not None:
        raise UserError("expected --mask or --outpaint, not both")

    import torch

    from common.images import save_grid
    from lightgen.diffusion import STEPS, respacing
    from lightgen.painter import Painter, changed_sampling

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    painter = Painter.load(options.model, device)
    if options.head_chain:
        respacing(STEPS, options.head_chain)  # refused before anything is drawn
    names = (
        *("iterations", "head_steps", "last_head_steps", "head_chain", "sampler"),
        *("guidance", "guidance_schedule", "temperature", "clip"),
    )
    painter.sampling = changed_sampling(painter.sampling, **{name: getattr(options, name) for name in names})
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    if options.image is None:
        images = painter.draw(prompts, options.seed, size=size_of(options.size))
    else:
        image, hole = holed(options, painter)
        images = painter.fill(prompts, image, hole, options.seed)
    tile = max(images.shape[-1], 128 // images.shape[-1] * images.shape[-1])
    print(save_grid(images, options.out, columns=options.count, captions=prompts, tile=tile))
    return options.out


def size_of(word: str | None) -> tuple[int, int] | None:
    """(height, width) of `32x64`.

    Raises:
        UserError: something else.
    """
    if word is None:
        return None
    height, _, width = word.partition("x")
    if not (height.isdigit() and width.isdigit() and 0 < int(height) <= 8192 and 0 < int(width) <= 8192):
        raise UserError(f"--size {word}: expected HEIGHTxWIDTH in pixels, for example 32x64")
    return int(height), int(width)


def holed(options: argparse.Namespace, painter: Painter) -> tuple[Tensor, Tensor]:
    """(uint8 picture [3, H, W], hole [H, W]) that --image, --mask and --outpaint describe.

    Raises:
        UserError: a mask of another size, or a margin that leaves nothing of the picture.
    """
    import torch

    from common.images import open_rgb, resize_uint8

    height, width = size_of(options.size) or (painter.size, painter.size)
    picture = torch.from_numpy(open_rgb(options.image).copy()).permute(2, 0, 1)
    if options.outpaint is None:
        mask = torch.from_numpy(open_rgb(options.mask).copy()).permute(2, 0, 1)
        if mask.shape != picture.shape:
            raise UserError(
                f"--mask {options.mask} has {mask.shape[2]}x{mask.shape[1]} pixels, --image {picture.shape[2]}x"
                f"{picture.shape[1]}: expected equal sizes"
            )
        hole = resize_uint8(mask[None], (height, width))[0].float().mean(0) > 127
        return resize_uint8(picture[None], (height, width))[0], hole
    margin = options.outpaint
    if 2 * margin >= min(height, width):
        raise UserError(f"--outpaint {margin}: expected less than half of {min(height, width)}, the picture's side")
    inside = resize_uint8(picture[None], (height - 2 * margin, width - 2 * margin))[0]
    # What is not known takes the nearest known pixel: the autoencoder sees no edge there.
    image = torch.nn.functional.pad(inside.float()[None], [margin] * 4, mode="replicate")[0].to(torch.uint8)
    hole = torch.ones(height, width, dtype=torch.bool)
    hole[margin : height - margin, margin : width - margin] = False
    return image, hole


if __name__ == "__main__":
    run_main(main)
