"""What each quantization costs alone, and which layers stay in float for it: real graphs on ONNX Runtime."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

from deploykit import data, pipeline, precision, quantize, runtimes
from deploykit import recipe as recipes
from deploykit.artifact import Artifact, Preprocess, read_artifact
from deploykit.gate import Verdict
from deploykit.quantize import observe, place, sensitivity
from deploykit.quantize.fallback import Case, Kept, Search, keep_float, search, search_for_gate
from deploykit.quantize.insert import activation_parameters
from deploykit.quantize.ranges import QuantParameters, Range, minmax
from deploykit.quantize.sensitivity import Errors, decibels
from deploykit.quantize.speed import Costs
from deploykit.recipe import QuantizeTable
from deploykit.report import text
from deploykit.runtimes import QdqRules, onnxruntime

BOTH = ["onnxruntime", "tensorrt"]
# A value that lies between two integers may round up in the optimised graph and down in the literal one.
CLOSE = 0.1
few = settings(max_examples=20, deadline=None)


def rules_for(runtime: str) -> QdqRules:
    """Those of a CPU with VNNI, so that weights have 8 bits wherever the tests run."""
    return runtimes.rules(runtime, arch="x86_64", features=["avx512_vnni"])


@dataclass(frozen=True)
class Subject:
    """A float network, how it is to be quantized, and pictures to measure it on."""

    path: Path
    rules: QdqRules
    ranges: Mapping[str, Range]
    pictures: np.ndarray

    @property
    def model(self) -> ir.Model:
        return ir.load(self.path)

    @property
    def plan(self) -> place.Plan:
        return place.plan(self.model.graph, self.rules)

    @property
    def parameters(self) -> Mapping[str, QuantParameters]:
        return activation_parameters(self.plan, self.ranges, self.rules)

    def sweep(self) -> Errors:
        model = self.model
        decided = place.plan(model.graph, self.rules)
        return sensitivity.sweep(model, decided, self.parameters, self.rules, self.pictures)

    def search(self, **table: Any) -> Search:
        return search(self.case(QuantizeTable(**table)))

    def case(self, table: QuantizeTable) -> Case:
        return Case(self.model, self.rules, self.ranges, table, self.pictures)


class Transposed(nn.Module):
    """Attention as PyTorch's own module computes it: tokens first, the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.head = (
            networks.conv(3, 8, stride=4),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.mixed(tokens, tokens, tokens, need_weights=False)[0]).mean(1))


