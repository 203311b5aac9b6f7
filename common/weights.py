"""Weights in and out: safetensors, whole or in shards, with notes, every mismatch by name."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.data.cache import fingerprint_tensors
from common.errors import UserError
from common.files import write_atomically

INDEX = ".safetensors.index.json"
_ANY_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")  # of a variant too: model.safetensors.index.fp16.json
CHECKSUM = "tensors_sha256"  # the note


def save_weights(
    path: Path, state: Mapping[str, Tensor], notes: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write tensors, notes about them and their checksum as one .safetensors file, atomically; the same ones give the
    same bytes.

    Args:
        dtype: of the floating-point tensors in the file; None leaves them as they are.
    """

    def plain(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        return tensor.clone(memory_format=torch.contiguous_format)  # tensors that share memory are refused

    weights = {name: plain(tensor) for name, tensor in state.items()}
    # Stock diffusers and transformers want to see the format.
    about = {"format": "pt", **(notes or {}), CHECKSUM: fingerprint_tensors(weights)}

    def write(temporary: Path) -> None:
        save_file(weights, str(temporary), about)
        _sort_notes(temporary)

    write_atomically(path, write)


def _sort_notes(path: Path) -> None:
    """Put a file's notes in order: safetensors writes them in that of a hash map, which changes from run to run."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        notes = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
        text = json.dumps(notes | header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # else it keeps its order
            file.seek(8)
            file.write(text.ljust(length))


def refuse_other_files(path: Path, label: str) -> None:
    """Raise UserError where a file is what a failed download leaves: nothing, a page, an error, a Git LFS pointer."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = ""
    if not start:
        what = "is empty"
    elif text.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer in place of the file: fetch the file itself (git lfs pull)"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "is a web page in place of the file, as a sign-in or an error gives: fetch the file itself"
    elif text.startswith((b'{"', b"{\n", b"[")) and b"\0" not in start:
        what = "is JSON text; expected weights"
    if what:
        raise UserError(f"{label} {what}")


def read_weights(path: Path, option: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and notes of a .safetensors file, or of all shards of a `*.safetensors.index.json`. Those that
    `save_weights` wrote are compared with their checksum.

    Args:
        option: that named the path, for messages.

    Raises:
        UserError: there is no such file, or it is truncated, damaged or something else.
    """
    label = f"{option} {path}".strip()
    if _ANY_INDEX.search(path.name):
        state: dict[str, Tensor] = {}
        for shard in weight_shards(path, label):
            state |= read_weights(shard, option)[0]
        return state, {}
    if not path.is_file():
        raise UserError(f"{label}: no such file")
    refuse_other_files(path, label)
    try:
        with safe_open(path, "pt") as file:
            tensors, notes = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{label} is truncated or not a safetensors file: {error}") from None
    if CHECKSUM in notes and notes[CHECKSUM] != fingerprint_tensors(tensors):
        raise UserError(
            f"{label} is damaged (its tensors do not fit its checksum): restore it from a copy, or delete it to have "
            "it made again"
        )
    return tensors, {key: note for key, note in notes.items() if key not in ("format", CHECKSUM)}


def read_notes(path: Path, option: str = "") -> dict[str, str]:
    """The notes of a .safetensors file alone; see `read_weights`."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        label = f"{option} {path}".strip()
        raise UserError(f"{label} is truncated or not a safetensors file: {error}") from None


def json_note(path: Path, name: str, option: str = "") -> dict[str, Any]:
    """What a .safetensors file says under `name` in its header, as JSON; {} where it says nothing, or of another file.

    Raises:
        UserError: it is damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        found = json.loads(read_notes(path, option).get(name, "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{option} {path}".strip() + f": the note {name} in its header is damaged")
    return found


def weight_shards(index: Path, label: str) -> list[Path]:
    """The files that an index of shards names, each beside it.

    Raises:
        UserError: the index is damaged, or one of them is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{label} is damaged: expected {{"weight_map": {{TENSOR: FILE}}}}') from None
    for name, shard in zip(names, shards):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{label} names the shard {name!r}: expected a file beside it")
        if not shard.is_file():
            raise UserError(f"{label}: its shard {name} is missing")
    return shards


def check_weights(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], label: str, against: str, ignore: Collection[str] = ()
) -> None:
    """Refuse tensors that are not exactly those wanted, or that hold numbers that are not finite.

    Args:
        label: what is read; against: what decides what is wanted; both as the user knows them.
        ignore: wanted tensors that may be missing.

    Raises:
        UserError: naming missing and surplus tensors, those of another shape and those with NaN or infinity.
    """
    faults = [f"{name} is missing" for name in wanted if name not in given and name not in ignore]
    faults += [f"{name} is unknown" for name in given if name not in wanted]
    faults += [
        f"{name} has the shape {list(given[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if not faults:
        faults = [f"{name} holds numbers that are not finite" for name in not_finite(given)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{label} does not fit {against}: {'; '.join(faults[:3])}{more}")


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The tensors with NaN or infinity in them."""
    return [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def load_weights(
    module: nn.Module,
    path: Path,
    *,
    against: str,
    wanted: Mapping[str, Tensor] | None = None,
    option: str = "",
) -> dict[str, str]:
    """Fill `module` from a file that must hold exactly its tensors; returns the file's notes.

    Args:
        against: what decides the network's shape, for messages ("the network of config.yaml").
        wanted: the tensors to expect; None for all of the module's.

    Raises:
        UserError: the file is missing or damaged, or of another network.
    """
    state, notes = read_weights(path, option)
    check_weights(state, module.state_dict() if wanted is None else wanted, f"{option} {path}".strip(), against)
    module.load_state_dict(state, strict=False)
    return notes


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """What a network has learned: all its weights, or its adaptors."""
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name in trained}


def restore_trained(network: nn.Module, path: Path) -> bool:
    """Fill in what `save_weights(path, trained_state(network))` kept; False where there is no such file yet.

    Raises:
        UserError: it is damaged, or of another network.
    """
    if not path.is_file():
        return False
    load_weights(network, path, against="the student of this run's configuration", wanted=trained_state(network))
    network.eval()
    return True
