"""Which layers are faster in float, and which way to quantize is kept for it: laws on made-up times, real graphs and files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import networks
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import artifact, quantize, runtimes
from deploykit.artifact import Artifact, Precision
from deploykit.quantize import place, speed
from deploykit.quantize.insert import insert
from deploykit.quantize.ranges import Range
from deploykit.quantize.speed import Costs, Race, Stopwatch, slow_layers
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import SLOW, KernelTime

RULES = runtimes.REGISTRY["onnxruntime"].rules
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput")
PIXELS = 4 * 3 * 3
few = settings(max_examples=100, deadline=None)
nanoseconds = st.integers(0, 9_000)  # beside 2,000 for each conversion


@dataclass(frozen=True)
class Case:
    """A small graph, the plan with everything in int8, and what its kernels take."""

    graph: ir.Graph
    everything: place.Plan
    costs: Costs

    @property
    def layers(self) -> list[str]:
        return place.claimed(self.everything)

    @property
    def kernels(self) -> set[str]:
        return names(self.everything)

    def plan(self, floats: Sequence[str]) -> place.Plan:
        return place.plan(self.graph, RULES, floats)

    def takes(self, on_integers: set[str]) -> float:
        """Every kernel on its side; every tensor is converted once for all that read it on the other side."""
        costs = self.costs
        total = sum((costs.integers if name in on_integers else costs.floats)[name] for name in self.kernels)
        for _, producer, readers in self.tensors():
            is_integers = producer in on_integers
            others = [node for node in readers if (node.name in on_integers) != is_integers]
            if others:
                total += 2_000 + (costs.to_floats if is_integers else costs.to_integers) * PIXELS
            if others and is_integers:
                only_floats = [str(node.name) for node in readers if node.name not in self.kernels]
                total += sum(max(0, costs.integers.get(name, 0) - costs.floats.get(name, 0)) for name in only_floats)
        return total

    def may_be(self, on_integers: set[str]) -> bool:
        """No Add is on integers unless the one node that reads it and could be is there too."""
        for _, producer, readers in self.tensors():
            wanting = [node.name for node in readers if node.name in self.kernels]
            alone = producer in on_integers and producer not in self.layers and len(wanting) == 1
            if alone and wanting[0] not in on_integers:
                return False
        return True

    def tensors(self) -> Iterator[tuple[ir.Value, str | None, list[ir.Node]]]:
        """Each quantized tensor, the kernel that gives it (with the Relu that alone reads its result), its readers."""
        for uses in self.everything.uses.values():
            value = uses[0][0].inputs[uses[0][1]]
            node = value.producer()
            if node is not None and node.op_type == "Relu" and len(list(node.inputs[0].uses())) == 1:
                node = node.inputs[0].producer()
            yield value, None if node is None else node.name, [reader for reader, _ in uses]

    def best(self) -> list[set[str]]:
        """All assignments than which none is cheaper, by trying every one."""
        kernels = sorted(self.kernels)
        subsets = chain.from_iterable(combinations(kernels, size) for size in range(len(kernels) + 1))
        possible = [set(some) for some in subsets if self.may_be(set(some))]
        least = min(map(self.takes, possible))
        return [some for some in possible if self.takes(some) == least]


def names(plan: place.Plan) -> set[str]:
    return {str(node.name) for node in plan.kernels}


def graph_of(lines: Sequence[str], last: str) -> ir.Graph:
    """Nodes in ONNX's text form on maps of four channels and three rows and columns, from `x0` to a pool of the map `last`."""
    body = "  ".join([*lines, f"[pool] logits = GlobalAveragePool({last})"])
    text = f'<ir_version: 9, opset_import: ["" : 19]> g (float[batch, 4, 3, 3] x0) => (float[batch, 4, 1, 1] logits) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True)).graph


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to six convolutions, Adds, Relus and Sigmoids, each of any map before it, with times in whole nanoseconds."""
    lines = ["[n0] x1 = Conv(x0, w)"]
    for number in range(1, draw(st.integers(2, 6))):
        op = draw(st.sampled_from(["Conv", "Conv", "Add", "Relu", "Sigmoid"]))
        reads = [f"x{draw(st.integers(max(0, number - 2), number))}" for _ in range(2 if op == "Add" else 1)]
        lines.append(f"[n{number}] x{number + 1} = {op}({', '.join([*reads, *['w'] * (op == 'Conv')])})")
    graph = graph_of(lines, f"x{len(lines)}")
    everything = place.plan(graph, RULES)
    nodes = [str(node.name) for node in graph]
    floats, integers = ({name: draw(nanoseconds) for name in nodes} for _ in range(2))
    return Case(graph, everything, Costs(floats, integers, draw(st.integers(0, 40)), draw(st.integers(0, 40))))


class TestTheCut:
    @few
    @given(cases())
    def test_leaves_in_float_what_no_cheapest_assignment_of_all_nodes_has_on_integers(self, case):
        found = slow_layers(case.everything, case.costs)

        ever_on_integers = set().union(*case.best())
        assert found == [name for name in case.layers if name not in ever_on_integers]

    @few
    @given(cases(), st.data())
    def test_is_of_what_a_plan_is_predicted_to_take(self, case, data):
        floats = data.draw(st.lists(st.sampled_from(case.layers), unique=True) if case.layers else st.just([]))
        plan = case.plan(floats)

        assert case.costs.predict(plan, case.everything) == pytest.approx(case.takes(names(plan)))

    @pytest.mark.parametrize(("loss", "slow"), [(7_959, []), (7_961, ["b"])])
    def test_leaves_a_slower_kernel_on_integers_where_going_to_floats_and_back_costs_more(self, loss, slow):
        everything = place.plan(graph_of(["[a] x1 = Conv(x0, w)", "[b] x2 = Conv(x1, w)", "[c] x3 = Conv(x2, w)"], "x3"), RULES)
        floats, integers = {"a": 10**6, "b": 10_000, "c": 10**6}, {"a": 1, "b": 10_000 + loss, "c": 1}

        # Each way takes 2,000 and 55 for each of 36 numbers.
        assert slow_layers(everything, Costs(floats, integers, 55, 55)) == slow

    def test_keeps_a_layer_on_integers_without_which_an_add_could_not_be_there(self):
        lines = ["[a] x1 = Conv(x0, w)", "[b] x2 = Conv(x1, w)", "[add] x3 = Add(x1, x2)", "[c] x4 = Conv(x3, w)"]
        everything = place.plan(graph_of(lines, "x4"), RULES)
        floats, integers = {"a": 10**6, "b": 10**6, "c": 10_000}, {"a": 1, "b": 1, "c": 30_000, "add": 1}

        # In float, `c` alone takes 20,000 less.
        assert slow_layers(everything, Costs({**floats, "add": 50_000}, integers, 0, 0)) == []
        assert slow_layers(everything, Costs({**floats, "add": 5_000}, integers, 0, 0)) == ["c"]

    def test_counts_no_conversion_behind_a_relu_that_is_part_of_its_layer(self):
        graph = graph_of(["[a] x1 = Conv(x0, w)", "[r] x2 = Relu(x1)", "[b] x3 = Conv(x2, w)"], "x3")
        everything = place.plan(graph, RULES)
        costs = Costs(dict.fromkeys("ab", 5_000), dict.fromkeys("ab", 1), 0, 0)

        # One conversion at each end, at 2,000 nanoseconds.
        assert costs.predict(everything, everything) == 2 + 2 * 2_000

    def test_counts_two_conversions_around_a_relu_that_others_read_in_front_of(self):
        lines = [
            "[a] x1 = Conv(x0, w)",
            "[r] x2 = Relu(x1)",
            "[s] x3 = Sigmoid(x1)",
            "[b] x4 = Conv(x2, w)",
            "[m] x5 = Mul(x4, x3)",
        ]
        everything = place.plan(graph_of(lines, "x5"), RULES)
        costs = Costs(dict.fromkeys("ab", 5_000), dict.fromkeys("ab", 1), 0, 0)

        # The image to integers, x1 to floats, x2 to integers, x4 to floats.
        assert costs.predict(everything, everything) == 2 + 4 * 2_000


# Each process orders sets of names otherwise. Many times are equal here, so many cuts cost the same.
CUT = """
import sys
import onnx_ir as ir
from deploykit import runtimes
from deploykit.quantize import place, speed

