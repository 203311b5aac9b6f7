"""Plots made by the code that makes the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.figures import bars, panels, save_figure, small_claims


def draw_figures(ledger: Path, folder: Path) -> None:
    """What the ledger allows: PSNR of the arms of claims A, B and E."""
    claims = small_claims(ledger)
    if not {"A", "B", "E"} <= claims.keys():
        return
    figure, axes = panels(3)
    shown = (
        ("A", {"8 x 32 bits": "psnr_binary", "8 x VQ 1024": "psnr_vq"}, "equal number of tokens"),
        ("B", {"in a line": "psnr_line", "4 x 4 grid": "psnr_grid"}, "16 tokens of 32 bits"),
        ("E", {"decoded whole": "psnr_whole", "scaled up": "psnr_scaled_up"}, "one code at 32 px"),
    )
    for axis, (claim, metrics, title) in zip(axes, shown):
        bars(axis, claims[claim], metrics, title)
        axis.set_ylabel("PSNR, dB")
    caption = "PSNR on held-out emoji: bits against one-hot codes, a line against a grid, one code at two sizes."
    save_figure(figure, folder / "tokenizer.png", caption)


def draw_rates(rows: Sequence[Mapping[str, Any]], size: int, path: Path) -> Path:
    """Distortion against bits a picture of `size` x `size` pixels: of each family all points, and a curve through the
    best (by PSNR) at each number of bits."""
    figure, axes = panels(3)
    keys = {"psnr": "PSNR, dB", "lpips": "LPIPS form", "rkid": "r-KID"}
    for axis, (key, label) in zip(axes, keys.items()):
        for family in dict.fromkeys(row["family"] for row in rows):
            own = [row for row in rows if row["family"] == family]
            best = {row["bits"]: row[key] for row in sorted(own, key=lambda row: row["psnr"])}
            (line,) = axis.plot(*zip(*sorted(best.items())), label=family)
            axis.scatter([row["bits"] for row in own], [row[key] for row in own], s=10, color=line.get_color())
        axis.set_xscale("log")
        axis.set_xlabel("bits a picture")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    families = ", ".join(dict.fromkeys(row["family"] for row in rows))
    caption = f"What a picture of {size} x {size} pixels keeps at so many bits: {families}."
    return save_figure(figure, path, caption)
