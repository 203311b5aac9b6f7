"""The user's own images: every shape and mode of file, every mistake in one sentence, streams that resume exactly."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from common.data import folders
from common.data.folders import Framing, open_images
from common.data.shards import ShardedImages
from common.errors import UserError
from tests.common.pictures import captioned, level, parquet, pictures, png, told
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("own_cache")


def test_policies_cut_the_middle_a_seeded_place_or_nothing() -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, :10], stripes[:, 10:20], stripes[:, 20:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    picture = Image.fromarray(stripes)

    def frame(policy: str, seed: int = 0) -> torch.Tensor:
        return Framing(10, policy, (7, 7, 7))(picture, np.random.default_rng(seed))  # type: ignore[arg-type]

    middle = frame("centre")
    assert middle.dtype == torch.uint8 and (middle[1] == 255).all() and (middle[0] == 0).all()
    assert torch.equal(frame("random", 3), frame("random", 3))
    assert len({frame("random", seed).numpy().tobytes() for seed in range(8)}) > 4
    padded = frame("pad")
    assert (padded[:, 0] == 7).all() and (padded[:, -1] == 7).all()
    assert padded[0, 5, 1] > 200 and padded[1, 5, 5] > 200 and padded[2, 5, 9] > 200


def test_image_folder_yields_image_caption_and_label(tmp_path: Path) -> None:
    data = open_images(captioned(tmp_path / "d", 5), size=4)
    assert len(data) == 5
    assert [told(data[i]) for i in (0, 4, -2)] == [(0, "grey 0", -1), (4, "grey 4", -1), (3, "grey 3", -1)]
    assert data[0]["image"].shape == (3, 4, 4) and data[0]["image"].dtype == torch.uint8
    assert data.captions() == [f"grey {i}" for i in range(5)]


def test_class_folders_give_label_and_caption(tmp_path: Path) -> None:
    for name, value in (("red_fox", 10), ("lynx", 20)):
        (tmp_path / "d" / name / "deep").mkdir(parents=True)
        (tmp_path / "d" / name / "deep" / "a.PNG").write_bytes(png(value))
    data = open_images(tmp_path / "d", size=4)
    assert data.classes == ["lynx", "red_fox"]
    assert [told(data[i]) for i in range(2)] == [(20, "lynx", 0), (10, "red fox", 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "000.png"}', r'metadata\.jsonl line 12: "text" is missing'),
        ('{"text": "a"}', r'line 12: "file_name" is missing'),
        ('{"file_name": "000.png", "text": 3}', r'line 12: "text" must be a string, got 3'),
        ('{"file_name": "000.png", "text": ', r"line 12: not JSON"),
        ("[1, 2]", r"line 12: expected an object"),
        ('{"file_name": "nowhere.png", "text": "a"}', r"line 12: nowhere.png does not exist"),
        ('{"file_name": "../secret.png", "text": "a"}', r"line 12: .*leads out of the folder"),
        ('{"file_name": "x/../../secret.png", "text": "a"}', r"line 12: .*leads out of the folder"),
        ('{"file_name": "/etc/hostname", "text": "a"}', r"line 12: .*leads out of the folder"),
        ('{"file_name": "000.png", "text": "a", "label": 1.5}', r'line 12: "label" must be'),
        ('{"file_name": "000.png", "text": "a", "label": "cat"}', r'"label" is a string on some lines'),
    ],
)
def test_bad_metadata_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    root = captioned(tmp_path / "d", 11)
    (tmp_path / "secret.png").write_bytes(png(1))
    with (root / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    refused(message, open_images, root, size=4)


def test_empty_missing_and_unsorted_folders_are_one_sentence(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    for folder in (tmp_path / "empty", loose):
        folder.mkdir()
    refused("empty: no images in it", open_images, tmp_path / "empty", size=4)
    refused("nowhere: there is no such folder", open_images, tmp_path / "nowhere", size=4)
    (loose / "a.png").write_bytes(png(1))
    refused(r"loose: 1 images but no metadata.jsonl", open_images, loose, size=4)
    refused(r"a.png: not a folder", open_images, loose / "a.png", size=4)
    (loose / "metadata.jsonl").write_text("\n")
    refused("it has no line", open_images, loose, size=4)
    refused("unknown resize policy 'stretch'", open_images, loose, size=4, policy="stretch")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:skipped .*042")
@pytest.mark.parametrize("scan", [True, False])
def test_broken_image_is_named_and_replaced_by_the_next_good_one(tmp_path: Path, scan: bool) -> None:
    root = captioned(tmp_path / "d", 200)
    for i in (41, 42):
        (root / f"{i:03d}.png").write_bytes(png(i)[:-25])
    with pytest.warns(UserWarning, match=r"skipped .*041\.png"):
        data = open_images(root, size=4, scan=scan)
        items = [data[i] for i in (41, 40, 42, 43)]
    assert [told(item) for item in items] == [(n, f"grey {n}", -1) for n in (43, 40, 43, 43)]
    assert len(data) == 200 and data.corrupt.sum() == 2


@pytest.mark.filterwarnings("ignore:skipped")
def test_more_than_one_per_cent_broken_stops_with_the_list(tmp_path: Path) -> None:
    root = captioned(tmp_path / "d", 200)
    for i in (3, 5, 190):
        (root / f"{i:03d}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3 of 200 images cannot be read") as error:
        open_images(root, size=4)
    assert all(f"{i:03d}.png" in str(error.value) for i in (3, 5, 190))
    lazy = open_images(root, size=4, scan=False)
    loader = DataLoader(lazy, batch_size=50, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(UserError, match=r"3 of 200 images cannot be read"):
        list(loader)  # the workers' finds add up: neither alone sees all three


def test_scan_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = captioned(tmp_path / "d", 20)
    open_images(root, size=4)
    calls = []
    real = folders.decoded
    monkeypatch.setattr(folders, "decoded", lambda source, side: calls.append(source) or real(source))
    open_images(root, size=4)
    assert calls == []
    (root / "007.png").write_bytes(png(99, (9, 9)))
    open_images(root, size=4)
    assert len(calls) == 20


def test_random_crop_depends_on_index_and_step_only(tmp_path: Path) -> None:
    root = captioned(tmp_path / "d", 2)
    noise = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(noise).save(root / f"{i:03d}.png")
    data = open_images(root, size=8, policy="random", seed=5)
    again = open_images(root, size=8, policy="random", seed=5)
    assert torch.equal(data[0, 3]["image"], again[0, 3]["image"])
    assert torch.equal(data[1]["image"], again[1]["image"])
    assert not torch.equal(data[0, 3]["image"], data[0, 4]["image"])
    assert not torch.equal(data[0]["image"], data[1]["image"])
    assert data.fingerprint != open_images(root, size=8, policy="random", seed=6).fingerprint


def hub_table(n: int = 6):
    import datasets

    label = datasets.ClassLabel(names=["dark", "very_dark"])
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string"), "label": label})
    texts, labels = [f"grey {i}" for i in range(n)], [i % 2 for i in range(n)]
    return datasets.Dataset.from_dict({"picture": pictures(range(n)), "text": texts, "label": labels}, features)


def test_dataset_saved_to_disk_and_parquet_open_by_path(tmp_path: Path) -> None:
    hub_table().save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    hub_table().to_parquet(tmp_path / "parquet" / "part.parquet")
    for name in ("saved", "parquet"):
        data = open_images(tmp_path / name, size=4, image_column="picture")
        assert [told(data[i]) for i in (0, 5)] == [(0, "grey 0", 0), (5, "grey 5", 1)]
        assert data.classes == ["dark", "very_dark"]
        columns = "no image column 'image'; its columns are picture, text, label"
        refused(columns, open_images, tmp_path / name, size=4, image_column="image")
        assert level(open_images(tmp_path / name, size=4)[3]) == 3, "the one column that may hold pictures"
        with pytest.raises(UserError, match="no caption column 'prompt'"):
            open_images(tmp_path / name, size=4, image_column="picture", caption_column="prompt")


def test_hub_name_offline_is_one_sentence() -> None:
    with pytest.raises(UserError, match="nobody/nothing: neither a folder on this machine nor a Hugging Face data set"):
        open_images("nobody/nothing", size=4)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six parquet shards of 7 to 12 rows in row groups of 4; grey level = running number (57 images)."""
    for shard, start in enumerate((0, 7, 15, 24, 34, 45)):
        numbers = range(start, start + 7 + shard)
        path = tmp_path / "shards" / f"part-{shard}.parquet"
        parquet(path, 4, image=pictures(numbers), text=[f"grey {i}" for i in numbers])
    return tmp_path / "shards"


