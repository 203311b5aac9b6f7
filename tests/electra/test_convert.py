"""Official and transformers checkpoints, both ways."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError
from electra.config import ElectraConfig
from electra.convert import export_official, import_official, main
from electra.layouts import (
    from_official,
    infer_config,
    load_pretrained,
    official_name,
    our_name,
    pretraining_state,
    read_variables,
    save_transformers,
    to_official,
    why_not_stock,
)
from electra.model import Batch
from electra.objectives import ElectraPretrainer
from electra.wordpiece import SPECIAL_TOKENS, Tokenizer
from tests.electra.test_objectives import SPECIAL, TINY, pretrainer, texts

HEADS = ("--heads", "2", "--generator-heads", "1")


def randomised(model: ElectraPretrainer) -> ElectraPretrainer:
    """Every parameter random, so that none agrees by its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# Names


@pytest.mark.parametrize(
    ("ours", "official"),
    [
        ("electra.embeddings.word_embeddings.weight", "electra/embeddings/word_embeddings"),
        ("electra.embeddings.LayerNorm.weight", "electra/embeddings/LayerNorm/gamma"),
        ("electra.embeddings.LayerNorm.bias", "electra/embeddings/LayerNorm/beta"),
        ("generator.embeddings_project.weight", "generator/embeddings_project/kernel"),
        ("electra.encoder.layer.11.attention.self.query.bias", "electra/encoder/layer_11/attention/self/query/bias"),
        ("electra.encoder.layer.0.output.dense.weight", "electra/encoder/layer_0/output/dense/kernel"),
        ("discriminator_predictions.dense.bias", "discriminator_predictions/dense/bias"),
        ("discriminator_predictions.dense_prediction.weight", "discriminator_predictions/dense_1/kernel"),
        ("generator_lm_head.bias", "generator_predictions/output_bias"),
    ],
)
def test_names_map_both_ways(ours: str, official: str) -> None:
    assert official_name(ours) == official and our_name(official) == ours


