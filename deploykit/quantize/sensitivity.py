"""Where quantization hurts: the noise at the network's output that each tensor and each layer's weights cause alone.

One sweep measures all of them. A graph is built in which every quantization has a switch for each sample of the batch; an
image is then repeated once for each switch, so that a sample shows the output with one thing quantized and all else in
float. Noise of independent roundings adds up, so the same numbers predict what keeping a layer in float removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.gate import Verdict
from deploykit.progress import Progress, silent
from deploykit.quantize import place
from deploykit.quantize.insert import activation_parameters, add_pair, constant, describe, insert, quantized_weights
from deploykit.quantize.ranges import QuantParameters, Range
from deploykit.quantize.rounding import NEAREST, Rounded, put
from deploykit.quantize.speed import Costs
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import QdqRules, onnxruntime, padded, run

_SWITCHES = "switches"
_NO_NOISE = 1e-20
_AT_ONCE = 16
_STEP_DB = 0.5
_SWEPT = 8  # images; their noise is an average over all outputs, and 8 predict the total to about 1 dB


@dataclass(frozen=True)
class Errors:
    """Noise power at the output over the signal's, by activation (tensor name) and by layer (its weights, node name)."""

    activations: Mapping[str, float]
    weights: Mapping[str, float]

    def total(self, decided: place.Plan) -> float:
        """The noise that a plan is expected to cause, as a share of the signal's power."""
        layers = place.claimed(decided)
        return sum(self.activations.get(name, 0.0) for name in decided.uses) + sum(self.weights.get(name, 0.0) for name in layers)


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


def search(
    model: ir.Model,
    rules: QdqRules,
    ranges: Mapping[str, Range],
    settings: QuantizeTable,
    images: NDArray[np.float32],
    *,
    rounded: Mapping[str, Rounded] = NEAREST,
    costs: Costs | None = None,
    progress: Progress = silent,
) -> Search:
    """Measure INT8 on `images` and, below the SQNR that `settings` ask for, choose the layers that stay in float.

    `model` is the float graph; it is left as it is. With `costs`, what a layer in float takes weighs against what it removes.
    `rounded` are the weights of int8 layers that are not each rounded to the nearest; a sweep takes all for the nearest.
    """
    always, wanted_db = settings.float_layers, settings.target_sqnr_db
    decided = place.plan(model.graph, rules, always)
    measured = _Measured(model, rules, ranges, always, images, rounded)
    before = after = measured.sqnr_db(())
    # 0 asks for nothing, yet noise that is louder than the signal is below it.
    enough = before >= wanted_db or wanted_db == 0
    if enough and not settings.sensitivity:
        return Search(wanted_db, before, before)
    errors = _swept(model, decided, ranges, rules, images, progress)
    most = _most(decided, settings)
    kept: list[Kept] = []
    # What is predicted from a few images can be too good; ask for that much more until the measured ratio is reached.
    optimism = max(0.0, decibels(errors.total(decided)) - before)
    while not enough:
        more = keep_float(model.graph, rules, always, errors, target_db=wanted_db + optimism, most=most, costs=costs)
        if len(more) == len(kept):
            break
        kept = more
        after = measured.sqnr_db(kept)
        enough = after >= wanted_db
        optimism = max(0.0, kept[-1].after_db - after) + _STEP_DB
    if after <= before:  # what gains nothing is not kept
        kept, after = [], before
    return Search(wanted_db, before, after, tuple(kept), measured.spared(kept), errors)


