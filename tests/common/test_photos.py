"""PhotoCollage on a tiny made-up copy of the packages; the last test looks at the real ones where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import photos
from common.data.photos import CATEGORIES, SCENES, SPLITS, PhotoCollage, list_cutouts, noun_phrase, plural
from common.errors import UserError

USERS_CACHE = os.environ.get("REPRO_CACHE")
FOLDERS = ("animals/birds", "food/fruit", "plants", "household/tools", "vehicles/auto", "hobbies", "sports")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 noisy discs with captions, a drawing, a flag and a stamp without caption, and 13 noisy scenes."""
    base = tmp_path_factory.mktemp("packages")
    rng = np.random.default_rng(0)
    stamps = base / "usr/share/tuxpaint/stamps"

    def stamp(name: str, caption: str | None, flat: bool = False) -> None:
        path = stamps / name
        path.parent.mkdir(parents=True, exist_ok=True)
        h, w = (int(side) for side in rng.integers(20, 60, 2))
        rgba = np.full((h, w, 4), 90, np.uint8) if flat else rng.integers(0, 256, (h, w, 4), dtype=np.uint8)
        y, x = np.ogrid[:h, :w]
        inside = ((y - h / 2) / h) ** 2 + ((x - w / 2) / w) ** 2 < 0.2
        rgba[..., 3] = 255 * inside
        Image.fromarray(rgba).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas\n", encoding="utf-8")

    for i in range(40):
        stamp(f"{FOLDERS[i % 7]}/thing{i}.png", f"A thing number {i}.")
    stamp("food/drawing.png", "A drawing.", flat=True)
    stamp("flags/flag.png", "A flag.")
    stamp("food/unnamed.png", None)
    stamp("food/sentence.png", "Eat this every day and you will be strong!")
    for name, _ in SCENES:
        path = base / "usr/share/backgrounds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return base


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path_factory.getbasetemp() / "photo-cache"))


def collage(root: Path, split: str = "train", **options) -> PhotoCollage:
    return PhotoCollage(split, **{"n": 60, "size": 32, "root": root, **options})  # type: ignore[arg-type]


def test_only_captioned_photographs_are_cutouts(root: Path) -> None:
    found = list_cutouts(root / "usr/share/tuxpaint/stamps")
    assert {cutout.noun for cutout in found} == {f"a thing number {i}" for i in range(40)}
    assert {cutout.category for cutout in found} == set(CATEGORIES)


