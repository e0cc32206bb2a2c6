"""A streaming histogram: constant memory in the number and size of what it sees.

Minimum and maximum are exact, and so are the tails of each batch. What lies between is sampled, because the full
histogram of ResNet-50's 17 million activations an image costs as much as its inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]

# After a Relu, a quarter to a half of them hold values, 8 to 16 for one of 255 steps. The squared error of a range chosen
# from them, against the best over all values, on 20 kinds of distributions: at most 0.06 % more with 8192, 0.14 % with
# 4096, 5.4 % with 2048 (the last where tails are long).
BINS = 8192
SAMPLE = 1 << 15
# Of every eighth sampled value, this many at either end mark the tails: 0.1 % of all values, each of which counts.
# They decide where a range that clips ends, and a sample of one in a hundred has too few of them.
_EVERY, _TAIL = 8, 4
# 4 MiB are read once from memory for minimum, maximum and tails. Smaller blocks are no faster, and threads then wait for
# each other between them (for the interpreter's lock): 2 threads took 0.86 of one's time with 256 KiB, 0.64 with this.
_BLOCK = 1 << 20
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Histogram:
    """Counts of `BINS` equal bins over [-limit, limit), where `limit` doubles whenever a value lies outside.

    A sampled value counts for all that it stands for. Doubling merges pairs of bins exactly, and what a batch adds
    depends on that batch alone, so the order of the batches does not matter. `zeros` says how many of the values in the
    bin that begins at zero are exactly zero; `drawn` how many values of each bin were looked at.
    """

    low: float = float("inf")
    high: float = float("-inf")
    limit: float = 0.0
    zeros: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    drawn: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: Values) -> None:
        """Take in a tensor of any shape. Raises ValueError when a value is NaN or infinite."""
        flat = values.reshape(-1)
        weight = -(-flat.size // SAMPLE)
        sample = flat if weight == 1 else flat[sample_of(flat.size)]
        low_cut, high_cut = (-np.inf, np.inf) if weight == 1 else _cuts(sample)
        low, high, tails = _one_pass(flat, low_cut, high_cut)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(-low, high))
        self._count(sample[(low_cut <= sample) & (sample <= high_cut)], weight)
        self._count(tails, 1)

    def _count(self, values: Values, weight: int) -> None:
        # The bin width is a power of two, so in float64 this division is exact; zeros lie in the middle at any limit.
        bins = np.floor(values.astype(np.float64) * (BINS / (2 * self.limit) if self.limit else 0.0)).astype(np.int64)
        drawn = np.bincount(bins + BINS // 2, minlength=BINS)
        self.drawn += drawn
        self.counts += weight * drawn
        self.zeros += weight * (values.size - int(np.count_nonzero(values)))

    def _grow(self, needed: float) -> None:
        if self.limit == 0 and needed > 0:
            # The next power of two above it, so that every histogram's bins nest in every other's.
            self.limit = 2.0 ** math.frexp(needed)[1]
        while needed >= self.limit > 0:
            self.counts, self.drawn = _merged(self.counts), _merged(self.drawn)
            self.limit *= 2


def sample_of(size: int) -> NDArray[np.intp]:
    """Ascending positions of at most `SAMPLE` values out of `size`: one in each stretch of ceil(size / SAMPLE).

    Where in its stretch a position lies follows the multiples of the golden ratio, which share no period with rows,
    columns or channels. A constant stride may: with 49, a (16, 2048, 7, 7) tensor gives one corner of every map.
    """
    stretch = -(-size // SAMPLE)
    index = np.arange(size // stretch)
    return index * stretch + (_golden()[: len(index)] * stretch).astype(np.intp)


def _merged(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same counts in bins of twice the width."""
    return np.pad(counts.reshape(-1, 2).sum(axis=1), BINS // 4)


@cache
def _golden() -> NDArray[np.float64]:
    """The fractional parts of the golden ratio's first `SAMPLE` multiples."""
    return np.asarray(np.arange(SAMPLE) * _GOLDEN % 1)


def _cuts(sample: Values) -> tuple[float, float]:
    """Where the tails begin: low and high."""
    some = sample[::_EVERY]
    placed = np.partition(some, (_TAIL, len(some) - 1 - _TAIL))
    return float(placed[_TAIL]), float(placed[-1 - _TAIL])


def _one_pass(flat: Values, low_cut: float, high_cut: float) -> tuple[float, float, Values]:
    """Minimum and maximum (NaN when there is one), and all values below `low_cut` or above `high_cut`."""
    lows, highs, tails = [], [], [flat[:0]]
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        low, high = block.min(), block.max()
        lows.append(low)
        highs.append(high)
        if low < low_cut:
            tails.append(block[np.flatnonzero(block < low_cut)])
        if high > high_cut:
            tails.append(block[np.flatnonzero(block > high_cut)])
    return float(np.min(lows)), float(np.max(highs)), np.concatenate(tails)
