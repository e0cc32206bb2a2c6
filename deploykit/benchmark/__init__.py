"""Engines -> BenchmarkReport: latency and throughput that can be believed, every sample from a fresh process.

The unit is the process: sessions that share one disturb each other (their thread pools spin), and intervals from runs
inside one process call an engine different from itself. So every engine is measured in several fresh processes, all of
them in random order, the baseline twice, so that its difference from itself is known; and the kernel's own accounts say
whether anything else was running.

This package runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.artifact import Artifact
from deploykit.benchmark import validity
from deploykit.benchmark.report import BenchmarkReport, Process, about
from deploykit.errors import DeploykitError
from deploykit.machine import Machine
from deploykit.progress import Progress, silent
from deploykit.runtimes import KernelTime


def benchmark(
    engines: Mapping[str, Artifact],
    *,
    processes: int,
    queries: int,
    warmup: int,
    offline_batches: Sequence[int],
    offline_seconds: float,
    seed: int,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Measure each engine on its own golden samples in `processes` fresh processes, all of them in random order.

    The first engine is the baseline and is measured in as many processes again: what it shows against itself is the
    noise floor of the run. A process that the kernel's accounts call disturbed is measured again at the end, for up to half
    as many processes as were asked for: choosing by the cause, and never by the time, leaves the times unbiased.

    Raises DeploykitError with what a process printed when it fails.
    """
    baseline = next(iter(engines))
    order = [(label, False) for label in engines for _ in range(processes)]
    order += [(baseline, True)] * processes
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    request = {"queries": queries, "warmup": warmup, "offline_batches": list(offline_batches), "offline_seconds": offline_seconds}
    found: list[Process] = []
    again_at_most = len(order) // 2
    while len(found) < len(order):
        progress("benchmark", len(found), len(order))
        label, again = order[len(found)]
        answer = _in_fresh_process({**request, "engine": str(engines[label].folder.absolute())})
        found.append(Process.from_json({"label": label, "again": again, **answer}))
        if validity.disturbances(found[-1].conditions) and again_at_most:
            order.append((label, again))
            again_at_most -= 1
    progress("benchmark", len(order), len(order))
    settings = {**request, "processes": processes, "seed": seed, "engines": {label: about(e) for label, e in engines.items()}}
    return BenchmarkReport(tuple(found), baseline, settings, Machine.probe())


def profile(engine: Artifact, model: Artifact, *, queries: int = 20) -> list[KernelTime]:
    """The time of every kernel of `engine`, which was built from `model`, in a fresh process.

    Raises DeploykitError with what the process printed when it fails.
    """
    folders = {"engine": str(engine.folder.absolute()), "model": str(model.folder.absolute())}
    return [KernelTime(**kernel) for kernel in _in_fresh_process({**folders, "profile": queries})["kernels"]]


def _in_fresh_process(request: Mapping[str, Any]) -> dict[str, Any]:
    # With -m the current directory comes first in the child's path: the one that holds this package, so that the child
    # measures this code, and neither another installed copy nor a user's random.py is imported.
    command = [sys.executable, "-m", "deploykit.benchmark.process"]
    here = Path(__file__).absolute().parents[2]
    child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=here, check=False)
    if child.returncode != 0:
        raise DeploykitError(
            f"a benchmark process ended with exit code {child.returncode}", why=child.stderr.strip()[-2000:] or "it said nothing"
        )
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer
