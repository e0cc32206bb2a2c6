"""Q/DQ put into a graph as planned: scales from ranges, weights and biases by the runtime's rules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.errors import StageError
from deploykit.quantize import place
from deploykit.quantize.ranges import (
    QuantParameters,
    Range,
    affine_int8,
    affine_uint8,
    largest_integer,
    symmetric_int8,
    weight_scales,
)
from deploykit.runtimes import QdqRules

INTEGERS = {"uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8}
_COMPUTE = {"uint8": affine_uint8, "affine int8": affine_int8, "int8": symmetric_int8}


def insert(model: ir.Model, decided: place.Plan, ranges: Mapping[str, Range], rules: QdqRules) -> None:
    """Put Q/DQ into `model` in place, as `decided` on this same model, with scales from `ranges`.

    Raises StageError when a range is missing or not finite.
    """
    parameters = activation_parameters(decided, ranges, rules)
    graph = model.graph
    scale_read: dict[tuple[ir.Node, int], float] = {}
    for name, uses in decided.uses.items():
        node, index = uses[0]
        value = node.inputs[index]
        assert value is not None
        dequantized = add_pair(graph, value, parameters[name])
        floats = [node for node, _ in uses if node not in decided.kernels]
        shared = _shared(graph, dequantized) if sum(map(_readers_inside, floats)) > 1 else dequantized
        for node, index in uses:
            node.replace_input_with(index, shared if node in floats else dequantized)
            scale_read[node, index] = parameters[name].scale
    layers = {layer.name for layer in decided.layers if layer.int8}
    for node in list(graph):
        if node.op_type in place.LAYERS and node.name in layers:
            _quantize_weights(graph, node, rules, scale_read[node, 0])


def activation_parameters(decided: place.Plan, ranges: Mapping[str, Range], rules: QdqRules) -> dict[str, QuantParameters]:
    """Scale and zero point of every quantized activation of a plan; those that must share a scale get one for all.

    Raises StageError naming what has no range.
    """
    missing = sorted(set(decided.uses) - set(ranges))
    if missing:
        raise StageError("these activations were not observed", problems=missing, fix="calibrate again")
    shared: dict[str, Range] = {}
    for name in decided.uses:
        root = decided.groups.get(name, name)
        shared[root] = shared[root].union(ranges[name]) if root in shared else ranges[name]
    compute = _COMPUTE[rules.activations]
    return {name: compute(shared[decided.groups.get(name, name)]) for name in decided.uses}


def add_pair(graph: ir.Graph, value: ir.Value, parameters: QuantParameters) -> ir.Value:
    """value -> QuantizeLinear -> DequantizeLinear; returns the last one's output."""
    name = value.name or ""
    scale = constant(graph, f"{name}/scale", np.float32(parameters.scale))
    zero_point = constant(graph, f"{name}/zero_point", np.array(parameters.zero_point, parameters.dtype))
    quantize = ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{name}/QuantizeLinear")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero_point], name=f"{name}/DequantizeLinear")
    describe(quantize.outputs[0], f"{name}/quantized", INTEGERS[parameters.dtype], value.shape)
    describe(dequantize.outputs[0], f"{name}/dequantized", ir.DataType.FLOAT, value.shape)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph.node(0), [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    return dequantize.outputs[0]


def _readers_inside(node: ir.Node) -> int:
    """How often a float operator reads its input: ONNX Runtime takes a HardSwish apart into x * hardsigmoid(x)."""
    return 2 if node.op_type == "HardSwish" else 1


def _shared(graph: ir.Graph, dequantized: ir.Value) -> ir.Value:
    """One float copy for all readers that run on floats: ONNX Runtime gives every reader of a DequantizeLinear its own, which
    costs time and hides patterns of several operators, such as x * sigmoid(x), from its fusions."""
    producer = dequantized.producer()
    assert producer is not None
    node = ir.node("Identity", [dequantized], name=f"{producer.name}/shared")
    describe(node.outputs[0], f"{dequantized.name}/shared", ir.DataType.FLOAT, dequantized.shape)
    graph.insert_after(producer, node)
    return node.outputs[0]


def _quantize_weights(graph: ir.Graph, node: ir.Node, rules: QdqRules, input_scale: float) -> None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    assert weight.name is not None
    bias_values = None if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float32)
    integers, scale, _ = quantized_weights(node, rules, input_scale)
    if rules.weights == "int8":
        integers = _with_wider_groups(node, integers, rules.group_channels)
    node.replace_input_with(1, _weight_pair(graph, node, weight.name, integers, scale, rules))
    if bias is not None and bias_values is not None and rules.bias == "int32":
        node.replace_input_with(2, _bias_dequantized(graph, node, bias_values, scale * np.float32(input_scale)))
    for value in (weight, bias):
        if value is not None and value.name is not None and value.is_initializer() and not value.uses():
            del graph.initializers[value.name]


