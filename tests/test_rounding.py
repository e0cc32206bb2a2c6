"""Weights rounded together: laws of the descent, and real layers of every kind on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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

from deploykit import quantize, runtimes
from deploykit.artifact import Artifact
from deploykit.quantize import observe, place
from deploykit.quantize.insert import activation_parameters, insert, largest_weight, quantized_weights
from deploykit.quantize.ranges import Range, minmax
from deploykit.quantize.rounding import NEAREST, Rounded, descend, images_at_once, put, rounded, windows_of
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import QdqRules, onnxruntime

BOTH = ["onnxruntime", "tensorrt"]
few = settings(max_examples=20, deadline=None)


class Kinds(nn.Module):
    """A layer of every kind: strided, dilated, grouped, depthwise, without a bias, a MatMul without one, and a Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16)
        self.unbiased = nn.Conv2d(16, 8, 1, bias=False)
        self.mixed = nn.Linear(8, 12, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        values = images
        for layer in (self.strided, self.dilated, self.grouped, self.depthwise, self.unbiased):
            values = layer(values).relu()
        return self.head(self.mixed(values.flatten(2).transpose(1, 2)).relu().mean(1))


@dataclass(frozen=True)
class Subject:
    """A float network, the rules and ranges by which it is quantized, and pictures."""

    path: Path
    rules: QdqRules
    ranges: Mapping[str, Range]
    pictures: np.ndarray

    def rounded(self, keep_float: tuple[str, ...] = ()) -> dict[str, Rounded]:
        model = ir.load(self.path)
        decided = place.plan(model.graph, self.rules, keep_float)
        return rounded(model, decided, self.ranges, self.rules, self.pictures)

    def put(self, found: Mapping[str, Rounded], keep_float: tuple[str, ...] = ()) -> tuple[ir.Model, place.Plan]:
        """The float network with what was found in it, not quantized yet, and its plan."""
        model = ir.load(self.path)
        decided = place.plan(model.graph, self.rules, keep_float)
        put(model.graph, decided, found)
        return model, decided

    def noise(self, found: Mapping[str, Rounded], pictures: np.ndarray) -> float:
        """Squared error of the quantized network's answers to pictures, as a share of the answers' power."""
        model, decided = self.put(found)
        insert(model, decided, self.ranges, self.rules)
        wanted, answers = answered(ir.load(self.path), pictures), answered(model, pictures)
        return float(((answers - wanted) ** 2).sum() / (wanted**2).sum())

    def means(self, found: Mapping[str, Rounded] | None, layer: str) -> np.ndarray:
        """The mean of each channel that a layer computes, quantized with what was found, or in float."""
        model, decided = self.put(found or NEAREST)
        if found is not None:
            insert(model, decided, self.ranges, self.rules)
        result = layers(model)[layer].outputs[0]
        model.graph.outputs.clear()
        model.graph.outputs.append(result)
        return answered(model, self.pictures).mean(axis=(0, 2, 3))


def answered(model: ir.Model, pictures: np.ndarray) -> np.ndarray:
    session = onnxruntime.reference(ir.to_proto(model).SerializeToString())
    (answers,) = runtimes.run(session, {"image": pictures}).values()
    session.close()
    return answers


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Callable[..., Subject]:
    """A network with every kind of layer, by the rules of a runtime, its ranges seen on 32 pictures."""
    torch.manual_seed(0)
    source = networks.exported(Kinds(), tmp_path_factory.mktemp("kinds"))
    pictures = networks.images(32, seed=1)
    everything = place.tensors(ir.load(source.path).graph, [runtimes.rules(name) for name in BOTH])
    seen = observe.observe(source.path, everything, [pictures], total=32)
    ranges = {name: minmax(found) for name, found in seen.items()}
    return lambda runtime, **changes: Subject(source.path, replace(runtimes.rules(runtime), **changes), ranges, pictures)


def layers(model: ir.Model) -> dict[str, ir.Node]:
    return {str(node.name): node for node in model.graph if node.op_type in place.LAYERS}


def constant(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


class TestTheDescent:
    problems = given(
        seed=st.integers(0, 2**32 - 1),
        groups=st.integers(1, 3),
        outputs=st.integers(1, 4),
        inputs=st.integers(1, 130),
        count=st.integers(2, 60),
        largest=st.sampled_from([63, 127]),
        evenness=st.sampled_from([1.0, 0.01]),  # all weights near the largest, where a step up would leave the range
    )

    def problem(
        self, seed: int, groups: int, outputs: int, inputs: int, count: int, largest: int, evenness: float = 1.0
    ) -> dict[str, np.ndarray]:
        """Correlated inputs, weights and their nearest integers; what is wanted is what the weights make of the inputs."""
        draw = np.random.default_rng(seed)
        mixed = draw.normal(size=(groups, inputs, inputs)) + 2 * draw.normal(size=(groups, inputs, 1))
        read = (draw.normal(size=(groups, count, inputs)) @ mixed).astype(np.float32)
        weights = draw.normal(size=(groups, outputs, inputs)).astype(np.float32)
        weights = np.sign(weights) * np.abs(weights) ** np.float32(evenness)
        steps = (np.abs(weights).max(axis=2) / largest).astype(np.float32)
        nearest = np.clip(np.rint(weights / steps[..., None]), -largest, largest).astype(np.float32)
        return {
            "integers": nearest,
            "read": read,
            "wanted": read @ weights.transpose(0, 2, 1),
            "weights": weights,
            "steps": steps,
        }

    def error(self, found: np.ndarray, given: Mapping[str, np.ndarray]) -> np.ndarray:
        values = (found * given["steps"][..., None]).transpose(0, 2, 1)
        return ((given["wanted"] - given["read"] @ values).astype(np.float64) ** 2).sum(axis=1)

    @problems
    @few
    def test_no_output_has_more_squared_error_than_with_the_nearest_integers(
        self, seed, groups, outputs, inputs, count, largest, evenness
    ):
        given = self.problem(seed, groups, outputs, inputs, count, largest, evenness)

        found = descend(**given, largest=largest)

        assert (self.error(found, given) <= self.error(given["integers"], given) * (1 + 1e-3)).all()

    @problems
    @few
    def test_integers_are_whole_and_stay_in_range(self, seed, groups, outputs, inputs, count, largest, evenness):
        found = descend(**self.problem(seed, groups, outputs, inputs, count, largest, evenness), largest=largest)

        assert (found == np.rint(found)).all()
        assert np.abs(found).max() <= largest

    @problems
    @few
    def test_the_largest_weight_of_a_channel_stays_because_the_scale_is_told_by_it(
        self, seed, groups, outputs, inputs, count, largest, evenness
    ):
        given = self.problem(seed, groups, outputs, inputs, count, largest, evenness)

        found = descend(**given, largest=largest)

        pinned = np.abs(given["integers"]) == largest
        assert (found[pinned] == given["integers"][pinned]).all()

    def test_a_weight_that_would_be_best_beyond_the_range_ends_at_its_end(self):
        read = np.random.default_rng(0).normal(size=(1, 50, 2)).astype(np.float32)
        weights, steps = np.array([[[1.0, 0.9]]], np.float32), np.full((1, 1), 1 / 127, np.float32)
        wanted = read @ np.array([[[1.0], [3.0]]], np.float32)

        found = descend(np.rint(weights * 127), read, wanted, weights, steps, largest=127)

        assert found.tolist() == [[[127, 127]]]

    def test_where_inputs_move_together_errors_cancel(self):
        given = self.problem(seed=0, groups=1, outputs=8, inputs=64, count=500, largest=127)

        found = descend(**given, largest=127)

        assert self.error(found, given).sum() < 0.7 * self.error(given["integers"], given).sum()

    def test_inputs_that_are_never_seen_keep_the_nearest_integers(self):
        given = self.problem(seed=0, groups=1, outputs=8, inputs=64, count=500, largest=127)
        given["read"][..., 10:20] = 0
        given["wanted"] = given["read"] @ given["weights"].transpose(0, 2, 1)

        found = descend(**given, largest=127)

        assert (found[..., 10:20] == given["integers"][..., 10:20]).all()
        assert (found != given["integers"]).any()


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    kernel=sizes,
    strides=sizes,
    dilations=sizes,
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    auto_pad=st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]),
)
@settings(max_examples=60, deadline=None)
def test_windows_times_weights_are_what_onnx_runtime_computes(kernel, strides, dilations, pads, auto_pad):
    options: dict[str, object] = {"pads": pads, "dilations": dilations} if auto_pad == "NOTSET" else {"auto_pad": auto_pad}
    draw = np.random.default_rng(0)
    weights, image = draw.normal(size=(4, 3, *kernel)).astype(np.float32), draw.normal(size=(2, 3, 9, 8)).astype(np.float32)
    node = helper.make_node("Conv", ["image", "weights"], ["result"], strides=strides, **options)
    float32 = onnx.TensorProto.FLOAT
    inputs, outputs = (helper.make_tensor_value_info(name, float32, [None] * 4) for name in ("image", "result"))
    graph = helper.make_graph([node], "one", [inputs], [outputs], [numpy_helper.from_array(weights, "weights")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))

    windows = windows_of(model.graph.node(0), image)

    answers = np.einsum("nijckl,ockl->noij", windows, weights)
    np.testing.assert_allclose(answers, answered(model, image), atol=1e-4)


