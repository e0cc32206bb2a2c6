"""Whether an engine can be loaded on a machine, decided before TensorRT or the GPU is touched.

Sources: TensorRT documentation, "Engine Compatibility" and "Engine Portability" (10.16, 11.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deploykit.runtimes.cudart import Device

Hardware = Literal["this", "same compute capability", "ampere and newer"]
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Place:
    """Where an engine was built, or where it is to run."""

    arch: str
    tensorrt: str
    device: Device

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Place:
        """The inverse of `jsonable.to_json`."""
        device = value["device"]
        return cls(
            value["arch"],
            value["tensorrt"],
            Device(**{**device, "compute_capability": tuple(device["compute_capability"])}),
        )

    def __str__(self) -> str:
        device = self.device
        capability = "{}.{}".format(*device.compute_capability)
        sms = f"{device.multiprocessors} SMs"
        return f"compute capability {capability} ({device.name}, {sms}), TensorRT {self.tensorrt}, {self.arch}"


def why_refused(built: Place, here: Place, *, version_compatible: bool, hardware: Hardware) -> list[str]:
    """Every reason why an engine cannot be loaded `here`; none when it can."""
    found = []
    if built.arch != here.arch:
        found.append(f"an engine for {built.arch} never runs on {here.arch}")
    if not _is_version_compatible(built.tensorrt, here.tensorrt, version_compatible):
        kind = "version-compatible engine" if version_compatible else "engine"
        found.append(f"an {kind} of TensorRT {built.tensorrt} does not run on {here.tensorrt}".replace("an version", "a version"))
    there, now = built.device, here.device
    if hardware == "ampere and newer":
        if now.compute_capability < _AMPERE:
            found.append("an engine for Ampere and newer GPUs does not run on an older one")
    elif there.compute_capability != now.compute_capability:
        found.append("the compute capability is another one")
    elif hardware == "this" and (there.name, there.multiprocessors) != (now.name, now.multiprocessors):
        found.append("the GPU is another one of the same compute capability: tactics were chosen on the first, and may fail here")
    return found


def _is_version_compatible(built: str, here: str, version_compatible: bool) -> bool:
    """Without the flag versions have to be equal. With it, a plan runs on newer ones of its major version and of the next
    (8 on 10, 10 on 11), never on older ones."""
    if not version_compatible:
        return built == here
    old, new = _numbers(built), _numbers(here)
    next_major = {8: 10, 10: 11}.get(old[0])
    return new >= old and new[0] in (old[0], next_major)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
