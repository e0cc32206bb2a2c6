"""What about a layer differs from the reference, in words: its attributes, weights, bias, and the scales of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.bisect import graph as graphs
from deploykit.bisect import noise
from deploykit.bisect.graph import Graph
from deploykit.bisect.noise import Seen

# What ONNX takes for an attribute of a Conv or pool that is not written down; lists as long as the kernel.
_DEFAULTS = {"group": 1, "strides": 1, "dilations": 1, "pads": 0, "auto_pad": "NOTSET", "ceil_mode": 0, "transB": 0}
_INPUTS = {1: "weights", 2: "bias"}
_CLIPPED, _FINER = 0.8, 8.0
_SAME = 0.025  # of the weights' size: more than INT8 moves them, less than what shows
_COLOURS = 3
_TURNED = 4.0  # times nearer: INT8 moves weights by some hundredths of their size, another order by more than that size


def hints(a: Graph, b: Graph, tensor: str, anchors: Collection[str], seen: Mapping[str, Seen]) -> tuple[str, ...]:
    """What was found to be different, the plainest first; empty when only the values tell."""
    return (
        *_operators(a, b, tensor, anchors),
        *_attributes(a.node_of(tensor), b.node_of(tensor)),
        *_undone(b, tensor, anchors),
        *_constants(a, b, tensor),
        *_scales(b, tensor, anchors, seen),
    )


def _operators(a: Graph, b: Graph, tensor: str, anchors: Collection[str]) -> Iterator[str]:
    """Operators that one of them has between the tensors that both have, and the other has not."""
    mine, theirs = (
        {node.name: node.op_type for node in one.cone(tensor, anchors) if node.op_type not in graphs.TRANSPARENT}
        for one in (a, b)
    )
    yield from (f"{op} {name} is missing" for name, op in mine.items() if name not in theirs)
    yield from (f"{op} {name} is not in the reference" for name, op in theirs.items() if name not in mine)
    yield from (f"{name} is {op}, not {mine[name]}" for name, op in theirs.items() if mine.get(name, op) != op)


def _attributes(mine: onnx.NodeProto, theirs: onnx.NodeProto) -> Iterator[str]:
    if mine.op_type != theirs.op_type:
        return
    wanted, found = graphs.attributes(mine), graphs.attributes(theirs)
    for name in sorted({*wanted, *found}):
        one, other = (_with_default(name, values.get(name), wanted.get(name, found.get(name))) for values in (wanted, found))
        if one != other:
            yield f"{name} is {other}, not {one}"


def _with_default(name: str, value: Any, like: Any) -> Any:
    if value is not None or name not in _DEFAULTS:
        return value
    return [_DEFAULTS[name]] * len(like) if isinstance(like, list) else _DEFAULTS[name]


def _constants(a: Graph, b: Graph, tensor: str) -> Iterator[str]:
    """What was done to the weights or the bias, as far as a simple rule tells."""
    node, other = a.node_of(tensor), b.node_of(tensor)
    for index, name in enumerate(node.input):
        wanted, found = a.constants.get(name), b.constants.get(other.input[index]) if index < len(other.input) else None
        if wanted is None or not np.issubdtype(wanted.dtype, np.floating):
            continue
        label = _INPUTS.get(index, f"input {index}")
        if found is None:
            yield f"there is no {label}"
        elif found.shape != wanted.shape:
            yield f"the {label} have shape {list(found.shape)}, not {list(wanted.shape)}"
        elif wanted.ndim > 1 and node.op_type in ("Conv", "Gemm", "MatMul"):
            yield from _weights(node, other, wanted, found)
        elif wanted.size and _apart(found, wanted) > _SAME:
            yield f"the {label} is another: {_apart(found, wanted):.0%} apart"


def _weights(node: onnx.NodeProto, other: onnx.NodeProto, wanted: NDArray[Any], found: NDArray[Any]) -> Iterator[str]:
    order = _colours(wanted, found) if node.op_type == "Conv" else None
    if order is not None:
        swapped = ": RGB and BGR were swapped" * (order == (2, 1, 0))
        yield f"its input channels are in the order {', '.join(map(str, order))}{swapped}"
        return
    if node.op_type == "Conv" and wanted.ndim == 4 and _are_turned(wanted, found):
        yield "height and width of its kernels are swapped"
        return
    rows, theirs = noise.as_rows(node, wanted).astype(np.float64), noise.as_rows(other, found).astype(np.float64)
    power = (rows**2).sum(axis=1)
    bad = np.flatnonzero(((theirs - rows) ** 2).sum(axis=1) > _SAME**2 * power)
    if not len(bad):
        return
    factors = (rows * theirs).sum(axis=1)[bad] / np.where(power[bad] > 0, power[bad], 1)
    where = f"output channel {bad[0]}" if len(bad) == 1 else f"{len(bad)} of {len(rows)} output channels"
    left = ((theirs[bad] - factors[:, None] * rows[bad]) ** 2).sum(axis=1) <= _SAME**2 * (theirs[bad] ** 2).sum(axis=1)
    if left.all() and np.ptp(factors) <= _SAME * np.abs(factors).max():
        yield f"the weights of {where} are {factors.mean():.3g} times the reference's"
    elif left.all():
        yield f"the weights of {where} are the reference's times {factors.min():.3g} to {factors.max():.3g}"
        if _are_powers_of_two(factors):
            yield "so they are after equalization: let A be the equalized graph, which a run keeps in the folder equalize"
    else:
        worst = np.unravel_index(int(np.abs(theirs - rows).argmax()), rows.shape)
        values = f"{theirs[worst]:.3g} instead of {rows[worst]:.3g}"
        yield f"the weights of {where} are others; furthest apart is {values}, in output channel {worst[0]}"


def _are_turned(wanted: NDArray[Any], found: NDArray[Any]) -> bool:
    """Whether kernels are far nearer to the reference's transposed ones, as a converter leaves them that takes HWIO for OIHW."""
    if wanted.shape[2] != wanted.shape[3]:
        return False
    return _apart(found, wanted) > max(_SAME, _TURNED * _apart(found, wanted.transpose(0, 1, 3, 2)))


