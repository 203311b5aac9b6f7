"""Every task of the paper trains and samples with the one trainer; the user's own images; data that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import photos
from common.data.sampling import LazyTable, TensorTable
from common.errors import UserError
from ldm.config import DataConfig, LdmConfig
from ldm.diffusion import LatentDiffusion
from ldm.run import Run
from ldm.sample import condition_columns, draw, task_grid
from ldm.tasks import open_dataset, prepare, train_tokenizer, user_images
from tests.common.test_fashion_mnist import idx
from tests.ldm.tiny_run import first_stage_of, losses, train
from tests.refusals import refused


@pytest.fixture(scope="module")
def weights(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained first stage, shared."""
    return first_stage_of(train(tmp_path_factory.mktemp("first") / "run", task="unconditional", stages="[first_stage]"))


def check(folder: Path, size: int = 16) -> tuple[Run, LatentDiffusion]:
    """The finished run loads, and draws 3 images and a grid of its task."""
    run = Run.existing(folder)
    ldm = run.load()
    columns = condition_columns(run.task, run.config, 3)
    images = draw(ldm, run.task.name, columns, 3, (size, size), run.config.sampling)
    assert images.shape == (3, 3, size, size) and images.dtype == torch.uint8
    task_grid(ldm, run.task, run.config, folder / "grid.png")
    assert Image.open(folder / "grid.png").width > size
    return run, ldm


TASKS: dict[str, dict[str, Any]] = {
    "unconditional": {},
    "class": {},
    "class-adm": {"conditioner__class_embedding": "adm"},
    "text-bert": {"conditioner__kind": "bert"},
    "text-tau": {"conditioner__kind": "tau"},
    "layout": {},
    "semantic": {},
    "superres": {"conditioner__scale": 2},
    "superres-bsr": {"conditioner__scale": 2, "conditioner__degradation": "bsr"},
    "inpaint": {},
}


@pytest.mark.parametrize("name", TASKS)
def test_task_trains_and_samples(name: str, weights: Path, tmp_path: Path) -> None:
    task = name.split("-")[0]
    folder = train(
        tmp_path / "run",
        task=task,
        trainer__max_steps=2,
        first_stage__weights=weights,
        unet__dropout=0.1,
        **TASKS[name],
    )
    assert sorted(losses(folder)) == [0, 1]
    run, ldm = check(folder)
    assert (folder / "pipeline").exists() == (name == "text-bert")
    if name == "inpaint":
        columns = condition_columns(run.task, run.config, 3)
        drawn = draw(ldm, "inpaint", columns, 3, (16, 16), run.config.sampling)
        known = (columns["hole"] < 0.5).expand(-1, 3, -1, -1)
        assert torch.equal(drawn[known], columns["image"][known]), "what is known stays"


def test_frozen_text_encoder_trains_samples_and_takes_new_captions(weights: Path, tmp_path: Path) -> None:
    options = {"conditioner__kind": "frozen", "trainer__max_steps": 2, "first_stage__weights": weights}
    run, ldm = check(train(tmp_path / "run", **options))
    known = run.task.caption_columns(run.task.captions[:3])["tokens"]
    assert torch.equal(known[:, 0], run.task.reference.columns["tokens"][:3, 0])
    fresh = run.task.caption_columns(["a caption that nobody has trained on", run.task.captions[0]])
    assert fresh["tokens"].shape == (2, 1)
    images = draw(ldm, "text", fresh, 2, (16, 16), run.config.sampling)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    "options", [{"first_stage__kind": "vq", "first_stage__n_embed": 16}, {"first_stage__kind": "pixels"}]
)
def test_other_first_stages_train_and_sample(options: dict[str, Any], weights: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", task="class", trainer__max_steps=2, first_stage__steps=4, **options)
    _, ldm = check(folder)
    assert ldm.first_stage_model.downsampling == (1 if options["first_stage__kind"] == "pixels" else 2)


def test_grey_images_become_rgb(weights: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        grey, labels = rng.integers(0, 255, (24, 28, 28), np.uint8), np.arange(24, dtype=np.uint8) % 10
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(grey))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels))
    data = {"data__name": "fashion_mnist", "data__path": tmp_path, "data__size": 32, "data__train_images": 16}
    for task in ("class", "superres"):
        folder = train(
            tmp_path / task, task=task, trainer__max_steps=1, first_stage__weights=weights, conditioner__scale=2, **data
        )
        run, _ = check(folder, size=32)
        assert run.task.train.__getitems__([0])["image"].shape == (1, 3, 32, 32) and len(run.task.train) == 16


