"""Rules that hold for every runtime, and what several runtimes' rules ask in the same words."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from deploykit.quantize import place
from deploykit.quantize.lint.rule import rule
from deploykit.quantize.lint.view import (
    DQ,
    PASSING,
    Q,
    View,
    array,
    at,
    axis,
    dequantizer,
    dtype,
    heads,
    is_answer,
    is_constant,
    is_integer_op,
    is_layer,
    is_per_channel,
    is_quantized_later,
    made_by,
    name,
    op,
    original,
    quantized_type,
    quantizer,
    reached,
    readers,
    same_parameters,
    shape,
)

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SIXTEEN = (ir.DataType.INT16, ir.DataType.UINT16)
_FITS = 64  # 2 * 255 * 64 is below 2^15, 2 * 255 * 65 above


@rule(
    "note",
    cost="it runs in float; there is nothing to check",
    fix="quantize it: deploykit export NETWORK --to RUNTIME --int8 --calibrate DIR",
    of_graph=True,
)
def not_quantized(view: View, _node: ir.Node) -> str:
    """A file to be judged holds Q/DQ or integer operators."""
    return "" if is_quantized(view) else "no QuantizeLinear, no DequantizeLinear and no operator on integers"


@rule(
    "wrong",
    cost="every value is rescaled or shifted on the way, literally and in every runtime",
    fix="give both nodes of the pair the same scale, zero point and axis",
)
def pair_differs(_view: View, node: ir.Node) -> str:
    """A DQ undoes its Q, so both have one scale, zero point, type and axis (ONNX, QuantizeLinear-19)."""
    if op(node) != DQ or (quantize := quantizer(node)) is None or same_parameters(quantize, node):
        return ""
    return f"{_told(node)} behind {name(quantize)} with {_told(quantize)}"


@rule("refused", cost="the scales do not fit the tensor", fix="one scale, or one for each element of the tensor's axis")
def scale_shape(_view: View, node: ir.Node) -> str:
    """A per-channel scale is one-dimensional and as long as the tensor's axis (ONNX, QuantizeLinear-13)."""
    if not heads(node) or not is_per_channel(node):
        return ""
    scales, sizes, along = shape(at(node, 1)), shape(at(node, 0)), axis(node)
    if scales is None or sizes is None or along is None or "block_size" in node.attributes or len(scales) != 1:
        return ""
    if not 0 <= along < len(sizes):
        return f"axis {along} of a tensor with {len(sizes)}"
    wanted, found = sizes[along], scales[0]
    return "" if None in (wanted, found) or wanted == found else f"{found} scales for {wanted} channels of axis {along}"


@rule(
    "note",
    cost="integers leave the quantized part of the graph, and whoever reads them has to know the scale",
    fix="put a DequantizeLinear behind it",
)
def quantize_without_dequantize(_view: View, node: ir.Node) -> str:
    """Q and DQ come in pairs, with nothing but operators that pass integers on between them."""
    if op(node) != Q:
        return ""
    behind = [reader for reader in reached(node, PASSING) if op(reader) == DQ or is_integer_op(reader)]
    return "" if behind else f"its {_type_name(node)} result goes to no DequantizeLinear"


@rule("note", cost="the second pair does nothing but cost a pass where it is not removed", fix="remove one of the two pairs")
def quantized_twice(_view: View, node: ir.Node) -> str:
    """Two pairs in a row with the same parameters round once: the second finds integers only."""
    first = dequantizer(at(node, 0)) if op(node) == Q else None
    return f"it repeats {name(first)}" if first is not None and same_parameters(first, node) else ""


@rule("slow", cost="the layer runs in float", fix="quantize its input and its weights, or accept it as a float layer")
def layer_not_quantized(view: View, node: ir.Node) -> str:
    """A layer is int8 when its input and its weights come from a DQ each; this one has neither."""
    return "neither its input nor its weights come from a DequantizeLinear" if operands(view, node) == (False, False) else ""


@rule(
    "slow",
    cost="a product of integers and floats has no int8 kernel: the layer runs in float, and pays for the conversion",
    fix="quantize its input and its weights, or neither",
)
def layer_half_quantized(view: View, node: ir.Node) -> str:
    """A layer is int8 when its input and its weights come from a DQ each; this one has only one of them."""
    return half_quantized(operands(view, node))


