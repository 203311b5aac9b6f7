"""Plots of claims and captions of pictures: one style, and what a picture shows is said where it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.files import read_object, write_atomically, write_json

BLUE = "#4878a8"
CAPTIONS = "captions.json"  # in every folder of figures: {"file name": "caption"}, in the order of the report


def panels(count: int = 1, width: float = 4.5, height: float = 3.2, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure with `count` axes side by side, each of `width` x `height` inches; `options` of `Figure.subplots`."""
    figure = Figure(figsize=(width * count, height))
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def save_figure(figure: Figure, path: Path, caption: str | None = None, **options: Any) -> Path:
    """Write a PNG and, when there is one, its caption beside it; `options` of `Figure.savefig`."""
    if "bbox_inches" not in options:
        figure.tight_layout()
    style: dict[str, Any] = {"format": "png", "dpi": 110, "metadata": {"Software": None}, **options}
    write_atomically(path, lambda temporary: figure.savefig(temporary, **style))
    if caption is not None:
        keep_captions(path.parent, {path.name: caption})
    return path


def keep_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Merge captions into the folder's: those of other programs stay where they are, those without a picture go."""
    listing = folder / CAPTIONS
    earlier = read_object(listing) if listing.is_file() else {}
    write_json(listing, {name: text for name, text in {**earlier, **captions}.items() if (folder / name).is_file()})


def small_claims(results: Path) -> dict[str, dict[str, Any]]:
    """The records of the small tier in a results file, by claim: what the figures show."""
    records = read_object(results, kinds={"claims": list})["claims"]
    return {record["id"]: record for record in records if record["tier"] == "small"}


def over_seeds(values_SK: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over seeds; 0 for one seed, None counts as NaN."""
    values_SK = np.array(values_SK, dtype=float)
    return values_SK.mean(0), values_SK.std(0, ddof=1) if len(values_SK) > 1 else np.zeros(values_SK.shape[1:])


def series(claim: Mapping[str, Any], metrics: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation of several metrics over a claim's seeds."""
    return over_seeds([[row[metric] for metric in metrics] for row in claim["measured"]])


def bars(axis: Any, claim: Mapping[str, Any], metrics: Mapping[str, str], title: str | None = None) -> None:
    """One bar a metric, `metrics` from label to name."""
    mean, spread = series(claim, list(metrics.values()))
    axis.bar(range(len(metrics)), mean, yerr=spread, capsize=3, color=BLUE)
    axis.set_xticks(range(len(metrics)), list(metrics))
    if title is not None:
        axis.set_title(title)


def curve(axis: Any, claim: Mapping[str, Any], metrics: Mapping[Any, str], **style: Any) -> None:
    """A line with error bars, `metrics` from place on the x axis to name."""
    mean, spread = series(claim, list(metrics.values()))
    axis.errorbar(list(metrics), mean, yerr=spread, **{"marker": "o", "capsize": 3, **style})


def ladder(axis: Any, claim: Mapping[str, Any], words: Mapping[str, str] | None = None) -> None:
    """A claim's headline metric (mean and standard deviation over seeds) at each rung, its target as a line.

    Args:
        words: what metrics are called.
    """
    target = claim["target"]
    rungs = [claim, *claim.get("rungs", ())]
    places = [entry.get("rung", 1) for entry in rungs]
    mean, spread = np.array([[entry["mean"], entry["std"]] for entry in rungs], dtype=float).T
    axis.errorbar(places, mean, yerr=spread, marker="o", capsize=3, color=BLUE)
    axis.axhline(target["value"], color="black", linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{place}x" for place in places])
    axis.minorticks_off()
    axis.set_xlim(min(places) / 1.5, max(places) * 1.5)
    axis.set_xlabel("budget")
    metric = target["metric"]
    axis.set_ylabel(fill((words or {}).get(metric, metric.replace("_", " ")), 26), fontsize=8)
    axis.set_title(f"{claim['id']}, target {target['op']} {target['value']:g}")


def draw_ladder(results: Path, folder: Path, words: Mapping[str, Mapping[str, str]] | None = None) -> Path | None:
    """`ladder.png`: a panel for every claim of a results file that is measured at more than one rung.

    Args:
        words: what metrics are called, by claim (`common.ledger.read_notes`).
    """
    claims = [claim for claim in small_claims(results).values() if claim.get("rungs")]
    if not claims:
        return None
    columns = min(4, len(claims))
    rows = -(-len(claims) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, claim in zip(axes, claims):
        ladder(axis, claim, (words or {}).get(claim["id"]))
    for axis in axes[len(claims) :]:
        axis.set_axis_off()
    caption = "Metric against budget: mean and standard deviation over seeds at each multiple of the claim's budget, "
    return save_figure(figure, folder / "ladder.png", caption + "the target as a dashed line.")


def training_curve(axis: Any, logs: Sequence[Mapping[str, Any]], metric: str, step: float = 1.0, **style: Any) -> None:
    """A metric of an arm's kept logs (one a seed) at its checkpoints; `step` is the length of one step on the axis."""
    mean, spread = over_seeds([[point[metric] for point in log["curve"]] for log in logs])
    places = [step * point["step"] for point in logs[0]["curve"]]
    axis.errorbar(places, mean, yerr=spread if len(logs) > 1 else None, marker=".", capsize=2, **style)


def kept_logs(arms: Path, pattern: str) -> list[dict[str, Any]]:
    """Kept logs of one arm over its seeds, without those of other checkpoints (of other settings) than the first."""
    logs = [read_object(path) for path in sorted(arms.glob(pattern))]
    return [log for log in logs if [p["step"] for p in log["curve"]] == [p["step"] for p in logs[0]["curve"]]]
