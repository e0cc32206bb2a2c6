"""The power cut after every system call of a deployment that changes something, on ext4 in three mount modes and on xfs.

usage: python benchmarks/deploy_power_cuts.py [--times 5] [--courses first update trial] [--control] [--output DIR]

Needs root, strace, e2fsprogs and xfsprogs. A device's folder lies on a loop device. The process that deploys is stopped after
each call (SIGSTOP by strace); the file behind the loop device is copied as it is then, without any sync, at once or up to 1.2 s
later, so that the kernel has written back some of it by itself; the copy is mounted, by which the journal is replayed, and
judged: which release answers, is everything there whose success the process had told before the cut, and does `recover` finish
or undo the rest? ext4 commits every second here instead of every five, which leaves
more states between.

With --control every fsync is skipped (strace answers it with success). That has to lose something, or the method sees nothing.

What this cannot show: a drive that loses or reorders what it had acknowledged. There is no device mapper (dm-log-writes,
dm-flakey) in this kernel, so every write that reached the loop device counts as on the disk.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import _deployment
from _deployment import Ids, Process, Scenario
from _results import write

MODES = {
    "ext4": ("ext4", 96, "commit=1"),
    "ext4 noauto_da_alloc": ("ext4", 96, "commit=1,noauto_da_alloc"),
    "ext4 noauto_da_alloc, data=writeback": ("ext4", 96, "commit=1,noauto_da_alloc,data=writeback"),
    "xfs": ("xfs", 320, "nouuid"),
}
# Left out: openat, for a file that was just created differs in nothing but an empty name from its first write; and the calls
# that copy between files, which a waiting signal interrupts for ever. What they wrote is cut at the next call.
_NO_STATE = ("openat", "sendfile", "copy_file_range", "chmod", "fchmod", "utimensat")
CALLS = tuple(name for name in _deployment.CALLS if name not in _NO_STATE)
DELAYS = (*[0.0] * 8, *[0.02] * 4, *[0.1] * 2, 0.3, 1.2)
_LIBC = ctypes.CDLL(None, use_errno=True)
_LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C82
SPACE = "size=1500m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--courses", nargs="+", default=["first", "update", "trial"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--control", action="store_true", help="skip every fsync: has to lose something")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("mounting file systems needs root")
    began, cuts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch, _mounted("tmpfs", "tmpfs", Path(scratch), SPACE):
        courses, ids = _deployment.scenarios(Path(scratch))
        draws = random.Random(0)
        for time_number in range(arguments.times):
            for mode in arguments.modes:
                for scenario in courses:
                    if scenario.name in arguments.courses:
                        some = _course(scenario, ids, Path(scratch), mode, time_number, draws, arguments.control)
                        bad = sum(bool(cut["problems"]) for cut in some)
                        print(f"{mode}, {scenario.name}, {time_number}: {len(some)} cuts, with problems {bad}", flush=True)
                        cuts += some
            seconds, name = time.monotonic() - began, "deploy_power_cuts" + ("_control" if arguments.control else "")
            write(name, {"cuts": cuts, "seconds": seconds, "without_fsync": arguments.control}, arguments.output)
    _summary(cuts, seconds)
    bad = any(cut["problems"] for cut in cuts)
    sys.exit(1 if bad != arguments.control else 0)


@contextmanager
def _mounted(kind: str, source: str, at: Path, options: str) -> Iterator[Path]:
    """Mount by the system call: thousands of mount processes would take longer than everything else."""
    at.mkdir(exist_ok=True)
    _checked(_LIBC.mount(source.encode(), os.fsencode(at), kind.encode(), 0, options.encode()), f"mount {source}")
    try:
        yield at
    finally:
        for attempt in range(100):  # the kernel lets go of a loop device a moment after it is told to
            if _LIBC.umount2(os.fsencode(at), 0) == 0:
                break
            if attempt == 99:
                raise OSError(ctypes.get_errno(), f"unmount {at}: {os.strerror(ctypes.get_errno())}")
            time.sleep(0.1)


@contextmanager
def _disk(kind: str, image: Path, at: Path, options: str) -> Iterator[Path]:
    """The file system in `image`, mounted by a loop device (linux/loop.h)."""
    control, file = os.open("/dev/loop-control", os.O_RDWR), os.open(image, os.O_RDWR)
    while True:
        name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        device = os.open(name, os.O_RDWR)
        try:
            fcntl.ioctl(device, _LOOP_SET_FD, file)
            break
        except OSError as error:  # somebody else was faster
            os.close(device)
            if error.errno != errno.EBUSY:
                raise
    try:
        with _mounted(kind, name, at, options):
            yield at
    finally:
        fcntl.ioctl(device, _LOOP_CLR_FD)
        for descriptor in (device, file, control):
            os.close(descriptor)


def _checked(code: int, doing: str) -> None:
    if code != 0:
        raise OSError(ctypes.get_errno(), f"{doing}: {os.strerror(ctypes.get_errno())}")


def _copy(source: Path, to: Path) -> None:
    """Copy the parts of a sparse file that are there."""
    with source.open("rb") as read, to.open("wb") as written:
        size, place = source.stat().st_size, 0
        written.truncate(size)
        while place < size:
            try:
                place = os.lseek(read.fileno(), place, os.SEEK_DATA)
            except OSError:  # nothing but a hole follows
                break
            end = os.lseek(read.fileno(), place, os.SEEK_HOLE)
            while place < end:
                place += os.pwrite(written.fileno(), os.pread(read.fileno(), min(end - place, 1 << 20), place), place)


def _course(
    scenario: Scenario, ids: Ids, scratch: Path, mode: str, number: int, draws: random.Random, control: bool
) -> list[dict[str, Any]]:
    """One deployment on a fresh file system, cut after each call."""
    kind, megabytes, options = MODES[mode]
    image, log, cuts = scratch / "image", scratch / "trace", []
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", str(image)], check=True)
    log.unlink(missing_ok=True)
    inject = [f"inject={','.join(name for name in CALLS if name not in _SYNCS)}:signal=STOP"]
    inject.append(f"inject={','.join(_SYNCS)}:signal=STOP" + (":retval=0" if control else ""))
    words = ["-o", str(log), *(word for text in inject for word in ("-e", text))]
    with _disk(kind, image, scratch / "disk", options) as disk:
        root = disk / "root"
        _deployment.copy(scenario.start, root)
        subprocess.run(["sync", "-f", str(disk)], check=True)
        with _deployment.started(root, scenario.commands, words, CALLS) as process:
            for stop in _stops(process, log):
                if str(root) not in stop:
                    continue
                delay = draws.choice(DELAYS)
                time.sleep(delay)
                told = _deployment.reports(process.output)
                found = _judged(image, kind, options, scratch, scenario, ids, told)
                line = _deployment.shown(stop.partition(" ")[2], root)[:100]
                where = {"mode": mode, "course": scenario.name, "time": number, "call": line, "after_s": delay}
                cuts.append({**where, "told": len(told), **found})
            ended = process.wait()
        if ended.code or _deployment.outcome(root) != scenario.end:
            sys.exit(f"{scenario.name} failed on {mode}: {ended.output}")
    return cuts


_SYNCS = ("fsync", "fdatasync")


def _stops(process: Process, log: Path) -> Iterator[str]:
    """The line of the trace of each call after which the process has stopped; it goes on when the next one is asked for."""
    seen, last = 0, ""
    while not process.has_ended:
        lines = log.read_text().splitlines() if log.exists() else []
        mine = [line for line in lines[seen:] if line.startswith(f"{process.pid} ")]
        stopped = next((at for at, line in enumerate(mine) if "--- stopped by SIGSTOP" in line), None)
        if stopped is None:
            time.sleep(0.002)
            continue
        calls = [line for line in mine[:stopped] if " --- " not in line]
        last = calls[-1] if calls else last
        seen = len(lines)
        if calls:
            yield last
        os.kill(process.pid, signal.SIGCONT)


def _judged(image: Path, kind: str, options: str, scratch: Path, scenario: Scenario, ids: Ids, told: list[str]) -> dict[str, Any]:
    """What a device finds that starts again with the disk as it is now."""
    cut = scratch / "cut"
    cut.unlink(missing_ok=True)
    _copy(image, cut)
    right = _deployment.allowed(scenario)
    with _disk(kind, cut, scratch / "after", options) as disk:
        root = disk / "root"
        outcome = _deployment.outcome(root)
        problems = [] if outcome in right else [f"found: {outcome}"]
        problems += [f"reported and lost: {what}" for what in _deployment.lost(root, told, scenario, ids)]
        try:
            wrong, seconds = _deployment.after(root, right)
        except Exception as error:  # whatever it is, it is a finding
            wrong, seconds = [f"recover: {type(error).__name__}: {error}"], 0.0
    return {"outcome": outcome, "recover_s": seconds, "problems": problems + wrong}


def _summary(cuts: list[dict[str, Any]], seconds: float) -> None:
    slowest = max(cut["recover_s"] for cut in cuts)
    bad = [cut for cut in cuts if cut["problems"]]
    print(f"{len(cuts)} power cuts in {seconds:.0f} s, slowest recover {slowest:.3f} s, with problems: {len(bad)}")
    for mode in dict.fromkeys(cut["mode"] for cut in cuts):
        mine = [cut for cut in cuts if cut["mode"] == mode]
        kinds = Counter(cut["outcome"] if cut["outcome"] in ("old", "new", "none") else "torn" for cut in mine)
        lost = sum(any("lost" in problem for problem in cut["problems"]) for cut in mine)
        print(f"  {mode}: {len(mine)} cuts, outcomes {dict(kinds)}, something reported and lost {lost}")
    for cut in bad[:10]:
        print(cut)


if __name__ == "__main__":
    main()
