"""What a runtime would make of a Q/DQ file from anywhere: which node breaks which rule, what that costs, what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import onnx
import onnx_ir as ir

from deploykit.errors import UsageError, printable
from deploykit.jsonable import JSON
from deploykit.quantize.lint import common, onnxruntime, openvino, tensorrt, view
from deploykit.quantize.lint.rule import Finding, Rule, Severity

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
RULES: Mapping[str, tuple[Rule, ...]] = {
    "onnxruntime": onnxruntime.RULES,
    "openvino": openvino.RULES,
    "tensorrt": tensorrt.RULES,
}
_FATAL: frozenset[Severity] = frozenset({"refused", "wrong"})


def lint(model: Path | onnx.ModelProto, runtime: str) -> tuple[Finding, ...]:
    """Check a file or a model, which is not changed, by the rules of `runtime`; findings in the order of the graph.

    Raises UsageError for a file that is not ONNX, or a runtime that has no rules.
    """
    if runtime not in RULES:
        raise UsageError(f"{runtime} has no rules for Q/DQ", fix=f"one of {', '.join(RULES)}")
    seen = view.look(view.load(model))
    rules = RULES[runtime] if _has_rules(seen, runtime) else (common.not_quantized,)
    if len(rules) > 1 and not common.is_quantized(seen):  # where nothing is meant to be quantized, nothing was forgotten
        rules = tuple(rule for rule in rules if rule not in (common.not_quantized, common.layer_not_quantized))
    found = [_finding(rule, None, rule.find(seen, node)) for node in seen.nodes[:1] for rule in rules if rule.of_graph]
    found += [_finding(rule, node, rule.find(seen, node)) for node in seen.nodes for rule in rules if not rule.of_graph]
    return tuple(finding for finding in found if finding.what)


def has_rules_for(model: Path | onnx.ModelProto, runtime: str) -> bool:
    """Whether the rules of `runtime` say anything of a file: it holds Q/DQ, or for TensorRT 16-bit floats."""
    return _has_rules(view.look(view.load(model)), runtime)


def is_fatal(findings: Sequence[Finding]) -> bool:
    """Whether the runtime would refuse the file or compute other numbers."""
    return any(finding.severity in _FATAL for finding in findings)


def as_facts(findings: Sequence[Finding], runtime: str) -> dict[str, JSON]:
    """The findings as plain JSON values, grouped by severity, with their counts."""
    groups = {severity: [finding for finding in findings if finding.severity == severity] for severity in SEVERITIES}
    return {
        "rules": runtime,
        "counts": {severity: len(group) for severity, group in groups.items()},
        "findings": {severity: [asdict(finding) for finding in group] for severity, group in groups.items()},
    }


def as_text(findings: Sequence[Finding], runtime: str) -> str:
    """The findings as lines: by severity, then by rule, whose cost and remedy are said once for all its nodes."""
    counts = [f"{sum(finding.severity == severity for finding in findings)} {severity}" for severity in SEVERITIES]
    lines = [f"by the rules of {runtime}: {', '.join(counts)}"]
    for severity in SEVERITIES:
        by_rule: dict[str, list[Finding]] = {}
        for finding in findings:
            if finding.severity == severity:
                by_rule.setdefault(finding.rule, []).append(finding)
        for name, group in by_rule.items():
            lines += [f"{severity}: {name} ({len(group)})", f"  why: {group[0].cost}", f"  try: {group[0].fix}"]
            lines += [f"  - {printable(finding.node)}: {printable(finding.what)}" for finding in group]
    return "".join(f"{line}\n" for line in lines)


def _has_rules(seen: view.View, runtime: str) -> bool:
    """TensorRT takes every precision from the graph, so one of 16-bit floats is as much to be judged as one with Q/DQ."""
    is_half = seen.float_type in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return common.is_quantized(seen) or (runtime == "tensorrt" and is_half)


def _finding(rule: Rule, node: ir.Node | None, what: str) -> Finding:
    return Finding(rule.name, rule.severity, "the graph" if node is None else view.name(node), what, rule.cost, rule.fix)
