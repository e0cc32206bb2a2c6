"""Where quantization hurts: the noise at the network's output that each tensor and each layer's weights cause alone.

One sweep measures all of them. A graph is built in which every quantization has a switch for each sample of the batch; an
image is then repeated once for each switch, so that a sample shows the output with one thing quantized and all else in
float. Noise of independent roundings adds up, so the same numbers predict what keeping a layer in float removes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.progress import Progress, silent
from deploykit.quantize import place
from deploykit.quantize.insert import add_pair, constant, describe, quantized_weights
from deploykit.quantize.ranges import QuantParameters
from deploykit.runtimes import QdqRules, onnxruntime, run

_SWITCHES = "switches"
_NO_NOISE = 1e-20
_AT_ONCE = 16


@dataclass(frozen=True)
class Errors:
    """Noise power at the output over the signal's, by activation (tensor name) and by layer (its weights, node name)."""

    activations: Mapping[str, float]
    weights: Mapping[str, float]

    def total(self, decided: place.Plan) -> float:
        """The noise that a plan is expected to cause, as a share of the signal's power."""
        layers = place.claimed(decided)
        return sum(self.activations.get(name, 0.0) for name in decided.uses) + sum(self.weights.get(name, 0.0) for name in layers)


def sweep(
    model: ir.Model,
    decided: place.Plan,
    parameters: Mapping[str, QuantParameters],
    rules: QdqRules,
    images: NDArray[np.float32],
    *,
    progress: Progress = silent,
) -> Errors:
    """Measure every activation and every layer's weights of a plan alone, on `images` (n, C, H, W).

    `decided` and `parameters` are for this float `model`, which is left as it is. Costs about one inference for each image
    and each thing that is quantized.
    """
    layers = place.claimed(decided)
    done, total = 0, len(images) * (len(decided.uses) + len(layers))

    def announced(step: int) -> None:
        nonlocal done
        done += step
        progress("sensitivity", done, total)

    def measured(graph: ir.Model, count: int) -> list[float]:
        noise = np.zeros(count)
        session = onnxruntime.reference(ir.to_proto(graph).SerializeToString(), optimise=True, arena=False)
        for image in images:
            noise += _noise(session, graph, image, count)
            announced(count)
        session.close()
        return list((noise / len(images)).tolist())

    activations = measured(_with_switched_activations(_copy(model), decided, parameters), len(decided.uses))
    weights = measured(_with_switched_weights(_copy(model), rules, layers, decided, parameters), len(layers))
    return Errors(dict(zip(decided.uses, activations, strict=True)), dict(zip(layers, weights, strict=True)))


def decibels(noise: float) -> float:
    """A share of the signal's power as a signal-to-noise ratio in dB; no noise at all is 200 dB, which JSON can hold."""
    return -10 * math.log10(max(noise, _NO_NOISE))


