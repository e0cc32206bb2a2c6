"""What ONNX Runtime on an x86 CPU makes of a Q/DQ file, rule by rule.

Each rule was found by building small graphs with ONNX Runtime 1.31.1 on a CPU with AVX512-VNNI: reading the kernels in
the optimized graph, and comparing its answers with those of the graph executed literally.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.quantize.lint import common
from deploykit.quantize.lint.rule import rule
from deploykit.quantize.lint.view import (
    ACTIVATIONS,
    DQ,
    Q,
    View,
    array,
    at,
    dequantizer,
    is_answer,
    is_constant,
    is_integer_op,
    is_quantized_later,
    name,
    op,
    quantized_type,
    readers,
)

_INT8, _UINT8, _INT32 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32
_BIAS_TOLERANCE = 1e-5


@rule(
    "wrong",
    cost="nothing is refused: the tensor saturates or vanishes, or the int8 kernel and the literal graph disagree",
    fix="calibrate again; a tensor that is always zero gets scale 1",
)
def scale_not_positive(_view: View, node: ir.Node) -> str:
    """ONNX asks for positive scales and ONNX Runtime does not check: zero, NaN and Inf gave all-zero answers, a
    negative one behind a Relu and an infinite one of a weight other answers than the literal graph."""
    return common.bad_scale(node)


@rule("refused", cost="QLinearConv takes one scale for an activation and fails when it runs", fix="one scale for an activation")
def per_channel_activation(view: View, node: ir.Node) -> str:
    """The graph loads, and the kernel then says that its input's zero point must be a scalar."""
    return common.per_channel_activation(view, node)


@rule(
    "wrong",
    cost="the int8 kernel reads the scales as those of its output channels whatever the axis says",
    fix="quantize along the output channels",
)
def weight_axis(view: View, node: ir.Node) -> str:
    """Fused without a look at the axis (microsoft/onnxruntime #21712, closed without a merge): a square Conv, Gemm and
    MatMul gave other answers than the literal graph; where the sizes differ the run fails."""
    return common.wrong_weight_axis(view, node)


@rule(
    "wrong",
    cost="ONNX Runtime drops the inner pair, so a rounding that the file asks for does not happen",
    fix="remove one of the two pairs",
)
def requantized(_view: View, node: ir.Node) -> str:
    """Q -> DQ -> Q -> DQ with two scales becomes one pair, and answers differ from the literal graph."""
    return common.requantized(node)


@rule(
    "wrong",
    cost="ONNX Runtime quantizes the weights itself, with one scale for all channels: numbers that no calibration saw",
    fix="quantize the weights in the file, or leave the layer's input in float",
)
def weights_left_to_the_runtime(view: View, node: ir.Node) -> str:
    """A Conv or Gemm with float weights between DQ and Q becomes an int8 kernel with per-tensor weights."""
    between = op(node) in ("Conv", "Gemm") and common.operands(view, node) == (True, False) and is_quantized_later(node)
    return "its weights are float between a quantized input and a quantized result" if between else ""


@rule("slow", cost="the layer runs in float, and pays for the conversion", fix="quantize its input and its weights, or neither")
def layer_half_quantized(view: View, node: ir.Node) -> str:
    """Only one operand comes from a DQ; see `weights_left_to_the_runtime` for the case that is worse."""
    return "" if weights_left_to_the_runtime.find(view, node) else common.half_quantized(common.operands(view, node))


@rule(
    "slow",
    cost="layers around it run in float: on x86 int8 activations are turned into uint8 first, but only with one reader",
    fix="quantize activations to uint8",
)
def shared_int8_activation(view: View, node: ir.Node) -> str:
    """A chain of int8 activations costs nothing; one that two nodes read, as at every residual, stays int8 and is not fused."""
    if op(node) != Q or quantized_type(node) != _INT8 or is_constant(view, at(node, 0)):
        return ""
    count = sum(len(readers(pair)) for pair in readers(node) if op(pair) == DQ)
    return f"int8, read by {count} nodes" if count > 1 else ""


@rule("slow", cost="there are no 16-bit kernels: its readers run in float", fix="quantize to uint8, weights to int8")
def sixteen_bits(_view: View, node: ir.Node) -> str:
    """QLinearConv and kin multiply 8-bit integers on a CPU."""
    return common.sixteen_bits(node)


