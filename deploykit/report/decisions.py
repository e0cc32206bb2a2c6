"""The sections about decisions: gates, accuracy, the images decided otherwise, and sample predictions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isfinite
from typing import Any

from deploykit.gate import Rule, rule_in
from deploykit.report import charts, units
from deploykit.report.charts import Mark, Scale
from deploykit.report.markup import Child, Markup, element, join
from deploykit.report.parts import (
    Column,
    Result,
    absent,
    chart_row,
    chip,
    figure,
    reason_of,
    series_of,
    table,
    words_of,
)
from deploykit.report.units import NOT_MEASURED

FLIPS_SHOWN = 48
_SMALL_PICTURE = 96  # pixels; below it, enlarging without smoothing shows what the network sees
# How numbers of each metric are written; one that is missing here stops the page.
_UNITS: Mapping[str, Callable[[float], str]] = {
    "disagreements": "{:,.0f}".format,
    "agreement": lambda value: units.percent(value / 100),
    "drop": units.points,
    "latency": units.milliseconds,
    "slowdown": units.change,
}
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def gates(result: Result) -> Child:
    """The rules with their verdicts, and what so many images can show at all."""
    rules = result.get("gates") or ()
    if not rules:
        text = "No gate is set in the recipe: nothing was required of the engine"
        return join((element("p", f"{text}.", class_="absent"), _visible_drop(result)))
    columns = [
        Column("Rule"),
        Column("Verdict"),
        Column("Observed", numeric=True),
        Column("95 % interval", numeric=True),
        Column("Reason"),
    ]
    rows = []
    for gate in rules:
        unit = _gate_unit(rule_in(words_of(gate.get("rule"), "")))
        observed = NOT_MEASURED if gate.get("observed") is None else unit(gate["observed"])
        bounds = "exact" if gate.get("interval") is None else units.interval(gate["interval"], unit)
        rule = element("code", words_of(gate.get("rule")), class_="rule")
        reason = words_of(gate.get("reason"), "no reason recorded")
        rows.append((rule, chip(words_of(gate.get("verdict"), "cannot tell")), observed, bounds, reason))
    return join((table("What must hold before this engine ships", columns, rows), _visible_drop(result)))


def accuracy(result: Result) -> Child:
    """What the engine decides, beside FP32 PyTorch, and how far its tensors are."""
    parity: Sequence[Result] = result.get("parity") or ()
    if not parity:
        return absent("No engine was compared with FP32 PyTorch", reason_of(result, "parity", "build"))
    labelled = [entry for entry in parity if entry.get("accuracy")]
    return [
        _evaluated_on(result.get("evaluated_on") or {}),
        [_accuracies(result, labelled), _drops(result, labelled)] if labelled else absent("Accuracy", _unlabelled(parity)),
        _decisions_table(parity),
        _tensor_table(parity),
    ]


def flips(result: Result) -> Child:
    """The images on which an engine decides otherwise."""
    pictures = {sample.get("name"): sample.get("png") for sample in result.get("samples") or ()}
    compared = [entry for entry in result.get("parity") or () if entry.get("agreement") is not None]
    if not compared:
        return absent("Decisions were not compared", reason_of(result, "parity", "build"))
    content: list[Child] = []
    for entry in compared:
        changed: Sequence[Result] = entry.get("disagreements") or ()
        content.append(element("h3", words_of(entry.get("label"), "engine")))
        content.append(element("p", _flip_sentence(entry)))
        if changed:
            small = _is_small(result)
            cards = [_flip(flip, pictures.get(flip.get("image")), small) for flip in changed[:FLIPS_SHOWN]]
            content.append(element("ul", cards, class_="pictures"))
        if len(changed) > FLIPS_SHOWN:
            content.append(element("p", f"These are the first {FLIPS_SHOWN}.", class_="lead"))
    return content


def samples(result: Result) -> Child:
    """Pictures with what the networks say about them."""
    pictures: Sequence[Result] = result.get("samples") or ()
    if not pictures:
        return absent("Sample predictions", reason_of(result, "parity") or "no images were given to predict on")
    small = _is_small(result)
    return element("ul", [_sample(sample, small) for sample in pictures], class_="pictures")


def _gate_unit(rule: Rule | None) -> Callable[[float], str]:
    """How a rule's numbers are written."""
    if rule is None:
        return lambda value: units.count(int(value)) if value == int(value) else units.number(value)
    return _UNITS[rule.metric]


def _visible_drop(result: Result) -> Markup:
    drop = result.get("visible_drop_points")
    if drop is None:
        return element("p", "No images were judged, so there is no smallest drop that they could show.", class_="lead")
    images = (result.get("evaluated_on") or {}).get("images")
    images = images or max((entry.get("images") or 0 for entry in result.get("parity") or ()), default=0)
    so_many = f"{units.plural(images, 'image')} can" if images else "the images can"
    return element(
        "p",
        f"The smallest accuracy drop that {so_many} show is ",
        element("strong", units.points(drop)),
        ": even if not one decision had changed, a loss up to that size could not be ruled out (95 %).",
    )


