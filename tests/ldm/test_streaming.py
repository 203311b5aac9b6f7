"""Training from shards: exact resume, a shard held out, and what a stream cannot give is said in one sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.data.shards import ShardedImages
from common.errors import UserError
from ldm.run import Run
from ldm.sample import main as sample_main
from ldm.streaming import ShardStream
from ldm.train import main
from tests.common.pictures import parquet
from tests.ldm.test_train import CLOSE
from tests.ldm.tiny_run import arguments, assert_goes_on_exactly, config_of, first_stage_of, losses, train
from tests.refusals import refused

COLOURS = ("black", "grey", "white")


def write_shard(path: Path, rows: int, generator: torch.Generator, first: int, **drop: bool) -> None:
    images, labels = [], [(first + row) % 3 for row in range(rows)]
    for label in labels:
        pixels = torch.randint(0, 40, (20, 16, 3), generator=generator, dtype=torch.uint8) + 100 * label
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    columns = {"image": images, "text": [f"a {COLOURS[label]} wall" for label in labels], "label": labels}
    parquet(path, 5, **{name: column for name, column in columns.items() if name not in drop})


@pytest.fixture(scope="module")
def shards(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 9 rows and one of 24, which is the last by name."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        write_shard(folder / f"part-{number}.parquet", 9, generator, number)
    write_shard(folder / "part-9.parquet", 24, generator, 0)
    return folder


def options(shards: Path, **more: Any) -> dict[str, Any]:
    return {"data__name": "shards", "data__path": shards / "*.parquet", **more}


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text run from shards, never interrupted."""
    return train(tmp_path_factory.mktemp("reference") / "run", **options(shards))


def test_streamed_run_killed_in_both_stages_continues_with_the_same_losses_and_weights(
    shards: Path, reference: Path, tmp_path: Path
) -> None:
    assert_goes_on_exactly(tmp_path / "run", reference, **options(shards))
    assert len(set(losses(reference).values())) == 8


def test_loader_processes_and_micro_batches_see_a_whole_stream(shards: Path, reference: Path, tmp_path: Path) -> None:
    weights = {"first_stage__weights": first_stage_of(reference)}
    parts = train(tmp_path / "parts", **options(shards, trainer__accumulate=2, **weights))
    assert losses(parts) == pytest.approx(losses(reference), **CLOSE)
    workers = train(tmp_path / "workers", **options(shards, data__workers=1, **weights))
    assert losses(workers) == losses(reference)


def test_resume_with_other_workers_is_refused_since_they_change_the_order(
    shards: Path, reference: Path, tmp_path: Path
) -> None:
    checkpoint = reference / "diffusion" / "checkpoints" / "last.ckpt"
    weights = first_stage_of(reference)
    again = options(shards, resume=checkpoint, data__workers=2, first_stage__weights=weights, trainer__max_steps=9)
    refused("saved with workers=0 but now has workers=2", train, tmp_path / "run", **again)


def test_last_shard_is_held_out(shards: Path, reference: Path) -> None:
    run = Run.existing(reference)
    assert len(run.task.reference) == 24 and isinstance(run.task.train, ShardStream)
    held_out = {image.numpy().tobytes() for image in run.task.reference.columns["image"]}
    seen = {image.numpy().tobytes() for image in run.task.train.head(45)["image"]}
    assert len(held_out) == 24 and len(seen) == 45 and not held_out & seen
    assert run.task.captions[:3] == ["a black wall", "a grey wall", "a white wall"]


def test_run_from_shards_draws_and_is_evaluated(shards: Path, reference: Path, tmp_path: Path) -> None:
    sample_main(["--model", str(reference), "--out", str(tmp_path / "x.png"), "--count", "2", "--steps", "2"])
    assert Image.open(tmp_path / "x.png").width
    metrics = main([*arguments(reference, **options(shards)), "--stages", "[evaluate]"])
    assert metrics["judge"]["n_real"] == 24


@pytest.mark.parametrize("task", ["class", "unconditional", "superres", "inpaint"])
def test_other_tasks_train_from_shards(task: str, shards: Path, reference: Path, tmp_path: Path) -> None:
    weights = first_stage_of(reference)
    folder = train(tmp_path / "run", task=task, **options(shards, first_stage__weights=weights, trainer__max_steps=2))
    assert len(losses(folder)) == 2
    assert ("cond_stage_model.embedding.weight" in load_file(folder / "model.safetensors")) == (task == "class")
    if task == "class":
        assert Run.existing(folder).task.num_classes == 4


def test_held_out_shards_can_be_named(shards: Path, reference: Path, tmp_path: Path) -> None:
    weights = first_stage_of(reference)
    more = {"data__eval_path": shards / "part-0.parquet", "first_stage__weights": weights, "trainer__max_steps": 1}
    folder = train(tmp_path / "run", task="unconditional", **options(shards, **more))
    run = Run.existing(folder)
    assert len(run.task.reference) == 9 and config_of(folder).data.eval_path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data__path": "null"}, "data.name shards needs --data.path"),
        ({"data__path": "part-9.parquet"}, "one shard only, none to hold out; give --data.eval_path"),
        ({"data__path": "absent-*.parquet"}, "no shard matches"),
        ({"task": "semantic"}, 'task semantic needs "label_map"'),
        ({"task": "layout"}, 'task layout needs "boxes"'),
        ({"conditioner__kind": "frozen"}, "use bert or tau"),
        ({"trainer__batch_size": 9, "trainer__accumulate": 2}, "cannot be divided"),
    ],
)
def test_what_a_stream_cannot_give_is_said(change: dict[str, Any], sentence: str, shards: Path, tmp_path: Path) -> None:
    path = change.get("data__path")
    if path not in (None, "null"):
        change = {"data__path": shards / path}
    refused(sentence, train, tmp_path / "run", **{**options(shards), **change})


def test_missing_label_column_is_named(tmp_path: Path, shards: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.parquet", 9, torch.Generator().manual_seed(number), 0, label=True)
    with pytest.raises(UserError, match=r"no label column was found; its columns are image, text; name"):
        train(tmp_path / "run", task="class", data__name="shards", data__path=tmp_path / "*.parquet")


def test_captions_and_classes_are_read_without_the_images(shards: Path) -> None:
    images = ShardedImages(shards / "part-*.parquet", size=4, batch_size=1, label_column="label")
    assert images.captions(4) == ["a black wall", "a grey wall", "a white wall", "a black wall"]
    assert len(images.captions(1000)) == 69 and images.class_count() == 3
    assert ShardedImages(shards / "part-*.parquet", size=4, batch_size=1).class_count() == 0


def test_folders_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    for shard, names in (("a", ("cat", "dog")), ("b", ("dog", "fox"))):
        for name in names:
            (tmp_path / shard / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / shard / name / "1.png")
    images = ShardedImages([tmp_path / "a", tmp_path / "b"], size=4, batch_size=1)
    refused("other class names", images.class_count)
    assert ShardedImages(tmp_path / "b", size=4, batch_size=1).class_count() == 2
