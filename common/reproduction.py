"""What every `reproduce.py` does: its options, and the loop over claims and seeds that fills the ledger.

A finished measurement is kept in a file of its own, so an interrupted program continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json
from common.ledger import Claim, check_targets, peak_memory, record, write_claims
from common.paths import REPOSITORY, RESULTS


def options_parser(paper: str, description: str | None) -> argparse.ArgumentParser:
    """`--tier`, `--claims` and `--output`; a paper adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=("smoke", "small"), default="small")
    parser.add_argument("--claims", nargs="+", metavar="ID", help="default: all of the tier")
    parser.add_argument(
        "--output", type=Path, help=f"default: results/{paper}.json (smoke: runs/reproduce/{paper}-smoke.json)"
    )
    return parser


def chosen_claims(options: argparse.Namespace, available: Sequence[str]) -> list[str]:
    """The claims that were asked for, all of the tier by default.

    Raises:
        UserError: the tier has no such claim.
    """
    for name in options.claims or ():
        if name not in available:
            raise UserError(f"--claims {name}: tier {options.tier} has {', '.join(available)}")
    return list(options.claims or available)


def ledger_path(options: argparse.Namespace, paper: str) -> Path:
    """Where the records go: what `--output` says, or the tier's own place."""
    smoke = REPOSITORY / "runs" / "reproduce" / f"{paper}-smoke.json"
    default: Path = RESULTS / f"{paper}.json" if options.tier == "small" else smoke
    return options.output or default


def measure_claims(
    claims: Sequence[Claim],
    seeds: Callable[[str], Sequence[int]],
    measure: Callable[[str, int], Mapping[str, Any]],
    folder: Path,
    output: Path,
    *,
    settings: Any = None,
    write: bool = True,
) -> list[dict[str, Any]]:
    """Measure claims over their seeds and write each one's record when its last seed is done.

    Args:
        seeds: of a claim, by its id.
        measure: claim id and seed to the measured values; called when `folder`/ID-seedN.json is not there yet.
        settings: plain values that are kept with a measurement; with others than these it is made again.
        write: False measures without writing records (another process takes the other seeds).

    Returns:
        the records, none with `write=False`.
    """
    check_targets(output, claims)
    records: list[dict[str, Any]] = []
    for claim in claims:
        kept = [_measured(claim, seed, measure, folder, settings) for seed in seeds(claim.id)]
        if not write:
            continue
        seconds, peak = sum(entry["seconds"] for entry in kept), max(entry["peak"] for entry in kept)
        values = [entry["values"] for entry in kept]
        records.append(record(claim, values, round(seconds, 1), peak, seeds=list(seeds(claim.id))))
        write_claims(output, records[-1:])
        mean = records[-1]["mean"]
        shown = "not finite" if mean is None else f"{mean:.4g}"
        print(f"{claim.id}: mean {shown}, {'holds' if records[-1]['holds'] else 'does not hold'}", flush=True)
    return records


def _measured(
    claim: Claim, seed: int, measure: Callable[[str, int], Mapping[str, Any]], folder: Path, settings: Any
) -> dict[str, Any]:
    store = folder / f"{claim.id}-seed{seed}.json"
    kept: dict[str, Any] = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {}
    if not kept or kept.get("settings") != settings:
        started = time.perf_counter()
        values = dict(measure(claim.id, seed))
        kept = {"values": values, "seconds": time.perf_counter() - started, "peak": peak_memory()}
        write_json(store, kept if settings is None else {**kept, "settings": settings})
    # A number that is not finite stands as null in the file.
    kept["values"] = {key: float("nan") if value is None else value for key, value in kept["values"].items()}
    headline = claim.target.metric
    print(f"{claim.id} seed {seed}: {headline} {kept['values'][headline]:.4g} ({kept['seconds']:.0f} s)", flush=True)
    return kept
