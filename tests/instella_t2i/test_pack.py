"""A folder of pictures to codes and back: any size, aspect, transparency, one colour; tokenizers side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import open_rgb
from common.weights import read_weights, save_weights
from instella_t2i import evaluate, pack
from instella_t2i.pack import working_size
from instella_t2i.tokenizer import Tokenizer, save_tokenizer
from tests.instella_t2i.test_tokenizer import TINY
from tests.refusals import refused


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_tokenizer(Tokenizer(TINY, size=16), tmp_path_factory.mktemp("model") / "tokenizer")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide, tall, tiny, grey, transparent, of one colour; two with one stem."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    noise(20, 90, 3).save(folder / "a.png")
    noise(300, 40, 3).save(folder / "a.bmp")
    noise(2, 3, 3).save(folder / "tiny.png")
    noise(31, 33).save(folder / "grey.png")
    noise(16, 16, 4).save(folder / "clear.png")
    (folder / "more").mkdir()
    Image.new("RGB", (50, 50), (10, 200, 30)).save(folder / "more" / "green.png")
    return folder


def test_every_picture_comes_back_in_its_own_size_from_the_same_number_of_bits(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    codes = tmp_path / "codes.safetensors"
    found = pack.main(["--model", str(model), "--images", str(pictures), "--out", str(codes)])[str(model)]
    assert found["pictures"] == 6 and found["bits"] == 32 and 0 < found["psnr"] < 60
    tensors, _ = read_weights(codes)
    assert tensors["codes"].shape == (6, 4) and tensors["codes"].dtype == torch.uint8
    pack.main(["--model", str(model), "--codes", str(codes), "--out", str(tmp_path / "back")])
    for name in ("a.png", "a.bmp", "tiny.png", "grey.png", "clear.png", "more/green.png"):
        back, own = open_rgb(tmp_path / "back" / f"{name}.png"), open_rgb(pictures / name)
        assert back.shape == own.shape, name


def test_working_sizes_keep_aspect_and_area() -> None:
    assert working_size(100, 100, 64, 16, 32) == (64, 64)
    assert working_size(100, 400, 64, 16, 32) == (32, 128)
    assert working_size(1, 10_000, 64, 16, 32) == (32, 6400)


def test_a_sheet_shows_tokenizers_side_by_side_and_measures_them(model: Path, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = save_tokenizer(Tokenizer(TINY, size=16), tmp_path / "other")
    sheet = tmp_path / "sheet.png"
    arguments = ["--model", str(model), str(other), "--images", str(pictures), "--png", str(sheet), "--count", "3"]
    assert list(pack.main(arguments)) == [str(model), str(other)]
    height, width, _ = open_rgb(sheet).shape
    assert height > 3 * 96 and width > 3 * 48  # three rows, three pictures
    measured = evaluate.main(["--model", str(model), str(other), "--data.name", "shapes", "--images", "12"])
    assert [found["bits"] for found in measured["arms"].values()] == [32, 32]


def test_codes_of_another_tokenizer_and_places_outside_are_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    codes = tmp_path / "codes.safetensors"
    pack.main(["--model", str(model), "--images", str(pictures), "--out", str(codes)])
    torch.manual_seed(1)
    other = save_tokenizer(Tokenizer(TINY, size=16), tmp_path / "other")
    back = ["--out", str(tmp_path / "back")]
    refused("made by another tokenizer", pack.main, ["--model", str(other), "--codes", str(codes), *back])
    tensors, notes = read_weights(codes)
    names = notes["names"].replace("tiny.png", "../tiny.png")
    save_weights(tmp_path / "out.safetensors", tensors, {**notes, "names": names})
    evil = ["--model", str(model), "--codes", str(tmp_path / "out.safetensors"), *back]
    refused("names the picture '../tiny.png': expected a place inside", pack.main, evil)
    save_weights(tmp_path / "no.safetensors", {"codes": tensors["codes"]}, notes)
    refused(
        "not a file of codes", pack.main, ["--model", str(model), "--codes", str(tmp_path / "no.safetensors"), *back]
    )
    refused("--out takes one --model", pack.main, ["--model", str(model), str(other), "--images", "x", "--out", "y"])
    assert not (tmp_path / "back").exists()
