"""What a picture keeps at so many bits: tokenizers beside autoencoders, JPEG and WebP, on the same held-out pictures.

    python instella_t2i/rate.py --model RUN8/decoder RUN16/decoder RUN32/decoder GRID16/decoder
    python instella_t2i/rate.py --model TOKENIZER --autoencoder ldm/pretrained/emoji64/vae
    python instella_t2i/rate.py --data.name folder --data.path PICTURES --size 64 --output results/rate_mine.md

Autoencoders are diffusers folders (AutoencoderKL at its mean, VQModel). Numbers of a continuous latent count 16 bits
each, and 8 in a second row, where each channel is rounded to 256 steps between its extremes; an index of n entries
counts log2 n. JPEG and WebP count the mean size of their files, headers included, at several qualities. Writes a table
and, beside it, the curves.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Range
from common.paths import REPOSITORY, RESULTS

if TYPE_CHECKING:
    from torch import Tensor

    from instella_t2i.evaluate import Yardstick

QUALITIES = {"JPEG": (1, 10, 30, 60, 90), "WebP": (0, 10, 30, 60, 90)}
AUTOENCODER = REPOSITORY / "ldm" / "pretrained" / "emoji64" / "vae"


def codec(images: Tensor, name: str, quality: int) -> tuple[Tensor, float]:
    """(uint8 pictures after the codec, mean bits a picture)."""
    import numpy as np
    import torch
    from PIL import Image

    found, count = [], 0
    for pixels in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, name, quality=quality)
        count += len(file.getvalue())
        found.append(torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()))
    return torch.stack(found).permute(0, 3, 1, 2), 8 * count / len(images)


def autoencoder(folder: Path, images: Tensor) -> Iterator[tuple[str, Tensor, float]]:
    """(name, uint8 pictures, bits a picture) of a diffusers autoencoder, for each way to count.

    Raises:
        UserError: the folder holds neither kind.
    """
    import torch
    from diffusers import AutoencoderKL, VQModel

    from common.files import read_object
    from common.images import to_uint8, to_unit
    from common.pretrained import read_network

    if not (folder / "config.json").is_file():
        raise UserError(f"--autoencoder {folder}: no config.json there; expected a diffusers autoencoder")
    kind = read_object(folder / "config.json").get("_class_name")
    kinds = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
    if kind not in kinds:
        raise UserError(f"--autoencoder {folder} is a {kind}; expected AutoencoderKL or VQModel")
    network = read_network(kinds[kind], folder, torch_dtype=torch.float32).eval()

    @torch.inference_mode()
    def passed(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
        latents = [
            network.encode(to_unit(part)).latent_dist.mode()
            if kind == "AutoencoderKL"
            else network.encode(to_unit(part)).latents
            for part in images.split(32)
        ]
        z = change(torch.cat(latents))
        pictures = [to_uint8(network.decode(part).sample) for part in z.split(32)]
        return torch.cat(pictures), z[0].numel()

    name = f"{kind} {folder.parent.name}"
    if kind == "VQModel":
        found, count = passed(lambda z: z)
        cells = count // network.config.vq_embed_dim if network.config.vq_embed_dim else count
        yield name, found, cells * math.log2(network.config.num_vq_embeddings)
        return
    found, count = passed(lambda z: z)
    yield f"{name}, 16 bits", found, 16.0 * count

    def rounded(z_BCHW: Tensor) -> Tensor:
        low, high = z_BCHW.amin((0, 2, 3), keepdim=True), z_BCHW.amax((0, 2, 3), keepdim=True)
        return ((z_BCHW - low) / (high - low) * 255).round() / 255 * (high - low) + low

    found, count = passed(rounded)
    yield f"{name}, 8 bits", found, 8.0 * count


def rows_of(yardstick: Yardstick, models: Sequence[Path], autoencoders: Sequence[Path]) -> list[dict[str, Any]]:
    """{family, name, bits, psnr, ssim, lpips, rkid} of everything that is compared."""
    from instella_t2i.evaluate import reconstruct
    from instella_t2i.pack import label
    from instella_t2i.tokenizer import load_tokenizer

    images = yardstick.originals
    rows: list[dict[str, Any]] = []

    def add(family: str, name: str, found: Tensor, bits: float) -> None:
        rows.append({"family": family, "name": name, "bits": bits, **yardstick.measure(found)})

    tokenizers = [load_tokenizer(folder, option="--model") for folder in models]
    names = [label(tokenizer) for tokenizer in tokenizers]
    for folder, tokenizer, name in zip(models, tokenizers, names):
        family = "tokens in a line" if tokenizer.config.layout == "line" else "tokens in a grid"
        own = float(tokenizer.config.tokens * tokenizer.config.bits)
        told = name if names.count(name) == 1 else f"{name}, {folder.name}"
        add(family, told, reconstruct(tokenizer, images)[0], own)
    for folder in autoencoders:
        for name, found, bits in autoencoder(folder, images):
            add("autoencoders", name, found, bits)
    for family, qualities in QUALITIES.items():
        for quality in qualities:
            found, bits = codec(images, family, quality)
            add(family, f"{family} quality {quality}", found, bits)
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="folders of tokenizers")
    parser.add_argument("--autoencoder", type=Path, nargs="*", default=[AUTOENCODER], help="diffusers autoencoders")
    parser.add_argument(
        "--data.name", dest="name", choices=("emoji", "shapes", "folder"), default="emoji", help="held-out pictures"
    )
    parser.add_argument("--data.path", dest="path", help="for folder: an image folder or a table")
    parser.add_argument("--images", type=Annotated[int, Range(2)], default=512, help="held-out pictures at most")
    parser.add_argument("--size", type=Count, default=64, help="side of the pictures")
    parser.add_argument("--features", default="lite0", help="network of r-KID: lite0 or inception:FILE")
    parser.add_argument("--output", type=Path, default=RESULTS / "rate_instella_t2i.md", help="table to write")
    options = parser.parse_args(argv)
    from common.files import write_atomically
    from common.publishing import markdown_table
    from instella_t2i.config import DataConfig
    from instella_t2i.data import open_pictures
    from instella_t2i.evaluate import Yardstick
    from instella_t2i.figures import draw_rates

    data = DataConfig(options.name, options.path, size=options.size, images=2, eval_images=options.images)
    yardstick = Yardstick(open_pictures(data, "test").all(), options.features)
    rows = sorted(rows_of(yardstick, options.model, options.autoencoder), key=lambda row: row["bits"])
    keys = [key for key in ("psnr", "ssim", "lpips", "rkid") if key in rows[0]]
    cells = [
        [row["name"], f"{row['bits']:,.0f}", f"{row['bits'] / 8:,.0f}", *(f"{row[key]:.4g}" for key in keys)]
        for row in rows
    ]
    counted = f"{len(yardstick.originals)} held-out pictures ({options.name}) of {options.size} px"
    text = (
        f"{markdown_table(['', 'bits', 'bytes', *keys], cells)}\n\n{counted}; features of r-KID: {options.features}.\n"
    )
    write_atomically(options.output, lambda temporary: temporary.write_text(text))
    own = options.output.parent == RESULTS
    figures = RESULTS / "figures" / "instella_t2i" if own else options.output.parent
    draw_rates(rows, options.size, figures / "rate_distortion.png")
    print(text)
    return rows


if __name__ == "__main__":
    run_main(main)
