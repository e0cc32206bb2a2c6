"""A streaming histogram: constant memory in the number and size of what it sees.

Minimum and maximum are exact. The counts come from an evenly strided sample of each batch, because the full histogram
of ResNet-50's 17 million activations an image costs as much as its inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BINS = 2048
SAMPLE = 1 << 15


@dataclass
class Histogram:
    """Counts of `BINS` equal bins over [-limit, limit), where `limit` doubles whenever a value lies outside.

    Doubling merges pairs of bins exactly, so the counts do not depend on the order of the batches.
    """

    low: float = float("inf")
    high: float = float("-inf")
    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Take in a tensor of any shape. Raises ValueError when a value is NaN or infinite."""
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(-low, high))
        flat = values.reshape(-1)
        # An odd stride visits every column of the usual even-sized feature maps in turn.
        sample = flat[:: (flat.size // SAMPLE) | 1] if flat.size > SAMPLE else flat
        # The bin width is a power of two, so in float64 this division is exact; zeros lie in the middle at any limit.
        bins = np.floor(sample.astype(np.float64) * (BINS / (2 * self.limit) if self.limit else 0.0)).astype(np.int64)
        self.counts += np.bincount(bins + BINS // 2, minlength=BINS)

    def _grow(self, needed: float) -> None:
        if self.limit == 0 and needed > 0:
            # The next power of two above it, so that every histogram's bins nest in every other's.
            self.limit = 2.0 ** math.frexp(needed)[1]
        while needed >= self.limit > 0:
            quarter = BINS // 4
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([np.zeros(quarter, np.int64), merged, np.zeros(quarter, np.int64)])
            self.limit *= 2