def stream(shards: Path, **options) -> ShardedImages:
    return ShardedImages(str(shards / "*.parquet"), **{"size": 4, "batch_size": 3, "buffer": 5, "seed": 1, **options})


def batches(data: ShardedImages, count: int) -> list[list[int]]:
    context = "fork" if data.workers else None
    loader = DataLoader(data, data.batch_size, num_workers=data.workers, multiprocessing_context=context)
    return [batch["image"][:, 0, 0, 0].tolist() for batch, _ in zip(loader, range(count))]


def test_one_epoch_shows_every_image_once_shuffled_with_its_caption(shards: Path) -> None:
    items = list(stream(shards, repeat=False))
    assert sorted(level(item) for item in items) == list(range(57))
    assert [level(item) for item in items] != sorted(level(item) for item in items)
    assert all(item["caption"] == f"grey {level(item)}" for item in items)


@pytest.mark.parametrize("world", [2, 4, 16])
def test_ranks_share_an_epoch_without_overlap(shards: Path, world: int) -> None:
    seen = [level(item) for rank in range(world) for item in stream(shards, rank=rank, world=world, repeat=False)]
    assert sorted(seen) == list(range(57))


@pytest.mark.filterwarnings("ignore:.*suggested max number of worker")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_stream_resumes_exactly_at_any_step(shards: Path, workers: int) -> None:
    whole = batches(stream(shards, workers=workers), 45)  # more than two epochs of 19 batches
    assert len({tuple(batch) for batch in whole}) > 30
    for step in (1, 4, 17, 26):
        resumed = stream(shards, workers=workers)
        resumed.load_state_dict(stream(shards, workers=workers).state_dict(step))
        assert batches(resumed, 45 - step) == whole[step:]


