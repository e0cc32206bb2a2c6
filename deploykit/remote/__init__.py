"""Connections to devices: run a command there, put a file, get a file; `local`, `ssh://[user@]host[:port]`, `emulated://FOLDER`.

What a connection owes is `Connection`, and `tests/contracts/test_connection_contract.py` says it in examples. Another kind
(adb, a serial line) is one class: one that can turn the words of a command into the words of a local process inherits the
rest from `process.Processes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from deploykit.errors import UsageError, printable
from deploykit.progress import Progress, silent
from deploykit.remote.emulated import Emulated
from deploykit.remote.process import Done, Local, Talk
from deploykit.remote.ssh import Ssh

__all__ = ["Connection", "Done", "Talk", "connect"]

SILENCE_S = 120.0
_EMULATED = "emulated://"
_SSH = re.compile(
    r"ssh://(?:(?P<user>[^@/\s]+)@)?(?P<host>\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]|[^@:/\s\[\]]+)(?::(?P<port>[0-9]{1,5}))?/?"
)


class Connection(Protocol):
    """A way to one device. Words go there as they are: no shell reads them, whatever letters and bytes are in them."""

    @property
    def name(self) -> str:
        """What a user calls it, such as `ssh://jetson`."""

    @property
    def commands(self) -> int:
        """How many commands have been run there so far, by whichever of the methods below."""

    def run(self, words: Sequence[str], *, stdin: bytes | Iterable[bytes] = b"", silence_s: float = SILENCE_S) -> Done:
        """Run one command to its end. A command that fails is no error here: its exit code says so (0 to 254; 128 + N when
        signal N ended it, 127 when there is no such program).

        `silence_s`: longest time in seconds in which no byte moves in any direction.
        Raises LineError when the line is cut or silent for too long, DeploykitError for an endless answer.
        """

    def start(self, words: Sequence[str]) -> Talk:
        """Start a command that goes on while others run, and that one can talk with. Close it before the connection."""

    def put(self, source: Path, target: str, *, progress: Progress = silent) -> None:
        """Copy a file to the path `target` there, whose folder exists: whole and with the right digest, or not at all.

        Raises DeploykitError with the device's words when it cannot be written.
        """

    def get(self, source: str, target: Path) -> None:
        """Copy a file from there to `target`: whole, or not at all. Raises DeploykitError when it cannot be read."""

    def close(self) -> None:
        """End the connection; doing it again does nothing."""


def connect(address: str, *, ssh_config: Path | None = None, host_key: str | None = None) -> Connection:
    """A connection to `local`, to `ssh://[user@]host[:port]` through the system's OpenSSH and the user's own settings, or to
    `emulated://FOLDER`, a 64-bit ARM root on this machine.

    `ssh_config` replaces the user's ssh_config(5). `host_key`, such as `ssh-ed25519 AAAA...`, is the only key that is believed.
    Raises UsageError for another address, for a host that is not known or whose key changed (with the command that accepts
    it) and for a refused login; LineError when nobody answers.
    """
    if why := objection(address):
        raise UsageError(why, fix="local, ssh://[user@]host[:port], or emulated://FOLDER")
    if address == "local":
        return Local()
    found = _SSH.fullmatch(address)
    if found is None:
        return Emulated(Path(address.removeprefix(_EMULATED)))
    port = None if found["port"] is None else int(found["port"])
    return Ssh(found["host"].strip("[]"), user=found["user"], port=port, config=ssh_config, host_key=host_key)


def objection(address: str) -> str:
    """Why `address` is none of a device; empty when it is one. Nothing is asked there."""
    found = _SSH.fullmatch(address)
    if found is None:
        is_good = address == "local" or address.startswith(_EMULATED)
    else:
        is_option = found["host"].startswith("-") or (found["user"] or "").startswith("-")
        is_good = not is_option and (found["port"] is None or 0 < int(found["port"]) < 65536)
    return "" if is_good else f"{printable(address)!r} is no address of a device"
