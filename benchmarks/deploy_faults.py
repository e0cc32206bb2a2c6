"""A kill or an error at every system call of deploying, rolling back and clearing up that changes something on the device.

usage: python benchmarks/deploy_faults.py --fault kill|EIO|ENOSPC [--every 1] [--output DIR]

Three courses run under strace, each in one process that is killed at one call in each trial, or for which this call fails: a
first deployment; an update that is confirmed, rolled back and collected; a trial that runs out. Then: does the current release
open, has it every byte, does it answer as the old or as the new one, and is what was reported there? `recover` has to leave
nothing unfinished and to do nothing when it is run again, and the same commands have to reach the end afterwards. A failing
call has to become an answer with what happened and why, or to do no harm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

import _deployment
from _deployment import WRITES, Ids, Point, Scenario
from _results import write

KILL = "kill"
FAULTS = {KILL: "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
# A call that takes no space on the disk cannot run out of it.
_FREE = ("unlink", "unlinkat", "rmdir", "chmod", "fchmod", "utimensat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=list(FAULTS), default=KILL)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th call")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        courses, ids = _deployment.scenarios(Path(scratch))
        began, trials = monotonic(), []
        for scenario in courses:
            trials += _course(scenario, ids, Path(scratch), arguments.fault, arguments.every)
        seconds = monotonic() - began
    _summary(trials, arguments.fault, seconds)
    write(f"deploy_faults_{arguments.fault.lower()}", {"trials": trials, "seconds": seconds}, arguments.output)
    sys.exit(1 if any(trial["problems"] for trial in trials) else 0)


def _course(scenario: Scenario, ids: Ids, scratch: Path, fault: str, every: int) -> list[dict[str, Any]]:
    root, log = scratch / "root", scratch / "log"
    _deployment.copy(scenario.start, root)
    done = _deployment.run(root, scenario.commands, ("-o", str(log)))
    if done.code or _deployment.outcome(root) != scenario.end:
        sys.exit(f"undisturbed, {scenario.name} failed, or strace may not trace: {done.output}")
    points = [point for point in _deployment.changing(log, root) if fault != "ENOSPC" or point.call not in _FREE]
    return [_trial(scenario, ids, root, point, fault) for point in points[::every]]


def _trial(scenario: Scenario, ids: Ids, root: Path, point: Point, fault: str) -> dict[str, Any]:
    _deployment.copy(scenario.start, root)
    inject = f"inject={point.call}:{FAULTS[fault]}:when={point.number}"
    log = root.with_name("trial")
    done = _deployment.run(root, scenario.commands, ("-o", str(log), "-e", inject))
    problems = _wrong_ending(done.code, done.output, fault)
    if fault != KILL and "(INJECTED)" not in log.read_text():
        problems.append("the call was not reached")
    allowed = _deployment.allowed(scenario)
    outcome = _deployment.outcome(root)
    problems += [] if outcome in allowed else [f"found: {outcome}"]
    told = _deployment.reports(done.output)
    problems += [f"reported and lost: {what}" for what in _deployment.lost(root, told, scenario, ids)]
    wrong, seconds = _deployment.after(root, allowed)
    problems += wrong
    again = _deployment.run(root, scenario.commands)
    if again.code or _deployment.outcome(root) != scenario.end:
        problems.append(f"the same commands do not reach the end afterwards: {again.output[-700:]}")
    return {
        "course": scenario.name,
        "call": f"{point.call} {point.number}",
        "line": point.line[:200],
        "exit_code": done.code,
        "outcome": outcome,
        "recover_s": seconds,
        "problems": problems,
    }


def _wrong_ending(code: int, output: str, fault: str) -> list[str]:
    """What is wrong with how the process ended."""
    if fault == KILL:
        return [] if code else ["the call was not reached"]
    if code == 0:
        return []  # the call was one that can fail without harm; the outcome says whether that is true
    if _deployment.error_of(output) is None:
        return [f"no answer: exit code {code}, {output[-700:]}"]
    return []


def _summary(trials: list[dict[str, Any]], fault: str, seconds: float) -> None:
    bad = [trial for trial in trials if trial["problems"]]
    slowest = max(trial["recover_s"] for trial in trials)
    print(f"{fault}: {len(trials)} trials in {seconds:.0f} s, slowest recover {slowest:.3f} s, with problems: {len(bad)}")
    for course in dict.fromkeys(trial["course"] for trial in trials):
        mine = [trial for trial in trials if trial["course"] == course]
        writes = sum(trial["call"].split()[0] in WRITES for trial in mine)
        found = dict(Counter(trial["outcome"] for trial in mine))
        harmless = sum(trial["exit_code"] == 0 for trial in mine)
        print(f"  {course}: {len(mine)} calls ({writes} writes and fsyncs), outcomes {found}, {harmless} did no harm")
    for trial in bad[:20]:
        print(trial)


if __name__ == "__main__":
    main()
