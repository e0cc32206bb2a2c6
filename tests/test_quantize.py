"""Calibration, and where Q/DQ goes for each runtime: real graphs on ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from deploykit import build, parity, quantize, runtimes
from deploykit.artifact import Artifact, Precision
from deploykit.errors import DataError, StageError, UsageError
from deploykit.quantize import half, lint, observe, optimal, place
from deploykit.quantize.histogram import SAMPLE
from deploykit.quantize.insert import insert
from deploykit.quantize.ranges import Range, affine_uint8, minmax, percentile, symmetric_int8
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import onnxruntime

NAMES = sorted(networks.NETWORKS)
INT8 = onnx.TensorProto.INT8
INT32 = onnx.TensorProto.INT32


@pytest.fixture(scope="session")
def for_runtime(portable, tmp_path_factory):
    """(network, runtime) -> quantized artifact, each made once."""
    made: dict[tuple[str, str], Artifact] = {}

    def make(name: str, runtime: str) -> Artifact:
        if (name, runtime) not in made:
            made[name, runtime] = networks.quantized(portable(name), runtime, tmp_path_factory.mktemp(f"{name}-{runtime}"))
        return made[name, runtime]

    return make


def nodes_of(artifact: Artifact) -> list[onnx.NodeProto]:
    return list(onnx.load(artifact.path).graph.node)


def constants(artifact: Artifact) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in onnx.load(artifact.path).graph.initializer}


def quantized_tensors(artifact: Artifact) -> dict[str, str]:
    """Activations that go through a QuantizeLinear, each with the name of its scale."""
    weights = constants(artifact)
    pairs = [node for node in nodes_of(artifact) if node.op_type == "QuantizeLinear"]
    return {node.input[0]: node.input[1] for node in pairs if node.input[0] not in weights}


# Each process has its objects at other addresses, by which a set of nodes or values is ordered.
QUANTIZE = """
import hashlib, random, sys
import onnx_ir as ir
from deploykit import runtimes
from deploykit.quantize import place
from deploykit.quantize.insert import insert
from deploykit.quantize.ranges import Range

scattered = [bytes(size) for size in range(400) for _ in range(200)]
random.Random(int(sys.argv[2])).shuffle(scattered)
del scattered[::2]
for runtime in ("onnxruntime", "tensorrt"):
    model, rules = ir.load(sys.argv[1]), runtimes.rules(runtime)
    decided = place.plan(model.graph, rules)
    insert(model, decided, dict.fromkeys(decided.uses, Range(-1, 1)), rules)
    print(hashlib.sha256(ir.to_proto(model).SerializeToString()).hexdigest())
