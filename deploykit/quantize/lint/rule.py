"""What a rule and a finding are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from deploykit.quantize.lint.view import View

Severity = Literal["refused", "wrong", "slow", "note"]


@dataclass(frozen=True)
class Finding:
    """One rule that one node breaks.

    `severity` is "refused", by the parser or builder; "wrong": accepted, and other numbers come out; "slow": not in int8, or
    with extra reformats; "note": worth knowing. `what` is what was seen, `cost` what it leads to, `fix` what to do.
    """

    rule: str
    severity: Severity
    node: str
    what: str
    cost: str
    fix: str


@dataclass(frozen=True)
class Rule:
    """A named check: `find` says what it sees at a node, or nothing (empty) when the node obeys.

    of_graph: it is asked once for the whole graph, and the node it is given means nothing.
    """

    find: Callable[[View, ir.Node], str]
    severity: Severity
    cost: str
    fix: str
    of_graph: bool = False

    @property
    def name(self) -> str:
        """The rule's name as documentation and findings have it."""
        return self.find.__name__.replace("_", "-")


def rule(severity: Severity, *, cost: str, fix: str, of_graph: bool = False) -> Callable[[Callable[[View, ir.Node], str]], Rule]:
    """Make a Rule of the function below this line, whose docstring states it with its source."""
    return lambda find: Rule(find, severity, cost, fix, of_graph)
