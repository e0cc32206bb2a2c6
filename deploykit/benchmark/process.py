"""What one fresh process measures. Run as a module it reads a request as a line of JSON from standard input and answers in JSON.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import Any, cast

import numpy as np

from deploykit import runtimes
from deploykit.artifact import Artifact, Samples, Tensors, read_artifact
from deploykit.benchmark.conditions import Conditions, Watch, peak_bytes
from deploykit.benchmark.report import images_per_query
from deploykit.benchmark.scenarios import (
    SEARCH_QUERIES,
    NullSession,
    Queries,
    Scenario,
    highest_rate,
    multi_stream,
    offline,
    poisson_arrivals,
    server,
    side_by_side,
    single_stream,
)
from deploykit.errors import DeploykitError, StageError
from deploykit.jsonable import to_json
from deploykit.runtimes import Session, cudart

_NULL_QUERIES = 1000
READY = "ready"  # what a process says that starts to measure when the others do


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for: a measurement, or with `request["profile"]`, a number of queries, the time of every kernel."""
    if "profile" not in request:
        return measure(request)
    return {"kernels": [profile(*map(Path, pair), queries=request["profile"]) for pair in request["engines"]]}


def profile(engine_folder: Path, model_folder: Path, *, queries: int) -> list[Any]:
    """The kernels of the engine in one folder, which was built from the model in the other, as JSON values."""
    engine, model = read_artifact(engine_folder), read_artifact(model_folder)
    runtime = cast(runtimes.ProfilingRuntime, runtimes.get(str(engine.facts["runtime"])))
    inputs = _batches_of(engine.samples(), images_per_query(engine))[0]
    return [to_json(kernel) for kernel in runtime.profile(engine, model, inputs, queries=queries)]


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load the engine in the folder `request["engine"]`, measure it on its golden samples, and tell everything raw.

    How queries come is `request["scenario"]`, the fields of a `Scenario`; without it they are single-stream, and offline
    throughput is measured too.
    """
    scenario = Scenario(**request.get("scenario", {}))
    engine = read_artifact(Path(request["engine"]))
    samples = engine.samples()
    runtime = runtimes.get(str(engine.facts["runtime"]))
    idle = peak_bytes()
    start = perf_counter_ns()
    session = runtime.load(engine)
    load_ns = perf_counter_ns() - start
    size = images_per_query(engine)
    singles = _batches_of(samples, size)
    first = single_stream(session, singles, queries=1)
    sessions = [session, *(_another(session, runtime, engine) for _ in range(scenario.streams - 1))]
    batches = [size] if isinstance(engine.inputs[0].shape[0], int) else request["offline_batches"]
    is_plain = "scenario" not in request
    gpu_times: Callable[[int], Sequence[int]] | None = getattr(session, "gpu_times", None)
    with Watch(gpu=_bus_id() if gpu_times is not None else None) as watch:
        # In here, for the fixed work that opens the window leaves caches and threads cold: 0.11 ms instead of 0.013 ms.
        for one in sessions if request["warmup"] else ():
            single_stream(one, singles, queries=request["warmup"])
        queries, rate = _asked(sessions, singles, scenario, request)
        # Of the same queries once more: who waits for each and copies leaves the GPU idle in between.
        gpu_ns = gpu_times(request["queries"]) if gpu_times is not None and is_plain else ()
        watch.look()
        throughput = [
            [batch, offline(session, _batches_of(samples, batch)[0], seconds=request["offline_seconds"])]
            for batch in (batches if is_plain else ())
        ]
    found = {} if is_plain else {"rate_per_second": rate}
    return {
        "images_per_query": size,
        "latency_ns": queries.compute_ns,
        "end_to_end_ns": queries.end_to_end_ns,
        "feed_ns": queries.feed_ns,
        "gpu_ns": list(gpu_ns),
        "offline": throughput,
        "load_ns": load_ns,
        "first_ns": first.compute_ns[0],
        "harness_ns": statistics.median(single_stream(NullSession(), singles, queries=_NULL_QUERIES).compute_ns),
        "idle_bytes": idle,
        "peak_bytes": peak_bytes(),
        "conditions": to_json(_of_others(watch.conditions, scenario)),
        **found,
    }


def _asked(
    sessions: Sequence[Session], inputs: Sequence[Tensors], scenario: Scenario, request: Mapping[str, Any]
) -> tuple[Queries, float | None]:
    """The queries of a scenario, and at how many a second they came where that was searched."""
    count = request["queries"]
    if scenario.instances > 1:
        return side_by_side(sessions[0], inputs, _common_start(), seconds=request["offline_seconds"]), None
    if scenario.name == "multi-stream":
        return multi_stream(sessions, inputs, queries=count), None
    if scenario.name == "single-stream":
        return single_stream(sessions[0], inputs, queries=count), None

    def served(rate: float, at_least: int = 0) -> tuple[int, ...]:
        return server(sessions, inputs, poisson_arrivals(rate, max(count, at_least), request["seed"]))

    if scenario.bound_ns is None:
        assert scenario.rate is not None
        latency = served(scenario.rate)
        return Queries(latency, latency), None
    alone = statistics.median(single_stream(sessions[0], inputs, queries=min(count, 30)).end_to_end_ns)
    found = highest_rate(lambda rate: served(rate, SEARCH_QUERIES), scenario.bound_ns, capacity=len(sessions) * 1e9 / alone)
    if found is None:
        raise StageError(
            f"no rate keeps the p99 below {scenario.bound_ns / 1e6:g} ms",
            why=f"a query alone takes {alone / 1e6:.4g} ms",
            fix="allow more with --p99, or use a faster engine",
        )
    return Queries(found[1], found[1]), found[0]


def _bus_id() -> str:
    """Where the first GPU is on the PCI bus; empty where this CUDA runtime does not tell."""
    try:
        return cudart.load().bus_id()
    except DeploykitError:
        return ""


def _another(session: Session, runtime: runtimes.Runtime, engine: Artifact) -> Session:
    """One more session for the engine: of the same loaded model where the runtime can, else loaded once more."""
    another = getattr(session, "another", None)
    return cast(Session, another()) if another is not None else runtime.load(engine)


def _common_start() -> int:
    """Say that all is ready, and wait for the moment at which all instances start to count, in nanoseconds of perf_counter.

    On Linux that clock is the same in all processes (CLOCK_MONOTONIC).
    """
    _tell({"state": READY})
    return int(sys.stdin.readline())


def _of_others(conditions: Conditions, scenario: Scenario) -> Conditions:
    """With several streams, threads that wait for a core wait for each other, and that belongs to what is measured."""
    return conditions if scenario.streams == 1 else replace(conditions, waited_ns=None)


def _tell(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


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


if __name__ == "__main__":
    try:
        asked = json.loads(sys.stdin.readline())
        if asked.get("cores"):
            # Before anything is loaded: threads inherit it.
            os.sched_setaffinity(0, asked["cores"])
        _tell(answer(asked))
    except DeploykitError as error:
        sys.exit(str(error))
