"""An ONNX graph as the kernels that an engine runs: operations, bytes and tiles of each, after fusion.

Shapes come from onnx's shape inference at batch 1; constants' values are not looked at, except small ones that shapes
depend on. What fuses with what is in `fusion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx import numpy_helper

from deploykit.errors import UsageError, printable
from deploykit.targets import fusion
from deploykit.targets.fusion import Group, Operator

Kind = Literal["convolution", "depthwise", "matrix", "product", "pool", "pointwise", "copy", "other"]

_SHORT_BYTES = 4096  # constants that shapes may depend on: sizes, axes, pads
_POOLS = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceSum", "LpPool"}
)
_COPIES = frozenset(
    {"Slice", "Split", "Transpose", "Pad", "Resize", "Upsample", "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"}
)
_KNOWN = frozenset({"Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "LRN", "ArgMax", "TopK", "Concat"})


@dataclass(frozen=True)
class Layer:
    """One kernel for one image: a layer with what is fused into it.

    `macs` are multiply-accumulates of convolutions and matrix products; two operations each. `weights`, `read` and
    `written` are elements of constants and of activations. A product is `rows` x `columns` outputs of `depth` terms each,
    `groups` times. `is_int8` is True where the graph feeds it through Q/DQ.
    """

    name: str
    kind: Kind
    operators: tuple[str, ...]
    macs: int
    weights: int
    read: int
    written: int
    rows: int = 0
    columns: int = 0
    depth: int = 0
    groups: int = 1
    is_int8: bool = False

    def bytes(self, width: int, batch: int = 1) -> int:
        """Bytes of weights, and of what is read and written for `batch` images, with `width` bytes an element."""
        return width * (self.weights + batch * (self.read + self.written))


@dataclass(frozen=True)
class Network:
    """The kernels of a graph in order; `unknown` are its operators that no constant was fitted for."""

    name: str
    layers: tuple[Layer, ...]
    unknown: tuple[str, ...]
    has_qdq: bool

    @classmethod
    def of(cls, name: str, layers: Sequence[Layer], *, has_qdq: bool = False) -> Network:
        """The network of these kernels."""
        unknown = sorted({op for layer in layers if layer.kind == "other" for op in layer.operators[:1]} - _KNOWN)
        return cls(name, tuple(layers), tuple(unknown), has_qdq)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def weights(self) -> int:
        """Elements of all constants that layers read."""
        return sum(layer.weights for layer in self.layers)


def read(path: Path, *, size: int | None = None) -> Network:
    """The kernels of an ONNX file; `size` is the height and width where the file leaves them open.

    Raises UsageError when it cannot be read, or when a shape in it is unknown.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises classes without a common base for a file that is not ONNX
        raise UsageError(
            f"{printable(path)} is not an ONNX file that can be read", why=f"{type(error).__name__}: {error}"
        ) from error
    return of_model(model, name=path.stem, size=size)


def of_model(model: onnx.ModelProto, *, name: str, size: int | None = None) -> Network:
    """The kernels of a graph, which is changed: it loses its weights' values. Raises UsageError when a shape is unknown."""
    shapes, constants = _shapes(model, name, size)
    operators = [
        Operator(node.name or node.output[0], node.op_type, tuple(node.input), tuple(node.output), _attributes(node))
        for node in model.graph.node
    ]
    groups = fusion.fused(operators, constants, shapes, [value.name for value in model.graph.output])
    has_qdq = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    return Network.of(name, [_layer(group, shapes, constants) for group in groups], has_qdq=has_qdq)


def _shapes(model: onnx.ModelProto, name: str, size: int | None) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Every tensor's shape for one image, and which tensors are constants."""
    _settle_inputs(model.graph, name, size)
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    dims: dict[str, tuple[int, ...]] = {}
    for constant in model.graph.initializer:
        dims[constant.name] = tuple(constant.dims)
    large = [constant for constant in model.graph.initializer if math.prod(constant.dims) * 8 > _SHORT_BYTES]
    for constant in large:
        model.graph.input.append(onnx.helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims))
    short = [constant for constant in model.graph.initializer if math.prod(constant.dims) * 8 <= _SHORT_BYTES]
    names = {constant.name for constant in model.graph.initializer}
    del model.graph.initializer[:]
    model.graph.initializer.extend(short)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # InferenceError has no public base class
        raise UsageError(f"the shapes of {printable(name)} do not fit each other", why=str(error).partition("\n")[0]) from error
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            found = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
            if min(found, default=0) >= 0:
                dims[value.name] = tuple(found)
    return dims, frozenset(names)


def _settle_inputs(graph: onnx.GraphProto, name: str, size: int | None) -> None:
    """Fix the inputs' shapes: one image, and `size` where height and width are open."""
    constants = {constant.name for constant in graph.initializer}
    for value in graph.input:
        if value.name in constants:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == 0:
                dim.dim_value = 1
            elif not (dim.HasField("dim_value") and dim.dim_value > 0):
                if size is None or axis < 2:
                    raise UsageError(
                        f"{printable(name)} has an input {printable(value.name)!r} without a fixed size",
                        fix="--size PIXELS is its height and width",
                    )
                dim.dim_value = size


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Numbers and lists of numbers; a Constant's small tensor as a list."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.FLOAT):
            found[attribute.name] = onnx.helper.get_attribute_value(attribute)
        elif attribute.type == onnx.AttributeProto.STRING:
            found[attribute.name] = attribute.s.decode(errors="replace")
        elif attribute.type == onnx.AttributeProto.TENSOR and math.prod(attribute.t.dims) * 8 <= _SHORT_BYTES:
            found[attribute.name] = numpy_helper.to_array(attribute.t).tolist()
    return found


