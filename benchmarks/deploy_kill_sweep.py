"""SIGKILL at every system call of install, build, parity, activate and rollback that changes something on the device.

usage: python benchmarks/deploy_kill_sweep.py [--every 1] [--output DIR]

A release that adds runs; one that multiplies is deployed and rolled back, in one process under strace, killed at one call in
each trial. Then: does the current release open, has it every byte, and does it answer as the old or as the new one? `recover`
has to leave nothing unfinished, to do nothing when it is run again, and the same commands have to reach the end afterwards.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import numpy as np
from _results import write

from deploykit import bundle, infer, slots
from deploykit.artifact import digest_file
from deploykit.bundle import pack
from deploykit.slots import Moment

CALLS = ("mkdir", "openat", "write", "pwrite64", "sendfile", "copy_file_range", "ftruncate", "fsync")
NAMES = (
    "rename",
    "renameat",
    "renameat2",
    "link",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "rmdir",
    "chmod",
    "fchmod",
    "utimensat",
)
PIXELS = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
WORK = """
import io, json, sys
from contextlib import redirect_stdout
from deploykit import agent
root, path = sys.argv[1:]
def run(*words):
    out = io.StringIO()
    with redirect_stdout(out):
        code = agent.run([*words, "--root", root])
    if code:
        sys.exit(out.getvalue())
    return json.loads(out.getvalue())
id = run("install", path)["id"]
for verb in ("build", "parity", "activate"):
    run(verb, id)
if run("status")["previous"]:
    run("rollback")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th call")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        tests = importlib.import_module("test_bundle")
        recipe = tests.RECIPE.replace('gate = ["latency <= 500 ms"]', "gate = []")
        old, new = (
            pack.pack(tests.tiny_run(folder / op, op=op, recipe=recipe), folder / f"{op}.bundle", release=number).path
            for number, op in enumerate(("Add", "Mul"), 1)
        )
        start, root = folder / "start", folder / "root"
        _run(start, old, ())
        shutil.copytree(start, root, symlinks=True)
        log = folder / "log"
        if _run(root, new, ("-o", str(log))) != 0:
            sys.exit("the undisturbed deployment failed, or strace may not trace")
        points = _changing(log, root)[:: arguments.every]
        began = monotonic()
        trials = [_trial(start, root, new, name, number) for name, number in points]
    seconds = monotonic() - began
    outcomes = Counter(str(trial["outcome"]) for trial in trials)
    recover = max(float(str(trial["recover_s"])) for trial in trials)
    bad = [trial for trial in trials if trial["outcome"] not in ("old", "new") or trial["problems"]]
    print(f"{len(trials)} kills in {seconds:.0f} s: {dict(outcomes)}; with problems: {len(bad)}; slowest recover {recover:.3f} s")
    for trial in bad[:20]:
        print(trial)
    write("deploy_kill_sweep", {"trials": trials, "seconds": seconds}, arguments.output)
    sys.exit(1 if bad else 0)


def _run(root: Path, path: Path, options: Sequence[str], command: Sequence[str] = ()) -> int:
    if options:
        command = ["strace", "-f", "-qq", "-y", "-s", "0", "-e", f"trace={','.join(CALLS + NAMES)}", *options]
    words = [*command, sys.executable, "-B", "-c", WORK, str(root), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode > 0 and "-o" not in options:
        print(done.stderr[-500:])
    return done.returncode


def _changing(log: Path, root: Path) -> list[tuple[str, int]]:
    """Every call of the first process that changes something below `root`: its name and number among those of that name."""
    lines = log.read_text().splitlines()
    first = lines[0].split()[0]
    counts: Counter[str] = Counter()
    found = []
    for line in lines:
        process, _, call = line.partition(" ")
        name = call.strip().partition("(")[0]
        if process != first or not name.isidentifier():
            continue
        counts[name] += 1
        if str(root) in call and (name != "openat" or "O_CREAT" in call):
            found.append((name, counts[name]))
    return found


def _trial(start: Path, root: Path, new: Path, name: str, number: int) -> dict[str, object]:
    shutil.rmtree(root)
    shutil.copytree(start, root, symlinks=True)
    code = _run(root, new, ("-o", "/dev/null", "-e", f"inject={name}:signal=KILL:when={number}"))
    problems = [] if code != 0 else ["the call was not reached"]
    outcome = _outcome(root)
    began = monotonic()
    slots.recover(root, Moment.now())
    recover_s = monotonic() - began
    if _outcome(root) not in ("old", "new"):
        problems.append(f"after recover: {_outcome(root)}")
    if slots.recover(root, Moment.now()):
        problems.append("recover is not done after it was run")
    if slots.read_state(root).doing is not None:
        problems.append("something is still being done")
    left = [path.name for path in root.rglob("*") if path.name.endswith((".partial", ".stale"))]
    problems += [f"left behind: {left}"] if left else []
    if _run(root, new, ()) != 0 or _outcome(root) != "old":
        problems.append("the same commands do not reach the end afterwards")
    return {"call": f"{name} {number}", "outcome": outcome, "recover_s": recover_s, "problems": problems}


def _outcome(root: Path) -> str:
    """Which release answers: "old", "new", or what is wrong with it."""
    try:
        folder = (root / slots.CURRENT).resolve(strict=True)
        manifest = bundle.parse((folder / bundle.MANIFEST).read_bytes(), "it")
        changed = [name for name, blob in manifest.files.items() if digest_file(folder / name) != blob.sha256]
        opened = infer.open_current(root)
        answer = json.dumps(np.asarray(infer.answer(opened, PIXELS)).tolist())
        opened.close()
    except Exception as error:  # whatever it is, it is a finding
        return f"{type(error).__name__}: {error}"
    if changed or opened.id != manifest.id:
        return f"torn: {changed}"
    answers = {json.dumps((PIXELS + PIXELS).tolist()): "old", json.dumps((PIXELS * PIXELS).tolist()): "new"}
    return answers.get(answer, f"answers {answer}")


if __name__ == "__main__":
    main()
