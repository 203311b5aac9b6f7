"""The READMEs' tables of measured numbers, filled from results/ so that nobody types one.

    python -m report.readme_tables                 # rewrite what is stale
    python -m report.readme_tables --check         # write nothing; exit status 1 when a table is stale

A table stands between two markers, each alone on its line, in README.md, <folder>/README.md or
benchmarks/<name>/README.md:

    <!-- claims:ldm -->    the claims of results/ldm.json
    <!-- bench:ldm -->     the workloads of results/bench_ldm.json; <!-- bench:ldm REGEX --> only those it matches
    <!-- papers -->        the papers and what was measured of each
    <!-- runs -->          the commands that train the papers built so far, and how long they took
    <!-- figures:ldm a b --> the pictures a.png, b.svg of results/figures/ldm with their captions, at most six a README
    <!-- text:NAME -->     the file results/NAME.txt (as it is printed) or results/NAME.md, which a program has written
    <!-- end -->           closes any of them

Tables are compact: what they leave out (the paper's values, conditions, seeds, further rows) is on the report page.
Without a results file the table says "not measured yet". Equal results give equal text.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically
from common.ledger import read_claims, read_notes, verdict
from common.paths import REPOSITORY, RESULTS
from report.build import Findings, load, waiting
from report.papers import Paper, all_papers
from report.plots import number
from report.record_run import WITHOUT_BF16
from report.words import SIGNS, conditions, in_words
from report.workloads import cells, workloads

END = "<!-- end -->"
NOT_MEASURED = "not measured yet"
MOST_ROWS, MOST_FIGURES = 12, 6
REPORT = "`make report` builds the report page, `report/site/index.html`"
_MARKER = re.compile(
    r"<!-- *(?P<kind>claims|bench|papers|runs|text|figures)(?::(?P<name>\w+)(?: +(?P<only>.+?))?)? *-->"
)


def readme_files(root: Path) -> list[Path]:
    """README.md, every <folder>/README.md and those of the benchmarks that compare several papers."""
    found = (root / "README.md", *root.glob("[!.]*/README.md"), *root.glob("benchmarks/*/README.md"))
    return sorted(path for path in found if path.is_file())


def filled(path: Path, root: Path, found: Mapping[str, Findings]) -> str:
    """The text of the README at `path` with every marked table made anew.

    Raises:
        UserError: a marker without its end, an end without its marker, or a name that no paper has.
    """
    lines: list[str] = []
    opened: tuple[int, str] | None = None
    fenced = False
    for position, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if text.startswith("```"):
            fenced = not fenced
        marker = None if fenced else _MARKER.fullmatch(text)
        where = f"{path.relative_to(root)} line {position}"
        if opened is None:
            lines.append(line)
            if text == END and not fenced:
                raise UserError(f"{where}: {END} closes no table")
            if marker:
                lines += table(marker, root, path.parent, found, where)
                opened = (position, text)
        elif text == END:
            lines.append(line)
            opened = None
        elif marker:
            raise UserError(f"{where}: {text} begins before the table of line {opened[0]} is closed by {END}")
    if opened is not None:
        raise UserError(f"{path.relative_to(root)} line {opened[0]}: {opened[1]} is never closed by {END}")
    return "\n".join(lines) + "\n"


def table(marker: re.Match[str], root: Path, folder: Path, found: Mapping[str, Findings], where: str) -> list[str]:
    """Lines of one table; `folder` is the README's, from which links lead."""
    kind, name, only = marker.group("kind", "name", "only")
    if kind in ("papers", "runs"):
        if name is not None:
            raise UserError(f"{where}: {kind} takes no name, found {name!r}")
        return papers_table(root, folder, found) if kind == "papers" else runs_table(root / "results" / "runs")
    if name is None:
        raise UserError(f"{where}: {kind} needs a name, for example <!-- {kind}:ldm -->")
    if only and kind not in ("bench", "figures"):
        raise UserError(f"{where}: {kind} takes nothing but a name, found {only!r}")
    if kind == "claims" and name not in {paper.key for paper in all_papers()}:
        raise UserError(f"{where}: no paper is called {name!r}; there are: {', '.join(p.key for p in all_papers())}")
    if kind == "text":
        return _quoted(root / "results", name)
    findings = found.get(name, Findings())
    if kind == "figures":
        return figures(findings, (only or "").split(), folder, where)
    if kind == "bench":
        return bench_table(findings, only or "")
    return claims_table(findings, root / name / "claims.yaml")