def test_resume_with_another_layout_is_refused(shards: Path) -> None:
    state = stream(shards).state_dict(4)
    refused("saved with batch_size=3 but now has batch_size=4", stream(shards, batch_size=4).load_state_dict, state)
    refused("workers=2, but the DataLoader has num_workers=0", next, iter(stream(shards, workers=2)))


def test_image_folders_serve_as_shards(tmp_path: Path) -> None:
    captioned(tmp_path / "s" / "a", 4)
    captioned(tmp_path / "s" / "b", 3)
    data = ShardedImages([tmp_path / "s" / "a", tmp_path / "s" / "b"], size=4, batch_size=1, repeat=False)
    assert sorted(item["caption"] for item in data) == sorted(f"grey {i}" for n in (4, 3) for i in range(n))


def test_stream_replaces_broken_images_and_stops_when_there_are_many(shards: Path) -> None:
    images = pictures(range(120))
    texts = [str(i) for i in range(120)]
    images[60] = {"bytes": b"broken", "path": None}
    only = parquet(shards / "only.parquet", image=images, text=texts)
    with pytest.warns(UserWarning, match=r"skipped .*only.parquet row 60"):
        items = list(ShardedImages(only, size=4, batch_size=1, repeat=False))
    assert len(items) == 120 and "60" not in {item["caption"] for item in items}
    images[61] = images[60]
    parquet(only, image=images, text=texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"2 of 120 images cannot be read(.|\n)*only.parquet row 6[01]"):
            list(ShardedImages(only, size=4, batch_size=1, repeat=False))


def test_missing_truncated_and_wrong_shards_are_named(shards: Path) -> None:
    refused("no shard matches", stream, shards / "nowhere")
    refused("there is no such shard", ShardedImages, shards / "x.parquet", size=4, batch_size=1)
    refused("no caption column 'caption'; its columns are image, text", stream, shards, caption_column="caption")
    path = shards / "part-3.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    refused(r"part-3.parquet: not a whole parquet file", stream, shards)
