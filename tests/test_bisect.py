"""Which layer of a graph is wrong: faults planted into small networks, in float and INT8, and clean ones (real ONNX Runtime)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import networks
import numpy as np
import onnx
import pytest
import torch
from fake_cuda import FakeCuda, Faults
from fake_tensorrt import World, installed
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from deploykit import artifact, build
from deploykit.artifact import Artifact, write_manifest
from deploykit.bisect import MARGIN, Bisection, bisect, command, graph, noise, text
from deploykit.bisect.hooks import Watched
from deploykit.errors import DeploykitError, UsageError
from deploykit.machine import cpu_features

FORMS = ("float", "onnxruntime", "tensorrt")
INT8 = FORMS[1:]
IMAGES = networks.images(16, seed=5)
NOISE = np.random.default_rng(1).standard_normal((8, 3, 32, 32)).astype(np.float32)
DEPTHWISE = "body.depthwise.0/Conv"  # of the mobile network, with nine weights in each kernel
SECOND = "body.1.second.0/Conv"  # of the residual network; its input comes from a Relu, its output goes into an Add


@pytest.fixture(scope="session")
def form(portable, tmp_path_factory) -> Callable[[str, str], Path]:
    """A small network as an ONNX file: in float, or INT8 by the rules of a runtime."""
    root = tmp_path_factory.mktemp("forms")

    def make(name: str, kind: str) -> Path:
        if kind == "float":
            return portable(name).path
        return networks.quantized(portable(name), kind, root / name / kind).path

    return cache(make)


@pytest.fixture
def planted(tmp_path) -> Callable[[Path, Callable[[onnx.ModelProto], None]], Path]:
    """A copy of a graph with something changed."""

    def plant(source: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(source)
        change(model)
        onnx.save(model, tmp_path / "planted.onnx")
        return tmp_path / "planted.onnx"

    return plant


def bisected(a: Path, b: Path, images: np.ndarray = IMAGES) -> Bisection:
    return bisect(a, b, lambda: [images[:4], images[4:]])


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def stored_behind(model: onnx.ModelProto, tensor: str) -> str:
    """The initializer that a constant input comes from, through its Q/DQ."""
    producers = {name: node for node in model.graph.node for name in node.output}
    while tensor in producers:
        tensor = producers[tensor].input[0]
    return tensor


def change(model: onnx.ModelProto, name: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    value = next(value for value in model.graph.initializer if value.name == name)
    value.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(how(numpy_helper.to_array(value).copy())), name))


def weights(layer: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    return lambda model: change(model, stored_behind(model, node_of(model, layer).input[1]), how)


def attribute(layer: str, name: str, values: list[int]) -> Callable[[onnx.ModelProto], None]:
    def set_it(model: onnx.ModelProto) -> None:
        next(item for item in node_of(model, layer).attribute if item.name == name).ints[:] = values

    return set_it


def input_quantizer(model: onnx.ModelProto, layer: str) -> onnx.NodeProto:
    """The DequantizeLinear that a layer's activation comes from."""
    return next(node for node in model.graph.node if node_of(model, layer).input[0] in node.output)


def one_value(values: np.ndarray) -> np.ndarray:
    """The largest weight of output channel 2, with the other sign."""
    flat = values[2].reshape(-1)
    largest = np.abs(flat.astype(float)).argmax()
    flat[largest] = -flat[largest]
    return values


def one_channel(values: np.ndarray) -> np.ndarray:
    values[1] = np.roll(values[1].reshape(-1), 1).reshape(values[1].shape)
    return values


def without(name: str) -> Callable[[onnx.ModelProto], None]:
    """A node is gone, and who read its result reads what it read."""

    def remove(model: onnx.ModelProto) -> None:
        node = node_of(model, name)
        for reader in model.graph.node:
            reader.input[:] = [node.input[0] if item == node.output[0] else item for item in reader.input]
        model.graph.node.remove(node)

    return remove


