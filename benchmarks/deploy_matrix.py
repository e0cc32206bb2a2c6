"""Every state of a deployment x {error, kill once, kill for ever, hang, disk full}: which release answers, and what happens next.

usage: python benchmarks/deploy_matrix.py [--faults "disk full" ...] [--output DIR]

The faults come by strace at the call that makes the state. Kill for ever: five attempts, each killed when it comes there. Hang:
the call does not return; meanwhile the current release has to answer and another command has to be refused, and then the
process is killed as a line that was cut or a watchdog would. Disk full: from this call on, nothing can be written any more.
After each, the same commands have to reach the end.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _deployment
from _deployment import CALLS, Ids, Point, Scenario
from _results import write

ATTEMPTS = 5
HANG_S = 600
FREE = ("unlink", "unlinkat", "rmdir", "chmod", "fchmod", "utimensat", "fsync", "fdatasync")


@dataclass(frozen=True)
class State:
    """A state by its name in words, the course it is in, and the call that makes it: a pattern and which of its matches."""

    name: str
    course: str
    pattern: str
    number: int = 1


STATES = (
    State("install: the root is taken", "update", r"write\(\d+<ROOT/\.lock>"),
    State("install: files are written", "update", r"write\(\d+<ROOT/releases/\w+\.partial/"),
    State("install: the release gets its name", "update", r'rename\("ROOT/releases/\w+\.partial"'),
    State("build: the engine is written", "update", r"p?write(64)?\(\d+<ROOT/engines/.*\.partial/"),
    State("build: the engine gets its name", "update", r'rename\("ROOT/engines/'),
    State("parity: what it said is written", "update", r'rename\("ROOT/health/'),
    State("activate: what is meant is written", "update", r'rename\("ROOT/state\.json\.partial"'),
    State("activate: the way back is made", "update", r'rename\("ROOT/previous\.partial"'),
    State("activate: the switch", "update", r'rename\("ROOT/current\.partial"'),
    State("activate: the trial begins", "update", r'rename\("ROOT/state\.json\.partial"', 2),
    State("confirm", "update", r'rename\("ROOT/state\.json\.partial"', 3),
    State("rollback: what is meant is written", "update", r'rename\("ROOT/state\.json\.partial"', 4),
    State("rollback: the switch", "update", r'rename\("ROOT/current\.partial"', 2),
    State("rollback: no way back any more", "update", r'unlink\("ROOT/previous"'),
    State("collect-garbage: a release loses its name", "update", r'rename\("ROOT/releases/\w+", "ROOT/releases/\w+\.stale"'),
    State("recover: a trial that ran out goes back", "trial", r'rename\("ROOT/current\.partial"', 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        courses, ids = _deployment.scenarios(Path(scratch))
        traced = {scenario.name: _traced(scenario, Path(scratch)) for scenario in courses if scenario.name != "first"}
        for state in STATES:
            scenario = next(found for found in courses if found.name == state.course)
            points = traced[state.course]
            place = [at for at, point in enumerate(points) if re.match(state.pattern, point.line)][state.number - 1]
            for fault in arguments.faults:
                cause, root = FAULTS[fault], Path(scratch, "root")
                _deployment.copy(scenario.start, root)
                problems = cause(scenario, ids, root, points, place)
                outcome = _deployment.outcome(root)
                right = _deployment.allowed(scenario)
                problems += [] if outcome in right else [f"found: {outcome}"]
                wrong, seconds = _deployment.after(root, right)
                again = _deployment.run(root, scenario.commands)
                if again.code or _deployment.outcome(root) != scenario.end:
                    problems.append(f"the same commands do not reach the end afterwards: {again.output[-500:]}")
                cell = {"state": state.name, "fault": fault, "outcome": outcome, "recover_s": seconds}
                rows.append({**cell, "problems": problems + wrong})
            print(_line(state.name, [row for row in rows if row["state"] == state.name]), flush=True)
    bad = [row for row in rows if row["problems"]]
    print(f"{len(rows)} cells, with problems: {len(bad)}, slowest recover {max(row['recover_s'] for row in rows):.3f} s")
    for row in bad:
        print(row)
    write("deploy_matrix", {"cells": rows}, arguments.output)
    sys.exit(1 if bad else 0)


def _traced(scenario: Scenario, scratch: Path) -> list[Point]:
    root, log = scratch / "root", scratch / "log"
    _deployment.copy(scenario.start, root)
    done = _deployment.run(root, scenario.commands, ("-o", str(log)))
    if done.code:
        sys.exit(f"undisturbed, {scenario.name} failed: {done.output}")
    return _deployment.changing(log, root)


def _error(scenario: Scenario, ids: Ids, root: Path, points: list[Point], place: int) -> list[str]:
    point = points[place]
    done = _deployment.run(root, scenario.commands, _inject(root, f"{point.call}:error=EIO:when={point.number}"))
    problems = [] if done.code == 0 or _deployment.error_of(done.output) else [f"no answer: {done.output[-500:]}"]
    return problems + _deployment.lost(root, _deployment.reports(done.output), scenario, ids)


def _kill(scenario: Scenario, ids: Ids, root: Path, points: list[Point], place: int) -> list[str]:
    point = points[place]
    done = _deployment.run(root, scenario.commands, _inject(root, f"{point.call}:signal=KILL:when={point.number}"))
    problems = [] if done.code < 0 else ["it was not killed"]
    return problems + _deployment.lost(root, _deployment.reports(done.output), scenario, ids)


def _kill_for_ever(scenario: Scenario, ids: Ids, root: Path, points: list[Point], place: int) -> list[str]:
    point = points[place]
    path = _first_path(point)
    # As strace's -P has it: the first path of a call, as a whole.
    count = sum(other.call == point.call and _first_path(other) == path for other in points[: place + 1])
    only = ("-P", path.replace("ROOT", str(root)))
    killed = 0
    for _ in range(ATTEMPTS):
        options = (*_inject(root, f"{point.call}:signal=KILL:when={count}"), *only)
        killed += _deployment.run(root, scenario.commands, options).code < 0
        if (outcome := _deployment.outcome(root)) not in _deployment.allowed(scenario):
            return [f"between attempts: {outcome}"]
    return [] if killed else ["it was never killed"]


def _first_path(point: Point) -> str:
    found = re.search(r"ROOT[^\">,]*", point.line)
    return "" if found is None else found[0]


def _hang(scenario: Scenario, ids: Ids, root: Path, points: list[Point], place: int) -> list[str]:
    point = points[place]
    options = _inject(root, f"{point.call}:delay_enter={HANG_S}s:when={point.number}")
    problems = []
    with _deployment.started(root, scenario.commands, options) as process:
        until = time.monotonic() + 20
        calls = Counter(other.call for other in points[:place])
        while time.monotonic() < until and not process.has_ended:
            log = root.with_name("trial").read_text() if root.with_name("trial").exists() else ""
            if len(re.findall(rf"^\d+ +{point.call}\(", log, re.MULTILINE)) >= point.number - 1:
                break
            time.sleep(0.02)
        time.sleep(0.5)  # strace writes the line of a call when it returns, and this one does not
        if process.has_ended:
            problems.append(f"it did not hang, after {sum(calls.values())} calls")
        if (outcome := _deployment.outcome(root)) not in _deployment.allowed(scenario):
            problems.append(f"while it hangs: {outcome}")
        other = _deployment.run(root, [("collect-garbage",)])
        error = _deployment.error_of(other.output)
        if error is None or "is being changed by another process" not in error["what"]:
            problems.append(f"another command was not refused: {other.output[-300:]}")
        told = _deployment.reports(process.output)
    return problems + _deployment.lost(root, told, scenario, ids)


def _disk_full(scenario: Scenario, ids: Ids, root: Path, points: list[Point], place: int) -> list[str]:
    """All calls from this one on that take space fail; the numbers of those before are left alone."""
    options: list[str] = []
    for call in {point.call for point in points} - set(FREE):
        before = [point.number for point in points[:place] if point.call == call]
        # Reading files is `openat` too, so nothing but the calls below the root may be counted: the first that is known.
        later = [point.number for point in points[place:] if point.call == call]
        if later and call != "openat":
            options += _inject(root, f"{call}:error=ENOSPC:when={max([*before, later[0] - 1]) + 1}+")[2:]
    done = _deployment.run(root, scenario.commands, ("-o", str(root.with_name("trial")), *options))
    problems = [] if done.code == 0 or _deployment.error_of(done.output) else [f"no answer: {done.output[-500:]}"]
    return problems + _deployment.lost(root, _deployment.reports(done.output), scenario, ids)


def _inject(root: Path, what: str) -> tuple[str, ...]:
    return ("-o", str(root.with_name("trial")), "-e", f"inject={what}")


FAULTS: dict[str, Callable[[Scenario, Ids, Path, list[Point], int], list[str]]] = {
    "error": _error,
    "kill once": _kill,
    "kill for ever": _kill_for_ever,
    "hang": _hang,
    "disk full": _disk_full,
}


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    return f"| {name} | " + " | ".join(row["outcome"] if not row["problems"] else "WRONG" for row in rows) + " |"


if __name__ == "__main__":
    assert set(FREE) - {"fdatasync"} <= set(CALLS)
    main()
