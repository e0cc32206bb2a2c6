"""A network with the joints of a YOLO (split halves, stacked pools, upsampling, Concats, SiLU), its heads averaged to logits.

deploykit export benchmarks/yolo_like.py:build --arg width=32 --arg classes=80 --to tensorrt --weights none
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


def build(width: int = 32, classes: int = 80) -> nn.Module:
    """Three scales as in YOLOv5 and v8 (C2f blocks, SPPF, a path down and up again); `width` are the stem's channels."""
    return YoloLike(width, classes)


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inside: int, outside: int, size: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outside), nn.SiLU())


class Split(nn.Module):
    """C2f: half of the channels go through blocks, and all that was on the way is joined again."""

    def __init__(self, inside: int, outside: int, count: int, *, skips: bool) -> None:
        super().__init__()
        half = outside // 2
        self.first = Conv(inside, outside)
        self.blocks = nn.ModuleList(nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(count))
        self.last = Conv((2 + count) * half, outside)
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            made = block(parts[-1])
            parts.append(parts[-1] + made if self.skips else made)
        joined: torch.Tensor = self.last(torch.cat(parts, 1))
        return joined


class Pools(nn.Module):
    """SPPF: three pools behind one another, joined with what they began with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = Conv(channels, channels // 2), Conv(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        joined: torch.Tensor = self.last(torch.cat(parts, 1))
        return joined


class YoloLike(nn.Module):
    """Backbone, neck, and for each scale a head whose answers are averaged over all positions."""

    preprocess: ClassVar = {"resize": 256, "crop": 256, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        a, b, c, d = (width * factor for factor in (2, 4, 8, 16))
        self.stem = nn.Sequential(Conv(3, width, 3, 2), Conv(width, a, 3, 2), Split(a, a, 1, skips=True))
        self.small = nn.Sequential(Conv(a, b, 3, 2), Split(b, b, 2, skips=True))
        self.middle = nn.Sequential(Conv(b, c, 3, 2), Split(c, c, 2, skips=True))
        self.large = nn.Sequential(Conv(c, d, 3, 2), Split(d, d, 1, skips=True), Pools(d))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up_middle, self.up_small = Split(d + c, c, 1, skips=False), Split(c + b, b, 1, skips=False)
        self.down_small, self.down_middle = Conv(b, b, 3, 2), Conv(c, c, 3, 2)
        self.out_middle, self.out_large = Split(b + c, c, 1, skips=False), Split(c + d, d, 1, skips=False)
        self.heads = nn.ModuleList(nn.Sequential(Conv(channels, b, 3), nn.Conv2d(b, classes, 1)) for channels in (b, c, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.small(self.stem(x))
        middle = self.middle(small)
        large = self.large(middle)
        middle = self.up_middle(torch.cat([self.up(large), middle], 1))
        small = self.up_small(torch.cat([self.up(middle), small], 1))
        middle = self.out_middle(torch.cat([self.down_small(small), middle], 1))
        large = self.out_large(torch.cat([self.down_middle(middle), large], 1))
        answers = [head(found).flatten(2).mean(2) for head, found in zip(self.heads, (small, middle, large), strict=True)]
        return torch.stack(answers).sum(0)