class Windows(nn.Module):
    """Each image cut into 16 windows, which are samples of their own on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.head = networks.conv(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        cut = x.view(len(x), 8, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(len(x) * 16, 64, 8)
        return self.head(torch.relu(self.inside(cut)).reshape(len(x), 1024, 8).mean(1))


MODULES = {"transposed": Transposed, "windows": Windows}


@pytest.fixture(scope="session")
def subject(portable, tmp_path_factory) -> Callable[..., Subject]:
    """(network, runtime, batch) -> the network observed on its calibration pictures, with four others to measure on."""
    made: dict[tuple[str, object], tuple[Artifact, dict[str, Range]]] = {}

    def make(name: str, runtime: str, batch: object = "dynamic") -> Subject:
        if (name, batch) not in made:
            folder = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = MODULES[name]() if name in MODULES else name
            known = batch == "dynamic" and name not in MODULES
            source = portable(name) if known else networks.exported(module, folder / "export", batch=batch)
            # The same ranges whatever the batch, so that only the sweep can differ.
            ranges = ranges_of(source, folder) if batch == "dynamic" else dict(make(name, runtime).ranges)
            made[name, batch] = source, ranges
        source, ranges = made[name, batch]
        return Subject(source.path, rules_for(runtime), ranges, networks.images(4, seed=3))

    return make


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Callable[..., Subject]:
    """Four layers, of which `middle` has weights that int8 cannot hold: those of a channel that is always zero are 200 times
    as large as all others, so the float answers do not depend on them and the int8 ones know little else."""
    folder = tmp_path_factory.mktemp("planted")
    pads = "<pads = [1, 1, 1, 1]>"
    body = (
        f"[stem] a = Conv{pads}(image, w0)  [relu0] ar = Relu(a)  [middle] b = Conv{pads}(ar, w1)  [relu1] br = Relu(b)"
        f"[last] c = Conv{pads}(br, w2)  [relu2] cr = Relu(c)  [pool] p = GlobalAveragePool(cr)  [flat] f = Flatten(p)"
        "[head] logits = Gemm(f, m, bias)"
    )
    values = {"w0": networks.weights(8, 3, 3, 3), "w1": networks.weights(8, 8, 3, 3), "w2": networks.weights(8, 8, 3, 3)}
    values |= {"m": networks.weights(8, 4), "bias": np.zeros(4, np.float32)}
    values["w0"][0] = 0
    values["w1"][:, 0] *= 200
    source = networks.by_hand(folder, body, values)
    ranges = ranges_of(source, folder)

    def make(runtime: str) -> Subject:
        return Subject(source.path, rules_for(runtime), ranges, networks.images(24, 8, seed=3))

    return make


def ranges_of(source: Artifact, folder: Path) -> dict[str, Range]:
    return {name: minmax(seen) for name, seen in observe.load(networks.calibrated(source, folder / "calibrate").path).items()}


def answers(graph: onnx.ModelProto, pictures: np.ndarray) -> np.ndarray:
    """Executed literally, one image after the other; a fixed batch is filled with copies of it."""
    first = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    session = onnxruntime.reference(graph.SerializeToString())
    inputs = [np.repeat(picture[None], first, axis=0) for picture in pictures]
    found = [next(iter(runtimes.run(session, {graph.graph.input[0].name: one}).values()))[0] for one in inputs]
    return np.stack(found).reshape(len(pictures), -1).astype(np.float64)


def noise(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean(((found - wanted) ** 2).sum(axis=1) / (wanted**2).sum(axis=1)))


def with_one_activation(graph: onnx.ModelProto, reads: Sequence[tuple[str, int]], parameters: QuantParameters) -> onnx.ModelProto:
    """The float graph with one Q/DQ pair, in front of these (node name, input index)."""
    changed = copy.deepcopy(graph)
    nodes = {node.name: node for node in changed.graph.node}
    name = nodes[reads[0][0]].input[reads[0][1]]
    for node, index in reads:
        nodes[node].input[index] = "one/dequantized"
    constants = {"one/scale": np.float32(parameters.scale), "one/zero": np.array(parameters.zero_point, parameters.dtype)}
    changed.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items())
    pair = [
        helper.make_node("QuantizeLinear", [name, *constants], ["one/quantized"]),
        helper.make_node("DequantizeLinear", ["one/quantized", *constants], ["one/dequantized"]),
    ]
    order = list(changed.graph.node)
    after = next((index + 1 for index, node in enumerate(order) if name in node.output), 0)
    del changed.graph.node[:]
    changed.graph.node.extend([*order[:after], *pair, *order[after:]])
    return changed


def with_one_layers_weights(graph: onnx.ModelProto, layer: str) -> onnx.ModelProto:
    """The float graph with one layer's weights rounded to 127 steps on each side, channel by channel."""
    changed = copy.deepcopy(graph)
    node = next(node for node in changed.graph.node if node.name == layer)
    stored = next(value for value in changed.graph.initializer if value.name == node.input[1])
    weights = numpy_helper.to_array(stored).astype(np.float64)
    rows = node.op_type == "Conv" or any(item.name == "transB" and item.i for item in node.attribute)
    others = tuple(range(1, weights.ndim)) if rows else 0
    step = np.abs(weights).max(axis=others, keepdims=True) / 127
    step[step == 0] = 1
    changed.graph.initializer.append(numpy_helper.from_array((np.rint(weights / step) * step).astype(np.float32), "one/weights"))
    node.input[1] = "one/weights"
    return changed


