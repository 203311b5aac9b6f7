"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.files import write_json

CAPTIONS = {
    "tiers.png": "M2: tokens a second with neither, either and both of prefetch and cache, on a drive that is as slow "
    "as the computation (mean and deviation over seeds; the line is the all-resident run).",
    "cache.png": "M3: hit rates of the cache rules on recorded gates and under shifting popularity.",
    "ring.png": "M8: time and device memory of a pass through 12 layers, in parts of the all-resident pass.",
    "deepspeed.png": "M9: CPU seconds per 1,000 tokens and peak tensor memory of ours and of DeepSpeed.",
}


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results` (tier small), and captions.json for the report."""
    records = json.loads(results.read_text(encoding="utf-8"))["claims"]
    rows = {record["id"]: record["measured"] for record in records if record["tier"] == "small"}
    drawn = {}
    folder.mkdir(parents=True, exist_ok=True)
    for claim, name, draw in (
        ("M2", "tiers.png", _tiers),
        ("M3", "cache.png", _cache),
        ("M8", "ring.png", _ring),
        ("M9", "deepspeed.png", _deepspeed),
    ):
        if claim in rows:
            draw(rows[claim], folder / name)
            drawn[name] = CAPTIONS[name]
    write_json(folder / "captions.json", drawn)


def _spread(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float]:
    values = np.array([row[metric] for row in rows], dtype=float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str], label: str) -> None:
    spreads = [_spread(rows, metric) for metric in metrics.values()]
    axes.bar(list(metrics), [mean for mean, _ in spreads], yerr=[std for _, std in spreads], capsize=4, color="#4c78a8")
    axes.set_ylabel(label)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tiers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5.5, 3.4))
    _bars(axes, rows, {n: f"speed_{n}" for n in ("none", "prefetch", "cache", "both")}, "tokens/s")
    axes.axhline(_spread(rows, "speed_resident")[0], color="#e45756", linestyle="--", label="all resident")
    axes.legend()
    _save(figure, path)


def _cache(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    rules = ("decayed", "lfu", "lru", "text", "pseudocode")
    for axes, trace in zip(panels, ("gates", "shift")):
        _bars(axes, rows, {rule: f"hit_rate_{rule}_{trace}" for rule in rules}, "hit rate")
        axes.set_title({"gates": "recorded gates", "shift": "shifting Zipf"}[trace])
    _save(figure, path)


def _ring(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4))
    times = {"serial": "time_ratio_serial", "ring, K = 2": "time_ratio_ring2", "ring, K = 4": "time_ratio"}
    _bars(panels[0], rows, times, "time / resident")
    panels[0].axhline(1.0, color="#e45756", linestyle="--")
    _bars(panels[1], rows, {"K = 2": "device_share_ring2", "K = 4": "device_share"}, "device bytes / resident")
    _save(figure, path)


def _deepspeed(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4))
    names = {"ours": "resident", "ZeRO 0": "zero0", "ZeRO 2": "zero2"}
    _bars(panels[0], rows, {n: f"cpu_{key}" for n, key in names.items()}, "CPU-s per 1,000 tokens")
    _bars(panels[1], rows, {n: f"peak_megabytes_{key}" for n, key in names.items()}, "peak tensor MB")
    _save(figure, path)
