"""A 64-bit ARM root on this machine as a device: each command runs in it, its programs by qemu-user.

The root gets name spaces of its own (user and mounts), in which the kernel is told to run ARM programs by qemu; the kernel's
own table (binfmt_misc) stays as it is. That takes Linux 6.7. Processes and the network are this machine's.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from deploykit import arm64
from deploykit.errors import CapabilityError, DeploykitError
from deploykit.remote.process import Processes

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_FAILED = "cannot enter the emulated root"
# The magic number of 64-bit ARM programs and its mask, as Debian's qemu-user-static registers them; F opens qemu now, so that
# it need not lie in the root. O and C pass the opened program and its credentials on.
_ENTER = rf"""
root=$1; qemu=$2; shift 2
fail() {{ echo "{_FAILED}: $1" >&2; exit 97; }}
mount --make-rprivate / && mount --rbind /dev "$root/dev" && mount --rbind /proc "$root/proc" && mount --rbind /sys "$root/sys" &&
    mount --bind "$root/{arm64.CPU_INFO}" "$root/proc/cpuinfo" || fail "its folders cannot be mounted"
table=$root/proc/sys/fs/binfmt_misc
mount -t binfmt_misc none "$table" || fail "the kernel has no binfmt_misc for it alone"
printf '%s' ":arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\
\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:$qemu:OCF" > "$table/register" ||
    fail "ARM programs cannot be registered"
exec chroot "$root" /bin/sh -c 'cd; exec "$@"' sh "$@"
"""


class Emulated(Processes):
    """The root at `root`. Raises UsageError when it is none, CapabilityError when this machine cannot run its programs."""

    def __init__(self, root: Path) -> None:
        super().__init__(f"emulated://{root}")
        self._root, self._cpu, self._qemu = root.absolute(), arm64.cpu_of(root), shutil.which("qemu-aarch64-static")
        missing = [tool for tool in ("unshare", "chroot", "mount") if shutil.which(tool) is None]
        if self._qemu is None or missing:
            why = f"there is no {missing[0] if self._qemu else 'qemu-aarch64-static'} on the PATH"
            raise CapabilityError(f"{self.name} cannot be run here", why=why, fix="install the Debian package qemu-user-static")

    def _command(self, words: Sequence[str]) -> list[str]:
        # A device's own environment, and nothing of this machine's. One hash seed, so that instructions can be counted.
        known = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "QEMU_CPU": self._cpu, "PYTHONHASHSEED": "0"}
        known["ORT_DISABLE_TELEMETRY"] = "1"
        enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _ENTER, "enter", str(self._root), str(self._qemu)]
        return ["env", "-i", *(f"{name}={value}" for name, value in known.items()), *enter, *words]

    def _failure(self, code: int, stderr: bytes) -> DeploykitError | None:
        """Entering failed, by the script's words or those of unshare."""
        text = stderr.decode("utf-8", "replace").strip()
        if (code == 97 and text.rpartition("\n")[2].startswith(_FAILED)) or (code == 1 and text.startswith("unshare: ")):
            fix = "Linux 6.7 or newer, and the right to make name spaces (root, or kernel.unprivileged_userns_clone)"
            return CapabilityError(f"{self.name} cannot be entered", why=text[-500:], fix=fix)
        return None
