"""Every task draws from the user's own pictures, labels, layouts and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.cli import parse_config
from common.data.shapes import COLOURS, SHAPES, Shapes
from common.images import to_unit
from ldm import sample
from ldm.config import LdmConfig, SamplingConfig
from ldm.first_stage import build_first_stage, freeze
from ldm.masks import paste_known
from ldm.own_input import own_inputs
from ldm.run import Run, build_latent_diffusion
from ldm.sample import draw
from ldm.tasks import build_task, train_tokenizer
from tests.drills import words
from tests.ldm.test_export import shaken
from tests.ldm.tiny_run import config_file
from tests.refusals import refused

STEPS = ["--steps", "2", "--guidance", "1"]


class Labelled(Shapes):
    """Shapes with one label a picture, as class folders have."""

    classes = SHAPES

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "label": int(item["classes"][0])}


def run_of(folder: Path, task: str, **options: Any) -> Run:
    """The folder of a finished run of random weights."""
    command = ["--config", str(config_file(folder.parent)), "--task", task, "--run_dir", str(folder)]
    options = {"first_stage__norm_groups": 2, "conditioner__scale": 2, "export_pipeline": "false", **options}
    config, text = parse_config(LdmConfig, None, "", [*command, *words(**options)])
    data = (Labelled if task == "class" else Shapes)("test", 6, size=16)
    tokenizer = train_tokenizer(["a red star", "two rings"], 64, config.conditioner.tokens) if task == "text" else None
    made = build_task(config, data, data, tokenizer)
    ldm = build_latent_diffusion(config, made, freeze(build_first_stage(config.first_stage, 16)))
    shaken(ldm)
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    Run(config, folder, made).save(ldm.eval())
    return Run.existing(folder, data=False)


def picture(path: Path, height: int, width: int, seed: int = 0) -> Tensor:
    """A random picture on disk; returns its pixels, uint8 [1, 3, H, W]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None]


def drawn(run: Run, columns: dict[str, Tensor], side: tuple[int, int]) -> Tensor:
    """What the run's own sampler draws of a condition."""
    return draw(run.load(), run.config.task, columns, 1, side, SamplingConfig("ddim", 2, 0.0, 1.0), 0)


def test_classes_are_drawn_by_name_or_number(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "class")
    command = ["--model", str(run.folder), *STEPS, "--count", "1", "--folder", str(tmp_path / "out")]
    sample.main([*command, "--label", "ring", "--label", "2"])
    wanted = drawn(run, {"label": torch.tensor([SHAPES.index("ring")])}, (16, 16))
    assert torch.equal(pixels(tmp_path / "out" / "ring.png"), wanted)
    assert (tmp_path / "out" / "2.png").is_file()
    assert (wanted != drawn(run, {"label": torch.tensor([2])}, (16, 16))).any()
    refused(
        "--label house: not a class of this run; expected one of circle, square",
        sample.main,
        [*command, "--label", "house"],
    )
    refused("--mask: .* trained for task class, which takes --label", sample.main, [*command, "--mask", "x.png"])


def test_a_layout_is_drawn_from_words_or_a_file(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "layout")
    command = ["--model", str(run.folder), *STEPS, "--count", "1", "--folder", str(tmp_path / "out")]
    sample.main([*command, "--layout", "red circle 0.1 0.2 0.5 0.6; blue ring 0.5 0.5 1 1"])
    item = Shapes("test", 6, size=16)[0]
    most = len(item["boxes"])
    # The same boxes as a data set gives them.
    given = {"boxes": torch.zeros(most, 4), "classes": torch.full((most,), -1), "colours": torch.full((most,), -1)}
    given["boxes"][0], given["boxes"][1] = torch.tensor([0.1, 0.2, 0.5, 0.6]), torch.tensor([0.5, 0.5, 1, 1])
    given["classes"][:2] = torch.tensor([SHAPES.index("circle"), SHAPES.index("ring")])
    given["colours"][:2] = torch.tensor([COLOURS.index("red"), COLOURS.index("blue")])
    made = build_task(run.config, [{**item, **given}], [{**item, **given}])
    wanted = drawn(run, {name: made.reference.columns[name] for name in ("layout", "boxes", "classes")}, (16, 16))
    assert torch.equal(pixels(tmp_path / "out" / "layout.png"), wanted)
    row = {"labels": ["red circle", "blue ring"], "boxes": [[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 1, 1]]}
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(row) + "\n")
    sample.main([*command, "--layout", str(file)])
    assert torch.equal(pixels(tmp_path / "out" / "mine-1.png"), wanted)
    for word, message in (
        ("red house 0 0 1 1", "'red house' is no object of this run; expected one of"),
        ("red ring 0 0 1", "'red' is no object"),
        ("red ring 0.5 0 0.5 1", "expected 0 <= x0 < x1 <= 1"),
        ("red ring 0 0 nan 1", "expected 0 <= x0 < x1 <= 1"),
        (";".join(["red ring 0 0 1 1"] * 9), "9 objects; expected 1 to"),
        ("", "0 objects"),
    ):
        refused(message, sample.main, [*command, "--layout", word])
    file.write_text(json.dumps(row) + "\n" + json.dumps({"labels": ["red ring"], "boxes": [[0, 0, 2, 1]]}))
    refused(r"mine\.jsonl line 2: the box of red ring", sample.main, [*command, "--layout", str(file)])


