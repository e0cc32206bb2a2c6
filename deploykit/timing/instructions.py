"""Instructions for each inference as a regression gate: what no neighbour, clock or cache can touch, and what is no speed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from deploykit import publish
from deploykit.artifact import SAMPLES, Artifact, Tensors, digest_file
from deploykit.benchmark.report import about, images_per_query
from deploykit.errors import UsageError, printable, translating_os_errors
from deploykit.gate import EXIT_CODES, GateResult, Verdict, worst
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.progress import Progress, silent
from deploykit.timing import counting, engines_at
from deploykit.timing.counting import Counter

_SCHEMA = "deploykit instructions 1"
_SIZE_LIMIT_BYTES = 16 << 20
# What a kernel does hardly depends on the numbers in an image, so a few images do.
_QUERIES = 4
_MOST = 2**53


@dataclass(frozen=True)
class Engine:
    """What one engine executes: `runs` holds, for each fresh process, the instructions of each query; the first engine has two.

    `about` says what was counted: network, input, images a query, and a digest of the golden samples.
    """

    label: str
    runs: tuple[tuple[int, ...], ...]
    about: Mapping[str, Any]

    @property
    def per_query(self) -> float:
        """Mean over queries and processes."""
        return mean(instructions for run in self.runs for instructions in run)

    @property
    def spread(self) -> float:
        """How far its processes are apart, as a share of the smallest."""
        each = [mean(run) for run in self.runs]
        return max(each) / min(each) - 1


@dataclass(frozen=True)
class Counts:
    """What was counted by one counter, the baseline first, and the versions of what was executed."""

    engines: tuple[Engine, ...]
    by: Counter
    versions: Mapping[str, str]

    def engine(self, label: str) -> Engine:
        """The engine of that name. Raises UsageError when it was not counted."""
        for engine in self.engines:
            if engine.label == label:
                return engine
        raise UsageError(f"the baseline does not hold {label!r}", why=f"it holds {', '.join(e.label for e in self.engines)}")

    @property
    def spread(self) -> float:
        """How far processes of one engine are apart, as a ratio minus one: less than this is no difference."""
        return max(engine.spread for engine in self.engines)


@dataclass(frozen=True)
class More:
    """How many per cent more instructions `label` executes than `baseline`; `spread` (per cent) is what two processes differ."""

    label: str
    baseline: str
    percent: float
    spread: float


def measure(
    paths: Sequence[Path],
    *,
    isa: str | None = None,
    arm_root: Path | None = None,
    limit: float | None = None,
    baseline: Path | None = None,
    output: Path | None = None,
    size: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Count what the engines at `paths` execute for each inference, compare with the first or with the file `baseline`.

    `limit` is the largest increase allowed, in per cent. `isa` is a counter's name (`counting.counter`). Engines of ONNX Runtime
    are counted as their portable graph, which is optimized for the counter's CPU: an engine is bound to this one.

    Raises UsageError before anything is counted, for what cannot be counted or compared and for an `output` that cannot be
    written; CapabilityError, with what to install, where valgrind, qemu or a compiler is missing.
    """
    by = counting.counter(isa, arm_root=arm_root)
    earlier = None if baseline is None else load(baseline)
    with TemporaryDirectory(prefix="deploykit-") as scratch:
        engines = engines_at(paths, Path(scratch), size=size)
        graphs = _graphs(engines)
        found = {label: _about(engine) for label, engine in engines.items()}
        _check(found, by, earlier, limit)
        if output is not None and (why := publish.why_not_writable(output)):
            raise UsageError(f"cannot write {printable(output)}", why=why, fix="choose another file with --output")
        counts = _counted(engines, graphs, by, arm_root, progress)
    if output is not None:
        save(counts, output)
    compared = _compared(counts, earlier)
    gates = [] if limit is None else [judge(limit, more) for more in compared]
    return {
        "metric": "instructions",
        "counter": to_json(by),
        "engines": [{**_mapping(engine), "per_query": engine.per_query} for engine in counts.engines],
        "spread": counts.spread,
        "queries": len(counts.engines[0].runs[0]),
        "compared": [to_json(more) for more in compared],
        "versions": dict(counts.versions),
        "warnings": [] if earlier is None else _other_versions(counts, earlier),
        "machine": to_json(Machine.probe()),
        "gates": [to_json(gate) for gate in gates],
        "exit_code": EXIT_CODES[worst(gate.verdict for gate in gates)],
        "output": None if output is None else printable(output),
    }


def judge(limit: float, more: More) -> GateResult:
    """Whether there are at most `limit` per cent more instructions; within the spread of two processes nothing can be told."""
    low, high = more.percent - more.spread, more.percent + more.spread
    verdict = Verdict.PASS if high <= limit else Verdict.FAIL if low > limit else Verdict.CANNOT_TELL
    reason = f"{more.percent:+.4f} % against {more.baseline}, and two processes of one engine differ by {more.spread:.4f} %"
    return GateResult(f"{more.label}: instructions <= {limit:g} % more", verdict, more.percent, (low, high), reason)


def save(counts: Counts, path: Path) -> None:
    """Write counts as JSON."""
    with translating_os_errors("write the counts", path):
        publish.write_file(path, json.dumps({"schema": _SCHEMA, **_mapping(counts)}).encode())


