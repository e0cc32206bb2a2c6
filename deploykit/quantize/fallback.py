"""Which layers stay in float, so that the noise at the output, or the gate, is as it was asked for.

One sweep (`sensitivity`) says what each quantization adds; layers are then taken in the order in which they remove most of it,
and what was predicted is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.gate import Verdict
from deploykit.progress import Progress, silent
from deploykit.quantize import place, sensitivity
from deploykit.quantize.insert import activation_parameters, insert
from deploykit.quantize.ranges import Range
from deploykit.quantize.rounding import Rounded, put
from deploykit.quantize.sensitivity import Errors, decibels
from deploykit.quantize.speed import Costs
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import QdqRules, onnxruntime, padded, run

_AT_ONCE = 16
_STEP_DB = 0.5
_SWEPT = 8  # images; their noise is an average over all outputs, and 8 predict the total to about 1 dB


@dataclass(frozen=True)
class Kept:
    """One layer that the search keeps in float: the expected SQNR at the output in dB before and after."""

    layer: str
    before_db: float
    after_db: float


@dataclass(frozen=True)
class Search:
    """What was found out about a plan: SQNR at the output in dB as it was asked for, with everything in int8, and as decided;
    the layers that were kept in float for it, the last `for_gate` of them because the gate's own images asked for it; the
    activations that no int8 layer reads any more because of that; the noise of everything alone, None where there was no need
    for a sweep."""

    wanted_db: float | None = None
    before_db: float | None = None
    after_db: float | None = None
    kept: tuple[Kept, ...] = ()
    spared: tuple[str, ...] = ()
    errors: Errors | None = None
    for_gate: int = 0


@dataclass(frozen=True)
class Case:
    """A float `model` to be quantized as `settings` say, and the `images` (n, C, H, W) on which that is measured.

    The model is left as it is. `rounded` are the weights of int8 layers that are not each rounded to the nearest; a sweep takes
    all for the nearest. With `costs`, what a layer in float takes weighs against the noise that it removes.
    """

    model: ir.Model
    rules: QdqRules
    ranges: Mapping[str, Range]
    settings: QuantizeTable
    images: NDArray[np.float32]
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    costs: Costs | None = None

    @cached_property
    def wanted(self) -> NDArray[np.float64]:
        """The answers of the float graph."""
        return _answers(ir.to_proto(self.model).SerializeToString(), self.images, optimise=True)

    @cached_property
    def most(self) -> int:
        """How many layers may stay in float. Not all of them, for none in int8 would be no INT8."""
        layers = len(place.claimed(self.plan()))
        return min(math.ceil(layers * self.settings.most_float_percent / 100), layers - 1)

    def plan(self, kept: Sequence[Kept] = ()) -> place.Plan:
        """What is quantized with these layers in float, beside those of the settings."""
        return place.plan(self.model.graph, self.rules, self._floats(kept))

    def sqnr_db(self, kept: Sequence[Kept] = ()) -> float:
        """INT8 with these layers in float, executed literally, against the float graph's answers: dB at the output."""
        graph = ir.from_proto(ir.to_proto(self.model))
        decided = place.plan(graph.graph, self.rules, self._floats(kept))
        put(graph.graph, decided, self.rounded)
        insert(graph, decided, self.ranges, self.rules)
        answers = _answers(ir.to_proto(graph).SerializeToString(), self.images, optimise=False)
        signal = float((self.wanted**2).sum())
        return decibels(float(((answers - self.wanted) ** 2).sum()) / (signal or 1.0))

    def spared(self, kept: Sequence[Kept]) -> tuple[str, ...]:
        """The activations that are not quantized any more with these layers in float."""
        left = self.plan(kept).uses
        return tuple(name for name in self.plan().uses if name not in left)

    def errors(self, progress: Progress) -> Errors:
        """A sweep on a few images from everywhere among all."""
        some = self.images[:: max(1, len(self.images) // _SWEPT)][:_SWEPT]
        decided = self.plan()
        parameters = activation_parameters(decided, self.ranges, self.rules)
        return sensitivity.sweep(self.model, decided, parameters, self.rules, some, progress=progress)

    def keep_float(self, errors: Errors, target_db: float) -> list[Kept]:
        """As `keep_float` below, within what the settings allow."""
        chosen, graph = self.settings.float_layers, self.model.graph
        return keep_float(graph, self.rules, chosen, errors, target_db=target_db, most=self.most, costs=self.costs)

    def _floats(self, kept: Sequence[Kept]) -> list[str]:
        return [*self.settings.float_layers, *(step.layer for step in kept)]


def search(case: Case, *, progress: Progress = silent) -> Search:
    """Measure INT8 and, below the SQNR that the settings ask for, choose the layers that stay in float."""
    wanted_db = case.settings.target_sqnr_db
    before = after = case.sqnr_db()
    # 0 asks for nothing, yet noise that is louder than the signal is below it.
    enough = before >= wanted_db or wanted_db == 0
    if enough and not case.settings.sensitivity:
        return Search(wanted_db, before, before)
    errors = case.errors(progress)
    kept: list[Kept] = []
    # What is predicted from a few images can be too good; ask for that much more until the measured ratio is reached.
    optimism = max(0.0, decibels(errors.total(case.plan())) - before)
    while not enough:
        more = case.keep_float(errors, wanted_db + optimism)
        if len(more) == len(kept):
            break
        kept = more
        after = case.sqnr_db(kept)
        enough = after >= wanted_db
        optimism = max(0.0, kept[-1].after_db - after) + _STEP_DB
    if after <= before:  # what gains nothing is not kept
        kept, after = [], before
    return Search(wanted_db, before, after, tuple(kept), case.spared(kept), errors)


def search_for_gate(
    case: Case, found: Search, passes: Callable[[Sequence[Kept]], Verdict], *, progress: Progress = silent
) -> Search:
    """Go on from `found` until `passes`, with as few layers in float as that takes.

    Layers follow in the order in which they remove most of the noise (for the time they cost), and halving finds how many are
    needed. Where not even as many as the settings allow pass, a graph that fails gets them all, the best that was reached; one
    that cannot be told from so few images is left as it was.
    """
    best = passes(found.kept)
    if best is Verdict.PASS:
        return found
    errors = found.errors or case.errors(progress)
    ladder = case.keep_float(errors, math.inf)
    few, enough = len(found.kept), max(len(found.kept), len(ladder))
    verdict = passes(ladder) if enough > few else best
    if verdict is not Verdict.PASS and best is not Verdict.FAIL:
        return replace(found, errors=errors)
    while verdict is Verdict.PASS and enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if passes(ladder[:middle]) is Verdict.PASS else (middle, enough)
    kept = tuple(ladder[:enough]) if enough > len(found.kept) else found.kept
    more = len(kept) - len(found.kept)
    return replace(found, after_db=case.sqnr_db(kept), kept=kept, spared=case.spared(kept), errors=errors, for_gate=more)


def keep_float(
    graph: ir.Graph,
    rules: QdqRules,
    chosen: Sequence[str],
    errors: Errors,
    *,
    target_db: float,
    most: int,
    costs: Costs | None = None,
) -> list[Kept]:
    """Few layers, at most `most`, that stay in float for the expected SQNR to reach `target_db`.

    Greedy: each step keeps the layer that removes most of the noise, together with every quantization that is no longer
    needed once it is float; with `costs`, most for the time that it costs. `chosen` are names or patterns that stay in float
    anyway. Fewer than would reach the target are returned when no layer removes anything any more.
    """
    kept: list[Kept] = []
    decided = everything = place.plan(graph, rules, chosen)
    noise = errors.total(decided)
    while decibels(noise) < target_db and len(kept) < most:
        names = [step.layer for step in kept]
        plans = {name: place.plan(graph, rules, [*chosen, *names, name]) for name in place.claimed(decided)}
        removed = {name: noise - errors.total(candidate) for name, candidate in plans.items()}
        useful = [name for name, share in removed.items() if share > 0]
        if not useful:
            break
        lost = {name: 1.0 if costs is None else _lost(costs, decided, plans[name], everything) for name in useful}
        best = min(useful, key=lambda name: (-removed[name] / lost[name], name))
        kept.append(Kept(best, decibels(noise), decibels(noise - removed[best])))
        noise, decided = noise - removed[best], plans[best]
    return kept


def _lost(costs: Costs, before: place.Plan, after: place.Plan, everything: place.Plan) -> float:
    """Nanoseconds that a plan takes longer than another. What costs less than a fiftieth of the whole counts as that, or else
    many layers that cost nothing would be kept before the one that matters."""
    whole = costs.predict(before, everything)
    return max(costs.predict(after, everything) - whole, whole / 50)


def _answers(graph: bytes, images: NDArray[np.float32], *, optimise: bool) -> NDArray[np.float64]:
    """The graph's answers to all images, (n, values), whatever batch it takes."""
    source = ir.from_proto(onnx.load_model_from_string(graph)).graph.inputs[0]
    first = source.shape[0] if source.shape is not None else None
    fixed = first if isinstance(first, int) else None
    step = fixed or _AT_ONCE
    session = onnxruntime.reference(graph, optimise=optimise)
    found = []
    for start in range(0, len(images), step):
        some = images[start : start + step]
        batch = padded(some, fixed)
        (answer,) = run(session, {str(source.name): np.ascontiguousarray(batch)}).values()
        found.append(answer[: len(some)].reshape(len(some), -1).astype(np.float64))
    session.close()
    return np.concatenate(found)
