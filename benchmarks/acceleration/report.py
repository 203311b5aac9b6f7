"""Curves, same-noise image sheets and the expected order, all from results/acceleration.json and the kept images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from benchmarks.acceleration.runner import Runner
from common.costs import aligned
from common.figures import CAPTIONS, keep_captions, panels, save_figure
from common.files import read_object
from common.images import make_grid, save_png
from common.ledger import bench_row

PADDING = 2  # pixels of white between the tiles of a sheet, as `make_grid` leaves them

# (better, worse, steps): the order that the papers' claims lead one to expect. A violated one is a finding.
PEERS = ("direct_distillation", "progressive_distillation", "lcm", "rectified_flow", "teacher_ddim", "teacher_dpm")
EXPECTED = [("instaflow", peer, 1) for peer in PEERS] + [("instaflow_stacked", "instaflow", 1)]
EXPECTED += [("hipa", peer, 1) for peer in ("progressive_distillation", "teacher_ddim")]
EXPECTED += [("lcm", "teacher_dpm", steps) for steps in (2, 4)]
EXPECTED += [("rectified_flow", peer, steps) for steps in (2, 4) for peer in ("teacher_ddim", "teacher_dpm")]
WITHIN = 1.3  # of the teacher's FD at 25 steps for the rectified flow


def expected_order(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One bench row a pair of methods: mean FD to held-out data, which should be lower on our side."""
    found = {(r["budget"], r["method"], r["steps"]): r for r in content["summary"]}
    rows = []
    for budget in content["settings"]:
        pairs = [(a, b, steps, 1.0) for a, b, steps in EXPECTED]
        pairs += [("rectified_flow", "teacher_ddim", 25, 1 / WITHIN), ("rectified_flow", "teacher_dpm", 25, 1 / WITHIN)]
        for a, b, steps, target in pairs:
            ours, peer = found.get((budget, a, steps)), found.get((budget, b, steps))
            if ours is None or peer is None:
                continue
            values = [side["metrics"]["fd_data"]["mean"] for side in (ours, peer)]
            if None in values or min(values) <= 0:
                continue
            name = f"{budget}, {steps} step{'s' * (steps > 1)}: {ours['title']} against {peer['title']}"
            rows.append(bench_row(name, values[0], values[1], "FD", target=target, higher_is_better=False))
    return rows


def draw_curves(content: Mapping[str, Any], folder: Path) -> None:
    """FD against steps, and one-step FD against training cost."""
    titles = {row["method"]: row["title"] for row in content["summary"]}
    colours = {method: f"C{i % 10}" for i, method in enumerate(sorted(titles))}

    def draw(axis: Any, method: str, metric: str, x: str, wanted: Callable[..., bool]) -> None:
        """One method's line, with its finite values."""
        rows = [r for r in content["summary"] if r["method"] == method and wanted(r)]
        rows = sorted((r for r in rows if r["metrics"][metric]["mean"] is not None), key=lambda r: r[x])
        if rows:
            mean, spread = ([r["metrics"][metric][key] for r in rows] for key in ("mean", "std"))
            style = {"marker": "o", "capsize": 3, "color": colours[method], "label": titles[method]}
            axis.errorbar([r[x] for r in rows], mean, spread, **style)

    for budget in content["settings"]:
        figure, axes = panels(2, 5, 4, sharex=True)
        shown = {"fd_data": "FD to held-out data", "fd_teacher": "FD to the teacher's 50-step samples"}
        for axis, (metric, title) in zip(axes, shown.items()):
            for method in titles:
                draw(axis, method, metric, "steps", lambda r, budget=budget: r["budget"] == budget)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks([1, 2, 4, 8, 25], ["1", "2", "4", "8", "25"])
            axis.set_xlabel("steps")
            axis.set_title(title)
        axes[1].legend(fontsize=7)
        caption = f"Budget {budget}: Frechet distance against steps, to held-out data and to the teacher's samples."
        save_figure(figure, folder / f"fd_against_steps_{budget}.png", caption)
    figure, (axis,) = panels(width=6, height=4)
    for method in titles:
        draw(axis, method, "fd_data", "training_forwards", lambda r: r["steps"] == 1 and r["training_forwards"] > 0)
    if axis.get_legend_handles_labels()[0]:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("training cost, U-Net forward-equivalent samples")
        axis.set_title("one-step FD to held-out data")
        axis.legend(fontsize=7)
        caption = (
            "One-step Frechet distance against what the training cost, pairs included (mean and spread over seeds)."
        )
        save_figure(figure, folder / "fd_against_cost.png", caption)