def _layer(group: Group, shapes: Mapping[str, tuple[int, ...]], constants: frozenset[str]) -> Layer:
    head = group.operators[0]

    def elements(tensors: Sequence[str]) -> int:
        return sum(math.prod(_shape(tensor, shapes, head)) for tensor in tensors)

    kind, product = _product(head, shapes, constants)
    return Layer(
        name=head.name,
        kind=kind,
        operators=tuple(operator.op for operator in group.operators),
        weights=elements(sorted(group.constants)),
        read=elements(sorted(group.inputs)),
        written=elements(sorted(group.outputs)),
        is_int8=group.is_int8,
        **product,
    )


def _shape(tensor: str, shapes: Mapping[str, tuple[int, ...]], head: Operator) -> tuple[int, ...]:
    if tensor not in shapes:
        raise UsageError(
            f"the shape of {printable(tensor)!r}, at {head.op} {printable(head.name)!r}, cannot be told",
            why="it depends on values, such as how many boxes are found",
            fix="predict the network without its post-processing",
        )
    return shapes[tensor]


def _product(head: Operator, shapes: Mapping[str, tuple[int, ...]], constants: frozenset[str]) -> tuple[Kind, dict[str, int]]:
    counted: dict[str, Callable[[Operator, Mapping[str, tuple[int, ...]]], dict[str, int]]] = {
        "Conv": _convolution,
        "ConvTranspose": _transposed,
        "Gemm": _gemm,
        "MatMul": _matmul,
        "Einsum": _einsum,
    }
    if head.op in counted and "..." not in str(head.attributes.get("equation", "")):
        for tensor in (*head.given[:2], head.outputs[0]):
            _shape(tensor, shapes, head)
        found = counted[head.op](head, shapes)
        if found["groups"] > 1 and found["depth"] <= 16 * 9 and found["columns"] <= 2 and head.op == "Conv":
            return "depthwise", found
        if head.op in ("Conv", "ConvTranspose"):
            return "convolution", found
        return ("matrix" if len(head.inputs) > 1 and head.inputs[1] in constants else "product"), found
    none = {"macs": 0}
    if head.op in _POOLS:
        return "pool", none
    if head.op in fusion.POINTWISE:
        return "pointwise", none
    return ("copy" if head.op in _COPIES or head.op == "Concat" else "other"), none


def _convolution(head: Operator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Weights are (outputs, inputs / groups, kernel...); each output element is a sum over inputs / groups x kernel."""
    outputs, depth = shapes[head.given[1]][0], math.prod(shapes[head.given[1]][1:])
    groups = int(head.attributes.get("group", 1))
    written = shapes[head.outputs[0]]
    rows = written[0] * math.prod(written[2:])
    return {"macs": rows * outputs * depth, "rows": rows, "columns": outputs // groups, "depth": depth, "groups": groups}


def _transposed(head: Operator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Weights are (inputs, outputs / groups, kernel...); each input element is multiplied with outputs / groups x kernel."""
    inputs, columns = shapes[head.given[1]][0], math.prod(shapes[head.given[1]][1:])
    groups = int(head.attributes.get("group", 1))
    given = shapes[head.given[0]]
    rows = given[0] * math.prod(given[2:])
    return {"macs": rows * inputs * columns, "rows": rows, "columns": columns, "depth": inputs // groups, "groups": groups}


def _gemm(head: Operator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    given = shapes[head.given[0]]
    rows, depth = (given[1], given[0]) if head.attributes.get("transA") else (given[0], given[1])
    columns = shapes[head.outputs[0]][1]
    return {"macs": rows * columns * depth, "rows": rows, "columns": columns, "depth": depth, "groups": 1}


def _matmul(head: Operator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    left, right = shapes[head.given[0]], shapes[head.given[1]]
    outputs = math.prod(shapes[head.outputs[0]])
    depth, columns = left[-1], right[-1] if len(right) > 1 else 1
    groups = math.prod(right[:-2])
    rows = max(1, outputs // (columns * max(1, groups)))
    return {"macs": outputs * depth, "rows": rows, "columns": columns, "depth": depth, "groups": max(1, groups)}


def _einsum(head: Operator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Every combination of all indices is one product."""
    terms = str(head.attributes.get("equation", "")).replace(" ", "").partition("->")[0].split(",")
    sizes = {
        letter: side
        for term, name in zip(terms, head.given, strict=True)
        for letter, side in zip(term, shapes[name], strict=True)
    }
    macs, outputs = math.prod(sizes.values()), math.prod(shapes[head.outputs[0]])
    columns = shapes[head.outputs[0]][-1] if shapes[head.outputs[0]] else 1
    return {"macs": macs, "rows": outputs // columns, "columns": columns, "depth": macs // outputs, "groups": 1}
