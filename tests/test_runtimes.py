"""The registry, ONNX Runtime's engines and what really runs in them, and the reader of ONNX files that needs no onnx."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import build, runtimes
from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError, UsageError
from deploykit.quantize import half
from deploykit.runtimes import Entry, onnx_nodes, onnxruntime

few = settings(deadline=None, max_examples=150)


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def engine(portable, tmp_path_factory) -> Artifact:
    return build.build(portable("lenet5"), "onnxruntime", tmp_path_factory.mktemp("engine"), threads=1)


class TestRegistry:
    def test_a_runtime_whose_package_is_missing_is_a_missing_capability_with_what_to_install(self):
        ended = fresh(
            "import sys; sys.modules['onnxruntime'] = None\n"
            "from deploykit import runtimes\n"
            "from deploykit.errors import CapabilityError\n"
            "try: runtimes.get('onnxruntime')\n"
            "except CapabilityError as error: print(error.exit_code, error)"
        )

        assert ended.stdout.startswith("4 onnxruntime does not load on this machine")
        assert "try: pip install 'deploykit[cpu]'" in ended.stdout

    def test_a_runtime_whose_module_does_not_load_says_why(self, monkeypatch):
        monkeypatch.setitem(runtimes.REGISTRY, "imaginary", Entry("deploykit.runtimes.imaginary", "imaginary", "build it", None))

        assert "No module named 'deploykit.runtimes.imaginary'" in runtimes.why_not("imaginary")

    def test_without_tensorrt_it_says_what_is_missing_and_what_is_needed(self):
        ended = fresh(
            "import sys; sys.modules['tensorrt'] = None\n"
            "from deploykit import runtimes\n"
            "from deploykit.errors import CapabilityError\n"
            "try: runtimes.get('tensorrt')\n"
            "except CapabilityError as error: print(error.exit_code, error)"
        )

        assert ended.stdout.startswith("4 tensorrt does not load on this machine\n  why: TensorRT's Python package does not load")
        assert "try: build it on a machine with an NVIDIA GPU and TensorRT 10.3 or later" in ended.stdout

    def test_a_runtime_that_can_be_used_has_no_reason_against_it(self):
        assert runtimes.why_not("onnxruntime") == ""

    def test_importing_the_registry_loads_no_runtime(self):
        ended = fresh("import deploykit.runtimes, sys; print({'onnxruntime', 'torch', 'onnx'} & set(sys.modules))")

        assert ended.stdout.strip() == "set()"

    def test_onnx_runtimes_telemetry_is_off(self):
        ended = fresh("import deploykit.runtimes.onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])")

        assert ended.stdout.strip() == "1"


class TestAnswers:
    class Counting:
        """A session that answers each image with its own mean, and remembers the batches it was fed."""

        def __init__(self) -> None:
            self.batches: list[int] = []

        def feed(self, inputs):
            self.batches.append(len(inputs["image"]))
            self.answer = inputs["image"].mean((1, 2, 3))[:, None]

        def execute(self):
            pass

        def fetch(self):
            return {"logits": self.answer}

        def close(self):
            pass

    def test_a_short_last_batch_is_padded_to_a_fixed_size_and_its_padding_dropped(self, portable):
        session, images = self.Counting(), networks.images(7)
        source = portable("lenet5").inputs[0]
        fixed = replace(portable("lenet5"), inputs=(replace(source, shape=(3, *source.shape[1:])),))

        found = runtimes.answers(session, fixed, [images[:3], images[3:6], images[6:]])

        assert session.batches == [3, 3, 3]
        assert np.array_equal(found[:, 0], images.mean((1, 2, 3)))

    def test_a_dynamic_batch_is_fed_as_it_comes(self, portable):
        session, images = self.Counting(), networks.images(7)

        runtimes.answers(session, portable("lenet5"), [images[:5], images[5:]])

        assert session.batches == [5, 2]


class TestEngines:
    def test_an_engine_has_the_golden_samples_of_its_model_beside_it(self, engine, portable):
        assert np.array_equal(engine.samples().expected["logits"], portable("lenet5").samples().expected["logits"])

    def test_an_engine_names_the_machine_and_the_version_that_built_it(self, engine):
        assert engine.machine is not None
        assert engine.tools == {"onnxruntime": onnxruntime.onnxruntime.__version__}
        assert engine.settings["intra_op_num_threads"] == 1

    def test_an_engine_is_refused_on_a_cpu_it_was_not_built_for(self, engine):
        foreign = replace(engine, machine=replace(engine.machine, arch="aarch64", cpu="Cortex-A78AE", features=("asimddp",)))

        with pytest.raises(UsageError) as refused:
            onnxruntime.load(foreign)
        assert "built on Cortex-A78AE (asimddp)" in refused.value.why
        assert f"here: {engine.machine.arch} ({', '.join(engine.machine.features)})" in refused.value.why
        assert "build it here" in refused.value.fix

    def test_an_engine_is_refused_by_another_version_of_onnx_runtime(self, engine):
        older = replace(engine, tools={"onnxruntime": "1.2.3"})

        with pytest.raises(UsageError, match=rf"ONNX Runtime 1\.2\.3; here: .* with {onnxruntime.onnxruntime.__version__}"):
            onnxruntime.load(older)

    def test_a_file_that_onnx_runtime_cannot_read_is_refused_by_name(self, engine, tmp_path):
        path = tmp_path / "model.onnx"
        path.write_bytes(b"not a graph")

        with pytest.raises(DeploykitError, match=f"ONNX Runtime refuses {path}"):
            onnxruntime.reference(path)


class TestRealised:
    def test_a_float_engine_runs_its_layers_in_fp32_and_owes_no_reason(self, engine, portable):
        found = onnxruntime.realised(engine, portable("lenet5"))

        assert [layer.name for layer in found.layers] == ["conv1/Conv", "conv2/Conv", "conv3/Conv", "fc1/Gemm", "fc2/Gemm"]
        assert {(layer.precision, layer.why) for layer in found.layers} == {("fp32", "")}
        assert found.int8 == 0
        assert found.kernels["int8"] == found.kernels["boundary"] == {}

    def test_a_half_precision_graph_is_counted_as_fp16(self, portable, tmp_path):
        model = half.to_fp16(portable("lenet5"), networks.made(tmp_path / "model"))

        found = onnxruntime.realised(build.build(model, "onnxruntime", networks.made(tmp_path / "engine")), model)

        assert {layer.precision for layer in found.layers} == {"fp16"}

    def test_int8_layers_are_counted_with_their_kernels(self, portable, tmp_path):
        model = networks.quantized(portable("lenet5"), "onnxruntime", tmp_path / "model")

        found = onnxruntime.realised(build.build(model, "onnxruntime", networks.made(tmp_path / "engine")), model)

        assert found.int8 == 5
        assert [layer.kernel for layer in found.layers] == ["QLinearConv"] * 3 + ["QGemm"] * 2
        assert found.kernels["float"] == {}

    def test_a_quantized_layer_that_stays_float_is_not_counted_and_says_why(self, portable, tmp_path):
        model = networks.quantized(portable("lenet5"), "onnxruntime", tmp_path / "model")
        file = onnx.load(model.path)
        nodes = {node.name: node for node in file.graph.node}
        # Without Q/DQ behind its Relu, the second convolution would have to give a float.
        nodes["MaxPool_1"].input[0] = nodes["Relu_1"].output[0]
        onnx.save(file, model.path)

        found = onnxruntime.realised(build.build(model, "onnxruntime", networks.made(tmp_path / "engine")), model)

        second = found.layers[1]
        assert (second.name, second.precision) == ("conv2/Conv", "fp32")
        assert second.why == "ONNX Runtime did not fuse the Q/DQ around it"
        assert found.int8 == 4
        assert found.kernels["float"]


class TestReadingOnnxWithoutOnnx:
    @pytest.mark.parametrize("name", ["lenet5", "residual", "branches", "attention", "mobile"])
    def test_it_reads_what_onnx_reads(self, portable, name):
        path = portable(name).path

        nodes = onnx_nodes.read_nodes(path)

        wanted = onnx.load(path).graph.node
        assert nodes == [
            onnx_nodes.Node(node.name, node.op_type, node.domain, tuple(node.input), tuple(node.output)) for node in wanted
        ]

    def test_it_reads_the_optimized_graphs_of_onnx_runtime(self, engine):
        names = [(node.name, node.op, node.domain) for node in onnx_nodes.read_nodes(engine.path)]

        assert names == [(node.name, node.op_type, node.domain) for node in onnx.load(engine.path).graph.node]

    @few
    @given(st.binary(max_size=200))
    def test_any_bytes_are_nodes_or_a_usage_error(self, tmp_path_factory, content):
        path = tmp_path_factory.getbasetemp() / "random.onnx"
        path.write_bytes(content)

        with suppress(UsageError):
            onnx_nodes.read_nodes(path)

    @few
    @given(st.data())
    def test_a_file_cut_short_is_refused(self, portable, tmp_path_factory, data):
        content = portable("lenet5").path.read_bytes()
        path = tmp_path_factory.getbasetemp() / "cut.onnx"
        # The graph is the last but one field; behind it only the opset import is left.
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 20))])

        with pytest.raises(UsageError, match="is not an ONNX file"):
            onnx_nodes.read_nodes(path)

    @few
    @given(st.data())
    def test_damage_gives_nodes_or_a_usage_error(self, engine, tmp_path_factory, data):
        content = bytearray(engine.path.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path: Path = tmp_path_factory.getbasetemp() / "damaged.onnx"
        path.write_bytes(content)

        with suppress(UsageError):
            onnx_nodes.read_nodes(path)

    @pytest.mark.timeout(10)  # a megabyte of it takes minutes where numbers have no bound
    @pytest.mark.parametrize("byte", [b"\xff", b"\x80", b"\x00", b"\x08"])
    def test_a_megabyte_of_one_byte_is_refused_at_once(self, tmp_path, byte):
        path = tmp_path / "model.onnx"
        path.write_bytes(byte * (1 << 20))

        with pytest.raises(UsageError, match="is not an ONNX file"):
            onnx_nodes.read_nodes(path)