def draw_sheets(runner: Runner, names: Sequence[str], titles: Mapping[str, str], folder: Path) -> None:
    """One picture a number of steps: a row a method, a column a prompt, the same noises throughout.

    A method whose samples are not in the runner's folder keeps the row that the earlier sheet has of it.
    """
    seed = runner.settings.seeds[0]
    prompts = json.loads((runner.folder / "shown.json").read_text())
    for steps in (1, 2, 4, 8, 25):
        drawn: dict[str, Image.Image] = {}
        for name in names:
            path = runner.images_of(name, seed)
            shown = load_file(path) if path.is_file() else {}
            if f"steps_{steps}" in shown:
                labels = [f"{titles[name]}: {prompt}" for prompt in prompts]
                drawn[titles[name]] = make_grid(shown[f"steps_{steps}"], len(prompts), labels, 96, PADDING, 3)
        if drawn:
            file = f"same_noise_{runner.bench.level}_{steps}.png"
            size = next(iter(drawn.values())).size
            rows = {**_rows_of(folder, file, size), **drawn}
            order = sorted(rows, key=[titles[name] for name in names].index)
            save_png(_stacked([rows[title] for title in order]), folder / file)
            keep_captions(folder, {file: sheet_caption(runner.bench.level, steps, order)})


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """One-row grids of one size below each other; their white borders of `PADDING` pixels lie on each other."""
    width, height = rows[0].size
    step = height - PADDING
    canvas = Image.new("RGB", (width, len(rows) * step + PADDING), "white")
    for index, row in enumerate(rows):
        canvas.paste(row, (0, index * step))
    return canvas


def _rows_of(folder: Path, file: str, size: tuple[int, int]) -> dict[str, Image.Image]:
    """The rows of an earlier sheet by title, as its caption names them; none where its tiles are of another size."""
    captions = folder / CAPTIONS
    if not ((folder / file).is_file() and captions.is_file()):
        return {}
    titles = str(read_object(captions).get(file, "")).rpartition("; from above: ")[2].rstrip(".").split("; ")
    with Image.open(folder / file) as opened:
        sheet = opened.convert("RGB")
    step = size[1] - PADDING
    if sheet.size != (size[0], len(titles) * step + PADDING):
        return {}
    return {t: sheet.crop((0, i * step, size[0], i * step + size[1])) for i, t in enumerate(titles)}


def sheet_caption(budget: str, steps: int, titles: Sequence[str]) -> str:
    """What a sheet shows; `titles` of its rows from above."""
    count = f"{steps} step{'s' * (steps > 1)}"
    return f"Budget {budget}, {count}, a column a prompt, same noises throughout; from above: {'; '.join(titles)}."


def table_cells(content: Mapping[str, Any], budget: str, metric: str = "fd_data") -> list[list[str]]:
    """The methods x steps table of one budget, head first: mean (± std over seeds) of a metric, and the cost."""
    columns = (1, 2, 4, 8, 25)
    lines = [["method", *(f"{n} step{'s' * (n > 1)}" for n in columns), "training cost", "trained parameters"]]
    runs = {run["method"]: run for run in content["runs"] if run["budget"] == budget}
    for name, run in runs.items():
        rows = {r["steps"]: r for r in content["summary"] if (r["budget"], r["method"]) == (budget, name)}
        cells = []
        for n in columns:
            value = rows[n]["metrics"].get(metric) if n in rows else None
            if value is None or value["mean"] is None:
                cells.append("-" if value is None else "diverged")
            else:
                cells.append(f"{value['mean']:.3g}" + (f" ± {value['std']:.2g}" if rows[n]["seeds"] > 1 else ""))
        cost = next(iter(rows.values()))["training_forwards"]
        trained = f"{run['trained_parameters']:,}" if run["trained_parameters"] else "-"
        lines.append([run["title"], *cells, f"{cost:,.0f}" if cost else "-", trained])
    return lines


def table(content: Mapping[str, Any], budget: str) -> str:
    """`table_cells` of FD to held-out data, as aligned text."""
    cells = table_cells(content, budget)
    return aligned(cells, left=range(len(cells[0])))
