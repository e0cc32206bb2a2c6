"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from deploykit.machine import Machine
from deploykit.report import units

if TYPE_CHECKING:
    from deploykit.models import Entry

_WIDTH = 110
_LISTED = 5
_MARKS = {"pass": "pass", "fail": "FAIL", "cannot tell": "cannot tell"}


def run(result: Mapping[str, Any]) -> str:
    """Stages, what the engines are worth, the gates, and where the report is."""
    parts: list[Table | str] = [_stages(result["stages"])]
    model = result["model"]
    parts.append(f"{model['name']}, {model['weights']}, {model['parameters']:,} parameters")
    parts += [f"note: {note}" for note in model["notes"]]
    parts += [f"warning: {warning}" for warning in (result["calibration"] or {}).get("warnings", [])]
    doubts = (result["benchmark"] or {}).get("warnings", [])
    parts += [f"warning: the benchmark is invalid: {doubt}" for doubt in doubts]
    parts += [f"  try: mend that, and measure again by deploykit benchmark {result['out']}"] * bool(doubts)
    skipped = (result["calibration"] or {}).get("skipped", [])
    if skipped:
        parts.append(f"{len(skipped)} bad images were left out: {', '.join(skipped[:3])}{', ...' * (len(skipped) > 3)}")
    parts += [*_kept(result), *(f"warning: {warning}" for warning in _too_noisy(result))]
    parts.append(_comparison(result))
    parts += [
        f"{case['label']}: {units.decided_otherwise(case)} decided otherwise ({units.of_parts(case)})"
        for case in result["parity"]
        if "parts" in case
    ]
    parts += _not_built(result)
    if result.get("device"):
        parts += _device(result["device"])
    if model["random"]:
        parts.append("RANDOM WEIGHTS: latency is meaningful, decisions are not, and there is no decision gate")
    parts += [_gates(result["gates"])] * bool(result["gates"])
    if result["evaluated_on"]["labelled"]:
        images, drop = result["evaluated_on"]["images"], result["visible_drop_points"]
        parts.append(f"had not one of {images} images flipped, a drop of up to {drop:.2f} points would still be possible (95 %)")
    for engine in result["engines"]:
        parts.append(f"{engine['label']}: {result['out']}/{engine['path']}")
    if result["fastest"]:
        found = result["fastest"]
        parts.append(
            f"the fastest is kept: {found['label']}, {_milliseconds(found['latency_ns'])} ms: {result['out']}/{found['path']}"
        )
    if not result["engines"]:
        parts += [f"{export['format']}: {result['out']}/{export['path']}" for export in result["exports"]]
    parts.append(f"report: {result['report']}")
    return _render(parts)


def _device(left: Mapping[str, Any]) -> list[str]:
    """What is left to the device, and the commands for it."""
    parts = [f"left to the device: {left['text']}"]
    if not left["bundle"]:
        return [
            *parts,
            "no bundle, since not every gate was passed: deploykit pack --failed-gates makes one all the same",
        ]
    first, *rest = left["commands"]
    return [
        *parts,
        f"bundle: {left['bundle']} (not signed, release 0; deploykit pack gives it a number and a signature)",
        f"next: {first}",
        *(f"  on the device: {command}" for command in rest),
        "  ID is what install answers",
    ]


def _board(told: Mapping[str, Any] | None) -> list[str]:
    """A Jetson's power mode, and the clocks of the GPU."""
    if not told:
        return []
    if unseen := told.get("unseen"):
        return [f"clocks of the GPU and what held them down were not watched: {unseen}"]
    parts = [f"power mode {', '.join(told['power_modes'])}"] * bool(told["power_modes"])
    parts += [f"the GPU under load at {told['gpu_mhz'][0]} to {told['gpu_mhz'][1]} MHz"] if told["gpu_mhz"] else []
    return ["; ".join(parts)]


