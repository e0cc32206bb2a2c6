"""Answers about parts of a picture: which pixels and which boxes two networks decide alike.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Tensors, TensorSpec

Kind = Literal["pixels", "boxes"]
Aligned = Mapping[str, tuple[NDArray[np.floating], NDArray[np.floating]]]

BOXES, LABELS, SCORES, MASKS, KEYPOINTS = "boxes", "labels", "scores", "masks", "keypoints"
# Boxes with one label are the same where they overlap by half, as in PASCAL VOC (Everingham et al., IJCV 88, 2010, section 4.2).
MATCHED_IOU = 0.5
_SAME_PLACE = 0.01  # pixels
_MASK = 0.5  # torchvision's masks are probabilities, and a pixel is inside from one half on
_PADDING = -1  # the label of what is no box
_RANKS = {BOXES: 2, LABELS: 1, SCORES: 1}
_PIXELS = ("batch", "classes", "height", "width")


@dataclass(frozen=True)
class Picture:
    """One picture: how many pixels it has, or boxes that either side found, and how many of them both decide alike."""

    image: str
    parts: int
    same: int

    @property
    def share(self) -> float:
        """Of the parts, how many are decided alike; all of none."""
        return self.same / self.parts if self.parts else 1.0


@dataclass(frozen=True)
class Decided:
    """What two networks decided on the same pictures. `measures` are further numbers by name, None where nothing was measured."""

    unit: Literal["pixel", "box"]
    pictures: tuple[Picture, ...]
    measures: Mapping[str, float | None]

    @property
    def parts(self) -> int:
        """All pixels, or all boxes that either side found."""
        return sum(picture.parts for picture in self.pictures)

    @property
    def disagreements(self) -> int:
        """Pixels of another class, or boxes that only one side found."""
        return self.parts - sum(picture.same for picture in self.pictures)

    @property
    def agreement(self) -> float:
        """The share of the parts that are decided alike; 1 where there is none."""
        return 1 - self.disagreements / self.parts if self.parts else 1.0


class Tally(Protocol):
    """Two networks' answers, compared picture by picture, so that memory does not grow with their number."""

    def add(self, image: str, actual: Tensors, wanted: Tensors) -> Aligned:
        """Count one picture's two answers, which have no batch dimension; what belongs together in them, output by output."""

    def decided(self) -> Decided:
        """All that was counted."""


def kind_of(outputs: Sequence[TensorSpec]) -> Kind | None:
    """What outputs are about: boxes with labels and scores, or one class for each pixel; None for anything else.

    Boxes are those of one picture, (n, 4), (n,) and (n,): a detector whose answers have a batch dimension is something else.
    """
    ranks = {spec.name: len(spec.shape) for spec in outputs}
    if _RANKS.items() <= ranks.items():
        return "boxes"
    one_map = len(outputs) == 1 and len(outputs[0].shape) == len(_PIXELS)
    return "pixels" if one_map and outputs[0].shape[1] != 1 and outputs[0].dtype.startswith("float") else None


def tally(kind: Kind) -> Tally:
    """An empty tally."""
    return Pixels() if kind == "pixels" else Boxes()


class Pixels:
    """Maps of scores (classes, height, width): a pixel's class is the one with the highest score.

    `mean_iou` is that of the two segmentations, over classes that occur in either, as PASCAL VOC has it for a segmentation and
    its ground truth.
    """

    def __init__(self) -> None:
        self._pictures: list[Picture] = []
        self._both = self._either = np.zeros(0, np.int64)

    def add(self, image: str, actual: Tensors, wanted: Tensors) -> Aligned:
        """Count one picture. Raises ValueError for maps of different shapes."""
        ((name, mine),) = actual.items()
        (theirs,) = wanted.values()
        if mine.shape != theirs.shape:
            raise ValueError(f"maps of {mine.shape} and {theirs.shape}")
        classes, first, second = len(mine), mine.argmax(axis=0).reshape(-1), theirs.argmax(axis=0).reshape(-1)
        both = np.bincount(first[first == second], minlength=classes)
        either = np.bincount(first, minlength=classes) + np.bincount(second, minlength=classes) - both
        self._both, self._either = (both, either) if not self._pictures else (self._both + both, self._either + either)
        self._pictures.append(Picture(image, first.size, int(both.sum())))
        return {name: (mine, theirs)}

    def decided(self) -> Decided:
        """All pixels so far."""
        occur = self._either > 0
        mean_iou = float((self._both[occur] / self._either[occur]).mean()) if occur.any() else None
        return Decided("pixel", tuple(self._pictures), {"mean_iou": mean_iou})


