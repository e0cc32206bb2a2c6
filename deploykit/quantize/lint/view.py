"""A Q/DQ graph as the rules see it: what is constant, what a tensor was quantized with, who reads what."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
from numpy.typing import NDArray

from deploykit.errors import UsageError, printable
from deploykit.intake import door
from deploykit.quantize import place

Q, DQ = "QuantizeLinear", "DequantizeLinear"
# Operators whose results are values that went in: they run on integers as they are.
PASSING = frozenset({"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Identity"})
ACTIVATIONS = frozenset({"Relu", "Clip"})
_STANDARD = ("", "ai.onnx")
_MICROSOFT = "com.microsoft"  # where onnxruntime puts 16-bit Q/DQ below opset 21
_INTEGER_OPS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "DynamicQuantizeMatMul"})
_NUMBERS = "iufbV"  # V: int4, bfloat16 and float8 of ml_dtypes
_CASTABLE = frozenset(ir.DataType) - {ir.DataType.UNDEFINED, ir.DataType.STRING}
_LONGEST_CHAIN = 64  # of Identity and Cast; a bound, because a damaged file may hold a cycle


@dataclass(frozen=True)
class View:
    """One model: its nodes in order, those of subgraphs and functions after the node or graph that holds them.

    constants: tensors computed from constants alone. depth: layers between the inputs and a tensor.
    float_type: of most floating-point constants that are no scales; None when there are none.
    """

    nodes: tuple[ir.Node, ...]
    opset: int
    constants: frozenset[ir.Value]
    depth: dict[ir.Value, int]
    float_type: ir.DataType | None


def look(model: ir.Model) -> View:
    """The view of `model`, into which types and shapes are inferred where that is possible."""
    # Neither strict nor type checking: a file that breaks ONNX's own rules is to be judged as far as it goes.
    onnx_ir.passes.common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    nodes = tuple(_all_nodes(model))
    constants: set[ir.Value] = set()
    depth: dict[ir.Value, int] = {}
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in constants or value.is_initializer() for value in inputs) and (inputs or op(node) == "Constant"):
            constants.update(node.outputs)
        before = max((depth.get(value, 0) for value in inputs), default=0)
        depth.update(dict.fromkeys(node.outputs, before + (op(node) in place.LAYERS)))
    opset = max((version for domain, version in model.opset_imports.items() if domain in _STANDARD), default=0)
    return View(nodes, opset, frozenset(constants), depth, _float_type(nodes))


def load(source: Path | onnx.ModelProto) -> ir.Model:
    """Read a file, or a model that is left as it is. Raises UsageError when it is not ONNX or cannot be read."""
    try:
        if isinstance(source, Path):
            door.onnx_file(source)
        model = ir.load(source) if isinstance(source, Path) else ir.from_proto(source)
        if not model.ir_version:
            raise ValueError("it has no IR version, so it is empty or something else")
    except UsageError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise classes without a common base for a file that is not ONNX
        what = printable(source) if isinstance(source, Path) else "the model"
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{what} is not an ONNX file that can be read", why=why) from error
    return model


def op(node: ir.Node) -> str:
    """The operator, with its domain unless that is ONNX's own; Microsoft's Q/DQ mean what ONNX's mean."""
    if node.domain in _STANDARD or (node.domain == _MICROSOFT and node.op_type in (Q, DQ)):
        return node.op_type
    return f"{node.domain}.{node.op_type}"


def name(node: ir.Node) -> str:
    """What the file calls a node; an unnamed one is told by its operator and its first named output."""
    named = next((value.name for value in node.outputs if value.name), "")
    return node.name or f"{node.op_type} -> {named or 'nothing'}"


def is_integer_op(node: ir.Node) -> bool:
    """Operators that take or make integers themselves: QLinearConv and kin, ConvInteger, DynamicQuantizeLinear."""
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS


def is_constant(view: View, value: ir.Value | None) -> bool:
    """Whether a tensor is known before the first input arrives."""
    return value is not None and (value in view.constants or value.is_initializer())


def is_layer(view: View, node: ir.Node) -> bool:
    """A Conv, a Gemm or a MatMul whose weights are constant, through Q/DQ or not."""
    return op(node) in place.LAYERS and is_constant(view, at(node, 1))


