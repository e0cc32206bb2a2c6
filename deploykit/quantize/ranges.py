"""From what was observed to a range, and from a range to scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploykit.quantize.histogram import Histogram

# An int32 bias is kept this far from overflow: 2**31 - 1 less a margin for the rounding of scales to float32.
_BIAS_LIMIT = 2.0**30
PERCENT = 99.99
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
    dtype: Literal["uint8", "int8"]


def affine_uint8(kept: Range) -> QuantParameters:
    """All 256 steps over the range; zero falls exactly on the zero point."""
    if kept.low == kept.high:
        return QuantParameters(1.0, 0, "uint8")  # the tensor is constantly zero: any scale represents it
    scale = float(max(np.float32((kept.high - kept.low) / 255), _SMALLEST_SCALE))
    return QuantParameters(scale, int(np.clip(np.rint(-kept.low / scale), 0, 255)), "uint8")


def symmetric_int8(kept: Range) -> QuantParameters:
    """Zero point 0 and scale = amax / 127, as NVIDIA's tools choose it; -128 stays unused by values in range."""
    amax = max(-kept.low, kept.high)
    if amax == 0:
        return QuantParameters(1.0, 0, "int8")
    return QuantParameters(float(max(np.float32(amax / 127), _SMALLEST_SCALE)), 0, "int8")


def weight_scales(
    weights: NDArray[np.float32], axis: int, *, bias: NDArray[np.float32] | None, input_scale: float
) -> NDArray[np.float32]:
    """One symmetric int8 scale for each output channel (shape [channels], float32, > 0).

    With `bias` given (int32, scale = input_scale * weight scale), a channel whose weights are so small that its bias
    would overflow gets the smallest scale at which it does not: those weights round to zero either way.
    """
    others = tuple(index for index in range(weights.ndim) if index != axis)
    scale = np.abs(weights).max(axis=others).astype(np.float64) / 127
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (input_scale * _BIAS_LIMIT))
    scale[scale == 0] = 1.0  # a dead channel: any scale represents its zeros, but a scale of 0 is refused by runtimes
    kept: NDArray[np.float32] = np.maximum(scale.astype(np.float32), _SMALLEST_SCALE)
    return kept


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
