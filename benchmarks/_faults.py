"""Faults that are planted into graphs: what each does to a model, and the small edits that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Change = Callable[[NDArray[Any]], NDArray[Any]]
LAYERS = ("Conv", "Gemm", "MatMul")


def layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and matrix products that have stored weights."""
    stored = {value.name for value in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in LAYERS and stored_name(model, node.input[1]) in stored]


def stored_name(model: onnx.ModelProto, name: str) -> str:
    """The initializer that a constant input comes from, through its Q/DQ."""
    producers = {output: node for node in model.graph.node for output in node.output}
    while name in producers:
        name = str(producers[name].input[0])
    return name


def value_of(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    """The stored array of that name."""
    return numpy_helper.to_array(next(value for value in model.graph.initializer if value.name == name))


def change(model: onnx.ModelProto, name: str, how: Change) -> None:
    """Replace a stored array by what `how` makes of a copy of it."""
    value = next(value for value in model.graph.initializer if value.name == name)
    value.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(how(numpy_helper.to_array(value).copy())), name))


def noisy_channel(model: onnx.ModelProto, node: onnx.NodeProto, magnitude: float, random: np.random.Generator) -> str:
    """The weights of one output channel, with noise of `magnitude` times their own size on them."""
    last = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _transposed(node))

    def how(weights: NDArray[Any]) -> NDArray[Any]:
        axis = weights.ndim - 1 if last else 0
        rows = np.moveaxis(weights, axis, 0)
        channel = int(random.integers(len(rows)))
        values = rows[channel].astype(np.float64)
        values = values + magnitude * np.sqrt((values**2).mean()) * random.standard_normal(values.shape)
        if np.issubdtype(weights.dtype, np.integer):
            limits = np.iinfo(weights.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        rows[channel] = values.astype(weights.dtype)
        return weights

    change(model, stored_name(model, node.input[1]), how)
    return str(node.name)


def wrong_weight_scale(model: onnx.ModelProto, node: onnx.NodeProto, magnitude: float, random: np.random.Generator) -> str:
    """The scale of one output channel's weights times 1 + `magnitude`, as dequantization reads it."""
    dequantizer = next(other for other in model.graph.node if node.input[1] in other.output)

    def how(scale: NDArray[Any]) -> NDArray[Any]:
        flat = scale.reshape(-1)
        flat[random.integers(flat.size)] *= 1 + magnitude
        return flat.reshape(scale.shape)

    _own(model, dequantizer, 1, how)
    return str(node.name)


def wrong_activation_scale(model: onnx.ModelProto, node: onnx.NodeProto, magnitude: float, random: np.random.Generator) -> str:
    """The scale with which a layer's input is dequantized, alone, times 1 + `magnitude`."""
    del random
    dequantizer = next(other for other in model.graph.node if node.input[0] in other.output)
    _own(model, dequantizer, 1, lambda scale: scale * np.float32(1 + magnitude))
    return str(node.name)


def wrong_deviation(model: onnx.ModelProto, magnitude: float) -> None:
    """Pictures are divided by a deviation that is off: a multiplication by 1 + `magnitude` in front of everything."""
    source = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["scaled picture" if name == source else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array(1 + magnitude, np.float32), "deviation"))
    model.graph.node.insert(0, onnx.helper.make_node("Mul", [source, "deviation"], ["scaled picture"], "normalise"))


def float_weights(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """A layer that lost the Q/DQ of its weights, and keeps their values: it cannot run in int8 any more."""
    dequantizer = next(other for other in model.graph.node if node.input[1] in other.output)
    integers, scale = (value_of(model, name) for name in dequantizer.input[:2])
    zero = value_of(model, dequantizer.input[2]) if len(dequantizer.input) > 2 else np.zeros(1, integers.dtype)
    axis = next((item.i for item in dequantizer.attribute if item.name == "axis"), 1)
    shape = [-1 if index == axis else 1 for index in range(integers.ndim)] if scale.size > 1 else [1] * integers.ndim
    values = (integers.astype(np.float32) - zero.astype(np.float32).reshape(shape if zero.size > 1 else 1)) * scale.reshape(shape)
    name = f"{node.name}/float weights"
    model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    node.input[1] = name


def other_rows(model: onnx.ModelProto, order: NDArray[np.int64]) -> None:
    """The last layer answers its classes in another order: weights, scales and bias alike."""
    node = layers(model)[-1]
    names = {stored_name(model, name) for name in node.input[1:]}
    for name in node.input[1:]:
        dequantizer = next((other for other in model.graph.node if name in other.output), None)
        names |= set(dequantizer.input) if dequantizer is not None else set()
    stored = {value.name for value in model.graph.initializer}
    for name in names & stored:
        value = value_of(model, name)
        axis = 1 if value.ndim == 2 and value.shape[0] != len(order) else 0
        if value.ndim and value.shape[axis] == len(order):
            change(model, name, partial(np.take, indices=order, axis=axis))


def weights_of(model: onnx.ModelProto, node: onnx.NodeProto, how: Change) -> None:
    """Change the stored weights of one layer."""
    change(model, stored_name(model, node.input[1]), how)


def _own(model: onnx.ModelProto, node: onnx.NodeProto, index: int, how: Change) -> None:
    """Change a stored input of one node alone: others may read the same array."""
    name = f"{node.name}/planted {index}"
    value = np.ascontiguousarray(how(value_of(model, node.input[index]).copy()))
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    node.input[index] = name


def _transposed(node: onnx.NodeProto) -> bool:
    return any(item.name == "transB" and item.i for item in node.attribute)