def benchmark(result: Mapping[str, Any]) -> str:
    """Engines in numbers, what can be told about their differences, the gates, and whether the run may be believed."""
    if result.get("metric") == "instructions":
        return _instructions(result)
    if result.get("metric") == "trtexec":
        return _trtexec(result)
    if result.get("metric") == "calibration":
        return _on_a_device(result)
    settings = result["settings"]
    images = settings["images_per_query"]
    table = _table("", "", "median ms", "95 %", "p90 <=", "p99 <=", "copied", "images/s", "load ms", "MiB")
    for engine in result["engines"]:
        low, high = engine["interval_ns"]
        bounds = [engine["percentiles_ns"][name] for name in ("p90", "p99")]
        table.add_row(
            engine["label"],
            _milliseconds(engine["median_ns"]),
            f"{_milliseconds(low)} to {_milliseconds(high)}",
            *map(_or_too_few, bounds),
            _milliseconds(engine["end_to_end_ns"]),
            ", ".join(f"{median(point['per_second']):,.0f} by {point['batch']}" for point in engine["offline"]),
            f"{median(engine['load_ns']) / 1e6:.0f}",
            f"{(engine['peak_bytes'] - engine['idle_bytes']) / 2**20:.0f}",
        )
    again = len(settings["order"]) - sum(len(engine["latency_ns"]) for engine in result["engines"])
    parts: list[Table | str] = [table]
    scenario = settings.get("scenario")
    parts.append(
        f"Latency of {_query(scenario, images)}, medians over fresh processes"
        f"{f' ({again} disturbed ones were measured again)' if again else ''}.\n"
        "copied: with the copies to and from the device. images/s: offline. MiB: beyond the empty process."
    )
    parts.append(f"percentiles: {units.percentiles_of(result['engines'])}")
    parts += _served(result["engines"], scenario)
    parts += _board(result.get("board"))
    on_gpu = [f"{engine['label']} {_milliseconds(engine['gpu_ns'])} ms" for engine in result["engines"] if engine.get("gpu_ns")]
    parts += [f"on the GPU alone, by CUDA events: {', '.join(on_gpu)}"] * bool(on_gpu)
    energies = [f"{engine['label']} {engine['energy_mj']:.3g} mJ" for engine in result["engines"] if engine.get("energy_mj")]
    parts += [f"energy of an image, at the mean power of the run: {', '.join(energies)}"] * bool(energies)
    floor = 100 * result["noise_floor"]
    parts.append(f"{result['baseline']} against itself: up to {floor:.1f} % apart (95 %); less than that is no difference")
    for ratio in result["ratios"]:
        low, high = ratio["interval"]
        noise = f"noise floor {100 * ratio['floor']:.1f} %"
        seen = f"the smallest difference that would be seen is {100 * ratio['smallest_visible']:.1f} %"
        told = f"{ratio['ratio']:.3f} (95 % {low:.3f} to {high:.3f}), {units.told(ratio, result)}"
        parts.append(f"{ratio['label']}: {told}; {noise}; {seen}")
    parts += [_gates(result["gates"])] * bool(result["gates"])
    parts.append(f"the run is {result['verdict']}")
    parts += [f"the baseline is {result['baseline_verdict']}"] * bool(result["baseline_verdict"])
    parts += [f"raw samples: {result['output']}"] * bool(result["output"])
    return _render(parts)


def _query(scenario: Mapping[str, Any] | None, images: int) -> str:
    """What one query is, and from when to when it is timed."""
    one = "one image" if images == 1 else f"{images} images"
    if scenario is None:
        return f"{one}, compute alone"
    if scenario["instances"] > 1:
        return f"{one} with {scenario['instances']} instances side by side, compute alone"
    if scenario["name"] == "multi-stream":
        return f"the slowest of {scenario['streams']} queries at once, {one} each, compute alone"
    rate = "at the rate that was found" if scenario["rate"] is None else f"{scenario['rate']:g} a second"
    return f"{one} from its arrival to its answer, arrivals at random, {rate}, {units.plural(scenario['streams'], 'session')}"


