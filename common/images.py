"""Images as uint8 [N,3,H,W]: conversion, reading folders, the anti-aliased "clean" resize, captioned PNG grids."""

from __future__ import annotations

import contextlib
import io
import math
import os
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError, first_line
from common.files import list_files

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm"),
)
# Pictures that Pillow alone cannot open: passed over, but a folder of them is not empty.
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw")
WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000  # a file that unpacks to more is refused as a decompression bomb, not decoded
LARGE_PIXELS = 16_000_000  # of pictures with more, one is open at a time
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow would warn from 89 million on


def as_uint8(images: Tensor | np.ndarray) -> Tensor:
    """Any image batch as uint8 [N,3,H,W].

    Accepts uint8 or float in [0,1], [N,C,H,W] or [N,H,W,C] with C of 1 or 3, or grey [N,H,W]. Floats are clamped and
    rounded. Raises UserError for another shape, or for floats outside [-0.01, 1.01] ([-1,1] is the usual mistake).
    """
    batch = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if batch.ndim == 3:
        batch = batch.unsqueeze(1)
    if batch.ndim == 4 and batch.shape[1] not in (1, 3) and batch.shape[3] in (1, 3):
        batch = batch.permute(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] not in (1, 3):
        raise UserError(f"images have shape {tuple(images.shape)}: expected [N,3,H,W] or [N,H,W,3]")
    if batch.is_floating_point():
        if batch.numel() and (batch.min() < -0.01 or batch.max() > 1.01):
            raise UserError(
                f"float images span [{batch.min().item():.3g}, {batch.max().item():.3g}]: expected [0,1]; "
                "map [-1,1] with x * 0.5 + 0.5 first"
            )
        batch = batch.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    elif batch.dtype != torch.uint8:
        raise UserError(f"images have dtype {batch.dtype}: expected uint8 or float in [0,1]")
    return batch.expand(-1, 3, -1, -1).contiguous()


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Float images in [-1, 1] as uint8, rounded and clamped."""
    return x.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def resize_clean(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Anti-aliased bicubic resize without quantisation: float32 [N,3,h,w] in [0,255] from uint8 [N,3,H,W].

    The rule of Parmar et al. 2022 ("On Aliased Resizing", clean-fid mode "clean"): Pillow's bicubic in float, clipped.
    """
    height, width = (size, size) if isinstance(size, int) else size
    x_BCHW = images.float()
    if x_BCHW.shape[-2:] == (height, width):
        return x_BCHW
    return F.interpolate(x_BCHW, (height, width), mode="bicubic", antialias=True).clamp_(0, 255)


