from __future__ import annotations

import hashlib
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from common.errors import UserError
from electra.build_rated_sentences import KEPT
from electra.corpora import load_corpus
from electra.evaluate import split_tasks
from electra.tasks import POS_TAGS, Task, corrupt_sentence, load_task, rated_sentences, universal_tag
from tests.electra.test_corpora import BROWN_LINE


@pytest.fixture(scope="module")
def acceptability() -> Task:
    return load_task("acceptability", train_size=10**9)


def _texts(task: Task, split: str) -> set[str]:
    return {(item.text + "|" + item.second).lower() for item in getattr(task, split)}


def test_splits_are_disjoint_and_test_classes_equal(acceptability: Task) -> None:
    train, dev, test = (_texts(acceptability, split) for split in ("train", "dev", "test"))
    assert not train & test
    assert not dev & test
    assert not train & dev
    assert acceptability.majority == 0.5
    assert len(acceptability.train) > 20_000
    assert len(acceptability.test) > 1_500


def test_test_sentences_are_held_out_from_pre_training_and_training_sentences_are_not(acceptability: Task) -> None:
    corpus = load_corpus("sotu")
    train, held_out = ({s for d in corpus.documents(split) for s in d} for split in ("train", "held_out"))  # type: ignore[arg-type]
    real = {
        split: {i.text for i in getattr(acceptability, split) if i.label == 1} for split in ("train", "dev", "test")
    }
    assert real["test"] <= held_out
    assert real["train"] | real["dev"] <= train
    assert not real["train"] & held_out


def test_a_task_is_the_same_whenever_it_is_made(acceptability: Task) -> None:
    def digest(task: Task) -> str:
        return hashlib.sha1(repr((task.train[:500], task.test)).encode()).hexdigest()

    assert digest(load_task("acceptability")) == digest(acceptability)
    assert load_task("acceptability", train_size=50).train == acceptability.train[:50]


def test_a_corrupted_sentence_has_two_words_swapped_or_one_replaced() -> None:
    sentence = "We hold these truths to be self-evident, my friends."
    kinds = set()
    for seed in range(60):
        changed = corrupt_sentence(sentence, ["zebra", "of"], random.Random(seed))
        before, after = (s.lower().replace(",", "").replace(".", "").split() for s in (sentence, changed))
        assert len(before) == len(after)
        assert changed[0].isupper()
        assert changed[-1] == "."
        differing = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
        if len(differing) == 1:
            assert after[differing[0]] in ("zebra", "of")
            kinds.add("replaced")
        else:
            i, j = differing
            assert j == i + 1
            assert (before[i], before[j]) == (after[j], after[i])
            kinds.add("swapped")
    assert kinds == {"replaced", "swapped"}


def test_rated_sentences_come_with_the_repository_and_split_by_document() -> None:
    rows = rated_sentences()
    assert {row[0] for row in rows} == set(KEPT)
    assert all(-4 <= score <= 4 for _, _, score, _ in rows)
    task = load_task("sentiment:products", train_size=10**9)
    document = {text: key.split("_")[0] for source, key, _, text in rows if source == "products"}
    documents = [{document[i.text] for i in split} for split in (task.train, task.dev, task.test)]
    assert not documents[0] & documents[2]
    assert not documents[0] & documents[1]
    assert not documents[1] & documents[2]


def test_ratings_are_scaled_to_the_unit_interval() -> None:
    task = load_task("rating")
    assert task.kind == "regression"
    labels = [item.label for item in task.train]
    assert min(labels) >= 0
    assert max(labels) <= 1
    assert max(labels) - min(labels) > 0.7


def test_coherence_pairs_are_neighbours_exactly_where_the_label_says() -> None:
    task = load_task("coherence", train_size=300)
    following = {
        (a, b)
        for split in ("train", "held_out")
        for d in load_corpus("sotu").documents(split)  # type: ignore[arg-type]
        for a, b in pairwise(d)
    }
    for item in [*task.train, *task.test[:300]]:
        assert ((item.text, item.second) in following) == (item.label == 1)


