"""Engines -> BenchmarkReport: latency and throughput that can be believed, every sample from a fresh process.

The unit is the process: sessions that share one disturb each other (their thread pools spin), and intervals from runs
inside one process call an engine different from itself. So every engine is measured in several fresh processes, all of
them in random order, the baseline twice, so that its difference from itself is known; and the kernel's own accounts say
whether anything else was running.

This package runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import IO, Any

from deploykit import runtimes
from deploykit.artifact import Artifact
from deploykit.benchmark import conditions, validity
from deploykit.benchmark.report import BenchmarkReport, Process, about
from deploykit.benchmark.scenarios import SINGLE_STREAM, Scenario
from deploykit.errors import DeploykitError, UsageError
from deploykit.jsonable import to_json
from deploykit.machine import Machine, available_cores
from deploykit.progress import Progress, silent
from deploykit.runtimes import KernelTime

# With -m the current directory comes first in the child's path: the one that holds this package, so that the child
# measures this code, and neither another installed copy nor a user's random.py is imported.
_HERE = Path(__file__).absolute().parents[2]
_IS_ZIPAPP = _HERE.suffix == ".pyz"
# Out of a zipapp the app itself runs that module when it gets this word: a file is no current directory.
CHILD = "benchmark-process"
_COMMAND = [sys.executable, str(_HERE), CHILD] if _IS_ZIPAPP else [sys.executable, "-m", "deploykit.benchmark.process"]
_PLACE = _HERE.parent if _IS_ZIPAPP else _HERE
_ROOT = Path("/")
# Favoured cores of one kind clock a few per cent higher; those of another kind are slower by a quarter and more.
_SAME_KIND = 1.2
_HEAD_START_NS = 50_000_000  # from the word to the start: enough for all instances to hear it


def benchmark(
    engines: Mapping[str, Artifact],
    *,
    processes: int,
    queries: int,
    warmup: int,
    offline_batches: Sequence[int],
    offline_seconds: float,
    seed: int,
    scenario: Scenario = SINGLE_STREAM,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Measure each engine on its own golden samples in `processes` fresh processes, all of them in random order.

    A process asks `warmup` queries that do not count, then `queries` that do, then every batch of `offline_batches` for
    `offline_seconds`. `seed` says the order, and what bootstraps draw.

    The first engine is the baseline and is measured in as many processes again: what it shows against itself is the
    noise floor of the run. A process that the kernel's accounts call disturbed is measured again at the end, for up to half
    as many processes as were asked for: choosing by the cause, and never by the time, leaves the times unbiased.

    How queries come is the `scenario`; other ones than single-stream measure no offline throughput. With several instances, a
    process of the report is a group of them, side by side on cores of their own.

    Raises DeploykitError with what a process printed when it fails, UsageError for more instances than there are cores.
    """
    baseline = next(iter(engines))
    order = [(label, False) for label in engines for _ in range(processes)]
    order += [(baseline, True)] * processes
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    request: dict[str, Any] = {"queries": queries, "warmup": warmup}
    request |= {"offline_batches": list(offline_batches), "offline_seconds": offline_seconds}
    if scenario != SINGLE_STREAM:
        request |= {"scenario": to_json(scenario), "seed": seed}
    cores = cores_of_instances(scenario.instances)
    found: list[Process] = []
    again_at_most = len(order) // 2
    while len(found) < len(order):
        progress("benchmark", len(found), len(order))
        label, again = order[len(found)]
        asked = {**request, "engine": str(engines[label].folder.absolute())}
        if "seed" in asked:
            asked["seed"] = seed + len(found)  # so that queries come at other moments in each process
        answer = _in_fresh_process(asked) if scenario.instances == 1 else _side_by_side(asked, cores)
        found.append(Process.from_json({"label": label, "again": again, **answer}))
        if validity.disturbances(found[-1].conditions) and again_at_most:
            order.append((label, again))
            again_at_most -= 1
    progress("benchmark", len(order), len(order))
    settings = {**request, "processes": processes, "seed": seed, "engines": {label: about(e) for label, e in engines.items()}}
    settings["core_speeds"] = conditions.core_speeds(sorted(os.sched_getaffinity(0)))
    return BenchmarkReport(tuple(found), baseline, settings, Machine.probe())


def cores_of_instances(instances: int, *, root: Path = _ROOT) -> list[list[int]]:
    """The cores of each instance: neighbours, as many for each, and no more in all than a container's quota allows.

    Raises UsageError when there are more instances than cores, and for several instances on cores of several kinds.
    """
    cores = sorted(os.sched_getaffinity(0))[: available_cores()]
    each = len(cores) // instances
    if not each:
        raise UsageError(f"{instances} instances want as many cores", why=f"this process may use {len(cores)}")
    groups = [cores[number * each : (number + 1) * each] for number in range(instances)]
    if instances > 1:
        _check_one_kind([core for group in groups for core in group], root)
    return groups


def _check_one_kind(cores: Sequence[int], root: Path) -> None:
    """Raise UsageError where instances would not be alike, as some of their cores are of a faster kind than others."""
    speeds = conditions.core_speeds(cores, root)
    if not speeds or max(speeds) <= _SAME_KIND * min(speeds):
        return
    fast = [core for core, speed in zip(cores, speeds, strict=True) if max(speeds) <= _SAME_KIND * speed]
    slow = [core for core in cores if core not in fast]
    raise UsageError(
        "instances would run on cores of several kinds, so that they were not alike",
        why=f"cores {_listed(fast)} are faster than {_listed(slow)} ({max(speeds)} and {min(speeds)} by the kernel)",
        fix=f"taskset --cpu-list {_listed(fast)} deploykit benchmark ..., or another list of one kind",
    )


