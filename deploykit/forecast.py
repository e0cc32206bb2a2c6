"""MODEL -> its kernels, its predicted latency, and what of it fits a budget, for a device that nobody has yet.

MODEL is a bundle, an artifact's folder, an ONNX file or a name. A name is built and exported in memory, with random weights,
because latency does not depend on them; everything else is read without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from deploykit import bundle, targets
from deploykit.artifact import MANIFEST, Format, artifact_of, read_artifact
from deploykit.errors import UsageError, printable
from deploykit.intake import door
from deploykit.targets import Target, fit, latency, layers
from deploykit.targets.latency import Arithmetic, Fit, Prediction
from deploykit.targets.layers import Network

BATCHES = (1, 2, 4, 8, 16, 32)
_PRECISIONS: tuple[Literal["int8", "fp16", "fp32"], ...] = ("int8", "fp16", "fp32")
_RELATIVES = 4
_MOST_MEASUREMENTS = 1000
_UNITS_NS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}


@dataclass(frozen=True)
class Choice:
    """One way to keep a budget. `fits` when the whole interval is below it, `may fit` when the prediction itself is."""

    network: str
    prediction: Prediction
    fits: Literal["fits", "may fit", "does not fit"]


def network_of(model: str, *, size: int | None = None, precision: str | None = None) -> Network:
    """The kernels of a model; `precision` picks one graph of a bundle, `size` is for inputs that leave it open.

    Raises UsageError for what is none of those kinds, ModelError for an unknown name.
    """
    path = Path(model)
    if bundle.is_bundle(path):
        return _of_bundle(path, precision, size)
    if (path / MANIFEST).is_file():
        found = read_artifact(path)
        if found.format is not Format.ONNX:
            raise UsageError(f"{printable(path)} holds no ONNX graph", fix="name the folder of the portable model")
        return layers.read(found.path, size=size)
    if path.suffix == ".onnx" or path.is_file():
        if artifact_of(path) is None:
            door.onnx_file(path)
        return layers.read(path, size=size)
    return _of_name(model)


def predict(
    model: str | Network,
    target: Target,
    *,
    precision: str | None = None,
    batch: int = 1,
    size: int | None = None,
    measured: Path | None = None,
) -> Prediction:
    """The latency of a model on a target. Without `precision` it is the graph's own: INT8 with Q/DQ, otherwise FP32.

    `measured` is a file of measurements on that very device, see `measurements`; then the constants are fitted on them.
    """
    network = network_of(model, size=size, precision=precision) if isinstance(model, str) else model
    wanted = arithmetic(precision or ("int8" if network.has_qdq else "fp32"), target)
    constants = None
    if measured is not None:
        stored = Fit.stored()
        start = stored.gpu if target.kind == "gpu" else stored.cpu
        constants = fit.calibrated(measurements(measured, target), start)
    return latency.predict(network, target, wanted, batch=batch, constants=constants)


def arithmetic(precision: str, target: Target) -> Arithmetic:
    """What a precision means on a target: FP32 is TF32 where a GPU has it, which is TensorRT's default."""
    found = "tf32" if precision == "fp32" and target.rate("tf32") > 0 else precision
    return next(each for each in latency.PRECISIONS if each == found)


def plan(model: str, target: Target, budget_ns: float, *, size: int | None = None, relatives: bool = True) -> list[Choice]:
    """What keeps the budget, best first: precisions and batches of a network, and of its smaller relatives at batch 1.

    Every case is listed, also those that do not fit; an INT8 graph is only planned in INT8.
    """
    network = network_of(model, size=size)
    kinds = ("int8",) if network.has_qdq else _PRECISIONS
    usable = [arithmetic(each, target) for each in kinds if target.rate(each) > 0]
    cases = [(network, each, batch) for each in usable for batch in BATCHES]
    for name in _smaller(model) if relatives else ():
        cases += [(network_of(name), each, 1) for each in usable]
    found = []
    for one, each, batch in cases:
        predicted = latency.predict(one, target, each, batch=batch)
        found.append(Choice(one.name, predicted, _verdict(predicted, budget_ns)))
    order = ("fits", "may fit", "does not fit")
    return sorted(found, key=lambda choice: (order.index(choice.fits), -choice.prediction.images_per_second))


