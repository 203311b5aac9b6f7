"""The claims ledger: what a paper claims, what was measured here, and whether it holds.

    claim = read_claims("ldm", "small")["L1"]          # from ldm/claims.yaml
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
import yaml

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
    """One falsifiable sentence of a paper, restated for one tier.

    Args:
        seeds: that it is measured with.
        sizes: of networks, data and measurements; budget: what its arms may spend.
        rungs: multiples of the budget at which it is to be measured.
        short: the statement in one line, for tables; the statement itself where it is short enough.
    """

    id: str
    statement: str
    paper: PaperValue
    target: Target
    tier: Tier
    seeds: tuple[int, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    rungs: tuple[int, ...] = (1,)
    short: str = ""

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UserError(f"claim {self.id}: tier {self.tier!r} is unknown, expected one of {', '.join(TIERS)}")
        for condition in self.target.all_conditions():
            if condition.op not in _OPERATORS:
                allowed = ", ".join(_OPERATORS)
                raise UserError(f"claim {self.id}: comparison {condition.op!r} is unknown, expected one of {allowed}")


def read_claims(paper: str | Path, tier: Tier) -> dict[str, Claim]:
    """The claims of a tier by their ids, from `<paper>/claims.yaml` (or the file given as a path).

    What the file's `tiers` say of seeds, sizes and budget holds for every claim of the tier; what a claim's own `tiers`
    say (statement, target, seeds, sizes, budget) goes before it.

    Raises:
        UserError: the file is missing, or something in it is; the sentence names file, claim and key.
    """
    name, content = _claims_file(paper)
    shared = _tier(name, content, tier)
    claims: dict[str, Claim] = {}
    ids: set[str] = set()
    for number, entry in enumerate(content["claims"], start=1):
        where = f"{name}: claim {entry.get('id', number) if isinstance(entry, dict) else number}"
        _fields(entry, where, _CLAIM, {"rungs": list, "short": str, "outcome": str, "words": dict})
        if entry["id"] in ids:
            raise UserError(f"{where} is there twice")
        ids.add(entry["id"])
        tiers = entry["tiers"] if isinstance(entry["tiers"], dict) else {str(key): {} for key in entry["tiers"]}
        for other, changes in tiers.items():
            if other not in content["tiers"]:
                raise UserError(
                    f"{where}: tier {other!r} is not among those of the file, {', '.join(content['tiers'])}"
                )
            _fields(changes, f"{where}, tier {other}", {}, {"statement": str, "target": dict, **_SHARED})
        _fields(entry["paper"], f"{where}, paper", {"value": _TEXT_OR_NUMBER, "source": str})
        target = _target(entry["target"], f"{where}, target")
        if tier not in tiers:
            continue
        own = tiers[tier]
        if "target" in own:
            target = _target(own["target"], f"{where}, tier {tier}, target")
        claims[entry["id"]] = Claim(
            id=entry["id"],
            statement=own.get("statement", entry["statement"]),
            paper=PaperValue(**entry["paper"]),
            target=target,
            tier=tier,
            seeds=_whole(own.get("seeds", shared.get("seeds")), f"{where}, seeds", least=0),
            sizes=_merged(shared.get("sizes", {}), own.get("sizes", {})),
            budget=_merged(shared.get("budget", {}), own.get("budget", {})),
            rungs=_whole(entry.get("rungs", [1]), f"{where}, rungs", least=1),
            short=entry.get("short", own.get("statement", entry["statement"])),
        )
        if tier == "small" and len(claims[entry["id"]].seeds) < MIN_SEEDS_SMALL:
            raise UserError(f"{where}: seeds has fewer than {MIN_SEEDS_SMALL} in tier small")
    return claims


def read_sizes(paper: str | Path, tier: Tier) -> dict[str, Any]:
    """Sizes and budget that all claims of a tier share, as one mapping.

    Raises:
        UserError: as `read_claims`.
    """
    name, content = _claims_file(paper)
    shared = _tier(name, content, tier)
    return _merged(shared.get("sizes", {}), shared.get("budget", {}))


def read_notes(paper: str | Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """What claims.yaml says for readers: (what came out and was tried, by claim; metrics in words, by claim).

    Raises:
        UserError: as `read_claims`.
    """
    _, content = _claims_file(paper)
    notes = {entry["id"]: entry["outcome"] for entry in content["claims"] if "outcome" in entry}
    shared = content.get("words", {})
    return notes, {entry["id"]: {**shared, **entry.get("words", {})} for entry in content["claims"]}


_TEXT_OR_NUMBER: tuple[type, ...] = (str, int, float)
_NUMBER: tuple[type, ...] = (int, float)
_KINDS: dict[Any, str] = {
    str: "a text",
    list: "a list",
    dict: "a mapping",
    _NUMBER: "a number",
    _TEXT_OR_NUMBER: "a text or a number",
    (list, dict): "a list or a mapping",
}
_SHARED: dict[str, Any] = {"seeds": list, "sizes": dict, "budget": dict}
_CLAIM: dict[str, Any] = {"id": str, "statement": str, "paper": dict, "target": dict, "tiers": (list, dict)}


def _claims_file(paper: str | Path) -> tuple[str, dict[str, Any]]:
    """(what errors call the file, its content with checked top-level keys)."""
    path = paper if isinstance(paper, Path) else REPOSITORY / paper / "claims.yaml"
    name = f"{path.parent.name}/{path.name}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name} cannot be read as YAML: {' '.join(str(error).split())}") from None
    return name, _fields(content, name, {"tiers": dict, "claims": list}, {"words": dict})


def _tier(name: str, content: Mapping[str, Any], tier: str) -> dict[str, Any]:
    if tier not in content["tiers"]:
        raise UserError(f"{name} has no tier {tier!r}; it has {', '.join(content['tiers'])}")
    return _fields(content["tiers"][tier], f"{name}: tier {tier}", {}, _SHARED)


def _fields(
    node: Any, where: str, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`node` itself, a mapping with these keys and kinds of values and no others."""
    known = {**required, **(optional or {})}
    if not isinstance(node, dict):
        raise UserError(f"{where}: expected a mapping with {', '.join(known)}, got {node!r}")
    for key, value in node.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}, expected one of {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is {value!r}, expected {_KINDS[known[key]]}")
    for key in required:
        if key not in node:
            raise UserError(f"{where}: {key} is missing")
    return node


def _target(node: Any, where: str) -> Target:
    _fields(node, where, {"text": str, "metric": str, "op": str, "value": _NUMBER}, {"conditions": list})
    conditions = []
    for entry in node.get("conditions", []):
        parts = entry.split() if isinstance(entry, str) else []
        try:
            metric, op, value = parts
            conditions.append(Condition(metric, op, float(value)))  # type: ignore[arg-type]
        except ValueError:
            raise UserError(f'{where}: condition {entry!r} is not of the form "recall_drop > 0.0"') from None
    for op in (node["op"], *(condition.op for condition in conditions)):
        if op not in _OPERATORS:
            raise UserError(f"{where}: comparison {op!r} is unknown, expected one of {', '.join(_OPERATORS)}")
    return Target(node["text"], node["metric"], node["op"], float(node["value"]), tuple(conditions))


def _whole(values: Any, where: str, least: int) -> tuple[int, ...]:
    """A list of different whole numbers."""
    right = isinstance(values, list) and all(type(value) is int and value >= least for value in values)
    if not values or not right or len(set(values)) < len(values):
        raise UserError(f"{where}: expected different whole numbers from {least} on, got {values!r}")
    return tuple(values)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings; where both have a mapping, both of those; else the second's value."""
    found = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            found[key] = _merged(first[key], second[key])
    return found


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
        "holds": all(passes(means[c.metric], c.op, c.target) for c in conditions),
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
    return mean(finite) if len(finite) == len(values) else None  # exact: three times 0.2 have the mean 0.2


def passes(mean: float | None, op: str, target: float) -> bool:
    """Whether a mean, None where a seed diverged, meets a bar; a mean that differs by rounding alone equals it."""
    if mean is None:
        return False
    return _OPERATORS[op](target if math.isclose(mean, target, rel_tol=1e-12) else mean, target)


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
