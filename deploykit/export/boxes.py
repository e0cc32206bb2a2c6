"""Detectors -> ONNX or TorchScript: one picture in, boxes out, whose number depends on what is in the picture.

torch.export wants to know how large everything is, so the legacy exporter, which torchvision's detectors are written for, makes
the ONNX file, and TorchScript is scripted: a trace would hold the boxes of the picture that it saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torchvision.ops import boxes as ops

from deploykit import scenes
from deploykit.artifact import SAMPLES, Artifact, Format, Precision, Samples, Tensors, TensorSpec
from deploykit.errors import StageError
from deploykit.export import files
from deploykit.export.cleanup import tidy
from deploykit.export.exporters import exported
from deploykit.export.reference import INPUT
from deploykit.export.unwrap import unwrap
from deploykit.jsonable import JSON, to_json
from deploykit.models import Model
from deploykit.recipe import ExportTable
from deploykit.runtimes import onnxruntime, run, torchscript
from deploykit.runtimes.onnx_nodes import MODULE_KEY

_BOXES = "boxes"  # the open dimension
# A detector's own backbone ends where its necks and heads begin; what follows turns features into boxes.
_BACKBONE = "backbone"
_LAYERS = ("Conv", "Gemm", "MatMul")


def onnx_detector(
    model: Model, samples: NDArray[np.float32], labels: NDArray[np.int64] | None, settings: ExportTable, folder: Path
) -> Artifact:
    """Write `model.onnx` and golden samples, as `export.onnx_model` does; the file takes one picture.

    Raises StageError when the exporter fails, or the file does not find the same boxes as PyTorch.
    """
    reference = [torch_boxes(model, picture) for picture in samples]
    with _traceable():
        graph = exported(model, samples, replace(settings, batch=1), "legacy", outputs=model.outputs)
    tidy(graph)
    unwrap(graph)
    specs = _specs(model, reference[0])
    _open_outputs(graph, specs)
    path = folder / "model.onnx"
    files.write(graph, path)
    made = _artifact(model, path, Format.ONNX, specs, settings)
    golden = Samples({INPUT: samples}, scenes.stacked(reference), {}, labels)
    golden = onnxruntime.literally(made, path, golden)
    error = checked_boxes("ONNX", scenes.unstacked(golden.expected), reference, settings.tolerance)
    golden.save(folder / SAMPLES)
    facts: dict[str, JSON] = {"opset": settings.opset, "nodes": len(graph.graph), "exporter": "legacy", "heads": _heads(graph)}
    facts |= {"exporter_why": _why(settings), **_compared(reference)}
    return replace(made, facts={**made.facts, **facts, "relative_error": error})


def torchscript_detector(
    model: Model, samples: NDArray[np.float32], labels: NDArray[np.int64] | None, settings: ExportTable, folder: Path
) -> Artifact:
    """Write `model.pt`, scripted, and golden samples into `folder`; arguments and errors as `onnx_detector`."""
    reference = [torch_boxes(model, picture) for picture in samples]
    path = folder / "model.pt"
    torchscript.write_scripted(model.module, path)
    made = _artifact(model, path, Format.TORCHSCRIPT, _specs(model, reference[0]), settings)
    session = torchscript.load(made)
    answers = [run(session, {INPUT: picture[None]}) for picture in samples]
    session.close()
    error = checked_boxes("TorchScript", answers, reference, settings.tolerance)
    stacked = scenes.stacked(reference)
    Samples({INPUT: samples}, stacked, stacked, labels).save(folder / SAMPLES)
    return replace(made, facts={**made.facts, **_compared(reference), "relative_error": error})


def torch_answer(model: Model, picture: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """What the FP32 PyTorch module answers to one picture (C, H, W), by the names of `model.outputs`, without a batch dimension.

    Of a detector, boxes; of a segmenter, the scores (classes, H, W).
    """
    if model.task == "detect":
        return torch_boxes(model, picture)
    with torch.inference_mode():
        return {model.outputs[0]: model.module(torch.from_numpy(np.ascontiguousarray(picture))[None])[0].numpy()}


def torch_boxes(model: Model, picture: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """What the FP32 PyTorch module finds on one picture (C, H, W), by the names of `model.outputs`."""
    with torch.inference_mode():
        answer = model.module(torch.from_numpy(np.ascontiguousarray(picture))[None])
    return {name: value.numpy() for name, value in zip(model.outputs, answer, strict=True)}


def checked_boxes(what: str, answers: Sequence[Tensors], reference: Sequence[Tensors], tolerance: float) -> float:
    """The largest max|d| / max|y| of any output, over boxes that belong together; 0 where neither side finds one.

    Raises StageError above `tolerance`, when a side finds a box that the other does not, and when anything is not finite.
    """
    _require_finite(what, answers, reference)
    tally = scenes.Boxes()
    aligned = [tally.add(str(index), mine, theirs) for index, (mine, theirs) in enumerate(zip(answers, reference, strict=True))]
    decided = tally.decided()
    errors = {name: _relative([pairs[name] for pairs in aligned]) for name in aligned[0]}
    worst = max(errors, key=lambda name: errors[name])
    if decided.disagreements or errors[worst] > tolerance:
        raise StageError(
            f"the {what} file does not find the boxes that PyTorch finds",
            why=f"{decided.disagreements} of {decided.parts} boxes on {len(answers)} real inputs are found by one of them alone; "
            f"max|d| / max|y| of {worst} is {errors[worst]:.3g}, export.tolerance is {tolerance:g}",
            fix="a detector whose code looks at more than shapes cannot be exported; rewrite that part",
        )
    return errors[worst]


def _require_finite(what: str, answers: Sequence[Tensors], reference: Sequence[Tensors]) -> None:
    """Raise StageError for NaN and infinities on either side: they compare with nothing, and a largest value may pass them by."""
    problems = [
        f"{side}: {name} of input {index}"
        for side, found in ((f"the {what} file", answers), ("PyTorch", reference))
        for index, answer in enumerate(found)
        for name, values in answer.items()
        if not np.isfinite(values).all()
    ]
    if problems:
        raise StageError(
            "a detector's answer has values that are not finite",
            problems=problems,
            fix="look at the weights and at the preprocessing; where PyTorch's values are finite, the export is wrong",
        )


def _compared(reference: Sequence[Tensors]) -> dict[str, JSON]:
    """How many boxes the check of a file was about, and in words that it was about none."""
    count = sum(len(answer[scenes.SCORES]) for answer in reference)
    note = f"nothing was compared: PyTorch finds no box on the {len(reference)} golden samples"
    return {"boxes_compared": count, **({} if count else {"note": note})}


def _relative(pairs: Sequence[tuple[NDArray[np.floating], NDArray[np.floating]]]) -> float:
    apart = max((float(np.abs(mine - theirs).max(initial=0)) for mine, theirs in pairs), default=0.0)
    scale = max((float(np.abs(theirs).max(initial=0)) for _, theirs in pairs), default=0.0)
    return apart / scale if scale > 0 else apart


def _why(settings: ExportTable) -> str:
    """Why the legacy exporter wrote the file."""
    return "as the recipe asks" if settings.exporter == "legacy" else "a detector: the legacy exporter alone writes such files"


def _specs(model: Model, answer: Tensors) -> tuple[TensorSpec, ...]:
    """The outputs: the first dimension of each is the number of boxes."""
    return tuple(TensorSpec(name, answer[name].dtype.name, (_BOXES, *answer[name].shape[1:])) for name in model.outputs)


def _open_outputs(model: ir.Model, specs: Sequence[TensorSpec]) -> None:
    """The exporter writes down how many boxes it saw."""
    names = [value.name for value in model.graph.outputs]
    if names != [spec.name for spec in specs]:
        raise StageError("the exported graph is not what was asked for", why=f"its outputs are {names}")
    for value, spec in zip(model.graph.outputs, specs, strict=True):
        value.shape = ir.Shape(spec.shape)


@contextmanager
def _traceable() -> Iterator[None]:
    """torchvision's functions on boxes while they are traced, as graphs can have them.

    Its suppression for several classes has a branch for no boxes at all, which would be an If in the graph; runtimes on devices
    and our own pre-flight of files do not take one. Its clipping reshapes to sizes that it asks for; ONNX Runtime's optimizer
    puts (0, -1) in their place and then refuses no boxes, so that RetinaNet ended in an error when one level had none.
    """
    ours = {"_batched_nms_coordinate_trick": _batched_nms, "clip_boxes_to_image": _clipped}
    before = {name: getattr(ops, name) for name in ours}
    for name, function in ours.items():
        setattr(ops, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def _clipped(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes (..., 4) cut at the edges of a picture of so many rows and columns."""
    height, width = size
    zero = boxes.new_zeros(())
    sides = [
        torch.min(torch.max(boxes[..., first::2], zero), torch.tensor(most, dtype=boxes.dtype, device=boxes.device))
        for first, most in enumerate((width, height))
    ]
    return torch.stack(sides, dim=boxes.dim()).flatten(boxes.dim() - 1)


