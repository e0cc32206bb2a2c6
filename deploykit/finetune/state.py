"""What a killed training goes on from: everything of the last finished epoch, in one file that is replaced as a whole."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deploykit import publish

FILE = "last.pt"


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images; accuracies are shares, losses are mean cross-entropy in nats."""

    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    train_accuracy: float | None = None
    """In training, so with augmentation and dropout, and while the weights changed; None where labels are mixed."""

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return (self.val_accuracy, -self.val_loss)


@dataclass
class State:
    """A training after `len(history)` epochs: the weights, the best ones so far, and what the optimizer remembers.

    Of weights, those alone that may have changed: a head on a large frozen backbone is written in no time.

    `started` has the first epoch of each phase that was begun; `steps` counts those of the last one.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    best: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    average: Mapping[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    started: list[int] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)


def save(state: State, folder: Path, key: str) -> None:
    """Write it into `folder` under `key`, which says what is trained on what and how; the old one stands until then."""
    content = {**vars(state), "history": [asdict(epoch) for epoch in state.history], "key": key}
    file = io.BytesIO()
    torch.save(content, file)
    folder.mkdir(exist_ok=True)
    publish.write_file(folder / FILE, file.getvalue())


def load(folder: Path, key: str) -> State | None:
    """What `save` wrote under this key; None when there is none, it is of another training, or it is damaged."""
    try:
        content = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        if content.pop("key") != key:
            return None
        return State(**{**content, "history": [Epoch(**epoch) for epoch in content["history"]]})
    except Exception:  # a file that cannot be read, of whatever kind, is a training that begins anew
        return None