def _listed(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


def profile(engine: Artifact, model: Artifact, *, queries: int = 20) -> list[KernelTime]:
    """The time of every kernel of `engine`, which was built from `model`, in a fresh process.

    Raises DeploykitError with what the process printed when it fails.
    """
    (kernels,) = _profiled([(engine, model)], queries)
    return kernels


def layer_times(engines: Mapping[str, tuple[Artifact, Artifact]], *, queries: int = 20) -> dict[str, dict[str, float]]:
    """Nanoseconds of every layer of engines by label, each with the graph that it was built from: what all kernels take together
    that compute it. Engines of runtimes that do not tell are left out.

    One fresh process runs them one after the other. A kernel is slower while it is timed, so a sum of these is no latency.
    Raises DeploykitError with what the process printed when it fails.
    """
    telling = {label: pair for label, pair in engines.items() if runtimes.REGISTRY[str(pair[0].facts["runtime"])].profiles}
    if not telling:
        return {}
    found: dict[str, dict[str, float]] = {label: {} for label in telling}
    for times, kernels in zip(found.values(), _profiled(list(telling.values()), queries), strict=True):
        for kernel in kernels:
            if kernel.source:
                times[kernel.source] = times.get(kernel.source, 0.0) + kernel.ns
    return found


def _profiled(pairs: Sequence[tuple[Artifact, Artifact]], queries: int) -> list[list[KernelTime]]:
    folders = [[str(found.folder.absolute()) for found in pair] for pair in pairs]
    answer = _in_fresh_process({"engines": folders, "profile": queries})
    return [[KernelTime(**kernel) for kernel in kernels] for kernels in answer["kernels"]]


def _in_fresh_process(request: Mapping[str, Any]) -> dict[str, Any]:
    child = subprocess.run(_COMMAND, input=json.dumps(request), capture_output=True, text=True, cwd=_PLACE, check=False)
    if child.returncode != 0:
        raise _failed(child.returncode, child.stderr)
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _side_by_side(request: Mapping[str, Any], cores: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What as many processes as there are groups of `cores` measured at the same time, each on its own, taken together."""
    with ExitStack() as stack:
        children = [stack.enter_context(_waiting({**request, "cores": list(own)})) for own in cores]
        for child, errors in children:
            _answer_of(child, errors)  # ready
        start = time.perf_counter_ns() + _HEAD_START_NS
        for child, _ in children:
            _say(child, str(start))
        answers = [_answer_of(child, errors) for child, errors in children]
    return together(answers, seconds=request["offline_seconds"])


def together(answers: Sequence[Mapping[str, Any]], *, seconds: float) -> dict[str, Any]:
    """Instances as one: their queries in turn, throughput over so many seconds and memory of all, the slowest's times to load."""
    each = [
        (median(answer["latency_ns"]), answer["images_per_query"] * len(answer["latency_ns"]) / seconds) for answer in answers
    ]
    # In turn, because the order of queries is looked at for a drift.
    in_turn = {
        key: [value for row in zip_longest(*(answer[key] for answer in answers)) for value in row if value is not None]
        for key in ("latency_ns", "end_to_end_ns")
    }
    first = answers[0]
    return {
        **first,
        **in_turn,
        "feed_ns": [],
        "gpu_ns": [],
        "offline": [[first["images_per_query"], sum(per_second for _, per_second in each)]],
        "instances": each,
        **{key: max(answer[key] for answer in answers) for key in ("load_ns", "first_ns", "harness_ns")},
        **{key: sum(answer[key] for answer in answers) for key in ("idle_bytes", "peak_bytes")},
        "conditions": _conditions([answer["conditions"] for answer in answers]),
    }


def _conditions(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of processes on cores of their own: what was counted on each of them adds up, the longest window is that of all."""
    found: dict[str, Any] = {}
    for key in each[0]:
        values = [conditions[key] for conditions in each]
        if isinstance(values[0], (list, tuple)):
            found[key] = [value for list_of_one in values for value in list_of_one]
        elif key in ("power_mode", "gpu_unseen"):
            found[key] = values[0]  # of the board, of the GPU
        elif key in ("wall_ns", "suspended_ns", "throttled_ns", "energy_uj"):
            found[key] = None if None in values else max(values)  # of the whole machine or group, not of some cores
        else:
            found[key] = None if None in values else sum(values)
    return found


@contextmanager
def _waiting(request: Mapping[str, Any]) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A process that has been given a request and is spoken with line by line, and the file of what it says beside; it is
    ended when the block ends."""
    with TemporaryFile("w+") as errors:
        child = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=_PLACE)
        try:
            _say(child, json.dumps(request))
            yield child, errors
        finally:
            child.kill()
            child.communicate()


def _say(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(line + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it has died, and what it answers, nothing, says so with its reason


def _answer_of(child: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
    """The next line that a process says. Raises DeploykitError with its words when it has ended instead."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        code = child.wait()
        errors.seek(0)
        raise _failed(code, errors.read())
    answer: dict[str, Any] = json.loads(line)
    return answer


def _failed(code: int, words: str) -> DeploykitError:
    return DeploykitError(f"a benchmark process ended with exit code {code}", why=words.strip()[-2000:] or "it said nothing")