def _served(engines: Iterable[Mapping[str, Any]], scenario: Mapping[str, Any] | None) -> Iterator[str]:
    """What instances did together, and the rate that was found."""
    for engine in engines if scenario is not None else ():
        if engine["instances"]:
            each = ", ".join(_milliseconds(one["median_ns"]) for one in engine["instances"])
            rate = sum(one["per_second"] for one in engine["instances"])
            yield f"{engine['label']}: {rate:,.0f} images/s together; median ms of each instance {each}"
        if engine["rate_per_second"] is not None:
            assert scenario is not None
            low, high = engine["rate_interval"]
            bound = _milliseconds(scenario["bound_ns"])
            yield (
                f"{engine['label']}: up to {engine['rate_per_second']:,.4g} queries a second (95 % {low:,.4g} to {high:,.4g}) "
                f"with a p99 of at most {bound} ms"
            )


def _on_a_device(result: Mapping[str, Any]) -> str:
    """Releases that were measured on a device for the predictor."""
    table = _table("", "model", "precision", "median ms")
    for row in result["measured"]:
        table.add_row(row["model"], row["precision"], f"{row['latency_ms']:.3f}")
    mode = f" in power mode {result['mode']}" if result["mode"] else ""
    parts: list[Table | str] = [table, f"{result['device']} is {result['target']}{mode}"]
    parts.append(f"kept in {result['file']}: deploykit predict MODEL --measured {result['file']}")
    return _render(parts)


def _trtexec(result: Mapping[str, Any]) -> str:
    """What trtexec wrote, in its figures and in ours."""
    table = _table("", "", "runs", "queries", "median ms", "95 %", "p90 <=", "p99 <=", "with copies", "their p99", "queries/s")
    for engine in result["engines"]:
        bounds = engine["interval_ns"]
        table.add_row(
            engine["label"],
            str(len(engine["latency_ns"])),
            f"{sum(map(len, engine['latency_ns'])):,}",
            _milliseconds(engine["median_ns"]),
            "too few" if bounds is None else f"{_milliseconds(bounds[0])} to {_milliseconds(bounds[1])}",
            *(_or_too_few(engine["percentiles_ns"][name]) for name in ("p90", "p99")),
            _milliseconds(engine["copied_ns"]),
            _milliseconds(engine["trtexec_percentiles_ns"]["p99"]),
            f"{engine['per_second']:,.4g}",
        )
    parts: list[Table | str] = [table]
    parts.append(f"median, p90 and p99: GPU compute time; percentiles: {units.percentiles_of(result['engines'])}")
    parts.append("with copies, their p99: trtexec's latency")
    parts.append("under what conditions trtexec ran is not in its files")
    parts += [_gates(result["gates"])] * bool(result["gates"])
    parts.append(f"the run is {result['verdict']}")
    return _render(parts)


def _or_too_few(bound: float | None) -> str:
    return "too few" if bound is None else _milliseconds(bound)


def _instructions(result: Mapping[str, Any]) -> str:
    """What was counted, by what, and how far it may be believed."""
    more = {row["label"]: row for row in result["compared"]}
    table = _table("", "", "instructions of one query", "more", "than")
    for engine in result["engines"]:
        row = more.get(engine["label"])
        compared = (f"{row['percent']:+.3f} %", row["baseline"]) if row else ("", "")
        table.add_row(engine["label"], f"{engine['per_query']:,.0f}", *compared)
    counter = result["counter"]
    parts: list[Table | str] = [table]
    parts.append(f"counted by {counter['tool']} on one thread, mean of {result['queries']} queries")
    parts.append(f"CPU: {counter['cpu']}; {counter['tells']}")
    parts.append("a count is no time: it knows no caches, no memory and no clock")
    parts.append(f"processes of one engine are up to {100 * result['spread']:.4f} % apart; less than that is no difference")
    parts += [f"warning: {warning}" for warning in result["warnings"]]
    parts += [_gates(result["gates"])] * bool(result["gates"])
    parts += [f"counts: {result['output']}"] * bool(result["output"])
    return _render(parts)