"""


def test_the_same_graph_gives_the_same_file_in_every_process(portable):
    def digests(seed: int) -> str:
        command = [sys.executable, "-c", QUANTIZE, str(portable("branches").path), str(seed)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first, second, third = map(digests, (1, 2, 3))

    assert len(first.split()) == 2
    assert first == second == third


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_a_plan_names_its_activations_in_the_order_of_the_graph(portable, runtime):
    graph = ir.load(portable("branches").path).graph
    rules = runtimes.rules(runtime)

    assert list(place.plan(graph, rules).uses) == place.tensors(graph, [rules])


@pytest.mark.parametrize(("runtime", "dtype"), [("onnxruntime", "UINT8"), ("tensorrt", "INT8")])
def test_the_file_says_the_type_of_every_quantized_tensor(portable, tmp_path, runtime, dtype):
    artifact = networks.quantized(portable("lenet5"), runtime, tmp_path)

    graph = onnx.load(artifact.path).graph
    types = {value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in graph.value_info}
    activations = [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear" and "weight" not in node.name]
    assert activations
    assert {types[name] for name in activations} == {dtype}


class TestCalibration:
    def ranges(self, source: Artifact, folder: Path, pictures: np.ndarray) -> dict[str, Range]:
        made = networks.calibrated(source, folder, pictures)
        return {name: minmax(seen) for name, seen in observe.load(made.path).items()}

    def test_another_order_of_the_images_gives_the_same_ranges(self, portable, tmp_path):
        pictures = networks.images(32, seed=1)

        first = self.ranges(portable("residual"), tmp_path / "a", pictures)
        second = self.ranges(portable("residual"), tmp_path / "b", pictures[::-1].copy())

        assert first == second

    def test_another_batch_size_gives_the_same_ranges(self, portable):
        source, pictures = portable("residual"), networks.images(12, seed=1)
        names = ["image", "body.1/Relu", "body.2/Relu"]

        one, many = (observe.observe(source.path, names, np.split(pictures, pieces), total=12) for pieces in (12, 3))

        # ONNX Runtime may add in another order for another batch: float32 rounding, nothing more
        for name in names:
            assert minmax(one[name]).high == pytest.approx(minmax(many[name]).high, rel=1e-6)
            assert minmax(one[name]).low == pytest.approx(minmax(many[name]).low, rel=1e-6)

    def test_however_many_batches_are_worked_on_at_once_the_histograms_are_the_same(self, portable):
        pictures = np.split(networks.images(7, seed=1), 7)  # small enough that no value is skipped
        names = ["image", "body.1/Relu", "body.2/Relu"]

        one, *others = (observe.observe(portable("residual").path, names, pictures, total=7, lanes=lanes) for lanes in (1, 2, 3))

        for other in others:
            for name in names:
                assert minmax(other[name]) == minmax(one[name])
                assert np.array_equal(other[name].counts, one[name].counts)

    def test_images_at_once_share_one_sample_whether_in_one_batch_or_in_several(self, tmp_path):
        source = networks.by_hand(tmp_path, "[pool] logits = GlobalAveragePool(image)", {}, size=128)
        pictures = networks.images(4, 128)

        drawn = [
            observe.observe(source.path, ["image"], np.split(pictures, lanes), total=4, lanes=lanes)["image"].drawn.sum()
            for lanes in (1, 2, 4)
        ]

        assert drawn == pytest.approx([SAMPLE] * 3, rel=0.1)

    def test_of_a_large_batch_no_less_is_drawn_because_others_are_worked_on_too(self, tmp_path):
        source = networks.by_hand(tmp_path, "[pool] logits = GlobalAveragePool(image)", {}, size=128)
        pictures = networks.images(16, 128)

        seen = observe.observe(source.path, ["image"], [pictures], total=16, lanes=4)["image"]

        assert seen.drawn.sum() == pytest.approx(SAMPLE, rel=0.1)

    @pytest.mark.parametrize("lanes", [1, 3])
    def test_progress_is_told_in_order_from_the_thread_that_asked(self, portable, lanes):
        told = []

        def progress(what: str, done: int, total: int) -> None:
            told.append((what, done, total, threading.current_thread()))

        pictures = np.split(networks.images(10, seed=1), 5)
        observe.observe(portable("lenet5").path, ["image"], pictures, total=10, lanes=lanes, progress=progress)

        assert told == [("calibrate", done, 10, threading.current_thread()) for done in (2, 4, 6, 8, 10)]

    def test_as_many_batches_are_read_ahead_as_are_worked_on_and_one(self, portable):
        read = told = most = 0

        def batches():
            nonlocal read, most
            for seed in range(8):
                read += 1
                most = max(most, read - told)
                yield networks.images(1, seed=seed)

        def progress(what: str, done: int, total: int) -> None:
            nonlocal told
            told = done

        observe.observe(portable("lenet5").path, ["image"], batches(), total=8, lanes=3, progress=progress)

        assert read == told == 8
        assert most == 3 + 1

    def test_what_was_observed_is_what_pytorch_computes(self, portable):
        pictures = networks.images(8, seed=1)
        body = networks.model("lenet5").module

        seen = observe.observe(portable("lenet5").path, ["image", "conv1/Conv"], [pictures], total=8)

        answer = body.conv1(networks.torch.from_numpy(pictures)).detach().numpy()
        assert (seen["image"].low, seen["image"].high) == (pictures.min(), pictures.max())
        assert (seen["conv1/Conv"].low, seen["conv1/Conv"].high) == pytest.approx((answer.min(), answer.max()), rel=1e-5)

    def test_memory_does_not_grow_with_the_number_of_images(self, portable):
        def peak(batches: int) -> int:
            pictures = (networks.images(4, seed=seed) for seed in range(batches))
            tracemalloc.start()
            observe.observe(portable("residual").path, ["image", "body.1/Relu"], pictures, total=4 * batches)
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return found

        peak(2)  # warm-up: imports and caches

        assert peak(40) < 2 * peak(4)  # two threads may hold two tensors at once, or one

    def test_the_batch_shrinks_until_all_observed_activations_fit_the_budget(self):
        assert observe.batch_size({"a": 1 << 20, "b": 1 << 20}, budget_bytes=8 << 20) == 4
        assert observe.batch_size({"a": 1 << 30}, budget_bytes=1 << 20) == 1
        assert observe.batch_size({"a": 1}, most=16) == 16

    @pytest.mark.parametrize(
        ("cores", "megabytes", "fixed", "expected"),
        [
            (2, 64, None, (2, 3)),  # ResNet-50's
            (4, 64, None, (4, 1)),
            (16, 64, None, (6, 1)),
            (2, 1000, None, (1, 1)),
            (1, 64, None, (1, 6)),
            (2, 1, None, (2, 8)),
            (2, 64, 1, (2, 1)),
            (2, 64, 4, (1, 4)),
            (2, 64, 32, (1, 32)),
        ],
    )
    def test_the_cores_share_the_images_that_fit_the_budget(self, monkeypatch, cores, megabytes, fixed, expected):
        monkeypatch.setattr(observe, "available_cores", lambda: cores)

        assert observe.lanes_and_batch({"a": megabytes << 20}, fixed) == expected

    @pytest.mark.parametrize("lanes", [1, 2])
    def test_an_activation_that_is_not_finite_is_named_first_where_it_began(self, portable, lanes):
        pictures = networks.images(2)
        pictures[1, 0, 0, 0] = np.inf

        with pytest.raises(StageError, match="NaN or infinite") as refused:
            observe.observe(portable("lenet5").path, ["image", "conv1/Conv"], [pictures], total=2, lanes=lanes)
        assert refused.value.problems == ("image", "conv1/Conv")

    def test_calibration_without_an_image_is_refused(self, portable):
        with pytest.raises(StageError, match="no image"):
            observe.observe(portable("lenet5").path, ["image"], [], total=0)

    @pytest.mark.parametrize("images", [1, 2])
    def test_of_a_tensor_that_does_not_count_images_first_every_row_is_observed(self, tmp_path, images):
        body = "[cut] windows = Reshape(image, shape)  [turn] turned = Transpose<perm = [1, 0, 2, 3]>(image)"
        source = networks.by_hand(tmp_path, f"{body}  [flat] logits = Flatten(windows)", {"shape": np.array([-1, 3, 4, 4])})
        fixed = onnx.load(source.path)
        fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(fixed, source.path)
        pictures = networks.images(images, 8, seed=1)
        pictures[0, 2, 7, 7] = 99  # in the last window and the last channel

        seen = observe.observe(source.path, ["image", "windows", "turned"], [pictures], total=images)

        assert {name: found.high for name, found in seen.items()} == dict.fromkeys(seen, 99)
        assert {name: found.counts.sum() + found.zeros for name, found in seen.items()} == {
            "image": pictures.size,
            "windows": 2 * 3 * 8 * 8,
            "turned": 2 * 3 * 8 * 8,
        }

    def test_a_fixed_batch_that_the_last_images_do_not_fill_gives_the_ranges_of_a_dynamic_one(self, portable, tmp_path):
        fixed = networks.exported("lenet5", tmp_path / "fixed", batch=3)
        pictures = networks.images(5, seed=1)  # few enough that none of their values is skipped

        one, other = (
            observe.load(networks.calibrated(source, tmp_path / name, pictures).path)
            for name, source in (("a", fixed), ("b", portable("lenet5")))
        )

        assert np.array_equal(one["image"].counts, other["image"].counts)
        for name in other:
            assert minmax(one[name]).high == pytest.approx(minmax(other[name]).high, rel=1e-6)
            assert one[name].counts.sum() == pytest.approx(other[name].counts.sum(), rel=1e-3)

    def test_an_image_that_is_not_finite_is_refused_by_name(self, portable, tmp_path):
        pictures = networks.images(6)
        pictures[4, 1, 2, 3] = np.nan
        names = [f"{index}.jpg" for index in range(6)]

        with pytest.raises(DataError, match=r"1 of 6 calibration images hold NaN or infinite values\n  - 4.jpg"):
            quantize.calibrate(portable("lenet5"), lambda _: [pictures[:3], pictures[3:]], tmp_path, images=6, names=names)

    def test_what_is_doubtful_about_the_images_is_a_fact(self, portable, tmp_path):
        made = networks.calibrated(portable("lenet5"), tmp_path, 100 * networks.images(12))

        few, far = made.facts["warnings"]
        assert few.startswith("only 12 calibration images")
        assert far.startswith("the network's inputs have mean ")

    @pytest.mark.parametrize(("runtime", "integers"), [("onnxruntime", "uint8"), ("tensorrt", "int8")])
    @pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
    def test_scales_are_those_of_the_range_that_the_method_chooses_for_the_runtimes_integers(
        self, portable, tmp_path, runtime, integers, method
    ):
        observations = networks.calibrated(portable("lenet5"), tmp_path)
        seen = observe.load(observations.path)["image"]

        made = quantize.quantize(portable("lenet5"), observations, QuantizeTable(method=method), runtime, tmp_path)

        simple = {"minmax": minmax(seen), "percentile": percentile(seen, 99.99)}
        kept = simple[method] if method in simple else getattr(optimal, method)(seen, integers)
        parameters = (affine_uint8 if integers == "uint8" else symmetric_int8)(kept)
        assert constants(made)["image/scale"] == np.float32(parameters.scale)
        assert constants(made)["image/zero_point"] == parameters.zero_point

    def test_only_a_float_onnx_file_can_be_calibrated(self, for_runtime, tmp_path):
        with pytest.raises(UsageError, match="only an FP32 ONNX artifact can be quantized, not int8 onnx"):
            networks.calibrated(for_runtime("lenet5", "onnxruntime"), tmp_path)


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
class TestEveryRuntimesFile:
    @pytest.mark.parametrize("name", NAMES)
    def test_its_answers_are_close_to_float(self, for_runtime, name, runtime):
        samples = for_runtime(name, runtime).samples()

        errors = parity.tensor_errors(samples.expected["logits"], samples.reference["logits"])

        # An 8-bit tensor of uniform values has 10 log10(12 * 255**2 / 12) = 48 dB; a bell curve whose range is 8 sigma
        # loses 7 dB of that, and the noise of up to eight quantized tensors in a row another 9 dB.
        assert errors.sqnr_db > (24 if name == "attention" else 28)

    def test_it_is_opset_19_and_passes_the_checker(self, for_runtime, runtime):
        file = onnx.load(for_runtime("branches", runtime).path)

        onnx.checker.check_model(file, full_check=True)
        assert [(item.domain, item.version) for item in file.opset_import] == [("", 19)]

    def test_inputs_and_outputs_stay_as_they_were(self, for_runtime, portable, runtime):
        before, after = onnx.load(portable("residual").path).graph, onnx.load(for_runtime("residual", runtime).path).graph

        assert list(before.input) == list(after.input)
        assert list(before.output) == list(after.output)

    def test_golden_samples_keep_pytorchs_answers_beside_its_own(self, for_runtime, portable, runtime):
        samples, source = for_runtime("residual", runtime).samples(), portable("residual").samples()

        assert np.array_equal(samples.reference["logits"], source.reference["logits"])
        assert not np.array_equal(samples.expected["logits"], source.expected["logits"])
        assert np.array_equal(samples.labels, source.labels)

    def test_products_of_two_activations_are_no_layers(self, for_runtime, runtime):
        facts = for_runtime("attention", runtime).facts

        assert facts["int8_layers"] == ["stem.0/Conv", "qkv/MatMul", "head/Gemm"]
        assert facts["float_layers"] == {}

    def test_a_transposed_convolution_stays_as_it_was(self, for_runtime, runtime):
        nodes = {node.output[0]: node for node in nodes_of(for_runtime("upsampling", runtime))}

        transposed = next(node for node in nodes.values() if node.op_type == "ConvTranspose")
        assert transposed.input[1] in constants(for_runtime("upsampling", runtime))

    def test_one_pair_serves_all_readers_of_a_tensor(self, for_runtime, runtime):
        sources = [node.input[0] for node in nodes_of(for_runtime("branches", runtime)) if node.op_type == "QuantizeLinear"]

        assert len(sources) == len(set(sources))

    def test_every_zero_point_is_explicit(self, for_runtime, runtime):
        for node in nodes_of(for_runtime("residual", runtime)):
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert len(node.input) == 3

    def test_the_percentile_method_chooses_narrower_ranges(self, portable, for_runtime, runtime, tmp_path):
        narrow = networks.quantized(portable("lenet5"), runtime, tmp_path, method="percentile", percentile=95.0)

        scales, wide = constants(narrow), constants(for_runtime("lenet5", runtime))
        assert scales["image/scale"] < wide["image/scale"]
        assert (narrow.settings["method"], narrow.settings["percentile"]) == ("percentile", 95.0)

    def test_a_max_pool_hands_on_the_scale_it_was_given(self, for_runtime, runtime):
        artifact = for_runtime("branches", runtime)
        found, values = quantized_tensors(artifact), constants(artifact)

        after = values[found["body.pool/MaxPool"]]
        if runtime == "onnxruntime":
            assert after == values[found["body.stem.2/Relu"]]
        else:
            assert "body.stem.2/Relu" not in found


class TestOnnxRuntimesRules:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_layer_with_constant_weights_runs_in_int8(self, for_runtime, name, tmp_path):
        artifact = for_runtime(name, "onnxruntime")

        found = onnxruntime.realised(build.build(artifact, "onnxruntime", tmp_path), artifact)

        floats = {layer.name: layer.why for layer in found.layers if layer.precision != "int8"}
        assert floats == artifact.facts["float_layers"]
        assert found.int8 == len(artifact.facts["int8_layers"]) > 0

    @pytest.mark.parametrize("name", ["residual", "branches", "lenet5", "input_skip", "twice", "difficult_channels"])
    def test_pools_adds_and_concats_between_them_run_in_int8_too(self, for_runtime, name, tmp_path):
        artifact = for_runtime(name, "onnxruntime")

        found = onnxruntime.realised(build.build(artifact, "onnxruntime", tmp_path), artifact)

        assert found.kernels["float"] == {}
        assert found.kernels["boundary"] == {"QuantizeLinear": 1}

    def test_weights_are_stored_as_int8_and_biases_as_int32(self, for_runtime):
        values = constants(for_runtime("residual", "onnxruntime"))

        assert {value.dtype.name for name, value in values.items() if name.endswith("weight/quantized")} == {"int8"}
        assert {value.dtype.name for name, value in values.items() if name.endswith("bias/quantized")} == {"int32"}
        assert not [name for name in values if name.endswith((".weight", ".bias"))]

    def test_a_biass_scale_is_the_inputs_times_the_weights(self, for_runtime):
        values = constants(for_runtime("lenet5", "onnxruntime"))

        assert np.array_equal(values["conv1/Conv/bias/scale"], values["image/scale"] * values["conv1/Conv/weight/scale"])

    def test_activations_are_uint8(self, for_runtime):
        values = constants(for_runtime("mobile", "onnxruntime"))

        assert values["image/zero_point"].dtype == np.uint8
        assert values["image/zero_point"] > 0

    def test_a_dead_channel_and_one_with_a_bias_too_large_for_its_weights_are_kept(self, for_runtime):
        values = constants(for_runtime("difficult_channels", "onnxruntime"))

        biases = values["body.0/Conv/bias/quantized"] * values["body.0/Conv/bias/scale"].astype(np.float64)
        assert biases[0] == 0
        assert biases[1] == pytest.approx(3.0, rel=1e-6)

    def test_a_convolution_called_twice_gets_scales_for_each_call(self, for_runtime):
        values = constants(for_runtime("twice", "onnxruntime"))

        first, second = values["body.shared/Conv/bias/scale"], values["body.shared/Conv_1/bias/scale"]
        assert first.shape == second.shape
        assert not np.array_equal(first, second)


class TestGroupedConvolutions:
    """ONNX Runtime's product of integers has 16 columns on x86, so narrow groups are written several in one."""

    def written(self, source: Artifact, group_channels: int) -> ir.Model:
        model = ir.load(source.path)
        rules = replace(runtimes.rules("onnxruntime"), group_channels=group_channels)
        decided = place.plan(model.graph, rules)
        insert(model, decided, dict.fromkeys(decided.uses, Range(-1, 1)), rules)
        return model

    def groups(self, model: ir.Model) -> list[int]:
        return [node.attributes.get_int("group", 1) or 1 for node in model.graph if node.op_type == "Conv"]

    @pytest.mark.parametrize(
        ("channels", "groups", "wide"),
        [(16, 4, 1), (48, 6, 3), (440, 55, 11), (104, 13, 13), (64, 2, 2), (32, 32, 32)],
        ids=["all in one", "two in one", "five in one", "no divisor is small enough", "wide already", "depthwise"],
    )
    def test_narrow_groups_are_several_in_one_and_answer_the_same_integers(self, tmp_path, channels, groups, wide):
        weights = {
            "w": networks.weights(channels, 3, 1, 1),
            "grouped": networks.weights(channels, channels // groups, 3, 3),
            "last": networks.weights(5, channels, 1, 1),
        }
        source = networks.by_hand(
            tmp_path,
            f"""[first] a = Conv(image, w)
            [middle] b = Conv<group={groups}, pads=[1,1,1,1], strides=[2,1]>(a, grouped)
            [last] c = Conv(b, last)
            logits = GlobalAveragePool(c)""",
            weights,
        )

        apart, merged = self.written(source, 1), self.written(source, 16)

        assert self.groups(apart)[1] == groups
        assert self.groups(merged)[1] == wide
        sessions = [onnxruntime.reference(ir.to_proto(model).SerializeToString()) for model in (apart, merged)]
        one, other = (runtimes.run(session, {"image": networks.images(2, 8)}) for session in sessions)
        assert np.array_equal(one["logits"], other["logits"])
        assert np.ptp(one["logits"]) > 0

    def test_an_arm_cpu_and_other_runtimes_get_the_groups_as_they_are(self):
        assert runtimes.rules("onnxruntime", arch="x86_64", features=["avx2"]).group_channels == 16
        assert runtimes.rules("onnxruntime", "any").group_channels == 16
        assert runtimes.rules("onnxruntime", "arm64").group_channels == 1
        assert runtimes.rules("onnxruntime", arch="aarch64", features=["asimddp"]).group_channels == 1
        assert runtimes.rules("onnxruntime", arch="aarch64", features=[]).group_channels == 1
        assert {runtimes.rules(name).group_channels for name in ("openvino", "tensorrt")} == {1}


class TestTensorRTsRules:
    @pytest.mark.parametrize("name", NAMES)
    def test_all_integers_are_symmetric_int8_with_zero_points_of_zero(self, for_runtime, name):
        artifact = for_runtime(name, "tensorrt")
        values = constants(artifact)

        for node in nodes_of(artifact):
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert values[node.input[2]].dtype == np.int8
                assert not values[node.input[2]].any()

    @pytest.mark.parametrize("name", NAMES)
    def test_no_int32_and_no_stored_integer_is_anywhere(self, for_runtime, name):
        graph = onnx.load(for_runtime(name, "tensorrt").path).graph

        integers = [value.name for value in graph.initializer if value.data_type in (INT8, INT32)]
        assert all(name.endswith("/zero_point") for name in integers)
        assert not [value.name for value in graph.initializer if value.data_type == INT32]

    def test_weights_stay_float_in_front_of_q_and_dq_and_biases_stay_as_they_are(self, for_runtime):
        artifact = for_runtime("lenet5", "tensorrt")
        producers = {node.output[0]: node for node in nodes_of(artifact)}
        values = constants(artifact)

        for node in producers.values():
            if node.op_type in place.LAYERS:
                dequantize = producers[node.input[1]]
                quantize_node = producers[dequantize.input[0]]
                assert (dequantize.op_type, quantize_node.op_type) == ("DequantizeLinear", "QuantizeLinear")
                assert values[quantize_node.input[0]].dtype == np.float32
                assert values[node.input[2]].dtype == np.float32

    @pytest.mark.parametrize(
        ("name", "add", "skip"),
        [
            ("residual", "body.1/Add", "body.0.2/Relu"),
            ("residual", "body.2/Add", "body.2.skip.0/Conv"),
            ("padded_shortcut", "body/Add", "body/Pad"),
            ("mobile", "body/Add", "body.expand.2/Clip"),
            ("input_skip", "body/Add", "image"),
        ],
    )
    def test_exactly_the_skip_input_of_a_residual_add_is_quantized(self, for_runtime, name, add, skip):
        nodes = {node.name: node for node in nodes_of(for_runtime(name, "tensorrt"))}

        inputs = list(nodes[add].input)
        assert [value for value in inputs if value.endswith("/dequantized")] == [f"{skip}/dequantized"]

    def test_all_inputs_of_a_concat_and_its_output_share_one_scale(self, for_runtime):
        artifact = for_runtime("branches", "tensorrt")
        nodes = {node.name: node for node in nodes_of(artifact)}
        found, values = quantized_tensors(artifact), constants(artifact)

        concat = [name.removesuffix("/dequantized") for name in nodes["body/Concat"].input]
        assert len(concat) == 3
        assert len({float(values[found[name]]) for name in [*concat, "body/Concat"]}) == 1

    def test_results_that_no_int8_layer_reads_are_not_quantized(self, for_runtime):
        assert "body.second/Conv" not in quantized_tensors(for_runtime("residual", "tensorrt"))
        assert "logits" not in quantized_tensors(for_runtime("residual", "tensorrt"))


GATE_WEIGHTS = {"w": networks.weights(8, 3, 3, 3), "v": networks.weights(8, 8, 1, 1), "u": networks.weights(5, 8, 3, 3)}
GATED = """[first] c = Conv(image, w)  [pool] p = GlobalAveragePool(c)  [gate] g = Conv(p, v)  [soft] s = Sigmoid(g)
           [scale] m = Mul(c, s)  [second] y = Conv(m, u)  [top] logits = GlobalAveragePool(y)"""
SWISH = """[first] c = Conv(image, w)  [soft] s = Sigmoid(c)  [swish] m = Mul(c, s)  [second] y = Conv(m, u)
           [top] logits = GlobalAveragePool(y)"""


class TestUnusualGraphs:
    def quantized(self, folder: Path, body: str, weights: dict[str, np.ndarray], runtime: str = "onnxruntime") -> Artifact:
        return networks.quantized(networks.by_hand(folder / "source", body, weights), runtime, folder / runtime)

    def test_a_convolution_whose_result_is_the_answer_stays_float_with_the_reason(self, tmp_path):
        weights = {"v": networks.weights(8, 3, 3, 3), "w": networks.weights(5, 8, 6, 6), "b": networks.weights(5)}

        artifact = self.quantized(tmp_path, "[first] c = Conv(image, v)  [last] logits = Conv(c, w, b)", weights)

        why = "its result is the network's output, and the int8 convolution needs a quantized one"
        assert nodes_of(artifact)[-1].output[0] == "logits"
        assert artifact.facts["int8_layers"] == ["first"]
        found = onnxruntime.realised(build.build(artifact, "onnxruntime", networks.made(tmp_path / "engine")), artifact)
        assert [(layer.precision, layer.why) for layer in found.layers] == [("int8", ""), ("fp32", why)]

    def test_a_clip_below_zero_is_not_between_a_convolution_and_its_quantization(self, tmp_path):
        values = {
            "v": networks.weights(8, 3, 3, 3),
            "m": networks.weights(8 * 36, 5),
            "low": np.float32(-1),
            "high": np.float32(1),
        }
        body = """[first] c = Conv(image, v)  [hardtanh] h = Clip(c, low, high)
                  [flat] f = Flatten(h)  [last] logits = Gemm(f, m)"""

        artifact = self.quantized(tmp_path, body, values)

        found = onnxruntime.realised(build.build(artifact, "onnxruntime", networks.made(tmp_path / "engine")), artifact)
        assert [layer.precision for layer in found.layers] == ["int8", "int8"]

    @pytest.mark.parametrize(
        ("layer", "why"),
        [
            ("Gemm<alpha = 0.5>(flat, m, b)", "no alpha, beta or transposed input"),
            ("Gemm(flat, m, twice)", "its bias is computed in the graph"),
            ("Gemm(flat, m, row)", "its bias is not one number for each output channel"),
        ],
    )
    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
    def test_a_layer_that_has_no_int8_kernel_stays_float_with_the_reason(self, tmp_path, layer, why, runtime):
        weights = {
            "w": networks.weights(8, 3, 8, 8),
            "b": networks.weights(4),
            "m": networks.weights(8, 4),
            "row": networks.weights(1, 4),
        }
        body = f"""[conv] c = Conv(image, w)  [flatten] flat = Flatten(c)  [double] twice = Add(b, b)
                   [square] computed = Mul(m, m)  [head] logits = {layer}"""

        artifact = self.quantized(tmp_path, body, weights, runtime)

        assert artifact.facts["int8_layers"] == ["conv"]
        assert list(artifact.facts["float_layers"]) == ["head"]
        assert why in artifact.facts["float_layers"]["head"]

    def test_a_pool_that_narrows_the_range_keeps_the_scale_of_its_input_and_runs_on_integers(self, tmp_path):
        weights = {"w": -np.abs(networks.weights(8, 3, 3, 3)), "v": networks.weights(5, 8, 3, 3), "u": networks.weights(5, 5)}
        body = """[first] c = Conv(image, w)  [pool] m = MaxPool<kernel_shape = [3, 3]>(c)
                  [second] y = Conv(m, v)  [pool2] g = GlobalAveragePool(y)  [flat] f = Flatten(g)  [last] logits = Gemm(f, u)"""

        artifact = self.quantized(tmp_path, body, weights)

        found, values = quantized_tensors(artifact), constants(artifact)
        assert values[found["c"]] == values[found["m"]]
        engine = build.build(artifact, "onnxruntime", networks.made(tmp_path / "engine"))
        assert onnxruntime.realised(engine, artifact).kernels["int8"]["NhwcMaxPool"] == 1

    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
    def test_a_pad_with_minus_infinity_is_not_quantized(self, tmp_path, runtime):
        weights = {
            "w": networks.weights(8, 3, 3, 3),
            "v": networks.weights(5, 8, 3, 3),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "fill": np.float32(-np.inf),
            "u": networks.weights(5, 5),
        }
        body = """[first] c = Conv(image, w)  [pad] p = Pad(c, pads, fill)
                  [pool] m = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(p)
                  [second] y = Conv(m, v)  [pool2] g = GlobalAveragePool(y)  [flat] f = Flatten(g)  [last] logits = Gemm(f, u)"""

        artifact = self.quantized(tmp_path, body, weights, runtime)

        assert "p" not in quantized_tensors(artifact)
        assert artifact.facts["int8_layers"] == ["first", "second", "last"]

    def kernels(self, artifact: Artifact, folder: Path) -> Mapping[str, Mapping[str, int]]:
        return onnxruntime.realised(build.build(artifact, "onnxruntime", networks.made(folder / "engine")), artifact).kernels

    def test_a_map_is_multiplied_by_its_gate_on_integers(self, tmp_path):
        artifact = self.quantized(tmp_path, GATED, GATE_WEIGHTS)

        assert {"c", "s", "m"} <= set(quantized_tensors(artifact))
        assert self.kernels(artifact, tmp_path)["int8"]["QLinearMul"] == 1

    @pytest.mark.parametrize("runtime", ["openvino", "tensorrt"])
    def test_a_map_is_multiplied_by_its_gate_in_float_where_the_rules_do_not_say_otherwise(self, tmp_path, runtime):
        assert "s" not in quantized_tensors(self.quantized(tmp_path, GATED, GATE_WEIGHTS, runtime))

    @pytest.mark.parametrize(
        "product",
        [
            "[other] o = Conv(image, w)  [soft] s = Sigmoid(o)  [scale] m = Mul(c, s)",  # a map by a map
            "[scale] m = Mul(c, k)",  # by a constant
            "[a] a = GlobalAveragePool(c)  [b] b = Sigmoid(a)  [scale] g = Mul(a, b)  [add] m = Add(c, g)",  # a gate by a gate
        ],
    )
    def test_no_other_product_is_quantized(self, tmp_path, product):
        body = f"[first] c = Conv(image, w)  {product}  [second] y = Conv(m, u)  [top] logits = GlobalAveragePool(y)"

        source = networks.by_hand(tmp_path, body, {**GATE_WEIGHTS, "k": np.float32([[[2]]])})

        decided = place.plan(ir.load(source.path).graph, runtimes.rules("onnxruntime"))

        assert {"first", "second"} <= {node.name for node in decided.kernels}
        assert "scale" not in {node.name for node in decided.kernels}

    def test_a_split_hands_on_integers_at_the_scale_it_was_given(self, tmp_path):
        weights = {"w": networks.weights(8, 3, 3, 3), "u": networks.weights(4, 4, 3, 3), "v": networks.weights(4, 4, 3, 3)}
        body = """[first] c = Conv(image, w)  [split] a, b = Split<axis = 1, num_outputs = 2>(c)  [left] x = Conv(a, u)
                  [right] y = Conv(b, v)  [cat] z = Concat<axis = 1>(x, y)  [last] q = Conv(z, h)
                  [top] logits = GlobalAveragePool(q)"""

        artifact = self.quantized(tmp_path, body, {**weights, "h": networks.weights(5, 8, 1, 1)})

        found, values = quantized_tensors(artifact), constants(artifact)
        assert values[found["c"]] == values[found["a"]] == values[found["b"]]
        kernels = self.kernels(artifact, tmp_path)
        assert kernels["int8"]["Split"] == 1
        assert kernels["boundary"] == {"QuantizeLinear": 1, "DequantizeLinear": 1}

    def test_a_split_that_no_int8_layer_waits_for_stays_float(self, tmp_path):
        weights = {"w": networks.weights(8, 3, 3, 3), "u": networks.weights(5, 144)}
        body = """[first] c = Conv(image, w)  [split] a, b = Split<axis = 1, num_outputs = 2>(c)  [soft] s = Sigmoid(a)
                  [other] t = Tanh(b)  [add] z = Add(s, t)  [top] logits = GlobalAveragePool(z)"""

        artifact = self.quantized(tmp_path, body, weights)

        assert set(quantized_tensors(artifact)) == {"image", "c"}

    def test_a_linear_layers_result_is_quantized_only_where_an_int8_layer_reads_it(self, tmp_path):
        weights = {"m": networks.weights(192, 8), "n": networks.weights(8, 8), "o": networks.weights(8, 5)}
        body = """[flat] f = Flatten(image)  [first] a = Gemm(f, m)  [relu] r = Relu(a)  [second] b = Gemm(r, n)
                  [soft] s = Sigmoid(b)  [norm] x = Tanh(s)  [last] logits = MatMul(x, o)"""

        artifact = self.quantized(tmp_path, body, weights)

        assert artifact.facts["int8_layers"] == ["first", "second", "last"]
        assert set(quantized_tensors(artifact)) == {"f", "r", "x"}

    def test_the_nodes_that_are_to_run_on_integers_are_those_that_do(self, for_runtime, portable, tmp_path):
        for name in ("residual", "branches", "mobile"):
            decided = place.plan(ir.load(portable(name).path).graph, runtimes.rules("onnxruntime"))
            counts = self.kernels(for_runtime(name, "onnxruntime"), tmp_path / name)["int8"]

            # Transposes are ONNX Runtime's own, into the layout of its kernels.
            assert sum(counts.values()) - counts.get("Transpose", 0) == len(decided.kernels), name

    def test_all_float_readers_of_a_tensor_read_one_copy_so_that_what_they_make_together_is_fused(self, tmp_path):
        artifact = self.quantized(tmp_path, SWISH, GATE_WEIGHTS)

        engine = build.build(artifact, "onnxruntime", networks.made(tmp_path / "engine"))

        found = [node.op_type for node in onnx.load(engine.path).graph.node]
        assert found.count("QuickGelu") == 1
        assert found.count("DequantizeLinear") == 2  # one for it, and one for the answer
        assert not {"Sigmoid", "Mul"} & set(found)

    def test_a_copy_is_made_only_for_several_readers_in_float(self, for_runtime, tmp_path):
        copied = {
            name: [node.name for node in nodes_of(for_runtime(name, "onnxruntime")) if node.op_type == "Identity"]
            for name in ("residual", "branches", "lenet5", "mobile")
        }

        assert copied["residual"] == copied["branches"] == copied["lenet5"] == []
        assert copied["mobile"] == ["body.depthwise.0/Conv/DequantizeLinear/shared"]

    def test_a_graph_without_layers_has_nothing_to_quantize(self, tmp_path):
        with pytest.raises(UsageError, match="nothing to quantize"):
            self.quantized(tmp_path, "[relu] logits = Relu(image)", {})

    def test_a_range_that_was_not_observed_is_named(self, portable, tmp_path):
        observations = networks.calibrated(portable("lenet5"), tmp_path)
        seen = observe.load(observations.path)
        del seen["Flatten"]
        observe.save(seen, observations.path)

        with pytest.raises(StageError, match=r"not observed\n  - Flatten\n  try: calibrate again"):
            quantize.quantize(portable("lenet5"), observations, QuantizeTable(), "tensorrt", tmp_path)

    def test_torchscript_has_no_rules(self, portable, tmp_path):
        observations = networks.calibrated(portable("lenet5"), tmp_path)

        with pytest.raises(UsageError, match="torchscript has no INT8"):
            quantize.quantize(portable("lenet5"), observations, QuantizeTable(), "torchscript", tmp_path)


class TestHalf:
    @pytest.mark.parametrize("name", ["lenet5", "residual", "mobile", "attention", "upsampling"])
    def test_a_float_graph_runs_in_half_precision_with_float32_at_both_ends(self, portable, name, tmp_path):
        artifact = half.to_fp16(portable(name), tmp_path)

        samples, file = artifact.samples(), onnx.load(artifact.path)
        assert artifact.precision is Precision.FP16
        assert samples.expected["logits"].dtype == np.float32
        assert {value.type.tensor_type.elem_type for value in (*file.graph.input, *file.graph.output)} == {onnx.TensorProto.FLOAT}
        assert not [value.name for value in file.graph.initializer if value.data_type == onnx.TensorProto.FLOAT]
        # half has 11 significant bits: 66 dB for one rounding, less as they add up over the layers
        assert parity.tensor_errors(samples.expected["logits"], samples.reference["logits"]).sqnr_db > 50

    def test_the_scales_of_an_int8_graph_are_half_too(self, for_runtime, tmp_path):
        artifact = half.to_fp16(for_runtime("residual", "tensorrt"), tmp_path)

        values = constants(artifact)
        assert artifact.precision is Precision.INT8
        assert artifact.facts["float_type"] == "fp16"
        assert {value.dtype.name for name, value in values.items() if name.endswith("/scale")} == {"float16"}
        before, after = for_runtime("residual", "tensorrt").samples(), artifact.samples()
        assert parity.tensor_errors(after.expected["logits"], before.expected["logits"]).sqnr_db > 35

    def test_the_scales_of_a_resize_stay_float32_because_onnx_wants_them_so(self, tmp_path):
        values = {"w": networks.weights(5, 3, 16, 16), "scales": np.array([1, 1, 2, 2], np.float32)}
        source = networks.by_hand(tmp_path / "source", '[up] u = Resize(image, "", scales)  [conv] logits = Conv(u, w)', values)

        artifact = half.to_fp16(source, networks.made(tmp_path / "half"))

        assert constants(artifact)["scales"].dtype == np.float32

    def test_a_pad_with_minus_infinity_stays_one(self, tmp_path):
        values = {"w": networks.weights(5, 3, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "fill": np.float32(-np.inf)}
        body = "[pad] p = Pad(image, pads, fill) [pool] m = MaxPool<kernel_shape = [3, 3]>(p) [conv] logits = Conv(m, w)"

        artifact = half.to_fp16(networks.by_hand(tmp_path / "source", body, values), networks.made(tmp_path / "half"))

        assert constants(artifact)["fill"] == -np.inf

    def test_weights_beyond_the_range_of_half_are_refused_by_name(self, tmp_path):
        source = networks.by_hand(
            tmp_path / "source", "[conv] logits = Conv(image, huge)", {"huge": networks.weights(5, 3, 8, 8) * 1e6}
        )

        with pytest.raises(StageError, match=r"does not fit float16\n  - huge: .* is beyond float16's 65,504"):
            half.to_fp16(source, networks.made(tmp_path / "half"))

    def test_activations_beyond_the_range_of_half_are_refused_by_name(self, tmp_path):
        values = {"w": networks.weights(5, 3, 8, 8), "factor": np.float32(60_000), "back": np.float32(1e-5)}
        body = "[up] large = Mul(image, factor) [more] larger = Mul(large, factor) [down] x = Mul(larger, back)"
        body += " [conv] logits = Conv(x, w)"
        source = networks.by_hand(tmp_path / "source", body, values)

        with pytest.raises(StageError, match=r"activations do not fit float16\n(.*\n)*  - larger: .* is beyond 65,504"):
            half.to_fp16(source, networks.made(tmp_path / "half"))

    def test_calibration_images_find_what_golden_samples_do_not(self, tmp_path):
        values = {"w": networks.weights(5, 3, 1, 1), "factor": np.float32(60_000), "back": np.float32(1e-5)}
        body = "[up] large = Mul(image, factor) [down] x = Mul(large, back) [conv] logits = Conv(x, w)"
        source = networks.by_hand(tmp_path / "source", body, values)
        golden = source.samples().inputs["image"]
        replace(source.samples(), inputs={"image": golden / 100}).save(source.folder / "samples.npz")
        bright = np.zeros_like(golden)
        bright[1, 0, 0, :2] = 2.0
        half.to_fp16(source, networks.made(tmp_path / "half"))

        with pytest.raises(StageError) as refused:
            half.to_fp16(source, tmp_path / "half", batches=lambda size: [bright], images=len(bright))

        assert refused.value.problems == (f"large: 1.2e+05 is beyond 65,504, as are 2 of {golden.size + bright.size:,} values",)
        assert refused.value.why == f"on {len(golden) + len(bright)} images, {len(bright)} of them for calibration"

    def test_what_becomes_zero_is_counted_over_all_images_however_many_at_a_time(self, tmp_path):
        values = {"w": networks.weights(5, 3, 1, 1), "a": np.float32(2**-13), "b": np.float32(2**-12), "c": np.float32(2**12)}
        body = "[one] s = Mul(image, a) [two] small = Mul(s, b) [three] t = Mul(small, c) [four] x = Mul(t, c)"
        body += " [conv] logits = Conv(x, w)"
        source = networks.by_hand(tmp_path / "source", body, values)
        pictures = np.abs(networks.images(6)[..., :8, :8]) + 1.5  # none becomes zero but those below
        pictures[0, 0, 0, :3] = (1.0, 0.0, -0.5)  # a tie, which is rounded to the even zero; zero already; too small

        def counted(pieces: int) -> Mapping[str, object]:
            folder, split = networks.made(tmp_path / f"{pieces}"), np.split(pictures, pieces)
            return half.to_fp16(source, folder, batches=lambda size: split, images=6).facts["activations"]

        found = [counted(pieces) for pieces in (1, 3)]

        lost = int(np.count_nonzero(np.abs(source.samples().inputs["image"]) * np.float32(2**-25) <= 2.0**-25))
        assert found[0] == found[1]
        assert (found[0]["lost"], found[0]["lost_of"], found[0]["calibration_images"]) == (lost + 2, "small", 6)
        assert found[0]["most_lost"] == (lost + 2) / (pictures.size + source.samples().inputs["image"].size)

    def test_what_half_makes_of_the_activations_is_told(self, portable, tmp_path):
        found = half.to_fp16(portable("residual"), tmp_path).facts["activations"]

        assert 0 < found["largest"] < 65_504
        assert found["most_lost"] == 0
        assert found["of"] in {name for node in onnx.load(portable("residual").path).graph.node for name in node.output}

    def test_scales_are_rounded_up_so_that_none_is_zero_and_nothing_is_clipped(self, tmp_path):
        source = networks.by_hand(
            tmp_path / "source", "[conv] logits = Conv(image, tiny)", {"tiny": networks.weights(5, 3, 8, 8) * 1e-7}
        )
        artifact = networks.quantized(source, "tensorrt", tmp_path / "int8")

        typed = half.to_fp16(artifact, networks.made(tmp_path / "half"))

        before, after = constants(artifact), constants(typed)
        scales = [name for name in before if name.endswith("/scale")]
        assert all((after[name] >= before[name]).all() for name in scales)
        assert min(after[name].min() for name in scales) >= np.finfo(np.float16).smallest_subnormal

    def test_weights_that_round_to_zero_are_counted(self, tmp_path):
        weights = networks.weights(5, 3, 8, 8)
        weights[0, 0, 0] = 1e-9
        source = networks.by_hand(tmp_path / "source", "[conv] logits = Conv(image, w)", {"w": weights})

        artifact = half.to_fp16(source, networks.made(tmp_path / "half"))

        assert artifact.facts["underflows"] == 8


class TestWhatStaysInFloat32:
    BODY = """[first] c = Conv(image, w)  [relu] r = Relu(c)  [soft] s = Softmax<axis = 1>(r)  [gate] g = Sigmoid(s)
              [scaled] m = Mul(g, f)  [both] a = Add(r, f)  [joined] j = Add(m, a)  [top] logits = GlobalAveragePool(j)"""

    def source(self, folder, body=BODY):
        return networks.by_hand(networks.made(folder), body, {"w": networks.weights(5, 3, 3, 3), "f": np.float32([[[3.3]]])})

    def types(self, artifact) -> dict[str, str]:
        """Of each node the float type that it computes in."""
        graph = onnx.shape_inference.infer_shapes(onnx.load(artifact.path), strict_mode=True, data_prop=True).graph
        known = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
        return {node.name: onnx.TensorProto.DataType.Name(known[node.output[0]]) for node in graph.node}

    def test_softmax_does_without_being_asked_with_one_cast_at_each_edge(self, tmp_path):
        artifact = half.to_fp16(self.source(tmp_path / "source"), networks.made(tmp_path / "half"))

        types = self.types(artifact)
        assert artifact.facts["float32_nodes"] == ["soft"]
        assert {name for name, kind in types.items() if kind == "FLOAT"} == {"soft", "r/float32/Cast", "logits/Cast"}
        assert {name for name in types if name.endswith("Cast")} == {
            *("image/Cast", "r/float32/Cast", "s/fp16/Cast", "logits/Cast")
        }
        samples = artifact.samples()
        assert parity.tensor_errors(samples.expected["logits"], samples.reference["logits"]).sqnr_db > 50

    def test_nodes_do_by_name_pattern_or_operator_and_neighbours_of_these_share_no_cast(self, tmp_path):
        source = self.source(tmp_path / "source")

        for asked in (["gate", "scaled"], ["gat*", "scal*"], ["Sigmoid", "Mul"]):
            artifact = half.to_fp16(source, networks.made(tmp_path / asked[0]), float32=asked)

            assert artifact.facts["float32_nodes"] == ["soft", "gate", "scaled"]
            types = self.types(artifact)
            assert {name for name in types if name.endswith("Cast")} == {
                *("image/Cast", "r/float32/Cast", "m/fp16/Cast", "logits/Cast")
            }
            assert {constants(artifact)[name].dtype.name for name in ("f", "w")} == {"float16"}
            assert constants(artifact)["f/float32"] == np.float32(3.3)  # not rounded to half on the way

    def test_all_of_them_is_the_float_graph_without_a_cast(self, tmp_path):
        source = self.source(tmp_path / "source")

        artifact = half.to_fp16(source, networks.made(tmp_path / "half"), float32=["*"])

        assert "Cast" not in {node.op_type for node in nodes_of(artifact)}
        assert np.array_equal(artifact.samples().expected["logits"], source.samples().expected["logits"])

    def test_a_network_that_does_not_fit_does_with_the_nodes_that_are_named(self, tmp_path):
        values = {"w": networks.weights(5, 3, 8, 8), "factor": np.float32(60_000), "back": np.float32(1e-9)}
        body = "[up] large = Mul(image, factor) [more] larger = Mul(large, factor) [down] x = Mul(larger, back)"
        source = networks.by_hand(tmp_path / "source", f"{body} [conv] logits = Conv(x, w)", values)
        with pytest.raises(StageError, match=r"in float32 \(build\.float32\)"):
            half.to_fp16(source, networks.made(tmp_path / "half"))

        artifact = half.to_fp16(source, networks.made(tmp_path / "typed"), float32=["Mul"])

        samples = artifact.samples()
        assert parity.tensor_errors(samples.expected["logits"], samples.reference["logits"]).sqnr_db > 50

    def test_what_fits_no_node_is_refused_with_names_that_do(self, tmp_path):
        with pytest.raises(UsageError, match=r"build\.float32 fits no node\n  - sofd\n  try: .* nodes: first, relu, soft"):
            half.to_fp16(self.source(tmp_path / "source"), networks.made(tmp_path / "half"), float32=["soft", "sofd"])

    def test_a_layer_in_int8_stays_so(self, for_runtime, tmp_path):
        model = for_runtime("residual", "tensorrt")

        artifact = half.to_fp16(model, tmp_path, float32=["Conv", "Gemm"])

        assert not {*artifact.facts["float32_nodes"]} & {*model.facts["int8_layers"]}
        assert {finding.severity for finding in lint.lint(artifact.path, "tensorrt")} <= {"note"}
