"""What a page of continuous integration shows: one shape for the results of all commands with gates, and for an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Any

from deploykit.errors import DeploykitError
from deploykit.gate import ANSWERS, REALISED, rule_in
from deploykit.report import units
from deploykit.report.parts import Result

_LISTED = 100
_BISECT = "deploykit bisect "  # a note


class Status(Enum):
    """What became of a gate, worst first. `not judged` stands where there was none."""

    ERROR = "error"
    FAIL = "fail"
    CANNOT_TELL = "cannot tell"
    NOT_JUDGED = "not judged"
    PASS = "pass"  # noqa: S105 - a verdict, not a password


@dataclass(frozen=True)
class Gate:
    """A rule, what became of it, and why. `details` are lines: the images that flipped, the layers that did not run in int8.

    `seconds` is this gate's share of the time of the stage that it judges, so that all gates add up to their stages.
    """

    rule: str
    status: Status
    reason: str
    details: tuple[str, ...] = ()
    stage: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Summary:
    """Everything that a page shows; `seconds` is how long all of it took, `facts` are the machine, versions and the like."""

    name: str
    gates: tuple[Gate, ...]
    seconds: float = 0.0
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """The worst that became of a gate."""
        found = {gate.status for gate in self.gates}
        return next(status for status in Status if status in found)


def of_run(result: Result) -> Summary:
    """The content of `result.json`."""
    measured = result["benchmark"] or {}
    stages = {stage["name"]: stage["seconds"] for stage in result["stages"]}
    judged = [(gate, _stage_of(gate["rule"])) for gate in result["gates"]]
    counts = {stage: sum(of == stage for _, of in judged) for _, stage in judged}
    gates = [
        _gate(_blaming(gate, result), stage, stages.get(stage, 0.0) / counts[stage], _details(result, gate["rule"]))
        for gate, stage in judged
    ]
    verdict = {"benchmark": measured["verdict"]} if measured else {}
    return Summary(
        name=result["name"],
        gates=_or_none(gates),
        seconds=sum(stages.values()),
        tables=_filled(_compared(result), _latencies(measured), _ratios(measured), _flips(result), _floats(result)),
        notes=(*result["headline"], *result["model"]["notes"], *(result["calibration"] or {}).get("warnings", ())),
        facts={
            "command": result["command"],
            "report": result["report"],
            **_machine(result["machine"]),
            **verdict,
            **{f"seconds {name}": f"{seconds:.3f}" for name, seconds in stages.items()},
        },
    )


def of_benchmark(found: Result, *, seconds: float) -> Summary:
    """What `timing.measure` or `instructions.measure` found in so many seconds."""
    share = seconds / max(1, len(found["gates"]))
    if found.get("metric") == "instructions":
        return _of_instructions(found, seconds, share)
    if found.get("metric") == "calibration":
        rows = tuple((row["model"], row["precision"], f"{row['latency_ms']:.3f} ms") for row in found["measured"])
        table = Table(f"Measured on {found['device']}", ("model", "precision", "median"), rows)
        return Summary("benchmark", _or_none([]), seconds, tables=_filled(table), facts=_machine(found["machine"]))
    return Summary(
        name="benchmark",
        gates=_or_none([_gate(gate, "", share) for gate in found["gates"]]),
        seconds=seconds,
        tables=_filled(_latencies(found), _ratios(found)),
        notes=(f"the run is {found['verdict']}",),
        facts={**_machine(found["machine"]), "benchmark": found["verdict"]},
    )


def _of_instructions(found: Result, seconds: float, share: float) -> Summary:
    counter = found["counter"]
    rows = tuple((engine["label"], f"{engine['per_query']:,.0f}") for engine in found["engines"])
    more = tuple((row["label"], row["baseline"], f"{row['percent']:+.3f} %") for row in found["compared"])
    return Summary(
        name="benchmark",
        gates=_or_none([_gate(gate, "", share) for gate in found["gates"]]),
        seconds=seconds,
        tables=_filled(
            Table("Instructions of one query", ("engine", "instructions"), rows),
            Table("Instructions compared", ("", "than", "more"), more),
        ),
        notes=(f"counted by {counter['tool']} on {counter['cpu']}: {counter['tells']}", *found["warnings"]),
        facts=_machine(found["machine"]),
    )


def of_parity(found: Result, *, seconds: float) -> Summary:
    """What `isa.compare` found in so many seconds, a gate for each emulated CPU; or what `crosscheck.compare_two` found."""
    if "sides" in found:
        return _of_two_sides(found, seconds)
    rows = found["compared"]
    return Summary(
        name="parity",
        gates=tuple(
            Gate(f"{row['isa']}: answers like {found['against']}", Status(row["verdict"]), _apart(row, found), (), "", share)
            for row, share in ((row, seconds / len(rows)) for row in rows)
        ),
        seconds=seconds,
        facts={"graph": found["graph"], "onnxruntime": found["onnxruntime"]},
    )


def _of_two_sides(found: Result, seconds: float) -> Summary:
    share = seconds / len(found["gates"])
    flips = [
        (str(flip["image"]), str(flip["a"]), str(flip["b"]), "" if flip["label"] is None else str(flip["label"]))
        for flip in (found["decisions"] or {}).get("disagreements", ())
    ]
    unlisted = _unlisted([found["decisions"]] if found["decisions"] else [])
    lines = tuple(_cut([f"{image}: {a} became {b}" for image, a, b, _ in flips], unlisted))
    hint = next((note for note in found["notes"] if note.startswith(_BISECT)), "")
    judged = [
        _with_reason(gate, hint) if hint and gate["verdict"] == Status.FAIL.value and ANSWERS in gate["rule"] else gate
        for gate in found["gates"]
    ]
    return Summary(
        name="parity",
        gates=tuple(_gate(gate, "", share, lines if rule_in(gate["rule"]) else ()) for gate in judged),
        seconds=seconds,
        tables=_filled(_first("Images decided otherwise", ("image", "A", "B", "label"), iter(flips), unlisted)),
        notes=tuple(found["notes"]),
        facts={**{side["label"]: f"{side['name']}, {side['kind']}" for side in found["sides"]}, **_machine(found["machine"])},
    )


def of_bisect(found: Result, *, seconds: float) -> Summary:
    """What `bisect.command.compare` found in so many seconds: a gate for the layers, and one for how inputs are prepared."""
    culprit, images = found["culprit"], units.plural(found["images"], "image")
    status, reason, details = Status.PASS, f"no layer diverges beyond what its precision explains, on {images}", tuple[str, ...]()
    if culprit is not None:
        module = f" of module {culprit['module']}" if culprit["module"] else ""
        reason = "; ".join([f"{culprit['node']} ({culprit['op']}{module}) is the first beyond it", *found["hints"]])
        beyond = (f"{layer['node']}: {layer['excess_db']:+.1f} dB beyond" for layer in found["suspects"])
        status, details = Status.FAIL, (found["proven"], *beyond)
    elif found["failure"]:
        status, reason = Status.FAIL, f"B does not run: {found['failure'].splitlines()[0]}"
    differences = found["preprocessing"]
    prepared = Gate(
        "pictures are prepared alike",
        Status.FAIL if differences else Status.PASS,
        "; ".join(differences) or "as far as both say",
        seconds=seconds / 2,
    )
    layers = Gate("every layer of B computes what that of A does", status, reason, details, seconds=seconds / 2)
    fed = {"fed": f"{images}: {found['fed']['origin']}"}
    return Summary(
        "bisect", (layers, prepared), seconds, facts={"A": found["a"], "B": found["b"], **fed, **_machine(found["machine"])}
    )


def of_error(error: Exception, command: str) -> Summary:
    """What went wrong before there was a result: one gate, called after the command, whose status is `error`."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    first = error.what if isinstance(error, DeploykitError) else lines[0]
    details = tuple(line for line in lines if line != first)
    return Summary(command, (Gate(f"deploykit {command}", Status.ERROR, first, details),), notes=details)