def parity(result: Mapping[str, Any]) -> str:
    """How far the answers of emulated CPUs are apart, or those of two sides."""
    if "sides" in result:
        return _two_sides(result)
    table = _table("", "CPU", "images", "differ", "most steps", "decided otherwise", "verdict", "stands for")
    for row in result["compared"]:
        numbers = (str(row[key]) for key in ("images", "differ", "most_steps", "flips"))
        table.add_row(row["isa"], *numbers, _MARKS[row["verdict"]], row["stands_for"])
    later = [f"{row['isa']}: {row['changed_later']} images have the same" for row in result["compared"] if row["changed_later"]]
    return _render(
        [
            table,
            f"against {result['against']}, ONNX Runtime {result['onnxruntime']}; steps are those of {result['last_quantized']}",
            *(f"{text} integers there, and yet other answers: what follows saturates" for text in later),
            f"graph: {result['graph']}",
        ]
    )


def compared(result: Mapping[str, Any]) -> str:
    """The verdict on two runs, every engine in both, and what could not be compared."""
    table = _table("", "engine", "latency B / A", "", "accuracy lost, points", "")
    for engine in result["engines"]:
        speed, decided = engine["latency"], engine["accuracy"]
        table.add_row(
            engine["label"],
            "" if speed["ratio"] is None else f"{speed['ratio']:.3f} ({speed['interval'][0]:.3f} to {speed['interval'][1]:.3f})",
            speed["told"],
            ""
            if decided["lost"] is None
            else f"{decided['lost']:.2f} ({decided['interval'][0]:.2f} to {decided['interval'][1]:.2f})",
            decided["told"],
        )
    parts: list[Table | str] = [f"B is {result['verdict']}", table]
    for engine in result["engines"]:
        parts += [f"{engine['label']}, {key}: {why}" for key in ("latency", "accuracy") for why in engine[key]["why"]]
    parts += [f"changed: {change}" for change in result["changed"]]
    parts.append(f"page: {result['output']}")
    return _render(parts)


def models(entries: Iterable[Entry]) -> str:
    """The catalogue."""
    table = _table("", "network", "from", "parameters", "GMACs", "input", "default weights")
    for entry in entries:
        size = "x".join(map(str, entry.input_size))
        weights = entry.weights or "none"
        table.add_row(entry.name, entry.source, f"{entry.parameters:,}", f"{entry.gmacs:.3g}", size, weights)
    return _render([table])


def doctor(machine: Machine, reasons: Mapping[str, str], given_up: Mapping[str, bool], engines: Sequence[str] = ()) -> str:
    """The machine, its packages, why a runtime does not load, what processes that read files of others give up, and what is
    known of the TensorRT that is here."""
    table = _table("this machine", "", "")
    table.add_row("CPU", f"{machine.cpu} ({machine.arch}), {machine.cores} cores to use")
    table.add_row("features", ", ".join(machine.features) or "none known")
    table.add_row(
        "int8 dot product", "yes" if machine.has_int8_dot_product else "no: INT8 gets 7-bit weights here, and gains little"
    )
    table.add_row("memory", f"{machine.memory_bytes / 2**30:.1f} GiB")
    table.add_row("GPU", machine.gpu or "none found (nvidia-smi)")
    for fact in engines:
        table.add_row("engines", fact)
    kept = [name for name, is_gone in given_up.items() if not is_gone]
    allowed = (
        f"may use {' and '.join(kept)}, which this kernel or container lets no process give up"
        if kept
        else "have no network and write nowhere"
    )
    table.add_row("readers of files", allowed)
    table.add_row("system", f"{machine.system}, Python {machine.python}")
    for name, version in machine.versions.items():
        table.add_row(name, version)
    runtimes = _table("runtimes", "", "")
    for name, why in reasons.items():
        runtimes.add_row(name, "loads" if not why else f"does not load: {why}")
    return _render([table, runtimes])


