"""The operators of ONNX that CNNs are made of (onnx.ai/onnx/operators, ContribOperators.md of ONNX Runtime).

Not here: Loop, Scan and If, whose bodies a small file can run for ever; strings, sequences, maps and optionals; losses,
optimizers and random numbers; classical machine learning (ai.onnx.ml).
"""

from __future__ import annotations


def _names(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


_LAYERS = (
    "Conv ConvInteger ConvTranspose DeformConv Gemm MatMul MatMulInteger Einsum Attention RotaryEmbedding "
    "QLinearConv QLinearMatMul QuantizeLinear DequantizeLinear DynamicQuantizeLinear"
)
_POOLING = (
    "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool MaxUnpool MaxRoiPool RoiAlign NonMaxSuppression"
)
_NORMALIZATION = (
    "BatchNormalization InstanceNormalization GroupNormalization LayerNormalization RMSNormalization LRN "
    "LpNormalization MeanVarianceNormalization Dropout"
)
_ACTIVATIONS = (
    "Celu Clip Elu Erf Gelu HardSigmoid HardSwish Hardmax LeakyRelu LogSoftmax Mish PRelu Relu Selu Shrink Sigmoid Softmax "
    "Softplus Softsign Swish Tanh ThresholdedRelu"
)
_ARITHMETIC = (
    "Abs Acos Add And Asin Atan BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Cos Cosh CumSum Div Equal Exp Floor "
    "Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or Pow Reciprocal Round Sign Sin Sinh "
    "Sqrt Sub Sum Tan Where Xor"
)
_REDUCTION = (
    "ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare TopK"
)
_SHAPES = (
    "AffineGrid Cast CastLike CenterCropPad Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather "
    "GatherElements GatherND GridSample Identity NonZero OneHot Pad Range Reshape Resize ScatterElements ScatterND Scatter Shape "
    "Size Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Trilu Unsqueeze Upsample"
)
_STANDARD = _names(_LAYERS, _POOLING, _NORMALIZATION, _ACTIVATIONS, _ARITHMETIC, _REDUCTION, _SHAPES)
# What quantizers write, and what ONNX Runtime makes of a float or int8 CNN when it saves its optimized graph.
_MICROSOFT = _names(
    """QuantizeLinear DequantizeLinear QGemm QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearConcat
    QLinearAveragePool QLinearGlobalAveragePool QLinearReduceMean QLinearWhere QLinearConv DynamicQuantizeMatMul
    MatMulIntegerToFloat MatMulInteger16 FusedConv FusedGemm FusedMatMul FusedMatMulActivation ConvTransposeWithDynamicPads
    BiasGelu BiasSoftmax BiasAdd FastGelu Gelu QuickGelu LayerNormalization SimplifiedLayerNormalization SkipLayerNormalization
    GroupNorm SkipGroupNorm MaxpoolWithMask NhwcMaxPool NhwcConv NhwcFusedConv Attention MultiHeadAttention QAttention Pad Trilu
    GridSample"""
)
_BLOCKED = _names("Conv MaxPool AveragePool GlobalMaxPool GlobalAveragePool ReorderInput ReorderOutput Upsample")
_CHANNELS_LAST = _names(
    "Conv MaxPool AveragePool GlobalAveragePool QLinearConv QLinearConvTranspose QLinearAveragePool "
    "QLinearGlobalAveragePool ConvTranspose"
)
KNOWN = {
    "": _STANDARD,
    "ai.onnx": _STANDARD,
    "com.microsoft": _MICROSOFT,
    "com.microsoft.nchwc": _BLOCKED,
    "com.ms.internal.nhwc": _CHANNELS_LAST,
}
