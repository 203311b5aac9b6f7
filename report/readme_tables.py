"""The READMEs' tables of measured numbers, filled from results/ so that nobody types one.

    python -m report.readme_tables                 # rewrite what is stale
    python -m report.readme_tables --check         # write nothing; exit status 1 when a table is stale

A table stands between two markers, each alone on its line, in README.md or <folder>/README.md:

    <!-- claims:ldm -->    the claims of results/ldm.json
    <!-- bench:ldm -->     the side-by-side rows of results/bench_ldm.json
    <!-- papers -->        the thirteen papers and what was measured of each
    <!-- runs -->          how long the default runs took, on CPUs with and without bf16 instructions
    <!-- start -->         the commands that train the papers built so far
    <!-- figures:ldm -->   the pictures of results/figures/ldm with their captions
    <!-- text:NAME -->     the file results/NAME.txt (as it is printed) or results/NAME.md, which a program has written
    <!-- end -->           closes any of them

Without a results file the table says "not measured yet". Equal results give equal text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically
from common.paths import REPOSITORY, RESULTS
from report.build import Findings, in_words, load, measurements
from report.papers import Paper, all_papers
from report.plots import number
from report.record_run import WITHOUT_BF16

END = "<!-- end -->"
NOT_MEASURED = "not measured yet"
_MARKER = re.compile(r"<!-- *(?P<kind>claims|bench|papers|runs|start|text|figures)(?::(?P<name>\w+))? *-->")


def readme_files(root: Path) -> list[Path]:
    """README.md and every <folder>/README.md below `root`."""
    return sorted(path for path in (root / "README.md", *root.glob("[!.]*/README.md")) if path.is_file())


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
                lines += table(marker["kind"], marker["name"], root, path.parent, found, where)
                opened = (position, text)
        elif text == END:
            lines.append(line)
            opened = None
        elif marker:
            raise UserError(f"{where}: {text} begins before the table of line {opened[0]} is closed by {END}")
    if opened is not None:
        raise UserError(f"{path.relative_to(root)} line {opened[0]}: {opened[1]} is never closed by {END}")
    return "\n".join(lines) + "\n"


def table(
    kind: str, name: str | None, root: Path, folder: Path, found: Mapping[str, Findings], where: str
) -> list[str]:
    """Lines of one table; `folder` is the README's, from which links lead."""
    if kind in ("papers", "start", "runs"):
        if name is not None:
            raise UserError(f"{where}: {kind} takes no name, found {name!r}")
        if kind == "runs":
            return runs_table(root / "results" / "runs")
        return papers_table(root, folder, found) if kind == "papers" else start_commands()
    if name is None:
        raise UserError(f"{where}: {kind} needs a name, for example <!-- {kind}:ldm -->")
    if kind == "claims" and name not in {paper.key for paper in all_papers()}:
        raise UserError(f"{where}: no paper is called {name!r}; there are: {', '.join(p.key for p in all_papers())}")
    if kind == "text":
        table = root / "results" / f"{name}.md"
        if table.is_file():
            return table.read_text(encoding="utf-8").rstrip().splitlines()
        file = root / "results" / f"{name}.txt"
        lines = file.read_text(encoding="utf-8").rstrip().splitlines() if file.is_file() else []
        return ["```text", *lines, "```"] if lines else [NOT_MEASURED]
    findings = found.get(name, Findings())
    if kind == "figures":
        links = [(Path(os.path.relpath(path, folder)).as_posix(), caption) for path, caption in findings.figures]
        return [line for link, text in links for line in (text, "", f"![{Path(link).stem}]({link})", "")][:-1] or [
            NOT_MEASURED
        ]
    return claims_table(findings) if kind == "claims" else bench_table(findings)


