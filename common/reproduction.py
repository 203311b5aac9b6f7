"""What every `reproduce.py` does: its options, and the loop over claims and seeds that fills the ledger.

    def l1(study: Study, seed: int) -> dict[str, float]: ...

    def main(argv=None):
        return reproduction.main("ldm", __doc__, (l1, l2), open_study, argv=argv)

Claims, targets, seeds and budgets come from the paper's claims.yaml; the function that measures a claim bears its id in
small letters. A finished measurement is kept in a file of its own, so an interrupted program continues where it
stopped. In tier small it is also noted in `results/arms/<paper>/`, where `common.campaign` and `rebuild` find it.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.cli import Parser
from common.errors import UserError
from common.files import read_object, sweep, write_json
from common.ledger import (
    Claim,
    check_targets,
    cpu_of,
    peak_memory,
    provenance,
    read_claims,
    read_ledger,
    record,
    write_claims,
)
from common.options import Count, Seed
from common.paths import RESULTS, WORKPLACE
from common.study import Study, kept

RUNS = WORKPLACE / "runs" / "reproduce"
S = TypeVar("S", bound=Study[Any])
Measure = Callable[[S, int], Mapping[str, float]]


def main(
    paper: str,
    description: str | None,
    measures: Iterable[Measure[S]],
    open_study: Callable[[argparse.Namespace], S],
    *,
    figures: Callable[[S, Path], None] | None = None,
    options: Callable[[Parser], None] | None = None,
    instead: Callable[[S, argparse.Namespace], bool] | None = None,
    without: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """A paper's `reproduce.py`: measure the chosen claims of a tier and write the ledger after each.

    Args:
        description: the usage page.
        measures: a function a claim, named as the claim's id in small letters.
        open_study: from the parsed options; `folder` is where the tier's pieces are kept, `rung` multiplies the
            budgets (`open_sizes`, `read_claims`).
        figures: draws what the ledger at a path allows, into `study.figures`; after each claim of tier small.
        options: adds the paper's own options.
        instead: does what such an option asks for in place of the claims; False when none was given.
        without: claims that this machine cannot measure, and why; they are left out unless asked for.

    Returns:
        the records, none with `--seeds`.
    """
    parser = options_parser(paper, description)
    if options is not None:
        options(parser)
    given = parser.parse_args(argv)
    known = read_claims(paper, given.tier, given.rung)
    named = {measure.__name__: measure for measure in measures}  # type: ignore[attr-defined]
    available = [name for name, claim in known.items() if given.claims or given.rung in claim.rungs]
    claims = [known[name] for name in chosen_claims(given, available, without or {})]
    for claim in claims:
        if given.rung not in claim.rungs:
            raise UserError(f"--rung {given.rung}: claim {claim.id} of tier {given.tier} has {_listed(claim.rungs)}")
        for seed in given.seeds or ():
            if seed not in claim.seeds:
                raise UserError(f"--seeds {seed}: claim {claim.id} of tier {given.tier} has {_listed(claim.seeds)}")
    ledger = ledger_path(given, paper)
    given.folder = given.folder or folder_of(paper, given.tier, given.rung)
    torch.set_num_threads(1)  # CPU seconds are then seconds of work
    given.folder.mkdir(parents=True, exist_ok=True)
    sweep(given.folder)
    study = open_study(given)
    if given.tier == "small":
        notes = notes_of(ledger)
        study.finished_arms = notes / "arms" / f"rung{given.rung}"
        if given.rung == 1:  # tables and pictures show what rung 1 came to
            study.results, study.figures = ledger.parent, ledger.parent / "figures" / paper
    else:
        notes = None
    if instead is not None and instead(study, given):
        return []
    records = []
    check_targets(ledger, claims)
    for claim in claims:
        finished = measure_claim(claim, study, named[claim.id.lower()], given.seeds, notes)
        if finished is None:
            continue
        records.append(finished)
        write_claims(ledger, [finished])
        if figures is not None and given.tier == "small" and given.rung == 1:
            figures(study, ledger)
    return records


def options_parser(paper: str, description: str | None) -> Parser:
    """The options of every `reproduce.py`; a paper adds its own."""
    parser = Parser(description=description)
    parser.add_argument(
        "--tier",
        choices=("smoke", "small"),
        default="small",
        help="smoke takes 2 to 3 minutes, small measures the claims on record",
    )
    parser.add_argument(
        "--rung", type=Count, default=1, metavar="N", help="multiply the budgets by N, one of the claims' rungs"
    )
    parser.add_argument("--claims", nargs="+", metavar="ID", help="default: all of the tier that have this rung")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=Seed,
        metavar="N",
        help="only these, without a record: for a second process on another core",
    )
    parser.add_argument(
        "--output", type=Path, help=f"default: results/{paper}.json (smoke: runs/reproduce/{paper}-smoke.json)"
    )
    parser.add_argument(
        "--folder", type=Path, help=f"where finished pieces are kept; default: runs/reproduce/{paper}-TIER[-rungN]"
    )
    return parser


def chosen_claims(
    options: argparse.Namespace, available: Iterable[str], without: Mapping[str, str] | None = None
) -> list[str]:
    """The claims that were asked for; by default all of the tier but those `without`, whose reasons are printed.

    Raises:
        UserError: the tier has no such claim.
    """
    available = list(available)
    for name in options.claims or ():
        if name not in available:
            raise UserError(f"--claims {name}: tier {options.tier} has {', '.join(available)}")
    if options.claims:
        return list(options.claims)
    left_out = {name: reason for name, reason in (without or {}).items() if name in available}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}", flush=True)
    return [name for name in available if name not in left_out]


def ledger_path(options: argparse.Namespace, paper: str) -> Path:
    """Where the records go: what `--output` says, or the tier's own place."""
    default: Path = RESULTS / f"{paper}.json" if options.tier == "small" else RUNS / f"{paper}-smoke.json"
    return options.output or default


