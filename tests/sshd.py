"""A real sshd on loopback for tests: an unprivileged port, its own host key, one key that may log in, and a client's settings."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class Sshd:
    """A running server, and the settings of a client that knows it."""

    host: str
    port: int
    config: Path
    host_key: str
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"ssh://{getpass.getuser()}@{self.host}:{self.port}"


@contextmanager
def sshd(folder: Path, *, within: tuple[str, ...] = (), address: str = "127.0.0.1") -> Iterator[Sshd]:
    """A server with its files in `folder`; `within` are words before its own, such as those that enter a network namespace."""
    if not Path(SSHD).is_file() or shutil.which("ssh-keygen") is None:
        pytest.skip("wants sshd (Debian package openssh-server)")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "user.pub").rename(folder / "authorized_keys")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": address,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "MaxSessions": 20,
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    host_key = (folder / "host.pub").read_text().rsplit(maxsplit=1)[0]
    (folder / "known_hosts").write_text(f"[{address}]:{port} {host_key}\n")
    client = {"IdentityFile": folder / "user", "IdentitiesOnly": "yes", "UserKnownHostsFile": folder / "known_hosts"}
    client |= {"GlobalKnownHostsFile": "none"}
    (folder / "ssh_config").write_text("".join(f"{key} {value}\n" for key, value in client.items()))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*within, SSHD, "-D", "-e", "-f", folder / "sshd_config"], stdout=log, stderr=log)
    try:
        _wait(process, folder / "log")
        yield Sshd(address, port, folder / "ssh_config", host_key, process)
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if b"Server listening" in log.read_bytes():
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"sshd did not start: {log.read_text()}")
