"""Released weights of the generators become folders that draw, and go back unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.weights import read_weights, save_weights
from instella_t2i import convert_generator, plan, sample
from instella_t2i.config import StreamConfig
from instella_t2i.generators import Shape, make_generator
from instella_t2i.tokenizer import Tokenizer, save_tokenizer
from tests.instella_t2i.test_tokenizer import TINY
from tests.instella_t2i.tiny_text import save_language_model


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tokenizer and language model of the tiny generators."""
    folder = tmp_path_factory.mktemp("around")
    torch.manual_seed(0)
    save_tokenizer(Tokenizer(TINY, size=16), folder / "tokenizer")
    return ["--tokenizer", str(folder / "tokenizer"), "--text", str(save_language_model(folder / "text"))]


def released(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    network = make_generator(kind, StreamConfig(2, 2, 8), Shape(TINY.tokens, TINY.bits, 16))
    state = {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    if kind == "autoregression":  # as the released weights have them
        state |= {"time_embed.linear_1.weight": torch.ones(16, 1), "time_embed.linear_1.bias": torch.ones(16)}
    return state


@pytest.mark.parametrize("kind", ["diffusion", "autoregression"])
def test_released_weights_make_a_folder_that_draws_and_go_back(kind: str, around: list[str], tmp_path: Path) -> None:
    state, file = released(kind), tmp_path / "weights.pt"
    torch.save({"module": state}, file)
    folder = convert_generator.main(["--released", str(file), *around, "--out", str(tmp_path / kind)])
    about = json.loads((folder / "config.json").read_text())
    assert about["kind"] == kind and about["shape"] == {"tokens": TINY.tokens, "bits": TINY.bits, "text_width": 16}
    assert about["stream"] == {"layers": 2, "heads": 2, "head_dim": 8, "recompute": False}
    out = tmp_path / "fox.png"
    command = ["--prompt", "a fox", "--count", "2", "--steps", "2", "--device", "cpu", "--out", str(out)]
    sample.main(["--model", str(folder), *around, *command])
    with Image.open(out) as picture:
        assert picture.width >= 256
    (folder / "config.json").write_text(json.dumps({**about, "target": "x"}))
    back = convert_generator.main(["--model", str(folder), "--out", str(tmp_path / "back.safetensors")])
    again = convert_generator.main(["--released", str(back), *around, "--out", str(tmp_path / "again")])
    assert json.loads((again / "config.json").read_text()) == {**about, "target": "x"}
    found = read_weights(back)[0]
    wanted = {name: tensor for name, tensor in state.items() if kind == "diffusion" or "time_embed" not in name}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_does_not_fit_is_said(around: list[str], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    state = released("diffusion")
    save_weights(file, {name: tensor for name, tensor in state.items() if name != "proj_out.bias"})
    command = ["--released", str(file), *around, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"does not fit the network that its tensors tell: proj_out.bias is missing"):
        convert_generator.main(command)
    torch.manual_seed(0)
    other = make_generator("diffusion", StreamConfig(2, 2, 8), Shape(9, TINY.bits, 16))
    save_weights(file, other.state_dict())
    with pytest.raises(UserError, match=r"makes 4 tokens of 8 bits, the generator 9 of 8"):
        convert_generator.main(command)
    pickled = tmp_path / "pickled.pt"
    torch.save({"module": state, "client": Path("x")}, pickled)
    with pytest.raises(UserError, match=r"not tensors alone"):
        convert_generator.main(["--released", str(pickled), *around, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"--released needs --tokenizer and --text"):
        convert_generator.main(["--released", str(file), "--out", str(tmp_path / "out")])


def test_the_plan_counts_the_released_generators() -> None:
    lines = {line["stage"]: line for line in plan.main(["--json"])}
    assert lines["diffusion"]["parameters"] == 1_292_517_440
    assert lines["autoregression"]["parameters"] == 881_377_344 - 4_200_448  # the unused time embedding
    # A forward pass of some 1.3e9 weights over 128 image tokens, and 0.4e9 of them over 128 text tokens.
    assert 1.0 < lines["diffusion"]["tflop_a_sample"] < 1.6