def _evaluated_on(images: Result) -> Markup | None:
    if not images.get("origin"):
        return None
    labels = ", with labels" if images.get("labelled") else ", without labels"
    return element(
        "p", f"Judged on {units.plural(images.get('images') or 0, 'image')}: {images['origin']}{labels}.", class_="lead"
    )


def _accuracies(result: Result, labelled: Sequence[Result]) -> Markup:
    """Reference and engine on one zoomed axis."""
    measured = [entry for entry in labelled if _finite(entry["accuracy"].get("reference"), entry["accuracy"].get("engine"))]
    if not measured:
        return absent("Top-1 accuracy")
    shares = [entry["accuracy"][side] for entry in measured for side in ("reference", "engine")]
    # At least one point of room on each side: an axis that ends at the dots makes every difference look like the largest.
    scale = Scale(max(0.0, min(shares) - 0.01), min(1.0, max(shares) + 0.01))
    rows = []
    for entry in measured:
        name, found = words_of(entry.get("label"), "engine"), entry["accuracy"]
        text = f"{units.percent(found['reference'])} \N{RIGHTWARDS ARROW} {units.percent(found['engine'])}"
        marks = [Mark(found["reference"], hollow=True), Mark(found["engine"])]
        picture = charts.row(f"{name}: top-1 accuracy {text}", scale, marks, series=series_of(result, name))
        rows.append(chart_row(name, text, picture))
    legend = element(
        "p",
        element("span", charts.swatch(0, hollow=True), "FP32 PyTorch"),
        element("span", charts.swatch(1, dot=True), "engine"),
        class_="legend",
    )
    caption = (element("strong", "Top-1 accuracy"), "Both on the same images. The axis does not start at zero.")
    return figure(caption, rows, charts.axis(scale, lambda tick: f"{100 * tick:.4g} %"), legend)


def _drops(result: Result, labelled: Sequence[Result]) -> Markup | None:
    """The paired interval of each drop, beside no drop at all and the gate's limit."""
    measured = [entry for entry in labelled if _interval(entry["accuracy"].get("interval_points"))]
    if not measured:
        return None
    parsed = [rule_in(words_of(gate.get("rule"), "")) for gate in result.get("gates") or ()]
    limits = [rule.limit for rule in parsed if rule is not None and rule.metric == "drop"]
    ends = [bound for entry in measured for bound in entry["accuracy"]["interval_points"]]
    scale = Scale.around([0.0, *ends, *limits])
    rows = []
    for entry in measured:
        name, found = words_of(entry.get("label"), "engine"), entry["accuracy"]
        drop = found.get("drop_points")
        text = f"{units.points(drop)} (95 %: {units.interval(found['interval_points'], units.points)})"
        picture = charts.row(
            f"{name}: accuracy drop {text}",
            scale,
            [Mark(drop)] if _finite(drop) else [],
            interval=found["interval_points"],
            zero=0.0,
            limits=limits,
            series=series_of(result, name),
        )
        rows.append(chart_row(name, text, picture))
    said = "The whisker is the 95 % interval from paired decisions: images both networks get right or wrong do not widen it."
    limited = f" Dashed: the gate's limit of {', '.join(map(units.points, limits))}." if limits else ""
    caption = (element("strong", "Accuracy lost to the engine"), said + limited)
    return figure(caption, rows, charts.axis(scale, lambda tick: f"{tick:.4g}".replace("-", "\N{MINUS SIGN}")))


def _decisions_table(parity: Sequence[Result]) -> Markup:
    columns = [Column("Engine")] + [
        Column(title, numeric=True)
        for title in ("Images", "Agreement", "Accuracy FP32", "Accuracy engine", "Drop", "95 % interval")
    ]
    rows = []
    for entry in parity:
        found = entry.get("accuracy") or {}
        unlabelled = NOT_MEASURED if found else "no labels"
        rows.append(
            (
                words_of(entry.get("label"), "engine"),
                units.count(entry.get("images")),
                units.percent(entry.get("agreement")),
                units.percent(found["reference"]) if _finite(found.get("reference")) else unlabelled,
                units.percent(found["engine"]) if _finite(found.get("engine")) else unlabelled,
                units.points(found["drop_points"]) if _finite(found.get("drop_points")) else unlabelled,
                units.interval(found.get("interval_points"), units.points) if found else unlabelled,
            )
        )
    return table("Decisions: agreement is the share of images given the same class by both", columns, rows)


