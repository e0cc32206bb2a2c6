"""JetPack -> L4T -> CUDA -> TensorRT -> Python: what a Jetson's release brings along, and whether engines can be built there.

Sources: NVIDIA's JetPack archive pages; jetson_stats' version map; release notes of TensorRT 10.16 and 11.4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.errors import CapabilityError
from deploykit.targets import OLDEST_BUILT, Target


@dataclass(frozen=True)
class Release:
    """What a JetPack release brings."""

    jetpack: str
    l4t: str
    ubuntu: str
    python: str
    cuda: str
    tensorrt: str
    cudnn: str


RELEASES = {
    release.jetpack: release
    for release in (
        Release("4.6", "32.6 to 32.7", "18.04", "3.6", "10.2", "8.0.1 to 8.2.1", "8.2.1"),
        Release("5.0.2", "35.1", "20.04", "3.8", "11.4", "8.4.1", "8.4.1"),
        Release("5.1", "35.2 to 35.6.4", "20.04", "3.8", "11.4", "8.5.2", "8.6"),
        Release("6.0", "36.3", "22.04", "3.10", "12.2", "8.6.2", "8.9"),
        Release("6.1", "36.4 to 36.5", "22.04", "3.10", "12.6", "10.3.0", "9.3"),
        Release("7.0", "38.2 to 38.4", "24.04", "3.12", "13.0", "10.13", "9.12"),
        Release("7.2", "39.2", "24.04", "3.12", "13.2", "10.16", "9"),
    )
}


def of(target: Target) -> list[Release]:
    """The releases that run on a board, oldest first; empty for what is no Jetson."""
    return [RELEASES[name] for name in target.jetpack]


def require_builds(target: Target) -> None:
    """Raise CapabilityError when no release for this board has a TensorRT that our graphs are built with."""
    releases = of(target)
    if not releases or any(_version(release.tensorrt) >= OLDEST_BUILT for release in releases):
        return
    newest = releases[-1]
    raise CapabilityError(
        f"no engine is made for {target.title}: its latency is predicted only",
        why=f"its newest JetPack, {newest.jetpack}, has TensorRT {newest.tensorrt}, and strongly typed Q/DQ graphs want "
        f"{'.'.join(map(str, OLDEST_BUILT))}",
        fix="choose a board that JetPack 6.1 or newer runs on, or --to onnx and TensorRT 8's own tools on the device",
    )


def _version(text: str) -> tuple[int, ...]:
    """The newest of a range as numbers."""
    return tuple(int(part) for part in text.rpartition(" ")[2].split("."))