graph = ir.load(sys.argv[1]).graph
decided = place.plan(graph, runtimes.REGISTRY["onnxruntime"].rules)
names = [node.name for node in graph]
for step in (1, 2, 3):
    times = {name: 1000.1 * (number * step % 3) for number, name in enumerate(names)}
    costs = speed.Costs(times, dict(zip(names, reversed(times.values()))), 0.1, 0.1)
    print(speed.slow_layers(decided, costs), costs.predict(decided, decided).hex())
"""


def test_the_same_times_give_the_same_cut_in_every_process(portable):
    def cut(seed: int) -> str:
        command = [sys.executable, "-c", CUT, str(portable("branches").path)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first, second, third = map(cut, (1, 2, 3))

    assert first.count("\n") == 3
    assert "Conv" in first
    assert first == second == third


class TestCosts:
    FLOATS = (KernelTime("a", "Conv", "a", 100, 50), KernelTime("swish", "HardSwish", "swish", 10, 50))
    INTEGERS = (
        KernelTime("in", "QuantizeLinear", "", 30, 60),
        KernelTime("rows", "Transpose", "", 12, 60),
        KernelTime("a", "QLinearConv", "a", 40, 50),
        KernelTime("a again", "QLinearConv", "a", 2, 50),
        KernelTime("out", "DequantizeLinear", "", 20, 40),
        KernelTime("out too", "DequantizeLinear", "", 20, 60),
        KernelTime("part", "Mul", "", 80, 40),
    )

    def test_are_those_of_each_nodes_kernels_together(self):
        found = Costs.of(self.FLOATS, self.INTEGERS)

        assert found.floats == {"a": 100, "swish": 10}
        assert found.integers == {"a": 42}

    def test_of_a_conversion_are_for_each_element_with_the_layout_that_it_takes(self):
        found = Costs.of(self.FLOATS, self.INTEGERS)

        # QuantizeLinear and Transpose; DequantizeLinear and Transpose. No engine has a Reorder: 0.2 each.
        assert found.to_integers == pytest.approx(30 / 60 + 12 / 60 + 0.2)
        assert found.to_floats == pytest.approx(40 / 100 + 12 / 60 + 0.2)

    def test_of_an_operator_that_is_taken_apart_behind_integers_are_those_of_two_of_its_parts(self):
        found = Costs.of(self.FLOATS, self.INTEGERS)
        graph = graph_of(["[a] x1 = Conv(x0, w)", "[swish] x2 = HardSwish(x1)"], "x2")

        assert found.unfused(graph.node("swish")) == 2 * (80 / 40) * PIXELS
        assert found.unfused(graph.node("a")) == 0

    def test_of_empty_profiles_are_guesses_and_no_division_by_zero(self):
        assert Costs.of((), ()) == Costs({}, {}, pytest.approx(0.6), pytest.approx(0.6), 0)

    def test_count_the_numbers_of_one_image(self):
        graph = graph_of(["[a] x1 = Conv(x0, w)"], "x1")

        assert speed.elements(graph.inputs[0]) == PIXELS


class TestARace:
    @few
    @given(st.lists(st.floats(1, 1e9), min_size=1, max_size=6), st.floats(0, 0.5))
    def test_is_won_by_one_than_which_none_is_faster_by_more_than_the_noise_and_no_earlier_one_at_all(self, times, floor):
        race = Race(dict(enumerate(times)), floor, {index: (time, time) for index, time in enumerate(times)})

        winner = race.winner

        assert all(ns * (1 + floor) >= times[winner] for ns in times)
        assert all(ns > times[winner] for ns in times[:winner])

    def test_prefers_the_earlier_within_the_noise(self):
        exact = {"int8": (100.0, 100.0), "float": (90.0, 90.0)}
        assert Race({"int8": 100.0, "float": 96.0}, 0.05, exact).winner == "int8"
        assert Race({"int8": 100.0, "float": 95.0}, 0.05, exact).winner == "float"

    def test_that_another_way_might_have_won_leaves_the_earlier_one(self):
        wide = {"int8": (90.0, 170.0), "float": (60.0, 95.0)}
        assert Race({"int8": 150.0, "float": 90.0}, 0.01, wide).winner == "int8"


@dataclass
class Watch:
    """A stopwatch that never looks at a clock: a layer takes a millisecond in float, and in int8 what `slow` says of that."""

    wins: str = "int8"
    slow: Mapping[str, float] = field(default_factory=dict)
    usually: float = 0.1
    profiled: list[Precision] = field(default_factory=list)
    raced: list[Mapping[str, Artifact]] = field(default_factory=list)

    def profile(self, model: Artifact) -> Sequence[KernelTime]:
        self.profiled.append(model.precision)
        is_int8 = model.precision is Precision.INT8
        layers = [str(node.name) for node in ir.load(model.path).graph if node.op_type in place.LAYERS]
        share = {name: self.slow.get(name.split("/")[0], self.usually) if is_int8 else 1.0 for name in layers}
        conversions = [KernelTime("", op, "", 1, 10**6) for op in CONVERSIONS]
        return [*conversions, *(KernelTime(name, "", name, 1e6 * share[name], 1) for name in layers)]

    def race(self, models: Mapping[str, Artifact]) -> Race:
        self.raced.append({name: replace(model, path=model.path) for name, model in models.items()})
        ns = {name: 1e6 if name == self.wins else 2e6 for name in models}
        return Race(ns, 0.0, {name: (time, time) for name, time in ns.items()})

    @property
    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.profile, self.race)


@pytest.fixture(scope="session")
def lenet(portable, tmp_path_factory) -> tuple[Artifact, Artifact]:
    """LeNet-5, and what was observed on its calibration pictures."""
    return portable("lenet5"), networks.calibrated(portable("lenet5"), tmp_path_factory.mktemp("lenet"))


class TestTheFastestWayToQuantize:
    LAYERS = ("conv1/Conv", "conv2/Conv", "conv3/Conv", "fc1/Gemm", "fc2/Gemm")

    def quantized(
        self, lenet: tuple[Artifact, Artifact], folder: Any, watch: Stopwatch | None, **table: Any
    ) -> Mapping[str, Any]:
        return quantize.quantize(*lenet, QuantizeTable(**table), "onnxruntime", networks.made(folder), stopwatch=watch).facts

    def candidates(self, facts: Mapping[str, Any]) -> dict[str, tuple[int, float | None, bool]]:
        return {found["name"]: (found["int8_layers"], found["latency_ns"], found["chosen"]) for found in facts["candidates"]}

    def test_without_a_stopwatch_is_int8_and_nothing_is_weighed(self, lenet, tmp_path):
        facts = self.quantized(lenet, tmp_path, None)

        assert facts["candidates"] == []
        assert tuple(facts["int8_layers"]) == self.LAYERS

    def test_needs_no_race_where_the_kernels_leave_no_doubt(self, lenet, tmp_path):
        watch = Watch(usually=0.5)

        facts = self.quantized(lenet, tmp_path, watch.stopwatch)

        assert watch.profiled == [Precision.FP32, Precision.INT8]
        assert watch.raced == []
        assert self.candidates(facts) == {"int8": (5, None, True), "float": (0, None, False)}
        assert tuple(facts["int8_layers"]) == self.LAYERS

    @pytest.mark.parametrize(("wins", "int8"), [("int8", LAYERS), ("float", ())])
    def test_is_raced_against_float_where_int8_is_predicted_to_take_four_fifths_of_it_or_more(self, lenet, tmp_path, wins, int8):
        watch = Watch(usually=0.85, wins=wins)

        facts = self.quantized(lenet, tmp_path, watch.stopwatch)

        assert [list(models) for models in watch.raced] == [["int8", "float"]]
        assert tuple(facts["int8_layers"]) == int8

    def test_has_the_layers_in_float_that_are_slower_in_int8_with_that_reason(self, lenet, tmp_path):
        watch = Watch(slow={"conv2": 3.0}, wins="int8 where it is faster")

        facts = self.quantized(lenet, tmp_path, watch.stopwatch)

        assert [list(models) for models in watch.raced] == [["int8", "int8 where it is faster", "float"]]
        assert self.candidates(facts) == {
            "int8": (5, 2e6, False),
            "int8 where it is faster": (4, 1e6, True),
            "float": (0, 2e6, False),
        }
        assert facts["float_layers"] == {"conv2/Conv": SLOW}
        assert facts["kept_float"] == ["conv2/Conv"]

    def test_is_all_in_float_where_float_wins(self, lenet, tmp_path):
        facts = self.quantized(lenet, tmp_path, Watch(slow={"conv2": 3.0}, wins="float").stopwatch)

        assert facts["int8_layers"] == []
        assert facts["float_layers"] == dict.fromkeys(self.LAYERS, SLOW)
        assert not [node for node in onnx.load(tmp_path / "model.onnx").graph.node if "Quantize" in node.op_type]

    def test_is_found_by_a_race_alone_where_the_runtime_does_not_tell_what_kernels_take(self, lenet, tmp_path):
        watch = Watch(wins="float")

        facts = self.quantized(lenet, tmp_path, Stopwatch(None, watch.race))

        assert watch.profiled == []
        assert self.candidates(facts) == {"int8": (5, 2e6, False), "float": (0, 1e6, True)}

    def test_is_int8_where_all_layers_are_slower_and_the_race_says_otherwise(self, lenet, tmp_path):
        watch = Watch(usually=3.0)

        facts = self.quantized(lenet, tmp_path, watch.stopwatch)

        assert [list(models) for models in watch.raced] == [["int8", "float"]]
        assert tuple(facts["int8_layers"]) == self.LAYERS

    def test_leaves_what_the_recipe_keeps_in_float_there_in_all_of_them(self, lenet, tmp_path):
        watch = Watch(slow={"conv2": 3.0}, wins="int8 where it is faster")

        facts = self.quantized(lenet, tmp_path, watch.stopwatch, float_layers=("conv1*",))

        assert facts["float_layers"] == {"conv1/Conv": place.KEPT, "conv2/Conv": SLOW}
        assert [made.facts["float_layers"]["conv1/Conv"] for made in watch.raced[0].values()] == [place.KEPT] * 3

    def test_leaves_what_is_too_sensitive_in_float_in_all_of_them_with_that_reason(self, lenet, tmp_path):
        watch = Watch(slow=dict.fromkeys(("conv1", "conv2", "conv3"), 3.0), wins="int8 where it is faster")
        table = QuantizeTable(target_sqnr_db=200, most_float_percent=40, rounding="nearest")

        made = quantize.quantize(
            *lenet, table, "onnxruntime", tmp_path, images=lambda: networks.images(4, seed=1), stopwatch=watch.stopwatch
        )

        kept = [step["layer"] for step in made.facts["search"]["kept"]]
        assert len(kept) == 2
        for model in (*watch.raced[0].values(), made):
            assert [model.facts["float_layers"][layer].partition(":")[0] for layer in kept] == ["too sensitive"] * 2

    def test_the_noise_that_is_told_is_that_of_the_graph_which_was_chosen(self, lenet, tmp_path):
        told = {}
        for wins in ("int8", "int8 where it is faster", "float"):
            watch, out = Watch(slow={"conv2": 3.0}, wins=wins), tmp_path / wins
            out.mkdir()
            table = QuantizeTable(rounding="nearest")
            some = networks.images(4, seed=1)
            made = quantize.quantize(*lenet, table, "onnxruntime", out, images=lambda some=some: some, stopwatch=watch.stopwatch)
            told[wins] = made.facts["search"]["after_db"]
            weighed = {found["name"]: found["sqnr_db"] for found in made.facts["candidates"]}
            assert weighed[wins] == told[wins]

        assert told["int8"] < told["int8 where it is faster"] < told["float"]
        assert told["float"] > 100

    def test_is_measured_on_files_that_are_gone_afterwards(self, lenet, tmp_path):
        watch = Watch(slow={"conv2": 3.0})

        self.quantized(lenet, tmp_path / "out", watch.stopwatch)

        assert not [model.folder for model in watch.raced[0].values() if model.folder.exists()]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", artifact.SAMPLES}

    def test_says_how_large_each_file_is(self, lenet, tmp_path):
        facts = self.quantized(lenet, tmp_path, Watch(slow={"conv2": 3.0}).stopwatch)

        sizes = {found["name"]: found["bytes"] for found in facts["candidates"]}
        assert {found["sqnr_db"] for found in facts["candidates"]} == {None}  # no images, so no noise was measured
        assert sizes["int8"] == (tmp_path / "model.onnx").stat().st_size
        assert sizes["int8"] < sizes["int8 where it is faster"] < sizes["float"]


def test_the_plan_of_a_graph_does_not_change_when_its_kernels_are_weighed(portable):
    model = ir.load(portable("residual").path)
    before = ir.to_proto(model).SerializeToString()
    decided = place.plan(model.graph, RULES)

    slow_layers(decided, Costs({}, dict.fromkeys(place.claimed(decided), 1e6), 0.1, 0.1))

    assert ir.to_proto(model).SerializeToString() == before
    insert(model, decided, dict.fromkeys(decided.uses, Range(-1, 1)), RULES)


def test_a_layer_that_is_kept_by_name_may_have_brackets_in_it():
    graph = graph_of(["[a] x1 = Conv(x0, w)", "[b] x2 = Conv(x1, w)"], "x2")
    next(node for node in graph if node.name == "a").name = "block[0]/Conv"

    assert place.claimed(place.plan(graph, RULES, ["block[0]/Conv"])) == ["b"]
