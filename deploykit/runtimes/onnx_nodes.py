"""The nodes of an ONNX file, read without the onnx package, which a device does not have.

Reads the protobuf wire format (protobuf.dev/programming-guides/encoding) of ModelProto.graph (field 7) and of
NodeProto's input (1), output (2), name (3), op_type (4) and domain (7), as numbered in onnx.proto; skips the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import UsageError, printable


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
    content = memoryview(path.read_bytes())
    try:
        graphs = [value for number, value in _fields(content) if number == 7]
        if not graphs:
            raise ValueError("it holds no graph")
        return [_node(value) for graph in graphs for number, value in _fields(graph) if number == 1]
    except (IndexError, ValueError) as error:
        raise UsageError(f"{printable(path)} is not an ONNX file", why=str(error)) from error


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
