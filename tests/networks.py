"""Small networks, one for each shape of graph that export and quantization meet, and what makes artifacts of them.

Weights are random but seeded, BatchNorm statistics are moved away from 0 and 1, and an export takes about a second.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from deploykit import export, quantize, runtimes
from deploykit.artifact import SAMPLES, Artifact, Format, Precision, Preprocess, Samples, TensorSpec
from deploykit.models import Model
from deploykit.models.lenet import LeNet5
from deploykit.recipe import ExportTable, QuantizeTable
from deploykit.runtimes import onnxruntime


def conv(inside: int, outside: int, size: int = 3, **options: int) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    layers = nn.Conv2d(inside, outside, size, padding=size // 2, bias=False, **options), nn.BatchNorm2d(outside), nn.ReLU()
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """`body`, global average pooling, a linear head."""

    def __init__(self, body: nn.Module, width: int, classes: int = 5) -> None:
        super().__init__()
        self.body, self.pool, self.head = body, nn.AdaptiveAvgPool2d(1), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.body(x)), 1))


class BasicBlock(nn.Module):
    """ResNet's: two convolutions, and a skip branch that is the input itself or a 1x1 convolution of it."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv(inside, outside, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside))
        self.skip = nn.Identity()
        if inside != outside:
            self.skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


class PaddedShortcut(nn.Module):
    """CIFAR ResNet's option A: the skip branch takes every other pixel and pads with channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = conv(3, 8), nn.Sequential(conv(8, 16, stride=2), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return F.relu(self.branch(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class MobileBlock(nn.Module):
    """MobileNet's parts: ReLU6, a depthwise convolution, squeeze-and-excitation, hard-swish, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.expand(x)
        y = self.depthwise(x)
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y * gate)


class Branches(nn.Module):
    """Inception's parts: branches of convolutions and pools, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv(3, 8), nn.MaxPool2d(3, 2, 1)
        self.wide, self.narrow, self.pooled = conv(8, 8, 3), conv(8, 4, 1), nn.AvgPool2d(3, 1, 1)
        self.after = conv(20, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        return self.after(torch.cat([self.wide(x), self.narrow(x), self.pooled(x)], 1))


class InputSkip(nn.Module):
    """A residual around the first convolution, so that the network's own input is a skip branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.after = nn.Conv2d(3, 3, 3, padding=1), conv(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(x + self.first(x))


class Twice(nn.Module):
    """One convolution called on two different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.shared(F.relu(self.shared(self.stem(x)))))


class MatMulHead(nn.Module):
    """A head written as a matrix product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = conv(3, 8), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3)) @ self.weight


class Attention(nn.Module):
    """A convolution, then LayerNorm and self-attention, whose products have no constant weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.qkv, self.head = conv(3, 8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(tokens)).chunk(3, -1)
        mixed = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, -1) @ value
        return self.head((tokens + mixed).mean(1))


def variety() -> nn.Module:
    """A strided, a grouped, a dilated and an asymmetric convolution, some with bias, none with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=2, dilation=2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
    )


def upsampling() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3))