def test_the_era_task_tests_on_other_messages_than_it_trains_on() -> None:
    task = load_task("era", train_size=10**9)
    home = {
        s: d.name
        for split in ("held_out", "train")
        for d in load_corpus("sotu").named_documents(split)  # type: ignore[arg-type]
        for s in d.sentences
    }
    train, test = ({home[item.text] for item in split} for split in (task.train, task.test))
    shared = train & test  # sentences said word for word in several messages
    assert len(shared) < 0.1 * len(test)
    assert len(test) > 60


def test_answers_lie_in_their_passages_and_a_third_of_the_questions_has_none() -> None:
    task = load_task("questions")
    for item in task.train:
        if item.answer is not None:
            first, last = item.answer
            assert 0 <= first <= last < len(item.words)
            if item.text == "Which year is named?":
                assert item.words[first].isdigit()
    share = sum(item.answer is None for item in task.train) / len(task.train)
    assert 0.25 < share < 0.42


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("at", "DET"),
        ("np-tl", "NOUN"),
        ("ppss+bez", "PRON"),
        ("fw-nn", "NOUN"),
        ("*", "PRT"),
        ("``", "."),
        ("--", "."),
        ("bedz*", "VERB"),
        ("np$", "NOUN"),
        ("nil", "X"),
        ("cs", "ADP"),
        ("jj-hl", "ADJ"),
        ("wp$", "PRON"),
    ],
)
def test_brown_tags_map_to_universal_ones(tag: str, expected: str) -> None:
    assert universal_tag(tag) == expected


def test_pos_is_read_from_a_copy_of_the_brown_corpus(tmp_path: Path) -> None:
    lines = [BROWN_LINE.replace("jury", f"jury{i}") for i in range(100)]
    (tmp_path / "ca01").write_text("".join(lines))
    task = load_task("pos", tmp_path)
    item = task.test[0]
    assert [POS_TAGS[tag] for tag in item.tags[:4]] == ["DET", "NOUN", "VERB", "."]
    assert len(task.test) == 3
    assert len(task.train) + len(task.dev) == 97


def test_your_own_table_of_classes_pairs_or_scores_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("text\ttext2\tlabel\n" + "".join(f"row {i}\tother\t{'ab'[i % 2]}\n" for i in range(100)))
    task = load_task(f"file:{path}")
    assert task.kind == "classification"
    assert task.classes == ("a", "b")
    assert task.train[0].second == "other"
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps({"text": f"row {i}", "label": i / 10 + 0.05}) + "\n" for i in range(100)))
    assert load_task(f"file:{scores}").kind == "regression"