class TestCleanNetworks:
    @pytest.mark.parametrize("kind", FORMS)
    @pytest.mark.parametrize("name", sorted(networks.NETWORKS))
    def test_have_no_layer_beyond_what_its_precision_explains(self, form, name, kind):
        for images in (IMAGES[:8], NOISE):
            found = bisected(form(name, "float"), form(name, kind), images)

            assert found.culprit is None, found.suspects
            assert found.proof is None
            assert found.passes == 1

    @settings(deadline=None, max_examples=10)
    @given(seed=st.integers(0, 2**16), count=st.integers(1, 6))
    def test_have_none_on_any_images(self, form, seed, count):
        images = networks.images(count, seed=seed)

        found = bisect(form("residual", "float"), form("residual", "onnxruntime"), lambda: [images])

        assert found.suspects == ()
        assert found.images == count

    def test_may_have_the_weights_of_a_depthwise_kernel_moved_by_some_steps(self, form, planted):
        def move(values: np.ndarray) -> np.ndarray:
            flat = values[3].reshape(-1).astype(int)
            flat += np.where(np.abs(flat) < np.abs(flat).max(), np.array([11, 8, -3, 11, 9, -4, 11, 11, 2]), 0)
            values[3] = np.clip(flat, -127, 127).reshape(values[3].shape)
            return values

        found = bisected(form("mobile", "float"), planted(form("mobile", "onnxruntime"), weights(DEPTHWISE, move)))

        assert found.suspects == ()

    @pytest.mark.parametrize("kind", INT8)
    def test_may_have_ranges_that_a_few_values_lie_far_outside_of(self, form, kind):
        images = IMAGES.copy()
        images[0, :, :4, :4] *= 10

        assert bisected(form("residual", "float"), form("residual", kind), images).suspects == ()

    @pytest.mark.parametrize("kind", INT8)
    def test_are_still_clean_when_their_weights_were_rounded_together(self, portable, tmp_path, kind):
        source = portable("residual")
        seen = networks.calibrated(source, tmp_path / "seen")
        from deploykit import quantize
        from deploykit.recipe import QuantizeTable

        made = quantize.quantize(
            source, seen, QuantizeTable(), kind, networks.made(tmp_path / "int8"), images=lambda: networks.images(32, seed=1)
        )

        assert bisected(source.path, made.path).suspects == ()

    def test_what_int8_explains_is_what_it_costs(self, form):
        found = bisected(form("residual", "float"), form("residual", "onnxruntime"))

        layers = {layer.node: layer for layer in found.layers if layer.op == "Conv"}
        apart = {name: abs(layer.own_db - layer.explained_db) for name, layer in layers.items()}
        assert len(apart) == 6
        assert max(apart.values()) < 5, apart

    @pytest.mark.parametrize("left", ["weights", "input"])
    def test_what_int8_explains_is_what_its_weights_and_its_input_cost_alone(self, form, planted, left):
        def half_in_float(model: onnx.ModelProto) -> None:
            node, right = node_of(model, SECOND), onnx.load(form("residual", "float"))
            if left == "weights":
                node.input[0] = "body.1.first.2/Relu"
                return
            node.input[1:] = node_of(right, SECOND).input[1:]
            model.graph.initializer.extend(value for value in right.graph.initializer if value.name in node.input[1:])

        found = bisected(form("residual", "float"), planted(form("residual", "onnxruntime"), half_in_float))

        (layer,) = [layer for layer in found.layers if layer.node == SECOND]
        # Half of what comes out of a Relu are zeros, which are not rounded.
        assert -2.5 < layer.own_db - layer.explained_db < (2.5 if left == "weights" else 7)
        assert 45 < layer.own_db < 60

    def test_a_graph_is_equal_to_itself(self, form):
        found = bisected(form("lenet5", "float"), form("lenet5", "float"))

        assert {layer.own_db for layer in found.layers} == {200.0}
        assert found.output_db == 200.0


@pytest.mark.parametrize("kind", FORMS)
class TestAFaultIsFound:
    def found(self, form, planted, kind: str, how: Callable[[onnx.ModelProto], None], network: str = "residual") -> Bisection:
        return bisected(form(network, "float"), planted(form(network, kind), how))

    @pytest.mark.parametrize(
        "layer", ["body.0.0/Conv", "body.1.first.0/Conv", SECOND, "body.2.first.0/Conv", "body.2.skip.0/Conv", "head/Gemm"]
    )
    def test_in_whichever_layer_a_channel_is_corrupted(self, form, planted, kind, layer):
        found = self.found(form, planted, kind, weights(layer, one_channel))

        assert [suspect.node for suspect in found.suspects] == [layer]
        assert found.culprit.module == layer.rpartition("/")[0]
        assert found.culprit.channel == 1
        assert "1" in found.hints[0]
        assert found.passes == 2

    def test_when_one_weight_has_the_wrong_sign(self, form, planted, kind):
        found = self.found(form, planted, kind, weights("body.0.0/Conv", one_value))

        assert found.culprit.node == "body.0.0/Conv"
        assert found.culprit.channel == 2
        assert "output channel 2" in found.hints[0]

    def test_when_all_weights_have_the_wrong_sign_and_the_proof_cures_it(self, form, planted, kind):
        found = self.found(form, planted, kind, weights(SECOND, lambda values: -values))

        clean = bisected(form("residual", "float"), form("residual", kind))
        assert found.culprit.node == SECOND
        assert "-1 times" in found.hints[0]
        assert found.proof.cured
        assert found.proof.before_db == found.output_db < 30
        assert found.proof.after_db > clean.output_db - 2

    def test_when_it_pads_at_two_sides_only(self, form, planted, kind):
        found = self.found(form, planted, kind, attribute(SECOND, "pads", [0, 0, 2, 2]))

        assert found.culprit.node == SECOND
        assert found.hints[0] == "pads is [0, 0, 2, 2], not [1, 1, 1, 1]"

    def test_when_a_stride_gives_another_shape_and_nothing_runs(self, form, planted, kind):
        found = self.found(form, planted, kind, attribute(SECOND, "strides", [2, 2]))

        assert found.culprit.node == SECOND
        assert found.culprit.own_db is None
        assert found.hints == ("strides is [2, 2], not [1, 1]",)
        assert found.failure
        assert (found.output_db, found.proof.before_db) == (None, None)
        assert {layer.total_db for layer in found.layers} == {None}
        assert found.proof.cured

    def test_when_its_weights_read_other_channels_and_it_cannot_run(self, form, planted, kind):
        found = self.found(form, planted, kind, weights(SECOND, lambda values: values[:, :-1]))

        assert [suspect.node for suspect in found.suspects] == [SECOND]
        assert found.culprit.own_db is None
        assert found.culprit.excess_db == 200.0
        assert "channel" in found.culprit.failure.lower()
        assert found.hints[0] == "the weights have shape [8, 7, 3, 3], not [8, 8, 3, 3]"
        assert {layer.failure for layer in found.layers if layer.node != SECOND} == {""}
        assert found.proof.cured

    def test_when_its_kernels_are_transposed_as_a_converter_may_leave_them(self, form, planted, kind):
        found = self.found(form, planted, kind, weights(SECOND, lambda values: values.transpose(0, 1, 3, 2)))

        assert found.culprit.node == SECOND
        assert found.hints[0] == "height and width of its kernels are swapped"

    def test_when_the_first_layer_reads_bgr(self, form, planted, kind):
        found = self.found(form, planted, kind, weights("body.0.0/Conv", lambda values: values[:, ::-1]))

        assert found.culprit.node == "body.0.0/Conv"
        assert found.hints[0] == "its input channels are in the order 2, 1, 0: RGB and BGR were swapped"

    def test_when_an_activation_is_lost_that_two_layers_read(self, form, planted, kind):
        # Not a Relu: behind uint8 it is part of the quantization, and to lose it changes nothing.
        found = self.found(form, planted, kind, without("body.depthwise.2/HardSwish"), network="mobile")

        assert found.culprit.node == "body.depthwise.2/HardSwish"
        assert found.hints[0] == "HardSwish body.depthwise.2/HardSwish is missing"
        assert found.missing == ("body.depthwise.2/HardSwish",)
        assert found.proof.cured
        assert found.proof.after_db > 35

    def test_when_a_bias_is_that_of_another_layer(self, form, planted, kind):
        def swapped(model: onnx.ModelProto) -> None:
            mine, other = (
                stored_behind(model, node_of(model, name).input[2]) for name in ("body.0.0/Conv", "body.1.first.0/Conv")
            )
            value = next(value for value in model.graph.initializer if value.name == other)
            change(model, mine, lambda _: numpy_helper.to_array(value))

        found = self.found(form, planted, kind, swapped)

        assert found.culprit.node == "body.0.0/Conv"
        assert found.hints[0].startswith("the bias is another")

    def test_first_when_two_are_wrong(self, form, planted, kind):
        def both(model: onnx.ModelProto) -> None:
            weights("body.2.skip.0/Conv", lambda values: -values)(model)
            weights("body.1.first.0/Conv", one_channel)(model)

        found = self.found(form, planted, kind, both)

        assert [suspect.node for suspect in found.suspects] == ["body.1.first.0/Conv", "body.2.skip.0/Conv"]
        assert not found.proof.cured
        assert "or shows others' as well" in found.proof.why


