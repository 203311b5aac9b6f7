"""Pictures of a search: cells as SVG, the trade-off of every generation, hypervolume over generations.

python eeea_net/drawing.py EEEA_C cells/                 # writes cells/normal.svg and cells/reduce.svg
python eeea_net/drawing.py runs/eeea_net-small/eeea_net_0/genotype.json cells/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from common.cli import Parser
from common.errors import run_main
from common.figures import BLUE, panels, save_figure
from common.files import write_atomically
from eeea_net.genotypes import SHORT_NAMES, Cell, Genotype

ORANGE = "#c2571a"
_COLOURS = {"max": ORANGE, "avg": "#b8860b", "skip": "#3c7d3c", "sep": BLUE, "dil": "#7a3fa0", "conv": "#444444"}
_COLOURS["inv"] = "#b03060"
_SHORT = {name: short for short, name in SHORT_NAMES.items()}


def columns_of(cell: Cell) -> list[int]:
    """Column of every state: inputs 0, a block one to the right of the latest state that it reads."""
    found = [0, 0]
    for block in range(cell.blocks):
        found.append(1 + max(found[state] for _, state in cell.pairs[2 * block : 2 * block + 2]))
    return found


def draw_cell(cell: Cell, path: Path, title: str) -> None:
    """The cell as an SVG: inputs at the left, blocks in the order of computation, the output at the right."""
    columns = columns_of(cell)
    last = max(columns) + 1
    members = {column: [s for s, c in enumerate(columns) if c == column] for column in range(last)}
    tallest = max(len(states) for states in members.values())
    places = {
        state: (columns[state] * 1.6, (len(members[columns[state]]) - 1) / 2 - members[columns[state]].index(state))
        for state in range(len(columns))
    }
    end = (last * 1.6, 0.0)
    figure = Figure(figsize=(1.5 + 1.5 * last, 1.2 + 1.1 * tallest))
    axis = figure.subplots()
    seen: dict[tuple[int, int], int] = {}

    def arrow(start: tuple[float, float], stop: tuple[float, float], bend: float, **style: Any) -> tuple[float, float]:
        axis.add_patch(
            FancyArrowPatch(
                start,
                stop,
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=9,
                shrinkA=16,
                shrinkB=16,
                **style,
            )
        )
        lift = -bend * (stop[0] - start[0]) / 2, bend * (stop[0] - start[0]) / 2
        return start[0] * 0.55 + stop[0] * 0.45, start[1] * 0.55 + stop[1] * 0.45 - lift[1]

    for number, (name, state) in enumerate(cell.pairs):
        target = 2 + number // 2
        again = seen[state, target] = seen.get((state, target), 0) + 1
        colour = _COLOURS[_SHORT[name].rstrip("0123456789")]
        x, y = arrow(places[state], places[target], 0.18 if again == 1 else -0.18, color=colour, linewidth=1.2)
        axis.text(x, y, _SHORT[name], color=colour, fontsize=8, ha="center", va="center", backgroundcolor="white")
    for state in cell.concat:
        arrow(places[state], end, 0.0, color="#999999", linestyle="--", linewidth=0.8)
    names = ["c_{k-2}", "c_{k-1}", *(str(block) for block in range(cell.blocks))]
    for state, name in enumerate(names):
        box = {"boxstyle": "round", "facecolor": "#dcebdc" if state < 2 else "#dfe7f3", "edgecolor": "#555555"}
        axis.text(*places[state], f"${name}$", ha="center", va="center", bbox=box, zorder=3)
    axis.text(*end, "$c_k$", ha="center", va="center", bbox={"boxstyle": "round", "facecolor": "#f3e6d6"}, zorder=3)
    axis.set_xlim(-0.6, end[0] + 0.6)
    axis.set_ylim(-tallest / 2 - 0.3, tallest / 2 + 0.3)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()
    write_svg(figure, path)


def write_svg(figure: Figure, path: Path) -> None:
    """The same figure gives the same bytes: no date, and ids that do not change."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="svg", metadata={"Date": None}))


def draw_genotype(genotype: Genotype, folder: Path, name: str) -> None:
    """normal.svg, reduce.svg and genotype.json in `folder`."""
    draw_cell(genotype.normal, folder / "normal.svg", f"{name}: normal cell")
    draw_cell(genotype.reduce, folder / "reduce.svg", f"{name}: reduction cell")
    genotype.save(folder / "genotype.json")


def draw_generation(
    earlier: Sequence[Sequence[float]],
    members: Sequence[Sequence[float]],
    front: Sequence[Sequence[float]],
    hypervolumes: Sequence[float],
    path: Path,
    caption: str,
) -> None:
    """Error against parameters and against MACs, and the hypervolume so far (figure 6).

    Args:
        earlier, members, front: objectives (error 0..1, parameters in millions, MACs in millions) of all networks
            before, of this generation, and of the Pareto front.
    """
    figure, axes = panels(3, width=4.0)
    for axis, objective, label in zip(axes, (1, 2), ("parameters M", "MACs M")):
        for points, style in (
            (earlier, {"color": "#cccccc", "label": "before"}),
            (members, {"color": BLUE, "label": "this generation"}),
        ):
            axis.scatter([p[objective] for p in points], [100 * p[0] for p in points], s=14, **style)
        line = sorted(front, key=lambda p: p[objective])
        axis.plot([p[objective] for p in line], [100 * p[0] for p in line], "x", color=ORANGE, label="front")
        axis.set_xlabel(f"{label} (20 cells)")
        axis.set_ylabel("validation error %")
    axes[0].legend(fontsize=7)
    axes[2].plot(range(len(hypervolumes)), hypervolumes, marker="o", color=BLUE)
    axes[2].set_xlabel("generation")
    axes[2].set_ylabel("normalised hypervolume")
    save_figure(figure, path, caption)


def draw_comparison(
    fronts: Mapping[str, Any],
    path: Path,
    caption: str,
    size: str = "parameters M (20 cells)",
    along: str = "networks trained",
) -> None:
    """Hypervolume against networks trained, and the fronts, of several searches.

    Args:
        fronts: name to {"evaluations": [...], "hypervolume": [...], "front": objectives}.
        size: what the second objective is; along: what evaluations are.
    """
    figure, axes = panels(2, width=4.5)
    for number, (name, of) in enumerate(fronts.items()):
        style = {
            "marker": "o",
            "markersize": 4,
            "color": (BLUE, ORANGE, "#3c7d3c", "#7a3fa0")[number % 4],
            "label": name,
        }
        axes[0].plot(of["evaluations"], of["hypervolume"], **style)
        points = sorted(of["front"], key=lambda p: p[1])
        axes[1].plot([p[1] for p in points], [100 * p[0] for p in points], linestyle="none", **style)
    axes[0].set_xlabel(along)
    axes[0].set_ylabel("normalised hypervolume")
    axes[1].set_xlabel(size)
    axes[1].set_ylabel("validation error %")
    axes[1].legend(fontsize=7)
    save_figure(figure, path, caption)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("genotype", help="a published name, or a file with JSON or a logged genotype")
    parser.add_argument("folder", type=Path, help="where normal.svg and reduce.svg are written")
    options = parser.parse_args(argv)
    draw_genotype(Genotype.load(options.genotype), options.folder, Path(options.genotype).stem)


if __name__ == "__main__":
    run_main(main)