def search_for_gate(
    model: ir.Model,
    rules: QdqRules,
    ranges: Mapping[str, Range],
    settings: QuantizeTable,
    images: NDArray[np.float32],
    found: Search,
    passes: Callable[[Sequence[Kept]], Verdict],
    *,
    rounded: Mapping[str, Rounded] = NEAREST,
    costs: Costs | None = None,
    progress: Progress = silent,
) -> Search:
    """Go on from `found` until `passes`, with as few layers in float as that takes.

    Layers follow in the order in which they remove most of the noise (for the time they cost), and halving finds how many are
    needed. Where not even as many as `settings` allow pass, a graph that fails gets them all, the best that was reached; one that
    cannot be told from so few images is left as it was.
    """
    best = passes(found.kept)
    if best is Verdict.PASS:
        return found
    always = settings.float_layers
    decided = place.plan(model.graph, rules, always)
    errors = found.errors or _swept(model, decided, ranges, rules, images, progress)
    most = _most(decided, settings)
    ladder = keep_float(model.graph, rules, always, errors, target_db=math.inf, most=most, costs=costs)
    few, enough = len(found.kept), max(len(found.kept), len(ladder))
    verdict = passes(ladder) if enough > few else best
    if verdict is not Verdict.PASS and best is not Verdict.FAIL:
        return replace(found, errors=errors)
    while verdict is Verdict.PASS and enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if passes(ladder[:middle]) is Verdict.PASS else (middle, enough)
    kept = tuple(ladder[:enough]) if enough > len(found.kept) else found.kept
    measured = _Measured(model, rules, ranges, always, images, rounded)
    ratio, more = measured.sqnr_db(kept), len(kept) - len(found.kept)
    return replace(found, after_db=ratio, kept=kept, spared=measured.spared(kept), errors=errors, for_gate=more)


@dataclass(frozen=True)
class _Measured:
    """What becomes of the plan for a float `model` with the layers `always` in float, when more of them stay there."""

    model: ir.Model
    rules: QdqRules
    ranges: Mapping[str, Range]
    always: Sequence[str]
    images: NDArray[np.float32]
    rounded: Mapping[str, Rounded]

    @cached_property
    def wanted(self) -> NDArray[np.float64]:
        """The answers of the float graph."""
        return _answers(ir.to_proto(self.model).SerializeToString(), self.images, optimise=True)

    def sqnr_db(self, kept: Sequence[Kept]) -> float:
        """The ratio at the output over all images."""
        return _sqnr_db(self.model, self.rules, self.ranges, self._floats(kept), self.images, self.wanted, self.rounded)

    def spared(self, kept: Sequence[Kept]) -> tuple[str, ...]:
        """The activations that are not quantized any more."""
        everything, left = (place.plan(self.model.graph, self.rules, self._floats(some)).uses for some in ((), kept))
        return tuple(name for name in everything if name not in left)

    def _floats(self, kept: Sequence[Kept]) -> list[str]:
        return [*self.always, *(step.layer for step in kept)]


def _most(decided: place.Plan, settings: QuantizeTable) -> int:
    """How many layers may stay in float. Not all of them, for none in int8 would be no INT8."""
    layers = len(place.claimed(decided))
    return min(math.ceil(layers * settings.most_float_percent / 100), layers - 1)


