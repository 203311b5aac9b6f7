from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from electra.wordpiece import SPECIAL_TOKENS, Rules, Tokenizer, load_tokenizer, train_wordpiece

TEXTS = ["The people of the United States.", "The government of the people, by the people, for the people!"] * 20


def test_training_fills_the_vocabulary_and_starts_with_the_special_tokens() -> None:
    tokenizer = train_wordpiece(TEXTS, 90)
    assert tokenizer.size <= 90
    assert tuple(tokenizer.vocabulary[:5]) == SPECIAL_TOKENS
    assert "people" in tokenizer.vocabulary
    assert tokenizer.unk_id not in tokenizer.ids(TEXTS[1])


def test_the_same_texts_give_the_same_vocabulary_in_another_process(tmp_path: Path) -> None:
    here = train_wordpiece(TEXTS, 90)
    code = (
        "import sys; from electra.wordpiece import train_wordpiece; "
        f"train_wordpiece({TEXTS!r}, 90, sys.argv[1] + '/vocab.txt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert load_tokenizer(tmp_path / "vocab.txt").vocabulary == here.vocabulary


def test_a_vocabulary_smaller_than_the_alphabet_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size=20 is too small"):
        train_wordpiece(TEXTS, 20)


def test_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="texts are empty"):
        train_wordpiece([], 100)


def test_characters_seen_rarely_are_left_to_unk() -> None:
    tokenizer = train_wordpiece([*TEXTS, "one single ß"], 90)
    assert not any("ß" in piece for piece in tokenizer.vocabulary)
    assert tokenizer.ids("ß") == [tokenizer.unk_id]


def test_special_tokens_in_a_text_are_ordinary_characters() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "[", "]", "mask"])
    assert tokenizer.pieces("[MASK]") == ["[", "mask", "]"]


def test_a_vocabulary_without_a_special_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[MASK\] is missing"):
        Tokenizer([token for token in SPECIAL_TOKENS if token != "[MASK]"])


def test_a_word_without_pieces_is_unknown_when_words_are_given() -> None:
    tokenizer = Tokenizer([*SPECIAL_TOKENS, "a"])
    assert tokenizer.ids_of_words(["a", "\u200b"]) == [[5], [tokenizer.unk_id]]


def test_transformers_reads_the_saved_tokenizer_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_wordpiece(TEXTS, 90)
    tokenizer.save(tmp_path, 32)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The Government, for peoples?"
    assert theirs(text)["input_ids"] == [tokenizer.cls_id, *tokenizer.ids(text), tokenizer.sep_id]
    assert theirs.mask_token_id == tokenizer.mask_id


def test_a_transformers_directory_is_read_with_or_without_vocab_txt(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 90)
    tokenizer.save(tmp_path, 32)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "vocab.txt").unlink()
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither vocab.txt nor tokenizer.json"):
        load_tokenizer(tmp_path)


ODD = (
    "The Government, for peoples?",
    "  \t caf\u00e9 CAFE\u0301 na\u00efve \u00c5ngstr\u00f6m \u1e9e\u00df \ufb01 \u01c6",
    "\u6771\u4eac\u306b \u884c\u304f\u3002 \uac00\ub098 \u0e20\u0e32\u0e29\u0e32",
    "a\u0000b\ufffdc\u200bd\u00ade\u2028f\u2029g\u0085h\ufeffi\r\nj\u00a0k\u3000l",
    "\U0001f600\U0001f468\u200d\U0001f469 \u2014dash\u2026 $5 ^x` ~|<>= 3.14,15",
    "people" * 10 + " " + "p" * 100 + " " + "p" * 101 + " " + "e" * 200 + " " + "e" * 201,
    "[mask] [CLSS] ##people ##s",
    "",
    "   ",
    "\u0130stanbul \u0131 \u03a3\u03c2 \u0958 e\u0301\u0323",
)
RULES = (
    Rules(),
    Rules(lower_case=False),
    Rules(strip_accents=False),
    Rules(lower_case=False, strip_accents=True),
    Rules(split_chinese=False),
    Rules(characters=True),
)


def odd_vocabulary() -> list[str]:
    letters = sorted({c for text in ODD for c in text + text.lower() if not c.isspace()} | set("abcdefghijklmnop"))
    return [
        *SPECIAL_TOKENS,
        *letters,
        *(f"##{c}" for c in letters),
        "people",
        "##people",
        "\u6771\u4eac",
        "caf\u00e9",
        "cafe",
    ]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_odd_strings_have_the_ids_that_transformers_gives_them(tmp_path: Path, rules: Rules) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(odd_vocabulary(), rules)
    tokenizer.save(tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ODD:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.ids(text), text
    assert len(set(tokenizer.ids(ODD[1]))) > 5
    again = load_tokenizer(tmp_path)
    assert again.rules == rules
    assert again.fingerprint == tokenizer.fingerprint
    pair = theirs("people", "p")
    ids = [tokenizer.cls_id, *tokenizer.ids("people"), tokenizer.sep_id, *tokenizer.ids("p"), tokenizer.sep_id]
    assert pair["input_ids"] == ids
    assert sum(pair["token_type_ids"]) == 2
    assert len(theirs(ODD[5], truncation=True)["input_ids"]) == 64


@pytest.mark.parametrize("files", ["all", "vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"do_lower_case": False, "strip_accents": True},
    ],
    ids=str,
)
def test_a_directory_of_transformers_gives_the_ids_that_it_gives_there(
    tmp_path: Path, options: dict[str, bool], files: str
) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    vocabulary = odd_vocabulary()
    BertTokenizer({piece: i for i, piece in enumerate(vocabulary)}, **options).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    if files != "tokenizer.json":
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    if files == "vocab.txt":
        (tmp_path / "tokenizer.json").unlink()
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in ODD:
        assert ours.ids(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_rules_that_are_not_ours_are_named(tmp_path: Path) -> None:
    Tokenizer(odd_vocabulary()).save(tmp_path, 64)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    changes: list[tuple[dict[str, object], str]] = [
        ({"normalizer": {"type": "NFC"}}, "its normalizer is 'NFC'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is 'Whitespace'"),
        ({"added_tokens": [{"content": "<new>"}]}, "the added token '<new>'"),
    ]
    for change, message in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)


def test_a_script_without_spaces_is_learned_by_characters() -> None:
    text = "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22" * 100
    words = train_wordpiece([text] * 5, 100)
    characters = train_wordpiece([text] * 5, 100, characters=True)
    assert words.ids(text) == [words.unk_id]
    assert characters.unk_id not in characters.ids(text)
    assert len(characters.ids(text)) == 700
    assert not any(piece.startswith("##") for piece in characters.vocabulary)