def _noise(session: onnxruntime.OnnxSession, graph: ir.Model, image: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Noise over signal at the output for each of `count` switches alone."""
    source, switches = graph.graph.inputs
    rows_fixed, batch_fixed = _first_size(switches), _first_size(source)
    at_once = rows_fixed if isinstance(rows_fixed, int) else min(_AT_ONCE, count + 1)
    batch = batch_fixed if isinstance(batch_fixed, int) else at_once
    answers = []
    for rows in _patterns(count, at_once):
        inputs = {str(source.name): np.repeat(image[None], batch, axis=0), _SWITCHES: rows}
        (answer,) = run(session, inputs).values()
        answers.append(answer.reshape(batch, -1)[:at_once].astype(np.float64))
    flat = np.concatenate(answers)[: count + 1]
    signal = float((flat[0] ** 2).sum())
    noise: NDArray[np.float64] = ((flat[1:] - flat[0]) ** 2).sum(axis=1) / (signal or 1.0)
    return noise


def _patterns(count: int, at_once: int) -> Iterator[NDArray[np.bool_]]:
    """Switches (at_once, count): none is on in the first sample, then each alone; the rest of the last batch has none on."""
    rows = np.concatenate([np.zeros((1, count), bool), np.eye(count, dtype=bool)])
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        yield np.concatenate([some, np.zeros((at_once - len(some), count), bool)])


def _with_switched_activations(model: ir.Model, decided: place.Plan, parameters: Mapping[str, QuantParameters]) -> ir.Model:
    """Each quantized tensor is read as it is, or through Q/DQ in the samples whose switch is on."""
    graph = model.graph
    readers = {name: [(str(node.name), index) for node, index in uses] for name, uses in decided.uses.items()}
    nodes = {node.name: node for node in graph}
    values = [_read(nodes[found[0][0]], found[0][1]) for found in readers.values()]
    switches = _add_switches(graph, values)
    for number, ((name, found), value) in enumerate(zip(readers.items(), values, strict=True)):
        chosen = _switched(graph, value, add_pair(graph, value, parameters[name]), switches, number)
        for node, index in found:
            nodes[node].replace_input_with(index, chosen)
    return model


def _with_switched_weights(
    model: ir.Model, rules: QdqRules, layers: Sequence[str], decided: place.Plan, parameters: Mapping[str, QuantParameters]
) -> ir.Model:
    """Each layer stands there twice, with its own weights and with quantized ones for the samples whose switch is on."""
    graph = model.graph
    scales = {(str(node.name), index): parameters[name].scale for name, uses in decided.uses.items() for node, index in uses}
    nodes = {node.name: node for node in graph}
    switches = _add_switches(graph, [nodes[name].outputs[0] for name in layers])
    for number, name in enumerate(layers):
        node = nodes[name]
        integers, scale, shape = quantized_weights(node, rules, scales[name, 0])
        weights = constant(graph, f"{name}/switched", integers.astype(np.float32) * scale.reshape(shape))
        twin = ir.node(node.op_type, [node.inputs[0], weights, *node.inputs[2:]], dict(node.attributes), name=f"{name}/twin")
        result = node.outputs[0]
        describe(twin.outputs[0], f"{name}/twin", ir.DataType.FLOAT, result.shape)
        graph.insert_after(node, twin)
        uses = list(result.uses())
        is_output = result.is_graph_output()
        chosen = _switched(graph, result, twin.outputs[0], switches, number)
        for use in uses:
            use.node.replace_input_with(use.idx, chosen)
        if is_output:
            graph.outputs[list(graph.outputs).index(result)] = chosen
    return model


def _add_switches(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """An input with a switch for each of `values` in each sample; or in one row for the whole batch, where a value does not
    count samples first, as in transformers that transpose the batch or cut images into windows."""
    batch = _first_size(graph.inputs[0])
    by_sample = batch is not None and all(_first_size(value) == batch for value in values)
    shape = ir.Shape([batch if by_sample else 1, len(values)])
    switches = ir.Value(name=_SWITCHES, shape=shape, type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(switches)
    return switches


def _switched(graph: ir.Graph, off: ir.Value, on: ir.Value, switches: ir.Value, number: int) -> ir.Value:
    """`on` in the samples whose switch is on, else `off`."""
    # A single row is made a scalar, which selects in a tensor of any shape.
    per_sample = [-1] + [1] * (len(off.shape) - 1) if _first_size(switches) != 1 and off.shape is not None else []
    name = f"switch/{number}"
    column = constant(graph, f"{name}/column", np.array([number], np.int64))
    shape = constant(graph, f"{name}/shape", np.array(per_sample, np.int64))
    gather = ir.node("Gather", [switches, column], {"axis": 1}, name=f"{name}/Gather")
    reshape = ir.node("Reshape", [gather.outputs[0], shape], name=f"{name}/Reshape")
    where = ir.node("Where", [reshape.outputs[0], on, off], name=f"{name}/Where")
    for node, suffix in ((gather, "gathered"), (reshape, "reshaped")):
        node.outputs[0].name = f"{name}/{suffix}"
    describe(where.outputs[0], f"{name}/chosen", ir.DataType.FLOAT, off.shape)
    producer = on.producer()
    assert producer is not None
    graph.insert_after(producer, [gather, reshape, where])
    return where.outputs[0]


def _first_size(value: ir.Value) -> int | ir.SymbolicDim | None:
    """The size of a value's first axis, None where its shape is not known or it has none."""
    return value.shape[0] if value.shape is not None and len(value.shape) else None


def _read(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))
