"""The pieces that sections are made of: sections, tables, figures, facts, notices, chips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from deploykit.report.markup import Child, Markup, element
from deploykit.report.units import NOT_MEASURED

# The content of result.json, or one of the tables in it.
Result: TypeAlias = Mapping[str, Any]

_SYMBOLS = {
    "pass": "\N{CHECK MARK}",
    "done": "\N{CHECK MARK}",
    "fail": "\N{MULTIPLICATION X}",
    "cannot tell": "?",
    "skipped": "\N{EN DASH}",
    "not built": "\N{EN DASH}",
}
_TONES = {"pass": "pass", "done": "pass", "fail": "fail", "cannot tell": "unsure"}


@dataclass(frozen=True)
class Column:
    """A table's column; numbers are set flush right in figures of one width."""

    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell that sorts by `order` instead of by its text."""

    content: Child
    order: float


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Child | Cell]], *, explore: bool = False) -> Markup:
    """A table with a caption. On a phone each row becomes a small card with the columns' names in it.

    With `explore` it stays a table and scrolls in its own frame, and page.js lets the reader sort and filter it.
    """
    heads = [element("th", column.title, scope="col", class_=_kind(column)) for column in columns]
    body = [element("tr", [_cell(cell, column) for cell, column in zip(row, columns, strict=True)]) for row in rows]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", heads)),
        element("tbody", body),
        class_="explore" if explore else "cards",
    )
    if not explore:
        return whole
    return element("div", whole, class_="frame", role="region", tabindex=0, aria_label=caption)


def figure(caption: Child, *content: Child) -> Markup:
    """A chart under the sentence that says how to read it."""
    return element("figure", element("figcaption", caption), content)


def chart_row(label: Child, text: Child, chart: Child) -> Markup:
    """One line of a chart: what it is at the left, its numbers at the right, the picture below."""
    above = element("div", element("span", label, class_="label"), element("span", text, class_="numbers"), class_="above")
    return element("div", above, chart, class_="row")


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """A list of names and values."""
    return element("dl", [element("div", element("dt", name), element("dd", value)) for name, value in pairs], class_="facts")


def notice(tone: str, content: Child) -> Markup:
    """A paragraph that stands out; `tone` is a class of page.css."""
    return element("p", content, class_=f"notice {tone}")


def chip(word: str) -> Markup:
    """A verdict or status: symbol, word and colour, so that no one of them is needed alone."""
    symbol = element("span", _SYMBOLS.get(word, "\N{BULLET}"), aria_hidden="true")
    return element("span", symbol, f" {word}", class_=f"chip {_TONES.get(word, 'none')}")


def absent(what: str, reason: str = "") -> Markup:
    """The sentence that stands where a stage did not happen."""
    return element("p", f"{what}: {reason or NOT_MEASURED}.", class_="absent")


def folded(summary: str, *content: Child, unfolded: bool = False) -> Markup:
    """Details that are closed until the reader asks for them, unless they are short enough to stand open."""
    return element("details", element("summary", summary), content, open=unfolded)


def words_of(value: Any, otherwise: str = NOT_MEASURED) -> str:
    """A text from the result, or what stands for it when it is null or empty."""
    return otherwise if value is None or value == "" else str(value)


def times(shape: Sequence[Any]) -> str:
    """A shape as `1 x 32 x 32`."""
    return " \N{MULTIPLICATION SIGN} ".join(map(str, shape))


def series_of(result: Result, label: str) -> int:
    """The number of an engine's colour: the same in every chart of the page."""
    benchmark = result.get("benchmark") or {}
    tables = (benchmark.get("engines"), result.get("engines"), result.get("parity"))
    labels = dict.fromkeys(words_of(entry.get("label"), "engine") for table in tables for entry in table or ())
    return list(labels).index(label) if label in labels else 0


def reason_of(result: Result, *stages: str) -> str:
    """Why the first of these stages that has no result has none, in its own words: `benchmark skipped, no engine`."""
    for wanted in stages:
        for stage in result.get("stages") or ():
            name = words_of(stage.get("name"), "")
            # A stage that was skipped because it had been finished before has a folder, and so a result.
            if name.startswith(wanted) and stage.get("status") != "done" and not stage.get("path"):
                said = ", ".join(str(text) for text in (stage.get("status"), stage.get("summary")) if text)
                return f"{name} {said}".rstrip(". ")
    return ""


def _cell(cell: Child | Cell, column: Column) -> Markup:
    content, order = (cell.content, cell.order) if isinstance(cell, Cell) else (cell, None)
    return element("td", content, class_=_kind(column), data_label=column.title, data_order=order)


def _kind(column: Column) -> str | None:
    return "numeric" if column.numeric else None
