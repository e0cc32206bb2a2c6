"""What two sides say of each other beyond numbers: whether one was made from the other, whether its layers run in the precision
that they were made for, and whether both mean the same class by the same output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deploykit import foreign, parity
from deploykit.artifact import Artifact, Format, Precision, digest_file, read_artifact
from deploykit.build import Engine, realised_gate
from deploykit.crosscheck.pairing import Pairs, answers
from deploykit.crosscheck.sides import Side
from deploykit.errors import UsageError, printable
from deploykit.gate import GateResult, Verdict
from deploykit.report.units import plural
from deploykit.runtimes import Session

# Golden samples that are looked at: an engine of another network gives itself away on the first.
_GOLDEN = 8
# Fewer answers lie near each other by chance, and a class seems to be another one.
FEWEST_IMAGES = 8
# In power: 10 dB nearer to another class than to its own. INT8 that decides like FP32 is within 9 dB of it, or nearer.
_NEARER = 10.0
_ROWS = 256
_LISTED = 3


def origin(sides: tuple[Side, Side], sessions: tuple[Session, Session], pairs: Pairs) -> list[GateResult]:
    """Whether a side was made from the other: an engine from this very graph, or anything of ours from this FP32 network.

    An engine names the graph that it was built from. For all others golden samples say it: with them lies what the FP32 network
    answered that they were made with, and the other side, when it is in FP32, has to answer that too. Empty where neither
    can be told.
    """
    for engine, graph in (sides[::-1], sides):
        if engine.model is not None and graph.model is not None and _may_be_built_from(engine.model, graph.model):
            return [_built_from(engine, graph, engine.model, graph.model)]
    for which in (1, 0):
        made, network = sides[which], sides[1 - which]
        if made.is_ours and made.model is not None and network.precision is Precision.FP32 and len(made.outputs) == 1:
            samples = made.model.samples()
            if made.outputs[0].name not in samples.reference:
                continue
            inputs = [samples.inputs[name][:_GOLDEN] for name in pairs.names(made)]
            if all(array.shape[1:] == spec.shape[1:] for array, spec in zip(inputs, pairs.specs, strict=True)):
                (answered,), _ = answers(network, sessions[1 - which], pairs, inputs)
                return [_made_from(made, network, answered, samples.reference[made.outputs[0].name][:_GOLDEN])]
    return []


def precision(sides: Sequence[Side]) -> tuple[list[GateResult], list[str]]:
    """Whether all layers of each INT8 engine run in int8 that were meant to, and notes where nothing says which were."""
    gates, notes = [], []
    for side in sides:
        engine = side.model
        if engine is None or engine.format is not Format.ENGINE or engine.precision is not Precision.INT8:
            continue
        graph = side.graph or _graph_of(engine, sides)
        if graph is None:
            notes.append(f"which layers of {side.label} were meant for int8 is not known: its graph is not beside it")
            continue
        found = realised_gate(Engine.of(str(engine.facts["runtime"]), graph, engine))
        gates.append(replace(found, rule=f"{side.label}: {found.rule.partition(': ')[2]}"))
    return gates, notes


def classes(sides: tuple[Side, Side], a: NDArray[np.floating], b: NDArray[np.floating]) -> GateResult | None:
    """Whether both call and answer classes in one order: logits (images, classes). None where too few images say nothing.

    In another order are answers of which some outputs are 10 dB nearer to other outputs of A than to their own, one to one.
    """
    rule = "B's classes are in the order of A's"
    names = next((side.classes for side in sides if side.classes), ())
    if told := _renamed(sides[0].classes, sides[1].classes):
        return GateResult(rule, Verdict.FAIL, None, None, told)
    if len(a) < FEWEST_IMAGES:
        return None
    moved = _moved(a, b)
    if not moved:
        return GateResult(rule, Verdict.PASS, 0, None, "no other order is nearer to A's answers")
    listed = [f"what B answers as {_name(names, mine)} is A's {_name(names, theirs)}" for mine, theirs in moved.items()]
    more = f", and {len(listed) - _LISTED} more" * (len(listed) > _LISTED)
    reason = f"{plural(len(moved), 'class', 'es')} in another order: {', '.join(listed[:_LISTED])}{more}"
    return GateResult(rule, Verdict.FAIL, len(moved), None, reason)


def opsets(sides: Sequence[Side]) -> str:
    """That two graphs are of different opsets, in words; empty where they are not, or one is no ONNX graph."""
    graphs = [side.model.path for side in sides if side.model is not None and side.model.format is Format.ONNX]
    found = [foreign.opset(path) for path in graphs]
    if len(found) < len(sides) or len(set(found)) == 1:
        return ""
    return f"A is of opset {found[0]} and B of opset {found[1]}, in which the same operator may mean something else"


def _may_be_built_from(engine: Artifact, graph: Artifact) -> bool:
    """An INT8 engine, and a graph quantized by the rules of its runtime: there is one such graph for each recipe."""
    is_pair = (engine.format, graph.format) == (Format.ENGINE, Format.ONNX)
    is_int8 = engine.precision is graph.precision is Precision.INT8
    return is_pair and is_int8 and graph.facts.get("rules") == engine.facts.get("runtime")


def _built_from(engine: Side, graph: Side, built: Artifact, model: Artifact) -> GateResult:
    rule = f"{engine.label} was built from {graph.label}"
    if model.sha256 in built.parents:
        return GateResult(rule, Verdict.PASS, None, None, f"it names SHA-256 {model.sha256[:12]}")
    there = ", ".join(sha[:12] for sha in built.parents) or "none"
    reason = f"stale: it was built from SHA-256 {there}, and {graph.label} is {model.sha256[:12]}; build it again"
    return GateResult(rule, Verdict.FAIL, None, None, reason)


def _made_from(made: Side, network: Side, answered: NDArray[np.floating], wanted: NDArray[np.floating]) -> GateResult:
    rule = f"{made.label} was made from the network of {network.label}"
    limit = parity.FLOAT_LIMIT[Precision.FP32]
    if answered.shape != wanted.shape:
        told = (
            f"{network.label} answers {list(answered.shape[1:])} to its golden samples, and that network {list(wanted.shape[1:])}"
        )
        return GateResult(rule, Verdict.FAIL, None, None, f"stale, or another network: {told}")
    errors = parity.tensor_errors(answered, wanted)
    told = f"max|d| / max|y| {errors.relative:.2g} on {plural(len(wanted), 'golden sample')}"
    if errors.relative <= limit:
        return GateResult(rule, Verdict.PASS, errors.relative, None, f"{network.label} answers like that network, {told}")
    reason = f"stale, or another network: {network.label} answers otherwise than what {made.label} was made from, {told}"
    return GateResult(rule, Verdict.FAIL, errors.relative, None, f"{reason}; make {made.label} again")


def _graph_of(engine: Artifact, sides: Sequence[Side]) -> Artifact | None:
    """The graph that an engine was built from: the other side, or one in a folder beside it."""
    for side in sides:
        if side.model is not None and side.model.format is Format.ONNX and side.model.sha256 in engine.parents and side.is_ours:
            return side.model
    for path in sorted(engine.folder.parent.glob("*/*.onnx")):
        if path.parent != engine.folder and digest_file(path) in engine.parents:
            try:
                return read_artifact(path.parent)
            except UsageError:
                continue
    return None


def _renamed(mine: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """How the names of the same classes are ordered otherwise; empty where they are not, or where they are other names."""
    if mine == theirs or sorted(mine) != sorted(theirs):
        return ""
    apart = [index for index, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    told = [f"class {i} is {printable(mine[i])} in A and {printable(theirs[i])} in B" for i in apart[:_LISTED]]
    return f"the names of {plural(len(apart), 'class', 'es')} are in another order: {', '.join(told)}"


def _moved(a: NDArray[np.floating], b: NDArray[np.floating]) -> dict[int, int]:
    """The outputs of B that are another output of A, one to one, by their index; empty where that explains nothing."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return {}
    first, second = (values.T.astype(np.float64) for values in (a, b))
    power = (first**2).sum(axis=1)
    found: dict[int, int] = {}
    for start in range(0, len(second), _ROWS):
        rows = second[start : start + _ROWS]
        apart = np.maximum((rows**2).sum(axis=1)[:, None] + power[None, :] - 2 * rows @ first.T, 0)
        own = ((rows - first[start : start + _ROWS]) ** 2).sum(axis=1)
        nearest = apart.argmin(axis=1)
        least = ((rows - first[nearest]) ** 2).sum(axis=1)  # the product above rounds, and equal ones have to be 0 apart
        found |= {start + row: int(nearest[row]) for row in np.flatnonzero(_NEARER * least < own).tolist()}
    return found if found.keys() == set(found.values()) else {}


def _name(names: Sequence[str], index: int) -> str:
    return printable(names[index]) if index < len(names) else f"class {index}"
