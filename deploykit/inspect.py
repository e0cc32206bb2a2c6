"""What a file or folder is: an artifact, a run, an ONNX graph, a checkpoint or a recipe. Nothing in it is executed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

from deploykit.artifact import MANIFEST, read_artifact
from deploykit.errors import UsageError, printable
from deploykit.jsonable import to_json

_RUN = "result.json"


def inspect(path: Path) -> dict[str, Any]:
    """Facts about `path` as plain JSON values; `kind` says which.

    Raises UsageError when there is nothing, or nothing known, at `path`, or it cannot be read.
    """
    try:
        return _facts(path)
    except OSError as error:
        raise UsageError(f"cannot read {printable(path)}", why=(error.strerror or str(error)).lower()) from error


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts as lines of `name: value`, nested ones indented."""
    return "".join(f"{line}\n" for line in _lines(facts, ""))


def _facts(path: Path) -> dict[str, Any]:
    if (path / MANIFEST).is_file():
        return _artifact(path)
    if (path / _RUN).is_file():
        return _run(path)
    if path.is_dir():
        raise UsageError(f"{printable(path)} is a folder, but neither an artifact ({MANIFEST}) nor a run ({_RUN})")
    if not path.is_file():
        raise UsageError(f"there is no {printable(path)}")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".toml":
        return _recipe(path)
    return _checkpoint(path)


def _artifact(folder: Path) -> dict[str, Any]:
    found = read_artifact(folder)
    facts = to_json(found)
    assert isinstance(facts, dict)
    return {"kind": f"artifact of stage {found.stage}, every file as published", **facts}


def _run(folder: Path) -> dict[str, Any]:
    kept = ("name", "verdict", "exit_code", "headline", "model", "gates", "report", "command")
    try:
        found = json.loads((folder / _RUN).read_text())
        stages = {stage["name"]: f"{stage['status']}, {stage['summary']}" for stage in found["stages"]}
        return {"kind": "run", **{key: found[key] for key in kept}, "stages": stages}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{printable(folder / _RUN)} is damaged", why=f"{type(error).__name__}: {error}") from error


def _onnx(path: Path) -> dict[str, Any]:
    import onnx_ir as ir

    try:
        model = ir.load(path)
        if not model.ir_version:
            raise ValueError("it has no IR version, so it is empty or something else")
        graph = model.graph
        operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph)
        weights = sum(
            math.prod(value.const_value.shape.numpy()) for value in graph.initializers.values() if value.const_value is not None
        )
        types = Counter(str(value.dtype) for value in graph.initializers.values())
        quantized = [node.outputs[0].dtype for node in graph if node.op_type == "QuantizeLinear"]
    except Exception as error:  # protobuf and onnx_ir raise classes without a common base for a file that is not ONNX
        raise UsageError(
            f"{printable(path)} is not an ONNX file that can be read", why=f"{type(error).__name__}: {error}"
        ) from error
    return {
        "kind": "ONNX graph",
        "bytes": path.stat().st_size,
        "opset": dict(model.opset_imports),
        "ir_version": model.ir_version,
        "producer": model.producer_name,
        "inputs": {value.name: f"{value.dtype} {value.shape}" for value in graph.inputs},
        "outputs": {value.name: f"{value.dtype} {value.shape}" for value in graph.outputs},
        "constants": {"values": weights, **types},
        "operators": dict(operators.most_common()),
        "quantize_linear": dict(Counter(str(dtype) for dtype in quantized)),
    }


def _recipe(path: Path) -> dict[str, Any]:
    from deploykit import recipe

    return {"kind": "recipe", **tomllib.loads(recipe.dump(recipe.load(path)))}


def _checkpoint(path: Path) -> dict[str, Any]:
    from deploykit.models.checkpoint import load_state_dict

    found = load_state_dict(path)
    return {
        "kind": "checkpoint",
        "bytes": path.stat().st_size,
        "parameters": sum(tensor.numel() for tensor in found.values()),
        "tensors": {name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in found.items()},
    }


def _lines(value: Any, indent: str) -> list[str]:
    lines = []
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(item, list) and item and not any(isinstance(entry, (Mapping, list)) for entry in item):
            lines.append(f"{indent}{key}: {', '.join(map(str, item))}")
        elif isinstance(item, (Mapping, list)) and item:
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {item if item not in ([], {}) else 'none'}")
    return lines