def folder_of(paper: str, tier: str, rung: int) -> Path:
    """Where the pieces of a tier are kept; every rung has arms of its own."""
    return RUNS / (f"{paper}-{tier}" if rung == 1 else f"{paper}-{tier}-rung{rung}")


def measure_claim(
    claim: Claim, study: S, measure: Measure[S], seeds: Sequence[int] | None = None, notes: Path | None = None
) -> dict[str, Any] | None:
    """Measure a claim over its seeds; a measurement that is kept with the same settings is not made again.

    Args:
        seeds: these only, and no record (another process takes the others).
        notes: where each is written down for `rebuild`.

    Returns:
        the record of the ledger; its seconds are those of all seeds, each with all that it uses, also what others use.
    """
    settings = study.here({"sizes": claim.sizes, "budget": claim.budget, "study": study.settings})
    found = []
    for seed in seeds or claim.seeds:

        def measured(seed: int = seed) -> dict[str, Any]:
            study.forget()
            started = time.perf_counter()
            values = dict(measure(study, seed))
            seconds = time.perf_counter() - started + study.reused_seconds
            study.forget()
            return {"values": values, "seconds": seconds, "peak": peak_memory(), "made": provenance(study.precision)}

        entry = kept(study.folder / f"{claim.id}-seed{seed}.json", measured, settings)
        # A number that is not finite stands as null in the file.
        entry["values"] = {key: float("nan") if value is None else value for key, value in entry["values"].items()}
        if notes is not None:
            write_json(note_of(notes, claim, seed, entry["made"]["cpu"]), noted(claim, seed, study.settings, entry))
        headline = entry["values"][claim.target.metric]
        print(f"{claim.id} seed {seed}: {claim.target.metric} {headline:.4g} ({entry['seconds']:.0f} s)", flush=True)
        found.append(entry)
    if seeds:
        return None
    finished = _record(claim, found)
    shown = "not finite" if finished["mean"] is None else f"{finished['mean']:.4g}"
    print(f"{claim.id}: mean {shown}, {'holds' if finished['holds'] else 'does not hold'}", flush=True)
    return finished


