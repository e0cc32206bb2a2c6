"""A small Inception-ResNet for pictures of 32x32 pixels: residual blocks whose branch is an inception."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from deploykit.recipe import PreprocessTable

# Mean and std of CIFAR-10's training images, as they are commonly given.
PREPROCESS = PreprocessTable(
    crop=32,
    fit="crop",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    channels="RGB",
    interpolation="bilinear",
)
_WIDTHS = (32, 64, 128)
_BLOCKS = 2
_SCALE = 0.2


class Block(nn.Module):
    """Inception-ResNet-A: branches of 1x1, of 3x3 and of two 3x3, joined, brought to the input's width, scaled and added.

    Each branch has a quarter of the block's maps. The scale is within the paper's 0.1 to 0.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = width // 4
        self.one = Convolution(width, narrow, 1)
        self.three = nn.Sequential(Convolution(width, narrow, 1), Convolution(narrow, narrow, 3))
        self.five = nn.Sequential(Convolution(width, narrow, 1), Convolution(narrow, narrow, 3), Convolution(narrow, narrow, 3))
        self.join = nn.Conv2d(3 * narrow, width, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H, W) to the same shape."""
        joined = self.join(torch.cat([self.one(x), self.three(x), self.five(x)], dim=1))
        return F.relu(x + _SCALE * joined)


class Reduction(nn.Module):
    """Reduction: a 3x3 convolution of stride 2 beside max pooling, joined; half the side, twice the maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = Convolution(width, width, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, H, W) to (N, 2 width, H / 2, W / 2)."""
        return torch.cat([self.convolution(x), self.pool(x)], dim=1)


class Convolution(nn.Module):
    """A convolution that keeps the size (or divides it by the stride), BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return F.relu(self.bn(self.conv(x)))


class InceptionResNet(nn.Module):
    """Input (N, 3, 32, 32), output (N, num_classes): a stem, and three stages of two blocks with 32, 64 and 128 maps.

    The blocks are those of Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
    Learning" (2016), figures 7, 10 and 20, with BatchNorm after the convolutions and not after the sums. The paper has no
    network of this size: depth and widths are those of the residual networks for CIFAR (He et al. 2015, section 4.2), doubled.
    187,370 parameters with ten classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [Convolution(3, _WIDTHS[0], 3)]
        for width in _WIDTHS:
            layers += [Block(width) for _ in range(_BLOCKS)]
            layers += [Reduction(width)] * (width != _WIDTHS[-1])
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_WIDTHS[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        logits: torch.Tensor = self.fc(torch.flatten(self.pool(self.features(x)), 1))
        return logits


def inception_resnet_small(num_classes: int = 10) -> InceptionResNet:
    """A small Inception-ResNet with random weights."""
    return InceptionResNet(num_classes)
