"""Values as plain JSON, and the digest of such a value: what manifests, results and stage keys are made of.

Imports nothing heavy: the command line reads recipes, which need this, before it knows whether there is any work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from deploykit.errors import printable

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


def to_json(value: Any) -> JSON:
    """A dataclass, enum, path, numpy value or container of them as plain JSON values.

    Raises TypeError, naming the type, for anything else: a value that is not understood must not enter a digest as text.
    """
    if isinstance(value, Enum):
        return to_json(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(to_json(key)): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return printable(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return to_json(value.tolist())
    raise TypeError(f"no JSON form for {type(value).__name__}")


def finite(value: JSON) -> JSON:
    """The same value, with text in place of a number that JSON has not: infinity and NaN."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: JSON) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
