"""The judgement over everything that was made: gates that must be able to fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest

from deploykit import build, parity
from deploykit.artifact import Precision, Samples
from deploykit.build import Engine
from deploykit.gate import Verdict
from deploykit.recipe import shipped
from deploykit.verify import _realised_gate


def samples(expected: np.ndarray, reference: np.ndarray) -> Samples:
    return Samples({"image": expected}, {"logits": reference}, {"logits": expected})


class TestTheConversionGate:
    def test_an_engine_that_answers_zeros_fails_however_bad_the_quantization_was(self):
        graph = np.array([[1.0, -2.0, 3.0]], np.float32)
        found = parity.conversion({"logits": np.zeros_like(graph)}, samples(graph, -4 * graph), Precision.INT8)

        assert found.verdict is Verdict.FAIL
        assert found.rule.startswith("SQNR >= 6.0 dB")

    @pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
    def test_nan_against_nan_is_no_equality(self, precision):
        broken = np.full((2, 3), np.nan, np.float32)

        assert parity.conversion({"logits": broken}, samples(broken, broken), precision).verdict is Verdict.FAIL


class TestThePrecisionGate:
    def engine(self, tmp_path: Path, *float_layers: str) -> Engine:
        values = {"w": networks.weights(8, 3, 8, 8), "m": networks.weights(8, 4), "b": networks.weights(4)}
        body = "[conv] c = Conv(image, w)  [flat] f = Flatten(c)  [head] logits = Gemm<alpha = 0.5>(f, m, b)"
        source = networks.by_hand(tmp_path / "source", body, values)
        model = networks.quantized(source, "onnxruntime", tmp_path / "int8", float_layers=float_layers)
        return Engine.of("onnxruntime", model, build.build(model, "onnxruntime", networks.made(tmp_path / "engine")))

    def test_a_layer_that_nobody_chose_to_keep_in_float_fails_it_by_name_and_reason(self, tmp_path):
        found = _realised_gate(self.engine(tmp_path))

        assert found.verdict is Verdict.FAIL
        assert "1 of 2 layers run in int8; in float: head (the int8 kernels know no alpha" in found.reason
        assert "quantize.float_layers" in found.reason

    @pytest.mark.parametrize("pattern", ["head", "h*"])
    def test_a_layer_that_the_recipe_keeps_in_float_does_not(self, tmp_path, pattern):
        found = _realised_gate(self.engine(tmp_path, pattern))

        assert found.verdict is Verdict.PASS
        assert "kept in float: head (the recipe keeps it in float)" in found.reason

    def test_a_layer_kept_in_float_between_int8_ones_is_float_in_the_engine(self, tmp_path):
        values = {"u": networks.weights(8, 3, 3, 3), "v": networks.weights(8, 8, 3, 3), "w": networks.weights(8, 8, 3, 3)}
        values |= {"n": networks.weights(8, 4), "b": networks.weights(4)}
        body = (
            "[first] a = Conv(image, u)  [pool] p = MaxPool<kernel_shape = [2, 2]>(a)  [middle] c = Conv(p, v)  "
            "[last] d = Conv(c, w)  [top] t = GlobalAveragePool(d)  [flat] f = Flatten(t)  [head] logits = Gemm(f, n, b)"
        )
        source = networks.by_hand(tmp_path / "source", body, values)
        model = networks.quantized(source, "onnxruntime", tmp_path / "int8", float_layers=("middle",))
        engine = Engine.of("onnxruntime", model, build.build(model, "onnxruntime", networks.made(tmp_path / "engine")))
        assert engine.realised is not None

        assert {layer.name: layer.precision for layer in engine.realised.layers}["middle"] == "fp32"
        assert _realised_gate(engine).verdict is Verdict.PASS

    def test_a_layer_to_be_kept_in_float_that_runs_in_int8_fails_it(self, tmp_path):
        engine = self.engine(tmp_path, "head")
        assert engine.realised is not None
        layers = tuple(replace(layer, precision="int8") for layer in engine.realised.layers)

        found = _realised_gate(replace(engine, realised=replace(engine.realised, layers=layers)))

        assert found.verdict is Verdict.FAIL
        assert found.reason.endswith("in int8 although they were to stay in float: head")

    def test_a_quantized_layer_that_the_engine_runs_in_float_fails_it(self, tmp_path):
        engine = self.engine(tmp_path, "head")
        assert engine.realised is not None
        layers = tuple(replace(layer, precision="fp32", why="not fused") for layer in engine.realised.layers)

        found = _realised_gate(replace(engine, realised=replace(engine.realised, layers=layers)))

        assert (found.verdict, "conv (not fused)" in found.reason) == (Verdict.FAIL, True)


class TestSmallThings:
    def test_a_recipe_that_comes_with_deploykit_is_found_by_its_bare_name(self):
        found = shipped("lenet_digits")

        assert found is not None
        assert found.name == "lenet_digits.toml"
        assert shipped("../recipes/lenet_digits") is None

    def test_an_error_is_json_too(self, deploykit):
        outcome = deploykit("export", "resnet51", "--to", "onnx", "--json")

        answer = json.loads(outcome.out)
        assert (outcome.code, answer["exit_code"]) == (2, 2)
        assert answer["error"]["what"] == "there is no model 'resnet51'"

    def test_a_network_for_one_image_at_a_time_is_exported_with_a_batch_of_one(self, deploykit, tmp_path):
        (tmp_path / "one.py").write_text(
            "from torch import nn\n"
            "class One(nn.Module):\n"
            "    preprocess = {'crop': 8, 'resize': 8, 'mean': [0.5] * 3, 'std': [0.5] * 3}\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.head = nn.Linear(192, 4)\n"
            "    def forward(self, x):\n"
            "        return self.head(x.reshape(1, 192))\n"
        )

        words = ["--to", "onnxruntime", "--batch", "1", "--processes", "2", "--set", "benchmark.queries=2"]
        outcome = deploykit("export", f"{tmp_path}/one.py:One", *words, "--output", tmp_path / "out", "--json")

        assert outcome.code == 0, outcome.err
        assert [point["batch"] for point in json.loads(outcome.out)["benchmark"]["engines"][0]["offline"]] == [1]

    def test_a_benchmark_imports_nothing_from_the_current_directory(self, deploykit, network, photos, tmp_path, monkeypatch):
        for name in ("statistics", "random", "json"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')\n")
        monkeypatch.chdir(tmp_path)
        words = ["--to", "onnxruntime", "--processes", "2", "--set", "benchmark.queries=2", "--calibrate", photos]

        outcome = deploykit("export", network, *words, "--output", tmp_path / "out")

        assert outcome.code == 0, outcome.err
