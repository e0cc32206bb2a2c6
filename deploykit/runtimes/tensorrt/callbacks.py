"""What TensorRT calls: a logger, a progress monitor, a profiler of layers.

TensorRT calls them from threads of its own, and an exception that leaves one of them ends the process. Each must be kept
alive by whoever hands it over, for TensorRT holds no reference to it.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import tensorrt as trt

from deploykit.errors import StageError
from deploykit.progress import Progress

_Made = TypeVar("_Made")
_KEPT = 20  # lines of each kind; a failed build says the reason in its last one or two
_SHOWN = 5
_DEVICES = {"[DlaLayer]": "dla", "[GpuLayer]": "gpu"}  # how the log says what a layer runs on when DLA was asked for


class Log(trt.ILogger):  # type: ignore[misc]  # TensorRT publishes no types
    """Keeps what TensorRT says: where a call fails by returning None, the reason is in the log and nowhere else."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)  # without it the first message ends the process
        self._errors: deque[str] = deque(maxlen=_KEPT)
        self._warnings: deque[str] = deque(maxlen=_KEPT)
        self._devices: dict[str, list[str]] = {name: [] for name in _DEVICES.values()}

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self._errors.append(message.strip())
        elif severity == trt.ILogger.WARNING:
            self._warnings.append(message.strip())
        else:
            for mark, device in _DEVICES.items():
                if mark in message:
                    self._devices[device].append(message.partition(mark)[2].strip())

    def errors(self) -> list[str]:
        """The last ERROR lines, each once, in the order in which they came."""
        return list(dict.fromkeys(self._errors))[-_SHOWN:]

    def warnings(self) -> list[str]:
        """The last WARNING lines, each once."""
        return list(dict.fromkeys(self._warnings))[-_SHOWN:]

    def devices(self) -> Mapping[str, Sequence[str]]:
        """What the log said runs on a DLA core and what on the GPU; nothing where no DLA core was asked for."""
        return self._devices

    def failure(self, what: str, *, fix: str = "") -> StageError:
        """The error for something that TensorRT did not do, with its own last words."""
        said = self.errors()
        return StageError(what, problems=said, why="" if said else "TensorRT gave no reason", fix=fix)

    def made(self, what: str, value: _Made | None) -> _Made:
        """`value`, or StageError where TensorRT returned None for it."""
        if value is None:
            raise self.failure(f"TensorRT made no {what}")
        return value

    @contextmanager
    def constructing(self, what: str) -> Iterator[None]:
        """The bindings raise TypeError when a constructor of TensorRT returns null, and RuntimeError for an exception in it."""
        try:
            yield
        except (TypeError, RuntimeError, MemoryError) as error:
            said = self.errors()
            raise StageError(f"TensorRT made no {what}", problems=said, why="" if said else str(error)) from error


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Passes the progress of a build on, and cancels it.

    Phases nest, and inner ones come and go by the hundred: only the outermost and what is directly in them are shown.
    """

    def __init__(self, progress: Progress, cancelled: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress, self._cancelled = progress, cancelled
        self._lock = threading.Lock()
        self._steps: dict[str, int] = {}
        self._outermost: set[str] = set()
        self.failed: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT."""
        with self._lock:
            if not parent_phase:
                self._outermost.add(phase_name)
            if not parent_phase or parent_phase in self._outermost:
                self._steps[phase_name] = num_steps
                self._tell(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT, which ends the build when this answers False."""
        with self._lock:
            if phase_name in self._steps:
                self._tell(phase_name, step + 1)
        return not self._cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT."""
        with self._lock:
            if phase_name in self._steps:
                self._tell(phase_name, self._steps.pop(phase_name))
            self._outermost.discard(phase_name)

    def _tell(self, phase: str, done: int) -> None:
        try:
            self._progress(f"TensorRT: {phase}", done, self._steps.get(phase, done))
        except BaseException as error:  # must not reach TensorRT, Ctrl-C included; the build raises it when TensorRT has ended
            self.failed = self.failed or error
            self._cancelled.set()


class LayerTimes(trt.IProfiler):  # type: ignore[misc]
    """How long each layer took in each run, in milliseconds, by its name in the engine."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.milliseconds: dict[str, list[float]] = defaultdict(list)

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        """Called by TensorRT."""
        self.milliseconds[layer_name].append(ms)
