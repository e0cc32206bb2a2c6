"""Numbers as people read them: a sensible unit, three significant digits, and words where there is no number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor, isfinite, isinf, log10
from typing import Any

NOT_MEASURED = "not measured"
REFERENCE = " graph on the reference"  # behind the label of an engine that cannot be built here

_MEASURES = {
    "mean_iou": "mean IoU",
    "least_iou": "least IoU",
    "score_difference": "largest difference of scores",
    "mask_iou": "mean IoU of masks",
    "keypoint_distance": "mean distance of keypoints as a share of the box",
}
_MINUS = "\N{MINUS SIGN}"  # a hyphen is shorter, and lines break after it
_SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line

_DURATIONS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def number(value: float | None) -> str:
    """Three significant digits, without an exponent from 0.0001 to 9,990,000."""
    if value is None or not isfinite(value):
        return NOT_MEASURED
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")  # 9.996 has to be seen as 10.0 before the decimals are counted
    if not 1e-4 <= abs(rounded) < 1e7:
        return f"{rounded:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("-", _MINUS)
    return _minus(f"{rounded:,.{max(0, 2 - floor(log10(abs(rounded))))}f}")


def count(value: int | None) -> str:
    """A whole number, exactly."""
    return NOT_MEASURED if value is None else f"{value:,}"


def plural(value: int, noun: str, ending: str = "s") -> str:
    """`1 image`, `2 images`."""
    return f"{value:,} {noun}{'' if value == 1 else ending}"


def duration(nanoseconds: float | None) -> str:
    """A latency."""
    return _scaled(nanoseconds, _DURATIONS)


def milliseconds(value: float | None) -> str:
    """A latency in the unit that gate rules have."""
    return NOT_MEASURED if value is None or not isfinite(value) else f"{number(value)}{_SPACE}ms"


def duration_unit(nanoseconds: float) -> tuple[float, str]:
    """The unit in which this latency reads best, as (nanoseconds in it, its name)."""
    return _unit(nanoseconds, _DURATIONS)


def seconds(value: float | None) -> str:
    """How long a stage took."""
    if value is None or not isfinite(value) or value < 120:
        return _scaled(None if value is None else value * 1e9, _DURATIONS)
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    return text.replace(" ", _SPACE)


def size(value: float | None) -> str:
    """Bytes in powers of 1000, as disks and downloads count."""
    return _scaled(value, _SIZES)


def memory(value: float | None) -> str:
    """Bytes in GiB, as memory is sold."""
    return NOT_MEASURED if value is None else f"{number(value / 2**30)}{_SPACE}GiB"


def percent(share: float | None) -> str:
    """A share of 1 with two decimals; what is not all of it never reads 100 %, and what is not nothing never 0 %."""
    if share is None or not isfinite(share):
        return NOT_MEASURED
    text = f"{100 * share:.2f}"
    if text == "100.00":
        text = "100" if share >= 1 else f">{_SPACE}99.99"
    elif text == "0.00":
        text = "0" if share <= 0 else f"<{_SPACE}0.01"
    return f"{text}{_SPACE}%"


def change(percent: float | None) -> str:
    """A difference in percent with two decimals; less than nothing is negative."""
    if percent is None or not isfinite(percent):
        return NOT_MEASURED
    return f"{_minus(f'{round(percent, 2) + 0.0:.2f}')}{_SPACE}%"


def points(value: float | None) -> str:
    """Percentage points with two decimals."""
    if value is None or not isfinite(value):
        return NOT_MEASURED
    return f"{_minus(f'{round(value, 2) + 0.0:.2f}')}{_SPACE}points"  # adding zero turns -0.0 into 0.0


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; infinite when nothing differs."""
    if value is not None and isinf(value) and value > 0:
        return f"∞{_SPACE}(identical)"
    return NOT_MEASURED if value is None or not isfinite(value) else f"{_minus(f'{value:.1f}')}{_SPACE}dB"


def cosine(value: float | None) -> str:
    """A cosine similarity: its interesting digits come after many nines."""
    return NOT_MEASURED if value is None or not isfinite(value) else _minus(f"{value:.6f}")


def interval(bounds: Sequence[float] | None, unit: Callable[[float], str]) -> str:
    """`low to high`, each written by `unit`; the unit's name is not repeated."""
    if bounds is None or len(bounds) != 2 or not all(isfinite(bound) for bound in bounds):
        return NOT_MEASURED
    low, high = unit(bounds[0]), unit(bounds[1])
    plain, _, name = low.rpartition(_SPACE)
    return f"{plain if plain and high.endswith(_SPACE + name) else low} to {high}"


def _scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    if value is None or not isfinite(value):
        return NOT_MEASURED
    factor, name = _unit(value, units)
    return f"{number(value / factor)}{_SPACE}{name}"


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    rounded = abs(float(f"{value:.2e}"))  # 999.9 kB is 1.00 MB
    return next(((factor, name) for factor, name in units if rounded >= factor), units[-1])


def _minus(text: str) -> str:
    return text.replace("-", _MINUS)


def percentiles_of(engines: Iterable[Mapping[str, Any]]) -> str:
    """What bounds of percentiles are about: the slowest process, or only the queries that were measured."""
    known = {name for engine in engines for name in engine.get("percentiles_pooled") or ()}
    pooled = [name for name in ("p90", "p99") if name in known]
    if not pooled:
        return "upper bounds (99 %) of the slowest process"
    which = f"{' and '.join(pooled)} of the queries measured, as one process has too few"
    return f"upper bounds (99 %): {which} (a p90 takes 64, p95 130, p99 662), else of the slowest process"


def told(ratio: Mapping[str, Any], benchmark: Mapping[str, Any]) -> str:
    """What a ratio of latencies in a benchmark says, in words."""
    if ratio.get("different"):
        return "different"
    if any(benchmark.get(key) not in (None, "valid") for key in ("verdict", "baseline_verdict")):
        return "invalid run"
    return f"cannot be told: {'; '.join(ratio['why'])}" if ratio.get("why") else "no difference can be told"


def decided_otherwise(case: Mapping[str, Any]) -> str:
    """`2 of 500 images`; of what is about parts of pictures, `2 of 10,240 pixels`."""
    if "parts" in case:
        return f"{case['disagreement_count']:,} of {case['parts']:,} {case['units']}"
    return f"{case['disagreement_count']} of {case['images']} images"


def of_parts(case: Mapping[str, Any]) -> str:
    """What was measured beside the share of pixels or boxes that are decided alike."""
    measures = case["measures"]
    told = [f"{words} {measures[name]:.4g}" for name, words in _MEASURES.items() if measures.get(name) is not None]
    return ", ".join([f"agreement {100 * case['agreement']:.3f} %", *told])
