"""One pass of the float graph over the calibration images, every wanted activation in a streaming histogram."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.errors import StageError
from deploykit.machine import available_cores
from deploykit.progress import Progress, silent
from deploykit.quantize.histogram import Histogram
from deploykit.runtimes import onnxruntime, padded


def observe(
    model: Path, tensors: Sequence[str], batches: Iterable[NDArray[np.float32]], *, total: int, progress: Progress = silent
) -> dict[str, Histogram]:
    """Run the float graph over `batches` (N, C, H, W) and histogram each of `tensors`; `total` images are announced.

    Raises StageError naming the tensors that hold NaN or infinite values, and when there are no batches.
    """
    source, size, session = _open(model, tensors)
    histograms = {name: Histogram() for name in tensors}
    broken: set[str] = set()
    done = 0
    with ThreadPoolExecutor(available_cores()) as pool:
        for batch in batches:
            session.feed({source: padded(batch, size)})
            session.execute()
            # Views, because copies of all activations take longer than the network itself.
            views = {source: batch, **session.views()}
            fine = pool.map(_add, histograms.values(), [_unpadded(views[name], len(batch), size) for name in histograms])
            broken = {name for name, is_fine in zip(histograms, fine, strict=True) if not is_fine}
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


def _open(model: Path, tensors: Sequence[str]) -> tuple[str, int | None, onnxruntime.OnnxSession]:
    """The graph with `tensors` as outputs: the name of its input, its batch when that is fixed, and a session of it."""
    graph = ir.load(model)
    source = graph.graph.inputs[0]
    size = source.shape[0] if source.shape is not None else None
    original = {value.name for value in (source, *graph.graph.outputs)}
    by_name = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(by_name[name] for name in tensors if name not in original)
    session = onnxruntime.reference(ir.to_proto(graph).SerializeToString(), optimise=True)
    return source.name or "", size if isinstance(size, int) else None, session


def _unpadded(values: NDArray[np.float32], images: int, size: int | None) -> NDArray[np.float32]:
    """Without the rows of images that only fill a fixed batch, where a tensor counts images first (not windows or tokens)."""
    is_padded = size is not None and images < size and len(values) == size
    return values[:images] if is_padded else values


def _add(histogram: Histogram, values: NDArray[np.float32]) -> bool:
    """Whether all values were finite; otherwise the histogram stays as it was."""
    try:
        histogram.add(values)
    except ValueError:
        return False
    return True


def batch_size(tensors: Mapping[str, int], budget_bytes: int = 256 << 20, most: int = 16) -> int:
    """How many images at once keep all observed activations (bytes for one image each) within the budget."""
    return max(1, min(most, budget_bytes // max(1, sum(tensors.values()))))


def save(histograms: Mapping[str, Histogram], path: Path) -> None:
    """Write all histograms as one .npz: names, edges (low, high, limit), zeros, counts and drawn."""
    names = list(histograms)
    np.savez_compressed(
        path,
        names=np.array(names),
        edges=np.array([(h.low, h.high, h.limit) for h in histograms.values()]),
        zeros=np.array([h.zeros for h in histograms.values()]),
        counts=np.stack([histograms[name].counts for name in names]),
        drawn=np.stack([histograms[name].drawn for name in names]),
    )


def load(path: Path) -> dict[str, Histogram]:
    """Read what `save` wrote."""
    with np.load(path, allow_pickle=False) as archive:
        columns = (archive[key] for key in ("names", "edges", "zeros", "counts", "drawn"))
        return {
            str(name): Histogram(float(low), float(high), float(limit), int(zeros), counts, drawn)
            for name, (low, high, limit), zeros, counts, drawn in zip(*columns, strict=True)
        }
