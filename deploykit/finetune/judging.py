"""How good a network is on held-out images: loss, accuracy, which classes it takes for which, and pictures of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from deploykit.data import Images
from deploykit.finetune.processes import ALONE, Processes
from deploykit.models import Model

BATCH = 64
_SHOWN = 12  # pictures that were decided right, and as many that were not


@dataclass(frozen=True)
class Verdict:
    """What a network decides on held-out images. `confusion[i][j]` counts those of class i that were taken for j.

    `examples` are some pictures for people: the most certain of the wrong decisions, and right ones spread over the set.
    """

    confusion: list[list[int]]
    examples: list[dict[str, Any]]


def evaluate(model: Model, images: Images, processes: Processes = ALONE) -> tuple[float, float]:
    """Mean cross-entropy (nats) and top-1 accuracy (share) on labelled images; each process computes its share."""
    mine = images if processes.count == 1 else images.take(processes.share(np.arange(len(images))))
    return judged(processes.together(logits(model, mine)), images)


def logits(model: Model, images: Images) -> torch.Tensor:
    """(N, classes) on the CPU, from a network on any device."""
    device = next(model.module.parameters()).device
    model.module.eval()
    with torch.inference_mode():
        batches = images.batches(model.preprocess, BATCH)
        found = [model.module(torch.from_numpy(batch).to(device)).float().cpu() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, model.num_classes)


def judged(answers: torch.Tensor, images: Images) -> tuple[float, float]:
    """Loss and accuracy of logits (N, classes) of these images."""
    assert images.labels is not None
    # torch.from_numpy wants a writable array; labels are read-only.
    labels = torch.from_numpy(np.array(images.labels))
    return float(F.cross_entropy(answers, labels)), float((answers.argmax(1) == labels).float().mean())


def verdict(model: Model, images: Images) -> Verdict:
    """All decisions of the network, counted, and some of them with their pictures."""
    assert images.labels is not None
    classes, labels = model.num_classes, images.labels
    answers = logits(model, images)
    certain, decided = (found.numpy() for found in answers.softmax(1).max(1))
    counts = np.bincount(labels * classes + decided, minlength=classes * classes)
    wrong = np.flatnonzero(decided != labels)
    right = np.flatnonzero(decided == labels)
    chosen = [*wrong[np.argsort(-certain[wrong], kind="stable")][:_SHOWN], *_spread(right)]
    examples = [
        {"index": int(index), "label": int(labels[index]), "decided": int(decided[index]), "probability": float(certain[index])}
        for index in chosen
    ]
    return Verdict(counts.reshape(classes, classes).tolist(), examples)


def _spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """A few of them, from all over the set: classes lie together in a folder."""
    return indices[np.linspace(0, len(indices) - 1, min(_SHOWN, len(indices))).astype(int)] if len(indices) else indices
