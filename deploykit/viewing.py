"""Several networks shown the same pictures, one at a time, where answers are about pixels or boxes and too large to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import parity, runtimes, scenes
from deploykit.artifact import Artifact, Tensors
from deploykit.data import Images
from deploykit.export.boxes import torch_answer
from deploykit.models import Model
from deploykit.parity import TensorErrors
from deploykit.progress import Progress
from deploykit.runtimes import Session

_LISTED = 100


@dataclass(frozen=True)
class Viewer:
    """What is compared with PyTorch: a session for `artifact`, and what it said so far."""

    artifact: Artifact
    session: Session
    tally: scenes.Tally
    running: parity.Running = field(default_factory=parity.Running)
    not_finite: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, artifact: Artifact, session: Session) -> Viewer:
        """One that has seen nothing yet."""
        kind = scenes.kind_of(artifact.outputs)
        assert kind is not None
        return cls(artifact, session, scenes.tally(kind))

    def look(self, name: str, fed: NDArray[Any], wanted: Tensors) -> None:
        """Answer one picture, as the artifact is fed it, and count."""
        kind = scenes.kind_of(self.artifact.outputs)
        assert kind is not None
        spec = self.artifact.inputs[0]
        answer = runtimes.run(self.session, {spec.name: runtimes.padded(fed[None], spec.shape[0])})
        mine = scenes.picture(answer, kind)
        if not all(np.isfinite(values).all() for values in mine.values()):
            self.not_finite.append(name)
        self.running.add(self.tally.add(name, mine, wanted))

    @property
    def errors(self) -> TensorErrors:
        """Those of the output that is furthest from PyTorch's."""
        found = self.running.errors()
        return max(found.values(), key=lambda each: each.relative)


def show(model: Model, images: Images, viewers: Sequence[Viewer], progress: Progress) -> bool:
    """Let PyTorch and all `viewers` answer every picture. Whether PyTorch decides anything on them: a class that changes,
    or a box."""
    decides = False
    first: NDArray[np.int64] | None = None
    for index, name in enumerate(images.names):
        wanted = torch_answer(model, images.array(index, model.preprocess))
        for viewer in viewers:
            viewer.look(name, images.array(index, viewer.artifact.preprocess), wanted)
        if model.task == "detect":
            decides = decides or bool(len(wanted[scenes.SCORES]))
        else:
            classes = wanted[model.outputs[0]].argmax(axis=0)
            first = classes if first is None else first
            decides = decides or bool((classes != first.flat[0]).any())
        progress("parity", index + 1, len(images))
    return decides


def as_json(decided: scenes.Decided) -> dict[str, Any]:
    """What was decided, as the plain values that a comparison has: `unit`, `parts` and `measures` are there for these alone."""
    unit = plural(decided.unit)
    differing = sorted((one for one in decided.pictures if one.same < one.parts), key=lambda one: one.share)
    return {
        "unit": decided.unit,
        "units": unit,
        "parts": decided.parts,
        "measures": {**decided.measures},
        "agreement": decided.agreement,
        "disagreement_count": decided.disagreements,
        "disagreements": [
            {
                "image": one.image,
                "label": None,
                "reference": f"{one.parts:,} {unit}",
                "engine": f"{one.same:,} of them",
                "reference_margin": None,
            }
            for one in differing[:_LISTED]
        ],
        "accuracy": None,
    }


def plural(unit: str) -> str:
    """Of pixel and box."""
    return {"pixel": "pixels", "box": "boxes"}[unit]


def counts(decided: scenes.Decided) -> list[tuple[int, int]]:
    """(parts, those decided alike) of each picture, as a gate wants them."""
    return [(one.parts, one.same) for one in decided.pictures]


def golden_answers(session: Session, artifact: Artifact, inputs: NDArray[Any]) -> Iterator[Tensors]:
    """What a detector's session finds on each golden sample."""
    for sample in inputs:
        yield runtimes.run(session, {artifact.inputs[0].name: sample[None]})