def resize_uint8(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """`resize_clean`, rounded back to uint8 [N,3,h,w]."""
    return resize_clean(images, size).round_().to(torch.uint8)


class CorruptImage(Exception):
    """One picture that cannot be decoded, or a row that is none; data sets count it and go on."""


@contextlib.contextmanager
def decoded(
    source: Path | bytes, background: tuple[int, int, int] = WHITE, side: int | None = None
) -> Iterator[Image.Image]:
    """One picture as 8-bit RGB: EXIF orientation applied, alpha laid on `background`, 16 bits scaled to 8.

    This is the only decoder of the repository. Pictures above LARGE_PIXELS are open one at a time in a process, until
    the block ends, so that many threads need no more memory than one (at most about 8 bytes a pixel).

    Args:
        side: what the picture will be scaled down to, where that is known: of a large JPEG file a smaller form is
            decoded, with at least four times this on its shorter side.

    Raises:
        CorruptImage: no image, truncated, or more than MAX_PIXELS pixels. The message says which without the name.
    """
    with contextlib.ExitStack() as stack:
        with _as_corrupt():
            file = stack.enter_context(_opened(source))
            if file.width * file.height > MAX_PIXELS:
                raise CorruptImage(f"{file.width} x {file.height} pixels, the limit is {MAX_PIXELS:,}")
            if file.width * file.height > LARGE_PIXELS:
                stack.enter_context(_one_large_picture)
                if side is not None:
                    file.draft("RGB", (4 * side, 4 * side))
            file.load()
            turn = _TURNS.get(_orientation(file))
            picture = _to_rgb(file, background)
            if turn is not None:
                picture = picture.transpose(turn)
        yield picture


def decode(source: Path | bytes, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """`decoded` for a picture that is kept; raises CorruptImage."""
    with decoded(source, background) as picture:
        return picture


def picture_size(source: Path | bytes) -> tuple[int, int]:
    """(height, width) of a picture as `decode` will give it, from its header alone; raises CorruptImage."""
    with _as_corrupt(), _opened(source) as file:
        turned = file.format != "TIFF" and _orientation(file) >= 5  # lying on its side; Pillow turns TIFF by itself
        return (file.width, file.height) if turned else (file.height, file.width)


def open_rgb(path: str | Path | bytes) -> np.ndarray:
    """`decode` of one picture, as uint8 [H,W,3]. Raises UserError naming an unreadable file."""
    try:
        return np.asarray(decode(Path(path) if isinstance(path, str) else path))
    except CorruptImage as error:
        name = "a picture of the table" if isinstance(path, bytes) else path
        raise UserError(f"{name}: not a readable image ({error}); replace or remove the file") from error


_one_large_picture = threading.Lock()
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def _as_corrupt() -> Iterator[None]:
    try:
        yield
    except CorruptImage:
        raise
    except FileNotFoundError as error:
        raise CorruptImage("the file is missing") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise CorruptImage(first_line(error)) from error


def _opened(source: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _orientation(file: Image.Image) -> int:
    """1 to 8 as in EXIF; 1 (upright) where there is none or it cannot be read, which is no fault of the pixels."""
    try:
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if value in _TURNS else 1


def _to_rgb(file: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A loaded picture in RGB, in strips, so that no step needs a second whole copy in a wider form."""
    if file.mode == "RGB" and not file.has_transparency_data:
        return file
    if file.width * file.height <= LARGE_PIXELS:
        return _strip_to_rgb(file, background)
    whole = Image.new("RGB", file.size)
    for top in range(0, file.height, 256):
        strip = file.crop((0, top, file.width, min(top + 256, file.height)))
        strip.info = file.info  # the transparent colour
        whole.paste(_strip_to_rgb(strip, background), (0, top))
    file.close()
    return whole


def _strip_to_rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture).astype(np.float64))
        # 16-bit greys arrive as I;16 or I; float images are taken to be in [0, 1].
        scale = 255.0 if picture.mode == "F" else 255.0 / 65535.0
        return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return picture.convert("RGB")


def image_files(folder: str | Path) -> list[Path]:
    """Every image file below a folder, sorted by path. Raises UserError when the folder is missing or has none."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a folder of images")
    files = [path for path in list_files(root) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{root}: holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


def folder_batches(files: Sequence[Path | bytes], batch_size: int = 64) -> Iterator[tuple[list[int], Tensor]]:
    """(indices into `files`, uint8 [N,3,H,W]) batches of equally sized images; every file appears exactly once."""
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}

    def batch(items: list[tuple[int, np.ndarray]]) -> tuple[list[int], Tensor]:
        return [index for index, _ in items], as_uint8(np.stack([pixels for _, pixels in items]))

    for index, path in enumerate(files):
        pixels = open_rgb(path)
        items = waiting.setdefault(pixels.shape, [])
        items.append((index, pixels))
        if len(items) == batch_size:
            yield batch(waiting.pop(pixels.shape))
    for items in waiting.values():
        yield batch(items)


def make_grid(
    images: Tensor | np.ndarray,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    tile: int | None = None,
    padding: int = 2,
    caption_lines: int | None = 2,
    font_size: int = 10,
) -> Image.Image:
    """Tile a batch into one picture, row by row on white.

    images:   what `as_uint8` takes.
    columns:  tiles a row; by default the nearest to a square.
    captions: one string per image, written under its tile, wrapped and cut to `caption_lines` lines; None: not cut.
    tile:     side in pixels to show each image at; whole-number enlargements keep pixels crisp, others are resampled.
    """
    batch = as_uint8(images)
    count = len(batch)
    if count == 0:
        raise UserError("a grid needs at least one image")
    if captions is not None and len(captions) != count:
        raise UserError(f"{count} images but {len(captions)} captions: give one caption per image")
    if tile is not None and tile != batch.shape[-1]:
        factor, rest = divmod(tile, batch.shape[-1])
        if rest == 0 and batch.shape[-1] == batch.shape[-2]:
            batch = batch.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        else:
            batch = resize_uint8(batch, (max(1, round(tile * batch.shape[-2] / batch.shape[-1])), tile))
    height, width = batch.shape[-2:]
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    line = font_size + 2
    font = ImageFont.load_default(font_size)
    characters = max(4, int(width / font.getlength("n")))
    if caption_lines is None:
        caption_lines = max((len(textwrap.wrap(caption, characters)) for caption in captions or ()), default=0)
    strip = caption_lines * line if captions is not None else 0
    step_x, step_y = width + padding, height + strip + padding
    canvas = Image.new("RGB", (columns * step_x + padding, rows * step_y + padding), "white")
    draw = ImageDraw.Draw(canvas)
    for index, pixels in enumerate(batch.permute(0, 2, 3, 1).cpu().numpy()):
        left = padding + (index % columns) * step_x
        top = padding + (index // columns) * step_y
        canvas.paste(Image.fromarray(pixels), (left, top))
        if captions is not None:
            lines = textwrap.wrap(captions[index], characters, max_lines=caption_lines, placeholder="…")
            draw.multiline_text((left, top + height), "\n".join(lines), fill="black", font=font, spacing=2)
    return canvas


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG so that a reader never sees half a file; makes the folder. Raises UserError when it cannot."""
    target = Path(path)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(buffer.getvalue())
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{target}: cannot write the picture ({error.strerror}); choose a writable folder") from error
    return target


def save_grid(
    images: Tensor | np.ndarray,
    path: str | Path,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    tile: int | None = None,
) -> Path:
    """`make_grid` written to a PNG file, atomically."""
    return save_png(make_grid(images, columns, captions, tile), path)


def comparison_grid(arms: Mapping[str, Tensor], prompts: Sequence[str], count: int, path: Path, tile: int = 96) -> Path:
    """One row an arm, one column a prompt, the same noises throughout; the caption names both."""
    # Different prompts show more than repeats of one.
    first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:count]
    rows = torch.cat([images[first] for images in arms.values()])
    captions = [f"{arm}: {prompts[i]}" for arm in arms for i in first]
    return save_png(make_grid(rows, len(first), captions, tile, caption_lines=None), path)
