"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.files import write_atomically, write_json
from common.training import read_logs

CAPTIONS = {
    "learning_curves.png": "Pre-training on held-out text against training FLOPs (fixed masks and samples; mean and "
    "deviation over seeds): masked-token loss of the generator (of BERT: of the network itself), AUC and recall of "
    "replaced tokens.",
    "table5.png": "E3, the paper's table 5 at small scale: five objectives at equal FLOPs, beside the network from "
    "scratch (dashed; mean and deviation over seeds; axes do not begin at 0).",
    "generator_size.png": "E4, the paper's figure 3: the discriminator against the width of its generator, at equal "
    "steps; left fine-tuned, right on samples of one common generator.",
    "sample_efficiency.png": "E7, the paper's table 1 and figure 4: acceptability against training FLOPs, a schedule a "
    "length; dashed from scratch.",
    "corrupted_sentence.png": "Held-out text as the discriminator of the first seed reads it: the darker, the more "
    "probably replaced; below a replaced token what stood there (=: the generator was right).",
}
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
BLUE = "#4878a8"


def draw_figures(results: Path, folder: Path, study: Path) -> None:
    """Write every figure whose claim is in `results`, and captions.json for the report.

    Args:
        study: folder of the arms' logs and of the example (`experiments.Study`); what is not there is left out.
    """
    claims = {c["id"]: c for c in json.loads(results.read_text())["claims"] if c["tier"] == "small"}
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "learning_curves.png": _learning_curves(study / "arms"),
        "table5.png": _table5(claims.get("E3")),
        "generator_size.png": _generator_size(claims.get("E4a"), claims.get("E4b")),
        "sample_efficiency.png": _sample_efficiency(claims.get("E7a"), claims.get("E7b")),
        "corrupted_sentence.png": _corrupted_sentence(study / "example.json"),
    }
    for name, figure in plots.items():
        if figure is not None:
            figure.tight_layout()
            figure.savefig(folder / name, dpi=110, metadata={"Software": None})
            plt.close(figure)
    write_json(folder / "captions.json", {k: v for k, v in CAPTIONS.items() if (folder / k).is_file()})


