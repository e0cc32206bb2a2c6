"""Networks as their papers, reference code and configuration files describe them, as ONNX graphs without weights' values.

Enough for operations, bytes and kernels; nothing is computed. Sources: He et al. 2015 and torchvision (ResNet, v1.5 with the
stride in the 3x3); Howard et al. 2017 (MobileNet); Liu et al. 2016 and the reference code of MLPerf Inference (both SSDs);
Simonyan 2014 (VGG); Krizhevsky 2014 (AlexNet); Iandola et al. 2016 (SqueezeNet 1.1); Huang et al. 2016 (DenseNet); Tan and Le
2019 (EfficientNet); Tan et al. 2019 (MnasNet); Ma et al. 2018 (ShuffleNetV2); the YAML files of YOLOv5, v7, v8 and 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from deploykit.targets import layers
from deploykit.targets.layers import Network


class Graph:
    """Nodes one after another; a tensor is a name, and its shape (channels, height, width) is kept."""

    def __init__(self, height: int, width: int | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.shape: dict[str, tuple[int, int, int]] = {"image": (3, height, width or height)}

    def model(self, *outputs: str) -> onnx.ModelProto:
        c, h, w = self.shape["image"]
        graph = helper.make_graph(
            self.nodes,
            "described",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, c, h, w])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])

    def add(self, op: str, inputs: Sequence[str], shape: tuple[int, int, int], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{len(self.nodes)}", **attributes))
        self.shape[name] = shape
        return name

    def weight(self, *dims: int) -> str:
        name = f"w{len(self.constants)}"
        self.constants.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims))
        return name

    def numbers(self, values: Sequence[float], kind: int = TensorProto.INT64) -> str:
        name = f"w{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, kind, [len(values)], values))
        return name

    def conv(self, x: str, out: int, k: int = 1, s: int = 1, *, g: int = 1, act: str = "Relu", p: int | None = None) -> str:
        c, h, w = self.shape[x]
        p = k // 2 if p is None else p
        shape = (out, (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1)
        weight = self.weight(out, c // g, k, k)
        x = self.add("Conv", [x, weight], shape, kernel_shape=[k, k], strides=[s, s], pads=[p] * 4, group=g)
        return self.act(x, act)

    def act(self, x: str, act: str) -> str:
        if act == "silu":
            return self.add("Mul", [x, self.add("Sigmoid", [x], self.shape[x])], self.shape[x])
        return self.add(act, [x], self.shape[x]) if act else x

    def plus(self, x: str, y: str, act: str = "") -> str:
        return self.act(self.add("Add", [x, y], self.shape[x]), act)

    def times(self, x: str, y: str) -> str:
        return self.add("Mul", [x, y], self.shape[x])

    def pool(self, x: str, k: int, s: int, p: int = 0, op: str = "MaxPool", *, up: bool = False) -> str:
        c, h, w = self.shape[x]
        size = [(math.ceil if up else math.floor)((side + 2 * p - k) / s) + 1 for side in (h, w)]
        return self.add(op, [x], (c, size[0], size[1]), kernel_shape=[k, k], strides=[s, s], pads=[p] * 4, ceil_mode=int(up))

    def mean(self, x: str) -> str:
        return self.add("GlobalAveragePool", [x], (self.shape[x][0], 1, 1))

    def cat(self, *xs: str) -> str:
        _, h, w = self.shape[xs[0]]
        return self.add("Concat", xs, (sum(self.shape[x][0] for x in xs), h, w), axis=1)

    def norm(self, x: str) -> str:
        """BatchNorm and ReLU in front of a convolution, which cannot be folded."""
        c = self.shape[x][0]
        x = self.add("BatchNormalization", [x, *(self.weight(c) for _ in range(4))], self.shape[x])
        return self.add("Relu", [x], self.shape[x])

    def halves(self, x: str) -> tuple[str, str]:
        c, h, w = self.shape[x]
        names = [f"t{len(self.nodes)}a", f"t{len(self.nodes)}b"]
        self.nodes.append(helper.make_node("Split", [x, self.numbers([c // 2, c - c // 2])], names, name=names[0], axis=1))
        self.shape |= {names[0]: (c // 2, h, w), names[1]: (c - c // 2, h, w)}
        return names[0], names[1]

    def up(self, x: str) -> str:
        c, h, w = self.shape[x]
        return self.add(
            "Resize", [x, "", self.numbers([1.0, 1.0, 2.0, 2.0], TensorProto.FLOAT)], (c, 2 * h, 2 * w), mode="nearest"
        )

    def linear(self, x: str, out: int, act: str = "") -> str:
        size = math.prod(self.shape[x])
        flat = self.add("Flatten", [x], (size, 1, 1))
        return self.act(self.add("Gemm", [flat, self.weight(out, size)], (out, 1, 1), transB=1), act)


def _residual(g: Graph, x: str, inner: int, out: int, s: int, *, is_bottleneck: bool, is_v1: bool) -> str:
    skip = x
    if s != 1 or g.shape[x][0] != out:
        skip = g.conv(x, out, 1, s, act="")
    if is_bottleneck:
        y = g.conv(x, inner, 1, s if is_v1 else 1)
        y = g.conv(g.conv(y, inner, 3, 1 if is_v1 else s), out, act="")
    else:
        y = g.conv(g.conv(x, inner, 3, s), out, 3, act="")
    return g.plus(y, skip, "Relu")


def _stages(g: Graph, depth: int, *, is_v1: bool = False, strides: Sequence[int] = (1, 2, 2, 2)) -> str:
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    wide = depth >= 50
    x = g.pool(g.conv("image", 64, 7, 2), 3, 2, 1)
    for stage, stride in enumerate(strides):
        inner = 64 << stage
        for block in range(blocks[stage]):
            s = stride if block == 0 else 1
            x = _residual(g, x, inner, inner * 4 if wide else inner, s, is_bottleneck=wide, is_v1=is_v1)
    return x


def resnet(size: int, depth: int, *, is_v1: bool = False) -> onnx.ModelProto:
    g = Graph(size)
    return g.model(g.linear(g.mean(_stages(g, depth, is_v1=is_v1)), 1000))


def vgg(size: int, depth: int) -> onnx.ModelProto:
    g, x = Graph(size), "image"
    counts = {13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
    for count, width in zip(counts, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            x = g.conv(x, width, 3)
        x = g.pool(x, 2, 2)
    return g.model(g.linear(g.linear(g.linear(x, 4096, "Relu"), 4096, "Relu"), 1000))


def alexnet(size: int) -> onnx.ModelProto:
    g = Graph(size)
    x = g.pool(g.conv("image", 64, 11, 4, p=2), 3, 2)
    x = g.pool(g.conv(x, 192, 5), 3, 2)
    x = g.pool(g.conv(g.conv(g.conv(x, 384, 3), 256, 3), 256, 3), 3, 2)
    return g.model(g.linear(g.linear(g.linear(x, 4096, "Relu"), 4096, "Relu"), 1000))


def squeezenet(size: int) -> onnx.ModelProto:
    g = Graph(size)

    def fire(x: str, squeeze: int, expand: int) -> str:
        x = g.conv(x, squeeze)
        return g.cat(g.conv(x, expand), g.conv(x, expand, 3))

    x = g.pool(g.conv("image", 64, 3, 2, p=0), 3, 2, up=True)
    x = g.pool(fire(fire(x, 16, 64), 16, 64), 3, 2, up=True)
    x = g.pool(fire(fire(x, 32, 128), 32, 128), 3, 2, up=True)
    x = fire(fire(fire(fire(x, 48, 192), 48, 192), 64, 256), 64, 256)
    return g.model(g.mean(g.conv(x, 1000)))


def densenet(size: int, depth: int) -> onnx.ModelProto:
    growth, first, blocks = {
        121: (32, 64, (6, 12, 24, 16)),
        161: (48, 96, (6, 12, 36, 24)),
        169: (32, 64, (6, 12, 32, 32)),
        201: (32, 64, (6, 12, 48, 32)),
    }[depth]
    g = Graph(size)
    x = g.pool(g.conv("image", first, 7, 2), 3, 2, 1)
    for number, count in enumerate(blocks):
        for _ in range(count):
            x = g.cat(x, g.conv(g.conv(g.norm(x), 4 * growth), growth, 3, act=""))
        if number < 3:
            x = g.pool(g.conv(g.norm(x), g.shape[x][0] // 2, act=""), 2, 2, op="AveragePool")
    return g.model(g.linear(g.mean(g.norm(x)), 1000))


def _mobile(g: Graph, x: str, out: int, k: int, s: int, ratio: int, act: str, squeeze: int = 0) -> str:
    """MBConv: expand, depthwise, squeeze and excite, project, and a residual where shapes agree."""
    c = g.shape[x][0]
    y = g.conv(x, c * ratio, act=act) if ratio > 1 else x
    y = g.conv(y, c * ratio, k, s, g=c * ratio, act=act)
    if squeeze:
        y = g.times(y, g.conv(g.conv(g.mean(y), squeeze, act=act), c * ratio, act="Sigmoid"))
    y = g.conv(y, out, act="")
    return g.plus(x, y) if s == 1 and c == out else y


def efficientnet_b0(size: int) -> onnx.ModelProto:
    g = Graph(size)
    x = g.conv("image", 32, 3, 2, act="silu")
    for ratio, k, s, out, count in (
        *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
        *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
    ):
        for block in range(count):
            x = _mobile(g, x, out, k, s if block == 0 else 1, ratio, "silu", g.shape[x][0] // 4)
    return g.model(g.linear(g.mean(g.conv(x, 1280, act="silu")), 1000))


def mnasnet(size: int) -> onnx.ModelProto:
    g = Graph(size)
    x = g.conv(g.conv(g.conv("image", 32, 3, 2), 32, 3, g=32), 16, act="")
    for out, k, s, ratio, count in (
        *((24, 3, 2, 3, 3), (40, 5, 2, 3, 3), (80, 5, 2, 6, 3)),
        *((96, 3, 1, 6, 2), (192, 5, 2, 6, 4), (320, 3, 1, 6, 1)),
    ):
        for block in range(count):
            x = _mobile(g, x, out, k, s if block == 0 else 1, ratio, "Relu")
    return g.model(g.linear(g.mean(g.conv(x, 1280)), 1000))


def shufflenet(size: int) -> onnx.ModelProto:
    g = Graph(size)

    def shuffled(x: str, y: str) -> str:
        x = g.cat(x, y)
        return g.add("Transpose", [x], g.shape[x], perm=[0, 1, 2, 3])  # a copy, whatever the order

    def branch(x: str, width: int, s: int) -> str:
        return g.conv(g.conv(g.conv(x, width), width, 3, s, g=width, act=""), width)

    x = g.pool(g.conv("image", 24, 3, 2), 3, 2, 1)
    for out, count in ((116, 4), (232, 8), (464, 4)):
        half = out // 2
        left = g.conv(g.conv(x, g.shape[x][0], 3, 2, g=g.shape[x][0], act=""), half)
        x = shuffled(left, branch(x, half, 2))
        for _ in range(count - 1):
            left, right = g.halves(x)
            x = shuffled(left, branch(right, half, 1))
    return g.model(g.linear(g.mean(g.conv(x, 1024)), 1000))


def _mobilenet_v1(g: Graph) -> tuple[str, str]:
    """The last tensor at a sixteenth of the size, and the last of all."""
    x, middle = g.conv("image", 32, 3, 2), ""
    for out, s in (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
    ):
        middle = x if (out, s) == (1024, 2) else middle
        c = g.shape[x][0]
        x = g.conv(g.conv(x, c, 3, s, g=c), out)
    return middle, x


def mobilenet_v1(size: int) -> onnx.ModelProto:
    g = Graph(size)
    return g.model(g.linear(g.mean(_mobilenet_v1(g)[1]), 1000))


def ssd_mobilenet_v1(size: int) -> onnx.ModelProto:
    g = Graph(size)
    levels = [*_mobilenet_v1(g)]
    for inner, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        levels.append(g.conv(g.conv(levels[-1], inner), out, 3, 2))
    outputs = []
    for number, level in enumerate(levels):
        boxes = 6 if number else 3
        outputs += [g.conv(level, 4 * boxes, act=""), g.conv(level, 91 * boxes, act="Sigmoid")]
    return g.model(*outputs)


def ssd_resnet34(size: int) -> onnx.ModelProto:
    """ResNet-34 up to its third stage, which keeps the size; heads of stride 3 (15,130 boxes at 1200 pixels)."""
    g = Graph(size)
    levels = [_stages(g, 34, strides=(1, 2, 1))]
    for inner, out, s, p in ((256, 512, 2, 1), (256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 2, 0), (128, 256, 1, 0)):
        levels.append(g.conv(g.conv(levels[-1], inner), out, 3, s, p=p))
    outputs = []
    for level, boxes in zip(levels, (4, 6, 6, 6, 4, 4), strict=True):
        outputs += [g.conv(level, 4 * boxes, 3, 3, act=""), g.conv(level, 81 * boxes, 3, 3, act="")]
    return g.model(*outputs)


class Yolo(Graph):
    """The blocks that YOLOv5, v8 and 11 are made of; widths are those of the configuration times `width`."""

    def __init__(self, size: int, depth: float, width: float, most: int, act: str = "silu") -> None:
        super().__init__(size)
        self.depth, self.factor, self.most, self.kind = depth, width, most, act

    def wide(self, out: int) -> int:
        return math.ceil(min(out, self.most) * self.factor / 8) * 8

    def count(self, n: int) -> int:
        return max(round(n * self.depth), 1) if n > 1 else n

    def cv(self, x: str, out: int, k: int = 1, s: int = 1, g: int = 1) -> str:
        return self.conv(x, out, k, s, g=g, act=self.kind)

    def bottleneck(self, x: str, out: int, *, add: bool, e: float = 1.0, first: int = 3) -> str:
        y = self.cv(self.cv(x, int(out * e), first), out, 3)
        return self.plus(x, y) if add else y

    def c3(self, x: str, out: int, n: int, *, add: bool, first: int = 1) -> str:
        inner = out // 2
        y = self.cv(x, inner)
        for _ in range(n):
            y = self.bottleneck(y, inner, add=add, first=first)
        return self.cv(self.cat(y, self.cv(x, inner)), out)

    def c2f(self, x: str, out: int, n: int, *, add: bool, e: float = 0.5, block: str = "plain") -> str:
        inner = int(out * e)
        parts = [*self.halves(self.cv(x, 2 * inner))]
        for _ in range(n):
            if block == "c3k":
                parts.append(self.c3(parts[-1], inner, 2, add=add, first=3))
            else:
                parts.append(self.bottleneck(parts[-1], inner, add=add, e=0.5 if block == "half" else 1.0))
        return self.cv(self.cat(*parts), out)

    def sppf(self, x: str, out: int) -> str:
        xs = [self.cv(x, self.shape[x][0] // 2)]
        for _ in range(3):
            xs.append(self.pool(xs[-1], 5, 1, 2))
        return self.cv(self.cat(*xs), out)

    def attention(self, x: str, n: int) -> str:
        """C2PSA: attention of 64-wide heads over all positions, on half of the channels."""
        out = self.shape[x][0]
        left, y = self.halves(self.cv(x, out))
        for _ in range(n):
            c, h, w = self.shape[y]
            heads, tokens = max(1, c // 64), h * w
            qkv = self.conv(y, 2 * c, act="")
            flat = self.add("Reshape", [qkv, self.numbers([heads, 2 * c // heads, tokens])], (2 * c, h, w))
            parts = [f"{flat}{letter}" for letter in "qkv"]
            sizes = self.numbers([c // heads // 2, c // heads // 2, c // heads])
            self.nodes.append(helper.make_node("Split", [flat, sizes], parts, name=f"split_{flat}", axis=1))
            turned = self.add("Transpose", [parts[0]], (c // 2, h, w), perm=[0, 2, 1])
            scores = self.add(
                "Softmax", [self.add("MatMul", [turned, parts[1]], (heads, tokens, tokens))], (heads, tokens, tokens)
            )
            turned = self.add("Transpose", [scores], (heads, tokens, tokens), perm=[0, 2, 1])
            mixed = self.add("MatMul", [parts[2], turned], (c, h, w))
            mixed = self.add("Reshape", [mixed, self.numbers([1, c, h, w])], (c, h, w))
            value = self.add("Reshape", [parts[2], self.numbers([1, c, h, w])], (c, h, w))
            y = self.plus(y, self.conv(self.plus(self.conv(value, c, 3, g=c, act=""), mixed), c, act=""))
            y = self.plus(y, self.conv(self.cv(y, 2 * c), c, act=""))
        return self.cv(self.cat(left, y), out)

    def detect(self, levels: Sequence[str], *, light: bool) -> list[str]:
        """Boxes as distributions of 16 bins and 80 classes for each position, joined and decoded."""
        outputs = []
        first = self.shape[levels[0]][0]
        box, scores = max(16, first // 4, 64), max(first, 80)
        for x in levels:
            c = self.shape[x][0]
            y = self.conv(self.cv(self.cv(x, box, 3), box, 3), 64, act="")
            if light:
                z = self.cv(self.cv(self.cv(self.cv(x, c, 3, g=c), scores), scores, 3, g=scores), scores)
            else:
                z = self.cv(self.cv(x, scores, 3), scores, 3)
            bins = self.add("Softmax", [y], self.shape[y])
            outputs += [self.conv(bins, 4, act=""), self.conv(z, 80, act="Sigmoid")]
        return outputs


def yolov8(size: int, scale: str, *, classify: bool = False) -> onnx.ModelProto:
    depth, width, most = {
        "n": (1 / 3, 0.25, 1024),
        "s": (1 / 3, 0.5, 1024),
        "m": (2 / 3, 0.75, 768),
        "l": (1, 1, 512),
        "x": (1, 1.25, 512),
    }[scale]
    g = Yolo(size, depth, width, 1024 if classify else most)
    x, kept = "image", []
    for out, n in ((64, 0), (128, 3), (256, 6), (512, 6), (1024, 3)):
        x = g.cv(x, g.wide(out), 3, 2)
        x = g.c2f(x, g.wide(out), g.count(n), add=True) if n else x
        kept.append(x)
    if classify:
        return g.model(g.linear(g.mean(g.cv(x, 1280)), 1000))
    top = g.sppf(x, g.wide(1024))
    middle = g.c2f(g.cat(g.up(top), kept[3]), g.wide(512), g.count(3), add=False)
    low = g.c2f(g.cat(g.up(middle), kept[2]), g.wide(256), g.count(3), add=False)
    middle = g.c2f(g.cat(g.cv(low, g.wide(256), 3, 2), middle), g.wide(512), g.count(3), add=False)
    top = g.c2f(g.cat(g.cv(middle, g.wide(512), 3, 2), top), g.wide(1024), g.count(3), add=False)
    return g.model(*g.detect([low, middle, top], light=False))


def yolo11(size: int, scale: str, *, classify: bool = False) -> onnx.ModelProto:
    depth, width, most = {
        "n": (0.5, 0.25, 1024),
        "s": (0.5, 0.5, 1024),
        "m": (0.5, 1, 512),
        "l": (1, 1, 512),
        "x": (1, 1.5, 512),
    }[scale]
    g = Yolo(size, depth, width, most)
    n, large = g.count(2), scale in "mlx"

    def c3k2(x: str, out: int, *, deep: bool, e: float = 0.5) -> str:
        return g.c2f(x, g.wide(out), n, add=True, e=e, block="c3k" if deep or large else "half")

    x = g.cv(g.cv("image", g.wide(64), 3, 2), g.wide(128), 3, 2)
    x = g.cv(c3k2(x, 256, deep=False, e=0.25), g.wide(256), 3, 2)
    low = c3k2(x, 512, deep=False, e=0.25)
    middle = c3k2(g.cv(low, g.wide(512), 3, 2), 512, deep=True)
    top = c3k2(g.cv(middle, g.wide(1024), 3, 2), 1024, deep=True)
    if classify:
        return g.model(g.linear(g.mean(g.cv(g.attention(top, n), 1280)), 1000))
    top = g.attention(g.sppf(top, g.wide(1024)), n)
    middle = c3k2(g.cat(g.up(top), middle), 512, deep=False)
    low = c3k2(g.cat(g.up(middle), low), 256, deep=False)
    middle = c3k2(g.cat(g.cv(low, g.wide(256), 3, 2), middle), 512, deep=False)
    top = c3k2(g.cat(g.cv(middle, g.wide(512), 3, 2), top), 1024, deep=True)
    return g.model(*g.detect([low, middle, top], light=True))


def yolov5s(size: int) -> onnx.ModelProto:
    """With ReLU and without the decoding of boxes, as NVIDIA's cuDLA sample has it."""
    g = Yolo(size, 1 / 3, 0.5, 1024, "Relu")
    x = g.conv("image", 32, 6, 2, p=2)
    kept = []
    for out, n in ((64, 1), (128, 2), (256, 3), (512, 1)):
        x = g.c3(g.cv(x, out, 3, 2), out, n, add=True)
        kept.append(x)
    top = g.cv(g.sppf(x, 512), 256)
    middle = g.cv(g.c3(g.cat(g.up(top), kept[2]), 256, 1, add=False), 128)
    low = g.c3(g.cat(g.up(middle), kept[1]), 128, 1, add=False)
    middle = g.c3(g.cat(g.cv(low, 128, 3, 2), middle), 256, 1, add=False)
    top = g.c3(g.cat(g.cv(middle, 256, 3, 2), top), 512, 1, add=False)
    return g.model(*(g.conv(x, 255, act="") for x in (low, middle, top)))


