"""The header of a safetensors file, checked before the library sees it (huggingface.co/docs/safetensors, "Format")."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.intake.refused import Refused

_LONGEST_HEADER = 16 << 20  # the format allows 100 MB; a hundred thousand tensors take 12
_MOST_DIMENSIONS = 32
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}


def check(path: Path) -> None:
    """Raise Refused, with all problems, unless header and data fit each other to the byte. Raises OSError as opening does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise Refused(f"damaged or not safetensors: its header is said to have {length} bytes, the file has {size}")
        text = file.read(length)
    entries = _entries(text)
    data = size - 8 - length
    problems, spans = [], []
    for name, entry in entries.items():
        problem = _objection(entry)
        if problem:
            problems.append(f"{name[:100]!r} {problem}")
        else:
            spans.append(tuple(entry["data_offsets"]))
    if problems:
        raise Refused("damaged or not safetensors", problems=[*problems[:10], *["..."] * (len(problems) > 10)])
    _refuse_holes(sorted(spans), data)


def _entries(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        why = "its header is nested too deep" if isinstance(error, RecursionError) else f"its header is no JSON: {error}"
        raise Refused(f"damaged or not safetensors: {why}") from error
    if not isinstance(found, dict):
        raise Refused("damaged or not safetensors: its header lists no tensors")
    return {name: entry for name, entry in found.items() if name != "__metadata__"}


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _objection(entry: Any) -> str:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    kind, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _SIZES:
        return f"is of a type that is not known: {str(kind)[:40]!r}"
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS or not _are_sizes(span) or len(span) != 2:
        return "has a shape or place that is none"
    wanted = math.prod(shape) * _SIZES[kind]
    return "" if span[1] - span[0] == wanted else f"takes {span[1] - span[0]} bytes, its shape wants {wanted}"


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse_holes(spans: Sequence[tuple[int, ...]], size: int) -> None:
    """What lies between or over tensors could be another file, or memory that is counted twice."""
    end = 0
    for first, last in spans:
        if first != end:
            raise Refused("damaged or not safetensors: its tensors overlap, or something lies between them")
        end = last
    if end != size:
        raise Refused(f"damaged or not safetensors: its tensors end at byte {end} of {size}")
