"""Plots made by the code that makes the numbers: FD of arms, agreement by band, what the exchange of bands does."""

from __future__ import annotations

from pathlib import Path

from common.figures import bars, curve, panels, save_figure, small_claims

BANDS = ("0.5-2", "2-4", "4-8", "8-12", "above")  # cycles per picture of 32 pixels


def draw_figures(ledger: Path, folder: Path) -> None:
    """What the ledger allows: arms and their agreement with the teacher (H1, H2), exchange (H3x), tasks (H6)."""
    claims = small_claims(ledger)
    if {"H1", "H2"} <= claims.keys():
        figure, (distances, agreement) = panels(2)
        names = {"frozen": "fd_data_frozen", "two steps": "fd_data_two", "HiPA": "fd_data_hipa", "many": "fd_data_many"}
        bars(distances, claims["H1"], names, "FD to held-out data")
        distances.set_yscale("log")
        for claim, arm, label in (
            ("H1", "frozen", "frozen"),
            ("H2", "pixel", "pixel loss only"),
            ("H2", "spatial", "spatial loss only"),
            ("H2", "hipa", "HiPA"),
        ):
            places = {i: f"coherence_{i}_{arm}" for i in range(len(BANDS))}
            curve(agreement, claims[claim], places, label=label)
        agreement.set_xticks(range(len(BANDS)), BANDS)
        agreement.set_xlabel("cycles per picture")
        agreement.set_ylabel("coherence with many steps")
        agreement.legend(fontsize=7)
        caption = "One step before and after adaptation: FD, and agreement with the many-step picture by frequency."
        save_figure(figure, folder / "one_step.png", caption)
    if "H3x" in claims:
        figure, (errors, exchange) = panels(2)
        curve(errors, claims["H3x"], {i: f"error_{i}" for i in range(len(BANDS))})
        errors.set_xticks(range(len(BANDS)), BANDS)
        errors.set_xlabel("cycles per picture")
        errors.set_ylabel("relative error of one step")
        low, high = "fd_low_one_high_many", "fd_low_many_high_one"
        names = {"one step": "fd_one", "low of one": low, "high of one": high, "many": "fd_many"}
        bars(exchange, claims["H3x"], names, "FD to held-out data")
        caption = "What the frozen model's one step lacks: error by frequency, and FD after exchanging bands at H/8."
        save_figure(figure, folder / "lacking.png", caption)
    if "H6" in claims:
        figure, axes = panels(3)
        for axis, task in zip(axes, ("editing", "inpainting", "superres")):
            names = {"unadapted": f"perceptual_{task}_frozen", "adapted": f"perceptual_{task}_hipa"}
            bars(axis, claims["H6"], names, task)
        axes[0].set_ylabel("distance to the base's many steps")
        save_figure(figure, folder / "tasks.png", "One step of three tasks, before and after adaptation.")
