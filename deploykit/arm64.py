"""A 64-bit ARM root for qemu-user: a folder with Debian, Python and ONNX Runtime, in the place of a board.

Nothing is installed on this machine, and nothing in the folder is executed while it is made: packages are unpacked and not
configured, and the wheels are those for ARM, in this machine's versions. As a device it is reached by
`deploykit.remote.emulated`; for `--arm-root` (parity and instruction counts of one graph) qemu reads it where it lies.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploykit.errors import CapabilityError, StageError, UsageError, printable, translating_os_errors
from deploykit.machine import installed_version
from deploykit.progress import Progress, silent

SITE, CPU_INFO, CPU, MARK = "opt/site", "etc/cpuinfo", "etc/qemu-cpu", "emulated by qemu-user"
_WORK = "making an ARM root"
_SUITE, _PYTHON = "bookworm", "3.11"
# ssh-keygen checks signatures on a device; coreutils and a shell are what every device has.
_DEBIAN = (f"python{_PYTHON}", f"libpython{_PYTHON}-stdlib", "libstdc++6", "libgomp1", "dash", "coreutils", "openssh-client")
_WHEELS = ("onnxruntime", "numpy")
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014")
# Links that Debian has had in place of these folders since 12, and that no package that is only unpacked makes.
_MERGED = 'mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib"; for name in bin sbin lib; do ln -s "usr/$name" "$1/$name"; done'
_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
# Kernel words (HWCAP) of the CPUs that `emulate.CPUS` has; the second has an int8 dot product.
CPUS: Mapping[str, tuple[str, str]] = {
    "cortex-a72": ("Cortex-A72", f"{_FEATURES} cpuid"),
    "cortex-a76": ("Cortex-A76", f"{_FEATURES} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
}


def make(root: Path, cpu: str = "cortex-a76", *, progress: Progress = silent) -> dict[str, str]:
    """Make a root at `root`, complete or not at all; the versions of what is in it. `cpu` is one of `CPUS`.

    Raises UsageError when there is something at `root`, CapabilityError when this machine lacks a tool or the right to use it,
    StageError with a tool's words when it fails.
    """
    if cpu not in CPUS:
        raise UsageError(f"there is no emulated ARM CPU {printable(cpu)!r}", fix=f"one of {', '.join(CPUS)}")
    if root.exists() or root.is_symlink():
        raise UsageError(f"{printable(root)} is there already", fix="choose another folder, or remove it")
    if shutil.which("mmdebstrap") is None:
        fix = "install the Debian packages mmdebstrap and qemu-user-static"
        raise CapabilityError("a 64-bit ARM root cannot be made here", why="there is no mmdebstrap", fix=fix)
    versions = {name: installed_version(name) for name in _WHEELS}
    if None in versions.values():
        fix = "pip install 'deploykit[onnxruntime]'"
        raise CapabilityError("a 64-bit ARM root gets this machine's ONNX Runtime", why="there is none here", fix=fix)
    # Not `publish.directory`: thousands of files would be synced one by one, and what a power cut breaks is made again.
    with (
        translating_os_errors("write", root),
        tempfile.TemporaryDirectory(dir=root.absolute().parent, prefix=".arm64-") as scratch,
    ):
        folder = Path(scratch, "root")
        progress(_WORK, 0, 3)
        _debian(folder)
        progress(_WORK, 1, 3)
        _wheels(folder / SITE, [f"{name}=={version}" for name, version in versions.items()])
        progress(_WORK, 2, 3)
        _finish(folder, cpu)
        folder.rename(root)
    progress(_WORK, 3, 3)
    return {name: str(version) for name, version in versions.items()}


def cpu_of(root: Path) -> str:
    """The CPU that a root stands for. Raises UsageError when it is no root that `make` made."""
    try:
        found = (root / CPU).read_text().strip()
    except OSError as error:
        fix = f"deploykit device emulate {printable(root)}"
        raise UsageError(f"{printable(root)} is no 64-bit ARM root", why=f"there is no {CPU} in it", fix=fix) from error
    if found not in CPUS:
        raise UsageError(f"{printable(root / CPU)} names no CPU that is known", why=repr(printable(found)[:80]))
    return found


def _debian(root: Path) -> None:
    command = ["mmdebstrap", "--quiet", "--arch=arm64", "--variant=extract", f"--include={','.join(_DEBIAN)}"]
    _run([*command, '--aptopt=APT::Install-Recommends "false"', f"--setup-hook={_MERGED}", _SUITE, str(root)])


def _wheels(site: Path, wanted: Sequence[str]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(site)]
    pip += ["--only-binary=:all:", "--python-version", _PYTHON, "--implementation", "cp"]
    pip += [word for abi in (f"cp{_PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    pip += [word for platform in _PLATFORMS for word in ("--platform", f"{platform}_aarch64")]
    _run([*pip, *wanted])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = printable(" / ".join(lines[-3:]))[:600] or f"exit code {done.returncode}"
        raise StageError(
            f"{Path(command[0]).name} failed, so there is no root", why=why, fix="as root, with Debian's mirror in reach"
        )


def _finish(root: Path, cpu: str) -> None:
    """What configuring the packages would have done, and what a CPU says of itself."""
    for name in ("proc", "sys", "dev", "root", "tmp", "opt/deploykit"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    (root / "usr" / "bin" / "python3").symlink_to(f"python{_PYTHON}")
    packages = root / "usr" / "lib" / "python3" / "dist-packages"
    packages.mkdir(parents=True, exist_ok=True)
    (packages / "wheels.pth").write_text(f"/{SITE}\n")
    (root / CPU).write_text(f"{cpu}\n")
    text = cpu_info(cpu)
    (root / CPU_INFO).write_text(text)
    (root / "proc" / "cpuinfo").write_text(text)  # where qemu -L looks, which is not asked for by a connection


def cpu_info(cpu: str) -> str:
    """What /proc/cpuinfo says on `cpu`; the library by which ONNX Runtime learns what it can do dies of an x86 one.

    The part number is that of a Cortex-A78AE, which that library does not know better than HWCAP, that is, than `-cpu`: from
    the part of a Cortex-A76 it would conclude that there is a dot product, and die on a Cortex-A72.
    """
    name, features = CPUS[cpu]
    fields = {
        "model name": f"{name}, {MARK}",
        "BogoMIPS": "62.50",
        "Features": features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": "0xd42",
        "CPU revision": "1",
    }
    cores = ["\n".join(f"{key}\t: {value}" for key, value in {"processor": number, **fields}.items()) for number in range(2)]
    return "\n\n".join(cores) + "\n\n"
