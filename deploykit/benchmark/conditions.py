"""What the operating system says about a process while it measured: who else ran, who had to wait, what the clock did.

These are causes. An interval over processes cannot see a disturbance that hits all of them alike, and a slow sample does
not say why it is slow; the kernel's own accounts do.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from deploykit.machine import available_cores
from deploykit.telemetry import board, nvml
from deploykit.telemetry.recorder import Recorder

_ROOT = Path("/")
_FIXED_WORK = bytes(1 << 18)  # fits any second-level cache, so that the loop measures the clock and not the memory
_HASHES = 8
_REPEATS = 5
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Conditions:
    """One process's window of measurement. A field is None where this system does not tell.

    cores: cores this process may use. cpu_ns: CPU time it took. waited_ns: how long its threads were ready to run and did
    not. others_ns: CPU time that others took on the same cores. stolen_ns: time the hypervisor took from these cores.
    throttled_ns: time a container's CPU quota stopped it. suspended_ns: time the machine slept. fixed_work_ns: the same
    piece of work on all cores at once, before, between and after. clock_khz: the cores' clocks, as often.
    energy_uj: energy over the window of all CPU packages, or of a Jetson's whole module. throttled: why a Jetson or another GPU
    throttled, by its own files, tegrastats or NVML; power_mode: what nvpmodel set; gpu_mhz: the GPU's clocks under load;
    gpu_unseen: why nobody looked at those of a GPU that was measured.
    """

    cores: int
    wall_ns: int
    cpu_ns: int
    waited_ns: int | None
    others_ns: int | None
    stolen_ns: int | None
    throttled_ns: int | None
    suspended_ns: int
    fixed_work_ns: tuple[int, ...]
    clock_khz: tuple[int, ...]
    energy_uj: int | None
    throttled: tuple[str, ...] = ()
    power_mode: str | None = None
    gpu_mhz: tuple[int, ...] = ()
    gpu_unseen: str = ""

    @property
    def power_w(self) -> float | None:
        """Mean power over the window in watts."""
        return None if self.energy_uj is None else 1e3 * self.energy_uj / self.wall_ns

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Conditions:
        """The inverse of `jsonable.to_json`. Raises KeyError, TypeError or ValueError for what is none."""
        lists = {key: tuple(map(int, value[key])) for key in ("fixed_work_ns", "clock_khz")}
        facts: dict[str, Any] = {"throttled": tuple(map(str, value.get("throttled", ())))}
        facts["gpu_mhz"] = tuple(map(int, value.get("gpu_mhz", ())))
        facts["power_mode"] = None if value.get("power_mode") is None else str(value["power_mode"])
        facts["gpu_unseen"] = str(value.get("gpu_unseen", ""))
        rest = value.keys() - lists.keys() - facts.keys()
        numbers: dict[str, Any] = {key: None if value[key] is None else int(value[key]) for key in rest}
        found = cls(**{**numbers, **lists, **facts})
        if min(found.cores, found.wall_ns, *found.fixed_work_ns) < 1 or not found.fixed_work_ns:
            raise ValueError("these conditions were never measured")
        return found


class Watch:
    """A window of measurement: `with Watch() as watch: ...; watch.look()`, then `watch.conditions`.

    Looking takes some milliseconds of fixed work, so it belongs between measurements and never into them.
    """

    conditions: Conditions

    def __init__(self, root: Path = _ROOT, *, gpu: str | None = None) -> None:
        """`root` stands in for the file system's, so that a test can bring its own /proc and /sys. `gpu` is the place on the PCI
        bus of the GPU that is measured, empty where it is not known; None where none is."""
        self._root = root
        self._recorder = Recorder(root, shutil.which("tegrastats"))
        self._gpu = None if gpu is None or board.is_jetson(root) else nvml.Recorder(gpu)
        self._cores = sorted(os.sched_getaffinity(0))
        self._work: list[int] = []
        self._clocks: list[int] = []

    def __enter__(self) -> Watch:
        self.look()
        self._recorder.__enter__()
        if self._gpu is not None:
            self._gpu.__enter__()
        self._waited = _waited(self._root)
        self._start = _accounts(self._root, self._cores)
        return self

    def look(self) -> None:
        """Do the fixed work once more and read the clocks."""
        self._work.append(fixed_work(len(self._cores)))
        paths = [self._root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in self._cores]
        self._clocks += [clock for clock in map(_number, paths) if clock is not None]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        spent = _spent(self._start, _accounts(self._root, self._cores))
        waited = _waited(self._root)
        self._recorder.__exit__(kind, error, trace)
        seen, gpu = self._recorder.seen, nvml.Seen()
        if self._gpu is not None:
            self._gpu.__exit__(kind, error, trace)
            gpu = self._gpu.seen
        if seen.power_mw is not None:
            spent["energy_uj"] = round(seen.power_mw * spent["wall_ns"] / 1e6)
        self.look()
        # Others' time is what these cores were busy beyond this process; jiffies are coarse, so it can come out below zero.
        busy = spent.pop("busy_ns")
        # Under a container's quota for fewer cores than it sees, the rest of them are other people's, and no disturbance.
        is_shared = available_cores() < len(self._cores)
        others = None if busy is None or is_shared else max(0, busy - (spent["cpu_ns"] or 0))
        self.conditions = Conditions(
            cores=len(self._cores),
            waited_ns=sum(ns - self._waited.get(thread, 0) for thread, ns in waited.items()) if waited else None,
            others_ns=others,
            fixed_work_ns=tuple(self._work),
            clock_khz=tuple(self._clocks),
            throttled=(*seen.throttled, *gpu.throttled),
            power_mode=seen.power_mode,
            gpu_mhz=seen.gpu_mhz or gpu.gpu_mhz,
            gpu_unseen=gpu.unseen,
            **spent,
        )


def fixed_work(cores: int) -> int:
    """Nanoseconds for the same work on each of `cores` cores at once, the slowest of them; the best of a few rounds.

    The best round is blind to a neighbour that comes and goes, which the kernel's accounts show, and sees what stays: a
    lower clock, a neighbour behind the hypervisor.
    """

    def one() -> int:
        start = time.perf_counter_ns()
        for _ in range(_HASHES):
            hashlib.sha256(_FIXED_WORK).digest()  # releases the interpreter's lock
        return time.perf_counter_ns() - start

    with ThreadPoolExecutor(cores) as pool:
        rounds = [max(found.result() for found in [pool.submit(one) for _ in range(cores)]) for _ in range(_REPEATS)]
    return min(rounds)


def core_speeds(cores: Iterable[int], root: Path = _ROOT) -> list[int]:
    """How fast each core is beside the others: its capacity, as kernels with cores of several kinds have it, else its highest
    clock in kHz. Empty where this system tells neither for all of them."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        found = [_number(root / f"sys/devices/system/cpu/cpu{core}/{name}") for core in cores]
        known = [speed for speed in found if speed]
        if known and len(known) == len(found):
            return known
    return []


