"""Tables and sentences as plain text: a result that is piped into a file is the same as one on a screen."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 110


def table(title: str, *columns: str) -> Table:
    """An empty table; `title` may be empty."""
    return Table(
        *columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns)
    )


def render(parts: Iterable[Table | str]) -> str:
    """Tables and sentences one after another."""
    file = StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, markup=False, highlight=False)
    for part in parts:
        # Sentences are not wrapped: a command among them has to survive being copied.
        console.print(part, soft_wrap=isinstance(part, str))
    return file.getvalue()