def _quoted(results: Path, name: str) -> list[str]:
    markdown = results / f"{name}.md"
    if markdown.is_file():
        return markdown.read_text(encoding="utf-8").rstrip().splitlines()
    file = results / f"{name}.txt"
    lines = file.read_text(encoding="utf-8").rstrip().splitlines() if file.is_file() else []
    return ["```text", *lines, "```"] if lines else [NOT_MEASURED]


def figures(findings: Findings, names: Sequence[str], folder: Path, where: str) -> list[str]:
    """The named pictures, each below its caption.

    Raises:
        UserError: a name that no picture has, or more names than a visitor looks at.
    """
    known = {picture.path.stem: picture for picture in findings.pictures}
    if not known:
        return [NOT_MEASURED]
    missing = [name for name in names if name not in known]
    if missing or not 0 < len(names) <= MOST_FIGURES:
        expected = f"expected one to {MOST_FIGURES} of {', '.join(known)}"
        raise UserError(f"{where}: {f'no picture is called {missing[0]!r}' if missing else 'pictures'}; {expected}")
    lines = []
    for name in names:
        picture = known[name]
        lines += [picture.caption, "", f"![{name}]({Path(os.path.relpath(picture.path, folder)).as_posix()})", ""]
    return lines[:-1]


def claims_table(findings: Findings, file: Path) -> list[str]:
    """One row a claim, from its most thorough tier, and the number that decides it.

    Args:
        file: the paper's claims.yaml, which has each claim in one line, and what was tried where one was missed.
    """
    if not findings.claims:
        return [NOT_MEASURED]
    records = [best for best, *_ in findings.by_id().values()]
    given = file.is_file()
    short = {claim.id: claim.short for claim in read_claims(file, "small").values()} if given else {}
    notes, words = read_notes(file) if given else ({}, {})
    rows = [
        [
            best["id"],
            _verdict(best),
            short.get(best["id"], best["statement"]),
            _against_targets(best, words.get(best["id"], {})),
        ]
        for best in records
    ]
    lines = _markdown(["id", "holds", "claim", "measured against target"], rows)
    seeds = sorted({len(best["measured"]) for best in records})
    number_of = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
    lines += [
        "",
        f"Mean ± standard deviation over {number_of}. The paper's values, all conditions and seeds: {REPORT}.",
    ]
    missed = [best["id"] for best in records if not best["holds"] and best["id"] in notes]
    if missed:
        lines += ["", "Why the ones that miss do, and what was tried:", ""]
        lines += [f"- **{name}** {' '.join(notes[name].split())}" for name in missed]
    return lines


