"""Names as the network has them, without that of the module that made its answer plain tensors."""

from __future__ import annotations

import onnx_ir as ir

from deploykit.runtimes.onnx_nodes import MODULE_KEY

_WRAPPER = "network."


def unwrap(model: ir.Model) -> None:
    """Take `network.` off modules, nodes, results and weights, in place; the graph's own inputs and outputs have none."""
    graph = model.graph
    for node in graph:
        node.metadata_props[MODULE_KEY] = node.metadata_props.get(MODULE_KEY, "").removeprefix(_WRAPPER)
        node.name = (node.name or "").removeprefix(_WRAPPER)
        for value in node.outputs:
            _rename(value)
    for value in list(graph.initializers.values()):
        _rename(value)


def _rename(value: ir.Value) -> None:
    if value.name is not None and value.name.startswith(_WRAPPER):
        value.name = value.name.removeprefix(_WRAPPER)