@pytest.mark.parametrize(("side", "images"), [(8, 8), (1024, 8), (2048, 4), (4096, 1), (16384, 1)])
def test_large_activations_are_looked_at_in_fewer_images_at_once(side, images):
    four = [ir.Value(name=f"x{index}", shape=ir.Shape(["batch", 1, side, side])) for index in range(4)]

    assert images_at_once(four) == images


@pytest.mark.parametrize("runtime", BOTH)
class TestALayer:
    def test_every_kind_of_layer_is_rounded(self, subject, runtime):
        mine = subject(runtime)

        assert set(mine.rounded()) == set(layers(ir.load(mine.path)))

    @pytest.mark.parametrize("bits", [7, 8])
    def test_quantization_finds_the_very_integers_that_were_chosen(self, subject, runtime, bits):
        mine = subject(runtime, weight_bits=bits)
        _, decided = mine.put(mine.rounded())
        parameters = activation_parameters(decided, mine.ranges, mine.rules)

        for name, uses in decided.uses.items():
            for node, index in uses:
                if index != 0 or node.op_type not in place.LAYERS:
                    continue
                integers, scale, shape = quantized_weights(node, mine.rules, parameters[name].scale)
                chosen = constant(node, 1)
                np.testing.assert_allclose(integers * scale.reshape(shape), chosen, rtol=1e-5, atol=1e-9)
                assert np.abs(integers).max() == largest_weight(node, mine.rules)

    def test_the_quantized_network_answers_more_like_the_float_one(self, subject, runtime):
        mine, others = subject(runtime), networks.images(64, seed=2)

        assert mine.noise(mine.rounded(), others) < 0.9 * mine.noise(NEAREST, others)

    def test_the_bias_takes_what_is_left_on_average(self, subject, runtime):
        """A range that cuts off the upper end of what a layer reads moves the mean of all that it computes."""
        mine = subject(runtime)
        uses = place.plan(ir.load(mine.path).graph, mine.rules).uses
        read = next(name for name, found in uses.items() if any(node.name == "grouped/Conv" for node, _ in found))
        cut = replace(mine, ranges={**mine.ranges, read: Range(0.0, mine.ranges[read].high / 3)})
        found = cut.rounded()

        wanted = cut.means(None, "grouped/Conv")
        after = cut.means(found, "grouped/Conv") - wanted
        before = cut.means({name: replace(layer, bias=None) for name, layer in found.items()}, "grouped/Conv") - wanted
        assert np.abs(after).max() < 0.1 * np.abs(before).max()

    def test_layers_in_float_keep_their_weights(self, subject, runtime):
        mine = subject(runtime)
        found = mine.rounded()

        model, _ = mine.put(found, keep_float=("grouped/Conv",))

        before, after = layers(ir.load(mine.path)), layers(model)
        same = {name for name in before if np.array_equal(constant(before[name], 1), constant(after[name], 1))}
        assert same == {"grouped/Conv"}
        assert np.array_equal(constant(before["grouped/Conv"], 2), constant(after["grouped/Conv"], 2))

    def test_the_float_network_is_left_as_it_is(self, subject, runtime):
        mine = subject(runtime)
        model = ir.load(mine.path)
        before = ir.to_proto(model).SerializeToString()

        rounded(model, place.plan(model.graph, mine.rules), mine.ranges, mine.rules, mine.pictures)

        assert ir.to_proto(model).SerializeToString() == before