@rule("slow", cost="the layer runs in float, with casts: the CPU kernels take FP32 scales", fix="keep scales in FP32 for a CPU")
def half_scale(_view: View, node: ir.Node) -> str:
    """With FP16 scales a convolution stayed a float Conv between casts."""
    kind = common.half_scale(node)
    return f"{kind.name} scale" if kind is not None else ""


@rule("slow", cost="2.4 times slower than int8 weights (0.65 against 0.26 ms, 3x3, 128 channels)", fix="quantize weights to int8")
def uint8_weights(view: View, node: ir.Node) -> str:
    """VNNI multiplies unsigned by signed; unsigned weights take another kernel."""
    return common.uint8_weights(view, node)


@rule(
    "slow",
    cost="the kernel corrects every sum: 15 % slower (0.30 against 0.26 ms, 3x3, 128 channels)",
    fix="quantize weights symmetrically",
)
def weight_zero_point(view: View, node: ir.Node) -> str:
    """A zero point of weights adds the sum of the inputs to every product."""
    return common.weight_zero_point(view, node)


@rule(
    "slow",
    cost="the layer runs in float: its int8 kernel writes integers",
    fix="quantize its result, once, and let all readers share it",
)
def layer_output_float(view: View, node: ir.Node) -> str:
    """A Conv is fused when all its readers are Q with one scale; a Gemm or MatMul may also have a float result, but not both."""
    if not common.is_int8(view, node):
        return ""
    behind = readers(node)
    last = behind[0] if len(behind) == 1 and op(behind[0]) in ACTIVATIONS and not is_answer(node) else node
    if op(node) != "Conv" and not any(op(reader) == Q for reader in readers(last)):
        return ""
    return common.answered_or_read(last)


@rule(
    "slow",
    cost="the layer and its activation run in float",
    fix="a zero point of 0 behind a Relu, a range within the bounds of a Clip",
)
def activation_not_absorbed(view: View, node: ir.Node) -> str:
    """A Relu or Clip between a layer and its Q disappears only where the Q's own range clips at least as much."""
    value = at(node, 0) if op(node) in ACTIVATIONS else None
    layer = value.producer() if value is not None else None
    quantize = next((reader for reader in readers(node) if op(reader) == Q), None)
    if layer is None or quantize is None or not common.is_int8(view, layer) or (span := _range(quantize)) is None:
        return ""
    low, high = _bounds(node)
    if low <= span[0] and span[1] <= high:
        return ""
    return f"{op(node)} to {low:g} ... {high:g} in front of {name(quantize)}, which holds {span[0]:g} ... {span[1]:g}"


@rule(
    "slow",
    cost="the convolution runs in float: its bias has to be int32 at input scale * weight scale, with zero point 0",
    fix="quantize the bias with scale = input scale * weight scale, or leave it in float",
)
def bias_scale(view: View, node: ir.Node) -> str:
    """A Conv whose bias has another scale or a zero point is not fused (its answers stay right)."""
    return _bias_problem(view, node) if op(node) == "Conv" else ""


@rule(
    "wrong",
    cost="QGemm takes the bias for int32 at input scale * weight scale, so it is added at another size than the file says",
    fix="quantize the bias with scale = input scale * weight scale, or leave it in float",
)
def bias_scale_ignored(view: View, node: ir.Node) -> str:
    """A Gemm whose bias has another scale is fused all the same, and answers otherwise than the literal graph."""
    return _bias_problem(view, node) if op(node) == "Gemm" else ""


@rule("slow", cost="the layer runs in float", fix="quantize the bias to int32, or the result")
def float_bias(view: View, node: ir.Node) -> str:
    """A Gemm with a float result needs its bias in int32; with a quantized one, and in a Conv, ONNX Runtime quantizes it."""
    bias = at(node, 2) if op(node) == "Gemm" and common.is_int8(view, node) else None
    if bias is None or dequantizer(bias) is not None or is_quantized_later(node):
        return ""
    return "its bias is float and so is its result"


