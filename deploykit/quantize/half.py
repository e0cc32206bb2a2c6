"""Artifact -> Artifact: every float of a graph in half precision, Q/DQ scales included, inputs and outputs float32.

A strongly typed engine computes in the type the graph states, so FP16 is a property of the file and not a build flag.
With Q/DQ the scales' type is the type of what stays float; FP16 scales exist from opset 19 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.artifact import SAMPLES, Artifact, Precision
from deploykit.errors import StageError
from deploykit.jsonable import JSON
from deploykit.machine import available_cores
from deploykit.quantize.expose import expose
from deploykit.runtimes import onnxruntime, padded, pieces, run

_FP16_MAX = float(np.finfo(np.float16).max)
_FP16_LEAST = float(np.finfo(np.float16).smallest_subnormal)
_LISTED = 20
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def to_fp16(model: Artifact, folder: Path) -> Artifact:
    """Write `model.onnx` typed in float16, and its golden samples, into `folder`.

    Raises StageError, naming them, when weights or scales are beyond float16's 65,504, or activations of a float graph are on its
    golden samples. Those of an INT8 graph are those of the float graph that it was made of.
    """
    graph = ir.load(model.path)
    underflows = _convert_initializers(graph.graph)
    seen = None if model.precision is Precision.INT8 else _activations(model, graph.graph)
    for node in graph.graph:
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.type = ir.TensorType(_HALF)
        if node.op_type == "Cast" and node.attributes.get_int("to") == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
    _cast_at_the_ends(graph.graph)
    path = folder / "model.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    onnxruntime.literally(model, path, model.samples()).save(folder / SAMPLES)
    tensors = sum(value.dtype == _HALF for value in graph.graph.initializers.values())
    precision = Precision.INT8 if model.precision is Precision.INT8 else Precision.FP16
    facts = {**model.facts, "float_type": "fp16", "tensors": tensors, "underflows": underflows, "activations": seen}
    return replace(model, path=path, stage="quantize", precision=precision, parents=(model.sha256,), facts=facts)


def _activations(model: Artifact, graph: ir.Graph) -> dict[str, JSON]:
    """What float16 makes of the activations on the golden samples, image by image: the largest value, whose it is, and the
    largest share of a tensor's values that would become zero."""
    names = [value.name for node in graph for value in node.outputs if value.dtype == _FLOAT and value.name is not None]
    exposed = expose(model.path, names, threads=available_cores())
    largest, lost = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for batch in _batches(model, exposed.batch or 1):
        answers = run(exposed.session, {exposed.source: batch})
        for name in names:
            values = np.abs(answers[exposed.outputs[name]].astype(np.float64))
            values = values[np.isfinite(values)]  # what is infinite, as the fill of a pool, stays so
            largest[name] = max(largest[name], float(values.max(initial=0)))
            gone = (values > 0) & (values < _FP16_LEAST / 2)
            lost[name] = max(lost[name], float(gone.sum()) / max(1, gone.size))
    exposed.session.close()
    problems = [f"{name}: {value:.4g} is beyond {_FP16_MAX:,.0f}" for name, value in largest.items() if value > _FP16_MAX]
    if problems:
        fix = "leave the network in fp32 (without --fp16)"
        raise StageError("activations do not fit float16", problems=problems[:_LISTED], fix=fix)
    if not names:
        return {}
    top, worst = max(largest, key=lambda name: largest[name]), max(lost, key=lambda name: lost[name])
    return {"largest": largest[top], "of": top, "most_lost": lost[worst], "lost_of": worst}


def _batches(model: Artifact, size: int) -> Iterator[NDArray[np.float32]]:
    """The golden inputs, so many at a time."""
    for piece in pieces(model, model.samples()):
        yield from (padded(piece[start : start + size], size) for start in range(0, len(piece), size))


def _convert_initializers(graph: ir.Graph) -> int:
    """Float constants to half; returns how many weights became zero.

    Scales are rounded up, so that nothing is clipped and none becomes zero, which runtimes refuse; quantization and
    dequantization read the same one, so a coarser scale costs steps but adds no bias. The smallest is 6e-8.
    """
    pairs = [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {node.inputs[1].name for node in pairs if node.inputs[1] is not None}
    problems, underflows = [], 0
    for name, value in graph.initializers.items():
        if value.const_value is None or value.dtype != _FLOAT:
            continue
        if any(use.node.op_type == "Resize" and use.idx == 2 for use in value.uses()):
            continue  # its scales are float32 whatever the type of what it resizes
        wide = value.const_value.numpy()
        with np.errstate(over="ignore", under="ignore"):
            narrow = _rounded_up(wide) if name in scales else wide.astype(np.float16)
        if (np.isfinite(wide) & ~np.isfinite(narrow)).any():
            problems.append(f"{name}: {np.abs(wide[np.isfinite(wide)]).max():.4g} is beyond float16's {_FP16_MAX:,.0f}")
        underflows += int(((narrow == 0) & (wide != 0)).sum())
        value.const_value = ir.tensor(narrow, name=name)
        value.type = ir.TensorType(_HALF)
    if problems:
        raise StageError("the graph does not fit float16", problems=problems, fix="leave it in fp32")
    return underflows


def _rounded_up(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    nearest = scales.astype(np.float16)
    return np.where(nearest < scales, np.nextafter(nearest, np.float16(np.inf)), nearest).astype(np.float16)


def _cast_at_the_ends(graph: ir.Graph) -> None:
    """Inputs and outputs stay float32, so that a program feeds and reads the same whatever the precision."""
    for value in list(graph.inputs):
        readers = list(value.uses())  # before the Cast becomes one
        cast = ir.node("Cast", [value], {"to": _HALF}, name=f"{value.name}/Cast")
        _describe(cast.outputs[0], f"{value.name}/fp16", _HALF, value.shape)
        graph.insert_before(graph.node(0), cast)
        for reader, index in readers:
            reader.replace_input_with(index, cast.outputs[0])
    for index, value in enumerate(list(graph.outputs)):
        name = value.name
        producer = value.producer()
        assert producer is not None
        cast = ir.node("Cast", [value], {"to": _FLOAT}, name=f"{name}/Cast")
        value.name = f"{name}/fp16"
        _describe(cast.outputs[0], name, _FLOAT, value.shape)
        graph.insert_after(producer, cast)
        graph.outputs[index] = cast.outputs[0]


def _describe(value: ir.Value, name: str | None, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
