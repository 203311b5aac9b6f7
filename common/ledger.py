"""The claims ledger: what a paper claims, what was measured here, and whether it holds.

    claim = Claim(
        id="L1",
        statement="At equal training time a latent model beats a pixel model.",
        paper=PaperValue("FID 38 lower after 2M steps", "Fig. 6"),
        target=Target("FD at least 15 % lower, sampling at least 4x faster", "fd_drop", ">=", 0.15,
                      (Condition("sampling_speedup", ">=", 4.0),)),
        tier="small",
    )
    check_targets(path, [claim])                       # before the run: is the target still the one on record?
    per_seed = [{"fd_drop": 0.21, "sampling_speedup": 18.0}, ...]
    write_claims(path, [record(claim, per_seed, seconds=812.0, peak_memory_bytes=peak_memory())])

A measured number that is not finite (a run that diverged) is kept as null and the claim does not hold.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch

from common.cpu import cpu_name
from common.errors import UserError
from common.files import write_json
from common.paths import REPOSITORY

Tier = Literal["smoke", "small", "paper"]
Op = Literal[">=", ">", "<=", "<"]
TIERS: tuple[Tier, ...] = ("smoke", "small", "paper")
MIN_SEEDS_SMALL = 3
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_PACKAGES = ("torch", "triton", "numpy", "pytorch-lightning", "diffusers", "transformers", "deepspeed")


@dataclass(frozen=True)
class PaperValue:
    """What the paper reports and where, e.g. ("FID 12.63", "Table 2")."""

    value: str | float
    source: str


@dataclass(frozen=True)
class Condition:
    """`mean(metric) op target`, e.g. Condition("recall_drop", ">", 0.0)."""

    metric: str
    op: Op
    target: float


@dataclass(frozen=True)
class Target:
    """The bar, fixed before the run: a sentence, the headline metric's threshold, and any further conditions.

    The claim holds when the mean over seeds of the headline metric and of every condition's metric passes.
    """

    text: str
    metric: str
    op: Op
    value: float
    conditions: tuple[Condition, ...] = ()

    def all_conditions(self) -> tuple[Condition, ...]:
        """The headline threshold followed by the further conditions."""
        return (Condition(self.metric, self.op, self.value), *self.conditions)


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence of a paper, restated for one tier; `id` as in the paper's specification."""

    id: str
    statement: str
    paper: PaperValue
    target: Target
    tier: Tier

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UserError(f"claim {self.id}: tier {self.tier!r} is unknown, expected one of {', '.join(TIERS)}")
        for condition in self.target.all_conditions():
            if condition.op not in _OPERATORS:
                allowed = ", ".join(_OPERATORS)
                raise UserError(f"claim {self.id}: comparison {condition.op!r} is unknown, expected one of {allowed}")


