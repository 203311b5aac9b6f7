"""Facts about the captioned emoji: content of the archive, splits, determinism, rasterising (of a few icons only)."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import build_emoji_archive, emoji
from common.data.emoji import EmojiCap, EmojiGroups, EmojiRecord
from common.errors import UserError

SPLITS: tuple[emoji.Split, ...] = ("train", "test")


@pytest.fixture(scope="module")
def records() -> list[EmojiRecord]:
    return emoji.read_archive()[1]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[EmojiRecord]) -> list[EmojiRecord]:
    """A data set of six emoji in all styles and tones, in place of the whole one."""
    bases = {"1F34E", "1F44B", "2764-FE0F", "1F415", "1F680", "1F469-200D-1F680"}
    few = [record for record in records if record.base in bases]
    path = tmp_path / "emoji.jsonl.xz"
    emoji.write_archive(path, {}, few)
    monkeypatch.setattr(emoji, "ARCHIVE", path)
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    return emoji.read_archive(path)[1]


def test_archive_opens_with_the_standard_library_alone() -> None:
    with lzma.open(emoji.ARCHIVE, "rt", encoding="utf-8") as archive:
        lines = [json.loads(line) for line in archive]
    header, first, last = lines[0], lines[1], lines[-1]
    assert len(lines) == 1 + header["concepts"] + header["pictures"]
    assert {"hexcode", "base", "label", "tags", "group", "subgroup", "tone"} == set(first)
    assert {"style", "hexcode", "viewBox", "body"} == set(last)
    assert emoji.ARCHIVE.stat().st_size < 8e6


def test_styles_hold_as_many_emoji_as_their_sets_do(records: list[EmojiRecord]) -> None:
    # Joined icons before duplicates are removed, as counted in the packages by other means (all, without skin tones).
    expected = {
        "twemoji": (4112, 2077),
        "noto": (3746, 1680),
        "fluent-emoji-flat": (3138, 1593),
        "noto-v1": (2112, 1222),
        "emojione": (1702, 1292),
    }
    header, _ = emoji.read_archive()
    without_tone = Counter(record.style for record in records if not record.tone)
    assert set(header["styles"]) == set(expected) == set(emoji.PERMISSIVE_STYLES)
    for style, (everything, toneless) in expected.items():
        assert header["styles"][style]["matched"] == pytest.approx(everything, rel=0.04)
        assert without_tone[style] == pytest.approx(toneless, rel=0.08)
    assert len({record.hexcode for record in records}) == pytest.approx(3978, rel=0.01)


def test_only_permissive_licences_are_committed() -> None:
    sources = emoji.read_archive()[0]["sources"]
    assert {source["licence"] for source in sources} <= {"MIT", "Apache-2.0", "CC-BY-4.0"}
    notice = " ".join((Path(emoji.__file__).parents[2] / "NOTICE").read_text(encoding="utf-8").split())
    for source in sources:
        assert f"{source['package']} {source['version']}" in notice


def test_every_emoji_has_one_picture_per_style_and_a_group(records: list[EmojiRecord]) -> None:
    assert len({(record.hexcode, record.style) for record in records}) == len(records)
    assert {record.group for record in records} == set(range(len(emoji.GROUPS)))
    assert all(record.concept and record.body and len(record.view_box.split()) == 4 for record in records)


def test_captions_name_the_emoji_the_tone_and_the_style(records: list[EmojiRecord]) -> None:
    captions = {(record.hexcode, record.style): record.caption for record in records}
    assert captions["1F9D1-1F3FF-200D-1F680", "noto"] == "astronaut: dark skin tone, shaded style"
    assert captions["1F34E", "twemoji"] == "red apple, flat style"
    words = [emoji.STYLE_WORDS[style] for style in emoji.PERMISSIVE_STYLES + emoji.EXTRA_STYLES]
    assert len(set(words)) == len(words)


def test_flag_shared_by_countries_carries_the_plain_name(records: list[EmojiRecord]) -> None:
    labels = {record.concept for record in records if record.style == "twemoji"}
    assert {"flag: France", "flag: Australia"} <= labels
    assert not {"flag: St. Martin", "flag: Heard & McDonald Islands"} & labels


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F469-200D-1F680", "1F9D1-200D-1F680"),  # woman astronaut
        ("1F3C3-200D-2642-FE0F", "1F3C3"),  # man running
        ("1F468-200D-1F9AF-200D-27A1-FE0F", "1F9D1-200D-1F9AF"),  # man with white cane, facing right
        ("1F469-200D-2764-FE0F-200D-1F48B-200D-1F468", "1F9D1-200D-2764-200D-1F48B-200D-1F9D1"),
        ("1F48F", "1F9D1-200D-2764-200D-1F48B-200D-1F9D1"),  # kiss
        ("1F468-200D-1F469-200D-1F467", "1F46A"),  # family: man, woman, girl
        ("2764-FE0F", "2764"),
        ("1F34E", "1F34E"),
    ],
)
def test_family_drops_gender_and_direction(code: str, expected: str) -> None:
    assert emoji.family(code) == expected


@pytest.mark.parametrize("tones", ["none", "balanced", "all"])
@pytest.mark.parametrize("protocol", ["combo", "concept"])
def test_train_and_test_are_disjoint(protocol: emoji.Protocol, tones: emoji.SkinTones) -> None:
    train, test = (EmojiCap(split, protocol, skin_tones=tones) for split in SPLITS)
    assert len(train) > 5 * len(test) > 2000
    pairs = [{(record.base, record.style) for record in data.records} for data in (train, test)]
    assert not pairs[0] & pairs[1]
    if tones == "all":
        assert len(train) + len(test) == emoji.read_archive()[0]["pictures"]


def test_combo_holds_out_one_known_style_of_a_known_emoji() -> None:
    train, test = (EmojiCap(split, "combo", skin_tones="all") for split in SPLITS)
    held_out = defaultdict(set)
    for record in test.records:
        held_out[record.base].add(record.style)
    assert all(len(styles) == 1 for styles in held_out.values())
    trained = defaultdict(set)
    for record in train.records:
        trained[record.base].add(record.style)
    assert all(len(trained[base]) >= 3 for base in held_out)
    shares = Counter(next(iter(styles)) for styles in held_out.values())
    assert set(shares) == set(emoji.PERMISSIVE_STYLES) and min(shares.values()) > 100


def test_concept_never_shows_a_tone_or_gender_variant_of_a_test_emoji() -> None:
    train, test = (EmojiCap(split, "concept", skin_tones="all") for split in SPLITS)
    assert not {record.family for record in train.records} & {record.family for record in test.records}
    families = {record.family for data in (train, test) for record in data.records}
    assert len({record.family for record in test.records}) / len(families) == pytest.approx(0.08, abs=0.015)


def test_splits_do_not_depend_on_size_or_styles() -> None:
    everything = {(r.hexcode, r.style) for r in EmojiCap("test", size=64, skin_tones="all").records}
    noto = {(r.hexcode, r.style) for r in EmojiCap("test", size=32, styles=["noto"], skin_tones="all").records}
    assert noto == {pair for pair in everything if pair[1] == "noto"}


def test_balanced_tones_are_one_per_emoji_and_style_and_follow_seed_and_epoch() -> None:
    data, again, other = EmojiCap(seed=3), EmojiCap(seed=3), EmojiCap(seed=4)
    first = data.captions
    assert first == again.captions != other.captions
    assert len({(record.base, record.style) for record in data.records}) == len(data)
    data.set_epoch(1)
    assert data.captions != first
    data.set_epoch(0)
    assert data.captions == first
    toned = [record for record in data.records if record.tone]
    assert Counter(record.tone for record in toned).keys() >= {(tone,) for tone in range(1, 6)}
    assert 0.05 < len(toned) / len(data) < 0.3
    test = EmojiCap("test", seed=3)
    before = test.captions
    test.set_epoch(7)
    assert before == test.captions == EmojiCap("test", seed=9).captions


def test_caption_recipe_drops_the_style_in_a_tenth_and_adds_a_tag_in_three_tenths() -> None:
    data = EmojiCap(skin_tones="none")
    generator = torch.Generator().manual_seed(0)
    index = next(i for i, record in enumerate(data.records) if record.concept == "red apple")
    record = data.records[index]
    drawn = [data.caption_for(index, generator) for _ in range(3000)]
    words = f", {emoji.STYLE_WORDS[record.style]} style"
    assert all(caption.startswith("red apple") for caption in drawn)
    assert np.mean([words not in caption for caption in drawn]) == pytest.approx(0.1, abs=0.02)
    tagged = [caption.replace(words, "").removeprefix("red apple").removeprefix(", ") for caption in drawn]
    assert {tag for tag in tagged if tag} == set(record.tags)
    assert np.mean([bool(tag) for tag in tagged]) == pytest.approx(0.3, abs=0.03)
    replay = torch.Generator().manual_seed(0)
    assert [data.caption_for(index, replay) for _ in range(20)] == drawn[:20]


def test_groups_are_nine_classes_of_emoji_without_tones_or_components() -> None:
    train, test = (EmojiGroups(split) for split in SPLITS)
    assert len(EmojiGroups.class_names) == 9 and "component" not in EmojiGroups.class_names
    for data in (train, test):
        assert set(data.labels.tolist()) == set(range(9))
        assert not any(record.tone for record in data.records)
        groups = [emoji.GROUPS[record.group] for record in data.records]
        assert groups == [EmojiGroups.class_names[label] for label in data.labels]
    assert not {record.family for record in train.records} & {record.family for record in test.records}
    assert len(test) / (len(train) + len(test)) == pytest.approx(1 / 6, abs=0.03)


def test_items_are_uint8_pictures_on_white_with_caption_label_and_style(small: list[EmojiRecord]) -> None:
    data = EmojiCap("train", size=24, skin_tones="all")
    assert data.images.shape == (len(data), 24, 24, 3) and data.images.dtype == np.uint8
    assert data.rgba.shape == (len(data), 24, 24, 4)
    item = data[0]
    assert item["image"].dtype == torch.uint8 and item["image"].shape == (3, 24, 24)
    assert torch.equal(item["image"], torch.from_numpy(data.images[0]).permute(2, 0, 1))
    assert item["caption"] == data.records[0].caption
    assert item["label"] == data.records[0].group and data.styles[item["style"]] == data.records[0].style
    for record, rgba in zip(data.records, data.rgba):
        assert np.array_equal(rgba, emoji.render(record.svg, 24))
    assert (data.images[data.rgba[..., 3] == 0] == 255).all()
    groups = EmojiGroups("train", size=24)
    assert groups[0]["image"].shape == (3, 24, 24) and groups[0]["label"] == groups.labels[0]


def test_red_apple_is_red_and_a_dark_hand_darker_than_a_light_one(records: list[EmojiRecord]) -> None:
    def mean_colour(code: str, style: str) -> np.ndarray:
        record = next(record for record in records if (record.hexcode, record.style) == (code, style))
        rgba = emoji.render(record.svg, 32).astype(float)
        return (rgba[..., :3] * rgba[..., 3:]).sum((0, 1)) / rgba[..., 3].sum()

    for style in emoji.PERMISSIVE_STYLES:
        red, green, blue = mean_colour("1F34E", style)
        assert red > 1.5 * max(green, blue), style
        assert mean_colour("1F44B-1F3FF", style).mean() < 0.7 * mean_colour("1F44B-1F3FB", style).mean(), style


def test_pixels_are_cached_and_a_damaged_cache_is_made_again(
    small: list[EmojiRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = emoji.pixels(emoji.ARCHIVE, 16)
    (file,) = (tmp_path / "cache" / "emoji").iterdir()
    assert not fresh.flags.writeable
    emoji._pixels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(emoji, "render", lambda svg, size: pytest.fail("rasterised although cached"))
        assert np.array_equal(emoji.pixels(emoji.ARCHIVE, 16), fresh)
    emoji._pixels.cache_clear()
    file.write_bytes(file.read_bytes()[:-200])
    assert np.array_equal(emoji.pixels(emoji.ARCHIVE, 16), fresh)
    assert emoji._load_pixels(file, fresh.shape) is not None
    emoji._pixels.cache_clear()


def test_two_processes_give_the_pictures_of_one(small: list[EmojiRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_HELPER_FROM", 0)
    assert np.array_equal(emoji.pixels(emoji.ARCHIVE, 20), emoji.rasterise(small, 20, progress=False))


def test_unwritable_cache_is_named(small: list[EmojiRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match=r"No space left.*REPRO_CACHE"):
        emoji.pixels(emoji.ARCHIVE, 12)
    assert not list(emoji.cache_dir("emoji").iterdir())


def test_compositing_on_white_is_exact_for_opaque_clear_and_half_covered_pixels() -> None:
    rgba = np.array([[[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]]], dtype=np.uint8)
    assert emoji.on_white(rgba).tolist() == [[[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]]


def test_archive_round_trip_gives_equal_bytes(small: list[EmojiRecord], tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl.xz"
    emoji.write_archive(again, {}, list(reversed(small)))
    assert again.read_bytes() == emoji.ARCHIVE.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not xz", "wrong format", "missing line", "absent"])
def test_damaged_archive_is_refused_with_one_sentence(small: list[EmojiRecord], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged.jsonl.xz"
    data = emoji.ARCHIVE.read_bytes()
    text = lzma.decompress(data)
    middle = len(data) // 2
    content = {
        "truncated": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "not xz": b"<svg/>",
        "wrong format": lzma.compress(text.replace(b"captioned-emoji/1", b"captioned-emoji/9")),
        "missing line": lzma.compress(text[: text.rindex(b"\n", 0, -1) + 1]),
    }
    if damage != "absent":
        path.write_bytes(content[damage])
    with pytest.raises(UserError, match=r"damaged\.jsonl\.xz.*(restore|run)") as caught:
        emoji.read_archive(path)
    assert "\n" not in str(caught.value)


def test_wrong_options_name_the_choices(small: list[EmojiRecord]) -> None:
    with pytest.raises(UserError, match="twemoji"):
        EmojiCap(styles=["apple"])
    with pytest.raises(UserError, match="data-emoji-extra"):
        EmojiCap(styles=["openmoji"])
    with pytest.raises(UserError, match="train"):
        EmojiCap("valid")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="combo"):
        EmojiCap(protocol="random")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="balanced"):
        EmojiCap(skin_tones="some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="size"):
        EmojiCap(size=0)


def test_extra_styles_join_from_the_cache_without_moving_the_split(small: list[EmojiRecord], tmp_path: Path) -> None:
    alone = {(r.hexcode, r.style) for r in EmojiCap("test", skin_tones="all").records}
    extra = [dataclasses.replace(r, style="openmoji") for r in small if r.style == "twemoji"]
    emoji.write_archive(tmp_path / "cache" / "emoji" / emoji.EXTRA_ARCHIVE_NAME, {}, extra)
    styles = [*emoji.PERMISSIVE_STYLES, "openmoji"]
    train, test = (EmojiCap(split, styles=styles, skin_tones="all", size=16) for split in SPLITS)
    assert {(r.hexcode, r.style) for r in test.records if r.style != "openmoji"} == alone
    assert sum(r.style == "openmoji" for data in (train, test) for r in data.records) == len(extra)
    row = next(i for i, r in enumerate(train.records) if r.style == "openmoji")
    assert np.array_equal(train.rgba[row], emoji.render(train.records[row].svg, 16))


def test_icons_join_by_label_then_code_point_then_alias() -> None:
    emojibase = [
        {"label": "bear", "hexcode": "1F43B", "tags": ["animal"], "group": 3, "subgroup": 34},
        {
            "label": "waving hand",
            "hexcode": "1F44B",
            "group": 1,
            "subgroup": 16,
            "skins": [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB", "tone": 1}],
        },
        {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "group": 8, "subgroup": 90},
        {"label": "keycap: *", "hexcode": "002A-FE0F-20E3", "group": 8, "subgroup": 90},
        {"label": "flag: Curaçao", "hexcode": "1F1E8-1F1FC", "group": 9, "subgroup": 99},
    ]
    table = build_emoji_archive.emoji_table(emojibase, {})
    icons = {
        "bear-face": {"body": ""},
        "waving-hand-tone1": {"body": ""},
        "keycap": {"body": ""},
        "keycap-asterisk": {"body": ""},
        "flag-for-flag-curacao": {"body": ""},
        "waving-hand": {"body": "", "hidden": True},
        "unrelated": {"body": ""},
    }
    matched = build_emoji_archive.match_icons(
        icons, {"bear": {"parent": "bear-face"}}, {"002a-20e3": "keycap-asterisk"}, table
    )
    assert matched == {
        "1f44b-1f3fb": "waving-hand-tone1",
        "1f1e8-1f1fc": "flag-for-flag-curacao",
        "002a-20e3": "keycap-asterisk",
        "1f43b": "bear-face",
        "1f44b": "waving-hand",
    }


def test_view_box_is_widened_to_a_centred_square() -> None:
    assert build_emoji_archive.square_view_box({"height": 20}, {"width": 32, "height": 32}) == "0 -6 32 32"
    assert build_emoji_archive.square_view_box({"left": 2}, {"width": 10, "height": 30}) == "-8 0 30 30"
