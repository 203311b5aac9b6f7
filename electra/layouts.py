"""Weights in the layouts of the official TensorFlow code and of transformers.

What differs between the layouts: kernels are [in, out] in TensorFlow; LayerNorm has gamma and beta; `layer_3` is
`layer.3`; `discriminator_predictions/dense_1` is `dense_prediction`; `generator_predictions/output_bias` is
`generator_lm_head.bias`; the generator's embeddings are the main network's.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from common.files import read_object, write_json
from common.weights import INDEX, not_finite, read_weights, save_weights
from electra.config import ElectraConfig
from electra.model import Encoder
from electra.objectives import ElectraPretrainer
from electra.wordpiece import Tokenizer

StateDict = dict[str, Tensor]
Architecture = Literal["ElectraForPreTraining", "ElectraForMaskedLM"]
PRETRAINED: tuple[str, ...] = (*get_args(Architecture), "ElectraModel")

# transformers' Electra has no relative positions. Its LayoutLMv3, whose text half is the same network otherwise, has: a
# network whose embeddings are as wide as its hidden states is saved as one, with positions of a page that are all zero.
# The others carry a type of their own, so that AutoModel refuses them.
MODEL_TYPE, STOCK_RELATIVE_TYPE, RELATIVE_MODEL_TYPE = "electra", "layoutlmv3", "electra-relative"
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_SLOTS = ("/adam_m", "/adam_v")  # the official optimizer's moments


# Names


def official_name(name: str) -> str:
    """TensorFlow's name of one of our parameters."""
    name = name.replace("generator_lm_head.bias", "generator_predictions.output_bias")
    name = name.replace("discriminator_predictions.dense_prediction", "discriminator_predictions.dense_1")
    name = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name)
    name = re.sub(rf"({'|'.join(_TABLES)})\.weight$", r"\1", name)
    name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
    name = re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)
    return re.sub(r"\.weight$", ".kernel", name).replace(".", "/")


def our_name(name: str) -> str:
    """Our name of a TensorFlow variable: the inverse of `official_name`."""
    name = name.replace("/", ".")
    name = name.replace("generator_predictions.output_bias", "generator_lm_head.bias")
    name = name.replace("discriminator_predictions.dense_1.", "discriminator_predictions.dense_prediction.")
    name = re.sub(r"\.layer_(\d+)\.", r".layer.\1.", name)
    name = re.sub(rf"({'|'.join(_TABLES)})$", r"\1.weight", name)
    name = re.sub(r"\.gamma$", ".weight", name)
    name = re.sub(r"\.beta$", ".bias", name)
    return re.sub(r"\.kernel$", ".weight", name)


def to_official(state: Mapping[str, Tensor]) -> StateDict:
    """Parameters (or gradients) under TensorFlow's names and in its layout."""
    named = {official_name(name): value for name, value in state.items() if "." in name}
    return {name: value.t() if name.endswith("/kernel") else value for name, value in named.items()}


def from_official(variables: Mapping[str, Tensor]) -> StateDict:
    """Our parameters from TensorFlow's variables; optimizer moments and the step counter are left out."""
    kept = {k: v for k, v in variables.items() if "/" in k and not k.endswith(_SLOTS)}
    return {our_name(k): v.t().contiguous() if k.endswith("/kernel") else v for k, v in kept.items()}


# transformers


# What transformers' config.json calls our fields; the second half may be missing there.
_SIZES = {
    "vocab_size": "vocab_size",
    "embedding_size": "embedding_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position",
}
_OPTIONAL = {
    "type_vocab_size": "type_vocab",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_std",
    "layer_norm_eps": "layer_norm_eps",
}


# Options that change what the network computes and are not built here: the only value that is read, what is missing.
_ONLY: dict[str, tuple[Any, str]] = {
    "is_decoder": (False, "causal encoders"),
    "add_cross_attention": (False, "cross-attention layers"),
    "position_embedding_type": ("absolute", "transformers' relative keys"),
    "pruned_heads": ({}, "pruned heads"),
}


