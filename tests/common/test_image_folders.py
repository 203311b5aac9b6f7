"""Image folders by the conventions of `datasets` and kohya: splits, classes, captions, what never counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.data.folders import Folder, open_images, read_folder
from common.data.rows import FEWEST_IMAGES, hold_out
from common.errors import UserError
from common.images import image_files

pytestmark = pytest.mark.usefixtures("own_cache")


def tree(root: Path, *names: str) -> Path:
    """A folder with pictures (each of another grey) and other files of these names."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg"):
            Image.new("L", (4, 4), number).save(path, "PNG")
        else:
            path.write_text(f"about {path.stem}\n")
    return root


def metadata(folder: Path, *names: str, kind: str = "jsonl", **column: Any) -> None:
    """A metadata file with these pictures, captions "about NAME" and perhaps one more column."""
    rows = [{"file_name": name, "text": f"about {name}"} for name in names]
    for key, values in column.items():
        rows = [{**row, key: value} for row, value in zip(rows, values)]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def found(folder: Folder) -> dict[str, tuple[str, str]]:
    """Name -> (split, class)."""
    splits = folder.splits or ["train"] * len(folder)
    classes = [*folder.classes, ""]  # -1 is the last
    return {folder.key(i): (splits[i], classes[folder.label(i)[1]]) for i in range(len(folder))}


TREES = {
    "classes": ["cat/1.png", "cat/2.png", "dog/1.png"],
    "one class is none": ["cat/1.png", "cat/2.png"],
    "no folders": ["1.png", "2.png"],
    "other depths": ["cat/1.png", "dog/puppy/1.png"],
    "a loose picture": ["cat/1.png", "dog/1.png", "3.png"],
    "classes below a folder": ["photos/cat/1.png", "photos/dog/2.png"],
    "years of classes": ["2019/cat/1.png", "2020/cat/2.png", "2019/dog/3.png"],
    "splits of classes": ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "test/dog/4.png"],
    "splits by other words": ["training/cat/1.png", "training/dog/2.png", "my-dev set/cat/3.png", "eval.2/dog/4.png"],
    "splits with numbers": ["train2017/cat/1.png", "train2017/dog/2.png", "val2017/cat/3.png"],
    "splits below": ["data/train/cat/1.png", "data/train/dog/2.png", "data/test/dog/3.png"],
    "outside of the splits": ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "4.png"],
    "names with splits": ["a/train-1.png", "b/train-2.png", "a/test-1.png"],
    "words that hold a split's": ["contest/1.png", "trains/2.png"],
    "hidden": [".thumbs/cat/1.png", "cat/._1.png", "cat/1.png", "dog/1.png", "__MACOSX/cat/1.png", ".DS_Store"],
    "capitals": ["cat/1.PNG", "dog/2.JPG"],
}


@pytest.mark.parametrize("name", TREES)
def test_splits_and_classes_are_those_of_the_imagefolder_of_datasets(name: str, tmp_path: Path) -> None:
    import datasets

    root = tree(tmp_path / "own", *TREES[name])
    theirs = {}
    loaded = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "datasets"))
    for split, table in loaded.items():
        for row in table.cast_column("image", datasets.Image(decode=False)):
            names = table.features["label"].names if "label" in table.features else []
            key = Path(row["image"]["path"]).relative_to(root).as_posix()
            theirs[key] = (str(split), names[row["label"]] if names else "")
    assert found(read_folder(root)) == theirs


def test_folders_of_splits_are_no_captions(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "train/1.png", "train/2.png", "test/3.png", "validation/4.png")
    bare = read_folder(root)
    assert bare.classes == [] and {bare.label(i) for i in range(4)} == {("", -1)}
    for split, names in (("train", ["1.png", "2.png"]), ("test", ["3.png"]), ("validation", ["4.png"])):
        metadata(root / split, *names)
    own = read_folder(root)
    assert sorted(own.label(i)[0] for i in range(4)) == [f"about {i}.png" for i in (1, 2, 3, 4)]
    assert sorted(set(own.splits)) == ["test", "train", "validation"]
    assert [[own.key(row) for row in rows] for rows in hold_out(own)] == [
        ["train/1.png", "train/2.png"],
        ["test/3.png"],
    ]
    assert "3 splits (test 1, train 2, validation 1), captions from metadata.jsonl" in own.about
    data = open_images(root, size=4, split="test")
    assert len(data) == 1 and data[0]["caption"] == "about 3.png"
    with pytest.raises(UserError, match="no split 'dev'; it has test, train, validation"):
        open_images(root, size=4, split="dev")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("place", ["", "deep", "deep/er"])
def test_metadata_lies_at_any_level_in_three_forms(kind: str, place: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "deep/er/1.png", "deep/er/2.png", "deep/er/3.png")
    below = Path("deep/er").relative_to(place)
    metadata(root / place, *(str(below / f"{i}.png") for i in (2, 1)), kind=kind, label=[5, 0])
    own = read_folder(root)
    assert [(own.key(i), own.label(i)) for i in range(2)] == [
        ("deep/er/2.png", (f"about {below / '2.png'}", 5)),
        ("deep/er/1.png", (f"about {below / '1.png'}", 0)),
    ]
    assert own.classes == [] and own.about.endswith(
        f"2 pictures, captions from metadata.{kind}; 1 files passed over: deep/er/3.png"
    )


