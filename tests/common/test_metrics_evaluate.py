"""The report on a generator: complete, ordered as a person would order the pictures, and clear about bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.images import image_files, resize_clean, resize_uint8
from common.metrics.distribution import fid, kid
from common.metrics.evaluate import (
    compare_features,
    compare_held_out,
    evaluate_generator,
    flatten,
    format_report,
    judged,
    main,
    open_measured,
    say_few,
)
from common.metrics.features import Lite0Extractor, extract, folder_features, load_extractor

SIDE = 48
COUNT = 80


def drawings(count: int, seed: int, kinds: int = 4) -> torch.Tensor:
    """Discs, squares, rings and crosses in random colours on a pale ground: uint8 [N,3,48,48]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = torch.empty(count, 3, SIDE, SIDE)
    for index in range(count):
        y, x = torch.randint(16, 33, (2,), generator=generator).tolist()
        size = int(torch.randint(8, 15, (1,), generator=generator))
        paint, ground = torch.rand(2, 3, generator=generator)
        dy, dx = (rows - y).abs(), (columns - x).abs()
        disc = dy**2 + dx**2 < size**2
        shape = (
            disc,
            (dy < size) & (dx < size),
            disc & (dy**2 + dx**2 > (size // 2) ** 2),
            ((dy < 3) | (dx < 3)) & (dy < size) & (dx < size),
        )[index % kinds]
        images[index] = torch.where(shape, paint[:, None, None] * 200, 200 + ground[:, None, None] * 55)
    return images.round().to(torch.uint8)


@pytest.fixture(scope="module")
def judge() -> Lite0Extractor:
    return Lite0Extractor(64)


@pytest.fixture(scope="module")
def real_features(judge) -> torch.Tensor:
    return extract(drawings(COUNT, 0), judge)


@pytest.fixture(scope="module")
def fresh() -> torch.Tensor:
    return drawings(COUNT, 1)


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return (images + sigma * noise).clamp(0, 255).round().to(torch.uint8)


def blurred(images: torch.Tensor, factor: int) -> torch.Tensor:
    return resize_uint8(resize_clean(images, SIDE // factor).round().to(torch.uint8), SIDE)


@pytest.mark.parametrize("degrade", [blurred, noisy])
def test_kid_and_fid_grow_with_the_damage(judge, real_features, fresh, degrade):
    levels = (2, 4) if degrade is blurred else (1.0, 4.0)  # on flat artwork the judge saturates beyond sigma 8
    sets = [fresh, *(degrade(fresh, level) for level in levels)]
    reports = [compare_features(real_features, extract(images, judge), judge) for images in sets]
    for metric in ("kid", "fid"):
        values = [report["metrics"][f"{metric}_{judge.name}"]["value"] for report in reports]
        assert values == sorted(values) and values[2] > 2 * values[0]


def test_dropping_modes_raises_kid_and_lowers_recall(judge, real_features, fresh):
    whole = compare_features(real_features, extract(fresh, judge), judge)["metrics"]
    collapsed = compare_features(real_features, extract(drawings(COUNT, 2, kinds=1), judge), judge)["metrics"]
    assert collapsed[f"kid_{judge.name}"]["value"] > 2 * whole[f"kid_{judge.name}"]["value"]
    assert collapsed[f"recall_{judge.name}"]["value"] < whole[f"recall_{judge.name}"]["value"]


def test_a_perfect_generator_reaches_the_floor(judge, real_features, fresh):
    report = compare_features(real_features, extract(fresh, judge), judge)
    record, floor = (report[part][f"kid_{judge.name}"] for part in ("metrics", "floor"))
    assert abs(record["value"]) < 4 * (record["std"] + floor["std"])


def test_every_number_names_its_judge_and_its_counts(judge):
    real, fake = drawings(24, 0), drawings(12, 1)
    report = evaluate_generator(fake, real, judge, real_extra=drawings(10, 2))
    assert report["headline"] == f"kid_{judge.name}" in report["metrics"]
    counts = {"metrics": (24, 12), "metrics_at_floor_n": (12, 12), "floor": (12, 12), "floor_full": (24, 10)}
    for part, (n_real, n_fake) in counts.items():
        assert {name.removesuffix(f"_{judge.name}") for name in report[part]} == {
            "kid", "fid", "precision", "recall", "density", "coverage", "is",
        }  # fmt: skip
        for record in report[part].values():
            assert (record["extractor"], record["n_real"], record["n_fake"]) == (judge.name, n_real, n_fake)
    expected = kid(extract(real, judge), extract(fake, judge)).value
    assert flatten(report)[f"kid_{judge.name}"] == pytest.approx(expected)
    text = format_report(report)
    assert "24 / 12" in text and f"kid_{judge.name} x 1000" in text and "floor" in text
    json.dumps(report)


def test_the_floor_compares_disjoint_halves(judge, real_features):
    """Halves that shared images would give perfect coverage at zero distance; duplicates of one image do."""
    report = compare_features(real_features, real_features, judge)
    assert report["floor"][f"fid_{judge.name}"]["value"] > 1.0
    assert report["metrics"][f"fid_{judge.name}"]["value"] < 1e-3


def test_the_floor_can_be_left_out(judge):
    report = evaluate_generator(drawings(10, 0), drawings(10, 1), judge, floor_split=False)
    assert "floor" not in report and "metrics_at_floor_n" not in report


@pytest.mark.parametrize(("n_fake", "n_real", "what"), [(9, 20, "9 generated"), (10, 19, "19 real")])
def test_too_few_images_are_refused(judge, n_fake, n_real, what):
    with pytest.raises(UserError, match=f"{what} images are too few"):
        evaluate_generator(drawings(n_fake, 0), drawings(n_real, 1), judge)


def write_folder(folder, images, captions=None):
    folder.mkdir()
    rows = []
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")
        rows.append({"file_name": f"{index:03d}.png", "text": captions[index] if captions else ""})
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_the_program_compares_two_folders_and_writes_json(tmp_path, capsys):
    real, fake = drawings(20, 0), drawings(10, 1)
    real_folder, fake_folder = write_folder(tmp_path / "real", real), write_folder(tmp_path / "fake", fake)
    Image.new("RGB", (70, 30), "red").save(real_folder / "odd_size.png")
    output = tmp_path / "out" / "result.json"
    main([str(real_folder), str(fake_folder), "--extractor", "lite0@64", "--json", str(output)])
    assert "kid_lite0@64 x 1000" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert (result["n_real"], result["n_fake"]) == (21, 10)
    assert "alignment" not in result


def test_turned_16_bit_and_transparent_copies_are_the_same_pictures(tmp_path: Path) -> None:
    """One decoder: the distance to copies that differ in how the pixels are stored is that of equal features."""
    judge = load_extractor("lite0@32")
    folders = {name: tmp_path / name for name in ("grey", "turned", "deep", "clear")}
    for folder in folders.values():
        folder.mkdir()
    for index, image in enumerate(drawings(20, 0)):
        grey = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
        grey.save(folders["grey"] / f"{index}.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        grey.transpose(Image.Transpose.ROTATE_90).save(folders["turned"] / f"{index}.png", exif=exif)
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folders["deep"] / f"{index}.png")
        alpha = Image.new("L", grey.size, 255)
        Image.merge("LA", (grey, alpha)).save(folders["clear"] / f"{index}.png")
    features = {name: folder_features(image_files(folder), judge) for name, folder in folders.items()}
    for name in ("turned", "deep", "clear"):
        assert torch.equal(features[name], features["grey"])
        assert fid(features[name], features["grey"]) == pytest.approx(0, abs=1e-6)


def test_captions_beside_generated_pictures_keep_separators(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "fake", drawings(2, 0), ["a\u2028b", "c"])
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text("\ufeff" + lines.replace("\\u2028", "\u2028"), encoding="utf-8")
    assert open_measured(folder).captions == ["a\u2028b", "c"]


def test_the_program_explains_bad_folders_and_captions(tmp_path):
    real = write_folder(tmp_path / "real", drawings(20, 0))
    fake = write_folder(tmp_path / "fake", drawings(10, 1), [f"drawing {index}" for index in range(10)])
    arguments = [str(real), str(fake), "--extractor", "lite0@64"]
    lines = (fake / "metadata.jsonl").read_text().splitlines()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            main(arguments)

    (fake / "metadata.jsonl").write_text("\n".join([lines[0], '{"file_name": "001.png"}', *lines[2:]]))
    refused('metadata.jsonl line 2: "text" is missing')
    (fake / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    refused("no line for 009.png")
    (fake / "metadata.jsonl").write_text("\n".join(lines))
    (fake / "000.png").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="skipped"):
        refused("1 of 10 images cannot be read, more than 1 %.*\n.*000.png: cannot identify")
    arguments[0] = str(tmp_path / "absent")
    refused("no such folder")


def test_captions_add_alignment_with_its_ceilings_beside_it(judge):
    captions = [f"drawing of a {'red' if index % 2 else 'blue'} shape, number {index}" for index in range(20)]
    fake, real = drawings(20, 1), drawings(20, 0)
    report = evaluate_generator(fake, real, judge, captions=captions, real_captions=captions)
    assert report["alignment"]["n"] == report["alignment_real"]["n"] == 20
    assert set(report["alignment"]["ceiling"]) == {"unseen_concepts", "unseen_pairs"}
    assert report["alignment"]["cosine"] != report["alignment_real"]["cosine"]
    assert "alignment/r_at_1" in flatten(report)
    assert "real images of unseen pairs" in format_report(report)
    with pytest.raises(UserError, match="20 images but 19 captions"):
        evaluate_generator(fake, real, judge, captions=captions[1:])


def test_broken_pictures_up_to_one_in_a_hundred_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "real", drawings(10, 0).repeat(10, 1, 1, 1))
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:-30])
    with pytest.warns(UserWarning, match="skipped .*007.png"):
        found = open_measured(folder)
    assert len(found.pictures) == 99 and not any(name.endswith("007.png") for name in found.names)


def test_few_held_out_pictures_are_measured_as_far_as_they_go(judge) -> None:
    features = extract(drawings(20, 0), judge)
    assert compare_held_out(features[:9], features[:9], judge) is None and judged(None) == {}
    some, all_of_them = compare_held_out(features[:10], features, judge), compare_held_out(features, features, judge)
    assert some is not None and "floor" not in some and all_of_them is not None and "floor" in all_of_them
    with pytest.warns(UserWarning, match="6 held-out images: KID and FID are left out, at least 10 are needed"):
        say_few(6)
