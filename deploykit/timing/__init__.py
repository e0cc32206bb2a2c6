"""Engines measured, told as plain JSON values, and judged by rules of time: those of a run, or any that a user names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from deploykit import build, bundled, foreign, runtimes
from deploykit.artifact import MANIFEST, Artifact, Precision, artifact_of, read_artifact, write_manifest
from deploykit.benchmark import benchmark, cores_of_instances, trtexec
from deploykit.benchmark.judge import (
    check_same_engine,
    check_same_machine,
    check_same_queries,
    counterpart,
    doubts_since,
    judge,
    judge_since,
    load,
    save,
    since,
)
from deploykit.benchmark.report import BenchmarkReport, Measured, about, images_per_query
from deploykit.benchmark.scenarios import SINGLE_STREAM, Scenario
from deploykit.benchmark.statistics import Difference, median_interval, percentiles
from deploykit.build import Engine
from deploykit.errors import UsageError, printable
from deploykit.gate import EXIT_CODES, GateResult, Rule, Verdict, worst
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.progress import Progress, silent
from deploykit.publish import UNFINISHED, why_not_writable
from deploykit.recipe import BenchmarkTable
from deploykit.telemetry import board

_SAMPLES = 8


class Keeper(Protocol):
    """Somebody who keeps what was measured in a form of his own; both raise UsageError for what he cannot use."""

    def check(self, engines: Mapping[str, Artifact]) -> None:
        """Before anything is measured."""

    def keep(self, report: BenchmarkReport, engines: Mapping[str, Artifact]) -> None:
        """Everything that was measured, while the engines are still there."""


def measure(
    paths: Sequence[Path],
    settings: BenchmarkTable,
    rules: Sequence[Rule],
    *,
    baseline: Path | None = None,
    output: Path | None = None,
    size: int | None = None,
    trust: bool = False,
    scenario: Scenario = SINGLE_STREAM,
    times: Path | None = None,
    keeper: Keeper | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Benchmark the engines at `paths`, compare each with the first or with the file `baseline`, and judge `rules`.

    An ONNX file that is not ours is built for ONNX Runtime first, with inputs of `size` pixels where it leaves them open.
    How queries come is the `scenario`. Writes raw samples to `output`, and those of a single engine as trtexec does to `times`;
    `keeper` sees the engines before, and everything after, while they are still there.
    Raises UsageError before anything is measured: for what is no engine, for engines that cannot be compared, for rules that have
    nothing to be judged on, and for files that cannot be written.
    """
    with TemporaryDirectory(prefix="deploykit-") as scratch:
        engines = engines_at(paths, Path(scratch), size=size, trust=trust)
        if times is not None and (len(engines) > 1 or scenario != SINGLE_STREAM):
            why = "such a file holds the queries of one engine, one after the other"
            raise UsageError("these times cannot be written as trtexec does", why=why)
        _check_output(times, "--export-times")
        if keeper is not None:
            keeper.check(engines)
        return _measured(engines, settings, scenario, rules, baseline, (output, times), keeper, progress)


def _measured(
    engines: Mapping[str, Artifact],
    settings: BenchmarkTable,
    scenario: Scenario,
    rules: Sequence[Rule],
    baseline: Path | None,
    files: tuple[Path | None, Path | None],
    keeper: Keeper | None,
    progress: Progress,
) -> dict[str, Any]:
    output, times = files
    earlier = None if baseline is None else load(baseline)
    _check_comparable(engines, earlier, settings, scenario)
    _check_scenario(scenario, engines, rules, earlier)
    _check_rules(rules, engines, earlier)
    _check_output(output)
    report = benchmark(engines, **settings.measured(), scenario=scenario, progress=progress)
    if output is not None:
        save(report, output)
    if times is not None:
        write_times(report, times)
    if keeper is not None:
        keeper.keep(report, engines)
    gates = [
        _judged(rule, report, earlier, label)
        for label in engines
        for rule in rules
        if rule.metric == "latency" or earlier is not None or label != report.baseline
    ]
    verdict = worst(gate.verdict for gate in gates)
    return {
        **_told(report, engines, earlier),
        "machine": to_json(report.machine),
        "gates": [to_json(gate) for gate in gates],
        "exit_code": EXIT_CODES[verdict],
        "output": None if output is None else printable(output),
    }