def test_class_names_in_metadata_are_sorted_and_replace_the_folders(tmp_path: Path) -> None:
    for kind in ("jsonl", "csv", "parquet"):
        root = tree(tmp_path / kind, "x/1.png", "y/2.png", "y/3.png")
        metadata(root, "x/1.png", "y/2.png", "y/3.png", kind=kind, label=["dog", "cat", "dog"])
        own = read_folder(root)
        assert own.classes == ["cat", "dog"] and [own.label(i)[1] for i in range(3)] == [1, 0, 1]
    metadata(root, "x/1.png", kind="csv")
    with pytest.raises(UserError, match=r"metadata.csv and metadata.parquet lie in it; keep the metadata"):
        read_folder(root)


def test_the_nearest_metadata_wins_and_several_captions_of_a_picture_stay_in_one_part(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", *(f"a/{i}.png" for i in range(30)))
    names = [f"{i}.png" for i in range(30) for _ in range(2)]
    metadata(root / "a", *names)
    metadata(root, *(f"a/{i}.png" for i in range(30)))
    own = read_folder(root)
    assert len(own) == 60 and own.label(0)[0] == "about 0.png"
    train, held_out = hold_out(own)
    assert sorted(train + held_out) == list(range(60)) and len(held_out) in (6, 8)
    assert not {own.key(i) for i in train} & {own.key(i) for i in held_out}


def test_columns_of_other_names_are_found_or_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "1.png")
    for row, caption in (
        ({"file_name": "1.png", "caption": "a cat", "url": "x"}, "a cat"),
        ({"image_file_name": "1.png", "says": ["", "a cat", "a dog"]}, "a cat"),
        ({"file_name": "1.png", "english": "a cat", "german": "eine Katze"}, ""),
    ):
        (root / "metadata.jsonl").write_text(json.dumps(row))
        assert read_folder(root).label(0)[0] == caption
    assert read_folder(root, text="german").label(0)[0] == "eine Katze"
    with pytest.raises(UserError, match="no caption column 'french'; its columns are file_name, english, german"):
        read_folder(root, text="french")


def test_kohyas_captions_lie_beside_the_pictures(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "1.png", "1.TXT", "2.JPG", "2.txt", "LICENSE.txt")
    (root / "2.txt").write_bytes("\ufeff\r\n a cat\u2028on a mat \r\nsecond line".encode())
    own = read_folder(root)
    assert [own.label(i) for i in range(2)] == [("about 1", -1), ("a cat\u2028on a mat", -1)]
    assert own.about.endswith("captions from the .txt beside each picture; 1 files passed over: LICENSE.txt")
    tree(root, "3.png")
    with pytest.raises(UserError, match=r"1 of 3 pictures have no .txt beside them, the first is .*3\.png"):
        read_folder(root)
    classes = tree(tmp_path / "classes", "red_fox/1.png", "red_fox/1.txt", "lynx/2.png")
    assert [read_folder(classes).label(i) for i in range(2)] == [("lynx", 0), ("about 1", 1)]


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    own = read_folder(tree(tmp_path / "own", "bus/1.png", "train/2.png", "tram/3.png"))
    assert own.classes == ["bus", "train", "tram"] and not own.splits


def test_pictures_beside_a_test_folder_are_trained_on(tmp_path: Path) -> None:
    own = read_folder(tree(tmp_path / "own", "1.png", "crash test.png", "test/3.png"))
    assert dict(zip(map(own.key, range(3)), own.splits)) == {
        "1.png": "train",
        "crash test.png": "train",
        "test/3.png": "test",
    }
    assert not read_folder(tree(tmp_path / "names", "1.png", "crash test.png")).splits


def test_links_are_followed_once_and_hidden_files_never_count(tmp_path: Path) -> None:
    pictures = tree(tmp_path / "elsewhere", "1.png", "2.png")
    root = tree(tmp_path / "own", "dog/3.png", "dog/._3.png", ".git/4.png", "dog/notes.doc", "dog/.hidden.png")
    (root / "cat").symlink_to(pictures)
    (root / "dog" / "round").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    own = read_folder(root)
    assert [own.key(i) for i in range(len(own))] == ["cat/1.png", "cat/2.png", "dog/3.png"]
    assert own.classes == ["cat", "dog"] and own.about.endswith("1 files passed over: dog/notes.doc")
    assert image_files(root) == [own.raw(i) for i in range(3)]


def test_what_was_taken_for_what_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "own", "cat/1.png", "dog/2.png", *(f"cat/{i}.heic" for i in range(4)))
    for _ in range(2):
        open_images(root, size=4)
    assert capsys.readouterr().err == (
        f"{root}: 2 pictures, 2 classes, captions from the names of the classes; "
        "4 files passed over: cat/0.heic, cat/1.heic, cat/2.heic, ...\n"
    )


