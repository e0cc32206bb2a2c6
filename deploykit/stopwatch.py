"""What graphs take on this machine: engines built for it, looked into, raced against each other, and thrown away again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploykit import runtimes
from deploykit.artifact import Artifact, make, read_artifact
from deploykit.benchmark import benchmark, profile
from deploykit.benchmark.statistics import FEWEST_PROCESSES
from deploykit.build import build
from deploykit.progress import Progress, silent
from deploykit.quantize.speed import Race, Stopwatch
from deploykit.runtimes import KernelTime

# The batch of one that offline throughput needs costs one query.
_RACE: Mapping[str, Any] = {
    "processes": FEWEST_PROCESSES,
    "queries": 30,
    "warmup": 5,
    "offline_batches": (1,),
    "offline_seconds": 0.0,
    "seed": 0,
}


@contextmanager
def stopwatch(runtime: str, threads: int, *, progress: Progress = silent) -> Iterator[Stopwatch]:
    """For graphs that follow the rules of `runtime`; its engines run on `threads` threads (0: the cores of this process)."""
    with tempfile.TemporaryDirectory() as scratch:

        def built(model: Artifact) -> Artifact:
            final = Path(scratch, model.sha256)
            if final.exists():
                return read_artifact(final)
            return make(final, model.sha256, lambda folder: build(model, runtime, folder, threads=threads))

        def profiled(model: Artifact) -> Sequence[KernelTime]:
            return profile(built(model), model)

        def raced(models: Mapping[str, Artifact]) -> Race:
            engines = {name: built(model) for name, model in models.items()}
            report = benchmark(engines, **_RACE, progress=lambda _, done, total: progress("race of INT8 graphs", done, total))
            intervals = {name: report.median_interval_ns(name) for name in engines}
            return Race({name: report.engine(name).median_ns for name in engines}, report.noise_floor, intervals)

        yield Stopwatch(profiled if runtimes.REGISTRY[runtime].profiles else None, raced)
