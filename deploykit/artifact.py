"""The values that stages hand to each other, and the manifest that makes one of them durable.

An artifact is a directory: its files, and `manifest.json`, written last. A directory without a manifest, or whose
files do not have the manifest's digests, is not an artifact. `key` says from what it was made (settings, digests of
the inputs, tool versions), so a run that would make the same thing again can skip the work.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from deploykit import publish
from deploykit.errors import UsageError, printable
from deploykit.jsonable import JSON, to_json
from deploykit.machine import Machine

Tensors = Mapping[str, NDArray[Any]]

SCHEMA = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.npz"
# A manifest of ours is a few kilobytes; a file of another size is not one, and is not read into memory.
_MANIFEST_LIMIT_BYTES = 4 << 20


class Precision(str, Enum):
    """What most of the arithmetic runs in. INT8 keeps some operators in a float type; TF32 is FP32 in memory, and rounds what it
    multiplies to ten bits."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Format(str, Enum):
    """What kind of file an artifact's main file is."""

    CHECKPOINT = "checkpoint"
    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    OBSERVATIONS = "observations"
    ENGINE = "engine"
    REPORT = "report"


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of an input or output; a string in the shape is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the network's input: resize the shorter side, crop the centre, scale to 0..1, normalise.

    `resize` is None when the picture is only cropped. `crop` is (height, width) in pixels: the input size. With
    `fit` "stretch" the picture is resized to `crop` and its aspect ratio changes. `mean` and `std` have one value
    for each channel, in units of the 0..1 scale. With `frames` the input is a clip of so many: a still picture becomes one
    by a crop that moves across it, from one end of its longer side to the other.
    `feeds` says what a program feeds: normalised floats, or the pixels themselves where scaling and normalising are in the graph.
    """

    resize: int | None
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: Literal["RGB", "L"] = "RGB"
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    fit: Literal["crop", "stretch"] = "crop"
    frames: int | None = None
    feeds: Literal["float", "uint8 NHWC", "uint8 NCHW"] = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one network input; with frames, (channels, frames, height, width)."""
        frames = () if self.frames is None else (self.frames,)
        return (len(self.channels), *frames, *self.crop)


@dataclass(frozen=True)
class Samples:
    """Golden samples: what parity needs on a machine without torch, data set or image library.

    `reference` is what the FP32 PyTorch module answered; `expected` is what this very graph answers on ONNX Runtime
    with all optimisations off, where Q/DQ is executed literally (for TorchScript, which it cannot execute, the reference).
    All arrays have the samples in dimension 0.
    """

    inputs: Tensors
    reference: Tensors
    expected: Tensors
    labels: NDArray[np.int64] | None = None

    def save(self, path: Path) -> None:
        """Write one .npz; keys are `inputs/NAME`, `reference/NAME`, `expected/NAME` and `labels`."""
        arrays = {
            f"{group}/{name}": value
            for group in ("inputs", "reference", "expected")
            for name, value in getattr(self, group).items()
        }
        if self.labels is not None:
            arrays["labels"] = self.labels
        # A tensor's name cannot collide with np.savez's own parameters: every key holds a slash, except `labels`.
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what `save` wrote. Pickled objects are refused by numpy (ValueError)."""
        groups: dict[str, dict[str, NDArray[Any]]] = {"inputs": {}, "reference": {}, "expected": {}}
        labels = None
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                group, _, name = key.partition("/")
                if group == "labels":
                    labels = archive[key]
                else:
                    groups[group][name] = archive[key]
        return cls(**groups, labels=labels)


@dataclass(frozen=True)
class Artifact:
    """One finished stage result; immutable, and complete on disk when this value exists.

    `path` is the main file, `sha256` its digest in hex; everything beside it belongs to the artifact. `stage` made it from
    `parents`, which are such digests, by `settings` and the versions in `tools`; the digest of all that is `key`.
    `classes` has the names of the classes by index, empty where nobody said them. `facts` are what the stage found out.
    `machine` is None when the artifact is portable; an engine names the machine it was built on and is refused elsewhere.
    """

    path: Path
    stage: str
    key: str
    format: Format
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: Preprocess
    classes: tuple[str, ...]
    sha256: str
    parents: tuple[str, ...]
    settings: Mapping[str, JSON]
    tools: Mapping[str, str]
    facts: Mapping[str, JSON]
    machine: Machine | None = None

    @property
    def folder(self) -> Path:
        """The artifact's directory."""
        return self.path.parent

    @property
    def identity(self) -> str:
        """Digest of the manifest: of every file, of what they mean (classes, preprocessing), and of what they were made from."""
        return digest_file(self.folder / MANIFEST)

    def samples(self) -> Samples:
        """The golden samples stored with the artifact."""
        return Samples.load(self.folder / SAMPLES)


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in pieces."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def make(final: Path, key: str, fill: Callable[[Path], Artifact]) -> Artifact:
    """Let `fill` write an artifact into an empty directory, and publish it at `final` under `key`, complete or not at all.

    Raises what `fill` raises, and DeploykitError when the file system refuses; then nothing is left behind.
    """
    with publish.directory(final) as folder:
        write_manifest(folder, replace(fill(folder), key=key))
    return read_artifact(final)


