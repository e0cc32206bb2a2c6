"""Artifact -> Artifact: the floats of a graph in half precision, Q/DQ scales included, inputs and outputs float32.

A strongly typed engine computes in the type the graph states, so FP16 is a property of the file and not a build flag.
With Q/DQ the scales' type is the type of what stays float; FP16 scales exist from opset 19 on. Nodes that stay in float32
have a cast at each edge to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.artifact import SAMPLES, Artifact, Precision
from deploykit.errors import StageError, UsageError
from deploykit.jsonable import JSON
from deploykit.progress import Progress, silent
from deploykit.quantize import place
from deploykit.quantize.narrowed import MOST, activations
from deploykit.runtimes import onnxruntime

# What goes wrong in half precision although the numbers at both ends fit: exponentials, long sums, decoding of boxes and the
# choice among them: our reading of the kinds that NVIDIA names, by operator. A mean is no larger than what it is of.
STAY_FLOAT32 = frozenset(
    (
        *("Softmax", "LogSoftmax", "Exp", "Log", "Pow", "NonMaxSuppression"),
        *("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "CumSum"),
    )
)
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def to_fp16(
    model: Artifact,
    folder: Path,
    *,
    float32: Sequence[str] = (),
    batches: Callable[[int], Iterable[NDArray[np.float32]]] | None = None,
    images: int = 0,
    progress: Progress = silent,
) -> Artifact:
    """Write `model.onnx` typed in float16, and its golden samples, into `folder`.

    `float32`: names and patterns of nodes, or operators, that stay in float32 beside those of `STAY_FLOAT32`. What is in
    INT8 stays so. `batches(n)` gives `images` calibration images as (n, C, H, W) arrays.

    Raises UsageError when one of the names
    fits no node, and StageError, naming them, when weights or scales are beyond float16's 65,504, or activations are on the
    golden samples or the calibration images. Those of an INT8 graph are those of the float graph that it was made of, unless
    that one was equalized first.
    """
    graph = ir.load(model.path)
    kept = _kept(graph.graph, float32)
    underflows = _convert_initializers(graph.graph, kept)
    narrowed = [value for node in graph.graph for value in node.outputs if value.dtype == _FLOAT and _becomes_half(value, kept)]
    names = [value.name or "" for value in narrowed]
    is_seen = model.precision is Precision.INT8 and not model.facts.get("equalized")
    seen = None if is_seen else activations(model, graph.graph, names, batches=batches, images=images, progress=progress)
    for node in graph.graph:
        if node in kept:
            continue
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.type = ir.TensorType(_HALF)
        if node.op_type == "Cast" and node.attributes.get_int("to") == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
    _cast_between(graph.graph, kept)
    _cast_at_the_ends(graph.graph, kept)
    path = folder / "model.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    onnxruntime.literally(model, path, model.samples()).save(folder / SAMPLES)
    tensors = sum(value.dtype == _HALF for value in graph.graph.initializers.values())
    precision = Precision.INT8 if model.precision is Precision.INT8 else Precision.FP16
    facts: dict[str, JSON] = {**model.facts, "float_type": "fp16", "tensors": tensors, "underflows": underflows}
    facts |= {"activations": seen, "float32_nodes": [node.name for node in graph.graph if node in kept]}
    return replace(model, path=path, stage="quantize", precision=precision, parents=(model.sha256,), facts=facts)


def _kept(graph: ir.Graph, patterns: Sequence[str]) -> frozenset[ir.Node]:
    """The nodes that stay in float32. Layers between Q and DQ are none of them: TensorRT runs those on integers."""
    nodes = [node for node in graph if node.op_type not in (*_QDQ, "Cast")]

    def fits(node: ir.Node, pattern: str) -> bool:
        return node.op_type == pattern or place.fits(node.name or "", pattern)

    unknown = [pattern for pattern in patterns if not any(fits(node, pattern) for node in nodes)]
    if unknown:
        names = ", ".join(str(node.name) for node in nodes[:5])
        raise UsageError("build.float32 fits no node", problems=unknown, fix=f"operators such as Softmax, or nodes: {names}, ...")
    asked = {node for node in nodes if any(fits(node, pattern) for pattern in patterns)}
    return frozenset(node for node in nodes if (node in asked or node.op_type in STAY_FLOAT32) and not _is_int8_layer(node))


def _is_int8_layer(node: ir.Node) -> bool:
    """Its weights come out of a DequantizeLinear."""
    weights = node.inputs[1] if node.op_type in place.LAYERS and len(node.inputs) > 1 else None
    producer = None if weights is None else weights.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _reads_half(node: ir.Node, index: int, kept: Collection[ir.Node]) -> bool:
    """Whether a node wants this input in half: a Resize has its scales in float32 whatever the type of what it resizes."""
    return node not in kept and not (node.op_type == "Resize" and index == 2)


def _becomes_half(value: ir.Value, kept: Collection[ir.Node]) -> bool:
    """Whether a float is seen in half by anything: it is made so, or it is cast for a reader."""
    return value.producer() not in kept or any(_reads_half(use.node, use.idx, kept) for use in value.uses())


def _convert_initializers(graph: ir.Graph, kept: Collection[ir.Node]) -> int:
    """Float constants to half, with a float32 copy for nodes that stay so; returns how many weights became zero.

    Scales are rounded up, so that nothing is clipped and none becomes zero, which runtimes refuse; quantization and
    dequantization read the same one, so a coarser scale costs steps but adds no bias. The smallest is 6e-8.
    """
    pairs = [node for node in graph if node.op_type in _QDQ]
    scales = {node.inputs[1].name for node in pairs if node.inputs[1] is not None}
    problems, underflows = [], 0
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.dtype != _FLOAT:
            continue
        wide = value.const_value.numpy()
        float_readers = [(node, index) for node, index in value.uses() if not _reads_half(node, index, kept)]
        if float_readers and len(float_readers) == len(value.uses()):
            continue
        if float_readers:
            constant = ir.tensor(wide, name=f"{name}/float32")
            copy = ir.Value(name=constant.name, type=value.type, shape=value.shape, const_value=constant)
            graph.register_initializer(copy)
            for node, index in float_readers:
                node.replace_input_with(index, copy)
        with np.errstate(over="ignore", under="ignore"):
            narrow = _rounded_up(wide) if name in scales else wide.astype(np.float16)
        if (np.isfinite(wide) & ~np.isfinite(narrow)).any():
            problems.append(f"{name}: {np.abs(wide[np.isfinite(wide)]).max():.4g} is beyond float16's {MOST:,.0f}")
        underflows += int(((narrow == 0) & (wide != 0)).sum())
        value.const_value = ir.tensor(narrow, name=name)
        value.type = ir.TensorType(_HALF)
    if problems:
        raise StageError("the graph does not fit float16", problems=problems, fix="leave it in fp32")
    return underflows


def _rounded_up(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    nearest = scales.astype(np.float16)
    return np.where(nearest < scales, np.nextafter(nearest, np.float16(np.inf)), nearest).astype(np.float16)


def _cast_between(graph: ir.Graph, kept: Collection[ir.Node]) -> None:
    """One cast of each value that is read in the other float type than it is made in."""
    made = [value for node in graph for value in node.outputs if value.dtype in (_FLOAT, _HALF)]
    for value in made:
        producer, is_half = value.producer(), value.dtype == _HALF
        readers = [(node, index) for node, index in value.uses() if _reads_half(node, index, kept) != is_half]
        if readers:
            wanted, word = (_FLOAT, "float32") if is_half else (_HALF, "fp16")
            cast = ir.node("Cast", [value], {"to": wanted}, name=f"{value.name}/{word}/Cast")
            _describe(cast.outputs[0], f"{value.name}/{word}", wanted, value.shape)
            assert producer is not None
            graph.insert_after(producer, cast)
            for node, index in readers:
                node.replace_input_with(index, cast.outputs[0])


def _cast_at_the_ends(graph: ir.Graph, kept: Collection[ir.Node]) -> None:
    """Inputs and outputs stay float32, so that a program feeds and reads the same whatever the precision."""
    for value in graph.inputs:
        readers = [(node, index) for node, index in value.uses() if _reads_half(node, index, kept)]
        if value.dtype != _FLOAT or not readers:
            continue
        cast = ir.node("Cast", [value], {"to": _HALF}, name=f"{value.name}/Cast")
        _describe(cast.outputs[0], f"{value.name}/fp16", _HALF, value.shape)
        graph.insert_before(graph.node(0), cast)
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])
    for index, value in enumerate(list(graph.outputs)):
        producer, name = value.producer(), value.name
        if value.dtype != _HALF or producer is None:
            continue
        cast = ir.node("Cast", [value], {"to": _FLOAT}, name=f"{name}/Cast")
        value.name = f"{name}/fp16"
        _describe(cast.outputs[0], name, _FLOAT, value.shape)
        graph.insert_after(producer, cast)
        graph.outputs[index] = cast.outputs[0]


def _describe(value: ir.Value, name: str | None, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