def engines_at(paths: Sequence[Path], scratch: Path, *, size: int | None = None, trust: bool = False) -> dict[str, Artifact]:
    """The engines at `paths` by label: an engine's folder or main file, a run with all its engines, a bundle, or an ONNX file.

    A bundle and an ONNX file that is no artifact's are built in the folder `scratch`, and their label is their name. Raises
    UsageError with everything that is no engine, for an ONNX file that cannot be read or needs a `size`, and for a `size` that
    none needs.
    """
    found: list[tuple[Path, str, Artifact]] = []
    problems = []
    strangers = {path: foreign.onnx_file(path) for path in paths if is_foreign(path)}
    if size is not None and not any(foreign.is_open(spec) for model in strangers.values() for spec in model.inputs):
        raise UsageError(f"--size {size} says nothing", why="nothing that is measured leaves its height and width open")
    for path in paths:
        if path in strangers:
            found.append((path, printable(path.name), _built(strangers[path], scratch / str(len(found)), size)))
            continue
        if (packed := bundled.named(str(path))) is not None:
            place = scratch / str(len(found))
            place.mkdir(parents=True)
            found.append((path, printable(path.name), bundled.engine(*packed, place)[1]))
            continue
        artifacts = [artifact for artifact in map(read_artifact, _artifacts_in(path)) if runtimes.is_engine(artifact)]
        found += [(path, f"{artifact.facts['runtime']} {artifact.precision.value}", artifact) for artifact in artifacts]
        problems += [
            f"{printable(artifact.path)} is TorchScript, whose program runs when it is loaded: --trust, if you know its maker"
            for artifact in artifacts
            if runtimes.runs_code(artifact) and not trust
        ]
        if not artifacts:
            problems.append(f"{printable(path)} is neither an engine, nor a bundle, nor a run that has one")
    if problems:
        raise UsageError("nothing to measure", problems=problems, fix="deploykit export MODEL --to onnxruntime builds an engine")
    labels = [label for _, label, _ in found]
    if len(set(labels)) < len(labels):
        labels = [f"{printable(path)}: {label}" for path, label, _ in found]
    if len(set(labels)) < len(labels):
        raise UsageError("the same engine is named twice", problems=[x for x in dict.fromkeys(labels) if labels.count(x) > 1])
    return {label: artifact for label, (_, _, artifact) in zip(labels, found, strict=True)}


def is_foreign(path: Path) -> bool:
    """Whether `path` is an ONNX file that is no artifact's. Raises UsageError for an artifact that is damaged."""
    try:
        return path.suffix == ".onnx" and path.is_file() and artifact_of(path) is None
    except OSError:
        return False


def _built(found: Artifact, folder: Path, size: int | None) -> Artifact:
    """A stranger's ONNX file as an engine of ONNX Runtime with generated samples, in `folder`."""
    inputs = tuple(foreign.settled(spec, size, found.path) for spec in found.inputs)
    samples = {spec.name: foreign.noise(spec, _SAMPLES, seed=index) for index, spec in enumerate(inputs)}
    source, target = folder / "source", folder / "engine"
    for place in (source, target):
        place.mkdir(parents=True)
    model = foreign.with_samples(replace(found, inputs=inputs), samples, source)
    return write_manifest(target, build.build(model, "onnxruntime", target))


def _artifacts_in(path: Path) -> list[Path]:
    """The folder of the artifact at `path`, or what a run there has built; what a killed run left unfinished is neither."""
    try:
        if path.is_file():
            return [path.parent] if artifact_of(path) is not None else []
        if (path / MANIFEST).is_file():
            return [path]
        return sorted(found for found in path.glob("build-*") if not found.name.endswith(UNFINISHED))
    except OSError as error:
        raise UsageError(f"cannot read {printable(path)}", why=(error.strerror or str(error)).lower()) from error


def write_times(report: BenchmarkReport, path: Path) -> None:
    """Write the queries of a report's only engine as trtexec does, those of all its processes one after the other."""
    ran = report.engines[0].processes
    queries = ([ns for process in ran for ns in getattr(process, key)] for key in ("latency_ns", "end_to_end_ns", "feed_ns"))
    trtexec.write(path, *queries)


