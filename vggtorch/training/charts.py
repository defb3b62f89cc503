"""Line charts as SVG that fit any width and follow the colours of the page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vggtorch.text import in_html

COLOURS = ("#3b82c4", "#d9730d", "#2a9d6f", "#8a63d2")  # told apart on light and on dark
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 260, 62, 16, 56, 40


def curves_svg(curves: dict[str, Sequence[float]], title: str) -> str:
    """A line for each named curve over the epochs 1, 2, ...; SVG text."""
    points = {name: list(enumerate(values, 1)) for name, values in curves.items()}
    return chart(points, title, "epoch", whole=True)


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers between two values: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0.13, 0.87), ticks(1, 12, whole=True), ticks(3, 3)
    ([0.2, 0.4, 0.6, 0.8], [5.0, 10.0], [3.0])
    """
    if high <= low:
        return [float(low)]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(1.0, round(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(float(i * step), 12) for i in range(first, last + 1)]


def chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    axis: str,
    mark: float | None = None,
    *,
    whole: bool = False,
    logarithmic: bool = False,
) -> str:
    """Named lines of (x, y) with axes, whole labels and a legend; a dashed line at `mark`.

    A y that isn't finite is left out. `axis` is what x is, of which `whole` numbers alone have
    labels, or powers of ten on a logarithmic scale.
    """
    xs = [x for line in lines.values() for x, _ in line] + ([] if mark is None else [mark])
    ys = [y for line in lines.values() for _, y in line if np.isfinite(y)]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys)) if ys else (0.0, 1.0)
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    labels = ticks(x0, x1, whole=whole)
    if logarithmic:
        powers = range(math.ceil(scale(x0) - 1e-9), math.floor(scale(x1) + 1e-9) + 1)
        labels = [10.0**power for power in powers] or labels
    room = (y1 - y0) * 0.06 or abs(y1) * 0.06 or 0.5
    y0, y1 = y0 - room, y1 + room

    def across(x: float) -> float:
        share = (scale(x) - scale(x0)) / (scale(x1) - scale(x0)) if x1 > x0 else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'style="width:100%;max-width:{WIDTH * 1.4:.0f}px;height:auto" font-family="sans-serif" '
        f'font-size="12" fill="currentColor"><title>{in_html(title)}</title>'
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600">{in_html(title)}</text>'
    ]
    for x in labels:
        at = f'x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 17}"'
        parts.append(f'<text {at} text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle" '
        f'opacity=".7">{in_html(axis)}</text>'
    )
    for y in ticks(y0, y1, 4):
        parts.append(
            f'<path d="M{LEFT} {down(y):.1f}H{WIDTH - RIGHT}" stroke="currentColor" opacity=".15"/>'
            f'<text x="{LEFT - 7}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    if mark is not None:
        parts.append(
            f'<path d="M{across(mark):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="currentColor" '
            f'opacity=".5" stroke-dasharray="4"/>'
        )
    place = LEFT
    for colour, (name, line) in zip(COLOURS * len(lines), lines.items(), strict=False):
        drawn = [(across(x), down(y)) for x, y in line if np.isfinite(y)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        if len(drawn) <= 40:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in drawn
            ]
        parts.append(
            f'<rect x="{place}" y="29" width="12" height="12" rx="2" fill="{colour}"/>'
            f'<text x="{place + 17}" y="40">{in_html(name)}</text>'
        )
        place += 34 + 7 * len(name)
    return "".join(parts) + "</svg>"