def _two_sides(result: Mapping[str, Any]) -> str:
    """What was compared on what, the outputs in numbers, decisions, the gates, and the CPU that it holds for."""
    sides = _table("", "", "what", "precision", "takes", "answers")
    for side in result["sides"]:
        takes, gives = (", ".join(f"{spec['name']} {spec['shape']}" for spec in side[key]) for key in ("inputs", "outputs"))
        sides.add_row(side["label"], f"{side['name']}\n{side['kind']}", side["precision"], takes, gives)
    outputs = _table("", "output", "max|d|", "mean|d|", "max|d| / max|A|", "mean|d/A|", "cosine", "SQNR dB")
    for output in result["outputs"]:
        numbers = [output[key] for key in ("max_abs", "mean_abs", "relative", "mean_relative")]
        told = ["not finite" if number is None else f"{number:.2e}" for number in numbers]
        if output["mean_relative"] is None and output["max_abs"] is not None:
            told[-1] = "none"  # A is 0 everywhere
        cosine = "" if output["cosine"] is None else f"{output['cosine']:.6f}"
        outputs.add_row(output["names"][0], *told, cosine, _decibels(output))
    machine, fed = result["machine"], result["fed"]
    parts: list[Table | str] = [sides, outputs]
    parts += [f"differences of {output['names'][0]}: {_histogram(output)}" for output in result["outputs"]]
    parts += _decided(result["decisions"]) if result["decisions"] else []
    parts += [f"note: {note}" for note in result["notes"]]
    parts += [f"{row['kind']} for {row['side']}: {row['reason']}" for row in result["stress"] if not row["is_gate"]]
    parts.append(_gates(result["gates"]))
    parts.append(f"{units.plural(fed['images'], 'input')}: {fed['origin']}")
    parts.append(f"on {machine['cpu']} ({', '.join(machine['features']) or 'no CPU feature that decides about int8'})")
    return _render(parts)


def _histogram(output: Mapping[str, Any]) -> str:
    """Counts of differences by decades of the largest answer."""
    rows = [row for row in output["histogram"] if row["count"]]
    names = {0.0: "equal", None: "1 or more"}
    return ", ".join(f"{row['count']} {names.get(row['below']) or 'below ' + format(row['below'], '.0e')}" for row in rows)


def _decided(found: Mapping[str, Any]) -> Iterator[Table | str]:
    if "parts" in found:
        where = units.plural(found["images"], "input")
        yield f"{units.decided_otherwise(found)} decided otherwise in {where} ({units.of_parts(found)})"
        yield from _flipped(found, "{image}: {a}, {b} alike")
        return
    top5 = "" if found["top5_agreement"] is None else f", the same first five {100 * found['top5_agreement']:.2f} %"
    yield f"the same class first: {100 * found['agreement']:.2f} % of {units.plural(found['images'], 'input')}{top5}"
    if found["accuracy"]:
        accuracy = found["accuracy"]
        low, high = accuracy["interval_points"]
        yield (
            f"accuracy: A {100 * accuracy['a']:.2f} %, B {100 * accuracy['b']:.2f} %, "
            f"lost {accuracy['drop_points']:.2f} points (95 % {low:.2f} to {high:.2f})"
        )
    yield from _flipped(found, "{image}: {a} became {b}")
    if any(row["disagreement_count"] for row in found["classes"]):
        table = _table("", "class", "inputs", "decided otherwise", "A", "B")
        for row in sorted(found["classes"], key=lambda row: -row["disagreement_count"])[:_LISTED]:
            shares = ("" if row[side] is None else f"{100 * row[side]:.1f} %" for side in ("a", "b"))
            table.add_row(row["class"], str(row["images"]), str(row["disagreement_count"]), *shares)
        yield table


def _flipped(found: Mapping[str, Any], line: str) -> Iterator[str]:
    """The first images that are decided otherwise, and how many more there are."""
    flips = found["disagreements"]
    yield from (line.format(**flip) for flip in flips[:_LISTED])
    if len(flips) > _LISTED:
        yield f"and {len(flips) - _LISTED} more: --json names them"


def _not_built(result: Mapping[str, Any]) -> list[str]:
    """Which engines there are not, each reason once, and what builds them."""
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for engine in result["engines"]:
        if not engine["built"]:
            by_reason.setdefault(engine["why"], []).append(engine)
    lines = []
    for why, engines in by_reason.items():
        lines.append(f"no engine was built for {', '.join(engine['label'] for engine in engines)}: {why}")
        wanted = [engine for engine in engines if engine["next"]]
        lines += [f"  {one['label']} by TensorRT's own tool, in {result['out']}: {one['next']}" for one in wanted]
    return lines


