"""The built-in set: 1,797 real handwritten digits that come with scikit-learn, so a first run needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from deploykit.data.images import Images
from deploykit.errors import CapabilityError


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of one set."""

    train: Images
    calibration: Images
    test: Images


def digits(seed: int) -> Splits:
    """Greyscale pictures of 8 x 8 pixels in ten classes: 996 to train, 257 to calibrate, 544 to test.

    Every class is split in the same proportions; the seed chooses which picture goes where. Source: E. Alpaydin and
    C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998 (CC BY 4.0).

    Raises CapabilityError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CapabilityError(
            "the built-in digits come with scikit-learn, which is not installed", fix="pip install 'deploykit[demo]'"
        ) from error
    pictures, labels = load_digits().images, load_digits().target.astype(np.int64)
    pixels = np.rint(pictures * (255 / 16)).astype(np.uint8)  # counts of inked pixels in blocks of 4 x 4: 0..16
    everything = Images(
        names=tuple(f"digits/{index:04d}" for index in range(len(pixels))),
        labels=labels,
        classes=tuple("0123456789"),
        skipped=(),
        origin="digits",
        sources=tuple(pixels),
    )
    train, calibration, test = _stratified(labels, seed)
    return Splits(everything.take(train), everything.take(calibration), everything.take(test))


def _stratified(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], ...]:
    """Indices for training, calibration (a seventh) and test (three tenths, rounded up), each in ascending order."""
    random = np.random.RandomState(seed)  # numpy promises never to change its stream (NEP 19)
    parts: tuple[list[NDArray[np.int64]], ...] = ([], [], [])
    for label in np.unique(labels):
        shuffled = random.permutation(np.flatnonzero(labels == label))
        test, calibration = ceil(0.3 * len(shuffled)), round(len(shuffled) / 7)
        edges = [len(shuffled) - test - calibration, len(shuffled) - test]
        for part, chosen in zip(parts, np.split(shuffled, edges), strict=True):
            part.append(chosen)
    return tuple(np.sort(np.concatenate(part)) for part in parts)
