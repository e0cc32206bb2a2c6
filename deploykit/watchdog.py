"""The watchdog of releases on trial: a systemd timer that runs `recover` at every start and every few seconds.

It runs the device half of the release that is current, by the same Python. Without systemd nothing is installed, and whoever
asked is told what has to be run instead.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit import publish
from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors

EVERY_S = 20
_RUNNING = Path("/run/systemd/system")  # is there when systemd is the one that started this machine: sd_booted(3)
_TOOL = "systemctl"
_SYSTEM = Path("/etc/systemd/system")
_SERVICE = """[Unit]
Description=deploykit: go back from a release of {root} that was not confirmed

[Service]
Type=oneshot
ExecStart={command}
"""
_TIMER = """[Unit]
Description=deploykit: watch over releases of {root}

[Timer]
OnBootSec=5
OnUnitActiveSec={every}
AccuracySec=1

[Install]
WantedBy=timers.target
"""


@dataclass(frozen=True)
class Watchdog:
    """What watches: the timer's unit, or why there is none and which command has to be run instead."""

    unit: str | None
    why_not: str
    command: str


def install(root: Path, half: Path, *, running: Path = _RUNNING, system: Path = _SYSTEM) -> Watchdog:
    """Install and start the timer for `root`; `half` is the device half that it runs. The same again changes nothing.

    Raises UsageError for a root that a unit file cannot name, DeploykitError when systemd refuses.
    """
    root = root.absolute()
    words = [sys.executable, str(half.absolute()), "recover", "--root", str(root)]
    command = " ".join(_quoted(word) for word in words)
    if not running.is_dir():
        return Watchdog(None, "systemd does not run here", command)
    if os.geteuid() != 0:
        return Watchdog(None, "only root installs a unit for the whole system", command)
    name = f"deploykit-{_escaped(str(root).strip('/'))}"
    texts = {
        f"{name}.service": _SERVICE.format(root=str(root).replace("%", "%%"), command=command),
        f"{name}.timer": _TIMER.format(root=str(root).replace("%", "%%"), every=EVERY_S),
    }
    with translating_os_errors("write", system):
        changed = [unit for unit, text in texts.items() if not _is(system / unit, text)]
        for unit in changed:
            publish.write_file(system / unit, texts[unit].encode())
    if changed:
        _systemctl(["daemon-reload"])
    _systemctl(["enable", "--now", f"{name}.timer"])
    return Watchdog(f"{name}.timer", "", command)


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _escaped(path: str) -> str:
    """A path in the name of a unit, by systemd's own rule (systemd.unit(5), STRING ESCAPING): no two roots share a timer."""
    plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_."
    letters = ("-" if letter == "/" else letter if letter in plain else None for letter in path)
    escaped = ("".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape")) for letter in path)
    return "".join(kept or instead for kept, instead in zip(letters, escaped, strict=True))


def _quoted(word: str) -> str:
    """A word for `ExecStart` (systemd.service(5), COMMAND LINES)."""
    if not word.isprintable():
        raise UsageError(f"a unit of systemd cannot name {printable(word)!r}", fix="another --root")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _systemctl(words: Sequence[str]) -> None:
    done = subprocess.run([_TOOL, *words], capture_output=True, check=False, timeout=60)
    if done.returncode:
        why = printable(done.stderr.decode("utf-8", "replace").strip())[:300]
        raise DeploykitError("systemd refuses the watchdog", why=why, fix="deploy without --confirm-within")
