"""Caption cleaning, prompt flags and token features."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from common.errors import UserError
from pixart.text import TextEncoder, clean_caption, fit_length, parse_prompt
from tests.word_tokenizer import word_tokenizer


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("", ""),
        ("A cat.  On www.cats.org/big-one", "a cat. on"),
        ("see http://192.168.1.1/x.png", "see"),
        ("<b>Bold</b> <script>x=1</script>cat &eacute;clair", "bold cat éclair"),
        ("caf\u0065\u0301 at night", "caf\u00e9 at night"),
        ("ﬁsh ｆｕｌｌ‐width", "fish full-width"),
        ("a,b and c.d", "a, b and c. d"),
        ("quiet — loud … ‘soft’", "quiet - loud … 'soft"),
        ("5x7 print 12:30 (2)", "print 12:30 2"),
    ],
)
def test_cleaned_captions(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_cleaning_is_applied_until_nested_markup_is_gone() -> None:
    assert clean_caption("&amp;lt;b&amp;gt;cat") == clean_caption(clean_caption("&amp;lt;b&amp;gt;cat"))


def test_flags_name_the_height_first() -> None:
    tall = parse_prompt("a tower --ar 2:1", 512)
    assert (tall.height, tall.width, tall.ratio) == (704, 352, 2.0)
    assert parse_prompt("a tower --aspect_ratio 1:2 --ar 2:1", 512).ratio == 0.5
    assert parse_prompt("a tower", 512).text == "a tower"


def test_hw_sets_the_size_and_the_nearest_trained_shape() -> None:
    prompt = parse_prompt("a road --hw 300:590", 512)
    assert (prompt.text, prompt.height, prompt.width, prompt.ratio) == ("a road ", 300, 590, 1.0)
    assert (prompt.bucket.height, prompt.bucket.width) == (352, 704)


def test_small_base_has_small_sizes() -> None:
    prompt = parse_prompt("two stars --ar 1:2", 32, multiple=4)
    assert prompt.height * 2 == pytest.approx(prompt.width, rel=0.2) and prompt.height % 4 == 0


@pytest.mark.parametrize("flags", ["--ar 16x9", "--hw 0:64", "--aspect_ratio", "--ar :"])
def test_broken_flags_are_refused(flags: str) -> None:
    with pytest.raises(UserError, match="needs height:width"):
        parse_prompt(f"a cat {flags}")


@pytest.fixture(params=["t5", "bert"])
def encoder_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    words = "[PAD] [UNK] </s> a red cat on the mat"
    size, template = len(words.split()), "$A </s>" if request.param == "t5" else ""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    word_tokenizer(words, template, model_max_length=16, **special).save_pretrained(tmp_path)
    if request.param == "t5":
        config = T5Config(vocab_size=size, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        T5EncoderModel(config).save_pretrained(tmp_path)
    else:
        config = BertConfig(
            vocab_size=size, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_features_of_any_encoder_are_right_padded_and_independent_of_the_batch(encoder_folder: Path) -> None:
    encoder = TextEncoder(encoder_folder, length=6)
    features, mask = encoder.encode(["A red CAT!!", "a cat on the mat on a mat", ""])
    assert features.shape == (3, 6, encoder.channels) and features.dtype == torch.float32
    assert mask.dtype == torch.bool and mask[1].all() and mask[2].sum() == 1
    count = int(mask[0].sum())
    assert mask[0].tolist() == [True] * count + [False] * (6 - count)
    assert torch.equal(features[0, count:], features[0, count - 1 :][:1].expand(6 - count, -1))
    alone, _ = encoder.encode(["a red cat!!"])
    torch.testing.assert_close(alone[0], features[0], rtol=1e-5, atol=1e-5)


def test_fingerprint_follows_encoder_length_and_cleaning(encoder_folder: Path) -> None:
    prints = {
        TextEncoder(encoder_folder, length=6).fingerprint,
        TextEncoder(encoder_folder, length=7).fingerprint,
        TextEncoder(encoder_folder, length=6, clean=False).fingerprint,
        TextEncoder(encoder_folder, length=6, dtype=torch.bfloat16).fingerprint,
    }
    assert len(prints) == 4


def test_default_encoder_is_the_packaged_minilm() -> None:
    assert TextEncoder().channels == 384 and TextEncoder().length == 120


def test_short_captions_repeat_their_last_token_without_mask_and_long_ones_are_cut() -> None:
    features = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    longer, longer_mask = fit_length(features, mask, 6)
    assert longer[..., 0].tolist() == [[0, 1, 1, 1, 1, 1], [4, 5, 6, 7, 7, 7]]
    assert longer_mask.sum(1).tolist() == [2, 4]
    shorter, shorter_mask = fit_length(features, mask, 3)
    assert shorter[..., 0].tolist() == [[0, 1, 1], [4, 5, 6]]
    assert shorter_mask.sum(1).tolist() == [2, 3]
    with pytest.raises(ValueError, match="right-padded"):
        fit_length(features, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 6)


def test_hostile_captions_take_no_more_time_than_long_ones() -> None:
    """Every rule tried runs of its characters from each of their places: 16,000 took a second and more."""
    plain = "a red fox in the snow " * 700
    for part in ("a1", "a.", "<a ", "<a/", "1.", "-_", "[", "\u00e9."):
        started = time.process_time()
        clean_caption(plain)
        between = time.process_time()
        clean_caption(part * (16_000 // len(part)))
        assert time.process_time() - between < 5 * (between - started) + 0.2, part


def test_what_follows_a_tag_that_never_ends_stays_as_written() -> None:
    assert clean_caption("<b>a cat</b> is < 3 years & old <i") == "a cat is < 3 years old <i"
    assert clean_caption("a <script>let x = 1") == "a"


def test_captions_that_are_cleaned_to_nothing_are_counted_once(encoder_folder: Path) -> None:
    encoder = TextEncoder(encoder_folder, length=6)
    with pytest.warns(UserWarning, match="2 of 4 captions are cleaned to nothing.*, the first is '一只猫'"):
        encoder.say_lost(["a cat", "一只猫", "", "狗"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["一只猫", "a cat"])
