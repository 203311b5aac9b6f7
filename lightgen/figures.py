"""Plots made by the code that makes the numbers: the course of preferences, sizes of sets, iterations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.figures import bars, curve, panels, save_figure, small_claims
from common.training import read_logs
from lightgen.geneval import COLUMNS

if TYPE_CHECKING:
    from lightgen.experiments import Study


def preference_figure(folder: Path) -> Path | None:
    """`preferences.png` of a run: implicit accuracy, margin, and whether the errors themselves rise."""
    logs = read_logs(folder / "dpo")
    if "train/accuracy" not in logs:
        return None
    figure, (accuracy, margin, errors) = panels(3)
    for axis, names in (
        (accuracy, {"accuracy": "share of pairs"}),
        (margin, {"margin": "margin"}),
        (errors, {"winner_change": "winner", "loser_change": "loser"}),
    ):
        for name, label in names.items():
            found = logs[f"train/{name}"]
            axis.plot(list(found), list(found.values()), label=label)
        axis.set_xlabel("step")
    accuracy.set_ylabel("implicit accuracy")
    accuracy.set_ylim(0, 1)
    margin.set_ylabel("-0.5 beta (gain of winner - gain of loser)")
    errors.set_ylabel("squared error less the reference's")
    errors.axhline(0, color="black", linewidth=0.8)
    errors.legend()
    caption = (
        "DPO: share of pairs whose winner gained more, the margin, and both raw errors against the reference's: a "
        "margin that grows while both rise is a model that gets worse."
    )
    return save_figure(figure, folder / "preferences.png", caption)


def draw_figures(ledger: Path, study: Study, folder: Path) -> None:
    """What the ledger allows: before and after DPO (D), size of the set (B), iterations (F)."""
    claims = small_claims(ledger)
    if "D" in claims:
        figure, axes = panels(1, width=7)
        width = 0.27
        for number, arm in enumerate(("before", "sft", "dpo")):
            rows = claims["D"]["measured"]
            heights = [sum(row[f"{column}_{arm}"] for row in rows) / len(rows) for column in COLUMNS]
            axes[0].bar([i + (number - 1) * width for i in range(len(COLUMNS))], heights, width, label=arm)
        axes[0].set_xticks(range(len(COLUMNS)), list(COLUMNS), rotation=20)
        axes[0].set_ylabel("share of pictures that show the prompt")
        axes[0].legend()
        save_figure(figure, folder / "columns.png", "The six columns before preferences, after SFT and after DPO.")
    if "B" in claims:
        figure, (axis,) = panels()
        sizes = study.sizes.set_sizes
        curve(axis, claims["B"], {size: f"overall_{size}" for size in sizes}, label="overall")
        axis.set_xscale("log")
        axis.set_xlabel("pictures of the set")
        axis.set_ylabel("overall")
        save_figure(figure, folder / "set_size.png", "Overall score against the number of training pictures.")
    if "F" in claims:
        figure, (score, seconds) = panels(2)
        steps = study.sizes.iterations
        curve(score, claims["F"], {k: f"overall_{k}" for k in steps})
        curve(seconds, claims["F"], {k: f"seconds_{k}" for k in steps})
        for axis, name in ((score, "overall"), (seconds, "seconds of all pictures")):
            axis.set_xlabel("iterations")
            axis.set_xscale("log", base=2)
            axis.set_ylabel(name)
        save_figure(figure, folder / "iterations.png", "Score and time against the number of decoding iterations.")
    if "C" in claims:
        figure, (axis,) = panels()
        names = {"mirrored": "sides_flip", "DPO": "sides_dpo", "SFT": "sides_sft", "no mirroring": "sides_plain"}
        bars(axis, claims["C"], names, "left and right that are right")
        save_figure(figure, folder / "sides.png", "Left and right: mirrored training, and what preferences repair.")
