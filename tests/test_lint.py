"""What a runtime would make of a Q/DQ file: each rule broken once in an otherwise clean graph, and files of several tools."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit import build, runtimes
from deploykit.artifact import Artifact
from deploykit.errors import UsageError
from deploykit.machine import cpu_features, has_int8_dot_product
from deploykit.quantize import half
from deploykit.quantize.lint import RULES, SEVERITIES, Finding, Rule, as_facts, as_text, is_fatal, lint
from deploykit.runtimes import onnxruntime

DOCUMENT = Path(__file__).parents[1] / "docs" / "quantization.md"
# One for each shape of graph that a rule looks at; an export and two quantizations take two seconds.
NAMES = ["branches", "input_skip", "lenet5", "mobile", "padded_shortcut", "residual", "variety"]
CHANNELS = 16
RANDOM = np.random.default_rng(5)

WEIGHTS = (RANDOM.standard_normal((CHANNELS, CHANNELS, 3, 3)) * 0.1).astype(np.float32)
SCALES = (np.abs(WEIGHTS).max((1, 2, 3)) / 127).astype(np.float32)
# Half the weights, which fit in 7 bits: their sums saturate on no CPU, and answers of kernels are compared with the graph's.
INTEGERS = np.rint(WEIGHTS / SCALES[:, None, None, None] / 2).astype(np.int8)
BIAS = RANDOM.standard_normal(CHANNELS).astype(np.float32)
STEP, OTHER_STEP = np.float32(0.03), np.float32(0.02)
ZEROS = np.zeros(CHANNELS, np.int8)

CONSTANTS = {
    "step": STEP,
    "other": OTHER_STEP,
    "zero": np.int8(0),
    "w": WEIGHTS,
    "ws": SCALES,
    "wz": ZEROS,
    "wi": INTEGERS,
    "b": BIAS,
    "bi": np.rint(BIAS / (STEP * SCALES)).astype(np.int32),
    "bs": STEP * SCALES,
    "bz": np.zeros(CHANNELS, np.int32),
}
# By TensorRT's rules: int8 inputs, float weights in front of Q and DQ, a float bias, no Q behind the layer.
TENSORRT = {
    "q": "q = QuantizeLinear(image, step, zero)",
    "dq": "d = DequantizeLinear(q, step, zero)",
    "wq": "wq = QuantizeLinear<axis = 0>(w, ws, wz)",
    "wdq": "wd = DequantizeLinear<axis = 0>(wq, ws, wz)",
    "conv": "c = Conv<pads = [1, 1, 1, 1]>(d, wd, b)",
    "relu": "r = Relu(c)",
    "end": "y = Identity(r)",
}
# By ONNX Runtime's: uint8 inputs and results, stored int8 weights, an int32 bias.
ONNXRUNTIME = {
    "q": "q = QuantizeLinear(image, step, zero)",
    "dq": "d = DequantizeLinear(q, step, zero)",
    "wdq": "wd = DequantizeLinear<axis = 0>(wi, ws, wz)",
    "bdq": "bd = DequantizeLinear<axis = 0>(bi, bs, bz)",
    "conv": "c = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)",
    "relu": "r = Relu(c)",
    "rq": "rq = QuantizeLinear(r, other, low)",
    "rdq": "y = DequantizeLinear(rq, other, low)",
}
UINT8 = {"zero": np.uint8(128), "low": np.uint8(0)}
HALF = {name: CONSTANTS[name].astype(np.float16) for name in ("step", "w", "ws", "b")}
HALF_LINES = {"cast": "i16 = Cast<to = 10>(image)", "q": "q = QuantizeLinear(i16, step, zero)"}
# A Gemm on the flattened image instead of the convolution.
FLAT = {
    "flat": "flat = Flatten(image)",
    "q": "q = QuantizeLinear(flat, step, zero)",
    "conv": "c = Gemm<transB = 1>(d, wd, bd)",
}
FLAT_WEIGHTS = {"wi": RANDOM.integers(-63, 64, (CHANNELS, CHANNELS * 64)).astype(np.int8), "other": np.float32(0.5)}


@dataclass(frozen=True)
class Planted:
    """One violation: the rule, the nodes that break it, the lines and constants that differ from a clean graph."""

    rule: str
    nodes: str
    lines: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 19

    def model(self, base: Mapping[str, str], constants: Mapping[str, Any]) -> onnx.ModelProto:
        """The clean graph `base` with what differs; an empty line leaves a node out."""
        return made(in_order({**base, **self.lines}), {**constants, **self.constants}, self.opset)

    def __str__(self) -> str:
        return f"{self.rule}: {self.nodes}"


def in_order(lines: Mapping[str, str]) -> dict[str, str]:
    """Lines so that each comes after those that make what it reads: ONNX asks for it."""
    left, known, found = dict(lines), {"image"}, {}
    while left:
        name = next((name for name, line in left.items() if reads(line, left) <= known), next(iter(left)))
        line = left.pop(name)
        known |= {word.strip() for word in line.partition("=")[0].split(",")}
        found[name] = line
    return found


def reads(line: str, left: Mapping[str, str]) -> set[str]:
    made_here = {word.strip() for other in left.values() for word in other.partition("=")[0].split(",")}
    inside = line.rpartition("(")[2].rstrip(")").split(",")
    return {word.strip() for word in inside} & made_here


def made(lines: Mapping[str, str], constants: Mapping[str, Any], opset: int = 19) -> onnx.ModelProto:
    body = " ".join(f"[{name}] {line}" for name, line in lines.items() if line)
    ends = f"(float[1, {CHANNELS}, 8, 8] image) => (float y)"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {ends} {{ {body} }}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def told(model: onnx.ModelProto, runtime: str) -> list[tuple[str, str]]:
    """The findings as (rule, node)."""
    return [(finding.rule, finding.node) for finding in lint(model, runtime)]


EIGHT = {"w": WEIGHTS[:8, :8], "ws": SCALES[:8], "wz": ZEROS[:8], "b": BIAS[:8]}
LONE = {"lone": "lq = QuantizeLinear(image, step, zero)"}
DYNAMIC = {"dyn": "dy, ds, dz = DynamicQuantizeLinear(image)"}
AGAIN = {"q2": "q2 = QuantizeLinear(d, step, zero)", "dq2": "d2 = DequantizeLinear(q2, step, zero)"}
AGAIN_OTHER = {"q2": "q2 = QuantizeLinear(d, other, zero)", "dq2": "d2 = DequantizeLinear(q2, other, zero)"}
BEHIND_CONV = {"cq": "cq = QuantizeLinear(c, other, zero)", "cdq": "cd = DequantizeLinear(cq, other, zero)"}
LAST_PAIR = {"aq": "aq = QuantizeLinear(a, step, zero)", "end": "y = DequantizeLinear(aq, step, zero)"}
SECOND = {"r2": "x = Relu(image)", "eq": "e = QuantizeLinear(x, {0}, zero)", "edq": "ed = DequantizeLinear(e, {0}, zero)"}
POOL_RESCALED = {
    "pool": "p = MaxPool<kernel_shape = [2, 2]>(d)",
    "pq": "pq = QuantizeLinear(p, other, zero)",
    "pdq": "pd = DequantizeLinear(pq, other, zero)",
}


def second(scale: str) -> dict[str, str]:
    return {name: line.format(scale) for name, line in SECOND.items()}


BY_TENSORRT = [
    Planted("newer-opset", "the graph", opset=21),
    Planted("qoperator-format", "dyn", DYNAMIC),
    Planted("uint8-zero-point", "q", constants={"zero": np.uint8(128)}),
    Planted("uint8-data", "wdq", {"wq": "", "wdq": "wd = DequantizeLinear<axis = 0>(wu, ws, wu0)"},
            {"wu": INTEGERS.astype(np.uint8), "wu0": ZEROS.astype(np.uint8)}),
    Planted("uint8-saturates", "q", constants={"zero": np.uint8(0)}),
    Planted("zero-point-omitted", "q", {"q": "q = QuantizeLinear(image, step)", "dq": "d = DequantizeLinear(q, step)"}),
    Planted("zero-point-not-zero", "q", constants={"zero": np.int8(3)}),
    Planted("zero-point-not-zero", "wq", constants={"wz": ZEROS + np.int8(1)}),
    Planted("zero-point-not-constant", "q", {
        "m": "m = ReduceMax<keepdims = 0>(image)", "zc": "zc = Cast<to = 3>(m)",
        "q": "q = QuantizeLinear(image, step, zc)", "dq": "d = DequantizeLinear(q, step, zc)"}),
    Planted("type-not-int8", "q", constants={"zero": np.int16(0)}),
    Planted("type-not-int8", "q", constants={"zero": np.uint16(0)}),
    Planted("int32-bias", "bdq", {"bdq": "bd = DequantizeLinear<axis = 0>(bi, bs, bz)",
                                  "conv": "c = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)"}),
    *(Planted("scale-not-positive", "q", constants={"step": np.float32(bad)}) for bad in (0, -1, np.nan, np.inf)),
    Planted("scale-not-positive", "wq", constants={"ws": np.where(np.arange(CHANNELS) == 2, 0, SCALES).astype(np.float32)}),
    Planted("scale-not-constant", "q", {"m": "m = ReduceMax<keepdims = 0>(image)",
                                        "q": "q = QuantizeLinear(image, m, zero)", "dq": "d = DequantizeLinear(q, m, zero)"}),
    Planted("scale-shape", "wq", constants={"ws": SCALES[:8], "wz": ZEROS[:8]}),
    Planted("scale-shape", "wq", {"wq": "wq = QuantizeLinear<axis = 5>(w, ws, wz)",
                                  "wdq": "wd = DequantizeLinear<axis = 5>(wq, ws, wz)",
                                  "conv": "c = ConvTranspose<pads = [1, 1, 1, 1]>(d, wd, b)"}),
    Planted("per-channel-activation", "q", {"q": "q = QuantizeLinear(image, ws, wz)", "dq": "d = DequantizeLinear(q, ws, wz)"}),
    Planted("scalar-data", "sq", {"s0": "s = ReduceMax<keepdims = 0>(image)", "sq": "sq = QuantizeLinear(s, step, zero)",
                                  "sdq": "sd = DequantizeLinear(sq, step, zero)", "end": "y = Mul(r, sd)"}),
    Planted("half-scale-opset", "wq q", HALF_LINES, HALF, opset=17),
    Planted("half-scale-of-float", "q", constants=HALF),
    Planted("half-scale-subnormal", "wq", HALF_LINES, {**HALF, "ws": np.full(CHANNELS, 1e-6, np.float16)}),
    Planted("float-type-differs", "eq", {**HALF_LINES, "eq": "e = QuantizeLinear(image, other, zero)",
                                         "edq": "ed = DequantizeLinear(e, other, zero)", "e16": "h = Cast<to = 10>(ed)",
                                         "end": "y = Mul(r, h)"}, HALF),
    Planted("float-type-differs", "eq", {"cast": "i16 = Cast<to = 10>(image)", "eq": "e = QuantizeLinear(i16, step16, zero)",
                                         "edq": "ed = DequantizeLinear(e, step16, zero)", "e32": "h = Cast<to = 1>(ed)",
                                         "end": "y = Mul(r, h)"}, {"step16": np.float16(0.03)}),
    Planted("pair-differs", "dq", {"dq": "d = DequantizeLinear(q, other, zero)"}),
    Planted("pair-differs", "wdq", {"wdq": "wd = DequantizeLinear<axis = 1>(wq, ws, wz)",
                                    "conv": "c = ConvTranspose<pads = [1, 1, 1, 1]>(d, wd, b)"}),
    Planted("pair-differs", "dq", {"dq": "d = DequantizeLinear(q, step, unsigned)"}, {"unsigned": np.uint8(0)}),
    Planted("quantize-without-dequantize", "lone", LONE),
    Planted("quantized-twice", "q2", {**AGAIN, "conv": "c = Conv<pads = [1, 1, 1, 1]>(d2, wd, b)"}),
    Planted("requantized", "q2", {**AGAIN_OTHER, "conv": "c = Conv<pads = [1, 1, 1, 1]>(d2, wd, b)"}),
    Planted("readers-with-different-scales", "eq", {"eq": "e = QuantizeLinear(image, other, zero)",
                                                    "edq": "ed = DequantizeLinear(e, other, zero)", "end": "y = Mul(r, ed)"}),
    Planted("layer-not-quantized", "end", {"end": "y = Conv(r, w, b)"}),
    Planted("layer-half-quantized", "conv", {"wq": "", "wdq": "", "conv": "c = Conv(d, w, b)"}),
    Planted("layer-half-quantized", "conv", {"q": "", "dq": "", "conv": "c = Conv(image, wd, b)"}),
    Planted("weight-axis", "conv", {"wq": "wq = QuantizeLinear<axis = 1>(w, ws, wz)",
                                    "wdq": "wd = DequantizeLinear<axis = 1>(wq, ws, wz)"}),
    Planted("weight-axis", "conv", {"wq": "wq = QuantizeLinear<axis = -3>(w, ws, wz)",
                                    "wdq": "wd = DequantizeLinear<axis = -3>(wq, ws, wz)"}),
    Planted("integer-weights", "conv", {"wq": "", "wdq": "wd = DequantizeLinear<axis = 0>(wi, ws, wz)"}),
    Planted("small-convolution", "conv",
            constants={"w": WEIGHTS[:8, :, :, :1], "ws": SCALES[:8], "wz": ZEROS[:8], "b": BIAS[:8]}),
    Planted("small-convolution", "conv", {"conv": "c = Conv<group = 16>(d, wd, b)"}, {"w": WEIGHTS[:, :1, :1, :1]}),
    Planted("small-convolution", "conv", {"r2": "x = Relu(image)", "q": "q = QuantizeLinear(x, step, zero)"}, EIGHT),
    Planted("quantized-before-activation", "relu", {**BEHIND_CONV, "relu": "r = Relu(cd)"}),
    Planted("quantized-before-silu", "relu", {**BEHIND_CONV, "gate": "g = Sigmoid(cd)", "relu": "r = Mul(cd, g)"}),
    Planted("quantized-before-silu", "relu", {**BEHIND_CONV, "gate": "g = Sigmoid(cd)", "relu": "r = Mul(g, c)"}),
    Planted("residual-skip-float", "relu", {"relu": "a = Add(c, image)", **LAST_PAIR}),
    Planted("residual-skip-float", "add", {"add": "s = Add(image, c)", "relu": "a = Relu(s)", **LAST_PAIR}),
    Planted("residual-branch-quantized", "relu", {**BEHIND_CONV, "relu": "r = Add(cd, d)"}),
    Planted("concat-scales", "relu", {**second("other"), "relu": "r = Concat<axis = 1>(d, ed)"}),
    Planted("concat-scales", "relu", {**second("other"), "relu": "a = Concat<axis = 1>(ed, ed)", **LAST_PAIR}),
    Planted("concat-input-float", "relu", {"pool": "p = MaxPool<kernel_shape = [1, 1]>(image)",
                                           "relu": "a = Concat<axis = 1>(d, p)", **LAST_PAIR}),
    Planted("passing-rescaled", "pool", POOL_RESCALED),
    Planted("pool-not-quantized", "pool", {"pool": "a = GlobalAveragePool(r)", **LAST_PAIR}),
]  # fmt: skip

NO_BIAS = "c = Conv<pads = [1, 1, 1, 1]>(d, wd)"
FLOAT_RESULT = {"relu": "", "rq": "", "rdq": ""}
BY_ONNXRUNTIME = [
    Planted("weights-of-eight-bits", "the graph", {}, {"wi": np.clip(INTEGERS.astype(int) * 2, -127, 127).astype(np.int8)}),
    Planted("qoperator-format", "the graph", DYNAMIC),
    Planted("qoperator-format", "the graph", {**LONE, "int": "i = ConvInteger(lq, wi)"}),
    *(Planted("scale-not-positive", "rq", constants={"other": np.float32(bad)}) for bad in (0, -1, np.nan, np.inf)),
    Planted("scale-shape", "wdq", {"conv": NO_BIAS, "bdq": ""}, {"ws": SCALES[:8], "wz": ZEROS[:8]}),
    Planted("per-channel-activation", "q", {"q": "q = QuantizeLinear(image, ps, pz)", "dq": "d = DequantizeLinear(q, ps, pz)",
                                            "bdq": "", "conv": NO_BIAS}, {"ps": SCALES, "pz": ZEROS.astype(np.uint8)}),
    Planted("shared-int8-activation", "q", {"again": "o = Sigmoid(d)"}, {"zero": np.int8(0)}),
    Planted("sixteen-bits", "q", constants={"zero": np.uint16(30_000)}),
    Planted("half-scale", "q", {**HALF_LINES, "conv": NO_BIAS, "bdq": ""},
            {"step": np.float16(0.03)}),
    Planted("pair-differs", "rdq", {"rdq": "y = DequantizeLinear(rq, step, low)"}),
    Planted("quantize-without-dequantize", "lone", LONE),
    Planted("quantized-twice", "q2", {**AGAIN, "conv": "c = Conv<pads = [1, 1, 1, 1]>(d2, wd, bd)"}),
    Planted("requantized", "q2", {**AGAIN_OTHER, "conv": "c = Conv<pads = [1, 1, 1, 1]>(d2, wd, bd)"},
            {"bs": OTHER_STEP * SCALES}),
    Planted("layer-not-quantized", "float", {"float": "f = Conv(image, w, b)"}),
    Planted("layer-half-quantized", "conv", {"q": "", "dq": "", "bdq": "",
                                             "conv": "c = Conv<pads = [1, 1, 1, 1]>(image, wd, b)"}),
    Planted("layer-half-quantized", "conv", {**FLOAT_RESULT, "wdq": "", "bdq": "",
                                             "conv": "y = Conv<pads = [1, 1, 1, 1]>(d, w, b)"}),
    Planted("weights-left-to-the-runtime", "conv", {"wdq": "", "bdq": "", "conv": "c = Conv<pads = [1, 1, 1, 1]>(d, w, b)"}),
    Planted("weight-axis", "conv", {"wdq": "wd = DequantizeLinear<axis = 1>(wi, ws, wz)"}),
    Planted("weight-axis", "conv", {"wdq": "wd = DequantizeLinear(wi, ws, wz)"}),
    Planted("uint8-weights", "conv", constants={"wi": (INTEGERS.astype(int) + 128).astype(np.uint8),
                                                "wz": np.full(CHANNELS, 128, np.uint8)}),
    Planted("weight-zero-point", "conv", constants={"wz": ZEROS + np.int8(7)}),
    Planted("bias-scale", "conv", constants={"bs": 2 * STEP * SCALES}),
    Planted("bias-scale", "conv", constants={"bz": np.full(CHANNELS, 100, np.int32)}),
    Planted("bias-scale", "conv", {"bdq": "bd = DequantizeLinear(bi, step, bz0)"}, {"bz0": np.int32(0)}),
    Planted("bias-scale-ignored", "conv", FLAT, {**FLAT_WEIGHTS, "bs": 2 * STEP * SCALES}),
    Planted("float-bias", "conv", {**FLAT, **FLOAT_RESULT, "bdq": "", "conv": "y = Gemm<transB = 1>(d, wd, b)"}, FLAT_WEIGHTS),
    Planted("layer-output-float", "conv", {**FLOAT_RESULT, "conv": "y = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)"}),
    Planted("layer-output-float", "conv", {"relu": "r = Identity(c)", "gate": "g = Sigmoid(c)"}),
    Planted("layer-output-float", "conv", {"relu": "r = LeakyRelu(c)"}),
    Planted("layer-output-float", "conv", {"conv": "y = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)", "relu": "r = Relu(y)",
                                           "rdq": "z = DequantizeLinear(rq, other, low)"}),
    Planted("layer-output-float", "conv", {"conv": "y = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)", "relu": "",
                                           "rq": "rq = QuantizeLinear(y, other, low)",
                                           "rdq": "z = DequantizeLinear(rq, other, low)"}),
    Planted("layer-output-float", "conv", {"relu": "", "rq": "rq = QuantizeLinear(c, other, low)",
                                           "cq": "cq = QuantizeLinear(c, step, low)",
                                           "cdq": "cd = DequantizeLinear(cq, step, low)"}),
    Planted("layer-output-float", "conv", {**FLAT, "relu": "", "rq": "rq = QuantizeLinear(c, other, low)",
                                           "gate": "g = Sigmoid(c)"},
            FLAT_WEIGHTS),
    Planted("activation-not-absorbed", "relu", constants={"low": np.uint8(5)}),
    Planted("activation-not-absorbed", "relu", {"relu": "r = Clip(c, lower, upper)"},
            {"lower": np.float32(0), "upper": np.float32(5)}),
    Planted("mixed-inputs", "add", {"add": "a = Add(d, image)", "aq": "aq = QuantizeLinear(a, step, zero)",
                                    "adq": "ad = DequantizeLinear(aq, step, zero)"}),
    Planted("mixed-inputs", "cat", {"cat": "a = Concat<axis = 1>(d, image)", "aq": "aq = QuantizeLinear(a, step, zero)",
                                    "adq": "ad = DequantizeLinear(aq, step, zero)"}),
    Planted("passing-rescaled", "pool", POOL_RESCALED),
]  # fmt: skip

FULL = {"wi": np.clip(INTEGERS.astype(int) * 2, -127, 127).astype(np.int8)}
COMPUTED = {
    "m": "m = ReduceMax<keepdims = 0>(image)",
    "q": "q = QuantizeLinear(image, m, zero)",
    "dq": "d = DequantizeLinear(q, m, zero)",
    "bdq": "",
    "conv": NO_BIAS,
}
DYNAMIC_CONV = {
    "dyn": "dy, ds, dz = DynamicQuantizeLinear(image)",
    "int": "di = ConvInteger<pads = [1, 1, 1, 1]>(dy, wi, dz)",
    "cast": "df = Cast<to = 1>(di)",
    "scaled": "z = Mul(df, ds)",
    "rdq": "rd = DequantizeLinear(rq, other, low)",
    "sum": "y = Add(rd, z)",
}
BY_OPENVINO = [
    Planted("weights-of-eight-bits", "the graph", {}, FULL),
    Planted("weights-of-eight-bits", "the graph", {
        "wq": "wq = QuantizeLinear<axis = 0>(w, ws, wz)", "wdq": "wd = DequantizeLinear<axis = 0>(wq, ws, wz)"}),
    *(Planted("scale-not-positive", "rq", constants={"other": np.float32(bad)}) for bad in (0, -1, np.nan, np.inf)),
    Planted("scale-shape", "wdq", {"conv": NO_BIAS, "bdq": ""}, {"ws": SCALES[:8], "wz": ZEROS[:8]}),
    Planted("per-channel-activation", "q", {"q": "q = QuantizeLinear(image, ps, pz)", "dq": "d = DequantizeLinear(q, ps, pz)",
                                            "bdq": "", "conv": NO_BIAS}, {"ps": SCALES, "pz": ZEROS.astype(np.uint8)}),
    Planted("scale-not-constant", "q", COMPUTED),
    Planted("sixteen-bits", "q", constants={"zero": np.uint16(30_000)}, opset=21),
    Planted("pair-differs", "rdq", {"rdq": "y = DequantizeLinear(rq, step, low)"}),
    Planted("quantize-without-dequantize", "lone", LONE),
    Planted("quantized-twice", "q2", {**AGAIN, "conv": "c = Conv<pads = [1, 1, 1, 1]>(d2, wd, bd)"}),
    Planted("layer-not-quantized", "float", {"float": "f = Conv(image, w, b)"}),
    Planted("layer-half-quantized", "conv", {"q": "", "dq": "", "bdq": "",
                                             "conv": "c = Conv<pads = [1, 1, 1, 1]>(image, wd, b)"}),
    Planted("layer-half-quantized", "conv", {"wdq": "", "bdq": "", "conv": "c = Conv<pads = [1, 1, 1, 1]>(d, w, b)"}),
    Planted("weight-axis", "conv", {"wdq": "wd = DequantizeLinear<axis = 1>(wi, ws, wz)"}),
    Planted("uint8-weights", "conv", constants={"wi": (INTEGERS.astype(int) + 128).astype(np.uint8),
                                                "wz": np.full(CHANNELS, 128, np.uint8)}),
    Planted("weight-zero-point", "conv", constants={"wz": ZEROS + np.int8(7)}),
    Planted("dynamic-layer", "int", DYNAMIC_CONV),
]  # fmt: skip

MATRICES = {"wq": "wq = QuantizeLinear<axis = 2>(w, ws, wz)", "wdq": "wd = DequantizeLinear<axis = 2>(wq, ws, wz)"}
ALLOWED = [
    ("tensorrt", Planted("the first layer may have few channels", "", {}, EIGHT)),
    ("tensorrt", Planted("so it may behind a cast to FP16", "", HALF_LINES, {**EIGHT, "step": HALF["step"]} | {
        name: EIGHT[name].astype(np.float16) for name in ("w", "ws", "b")})),
    ("tensorrt", Planted("a kernel need not be square with 16 channels", "", {}, {"w": WEIGHTS[:, :, :, :1]})),
    ("tensorrt", Planted("a stack of matrices has its columns last", "", {**MATRICES, "conv": "c = MatMul(d, wd)"},
                         {"w": WEIGHTS[:, :8, 0, :1].repeat(8, 2), "ws": SCALES[:8], "wz": ZEROS[:8]})),
    ("tensorrt", Planted("a Concat nobody quantizes may have a float input", "",
                         {"pool": "p = MaxPool<kernel_shape = [1, 1]>(image)", "relu": "r = Concat<axis = 1>(d, p)"})),
    ("tensorrt", Planted("an Add nobody quantizes may have a float skip", "", {"relu": "r = Add(c, image)"})),
    ("tensorrt", Planted("a pool nobody quantizes may be float", "", {"relu": "r = GlobalAveragePool(c)"})),
    ("tensorrt", Planted("the skip is the branch with fewer layers", "", {
        **BEHIND_CONV, "deep": "e = Conv<pads = [1, 1, 1, 1]>(cd, wd, b)", "skip": "s = Conv<pads = [1, 1, 1, 1]>(d, wd, b)",
        "sq": "sq = QuantizeLinear(s, other, zero)", "sdq": "sd = DequantizeLinear(sq, other, zero)", "relu": "r = Add(sd, e)"})),
    ("onnxruntime", Planted("int8 activations with one reader cost nothing", "", {}, {"zero": np.int8(0)})),
    ("onnxruntime", Planted("a float bias in front of a quantized result", "", {
        **FLAT, "bdq": "", "conv": "c = Gemm<transB = 1>(d, wd, b)"}, FLAT_WEIGHTS)),
    ("onnxruntime", Planted("a float bias of a convolution", "", {"bdq": "", "conv": "c = Conv<pads = [1, 1, 1, 1]>(d, wd, b)"})),
    ("onnxruntime", Planted("a Gemm with a float result", "", {
        **FLAT, **FLOAT_RESULT, "conv": "y = Gemm<transB = 1>(d, wd, bd)"}, FLAT_WEIGHTS)),
    ("onnxruntime", Planted("a Clip as wide as its quantization", "", {"relu": "r = Clip(c, lower, upper)"},
                            {"lower": np.float32(0), "upper": np.float32(5.1)})),
    ("openvino", Planted("int8 activations with two readers", "", {"again": "o = Sigmoid(d)"}, {"zero": np.int8(0)})),
    ("openvino", Planted("a float result", "", {**FLOAT_RESULT, "conv": "y = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)"})),
    ("openvino", Planted("a bias of another scale", "", constants={"bs": 2 * STEP * SCALES})),
    ("openvino", Planted("a float bias and a float result of a Gemm", "", {
        **FLAT, **FLOAT_RESULT, "bdq": "", "conv": "y = Gemm<transB = 1>(d, wd, b)"}, FLAT_WEIGHTS)),
    ("openvino", Planted("full weights of a depthwise convolution", "", {
        "conv": "c = Conv<pads = [1, 1, 1, 1], group = 16>(d, wd, bd)"}, {"wi": FULL["wi"][:, :1]})),
    ("openvino", Planted("a Concat of different scales", "", {
        "rdq": "rd = DequantizeLinear(rq, other, low)", "cat": "a = Concat<axis = 1>(rd, d)",
        "aq": "aq = QuantizeLinear(a, third, zero)", "adq": "y = DequantizeLinear(aq, third, zero)"},
        {"third": np.float32(0.0271)})),
]  # fmt: skip

BASES = {
    "tensorrt": (TENSORRT, CONSTANTS),
    "onnxruntime": (ONNXRUNTIME, {**CONSTANTS, **UINT8}),
    "openvino": (ONNXRUNTIME, {**CONSTANTS, **UINT8}),
}
BY = {"tensorrt": BY_TENSORRT, "onnxruntime": BY_ONNXRUNTIME, "openvino": BY_OPENVINO}
PLANTED = [(runtime, case) for runtime, cases in BY.items() for case in cases]


def row(rule: Rule) -> str:
    """The line of a rule in the document's table: name, severity, what it asks for and its source, what breaking it costs."""
    return f"| `{rule.name}` | {rule.severity} | {' '.join(str(rule.find.__doc__).split())} | {rule.cost} |"


class TestEveryRule:
    @pytest.mark.parametrize("runtime", RULES)
    def test_a_clean_graph_breaks_none(self, runtime):
        assert told(made(*BASES[runtime]), runtime) == []

    @pytest.mark.parametrize(("runtime", "case"), PLANTED, ids=[f"{runtime}: {case}" for runtime, case in PLANTED])
    def test_that_is_broken_is_named_with_its_node_and_nothing_else_is(self, runtime, case):
        model = case.model(*BASES[runtime])

        assert told(model, runtime) == [
            (case.rule, node) for node in ([case.nodes] if " graph" in case.nodes else case.nodes.split())
        ]

    @pytest.mark.parametrize(("runtime", "case"), ALLOWED, ids=[case.rule for _, case in ALLOWED])
    def test_allows_what_costs_nothing(self, runtime, case):
        assert told(case.model(*BASES[runtime]), runtime) == []

    @pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
    @pytest.mark.parametrize("where", [slice(None), 3])
    def test_a_weight_scale_that_is_none_is_named_once_and_not_as_a_wrong_scale_of_the_bias(self, bad, where):
        scales = SCALES.copy()
        scales[where] = bad

        found = told(made(ONNXRUNTIME, {**CONSTANTS, **UINT8, "ws": scales}), "onnxruntime")

        assert found == [("scale-not-positive", "wdq")]

    @pytest.mark.parametrize("runtime", RULES)
    def test_has_a_planted_violation_here_and_a_line_in_the_document(self, runtime):
        here = {case.rule for name, case in PLANTED if name == runtime} | {"not-quantized"}
        section = DOCUMENT.read_text().partition(f"## By the rules of `{runtime}`")[2].partition("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("| `")]

        assert {rule.name for rule in RULES[runtime]} == here
        assert lines == [row(rule) for severity in SEVERITIES for rule in RULES[runtime] if rule.severity == severity]

    def test_says_where_it_comes_from_what_it_costs_and_what_to_do(self):
        for rules in RULES.values():
            for rule in rules:
                assert rule.find.__doc__
                assert rule.cost
                assert rule.fix

    def test_every_runtime_that_has_quantization_rules_has_lint_rules(self):
        assert set(RULES) == {name for name, entry in runtimes.REGISTRY.items() if entry.rules is not None}


def run(model: onnx.ModelProto, *, optimise: bool, written: Path) -> tuple[np.ndarray, list[str]]:
    """The answer of ONNX Runtime, and the kernels that it ran."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.optimized_model_filepath, options.log_severity_level = str(written), 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(3).standard_normal((1, CHANNELS, 8, 8)).astype(np.float32)
    return session.run(None, {"image": image})[0], [node.op_type for node in onnx.load(written).graph.node]


def by_onnxruntime(*rules: str) -> list[Planted]:
    return [case for case in BY_ONNXRUNTIME if case.rule in rules]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the rules are those of ONNX Runtime's kernels for x86")
class TestOnnxRuntimeDoesWhatTheRulesSay:
    @pytest.mark.parametrize(
        "case",
        [
            Planted("Conv", ""),
            Planted("Gemm", "", FLAT, FLAT_WEIGHTS),
            *(case for name, case in ALLOWED if name == "onnxruntime"),
        ],
        ids=lambda case: case.rule,
    )
    def test_what_is_allowed_runs_in_int8_and_answers_as_it_says(self, tmp_path, case):
        model = case.model(*BASES["onnxruntime"])

        literal, _ = run(model, optimise=False, written=tmp_path / "a.onnx")
        fast, kernels = run(model, optimise=True, written=tmp_path / "b.onnx")

        assert {"QLinearConv", "QGemm"} & set(kernels)
        assert np.allclose(literal, fast, rtol=1e-5, atol=1e-4)  # float sums in another order; a step is 0.02

    @pytest.mark.parametrize(
        "case",
        by_onnxruntime("weight-axis", "requantized", "weights-left-to-the-runtime", "bias-scale-ignored"),
        ids=str,
    )
    def test_what_is_wrong_answers_otherwise_than_the_graph_says(self, tmp_path, case):
        model = case.model(*BASES["onnxruntime"])

        literal, _ = run(model, optimise=False, written=tmp_path / "a.onnx")
        fast, _ = run(model, optimise=True, written=tmp_path / "b.onnx")

        assert not np.array_equal(literal, fast)

    @pytest.mark.parametrize(
        "case",
        by_onnxruntime(
            "shared-int8-activation",
            "sixteen-bits",
            "half-scale",
            "layer-half-quantized",
            "bias-scale",
            "float-bias",
            "layer-output-float",
            "activation-not-absorbed",
        ),
        ids=str,
    )
    def test_what_is_slow_multiplies_floats(self, tmp_path, case):
        model = case.model(*BASES["onnxruntime"])
        if case.rule == "half-scale":
            model.graph.node[-1].output[0] = "y16"
            model.graph.node.append(helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT))
            for tensor in [tensor for tensor in model.graph.initializer if tensor.name in ("ws", "other")]:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))

        _, kernels = run(onnx.version_converter.convert_version(model, 21) if case.rule == "sixteen-bits" else model,
                         optimise=True, written=tmp_path / "b.onnx")  # fmt: skip

        assert {"Conv", "FusedConv", "Gemm", "FusedGemm"} & set(kernels)
        assert not {"QLinearConv", "QGemm"} & set(kernels)

    @pytest.mark.parametrize("case", by_onnxruntime("per-channel-activation", "scale-shape"), ids=str)
    def test_what_is_refused_does_not_run(self, tmp_path, case):
        with pytest.raises(Exception, match="QLinearConv"):
            run(case.model(*BASES["onnxruntime"]), optimise=True, written=tmp_path / "b.onnx")


def run_openvino(model: onnx.ModelProto) -> tuple[np.ndarray, list[str]]:
    """The answer of OpenVINO, and what its convolutions and matrix products multiply."""
    openvino = pytest.importorskip("deploykit.runtimes.openvino", reason="wants OpenVINO: pip install 'deploykit[openvino]'")
    core = openvino.openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    image = np.random.default_rng(3).standard_normal((1, CHANNELS, 8, 8)).astype(np.float32)
    kinds = [kernel.takes for kernel in openvino.kernels(compiled) if kernel.kind in ("Convolution", "FullyConnected")]
    return compiled([image])[0], kinds


def literally_and_by_openvino(model: onnx.ModelProto, folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The literal graph's answer, OpenVINO's, and what that multiplies."""
    literal, _ = run(model, optimise=False, written=folder / "literal.onnx")
    return literal, *run_openvino(model)


def by_openvino(*rules: str) -> list[Planted]:
    return [case for case in BY_OPENVINO if case.rule in rules]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the rules are those of OpenVINO's kernels for x86")
class TestOpenVinoDoesWhatTheRulesSay:
    @pytest.mark.parametrize(
        "case", [Planted("Conv", ""), *(case for name, case in ALLOWED if name == "openvino")], ids=lambda case: case.rule
    )
    def test_what_is_allowed_multiplies_integers_and_answers_as_it_says(self, tmp_path, case):
        literal, answer, kinds = literally_and_by_openvino(case.model(*BASES["openvino"]), tmp_path)

        assert set(kinds) <= {"u8", "i8"}
        assert kinds
        assert np.allclose(literal, answer, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize(
        "case",
        by_openvino(
            "per-channel-activation",
            "scale-not-constant",
            "layer-half-quantized",
            "weight-axis",
            "uint8-weights",
            "weight-zero-point",
            "dynamic-layer",
        ),
        ids=str,
    )
    def test_what_is_slow_multiplies_floats_and_answers_as_it_says(self, tmp_path, case):
        literal, answer, kinds = literally_and_by_openvino(case.model(*BASES["openvino"]), tmp_path)

        assert "f32" in kinds
        assert (np.abs(literal - answer) > 1e-3).mean() < 0.001  # a sum on the edge of a step

    @pytest.mark.parametrize(
        "case",
        [
            *(case for case in by_openvino("scale-not-positive") if case.constants["other"] < 0),
            *by_openvino("sixteen-bits"),
        ],
        ids=str,
    )
    def test_what_is_wrong_answers_otherwise_than_the_graph_says(self, tmp_path, case):
        literal, answer, _ = literally_and_by_openvino(case.model(*BASES["openvino"]), tmp_path)

        assert not np.allclose(literal, answer)

    @pytest.mark.parametrize("case", by_openvino("scale-shape"), ids=str)
    def test_what_is_refused_does_not_compile(self, case):
        with pytest.raises(RuntimeError):
            run_openvino(case.model(*BASES["openvino"]))

    def test_weights_of_eight_bits_saturate_where_the_cpu_has_no_int8_dot_product(self, tmp_path):
        (full, _) = by_openvino("weights-of-eight-bits")

        literal, answer, _ = literally_and_by_openvino(full.model(*BASES["openvino"]), tmp_path)

        assert np.allclose(literal, answer, rtol=1e-5, atol=1e-4) == has_int8_dot_product(cpu_features())


@pytest.fixture(scope="module")
def for_runtime(portable, tmp_path_factory):
    """(network, runtime) -> our own quantized artifact, each made once."""
    found: dict[tuple[str, str], Artifact] = {}

    def make(name: str, runtime: str) -> Artifact:
        if (name, runtime) not in found:
            found[name, runtime] = networks.quantized(portable(name), runtime, tmp_path_factory.mktemp(f"{name}-{runtime}"))
        return found[name, runtime]

    return make


def serious(findings: tuple[Finding, ...]) -> list[Finding]:
    return [finding for finding in findings if finding.severity != "note"]


class TestOurOwnFiles:
    @pytest.mark.parametrize("runtime", RULES)
    @pytest.mark.parametrize("name", NAMES)
    def test_break_no_rule_of_the_runtime_they_are_for(self, for_runtime, name, runtime):
        assert serious(lint(for_runtime(name, runtime).path, runtime)) == []

    @pytest.mark.parametrize("name", ["residual", "mobile"])
    def test_break_none_in_half_precision_either(self, for_runtime, name, tmp_path):
        assert serious(lint(half.to_fp16(for_runtime(name, "tensorrt"), tmp_path).path, "tensorrt")) == []

    @pytest.mark.parametrize("name", ["residual", "branches", "lenet5"])
    def test_for_onnx_runtime_are_refused_by_tensorrt(self, for_runtime, name):
        found = {finding.rule for finding in lint(for_runtime(name, "onnxruntime").path, "tensorrt")}

        assert {"uint8-zero-point", "uint8-saturates", "int32-bias", "integer-weights"} <= found

    @pytest.mark.parametrize("name", ["branches", "lenet5", "residual", "variety"])
    def test_for_tensorrt_have_the_layers_that_onnx_runtime_leaves_in_float_named(self, for_runtime, name, tmp_path, monkeypatch):
        monkeypatch.setattr(onnxruntime, "_NOT_OURS", ())  # as ONNX Runtime comes, and not as `build` sets it
        artifact = for_runtime(name, "tensorrt")

        named = {finding.node for finding in lint(artifact.path, "onnxruntime")}

        layers = {node.output[0]: node.name for node in onnx.load(artifact.path).graph.node if node.op_type in ("Conv", "Gemm")}
        relus = {node.name: layers.get(node.input[0]) for node in onnx.load(artifact.path).graph.node if node.op_type == "Relu"}
        engine = build.build(artifact, "onnxruntime", tmp_path)
        floats = {layer.name for layer in onnxruntime.realised(engine, artifact).layers if layer.precision != "int8"}
        told = (named & set(layers.values())) | {relus[node] for node in named & set(relus)}
        shared = {finding.node for finding in lint(artifact.path, "onnxruntime") if finding.rule == "shared-int8-activation"}
        assert told - {None} <= floats
        assert told - {None} == floats or shared


class TestFilesOfQuantizeStatic:
    def quantized(self, source: Artifact, folder: Path, **options: Any) -> Path:
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = [{"image": networks.images(1, seed=seed)} for seed in range(4)]

            def get_next(self) -> dict[str, Any] | None:
                return self.left.pop() if self.left else None

        quantization.quantize_static(str(source.path), str(folder / "model.onnx"), Reader(), **options)
        return folder / "model.onnx"

    def test_as_it_writes_them_by_default_tensorrt_would_refuse_the_biases_and_zero_points(self, portable, tmp_path):
        found = lint(self.quantized(portable("residual"), tmp_path), "tensorrt")

        refused = {finding.rule for finding in found if finding.severity == "refused"}
        assert refused == {"zero-point-not-zero", "int32-bias"}
        assert {"residual-branch-quantized", "integer-weights"} <= {finding.rule for finding in found}

    def test_as_it_writes_them_by_default_residual_blocks_are_slow_on_x86(self, portable, tmp_path):
        found = lint(self.quantized(portable("residual"), tmp_path), "onnxruntime")

        assert {finding.rule for finding in serious(found)} == {"shared-int8-activation"}

    def test_with_options_for_tensorrt_only_its_placement_is_slow(self, portable, tmp_path):
        options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True}

        found = lint(self.quantized(portable("residual"), tmp_path, per_channel=True, extra_options=options), "tensorrt")

        assert not is_fatal(found)
        assert "residual-branch-quantized" in {finding.rule for finding in found}

    def test_in_qoperator_format_are_refused_by_one_and_noted_by_the_other(self, portable, tmp_path):
        from onnxruntime import quantization

        path = self.quantized(portable("lenet5"), tmp_path, quant_format=quantization.QuantFormat.QOperator)

        assert ("refused", "qoperator-format") in {(finding.severity, finding.rule) for finding in lint(path, "tensorrt")}
        assert ("note", "qoperator-format", "the graph") in {
            (found.severity, found.rule, found.node) for found in lint(path, "onnxruntime")
        }


STRANGE = (
    np.zeros(0, np.float32),
    np.zeros((2, 3), np.float32),
    np.full(CHANNELS, 0.5),
    np.array(["text"], object),
    np.array(True),
    np.uint8(7),
)


class TestStrangeGraphs:
    @pytest.mark.parametrize("runtime", RULES)
    def test_one_that_is_not_quantized_gets_one_clear_note(self, portable, runtime):
        (found,) = lint(portable("residual").path, runtime)

        assert (found.rule, found.severity, found.node) == ("not-quantized", "note", "the graph")

    def test_constants_may_come_from_constant_nodes_through_identity_and_cast(self):
        lines = {
            "k0": "k0 = Constant<value_float = 0.03>()",
            "k1": "step2 = Identity(k0)",
            "k2": "k2 = Constant<value_float = 0.3>()",
            "k3": "zero2 = Cast<to = 3>(k2)",
            "q": "q = QuantizeLinear(image, step2, zero2)",
            "dq": "d = DequantizeLinear(q, step2, zero2)",
        }

        assert told(Planted("", "", lines).model(TENSORRT, CONSTANTS), "tensorrt") == []
        lines["k0"] = "k0 = Constant<value_float = -0.03>()"
        lines["k2"] = "k2 = Constant<value_int = 3>()"
        assert told(Planted("", "", lines).model(TENSORRT, CONSTANTS), "tensorrt") == [
            ("zero-point-not-zero", "q"),
            ("scale-not-positive", "q"),
        ]

    def test_unnamed_nodes_are_told_by_what_they_make(self):
        model = made(*BASES["tensorrt"])
        for node in model.graph.node:
            node.name = ""
        model.graph.initializer[list(CONSTANTS).index("zero")].CopyFrom(numpy_helper.from_array(np.uint8(128), "zero"))

        assert told(model, "tensorrt") == [("uint8-zero-point", "QuantizeLinear -> q")]

    def test_subgraphs_are_walked(self):
        inner = made({"q": "q = QuantizeLinear(image, step, zero)", "dq": "z = DequantizeLinear(q, step, zero)"}, {}).graph
        branch = helper.make_graph(inner.node, "branch", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
        model = made(TENSORRT | {"end": "u = Identity(r)"}, {**CONSTANTS, "yes": np.array(True), "zero": np.uint8(128)})
        model.graph.node.append(helper.make_node("If", ["yes"], ["y"], name="if", then_branch=branch, else_branch=branch))
        for index, value in enumerate(("q", "z")):
            for part in model.graph.node[-1].attribute:
                part.g.node[index].name = f"{part.name}/{value}"

        found = told(model, "tensorrt")

        assert found == [
            ("uint8-zero-point", "q"),
            *(("uint8-zero-point", f"{part}/q") for part in ("else_branch", "then_branch")),
        ]

    def test_operators_of_other_domains_and_missing_optional_inputs_are_passed_over(self):
        model = made(TENSORRT | {"relu": 'r = Clip(c, "", step)'}, CONSTANTS)
        model.graph.node.insert(0, helper.make_node("Conv", ["image"], ["foreign"], name="foreign", domain="somewhere.else"))
        model.opset_import.append(helper.make_opsetid("somewhere.else", 1))

        assert told(model, "tensorrt") == []
        assert told(model, "onnxruntime") != []

    def test_microsofts_own_16_bit_pairs_are_named(self):
        model = made(*BASES["tensorrt"])
        for node in model.graph.node[:2]:
            node.domain = "com.microsoft"
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        model.graph.initializer[list(CONSTANTS).index("zero")].CopyFrom(numpy_helper.from_array(np.int16(0), "zero"))

        assert told(model, "tensorrt") == [("type-not-int8", "q")]

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_no_graph_makes_it_crash(self, data):
        runtime, case = data.draw(st.sampled_from(PLANTED))
        model = case.model(*BASES[runtime])
        nodes = list(model.graph.node)
        for node in data.draw(st.lists(st.sampled_from(nodes), max_size=4)):
            damage = data.draw(st.sampled_from(["drop an input", "empty an input", "no inputs", "no outputs", "rename"]))
            if damage == "drop an input" and node.input:
                del node.input[-1]
            elif damage == "empty an input" and node.input:
                node.input[data.draw(st.integers(0, len(node.input) - 1))] = ""
            elif damage == "no inputs":
                del node.input[:]
            elif damage == "no outputs":
                del node.output[:]
            else:
                node.op_type = data.draw(st.sampled_from(["Add", "Conv", "Clip", "Concat", "MatMul", "DequantizeLinear", "Mul"]))

        for tensor in data.draw(st.lists(st.sampled_from(list(model.graph.initializer)), max_size=2)):
            strange = data.draw(st.sampled_from(STRANGE))
            tensor.CopyFrom(numpy_helper.from_array(strange, tensor.name))

        for runtime in RULES:
            for finding in lint(model, runtime):
                assert finding.node

    def test_the_model_that_was_given_is_not_changed(self):
        model = BY_TENSORRT[3].model(TENSORRT, CONSTANTS)
        before = model.SerializeToString(deterministic=True)

        first, second = lint(model, "tensorrt"), lint(model, "tensorrt")

        assert first == second
        assert model.SerializeToString(deterministic=True) == before


class TestCommandLine:
    def saved(self, folder: Path, case: Planted) -> Path:
        onnx.save(case.model(TENSORRT, CONSTANTS), folder / "model.onnx")
        return folder / "model.onnx"

    def test_a_clean_file_exits_with_0_and_counts_of_nothing(self, deploykit, tmp_path):
        outcome = deploykit("inspect", self.saved(tmp_path, Planted("", "")), "--rules", "tensorrt")

        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out == "by the rules of tensorrt: 0 refused, 0 wrong, 0 slow, 0 note\n"

    @pytest.mark.parametrize(("constants", "code"), [({"zero": np.uint8(128)}, 3), ({"zero": np.uint8(0)}, 3)])
    def test_what_is_refused_or_wrong_exits_with_3(self, deploykit, tmp_path, constants, code):
        assert deploykit("inspect", self.saved(tmp_path, Planted("", "", {}, constants)), "--rules", "tensorrt").code == code

    def test_what_is_slow_exits_with_0_and_says_why_and_what_to_do(self, deploykit, tmp_path):
        path = self.saved(tmp_path, Planted("", "", POOL_RESCALED))

        outcome = deploykit("inspect", path, "--rules", "tensorrt")

        assert outcome.code == 0
        assert [line.strip().split(":")[0] for line in outcome.out.splitlines()] == [
            *("by the rules of tensorrt", "slow", "why", "try", "- pool")
        ]

    def test_json_groups_the_findings_by_severity(self, deploykit, tmp_path):
        outcome = deploykit(
            "inspect", self.saved(tmp_path, Planted("", "", {}, {"zero": np.uint8(128)})), "--rules", "tensorrt", "--json"
        )

        found = json.loads(outcome.out)
        assert (outcome.code, found["exit_code"], found["rules"]) == (3, 3, "tensorrt")
        assert found["counts"] == {"refused": 1, "wrong": 0, "slow": 0, "note": 0}
        assert [(item["rule"], item["node"]) for item in found["findings"]["refused"]] == [("uint8-zero-point", "q")]

    def test_a_rule_is_explained_once_for_all_its_nodes(self):
        findings = [Finding("rule", "slow", node, "what", "cost", "fix") for node in ("a", "b")]

        assert as_text(findings, "tensorrt").splitlines()[1:] == [
            *("slow: rule (2)", "  why: cost", "  try: fix", "  - a: what", "  - b: what")
        ]
        assert json.loads(json.dumps(as_facts(findings, "tensorrt"))) == as_facts(findings, "tensorrt")

    @pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"<html>404</html>"])
    def test_a_file_that_is_not_onnx_is_refused(self, deploykit, tmp_path, content):
        (tmp_path / "net.onnx").write_bytes(content)

        outcome = deploykit("inspect", tmp_path / "net.onnx", "--rules", "onnxruntime")

        assert outcome.code == 2
        assert "is not an ONNX file that can be read" in outcome.err

    def test_a_folder_or_nothing_is_refused(self, deploykit, tmp_path):
        for path, why in ((tmp_path, "name the model.onnx itself"), (tmp_path / "nothing", "there is no")):
            outcome = deploykit("inspect", path, "--rules", "tensorrt")

            assert outcome.code == 2
            assert why in outcome.err

    def test_a_runtime_without_rules_is_refused(self):
        with pytest.raises(UsageError, match=r"torchscript has no rules for Q/DQ\n  try: one of onnxruntime, openvino, tensorrt"):
            lint(made(*BASES["tensorrt"]), "torchscript")
