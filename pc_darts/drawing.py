"""Cells as pictures: SVG graphs, text, dot; and heat maps of alphas and betas. No drawing library is needed.

python pc_darts/drawing.py PC_DARTS_cifar cells/          # writes normal.svg and reduce.svg, prints the text
python pc_darts/drawing.py genotype.json cells/ --dot     # prints dot for graphviz instead
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from common.cli import Parser
from common.errors import run_main
from common.files import write_atomically
from pc_darts.genotypes import SHORT_NAMES, Genotype, edge_softmax, node_count
from pc_darts.operations import PRIMITIVES
from pc_darts.search_space import SearchNetwork

_LONG_TO_SHORT = {name: short for short, name in SHORT_NAMES.items()} | {"none": "none"}
_FAMILIES = {
    "sep": "#1f6fb4",
    "dil": "#7a3fa0",
    "max": "#c2571a",
    "avg": "#b8860b",
    "skip": "#3c7d3c",
    "conv": "#1f6fb4",
}
_BOX_W, _BOX_H, _COLUMN, _ROW = 74, 30, 150, 92


def _state_name(state: int) -> str:
    """c_{k-2} and c_{k-1} are the inputs, as in the paper's figures; nodes count from 0."""
    return ("c_{k-2}", "c_{k-1}")[state] if state < 2 else str(state - 2)


def cell_text(genotype: Genotype, reduction: bool) -> str:
    """One line a node: `node 0 = sep_conv_3x3(c_{k-1}) + skip_connect(c_{k-2})`, and the output."""
    choices = genotype.choices(reduction)
    lines = []
    for node in range(len(choices) // 2):
        terms = (f"{name}({_state_name(state)})" for name, state in choices[2 * node : 2 * node + 2])
        lines.append(f"node {node} = {' + '.join(terms)}")
    lines.append(f"c_{{k}} = concat({', '.join(_state_name(state) for state in genotype.concat(reduction))})")
    return "\n".join(lines)


def cell_dot(genotype: Genotype, reduction: bool) -> str:
    """The cell in graphviz's language."""
    lines = [f"digraph {'reduce' if reduction else 'normal'} {{", "  rankdir=LR;", "  node [shape=box, style=rounded];"]
    for i, (name, state) in enumerate(genotype.choices(reduction)):
        lines.append(f'  "{_state_name(state)}" -> "{_state_name(2 + i // 2)}" [label="{name}"];')
    lines += [f'  "{_state_name(state)}" -> "c_{{k}}";' for state in genotype.concat(reduction)]
    return "\n".join([*lines, "}"]) + "\n"


def cell_svg(genotype: Genotype, reduction: bool, title: str = "") -> str:
    """The cell as an SVG: inputs at the left, nodes in the order of computation, the output at the right."""
    choices = genotype.choices(reduction)
    nodes = len(choices) // 2
    columns = _columns([state for _, state in choices])
    last = max(columns) + 1
    rows: dict[int, list[int]] = {}
    for state, column in enumerate(columns):
        rows.setdefault(column, []).append(state)
    tallest = max(2, *(len(states) for states in rows.values()))
    height = 70 + tallest * _ROW
    centre: dict[int, tuple[float, float]] = {}
    for column, states in rows.items():
        for i, state in enumerate(states):
            # Nodes of neighbouring columns are set off, so that long arrows do not run through boxes.
            lift = 16 * (-1) ** column if column else 0
            centre[state] = (60 + column * _COLUMN, 44 + (height - 60) * (i + 0.5) / len(states) + lift)
    output = (60 + last * _COLUMN, 44 + (height - 60) / 2)
    heading = escape(title or ("reduction cell" if reduction else "normal cell"))
    body = [
        f"<title>{heading}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="14" y="20" font-weight="bold">{heading}</text>',
    ]
    seen: dict[tuple[int, int], int] = {}
    labels: list[str] = []
    for i, (name, state) in enumerate(choices):
        target = 2 + i // 2
        parallel = seen.get((state, target), 0)
        seen[state, target] = parallel + 1
        short = _LONG_TO_SHORT[name]
        colour = _FAMILIES["".join(filter(str.isalpha, short))]
        bend = 26 * parallel + 5 * (columns[target] - columns[state] - 1) * (1 if i % 2 else -1)
        path, (x, y) = _arrow(centre[state], centre[target], bend)
        body.append(f'<path d="{path}" stroke="{colour}" fill="none" stroke-width="1.6" marker-end="url(#tip)"/>')
        labels.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="middle" stroke="white" stroke-width="3" '
            f'paint-order="stroke">{escape(_pretty(short))}</text>'
        )
    for state in genotype.concat(reduction):
        path, _ = _arrow(centre[state], output, 0.0)
        body.append(f'<path d="{path}" stroke="#999" fill="none" stroke-dasharray="4 3" marker-end="url(#tip)"/>')
    boxes = [(centre[state], _svg_name(state), "#dcebdc" if state < 2 else "#dfe7f3") for state in range(2 + nodes)]
    boxes.append((output, 'c<tspan baseline-shift="sub" font-size="9">k</tspan>', "#f3e6d6"))
    for (x, y), text, fill in boxes:
        body.append(
            f'<rect x="{x - _BOX_W / 2:.1f}" y="{y - _BOX_H / 2:.1f}" width="{_BOX_W}" height="{_BOX_H}" rx="7" '
            f'fill="{fill}" stroke="#555"/><text x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{text}</text>'
        )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555"/></marker></defs>'
    )
    return _document(int(output[0]) + 60, height, tip + "".join([*body, *labels]))


