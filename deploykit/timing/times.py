"""What trtexec measured elsewhere, told and judged like a benchmark as far as its files allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from deploykit.benchmark import trtexec, validity
from deploykit.benchmark.statistics import FEWEST_PROCESSES, STATED, median_interval, percentiles
from deploykit.benchmark.trtexec import Times
from deploykit.errors import UsageError, printable
from deploykit.gate import EXIT_CODES, GateResult, Rule, Timing, judge_time, worst
from deploykit.jsonable import to_json

# Who else ran on that machine, and what its clock did, is not in the files; nor is the machine, which may be another than this.
_UNKNOWN = "of unknown conditions"


def read(names: Sequence[str], rules: Sequence[Rule]) -> dict[str, Any]:
    """What the files of `names` hold, each `FILE` or `ENGINE=FILE`; files of one engine are processes of it.

    Plain JSON values; `machine` is None and `verdict` never `valid`, for the files name neither it nor who else ran there. A rule
    is judged all the same, and its reason says so.

    Raises UsageError for files that are none, for one that is named twice, and for a rule about a slowdown: two files say nothing
    about the noise between them, for nothing was measured twice in random order.
    """
    wrong = [f"'{rule}' compares two engines" for rule in rules if rule.metric != "latency"]
    if wrong:
        why = "nobody measured a noise floor beside these times, and without one no difference can be told"
        raise UsageError("times of trtexec are judged one by one", problems=wrong, why=why, fix="--gate 'latency <= 5 ms'")
    engines = {label: [trtexec.read(path) for path in paths] for label, paths in _by_engine(names).items()}
    gates = [_judged(rule, label, found) for label, found in engines.items() for rule in rules]
    doubts = [doubt for label, found in engines.items() for doubt in _doubts(label, found)]
    return {
        "metric": "trtexec",
        "engines": [_engine(label, found) for label, found in engines.items()],
        "warnings": doubts,
        "verdict": f"invalid: {'; '.join(doubts)}" if doubts else _UNKNOWN,
        "machine": None,
        "gates": [to_json(gate) for gate in gates],
        "exit_code": EXIT_CODES[worst(gate.verdict for gate in gates)],
    }


def _by_engine(names: Sequence[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name in names:
        label, equals, path = name.partition("=")
        # A path may hold an equals sign; what stands before it is an engine where the whole is no file.
        file = Path(path) if equals and not Path(name).exists() else Path(name)
        found.setdefault(label if file != Path(name) else printable(file.stem), []).append(file)
    paths = [path for of_one in found.values() for path in of_one]
    twice = [printable(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if twice:
        raise UsageError("the same times are named twice", problems=twice)
    return found


def _doubts(label: str, found: Sequence[Times]) -> Iterator[str]:
    if len(found) < FEWEST_PROCESSES:
        runs = f"{len(found)} run{'s' * (len(found) > 1)} of trtexec"
        yield f"{label}: {runs}, and an interval takes at least {FEWEST_PROCESSES}: --times {label}=FILE for each"
    yield from validity.drift_inside(label, [times.compute_ns for times in found])


def _judged(rule: Rule, label: str, found: Sequence[Times]) -> GateResult:
    middle = median(times.median_ns for times in found)
    low, high = median_interval([times.median_ns for times in found], seed=0)
    timing = Timing(middle / 1e6, (low / 1e6, high / 1e6), len(found), tuple(_doubts(label, found)))
    judged = judge_time(rule, timing)
    return replace(judged, rule=f"{label}: {judged.rule}", reason=f"{judged.reason}; measured elsewhere, {_UNKNOWN}")


def _engine(label: str, found: Sequence[Times]) -> dict[str, Any]:
    """trtexec's own figures over all queries, and the bound of a percentile that is stated elsewhere, too."""
    copied = [ns for times in found for ns in times.copied_ns]
    interval = median_interval([times.median_ns for times in found], seed=0) if len(found) >= FEWEST_PROCESSES else None
    return {
        "label": label,
        "latency_ns": [list(times.compute_ns) for times in found],
        "median_ns": median(times.median_ns for times in found),
        "interval_ns": None if interval is None else list(interval),
        "copied_ns": median(copied),
        **percentiles([times.compute_ns for times in found]),
        "trtexec_percentiles_ns": {f"p{percent}": trtexec.percentile(copied, percent) for percent in STATED},
        "per_second": median(times.per_second for times in found),
    }
