"""Network in Network for pictures of 32x32 pixels: convolutions of 1x1, and global average pooling for a head."""

from __future__ import annotations

import torch
from torch import nn

from deploykit.recipe import PreprocessTable

# The paper whitens its pictures; mean and std of CIFAR-10's training images, as they are commonly given, stand here instead.
PREPROCESS = PreprocessTable(
    crop=32,
    fit="crop",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    channels="RGB",
    interpolation="bilinear",
)


class NetworkInNetwork(nn.Module):
    """The CIFAR-10 network of Lin et al., "Network In Network" (2013), with the widths of the authors' Caffe definition.

    Input (N, 3, 32, 32), output (N, num_classes): three blocks of one convolution and two of 1x1, which see 32, 16 and 8
    pixels a side, dropout after the first two, and the mean of the last maps as logits. 966,986 parameters with ten classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        # Caffe's pools round up (32 to 16 to 8) and do not count what is outside.
        self.block1 = _block(3, 192, 160, 96, kernel_size=5)
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.block2 = _block(96, 192, 192, 192, kernel_size=5)
        self.pool2 = nn.AvgPool2d(3, stride=2, ceil_mode=True, count_include_pad=False)
        self.block3 = _block(192, 192, 192, num_classes, kernel_size=3)
        self.dropout = nn.Dropout()
        self.pool3 = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        x = self.dropout(self.pool1(self.block1(x)))
        x = self.dropout(self.pool2(self.block2(x)))
        return torch.flatten(self.pool3(self.block3(x)), 1)


def network_in_network(num_classes: int = 10) -> NetworkInNetwork:
    """A Network in Network with random weights."""
    return NetworkInNetwork(num_classes)


def _block(inputs: int, *widths: int, kernel_size: int) -> nn.Sequential:
    """The paper's mlpconv: a convolution that keeps the size, then 1x1 ones; each is followed by ReLU, the last one too."""
    layers: list[nn.Module] = []
    for index, (inside, outside) in enumerate(zip((inputs, *widths), widths, strict=False)):
        size = kernel_size if index == 0 else 1
        layers += [nn.Conv2d(inside, outside, size, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*layers)
