"""LeNet-5, the small network for greyscale digits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from deploykit.recipe import PreprocessTable

PREPROCESS = PreprocessTable(resize=32, crop=32, fit="stretch", mean=(0.5,), std=(0.5,), channels="L", interpolation="bilinear")


class LeNet5(nn.Module):
    """LeNet-5 with the layer sizes of LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).

    Input (N, channels, 32, 32), output (N, num_classes). As in most of today's descriptions, ReLU replaces the scaled
    tanh, max pooling the trainable subsampling, a linear layer the radial basis functions, and the second convolution
    sees all six maps (the paper's table 1 connects some): 61,706 parameters with one channel and ten classes.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.conv3 = nn.Conv2d(16, 120, kernel_size=5)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: torch.Tensor = self.fc2(x)
        return logits


def lenet5(num_classes: int = 10, channels: int = 1) -> LeNet5:
    """A LeNet-5 with random weights."""
    return LeNet5(num_classes, channels)
