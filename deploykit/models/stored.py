"""Tensors out of a checkpoint, mapped into memory from where `deploykit.intake` found their numbers."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deploykit.errors import ModelError, printable
from deploykit.intake import door
from deploykit.intake.pickled import SIZES


class Entries(dict[Any, Any]):
    """A mapping of the file with torch's `_metadata`, where it has some."""

    _metadata: Any = None


@dataclass(frozen=True)
class Opaque:
    """A value of a checkpoint that is neither a number nor text, a container or a plain tensor, by what it is called."""

    name: str


def read(path: Path) -> Any:
    """What `torch.save` left in the file, with tensors that are mapped from it: they cost memory when they are looked at.

    Writing to one changes this process's copy. Raises ModelError as `deploykit.intake.door.checkpoint` does, OSError when the
    file cannot be opened.
    """
    told = door.checkpoint(path)
    with path.open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return _value(told, whole)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # What the child told did not fit the file: it was changed meanwhile, or the child was not itself any more.
        raise ModelError(f"cannot read the weights {printable(path)}", why=f"truncated or damaged: {error}") from error


def _value(told: Any, whole: mmap.mmap) -> Any:
    if not isinstance(told, dict):
        return told
    if "mapping" in told:
        found = Entries((_key(key), _value(item, whole)) for key, item in told["mapping"])
        if "attributes" in told:
            found._metadata = _value(told["attributes"], whole).get("_metadata")
        return found
    if "tensor" in told:
        return _tensor(whole, *told["tensor"])
    if "other" in told:
        return Opaque(told["other"])
    ((kind, items),) = told.items()
    return {"list": list, "tuple": tuple}[kind](_value(item, whole) for item in items)


def _key(told: Any) -> Any:
    return Opaque(told["other"]) if isinstance(told, dict) else told


def _tensor(
    whole: mmap.mmap, name: str, start: int, elements: int, offset: int, size: Iterable[int], stride: Iterable[int]
) -> torch.Tensor:
    width, dtype = SIZES[name], getattr(torch, name)
    if not elements:
        return torch.empty(*size, dtype=dtype)
    if start < 0 or start + elements * width > len(whole):
        raise ValueError("a tensor lies beyond the end")
    if start % width:
        # The older format puts numbers anywhere; those must be moved to where a CPU wants them.
        flat = torch.frombuffer(bytearray(whole[start : start + elements * width]), dtype=dtype)
    else:
        flat = torch.frombuffer(whole, dtype=dtype, count=elements, offset=start)
    return flat.as_strided(tuple(size), tuple(stride), offset)
