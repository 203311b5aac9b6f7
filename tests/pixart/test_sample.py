"""Sampling from every kind of weights: our folders, the authors' files, diffusers directories; grids and shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.errors import UserError
from pixart.config import SamplingConfig
from pixart.convert import save_diffusers, save_official
from pixart.model import PixArt
from pixart.sample import Painter, default_weights, main, open_painter
from tests.pixart.tiny_run import tiny_vae, train

PROMPT = ["--prompt", "a red circle left of a blue square"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sampling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRO_CACHE", str(folder / "cache"))
        yield train(folder / "run", trainer__max_steps=1)


def random_network(painter: Painter) -> Painter:
    """Every parameter random: an untrained network returns zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in painter.network.parameters():
            parameter.normal_(std=0.05)
    return painter


@pytest.mark.parametrize("sampler", ["dpm-solver", "iddpm", "sa-solver"])
def test_prompt_to_png_with_every_sampler(run: Path, tmp_path: Path, sampler: str) -> None:
    out = tmp_path / "picture.png"
    main([*PROMPT, "--weights", str(run / "stage2"), "--sampler", sampler, "--steps", "2", "--out", str(out)])
    assert Image.open(out).size == (128, 128), "small pictures are shown larger"


@pytest.mark.parametrize(
    ("flags", "shape"), [(["--ar", "1:2"], (4, 8)), (["--ar", "2:1"], (8, 4)), (["--hw", "20:30"], (20, 30))]
)
def test_shape_flags_give_height_first(run: Path, tmp_path: Path, flags: list[str], shape: tuple[int, int]) -> None:
    out = tmp_path / "picture.png"
    main([*PROMPT, *flags, "--weights", str(run / "stage3" / "model"), "--steps", "1", "--out", str(out)])
    width, height = Image.open(out).size
    if "--hw" in flags:
        assert (height, width) == shape
    else:
        assert height * shape[1] == pytest.approx(width * shape[0], rel=0.1)


def test_flags_in_the_prompt_are_read_and_not_drawn(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []
    original = Painter.captions

    def spy(self: Painter, captions: Any, height: int, width: int, *rest: Any) -> torch.Tensor:
        seen.extend([*captions, f"{height}x{width}"])
        return original(self, captions, height, width, *rest)

    monkeypatch.setattr(Painter, "captions", spy)
    weights = ["--weights", str(run / "stage3"), "--steps", "1", "--out", str(tmp_path / "p.png")]
    main(["--prompt", "a red circle --ar 1:2", *weights])
    assert seen[0] == "a red circle" and seen[1].startswith("2") and seen[1] != "32x32"


def test_several_prompts_make_a_grid(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    more = ["--prompt", "a green ring", "--count", "3", "--weights", str(run / "stage2"), "--steps", "1"]
    main([*PROMPT, *more, "--out", str(out)])
    assert Image.open(out).width > 3 * 128


def test_authors_file_and_diffusers_folder_draw_what_our_folder_draws(run: Path, tmp_path: Path) -> None:
    painter = random_network(open_painter(run / "stage2"))
    assert isinstance(painter.network, PixArt)
    save_official(painter.network, tmp_path / "official.pth")
    save_diffusers(painter.network, tmp_path / "pipeline" / "transformer")
    shutil.copytree(tiny_vae(run.parent / "vae"), tmp_path / "pipeline" / "vae")
    sampling = SamplingConfig(steps=2, guidance=3.0)
    ours = painter.captions(["a red circle"], 16, 16, sampling)
    vae = str(tiny_vae(run.parent / "vae"))
    pipeline = open_painter(tmp_path / "pipeline")
    assert torch.equal(pipeline.captions(["a red circle"], 16, 16, sampling), ours)
    official = open_painter(tmp_path / "official.pth", vae, heads=2)
    assert torch.equal(official.captions(["a red circle"], 16, 16, sampling), ours)
    with pytest.raises(UserError, match="heads"):
        open_painter(tmp_path / "official.pth", vae)
    with pytest.raises(UserError, match="--vae is missing"):
        open_painter(tmp_path / "pipeline" / "transformer")


def test_weights_without_null_caption_are_guided_by_the_empty_caption(run: Path) -> None:
    painter = random_network(open_painter(run / "stage2"))
    sampling = SamplingConfig(steps=2, guidance=3.0)
    with_null = painter.captions(["a red circle"], 16, 16, sampling)
    painter.network.has_null_caption = False  # type: ignore[assignment]
    without = painter.captions(["a red circle"], 16, 16, sampling)
    assert not torch.equal(with_null, without)
    # At guidance 1 there is no unconditional branch.
    plain = SamplingConfig(steps=2, guidance=1.0)
    first = painter.captions(["a red circle"], 16, 16, plain)
    painter.network.has_null_caption = True  # type: ignore[assignment]
    assert torch.equal(first, painter.captions(["a red circle"], 16, 16, plain))


def test_a_sample_depends_on_its_number_and_not_on_the_batch(run: Path) -> None:
    painter = random_network(open_painter(run / "stage3"))
    captions = ["a red circle", "a blue square", "a green circle and a red square"]
    sampling = SamplingConfig(steps=2, sampler="sa-solver", batch_size=3)
    together = painter.captions(captions, 32, 32, sampling, seed=5)
    sampling.batch_size = 2
    apart = painter.captions(captions, 32, 32, sampling, seed=5)
    assert (together.int() - apart.int()).abs().max() <= 1
    assert not torch.equal(together, painter.captions(captions, 32, 32, sampling, seed=6))


def test_classes_are_drawn_with_guidance(run: Path) -> None:
    painter = random_network(open_painter(run / "stage1"))
    images = painter.classes(torch.tensor([0, 3]), 16, 16, SamplingConfig(steps=2, guidance=3.0))
    assert images.shape == (2, 3, 16, 16) and not torch.equal(images[0], images[1])


def test_captions_are_encoded_once_for_all_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter, calls = open_painter(run / "stage2"), {"n": 0}
    encode = PixArt.encode_caption

    def counted(self: PixArt, *args: Any, **options: Any) -> Any:
        calls["n"] += 1
        return encode(self, *args, **options)

    monkeypatch.setattr(PixArt, "encode_caption", counted)
    painter.captions(["a red circle"], 16, 16, SamplingConfig(steps=5))
    assert calls["n"] == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--prompt is missing"),
        ([*PROMPT, "--count", "0"], "--count 0"),
        ([*PROMPT, "--steps", "0"], "--steps 0"),
        ([*PROMPT, "--steps", "1", "--sampler", "iddpm"], "--steps 1: expected a whole number from 2 to 1000"),
        ([*PROMPT, "--weights", "nowhere"], "nowhere"),
        ([*PROMPT, "--ar", "wide", "--weights", "{run}/stage2"], "--ar needs height:width"),
        ([*PROMPT, "--weights", "{run}/stage1"], "class-conditional stage: it takes no prompt"),
        ([*PROMPT, "--weights", "{run}/stage2", "--control", "x.png"], "has no control branch"),
        ([*PROMPT, "--weights", "{run}/stage2", "--vae", "nowhere"], "vae nowhere"),
    ],
)
def test_bad_options_are_refused(run: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as failure:
        main([word.format(run=run) for word in words])
    assert "\n" not in str(failure.value)


def test_default_weights_are_the_newest_finished_text_stage(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pixart.sample.PRETRAINED", tmp_path / "absent")
    monkeypatch.setattr("pixart.sample.WORKPLACE", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained network was found"):
        default_weights()
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "mine")
    assert default_weights() == tmp_path / "runs" / "mine" / "stage3" / "model"