def quantized_weights(
    node: ir.Node, rules: QdqRules, input_scale: float
) -> tuple[NDArray[np.int8], NDArray[np.float32], tuple[int, ...]]:
    """A layer's weights as integers, one scale for each output channel, and the shape in which the scales multiply them."""
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    assert weight.const_value is not None
    values = weight.const_value.numpy().astype(np.float32)
    bias_values = None if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float32)
    axis = place.output_axis(node)
    bias_kept = bias_values if rules.bias == "int32" else None
    bits = _weight_bits(node, rules)
    scale = weight_scales(values, axis, bias=bias_kept, input_scale=input_scale, bits=bits)
    shape = tuple(-1 if index == axis else 1 for index in range(values.ndim))
    largest = largest_integer(bits)
    integers = np.clip(np.rint(values / scale.reshape(shape)), -largest, largest).astype(np.int8)
    return integers, scale, shape


def _with_wider_groups(node: ir.Node, integers: NDArray[np.int8], least: int) -> NDArray[np.int8]:
    """The weights (O, C / groups, ...) of a grouped Conv with as many groups in one as it takes to have `least` output channels.

    Sets the node's `group`. The zeros between groups add nothing, so every result is the same integer. Three times as many as
    wanted, where the number of groups has no smaller divisor, is the most that was faster (docs/decisions.md). Depthwise
    convolutions have kernels of their own and stay.
    """
    groups = node.attributes.get_int("group", 1) or 1
    if groups == 1 or integers.shape[1] == 1:
        return integers
    outputs, inputs = len(integers) // groups, integers.shape[1]
    at_once = next((n for n in range(1, groups + 1) if groups % n == 0 and least <= n * outputs <= 3 * least), 1)
    wide = np.zeros((groups // at_once, at_once, outputs, at_once, inputs, *integers.shape[2:]), np.int8)
    apart = integers.reshape(groups // at_once, at_once, outputs, inputs, *integers.shape[2:])
    for index in range(at_once):
        wide[:, index, :, index] = apart[:, index]
    node.attributes["group"] = ir.AttrInt64("group", groups // at_once)
    return wide.reshape(len(integers), at_once * inputs, *integers.shape[2:])


def largest_weight(node: ir.Node, rules: QdqRules) -> int:
    """What the integers of a layer's weights go up to, and down to with the other sign."""
    return largest_integer(_weight_bits(node, rules))


def _weight_bits(node: ir.Node, rules: QdqRules) -> int:
    return 8 if place.is_depthwise(node) else rules.weight_bits


def _weight_pair(
    graph: ir.Graph, node: ir.Node, name: str, integers: NDArray[np.int8], scale: NDArray[np.float32], rules: QdqRules
) -> ir.Value:
    label, axis = f"{node.name}/weight", place.output_axis(node)
    scale_value = constant(graph, f"{label}/scale", scale)
    zero_point = constant(graph, f"{label}/zero_point", np.zeros(scale.shape, np.int8))
    nodes = []
    if rules.weights == "float":
        source = graph.initializers[name]
        nodes.append(ir.node("QuantizeLinear", [source, scale_value, zero_point], {"axis": axis}, name=f"{label}/QuantizeLinear"))
        describe(nodes[0].outputs[0], f"{label}/quantized", ir.DataType.INT8, source.shape)
        quantized = nodes[0].outputs[0]
    else:
        quantized = constant(graph, f"{label}/quantized", integers)
    nodes.append(
        ir.node("DequantizeLinear", [quantized, scale_value, zero_point], {"axis": axis}, name=f"{label}/DequantizeLinear")
    )
    describe(nodes[-1].outputs[0], f"{label}/dequantized", ir.DataType.FLOAT, ir.Shape(integers.shape))
    graph.insert_before(node, nodes)
    return nodes[-1].outputs[0]


def _bias_dequantized(graph: ir.Graph, node: ir.Node, values: NDArray[np.float32], scale: NDArray[np.float32]) -> ir.Value:
    label = f"{node.name}/bias"
    integers = np.rint(values.astype(np.float64) / scale).astype(np.int32)
    inputs = [
        constant(graph, f"{label}/quantized", integers),
        constant(graph, f"{label}/scale", scale),
        constant(graph, f"{label}/zero_point", np.zeros(scale.shape, np.int32)),
    ]
    dequantize = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{label}/DequantizeLinear")
    describe(dequantize.outputs[0], f"{label}/dequantized", ir.DataType.FLOAT, ir.Shape(values.shape))
    graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
    """A new initializer of `graph`."""
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(np.asarray(array).shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def describe(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    """Name and type, so that the file says what every tensor is without shape inference."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
