"""An ONNX file, looked through before any library sees it: sizes, depth, operators, and constants that fit their bytes.

Reads the wire format by the numbers of onnx.proto (ONNX 1.23) and builds nothing, in time and memory that the file's size
bounds. Everything is walked the way protobuf would merge it: a message that may stand once and stands twice is refused.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit.intake import external, wire
from deploykit.intake.operators import KNOWN
from deploykit.intake.refused import Refused
from deploykit.intake.wire import BYTES, VARINT

# Protobuf refuses messages from 2 GiB on (protobuf.dev/programming-guides/proto-limits).
_LARGEST_BYTES = (2 << 30) - 1
_MOST_NODES = 50_000  # of all graphs and functions, each function as often as it is called
_DEEPEST_TYPE, _DEEPEST_CALL = 4, 10
_LARGEST_SIDE, _MOST_DIMENSIONS = (1 << 31) - 1, 16
_MOST_ELEMENTS = 1 << 28  # of a tensor that an operator makes of a constant shape: 1 GiB of float32
_LISTED = 10
# Bits of one element by TensorProto.DataType. Strings (8) are counted, not measured; 0 is undefined.
_BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
    **dict.fromkeys((27, 28), 6),
}
_STRING, _INT64 = 8, 7
_COMPLEX = (14, 15)
# Fields of TensorProto that hold elements: 4 and 10 have a fixed width, 5, 7 and 11 are varints.
_FLOATS, _INT32S, _STRINGS, _INT64S, _RAW, _DOUBLES, _UINT64S = 4, 5, 6, 7, 9, 10, 11
_WIDTHS = {_FLOATS: 4, _DOUBLES: 8}
# Which input of an operator says how large its result is.
_SHAPING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3, "OneHot": 1}


@dataclass(frozen=True)
class Summary:
    """What the walk found of a file that passed."""

    nodes: int
    external: tuple[str, ...]


def check(path: Path) -> Summary:
    """Look the file through. `external` of the answer names the constants that lie in other files, all of which may be read.

    Raises Refused with all problems; OSError when the file cannot be opened.
    """
    size = path.stat().st_size
    if size > _LARGEST_BYTES:
        raise Refused(f"it has {size} bytes; an ONNX file has less than 2 GiB")
    if not size:
        raise Refused("it is empty")
    with path.open("rb") as file:
        # Never closed by name: views of it live on in the traceback of a refusal.
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    walk = _Walk(path.parent)
    walk.model(whole)
    if walk.problems:
        why = "it contradicts itself, or wants what no CNN needs"
        raise Refused(why, told="{} is refused", problems=[*walk.problems[:_LISTED], *["..."] * (len(walk.problems) > _LISTED)])
    return Summary(walk.nodes, tuple(walk.outside))


@dataclass
class _Function:
    """What a function of the file costs: nodes of its own, and the functions that they call."""

    nodes: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class _Walk:
    folder: Path
    reader: wire.Reader = field(default_factory=wire.Reader)
    problems: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    outside_bytes: int = 0
    nodes: int = 0
    functions: dict[tuple[str, str], _Function] = field(default_factory=dict)
    # Of operators that are neither known nor a function: the first three nodes, and how many there are.
    unknown: Counter[str] = field(default_factory=Counter)

    def model(self, message: memoryview) -> None:
        graphs, bodies = [], []
        version = 0
        for number, kind, value in self.reader.fields(message):
            if number == 1 and kind == VARINT:
                version = wire.number(value)
            elif number == 7:
                graphs.append(_message(value, kind))
            elif number == 25:
                bodies.append(_message(value, kind))
            elif number == 20:
                raise Refused("it holds a training graph")
        if len(graphs) != 1:
            raise Refused("it holds no graph" if not graphs else "it holds several graphs")
        if not 0 < version < 1000:
            raise Refused("it has no IR version, so it is empty or something else")
        for body in bodies:
            self._function(body)
        main = _Function()
        self._graph(graphs[0], main)
        self._count(main)
        self._tell_unknown()

    def _function(self, message: memoryview) -> None:
        """FunctionProto: name 1, node 7, domain 10, attribute_proto 11, value_info 12."""
        body, name, domain = _Function(), "", ""
        for number, kind, value in self.reader.fields(message):
            if number == 1:
                name = _text(value, kind)
            elif number == 10:
                domain = _text(value, kind)
            elif number == 7:
                self._node(_message(value, kind), body, {})
            elif number == 11:
                self._attribute(_message(value, kind))
            elif number == 12:
                self._value(_message(value, kind))
        if (domain, name) in self.functions:
            self.problems.append(f"function {_short(name)} is there twice")
        if domain in KNOWN:
            # A runtime may take either, the function or its own operator.
            self.problems.append(f"function {_short(name)} has the domain {domain!r}, which is ONNX's or ONNX Runtime's own")
        self.functions[domain, name] = body

    def _graph(self, message: memoryview, body: _Function) -> None:
        """GraphProto: node 1, initializer 5, input 11, output 12, value_info 13, sparse_initializer 15."""
        nodes, shapes = [], {}
        for number, kind, value in self.reader.fields(message):
            if number == 1:
                nodes.append(_message(value, kind))
            elif number == 5:
                name, values = self._tensor(_message(value, kind))
                if values is not None:
                    shapes[name] = values
            elif number in (11, 12, 13):
                self._value(_message(value, kind))
            elif number == 15:
                self.problems.append("it has sparse constants")
        if len(nodes) > _MOST_NODES:
            raise Refused(f"it has {len(nodes)} nodes, more than {_MOST_NODES}")
        for node in nodes:
            self._node(node, body, shapes)

    def _node(self, message: memoryview, body: _Function, shapes: Mapping[str, Sequence[int]]) -> None:
        """NodeProto: input 1, name 3, op_type 4, attribute 5, domain 7. `shapes` are small integer constants by name."""
        inputs: list[str] = []
        kind_of, domain = "", ""
        for number, kind, value in self.reader.fields(message):
            if number == 1:
                inputs.append(_text(value, kind))
            elif number == 4:
                kind_of = _text(value, kind)
            elif number == 7:
                domain = _text(value, kind)
            elif number == 5:
                self._attribute(_message(value, kind))
        body.nodes += 1
        if kind_of not in KNOWN.get(domain, ()):
            body.calls[domain, kind_of] += 1
        place = _SHAPING.get(kind_of)
        made = shapes.get(inputs[place]) if place is not None and place < len(inputs) else None
        if made is not None and math.prod(max(abs(one), 1) for one in made) > _MOST_ELEMENTS:
            self.problems.append(f"{kind_of} makes a tensor of {'x'.join(map(str, made))} elements")

    def _attribute(self, message: memoryview) -> None:
        """AttributeProto: tensor 5, graph 6, tensors 10, graphs 11, types 14 and 15, sparse tensors 22 and 23."""
        has_tensor = False
        for number, kind, value in self.reader.fields(message):
            if number == 5 and has_tensor:
                raise Refused("an attribute of it has two tensors where one belongs")
            has_tensor |= number == 5
            if number in (5, 10):
                self._tensor(_message(value, kind))
            elif number in (6, 11):
                raise Refused("a node of it holds a graph of its own (If, Loop or Scan), which no CNN here needs")
            elif number in (14, 15):
                self._type(_message(value, kind), 0)
            elif number in (22, 23):
                self.problems.append("it has sparse constants")

    def _value(self, message: memoryview) -> None:
        """ValueInfoProto: type 2."""
        for number, kind, value in self.reader.fields(message):
            if number == 2:
                self._type(_message(value, kind), 0)

    def _type(self, message: memoryview, depth: int) -> None:
        """TypeProto: tensor 1, sequence 4, map 5, sparse tensor 8, optional 9; all but tensors hold types (1, or 2 of a map)."""
        if depth > _DEEPEST_TYPE:
            raise Refused(f"a type of it is nested more than {_DEEPEST_TYPE} deep")
        for number, kind, value in self.reader.fields(message):
            if number in (4, 5, 9):
                for inner, inner_kind, element in self.reader.fields(_message(value, kind)):
                    if inner_kind == BYTES and inner == (2 if number == 5 else 1):
                        self._type(_message(element, inner_kind), depth + 1)
            elif number == 1:
                self._shape(_message(value, kind))

    def _shape(self, message: memoryview) -> None:
        """TypeProto.Tensor: shape 2; TensorShapeProto: dim 1; Dimension: dim_value 1."""
        dims = [
            _message(dim, dim_kind)
            for number, kind, value in self.reader.fields(message)
            if number == 2
            for inner, dim_kind, dim in self.reader.fields(_message(value, kind))
            if inner == 1
        ]
        if len(dims) > _MOST_DIMENSIONS:
            self.problems.append(f"a tensor is said to have {len(dims)} dimensions")
        for dim in dims:
            for number, _, value in self.reader.fields(dim):
                if number == 1 and not 0 <= wire.number(value) <= _LARGEST_SIDE:
                    self.problems.append(f"a tensor is said to have a side of {wire.number(value)}")

    def _tensor(self, message: memoryview) -> tuple[str, Sequence[int] | None]:
        """The name and, of a short list of int64, the values. TensorProto: dims 1, data_type 2, name 8, external_data 13."""
        tensor = _Tensor()
        for number, kind, value in self.reader.fields(message):
            tensor.take(number, kind, value, self.reader)
        told = f"constant {_short(tensor.name)}"
        problem = tensor.objection()
        if not problem and tensor.is_outside:
            self.outside.append(tensor.name)
            problem = external.objection(self.folder, tensor.entries, tensor.size)
            self.outside_bytes += tensor.size
            if self.outside_bytes > _LARGEST_BYTES * 8:
                problem = f"and those before it take {self.outside_bytes} bytes of other files"
        if problem:
            self.problems.append(f"{told} {problem}")
        return tensor.name, None if problem else tensor.values()

    def _count(self, main: _Function) -> None:
        """Add up the nodes as a runtime has them once functions are in line. Raises Refused for one that calls itself."""
        known: dict[tuple[str, str], int] = {}

        def cost(body: _Function, above: tuple[tuple[str, str], ...]) -> int:
            total = body.nodes
            for name, times in body.calls.items():
                if name not in self.functions:
                    self.unknown[".".join(filter(None, name)) or "a node without an operator"] += times
                    continue
                if name in above or len(above) > _DEEPEST_CALL:
                    raise Refused(f"function {_short(name[1])} calls itself, or calls are nested more than {_DEEPEST_CALL} deep")
                if name not in known:
                    known[name] = cost(self.functions[name], (*above, name))
                total += times * known[name]
            return total

        self.nodes = cost(main, ())
        for name, body in self.functions.items():
            if name not in known:
                known[name] = cost(body, (name,))
        if self.nodes > _MOST_NODES:
            raise Refused(f"it has {self.nodes} nodes with functions in line, more than {_MOST_NODES}")

    def _tell_unknown(self) -> None:
        if self.unknown:
            listed = ", ".join(f"{_short(name)} ({count})" for name, count in self.unknown.most_common(_LISTED))
            self.problems.append(f"operators that CNNs are not made of: {listed}")


@dataclass
class _Tensor:
    """One TensorProto as far as it has been read; `held` counts elements by the field that holds them, or bytes of raw data."""

    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    name: str = ""
    held: Counter[int] = field(default_factory=Counter)
    has: set[int] = field(default_factory=set)
    entries: dict[str, str] = field(default_factory=dict)
    is_outside: bool = False
    short: list[bytes] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)

    def take(self, number: int, kind: int, value: int | memoryview, reader: wire.Reader) -> None:
        if number == 1:
            self.dims += wire.numbers(value, kind)
            if len(self.dims) > 64 * _MOST_DIMENSIONS:
                raise Refused(f"constant {_short(self.name)} has thousands of dimensions")
        elif number == 2:
            self.data_type = wire.number(value)
        elif number == 8:
            self.name = _text(value, kind)
        elif number == 13:
            key, entry = _entry(_message(value, kind), reader)
            if key in self.entries:
                raise Refused(f"constant {_short(self.name)} says twice where it lies")
            self.entries[key] = entry
            self.is_outside = True
        elif number == 14:
            self.is_outside |= wire.number(value) == 1
        elif number == 3:
            raise Refused("a constant of it is stored in segments")
        elif number in (_FLOATS, _INT32S, _STRINGS, _INT64S, _RAW, _DOUBLES, _UINT64S):
            self._take_elements(number, kind, value)

    def _take_elements(self, number: int, kind: int, value: int | memoryview) -> None:
        self.has.add(number)
        if number == _RAW:
            raw = _message(value, kind)
            self.held[_RAW] = len(raw)  # protobuf keeps the last
            self.short = [bytes(raw)] if len(raw) <= 8 * _MOST_DIMENSIONS else []
        elif number == _STRINGS:
            self.held[_STRINGS] += 1
        elif number in _WIDTHS:
            self.held[number] += 1 if kind != BYTES else len(_message(value, kind)) // _WIDTHS[number]
        elif isinstance(value, int):
            self.held[number] += 1
            self.integers += [*wire.numbers(value, kind)] if len(self.integers) < _MOST_DIMENSIONS else []
        else:
            packed = _message(value, kind)
            self.held[number] += wire.count_packed(packed)
            if number == _INT64S and len(packed) <= 10 * _MOST_DIMENSIONS:
                self.integers += wire.numbers(packed, kind)

    @property
    def size(self) -> int:
        """Bytes that the shape wants."""
        return -(-math.prod(self.dims) * _BITS.get(self.data_type, 0) // 8)

    def objection(self) -> str:
        """Why the elements do not fit the shape; empty when they do, or lie elsewhere."""
        shape = "x".join(map(str, self.dims)) or "one number"
        if len(self.dims) > _MOST_DIMENSIONS or any(not 0 <= side <= _LARGEST_SIDE for side in self.dims):
            return f"has a shape of {shape[:100]}"
        if self.data_type not in _BITS and self.data_type != _STRING:
            return f"is of type {self.data_type}, which ONNX does not have"
        if self.is_outside:
            return "is said to lie in another file and in this one" if self.has else ""
        if len(self.has) > 1:
            return "is there in several forms"
        elements = math.prod(self.dims)
        kept = next(iter(self.has), None)
        found = self.held[kept] if kept is not None else 0
        wanted = self.size if kept == _RAW else self._entries_of(elements, kept)
        what = "bytes" if kept == _RAW else "values"
        return "" if found == wanted else f"holds {found} {what}, its shape of {shape} wants {wanted}"

    def _entries_of(self, elements: int, kept: int | None) -> int:
        """How many values of field `kept` hold so many elements: small ones share an int32, complex ones take two floats."""
        bits = _BITS.get(self.data_type, 8)
        if kept == _INT32S and bits < 8:
            return -(-elements * bits // 8)
        return 2 * elements if self.data_type in _COMPLEX else elements

    def values(self) -> Sequence[int] | None:
        """Of a short list of int64, what it says."""
        if self.data_type != _INT64 or math.prod(self.dims) > _MOST_DIMENSIONS:
            return None
        if self.short:
            raw = self.short[0]
            return [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, len(raw), 8)]
        return self.integers or None


def _entry(message: memoryview, reader: wire.Reader) -> tuple[str, str]:
    """StringStringEntryProto: key 1, value 2."""
    found = {number: _text(value, kind) for number, kind, value in reader.fields(message)}
    return found.get(1, ""), found.get(2, "")


def _message(value: Any, kind: int) -> memoryview:
    if kind != BYTES:
        raise Refused("a number stands where a message belongs")
    found: memoryview = value
    return found


def _text(value: Any, kind: int) -> str:
    try:
        return bytes(_message(value, kind)).decode()
    except UnicodeDecodeError as error:
        raise Refused(f"a name in it is not UTF-8: {error}") from error


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:57] + "...")
