"""What a file or folder is: an artifact, a run, a bundle, an ONNX graph, a checkpoint or a recipe. Nothing in it is executed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

from deploykit import bundle, runtimes
from deploykit.artifact import MANIFEST, read_artifact
from deploykit.errors import UsageError, like, printable
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
    if bundle.is_bundle(path):
        return _bundle(path)
    if path.is_dir():
        raise UsageError(f"{printable(path)} is a folder, but neither an artifact ({MANIFEST}) nor a run ({_RUN})")
    if not path.is_file():
        if path.exists():
            raise UsageError(f"cannot read {printable(path)}", why="it is not a file")
        raise UsageError(f"there is no {printable(path)}", fix=like(path))
    if path.suffix == ".py":
        why = "it is Python code, and nothing is run to be looked at"
        raise UsageError(
            f"cannot inspect {printable(path)}", why=why, fix=f"deploykit export {shlex.quote(printable(path))}:FACTORY --to onnx"
        )
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".toml":
        return _recipe(path)
    return _checkpoint(path)


def _artifact(folder: Path) -> dict[str, Any]:
    found = read_artifact(folder)
    facts = to_json(found)
    assert isinstance(facts, dict)
    preflight = {"here": runtimes.preflight(found)} if runtimes.is_engine(found) else {}
    return {"kind": f"artifact of stage {found.stage}, every file as published", **preflight, **facts}


def _bundle(path: Path) -> dict[str, Any]:
    found = bundle.check(path)
    kind = "bundle, every file as packed" if found.is_whole else "bundle, not as packed"
    signed = "yes; deploykit verify --signers FILE says by whom" if found.is_signed else "no"
    manifest = found.manifest
    files = {name: f"{blob.size} bytes, sha256 {blob.sha256}" for name, blob in manifest.files.items()}
    facts = {name: value for name, value in bundle.described(found).items() if name not in ("files", "signer")}
    return {"kind": kind, **facts, "signed": signed, "gate": list(manifest.gate), "files": files}


def _run(folder: Path) -> dict[str, Any]:
    kept = ("name", "verdict", "exit_code", "headline", "model", "gates", "report", "command")
    try:
        found = json.loads((folder / _RUN).read_text())
        stages = {stage["name"]: f"{stage['status']}, {stage['summary']}" for stage in found["stages"]}
        return {"kind": "run", **{key: found[key] for key in kept}, "stages": stages}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{printable(folder / _RUN)} is damaged", why=f"{type(error).__name__}: {error}") from error


def _onnx(path: Path) -> dict[str, Any]:
    from deploykit.intake import door

    return {"kind": "ONNX graph", "bytes": path.stat().st_size, **door.graph_facts(path)}


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
            lines.append(f"{indent}{printable(str(key))}: {', '.join(printable(str(entry)) for entry in item)}")
        elif isinstance(item, (Mapping, list)) and item:
            lines += [f"{indent}{printable(str(key))}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{indent}{printable(str(key))}: {printable(str(item if item not in ([], {}) else 'none'))}")
    return lines
