"""How loud a layer's own error is, channel by channel, and how loud its precision lets it be.

A rounding to steps of s adds noise of power s^2 / 12 (Bennett, Spectra of quantized signals, 1948). Noise of the inputs
reaches the output of a Conv, Gemm or MatMul times the squares of the weights, noise of the weights times the second moments
of the inputs. A float sum of n products is off by about sqrt(n) roundings of the sum of their magnitudes (Higham and Mary, A
new approach to probabilistic rounding error analysis, 2019).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.bisect import graph as graphs
from deploykit.bisect.graph import Graph

Power = NDArray[np.float64]

# Relative error of one float operation, with what expf and its like are off by in it; 2^-24 is half the distance of floats.
_ROUNDING = 16 * 2.0**-24
# A step is called too coarse when it is that many times what the values seen here would need: few images do not show the
# range of all, and tensors may share the range of the largest of them.
_COARSER = 4.0
# And a range is called too small when values lie further outside than that share of its end on their side, where an end at
# zero counts as a quarter of the range, and those outside are more than a hundredth of all that are not zero: ranges are chosen
# so that few are cut off, and these few may lie anywhere. 0.43 % were seen of networks without a fault (docs/decisions.md).
_BEYOND, _LEAST_END, _CUT = 0.5, 0.25, 0.01
# Weights of few inputs also make up for what is cut off from these, and move by several steps for it; no further than that
# share of their channel's largest. Kernels of 5x5 in a depthwise layer are the largest of few inputs.
_MOVED, _FEW = 0.1, 25
# Errors of weights that point that much (squared cosine) the way of the weights themselves, or all one way, are a wrong scale or
# a wrong zero point. Nine that were chosen by chance do so once in some thousand times.
_COHERENT = 0.8
_LARGEST = 127  # of int8
_LAYERS = ("Conv", "Gemm", "MatMul")
# The values that come out are values that went in, or sums and averages of them that are no louder.
_PASSING = frozenset(
    {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh", "Add", "Sub", "Concat", "MaxPool", "AveragePool"}
    | {"GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad"}
)


@dataclass
class Seen:
    """What passed through one tensor: sums over images and places for each channel, the range of it all, and what each range
    that is asked for would cut off, with how many values."""

    signal: Power = field(default_factory=lambda: np.zeros(1))
    own: Power = field(default_factory=lambda: np.zeros(1))
    total: Power = field(default_factory=lambda: np.zeros(1))
    count: int = 0
    low: float = 0.0
    high: float = 0.0
    clipped: dict[tuple[float, float], Power] = field(default_factory=dict)
    outside: dict[tuple[float, float], int] = field(default_factory=dict)
    nonzero: int = 0

    def add(self, wanted: NDArray[np.float32], own: NDArray[np.float32] | None, total: NDArray[np.float32] | None) -> None:
        """Count a batch: the reference's values, the layer's alone on the reference's inputs, and those of the whole graph.

        What has another shape, or is not finite, is infinitely loud.
        """
        self.signal = self.signal + powers(wanted)
        self.own = self.own + _error(own, wanted)
        self.total = self.total + _error(total, wanted)
        self.count += wanted.size // max(1, len(self.signal))
        self.nonzero += int(np.count_nonzero(wanted))
        low, high = float(wanted.min()), float(wanted.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        for (least, most), power in self.clipped.items():
            if low < least or high > most:
                cut = wanted - np.clip(wanted, least, most)
                self.clipped[least, most] = power + powers(cut)
                self.outside[least, most] = self.outside.get((least, most), 0) + int(np.count_nonzero(cut))

    @property
    def moments(self) -> Power:
        """Mean square of each channel."""
        return self.signal / max(1, self.count)


def powers(values: NDArray[np.float32]) -> Power:
    """Sum of squares of each channel: axis 1, or the last of sequences (N, tokens, channels)."""
    if values.ndim < 2:
        return np.array([float(np.square(values, dtype=np.float64).sum())])
    moved = np.moveaxis(values, -1, 1) if values.ndim == 3 else values
    flat = moved.reshape(len(moved), moved.shape[1], -1)
    found: Power = np.einsum("ncx,ncx->c", flat, flat).astype(np.float64)
    return found


def explained(a: Graph, b: Graph, tensor: str, anchors: Collection[str], seen: Mapping[str, Seen]) -> Power:
    """The noise power that B's precision explains in each channel of `tensor`, when its inputs are A's."""
    node, behind = b.node_of(tensor), _behind(b, tensor)
    inputs: dict[str, tuple[float, Power]] = {name: (0.0, np.zeros(1)) for name in _sources(b, tensor, anchors)}
    added = np.zeros(1)
    for quantizer, source in graphs.quantizers(b, tensor, anchors):
        values = seen[source if source in seen else tensor]
        rounding, clipping = _rounding(b, quantizer, values), _clipping(b, quantizer, values)
        if source in inputs and quantizer.name not in behind:
            inputs[source] = (rounding, clipping)
        else:
            added = added + rounding + clipping
    moments = seen[tensor].moments
    right = a.node_of(tensor)
    weights = a.constants.get(right.input[1]) if right.op_type == node.op_type and node.op_type in _LAYERS else None
    if weights is not None:
        found: Power = added + _of_layer(a, b, tensor, weights, inputs, seen)
        return found
    loudest = max([float(moments.mean()), *(float(seen[name].moments.mean()) for name in inputs)])
    found = added + np.full(len(moments), _ROUNDING**2 * loudest)
    for name, (rounding, clipping) in inputs.items():
        gain = 1.0 if node.op_type in _PASSING else _gain(seen[name], moments)
        found = found + gain * (rounding + fitted(clipping, len(moments)))
    return found


def _of_layer(
    a: Graph,
    b: Graph,
    tensor: str,
    weights: NDArray[np.float32],
    inputs: Mapping[str, tuple[float, Power]],
    seen: Mapping[str, Seen],
) -> Power:
    """The noise of a Conv, Gemm or MatMul: its input's, its weights', and that of adding up.

    What is cut off has a sign, so it adds up in amplitude and not in power. A bias in int32 has steps of input times weight
    steps, which are nothing beside these.
    """
    node = a.node_of(tensor)
    rows = np.abs(as_rows(node, weights).astype(np.float64))
    source = next(iter(inputs), "")
    rounding, clipping = inputs.get(source, (0.0, np.zeros(1)))
    moments = np.broadcast_to(_fan_in(node, seen[source].moments if source else np.zeros(1), rows), rows.shape)
    # A channel without weights has any scale, and a bias that int32 could not hold at the weights' own scale has enlarged it.
    steps = np.minimum(fitted(_steps(b, b.node_of(tensor)), len(rows)), _COARSER * rows.max(axis=1) / _LARGEST)
    bias = a.constants.get(node.input[2]) if len(node.input) > 2 else None
    summed = (rows * np.sqrt(moments)).sum(axis=1) + (0.0 if bias is None else np.abs(bias.reshape(-1)))
    adding = _ROUNDING**2 * rows.shape[1] * summed**2
    cut = (rows * np.sqrt(_fan_in(node, clipping, rows))).sum(axis=1) ** 2
    of_weights = np.maximum(steps**2 / 12 * moments.sum(axis=1), _as_learned(b, b.node_of(tensor), weights, steps, moments))
    found: Power = rounding * (rows**2).sum(axis=1) + cut + of_weights + adding
    return found


def _as_learned(b: Graph, node: onnx.NodeProto, weights: NDArray[np.float32], steps: Power, moments: Power) -> Power:
    """The noise that each output channel's own weights make where a quantizer may have moved them on purpose: few of them, each
    by a step or a small share of the largest, and not all together, as a wrong scale or zero point does. 0 for other channels.

    s^2 / 12 for each weight is no estimate there: a kernel's nine rows are no average, and see nearly the same input.
    """
    found = b.constants.get(node.input[1])
    if found is None or found.shape != weights.shape or not steps.any():
        return np.zeros(1)
    wanted = as_rows(node, weights).astype(np.float64)
    errors = as_rows(node, found) - wanted
    if wanted.shape[1] > _FEW:
        return np.zeros(1)
    allowed = np.maximum(steps, _MOVED * np.abs(wanted).max(axis=1)) * (1 + 1e-6)
    is_learned = (np.abs(errors) <= allowed[:, None]).all(axis=1)
    for direction in (wanted, np.ones_like(wanted)):
        along = (errors * direction).sum(axis=1) ** 2
        is_learned &= along <= _COHERENT * (errors**2).sum(axis=1) * (direction**2).sum(axis=1)
    return np.where(is_learned, (errors**2 * moments).sum(axis=1), 0)


def as_rows(node: onnx.NodeProto, weights: NDArray[Any]) -> NDArray[Any]:
    """A layer's weights as (output channels, inputs of each)."""
    if node.op_type == "Conv":
        return weights.reshape(len(weights), -1)
    transposed = node.op_type == "Gemm" and graphs.attributes(node).get("transB", 0)
    return weights if transposed else weights.reshape(-1, weights.shape[-1]).T


