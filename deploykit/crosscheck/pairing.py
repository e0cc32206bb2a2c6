"""Which input and output of one side belongs to which of the other, and the same numbers fed to both.

Numbers are kept with their channels in dimension 1; a side that takes them elsewhere, or in another floating-point type, gets
them so because the user said it, never because it would fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from deploykit import foreign, runtimes
from deploykit.artifact import Tensors, TensorSpec
from deploykit.crosscheck.sides import Side
from deploykit.errors import StageError, UsageError, printable
from deploykit.foreign import FLOATS
from deploykit.runtimes import Session

# Images in one run of a side whose batch is not fixed.
BATCH = 16


@dataclass(frozen=True)
class Pairs:
    """Names of inputs and outputs that belong together, each (that of A, that of B); `specs` are of A's inputs, canonical."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    specs: tuple[TensorSpec, ...]

    def names(self, side: Side) -> tuple[str, ...]:
        """The names of the paired inputs as `side` has them."""
        return tuple(pair[side.label == "B"] for pair in self.inputs)


def pair(first: Side, second: Side, *, cast: bool, by_position: bool = False, size: int | None = None) -> Pairs:
    """Match inputs and outputs by name, or by position where each side has one or `by_position` says so.

    A height or width that one side leaves open is the other's; where both do, it is `size`.

    Raises UsageError with everything that does not match, or that would have to be changed to.
    """
    inputs, problems = _matched("input", first.inputs, second.inputs, by_position)
    outputs, more = _matched("output", first.outputs, second.outputs, by_position)
    fixes = ["--by-position, if they come in the same order"] * (bool(problems or more) and _is_as_many(first, second))
    for mine, theirs in inputs:
        if mine.dtype != theirs.dtype and not (cast and {mine.dtype, theirs.dtype} <= set(FLOATS)):
            more.append(f"types: {_told(first, mine)}; {_told(second, theirs)}")
            fixes += ["--cast feeds each side its own floating-point type"] * ({mine.dtype, theirs.dtype} <= set(FLOATS))
        if not _same(first.canonical(mine).shape, second.canonical(theirs).shape):
            more.append(f"shapes: {_told(first, mine)}; {_told(second, theirs)}")
            fixes += _layout_fix(first, mine, second, theirs)
    if problems or more:
        raise UsageError(
            "the two sides do not take or answer the same", problems=[*problems, *more], fix="; ".join(dict.fromkeys(fixes))
        )
    return Pairs(
        inputs=tuple((mine.name, theirs.name) for mine, theirs in inputs),
        outputs=tuple((mine.name, theirs.name) for mine, theirs in outputs),
        specs=tuple(_settled(first.canonical(mine), second.canonical(theirs), size) for mine, theirs in inputs),
    )


def fed(side: Side, pairs: Pairs, inputs: Sequence[NDArray[np.floating]]) -> Tensors:
    """`inputs`, in the order of `pairs`, by name and as `side` takes them: contiguous, in its layout and type."""
    types = {spec.name: spec.dtype for spec in side.inputs}
    return {
        name: _laid_out(side, array).astype(types[name], copy=False)
        for name, array in zip(pairs.names(side), inputs, strict=True)
    }


def answers(
    side: Side, session: Session, pairs: Pairs, inputs: Sequence[NDArray[np.floating]], *, batch: int = BATCH
) -> tuple[list[NDArray[np.floating]], float]:
    """What `side` answers to all of `inputs`, one array for each output of `pairs`, and the seconds of its inference alone.

    A side with a fixed batch gets its short last one padded by repetition, and the answers to that are dropped.

    Raises StageError for an answer that has not one entry for each image.
    """
    size = side.batch or batch
    found: list[list[NDArray[np.floating]]] = [[] for _ in pairs.outputs]
    seconds, count = 0.0, len(inputs[0])
    for start in range(0, count, size):
        pieces = [array[start : start + size] for array in inputs]
        tensors = fed(side, pairs, [runtimes.padded(piece, side.batch) for piece in pieces])
        before = perf_counter()
        answered = runtimes.run(session, tensors)
        seconds += perf_counter() - before
        images = len(next(iter(tensors.values())))
        for kept, names in zip(found, pairs.outputs, strict=True):
            kept.append(_rows(side, answered, names[side.label == "B"], images)[: len(pieces[0])])
    return [np.concatenate(kept) for kept in found], seconds


