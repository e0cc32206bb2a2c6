"""The machine this runs on as a target: a known board by the name it gives itself, otherwise its CPU, from what it says.

Nothing is measured here: what a CPU does not tell (its bandwidth, its clock under load) is derived by rule, and a few
measurements correct it, see `fit.calibrated`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from deploykit import targets
from deploykit.machine import Machine
from deploykit.targets import Figure, Target
from deploykit.telemetry import board

_ROOT = Path("/")
NAME = "local"
# Operations in a clock of one core, two for each product, of the widest instructions that a CPU has; the first that fits.
_FP32 = (("avx512f", 64), ("fma", 32), ("avx", 16), ("asimdhp", 16), ("", 8))
_INT8 = (
    *(("amx_int8", 2048), ("avx512_vnni", 256), ("avx_vnni", 128), ("i8mm", 128), ("asimddp", 64), ("avx512bw", 84)),
    *(("avx2", 42), ("", 16)),
)
_GBS_A_CORE, _MOST_GBS = 12.8, 51.2
_USUAL_MHZ, _USUAL_L2_KIB = 2000.0, 512.0
# The device tree's words for a module, and how much memory tells apart what they leave open.
_JETSONS = (
    (r"agx orin industrial", ((0, "agx-orin-industrial"),)),
    (r"agx orin.*developer kit", ((0, "agx-orin-64gb"),)),  # also the one with 32 GB has the whole GPU
    (r"agx orin", ((40, "agx-orin-64gb"), (0, "agx-orin-32gb"))),
    (r"orin nx", ((10, "orin-nx-16gb"), (0, "orin-nx-8gb"))),
    (r"orin nano", ((5, "orin-nano-8gb"), (0, "orin-nano-4gb"))),
    (r"thor", ((80, "thor-t5000"), (0, "thor-t4000"))),
    (r"xavier nx", ((0, "xavier-nx"),)),
    (r"agx xavier|jetson-agx", ((0, "agx-xavier"),)),
    (r"tx2|quill", ((0, "jetson-tx2"),)),
    (r"jetson nano", ((0, "jetson-nano"),)),
)
_SUPER = 1.05  # a GPU whose highest clock is that far above the board's runs in Super mode


def of_machine(machine: Machine, root: Path = _ROOT) -> Target:
    """The board that `machine`, which is this one, is; its CPU where no GPU of it is known. `root` is the file system's in tests.

    A Jetson is taken in the power mode that it is in, where its files say so.
    """
    if board.is_jetson(root):
        found = jetson(board.model(root) or "", machine.memory_bytes / 2**30, board.look(root).gpu_most_hz)
        if found is not None:
            number, _ = board.current_mode(root)
            is_known = any(mode.id == number for mode in found.modes)
            return targets.in_mode(found, str(number)) if is_known else found
    return _gpu(machine.gpu or "") or _cpu(machine, root)


def jetson(model: str, memory_gib: float, gpu_most_hz: float | None = None) -> Target | None:
    """The module that the device tree calls `model`; None for one that is not known."""
    rows = next((rows for pattern, rows in _JETSONS if re.search(pattern, model.lower())), ())
    name = next((name for least_gib, name in rows if memory_gib >= least_gib), None)
    if name is None:
        return None
    found = targets.find(name)
    is_super = gpu_most_hz is not None and gpu_most_hz > _SUPER * 1e6 * found.value("gpu_mhz")
    return targets.find(f"{name}-super") if is_super and f"{name}-super" in targets.names() else found


def _gpu(told: str) -> Target | None:
    """The GPU whose title has all words of what nvidia-smi says, such as `NVIDIA A100-PCIE-40GB, 550.54, 8.0`; the shortest."""
    name = re.sub(r"\bsxm\d|\bhbm3\b", "sxm", told.partition(",")[0].lower())  # that driver calls H100 SXM so
    words = set(re.findall(r"[a-z0-9]+", name)) - {"nvidia", "tesla"}
    boards = [targets.find(name) for name in targets.names()]
    titles = {each.name: set(re.findall(r"[a-z0-9]+", each.title.lower())) - {"nvidia"} for each in boards}
    # NVIDIA's own names leave out what a title adds, such as the memory.
    fits = [
        each
        for each in boards
        if each.kind == "gpu" and not each.is_jetson and "mig" not in titles[each.name] and words and words <= titles[each.name]
    ]
    return min(fits, key=lambda each: len(titles[each.name]), default=None)


def _cpu(machine: Machine, root: Path) -> Target:
    cores, mhz, clock_from = machine.cores, *_clock_mhz(root)
    figures = {
        "cores": Figure(cores, "cores that this process may use", derived=False),
        "cpu_mhz": Figure(mhz, clock_from, derived=not clock_from.startswith("/")),
        "bandwidth_gbs": Figure(min(_GBS_A_CORE * cores, _MOST_GBS), "a guess: 12.8 GB/s a core, at most 51.2", derived=True),
        "l2_kib": Figure(*_cache_kib(root, cores), derived=True),
        "memory_gib": Figure(round(machine.memory_bytes / 2**30, 1), "/proc/meminfo", derived=False),
    }
    for name, table in (("int8_tops", _INT8), ("fp32_tops", _FP32)):
        feature, operations = _widest(table, machine.features)
        rule = f"{operations} op/clk/core: {feature or 'no wide instructions are known'}"
        figures[name] = Figure(float(f"{operations * mhz * cores / 1e6:.4g}"), rule, derived=True)
    return Target(
        name=NAME,
        title=f"{machine.cpu}, {cores} cores",
        aliases=(),
        kind="cpu",
        figures=figures,
        arch=machine.arch,
        features=machine.features,
    )


def _widest(table: Iterable[tuple[str, int]], features: Iterable[str]) -> tuple[str, int]:
    return next((name, operations) for name, operations in table if not name or name in features)


def _clock_mhz(root: Path) -> tuple[float, str]:
    path = root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"
    text = _read(path).strip()
    if text.isdigit():
        return int(text) / 1e3, f"/{path.relative_to(root)}"
    clocks = [float(number) for number in re.findall(r"^cpu MHz\s*:\s*(\d+(?:\.\d+)?)", _read(root / "proc/cpuinfo"), re.M)]
    return (max(clocks), "/proc/cpuinfo, as it was") if max(clocks, default=0) > 0 else (_USUAL_MHZ, "a guess: it does not say")


def _cache_kib(root: Path, cores: int) -> tuple[float, str]:
    """The largest cache that core 0 reaches, in KiB, and where that is from."""
    sizes = [_read(path).strip() for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [int(size[:-1]) * {"K": 1, "M": 1024}[size[-1]] for size in sizes if re.fullmatch(r"\d{1,9}[KM]", size)]
    if found:
        return float(max(found)), "the last level of cache that core 0 has"
    return _USUAL_L2_KIB * cores, "a guess: 512 KiB a core"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