@pytest.mark.parametrize("tying", ["none", "embeddings"])
def test_official_variables_come_back_unchanged(tying: Any) -> None:
    state = randomised(pretrainer(tying=tying)).state_dict()
    again = from_official(to_official(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_optimizer_slots_and_the_step_are_left_out() -> None:
    ones = torch.ones(2, 2)
    variables = {"electra/a/kernel": ones, "electra/a/kernel/adam_m": ones, "global_step": torch.tensor(3)}
    assert set(from_official(variables)) == {"electra.a.weight"}


# transformers


def test_transformers_reads_both_saved_networks_and_agrees_on_their_logits(tmp_path: Path) -> None:
    from transformers import ElectraForMaskedLM, ElectraForPreTraining

    model = randomised(pretrainer())
    save_transformers(model, tmp_path)
    batch = texts([9, 14])
    padded = {"input_ids": batch.pad(batch.ids_N), "attention_mask": batch.pad(torch.ones_like(batch.ids_N))}
    real = padded["attention_mask"].bool()
    discriminator = ElectraForPreTraining.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        discriminator(**padded).logits[real], model.discriminate(batch, batch.ids_N), rtol=1e-5, atol=2e-5
    )
    generator = ElectraForMaskedLM.from_pretrained(tmp_path / "generator").eval()
    hidden = model.generator_predictions(model.generator_hidden(batch, batch.ids_N))
    table = model.generator_embeddings.word_embeddings.weight
    logits = F.linear(hidden, table, model.generator_lm_head.bias)
    torch.testing.assert_close(generator(**padded).logits[real], logits, rtol=1e-5, atol=5e-5)


def test_a_directory_that_transformers_saved_is_read(tmp_path: Path) -> None:
    from transformers import ElectraModel

    model = randomised(pretrainer())
    save_transformers(model, tmp_path / "ours")
    bare = ElectraModel.from_pretrained(tmp_path / "ours")
    bare.save_pretrained(tmp_path / "theirs")  # names without "electra."
    loaded = load_pretrained(tmp_path / "theirs")
    batch = texts([9, 14])
    encoder = loaded.encoder(dropout=0.0, attention_dropout=0.0)
    torch.testing.assert_close(encoder(batch), model.electra(batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", ["mlm", "replace_mlm", "all_tokens_mlm"])
def test_masked_language_models_are_saved_with_the_main_networks_head(objective: Any, tmp_path: Path) -> None:
    model = randomised(pretrainer(objective))
    save_transformers(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.architecture == "ElectraForMaskedLM"
    head = model.generator_lm_head if objective == "mlm" else model.mlm_lm_head
    assert torch.equal(loaded.state["generator_lm_head.bias"], head.bias)
    assert (tmp_path / "generator").exists() == (objective != "mlm")


@pytest.mark.parametrize(
    "changes", [{}, {"tying": "none"}, {"relative_positions": True}, {"tying": "all", "generator_factor": 1.0}]
)
def test_pre_training_goes_on_from_saved_directories(changes: dict[str, Any], tmp_path: Path) -> None:
    model = randomised(pretrainer(**changes))
    save_transformers(model, tmp_path)
    config, state = pretraining_state(load_pretrained(tmp_path), load_pretrained(tmp_path / "generator"))
    again = ElectraPretrainer(config, SPECIAL, max_length=20)
    if model.config.tying == "all":  # two files cannot tell that the networks were one
        assert config.tying == "embeddings"
    else:
        assert replace(config, init=model.config.init) == replace(
            model.config,
            generator_heads=model.config.generator_config().heads,
            generator_intermediate_size=model.config.generator_config().intermediate_size,
        )
    again.load_state_dict(state)
    batch = texts([20, 9])
    losses = (m.eval()(batch, generator=torch.Generator().manual_seed(0)).total for m in (model, again))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_networks_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name, changes in (("a", {"layers": 2}), ("b", {"layers": 1}), ("c", {"max_position": 17})):
        save_transformers(pretrainer(**changes), tmp_path / name)
    with pytest.raises(UserError, match="max_position is 17 in the one and"):
        pretraining_state(load_pretrained(tmp_path / "a"), load_pretrained(tmp_path / "c" / "generator"))
    with pytest.raises(UserError, match="the generator has 2 layers, its discriminator 1"):
        pretraining_state(load_pretrained(tmp_path / "b"), load_pretrained(tmp_path / "a" / "generator"))


@pytest.mark.parametrize("heads", [2, 1])
def test_the_default_recipes_network_is_read_by_stock_transformers(heads: int, tmp_path: Path) -> None:
    """Relative positions, and embeddings as wide as the hidden states; rows of pairs, of unequal lengths."""
    from transformers import AutoModel, AutoTokenizer

    model = randomised(pretrainer(relative_positions=True, embedding_size=TINY.hidden_size, heads=heads))
    save_transformers(model, tmp_path, Tokenizer([*SPECIAL_TOKENS, *(f"w{i}" for i in range(TINY.vocab_size - 5))]))
    stock, problems = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"] and not problems["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = [("w1 w2 w3 nobody w4", "w5 w6"), ("w7", ""), (" ".join(["w9 w8"] * 7), "w1 w0")]
    given = tokenizer(*map(list, zip(*rows)), padding=True, return_tensors="pt")
    assert given["token_type_ids"].sum() > 0 and given["input_ids"].shape[1] <= TINY.max_position
    batch = Batch.from_padded(given["input_ids"], given["attention_mask"], given["token_type_ids"])
    states: list[Tensor] = []
    with torch.no_grad():
        found = stock.eval()(**given, output_hidden_states=True).hidden_states
        model.electra.eval()(batch, states=states)
    real = given["attention_mask"].bool()
    assert len(found) == len(states) == TINY.layers + 1
    for theirs, ours in zip(found, states):
        torch.testing.assert_close(theirs[real], ours, rtol=1e-5, atol=1e-5)
    assert ours.std() > 0.1
    loaded = load_pretrained(tmp_path)  # and here as it was, bit by bit
    assert loaded.config == replace(model.config, **{k: getattr(loaded.config, k) for k in GENERATORS})
    assert loaded.architecture == "ElectraForPreTraining"
    wanted = {k: v for k, v in model.state_dict().items() if k.startswith(("electra.", "discriminator_"))}
    assert loaded.state.keys() == wanted.keys()
    assert all(torch.equal(loaded.state[k], v) for k, v in wanted.items())


# What the main network's file does not say of the generator.
GENERATORS = ("generator_factor", "generator_heads", "generator_intermediate_size", "generator", "tying")


def test_the_default_configuration_is_such_a_network() -> None:
    from common.cli import parse_config
    from electra.config import ElectraRun
    from electra.train import CONFIGS

    for name in ("small", "smoke", "paper_small"):
        config = parse_config(ElectraRun, CONFIGS / f"{name}.yaml", "", [])[0].model.with_vocabulary(500)
        assert why_not_stock(config) is None
    assert "embeddings of 64 for states of 32" in str(why_not_stock(replace(config, **RELATIVE)))


RELATIVE = {"relative_positions": True, "embedding_size": 64, "hidden_size": 32, "heads": 2}


def test_auto_classes_refuse_a_network_with_relative_positions_that_they_lack(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = randomised(pretrainer(relative_positions=True))
    save_transformers(model, tmp_path)
    with pytest.raises((ValueError, KeyError)):
        AutoModel.from_pretrained(tmp_path)
    batch = texts([9])
    encoder = load_pretrained(tmp_path).encoder()
    torch.testing.assert_close(encoder(batch), model.electra(batch))


def test_the_vocabulary_travels_with_both_networks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_transformers(pretrainer(), tmp_path / "model", Tokenizer([*SPECIAL_TOKENS, "the", "peace", "##ful"]))
    for folder in (tmp_path / "model", tmp_path / "model" / "generator"):
        ids = AutoTokenizer.from_pretrained(folder)("The peaceful")["input_ids"]
        assert ids == [2, 5, 6, 7, 3]


def spoil(directory: Path, change: Any) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def in_shards(directory: Path) -> Path:
    """The weights in two files and an index; returns the second."""
    state = load_file(directory / "model.safetensors")
    files = {"a.safetensors": sorted(state)[::2], "b.safetensors": sorted(state)[1::2]}
    for file, mine in files.items():
        save_file({name: state[name] for name in mine}, directory / file, {"format": "pt"})
    places = {name: file for file, mine in files.items() for name in mine}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / "model.safetensors").unlink()
    return directory / "b.safetensors"


def test_weights_in_shards_are_read_like_whole_ones(tmp_path: Path) -> None:
    save_transformers(randomised(pretrainer()), tmp_path)
    whole = load_pretrained(tmp_path)
    in_shards(tmp_path)
    shards = load_pretrained(tmp_path)
    assert shards.config == whole.config and shards.state.keys() == whole.state.keys()
    assert all(torch.equal(shards.state[name], value) for name, value in whole.state.items())


@pytest.mark.parametrize(
    ("spoilt", "sentence"),
    [
        (lambda v: v.pop("electra/encoder/layer_0/output/dense/bias"), "layer.0.output.dense.bias is missing"),
        (lambda v: v["electra/encoder/layer_0/output/dense/bias"].fill_(float("inf")), "not finite"),
        (lambda v: v["discriminator_predictions/dense/bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_official_variables_that_are_not_whole_are_named(spoilt: Any, sentence: str, tmp_path: Path) -> None:
    variables = {name: value.clone() for name, value in to_official(randomised(pretrainer()).state_dict()).items()}
    spoilt(variables)
    with pytest.raises(UserError, match=sentence):
        import_official(variables, tmp_path / "out", heads=2, generator_heads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: os.remove(d / "config.json"), "no config.json"),
        (lambda d: os.remove(d / "model.safetensors"), "no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x08" * 100), "not a safetensors file"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: change_config(d, model_type="bert"), "model_type is 'bert'"),
        (lambda d: change_config(d, hidden_act="relu"), "hidden_act is 'relu'"),
        (
            lambda d: change_config(d, position_embedding_type="relative_key"),
            "position_embedding_type is 'relative_key'",
        ),
        (
            lambda d: spoil(d, lambda s: s["electra.encoder.layer.0.output.dense.bias"].fill_(float("nan"))),
            "not finite",
        ),
        (lambda d: in_shards(d).unlink(), "shard b.safetensors is missing"),
        (lambda d: change_config(d, vocab_size=51), "word_embeddings.weight has shape"),
        (lambda d: change_config(d, num_hidden_layers=3), "is missing"),
    ],
)
def test_damaged_directories_are_refused_in_one_sentence(damage: Any, sentence: str, tmp_path: Path) -> None:
    save_transformers(pretrainer(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=sentence):
        load_pretrained(tmp_path)


def change_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Official checkpoints


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A block of a sorted-string table with shared prefixes and one restart point."""
    out, before = b"", b""
    for key, value in entries:
        shared = next((i for i, (a, b) in enumerate(zip(before, key)) if a != b), min(len(before), len(key)))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + struct.pack("<II", 0, 1)


def write_bundle(prefix: Path, variables: dict[str, Tensor]) -> None:
    """A checkpoint in TensorFlow's format V2, written from its specification, with two data blocks."""
    data, entries = b"", [(b"", bytes([0x08, 1]))]  # header: one shard
    for name, value in sorted(variables.items()):
        dims = b"".join(bytes([0x12]) + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in value.shape))
        kind = {torch.float32: 1, torch.int64: 9}[value.dtype]
        raw = value.numpy().tobytes()
        entry = bytes([0x08, kind, 0x12]) + varint(len(dims)) + dims
        if data:
            entry += bytes([0x20]) + varint(len(data))
        entry += bytes([0x28]) + varint(len(raw)) + bytes([0x35]) + struct.pack("<I", 0)
        entries.append((name.encode(), entry))
        data += raw
    table, handles = b"", []
    half = len(entries) // 2
    for part in (entries[:half], entries[half:]):
        content = block(part)
        handles.append((part[-1][0], varint(len(table)) + varint(len(content))))
        table += content + b"\x00" + b"\x00" * 4
    index = block(handles)
    footer = varint(0) + varint(0) + varint(len(table)) + varint(len(index))
    table += index + b"\x00" * 5 + footer.ljust(40, b"\x00") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(prefix.name + ".index").write_bytes(table)
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)


def test_a_tensorflow_checkpoint_is_read_without_tensorflow(tmp_path: Path) -> None:
    variables = to_official(randomised(pretrainer()).state_dict())
    variables = {k: v.contiguous() for k, v in variables.items()}
    everything = {
        **variables,
        "global_step": torch.tensor(7),
        "electra/embeddings/word_embeddings/adam_m": torch.ones(2),
    }
    write_bundle(tmp_path / "model.ckpt-90", {"global_step": torch.tensor(1)})
    write_bundle(tmp_path / "model.ckpt-100", everything)
    read = read_variables(tmp_path)  # the latest
    assert read.keys() == everything.keys() and int(read["global_step"]) == 7
    assert all(torch.equal(read[name], value) for name, value in variables.items())


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model.ckpt", {"a/kernel": torch.ones(3, 2)})
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:8])
    with pytest.raises(UserError, match="not a whole TensorFlow checkpoint"):
        read_variables(tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt.index").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no table footer"):
        read_variables(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no such file"):
        read_variables(tmp_path / "absent")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_survive_official_to_transformers_and_back(suffix: str, tmp_path: Path) -> None:
    variables = {k: v.contiguous() for k, v in to_official(randomised(pretrainer()).state_dict()).items()}
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    if suffix == ".npz":
        np.savez(source, **{k: v.numpy() for k, v in variables.items()})
    else:
        save_file(variables, source)
    main(["import", str(source), str(tmp_path / "hf"), *HEADS])
    main(["export", str(tmp_path / "hf"), str(target)])
    again = read_variables(target)
    assert again.keys() == variables.keys()
    assert all(torch.equal(again[name], value) for name, value in variables.items())
    assert load_file(tmp_path / "hf" / "generator" / "model.safetensors")["generator_lm_head.bias"].shape == (50,)


def test_a_discriminator_alone_and_a_masked_language_model_are_imported(tmp_path: Path) -> None:
    state = to_official(randomised(pretrainer()).state_dict())
    alone = {k: v for k, v in state.items() if not k.startswith("generator")}
    assert import_official(alone, tmp_path / "disc", heads=2) == [tmp_path / "disc"]
    assert load_pretrained(tmp_path / "disc").architecture == "ElectraForPreTraining"
    bert = to_official(randomised(pretrainer("mlm")).state_dict())
    assert import_official(bert, tmp_path / "bert", heads=2) == [tmp_path / "bert"]
    assert load_pretrained(tmp_path / "bert").architecture == "ElectraForMaskedLM"
    assert export_official(tmp_path / "bert").keys() == bert.keys()


def test_heads_are_64_wide_unless_given() -> None:
    state = {
        "electra.embeddings.word_embeddings.weight": torch.zeros(9, 4),
        "electra.embeddings.position_embeddings.weight": torch.zeros(6, 4),
        "electra.embeddings.token_type_embeddings.weight": torch.zeros(2, 4),
        "electra.encoder.layer.0.attention.self.query.weight": torch.zeros(128, 128),
        "electra.encoder.layer.0.intermediate.dense.weight": torch.zeros(256, 128),
    }
    assert infer_config(state).heads == 2 and infer_config(state, heads=4).heads == 4
    assert infer_config(state).layers == 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of the official ELECTRA code"):
        import_official({"a/kernel": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(UserError, match=r"no \*.index file"):
        read_variables(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        read_variables(tmp_path / "a.npz")
    save_transformers(pretrainer(), tmp_path / "model")
    with pytest.raises(UserError, match="expected a name that ends in"):
        main(["export", str(tmp_path / "model"), str(tmp_path / "out.bin")])


def test_an_exported_batch_reads_the_same_after_import(tmp_path: Path) -> None:
    model = randomised(pretrainer())
    import_official(to_official(model.state_dict()), tmp_path, 2, 1)
    batch: Batch = texts([12, 5])
    encoder = load_pretrained(tmp_path).encoder(dropout=0.0, attention_dropout=0.0)
    torch.testing.assert_close(encoder(batch), model.electra(batch))


def test_relative_positions_are_not_exported_to_the_official_code(tmp_path: Path) -> None:
    save_transformers(pretrainer(relative_positions=True), tmp_path)
    with pytest.raises(UserError, match="no relative positions"):
        export_official(tmp_path)


def test_what_stock_transformers_cannot_read_is_said_at_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace
    from typing import cast

    from electra.run import Run

    def said(config: ElectraConfig, *arms: str) -> str:
        run = SimpleNamespace(model=config, config=SimpleNamespace(arms=arms), special=SPECIAL)
        Run.say_what_transformers_lacks(cast(Run, run))
        return capfd.readouterr()[1]

    relative = replace(TINY, relative_positions=True, embedding_size=TINY.hidden_size, generator_factor=0.5)
    assert said(TINY, "electra") == said(relative, "mlm") == ""
    message = said(relative, "electra", "mlm")
    assert message.startswith("the generator is saved for this program alone") and message.count("\n") == 1
    assert "embeddings of 16 for states of 8" in message