def test_layers_that_share_weights_are_rounded_each_for_its_own_input(tmp_path):
    source = networks.exported("twice", tmp_path)
    rules, pictures = runtimes.rules("onnxruntime"), networks.images(16, seed=1)
    seen = observe.observe(source.path, place.tensors(ir.load(source.path).graph, [rules]), [pictures], total=16)
    mine = Subject(source.path, rules, {name: minmax(found) for name, found in seen.items()}, pictures)

    found = mine.rounded()

    model, _ = mine.put(found)
    shared: dict[str, list[str]] = {}
    for node in layers(ir.load(mine.path)).values():
        shared.setdefault(node.inputs[1].name, []).append(str(node.name))
    first, second = next(names for names in shared.values() if len(names) == 2)
    assert not np.array_equal(found[first].weights, found[second].weights)
    assert np.array_equal(constant(layers(model)[first], 1), found[first].weights)
    assert np.array_equal(constant(layers(model)[second], 1), found[second].weights)


def test_images_that_only_fill_a_fixed_batch_do_not_count(tmp_path):
    torch.manual_seed(0)
    source = networks.exported(Kinds(), tmp_path)
    model = onnx.load(source.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "fixed.onnx")
    rules = runtimes.rules("onnxruntime")
    ranges = dict.fromkeys(place.tensors(ir.load(source.path).graph, [rules]), Range(-2, 2))
    # So few images that all of their places are looked at, and the last batch holds two of them.
    any_batch = Subject(source.path, rules, ranges, networks.images(6, seed=1))

    expected, found = any_batch.rounded(), replace(any_batch, path=tmp_path / "fixed.onnx").rounded()

    assert expected.keys() == found.keys()
    for name in ("dilated/Conv", "grouped/Conv", "depthwise/Conv"):
        assert np.isclose(expected[name].weights, found[name].weights, rtol=1e-5).mean() > 0.99  # sums in another order
        np.testing.assert_allclose(found[name].bias, expected[name].bias, atol=1e-4)


