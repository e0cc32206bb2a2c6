"""What a board did over a window: two looks at its files, and tegrastats in between, as a program of its own.

tegrastats writes into a file that is read after the window, so that nothing of this runs in the process that measures.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO

from deploykit.telemetry import board, tegrastats, throttling
from deploykit.telemetry.tegrastats import Sample

_ROOT = Path("/")
INTERVAL_MS = 100
_LARGEST_BYTES = 64 << 20  # a day of lines
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Seen:
    """A window of a board: nothing where this is no Jetson. `power_mw` is the mean of what the whole module took.

    `throttled` are the reasons not to believe what was measured in it, `gpu_mhz` its clocks while the GPU was busy.
    """

    power_mode: str | None = None
    gpu_mhz: tuple[int, ...] = ()
    power_mw: float | None = None
    throttled: tuple[str, ...] = ()


class Recorder:
    """`with Recorder() as recorder: ...`, then `recorder.seen`. `tool` is tegrastats' path, None where there is none."""

    seen: Seen

    def __init__(self, root: Path = _ROOT, tool: str | None = None) -> None:
        self._root, self._tool = root, tool
        self._lines: IO[str] | None = None
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Recorder:
        self._before = board.look(self._root)
        if self._tool is not None and board.is_jetson(self._root):
            self._lines = TemporaryFile("w+", errors="replace")
            command = [self._tool, "--interval", str(INTERVAL_MS)]
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=self._lines, stderr=subprocess.DEVNULL, text=True
                )
            except OSError:  # a file of that name that is no program
                self._child = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        samples = self._samples()
        after = board.look(self._root)
        busy = throttling.busy(samples)
        clocks = tuple(sample.gpu_mhz for sample in busy if sample.gpu_mhz)
        if not clocks and after.gpu_hz:
            clocks = (round(after.gpu_hz / 1e6),)
        powers = [tegrastats.total_mw(sample.power_mw) for sample in busy]
        rails = [tegrastats.total_mw(state.power_mw) for state in (self._before, after)]
        known = [power for power in powers if power is not None] or [power for power in rails if power is not None]
        self.seen = Seen(
            power_mode=board.named_mode(self._root),
            gpu_mhz=clocks,
            power_mw=mean(known) if known else None,
            throttled=(*throttling.of_samples(samples), *throttling.between(self._before, after)),
        )

    def _samples(self) -> list[Sample]:
        if self._lines is None:
            return []
        with self._lines:
            if self._child is not None:
                self._child.terminate()
                try:
                    self._child.wait(_PATIENCE_S)
                except subprocess.TimeoutExpired:
                    self._child.kill()
                    self._child.wait()
            self._lines.seek(0)
            return list(tegrastats.samples(self._lines.read(_LARGEST_BYTES).splitlines()))