@pytest.mark.parametrize("runtime", BOTH)
class TestTheSweep:
    # A chain with pools; Adds; Concat, MaxPool and AvgPool; a MatMul whose result is the network's output; a batch that is not
    # the first axis, or not the number of images.
    @pytest.mark.parametrize("name", ["lenet5", "residual", "branches", "matmul_head", "transposed", "windows"])
    def test_says_what_evaluating_each_quantization_alone_says(self, subject, name, runtime):
        case = subject(name, runtime)
        graph, uses = onnx.load(case.path), case.plan.uses
        wanted = answers(graph, case.pictures)

        found = case.sweep()

        reads = {tensor: [(str(node.name), index) for node, index in pairs] for tensor, pairs in uses.items()}
        for tensor, pairs in reads.items():
            alone = answers(with_one_activation(graph, pairs, case.parameters[tensor]), case.pictures)
            assert found.activations[tensor] == pytest.approx(noise(wanted, alone), rel=CLOSE), tensor
        for layer in place.claimed(case.plan):
            alone = answers(with_one_layers_weights(graph, layer), case.pictures)
            assert found.weights[layer] == pytest.approx(noise(wanted, alone), rel=CLOSE), layer

    def test_names_every_activation_and_every_layer_of_the_plan(self, subject, runtime):
        found = subject("residual", runtime).sweep()

        assert set(found.activations) == set(subject("residual", runtime).plan.uses)
        assert list(found.weights) == place.claimed(subject("residual", runtime).plan)

    @pytest.mark.parametrize(("name", "batch"), [("lenet5", 1), ("lenet5", 3), ("windows", 2)])
    def test_a_sample_shows_its_own_switch_alone_whatever_samples_stand_beside_it(self, subject, runtime, name, batch):
        beside_others, few_at_a_time = subject(name, runtime).sweep(), subject(name, runtime, batch).sweep()

        assert few_at_a_time.activations == pytest.approx(beside_others.activations, rel=CLOSE)
        assert few_at_a_time.weights == pytest.approx(beside_others.weights, rel=CLOSE)

    @pytest.mark.parametrize("name", ["lenet5", "residual", "mobile", "input_skip", "attention", "twice"])
    def test_its_sum_predicts_the_noise_of_everything_together(self, subject, name, runtime):
        case = subject(name, runtime)

        predicted, measured = decibels(case.sweep().total(case.plan)), case.search().before_db

        assert predicted == pytest.approx(measured, abs=4)

    def test_leaves_the_model_as_it_is(self, subject, runtime):
        case = subject("branches", runtime)
        model = case.model
        before = ir.to_proto(model).SerializeToString()

        sensitivity.sweep(model, place.plan(model.graph, case.rules), case.parameters, case.rules, case.pictures)

        assert ir.to_proto(model).SerializeToString() == before

    def test_counts_its_progress_to_the_end(self, subject, runtime):
        case, seen = subject("lenet5", runtime), []
        model = case.model
        decided = place.plan(model.graph, case.rules)

        sensitivity.sweep(model, decided, case.parameters, case.rules, case.pictures, progress=lambda *step: seen.append(step))

        total = len(case.pictures) * (len(decided.uses) + len(decided.layers))
        assert [total for _, _, total in seen] == [total] * len(seen)
        assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
        assert seen[-1] == ("sensitivity", total, total)


class TestDecibels:
    @few
    @given(st.floats(-100, 199))
    def test_are_ten_for_each_factor_of_ten(self, ratio):
        assert decibels(10 ** (-ratio / 10)) == pytest.approx(ratio)

    def test_no_noise_at_all_is_a_number_that_json_holds(self):
        assert decibels(0.0) == pytest.approx(200)


