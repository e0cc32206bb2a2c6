"""What a network answers, by its task, and modules that give the dictionaries and lists of torchvision as plain tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from deploykit.errors import ModelError

if TYPE_CHECKING:
    from deploykit.models import Model

Task = Literal["classify", "segment", "detect", "clips"]
TASKS: tuple[Task, ...] = ("classify", "segment", "detect", "clips")
# Tasks whose answers are about parts of a picture and not about all of it.
SCENES: tuple[Task, ...] = ("segment", "detect")
LOGITS, SCORES = ("logits",), ("scores",)
_BOXES = ("boxes", "labels", "scores")
_MORE = ("masks", "keypoints", "keypoints_scores")
_MAP = "out"  # what torchvision calls the map that is not the auxiliary head's
_ABSENT = "none of its own"
# The standard deviation that random class scores are brought to, over all anchors: the highest of 91 classes then has a
# probability of about 0.2, and no two boxes have scores that rounding could exchange.
_SPREAD = 2.0
_SAMPLES, _SAMPLES_BYTES, _MOST_BOXES = 16, 64 << 20, 100
_CLASS_LAYERS = ("cls_score", "cls_logits", "classification_head.module_list")
# Where Faster R-CNN and its kin, RetinaNet and FCOS, and SSD keep the number of their classes.
_COUNTS = (
    "roi_heads.box_predictor.cls_score.out_features",
    "head.classification_head.num_classes",
    "head.classification_head.num_columns",
)


class Segmenter(nn.Module):
    """A segmenter that answers (N, C, H, W) with its scores (N, classes, H, W) alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The scores of a batch of pictures."""
        found = self.network(image)
        return cast(torch.Tensor, found[_MAP] if isinstance(found, dict) else found)


class Detector(nn.Module):
    """A detector of torchvision's kind that takes one picture (1, C, H, W) and answers with a list of tensors, by `outputs`.

    Such a detector takes a list of pictures and answers with a list of dictionaries; scripted, it answers with its losses first.
    """

    def __init__(self, network: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.outputs = list(outputs)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """What is found on one picture."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            found = self.network([image[0]])[1][0]
        else:
            found = self.network([image[0]])[0]
        return [found[name] for name in self.outputs]


def task_of(module: nn.Module, known: Task | None, *, name: str) -> Task:
    """The task that the architecture has, else the one that a user's network says in its attribute `task`.

    Raises ModelError when that is none.
    """
    said: object = getattr(module, "task", _ABSENT) if known is None else known
    if said in TASKS:
        return said
    if isinstance(said, str) and said != _ABSENT:
        raise ModelError(f"the attribute `task` of {name} is {said!r}", fix=f"known are {', '.join(TASKS)}")
    return "classify"


def answering(module: nn.Module, task: Task, *, shape: Sequence[int], name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The network as a module that answers with tensors, and what these are called.

    Which of masks and keypoints a detector gives shows in its answer to one black picture of `shape` (C, H, W).
    Raises ModelError when it does not answer as detectors do.
    """
    if task == "segment":
        return Segmenter(module).eval(), SCORES
    if task != "detect":
        return module, LOGITS
    with torch.no_grad():
        found = module([torch.zeros(*shape)])
    answer = found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else None
    if not isinstance(answer, dict) or not set(_BOXES) <= answer.keys():
        raise ModelError(
            f"{name} is not a detector that deploykit can take",
            why="it did not answer a list of one picture with a list of one dictionary of boxes, labels and scores",
            fix="let it take and answer what torchvision's detectors do",
        )
    outputs = (*_BOXES, *(key for key in _MORE if key in answer))
    if hasattr(module, "_has_warned"):  # or a compiled one tells its user about the losses that it answers with
        module._has_warned = True  # type: ignore[assignment]
    return Detector(module, outputs).eval(), outputs


def network_of(module: nn.Module) -> nn.Module:
    """The network itself, where a module of ours makes its answer plain tensors."""
    return module.network if isinstance(module, (Segmenter, Detector)) else module


def count_classes(detector: Detector) -> int:
    """How many classes a detector of torchvision's kind has, its background among them; 0 where it does not say."""
    for where in _COUNTS:
        with contextlib.suppress(AttributeError):
            return int(attrgetter(where)(detector.network))
    return 0


def noise_pictures(model: Model, asked: int | None) -> int:
    """How many pictures of noise stand in for a data set. What is no classifier gets its BatchNorm from them, so there have to be
    more than of golden samples."""
    return asked or (_quickly_answered(model) if model.task == "classify" else _SAMPLES)


def golden_samples(model: Model, asked: int | None) -> int:
    """How many golden samples a network has: what was `asked`, or else as many as are quickly answered. In either case no more
    than answers fit a file of reasonable size: a map of scores, or a mask for each of a hundred boxes, is large."""
    height, width = model.preprocess.crop
    if model.task == "segment":
        of_one = model.num_classes * height * width
    else:
        of_one = _MOST_BOXES * height * width if "masks" in model.outputs else 1
    return max(1, min(asked or _quickly_answered(model), _SAMPLES_BYTES // (of_one * torch.float32.itemsize)))


def _quickly_answered(model: Model) -> int:
    """As many pictures as have no more pixels together than 16 of 224 x 224, at least 2: PyTorch and ONNX Runtime's literal graph
    compute each golden sample."""
    height, width = model.preprocess.crop
    return min(_SAMPLES, max(2, _SAMPLES * 224 * 224 // (height * width * (model.preprocess.frames or 1))))


def many(module: nn.Module, images: torch.Tensor) -> None:
    """Run a network on a batch for the sake of what its layers see; a deployed detector itself takes one picture."""
    if isinstance(module, Detector):
        module.network(list(images))
    else:
        module(images)


def spread_scores(detector: Detector, images: torch.Tensor) -> None:
    """Scale the layers that score classes, so that a detector with random weights finds boxes; changes `detector`.

    Initialised to be unsure, it has nearly the same low score for every anchor: nothing passes the threshold, or only what
    rounding decides. Each such layer's weights are multiplied so that its scores have one standard deviation over `images`
    (N, C, H, W); the layer that proposes regions comes before those that read its proposals.
    """
    for layer in _class_layers(detector):
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _module, _inputs, output, into=seen: into.append(output.reshape(-1)))
        try:
            with torch.no_grad():
                many(detector, images)
        finally:
            hook.remove()
        deviation = float(torch.cat(seen).std()) if seen else 0.0
        if deviation > 0:
            with torch.no_grad():
                layer.weight.mul_(_SPREAD / deviation)


def _class_layers(detector: Detector) -> Iterable[nn.Conv2d | nn.Linear]:
    """The last layers in front of class scores: a head that is a sequence ends with its own."""
    return [
        part
        for name, part in detector.network.named_modules()
        if isinstance(part, (nn.Conv2d, nn.Linear)) and any(mark in name for mark in _CLASS_LAYERS) and _is_last(detector, name)
    ]


def _is_last(detector: Detector, name: str) -> bool:
    """Whether no layer with weights follows in the same sequence."""
    parent = detector.network.get_submodule(name.rpartition(".")[0])
    if not isinstance(parent, nn.Sequential):
        return True
    return list(parent)[-1] is detector.network.get_submodule(name)