def _fan_in(node: onnx.NodeProto, moments: Power, rows: NDArray[Any]) -> Power:
    """The second moment of what each weight multiplies, (output channels or 1, inputs of each)."""
    groups = int(graphs.attributes(node).get("group", 1))
    channels = len(moments)
    taps = rows.shape[1] * groups // channels
    if taps * channels != rows.shape[1] * groups or len(rows) % groups:
        return np.full((1, 1), moments.mean())
    by_group = np.repeat(moments, taps).reshape(groups, -1)
    return np.repeat(by_group, len(rows) // groups, axis=0)


def fitted(power: Power, channels: int) -> Power:
    """A power for each of so many channels: the mean where it counts others."""
    return power if len(power) in (1, channels) else np.full(channels, power.mean())


def _rounding(b: Graph, quantizer: onnx.NodeProto, values: Seen) -> float:
    """s^2 / 12, with a step that neither is finer than the range that was seen allows, nor much coarser."""
    scale, low, high = representable(b, quantizer)
    needed = _span(values, low, high, scale) / round((high - low) / scale)
    return float(np.clip(scale, needed, needed * _COARSER) ** 2 / 12)


def _clipping(b: Graph, quantizer: onnx.NodeProto, values: Seen) -> Power:
    """What is cut off, unless more is cut off than a choice of ranges can be blamed for."""
    _, low, high = representable(b, quantizer)
    ends = (max(abs(end), _LEAST_END * (high - low)) for end in (low, high))
    is_far = any(beyond > _BEYOND * end for beyond, end in zip((low - values.low, values.high - high), ends, strict=True))
    if is_far and values.outside.get((low, high), 0) > _CUT * values.nonzero:
        return np.zeros(1)
    return values.clipped.get((low, high), np.zeros(1)) / max(1, values.count)


def _span(values: Seen, low: float, high: float, scale: float) -> float:
    """The range that was seen; of a quantizer that is symmetric, the symmetric one."""
    if abs(low + high) <= scale:
        return 2 * max(-values.low, values.high)
    return values.high - values.low


def representable(b: Graph, quantizer: onnx.NodeProto) -> tuple[float, float, float]:
    """The largest step of a QuantizeLinear, the smallest value that it can represent and the largest."""
    scale = float(b.constants[quantizer.input[1]].max())
    zero_point = b.constants[quantizer.input[2]] if len(quantizer.input) > 2 and quantizer.input[2] else None
    kind = np.iinfo(graphs.quantized_type(quantizer, zero_point))
    first = 0.0 if zero_point is None else float(zero_point.reshape(-1)[0])
    return scale, (kind.min - first) * scale, (kind.max - first) * scale


def _steps(b: Graph, node: onnx.NodeProto) -> Power:
    """The step of a layer's quantized weights for each output channel; 0 where they are float."""
    producer = b.producers.get(node.input[1])
    if producer is None or producer.op_type != graphs.DEQUANTIZE:
        return np.zeros(1)
    found: Power = b.constants[producer.input[1]].astype(np.float64).reshape(-1)
    return found


def _sources(b: Graph, tensor: str, anchors: Collection[str]) -> list[str]:
    return list(dict.fromkeys(name for node in b.cone(tensor, anchors) for name in node.input if name in anchors))


def _behind(b: Graph, tensor: str) -> set[str]:
    """Names of the Q/DQ between the operator and `tensor`."""
    found = set()
    node = b.producers[tensor]
    while node.op_type in graphs.TRANSPARENT and node.input[0] in b.producers:
        found.add(node.name)
        node = b.producers[node.input[0]]
    return found


def _gain(source: Seen, result: Power) -> float:
    """By how much an operator that is not linear may enlarge noise: as much as it enlarges its input, and at least not less."""
    before = float(source.moments.mean())
    return max(1.0, float(result.mean()) / before) if before > 0 else 1.0


def _error(actual: NDArray[np.float32] | None, wanted: NDArray[np.float32]) -> Power:
    if actual is None:
        return np.zeros(1)
    if actual.shape != wanted.shape:
        return np.full(1, np.inf)
    found = powers(actual - wanted)
    return np.where(np.isfinite(found), found, np.inf)
