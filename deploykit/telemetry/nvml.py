"""What an NVIDIA GPU did over a window: its clocks while it worked and what held them down, by NVIDIA's management library.

It is asked by a program of its own, so that nothing of this runs in the process that measures. A Jetson has tegrastats instead.

This module runs on devices: standard library only, Python 3.10; nvidia-ml-py, where it is installed, is loaded by that program.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

INTERVAL_S = 0.1
HELD = "its clock was held down by "
_PATIENCE_S = 10.0
_ROOT = Path(__file__).absolute().parents[2]  # the folder or zipapp that holds this package
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from deploykit.telemetry import nvml; nvml.main(sys.argv[2])"
# What holds a clock below what it could be, by its name in NVML; a clock that a user fixed, and idling, do not.
_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "its power limit",
    "nvmlClocksEventReasonHwSlowdown": "its hardware, for heat or power",
    "nvmlClocksEventReasonSyncBoost": "the slowest GPU of its group",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat, by the driver",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat, by its hardware",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "the machine's power brake",
}


@dataclass(frozen=True)
class Seen:
    """A window of a GPU: its clocks (MHz) whenever it did not idle, and why what was measured may not be believed; or why nobody
    looked."""

    gpu_mhz: tuple[int, ...] = ()
    throttled: tuple[str, ...] = ()
    unseen: str = ""


class Recorder:
    """`with Recorder(bus_id) as recorder: ...`, then `recorder.seen`. `bus_id` is the GPU's on the PCI bus, as CUDA says it;
    empty for the only one of the machine."""

    seen: Seen

    def __init__(self, bus_id: str) -> None:
        self._bus_id = bus_id

    def __enter__(self) -> Recorder:
        place = _ROOT if _ROOT.is_dir() else _ROOT.parent
        command = [sys.executable, "-c", _PROGRAM, str(_ROOT), self._bus_id]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=place
        )
        assert self._child.stdout is not None
        limit = self._limit()
        self._child.stdout.readline()  # ready, or why not: its start belongs before the window
        limit.cancel()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        limit = self._limit()
        # Not communicate, which passes over what the first readline has read ahead.
        with self._child.stdin, self._child.stdout as answer:
            with suppress(BrokenPipeError):
                self._child.stdin.close()
            told = answer.read()
        self._child.wait()
        limit.cancel()
        try:
            self.seen = judged(json.loads(told))
        except (ValueError, KeyError, TypeError):
            self.seen = Seen(unseen="what asks NVIDIA's management library said nothing")

    def _limit(self) -> threading.Timer:
        """The end of the child's time to answer: a driver may hang."""
        limit = threading.Timer(_PATIENCE_S, self._child.kill)
        limit.start()
        return limit


def judged(told: Mapping[str, Any]) -> Seen:
    """What the numbers of a window mean. Raises KeyError or TypeError for what are none."""
    clocks = tuple(map(int, told["gpu_mhz"]))
    found = [f"{HELD}{_REASONS[name]} in {100 * count / len(clocks):.0f} % of the time" for name, count in told["held"].items()]
    return Seen(clocks, tuple(found), str(told["unseen"]))


def main(bus_id: str) -> None:
    """Say when it is ready, look at the GPU until standard input ends, and tell all in a line of JSON."""
    told: dict[str, Any] = {"gpu_mhz": [], "held": {}, "unseen": ""}
    try:
        import pynvml
    except ImportError:
        told["unseen"] = "nvidia-ml-py is not installed (pip install 'deploykit[gpu]')"
        _say("ready")
    else:
        try:
            _watch(pynvml, bus_id, told)
        except pynvml.NVMLError as error:
            told["unseen"] = f"NVIDIA's management library says: {error}"
    _say(json.dumps(told))


def _watch(nvml: Any, bus_id: str, told: dict[str, Any]) -> None:
    """Fill in what is seen. Raises NVMLError where there is no driver, no such GPU, or one that does not tell."""
    try:
        nvml.nvmlInit()
        if not bus_id and (count := nvml.nvmlDeviceGetCount()) != 1:
            told["unseen"] = f"which of {count} GPUs was measured is not known"
            return
        gpu = nvml.nvmlDeviceGetHandleByPciBusId(bus_id) if bus_id else nvml.nvmlDeviceGetHandleByIndex(0)
        nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    finally:
        _say("ready")
    bits, held = {name: getattr(nvml, name) for name in _REASONS}, Counter[str]()
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        clock, reasons = nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM), nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        if reasons & nvml.nvmlClocksEventReasonGpuIdle:
            continue
        told["gpu_mhz"].append(clock)
        held.update(name for name, bit in bits.items() if reasons & bit)
    told["held"] = dict(held)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