@pytest.mark.parametrize("runtime", BOTH)
class TestTheLayersToKeep:
    """By errors that are made up, on the graph of a small ResNet."""

    def graph(self, subject, runtime: str) -> tuple[ir.Graph, QdqRules]:
        case = subject("residual", runtime)
        return case.model.graph, case.rules

    def errors(self, graph: ir.Graph, rules: QdqRules, small: float = 1e-7, **large: float) -> Errors:
        decided = place.plan(graph, rules)
        layers = dict.fromkeys(place.claimed(decided), small)
        named = {next(name for name in layers if name.startswith(key.replace("_", "."))): much for key, much in large.items()}
        return Errors(dict.fromkeys(decided.uses, small), layers | named)

    def test_are_the_sensitive_ones_worst_first_and_only_as_many_as_needed(self, subject, runtime):
        graph, rules = self.graph(subject, runtime)
        errors = self.errors(graph, rules, body_1_second=1e-2, body_2_first=1e-3, body_0=1e-6)

        one, two = (keep_float(graph, rules, [], errors, target_db=target, most=9) for target in (29, 40))

        assert [step.layer.split("/")[0] for step in one] == ["body.1.second.0"]
        assert [step.layer.split("/")[0] for step in two] == ["body.1.second.0", "body.2.first.0"]
        assert one[0].before_db == pytest.approx(decibels(errors.total(place.plan(graph, rules))))
        assert one[0].before_db < 20 < 29 <= one[0].after_db < 31

    def test_are_none_where_the_ratio_is_good(self, subject, runtime):
        graph, rules = self.graph(subject, runtime)

        assert keep_float(graph, rules, [], self.errors(graph, rules), target_db=40, most=9) == []

    def test_are_at_most_as_many_as_allowed(self, subject, runtime):
        graph, rules = self.graph(subject, runtime)
        errors = self.errors(graph, rules, small=1e-2)

        found = [len(keep_float(graph, rules, [], errors, target_db=60, most=most)) for most in (0, 1, 3)]

        assert found == [0, 1, 3]

    def test_are_others_than_those_that_stay_in_float_anyway(self, subject, runtime):
        graph, rules = self.graph(subject, runtime)
        errors = self.errors(graph, rules, body_1_second=1e-2, body_2_first=1e-3)

        (found,) = keep_float(graph, rules, ["body.1.*"], errors, target_db=40, most=9)

        assert found.layer.startswith("body.2.first")
        assert found.before_db > 29

    def test_a_quantization_counts_as_gone_with_the_last_layer_that_reads_it(self, subject, runtime):
        graph, rules = self.graph(subject, runtime)
        errors = Errors({"image": 1e-2}, self.errors(graph, rules).weights)

        (found,) = keep_float(graph, rules, [], errors, target_db=40, most=9)

        assert found.layer.startswith("body.0")

    def test_are_none_where_none_would_help(self, subject, runtime):
        case = subject("branches", runtime)
        tensor = "body.pool/MaxPool"  # two convolutions and a pool read it: with any one of them in float it stays quantized
        errors = Errors({tensor: 1e-2}, {})

        assert tensor in case.plan.uses
        assert keep_float(case.model.graph, case.rules, [], errors, target_db=40, most=9) == []

    @few
    @given(
        costs=st.lists(st.floats(0, 1), min_size=20, max_size=20),
        target=st.floats(0, 60),
        most=st.integers(0, 4),
    )
    def test_each_step_removes_noise_and_the_next_begins_where_it_ended(self, subject, runtime, costs, target, most):
        graph, rules = self.graph(subject, runtime)
        decided = place.plan(graph, rules)
        layers, cost = place.claimed(decided), iter(costs)
        errors = Errors({name: next(cost) for name in decided.uses}, {name: next(cost) for name in layers})

        found = keep_float(graph, rules, [], errors, target_db=target, most=most)

        assert len(found) <= most
        assert len({step.layer for step in found}) == len(found)
        assert all(step.before_db < min(step.after_db, target) for step in found)
        assert [step.before_db for step in found[1:]] == [step.after_db for step in found[:-1]]
        left = place.plan(graph, rules, [step.layer for step in found])
        assert (found[-1].after_db if found else decibels(errors.total(decided))) == pytest.approx(decibels(errors.total(left)))