def _are_powers_of_two(factors: NDArray[np.float64]) -> bool:
    if (factors <= 0).any():
        return False
    exponents = np.log2(factors)
    return bool((np.abs(exponents - np.rint(exponents)) < _SAME).all())


def _colours(wanted: NDArray[Any], found: NDArray[Any]) -> tuple[int, ...] | None:
    """The order in which a first layer's three input channels were put, None when that is not what happened."""
    if wanted.ndim != 4 or wanted.shape[1] != _COLOURS or _apart(found, wanted) <= _SAME:
        return None
    orders = (order for order in permutations(range(_COLOURS)) if _apart(found, wanted[:, list(order)]) <= _SAME)
    return next(orders, None)


def _scales(b: Graph, tensor: str, anchors: Collection[str], seen: Mapping[str, Seen]) -> Iterator[str]:
    """Quantizers whose range does not fit what was seen."""
    for quantizer, source in graphs.quantizers(b, tensor, anchors):
        scale, low, high = noise.representable(b, quantizer)
        if source in seen:
            values = seen[source]
            told = f"{source} is quantized from {low:.3g} to {high:.3g} and holds {values.low:.3g} to {values.high:.3g}"
            if values.high * _CLIPPED > high + scale or values.low * _CLIPPED < low - scale:
                yield f"{told}: clipped"
            elif (high - low) > _FINER * (values.high - values.low):
                yield f"{told}: too coarse"


def _undone(b: Graph, tensor: str, anchors: Collection[str]) -> Iterator[str]:
    """Quantizers that their DequantizeLinear undoes otherwise."""
    for quantizer, _ in graphs.quantizers(b, tensor, anchors):
        for reader in b.proto.graph.node:
            if reader.op_type == graphs.DEQUANTIZE and reader.input[0] == quantizer.output[0]:
                pairs = zip(reader.input[1:], quantizer.input[1:], strict=False)
                if any(not np.array_equal(b.constants[one], b.constants[other]) for one, other in pairs):
                    yield f"{reader.name} has not the scale and zero point of {quantizer.name}"


def _apart(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The distance of two arrays of one shape as a share of the second one's length."""
    length = float(np.linalg.norm(wanted.astype(np.float64)))
    distance = float(np.linalg.norm(found.astype(np.float64) - wanted))
    return distance / length if length else float(distance > 0)