def peak_bytes(root: Path = _ROOT) -> int:
    """The most memory this process has held so far.

    Not getrusage's ru_maxrss: Linux hands the parent's peak down to what it starts, and the parent may hold torch.
    """
    for line in _read(root / "proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.removesuffix("kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _accounts(root: Path, cores: Iterable[int]) -> dict[str, int | None]:
    """Counters that only grow; the difference of two readings is what happened between them."""
    busy, stolen = _busy_and_stolen(root, set(cores))
    return {
        "wall_ns": time.perf_counter_ns(),
        "cpu_ns": time.process_time_ns(),
        "busy_ns": busy,
        "stolen_ns": stolen,
        "throttled_ns": _throttled(root),
        "suspended_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        "energy_uj": _energy(root),
    }


def _spent(before: Mapping[str, int | None], after: Mapping[str, int | None]) -> dict[str, Any]:
    """A counter that is missing on either side, or ran over its end, tells nothing."""
    found: dict[str, int | None] = {}
    for key, last in after.items():
        first = before[key]
        found[key] = None if first is None or last is None or last < first else last - first
    return {**found, "suspended_ns": found["suspended_ns"] or 0}


def _waited(root: Path) -> dict[str, int]:
    """Time that each of this process's threads spent on a run queue (second field of schedstat, kernel docs sched-stats).

    By thread, for a sum over all of them falls when one ends, as those of the fixed work do.
    """
    found = {path.parent.name: _read(path).split() for path in (root / "proc/self/task").glob("*/schedstat")}
    return {thread: int(fields[1]) for thread, fields in found.items() if fields}


def _busy_and_stolen(root: Path, cores: set[int]) -> tuple[int | None, int | None]:
    """Nanoseconds in which these cores did not idle, and in which the hypervisor ran something else (proc_stat(5))."""
    busy = stolen = seen = 0
    for line in _read(root / "proc/stat").splitlines():
        name, _, rest = line.partition(" ")
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, rest.split()[:8])
            busy += (user + nice + system + irq + softirq) * _TICK_NS
            stolen += steal * _TICK_NS
            seen += 1
    return (busy, stolen) if seen else (None, None)


def _throttled(root: Path) -> int | None:
    """How long a CPU quota held this process's group back (cgroup v2 in microseconds, v1 in nanoseconds)."""
    for path, key, factor in (
        ("sys/fs/cgroup/cpu.stat", "throttled_usec", 1000),
        ("sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 1),
    ):
        for line in _read(root / path).splitlines():
            name, _, value = line.partition(" ")
            if name == key and value.strip().isdigit():
                return int(value) * factor
    return None


def _energy(root: Path) -> int | None:
    """Microjoules of all CPU packages, where the kernel lets this user read them (powercap)."""
    packages = (root / "sys/class/powercap").glob("intel-rapl:?/energy_uj")
    found = [energy for energy in map(_number, packages) if energy is not None]
    return sum(found) if found else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
