"""What may be said from the medians of fresh processes: intervals, ratios, a measured noise floor, percentiles.

The unit of replication is the process. Two sessions in one process disturb each other, and an interval from runs
inside one process calls an engine different from itself nearly always; over processes it does so as often as it says.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, lgamma, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

STATED = (90, 95, 99)  # the percentiles of latency that reports state
FEWEST_PROCESSES = 5  # below it a bootstrap has too few distinct resamples for a 95 % interval
_RESAMPLES = 10_000
_SPLITS = 2_000
# MLPerf Inference states a percentile at a confidence of 99 % (loadgen/early_stopping.cc).
_CONFIDENCE = 0.99
# One-sided 90 % normal quantile over the two-sided 95 % one, plus one: from a half-width to a difference found 9 times in 10.
_POWER_90 = 1 + 1.2816 / 1.9600


@dataclass(frozen=True)
class Difference:
    """How one engine's latency compares with a baseline's, measured in the same shuffle.

    `ratio` is median over median, `interval` its 95 % bootstrap interval over processes. `floor` is the ratio minus one
    that the baseline shows against itself (95 %), from twice as many of its processes; it belongs to every claim.
    """

    ratio: float
    interval: Interval
    floor: float
    processes: int

    @property
    def honest_interval(self) -> Interval:
        """The interval, widened where it is narrower than the noise floor: the baseline against itself moves that much."""
        low, high = self.interval
        return min(low, self.ratio / (1 + self.floor)), max(high, self.ratio * (1 + self.floor))

    @property
    def is_different(self) -> bool:
        """Whether a difference can be told from none."""
        low, high = self.honest_interval
        return not low <= 1 <= high

    @property
    def smallest_visible(self) -> float:
        """The smallest ratio minus one that this many processes would tell from none nine times in ten."""
        low, high = self.honest_interval
        if low <= 0:  # the noise floor is not known
            return inf
        half = log(high / low) / 2
        return exp(_POWER_90 * half) - 1


def median_interval(medians: Sequence[float], seed: int) -> Interval:
    """95 % bootstrap interval of the median over processes."""
    return _interval(_resampled(np.asarray(medians, float), np.random.default_rng(seed)))


def difference(medians: Sequence[float], baseline: Sequence[float], floor: float, seed: int) -> Difference:
    """Compare the process medians of one engine with a baseline's, knowing the noise floor of the run."""
    generator = np.random.default_rng(seed)
    mine, theirs = np.asarray(medians, float), np.asarray(baseline, float)
    ratios = _resampled(mine, generator) / _resampled(theirs, generator)
    return Difference(float(np.median(mine) / np.median(theirs)), _interval(ratios), floor, len(mine))


def noise_floor(first: Sequence[float], again: Sequence[float], seed: int) -> float:
    """How far two groups of processes of one engine are apart, as ratio minus one, in 95 % of all ways to split them.

    Infinite when the engine was not measured again: what is not known cannot be smaller than a difference.
    """
    if not len(again):
        return inf
    both = np.asarray([*first, *again], float)
    splits = np.random.default_rng(seed).permuted(np.tile(both, (_SPLITS, 1)), axis=1)
    apart = np.log(np.median(splits[:, : len(first)], axis=1) / np.median(splits[:, len(first) :], axis=1))
    return float(np.expm1(np.percentile(np.abs(apart), 95)))


def percentile_bound(queries: Sequence[float], percentile: float) -> float | None:
    """An upper bound (99 % confidence) of a latency percentile, or None when the queries are too few to state it.

    MLPerf's early stopping: with t the most queries that may lie above the percentile by chance, the t - 1 slowest are
    discarded and the slowest of the rest is the bound. p90 takes 64 queries, p95 130, p99 662.
    """
    allowed = _allowed_above(len(queries), 1 - percentile / 100)
    return None if allowed < 1 else float(np.partition(np.asarray(queries, float), len(queries) - allowed)[-allowed])


def percentile_over(processes: Sequence[Sequence[float]], percentile: float) -> tuple[float | None, bool]:
    """An upper bound of a latency percentile from the queries of several processes, and whether they had to be pooled for it.

    Queries of one process resemble each other more than those of two, so that pooled ones are no independent sample: a bound
    from all of them holds at its 99 % for the queries measured, and not for a further process. Where each process has enough
    queries for a bound of its own, the largest of these is stated instead.
    """
    each = [percentile_bound(queries, percentile) for queries in processes]
    own = [bound for bound in each if bound is not None]
    if own and len(own) == len(each):
        return max(own), False
    bound = percentile_bound([query for queries in processes for query in queries], percentile)
    return bound, bound is not None


def percentiles(processes: Sequence[Sequence[float]]) -> dict[str, Any]:
    """`percentile_over` of the percentiles that reports state, as JSON values: the bounds, and the names of pooled ones."""
    found = {f"p{percent}": percentile_over(processes, percent) for percent in STATED}
    return {
        "percentiles_ns": {name: bound for name, (bound, _) in found.items()},
        "percentiles_pooled": [name for name, (_, is_pooled) in found.items() if is_pooled],
    }


def _allowed_above(count: int, share: float) -> int:
    """The largest t with P(at most t of `count` queries lie above the percentile) <= 1 - confidence; -1 for none."""
    most = min(count, ceil(count * share))
    if count < 1:
        return -1
    t = np.arange(most + 1)
    log_choose = np.array([lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) for k in t.tolist()])
    log_tail = np.logaddexp.accumulate(log_choose + t * log(share) + (count - t) * log(1 - share))
    return int(np.searchsorted(log_tail, log(1 - _CONFIDENCE), side="right")) - 1


def _resampled(medians: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    picks = generator.integers(0, len(medians), (_RESAMPLES, len(medians)))
    found: NDArray[np.float64] = np.median(medians[picks], axis=1)
    return found


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
