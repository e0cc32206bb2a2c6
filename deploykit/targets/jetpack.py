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

    opset: the newest it reads. strongly_typed: whether it takes precision from the graph, which our engines need. dla:
    what of it runs on DLA cores.
    """

    since: tuple[int, ...]
    opset: int
    strongly_typed: bool
    dla: Literal["none", "fp16", "fp16 and int8"]


# Newest first. Opsets: onnx-tensorrt docs/operators.md at each release. DLA: "Strongly Typed Networks for DLA" and "Working with
# DLA" of 11.3 and 11.4.1: 10.7 was the last with it, 11.4.1 has it again, on AGX Orin with JetPack 7.2.2, and with Q/DQ.
_ABILITIES = (
    Abilities((11, 4, 1), 24, True, "fp16 and int8"),
    Abilities((10, 13), 24, True, "none"),
    Abilities((10, 9), 22, True, "none"),
    Abilities((10, 8), 20, True, "none"),
    Abilities((10, 3), 20, True, "fp16"),
    Abilities((8, 5), 17, False, "fp16 and int8"),
    Abilities((0,), 13, False, "fp16 and int8"),
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


def able(target: Target, *, int8: bool, dla_core: int | None, opset: int, jetpack: str | None) -> list[Release]:
    """The releases that build what is asked for, oldest first: all that do, or of the one that was named."""
    found = [release for release in building(target) if jetpack in (None, release.jetpack)]
    found = [release for release in found if abilities(release.tensorrt).opset >= opset]
    return found if dla_core is None else [release for release in found if _runs_on_dla(release, int8)]


def refusals(
    target: Target, *, int8: bool, float_type: str, dla_core: int | None, opset: int, jetpack: str | None = None
) -> list[str]:
    """Why an engine that is asked for cannot be built on a board, each reason.

    `jetpack` is the release on the board; where none is named it has to be one that the oldest that builds these graphs does,
    for nobody said that the board has another. Raises CapabilityError when none of its releases builds our engines.
    """
    if target.kind != "gpu":
        return [f"{target.title} runs no TensorRT: it has no GPU that is known here; --to onnxruntime or openvino"]
    require_builds(target)
    if jetpack is not None and jetpack not in target.jetpack:
        runs = f"those that do are {', '.join(target.jetpack)}" if target.is_jetson else "it is no Jetson"
        return [f"JetPack {jetpack} does not run on {target.title}: {runs}"]
    found = []
    if int8 and not target.has_int8:
        found.append(f"{target.title} has no int8 kernels (compute capability {target.compute_capability}): FP16 is what it has")
    if float_type == "bf16" and float(target.compute_capability or 0) < _BF16_SINCE:
        found.append(f"{target.title} has no bfloat16: that came with compute capability {_BF16_SINCE}")
    releases = building(target)
    chosen = next((release for release in releases if jetpack in (None, release.jetpack)), None)
    if releases and chosen is None:
        older = f"TensorRT {RELEASES[jetpack or ''].tensorrt} of JetPack {jetpack}"
        return [*found, f"{older} does not take precision from the graph; {_named(releases)} does"]
    if chosen is not None and opset > (most := abilities(chosen.tensorrt).opset):
        found.append(f"TensorRT {chosen.tensorrt} of JetPack {chosen.jetpack} reads opset {most} at most, not {opset}")
    if dla_core is not None:
        found += _dla_refusals(target, chosen, int8, float_type, dla_core, is_named=jetpack is not None)
    return found


def _dla_refusals(target: Target, chosen: Release | None, int8: bool, float_type: str, core: int, *, is_named: bool) -> list[str]:
    cores = int(target.value("dla"))
    if core >= cores:
        has = f"it has {cores}, counted from 0" if cores else "it has none; Xavier, Orin NX and AGX Orin have"
        return [f"{target.title} has no DLA core {core}: {has}"]
    found = []
    if float_type != "fp16":
        found.append(f'a DLA core computes in FP16 or INT8, and what stays float here is {float_type}: build.float_type = "fp16"')
    if chosen is None or _runs_on_dla(chosen, int8):
        return found
    does = "runs FP16 alone on DLA cores, no Q/DQ" if _runs_on_dla(chosen, int8=False) else "does not use DLA cores"
    which = "" if is_named else ", the oldest that builds these graphs for the board,"
    reason = f"TensorRT {chosen.tensorrt} of JetPack {chosen.jetpack}{which} {does}"
    others = [release for release in building(target) if _runs_on_dla(release, int8)]
    if not others:
        return [*found, f"{reason}; no other JetPack for {target.title} does more"]
    newest = others[-1].jetpack
    return [*found, f'{reason}; {_named(others)} does what is asked: build.jetpack = "{newest}" says that the board has it']


def _runs_on_dla(release: Release, int8: bool) -> bool:
    return ("int8" if int8 else "fp16") in abilities(release.tensorrt).dla


def _named(releases: Sequence[Release]) -> str:
    return " or ".join(f"JetPack {release.jetpack} (TensorRT {release.tensorrt})" for release in releases)


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
