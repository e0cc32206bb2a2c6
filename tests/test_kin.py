"""What `deploykit parity A B` says beyond numbers: a stale engine, layers left in float, classes in another order;
and a bundle as a side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from test_bundle import tiny_run

from deploykit import artifact, build, bundled, parity, timing
from deploykit.artifact import Artifact, read_artifact
from deploykit.bundle import pack
from deploykit.crosscheck import Said, compare_two, kin
from deploykit.errors import DeploykitError, UsageError
from deploykit.gate import Verdict

ORIGIN, INT8_GATE, CLASSES = "B was", "B: every layer meant for int8", "B's classes are"


def sealed(made: Artifact) -> Artifact:
    return artifact.write_manifest(made.folder, made)


def changed(source: Path, folder: Path, how: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of an artifact with another graph in it; its golden samples stay."""
    shutil.copytree(source, folder)
    found = read_artifact(folder)
    model = onnx.load(found.path)
    how(model)
    onnx.save(model, found.path)
    sealed(found)
    return folder


def head(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The stored weights and bias of the last layer."""
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    return [value for value in model.graph.initializer if value.name in gemm.input]


def scaled(model: onnx.ModelProto) -> None:
    for value in head(model):
        value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * np.float32(1.01), value.name))


def swapped(model: onnx.ModelProto) -> None:
    for value in head(model):
        rows = numpy_helper.to_array(value)
        value.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows[[0, 3, 2, 1, 4]]), value.name))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fp32 = sealed(networks.exported("residual", folder / "export-onnx"))
    int8 = sealed(networks.quantized(fp32, "onnxruntime", networks.made(folder / "quantize-onnxruntime")))
    for name, model in (("fp32", fp32), ("int8", int8)):
        sealed(build.build(model, "onnxruntime", networks.made(folder / f"build-onnxruntime-{name}"), threads=1))
    return folder


@pytest.fixture(scope="module")
def trained_on(run, tmp_path_factory) -> Path:
    """The network after one more step of training, as a file that says nothing about where it is from."""
    place = tmp_path_factory.mktemp("later")
    return changed(run / "export-onnx", place / "graph", scaled) / "model.onnx"


def gates(a: Path, b: Path, **said: object) -> dict[str, dict]:
    return {gate["rule"]: gate for gate in compare_two(str(a), str(b), Said(), **said)["gates"]}


def gate(found: dict[str, dict], start: str) -> dict:
    (wanted,) = [gate for rule, gate in found.items() if rule.startswith(start)]
    return wanted


class TestAnEngine:
    @pytest.mark.parametrize("name", ["build-onnxruntime-fp32", "build-onnxruntime-int8", "quantize-onnxruntime"])
    def test_of_this_network_says_so(self, run, name):
        assert gate(gates(run / "export-onnx", run / name), ORIGIN)["verdict"] == "pass"

    @pytest.mark.parametrize("name", ["build-onnxruntime-fp32", "build-onnxruntime-int8", "quantize-onnxruntime"])
    def test_of_a_network_that_was_trained_on_is_stale_in_whatever_precision(self, run, tmp_path, trained_on, name):
        path = Path(shutil.copy(trained_on, tmp_path / "new.onnx"))

        found = gate(gates(path, run / name), ORIGIN)

        assert found["verdict"] == "fail"
        assert found["reason"].startswith("stale, or another network: A answers otherwise than what B was made from")

    def test_is_stale_when_its_graph_was_quantized_again_with_answers_that_are_near(self, run, tmp_path):
        def nudged(model: onnx.ModelProto) -> None:
            model.doc_string = "another file"

        again = changed(run / "quantize-onnxruntime", tmp_path / "again", nudged)

        found = gates(again, run / "build-onnxruntime-int8")

        assert gate(found, "logits")["verdict"] == "pass"
        assert gate(found, "B was built from A")["verdict"] == "fail"
        assert "stale: it was built from SHA-256" in gate(found, ORIGIN)["reason"]
        assert gate(gates(run / "quantize-onnxruntime", run / "build-onnxruntime-int8"), ORIGIN)["verdict"] == "pass"

    def test_is_not_asked_where_it_is_from_when_the_user_says_how_far_apart_the_two_may_be(self, run, tmp_path, trained_on):
        path = Path(shutil.copy(trained_on, tmp_path / "new.onnx"))

        assert not [rule for rule in gates(path, run / "build-onnxruntime-fp32", tolerance=0.5) if rule.startswith(ORIGIN)]

    def test_whose_layers_run_in_int8_says_so_and_names_those_that_do_not(self, run, tmp_path):
        def lost(model: onnx.ModelProto) -> None:
            node = [node for node in model.graph.node if node.op_type == "Conv"][-1]
            dequantizer = next(other for other in model.graph.node if node.input[1] in other.output)
            shape = next(value.dims for value in model.graph.initializer if value.name == dequantizer.input[0])
            model.graph.initializer.append(numpy_helper.from_array(networks.weights(*shape), "in float"))
            node.input[1] = "in float"
            lost.name = node.name  # type: ignore[attr-defined]

        place = tmp_path / "run"
        graph = changed(run / "quantize-onnxruntime", place / "quantize-onnxruntime", lost)
        engine = sealed(build.build(read_artifact(graph), "onnxruntime", networks.made(place / "build"), threads=1))

        good = gate(gates(run / "export-onnx", run / "build-onnxruntime-int8"), INT8_GATE)
        bad = gate(gates(run / "export-onnx", engine.folder), INT8_GATE)

        assert (good["verdict"], bad["verdict"]) == ("pass", "fail")
        assert f"in float: {lost.name}" in bad["reason"]  # type: ignore[attr-defined]

    def test_without_its_graph_is_not_judged_by_its_layers_and_that_is_said(self, run, tmp_path):
        alone = shutil.copytree(run / "build-onnxruntime-int8", tmp_path / "alone")

        found = compare_two(str(run / "export-onnx"), str(alone), Said())

        assert not [gate for gate in found["gates"] if gate["rule"].startswith(INT8_GATE)]
        assert "which layers of B were meant for int8 is not known: its graph is not beside it" in found["notes"]


class TestAnOpset:
    @staticmethod
    def softmax(path: Path, number: int, operator: str = "Softmax") -> str:
        body = f"y = {operator}(image) z = GlobalAveragePool(y) logits = Flatten(z)"
        text = f'<ir_version: 7, opset_import: ["" : {number}]> g (float[n, 3, 8, 8] image) => (float[n, 3] logits) {{ {body} }}'
        onnx.save(onnx.parser.parse_model(text), path)
        return str(path)

    def test_in_which_an_operator_means_something_else_is_named_where_answers_are_apart(self, tmp_path):
        sides = [self.softmax(tmp_path / f"{number}.onnx", number) for number in (12, 13)]

        found = gate(gates(*map(Path, sides)), "logits")

        assert found["verdict"] == "fail"
        assert found["reason"].endswith("A is of opset 12 and B of opset 13, in which the same operator may mean something else")

    def test_that_does_not_know_an_operator_is_named_beside_what_the_runtime_says(self, tmp_path):
        path = self.softmax(tmp_path / "old.onnx", 11, "HardSwish")

        with pytest.raises(DeploykitError, match=r"(?s)HardSwish.*the file says that it is of opset 11"):
            compare_two(path, path, Said())


class TestClasses:
    def test_in_one_order_pass_in_every_precision(self, run):
        assert gate(gates(run / "export-onnx", run / "build-onnxruntime-int8"), CLASSES)["verdict"] == "pass"

    def test_whose_outputs_were_swapped_are_named(self, run, tmp_path):
        found = gate(gates(run / "export-onnx", changed(run / "export-onnx", tmp_path / "b", swapped)), CLASSES)

        assert found["verdict"] == "fail"
        assert found["reason"] == ("2 classes in another order: what B answers as b is A's d, what B answers as d is A's b")

    def test_whose_names_were_sorted_otherwise_are_named(self, run, tmp_path):
        copy = shutil.copytree(run / "build-onnxruntime-int8", tmp_path / "copy")
        sealed(replace(read_artifact(copy), classes=("a", "c", "b", "d", "e")))

        found = gate(gates(run / "export-onnx", copy), CLASSES)

        assert found["verdict"] == "fail"
        assert "class 1 is b in A and c in B" in found["reason"]

    @pytest.mark.parametrize("seed", range(20))
    def test_are_moved_by_no_noise(self, run, seed):
        random = np.random.default_rng(seed)
        answers = random.standard_normal((8, 50))
        near = [1 + 0.02 * answers[:, :1] + 0.001 * answers, answers]  # all of them nearly alike, and all different

        for a in near:
            noisy = a + random.standard_normal(a.shape) * a.std() * 0.5
            (side, *_) = (kin_side(),)
            assert kin.classes((side, side), a, noisy).verdict is Verdict.PASS

    def test_of_too_few_images_are_not_judged(self):
        side = kin_side()
        assert kin.classes((side, side), np.eye(4), np.eye(4)[:, ::-1]) is None

    def test_of_too_few_images_are_said_not_to_be_judged(self, run, photos, tmp_path):
        few = networks.made(tmp_path / "few")
        for path in sorted(photos.iterdir())[:3]:
            shutil.copyfile(path, few / path.name)

        found = compare_two(str(run / "export-onnx"), str(run / "build-onnxruntime-int8"), Said(), images=few)

        assert CLASSES not in [one["rule"] for one in found["gates"]]
        assert any("was not judged: there are only 3 images, and it takes 8" in note for note in found["notes"])

    def test_that_are_equal_for_all_images_are_in_every_order(self):
        side = kin_side()
        assert kin.classes((side, side), np.ones((9, 4)), np.ones((9, 4))).verdict is Verdict.PASS


def kin_side() -> object:
    """All that is read of a side without names."""

    class Nameless:
        classes = ()

    return Nameless()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    return pack.pack(tiny_run(place / "run"), place / "tiny.bundle", release=1).path


class TestABundle:
    @pytest.mark.parametrize("word", ["{}", "{}:onnxruntime-fp32"])
    def test_is_a_side_of_parity_as_the_engine_that_this_machine_builds_of_it(self, packed, word):
        found = compare_two(str(packed.parent / "run" / "export-onnx"), word.format(packed), Said())

        assert found["exit_code"] == 0
        assert found["sides"][1]["kind"] == "engine of onnxruntime, of a bundle"
        assert found["outputs"][0]["identical"]

    def test_of_another_network_fails_and_is_called_stale(self, packed, tmp_path):
        other = tiny_run(tmp_path / "other", op="Mul")

        found = compare_two(str(other / "export-onnx"), str(packed), Said())

        assert found["exit_code"] == 3
        assert "stale, or another network" in json.dumps(found["gates"])

    def test_is_measured_under_its_own_name(self, packed, tmp_path):
        ((label, engine),) = timing.engines_at([packed], tmp_path).items()

        assert label == "tiny.bundle"
        assert engine.facts["runtime"] == "onnxruntime"

    def test_has_graphs_with_names_and_no_others(self, packed, tmp_path):
        with pytest.raises(UsageError, match=r"(?s)has no graph 'tensorrt-int8'.*it has onnxruntime-fp32"):
            bundled.engine(packed, "tensorrt-int8", tmp_path)

    def test_that_was_changed_is_refused_before_anything_is_built(self, packed, tmp_path):
        content = bytearray(packed.read_bytes())
        content[len(content) // 2] ^= 1
        bad = tmp_path / "bad.bundle"
        bad.write_bytes(content)

        with pytest.raises(UsageError):
            bundled.engine(bad, None, tmp_path)
        assert not list(tmp_path.glob("engine/*"))

    def test_is_told_from_a_network_with_a_colon_in_its_name(self, packed):
        assert bundled.named(f"{packed}:onnxruntime-fp32") == (packed, "onnxruntime-fp32")
        assert bundled.named("mynet.py:build") is None
        assert bundled.named("resnet18") is None

    def test_answers_like_its_graph_to_its_golden_samples(self, packed, tmp_path):
        model, engine = bundled.engine(packed, None, tmp_path)

        assert engine.parents == (model.sha256,)
        assert parity.FLOAT_LIMIT[engine.precision] == 1e-4