@pytest.mark.parametrize("runtime", BOTH)
class TestTheSearch:
    def test_keeps_the_planted_layer_and_measures_what_that_gains(self, planted, runtime):
        found = planted(runtime).search()

        assert [step.layer for step in found.kept] == ["middle"]
        assert found.wanted_db == 25
        assert found.before_db < 15
        assert found.after_db > 30
        assert max(found.errors.weights, key=found.errors.weights.get) == "middle"

    def test_names_the_activations_that_are_not_quantized_any_more(self, planted, runtime):
        # ONNX Runtime's rules quantize the result of the layer before and the input of the one after all the same.
        assert planted(runtime).search().spared == (() if runtime == "onnxruntime" else ("ar",))

    def test_leaves_the_model_as_it_is(self, planted, runtime):
        case = planted(runtime)
        model = case.model
        before = ir.to_proto(model).SerializeToString()

        assert search(Case(model, case.rules, case.ranges, QuantizeTable(), case.pictures)).kept

        assert ir.to_proto(model).SerializeToString() == before

    def test_needs_no_sweep_where_the_ratio_is_good(self, subject, runtime):
        found = subject("lenet5", runtime).search()

        assert found == Search(25, found.before_db, found.before_db)
        assert found.before_db > 25

    def test_sweeps_a_good_network_too_where_that_is_asked_for(self, subject, runtime):
        found = subject("lenet5", runtime).search(sensitivity=True)

        assert (found.kept, found.spared) == ((), ())
        assert set(found.errors.weights) == set(place.claimed(subject("lenet5", runtime).plan))

    def test_measures_on_all_pictures_a_graph_whose_fixed_batch_they_do_not_fill(self, subject, runtime):
        dynamic, fixed = (subject("lenet5", runtime, batch).search().before_db for batch in ("dynamic", 3))

        assert fixed == pytest.approx(dynamic, abs=0.1)

    def test_asks_for_more_where_the_measured_ratio_stays_below_the_predicted(self, planted, runtime):
        case = planted(runtime)
        case.pictures[np.arange(24) % 3 > 0] *= 3  # beyond the ranges, in pictures that the sweep does not see
        case.pictures.setflags(write=False)
        tried = case.search(most_float_percent=25)
        assert tried.after_db < tried.kept[-1].after_db - 1
        wanted = tried.after_db + 0.1

        found = case.search(target_sqnr_db=wanted, most_float_percent=100)

        graph = case.model.graph
        assert len(keep_float(graph, case.rules, [], found.errors, target_db=wanted, most=9)) == 1
        assert len(found.kept) > 1
        assert found.after_db >= wanted

    def test_keeps_nothing_that_gains_nothing(self, planted, runtime, monkeypatch):
        monkeypatch.setattr(Case, "sqnr_db", lambda *_: 14.0)  # whatever stays in float

        found = planted(runtime).search()

        assert (found.before_db, found.after_db, found.kept, found.spared) == (14.0, 14.0, (), ())

    def test_begins_with_what_the_prediction_was_too_good_by(self, planted, runtime):
        case = planted(runtime)
        case.pictures[np.arange(24) % 3 > 0] *= 3  # beyond the ranges, in pictures that the sweep does not see
        always = ("middle",)
        everything = case.search(float_layers=always, target_sqnr_db=0, sensitivity=True)
        predicted = decibels(everything.errors.total(place.plan(case.model.graph, case.rules, always)))
        assert everything.before_db < predicted - 1
        # A ratio that is reached with all the others in int8, if the prediction is to be believed.
        wanted = everything.before_db + 0.1

        found = case.search(float_layers=always, target_sqnr_db=wanted, most_float_percent=100)

        assert found.kept
        assert found.after_db >= wanted

    @pytest.mark.parametrize(("count", "swept"), [(5, range(5)), (8, range(8)), (24, range(0, 24, 3)), (27, range(0, 24, 3))])
    def test_the_sweep_sees_pictures_from_everywhere(self, planted, runtime, monkeypatch, count, swept):
        case = replace(planted(runtime), pictures=networks.images(count, 8, seed=3))
        seen: list[np.ndarray] = []
        sweep = sensitivity.sweep
        monkeypatch.setattr(sensitivity, "sweep", lambda *a, **options: seen.append(a[4]) or sweep(*a, **options))

        case.search()

        assert np.array_equal(seen[0], case.pictures[list(swept)])

    def test_stops_where_no_more_layers_may_stay_in_float_however_noisy_the_rest_is(self, planted, runtime):
        found = planted(runtime).search(target_sqnr_db=200, most_float_percent=50)

        assert len(found.kept) == 2
        assert found.before_db < found.after_db < found.wanted_db

    @pytest.mark.parametrize("table", [{"target_sqnr_db": 0}, {"most_float_percent": 0}])
    def test_keeps_none_where_that_is_asked_for(self, planted, runtime, table):
        found = planted(runtime).search(**table)

        assert found.kept == ()
        assert found.after_db == found.before_db

    def test_a_ratio_of_0_asks_for_nothing_even_where_the_noise_is_louder_than_the_signal(self, tmp_path, runtime):
        # Two channels of 0.51 and 0.49 steps, whose difference is the answer: one rounds up, the other down.
        head = np.repeat(np.float32([1, -1, 0]), 64)[:, None]
        source = networks.by_hand(
            tmp_path, "[flat] f = Flatten(image)  [head] logits = Gemm(f, m, b)", {"m": head, "b": np.zeros(1, np.float32)}
        )
        pictures = np.ones((2, 3, 8, 8), np.float32) * np.float32([0.51, 0.49, 0])[:, None, None]
        ranges = dict.fromkeys(("image", "f"), Range(-127, 127) if runtime == "tensorrt" else Range(0, 255))
        case = Subject(source.path, rules_for(runtime), ranges, pictures)

        found = case.search(target_sqnr_db=0, most_float_percent=100)

        assert found.before_db < -30
        assert found.kept == ()

    def test_layers_that_the_recipe_keeps_in_float_are_no_part_of_it(self, planted, runtime):
        found = planted(runtime).search(float_layers=("middle",), sensitivity=True)

        assert found.kept == ()
        assert found.before_db > 30
        assert "middle" not in found.errors.weights