@pytest.mark.filterwarnings("ignore:.*photographic cut-outs")
class TestPictures:
    def test_item_is_a_pure_function_of_seed_split_and_index(self, root: Path) -> None:
        first, again, other = collage(root), collage(root, n=500), collage(root, seed=1)
        for i in (7, 3):
            assert first[i]["caption"] == again[i]["caption"]
            assert all(torch.equal(first[i][k], again[i][k]) for k in ("image", "masks", "boxes", "label_map"))
        assert any(first[i]["caption"] != other[i]["caption"] for i in range(5))
        assert first.fingerprint == collage(root).fingerprint != other.fingerprint

    def test_boxes_masks_label_map_and_background_agree(self, root: Path) -> None:
        data = collage(root)
        counts = set()
        for i in range(len(data)):
            item = data[i]
            assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.uint8
            n = item["count"]
            counts.add(n)
            assert item["masks"][:n].any(2).any(1).all() and not item["masks"][n:].any()
            assert item["masks"].sum(0).max() == 1, "objects overlap"
            expected = torch.zeros(32, 32, dtype=torch.uint8)
            for slot in range(n):
                y, x = torch.nonzero(item["masks"][slot], as_tuple=True)
                box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 32
                torch.testing.assert_close(item["boxes"][slot], box)
                expected[item["masks"][slot]] = 1 + item["categories"][slot]
            assert (item["categories"][n:] == -1).all() and (item["objects"][n:] == -1).all()
            assert torch.equal(item["label_map"], expected)
            assert item["label"] == item["categories"][0]
            # What changed against the empty scene lies within a pixel of the boxes (soft edges included).
            changed = (item["image"] != item["background"]).any(0)
            near = torch.zeros(32, 32, dtype=torch.bool)
            for x0, y0, x1, y1 in (item["boxes"][:n] * 32).round().int().tolist():
                near[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = True
            assert changed.any() and not (changed & ~near).any()
        assert counts == {1, 2, 3, 4}

    def test_captions_tell_the_truth_about_positions(self, root: Path) -> None:
        data = collage(root, "relation", n=80)
        seen = set()
        for i in range(len(data)):
            item = data[i]
            relation = next(r for r in photos.RELATIONS if f" {r} " in item["caption"])
            first, rest = item["caption"].split(f" {relation} ")
            assert data.nouns[item["objects"][0]] == first and rest.startswith(data.nouns[item["objects"][1]])
            a, b = item["boxes"][0], item["boxes"][1]
            holds = {"left of": a[2] <= b[0], "right of": a[0] >= b[2], "above": a[3] <= b[1], "below": a[1] >= b[3]}
            assert holds[relation]
            seen.add(relation)
        assert seen == set(photos.RELATIONS)

    @pytest.mark.parametrize("split", SPLITS)
    def test_each_split_breaks_its_own_rule_only(self, root: Path, split: str) -> None:
        data = collage(root, split)
        for i in range(len(data)):
            item = data[i]
            nouns = [data.nouns[k] for k in item["objects"][: item["count"]]]
            relation = next((r for r in photos.RELATIONS if f" {r} " in item["caption"]), "")
            broken = data.broken_rules(nouns, relation, item["scene"])
            assert broken == ({split} if split != "train" else set())
            assert item["caption"].endswith(SCENES[item["scene"]][1])

    def test_held_out_shares_are_as_stated(self, root: Path) -> None:
        data = collage(root)
        pairs = [(noun, s) for noun in data.nouns for s in range(len(SCENES)) if noun not in data.held_out_objects]
        share = np.mean(["scene" in data.broken_rules([noun], "", s) for noun, s in pairs])
        assert len(data.held_out_objects) == 20 and 0.06 < share < 0.18
        mirrored = [("left of", "right of"), ("above", "below")]
        for there, back in mirrored:
            for a, b in zip(data.nouns, data.nouns[1:]):
                one, other = data.broken_rules([a, b], there, 0), data.broken_rules([b, a], back, 0)
                assert ("relation" in one) == ("relation" in other)

    def test_broken_and_missing_files_are_named(self, root: Path, tmp_path: Path) -> None:
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(root, copy)
        scene = copy / "usr/share/backgrounds" / SCENES[0][0]
        scene.write_bytes(b"no image")
        with pytest.raises(UserError, match=rf"{SCENES[0][0]}: cannot be read"):
            collage(copy)
        scene.unlink()
        with pytest.raises(UserError, match="missing; run `make data-photos`"):
            collage(copy)


def test_missing_packages_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `make data-photos`"):
        PhotoCollage(root=tmp_path)
    with pytest.raises(UserError, match="no split 'val'"):
        PhotoCollage("val", root=tmp_path)  # type: ignore[arg-type]


def test_captions_become_noun_phrases_and_plurals() -> None:
    assert noun_phrase("A Magellanic penguin.", "magellanic_penguin") == "a Magellanic penguin"
    assert noun_phrase("A “Fuji” apple.", "apple_fuji") == "a Fuji apple"
    assert noun_phrase("An hippopotamus.", "hippopotamus") == "a hippopotamus"
    assert noun_phrase("Put your letter in here!", "box") is None
    assert plural("a pair of open scissors", 3) == "three pairs of open scissors"
    assert plural("a mouse", 2) == "two mice"
    assert plural("a dromedary", 4) == "four dromedaries"
    assert plural("a pattypan squash", 2) == "two pattypan squashes"
    assert plural("two wild boars", 2) is None


def test_real_packages_hold_245_photographic_cutouts(monkeypatch: pytest.MonkeyPatch) -> None:
    if USERS_CACHE is None:
        monkeypatch.delenv("REPRO_CACHE")
    else:
        monkeypatch.setenv("REPRO_CACHE", USERS_CACHE)
    try:
        data = PhotoCollage(n=100, size=64)
    except UserError as error:
        pytest.skip(f"the photo packages are not here: {error}")
    assert abs(len(data.sprites.cutouts) - photos.EXPECTED_CUTOUTS) <= 12
    by_category = {c: sum(cutout.category == c for cutout in data.sprites.cutouts) for c in CATEGORIES}
    assert by_category["animal"] > 90 and by_category["food"] > 35 and min(by_category.values()) >= 8
    assert all(noun.split()[0] in ("a", "an", "two") for noun in data.nouns)
