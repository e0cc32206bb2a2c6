"""Detection against magnitude, one small chart for each kind of fault, as one SVG file without any dependency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, COLUMNS = 300, 170, 3
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 30, 32


def detection_plot(rates: Mapping[str, Sequence[tuple[float, float]]], limits: Mapping[str, float | None], path: Path) -> None:
    """Write it: for each kind the share of faults that were caught and named (0 to 1) at each magnitude, and its limit."""
    kinds = [kind for kind in rates if rates[kind]]
    rows = max(1, math.ceil(len(kinds) / COLUMNS))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{COLUMNS * WIDTH}" height="{rows * HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, kind in enumerate(kinds):
        x, y = WIDTH * (number % COLUMNS), HEIGHT * (number // COLUMNS)
        parts.append(f'<g transform="translate({x} {y})">{_chart(kind, rates[kind], limits.get(kind))}</g>')
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _chart(kind: str, points: Sequence[tuple[float, float]], limit: float | None) -> str:
    low, high = math.log10(points[0][0]), math.log10(points[-1][0])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(magnitude: float, share: float) -> tuple[float, float]:
        return LEFT + across * (math.log10(magnitude) - low) / ((high - low) or 1), TOP + down * (1 - share)

    said = "no limit below the largest" if limit is None else f"limit {limit:.2g}"
    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(kind)}</text>']
    parts.append(f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end" fill="#555">{said}</text>')
    for share in (0.0, 0.5, 1.0):
        y = TOP + down * (1 - share)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{share:.0%}</text>')
    for exponent in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        x, _ = place(10.0**exponent, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle" fill="#555">1e{exponent}</text>')
    if limit is not None:
        x, _ = place(limit, 0)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + down}" stroke="#b00" stroke-dasharray="3 3"/>')
    where = [place(magnitude, share) for magnitude, share in points]
    parts.append(
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in where)}" fill="none" stroke="#06c" stroke-width="2"/>'
    )
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#06c"/>' for x, y in where]
    return "".join(parts)
