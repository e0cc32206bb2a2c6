"""Charts as inline SVG that keep their text at reading size on any screen.

Horizontal positions are percentages of the chart's width and vertical ones pixels, so a chart narrows without
shrinking its letters. Shapes that SVG only allows in user units (paths) sit in a nested, stretched coordinate system
whose strokes do not stretch. Colours are classes of page.css; nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from statistics import median

from deploykit.report.markup import Markup, element

_WIDTH = 1000  # user units of the stretched coordinate system
_GOLDEN = 0.6180339887498949
ROWS_DRAWN = 40
DOTS_DRAWN = 400
SERIES = 4  # colours in page.css


@dataclass(frozen=True)
class Scale:
    """A linear horizontal axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], *, margin: float = 0.06) -> Scale:
        """An axis that shows all values with some room at both ends."""
        low, high = min(values), max(values)
        room = margin * ((high - low) or abs(high) or 1.0)
        return cls(low - room, high + room)

    def at(self, value: float) -> float:
        """Where a value lies, in percent of the width; values outside lie on the nearer end."""
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, *, about: int = 5, whole: bool = False) -> list[float]:
        """Round numbers inside the axis: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / about
        power = 10.0 ** floor(log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        if whole:
            step = max(1.0, step)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [step * index for index in range(first, last + 1)]


@dataclass(frozen=True)
class Mark:
    """A dot on a row: `hollow` for a reference, filled for what is judged."""

    value: float
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """One series of a curve: (x, y) points; `dashed` tells it from the other without colour."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def axis(scale: Scale, text: Callable[[float], str]) -> Markup:
    """Tick labels under rows that share a scale."""
    labels = [_label(scale.at(tick), 14, text(tick)) for tick in scale.ticks()]
    return element("svg", labels, class_="axis", width="100%", height=20, aria_hidden="true")


def strips(
    title: str,
    processes: Sequence[Sequence[float]],
    scale: Scale,
    *,
    middle: float | None,
    interval: Sequence[float] | None,
    series: int,
) -> Markup:
    """Every sample as a dot, one row for each process with its own median as a tick; median and interval over all rows.

    At most ROWS_DRAWN processes are drawn, and of each at most DOTS_DRAWN samples, evenly spaced in rank.
    """
    drawn = [process for process in processes if process][:ROWS_DRAWN]
    row = max(6.0, min(16.0, 200 / max(1, len(drawn))))
    height = row * len(drawn) + 4
    content: list[Markup | None] = [_grid(scale, height), _band(scale, interval, height)]
    for index, samples in enumerate(drawn):
        top = 2 + row * index
        content += [_dots(samples, scale, top, row), _tick(scale.at(median(samples)), top + 1, top + row - 1, "process")]
    if middle is not None:
        content.append(_tick(scale.at(middle), 0, height, "middle"))
    return _svg(title, height, *content, class_=_series(series))


def row(
    title: str,
    scale: Scale,
    marks: Sequence[Mark],
    *,
    interval: Sequence[float] | None = None,
    zero: float | None = None,
    limits: Sequence[float] = (),
    series: int = 0,
) -> Markup:
    """Dots on a line, an interval as a whisker with end caps; where nothing changes as a line, limits as dashed ones."""
    height, centre = 26, 13
    content = [_grid(scale, height), *(_tick(scale.at(value), 0, height, "limit") for value in limits)]
    if zero is not None:
        content.append(_tick(scale.at(zero), 0, height, "zero"))
    if interval is not None:
        low, high = (scale.at(bound) for bound in interval)
        content += [
            _line(low, centre, high, centre, "whisker"),
            _tick(low, centre - 5, centre + 5, "whisker"),
            _tick(high, centre - 5, centre + 5, "whisker"),
        ]
    # The filled dot comes last: when both lie on one spot, the ring shows around it.
    for mark in sorted(marks, key=lambda mark: not mark.hollow):
        radius, kind = (6.5, "hollow") if mark.hollow else (4.5, "dot")
        content.append(element("circle", cx=_percent(scale.at(mark.value)), cy=centre, r=radius, class_=kind))
    return _svg(title, height, *content, class_=_series(series))


def bar(title: str, value: float, samples: Sequence[float], highest: float, *, series: int) -> Markup:
    """A bar from zero to `value`, with the single measurements as dots on it."""
    scale, height = Scale(0.0, highest * 1.04), 22
    dots = [element("circle", cx=_percent(scale.at(sample)), cy=11, r=2.5, class_="sample") for sample in samples]
    body = element("rect", x=0, y=3, width=_percent(scale.at(value)), height=16, rx=2, class_="bar")
    return _svg(title, height, _tick(0, 0, height, "zero"), body, *dots, class_=_series(series))


