"""A summary as Markdown in GitHub's and GitLab's dialect, the verdict first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from deploykit.report.summary import Status, Summary, Table, visible

# How every page of ours begins, by which it is told from what is not ours to replace.
OPENING = "## deploykit "
_MARKS = {
    Status.PASS: "PASS",
    Status.FAIL: "FAIL",
    Status.CANNOT_TELL: "CANNOT TELL",
    Status.ERROR: "ERROR",
    Status.NOT_JUDGED: "not judged",
}
_CUT = "\n*The rest was cut off: no more than {} bytes fit here.*\n"
# Escaped by a backslash: what starts something anywhere, a tag or entity, and an underscore that could end something.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|_(?![A-Za-z0-9])")


def render(summary: Summary, *, limit: int | None = None) -> str:
    """The verdict, every gate, tables, notes and facts; cut after a line so that UTF-8 takes at most `limit` bytes."""
    text = "\n".join(_lines(summary)) + "\n"
    return text if limit is None or len(text.encode()) <= limit else _cut(text, limit)


def escape(text: str) -> str:
    """Text in which nothing is Markdown, on one line: line breaks are spaces, control characters can be seen."""
    return _SPECIAL.sub(r"\\\g<0>", visible(" ".join(text.split())))


def _lines(summary: Summary) -> Iterator[str]:
    yield f"{OPENING}{escape(summary.name)}: {_MARKS[summary.status]}"
    counts = {status: sum(gate.status is status for gate in summary.gates) for status in Status}
    yield ""
    yield ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)
    gates = sorted(summary.gates, key=lambda gate: list(Status).index(gate.status))
    yield from _table(
        Table("", ("gate", "verdict", "why"), tuple((gate.rule, _MARKS[gate.status], gate.reason) for gate in gates))
    )
    if summary.notes:
        yield ""
        yield from (f"- {escape(note)}" for note in summary.notes)
    for table in summary.tables:
        yield from ("", f"### {escape(table.title)}")
        yield from _table(table)
    if summary.facts:
        yield from ("", "### Made with")
        yield from _table(Table("", ("", ""), tuple(summary.facts.items())))


def _table(table: Table) -> Iterator[str]:
    yield from ("", _row(table.columns), _row(["---"] * len(table.columns)))
    yield from (_row([escape(cell) for cell in row]) for row in table.rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cut(text: str, limit: int) -> str:
    note = _CUT.format(f"{limit:,}")
    kept, left = [], limit - len(note.encode())
    for line in text.splitlines(keepends=True):
        left -= len(line.encode())
        if left < 0:
            break
        kept.append(line)
    return f"{''.join(kept)}{note}" if kept else ""
