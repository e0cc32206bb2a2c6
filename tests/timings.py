"""Benchmarks that nobody ran: conditions, processes and reports with the numbers a test asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.benchmark.conditions import Conditions
from deploykit.benchmark.report import BenchmarkReport, Process
from deploykit.machine import Machine

SECOND = 1_000_000_000
QUIET = {
    "cores": 2,
    "wall_ns": SECOND,
    "cpu_ns": SECOND,
    "waited_ns": 0,
    "others_ns": 0,
    "stolen_ns": 0,
    "throttled_ns": 0,
    "suspended_ns": 0,
    "fixed_work_ns": (1_000_000, 1_000_000, 1_000_000),
    "clock_khz": (),
    "energy_uj": None,
}
HERE = Machine(
    arch="x86_64", cpu="a CPU", features=("avx2",), cores=2, memory_bytes=2**33, system="Linux 6", python="3.11.7", versions={}
)


def conditions(**changed: Any) -> Conditions:
    """A window of a second on two cores in which nothing disturbed."""
    return Conditions(**{**QUIET, **changed})


def process(label: str, *latency_ns: int, again: bool = False, **changed: Any) -> Process:
    """One process with these latencies; `changed` are its conditions."""
    return Process(
        label=label,
        again=again,
        images_per_query=1,
        latency_ns=latency_ns,
        end_to_end_ns=tuple(2 * latency for latency in latency_ns),
        offline=((8, 1000.0),),
        load_ns=5_000_000,
        first_ns=900_000,
        harness_ns=60.0,
        idle_bytes=40 << 20,
        peak_bytes=60 << 20,
        conditions=conditions(**changed),
    )


def report(
    medians: Mapping[str, Sequence[int]],
    *,
    again: Sequence[int] | None = None,
    machine: Machine = HERE,
    seed: int = 0,
    engines: Mapping[str, object] | None = None,
    **changed: Any,
) -> BenchmarkReport:
    """One process for each of the `medians`; the first engine, the baseline, with those of `again` as well. Each has one latency,
    and the settings say what `deploykit benchmark` asks for by default.

    `engines` is what is said about each of them (network, input, threads), `changed` are the conditions of all processes.
    """
    baseline, *_ = medians
    ran = [process(label, latency, **changed) for label, found in medians.items() for latency in found]
    ran += [process(baseline, latency, again=True, **changed) for latency in (medians[baseline] if again is None else again)]
    settings = {"processes": max(map(len, medians.values())), "queries": 30, "warmup": 5, "seed": seed}
    return BenchmarkReport(tuple(ran), baseline, {**settings, "engines": dict(engines or {})}, machine)
