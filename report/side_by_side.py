"""Tables of the page: ours beside the peers, and methods beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from report.plots import number, ratio_plot, spread
from report.words import commits
from report.workloads import Workload, workloads

Row = Mapping[str, Any]
SHOWN = {
    "fd_data": ("Frechet distance to held-out data, lower is better", "lowest"),
    "accuracy": ("share of prompts that the verifier finds in the picture, higher is better", "highest"),
}


def bench_section(rows: Sequence[Row]) -> str:
    """One row a workload and machine (machines named once above); every single row folded below."""
    machines = {name: chr(ord("A") + place) for place, name in enumerate(dict.fromkeys(r["hardware"] for r in rows))}
    several = len(machines) > 1
    barred = [row for row in rows if row["holds"] is not None]
    met = f"{sum(row['holds'] for row in barred)} of {len(barred)} targets met" if barred else "no targets set"
    named = "; ".join(f"{letter}: {escape(name)}" if several else escape(name) for name, letter in machines.items())
    found: dict[str, list[tuple[str, Workload]]] = {}
    for name, letter in machines.items():
        for workload in workloads(row for row in rows if row["hardware"] == name):
            found.setdefault(workload.name, []).append((letter, workload))
    # The same scale for all bars of the table.
    widest = max(max(row["ratio"], 1 / row["ratio"], row["target"] or 1) for row in rows)
    memory = any(workload.memory for group in found.values() for _, workload in group)
    body = "".join(_workload(name, group, several, memory, widest) for name, group in found.items())
    head = ["Workload", *(["Machine"] if several else []), "ours", "peer as users run it", "worse ← 1 → better", ""]
    head += ["peer at its best", ""] + (["memory, ours / peer"] if memory else [])
    return (
        f'<h3 class="part">Side by side</h3><p class="facts">Measured on {named}. {met}; a ratio above 1 is better for '
        f"us. Commit {', '.join(map(escape, commits(rows)))}.</p>{_table('bench', head, body)}"
        f"<details><summary>Every row ({len(rows)})</summary>{_every_row(rows, machines)}</details>"
    )


def _workload(name: str, group: Sequence[tuple[str, Workload]], several: bool, memory: bool, widest: float) -> str:
    lines = []
    for place, (letter, workload) in enumerate(group):
        first, best = workload.rows[0], workload.rows[workload.best()]
        unit = f' <span class="unit">{escape(first["unit"])}</span>'
        cells = [f'<th scope="rowgroup" rowspan="{len(group)}">{escape(name)}</th>'] if place == 0 else []
        cells += [f"<td>{letter}</td>"] if several else []
        peer = _sides(workload.sides[0]) if len(workload.rows) > 1 and workload.sides[0].startswith("against") else ""
        cells.append(f'<td class="num">{number(first["ours"])}{unit}</td>')
        cells.append(f'<td class="num">{number(first["peer"])}{unit}{peer}</td>')
        cells.append(
            f'<td>{ratio_plot(first["ratio"], first["target"], widest)}</td><td class="num">{_ratio(first)}</td>'
        )
        if best is first:
            same = "the same" if len(workload.rows) > 1 else "-"
            cells.append(f'<td class="num quiet" colspan="2">{same}</td>')
        else:
            sides = _sides(workload.sides[workload.best()])
            cells.append(f'<td class="num">{workload.pair()}{unit}{sides}</td><td class="num">{_ratio(best)}</td>')
        if memory:
            cells.append(f'<td class="num">{_memory(workload)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(lines)


def _sides(text: str) -> str:
    return f'<span class="meta">{escape(text)}</span>'


def _ratio(row: Row) -> str:
    text = f"<b>{number(row['ratio'], 3)}×</b>"
    if row["target"] is None:
        return text
    return f'{text} <span class="{"met" if row["holds"] else "missed"}">≥ {number(row["target"], 3)}×</span>'


def _memory(workload: Workload) -> str:
    if workload.memory is None:
        return ""
    row = min(workload.memory.rows, key=lambda row: row["ratio"])
    numbers = f"{number(row['ours'], 3)} / {number(row['peer'], 3)}"
    return f'{numbers} <span class="unit">{escape(row["unit"])}</span><span class="meta">{_ratio(row)}</span>'


def _every_row(rows: Sequence[Row], machines: Mapping[str, str]) -> str:
    several = len(machines) > 1
    body = "".join(
        f'<tr><th scope="row">{escape(row["name"])}</th>'
        + (f"<td>{machines[row['hardware']]}</td>" if several else "")
        + f'<td class="num">{number(row["ours"])}</td><td class="num">{number(row["peer"])}</td>'
        f'<td>{escape(row["unit"])}</td><td class="num">{_ratio(row)}</td></tr>'
        for row in rows
    )
    return _table("rows", ["Measured", *(["Machine"] if several else []), "ours", "peer", "unit", "ratio"], body)


def comparison_tables(content: Mapping[str, Any]) -> str:
    """Methods x steps of every budget, from what a comparison of methods wrote; empty without one."""
    parts = []
    for budget, setting in content.get("settings", {}).items():
        rows = [row for row in content["summary"] if row["budget"] == budget]
        for metric, (words, which) in SHOWN.items():
            if any(metric in row["metrics"] for row in rows):
                caption = (
                    f"Budget {budget} ({setting['forward_equivalents']:,} forward-equivalents): {words}; "
                    f"{setting['images']:,} images, mean ± standard deviation over seeds, a column's {which} in bold."
                )
                parts.append(f'<p class="facts">{escape(caption)}</p>{_methods(rows, metric, which)}')
    return "".join(parts)


def _methods(rows: Sequence[Row], metric: str, which: str) -> str:
    columns = sorted({row["steps"] for row in rows})
    values = {(row["title"], row["steps"]): row for row in rows if metric in row["metrics"]}
    means = {place: row["metrics"][metric]["mean"] for place, row in values.items()}
    pick = min if which == "lowest" else max
    best = {
        n: pick((m for (_, steps), m in means.items() if steps == n and m is not None), default=None) for n in columns
    }

    def cell(title: str, steps: int) -> str:
        row = values.get((title, steps))
        if row is None:
            return "<td></td>"
        mean, std = means[title, steps], row["metrics"][metric]["std"]
        text = "diverged" if mean is None else spread(mean, std) if row["seeds"] > 1 else number(mean)
        return f'<td class="num">{f"<b>{text}</b>" if mean is not None and mean == best[steps] else text}</td>'

    body = ""
    for title in dict.fromkeys(row["title"] for row in rows):
        cost = next(row["training_forwards"] for row in rows if row["title"] == title)
        cells = "".join(cell(title, steps) for steps in columns)
        trained = f"{number(cost)}" if cost else '<span class="quiet">none</span>'
        body += f'<tr><th scope="row">{escape(title)}</th>{cells}<td class="num">{trained}</td></tr>'
    steps = [f"{n} step{'s' * (n > 1)}" for n in columns]
    return _table("methods", ["method", *steps, "training cost"], body)


def _table(kind: str, head: Sequence[str], body: str) -> str:
    words = ("Workload", "Machine", "Measured", "method", "unit", "worse ← 1 → better")
    kinds = ["" if text in words else ' class="num"' for text in head]
    cells = "".join(f'<th scope="col"{side}>{escape(text)}</th>' for side, text in zip(kinds, head))
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
