"""A summary as annotations of a GitHub workflow: commands that its runner reads from what a step prints.

The form and its escapes are those of docs.github.com, "Workflow commands for GitHub Actions", and of the toolkit
(actions/toolkit, packages/core/src/command.ts). A step shows ten errors and ten warnings (docs/problem-matchers.md there), and
a message is cut after so many characters (actions/runner, ExecutionContext.cs).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from deploykit.report import markdown
from deploykit.report.summary import Gate, Status, Summary

MOST_ANNOTATIONS = 10
MOST_CHARACTERS = 4096
SUMMARY_BYTES = 2**20  # what GITHUB_STEP_SUMMARY may hold after a step

_LEVELS: dict[Status, Literal["error", "warning"]] = {
    Status.ERROR: "error",
    Status.FAIL: "error",
    Status.CANNOT_TELL: "warning",
}


def annotate(summary: Summary) -> Iterator[str]:
    """A command for each gate that did not pass, the worst first; of more than ten the last says how many are left out."""
    found = sorted((gate for gate in summary.gates if gate.status in _LEVELS), key=lambda gate: list(Status).index(gate.status))
    shown = found if len(found) <= MOST_ANNOTATIONS else found[: MOST_ANNOTATIONS - 1]
    for gate in shown:
        yield command(_LEVELS[gate.status], f"deploykit {summary.name}: {gate.status.value}", _message(gate))
    if len(shown) < len(found):
        left = found[len(shown) :]
        yield command(_LEVELS[left[0].status], f"deploykit {summary.name}", f"{len(left)} more gates did not pass")


def command(level: Literal["error", "warning"], title: str, message: str) -> str:
    """One line for the runner, without its line end."""
    return f"::{level} title={_property(title)}::{_data(message)}"


def append(path: Path, summary: Summary) -> None:
    """Add the summary to what the file of a step's summary holds already, and no more than GitHub takes.

    Raises OSError when the file cannot be written.
    """
    with path.open("ab") as file:
        # An empty line first: what stands there may end in the middle of a table.
        if text := markdown.render(summary, limit=SUMMARY_BYTES - file.tell() - 1):
            file.write(f"\n{text}".encode())


def _message(gate: Gate) -> str:
    text = "\n".join((f"{gate.rule}: {gate.reason}", *gate.details))
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
