"""A Jetson's own files: GPU clock, temperatures, over-current events, power rails, release, and nvpmodel's words.

Everything is read without root, from sysfs and /etc; what is not there, or cannot be read now, is None or left out.

This module runs on devices: standard library only, Python 3.10.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path("/")
# gm20b: Nano, gp10b: TX2, gv11b: Xavier, ga10b: Orin, gpu: how L4T 36 and later name the node.
_GPU_NODE = re.compile(r"ga10b|gv11b|gp10b|gm20b|gpu")
_MODE = re.compile(r"<\s*POWER_MODEL\s+(?:ID=(\d{1,4})\s+NAME=(\S{1,64})|NAME=(\S{1,64})\s+ID=(\d{1,4}))\s*>")
_STATUS = re.compile(r"\bpmode:(\d{1,4})\b")
_RELEASE = re.compile(r"R(\d{1,3}) \(release\), REVISION: (\d{1,3}(?:\.\d{1,3}){0,2})")


@dataclass(frozen=True)
class State:
    """What a board's files say at one moment. Clocks are Hz, temperatures degrees Celsius, power mW.

    `events` count over-current events since boot by their name, such as oc3_event_cnt.
    """

    gpu_hz: int | None = None
    gpu_most_hz: int | None = None
    temperatures_c: dict[str, float] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    power_mw: dict[str, float] = field(default_factory=dict)

    def events_since(self, before: State) -> dict[str, int]:
        """Over-current events that happened in between, by name; those that did not are left out."""
        return {
            name: count - before.events.get(name, 0) for name, count in self.events.items() if count > before.events.get(name, 0)
        }


def look(root: Path = _ROOT) -> State:
    """What the board says now, nothing where this is no Jetson; `root` stands in for the file system's in tests."""
    if not is_jetson(root):  # a PC's thermal zones have limits of their own
        return State()
    node = _gpu_node(root)
    return State(
        gpu_hz=_number(node / "cur_freq") if node else None,
        gpu_most_hz=_number(node / "max_freq") if node else None,
        temperatures_c=_temperatures(root),
        events=_events(root),
        power_mw=_rails(root),
    )


def is_jetson(root: Path = _ROOT) -> bool:
    """Whether this machine is a Jetson."""
    return l4t(root) is not None or "jetson" in (model(root) or "").lower()


def model(root: Path = _ROOT) -> str | None:
    """The module's name, as the device tree has it."""
    return _text(root / "proc/device-tree/model").replace("\0", "").strip() or None


def l4t(root: Path = _ROOT) -> str | None:
    """The release of Jetson Linux, such as 36.4.3."""
    found = _RELEASE.search(_text(root / "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else None


def power_modes(config: str) -> dict[int, str]:
    """Number and name of the power modes in the text of /etc/nvpmodel.conf."""
    return {int(first or last): name or other for first, name, other, last in _MODE.findall(config)}


def power_mode(answer: str) -> tuple[int | None, str | None]:
    """(number, name) from what `nvpmodel -q` answered; None for what it does not say."""
    name = re.search(r"NV Power Mode:\s*(\S{1,64})", answer)
    number = re.search(r"^\s*(\d{1,4})\s*$", answer, re.MULTILINE)
    return (int(number[1]) if number else None, name[1] if name else None)


def current_mode(root: Path = _ROOT) -> tuple[int | None, str | None]:
    """(number, name) of the power mode that nvpmodel set last, from its own files: asking the tool itself takes root."""
    found = _STATUS.search(_text(root / "var/lib/nvpmodel/status"))
    if found is None:
        return None, None
    return int(found[1]), power_modes(_text(root / "etc/nvpmodel.conf")).get(int(found[1]))


def named_mode(root: Path = _ROOT) -> str | None:
    """What the power mode is called, or its number where its name is not known; None for what is no Jetson."""
    number, name = current_mode(root)
    return name or (None if number is None else str(number))


def _gpu_node(root: Path) -> Path | None:
    nodes = sorted((root / "sys/class/devfreq").glob("*"))
    return next((node for node in nodes if _GPU_NODE.search(node.name)), None)


def _temperatures(root: Path) -> dict[str, float]:
    found = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, milli = _text(zone / "type").strip(), _number(zone / "temp")
        # Nano's PMIC-Die reads 100 degrees whatever happens; an unpowered zone reads -256.
        if name and not name.lower().startswith("pmic") and milli is not None and milli > -200_000:
            found[name.removesuffix("-thermal").lower()] = milli / 1000
    return found


def _events(root: Path) -> dict[str, int]:
    found = {}
    for node in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(node / "name").strip() == "soctherm_oc":
            counts = {path.name: _number(path) for path in sorted(node.glob("oc*_event_cnt"))}
            found.update({name: count for name, count in counts.items() if count is not None})
    return found


def _rails(root: Path) -> dict[str, float]:
    """Of INA3221 power monitors: millivolts times milliamperes, by the label of the channel."""
    found = {}
    for node in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if not _text(node / "name").startswith("ina3221"):
            continue
        for label in sorted(node.glob("in*_label")):
            channel = label.name.removeprefix("in").removesuffix("_label")
            name = _text(label).strip()
            volts, amperes = _number(node / f"in{channel}_input"), _number(node / f"curr{channel}_input")
            if name and name != "NC" and volts is not None and amperes is not None:
                found[name] = volts * amperes / 1000
    return found


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # an unpowered zone answers EAGAIN
        return ""
