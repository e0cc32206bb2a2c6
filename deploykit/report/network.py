"""The sections about the network: how it learned, its engines and layers, its files and calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, log10
from typing import Any

from deploykit.report import charts, noise, units
from deploykit.report.charts import Line
from deploykit.report.markup import Child, Markup, element
from deploykit.report.parts import Cell, Column, Result, absent, facts, figure, folded, notice, reason_of, table, words_of

_MANY = 5


def learning(result: Result) -> Child:
    """Loss and accuracy of each epoch."""
    training = result.get("finetune") or {}
    history: Sequence[Result] = training.get("history") or ()
    if not history:
        return absent("This run did not train", reason_of(result, "finetune") or "the weights are used as they came")
    losses = [
        Line(name, points, dashed=dashed)
        for name, key, dashed in (("training loss", "train_loss", False), ("validation loss", "val_loss", True))
        if (points := _points(history, key))
    ]
    share = _points(history, "val_accuracy")
    learned = _points(history, "train_accuracy")
    accuracies = [Line("training accuracy", learned)] if learned else []
    accuracies += [Line("validation accuracy", share, dashed=bool(learned))] if share else []
    return [
        element("p", _training_sentence(training, history, share), class_="lead"),
        element(
            "div",
            _curve("Loss by epoch", losses, units.number) if losses else None,
            _curve("Accuracy by epoch", accuracies, units.percent, ceiling=1.0) if accuracies else None,
            class_="pair",
        ),
        folded("Numbers of each epoch", _history_table(history)),
    ]


def layers(result: Result) -> Child:
    """The engines, where INT8 costs accuracy, and the precision in which each of their layers really runs."""
    engines: Sequence[Result] = result.get("engines") or ()
    if not engines:
        return absent("No engine was built", reason_of(result, "build") or "none was asked for")
    return [
        _engine_table(engines),
        noise.where_it_hurts(result),
        [_candidates(engine) for engine in engines if len(engine.get("candidates") or ()) > 1],
        [_layers_of(engine) for engine in engines if engine.get("built")],
    ]


def _candidates(engine: Result) -> Markup:
    """What was weighed before an INT8 graph was chosen."""
    columns = [Column("Way to quantize"), Column("Layers in INT8", numeric=True), Column("Size", numeric=True)]
    columns += [Column("Latency", numeric=True), Column("SQNR", numeric=True), Column("Decision")]
    rows = [
        (
            words_of(found.get("name"), "candidate"),
            units.count(found.get("int8_layers")),
            units.size(found.get("bytes")),
            units.duration(found.get("latency_ns")) if found.get("latency_ns") else "not raced: no doubt",
            units.decibels(found["sqnr_db"]) if found.get("sqnr_db") is not None else "random weights",
            "chosen" if found.get("chosen") else "not chosen",
        )
        for found in engine["candidates"]
    ]
    return table(f"What was weighed for {words_of(engine.get('label'), 'engine')}: engines raced on this machine", columns, rows)


def export(result: Result) -> Child:
    """The portable files, and the images that chose the INT8 ranges."""
    exports: Sequence[Result] = result.get("exports") or ()
    columns = [
        Column("File"),
        Column("Format"),
        Column("Opset", numeric=True),
        Column("Size", numeric=True),
        Column("max|d| / max|y| to PyTorch", numeric=True),
    ]
    rows = [
        (
            element("code", words_of(entry.get("path"))),
            words_of(entry.get("format")),
            words_of(entry.get("opset"), "has none"),
            units.size(entry.get("bytes")),
            units.number(entry["relative_error"]) if entry.get("relative_error") is not None else "see the accuracy section",
        )
        for entry in exports
    ]
    files = table("Portable files", columns, rows) if rows else absent("Nothing was exported", reason_of(result, "export"))
    return [files, _calibration(result)]


def _points(history: Sequence[Result], key: str) -> list[tuple[float, float]]:
    """(epoch, value) where the value was measured."""
    return [(epoch["epoch"], epoch[key]) for epoch in history if epoch.get(key) is not None and isfinite(epoch[key])]


def _training_sentence(training: Result, history: Sequence[Result], share: Sequence[tuple[float, float]]) -> str:
    parts = [units.plural(len(history), "epoch")]
    for key, doing in (("train_images", "trained on"), ("val_images", "validated on")):
        if training.get(key):
            parts.append(f"{doing} {units.plural(training[key], 'image')}")
    spent = [epoch["seconds"] for epoch in history if epoch.get("seconds") is not None]
    if spent:
        parts.append(units.seconds(sum(spent)))
    text = ", ".join(parts) + "."
    if share:
        epoch, best = max(share, key=lambda point: point[1])
        text += f" Best validation accuracy: {units.percent(best)} in epoch {epoch:g}."
    return text


def _curve(title: str, lines: Sequence[Line], text: Callable[[float], str], *, ceiling: float | None = None) -> Markup:
    ends = [f"{line.name} {text(line.points[-1][1])}" for line in lines]
    keys = [
        element("span", charts.swatch(index, dashed=line.dashed), end)
        for index, (line, end) in enumerate(zip(lines, ends, strict=True))
    ]
    drawn = charts.curve(f"{title}; at the end: {', '.join(ends)}", lines, y_text=lambda y: _short(y, ceiling), ceiling=ceiling)
    return figure(element("strong", title), drawn, element("p", keys, class_="legend"))


def _short(value: float, ceiling: float | None) -> str:
    return f"{value:.3g}" if ceiling is None else f"{100 * value:.3g} %"


def _history_table(history: Sequence[Result]) -> Markup:
    columns = [
        Column(title, numeric=True)
        for title in ("Epoch", "Learning rate", "Training loss", "Validation loss", "Validation accuracy", "Time")
    ]
    rows = [
        (
            words_of(epoch.get("epoch")),
            units.number(epoch.get("learning_rate")),
            units.number(epoch.get("train_loss")),
            units.number(epoch.get("val_loss")),
            units.percent(epoch.get("val_accuracy")),
            units.seconds(epoch.get("seconds")),
        )
        for epoch in history
    ]
    return table("Each epoch", columns, rows)


def _engine_table(engines: Sequence[Result]) -> Markup:
    columns = [
        Column("Engine"),
        Column("Built"),
        Column("Precision"),
        Column("Layers in INT8", numeric=True),
        Column("Size", numeric=True),
        Column("File, or why there is none"),
    ]
    rows = []
    for engine in engines:
        built = bool(engine.get("built"))
        where: Child = (
            element("code", engine["path"]) if built and engine.get("path") else words_of(engine.get("why"), "not recorded")
        )
        rows.append(
            (
                words_of(engine.get("label"), "engine"),
                "yes" if built else "no",
                words_of(engine.get("precision")),
                _int8_share(engine),
                units.size(engine.get("bytes")) if built else "not built",
                where,
            )
        )
    return table("Engines", columns, rows)


def _int8_share(engine: Result) -> str:
    realised = engine.get("realised") or {}
    if not engine.get("built"):
        return "not built"
    if realised.get("total") is None:
        return units.NOT_MEASURED
    return f"{realised.get('int8') or 0} of {realised['total']}"


def _layers_of(engine: Result) -> Child:
    """The layers as the engine reports them after its own fusions."""
    label, realised = words_of(engine.get("label"), "engine"), engine.get("realised") or {}
    heading = element("h3", label)
    noise: Result = ((engine.get("search") or {}).get("errors") or {}).get("weights") or {}
    rows: list[tuple[str | Cell, ...]] = [
        (
            words_of(layer.get("name"), "unnamed"),
            words_of(layer.get("op"), "unknown"),
            words_of(layer.get("precision"), "unknown"),
            words_of(layer.get("kernel"), "unknown"),
            _measured(layer.get("ns"), units.duration),
            _measured(_alone(noise.get(layer.get("name"))), units.decibels),
            words_of(layer.get("why"), "\N{EN DASH}"),
        )
        for layer in realised.get("layers") or ()
    ]
    if not rows:
        return [heading, absent("Layers", "this runtime does not tell")]
    columns = [Column("Layer"), Column("Operator"), Column("Precision"), Column("Kernel"), Column("Time", numeric=True)]
    columns.append(Column("SQNR of its weights alone", numeric=True))
    if any(layer.get("why") for layer in realised["layers"]):
        columns.append(Column("Why it stayed in float"))
    else:
        rows = [row[:-1] for row in rows]
    how = "a kernel is slower while it is timed, so times add up to more than the latency; the SQNR is that of the output with "
    caption = f"Layers of {label}: {how}the weights of this layer alone in int8, less is worse"
    return [heading, _counts(realised), table(caption, columns, rows, explore=True)]


def _measured(value: float | None, unit: Callable[[float], str]) -> Cell:
    """A number that sorts by its size; what was not measured comes before all of them."""
    if value is None or not isfinite(value):
        return Cell(units.NOT_MEASURED, -1e9)
    return Cell(unit(value), value)


def _alone(power: float | None) -> float | None:
    """Decibels of a noise power at the output, of which a signal has 1; None where none was measured, or there is none."""
    return -10 * log10(power) if power else None


def _counts(realised: Result) -> list[Child]:
    """How often each kernel runs, by precision: `int8: 3 QGemm, 2 QLinearConv`."""
    counts: Result = realised.get("kernels") or {}
    lines: list[Child] = []
    for precision, kernels in counts.items():
        ordered = sorted((kernels or {}).items(), key=lambda item: (-item[1], item[0]))
        said = ", ".join(f"{number:,} {kernel}" for kernel, number in ordered) or "none"
        lines.append(element("p", element("strong", precision), f": {said}", class_="count"))
    return lines


def _calibration(result: Result) -> Child:
    calibration: Result = result.get("calibration") or {}
    heading = element("h3", "Calibration")
    if not calibration:
        return [heading, absent("Nothing was calibrated", reason_of(result, "quantize", "calibrate") or "no INT8 was asked for")]
    skipped: Sequence[Any] = calibration.get("skipped") or ()
    pairs = [
        ("Images", units.count(calibration.get("images"))),
        ("Images from", words_of(calibration.get("from"), "not recorded")),
        ("Range from", words_of(calibration.get("method"))),
        ("Files left out", units.count(len(skipped)) if skipped else "none"),
    ]
    if calibration.get("seconds") is not None:
        pairs.append(("Time", units.seconds(calibration["seconds"])))
    left_out = element("ul", [element("li", str(line)) for line in skipped], class_="plain")
    return [
        heading,
        facts(pairs),
        [notice("warning", (element("strong", "Warning. "), str(text))) for text in calibration.get("warnings") or ()],
        folded(f"The {units.plural(len(skipped), 'file')} left out", left_out, unfolded=len(skipped) <= _MANY)
        if skipped
        else None,
    ]
