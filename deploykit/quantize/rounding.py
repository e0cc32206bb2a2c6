"""Rounding that a layer's output notices least: weights are rounded together and not each to its nearest integer.

Rounding errors of single weights can cancel in the sum that a layer computes, and on which inputs they do is known from
calibration images. For every output channel, over inputs x of the float network and their quantized values q(x),

    E[(w q(x) - v q(x) - c)^2]    with v = scale * integers, c a constant

is made small by cyclic coordinate descent: each weight in turn goes to the integer that is best for the others as they are,
beginning at the nearest ones. A layer with few inputs has w x in place of w q(x), so that v also makes up for what q does.
The bias then takes what w x and v q(x) differ by on average. Every layer is judged alone, on the float network's inputs.

Sources: K. Behdin et al., "QuantEase: Optimization-based Quantization for Language Models" (2023), for the descent; M. Nagel,
M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV
2019), for the bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from deploykit.progress import Progress, silent
from deploykit.quantize import place
from deploykit.quantize.insert import activation_parameters, constant, largest_weight, quantized_weights
from deploykit.quantize.ranges import INTEGERS, QuantParameters, Range
from deploykit.runtimes import QdqRules, onnxruntime, padded

Floats = NDArray[np.float32]

# Inputs of a layer that are looked at. Four times as many, or 128 images and not 32, are worth 0.1 dB.
_ROWS = 2048
# A regression on D inputs takes a share D / n of pure chance for signal.
_ROWS_FOR_EACH_INPUT = 32
_PASSES = 2
_BLOCK = 96
_BATCH = 8
_BYTES_AT_ONCE = 256 << 20
# This share of the loss takes the inputs of a layer for independent of each other, since their correlations are known from
# few images; 0.1 and 0.3 do alike where rows are many, and 0.3 does better where they are few.
_INDEPENDENT = 0.3


@dataclass(frozen=True)
class Rounded:
    """A layer's weights, multiples of the scales that quantization gives them, and its corrected bias."""

    weights: Floats
    bias: Floats | None


NEAREST: Mapping[str, Rounded] = {}  # no layer has been rounded otherwise


def rounded(
    model: ir.Model,
    decided: place.Plan,
    ranges: Mapping[str, Range],
    rules: QdqRules,
    images: Floats,
    *,
    progress: Progress = silent,
) -> dict[str, Rounded]:
    """Weights and biases for every int8 layer of a plan on this float `model`, from `images` (n, C, H, W).

    The model is left as it is; `put` replaces what was found in a graph. Raises StageError when a range is missing.
    """
    parameters = activation_parameters(decided, ranges, rules)
    reads = {str(node.name): name for name, uses in decided.uses.items() for node, index in uses if index == 0}
    claimed = set(place.claimed(decided))
    layers = [
        _Layer(node, reads[str(node.name)], parameters[reads[str(node.name)]]) for node in model.graph if node.name in claimed
    ]
    found: dict[str, Rounded] = {}
    for some in _at_once(layers):
        rows = _rows(model, some, images)
        for layer in some:
            found[layer.name] = _round(layer, rows.pop(layer.name), rules)
            progress("round", len(found), len(layers))
    return found


def put(graph: ir.Graph, decided: place.Plan, found: Mapping[str, Rounded]) -> None:
    """Give the int8 layers of a plan the weights and biases that were found; layers in float keep their own."""
    layers = set(place.claimed(decided)) & set(found)
    for node in [node for node in graph if node.name in layers]:
        mine = found[str(node.name)]
        for index, (values, label) in enumerate(((mine.weights, "rounded"), (mine.bias, "corrected")), start=1):
            if values is None:
                continue
            before = node.inputs[index]
            assert before is not None
            node.replace_input_with(index, constant(graph, f"{node.name}/{label}", values))
            if before.name is not None and before.is_initializer() and not before.uses():
                del graph.initializers[before.name]


