"""Where Q/DQ goes: a plan made from the graph and a runtime's rules. Nothing is changed here; `insert` does that.

A *layer* is a Conv, a Gemm, or a MatMul with constant weights. Its input is quantized, and by rule also its output,
taken after a Relu or Clip that the runtime fuses into the quantization. Operators that only pass values on (MaxPool,
Reshape, ...) share one scale between input and output, so that they run on the integers as they are. An Add, Concat or
average pool runs in int8 only where it stands between int8 neighbours; elsewhere quantizing it costs accuracy and
time for nothing. So does a Mul of a map by its gate (squeeze-and-excite), where the rules say so: the gate has one value for
each channel, and its rounding is a small factor on the whole channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from deploykit.errors import UsageError
from deploykit.runtimes import QdqRules

KEPT = "as the recipe asks"
LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
FUSED = frozenset({"Relu", "Clip"})
# Input 0 is the only activation; the values that come out are values that went in (or a pad's zero).
_PASSING = frozenset({"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Identity"})
_POOLS = frozenset({"GlobalAveragePool", "AveragePool"})
_JOINING = frozenset({"Add", "Concat", "Mul"})
_BETWEEN = _JOINING | _POOLS


@dataclass(frozen=True)
class LayerPlan:
    """One layer: whether it is to run in int8, and the reason when not."""

    name: str
    op: str
    int8: bool
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """What will be quantized. `uses` maps a tensor to the (node, input index) pairs that read its DQ; `groups` maps it to
    the name that stands for all tensors sharing its scale; `kernels` are the nodes that are to run on integers."""

    layers: tuple[LayerPlan, ...]
    uses: Mapping[str, tuple[tuple[ir.Node, int], ...]]
    groups: Mapping[str, str]
    kernels: frozenset[ir.Node]


def plan(graph: ir.Graph, rules: QdqRules, keep_float: Sequence[str] = ()) -> Plan:
    """Decide by `rules` what of `graph` is quantized; nothing is changed yet.

    `keep_float` are names or patterns (`layer4.*`) of layers that are to stay in float. Raises UsageError when one of them
    fits no layer.
    """
    nodes = [node for node in graph if _is_layer(node)]
    unknown = [pattern for pattern in keep_float if not any(fits(node.name or "", pattern) for node in nodes)]
    if unknown:
        names = ", ".join(str(node.name) for node in nodes[:5])
        raise UsageError("quantize.float_layers names no layer", problems=unknown, fix=f"layers are called {names}, ...")
    layers = [_judge(node, rules, keep_float) for node in nodes]
    int8 = {node for node, layer in zip(nodes, layers, strict=True) if layer.int8}
    quantized = {_input(node) for node in int8}
    wanting = _wanting(graph, int8, rules)
    if rules.outputs:
        # The integer products of a Gemm or MatMul come out as floats too, so only what an int8 layer reads needs a scale; but
        # a Relu behind one would be fused into a float kernel.
        sites = {site(node.outputs[0]) for node in int8 if node.op_type == "Conv" or site(node.outputs[0]) is not node.outputs[0]}
        quantized |= {value for value in sites if not value.is_graph_output() and not _may_be_float(value, rules, wanting)}
    between = {node for node in graph if node.op_type in _BETWEEN and node in wanting}
    if not rules.outputs:
        # Only inputs carry Q/DQ: whatever an int8 neighbour reads is quantized where it is read.
        return _plan_inputs(graph, rules, layers, int8, between)
    running = _spread(graph, quantized, between, wanting)
    groups = _Groups()
    for node in running:
        if node.op_type not in _PASSING:
            continue
        for output in node.outputs:
            groups.join(_input(node).name, site(output).name)
    if rules.share_concat_scale:
        for node in running:
            if node.op_type == "Concat":
                for value in _activations(node):
                    groups.join(value.name, site(node.outputs[0]).name)
    ordered = [value for value in (*graph.inputs, *(out for node in graph for out in node.outputs)) if value in quantized]
    uses = {value.name: tuple(value.uses()) for value in ordered}  # in graph order, so that the same graph gives the same file
    return Plan(tuple(layers), _named(uses), {name: groups.root(name) for name in _named(uses)}, frozenset({*int8, *running}))


def tensors(graph: ir.Graph, rules: Sequence[QdqRules], keep_float: Sequence[str] = ()) -> list[str]:
    """The activations whose ranges any of `rules` needs, in graph order, when the layers `keep_float` stay in float."""
    wanted = {name for rule in rules for name in plan(graph, rule, keep_float).uses}
    order = [value.name for value in graph.inputs] + [value.name for node in graph for value in node.outputs]
    return [name for name in order if name in wanted]


def claimed(decided: Plan) -> list[str]:
    """Names of the layers that the plan says run in int8."""
    return [layer.name for layer in decided.layers if layer.int8]


def _is_layer(node: ir.Node) -> bool:
    """A product of two activations, as in attention, is a MatMul but no layer: there are no weights to quantize."""
    if node.op_type != "MatMul":
        return node.op_type in LAYERS
    return node.inputs[1] is not None and node.inputs[1].const_value is not None


def _judge(node: ir.Node, rules: QdqRules, keep_float: Sequence[str]) -> LayerPlan:
    name = node.name or ""
    chosen = any(fits(name, pattern) for pattern in keep_float)
    why = KEPT if chosen else _why_float(node, rules)
    return LayerPlan(name, node.op_type, not why, why)


def fits(name: str, pattern: str) -> bool:
    """A name fits itself, brackets and all."""
    return name == pattern or fnmatchcase(name, pattern)


def output_axis(node: ir.Node) -> int:
    """The axis of a layer's weights that counts its output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB")):
        return 0
    return 1


