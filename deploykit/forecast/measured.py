"""Measurements of one device, which the predictor's constants are fitted on: read from a file, or taken from a benchmark.

A file is JSON. People write a list of `{"model", "precision", "batch", "latency_ms"}`; `deploykit benchmark` writes the same with
the kernels of each network and what the device is, so that nothing has to be built or guessed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from deploykit import publish, targets
from deploykit.artifact import Artifact, Precision
from deploykit.benchmark.report import BenchmarkReport
from deploykit.errors import UsageError, printable, translating_os_errors
from deploykit.forecast import graphs
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.targets import Figure, PowerMode, Target, fit, latency
from deploykit.targets.latency import Arithmetic, Constants, Fit
from deploykit.targets.layers import Layer, Network

SCHEMA = "deploykit measurements 1"
PRECISIONS: tuple[Literal["int8", "fp16", "fp32"], ...] = ("int8", "fp16", "fp32")
_MOST = 1000
_LIMIT_BYTES = 64 << 20
_EXAMPLE = '[{"model": "resnet18", "precision": "fp16", "batch": 1, "latency_ms": 2.5}]'
_PARTS_OF_A_LAYER = {item.name for item in fields(Layer)}


def arithmetic(precision: str, target: Target) -> Arithmetic:
    """What a precision means on a target: FP32 is TF32 where a GPU has it, which is TensorRT's default.

    Raises UsageError for a word that is none.
    """
    wanted = "tf32" if precision == "fp32" and target.rate("tf32") > 0 else precision
    for each in latency.PRECISIONS:
        if each == wanted:
            return each
    raise UsageError(f"{printable(precision)!r} is no precision", why=f"there are {', '.join(latency.PRECISIONS)}")


def constants(path: Path, target: Target) -> Constants:
    """The stored constants for a target's kind, fitted on the measurements in a file. Raises UsageError for what is none."""
    stored = Fit.stored()
    return fit.calibrated(read(path, target), stored.gpu if target.kind == "gpu" else stored.cpu)


def read(path: Path, target: Target) -> list[fit.Row]:
    """The measurements in a file, all of them on `target`. Raises UsageError with all problems at once."""
    content = _content(path)
    rows = content
    if isinstance(content, Mapping):
        rows = content.get("measurements")
        device = device_of(path)
        if (device.name, device.mode) != (target.name, target.mode):
            measured, asked = (f"{each.name}{f' in mode {each.mode}' if each.mode else ''}" for each in (device, target))
            why = "what one device or power mode takes says little about another"
            raise UsageError(
                f"{printable(path)} was measured on {measured}, not on {asked}", why=why, fix=f"--target {device.name}"
            )
    if not isinstance(rows, list) or not 1 <= len(rows) <= _MOST:
        raise UsageError(f"{printable(path)} is not a list of measurements", fix=_EXAMPLE)
    problems = [f"measurement {number}: {why}" for number, row in enumerate(rows, 1) if (why := _problem(row, target))]
    if problems:
        raise UsageError(f"{printable(path)} has measurements that cannot be used", problems=problems, fix=_EXAMPLE)
    known: dict[str, Network] = {}
    found = []
    for row in rows:
        if "kernels" in row:
            network = _network(row)
        else:
            network = known[row["model"]] = known.get(row["model"]) or graphs.network_of(row["model"])
        precision = arithmetic(row["precision"], target)
        found.append(fit.Row(network, target, precision, row.get("batch", 1), row["latency_ms"] * 1e6))
    return found


def device_of(path: Path) -> Target:
    """The device that a file of `deploykit benchmark` was measured on. Raises UsageError when it does not say."""
    content = _content(path)
    told = content.get("target") if isinstance(content, Mapping) else None
    try:
        if not isinstance(told, Mapping) or content.get("schema") != SCHEMA:
            raise ValueError("it has no target")
        return _target(told)
    except (KeyError, TypeError, ValueError) as error:
        why = f"it is not a file that deploykit benchmark --calibrate-predictor wrote ({type(error).__name__}: {error})"
        raise UsageError(f"{printable(path)} does not say on what it was measured", why=why, fix="--target NAME") from error


@dataclass
class File:
    """The file that `read` reads; `count` is how many measurements it has once it is written."""

    path: Path
    count: int = 0

    def refuse_unwritable(self) -> None:
        """Raise UsageError when the file cannot be written."""
        if why := publish.why_not_writable(self.path):
            raise UsageError(f"cannot write {printable(self.path)}", why=why, fix="choose another file")

    def write(self, target: Target, machine: Machine, rows: list[dict[str, Any]]) -> None:
        """Write measurements of a device, each with its kernels."""
        content = {"schema": SCHEMA, "target": to_json(target), "machine": to_json(machine), "measurements": rows}
        with translating_os_errors("write", self.path):
            publish.write_file(self.path, (json.dumps(content, indent=1) + "\n").encode())
        self.count = len(rows)


