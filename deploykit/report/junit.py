"""A summary as JUnit XML, in the part of it that Jenkins, GitLab and the readers for GitHub have in common.

There is no one standard: this keeps to the schema of Jenkins' plug-in (junit-10.xsd). GitLab shows the content of `failure`,
`error` and `skipped` and not their `message`, calls `classname` the suite, and of two cases of one name reads the first
(docs.gitlab.com/ci/testing/unit_test_reports).
"""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

from deploykit.report.summary import Gate, Status, Summary, visible

# What could not be told is no failure of the network, and must not look like a pass either.
_ELEMENTS = {Status.ERROR: "error", Status.FAIL: "failure", Status.CANNOT_TELL: "error", Status.NOT_JUDGED: "skipped"}
# How every file of ours begins, by which it is told from what is not ours to replace.
OPENING = b"<?xml version='1.0' encoding='utf-8'?>\n<testsuites name=\"deploykit\""
_MEASURED = re.compile(r" \([^()]*\)$")


def render(summary: Summary) -> bytes:
    """A test suite called like the run, with its facts as properties and one test case for each gate, as UTF-8."""
    found = Counter(_ELEMENTS.get(gate.status) for gate in summary.gates)
    counts = {"tests": len(summary.gates), "failures": found["failure"], "errors": found["error"]}
    attributes = {**{name: str(count) for name, count in counts.items()}, "time": f"{summary.seconds:.3f}"}
    root = ElementTree.Element("testsuites", {"name": "deploykit", **attributes})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": visible(summary.name), **attributes, "skipped": str(found["skipped"])}
    )
    if summary.facts:
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in summary.facts.items():
            ElementTree.SubElement(properties, "property", {"name": visible(name), "value": visible(value)})
    for gate, name in zip(summary.gates, _names(summary), strict=True):
        suite.append(_case(gate, name, summary.name))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _names(summary: Summary) -> list[str]:
    """A name for each gate, no two alike, that is the same in every run: a limit in parentheses at its end was measured."""
    names = [_MEASURED.sub("", gate.rule) for gate in summary.gates]
    return [f"{name} ({seen + 1})" if (seen := names[:index].count(name)) else name for index, name in enumerate(names)]


def _case(gate: Gate, name: str, suite: str) -> ElementTree.Element:
    classname = ".".join(filter(None, ("deploykit", suite, gate.stage)))
    case = ElementTree.Element(
        "testcase", {"classname": visible(classname), "name": visible(name), "time": f"{gate.seconds:.3f}"}
    )
    element = _ELEMENTS.get(gate.status)
    if element is None:
        child = ElementTree.SubElement(case, "system-out")
    else:
        told = {"type": gate.status.value} if element != "skipped" else {}
        child = ElementTree.SubElement(case, element, {"message": visible(gate.reason), **told})
    child.text = visible("\n".join((f"{gate.rule}: {gate.reason}", *gate.details)))
    return case
