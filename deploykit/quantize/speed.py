"""Which layers are faster in float on this machine, from the kernels of two engines: one all in float, one all in int8.

Each node of the graph that may run on integers is put on one side of a cut: it costs what its kernel took there, and a
tensor between the sides costs its conversion. The cheapest assignment of all nodes at once is a minimum cut (Greig,
Porteous and Seheult 1989, "Exact maximum a posteriori estimation for binary images"). It is a prediction: the caller
measures what comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import onnx_ir as ir

from deploykit.artifact import Artifact
from deploykit.quantize import place
from deploykit.runtimes import KernelTime

_INTEGERS, _FLOATS = ("integers",), ("floats",)  # no node can have such a name
# What a runtime puts between its kernels, on the way into an integer region and out of it. ONNX Runtime's integer kernels
# want channels last (Transpose), its float ones blocks of channels (Reorder).
_IN = ("QuantizeLinear", "Transpose", "ReorderOutput")
_OUT = ("DequantizeLinear", "Transpose", "ReorderInput")
_LAUNCH_NS = 2_000.0  # a kernel of next to nothing takes one to four microseconds in a profile
_DEFAULT_NS = 0.2  # for each element, where an engine has no such conversion to look at


@dataclass(frozen=True)
class Stopwatch:
    """How times are taken, given by whoever may build engines.

    `profile(model)` gives the kernels of an engine built from that graph; it is None where the runtime does not tell.
    `race(models)` measures the engines of several graphs, by name, against each other.
    """

    profile: Callable[[Artifact], Sequence[KernelTime]] | None
    race: Callable[[Mapping[str, Artifact]], Race]


@dataclass(frozen=True)
class Race:
    """Median latency in nanoseconds of each engine, over fresh processes in random order, and its 95 % interval; `floor` is the
    ratio minus one that one of them shows against itself."""

    ns: Mapping[str, float]
    floor: float
    intervals: Mapping[str, tuple[float, float]]

    @property
    def winner(self) -> str:
        """The fastest; an earlier one unless a later one is faster by more than the noise floor, and surely."""
        best = next(iter(self.ns))
        for name, ns in self.ns.items():
            surely = self.intervals[name][1] < self.intervals[best][0]
            if surely and ns * (1 + self.floor) < self.ns[best]:
                best = name
        return best


@dataclass(frozen=True)
class Costs:
    """Nanoseconds. floats, integers: of each node's kernel, nothing for what was fused into another; to_integers, to_floats:
    of a conversion, for each element; taken_apart: of one of the kernels, for each element, that the runtime makes of an
    operator it has no kernel for."""

    floats: Mapping[str, float]
    integers: Mapping[str, float]
    to_integers: float
    to_floats: float
    taken_apart: float = 0.0

    @classmethod
    def of(cls, floats: Sequence[KernelTime], integers: Sequence[KernelTime]) -> Costs:
        """From the kernels of the engine in float and of the one in int8."""
        both = [*floats, *integers]
        into, out = (sum(_rate(both, op) for op in ops) for ops in (_IN, _OUT))
        parts = [kernel for kernel in integers if not kernel.source and kernel.op not in (*_IN, *_OUT)]
        taken_apart = sum(part.ns for part in parts) / max(1, sum(part.elements for part in parts))
        return cls(_by_source(floats), _by_source(integers), into, out, taken_apart)

    def unfused(self, node: ir.Node) -> float:
        """What an operator that runs on floats anyway costs behind a layer on integers and not behind one on floats, into
        which it is fused."""
        name = str(node.name)
        if name not in self.integers and node.op_type == "HardSwish":
            return 2 * self.taken_apart * elements(node.outputs[0])
        return max(0.0, self.integers.get(name, 0.0) - self.floats.get(name, 0.0))

    def predict(self, decided: place.Plan, everything: place.Plan) -> float:
        """Nanoseconds that a plan takes, of the nodes that `everything`, the plan in int8, has on integers."""
        kernels = {node.name for node in decided.kernels}
        possible = sorted(str(node.name) for node in everything.kernels)  # in one order, for sums of floats depend on it
        total = sum((self.integers if name in kernels else self.floats).get(name, 0.0) for name in possible)
        for _, value, readers in _quantized(decided):
            count = elements(value)
            on_floats = [node for node in readers if node.name not in kernels]
            producer = _integer_producer(value, kernels)
            if producer is None and len(on_floats) < len(readers):
                total += _LAUNCH_NS + self.to_integers * count
            elif producer is not None and on_floats:
                total += _LAUNCH_NS + self.to_floats * count
                # What might run on integers is counted above already, by what it takes on floats.
                total += sum(self.unfused(node) for node in on_floats if str(node.name) not in possible)
        return total


def slow_layers(decided: place.Plan, costs: Costs) -> list[str]:
    """The layers of a plan that make the whole slower by running on integers, in graph order.

    `decided` is the plan that the engine in int8 was built by.
    """
    _, (integers, _) = networkx.minimum_cut(_network(decided, costs), _INTEGERS, _FLOATS)
    return [name for name in place.claimed(decided) if name not in integers]


def _network(decided: place.Plan, costs: Costs) -> Any:
    """Nodes on the side of the source run on integers. An edge without capacity cannot be cut; the others have whole
    nanoseconds, because sums of floats depend on an order, and with them which of several minima is found."""
    network = networkx.DiGraph()
    network.add_nodes_from((_INTEGERS, _FLOATS))
    kernels, layers = {node.name for node in decided.kernels}, set(place.claimed(decided))
    for name in sorted(map(str, kernels)):
        network.add_edge(_INTEGERS, name, capacity=round(costs.floats.get(name, 0.0)))
        network.add_edge(name, _FLOATS, capacity=round(costs.integers.get(name, 0.0)))
    for name, value, readers in _quantized(decided):
        producer = _integer_producer(value, kernels)
        into, out = (round(_LAUNCH_NS + rate * elements(value)) for rate in (costs.to_integers, costs.to_floats))
        on_integers = [node.name for node in readers if node.name in kernels]
        on_floats = [node for node in readers if node.name not in kernels]
        # One conversion serves all readers of a kind, so each kind has a node of its own between producer and readers.
        if producer is None:
            _add_readers(network, (name, *_INTEGERS), on_integers, _FLOATS, into)
            continue
        _add_readers(network, (name, *_INTEGERS), on_integers, producer.name, into)
        leaves = (name, *_FLOATS)
        network.add_edge(producer.name, leaves, capacity=out + round(sum(map(costs.unfused, on_floats))))
        for reader in [*on_integers, *([_FLOATS] if on_floats else [])]:
            network.add_edge(leaves, reader)
        if producer.name not in layers and len(producer.outputs) == len(on_integers) == 1:
            # `place` lets a pool, Add or Concat run on integers only where an int8 layer wants its result. That one of several
            # readers does is nothing that a cut can ask for.
            network.add_edge(producer.name, on_integers[0])
    return network


def _add_readers(
    network: Any, between: tuple[str, ...], readers: Sequence[str | None], producer: str | tuple[str, ...] | None, cost: int
) -> None:
    """A producer on floats pays `cost` once if any of `readers` runs on integers."""
    network.add_edge(between, producer, capacity=cost)
    for reader in readers:
        network.add_edge(reader, between)


def _quantized(decided: place.Plan) -> Iterator[tuple[str, ir.Value, list[ir.Node]]]:
    """Every quantized tensor of a plan: its name, itself, and the nodes that read it."""
    for name, uses in decided.uses.items():
        value = uses[0][0].inputs[uses[0][1]]
        assert value is not None
        yield name, value, [node for node, _ in uses]


def _integer_producer(value: ir.Value, kernels: set[str | None]) -> ir.Node | None:
    """The node that may make this tensor on integers: its producer, or the one behind the Relu or Clip that is fused."""
    node = value.producer()
    if node is not None and node.name not in kernels and node.op_type in place.FUSED:
        before = node.inputs[0]
        # A Relu beside other readers, and a Clip below zero, are fused into nothing and run on floats.
        node = before.producer() if before is not None and place.site(before) is value else None
    return node if node is not None and node.name in kernels else None


def _by_source(kernels: Sequence[KernelTime]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kernel in kernels:
        if kernel.source:
            found[kernel.source] = found.get(kernel.source, 0.0) + kernel.ns
    return found


def _rate(kernels: Sequence[KernelTime], op: str) -> float:
    """Nanoseconds for each element that kernels of this kind take."""
    conversions = [kernel for kernel in kernels if kernel.op == op and not kernel.source]
    elements = sum(kernel.elements for kernel in conversions)
    return sum(kernel.ns for kernel in conversions) / elements if elements else _DEFAULT_NS


def elements(value: ir.Value) -> int:
    """How many numbers a tensor holds for one image."""
    count = 1
    for size in value.shape or ():
        count *= size if isinstance(size, int) else 1
    return count
