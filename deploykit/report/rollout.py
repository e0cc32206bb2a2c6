"""A fleet's roll-out as a page, and as a summary for JUnit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.report.html import page as whole_page
from deploykit.report.markup import element
from deploykit.report.parts import Column, facts, table
from deploykit.report.summary import Gate, Status, Summary

_STATUS = {"done": Status.PASS, "failed": Status.FAIL, "waiting": Status.NOT_JUDGED, "running": Status.ERROR}
_COLUMNS = (
    *(Column("device"), Column("group"), Column("outcome"), Column("what")),
    *(Column("bytes sent", numeric=True), Column("commands", numeric=True), Column("seconds", numeric=True)),
)


def page(head: Mapping[str, str], devices: Mapping[str, Mapping[str, Any]]) -> str:
    """A page with a row for each device; `devices` by name, each with `group`, `outcome`, `text`, `seconds` and `facts`."""
    rows = [
        (
            *(name, row["group"], row["outcome"], row["text"]),
            *(_number(row["facts"].get(key)) for key in ("sent_bytes", "commands")),
            f"{row['seconds']:.1f}",
        )
        for name, row in devices.items()
    ]
    done = sum(row["outcome"] == "done" for row in devices.values())
    title = f"{head['network']} release {head['release']}: {done} of {len(devices)} devices"
    top = element("header", element("p", "deploykit roll-out", class_="kicker"), element("h1", title))
    return whole_page(title, top, element("section", facts(head.items())), table("Devices", _COLUMNS, rows, explore=True))


def summary(head: Mapping[str, str], devices: Mapping[str, Mapping[str, Any]]) -> Summary:
    """A case for each device; one that was not reached is skipped."""
    gates = [
        Gate(name, _STATUS[row["outcome"]], row["text"] or "not reached", stage=row["group"], seconds=row["seconds"])
        for name, row in devices.items()
    ]
    seconds = sum(gate.seconds for gate in gates)
    return Summary(f"{head['network']} release {head['release']}", tuple(gates), seconds, facts=dict(head))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""
