"""Released checkpoints and model folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scenesplat import convert
from scenesplat.config import NetworkConfig
from scenesplat.export import SceneModel
from scenesplat.model import PointTransformer
from scenesplat.text import TextSpace
from tests.refusals import refused
from tests.scenesplat.golden_cases import tiny_network


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> PointTransformer:
    """Networks of the published kinds, but tiny."""
    monkeypatch.setattr(convert, "NetworkConfig", lambda: tiny_network(dec_channels=[16]))
    torch.manual_seed(0)
    return PointTransformer(tiny_network(dec_channels=[16]))


def checkpoint(network: PointTransformer, path: Path, prefix: str = "module.backbone.", **more: Any) -> Path:
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()} | more
    torch.save({"epoch": 3, "state_dict": state, "best_metric_value": 0.1}, path)
    return path


def test_released_weights_come_and_go_without_a_change(
    small: PointTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(small, tmp_path / "best.pth", **{"seg_head.weight": torch.zeros(2, 2)})
    folder = convert.main(["--checkpoint", str(file), "--out", str(tmp_path / "model")])
    said = capsys.readouterr().out
    count = len(small.state_dict())
    assert f"{count + 1} tensors read, {count} of the encoder" in said and "not used: seg_head.weight" in said
    model = SceneModel.load(folder)
    assert model.voxel == 0.02 and model.attributes == ["colour", "opacity", "quaternion", "scale"]
    for name, value in small.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)
    back = convert.main(["--model", str(folder), "--out", str(tmp_path / "back.safetensors")])
    again = convert.main(["--checkpoint", str(back), "--out", str(tmp_path / "again")])
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_network_of_ones_own_sizes_comes_back_by_its_header(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = PointTransformer(tiny_network(dec_channels=[12]))
    model = SceneModel(network, TextSpace(width=12), 0.05, ["colour", "opacity", "quaternion", "scale"], ["chair"])
    model.save(tmp_path / "model")
    file = convert.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "a.safetensors")])
    back = SceneModel.load(convert.main(["--checkpoint", str(file), "--out", str(tmp_path / "back")]))
    assert back.network.options == network.options
    assert (back.voxel, back.attributes, back.classes) == (0.05, model.attributes, ["chair"])
    weights = back.network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_fourteen_attributes_and_five_stages_are_known_by_their_tensors() -> None:
    with torch.device("meta"):
        normal = PointTransformer(NetworkConfig(in_channels=14)).state_dict()
        five = PointTransformer(replace(convert.FIVE_STAGES, mask_token=True)).state_dict()
    assert convert.options_of(normal, "x") == NetworkConfig(in_channels=14)
    found, others = convert.encoder_tensors({f"backbone_student.{k}": v for k, v in five.items()} | {"dino_head.w": 0})
    assert convert.options_of(found, "x") == replace(convert.FIVE_STAGES, mask_token=True, pooling="max")
    assert others == ["dino_head.w"]


def test_what_the_official_loader_passes_over_is_named(small: PointTransformer, tmp_path: Path) -> None:
    state = small.state_dict()
    name = "enc.enc1.block0.attn.qkv.weight"
    lacking = PointTransformer(small.options)
    torch.save({"state_dict": {k: v for k, v in state.items() if k != name}}, tmp_path / "lacking.pth")
    arguments = ["--out", str(tmp_path / "model")]
    refused(f"{name} is missing", convert.main, ["--checkpoint", str(tmp_path / "lacking.pth"), *arguments])
    torch.save({"state_dict": state | {name: torch.zeros(2, 3)}}, tmp_path / "shape.pth")
    refused(rf"{name} has the shape \[2, 3\]", convert.main, ["--checkpoint", str(tmp_path / "shape.pth"), *arguments])
    torch.save({"state_dict": {"conv.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    refused("no embedding.stem.conv.weight", convert.main, ["--checkpoint", str(tmp_path / "other.pth"), *arguments])
    torch.save({"state_dict": lacking}, tmp_path / "pickle.pth")
    refused("pickled Python objects", convert.main, ["--checkpoint", str(tmp_path / "pickle.pth"), *arguments])
    assert not (tmp_path / "model").exists()


def test_texts_of_another_width_than_the_weights_are_refused(small: PointTransformer, tmp_path: Path) -> None:
    from common.data.text import packaged_minilm

    file = checkpoint(small, tmp_path / "best.pth")
    arguments = ["--checkpoint", str(file), "--out", str(tmp_path / "model"), "--text", str(packaged_minilm())]
    refused("its texts have 384 numbers, these weights answer with 16", convert.main, arguments)


def test_a_model_without_its_text_encoder_asks_for_it(small: PointTransformer, tmp_path: Path) -> None:
    file = checkpoint(small, tmp_path / "best.pth")
    model = SceneModel.load(convert.main(["--checkpoint", str(file), "--out", str(tmp_path / "model")]))
    refused("the text encoder gives 384 numbers and this model answers with 16; say --text", model.texts, ["chair"])


def test_a_model_folder_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    network = PointTransformer(tiny_network())
    folder = SceneModel(network, TextSpace(width=12), 0.1, ["colour"], ["chair"]).save(tmp_path / "model")
    refused("--model .*: no config.json there", SceneModel.load, tmp_path)
    card = folder / "config.json"
    text = card.read_text()
    card.write_text(text.replace('"mlp_ratio": 4.0', '"mlp_ratio": -1.0'))
    refused("config.json: --mlp_ratio -1.0: expected a number above 0", SceneModel.load, folder)
    card.write_text(text.replace('"in_channels": 11', '"in_channels": 14'))
    refused("embedding.stem.conv.weight has the shape", SceneModel.load, folder)
    card.write_text(text)
    assert SceneModel.load(folder).classes == ["chair"]
