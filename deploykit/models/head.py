"""A new last layer, so that a trained network can learn other classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from deploykit.errors import ModelError
from deploykit.models.ensemble import heads

if TYPE_CHECKING:
    from deploykit.models import Model

_DISTILLED = "head_dist"


def with_classes(model: Model, classes: Sequence[str], *, seed: int) -> Model:
    """The network with one output for each of `classes`; its module is changed in place.

    The head stays when it already answers for these classes: their names are the same, or only their number is known
    and fits. Otherwise the last Linear or Conv2d that is as wide as the network's answer gets a new, seeded one in its place,
    and so does each of `last_layers` where there are several. Raises ModelError when there is no such layer.
    """
    if model.num_classes == len(classes) and model.classes in ((), tuple(classes)):
        return replace(model, classes=tuple(classes))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # An ensemble that averages logits has a head in each of its members.
        names = [name for below in heads(model.module) or ("",) for name in last_layers(model, below)]
        for name in names:
            _replace(model, name, len(classes))
    note = (
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} new: {len(classes)} classes instead of {model.num_classes}"
    )
    return replace(model, num_classes=len(classes), classes=tuple(classes), notes=(*model.notes, note))


def last_layer(model: Model, below: str = "") -> str:
    """The module path of the last Linear or Conv2d, `below` a module, that is as wide as the network's answer.

    Raises ModelError when none is.
    """
    found: list[str] = [
        name
        for name, part in model.module.named_modules()
        if name.startswith(f"{below}." if below else "")
        and (
            (isinstance(part, nn.Linear) and part.out_features == model.num_classes)
            or (isinstance(part, nn.Conv2d) and part.out_channels == model.num_classes)
        )
    ]
    if not found:
        raise ModelError(
            f"{model.name} has no last layer that can be told from the others",
            why=f"none of its Linear and Conv2d layers has {model.num_classes} outputs",
            fix="let it end in a layer with one output for each class: a factory that takes num_classes, or model.classes",
        )
    return found[-1]


def last_layers(model: Model, below: str = "") -> list[str]:
    """The module paths of the layers that answer: the last one, and in a distilled network of timm the one beside it.

    Such a network (DeiT, LeViT, EfficientFormer, RepViT) has a second head that learned from a teacher, which timm always
    calls head_dist, and its answer is the mean of both. Raises what `last_layer` raises.
    """
    last = last_layer(model, below)
    parts = last.split(".")
    if _DISTILLED not in parts:
        return [last]
    beside = ".".join("head" if part == _DISTILLED else part for part in parts)
    return [beside, last] if any(name == beside for name, _ in model.module.named_modules()) else [last]


def _replace(model: Model, name: str, classes: int) -> None:
    """Put a new layer in the place of one."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.module.get_submodule(parent), attribute, _like(model.module.get_submodule(name), classes))


def _like(old: nn.Module, classes: int) -> nn.Module:
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, bias=old.bias is not None)
    assert isinstance(old, nn.Conv2d)
    # The kernel is 1x1 in every published network of this kind (SqueezeNet); other shapes are kept as they are.
    shape = (old.kernel_size, old.stride, old.padding, old.dilation)
    return nn.Conv2d(old.in_channels, classes, *shape, groups=old.groups, bias=old.bias is not None)  # type: ignore[arg-type]
