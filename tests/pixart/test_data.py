"""The pictures of a stage: scenes on any canvas, grades of captions, buckets, the user's folder, feature caches."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.shapes import is_heldout_relation, relation_between
from common.data.shapes_verifier import verify
from common.errors import UserError
from common.images import save_png
from pixart.buckets import BucketBatchSampler
from pixart.config import DataConfig
from pixart.data import draw_scene, on_square, open_pictures, pad_to_square, stage_buckets
from pixart.features import Codec, edge_map, open_features
from pixart.text import TextEncoder
from tests.pixart.tiny_run import tiny_vae

WORLD: dict[str, Any] = {"shapes": ["circle", "square", "ring"], "colours": ["red", "green", "blue", "yellow"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))


def scenes(**options: Any) -> Any:
    return open_pictures(DataConfig(**{"images": 60, "eval_images": 30, **WORLD, **options}), "train", 0, 8)


def test_stage_one_shows_one_object_labelled_by_shape_and_colour() -> None:
    pictures = scenes(scenes="one")
    assert pictures.classes == 12 and pictures.specs is not None
    for label, spec in zip(pictures.labels_N.tolist(), pictures.specs):
        assert spec.objects == ((WORLD["colours"][label // 3], WORLD["shapes"][label % 3]),)
    assert verify(pictures.images(range(60)).numpy(), pictures.specs).mean() > 0.95


def test_dense_captions_name_every_object_of_a_scene() -> None:
    pictures = scenes()
    counts = {len(spec.objects) for spec in pictures.specs}
    assert counts == {1, 2, 3}
    for caption, spec in zip(pictures.captions, pictures.specs):
        assert all(f"{colour} {shape}" in caption for colour, shape in spec.objects)
        assert "background" in caption and caption.count("solid") == len(spec.objects)


def test_web_captions_drop_attributes_and_may_belong_to_another_picture() -> None:
    dense, web = scenes(images=300), scenes(images=300, captions="web")
    words = [sum(len(c.split()) for c in p.captions) for p in (dense, web)]
    assert words[1] < 0.5 * words[0]
    named = [
        (set(c.split()) & set(WORLD["colours"]), {colour for colour, _ in s.objects})
        for c, s in zip(web.captions, web.specs)
    ]
    foreign = np.mean([not told <= shown for told, shown in named if told])
    assert 0.02 < foreign < 0.3
    assert torch.equal(dense.images([0, 1]), web.images([0, 1])), "the grade of captions must not change the pictures"


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_scenes_fit_their_canvas_and_keep_their_relation(ratio: float) -> None:
    rng = np.random.default_rng(0)
    for task in ("position", "attr", "three", "count") * 10:
        scene = draw_scene(rng, task, **{k: tuple(v) for k, v in WORLD.items()}, textures=("solid",), ratio=ratio)
        placed = on_square(scene, ratio)
        for o in placed.objects:
            x0, y0, x1, y1 = o.box
            assert x0 >= -1e-6 and y0 >= -1e-6 and x1 <= min(1, 1 / ratio) + 1e-6 and y1 <= min(1, ratio) + 1e-6
        for i, first in enumerate(placed.objects):
            for second in placed.objects[i + 1 :]:
                shown = relation_between(first, second)
                assert shown is None or not is_heldout_relation(first.pair, shown, second.pair)
        if scene.relation is not None:
            assert relation_between(*placed.objects) == scene.relation


def test_verifier_reads_pictures_that_are_not_square_once_they_are_padded() -> None:
    pictures = scenes(scenes="few", size=64, ratios=[0.5, 2.0], images=80)
    for bucket in (0, 1):
        rows = pictures.members(bucket)
        images = pictures.images(rows)
        assert tuple(images.shape[2:]) == (pictures.buckets[bucket].height, pictures.buckets[bucket].width)
        assert verify(pad_to_square(images).numpy(), [pictures.specs[i] for i in rows]).mean() > 0.9


def test_pictures_are_a_function_of_seed_and_index() -> None:
    config = DataConfig(images=20, **WORLD)
    first, again = open_pictures(config, "train", 0, 8), open_pictures(config, "train", 0, 8, count=10)
    other, test = open_pictures(config, "train", 1, 8), open_pictures(config, "test", 0, 8, count=20)
    assert first.captions[:10] == again.captions
    assert first.captions != other.captions and not set(first.captions) & set(test.captions)
    assert len({p.fingerprint for p in (first, again, other, test)}) == 4


def test_mixed_baseline_draws_from_every_kind_of_scene() -> None:
    pictures = scenes(scenes="all")
    counts = [len(spec.objects) for spec in pictures.specs]
    assert set(counts[::3]) == {1} and max(counts[1::3]) == 3
    assert any("striped" in c or "checked" in c for c in pictures.captions[2::3])
    assert not any("striped" in c for c in pictures.captions[0::3])


def test_every_batch_holds_pictures_of_one_shape() -> None:
    pictures = scenes(size=64, ratios=[0.5, 1.0, 2.0])
    sampler = BucketBatchSampler(pictures.bucket_N, 4, 40, seed=0)
    shapes = {tuple(pictures.images(batch).shape) for batch in sampler}
    assert shapes == {(4, 3, b.height, b.width) for b in pictures.buckets} and len(shapes) == 3
    with pytest.raises(ValueError, match="several buckets"):
        pictures.images(range(60))


def test_ratios_choose_from_the_table_and_none_takes_all_of_it() -> None:
    square = stage_buckets(DataConfig(size=64), 8)
    assert [(b.height, b.width) for b in square] == [(64, 64)]
    assert len(stage_buckets(DataConfig(size=1024, ratios=[]), 16)) == 40


def folder_of(root: Path, sizes: list[tuple[int, int]], lines: bool = True) -> Path:
    rows = []
    for i, (height, width) in enumerate(sizes):
        save_png(Image.new("RGB", (width, height), (i * 9 % 255, 90, 200)), root / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"picture {i}", "label": i % 2})
    if lines:
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def own(root: Path, part: Any = "train", **options: Any) -> Any:
    """The user's pictures below `root`, of 16 pixels unless `options` say otherwise."""
    return open_pictures(DataConfig(**{"name": "folder", "path": str(root), "size": 16, **options}), part, 0, 8)


