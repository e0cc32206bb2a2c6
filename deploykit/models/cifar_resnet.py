"""The residual networks for CIFAR-10 of the original paper: 20, 32, 44, 56 and 110 layers.

He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2: three stages of n blocks with 16, 32 and
64 channels on maps of 32, 16 and 8 pixels, 6n + 2 layers, parameter-free shortcuts (option A). Parameter names are
those of the widely used port by Y. Idelbayev (github.com/akamaster/pytorch_resnet_cifar10), so its files load as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from deploykit.recipe import PreprocessTable

# No resizing: the data set's pictures have the input's size. Mean and std are ImageNet's, as the published weights had.
PREPROCESS = PreprocessTable(
    crop=32, fit="crop", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels="RGB", interpolation="bilinear"
)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """Option A: every `stride`-th pixel, and zeros for the new channels, half of them on each side."""
        if self.stride == 1 and self.added == 0:
            return x
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class CifarResNet(nn.Module):
    """Input (N, 3, 32, 32), output (N, num_classes); `blocks` is the paper's n."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(torch.flatten(self.pool(x), 1))
        return logits


def cifar_resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """The network of `depth` layers with random weights. Raises ValueError when depth is not 6n + 2."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
    return CifarResNet(blocks, num_classes)


def _stage(blocks: int, inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))
