"""A line of tegrastats -> Sample, for every JetPack from 4 to 7.2; what a line does not say is None or left out.

The words differ by release: percentages may be missing, clocks be lists, rails come with and without their unit, zones in
capitals or not, and on release 7.2 with their highest value. Whatever else stands in a line is passed over.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_NUMBER = r"\d{1,9}(?:\.\d{1,6})?"
_TIME = re.compile(r"^\s*(\d{2}-\d{2}-\d{4} \d{2}:\d{2}:\d{2})\s")
_MEMORY = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB\b")
_SWAP = re.compile(r"\bSWAP (\d{1,9})/(\d{1,9})MB\b")
_CPUS = re.compile(r"\bCPU \[([^\]]{0,4096})\]")
_CPU = re.compile(r"^(\d{1,3})%(?:@(\d{1,6}))?$")
_LOAD = re.compile(r"(?<![\w.])(EMC|GR3D)_FREQ(?: (\d{1,3})%)?(?:@(\d{1,6})| ?@?\[([\d,\s]{1,256})\]| @(\d{1,6}))?(?!\S)")
_ZONE = re.compile(rf"(?<!\S)([A-Za-z][\w-]{{0,40}})@(-?{_NUMBER})C(?:/-?{_NUMBER}C)?(?!\S)")
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]{1,40}) (\d{1,9})(?:mW)?/(\d{1,9})(?:mW)?(?:/(\d{1,9})(?:mW)?)?(?!\S)")
_ENGINE = re.compile(r"(?<!\S)(NVDLA\d|NVENC\d?|NVDEC\d?|NVJPG\d?|VIC|OFA|PVA\d|APE)(?:_FREQ)?(?: (off)| @?(\d{1,6}))(?!\S)")
_NO_RAILS = frozenset({"NC", "RAM", "SWAP", "IRAM"})
_UNPOWERED_C = -200.0
_FIXED_ZONES = frozenset({"PMIC"})  # reads 100 whatever happens
# The rails that together are all that a module takes; where several sets match, the first one (tensorrt.md's sources: L4T
# documentation, power monitors). AGX Orin has no single input rail.
_TOTALS = (("VIN",), ("VDD_IN",), ("POM_5V_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))


@dataclass(frozen=True)
class Sample:
    """One line. Loads are percent, clocks MHz, temperatures degrees Celsius, power mW as it was at this moment.

    `cpu` has one (load, clock) for each core, None for one that is off. `gpu_mhz` is the lowest of several clocks. Zones are
    in lower case, unpowered ones and the PMIC's constant left out. `engines` have a clock, 0 for one that is off.
    """

    time: str | None = None
    ram_mb: tuple[int, int] | None = None
    swap_mb: tuple[int, int] | None = None
    cpu: tuple[tuple[int, int | None] | None, ...] = ()
    emc_percent: int | None = None
    emc_mhz: int | None = None
    gpu_percent: int | None = None
    gpu_mhz: int | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_mw: dict[str, int] = field(default_factory=dict)
    engines_mhz: dict[str, int] = field(default_factory=dict)

    @property
    def total_mw(self) -> int | None:
        """What the module takes; None where no known set of rails adds up to it."""
        found = total_mw(self.power_mw)
        return None if found is None else int(found)

    @property
    def hottest_c(self) -> float | None:
        """The junction's temperature, or the highest of all zones."""
        return self.temperatures_c.get("tj", max(self.temperatures_c.values(), default=None))


def parse(line: str) -> Sample | None:
    """What a line says; None for one that is no sample, such as the half line at the end of a file. Never raises."""
    text = line.replace("\0", " ")
    memory = _MEMORY.search(text)
    loads = {found[1]: found for found in _LOAD.finditer(text)}
    if memory is None and not loads:
        return None
    time = _TIME.match(text)
    gpu, emc = loads.get("GR3D"), loads.get("EMC")
    return Sample(
        time=time[1] if time else None,
        ram_mb=_pair(memory),
        swap_mb=_pair(_SWAP.search(text)),
        cpu=_cores(text),
        emc_percent=_percent(emc),
        emc_mhz=_clock(emc),
        gpu_percent=_percent(gpu),
        gpu_mhz=_clock(gpu),
        temperatures_c=dict(_zones(text)),
        power_mw={name: int(now) for name, now, *_ in _RAIL.findall(text) if name not in _NO_RAILS},
        engines_mhz={name: int(clock or 0) for name, _, clock in _ENGINE.findall(text)},
    )


def total_mw(power_mw: Mapping[str, float]) -> float | None:
    """What a module takes by its rails, whoever read them; None where no known set of them adds up to it."""
    for rails in _TOTALS:
        if all(rail in power_mw for rail in rails):
            return sum(power_mw[rail] for rail in rails)
    return None


def samples(lines: Iterable[str]) -> Iterator[Sample]:
    """The samples of a file's lines."""
    return (found for line in lines if (found := parse(line)) is not None)


def energy_mj(found: Iterable[Sample], interval_s: float) -> float | None:
    """Energy in millijoules over samples that are `interval_s` apart, from what the module took at each; None when unknown.

    The averages that tegrastats prints itself are since it started, so they are not used.
    """
    taken = [sample.total_mw for sample in found]
    known = [power for power in taken if power is not None]
    return interval_s * sum(known) * len(taken) / len(known) if known else None


def _pair(found: re.Match[str] | None) -> tuple[int, int] | None:
    return (int(found[1]), int(found[2])) if found else None


def _cores(text: str) -> tuple[tuple[int, int | None] | None, ...]:
    found = _CPUS.search(text)
    entries = [entry.strip() for entry in found[1].split(",")] if found else []
    cores = []
    for entry in entries:
        core = _CPU.match(entry)
        if core is not None or entry == "off":
            cores.append((int(core[1]), int(core[2]) if core[2] else None) if core else None)
    return tuple(cores)


def _percent(found: re.Match[str] | None) -> int | None:
    return int(found[2]) if found and found[2] else None


def _clock(found: re.Match[str] | None) -> int | None:
    """One clock, or the lowest of a list: a query waits for the slowest of them."""
    if not found:
        return None
    several = [int(part) for part in (found[4] or "").split(",") if part.strip().isdigit()]
    single = found[3] or found[5]
    return int(single) if single else min(several, default=None)


def _zones(text: str) -> Iterator[tuple[str, float]]:
    for name, degrees in _ZONE.findall(text):
        if float(degrees) > _UNPOWERED_C and name not in _FIXED_ZONES:
            yield name.lower(), float(degrees)
