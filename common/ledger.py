"""The claims ledger: what a paper claims, what was measured here, and whether it holds.

    claim = read_claims("ldm", "small")["L1"]          # from ldm/claims.yaml
    check_targets(path, [claim])                       # before the run: is the target still the one on record?
    per_seed = [{"fd_drop": 0.21, "sampling_speedup": 18.0}, ...]
    write_claims(path, [record(claim, per_seed, seconds=812.0, peak_memory_bytes=peak_memory())])

A measured number that is not finite (a run that diverged) is kept as null and the claim does not hold.

The ladder of budgets: `read_claims(paper, tier, rung)` gives the claims with `rung` times their budget and the same
target. A record is that of rung 1; further rungs stand in its list `rungs`, other kinds of CPU (of claims about time)
in its list `machines`. `verdict` says what all of them come to.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import operator
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch

from common.cpu import cpu_kind, cpu_name
from common.errors import UserError
from common.files import read_object, read_yaml, write_json
from common.paths import CHECKOUT, REPOSITORY

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
ORIGIN = "origin.json"  # of a run's folder
_PACKAGES = ("torch", "triton", "numpy", "pytorch-lightning", "diffusers", "transformers", "deepspeed", "peft")


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
        rungs: multiples of the budget at which it is to be measured; rung: the one that `budget` is at.
        timed: it is about time, so only an idle machine measures it, and every kind of CPU has a record of its own.
        note: what is to be known of its design, of a higher rung for example.
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
    rung: int = 1
    timed: bool = False
    note: str = ""
    short: str = ""

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UserError(f"claim {self.id}: tier {self.tier!r} is unknown, expected one of {', '.join(TIERS)}")
        for condition in self.target.all_conditions():
            if condition.op not in _OPERATORS:
                allowed = ", ".join(_OPERATORS)
                raise UserError(f"claim {self.id}: comparison {condition.op!r} is unknown, expected one of {allowed}")

    def at(self, rung: int) -> Claim:
        """The same claim with `rung` times the budget it has now at rung 1."""
        return replace(self, rung=rung, budget=_times(self.budget, rung, f"claim {self.id}, budget"))


def read_claims(paper: str | Path, tier: Tier, rung: int = 1) -> dict[str, Claim]:
    """The claims of a tier by their ids, from `<paper>/claims.yaml` (or the file given as a path).

    What the file's `tiers` say of seeds, sizes, budget and rungs holds for every claim of the tier; what a claim's own
    `tiers` say (statement, target, seeds, sizes, budget), and its `rungs`, go before it. A claim about time (`timed`)
    has rung 1 alone.

    Args:
        rung: every number of the budgets is multiplied by it.

    Raises:
        UserError: the file is missing, or something in it is; the sentence names file, claim and key.
    """
    name, content = _claims_file(paper)
    shared = _tier(name, content, tier)
    claims: dict[str, Claim] = {}
    ids: set[str] = set()
    for number, entry in enumerate(content["claims"], start=1):
        where = f"{name}: claim {entry.get('id', number) if isinstance(entry, dict) else number}"
        known = {"rungs": list, "timed": bool, "note": str, "short": str, "outcome": str, "words": dict}
        _fields(entry, where, _CLAIM, known)
        if entry["id"] in ids:
            raise UserError(f"{where} is there twice")
        ids.add(entry["id"])
        tiers = entry["tiers"] if isinstance(entry["tiers"], dict) else {str(key): {} for key in entry["tiers"]}
        for other, changes in tiers.items():
            if other not in content["tiers"]:
                raise UserError(
                    f"{where}: tier {other!r} is not among those of the file, {', '.join(content['tiers'])}"
                )
            _fields(changes, f"{where}, tier {other}", {}, {"statement": str, "target": dict, **_OWN})
        _fields(entry["paper"], f"{where}, paper", {"value": _TEXT_OR_NUMBER, "source": str})
        target = _target(entry["target"], f"{where}, target")
        if tier not in tiers:
            continue
        own = tiers[tier]
        if "target" in own:
            target = _target(own["target"], f"{where}, tier {tier}, target")
        timed = entry.get("timed", False)
        rungs = entry.get("rungs", [1] if timed else shared.get("rungs", [1])) if tier != "smoke" else [1]
        claim = Claim(
            id=entry["id"],
            statement=own.get("statement", entry["statement"]),
            paper=PaperValue(**entry["paper"]),
            target=target,
            tier=tier,
            seeds=_whole(own.get("seeds", shared.get("seeds")), f"{where}, seeds", least=0),
            sizes=_merged(shared.get("sizes", {}), own.get("sizes", {})),
            budget=_merged(shared.get("budget", {}), own.get("budget", {})),
            rungs=_whole(rungs, f"{where}, rungs", least=1),
            timed=timed,
            note=entry.get("note", ""),
            short=entry.get("short", own.get("statement", entry["statement"])),
        )
        if tier == "small" and len(claim.seeds) < MIN_SEEDS_SMALL:
            raise UserError(f"{where}: seeds has fewer than {MIN_SEEDS_SMALL} in tier small")
        if claim.rungs != (1,) and (timed or not claim.budget):
            reason = "a claim about time has rung 1 alone" if timed else "it has no budget to multiply"
            raise UserError(f"{where}: rungs is {list(claim.rungs)}, but {reason}")
        claims[claim.id] = claim.at(rung)
    return claims


def read_precision(paper: str | Path) -> str:
    """In which precision the budgets of a paper's claims were set: `precision` in its claims.yaml, or 32-true.

    Raises:
        UserError: as `read_claims`; or there is no such precision.
    """
    name, content = _claims_file(paper)
    found = content.get("precision", "32-true")
    if found not in ("32-true", "bf16-mixed"):
        raise UserError(f"{name}: precision is {found!r}, expected 32-true or bf16-mixed")
    return str(found)


def read_sizes(paper: str | Path, tier: Tier, rung: int = 1) -> dict[str, Any]:
    """Sizes and budget that all claims of a tier share, as one mapping; the budget is multiplied by `rung`.

    Raises:
        UserError: as `read_claims`.
    """
    name, content = _claims_file(paper)
    shared = _tier(name, content, tier)
    budget = _times(shared.get("budget", {}), rung, f"{name}: tier {tier}, budget")
    return _merged(shared.get("sizes", {}), budget)


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
    bool: "true or false",
    _NUMBER: "a number",
    _TEXT_OR_NUMBER: "a text or a number",
    (list, dict): "a list or a mapping",
}
_OWN: dict[str, Any] = {"seeds": list, "sizes": dict, "budget": dict}
_SHARED: dict[str, Any] = {**_OWN, "rungs": list}
_CLAIM: dict[str, Any] = {"id": str, "statement": str, "paper": dict, "target": dict, "tiers": (list, dict)}


def _claims_file(paper: str | Path) -> tuple[str, dict[str, Any]]:
    """(what errors call the file, its content with checked top-level keys)."""
    path = paper if isinstance(paper, Path) else REPOSITORY / paper / "claims.yaml"
    name = f"{path.parent.name}/{path.name}"
    content = read_yaml(path, name, "restore it from git")
    return name, _fields(content, name, {"tiers": dict, "claims": list}, {"precision": str, "words": dict})


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
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
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


def _times(budget: Mapping[str, Any], rung: int, where: str) -> dict[str, Any]:
    """A budget whose numbers are all multiplied by `rung`; whole numbers stay whole."""
    found: dict[str, Any] = {}
    for key, value in budget.items():
        if isinstance(value, dict):
            found[key] = _times(value, rung, f"{where}, {key}")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where}: {key} is {value!r}, expected a number, which a rung multiplies")
        else:
            found[key] = value * rung
    return found


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
    made: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The ledger entry of one claim, ready for `write_claims`.

    measured: one entry per seed: a number (the headline metric) or a dict with the headline metric, every metric that a
        condition names, and any further numbers worth keeping.
    seconds: wall-clock time of all seeds and arms together. peak_memory_bytes: see `peak_memory`.
    seeds: the seeds used, in the order of `measured`; 0, 1, 2, ... by default.
    made: where each was measured (`provenance`); now and here by default.
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
    target = _target_json(claim.target)
    rung = {} if claim.rung == 1 else {"rung": claim.rung}
    return {
        "id": claim.id,
        "statement": claim.statement,
        "paper": asdict(claim.paper),
        "target": target,
        "measured": rows,
        "mean": means[claim.target.metric],
        "std": _deviation(rows, claim.target.metric),
        "holds": all(passes(means[c.metric], c.op, c.target) for c in conditions),
        "within_noise": _within_noise(target, rows),
        "tier": claim.tier,
        **rung,
        **({"timed": True} if claim.timed else {}),
        "seconds": float(seconds),
        "peak_memory_bytes": int(peak_memory_bytes),
        **_together([provenance()] if made is None else made),
    }


def provenance(precision: str = "32-true") -> dict[str, Any]:
    """Where and with what a measurement is made now: precision, kind of CPU, machine, versions and commit."""
    return {
        "precision": precision,
        "cpu": cpu_kind(),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }


def note_start(folder: Path) -> None:
    """Add to `folder`/origin.json where and with what a run begins, or goes on, now."""
    starts, start = starts_of(folder), {"hardware": hardware(), "versions": versions(), "commit": commit()}
    if start not in starts:
        write_json(folder / ORIGIN, {"starts": [*starts, start]})


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """What `note_start` has noted in a run's folder, oldest first; none of a run before there were such notes."""
    file = folder / ORIGIN
    return list(read_object(file, kinds={"starts": list})["starts"]) if file.is_file() else []


