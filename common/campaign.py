"""Climb the ladder of budgets: measure what no rung of any paper's claims has yet, one measurement after the other.

    python -m common.campaign --plan                            # what is next, and how long all of it would take
    python -m common.campaign --hours 8                         # in this process, at the lowest priority
    python -m common.campaign --papers ldm,electra --engine processes --workers 2
    python -m common.campaign --engine ray                      # the same queue on a Ray cluster

Rungs are multiples of a claim's budget (claims.yaml); the target is the same at all. The queue: lowest rungs first, of
a rung the claims first that do not hold one rung below. It can be ended at any moment, with kill -9 too, and goes on
where it was, within a training: finished measurements and arms are noted in results/arms/<paper>/, results/<paper>.json
is brought up to them after each, and what is begun is in runs/reproduce/. On another machine what is noted counts as
measured; a measurement begun on another kind of CPU is begun again. Claims about time are left to
`make <paper>-reproduce` on an idle machine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import reproduction
from common.cli import Parser
from common.errors import UserError, first_line, run_main
from common.figures import draw_ladder
from common.files import read_object, write_json
from common.jobs import ENGINES, Engine, Job, JobError, run_jobs
from common.ledger import Claim, read_claims, read_ledger, read_notes, verdict
from common.options import Positive, Whole
from common.paths import REPOSITORY, RESULTS


@dataclass(frozen=True)
class Step:
    """One measurement: a claim at a rung with a seed; `seconds`: about how long it takes, None where nobody knows."""

    paper: str
    claim: str
    rung: int
    seed: int
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.paper} {self.claim} rung {self.rung} seed {self.seed} ({in_hours(self.seconds)})"


def in_hours(seconds: float | None) -> str:
    if seconds is None:
        return "nobody knows how long"
    return f"about {seconds / 3600:.1f} h" if seconds >= 5400 else f"about {max(1, round(seconds / 60))} min"


def papers() -> list[str]:
    """Folders of the repository that hold claims and measure them."""
    found = (file.parent for file in REPOSITORY.glob("*/claims.yaml"))
    return sorted(folder.name for folder in found if (folder / "reproduce.py").is_file())


def queue(chosen: Sequence[str], results: Path) -> list[Step]:
    """What is still to be measured of these papers, in its order."""
    found: list[tuple[tuple[Any, ...], Step, Mapping[str, Any] | None]] = []
    for paper in chosen:
        ledger = results / f"{paper}.json"
        records = {old["id"]: old for old in read_ledger(ledger) if old["tier"] == "small"}
        for place, (name, claim) in enumerate(read_claims(paper, "small").items()):
            record = records.get(name)
            at = verdict(record).rungs if record is not None else ()
            for rung in () if claim.timed else claim.rungs:
                below = [holds for lower, holds in at if lower < rung]
                order = (rung, bool(below and below[-1]), paper, place)
                done = measured_seeds(claim.at(rung), ledger, record)
                wanted = [seed for seed in claim.seeds if seed not in done]
                found += [((*order, seed), Step(paper, name, rung, seed), record) for seed in wanted]
    counted: set[tuple[Any, ...]] = set()
    steps = [(step, record) for _, step, record in sorted(found, key=lambda entry: entry[0])]
    return [replace(step, seconds=expected(step, record, counted)) for step, record in steps]


def measured_seeds(claim: Claim, ledger: Path, record: Mapping[str, Any] | None) -> set[int]:
    """Seeds of a claim that are measured at its rung: noted, or of rung 1 on record."""
    seeds = set(reproduction.measurements(reproduction.notes_of(ledger), claim).get("", {}))
    if claim.rung == 1 and record is not None:
        seeds |= {row["seed"] for row in record["measured"]}
    return seeds


def expected(step: Step, record: Mapping[str, Any] | None, counted: set[tuple[Any, ...]]) -> float | None:
    """Seconds of a step, from the highest rung of its claim on record that is not above it.

    Where a record's own seconds leave out arms that another claim had trained, their CPU seconds are among its values
    (`cpu_seconds_NAME`): they count once.

    Args:
        counted: arms that earlier steps of the queue train; those of this one are added.
    """
    if record is None:
        return None
    known = [entry for entry in (record, *record.get("rungs", ())) if entry.get("rung", 1) <= step.rung]
    last = max(known, key=lambda entry: entry.get("rung", 1))
    rows = last["measured"]
    row = next((row for row in rows if row["seed"] == step.seed), rows[0])
    arms = {(step.paper, step.rung, step.seed, key): row[key] or 0.0 for key in row if key.startswith("cpu_seconds")}
    fresh = sum(seconds for arm, seconds in arms.items() if arm not in counted)
    counted.update(arms)
    own = last["seconds"] / len(rows)
    return float((fresh if own < sum(arms.values()) else own) * step.rung / last.get("rung", 1))


def measure(paper: str, claim: str, rung: int, seed: int, results: str) -> dict[str, Any]:
    """The job of one step: the paper's own `reproduce.py` for one claim, rung and seed.

    Returns:
        {"path": of the note below the results, "note": its content}, so that a machine with disks of its own hands it
        over; or {"error": why there is none}.
    """
    lower_priority()
    ledger = Path(results) / f"{paper}.json"
    options = ["--claims", claim, "--rung", str(rung), "--seeds", str(seed), "--output", str(ledger)]
    try:
        importlib.import_module(f"{paper}.reproduce").main(options)
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # the other claims are not to wait for it
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    known = read_claims(paper, "small", rung)[claim]
    path = reproduction.note_of(reproduction.notes_of(ledger), known, seed, None)
    return {"path": str(path.relative_to(results)), "note": read_object(path)}


GROUP = Path("/proc/self/autogroup")  # of the session, where Linux schedules by groups: "/autogroup-305 nice 0"


def lower_priority() -> None:
    """Let everything else go first: nice 19, also of the session's group where Linux schedules by groups.

    Without the latter two terminals share the processor equally, whatever is nice inside them.
    """
    os.nice(19)
    with contextlib.suppress(OSError):
        GROUP.write_text("19")


@contextlib.contextmanager
def group_as_before() -> Iterator[None]:
    """Give the session's group its priority back: what a user types next in the same terminal is no campaign.

    The file is missing where Linux does not schedule by groups, and empty where the session has no group of its own.
    """
    before: list[str] = []
    with contextlib.suppress(OSError):
        before = GROUP.read_text().split()[-1:]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if before:
                GROUP.write_text(before[0])


class TimeIsUp(BaseException):
    """The hours are over; no part of the work that is under way may take it for an error."""


@contextlib.contextmanager
def hours_at_most(hours: float | None) -> Iterator[None]:
    """Raise `TimeIsUp` inside after so many hours, in the middle of a training: what is begun goes on next time."""

    def up(*_: Any) -> None:
        raise TimeIsUp

    if hours is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, 3600 * hours)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def climb(chosen: Sequence[str], results: Path, engine: Engine, workers: int = 0) -> list[str]:
    """Measure the whole queue; ledgers and figures are brought up to date after each step.

    Returns:
        what could not be measured, and why.
    """
    for paper in chosen:
        reproduction.adopt(results / f"{paper}.json", paper)
        bring_up(paper, results)
    steps = queue(chosen, results)
    jobs = [Job("common.campaign.measure", {**_place(step), "results": str(results)}) for step in steps]
    left, failed = dict(enumerate(steps)), []
    print_queue(steps)
    for number, found in run_jobs(jobs, engine, workers):
        step = left.pop(number)
        if "error" in found:
            failed.append(f"{step}: {found['error']}")
            print(f"left out: {failed[-1]}", flush=True)
        else:
            path = results / found["path"]
            if not path.is_file():  # measured on a machine with disks of its own
                write_json(path, found["note"])
            bring_up(step.paper, results)
        print_queue(list(left.values()))
    return failed


def _place(step: Step) -> dict[str, Any]:
    return {key: value for key, value in asdict(step).items() if key != "seconds"}


def bring_up(paper: str, results: Path) -> None:
    """A paper's ledger, and the figure of its ladder, from what is noted."""
    ledger = results / f"{paper}.json"
    for written in reproduction.rebuild(ledger, paper):
        name = written.split()[0]
        record = next(old for old in read_ledger(ledger) if old["id"] == name and old["tier"] == "small")
        print(f"{paper} {written} is on record: {verdict(record).text}", flush=True)
        draw_ladder(ledger, results / "figures" / paper, read_notes(paper)[1])


