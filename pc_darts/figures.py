"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.figures import BLUE, keep_captions, panels, save_figure, series, small_claims

CELLS = {
    "cell_normal.svg": "The normal cell of the first PC-DARTS search.",
    "cell_reduce.svg": "The reduction cell of the first PC-DARTS search.",
}
MOMENTS = {
    "normal": "the normal cell that it would derive",
    "reduce": "the reduction cell that it would derive",
    "weights": "weights of operations (alphas) and edges (betas), per cent",
}


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results`, with its caption."""
    claims = small_claims(results)
    if "PC1" in claims:
        figure, (axis,) = panels()
        partials = (1, 2, 4, 8)
        axis.bar(range(4), series(claims["PC1"], [f"megabytes_K{k}" for k in partials])[0], color=BLUE)
        axis.set_xticks(range(4), [f"K = {k}" for k in partials])
        axis.set_ylabel("MB a picture")
        caption = "PC1: bytes that the search network keeps for its backward pass, per 32 px picture, by K."
        save_figure(figure, folder / "memory.png", caption)
    if "PC3" in claims:
        caption = "PC3 and PC6: test errors of random, DARTS and PC-DARTS cells, trained alike (a dot a cell)."
        save_figure(_errors(claims["PC3"], claims.get("PC6")), folder / "errors.png", caption)
    if "PC4" in claims:
        figure = _pairs(claims["PC4"], "overlap", "Jaccard overlap", ("without EN", "with EN"))
        caption = "PC4: overlap of the edges chosen by searches that differ in the order of their data."
        save_figure(figure, folder / "overlap.png", caption)
    if "PC5" in claims:
        figure = _pairs(claims["PC5"], "share", "weight-free share", ("no warm-up", "warm-up"))
        save_figure(figure, folder / "weight_free.png", "PC5: share of weight-free operations among the chosen ones.")
    epochs = {}
    for path in sorted(folder.glob("epoch*_*.svg")):
        epoch, kind = path.stem.removeprefix("epoch").split("_")
        epochs[path.name] = f"The first PC-DARTS search after epoch {int(epoch)}: {MOMENTS[kind]}."
    keep_captions(folder, CELLS | epochs)


def _values(claim: Mapping[str, Any], key: str) -> np.ndarray:
    return np.array([row[key] for row in claim["measured"]], dtype=float)


def _errors(random_claim: Mapping[str, Any], darts_claim: Mapping[str, Any] | None) -> Any:
    first = random_claim["measured"][0]
    groups = {"random": np.array([value for key, value in first.items() if key.startswith("error_random_")])}
    if darts_claim is not None:
        groups["DARTS"] = _values(darts_claim, "error_darts")
    groups["PC-DARTS"] = _values(random_claim, "error_pc")
    figure, (axis,) = panels(width=4.8)
    for place, values in enumerate(groups.values()):
        axis.scatter(np.full(len(values), place), values, color=BLUE, alpha=0.7)
        axis.hlines(values.mean(), place - 0.25, place + 0.25, color="black")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel("test error %")
    return figure


def _pairs(claim: Mapping[str, Any], key: str, label: str, names: tuple[str, str]) -> Any:
    """One line a seed from the arm without to the arm with."""
    figure, (axis,) = panels(width=4.2)
    for without, given in zip(_values(claim, f"{key}_without"), _values(claim, f"{key}_with")):
        axis.plot([0, 1], [without, given], marker="o", color=BLUE)
    axis.set_xticks([0, 1], list(names))
    axis.set_xlim(-0.4, 1.4)
    axis.set_ylabel(label)
    return figure
