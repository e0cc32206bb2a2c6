"""How far two sets of answers are apart beyond one number: where the differences lie, who agrees with whom, class by class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import parity
from deploykit.artifact import Precision
from deploykit.parity import FLOAT_LIMIT, LEAST_SQNR_DB, Comparison, TensorErrors

_DECADES = tuple(range(-9, 1))
_TOP = 5
_ORDER = (Precision.FP32, Precision.TF32, Precision.FP16, Precision.BF16)


@dataclass(frozen=True)
class Limit:
    """How far answers may be apart; `relative` is of max|d| / max|A|, `sqnr_db` of the noise. Either is enough.

    `rule` says it in words, `source` where the number comes from.
    """

    relative: float
    sqnr_db: float | None
    rule: str
    source: str

    def holds(self, errors: TensorErrors) -> bool:
        """Whether answers are as near as they have to be; never for NaN or infinite ones."""
        return errors.relative <= self.relative or (self.sqnr_db is not None and errors.sqnr_db >= self.sqnr_db)


def limit_for(first: Precision, second: Precision, *, tolerance: float | None, quantization_db: float | None) -> Limit:
    """The limit of two precisions, unless `tolerance` says max|d| / max|A| itself: that of the less precise one.

    Float against float: `parity.FLOAT_LIMIT`, as another order of additions makes 1e-6 to 1e-5 on deep FP32 networks, and as
    the rounding steps of FP16 and BF16 are. INT8 against float has no limit of the field: networks that decide alike are 9 to
    43 dB from FP32 (docs/decisions.md, "how far an INT8 engine may be from its own graph"), so only noise of half the signal
    fails here, and decisions are for gate rules. INT8 against INT8 may not be further apart than their quantization is from FP32,
    `quantization_db`, where golden samples say what that is.
    """
    if tolerance is not None:
        return Limit(tolerance, None, f"max|d| / max|A| <= {tolerance:g}", "asked for")
    if Precision.INT8 not in (first, second):
        worse = max(first, second, key=_ORDER.index)
        relative = FLOAT_LIMIT[worse]
        return Limit(relative, None, f"max|d| / max|A| <= {relative:g}", f"the rounding of {worse.value} in a deep network")
    floor, source = LEAST_SQNR_DB, "noise of half the signal's amplitude; what INT8 costs in decisions is for --gate"
    if first is second and quantization_db is not None and quantization_db > floor:
        floor, source = quantization_db, "that of the quantization on golden samples"
    return Limit(FLOAT_LIMIT[Precision.FP32], floor, f"SQNR >= {floor:.1f} dB", source)


def histogram(actual: NDArray[np.floating], wanted: NDArray[np.floating]) -> list[dict[str, Any]]:
    """Counts of |d| / max|wanted| by decades: `below` is the upper end, 0 for what is equal, None for what is 1 or more."""
    difference = np.abs(actual.astype(np.float64) - wanted)
    largest = np.abs(wanted[np.isfinite(wanted)].astype(np.float64)).max(initial=0)
    difference = difference[np.isfinite(difference)] / (largest or 1.0)
    edges = [0.0, *(10.0**decade for decade in _DECADES)]
    places = np.searchsorted(edges, difference[difference > 0], side="right")
    counts = np.bincount(places, minlength=len(edges) + 1).tolist()
    names: list[float | None] = [*edges[1:], None]
    return [{"below": 0.0, "count": int((difference == 0).sum())}] + [
        {"below": name, "count": count} for name, count in zip(names, counts[1:], strict=True)
    ]


def decisions(
    comparison: Comparison,
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    labels: NDArray[np.int64] | None,
    name: Callable[[int], str],
) -> dict[str, Any]:
    """Agreement and accuracy of logits (images, classes) as JSON values, in all and class by class.

    Top-5 agreement is the share of images whose first five classes are the same set. None where there are too few classes, or
    no labels.
    """
    tops = [_top(logits) for logits in (first, second)] if first.shape[1] > _TOP else None
    top5 = None
    if tops is not None and labels is not None:
        top5 = {side: float((top == labels[:, None]).any(axis=1).mean()) for side, top in zip(("a", "b"), tops, strict=True)}
    accuracy = None
    if comparison.accuracy is not None:
        found = asdict(comparison.accuracy)
        accuracy = {"a": found.pop("reference"), "b": found.pop("engine"), **found, "images": comparison.images, "top5": top5}
    return {
        "images": comparison.images,
        "agreement": comparison.agreement,
        "top5_agreement": None if tops is None else float((np.sort(tops[0]) == np.sort(tops[1])).all(axis=1).mean()),
        "disagreement_count": len(comparison.flips),
        "disagreements": [
            {
                "image": flip.image,
                "label": None if flip.label is None else name(flip.label),
                "a": name(flip.reference),
                "b": name(flip.engine),
                "a_margin": flip.reference_margin if np.isfinite(flip.reference_margin) else None,
            }
            for flip in comparison.flips
        ],
        "accuracy": accuracy,
        "classes": _by_class(first.argmax(axis=1), second.argmax(axis=1), labels, name),
    }


def errors_as_json(errors: TensorErrors) -> dict[str, float | None]:
    """JSON has no infinity: the SQNR of identical tensors becomes null."""
    values = {**asdict(errors)}
    return {key: float(value) if np.isfinite(value) else None for key, value in values.items()}


def tensor_errors(actual: NDArray[np.floating], wanted: NDArray[np.floating]) -> tuple[TensorErrors, float | None]:
    """`parity.tensor_errors`, and the mean of |d| / |wanted| where `wanted` is not 0; None when nothing is finite there."""
    usable = np.isfinite(actual) & np.isfinite(wanted) & (wanted != 0)
    shares = np.abs(actual[usable].astype(np.float64) - wanted[usable]) / np.abs(wanted[usable].astype(np.float64))
    return parity.tensor_errors(actual, wanted), float(shares.mean()) if shares.size else None


def _by_class(
    first: NDArray[np.int64], second: NDArray[np.int64], labels: NDArray[np.int64] | None, name: Callable[[int], str]
) -> list[dict[str, Any]]:
    """One row for each class that occurs: the label's where there are labels, else A's choice."""
    of = first if labels is None else labels
    rows = []
    for index in np.unique(of).tolist():
        here = of == index
        rows.append(
            {
                "class": name(index),
                "images": int(here.sum()),
                "disagreement_count": int((first != second)[here].sum()),
                "a": None if labels is None else float((first == index)[here].mean()),
                "b": None if labels is None else float((second == index)[here].mean()),
            }
        )
    return rows


def _top(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.argsort(-logits, axis=1, kind="stable")[:, :_TOP]
