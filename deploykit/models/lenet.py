"""LeNet-5: for greyscale digits as it was in 1998, and as it is mostly written today, in grey and in colour."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from deploykit.recipe import PreprocessTable

PREPROCESS = PreprocessTable(resize=32, crop=32, fit="stretch", mean=(0.5,), std=(0.5,), channels="L", interpolation="bilinear")
PREPROCESS_RGB = PreprocessTable(
    resize=32, crop=32, fit="stretch", mean=(0.5,) * 3, std=(0.5,) * 3, channels="RGB", interpolation="bilinear"
)
# The paper's section II.B: -0.1 for the background and 1.175 for the ink, "the mean input roughly 0, and the variance roughly
# 1". Ink is bright here, as in MNIST and in the built-in digits.
PREPROCESS_1998 = PreprocessTable(
    resize=32, crop=32, fit="stretch", mean=(0.1 / 1.275,), std=(1 / 1.275,), channels="L", interpolation="bilinear"
)
# Table I of the paper: which maps of S2 each of the first 15 maps of C3 sees; the last one sees all six.
_SEES_THREE = ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5))
_SEES_FOUR = (
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
)


class LeNet5(nn.Module):
    """LeNet-5 with the layer sizes of LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).

    Input (N, channels, 32, 32), output (N, num_classes). As in most of today's descriptions, ReLU replaces the scaled
    tanh, max pooling the trainable subsampling, a linear layer the radial basis functions, and the second convolution
    sees all six maps (the paper's table 1 connects some): 61,706 parameters with one channel and ten classes, 62,006 in
    colour.
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


class LeNet5of1998(nn.Module):
    """LeNet-5 as in the paper: scaled tanh, average pooling with a gain and a bias for each map, C3 connected by table I.

    Input (N, 1, 32, 32), output (N, num_classes). The paper counts the trainable parameters: 156 in C1, 12 in S2, 1,516 in
    C3, 32 in S4, 48,120 in C5 and 10,164 in F6, 60,000 in all. Its last layer compares F6 with fixed bitmaps of the digits
    (radial basis functions, not trained); a linear layer stands here instead, 850 more with ten classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, kernel_size=5)
        self.s2 = _subsampling(6)
        self.c3 = SparseConvolution()
        self.s4 = _subsampling(16)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        x = squashed(self.s2(squashed(self.c1(x))))
        x = squashed(self.s4(squashed(self.c3(x))))
        x = squashed(self.f6(torch.flatten(squashed(self.c5(x)), 1)))
        logits: torch.Tensor = self.output(x)
        return logits


class SparseConvolution(nn.Module):
    """C3: 16 maps of 5x5 kernels, each of which sees three, four or all of the six maps of S2.

    Maps that see as many are one grouped convolution, over the maps of S2 in the order in which they are seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Conv2d(18, 6, kernel_size=5, groups=6)
        self.four = nn.Conv2d(36, 9, kernel_size=5, groups=9)
        self.six = nn.Conv2d(6, 1, kernel_size=5)
        self.register_buffer("seen_by_three", torch.tensor(_SEES_THREE).flatten(), persistent=False)
        self.register_buffer("seen_by_four", torch.tensor(_SEES_FOUR).flatten(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 6, H, W) to (N, 16, H - 4, W - 4)."""
        three, four = x[:, self.seen_by_three], x[:, self.seen_by_four]  # type: ignore[index]
        return torch.cat([self.three(three), self.four(four), self.six(x)], dim=1)


def squashed(x: torch.Tensor) -> torch.Tensor:
    """The paper's A tanh(S a) with A = 1.7159 and S = 2/3 (appendix A): f(1) = 1 and f(-1) = -1."""
    return 1.7159 * torch.tanh(x * (2 / 3))


def lenet5(num_classes: int = 10, channels: int = 1) -> LeNet5:
    """A LeNet-5 of today with random weights."""
    return LeNet5(num_classes, channels)


def lenet5_rgb(num_classes: int = 10) -> LeNet5:
    """The same for colour: the network of PyTorch's tutorial "Training a Classifier" has the same 62,006 parameters."""
    return LeNet5(num_classes, channels=3)


def lenet5_1998(num_classes: int = 10) -> LeNet5of1998:
    """LeNet-5 as of 1998 with random weights."""
    return LeNet5of1998(num_classes)


def _subsampling(maps: int) -> nn.Sequential:
    """The mean of 2x2 values, and for each map a gain and a bias: the paper adds the four, so its gain is a quarter of this."""
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(maps, maps, kernel_size=1, groups=maps))
