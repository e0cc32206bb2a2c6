"""GoogLeNet with the kernels of its paper, as an option: torchvision's has 3x3 where the paper has 5x5."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux

from deploykit.errors import ModelError


def options(kernel: Literal[3, 5] = 3) -> dict[str, Any]:
    """Arguments of torchvision's GoogLeNet: `kernel` is the size of the third branch's convolution in each inception.

    3 is what torchvision has and calls a known bug (torchvision/models/googlenet.py), and what its weights were trained
    with; 5 is that of Szegedy et al., "Going Deeper with Convolutions" (2014), table 1. With 5 there are 7,005,832
    parameters: the 6,998,552 of the authors' Caffe network, and one more for each of the 7,280 maps of its convolutions,
    because BatchNorm, which the paper did not know, has two where a bias is one.

    Raises ModelError for another size.
    """
    if kernel not in (3, 5):
        raise ModelError(f"googlenet has no kernel of {kernel!r}", fix="--arg kernel=3 (torchvision's) or kernel=5 (the paper's)")
    if kernel == 3:
        return {}
    return {"blocks": [BasicConv2d, _inception, InceptionAux]}


def _inception(*widths: int) -> nn.Module:
    """torchvision's block for (input, 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pool) maps, its third branch with 5x5 kernels."""
    module: nn.Module = Inception(*widths)
    module.branch3[1] = BasicConv2d(widths[4], widths[5], kernel_size=5, padding=2)  # type: ignore[operator]
    return module