def visible(text: str) -> str:
    """The text with every character that XML 1.0 forbids or changes, or that moves a terminal's cursor, as \\xNN or \\uNNNN.

    Line feeds and tabs stay (https://www.w3.org/TR/xml/#charsets, and #sec-line-ends for the carriage return).
    """
    return "".join(_escaped(character) if _is_hidden(ord(character)) else character for character in text)


def _is_hidden(code: int) -> bool:
    is_control = (code < 0x20 and chr(code) not in "\t\n") or 0x7F <= code < 0xA0
    return is_control or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF)


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 0x100 else f"\\u{ord(character):04x}"


def _gate(found: Mapping[str, Any], stage: str, seconds: float, details: Iterable[str] = ()) -> Gate:
    status = Status(found["verdict"])
    return Gate(found["rule"], status, found["reason"], () if status is Status.PASS else tuple(details), stage, seconds)


def _or_none(gates: Sequence[Gate]) -> tuple[Gate, ...]:
    """The gates, or one that says that there were none: readers of JUnit XML take an empty file for a broken one."""
    return tuple(gates) or (Gate("a gate", Status.NOT_JUDGED, "there was no rule to judge"),)


def _stage_of(gate: str) -> str:
    rule = rule_in(gate)
    return "benchmark" if rule is not None and rule.is_of_time else "parity"


