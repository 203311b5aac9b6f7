"""A folder of pictures to packed codes and back, and what that keeps of them.

    python instella_t2i/pack.py --model TOKENIZER --images PICTURES --out codes.safetensors
    python instella_t2i/pack.py --model TOKENIZER --codes codes.safetensors --out PICTURES2
    python instella_t2i/pack.py --model RUN8/tokenizer RUN16/tokenizer RUN32/tokenizer --images PICTURES --png sheet.png

Pictures may have any size and aspect (transparency is laid on white): each is scaled to about the area that the
tokenizer was trained on, with sides in multiples of its coarsest patch, and comes back in its own size. Every picture
takes the same number of bits, `tokens` x `bits`. PSNR, SSIM and the LPIPS form compare at the scale of the tokenizer.

The file of codes: `codes` uint8 [pictures, bytes] (bits packed, the first is the highest), `sizes` int32
[pictures, 2] (height, width), names and the tokenizer's fingerprint as notes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from instella_t2i.tokenizer import Tokenizer

BATCH = 64


def working_size(height: int, width: int, side: int, multiple: int, least: int) -> tuple[int, int]:
    """(height, width) of about `side`^2 pixels in the aspect of a picture, in multiples of `multiple`."""
    factor = side / (height * width) ** 0.5

    def fitted(length: int) -> int:
        return max(least, round(length * factor / multiple) * multiple)

    return fitted(height), fitted(width)


def least_side(tokenizer: Tokenizer) -> int:
    """The smallest side that a picture can have: stretched coordinates need two tokens."""
    return tokenizer.multiple * (1 if tokenizer.config.scale is None else 2)


def scaled(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [3, H, W] of a picture at (height, width)."""
    import numpy as np
    import torch
    from PIL import Image

    resized = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)


def grouped(tokenizer: Tokenizer, files: list[Path]) -> Iterator[tuple[list[int], torch.Tensor, list[tuple[int, int]]]]:
    """(numbers, uint8 [n, 3, H, W], own sizes) of pictures of one working size; every picture comes once.

    Raises:
        UserError: naming a picture that cannot be read.
    """
    import torch
    from PIL import Image

    from common.images import open_rgb

    waiting: dict[tuple[int, int], list[tuple[int, torch.Tensor, tuple[int, int]]]] = {}

    def batch(
        entries: list[tuple[int, torch.Tensor, tuple[int, int]]],
    ) -> tuple[list[int], torch.Tensor, list[tuple[int, int]]]:
        numbers, pixels, sizes = zip(*entries)
        return list(numbers), torch.stack(pixels), list(sizes)

    for number, path in enumerate(files):
        picture = Image.fromarray(open_rgb(path))
        own = (picture.height, picture.width)
        size = working_size(*own, tokenizer.size, tokenizer.multiple, least_side(tokenizer))
        waiting.setdefault(size, []).append((number, scaled(picture, size), own))
        if len(waiting[size]) == BATCH:
            yield batch(waiting.pop(size))
    for entries in waiting.values():
        yield batch(entries)