class Collage(torch.utils.data.Dataset[dict[str, Any]]):
    """Items with PhotoCollage's keys."""

    def __init__(self, split: str, n: int, size: int, seed: int, root: object) -> None:
        self.n, self.size = n, size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return {
            "image": torch.full((3, self.size, self.size), index, dtype=torch.uint8),
            "caption": f"collage {index}",
            "label": index % 3,
            "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]),
            "categories": torch.tensor([index % 7, -1]),
            "label_map": torch.full((self.size, self.size), index % 8, dtype=torch.uint8),
        }


@pytest.mark.parametrize("task", ["layout", "semantic", "text"])
def test_photos_serve_every_task(task: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "PhotoCollage", Collage)
    options = {"task": task, "data__name": "photos", "trainer__max_steps": 1, "first_stage__weights": weights}
    check(train(tmp_path / "run", **options))


def picture(path: Path, colour: tuple[int, ...], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 18), colour).save(path)


@pytest.fixture
def own_images(tmp_path: Path) -> Path:
    """Thirty captioned images, one of them transparent."""
    folder = tmp_path / "own"
    lines = []
    for i in range(30):
        picture(folder / f"{i}.png", (8 * i, 0, 0) if i else (0, 255, 0, 0), "RGB" if i else "RGBA")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"red {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_own_images_train_with_a_held_out_tenth(own_images: Path, weights: Path, tmp_path: Path) -> None:
    parts = {split: user_images(str(own_images), 16, split, seed=0) for split in ("train", "test")}
    captions = [caption for part in parts.values() for caption in part.captions]
    assert sorted(captions) == sorted(f"red {i}" for i in range(30)) and len(parts["test"]) == 3
    assert parts["train"][0]["caption"] == parts["train"].captions[0]
    moved = own_images.rename(tmp_path / "elsewhere")
    assert user_images(str(moved), 16, "test", seed=0).captions == parts["test"].captions
    options = {"data__name": "folder", "data__path": moved, "trainer__max_steps": 1, "first_stage__weights": weights}
    run, _ = check(train(tmp_path / "run", **options))
    assert len(run.task.train) == 27 and len(run.task.reference) == 3