class TestALayerThatTheRuntimeRefuses:
    def unknown(self, model: onnx.ModelProto) -> None:
        node_of(model, "body.1.first.2/Relu").op_type = "Rely"

    def test_is_the_culprit(self, form, planted):
        found = bisected(form("residual", "float"), planted(form("residual", "float"), self.unknown))

        assert [suspect.node for suspect in found.suspects] == ["body.1.first.2/Relu"]
        assert found.hints[0] == "body.1.first.2/Relu is Rely, not Relu"
        assert "Rely" in found.culprit.failure
        assert "Rely" in found.failure
        assert found.proof.cured

    def test_does_not_hide_another(self, form, planted):
        def both(model: onnx.ModelProto) -> None:
            self.unknown(model)
            weights(SECOND, one_channel)(model)
            weights("body.2.first.0/Conv", lambda values: values[:, :-1])(model)

        found = bisected(form("residual", "float"), planted(form("residual", "float"), both))

        assert [suspect.node for suspect in found.suspects] == ["body.1.first.2/Relu", SECOND, "body.2.first.0/Conv"]
        assert not found.proof.cured
        assert found.proof.why.startswith("something else stops it too")


class TestNodesWithoutNamesOfTheirOwn:
    def renamed(self, model: onnx.ModelProto, name: str | None, path: Path) -> Path:
        for node in model.graph.node:
            node.name = node.name if name is None else name
        onnx.save(model, path)
        return path

    @pytest.mark.parametrize("names", [("", ""), ("node", "node"), ("", None), (None, ""), ("", "node")])
    @pytest.mark.parametrize("kind", FORMS)
    def test_are_told_apart_by_what_they_give(self, form, tmp_path, kind, names):
        good, broken = onnx.load(form("residual", "float")), onnx.load(form("residual", kind))
        weights(SECOND, lambda values: -values)(broken)
        named = bisected(self.renamed(good, None, tmp_path / "a.onnx"), self.renamed(broken, None, tmp_path / "b.onnx"))

        found = bisected(self.renamed(good, names[0], tmp_path / "a.onnx"), self.renamed(broken, names[1], tmp_path / "b.onnx"))

        assert [suspect.tensor for suspect in found.suspects] == [suspect.tensor for suspect in named.suspects]
        assert (found.culprit.op, found.culprit.module) == ("Conv", "body.1.second.0")
        assert found.hints == named.hints
        assert found.proof == named.proof
        assert found.proof.cured

    @pytest.mark.parametrize("names", [("", ""), (None, "")])
    def test_are_told_apart_by_what_comes_out_behind_them(self, form, tmp_path, names):
        good, broken = onnx.load(form("residual", "float")), onnx.load(form("residual", "float"))
        weights(SECOND, lambda values: -values)(broken)
        node = node_of(broken, SECOND)
        place = list(broken.graph.node).index(node)
        broken.graph.node.insert(place + 1, onnx.helper.make_node("Identity", ["before"], node.output[:]))
        node.output[:] = ["before"]

        found = bisected(self.renamed(good, names[0], tmp_path / "a.onnx"), self.renamed(broken, names[1], tmp_path / "b.onnx"))

        assert found.culprit.module == "body.1.second.0"
        assert found.hints == ("the weights of 8 of 8 output channels are -1 times the reference's",)
        assert found.proof.cured

    @pytest.mark.parametrize("names", [("", ""), ("node", "node")])
    def test_are_missed_when_they_are_lost(self, form, tmp_path, names):
        good, broken = onnx.load(form("mobile", "float")), onnx.load(form("mobile", "float"))
        without("body.depthwise.2/HardSwish")(broken)

        found = bisected(self.renamed(good, names[0], tmp_path / "a.onnx"), self.renamed(broken, names[1], tmp_path / "b.onnx"))

        assert found.culprit.op == "HardSwish"
        assert found.missing == (found.culprit.node,)
        assert found.proof.cured


