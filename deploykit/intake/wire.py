"""The protobuf wire format, field by field and nothing built (protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploykit.intake.refused import Refused

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
# Of tag, length and value. An ONNX file of a large CNN has 20,000; a file of two-byte fields would take minutes.
_MOST_FIELDS = 1_000_000
_MOST_PACKED = 1024
_INNER_BYTES = bytes(range(128, 256))


@dataclass
class Reader:
    """Counts what it has read, over all messages of one file."""

    fields_read: int = 0

    def fields(self, message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
        """(number, wire type, value) of every field; the value is a number, or the bytes of all other wire types.

        Raises Refused for a field that is longer than the message or has a wire type that protobuf no longer has.
        """
        position, end = 0, len(message)
        while position < end:
            self.fields_read += 1
            if self.fields_read > _MOST_FIELDS:
                raise Refused(f"it has more than {_MOST_FIELDS} parts")
            tag, position = _varint(message, position)
            number, kind = tag >> 3, tag & 7
            if not 0 < number < 1 << 29:
                raise Refused(f"field {number} is not one of protobuf's")
            if kind == VARINT:
                value, position = _varint(message, position)
                yield number, kind, value
                continue
            if kind == BYTES:
                length, position = _varint(message, position)
            elif kind in _FIXED:
                length = _FIXED[kind]
            else:
                raise Refused(f"wire type {kind} is not used by ONNX")
            if length > end - position:
                raise Refused("a field is longer than the file")
            yield number, kind, message[position : position + length]
            position += length


def number(value: int | memoryview) -> int:
    """One integer as a signed 64-bit number. Raises Refused when something else is stored in its place."""
    if not isinstance(value, int):
        raise Refused("something else is stored where a whole number belongs")
    return _signed(value)


def numbers(value: int | memoryview, kind: int) -> list[int]:
    """A repeated integer, one of them or packed, as signed 64-bit numbers.

    Raises Refused when it is damaged, or longer than any list of dimensions: this is read before any limit on memory or time.
    """
    if isinstance(value, int):
        return [_signed(value)]
    if kind != BYTES:
        raise Refused("a whole number is stored as a float")
    found: list[int] = []
    position = 0
    while position < len(value):
        if len(found) == _MOST_PACKED:
            raise Refused(f"a list of dimensions has more than {_MOST_PACKED} numbers")
        number, position = _varint(value, position)
        found.append(_signed(number))
    return found


def count_packed(value: memoryview) -> int:
    """How many varints are packed in `value`: each ends with a byte below 128."""
    return len(bytes(value).translate(None, _INNER_BYTES))


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift == 70:  # without this bound, a file of 0xFF bytes takes time quadratic in its size
            raise Refused("a number is longer than ten bytes")
    raise Refused("it is truncated: it ends in the middle of a number")
