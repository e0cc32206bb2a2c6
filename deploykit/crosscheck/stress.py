"""Inputs that break engines: one row for each kind, with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from deploykit import foreign, parity, runtimes
from deploykit.artifact import Precision, Preprocess, Tensors, TensorSpec
from deploykit.crosscheck import nonfinite
from deploykit.crosscheck.measures import Limit
from deploykit.crosscheck.pairing import BATCH, Pairs, answers, fed
from deploykit.crosscheck.sides import Side
from deploykit.errors import UsageError
from deploykit.gate import GateResult, Verdict
from deploykit.machine import available_cores
from deploykit.progress import Progress
from deploykit.runtimes import Session

_RUNS = 5
_WRONG = {"float32": "float64", "float64": "float32", "float16": "float32"}

Arrays = Sequence[NDArray[np.floating]]


@dataclass(frozen=True)
class Row:
    """One kind of input and what became of it; `side` is empty where both are compared. No verdict: it means nothing here.

    `is_own_check` marks what deploykit itself refuses before a side sees it: true of deploykit, and no gate on a side, unless
    it was not refused and read as something else.
    """

    kind: str
    side: str
    verdict: Verdict | None
    reason: str
    is_own_check: bool = False

    @property
    def is_gate(self) -> bool:
        """Whether a side is judged by it: not by what means nothing on it, nor by wrong arrays that deploykit kept from it."""
        return self.verdict is Verdict.FAIL or (self.verdict is Verdict.PASS and not self.is_own_check)


def generated(pairs: Pairs, how: Preprocess | None) -> dict[str, list[NDArray[np.floating]]]:
    """All zeros, all ones and extremes, each as one array (N, ...) for each input.

    Extremes are the smallest and the largest value that a picture can become, all over and as a checkerboard; -1 and 1 where
    nothing says how pictures are prepared.
    """
    return {
        "all zeros": [np.zeros((1, *_sizes(spec)), np.float32) for spec in pairs.specs],
        "all ones": [np.ones((1, *_sizes(spec)), np.float32) for spec in pairs.specs],
        "extremes": [_extremes(spec, how) for spec in pairs.specs],
    }


def run(
    sides: Sequence[Side],
    sessions: Sequence[Session],
    pairs: Pairs,
    limit: Limit,
    how: Preprocess | None,
    progress: Progress,
) -> list[Row]:
    """Every kind: generated inputs on both sides against each other, and what each side makes of batches, repetition, thread
    counts; and whether deploykit refuses the arrays that a runtime would mis-read."""
    rows: list[Row] = []
    made = generated(pairs, how)
    checks: list[Callable[[], Row]] = [partial(_both, kind, sides, sessions, pairs, made[kind], limit) for kind in made]
    noise = [foreign.noise(spec, BATCH, seed=index) for index, spec in enumerate(pairs.specs)]
    for side, session in zip(sides, sessions, strict=True):
        looks = (_batches, _again, _threads, _not_contiguous, _mistyped)
        checks += [partial(look, side, session, pairs, noise) for look in looks]
    for number, check in enumerate(checks):
        progress("stress", number, len(checks))
        rows.append(check())
    return rows


def gates(rows: Iterable[Row]) -> list[GateResult]:
    """The rows by which a side is judged."""
    return [
        GateResult(f"{row.side}: {row.kind}" if row.side else row.kind, row.verdict, None, None, row.reason)
        for row in rows
        if row.verdict is not None and row.is_gate
    ]


def _both(kind: str, sides: Sequence[Side], sessions: Sequence[Session], pairs: Pairs, inputs: Arrays, limit: Limit) -> Row:
    mine, theirs = (answers(side, session, pairs, inputs)[0] for side, session in zip(sides, sessions, strict=True))
    errors = [parity.tensor_errors(b, a) for a, b in zip(mine, theirs, strict=True)]
    worst = max(errors, key=lambda found: found.relative)
    told = f"max|d| / max|A| {worst.relative:.2g}, SQNR {worst.sqnr_db:.1f} dB" if np.isfinite(worst.max_abs) else "not finite"
    holds = all(limit.holds(found) for found in errors)
    verdict = Verdict.PASS if holds else Verdict.FAIL
    names = [f"{kind} {index}" for index in range(len(inputs[0]))]
    broken = (_not_finite(side, pairs, inputs, found, names) for side, found in zip(sides, (mine, theirs), strict=True))
    blamed = "".join(f"; {found}" for found in broken if found)
    return Row(kind, "", verdict, f"{'identical' if worst.max_abs == 0 else told} ({limit.rule}){blamed}")


def _not_finite(side: Side, pairs: Pairs, inputs: Arrays, answered: Arrays, names: Sequence[str]) -> str:
    """Which of `inputs` are answered with no numbers, and the first layer with one, in words; empty when all are numbers."""
    rows = nonfinite.broken(answered)
    if not rows:
        return ""
    where = nonfinite.blame(side, pairs, [array[rows[0] : rows[0] + 1] for array in inputs])
    return nonfinite.told(side, rows, names, where)


def _batches(side: Side, session: Session, pairs: Pairs, inputs: Arrays) -> Row:
    kind = f"batch 1 against batch {BATCH}"
    if side.batch is not None:
        return Row(kind, side.label, None, f"means nothing: its batch is fixed at {side.batch}")
    together, _ = answers(side, session, pairs, inputs)
    alone, _ = answers(side, session, pairs, inputs, batch=1)
    return _near(kind, side, alone, together)


def _again(side: Side, session: Session, pairs: Pairs, inputs: Arrays) -> Row:
    kind = f"{_RUNS} runs of the same input"
    first, _ = answers(side, session, pairs, inputs)
    # The same NaN each time is no answer that could be trusted either.
    if broken := _not_finite(side, pairs, inputs, first, [f"noise {index}" for index in range(len(inputs[0]))]):
        return Row(kind, side.label, Verdict.FAIL, broken)
    same = all(
        np.array_equal(now, before)
        for _ in range(_RUNS - 1)
        for now, before in zip(answers(side, session, pairs, inputs)[0], first, strict=True)
    )
    told = "the same bits each time" if same else "the answers change from run to run"
    return Row(kind, side.label, Verdict.PASS if same else Verdict.FAIL, told)


def _threads(side: Side, _session: Session, pairs: Pairs, inputs: Arrays) -> Row:
    counts = (1, max(2, available_cores()))
    kind = f"{counts[0]} and {counts[1]} threads"
    if not side.has_threads:
        return Row(kind, side.label, None, f"means nothing: {side.kind} has no threads to set")
    found = []
    for threads in counts:
        session = side.open(threads)
        try:
            found.append(answers(side, session, pairs, inputs)[0])
        finally:
            session.close()
    return _near(kind, side, *found)


def _not_contiguous(side: Side, session: Session, pairs: Pairs, inputs: Arrays) -> Row:
    tensors = _one_run(side, pairs, inputs)
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in tensors.items()}
    return _refused("deploykit's own check of a non-contiguous input", side, session, strided, runtimes.run(session, tensors))


def _mistyped(side: Side, session: Session, pairs: Pairs, inputs: Arrays) -> Row:
    tensors = _one_run(side, pairs, inputs)
    wrong = {name: array.astype(_WRONG[array.dtype.name]) for name, array in tensors.items()}
    return _refused("deploykit's own check of a mis-typed input", side, session, wrong, runtimes.run(session, tensors))


def _refused(kind: str, side: Side, session: Session, wrong: Tensors, right: Tensors) -> Row:
    """Passes when the array is refused, or read as what it means; fails when it is read as something else."""
    try:
        answered = runtimes.run(session, wrong)
    except UsageError as error:
        return Row(kind, side.label, Verdict.PASS, f"refused: {(error.problems or (error.what,))[0]}", is_own_check=True)
    same = all(np.array_equal(answered[name], right[name], equal_nan=True) for name in right)
    told = "read as it is" if same else "mis-read, and answered"
    return Row(kind, side.label, Verdict.PASS if same else Verdict.FAIL, told, is_own_check=True)


def _near(kind: str, side: Side, actual: Arrays, wanted: Arrays) -> Row:
    """One side against itself: nothing but the order of additions may differ, whatever its precision."""
    limit = parity.FLOAT_LIMIT.get(side.precision, parity.FLOAT_LIMIT[Precision.FP32])
    worst = max(parity.tensor_errors(a, w).relative for a, w in zip(actual, wanted, strict=True))
    told = "identical" if worst == 0 else f"max|d| / max|y| {worst:.2g}"
    return Row(kind, side.label, Verdict.PASS if worst <= limit else Verdict.FAIL, f"{told} (<= {limit:g})")


def _one_run(side: Side, pairs: Pairs, inputs: Arrays) -> Tensors:
    size = side.batch or 2
    return fed(side, pairs, [runtimes.padded(array[:size], side.batch) for array in inputs])


def _sizes(spec: TensorSpec) -> Iterator[int]:
    return (int(size) for size in spec.shape[1:])


def _extremes(spec: TensorSpec, how: Preprocess | None) -> NDArray[np.floating]:
    sizes = tuple(_sizes(spec))
    low, high = np.full(sizes, -1, np.float32), np.full(sizes, 1, np.float32)
    if how is not None and sizes == how.shape:
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (how.mean, how.std))
        low, high = np.broadcast_to(-mean / std, sizes), np.broadcast_to((1 - mean) / std, sizes)
    board = np.indices(sizes)[-2:].sum(axis=0) % 2 if len(sizes) > 1 else np.arange(sizes[0] if sizes else 0) % 2
    return np.stack([low, high, np.where(board == 1, high, low)]).astype(np.float32)