def _check_comparable(
    engines: Mapping[str, Artifact], earlier: BenchmarkReport | None, settings: BenchmarkTable, scenario: Scenario
) -> None:
    """Refuse to set the latency of one image beside that of a batch, and one machine's beside another's."""
    images = {label: images_per_query(engine) for label, engine in engines.items()}
    if earlier is not None:
        mode = board.named_mode()
        check_same_machine(earlier, Machine.probe(), [] if mode is None else [mode])
        for label, engine in engines.items():
            check_same_engine(earlier, label, about(engine))
        scenarios = {} if scenario == SINGLE_STREAM else {"scenario": to_json(scenario)}
        check_same_queries(earlier, {**settings.measured(), **scenarios})
        images |= {f"{label} in the baseline": counterpart(earlier, label).images_per_query for label in engines}
    if len(set(images.values())) > 1:
        raise UsageError(
            "these engines cannot be compared",
            problems=[f"{label}: a query is {'one image' if size == 1 else f'{size} images'}" for label, size in images.items()],
            fix="build them with the same batch, or measure each on its own",
        )


def _check_scenario(
    scenario: Scenario, engines: Mapping[str, Artifact], rules: Sequence[Rule], earlier: BenchmarkReport | None
) -> None:
    """Refuse instances with more threads than cores, and rules on latencies that are those of the rate that was found."""
    cores = len(cores_of_instances(scenario.instances)[0])
    problems = [
        f"{label}: it was built for {threads} threads, and an instance has {cores} of the cores"
        for label, engine in engines.items()
        if scenario.instances > 1 and (threads := runtimes.threads_of(engine)) is not None and threads > cores
    ]
    if problems:
        fix = f"build with --threads {cores}, or run fewer instances"
        raise UsageError(f"{scenario.instances} instances would take each other's cores", problems=problems, fix=fix)
    if scenario.bound_ns is not None and (rules or earlier is not None):
        why = "each engine is then measured at its own rate, and latencies at different rates do not compare"
        raise UsageError("a searched rate has no gate and no baseline", why=why, fix="give one rate to all with --rate")


def _check_rules(rules: Sequence[Rule], engines: Mapping[str, Artifact], earlier: BenchmarkReport | None) -> None:
    if earlier is None and len(engines) == 1 and any(rule.metric == "slowdown" for rule in rules):
        raise UsageError(
            "there is nothing to be slower than",
            why=f"{next(iter(engines))} is the only engine",
            fix="name a second engine, or an earlier run with --baseline FILE",
        )


def _check_output(output: Path | None, option: str = "--output") -> None:
    if output is not None and (why := why_not_writable(output)):
        raise UsageError(f"cannot write {printable(output)}", why=why, fix=f"choose another file with {option}")


def _told(report: BenchmarkReport, engines: Mapping[str, Artifact], earlier: BenchmarkReport | None) -> dict[str, Any]:
    """What was measured, with the ratios to the first engine or, where there is an earlier run, of each engine to itself."""
    if earlier is None:
        is_searched = bool(report.engines[0].rates_per_second)  # latencies at different rates do not compare
        others = [(label, report.baseline) for label in engines if label != report.baseline and not is_searched]
        return {**facts(report, engines, others), "baseline_verdict": None}
    doubts = doubts_since(report, earlier)
    ratios = [ratio(f"{label} / its baseline", since(report, earlier, label), doubts) for label in engines]
    return {**facts(report, engines, []), "ratios": ratios, "baseline_verdict": earlier.verdict}


def _judged(rule: Rule, report: BenchmarkReport, earlier: BenchmarkReport | None, label: str) -> GateResult:
    if earlier is not None and rule.metric == "slowdown":
        judged = judge_since(rule, report, earlier, label)
    else:
        judged = judge(rule, report, label)
    return replace(judged, rule=f"{label}: {judged.rule}")


def of_run(report: BenchmarkReport, engines: Sequence[Engine]) -> dict[str, Any]:
    """What was measured in a run: every engine, and INT8 over FP32 of the same runtime."""
    pairs = [(engine.label, baseline) for engine in engines if (baseline := _baseline(engine, engines)) is not None]
    return facts(report, {engine.label: engine.built for engine in engines if engine.built is not None}, pairs)


