"""Bench rows gathered by workload: ours, the peer as users run it, and the peer at its best, on one line.

A benchmark writes a row for each pair of sides, named

    <what>, <sides> (<size>)       sides: "default against default: ours bf16, peer fp32", "both fp32", ...
    <what> against <peer> (<size>)

The first pair of a workload is the one that users would run; the peer is at its best in the pair in which its own
number is the best. Rows of memory join the workload that they are about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.ledger import passes
from report.plots import number

Row = Mapping[str, Any]

_SIZE = r"(?P<size> \([^()]*\))?"
_SIDES = re.compile(
    r"(?P<what>.+?), (?P<sides>default against default: .+?|both \w+(?:, against the better peer)?|ours \w+, peer \w+"
    r"|(?:bf16|float32), ours eager .+?|(?:bf16|float32), both compiled)" + _SIZE
)
_AGAINST = re.compile(r"(?P<what>.+?),? (?P<sides>against .+?)" + _SIZE)
_MEMORY = re.compile(r"peak memory(?:, | of )(?P<of>.+)")
SAME = 0.02  # of ours in two rows: closer ones are not told apart
_EXPLAINING = ("quality: ", "fraction of ")  # they say that a speed is honest, and how near the limit it is


@dataclass
class Workload:
    """The rows of one thing that was done, in the order in which they were measured."""

    what: str
    size: str
    rows: list[Row]
    sides: list[str]
    memory: Workload | None = None

    @property
    def name(self) -> str:
        return f"{self.what}, {self.sides[0]}{self.size}" if self.alone else f"{self.what}{self.size}"

    @property
    def alone(self) -> bool:
        """Whether there is one row only, whose name says what it was measured against."""
        return len(self.rows) == 1 and self.sides[0].startswith("against")

    def best(self) -> int:
        """The place of the row in which the peer's own number is the best, one that was asked for before others."""
        higher_is_better = (self.rows[0]["ratio"] > 1) == (self.rows[0]["ours"] > self.rows[0]["peer"])
        sign = 1 if higher_is_better else -1

        def rank(place: int) -> tuple[float, bool, int]:
            row = self.rows[place]
            return sign * row["peer"], row["target"] is not None, place

        return max(range(len(self.rows)), key=rank)

    def pair(self) -> str:
        """The peer's number at its best; ours goes before it where it is another than in the first row."""
        row, first = self.rows[self.best()], self.rows[0]
        same = abs(row["ours"] / first["ours"] - 1) < SAME
        return number(row["peer"]) if same else f"{number(row['ours'])} to {number(row['peer'])}"

    def shown(self) -> list[Row]:
        """The rows that a table has: as users run it, at its best, and the worst of memory."""
        memory = [min(self.memory.rows, key=lambda row: row["ratio"])] if self.memory else []
        return [self.rows[place] for place in dict.fromkeys((0, self.best()))] + memory

    def missed(self) -> bool:
        rows = self.rows + (self.memory.rows if self.memory else [])
        return any(row["holds"] is False for row in rows)


def workloads(rows: Iterable[Row], only: str = "") -> list[Workload]:
    """The rows by workload, without those that explain others.

    Args:
        only: a regular expression; rows whose name it does not match are left out.
    """
    found: dict[Any, Workload] = {}
    for row in rows:
        name = row["name"]
        if name.removeprefix("cuda ").startswith(_EXPLAINING) or not re.search(only, name):
            continue
        match, key = _SIDES.fullmatch(name), None
        if match is None and (match := _AGAINST.fullmatch(name)):
            key = row["ours"]  # what differs in ours as well is another workload
        what, sides, size = match.group("what", "sides", "size") if match else (name, "", "")
        place = found.setdefault((what, size, row["unit"], key), Workload(what, size or "", [], []))
        place.rows.append(row)
        place.sides.append(sides)
    return _with_memory(list(found.values()))


def _with_memory(found: list[Workload]) -> list[Workload]:
    left = []
    for workload in found:
        about = _MEMORY.fullmatch(workload.what)
        owner = next(
            (
                other
                for other in found
                if about and other.size == workload.size and f"{other.what} ".startswith(f"{about['of']} ")
            ),
            None,
        )
        if owner is None:
            left.append(workload)
        else:
            owner.memory = workload
    return left


def ratio_text(row: Row) -> str:
    """`2.26x`, beside its bar `≥ 1.3`; a bar that was missed in bold."""
    ratio, target = row["ratio"], row["target"]
    if target is None:
        return f"{number(ratio, 3)}x"
    op = ">=" if row["holds"] else "<"
    digits = next(n for n in range(3, 17) if passes(float(f"{ratio:.{n}g}"), op, target))
    text = f"{number(ratio, digits)}x {'≥' if row['holds'] else '<'} {number(target, 3)}"
    return text if row["holds"] else f"**{text}**"


def cells(workload: Workload, with_memory: bool) -> list[str]:
    """What a table says of a workload: its name, ours, the peer as users run it, the peer at its best, memory."""
    first, best = workload.rows[0], workload.best()
    unit = first["unit"]
    told = f", {workload.sides[0]}" if len(workload.rows) > 1 and workload.sides[0].startswith("against") else ""
    found = [
        workload.name,
        f"{number(first['ours'])} {unit}",
        f"{number(first['peer'])} ({ratio_text(first)}{told})",
    ]
    if best == 0:
        found.append("-" if len(workload.rows) == 1 else "the same")
    else:
        found.append(f"{workload.pair()} ({ratio_text(workload.rows[best])}, {workload.sides[best]})")
    if with_memory:
        memory = workload.memory
        if memory is None:
            found.append("-")
        else:
            row = min(memory.rows, key=lambda row: row["ratio"])
            found.append(f"{number(row['ours'], 3)} to {number(row['peer'], 3)} {row['unit']} ({ratio_text(row)})")
    return found
