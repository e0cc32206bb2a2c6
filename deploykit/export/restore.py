"""Patterns that the exporters write for one operator, put back as the field's own operator.

Each function looks at one node, and changes the graph only where the operator gives the same answers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

# What only moves numbers on their way through the window over channels.
_MOVING = ("Reshape", "Squeeze", "Unsqueeze", "Pad", "AveragePool", "Identity", "If")


def operators(graph: ir.Graph) -> None:
    """Restore the field's own operators, in place.

    The exporter writes global pooling as ReduceMean over a constant and flattening as Reshape; ONNX Runtime and TensorRT
    have int8 kernels for GlobalAveragePool and none for ReduceMean. GELU comes as x * (0.5 * (1 + erf)), which ONNX
    Runtime's fusion does not know, and LocalResponseNorm as an average pool over channels.
    """
    for op, restore in (
        ("ReduceMean", _restore_global_pool),
        ("Reshape", _restore_flatten),
        ("Erf", _restore_gelu),
        ("Div", _restore_local_response_norm),
    ):
        for node in list(graph):
            if node.op_type == op and node.graph is graph:
                restore(graph, node)


def _restore_global_pool(graph: ir.Graph, node: ir.Node) -> None:
    """ReduceMean over both spatial axes of a 4-D tensor -> GlobalAveragePool (-> Flatten without keepdims)."""
    source, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if source is None or source.shape is None or len(source.shape) != 4 or axes is None or axes.const_value is None:
        return
    if sorted(int(axis) % 4 for axis in axes.const_value.numpy().reshape(-1)) != [2, 3]:
        return
    old = node.outputs[0]
    new = [ir.node("GlobalAveragePool", [source], metadata_props=dict(node.metadata_props))]
    pooled = new[0].outputs[0]
    pooled.type, pooled.shape = old.type, ir.Shape([source.shape[0], source.shape[1], 1, 1])
    if not node.attributes.get_int("keepdims", 1):
        new.append(ir.node("Flatten", [pooled], {"axis": 1}, metadata_props=dict(node.metadata_props)))
    _replace(graph, node, new)


def _restore_flatten(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape to (batch, everything else) -> Flatten, which passes any batch and is transparent to int8."""
    source, new_shape = node.inputs[0], node.outputs[0].shape
    if source is None or source.shape is None or new_shape is None or len(new_shape) != 2:
        return
    rest = source.shape[1:]
    sizes = [size for size in rest if isinstance(size, int)]
    if source.shape[0] == new_shape[0] and len(sizes) == len(rest) and math.prod(sizes) == new_shape[1]:
        _replace(graph, node, [ir.node("Flatten", [source], {"axis": 1}, metadata_props=dict(node.metadata_props))])


def _restore_gelu(graph: ir.Graph, erf: ir.Node) -> None:
    """x * (0.5 * (1 + erf(x / sqrt 2))) -> (x * (1 + erf(...))) * 0.5: the same bits, for halving is exact, in the order in
    which runtimes look for a GELU."""
    add = _only_reader(erf, "Add")
    half = None if add is None else _only_reader(add, "Mul")
    outer = None if half is None else _only_reader(half, "Mul")
    if add is None or half is None or outer is None:
        return
    (factor,) = [value for value in half.inputs if value is not add.outputs[0]]
    (source,) = [value for value in outer.inputs if value is not half.outputs[0]]
    if factor is None or factor.const_value is None or factor.const_value.numpy().tolist() not in (0.5, [0.5]):
        return
    inner = ir.node("Mul", [source, add.outputs[0]], metadata_props=dict(half.metadata_props))
    inner.outputs[0].type, inner.outputs[0].shape = half.outputs[0].type, outer.outputs[0].shape
    last = ir.node("Mul", [inner.outputs[0], factor], metadata_props=dict(outer.metadata_props))
    _replace(graph, outer, [inner, last])
    graph.remove(half, safe=True)


def _only_reader(node: ir.Node, op: str) -> ir.Node | None:
    """The one node that reads a result, where there is just one and it is such an operator; one that reads it twice is two."""
    readers = list(node.outputs[0].uses())
    if len(readers) != 1 or node.outputs[0].is_graph_output():
        return None
    reader = readers[0].node
    return reader if reader.op_type == op and len(reader.inputs) == 2 else None


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    old, result = node.outputs[0], new[-1].outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    graph.insert_after(node, new)
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = result
    old.replace_all_uses_with(result)
    graph.remove(node, safe=True)