def _details(result: Result, gate: str) -> Iterator[str]:
    """What is to blame on the engine that a gate is about: flipped images, where a rule was about them, and layers in float where
    the gate is that none is. A float layer is nearer to FP32 than an int8 one, so it is not to blame for answers."""
    if _stage_of(gate) == "benchmark":
        return
    cases = [] if rule_in(gate) is None else [case for case in result["parity"] if _is_on(case["label"], gate)]
    lines = [f"{image}: {reference} became {here}" for _, image, reference, here, _ in _flipped(cases)]
    for label, layer, operator, precision, why in _in_float(result):
        if REALISED in gate and _is_on(label, gate):
            lines.append(f"{layer} ({operator}) runs in {precision}{f': {why}' * bool(why)}")
    yield from _cut(lines, _unlisted(cases))


def _blaming(gate: Mapping[str, Any], result: Result) -> Mapping[str, Any]:
    """A gate of an INT8 engine's answers that failed, with the command in its reason that names the layer."""
    if gate["verdict"] != Status.FAIL.value or _stage_of(gate["rule"]) == "benchmark" or REALISED in gate["rule"]:
        return gate
    engine = next((one for one in result["engines"] if _is_on(one["label"], gate["rule"])), None)
    graph = None if engine is None else f"quantize-{engine['runtime']}"
    if graph not in {stage["name"] for stage in result["stages"]} or engine is None or engine["precision"] != "int8":
        return gate
    return _with_reason(gate, f"deploykit bisect {result['out']}/export-onnx {result['out']}/{graph} says which layer is off")


def _with_reason(gate: Mapping[str, Any], more: str) -> Mapping[str, Any]:
    return {**gate, "reason": f"{gate['reason']}; {more}"}


def _cut(lines: Sequence[str], unlisted: int) -> Iterator[str]:
    """As many lines as a page holds, and how many more there are; `unlisted` of them have been left out before."""
    yield from lines[:_LISTED]
    if more := unlisted + max(0, len(lines) - _LISTED):
        yield f"and {more} more"


def _unlisted(compared: Iterable[Mapping[str, Any]]) -> int:
    """How many decided otherwise that a result counts and does not name."""
    return sum(one["disagreement_count"] - len(one["disagreements"]) for one in compared if "parts" not in one)


def _is_on(label: str, rule: str) -> bool:
    """Whether a gate is about the engine of this label, or about its graph where there is no engine here."""
    return rule.startswith((f"{label}: ", f"{label}{units.REFERENCE}: "))


