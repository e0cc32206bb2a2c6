"""Calibration images that cannot be right: what is refused, and what the user should know.

Ranges are as good as the images they come from, and a wrong preprocessing gives a file that quantizes without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Preprocess
from deploykit.data.pictures import normalised
from deploykit.errors import DataError

FEW = 32
# An image's deviation, as a share of the whole set's: about one grey level of 255. Single photographs had 0.4 to 1.6.
_FLAT = 0.02
# How far images differ from one another, as a share of all there is to see in them: two photographs had 0.8, a hundred
# 1.0; what is left for copies is noise.
_ALIKE = 0.1
# What mean and deviation of a channel may be. Sets of photographs had means of -0.5 to 0.2 and deviations of 0.8 to 1.3,
# or 0.5 where a network wants inputs from -1 to 1. Values that were not normalised had deviations of 0.27, values from
# 0 to 255 had 65, values that were normalised twice 5.4 and means of -2.
_MEAN, _DEVIATION = 1.5, (0.35, 2.5)
_NAMED, _GRID = 5, 8


@dataclass
class Inputs:
    """What passes on its way into the network: for each image a few numbers, whatever its size.

    `names` are the images' names in order; without them images are called by number, the first is 0.
    `how` says where the images are pixels that the graph itself normalises; they are judged as the network sees them.
    """

    names: Sequence[str] | None = None
    how: Preprocess | None = None
    means: list[NDArray[np.float64]] = field(default_factory=list)
    deviations: list[NDArray[np.float64]] = field(default_factory=list)
    coarse: list[NDArray[np.float64]] = field(default_factory=list)

    def passing(self, batches: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """The same batches (N, C, H, W), looked at one by one; after one that is refused, the others are only looked at.

        Raises DataError at the end, naming all images that hold NaN or infinite values.
        """
        bad: list[str] = []
        done = 0
        for batch in batches:
            seen = batch if self.how is None else normalised(batch, self.how)
            finite = np.isfinite(seen).all(axis=tuple(range(1, seen.ndim)))
            bad += [self._name(done + int(index)) for index in np.flatnonzero(~finite)]
            done += len(batch)
            if not bad:
                self._add(seen)
                yield batch
        if bad:
            raise DataError(
                f"{len(bad)} of {done} calibration images hold NaN or infinite values",
                problems=[*bad[:_NAMED], *([f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else [])],
                why="they come out of the preprocessing so",
                fix="check the images, and preprocess.mean and preprocess.std",
            )

    def warnings(self) -> list[str]:
        """What is doubtful about the images that passed, each with names and values; none of it is refused."""
        return [*self._few(), *self._flat(), *self._alike(), *self._far()] if self.means else []

    def _add(self, batch: NDArray[np.float32]) -> None:
        self.means += list(batch.mean(axis=(2, 3), dtype=np.float64))
        self.deviations += list(batch.std(axis=(2, 3), dtype=np.float64))
        self.coarse += list(_coarse(batch))

    def _few(self) -> Iterator[str]:
        if len(self.means) < FEW:
            yield f"only {len(self.means)} calibration images; ranges are more reliable from {FEW} on"

    def _flat(self) -> Iterator[str]:
        _, whole = self._mean_and_deviation()
        flat = [index for index, deviation in enumerate(self.deviations) if (deviation <= _FLAT * whole).all()]
        if flat:
            named = [f"{self._name(index)} ({_numbers(self.means[index])})" for index in flat[:_NAMED]]
            more = f" and {len(flat) - _NAMED} more" if len(flat) > _NAMED else ""
            yield f"{len(flat)} of {len(self.means)} calibration images show one colour (as input): {', '.join(named)}{more}"

    def _alike(self) -> Iterator[str]:
        seen = np.stack(self.coarse)
        between, everything = np.sqrt(seen.var(axis=0).mean()), np.sqrt(seen.var(axis=(0, 2, 3)).mean())
        if len(seen) > 1 and between <= _ALIKE * everything:
            share = 100 * between / everything if everything else 0.0
            first, last = self._name(0), self._name(len(seen) - 1)
            yield (
                f"the {len(seen)} calibration images, {first} to {last}, are nearly alike: they differ by {share:.1f} % of what "
                "is to be seen in them, so ranges fit that one scene"
            )

    def _far(self) -> Iterator[str]:
        mean, deviation = self._mean_and_deviation()
        smallest, largest = _DEVIATION
        if (np.abs(mean) > _MEAN).any() or (deviation < smallest).any() or (deviation > largest).any():
            yield (
                f"the network's inputs have mean {_numbers(mean)} and deviation {_numbers(deviation)} by channel; one that was "
                "trained on normalised images expects about 0 and 1: check preprocess.mean and preprocess.std"
            )

    def _mean_and_deviation(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each channel (C,) over all images, which are all of one size."""
        means, deviations = np.stack(self.means), np.stack(self.deviations)
        mean = means.mean(axis=0)
        return mean, np.sqrt((deviations**2 + (means - mean) ** 2).mean(axis=0))

    def _name(self, index: int) -> str:
        return f"image {index}" if self.names is None else self.names[index]


def _coarse(batch: NDArray[np.float32]) -> NDArray[np.float64]:
    """Means over a grid of at most 8 x 8 fields; what does not fill a field at the right and lower edge is left out."""
    images, channels, height, width = batch.shape
    rows, columns = min(_GRID, height), min(_GRID, width)
    tall, wide = height // rows, width // columns
    fields = batch[:, :, : rows * tall, : columns * wide].reshape(images, channels, rows, tall, columns, wide)
    return np.asarray(fields.mean(axis=(3, 5), dtype=np.float64))


def _numbers(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
