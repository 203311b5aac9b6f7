"""One static web page from everything that was measured.

    python -m report.build                          # results/ -> report/site/index.html
    python -m report.build --results DIR --output FILE

Reads results/<paper>.json (claims), results/bench_<name>.json (side-by-side rows) and the pictures under
results/figures/<paper>/ with their optional captions.json ({"file name": "caption"}). The page carries its pictures,
styles and script inside, asks nothing of the network, and opens from the file system.
"""

from __future__ import annotations

import base64
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically
from common.ledger import TIERS
from common.paths import REPOSITORY, RESULTS
from report.papers import Paper, all_papers
from report.plots import number, ratio_plot, seed_plot, spread

ASSETS = Path(__file__).parent
IMAGE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
ROWS_SHOWN = 14
FIGURES_AHEAD = 3  # pictures that come before the claims; the rest follow them
_CLAIM_KEYS = ("id", "statement", "paper", "target", "measured", "mean", "std", "holds", "tier", "seconds",
               "peak_memory_bytes", "hardware", "versions", "commit")  # fmt: skip
_ROW_KEYS = ("name", "ours", "peer", "unit", "ratio", "target", "holds", "hardware", "commit")


@dataclass
class Findings:
    """What results/ holds about one paper (or about one shared benchmark)."""

    claims: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[tuple[Path, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.claims or self.rows or self.figures)

    def by_id(self) -> dict[str, list[dict[str, Any]]]:
        """The records of each claim, the most thorough tier first."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for claim in sorted(self.claims, key=lambda c: -TIERS.index(c["tier"])):
            grouped.setdefault(claim["id"], []).append(claim)
        order = list(dict.fromkeys(claim["id"] for claim in self.claims))
        return {claim_id: grouped[claim_id] for claim_id in order}


def load(results: Path) -> dict[str, Findings]:
    """Everything under `results`, keyed by the name in the file name; a malformed file is a UserError naming it."""
    if not results.is_dir():
        raise UserError(f"results folder {results} does not exist; run a paper's reproduce.py or pass --results")
    found: dict[str, Findings] = {}
    for path in sorted(results.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path.name} cannot be read as JSON: {error}") from None
        if path.stem.startswith("bench_"):
            rows = _entries(path, content, "rows", _ROW_KEYS)
            found.setdefault(path.stem.removeprefix("bench_"), Findings()).rows = rows
        elif isinstance(content, dict) and "claims" in content:
            claims = _entries(path, content, "claims", _CLAIM_KEYS)
            for claim in claims:
                if claim["tier"] not in TIERS:
                    raise UserError(f"{path.name}: claim {claim['id']} has tier {claim['tier']!r}, not one of {TIERS}")
            found.setdefault(path.stem, Findings()).claims = claims
        elif not path.with_name(f"bench_{path.name}").is_file():  # else: the measurements behind those rows
            print(f"left out {path.name}: it holds neither claims nor bench rows")
    for folder in sorted(path for path in results.glob("figures/*") if path.is_dir()):
        pictures = _figures(folder)
        if pictures:
            found.setdefault(folder.name, Findings()).figures = pictures
    return found


def _entries(path: Path, content: Any, key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{path.name}: expected {{"{key}": [...]}} at the top')
    for position, entry in enumerate(entries, start=1):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise UserError(f'{path.name}: entry {position} of "{key}" lacks "{missing[0]}"')
    return entries


def _figures(folder: Path) -> list[tuple[Path, str]]:
    captions: dict[str, str] = {}
    listing = folder / "captions.json"
    if listing.exists():
        try:
            captions = json.loads(listing.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{folder.name}/captions.json cannot be read as JSON: {error}") from None
        if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
            raise UserError(f'{folder.name}/captions.json: expected {{"file name": "caption"}}')
        absent = [name for name in captions if not (folder / name).exists()]
        if absent:
            raise UserError(f"{folder.name}/captions.json names {absent[0]}, which is not in that folder")
    pictures = [path for path in folder.iterdir() if path.suffix in IMAGE_TYPES]
    order = list(captions)  # captions.json also decides the order
    pictures.sort(key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
    return [(path, captions.get(path.name, re.sub(r"[_-]+", " ", path.stem))) for path in pictures]


def build(results: Path, output: Path, rooms: Path = REPOSITORY) -> Path:
    """Write the page to `output` (atomically) and return it. `rooms`: where the papers' folders are."""
    found = load(results)
    known = {paper.key for paper in all_papers()}
    measured_first = sorted(all_papers(), key=lambda paper: not found.get(paper.key))
    shared = {key: findings for key, findings in found.items() if key not in known}
    sections = [_paper_section(paper, found[paper.key]) for paper in all_papers() if found.get(paper.key)]
    if shared:
        sections.append(_shared_section(shared))
    page = Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        style=(ASSETS / "style.css").read_text(encoding="utf-8"),
        script=(ASSETS / "script.js").read_text(encoding="utf-8"),
        summary=_summary(found),
        rows="\n".join(_front_row(paper, found.get(paper.key, Findings()), rooms) for paper in measured_first),
        sections="\n".join(sections),
    )
    write_atomically(output, partial(Path.write_text, data=page, encoding="utf-8"))
    return output


