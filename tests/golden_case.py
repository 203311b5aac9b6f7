"""Golden cases: files recorded from the authors' own code, and how a test finds the check that fits one.

A case is matched by its kind (the `source` in its metadata and its file's stem), never by its exact name, sizes or
seed, so new cases of a known kind run without code changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Case:
    """One recorded case. `config` is the JSON of the metadata (for `.json` cases: the whole file)."""

    path: Path
    stem: str
    source: str = ""
    note: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors stored under `prefix/`, without the prefix: `group("param")`, `group("in")`, `group("out")`."""
        start = prefix.rstrip("/") + "/"
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}


def load_case(path: Path) -> Case:
    """Read a `.safetensors` or `.json` golden."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        meta = content if isinstance(content, dict) else {"cases": content}
        return Case(path, path.stem, str(meta.get("source", "")), str(meta.get("note", "")), meta)
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open has no __iter__)
    config = json.loads(meta.get("config", "{}"))
    return Case(path, path.stem, meta.get("source", ""), meta.get("note", ""), config, tensors)


def golden_files(paper: str, override: str | None) -> list[Path]:
    """Cases to check: the folder given by --golden-dir, else the project's own plus the shared folder's if present."""
    if override:
        folders = [Path(override)]
    else:
        folders = [REPOSITORY / "tests" / "golden" / paper, REPOSITORY.parent / "shared" / "golden" / paper]
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in {".safetensors", ".json"}:
                    found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def fill_by_rule(named_parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The deterministic parameter rule of the goldens' README (cases whose config says `params: rule`)."""
    filled: dict[str, Tensor] = {}
    for j, name in enumerate(sorted(named_parameters)):
        shape = named_parameters[name].shape
        k = torch.arange(1, named_parameters[name].numel() + 1, dtype=torch.float64)
        s = torch.sin(12.9898 * k + 78.233 * (j + 1)) * 43758.5453
        u = 2 * (s - torch.floor(s)) - 1
        if len(shape) >= 2:
            value = u * math.sqrt(3.0 / (named_parameters[name].numel() / shape[0]))
        elif name.endswith("weight"):
            value = 1 + 0.1 * u
        else:
            value = 0.1 * u
        filled[name] = value.to(torch.float32).reshape(shape)
    return filled


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """max|diff| <= tolerance * max(1, max|expected|), the criterion of the goldens' README."""
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), f"{what}: integer tensors differ"
        return
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    difference = float((actual.detach().double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * scale, f"{what}: max difference {difference:.3e}, allowed {tolerance * scale:.3e}"


@dataclass(frozen=True)
class Check:
    """`run(case)` checks every case for which `fits(case)` holds."""

    name: str
    fits: Callable[[Case], bool]
    run: Callable[[Case], None]


def run_matching_check(path: Path, checks: Sequence[Check]) -> None:
    """Find the one check whose kind fits the case and run it; an unknown kind is reported as such."""
    case = load_case(path)
    for check in checks:
        if check.fits(case):
            check.run(case)
            return
    pytest.fail(
        f"{path.name}: unknown kind of golden (source: {case.source!r}); known kinds: {[c.name for c in checks]}"
    )
