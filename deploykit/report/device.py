"""What is left to the device when TensorRT's engines cannot be built here: what is known, what is not, and the commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from deploykit.artifact import Precision
from deploykit.build import Engine
from deploykit.bundle import DEVICE_HALF
from deploykit.errors import printable
from deploykit.recipe import Recipe
from deploykit.targets import find, jetpack

_JETSONS_TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # of the package libnvinfer-bin, which puts nothing on the PATH


def left(
    recipe: Recipe, engines: Sequence[Engine], out: Path, linted: Mapping[str, Mapping[str, int]], *, exit_code: int
) -> dict[str, Any] | None:
    """One paragraph and the commands for a device; None where every TensorRT engine was built, or none was asked for.

    `linted`: by the name of a stage, how often its graph breaks which of TensorRT's rules. With an `exit_code` other than 0 there
    is no bundle: what failed its gates is packed by `deploykit pack --failed-gates` alone.
    """
    missing = [engine for engine in engines if engine.runtime == "tensorrt" and engine.built is None]
    if not missing:
        return None
    bundle = printable(out / bundle_name(recipe)) if exit_code == 0 else ""
    return {
        "bundle": bundle,
        "text": _paragraph(recipe, missing, linted),
        "commands": _commands(recipe, bundle) if bundle else [],
        "lint": {name: dict(found) for name, found in linted.items()},
    }


def bundle_name(recipe: Recipe) -> str:
    """The bundle's file in the output folder of a run."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', recipe.name).strip('.-') or 'network'}.bundle"


def trtexec(engine: Engine, recipe: Recipe) -> str:
    """The command of TensorRT's own tool that builds the same engine; precision is in the graph, so there is no flag for it."""
    made, options, target = engine.model, recipe.tensorrt, recipe.build.target
    shape, name = made.inputs[0].shape, made.inputs[0].name
    words = [
        _JETSONS_TRTEXEC if target is not None and find(target).is_jetson else "trtexec",
        f"--onnx={made.folder.name}/{made.path.name}",
        "--stronglyTyped",
        f"--saveEngine={engine.label.replace(' ', '-')}.plan",
        f"--builderOptimizationLevel={options.optimization_level}",
    ]
    if isinstance(shape[0], str):
        for option, batch in zip(("minShapes", "optShapes", "maxShapes"), options.profile, strict=True):
            words.append(f"--{option}={name}:{'x'.join(map(str, (batch, *shape[1:])))}")
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    if options.dla_core is not None:
        words += [f"--useDLACore={options.dla_core}", *(["--allowGPUFallback"] if options.gpu_fallback else [])]
    if options.version_compatible:
        words.append("--versionCompatible")
    levels = {"ampere and newer": "ampere+", "same compute capability": "sameComputeCapability"}
    if options.hardware in levels:
        words.append(f"--hardwareCompatibilityLevel={levels[options.hardware]}")
    return shlex.join(words)


def _paragraph(recipe: Recipe, missing: Sequence[Engine], linted: Mapping[str, Mapping[str, int]]) -> str:
    said = ["No TensorRT engine was built here."]
    known = []
    for engine in missing:
        found = linted.get(engine.model.folder.name, {})
        broken = ", ".join(f"{rule} ({count})" for rule, count in found.items())
        known.append(f"{engine.model.folder.name} breaks {broken or 'none'} of TensorRT's rules that are checked")
    said.append(
        f"Known of the portable half: {'; '.join(known)}; and ONNX Runtime, executing the graph literally, answers as above."
    )
    quantized = [engine.model.facts for engine in missing if engine.model.precision is Precision.INT8]
    layers = sum(len(cast(Sequence[str], facts["int8_layers"])) for facts in quantized)
    realised = f"whether its {layers} layers between Q/DQ really run in int8, " if layers else ""
    said.append(
        f"Not known before the device has built it: whether TensorRT takes the graph, {realised}how far the engine's answers are "
        "from the graph's, and how fast it is. Nothing was timed."
    )
    if asked := recipe.left_to_the_device:
        said.append(f"The device is asked for {' and '.join(map(str, asked))} before it switches.")
    if recipe.build.target is not None:
        said.append(_board(recipe, recipe.build.target))
    return " ".join(said)


def _board(recipe: Recipe, name: str) -> str:
    board = find(name)
    if not jetpack.building(board):
        return f"{board.title} takes TensorRT 10.3 or later, with its Python package."
    dla_core, opset = recipe.tensorrt.dla_core, recipe.export.opset
    releases = jetpack.able(board, int8=recipe.quantize is not None, dla_core=dla_core, opset=opset, jetpack=recipe.build.jetpack)
    brought = " or ".join(
        f"JetPack {each.jetpack} (TensorRT {each.tensorrt}{f', Python {each.python}' if each.python else ''})"
        for each in releases
    )
    if dla_core is not None:
        return f"{board.title} needs {brought}; others do not run this on a DLA core."
    return f"{board.title} needs {brought}; older releases cannot take precision from the graph."


def _commands(recipe: Recipe, bundle: str) -> list[str]:
    name, root = Path(bundle).name, f"/opt/deploykit/{Path(bundle).stem}"
    has_budget = any(rule.metric == "latency" for rule in recipe.rules)
    verbs = ("build", "parity", *(["benchmark"] if has_budget else []), "activate")
    return [
        f"scp {shlex.join([bundle, str(Path(bundle).with_name(DEVICE_HALF))])} DEVICE:",
        f"python3 device.pyz install {name} --root {root}",
        *(f"python3 device.pyz {verb} ID --root {root}" for verb in verbs),
    ]
