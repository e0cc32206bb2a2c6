"""Model -> Artifact: ONNX or TorchScript, compared with PyTorch on real inputs, golden samples beside it."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from deploykit.artifact import SAMPLES, Artifact, Format, Precision, Samples, TensorSpec
from deploykit.errors import StageError
from deploykit.jsonable import to_json
from deploykit.models import Model
from deploykit.recipe import ExportTable
from deploykit.runtimes import answers, onnxruntime, padded, pieces, torchscript
from deploykit.runtimes.onnx_nodes import MODULE_KEY

INPUT, OUTPUT, BATCH = "image", "logits", "batch"


def onnx_model(
    model: Model, samples: NDArray[np.float32], labels: NDArray[np.int64] | None, settings: ExportTable, folder: Path
) -> Artifact:
    """Write `model.onnx` and golden samples into `folder`, in the forms both runtimes fuse.

    `samples` are real, preprocessed inputs (K, C, H, W). The file has the asked opset, a dynamic or fixed batch, inputs
    and outputs named `image` and `logits`, BatchNorm folded, and nodes named by their PyTorch module.
    Raises StageError when the exporter fails, or the file is not what was asked or answers differently from PyTorch.
    """
    reference = torch_logits(model, samples, settings.batch)
    graph = _exported(model, samples, settings)
    tidy(graph)
    _check_exported(graph, settings)
    path = folder / "model.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    artifact = _artifact(model, path, Format.ONNX, reference, settings, {"opset": settings.opset, "nodes": len(graph.graph)})
    golden = onnxruntime.literally(artifact, path, Samples({INPUT: samples}, {OUTPUT: reference}, {}, labels))
    error = _checked_error("ONNX", golden.expected[OUTPUT], reference, settings.tolerance)
    golden.save(folder / SAMPLES)
    return replace(artifact, facts={**artifact.facts, "relative_error": error})


def torchscript_model(
    model: Model, samples: NDArray[np.float32], labels: NDArray[np.int64] | None, settings: ExportTable, folder: Path
) -> Artifact:
    """Write `model.pt`, traced and frozen, and golden samples into `folder`; arguments and errors as `onnx_model`."""
    reference = torch_logits(model, samples, settings.batch)
    path = folder / "model.pt"
    torchscript.write(model.module, torch.from_numpy(_example(samples, settings)), path)
    artifact = _artifact(model, path, Format.TORCHSCRIPT, reference, settings, {})
    session = torchscript.load(artifact)
    # No other runtime executes this graph, so the network itself says what it means.
    golden = Samples({INPUT: samples}, {OUTPUT: reference}, {OUTPUT: reference}, labels)
    answer = answers(session, artifact, pieces(artifact, golden))
    session.close()
    error = _checked_error("TorchScript", answer, reference, settings.tolerance)
    golden.save(folder / SAMPLES)
    return replace(artifact, facts={**artifact.facts, "relative_error": error})


def torch_logits(model: Model, inputs: NDArray[np.float32], batch: int | str = "dynamic") -> NDArray[np.float32]:
    """What the FP32 PyTorch module answers: (N, C, H, W) -> (N, classes).

    With a fixed `batch` the module only ever sees so many images, the last ones repeated where some are missing.
    """
    size = batch if isinstance(batch, int) else len(inputs)
    found = []
    for start in range(0, len(inputs), size):
        piece = inputs[start : start + size]
        with torch.inference_mode():
            answer = model.module(torch.from_numpy(padded(piece, size)))
        if not isinstance(answer, torch.Tensor) or answer.ndim != 2 or answer.dtype != torch.float32:
            raise StageError(
                f"{model.name} does not answer like a classifier",
                why=f"expected one float32 tensor of (N, classes), got {_describe(answer)}",
                fix="wrap it in a module whose forward returns the logits",
            )
        found.append(answer[: len(piece)].numpy())
    return np.concatenate(found)


def tidy(model: ir.Model) -> None:
    """Restore the field's own operators, then rename and strip, in place.

    The exporter writes global pooling as ReduceMean over a constant and flattening as Reshape; ONNX Runtime and TensorRT
    have int8 kernels for GlobalAveragePool and none for ReduceMean. GELU comes as x * (0.5 * (1 + erf)), which ONNX
    Runtime's fusion does not know. Its stack traces carry paths of this machine.
    """
    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            _restore_global_pool(model.graph, node)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _restore_flatten(model.graph, node)
    for node in list(model.graph):
        if node.op_type == "Erf":
            _restore_gelu(model.graph, node)
    for simplify in (
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.DeduplicateInitializersPass(),
    ):
        simplify(model)
    _rename(model.graph)
    _strip(model)


def _exported(model: Model, samples: NDArray[np.float32], settings: ExportTable) -> ir.Model:
    """The new exporter's graph. Traced on two images, because torch.export takes a batch of one for a constant."""
    example = torch.from_numpy(_example(samples, settings))
    shapes = ({0: torch.export.Dim.DYNAMIC},) if settings.batch == "dynamic" else None
    try:
        # A failing torch.export prints pages of its graph; the reason is in what it raises.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            # The exporter's own use of APIs that torch deprecates, and advice meant for its authors.
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            program = torch.onnx.export(
                model.module,
                (example,),
                dynamo=True,
                opset_version=settings.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # torch.export and torch.onnx raise classes without a common base
        raise StageError(f"{model.name} cannot be exported to ONNX", why=_first_lines(error)) from error
    assert program is not None
    return program.model


def _example(samples: NDArray[np.float32], settings: ExportTable) -> NDArray[np.float32]:
    size = 2 if settings.batch == "dynamic" else settings.batch
    return np.resize(samples, (size, *samples.shape[1:]))


def _checked_error(what: str, answer: NDArray[np.float32], reference: NDArray[np.float32], tolerance: float) -> float:
    """max|d| / max|y|. Raises StageError above `tolerance`, and when anything is not finite."""
    scale = float(np.abs(reference).max())
    error = float(np.abs(answer - reference).max()) / scale if scale > 0 else float(np.abs(answer).max())
    if not np.isfinite(error) or error > tolerance:
        raise StageError(
            f"the {what} file does not answer like PyTorch",
            why=f"max|d| / max|y| is {error:.3g} on {len(reference)} real inputs; export.tolerance is {tolerance:g}",
            fix="a network whose forward depends on values of its input cannot be traced; rewrite that part",
        )
    return error


def _check_exported(model: ir.Model, settings: ExportTable) -> None:
    """The exporter raises a low opset without a word and keeps a batch it took for a constant; neither may pass."""
    problems = []
    opset = model.opset_imports.get("")
    if opset != settings.opset:
        problems.append(f"opset {opset} instead of {settings.opset}")
    batch = model.graph.inputs[0].shape
    if settings.batch == "dynamic" and (batch is None or isinstance(batch[0], int)):
        problems.append("the batch became a constant")
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    if names != [INPUT, OUTPUT]:
        problems.append(f"inputs and outputs are {names} instead of {[INPUT, OUTPUT]}")
    for node in model.graph:
        producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        foldable = producer is not None and producer.op_type == "Conv" and len(producer.outputs[0].uses()) == 1
        if node.op_type == "BatchNormalization" and foldable:
            problems.append(f"BatchNorm {node.name} was not folded into the convolution before it")
    if problems:
        raise StageError("the exported graph is not what was asked for", problems=problems)


def _restore_global_pool(graph: ir.Graph, node: ir.Node) -> None:
    """ReduceMean over both spatial axes of a 4-D tensor -> GlobalAveragePool (-> Flatten without keepdims)."""
    source, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if source is None or source.shape is None or len(source.shape) != 4 or axes is None or axes.const_value is None:
        return
    if sorted(int(axis) % 4 for axis in axes.const_value.numpy().reshape(-1)) != [2, 3]:
        return
    old = node.outputs[0]
    new = [ir.node("GlobalAveragePool", [source], metadata_props=dict(node.metadata_props))]
    pooled = new[0].outputs[0]
    pooled.type, pooled.shape = old.type, ir.Shape([source.shape[0], source.shape[1], 1, 1])
    if not node.attributes.get_int("keepdims", 1):
        new.append(ir.node("Flatten", [pooled], {"axis": 1}, metadata_props=dict(node.metadata_props)))
    _replace(graph, node, new)


def _restore_flatten(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape to (batch, everything else) -> Flatten, which passes any batch and is transparent to int8."""
    source, new_shape = node.inputs[0], node.outputs[0].shape
    if source is None or source.shape is None or new_shape is None or len(new_shape) != 2:
        return
    rest = source.shape[1:]
    sizes = [size for size in rest if isinstance(size, int)]
    if source.shape[0] == new_shape[0] and len(sizes) == len(rest) and math.prod(sizes) == new_shape[1]:
        _replace(graph, node, [ir.node("Flatten", [source], {"axis": 1}, metadata_props=dict(node.metadata_props))])


def _restore_gelu(graph: ir.Graph, erf: ir.Node) -> None:
    """x * (0.5 * (1 + erf(x / sqrt 2))) -> (x * (1 + erf(...))) * 0.5: the same bits, for halving is exact, in the order in
    which runtimes look for a GELU."""
    add = _only_reader(erf, "Add")
    half = None if add is None else _only_reader(add, "Mul")
    outer = None if half is None else _only_reader(half, "Mul")
    if add is None or half is None or outer is None:
        return
    (factor,) = [value for value in half.inputs if value is not add.outputs[0]]
    (source,) = [value for value in outer.inputs if value is not half.outputs[0]]
    if factor is None or factor.const_value is None or factor.const_value.numpy().tolist() not in (0.5, [0.5]):
        return
    inner = ir.node("Mul", [source, add.outputs[0]], metadata_props=dict(half.metadata_props))
    inner.outputs[0].type, inner.outputs[0].shape = half.outputs[0].type, outer.outputs[0].shape
    last = ir.node("Mul", [inner.outputs[0], factor], metadata_props=dict(outer.metadata_props))
    _replace(graph, outer, [inner, last])
    graph.remove(half, safe=True)


def _only_reader(node: ir.Node, op: str) -> ir.Node | None:
    """The one node that reads a result, where there is just one and it is such an operator; one that reads it twice is two."""
    readers = list(node.outputs[0].uses())
    if len(readers) != 1 or node.outputs[0].is_graph_output():
        return None
    reader = readers[0].node
    return reader if reader.op_type == op and len(reader.inputs) == 2 else None


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    old, result = node.outputs[0], new[-1].outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    graph.insert_after(node, new)
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = result
    old.replace_all_uses_with(result)
    graph.remove(node, safe=True)


def _rename(graph: ir.Graph) -> None:
    """Nodes become MODULE/OP, their results carry the same name; inputs and outputs of the graph keep theirs."""
    seen: dict[str, int] = {}
    for node in graph:
        module = _module_path(node)
        node.metadata_props[MODULE_KEY] = module
        base = f"{module}/{node.op_type}" if module else node.op_type
        seen[base] = seen.get(base, -1) + 1
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{index}" if index else node.name
    _name_the_batch(graph)


def _name_the_batch(graph: ir.Graph) -> None:
    """The dynamic dimension is called `batch` everywhere, not by the number that torch.export counted."""
    source = graph.inputs[0].shape
    if source is None or not isinstance(source[0], ir.SymbolicDim) or source[0].value is None:
        return
    counted = re.compile(rf"\b{re.escape(source[0].value)}\b")
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, counted) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, counted: re.Pattern[str]) -> int | str | None:
    if not isinstance(size, ir.SymbolicDim):
        return size
    return None if size.value is None else counted.sub(BATCH, size.value)


def _module_path(node: ir.Node) -> str:
    """The PyTorch module a node came from: that of its weights if it has any, since fusing a BatchNorm into a
    convolution leaves the BatchNorm's name on it; else the exporter's innermost module scope."""
    for value in node.inputs[1:2]:
        if value is not None and value.const_value is not None and (value.name or "").endswith(".weight"):
            return (value.name or "").removesuffix(".weight")
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    return scopes[-2] if len(scopes) > 1 else ""


def _strip(model: ir.Model) -> None:
    """Drop all metadata but the module path: the exporter's holds file paths and internals of one torch version."""
    graph = model.graph
    holders: list[object] = [model, graph, *graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph:
        module = node.metadata_props[MODULE_KEY]
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = module
        node.doc_string = None
        holders.extend(node.outputs)
    for holder in holders:
        holder.metadata_props.clear()  # type: ignore[attr-defined]
        holder.doc_string = None  # type: ignore[attr-defined]


def _artifact(
    model: Model, path: Path, kind: Format, reference: NDArray[np.float32], settings: ExportTable, facts: Mapping[str, float]
) -> Artifact:
    return Artifact(
        path=path,
        stage="export",
        key="",
        format=kind,
        precision=Precision.FP32,
        inputs=(
            TensorSpec(INPUT, "float32", (BATCH if settings.batch == "dynamic" else settings.batch, *model.preprocess.shape)),
        ),
        outputs=(TensorSpec(OUTPUT, "float32", (BATCH if settings.batch == "dynamic" else settings.batch, reference.shape[1])),),
        preprocess=model.preprocess,
        classes=model.classes,
        sha256="",
        parents=(),
        settings=to_json(settings),  # type: ignore[arg-type]
        tools={"torch": torch.__version__, "onnx": onnx.__version__, "onnx_ir": ir.__version__},
        facts={"model": model.name, "weights": model.weights, **facts},
    )


def _describe(answer: object) -> str:
    if isinstance(answer, torch.Tensor):
        return f"a {str(answer.dtype).removeprefix('torch.')} tensor of shape {tuple(answer.shape)}"
    if isinstance(answer, (tuple, list)):
        return f"{len(answer)} values"
    return type(answer).__name__


def _first_lines(error: BaseException) -> str:
    """What went wrong at the bottom: the exporter wraps it in its own words and advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"
