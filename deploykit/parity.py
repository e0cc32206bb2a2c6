"""Session, Samples -> how far answers are apart, in numbers and in decisions.

Two errors are kept apart. *Conversion error* is an engine against its own graph with every optimisation off, where Q/DQ
is executed literally: it says whether the runtime is faithful. *Quantization error* is against the FP32 PyTorch
module: it says what INT8 costs.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Precision, Samples, Tensors
from deploykit.errors import UsageError
from deploykit.gate import PairedCounts, Verdict, paired_difference_interval

Logits = NDArray[np.float32]

# Conversion error of a float engine as max|d| / max|y|: another order of additions makes 1e-6 to 1e-5 on deep networks.
LEAST_SQNR_DB = 6.0  # noise of half the signal's amplitude
FLOAT_LIMIT = {Precision.FP32: 1e-4, Precision.FP16: 1e-2, Precision.BF16: 1e-1}


@dataclass(frozen=True)
class TensorErrors:
    """Differences of two tensors of one shape; `relative` is max|d| / max|wanted|, `sqnr_db` is infinite when equal."""

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
    """Top-1 accuracy of both on the same labelled images; drop and its 95 % interval in percentage points."""

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
    """Compare two sets of logits (images, classes) for the same images.

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


def tensor_errors(actual: NDArray[np.floating], wanted: NDArray[np.floating]) -> TensorErrors:
    """Errors of `actual`; every one of them is NaN or infinite when a value of `actual` is, so that limits fail."""
    a, w = actual.astype(np.float64), wanted.astype(np.float64)
    difference = np.abs(a - w)
    if not (np.isfinite(a).all() and np.isfinite(w).all()):
        return TensorErrors(math.inf, math.inf, math.inf, math.nan, -math.inf)
    scale, noise, signal = float(np.abs(w).max()), float((difference**2).sum()), float((w**2).sum())
    norms = math.sqrt(float((a**2).sum()) * signal)
    return TensorErrors(
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=float(difference.max()) / scale if scale > 0 else (0.0 if noise == 0 else math.inf),
        cosine=float((a * w).sum()) / norms if norms > 0 else (1.0 if noise == 0 else 0.0),
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf,
    )
