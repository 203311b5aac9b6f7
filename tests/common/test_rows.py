"""Tables of pictures: which columns are taken, what cells may hold, and that held-out rows are never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.folders import Images, broken_rows, open_images, open_source
from common.data.rows import LEFT_OUT, caption_of, hold_out, label_of, picture_of, split_of, typed
from common.data.shards import ShardedImages
from common.errors import UserError
from common.images import CorruptImage
from tests.common.pictures import level, parquet, pictures, png, told
from tests.refusals import refused


@pytest.fixture(autouse=True)
def _no_cache_of_others(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def levels(images: Images) -> list[int]:
    return [level(images[i]) for i in range(len(images))]


def parts(where: Path) -> list[list[int]]:
    """Grey levels of the pictures to train on and of those held out."""
    source = open_source(where)
    everything = Images(source, open_images(where, 4).framing)
    return [levels(everything.part(rows)) for rows in hold_out(source)]


def test_a_saved_data_set_with_only_a_train_split_is_divided_once(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": pictures(range(60)), "text": [f"grey {i}" for i in range(60)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    train, held_out = parts(tmp_path / "saved")
    assert len(held_out) == 6 and sorted(train + held_out) == list(range(60))
    table.save_to_disk(tmp_path / "plain")
    assert parts(tmp_path / "plain") == [train, held_out]
    datasets.DatasetDict({"train": table.select(range(50)), "validation": table.select(range(50, 60))}).save_to_disk(
        tmp_path / "split"
    )
    assert parts(tmp_path / "split") == [list(range(50)), list(range(50, 60))]


def test_parquet_files_of_splits_stay_apart(tmp_path: Path) -> None:
    """As on the hub: data/train-00000-of-00002.parquet beside data/test-00000-of-00001.parquet."""
    for name, numbers in (("train-00000-of-00002", range(30)), ("train-00001-of-00002", range(30, 50))):
        parquet(tmp_path / "t/data" / f"{name}.parquet", image=pictures(numbers), text=["x"] * len(numbers))
    parquet(tmp_path / "t/data/test-00000-of-00001.parquet", image=pictures(range(50, 60)), text=["y"] * 10)
    assert parts(tmp_path / "t") == [list(range(50)), list(range(50, 60))]
    shards = ShardedImages(str(tmp_path / "t/data/*.parquet"), size=4, batch_size=1, repeat=False)
    train, held_out = ([level(item) for item in part] for part in shards.hold_out())
    assert sorted(train) == list(range(50)) and held_out == list(range(50, 60))


def test_shards_to_hold_out_leave_the_training_wherever_they_are_named(tmp_path: Path) -> None:
    for shard in range(3):
        parquet(tmp_path / f"part-{shard}.parquet", image=pictures(range(10 * shard, 10 * shard + 10)))
    shards = ShardedImages(str(tmp_path / "*.parquet"), size=4, batch_size=1, repeat=False)
    for named, first in ((None, 20), (tmp_path / "part-1.parquet", 10)):
        train, held_out = ({level(item) for item in part} for part in shards.hold_out(named))
        assert held_out == set(range(first, first + 10)) and train == set(range(30)) - held_out
    refused("no shard is left to train on", shards.hold_out, str(tmp_path / "*.parquet"))


@pytest.mark.parametrize(
    ("columns", "taken"),
    [
        ({"image": "picture", "text": "string", "label": "int"}, ("image", "text", "label")),
        ({"jpg": "picture", "caption": "string", "url": "string", "id": "int"}, ("jpg", "caption", None)),
        ({"photo": "bytes", "says": "strings", "category": "string"}, ("photo", "says", "category")),
        ({"image_path": "path", "prompt": "string", "artist": "string"}, ("image_path", "prompt", None)),
        ({"image": "path", "en": "string", "de": "string", "class_id": "int"}, ("image", None, "class_id")),
    ],
)
def test_the_only_candidate_of_a_kind_is_found(
    columns: dict[str, str], taken: tuple[str | None, ...], tmp_path: Path
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    cells: dict[str, list[Any]] = {
        "picture": pictures(range(2)),
        "bytes": [png(0), png(1)],
        "path": ["0.png", "1.png"],
        "string": ["a", "b"],
        "strings": [["a", "c"], ["b"]],
        "int": [0, 1],
    }
    path = parquet(tmp_path / "table.parquet", **{name: cells[kind] for name, kind in columns.items()})
    _, text, label = taken
    wanted = [(0, "a" if text else "", 0 if label else -1), (1, "b" if text else "", 1 if label else -1)]
    source = open_source(path)
    assert (source.columns.image, source.columns.text, source.columns.label) == taken  # type: ignore[attr-defined]
    whole = Images(source, open_images(path, 4, caption_column=columns.get("en") and "en").framing)
    assert [told(whole[i]) for i in range(2)] == wanted
    stream = ShardedImages(path, size=4, batch_size=1, buffer=1, label_column=None, repeat=False)
    assert [told(item) for item in stream] == wanted


def test_columns_that_cannot_be_told_are_named_with_the_option(tmp_path: Path) -> None:
    two = parquet(tmp_path / "two.parquet", left=pictures(range(2)), right=pictures(range(2)))
    refused(r"left and right may be the image column; .*--data.image_column", open_source, two)
    none = parquet(tmp_path / "none.parquet", number=[1, 2], text=["a", "b"])
    refused(r"no image column was found; its columns are number, text", open_source, none)
    with pytest.raises(UserError, match=r"no caption column was found; its columns are left, right; .*text_column"):
        ShardedImages(two, size=4, batch_size=1, image_column="left", need=["caption"])
    assert open_source(two, image="right", text=LEFT_OUT).label(1) == ("", -1)


@pytest.mark.filterwarnings("ignore:skipped")
def test_broken_cells_are_counted_as_broken_pictures_are(tmp_path: Path) -> None:
    images = pictures(range(200))
    texts: list[Any] = [[f"grey {i}", "another"] for i in range(200)]
    images[7], texts[8] = None, None
    path = parquet(tmp_path / "table.parquet", image=images, text=texts, label=[f"c{i % 3}" for i in range(200)])
    with pytest.warns(UserWarning, match="row 7: it has no picture"):
        data = open_images(path, 4)
    assert data.classes == ["c0", "c1", "c2"] and data[6]["caption"] == "grey 6" and data[7]["label"] == 2
    assert data[8]["caption"] == "" and levels(data)[6:9] == [6, 8, 8]
    stream = ShardedImages(path, size=4, batch_size=1, buffer=1, label_column=None, repeat=False)
    items = {level(item): (item["caption"], item["label"]) for item in stream}
    assert len(items) == 199 and items[6] == ("grey 6", 0) and items[8] == ("", 2) and stream.class_count() == 3
    images[3:6] = [None] * 3
    path = parquet(tmp_path / "many.parquet", image=images, text=texts)
    with pytest.raises(UserError, match=r"4 of 200 images cannot be read"):
        open_images(path, 4)
    with pytest.raises(UserError, match=r"3 of 200 images cannot be read"):
        list(ShardedImages(path, size=4, batch_size=1, repeat=False))


@pytest.mark.filterwarnings("ignore:skipped")
def test_one_broken_row_of_a_small_held_out_shard_does_not_end_the_run(tmp_path: Path) -> None:
    for shard in range(2):
        images = pictures(range(100 * shard, 100 * shard + (10 if shard else 100)))
        parquet(tmp_path / f"{shard}.parquet", image=[None, *images[1:]] if shard else images)
    _, held_out = ShardedImages(str(tmp_path / "*.parquet"), size=4, batch_size=1).hold_out()
    assert [level(item) for item in held_out] == list(range(101, 110))


def test_class_names_mean_one_number_in_all_shards_and_splits(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image=pictures(range(3)), label=["cat", "emu", "cat"])
    parquet(tmp_path / "test.parquet", image=pictures(range(3, 5)), label=["dog", "emu"])
    shards = ShardedImages(str(tmp_path / "*.parquet"), size=4, batch_size=1, label_column=None, repeat=False)
    train, held_out = shards.hold_out()
    assert [item["label"] for item in held_out] == [1, 2] and sorted(item["label"] for item in train) == [0, 0, 2]
    table = open_source(tmp_path)
    assert table.classes == ["cat", "dog", "emu"]
    places = [f"{tmp_path} ({split}) row {row}" for split, rows in (("train", 3), ("test", 2)) for row in range(rows)]
    labels = [("cat", 0), ("emu", 2), ("cat", 0), ("dog", 1), ("emu", 2)]
    assert {table.where(i): table.label(i) for i in range(5)} == dict(zip(places, labels))


@pytest.mark.parametrize("cell", [3, 1.5, b"a", {"text": "a"}, [3]])
def test_captions_of_another_kind_are_broken_rows(cell: Any) -> None:
    with pytest.raises(CorruptImage, match='"text" must be a string'):
        caption_of(cell)


@pytest.mark.parametrize("cell", [True, 1.5, -2, 10**18, "unknown", [0], b"0", float("inf")])
def test_labels_of_another_kind_are_broken_rows(cell: Any) -> None:
    with pytest.raises(CorruptImage, match='"label" must be an integer'):
        label_of(cell, {"cat": 0})


def test_cells_that_are_right_or_empty(tmp_path: Path) -> None:
    assert [caption_of(cell) for cell in (None, "", [], ["", "a"], [None], ("b",))] == ["", "", "", "a", "", "b"]
    assert [label_of(cell, {"cat": 4}) for cell in (None, 0, 3.0, float("nan"), "cat", -1)] == [-1, 0, 3, -1, 4, -1]
    (tmp_path / "a.png").write_bytes(b"x")
    assert picture_of("a.png", tmp_path) == tmp_path / "a.png"
    assert picture_of({"bytes": None, "path": "/x/b.png"}) == Path("/x/b.png") and picture_of(b"y") == b"y"
    for cell in (None, "", b"", {}, {"bytes": None, "path": None}, [1, 2], "../secret.png", "x/../../secret.png"):
        with pytest.raises(CorruptImage):
            picture_of(cell, tmp_path)


def test_splits_are_words_of_a_path() -> None:
    names = {"a/train/x": ("train", 1), "val2017/x": ("validation", 0), "Test-1": ("test", 0)}
    names["trainer/contest"] = ("", -1)
    assert {name: split_of(name.split("/")) for name in names} == names


def test_what_is_broken_is_remembered(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", image=[*pictures(range(120)), None], text=["a"] * 121)
    with pytest.warns(UserWarning, match="skipped"):
        first = broken_rows(open_source(path))
    with pytest.warns(UserWarning, match="skipped"):
        assert broken_rows(open_source(path)) == first == {120: "it has no picture"}


def test_tables_of_text_are_read_with_their_pictures_beside_them(tmp_path: Path) -> None:
    """.jsonl, .csv, .tsv and .arrow; a comma, a quote and a line separator in a caption stay."""
    import datasets

    captions = ['a "red", cat', "b\u2028c"]
    for i in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    rows = [(f"in/{i}.png", captions[i], i) for i in range(2)]
    lines = ['Image,caption,label\r\n"in/0.png","a ""red"", cat",0\r\n', "in/1.png,b\u2028c, 1\r\n"]
    (tmp_path / "t.csv").write_bytes(("\ufeff" + "".join(lines)).encode())
    tsv = ["image\tcaption\tlabel", *("\t".join(map(str, row)) for row in rows)]
    (tmp_path / "t.tsv").write_text("\n".join(tsv), encoding="utf-8")
    named = [dict(zip(("image", "caption", "label"), row)) for row in rows]
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in named))
    datasets.Dataset.from_list(named).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "t.arrow")
    wanted = [(i, captions[i], i) for i in range(2)]
    for name in ("t.csv", "t.tsv", "t.jsonl", arrow.name):
        images = open_images(tmp_path / name, 4)
        assert [told(images[i]) for i in range(2)] == wanted, name
        assert images.source.fingerprint == open_source(tmp_path / name).fingerprint
    before = open_source(tmp_path / "t.csv").fingerprint
    (tmp_path / "in" / "1.png").write_bytes(png(77))
    assert open_source(tmp_path / "t.csv").fingerprint != before, "another picture behind the same path"
    (tmp_path / "t.jsonl").write_text('{"image": "in/0.png", "n": 1}\n{"image": "in/1.png", "n": "x"}\n')
    refused("the cells of 'n' are not of one kind", open_source, tmp_path / "t.jsonl")


def test_tables_that_mean_one_split_are_joined_and_those_of_none_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, numbers in (("val-0", range(3)), ("train", range(3, 9)), ("dev", range(9, 11)), ("extra", range(20, 25))):
        parquet(tmp_path / f"{name}.parquet", image=pictures(numbers), text=["x"] * len(numbers))
    assert parts(tmp_path) == [list(range(3, 9)), [9, 10, 0, 1, 2]]
    assert "1 tables of no split passed over, the first is" in capsys.readouterr().err


def test_rows_of_one_picture_stay_in_one_part(tmp_path: Path) -> None:
    numbers = [i // 3 for i in range(90)]
    cells = [{"bytes": png(i), "path": "image.png"} for i in numbers]
    train, held_out = parts(parquet(tmp_path / "t.parquet", image=cells, text=[f"caption {i}" for i in range(90)]))
    assert len(held_out) >= 9 and not set(train) & set(held_out) and sorted(train + held_out) == numbers


def test_a_table_without_pictures_beside_pictures_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    parquet(tmp_path / "embeddings.parquet", vector=[[0.1, 0.2]])
    source = open_source(tmp_path)
    assert len(source) == 1 and source.about.endswith("1 files passed over: embeddings.parquet")


def test_columns_of_strings_become_numbers_where_all_are() -> None:
    assert typed(["1", " 2 ", "", None]) == [1, 2, None, None]
    assert typed(["1.0", "2", "1e3"]) == [1.0, 2, 1000.0]
    assert typed(["1", "1st", " x "]) == ["1", "1st", "x"]
    assert typed(["9" * 5000])[0] == float("inf"), "no digits beyond what Python converts"


def test_strings_that_are_no_text_are_broken_rows(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    path = parquet(tmp_path / "t.parquet", image=pictures(range(2)), text=texts)
    with pytest.raises(CorruptImage, match="not UTF-8"):
        open_source(path).label(1)
    stream = ShardedImages(path, size=4, batch_size=1, buffer=1, repeat=False)
    with pytest.raises(UserError, match="1 of 2 images"), pytest.warns(UserWarning, match="not UTF-8"):
        list(stream)


@pytest.mark.parametrize("cell", [[1, 2], True])
def test_labels_of_other_kinds_do_not_keep_captions_from_being_read(cell: Any, tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"grey {i}", "label": cell} for i in range(2)]
    for i in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = parquet(tmp_path / "t.parquet", image=pictures(range(2)), text=["grey 0", "grey 1"], label=[cell] * 2)
    for where in (tmp_path / "in", table):
        assert [open_source(where).label(i) for i in range(2)] == [("grey 0", -1), ("grey 1", -1)]
        with pytest.raises((UserError, CorruptImage), match='"label" must be an integer'):
            open_source(where, text=LEFT_OUT).label(0)


def test_several_candidates_for_what_a_task_needs_are_named(tmp_path: Path) -> None:
    two = {"en": ["a", "b"], "de": ["c", "d"], "fine_label": [0, 1], "class": [0, 1], "category": [0, 1]}
    table = parquet(tmp_path / "t.parquet", image=pictures(range(2)), **two)
    rows = [{"file_name": f"{i}.png", **{name: cells[i] for name, cells in two.items()}} for i in range(2)]
    for i in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    several = "en and de may be the caption column.*name one with --data.text_column"
    for where in (table, tmp_path / "in"):
        refused(several, open_source, where, need=["caption"])
        refused("class and category may be the label column", open_source, where, need=["label"])
        assert open_source(where, text="de", label="class", need=["caption", "label"]).label(1) == ("d", 1)
        assert open_source(where).label(0) == ("", -1)


def test_empty_captions_of_a_table_are_said(tmp_path: Path) -> None:
    texts = ["a", None, " ", "b"]
    source = open_source(parquet(tmp_path / "t.parquet", image=pictures(range(4)), text=texts))
    assert source.about.endswith("pictures from image, captions from text, 2 captions are empty")


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"image": ["a.png"]}).save_to_disk(tmp_path / "saved")
    sentence = "saved: shards are parquet files or image folders; open it with --data.name hf"
    refused(sentence, ShardedImages, tmp_path / "saved", 4, 1)
