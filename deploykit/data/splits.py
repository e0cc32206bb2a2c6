"""Parts of one labelled set, each class shared out in the same proportions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.data.images import Images

_HELD_OUT = 10  # one of so many images of each class


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of one set."""

    train: Images
    calibration: Images
    test: Images


def stratified(labels: NDArray[np.int64], sizes: Callable[[int], Sequence[int]], seed: int) -> list[NDArray[np.int64]]:
    """Indices of disjoint parts that are everything together, each in ascending order; the seed says what goes where.

    `sizes` says how many of a class of so many go into each part but the last, which gets the rest.
    """
    random = np.random.RandomState(seed)  # numpy promises never to change its stream (NEP 19)
    shares = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        shares.append(np.split(members, np.cumsum(sizes(len(members)))))
    return [np.sort(np.concatenate(part)) for part in zip(*shares, strict=True)]


def to_train_and_to_hold_out(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on, and a tenth of each class, at least one, to choose the best epoch by; each in ascending order."""
    held_out, rest = stratified(labels, lambda count: [max(1, count // _HELD_OUT)], seed)
    return rest, held_out
