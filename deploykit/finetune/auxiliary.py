"""Auxiliary heads: in training alone, GoogLeNet and Inception v3 also decide half-way, which brings gradients to early layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torchvision.models import GoogLeNet, Inception3
from torchvision.models.googlenet import InceptionAux as GoogLeNetAux
from torchvision.models.inception import InceptionAux

from deploykit.errors import UsageError
from deploykit.models import Model


@contextmanager
def attached(model: Model, *, wanted: bool, seed: int) -> Iterator[None]:
    """New, seeded auxiliary heads within the block where they are wanted; afterwards the network is as an engine needs it.

    Raises UsageError for a network that has none.
    """
    if not wanted:
        yield
        return
    module = model.module
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        heads = _heads(model)
    for name, head in heads.items():
        setattr(module, name, head)
    module.aux_logits = True  # type: ignore[assignment]
    try:
        yield
    finally:
        module.aux_logits = False  # type: ignore[assignment]
        for name in heads:
            setattr(module, name, None)


def _heads(model: Model) -> dict[str, nn.Module]:
    """By the name that torchvision gives them (torchvision/models/googlenet.py and inception.py), with its widths."""
    classes = model.num_classes
    if isinstance(model.module, GoogLeNet):
        return {"aux1": GoogLeNetAux(512, classes), "aux2": GoogLeNetAux(528, classes)}
    if isinstance(model.module, Inception3):
        return {"AuxLogits": InceptionAux(768, classes)}
    raise UsageError(
        f"{model.name} has no auxiliary heads", why="finetune.aux_loss is for googlenet and inception_v3", fix="leave it out"
    )


def parts_of(answer: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(the logits, those of the auxiliary heads) of what a network answers in training."""
    if isinstance(answer, torch.Tensor):
        return answer, ()
    return answer[0], tuple(part for part in answer[1:] if part is not None)