def find(final: Path, key: str) -> Artifact | None:
    """The artifact at `final` if it is complete, undamaged and was made under `key`; else None: it has to be made.

    `key` is whatever text the maker passed to `make`: a digest of everything that the content depends on.
    """
    try:
        found = read_artifact(final)
    except UsageError:
        return None
    return found if found.key == key else None


def write_manifest(folder: Path, artifact: Artifact) -> Artifact:
    """Write the manifest of `artifact`, whose files are all in `folder`; the last write into that directory.

    Returns the artifact with `sha256` filled in: the digest of its main file.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": digest_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    artifact = replace(artifact, sha256=cast(str, files[artifact.path.name]["sha256"]))
    content = {"schema": SCHEMA, "path": artifact.path.name, "files": files} | {
        field.name: to_json(getattr(artifact, field.name)) for field in fields(Artifact) if field.name != "path"
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")
    return artifact


def read_artifact(folder: Path) -> Artifact:
    """Read a directory that `write_manifest` finished, and check every file's size and digest.

    Raises UsageError when it is not an artifact, is damaged, or was written by a newer deploykit.
    """
    manifest = folder / MANIFEST
    try:
        size = manifest.stat().st_size if manifest.is_file() else 0
        if not 0 < size <= _MANIFEST_LIMIT_BYTES:
            why = f"its {MANIFEST} has {size} bytes; one has at most {_MANIFEST_LIMIT_BYTES}" if size else f"it has no {MANIFEST}"
            raise UsageError(f"{printable(folder)} is not a deploykit artifact", why=why)
        content = json.loads(manifest.read_text())
        if content["schema"] != SCHEMA:
            raise UsageError(
                f"{printable(manifest)} has schema {content['schema']!r}; this deploykit reads schema {SCHEMA}",
                fix="use the deploykit version that wrote it",
            )
        for name, entry in content["files"].items():
            _check_file(folder, name, entry)
        if content["files"][content["path"]]["sha256"] != content["sha256"]:
            raise ValueError("sha256 is not that of the main file")
        return Artifact(
            path=folder / _plain_name(content["path"]),
            stage=content["stage"],
            key=content["key"],
            format=Format(content["format"]),
            precision=Precision(content["precision"]),
            inputs=_specs(content["inputs"]),
            outputs=_specs(content["outputs"]),
            preprocess=_preprocess(content["preprocess"]),
            classes=tuple(content["classes"]),
            sha256=content["sha256"],
            parents=tuple(content["parents"]),
            settings=_object(content, "settings"),
            tools=_object(content, "tools"),
            facts=_object(content, "facts"),
            machine=None if content["machine"] is None else Machine.from_json(content["machine"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        raise UsageError(f"{printable(manifest)} is damaged", why=f"{type(error).__name__}: {error}") from error


def artifact_of(path: Path) -> Artifact | None:
    """The artifact whose main file is `path`; None for any other file, and where the manifest beside it is not ours.

    Raises UsageError when it is, and is damaged or was written by a newer deploykit.
    """
    manifest = path.parent / MANIFEST
    try:
        if not path.is_file() or not manifest.is_file() or manifest.stat().st_size > _MANIFEST_LIMIT_BYTES:
            return None
        content = json.loads(manifest.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(content, dict) and {"schema", "files", "path"} <= content.keys()
    return read_artifact(path.parent) if is_ours and content["path"] == path.name else None


def _object(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = content[key]
    if not isinstance(found, dict):
        raise TypeError(f"{key} is {str(found)[:40]!r}, not an object")
    return found


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise UsageError(f"{printable(folder / MANIFEST)} names a file outside its directory: {name!r}")
    path = folder / pure
    if not path.is_file() or path.stat().st_size != entry["bytes"] or digest_file(path) != entry["sha256"]:
        raise UsageError(
            f"{printable(path)} is not the file that was published",
            why="it is missing, or its size or SHA-256 differs from the manifest",
            fix="remove the directory and run again",
        )


def _plain_name(name: str) -> str:
    if PurePosixPath(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"not a plain file name: {name!r}")
    return name


def _specs(values: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(value["name"], value["dtype"], tuple(value["shape"])) for value in values)


def _preprocess(value: Mapping[str, Any]) -> Preprocess:
    lists = {name: tuple(value[name]) for name in ("crop", "mean", "std")}
    return Preprocess(**{**value, **lists})