def yolov7(size: int) -> onnx.ModelProto:
    g = Yolo(size, 1, 1, 4096)

    def elan(x: str, inner: int, out: int) -> str:
        xs = [g.cv(x, inner), g.cv(x, inner)]
        for _ in range(2):
            xs.append(g.cv(g.cv(xs[-1], inner, 3), inner, 3))
        return g.cv(g.cat(*xs), out)

    def elan_head(x: str, out: int) -> str:
        xs = [g.cv(x, out), g.cv(x, out)]
        for _ in range(4):
            xs.append(g.cv(xs[-1], out // 2, 3))
        return g.cv(g.cat(*xs), out)

    def down(x: str, out: int, *others: str) -> str:
        return g.cat(g.cv(g.pool(x, 2, 2), out), g.cv(g.cv(x, out), out, 3, 2), *others)

    x = g.cv(g.cv(g.cv("image", 32, 3), 64, 3, 2), 64, 3)
    x = elan(g.cv(x, 128, 3, 2), 64, 256)
    low = elan(down(x, 128), 128, 512)
    middle = elan(down(low, 256), 256, 1024)
    x = elan(down(middle, 512), 256, 1024)
    y = g.cv(g.cv(g.cv(x, 512), 512, 3), 512)
    y = g.cv(g.cv(g.cat(y, *(g.pool(y, k, 1, k // 2) for k in (5, 9, 13))), 512), 512, 3)
    top = g.cv(g.cat(y, g.cv(x, 512)), 512)
    middle = elan_head(g.cat(g.cv(middle, 256), g.up(g.cv(top, 256))), 256)
    low = elan_head(g.cat(g.cv(low, 128), g.up(g.cv(middle, 128))), 128)
    middle = elan_head(down(low, 128, middle), 256)
    top = elan_head(down(middle, 256, top), 512)
    heads = ((low, 256), (middle, 512), (top, 1024))
    return g.model(*(g.conv(g.cv(x, out, 3), 255, act="Sigmoid") for x, out in heads))


BUILDERS: dict[str, Callable[[int], onnx.ModelProto]] = {
    **{f"resnet{depth}": lambda size, depth=depth: resnet(size, depth) for depth in (18, 34, 50, 101, 152)},  # type: ignore[misc]
    "resnet50_v1.5": lambda size: resnet(size, 50),
    "resnet50_v1": lambda size: resnet(size, 50, is_v1=True),
    "resnet101_v1": lambda size: resnet(size, 101, is_v1=True),
    **{f"vgg{depth}": lambda size, depth=depth: vgg(size, depth) for depth in (13, 16, 19)},  # type: ignore[misc]
    **{f"densenet{depth}": lambda size, depth=depth: densenet(size, depth) for depth in (121, 161, 169, 201)},  # type: ignore[misc]
    "alexnet": alexnet,
    "squeezenet1_1": squeezenet,
    "efficientnet_b0": efficientnet_b0,
    "mnasnet1_0": mnasnet,
    "shufflenet_v2_x1_0": shufflenet,
    "mobilenet_v1": mobilenet_v1,
    "ssd_mobilenet_v1": ssd_mobilenet_v1,
    "ssd_resnet34": ssd_resnet34,
    "yolov5s": yolov5s,
    "yolov7": yolov7,
    **{f"yolov8{scale}": lambda size, scale=scale: yolov8(size, scale) for scale in "nsmlx"},  # type: ignore[misc]
    **{f"yolov8{scale}-cls": lambda size, scale=scale: yolov8(size, scale, classify=True) for scale in "nsmlx"},  # type: ignore[misc]
    **{f"yolo11{scale}": lambda size, scale=scale: yolo11(size, scale) for scale in "nsmlx"},  # type: ignore[misc]
    **{f"yolo11{scale}-cls": lambda size, scale=scale: yolo11(size, scale, classify=True) for scale in "nsmlx"},  # type: ignore[misc]
}


def network(name: str, size: int) -> Network:
    """The kernels of a described network at a height and width."""
    return layers.of_model(BUILDERS[name](size), name=name)
