"""Two runs on one page: which is better, by intervals, what changed between them, and what cannot be compared and why."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

from deploykit import publish
from deploykit.benchmark import validity
from deploykit.benchmark.statistics import FEWEST_PROCESSES, difference
from deploykit.errors import UsageError, printable, translating_os_errors
from deploykit.gate import paired_difference_interval
from deploykit.machine import Machine
from deploykit.report import charts, units
from deploykit.report.charts import Mark, Scale
from deploykit.report.html import PAGE_START, SCHEMA, page
from deploykit.report.markup import Child, Markup, element
from deploykit.report.parts import Column, Result, absent, chart_row, facts, figure, table, words_of

RESULT = "result.json"
_SIZE_LIMIT_BYTES = 256 << 20
_SAME, _BETTER, _WORSE, _NOT_COMPARED = "no difference can be told", "better", "worse", "not compared"
_LOOKED_AT = (("latency", "latency"), ("decisions", "accuracy"))
# What two benchmarks have to have in common for their latencies to be those of the same thing.
_QUERIES = ("images_per_query", "queries", "warmup", "threads", "scenario")
_Flip = tuple[Any, Any, Any]  # of one image: its label, and what two sides say


def compare_runs(first: Path, second: Path, output: Path) -> dict[str, Any]:
    """Compare the runs (folders, or their result.json) and write the page to `output`; what was found as plain JSON values.

    Raises UsageError for what is no finished run, for two runs that have nothing to be compared, with every reason, and for a
    page that cannot be written.
    """
    if why := publish.why_not_writable(output) or _why_not_replaced(output):
        raise UsageError(f"cannot write {printable(output)}", why=why, fix="choose another file with --output")
    a, b = load(first), load(second)
    found = compare(a, b)
    publish.write_file(output, render(a, b, found).encode())
    return {**found, "output": printable(output)}


def _why_not_replaced(output: Path) -> str:
    """A page of ours may be written anew; whatever else is there was not asked to be lost."""
    if not output.exists():
        return ""
    with translating_os_errors("read", output), output.open("rb") as file:
        start = file.read(len(PAGE_START))
    return "" if start == PAGE_START.encode() else "it is there already, and is no page of deploykit"


def load(path: Path) -> dict[str, Any]:
    """The result of a finished run, from its folder or its result.json. Raises UsageError for anything else."""
    file = path / RESULT if path.is_dir() else path
    try:
        if file.stat().st_size > _SIZE_LIMIT_BYTES:
            raise ValueError(f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"it has no schema {SCHEMA}")
        missing = [key for key in ("name", "model", "engines", "parity", "recipe", "machine") if not content.get(key)]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        return content
    except OSError as error:
        raise UsageError(f"cannot read {printable(file)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        fix = "name the folder of a run that ended"
        raise UsageError(f"{printable(file)} is no result of a run", why=str(error), fix=fix) from error


def compare(a: Result, b: Result) -> dict[str, Any]:
    """How B is, compared with A, as plain JSON values. Raises UsageError when the two are not about the same thing."""
    labels = [engine["label"] for engine in a["engines"] if engine["label"] in {other["label"] for other in b["engines"]}]
    _refuse_strangers(a, b, labels)
    engines = [_engine(a, b, label) for label in labels]
    return {
        "verdict": _verdict(engines),
        "engines": engines,
        "changed": [*_changed(a, b)],
    }


def _refuse_strangers(a: Result, b: Result, labels: Sequence[str]) -> None:
    problems = [
        f"{what}: {_short(a['model'].get(key))} in A, {_short(b['model'].get(key))} in B"
        for what, key in (("input", "input"), ("classes", "classes"), ("number of classes", "num_classes"))
        if a["model"].get(key) != b["model"].get(key)
    ]
    if not labels:
        names = [", ".join(engine["label"] for engine in run["engines"]) for run in (a, b)]
        problems.append(f"no engine is in both: A has {names[0]}; B has {names[1]}")
    if problems:
        raise UsageError("these runs cannot be compared", problems=problems, fix="compare runs of one network for one task")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _engine(a: Result, b: Result, label: str) -> dict[str, Any]:
    one, other = (next(engine for engine in run["engines"] if engine["label"] == label) for run in (a, b))
    return {
        "label": label,
        "latency": _latency(a, b, label),
        "accuracy": _accuracy(a, b, label),
        "built": [bool(one.get("built")), bool(other.get("built"))],
        "bytes": [one.get("bytes"), other.get("bytes")],
        "int8": [None if not engine.get("realised") else _int8(engine) for engine in (one, other)],
    }


def _int8(engine: Result) -> str:
    return f"{engine['realised']['int8']}/{engine['realised']['total']}"


def _latency(a: Result, b: Result, label: str) -> dict[str, Any]:
    """The ratio of medians, B over A, with its interval over processes; `why` says why there is none, or why it is not judged."""
    timed = [_timed(run, label) for run in (a, b)]
    why = [f"{name} did not time it" for name, found in zip("AB", timed, strict=True) if found is None]
    why = why or [*_other_machines(a, b), *_other_queries(a, b)]
    if why:
        return {"ratio": None, "interval": None, "told": _NOT_COMPARED, "median_ns": [None, None], "why": why}
    ran = [[median(process) for process in found["latency_ns"]] for found in timed if found is not None]
    floors = [run["benchmark"].get("noise_floor") for run in (a, b)]
    floor = max(inf if value is None else value for value in floors)
    found = difference(ran[1], ran[0], floor, seed=0)
    doubts = [f"{name} is invalid: {doubt}" for name, run in zip("AB", (a, b), strict=True) for doubt in _doubts(run)]
    doubts += [
        f"{name} has {len(ones)} processes, too few" for name, ones in zip("AB", ran, strict=True) if len(ones) < FEWEST_PROCESSES
    ]
    doubts += ["how much the same engine differs from itself was not measured"] * (not isfinite(floor))
    doubts += _other_clock(a, b)
    told = _NOT_COMPARED if doubts else _SAME if not found.is_different else _BETTER if found.ratio < 1 else _WORSE
    interval = list(found.honest_interval if isfinite(floor) else found.interval)
    return {"ratio": found.ratio, "interval": interval, "told": told, "median_ns": [median(ones) for ones in ran], "why": doubts}


def _other_clock(a: Result, b: Result) -> list[str]:
    """Why the clocks of two runs forbid to judge their latencies; runs of earlier versions kept no fixed work."""
    work = {f"in {name}": run["benchmark"].get("fixed_work_ns") for name, run in zip("AB", (a, b), strict=True)}
    if unknown := [f"the machine's clock {where} is not known: run it again" for where, ns in work.items() if not ns]:
        return unknown
    return validity.other_clock(work)


def _doubts(run: Result) -> Sequence[str]:
    return run["benchmark"].get("warnings") or ()


def _timed(run: Result, label: str) -> Result | None:
    engines = (run.get("benchmark") or {}).get("engines") or ()
    return next((engine for engine in engines if engine.get("label") == label and engine.get("latency_ns")), None)


def _other_machines(a: Result, b: Result) -> Iterator[str]:
    there, here = (Machine.from_json(run["machine"]) for run in (a, b))
    if there.identity != here.identity:
        for name in ("arch", "cpu", "features", "cores", "gpu"):
            if getattr(there, name) != getattr(here, name):
                yield f"other machines, {name}: {_told(getattr(there, name))} in A, {_told(getattr(here, name))} in B"


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _other_queries(a: Result, b: Result) -> Iterator[str]:
    one, other = (run["benchmark"].get("settings") or {} for run in (a, b))
    for key in _QUERIES:
        if one.get(key) != other.get(key):
            yield f"other queries, {key}: {one.get(key)} in A, {other.get(key)} in B"


def _accuracy(a: Result, b: Result, label: str) -> dict[str, Any]:
    """Points of top-1 accuracy that B lost against A, paired over the images; `why` says why they cannot be paired.

    Runs keep the images that were decided otherwise than by FP32 PyTorch; where that answered alike in both runs, those of
    both engines follow from it.
    """
    cases = [next((case for case in run["parity"] if case["label"] == label), None) for run in (a, b)]
    shares = [None if not case or not case.get("accuracy") else case["accuracy"]["engine"] for case in cases]
    flips = [_flips(case) if case else {} for case in cases]
    if why := [*_not_pairable(a, b, cases), *_clashes(*flips)]:
        nothing = {"lost": None, "interval": None, "otherwise": None, "images": None}
        return {**nothing, "told": _NOT_COMPARED, "shares": shares, "why": why}
    one, other = flips
    decided = [_both(one, other, name) for name in one.keys() | other.keys()]
    images = cases[0]["images"] if cases[0] else 0
    lost = sum(was == label_of != now for label_of, was, now in decided)
    gained = sum(was != label_of == now for label_of, was, now in decided)
    low, high = (100 * bound for bound in paired_difference_interval(lost, gained, images))
    told = _WORSE if low > 0 else _BETTER if high < 0 else _SAME
    otherwise = sum(was != now for _, was, now in decided)
    found = {"lost": 100 * (lost - gained) / images, "interval": [low, high], "told": told, "shares": shares}
    return {**found, "otherwise": otherwise, "images": images, "why": []}


def _not_pairable(a: Result, b: Result, cases: Sequence[Result | None]) -> Iterator[str]:
    """Why decisions of two runs are not about the same images and the same network; nothing where they are."""
    for name, case in zip("AB", cases, strict=True):
        if case is None:
            yield f"{name} did not compare it with PyTorch"
        elif not case.get("accuracy"):
            yield f"the images of {name} have no labels"
        elif len(case["disagreements"]) != case["disagreement_count"]:
            yield f"{name} names {len(case['disagreements'])} of {case['disagreement_count']} images that it decides otherwise"
    if a.get("evaluated_on") != b.get("evaluated_on"):
        yield f"other images: {_images(a)} in A, {_images(b)} in B"
    for key in ("name", "weights", "parameters"):
        if a["model"].get(key) != b["model"].get(key):
            yield f"another network, {key}: {a['model'].get(key)} in A, {b['model'].get(key)} in B"
    references = [case["accuracy"]["reference"] for case in cases if case and case.get("accuracy")]
    if len(set(references)) > 1:
        shares = " in A, ".join(units.percent(share) for share in references)
        yield f"FP32 PyTorch itself decides otherwise: right on {shares} in B"


def _clashes(one: Mapping[str, _Flip], other: Mapping[str, _Flip]) -> Iterator[str]:
    """Images that both name, with another label or another answer of FP32 PyTorch; the first of them."""
    for name in one:
        if name in other and one[name][:2] != other[name][:2]:
            yield f"the label of {name}, or what FP32 PyTorch says of it, is another one"
            return


def _images(run: Result) -> str:
    on = run.get("evaluated_on") or {}
    return f"{on.get('images')} of {on.get('origin')}"


def _flips(case: Result) -> dict[str, _Flip]:
    """(label, what FP32 PyTorch says, what the engine says) of each image that it decides otherwise."""
    return {flip["image"]: (flip["label"], flip["reference"], flip["engine"]) for flip in case.get("disagreements") or ()}


def _both(one: Mapping[str, _Flip], other: Mapping[str, _Flip], name: str) -> _Flip:
    """(label, what A says, what B says) of an image; an engine that did not flip says what PyTorch does."""
    label, reference, _ = one.get(name) or other[name]
    return label, one[name][2] if name in one else reference, other[name][2] if name in other else reference


def _verdict(engines: Sequence[Result]) -> str:
    """What is told of all engines, and what was not compared of one that a run has built: half a comparison is no whole one."""
    found = {engine[key]["told"] for engine in engines for _, key in _LOOKED_AT}
    if {_BETTER, _WORSE} <= found:
        words = "better in one way and worse in another"
    else:
        words = next((word for word in (_WORSE, _BETTER) if word in found), "not to be told from A" if _SAME in found else "")
    built = [engine for engine in engines if any(engine["built"])]
    missing = [what for what, key in _LOOKED_AT if any(engine[key]["told"] == _NOT_COMPARED for engine in built)]
    if not words:
        return _NOT_COMPARED
    return f"{words} ({' and '.join(missing)} not compared)" if missing else words


def _changed(a: Result, b: Result) -> Iterator[str]:
    """What is different in the environment, by name."""
    one, other = a["machine"], b["machine"]
    for key in ("cpu", "arch", "features", "cores", "gpu", "system", "python"):
        if one.get(key) != other.get(key):
            yield f"{key}: {_listed(one.get(key))} in A, {_listed(other.get(key))} in B"
    versions, others = one.get("versions") or {}, other.get("versions") or {}
    for name in sorted({*versions, *others}):
        if versions.get(name) != others.get(name):
            yield f"{name}: {words_of(versions.get(name), 'not there')} in A, {words_of(others.get(name), 'not there')} in B"
    lines = sum(line[0] in "+-" for line in _recipe_lines(a, b))
    if lines:
        yield f"recipe: {units.plural(lines, 'line')}"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else words_of(value, "none")


def _recipe_lines(a: Result, b: Result) -> list[str]:
    """Lines of the recipes that differ, with - for A and + for B, and a little of what stands around them."""
    return list(difflib.unified_diff(a["recipe"].splitlines(), b["recipe"].splitlines(), lineterm="", n=1))[2:]


def render(a: Result, b: Result, found: Result) -> str:
    """The page: the verdict, latency, decisions, sizes, then what changed. The same runs give the same page."""
    sections: list[tuple[str, Child]] = [
        ("Latency", _speed(found)),
        ("Decisions", _decisions(found)),
        ("Sizes and precision", _sizes(found)),
        ("What changed", _changes(a, b, found)),
    ]
    named = f"{words_of(a['name'])} and {words_of(b['name'])}"
    top = element(
        "header",
        element("p", "deploykit comparison", class_="kicker"),
        element("h1", named),
        element(
            "p",
            f"A: {words_of(a['name'])}. B: {words_of(b['name'])}. Everything is told of B, compared with A.",
            class_="subtitle",
        ),
        _banner(found),
    )
    parts = [element("section", element("h2", title), content) for title, content in sections]
    return page(f"{named}: B is {found['verdict']} \N{EN DASH} deploykit comparison", top, *parts)


def _banner(found: Result) -> Markup:
    tones = {
        _WORSE: ("fail", "\N{MULTIPLICATION X}"),
        _BETTER: ("pass", "\N{CHECK MARK}"),
        _NOT_COMPARED: ("none", "\N{EN DASH}"),
    }
    # Better as far as it was compared is not better; worse is worse, whatever was not compared.
    word = found["verdict"]
    tone, symbol = tones.get(_WORSE if word.startswith(f"{_WORSE} (") else word, ("unsure", "?"))
    lines = [f"{engine['label']}: {what} {engine[key]['told']}" for engine in found["engines"] for what, key in _LOOKED_AT]
    return element(
        "section",
        element("span", symbol, class_="symbol", aria_hidden="true"),
        element(
            "div", element("p", f"B is {found['verdict']}", class_="word"), element("ul", [element("li", line) for line in lines])
        ),
        class_=f"verdict {tone}",
        aria_label="Verdict",
    )


def _speed(found: Result) -> Child:
    told = [engine for engine in found["engines"] if engine["latency"]["ratio"] is not None]
    why = _reasons(found, "latency")
    if not told:
        return why or absent("Latency", "no engine was timed in both runs")
    rows = [_ratio_row(engine["label"], engine["latency"], units.duration, _scale(told)) for engine in told]
    caption = (
        element("strong", "Ratio of median latencies, B over A"),
        "1 is the same speed, less is faster. The whisker is the 95 % interval over processes, and never narrower than what the "
        "baselines of the runs show against themselves. Nothing was shuffled between two runs.",
    )
    return [figure(caption, rows, charts.axis(_scale(told), lambda tick: f"{tick:.3g}")), why]


def _scale(engines: Sequence[Result]) -> Scale:
    ends = [value for engine in engines for value in (engine["latency"]["ratio"], *engine["latency"]["interval"])]
    return Scale.around([1.0, *(min(value, 10.0) for value in ends)])


def _ratio_row(label: str, latency: Result, unit: Any, scale: Scale) -> Markup:
    ratio, bounds = latency["ratio"], latency["interval"]
    numbers = f"{ratio:.3f} (95 %: {units.interval(bounds, lambda value: f'{value:.3f}')})"
    medians = " to ".join(unit(value) for value in latency["median_ns"])
    picture = charts.row(f"{label}: {numbers}", scale, [Mark(ratio)], interval=bounds, zero=1.0)
    return chart_row(label, (element("strong", latency["told"]), f", ratio {numbers}, {medians}"), picture)


def _decisions(found: Result) -> Child:
    told = [engine for engine in found["engines"] if engine["accuracy"]["lost"] is not None]
    why = _reasons(found, "accuracy")
    if not told:
        return why or absent("Decisions", "no engine was compared with PyTorch in both runs")
    columns = [
        Column("Engine"),
        *(Column(title, numeric=True) for title in ("A", "B", "Lost", "95 % interval", "Decided otherwise")),
        Column("Told"),
    ]
    rows = [
        (
            engine["label"],
            *(units.percent(share) for share in engine["accuracy"]["shares"]),
            units.points(engine["accuracy"]["lost"]),
            units.interval(engine["accuracy"]["interval"], units.points),
            f"{engine['accuracy']['otherwise']:,} of {units.plural(engine['accuracy']['images'], 'image')}",
            engine["accuracy"]["told"],
        )
        for engine in told
    ]
    return [table("Top-1 accuracy on the same images, paired: a loss counts what B lost and A had", columns, rows), why]


def _sizes(found: Result) -> Markup:
    columns = [Column("Engine"), *(Column(title, numeric=True) for title in ("Size in A", "in B", "Int8 layers in A", "in B"))]
    rows = [
        (engine["label"], *map(units.size, engine["bytes"]), *(words_of(layers, "none") for layers in engine["int8"]))
        for engine in found["engines"]
    ]
    return table("Size on disk, and layers that really run in int8", columns, rows)


def _changes(a: Result, b: Result, found: Result) -> Child:
    lines = _recipe_lines(a, b)
    environment = [change.partition(": ")[::2] for change in found["changed"] if not change.startswith("recipe: ")]
    return [
        facts(environment) if environment else element("p", "Machine and versions are the same."),
        element("h3", "Recipe"),
        element("pre", element("code", "\n".join(lines))) if lines else element("p", "The recipes are the same."),
    ]


def _reasons(found: Result, key: str) -> Child:
    """What stands under a section that could not be told whole."""
    lines = [element("li", f"{engine['label']}: {why}") for engine in found["engines"] for why in engine[key]["why"]]
    return [element("p", "Not compared, or not judged:"), element("ul", lines)] if lines else None