def is_depthwise(node: ir.Node) -> bool:
    """Whether each channel is convolved by itself."""
    weight = node.inputs[1]
    if node.op_type != "Conv" or weight is None or weight.shape is None:
        return False
    return weight.shape[1] == 1 and node.attributes.get_int("group", 1) == weight.shape[0] != 1


def _why_float(node: ir.Node, rules: QdqRules) -> str:
    """Why a layer cannot be quantized by these rules; empty when it can."""
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        return "its weights are computed in the graph, not constant"
    if node.op_type == "Gemm":
        alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        if alpha != 1 or beta != 1 or node.attributes.get_int("transA"):
            return "the int8 kernels know no alpha, beta or transposed input"
    if node.op_type == "MatMul" and len(weight.const_value.shape) != 2:
        return "the int8 kernels take a matrix as weights"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is None:
        return "its bias is computed in the graph, not constant"
    channels = weight.const_value.shape[output_axis(node)]
    if bias is not None and bias.const_value is not None and list(bias.const_value.shape) != [channels]:
        return "its bias is not one number for each output channel"
    if rules.outputs and not rules.float_results and node.op_type == "Conv" and site(node.outputs[0]).is_graph_output():
        return "its result is the network's output, and the int8 convolution needs a quantized one"
    return ""


def _plan_inputs(
    graph: ir.Graph, rules: QdqRules, layers: Sequence[LayerPlan], int8: set[ir.Node], between: set[ir.Node]
) -> Plan:
    """Rules that quantize where a value is read (TensorRT)."""
    uses: dict[str, list[tuple[ir.Node, int]]] = {}
    groups = _Groups()
    depth = _depths(graph)

    def read(node: ir.Node, index: int) -> str:
        value = node.inputs[index]
        assert value is not None
        assert value.name is not None
        uses.setdefault(value.name, []).append((node, index))
        return value.name

    for node in graph:
        if node in int8 or (node in between and node.op_type in _POOLS):
            read(node, 0)
        elif node in between and node.op_type == "Add":
            for index in (0, 1) if rules.add == "both" else (_skip_input(node, depth),):
                read(node, index)
        elif node in between and node.op_type == "Concat":
            names = [read(node, index) for index in range(len(node.inputs))]
            if rules.share_concat_scale:
                for name in names:
                    groups.join(name, site(node.outputs[0]).name)
    for node in graph:
        # A pool that hands on integers keeps their scale; the Q in front of it is needed only where a Concat follows.
        if node.op_type in _PASSING and _input(node).name in uses:
            for output in node.outputs:
                if site(output).name in uses:
                    groups.join(_input(node).name, site(output).name)
    roots, kernels = {name: groups.root(name) for name in uses}, frozenset(int8 | between)
    return Plan(tuple(layers), _named({k: tuple(v) for k, v in uses.items()}), roots, kernels)


def _spread(graph: ir.Graph, quantized: set[ir.Value], between: set[ir.Node], wanting: set[ir.Node]) -> list[ir.Node]:
    """Grow `quantized` along the graph through operators that run in int8 between int8 neighbours; returns these."""
    running = []
    for node in graph:
        passes = node.op_type in _PASSING and node in wanting and _input(node) in quantized
        joins = node in between and all(value in quantized or _is_gate(node, value) for value in _activations(node))
        if passes or joins:
            running.append(node)
            quantized.update(_activations(node), (site(output) for output in node.outputs))
    return running


