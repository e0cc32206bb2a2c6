"""What the fault benchmarks deploy, which system calls of it change something, and how a device is judged afterwards.

A release that adds runs; one that multiplies is deployed. Each carries three megabytes of timing cache, so that writing takes
more than one call. Everything runs by the commands of the device half.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from deploykit import agent, bundle, infer, slots
from deploykit.artifact import digest_file, read_artifact
from deploykit.bundle import pack

WRITES = ("write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate", "fsync", "fdatasync")
NAMES = (
    *("mkdir", "mkdirat", "openat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "rmdir", "chmod", "fchmod", "utimensat"),
)
CALLS = WRITES + NAMES
PIXELS = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
OLD, NEW, NONE = "old", "new", "none"
_CACHE_BYTES = 3 << 20


@dataclass(frozen=True)
class Scenario:
    """A device to start from, what is run on it, and which release answers at the end."""

    name: str
    start: Path
    commands: tuple[tuple[str, ...], ...]
    end: str


@dataclass(frozen=True)
class Ids:
    """The identities of the release that runs and of the one that is deployed."""

    old: str
    new: str


def scenarios(folder: Path) -> tuple[list[Scenario], Ids]:
    """A first deployment; an update with everything that can follow; a trial that runs out. Made below `folder`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    tests = importlib.import_module("test_bundle")
    recipe = tests.RECIPE.replace('gate = ["latency <= 500 ms"]', "gate = []")
    cache = folder / "device.cache"
    cache.write_bytes(np.random.default_rng(0).bytes(_CACHE_BYTES))
    packed = [
        pack.pack(
            tests.tiny_run(folder / op, op=op, recipe=recipe), folder / f"{op}.bundle", release=number, timing_caches=[cache]
        )
        for number, op in enumerate(("Add", "Mul"), 1)
    ]
    old, new = (found.manifest.id for found in packed)
    first = deployment(packed[0].path, old)
    # In this process, so that it has loaded all that the traced ones need: they then make the same calls every time.
    for name, commands in {"empty": (), "running": first, "ready": (*first, *deployment(packed[1].path, new)[:-1])}.items():
        (folder / name).mkdir()
        if _commands(folder / name, commands, lambda text: None):
            raise SystemExit("the device to start from cannot be made")
    outcome(folder / "ready")
    update = deployment(packed[1].path, new)[:-1]
    update += (("activate", new, "--confirm-within", "3600"), ("confirm",), ("rollback",), ("collect-garbage",))
    trial: tuple[tuple[str, ...], ...] = (("activate", new, "--confirm-within", "0"), ("recover",))
    found = [
        Scenario("first", folder / "empty", first, OLD),
        Scenario("update", folder / "running", update, OLD),
        Scenario("trial", folder / "ready", trial, OLD),
    ]
    return found, Ids(old, new)


def deployment(path: Path, id: str) -> tuple[tuple[str, ...], ...]:
    """The commands that make the bundle at `path` the current release."""
    return (("install", str(path)), ("build", id), ("parity", id), ("activate", id))


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), and what it wrote."""

    code: int
    output: str


def run(root: Path, commands: Sequence[Sequence[str]], options: Sequence[str] = (), calls: Sequence[str] = CALLS) -> Ended:
    """Run commands on the device at `root` in a process of their own; with `options`, under strace with these."""
    with started(root, commands, options, calls) as process:
        return process.wait()


@contextmanager
def started(
    root: Path, commands: Sequence[Sequence[str]], options: Sequence[str] = (), calls: Sequence[str] = CALLS
) -> Iterator[Process]:
    """The process that `run` waits for. It is a fork of this one, which has loaded everything: a tenth of the time."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _work(root, commands, output.fileno())
        process = Process(pid, output)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        strace = None
        if options:
            words = ["strace", "-f", "-qq", "-y", "-s", "0", "-e", f"trace={','.join(calls)}", *options, "-p", str(pid)]
            strace = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
            while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
                if strace.poll() is not None:
                    os.kill(pid, signal.SIGKILL)
                    raise SystemExit(f"strace may not trace: {strace.communicate()[1]}")
                time.sleep(0.002)
        os.kill(pid, signal.SIGCONT)
        try:
            yield process
        finally:
            if strace is not None and not process.has_ended:
                os.kill(pid, signal.SIGKILL)
                strace.kill()  # one that holds a call back does not let even a killed process go
            process.end()
            if strace is not None:
                strace.communicate(timeout=60)