@dataclass(frozen=True)
class _Layer:
    """One layer and the quantized activation that it reads. Its weights as matrices have the shape (groups, outputs of each,
    inputs of each output); a Gemm or MatMul is one group."""

    node: ir.Node
    read: str
    parameters: QuantParameters

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def groups(self) -> int:
        return self.node.attributes.get_int("group", 1) or 1

    def weights(self) -> Floats:
        """As they stand in the graph."""
        weight = self.node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        return weight.const_value.numpy().astype(np.float32)

    def bias(self) -> Floats | None:
        """One number for each output channel; None when there is none."""
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        return None if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float32)

    def matrices(self, weights: NDArray[np.generic]) -> Floats:
        """Weights as they stand in the graph as (groups, outputs, inputs)."""
        outputs_first = weights if place.output_axis(self.node) == 0 else weights.T
        return outputs_first.reshape(self.groups, len(outputs_first) // self.groups, -1).astype(np.float32)

    def like_graph(self, matrices: Floats) -> Floats:
        """The inverse of `matrices`."""
        shape = self.weights().shape
        if place.output_axis(self.node) == 0:
            return matrices.reshape(shape)
        return np.ascontiguousarray(matrices.reshape(shape[::-1]).T)

    def quantized(self, values: Floats) -> Floats:
        """What is left of inputs after QuantizeLinear and DequantizeLinear."""
        smallest, largest = INTEGERS[self.parameters.dtype]
        scale, zero_point = np.float32(self.parameters.scale), self.parameters.zero_point
        integers = np.clip(np.rint(values / scale) + zero_point, smallest, largest)
        return np.asarray((integers - zero_point) * scale, np.float32)


def _round(layer: _Layer, rows: Floats, rules: QdqRules) -> Rounded:
    """`rows` (groups, n, inputs) are what the layer reads in the float network."""
    integers, scale, _ = quantized_weights(layer.node, rules, layer.parameters.scale)
    weights, nearest = layer.matrices(layer.weights()), layer.matrices(integers)
    steps = scale.reshape(layer.groups, -1)
    read, bias = layer.quantized(rows), layer.bias()
    # With few inputs the weights can also make up for what quantizing them changes; with many they would learn chance.
    can_learn = _ROWS_FOR_EACH_INPUT * weights.shape[2] <= rows.shape[1]
    wanted = (rows if can_learn else read) @ weights.transpose(0, 2, 1)
    answers = rows @ weights.transpose(0, 2, 1)
    mean_read, mean_answer = read.mean(axis=1, keepdims=True), answers.mean(axis=1, keepdims=True)
    if bias is not None:  # it takes the means, so that the weights need not
        read, wanted = read - mean_read, wanted - wanted.mean(axis=1, keepdims=True)
    best = descend(nearest, read, wanted, weights, steps, largest=largest_weight(layer.node, rules))
    values = best * steps[..., None]
    if bias is not None:
        bias = bias + (mean_answer - mean_read @ values.transpose(0, 2, 1)).reshape(bias.shape)
    return Rounded(layer.like_graph(values), bias)


def descend(integers: Floats, read: Floats, wanted: Floats, weights: Floats, steps: Floats, *, largest: int) -> Floats:
    """Integers (G, O, D) that bring `read` (G, n, D) times integers times `steps` (G, O) nearer to `wanted` (G, n, O).

    Begins at `integers`, the nearest to `weights`, and never ends with more squared error in any output. The largest weights
    of a channel stay, because its scale is told by them.
    """
    fixed = np.abs(integers) == largest
    now = integers * steps[..., None]
    missing = wanted - read @ now.transpose(0, 2, 1)
    before = (missing**2).sum(axis=1)
    for _ in range(_PASSES):
        for start in range(0, weights.shape[2], _BLOCK):
            part = slice(start, start + _BLOCK)
            after = _descend_block(now[..., part], fixed[..., part], read[..., part], missing, weights[..., part], steps, largest)
            missing -= read[..., part] @ (after - now[..., part]).transpose(0, 2, 1)
            now[..., part] = after
    better = ((wanted - read @ now.transpose(0, 2, 1)) ** 2).sum(axis=1) < before
    return np.where(better[..., None], np.rint(now / steps[..., None]), integers).astype(np.float32)


def _descend_block(
    now: Floats, fixed: NDArray[np.bool_], read: Floats, missing: Floats, weights: Floats, steps: Floats, largest: int
) -> Floats:
    """One pass over some of the inputs: their values (G, O, d) after it.

    With a share a of the errors taken as independent, the loss as a function of one value v, all others as they are, is a
    parabola with its minimum at v + (1 - a) (x . missing) / (x . x) - a (v - w); the integer next to it is the best one.
    """
    now = now.copy()
    products = read.transpose(0, 2, 1) @ read
    slopes = missing.transpose(0, 2, 1) @ read
    for index in range(now.shape[2]):
        power = products[:, index, index, None]
        moved = (1 - _INDEPENDENT) * np.divide(slopes[..., index], power, out=np.zeros_like(steps), where=power > 0)
        moved -= _INDEPENDENT * (now[..., index] - weights[..., index])
        target = np.clip(np.rint((now[..., index] + moved) / steps), -largest, largest) * steps
        change = np.where(fixed[..., index], 0, target - now[..., index]).astype(np.float32)
        now[..., index] += change
        slopes -= change[..., None] * products[:, None, index]
    return now


def _at_once(layers: Sequence[_Layer]) -> Iterator[list[_Layer]]:
    """Layers in graph order, as many at once as keep their inputs within the memory that is meant for them."""
    some: list[_Layer] = []
    held = 0
    for layer in layers:
        matrices = layer.matrices(layer.weights())
        size = 4 * _ROWS * matrices.shape[0] * matrices.shape[2]
        if some and held + size > _BYTES_AT_ONCE:
            yield some
            some, held = [], 0
        some.append(layer)
        held += size
    if some:
        yield some


def _rows(model: ir.Model, layers: Sequence[_Layer], images: Floats) -> dict[str, Floats]:
    """About `_ROWS` inputs of each layer in the float network, (groups, n, inputs), from places drawn in all images."""
    graph = ir.from_proto(ir.to_proto(model))
    source = graph.graph.inputs[0]
    fixed = source.shape[0] if source.shape is not None and isinstance(source.shape[0], int) else None
    names = {layer.read for layer in layers} - {source.name}
    inner = [value for node in graph.graph for value in node.outputs if value.name in names]
    if inner:  # else the network runs for nothing but its answers
        graph.graph.outputs.clear()
        graph.graph.outputs.extend(inner)
    session = onnxruntime.reference(ir.to_proto(graph).SerializeToString(), optimise=True, arena=False)
    draw, each = np.random.default_rng(0), math.ceil(_ROWS / len(images))
    found: dict[str, list[Floats]] = {layer.name: [] for layer in layers}
    at_once = fixed or images_at_once(inner)
    for start in range(0, len(images), at_once):
        batch = np.ascontiguousarray(images[start : start + at_once])
        session.feed({str(source.name): padded(batch, fixed)})
        session.execute()
        values = {str(source.name): batch, **session.views()}
        for layer in layers:
            read = values[layer.read]
            read = read[: len(batch)] if len(read) == fixed else read
            found[layer.name].append(_drawn(layer, read, each * len(batch), draw))
    session.close()
    return {name: np.concatenate(rows, axis=1) for name, rows in found.items()}


def images_at_once(activations: Sequence[ir.Value]) -> int:
    """How many images run together: no more than keep these activations within the memory that is meant for them."""
    size = sum(4 * math.prod(size for size in value.shape or () if isinstance(size, int)) for value in activations)
    return max(1, min(_BATCH, _BYTES_AT_ONCE // max(1, size)))


def _drawn(layer: _Layer, values: Floats, count: int, draw: np.random.Generator) -> Floats:
    """At most `count` inputs of one output each, (groups, n, inputs), from an activation as the layer reads it."""
    if layer.node.op_type != "Conv":
        rows = values.reshape(1, -1, values.shape[-1])
        return rows if rows.shape[1] <= count else rows[:, np.sort(draw.choice(rows.shape[1], count, replace=False))]
    windows = windows_of(layer.node, values)
    places = windows.shape[: values.ndim - 1]
    every = math.prod(places)
    chosen = np.arange(every) if every <= count else np.sort(draw.choice(every, count, replace=False))
    rows = windows[np.unravel_index(chosen, places)]
    return np.ascontiguousarray(rows.reshape(len(rows), layer.groups, -1).transpose(1, 0, 2))


def windows_of(node: ir.Node, values: Floats) -> Floats:
    """What each output of a convolution reads of its input (n, C, ...), as a view: (n, places..., C, kernel...)."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    attributes, kernel = node.attributes, weight.const_value.numpy().shape[2:]
    spatial = range(2, values.ndim)
    strides = attributes.get_ints("strides") or [1] * len(kernel)
    dilations = attributes.get_ints("dilations") or [1] * len(kernel)
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    before, after = _pads(node, values.shape[2:], spans, strides)
    wide = np.pad(values, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    windows = sliding_window_view(wide, spans, axis=tuple(spatial))
    steps = (*(slice(None, None, step) for step in strides), *(slice(None, None, step) for step in dilations))
    return np.moveaxis(windows[(slice(None), slice(None), *steps)], 1, values.ndim - 1)


def _pads(
    node: ir.Node, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[Sequence[int], Sequence[int]]:
    """Zeros before and after each axis, as ONNX's Conv defines pads and auto_pad."""
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (math.ceil(size / step) - 1) * step + span - size)
            for size, step, span in zip(sizes, strides, spans, strict=True)
        ]
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    pads = list(node.attributes.get_ints("pads") or [0] * 2 * len(sizes))
    return pads[: len(sizes)], pads[len(sizes) :]
