"""Targets and predictions as tables for a terminal, and the roofline as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from typing import TYPE_CHECKING

from rich.table import Table

from deploykit.report.markup import Markup, element
from deploykit.report.tables import render, table
from deploykit.targets import UNITS, Target, jetpack

if TYPE_CHECKING:
    from deploykit.forecast import Choice
    from deploykit.targets.latency import LayerTime, Prediction

_LISTED = 15
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 420, 64, 46
_STYLE = (
    "text{font:12px sans-serif;fill:#444}.grid{stroke:#e4e4e4}.roof{fill:none;stroke:#0b63b0;stroke-width:2}"
    ".dot{fill:#b84a00;fill-opacity:.55;stroke:#b84a00}.page{fill:#fff}"
)


def targets(found: Sequence[Target]) -> str:
    """All boards, one line each."""
    rows = table("", "target", "", "SMs, cores", "INT8 TOPS", "FP16", "GB/s", "modes", "TensorRT")
    for board in found:
        releases = jetpack.of(board)
        rows.add_row(
            board.name,
            board.title,
            f"{board.value('sm') or board.value('cores'):.0f}",
            *(f"{board.value(name):.4g}" if board.value(name) else "-" for name in ("int8_tops", "fp16_tops", "bandwidth_gbs")),
            str(len(board.modes) or "-"),
            releases[-1].tensorrt if releases else "",
        )
    return render([rows, "rates are dense, and of the GPU without DLA; * aliases: " + ", ".join(_aliases(found))])


def target(board: Target) -> str:
    """One board: every figure with its source, its power modes, and what software runs on it."""
    aliases = f" ({', '.join(board.aliases)})" if board.aliases else ""
    kind = (
        f"compute capability {board.compute_capability}" if board.kind == "gpu" else f"{board.arch}, {', '.join(board.features)}"
    )
    figures = table("", "figure", "", "", "from")
    for name, figure in board.figures.items():
        source = f"derived: {figure.source}" if figure.derived else figure.source
        figures.add_row(name, f"{figure.value:g}", UNITS[name], source)
    parts: list[Table | str] = [f"{board.name}{aliases}: {board.title}, {kind}", figures]
    if board.modes:
        modes = table("", "power mode", "number", "W", "SMs", "GPU MHz", "GB/s", "from")
        for mode in board.modes:
            numbers = (f"{value:g}" for value in (mode.id, mode.watts, mode.sm, mode.gpu_mhz, mode.bandwidth_gbs))
            modes.add_row(mode.name, *numbers, mode.source)
        parts.append(modes)
    if board.is_jetson:
        software = table("", "JetPack", "L4T", "Ubuntu", "Python", "CUDA", "TensorRT", "cuDNN")
        for release in jetpack.of(board):
            software.add_row(
                release.jetpack, release.l4t, release.ubuntu, release.python, release.cuda, release.tensorrt, release.cudnn
            )
        parts.append(software)
    return render(parts)


def prediction(found: Prediction) -> str:
    """The latency with its interval, what dominates it, and whether measurements cover the case."""
    low, high = (_ms(bound) for bound in found.interval_ns)
    where = f"{found.target}{f' in mode {found.mode}' if found.mode else ''}"
    parts: list[Table | str] = [
        f"{found.network} on {where}, {found.precision}, batch {found.batch}: {_ms(found.latency_ns)} ms, "
        f"with 80 % between {low} and {high} ms",
        f"{found.images_per_second:,.0f} images/s; about {_ms(found.fixed_ns)} ms + batch x {_ms(found.per_image_ns)} ms",
    ]
    parts += ["the constants are fitted on measurements of this device"] * found.calibrated
    parts += [f"OUTSIDE WHAT THE DATA COVERS: {reason}; the interval means nothing" for reason in found.outside]
    total = sum(layer.time_ns for layer in found.layers)
    bounds = {
        bound: sum(layer.time_ns for layer in found.layers if layer.bound == bound) for bound in ("floor", "compute", "memory")
    }
    told = ", ".join(
        f"{100 * time / total:.0f} % by {bound}" for bound, time in sorted(bounds.items(), key=lambda item: -item[1])
    )
    parts.append(f"{len(found.layers)} kernels; time bound {told}")
    rows = table(f"the slowest {min(_LISTED, len(found.layers))}", "kernel", "operators", "", "bound by", "us", "%", "Mop", "KiB")
    for layer in sorted(found.layers, key=lambda layer: -layer.time_ns)[:_LISTED]:
        rows.add_row(*_layer(layer, total))
    return render([*parts, rows])


def choices(found: Sequence[Choice], budget_ns: float) -> str:
    """What keeps a budget."""
    rows = table("", "", "network", "precision", "batch", "ms", "80 %", "images/s")
    for choice in found:
        low, high = (_ms(bound) for bound in choice.prediction.interval_ns)
        rows.add_row(
            choice.fits,
            choice.network,
            choice.prediction.precision,
            str(choice.prediction.batch),
            _ms(choice.prediction.latency_ns),
            f"{low} to {high}",
            f"{choice.prediction.images_per_second:,.0f}",
        )
    reasons = dict.fromkeys(reason for choice in found for reason in choice.prediction.outside)
    outside = [f"OUTSIDE WHAT THE DATA COVERS: {reason}" for reason in reasons]
    return render([f"budget {_ms(budget_ns)} ms a query: fits where the whole interval is below it", rows, *outside])


def roofline(found: Prediction, board: Target) -> Markup:
    """Every kernel at its operations per byte and its rate, under the roof of the target; areas are shares of time."""
    dots = [layer for layer in found.layers if layer.operations]
    peak, bandwidth = board.rate(found.precision), 1e9 * board.value("bandwidth_gbs")
    intensities = [layer.operations / layer.bytes for layer in dots] or [1.0]
    rates = [1e9 * layer.operations / layer.time_ns for layer in dots] or [peak]
    x = _Axis(min(0.5, *intensities), max(2 * peak / bandwidth, *intensities), _LEFT, _WIDTH - 16)
    y = _Axis(min(peak / 1e4, *rates), peak * 2, _HEIGHT - _BOTTOM, 16)
    total = sum(layer.time_ns for layer in found.layers)
    marks = [
        element(
            "circle",
            element("title", f"{layer.layer.name}: {layer.time_ns / 1e3:.1f} us"),
            cx=x.at(intensity),
            cy=y.at(rate),
            r=2 + 60 * (layer.time_ns / total) ** 0.5 / 2,
            class_="dot",
        )
        for layer, intensity, rate in zip(dots, intensities, rates, strict=False)
    ]
    corners = [(x.low, x.low * bandwidth), (peak / bandwidth, peak), (x.high, peak)]
    roof = " ".join(f"{x.at(at):.1f},{y.at(max(rate, y.low)):.1f}" for at, rate in corners)
    title = f"{found.network} on {found.target}, {found.precision}, batch {found.batch}"
    return element(
        "svg",
        element("title", title),
        element("style", Markup(_STYLE)),
        element("rect", width=_WIDTH, height=_HEIGHT, class_="page"),
        [_tick(x, tick, f"{tick:g}", is_x=True) for tick in x.ticks()],
        [_tick(y, tick, f"{tick / 1e9:g}", is_x=False) for tick in y.ticks()],
        element("polyline", points=roof, class_="roof"),
        marks,
        element("text", "operations per byte", x=_WIDTH / 2, y=_HEIGHT - 8, text_anchor="middle"),
        element("text", "10^9 operations/s", x=8, y=12),
        element("text", title, x=_WIDTH - 16, y=12, text_anchor="end"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
    )


class _Axis:
    """A logarithmic axis between two pixels, over whole decades."""

    def __init__(self, low: float, high: float, first: float, last: float) -> None:
        self.low, self.high = 10.0 ** floor(log10(low)), 10.0 ** -floor(-log10(high))
        self.first, self.last = first, last

    def at(self, value: float) -> float:
        return self.first + (self.last - self.first) * log10(value / self.low) / log10(self.high / self.low)

    def ticks(self) -> list[float]:
        return [self.low * 10**decade for decade in range(round(log10(self.high / self.low)) + 1)]


def _tick(axis: _Axis, value: float, label: str, *, is_x: bool) -> list[Markup]:
    at = axis.at(value)
    if is_x:
        line = element("line", x1=at, x2=at, y1=16, y2=_HEIGHT - _BOTTOM, class_="grid")
        return [line, element("text", label, x=at, y=_HEIGHT - _BOTTOM + 16, text_anchor="middle")]
    line = element("line", x1=_LEFT, x2=_WIDTH - 16, y1=at, y2=at, class_="grid")
    return [line, element("text", label, x=_LEFT - 6, y=at + 4, text_anchor="end")]


def _layer(found: LayerTime, total_ns: float) -> tuple[str, ...]:
    name = found.layer.name if len(found.layer.name) <= 40 else f"...{found.layer.name[-37:]}"
    numbers = (found.time_ns / 1e3, 100 * found.time_ns / total_ns, found.operations / 1e6, found.bytes / 1024)
    return (name, "+".join(found.layer.operators), found.arithmetic, found.bound, *(f"{number:.1f}" for number in numbers))


def _aliases(found: Sequence[Target]) -> list[str]:
    return [f"{alias} = {board.name}" for board in found for alias in board.aliases]


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.3g}"
