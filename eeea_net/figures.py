"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

from pathlib import Path

from common.figures import bars, panels, save_figure, series, small_claims


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results`, with its caption."""
    claims = small_claims(results)
    if "E4" in claims:
        claim = claims["E4"]
        names = sorted(
            (name for name in claim["measured"][0] if name.removeprefix("hypervolume_").isdigit()),
            key=lambda name: int(name.rpartition("_")[2]),
        )
        mean, spread = series(claim, names)
        figure, (axis,) = panels()
        axis.errorbar(range(len(names)), mean, yerr=spread, marker="o", capsize=3, label="NSGA-II")
        axis.axhline(series(claim, ["hypervolume_random"])[0][0], color="black", linestyle="--", label="random search")
        axis.set_xlabel("generation")
        axis.set_ylabel("normalised hypervolume")
        axis.legend()
        caption = "E4: hypervolume of all networks trained so far, and of as many random ones (mean over seeds)."
        save_figure(figure, folder / "hypervolume.png", caption)
    if "E1" in claims and "E1f" in claims:
        figure, axes = panels(2, width=3.4)
        metrics = {"parameters": "parameters_ratio", "MACs": "macs_ratio", "CPU seconds": "seconds_ratio"}
        for axis, name, title in zip(axes, ("E1", "E1f"), ("first generation", "and children")):
            bars(axis, claims[name], metrics, f"filtered: {title}")
            axis.axhline(1.0, color="black", linewidth=0.8)
        axes[0].set_ylabel("over the unfiltered search")
        caption = "E1 and E1f: what a search trains with beta at the 30th percentile, over the search without a filter."
        save_figure(figure, folder / "cost.png", caption)
    if "E2" in claims and "E3" in claims:
        figure, axes = panels(2, width=3.6)
        first = {"random": "error_random", "no beta": "error_unfiltered", "beta 50th": "error_beta50"}
        bars(axes[0], claims["E2"], first)
        bars(axes[1], claims["E3"], {"beta 30th": "error_beta30", "beta 70th": "error_beta70"})
        axes[0].set_ylabel("best validation error %")
        save_figure(figure, folder / "errors.png", "E2 and E3: best validation error by beta (mean over seeds).")
    transfers = {"E6": ("AP50", "ap50"), "E6s": ("mIoU", "miou"), "E6p": ("keypoint AP", "ap")}
    if transfers.keys() <= claims.keys():
        figure, axes = panels(3, width=2.6)
        for axis, (name, (title, metric)) in zip(axes, transfers.items()):
            bars(axis, claims[name], {"searched": f"{metric}_searched", "MobileNetV3": f"{metric}_mobilenetv3"}, title)
        axes[0].set_ylabel("%")
        caption = "E6, E6s and E6p: detection, segmentation and pose on Shapes with backbones of equal MACs."
        save_figure(figure, folder / "transfer.png", caption)