def test_own_folder_is_bucketed_by_shape_and_drops_long_strips(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", [(40, 40), (30, 60), (90, 45), (20, 100)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pictures = own(root, size=64, ratios=[0.5, 1.0, 2.0])
    assert pictures.captions == ["picture 0", "picture 1", "picture 2"] and pictures.classes == 2
    assert pictures.originals_N2.tolist() == [[40, 40], [30, 60], [90, 45]]
    assert [pictures.buckets[b].ratio for b in pictures.bucket_N.tolist()] == [1.0, 0.5, 2.0]
    assert pictures.images([1]).shape[3] == 2 * pictures.images([1]).shape[2]


def test_large_folder_keeps_some_pictures_apart(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", [(8, 8)] * 210)
    train, test = (own(root, part) for part in ("train", "test"))
    assert len(train) + len(test) == 210 and 2 <= len(test) <= 30
    assert not set(train.captions) & set(test.captions)


@pytest.mark.parametrize("count", [25, 3])
def test_given_splits_are_kept_apart_and_else_a_tenth_is_held_out(count: int, tmp_path: Path) -> None:
    def parts(root: Path) -> list[set[str]]:
        return [set(own(root, part).captions) for part in ("train", "test")]

    for name in ("train", "test"):
        folder_of(tmp_path / "split" / name, [(8, 8)] * count)
        rows = (tmp_path / "split" / name / "metadata.jsonl").read_text()
        (tmp_path / "split" / name / "metadata.jsonl").write_text(rows.replace("picture", name))
    train, test = parts(tmp_path / "split")
    assert train == {f"train {i}" for i in range(count)} and test == {f"test {i}" for i in range(count)}
    root = folder_of(tmp_path / "whole", [(8, 8)] * count)
    if count < 20:  # DreamBooth's handful: nothing can be held out, which is said
        with pytest.warns(UserWarning, match="too few pictures to hold some out"):
            assert parts(root) == [{f"picture {i}" for i in range(count)}] * 2
    else:
        train, test = parts(root)
        assert len(train) == count - 3 and len(test) == 3 and not train & test


def test_tables_of_pictures_are_read_as_folders_are(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = folder_of(tmp_path / "photos", [(40, 40), (30, 60), (90, 45)])
    cells = [{"bytes": (root / f"{i}.png").read_bytes(), "path": None} for i in range(3)]
    english, german = [f"picture {i}" for i in range(3)], [f"Bild {i}" for i in range(3)]
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"image": cells, "en": english, "de": german}), tmp_path / "table" / "train-0.parquet")
    options: dict[str, Any] = {"size": 64, "ratios": [0.5, 1.0, 2.0]}
    ours, theirs = own(tmp_path / "table", text_column="de", **options), own(root, **options)
    assert ours.captions == german and theirs.captions == english
    for i in range(3):
        assert torch.equal(ours.images([i]), theirs.images([i]))
    with pytest.raises(UserError, match=r"en and de may be the caption column.*--data.text_column"):
        own(tmp_path / "table", **options)


