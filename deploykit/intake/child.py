"""A file that is not our own, read by a process that can do little: limits on memory, time and files, and no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import deploykit
from deploykit.errors import printable
from deploykit.intake.refused import Refused

ANSWER, COMPLAINTS = "answer.json", "complaints.txt"
_START_UP_S = 20  # importing what a reader needs, on a machine that is busy
_SLOWEST = 4  # a process that gets a quarter of a core is still given all of its CPU time
_LONGEST_ANSWER = 64 << 20
# -I and -S: no variable, no file of the user and no hook of an installed package changes what the process runs.
_PROGRAM = "import sys, json; sys.path += json.loads(sys.argv[1])['path']; from deploykit.intake import inside; inside.main()"


@dataclass(frozen=True)
class Limits:
    """What a reader may use beyond its own start-up: seconds of CPU time, and bytes of address space."""

    cpu_s: int
    memory_bytes: int


def ask(task: str, path: Path, limits: Limits) -> Any:
    """What the reader `task` (see `deploykit.intake.inside`) answers about the file, as plain JSON values.

    Raises Refused with the reader's reason, or when it crashed, took too long or too much memory; OSError when the file
    cannot be opened.
    """
    with _opened(path) as file, _folder() as folder:
        answer = _answer(folder, _run(task, file, folder, limits), limits)
    if "refused" in answer:
        raise _refusal(answer["refused"])
    return answer["answer"]


def gives_up() -> Mapping[str, bool]:
    """What this machine's kernel lets a reader give up: the `network`, and writing in `folders` that are not its own."""
    limits = Limits(cpu_s=5, memory_bytes=64 << 20)
    with _folder() as folder, Path(os.devnull).open("rb", buffering=0) as file:
        answer = _answer(folder, _run("nothing", file, folder, limits), limits)["answer"]
    return {name: bool(answer[name]) for name in ("network", "folders")}


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="deploykit-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file. Opening anything else, such as a pipe, could wait for ever."""
    if not path.is_file():
        raise Refused("it is not a file")
    with path.open("rb", buffering=0) as file:
        yield file


def _run(task: str, file: BinaryIO, folder: Path, limits: Limits) -> int:
    """The exit status of a reader whose standard input is the file; it works in `folder` and leaves its answer there."""
    request = json.dumps({"task": task, "path": _places(), **asdict(limits)})
    longest = _START_UP_S + _SLOWEST * limits.cpu_s
    with (folder / COMPLAINTS).open("wb") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, request],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            return process.wait(longest)
        except subprocess.TimeoutExpired:
            return -signal.SIGXCPU
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _places() -> list[str]:
    """Where this process finds packages, but never the current directory, in which the file may lie."""
    here = Path.cwd()
    package = str(Path(deploykit.__file__).absolute().parent.parent)
    return list(dict.fromkeys([package, *(place for place in sys.path if Path(place).is_absolute() and Path(place) != here)]))


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**kept, "LC_ALL": "C.UTF-8", "TMPDIR": str(folder), "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


def _answer(folder: Path, code: int, limits: Limits) -> Mapping[str, Any]:
    """What the reader left behind. It may have been taken over by the file, so this is data like any other."""
    if code == -signal.SIGXCPU:
        raise Refused(f"reading it took more than {limits.cpu_s} s", told="{}: it is damaged, or made to keep a reader busy")
    if code < 0:
        raise Refused(
            f"the process that read it crashed ({signal.Signals(-code).name})", told="{}: it is damaged, or made to do that"
        )
    if code:
        raise Refused(_why_failed(_start_of(folder / COMPLAINTS), limits), told="{}: it is damaged, or made to do that")
    try:
        content = _start_of(folder / ANSWER, _LONGEST_ANSWER)
        found = json.loads(content)
        if isinstance(found, dict) and len({"answer", "refused"} & set(found)) == 1:
            return found
    except (ValueError, RecursionError):
        pass
    raise Refused("the process that read it gave no answer that could be read")


def _refusal(told: Any) -> Refused:
    if not isinstance(told, dict):
        return Refused("the process that read it gave no answer that could be read")
    why, first, fix = (str(told.get(key, "")) for key in ("why", "told", "fix"))
    problems = told.get("problems", ())
    return Refused(why, told=first, fix=fix, problems=[*map(str, problems)] if isinstance(problems, list) else [])


def _why_failed(complaints: str, limits: Limits) -> str:
    if "MemoryError" in complaints:
        return f"reading it took more than {limits.memory_bytes / 2**30:.1f} GiB of memory"
    last = complaints.strip().rpartition("\n")[2]
    return f"the process that read it failed: {printable(last)[:300] or 'it said nothing'}"


def _start_of(path: Path, most: int = 64 << 10) -> str:
    try:
        if path.is_symlink() or not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""
