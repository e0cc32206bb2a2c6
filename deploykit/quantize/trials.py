"""One model quantized in several ways: each written as a graph of its own, and the one that is fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir

from deploykit.artifact import SAMPLES, Artifact, Format, Precision, make, read_artifact
from deploykit.errors import StageError, UsageError
from deploykit.jsonable import digest, to_json
from deploykit.quantize import place, rounding, speed
from deploykit.quantize.fallback import Kept
from deploykit.quantize.insert import insert
from deploykit.quantize.ranges import Range
from deploykit.quantize.rounding import Rounded
from deploykit.quantize.speed import Costs, Stopwatch
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import SLOW, QdqRules, onnxruntime
from deploykit.runtimes.onnx_nodes import require_one_file

_CLEARLY = 0.8  # of the time in float: kernels that take less need no race
_WORTH_A_RACE = 0.97  # of the time with every layer in int8: a race of five processes each tells no smaller difference


@dataclass(frozen=True)
class Candidate:
    """One way to quantize: how many layers run in int8, its bytes, its median latency in fresh processes (None: not measured,
    since its kernels' times left no doubt), its SQNR in dB at the output on calibration images (None: random weights, whose
    noise means nothing), and whether it was chosen."""

    name: str
    int8_layers: int
    bytes: int
    latency_ns: float | None
    sqnr_db: float | None
    chosen: bool


@dataclass(frozen=True)
class Calibrated:
    """A float model and all that quantizing it for one runtime takes, but for the choice of the layers that stay in float."""

    model: Artifact
    observations: Artifact
    settings: QuantizeTable
    runtime: str
    rules: QdqRules
    ranges: Mapping[str, Range]
    rounded: Mapping[str, Rounded]

    def write(self, floats: Mapping[str, str], folder: Path) -> Artifact:
        """The graph with these layers in float, each for its reason, and those of the recipe; its golden samples beside it.

        Raises StageError when a layer that the plan claims as int8 does not stand between Q/DQ in the written file.
        """
        graph = float_graph(self.model)
        decided = place.plan(graph.graph, self.rules, [*self.settings.float_layers, *floats])
        rounding.put(graph.graph, decided, self.rounded)
        insert(graph, decided, self.ranges, self.rules)
        path = folder / "model.onnx"
        ir.save(graph, path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        _check_claims(path, decided)
        onnxruntime.literally(self.model, path, self.model.samples()).save(folder / SAMPLES)
        return replace(
            self.model,
            path=path,
            stage="quantize",
            precision=Precision.INT8,
            parents=(self.model.sha256, self.observations.sha256),
            settings=to_json(self.settings),  # type: ignore[arg-type]
            facts={
                **self.model.facts,
                "rules": self.runtime,
                "cpu": self.settings.cpu,
                "weight_bits": self.rules.weight_bits,
                "int8_layers": place.claimed(decided),
                "float_layers": {layer.name: floats.get(layer.name, layer.why) for layer in decided.layers if not layer.int8},
                "kept_float": [layer.name for layer in decided.layers if layer.why == place.KEPT],
            },
        )


@dataclass(frozen=True)
class Trials:
    """Graphs that are only tried, each written once, into a folder of its own under `folder`."""

    calibrated: Calibrated
    folder: Path

    def made(self, floats: Mapping[str, str]) -> Artifact:
        """The graph with these layers in float."""
        key = digest(sorted(floats))
        final = self.folder / key
        if final.exists():
            return read_artifact(final)
        return make(final, key, lambda folder: self.calibrated.write(floats, folder))

    def costs(self, stopwatch: Stopwatch) -> Costs | None:
        """What kernels take in float and with every layer in int8; None where the runtime does not tell."""
        if stopwatch.profile is None:
            return None
        return Costs.of(stopwatch.profile(self.calibrated.model), stopwatch.profile(self.made({})))

    def fastest(
        self,
        floats: Mapping[str, str],
        costs: Costs | None,
        stopwatch: Stopwatch,
        sqnr_db: Callable[[Mapping[str, str]], float] | None,
    ) -> tuple[dict[str, str], list[Candidate]]:
        """What stays in float for the fastest of: only `floats`, also what kernels predict to be slower in int8, everything.

        They race only where the kernels leave a doubt: where the prediction differs, or INT8 is hardly faster than float.
        """
        options, doubtful = self._options(floats, costs)
        graphs = {name: self.made(chosen) for name, chosen in options.items()}
        race = stopwatch.race(graphs) if doubtful else None
        winner = "int8" if race is None else race.winner
        return options[winner], [
            Candidate(
                name,
                len(cast(list[str], found.facts["int8_layers"])),
                found.path.stat().st_size,
                None if race is None else race.ns[name],
                None if sqnr_db is None else sqnr_db(options[name]),
                name == winner,
            )
            for name, found in graphs.items()
        ]

    def _options(self, floats: Mapping[str, str], costs: Costs | None) -> tuple[dict[str, dict[str, str]], bool]:
        """What stays in float in each way to quantize, and whether only a race can tell which is the fastest."""
        calibrated = self.calibrated
        always = [*calibrated.settings.float_layers, *floats]
        decided = place.plan(float_graph(calibrated.model).graph, calibrated.rules, always)
        everything = dict.fromkeys(place.claimed(decided), SLOW)
        slow = {} if costs is None else self._slow(decided, costs, always)
        options = {"int8": dict(floats), "int8 where it is faster": {**slow, **floats}, "float": {**everything, **floats}}
        if not slow or slow == everything:
            del options["int8 where it is faster"]
        return options, bool(slow) or costs is None or not _is_clearly_faster(decided, costs)

    def _slow(self, decided: place.Plan, costs: Costs, always: Sequence[str]) -> dict[str, str]:
        """The layers that the kernels predict to be slower in int8; none where that is too little to be seen."""
        slow = speed.slow_layers(decided, costs)
        rest = place.plan(float_graph(self.calibrated.model).graph, self.calibrated.rules, [*always, *slow])
        gains = costs.predict(rest, decided) < _WORTH_A_RACE * costs.predict(decided, decided)
        return dict.fromkeys(slow, SLOW) if gains else {}


def too_sensitive(kept: Sequence[Kept]) -> dict[str, str]:
    """Why each layer that a search keeps stays in float."""
    return {
        step.layer: f"too sensitive: {step.before_db:.1f} dB expected at the output with it in int8, {step.after_db:.1f} without"
        for step in kept
    }


def float_graph(model: Artifact) -> ir.Model:
    """A graph that can be quantized. Raises UsageError when the artifact is none."""
    if model.format is not Format.ONNX or model.precision is not Precision.FP32:
        raise UsageError(f"only an FP32 ONNX artifact can be quantized, not {model.precision.value} {model.format.value}")
    require_one_file(model.path)
    return ir.load(model.path)


def _is_clearly_faster(decided: place.Plan, costs: Costs) -> bool:
    """Whether INT8 is predicted to take so much less than float that it need not prove it in a race."""
    in_float = replace(decided, kernels=frozenset(), uses={})
    return costs.predict(decided, decided) < _CLEARLY * costs.predict(in_float, decided)


def _check_claims(path: Path, decided: place.Plan) -> None:
    """Every layer claimed as int8 reads its input and its weights from a DequantizeLinear, in the file as written."""
    nodes = {node.name: node for node in ir.load(path).graph}
    wrong = [name for name in place.claimed(decided) if not _reads_dequantized(nodes.get(name))]
    if wrong:
        raise StageError("these layers were to be quantized and are not", problems=wrong)


def _reads_dequantized(node: ir.Node | None) -> bool:
    if node is None:
        return False
    producers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)
