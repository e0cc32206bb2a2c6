"""What one fresh process measures. Run as a module it reads a request as JSON from standard input and answers in JSON.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any, cast

import numpy as np

from deploykit import runtimes
from deploykit.artifact import Samples, read_artifact
from deploykit.benchmark.conditions import Watch, peak_bytes
from deploykit.benchmark.report import images_per_query
from deploykit.benchmark.scenarios import NullSession, offline, single_stream
from deploykit.errors import DeploykitError
from deploykit.jsonable import to_json

_NULL_QUERIES = 1000


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked for: a measurement, or with `request["profile"]`, a number of queries, the time of every kernel."""
    return profile(request) if "profile" in request else measure(request)


def profile(request: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels of the engine in the folder `request["engine"]`, which was built from the model in `request["model"]`."""
    engine, model = (read_artifact(Path(request[key])) for key in ("engine", "model"))
    runtime = cast(runtimes.ProfilingRuntime, runtimes.get(str(engine.facts["runtime"])))
    inputs = _batches_of(engine.samples(), images_per_query(engine))[0]
    kernels = runtime.profile(engine, model, inputs, queries=request["profile"])
    return {"kernels": [to_json(kernel) for kernel in kernels]}


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load the engine in the folder `request["engine"]`, measure it on its golden samples, and tell everything raw."""
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
    batches = [size] if isinstance(engine.inputs[0].shape[0], int) else request["offline_batches"]
    with Watch() as watch:
        # In here, for the fixed work that opens the window leaves caches and threads cold: 0.11 ms instead of 0.013 ms.
        if request["warmup"]:
            single_stream(session, singles, queries=request["warmup"])
        queries = single_stream(session, singles, queries=request["queries"])
        watch.look()
        throughput = [
            [batch, offline(session, _batches_of(samples, batch)[0], seconds=request["offline_seconds"])] for batch in batches
        ]
    return {
        "images_per_query": size,
        "latency_ns": queries.compute_ns,
        "end_to_end_ns": queries.end_to_end_ns,
        "offline": throughput,
        "load_ns": load_ns,
        "first_ns": first.compute_ns[0],
        "harness_ns": statistics.median(single_stream(NullSession(), singles, queries=_NULL_QUERIES).compute_ns),
        "idle_bytes": idle,
        "peak_bytes": peak_bytes(),
        "conditions": to_json(watch.conditions),
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


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(answer(json.load(sys.stdin))) + "\n")
    except DeploykitError as error:
        sys.exit(str(error))
