"""What OpenVINO on an x86 CPU makes of a Q/DQ file, rule by rule.

Each rule was found by building small graphs with OpenVINO 2026.4: reading what the compiled model runs in, and comparing its
answers with those of the graph executed literally. It takes most of what costs time in ONNX Runtime: signed activations with
several readers, float results, biases of any scale or in float, Adds and Concats of different scales.
"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.quantize.lint import common
from deploykit.quantize.lint.rule import rule
from deploykit.quantize.lint.view import View, array, at, heads, op


@rule(
    "wrong",
    cost="nothing but an infinite scale is refused: the tensor vanishes, or has other values than the literal graph",
    fix="calibrate again; a tensor that is always zero gets scale 1",
)
def scale_not_positive(_view: View, node: ir.Node) -> str:
    """ONNX asks for positive scales: a negative one gave other answers than the literal graph, NaN all zeros or NaN."""
    return common.bad_scale(node)


@rule("slow", cost="the layer runs in float", fix="one scale for an activation")
def per_channel_activation(view: View, node: ir.Node) -> str:
    """Answers are right, and the convolution behind it multiplies floats."""
    return common.per_channel_activation(view, node)


@rule("slow", cost="its readers run in float, with a computed conversion in front", fix="calibrate, and write the scale down")
def scale_not_constant(_view: View, node: ir.Node) -> str:
    """A scale that is computed from the input is no FakeQuantize, which integers are made of."""
    return "its scale is computed" if heads(node) and at(node, 1) is not None and array(at(node, 1)) is None else ""


@rule("wrong", cost="the pair is left out: nothing is rounded or clipped, and its readers run in float", fix="quantize to 8 bits")
def sixteen_bits(_view: View, node: ir.Node) -> str:
    """In front of a convolution a pair of 16 bits had no effect: answers were those of the graph without it."""
    return common.sixteen_bits(node)


@rule("slow", cost="the layer runs in float, for one scale too much", fix="quantize along the output channels")
def weight_axis(view: View, node: ir.Node) -> str:
    """Scales along another axis than the output channels' cannot be taken out of the sums: answers are right, in float."""
    return common.wrong_weight_axis(view, node)


@rule("slow", cost="the layer runs in float", fix="quantize weights to int8")
def uint8_weights(view: View, node: ir.Node) -> str:
    """No kernel multiplies by unsigned weights, with a zero point of 128 neither."""
    return common.uint8_weights(view, node)


@rule("slow", cost="the layer runs in float", fix="quantize weights symmetrically")
def weight_zero_point(view: View, node: ir.Node) -> str:
    """Weights with a zero point that is not 0 are turned back into floats."""
    return common.weight_zero_point(view, node)


@rule(
    "slow",
    cost="it runs in float, between conversions of integers",
    fix="write Q/DQ: deploykit export NETWORK --to openvino --int8",
)
def dynamic_layer(_view: View, node: ir.Node) -> str:
    """ConvInteger and MatMulInteger, which dynamic quantization makes, multiply floats; QLinearConv multiplies integers."""
    return op(node) if op(node) in ("ConvInteger", "MatMulInteger") else ""


RULES = (
    common.not_quantized,
    common.weights_of_eight_bits,
    scale_not_positive,
    common.scale_shape,
    per_channel_activation,
    scale_not_constant,
    sixteen_bits,
    common.pair_differs,
    common.quantize_without_dequantize,
    common.quantized_twice,
    common.layer_not_quantized,
    common.layer_half_quantized,
    weight_axis,
    uint8_weights,
    weight_zero_point,
    dynamic_layer,
)
