"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.figures import BLUE, bars, curve, kept_logs, panels, save_figure, series, small_claims, training_curve
from common.training import read_logs

# Table 5's order and names.
OBJECTIVES = {
    "electra": "ELECTRA",
    "all_tokens_mlm": "All-Tokens\nMLM",
    "replace_mlm": "Replace\nMLM",
    "electra15": "ELECTRA\n15%",
    "mlm": "BERT",
}
TASK_NAMES = {
    "acceptability": "acceptability",
    "coherence": "coherence of pairs",
    "sentiment": "sentiment",
    "pos": "parts of speech",
    "average": "average",
}
CURVES = {
    "mlm_loss": "masked-token loss (nats)",
    "rtd_auc": "AUC of replaced tokens",
    "rtd_recall": "recall of replaced tokens",
}
WIDTHS = {"eighth": 1 / 8, "quarter": 1 / 4, "half": 1 / 2, "full": 1.0}
WITHOUT_NETWORK = {"unigram": "C1", "uniform": "C2"}
LENGTHS = ("6", "12", "25", "50", "100")


def draw_figures(results: Path, folder: Path, study: Path) -> None:
    """Write every figure whose claim is in `results`, with its caption.

    Args:
        study: folder of the arms' logs and of the example (`experiments.Study`); what is not there is left out.
    """
    claims = small_claims(results)
    logs = {name: kept_logs(study / "arms", f"{name}-seed[0-2].json") for name in OBJECTIVES}
    if any(logs.values()):
        caption = (
            "Pre-training on held-out text against training FLOPs (fixed masks and samples; mean and deviation over "
            "seeds): masked-token loss of the generator (of BERT: of the network itself), AUC and recall of replaced "
            "tokens."
        )
        save_figure(_learning_curves(logs), folder / "learning_curves.png", caption)
    if "E3" in claims:
        caption = (
            "E3, the paper's table 5 at small scale: five objectives at equal FLOPs, beside the network from scratch "
            "(dashed; mean and deviation over seeds; axes do not begin at 0)."
        )
        save_figure(_table5(claims["E3"]), folder / "table5.png", caption)
    if sizes := {key: claims[name] for key, name in (("acceptability", "E4b"), ("auc", "E4a")) if name in claims}:
        caption = (
            "E4, the paper's figure 3: the discriminator against the width of its generator, at equal steps; left "
            "fine-tuned, right on samples of one common generator."
        )
        save_figure(_generator_size(sizes), folder / "generator_size.png", caption)
    if lengths := {arm: claims[name] for arm, name in (("electra", "E7a"), ("mlm", "E7b")) if name in claims}:
        caption = (
            "E7, the paper's table 1 and figure 4: acceptability against training FLOPs, a schedule a length; dashed "
            "from scratch."
        )
        save_figure(_sample_efficiency(lengths), folder / "sample_efficiency.png", caption)
    if (example := study / "example.json").is_file():
        caption = (
            "Held-out text as the discriminator of the first seed reads it: the darker, the more probably replaced; "
            "below a replaced token what stood there (=: the generator was right)."
        )
        figure = _corrupted_sentence(json.loads(example.read_text(encoding="utf-8")))
        save_figure(figure, folder / "corrupted_sentence.png", caption)


def _learning_curves(found: Mapping[str, list[dict[str, Any]]]) -> Figure:
    figure, axes = panels(len(CURVES), 4.2, 3.5)
    for number, (name, logs) in enumerate((name, logs) for name, logs in found.items() if logs):
        one_step = logs[0]["tflop"] / logs[0]["steps"]
        for axis, (metric, title) in zip(axes, CURVES.items()):
            axis.set(xlabel="training TFLOP", title=title)
            if all(metric in point for log in logs for point in log["curve"]):
                style = {"color": f"C{number}", "label": OBJECTIVES[name].replace("\n", " ")}
                training_curve(axis, logs, metric, one_step, **style)
    axes[0].legend(fontsize=8)
    return figure


def _table5(claim: Mapping[str, Any]) -> Figure:
    tasks = [task for task in TASK_NAMES if all(f"{task}_scratch" in row for row in claim["measured"])]
    figure, axes = panels(len(tasks), 3.6, 3.4)
    for axis, task in zip(axes, tasks):
        metrics = {label: f"{task}_{name}" for name, label in OBJECTIVES.items()}
        bars(axis, claim, metrics, TASK_NAMES[task])
        mean, spread = series(claim, list(metrics.values()))
        scratch = series(claim, [f"{task}_scratch"])[0][0]
        axis.axhline(scratch, color="black", linestyle="--", linewidth=1)
        axis.tick_params(axis="x", labelsize=7)
        low, high = min(scratch, *(mean - spread)), max(scratch, *(mean + spread))
        axis.set_ylim(low - 0.3 * (high - low) - 0.5, high + 0.1 * (high - low) + 0.5)
    axes[0].set_ylabel("per cent")
    return figure


