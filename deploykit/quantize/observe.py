"""One pass of the float graph over the calibration images, every wanted activation in a streaming histogram."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import StageError
from deploykit.machine import available_cores
from deploykit.progress import Progress, silent
from deploykit.quantize.expose import Exposed, expose
from deploykit.quantize.histogram import SAMPLE, Histogram
from deploykit.runtimes import padded

# Of the activations that are held at once: six images of ResNet-50's. It then takes 0.4 GiB beside the loaded model.
BUDGET_BYTES = 400 << 20
_MOST = 16


class Counter(Protocol):
    """What is kept of one tensor while images go through."""

    def add(self, values: NDArray[np.float32], most: int) -> None:
        """Take in a tensor, of which `most` values may be sampled. Raises ValueError for values that must not be."""

    def include(self: C, other: C) -> None:
        """Take in all that another one has seen."""


C = TypeVar("C", bound=Counter)


def observe(
    model: Path,
    tensors: Sequence[str],
    batches: Iterable[NDArray[np.float32]],
    *,
    total: int,
    lanes: int = 1,
    progress: Progress = silent,
) -> dict[str, Histogram]:
    """Run the float graph over `batches` (N, C, H, W) and histogram each of `tensors`; as `counted` does it.

    Raises StageError naming the tensors that hold NaN or infinite values, and when there are no batches.
    """
    return counted(model, tensors, batches, Histogram, total=total, lanes=lanes, progress=progress, what="calibrate")


def counted(
    model: Path,
    tensors: Sequence[str],
    batches: Iterable[NDArray[np.float32]],
    make: Callable[[], C],
    *,
    total: int,
    lanes: int,
    progress: Progress,
    what: str,
) -> dict[str, C]:
    """Run the graph over `batches` (N, C, H, W), each of `tensors` into a counter of `make`; `total` images are announced.

    `lanes` batches are worked on at once, each by one thread from the first layer to the last counter: threads that
    shared a layer would wait for each other at its end, and those that only counted for the interpreter's lock. Raises
    StageError naming the tensors that a counter refuses, and when there are no batches.
    """
    exposed = expose(model, tensors, threads=max(1, available_cores() - lanes + 1))
    work = [_Lane(exposed, tensors, SAMPLE // lanes, make) for _ in range(lanes)]
    done = 0
    with ThreadPoolExecutor(lanes) as pool:
        for images, broken in _in_order(pool, work, batches):
            if broken:
                raise StageError(
                    "calibration met activations that are NaN or infinite",
                    problems=broken,
                    why="the first of them in graph order is where it began",
                    fix="check the weights and the preprocessing",
                )
            done += images
            progress(what, done, total)
    if done == 0:
        raise StageError("there was no image to calibrate on")
    for lane in work[1:]:
        for name, counter in lane.counters.items():
            work[0].counters[name].include(counter)
    return work[0].counters


class _Lane(Generic[C]):
    """Buffers for one batch at a time, and counters of all that went through them."""

    def __init__(self, exposed: Exposed, tensors: Sequence[str], sample: int, make: Callable[[], C]) -> None:
        self.counters = {name: make() for name in tensors}
        self._exposed = exposed
        self._session = exposed.session.another()
        self._sample = sample

    def take(self, batch: NDArray[np.float32]) -> tuple[int, list[str]]:
        """How many images were run, and which tensors hold NaN or infinite values; those were not counted."""
        source, size = self._exposed.source, self._exposed.batch
        self._session.feed({source: padded(batch, size)})
        self._session.execute()
        # Views, because copies of all activations take longer than the network itself.
        views = {source: batch, **self._session.views()}
        # Batches in work at once share one sample, so an image gives as many values as in one batch of them all, and
        # nowhere fewer than in the largest.
        sample = min(SAMPLE, max(self._sample, len(batch) * SAMPLE // _MOST))
        values = {name: _unpadded(views[self._exposed.outputs[name]], len(batch), size) for name in self.counters}
        return len(batch), [name for name in values if not _add(self.counters[name], values[name], sample)]


def _in_order(
    pool: Executor, lanes: Sequence[_Lane[C]], batches: Iterable[NDArray[np.float32]]
) -> Iterator[tuple[int, list[str]]]:
    """What became of each batch; as many as there are lanes are worked on while the next is being read."""
    working: deque[Future[tuple[int, list[str]]]] = deque()
    for batch, lane in zip(batches, cycle(lanes), strict=False):
        if len(working) == len(lanes):
            yield working.popleft().result()
        working.append(pool.submit(lane.take, batch))
    while working:
        yield working.popleft().result()


def _unpadded(values: NDArray[np.float32], images: int, size: int | None) -> NDArray[np.float32]:
    """Without the rows of images that only fill a fixed batch, where a tensor counts images first (not windows or tokens)."""
    is_padded = size is not None and images < size and len(values) == size
    return values[:images] if is_padded else values


def _add(counter: Counter, values: NDArray[np.float32], sample: int) -> bool:
    """Whether all values were taken; otherwise the counter stays as it was."""
    try:
        counter.add(values, sample)
    except ValueError:
        return False
    return True


def batch_size(tensors: Mapping[str, int], budget_bytes: int = 256 << 20, most: int = _MOST) -> int:
    """How many images at once keep all observed activations (bytes for one image each) within the budget."""
    return max(1, min(most, budget_bytes // max(1, sum(tensors.values()))))


def lanes_and_batch(tensors: Mapping[str, int], fixed: int | None) -> tuple[int, int]:
    """How many batches to work on at once, and how large each is to be, where the graph does not fix that."""
    images = batch_size(tensors, BUDGET_BYTES)
    lanes = max(1, min(available_cores(), images // (fixed or 1)))
    return lanes, fixed or images // lanes


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
