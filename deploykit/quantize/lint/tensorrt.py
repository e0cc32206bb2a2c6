"""What TensorRT 10.3 to 11.4 makes of a Q/DQ file, rule by rule.

Sources: NvInfer.h (IQuantizeLayer, IDequantizeLayer) v8.6.1, v10.3.0, v11.1; onnx-tensorrt 96e78110 onnxOpImporters.cpp
("the importer"); the developer guide's Q/DQ placement; Model-Optimizer a2fbac7b ("ModelOpt"); NVIDIA's measured examples.
None of it was run here on TensorRT itself.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.quantize import place
from deploykit.quantize.lint import common
from deploykit.quantize.lint.rule import rule
from deploykit.quantize.lint.view import (
    ACTIVATIONS,
    DQ,
    PASSING,
    Q,
    View,
    array,
    at,
    dequantizer,
    dtype,
    heads,
    is_constant,
    is_integer_op,
    is_layer,
    is_quantized_later,
    made_by,
    name,
    op,
    original,
    quantized_type,
    quantizer,
    readers,
    same_parameters,
    shape,
)

_INT8, _UINT8, _INT32 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32
_TAKEN = (_INT8, _UINT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)
_OPSET_10_3 = 20
_HALF_OPSET = 19
_SMALLEST_NORMAL_HALF = 2.0**-14
_POOLS = ("GlobalAveragePool", "AveragePool")
_SYMMETRIC = "quantize symmetrically to int8, with an explicit int8 zero point of 0"


@rule("refused", cost="the parser wants zero points of zeros and fails", fix=_SYMMETRIC)
def uint8_zero_point(_view: View, node: ir.Node) -> str:
    """Quantization is symmetric (NvInfer.h); the importer warns about uint8, takes int8, and asserts zeros."""
    zeros = array(at(node, 2)) if op(node) == Q and quantized_type(node) == _UINT8 else None
    return f"uint8 with zero point {zeros.ravel()[np.flatnonzero(zeros)[0]]}" if zeros is not None and zeros.any() else ""


@rule("refused", cost="the parser takes no uint8 data", fix=_SYMMETRIC)
def uint8_data(_view: View, node: ir.Node) -> str:
    """Data that is uint8 already, an input or stored weights, is rejected (the importer, L1346-1500)."""
    return "it reads stored or fed uint8" if op(node) == DQ and heads(node) and quantized_type(node) == _UINT8 else ""


@rule("wrong", cost="TensorRT takes int8 instead, so everything above 127 * scale saturates: half of the range", fix=_SYMMETRIC)
def uint8_saturates(_view: View, node: ir.Node) -> str:
    """uint8 with zero point 0, as after a Relu, passes the importer's zeros check and is read as int8 (inferred from
    the importer, L1346-1500: a warning, then INT8)."""
    zeros = array(at(node, 2)) if op(node) == Q and quantized_type(node) == _UINT8 else None
    return "uint8 with zero point 0" if zeros is not None and not zeros.any() else ""


@rule("wrong", cost="ONNX means uint8 here and TensorRT takes int8: values saturate at 127 * scale", fix=_SYMMETRIC)
def zero_point_omitted(_view: View, node: ir.Node) -> str:
    """The default type without a zero point is uint8 in ONNX and INT8 in TensorRT (the importer, L1424)."""
    omitted = op(node) == Q and at(node, 2) is None and quantized_type(node) == _UINT8
    return "no zero point and no output_dtype" if omitted else ""


@rule("refused", cost="the parser wants zero points of zeros and fails", fix=_SYMMETRIC)
def zero_point_not_zero(_view: View, node: ir.Node) -> str:
    """Quantization is symmetric only (NvInfer.h; the importer asserts that the shift is all zeros)."""
    zeros = array(at(node, 2)) if heads(node) and quantized_type(node) == _INT8 else None
    return f"int8 with zero point {zeros.ravel()[np.flatnonzero(zeros)[0]]}" if zeros is not None and zeros.any() else ""


@rule("refused", cost="the parser wants a zero point that it can read", fix="store the zero point as an initializer")
def zero_point_not_constant(view: View, node: ir.Node) -> str:
    """A zero point is a build-time constant: Constant -> Q or Constant -> Cast -> Q (NvInfer.h, IQuantizeLayer)."""
    zero = at(node, 2) if heads(node) else None
    return "" if zero is None or is_constant(view, zero) else f"zero point {zero.name!r} is computed from inputs"


@rule("refused", cost="the parser takes int8, int4 and FP8, and no other integers", fix="quantize to int8")
def type_not_int8(_view: View, node: ir.Node) -> str:
    """Other quantized types, 16-bit ones among them, are not accepted (the importer, L1588)."""
    kind = quantized_type(node) if heads(node) else None
    return "" if kind is None or kind in _TAKEN or _is_bias(node) else f"quantized to {kind.name.lower()}"


@rule("refused", cost="the file fails to parse", fix="leave biases in float")
def int32_bias(_view: View, node: ir.Node) -> str:
    """A DQ on an int32 bias, as ONNX Runtime wants it, is not accepted (onnx-tensorrt #850, ONNX Runtime #14229)."""
    return f"it gives {name(readers(node)[0])} a bias from int32" if heads(node) and _is_bias(node) else ""


@rule(
    "refused",
    cost="the parser fails, for one dead channel too",
    fix="give an empty channel scale 1; in FP16 round scales up (the smallest is 6e-8)",
)
def scale_not_positive(_view: View, node: ir.Node) -> str:
    """Scales are strictly positive (the importer, L1386-1404)."""
    return common.bad_scale(node)


@rule("refused", cost="the parser wants a scale that it can read", fix="store the scale as an initializer")
def scale_not_constant(view: View, node: ir.Node) -> str:
    """A scale is a build-time constant (the importer, L1386-1404)."""
    scale = at(node, 1) if heads(node) else None
    return "" if scale is None or is_constant(view, scale) else f"scale {scale.name!r} is computed from inputs"


@rule("refused", cost="only weights may have a scale for each channel", fix="one scale for an activation")
def per_channel_activation(view: View, node: ir.Node) -> str:
    """Per-channel scales need an input rooted at a constant (NvInfer.h, IQuantizeLayer)."""
    return common.per_channel_activation(view, node)


@rule(
    "slow",
    cost="no int8 kernel takes such weights: the layer runs in float, or the build fails",
    fix="quantize along the output channels",
)
def weight_axis(view: View, node: ir.Node) -> str:
    """Weights have a scale for each output channel: axis 0 of a Conv or a Gemm with transB (ModelOpt, ort_utils.py L668)."""
    return common.wrong_weight_axis(view, node)


@rule("refused", cost="the parser has no such operator", fix="write Q/DQ (quantize_static: quant_format=QuantFormat.QDQ)")
def qoperator_format(_view: View, node: ir.Node) -> str:
    """QLinearConv, QLinearMatMul, ConvInteger, DynamicQuantizeLinear are unsupported (onnx-tensorrt docs/operators.md)."""
    return f"{node.op_type} is an operator on integers" if is_integer_op(node) else ""


@rule("refused", cost="the builder takes no scalar there", fix="reshape it to one element, or leave it in float")
def scalar_data(_view: View, node: ir.Node) -> str:
    """What is quantized is not a scalar (NvInfer.h, IQuantizeLayer)."""
    return "it reads a scalar" if heads(node) and shape(at(node, 0)) == [] else ""


@rule("refused", cost="ONNX has FP16 and BF16 scales from opset 19 on", fix="convert the file to opset 19 or 20")
def half_scale_opset(view: View, node: ir.Node) -> str:
    """y_scale is float32 alone before QuantizeLinear-19 (ONNX operator schemas)."""
    kind = common.half_scale(node)
    return f"{kind.name} scale at opset {view.opset}" if kind is not None and view.opset < _HALF_OPSET else ""


@rule("refused", cost="a scale of 16 bits has to have the type of what is quantized", fix="cast the scale or the tensor")
def half_scale_of_float(_view: View, node: ir.Node) -> str:
    """Q takes a FP32 scale for any input, a FP16 or BF16 one only for its own type (the importer, L1625)."""
    kind, data = common.half_scale(node), dtype(at(node, 0)) if op(node) == Q else None
    return f"{kind.name} scale for {data.name} data" if kind is not None and data is not None and data != kind else ""


@rule("note", cost="a subnormal scale has few digits left", fix="round scales up when casting, or keep the layer in float")
def half_scale_subnormal(_view: View, node: ir.Node) -> str:
    """FP16 has 11 significant bits down to 6.1e-5, fewer below, and nothing below 6e-8 (IEEE 754 binary16)."""
    scales = array(at(node, 1)) if common.half_scale(node) == ir.DataType.FLOAT16 else None
    small = 0 if scales is None else _subnormals(scales)
    return f"{small} FP16 scales below 6.1e-5" if small else ""


@rule(
    "note", cost="TensorRT 10.3 (JetPack 6) reads up to opset 20, 11.1 up to 24", fix="export with opset 19 or 20", of_graph=True
)
def newer_opset(view: View, _node: ir.Node) -> str:
    """onnx-tensorrt docs/operators.md: opset 9 to 20 at 10.1, 9 to 24 at 11.1."""
    return f"opset {view.opset}" if view.opset > _OPSET_10_3 else ""


@rule(
    "slow",
    cost="what a DQ gives has its scale's type: FP32 scales make all that is not quantized FP32, with casts in between",
    fix="give scales the type of the graph's other floats",
)
def float_type_differs(view: View, node: ir.Node) -> str:
    """In a strongly typed network a DQ's output type is its scale's (the importer, L1608-1640; NvInfer.h)."""
    kind, rest = dtype(at(node, 1)) if op(node) == Q else None, view.float_type
    return f"{kind.name} scale in a graph of {rest.name}" if kind is not None and rest is not None and kind != rest else ""


@rule("slow", cost="the pair is one more pass that rounds again", fix="remove one of the two pairs, or give both one scale")
def requantized(_view: View, node: ir.Node) -> str:
    """Q behind DQ with another scale is a layer of its own (developer guide, Q/DQ placement)."""
    return common.requantized(node)


@rule("slow", cost="the activation is not fused with the layer, which rounds before it", fix="quantize behind the Relu or Clip")
def quantized_before_activation(_view: View, node: ir.Node) -> str:
    """No Q inside Conv -> BatchNorm -> Relu: one Q behind it at most (developer guide, Q/DQ placement)."""
    return _quantized_layer(at(node, 0)) if op(node) in ACTIVATIONS else ""


@rule("slow", cost="Conv, Sigmoid and Mul are not fused", fix="quantize behind the Mul, where the next layer reads")
def quantized_before_silu(_view: View, node: ir.Node) -> str:
    """Conv -> Sigmoid -> Mul is one fusable pattern with no Q inside (ModelOpt, graph utilities)."""
    if op(node) != "Mul":
        return ""
    for gate, value in ((at(node, 0), at(node, 1)), (at(node, 1), at(node, 0))):
        sigmoid = gate.producer() if gate is not None else None
        if sigmoid is not None and op(sigmoid) == "Sigmoid" and original(at(sigmoid, 0)) is original(value):
            return _quantized_layer(value) or _quantized_layer(at(sigmoid, 0))
    return ""


@rule(
    "slow",
    cost="the fused Conv + Add takes the precision of its residual input: its result becomes float, with reformats "
    "(ResNet-18 on A100: 0.88 ms instead of 0.55)",
    fix="put Q/DQ on the skip input of the Add",
)
def residual_skip_float(view: View, node: ir.Node) -> str:
    """The skip input of a residual Add is quantized (TensorFlow quantization toolkit 8.6.1; trt-engine-explorer v10.3.0)."""
    if (found := _residual(view, node)) is None or not is_quantized_later(node):
        return ""
    skip, branch = found
    producer = branch.producer()
    between = producer is not None and common.is_int8(view, producer) and dequantizer(skip) is None
    return f"skip input {skip.name!r} is float between int8 neighbours" if between else ""


@rule("slow", cost="the convolution is not fused with the Add", fix="remove the Q/DQ between them; quantize the skip input alone")
def residual_branch_quantized(view: View, node: ir.Node) -> str:
    """The convolution's own branch of a residual Add stays unquantized (TensorFlow quantization toolkit 8.6.1)."""
    return _quantized_layer(found[1]) if (found := _residual(view, node)) is not None else ""


@rule(
    "slow",
    cost="every branch is requantized (YOLOv7 on AGX Orin: 13 % of its throughput)",
    fix="give all inputs of the Concat and its reader one scale",
)
def concat_scales(_view: View, node: ir.Node) -> str:
    """All inputs of a Concat have the scale of its consumer (yolo_deepstream e9b75770; ModelOpt, concat_elimination)."""
    pairs = [pair for value in node.inputs if (pair := dequantizer(value))] if op(node) == "Concat" else []
    behind = [reader for reader in readers(node) if op(reader) == Q] if pairs else []
    other = next((pair for pair in (*pairs[1:], *behind) if not same_parameters(pairs[0], pair)), None)
    return "" if other is None else f"{name(pairs[0])} and {name(other)} differ in scale"


@rule("slow", cost="the Concat runs in float, with reformats on the int8 branches", fix="quantize all its inputs with one scale")
def concat_input_float(view: View, node: ir.Node) -> str:
    """A Concat of int8 branches has no float one; a MaxPool in front of it is quantized too (toolkit's Inception note)."""
    return common.mixed_inputs(view, node) if op(node) == "Concat" else ""


@rule(
    "slow",
    cost="the pool runs in float between int8 neighbours, with reformats (ResNet-18 on A100: 0.55 ms instead of 0.50)",
    fix="put Q/DQ on the pool's input",
)
def pool_not_quantized(_view: View, node: ir.Node) -> str:
    """An average pool does not commute with Q/DQ: it needs DQ in front and Q behind (trt-engine-explorer v10.3.0)."""
    between = op(node) in _POOLS and is_quantized_later(node, PASSING | ACTIVATIONS)
    return "its input is float and its result quantized" if between and dequantizer(at(node, 0)) is None else ""


@rule("slow", cost="the tensor is quantized twice, by two kernels", fix="let all readers share one Q/DQ")
def readers_with_different_scales(_view: View, node: ir.Node) -> str:
    """The next block's convolution and the skip read one Q/DQ (ModelOpt, DedicatedQDQPair=False)."""
    data = at(node, 0) if op(node) == Q else None
    if data is None:
        return ""
    first = next(use.node for use in data.uses() if op(use.node) == Q and use.idx == 0)
    return "" if first is node or same_parameters(first, node) else f"{data.name!r} has other parameters at {name(first)}"


@rule(
    "note",
    cost="int8 is often slower than FP16 there, and NVIDIA's own tool leaves such layers out",
    fix="measure, or keep it in float",
)
def small_convolution(view: View, node: ir.Node) -> str:
    """Fewer than 16 channels are worth int8 only in a few shapes (ModelOpt, find_nodes_from_convs_to_exclude)."""
    sizes = shape(at(node, 1)) if op(node) == "Conv" and common.is_int8(view, node) else None
    if sizes is None or len(sizes) < 3 or None in sizes:
        return ""
    out, inside, *kernel = (size or 0 for size in sizes)
    group = node.attributes.get_int("group", 1)
    plain = (out % 8 == 0 or inside % 8 == 0) and (common.reads_graph_input(node) or max(out, inside) >= 16)
    kept = plain and len(set(kernel)) == 1 if group == 1 else out % 8 == 0 and min(kernel) >= 3
    return "" if kept or min(out, inside) >= 16 else f"weights {sizes}, group {group}"


@rule(
    "note",
    cost="the parser takes them, but every version documents float weights in front of Q and DQ",
    fix="store weights as float -> QuantizeLinear -> DequantizeLinear (quantize_static: AddQDQPairToWeight)",
)
def integer_weights(view: View, node: ir.Node) -> str:
    """Stored int8 behind a DQ alone is imported by 10.1 as an INT8 constant; no statement exists for older ones."""
    weights = dequantizer(at(node, 1)) if is_layer(view, node) else None
    return (
        "its weights are stored as int8"
        if weights is not None and quantizer(weights) is None and quantized_type(weights) == _INT8
        else ""
    )


RULES = (
    common.not_quantized,
    newer_opset,
    qoperator_format,
    uint8_zero_point,
    uint8_data,
    uint8_saturates,
    zero_point_omitted,
    zero_point_not_zero,
    zero_point_not_constant,
    type_not_int8,
    int32_bias,
    scale_not_positive,
    scale_not_constant,
    common.scale_shape,
    per_channel_activation,
    scalar_data,
    half_scale_opset,
    half_scale_of_float,
    half_scale_subnormal,
    float_type_differs,
    common.pair_differs,
    common.quantize_without_dequantize,
    common.quantized_twice,
    requantized,
    readers_with_different_scales,
    common.layer_not_quantized,
    common.layer_half_quantized,
    weight_axis,
    integer_weights,
    small_convolution,
    quantized_before_activation,
    quantized_before_silu,
    residual_skip_float,
    residual_branch_quantized,
    concat_scales,
    concat_input_float,
    common.passing_rescaled,
    pool_not_quantized,
)


def _subnormals(scales: NDArray[np.generic]) -> int:
    wide = scales.astype(np.float64)
    return int(((wide > 0) & (wide < _SMALLEST_NORMAL_HALF)).sum())


def _is_bias(node: ir.Node) -> bool:
    if op(node) != DQ or quantized_type(node) != _INT32:
        return False
    uses = [use for value in node.outputs[:1] for use in value.uses()]
    return bool(uses) and all(use.idx == 2 and op(use.node) in (*place.LAYERS, "ConvTranspose") for use in uses)


def _quantized_layer(value: ir.Value | None) -> str:
    """Which pair stands directly behind a layer; empty when `value` is no such tensor."""
    pair, source = dequantizer(value), original(value)
    if pair is None or made_by(source) not in place.LAYERS or source is None:
        return ""
    return f"{name(pair)} stands directly behind the layer that makes {source.name!r}"


def _residual(view: View, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """An Add's skip input and its other one: the skip is no layer's own result, else it took fewer layers."""
    first, second = at(node, 0), at(node, 1)
    if op(node) != "Add" or first is None or second is None or is_constant(view, first) or is_constant(view, second):
        return None
    from_layer = [made_by(original(value)) in place.LAYERS for value in (first, second)]
    if not any(from_layer):
        return None
    if from_layer[0] != from_layer[1]:
        return (second, first) if from_layer[0] else (first, second)
    return (first, second) if view.depth.get(first, 0) < view.depth.get(second, 0) else (second, first)
