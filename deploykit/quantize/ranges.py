"""From what was observed to a range, and from a range to scale and zero point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploykit.quantize.histogram import Histogram

# An int32 bias is kept this far from overflow: 2**31 - 1 less a margin for the rounding of scales to float32.
_BIAS_LIMIT = 2.0**30
PERCENT = 99.99
Integers = Literal["uint8", "int8"]
# The integers of each type that rounding may give.
INTEGERS: Mapping[Integers, tuple[int, int]] = {"uint8": (0, 255), "int8": (-128, 127)}
_SMALLEST_SCALE = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Range:
    """The values of a tensor that quantization keeps: low <= 0 <= high, because zero must be exact (padding, Relu)."""

    low: float
    high: float

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """The smallest range that holds `low`, `high` and zero. Raises ValueError when either is not finite."""
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"range {low} to {high} is not finite")
        return cls(min(float(low), 0.0), max(float(high), 0.0))

    def union(self, other: Range) -> Range:
        """The smallest range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class QuantParameters:
    """real = scale * (integer - zero_point), integers of `dtype`, one scale for the whole tensor."""

    scale: float
    zero_point: int
    dtype: Integers


def affine_uint8(kept: Range) -> QuantParameters:
    """All 256 steps over the range; zero falls exactly on the zero point."""
    return _parameters("uint8", kept)


def affine_int8(kept: Range) -> QuantParameters:
    """The values of `affine_uint8`, their integers counted from -128."""
    found = affine_uint8(kept)
    return QuantParameters(found.scale, found.zero_point - 128, "int8")


def symmetric_int8(kept: Range) -> QuantParameters:
    """Zero point 0 and scale = amax / 127, as NVIDIA's tools choose it; -128 stays unused by values in range."""
    return _parameters("int8", kept)


def steps(
    integers: Integers, low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scale (float32 values, > 0) and zero point of many ranges at once, low <= 0 <= high: shapes (C,) -> (C,).

    A tensor that is constantly zero gets scale 1: any scale represents it.
    """
    width = (high - low) / 255 if integers == "uint8" else np.maximum(-low, high) / 127
    scale = np.maximum(width.astype(np.float32), _SMALLEST_SCALE).astype(np.float64)
    scale[low == high] = 1.0
    if integers == "int8":
        return scale, np.zeros(scale.shape, np.int64)
    return scale, np.clip(np.rint(-low / scale), 0, 255).astype(np.int64)


def _parameters(integers: Integers, kept: Range) -> QuantParameters:
    scale, zero_point = steps(integers, np.array([kept.low]), np.array([kept.high]))
    return QuantParameters(float(scale[0]), int(zero_point[0]), integers)


def weight_scales(
    weights: NDArray[np.float32], axis: int, *, bias: NDArray[np.float32] | None, input_scale: float, bits: int = 8
) -> NDArray[np.float32]:
    """One symmetric scale for each output channel (shape [channels], float32, > 0): its largest weight is 127 steps, or 63
    with `bits` 7.

    With `bias` given (int32, scale = input_scale * weight scale), a channel whose weights are so small that its bias
    would overflow gets the smallest scale at which it does not: those weights round to zero either way.
    """
    others = tuple(index for index in range(weights.ndim) if index != axis)
    scale = np.abs(weights).max(axis=others).astype(np.float64) / largest_integer(bits)
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (input_scale * _BIAS_LIMIT))
    scale[scale == 0] = 1.0  # a dead channel: any scale represents its zeros, but a scale of 0 is refused by runtimes
    kept: NDArray[np.float32] = np.maximum(scale.astype(np.float32), _SMALLEST_SCALE)
    return kept


def largest_integer(bits: int) -> int:
    """What a symmetric integer of `bits` bits goes up to, and down to with the other sign."""
    return (1 << (bits - 1)) - 1


def minmax(seen: Histogram) -> Range:
    """Everything that was seen, exactly."""
    return Range.of(seen.low, seen.high)


def percentile(seen: Histogram, percent: float) -> Range:
    """The values that remain when (100 - percent) / 2 percent of the observed ones are cut off at each end.

    A cut lands on the outer edge of its bin, and never outside the exact minimum and maximum.
    """
    total = seen.counts.sum()
    if total == 0:
        return minmax(seen)
    share = np.cumsum(seen.counts) / total
    tail = (100 - percent) / 200
    first, last = int(np.searchsorted(share, tail, side="right")), int(np.searchsorted(share, 1 - tail, side="left"))
    width = 2 * seen.limit / len(seen.counts)
    low, high = -seen.limit + first * width, -seen.limit + (last + 1) * width
    return Range.of(max(low, seen.low), min(high, seen.high))
