"""Pictures in and out: layouts, the clean resize, folders, grids."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from PIL import Image, ImageOps

from common import images as module
from common.images import (
    CorruptImage,
    as_uint8,
    decode,
    decoded,
    folder_batches,
    image_files,
    make_grid,
    open_rgb,
    picture_size,
    resize_clean,
    resize_uint8,
    save_grid,
    to_uint8,
    to_unit,
)
from tests.common.pictures import png
from tests.refusals import refused


def noise(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_bytes_survive_the_way_to_floats_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    x = to_unit(images)
    assert (x.min(), x.max()) == (-1, 1) and torch.equal(to_uint8(x), images)
    assert to_uint8(torch.tensor([-3.0, 0.5 / 127.5 - 1 + 1e-4, 7.0])).tolist() == [0, 1, 255]


@pytest.mark.parametrize("size", [(16, 16), (112, 112), (40, 24)])
def test_clean_resize_is_clean_fids(size):
    images = noise(2, 48, 36)
    oracle = make_resizer("PIL", False, "bicubic", (size[1], size[0]))
    expected = np.stack([oracle(image.permute(1, 2, 0).numpy()) for image in images])
    np.testing.assert_allclose(resize_clean(images, size).permute(0, 2, 3, 1), expected, atol=0.01)
    assert resize_uint8(images, size).dtype == torch.uint8


def test_every_accepted_layout_becomes_the_same_bytes():
    images = noise(3, 8, 10)
    expected = images.numpy()
    for form in (images.permute(0, 2, 3, 1), images.permute(0, 2, 3, 1).numpy(), images.float() / 255):
        np.testing.assert_array_equal(as_uint8(form), expected)
    grey = images[:, :1]
    for form in (grey, grey.squeeze(1), grey.permute(0, 2, 3, 1)):
        np.testing.assert_array_equal(as_uint8(form), grey.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 8, 8), r"expected \[N,3,H,W\]"),
        (torch.linspace(-1, 1, 192).view(1, 3, 8, 8), r"map \[-1,1\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "torch.int64"),
    ],
)
def test_ambiguous_images_are_refused(images, message):
    refused(message, as_uint8, images)


def test_alpha_is_composited_on_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rgb = open_rgb(tmp_path / "a.png")
    assert rgb[0, 0].tolist() == [255, 0, 0]
    assert rgb[0, 1].tolist() == [255, 255, 255]


def test_folder_batches_cover_every_file_once_and_group_sizes(tmp_path):
    for index in range(7):
        side = 8 if index % 3 else 12
        Image.new("RGB", (side, side), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    files = image_files(tmp_path)
    seen = {}
    for indices, images in folder_batches(files, batch_size=2):
        assert len(indices) == len(images) <= 2
        seen |= dict(zip(indices, images[:, 0, 0, 0].tolist()))
    assert seen == {index: index for index in range(7)}


def test_empty_and_broken_folders_are_named(tmp_path):
    refused("holds no image", image_files, tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    refused(r"broken\.png: not a readable image", list, folder_batches(image_files(tmp_path)))


def test_grid_places_images_row_by_row_and_enlarges_without_blur():
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    for index in range(3):
        images[index, index] = 255
    grid = np.asarray(make_grid(images, columns=2, tile=8, padding=1))
    assert grid.shape == (19, 19, 3)
    assert grid[1:9, 1:9].reshape(-1, 3).tolist() == [[255, 0, 0]] * 64
    assert grid[5, 14].tolist() == [0, 255, 0]
    assert grid[14, 5].tolist() == [0, 0, 255]
    assert grid[14, 14].tolist() == [255, 255, 255]


def test_captions_leave_ink_below_the_tile_and_never_on_it():
    images = torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)
    captions = ["a red apple on a very long table that does not fit", "b"]
    grid = np.asarray(make_grid(images, columns=2, captions=captions, padding=2, caption_lines=2))
    assert (grid[2:66, 2:66] == 200).all()
    assert (grid[66:90, 2:66] < 128).any() and (grid[66:90, 68:132] < 128).any()


def test_saving_makes_the_folder_and_leaves_no_partial_file(tmp_path):
    path = save_grid(noise(4, 8, 8), tmp_path / "new" / "grid.png")
    assert Image.open(path).size == (22, 22)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_captions_that_are_not_cut_get_as_many_lines_as_the_longest_needs() -> None:
    images, long = noise(2, 40, 40), "a red star to the right of a green square"
    heights = {
        lines: np.asarray(make_grid(images, captions=["one", long], caption_lines=lines)).shape[0]
        for lines in (1, 3, None)
    }
    line = (heights[3] - heights[1]) // 2
    assert (heights[None] - heights[1]) % line == 0 and heights[None] >= heights[3] + line
    short = make_grid(images, captions=["one", "two"], caption_lines=None)
    assert np.asarray(short).shape[0] == heights[1]


def test_grids_that_cannot_be_made_or_saved_are_explained(tmp_path):
    refused("2 images but 1 captions", make_grid, noise(2, 8, 8), captions=["one"])
    refused("at least one image", make_grid, noise(0, 8, 8))
    (tmp_path / "file").write_text("")
    refused("cannot write the picture", save_grid, noise(1, 8, 8), tmp_path / "file" / "grid.png")


def test_alpha_is_laid_on_the_background() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(out, "PNG")
    assert decode(out.getvalue(), (255, 255, 255)).getpixel((1, 1)) == (255, 204, 204)
    assert decode(out.getvalue(), (0, 0, 0)).getpixel((1, 1)) == (51, 0, 0)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=0)
    assert decode(out.getvalue(), (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_grey_16_bit_cmyk_and_float_become_8_bit_rgb() -> None:
    def through(picture: Image.Image, form: str) -> tuple[int, ...]:
        out = io.BytesIO()
        picture.save(out, form)
        result = decode(out.getvalue())
        assert result.mode == "RGB"
        return result.getpixel((2, 2))  # type: ignore[return-value]

    assert through(Image.new("L", (4, 4), 77), "PNG") == (77,) * 3
    assert through(Image.fromarray(np.full((4, 4), 257 * 77, np.uint16)), "PNG") == (77,) * 3
    assert through(Image.new("1", (4, 4), 1), "PNG") == (255,) * 3
    assert through(Image.fromarray(np.full((4, 4), 0.2, np.float32)), "TIFF") == (51,) * 3
    red, green, blue = through(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert red > 240 and green < 15 and blue < 15


def test_exif_orientation_turns_the_picture() -> None:
    picture = Image.new("RGB", (8, 4))
    picture.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn it 90 degrees clockwise
    out = io.BytesIO()
    picture.save(out, "PNG", exif=exif)
    upright = decode(out.getvalue())
    assert upright.size == (4, 8) and upright.getpixel((1, 1)) == (255,) * 3 and upright.getpixel((1, 6)) == (0,) * 3


def turned(orientation: int, form: str = "PNG") -> tuple[bytes, Image.Image]:
    """A file with this EXIF orientation, and the picture as Pillow turns it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    picture.save(out, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(out))
    assert upright is not None
    return out.getvalue(), upright.convert("RGB")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(form: str, orientation: int) -> None:
    data, upright = turned(orientation, form)
    assert decode(data).size == upright.size and decode(data).tobytes() == upright.tobytes()
    assert picture_size(data) == (upright.height, upright.width)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_means_nothing_turns_nothing(value: int) -> None:
    data, _ = turned(value)
    assert decode(data).tobytes() == decode(turned(1)[0]).tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_bad_exif_is_no_fault_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    Image.new("RGB", (9, 6), "red").save(out, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff broken")
    for data in (out.getvalue(), png(7)):
        assert decode(data).width == picture_size(data)[1]
    monkeypatch.setattr(Image.Image, "getexif", lambda self: 1 / 0)
    assert decode(out.getvalue()).size == (9, 6) and picture_size(out.getvalue()) == (6, 9)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16", "1", "CMYK"])
def test_large_pictures_are_converted_in_strips_to_the_same_bytes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (700, 30), np.uint16))
    else:
        picture = Image.fromarray(rng.integers(0, 256, (700, 30, 4), np.uint8), "RGBA").convert(mode)
    out = io.BytesIO()
    picture.save(out, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    small = decode(out.getvalue(), (9, 99, 199)).tobytes()
    monkeypatch.setattr(module, "LARGE_PIXELS", 100)
    assert decode(out.getvalue(), (9, 99, 199)).tobytes() == small


def test_one_large_picture_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_PIXELS", 10)
    threads, most = 0, 0

    def look(_: int) -> None:
        nonlocal threads, most
        with decoded(png(1)):
            threads += 1
            most = max(most, threads)
            time.sleep(0.01)
            threads -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(8)))
    assert most == 1


def test_decompression_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 63)
    with pytest.raises(CorruptImage, match="8 x 8 pixels, the limit is 63"):
        decode(png(1))


@pytest.mark.parametrize("data", [b"", b"not an image", png(1, (64, 64))[:-30], b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_broken_bytes_are_corrupt_images(data: bytes) -> None:
    with pytest.raises(CorruptImage):
        decode(data)


def test_of_a_large_jpeg_a_smaller_form_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(file, "JPEG")
    with decoded(file.getvalue(), side=16) as picture:
        assert picture.size == (640, 480)
    monkeypatch.setattr("common.images.LARGE_PIXELS", 1000)
    with decoded(file.getvalue(), side=16) as picture:
        assert picture.size == (160, 120), "a quarter: an eighth has fewer than 4 x 16 pixels"
