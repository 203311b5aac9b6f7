"""One static web page from everything that was measured.

    python -m report.build                          # results/ -> report/site/index.html
    python -m report.build --results DIR --output FILE

Reads results/<paper>.json (claims), results/bench_<name>.json (side-by-side rows), results/<name>.json of a comparison
of methods, and the pictures under results/figures/ that have a caption in their folder's captions.json ({"file name":
"caption"}); pages of their own under results/pages/ are linked in the same way. What a missed claim came to and what
its numbers are called stands in the paper's claims.yaml, which pictures come first in its paper.yaml. Pictures lie
beside the page and are asked for when they come into view; styles and script are inside. It asks nothing of the network
and opens from the file system.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.files import write_atomically
from common.ledger import TIERS, read_claims, read_notes, verdict, within_noise
from common.paths import REPOSITORY, RESULTS, WORKPLACE
from report.papers import Paper, all_papers
from report.pictures import Album, Picture, read_pictures, strongest_first, with_code
from report.plots import number, rung_plot, seed_plot
from report.side_by_side import bench_section, comparison_tables
from report.words import (
    SIGNS,
    Measured,
    commits,
    conditions,
    few_images,
    in_words,
    time_taken,
)

ASSETS = Path(__file__).parent
ARROWS = {">=": "↑", ">": "↑", "<=": "↓", "<": "↓"}
_CLAIM_KEYS = ("id", "statement", "paper", "target", "measured", "mean", "std", "holds", "tier", "seconds",
               "peak_memory_bytes", "hardware", "versions", "commit")  # fmt: skip
_ROW_KEYS = ("name", "ours", "peer", "unit", "ratio", "target", "holds", "hardware", "commit")


@dataclass
class Findings:
    """What results/ holds about one paper (or about one shared benchmark)."""

    claims: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)
    pages: list[Picture] = field(default_factory=list)  # of their own, which this page links

    def __bool__(self) -> bool:
        return bool(self.claims or self.rows or self.pictures or self.comparison or self.pages)

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
        elif isinstance(content, dict) and {"summary", "settings"} <= set(content):
            found.setdefault(path.stem, Findings()).comparison = content
        elif isinstance(content, dict) and "records" in content:  # benchmarks/PROFILE.md shows them
            continue
        elif not path.with_name(f"bench_{path.name}").is_file():  # else: the measurements behind those rows
            print(f"left out {path.name}: it holds neither claims nor bench rows")
    for folder in sorted(path for path in results.glob("figures/*") if path.is_dir()):
        if pictures := read_pictures(folder):
            found.setdefault(folder.name, Findings()).pictures = pictures
    for folder in sorted(path for path in results.glob("pages/*") if path.is_dir()):
        if pages := read_pictures(folder, (".html",)):
            found.setdefault(folder.name, Findings()).pages = pages
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


@dataclass
class Room:
    """A paper's folder as the page needs it: links to its files, and what its claims.yaml says for readers."""

    key: str
    folder: Path
    page: Path
    outcomes: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, key: str, rooms: Path, page: Path) -> Room:
        """From `rooms`/`key`; a room that is not there has nothing to say."""
        file = rooms / key / "claims.yaml"
        if not file.is_file():
            return cls(key, rooms / key, page)
        claims = read_claims(file, "small")
        images = {name: claim.sizes.get("images") for name, claim in claims.items()}
        notes = {name: claim.note for name, claim in claims.items()}
        return cls(key, rooms / key, page, *read_notes(file), images, notes)

    def link(self, name: str, text: str) -> str:
        """A link to one of its files, empty if there is none."""
        path = self.folder / name
        if not path.exists():
            return ""
        return f'<a href="{Path(os.path.relpath(path, self.page.parent)).as_posix()}">{escape(text)}</a>'

    def metric(self, claim: str, name: str) -> str:
        """What a metric of a claim is called."""
        return self.words.get(claim, {}).get(name, in_words(name))


def build(results: Path, output: Path, rooms: Path = REPOSITORY) -> Path:
    """Write the page to `output` (atomically), its pictures beside it, and return it.

    Args:
        rooms: where the papers' folders are.
    """
    found = load(results)
    album, shelf = Album(output.parent / "figures"), Album(output.parent / "pages")
    measured = [paper for paper in all_papers() if found.get(paper.key)]
    known = {paper.key for paper in all_papers()}
    shared = {key: findings for key, findings in found.items() if key not in known}
    front = read_pictures(results / "figures") if (results / "figures").is_dir() else []
    opening = album.gallery(front) if front else ""
    sections = [
        _paper_section(paper, found[paper.key], album, shelf, Room.open(paper.key, rooms, output)) for paper in measured
    ]
    if shared:
        sections.append(_shared_section(shared, album, rooms, output))
    links = [(paper.key, paper.key) for paper in measured] + ([("shared", "across papers")] if shared else [])
    page = Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        style=(ASSETS / "style.css").read_text(encoding="utf-8"),
        script=(ASSETS / "script.js").read_text(encoding="utf-8"),
        summary=_summary(found),
        opening=opening,
        contents="".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links),
        rows="\n".join(
            _front_row(paper, found.get(paper.key, Findings()), rooms)
            for paper in sorted(all_papers(), key=lambda paper: not found.get(paper.key))
        ),
        sections="\n".join(sections),
    )
    write_atomically(output, partial(Path.write_text, data=page, encoding="utf-8"))
    album.tidy()
    shelf.tidy()
    return output


