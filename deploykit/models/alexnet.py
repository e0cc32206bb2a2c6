"""AlexNet as its paper has it, in one piece: torchvision's `alexnet` is a later, slimmer one without normalisation."""

from __future__ import annotations

import torch
from torch import nn

from deploykit.recipe import PreprocessTable

# The paper subtracts the mean picture and does not scale; mean and std are those that ImageNet networks are trained with today.
# 227 and not its 224, with which the first convolution would not come out at the 55x55 that the paper counts with.
PREPROCESS = PreprocessTable(
    resize=256,
    crop=227,
    fit="crop",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    channels="RGB",
    interpolation="bilinear",
)


class AlexNet(nn.Module):
    """AlexNet of Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks" (2012), section 3.5.

    Input (N, 3, 227, 227), output (N, num_classes). Local response normalisation follows the first two convolutions,
    overlapping pooling (3 every 2) the normalisations and the fifth convolution, dropout is before the first two linear layers.

    The paper's two GPUs each had half of the maps, and convolutions 2, 4 and 5 saw those of their own GPU only: `groups` = 2,
    60,965,224 parameters with 1,000 classes. In one piece, `groups` = 1, there are 62,378,344.
    """

    def __init__(self, num_classes: int = 1000, groups: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 96, kernel_size=11, stride=4), nn.ReLU(), normalisation(), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(96, 256, 5, padding=2, groups=groups), nn.ReLU(), normalisation(), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 384, 3, padding=1, groups=groups), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1, groups=groups), nn.ReLU(), nn.MaxPool2d(3, stride=2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        logits: torch.Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def normalisation() -> nn.LocalResponseNorm:
    """Section 3.3: a / (2 + 1e-4 * the sum of the squares of five neighbouring maps) ^ 0.75.

    PyTorch takes the mean of the squares, hence five times the paper's alpha.
    """
    return nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0)


def alexnet_2012(num_classes: int = 1000, groups: int = 1) -> AlexNet:
    """An AlexNet with random weights; `groups` is 1, or 2 as on the paper's two GPUs. Raises ValueError for other numbers."""
    if groups not in (1, 2):
        raise ValueError(f"AlexNet has 1 or 2 groups, not {groups}")
    return AlexNet(num_classes, groups)
