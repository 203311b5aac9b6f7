"""What every `reproduce.py` does: its options, and the loop over claims and seeds that fills the ledger.

    def l1(study: Study, seed: int) -> dict[str, float]: ...

    def main(argv=None):
        return reproduction.main("ldm", __doc__, (l1, l2), open_study, argv=argv)

Claims, targets, seeds and budgets come from the paper's claims.yaml; the function that measures a claim bears its id in
small letters. A finished measurement is kept in a file of its own, so an interrupted program continues where it
stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.cli import Parser
from common.errors import UserError
from common.ledger import Claim, check_targets, peak_memory, read_claims, record, write_claims
from common.options import Seed
from common.paths import REPOSITORY, RESULTS
from common.study import Study, kept

RUNS = REPOSITORY / "runs" / "reproduce"
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
        open_study: from the parsed options; `folder` is where the tier's pieces are kept.
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
    known = read_claims(paper, given.tier)
    named = {measure.__name__: measure for measure in measures}  # type: ignore[attr-defined]
    claims = [known[name] for name in chosen_claims(given, known, without or {})]
    for claim in claims:
        for seed in given.seeds or ():
            if seed not in claim.seeds:
                raise UserError(f"--seeds {seed}: claim {claim.id} of tier {given.tier} has {_listed(claim.seeds)}")
    ledger = ledger_path(given, paper)
    given.folder = given.folder or RUNS / f"{paper}-{given.tier}"
    torch.set_num_threads(1)  # CPU seconds are then seconds of work
    given.folder.mkdir(parents=True, exist_ok=True)
    study = open_study(given)
    if given.tier == "small":
        study.results, study.figures = ledger.parent, ledger.parent / "figures" / paper
    if instead is not None and instead(study, given):
        return []
    records = []
    check_targets(ledger, claims)
    for claim in claims:
        finished = measure_claim(claim, study, named[claim.id.lower()], given.seeds)
        if finished is None:
            continue
        records.append(finished)
        write_claims(ledger, [finished])
        if figures is not None and given.tier == "small":
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
    parser.add_argument("--claims", nargs="+", metavar="ID", help="default: all of the tier")
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
        "--folder", type=Path, help=f"where finished pieces are kept; default: runs/reproduce/{paper}-TIER"
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


def measure_claim(
    claim: Claim, study: S, measure: Measure[S], seeds: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """Measure a claim over its seeds; a measurement that is kept with the same settings is not made again.

    Args:
        seeds: these only, and no record (another process takes the others).

    Returns:
        the record of the ledger.
    """
    settings = {"sizes": claim.sizes, "budget": claim.budget, "study": study.settings}
    found = []
    for seed in seeds or claim.seeds:

        def measured(seed: int = seed) -> dict[str, Any]:
            started = time.perf_counter()
            values = dict(measure(study, seed))
            study.forget()
            return {"values": values, "seconds": time.perf_counter() - started, "peak": peak_memory()}

        entry = kept(study.folder / f"{claim.id}-seed{seed}.json", measured, settings)
        # A number that is not finite stands as null in the file.
        entry["values"] = {key: float("nan") if value is None else value for key, value in entry["values"].items()}
        headline = entry["values"][claim.target.metric]
        print(f"{claim.id} seed {seed}: {claim.target.metric} {headline:.4g} ({entry['seconds']:.0f} s)", flush=True)
        found.append(entry)
    if seeds:
        return None
    seconds, peak = sum(entry["seconds"] for entry in found), max(entry["peak"] for entry in found)
    finished = record(claim, [entry["values"] for entry in found], round(seconds, 1), peak, seeds=claim.seeds)
    shown = "not finite" if finished["mean"] is None else f"{finished['mean']:.4g}"
    print(f"{claim.id}: mean {shown}, {'holds' if finished['holds'] else 'does not hold'}", flush=True)
    return finished


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
