"""One pass of the float graph over the calibration images, every wanted activation in a streaming histogram."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.errors import StageError
from deploykit.progress import Progress, silent
from deploykit.quantize.histogram import Histogram
from deploykit.runtimes import onnxruntime, padded, run


def observe(
    model: Path, tensors: Sequence[str], batches: Iterable[NDArray[np.float32]], *, total: int, progress: Progress = silent
) -> dict[str, Histogram]:
    """Run the float graph over `batches` (N, C, H, W) and histogram each of `tensors`; `total` images are announced.

    Raises StageError naming the tensors that hold NaN or infinite values, and when there are no batches.
    """
    graph = ir.load(model)
    source, shape = graph.graph.inputs[0].name or "", graph.graph.inputs[0].shape
    size = shape[0] if shape is not None else None
    original = [value.name for value in graph.graph.outputs]
    by_name = {value.name: value for node in graph.graph for value in node.outputs}
    for name in tensors:
        if name != source and name not in original:
            graph.graph.outputs.append(by_name[name])
    session = onnxruntime.reference(ir.to_proto(graph).SerializeToString(), optimise=True, arena=False)
    histograms = {name: Histogram() for name in tensors}
    broken: set[str] = set()
    done = 0
    for batch in batches:
        whole = padded(batch, size if isinstance(size, int) else None)
        values = {source: whole, **run(session, {source: whole})}
        for name, histogram in histograms.items():
            try:
                histogram.add(values[name][: len(batch)])  # without the padding of a graph with a fixed batch
            except ValueError:
                broken.add(name)
        if broken:
            break
        done += len(batch)
        progress("calibrate", done, total)
    session.close()
    if broken:
        raise StageError(
            "calibration met activations that are NaN or infinite",
            problems=[name for name in tensors if name in broken],
            why="the first of them in graph order is where it began",
            fix="check the weights and the preprocessing",
        )
    if done == 0:
        raise StageError("there was no image to calibrate on")
    return histograms


def batch_size(tensors: Mapping[str, int], budget_bytes: int = 256 << 20, most: int = 16) -> int:
    """How many images at once keep all observed activations (bytes for one image each) within the budget."""
    return max(1, min(most, budget_bytes // max(1, sum(tensors.values()))))


def save(histograms: Mapping[str, Histogram], path: Path) -> None:
    """Write all histograms as one .npz: names, edges (low, high, limit) and counts."""
    names = list(histograms)
    np.savez_compressed(
        path,
        names=np.array(names),
        edges=np.array([(h.low, h.high, h.limit) for h in histograms.values()]),
        counts=np.stack([histograms[name].counts for name in names]),
    )


def load(path: Path) -> dict[str, Histogram]:
    """Read what `save` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        return {
            str(name): Histogram(float(low), float(high), float(limit), counts)
            for name, (low, high, limit), counts in zip(archive["names"], archive["edges"], archive["counts"], strict=True)
        }
