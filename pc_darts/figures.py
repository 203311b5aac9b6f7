"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

CAPTIONS = {
    "memory.png": "PC1: bytes that the search network keeps for its backward pass, per 32 px picture, by K.",
    "errors.png": "PC3 and PC6: test errors of random, DARTS and PC-DARTS cells, trained alike (a dot a cell).",
    "overlap.png": "PC4: overlap of the edges chosen by searches that differ in the order of their data.",
    "weight_free.png": "PC5: share of weight-free operations among the chosen ones.",
    "cell_normal.svg": "The normal cell of the first PC-DARTS search.",
    "cell_reduce.svg": "The reduction cell of the first PC-DARTS search.",
}
MOMENTS = {
    "normal": "the normal cell that it would derive",
    "reduce": "the reduction cell that it would derive",
    "weights": "weights of operations (alphas) and edges (betas), per cent",
}
BLUE = "#4878a8"


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results`, and captions.json for the report."""
    claims = {c["id"]: c for c in json.loads(results.read_text())["claims"] if c["tier"] == "small"}
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "memory.png": _memory(claims.get("PC1")),
        "errors.png": _errors(claims.get("PC3"), claims.get("PC6")),
        "overlap.png": _pairs(claims.get("PC4"), "overlap", "Jaccard overlap", ("without EN", "with EN")),
        "weight_free.png": _pairs(claims.get("PC5"), "share", "weight-free share", ("no warm-up", "warm-up")),
    }
    for name, figure in plots.items():
        if figure is not None:
            figure.tight_layout()
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            plt.close(figure)
    captions = {name: text for name, text in CAPTIONS.items() if (folder / name).is_file()}
    for path in sorted(folder.glob("epoch*_*.svg")):
        epoch, kind = path.stem.removeprefix("epoch").split("_")
        captions[path.name] = f"The first PC-DARTS search after epoch {int(epoch)}: {MOMENTS[kind]}."
    (folder / "captions.json").write_text(json.dumps(captions, indent=1, ensure_ascii=False) + "\n")


def _values(claim: dict[str, Any], key: str) -> np.ndarray:
    return np.array([row[key] for row in claim["measured"]], dtype=float)


def _memory(claim: dict[str, Any] | None) -> Any:
    if claim is None:
        return None
    partials = (1, 2, 4, 8)
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    axis.bar(range(4), [_values(claim, f"megabytes_K{k}").mean() for k in partials], color=BLUE)
    axis.set_xticks(range(4), [f"K = {k}" for k in partials])
    axis.set_ylabel("MB a picture")
    return figure


def _errors(random_claim: dict[str, Any] | None, darts_claim: dict[str, Any] | None) -> Any:
    if random_claim is None:
        return None
    first = random_claim["measured"][0]
    groups = {"random": np.array([value for key, value in first.items() if key.startswith("error_random_")])}
    if darts_claim is not None:
        groups["DARTS"] = _values(darts_claim, "error_darts")
    groups["PC-DARTS"] = _values(random_claim, "error_pc")
    figure, axis = plt.subplots(figsize=(4.8, 3.2))
    for place, values in enumerate(groups.values()):
        axis.scatter(np.full(len(values), place), values, color=BLUE, alpha=0.7)
        axis.hlines(values.mean(), place - 0.25, place + 0.25, color="black")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel("test error %")
    return figure


def _pairs(claim: dict[str, Any] | None, key: str, label: str, names: tuple[str, str]) -> Any:
    """One line a seed from the arm without to the arm with."""
    if claim is None:
        return None
    figure, axis = plt.subplots(figsize=(4.2, 3.2))
    for without, given in zip(_values(claim, f"{key}_without"), _values(claim, f"{key}_with")):
        axis.plot([0, 1], [without, given], marker="o", color=BLUE)
    axis.set_xticks([0, 1], list(names))
    axis.set_xlim(-0.4, 1.4)
    axis.set_ylabel(label)
    return figure