@rule(
    "slow",
    cost="an operator that could hand integers on has to convert them: a DQ, the operator in float, a Q",
    fix="give its result the scale and zero point of its input",
)
def passing_rescaled(_view: View, node: ir.Node) -> str:
    """MaxPool, Reshape and kin commute with Q and DQ where both sides have one scale (TensorRT developer guide, Q/DQ
    placement; ONNX Runtime 1.31: with two scales the operator stays float between DQ and Q)."""
    first = dequantizer(at(node, 0)) if op(node) in PASSING else None
    behind = next((reader for reader in readers(node) if op(reader) == Q), None)
    if first is None or behind is None or same_parameters(first, behind):
        return ""
    return f"{op(node)} between {name(first)} with {_told(first)} and {name(behind)} with {_told(behind)}"


@rule(
    "note",
    cost="an x86 CPU without an int8 dot product (VNNI) adds two products in 16 bits, which saturate: other answers than here",
    fix="7-bit weights: deploykit export NETWORK --to RUNTIME --int8 --cpu any --calibrate DIR, and parity RUN --isa haswell",
    of_graph=True,
)
def weights_of_eight_bits(view: View, _node: ir.Node) -> str:
    """Two products of uint8 and int8 fit in 16 bits while weights are at most 64 (Intel's manual, VPMADDUBSW); depthwise kernels
    widen first."""
    layers = [node for node in view.nodes if is_int8(view, node) and not _is_depthwise(node)]
    found = [largest for node in layers if (largest := _largest_weight(node)) is not None]
    large = sum(largest > _FITS for largest in found)
    return f"{large} of {len(found)} layers between Q/DQ have weights beyond {_FITS}" if large else ""


def is_quantized(view: View) -> bool:
    """Whether there is anything quantized in the graph."""
    return any(op(node) in (Q, DQ) or is_integer_op(node) for node in view.nodes)


def operands(view: View, node: ir.Node) -> tuple[bool, bool] | None:
    """Whether a layer's input and its weights come from a DQ; None for what is no layer."""
    if not is_layer(view, node):
        return None
    return dequantizer(at(node, 0)) is not None, dequantizer(at(node, 1)) is not None


def is_int8(view: View, node: ir.Node) -> bool:
    """Whether a node is a layer with both operands behind a DQ."""
    return operands(view, node) == (True, True)


def half_quantized(found: tuple[bool, bool] | None) -> str:
    """What to say of a layer with one quantized operand."""
    if found == (True, False):
        return "its input comes from a DequantizeLinear, its weights do not"
    return "its weights come from a DequantizeLinear, its input does not" if found == (False, True) else ""


def bad_scale(node: ir.Node) -> str:
    """Which scale of a Q or DQ is zero, negative or not finite; empty when none is."""
    scales = array(at(node, 1)) if heads(node) else None
    if scales is None:
        return ""
    flat = scales.ravel().astype(np.float64)
    bad = flat[~((flat > 0) & np.isfinite(flat))]
    return f"{len(bad)} of {len(flat)} scales not positive and finite, the first {bad[0]:g}" if len(bad) else ""


def requantized(node: ir.Node) -> str:
    """Which pair a Q follows directly with other parameters; empty when none."""
    first = dequantizer(at(node, 0)) if op(node) == Q else None
    if first is None or same_parameters(first, node):
        return ""
    return f"{_told(node)} directly behind {name(first)} with {_told(first)}"


def per_channel_activation(view: View, node: ir.Node) -> str:
    """How many scales an activation has when it has more than one."""
    if not heads(node) or not is_per_channel(node) or is_constant(view, at(node, 0)):
        return ""
    return f"{math.prod(size or 0 for size in shape(at(node, 1)) or ())} scales for an activation"


def wrong_weight_axis(view: View, node: ir.Node) -> str:
    """Which axis a layer's weights are quantized along when it is not that of its output channels."""
    weights = dequantizer(at(node, 1)) if is_layer(view, node) else None
    if weights is None or not is_per_channel(weights):
        return ""
    sizes = shape(at(node, 1))
    # A MatMul's stack of matrices has its columns last.
    wanted = len(sizes) - 1 if op(node) == "MatMul" and sizes else place.output_axis(node)
    return "" if axis(weights) == wanted else f"weights quantized along axis {axis(weights)}, output channels are axis {wanted}"


def sixteen_bits(node: ir.Node) -> str:
    """Which 16-bit integers a Q or DQ is of; empty for others."""
    kind = quantized_type(node) if heads(node) else None
    return f"quantized to {kind.name.lower()}" if kind is not None and kind in _SIXTEEN else ""


