"""Small inline SVG pictures: seeds against a target, ratios against one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, EDGE, MIDDLE = 360.0, 56.0, 14.0, 22.0


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: up to `digits` significant digits, no exponent where it can be avoided."""
    if value is None:
        return "not finite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}".replace(",", "\u202f")
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}".replace(",", "\u202f")
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    return f"{value:.{digits - 1}g}".replace("-", "−")


def spread(mean: float | None, std: float | None) -> str:
    """`mean ± std`, the mean to the digit at which the deviation begins."""
    if mean is None or std is None:
        return "not finite"
    if std == 0 or not 1e-6 < std < 1e6:
        return number(mean) + (" ± 0" if std == 0 else "")
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}".replace("-", "−")


def seed_plot(metric: str, values: Sequence[float | None], op: str, target: float, mean: float | None) -> str:
    """Dots for the seeds, a bar for their mean, a line at the target and a tint on the side where the claim holds."""
    finite = [value for value in values if value is not None]
    low, high = min([*finite, target]), max([*finite, target])
    pad = (high - low) * 0.14 or max(abs(high) * 0.1, 1e-9)
    low, high = low - pad, high + pad

    def at(value: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * (value - low) / (high - low)

    t = at(target)
    left, right = (t, WIDTH - EDGE) if op.startswith(">") else (EDGE, t)
    anchor = "start" if t < WIDTH * 0.2 else "end" if t > WIDTH * 0.8 else "middle"
    symbol = {">=": "≥", "<=": "≤"}.get(op, op)
    described = f"{metric}: seeds {', '.join(number(v) for v in values)}; target {symbol} {number(target)}"
    shapes = [
        f'<rect class="pass" x="{left:.1f}" y="6" width="{max(0.0, right - left):.1f}" height="32" rx="3"/>',
        f'<line class="axis" x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{MIDDLE}" y2="{MIDDLE}"/>',
        f'<line class="target" x1="{t:.1f}" x2="{t:.1f}" y1="3" y2="41"/>',
        f'<text class="tick" x="{t:.1f}" y="51.5" text-anchor="{anchor}">'
        f"target {escape(symbol)} {number(target)}</text>",
    ]
    if mean is not None:
        shapes.append(f'<line class="mean" x1="{at(mean):.1f}" x2="{at(mean):.1f}" y1="11" y2="33"/>')
    shapes += [f'<circle class="seed" cx="{at(value):.1f}" cy="{MIDDLE}" r="5"/>' for value in finite]
    return (
        f'<svg class="seeds" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(described)}">'
        f"<title>{escape(described)}</title>{''.join(shapes)}</svg>"
    )


def rung_plot(
    metric: str,
    points: Sequence[tuple[int, Sequence[float | None], float | None]],
    op: str,
    target: float,
) -> str:
    """A metric against the budget: dots for seeds, a line through the means, the target dashed, its good side tinted.

    Args:
        points: (multiple of the budget, values of the seeds, their mean), with rising multiples; the axis of budgets is
            logarithmic.
    """
    finite = [value for _, values, _ in points for value in values if value is not None]
    low, high = min([*finite, target]), max([*finite, target])
    pad = (high - low) * 0.14 or max(abs(high) * 0.1, 1e-9)
    low, high = low - pad, high + pad
    left, right, top, bottom = 14.0, WIDTH - 14.0, 8.0, 112.0
    first, last = math.log(points[0][0]), math.log(points[-1][0])

    def across(rung: int) -> float:
        return left + 24 + (right - left - 48) * (math.log(rung) - first) / max(last - first, 1e-9)

    def down(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    line = down(target)
    y, height = (top, line - top) if op.startswith(">") else (line, bottom - line)
    told = "; ".join(f"{rung}x: {number(mean)}" for rung, _, mean in points)
    symbol = {">=": "≥", "<=": "≤"}.get(op, op)
    described = f"{metric} against the budget: {told}; target {symbol} {number(target)}"
    means = [(across(rung), down(mean)) for rung, _, mean in points if mean is not None]
    shapes = [
        f'<rect class="pass" x="{left}" y="{y:.1f}" width="{right - left}" height="{max(0.0, height):.1f}" rx="3"/>',
        f'<line class="target" x1="{left}" x2="{right}" y1="{line:.1f}" y2="{line:.1f}"/>',
        f'<polyline class="mean" fill="none" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in means)}"/>',
    ]
    for rung, values, _ in points:
        x = across(rung)
        shapes.append(f'<text class="tick" x="{x:.1f}" y="126" text-anchor="middle">{rung}x</text>')
        shapes += [f'<circle class="seed" cx="{x:.1f}" cy="{down(v):.1f}" r="4"/>' for v in values if v is not None]
    return (
        f'<svg class="rungs" viewBox="0 0 {WIDTH:.0f} 130" role="img" aria-label="{escape(described)}">'
        f"<title>{escape(described)}</title>{''.join(shapes)}</svg>"
    )


def ratio_plot(ratio: float, target: float | None, widest: float) -> str:
    """A bar that starts at 1 (no difference) and grows right when we are better, on a logarithmic scale.

    widest: the largest ratio or inverse ratio of the table, so that the bars of one table compare.
    """
    half, middle, reach = 88.0, 94.0, math.log(max(widest, 1.25))

    def at(value: float) -> float:
        return middle + half * max(-1.0, min(1.0, math.log(value) / reach))

    end, side = at(ratio), "better" if ratio >= 1 else "worse"
    x, width = min(end, middle), max(abs(end - middle), 1.5)
    mark = ""
    if target is not None and target != 1:
        mark = f'<line class="target" x1="{at(target):.1f}" x2="{at(target):.1f}" y1="1" y2="19"/>'
    label = f"ratio {number(ratio, 3)}" + (f", target {number(target, 3)}" if target is not None else "")
    return (
        f'<svg class="ratio" viewBox="0 0 188 20" role="img" aria-label="{label}">'
        f'<rect class="{side}" x="{x:.1f}" y="4" width="{width:.1f}" height="12" rx="2"/>'
        f'<line class="one" x1="{middle}" x2="{middle}" y1="0" y2="20"/>{mark}</svg>'
    )
