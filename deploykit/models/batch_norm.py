"""Statistics for the batch normalisation of networks that were never trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploykit.errors import DataError
from deploykit.models import tasks


def calibrate(module: nn.Module, batches: Iterable[NDArray[np.float32]]) -> None:
    """Set every BatchNorm's statistics to the average over `batches`, each (N, C, H, W), and leave `module` in eval mode.

    Only BatchNorm is in train mode meanwhile, so dropout stays off. Each batch has the same weight (PyTorch's
    momentum=None). A batch of a single image joins its neighbour, because BatchNorm over a 1x1 map needs two values.

    Raises DataError when there are fewer than two images.
    """
    module.eval()
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        with torch.no_grad():
            images = sum(_observe(module, batch) for batch in _no_single_images(batches))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        module.eval()
    if images == 0:
        raise DataError("no images to calibrate BatchNorm with", fix="give at least two images")


def _observe(module: nn.Module, batch: NDArray[np.float32]) -> int:
    if len(batch) == 1:
        raise DataError("a single image cannot calibrate BatchNorm", why="it has no variance", fix="give at least two images")
    tasks.many(module, torch.tensor(batch))
    return len(batch)


def _no_single_images(batches: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The same images in the same order; a batch of one is joined with a neighbour, empty ones are left out."""
    held: NDArray[np.float32] | None = None
    for batch in batches:
        if len(batch) == 0:
            continue
        if held is None:
            held = batch
        elif len(held) == 1 or len(batch) == 1:
            held = np.concatenate([held, batch])
        else:
            yield held
            held = batch
    if held is not None:
        yield held
