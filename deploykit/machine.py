"""What machine this is, as far as results depend on it: architecture, CPU features, cores, GPU, versions.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

# The features that decide which int8 kernels ONNX Runtime and OpenVINO pick; /proc/cpuinfo's own words.
_FEATURES = {
    "x86_64": ("sse4_1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"),
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
}
_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_CPU_INFO = Path("/proc/cpuinfo")
_KERNEL_ARCH = Path("/proc/sys/kernel/arch")  # since Linux 6.1; qemu-user answers uname, and passes this file on
_OF_ONE_CPU = ({"x86_64", "i386", "i486", "i586", "i686"}, {"aarch64", "armv8l", "armv7l"})
_EMULATED = "emulated"
_PACKAGES = ("deploykit", "numpy", "torch", "torchvision", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")


@dataclass(frozen=True)
class Machine:
    """One machine. Two results may be compared only when their machines' `identity` is the same."""

    arch: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str
    python: str
    gpu: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def probe(cls) -> Machine:
        """Look at the machine this process runs on; imports none of the packages it lists.

        Takes milliseconds, and a second or so where there is an `nvidia-smi` to be asked.
        """
        return cls(
            arch=platform.machine(),
            cpu=_cpu(),
            features=cpu_features(),
            cores=available_cores(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            gpu=_gpu(),
            versions={name: version for name in _PACKAGES if (version := installed_version(name))},
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Machine:
        """The inverse of `jsonable.to_json`."""
        return cls(**{**value, "features": tuple(value["features"])})

    @property
    def identity(self) -> tuple[object, ...]:
        """What must be equal for two measurements, or an engine and its reader, to belong together."""
        return (self.arch, self.cpu, self.features, self.cores, self.gpu)

    @property
    def is_emulated(self) -> bool:
        """Whether another CPU pretends to be this one: answers are the same, and how long they take means nothing."""
        return _EMULATED in self.cpu

    @property
    def has_int8_dot_product(self) -> bool:
        """Whether the CPU multiplies int8 without intermediate saturation (VNNI, AMX, or ARM's dot product)."""
        return has_int8_dot_product(self.features)


def has_int8_dot_product(features: Iterable[str]) -> bool:
    """Whether a CPU with these features multiplies int8 without intermediate saturation."""
    return not _DOT_PRODUCTS.isdisjoint(features)


def cpu_features() -> tuple[str, ...]:
    """The CPU's features that decide about int8 kernels, in the kernel's words."""
    info = _read(_CPU_INFO)
    flags = set((_field(info, "flags") or _field(info, "Features")).split())
    return tuple(name for name in _FEATURES.get(platform.machine(), ()) if name in flags)


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, lowered by a container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory_bytes() -> int:
    """Memory that new work can have without swapping: the kernel's estimate, lowered by a container's limit (cgroup v2)."""
    amount = _field(_read(Path("/proc/meminfo")), "MemAvailable").split()
    found = 1024 * int(amount[0]) if amount else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    limit, used = (_read(group / name).strip() for name in ("memory.max", "memory.current"))
    if not (limit.isdecimal() and used.isdecimal()):
        return found
    # Pages of files count as used, and are given back when memory is short.
    cached = dict(line.split() for line in _read(group / "memory.stat").splitlines()).get("inactive_file", "0")
    return min(found, int(limit) - int(used) + int(cached))


def installed_version(package: str) -> str | None:
    """The installed version of a package, without importing it; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The CPU's name, with a word when the kernel is one for another architecture than this process."""
    name = _field(_read(_CPU_INFO), "model name") or platform.processor() or "unknown"
    kernel, here = _read(_KERNEL_ARCH).strip(), platform.machine()
    is_native = not kernel or kernel == here or any({kernel, here} <= family for family in _OF_ONE_CPU)
    return name if is_native or _EMULATED in name else f"{name}, {_EMULATED}"


def _gpu() -> str | None:
    """Name and driver of the first NVIDIA GPU; None when there is no working nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[0].strip() if answer.returncode == 0 and lines else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _field(info: str, name: str) -> str:
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
