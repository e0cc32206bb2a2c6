"""The exporter's graph cleaned: the field's own operators, the network's own names, one order, nothing of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

from deploykit.export import restore
from deploykit.export.order import canonical
from deploykit.runtimes.onnx_nodes import MODULE_KEY

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
# The tensors of a layer, as PyTorch calls them, by the index at which their node reads them.
_PARAMETERS = {1: "weight", 2: "bias"}
# What the exporters' expressions of sizes are made with.
_FUNCTIONS = frozenset({"floor", "ceiling", "Max", "Min", "Mod"})


def tidy(model: ir.Model) -> None:
    """Restore the field's own operators, then order, rename and strip, in place. Two exports of one network become one file.

    The exporter's stack traces carry paths of this machine.
    """
    restore.operators(model.graph)
    _drop_identities(model.graph)
    for simplify in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
        passes.DeduplicateInitializersPass(),
    ):
        simplify(model)
    canonical(model.graph)
    _rename(model.graph)
    _strip(model)


def _drop_identities(graph: ir.Graph) -> None:
    """Of the main graph alone: the output of a branch may not be a value from outside of it, and an Identity makes it none."""
    for node in list(graph):
        before, after = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Identity" or before is None:
            continue
        if after.is_graph_output():
            if before.producer() is None or before.is_graph_output():
                continue
            before.name, after.name = after.name, None
        after.replace_all_uses_with(before, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _rename(graph: ir.Graph) -> None:
    """Nodes become MODULE/OP, their results carry the same name; inputs and outputs of the graph keep theirs."""
    seen: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        module = _module_path(node)
        node.metadata_props[MODULE_KEY] = module
        base = f"{module}/{node.op_type}" if module else node.op_type
        seen[base] = seen.get(base, -1) + 1
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{index}" if index else node.name
        _name_parameters(graph, node, module)
    _name_sizes(graph)


def _name_parameters(graph: ir.Graph, node: ir.Node, module: str) -> None:
    """The legacy exporter numbers what it folded (`onnx::Conv_497`); it gets the name that the parameter had."""
    for index, suffix in _PARAMETERS.items():
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is None or not value.is_initializer() or not (value.name or "").startswith("onnx::") or not module:
            continue
        name = f"{module}.{suffix}"
        if name not in graph.initializers:
            value.name = name


def _name_sizes(graph: ir.Graph) -> None:
    """Dynamic dimensions are called batch, height and width everywhere, not by the numbers that torch.export counted."""
    source = graph.inputs[0].shape
    counted: dict[str, str] = {}
    for index, name in ((0, BATCH), (2, HEIGHT), (3, WIDTH)):
        size = source[index] if source is not None and len(source) > index else None
        if isinstance(size, ir.SymbolicDim) and size.value is not None:
            counted[size.value] = name
    if not counted:
        return
    # Outputs of the graph are outputs of nodes.
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, counted) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, counted: Mapping[str, str]) -> int | str | None:
    """A size in the words of the input's sizes; None where it is counted from something else, as shape inference does."""
    if not isinstance(size, ir.SymbolicDim):
        return size
    words = re.findall(r"[A-Za-z_]\w*", size.value or "")
    if size.value is None or any(word not in counted and word not in _FUNCTIONS for word in words):
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda word: counted.get(word.group(), word.group()), size.value)


def _module_path(node: ir.Node) -> str:
    """The PyTorch module a node came from: that of its weights if it has any, since fusing a BatchNorm into a
    convolution leaves the BatchNorm's name on it; else the exporter's innermost module scope."""
    for value in node.inputs[1:2]:
        if value is not None and value.const_value is not None and (value.name or "").endswith(".weight"):
            return (value.name or "").removesuffix(".weight")
    if MODULE_KEY in node.metadata_props:
        return node.metadata_props[MODULE_KEY]
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    return scopes[-2] if len(scopes) > 1 else ""


def _strip(model: ir.Model) -> None:
    """Drop all metadata but the module path: the exporter's holds file paths and internals of one torch version."""
    holders: list[object] = [model]
    graphs = {model.graph: None}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        module = node.metadata_props[MODULE_KEY]
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = module
        node.doc_string = None
        holders.extend(node.outputs)
        assert isinstance(node.graph, ir.Graph)
        graphs[node.graph] = None
    for graph in graphs:
        holders += [graph, *graph.inputs, *graph.outputs, *graph.initializers.values()]
    for holder in holders:
        holder.metadata_props.clear()  # type: ignore[attr-defined]
        holder.doc_string = None  # type: ignore[attr-defined]