def _tensor_table(parity: Sequence[Result]) -> Markup | None:
    """Two errors kept apart: engine against the same graph, and engine against FP32 PyTorch."""
    kinds = (("conversion", "the same graph, unoptimised"), ("quantization", "FP32 PyTorch"))
    columns = [Column("Engine"), Column("Against")] + [
        Column(title, numeric=True) for title in ("max|d|", "mean|d|", "max|d| / max|y|", "Limit", "Cosine", "SQNR", "Images")
    ]
    rows = []
    for entry in parity:
        for kind, against in kinds:
            error = entry.get(kind)
            if not error:
                continue
            limit = words_of(error.get("rule"), "no limit")
            verdict = error.get("verdict")
            rows.append(
                (
                    words_of(entry.get("label"), "engine"),
                    against,
                    units.number(error.get("max_abs")),
                    units.number(error.get("mean_abs")),
                    units.number(error.get("relative")),
                    element("span", limit, " ", chip(verdict)) if verdict else limit,
                    units.cosine(error.get("cosine")),
                    units.decibels(_sqnr(error)),
                    units.count(error.get("images")),
                )
            )
    return table("How far the outputs are apart: d is the difference, y the reference", columns, rows) if rows else None


def _sqnr(error: Result) -> float | None:
    """JSON has no infinity, so the ratio of tensors that are equal arrives as null."""
    return inf if error.get("sqnr_db") is None and error.get("max_abs") == 0 else error.get("sqnr_db")


def _flip_sentence(entry: Result) -> str:
    if "parts" in entry:
        return f"{units.decided_otherwise(entry)} are decided otherwise than by FP32 PyTorch ({units.of_parts(entry)})."
    images, agreement = entry.get("images") or 0, entry["agreement"]
    listed = len(entry.get("disagreements") or ())
    changed = entry.get("disagreement_count", round((1 - agreement) * images) if images else listed)
    if not changed:
        return f"Not one of {units.plural(images, 'image')} is decided otherwise than by FP32 PyTorch."
    verb = "is" if changed == 1 else "are"
    share = f"{changed:,} of {units.plural(images, 'image')} {verb} decided otherwise than by FP32 PyTorch"
    return f"{share} (agreement {units.percent(agreement)})."


def _flip(flip: Result, png: Any, small: bool) -> Markup:
    label, reference, engine = (flip.get(key) for key in ("label", "reference", "engine"))
    if label is None:
        kind, mark = "differs", "\N{NOT EQUAL TO} differs, no label"
    elif label == reference:
        kind, mark = "wrong", "\N{MULTIPLICATION X} engine wrong"
    elif label == engine:
        kind, mark = "differs", "\N{NOT EQUAL TO} FP32 wrong"
    else:
        kind, mark = "wrong", "\N{MULTIPLICATION X} both wrong"
    margin = flip.get("reference_margin")
    lines = (
        None if label is None else f"label {label}",
        f"FP32 {words_of(reference)} \N{RIGHTWARDS ARROW} engine {words_of(engine)}",
        f"FP32's margin {units.number(margin)}" if _finite(margin) else None,
    )
    return _picture(kind, mark, words_of(flip.get("image"), "unnamed image"), png, lines, small)


def _sample(sample: Result, small: bool) -> Markup:
    label, reference, engine = (sample.get(key) for key in ("label", "reference", "engine"))
    answer = reference if engine is None else engine
    marks = []
    if label is not None and answer is not None:
        marks.append("\N{CHECK MARK} right" if answer == label else "\N{MULTIPLICATION X} wrong")
    if None not in (reference, engine) and reference != engine:
        marks.append("\N{NOT EQUAL TO} FP32")
    kind = "wrong" if label is not None and answer not in (None, label) else "differs" if engine not in (None, reference) else ""
    sure = sample.get("confidence")
    who = "FP32" if engine is None else "engine"
    lines = (
        None if label is None else f"label {label}",
        f"{who} {words_of(answer)}",
        f"FP32 {reference}" if None not in (engine, reference) and engine != reference else None,
        f"confidence {units.percent(sure)}" if _finite(sure) else None,
    )
    return _picture(
        kind, ", ".join(marks) or "no label", words_of(sample.get("name"), "unnamed image"), sample.get("png"), lines, small
    )


def _picture(kind: str, mark: str, name: str, png: Any, lines: Iterable[str | None], small: bool) -> Markup:
    """A picture with its facts. What is not base64 is not put into an address."""
    if isinstance(png, str) and _BASE64.fullmatch(png):
        image = element("img", src=f"data:image/png;base64,{png}", alt=name, class_="small" if small else None)
    else:
        image = element("div", "picture not kept", class_="blank")
    text = [element("p", line) for line in lines if line]
    return element(
        "li", image, element("p", element("strong", mark)), text, element("p", name, class_="name"), class_=kind or None
    )


def _is_small(result: Result) -> bool:
    shape = (result.get("model") or {}).get("input") or ()
    return bool(shape) and max(shape[1:], default=0) <= _SMALL_PICTURE


def _unlabelled(parity: Sequence[Result]) -> str:
    return "the images have no labels" if any(entry.get("images") for entry in parity) else NOT_MEASURED


def _finite(*values: Any) -> bool:
    return all(value is not None and isfinite(value) for value in values)


def _interval(bounds: Any) -> bool:
    return bounds is not None and len(bounds) == 2 and _finite(*bounds)
