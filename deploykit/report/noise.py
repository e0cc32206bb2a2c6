"""Where quantization hurts: the noise at the output that each activation and each layer's weights cause alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log10

from deploykit.report import charts, units
from deploykit.report.markup import Child, Markup, element
from deploykit.report.parts import Column, Result, chart_row, figure, series_of, table, words_of

_WORST = 10


@dataclass(frozen=True)
class Bars:
    """What the bars of one engine share, so that those of activations and of weights can be compared: the noise of everything
    alone added up, the largest of it, and the colour."""

    total: float
    largest: float
    series: int


def where_it_hurts(result: Result) -> Child:
    """The signal-to-noise ratio of every INT8 graph that was measured, and the worst of what causes its noise.

    Nothing where none was measured: random weights have no noise that means anything.
    """
    measured = [engine for engine in result.get("engines") or () if (engine.get("search") or {}).get("after_db") is not None]
    if not measured:
        return None
    swept = [engine for engine in measured if engine["search"].get("errors")]
    return [element("h3", "Where it hurts"), _ratios(measured), [_figures(result, engine) for engine in swept]]


def _ratios(engines: Sequence[Result]) -> Markup:
    columns = [Column("Engine")] + [
        Column(title, numeric=True) for title in ("Asked for", "Everything in INT8", "As shipped", "Sensitive layers in float")
    ]
    rows = []
    for engine in engines:
        search: Result = engine["search"]
        rows.append(
            (
                words_of(engine.get("label"), "engine"),
                units.decibels(search.get("wanted_db")) if search.get("wanted_db") else "nothing",
                units.decibels(search.get("before_db")),
                units.decibels(search["after_db"]),
                units.count(len(search.get("kept") or ())),
            )
        )
    caption = "Signal-to-noise ratio at the output, INT8 against FP32 on calibration images; more is better"
    return table(caption, columns, rows)


def _figures(result: Result, engine: Result) -> Child:
    search: Result = engine["search"]
    label, series = words_of(engine.get("label"), "engine"), series_of(result, words_of(engine.get("label"), "engine"))
    activations, weights = (_noisy(search["errors"].get(kind)) for kind in ("activations", "weights"))
    every = [*activations.values(), *weights.values()]
    if not every:
        return None
    bars = Bars(total=sum(every), largest=max(every), series=series)
    kept = {words_of(step.get("layer"), "layer") for step in search.get("kept") or ()}
    return element(
        "div",
        _figure(f"{label}: activations", activations, bars, in_float=search.get("spared") or ()),
        _figure(f"{label}: weights of layers", weights, bars, in_float=kept),
        class_="pair",
    )


def _figure(title: str, noise: Mapping[str, float], bars: Bars, *, in_float: Collection[str]) -> Markup | None:
    """The worst of `noise`, each as its share of everything's."""
    if not noise:
        return None
    worst = sorted(noise.items(), key=lambda item: (-item[1], item[0]))[:_WORST]
    rows = []
    for name, power in worst:
        alone = f"{units.decibels(-10 * log10(power))} alone"
        rest = f", {units.percent(power / bars.total)} of the noise{'; stays in float' if name in in_float else ''}"
        picture = charts.bar(f"{title}: {name}, {alone}{rest}", power, (), bars.largest, series=bars.series)
        rows.append(chart_row(name, (element("strong", alone), rest), picture))
    said = f"The {len(worst)} worst of {units.count(len(noise))}. " if len(worst) < len(noise) else ""
    how = "Each bar is the share of all noise at the output that one of them causes alone. Longer is worse."
    return figure((element("strong", title), said, how), rows)


def _noisy(noise: Mapping[str, float] | None) -> dict[str, float]:
    """What causes any noise at all; the logarithm of none is not a number."""
    return {name: power for name, power in (noise or {}).items() if power and isfinite(power)}