def _summary(found: Mapping[str, Findings]) -> str:
    measured = sum(1 for paper in all_papers() if paper.key in found and found[paper.key].by_id())
    best = [records[0] for findings in found.values() for records in findings.by_id().values()]
    holding = [claim for claim in best if claim["holds"]]
    noisy = [sum(map(within_noise, group)) for group in (holding, [c for c in best if not c["holds"]])]
    barred = [row for findings in found.values() for row in findings.rows if row["holds"] is not None]
    won = sum(1 for row in barred if row["holds"])
    tiles = [
        (f"{measured}<small>/{len(all_papers())}</small>", "papers measured"),
        (str(len(holding)), f"claims hold here ({noisy[0]} within noise)"),
        (str(len(best) - len(holding)), f"do not hold ({noisy[1]} within noise)"),
        (f"{won}<small>/{len(barred)}</small>", "speed and memory targets met"),
    ]
    return "".join(f'<div><dt>{text}</dt><dd class="figure">{value}</dd></div>' for value, text in tiles)


def _front_row(paper: Paper, findings: Findings, rooms: Path) -> str:
    title = escape(paper.title)
    if findings:
        title = f'<a href="#{paper.key}">{title}</a>'
        outcome = _outcome(findings, rooms / paper.key)
    elif (rooms / paper.key / "model.py").exists():
        outcome = '<span class="quiet">built, not yet measured</span>'
    else:
        outcome = '<span class="quiet">not built yet</span>'
    state = "" if findings else ' class="waiting"'
    venue = "" if paper.venue.startswith("arXiv") else f"{escape(paper.venue)} · "
    return (
        f'<tr{state}><th scope="row"><span class="title">{title}</span>'
        f'<span class="meta"><code>{paper.key}</code> · {venue}{_arxiv(paper)}</span></th>'
        f'<td class="idea">{escape(paper.idea)}</td><td class="outcome">{outcome}</td></tr>'
    )


def _arxiv(paper: Paper) -> str:
    return f'<a class="plain" href="https://arxiv.org/abs/{paper.arxiv}">arXiv {paper.arxiv}</a>'


def waiting(findings: Findings, room: Path) -> str:
    """How many of the claims in a paper's folder nobody has measured, as the end of a sentence; nothing where none."""
    file = room / "claims.yaml"
    left = read_claims(file, "small").keys() - findings.by_id().keys() if file.is_file() else ()
    return f", {len(left)} not measured yet" if left else ""


def _outcome(findings: Findings, room: Path) -> str:
    records = [group[0] for group in findings.by_id().values()]
    if not records:
        return '<span class="quiet">benchmarks only</span>' if findings.rows else '<span class="quiet">figures</span>'
    holding = sum(1 for claim in records if claim["holds"])
    pips = "".join(
        f'<span class="pip {"yes" if claim["holds"] else "no"}" title="{escape(claim["id"])}: {verdict(claim).text}">'
        f"{'✓' if claim['holds'] else '✕'}</span>"
        for claim in records
    )
    told = f"{holding} of {len(records)} {'claim holds' if len(records) == 1 else 'claims hold'}"
    return f'<span class="pips" aria-hidden="true">{pips}</span>{told}{waiting(findings, room)}'


def _paper_section(paper: Paper, findings: Findings, album: Album, shelf: Album, room: Room) -> str:
    files = [("README.md", "README"), ("", "code"), ("claims.yaml", "claims"), ("configs", "settings")]
    links = " · ".join(filter(None, [_arxiv(paper), *(room.link(name, text) for name, text in files)]))
    verbs = [("train", paper.start)]
    verbs += [("reproduce", "measures the claims below")] if findings.claims else []
    verbs += [("bench", "measures speed and memory")] if findings.rows else []
    commands = "".join(f"<li><code>make {paper.key}-{verb}</code> {escape(text)}</li>" for verb, text in verbs if text)
    return (
        f'<section class="paper" id="{paper.key}" aria-labelledby="{paper.key}-title">'
        f'<p class="eyebrow"><code>{paper.key}</code> · {escape(paper.venue)} · {links}</p>'
        f'<h2 id="{paper.key}-title">{escape(paper.title)}</h2><p class="lede">{escape(paper.idea)}</p>'
        f'<ul class="commands">{commands}</ul>{_pages(findings.pages, shelf)}'
        f"{_body(findings, album, room, paper.pictures)}"
        '<p class="up"><a href="#papers">↑ all papers</a></p></section>'
    )