def test_a_tenth_is_held_out_by_name_wherever_the_folder_lies(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(45)]
    parts = []
    for place in ("here", "there"):
        own = read_folder(tree(tmp_path / place, *names))
        train, held_out = hold_out(own)
        assert sorted(train + held_out) == list(range(45)) and len(held_out) == 5
        parts.append([own.key(i) for i in held_out])
    assert parts[0] == parts[1]
    few = read_folder(tree(tmp_path / "few", *names[: FEWEST_IMAGES - 1]))
    assert hold_out(few) == (list(range(FEWEST_IMAGES - 1)), [])
    with pytest.raises(UserError, match="no split 'train'; it has test, validation"):
        hold_out(read_folder(tree(tmp_path / "no_train", "test/1.png", "val/2.png")))


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_broken_held_out_picture_is_not_replaced_by_a_training_picture(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", *(f"train/{i:03d}.png" for i in range(198)), "test/a.png", "test/b.png")
    metadata(root, *(f"train/{i:03d}.png" for i in range(198)), "test/a.png", "test/b.png")
    (root / "test" / "b.png").write_bytes(b"broken")
    data = open_images(root, size=4, split="test", scan=False)
    assert data[0]["image"].equal(data[1]["image"]) and data.corrupt.sum() == 1


def test_captions_that_are_empty_are_said_and_lines_that_are_wrong_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", *(f"{i:03d}.png" for i in range(120)))
    rows: list[dict[str, Any]] = [{"file_name": f"{i:03d}.png", "text": f"about {i}"} for i in range(120)]
    rows[3]["text"], rows[4]["text"], rows[5]["text"] = None, "", ["", "first", "second"]
    rows[7]["file_name"] = "gone.png"
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"skipped .*metadata.jsonl line 8: gone.png does not exist in"):
        own = read_folder(root)
    assert len(own) == 119 and [own.label(i)[0] for i in (2, 3, 4, 5)] == ["about 2", "", "", "first"]
    assert "captions from metadata.jsonl (2 of them empty); 1 files passed over: 007.png" in own.about
    rows[8]["text"] = 5  # type: ignore[assignment]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"line 8: gone.png does not exist in .* \(2 of 120 lines are wrong\)"):
        read_folder(root)


@pytest.mark.parametrize(
    ("cells", "labels", "classes"),
    [
        (["3", " 1", "+2", ""], [3, 1, 2, -1], []),
        (["1.0", "nan", "0.0", "2.0"], [1, -1, 0, 2], []),
        (["cat", "cat ", "dog", " dog"], [0, 0, 1, 1], ["cat", "dog"]),
    ],
)
def test_labels_of_a_csv_are_numbers_or_names(
    cells: list[str], labels: list[int], classes: list[str], tmp_path: Path
) -> None:
    root = tree(tmp_path / "own", *(f"{i}.png" for i in range(4)))
    lines = [" file_name , label", *(f"{i}.png,{cell}" for i, cell in enumerate(cells))]
    (root / "metadata.csv").write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    own = read_folder(root)
    assert [own.label(i)[1] for i in range(4)] == labels and own.classes == classes


@pytest.mark.parametrize("cell", ["inf", "1.5", "1e18", "-7", "9" * 5000])
def test_labels_that_are_no_classes_are_refused_by_line(cell: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "0.png", "1.png")
    (root / "metadata.csv").write_text(f"file_name,label\n0.png,1\n1.png,{cell}\n")
    with pytest.raises(UserError, match=r'metadata.csv line 3: "label" must be an integer from 0 to 999999'):
        read_folder(root)


def test_folders_of_classes_without_pictures_are_said(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "cat/1.png", "dog/2.png", "fox/3.heic", "notes/about.txt")
    (root / "emu").mkdir()
    own = read_folder(root)
    assert own.classes == ["cat", "dog"] and [folder.name for folder in own.empty] == ["emu", "fox"]
    assert own.about.endswith("2 folders without pictures: emu, fox")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", "cat/1.png", "dog\udcff/2.png")
    with pytest.raises(UserError, match=r"the name of the class 'dog\\udcff' is not UTF-8 text"):
        read_folder(root)


def test_splits_inside_a_folder_of_shards_are_honoured(tmp_path: Path) -> None:
    from common.data.shards import ShardedImages

    root = tree(tmp_path / "own", *(f"train/{i}.png" for i in range(5)), "val/5.png", "val/6.png")
    train, held_out = ShardedImages(root, size=4, batch_size=1, repeat=False).hold_out()
    assert sorted(int(item["image"].max()) for item in train) == list(range(5))
    assert [int(item["image"].max()) for item in held_out] == [5, 6]


def test_links_to_one_picture_stay_in_one_part(tmp_path: Path) -> None:
    root = tree(tmp_path / "own", *(f"{i:02d}.png" for i in range(30)))
    for i in range(30):
        (root / f"link{i:02d}.png").symlink_to(root / f"{i:02d}.png")
    own = read_folder(root)
    train, held_out = ({own.raw(i).resolve() for i in rows} for rows in hold_out(own))
    assert not train & held_out and len(train | held_out) == 30 and held_out