def _rows(side: Side, answered: Tensors, name: str, images: int) -> NDArray[np.floating]:
    values = np.asarray(answered[name])
    if values.ndim == 0 or len(values) != images:
        raise StageError(
            f"{side.label}: output {printable(name)!r} has shape {list(values.shape)} for {images} images",
            why="its first dimension is not the batch, so nothing says which image an answer belongs to",
        )
    return values


def _laid_out(side: Side, array: NDArray[np.floating]) -> NDArray[np.floating]:
    moved = array.transpose(0, 2, 3, 1) if side.layout == "nhwc" and array.ndim == 4 else array
    return np.ascontiguousarray(moved)


def _is_as_many(first: Side, second: Side) -> bool:
    return len(first.inputs) == len(second.inputs) and len(first.outputs) == len(second.outputs)


def _matched(
    kind: str, mine: Sequence[TensorSpec], theirs: Sequence[TensorSpec], by_position: bool
) -> tuple[list[tuple[TensorSpec, TensorSpec]], list[str]]:
    """The pairs, and why there are none."""
    if len(mine) == len(theirs) and (by_position or len(mine) == 1):
        return list(zip(mine, theirs, strict=True)), []
    if by_position:
        return [], [f"{kind}s: A has {len(mine)}, B has {len(theirs)}, so that no position tells which belong together"]
    by_name = {spec.name: spec for spec in theirs}
    if by_name.keys() == {spec.name for spec in mine}:
        return [(spec, by_name[spec.name]) for spec in mine], []
    names = [", ".join(printable(spec.name) for spec in specs) or "none" for specs in (mine, theirs)]
    return [], [f"{kind}s: A has {names[0]}; B has {names[1]}; several are matched by their names alone"]


def _same(mine: Sequence[int | str], theirs: Sequence[int | str]) -> bool:
    """Whether all dimensions but the batch are the same, or open on one side."""
    pairs = list(zip(mine, theirs, strict=False))[1:]
    return len(mine) == len(theirs) and all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs)


def _settled(mine: TensorSpec, theirs: TensorSpec, size: int | None) -> TensorSpec:
    """What both take, in the type that everything is kept in."""
    sizes = (a if isinstance(a, int) else b for a, b in zip(mine.shape[1:], theirs.shape[1:], strict=True))
    both = foreign.settled(replace(mine, shape=("batch", *sizes)), size, "both sides")
    return replace(both, dtype="float32")


def _layout_fix(first: Side, mine: TensorSpec, second: Side, theirs: TensorSpec) -> list[str]:
    """The --layout that would make the shapes of a side that is not ours fit, if one does."""
    if len(mine.shape) != 4 or len(theirs.shape) != 4:
        return []
    for side, spec, other in ((second, theirs, first.canonical(mine)), (first, mine, second.canonical(theirs))):
        batch, height, width, channels = spec.shape
        if not side.is_ours and side.layout == "nchw" and _same((batch, channels, height, width), other.shape):
            return [f"--layout {side.label}=nhwc, if its channels come last"]
    same = any(_same([mine.shape[0], *order], theirs.shape) for order in permutations(mine.shape[1:]))
    return ["the dimensions are the same in another order, which is neither NCHW nor NHWC"] * same


def _told(side: Side, spec: TensorSpec) -> str:
    return f"{side.label} takes {printable(spec.name)!r} as {spec.dtype} {list(spec.shape)} ({side.layout})"