def transformers_config(config: ElectraConfig, architecture: str, pad_id: int = 0) -> dict[str, Any]:
    """The content of config.json; what transformers does not know stands under `pretraining`."""
    kind = MODEL_TYPE
    if config.relative_positions:
        kind = RELATIVE_MODEL_TYPE if why_not_stock(config, pad_id) else STOCK_RELATIVE_TYPE
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in (_SIZES | _OPTIONAL).items()},
        "hidden_act": "gelu",
        "pad_token_id": pad_id,
        "tie_word_embeddings": True,
        "pretraining": {"init": config.init, "relative_positions": config.relative_positions},
    }
    if kind != STOCK_RELATIVE_TYPE:
        return values
    columns, length = config.hidden_size // 8, config.max_position
    return values | {
        "architectures": ["LayoutLMv3Model"],
        "max_position_embeddings": length + 1,  # position 0 is that of padding
        "bos_token_id": None,
        "eos_token_id": None,
        "visual_embed": False,
        "has_spatial_attention_bias": False,
        "max_2d_position_embeddings": 1,
        "coordinate_size": columns,
        "shape_size": (config.hidden_size - 4 * columns) // 2,
        "has_relative_attention_bias": True,
        "rel_pos_bins": 4 * length,  # every distance below `length` has a bin of its own, to either side
        "max_rel_pos": 2 * length,
        "pretraining": {**values["pretraining"], "architecture": architecture},
    }


def why_not_stock(config: ElectraConfig, pad_id: int = 0) -> str | None:
    """Why transformers has no network like this one; None where it has one."""
    if not config.relative_positions:
        return None
    if config.embedding_size != config.hidden_size:
        return f"it has relative positions and embeddings of {config.embedding_size} for states of {config.hidden_size}"
    return (
        None if pad_id == 0 and config.hidden_size % 2 == 0 else "it has relative positions and an odd width or pad id"
    )


