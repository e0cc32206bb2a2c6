"""Engines -> BenchmarkReport: single-stream latency and offline throughput, every sample from a fresh process.

The unit is the process: sessions that share one disturb each other (their thread pools spin), and intervals from runs
inside one process call an engine different from itself. So every engine is measured in several fresh processes, in
random order, and intervals are bootstrapped over the processes' medians. Raw samples are the report; the rest are
properties of them.

Run as a module, this file is that process: it reads a request as JSON from standard input and answers in JSON. It runs
on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any, TypeAlias

import numpy as np

from deploykit import runtimes
from deploykit.artifact import Artifact, Samples, Tensors, read_artifact
from deploykit.errors import DeploykitError, UsageError
from deploykit.progress import Progress, silent
from deploykit.runtimes import Session

Clock: TypeAlias = Callable[[], int]
Interval: TypeAlias = tuple[float, float]

# The fewest queries from which a 90th percentile may be stated: MLPerf Inference's early stopping, confidence 99 %
# (loadgen/early_stopping.cc); with fewer, the empirical one is a guess.
FEWEST_FOR_P90 = 64
_RESAMPLES = 10_000
# From the 10th to the 90th percentile, and between the medians of processes, latencies on a quiet machine differ by a
# few per cent; small networks, whose queries take microseconds, by up to a third.
_STEADY = 1.5


@dataclass(frozen=True)
class Measured:
    """One engine's raw samples. `latency_ns` has one list for each process; so has every other field one value.

    A query is `images_per_query` images: one, or the batch that is fixed in the engine, and so is an offline query then.
    """

    label: str
    images_per_query: int
    offline_batch: int
    latency_ns: tuple[tuple[int, ...], ...]
    offline_per_second: tuple[float, ...]
    load_ns: tuple[int, ...]

    @property
    def process_medians_ns(self) -> list[float]:
        """Median latency of each process."""
        return [statistics.median(process) for process in self.latency_ns]

    @property
    def median_ns(self) -> float:
        """Median over processes of their median latency."""
        return statistics.median(self.process_medians_ns)

    @property
    def p90_ns(self) -> float | None:
        """The 90th percentile over all queries, or None when they are too few to state one."""
        queries = sorted(query for process in self.latency_ns for query in process)
        if len(queries) < FEWEST_FOR_P90:
            return None
        return float(queries[-(len(queries) // 10) - 1])


@dataclass(frozen=True)
class BenchmarkReport:
    """Raw samples of all engines, in the order in which their processes ran."""

    engines: tuple[Measured, ...]
    order: tuple[str, ...]
    settings: Mapping[str, Any]

    def median_interval_ns(self, label: str, seed: int = 0) -> Interval:
        """95 % bootstrap interval of the median latency, over processes."""
        medians = np.array(self._engine(label).process_medians_ns)
        picks = np.random.default_rng(seed).integers(0, len(medians), (_RESAMPLES, len(medians)))
        return _interval(np.median(medians[picks], axis=1))

    def ratio(self, label: str, baseline: str, seed: int = 0) -> tuple[float, Interval]:
        """Median latency of one engine over another's, with its 95 % bootstrap interval over processes."""
        a, b = (np.array(self._engine(name).process_medians_ns) for name in (label, baseline))
        generator = np.random.default_rng(seed)
        tops, bottoms = (np.median(x[generator.integers(0, len(x), (_RESAMPLES, len(x)))], axis=1) for x in (a, b))
        return float(np.median(a) / np.median(b)), _interval(tops / bottoms)

    def doubts(self) -> list[str]:
        """What in the samples says that something else was running; empty on a quiet machine.

        An interval over processes cannot see a disturbance that hits all of them alike; the spread inside them can.
        """
        found = []
        for engine in self.engines:
            queries = sorted(query for process in engine.latency_ns for query in process)
            tenth, ninetieth = queries[len(queries) // 10], queries[-(len(queries) // 10) - 1]
            medians = engine.process_medians_ns
            if ninetieth > _STEADY * tenth or max(medians) > _STEADY * min(medians):
                spread = max(ninetieth / tenth, max(medians) / min(medians))
                found.append(f"{engine.label}: latencies spread by a factor of {spread:.1f}; measure again on a quiet machine")
        return found

    def _engine(self, label: str) -> Measured:
        return next(engine for engine in self.engines if engine.label == label)


def benchmark(
    engines: Mapping[str, Artifact],
    *,
    processes: int,
    queries: int,
    warmup: int,
    offline_batch: int,
    offline_seconds: float,
    seed: int,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Measure each engine on its own golden samples in `processes` fresh processes, all of them in random order.

    Raises DeploykitError with what a process printed when it fails.
    """
    order = [label for label in engines for _ in range(processes)]
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    request = {"queries": queries, "warmup": warmup, "offline_batch": offline_batch, "offline_seconds": offline_seconds}
    answers: dict[str, list[dict[str, Any]]] = {label: [] for label in engines}
    for done, label in enumerate(order):
        progress("benchmark", done, len(order))
        answers[label].append(_in_fresh_process({**request, "engine": str(engines[label].folder.absolute())}))
    progress("benchmark", len(order), len(order))
    measured = tuple(
        Measured(
            label,
            images_per_query=given[0]["images_per_query"],
            offline_batch=given[0]["offline_batch"],
            latency_ns=tuple(tuple(answer["latency_ns"]) for answer in given),
            offline_per_second=tuple(answer["offline_per_second"] for answer in given),
            load_ns=tuple(answer["load_ns"] for answer in given),
        )
        for label, given in answers.items()
    )
    return BenchmarkReport(measured, tuple(order), {**request, "processes": processes, "seed": seed})


def single_stream(session: Session, inputs: Sequence[Tensors], *, queries: int, clock: Clock = perf_counter_ns) -> list[int]:
    """Compute latency of each query in nanoseconds, one sample at a time.

    The next query starts when the last one ended, and the time between queries is not counted (MLPerf Inference,
    SingleStream). Inputs are fed before the clock starts and outputs fetched after it stopped, so copies between host
    and device are not in it.

    Raises UsageError when `inputs` is empty or `queries` < 1.
    """
    if not inputs or queries < 1:
        raise UsageError(f"nothing to measure: {len(inputs)} samples, {queries} queries")
    latencies = []
    for query in range(queries):
        session.feed(inputs[query % len(inputs)])
        start = clock()
        session.execute()
        latencies.append(clock() - start)
    return latencies


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


def _measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process does."""
    engine = read_artifact(Path(request["engine"]))
    samples = engine.samples()
    runtime = runtimes.get(str(engine.facts["runtime"]))
    start = perf_counter_ns()
    session = runtime.load(engine)
    load_ns = perf_counter_ns() - start
    fixed = engine.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else 1
    singles = _batches_of(samples, size)
    if request["warmup"]:
        single_stream(session, singles, queries=request["warmup"])
    latency_ns = single_stream(session, singles, queries=request["queries"])
    offline_batch = fixed if isinstance(fixed, int) else request["offline_batch"]
    per_second = offline(session, _batches_of(samples, offline_batch)[0], seconds=request["offline_seconds"])
    return {
        "load_ns": load_ns,
        "images_per_query": size,
        "offline_batch": offline_batch,
        "latency_ns": latency_ns,
        "offline_per_second": per_second,
    }


def _batches_of(samples: Samples, size: int) -> list[dict[str, Any]]:
    """The golden inputs in whole batches of `size`, repeated when there are fewer."""
    count = len(next(iter(samples.inputs.values())))
    starts = range(0, max(1, count - size + 1), size)
    return [
        {
            name: np.ascontiguousarray(np.resize(array[s : s + size], (size, *array.shape[1:])))
            for name, array in samples.inputs.items()
        }
        for s in starts
    ]


def _in_fresh_process(request: Mapping[str, Any]) -> dict[str, Any]:
    # With -m the current directory comes first in the child's path: the one that holds this package, so that the child
    # measures this code, and neither another installed copy nor a user's random.py is imported.
    command = [sys.executable, "-m", "deploykit.benchmark"]
    here = Path(__file__).absolute().parents[1]
    child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=here, check=False)
    if child.returncode != 0:
        raise DeploykitError(
            f"a benchmark process ended with exit code {child.returncode}", why=child.stderr.strip()[-2000:] or "it said nothing"
        )
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _interval(values: Any) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_measure(json.load(sys.stdin))) + "\n")
    except DeploykitError as error:
        sys.exit(str(error))