def curve(title: str, lines: Sequence[Line], *, y_text: Callable[[float], str], ceiling: float | None = None) -> Markup:
    """Lines over a whole-numbered horizontal axis; the vertical one starts at zero unless all values are far from it.

    `ceiling` is the largest possible value (1 for a share); the axis does not pass it.
    """
    height, top, bottom = 190, 12, 166
    values = [y for line in lines for _, y in line.points]
    low, high = min(values), max(values)
    low = 0.0 if (low >= 0 and low < high / 2) or low == high else low - 0.05 * (high - low)
    high = high + 0.05 * (high - low or 1.0)
    high = min(high, ceiling) if ceiling is not None else high
    vertical = Scale(low, high if high > low else low + 1.0)
    first, last = min(x for line in lines for x, _ in line.points), max(x for line in lines for x, _ in line.points)
    span = (last - first) or 1.0
    horizontal = Scale(first - 0.15 * span, last + 0.03 * span)  # the vertical axis' labels stand in the room at the left

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * vertical.at(value) / 100

    content: list[Markup] = []
    for tick in vertical.ticks(about=4):
        content.append(_line(0, y_of(tick), 100, y_of(tick), "grid"))
        content.append(element("text", y_text(tick), x=0, y=y_of(tick) - 4, class_="tick"))
    for tick in horizontal.ticks(whole=True):
        if tick >= first:
            content.append(_label(horizontal.at(tick), bottom + 18, f"{tick:g}"))
    for index, line in enumerate(lines):
        content += _drawn(line, horizontal, y_of, height, index)
    return _svg(title, height, *content)


def swatch(series: int, *, dashed: bool = False, hollow: bool = False, dot: bool = False) -> Markup:
    """A legend's key: a piece of line, a dot or a ring."""
    if dot or hollow:
        shape = element("circle", cx=11, cy=6, r=5 if hollow else 4.5, class_="hollow" if hollow else "dot")
    else:
        shape = element("line", x1=0, y1=6, x2=22, y2=6, class_="curve dashed" if dashed else "curve")
    return element("svg", shape, class_=f"swatch {_series(series)}", width=22, height=12, aria_hidden="true")


def _drawn(line: Line, horizontal: Scale, y_of: Callable[[float], float], height: float, index: int) -> list[Markup]:
    points = " ".join(f"{_WIDTH / 100 * horizontal.at(x):.1f},{y_of(y):.1f}" for x, y in line.points)
    kind = "curve dashed" if line.dashed else "curve"
    last_x, last_y = line.points[-1]
    return [
        _stretched(height, element("polyline", points=points, class_=f"{kind} {_series(index)}")),
        element("circle", cx=_percent(horizontal.at(last_x)), cy=y_of(last_y), r=3.5, class_=f"dot {_series(index)}"),
    ]


def _dots(samples: Sequence[float], scale: Scale, top: float, row: float) -> Markup:
    """The samples inside the scale as one path of zero-length strokes: ten bytes a sample.

    They are spread over the row by the golden ratio, which fills it evenly and is the same every time.
    """
    inside = sorted(value for value in samples if isfinite(value) and scale.low <= value <= scale.high)
    if len(inside) > DOTS_DRAWN:
        inside = [inside[round(index * (len(inside) - 1) / (DOTS_DRAWN - 1))] for index in range(DOTS_DRAWN)]
    path = "".join(
        f"M{_WIDTH / 100 * scale.at(value):.1f} {top + row * (0.2 + 0.6 * (index * _GOLDEN % 1)):.1f}h0"
        for index, value in enumerate(inside)
    )
    return _stretched(top + row, element("path", d=path, class_="samples"))


def _stretched(height: float, content: Markup) -> Markup:
    """Content in user units: _WIDTH of them across the whole chart, one pixel each down."""
    box = f"0 0 {_WIDTH} {height:.6g}"
    return element("svg", content, width="100%", height=height, viewBox=box, preserveAspectRatio="none", overflow="visible")


def _svg(title: str, height: float, *content: Markup | None, class_: str = "") -> Markup:
    described = element("title", title)
    return element("svg", described, content, class_=f"chart {class_}".strip(), role="img", width="100%", height=height)


def _grid(scale: Scale, height: float) -> Markup:
    return element("g", [_tick(scale.at(tick), 0, height, "grid") for tick in scale.ticks()])


def _band(scale: Scale, interval: Sequence[float] | None, height: float) -> Markup | None:
    if interval is None:
        return None
    low, high = (scale.at(bound) for bound in interval)
    return element("rect", x=_percent(low), y=0, width=_percent(high - low), height=height, class_="band")


def _tick(x: float, top: float, bottom: float, kind: str) -> Markup:
    return _line(x, top, x, bottom, kind)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=_percent(x1), y1=y1, x2=_percent(x2), y2=y2, class_=kind)


def _label(x: float, y: float, text: str) -> Markup:
    """A tick's label, kept inside the chart at both ends."""
    anchor = "start" if x < 3 else "end" if x > 97 else "middle"
    return element("text", text, x=_percent(x), y=y, text_anchor=anchor, class_="tick")


def _percent(x: float) -> str:
    return f"{x:.2f}%"


def _series(index: int) -> str:
    return f"series-{index % SERIES}"