def _swept(
    model: ir.Model,
    decided: place.Plan,
    ranges: Mapping[str, Range],
    rules: QdqRules,
    images: NDArray[np.float32],
    progress: Progress,
) -> Errors:
    """A sweep on a few images from everywhere among `images`."""
    some = images[:: max(1, len(images) // _SWEPT)][:_SWEPT]
    return sweep(model, decided, activation_parameters(decided, ranges, rules), rules, some, progress=progress)


def sweep(
    model: ir.Model,
    decided: place.Plan,
    parameters: Mapping[str, QuantParameters],
    rules: QdqRules,
    images: NDArray[np.float32],
    *,
    progress: Progress = silent,
) -> Errors:
    """Measure every activation and every layer's weights of a plan alone, on `images` (n, C, H, W).

    `decided` and `parameters` are for this float `model`, which is left as it is. Costs about one inference for each image
    and each thing that is quantized.
    """
    layers = place.claimed(decided)
    done, total = 0, len(images) * (len(decided.uses) + len(layers))

    def announced(step: int) -> None:
        nonlocal done
        done += step
        progress("sensitivity", done, total)

    def measured(graph: ir.Model, count: int) -> list[float]:
        noise = np.zeros(count)
        session = onnxruntime.reference(ir.to_proto(graph).SerializeToString(), optimise=True, arena=False)
        for image in images:
            noise += _noise(session, graph, image, count)
            announced(count)
        session.close()
        return list((noise / len(images)).tolist())

    activations = measured(_with_switched_activations(_copy(model), decided, parameters), len(decided.uses))
    weights = measured(_with_switched_weights(_copy(model), rules, layers, decided, parameters), len(layers))
    return Errors(dict(zip(decided.uses, activations, strict=True)), dict(zip(layers, weights, strict=True)))


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


def decibels(noise: float) -> float:
    """A share of the signal's power as a signal-to-noise ratio in dB; no noise at all is 200 dB, which JSON can hold."""
    return -10 * math.log10(max(noise, _NO_NOISE))


def shipped_db(
    model: ir.Model,
    rules: QdqRules,
    ranges: Mapping[str, Range],
    images: NDArray[np.float32],
    float_layers: Sequence[str],
    rounded: Mapping[str, Rounded] = NEAREST,
) -> float:
    """SQNR at the output in dB, INT8 with `float_layers` in float against the float graph, on `images`."""
    return _Measured(model, rules, ranges, float_layers, images, rounded).sqnr_db(())


def _sqnr_db(
    model: ir.Model,
    rules: QdqRules,
    ranges: Mapping[str, Range],
    float_layers: Sequence[str],
    images: NDArray[np.float32],
    wanted: NDArray[np.float64],
    rounded: Mapping[str, Rounded],
) -> float:
    """The INT8 graph executed literally against the float graph's answers."""
    graph = _copy(model)
    decided = place.plan(graph.graph, rules, float_layers)
    put(graph.graph, decided, rounded)
    insert(graph, decided, ranges, rules)
    answers = _answers(ir.to_proto(graph).SerializeToString(), images, optimise=False)
    signal = float((wanted**2).sum())
    return decibels(float(((answers - wanted) ** 2).sum()) / (signal or 1.0))


def _answers(graph: bytes, images: NDArray[np.float32], *, optimise: bool) -> NDArray[np.float64]:
    """The graph's answers to all images, (n, values), whatever batch it takes."""
    source = ir.from_proto(onnx.load_model_from_string(graph)).graph.inputs[0]
    first = _first_size(source)
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


def _noise(session: onnxruntime.OnnxSession, graph: ir.Model, image: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Noise over signal at the output for each of `count` switches alone."""
    source, switches = graph.graph.inputs
    rows_fixed, batch_fixed = _first_size(switches), _first_size(source)
    at_once = rows_fixed if isinstance(rows_fixed, int) else min(_AT_ONCE, count + 1)
    batch = batch_fixed if isinstance(batch_fixed, int) else at_once
    answers = []
    for rows in _patterns(count, at_once):
        inputs = {str(source.name): np.repeat(image[None], batch, axis=0), _SWITCHES: rows}
        (answer,) = run(session, inputs).values()
        answers.append(answer.reshape(batch, -1)[:at_once].astype(np.float64))
    flat = np.concatenate(answers)[: count + 1]
    signal = float((flat[0] ** 2).sum())
    noise: NDArray[np.float64] = ((flat[1:] - flat[0]) ** 2).sum(axis=1) / (signal or 1.0)
    return noise


def _patterns(count: int, at_once: int) -> Iterator[NDArray[np.bool_]]:
    """Switches (at_once, count): none is on in the first sample, then each alone; the rest of the last batch has none on."""
    rows = np.concatenate([np.zeros((1, count), bool), np.eye(count, dtype=bool)])
    for start in range(0, len(rows), at_once):
        some = rows[start : start + at_once]
        yield np.concatenate([some, np.zeros((at_once - len(some), count), bool)])


def _with_switched_activations(model: ir.Model, decided: place.Plan, parameters: Mapping[str, QuantParameters]) -> ir.Model:
    """Each quantized tensor is read as it is, or through Q/DQ in the samples whose switch is on."""
    graph = model.graph
    readers = {name: [(str(node.name), index) for node, index in uses] for name, uses in decided.uses.items()}
    nodes = {node.name: node for node in graph}
    values = [_read(nodes[found[0][0]], found[0][1]) for found in readers.values()]
    switches = _add_switches(graph, values)
    for number, ((name, found), value) in enumerate(zip(readers.items(), values, strict=True)):
        chosen = _switched(graph, value, add_pair(graph, value, parameters[name]), switches, number)
        for node, index in found:
            nodes[node].replace_input_with(index, chosen)
    return model


def _with_switched_weights(
    model: ir.Model, rules: QdqRules, layers: Sequence[str], decided: place.Plan, parameters: Mapping[str, QuantParameters]
) -> ir.Model:
    """Each layer stands there twice, with its own weights and with quantized ones for the samples whose switch is on."""
    graph = model.graph
    scales = {(str(node.name), index): parameters[name].scale for name, uses in decided.uses.items() for node, index in uses}
    nodes = {node.name: node for node in graph}
    switches = _add_switches(graph, [nodes[name].outputs[0] for name in layers])
    for number, name in enumerate(layers):
        node = nodes[name]
        integers, scale, shape = quantized_weights(node, rules, scales[name, 0])
        weights = constant(graph, f"{name}/switched", integers.astype(np.float32) * scale.reshape(shape))
        twin = ir.node(node.op_type, [node.inputs[0], weights, *node.inputs[2:]], dict(node.attributes), name=f"{name}/twin")
        result = node.outputs[0]
        describe(twin.outputs[0], f"{name}/twin", ir.DataType.FLOAT, result.shape)
        graph.insert_after(node, twin)
        uses = list(result.uses())
        is_output = result.is_graph_output()
        chosen = _switched(graph, result, twin.outputs[0], switches, number)
        for use in uses:
            use.node.replace_input_with(use.idx, chosen)
        if is_output:
            graph.outputs[list(graph.outputs).index(result)] = chosen
    return model


def _add_switches(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """An input with a switch for each of `values` in each sample; or in one row for the whole batch, where a value does not
    count samples first, as in transformers that transpose the batch or cut images into windows."""
    batch = _first_size(graph.inputs[0])
    by_sample = batch is not None and all(_first_size(value) == batch for value in values)
    shape = ir.Shape([batch if by_sample else 1, len(values)])
    switches = ir.Value(name=_SWITCHES, shape=shape, type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(switches)
    return switches


def _switched(graph: ir.Graph, off: ir.Value, on: ir.Value, switches: ir.Value, number: int) -> ir.Value:
    """`on` in the samples whose switch is on, else `off`."""
    # A single row is made a scalar, which selects in a tensor of any shape.
    per_sample = [-1] + [1] * (len(off.shape) - 1) if _first_size(switches) != 1 and off.shape is not None else []
    name = f"switch/{number}"
    column = constant(graph, f"{name}/column", np.array([number], np.int64))
    shape = constant(graph, f"{name}/shape", np.array(per_sample, np.int64))
    gather = ir.node("Gather", [switches, column], {"axis": 1}, name=f"{name}/Gather")
    reshape = ir.node("Reshape", [gather.outputs[0], shape], name=f"{name}/Reshape")
    where = ir.node("Where", [reshape.outputs[0], on, off], name=f"{name}/Where")
    for node, suffix in ((gather, "gathered"), (reshape, "reshaped")):
        node.outputs[0].name = f"{name}/{suffix}"
    describe(where.outputs[0], f"{name}/chosen", ir.DataType.FLOAT, off.shape)
    producer = on.producer()
    assert producer is not None
    graph.insert_after(producer, [gather, reshape, where])
    return where.outputs[0]


def _first_size(value: ir.Value) -> int | ir.SymbolicDim | None:
    """The size of a value's first axis, None where its shape is not known or it has none."""
    return value.shape[0] if value.shape is not None and len(value.shape) else None


def _read(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))
