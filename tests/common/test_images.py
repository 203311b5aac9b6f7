"""Pictures in and out: layouts, the clean resize, folders, grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from PIL import Image

from common.errors import UserError
from common.images import (
    as_uint8,
    folder_batches,
    image_files,
    make_grid,
    open_rgb,
    resize_clean,
    resize_uint8,
    save_grid,
    to_uint8,
    to_unit,
)


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
    with pytest.raises(UserError, match=message):
        as_uint8(images)


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
    with pytest.raises(UserError, match="holds no image"):
        image_files(tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    with pytest.raises(UserError, match=r"broken\.png: not a readable image"):
        list(folder_batches(image_files(tmp_path)))


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


def test_grids_that_cannot_be_made_or_saved_are_explained(tmp_path):
    with pytest.raises(UserError, match="2 images but 1 captions"):
        make_grid(noise(2, 8, 8), captions=["one"])
    with pytest.raises(UserError, match="at least one image"):
        make_grid(noise(0, 8, 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the picture"):
        save_grid(noise(1, 8, 8), tmp_path / "file" / "grid.png")
