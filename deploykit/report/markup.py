"""HTML built from Python calls: every string is escaped unless it is HTML already."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

Attribute: TypeAlias = "str | float | bool | None"
Child: TypeAlias = "str | Iterable[Child] | None"

_VOID = frozenset({"img", "meta"})
# HTML has no way to write these, not even as references; a file name may hold them.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}


class Markup(str):
    """Text that is HTML already. Made only by `element`, `join` and from this package's own assets."""

    __slots__ = ()


def element(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """`<name attributes>children</name>`; strings that are not Markup are escaped, None is left out.

    A trailing underscore in an attribute's name is dropped (`class_`) and the others become hyphens (`aria_label`).
    An attribute that is None or False is left out; True writes its name alone.
    """
    start = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{start}>")
    return Markup(f"<{start}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """All children one after another as HTML."""
    return Markup("".join(_child(child) for child in children))


def escape(text: str) -> Markup:
    """Text as HTML that is safe in content and in quoted attributes, and that any UTF-8 file can hold."""
    encodable = text.encode("utf-8", "backslashreplace").decode()  # JSON and file names may hold lone surrogates
    return Markup(html.escape(encodable.translate(_CONTROLS)))


def _child(child: Child) -> str:
    if child is None or isinstance(child, Markup):
        return child or ""
    return escape(child) if isinstance(child, str) else join(child)


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    text = escape(value) if isinstance(value, str) else f"{value:.6g}"
    return f' {name}="{text}"'