def record(
    claim: Claim,
    measured: Sequence[Mapping[str, float] | float],
    seconds: float,
    peak_memory_bytes: int,
    seeds: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The ledger entry of one claim, ready for `write_claims`.

    measured: one entry per seed: a number (the headline metric) or a dict with the headline metric, every metric that a
        condition names, and any further numbers worth keeping.
    seconds: wall-clock time of all seeds and arms together. peak_memory_bytes: see `peak_memory`.
    seeds: the seeds used, in the order of `measured`; 0, 1, 2, ... by default.
    `mean` and `std` (sample standard deviation, 0 for one seed) are those of the headline metric.
    """
    seeds = range(len(measured)) if seeds is None else seeds
    if len(seeds) != len(measured):
        raise UserError(f"claim {claim.id}: {len(measured)} measurements but {len(seeds)} seeds; give one of each")
    needed = MIN_SEEDS_SMALL if claim.tier == "small" else 1
    if len(set(seeds)) < needed:
        raise UserError(
            f"claim {claim.id}: tier {claim.tier!r} needs at least {needed} different seeds, got {len(set(seeds))}; "
            "run more seeds or record it in tier 'smoke'"
        )
    rows: list[dict[str, float | int | None]] = []
    for seed, values in zip(seeds, measured, strict=True):
        named = values if isinstance(values, Mapping) else {claim.target.metric: values}
        if "seed" in named and named["seed"] != seed:
            raise UserError(f"claim {claim.id}: a measurement carries seed {named['seed']}, expected {seed}")
        rows.append({"seed": int(seed), **{k: _finite(v) for k, v in named.items() if k != "seed"}})

    conditions = claim.target.all_conditions()
    means = {condition.metric: _mean(claim.id, condition.metric, rows) for condition in conditions}
    headline = [row[claim.target.metric] for row in rows]
    finite = [value for value in headline if value is not None]
    return {
        "id": claim.id,
        "statement": claim.statement,
        "paper": asdict(claim.paper),
        "target": _target_json(claim.target),
        "measured": rows,
        "mean": means[claim.target.metric],
        "std": None if len(finite) < len(rows) else stdev(finite) if len(finite) > 1 else 0.0,
        "holds": all(_passes(means[c.metric], c.op, c.target) for c in conditions),
        "tier": claim.tier,
        "seconds": float(seconds),
        "peak_memory_bytes": int(peak_memory_bytes),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }


def check_targets(path: Path, claims: Sequence[Claim]) -> None:
    """Refuse a claim whose numbers differ from those on record in `path` under the same id and tier.

    Call it before a run: a target is fixed before it is measured, and a changed target is a new claim with a reason.
    """
    for claim in claims:
        _refuse_changed_target(path, claim.id, claim.tier, _target_json(claim.target), _read(path, "claims"))


def write_claims(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Merge records into `path` = {"claims": [...]}, replacing those with the same id and tier. The write is atomic.

    Raises UserError when a record's target differs from the one on file (see `check_targets`).
    """
    claims = _read(path, "claims")
    for rec in records:
        _refuse_changed_target(path, rec["id"], rec["tier"], rec["target"], claims)
    fresh = {(rec["id"], rec["tier"]) for rec in records}
    merged = [claim for claim in claims if (claim["id"], claim["tier"]) not in fresh] + [dict(rec) for rec in records]
    merged.sort(key=lambda claim: (_natural(claim["id"]), TIERS.index(claim["tier"])))
    write_json(path, {"claims": merged})


def bench_row(
    name: str,
    ours: float,
    peer: float,
    unit: str,
    *,
    target: float | None = None,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """One side-by-side measurement; `ratio` > 1 is better for us whichever way the unit points.

    target: the smallest ratio that counts as success; None for a figure reported without a bar (`holds` is then null).
    """
    if not (ours > 0 and peer > 0):
        raise UserError(f"bench row {name!r}: ours and peer must be positive, got {ours} and {peer}")
    ratio = ours / peer if higher_is_better else peer / ours
    return {
        "name": name,
        "ours": float(ours),
        "peer": float(peer),
        "unit": unit,
        "ratio": ratio,
        "target": target,
        "holds": None if target is None else ratio >= target,
        "hardware": hardware(),
        "commit": commit(),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Merge bench rows into `path` = {"rows": [...]}, replacing those of the same name and hardware. Atomic."""
    fresh = {(row["name"], row["hardware"]): dict(row) for row in rows}
    merged: list[Mapping[str, Any]] = []
    for old in _read(path, "rows"):  # a row measured again keeps its place
        merged.append(fresh.pop((old["name"], old["hardware"]), old))
    write_json(path, {"rows": [*merged, *fresh.values()]})


def peak_memory() -> int:
    """Peak memory in bytes: of the CUDA allocator (all devices) when this process used a GPU, else resident memory.

    The resident figure is the peak since the process started; for arms that must be compared, start one process each.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        used = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
        if used > 0:
            return used
    return peak_resident()


def peak_resident() -> int:
    """Largest resident memory of this process in bytes.

    On Linux from /proc: `ru_maxrss` starts at what the parent held when it started this process.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware() -> str:
    """The machine in one line, e.g. "Intel Xeon @ 2.70GHz, 2 cores, 8 GiB" or "1 x NVIDIA H200, 139 GiB (16 cores)"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB ({cores} cores)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu_name()}, {cores} core{'s' if cores != 1 else ''}, {memory:.0f} GiB"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checked-out commit, with "-dirty" when code differs from it ("unknown" outside a git checkout).

    Files under results/ do not count: the run that records a commit writes there itself.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)results")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _mean(claim_id: str, metric: str, rows: Sequence[Mapping[str, float | int | None]]) -> float | None:
    missing = [row["seed"] for row in rows if metric not in row]
    if missing:
        raise UserError(f"claim {claim_id}: metric {metric!r} was not measured for seed {missing[0]}")
    values = [row[metric] for row in rows]
    finite = [value for value in values if value is not None]
    return fmean(finite) if len(finite) == len(values) else None


def _passes(mean: float | None, op: str, target: float) -> bool:
    return mean is not None and _OPERATORS[op](mean, target)


def _target_json(target: Target) -> dict[str, Any]:
    """The target as it is after a round trip through JSON: tuples become lists."""
    return {**asdict(target), "conditions": [asdict(condition) for condition in target.conditions]}


def _refuse_changed_target(
    path: Path, claim_id: str, tier: str, target: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]
) -> None:
    for old in claims:
        if (old["id"], old["tier"]) != (claim_id, tier):
            continue
        changed = [key for key in ("metric", "op", "value", "conditions") if old["target"].get(key) != target.get(key)]
        if changed:
            raise UserError(
                f"{path.name}: claim {claim_id} ({tier}) is on record with another target ({', '.join(changed)} "
                "changed); a changed target is a new claim: give it a new id and say why in the README"
            )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which L2 comes before L10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _read(path: Path, key: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read as JSON ({error}); restore it from git or delete it") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f'{path.name}: expected {{"{key}": [...]}} at the top; restore it from git or delete it')
    return content[key]
