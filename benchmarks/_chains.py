"""Two networks of which one does 8 % more of the same work: 25 and 27 equal convolutions in a row."""

from __future__ import annotations

import torch
from torch import nn


class Chain(nn.Module):
    """`length` convolutions of 32 channels and one layer of logits."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 1), *(nn.Conv2d(32, 32, 3, padding=1) for _ in range(length)))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x).mean(dim=(2, 3)))
        return logits


def quick() -> nn.Module:
    return Chain(25)


def slow() -> nn.Module:
    return Chain(27)