def _summary(found: Mapping[str, Findings]) -> str:
    measured = sum(1 for paper in all_papers() if found.get(paper.key))
    best = [records[0] for findings in found.values() for records in findings.by_id().values()]
    holding = sum(1 for claim in best if claim["holds"])
    barred = [row for findings in found.values() for row in findings.rows if row["holds"] is not None]
    won = sum(1 for row in barred if row["holds"])
    tiles = [
        (f"{measured}<small>/{len(all_papers())}</small>", "papers measured"),
        (str(holding), "claims hold here"),
        (str(len(best) - holding), "do not hold"),
        (f"{won}<small>/{len(barred)}</small>", "speed and memory targets met"),
    ]
    return "".join(f'<div><dt>{text}</dt><dd class="figure">{value}</dd></div>' for value, text in tiles)


def _front_row(paper: Paper, findings: Findings, rooms: Path) -> str:
    title = escape(paper.title)
    if findings:
        title = f'<a href="#{paper.key}">{title}</a>'
        outcome = _outcome(findings)
    elif (rooms / paper.key / "model.py").exists():
        outcome = '<span class="quiet">built, not yet measured</span>'
    else:
        outcome = '<span class="quiet">not built yet</span>'
    state = "" if findings else ' class="waiting"'
    arxiv = f'<a class="plain" href="https://arxiv.org/abs/{paper.arxiv}">arXiv {paper.arxiv}</a>'
    venue = "" if paper.venue.startswith("arXiv") else f"{escape(paper.venue)} · "
    return (
        f'<tr{state}><th scope="row"><span class="title">{title}</span>'
        f'<span class="meta"><code>{paper.key}</code> · {venue}{arxiv}</span></th>'
        f'<td class="idea">{escape(paper.idea)}</td><td class="outcome">{outcome}</td></tr>'
    )


def _outcome(findings: Findings) -> str:
    records = [group[0] for group in findings.by_id().values()]
    if not records:
        return '<span class="quiet">benchmarks only</span>' if findings.rows else '<span class="quiet">figures</span>'
    holding = sum(1 for claim in records if claim["holds"])
    pips = "".join(
        f'<span class="pip {"yes" if claim["holds"] else "no"}" title="{escape(claim["id"])}: {_verdict(claim)}">'
        f"{'✓' if claim['holds'] else '✕'}</span>"
        for claim in records
    )
    noun = "claim holds" if len(records) == 1 else "claims hold"
    return f'<span class="pips" aria-hidden="true">{pips}</span>{holding} of {len(records)} {noun}'


def _verdict(entry: Mapping[str, Any]) -> str:
    return "holds" if entry["holds"] else "does not hold"


def _badge(passed: bool, verdict: str) -> str:
    sign, kind = ("✓", "yes") if passed else ("✕", "no")
    return f'<span class="badge {kind}"><span aria-hidden="true">{sign}</span> {verdict}</span>'


