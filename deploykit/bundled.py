"""A bundle's graph as an engine of this machine: the bundle is checked, the graph taken out, and built as a device builds it."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

from deploykit import build, bundle, runtimes
from deploykit.artifact import Artifact, read_artifact, write_manifest
from deploykit.errors import CapabilityError, UsageError, printable
from deploykit.intake import door


def named(name: str) -> tuple[Path, str | None] | None:
    """The bundle that a word names, and the graph in it where it says one: BUNDLE or BUNDLE:RUNTIME-PRECISION; None for others.

    Raises UsageError when it cannot be read.
    """
    try:
        if bundle.is_bundle(Path(name)):
            return Path(name), None
        place, colon, model = name.rpartition(":")
        return (Path(place), model) if colon and place and bundle.is_bundle(Path(place)) else None
    except OSError as error:
        raise UsageError(f"cannot read {printable(name)}", why=(error.strerror or str(error)).lower()) from error


def engine(path: Path, asked: str | None, scratch: Path) -> tuple[Artifact, Artifact]:
    """The graph `asked` of the bundle at `path`, by default its only one for a runtime that loads here, and its engine.

    Both lie in the empty folder `scratch`, which has to outlive them. Who signed the bundle is not asked.

    Raises UsageError when the bundle is not whole, or the graph is not clear or no ONNX file that may be read; CapabilityError
    when no runtime loads.
    """
    found = bundle.check(path)
    bundle.require_whole(path, found)
    label = _chosen(path, found.manifest.models, asked)
    folder = scratch / "graph"
    folder.mkdir()
    with bundle.opened(path) as opened:
        for name, blob in opened.manifest.files.items():
            if name.startswith(f"{bundle.MODELS}/{label}/"):
                (folder / Path(name).name).write_bytes(b"".join(bundle.pieces(opened, blob)))
    model = read_artifact(folder)
    door.onnx_file(model.path)
    door.rehearse(model.path)
    _check_samples(path, model)
    target = scratch / "engine"
    target.mkdir()
    made = build.build(model, label.partition("-")[0], target)
    return model, write_manifest(target, replace(made, key=""))


def _chosen(path: Path, models: tuple[str, ...], asked: str | None) -> str:
    if asked is not None:
        if asked not in models:
            why = f"it has {', '.join(models) or 'none'}"
            raise UsageError(f"{printable(path)} has no graph {printable(asked)!r}", why=why)
        return asked
    reasons = {
        label: runtimes.why_not(label.partition("-")[0]) for label in models if label.partition("-")[0] in runtimes.REGISTRY
    }
    able = [label for label, why in reasons.items() if not why]
    if not able:
        problems = [f"{label}: {why}" for label, why in reasons.items()]
        raise CapabilityError(f"no graph of {printable(path)} can be built here", problems=problems)
    if len(able) > 1:
        told = ", ".join(f"{printable(path)}:{label}" for label in able)
        raise UsageError(f"{printable(path)} holds several graphs", fix=f"name one of {told}")
    return able[0]


def _check_samples(path: Path, model: Artifact) -> None:
    """Raise UsageError when the golden samples are not of this network. Pickles in them are refused, not opened."""
    try:
        samples = model.samples()
        outputs = {spec.name for spec in model.outputs}
        if not {spec.name for spec in model.inputs} <= samples.inputs.keys() or outputs != samples.expected.keys():
            raise ValueError("they are not of this network's inputs and outputs")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"the golden samples of {printable(path)} cannot be used", why=str(error)) from error
