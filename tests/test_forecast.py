"""Latency before there is a device: kernels, operations and bytes of a graph, the roofline, its fit, and what fits a budget."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import timings
from click.testing import CliRunner
from onnx import TensorProto, helper

from deploykit import artifact, build, bundle, forecast, targets
from deploykit.artifact import Artifact
from deploykit.cli import cli
from deploykit.errors import ModelError, UsageError
from deploykit.forecast import graphs, measured
from deploykit.report import forecast as text
from deploykit.targets import fit, known, latency, layers
from deploykit.targets.fit import Row
from deploykit.targets.latency import Fit
from deploykit.targets.layers import Layer, Network

ORIN = targets.find("orin-nano")
STORED = Fit.stored()


def graph(*nodes: onnx.NodeProto, shapes: dict[str, list[int]], size: int = 8, channels: int = 16) -> onnx.ModelProto:
    """Nodes over `image` (1, channels, size, size); `shapes` are constants. The last output is the graph's."""
    constants = [
        TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(4 * math.prod(dims)))
        for name, dims in shapes.items()
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", channels, size, size])
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    made = helper.make_graph(list(nodes), "g", [image], [output], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def kernels(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    return [layer.operators for layer in layers.of_model(model, name="g").layers]


CONV = node("Conv", "image w", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1])


class TestKernels:
    def test_a_convolution_takes_norm_addition_and_activation_with_it(self):
        model = graph(
            CONV,
            node("BatchNormalization", "a s s s s", "b"),
            node("Add", "b image", "c"),
            node("Relu", "c", "d"),
            shapes={"w": [16, 16, 3, 3], "s": [16]},
        )

        assert kernels(model) == [("Conv", "BatchNormalization", "Add", "Relu")]

    def test_what_somebody_else_reads_too_ends_a_kernel(self):
        model = graph(CONV, node("Relu", "a", "b"), node("Add", "a b", "c"), shapes={"w": [16, 16, 3, 3]})

        assert kernels(model) == [("Conv",), ("Relu", "Add")]

    def test_swish_is_a_kernel_of_its_own_in_either_spelling(self):
        swish = (node("Sigmoid", "a", "b"), node("Mul", "a b", "c"))

        assert kernels(graph(CONV, *swish, shapes={"w": [16, 16, 3, 3]})) == [("Conv",), ("Swish",)]
        assert kernels(graph(CONV, node("HardSwish", "a", "b"), shapes={"w": [16, 16, 3, 3]})) == [("Conv",), ("HardSwish",)]

    def test_pointwise_operators_in_a_row_are_one_kernel(self):
        model = graph(node("Exp", "image", "a"), node("Abs", "a", "b"), node("Mul", "b s", "c"), shapes={"s": [1]})

        assert kernels(model) == [("Exp", "Abs", "Mul")]

    def test_views_and_joining_what_kernels_write_are_none(self):
        model = graph(
            CONV,
            node("Conv", "image v", "b"),
            node("Concat", "a b", "c", axis=1),
            node("GlobalAveragePool", "c", "d"),
            node("Flatten", "d", "e"),
            node("Gemm", "e g", "f", transB=1),
            shapes={"w": [16, 16, 3, 3], "v": [8, 16, 1, 1], "g": [10, 24]},
        )

        assert kernels(model) == [("Conv",), ("Conv",), ("GlobalAveragePool",), ("Gemm",)]

    def test_joining_the_input_itself_is_a_copy(self):
        model = graph(CONV, node("Concat", "a image", "c", axis=1), shapes={"w": [16, 16, 3, 3]})

        assert kernels(model) == [("Conv",), ("Concat",)]

    def test_a_flattened_tensor_keeps_its_depth(self):
        model = graph(node("Flatten", "image", "a"), node("Gemm", "a g", "b", transB=1), shapes={"g": [10, 1024]})

        [layer] = layers.of_model(model, name="g").layers
        assert (layer.kind, layer.macs, layer.depth, layer.weights) == ("matrix", 10_240, 1024, 10_240)

    def test_an_einsum_multiplies_every_combination_of_its_indices(self):
        model = graph(node("Einsum", "image image", "a", equation="bchw,bkhw->bck"), shapes={})

        [layer] = layers.of_model(model, name="g").layers
        assert (layer.kind, layer.macs, layer.depth) == ("product", 16 * 16 * 64, 64)

    def test_q_dq_costs_nothing_and_says_what_runs_in_int8(self, portable, tmp_path):
        plain = layers.read(portable("lenet5").path)
        quantized = layers.read(networks.quantized(portable("lenet5"), "tensorrt", tmp_path).path)

        assert [layer.operators for layer in quantized.layers] == [layer.operators for layer in plain.layers]
        assert quantized.macs == plain.macs
        assert quantized.has_qdq
        assert any(layer.is_int8 for layer in quantized.layers)
        assert not any(layer.is_int8 for layer in plain.layers)

    def test_a_shape_that_depends_on_values_is_refused(self):
        model = graph(node("NonZero", "image", "a"), node("Cast", "a", "b", to=1), node("Softmax", "b", "c"), shapes={})

        assert layers.of_model(model, name="g").layers == ()
        model = graph(node("Exp", "image", "x"), node("Compress", "x k", "b"), node("Exp", "b", "c"), shapes={"k": [3]})
        with pytest.raises(UsageError, match=r"cannot be told|do not fit"):
            layers.of_model(model, name="g")

    def test_an_open_size_wants_one(self):
        model = graph(CONV, shapes={"w": [16, 16, 3, 3]})
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"

        with pytest.raises(UsageError, match="--size"):
            layers.of_model(onnx.ModelProto.FromString(model.SerializeToString()), name="g")
        assert layers.of_model(model, name="g", size=16).macs == 16 * 8 * 16 * 16 * 9


class TestBytesByHand:
    def layer(self, model: onnx.ModelProto) -> Layer:
        [found] = layers.of_model(model, name="g").layers
        return found

    def test_of_a_convolution(self):
        found = self.layer(graph(CONV, node("Relu", "a", "b"), shapes={"w": [32, 16, 3, 3]}))

        # 32 x 16 x 3 x 3 weights, 16 x 8 x 8 read, 32 x 8 x 8 written
        assert (found.weights, found.read, found.written) == (4608, 1024, 2048)
        assert found.bytes(1) == 4608 + 1024 + 2048
        assert found.bytes(2, batch=4) == 2 * (4608 + 4 * (1024 + 2048))

    def test_of_a_depthwise_convolution_with_a_residual(self):
        conv = node("Conv", "image w b", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=16)
        found = self.layer(graph(conv, node("Add", "a image", "c"), shapes={"w": [16, 1, 3, 3], "b": [16]}))

        # 16 x 9 weights and 16 biases; the residual is the same tensor as the input and is read once
        assert (found.kind, found.weights, found.read, found.written) == ("depthwise", 160, 1024, 1024)
        assert found.macs == 1024 * 9

    def test_of_a_pool(self):
        found = self.layer(graph(node("MaxPool", "image", "a", kernel_shape=[2, 2], strides=[2, 2]), shapes={}))

        assert (found.kind, found.weights, found.read, found.written, found.macs) == ("pool", 0, 1024, 256, 0)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_operations_are_those_that_torchvision_counts(name):
    from torchvision.models import get_model_weights

    wanted = next(iter(get_model_weights(name))).meta["_ops"]

    assert named(name).macs / 1e9 == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_kernels_that_come_with_deploykit_are_those_that_are_built(name):
    """Otherwise: python benchmarks/predictor.py kernels --again."""
    stored, built = known.network(name), named(name)

    assert stored is not None
    assert (stored.macs, stored.weights, stored.unknown) == (built.macs, built.weights, built.unknown)
    assert [replace(layer, name="") for layer in stored.layers] == [replace(layer, name="") for layer in built.layers]


def test_a_name_is_predicted_without_torch():
    program = (
        "import sys\nfrom deploykit import forecast\nassert forecast.network_of('resnet18').macs > 1e9\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@cache
def named(name: str) -> Network:
    """Building and exporting one takes seconds."""
    return graphs.built(name)


def simple(macs: int = 10**8, *, kind: str = "convolution", count: int = 20) -> Network:
    layer = Layer("conv", kind, ("Conv",), macs, 36_864, 200_000, 200_000, rows=3136, columns=64, depth=576)  # type: ignore[arg-type]
    return Network("simple", (layer,) * count, (), has_qdq=False)


class TestLatency:
    def test_it_lies_in_its_interval_and_is_the_sum_of_its_kernels(self):
        found = latency.predict(simple(), ORIN, "fp16")

        assert found.interval_ns[0] < found.latency_ns < found.interval_ns[1]
        assert found.latency_ns == pytest.approx(1e3 * STORED.gpu.host_us + sum(layer.time_ns for layer in found.layers))

    @pytest.mark.parametrize("precision", ["int8", "fp16", "tf32", "fp32"])
    def test_more_images_take_longer_and_each_of_them_less(self, precision):
        times = [latency.predict(simple(), ORIN, precision, batch=batch).latency_ns for batch in (1, 2, 8, 64)]

        assert times == sorted(times)
        per_image = [time / batch for time, batch in zip(times, (1, 2, 8, 64), strict=True)]
        assert per_image == sorted(per_image, reverse=True)

    def test_narrower_numbers_are_never_slower(self):
        times = [latency.predict(simple(), ORIN, precision).latency_ns for precision in latency.PRECISIONS]

        assert times == sorted(times)

    def test_a_lower_power_mode_is_slower(self):
        assert (
            latency.predict(simple(), targets.in_mode(ORIN, "7W"), "int8").latency_ns
            > latency.predict(simple(), ORIN, "int8").latency_ns
        )

    def test_a_gpu_short_of_power_works_at_a_clock_between_its_base_and_its_highest(self):
        board = targets.find("t4")
        full = replace(board, figures={**board.figures, "base_mhz": board.figures["gpu_mhz"]})

        slower = latency.total_ns(simple(10**11), board, "fp16", 1, STORED.gpu) / latency.total_ns(
            simple(10**11), full, "fp16", 1, STORED.gpu
        )

        assert slower == pytest.approx((1590 / 585) ** STORED.gpu.sag, rel=0.01)

    def test_kernels_with_nothing_to_do_take_their_floor(self):
        found = latency.predict(simple(macs=1000), targets.find("h100"), "int8")

        floor = 1e3 * STORED.gpu.launch_us + 1e6 * STORED.gpu.ramp_kilocycles / targets.find("h100").value("gpu_mhz")
        assert {layer.bound for layer in found.layers} == {"floor"}
        assert found.layers[0].time_ns == pytest.approx(floor, rel=0.4)

    def test_a_large_convolution_is_bound_by_arithmetic_and_a_pool_by_memory(self):
        assert latency.predict(simple(10**10), ORIN, "fp16").layers[0].bound == "compute"
        pool = Network("pool", (Layer("p", "pool", ("MaxPool",), 0, 0, 10**8, 10**8),), (), has_qdq=False)
        assert latency.predict(pool, ORIN, "fp16").layers[0].bound == "memory"

    def test_no_kernel_beats_peak_rate_or_bandwidth(self):
        found = latency.predict(simple(), targets.find("a100"), "int8", batch=256)

        board = targets.find("a100")
        for layer in found.layers:
            assert layer.operations / layer.time_ns * 1e9 < board.rate("int8")

    def test_a_board_without_int8_refuses_it(self):
        with pytest.raises(UsageError, match="no int8 kernels"):
            latency.predict(simple(), targets.find("jetson-nano"), "int8")

    def test_a_word_that_is_no_precision_is_refused_with_those_there_are(self):
        with pytest.raises(UsageError, match=r"'int4' is no precision\n  why: there are int8, fp16, tf32, fp32"):
            forecast.predict(simple(), ORIN, precision="int4")

    def test_layers_that_q_dq_leaves_out_stay_float(self):
        layer = simple().layers[0]
        mixed = Network("mixed", (replace(layer, is_int8=True), layer), (), has_qdq=True)

        assert [time.arithmetic for time in latency.predict(mixed, ORIN, "int8").layers] == ["int8", "fp16"]

    def test_on_a_gpu_swish_between_int8_layers_moves_half_precision(self):
        swish = node("Mul", "a s", "b"), node("Sigmoid", "a", "s")
        made = layers.of_model(graph(CONV, swish[1], swish[0], shapes={"w": [8, 16, 3, 3]}), name="g")

        convolution, activation = latency.layer_times(made, targets.find("orin-nano"), "int8", 1, STORED.gpu)

        assert (convolution.arithmetic, activation.arithmetic) == ("int8", "fp16")
        assert activation.bytes == 2 * 2 * 8 * 64

    def test_on_a_cpu_what_has_no_integer_kernel_stays_float(self):
        swish = node("Mul", "a s", "b"), node("Sigmoid", "a", "s")
        made = layers.of_model(graph(CONV, swish[1], swish[0], node("Relu", "b", "c"), shapes={"w": [8, 16, 3, 3]}), name="g")
        on_gpu, on_cpu = (latency.arithmetics(made, targets.find(name), "int8") for name in ("orin-nano", "x86-vnni"))

        assert on_gpu == ["int8", "fp16"]
        assert on_cpu == ["int8", "fp32"]

    @pytest.mark.parametrize(
        ("network", "board", "batch", "told"),
        [
            (simple(10**13), "t4", 1, "GMACs"),
            (simple(), "thor", 1, "compute capability 11.0"),
            (simple(), "raspberry-pi-5", 1, "CPUs were measured on one machine alone"),
            (simple(), "t4", 4096, "batches"),
            (simple(kind="product"), "t4", 1, "attention"),
            (replace(simple(), unknown=("GridSample",)), "t4", 1, "GridSample"),
        ],
    )
    def test_what_measurements_do_not_cover_is_said(self, network, board, batch, told):
        [reason] = latency.predict(network, targets.find(board), "fp16", batch=batch).outside

        assert told in reason

    def test_what_they_cover_is_not(self):
        assert latency.predict(simple(), targets.find("t4"), "fp16").outside == ()


class TestTheStoredFit:
    def test_it_keeps_its_bounds(self):
        for way in ("device", "network"):
            found = STORED.facts[f"leave one {way} out"]
            assert found["rows"] == STORED.facts["rows"] == 142
            assert found["median"] <= 20
            assert found["p90"] <= 50
            assert found["coverage"] >= 65
            assert found["roofline_ms median"] > 2 * found["median"]
            assert found["scaled_ms median"] > 2 * found["median"]

    def test_resnet18_on_an_a100_is_near_what_was_published(self):
        """2.00 ms in TF32, 0.863 in FP16, 0.5 in INT8 at batch 32: NVIDIA/TensorRT v10.3.0, trt-engine-explorer."""
        network, board = named("resnet18"), targets.find("a100-pcie-80gb")

        found = [latency.predict(network, board, precision, batch=32).latency_ns / 1e6 for precision in ("tf32", "fp16", "int8")]

        assert found == pytest.approx([2.0, 0.863, 0.5], rel=0.3)


class TestFitting:
    def rows(self, constants: latency.Constants) -> list[Row]:
        cases = [
            (simple(macs, count=count), targets.find(board), precision, batch)
            for macs, count in ((10**6, 60), (10**9, 20), (10**8, 100))
            for board in ("t4", "a100", "agx-orin", "h100")
            for precision in ("int8", "fp16")
            for batch in (1, 8, 64)
        ]
        return [
            Row(network, board, precision, batch, latency.total_ns(network, board, precision, batch, constants))
            for network, board, precision, batch in cases
        ]

    def test_it_finds_the_constants_that_made_the_data(self):
        truth = replace(STORED.gpu, launch_us=5.0, int8=0.6, memory=0.5)
        rows = self.rows(truth)

        found, _ = fit.fitted(rows, STORED.gpu_start)

        for row in rows:
            again = latency.total_ns(row.network, row.target, row.precision, row.batch, found)
            assert again == pytest.approx(row.latency_ns, rel=0.05)

    def test_one_wild_measurement_moves_little(self):
        rows = self.rows(STORED.gpu)
        rows[0] = replace(rows[0], latency_ns=100 * rows[0].latency_ns)

        found, _ = fit.fitted(rows, STORED.gpu_start)

        one = rows[30]
        assert latency.total_ns(one.network, one.target, one.precision, one.batch, found) == pytest.approx(
            one.latency_ns, rel=0.1
        )

    def test_nothing_cannot_be_fitted(self):
        with pytest.raises(UsageError):
            fit.fitted([], STORED.gpu_start)

    def test_a_few_measurements_of_a_device_correct_it_and_narrow_its_interval(self):
        slow = STORED.gpu.scaled(launch=1.5, memory=1.2, **dict.fromkeys((*latency.PRECISIONS, "depthwise"), 2.0))
        cases = [(replace(simple(macs), name=str(macs)), batch) for macs in (10**7, 10**9) for batch in (1, 8)]
        rows = [Row(one, ORIN, "int8", batch, latency.total_ns(one, ORIN, "int8", batch, slow)) for one, batch in cases]

        found = fit.calibrated(rows, STORED.gpu)

        other = simple(10**8)
        wanted = latency.total_ns(other, ORIN, "int8", 4, slow)
        before = latency.total_ns(other, ORIN, "int8", 4, STORED.gpu)
        after = latency.total_ns(other, ORIN, "int8", 4, found)
        assert abs(math.log(after / wanted)) < 0.3 * abs(math.log(before / wanted))
        assert found.log_spread < STORED.gpu.log_spread

    def test_measurements_that_contradict_each_other_do_not_narrow_it(self):
        one = simple()
        right = latency.total_ns(one, ORIN, "int8", 1, STORED.gpu)
        rows = [Row(one, ORIN, "int8", 1, right * factor) for factor in (0.4, 2.5) * 4]

        assert fit.calibrated(rows, STORED.gpu).log_spread > STORED.gpu.log_spread

    def test_an_interval_holds_eight_of_ten_of_its_groups(self):
        assert fit.spread([0.1, -0.2, 0.3, -0.4, 0.5], ["a", "b", "c", "d", "e"]) == 0.4
        # A group of many counts as one.
        assert fit.spread([0.1] * 8 + [0.9, 0.8], ["a"] * 8 + ["b", "c"]) == 0.9


def copied(made: Artifact, folder: Path) -> Artifact:
    for file in made.folder.iterdir():
        shutil.copy(file, folder)
    return replace(made, path=folder / made.path.name)


class TestWhatAModelIs:
    @pytest.fixture
    def published(self, portable, tmp_path):
        """An artifact on disk with its manifest."""
        made = portable("residual")
        return artifact.make(tmp_path / "model", "key", lambda folder: copied(made, folder))

    def test_an_artifact_a_file_and_a_bundle_give_the_same_kernels(self, published, tmp_path):
        content = published.path.read_bytes()
        blob = bundle.Blob(hashlib.sha256(content).hexdigest(), len(content))
        manifest = bundle.Manifest("residual", 1, (), {f"{bundle.MODELS}/tensorrt-fp32/{bundle.GRAPH}": blob})
        packed = tmp_path / "packed"
        (packed / blob.entry).parent.mkdir(parents=True)
        (packed / blob.entry).write_bytes(content)
        (packed / bundle.MANIFEST).write_bytes(bundle.dump(manifest))

        kernels = [forecast.network_of(str(path)).layers for path in (published.folder, published.path, packed)]

        assert kernels[0] == kernels[1] == kernels[2]

    def test_reading_one_imports_no_torch(self, published):
        program = (
            "import sys; from deploykit import forecast; "
            f"forecast.predict({str(published.folder)!r}, forecast.target_of('orin-nano')); print('torch' in sys.modules)"
        )

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

        assert done.stdout == "False\n"

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(ModelError, match="there is no model"):
            forecast.network_of("resnet5000")

    def test_a_damaged_file_is_refused(self, tmp_path):
        (tmp_path / "bad.onnx").write_bytes(b"not a graph")

        with pytest.raises(UsageError):
            forecast.network_of(str(tmp_path / "bad.onnx"))


class TestWhatABenchmarkKeeps:
    """The device itself, the kernels and the times, so that predictions for it need neither its models nor torch."""

    @pytest.fixture
    def engines(self, portable, tmp_path):
        """An engine in a run's folder, beside the graph that it was built from."""
        model = artifact.make(tmp_path / "run/export-onnx", "key", lambda folder: copied(portable("residual"), folder))
        built = artifact.make(tmp_path / "run/build", "key", lambda folder: build.build(model, "onnxruntime", folder))
        return {"a": built}

    @pytest.fixture
    def kept(self, engines, tmp_path):
        """A file of a board that is twice as slow as predicted."""
        file = measured.Keeper(measured.File(tmp_path / "mine.json"), ORIN)
        wanted = forecast.predict(graphs.of_engine(engines["a"]), ORIN)
        file.keep(timings.report({"a": [round(2 * wanted.latency_ns)] * 5}), engines)
        return file

    def test_a_prediction_for_the_device_follows_it(self, kept, engines):
        network = graphs.of_engine(engines["a"])
        before, after = (forecast.predict(network, ORIN, measured=path) for path in (None, kept.file.path))

        assert kept.file.count == 2  # one query alone, and one of a batch
        assert after.calibrated
        assert after.latency_ns > 1.5 * before.latency_ns

    def test_the_file_says_what_the_device_is(self, kept):
        assert forecast.target_of(None, measured=kept.file.path) == ORIN

    def test_it_is_not_taken_for_another_device(self, kept):
        with pytest.raises(UsageError, match="was measured on orin-nano-8gb, not on t4"):
            measured.read(kept.file.path, targets.find("t4"))

    def test_a_run_that_was_disturbed_is_not_fitted(self, engines, tmp_path):
        with pytest.raises(UsageError, match="not valid"):
            measured.Keeper(measured.File(tmp_path / "mine.json"), ORIN).keep(
                timings.report({"a": [1000] * 5}, others_ns=10**9), engines
            )

        assert not (tmp_path / "mine.json").exists()

    def test_an_engine_without_its_graph_is_refused_before_anything_is_measured(self, engines, tmp_path):
        shutil.rmtree(tmp_path / "run/export-onnx")

        with pytest.raises(UsageError, match="is not beside it"):
            measured.Keeper(measured.File(tmp_path / "mine.json"), ORIN).check(engines)

    @pytest.mark.parametrize("words", [("--scenario", "multi-stream"), ("--metric", "instructions"), ("--instances", "2")])
    def test_it_goes_with_single_queries_alone(self, engines, tmp_path, words):
        found = CliRunner().invoke(
            cli, ["benchmark", str(engines["a"].folder), "--calibrate-predictor", str(tmp_path / "x.json"), *words]
        )

        assert isinstance(found.exception, UsageError)
        assert "does not go together" in str(found.exception)


class TestTheCommands:
    def run(self, *words: str) -> str:
        return str(CliRunner().invoke(cli, [*words], catch_exceptions=False, standalone_mode=False).output)

    def test_predict_says_latency_interval_and_what_dominates(self, portable):
        told = self.run("predict", str(portable("lenet5").path), "--target", "orin-nano", "--precision", "int8", "--batch", "4")

        assert "int8, batch 4" in told
        assert "with 80 % between" in told
        assert "kernels; time bound" in told

    def test_as_json_it_has_every_kernel(self, portable):
        found = json.loads(self.run("predict", str(portable("lenet5").path), "--target", "t4", "--json"))

        assert found["interval_ns"][0] < found["latency_ns"] < found["interval_ns"][1]
        assert found["layers"][0]["layer"]["operators"][0] == "Conv"

    def test_the_roofline_is_a_picture_with_a_dot_for_every_product(self, portable, tmp_path):
        path = tmp_path / "roof.svg"
        self.run("predict", str(portable("lenet5").path), "--target", "t4", "--picture", str(path))

        drawn = path.read_text()
        assert drawn.startswith("<svg")
        assert drawn.count("<circle") == 5  # two convolutions, three matrices

    def test_a_devices_own_measurements_are_taken(self, portable, tmp_path):
        path = str(portable("lenet5").path)
        rows = [{"model": path, "precision": "fp32", "batch": batch, "latency_ms": 2.0 * batch} for batch in (1, 8)]
        (tmp_path / "mine.json").write_text(json.dumps(rows))

        words = ("predict", path, "--target", "orin-nano", "--json")
        plain, own = json.loads(self.run(*words)), json.loads(self.run(*words, "--measured", str(tmp_path / "mine.json")))

        assert own["calibrated"]
        assert own["latency_ns"] > 2 * plain["latency_ns"]

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ("[", "not JSON"),
            ("[]", "not a list"),
            ('{"measurements": []}', "does not say on what it was measured"),
            ('[{"model": "x", "precision": "fp16", "latency_ms": 1, "kernels": [{"name": "a"}]}]', "cannot be used"),
            ('[{"model": 1}, {"model": "x", "precision": "int9"}]', "cannot be used"),
            ('[{"model": "resnet18", "precision": "fp16", "batch": 0, "latency_ms": 1}]', "batch is 0"),
            ('[{"model": "resnet18", "precision": "fp16", "latency_ms": -1}]', "latency_ms is -1"),
        ],
    )
    def test_measurements_that_are_none_are_refused(self, tmp_path, content, told):
        (tmp_path / "mine.json").write_text(content)

        with pytest.raises(UsageError, match=told):
            measured.read(tmp_path / "mine.json", ORIN)

    def test_plan_lists_first_what_fits(self, portable):
        words = ("plan", str(portable("residual").path), "--target", "orin-nano", "--budget", "1ms", "--json")
        found = json.loads(self.run(*words))

        fitting = [
            choice["prediction"]["batch"] / choice["prediction"]["latency_ns"] for choice in found if choice["fits"] == "fits"
        ]
        assert len(fitting) > 2
        assert fitting == sorted(fitting, reverse=True)
        verdicts = [choice["fits"] for choice in found]
        assert verdicts == sorted(verdicts, key=("fits", "may fit", "does not fit").index)
        assert {choice["prediction"]["batch"] for choice in found} == set(forecast.BATCHES)
        for choice in found:
            if choice["fits"] == "fits":
                assert choice["prediction"]["interval_ns"][1] <= 1e6

    def test_a_file_is_planned_without_torch(self, portable):
        program = (
            "import sys\nfrom deploykit import forecast, targets\n"
            f"assert forecast.plan({str(portable('residual').path)!r}, targets.find('orin-nano'), 1e6)\n"
            "assert 'torch' not in sys.modules, 'torch was imported'"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

    def test_smaller_relatives_are_of_the_same_family(self):
        assert list(forecast._smaller("resnet50")) == ["resnet34", "resnet18"]
        assert forecast._smaller("./mine.onnx") == ()

    @pytest.mark.parametrize(("told", "nanoseconds"), [("5ms", 5e6), ("0.5 s", 5e8), ("800us", 8e5)])
    def test_a_budget_is_a_time(self, told, nanoseconds):
        assert forecast.budget_of(told) == nanoseconds

    @pytest.mark.parametrize("told", ["5", "ms", "-1ms", "0ms", "1h", "nan ms"])
    def test_what_is_no_time_is_refused(self, told):
        with pytest.raises(UsageError, match="is not a time"):
            forecast.budget_of(told)


def test_a_roofline_is_drawn_for_a_network_without_products():
    pool = Network("pool", (Layer("p", "pool", ("MaxPool",), 0, 0, 1000, 250),), (), has_qdq=False)

    assert text.roofline(latency.predict(pool, ORIN, "fp16"), ORIN).startswith("<svg")


def test_paddings_are_counted_as_work():
    narrow, wide = (
        latency.predict(Network("n", (replace(simple().layers[0], columns=columns),), (), has_qdq=False), ORIN, "int8")
        for columns in (17, 32)
    )

    assert narrow.layers[0].time_ns > wide.layers[0].time_ns
    assert np.isfinite(narrow.latency_ns)