def _pages(pages: Sequence[Picture], shelf: Album) -> str:
    """Links to pages of their own, which are copied beside this one."""
    links = "".join(f'<li><a href="{shelf.keep(page)}">{with_code(page.caption)}</a></li>' for page in pages)
    return f'<ul class="pages">{links}</ul>' if links else ""


def _shared_section(shared: Mapping[str, Findings], album: Album, rooms: Path, page: Path) -> str:
    parts = []
    for key, findings in shared.items():
        room = Room(key, rooms / "benchmarks" / key, page)
        readme = room.link("README.md", "README")
        link = f'<p class="eyebrow">{readme} · <code>python -m benchmarks.{escape(key)}</code></p>' if readme else ""
        title = escape(key.replace("_", " ").capitalize())
        parts.append(f'<h3 class="shared">{title}</h3>{link}{_body(findings, album, room)}')
    return (
        '<section class="paper" id="shared" aria-labelledby="shared-title"><p class="eyebrow">across papers</p>'
        f'<h2 id="shared-title">Shared parts and comparisons</h2>{"".join(parts)}'
        '<p class="up"><a href="#papers">↑ all papers</a></p></section>'
    )


def _body(findings: Findings, album: Album, room: Room, strongest: Sequence[str] = ()) -> str:
    lead, others = strongest_first(findings.pictures, strongest)
    claims = "".join(_claim_card(records, room) for records in findings.by_id().values())
    parts = [album.gallery(lead) if lead else "", comparison_tables(findings.comparison)]
    if claims:
        parts.append(f'<h3 class="part">Claims</h3><div class="claims">{claims}</div>')
    if findings.rows:
        parts.append(bench_section(findings.rows))
    if others:
        told = (
            f"{len(others)} more picture{'s' * (len(others) > 1)}: plots, and what arms drew after minutes of training"
        )
        parts.append(f'<details class="more"><summary>{told}</summary>{album.gallery(others)}</details>')
    return "".join(parts)


def _badge(passed: bool, text: str) -> str:
    sign, kind = ("✓", "yes") if passed else ("✕", "no")
    return f'<span class="badge {kind}"><span aria-hidden="true">{sign}</span> {text}</span>'


def _claim_card(records: Sequence[Mapping[str, Any]], room: Room) -> str:
    best, *others = records
    paper = best["paper"]
    value = number(paper["value"]) if isinstance(paper["value"], int | float) else str(paper["value"])
    rest = "".join(
        f"<details><summary>Also at the {escape(other['tier'])} tier: {verdict(other).text}</summary>"
        f"{_measurement(other, room)}</details>"
        for other in others
    )
    said, texts = verdict(best), []
    if outcome := room.outcomes.get(best["id"], ""):
        texts.append(("What came out" if best["holds"] else "Why it missed, and what was tried", outcome))
    if note := room.notes.get(best["id"], ""):
        texts.append(("Its budget", note))
    outcome = "".join(f'<p class="why"><b>{heading}.</b> {with_code(text)}</p>' for heading, text in texts)
    return (
        f'<article class="claim" id="{room.key}-{escape(best["id"])}">'
        f'<header><span class="id">{escape(best["id"])}</span>{_badge(said.rungs[-1][1], said.text)}</header>'
        f"<h3>{escape(best['statement'])}</h3>"
        f'<dl class="pair"><div><dt>The paper</dt><dd>{escape(value)} <cite>{escape(paper["source"])}</cite></dd></div>'
        f"<div><dt>Target here</dt><dd>{escape(str(best['target']['text']))}</dd></div></dl>"
        f"{_measurement(best, room, outcome)}{rest}</article>"
    )


