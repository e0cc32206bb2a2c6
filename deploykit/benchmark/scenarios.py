"""MLPerf Inference's scenarios over a `Session`: single-stream and multi-stream latency, offline throughput.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TypeAlias

from deploykit.artifact import Tensors
from deploykit.errors import UsageError
from deploykit.runtimes import Session

Clock: TypeAlias = Callable[[], int]


@dataclass(frozen=True)
class Queries:
    """Nanoseconds of each query: `compute` is execute alone, `end_to_end` is feed, execute and fetch."""

    compute_ns: tuple[int, ...]
    end_to_end_ns: tuple[int, ...]


def single_stream(session: Session, inputs: Sequence[Tensors], *, queries: int, clock: Clock = perf_counter_ns) -> Queries:
    """Time queries one after the other; the next one starts when the last one ended, and what lies between is not counted.

    One sample a query is MLPerf's SingleStream; a batch a query is its MultiStream. `compute` leaves out the copies
    between host and device (trtexec's GPU compute time), `end_to_end` holds them (trtexec's latency).

    Raises UsageError when `inputs` is empty or `queries` < 1.
    """
    if not inputs or queries < 1:
        raise UsageError(f"nothing to measure: {len(inputs)} samples, {queries} queries")
    compute, end_to_end = [], []
    for query in range(queries):
        sample = inputs[query % len(inputs)]
        fed = clock()
        session.feed(sample)
        start = clock()
        session.execute()
        end = clock()
        session.fetch()
        fetched = clock()
        compute.append(end - start)
        end_to_end.append(fetched - fed)
    return Queries(tuple(compute), tuple(end_to_end))


def offline(session: Session, batch: Tensors, *, seconds: float, clock: Clock = perf_counter_ns) -> float:
    """Samples per second when all are there at once (MLPerf Offline): the same batch again until `seconds` are over."""
    size = len(next(iter(batch.values())))
    session.feed(batch)
    session.execute()
    done, start = 0, clock()
    while (elapsed := clock() - start) < seconds * 1e9 or done == 0:
        session.execute()
        done += size
    return done / (elapsed / 1e9)


class NullSession:
    """A session that does nothing, so that what its queries take is the harness's own cost."""

    def feed(self, inputs: Tensors) -> None:
        """Nothing."""

    def execute(self) -> None:
        """Nothing."""

    def fetch(self) -> Tensors:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing."""
