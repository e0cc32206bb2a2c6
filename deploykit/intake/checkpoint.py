"""Where the numbers of a checkpoint lie: what `torch.save` wrote, in either of its two formats, as plain JSON values.

This runs in the child process of `deploykit.intake.child` and needs nothing but the standard library.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from deploykit.intake import archive, pickled
from deploykit.intake.pickled import SIZES, Name, Names, Other, Storage, Tensor
from deploykit.intake.refused import Refused

_LONGEST_PICKLE = 16 << 20  # that of a ResNet-50 with its optimizer has 0.1 MB
# torch/serialization.py, _legacy_save: a number by which the file is known, the version, the machine, the content, the keys.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_DEEPEST = 64
_MOST_VALUES = 400_000  # counting texts by their length
_LONGEST_TEXT = 1000
_EXPANDED = 4  # a tensor may be a view in which elements stand more than once; all of them together, up to so often
_SPARE = 64 << 20
_KINDS = {
    b"\x89PNG": "it is a PNG image",
    b"\xff\xd8\xff": "it is a JPEG image",
    b"\x1f\x8b": "it is a gzip archive: unpack it first",
    b"\x89HDF": "it is an HDF5 file",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
}


def read(file: BinaryIO) -> Any:
    """The content, with [type, start in the file, elements there, offset, size, stride] for each tensor.

    Numbers and texts are themselves; {"mapping": pairs, "attributes": ...}, {"list": ...}, {"tuple": ...}, {"tensor": ...} and
    {"other": what it is} stand for the rest. Raises Refused for everything that torch.load(weights_only=True) refuses, for
    archives that are compressed or overlap, and for tensors that reach beyond their numbers.
    """
    start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        return _of_archive(file)
    if start.startswith(b"\x80"):
        return _of_stream(file)
    raise Refused(_kind(start), told="{} is not a checkpoint", fix="give a file that torch.save or safetensors wrote")


def _kind(start: bytes) -> str:
    if not start:
        return "it is empty"
    if start.startswith(b"PK"):
        return "it is truncated, or an archive that torch.save did not write"
    if start.lstrip().startswith(b"<"):
        return "it is a web page or XML: the download went wrong"
    return next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), f"it starts with {start[:16]!r}")


def _of_archive(file: BinaryIO) -> Any:
    """The format since torch 1.6: a zip with `data.pkl` and one record for each storage."""
    found = archive.records(file)
    if (order := found.get("byteorder")) is not None and _bytes(file, order) != b"little":
        raise Refused("its numbers are stored with the highest byte first", fix="save it again on a little-endian machine")
    main = found["data.pkl"]
    if main.size > _LONGEST_PICKLE:
        raise Refused(f"its data.pkl has {main.size} bytes, more than {_LONGEST_PICKLE}")
    content, _ = pickled.read(_bytes(file, main))

    def place(storage: Storage) -> int:
        record = found.get(f"data/{storage.key}")
        size = storage.count * SIZES[storage.dtype]
        if record is None and not size:
            return 0
        if record is None or record.size != size:
            there = "is missing" if record is None else f"has {record.size} bytes and not {size}"
            raise Refused(f"truncated or damaged: its record data/{storage.key} {there}")
        return record.start

    return _Told(place, _size(file)).of(content)


def _bytes(file: BinaryIO, record: archive.Record) -> bytes:
    file.seek(record.start)
    return file.read(record.size)


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)


def _of_stream(file: BinaryIO) -> Any:
    """The format before torch 1.6: five pickles in a row, then each storage with the number of its elements before it."""
    whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    magic, end = pickled.read(whole)
    if magic != _MAGIC:
        raise Refused("it is damaged, or a pickle that torch.save did not write")
    version, end = pickled.read(whole, end)
    system, end = pickled.read(whole, end)
    if version != _VERSION or not isinstance(system, Mapping) or system.get("little_endian") is not True:
        raise Refused(f"it has version {version!r} of torch.save's older format, or its numbers have the highest byte first")
    storages: dict[str, Storage] = {}
    content, end = pickled.read(whole, end, storages)
    keys, end = pickled.read(whole, end)
    if end > _LONGEST_PICKLE:
        raise Refused(f"its pickles have {end} bytes, more than {_LONGEST_PICKLE}")
    places = _places(whole, keys, end, storages)
    return _Told(lambda storage: places[storage.key], len(whole)).of(content)


def _places(whole: memoryview, keys: Any, end: int, storages: Mapping[str, Storage]) -> Mapping[str, int]:
    """Where each storage's numbers begin: 8 bytes with their count, then they themselves, in the order of `keys`."""
    if not isinstance(keys, list):
        raise Refused("it is damaged: it does not say which storages follow")
    found = {}
    for key in map(str, keys):
        storage = storages.get(key)
        if storage is None:
            raise Refused(f"it is damaged: nothing says what its storage {key[:40]} holds")
        begin = end + 8
        end = begin + storage.count * SIZES[storage.dtype]
        if end > len(whole):
            raise Refused(f"it is truncated: it has {len(whole)} bytes, and storage {key[:40]} ends at {end}")
        if struct.unpack("<q", whole[begin - 8 : begin])[0] != storage.count:
            raise Refused(f"it is damaged: its storage {key[:40]} has another length than is said of it")
        found[key] = begin
    missing = [key for key in storages if key not in found]
    if missing:
        raise Refused(f"it is truncated: its storage {missing[0][:40]} is missing")
    return found


@dataclass
class _Told:
    """Plain JSON values for what a pickle said; `place` gives a storage's first byte, `size` is that of the file."""

    place: Callable[[Storage], int]
    size: int
    values: int = 0
    held: int = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self.values += 1 + (len(value) // 16 if isinstance(value, str) else 0)
        if depth > _DEEPEST or self.values > _MOST_VALUES:
            # A list that holds another twice, which holds another twice, and so on, is a small file with no end.
            raise Refused(f"it nests its values more than {_DEEPEST} deep, or has more than {_MOST_VALUES} of them")
        if isinstance(value, dict):
            attributes = value.attributes if isinstance(value, Names) else {}
            told = {"mapping": [[self.of(key, depth + 1), self.of(item, depth + 1)] for key, item in value.items()]}
            return told | ({"attributes": self.of(attributes, depth + 1)} if attributes else {})
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [self.of(item, depth + 1) for item in value]}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, (bool, int, float, type(None))) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT):
            return value
        return {"other": value.text if isinstance(value, (Name, Other)) else type(value).__name__}

    def _tensor(self, tensor: Tensor) -> list[Any]:
        self.held += math.prod(tensor.size) * SIZES[tensor.dtype]
        if self.held > _EXPANDED * self.size + _SPARE:
            raise Refused(
                f"its tensors would take more than {self.held} bytes, and the file has {self.size}",
                told="{}: it is damaged, or made to fill the memory",
            )
        storage = tensor.storage
        start = self.place(storage) + storage.offset * SIZES[storage.dtype]
        elements = storage.length * SIZES[storage.dtype] // SIZES[tensor.dtype]
        return [tensor.dtype, start, elements, tensor.offset, list(tensor.size), list(tensor.stride)]
