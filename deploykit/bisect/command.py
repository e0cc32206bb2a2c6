"""What `deploykit bisect A B` does: finds the two graphs and the images, and gives the result as plain JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from deploykit import bisect as bisection
from deploykit import data
from deploykit.artifact import MANIFEST, SAMPLES, Artifact, Format, Preprocess, Samples, digest_file, read_artifact
from deploykit.bisect import graph as graphs
from deploykit.bisect.opening import OnOnnxRuntime, Opening, on_tensorrt
from deploykit.bisect.text import proof_of
from deploykit.errors import UsageError, printable
from deploykit.gate import EXIT_CODES, Verdict
from deploykit.intake import door
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.progress import Progress, silent

if TYPE_CHECKING:
    from deploykit.models import Model

_BATCH = 4  # images; all activations of all three graphs are in memory at once
_NOISE = 8  # images, where nobody gives any
_EXPORT_SAMPLES = 2


@dataclass(frozen=True)
class Side:
    """A graph, and what is known about the inputs it was made for."""

    path: Path
    model: Artifact | None = None
    preprocess: Preprocess | None = None
    samples: NDArray[np.float32] | None = None


def compare(
    a: str,
    b: Path,
    *,
    images: Path | None = None,
    count: int = 32,
    weights: str | None = None,
    runtime: Literal["onnxruntime", "tensorrt"] = "onnxruntime",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Bisect B against A on pictures of the folder `images`, at most `count`; else on A's golden samples; else on noise.

    A is an ONNX file, an artifact's folder, or, with `weights`, the name of a PyTorch network, which is exported and then
    watched while it runs. B runs on ONNX Runtime, or on TensorRT with the options of its own recipe. `exit_code` is 3 when a
    layer was found or the two were made for inputs prepared in different ways.

    Raises UsageError for what is neither, and when nothing says how a picture becomes an input; CapabilityError where there is
    no TensorRT, or no GPU, and it is asked for.
    """
    with ExitStack() as stack:
        suspect, network = _side(b), None
        opening: Opening = OnOnnxRuntime()
        if runtime == "tensorrt":
            opening = stack.enter_context(closing(on_tensorrt(suspect.model)))
        if weights is None:
            reference = _side(Path(a))
        else:
            reference, model = _exported(a, weights, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            from deploykit.bisect.hooks import Watched

            network = stack.enter_context(Watched(model.module, graphs.read(reference.path)))
        inputs, origin = _inputs(reference, suspect, images, count)
        found = bisection.bisect(
            reference.path,
            suspect.path,
            lambda: _batches(inputs, reference, suspect),
            network=network,
            opening=opening,
            total=len(inputs),
            progress=progress,
        )
    differences = _differences(reference.preprocess, suspect.preprocess)
    wrong = found.culprit is not None or bool(differences) or bool(found.failure)
    facts = cast("dict[str, Any]", to_json(found))
    code = EXIT_CODES[Verdict.FAIL] if wrong else 0
    about = {"a": printable(a), "b": printable(b), "runtime": runtime, "fed": {"origin": origin, "images": len(inputs)}}
    machine = to_json(Machine.probe())
    return {**about, **facts, "proven": proof_of(facts), "preprocessing": differences, "machine": machine, "exit_code": code}


def _side(path: Path) -> Side:
    """An ONNX file, with what the manifest beside it says, or the folder of an artifact."""
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UsageError(
            f"there is no {printable(path)}", fix="name an ONNX file or an artifact's folder; a PyTorch network needs --weights"
        )
    if path.is_dir() or _is_main_file(path):
        found = read_artifact(folder)
        if found.format is not Format.ONNX:
            why = f"what is bisected is an ONNX graph, and this is of format {found.format.value}, made by stage {found.stage}"
            raise UsageError(f"{printable(path)} cannot be bisected", why=why, fix=_origin(found))
        return Side(found.path, found, found.preprocess, _golden(found))
    door.onnx_file(path)
    door.rehearse(path)
    return Side(path)


def _is_main_file(path: Path) -> bool:
    """Whether the folder's manifest is about this very file, and the file has not been changed since."""
    if not (path.parent / MANIFEST).is_file():
        return False
    try:
        return read_artifact(path.parent).path.name == path.name
    except UsageError:
        return False


def _golden(artifact: Artifact) -> NDArray[np.float32] | None:
    path = artifact.folder / SAMPLES
    if not path.is_file():
        return None
    found: NDArray[np.float32] = Samples.load(path).inputs[artifact.inputs[0].name]
    return found


def _origin(engine: Artifact) -> str:
    """Where the graph is that something was made from: in the same run, where it is."""
    for beside in sorted(engine.folder.absolute().parent.glob("*/*.onnx")):
        if beside.parent != engine.folder.absolute() and digest_file(beside) in engine.parents:
            return f"name the graph that it was made from: {printable(engine.folder.parent / beside.parent.name)}"
    return "name the ONNX graph that it was made from"


def _exported(name: str, weights: str, folder: Path) -> tuple[Side, Model]:
    """A PyTorch network as the graph that export makes of it, and the network itself."""
    from deploykit import export, models
    from deploykit.recipe import ExportTable, ModelTable

    model = models.load(ModelTable(name=name, weights=weights))
    if model.task == "detect":
        why = "its layers behind the backbone see another number of boxes for each picture"
        raise UsageError(
            f"{printable(name)} cannot be bisected", why=why, fix=f"deploykit parity {printable(name)} B compares it"
        )
    inputs = _noise((_EXPORT_SAMPLES, *model.preprocess.shape))
    made = export.onnx_model(model, inputs, None, ExportTable(), folder)
    return Side(made.path, None, model.preprocess), model


def _inputs(a: Side, b: Side, folder: Path | None, count: int) -> tuple[NDArray[np.float32], str]:
    """Network inputs (n, C, H, W), and where they are from, in words."""
    if folder is None:
        for label, samples in (("A", a.samples), ("B", b.samples)):
            if samples is not None:
                return samples[:count], f"golden samples of {label}"
        return _noise((_NOISE, *_shape(a.path))), "noise, as no pictures were given and neither side brings samples"
    how = a.preprocess or b.preprocess
    if how is None:
        why = "neither graph lies in an artifact, whose manifest would say it"
        raise UsageError(
            "nothing says how a picture becomes an input", why=why, fix="leave --data out, or name an artifact's folder"
        )
    pictures = data.folder(folder, labelled=False)
    return np.concatenate([*pictures.take(range(min(count, len(pictures)))).batches(how, 64)]), pictures.origin


def _shape(path: Path) -> tuple[int, ...]:
    """The shape of one input. Raises UsageError when more than the batch is dynamic."""
    sizes = graphs.read(path).sizes
    if not all(sizes):
        raise UsageError(f"the size of an input of {printable(path)} is not fixed", fix="give images with --data")
    return sizes


def _noise(shape: Sequence[int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(tuple(shape)).astype(np.float32)


def _batches(inputs: NDArray[np.float32], a: Side, b: Side) -> Iterable[NDArray[np.float32]]:
    fixed = [size for side in (a, b) if (size := graphs.read(side.path).batch)]
    step = min([_BATCH, *fixed])
    return (inputs[start : start + step] for start in range(0, len(inputs), step))


def _differences(a: Preprocess | None, b: Preprocess | None) -> list[str]:
    """What the two say about their inputs, key by key, where they disagree."""
    if a is None or b is None:
        return []
    keys = [item.name for item in fields(Preprocess)]
    return [f"{key} is {getattr(b, key)}, not {getattr(a, key)}" for key in keys if getattr(a, key) != getattr(b, key)]