def to_stock_relative(config: ElectraConfig, state: Mapping[str, Tensor]) -> StateDict:
    """Parameters by the names of LayoutLMv3; `relative_positions.bias` stays too, since scaling it rounds."""
    renamed = {re.sub(r"^electra\.", f"{STOCK_RELATIVE_TYPE}.", name): value for name, value in state.items()}
    base, length, width = f"{STOCK_RELATIVE_TYPE}.", config.max_position, config.hidden_size
    positions = f"{base}embeddings.position_embeddings.weight"
    renamed[positions] = torch.cat([torch.zeros(1, width), renamed[positions].float()])
    bias_AR = renamed[f"{base}relative_positions.bias"].float()
    bins_AK = torch.zeros(config.heads, 4 * length)
    distance = torch.arange(length)
    bins_AK[:, distance] = bias_AR[:, length - 1 - distance]  # keys before the query, and itself
    bins_AK[:, 2 * length + distance[1:]] = bias_AR[:, length - 1 + distance[1:]]
    # There the bias is divided by the root of a head's width.
    renamed[f"{base}encoder.rel_pos_bias.weight"] = bins_AK * math.sqrt(width // config.heads)
    columns = width // 8
    for name, size in (
        ("x", columns),
        ("y", columns),
        ("h", width // 2 - 2 * columns),
        ("w", width // 2 - 2 * columns),
    ):
        renamed[f"{base}embeddings.{name}_position_embeddings.weight"] = torch.zeros(1, size)
    return renamed


def from_stock_relative(state: Mapping[str, Tensor]) -> StateDict:
    """The inverse of `to_stock_relative`."""
    ours = {re.sub(rf"^{STOCK_RELATIVE_TYPE}\.", "electra.", name): value for name, value in state.items()}
    ours = {k: v for k, v in ours.items() if not re.search(r"rel_pos_bias|embeddings\.[xyhw]_position_", k)}
    positions = "electra.embeddings.position_embeddings.weight"
    if positions in ours:
        ours[positions] = ours[positions][1:]
    return ours


def from_transformers(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[ElectraConfig, StateDict]:
    """Our configuration and parameters from transformers' config.json and weights.

    Weights of a bare ElectraModel get the prefix `electra.`; a copy of the token table in the vocabulary head and the
    position_ids buffer are dropped.

    Raises:
        UserError: another architecture, an option that ELECTRA lacks, or a vocabulary head with its own table.
    """
    kind = values.get("model_type", MODEL_TYPE)
    if kind == STOCK_RELATIVE_TYPE and (values.get("pretraining") or {}).get("relative_positions"):
        values = {**values, "max_position_embeddings": values.get("max_position_embeddings", 1) - 1}
        kind, state = RELATIVE_MODEL_TYPE, from_stock_relative(state)
    if kind not in (MODEL_TYPE, RELATIVE_MODEL_TYPE):
        raise UserError(f'config.json: model_type is {kind!r}; expected "{MODEL_TYPE}"')
    if values.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"config.json: hidden_act is {values['hidden_act']!r}; ELECTRA uses gelu")
    for name, (only, what) in _ONLY.items():
        if values.get(name, only) != only:
            raise UserError(f"config.json: {name} is {values[name]!r}, and {what} are missing here; read is {only!r}")
    for name in _SIZES:
        if name not in values:
            raise UserError(f"config.json: {name!r} is missing")
    config = ElectraConfig(
        **{ours: values[theirs] for theirs, ours in (_SIZES | _OPTIONAL).items() if theirs in values},
        relative_positions=kind == RELATIVE_MODEL_TYPE,
        init=values.get("pretraining", {}).get("init", "official"),
    )
    renamed: StateDict = {}
    for key, value in state.items():
        name = f"electra.{key}" if key.startswith(("embeddings.", "embeddings_project.", "encoder.")) else key
        if not name.endswith(".position_ids"):
            renamed[name] = value
    if (table := renamed.pop("generator_lm_head.weight", None)) is not None and not torch.equal(
        table, renamed["electra.embeddings.word_embeddings.weight"]
    ):
        raise UserError("the vocabulary head has a token table of its own; ELECTRA's is tied to the embeddings")
    return config, renamed


@dataclass(frozen=True)
class Pretrained:
    """A network and its head as read from a transformers directory."""

    config: ElectraConfig
    architecture: str
    state: StateDict

    def encoder(self, **changes: Any) -> Encoder:
        """The encoder alone; `changes` replace fields of its configuration (dropout)."""
        encoder = Encoder(replace(self.config, **changes))
        prefix = "electra."
        encoder.load_state_dict({k[len(prefix) :]: v for k, v in self.state.items() if k.startswith(prefix)})
        return encoder


def load_pretrained(directory: Path) -> Pretrained:
    """Read config.json and model.safetensors (or its shards) of an Electra model.

    Raises:
        UserError: a missing or damaged file, pickled weights only, or weights that do not fit the configuration.
    """
    directory = Path(directory)
    config_file, weights = directory / "config.json", directory / "model.safetensors"
    if not config_file.is_file():
        raise UserError(f"{directory}: no config.json; expected a directory that transformers or train.py wrote")
    if not weights.is_file() and (shards := directory / f"model{INDEX}").is_file():
        weights = shards
    if not weights.is_file():
        hint = " (pytorch_model.bin is pickled and not read)" if (directory / "pytorch_model.bin").exists() else ""
        raise UserError(f"{directory}: no model.safetensors{hint}; save the model with safe_serialization")
    values = read_object(config_file)
    state = read_weights(weights)[0]
    config, renamed = from_transformers(values, {k: v.float() for k, v in state.items()})
    with torch.device("meta"):
        expected = {f"electra.{k}": v.shape for k, v in Encoder(config).state_dict().items()}
    for name, shape in expected.items():
        found = renamed.get(name)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {list(found.shape)}, config.json means {list(shape)}"
            raise UserError(f"{weights}: {name} {what}")
    if bad := not_finite(renamed):
        raise UserError(f"{weights}: {bad[0]} holds numbers that are not finite")
    own = (values.get("pretraining") or {}).get("architecture")
    return Pretrained(config, own or (values.get("architectures") or ["ElectraModel"])[0], renamed)


def encoder_folder(path: Path) -> Path:
    """The transformers directory in an arm's folder (discriminator/, or encoder/ of an arm that has none); another
    folder is what it is.

    Raises:
        UserError: the folder of a whole run of several arms.
    """
    if (path / "config.json").is_file():
        return path
    for name in ("discriminator", "encoder"):
        if (path / name / "config.json").is_file():
            return path / name
    arms = sorted(record.parent for record in path.glob("*/arm.json"))
    if len(arms) > 1:
        raise UserError(f"{path} holds the arms {', '.join(arm.name for arm in arms)}: name one, {arms[0]} for example")
    return encoder_folder(arms[0]) if arms else path


def generator_folder(path: Path) -> Path | None:
    """The generator beside or in a transformers directory; None where there is none."""
    places = (path / "generator", path.parent / "generator" if path.name in ("discriminator", "encoder") else path)
    return next((place for place in places if place != path and (place / "config.json").is_file()), None)


def write_directory(
    directory: Path, config: ElectraConfig, architecture: Architecture, state: Mapping[str, Tensor], pad_id: int = 0
) -> None:
    """config.json and model.safetensors, each written atomically."""
    values = transformers_config(config, architecture, pad_id)
    if values["model_type"] == STOCK_RELATIVE_TYPE:
        state = to_stock_relative(config, state)
    save_weights(directory / "model.safetensors", state, {"format": "pt"}, torch.float32)
    write_json(directory / "config.json", values)


def write_networks(directory: Path, config: ElectraConfig, state: Mapping[str, Tensor], pad_id: int = 0) -> list[Path]:
    """Write the networks whose parameters `state` holds for transformers; returns the directories.

    `directory` gets the main network: ElectraForPreTraining where there is a head for replaced-token detection, else
    ElectraForMaskedLM (without the copy gate of All-Tokens MLM, which transformers lacks). `directory/generator` gets
    the generator as ElectraForMaskedLM, where there is one.
    """

    def part(*prefixes: str) -> StateDict:
        return {name: value for name, value in state.items() if name.startswith(prefixes)}

    main, generator_head = part("electra."), part("generator_predictions.", "generator_lm_head.")
    rtd_head = part("discriminator_predictions.")
    mlm_head = {f"generator{k.removeprefix('mlm')}": v for k, v in part("mlm_predictions.", "mlm_lm_head.").items()}
    architecture: Architecture = "ElectraForPreTraining" if rtd_head else "ElectraForMaskedLM"
    write_directory(directory, config, architecture, {**main, **(rtd_head or mlm_head or generator_head)}, pad_id)
    if not generator_head or not (rtd_head or mlm_head):
        return [directory]
    own = {f"electra.{k.removeprefix('generator.')}": v for k, v in part("generator.").items()}
    encoder = {**part("electra.embeddings."), **own} if own else main
    small = config.generator_config() if own else config
    write_directory(directory / "generator", small, "ElectraForMaskedLM", {**encoder, **generator_head}, pad_id)
    return [directory, directory / "generator"]


def save_transformers(model: ElectraPretrainer, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Save a pre-trained model for transformers (see `write_networks`), the tokenizer beside each network."""
    state = {name: value for name, value in model.state_dict().items() if "." in name}
    for folder in write_networks(directory, model.config, state, model.special.pad):
        if tokenizer is not None:
            tokenizer.save(folder, model.config.max_position)


def pretraining_state(discriminator: Pretrained, generator: Pretrained | None) -> tuple[ElectraConfig, StateDict]:
    """Configuration and parameters of an `ElectraPretrainer` that goes on from two transformers directories.

    Raises:
        UserError: the two have different vocabularies or embedding sizes, or the generator is the deeper one.
    """
    config, state = discriminator.config, dict(discriminator.state)
    if generator is None:
        return config, state
    small = generator.config
    prefix = "electra.embeddings."
    tied = config.embedding_size == small.embedding_size and all(
        torch.equal(v, state[k]) for k, v in generator.state.items() if k.startswith(prefix)
    )
    for name in ("vocab_size", "max_position", "type_vocab"):
        if getattr(config, name) != getattr(small, name):
            raise UserError(
                f"generator and discriminator do not belong together: {name} is {getattr(small, name)} in the one and "
                f"{getattr(config, name)} in the other"
            )
    if small.layers > config.layers:
        raise UserError(
            f"the generator has {small.layers} layers, its discriminator {config.layers}: no generator is deeper"
        )
    for name, value in generator.state.items():
        if not name.startswith("electra."):
            state[name] = value
        elif not (tied and name.startswith(prefix)):
            state[f"generator.{name.removeprefix('electra.')}"] = value
    if not tied and small.embedding_size != small.hidden_size:
        raise UserError(
            f"the generator has embeddings of its own, {small.embedding_size} wide, but hidden states of "
            f"{small.hidden_size}: the official code makes both equal, so training cannot go on from it"
        )
    return (
        replace(
            config,
            generator_factor=small.hidden_size / config.hidden_size,
            generator_layers=small.layers / config.layers,
            generator_heads=small.heads,
            generator_intermediate_size=small.intermediate_size,
            tying="embeddings" if tied else "none",
        ),
        state,
    )


# Official checkpoints


def infer_config(state: Mapping[str, Tensor], heads: int = 0, generator_heads: int = 0) -> ElectraConfig:
    """Sizes from our parameter names; heads are 64 wide unless given.

    Raises:
        UserError: the state dict is not that of an ELECTRA model.
    """
    layer = "encoder.layer.{}.attention.self.query.weight"
    for key in ("electra.embeddings.word_embeddings.weight", f"electra.{layer.format(0)}"):
        if key not in state:
            raise UserError(f"no variable {official_name(key)}: not a checkpoint of the official ELECTRA code")

    def depth(network: str) -> int:
        return sum(k.startswith(network) and k.endswith(layer.partition("{}")[2]) for k in state)

    vocabulary, embedding = state["electra.embeddings.word_embeddings.weight"].shape
    hidden = len(state[f"electra.{layer.format(0)}"])
    config = ElectraConfig(
        vocab_size=vocabulary,
        embedding_size=embedding,
        hidden_size=hidden,
        layers=depth("electra."),
        heads=heads or max(1, hidden // 64),
        intermediate_size=len(state["electra.encoder.layer.0.intermediate.dense.weight"]),
        max_position=len(state["electra.embeddings.position_embeddings.weight"]),
        type_vocab=len(state["electra.embeddings.token_type_embeddings.weight"]),
    )
    if (query := state.get(f"generator.{layer.format(0)}")) is None:
        return config
    return replace(
        config,
        generator_factor=len(query) / hidden,
        generator_layers=depth("generator.") / config.layers,
        generator_heads=generator_heads or max(1, len(query) // 64),
        generator_intermediate_size=len(state["generator.encoder.layer.0.intermediate.dense.weight"]),
        tying="none" if "generator.embeddings.word_embeddings.weight" in state else "embeddings",
    )


def read_variables(path: Path) -> StateDict:
    """Variables of an official checkpoint, or of an .npz or .safetensors file of them.

    Raises:
        UserError: nothing readable there.
    """
    try:
        if path.suffix == ".safetensors" and path.is_file():
            variables = load_file(path)
            return {k.removeprefix("param/"): v for k, v in variables.items() if not k.startswith(("in/", "out/"))}
        if path.suffix == ".npz" and path.is_file():
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if path.is_dir():
        indices = sorted(path.glob("*.index"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)] or [0])
        if not indices:
            raise UserError(f"{path}: no *.index file; expected a folder of an official checkpoint")
        path = indices[-1].with_suffix("")
    return dict(read_bundle(path))


# TensorFlow's checkpoint format V2: PREFIX.index is a sorted-string table (LevelDB's format, uncompressed) of protocol
# buffers, PREFIX.data-* hold the bytes.

_TABLE_MAGIC = 0xDB4775248B80FB57
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    9: np.dtype("<i8"),
    19: np.dtype("<f2"),
}


def read_bundle(prefix: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a checkpoint's numeric variables.

    Raises:
        UserError: a missing, compressed or damaged file.
    """
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise UserError(f"{index}: no such file; give a checkpoint's folder or its files' common prefix")
    try:
        entries = dict(_table_entries(index.read_bytes()))
        header = _message(entries.pop(b""))
        shards = int(header.get(1, [1])[0])
        files: dict[int, np.memmap[Any, Any]] = {}
        for key, value in entries.items():
            entry = _message(value)
            dtype = _DTYPES.get(int(entry.get(1, [0])[0]))
            if dtype is None or 7 in entry:  # strings and partitioned variables: no ELECTRA weight is one
                continue
            shape = [_message(dim).get(1, [0])[0] for dim in _message(entry.get(2, [b""])[0]).get(2, [])]
            shard, start, size = (int(entry.get(field, [0])[0]) for field in (3, 4, 5))
            if shard not in files:
                data = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
                files[shard] = np.memmap(data, np.uint8, "r")
            raw = files[shard][start : start + size].tobytes()
            yield key.decode(), torch.from_numpy(np.frombuffer(raw, dtype).reshape(shape).copy())
    except (ValueError, IndexError, KeyError, struct.error, OSError) as error:
        raise UserError(f"{prefix}: not a whole TensorFlow checkpoint: {error}") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it) of a little-endian base-128 number."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _message(data: bytes | int) -> dict[int, list[Any]]:
    """Fields of a protocol buffer: numbers as integers, nested messages as bytes."""
    if isinstance(data, int):
        raise ValueError("a number where a message was expected")
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + width], "little"), at + width
        else:
            raise ValueError(f"unknown wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _table_entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted-string table."""
    if len(table) < 48 or struct.unpack("<Q", table[-8:])[0] != _TABLE_MAGIC:
        raise ValueError("the index has no table footer")
    _, at = _varint(table, len(table) - 48)
    _, at = _varint(table, at)
    for _, handle in _block_entries(table, *_handle(table, at)):
        yield from _block_entries(table, *_handle(handle, 0))


def _handle(data: bytes, at: int) -> tuple[int, int]:
    """(offset, size) of a block."""
    offset, at = _varint(data, at)
    return offset, _varint(data, at)[0]


def _block_entries(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries of a block: each key shares a prefix with the one before."""
    if table[offset + size] != 0:
        raise ValueError("the index is compressed, which TensorFlow's own writer never does")
    block = table[offset : offset + size]
    end = size - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        added, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + added]
        at += added
        yield key, block[at : at + length]
        at += length
