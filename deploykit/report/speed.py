"""The section about speed: latency distributions, ratios with their intervals, throughput."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, isfinite
from statistics import median

from deploykit.report import charts, units
from deploykit.report.charts import Mark, Scale
from deploykit.report.markup import Child, Markup, element
from deploykit.report.parts import Column, Result, absent, chart_row, figure, reason_of, series_of, table, words_of

# The slowest samples of a shared machine are many times the median; an axis that reached them would hide all others.
_SHARE_ON_AXIS = 0.98


def latency(result: Result) -> Child:
    """Samples, medians, ratios and throughput of every engine."""
    benchmark = result.get("benchmark") or {}
    engines: Sequence[Result] = benchmark.get("engines") or ()
    if not engines:
        return [absent("No engine was timed", reason_of(result, "benchmark", "build")), _not_built(result)]
    return [
        element("p", _settings(benchmark.get("settings") or {}), class_="lead"),
        _validity(benchmark),
        _latency_strips(result, engines),
        _ratios(result, benchmark.get("ratios") or ()),
        _throughput(result, engines),
        _benchmark_table(engines),
        _on_the_gpu(benchmark, engines),
        _not_built(result),
    ]


def _settings(settings: Result) -> str:
    if not settings:
        return "The settings of the benchmark were not recorded."
    order = ", in random order" if settings.get("order") else ""
    parts = [
        f"{units.plural(settings['processes'], 'fresh process', 'es')} for each engine{order}"
        if settings.get("processes")
        else "",
        f"{settings['queries']:,} timed queries of {_images(settings)} in each" if settings.get("queries") else "",
        f"{settings['warmup']:,} untimed ones before them" if settings.get("warmup") is not None else "",
        units.plural(settings["threads"], "thread") if settings.get("threads") else "",
        f"offline throughput in batches of {', '.join(map(str, settings['offline_batches']))}"
        if settings.get("offline_batches")
        else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def _validity(benchmark: Result) -> Child:
    """Whether the run may be believed, and the smallest difference that means anything in it."""
    doubts = benchmark.get("warnings") or ()
    if doubts:
        reasons = [element("li", doubt) for doubt in doubts]
        return [
            element("p", element("strong", "This run is invalid: "), "measure again on a quiet machine."),
            element("ul", reasons),
        ]
    floor = benchmark.get("noise_floor")
    if floor is None or not isfinite(floor):
        return element("p", "Nothing disturbed this run.")
    words = (
        f"Nothing disturbed this run. {words_of(benchmark.get('baseline'), 'The baseline')}, measured twice, differs from itself"
    )
    return element("p", f"{words} by up to {100 * floor:.1f} % (95 %); less than that is no difference.")


def _latency_strips(result: Result, engines: Sequence[Result]) -> Markup:
    timed = [engine for engine in engines if _pooled(engine)]
    if not timed:
        return absent("Latency samples")
    scale = _latency_scale(timed)
    factor, unit = units.duration_unit(scale.high)
    rows, thinned = [], False
    for engine in timed:
        name, processes, bounds = (
            words_of(engine.get("label"), "engine"),
            engine["latency_ns"],
            _bounds(engine.get("interval_ns")),
        )
        middle = units.duration(engine.get("median_ns"))
        interval = f" (95 %: {units.interval(bounds, units.duration)})" if bounds else ""
        taken = f"{len(_pooled(engine)):,} latencies from {units.plural(len(processes), 'process', 'es')}"
        title = f"{name}: {taken}, median {middle}{interval}"
        picture = charts.strips(
            title, processes, scale, middle=engine.get("median_ns"), interval=bounds, series=series_of(result, name)
        )
        rows.append(chart_row(name, ("median ", element("strong", middle), interval, _beyond(engine, scale)), picture))
        thinned |= len(processes) > charts.ROWS_DRAWN or any(len(process) > charts.DOTS_DRAWN for process in processes)
    caption = (
        element("strong", f"Latency of {_images((result.get('benchmark') or {}).get('settings') or {})}"),
        "Each dot is one query and each row one fresh process, with its own median as a short tick. ",
        "The long line is the median of the engine, the shaded band its 95 % interval. Further left is faster.",
        " The axis does not start at zero." if scale.low > 0 else None,
        f" At most {charts.ROWS_DRAWN} processes and {charts.DOTS_DRAWN} dots of each are drawn." if thinned else None,
    )
    return figure(caption, rows, charts.axis(scale, lambda tick: f"{tick / factor:.4g} {unit}"))


def _images(settings: Result) -> str:
    """What one query is: one image, or the batch that is fixed in the engine."""
    images = settings.get("images_per_query") or 1
    return "one image" if images == 1 else f"a batch of {images} images"


def _latency_scale(engines: Sequence[Result]) -> Scale:
    """Wide enough for nearly all samples and every interval; from zero when zero is not far away."""
    ends: list[float] = []
    for engine in engines:
        ordered = sorted(_pooled(engine))
        ends += [ordered[0], ordered[ceil(_SHARE_ON_AXIS * len(ordered)) - 1], *(_bounds(engine.get("interval_ns")) or ())]
    scale = Scale.around(ends)
    return scale if scale.low > scale.high / 2 else Scale(0.0, scale.high)


def _beyond(engine: Result, scale: Scale) -> str | None:
    slow = [value for value in _pooled(engine) if value > scale.high]
    if not slow:
        return None
    return f"; {len(slow):,} of {len(_pooled(engine)):,} beyond the axis, slowest {units.duration(max(slow))}"


def _ratios(result: Result, ratios: Sequence[Result]) -> Markup:
    measured = [entry for entry in ratios if entry.get("ratio") is not None and isfinite(entry["ratio"]) and entry["ratio"] > 0]
    if not measured:
        return absent("Ratio of latencies", "fewer than two engines were timed")
    ends = [value for entry in measured for value in (entry["ratio"], *(_bounds(entry.get("interval")) or ()))]
    scale = Scale.around([1.0, *ends])
    rows = []
    for entry in measured:
        name, bounds = words_of(entry.get("label"), "ratio"), _bounds(entry.get("interval"))
        words = _faster(entry, result["benchmark"])
        ratio = f"{entry['ratio']:.3f}" + (f" (95 %: {units.interval(bounds, lambda value: f'{value:.3f}')})" if bounds else "")
        floor = f"; noise floor {units.percent(entry['floor'])}" if entry.get("floor") is not None else ""
        title = f"{name}: {ratio}, {words}"
        picture = charts.row(
            title, scale, [Mark(entry["ratio"])], interval=bounds, zero=1.0, series=series_of(result, name.partition(" / ")[0])
        )
        rows.append(chart_row(name, (element("strong", words), f", ratio {ratio}{floor}"), picture))
    caption = (
        element("strong", "Ratio of median latencies"),
        "1 is the same speed, less is faster. The whisker is the 95 % interval over processes.",
    )
    return figure(caption, rows, charts.axis(scale, lambda tick: f"{tick:.3g}"))


def _faster(entry: Result, benchmark: Result) -> str:
    """`1.42x faster`; where nothing can be told, why."""
    ratio, told = entry["ratio"], units.told(entry, benchmark)
    if told != "different":
        return told
    return f"{1 / ratio:.2f}\N{MULTIPLICATION SIGN} faster" if ratio < 1 else f"{ratio:.2f}\N{MULTIPLICATION SIGN} slower"


def _throughput(result: Result, engines: Sequence[Result]) -> Markup:
    measured = [(engine, point) for engine in engines for point in engine.get("offline") or () if point.get("per_second")]
    if not measured:
        return absent("Throughput")
    highest = max(value for _, point in measured for value in point["per_second"])
    rows = []
    for engine, point in measured:
        name, samples = words_of(engine.get("label"), "engine"), point["per_second"]
        text = f"{units.number(median(samples))} images/s in batches of {point['batch']}"
        picture = charts.bar(f"{name}: {text}", median(samples), samples, highest, series=series_of(result, name))
        rows.append(chart_row(name, element("strong", text), picture))
    caption = (element("strong", "Offline throughput"), "The bar is the median, each dot one process. Longer is better.")
    return figure(caption, rows)


def _benchmark_table(engines: Sequence[Result]) -> Markup:
    columns = [Column("Engine")] + [
        Column(title, numeric=True)
        for title in (
            "Median",
            "95 % interval",
            "p90 at most",
            "p99 at most",
            "With copies",
            "Throughput",
            "Load",
            "First",
            "Peak memory",
            "Size",
        )
    ]
    rows = [
        (
            words_of(engine.get("label"), "engine"),
            units.duration(engine.get("median_ns")),
            units.interval(_bounds(engine.get("interval_ns")), units.duration),
            *(_percentile(engine, name) for name in ("p90", "p99")),
            units.duration(engine.get("end_to_end_ns")),
            _best_throughput(engine),
            _median_of(engine.get("load_ns"), units.duration),
            _median_of(engine.get("first_ns"), units.duration),
            units.size(engine.get("peak_bytes")),
            units.size(engine.get("bytes")),
        )
        for engine in engines
    ]
    percentiles = f"its percentiles as {units.percentiles_of(engines)}"
    return table(
        f"The same in numbers: compute latency, {percentiles}; latency with the copies to and from the device, images per "
        "second, time to load, first inference, memory of the whole process, size on disk",
        columns,
        rows,
    )


def _on_the_gpu(benchmark: Result, engines: Sequence[Result]) -> Child:
    """What GPUs took by their own clock, and how fast that was; or that nobody looked."""
    timed = [engine for engine in engines if engine.get("gpu_ns")]
    if not timed:
        return None
    told = benchmark.get("board") or {}
    clocks, unseen = told.get("gpu_mhz"), words_of(told.get("unseen"), "nothing was recorded")
    clock = f"Its clock was {clocks[0]} to {clocks[1]} MHz." if clocks else f"Its clock was not watched: {unseen}."
    times = ", ".join(f"{words_of(engine.get('label'), 'engine')} {units.duration(engine['gpu_ns'])}" for engine in timed)
    return element("p", f"On the GPU alone, by CUDA events, without copies: {times}. {clock}")


def _percentile(engine: Result, name: str) -> str:
    bound = (engine.get("percentiles_ns") or {}).get(name)
    return "too few queries" if bound is None else units.duration(bound)


def _best_throughput(engine: Result) -> str:
    points = [median(point["per_second"]) for point in engine.get("offline") or () if point.get("per_second")]
    return f"{units.number(max(points))}/s" if points else units.NOT_MEASURED


def _not_built(result: Result) -> Child:
    """Engines that could not be timed, each with its reason."""
    found: list[Child] = []
    for engine in result.get("engines") or ():
        if not engine.get("built"):
            name = words_of(engine.get("label"), "engine")
            found.append(absent(f"{name} was not timed", words_of(engine.get("why"), "it was not built")))
            if engine.get("next"):
                found.append(element("p", "By TensorRT's own tool, on the device: ", element("code", engine["next"])))
    left = result.get("device")
    if isinstance(left, Mapping):
        found.append(element("p", "Left to the device: ", str(left.get("text", ""))))
        found += [element("p", element("code", str(command))) for command in left.get("commands") or ()]
    return found


def _pooled(engine: Result) -> list[float]:
    return [value for process in engine.get("latency_ns") or () for value in process]


def _median_of(values: Sequence[float] | None, text: Callable[[float], str]) -> str:
    return text(median(values)) if values else units.NOT_MEASURED


def _bounds(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """An interval that can be drawn; None for one that is absent or not finite."""
    if interval is None or len(interval) != 2 or not all(isfinite(bound) for bound in interval):
        return None
    return interval[0], interval[1]