def test_a_label_map_is_drawn(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "semantic")
    command = ["--model", str(run.folder), *STEPS, "--count", "1", "--folder", str(tmp_path / "out")]
    labels = np.zeros((16, 16), np.uint8)
    labels[4:12, 4:12] = 3
    Image.fromarray(labels).save(tmp_path / "grey.png")
    coloured = Image.fromarray(labels, "P")
    coloured.putpalette([7, 9, 200] * 256)
    coloured.save(tmp_path / "palette.png")
    wanted = drawn(run, {"label_map": torch.from_numpy(labels)[None]}, (16, 16))
    for name in ("grey", "palette"):
        sample.main([*command, "--mask", str(tmp_path / f"{name}.png")])
        assert torch.equal(pixels(tmp_path / "out" / f"{name}.png"), wanted)
    labels[7, 5] = 200
    Image.fromarray(labels).save(tmp_path / "grey.png")
    message = r"the label 200 at \(5, 7\) is unknown; expected 0 background, 1 circle"
    refused(message, sample.main, [*command, "--mask", str(tmp_path / "grey.png")])
    picture(tmp_path / "colour.png", 16, 16)
    refused("mode RGB; expected one label number", sample.main, [*command, "--mask", str(tmp_path / "colour.png")])
    refused("no such file or folder", sample.main, [*command, "--mask", str(tmp_path / "none.png")])


def test_own_pictures_are_enlarged_whatever_their_size(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "superres")
    small, wide = picture(tmp_path / "in" / "a.png", 8, 8), picture(tmp_path / "in" / "b.png", 9, 17, seed=1)
    command = ["--model", str(run.folder), *STEPS, "--count", "2", "--image", str(tmp_path / "in")]
    sample.main([*command, "--folder", str(tmp_path / "out")])
    assert pixels(tmp_path / "out" / "a-1.png").shape[-2:] == (16, 16)
    assert pixels(tmp_path / "out" / "b-0.png").shape[-2:] == (16, 32)  # the middle, twice as large
    wanted = drawn(run, {"low": small}, (16, 16))  # half the side is also the latent's
    assert torch.equal(pixels(tmp_path / "out" / "a-0.png"), wanted)
    options = sample_options(image=tmp_path / "in")
    assert torch.equal(own_inputs(options, run, None, 4)[1].columns["low"], wide[..., :8, :16])
    refused("different sizes make no sheet", sample.main, [*command, "--out", str(tmp_path / "sheet.png")])
    sample.main([*command, "--size", "16x16", "--out", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").is_file()
    picture(tmp_path / "tiny.png", 1, 1)
    tiny = ["--model", str(run.folder), *STEPS, "--image", str(tmp_path / "tiny.png")]
    refused("1x1 pixels are too few", sample.main, tiny)


def sample_options(**given: Any) -> Any:
    from argparse import Namespace

    names = ("prompt", "prompts", "label", "layout", "image", "mask")
    return Namespace(**{**dict.fromkeys(names), **given})


def test_own_pictures_are_painted_where_the_mask_is_white(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "inpaint")
    image = picture(tmp_path / "in" / "a.png", 16, 16)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    command = ["--model", str(run.folder), *STEPS, "--count", "1", "--folder", str(tmp_path / "out")]
    sample.main([*command, "--image", str(tmp_path / "in"), "--mask", str(tmp_path / "masks")])
    found = pixels(tmp_path / "out" / "a.png")
    hole = torch.from_numpy(mask > 127).float()[None, None]
    assert torch.equal(found, drawn(run, {"image": image, "hole": hole}, (16, 16)))
    known = paste_known(torch.zeros(1, 3, 16, 16), to_unit(image), hole)
    kept = hole.expand_as(known) < 0.5
    assert torch.equal(to_unit(found)[kept], to_unit(image)[kept])
    assert (found[..., 8:] != image[..., 8:]).any()
    picture(tmp_path / "other.png", 8, 16)
    black = tmp_path / "black.png"
    Image.new("L", (16, 16)).save(black)
    one = ["--image", str(tmp_path / "in" / "a.png")]
    refused("needs --image and --mask", sample.main, [*command, *one])
    refused(
        "16x8 pixels, .* 16x16: expected equal", sample.main, [*command, *one, "--mask", str(tmp_path / "other.png")]
    )
    refused("nothing in it is white", sample.main, [*command, *one, "--mask", str(black)])
    picture(tmp_path / "in" / "b.png", 16, 16)
    both = ["--image", str(tmp_path / "in"), "--mask", str(tmp_path / "masks")]
    refused("no mask named b", sample.main, [*command, *both])


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "text")
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red star\n\ntwo rings\n")
    command = ["--model", str(run.folder), *STEPS, "--count", "2"]
    sample.main([*command, "--prompts", str(tmp_path / "prompts.txt"), "--folder", str(tmp_path / "out")])
    names = {"a-red-star-0.png", "a-red-star-1.png", "two-rings-0.png", "two-rings-1.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    sample.main([*command, "--prompt", "a red star", "--out", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").is_file()
    (tmp_path / "prompts.txt").write_text("\n")
    refused("no prompt in it", sample.main, [*command, "--prompts", str(tmp_path / "prompts.txt")])
    refused("--label: .* task text, which takes --prompt and --prompts", sample.main, [*command, "--label", "ring"])