def load(path: Path) -> Counts:
    """Read what `save` wrote. Raises UsageError for anything else."""
    try:
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise UsageError(f"{printable(path)} holds no instruction counts", why=f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content = json.loads(path.read_bytes())
        if content["schema"] != _SCHEMA:
            why = f"its schema is {content['schema']!r}, not {_SCHEMA!r}"
            raise UsageError(f"{printable(path)} holds no instruction counts", why=why)
        engines = tuple(_engine(value) for value in content["engines"])
        if not engines:
            raise ValueError("it holds no engine")
        return Counts(engines, Counter(**content["by"]), {str(k): str(v) for k, v in content["versions"].items()})
    except OSError as error:
        raise UsageError(f"cannot read the baseline {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        fix = "write one with: deploykit benchmark ENGINE --metric instructions --output FILE"
        raise UsageError(f"{printable(path)} holds no instruction counts", why=why, fix=fix) from error


def _engine(value: Mapping[str, Any]) -> Engine:
    runs = tuple(tuple(int(instructions) for instructions in run) for run in value["runs"])
    if not runs or not all(runs) or not all(1 <= instructions <= _MOST for run in runs for instructions in run):
        raise ValueError("an engine has no counts, or one that nothing executes")
    return Engine(str(value["label"]), runs, dict(value["about"]))


def _mapping(value: Counts | Engine) -> dict[str, Any]:
    found = to_json(value)
    assert isinstance(found, dict)
    return found


def _graphs(engines: Mapping[str, Artifact]) -> dict[str, Path]:
    """The portable graph of each engine, found by its digest. Raises UsageError with every engine that has none to count."""
    found, problems = {}, []
    for label, engine in engines.items():
        runtime = engine.facts["runtime"]
        graph = next(
            (path for path in sorted(engine.folder.parent.glob("*/*.onnx")) if digest_file(path) in engine.parents), None
        )
        if runtime != "onnxruntime":
            problems.append(f"{label}: its runtime is {runtime}, and instructions are counted for ONNX Runtime alone")
        elif graph is None:
            problems.append(f"{label}: the graph that it was built from is not in a folder beside {printable(engine.folder)}")
        else:
            found[label] = graph
    if problems:
        fix = "name engines of ONNX Runtime in the run that built them, or ONNX files"
        raise UsageError("these engines cannot be counted", problems=problems, fix=fix)
    return found


def _about(engine: Artifact) -> dict[str, Any]:
    """What has to be the same for two counts to be of the same work; threads do not matter, for one is counted."""
    found = {key: value for key, value in about(engine).items() if key != "threads"}
    return {**found, "images_per_query": images_per_query(engine), "samples": digest_file(engine.folder / SAMPLES)}


def _check(engines: Mapping[str, Mapping[str, Any]], by: Counter, earlier: Counts | None, limit: float | None) -> None:
    """Raises UsageError when two counts would not be of the same work, or not by the same counter."""
    first, *others = engines
    if earlier is None:
        if limit is not None and not others:
            fix = "name a second engine, or an earlier run with --baseline FILE"
            raise UsageError("there is nothing to be compared with", why=f"{first} is the only engine", fix=fix)
        sizes = {label: found["input"] for label, found in engines.items()}
        if any(size != sizes[first] for size in sizes.values()):
            problems = [f"{label}: its input is {size}" for label, size in sizes.items()]
            raise UsageError("these engines cannot be compared", problems=problems, fix="count each on its own")
        return
    problems = [
        f"{name}: {getattr(earlier.by, name)} there, {getattr(by, name)} here"
        for name in ("tool", "cpu")
        if getattr(earlier.by, name) != getattr(by, name)
    ]
    if problems:
        raise UsageError("the baseline was counted otherwise", problems=problems, fix="count a baseline here with --output FILE")
    for label, here in engines.items():
        there = earlier.engine(label).about
        different = [f"{key}: {there.get(key)} there, {value} here" for key, value in here.items() if there.get(key) != value]
        if different:
            fix = "count a baseline of this engine"
            raise UsageError(f"the baseline's {label!r} is something else", problems=different, fix=fix)


def _counted(
    engines: Mapping[str, Artifact], graphs: Mapping[str, Path], by: Counter, arm_root: Path | None, progress: Progress
) -> Counts:
    """Each engine in one fresh process, the first in two."""
    order = [*engines, next(iter(engines))]
    runs: dict[str, list[tuple[int, ...]]] = {label: [] for label in engines}
    versions: Mapping[str, str] = {}
    for number, label in enumerate(order):
        progress("counting instructions", number, len(order))
        engine = engines[label]
        found = counting.count(graphs[label], _inputs(engine), by, images_per_query=images_per_query(engine), arm_root=arm_root)
        runs[label].append(found.instructions)
        versions = found.versions
    progress("counting instructions", len(order), len(order))
    return Counts(tuple(Engine(label, tuple(runs[label]), _about(engine)) for label, engine in engines.items()), by, versions)


def _inputs(engine: Artifact) -> Tensors:
    """The first golden inputs, as many as whole queries take."""
    wanted = _QUERIES * images_per_query(engine)
    size = images_per_query(engine)
    found = {}
    for name, array in engine.samples().inputs.items():
        whole = max(size, min(wanted, len(array) // size * size))
        found[name] = array[:whole] if len(array) >= whole else array.repeat(-(-whole // len(array)), axis=0)[:whole]
    return found


def _compared(counts: Counts, earlier: Counts | None) -> list[More]:
    first, *others = counts.engines
    if earlier is None:
        pairs = [(engine, first, first.label) for engine in others]
    else:
        pairs = [(engine, earlier.engine(engine.label), "its baseline") for engine in counts.engines]
    spread = 100 * max(counts.spread, 0.0 if earlier is None else earlier.spread)
    return [More(engine.label, name, 100 * (engine.per_query / against.per_query - 1), spread) for engine, against, name in pairs]


def _other_versions(counts: Counts, earlier: Counts) -> list[str]:
    return [
        f"{name} was {earlier.versions.get(name)} in the baseline and is {version} now"
        for name, version in counts.versions.items()
        if earlier.versions.get(name) != version
    ]
