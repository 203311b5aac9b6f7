"""Golden cases: files recorded from the authors' own code, and how a test finds the check that fits one.

A case is matched by its kind (the `source` in its metadata and its file's stem), never by its exact name, sizes or
seed, so new cases of a known kind run without code changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

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

    def group(self, prefix: str, part: str = "") -> dict[str, Tensor]:
        """Tensors stored under `prefix/` (and `part`), without it: `group("param")`, `group("in")`, `group("out")`."""
        start = f"{prefix}/{part}"
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


def assert_close(
    actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5, argument_error: float = 0.0
) -> None:
    """max|diff| <= tolerance * max(1, max|expected|), the criterion of the goldens' README.

    `argument_error` comes on top: what is not known of the value, because its argument is not (`assert_timed_close`).
    """
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    if not expected.is_floating_point():
        assert torch.equal(actual.to(expected.dtype), expected), f"{what}: integer tensors differ"
        return
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    difference = float((actual.detach().double() - expected.detach().double()).abs().max()) if expected.numel() else 0.0
    allowed = tolerance * scale + argument_error
    assert difference <= allowed, f"{what}: max difference {difference:.3e}, allowed {allowed:.3e}"


@contextmanager
def exp_moved(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Float32 `torch.exp`, from which the frequencies of sinusoids come, followed by `change`."""
    exp = torch.exp

    def moved(*args: Any, **options: Any) -> Tensor:
        value = exp(*args, **options)
        return change(value) if value.dtype == torch.float32 else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "exp", moved)
        yield


def ulp_up(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, math.inf))


def ulp_down(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, -math.inf))


def assert_sinusoids_close(actual: Tensor, expected: Tensor, argument: Tensor, what: str) -> None:
    """Sines and cosines of `argument`, each to 1e-5 and what float32 knows of its argument.

    Intel's, AMD's and ARM's float32 `exp` differ in the last bit, each from the exact value and two machines by twice
    that: argument x 2^-22.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    excess = (actual.double() - expected.double()).abs() - 1e-5 - argument.abs().double() * 2.0**-22
    assert float(excess.max()) <= 0, f"{what}: {float(excess.max()):.3e} more than 1e-5 + argument x 2^-22"


def assert_timed_close(compute: Callable[[], Tensor], expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """`assert_close` of a network's output that hangs on sinusoids of a large time.

    To the tolerance comes what the uncertainty of their argument makes of this very output: how far it moves with
    every frequency one ulp up, and one down (`assert_sinusoids_close`).
    """
    actual = compute()
    error = 0.0
    for change in (ulp_up, ulp_down):
        with exp_moved(change):
            error += float((compute() - actual).detach().abs().max())
    assert_close(actual, expected, what, tolerance, error)


def load(module: nn.Module, case: Case, more: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Recorded weights (`more` beside them), or those of the parameter rule beside the module's own buffers."""
    weights = {**case.group("param"), **(more or {})}
    if case.config.get("params") == "rule":
        weights = {**module.state_dict(), **fill_by_rule(dict(module.named_parameters())), **weights}
    module.load_state_dict(weights, strict=True)
    return module


def kind(stem: str, source: str) -> Callable[[Case], bool]:
    """Cases whose file's name begins with `stem` and whose source names `source`."""
    return lambda case: case.stem.startswith(stem) and source in case.source


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