def _series(claim: dict[str, Any], keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over seeds of several metrics."""
    values = np.array([[row[key] for key in keys] for row in claim["measured"]], dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(keys))


def _learning_curves(arms: Path) -> Any:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in OBJECTIVES:
        logs = [json.loads(path.read_text()) for path in sorted(arms.glob(f"{name}-seed[0-2].json"))]
        # Arms of one name have the same checkpoints; a log of other settings would not stack.
        logs = [log for log in logs if [p["step"] for p in log["curve"]] == [p["step"] for p in logs[0]["curve"]]]
        if logs:
            found[name] = logs
    if not found:
        return None
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.2 * len(CURVES), 3.5))
    for number, (name, logs) in enumerate(found.items()):
        one_step = logs[0]["tflop"] / logs[0]["steps"]
        tflop = [point["step"] * one_step for point in logs[0]["curve"]]
        for axis, key in zip(axes, CURVES):
            if any(key not in point for log in logs for point in log["curve"]):
                continue
            values = np.array([[point[key] for point in log["curve"]] for log in logs], dtype=float)
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            label = OBJECTIVES[name].replace("\n", " ")
            axis.errorbar(tflop, values.mean(0), yerr=spread, marker=".", capsize=2, color=f"C{number}", label=label)
    for axis, title in zip(axes, CURVES.values()):
        axis.set(xlabel="training TFLOP", title=title)
    axes[0].legend(fontsize=8)
    return figure


def _table5(claim: dict[str, Any] | None) -> Any:
    if claim is None:
        return None
    tasks = [task for task in TASK_NAMES if all(f"{task}_scratch" in row for row in claim["measured"])]
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        mean, spread = _series(claim, [f"{task}_{name}" for name in OBJECTIVES])
        scratch = _series(claim, [f"{task}_scratch"])[0][0]
        axis.bar(range(len(OBJECTIVES)), mean, yerr=spread, capsize=3, color=BLUE)
        axis.axhline(scratch, color="black", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES.values()), fontsize=7)
        low = min(scratch, *(mean - spread))
        high = max(scratch, *(mean + spread))
        axis.set_ylim(low - 0.3 * (high - low) - 0.5, high + 0.1 * (high - low) + 0.5)
        axis.set_title(TASK_NAMES[task])
    axes[0][0].set_ylabel("per cent")
    return figure


def _generator_size(auc: dict[str, Any] | None, tuned: dict[str, Any] | None) -> Any:
    panels = {"acceptability": tuned, "auc": auc}
    titles = {"acceptability": "acceptability (per cent)", "auc": "AUC, common generator"}
    drawn = {prefix: claim for prefix, claim in panels.items() if claim is not None}
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.4), squeeze=False)
    for axis, (prefix, claim) in zip(axes[0], drawn.items()):
        mean, spread = _series(claim, [f"{prefix}_{name}" for name in WIDTHS])
        axis.errorbar(list(WIDTHS.values()), mean, yerr=spread, marker="o", capsize=3, color=BLUE)
        for name, colour in WITHOUT_NETWORK.items():
            value = _series(claim, [f"{prefix}_{name}"])[0][0]
            axis.axhline(value, color=colour, linestyle=":", label=f"{name} generator")
        if prefix == "acceptability":
            axis.axhline(_series(claim, ["acceptability_scratch"])[0][0], color="black", ls="--", label="from scratch")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(WIDTHS.values()), ["1/8", "1/4", "1/2", "1"])
        axis.set(xlabel="width of the generator", title=titles[prefix])
        axis.legend(fontsize=8)
    return figure


def _sample_efficiency(electra: dict[str, Any] | None, mlm: dict[str, Any] | None) -> Any:
    arms = {"electra": ("ELECTRA", electra), "mlm": ("BERT", mlm)}
    figure = None
    for arm, (label, claim) in arms.items():
        if claim is None:
            continue
        if figure is None:
            figure, axis = plt.subplots(figsize=(5.2, 3.5))
            scratch = _series(claim, ["acceptability_scratch"])[0][0]
            axis.axhline(scratch, color="black", linestyle="--", linewidth=1, label="from scratch")
        names = [arm if length == "100" else f"{arm}_{length}" for length in LENGTHS]
        tflop = _series(claim, [f"tflop_{name}" for name in names])[0]
        mean, spread = _series(claim, [f"acceptability_{length}" for length in LENGTHS])
        axis.errorbar(tflop, mean, yerr=spread, marker="o", capsize=3, label=label)
    if figure is None:
        return None
    axis.set_xscale("log", base=2)
    axis.set_xticks(tflop, [f"{value:.3g}" for value in tflop])
    axis.minorticks_off()
    axis.set(xlabel="training TFLOP", ylabel="acceptability (per cent)")
    axis.legend(fontsize=8)
    return figure


def _corrupted_sentence(path: Path) -> Any:
    if not path.is_file():
        return None
    width, height, size = 100.0, 2.6, 8.5  # a line in characters, its distance, points
    places: list[tuple[float, float, dict[str, Any]]] = []
    across, down = 0.0, 0.0
    for row in json.loads(path.read_text()):
        for token in row:
            wide = _width(token)
            if across + wide > width:
                across, down = 0.0, down + height
            places.append((across, down, token))
            across += wide + 0.7
        across, down = 0.0, down + 1.5 * height
    figure, axis = plt.subplots(figsize=(9.5, 0.15 * down + 0.8))
    colours = plt.get_cmap("Oranges")
    for left, top, token in places:
        wide = _width(token)
        box = plt.Rectangle((left, -top - 0.65), wide, 1.3, color=colours(0.85 * token["replaced"]), linewidth=0)
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
    bar = plt.cm.ScalarMappable(cmap=matplotlib.colors.ListedColormap(colours(np.linspace(0, 0.85, 256))))
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
    figure, axes = plt.subplots(1, len(LOGGED), figsize=(4.2 * len(LOGGED), 3.4))
    for number, arm in enumerate(arms):
        logs = read_logs(arm)
        for axis, (key, label) in zip(axes, LOGGED):
            axis.set(xlabel="step", ylabel=label)
            for part, style in (("train", {"linewidth": 1.0}), ("held_out", {"marker": "o", "linestyle": "none"})):
                points = sorted(logs.get(f"{part}/{key}", {}).items())
                if points:
                    name = arm.name if part == "train" else None
                    axis.plot(*zip(*points), color=f"C{number}", label=name, **style)  # type: ignore[arg-type]
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    figure.tight_layout()
    write_atomically(
        folder / "curves.png",
        lambda path: figure.savefig(path, dpi=110, format="png", metadata={"Software": None}),
    )
    plt.close(figure)
