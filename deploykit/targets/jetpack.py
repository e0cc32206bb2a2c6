"""JetPack -> L4T -> CUDA -> TensorRT -> Python: what a Jetson's release brings along, and whether engines can be built there.

Sources: NVIDIA's JetPack archive pages; jetson_stats' version map; release notes of TensorRT 10.16 and 11.4.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deploykit.errors import CapabilityError
from deploykit.targets import OLDEST_BUILT, Target

_BF16_SINCE = 8.0  # Ampere


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
        # 11.4.1 can be installed there, as the package for ARM servers; the empty ones are not published.
        Release("7.2.2", "", "", "", "13", "11.4.1", ""),
    )
}


def of(target: Target) -> list[Release]:
    """The releases that run on a board, oldest first; empty for what is no Jetson."""
    return [RELEASES[name] for name in target.jetpack]


@dataclass(frozen=True)
class Abilities:
    """What a TensorRT does with graphs whose precision is in the graph.

    opset: the newest it reads. strongly_typed: whether it takes precision from the graph, which our engines need. half_scales:
    whether Q/DQ may have FP16 scales. dla: what of it runs on DLA cores.
    """

    since: tuple[int, ...]
    opset: int
    strongly_typed: bool
    half_scales: bool
    dla: Literal["none", "fp16", "fp16 and int8"]


# Newest first. Opsets: onnx-tensorrt docs/operators.md at each release. DLA: "Strongly Typed Networks for DLA" and "Working with
# DLA" of 11.3 and 11.4.1: 10.7 was the last with it, 11.4.1 has it again, on AGX Orin with JetPack 7.2.2, and with Q/DQ.
_ABILITIES = (
    Abilities((11, 4, 1), 24, True, True, "fp16 and int8"),
    Abilities((10, 13), 24, True, True, "none"),
    Abilities((10, 9), 22, True, True, "none"),
    Abilities((10, 8), 20, True, True, "none"),
    Abilities((10, 3), 20, True, True, "fp16"),
    Abilities((8, 5), 17, False, False, "fp16 and int8"),
    Abilities((0,), 13, False, False, "fp16 and int8"),
)


def abilities(tensorrt: str) -> Abilities:
    """What that version of TensorRT does; of a range of versions the newest."""
    return next(found for found in _ABILITIES if _version(tensorrt) >= found.since)


def here(l4t: str | None, tensorrt: str | None) -> list[str]:
    """What of this table holds for a machine with that L4T (None: it is no Jetson) and that TensorRT (None: it has none)."""
    release = None if l4t is None else _of_l4t(l4t)
    told = []
    if release is not None:
        brings = f"CUDA {release.cuda}, TensorRT {release.tensorrt}, Python {release.python}"
        told.append(f"JetPack {release.jetpack} (L4T {l4t}) comes with {brings}")
    elif l4t is not None:
        told.append(f"L4T {l4t} is of no JetPack that is known here")
    version = tensorrt or (release.tensorrt if release is not None else None)
    if version is None:
        return told
    able = abilities(version)
    if not able.strongly_typed:
        return [*told, f"TensorRT {version} does not take precision from the graph: no engine of ours is built with it"]
    dla = {"none": "none", "fp16": "FP16 alone, no Q/DQ"}.get(able.dla, "FP16 and Q/DQ, on AGX Orin")
    takes = "INT8 and FP16 from the graph, with FP16 scales"
    return [*told, f"TensorRT {version} takes {takes}; newest opset {able.opset}; on DLA cores: {dla}"]


def _of_l4t(l4t: str) -> Release | None:
    numbers = [int(part) for part in re.findall(r"\d+", l4t)]
    for release in RELEASES.values():
        ends = [[int(part) for part in end.split(".")] for end in release.l4t.split(" to ") if end]
        if ends and ends[0] <= numbers[: len(ends[0])] and numbers[: len(ends[-1])] <= ends[-1]:
            return release
    return None


def building(target: Target) -> list[Release]:
    """The releases for a board whose TensorRT builds our graphs, oldest first; empty for what is no Jetson."""
    return [release for release in of(target) if abilities(release.tensorrt).strongly_typed]


def refusals(target: Target, *, int8: bool, float_type: str, dla_core: int | None, opset: int) -> list[str]:
    """Why an engine that is asked for cannot be built on a board, each reason; none when its oldest release that builds does it.

    Raises CapabilityError when none of its releases builds our engines.
    """
    if target.kind != "gpu":
        return [f"{target.title} runs no TensorRT: it has no GPU that is known here; --to onnxruntime or openvino"]
    require_builds(target)
    found = []
    if int8 and not target.has_int8:
        found.append(f"{target.title} has no int8 kernels (compute capability {target.compute_capability}): FP16 is what it has")
    if float_type == "bf16" and float(target.compute_capability or 0) < _BF16_SINCE:
        found.append(f"{target.title} has no bfloat16: that came with compute capability {_BF16_SINCE}")
    releases = building(target)
    if releases and opset > (most := min(abilities(release.tensorrt).opset for release in releases)):
        found.append(f"TensorRT {releases[0].tensorrt} of JetPack {releases[0].jetpack} reads opset {most} at most, not {opset}")
    if dla_core is not None:
        found += _dla_refusals(target, releases, int8, float_type, dla_core)
    return found


def _dla_refusals(target: Target, releases: Sequence[Release], int8: bool, float_type: str, core: int) -> list[str]:
    cores = int(target.value("dla"))
    if core >= cores:
        has = f"it has {cores}, counted from 0" if cores else "it has none; Xavier, Orin NX and AGX Orin have"
        return [f"{target.title} has no DLA core {core}: {has}"]
    found = []
    if float_type != "fp16":
        found.append(f'a DLA core computes in FP16 or INT8, and what stays float here is {float_type}: build.float_type = "fp16"')
    able = [release for release in releases if abilities(release.tensorrt).dla != "none"]
    if not able:
        found.append(f"no TensorRT that builds these graphs for {target.title} uses its DLA cores")
    elif int8 and not any("int8" in abilities(release.tensorrt).dla for release in able):
        named = ", ".join(f"{release.tensorrt} of JetPack {release.jetpack}" for release in able)
        found.append(f"TensorRT {named} does not take Q/DQ on a DLA core: FP16 alone runs there")
    return found


def require_builds(target: Target) -> None:
    """Raise CapabilityError when no release for this board has a TensorRT that our graphs are built with."""
    releases = of(target)
    if not releases or building(target):
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