class Process:
    """A process that runs commands of the device half."""

    def __init__(self, pid: int, output: BinaryIO) -> None:
        self.pid, self._file = pid, output
        self._status: int | None = None

    @property
    def output(self) -> str:
        """What it has written until now."""
        return os.pread(self._file.fileno(), 1 << 20, 0).decode()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, by itself or otherwise."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def wait(self) -> Ended:
        """Wait until it has ended."""
        while not self.has_ended:
            time.sleep(0.002)
        assert self._status is not None
        return Ended(os.waitstatus_to_exitcode(self._status), self.output)

    def end(self) -> None:
        """Kill it if it has not ended."""
        if not self.has_ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def _work(root: Path, commands: Sequence[Sequence[str]], output: int) -> NoReturn:
    """The child: wait to be traced, run every command, and say after each that it was done."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.kill(os.getpid(), signal.SIGSTOP)
        code = _commands(root, commands, _say)
    except BaseException:  # what it was belongs to the output; nothing of the parent is to run
        _say(traceback.format_exc())
    finally:
        os._exit(code)


def _say(text: str) -> None:
    # Not by `write`, which faults are injected into: what is told is no part of what is tested.
    os.pwritev(1, [text.encode()], os.fstat(1).st_size)


def _commands(root: Path, commands: Sequence[Sequence[str]], say: Callable[[str], None]) -> int:
    for words in commands:
        out = io.StringIO()
        with redirect_stdout(out):
            code = agent.run([*words, "--root", str(root)])
        # Confirming what was confirmed before a kill is no success, and no failure here.
        if code and ("error" in json.loads(out.getvalue()) or words[0] != "confirm"):
            say(out.getvalue())
            return code
        say(f"done {words[0]}\n")
    return 0


@dataclass(frozen=True)
class Point:
    """A system call: its name, its number among those of that name in the first process, and the line of the trace."""

    call: str
    number: int
    line: str


def changing(log: Path, root: Path) -> list[Point]:
    """Every call that changes something below `root`, in order. Fails when another thread than the first one does."""
    lines = log.read_text().splitlines()
    first = lines[0].split()[0]
    counts: Counter[str] = Counter()
    found = []
    for line in lines:
        process, _, call = line.partition(" ")
        name = call.strip().partition("(")[0]
        changes = str(root) in call and (name != "openat" or "O_CREAT" in call or "O_TRUNC" in call)
        if not name.isidentifier():
            continue
        if process != first:
            if changes:
                raise SystemExit(f"another thread changes something, and is not followed: {line}")
            continue
        counts[name] += 1
        if changes:
            found.append(Point(name, counts[name], shown(call, root)))
    return found


def shown(call: str, root: Path) -> str:
    """A call of the trace without the folders of this machine."""
    return re.sub(r"AT_FDCWD<[^>]*>", "AT_FDCWD", call.strip().replace(str(root), "ROOT"))[:300]


def copy(start: Path, root: Path) -> None:
    """Put the device at `start` in the place of the one at `root`."""
    if root.exists():
        shutil.rmtree(root)
    shutil.copytree(start, root, symlinks=True)


def outcome(root: Path) -> str:
    """Which release answers: "old", "new", "none", or what is wrong with it."""
    try:
        if slots.current(root) is None and not (root / slots.CURRENT).is_symlink():
            return NONE
        folder = (root / slots.CURRENT).resolve(strict=True)
        manifest, changed = _manifest(folder)
        opened = infer.open_current(root)
        answer = json.dumps(np.asarray(infer.answer(opened, PIXELS)).tolist())
        opened.close()
    except Exception as error:  # whatever it is, it is a finding
        return f"{type(error).__name__}: {error}"
    if changed or opened.id != manifest.id:
        return f"torn: {changed}"
    answers = {json.dumps((PIXELS + PIXELS).tolist()): OLD, json.dumps((PIXELS * PIXELS).tolist()): NEW}
    return answers.get(answer, f"answers {answer}")


def _manifest(folder: Path) -> tuple[bundle.Manifest, list[str]]:
    manifest = bundle.parse((folder / bundle.MANIFEST).read_bytes(), "it")
    return manifest, [name for name, blob in manifest.files.items() if digest_file(folder / name) != blob.sha256]


def lost(root: Path, reported: Sequence[str], scenario: Scenario, ids: Ids) -> list[str]:
    """What was reported as done and is not there; `reported` are the verbs whose success was said before the cut."""
    try:
        return list(_lost(root, reported, scenario, ids))
    except Exception as error:  # whatever it is, something that was there cannot be read
        return [f"{type(error).__name__}: {error}"]


def _lost(root: Path, reported: Sequence[str], scenario: Scenario, ids: Ids) -> Iterator[str]:
    id = next(words[1] for words in scenario.commands if words[0] == "activate")
    started = [words[0] for words in scenario.commands][: len(reported) + 1]
    if "collect-garbage" not in started:
        if "install" in reported and _manifest(root / slots.RELEASES / id)[1]:
            yield "the release"
        for _ in [place for place in ("build",) if place in reported]:
            found = [path for path in (root / slots.ENGINES / id).iterdir() if not path.name.endswith(".partial")]
            read_artifact(*found)
        if "parity" in reported and not slots.read_health(root, id).checked:
            yield "what parity said"
    if "confirm" in reported and slots.read_state(root).trial is not None:
        yield "the confirmation"
    is_new = id == ids.new
    if "activate" in reported and not {"rollback", "recover"} & {*started} and outcome(root) != (NEW if is_new else OLD):
        yield "the switch"
    if {"rollback", "recover"} & {*reported} and outcome(root) != OLD:
        yield "the way back"


def after(root: Path, allowed: Sequence[str]) -> tuple[list[str], float]:
    """Let `recover` do its work: what is wrong afterwards, and how many seconds it took."""
    now = slots.Moment.now()
    began = time.monotonic()
    slots.recover(root, now)
    seconds = time.monotonic() - began
    problems = [] if (found := outcome(root)) in allowed else [f"after recover: {found}"]
    if slots.recover(root, now):
        problems.append("recover is not done after it was run")
    if slots.read_state(root).doing is not None:
        problems.append("something is still being done")
    left = [path.name for path in root.rglob("*") if path.name.endswith((".partial", ".stale"))]
    return problems + ([f"left behind: {left}"] if left else []), seconds


def allowed(scenario: Scenario) -> tuple[str, ...]:
    """The outcomes that are right whenever a scenario is cut."""
    return (NONE, OLD) if scenario.name == "first" else (OLD, NEW)


def reports(output: str) -> list[str]:
    """The verbs whose success was told."""
    return [line.split()[1] for line in output.splitlines() if line.startswith("done ")]


def error_of(output: str) -> dict[str, Any] | None:
    """The answer of the command that failed, if it is one."""
    start = output.find("{")
    try:
        found: dict[str, Any] = json.loads(output[start:])["error"]
    except (ValueError, KeyError):
        return None
    return found