@dataclass
class Keeper:
    """What a benchmark on this machine, which is `target`, leaves in `file`."""

    file: File
    target: Target

    def check(self, engines: Mapping[str, Artifact]) -> None:
        """Raise UsageError for an engine whose graph is not there, and for a file that cannot be written."""
        self.file.refuse_unwritable()
        for engine in engines.values():
            graphs.of_engine(engine)

    def keep(self, report: BenchmarkReport, engines: Mapping[str, Artifact]) -> None:
        """Write the latency of single queries, and the time of an offline query where batches were measured.

        Raises UsageError when the run is not valid: what disturbed it would be fitted.
        """
        if report.doubts:
            raise not_valid(report.doubts)
        rows = []
        for label, engine in engines.items():
            network, found = graphs.of_engine(engine), report.engine(label)
            about = {"model": network.name, "precision": precision_of(engine.precision), "kernels": kernels(network)}
            times = {found.images_per_query: found.median_ns / 1e6}
            for batch, rates in found.per_second.items():
                times.setdefault(batch, 1e3 * batch / median(rates))
            rows += [{**about, "batch": batch, "latency_ms": ms} for batch, ms in times.items()]
        self.file.write(self.target, report.machine, rows)


def not_valid(doubts: Sequence[str]) -> UsageError:
    """Why nothing is kept of a run: what disturbed it would be fitted."""
    fix = "measure again when the device does nothing else"
    return UsageError("nothing is fitted on a run that is not valid", problems=list(doubts), fix=fix)


def kernels(network: Network) -> Any:
    """The kernels of a network, as a file of measurements has them."""
    return to_json(network.layers)


def precision_of(found: Precision) -> str:
    """Its name in a file of measurements, where TensorRT's graphs in INT8 and FP16 are INT8."""
    return "fp32" if found is Precision.FP32 else "int8" if found is Precision.INT8 else "fp16"


def _content(path: Path) -> Any:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise UsageError(f"{printable(path)} is not a list of measurements", why=f"it is larger than {_LIMIT_BYTES} bytes")
        return json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{printable(path)} is not JSON", why=str(error)) from error


def _problem(row: Any, target: Target) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        return "it names no model"
    if row.get("precision") not in PRECISIONS:
        return f"precision is {row.get('precision')!r}, not one of {', '.join(PRECISIONS)}"
    if target.rate(row["precision"]) <= 0:
        return f"{target.name} has no {row['precision']}"
    batch, found = row.get("batch", 1), row.get("latency_ms")
    if not isinstance(batch, int) or isinstance(batch, bool) or not 1 <= batch <= 4096:
        return f"batch is {batch!r}"
    if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 < found < 1e9:
        return f"latency_ms is {found!r}"
    try:
        _network(row) if "kernels" in row else None
    except (KeyError, TypeError, ValueError) as error:
        return f"its kernels cannot be read ({type(error).__name__}: {error})"
    return ""


def _network(row: Mapping[str, Any]) -> Network:
    """The inverse of what `write` keeps of a network. Raises TypeError or ValueError for what is none."""
    layers = []
    for told in row["kernels"]:
        if not isinstance(told, Mapping) or set(told) != _PARTS_OF_A_LAYER:
            raise ValueError("a kernel has other parts than these: " + ", ".join(sorted(_PARTS_OF_A_LAYER)))
        texts = {key: value for key, value in told.items() if key in ("name", "kind")}
        numbers = {key: value for key, value in told.items() if key not in ("name", "kind", "operators")}
        if not all(isinstance(value, (bool, int)) and 0 <= value < 1 << 60 for value in numbers.values()):
            raise ValueError("a kernel's sizes are not natural numbers")
        layers.append(Layer(operators=tuple(map(str, told["operators"])), **texts, **numbers))
    if not layers:
        raise ValueError("there are none")
    return Network.of(row["model"], layers, has_qdq=any(layer.is_int8 for layer in layers))


def _target(told: Mapping[str, Any]) -> Target:
    """The inverse of `to_json` of a target."""
    figures = {}
    for name, each in told["figures"].items():
        if name not in targets.UNITS or not 0 <= float(each["value"]) < 1e12:
            raise ValueError(f"figure {name}")
        figures[str(name)] = Figure(float(each["value"]), str(each["source"]), bool(each["derived"]))
    if told["kind"] not in ("gpu", "cpu"):
        raise ValueError("kind")
    facts: dict[str, Any] = {key: tuple(map(str, told[key])) for key in ("aliases", "features", "jetpack")}
    facts |= {key: str(told[key]) for key in ("name", "title", "compute_capability", "arch")}
    mode = None if told["mode"] is None else str(told["mode"])
    modes = tuple(PowerMode(**each) for each in told["modes"])
    return Target(kind=told["kind"], figures=figures, modes=modes, mode=mode, **facts)