class TestTheLayersToKeepForTheirTime:
    """By errors and times that are made up, on the graph of a small ResNet."""

    FIRST, SECOND = "body.1.first.0/Conv", "body.1.second.0/Conv"

    def kept(self, subject, lost: Mapping[str, float], **options: Any) -> list[str]:
        """What stays in float at first when these layers of a millisecond in int8 take so many nanoseconds more in float."""
        case = subject("residual", "onnxruntime")
        layers = place.claimed(case.plan)
        costs = Costs({name: 1e6 + lost.get(name, 1e9) for name in layers}, dict.fromkeys(layers, 1e6), 0.0, 0.0)
        errors = Errors({}, {**dict.fromkeys(layers, 1e-9), self.FIRST: 1e-2, self.SECOND: 2e-2})
        options = {"target_db": 200, "most": 1, "costs": costs, **options}
        return [step.layer for step in keep_float(case.model.graph, case.rules, [], errors, **options)]

    def test_are_those_that_remove_most_for_each_nanosecond_that_they_cost(self, subject):
        assert self.kept(subject, {self.FIRST: 1e6, self.SECOND: 1e6}) == [self.SECOND]
        assert self.kept(subject, {self.FIRST: 1e6, self.SECOND: 9e6}) == [self.FIRST]
        assert self.kept(subject, {self.FIRST: 1e6, self.SECOND: 9e6}, costs=None) == [self.SECOND]

    def test_do_not_come_first_because_they_cost_next_to_nothing(self, subject):
        # The whole takes 7 milliseconds; less than a fiftieth of that is no reason.
        assert self.kept(subject, {self.FIRST: 0, self.SECOND: 1e5}) == [self.SECOND]
        assert self.kept(subject, {self.FIRST: -1e6, self.SECOND: 1e5}) == [self.SECOND]


class TestTheSearchForTheGate:
    """A gate that is a plain function of the layers in float."""

    ALL = QuantizeTable(most_float_percent=100)

    def found(self, case: Subject, passes: Callable[[Sequence[Kept]], Verdict], table: QuantizeTable = ALL) -> Search:
        before = case.search(target_sqnr_db=0)
        return search_for_gate(case.case(table), before, passes)

    def ladder(self, case: Subject) -> list[Kept]:
        errors = case.search(sensitivity=True).errors
        return keep_float(case.model.graph, case.rules, [], errors, target_db=1e9, most=3)

    def test_changes_nothing_where_the_gate_passes_at_once(self, planted):
        case = planted("onnxruntime")

        assert self.found(case, lambda kept: Verdict.PASS) == case.search(target_sqnr_db=0)

    @pytest.mark.parametrize("runtime", BOTH)
    @pytest.mark.parametrize("needed", [1, 2, 3])
    def test_keeps_as_few_layers_in_float_as_the_gate_takes(self, planted, runtime, needed):
        case, asked = planted(runtime), []

        def passes(kept: Sequence[Kept]) -> Verdict:
            asked.append(len(kept))
            return Verdict.PASS if len(kept) >= needed else Verdict.FAIL

        found = self.found(case, passes)

        assert list(found.kept) == self.ladder(case)[:needed]
        assert found.kept[0].layer == "middle"
        assert found.after_db > 30 > 15 > found.before_db
        assert asked[:2] == [0, 3]
        assert len(asked) <= 4

    def test_goes_on_from_the_layers_that_stay_in_float_for_the_noise(self, planted):
        case, asked = planted("onnxruntime"), []

        def passes(kept: Sequence[Kept]) -> Verdict:
            asked.append([step.layer for step in kept])
            return Verdict.PASS if len(kept) >= 2 else Verdict.FAIL

        found = search_for_gate(case.case(self.ALL), case.search(), passes)

        assert asked[0] == ["middle"]
        assert [len(layers) for layers in asked] == [1, 3, 2]
        assert found.kept[:1] == case.search().kept

    def test_keeps_all_that_it_may_where_even_that_fails(self, planted):
        found = self.found(planted("onnxruntime"), lambda kept: Verdict.FAIL, QuantizeTable(most_float_percent=50))

        assert len(found.kept) == 2
        assert found.errors is not None
        assert found.after_db > found.before_db

    @pytest.mark.parametrize("reached", [Verdict.FAIL, Verdict.CANNOT_TELL])
    def test_keeps_nothing_more_where_so_few_images_cannot_tell_before_or_after(self, planted, reached):
        case = planted("onnxruntime")

        found = self.found(case, lambda kept: reached if kept else Verdict.CANNOT_TELL)

        assert found == replace(case.search(target_sqnr_db=0), errors=found.errors)
        assert found.errors is not None

    def test_keeps_nothing_where_nothing_may_stay_in_float_and_says_what_hurts(self, planted):
        found = self.found(planted("onnxruntime"), lambda kept: Verdict.FAIL, QuantizeTable(most_float_percent=0))

        assert (found.kept, found.after_db) == ((), found.before_db)
        assert max(found.errors.weights, key=found.errors.weights.get) == "middle"


