"""Pictures made by the code that makes the numbers: populations, fronts, rounds, and what the claims came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps

from common.evolution import front_ranks
from common.figures import bars, over_seeds, panels, save_figure, small_claims
from common.files import read_object
from common.images import make_grid, open_rgb, save_png


def draw_sheet(folder: Path, rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Samples of a population, a row an individual, the best first; `folder` has a strip of equal z for each.

    Args:
        rows: of the round's record.
    """
    order = sorted((n for n, row in enumerate(rows) if "failed_because" not in row), key=lambda n: rows[n]["fid"])
    strips = [torch.from_numpy(open_rgb(folder / f"{n}.png").copy()).permute(2, 0, 1) for n in order]
    height = strips[0].shape[1]
    tiles = torch.cat([torch.stack(strip.split(height, 2)) for strip in strips])
    columns = strips[0].shape[2] // height
    captions = [""] * len(tiles)
    for place, n in enumerate(order):
        captions[place * columns] = f"{n}{' kept' if rows[n]['kept'] else ''}"
        captions[place * columns + min(1, columns - 1)] = f"FID {rows[n]['fid']:.3g}"
    return save_png(make_grid(tiles, columns, captions, tile=max(height, 64 // height * height), caption_lines=1), path)


def draw_fronts(folder: Path, path: Path) -> Path:
    """FID against IS and against size of all individuals, by round; ringed: the last round's front in all three.

    Args:
        folder: with the rounds' records.
    """
    figure, axes = panels(2)
    files = sorted(folder.glob("*.json"))
    for number, file in enumerate(files):
        rows = read_object(file, kinds={"individuals": list})["individuals"]
        alive = [row for row in rows if "failed_because" not in row]
        table = np.array([[row["inception_score"] or 1.0, row["fid"], row["size"] / 1e6] for row in alive])
        colour = colormaps["viridis"](number / max(1, len(files) - 1))  # each round its own, however many
        for axis, column in zip(axes, (0, 2)):
            axis.scatter(table[:, column], table[:, 1], color=colour, s=14, label=f"round {number}")
            if number == len(files) - 1:
                front = table[front_ranks(np.stack([1 / table[:, 0], table[:, 1], table[:, 2]], 1)) == 0]
                axis.scatter(front[:, column], front[:, 1], s=110, facecolors="none", edgecolors="black", label="front")
    for axis, name in zip(axes, ("Inception Score", "parameters, millions")):
        axis.set_xlabel(name)
        axis.set_ylabel("FID")
    axes[0].legend(fontsize=7, ncols=1 + len(files) // 10)
    return save_figure(figure, path, "Individuals of each round by IS, FID and size; ringed: the last round's front.")


def _along_rounds(axis: Any, value: str) -> None:
    """Names of the axes; there are no half rounds."""
    axis.set_xlabel("round")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(value)


def draw_rounds(history: Sequence[Mapping[str, Any]], floor: float, path: Path, title: str) -> Path:
    """Mean and best FID of the population over the rounds, and that of real pictures."""
    figure, (axis,) = panels()
    numbers = [row["round"] for row in history]
    axis.plot(numbers, [row["fid_mean"] for row in history], marker="o", label="mean of the population")
    axis.plot(numbers, [row["fid_best"] for row in history], marker="o", label="best")
    axis.axhline(floor, color="black", linestyle="--", linewidth=1, label="real against real")
    _along_rounds(axis, "FID")
    axis.set_title(title)
    axis.legend(fontsize=7)
    return save_figure(
        figure, path, "Mean and best FID of the population over the rounds; dashed: real against real pictures."
    )


def draw_figures(ledger: Path, folder: Path) -> None:
    """What the ledger allows: rounds with and without weight resetting (3), coupled against decoupled (4)."""
    claims = small_claims(ledger)
    curves = {
        "E3": {"with": "weight resetting", "without": "without"},
        "E4": {"decoupled": "decoupled", "coupled": "coupled"},
    }
    captions = {
        "E3": "FID of the population over the rounds of stage 2, with and without weight resetting.",
        "E4": "FID of the population over the rounds, decoupled (generator, then discriminator) and coupled.",
    }
    for name, arms in curves.items():
        if name not in claims:
            continue
        figure, (axis,) = panels()
        for arm, label in arms.items():
            rounds = sum(key.startswith(f"fid_{arm}_round_") for key in claims[name]["measured"][0])
            measured = [[row[f"fid_{arm}_round_{n}"] for n in range(rounds)] for row in claims[name]["measured"]]
            mean, spread = over_seeds(measured)
            axis.errorbar(range(rounds), mean, yerr=spread, marker="o", capsize=3, label=label)
        _along_rounds(axis, "mean FID of the population")
        axis.legend()
        save_figure(figure, folder / f"rounds_{name}.png", captions[name])
    if {"E1", "E2"} <= claims.keys():
        figure, (found, pair) = panels(2)
        bars(found, claims["E1"], {"searched": "fid_searched", "random": "fid_random"}, "retrained generator")
        bars(pair, claims["E2"], {"found pair": "fid_pair", "fixed D": "fid_fixed"}, "retrained pair")
        for axis in (found, pair):
            axis.set_ylabel("FID")
        caption = (
            "Left: the searched generator against random ones. Right: with the searched discriminator and the fixed."
        )
        save_figure(figure, folder / "retrained.png", caption)
