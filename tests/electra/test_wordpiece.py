from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from electra.wordpiece import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_wordpiece

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
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The Government, for peoples?"
    assert theirs(text)["input_ids"] == [tokenizer.cls_id, *tokenizer.ids(text), tokenizer.sep_id]
    assert theirs.mask_token_id == tokenizer.mask_id


def test_a_transformers_directory_is_read_with_or_without_vocab_txt(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 90)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "vocab.txt").unlink()
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither vocab.txt nor tokenizer.json"):
        load_tokenizer(tmp_path)
