"""Ranges that lose least, searched over a histogram: least squared error, and least divergence (entropy).

Both judge a range by the integers it leads to, with the very scale, zero point and clipping that the file will have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deploykit.quantize.histogram import Histogram
from deploykit.quantize.ranges import INTEGERS, Integers, Range, minmax, steps

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
# What a set of candidate ranges loses: (lows, highs), each of shape (C,), to losses of shape (C,).
Loss = Callable[[Floats, Floats], Floats]

# From a million values, entropy leaves out less than this whatever the distribution; see the test.
MOST_OUTSIDE = 0.01
# On 20 kinds of distributions the squared error is then within 0.1 % of the least one, found over all values.
_COARSE, _FINE, _ROUNDS = 24, 12, 2


def mse(seen: Histogram, integers: Integers) -> Range:
    """The range with the least expected squared error of `integers` over what was observed.

    Within a bin values count as evenly spread, exact zeros as zeros. Both ends are searched, from the width of one bin to
    the exact minimum and maximum.
    """
    density = Density.of(seen)
    if density is None:
        return minmax(seen)
    return _search(seen, partial(squared_error, density, integers), integers, least=density.width)


def entropy(seen: Histogram, integers: Integers) -> Range:
    """The range whose quantized distribution diverges least (Kullback-Leibler) from the observed one.

    S. Migacz, "8-bit Inference with TensorRT" (GTC 2017): P is the distribution over the bins inside the range, with the
    mass outside piled onto the outermost occupied ones; Q gives every occupied bin the mean of those that become the
    same integer, and knows nothing of the mass outside. Here the integers are those of the real scale and zero point: a
    bin belongs to the integer that its centre rounds to. So an affine range, whose ends are searched in turn, and bins
    that are no multiple of the levels need no rule of their own. `divergence` states the departures.
    """
    density = Density.of(seen)
    if density is None:
        return minmax(seen)
    return _search(seen, partial(divergence, density, integers), integers, least=density.width)


@dataclass(frozen=True)
class Density:
    """A histogram between its exact minimum and maximum, without exact zeros, which every range represents exactly.

    `edges` has shape (n + 1,), strictly ascending; `counts` (n,). The rows of `moments` (2, n + 1) are the count and the
    sum of the values up to each edge, and `squares` is the sum of all squares. Whole bins have one `width`, and the
    first of them would begin at `origin`. `weights` (n,) says how many values one that was looked at stands for.
    """

    edges: Floats
    counts: Floats
    moments: Floats
    squares: float
    width: float
    origin: float
    weights: Floats

    @classmethod
    def of(cls, seen: Histogram) -> Density | None:
        """The bins of the minimum to that of the maximum, those two narrowed; None when no value but zero was counted."""
        if seen.counts.sum() == seen.zeros:
            return None
        middle, width = len(seen.counts) // 2, 2 * seen.limit / len(seen.counts)
        counts = seen.counts.astype(np.float64)
        counts[middle] -= seen.zeros
        first, last = middle + int(np.floor(seen.low / width)), middle + int(np.floor(seen.high / width))
        edges = np.clip((np.arange(first, last + 2) - middle) * width, seen.low, seen.high)
        # A maximum on the edge of its bin, as Relu6 makes it, would leave a mass without a width.
        edges[-2] = min(edges[-2], edges[-1] - width * 2.0**-20)
        counts, drawn = counts[first : last + 1], seen.drawn[first : last + 1]
        weights = seen.counts[first : last + 1] / np.maximum(drawn, 1)
        left, right = edges[:-1], edges[1:]
        squares = float((counts * (left * left + left * right + right * right) / 3).sum())
        moments = np.zeros((2, len(edges)))
        np.cumsum([counts, counts * (left + right) / 2], axis=1, out=moments[:, 1:])
        return cls(edges, counts, moments, squares, width, (first - middle) * width, weights)

    def up_to(self, values: Floats) -> Floats:
        """Count and sum of what lies below each of `values`: shape (2, *values.shape)."""
        inside = np.clip(values, self.edges[0], self.edges[-1])
        index = self.bin_of(inside).clip(0, len(self.counts) - 1)
        left, widths = self.edges[:-1], np.diff(self.edges)
        part = np.clip(inside - left[index], 0, widths[index])
        mass = part * (self.counts / widths)[index]
        return np.asarray(self.moments[:, index] + np.stack([mass, mass * (left[index] + part / 2)]))

    def bin_of(self, values: Floats) -> Indices:
        """The index of the bin that holds each of `values`; beyond both ends it goes on counting."""
        return np.floor((values - self.origin) / self.width).astype(np.intp)


def squared_error(density: Density, integers: Integers, low: Floats, high: Floats) -> Floats:
    """The sum of squared errors over all observed values, for each candidate range: shapes (C,) -> (C,).

    The sum of (x - q)**2 is that of x**2, less 2q times the sum and plus q**2 times the count of what rounds to each q.
    """
    levels, boundaries = _levels(integers, low, high)
    nothing = np.zeros((2, len(low), 1))
    everything = nothing + density.moments[:, None, -1:]
    count, total = np.diff(density.up_to(boundaries), axis=2, prepend=nothing, append=everything)
    error = density.squares + (levels * (levels * count - 2 * total)).sum(axis=1)
    return np.asarray(np.maximum(error, 0))  # rounding may leave a little less


def divergence(density: Density, integers: Integers, low: Floats, high: Floats) -> Floats:
    """Kullback-Leibler divergence in nats between the observed distribution and its quantized one: (C,) -> (C,).

    Three departures from Migacz's definition, which else chooses absurdly small ranges from few values. Exact zeros do
    not count: a Relu makes half of all values zero, every range represents them exactly, and their bin would decide
    alone. What sampling makes by itself is subtracted: bins of one and the same true density differ by chance, and
    averaging B occupied bins into L integers diverges by (B - L) / 2n on average (half a chi-squared with B - L degrees
    of freedom), which with few values n grows with the range faster than anything that quantization does. (A value that
    stands for w others counts w times there.) And a range that leaves out more than `MOST_OUTSIDE` is infinitely bad:
    with everything piled onto one bin, P and Q are equal.
    """
    occupied = density.counts > 0
    first, last, edges = _bins_of_levels(density, integers, low, high)
    counts, spread, weights, entropies = (
        np.concatenate([[0.0], np.cumsum(row)])
        for row in (density.counts, occupied, density.weights * occupied, _x_log_x(density.counts))
    )
    mass, bins = np.diff(counts[edges], axis=1), np.maximum(np.diff(spread[edges], axis=1), 1)
    log_mean = np.log(np.where(mass > 0, mass / bins, 1))
    loss = entropies[last] - entropies[first] - (mass * log_mean).sum(axis=1)
    filled, rows = np.flatnonzero(occupied), np.arange(len(mass))
    lowest = filled[np.searchsorted(filled, first).clip(0, len(filled) - 1)]
    highest = filled[(np.searchsorted(filled, last) - 1).clip(0)]
    lowest_level, highest_level = np.argmax(mass > 0, axis=1), mass.shape[1] - 1 - np.argmax(mass[:, ::-1] > 0, axis=1)
    below, above, total = counts[first], counts[-1] - counts[last], counts[-1]
    for end, level, outside in ((lowest, lowest_level, below), (highest, highest_level, above)):
        own = density.counts[end]
        loss += _x_log_x(own + outside) - _x_log_x(own) - outside * log_mean[rows, level]
    noise = (np.diff(weights[edges], axis=1) * (1 - 1 / bins)).sum(axis=1) / 2
    kept = total - below - above
    usable = total - kept <= MOST_OUTSIDE * total
    return np.where(usable, (loss - noise) / total + np.log(np.where(usable, kept, total) / total), np.inf)


def _bins_of_levels(density: Density, integers: Integers, low: Floats, high: Floats) -> tuple[Indices, Indices, Indices]:
    """Of candidates (C,): the first bin whose centre is inside, the one after the last, and where each level's bins begin
    and end between the two (C, 257)."""
    centres = (density.edges[:-1] + density.edges[1:]) / 2
    first, last = np.searchsorted(centres, low), np.searchsorted(centres, high)
    _, boundaries = _levels(integers, low, high)
    inner = np.clip(density.bin_of(boundaries - density.width / 2) + 1, first[:, None], last[:, None])
    return first, last, np.concatenate([first[:, None], inner, last[:, None]], axis=1)


def _levels(integers: Integers, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """The values that candidates (C,) represent, (C, 256), and the boundaries between them, (C, 255)."""
    smallest, largest = INTEGERS[integers]
    scale, zero_point = steps(integers, low, high)
    levels = (np.arange(smallest, largest + 1) - zero_point[:, None]) * scale[:, None]
    return levels, levels[:, 1:] - scale[:, None] / 2


def _x_log_x(values: Floats) -> Floats:
    return np.asarray(values * np.log(np.where(values > 0, values, 1)))


def _search(seen: Histogram, loss: Loss, integers: Integers, *, least: float) -> Range:
    """Coordinate descent from the exact minimum and maximum; an end never comes nearer to zero than `least`."""
    whole = minmax(seen)
    if integers == "int8":
        amax = max(-whole.low, whole.high)
        best = _best_end(lambda ends: loss(-ends, ends), least, amax, amax)
        return Range(max(whole.low, -best), min(whole.high, best))
    low, high = whole.low, whole.high
    for _ in range(_ROUNDS):
        high = _best_end(partial(_loss_of_high, loss, low), least, whole.high, high)
        low = 0.0 - _best_end(partial(_loss_of_low, loss, high), least, -whole.low, -low)
    return Range.of(low, high)


def _loss_of_high(loss: Loss, low: float, ends: Floats) -> Floats:
    return loss(np.full_like(ends, low), ends)


def _loss_of_low(loss: Loss, high: float, ends: Floats) -> Floats:
    return loss(-ends, np.full_like(ends, high))


def _best_end(loss: Callable[[Floats], Floats], least: float, most: float, now: float) -> float:
    """The best of a geometric grid from `least` to `most` and of `now`, then of two finer grids around the best.

    Of ends that are equally good, the largest: nothing speaks for leaving values out.
    """
    if most == 0:
        return 0.0
    grid = np.geomspace(min(least, most), most, _COARSE)
    ends = np.unique(np.append(np.minimum(grid, most), [now, most]))
    for _ in range(2):
        best = _last_least(loss(ends))
        around = np.linspace(ends[max(best - 1, 0)], ends[min(best + 1, len(ends) - 1)], _FINE)
        ends = np.unique(np.append(around, ends[best]))
    return float(ends[_last_least(loss(ends))])


def _last_least(losses: Floats) -> int:
    return len(losses) - 1 - int(np.argmin(losses[::-1]))