def uint8_weights(view: View, node: ir.Node) -> str:
    """Whether a layer's weights are unsigned."""
    weights = dequantizer(at(node, 1)) if is_layer(view, node) else None
    return "its weights are uint8" if weights is not None and quantized_type(weights) == ir.DataType.UINT8 else ""


def weight_zero_point(view: View, node: ir.Node) -> str:
    """Whether a layer's int8 weights have a zero point that is not 0."""
    weights = dequantizer(at(node, 1)) if is_layer(view, node) else None
    zeros = array(at(weights, 2)) if weights is not None and quantized_type(weights) == ir.DataType.INT8 else None
    return "its weights have a zero point that is not 0" if zeros is not None and zeros.any() else ""


def mixed_inputs(view: View, node: ir.Node) -> str:
    """Which input of an operator is float while another is quantized and the result will be."""
    floats = [value for value in node.inputs if value is not None and not is_constant(view, value) and dequantizer(value) is None]
    if not floats or not any(dequantizer(value) for value in node.inputs) or not is_quantized_later(node):
        return ""
    maker = made_by(floats[0]) or "an input of the graph"
    return f"input {floats[0].name!r} ({maker}) is float, another comes from a DequantizeLinear"


def answered_or_read(node: ir.Node) -> str:
    """Who keeps the result of a node from being quantized; empty when all its readers are Q with the same parameters."""
    behind = readers(node)
    quantizers = [reader for reader in behind if op(reader) == Q]
    others = [reader for reader in behind if op(reader) != Q]
    if is_answer(node):
        return "its result is an output of the graph"
    if others or not quantizers:
        return f"its result is read by {name(others[0])} without Q" if others else "its result is read by nothing"
    if all(same_parameters(quantizers[0], other) for other in quantizers):
        return ""
    return f"its result is quantized {len(quantizers)} times with different parameters"


def half_scale(node: ir.Node) -> ir.DataType | None:
    """The type of a scale that is FP16 or BF16."""
    kind = dtype(at(node, 1)) if heads(node) else None
    return kind if kind in HALVES else None


def reads_graph_input(node: ir.Node) -> bool:
    """Whether a layer is the first: its input, in front of Q/DQ and a Cast to FP16, is an input of the graph."""
    source = original(at(node, 0))
    producer = source.producer() if source is not None else None
    if producer is not None and op(producer) == "Cast":
        source = at(producer, 0)
    return source is not None and source.is_graph_input()


def _largest_weight(node: ir.Node) -> float | None:
    """The largest magnitude among a layer's int8 weights, stored or quantized in the file; None where it cannot be told."""
    weights = dequantizer(at(node, 1))
    if weights is None or quantized_type(weights) != ir.DataType.INT8:
        return None
    quantize = quantizer(weights)
    values, scales = array(at(quantize or weights, 0)), array(at(weights, 1))
    if values is None or scales is None or not values.size or values.dtype.kind not in "if" or scales.dtype.kind != "f":
        return None
    if quantize is None:
        return float(np.abs(values.astype(np.float32)).max())
    along = axis(quantize)
    if scales.size > 1 and (along is None or not 0 <= along < values.ndim or values.shape[along] != scales.size):
        return None
    step = scales.astype(np.float32)
    step = step if step.size == 1 else step.reshape([-1 if index == along else 1 for index in range(values.ndim)])
    with np.errstate(all="ignore"):  # a scale that is none is another rule's business
        return float(np.abs(np.rint(values.astype(np.float32) / step)).max())


def _is_depthwise(node: ir.Node) -> bool:
    sizes = shape(at(node, 1))
    return op(node) == "Conv" and node.attributes.get_int("group", 1) > 1 and sizes is not None and sizes[1:2] == [1]


def _told(node: ir.Node) -> str:
    """The parameters of a Q or DQ in a few words."""
    scales, zeros = array(at(node, 1)), array(at(node, 2))
    scale = "a computed scale" if scales is None else f"{scales.size} scales" if scales.size != 1 else f"scale {scales.item():g}"
    zero = "" if zeros is None or zeros.size != 1 else f", zero point {zeros.item()}"
    return f"{_type_name(node)}, {scale}{zero}"


def _type_name(node: ir.Node) -> str:
    kind = quantized_type(node)
    return "untyped" if kind is None else kind.name.lower()