def _paper_section(paper: Paper, findings: Findings) -> str:
    return (
        f'<section class="paper" id="{paper.key}" aria-labelledby="{paper.key}-title">'
        f'<p class="eyebrow"><code>{paper.key}</code> · {escape(paper.venue)}</p>'
        f'<h2 id="{paper.key}-title">{escape(paper.title)}</h2><p class="lede">{escape(paper.idea)}</p>'
        f'{_body(findings)}<p class="up"><a href="#papers">↑ all papers</a></p></section>'
    )


def _shared_section(shared: Mapping[str, Findings]) -> str:
    parts = "".join(
        f'<h3 class="shared">{escape(key.replace("_", " ").capitalize())}</h3>{_body(findings)}'
        for key, findings in shared.items()
    )
    return (
        '<section class="paper" id="shared" aria-labelledby="shared-title"><p class="eyebrow">across papers</p>'
        f'<h2 id="shared-title">Shared parts and comparisons</h2>{parts}'
        '<p class="up"><a href="#papers">↑ all papers</a></p></section>'
    )


def _body(findings: Findings) -> str:
    claims = "".join(_claim_card(records) for records in findings.by_id().values())
    lead, others = findings.figures[:FIGURES_AHEAD], findings.figures[FIGURES_AHEAD:]
    parts = [_gallery(lead) if lead else "", f'<div class="claims">{claims}</div>' if claims else ""]
    if others:
        parts.append(_gallery(others))
    if findings.rows:
        parts.append(_bench(findings.rows))
    return "".join(parts)


def _claim_card(records: Sequence[Mapping[str, Any]]) -> str:
    best, *others = records
    paper = best["paper"]
    value = number(paper["value"]) if isinstance(paper["value"], int | float) else str(paper["value"])
    rest = "".join(
        f"<details><summary>Also at the {escape(other['tier'])} tier: {_verdict(other)}</summary>"
        f"{_measurement(other)}</details>"
        for other in others
    )
    return (
        f'<article class="claim"><header><span class="id">{escape(best["id"])}</span>'
        f"{_badge(best['holds'], _verdict(best))}</header>"
        f"<h3>{escape(best['statement'])}</h3>"
        f'<dl class="pair"><div><dt>The paper</dt><dd>{escape(value)} <cite>{escape(paper["source"])}</cite></dd></div>'
        f"<div><dt>Target here</dt><dd>{escape(str(best['target']['text']))}</dd></div></dl>"
        f"{_measurement(best)}{rest}</article>"
    )


def measurements(claim: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], float | None, str]]:
    """The headline's condition, then the further ones, each with the mean over seeds and what to say of it."""
    target, several = claim["target"], len(claim["measured"]) > 1
    headline = {"metric": target["metric"], "op": target["op"], "target": target["value"]}
    found: list[tuple[dict[str, Any], float | None, float | None]] = [(headline, claim["mean"], claim["std"])]
    for condition in target["conditions"]:
        values = [row.get(condition["metric"]) for row in claim["measured"]]
        whole = None not in values
        std = statistics.stdev(values) if whole and several else None
        found.append((condition, statistics.fmean(values) if whole else None, std))
    return [(condition, mean, spread(mean, std) if several else number(mean)) for condition, mean, std in found]


def _measurement(claim: Mapping[str, Any]) -> str:
    seeds, plots = claim["measured"], []
    for condition, mean, text in measurements(claim):
        metric = condition["metric"]
        plot = seed_plot(metric, [row.get(metric) for row in seeds], condition["op"], condition["target"], mean)
        plots.append(
            f'<figure class="plot"><figcaption><span class="metric">{escape(in_words(metric))}</span> '
            f"<b>{text}</b></figcaption>{plot}</figure>"
        )
    count = f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
    facts = " · ".join([f"{escape(claim['tier'])} tier", count, _duration(claim["seconds"]), escape(claim["hardware"])])
    return f'{"".join(plots)}<p class="facts">{facts}</p>{_numbers(claim)}'