PLANTED = """
import torch
from torch import nn


class Net(nn.Module):
    preprocess = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.25] * 3}

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.middle = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.middle(self.stem(x).relu()).relu().mean((2, 3)))
"""


@pytest.fixture(scope="module")
def run_planted(tmp_path_factory, photos, labelled) -> Callable[..., tuple[Mapping[str, Any], Path]]:
    """A whole run for both runtimes of a network with a sensitive layer, from a checkpoint unless other weights are named."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "net.py").write_text(PLANTED)
    namespace: dict[str, Any] = {}
    exec(PLANTED, namespace)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        network = namespace["Net"]()
        network.stem.weight[0] = network.stem.bias[0] = 0
        network.middle.weight[:, 0] = 200 * torch.randn(8, 3, 3)
        torch.save(network.state_dict(), folder / "net.pth")
        pictures = next(data.folder(labelled, labelled=True).batches(Preprocess(32, (32, 32), (0.5,) * 3, (0.25,) * 3), 12))
        network.head.bias -= network(torch.from_numpy(pictures)).mean(0)  # so that decisions differ from picture to picture
        torch.save(network.state_dict(), folder / "centred.pth")

    def run(
        name: str, weights: str = str(folder / "net.pth"), gate: Sequence[str] = (), **quantize: Any
    ) -> tuple[Mapping[str, Any], Path]:
        content = {
            "name": "planted",
            "model": {"name": f"{folder / 'net.py'}:Net", "weights": weights},
            "data": {"calibrate": str(photos)},
            "quantize": {"equalize": False, "speed": False, **quantize},
            "build": {"runtimes": BOTH},
            "benchmark": {"enabled": False},
        }
        if gate:
            content |= {"gate": list(gate), "data": {"calibrate": str(photos), "validate": str(labelled)}}
            content["model"]["weights"] = str(folder / "centred.pth")
        recipe = recipes.parse(content, base=Path("/"), source="a test")
        return pipeline.run(recipe, folder / name), folder / name

    return run


@pytest.fixture(scope="module")
def saved(run_planted) -> tuple[Mapping[str, Any], Path]:
    """Its result by the defaults, and its folder."""
    return run_planted("saved")


class TestAWholeRun:
    def int8(self, result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [engine for engine in result["engines"] if engine["precision"] == "int8"]

    def test_keeps_the_sensitive_layer_in_float_and_the_result_says_what_that_gains(self, saved):
        result = json.loads((saved[1] / "result.json").read_text())

        assert [engine["label"] for engine in self.int8(result)] == ["onnxruntime int8", "tensorrt int8"]
        for engine in self.int8(result):
            found = engine["search"]
            assert [step["layer"] for step in found["kept"]] == ["middle/Conv"]
            assert found["before_db"] < 25 <= found["after_db"]
            assert set(found["errors"]["weights"]) == {"stem/Conv", "middle/Conv", "head/Gemm"}
        assert result["engines"][0]["search"] is None

    def test_the_gate_passes_and_names_the_layer_with_its_reason(self, saved):
        gate = next(
            gate for gate in saved[0]["gates"] if gate["rule"] == "onnxruntime int8: every layer meant for int8 runs in it"
        )

        assert gate["verdict"] == "pass"
        assert gate["reason"].startswith("2 of 3 layers run in int8; kept in float, too sensitive: middle/Conv (")
        step = self.int8(saved[0])[0]["search"]["kept"][0]
        expected = f"{step['before_db']:.1f} dB expected at the output with it in int8, {step['after_db']:.1f} without"
        assert f"middle/Conv ({expected})" in gate["reason"]

    def test_the_summary_of_the_stage_says_both_ratios(self, saved):
        stages = {stage["name"]: stage["summary"] for stage in saved[0]["stages"]}
        search = self.int8(saved[0])[0]["search"]

        assert (
            f"SQNR {search['after_db']:.1f} dB ({search['before_db']:.1f} with all in int8; kept in float: 1"
            in stages["quantize-onnxruntime"]
        )

    def test_the_terminal_names_the_layer_and_warns_of_nothing(self, saved):
        said = text.run(saved[0])

        search = self.int8(saved[0])[1]["search"]
        gained = f"{search['before_db']:.1f} to {search['after_db']:.1f} dB"
        assert f"tensorrt int8: 1 sensitive layer stays in float: middle/Conv (SQNR {gained})" in said
        assert "target_sqnr_db" not in said

    def test_a_second_run_skips_every_stage(self, saved):
        again = pipeline.run(recipes.load(saved[1] / "recipe.toml"), saved[1])

        assert {stage["status"] for stage in again["stages"]} == {"skipped", "not built"}
        assert [engine["search"] for engine in again["engines"]] == [engine["search"] for engine in saved[0]["engines"]]

    def test_the_noise_is_measured_on_pictures_from_the_whole_folder(self, saved, photos, tmp_path, monkeypatch):
        run = shutil.copytree(saved[1], tmp_path / "run")
        shutil.rmtree(run / "quantize-tensorrt")
        seen: list[np.ndarray] = []
        monkeypatch.setattr(quantize, "search", lambda case, **options: seen.append(case.images) or search(case, **options))
        monkeypatch.setattr(precision, "_PROBED", 4)

        pipeline.run(recipes.load(run / "recipe.toml"), run)

        how = read_artifact(run / "export-onnx").preprocess
        everything = next(data.folder(photos, labelled=False).batches(how, 12))
        (found,) = seen
        places = [next(index for index, one in enumerate(everything) if np.array_equal(one, picture)) for picture in found]
        assert [place // 3 for place in places] == [0, 1, 2, 3]

    def test_a_ratio_that_is_not_reached_is_a_warning(self, run_planted):
        found, _ = run_planted("noisy", target_sqnr_db=100.0)

        said = text.run(found)
        for engine in self.int8(found):
            assert engine["search"]["after_db"] < 100
            assert f"warning: {engine['label']}: SQNR {engine['search']['after_db']:.1f} dB on calibration images" in said
        assert "with 1 layer in float, and quantize.target_sqnr_db asks for 100" in said

    def test_a_gate_that_int8_misses_keeps_the_layer_in_float_that_is_to_blame(self, run_planted):
        found, _ = run_planted("gated", target_sqnr_db=0, gate=["disagreements <= 0"])

        assert found["exit_code"] == 0
        for engine in self.int8(found):
            assert [step["layer"] for step in engine["search"]["kept"]] == ["middle/Conv"]

    def test_a_gate_that_cannot_be_reached_fails_and_names_the_layer_to_blame(self, run_planted):
        found, _ = run_planted("unreached", target_sqnr_db=0, most_float_percent=0, gate=["disagreements <= 0"])

        failed = [gate for gate in found["gates"] if gate["verdict"] == "fail"]
        assert found["exit_code"] == 3
        assert [gate["rule"].partition(": ")[2] for gate in failed] == ["disagreements <= 0"] * 2
        for gate in failed:
            assert "; most of the noise comes from the weights of middle/Conv (" in gate["reason"]

    def test_random_weights_are_not_searched(self, run_planted):
        found, _ = run_planted("random", weights="none", target_sqnr_db=200.0)

        nothing = {"wanted_db": None, "before_db": None, "after_db": None, "kept": [], "spared": [], "errors": None}
        nothing["for_gate"] = 0
        assert [engine["search"] for engine in self.int8(found)] == [nothing, nothing]
        assert "target_sqnr_db" not in text.run(found)