def difficult_channels() -> nn.Module:
    """Channel 0 has no weights at all, channel 1 has tiny ones and a bias that int32 could not hold at their scale."""
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    with torch.no_grad():
        for layer in (body[0], body[2]):
            layer.weight[0] = layer.bias[0] = 0
            layer.weight[1], layer.bias[1] = 1e-12, 3.0
    return body


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lambda: LeNet5(5, 3),
    "residual": lambda: Classifier(nn.Sequential(conv(3, 8), BasicBlock(8, 8), BasicBlock(8, 16, 2)), 16),
    "padded_shortcut": lambda: Classifier(PaddedShortcut(), 16),
    "mobile": lambda: Classifier(MobileBlock(), 16),
    "branches": lambda: Classifier(Branches(), 8),
    "input_skip": lambda: Classifier(InputSkip(), 8),
    "twice": lambda: Classifier(Twice(), 8),
    "matmul_head": MatMulHead,
    "attention": Attention,
    "variety": lambda: Classifier(variety(), 8),
    "upsampling": lambda: Classifier(upsampling(), 8),
    "difficult_channels": lambda: Classifier(difficult_channels(), 8),
    "fully_convolutional": lambda: nn.Sequential(conv(3, 8), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


def model(module: nn.Module | str, size: int = 32) -> Model:
    """A network by name, or any module, as a `Model` with inputs of (3, size, size)."""
    name = module if isinstance(module, str) else type(module).__name__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(module, str):
            module = NETWORKS[module]()
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.running_mean.normal_(0, 0.2)
                    layer.running_var.uniform_(0.3, 2)
                    layer.bias.data.normal_(0, 0.2)
    preprocess = Preprocess(None, (size, size), (0.5,) * 3, (0.25,) * 3)
    return Model(module.eval(), name, preprocess, ("a", "b", "c", "d", "e"), 5, "random", True, ())


def images(count: int, size: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Normalised pictures (count, 3, size, size): smooth blobs with noise on them."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((count, 3, 4, 4)).repeat(size // 4, 2).repeat(size // 4, 3)
    return (coarse + 0.2 * generator.standard_normal(coarse.shape)).astype(np.float32)


def exported(module: nn.Module | str, folder: Path, **settings: object) -> Artifact:
    """Exported to ONNX into `folder`, with eight golden samples."""
    return export.onnx_model(model(module), images(8), np.arange(8) % 5, ExportTable(**settings), made(folder))


def by_hand(folder: Path, body: str, constants: dict[str, NDArray[Any]], size: int = 8) -> Artifact:
    """Nodes in ONNX's text form, from `image` (batch, 3, size, size) to `logits`, as an exported artifact."""
    text = f'<ir_version: 9, opset_import: ["" : 19]> g (float[batch, 3, {size}, {size}] image) => (float logits) {{ {body} }}'
    file = onnx.parser.parse_model(text)
    file.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    file.graph.output[0].type.tensor_type.ClearField("shape")
    file = onnx.shape_inference.infer_shapes(file, strict_mode=True)
    path = made(folder) / "model.onnx"
    onnx.save(file, path)
    inputs = images(4, size)
    answer = runtimes.run(onnxruntime.reference(path), {"image": inputs})
    Samples({"image": inputs}, answer, answer).save(folder / SAMPLES)
    return Artifact(
        path=path,
        stage="export",
        key="",
        format=Format.ONNX,
        precision=Precision.FP32,
        inputs=(TensorSpec("image", "float32", ("batch", 3, size, size)),),
        outputs=(TensorSpec("logits", "float32", ("batch", *answer["logits"].shape[1:])),),
        preprocess=Preprocess(None, (size, size), (0.5,) * 3, (0.25,) * 3),
        classes=(),
        sha256="",
        parents=(),
        settings={},
        tools={},
        facts={"model": "by hand"},
    )


def weights(*shape: int) -> NDArray[np.float32]:
    """Normal random numbers of the size that keeps a layer's output near its input's."""
    return (np.random.default_rng(7).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def calibrated(source: Artifact, folder: Path, pictures: NDArray[np.float32] | None = None) -> Artifact:
    """Observed on 32 pictures that are not the golden ones, unless others are given."""
    pictures = images(32, source.inputs[0].shape[2], seed=1) if pictures is None else pictures

    def batches(size: int) -> Iterable[NDArray[np.float32]]:
        return (pictures[start : start + size] for start in range(0, len(pictures), size))

    return quantize.calibrate(source, batches, made(folder), images=len(pictures))


def quantized(source: Artifact, runtime: str, folder: Path, **settings: object) -> Artifact:
    """Quantized by the rules of `runtime`; calibration is made beside it."""
    observations = calibrated(source, folder / "calibrate")
    return quantize.quantize(source, observations, QuantizeTable(**settings), runtime, folder)


def made(folder: Path) -> Path:
    """The folder, which exists afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def flip_a_bit_of_the_largest_member(path: Path) -> None:
    """What a disk may do to a zip file: one weight has another value."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
