"""Trained classifiers name the user's own pictures as their evaluation does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.predicting import label_pictures
from tests.refusals import refused


def photos(folder: Path) -> Path:
    """train/ and test/ with two classes of pictures of odd sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for name, low in (("dark", 0), ("light", 90)):
            for i in range(count):
                pixels = random.integers(low, low + 160, (9 + i, 12, 3), dtype=np.uint8)
                place = folder / split / name
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def shaken(network: Any) -> Any:
    """Random weights whose answers differ from picture to picture."""
    torch.manual_seed(4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network.eval()


def pc_darts_model(data: Path, folder: Path) -> Any:
    from pc_darts import evaluate
    from pc_darts.config import DataConfig, FinalConfig
    from pc_darts.data import open_data
    from pc_darts.genotypes import PUBLISHED
    from pc_darts.model import FinalNetwork
    from pc_darts.retraining import save_model

    images = open_data(DataConfig(name="folder", path=str(data), size=8))
    save_model(
        shaken(FinalNetwork(PUBLISHED["PC_DARTS_cifar"], FinalConfig(4, 3, "cifar", 2, False, 3))), images, folder
    )
    return evaluate


def eeea_net_model(data: Path, folder: Path) -> Any:
    from eeea_net import evaluate
    from eeea_net.config import DataConfig, NetworkConfig
    from eeea_net.data import open_data
    from eeea_net.genotypes import published
    from eeea_net.model import Network
    from eeea_net.training import save_model

    images = open_data(DataConfig(name="folder", path=str(data), size=8))
    save_model(shaken(Network(published()["EEEA_A"], NetworkConfig(channels=4, layers=3, classes=2))), images, folder)
    return evaluate


@pytest.mark.parametrize("make", [pc_darts_model, eeea_net_model])
def test_own_pictures_get_the_classes_that_the_evaluation_counts(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = photos(tmp_path / "photos"), tmp_path / "model"
    program = make(data, model)
    measured = program.main(["--model", str(model), "--data", "folder", "--path", str(data)])
    capsys.readouterr()
    found = program.main(["--model", str(model), "--predict", str(data / "test"), "--output", str(tmp_path / "o.json")])
    pictures = found["pictures"]
    assert len(pictures) == 10 and json.loads((tmp_path / "o.json").read_text()) == found
    wrong = sum(Path(picture["file"]).parent.name != picture["class"] for picture in pictures)
    assert wrong / 10 == pytest.approx(measured["test_error"])
    assert len({picture["probability"] for picture in pictures}) > 5
    assert all(0.5 <= picture["probability"] <= 1 for picture in pictures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pictures[0]['file']}\t{pictures[0]['class']}\t{pictures[0]['probability']:.4f}"
    one = program.main(["--model", str(model), "--predict", str(data / "test" / "dark" / "3.png")])["pictures"]
    assert one[0]["class"] == next(p["class"] for p in pictures if p["file"].endswith("dark/3.png"))
    refused("no such picture or folder", program.main, ["--model", str(model), "--predict", str(tmp_path / "none")])
    refused(
        "--predict goes with --model alone",
        program.main,
        ["--model", str(model), "--data", "folder", "--predict", str(data)],
    )


def test_a_network_of_grey_pictures_sees_the_users_in_grey(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    about = {"classes": ["a", "b"], "size": 4, "mean": [0.0], "std": [1.0]}
    seen: list[torch.Tensor] = []

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            seen.append(x)
            return torch.tensor([[0.0, 1.0]]), None

    assert [name for _, name, _ in label_pictures(Network(), about, tmp_path / "red.png")] == ["b"]
    torch.testing.assert_close(seen[0], torch.full((1, 1, 4, 4), 76 / 255))
