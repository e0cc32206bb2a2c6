"""torchvision's segmenters, detectors and networks for clips, with their published weights and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import models

from deploykit.errors import ModelError
from deploykit.models.architecture import Architecture
from deploykit.models.state_dict import StateDict
from deploykit.models.tasks import Task
from deploykit.models.torchvision import default_weights, is_published
from deploykit.recipe import ModelTable, PreprocessTable

# The convolutional ones; the others, mvit and swin3d, are transformers.
_CLIPS = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d")
_FRAMES = 16  # what the three ResNets were trained on; s3d takes 14 or more
_AUXILIARY = "aux_classifier."
# Shorter side in pixels that a detector's own code resizes to, where it is not 800.
_SIDES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320, "fasterrcnn_mobilenet_v3_large_320_fpn": 320}
_SIDE = 800
# These stretch a picture to their size; the others keep its aspect ratio.
_STRETCHING = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
# Their published weights belong to a frozen BatchNorm whose eps was 0 (torchvision's `overwrite_eps`, vision#2933).
_WITHOUT_EPS = ("fasterrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
# What their auxiliary heads read; LR-ASPP has none.
_AUXILIARY_CHANNELS = {
    **dict.fromkeys(("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"), 1024),
    "deeplabv3_mobilenet_v3_large": 40,
}
_SEGMENTED = 21  # classes of PASCAL VOC, the background among them
# Weights and biases of the backbone's BatchNorm, which is frozen where torchvision counts, and so has none.
_FROZEN = {
    **dict.fromkeys((*_WITHOUT_EPS, "fcos_resnet50_fpn"), 53_120),
    **dict.fromkeys(("fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"), 24_400),
}


def names() -> list[str]:
    """All segmenters and detectors of the installed torchvision, and its convolutional networks for clips, sorted."""
    return sorted(_tasks())


def task_of(name: str) -> Task:
    """The task of one of `names()`."""
    return _tasks()[name]


def architecture(model: ModelTable, asked: PreprocessTable) -> Architecture:
    """The network `model.name`, which is one of `names()`.

    A detector's own resizing is set to the input that it gets (`asked.crop`, else its published shorter side), so that it changes
    nothing: the engine takes one size. Its BatchNorm is an ordinary one, which is folded, and its statistics are its own where
    the weights are random.

    Raises ModelError for another `asked.crop` than the one size of a network that resizes to it inside the graph.
    """
    task = task_of(model.name)
    if model.name in _STRETCHING and asked.crop not in (None, _SIDES[model.name]):
        raise ModelError(
            f"{model.name} has one input size",
            why=f"preprocess.crop is {asked.crop}, and it resizes every input to {_SIDES[model.name]} inside the graph",
            fix=f"leave preprocess.crop out, or set it to {_SIDES[model.name]}",
        )
    published = models.get_model_weights(model.name).DEFAULT
    is_own = model.weights == "default" or is_published(Path(model.weights), published)
    side = asked.crop or _SIDES.get(model.name, _SIDE)

    def build(classes: int | None) -> nn.Module:
        chosen = _options(model.name, task, side) | ({} if classes is None else {"num_classes": classes})
        module: nn.Module = models.get_model(model.name, weights=None, **chosen)
        if is_own and model.name in _WITHOUT_EPS:
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eps = 0.0
        return module

    return Architecture(
        name=model.name,
        build=build,
        preprocess=preprocess(model.name),
        default_weights=lambda: default_weights(published),
        adapt=_adapt,
        classes=tuple(published.meta["categories"]),
        takes_data_classes=False,
        notes=_notes(model, task, is_own=is_own),
        task=task,
    )


def preprocess(name: str) -> PreprocessTable:
    """How a picture becomes the input: of one size, where torchvision would let each picture have its own."""
    task, published = task_of(name), models.get_model_weights(name).DEFAULT
    if task == "detect":  # normalises in its own code
        side, fit = _SIDES.get(name, _SIDE), "stretch" if name in _STRETCHING else "crop"
        return _table(side, side, (0.0,) * 3, (1.0,) * 3, fit=fit)
    preset = published.transforms()
    if task == "segment":
        return _table(preset.resize_size[0], preset.resize_size[0], preset.mean, preset.std)
    return _table(min(preset.resize_size), preset.crop_size[0], preset.mean, preset.std, frames=_FRAMES)


def facts(name: str) -> tuple[int, tuple[int, ...], str, float]:
    """Parameters as deployed, input shape, default weights and 10^9 multiply-accumulates, from torchvision's tables.

    The multiply-accumulates are those of torchvision's own input, which is larger for some detectors' and the same for others.
    """
    published = models.get_model_weights(name).DEFAULT
    table = preprocess(name)
    assert table.crop is not None
    frames = () if table.frames is None else (table.frames,)
    shape = (3, *frames, table.crop, table.crop)
    parameters = published.meta["num_params"] - _auxiliary(name) + _FROZEN.get(name, 0)
    return parameters, shape, str(published), published.meta["_ops"]


def _tasks() -> Mapping[str, Task]:
    found: dict[str, Task] = dict.fromkeys(models.list_models(module=models.segmentation), "segment")
    return found | dict.fromkeys(models.list_models(module=models.detection), "detect") | dict.fromkeys(_CLIPS, "clips")


def _options(name: str, task: Task, side: int) -> dict[str, Any]:
    if task == "clips":
        return {}
    resizing = {} if task != "detect" or name in _STRETCHING else {"min_size": side, "max_size": side}
    return {"weights_backbone": None, **resizing}


def _notes(model: ModelTable, task: Task, *, is_own: bool) -> tuple[str, ...]:
    notes: list[str] = []
    if task == "segment" and not model.name.startswith("lraspp"):
        notes.append("the auxiliary head is left out: it helps in training only")
    if task == "clips":
        notes.append(f"each picture becomes a clip of {_FRAMES} frames, over which the crop moves across it")
    if model.name in _WITHOUT_EPS and not is_own and model.weights != "none":
        notes.append(
            "BatchNorm's eps is 1e-5, as torchvision has it for weights that are not its own; it is 0 in its own, and in "
            "networks fine-tuned from those by torchvision's code"
        )
    return tuple(notes)


def _adapt(state_dict: StateDict) -> StateDict:
    tensors = {key: value for key, value in state_dict.items() if not key.startswith(_AUXILIARY)}
    return StateDict(tensors, state_dict.versions)


def _auxiliary(name: str) -> int:
    """Parameters of the auxiliary head, a 3x3 convolution, BatchNorm and a 1x1 one, which torchvision's number counts."""
    channels = _AUXILIARY_CHANNELS.get(name)
    if channels is None:
        return 0
    inner = channels // 4
    return 9 * channels * inner + 2 * inner + (inner + 1) * _SEGMENTED


def _table(
    resize: int, crop: int, mean: tuple[float, ...], std: tuple[float, ...], *, fit: Any = "crop", frames: int | None = None
) -> PreprocessTable:
    return PreprocessTable(
        resize=resize,
        crop=crop,
        fit=fit,
        mean=tuple(mean),
        std=tuple(std),
        channels="RGB",
        interpolation="bilinear",
        frames=frames,
    )
