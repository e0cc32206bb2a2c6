"""MLPerf Inference's scenarios over a `Session`: single-stream, multi-stream and server latency, offline throughput.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from random import Random
from time import perf_counter_ns
from typing import Literal, TypeAlias

from deploykit.artifact import Tensors
from deploykit.benchmark.statistics import percentile_bound
from deploykit.errors import UsageError
from deploykit.runtimes import Session

Clock: TypeAlias = Callable[[], int]
Sleep: TypeAlias = Callable[[float], None]

# A sleep ends up to a tenth of a millisecond late, so the rest of a wait is spent looking at the clock.
_AWAKE_NS = 1_000_000
# The search for a rate: from a twentieth of what could be served without any pause to a tenth beyond it, halved so often.
_SLOWEST, _FASTEST, _HALVINGS = 0.05, 1.1, 7
_SEARCHED = 99  # the percentile that a searched rate holds
SEARCH_QUERIES = 662  # the fewest for which a p99 can be stated at a confidence of 99 %


@dataclass(frozen=True)
class Scenario:
    """How queries come. Its names are MLPerf's.

    single-stream: one after the other. multi-stream: `streams` at once, and the next ones when the slowest is done. server: at
    random, `rate` a second (Poisson), served by `streams` sessions in the order in which they come; with `bound_ns` instead of
    a rate, at the highest rate whose p99 stays below it. instances: so many processes side by side, each single-stream on
    cores of its own.
    """

    name: Literal["single-stream", "multi-stream", "server"] = "single-stream"
    streams: int = 1
    rate: float | None = None
    bound_ns: int | None = None
    instances: int = 1


SINGLE_STREAM = Scenario()


@dataclass(frozen=True)
class Queries:
    """Nanoseconds of each query: `compute` is execute alone, `end_to_end` is feed, execute and fetch, `feed` is feed alone where
    that was measured."""

    compute_ns: tuple[int, ...]
    end_to_end_ns: tuple[int, ...]
    feed_ns: tuple[int, ...] = ()


def single_stream(session: Session, inputs: Sequence[Tensors], *, queries: int, clock: Clock = perf_counter_ns) -> Queries:
    """Time queries one after the other; the next one starts when the last one ended, and what lies between is not counted.

    One sample a query is MLPerf's SingleStream. `compute` leaves out the copies
    between host and device (trtexec's GPU compute time), `end_to_end` holds them (trtexec's latency).

    Raises UsageError when `inputs` is empty or `queries` < 1.
    """
    if not inputs or queries < 1:
        raise UsageError(f"nothing to measure: {len(inputs)} samples, {queries} queries")
    compute, end_to_end, feed = [], [], []
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
        feed.append(start - fed)
    return Queries(tuple(compute), tuple(end_to_end), tuple(feed))


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


def multi_stream(
    sessions: Sequence[Session], inputs: Sequence[Tensors], *, queries: int, clock: Clock = perf_counter_ns
) -> Queries:
    """Time queries of one sample for each session, all at once; a query takes as long as its slowest sample (MLPerf MultiStream).

    `compute` holds what it takes to wake the sessions' threads. Raises UsageError when there is nothing to measure.
    """
    if not inputs or not sessions or queries < 1:
        raise UsageError(f"nothing to measure: {len(inputs)} samples, {len(sessions)} streams, {queries} queries")
    compute, end_to_end = [], []
    with ThreadPoolExecutor(len(sessions)) as pool:
        for query in range(queries):
            samples = [inputs[(query * len(sessions) + stream) % len(inputs)] for stream in range(len(sessions))]
            fed = clock()
            for session, sample in zip(sessions, samples, strict=True):
                session.feed(sample)
            start = clock()
            for done in [pool.submit(session.execute) for session in sessions]:
                done.result()
            end = clock()
            for session in sessions:
                session.fetch()
            fetched = clock()
            compute.append(end - start)
            end_to_end.append(fetched - fed)
    return Queries(tuple(compute), tuple(end_to_end))


def poisson_arrivals(rate: float, queries: int, seed: int) -> tuple[int, ...]:
    """Nanoseconds at which queries come, at random and `rate` a second on average: a Poisson process (MLPerf Server)."""
    random, moment, found = Random(seed), 0.0, []  # noqa: S311 - arrivals, not a secret
    for _ in range(queries):
        moment += random.expovariate(rate)
        found.append(round(1e9 * moment))
    return tuple(found)


def server(
    sessions: Sequence[Session],
    inputs: Sequence[Tensors],
    arrivals_ns: Sequence[int],
    *,
    clock: Clock = perf_counter_ns,
    sleep: Sleep = time.sleep,
) -> tuple[int, ...]:
    """Nanoseconds of each query from its arrival to its answer, in the order of `arrivals_ns`: it holds the wait and the copies.

    A session that is free takes the query that came first, and waits for the next one when there is none. Raises UsageError
    when there is nothing to measure.
    """
    if not inputs or not sessions or not arrivals_ns:
        raise UsageError(f"nothing to measure: {len(inputs)} samples, {len(sessions)} streams, {len(arrivals_ns)} queries")
    latency = [0] * len(arrivals_ns)
    coming = iter(enumerate(arrivals_ns))
    # A thread that looks at the clock takes a core from those that compute, so with several of them all of a wait is sleep.
    awake_ns = _AWAKE_NS if len(sessions) == 1 else 0
    begin = clock()

    def serve(session: Session) -> None:
        for number, arrival in coming:
            while (left := begin + arrival - clock()) > 0:
                if left > awake_ns:
                    sleep((left - awake_ns) / 1e9)
            session.feed(inputs[number % len(inputs)])
            session.execute()
            session.fetch()
            latency[number] = clock() - begin - arrival

    if len(sessions) == 1:
        serve(sessions[0])
    else:
        with ThreadPoolExecutor(len(sessions)) as pool:
            for done in [pool.submit(serve, session) for session in sessions]:
                done.result()
    return tuple(latency)


def highest_rate(
    serve: Callable[[float], Sequence[int]], bound_ns: int, *, capacity: float
) -> tuple[float, tuple[int, ...]] | None:
    """The highest rate at which an upper bound of the p99 stays within `bound_ns`, with its latencies; None when no rate does.

    `serve` gives the latencies at a rate, SEARCH_QUERIES of them at least, and `capacity` is how many queries a second could be
    served without a pause. The bound of the p99 is MLPerf's early stopping (`percentile_bound`). Rates are tried by bisection,
    so that the answer is 3 % below one that failed, or the fastest that was tried.
    """

    def holds(rate: float) -> tuple[int, ...] | None:
        latency = tuple(serve(rate))
        bound = percentile_bound(latency, _SEARCHED)
        return latency if bound is not None and bound <= bound_ns else None

    low, high = _SLOWEST * capacity, _FASTEST * capacity
    if (best := holds(low)) is None:
        return None
    for _ in range(_HALVINGS):
        middle = sqrt(low * high)
        if (latency := holds(middle)) is None:
            high = middle
        else:
            low, best = middle, latency
    return low, best


def side_by_side(
    session: Session, inputs: Sequence[Tensors], start_ns: int, *, seconds: float, clock: Clock = perf_counter_ns
) -> Queries:
    """Single-stream queries that began and ended within `seconds` after the moment `start_ns` of the clock.

    It runs before that moment, too, and on until the end: whoever runs beside it is disturbed all the time. Raises UsageError
    when no query fits.
    """
    compute: list[int] = []
    end_to_end: list[int] = []
    end_ns = start_ns + round(1e9 * seconds)
    for sample in _endless(inputs):
        began = clock()
        one = single_stream(session, [sample], queries=1, clock=clock)
        ended = clock()
        if began >= start_ns and ended <= end_ns:
            compute += one.compute_ns
            end_to_end += one.end_to_end_ns
        if ended >= end_ns:
            break
    if not compute:
        raise UsageError(f"no query ended within {seconds:g} s", fix="give more time with --offline-seconds")
    return Queries(tuple(compute), tuple(end_to_end))


def _endless(inputs: Sequence[Tensors]) -> Iterator[Tensors]:
    while True:
        yield from inputs


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