def budget_of(text: str) -> float:
    """Nanoseconds of a time such as `5ms`. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(us|µs|ms|s)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{printable(text)!r} is not a time", fix="--budget 5ms")
    return float(found[1]) * _UNITS_NS[found[2]]


def measurements(path: Path, target: Target) -> list[fit.Row]:
    """The rows of a JSON file: a list of {"model", "precision", "batch", "latency_ms"} measured on one device.

    Raises UsageError with all problems at once.
    """
    try:
        content: Any = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{printable(path)} is not JSON", why=str(error)) from error
    example = '[{"model": "resnet18", "precision": "fp16", "batch": 1, "latency_ms": 2.5}]'
    if not isinstance(content, list) or not 1 <= len(content) <= _MOST_MEASUREMENTS:
        raise UsageError(f"{printable(path)} is not a list of measurements", fix=example)
    problems = [f"measurement {number}: {why}" for number, row in enumerate(content, 1) if (why := _problem(row, target))]
    if problems:
        raise UsageError(f"{printable(path)} has measurements that cannot be used", problems=problems, fix=example)
    return [
        fit.Row(
            network_of(row["model"]), target, arithmetic(row["precision"], target), row.get("batch", 1), row["latency_ms"] * 1e6
        )
        for row in content
    ]


def _problem(row: Any, target: Target) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        return "it names no model"
    if row.get("precision") not in _PRECISIONS:
        return f"precision is {row.get('precision')!r}, not one of {', '.join(_PRECISIONS)}"
    if target.rate(row["precision"]) <= 0:
        return f"{target.name} has no {row['precision']}"
    batch, found = row.get("batch", 1), row.get("latency_ms")
    if not isinstance(batch, int) or isinstance(batch, bool) or not 1 <= batch <= 4096:
        return f"batch is {batch!r}"
    if not isinstance(found, (int, float)) or isinstance(found, bool) or not 0 < found < 1e9:
        return f"latency_ms is {found!r}"
    return ""


def _verdict(predicted: Prediction, budget_ns: float) -> Literal["fits", "may fit", "does not fit"]:
    if predicted.interval_ns[1] <= budget_ns:
        return "fits"
    return "may fit" if predicted.latency_ns <= budget_ns else "does not fit"


def _of_bundle(path: Path, precision: str | None, size: int | None) -> Network:
    """The graph for TensorRT where there is one, in the precision that is asked for."""
    with bundle.opened(path) as found:
        names = sorted(found.manifest.models, key=lambda name: (not name.startswith("tensorrt"), not name.endswith("int8"), name))
        chosen = next((name for name in names if precision is None or name.endswith(f"-{precision}")), names[0] if names else "")
        blob = found.manifest.portable.get(f"{bundle.MODELS}/{chosen}/{bundle.GRAPH}")
        if blob is None:
            raise UsageError(f"{printable(path)} holds no ONNX graph")
        content = b"".join(bundle.pieces(found, blob))
    with TemporaryDirectory() as folder:
        graph = Path(folder, f"{chosen}.onnx")
        graph.write_bytes(content)
        door.onnx_file(graph)
        return layers.read(graph, size=size)


def _of_name(name: str) -> Network:
    import numpy as np
    import onnx_ir as ir

    from deploykit import models
    from deploykit.export import exporters
    from deploykit.recipe import ExportTable, ModelTable

    found = models.load(ModelTable(name=name, weights="none"))
    settings = ExportTable(batch=1)
    inputs = np.zeros((1, *found.preprocess.shape), np.float32)
    graph = exporters.exported(found, inputs, settings, exporters.choice(name, settings)[0], outputs=found.outputs)
    return layers.of_model(ir.to_proto(graph), name=name)


def _smaller(model: str) -> Sequence[str]:
    """Names of the catalogue that begin like this one and have fewer operations, the nearest first."""
    from deploykit import models

    entries = {entry.name: entry for entry in models.catalogue()}
    if model not in entries:
        return ()
    family = re.split(r"\d|_[a-z]+$", model)[0]
    own = entries[model]
    near = [
        entry
        for entry in entries.values()
        if re.split(r"\d|_[a-z]+$", entry.name)[0] == family and entry.task == own.task and entry.gmacs < 0.95 * own.gmacs
    ]
    return [entry.name for entry in sorted(near, key=lambda entry: -entry.gmacs)[:_RELATIVES]]


def target_of(name: str, mode: str | None = None) -> Target:
    """A target by name or file, in a power mode. Raises UsageError."""
    found = targets.find(name)
    return found if mode is None else targets.in_mode(found, mode)
