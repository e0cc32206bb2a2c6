"""ssh by the system's OpenSSH: the user's settings, keys, agent, jump hosts and known hosts; one multiplexed connection.

OpenSSH carries the burden of security, so its strictness is what we add and nothing is taken away: unknown and changed host
keys are refused whatever ssh_config says, nothing is asked (BatchMode), and nothing is forwarded.
Options: ssh(1) and ssh_config(5), OpenSSH 7.6 or newer.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import CapabilityError, DeploykitError, LineError, UsageError, printable
from deploykit.remote.process import Done, Processes

_FAILED = 255
_ALIVE_EVERY_S, _ALIVE_TIMES, _CONNECT_S = 5, 3, 15
_LOGIN_S = 180  # ssh has no limit of its own for a login; a key on a token waits for somebody's finger
_LINGER_S = 60  # of the shared connection, when this process is killed and cannot end it
_LONGEST_SOCKET = 90  # a socket's path has at most 104 bytes, and ssh adds 17 while it makes it
_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "VerifyHostKeyDNS": "no",
    "ConnectTimeout": str(_CONNECT_S),
    "ServerAliveInterval": str(_ALIVE_EVERY_S),
    "ServerAliveCountMax": str(_ALIVE_TIMES),
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RequestTTY": "no",
    "LogLevel": "ERROR",
}


class Ssh(Processes):
    """A device that is reached by ssh. Raises as `remote.connect` says when it cannot be."""

    def __init__(self, host: str, *, user: str | None, port: int | None, config: Path | None, host_key: str | None) -> None:
        shown = f"[{host}]" if ":" in host else host
        super().__init__(f"ssh://{user + '@' if user else ''}{shown}{f':{port}' if port else ''}")
        self._place = tempfile.TemporaryDirectory(prefix="dk-")
        self._socket = Path(self._place.name, "ssh")
        self._is_closed = False
        strict = [word for key, value in _OPTIONS.items() for word in ("-o", f"{key}={value}")]
        strict += [] if host_key is None else self._pinned(host_key)
        self._is_pinned = host_key is not None
        where = ["-F", str(config)] if config else []
        where += ["-l", user] if user else []
        where += ["-p", str(port)] if port else []
        self._ssh = ["ssh", "-S", str(self._socket), *strict, *where]
        self._host = host
        self._accept = shlex.join(["ssh", "-o", "StrictHostKeyChecking=ask", *where, "--", host, "true"])
        try:
            if len(str(self._socket)) > _LONGEST_SOCKET:
                raise UsageError(
                    f"the folder for temporary files is too deep for a socket: {printable(self._place.name)}", fix="TMPDIR=/tmp"
                )
            self._open()
        except BaseException:
            self._place.cleanup()
            raise

    def close(self) -> None:
        """See `Connection.close`."""
        if not self._is_closed:
            self._is_closed = True
            subprocess.run([*self._ssh, "-O", "exit", "--", self._host], capture_output=True, check=False)
            self._place.cleanup()

    def _open(self) -> None:
        """Start the connection that all commands share. What is written to a pipe would keep it open, hence the file."""
        command = [*self._ssh, "-M", "-f", "-N", "-o", f"ControlPersist={_LINGER_S}", "--", self._host]
        with tempfile.TemporaryFile() as complaints:
            try:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=complaints,
                    start_new_session=True,
                    # A jump host is reached by another ssh that does not hear of BatchMode, and would open a window to ask.
                    env={**os.environ, "SSH_ASKPASS_REQUIRE": "never"},
                    timeout=_LOGIN_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise LineError(f"cannot reach {self.name}", why=f"there was no end of the login after {_LOGIN_S} s") from error
            except FileNotFoundError as error:
                raise CapabilityError("there is no ssh here", why=str(error), fix="install OpenSSH's client") from error
            complaints.seek(0)
            stderr = complaints.read(1 << 16)
        if code:
            raise self._refusal(stderr)

    def _command(self, words: Sequence[str]) -> list[str]:
        # ssh hands one text to the user's shell. The inner `sh` is there whatever shell that is, and its `exit` tells of a
        # signal as 128 + N, where ssh itself would say 255, as it does of a cut line.
        return [*self._ssh, "-o", "ControlMaster=no", "--", self._host, shlex.join(["sh", "-c", f"{shlex.join(words)}; exit $?"])]

    def _failure(self, code: int, stderr: bytes) -> DeploykitError | None:
        if code != _FAILED:
            return None
        return LineError(f"the connection to {self.name} was lost", why=Done(code, b"", stderr).words)

    def _pinned(self, host_key: str) -> list[str]:
        words = host_key.split()
        if len(words) < 2 or "\n" in host_key.strip():
            raise UsageError(f"{printable(host_key)[:100]!r} is no host key", fix="such as: ssh-ed25519 AAAA...")
        known = Path(self._place.name, "known_hosts")
        known.write_text(f"deploykit-device {words[0]} {words[1]}\n")
        pairs = {"HostKeyAlias": "deploykit-device", "UserKnownHostsFile": str(known), "GlobalKnownHostsFile": "none"}
        return [word for key, value in pairs.items() for word in ("-o", f"{key}={value}")]

    def _refusal(self, stderr: bytes) -> DeploykitError:
        """Why there is no connection, and what to do about it."""
        text, why = stderr.decode("utf-8", "replace"), Done(_FAILED, b"", stderr).words
        is_other, is_unknown = "IDENTIFICATION HAS CHANGED" in text, "host key is known" in text
        if self._is_pinned and (is_other or is_unknown):
            fix = "find out why; when the device is a new one, correct its host_key"
            return UsageError(f"{self.name} has another host key than was named, so nothing was sent", why=why, fix=fix)
        if is_other:
            fix = "find out why; when the device is a new one: ssh-keygen -R HOST, and then accept its key"
            return UsageError(f"{self.name} has another host key than is known, so nothing was sent", why=why, fix=fix)
        if is_unknown or "Host key verification failed" in text:
            return UsageError(f"the host key of {self.name} is not known, so nothing was sent", why=why, fix=self._accept)
        if "Permission denied" in text or "Too many authentication failures" in text:
            return UsageError(f"{self.name} refuses the login", why=why, fix="ssh-copy-id puts a key there; an agent lends one")
        is_nowhere = "Could not resolve" in text and "Temporary failure" not in text  # a cut line can cut off the name server
        if is_nowhere or "Bad configuration" in text or "Can't open user config" in text:
            return UsageError(f"cannot reach {self.name}", why=why)
        return LineError(f"cannot reach {self.name}", why=why)
