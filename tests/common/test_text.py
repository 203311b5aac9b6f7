"""The packaged MiniLM and any transformers encoder directory behind one interface."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.data.text import TextEncoder, packaged_minilm, unknown_texts
from common.errors import UserError
from tests.word_tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder()


@pytest.fixture(scope="module")
def small_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder directory whose encoder is what conditions images."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    words = "[PAD] [UNK] a red green apple"
    word_tokenizer(words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=6, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_sentence_vectors_have_the_known_cosines(minilm: TextEncoder) -> None:
    vectors = minilm.sentence(["a red apple", "an apple that is red", "a green apple", "a dog on the beach"])
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    cosines = vectors @ vectors[0]
    torch.testing.assert_close(cosines, torch.tensor([1.0, 0.96, 0.80, 0.16]), atol=0.01, rtol=0)


def test_states_do_not_depend_on_batch_or_padding(minilm: TextEncoder) -> None:
    texts = ["a red apple", "a very long caption about a dog that runs on the beach", "", "fish"]
    states, mask = minilm.encode(texts, length=20)
    assert states.shape == (4, 20, 384) and mask.shape == (4, 20) and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [5, 15, 2, 3]
    assert states[~mask].abs().max() == 0
    one_by_one = TextEncoder(batch_size=1)
    for i, text in enumerate(texts):
        alone, alone_mask = one_by_one.encode([text])
        assert alone_mask.all() and alone.shape[1] == mask[i].sum()
        torch.testing.assert_close(states[i][mask[i]], alone[0], atol=2e-5, rtol=1e-4)


def test_long_text_is_cut_with_a_warning(minilm: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="cut to 4 tokens"):
        states, mask = TextEncoder().encode(["a dog that runs on the beach", "a"], length=4)
    assert states.shape[1] == 4 and mask.sum(1).tolist() == [4, 3]


def test_no_texts_give_empty_tensors(minilm: TextEncoder) -> None:
    states, mask = minilm.encode([], length=7)
    assert states.shape == (0, 7, 384) and mask.shape == (0, 7)
    assert minilm.sentence([]).shape == (0, 384)


def test_encoder_decoder_directory_is_read_as_its_encoder(small_t5: Path) -> None:
    from transformers import T5EncoderModel

    encoder = TextEncoder(small_t5)
    states, mask = encoder.encode(["a red apple", "a apple", ""])
    assert encoder.width == 16 and mask.sum(1).tolist() == [3, 2, 0]
    reference = T5EncoderModel.from_pretrained(small_t5).eval()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([[2, 3, 5]])).last_hidden_state
    torch.testing.assert_close(states[0], expected[0])


def test_fingerprint_follows_weights_and_tokenizer_not_the_place(small_t5: Path, tmp_path: Path) -> None:
    import shutil

    first = TextEncoder(small_t5).fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(small_t5, copy)
    assert TextEncoder(copy).fingerprint == first
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert TextEncoder(copy).fingerprint != first
    assert TextEncoder().fingerprint != first


def test_wrong_directories_are_named(tmp_path: Path, small_t5: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        TextEncoder(tmp_path)
    (tmp_path / "config.json").write_text((small_t5 / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((small_t5 / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text((small_t5 / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match="no encoder weights"):
        TextEncoder(tmp_path).encode(["a"])
    with pytest.raises(UserError, match="at most 512 tokens, 600"):
        TextEncoder().encode(["a"], length=600)


def test_a_directory_that_brings_its_own_code_is_refused_without_a_question(small_t5: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        folder = Path(shutil.copytree(small_t5, tmp_path / name.split(".")[0]))
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Model"}}))
        with pytest.raises(UserError, match=f"{name}: auto_map asks to run Python code"):
            TextEncoder(folder)


def test_constructing_and_fingerprinting_does_not_import_transformers() -> None:
    code = (
        "import sys; from common.data.text import TextEncoder; TextEncoder().fingerprint; "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert (packaged_minilm() / "model.safetensors").is_file()


def test_texts_of_unknown_words_are_counted(minilm: TextEncoder) -> None:
    tokenizer = word_tokenizer("[UNK] a cat", unk_token="[UNK]")
    ids = tokenizer(["a cat", "zebra xylophone", "", "zebra cat"])["input_ids"]
    assert unknown_texts(tokenizer, ids) == [1]
