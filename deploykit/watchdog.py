"""The watchdog of releases on trial: a systemd timer that runs `recover` at every start and every few seconds.

Where that was allowed, another one runs `recover --rebuild` once after every start: a start is what follows an update of JetPack.
Both run the device half of the release that is current, by the same Python. Without systemd nothing is installed, and whoever
asked is told what has to be run instead.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deploykit import publish
from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors

EVERY_S = 20
_RUNNING = Path("/run/systemd/system")  # is there when systemd is the one that started this machine: sd_booted(3)
_TOOL = "systemctl"
_SYSTEM = Path("/etc/systemd/system")
_SERVICE = """[Unit]
Description=deploykit: {does}

[Service]
Type=oneshot
ExecStart={command}
"""
_TIMER = """[Unit]
Description=deploykit: {does}

[Timer]
{when}
AccuracySec=1

[Install]
WantedBy=timers.target
"""


@dataclass(frozen=True)
class Watchdog:
    """What watches: the timer's unit, or why there is none, and the command that it runs or that has to be run instead. The
    last two are the same of what builds stale engines again; None where that was not asked for, or has no unit."""

    unit: str | None
    why_not: str
    command: str
    rebuild_unit: str | None = None
    rebuild_command: str | None = None


def install(root: Path, half: Path, *, rebuild: bool = False, running: Path = _RUNNING, system: Path = _SYSTEM) -> Watchdog:
    """Install and start the timer for `root`; `half` is the device half that it runs. The same again changes nothing.

    With `rebuild` another timer builds stale engines again; one that is there already stays in any case.
    Raises UsageError for a root that a unit file cannot name, DeploykitError when systemd refuses.
    """
    root = root.absolute()
    words = [sys.executable, str(half.absolute()), "recover"]
    place = ["--root", str(root)]
    command = " ".join(_quoted(word) for word in (*words, *place))
    rebuilding = " ".join(_quoted(word) for word in (*words, "--rebuild", *place)) if rebuild else None
    found = Watchdog(None, "", command, rebuild_command=rebuilding)
    if not running.is_dir():
        return replace(found, why_not="systemd does not run here")
    if os.geteuid() != 0:
        return replace(found, why_not="only root installs a unit for the whole system")
    escaped, named = _escaped(str(root).strip("/")), str(root).replace("%", "%%")
    when = f"OnBootSec=5\nOnUnitActiveSec={EVERY_S}"
    unit = _timer(system, f"deploykit-{escaped}", f"go back from a release of {named} that is not confirmed", command, when)
    if rebuilding is None:
        return replace(found, unit=unit)
    # The prefix is another one, not the end: "-rebuild" would be the unit of a folder of that name.
    name, does = f"deploykit_rebuild-{escaped}", f"build engines of {named} again that an update has made stale"
    return replace(found, unit=unit, rebuild_unit=_timer(system, name, does, rebuilding, "OnBootSec=30"))


def _timer(system: Path, name: str, does: str, command: str, when: str) -> str:
    """Write a service and the timer that starts it, where they are not there as they are to be, and enable the timer."""
    texts = {
        f"{name}.service": _SERVICE.format(does=does, command=command),
        f"{name}.timer": _TIMER.format(does=does, when=when),
    }
    with translating_os_errors("write", system):
        changed = [unit for unit, text in texts.items() if not _is(system / unit, text)]
        for unit in changed:
            publish.write_file(system / unit, texts[unit].encode())
    if changed:
        _systemctl(["daemon-reload"])
    _systemctl(["enable", "--now", f"{name}.timer"])
    return f"{name}.timer"


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
