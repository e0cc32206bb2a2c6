"""Model -> Artifact: ONNX or TorchScript, compared with PyTorch on real inputs, golden samples beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from deploykit.artifact import SAMPLES, Artifact, Format, Precision, Preprocess, Samples, TensorSpec
from deploykit.data.pictures import normalised
from deploykit.errors import DeploykitError, StageError, UsageError
from deploykit.export import boxes, files, memory
from deploykit.export.cleanup import BATCH, HEIGHT, WIDTH, tidy
from deploykit.export.exporters import OTHER, Exporter, choice, dynamic_axes, example_inputs, exported, folded
from deploykit.export.fuse import TakesBytes, take_bytes
from deploykit.export.reference import INPUT, OUTPUT, checked_error, torch_logits
from deploykit.export.reproduction import NoExporterError, reproduce
from deploykit.export.sizes import check_other_size, require_any_size
from deploykit.export.unwrap import unwrap
from deploykit.jsonable import JSON, to_json
from deploykit.models import Model
from deploykit.recipe import ExportTable
from deploykit.runtimes import answers, onnxruntime, pieces, torchscript

__all__ = [
    "BATCH",
    "INPUT",
    "OUTPUT",
    "NoExporterError",
    "onnx_model",
    "reproduce",
    "tidy",
    "torch_logits",
    "torchscript_model",
]


def onnx_model(
    model: Model, samples: NDArray[Any], labels: NDArray[np.int64] | None, settings: ExportTable, folder: Path
) -> Artifact:
    """Write `model.onnx` and golden samples into `folder`, in the forms both runtimes fuse.

    `samples` are real inputs as a program feeds them: preprocessed floats (K, C, H, W), or with `settings.input` pixels. The
    file has the asked opset, a dynamic or fixed batch, inputs and outputs named `image` and `logits`, BatchNorm folded, and nodes
    named by their PyTorch module; the same weights give the same bytes. With `settings.cross_check` both exporters run, and what
    passes is kept: facts["exporter_why"] says why.

    Raises StageError when the exporter fails, or the file is not what was asked or answers differently from PyTorch;
    NoExporterError when both were tried; CapabilityError when this machine has too little memory for the work.
    """
    _refuse_meaningless(model, settings)
    if model.task == "detect":
        return boxes.onnx_detector(model, samples, labels, settings, folder)
    golden = _golden(model, samples, labels, settings)
    if settings.cross_check:
        return _cross_checked(model, golden, settings, folder)
    exporter, why = choice(model.name, settings)
    made = _written(model, golden, settings, folder, exporter)
    return replace(made, facts={**made.facts, "exporter_why": why})


def torchscript_model(
    model: Model, samples: NDArray[Any], labels: NDArray[np.int64] | None, settings: ExportTable, folder: Path
) -> Artifact:
    """Write `model.pt`, traced and frozen, and golden samples into `folder`; arguments and errors as `onnx_model`."""
    _refuse_meaningless(model, settings)
    if model.task == "detect":
        return boxes.torchscript_detector(model, samples, labels, settings, folder)
    golden = _golden(model, samples, labels, settings)
    reference = golden.reference[model.outputs[0]]
    path = folder / "model.pt"
    module = model.module if settings.input == "float" else TakesBytes(model.module, _preprocess(model, settings)).eval()
    torchscript.write(module, torch.from_numpy(example_inputs(samples, settings)), path)
    artifact = _artifact(model, path, Format.TORCHSCRIPT, reference, settings, {})
    session = torchscript.load(artifact)
    # No other runtime executes this graph, so the network itself says what it means.
    golden = replace(golden, expected=golden.reference)
    answer = answers(session, artifact, pieces(artifact, golden))
    error = checked_error("TorchScript", answer, reference, settings.tolerance)
    if settings.size == "dynamic":
        check_other_size("TorchScript", model, artifact, session, samples, settings)
    session.close()
    golden.save(folder / SAMPLES)
    return replace(artifact, facts={**artifact.facts, "relative_error": error})


def _refuse_meaningless(model: Model, settings: ExportTable) -> None:
    """Raise UsageError for settings that are not there for networks of this task."""
    problems = []
    if model.task in ("detect", "clips"):
        what = "a detector" if model.task == "detect" else "a network for clips"
        problems += [f'export.input = "{settings.input}" for {what}: it is fed floats'] * (settings.input != "float")
        problems += [f'export.size = "dynamic" for {what}: one size alone has been proved'] * (settings.size == "dynamic")
    if model.task == "detect":
        problems += [f"export.batch = {settings.batch} for a detector: it takes one picture"] * (
            settings.batch not in ("dynamic", 1)
        )
        alone = "for a detector: the legacy exporter alone writes such files"
        problems += [f"export.cross_check {alone}"] * settings.cross_check
        problems += [f'export.exporter = "new" {alone}'] * (settings.exporter == "new")
    if problems:
        raise UsageError(f"{model.name} cannot be exported like this", problems=problems)


def _golden(model: Model, samples: NDArray[Any], labels: NDArray[np.int64] | None, settings: ExportTable) -> Samples:
    """What PyTorch answers to the samples; refuses first what this machine or the network cannot do."""
    how = _preprocess(model, settings)
    inputs = normalised(samples, how)
    memory.require(model.name, memory.weight_bytes(model.module), memory.largest_tensor_bytes(model.module, inputs.shape))
    reference = torch_logits(model, inputs, settings.batch)
    if settings.size == "dynamic":
        require_any_size(model, samples, how)
    return Samples({INPUT: samples}, {model.outputs[0]: reference}, {}, labels)


def _preprocess(model: Model, settings: ExportTable) -> Preprocess:
    return replace(model.preprocess, feeds=settings.input)


def _written(model: Model, golden: Samples, settings: ExportTable, folder: Path, exporter: Exporter) -> Artifact:
    """What one exporter makes of the network, cleaned, written and compared with PyTorch."""
    how, samples, reference = _preprocess(model, settings), golden.inputs[INPUT], golden.reference[model.outputs[0]]
    graph = exported(model, normalised(samples, how), settings, exporter, outputs=model.outputs)
    graph = folded(graph) if exporter == "legacy" else graph
    tidy(graph)
    if model.task == "segment":
        unwrap(graph)
    _check_exported(graph, settings, model.outputs[0])
    if settings.input != "float":
        take_bytes(graph, how)
    path = folder / "model.onnx"
    files.write(graph, path)
    facts = {"opset": settings.opset, "nodes": len(graph.graph), "exporter": exporter}
    del graph
    artifact = _artifact(model, path, Format.ONNX, reference, settings, facts)
    golden = onnxruntime.literally(artifact, path, golden)
    error = checked_error("ONNX", golden.expected[model.outputs[0]], reference, settings.tolerance)
    if settings.size == "dynamic":
        session = onnxruntime.reference(path)
        check_other_size("ONNX", model, artifact, session, samples, settings)
        session.close()
    golden.save(folder / SAMPLES)
    return replace(artifact, facts={**artifact.facts, "relative_error": error})


def _cross_checked(model: Model, golden: Samples, settings: ExportTable, folder: Path) -> Artifact:
    """What both exporters make of the same weights and inputs; of what passes, that of the exporter which our table names."""
    first, why = choice(model.name, settings)
    made: dict[Exporter, Artifact] = {}
    findings: dict[str, str] = {}
    for exporter in (first, OTHER[first]):
        inside = folder / exporter
        inside.mkdir()
        try:
            made[exporter] = _written(model, golden, settings, inside, exporter)
            findings[exporter] = f"passes, max|d| / max|y| {made[exporter].facts['relative_error']:.2g}"
        except DeploykitError as error:
            findings[exporter] = " ".join(str(error).split())
    kept = next(iter(made), None)
    if kept is not None:
        for path in (folder / kept).iterdir():
            path.rename(folder / path.name)
    for name in findings:
        shutil.rmtree(folder / name)
    if kept is None:
        raise NoExporterError(model.name, findings)
    other = findings[OTHER[kept]]
    reason = f"{why}; {kept}: {findings[kept]}; {OTHER[kept]}: {other}" if kept == first else f"{OTHER[kept]}: {other}"
    artifact = replace(made[kept], path=folder / made[kept].path.name)
    return replace(artifact, facts={**artifact.facts, "exporter_why": reason, "exporters": to_json(findings)})


def _check_exported(model: ir.Model, settings: ExportTable, output: str) -> None:
    """The exporter raises a low opset without a word and keeps a batch it took for a constant; neither may pass."""
    problems = []
    opset = model.opset_imports.get("")
    if opset != settings.opset:
        problems.append(f"opset {opset} instead of {settings.opset}")
    shape = model.graph.inputs[0].shape
    for index, name in dynamic_axes(settings).items():
        if shape is None or isinstance(shape[index], int):
            problems.append(f"the {name} became a constant")
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    if names != [INPUT, output]:
        problems.append(f"inputs and outputs are {names} instead of {[INPUT, output]}")
    for node in model.graph:
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        foldable = producer is not None and producer.op_type == "Conv" and len(producer.outputs[0].uses()) == 1
        if node.op_type == "BatchNormalization" and foldable:
            problems.append(f"BatchNorm {node.name} was not folded into the convolution before it")
    if problems:
        raise StageError("the exported graph is not what was asked for", problems=problems)


def _map_size(reference: NDArray[np.float32], fed: Sequence[int], settings: ExportTable) -> tuple[int | str, ...]:
    """Height and width of a segmenter's scores, given those that it was `fed`; nothing for other answers.

    With open sizes they are the input's where they were so, and others open too: how a coarser map is rounded is not known.
    """
    size = reference.shape[2:]
    if settings.size == "fixed":
        return size
    return tuple(
        name if mine == theirs else f"output_{name}" for name, mine, theirs in zip((HEIGHT, WIDTH), size, fed, strict=False)
    )


def _artifact(
    model: Model, path: Path, kind: Format, reference: NDArray[np.float32], settings: ExportTable, facts: Mapping[str, JSON]
) -> Artifact:
    batch = BATCH if settings.batch == "dynamic" else settings.batch
    channels, *fixed = model.preprocess.shape  # of clips, (frames, height, width)
    size: list[int | str] = [HEIGHT, WIDTH] if settings.size == "dynamic" else [*fixed]
    shape = (*size, channels) if settings.input == "uint8 NHWC" else (channels, *size)
    return Artifact(
        path=path,
        stage="export",
        key="",
        format=kind,
        precision=Precision.FP32,
        inputs=(TensorSpec(INPUT, "float32" if settings.input == "float" else "uint8", (batch, *shape)),),
        outputs=(TensorSpec(model.outputs[0], "float32", (batch, reference.shape[1], *_map_size(reference, fixed, settings))),),
        preprocess=_preprocess(model, settings),
        classes=model.classes,
        sha256="",
        parents=(),
        settings=to_json(settings),  # type: ignore[arg-type]
        tools={"torch": torch.__version__, "onnx": onnx.__version__, "onnx_ir": ir.__version__},
        facts={"model": model.name, "weights": model.weights, "task": model.task, "num_classes": model.num_classes, **facts},
    )