def test_saved_data_set_without_a_test_split_holds_a_tenth_out(tmp_path: Path, weights: Path) -> None:
    import datasets

    features = datasets.Features(
        {"photo": datasets.Image(), "en": datasets.Value("string"), "id": datasets.Value("string")}
    )
    for i in range(30):
        picture(tmp_path / "pictures" / f"{i}.png", (8 * i, 0, 0))
    rows = {
        "photo": [{"bytes": (tmp_path / "pictures" / f"{i}.png").read_bytes(), "path": None} for i in range(30)],
        "en": [f"red {i}" for i in range(30)],
        "id": [str(i) for i in range(30)],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    train, test = (open_dataset(DataConfig("hf", str(tmp_path / "saved"), size=16), part) for part in ("train", "test"))
    assert len(train) == 27 and len(test) == 3 and not set(train.captions) & set(test.captions)  # type: ignore
    with pytest.raises(UserError, match="no caption column 'text'; its columns are photo, en, id"):
        open_dataset(DataConfig("hf", str(tmp_path / "saved"), text_column="text"), "train")


def test_transparent_image_is_laid_on_white(own_images: Path) -> None:
    parts = [user_images(str(own_images), 16, split, seed=0) for split in ("train", "test")]
    (image,) = [part[i]["image"] for part in parts for i in range(len(part)) if part.captions[i] == "red 0"]
    assert (image == 255).all()


def test_class_folders_train_class_conditionally(weights: Path, tmp_path: Path) -> None:
    for i in range(24):
        picture(tmp_path / "own" / ("cats" if i % 2 else "dogs") / f"{i}.png", (i, i, i))
    options = {"data__name": "folder", "data__path": tmp_path / "own", "first_stage__weights": weights}
    run, _ = check(train(tmp_path / "run", task="class", trainer__max_steps=1, **options))
    assert run.task.num_classes == 3, "two classes and the null class"


def test_large_data_are_read_when_needed(weights: Path, tmp_path: Path) -> None:
    config = LdmConfig(task="layout", data=DataConfig("shapes", size=16, train_images=40, eval_images=8))
    small = prepare(config).train
    config.data.max_memory_gb = 1e-6
    lazy = prepare(config).train
    assert isinstance(small, TensorTable) and isinstance(lazy, LazyTable) and len(lazy) == 40
    rows = lazy.__getitems__([5, 3])
    assert rows.keys() == small.columns.keys()
    assert all(torch.equal(rows[k], small.columns[k][[5, 3]]) for k in rows)
    for task in ("class", "semantic", "inpaint"):
        options = {"data__max_memory_gb": 1e-6, "trainer__max_steps": 1, "first_stage__weights": weights}
        check(train(tmp_path / task, task=task, **options))


def test_tokenizer_and_first_weights_are_functions_of_captions_and_seed() -> None:
    captions = [f"a {a} {b} left of a {c}" for a in ("red", "blue") for b in ("star", "ring") for c in ("box", "heart")]
    vocabularies = [train_tokenizer(c, 64, 12).get_vocab() for c in (captions, captions[::-1], captions)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    config = LdmConfig(data=DataConfig("shapes", size=16, train_images=8, eval_images=4))
    states = []
    for seed in (0, 0, 1):
        config.seed = seed
        torch.rand(seed + 7)  # whatever was drawn before does not matter
        conditioner = prepare(config).conditioner
        assert conditioner is not None
        states.append(conditioner.state_dict()["bert.encoder.layer.0.output.dense.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        ("nothing", {}, r"no such folder"),
        ("empty", {}, r"no images in it"),
        ("few", {}, r"5 images are too few; at least 20"),
        ("bad_line", {}, r"metadata.jsonl line 2: not JSON"),
        ("captions", {"data__text_column": "says"}, r"no caption column 'says'; its columns are file_name, text"),
        ("captions", {"task": "class"}, r"task class needs a class for every image"),
        ("captions", {"task": "layout"}, r'task layout needs "boxes"'),
        ("captions", {"data__size": 15}, r"--data.size 15 cannot be halved"),
        ("captions", {"trainer__accumulate": 3}, r"cannot be divided into --trainer.accumulate 3"),
        ("captions", {"trainer__accelerator": "cuda"}, r"trainer options accelerator cuda"),
        ("captions", {"trainer__strategy": "dpp"}, r"strategy dpp"),
        ("captions", {"resume": "gone.ckpt"}, r"--resume gone.ckpt: no such file"),
        ("captions", {"stages": "[diffusion]", "first_stage__weights": "null"}, r"--stages lacks first_stage"),
    ],
)
def test_mistake_is_one_sentence(
    make: str, options: dict[str, Any], sentence: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    if make != "nothing":
        own.mkdir()
    for i in range({"few": 5, "captions": 24, "bad_line": 2}.get(make, 0)):
        picture(own / f"{i}.png", (i, i, i))
        with (own / "metadata.jsonl").open("a") as file:
            file.write(
                '{"file_name": oops\n' if make == "bad_line" and i else f'{{"file_name": "{i}.png", "text": "x"}}\n'
            )
    if options.get("trainer__accelerator") == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"data__name": "folder", "data__path": own, "first_stage__weights": weights, **options}
    refused(sentence, train, tmp_path / "run", **given)


def test_folder_without_a_path_is_one_sentence() -> None:
    refused(r"data.name folder needs --data.path", open_dataset, DataConfig("folder"), "train")