def origin_of(*folders: Path) -> dict[str, Any]:
    """Hardware, versions and commit of a run, in all its folders and starts; those of now where none are noted."""
    starts = [start for folder in folders for start in starts_of(folder)]
    together = _together(starts or [provenance()])
    return {key: together[key] for key in ("hardware", "versions", "commit")}


def _together(made: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One provenance of several; where they differ, all that there are."""

    def joined(values: Iterable[Any]) -> str | None:
        return "; ".join(dict.fromkeys(str(value) for value in values if value is not None)) or None

    made = list(made)
    packages = dict.fromkeys(package for entry in made for package in entry["versions"])
    return {
        **{key: joined(entry.get(key) for entry in made) for key in ("precision", "cpu", "hardware")},
        "versions": {package: joined(entry["versions"].get(package) for entry in made) for package in packages},
        "commit": joined(entry["commit"] for entry in made),
    }


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The records on file, none where there is no file.

    Raises:
        UserError: it is damaged.
    """
    return _read(path, "claims")


def check_targets(path: Path, claims: Sequence[Claim]) -> None:
    """Refuse a claim whose numbers differ from those on record in `path` under the same id and tier.

    Call it before a run: a target is fixed before it is measured, and a changed target is a new claim with a reason.
    """
    for claim in claims:
        _refuse_changed_target(path, claim.id, claim.tier, _target_json(claim.target), _read(path, "claims"))


def write_claims(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Merge records into `path` = {"claims": [...]}, replacing those with the same id, tier and rung. Atomic.

    The record of a claim is that of rung 1; those of further rungs go into its `rungs`. Of a claim about time the
    records of other kinds of CPU stay, in its `machines`.

    Raises UserError when a record's target differs from the one on file (see `check_targets`), or rung 1 is missing.
    """
    claims = _read(path, "claims")
    for rec in records:
        _refuse_changed_target(path, rec["id"], rec["tier"], rec["target"], claims)
    known = {(claim["id"], claim["tier"]): claim for claim in claims}
    for rec in records:
        key = (rec["id"], rec["tier"])
        known[key] = _joined(known.get(key), rec)
    merged = sorted(known.values(), key=lambda claim: (_natural(claim["id"]), TIERS.index(claim["tier"])))
    write_json(path, {"claims": merged})


_OF_THE_CLAIM = ("id", "statement", "paper", "target", "tier", "timed")  # said once, in the record of rung 1


def _joined(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """The record `new` in the place of `old`, whose other rungs and machines stay."""
    own = {key: value for key, value in new.items() if key not in _OF_THE_CLAIM}
    rungs = [entry for entry in (old or {}).get("rungs", ()) if entry["rung"] != new.get("rung", 1)]
    if "rung" in new:
        if old is None:
            raise UserError(f"claim {new['id']}: rung {new['rung']} is measured, rung 1 is not on record yet")
        return {**old, "rungs": sorted([*rungs, own], key=lambda entry: entry["rung"])}
    found = {**new, **({"rungs": rungs} if rungs else {})}
    if old is not None and new.get("timed"):
        earlier = {key: value for key, value in old.items() if key not in (*_OF_THE_CLAIM, "rungs", "machines")}
        machines = [m for m in (earlier, *old.get("machines", ())) if not same_cpu(cpu_of(m), cpu_of(new))]
        found |= {"machines": machines} if machines else {}
    return found


def cpu_of(rec: Mapping[str, Any]) -> str:
    """The kind of CPU of a record; older ones name the processor only, as a part of the machine."""
    return str(rec.get("cpu") or str(rec["hardware"]).rsplit(", ", 2)[0])


def same_cpu(a: str, b: str) -> bool:
    """Whether two records may be of one kind of CPU (`cpu_of`)."""
    return a == b or a.startswith(f"{b}, ") or b.startswith(f"{a}, ")


@dataclass(frozen=True)
class Verdict:
    """What a claim's record comes to.

    Args:
        holds: at rung 1; within_noise: there the spread over seeds crosses the target.
        rungs: (rung, whether it holds there) of all that were measured, 1 first.
        text: in words, for example "holds", "does not hold (within noise)", "from rung 4 on", "not up to rung 16".
    """

    holds: bool
    within_noise: bool
    rungs: tuple[tuple[int, bool], ...]
    text: str


def verdict(rec: Mapping[str, Any]) -> Verdict:
    """What a record of the ledger says, over all rungs that were measured."""
    further = sorted(rec.get("rungs", ()), key=lambda entry: entry["rung"])
    rungs = ((1, bool(rec["holds"])), *((int(entry["rung"]), bool(entry["holds"])) for entry in further))
    noisy = [within_noise(rec), *(within_noise({**entry, "target": rec["target"]}) for entry in further)]
    highest, last = rungs[-1]
    if len(rungs) == 1:
        text = "holds" if last else "does not hold"
    else:
        same = [rung for rung, holds in rungs if holds == last]  # from the last change of the verdict on
        changes = [rung for rung, holds in rungs if holds != last]
        first = min(rung for rung in same if not changes or rung > max(changes))
        if last:
            text = f"from rung {first} on"
        else:
            text = (
                f"not up to rung {highest}" if not changes else f"up to rung {max(changes)}, not from rung {first} on"
            )
    return Verdict(rungs[0][1], noisy[0], rungs, text + (" (within noise)" if noisy[-1] else ""))


def within_noise(rec: Mapping[str, Any]) -> bool:
    """Whether the spread over seeds crosses the target: another set of seeds might have decided otherwise.

    A claim that holds is within noise where any of its conditions has its target within one standard deviation of the
    mean; one that does not hold, where all the conditions that fail do.
    """
    stored = rec.get("within_noise")
    return _within_noise(rec["target"], rec["measured"]) if stored is None else bool(stored)


def _within_noise(target: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    failing, crossing = [], []
    headline = {"metric": target["metric"], "op": target["op"], "target": target["value"]}
    for condition in (headline, *target["conditions"]):
        values = [row[condition["metric"]] for row in rows]
        if any(value is None for value in values):
            return False  # one diverged: that is no noise
        spread = _deviation(rows, condition["metric"]) or 0.0
        crosses = spread > 0.0 and abs(mean(values) - condition["target"]) <= spread
        crossing.append(crosses)
        if not passes(mean(values), condition["op"], condition["target"]):
            failing.append(crosses)
    return all(failing) if failing else any(crossing)


def _deviation(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Sample standard deviation, 0 of one seed; None where one is not finite."""
    values = [row[metric] for row in rows]
    return None if any(value is None for value in values) else stdev(values) if len(values) > 1 else 0.0


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


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], gone: Collection[str] = ()) -> None:
    """Merge bench rows into `path` = {"rows": [...]}, replacing those of the same name and hardware. Atomic.

    Args:
        gone: names of rows of this hardware that others have taken the place of.
    """
    fresh = {(row["name"], row["hardware"]): dict(row) for row in rows}
    left = {(name, hardware) for name in gone for _, hardware in fresh}.difference(fresh)
    merged: list[Mapping[str, Any]] = []
    for old in _read(path, "rows"):  # a row measured again keeps its place
        key = (old["name"], old["hardware"])
        if key not in left:
            merged.append(fresh.pop(key, old))
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

    Files under results/ and pretrained/, and pages, do not count: programs write there, and no result hangs on them.
    """
    head = _git("rev-parse", "--short=12", "HEAD") if CHECKOUT else None  # site-packages may lie in another checkout
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)results", ":(exclude)*/pretrained", ":(exclude)*.md")
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
    """Whether a mean, None where a seed diverged, meets a bar."""
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
    return read_object(path, kinds={key: list}, advice="restore it from git or delete it")[key]