def _against_targets(claim: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """The number that decides the verdict, the first that missed or else the headline, and how the others went."""
    found = conditions(claim)
    shown = next((one for one in found if not one.met), found[0])
    name = words.get(shown.metric, in_words(shown.metric))
    missed = sum(not one.met for one in found) - (not shown.met)
    others = {"missed": missed, "met": len(found) - 1 - missed}
    cell = [f"{name} {shown.text} ({SIGNS.get(shown.op, shown.op)} {number(shown.bar)})"]
    return "; ".join(cell + [f"{count} more {word}" for word, count in others.items() if count])


def bench_table(findings: Findings, only: str = "") -> list[str]:
    """One row a workload on the machine that measured most, missed ones first in line; above, what is left out."""
    if not findings.rows:
        return [NOT_MEASURED]
    machines = Counter(row["hardware"] for row in findings.rows)
    hardware = machines.most_common(1)[0][0]
    found = workloads((row for row in findings.rows if row["hardware"] == hardware), only)
    if len(found) > MOST_ROWS:
        kept = [w for w in found if w.missed()] + [w for w in found if not w.missed()]
        found = [w for w in found if w in kept[:MOST_ROWS]]
    with_memory = any(w.memory for w in found)
    head = ["workload", "ours", "peer as users run it", "peer at its best"]
    shown = {row["name"] for workload in found for row in workload.shown()}
    others = [row for row in findings.rows if row["hardware"] != hardware or row["name"] not in shown]
    note = f"Measured on {hardware}. 2x: ours is twice as good. ≥ 1.3: so much was asked for; bold where it was missed."
    if others:
        missed = sum(row["holds"] is False for row in others)
        counted = "1 further row is" if len(others) == 1 else f"{len(others)} further rows are"
        note += f" {counted} on the report page{f' ({missed} of them missed)' * bool(missed)}."
    table = _markdown(head + ["peak memory, ours to peer"] * with_memory, [cells(w, with_memory) for w in found])
    return [note, "", *table]


def papers_table(root: Path, folder: Path, found: Mapping[str, Findings]) -> list[str]:
    """One row a paper: what it claims, and the state of its claims here."""
    rows = []
    for paper in all_papers():
        readme = root / paper.key / "README.md"
        link = Path(os.path.relpath(readme, folder)).as_posix()
        key = f"[`{paper.key}`]({link})" if readme.is_file() else f"`{paper.key}`"
        venue = "" if paper.venue.startswith("arXiv") else f", {paper.venue}"
        title = f"[{_name(paper.title)}](https://arxiv.org/abs/{paper.arxiv}){venue}"
        rows.append([key, title, paper.idea, _state(paper, root, found.get(paper.key, Findings()))])
    return _markdown(["folder", "paper", "idea", "here"], rows)


def _name(title: str) -> str:
    """What a paper is called for short: the words before its title's colon, if there are any."""
    return title.partition(":")[0]


def runs_table(folder: Path) -> list[str]:
    """One row a paper: what its default run does, and minutes and precision on both kinds of CPU."""
    rows = []
    for paper in all_papers():
        cells = [_taken(folder / f"{paper.key}-small{kind}.json") for kind in ("", WITHOUT_BF16)]
        rows.append([f"`make {paper.key}-train`", paper.start, *cells])
    return _markdown(["command", "what it does", "CPU with bf16 instructions", "CPU without (AVX2)"], rows)


def _taken(file: Path) -> str:
    run = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    seconds = run.get("seconds")
    if isinstance(seconds, dict):
        seconds = seconds["total"]
    elif seconds is None and "stages" in run:  # what publishing keeps of a recipe: the times of its stages
        seconds = sum(sum(stage["seconds"].values()) for stage in run["stages"].values())
    if seconds is None:
        return NOT_MEASURED
    known = {**run.get("facts", {}), **run}
    return ", ".join([f"{seconds / 60:.0f} min", *(known[key] for key in ("precision", "hardware") if key in known)])


def _state(paper: Paper, root: Path, findings: Findings) -> str:
    best = [records[0] for records in findings.by_id().values()]
    if not best:
        return NOT_MEASURED if (root / paper.key / "model.py").is_file() else "not built yet"
    holding = sum(claim["holds"] for claim in best)
    later = sum(verdict(claim).rungs[-1][1] for claim in best if not claim["holds"])
    larger = f", {later} more at a larger budget" if later else ""
    return f"{holding} of {len(best)} claims hold{larger}{waiting(findings, root / paper.key)}"


def _verdict(claim: Mapping[str, Any]) -> str:
    """Whether it holds, and from which rung on where it was measured at more than one."""
    found = verdict(claim)
    word = "yes" if found.holds else "**no**"
    if len(found.rungs) > 1:
        return f"{word}; {found.text}"
    return f"{word} (within noise)" if found.within_noise else word


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    # A cell may hold neither a column border, a line break nor the start of a tag.
    clean = [re.sub(r"\s+", " ", cell).strip().replace("|", "\\|") for cell in cells]
    clean = [re.sub(r"<(?=[A-Za-z/!?])", "&lt;", cell) for cell in clean]
    return f"| {' | '.join(clean)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a table is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON files")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="folder with README.md and the papers' folders")
    options = parser.parse_args(argv)
    found = load(options.results) if options.results.is_dir() else {}
    texts = {path: filled(path, options.root, found) for path in readme_files(options.root)}
    stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        name = path.relative_to(options.root)
        if options.check:
            print(f"{name}: its tables are stale; run python -m report.readme_tables")
            continue
        write_atomically(path, partial(Path.write_text, data=texts[path], encoding="utf-8"))
        print(f"{name}: tables rewritten")
    if options.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
