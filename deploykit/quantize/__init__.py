"""Artifact -> Artifact: post-training INT8 as Q/DQ in the graph, for one runtime's rules.

Calibration (`calibrate`) and placement (`quantize`) are two steps, so that another method or another runtime's rules
never runs the images again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit import runtimes
from deploykit.artifact import SAMPLES, Artifact, Format, Precision
from deploykit.errors import StageError, UsageError
from deploykit.jsonable import to_json
from deploykit.progress import Progress, silent
from deploykit.quantize import observe, optimal, place, ranges, sensitivity
from deploykit.quantize.histogram import Histogram
from deploykit.quantize.inputs import Inputs
from deploykit.quantize.insert import insert
from deploykit.quantize.sensitivity import Search
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import onnxruntime

OBSERVATIONS = "observations.npz"


def calibrate(
    model: Artifact,
    batches: Callable[[int], Iterable[NDArray[np.float32]]],
    folder: Path,
    *,
    images: int,
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Observe every activation that any runtime's rules may quantize, in one pass, and write it into `folder`.

    `batches(n)` gives the `images` preprocessed calibration images as (n, C, H, W) arrays; `names` are what messages call
    them. What is doubtful about them becomes `warnings` in the facts. Raises DataError when some hold NaN or infinite values.
    """
    graph = _load(model).graph
    known = [entry.rules for entry in runtimes.REGISTRY.values() if entry.rules is not None]
    tensors = place.tensors(graph, known)
    if not tensors:
        raise UsageError(
            f"{model.facts.get('model')} has nothing to quantize", why="no Conv, Gemm or MatMul has constant weights"
        )
    size = observe.batch_size(bytes_for_one_image(graph, tensors)) if _is_dynamic(model) else int(model.inputs[0].shape[0])
    inputs = Inputs(names)
    seen = observe.observe(model.path, tensors, inputs.passing(batches(size)), total=images, progress=progress)
    observe.save(seen, folder / OBSERVATIONS)
    return replace(
        model,
        path=folder / OBSERVATIONS,
        stage="calibrate",
        format=Format.OBSERVATIONS,
        parents=(model.sha256,),
        settings={},
        facts={"images": images, "tensors": len(tensors), "warnings": inputs.warnings()},
    )


def quantize(
    model: Artifact,
    observations: Artifact,
    settings: QuantizeTable,
    runtime: str,
    folder: Path,
    *,
    images: Callable[[], NDArray[np.float32]] | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write `model.onnx` with Q/DQ by the rules of `runtime`, and its golden samples, into `folder`.

    `images()` gives a few calibration images (n, C, H, W). With them the noise that INT8 adds to the output is measured, and
    where it is above what `settings` allow, the layers that cause it stay in float: facts["search"] says which and why.
    Without them (random weights, whose noise means nothing) nothing is searched.

    Raises StageError when a layer that the plan claims as int8 does not stand between Q/DQ in the written file.
    """
    rules = runtimes.rules(runtime)
    source = _load(model)
    decided = place.plan(source.graph, rules, settings.float_layers)
    if not place.claimed(decided):
        problems = [f"{layer.name}: {layer.why}" for layer in decided.layers]
        raise UsageError(f"no layer of {model.facts.get('model')} can run in int8", problems=problems)
    seen = observe.load(observations.path)
    kept_ranges = {name: _range(seen[name], settings, rules.activations) for name in decided.uses if name in seen}
    search = Search() if images is None else sensitivity.search(source, rules, kept_ranges, settings, images(), progress=progress)
    graph = _load(model)
    decided = place.plan(graph.graph, rules, [*settings.float_layers, *(step.layer for step in search.kept)])
    insert(graph, decided, kept_ranges, rules)
    path = folder / "model.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    _check_claims(path, decided)
    onnxruntime.literally(model, path, model.samples()).save(folder / SAMPLES)
    why = {
        step.layer: f"too sensitive: {step.before_db:.1f} dB expected at the output with it in int8, {step.after_db:.1f} without"
        for step in search.kept
    }
    return replace(
        model,
        path=path,
        stage="quantize",
        precision=Precision.INT8,
        parents=(model.sha256, observations.sha256),
        settings=to_json(settings),  # type: ignore[arg-type]
        facts={
            **model.facts,
            "rules": runtime,
            "int8_layers": place.claimed(decided),
            "float_layers": {layer.name: why.get(layer.name, layer.why) for layer in decided.layers if not layer.int8},
            "kept_float": [layer.name for layer in decided.layers if layer.why == place.KEPT],
            "search": to_json(search),
        },
    )


def _range(seen: Histogram, settings: QuantizeTable, integers: ranges.Integers) -> ranges.Range:
    match settings.method:
        case "minmax":
            return ranges.minmax(seen)
        case "percentile":
            return ranges.percentile(seen, ranges.PERCENT if settings.percentile is None else settings.percentile)
        case "entropy":
            return optimal.entropy(seen, integers)
        case "mse":
            return optimal.mse(seen, integers)
        case _:
            assert_never(settings.method)


def _check_claims(path: Path, decided: place.Plan) -> None:
    """Every layer claimed as int8 reads its input and its weights from a DequantizeLinear, in the file as written."""
    nodes = {node.name: node for node in ir.load(path).graph}
    wrong = [name for name in place.claimed(decided) if not _reads_dequantized(nodes.get(name))]
    if wrong:
        raise StageError("these layers were to be quantized and are not", problems=wrong)


def _reads_dequantized(node: ir.Node | None) -> bool:
    if node is None:
        return False
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _load(model: Artifact) -> ir.Model:
    if model.format is not Format.ONNX or model.precision is not Precision.FP32:
        raise UsageError(f"only an FP32 ONNX artifact can be quantized, not {model.precision.value} {model.format.value}")
    return ir.load(model.path)


def bytes_for_one_image(graph: ir.Graph, names: Sequence[str]) -> dict[str, int]:
    """How much memory each of the tensors takes for one image, as float32."""
    shapes = {value.name: value.shape for value in (*graph.inputs, *(out for node in graph for out in node.outputs))}
    return {name: 4 * int(np.prod([size for size in (shapes[name] or ()) if isinstance(size, int)] or [1])) for name in names}


def _is_dynamic(model: Artifact) -> bool:
    return not isinstance(model.inputs[0].shape[0], int)