def _restore_local_response_norm(graph: ir.Graph, div: ir.Node) -> None:
    """x / (k + alpha * average of x * x over `size` channels) ** beta -> LRN, whose sum over channels is divided by `size` too.

    PyTorch's window (torch.nn.functional.local_response_norm) begins size // 2 channels before, ONNX's floor((size - 1) / 2):
    they are the same where the size is odd, and others stay as they are.
    """
    x, divisor = div.inputs
    power = _producer(divisor, "Pow")
    add = None if power is None else _producer(power.inputs[0], "Add")
    scale = None if add is None else _producer(add.inputs[0], "Mul")
    if x is None or power is None or add is None or scale is None:
        return
    beta, bias, alpha = (_scalar(node.inputs[1]) for node in (power, add, scale))
    size = _channels_averaged(scale.inputs[0], x)
    if beta is None or bias is None or alpha is None or not size:
        return
    attributes = {"alpha": alpha, "beta": beta, "bias": bias, "size": size}
    _replace(graph, div, [ir.node("LRN", [x], attributes, metadata_props=dict(div.metadata_props))])


def _channels_averaged(value: ir.Value | None, x: ir.Value) -> int:
    """Over how many channels, centred and padded with zeros, `value` averages x * x; 0 where it is something else."""
    node = None if value is None else value.producer()
    passed = []
    while node is not None and node.op_type in _MOVING:
        passed.append(node)
        value = _squeezed(node) if node.op_type == "If" else node.inputs[0]
        node = None if value is None else value.producer()
    windows = [each for each in passed if each.op_type in ("AveragePool", "Pad")]
    is_square = node is not None and node.op_type == "Mul" and list(node.inputs) == [x, x]
    if not is_square or [each.op_type for each in windows] != ["AveragePool", "Pad"]:
        return 0
    pool, pad = windows
    size = _window(pool)
    is_centred = bool(size % 2) and pool.inputs[0] is pad.outputs[0] and _pads_channels(pad, size // 2)
    return size if is_centred and _has_channels_third(pad.inputs[0], x) else 0


def _window(pool: ir.Node) -> int:
    """The size of a window that moves by one over the first of three spatial axes alone; 0 for any other."""
    kernel = list(pool.attributes.get_ints("kernel_shape") or ())
    steps = {*(pool.attributes.get_ints("strides") or (1,)), *(pool.attributes.get_ints("dilations") or (1,))}
    is_plain = steps == {1} and not any(pool.attributes.get_ints("pads") or ())
    is_plain = is_plain and pool.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return kernel[0] if is_plain and kernel[1:] == [1, 1] else 0


def _pads_channels(pad: ir.Node, half: int) -> bool:
    """Whether a 5-D tensor gets so many zeros on both sides of its third axis, and nothing else."""
    pads, value, axes = (*pad.inputs[1:], None, None, None)[:3]
    is_zero = value is None or _scalar(value) == 0
    if pads is None or axes is not None or not is_zero or pad.attributes.get_string("mode", "constant") != "constant":
        return False
    return _numbers(pads) == [0, 0, half, 0, 0] * 2


def _has_channels_third(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether `value` is x (N, C, H, W) as (N, 1, C, ...): with the same numbers in the same order, that is the same layout."""
    if value is None or value.shape is None or x.shape is None or len(x.shape) != 4 or len(value.shape) != 5:
        return False
    return isinstance(x.shape[1], int) and list(value.shape[:3]) == [x.shape[0], 1, x.shape[1]]


def _numbers(value: ir.Value) -> list[int] | None:
    """The whole numbers that a value holds which depends on constants alone; None for any other.

    The legacy exporter computes what it pads by from constants, and the optimizer leaves such a chain as it is.
    """
    if value.const_value is not None:
        return [int(each) for each in value.const_value.numpy().reshape(-1)]
    graph, known = value.graph, _constant_part(value)
    if not isinstance(graph, ir.Graph) or known is None:
        return None
    nodes, constants = known
    made = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "constants",
        [],
        [onnx.helper.make_tensor_value_info(value.name or "", onnx.TensorProto.INT64, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", graph.opset_imports[""])
    (found,) = ReferenceEvaluator(onnx.helper.make_model(made, opset_imports=[opset])).run(None, {})
    return [int(each) for each in np.asarray(found).reshape(-1)]


def _constant_part(value: ir.Value) -> tuple[list[ir.Node], dict[str, NDArray[Any]]] | None:
    """The nodes that make a value, in order, and the constants that they read, by name; None where they read an input."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, NDArray[Any]] = {}

    def visit(wanted: ir.Value) -> bool:
        node = wanted.producer()
        if wanted.const_value is not None:
            constants[wanted.name or ""] = wanted.const_value.numpy()
        elif node is None or not all(visit(each) for each in node.inputs if each is not None):
            return False
        else:
            nodes[node] = None
        return True

    return (list(nodes), constants) if visit(value) else None


def _squeezed(node: ir.Node) -> ir.Value | None:
    """What the legacy exporter's `If`, one for each squeeze, squeezes in one branch and passes on in the other."""
    branches = [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]
    read = {inner.inputs[0] for branch in branches for inner in branch if inner.op_type in ("Squeeze", "Identity")}
    return read.pop() if len(read) == 1 else None


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that makes a value, where it is such an operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def _scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(-1)[0])
