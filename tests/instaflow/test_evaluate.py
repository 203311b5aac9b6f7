"""Measures of samples, the evaluation of a run, and the COCO-style program on a user's own captions and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.shapes import Shapes
from common.errors import UserError
from common.metrics.measures import (
    fixed_noise,
)
from instaflow import evaluate
from instaflow.figures import sideways
from tests.common.tiny_teacher import save_teacher
from tests.instaflow.tiny_run import PROMPTS, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps that also evaluated itself."""
    folder = tmp_path_factory.mktemp("evaluated")
    teacher = save_teacher(folder / "teacher")
    small = {"reflow__steps": 2, "distil__steps": 2, "perceptual__steps": 1}
    return train(folder / "run", teacher, stages="[pairs,reflow,distil,perceptual,evaluate]", **small)


def test_run_compares_all_arms_on_the_same_noises(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    wanted = ["teacher 3-step", "teacher 1-step", "2-RF 1-step", "2-RF 3-step", "InstaFlow 1-step"]
    assert list(metrics["arms"]) == wanted
    assert metrics["arms"]["teacher 3-step"]["perceptual"] == 0.0 and metrics["images"] == len(PROMPTS)
    assert metrics["unet_forwards_per_image"]["teacher 3-step"] == 6
    assert metrics["unet_forwards_per_image"]["InstaFlow 1-step"] == 1
    with Image.open(run / "comparison.png") as picture:
        assert picture.width > 4 * 96 and picture.height > 4 * 96


def test_finished_run_is_evaluated_again_with_equal_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run / "metrics.json").read_text())
    after = evaluate.main(["--run_dir", str(run)])
    assert json.loads(json.dumps(after["arms"])) == before["arms"]
    assert "InstaFlow 1-step" in capsys.readouterr().out


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    data = Shapes("test", 24, 16, seed=4)
    for i in range(24):
        Image.fromarray(data.images[i].transpose(1, 2, 0)).save(folder / f"{i:012d}.png")
    return folder


def coco(folder: Path) -> Path:
    """Captions in COCO's form: several an image, of which the first counts."""
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in range(24)],
        "annotations": [
            {"image_id": i, "caption": text} for i in range(24) for text in (f" {PROMPTS[i % 12]}\n", "another")
        ],
    }
    path = folder.parent / "captions_val2017.json"
    path.write_text(json.dumps(content))
    return path


def test_pipeline_is_compared_with_images_and_coco_captions(run: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(run / "pipeline"), "--images", str(images), "--captions", str(coco(images))]
    out = tmp_path / "out.json"
    result = evaluate.main([*arguments, "--count", "20", "--extractor", "lite0@32", "--json", str(out)])
    assert result["n_fake"] == 20 and result["metrics"]["fid_lite0@32"]["value"] > 0
    assert json.loads(out.read_text())["steps"] == 1
    teacher = str(run.parent / "teacher")
    arguments[1] = teacher
    options = ["--count", "20", "--extractor", "lite0@32", "--solver", "DDIMScheduler", "--steps", "2", "--size", "8"]
    again = evaluate.main([*arguments, *options, "--guidance", "3"])
    assert again["size"] == 8 and again["guidance"] == 3.0


def test_first_caption_of_each_image_is_taken(images: Path) -> None:
    files = [str(file) for file in sorted(images.iterdir())]
    assert evaluate.read_captions(coco(images), files)[:3] == PROMPTS[:3]


def test_captions_keep_separators_and_lose_the_byte_order_mark(images: Path, tmp_path: Path) -> None:
    files = [str(file) for file in sorted(images.iterdir())]
    captions = [f"picture\u2028number {i}" for i in range(24)]
    (tmp_path / "c.txt").write_text("\ufeff" + "\r\n".join(captions) + "\r\n\r\n", encoding="utf-8", newline="")
    rows = [json.dumps({"file_name": Path(f).name, "text": c}, ensure_ascii=False) for f, c in zip(files, captions)]
    (tmp_path / "c.jsonl").write_text("\ufeff" + "\n\n".join(rows) + "\n", encoding="utf-8")
    for name in ("c.txt", "c.jsonl"):
        assert evaluate.read_captions(tmp_path / name, files) == captions


def test_captions_that_do_not_fit_are_refused_by_name(images: Path, tmp_path: Path) -> None:
    files = [str(file) for file in sorted(images.iterdir())]
    short, broken, missing = tmp_path / "short.txt", tmp_path / "broken.json", tmp_path / "some.jsonl"
    short.write_text("a\nb\n")
    broken.write_text("{")
    missing.write_text(json.dumps({"file_name": Path(files[0]).name, "text": "a"}) + "\n")
    for path, sentence in (
        (short, "2 lines for 24 images"),
        (broken, "not a caption file"),
        (missing, r"no caption for .*0*1.png \(23 such images\)"),
        (tmp_path / "absent.json", "no such file"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate.read_captions(path, files)
    with pytest.raises(UserError, match=r"no metadata.jsonl: give the captions"):
        evaluate.main(["--model", str(tmp_path), "--images", str(images)])


def test_clip_score_is_the_mean_cosine_of_a_clip_directory(images: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    text = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "eos_token_id": 3}
    sizes = {"num_attention_heads": 2, "projection_dim": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config={**text, **sizes}, vision_config={**vision, **sizes}, projection_dim=8)
    ).eval()
    model.save_pretrained(tmp_path / "clip")
    tokenizer = AutoTokenizer.from_pretrained(save_teacher(tmp_path / "teacher") / "tokenizer", local_files_only=True)
    tokenizer.save_pretrained(tmp_path / "clip")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in sorted(images.iterdir())])
    captions = [PROMPTS[i % 12] for i in range(24)]
    value = evaluate.clip_score(pixels, captions, tmp_path / "clip", batch=10)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        out = model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=(pixels.float() / 255 - mean) / std,
        )
    wanted = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).mean()
    assert value == pytest.approx(float(wanted), abs=1e-4)
    with pytest.raises(UserError, match="not a CLIPModel directory"):
        evaluate.clip_score(pixels, captions, tmp_path)


def test_paths_of_a_straight_flow_have_no_sideways_part() -> None:
    noise = fixed_noise(3, (2, 4, 4))
    along, across = sideways(lambda z, t: torch.ones_like(z), noise, steps=5)
    assert torch.allclose(along, torch.linspace(0, 1, 6, dtype=torch.float64).expand(3, -1), atol=1e-6)
    assert across.abs().max() < 1e-5

    def bent(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        v = torch.ones_like(z)
        v[:, 0] += torch.where(t_B < 0.5, 2.0, -2.0).view(-1, 1, 1)
        return v

    _, across = sideways(bent, noise, steps=10)
    assert across.max() > 0.2
