"""How long work tells how far it is; the library never prints, so the caller passes in what shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# (what is being done, how many are done, how many there are); called from the working thread, in order.
Progress: TypeAlias = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """The default: shows nothing."""
