"""The count of attacks, below the tests' own."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    of_attacks = [report for report in ended if "::test_an_attack_" in report.nodeid]
    if of_attacks:
        held = sum(report.passed for report in of_attacks)
        terminalreporter.write_line(f"attacks: {len(of_attacks)}, of which {held} were refused in time and touched nothing")
