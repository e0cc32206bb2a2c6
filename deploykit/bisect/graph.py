"""An ONNX graph as bisection needs it: its float tensors, what lies between two of them, and graphs made from both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from deploykit.errors import UsageError, printable
from deploykit.runtimes import onnx_nodes
from deploykit.runtimes.onnx_nodes import MODULE_KEY

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
TRANSPARENT = frozenset({QUANTIZE, DEQUANTIZE, "Identity"})
_GIVEN, _CURED = "/given", "/reference"


@dataclass(frozen=True)
class Graph:
    """A model with shapes inferred. Nothing of it is changed; what is made from it is a copy."""

    proto: onnx.ModelProto
    path: Path

    @cached_property
    def producers(self) -> Mapping[str, onnx.NodeProto]:
        """The node that gives each tensor."""
        return {name: node for node in self.proto.graph.node for name in node.output if name}

    @cached_property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Initializers, Constant nodes, and what Q/DQ makes of them."""
        found = {value.name: numpy_helper.to_array(value) for value in self.proto.graph.initializer}
        for node in self.proto.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type in TRANSPARENT and all(name in found for name in node.input if name) and not _is_blockwise(node):
                found[node.output[0]] = _computed(node, [found[name] for name in node.input if name])
        return found

    @cached_property
    def types(self) -> Mapping[str, onnx.TypeProto.Tensor]:
        """Of the tensors that depend on the input, as far as shape inference came: it ends where shapes contradict each other."""
        values = (*self.proto.graph.input, *self.proto.graph.value_info, *self.proto.graph.output)
        return {value.name: value.type.tensor_type for value in values if value.name not in self.constants}

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Number of dimensions of the float32 tensors, where it is known."""
        floats = {name: kind for name, kind in self.types.items() if kind.elem_type == onnx.TensorProto.FLOAT}
        return {name: len(kind.shape.dim) for name, kind in floats.items() if kind.HasField("shape")}

    def may_be_float(self, tensor: str) -> bool:
        """Whether there is such a tensor, and nothing says that it is not float32."""
        known = self.types.get(tensor)
        there = known is not None or (tensor in self.producers and tensor not in self.constants)
        return there and (known is None or known.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED))

    @property
    def opsets(self) -> Mapping[str, int]:
        """The version of each domain of operators."""
        return {_domain(imported.domain): imported.version for imported in self.proto.opset_import}

    @property
    def inputs(self) -> list[str]:
        """The inputs, without the initializers that old files list among them."""
        stored = {value.name for value in self.proto.graph.initializer}
        return [value.name for value in self.proto.graph.input if value.name not in stored]

    @property
    def outputs(self) -> list[str]:
        """The outputs."""
        return [value.name for value in self.proto.graph.output]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of one image as the first input has it, 0 for what is dynamic."""
        return tuple(int(size.dim_value) for size in self.proto.graph.input[0].type.tensor_type.shape.dim[1:])

    @property
    def batch(self) -> int | None:
        """The size of a batch where it is fixed."""
        dimensions = self.proto.graph.input[0].type.tensor_type.shape.dim
        return int(dimensions[0].dim_value) or None if dimensions else None

    def node_of(self, tensor: str) -> onnx.NodeProto:
        """The operator that computes a tensor: behind it only Q/DQ."""
        node = self.producers[tensor]
        while node.op_type in TRANSPARENT and node.input[0] in self.producers:
            node = self.producers[node.input[0]]
        return node

    def cone(self, tensor: str, anchors: Collection[str]) -> list[onnx.NodeProto]:
        """What computes `tensor` from `anchors` and constants, in the order of the graph."""
        wanted, names = [tensor], set()
        while wanted:
            node = self.producers.get(wanted.pop())
            if node is not None and node.output[0] not in names:
                names.add(node.output[0])
                wanted += [name for name in node.input if name and name not in anchors]
        return [node for node in self.proto.graph.node if node.output[0] in names]


def read(path: Path, *, like: Graph | None = None) -> Graph:
    """The graph at `path`, in which each node has a name of its own: that of the node of `like` which gives the same tensor by
    the same operator, else its own, else that of its first output. Names are optional in ONNX, and may be there twice.

    Raises UsageError when it is no ONNX file, keeps its weights in other files, or has Q/DQ that are not understood.
    """
    outside = onnx_nodes.external_tensors(path)
    if outside:
        why = f"{len(outside)} tensors, the first of them {printable(outside[0])}, lie in other files"
        raise UsageError(f"cannot bisect {printable(path)}", why=why, fix="save it as one file")
    proto = onnx.load(path, load_external_data=False)
    # What a file says about its shapes may be as wrong as the rest of it.
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = Graph(onnx.shape_inference.infer_shapes(proto), path)
    _name(graph, like)
    _check_quantization(graph)
    return graph