def at(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where the node has none there."""
    return node.inputs[index] if index < len(node.inputs) else None


def array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The numbers of a constant, seen through Identity and Cast; None when it is none, or holds something else.

    Raises UsageError when the file keeps them in another file that cannot be read.
    """
    casts: list[ir.DataType] = []
    for _ in range(_LONGEST_CHAIN):
        if value is None:
            return None
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return _elements(tensor, casts)
        producer = value.producer()
        if producer is None or op(producer) not in ("Identity", "Cast"):
            return None
        if op(producer) == "Cast":
            casts.append(ir.DataType(producer.attributes.get_int("to", 0)))
        value = at(producer, 0)
    return None


def dtype(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a tensor as far as the file says it, directly or by a constant."""
    if value is None:
        return None
    if value.dtype is not None:
        return value.dtype
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.dtype


def shape(value: ir.Value | None) -> list[int | None] | None:
    """The sizes of a tensor, None for one that is not known; None for a tensor of unknown rank."""
    if value is None:
        return None
    known = value.shape
    if known is None:
        tensor = ir.convenience.get_const_tensor(value)
        known = None if tensor is None else ir.Shape(tensor.shape.numpy())
    return None if known is None else [size if isinstance(size, int) else None for size in known]


def quantized_type(node: ir.Node) -> ir.DataType | None:
    """The integers of a Q or DQ: its zero point's type, its data's, the attribute `output_dtype`; ONNX's default is uint8."""
    stated = dtype(at(node, 2))
    if stated is not None or op(node) == DQ:
        return stated or dtype(at(node, 0)) or (quantized_type(source) if (source := quantizer(node)) is not None else None)
    attribute = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(attribute) if attribute else ir.DataType.UINT8


def quantizer(node: ir.Node) -> ir.Node | None:
    """The Q in front of a DQ; None when it reads stored integers or something else."""
    producer = _producer(at(node, 0))
    return producer if producer is not None and op(producer) == Q else None


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DQ that makes this tensor; None when something else does."""
    producer = _producer(value)
    return producer if producer is not None and op(producer) == DQ else None


def original(value: ir.Value | None) -> ir.Value | None:
    """The float tensor in front of a Q/DQ pair; the tensor itself when there is none."""
    dequantize = dequantizer(value)
    if dequantize is None:
        return value
    quantize = quantizer(dequantize)
    return at(dequantize if quantize is None else quantize, 0)


def made_by(value: ir.Value | None) -> str:
    """The operator that makes a tensor; empty for an input or a constant."""
    producer = _producer(value)
    return "" if producer is None else op(producer)


def heads(node: ir.Node) -> bool:
    """Whether a node is the place where parameters are judged: a Q, or a DQ without one; the DQ of a pair repeats its Q."""
    return op(node) == Q or (op(node) == DQ and quantizer(node) is None)


def same_parameters(first: ir.Node, second: ir.Node) -> bool:
    """Whether two Q or DQ nodes agree in type, scale and zero point, and in axis where that matters."""
    if quantized_type(first) != quantized_type(second):
        return False
    if not _equal(at(first, 1), at(second, 1)) or not _equal(at(first, 2), at(second, 2), zero=True):
        return False
    return not is_per_channel(first) or axis(first) == axis(second)


def is_per_channel(node: ir.Node) -> bool:
    """Whether the scale of a Q or DQ has more than one element."""
    sizes = shape(at(node, 1))
    return bool(sizes) and sizes != [1]


def axis(node: ir.Node) -> int | None:
    """The axis of a per-channel Q or DQ, counted from the front where the rank is known."""
    counted = node.attributes.get_int("axis", 1)
    sizes = shape(at(node, 0))
    return counted + len(sizes) if sizes is not None and counted < 0 else counted


def readers(node: ir.Node) -> list[ir.Node]:
    """The nodes that read what this node makes first, each once, in the order of the file."""
    return list(dict.fromkeys(use.node for use in node.outputs[0].uses())) if node.outputs else []


def is_answer(node: ir.Node) -> bool:
    """Whether what a node makes first leaves the graph."""
    return bool(node.outputs) and node.outputs[0].is_graph_output()


def reached(node: ir.Node, through: Collection[str]) -> list[ir.Node]:
    """The first nodes behind `node` that are not of the operators `through`."""
    found: dict[ir.Node, None] = {}
    seen, left = {node}, [node]
    while left:
        for reader in readers(left.pop()):
            if op(reader) not in through:
                found[reader] = None
            elif reader not in seen:
                seen.add(reader)
                left.append(reader)
    return list(found)


def is_quantized_later(node: ir.Node, through: Collection[str] = ACTIVATIONS) -> bool:
    """Whether the result of a node reaches a Q through nothing but the operators `through`."""
    return any(op(reader) == Q for reader in reached(node, through))


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def _float_type(nodes: tuple[ir.Node, ...]) -> ir.DataType | None:
    counts: dict[ir.DataType, int] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            is_parameter = op(node) in (Q, DQ) and index > 0
            if value is not None and value.is_initializer() and not is_parameter:
                kind = dtype(value)
                if kind in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                    counts[kind] = counts.get(kind, 0) + 1
    return max(counts, key=lambda kind: counts[kind]) if counts else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _elements(tensor: ir.TensorProtocol, casts: list[ir.DataType]) -> NDArray[np.generic] | None:
    try:
        found: NDArray[np.generic] = tensor.numpy()
    except (OSError, ValueError) as error:
        raise UsageError(f"the elements of {tensor.name!r} cannot be read", why=str(error)) from error
    if found.dtype.kind not in _NUMBERS or not set(casts) <= _CASTABLE:
        return None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for kind in reversed(casts):
            found = found.astype(kind.numpy())
    return found


def _equal(first: ir.Value | None, second: ir.Value | None, *, zero: bool = False) -> bool:
    """Whether two parameters are one tensor or have the same elements; with `zero` an omitted one is zeros."""
    if first is second:
        return True
    one, other = array(first), array(second)
    if zero and (one is None) != (other is None):
        missing = first if one is None else second
        present = other if one is None else one
        return missing is None and present is not None and not np.any(present.astype(np.int64))
    if one is None or other is None:
        return False
    return np.array_equal(one.ravel().astype(np.float64), other.ravel().astype(np.float64), equal_nan=True)
