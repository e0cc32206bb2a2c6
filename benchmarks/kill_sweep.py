"""SIGKILL at random moments of the demo: does every rerun complete, and is nothing unfinished taken for finished?

usage: python benchmarks/kill_sweep.py [--kills 30] [--recipe recipes/lenet_digits.toml] [--seed 0] [--output DIR]

Each trial starts in an empty folder, kills the whole process group at a moment drawn over 1.05 times the length of an
undisturbed run, checks that every directory with a manifest is a whole, undamaged artifact, and runs again to the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

from _results import write

from deploykit.artifact import MANIFEST, read_artifact
from deploykit.publish import leftovers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "lenet_digits.toml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        start = monotonic()
        if _run(arguments.recipe, Path(scratch, "whole")).wait() != 0:
            sys.exit("the undisturbed run failed")
        length = monotonic() - start
        trials = [
            _trial(arguments.recipe, Path(scratch, str(n)), generator.uniform(0, 1.05 * length)) for n in range(arguments.kills)
        ]
    failures = [trial for trial in trials if trial["problems"]]
    print(f"{len(trials)} kills over {length:.1f} s: {len(failures)} with problems")
    write("kill_sweep", {"length_s": length, "trials": trials}, arguments.output)
    sys.exit(1 if failures else 0)


def _trial(recipe: Path, folder: Path, delay_s: float) -> dict[str, object]:
    child = _run(recipe, folder)
    try:
        child.wait(delay_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    finished = sorted(
        path.parent.name for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.endswith((".partial", ".stale"))
    )
    left = [path.name for path in leftovers(folder)]
    problems = []
    for name in finished:
        try:
            read_artifact(folder / name)
        except Exception as error:  # whatever it is, it is a finding
            problems.append(f"{name}: {error}")
    code = _run(recipe, folder).wait()
    if code != 0:
        problems.append(f"the rerun ended with {code}")
    if leftovers(folder):
        problems.append(f"left behind: {leftovers(folder)}")
    outcome = problems or "rerun complete"
    print(f"killed after {delay_s:5.1f} s: {len(finished)} stages finished, left {left or 'nothing'}; {outcome}", flush=True)
    return {"delay_s": delay_s, "finished": finished, "left": left, "problems": problems}


def _run(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deploykit", "run", str(recipe), "--output", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


if __name__ == "__main__":
    main()