def pack(tokenizer: Tokenizer, folder: Path, out: Path | None) -> dict[str, float]:
    """Encode a folder; returns what the codes keep, as means over its pictures.

    Args:
        out: file of codes; None measures only.
    """
    import torch

    from common.images import image_files
    from common.weights import save_weights
    from instella_t2i.codes import fingerprint, pack_bits
    from instella_t2i.evaluate import Yardstick, reconstruct

    files = image_files(folder)
    bits = tokenizer.config.tokens * tokenizer.config.bits
    packed = torch.zeros(len(files), -(-bits // 8), dtype=torch.uint8)
    sizes = torch.zeros(len(files), 2, dtype=torch.int32)
    sums: dict[str, list[float]] = {}
    for numbers, pixels, own in grouped(tokenizer, files):
        found, codes = reconstruct(tokenizer, pixels)
        packed[numbers] = pack_bits(codes)
        sizes[numbers] = torch.tensor(own, dtype=torch.int32)
        for name, value in Yardstick(pixels, features=None).measure(found).items():
            sums.setdefault(name, []).append(value * len(numbers))
    measured = {name: sum(values) / len(files) for name, values in sums.items()}
    if out is not None:
        names = [PurePosixPath(*path.relative_to(folder).parts).as_posix() for path in files]
        notes = {"names": json.dumps(names), "tokenizer": fingerprint(tokenizer)}
        save_weights(out, {"codes": packed, "sizes": sizes}, notes)
    return {"pictures": float(len(files)), "bits": float(bits), **measured}


def unpack(tokenizer: Tokenizer, codes: Path, out: Path, size: int | None = None) -> int:
    """Decode a file of codes into a folder of PNG; returns how many pictures there are.

    Args:
        size: that the area is taken from in place of the tokenizer's own.

    Raises:
        UserError: the file is damaged, of another tokenizer, or names pictures outside of the folder.
    """
    import torch
    from PIL import Image

    from common.images import save_png, to_uint8
    from common.weights import read_weights
    from instella_t2i.codes import fingerprint, unpack_bits

    tensors, notes = read_weights(codes, "--codes")
    config = tokenizer.config
    bits = config.tokens * config.bits
    try:
        names = json.loads(notes["names"])
        packed, sizes = tensors["codes"], tensors["sizes"]
        assert packed.dtype == torch.uint8 and tuple(packed.shape) == (len(names), -(-bits // 8))
        assert tuple(sizes.shape) == (len(names), 2) and int(sizes.min()) > 0 and all(isinstance(n, str) for n in names)
    except (KeyError, ValueError, TypeError, AssertionError, RecursionError):
        raise UserError(
            f"--codes {codes}: not a file of codes of {config.tokens} tokens with {config.bits} bits"
        ) from None
    if notes.get("tokenizer") != fingerprint(tokenizer):
        raise UserError(f"--codes {codes} was made by another tokenizer than --model; only that one can read it")
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
            raise UserError(f"--codes {codes} names the picture {name!r}: expected a place inside of --out")
    for number, name in enumerate(names):
        own = (int(sizes[number, 0]), int(sizes[number, 1]))
        working = working_size(*own, size or tokenizer.size, tokenizer.multiple, least_side(tokenizer))
        code_1KD = unpack_bits(packed[number : number + 1], config.tokens, config.bits)
        pixels = to_uint8(tokenizer.decode(code_1KD, working))[0]
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        save_png(picture.resize((own[1], own[0]), Image.Resampling.BICUBIC), out / f"{name}.png")
    return len(names)


def label(tokenizer: Tokenizer) -> str:
    """ "32 tokens x 32 bits", and its kind where that is not the paper's."""
    config = tokenizer.config
    kinds = [kind for kind in (config.quantizer, config.layout) if kind not in ("binary", "line")]
    return " ".join([f"{config.tokens} tokens x {config.bits} bits", *kinds])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folder of a tokenizer; several for --png")
    parser.add_argument("--images", type=Path, help="folder of pictures to encode")
    parser.add_argument("--codes", type=Path, help="file of codes to decode")
    parser.add_argument("--out", type=Path, help="file of codes to write, or with --codes the folder of pictures")
    parser.add_argument("--png", type=Path, help="sheet of originals beside what each tokenizer keeps of them")
    parser.add_argument("--count", type=Count, default=10, help="pictures on the sheet")
    parser.add_argument("--size", type=Count, help="decode at about this many pixels squared, not the trained size")
    options = parser.parse_args(argv)
    if (options.images is None) == (options.codes is None):
        raise UserError("expected either --images, a folder to encode, or --codes, a file to decode")
    if options.codes and options.out is None:
        raise UserError("--codes needs --out, a folder for the pictures")
    if options.out and len(options.model) > 1:
        raise UserError("--out takes one --model: codes mean something to one tokenizer")
    from instella_t2i.tokenizer import load_tokenizer

    tokenizers = [load_tokenizer(folder, option="--model") for folder in options.model]
    for folder, tokenizer in zip(options.model, tokenizers):
        if not tokenizer.size:
            raise UserError(f"--model {folder}: its config.json has no size, the side of the pictures it was made for")
    if options.codes:
        count = unpack(tokenizers[0], options.codes, options.out, options.size)
        print(f"{count} pictures in {options.out}")
        return {"pictures": count}
    results = {}
    for folder, tokenizer in zip(options.model, tokenizers):
        found = pack(tokenizer, options.images, options.out)
        results[str(folder)] = found
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if name not in ("pictures", "bits"))
        print(
            f"{folder}: {found['pictures']:.0f} pictures, {found['bits']:.0f} bits each ({label(tokenizer)}), {shown}"
        )
    if options.png:
        names = [f"{label(tokenizer)}, {folder}" for folder, tokenizer in zip(options.model, tokenizers)]
        write_sheet(dict(zip(names, tokenizers)), options.images, options.png, options.count)
    return results


def write_sheet(tokenizers: dict[str, Tokenizer], folder: Path, path: Path, count: int) -> None:
    """Originals, cut to squares, above what each tokenizer keeps of them."""
    import numpy as np
    import torch
    from PIL import Image

    from common.data.folders import Framing
    from common.images import image_files, open_rgb
    from instella_t2i.evaluate import sheet

    sides = {tokenizer.size for tokenizer in tokenizers.values()}
    if len(sides) > 1:
        raise UserError(f"--png: these tokenizers see pictures of {sorted(sides)} pixels; expected one size")
    frame, rng = Framing(sides.pop()), np.random.default_rng(0)
    files = image_files(folder)
    chosen = [files[i * len(files) // min(count, len(files))] for i in range(min(count, len(files)))]
    squares = torch.stack([frame(Image.fromarray(open_rgb(file)), rng) for file in chosen])
    print(sheet(tokenizers, squares, path))


if __name__ == "__main__":
    run_main(main)