def _name(graph: Graph, like: Graph | None) -> None:
    nodes = {node.output[0]: node for node in graph.proto.graph.node}
    names = {} if like is None else _names_of(graph, like)
    times, taken = Counter(node.name for node in nodes.values()), set(names.values())
    own = {output: node.name for output, node in nodes.items() if times[node.name] == 1 and node.name not in {"", *taken}}
    names = {**own, **names}
    taken = set(names.values())
    for output, node in nodes.items():
        if output not in names:
            names[output] = next(name for name in chain([output], (f"{output}_{n}" for n in count(2))) if name not in taken)
            taken.add(names[output])
        node.name = names[output]


def _names_of(graph: Graph, like: Graph) -> dict[str, str]:
    """The names of those nodes of `like` that `graph` has too, by their first output here: same tensor, same operator."""
    found: dict[str, str] = {}
    for tensor in like.producers:
        if tensor in graph.producers:
            node, named = graph.node_of(tensor), like.node_of(tensor)
            if node.op_type == named.op_type and named.name not in found.values():
                found.setdefault(node.output[0], named.name)
    return found


def _check_quantization(graph: Graph) -> None:
    """Raises UsageError with every QuantizeLinear and DequantizeLinear whose steps cannot be told."""
    problems = []
    for node in graph.proto.graph.node:
        if node.op_type not in (QUANTIZE, DEQUANTIZE):
            continue
        given = [name for name in node.input[1:] if name]
        computed = [name for name in given if name not in graph.constants]
        if _is_blockwise(node):
            problems.append(f"{printable(node.name)} has a scale for each block of values")
        elif computed:
            problems.append(f"{printable(node.name)} has the scale or zero point {printable(computed[0])}, which is computed")
        elif node.op_type == QUANTIZE:
            kind = quantized_type(node, graph.constants[given[1]] if len(given) > 1 else None)
            if not np.issubdtype(kind, np.integer):
                problems.append(f"{printable(node.name)} quantizes to {kind}")
    if problems:
        why = "what rounding explains follows from constant scales, of tensors or channels, and integers of 8 bits or more"
        fix = "quantize it with such scales"
        raise UsageError(f"cannot bisect {printable(graph.path)}", problems=problems, why=why, fix=fix)


def quantized_type(node: onnx.NodeProto, zero_point: NDArray[Any] | None) -> np.dtype[Any]:
    """What a QuantizeLinear gives: the type of its zero point, else what its attribute `output_dtype` says (opset 21), else
    uint8."""
    if zero_point is not None:
        return zero_point.dtype
    declared = attributes(node).get("output_dtype", 0)
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(declared) if declared else np.uint8)


def _is_blockwise(node: onnx.NodeProto) -> bool:
    return bool(attributes(node).get("block_size", 0))


def common(a: Graph, b: Graph) -> list[str]:
    """The float tensors that both have under one name, in A's order, the inputs first.

    Raises UsageError when inputs or outputs are others, or most of A's tensors are not in B.
    """
    problems = [
        f"{what}: {printable(', '.join(mine))} in {printable(a.path)}, {printable(', '.join(theirs))} in {printable(b.path)}"
        for what, mine, theirs in (("inputs", a.inputs, b.inputs), ("outputs", a.outputs, b.outputs))
        if mine != theirs
    ]
    if len(a.inputs) != 1:
        problems.append(f"{printable(a.path)} has {len(a.inputs)} inputs, and only one can be fed with images")
    if any(mine and theirs and mine != theirs for mine, theirs in zip(a.sizes, b.sizes, strict=False)):
        problems.append(f"one input is {a.sizes} in {printable(a.path)}, {b.sizes} in {printable(b.path)}; 0 is any size")
    if None not in (a.batch, b.batch) and a.batch != b.batch:
        problems.append(f"batches of {a.batch} in {printable(a.path)}, of {b.batch} in {printable(b.path)}")
    order = [*a.inputs, *(name for node in a.proto.graph.node for name in node.output)]
    computed = [name for name in order if name in a.ranks and name in a.producers]
    found = [name for name in order if name in a.ranks and b.may_be_float(name)]
    shared = [name for name in computed if b.may_be_float(name)]
    if 2 * len(shared) < len(computed) or not shared:
        problems.append(f"{len(shared)} of the {len(computed)} float32 tensors of {printable(a.path)} have their names in both")
    if problems:
        fix = "compare a graph with one that was made from it"
        raise UsageError("these are not two forms of one network", problems=problems, fix=fix)
    return found


def exposing(graph: Graph, tensors: Sequence[str]) -> bytes:
    """The graph with `tensors` as outputs."""
    model = _copy(graph)
    known = set(graph.outputs)
    model.graph.output.extend(_value(name, None) for name in tensors if name in graph.producers and name not in known)
    content: bytes = model.SerializeToString()
    return content


def alone(
    graph: Graph, anchors: Sequence[str], ranks: Mapping[str, int], tensors: Sequence[str] | None = None
) -> tuple[bytes, dict[str, str]]:
    """Every layer of the graph by itself: whoever reads one of `anchors` reads an input of that value instead, and what was
    computed for it is an output. Also returns the names of those inputs, by anchor. `ranks` are the anchors' dimensions.

    With `tensors`, some of the anchors, only the layers that give these are there.
    """
    model = _copy(graph) if tensors is None else _only(graph, tensors, anchors)
    del model.graph.input[:]
    del model.graph.output[:]
    named = {name: f"{name}{_GIVEN}" for name in anchors}
    read_ones: dict[str, None] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in named:
                node.input[index] = named[name]
                read_ones[name] = None
    model.graph.input.extend(_value(named[name], ranks[name]) for name in read_ones)
    given = anchors if tensors is None else tensors
    model.graph.output.extend(_value(name, None) for name in given if name in graph.producers)
    return model.SerializeToString(), {name: named[name] for name in read_ones}