def facts(report: BenchmarkReport, engines: Mapping[str, Artifact], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Raw latencies of `engines` with all that is derived from them, and the ratios of `pairs` (label, baseline label)."""
    settings = {
        **report.settings,
        "images_per_query": report.engines[0].images_per_query,
        # What was measured: an engine with a fixed batch has no other.
        "offline_batches": list(report.engines[0].per_second),
        "order": [process.label for process in report.processes],
        "threads": _threads(engines),
    }
    return {
        "verdict": report.verdict,
        "board": report.board,
        "warnings": list(report.doubts),
        "baseline": report.baseline,
        "noise_floor": report.noise_floor,
        "fixed_work_ns": report.fixed_work_ns,
        "settings": settings,
        "engines": [_engine(report, found, engines[found.label]) for found in report.engines],
        "ratios": [
            ratio(f"{label} / {baseline}", report.difference(label, baseline), report.doubts) for label, baseline in pairs
        ],
    }


def ratio(label: str, found: Difference, doubts: Sequence[str]) -> dict[str, Any]:
    """One comparison as JSON values; the interval is never narrower than the noise floor, what the baseline shows against itself.

    `doubts` are why nothing can be told from it, whatever its numbers say.
    """
    return {
        "label": label,
        "ratio": found.ratio,
        "interval": list(found.honest_interval),
        "floor": found.floor,
        "different": found.is_different and not doubts,
        "why": list(doubts),
        "smallest_visible": found.smallest_visible,
    }


def judge_run(rules: Iterable[Rule], engines: Sequence[Engine], report: BenchmarkReport | None) -> list[GateResult]:
    """Judge rules of time on the INT8 engines, or on all where there are none. What was not measured cannot be told."""
    int8 = [engine for engine in engines if engine.model.precision is Precision.INT8]
    found = [_judge(rule, engine, engines, report) for rule in rules if rule.is_of_time for engine in int8 or engines]
    return [replace(judged, rule=f"{label}: {judged.rule}") for label, judged in found]


def _judge(rule: Rule, engine: Engine, engines: Sequence[Engine], report: BenchmarkReport | None) -> tuple[str, GateResult]:
    baseline = _baseline(engine, engines)
    if report is None or engine.built is None or (rule.metric == "slowdown" and baseline is None):
        why = engine.why or "no FP32 engine was built to compare it with"
        return engine.label, GateResult(str(rule), Verdict.CANNOT_TELL, None, None, f"not measured: {why}")
    return engine.label, judge(rule, report, engine.label, baseline)


def _baseline(engine: Engine, engines: Sequence[Engine]) -> str | None:
    """The label of the FP32 engine that an INT8 one is compared with."""
    if engine.model.precision is not Precision.INT8 or engine.built is None:
        return None
    label = engine.label.replace(Precision.INT8.value, Precision.FP32.value)
    return label if any(other.label == label and other.built is not None for other in engines) else None


def _engine(report: BenchmarkReport, found: Measured, engine: Artifact) -> dict[str, Any]:
    ran = found.processes
    return {
        "label": found.label,
        "images_per_query": found.images_per_query,
        "latency_ns": [list(process.latency_ns) for process in ran],
        "median_ns": found.median_ns,
        "interval_ns": list(report.median_interval_ns(found.label)),
        "end_to_end_ns": found.end_to_end_ns,
        "gpu_ns": found.gpu_ns,
        **percentiles([process.latency_ns for process in ran]),
        "offline": [{"batch": batch, "per_second": per_second} for batch, per_second in found.per_second.items()],
        "load_ns": [process.load_ns for process in ran],
        "first_ns": [process.first_ns for process in ran],
        "harness_ns": median(process.harness_ns for process in ran),
        "peak_bytes": int(median(process.peak_bytes for process in ran)),
        "idle_bytes": int(median(process.idle_bytes for process in ran)),
        "bytes": engine.path.stat().st_size,
        "energy_mj": found.energy_mj,
        "instances": [{"median_ns": ns, "per_second": per_second} for ns, per_second in found.instances],
        **_rate(report, found),
    }


def _rate(report: BenchmarkReport, found: Measured) -> dict[str, Any]:
    """The rate of arrivals that holds the bound of the p99, with its 95 % interval over processes, where one was searched."""
    rates = found.rates_per_second
    if not rates:
        return {"rate_per_second": None, "rate_interval": None}
    return {"rate_per_second": median(rates), "rate_interval": list(median_interval(rates, report.seed))}


def _threads(engines: Mapping[str, Artifact]) -> int | None:
    threads = {runtimes.threads_of(engine) for engine in engines.values()}
    return threads.pop() if len(threads) == 1 else None
