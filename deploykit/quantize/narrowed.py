"""What float16 makes of activations: the largest are to fit, and those that become zero are counted.

One pass over the golden inputs and, where there are some, all calibration images; a few numbers are kept of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.artifact import Artifact
from deploykit.errors import StageError
from deploykit.jsonable import JSON
from deploykit.progress import Progress, silent
from deploykit.quantize import bytes_for_one_image, observe
from deploykit.runtimes import pieces

MOST = float(np.finfo(np.float16).max)
# Half of the smallest value: what is not above it is rounded to zero (IEEE 754, ties to even).
_ZERO = np.float32(float(np.finfo(np.float16).smallest_subnormal) / 2)
_LISTED = 20


@dataclass
class Narrowed:
    """Of one tensor the largest finite size, how many values there were, are too large for float16, and become zero in it."""

    largest: float = 0.0
    values: int = 0
    beyond: int = 0
    lost: int = 0

    def add(self, values: NDArray[np.float32], _most: int = 0) -> None:
        """Take in a tensor of any shape, every value of it. What is infinite, as the fill of a pool, stays so in float16."""
        size = np.abs(values)
        self.values += size.size
        if not math.isfinite(size.max(initial=0)):
            size = size[np.isfinite(size)]
        top = float(size.max(initial=0))
        self.largest = max(self.largest, top)
        if top > MOST:
            self.beyond += int(np.count_nonzero(size > MOST))
        self.lost += int(np.count_nonzero(size <= _ZERO) - np.count_nonzero(size == 0))

    def include(self, other: Narrowed) -> None:
        """Take in all that `other` has seen."""
        self.largest = max(self.largest, other.largest)
        self.values, self.beyond, self.lost = (
            self.values + other.values,
            self.beyond + other.beyond,
            self.lost + other.lost,
        )


def activations(
    model: Artifact,
    graph: ir.Graph,
    names: Sequence[str],
    *,
    batches: Callable[[int], Iterable[NDArray[np.float32]]] | None = None,
    images: int = 0,
    progress: Progress = silent,
) -> dict[str, JSON]:
    """What becomes of the tensors `names` of `model`, whose graph is `graph`, on its golden inputs and on the calibration images.

    `batches(n)` gives the `images` calibration images as (n, C, H, W) arrays. Counted are values over all tensors and images;
    `most_lost` is the largest share of a tensor's values that becomes zero. Raises StageError with the tensors that do not fit.
    """
    if not names:
        return {}
    golden = pieces(model, model.samples())
    total = sum(map(len, golden)) + images
    first = model.inputs[0].shape[0]
    memory = bytes_for_one_image(graph, names, max(model.preprocess.crop))
    lanes, size = observe.lanes_and_batch(memory, first if isinstance(first, int) else None)
    fed = _all(golden, size, () if batches is None else batches(size))
    seen = observe.counted(model.path, names, fed, Narrowed, total=total, lanes=lanes, progress=progress, what="float16")
    problems = [
        f"{name}: {found.largest:.4g} is beyond {MOST:,.0f}, as are {found.beyond:,} of {found.values:,} values"
        for name, found in seen.items()
        if found.beyond
    ]
    if problems:
        fix = "keep the nodes that make and read them in float32 (build.float32), or all of the network (without --fp16)"
        why = f"on {total} images, {images} of them for calibration"
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise StageError("activations do not fit float16", problems=[*problems[:_LISTED], *more], why=why, fix=fix)
    shares = {name: found.lost / max(1, found.values) for name, found in seen.items()}
    top, worst = max(seen, key=lambda name: seen[name].largest), max(shares, key=lambda name: shares[name])
    return {
        "images": total,
        "calibration_images": images,
        "largest": seen[top].largest,
        "of": top,
        "values": sum(found.values for found in seen.values()),
        "lost": sum(found.lost for found in seen.values()),
        "most_lost": shares[worst],
        "lost_of": worst,
    }


def _all(
    golden: Iterable[NDArray[np.float32]], size: int, others: Iterable[NDArray[np.float32]]
) -> Iterator[NDArray[np.float32]]:
    """The golden inputs, so many at a time, then the others."""
    for piece in golden:
        yield from (piece[start : start + size] for start in range(0, len(piece), size))
    yield from others