def _record(claim: Claim, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ledger's record of one measurement a seed, in the order of the claim's seeds."""
    seconds, peak = sum(entry["seconds"] for entry in found), max(entry["peak"] for entry in found)
    values, made = [entry["values"] for entry in found], [entry["made"] for entry in found]
    return record(claim, values, round(seconds, 1), peak, seeds=claim.seeds, made=made)


# What is noted of measurements in results/arms/<paper>/, and a ledger made from it -----------------------------------


def notes_of(ledger: Path) -> Path:
    """The folder of a paper's finished measurements and arms, beside its ledger."""
    return ledger.parent / "arms" / ledger.stem


def note_of(notes: Path, claim: Claim, seed: int, cpu: str | None) -> Path:
    """The file of one measurement; of a claim about time every kind of CPU has its own."""
    machine = "-" + re.sub(r"[^a-z0-9]+", "-", (cpu or "unknown").lower()).strip("-") if claim.timed else ""
    return notes / f"{claim.id}-rung{claim.rung}-seed{seed}{machine}.json"


def noted(claim: Claim, seed: int, study: Mapping[str, Any] | None, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is written down of a measurement: everything that a record needs, and what it was measured with."""
    settings = {"sizes": claim.sizes, "budget": claim.budget, "study": study}
    fields = {"values": entry["values"], "seconds": entry["seconds"], "peak": entry["peak"]}
    return {"claim": claim.id, "rung": claim.rung, "seed": seed, **settings, **fields, **entry["made"]}


def measurements(notes: Path, claim: Claim) -> dict[str, dict[int, dict[str, Any]]]:
    """What is noted of a claim at its rung, by kind of CPU ("" but for a claim about time) and seed.

    Measurements with other sizes or another budget than the claim now has do not count.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    wanted = json.loads(json.dumps([claim.sizes, claim.budget]))
    for path in sorted(notes.glob(f"{claim.id}-rung{claim.rung}-seed*.json")):
        try:
            entry = read_object(path)
            if [entry["sizes"], entry["budget"]] != wanted or entry["seed"] not in claim.seeds:
                continue
            made = {key: entry[key] for key in ("precision", "cpu", "hardware", "versions", "commit")}
            values = {key: float("nan") if value is None else value for key, value in entry["values"].items()}
            one = {"values": values, "seconds": entry["seconds"], "peak": entry["peak"], "made": made}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is no measurement of a claim; restore it from git or delete it") from None
        found.setdefault(entry["cpu"] if claim.timed else "", {})[entry["seed"]] = one
    # What an older record names by its processor alone does not count beside a newer one of that processor.
    return {cpu: of for cpu, of in found.items() if not any(other.startswith(f"{cpu}, ") for other in found)}


def adopt(ledger: Path, paper: str) -> int:
    """Note the measurements of a ledger's rung 1 that are not noted yet; returns how many.

    A record says nothing of single seeds but their values: each gets an equal share of its seconds.
    """
    notes, count = notes_of(ledger), 0
    claims = read_claims(paper, "small")
    for old in read_ledger(ledger):
        claim = claims.get(old["id"])
        if claim is None or old["tier"] != "small":
            continue
        made = {key: old.get(key) for key in ("precision", "hardware", "versions", "commit")} | {"cpu": cpu_of(old)}
        for row in old["measured"]:
            path = note_of(notes, claim, row["seed"], made["cpu"])
            if row["seed"] not in claim.seeds or path.is_file():
                continue
            values = {key: value for key, value in row.items() if key != "seed"}
            share = old["seconds"] / len(old["measured"])
            entry = {"values": values, "seconds": share, "peak": old["peak_memory_bytes"], "made": made}
            write_json(path, noted(claim, row["seed"], None, entry))
            count += 1
    return count


def rebuild(ledger: Path, paper: str) -> list[str]:
    """Bring a paper's ledger up to what is noted: every (claim, rung) of which all seeds are measured.

    Returns:
        "claim rung n" of each record that was written; one that says the same already stays as it is.
    """
    notes, written = notes_of(ledger), []
    first = read_claims(paper, "small")
    for rung in sorted({rung for claim in first.values() for rung in claim.rungs}):
        for claim in read_claims(paper, "small", rung).values():
            if rung not in claim.rungs:
                continue
            for by_seed in measurements(notes, claim).values():
                if set(by_seed) != set(claim.seeds):
                    continue
                made = _record(claim, [by_seed[seed] for seed in claim.seeds])
                head = next(
                    (old for old in read_ledger(ledger) if (old["id"], old["tier"]) == (claim.id, "small")), None
                )
                if head is None and rung > 1:
                    continue  # its rung 1 is not complete: it waits among the notes
                known = [head, *head.get("rungs", ()), *head.get("machines", ())] if head is not None else []
                if any(old.get("rung", 1) == rung and old["measured"] == made["measured"] for old in known):
                    continue
                write_claims(ledger, [made])
                written.append(f"{claim.id} rung {rung}")
    return written


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
