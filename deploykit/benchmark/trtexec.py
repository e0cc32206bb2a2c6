"""Times as `trtexec --exportTimes` writes them, read and written: one JSON object for each query of one process.

Its definitions (NVIDIA TensorRT, samples/common/sampleReporting.cpp, 10.3): computeMs is what CUDA events around the enqueued
work say, latencyMs = h2dMs + computeMs + d2hMs, and throughput is the number of queries over the time from the first copy to the
device until the last copy back, over all streams. A query is one batch.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deploykit import publish
from deploykit.errors import UsageError, printable, translating_os_errors

_PHASES = ("Enq", "H2d", "Compute", "D2h")
_KEYS = ("computeMs", "latencyMs", "h2dMs", "d2hMs", "startH2dMs", "endD2hMs")
_SIZE_LIMIT_BYTES = 256 << 20
_LONGEST_MS = 1e10  # a hundred days
# Both ways to round are seen in its files: numbers have six significant digits.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Times:
    """The queries of one process, in nanoseconds, in the order in which they ran.

    compute_ns is what our reports call latency, copied_ns holds the copies too (trtexec's latency). wall_ns is the time from the
    first copy to the device until the last copy back.
    """

    compute_ns: tuple[int, ...]
    copied_ns: tuple[int, ...]
    wall_ns: int

    @property
    def median_ns(self) -> float:
        """Median compute time."""
        return median(self.compute_ns)

    @property
    def per_second(self) -> float:
        """Queries a second, by trtexec's definition: more than one over the latency where queries overlap."""
        return len(self.compute_ns) / (self.wall_ns / 1e9)


def percentile(values: Sequence[float], percent: float) -> float:
    """trtexec's percentile: a value that was measured, by nearest rank and in single precision, as it computes it."""
    ordered = sorted(values)
    above = int((np.float32(1) - np.float32(percent) / np.float32(100)) * np.float32(len(ordered)))
    return ordered[max(len(ordered) - 1 - above, 0)]


def read(path: Path) -> Times:
    """Read a file of `trtexec --exportTimes`. Raises UsageError, with the first query that is wrong, for anything else."""
    try:
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise ValueError(f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, list) or not content:
            raise ValueError("it is no list of queries, or an empty one")
        queries = [_query(number, value) for number, value in enumerate(content)]
    except OSError as error:
        raise UsageError(f"cannot read the times {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:
        fix = "write one with: trtexec --loadEngine=ENGINE --exportTimes=FILE"
        raise UsageError(f"{printable(path)} holds no times of trtexec", why=str(error), fix=fix) from error
    wall = max(query["endD2hMs"] for query in queries) - min(query["startH2dMs"] for query in queries)
    if wall <= 0:
        raise UsageError(f"{printable(path)} holds no times of trtexec", why="its queries took no time at all")
    compute, copied = (tuple(max(1, round(1e6 * query[key])) for query in queries) for key in ("computeMs", "latencyMs"))
    return Times(compute, copied, round(1e6 * wall))


def write(path: Path, compute_ns: Sequence[int], copied_ns: Sequence[int], fed_ns: Sequence[int]) -> None:
    """Write queries that ran one after the other as trtexec does; `fed_ns` are the copies to the device.

    Time between queries was not measured, so each starts when the one before it ended. What was enqueued was waited for, so
    that enqueuing takes as long as computing.
    """
    with translating_os_errors("write the times", path):
        publish.write_file(path, json.dumps(list(_rows(compute_ns, copied_ns, fed_ns)), indent=1).encode())


def _rows(compute_ns: Sequence[int], copied_ns: Sequence[int], fed_ns: Sequence[int]) -> Iterable[dict[str, float]]:
    now = 0
    for compute, copied, fed in zip(compute_ns, copied_ns, fed_ns, strict=True):
        moments = (now, now + fed, now + fed + compute, now + copied)
        spans = {"H2d": moments[:2], "Compute": moments[1:3], "Enq": moments[1:3], "D2h": moments[2:]}
        row = {f"{edge}{phase}Ms": spans[phase][end] / 1e6 for phase in _PHASES for end, edge in enumerate(("start", "end"))}
        row |= {
            f"{name}Ms": (spans[phase][1] - spans[phase][0]) / 1e6
            for name, phase in zip(("h2d", "compute", "d2h"), _PHASES[1:], strict=True)
        }
        yield {**row, "latencyMs": copied / 1e6}
        now += copied


def _query(number: int, value: Any) -> Mapping[str, float]:
    """One query, checked. Raises ValueError that says which is wrong."""
    if not isinstance(value, Mapping):
        raise ValueError(f"query {number} is no object")
    missing = [key for key in _KEYS if key not in value]
    if missing:
        raise ValueError(f"query {number} has no {', '.join(missing)}")
    wrong = [key for key in _KEYS if not _is_time(value[key])]
    if wrong or value["computeMs"] <= 0:
        raise ValueError(f"query {number} has a time that nobody measured: {', '.join(wrong or ['computeMs'])}")
    parts = value["h2dMs"] + value["computeMs"] + value["d2hMs"]
    if abs(parts - value["latencyMs"]) > _ROUNDING * (1 + value["latencyMs"]):
        raise ValueError(f"query {number}: its latency of {value['latencyMs']} ms is not the sum of its parts, {parts:g} ms")
    return {key: float(value[key]) for key in _KEYS}


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and 0 <= value <= _LONGEST_MS