class TestTheProofIsNotTried:
    def test_where_the_same_node_may_mean_something_else(self, form, planted):
        def newer(model: onnx.ModelProto) -> None:
            weights(SECOND, lambda values: -values)(model)
            model.opset_import[0].version += 1

        found = bisected(form("residual", "float"), planted(form("residual", "float"), newer))

        assert found.culprit.node == SECOND
        assert not found.proof.cured
        assert "opset" in found.proof.why
        assert found.passes == 1


class TestQuantizationThatIsNotUnderstood:
    def refused(self, planted, source: Path, how: Callable[[onnx.ModelProto], None], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            bisected(source, planted(source, how))

    def test_has_a_scale_that_is_computed(self, form, planted):
        def computed(model: onnx.ModelProto) -> None:
            node = input_quantizer(model, SECOND)
            model.graph.node.insert(0, onnx.helper.make_node("Abs", [node.input[1]], ["computed"]))
            node.input[1] = "computed"

        name = "body.1.first.2/Relu/DequantizeLinear has the scale or zero point computed, which is computed"
        self.refused(planted, form("residual", "onnxruntime"), computed, name)

    def test_has_a_scale_for_each_block(self, form, planted):
        def blocks(model: onnx.ModelProto) -> None:
            node = next(node for node in model.graph.node if node_of(model, SECOND).input[1] in node.output)
            scale = np.ones((8, 2, 3, 3), np.float32)
            model.graph.initializer.append(numpy_helper.from_array(scale, "blocks"))
            node.input[:] = [node.input[0], "blocks"]
            node.attribute.append(onnx.helper.make_attribute("block_size", 4))

        self.refused(planted, form("residual", "tensorrt"), blocks, f"{SECOND}.*has a scale for each block")

    def test_may_say_its_type_without_a_zero_point(self, form, planted):
        def typed(model: onnx.ModelProto) -> None:
            model.opset_import[0].version = 21
            for node in model.graph.node:
                if node.op_type == "QuantizeLinear":
                    node.input[:] = node.input[:2]
                    node.attribute.append(onnx.helper.make_attribute("output_dtype", onnx.TensorProto.INT8))

        source = form("residual", "tensorrt")
        before, after = (graph.read(path) for path in (source, planted(source, typed)))

        ranges = [
            [noise.representable(read, node) for node in read.proto.graph.node if node.op_type == "QuantizeLinear"]
            for read in (before, after)
        ]
        assert ranges[0] == ranges[1] != []


class TestScales:
    @pytest.mark.parametrize("factor", [0.1, 0.5, 0.9, 1.1, 2.0, 10.0])
    def test_of_weights_are_found_at_a_tenth_more_or_less(self, form, planted, factor):
        broken = planted(
            form("residual", "onnxruntime"),
            lambda model: change(model, f"{SECOND}/weight/scale", lambda scale: scale * np.float32(factor)),
        )

        found = bisected(form("residual", "float"), broken)

        assert found.culprit.node == SECOND
        assert found.hints == (f"the weights of 8 of 8 output channels are {factor:.3g} times the reference's",)
        assert found.proof.cured

    @pytest.mark.parametrize("layer", [("mobile", DEPTHWISE), ("residual", SECOND)])
    @pytest.mark.parametrize("how", [lambda scale: scale * np.float32(1.03), lambda scale: scale * np.float32(1.09)])
    def test_of_all_weights_of_a_layer_are_found_by_some_hundredths(self, form, planted, layer, how):
        network, node = layer
        broken = planted(form(network, "onnxruntime"), lambda model: change(model, f"{node}/weight/scale", how))

        assert node in [suspect.node for suspect in bisected(form(network, "float"), broken).suspects]

    @pytest.mark.parametrize("layer", [("mobile", DEPTHWISE), ("residual", SECOND)])
    @pytest.mark.parametrize("steps", [1, 12])
    def test_where_every_weight_is_off_alike_as_by_a_zero_point_are_found(self, form, planted, layer, steps):
        network, node = layer

        def shift(values: np.ndarray) -> np.ndarray:
            return np.clip(values.astype(int) + steps, -127, 127).astype(values.dtype)

        broken = planted(form(network, "onnxruntime"), weights(node, shift))

        assert node in [suspect.node for suspect in bisected(form(network, "float"), broken).suspects]

    @pytest.mark.parametrize("kind", INT8)
    @pytest.mark.parametrize("factor", [0.003, 0.03, 0.3, 0.5, 30.0, 300.0])
    def test_of_activations_are_found_when_they_clip_or_are_far_too_coarse(self, form, planted, kind, factor):
        broken = planted(
            form("residual", kind),
            lambda model: change(model, input_quantizer(model, SECOND).input[1], lambda scale: scale * np.float32(factor)),
        )

        found = bisected(form("residual", "float"), broken)

        assert found.culprit.node == SECOND
        assert found.hints[0].endswith("clipped" if factor < 1 else "too coarse")
        assert found.proof.after_db > 40

    def test_of_weights_are_found_when_they_are_far_too_coarse_for_them(self, form, planted):
        broken = planted(
            form("residual", "tensorrt"),
            lambda model: change(model, f"{SECOND}/weight/scale", lambda scale: scale * np.float32(60)),
        )

        found = bisected(form("residual", "float"), broken)

        assert [suspect.node for suspect in found.suspects] == [SECOND]
        assert found.proof.cured

    @pytest.mark.parametrize("kind", INT8)
    def test_that_only_the_dequantizer_has_are_named(self, form, planted, kind):
        def doubled(model: onnx.ModelProto) -> None:
            dequantize = input_quantizer(model, SECOND)
            scale = next(value for value in model.graph.initializer if value.name == dequantize.input[1])
            model.graph.initializer.append(numpy_helper.from_array(1.5 * numpy_helper.to_array(scale), "other"))
            dequantize.input[1] = "other"

        found = bisected(form("residual", "float"), planted(form("residual", kind), doubled))

        assert found.culprit.node == SECOND
        assert "body.1.first.2/Relu/DequantizeLinear has not the scale" in found.hints[-1]

    def test_without_negative_values_where_there_are_some_are_found(self, form, planted):
        def unsigned(model: onnx.ModelProto) -> None:
            node = input_quantizer(model, "body.0.0/Conv")
            scale, point = node.input[1:3]
            change(model, scale, lambda value: np.float32(value * (255 - 127) / 255))
            change(model, point, lambda value: np.zeros_like(value))

        found = bisected(form("residual", "float"), planted(form("residual", "onnxruntime"), unsigned), NOISE)

        assert found.culprit.node == "body.0.0/Conv"

    def test_with_a_zero_point_that_cuts_off_most_of_the_range_are_found(self, form, planted):
        broken = planted(
            form("residual", "onnxruntime"),
            lambda model: change(model, input_quantizer(model, SECOND).input[2], lambda point: point + np.uint8(160)),
        )

        found = bisected(form("residual", "float"), broken)

        assert found.culprit.node == SECOND
        assert found.hints[0].endswith("clipped")


@settings(deadline=None, max_examples=12)
@given(magnitude=st.floats(-3, 0), channel=st.integers(0, 7), kind=st.sampled_from(FORMS))
def test_a_channel_that_is_off_by_more_than_the_margin_is_found_and_by_less_is_not(
    form, tmp_path_factory, magnitude, channel, kind
):
    """The layer's own error says which it is: faults over three decades, each channel, each form."""
    model = onnx.load(form("residual", "float"))
    share = np.float32(10**magnitude)

    def scaled(values: np.ndarray) -> np.ndarray:
        values[channel] *= 1 + share
        return values

    weights("body.0.0/Conv", scaled)(model)
    changed = tmp_path_factory.mktemp("reference") / "model.onnx"
    onnx.save(model, changed)

    found = bisected(changed, form("residual", kind))

    # Here the reference is what was changed. INT8 weights round to about 1 % of a channel, with the margin to 3 %.
    names = [suspect.node for suspect in found.suspects]
    assert names == ["body.0.0/Conv"] if kind == "float" or share > 0.1 else names in ([], ["body.0.0/Conv"])
    if kind != "float" and share < 0.005:
        assert names == []
    assert all(layer.excess_db <= 10 * np.log10(MARGIN) for layer in found.layers if layer.node not in names)


class TestTheImages:
    def test_are_passed_over_twice_and_once_when_nothing_is_found(self, form, planted):
        fed: list[int] = []

        def batches() -> Iterator[np.ndarray]:
            for start in range(0, 16, 4):
                fed.append(4)
                yield IMAGES[start : start + 4]

        bisect(form("residual", "float"), form("residual", "onnxruntime"), batches)
        clean, fed[:] = sum(fed), []
        bisect(
            form("residual", "float"),
            planted(form("residual", "onnxruntime"), weights(SECOND, one_channel)),
            batches,
        )

        assert (clean, sum(fed)) == (16, 32)

    def test_are_announced_in_each_pass(self, form, planted):
        told: list[tuple[str, int, int]] = []
        broken = planted(form("residual", "float"), weights(SECOND, one_channel))

        bisect(
            form("residual", "float"),
            broken,
            lambda: [IMAGES[:8], IMAGES[8:]],
            total=16,
            progress=lambda *step: told.append(step),
        )

        assert told == [("bisect", 8, 16), ("bisect", 16, 16), ("prove", 8, 16), ("prove", 16, 16)]

    def test_may_come_in_any_batches(self, form):
        whole, single = (
            bisect(form("residual", "float"), form("residual", "tensorrt"), lambda size=size: np.split(IMAGES, 16 // size))
            for size in (16, 1)
        )

        for one, other in zip(whole.layers, single.layers, strict=True):
            assert one.own_db == pytest.approx(other.own_db, abs=0.01)
            assert one.excess_db == pytest.approx(other.excess_db, abs=0.01)

    def test_fill_up_the_batch_of_a_graph_that_has_a_fixed_one(self, form, planted, tmp_path):
        fixed = networks.exported("lenet5", tmp_path, batch=4).path
        broken = planted(fixed, weights("conv2/Conv", one_channel))

        for a, b, culprit in (
            (fixed, fixed, None),
            (fixed, broken, "conv2/Conv"),
            (form("lenet5", "float"), broken, "conv2/Conv"),
        ):
            found = bisect(a, b, lambda: [IMAGES[:4], IMAGES[4:7]])

            assert (found.culprit and found.culprit.node) == culprit
            assert found.images == 7
            assert culprit is None or found.proof.after_db > 100

    def test_are_needed(self, form):
        with pytest.raises(UsageError, match="there is no image to compare on"):
            bisect(form("residual", "float"), form("residual", "float"), list)

    def test_a_nan_is_the_fault_of_the_layer_that_makes_it(self, form, planted):
        def poisoned(values: np.ndarray) -> np.ndarray:
            values[0] = np.nan
            return values

        found = bisected(form("residual", "float"), planted(form("residual", "float"), weights(SECOND, poisoned)))

        assert found.culprit.node == SECOND
        assert found.culprit.own_db is None
        assert found.proof.after_db == 200.0

    def test_are_not_compared_on_a_reference_that_is_not_finite(self, form, planted):
        def poisoned(values: np.ndarray) -> np.ndarray:
            values[0] = np.nan
            return values

        with pytest.raises(UsageError, match=f"{SECOND} of the reference gives NaN or infinity"):
            bisected(planted(form("residual", "float"), weights(SECOND, poisoned)), form("residual", "float"))
        with pytest.raises(UsageError, match="an image gives NaN or infinity"):
            bisected(form("residual", "float"), form("residual", "float"), IMAGES * np.float32(np.inf))

    def test_may_show_exactly_the_noise_that_is_explained(self, form, monkeypatch):
        monkeypatch.setattr(noise, "explained", lambda a, b, tensor, anchors, seen: seen[tensor].own / seen[tensor].count)

        found = bisected(form("residual", "float"), form("residual", "onnxruntime"))

        assert {layer.excess_db for layer in found.layers} <= {0.0, -200.0}
        assert 0.0 in {layer.excess_db for layer in found.layers}


class TestGraphsThatCannotBeCompared:
    def test_are_two_networks(self, form):
        with pytest.raises(UsageError, match="of the 16 float32 tensors"):
            bisected(form("residual", "float"), form("mobile", "float"))

    def test_have_other_inputs(self, form, planted):
        def renamed(model: onnx.ModelProto) -> None:
            model.graph.input[0].name = "picture"
            for node in model.graph.node:
                node.input[:] = ["picture" if name == "image" else name for name in node.input]

        with pytest.raises(UsageError, match=r"inputs: image in .*, picture in"):
            bisected(form("residual", "float"), planted(form("residual", "float"), renamed))

    def test_are_no_graphs(self, form, tmp_path):
        (tmp_path / "text.onnx").write_text("not a graph")

        with pytest.raises(UsageError, match="is not an ONNX file"):
            bisected(form("residual", "float"), tmp_path / "text.onnx")

    def test_keep_their_weights_elsewhere(self, form, tmp_path):
        onnx.save(onnx.load(form("lenet5", "float")), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)

        with pytest.raises(UsageError, match="lie in other files"):
            bisected(tmp_path / "m.onnx", form("lenet5", "float"))


class TestPyTorchAsTheReference:
    @pytest.mark.parametrize("name", ["residual", "lenet5", "mobile", "twice"])
    def test_a_networks_modules_give_what_its_graph_does(self, form, name):
        module = networks.model(name).module
        read = graph.read(form(name, "float"))

        with Watched(module, read) as network:
            given_by_modules = network(IMAGES[:4])
            found = bisect(form(name, "float"), form(name, "float"), lambda: [IMAGES], network=network)

        assert len(given_by_modules) >= len(list(module.parameters())) // 6
        assert found.culprit is None
        assert any(layer.own_db < 200 for layer in found.layers)  # it was PyTorch, which adds in another order

    def test_a_batch_norm_stands_in_for_the_convolution_that_it_was_folded_into(self, form):
        module = networks.model("residual").module
        with Watched(module, graph.read(form("residual", "float"))) as network:
            found = network(IMAGES[:2])

        with torch.inference_mode():
            wanted = module.body[0][:2](torch.from_numpy(IMAGES[:2])).numpy()
        np.testing.assert_allclose(found["body.0.0/Conv"], wanted, atol=1e-5)

    def test_a_relu_in_place_does_not_change_what_the_layer_before_it_gave(self, tmp_path):
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace=True))
        made = networks.exported(networks.Classifier(body, 8), tmp_path)

        with Watched(networks.model(networks.Classifier(body, 8)).module, graph.read(made.path)) as network:
            found = network(IMAGES[:2])

        assert found["body.0/Conv"].min() < 0 == found["body.1/Relu"].min()

    def test_an_export_that_is_wrong_itself_is_found(self, form, planted):
        wrong = planted(form("residual", "float"), weights(SECOND, one_channel))

        with Watched(networks.model("residual").module, graph.read(wrong)) as network:
            found = bisect(wrong, wrong, lambda: [IMAGES], network=network)

        assert found.culprit.node == SECOND
        assert not found.proof.cured
        assert "the layer of the export" in found.proof.why

    def test_nothing_watches_a_network_afterwards(self, form):
        module = networks.model("residual").module
        with Watched(module, graph.read(form("residual", "float"))):
            pass

        assert not [child for child in module.modules() if child._forward_hooks]


@pytest.fixture(scope="module")
def artifacts(portable, tmp_path_factory) -> tuple[Artifact, Artifact]:
    """The residual network in float and INT8, as finished stages leave them."""
    root = tmp_path_factory.mktemp("artifacts")
    source = networks.exported("residual", root / "float")
    made = networks.quantized(source, "onnxruntime", root / "int8")
    other = replace(made, preprocess=replace(made.preprocess, mean=(0.1,) * 3, interpolation="bicubic"))
    return write_manifest(source.folder, source), write_manifest(made.folder, other)


class TestTheCommand:
    def test_ends_with_0_and_the_loudest_layers_when_all_is_well(self, deploykit, artifacts):
        done = deploykit("bisect", artifacts[0].folder, artifacts[0].path)

        assert done.code == 0
        assert done.out.startswith("no layer of")
        assert "(8 images, 1 pass)" in done.out
        assert done.out.splitlines()[-2] == "8 inputs: golden samples of A"
        assert done.out.splitlines()[-1].endswith(f"({', '.join(cpu_features())})")

    def test_ends_with_3_and_names_the_layer_first(self, deploykit, artifacts, planted):
        broken = planted(artifacts[1].path, weights(SECOND, lambda values: -values))

        done = deploykit("bisect", artifacts[0].path, broken)

        assert done.code == 3
        assert done.out.splitlines()[0].startswith(f"{SECOND} (Conv of module body.1.second.0) is the first beyond")
        assert "the weights of 8 of 8 output channels are -1 times the reference's" in done.out
        assert "proof: with body.1.second.0/Conv as in the reference, SQNR at the output goes from" in done.out

    def test_gives_plain_json(self, deploykit, artifacts, planted):
        broken = planted(artifacts[1].path, attribute(SECOND, "strides", [2, 2]))

        done = deploykit("bisect", artifacts[0].path, broken, "--json", "--images", 3)

        found = json.loads(done.out, parse_constant=lambda name: pytest.fail(name))
        assert (done.code, found["exit_code"]) == (3, 3)
        assert found["culprit"]["node"] == SECOND
        assert (found["images"], found["passes"]) == (3, 2)
        assert "another shape" in text.as_text(found)

    def test_tells_ci_the_layer_and_what_is_different_about_it(self, deploykit, artifacts, planted, tmp_path):
        broken = planted(artifacts[1].path, weights(SECOND, lambda values: -values))

        deploykit("bisect", artifacts[0].path, broken, "--junit", tmp_path / "bisect.xml")

        layers, prepared = ElementTree.parse(tmp_path / "bisect.xml").iter("testcase")
        (failure,) = layers
        assert layers.attrib["name"] == "every layer of B computes what that of A does"
        assert failure.attrib["message"].startswith(
            f"{SECOND} (Conv of module body.1.second.0) is the first beyond it; the weights"
        )
        assert [child.tag for child in prepared] == ["system-out"]
        proof = failure.text.splitlines()[1]
        assert proof.startswith("proof: with body.1.second.0/Conv as in the reference, SQNR at the output goes from")
        facts = {
            found.attrib["name"]: found.attrib["value"] for found in ElementTree.parse(tmp_path / "bisect.xml").iter("property")
        }
        assert facts["fed"] == "8 images: golden samples of A"
        assert facts["features"] == ", ".join(cpu_features())

    def test_says_key_by_key_when_the_inputs_are_prepared_otherwise(self, deploykit, artifacts):
        done = deploykit("bisect", artifacts[0].folder, artifacts[1].folder)

        assert done.code == 3
        assert done.out.splitlines()[:2] == [
            "preprocessing differs: mean is (0.1, 0.1, 0.1), not (0.5, 0.5, 0.5)",
            "preprocessing differs: interpolation is bicubic, not bilinear",
        ]

    def test_prints_no_control_characters_of_a_file(self, deploykit, artifacts, tmp_path):
        good, broken = tmp_path / "a.onnx", tmp_path / "b.onnx"
        model = onnx.load(artifacts[0].path)
        weights(SECOND, lambda values: -values)(model)
        node_of(model, SECOND).name = "\x1b[31mred\n"
        onnx.save(model, broken)
        weights("\x1b[31mred\n", lambda values: -values)(model)
        onnx.save(model, good)

        done = deploykit("bisect", good, broken)

        assert done.code == 3
        assert done.out.startswith("\\x1b[31mred\\n (Conv")
        assert "\x1b" not in done.out

    def test_tells_what_the_runtime_refused_and_why_nothing_was_proven(self, deploykit, artifacts, planted):
        def newer(model: onnx.ModelProto) -> None:
            weights(SECOND, lambda values: values[:, :-1])(model)
            model.opset_import[0].version += 1

        done = deploykit("bisect", artifacts[0].path, planted(artifacts[0].path, newer))

        assert done.code == 3
        assert "its own error: it does not run alone, " in done.out
        assert "proof: not tried, the graphs have ONNX opset" in done.out
        assert "1 pass" in done.out

    def test_takes_pictures(self, deploykit, artifacts, photos):
        done = deploykit("bisect", artifacts[0].path, artifacts[0].path, "--data", photos, "--images", 5, "--json")

        found = json.loads(done.out)
        assert (found["images"], found["fed"]) == (5, {"origin": str(photos), "images": 5})

    def test_takes_noise_for_two_bare_files(self, deploykit, artifacts, planted):
        bare = planted(artifacts[0].path, lambda model: None)

        done = deploykit("bisect", bare, bare, "--json")

        found = json.loads(done.out)
        assert (done.code, found["fed"]["images"], found["fed"]["origin"].partition(",")[0]) == (0, 8, "noise")

    def test_names_nodes_of_the_reference_that_were_not_compared(self, deploykit, artifacts, planted):
        lost = planted(artifacts[0].path, without("body.1.first.2/Relu"))

        done = deploykit("bisect", artifacts[0].path, lost)

        assert "not compared, as B has no tensor of theirs: body.1.first.2/Relu" in done.out

    def test_wants_to_know_how_pictures_are_prepared(self, deploykit, artifacts, planted, photos):
        bare = planted(artifacts[0].path, lambda model: None)

        done = deploykit("bisect", bare, bare, "--data", photos)

        assert done.code == 2
        assert "nothing says how a picture becomes an input" in done.err

    def test_wants_weights_for_a_network(self, deploykit, artifacts):
        done = deploykit("bisect", "resnet18", artifacts[0].path)

        assert done.code == 2
        assert "a PyTorch network needs --weights" in done.err

    def test_compares_with_pytorch(self, deploykit, network, tmp_path):
        side, _ = command._exported(network, "none", tmp_path)
        model = onnx.load(side.path)
        weights("conv2/Conv", lambda values: -values)(model)
        onnx.save(model, tmp_path / "broken.onnx")

        good = deploykit("bisect", network, side.path, "--weights", "none")
        bad = deploykit("bisect", network, tmp_path / "broken.onnx", "--weights", "none")

        assert good.code == 0
        assert bad.code == 3
        assert bad.out.startswith("conv2/Conv (Conv of module conv2)")


@pytest.fixture
def gpu() -> Iterator[World]:
    """A fake GPU with a fake TensorRT, executed by ONNX Runtime; what is still taken at the end of a test is a leak."""
    world = World("10.3.0", FakeCuda())
    with installed(world):
        yield world
    assert world.cuda.left() == []
    assert world.crash is None


def on_tensorrt(a: Path, b: Path, **words: int) -> dict:
    return command.compare(str(a), b, runtime="tensorrt", **words)


class TestOnTensorRt:
    """Every tensor that both graphs have is an output of an engine; none of this has run on TensorRT itself."""

    @pytest.mark.parametrize("kind", ["float", "tensorrt"])
    def test_nothing_is_found_in_a_good_graph(self, form, gpu, kind):
        found = on_tensorrt(form("residual", "float"), form("residual", kind))

        assert (found["exit_code"], found["failure"], found["images"], found["passes"]) == (0, "", 8, 1)
        assert "on TensorRT, every tensor an output" in text.as_text(found)
        assert len(found["layers"]) > 10

    @pytest.mark.parametrize("kind", ["float", "tensorrt"])
    def test_an_error_of_tensorrt_alone_is_found_in_its_layer_and_cured(self, form, gpu, kind):
        def miscomputed(model: onnx.ModelProto) -> None:
            if any(node.name == SECOND for node in model.graph.node):
                weights(SECOND, lambda values: -values)(model)

        gpu.on_parse = miscomputed
        a, b = form("residual", "float"), form("residual", kind)

        found = on_tensorrt(a, b)

        assert (found["exit_code"], found["culprit"]["node"], found["passes"]) == (3, SECOND, 2)
        assert found["proof"]["cured"]
        assert command.compare(str(a), b)["exit_code"] == 0

    def test_a_layer_that_tensorrt_refuses_is_the_culprit_with_its_own_words(self, form, gpu):
        def without_it(model: onnx.ModelProto) -> None:
            for node in model.graph.node:
                node.op_type = "QLinearConv" if node.name == SECOND else node.op_type

        gpu.on_parse = without_it

        found = on_tensorrt(form("residual", "float"), form("residual", "float"))

        assert (found["exit_code"], found["culprit"]["node"]) == (3, SECOND)
        assert "No importer registered for op" in found["failure"]
        assert "No importer registered for op" in found["culprit"]["failure"]

    def test_images_that_fill_no_batch_are_repeated_since_an_engine_has_one_size(self, artifacts, gpu):
        found = on_tensorrt(artifacts[0].folder, artifacts[0].folder, count=6)

        assert (found["exit_code"], found["images"]) == (0, 6)

    def test_float32_is_float32_and_no_timing_is_kept(self, form, gpu, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

        on_tensorrt(form("residual", "float"), form("residual", "float"))

        assert gpu.cleared == {"TF32"}
        assert list(tmp_path.iterdir()) == []

    def test_what_the_recipe_says_of_tensorrt_holds(self, artifacts, gpu, tmp_path):
        path = tmp_path / "same"
        shutil.copytree(artifacts[0].folder, path)
        write_manifest(
            path, replace(artifacts[0], path=path / artifacts[0].path.name, facts={"tensorrt": {"version_compatible": True}})
        )

        on_tensorrt(path, path)

        assert "VERSION_COMPATIBLE" in {flag.name for flag in gpu.flags}

    @pytest.mark.parametrize("place", [0.05, 0.5, 0.97])
    def test_a_gpu_that_fails_is_no_fault_of_a_layer_and_nothing_stays_on_it(self, form, gpu, place):
        a = form("residual", "float")
        on_tensorrt(a, a)
        gpu.cuda.faults = Faults(at=int(place * len(gpu.cuda.faults.called)))

        with suppress(DeploykitError):
            assert on_tensorrt(a, a)["suspects"] == []

    def test_it_ends_with_4_where_there_is_none(self, deploykit, artifacts):
        done = deploykit("bisect", artifacts[0].path, artifacts[0].path, "--runtime", "tensorrt")

        assert done.code == 4
        assert "tensorrt" in done.err


def test_two_graphs_are_compared_without_torch():
    code = "import sys, deploykit.bisect.command; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_engine_is_refused_with_the_graph_that_it_was_made_from(portable, tmp_path):
    def copied(folder: Path) -> Artifact:
        shutil.copytree(portable("residual").folder, folder, dirs_exist_ok=True)
        return replace(portable("residual"), path=folder / portable("residual").path.name)

    made = artifact.make(tmp_path / "export-onnx", "key", copied)
    engine = artifact.make(tmp_path / "build", "key", lambda folder: build.build(made, "onnxruntime", folder))

    with pytest.raises(UsageError, match=rf"(?s)this is of format engine.*made from: {re.escape(str(made.folder))}"):
        command.compare(str(made.folder), engine.folder)
