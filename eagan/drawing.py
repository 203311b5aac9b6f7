"""Genotypes as pictures: an SVG of all cells of a network, no drawing library needed.

python eagan/drawing.py best_G generator.svg
python eagan/drawing.py runs/eagan-small/genotype.json discriminator.svg --network discriminator
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from common.cli import Parser
from common.errors import run_main
from common.files import write_atomically
from eagan.genotypes import DISCRIMINATOR, DOWN_OPS, GENERATOR, KEEP, NONE, NORMAL_OPS, UP_OPS, Genes, Space, open_genes

WIDTH, HEIGHT = 300, 330  # of a cell
BOX = (70, 26)
COLOURS = {"none": "#ccc", "skip": "#3c7d3c", "conv": "#1f6fb4", "dilated": "#7a3fa0"}
# (from, to) of each edge, and where the nodes stand, in parts of the cell.
UP_GRAPH = (("in", "0"), ("in", "1"), ("0", "2"), ("1", "2"), ("0", "3"), ("1", "3"), ("2", "3"))
UP_PLACES = {"in": (0.5, 0.08), "0": (0.22, 0.34), "1": (0.78, 0.34), "2": (0.35, 0.64), "3": (0.62, 0.9)}
DOWN_GRAPH = (("in", "1"), ("in", "2"), ("1", "2"), ("1", "3"), ("in", "3"), ("2", "out"), ("3", "out"))
DOWN_PLACES = {"in": (0.5, 0.08), "1": (0.5, 0.34), "2": (0.22, 0.62), "3": (0.78, 0.62), "out": (0.5, 0.9)}


def words(space: Space, edge: str, gene: int) -> str:
    """A gene as its operation."""
    if edge.startswith("up"):
        return UP_OPS[gene]
    if edge.startswith("down"):
        return "keep" if gene == KEEP else DOWN_OPS[gene]
    return NORMAL_OPS[gene]


def text(space: Space, genes: Genes) -> str:
    """One line a cell: its edges with their operations, those that are none left out."""
    lines = []
    for number, cell in enumerate(genes, 1):
        edges = (f"{e} {words(space, e, g)}" for e, g in zip(space.edges, cell) if g != NONE or e[0] in "ud")
        lines.append(f"cell {number}: {', '.join(edges)}")
    return "\n".join(lines)


def svg(space: Space, genes: Genes) -> str:
    """All cells side by side."""
    graph, places = (UP_GRAPH, UP_PLACES) if space is GENERATOR else (DOWN_GRAPH, DOWN_PLACES)
    body = [f"<title>{space.name} {escape(str(genes))}</title>", '<rect width="100%" height="100%" fill="white"/>']
    for number, cell in enumerate(genes):
        left = number * WIDTH
        body.append(f'<text x="{left + 12}" y="18" font-weight="bold">{space.name}, cell {number + 1}</text>')
        at = {name: (left + x * WIDTH, y * HEIGHT + 18) for name, (x, y) in places.items()}
        for edge, gene, (start, end) in zip(space.edges, cell, graph):
            if gene == NONE and edge.startswith("c"):
                continue
            name = words(space, edge, gene)
            colour = COLOURS.get(name.split()[0], "#b8651b")
            (x0, y0), (x1, y1) = at[start], at[end]
            body.append(f'<path d="M{x0:.0f} {y0:.0f} L{x1:.0f} {y1:.0f}" stroke="{colour}" stroke-width="1.8"/>')
            body.append(
                f'<text x="{0.45 * x0 + 0.55 * x1:.0f}" y="{0.45 * y0 + 0.55 * y1:.0f}" fill="{colour}" stroke="white" '
                f'stroke-width="3" paint-order="stroke" text-anchor="middle">{escape(name)}</text>'
            )
        for name, (x, y) in at.items():
            label = name if name in ("in", "out") else f"node {name}"
            body.append(
                f'<rect x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="7" '
                f'fill="#dfe7f3" stroke="#555"/><text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle">{label}</text>'
            )
    size = f'width="{len(genes) * WIDTH}" height="{HEIGHT + 36}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return head + "".join(body) + "</svg>\n"


def draw_genes(space: Space, genes: Genes, path: Path) -> Path:
    """Write the SVG."""
    write_atomically(path, lambda temporary: temporary.write_text(svg(space, genes), encoding="utf-8"))
    return path


def main(argv: Sequence[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument("genotype", help="a published architecture, or a JSON file of a search")
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("--network", choices=("generator", "discriminator"), help="default: what the name says")
    options = parser.parse_args(argv)
    kind = options.network or ("discriminator" if options.genotype.endswith("_D") else "generator")
    space = GENERATOR if kind == "generator" else DISCRIMINATOR
    genes = open_genes(space, options.genotype, "genotype")
    print(text(space, genes))
    return draw_genes(space, genes, options.out)


if __name__ == "__main__":
    run_main(main)