@rule("slow", cost="the operator runs in float, between DQ and Q", fix="quantize all its inputs, or none and not its result")
def mixed_inputs(view: View, node: ir.Node) -> str:
    """QLinearAdd and QLinearConcat need integers at all inputs."""
    return common.mixed_inputs(view, node) if op(node) in ("Add", "Concat") else ""


@rule("note", cost="it runs, but only on ONNX Runtime, and its scales cannot be checked here", fix="write Q/DQ", of_graph=True)
def qoperator_format(view: View, _node: ir.Node) -> str:
    """Operators on integers are what ONNX Runtime makes of Q/DQ itself when it optimizes."""
    count = sum(is_integer_op(node) for node in view.nodes)
    return f"{count} operators on integers (QOperator format)" if count else ""


RULES = (
    common.not_quantized,
    common.weights_of_eight_bits,
    qoperator_format,
    scale_not_positive,
    common.scale_shape,
    per_channel_activation,
    shared_int8_activation,
    sixteen_bits,
    half_scale,
    common.pair_differs,
    common.quantize_without_dequantize,
    common.quantized_twice,
    requantized,
    common.layer_not_quantized,
    layer_half_quantized,
    weights_left_to_the_runtime,
    weight_axis,
    uint8_weights,
    weight_zero_point,
    bias_scale,
    bias_scale_ignored,
    float_bias,
    layer_output_float,
    activation_not_absorbed,
    mixed_inputs,
    common.passing_rescaled,
)


def _range(quantize: ir.Node) -> tuple[np.float32, np.float32] | None:
    """The smallest and largest value that a per-tensor 8-bit Q can tell, in float32 as ONNX Runtime computes it."""
    scale, zero, kind = array(at(quantize, 1)), array(at(quantize, 2)), quantized_type(quantize)
    if scale is None or scale.size != 1 or kind not in (_INT8, _UINT8) or (zero is not None and zero.size != 1):
        return None
    least = -128 if kind == _INT8 else 0
    offset = least - (int(zero.item()) if zero is not None else 0)
    step = np.float32(scale.item())
    if not (np.isfinite(step) and step > 0):
        return None
    return np.float32(offset) * step, np.float32(offset + 255) * step


def _bounds(node: ir.Node) -> tuple[float, float]:
    """What a Relu or Clip leaves; a bound that is computed from inputs leaves nothing for sure."""
    if op(node) == "Relu":
        return 0.0, np.inf
    found = []
    for index, key, open_end in ((1, "min", -np.inf), (2, "max", np.inf)):
        bound = array(at(node, index))
        if at(node, index) is not None and (bound is None or bound.size != 1):
            return np.inf, -np.inf
        found.append(float(bound.item()) if bound is not None else node.attributes.get_float(key, open_end))
    return found[0], found[1]


def _bias_problem(view: View, node: ir.Node) -> str:
    """What keeps the int32 bias of an int8 layer from being what the kernel takes it for."""
    bias = dequantizer(at(node, 2)) if common.is_int8(view, node) else None
    if bias is None or quantized_type(bias) != _INT32:
        return ""
    found, wanted, zeros = array(at(bias, 1)), _product_of_scales(node), array(at(bias, 2))
    if found is None or wanted is None:
        return ""
    if zeros is not None and zeros.any():
        return "its bias has a zero point"
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        return ""  # that is another rule's business
    flat = found.ravel().astype(np.float64)
    if flat.size not in (1, wanted.size) or (flat.size != wanted.size and np.ptp(wanted) > 0):
        return f"its bias has {flat.size} scales, its weights have {wanted.size}"
    if np.allclose(flat, wanted, rtol=_BIAS_TOLERANCE, atol=0, equal_nan=True):
        return ""
    worst = int(np.argmax(np.abs(flat / wanted - 1)))
    return f"its bias has scale {flat[worst]:g}, input scale * weight scale is {wanted[min(worst, wanted.size - 1)]:g}"


def _product_of_scales(node: ir.Node) -> NDArray[np.float64] | None:
    pairs = dequantizer(at(node, 0)), dequantizer(at(node, 1))
    scales = [array(at(pair, 1)) for pair in pairs if pair is not None]
    if len(scales) != 2 or scales[0] is None or scales[1] is None or scales[0].size != 1:
        return None
    product: NDArray[np.float64] = scales[0].item() * scales[1].ravel().astype(np.float64)
    return product
