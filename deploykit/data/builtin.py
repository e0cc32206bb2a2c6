"""The built-in set: 1,797 real handwritten digits that come with scikit-learn, so a first run needs no download."""

from __future__ import annotations

from math import ceil

import numpy as np

from deploykit.data.images import Images
from deploykit.data.splits import Splits, stratified
from deploykit.errors import CapabilityError


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
    train, calibration, test = stratified(labels, _sizes, seed)
    return Splits(everything.take(train), everything.take(calibration), everything.take(test))


def _sizes(count: int) -> list[int]:
    """Of a class of so many: how many to train on and to calibrate on (a seventh); three tenths, rounded up, are the test."""
    calibration, test = round(count / 7), ceil(0.3 * count)
    return [count - calibration - test, calibration]
