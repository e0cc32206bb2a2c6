"""The judgement over everything that was made: gates that must be able to fail."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest

from deploykit import build, data, export, parity, runtimes
from deploykit import verify as judgement
from deploykit.artifact import Artifact, Precision, Samples
from deploykit.build import Engine, realised_gate
from deploykit.data import Images
from deploykit.gate import Verdict, parse_rule
from deploykit.recipe import ExportTable, shipped
from deploykit.runtimes import SLOW, onnxruntime
from deploykit.verify import _blame, graph_answers, judge_graph, verify


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
        found = realised_gate(self.engine(tmp_path))

        assert found.verdict is Verdict.FAIL
        assert "1 of 2 layers run in int8; in float: head (the int8 kernels know no alpha" in found.reason
        assert "quantize.float_layers" in found.reason

    @pytest.mark.parametrize("pattern", ["head", "h*"])
    def test_a_layer_that_the_recipe_keeps_in_float_does_not(self, tmp_path, pattern):
        found = realised_gate(self.engine(tmp_path, pattern))

        assert found.verdict is Verdict.PASS
        assert found.reason == "1 of 2 layers run in int8; kept in float, as the recipe asks: head"

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
        assert realised_gate(engine).verdict is Verdict.PASS

    def test_a_layer_to_be_kept_in_float_that_runs_in_int8_fails_it(self, tmp_path):
        engine = self.engine(tmp_path, "head")
        assert engine.realised is not None
        layers = tuple(replace(layer, precision="int8") for layer in engine.realised.layers)

        found = realised_gate(replace(engine, realised=replace(engine.realised, layers=layers)))

        assert found.verdict is Verdict.FAIL
        assert found.reason.endswith("in int8 although they were to stay in float: head")

    def test_a_quantized_layer_that_the_engine_runs_in_float_fails_it(self, tmp_path):
        engine = self.engine(tmp_path, "head")
        assert engine.realised is not None
        layers = tuple(replace(layer, precision="fp32", why="not fused") for layer in engine.realised.layers)

        found = realised_gate(replace(engine, realised=replace(engine.realised, layers=layers)))

        assert (found.verdict, "conv (not fused)" in found.reason) == (Verdict.FAIL, True)

    def test_layers_kept_in_float_are_named_by_reason_five_of_each(self, tmp_path):
        engine = self.engine(tmp_path, "head")
        whys = {f"slow{number}": SLOW for number in range(7)} | {"head": "as the recipe asks"}
        whys |= {name: f"too sensitive: {name} dB" for name in ("one", "two")}
        facts = {**engine.model.facts, "kept_float": list(whys), "float_layers": whys}

        found = realised_gate(replace(engine, model=replace(engine.model, facts=facts)))

        assert found.verdict is Verdict.PASS
        assert found.reason.split("; ")[1:] == [
            f"kept in float, {SLOW}: slow0, slow1, slow2, slow3, slow4 and 2 more",
            "kept in float, as the recipe asks: head",
            "kept in float, too sensitive: one (one dB), two (two dB)",
        ]


class TestTheBlame:
    def int8(self, portable, search: Mapping[str, Any] | None) -> Artifact:
        return replace(
            portable("lenet5"), facts={} if search is None else {"search": search, "float_layers": {"b": "too sensitive"}}
        )

    def test_names_the_three_worst_that_are_still_in_int8_with_what_each_costs_alone(self, portable):
        search = {
            "kept": [{"layer": "b"}],
            "spared": ["y"],
            "errors": {"activations": {"x": 1e-2, "y": 1.0, "z": 1e-4}, "weights": {"a": 1e-1, "b": 1.0, "c": 1e-3}},
        }

        said = _blame(self.int8(portable, search))

        assert said.startswith("; 1 sensitive layer in float already, most of what noise is left comes from the weights of a (")
        assert said.endswith(
            "the weights of a (10.0 dB alone), the activation x (20.0 dB alone), the weights of c (30.0 dB alone)"
        )

    @pytest.mark.parametrize("search", [None, {}, {"kept": [], "spared": [], "errors": None}])
    def test_is_nothing_where_nothing_was_measured(self, portable, search):
        assert _blame(self.int8(portable, search)) == ""


@pytest.fixture(scope="module")
def pictures(photos) -> Images:
    return data.folder(photos, labelled=False)


@pytest.fixture(scope="module", params=["dynamic", 5])
def source(request, portable, tmp_path_factory) -> Artifact:
    """LeNet-5 for a batch of any size, and of a fixed one that the pictures do not fill."""
    if request.param == "dynamic":
        return portable("lenet5")
    return networks.exported("lenet5", tmp_path_factory.mktemp("fixed"), batch=request.param)


class TestAGraphThatHasNoEngineYet:
    def test_answers_all_images_whatever_batch_it_takes_and_counts_them(self, source, pictures, portable):
        seen: list[tuple[str, int, int]] = []
        wanted = next(pictures.batches(source.preprocess, 12))

        found = graph_answers(onnxruntime.reference(source.path), source, pictures, progress=lambda *step: seen.append(step))

        everything = runtimes.run(onnxruntime.reference(portable("lenet5").path), {"image": wanted})["logits"]
        assert found == pytest.approx(everything, rel=1e-5, abs=1e-6)
        assert seen[-1] == ("gate", 12, 12)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt"])
    def test_is_judged_by_its_decisions_on_the_images(self, source, pictures, runtime, tmp_path):
        candidate = networks.quantized(source, runtime, tmp_path)
        answers = graph_answers(onnxruntime.reference(source.path), source, pictures)

        def verdict(reference: np.ndarray, *rules: str) -> Verdict:
            return judge_graph(candidate, runtime, reference, pictures, [parse_rule(rule) for rule in rules])

        assert verdict(answers, "disagreements <= 12") is Verdict.PASS
        assert verdict(-answers, "disagreements <= 0") is Verdict.FAIL
        assert verdict(-answers, "disagreements <= 12", "disagreements <= 11") is Verdict.FAIL
        assert verdict(answers, "agreement >= 99 %") is Verdict.CANNOT_TELL  # twelve images are too few
        assert verdict(answers) is Verdict.PASS


class TestWhatIsComputed:
    @pytest.fixture
    def asked(self, monkeypatch) -> list[tuple[str, int]]:
        """Who was asked, and for how many pictures."""
        seen: list[tuple[str, int]] = []
        for module, name, position in ((export, "torch_logits", 1), (onnxruntime.OnnxSession, "feed", 1)):
            real = getattr(module, name)

            def spy(*given: Any, real: Any = real, name: str = name, position: int = position) -> Any:
                batch = given[position]
                seen.append((name, len(batch) if isinstance(batch, np.ndarray) else len(next(iter(batch.values())))))
                return real(*given)

            monkeypatch.setattr(module, name, spy)
        return seen

    def test_golden_samples_that_are_all_the_pictures_are_not_computed_again(self, pictures, asked, tmp_path, monkeypatch):
        model = networks.model("lenet5")
        made = export.onnx_model(
            model, next(pictures.batches(model.preprocess, 12)), None, ExportTable(), networks.made(tmp_path / "x")
        )
        asked.clear()
        monkeypatch.setattr(onnxruntime, "reference", lambda path: pytest.fail(f"{path} was opened to ask it nothing"))

        found = verify(model, pictures, [made], [], [])

        assert asked == []
        assert found["parity"][0]["disagreements"] == []

    def test_of_more_pictures_the_others_are(self, pictures, asked, tmp_path, monkeypatch):
        monkeypatch.setattr(judgement, "_BATCH", 4)
        model = networks.model("lenet5")
        first = next(pictures.batches(model.preprocess, 4))
        made = export.onnx_model(model, first, None, ExportTable(), networks.made(tmp_path / "x"))
        asked.clear()

        verify(model, pictures, [made], [], [])

        assert asked == [("torch_logits", 4), ("torch_logits", 4), ("feed", 4), ("feed", 4)]

    def test_other_pictures_are(self, pictures, asked, tmp_path):
        model = networks.model("lenet5")
        made = export.onnx_model(model, networks.images(12), None, ExportTable(), networks.made(tmp_path / "x"))
        asked.clear()

        verify(model, pictures, [made], [], [])

        assert asked == [("torch_logits", 12), ("feed", 12)]

    def test_an_engine_answers_for_itself(self, pictures, asked, tmp_path):
        model = networks.model("lenet5")
        made = export.onnx_model(
            model, next(pictures.batches(model.preprocess, 12)), None, ExportTable(), networks.made(tmp_path / "x")
        )
        engine = Engine.of("onnxruntime", made, build.build(made, "onnxruntime", networks.made(tmp_path / "engine")))
        asked.clear()

        verify(model, pictures, [made], [engine], [])

        assert asked == [("feed", 12), ("feed", 12)]  # on the pictures, and on the golden samples


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
