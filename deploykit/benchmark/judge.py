"""Rules of time, judged on what was measured, in this run or against an earlier one.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit import publish
from deploykit.benchmark import validity
from deploykit.benchmark.report import BenchmarkReport, Measured
from deploykit.benchmark.statistics import Difference, difference
from deploykit.errors import UsageError, printable, translating_os_errors
from deploykit.gate import GateResult, Rule, Timing, judge_time
from deploykit.jsonable import to_json
from deploykit.machine import Machine

_SCHEMA = "deploykit benchmark 1"
_SIZE_LIMIT_BYTES = 64 << 20


def judge(rule: Rule, report: BenchmarkReport, label: str, baseline: str | None = None) -> GateResult:
    """Judge a rule of time on the engine `label`; a slowdown is over `baseline`, by default the report's own.

    Raises UsageError for a label that was not measured.
    """
    if rule.metric == "slowdown":
        return judge_slowdown(rule, report.difference(label, baseline), report.doubts)
    low, high = (bound / 1e6 for bound in report.median_interval_ns(label))
    measured = report.engine(label)
    times = 2 if any(process.again for process in measured.processes) else 1  # the baseline has a second arm
    return judge_time(rule, Timing(measured.median_ns / 1e6, (low, high), len(measured.processes), report.doubts, times))


def judge_slowdown(rule: Rule, found: Difference, doubts: tuple[str, ...]) -> GateResult:
    """Judge a slowdown, in percent, by its interval: never narrower than what the baseline shows against itself."""
    low, high = (100 * (bound - 1) for bound in found.honest_interval)
    return judge_time(rule, Timing(100 * (found.ratio - 1), (low, high), found.processes, doubts))


def judge_since(rule: Rule, report: BenchmarkReport, earlier: BenchmarkReport, label: str) -> GateResult:
    """Judge a slowdown of `label` since an earlier run; when either run is not valid, nothing can be told.

    Raises what `since` raises: UsageError for a label that is not in both, and for runs of two machines or two power modes.
    """
    return judge_slowdown(rule, since(report, earlier, label), doubts_since(report, earlier))


def doubts_since(report: BenchmarkReport, earlier: BenchmarkReport) -> tuple[str, ...]:
    """Why nothing can be told about a difference between two runs: what disturbed either, or the machine's clock in between."""
    clock = validity.other_clock({"in the baseline": earlier.fixed_work_ns, "now": report.fixed_work_ns})
    return (*report.doubts, *(f"in the baseline, {doubt}" for doubt in earlier.doubts), *clock)


def since(report: BenchmarkReport, earlier: BenchmarkReport, label: str) -> Difference:
    """How `label` compares with itself in an earlier run.

    Nothing was shuffled between two runs, so the noise floor is the larger of both.

    Raises UsageError when it is not clear what to compare with, or the earlier run was made on another machine.
    """
    check_same_machine(earlier, report.machine, _modes(report))
    floor = max(report.noise_floor, earlier.noise_floor)
    return difference(report.engine(label).medians_ns, counterpart(earlier, label).medians_ns, floor, report.seed)


def counterpart(earlier: BenchmarkReport, label: str) -> Measured:
    """What `label` is compared with in an earlier run: the engine of that name. Raises UsageError when it has none."""
    names = [engine.label for engine in earlier.engines]
    if label not in names:
        raise UsageError(f"the baseline does not hold {label!r}", why=f"it holds {', '.join(names)}")
    return earlier.engine(label)


def check_same_engine(earlier: BenchmarkReport, label: str, here: Mapping[str, Any]) -> None:
    """Raises UsageError when what was measured under this label in an earlier run was another network, input or build."""
    counterpart(earlier, label)
    there = earlier.settings.get("engines", {}).get(label, {})
    different = [f"{key}: {there.get(key)} there, {value} here" for key, value in here.items() if there.get(key) != value]
    if different:
        raise UsageError(
            f"the baseline's {label!r} is something else", problems=different, fix="measure a baseline of this engine"
        )


def check_same_queries(earlier: BenchmarkReport, settings: Mapping[str, Any]) -> None:
    """Raises UsageError when an earlier run was warmed up otherwise, asked another number of queries, or in another scenario."""
    here = {key: settings.get(key) for key in ("queries", "warmup", "scenario")}
    different = [
        f"{key}: {earlier.settings.get(key)} there, {value} here"
        for key, value in here.items()
        if earlier.settings.get(key) != value
    ]
    if different:
        raise UsageError("the baseline was measured with other settings", problems=different, fix="give the same ones")


def check_same_machine(earlier: BenchmarkReport, here: Machine, modes: Sequence[str]) -> None:
    """Raises UsageError, with what differs, when the earlier run was made on another machine, or in other power `modes` of it."""
    there = earlier.machine
    different = [
        f"{name}: {getattr(there, name)} there, {getattr(here, name)} here"
        for name in ("arch", "cpu", "features", "cores", "gpu")
        if getattr(there, name) != getattr(here, name)
    ]
    if different:
        raise UsageError(
            "the baseline was measured on another machine",
            problems=different,
            fix="measure the baseline here first: deploykit benchmark ENGINE --output FILE",
        )
    if list(modes) != _modes(earlier):
        told = " there, ".join(", ".join(names) or "not known" for names in (_modes(earlier), modes))
        raise UsageError(
            "the baseline was measured in another power mode of this board",
            why=f"{told} here",
            fix="set that mode with nvpmodel, or measure a baseline in this one: deploykit benchmark ENGINE --output FILE",
        )


def _modes(report: BenchmarkReport) -> list[str]:
    """A Jetson's power modes during a run."""
    found: list[str] = (report.board or {}).get("power_modes", [])
    return found


def save(report: BenchmarkReport, path: Path) -> None:
    """Write the raw samples as JSON, whole or not at all. Raises DeploykitError when the file system refuses."""
    with translating_os_errors("write the raw samples", path):
        publish.write_file(path, json.dumps({"schema": _SCHEMA, **_mapping(report)}).encode())


def load(path: Path) -> BenchmarkReport:
    """Read what `save` wrote. Raises UsageError for anything else."""
    try:
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise UsageError(f"{printable(path)} is no benchmark", why=f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content = json.loads(path.read_bytes())
        if content["schema"] != _SCHEMA:
            raise UsageError(
                f"{printable(path)} is of another version", why=f"its schema is {content['schema']!r}, not {_SCHEMA!r}"
            )
        return BenchmarkReport.from_json(content)
    except OSError as error:
        raise UsageError(f"cannot read the baseline {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        fix = "write one with: deploykit benchmark ENGINE --output FILE"
        raise UsageError(f"{printable(path)} is no benchmark", why=why, fix=fix) from error


def _mapping(report: BenchmarkReport) -> dict[str, object]:
    value = to_json(report)
    assert isinstance(value, dict)
    return value