def _batched_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Boxes of one class are moved to where those of no other class are, and then all are suppressed at once."""
    furthest = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max()
    moved = boxes + (labels.to(boxes) * (furthest + 1))[:, None]
    kept: torch.Tensor = ops.nms(moved, scores, iou_threshold)
    return kept


def _heads(model: ir.Model) -> list[str]:
    """The layers behind the backbone. A box may turn on a hair there, and they cost little: they stay in float."""
    layers = [node for node in model.graph if node.op_type in _LAYERS]
    return [str(node.name) for node in layers if not node.metadata_props.get(MODULE_KEY, "").startswith(_BACKBONE)]


def _artifact(model: Model, path: Path, kind: Format, outputs: tuple[TensorSpec, ...], settings: ExportTable) -> Artifact:
    return Artifact(
        path=path,
        stage="export",
        key="",
        format=kind,
        precision=Precision.FP32,
        inputs=(TensorSpec(INPUT, "float32", (1, *model.preprocess.shape)),),
        outputs=outputs,
        preprocess=model.preprocess,
        classes=model.classes,
        sha256="",
        parents=(),
        settings=to_json(settings),  # type: ignore[arg-type]
        tools={"torch": torch.__version__, "onnx": onnx.__version__, "onnx_ir": ir.__version__},
        facts={"model": model.name, "weights": model.weights, "task": model.task, "num_classes": model.num_classes},
    )