def claims_table(findings: Findings) -> list[str]:
    """One row a claim, from its most thorough tier."""
    if not findings.claims:
        return [NOT_MEASURED]
    rows = [
        [
            f"{_value(best['paper']['value'])} ({best['paper']['source']})",
            f"**{best['id']}** {best['statement']}",
            str(best["target"]["text"]),
            "; ".join(f"{name} {text}" for name, text in _measured(best).items()),
            f"{len(best['measured'])} ({best['tier']})",
            "yes" if best["holds"] else "**no**",
        ]
        for best, *_ in findings.by_id().values()
    ]
    head = ["paper", "small-scale claim", "target", "measured (mean ± std)", "seeds (tier)", "holds"]
    return _markdown(head, rows)


def bench_table(findings: Findings) -> list[str]:
    """One row a side-by-side measurement."""
    if not findings.rows:
        return [NOT_MEASURED]
    rows = [
        [
            str(row["name"]),
            number(row["ours"]),
            number(row["peer"]),
            str(row["unit"]),
            number(row["ratio"], 3),
            "-" if row["target"] is None else number(row["target"]),
            "-" if row["holds"] is None else "yes" if row["holds"] else "**no**",
            str(row["hardware"]),
        ]
        for row in findings.rows
    ]
    head = ["what", "ours", "peer", "unit", "ratio (above 1: ours is better)", "target", "holds", "hardware"]
    return _markdown(head, rows)


def papers_table(root: Path, folder: Path, found: Mapping[str, Findings]) -> list[str]:
    """One row a paper: what it claims, and the state of its claims here."""
    rows = []
    for paper in all_papers():
        readme = root / paper.key / "README.md"
        link = Path(os.path.relpath(readme, folder)).as_posix()
        key = f"[`{paper.key}`]({link})" if readme.is_file() else f"`{paper.key}`"
        venue = "" if paper.venue.startswith("arXiv") else f", {paper.venue}"
        title = f"{paper.title} ([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}){venue})"
        rows.append([key, title, paper.idea, _state(paper, root, found.get(paper.key, Findings()))])
    return _markdown(["folder", "paper", "claim", "measured here"], rows)


def runs_table(folder: Path) -> list[str]:
    """One row a default run on record: minutes on both kinds of CPU, and in which precision."""
    rows = []
    for paper in all_papers():
        name = f"{paper.key}-small"
        cells = [_taken(folder / f"{name}{kind}.json") for kind in ("", WITHOUT_BF16)]
        if any(cell != NOT_MEASURED for cell in cells):
            rows.append([f"`make {paper.key}-train`", *cells])
    return _markdown(["default run", "with bf16 instructions", "without (AVX2 only)"], rows) if rows else [NOT_MEASURED]


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


def start_commands() -> list[str]:
    """One command a paper that has a room, with what it does."""
    commands = {f"make {paper.key}-train": paper.start for paper in all_papers() if paper.start}
    width = max(map(len, commands))
    return ["```", *(f"{command:<{width}}  # {text}" for command, text in commands.items()), "```"]


def _state(paper: Paper, root: Path, findings: Findings) -> str:
    best = [records[0] for records in findings.by_id().values()]
    if not best:
        return NOT_MEASURED if (root / paper.key / "model.py").is_file() else "not built yet"
    holding = [claim["id"] for claim in best if claim["holds"]]
    failing = [claim["id"] for claim in best if not claim["holds"]]
    first = best[0]
    name, text = next(iter(_measured(first).items()))
    verdict = "holds" if first["holds"] else "does not hold"
    target = f"{first['target']['op']} {number(first['target']['value'])}"
    parts = [f"{len(holding)} of {len(best)} claims hold"]
    if holding and failing:
        parts[0] += f" (not {', '.join(failing)})"
    parts.append(f"{first['id']} {verdict}: {name} {text}, target {target}")
    return "; ".join(parts)


def _measured(claim: Mapping[str, Any]) -> dict[str, str]:
    """What was measured by metric, each once: the headline and the further conditions."""
    found: dict[str, str] = {}
    for condition, _, text in measurements(claim):
        found.setdefault(in_words(condition["metric"]), text)
    return found


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    # A cell may hold neither a column border, a line break nor the start of a tag.
    clean = [re.sub(r"\s+", " ", cell).strip().replace("|", "\\|").replace("<", "&lt;") for cell in cells]
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
