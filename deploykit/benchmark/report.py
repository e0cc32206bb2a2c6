"""What a benchmark found: raw samples of every process, in the order in which they ran. The rest are properties of them.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.artifact import Artifact
from deploykit.benchmark import validity
from deploykit.benchmark.conditions import Conditions
from deploykit.benchmark.statistics import Difference, Interval, difference, median_interval, noise_floor, percentile_over
from deploykit.errors import UsageError
from deploykit.machine import Machine
from deploykit.runtimes import threads_of

_LONGEST_NS = 2**53  # a hundred days, and the largest number that every reader of JSON holds exactly


def about(engine: Artifact) -> dict[str, Any]:
    """What makes two measurements of one label comparable: network, input and threads."""
    return {
        "model": str(engine.facts.get("model")),
        "input": [list(spec.shape) for spec in engine.inputs],
        "threads": threads_of(engine),
    }


def images_per_query(engine: Artifact) -> int:
    """One, or the batch that is fixed in the engine."""
    batch = engine.inputs[0].shape[0]
    return batch if isinstance(batch, int) else 1


@dataclass(frozen=True)
class Process:
    """One fresh process's raw samples. `again` marks the second measurement of the baseline, the A/A arm.

    latency_ns is compute alone and end_to_end_ns holds the copies, one for each query of `images_per_query` images: one,
    or the batch that is fixed in the engine. offline is (batch, images per second). first_ns is the first inference after
    loading. harness_ns is what a query of nothing takes. idle_bytes is the process's peak memory before it loaded.

    In another scenario than single-stream, latency_ns is what that calls the latency of a query. rate_per_second is the rate of
    arrivals that was found, where one was searched; instances is (median latency, images per second) of each process where
    several ran side by side and are one here. feed_ns is the part of end_to_end_ns that copies to the device; gpu_ns is what a
    GPU took by its own clock, once for each of as many queries more.
    """

    label: str
    again: bool
    images_per_query: int
    latency_ns: tuple[int, ...]
    end_to_end_ns: tuple[int, ...]
    offline: tuple[tuple[int, float], ...]
    load_ns: int
    first_ns: int
    harness_ns: float
    idle_bytes: int
    peak_bytes: int
    conditions: Conditions
    rate_per_second: float | None = None
    instances: tuple[tuple[float, float], ...] = ()
    feed_ns: tuple[int, ...] = ()
    gpu_ns: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Process:
        """The inverse of `jsonable.to_json`. Raises KeyError, TypeError or ValueError for what is no such process."""
        lists: dict[str, Any] = {key: tuple(map(int, value[key])) for key in ("latency_ns", "end_to_end_ns")}
        if not all(lists.values()) or min(map(min, lists.values())) < 1 or max(map(max, lists.values())) > _LONGEST_NS:
            raise ValueError("a process has no latencies, or one of zero, or of years")
        lists |= {key: int(value[key]) for key in ("images_per_query", "load_ns", "first_ns", "idle_bytes", "peak_bytes")}
        offline = tuple((int(batch), float(per_second)) for batch, per_second in value["offline"])
        conditions = Conditions.from_json(value["conditions"])
        instances = tuple((float(median_ns), float(per_second)) for median_ns, per_second in value.get("instances", ()))
        rate = value.get("rate_per_second")
        lists |= {"instances": instances, "rate_per_second": None if rate is None else float(rate)}
        lists |= {key: tuple(map(int, value.get(key, ()))) for key in ("feed_ns", "gpu_ns")}
        return cls(**{**value, **lists, "offline": offline, "conditions": conditions})

    @property
    def median_ns(self) -> float:
        """Median compute latency."""
        return statistics.median(self.latency_ns)


@dataclass(frozen=True)
class Measured:
    """All processes of one engine."""

    label: str
    processes: tuple[Process, ...]

    @property
    def medians_ns(self) -> list[float]:
        """Median latency of each process."""
        return [process.median_ns for process in self.processes]

    @property
    def median_ns(self) -> float:
        """Median over processes of their median latency."""
        return statistics.median(self.medians_ns)

    @property
    def end_to_end_ns(self) -> float:
        """Median over processes of their median latency with the copies between host and device."""
        return statistics.median(statistics.median(process.end_to_end_ns) for process in self.processes)

    @property
    def gpu_ns(self) -> float | None:
        """Median over processes of the median time on the GPU, by its own clock; None where there is none that tells."""
        each = [statistics.median(process.gpu_ns) for process in self.processes if process.gpu_ns]
        return statistics.median(each) if each else None

    @property
    def images_per_query(self) -> int:
        """One, or the batch that is fixed in the engine."""
        return self.processes[0].images_per_query

    @property
    def energy_mj(self) -> float | None:
        """Energy of one image in millijoules: mean power over a process's window times its median latency, median over processes.

        The window holds warm-up and offline queries too, so that this is of a device that is busy. None where power is unknown.
        """
        each = [
            power * process.median_ns / 1e6 / process.images_per_query
            for process in self.processes
            if (power := process.conditions.power_w) is not None
        ]
        return statistics.median(each) if each else None

    @property
    def per_second(self) -> dict[int, list[float]]:
        """Offline throughput of each process, by batch."""
        found: dict[int, list[float]] = {}
        for process in self.processes:
            for batch, per_second in process.offline:
                found.setdefault(batch, []).append(per_second)
        return found

    @property
    def rates_per_second(self) -> list[float]:
        """The rate of arrivals that each process found; empty where none was searched."""
        return [process.rate_per_second for process in self.processes if process.rate_per_second is not None]

    @property
    def instances(self) -> list[tuple[float, float]]:
        """(median latency in ns, images per second) of each instance, medians over processes; empty where there was one."""
        return [
            (statistics.median(ns for ns, _ in same), statistics.median(per_second for _, per_second in same))
            for same in zip(*(process.instances for process in self.processes), strict=True)
        ]

    def percentile_ns(self, percentile: float) -> float | None:
        """An upper bound of a percentile over all processes (`statistics.percentile_over`); None for too few queries."""
        return percentile_over([process.latency_ns for process in self.processes], percentile)[0]


@dataclass(frozen=True)
class BenchmarkReport:
    """Raw samples of all engines, in the order in which their processes ran, and what machine they ran on.

    `baseline` is the engine that the others are compared with, the one that was measured twice. Of more processes than were
    asked for, the undisturbed ones count, by what the kernel says about them and not by their times.
    """

    processes: tuple[Process, ...]
    baseline: str
    settings: Mapping[str, Any]
    machine: Machine

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkReport:
        """The inverse of `jsonable.to_json`. Raises KeyError, TypeError or ValueError for what is not such a report."""
        processes = tuple(Process.from_json(process) for process in value["processes"])
        baseline, settings = str(value["baseline"]), dict(value["settings"])
        if not {(baseline, False), (baseline, True)} <= {(process.label, process.again) for process in processes}:
            raise ValueError(f"its baseline {baseline!r} was not measured twice")
        if int(settings["processes"]) < 1 or int(settings["seed"]) < 0:
            raise ValueError("its settings are out of range")
        engines = settings.get("engines", {})
        if not isinstance(engines, Mapping) or not all(isinstance(engine, Mapping) for engine in engines.values()):
            raise ValueError("its settings do not say what its engines are")
        return cls(processes, baseline, settings, Machine.from_json(value["machine"]))

    @property
    def counted(self) -> tuple[Process, ...]:
        """For each engine and arm as many processes as were asked for, disturbed ones only where there are too few others."""
        arms: dict[tuple[str, bool], list[Process]] = {}
        for process in self.processes:
            arms.setdefault((process.label, process.again), []).append(process)
        wanted = int(self.settings["processes"])
        chosen = {
            id(process)
            for arm in arms.values()
            for process in sorted(arm, key=lambda process: bool(validity.disturbances(process.conditions)))[:wanted]
        }
        return tuple(process for process in self.processes if id(process) in chosen)

    @property
    def engines(self) -> tuple[Measured, ...]:
        """One for each engine, the baseline first."""
        labels = dict.fromkeys([self.baseline, *(process.label for process in self.processes)])
        return tuple(self.engine(label) for label in labels)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the run is not valid; empty when it is."""
        found = validity.doubts({engine.label: engine.processes for engine in self.engines}, self.counted)
        emulated = f"the CPU is an emulated one ({self.machine.cpu}), on which time means nothing"
        return ((emulated,) if self.machine.is_emulated else ()) + found

    @property
    def verdict(self) -> str:
        """`valid`, or `invalid: ` and every reason."""
        return f"invalid: {'; '.join(self.doubts)}" if self.doubts else "valid"

    @property
    def board(self) -> dict[str, Any] | None:
        """A Jetson's power modes, and the lowest and highest clock of its or another GPU in MHz under load, or why they are not
        known (`unseen`); None where no GPU was watched."""
        conditions = [process.conditions for process in self.counted]
        modes = sorted({each.power_mode for each in conditions if each.power_mode is not None})
        clocks = [clock for each in conditions for clock in each.gpu_mhz]
        unseen = next((each.gpu_unseen for each in conditions if each.gpu_unseen), "")
        if not modes and not clocks and not unseen:
            return None
        found = {"power_modes": modes, "gpu_mhz": [min(clocks), max(clocks)] if clocks else None}
        return {**found, "unseen": unseen} if unseen else found

    @property
    def fixed_work_ns(self) -> float:
        """Median time of the same fixed work in all processes that count: what the machine's clock was."""
        return statistics.median(ns for process in self.counted for ns in process.conditions.fixed_work_ns)

    @property
    def seed(self) -> int:
        """Of the order and of every bootstrap, so that the same samples give the same numbers."""
        return int(self.settings["seed"])

    def engine(self, label: str) -> Measured:
        """The processes of one engine that count. Raises UsageError for one that was not measured."""
        found = tuple(process for process in self.counted if process.label == label)
        if not found:
            known = ", ".join(dict.fromkeys(process.label for process in self.processes))
            raise UsageError(f"{label!r} was not measured", why=f"these were: {known}")
        return Measured(label, found)

    def median_interval_ns(self, label: str) -> Interval:
        """95 % bootstrap interval of the median latency, over processes."""
        return median_interval(self.engine(label).medians_ns, self.seed)

    @property
    def noise_floor(self) -> float:
        """What the baseline shows against itself, as ratio minus one: less than this is no difference."""
        ran = self.engine(self.baseline).processes
        first, again = ([p.median_ns for p in ran if p.again is arm] for arm in (False, True))
        return noise_floor(first, again, self.seed)

    def difference(self, label: str, baseline: str | None = None) -> Difference:
        """Median latency of one engine over another's, by default the baseline's, with its interval and the noise floor."""
        theirs = self.engine(self.baseline if baseline is None else baseline).medians_ns
        return difference(self.engine(label).medians_ns, theirs, self.noise_floor, self.seed)