def _stages(stages: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("", "stage", "", "seconds", "")
    for stage in stages:
        is_told_below = stage["status"] == "not built" and stage["name"].startswith("build-")
        table.add_row(stage["name"], stage["status"], f"{stage['seconds']:.1f}", "" if is_told_below else stage["summary"])
    return table


def _comparison(result: Mapping[str, Any]) -> Table:
    """One line for each thing that was compared with PyTorch, with its latency where it was measured."""
    table = _table("", "", "int8 layers", "top-1", "agreement", "max|d| / max|y|", "SQNR dB", _latency_of(result), "MB")
    latency = {item["label"]: item for item in (result["benchmark"] or {}).get("engines", [])}
    engines = {engine["label"]: engine for engine in result["engines"]}
    for case in result["parity"]:
        engine, timed = engines.get(case["label"].removesuffix(units.REFERENCE)), latency.get(case["label"])
        realised = engine["realised"] if engine and engine["realised"] else None
        errors = case["quantization"]
        table.add_row(
            case["label"],
            f"{realised['int8']}/{realised['total']}" if realised else "",
            f"{100 * case['accuracy']['engine']:.2f} %" if case["accuracy"] else "",
            f"{100 * case['agreement']:.2f} %",
            f"{errors['relative']:.1e}" if errors["relative"] is not None else "not finite",
            _decibels(errors),
            f"{timed['median_ns'] / 1e6:.3f}" if timed else "",
            f"{engine['bytes'] / 1e6:.2f}" if engine else "",
        )
    return table


def _too_noisy(result: Mapping[str, Any]) -> Iterator[str]:
    """INT8 graphs that stay below the ratio that was asked for, whatever was kept in float."""
    for engine in result["engines"]:
        found = engine["search"]
        if found and found["after_db"] is not None and found["after_db"] < found["wanted_db"]:
            kept = units.plural(len(found["kept"]), "layer")
            yield (
                f"{engine['label']}: SQNR {found['after_db']:.1f} dB on calibration images with {kept} in float, and "
                f"quantize.target_sqnr_db asks for {found['wanted_db']:g}; quantize.most_float_percent is how many may stay there"
            )


def _kept(result: Mapping[str, Any]) -> Iterator[str]:
    """The layers of each INT8 graph that stay in float for the ratio's sake, and what that gains."""
    for engine in result["engines"]:
        names = [step["layer"] for step in (engine["search"] or {}).get("kept", [])]
        if names:
            found = engine["search"]
            stays = f"{units.plural(len(names), 'sensitive layer')} {'stays' if len(names) == 1 else 'stay'} in float"
            listed = ", ".join(names[:_LISTED]) + ", ..." * (len(names) > _LISTED)
            yield f"{engine['label']}: {stays}: {listed} (SQNR {found['before_db']:.1f} to {found['after_db']:.1f} dB)"


def _milliseconds(ns: float) -> str:
    return f"{ns / 1e6:.4g}"


def _latency_of(result: Mapping[str, Any]) -> str:
    images = (result["benchmark"] or {}).get("settings", {}).get("images_per_query", 1)
    return "median ms" if images == 1 else f"median ms of {images}"


def _decibels(errors: Mapping[str, Any]) -> str:
    if errors["sqnr_db"] is not None:
        return f"{errors['sqnr_db']:.1f}"
    return "identical" if errors["max_abs"] == 0 else ""


def _gates(gates: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("", "gate", "verdict", "")
    for gate in gates:
        table.add_row(gate["rule"], _MARKS[gate["verdict"]], gate["reason"])
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        *columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns)
    )
    return table


def _render(parts: Iterable[Table | str]) -> str:
    """Plain text: a result that is piped into a file is the same as one on a screen."""
    file = StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, markup=False, highlight=False)
    for part in parts:
        # Sentences are not wrapped: a command among them has to survive being copied.
        console.print(part, soft_wrap=isinstance(part, str))
    return file.getvalue()