def _generator_size(claims: Mapping[str, Mapping[str, Any]]) -> Figure:
    titles = {"acceptability": "acceptability (per cent)", "auc": "AUC, common generator"}
    figure, axes = panels(len(claims), 4.6, 3.4)
    for axis, (prefix, claim) in zip(axes, claims.items()):
        curve(axis, claim, {width: f"{prefix}_{name}" for name, width in WIDTHS.items()}, color=BLUE)
        for name, colour in WITHOUT_NETWORK.items():
            value = series(claim, [f"{prefix}_{name}"])[0][0]
            axis.axhline(value, color=colour, linestyle=":", label=f"{name} generator")
        if prefix == "acceptability":
            axis.axhline(series(claim, ["acceptability_scratch"])[0][0], color="black", ls="--", label="from scratch")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(WIDTHS.values()), ["1/8", "1/4", "1/2", "1"])
        axis.set(xlabel="width of the generator", title=titles[prefix])
        axis.legend(fontsize=8)
    return figure


def _sample_efficiency(claims: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, (axis,) = panels(width=5.2, height=3.5)
    scratch = series(next(iter(claims.values())), ["acceptability_scratch"])[0][0]
    axis.axhline(scratch, color="black", linestyle="--", linewidth=1, label="from scratch")
    for arm, claim in claims.items():
        tflop = series(claim, [f"tflop_{arm if length == '100' else f'{arm}_{length}'}" for length in LENGTHS])[0]
        metrics = {x: f"acceptability_{length}" for x, length in zip(tflop, LENGTHS)}
        curve(axis, claim, metrics, label={"electra": "ELECTRA", "mlm": "BERT"}[arm])
    axis.set_xscale("log", base=2)
    axis.set_xticks(tflop, [f"{value:.3g}" for value in tflop])
    axis.minorticks_off()
    axis.set(xlabel="training TFLOP", ylabel="acceptability (per cent)")
    axis.legend(fontsize=8)
    return figure


def _corrupted_sentence(rows: list[list[dict[str, Any]]]) -> Figure:
    width, height, size = 100.0, 2.6, 8.5  # a line in characters, its distance, points
    places: list[tuple[float, float, dict[str, Any]]] = []
    across, down = 0.0, 0.0
    for row in rows:
        for token in row:
            wide = _width(token)
            if across + wide > width:
                across, down = 0.0, down + height
            places.append((across, down, token))
            across += wide + 0.7
        across, down = 0.0, down + 1.5 * height
    figure, (axis,) = panels(width=9.5, height=0.15 * down + 0.8)
    colours = matplotlib.colormaps["Oranges"]
    for left, top, token in places:
        wide = _width(token)
        box = Rectangle((left, -top - 0.65), wide, 1.3, color=colours(0.85 * token["replaced"]), linewidth=0)
        axis.add_patch(box)
        font = {"family": "monospace", "ha": "center", "va": "center"}
        weight = "bold" if token["written"] else "normal"
        axis.text(left + wide / 2, -top, token["read"], fontsize=size, weight=weight, **font)
        if token["written"]:
            below = "=" if token["was"] == token["read"] else token["was"]
            axis.text(left + wide / 2, -top - 1.15, below, fontsize=size - 2, color="#2a6a2a", **font)
    axis.set_xlim(-0.5, width + 0.5)
    axis.set_ylim(-down, 1.2)
    axis.axis("off")
    bar = ScalarMappable(cmap=ListedColormap(colours(np.linspace(0, 0.85, 256))))
    figure.colorbar(bar, ax=axis, fraction=0.02, pad=0.01, label="p(replaced)")
    return figure


def _width(token: dict[str, Any]) -> float:
    """Characters that a token's box takes, with room for what stood there before."""
    return max(len(token["read"]), 0.8 * len(token["was"]) if token["written"] else 0.0) + 0.6


LOGGED = (
    ("mlm_loss", "masked-token cross-entropy (nats)"),
    ("main_loss", "main loss (nats a token)"),
    ("rtd_recall", "replaced tokens found"),
)


def draw_curves(folder: Path, arms: Sequence[Path]) -> None:
    """curves.png: what each arm logged in training (lines) and on held-out text (points)."""
    figure, axes = panels(len(LOGGED), 4.2, 3.4)
    for number, arm in enumerate(arms):
        logs = read_logs(arm)
        for axis, (key, label) in zip(axes, LOGGED):
            axis.set(xlabel="step", ylabel=label)
            for part, style in (("train", {"linewidth": 1.0}), ("held_out", {"marker": "o", "linestyle": "none"})):
                points = sorted(logs.get(f"{part}/{key}", {}).items())
                if points:
                    axis.plot(*zip(*points), color=f"C{number}", label=arm.name if part == "train" else None, **style)
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    save_figure(figure, folder / "curves.png")
