"""Pictures of a trained generator.

    python eagan/sample.py --model runs/eagan-small/model --count 64 --out samples.png
    python eagan/sample.py --model MODEL --seed 3 --folder OUT                   # each picture a file of its own
    python eagan/sample.py --model MODEL --walk 8 --out walk.png                 # rows of steps between two z

Picture i depends on (--seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Seed, Whole
from eagan.config import BatchNorm


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained pair: a run's model/")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="PNG to write")
    parser.add_argument("--folder", type=Path, help="write each picture into this folder instead")
    parser.add_argument("--count", type=Count, default=64, help="how many pictures, or rows of a walk")
    parser.add_argument("--seed", type=Seed, default=0, help="of the z")
    parser.add_argument("--walk", type=Whole, default=0, help="pictures of a row that goes from one z to another")
    parser.add_argument(
        "--batch_norm",
        choices=get_args(BatchNorm),
        default="genotype",
        help="statistics of the generator's normalisation: estimated anew, of its training (running), or of each batch",
    )
    options = parser.parse_args(argv)
    if options.walk == 1:
        raise UserError("--walk 1: expected at least 2 pictures in a row, or 0 for none")

    import torch
    from PIL import Image

    from common.data.sampling import derive_seed
    from common.images import save_grid, save_png
    from common.metrics.measures import fixed_noise
    from eagan.measuring import draw
    from eagan.retraining import load_generator

    generator, _ = load_generator(options.model)
    shape = (generator.config.latent_dim,)
    z_NZ = fixed_noise(options.count, shape, derive_seed(options.seed, 1))
    if options.walk:
        ends = fixed_noise(options.count, shape, derive_seed(options.seed, 2))
        shares = torch.linspace(0, torch.pi / 2, options.walk)  # along the sphere, so that all are as long
        z_NZ = torch.cat([torch.stack([a * s.cos() + b * s.sin() for s in shares]) for a, b in zip(z_NZ, ends)])
    images = draw(generator, z_NZ, options.batch_norm, 100)
    if options.folder is not None:
        for number, image in enumerate(images):
            save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), options.folder / f"{number:05d}.png")
        return options.folder
    columns = options.walk or max(1, round(options.count**0.5))
    save_grid(images, options.out, columns=columns, tile=max(images.shape[-1], 64))
    print(options.out)
    return options.out


if __name__ == "__main__":
    run_main(main)