def _measurement(claim: Mapping[str, Any], room: Room, outcome: str = "") -> str:
    """The headline's seeds as a plot, further conditions a line each; budgets and machines where there are several.

    Args:
        outcome: HTML that says what came of it.
    """
    headline, *further = conditions(claim)
    values = [row.get(headline.metric) for row in claim["measured"]]
    name = room.metric(claim["id"], headline.metric)
    plot = seed_plot(name, values, headline.op, headline.bar, headline.mean)
    parts = [
        f'<figure class="plot"><figcaption>{_sign(headline)}<span class="metric">{escape(name)}'
        f"\u00a0{ARROWS[headline.op]}</span> <b>{headline.text}</b></figcaption>{plot}</figure>"
    ]
    if further:
        lines = "".join(_condition(one, room.metric(claim["id"], one.metric), len(values)) for one in further)
        parts.append(f'<ul class="conditions">{lines}</ul>')
    shared = {key: claim[key] for key in ("id", "statement", "paper", "target", "tier")}
    own = {key: value for key, value in claim.items() if key not in ("rungs", "machines")}
    climbed = [own, *({**shared, **entry} for entry in claim.get("rungs", ()))]
    if len(climbed) > 1:
        parts.append(_ladder(climbed, headline, name))
    parts.append(outcome)
    facts = [f"{escape(claim['tier'])} tier", _seeds(claim), time_taken(claim), escape(claim["hardware"])]
    if warning := few_images(claim, room.images.get(claim["id"])):
        facts.append(warning)
    parts.append(f'<p class="facts">{" · ".join(facts)}</p>')
    for machine in claim.get("machines", ()):
        other = {**shared, **machine}
        text = f"{escape(other['hardware'])}: {conditions(other)[0].text}, {verdict(other).text}"
        parts.append(f'<p class="facts">Also measured on {text}</p>')
    return "".join(parts) + _numbers(climbed, room)


def _condition(one: Measured, name: str, seeds: int) -> str:
    sign = _sign(one)
    if one.yes is not None:
        return f'<li>{sign}<span class="metric">{escape(name)}</span> <b>in {one.yes} of {seeds} seeds</b></li>'
    bar = f'<span class="quiet">{escape(SIGNS.get(one.op, one.op))} {number(one.bar)}</span>'
    shown = f'<span class="value"><b>{one.text}</b> {bar}</span>'
    return f'<li>{sign}<span class="metric">{escape(name)}\u00a0{ARROWS[one.op]}</span> {shown}</li>'


def _sign(one: Measured) -> str:
    told, sign, kind = ("met", "✓", "yes") if one.met else ("missed", "✕", "no")
    return f'<span class="pip {kind}" role="img" aria-label="{told}">{sign}</span>'


def _ladder(climbed: Sequence[Mapping[str, Any]], headline: Measured, name: str) -> str:
    """The metric against the budget, the target as a line."""
    points = [
        (entry.get("rung", 1), [row.get(headline.metric) for row in entry["measured"]], conditions(entry)[0].mean)
        for entry in climbed
    ]
    words = ", ".join(f"{entry.get('rung', 1)}x {_alone(entry)}" for entry in climbed)
    plot = rung_plot(name, points, headline.op, headline.bar)
    return f'<figure class="plot"><figcaption>At multiples of the budget: {words}</figcaption>{plot}</figure>'


def _alone(entry: Mapping[str, Any]) -> str:
    """The verdict of one rung."""
    word = "holds" if entry["holds"] else "does not hold"
    return f"{word} (within noise)" if within_noise(entry) else word


def _seeds(claim: Mapping[str, Any]) -> str:
    count = len(claim["measured"])
    return f"{count} seed{'s' if count != 1 else ''}"


def _numbers(records: Sequence[Mapping[str, Any]], room: Room) -> str:
    """Everything that was measured, one row a seed, and where it came from."""
    claim = records[0]
    rows = [(entry.get("rung", 1), row) for entry in records for row in entry["measured"]]
    metrics = list(dict.fromkeys(key for _, row in rows for key in row if key != "seed"))
    head = "".join(f'<th scope="col">{escape(room.metric(claim["id"], metric))}</th>' for metric in metrics)
    body = "".join(
        f'<tr><th scope="row">{row["seed"]}{f" ({rung}x budget)" if len(records) > 1 else ""}</th>'
        + "".join(f"<td>{number(row[m]) if m in row else ''}</td>" for m in metrics)
        + "</tr>"
        for rung, row in rows
    )
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in claim["versions"].items())
    made = f'make {room.key}-reproduce ARGS="--claims {claim["id"]}"'
    code = room.link("reproduce.py", f"{room.key}/reproduce.py")
    where = f" · measured by <code>{escape(claim['id'].lower())}</code> in {code}" if code else ""
    return (
        "<details><summary>Numbers and provenance</summary>"
        f'<p class="facts"><code>{escape(made)}</code>{where}</p>'
        '<div class="scroll" tabindex="0"><table class="numbers">'
        f'<thead><tr><th scope="col">seed</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="facts">Peak memory {_bytes(claim["peak_memory_bytes"])} · '
        f"commit {_joined(commits(records))} · {versions}</p></details>"
    )


def _joined(names: Iterable[str]) -> str:
    return ", ".join(escape(name) for name in names)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON files and figures/")
    parser.add_argument(
        "--output", type=Path, default=WORKPLACE / "report" / "site" / "index.html", help="page to write"
    )
    arguments = parser.parse_args()
    page = build(arguments.results, arguments.output)
    print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_main(main)