def _numbers(claim: Mapping[str, Any]) -> str:
    metrics = list(dict.fromkeys(key for row in claim["measured"] for key in row if key != "seed"))
    head = "".join(f'<th scope="col">{escape(in_words(metric))}</th>' for metric in metrics)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row["seed"]))}</th>'
        + "".join(f"<td>{number(row[m]) if m in row else ''}</td>" for m in metrics)
        + "</tr>"
        for row in claim["measured"]
    )
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in claim["versions"].items())
    return (
        "<details><summary>Numbers and provenance</summary>"
        '<div class="scroll" tabindex="0"><table class="numbers">'
        f'<thead><tr><th scope="col">seed</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="facts">Peak memory {_bytes(claim["peak_memory_bytes"])} · '
        f"commit <code>{escape(claim['commit'])}</code> · {versions}</p></details>"
    )


def _bench(rows: Sequence[Mapping[str, Any]]) -> str:
    widest = max(max(row["ratio"], 1 / row["ratio"], row["target"] or 1) for row in rows)
    barred = [row for row in rows if row["holds"] is not None]
    met = f"{sum(row['holds'] for row in barred)} of {len(barred)} targets met" if barred else "no targets set"
    median = number(statistics.median(row["ratio"] for row in rows), 3)
    machines = "; ".join(dict.fromkeys(escape(row["hardware"]) for row in rows))
    commits = ", ".join(dict.fromkeys(f"<code>{escape(row['commit'])}</code>" for row in rows))
    body = "".join(_bench_row(row, widest, several="; " in machines) for row in rows)
    table = (
        '<div class="scroll" tabindex="0"><table class="bench"><thead><tr><th scope="col">Measured</th>'
        '<th scope="col" class="num">ours</th><th scope="col" class="num">peer</th>'
        '<th scope="col">worse ← 1 → better</th><th scope="col" class="num">ratio</th>'
        '<th scope="col" class="num">target</th><th scope="col"></th>'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )
    if len(rows) > ROWS_SHOWN:
        table = f"<details><summary>Show all {len(rows)} rows</summary>{table}</details>"
    return (
        f'<div class="benches"><h3>Side by side</h3><p class="facts">{met} · median ratio {median} · {machines} · '
        f"commit {commits}</p>{table}</div>"
    )


def _bench_row(row: Mapping[str, Any], widest: float, several: bool) -> str:
    unit = f' <span class="unit">{escape(row["unit"])}</span>'
    target = "" if row["target"] is None else f"≥ {number(row['target'], 3)}×"
    machine = f'<span class="meta">{escape(row["hardware"])}</span>' if several else ""
    badge = '<span class="quiet">no target</span>'
    if row["holds"] is not None:
        badge = _badge(row["holds"], "met" if row["holds"] else "not met")
    return (
        f'<tr><th scope="row">{escape(row["name"])}{machine}</th><td class="num">{number(row["ours"])}{unit}</td>'
        f'<td class="num">{number(row["peer"])}{unit}</td><td>{ratio_plot(row["ratio"], row["target"], widest)}</td>'
        f'<td class="num"><b>{number(row["ratio"], 3)}×</b></td><td class="num">{target}</td><td>{badge}</td></tr>'
    )


def _gallery(figures: Sequence[tuple[Path, str]]) -> str:
    items = "".join(
        f'<figure><button type="button" class="zoom" aria-label="Enlarge: {escape(caption)}">'
        f'<img src="{_data_uri(path)}" alt="{escape(caption)}"></button>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for path, caption in figures
    )
    return f'<div class="gallery">{items}</div>'


def _data_uri(path: Path) -> str:
    return f"data:{IMAGE_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def in_words(metric: str) -> str:
    return metric.replace("_", " ")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON files and figures/")
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "report" / "site" / "index.html", help="page to write"
    )
    arguments = parser.parse_args()
    page = build(arguments.results, arguments.output)
    print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_main(main)
