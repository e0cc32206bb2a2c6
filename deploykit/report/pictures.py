"""Pictures for the report, with what both networks decided on them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from deploykit.data import Images
from deploykit.models import Model
from deploykit.parity import Logits

Namer: TypeAlias = Callable[[int], str]

_PICTURES, _PICTURED_FLIPS, _THUMBNAIL = 24, 72, 72


def chosen(images: Images, reference: Logits, answers: Sequence[Logits], name: Namer) -> list[dict[str, Any]]:
    """Some pictures with both decisions: first those on which an INT8 answer differs, then the first of the others.

    The decision shown is that of the first INT8 answer that differs, or else agrees; `confidence` is its softmax.
    """
    theirs = reference.argmax(axis=1)
    differing = {int(index): logits for logits in reversed(answers) for index in np.flatnonzero(logits.argmax(axis=1) != theirs)}
    usual = answers[0] if answers else reference
    others = [index for index in range(len(images)) if index not in differing]
    shown = sorted(differing)[:_PICTURED_FLIPS] + others[: max(0, _PICTURES - len(differing))]
    pictures = []
    for index in shown:
        row = differing.get(index, usual)[index]
        odds = np.exp(row - row.max())
        pictures.append(
            {
                "png": base64.b64encode(images.thumbnail(index, side=_THUMBNAIL)).decode(),
                "name": images.names[index],
                "label": None if images.labels is None else name(int(images.labels[index])),
                "reference": name(int(theirs[index])),
                "engine": name(int(row.argmax())),
                "confidence": float(odds.max() / odds.sum()),
            }
        )
    return pictures


def class_namer(model: Model, images: Images) -> Namer:
    """The network's names for its classes, else those of the labelled folders, else numbers."""
    names = model.classes or (images.classes if images.labels is not None else ())
    return lambda index: names[index] if index < len(names) else f"class {index}"
