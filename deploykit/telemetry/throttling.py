"""Whether a board throttled while something was measured on it: from samples of tegrastats, or from two looks at its files.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat
from statistics import median

from deploykit.telemetry.board import State
from deploykit.telemetry.tegrastats import Sample

HOTTEST_C = 85.0  # NVIDIA's boards throttle in software a few degrees above (Jetson thermal design guides)
_BUSY_PERCENT = 50  # an idle GPU lowers its clock, which is no throttling
_SLOWER = 0.97  # one step of the clock table is 5 % and more


def busy(samples: Sequence[Sample]) -> list[Sample]:
    """Those in which the GPU worked, or where it is not said whether it did."""
    return [sample for sample in samples if sample.gpu_percent is None or sample.gpu_percent >= _BUSY_PERCENT]


def of_samples(samples: Sequence[Sample], locked_mhz: float | None = None) -> list[str]:
    """Why a run may not be believed; empty when nothing speaks against it.

    `locked_mhz` is the clock that jetson_clocks pinned; without it the highest clock so far stands in, so that a clock that falls
    on the way is seen, and one that still rises is not.
    """
    clocks = [sample.gpu_mhz for sample in busy(samples) if sample.gpu_mhz]
    found = []
    most = locked_mhz or max(clocks, default=0)
    before = accumulate(clocks, max) if locked_mhz is None else repeat(locked_mhz)
    slow = [clock for clock, highest in zip(clocks, before, strict=False) if clock < _SLOWER * highest]
    if slow:
        share = 100 * len(slow) / len(clocks)
        found.append(f"the GPU's clock fell from {most:.0f} to {median(slow):.0f} MHz in {share:.0f} % of the busy time")
    hottest = max((sample.hottest_c for sample in samples if sample.hottest_c is not None), default=0.0)
    if hottest > HOTTEST_C:
        found.append(f"the board was at {hottest:.0f} degrees, and throttles above {HOTTEST_C:.0f}")
    return found


def between(before: State, after: State) -> list[str]:
    """Why a run between two looks may not be believed: over-current events, heat, a clock below its limit."""
    found = [
        f"{count} over-current events ({name.removesuffix('_event_cnt')})" for name, count in after.events_since(before).items()
    ]
    hottest = max(after.temperatures_c.values(), default=0.0)
    if hottest > HOTTEST_C:
        found.append(f"the board was at {hottest:.0f} degrees, and throttles above {HOTTEST_C:.0f}")
    if before.gpu_most_hz and after.gpu_most_hz and after.gpu_most_hz < _SLOWER * before.gpu_most_hz:
        found.append(f"the GPU's highest clock fell from {before.gpu_most_hz / 1e6:.0f} to {after.gpu_most_hz / 1e6:.0f} MHz")
    return found
