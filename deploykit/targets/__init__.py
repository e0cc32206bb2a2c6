"""Boards and machines that a network may be meant for: what they have, in what power modes, and where each figure is from.

A target is a TOML file; those of this folder are known by name, and a user's own is read by its path. Every figure names
its source, or says by what rule it was derived.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deploykit.errors import UsageError, printable
from deploykit.machine import has_int8_dot_product

__all__ = ["Figure", "PowerMode", "Target", "find", "in_mode", "names", "source"]

_FOLDER = Path(__file__).parent
OLDEST_BUILT = (10, 3)  # the TensorRT that this package's engines are built with, at least
UNITS = {
    "sm": "SMs",
    "cores": "cores",
    "gpu_mhz": "MHz",
    "cpu_mhz": "MHz",
    "base_mhz": "MHz",
    "int8_tops": "TOPS",
    "fp16_tops": "TFLOPS",
    "tf32_tops": "TFLOPS",
    "fp32_tops": "TFLOPS",
    "bandwidth_gbs": "GB/s",
    "l2_kib": "KiB",
    "memory_gib": "GiB",
    "dla": "cores",
    "watts": "W",
}


@dataclass(frozen=True)
class Figure:
    """One figure of a board in the unit of its name; `source` is where it is from, or by what rule it was `derived`."""

    value: float
    source: str
    derived: bool


@dataclass(frozen=True)
class PowerMode:
    """What nvpmodel makes of a board: `sm` of its SMs at `gpu_mhz`, and its memory at `bandwidth_gbs`."""

    name: str
    id: int
    watts: float
    sm: int
    gpu_mhz: float
    bandwidth_gbs: float
    source: str


@dataclass(frozen=True)
class Target:
    """A board, as `figures` by name in the units of UNITS; rates are dense and of the GPU alone, without DLA.

    `jetpack` are the releases that run on it, oldest first, empty for what is no Jetson. `mode` is the power mode that the
    figures stand for, None for a board's highest clocks. A GPU has a `compute_capability`, a CPU `arch` and `features`.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    kind: Literal["gpu", "cpu"]
    figures: Mapping[str, Figure]
    compute_capability: str = ""
    arch: str = ""
    features: tuple[str, ...] = ()
    jetpack: tuple[str, ...] = ()
    modes: tuple[PowerMode, ...] = ()
    mode: str | None = None

    def value(self, figure: str) -> float:
        """A figure's value; 0 for one that this board does not have."""
        return self.figures[figure].value if figure in self.figures else 0.0

    def rate(self, precision: str) -> float:
        """Operations in a second at this precision, dense: the name is that of a figure without its unit. 0: no such kernels."""
        return 1e12 * self.value(f"{precision}_tops")

    @property
    def is_jetson(self) -> bool:
        """Whether its software comes as JetPack."""
        return bool(self.jetpack)

    @property
    def has_int8(self) -> bool:
        """Whether it multiplies int8 faster than wider numbers."""
        return self.rate("int8") > 0 and (self.kind == "gpu" or has_int8_dot_product(self.features))


def names() -> list[str]:
    """The boards that are known by name."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def find(name: str) -> Target:
    """The board of that name or alias, or of the user's own TOML file at that path.

    Raises UsageError for an unknown one, naming the nearest, and listing all problems of a file at once.
    """
    from deploykit.targets import reading

    return reading.read(source(name))


def source(name: str) -> Path:
    """The file of the board of that name or alias, or the user's own. Raises UsageError for an unknown name."""
    from deploykit.targets import reading

    if name.endswith(".toml"):
        return Path(name)
    known = {path.stem: path for path in _FOLDER.glob("*.toml")}
    if name in known:
        return known[name]
    aliases = {alias: path for path in known.values() for alias in reading.read(path).aliases}
    if name in aliases:
        return aliases[name]
    near = difflib.get_close_matches(name.lower(), [*known, *aliases], n=3)
    raise UsageError(
        f"there is no target {printable(name)!r}",
        why=f"the nearest names are {', '.join(near)}" if near else "",
        fix="deploykit targets lists them; your own is a TOML file: --target ./board.toml",
    )


def in_mode(target: Target, mode: str) -> Target:
    """The board in a power mode, by name or number: its rates follow SMs and clock, its bandwidth the memory's.

    Raises UsageError for a mode that it does not have.
    """
    wanted = mode.lower()
    found = next((each for each in target.modes if wanted in (each.name.lower(), str(each.id))), None)
    if found is None:
        listed = ", ".join(f"{each.name} ({each.id})" for each in target.modes) or "none"
        raise UsageError(f"{target.name} has no power mode {printable(mode)!r}", why=f"it has {listed}")
    source = f"power mode {found.name}"
    share = found.sm * found.gpu_mhz / (target.value("sm") * target.value("gpu_mhz"))
    figures = {
        name: replace(figure, value=figure.value * share, source=f"{figure.source}; {source}", derived=True)
        if name.endswith("_tops")
        else figure
        for name, figure in target.figures.items()
    }
    for name, value in (("sm", found.sm), ("gpu_mhz", found.gpu_mhz), ("bandwidth_gbs", found.bandwidth_gbs)):
        figures[name] = Figure(value, source, derived=False)
    return replace(target, figures=figures, mode=found.name)
