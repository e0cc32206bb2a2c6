"""Artifact -> Artifact: post-training INT8 as Q/DQ in the graph, for one runtime's rules.

Calibration (`calibrate`) and placement (`quantize`) are two steps, so that another method or another runtime's rules
never runs the images again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit import runtimes
from deploykit.artifact import Artifact, Format
from deploykit.errors import UsageError
from deploykit.gate import Verdict
from deploykit.jsonable import to_json
from deploykit.progress import Progress, silent
from deploykit.quantize import observe, optimal, place, ranges, rounding
from deploykit.quantize.fallback import Case, Kept, Search, search, search_for_gate
from deploykit.quantize.histogram import Histogram
from deploykit.quantize.inputs import Inputs
from deploykit.quantize.ranges import Range
from deploykit.quantize.speed import Costs, Stopwatch
from deploykit.quantize.trials import Calibrated, Candidate, Trials, float_graph, too_sensitive
from deploykit.recipe import QuantizeTable

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
    them. What is doubtful about them becomes `warnings` in the facts.

    Raises UsageError when `model` is no FP32 ONNX artifact in one file or has nothing to quantize, DataError when images hold
    NaN or infinite values.
    """
    graph = float_graph(model).graph
    known = [entry.rules for entry in runtimes.REGISTRY.values() if entry.rules is not None]
    tensors = place.tensors(graph, known, cast(Sequence[str], model.facts.get("heads", ())))
    if not tensors:
        raise UsageError(
            f"{model.facts.get('model')} has nothing to quantize", why="no Conv, Gemm or MatMul has constant weights"
        )
    fixed = None if _is_dynamic(model) else int(model.inputs[0].shape[0])
    lanes, size = observe.lanes_and_batch(bytes_for_one_image(graph, tensors, max(model.preprocess.crop)), fixed)
    inputs = Inputs(names, model.preprocess)
    seen = observe.observe(model.path, tensors, inputs.passing(batches(size)), total=images, lanes=lanes, progress=progress)
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
    judge: Callable[[Artifact], Verdict] | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write `model.onnx` with Q/DQ by the rules of `runtime`, and its golden samples, into `folder`.

    `images()` gives a few calibration images (n, C, H, W). With them weights are rounded as `settings` say, and the noise
    that INT8 adds to the output is measured; where it is above what `settings` allow, or `judge` (the recipe's gate) does not
    pass the graph, the layers that cause it stay in float: facts["search"] says which and why. Without them (random weights,
    whose noise means nothing) weights are rounded to the nearest and nothing is searched. With a `stopwatch` layers also stay
    in float where that is faster on this machine: facts["candidates"] has what was weighed.

    Raises UsageError when `model` is no FP32 ONNX artifact in one file or `runtime` has no INT8, StageError when a layer that the
    plan claims as int8 does not stand between Q/DQ in the written file.
    """
    some = None if images is None else images()
    calibrated = _calibrated(model, observations, settings, runtime, some, progress)
    with tempfile.TemporaryDirectory() as scratch:
        trials = Trials(calibrated, Path(scratch))
        costs = None if stopwatch is None else trials.costs(stopwatch)
        found = Search() if some is None else _searched(trials, some, judge, costs, progress)
        floats = too_sensitive(found.kept)
        candidates: list[Candidate] = []
        sqnr_db = None if some is None else lambda floats: _case(calibrated, some, costs, floats).sqnr_db()
        if stopwatch is not None:
            floats, candidates = trials.fastest(floats, costs, stopwatch, sqnr_db)
        if sqnr_db is not None and len(floats) > len(found.kept):
            found = replace(found, after_db=sqnr_db(floats))
    made = calibrated.write(floats, folder)
    weighed = [to_json(candidate) for candidate in candidates]
    return replace(made, facts={**made.facts, "search": to_json(found), "candidates": weighed})


def _calibrated(
    model: Artifact,
    observations: Artifact,
    settings: QuantizeTable,
    runtime: str,
    images: NDArray[np.float32] | None,
    progress: Progress,
) -> Calibrated:
    """Ranges by the method of `settings`, and with `images` weights that are rounded as they say."""
    rules = runtimes.rules(runtime, settings.cpu)
    source = float_graph(model)
    decided = place.plan(source.graph, rules, settings.float_layers)
    if not place.claimed(decided):
        problems = [f"{layer.name}: {layer.why}" for layer in decided.layers]
        raise UsageError(f"no layer of {model.facts.get('model')} can run in int8", problems=problems)
    seen = observe.load(observations.path)
    # An affine range has the same steps whether its integers are signed or not.
    integers: ranges.Integers = "int8" if rules.activations == "int8" else "uint8"
    kept_ranges = {name: _range(seen[name], settings, integers) for name in decided.uses if name in seen}
    rounded = rounding.NEAREST
    if images is not None and settings.rounding == "together":
        rounded = rounding.rounded(source, decided, kept_ranges, rules, images, progress=progress)
    return Calibrated(model, observations, settings, runtime, rules, kept_ranges, rounded)


def _searched(
    trials: Trials,
    images: NDArray[np.float32],
    judge: Callable[[Artifact], Verdict] | None,
    costs: Costs | None,
    progress: Progress,
) -> Search:
    """Which layers stay in float for the noise that `settings` allow, and for the gate."""
    case = _case(trials.calibrated, images, costs)
    found = search(case, progress=progress)
    if judge is None:
        return found

    def passes(kept: Sequence[Kept]) -> Verdict:
        return judge(trials.made(too_sensitive(kept)))

    return search_for_gate(case, found, passes, progress=progress)


def _case(of: Calibrated, images: NDArray[np.float32], costs: Costs | None, floats: Iterable[str] = ()) -> Case:
    settings = replace(of.settings, float_layers=(*of.settings.float_layers, *floats))
    return Case(float_graph(of.model), of.rules, of.ranges, settings, images, of.rounded, costs)


def _range(seen: Histogram, settings: QuantizeTable, integers: ranges.Integers) -> Range:
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


def bytes_for_one_image(graph: ir.Graph, names: Sequence[str], open_size: int = 1) -> dict[str, int]:
    """How much memory each of the tensors takes for one image, as float32; an open height or width counts as `open_size`."""
    shapes = {value.name: value.shape for value in (*graph.inputs, *(out for node in graph for out in node.outputs))}

    def count(size: int | ir.SymbolicDim) -> int:
        if isinstance(size, int):
            return size
        return open_size if size.value is None or "height" in size.value or "width" in size.value else 1

    return {name: 4 * math.prod(map(count, shapes[name] or ())) for name in names}


def _is_dynamic(model: Artifact) -> bool:
    return not isinstance(model.inputs[0].shape[0], int)
