"""What the tests of the papers' claims share: a smoke reproduction from scratch, and made-up ledgers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from common.ledger import read_claims, record, write_claims


def smoke_records(reproduce: ModuleType, folder: Path, *claims: str) -> dict[str, Any]:
    """Records of the smoke tier (of these claims) by id; everything is measured below `folder`."""
    options = ["--tier", "smoke", "--folder", str(folder / "study"), "--output", str(folder / "ledger.json")]
    found = reproduce.main([*options, *(["--claims", *claims] if claims else [])])
    return {finished["id"]: finished for finished in found}


def write_ledger(path: Path, paper: str, values: Mapping[str, Mapping[str, float]]) -> None:
    """A ledger of tier small: every seed measured these values of a claim, and 0.5 of what its target asks beside."""
    known = read_claims(paper, "small")
    records = []
    for name, measured in values.items():
        claim = known[name]
        wanted = {condition.metric: 0.5 for condition in claim.target.all_conditions()}
        rows = [{**wanted, **measured}] * len(claim.seeds)
        records.append(record(claim, rows, seconds=1.0, peak_memory_bytes=1, seeds=claim.seeds))
    write_claims(path, records)
