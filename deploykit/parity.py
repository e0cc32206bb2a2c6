"""Session, Samples -> how far answers are apart, in numbers and in decisions.

Two errors are kept apart. *Conversion error* is an engine against its own graph with every optimisation off, where Q/DQ
is executed literally: it says whether the runtime is faithful. *Quantization error* is against the FP32 PyTorch
module: it says what INT8 costs.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit import scenes
from deploykit.artifact import Precision, Samples, Tensors
from deploykit.errors import UsageError
from deploykit.gate import PairedCounts, Verdict, paired_difference_interval

Logits = NDArray[np.float32]

# Conversion error of a float engine as max|d| / max|y|: another order of additions makes 1e-6 to 1e-5 on deep networks.
LEAST_SQNR_DB = 6.0  # noise of half the signal's amplitude
# TF32 rounds what is multiplied as FP16 does, to ten bits.
FLOAT_LIMIT = {Precision.FP32: 1e-4, Precision.TF32: 1e-2, Precision.FP16: 1e-2, Precision.BF16: 1e-1}


@dataclass(frozen=True)
class TensorErrors:
    """Differences of two tensors of one shape, in the tensors' own unit; `relative` is max|d| / max|wanted|.

    `sqnr_db` is the wanted tensor's power over that of the difference, in dB; infinite when they are equal. `cosine` is 1 when
    one is a multiple of the other.
    """

    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    sqnr_db: float


@dataclass(frozen=True)
class Flip:
    """One image on which the engine decided otherwise: class indices, and the reference's lead over the engine's choice."""

    image: str
    label: int | None
    reference: int
    engine: int
    reference_margin: float


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of both on the same labelled images, 0 to 1; drop and its 95 % interval in percentage points."""

    reference: float
    engine: float
    drop_points: float
    interval_points: tuple[float, float]


@dataclass(frozen=True)
class Conversion:
    """The engine against its own graph on golden samples; `rule` says in words what `verdict` judges."""

    errors: TensorErrors
    images: int
    rule: str
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """An engine against FP32 PyTorch on the same images."""

    images: int
    errors: TensorErrors
    flips: tuple[Flip, ...]
    accuracy: Accuracy | None
    counts: PairedCounts

    @property
    def agreement(self) -> float:
        """The share of images with the same top-1 class."""
        return 1 - len(self.flips) / self.images


def conversion(actual: Tensors, samples: Samples, precision: Precision) -> Conversion:
    """Judge `actual`, the engine's answers to the golden samples, against what the graph means.

    A float engine has to be equal but for rounding. An INT8 kernel rounds the product of all scales once where the
    literal graph rounds float sums, so values land one step apart and a deep network carries that on; how far is a
    property of the network. The yardstick is the quantization itself: the engine may not be further from its graph than
    the graph is from FP32 PyTorch (as noise power over all golden samples).
    """
    name, wanted = next(iter(samples.expected.items()))
    errors = tensor_errors(actual[name], wanted)
    images = len(wanted)
    if precision is not Precision.INT8:
        limit = FLOAT_LIMIT[precision]
        passed = errors.relative <= limit  # infinite when a value is not a number
        return Conversion(errors, images, f"max|d| / max|y| <= {limit:g}", Verdict.PASS if passed else Verdict.FAIL)
    # Where quantization left nothing of the network, its noise is no yardstick; the engine must still follow the graph.
    floor = max(tensor_errors(wanted, samples.reference[name]).sqnr_db, LEAST_SQNR_DB)
    passed = errors.sqnr_db >= floor or errors.relative <= FLOAT_LIMIT[Precision.FP32]
    return Conversion(
        errors, images, f"SQNR >= {floor:.1f} dB, that of the quantization", Verdict.PASS if passed else Verdict.FAIL
    )