def test_your_own_tags_and_given_splits_are_kept(tmp_path: Path) -> None:
    for name in ("train", "test"):
        rows = [{"words": [name, str(i)], "tags": ["B", "O"]} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(f"file:{tmp_path}")
    assert task.kind == "tagging"
    assert {item.words[0] for item in task.train} == {"train"}
    assert {item.words[0] for item in task.test} == {"test"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\nonly text\n", 'line 2: "label" is missing'),
        ("body\tlabel\nx\ty\n", 'line 2: "text" is missing'),
        ("text\tlabel\n", "no rows"),
        ("body\tlabel\nx\ty\n", "the columns are body, label"),
        ("text\tlabel\na\t\n", 'line 2: "label" is missing'),
        ("text\tlabel\na\tx\nb\ty\tz\n", "line 3: 3 cells, but the first line names 2 columns"),
        ("text\tlabel\na\t1.0\nb\t1.00\nc\t1.000\n", "two classes"),
        ("text\tlabel\na\t1.0\nb\t1.00\n", "two classes"),
        ("text\tlabel\na\t0.5\nb\t1.5\nc\tnan\n", "line 4: the label nan is not a finite number"),
        ("text\tlabel\na\t0\nb\t1\nc\tinf\n", "line 4: the label inf is not a finite number"),
        ("text\tlabel\na\tx\nb\tx\n", "two classes"),
    ],
)
def test_a_malformed_table_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_task(f"file:{path}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": [0]}, r'line 2: "label" must be a word or a finite number, got \[0\]'),
        ({"text": "a", "label": {}}, 'line 2: "label" must be a word'),
        ({"text": 3, "label": "x"}, 'line 2: "text" must be a string, got 3'),
        ({"text": " ", "label": "x"}, 'line 2: "text" is missing'),
    ],
)
def test_cells_of_another_kind_are_refused_by_line(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "x"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        load_task(f"file:{path}")


@pytest.mark.parametrize(
    "pair",
    [("question", "sentence"), ("question1", "question2"), ("sentence1", "sentence2"), ("premise", "hypothesis")],
)
def test_pairs_are_known_by_the_names_of_glue(tmp_path: Path, pair: tuple[str, str]) -> None:
    path = tmp_path / "mine.tsv"
    rows = "".join(f"{i}\tsecond {i}\tfirst {i}\t {'ab'[i % 2]}\n" for i in range(100))
    path.write_bytes(f"\ufeffindex\t{pair[1]}\t{pair[0]}\tlabel\r\n{rows}".encode())
    task = load_task(f"file:{path}")
    assert task.classes == ("a", "b") and len({*task.train, *task.dev, *task.test}) == 100
    assert all(item.second == item.text.replace("first", "second") for item in task.train)
    with pytest.raises(UserError, match='"answer" is missing; the columns are index'):
        load_task(f"file:{path}:{pair[0]}:answer")


def test_columns_of_any_name_are_named_after_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a, b: c.csv"
    path.write_text("body,kind\n" + "".join(f'"row, {i}",{"ab"[i % 2]}\n' for i in range(100)))
    (tmp_path / "mine.csv").write_text(path.read_text())
    task = load_task(f"file:{tmp_path}/mine.csv:body::kind")
    assert task.classes == ("a", "b") and task.train[0].text.startswith("row, ")
    with pytest.raises(UserError, match="the columns are body, kind"):
        load_task(f"file:{path}")
    assert split_tasks(f"pos,file:{path}:body, datasets:x:y,coherence:sotu,era") == [
        *("pos", f"file:{path}:body", " datasets:x:y", "coherence:sotu", "era")
    ]


@pytest.mark.parametrize("spec", ["nothing", "sentiment:poems", "file:absent.tsv", "era:brown"])
def test_an_unknown_task_is_refused(spec: str) -> None:
    with pytest.raises(UserError):
        load_task(spec)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"words": ["a", null], "tags": ["X", "Y"]}', '"words" holds None; expected words'),
        ('{"words": ["a", " "], "tags": ["X", "Y"]}', "\"words\" holds ' '"),
        (
            '{"words": ["a", "b"], "tags": ["X", {"q": 1}]}',
            "\"tags\" holds {'q': 1}; expected a word or a whole number",
        ),
        ('{"words": ["a", "b"], "tags": ["X", true]}', '"tags" holds True'),
        ('{"words": ["a"], "tags": ["X", "Y"]}', "lists of one length"),
    ],
)
def test_tagged_words_are_refused_by_line_and_column(row: str, message: str, tmp_path: Path) -> None:
    good = [f'{{"words": ["w{i}"], "tags": ["X"]}}' for i in range(3)]
    (tmp_path / "mine.jsonl").write_text("\n".join([*good, row]))
    with pytest.raises(UserError, match=re.escape(message)) as failure:
        load_task(f"file:{tmp_path / 'mine.jsonl'}")
    assert f"{tmp_path / 'mine.jsonl'} line 4: " in str(failure.value)