def other_opsets(a: Graph, b: Graph) -> str:
    """Why nodes of A would be others in B: the versions of its operators, where B has not the same. Empty when it has."""
    used = sorted({_domain(node.domain) for node in a.proto.graph.node})
    apart = [domain for domain in used if a.opsets.get(domain) != b.opsets.get(domain)]
    told = (f"{domain or 'ONNX'} opset {a.opsets.get(domain)} and {b.opsets.get(domain) or 'none'}" for domain in apart)
    return f"the graphs have {printable(', '.join(told))}, in which the same node may mean something else" if apart else ""


def cured(a: Graph, b: Graph, tensors: Sequence[str], anchors: Collection[str]) -> bytes:
    """B, in which `tensors` are computed from its other tensors as in A: with its nodes, weights and attributes, without Q/DQ."""
    model = _copy(b)
    nodes = {tensor: [_renamed(node, anchors) for node in a.cone(tensor, anchors)] for tensor in tensors}
    read_ones = {name for copied in nodes.values() for node in copied for name in node.input}
    for value in a.proto.graph.initializer:
        if f"{value.name}{_CURED}" in read_ones:
            model.graph.initializer.add().CopyFrom(value)
            model.graph.initializer[-1].name = f"{value.name}{_CURED}"
    kept: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        ours = [copied for tensor in tensors if tensor in node.output for copied in nodes[tensor]]
        kept.update((copied.output[0], copied) for copied in ours or [node])
    listed = list(kept.values())
    del model.graph.node[:]
    model.graph.node.extend(listed)
    content: bytes = model.SerializeToString()
    return content


def _renamed(node: onnx.NodeProto, anchors: Collection[str]) -> onnx.NodeProto:
    """A copy whose name and tensors, but for the anchors, are nobody else's."""
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    copied.name = f"{node.name}{_CURED}"
    copied.input[:] = [f"{name}{_CURED}" if name and name not in anchors else name for name in node.input]
    copied.output[:] = [f"{name}{_CURED}" if name and name not in anchors else name for name in node.output]
    return copied


def module_of(node: onnx.NodeProto) -> str:
    """The PyTorch module path of a node: as our exporter wrote it down, else what stands before the operator in its name."""
    for entry in node.metadata_props:
        if entry.key == MODULE_KEY:
            return str(entry.value)
    return str(node.name).rpartition("/")[0]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes, texts as text."""
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def quantizers(graph: Graph, tensor: str, anchors: Collection[str]) -> Iterator[tuple[onnx.NodeProto, str]]:
    """The activation quantizers (QuantizeLinear, what it reads) that stand between `anchors` and `tensor`."""
    for node in graph.cone(tensor, anchors):
        if node.op_type == QUANTIZE and node.input[0] not in graph.constants:
            yield node, node.input[0]


def _computed(node: onnx.NodeProto, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if node.op_type == "Identity":
        return values[0]
    scale = values[1].astype(np.float32)
    zero_point = values[2].astype(np.float32) if len(values) > 2 else np.zeros_like(scale)
    if scale.ndim == 1:
        axis = int(attributes(node).get("axis", 1))
        shape = [-1 if index == axis % values[0].ndim else 1 for index in range(values[0].ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    if node.op_type == DEQUANTIZE:
        return ((values[0].astype(np.float32) - zero_point) * scale).astype(np.float32)
    type_of_it = quantized_type(node, values[2] if len(values) > 2 else None)
    if not np.issubdtype(type_of_it, np.integer):  # refused by `read`
        return values[0]
    kind = np.iinfo(type_of_it)
    integers: NDArray[Any] = np.clip(np.rint(values[0] / scale) + zero_point, kind.min, kind.max)
    return integers.astype(kind.dtype)


def _only(graph: Graph, tensors: Collection[str], anchors: Collection[str]) -> onnx.ModelProto:
    """A copy with what computes `tensors` from `anchors`, and nothing else."""
    proto = graph.proto
    nodes = {node.output[0]: node for tensor in tensors for node in graph.cone(tensor, anchors)}
    read_ones = {name for node in nodes.values() for name in node.input}
    model = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    model.graph.name = proto.graph.name
    model.graph.initializer.extend(value for value in proto.graph.initializer if value.name in read_ones)
    model.graph.node.extend(node for node in proto.graph.node if node.output[0] in nodes)
    return model


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _value(name: str, rank: int | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None if rank is None else [None] * rank)


def _copy(graph: Graph) -> onnx.ModelProto:
    """Without its inferred shapes, which are not those of what is made from it."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    del model.graph.value_info[:]
    return model
