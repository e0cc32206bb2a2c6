"""OpenVINO's engines: what they are, what really runs in them, where they are refused, and that nothing is sent to anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import build, parity, pipeline, workspace
from deploykit import recipe as recipes
from deploykit.artifact import Artifact, read_artifact
from deploykit.benchmark.report import about
from deploykit.errors import DeploykitError, UsageError
from deploykit.gate import Verdict
from deploykit.runtimes import openvino, run

few = settings(deadline=None, max_examples=20)
LENET = ["conv1/Conv", "conv2/Conv", "conv3/Conv", "fc1/Gemm", "fc2/Gemm"]


def fresh(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**environment, "HOME": str(home)}, capture_output=True, text=True, check=False)


def built(model: Artifact, folder: Path) -> Artifact:
    return build.build(model, "openvino", networks.made(folder), threads=1)


@pytest.fixture(scope="module")
def engine(portable, tmp_path_factory) -> Artifact:
    return built(portable("lenet5"), tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def int8(portable, tmp_path_factory) -> Callable[..., Artifact]:
    """A small network, quantized by the rules of OpenVINO."""
    return cache(lambda name, **options: networks.quantized(portable(name), "openvino", tmp_path_factory.mktemp(name), **options))


class TestImporting:
    def test_openvino_sends_and_keeps_no_usage_data(self, tmp_path):
        ended = fresh("import deploykit.runtimes.openvino, sys; print('openvino_telemetry' in sys.modules)", tmp_path)

        assert ended.stdout.strip() == "False", ended.stderr
        assert list(tmp_path.iterdir()) == []  # its telemetry begins with the number of a client in ~/intel

    def test_what_a_program_does_with_openvinos_telemetry_itself_is_left_alone(self, tmp_path):
        ended = fresh("import deploykit.runtimes.openvino, openvino_telemetry; print(openvino_telemetry.Telemetry)", tmp_path)

        assert "openvino_telemetry.main.Telemetry" in ended.stdout, ended.stderr

    def test_without_openvino_it_says_what_to_install(self, tmp_path):
        ended = fresh(
            "import sys; sys.modules['openvino'] = None\n"
            "from deploykit import runtimes\n"
            "from deploykit.errors import CapabilityError\n"
            "try: runtimes.get('openvino')\n"
            "except CapabilityError as error: print(error.exit_code, error)",
            tmp_path,
        )

        assert ended.stdout.startswith("4 openvino does not load on this machine")
        assert "try: pip install 'deploykit[openvino]'" in ended.stdout


class TestEngines:
    def test_an_engine_says_what_built_it_and_with_which_properties(self, engine):
        assert engine.machine is not None
        assert engine.tools == {"openvino": openvino.openvino.__version__}
        assert engine.settings["INFERENCE_NUM_THREADS"] == 1

    def test_its_threads_are_known_so_that_a_baseline_with_other_threads_is_another(self, engine):
        more = replace(engine, settings={**engine.settings, "INFERENCE_NUM_THREADS": 2})

        assert [about(one)["threads"] for one in (engine, more)] == [1, 2]

    @pytest.mark.parametrize(("key", "value"), [("INFERENCE_PRECISION_HINT", "f32"), ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "0")])
    def test_nothing_is_computed_coarser_than_the_graph_says(self, engine, key, value):
        compiled = openvino.openvino.Core().import_model(engine.path.read_bytes(), "CPU", dict(engine.settings))

        found = compiled.get_property(key)

        assert (found.get_type_name() if hasattr(found, "get_type_name") else str(found)) == value

    def test_an_engine_is_refused_on_a_cpu_it_was_not_built_for(self, engine):
        foreign = replace(engine, machine=replace(engine.machine, arch="aarch64", cpu="Cortex-A78AE", features=("asimddp",)))

        with pytest.raises(UsageError) as refused:
            openvino.load(foreign)
        assert "built on Cortex-A78AE (asimddp)" in refused.value.why
        assert f"here: {engine.machine.arch} ({', '.join(engine.machine.features)})" in refused.value.why
        assert "build it here" in refused.value.fix

    def test_an_engine_is_refused_by_another_version_of_openvino(self, engine):
        older = replace(engine, tools={"openvino": "2025.0.0"})

        with pytest.raises(UsageError, match=rf"OpenVINO 2025\.0\.0; here: .* with {openvino.openvino.__version__}"):
            openvino.load(older)

    @few
    @given(st.data())
    def test_a_file_cut_short_is_refused_by_name(self, engine, tmp_path_factory, data):
        content = engine.path.read_bytes()
        path = networks.made(tmp_path_factory.getbasetemp() / "cut") / "engine.blob"
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])

        with pytest.raises(DeploykitError, match=f"OpenVINO refuses {path}"):
            openvino.load(replace(engine, path=path))

    def test_an_operator_that_openvino_does_not_know_is_named(self, portable, tmp_path):
        file = onnx.load(portable("lenet5").path)
        next(node for node in file.graph.node if node.op_type == "Relu").op_type = "Ruler"
        onnx.save(file, tmp_path / "model.onnx")

        with pytest.raises(DeploykitError, match=rf"OpenVINO refuses {tmp_path}/model\.onnx(.|\n)*Ruler") as refused:
            openvino.build(replace(portable("lenet5"), path=tmp_path / "model.onnx"), tmp_path, threads=1)
        assert "Exception from" not in refused.value.why

    def test_tensors_in_other_files_are_refused_by_name(self, portable, tmp_path, monkeypatch):
        file = onnx.load(portable("lenet5").path)
        onnx.save(file, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
        monkeypatch.chdir(tmp_path)  # where OpenVINO would find them

        with pytest.raises(UsageError, match=r"has tensors in other files(.|\n)*conv1\.weight"):
            openvino.build(replace(portable("lenet5"), path=tmp_path / "model.onnx"), tmp_path, threads=1)

    def test_a_fixed_batch_needs_no_other_file(self, tmp_path):
        model = networks.exported("lenet5", tmp_path / "model", batch=3)
        session = openvino.load(built(model, tmp_path / "engine"))

        answer = run(session, {"image": networks.images(3)})["logits"]

        assert not (tmp_path / "engine" / "model.onnx").exists()
        assert answer.shape == (3, 5)
        with pytest.raises(UsageError, match=r"has shape \[2, 3, 32, 32\], the model takes \[3, 3, 32, 32\]"):
            session.feed({"image": networks.images(2)})

    def test_more_batch_sizes_than_stay_compiled_may_follow_and_come_back(self, engine):
        session, images = openvino.load(engine), networks.images(7)
        sizes = (1, 2, 3, 4, 5, 6, 7, 1, 2, 7)

        answers = [run(session, {"image": images[:size]})["logits"] for size in sizes]

        for answer, size in zip(answers, sizes, strict=True):
            assert answer == pytest.approx(answers[6][:size], rel=1e-4, abs=1e-5)


class TestWhatReallyRuns:
    def test_a_float_engine_runs_its_layers_in_fp32_and_owes_no_reason(self, engine, portable):
        found = openvino.realised(engine, portable("lenet5"))

        assert [layer.name for layer in found.layers] == LENET
        assert {(layer.precision, layer.why) for layer in found.layers} == {("fp32", "")}
        assert "fused" not in {layer.kernel for layer in found.layers}
        assert found.kernels["int8"] == found.kernels["boundary"] == {}

    @pytest.mark.parametrize("layer", ["qkv/MatMul", "head/Gemm"])
    def test_a_kernel_that_is_called_after_the_bias_or_after_the_networks_output_is_found(self, portable, layer, tmp_path):
        found = openvino.realised(built(portable("attention"), tmp_path), portable("attention"))

        assert {item.name: item.kernel for item in found.layers}[layer].startswith("FullyConnected")

    @pytest.mark.parametrize("name", ["lenet5", "residual", "mobile", "branches", "matmul_head", "attention"])
    def test_every_layer_of_an_int8_graph_runs_in_int8(self, int8, name, tmp_path):
        model = int8(name)

        found = openvino.realised(built(model, tmp_path), model)

        assert {layer.name: layer.precision for layer in found.layers} == dict.fromkeys(model.facts["int8_layers"], "int8")
        assert found.int8 == len(found.layers)

    # The two last layers of LeNet are compiled into one kernel, whose type is that of the first.
    @pytest.mark.parametrize("kept", ["conv2/Conv", "fc1/Gemm", "fc2/Gemm"])
    def test_a_layer_kept_in_float_is_float_and_its_neighbours_are_not(self, int8, kept, tmp_path):
        model = int8("lenet5", float_layers=(kept,))

        found = openvino.realised(built(model, tmp_path), model)

        wanted = {name: "fp32" if name == kept else "int8" for name in LENET}
        assert {layer.name: layer.precision for layer in found.layers} == wanted
        assert {layer.why for layer in found.layers if layer.name == kept} == {"as the recipe asks"}

    def test_a_quantized_layer_that_stays_float_is_not_counted_and_says_why(self, int8, tmp_path):
        model = replace(int8("lenet5"), path=tmp_path / "model.onnx")
        file = onnx.load(int8("lenet5").path)
        nodes = {node.name: node for node in file.graph.node}
        nodes["conv2/Conv"].input[0] = nodes["MaxPool"].output[0]
        nodes["MaxPool"].input[0] = nodes["Relu"].output[0]  # where no rounding has been yet
        onnx.save(file, model.path)

        found = openvino.realised(openvino.build(model, networks.made(tmp_path / "engine"), threads=1), model)

        assert (found.layers[1].precision, found.layers[1].why) == ("fp32", "OpenVINO did not fuse the Q/DQ around it")
        assert found.int8 == 4

    @pytest.mark.parametrize("name", ["lenet5", "mobile"])
    def test_a_loaded_engine_runs_the_kernels_that_were_written_down_when_it_was_built(self, int8, name, tmp_path):
        engine = built(int8(name), tmp_path)
        compiled = openvino.openvino.Core().import_model(engine.path.read_bytes(), "CPU", dict(engine.settings))

        running = [[kernel.kind, kernel.primitive, kernel.takes] for kernel in openvino.kernels(compiled)]

        written = json.loads((tmp_path / "kernels.json").read_text())
        assert running == [[kernel[key] for key in ("kind", "primitive", "takes")] for kernel in written]

    def test_what_turns_numbers_into_integers_and_back_stands_between_the_two(self, int8, tmp_path):
        model = int8("lenet5", float_layers=("conv2/Conv",))

        found = openvino.realised(built(model, tmp_path), model).kernels

        assert found["float"]["Convolution"] == 1
        assert found["int8"]["Convolution"] == 2
        assert found["boundary"]


@pytest.mark.parametrize("name", ["lenet5", "residual", "mobile", "branches", "attention"])
@pytest.mark.parametrize("size", [1, 8])
def test_an_int8_engine_is_nearer_to_its_graph_than_quantization_is_to_pytorch(int8, name, size, tmp_path):
    model = int8(name)
    engine = built(model, tmp_path)
    session, golden = openvino.load(engine), engine.samples()

    pieces = np.split(golden.inputs["image"], 8 // size)
    answer = np.concatenate([run(session, {"image": piece})["logits"] for piece in pieces])

    found = parity.conversion({"logits": answer}, golden, model.precision)
    assert found.verdict is Verdict.PASS, found


@pytest.fixture(scope="module")
def both(tmp_path_factory, network, photos) -> Mapping[str, Any]:
    """The result of a run of the tiny network for ONNX Runtime and OpenVINO."""
    content = {
        "name": "tiny",
        "model": {"name": network},
        "data": {"calibrate": str(photos)},
        "quantize": {},
        "build": {"runtimes": ["onnxruntime", "openvino"]},
        "benchmark": {"processes": 2, "queries": 3, "offline_seconds": 0.0},
    }
    return pipeline.run(recipes.parse(content, base=Path("/"), source="a test"), tmp_path_factory.mktemp("run") / "out")


class TestAWholeRun:
    def test_both_runtimes_build_answer_and_run_in_what_was_asked_for(self, both):
        assert both["exit_code"] == 0, both["gates"]
        assert [engine["label"] for engine in both["engines"] if engine["built"]] == [
            f"{runtime} {precision}" for precision in ("fp32", "int8") for runtime in ("onnxruntime", "openvino")
        ]
        rules = {gate["rule"] for gate in both["gates"]}
        assert "openvino int8: every layer meant for int8 runs in it" in rules

    def test_all_engines_are_measured_in_fresh_processes(self, both):
        measured = {engine["label"] for engine in both["benchmark"]["engines"]}

        assert measured == {"onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino int8"}

    def test_its_folders_belong_to_the_run(self, both):
        folder = Path(both["out"])
        assert read_artifact(folder / "build-openvino-int8").facts["runtime"] == "openvino"

        removed = workspace.clean(folder, everything=True)

        assert removed == [folder]


@pytest.mark.parametrize(("runtime", "giver"), [("openvino", "Conv"), ("onnxruntime", "DequantizeLinear")])
def test_a_result_that_nothing_reads_as_integers_is_quantized_only_for_kernels_that_cannot_give_floats(
    portable, tmp_path, runtime, giver
):
    graph = onnx.load(networks.quantized(portable("mobile"), runtime, tmp_path).path).graph

    read = next(node.input[0] for node in graph.node if node.op_type == "HardSigmoid")

    assert next(node.op_type for node in graph.node if read in node.output) == giver


def test_half_precision_is_refused(network, tmp_path, deploykit):
    outcome = deploykit("export", network, "--to", "tensorrt", "--to", "openvino", "--fp16", "--output", tmp_path / "out")

    assert outcome.code == 2
    assert (
        'build.float_type = "fp16" (--fp16) with build.runtimes "openvino", which has fp32: its engines here compute in float32'
        in outcome.err
    )