def quantized(source: Artifact, folder: Path, pictures: np.ndarray | None, **table: object) -> bytes:
    observations, out = folder / "observations", folder / "out"
    observations.mkdir(parents=True)
    out.mkdir()
    seen = networks.calibrated(source, observations)
    images = None if pictures is None else (lambda: pictures)
    return quantize.quantize(source, seen, QuantizeTable(**table), "onnxruntime", out, images=images).path.read_bytes()


class TestAWholeQuantization:
    def weights(self, content: bytes) -> dict[str, np.ndarray]:
        graph = onnx.load_model_from_string(content).graph
        found = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
        return {name: values for name, values in found.items() if name.endswith("weight/quantized")}

    def test_the_same_input_gives_the_same_file(self, portable, tmp_path):
        pictures = networks.images(16, seed=1)

        first, second = (quantized(portable("residual"), tmp_path / name, pictures) for name in "ab")

        assert first == second

    def test_rounding_to_the_nearest_can_be_asked_for(self, portable, tmp_path):
        pictures = networks.images(16, seed=1)

        together = self.weights(quantized(portable("residual"), tmp_path / "a", pictures))
        nearest = self.weights(quantized(portable("residual"), tmp_path / "b", pictures, rounding="nearest"))
        unsearched = self.weights(quantized(portable("residual"), tmp_path / "c", None))

        assert together.keys() == nearest.keys() == unsearched.keys()
        assert any((together[name] != nearest[name]).any() for name in nearest)
        assert all((unsearched[name] == nearest[name]).all() for name in nearest)