def _wanting(graph: ir.Graph, int8: set[ir.Node], rules: QdqRules) -> set[ir.Node]:
    """Operators whose result reaches an int8 layer through nothing but operators that can run in int8."""
    wanting = set(int8)
    for node in reversed(list(graph)):
        if node.op_type in _PASSING | _BETWEEN and _is_between(node, rules):
            uses = [use for output in node.outputs for use in site(output).uses()]
            if any(use.node in wanting and _reads_activation(use.node, use.idx) for use in uses):
                wanting.add(node)
    return wanting


def _is_between(node: ir.Node, rules: QdqRules) -> bool:
    """An Add or Concat of activations alone, a Mul of a map by its gate, a Pad with zeros; the other operators always qualify."""
    if node.op_type == "Mul" and not (rules.gates and sum(_is_gate(node, value) for value in _activations(node)) == 1):
        return False
    if node.op_type in _JOINING:
        return len(_activations(node)) == len(node.inputs)
    if node.op_type == "Pad" and len(node.inputs) > 2 and (fill := node.inputs[2]) is not None:
        # Pooling is often padded with -inf, which no scale represents.
        return fill.const_value is not None and not fill.const_value.numpy().any()
    return True


def _may_be_float(result: ir.Value, rules: QdqRules, wanting: set[ir.Node]) -> bool:
    """Whether a Conv's result need not be quantized by these rules, because nothing reads it as integers."""
    return rules.float_results and not any(use.node in wanting for use in result.uses())


def _is_gate(node: ir.Node, value: ir.Value) -> bool:
    """Whether `value` is what a Mul multiplies whole channels with: one number for each, (N, C, 1, 1)."""
    return node.op_type == "Mul" and value.shape is not None and len(value.shape) == 4 and list(value.shape)[2:] == [1, 1]


def _reads_activation(node: ir.Node, index: int) -> bool:
    return index == 0 or node.op_type in _JOINING


def _activations(node: ir.Node) -> list[ir.Value]:
    if node.op_type in _JOINING:
        return [value for value in node.inputs if value is not None and value.const_value is None]
    return [_input(node)]


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def site(value: ir.Value) -> ir.Value:
    """Where a result is quantized: behind the one Relu or Clip that reads it, else at the result itself."""
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        reader, index = uses[0]
        if reader.op_type in FUSED and index == 0 and not _clips_below_zero(reader):
            return reader.outputs[0]
    return value


def _clips_below_zero(node: ir.Node) -> bool:
    """A Clip (Hardtanh) whose lower bound is not zero: rounding the zero point moves the range a little beyond it, and
    ONNX Runtime then keeps the Clip, which would stand between the layer and its quantization."""
    if node.op_type != "Clip":
        return False
    low = node.inputs[1] if len(node.inputs) > 1 else None
    return low is None or low.const_value is None or float(low.const_value.numpy()) != 0


def _skip_input(node: ir.Node, depth: Mapping[ir.Value, int]) -> int:
    """The residual's skip branch: the input that is not a layer's own result, else the one that took fewer layers."""
    producers = [value.producer() if value is not None else None for value in node.inputs]
    from_layer = [producer is not None and producer.op_type in LAYERS for producer in producers]
    if from_layer[0] != from_layer[1]:
        return from_layer.index(False)
    depths = [depth.get(value, 0) if value is not None else 0 for value in node.inputs]
    return 0 if depths[0] < depths[1] else 1


def _depths(graph: ir.Graph) -> dict[ir.Value, int]:
    """The largest number of layers between the graph's input and each value."""
    depth: dict[ir.Value, int] = {}
    for node in graph:
        before = max((depth.get(value, 0) for value in node.inputs if value is not None), default=0)
        for output in node.outputs:
            depth[output] = before + (node.op_type in LAYERS)
    return depth


def _named(uses: Mapping[str | None, tuple[tuple[ir.Node, int], ...]]) -> dict[str, tuple[tuple[ir.Node, int], ...]]:
    return {name: tuple((use[0], use[1]) for use in found) for name, found in uses.items() if name is not None and found}


class _Groups:
    """Disjoint sets of tensor names that must share one scale."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        while (above := self._parent.get(name, name)) != name:
            name = above
        return name

    def join(self, first: str | None, second: str | None) -> None:
        assert first is not None
        assert second is not None
        self._parent[self.root(first)] = self.root(second)