class Boxes:
    """Boxes (n, 4) as x1, y1, x2, y2 with labels (n,) and scores (n,), with masks or keypoints or without.

    `mean_iou` and `least_iou` are of matched boxes, `score_difference` is the largest one between two of them. `mask_iou` is the
    mean over matched boxes of that of their masks; `keypoint_distance`, of the distance between their keypoints as a share of the
    square root of the box's area, the scale of COCO's keypoint similarity.
    """

    def __init__(self) -> None:
        self._pictures: list[Picture] = []
        self._ious: list[float] = []
        self._scores: list[float] = []
        self._masks: list[float] = []
        self._keypoints: list[float] = []

    def add(self, image: str, actual: Tensors, wanted: Tensors) -> Aligned:
        """Count one picture."""
        pairs = matched(actual, wanted)
        mine, theirs = pairs[:, 0], pairs[:, 1]
        either = len(actual[SCORES]) + len(wanted[SCORES]) - len(pairs)
        self._pictures.append(Picture(image, either, len(pairs)))
        aligned = {name: (actual[name][mine], wanted[name][theirs]) for name in wanted if name in actual and name != LABELS}
        ious = [float(overlaps(a[None], b[None])[0, 0]) for a, b in zip(*aligned[BOXES], strict=True)]
        self._ious += ious
        self._scores += np.abs(np.subtract(*aligned[SCORES], dtype=np.float64)).tolist()
        if MASKS in aligned:
            self._masks += [_mask_iou(a, b) for a, b in zip(*aligned[MASKS], strict=True)]
        if KEYPOINTS in aligned:
            self._keypoints += _distances(aligned[KEYPOINTS], aligned[BOXES][1])
        return aligned

    def decided(self) -> Decided:
        """All boxes so far."""
        measures = {
            "mean_iou": _mean(self._ious),
            "least_iou": min(self._ious, default=None),
            "score_difference": float(np.max(self._scores)) if self._scores else None,  # max() may pass NaN by
            "mask_iou": _mean(self._masks),
            "keypoint_distance": _mean(self._keypoints),
        }
        return Decided("box", tuple(self._pictures), measures)


def matched(actual: Tensors, wanted: Tensors) -> NDArray[np.int64]:
    """Which boxes of two answers to one picture are the same: (pairs, 2), the index in `actual` and the one in `wanted`.

    Each of `wanted`, the highest score first, takes the box with its label that overlaps it most and by at least half, of those
    that are still free.
    """
    shared = overlaps(actual[BOXES], wanted[BOXES])
    shared[actual[LABELS][:, None] != wanted[LABELS][None, :]] = 0
    pairs = []
    for index in np.argsort(-wanted[SCORES], kind="stable").tolist():
        if not len(shared):
            break
        best = int(shared[:, index].argmax())
        if shared[best, index] >= MATCHED_IOU:
            pairs.append((best, index))
            shared[best] = 0
    return np.array(pairs, np.int64).reshape(-1, 2)


def overlaps(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Intersection over union of all boxes (n, 4) with all boxes (m, 4): (n, m).

    Of boxes whose corners are at the same place, to a hundredth of a pixel, it is 1: clipped at the picture's edge they may have
    no area, or one that rounding alone decides.
    """
    a, b = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    inside = sides.prod(axis=-1)
    union = _area(a) + _area(b) - inside
    found: NDArray[np.float64] = np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)
    found[np.abs(a - b).max(axis=-1) <= _SAME_PLACE] = 1
    return found


def stacked(answers: Sequence[Tensors]) -> dict[str, NDArray[np.generic]]:
    """Several pictures' answers, each with as many boxes as it has, as arrays with the pictures in dimension 0.

    They are filled up with rows of zeros to the largest number of boxes; a label of -1 says which rows are no boxes.
    """
    most = max(len(answer[LABELS]) for answer in answers)
    return {
        name: np.stack([_filled(answer[name], most, _PADDING if name == LABELS else 0) for answer in answers])
        for name in answers[0]
    }


def unstacked(arrays: Tensors) -> list[dict[str, NDArray[np.generic]]]:
    """What `stacked` stacked."""
    return [
        {name: array[index][: int((labels != _PADDING).sum())] for name, array in arrays.items()}
        for index, labels in enumerate(arrays[LABELS])
    ]


def picture(answer: Tensors, kind: Kind, index: int = 0) -> dict[str, NDArray[np.generic]]:
    """One picture of what a session answered: maps have a batch dimension, boxes are of one picture."""
    return {name: cast(NDArray[np.generic], array[index] if kind == "pixels" else array) for name, array in answer.items()}


def _filled(rows: NDArray[np.generic], count: int, value: int) -> NDArray[np.generic]:
    return np.pad(rows, [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    area: NDArray[np.float64] = np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1)
    return area


def _mask_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """1 where both masks are empty."""
    mine, theirs = first >= _MASK, second >= _MASK
    either = int((mine | theirs).sum())
    return int((mine & theirs).sum()) / either if either else 1.0


def _distances(keypoints: tuple[NDArray[np.floating], NDArray[np.floating]], boxes: NDArray[np.floating]) -> list[float]:
    """The mean distance of the keypoints (n, k, x and y and more) of each box, as a share of the root of its area."""
    apart = np.hypot(*np.moveaxis(keypoints[0].astype(np.float64) - keypoints[1], -1, 0)[:2]).mean(axis=1)
    found: list[float] = (apart / np.sqrt(np.maximum(_area(boxes.astype(np.float64)), 1.0))).tolist()
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
