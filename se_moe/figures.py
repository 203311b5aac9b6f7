"""Plots of the claims, made from the same results file as the tables, so that they never disagree."""

from __future__ import annotations

from pathlib import Path

from common.figures import bars, panels, save_figure, series, small_claims

RED = "#e45756"  # the all-resident run


def draw_figures(results: Path, folder: Path) -> None:
    """Write every figure whose claim is in `results` (tier small), with its caption."""
    claims = small_claims(results)
    if "M2" in claims:
        figure, (axis,) = panels(width=5.5, height=3.4)
        bars(axis, claims["M2"], {n: f"speed_{n}" for n in ("none", "prefetch", "cache", "both")})
        axis.axhline(series(claims["M2"], ["speed_resident"])[0][0], color=RED, linestyle="--", label="all resident")
        axis.set_ylabel("tokens/s")
        axis.legend()
        caption = (
            "M2: tokens a second with neither, either and both of prefetch and cache, on a drive that is as slow as "
            "the computation (mean and deviation over seeds; the line is the all-resident run)."
        )
        save_figure(figure, folder / "tiers.png", caption)
    if "M3" in claims:
        figure, axes = panels(2, height=3.4, sharey=True)
        rules = ("decayed", "lfu", "lru", "text", "pseudocode")
        for axis, (trace, title) in zip(axes, {"gates": "recorded gates", "shift": "shifting Zipf"}.items()):
            bars(axis, claims["M3"], {rule: f"hit_rate_{rule}_{trace}" for rule in rules}, title)
            axis.set_ylabel("hit rate")
        caption = "M3: hit rates of the cache rules on recorded gates and under shifting popularity."
        save_figure(figure, folder / "cache.png", caption)
    if "M8" in claims:
        figure, axes = panels(2, 4, 3.4)
        times = {"serial": "time_ratio_serial", "ring, K = 2": "time_ratio_ring2", "ring, K = 4": "time_ratio"}
        bars(axes[0], claims["M8"], times)
        axes[0].axhline(1.0, color=RED, linestyle="--")
        axes[0].set_ylabel("time / resident")
        bars(axes[1], claims["M8"], {"K = 2": "device_share_ring2", "K = 4": "device_share"})
        axes[1].set_ylabel("device bytes / resident")
        caption = "M8: time and device memory of a pass through 12 layers, in parts of the all-resident pass."
        save_figure(figure, folder / "ring.png", caption)
    if "M9" in claims:
        figure, axes = panels(2, 4, 3.4)
        arms = {"ours": "resident", "ZeRO 0": "zero0", "ZeRO 2": "zero2"}
        for axis, metric, label in zip(axes, ("cpu", "peak_megabytes"), ("CPU-s per 1,000 tokens", "peak tensor MB")):
            bars(axis, claims["M9"], {name: f"{metric}_{arm}" for name, arm in arms.items()})
            axis.set_ylabel(label)
        caption = "M9: CPU seconds per 1,000 tokens and peak tensor memory of ours and of DeepSpeed."
        save_figure(figure, folder / "deepspeed.png", caption)
