"""Pairs of layers that may share a factor for each channel, and the factors put into their weights.

A factor s_i > 0 on what a layer writes into channel i and 1 / s_i on the weights that read it cancel out, as long as only
operators with f(s x) = s f(x) stand between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.quantize.place import output_axis

Floats = NDArray[np.float64]

# f(s x) = s f(x) for s > 0, channel by channel. Clip is not among them: whether a Relu6 is ever reached is known of the
# calibration images alone, and a bound for each channel is none that an int8 kernel can fuse.
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"})


@dataclass(frozen=True)
class Pair:
    """Layers with nothing between them but what a positive factor for each channel passes through.

    `producers` write `channels` channels each, `readers` take them as input 0. Usually there is one of each; in a
    residual stream, where Adds join several tensors, all of them share one set of factors.
    """

    channels: int
    producers: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]

    @property
    def tensors(self) -> list[str]:
        """What the readers read, each tensor once."""
        return list(dict.fromkeys(tensor_read(node) for node in self.readers))


def pairs(graph: ir.Graph) -> list[Pair]:
    """All pairs of a graph, in the order of their first producers."""
    found: list[Pair] = []
    done: set[ir.Node] = set()
    for node in graph:
        if _is_layer(node) and node not in done:
            pair = _pair(node.outputs[0])
            if pair is not None:
                found.append(pair)
                done.update(pair.producers)
    return found


def scale(graph: ir.Graph, pair: Pair, factors: Floats) -> None:
    """Multiply what the producers write by `factors` (C,) and divide the weights that read it, in place."""
    for node in pair.producers:
        weights = constant(node, 1)
        shape = [1] * weights.ndim
        shape[output_axis(node)] = -1
        _replace(graph, node, 1, weights * factors.reshape(shape))
        if _has_bias(node):
            _replace(graph, node, 2, constant(node, 2) * factors)
    for node in pair.readers:
        _replace(graph, node, 1, constant(node, 1) / _on_weights(factors, node))


def constant(node: ir.Node, index: int) -> Floats:
    """The weights (index 1) or the bias (index 2) of a layer."""
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float64)


def weights_by_input(node: ir.Node, channels: int) -> Floats:
    """The weights of a layer that reads `channels` channels: (O, C / groups, K), K of them for each pair of channels."""
    weights = constant(node, 1)
    if node.op_type == "Conv":
        return weights.reshape(*weights.shape[:2], -1)
    rows = weights if output_axis(node) == 0 else weights.T
    return rows.reshape(len(rows), channels, -1)


def as_read(values: Floats, node: ir.Node) -> Floats:
    """What belongs to a layer's input channels (C,) as each of its output channels sees it: (O, C / groups) or (1, C)."""
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    return values.reshape(1, -1) if groups == 1 else values.reshape(groups, -1).repeat(_outputs(node) // groups, axis=0)


def tensor_read(node: ir.Node) -> str:
    """The name of the activation that a layer reads."""
    value = node.inputs[0]
    assert value is not None
    return value.name or ""


def _pair(start: ir.Value) -> Pair | None:
    """The pair that the result of a layer belongs to; None when a factor on it would reach anything but layers."""
    values = _sharing_factors(start)
    if values is None:
        return None
    writing = [producer for value in values if (producer := value.producer()) is not None and _is_layer(producer)]
    readers = [use.node for value in values for use in value.uses() if _is_layer(use.node)]
    channels = {_outputs(node) for node in writing}
    if not readers or len(channels) != 1:
        return None
    return Pair(channels.pop(), tuple(writing), tuple(readers))


def _sharing_factors(start: ir.Value) -> list[ir.Value] | None:
    """All values that carry the same factors as `start`; None when one of them has to stay as it is."""
    found: dict[ir.Value, None] = {}
    todo = [start]
    while todo:
        value = todo.pop()
        if value in found:
            continue
        found[value] = None
        producer = value.producer()
        if producer is None or value.is_graph_output():
            return None
        passing = [use.node for use in value.uses() if not _is_layer(use.node)]
        todo += [node.outputs[0] for node in passing]
        if not _is_layer(producer):
            passing.append(producer)
            todo += [source for source in producer.inputs[: 2 if producer.op_type == "Add" else 1] if source is not None]
        if not all(_passes_factors(node) for node in passing):
            return None
    return list(found)


def _passes_factors(node: ir.Node) -> bool:
    """Whether factors on a node's activations come out as the same factors on its first output, the only one in use."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    if node.op_type == "Flatten":
        return node.attributes.get_int("axis", 1) == 1  # channels stay together, each as a stretch of columns
    if node.op_type == "Add":
        return len({_rank_and_channels(value) for value in node.inputs}) == 1
    if node.op_type == "Dropout":
        return len(node.inputs) < 3  # without `training_mode` everything passes
    return node.op_type in _HOMOGENEOUS


def _rank_and_channels(value: ir.Value | None) -> tuple[int, int] | ir.Value | None:
    """What the inputs of an Add must have in common; one whose shape is not known has nothing in common with another."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) < 2 or not isinstance(channels := shape[1], int):
        return value
    return len(shape), channels


def _is_layer(node: ir.Node) -> bool:
    """A Conv or Gemm whose input is (N, C, ...), with constant weights and a constant bias for each channel, or none."""
    if node.op_type not in ("Conv", "Gemm") or node.attributes.get_int("transA") or not _is_constant(node.inputs[1]):
        return False
    return not _has_bias(node) or (_is_constant(node.inputs[2]) and constant(node, 2).shape == (_outputs(node),))


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > 2 and node.inputs[2] is not None


def _outputs(node: ir.Node) -> int:
    return int(constant(node, 1).shape[output_axis(node)])


def _on_weights(factors: Floats, node: ir.Node) -> Floats:
    """Factors of the input channels (C,), in a shape that multiplies the layer's weights."""
    weights = constant(node, 1)
    if node.op_type == "Conv":
        rows = as_read(factors, node)
        return rows.reshape(*rows.shape, *[1] * (weights.ndim - 2))
    axis = 1 - output_axis(node)
    columns = factors.repeat(weights.shape[axis] // len(factors))
    return columns if axis == 1 else columns[:, None]


def _replace(graph: ir.Graph, node: ir.Node, index: int, values: Floats) -> None:
    """Give a layer other weights or another bias; where other nodes read the old ones too, the layer gets its own."""
    old = node.inputs[index]
    assert old is not None
    array = values.astype(np.float32)
    if len(old.uses()) == 1:
        old.const_value = ir.tensor(array, name=old.name)
        return
    name = f"{node.name}/{'weight' if index == 1 else 'bias'}"
    tensor = ir.tensor(array, name=name)
    own = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.register_initializer(own)
    node.replace_input_with(index, own)
