"""Weights in and out: notes, shards, every mismatch by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import UserError
from common.weights import check_weights, load_weights, read_weights, save_weights
from tests.refusals import refused


def test_weights_and_notes_come_back_equal_and_in_plain_strides(tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_weights(tmp_path / "a.safetensors", layer.state_dict(), {"steps": "7"})
    state, notes = read_weights(tmp_path / "a.safetensors")
    assert notes == {"steps": "7"} and torch.equal(state["weight"], layer.weight) and state["weight"].is_contiguous()
    other = nn.Conv2d(3, 4, 3)
    assert load_weights(other, tmp_path / "a.safetensors", against="the layer") == {"steps": "7"}
    assert torch.equal(other.weight, layer.weight)


def test_half_precision_is_for_floating_point_tensors_only(tmp_path: Path) -> None:
    shared = torch.ones(3)
    state = {"w": shared, "tied": shared, "n": torch.tensor(3)}
    save_weights(tmp_path / "a.safetensors", state, dtype=torch.float16)
    read, _ = read_weights(tmp_path / "a.safetensors")
    assert {k: v.dtype for k, v in read.items()} == {"w": torch.float16, "tied": torch.float16, "n": torch.int64}


def test_shards_are_read_together(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert set(read_weights(index)[0]) == {"a", "b"}
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(UserError, match=r"its shard 2\.safetensors is missing"):
        read_weights(index)
    for name in ("../1.safetensors", str(tmp_path / "1.safetensors"), ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="expected a file beside it"):
            read_weights(index)
    index.write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        read_weights(index)


def test_every_mismatch_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, {"weight": torch.zeros(2, 5), "extra": torch.zeros(1)})
    with pytest.raises(UserError) as refused:
        load_weights(nn.Linear(4, 2), path, against="the options", option="--weights")
    assert str(refused.value) == (
        f"--weights {path} does not fit the options: bias is missing; extra is unknown; "
        "weight has the shape [2, 5], expected [2, 4]"
    )
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        read_weights(path)
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "b.safetensors")


def test_flipped_bit_is_refused_by_name_and_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    state = {"weight": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
    for name in ("a", "b"):
        save_weights(tmp_path / f"{name}.safetensors", state, {"steps": "7", "about": "x"})
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    assert content == (tmp_path / "b.safetensors").read_bytes()
    assert read_weights(tmp_path / "a.safetensors")[1] == {"steps": "7", "about": "x"}
    content[-3] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(r"a.safetensors is damaged \(its tensors do not fit", read_weights, tmp_path / "a.safetensors")


NOT_WEIGHTS = {
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page in place of the file"),
    "error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "json": (b'{"error": "Repository not found"}', "is JSON text; expected weights"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_a_failed_download_leaves_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    from common.training import load_checkpoint

    content, message = NOT_WEIGHTS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as failure:
        (read_weights if suffix == ".safetensors" else load_checkpoint)(path)
    assert str(path) in str(failure.value) and "pickle" not in str(failure.value)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    good = {"a": torch.ones(2), "b": torch.ones(3), "steps": torch.tensor(3)}
    check_weights(good, good, "file", "network")
    bad = {**good, "b": torch.tensor([1.0, float("nan"), 2.0])}
    with pytest.raises(UserError, match="file does not fit network: b holds numbers that are not finite"):
        check_weights(bad, good, "file", "network")


def test_shards_of_a_variant_are_read_too(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    save_weights(tmp_path / "b.safetensors", {"y": torch.zeros(3)})
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert read_weights(index)[0].keys() == {"x", "y"}