def _flipped(cases: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """(what answered, image, answer of FP32 PyTorch, its own answer, label) of every image that is decided otherwise."""
    for case in cases:
        for flip in case["disagreements"]:
            label = "" if flip["label"] is None else str(flip["label"])
            yield case["label"], str(flip["image"]), str(flip["reference"]), str(flip["engine"]), label


def _in_float(result: Result) -> Iterator[tuple[str, ...]]:
    """(engine, layer, operator, precision, why) of every layer of an INT8 engine that does not run in int8."""
    for engine in result["engines"]:
        if engine["precision"] == "int8" and engine["realised"]:
            for layer in engine["realised"]["layers"]:
                if layer["precision"] != "int8":
                    yield engine["label"], layer["name"], layer["op"], layer["precision"], layer["why"]


def _flips(result: Result) -> Table:
    return _first(
        "Images decided otherwise",
        ("", "image", "FP32 PyTorch", "here", "label"),
        _flipped(result["parity"]),
        _unlisted(result["parity"]),
    )


def _floats(result: Result) -> Table:
    return _first("Layers that do not run in int8", ("engine", "layer", "operator", "precision", "why"), _in_float(result))


def _first(title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]], unlisted: int = 0) -> Table:
    listed = tuple(islice(rows, _LISTED))
    more = unlisted + sum(1 for _ in rows)
    return Table(f"{title} (the first {len(listed)} of {len(listed) + more})" if more else title, columns, listed)


def _compared(result: Result) -> Table:
    """Everything that was compared with FP32 PyTorch."""
    engines = {engine["label"]: engine for engine in result["engines"]}
    rows = []
    for case in result["parity"]:
        engine, accuracy = engines.get(case["label"], {}), case["accuracy"] or {}
        realised = engine.get("realised")
        drop = (
            f"{units.points(accuracy['drop_points'])} ({units.interval(accuracy['interval_points'], units.points)})"
            if accuracy
            else ""
        )
        rows.append(
            (
                case["label"],
                f"{realised['int8']} of {realised['total']}" if realised else "",
                units.percent(accuracy["engine"]) if accuracy else "",
                drop,
                units.decided_otherwise(case).removesuffix(" images"),
                units.size(engine["bytes"]) if engine else "",
            )
        )
    of_parts = any("parts" in case for case in result["parity"])
    told = "decided otherwise" if of_parts else "images decided otherwise"
    return Table("Answers", ("", "int8 layers", "top-1", "drop (95 %)", told, "size"), tuple(rows))


def _latencies(measured: Result) -> Table:
    rows = [
        (
            engine["label"],
            units.duration(engine["median_ns"]),
            units.interval(engine["interval_ns"], units.duration),
            *(
                "too few" if engine["percentiles_ns"][name] is None else units.duration(engine["percentiles_ns"][name])
                for name in ("p90", "p99")
            ),
        )
        for engine in measured.get("engines", ())
    ]
    title = f"Latency (percentiles: {units.percentiles_of(measured.get('engines', ()))})"
    return Table(title, ("engine", "median", "95 %", "p90 at most", "p99 at most"), tuple(rows))


def _ratios(measured: Result) -> Table:
    rows = [
        (
            ratio["label"],
            f"{ratio['ratio']:.3f}",
            units.interval(ratio["interval"], "{:.3f}".format),
            units.percent(ratio["floor"]),
            units.told(ratio, measured),
        )
        for ratio in measured.get("ratios", ())
    ]
    return Table("Latency compared", ("", "ratio", "95 %", "noise floor", "told"), tuple(rows))


def _filled(*tables: Table) -> tuple[Table, ...]:
    return tuple(table for table in tables if table.rows)


def _apart(row: Mapping[str, Any], found: Result) -> str:
    return (
        f"{row['differ']} of {row['images']} images have other integers in {found['last_quantized']}, by at most "
        f"{units.plural(row['most_steps'], 'step')}; {row['changed_later']} other answers from the same integers; "
        f"{row['flips']} decided otherwise"
    )


def _machine(machine: Mapping[str, Any] | None) -> dict[str, str]:
    """What results were found on; None where times were measured elsewhere."""
    if machine is None:
        return {"machine": "not known: measured elsewhere"}
    named = {"cpu": f"{machine['cpu']} ({machine['arch']})", "features": ", ".join(machine["features"]) or "none known"}
    more = {"cores": str(machine["cores"]), "system": machine["system"]}
    gpu = {"gpu": str(machine["gpu"])} if machine["gpu"] else {}
    return {**named, **more, **gpu, "python": machine["python"], **machine["versions"]}
