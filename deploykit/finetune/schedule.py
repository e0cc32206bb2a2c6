"""The optimizer, and the learning rate of every step as a share of its peak."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from deploykit.recipe import FinetuneTable


def optimizer_of(parameters: Iterable[nn.Parameter], settings: FinetuneTable, peak: float) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW, at the learning rate `peak`."""
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(parameters, lr=peak, momentum=momentum, weight_decay=settings.weight_decay, nesterov=momentum > 0)
    return torch.optim.AdamW(parameters, lr=peak, weight_decay=settings.weight_decay)


def share_of_peak(step: int, steps: int, settings: FinetuneTable) -> float:
    """What a step's learning rate is of its peak; `steps` are all steps of the phase.

    cosine: a linear rise in the share `warmup` of the steps, then half a cosine down to zero (Loshchilov and Hutter, "SGDR", ICLR
    2017, without restarts). one-cycle: half a cosine up from 1/25 and down to 1/250,000 (Smith and Topin, "Super-Convergence",
    2018, with PyTorch's constants). step: the rise, then a tenth of it after every third of what is left.
    """
    rise = max(1, round(steps * settings.warmup))
    done = min(1.0, (step - rise) / max(1, steps - rise))
    if settings.schedule == "one-cycle":
        return _between(1 / 25, 1.0, step / rise) if step < rise else _between(1.0, 1 / 250_000, done)
    if step < rise:
        return (step + 1) / rise
    if settings.schedule == "step":
        return float(0.1 ** min(2, math.floor(3 * done)))
    return 0.5 * (1 + math.cos(math.pi * done))


def _between(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