def test_a_truncated_picture_of_many_is_left_out(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", [(8, 8)] * 120)
    (root / "7.png").write_bytes((root / "7.png").read_bytes()[:-30])  # its header can be read
    with pytest.warns(UserWarning, match=r"skipped .*7\.png"):
        pictures = own(root)
    assert "picture 7" not in pictures.captions and len(pictures.images(range(len(pictures)))) == len(pictures)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 36}, "data.size 36: expected a multiple of 8"),
        ({"images": None}, "data.images is missing"),
        ({"images": 0}, "needs at least one image"),
        ({"shapes": ["blob"]}, "unknown 'blob'"),
        ({"ratios": [50.0]}, "must lie between"),
        ({"name": "folder"}, "data.path is missing"),
        ({"name": "folder", "path": "nowhere"}, "data.path nowhere: no such folder"),
        ({"name": "emoji", "ratios": [0.5]}, "emoji are square"),
    ],
)
def test_bad_data_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        scenes(**options)


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", [(8, 8)] * 4)
    (root / "2.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"skipped .*2.png"), pytest.raises(UserError, match="1 of 4 images cannot"):
        own(root)


def test_label_is_required_only_where_classes_are_learned(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", [(8, 8)] * 4, lines=False)
    pictures = own(root, prompt="a photo of sks dog")
    assert pictures.captions == ["a photo of sks dog"] * 4 and pictures.labels_N.tolist() == [-1] * 4


def test_cached_features_are_those_encoded_on_the_fly(tmp_path: Path) -> None:
    codec, encoder = Codec(tiny_vae(tmp_path / "vae")), TextEncoder(None, 40)
    options: dict[str, Any] = {"images": 12, "size": 32, "ratios": [0.5, 1.0], **WORLD}
    pictures = open_pictures(DataConfig(**options), "train", 0, 4)
    cached = open_features(pictures, codec, encoder, DataConfig(**options), edges=True, progress=False)
    fresh = open_features(pictures, codec, encoder, DataConfig(**options, cache=False), edges=True, progress=False)
    for bucket in (0, 1):
        rows = pictures.members(bucket)[::-1]
        ours, theirs = cached.__getitems__(rows), fresh.__getitems__(rows)
        assert ours.keys() == theirs.keys() >= {"moments", "edges", "caption", "mask", "label", "size", "ratio"}
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)
        assert ours["moments"].shape[1] == 2 * codec.channels and ours["caption"].dtype == torch.float16


def test_cache_folder_made_from_other_pictures_is_refused(tmp_path: Path) -> None:
    codec = Codec(tiny_vae(tmp_path / "vae"))
    config = DataConfig(images=6, size=16, cache_dir=str(tmp_path / "features"), **WORLD)
    open_features(open_pictures(config, "train", 0, 4), codec, None, config, progress=False)
    with pytest.raises(UserError, match="was made from other data"):
        open_features(open_pictures(config, "train", 1, 4), codec, None, config, progress=False)


def test_latents_are_a_fresh_draw_around_the_stored_mean(tmp_path: Path) -> None:
    codec = Codec(tiny_vae(tmp_path / "vae"))
    moments = codec.moments(scenes(size=16).images(range(4)))
    mean, std = moments.chunk(2, dim=1)
    assert (std > 0).all()
    noise = torch.randn_like(mean)
    torch.testing.assert_close(codec.latents(moments, noise) / codec.scaling_factor - mean, std * noise)
    assert codec.decode(codec.latents(moments, noise)).shape == (4, 3, 16, 16)


def test_edge_map_is_bright_at_borders_and_dark_elsewhere() -> None:
    image = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    image[:, :, :, 8:] = 20
    edges = edge_map(image)
    assert edges.dtype == torch.uint8 and (edges[..., 7:9] == 255).all()
    assert (edges[..., :6] == 0).all() and (edges[..., 10:] == 0).all()
