"""One deployer at a time: a lock on the device that ends with the signs of life of who holds it.

The lock is the kernel's (flock), held by a process on the device that reads a heartbeat from its standard input. When that
ends or is silent for too long the process lets go: a lock that a remote `flock` holds stays for hours after a cable was
pulled, because the device's end of the connection waits for packets that never come.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import DeploykitError, printable, translating_os_errors
from deploykit.slots import Moment

FILE = ".lease"
SECONDS, BEAT_S = 15.0, 2.0


@dataclass(frozen=True)
class Holder:
    """Who holds the lease, and for how many seconds; None where the device has started again since."""

    owner: str
    age_s: float | None


@contextmanager
def held(root: Path, owner: str, now: Moment) -> Iterator[None]:
    """Hold the lease of `root`. Raises DeploykitError that names the owner and the age when somebody else does."""
    with translating_os_errors("lock", root / FILE):
        descriptor = os.open(root / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy(root, holder(root, now)) from error
        with translating_os_errors("lock", root / FILE):
            os.ftruncate(descriptor, 0)
            said = {"owner": owner, "boot": now.boot, "seconds": now.seconds, "pid": os.getpid()}
            os.write(descriptor, json.dumps(said).encode() + b"\n")
        yield
    finally:
        os.close(descriptor)


def holder(root: Path, now: Moment) -> Holder | None:
    """Who holds the lease now; None when nobody does."""
    try:
        with (root / FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                said = json.loads(file.read(4096) or b"{}")
                age = now.seconds - float(said["seconds"]) if said.get("boot") == now.boot else None
                return Holder(printable(str(said.get("owner", "unknown")))[:200], age)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return Holder("unknown", None)
    return None


def busy(root: Path, found: Holder | None) -> DeploykitError:
    """The error of a second deployer."""
    who = "somebody" if found is None else found.owner
    age = "" if found is None or found.age_s is None else f" for {found.age_s:.0f} s"
    why = f"{who} has been deploying there{age}" if age else f"{who} is deploying there"
    fix = f"wait for it; the lease ends {SECONDS:g} s after the last sign of life"
    return DeploykitError(f"{printable(root)} is leased", why=why, fix=fix)


def wait_for_silence(stream: int, seconds: float) -> bool:
    """Read signs of life from a descriptor until it ends (True), or nothing comes for `seconds` (False)."""
    while select.select([stream], [], [], seconds)[0]:
        if not os.read(stream, 4096):
            return True
    return False