def compare(engine: Logits, reference: Logits, names: Sequence[str], labels: NDArray[np.int64] | None) -> Comparison:
    """Compare two sets of logits (images, classes) for the same images, which are called `names`; `labels` are class indices.

    Raises UsageError when they do not have the same shape or there is no image.
    """
    if engine.shape != reference.shape or not len(engine):
        raise UsageError(f"nothing to compare: logits of shape {engine.shape} and {reference.shape}")
    mine, theirs = engine.argmax(axis=1), reference.argmax(axis=1)
    flips = tuple(
        Flip(
            image=names[index],
            label=None if labels is None else int(labels[index]),
            reference=int(theirs[index]),
            engine=int(mine[index]),
            reference_margin=float(reference[index, theirs[index]] - reference[index, mine[index]]),
        )
        for index in np.flatnonzero(mine != theirs).tolist()
    )
    images = len(engine)
    if labels is None:
        return Comparison(images, tensor_errors(engine, reference), flips, None, PairedCounts(images, len(flips)))
    right, reference_right = mine == labels, theirs == labels
    lost, gained = int((reference_right & ~right).sum()), int((right & ~reference_right).sum())
    low, high = paired_difference_interval(lost, gained, images)
    accuracy = Accuracy(
        reference=float(reference_right.mean()),
        engine=float(right.mean()),
        drop_points=100 * (lost - gained) / images,
        interval_points=(100 * low, 100 * high),
    )
    counts = PairedCounts(images, len(flips), lost, gained)
    return Comparison(images, tensor_errors(engine, reference), flips, accuracy, counts)


def conversion_of_boxes(actual: Sequence[Tensors], samples: Samples, precision: Precision) -> Conversion:
    """Judge what a detector's engine finds on the golden samples against what its graph means.

    A float engine has to find every box, with numbers equal but for rounding; an INT8 one may differ from its graph in no
    larger a share of the boxes than the graph differs from FP32 PyTorch.
    """
    wanted = scenes.unstacked(samples.expected)
    found, errors = compared_boxes(actual, wanted)
    worst = max(errors.values(), key=lambda each: each.relative)
    if precision is not Precision.INT8:
        limit = FLOAT_LIMIT[precision]
        passed = not found.disagreements and worst.relative <= limit
        rule = f"every box, max|d| / max|y| <= {limit:g}"
    else:
        allowed = compared_boxes(wanted, scenes.unstacked(samples.reference))[0].agreement
        passed = found.agreement >= allowed
        rule = f"{100 * allowed:.1f} % of the boxes, that of the quantization"
    return Conversion(worst, len(wanted), rule, Verdict.PASS if passed else Verdict.FAIL)


def compared_boxes(actual: Sequence[Tensors], wanted: Sequence[Tensors]) -> tuple[scenes.Decided, dict[str, TensorErrors]]:
    """What two detectors decided on the same pictures, and the errors of each output over the boxes that belong together."""
    tally, running = scenes.Boxes(), Running()
    for index, (mine, theirs) in enumerate(zip(actual, wanted, strict=True)):
        running.add(tally.add(f"sample {index}", mine, theirs))
    return tally.decided(), running.errors()


class Running:
    """`tensor_errors` of outputs that come picture by picture, by their names; memory does not grow with their number."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._most: dict[str, NDArray[np.float64]] = {}

    def add(self, aligned: Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]]) -> None:
        """Count one picture's outputs, each as two arrays of one shape: what is judged, and what is wanted."""
        for name, (actual, wanted) in aligned.items():
            a, w = actual.astype(np.float64), wanted.astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by the sums
                apart = np.abs(a - w)
                sums = np.array([a.size, apart.sum(), (apart**2).sum(), (w**2).sum(), (a**2).sum(), (a * w).sum()])
            most = np.array([apart.max(initial=0), np.abs(w).max(initial=0)])
            self._sums[name] = self._sums.get(name, 0) + sums
            self._most[name] = np.maximum(self._most.get(name, 0), most)

    def errors(self) -> dict[str, TensorErrors]:
        """The errors of each output; 0 where there was nothing to compare."""
        return {name: _errors_of(self._sums[name], self._most[name]) for name in self._sums}


def _errors_of(sums: NDArray[np.float64], most: NDArray[np.float64]) -> TensorErrors:
    count, absolute, noise, signal, power, product = sums.tolist()
    largest, scale = most.tolist()
    if not np.isfinite(sums).all():
        return TensorErrors(math.inf, math.inf, math.inf, math.nan, -math.inf)
    norms = math.sqrt(power * signal)
    return TensorErrors(
        max_abs=largest,
        mean_abs=absolute / count if count else 0.0,
        relative=largest / scale if scale > 0 else (0.0 if noise == 0 else math.inf),
        cosine=product / norms if norms > 0 else (1.0 if noise == 0 else 0.0),
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf,
    )


def tensor_errors(actual: NDArray[np.floating], wanted: NDArray[np.floating]) -> TensorErrors:
    """Errors of `actual`; every one of them is NaN or infinite when a value of `actual` is, so that limits fail."""
    running = Running()
    running.add({"": (actual, wanted)})
    return running.errors()[""]
