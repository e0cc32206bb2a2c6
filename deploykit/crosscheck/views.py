"""Two sides whose answers are about pixels or boxes, compared picture by picture: such answers are too large to keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import parity, runtimes, scenes, viewing
from deploykit.artifact import Precision, Tensors
from deploykit.crosscheck import measures, nonfinite
from deploykit.crosscheck.pairing import Pairs, fed
from deploykit.crosscheck.sides import Side
from deploykit.errors import UsageError, printable
from deploykit.gate import GateResult, Rule, Verdict, judge_parts
from deploykit.runtimes import Session

Inputs = Sequence[NDArray[np.floating]]


@dataclass
class Views:
    """What both sides said so far of the pictures that they were shown."""

    sides: tuple[Side, Side]
    sessions: tuple[Session, Session]
    pairs: Pairs
    kind: scenes.Kind
    tally: scenes.Tally
    running: parity.Running = field(default_factory=parity.Running)
    outputs: dict[str, _Output] = field(default_factory=dict)
    broken: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    blamed: list[str] = field(default_factory=lambda: ["", ""])

    def look(self, name: str, picture: Inputs, seconds: dict[str, float]) -> None:
        """Let both answer one picture, an array of one row for each input, and count."""
        first, second = (self._answer(which, name, picture, seconds) for which in (0, 1))
        try:
            aligned = self.tally.add(name, second, first)
        except ValueError as error:
            raise UsageError("the answers have different shapes", why=str(error)) from error
        self.running.add(aligned)
        for output, (actual, wanted) in aligned.items():
            self.outputs.setdefault(output, _Output(wanted.shape[1:])).add(actual, wanted)

    def _answer(self, which: int, name: str, picture: Inputs, seconds: dict[str, float]) -> Tensors:
        """What one side says, by the names that the outputs have on side A."""
        side = self.sides[which]
        tensors = fed(side, self.pairs, [runtimes.padded(array, side.batch) for array in picture])
        before = perf_counter()
        answered = runtimes.run(self.sessions[which], tensors)
        seconds[side.label.lower()] += perf_counter() - before
        found = scenes.picture({pair[0]: np.asarray(answered[pair[which]]) for pair in self.pairs.outputs}, self.kind)
        if not all(np.isfinite(values).all() for values in found.values()):
            if not self.broken[which]:
                self.blamed[which] = nonfinite.blame(side, self.pairs, picture)
            self.broken[which].append(name)
        return found

    @property
    def not_finite(self) -> str:
        """Which answers are no numbers, in words; empty when all are."""
        told = [
            nonfinite.told(side, range(len(names)), names, where)
            for side, names, where in zip(self.sides, self.broken, self.blamed, strict=True)
            if names
        ]
        return "; ".join(told)


@dataclass
class _Output:
    """What is counted of one output beside `parity.Running`: how differences are spread, and their mean share of A."""

    shape: tuple[int, ...]
    counts: Counter[float | None] = field(default_factory=Counter)
    shares: float = 0.0
    usable: int = 0
    identical: bool = True

    def add(self, actual: NDArray[np.floating], wanted: NDArray[np.floating]) -> None:
        """Count one picture's, in which the largest answer is that of the picture."""
        for row in measures.histogram(actual, wanted):
            self.counts[row["below"]] += row["count"]
        nonzero = np.isfinite(actual) & np.isfinite(wanted) & (wanted != 0)
        self.shares += float(np.abs((actual[nonzero].astype(np.float64) - wanted[nonzero]) / wanted[nonzero]).sum())
        self.usable += int(nonzero.sum())
        self.identical = self.identical and bool(np.array_equal(actual, wanted))


def kind_of(sides: Sequence[Side]) -> scenes.Kind | None:
    """What both sides are about, where both are about pixels or both about boxes."""
    kinds = {scenes.kind_of(side.outputs) for side in sides}
    return kinds.pop() if len(kinds) == 1 else None


def refuse_meaningless(kind: scenes.Kind, *, labelled: bool, stressed: bool) -> None:
    """Raise UsageError for what is asked and does not exist for pixels or boxes."""
    problems = [f"--labelled: sub-folders say nothing about {kind}"] * labelled
    problems += ["--stress: a detector takes one picture, and how many boxes it finds is its own affair"] * (
        stressed and kind == "boxes"
    )
    if problems:
        raise UsageError("this cannot be compared", problems=problems)


def outputs(views: Views, limit: measures.Limit) -> list[dict[str, Any]]:
    """Each pair of outputs as JSON values; of boxes, those that belong together."""
    errors = views.running.errors()
    names = {pair[0]: pair for pair in views.pairs.outputs}
    return [
        {
            "names": [printable(each) for each in names[name]],
            "shape": ["boxes" if views.kind == "boxes" else "batch", *counted.shape],
            **measures.errors_as_json(errors[name]),
            "mean_relative": counted.shares / counted.usable if counted.usable else None,
            "identical": counted.identical,
            "holds": limit.holds(errors[name]),
            "histogram": [{"below": below, "count": count} for below, count in counted.counts.items()],
        }
        for name, counted in views.outputs.items()
    ]


def decisions(views: Views) -> dict[str, Any]:
    """What both decided, as JSON values."""
    found = viewing.as_json(views.tally.decided())
    rows = [{"image": one["image"], "label": None, "a": one["reference"], "b": one["engine"]} for one in found["disagreements"]]
    return {**found, "images": len(views.tally.decided().pictures), "disagreements": rows}


def gates(views: Views, rules: Sequence[Rule]) -> list[GateResult]:
    """`rules`, and of two float detectors, that they find the same boxes; of any two, that there are boxes to compare."""
    decided = views.tally.decided()
    found = [judge_parts(rule, viewing.plural(decided.unit), viewing.counts(decided)) for rule in rules]
    if views.kind == "boxes" and not decided.parts:
        reason = "neither side found boxes, so nothing was compared"
        found.insert(0, GateResult("B finds the boxes of A", Verdict.CANNOT_TELL, None, None, reason))
    elif views.kind == "boxes" and Precision.INT8 not in {side.precision for side in views.sides}:
        verdict = Verdict.FAIL if decided.disagreements else Verdict.PASS
        reason = f"{decided.disagreements} of {decided.parts} boxes are found by one of them alone"
        found.insert(0, GateResult("B finds the boxes of A", verdict, decided.disagreements, None, reason))
    return found
