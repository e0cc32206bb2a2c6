"""One order for one graph: whatever order an exporter's sets and dictionaries had, the same network gives the same bytes."""

from __future__ import annotations

import onnx_ir as ir


def canonical(graph: ir.Graph) -> None:
    """Order nodes, initializers and attributes by the graph's structure alone, in place.

    Nodes stand where a depth-first walk from the outputs leaves them, inputs first and in their order, which is a topological
    order; nodes that no output needs are not there any more. Initializers stand in the order in which nodes read them.
    """
    nodes = _depth_first(graph)
    graph.remove(list(graph))
    graph.extend(nodes)
    initializers = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None and value.is_initializer())
    kept = [*initializers, *(value for value in graph.initializers.values() if value not in initializers)]
    graph.initializers.clear()
    for value in kept:
        graph.initializers.add(value)
    for node in nodes:
        attributes = [node.attributes[name] for name in sorted(node.attributes)]
        node.attributes.clear()
        for attribute in attributes:
            node.attributes.add(attribute)


def _depth_first(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that the outputs need, each behind what it reads."""
    found: dict[ir.Node, None] = {}
    waiting = [(value.producer(), False) for value in reversed(list(graph.outputs))]
    while waiting:
        node, is_ready = waiting.pop()
        if node is None or node in found or node.graph is not graph:
            continue
        if is_ready:
            found[node] = None
            continue
        waiting.append((node, True))
        waiting += [(value.producer(), False) for value in reversed(_read(node)) if value.producer() not in found]
    return list(found)


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads: its inputs, and what its subgraphs take from outside of them."""
    read = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        inner = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        inner += list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []
        for graph in inner:
            read += [value for each in graph for value in _read(each)]
    return read
