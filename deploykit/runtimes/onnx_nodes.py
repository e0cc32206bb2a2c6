"""The nodes of an ONNX file, read without the onnx package, which a device does not have.

Reads the protobuf wire format (protobuf.dev/programming-guides/encoding) of ModelProto.graph (field 7), of NodeProto's
input (1), output (2), name (3), op_type (4) and domain (7), and of TensorProto's name (8) and external_data (13), as
numbered in onnx.proto; skips the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from deploykit.artifact import Artifact, Precision
from deploykit.errors import UsageError, printable

LAYERS = ("Conv", "Gemm", "MatMul")
MODULE_KEY = "deploykit.module"  # of a node's metadata: the PyTorch module that it came from


@dataclass(frozen=True)
class Node:
    """One operator of a graph."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(path: Path) -> list[Node]:
    """The nodes of the main graph in file order. Raises UsageError when the file is not ONNX."""
    with _refusing(path):
        return [_node(value) for graph in _graphs(path) for number, value in _fields(graph) if number == 1]


def external_tensors(path: Path) -> list[str]:
    """Names of the constants whose data lie in other files. Raises UsageError when the file is not ONNX."""
    return [item.tensor for item in external(path, path.read_bytes())]


@dataclass(frozen=True)
class External:
    """Where a constant's data lie outside of its file: `location` as the file says it, and the bytes there (0: to its end)."""

    tensor: str
    location: str
    offset: int
    length: int


def external(path: Path, content: bytes) -> list[External]:
    """The constants of an ONNX file with that content whose data lie in other files. Raises UsageError when it is not ONNX."""
    with _refusing(path):
        return [_external(tensor) for graph in _graphs_of(content) for tensor in _tensors(graph) if 13 in dict(_fields(tensor))]


def require_one_file(path: Path) -> None:
    """Raise UsageError for a graph whose weights lie beside it, as those above 2 GB do."""
    if external_tensors(path):
        raise UsageError(
            f"{printable(path)} keeps its weights in another file",
            why="above 2 GB, protobuf's limit, they lie beside the graph, and only FP32 engines of ONNX Runtime are made of that",
            fix="a smaller network, or --to onnxruntime without --int8",
        )


def layers_of(model: Artifact, nodes: Sequence[Node]) -> list[Node]:
    """Of the nodes of `model`: in an INT8 graph what its quantization calls a layer; in a float graph whatever may be one."""
    if model.precision is not Precision.INT8:
        return [node for node in nodes if node.op in LAYERS]
    facts = cast(Mapping[str, Sequence[str]], model.facts)
    return [node for node in nodes if node.name in facts["int8_layers"] or node.name in facts["float_layers"]]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (IndexError, ValueError) as error:
        raise UsageError(f"{printable(path)} is not an ONNX file", why=str(error)) from error


def _external(tensor: memoryview) -> External:
    """external_data (field 13) are pairs of a key (1) and a value (2); offset and length are decimal numbers."""
    said: dict[str, str] = {}
    for number, entry in _fields(tensor):
        if number == 13:
            pair = {kind: bytes(value).decode() for kind, value in _fields(entry)}
            said[pair.get(1, "")] = pair.get(2, "")
    return External(_name(tensor), said.get("location", ""), int(said.get("offset", "0")), int(said.get("length", "0")))


def _graphs(path: Path) -> list[memoryview]:
    return _graphs_of(path.read_bytes())


def _graphs_of(content: bytes) -> list[memoryview]:
    graphs = [value for number, value in _fields(memoryview(content)) if number == 7]
    if not graphs:
        raise ValueError("it holds no graph")
    return graphs


def _tensors(graph: memoryview) -> Iterator[memoryview]:
    """Initializers (field 5), and in the nodes' attributes (NodeProto's field 5) tensors (5) and those of subgraphs (6)."""
    for number, value in _fields(graph):
        if number == 5:
            yield value
        elif number == 1:
            for attribute in (inner for kind, inner in _fields(value) if kind == 5):
                for kind, inner in _fields(attribute):
                    if kind == 5:
                        yield inner
                    elif kind == 6:
                        yield from _tensors(inner)


def _name(tensor: memoryview) -> str:
    return next((bytes(value).decode() for number, value in _fields(tensor) if number == 8), "")


def _node(message: memoryview) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""], 7: [""]}
    for number, value in _fields(message):
        if number in texts:
            texts[number].append(bytes(value).decode())
    return Node(texts[3][-1], texts[4][-1], texts[7][-1], tuple(texts[1]), tuple(texts[2]))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a message as (number, bytes); scalars are skipped."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(message, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise ValueError("a field is longer than the file")
            yield tag >> 3, message[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind} is not used by ONNX")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift == 70:  # without this bound, a file of 0xFF bytes takes time quadratic in its size
            raise ValueError("a number is longer than ten bytes")