def _columns(sources: Sequence[int]) -> list[int]:
    """Column of every state: inputs 0, a node one to the right of the latest state that it reads."""
    columns = [0, 0]
    for first in range(0, len(sources), 2):
        columns.append(1 + max(columns[state] for state in sources[first : first + 2]))
    return columns


def _arrow(start: tuple[float, float], end: tuple[float, float], bend: float) -> tuple[str, tuple[float, float]]:
    """An SVG curve between two boxes and where its label goes; `bend` moves the middle down, in pixels."""
    x0, y0, x1, y1 = start[0] + _BOX_W / 2, start[1], end[0] - _BOX_W / 2 - 1, end[1]
    third = (x1 - x0) / 3
    path = f"M{x0:.1f} {y0:.1f} C{x0 + third:.1f} {y0 + bend:.1f} {x1 - third:.1f} {y1 + bend:.1f} {x1:.1f} {y1:.1f}"
    # A third of the way: arrows that end in the same node are still apart there.
    t = 0.4
    a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
    x = a * x0 + b * (x0 + third) + c * (x1 - third) + d * x1
    y = a * y0 + b * (y0 + bend) + c * (y1 + bend) + d * y1
    return path, (x, y - 4)


def _svg_name(state: int) -> str:
    if state >= 2:
        return str(state - 2)
    return f'c<tspan baseline-shift="sub" font-size="9">k−{2 - state}</tspan>'


def _pretty(short: str) -> str:
    return short[:-1] + " " + short[-1] + "×" + short[-1] if short[-1].isdigit() else short


def _document(width: int, height: int, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12">{body}</svg>\n'
    )


def weights_svg(network: SearchNetwork) -> str:
    """Heat maps of both kinds of cell, side by side: softmax of the alphas, and of the betas with edge normalisation.

    Rows are edges, labelled `state -> node`; a node's edges stand together. Darker is more; numbers are per cent.
    """
    body, left, height = "", 0, 0
    for kind, alphas_EO, betas_E in (
        ("normal cell", network.alphas_normal, network.betas_normal),
        ("reduction cell", network.alphas_reduce, network.betas_reduce),
    ):
        part, width, height = _heat_map(alphas_EO, betas_E if network.config.edge_normalisation else None, kind)
        body += f'<g transform="translate({left} 0)">{part}</g>'
        left += width
    return _document(left, height, '<rect width="100%" height="100%" fill="white"/>' + body)


def _heat_map(alphas_EO: Tensor, betas_E: Tensor | None, title: str) -> tuple[str, int, int]:
    """The map's elements, width and height."""
    values_EX = alphas_EO.detach().float().cpu().softmax(-1)
    names = [_LONG_TO_SHORT[name] for name in PRIMITIVES]
    if betas_E is not None:
        values_EX = torch.cat([values_EX, edge_softmax(betas_E.detach().float().cpu())[:, None]], dim=1)
    left, top, wide, high = 92, 52, 46, 20
    columns = [left + i * wide for i in range(len(names))] + [left + len(names) * wide + 10]
    labels = [*names, "beta"][: values_EX.shape[1]]
    body = [f'<text x="14" y="20" font-weight="bold">{escape(title)}</text>']
    for x, name in zip(columns, labels, strict=False):
        body.append(f'<text x="{x + wide // 2}" y="{top - 8}" text-anchor="middle" font-size="10">{name}</text>')
    y, rows = top, iter(values_EX.tolist())
    for node in range(node_count(len(values_EX))):
        for state in range(2 + node):
            label = f"{_svg_name(state)} → {node}"
            body.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" font-size="10">{label}</text>')
            for x, name, value in zip(columns, labels, next(rows), strict=False):
                low = round(255 * (1 - value))
                middle = (low + 255) // 2
                fill = f"rgb(255,{middle},{low})" if name == "beta" else f"rgb({low},{middle},255)"
                body.append(
                    f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" fill="{fill}" stroke="#ddd"/>'
                    f'<text x="{x + wide // 2}" y="{y + 14}" text-anchor="middle" font-size="9">'
                    f"{100 * value:.1f}</text>"
                )
            y += high
        y += 6
    return "".join(body), columns[-1] + wide + 20, y + 10


def draw_cell(genotype: Genotype, reduction: bool, path: Path, title: str = "") -> None:
    """Write `cell_svg` to `path`."""
    text = cell_svg(genotype, reduction, title)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def draw_weights(network: SearchNetwork, path: Path) -> None:
    """Write `weights_svg` to `path`."""
    text = weights_svg(network)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("genotype", help="a published name, or a file with JSON or a logged genotype")
    parser.add_argument("folder", type=Path, help="where normal.svg and reduce.svg are written")
    parser.add_argument("--dot", action="store_true", help="print graphviz's language instead of text")
    options = parser.parse_args(argv)
    genotype = Genotype.load(options.genotype)
    for reduction in (False, True):
        kind = "reduce" if reduction else "normal"
        draw_cell(genotype, reduction, options.folder / f"{kind}.svg")
        print(cell_dot(genotype, reduction) if options.dot else f"{kind}\n{cell_text(genotype, reduction)}\n")


if __name__ == "__main__":
    run_main(main)