def print_queue(steps: Sequence[Step]) -> None:
    """What is next, and how long all of it would take."""
    if not steps:
        print("nothing is left to be measured", flush=True)
        return
    timed = [step.seconds for step in steps if step.seconds is not None]
    unknown = len(steps) - len(timed)
    parts = [f"{in_hours(sum(timed))} of one core"] if timed else []
    parts += [f"{unknown} that nobody has timed"] if unknown else []
    count = f"{len(steps)} measurement{'s' if len(steps) > 1 else ''}"
    print(f"{count} to go, {' and '.join(parts)}; next: {steps[0]}", flush=True)


def print_plan(steps: Sequence[Step]) -> None:
    print_queue(steps)
    for rung in sorted({step.rung for step in steps}):
        those = [step for step in steps if step.rung == rung]
        print(f"rung {rung}: {len(those)} measurements, {in_hours(sum(s.seconds or 0.0 for s in those))}")
        for claim in dict.fromkeys((step.paper, step.claim) for step in those):
            own = [step for step in those if (step.paper, step.claim) == claim]
            time = "?" if own[0].seconds is None else in_hours(sum(s.seconds or 0.0 for s in own))
            print(f"  {claim[0]} {claim[1]}: seeds {', '.join(str(step.seed) for step in own)}, {time}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--papers", metavar="A,B", help="default: all that have claims")
    parser.add_argument("--hours", type=Positive, help="end after so many hours, in the middle of a training too")
    parser.add_argument("--engine", choices=ENGINES, default="here", help="here, in processes, or on a Ray cluster")
    parser.add_argument("--workers", type=Whole, default=0, help="of the engine processes; 0: one for each core")
    parser.add_argument("--plan", action="store_true", help="print the queue, measure and write nothing")
    parser.add_argument("--rebuild", action="store_true", help="bring the ledgers up to results/arms/ and stop")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the ledgers and arms/")
    given = parser.parse_args(argv)
    known = papers()
    chosen = known if given.papers is None else [name.strip() for name in given.papers.split(",")]
    for name in chosen:
        if name not in known:
            raise UserError(f"--papers {name}: expected some of {', '.join(known)}")
    results = given.results.resolve()
    if given.plan:
        print_plan(queue(chosen, results))
        return
    if given.rebuild:
        for paper in chosen:
            bring_up(paper, results)
        return
    try:
        with group_as_before(), hours_at_most(given.hours):
            lower_priority()
            failed = climb(chosen, results, given.engine, given.workers)
    except TimeIsUp:
        print(f"{given.hours:g} hours are over; what was begun goes on next time", flush=True)
        return
    except JobError as error:
        raise UserError(f"the campaign stops: {error}") from None
    if failed:
        raise UserError(f"{len(failed)} could not be measured: {'; '.join(failed)}")


if __name__ == "__main__":
    run_main(main)
