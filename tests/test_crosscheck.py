"""`deploykit parity A B`: what may be a side, what is fed, what is told, and how it ends. Real ONNX Runtime, strangers' files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from deploykit import artifact, build, crosscheck, export, foreign, models, parity
from deploykit.artifact import Artifact, Precision
from deploykit.crosscheck import Said, compare_two, measures, nonfinite, pairing, sides, stress
from deploykit.errors import ModelError, UsageError
from deploykit.gate import Verdict, parse_rule
from deploykit.machine import available_cores, cpu_features
from deploykit.recipe import ExportTable, ModelTable

few = settings(deadline=None, max_examples=50)
SIZE = 8
NO_BUNDLES = Path("not there")
PREPROCESS = ("--preprocess", "crop=32", "--preprocess", "mean=[0.5, 0.5, 0.5]", "--preprocess", "std=[0.25, 0.25, 0.25]")


def published(made: Artifact) -> Artifact:
    """With its manifest, as a finished stage leaves it."""
    return artifact.write_manifest(made.folder, made)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run with everything that answers: FP32 and INT8 graphs, TorchScript, an engine."""
    run = tmp_path_factory.mktemp("run")
    fp32 = published(networks.exported("residual", run / "export-onnx"))
    int8 = published(networks.quantized(fp32, "onnxruntime", networks.made(run / "quantize-onnxruntime")))
    model, inputs = networks.model("residual"), networks.images(8)
    published(export.torchscript_model(model, inputs, None, ExportTable(), networks.made(run / "export-torchscript")))
    published(build.build(int8, "onnxruntime", networks.made(run / "build-onnxruntime-int8"), threads=1))
    return run


@pytest.fixture
def fp32(run_folder) -> str:
    return str(run_folder / "export-onnx")


@pytest.fixture
def int8(run_folder) -> str:
    return str(run_folder / "quantize-onnxruntime")


def stranger(
    path: Path,
    *,
    shape: tuple[object, ...] = ("n", 3, SIZE, SIZE),
    kind: int = TensorProto.FLOAT,
    name: str = "x",
    scale: float = 1.0,
    more: tuple[str, ...] = (),
    fill: float | None = None,
    answers: int = TensorProto.FLOAT,
) -> str:
    """A stranger's classifier of five classes: global average, then a product with constants; `fill` is one of them."""
    weights = (scale * networks.weights(3, 5)).astype(np.float32)
    if fill is not None:
        weights[0, 0] = fill
    last = len(shape) == 4 and shape[3] == 3
    nodes = [
        helper.make_node("Cast", [name], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], "pool", axes=[1, 2] if last else [2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["floats"], "head"),
        helper.make_node("Cast", ["floats"], ["y"], "answer", to=answers),
    ]
    inputs = [helper.make_tensor_value_info(one, kind, shape) for one in (name, *more)]
    outputs = [helper.make_tensor_value_info("y", answers, ("n", 5))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


@pytest.fixture
def theirs(tmp_path) -> str:
    return stranger(tmp_path / "theirs.onnx")


def problems(*words: object, **said: object) -> str:
    with pytest.raises(UsageError) as refused:
        compare_two(*map(str, words), Said(**said))
    return str(refused.value)


def gate(found: dict, rule: str) -> dict:
    (wanted,) = [one for one in found["gates"] if one["rule"].startswith(rule)]
    return wanted


@pytest.fixture(scope="module")
def rows(run_folder) -> list[dict]:
    """What stress finds of an FP32 graph and an INT8 engine."""
    names = [str(run_folder / name) for name in ("export-onnx", "build-onnxruntime-int8")]
    return compare_two(*names, Said(), stressed=True)["stress"]


class TestASideComparedWithItself:
    @pytest.mark.parametrize("name", ["export-onnx", "export-torchscript", "quantize-onnxruntime", "build-onnxruntime-int8"])
    def test_is_identical_in_every_number(self, run_folder, name):
        side = str(run_folder / name)

        found = compare_two(side, side, Said(trust=name == "export-torchscript"))

        (output,) = found["outputs"]
        assert found["exit_code"] == 0
        assert output["identical"]
        assert [output[key] for key in ("max_abs", "mean_abs", "relative", "mean_relative", "sqnr_db")] == [0, 0, 0, 0, None]
        assert [row for row in output["histogram"] if row["count"]] == [{"below": 0.0, "count": 40}]
        assert (found["decisions"]["agreement"], found["decisions"]["disagreement_count"]) == (1, 0)

    def test_is_a_pytorch_network_of_the_user(self, network):
        found = compare_two(network, network, Said(weights="none"))

        assert found["outputs"][0]["identical"]
        assert [side["kind"] for side in found["sides"]] == ["PyTorch, random weights (seed 0)"] * 2


class TestSwappingTheSides:
    def test_leaves_the_symmetric_measures_and_the_verdict(self, fp32, int8):
        one, other = compare_two(fp32, int8, Said()), compare_two(int8, fp32, Said())

        for key in ("max_abs", "mean_abs", "cosine"):
            assert one["outputs"][0][key] == pytest.approx(other["outputs"][0][key], rel=1e-12)
        for key in ("agreement", "top5_agreement", "disagreement_count"):
            assert one["decisions"][key] == other["decisions"][key]
        assert one["exit_code"] == other["exit_code"]

    @few
    @given(arrays.arrays(np.float32, (2, 4, 7), elements=st.floats(-100, 100, width=32)))
    def test_leaves_agreement_whatever_the_logits(self, logits):
        names, labels = ("a", "b", "c", "d"), np.array([0, 1, 2, 3])
        ways = [
            measures.decisions(parity.compare(b, a, names, labels), a, b, labels, str)
            for a, b in (logits, reversed(list(logits)))
        ]

        assert ways[0]["agreement"] == ways[1]["agreement"]
        assert ways[0]["top5_agreement"] == ways[1]["top5_agreement"]
        assert ways[0]["accuracy"]["a"] == ways[1]["accuracy"]["b"]
        assert ways[0]["accuracy"]["drop_points"] == pytest.approx(-ways[1]["accuracy"]["drop_points"])


class TestSides:
    def test_pytorch_torchscript_and_onnx_of_one_network_are_as_near_as_float_rounding(self, network, tmp_path, photos):
        model = models.load(ModelTable(name=network, weights="none"))
        for name, make in (("onnx", export.onnx_model), ("torchscript", export.torchscript_model)):
            published(make(model, networks.images(8), None, ExportTable(), networks.made(tmp_path / name)))

        for other in ("onnx", "torchscript"):
            found = compare_two(network, str(tmp_path / other), Said(weights="none", trust=True), images=photos)
            assert found["exit_code"] == 0, found["gates"]
            assert found["outputs"][0]["relative"] < 1e-5
            assert found["fed"] == {"origin": str(photos), "images": 12, "labelled": False}

    @pytest.mark.parametrize("is_ours", [True, False])
    def test_a_graph_executed_literally_is_another_side_than_the_optimized_one(self, int8, tmp_path, is_ours):
        side = int8 if is_ours else shutil.copy(Path(int8, "model.onnx"), tmp_path / "copy.onnx")

        found = compare_two(str(side), str(side), Said(literal=("A",)))

        assert [side["kind"].rpartition(", ")[2] for side in found["sides"]] == ["executed literally", "optimized"]
        assert found["outputs"][0]["max_abs"] > 0
        assert found["exit_code"] == 0

    def test_int8_may_be_no_further_from_its_own_graph_than_quantization_is_from_fp32(self, run_folder, int8):
        samples = artifact.read_artifact(Path(int8)).samples()
        quantization = parity.tensor_errors(samples.expected["logits"], samples.reference["logits"]).sqnr_db

        found = compare_two(int8, str(run_folder / "build-onnxruntime-int8"), Said(literal=("A",)))

        assert found["limit"]["rule"] == f"SQNR >= {quantization:.1f} dB"
        assert found["exit_code"] == 0

    def test_an_int8_graph_against_fp32_fails_only_where_noise_is_half_the_signal(self, fp32, int8):
        assert compare_two(fp32, int8, Said())["limit"]["rule"] == "SQNR >= 6.0 dB"

    def test_a_run_is_no_side_but_what_is_in_it_is_named(self, run_folder, theirs):
        told = problems(run_folder, theirs)

        assert "A: " in told
        assert "build-onnxruntime-int8, export-onnx, export-torchscript, quantize-onnxruntime" in told

    def test_torchscript_from_elsewhere_is_loaded_only_on_trust(self, run_folder, tmp_path, fp32):
        script = shutil.copy(artifact.read_artifact(run_folder / "export-torchscript").path, tmp_path / "theirs.pt")

        assert "--trust, if you know its maker" in problems(script, fp32)
        assert compare_two(str(script), fp32, Said(trust=True))["exit_code"] == 0

    @pytest.mark.parametrize("name", ["folder", "file"])
    def test_so_is_torchscript_that_a_manifest_calls_ours_because_anybody_can_write_one(self, run_folder, fp32, name):
        folder = run_folder / "export-torchscript"
        script = folder if name == "folder" else artifact.read_artifact(folder).path

        told = problems(fp32, script)

        assert f"B: {script} is TorchScript" in told
        assert "--trust, if you know its maker" in told

    def test_an_engine_of_a_runtime_that_makes_none_is_refused_before_anything_in_it_is_loaded(self, run_folder, fp32, tmp_path):
        folder = shutil.copytree(run_folder / "export-torchscript", tmp_path / "script")
        found = artifact.read_artifact(folder)
        disguised = replace(found, format=artifact.Format.ENGINE, facts={**found.facts, "runtime": "torchscript"})
        artifact.write_manifest(folder, disguised)

        assert "is an engine of no runtime that is known here" in problems(fp32, folder)

    def test_a_checkpoint_is_not_called_torchscript(self, tmp_path, fp32):
        path = tmp_path / "best.pth"
        torch.save({"fc.weight": torch.zeros(2, 2)}, path)

        told = problems(fp32, path)

        assert "there is no program in it: a checkpoint has weights alone" in told
        assert "--weights FILE" in told
        assert "--trust" not in told

    def test_a_file_beside_an_artifact_is_a_strangers(self, run_folder, theirs, tmp_path):
        folder = shutil.copytree(run_folder / "build-onnxruntime-int8", tmp_path / "build")
        beside = shutil.copy(theirs, folder / "theirs.onnx")

        (side, _) = sides.open_sides((str(beside), theirs), Said(), NO_BUNDLES)

        assert (side.is_ours, side.model.path) == (False, beside)

    def test_torchscript_that_is_none_is_one_clear_error(self, tmp_path, fp32):
        script = tmp_path / "theirs.pt"
        script.write_bytes(b"hello")

        assert f"{script} is no TorchScript that can be loaded" in problems(script, fp32, trust=True)

    def test_torchscript_that_is_damaged_is_refused_before_torch_loads_it(self, run_folder, tmp_path, fp32):
        script = shutil.copy(artifact.read_artifact(run_folder / "export-torchscript").path, tmp_path / "theirs.pt")
        networks.flip_a_bit_of_the_largest_member(script)

        with pytest.raises(ModelError, match=r"theirs\.pt(.|\n)*damaged"):
            compare_two(str(script), fp32, Said(trust=True))

    @pytest.mark.parametrize(
        ("said", "told"),
        [
            ({"weights": "none"}, "--weights none: neither side is a PyTorch network"),
            ({"size": 32}, "--size 32: neither side leaves its height and width open"),
            ({"layouts": {"B": "nhwc"}}, "--layout B=nhwc: "),
            ({"preprocess": {"crop": "32"}}, "--preprocess: a side is ours"),
        ],
    )
    def test_what_is_said_and_means_nothing_is_refused(self, fp32, int8, said, told):
        assert told in problems(fp32, int8, **said)

    def test_a_preprocessing_is_refused_where_there_are_no_pictures_and_no_size_is_open(self, theirs, photos, tmp_path):
        how = {"crop": "32", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
        dynamic = stranger(tmp_path / "dynamic.onnx", shape=("n", 3, "h", "w"))
        fixed = stranger(tmp_path / "fixed.onnx", shape=("n", 3, 32, 32))

        assert "--preprocess: there are no pictures (--data DIR)" in problems(fixed, fixed, preprocess=how)
        assert compare_two(dynamic, dynamic, Said(preprocess=how))["exit_code"] == 0
        assert compare_two(fixed, fixed, Said(preprocess=how), images=photos)["exit_code"] == 0

    @pytest.mark.parametrize("name", ["export-onnx", "build-onnxruntime-int8"])
    def test_is_opened_with_as_many_threads_as_it_is_told(self, run_folder, name):
        side, _ = sides.open_sides((str(run_folder / name),) * 2, Said(), NO_BUNDLES)

        assert [side.open(count)._session.get_session_options().intra_op_num_threads for count in (1, 3)] == [1, 3]

    def test_literal_is_for_onnx_graphs_alone(self, fp32, run_folder):
        assert "--literal B: " in problems(fp32, run_folder / "export-torchscript", literal=("B",), trust=True)

    def test_what_does_not_exist_is_said_with_what_does(self, theirs, tmp_path):
        (tmp_path / "networks").mkdir()
        (tmp_path / "networks" / "mine.onnx").touch()

        said = problems(theirs, tmp_path / "networks" / "mime.onnx").splitlines()

        assert said == [f"B: there is no {tmp_path}/networks/mime.onnx", f"  try: {tmp_path}/networks/mine.onnx, which is there"]


class TestStrangersFiles:
    def test_are_fed_generated_inputs_and_that_is_said(self, theirs, tmp_path):
        other = stranger(tmp_path / "other.onnx", name="data")

        found = compare_two(theirs, other, Said())

        assert found["fed"]["origin"] == "generated"
        assert found["fed"]["images"] == 18
        assert "decisions mean nothing" in found["notes"][0]
        assert found["exit_code"] == 0

    def test_of_another_network_fail_with_exit_code_3(self, theirs, tmp_path):
        found = compare_two(theirs, stranger(tmp_path / "other.onnx", scale=1.01), Said())

        assert found["exit_code"] == 3
        assert found["outputs"][0]["relative"] == pytest.approx(0.01, rel=1e-3)
        assert found["outputs"][0]["mean_relative"] == pytest.approx(0.01, rel=1e-3)
        assert gate(found, "y: B answers like A")["verdict"] == "fail"

    def test_pass_within_the_tolerance_that_was_asked_for(self, theirs, tmp_path):
        found = compare_two(theirs, stranger(tmp_path / "other.onnx", scale=1.01), Said(), tolerance=0.02)

        assert (found["exit_code"], found["limit"]["rule"]) == (0, "max|d| / max|A| <= 0.02")

    def test_with_channels_last_are_refused_until_the_user_says_so(self, theirs, tmp_path):
        last = stranger(tmp_path / "last.onnx", shape=("n", SIZE, SIZE, 3))

        told = problems(theirs, last)

        assert f"A takes 'x' as float32 ['n', 3, {SIZE}, {SIZE}] (nchw)" in told
        assert f"B takes 'x' as float32 ['n', {SIZE}, {SIZE}, 3] (nchw)" in told
        assert "try: --layout B=nhwc" in told
        assert compare_two(theirs, last, Said(layouts={"B": "nhwc"}))["exit_code"] == 0
        assert compare_two(last, theirs, Said(layouts={"A": "nhwc"}))["exit_code"] == 0

    def test_of_another_float_type_are_refused_until_the_user_says_so(self, theirs, tmp_path):
        half = stranger(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)

        assert "--cast feeds each side its own floating-point type" in problems(theirs, half)
        assert compare_two(theirs, half, Said(cast=True), tolerance=0.01)["outputs"][0]["max_abs"] > 0

    def test_that_take_integers_are_never_cast_to(self, theirs, tmp_path):
        integers = stranger(tmp_path / "integers.onnx", kind=TensorProto.UINT8)

        assert "types: " in problems(theirs, integers, cast=True)
        assert "cannot be fed" in problems(integers, integers)

    def test_with_an_open_size_take_that_of_the_other_side(self, theirs, tmp_path):
        dynamic = stranger(tmp_path / "dynamic.onnx", shape=("n", 3, "h", "w"))

        assert compare_two(dynamic, theirs, Said())["exit_code"] == 0

    def test_with_an_open_size_on_both_sides_want_one(self, tmp_path):
        dynamic = stranger(tmp_path / "dynamic.onnx", shape=("n", 3, "h", "w"))

        assert "--size PIXELS" in problems(dynamic, dynamic)
        assert compare_two(dynamic, dynamic, Said(size=12))["exit_code"] == 0

    @pytest.mark.parametrize(
        ("shape", "settled"),
        [
            (("n", 3, "h", "w"), ("n", 3, 12, 12)),
            (("n", 3, 8, "w"), ("n", 3, 8, 12)),
            (("n", "h", "w", 3), ("n", 12, 12, 3)),
            (("n", "c", 8, 8), None),
            (("n", "c", "h", "w"), None),
            (("n", "h", "w", "c"), None),
            (("n", 3, "length"), None),
            (("n", "features"), None),
        ],
    )
    def test_have_a_size_filled_in_as_height_and_width_and_nowhere_else(self, shape, settled):
        spec = artifact.TensorSpec("x", "float32", shape)

        if settled is not None:
            assert foreign.settled(spec, 12, "theirs").shape == settled
            return
        with pytest.raises(UsageError, match="at most the batch, the height and the width may be dynamic"):
            foreign.settled(spec, 12, "theirs")

    def test_of_float64_are_fed_it(self, theirs, tmp_path):
        double = stranger(tmp_path / "double.onnx", kind=TensorProto.DOUBLE)

        assert compare_two(double, double, Said())["outputs"][0]["identical"]
        assert compare_two(theirs, double, Said(cast=True))["exit_code"] == 0

    @pytest.mark.parametrize("answers", [TensorProto.BOOL, TensorProto.UINT8])
    def test_whose_answers_are_no_floats_are_compared_in_numbers_and_not_in_decisions(self, tmp_path, deploykit, answers):
        side = stranger(tmp_path / "theirs.onnx", answers=answers)

        found = compare_two(side, side, Said())

        assert (found["exit_code"], found["decisions"], found["outputs"][0]["identical"]) == (0, None, True)
        assert deploykit("parity", side, side).code == 0

    def test_with_a_fixed_batch_are_fed_it_and_what_was_padded_is_dropped(self, theirs, tmp_path):
        fixed = stranger(tmp_path / "fixed.onnx", shape=(4, 3, SIZE, SIZE))

        found = compare_two(theirs, fixed, Said())

        assert found["exit_code"] == 0
        assert found["decisions"]["images"] == 18

    def test_with_several_inputs_are_matched_by_name(self, tmp_path):
        one = stranger(tmp_path / "one.onnx", name="a", more=("b",))
        other = stranger(tmp_path / "other.onnx", name="b", more=("a",))

        found = compare_two(one, other, Said())

        # The first input is another one there, and only that one is used: by position both would answer alike.
        assert found["exit_code"] == 3

    def test_with_several_inputs_of_other_names_are_refused(self, tmp_path):
        one = stranger(tmp_path / "one.onnx", name="a", more=("b",))
        other = stranger(tmp_path / "other.onnx", name="a", more=("c",))

        told = problems(one, other)

        assert "inputs: A has a, b; B has a, c; several are matched by their names alone" in told
        assert "--by-position, if they come in the same order" in told

    def test_with_several_inputs_are_matched_by_position_when_the_user_says_so(self, tmp_path):
        """Both use their first input; by name it would be A's first and B's second."""
        one = stranger(tmp_path / "one.onnx", name="a", more=("b",))
        for names in (("c", "d"), ("b", "a")):
            other = stranger(tmp_path / "other.onnx", name=names[0], more=names[1:])

            found = compare_two(one, other, Said(by_position=True))

            assert (found["exit_code"], found["outputs"][0]["identical"]) == (0, True)

    def test_that_differ_in_number_or_shape_have_no_positions(self, tmp_path, theirs):
        one = stranger(tmp_path / "one.onnx", name="a", more=("b",))
        large = stranger(tmp_path / "large.onnx", name="c", more=("d",), shape=("n", 3, SIZE, 2 * SIZE))

        assert "inputs: A has 2, B has 1, so that no position tells" in problems(one, theirs, by_position=True)
        assert "shapes: " in problems(one, large, by_position=True)
        assert "--by-position: each side has one input and one output" in problems(theirs, theirs, by_position=True)

    def test_are_matched_by_position_on_the_command_line(self, tmp_path, deploykit):
        one = stranger(tmp_path / "one.onnx", name="a", more=("b",))
        other = stranger(tmp_path / "other.onnx", name="c", more=("d",))

        assert deploykit("parity", one, other).code == 2
        assert deploykit("parity", one, other, "--by-position").code == 0

    def test_that_are_no_onnx_are_one_clear_error(self, theirs, tmp_path):
        bad = tmp_path / "bad.onnx"
        for content in (b"", b"hello" * 20, Path(theirs).read_bytes()[:100]):
            bad.write_bytes(content)
            assert f"{bad} is not an ONNX file" in problems(bad, theirs)

    def test_with_data_in_other_files_are_refused(self, theirs, tmp_path):
        path = tmp_path / "external.onnx"
        onnx.save(onnx.load(theirs), path, save_as_external_data=True, location="weights.bin", size_threshold=1)

        assert f"{path} keeps 1 of its constants in other files" in problems(path, theirs)

    def test_are_int8_when_they_quantize_anything_and_half_by_most_of_their_constants(self, int8, tmp_path, theirs):
        copy = shutil.copy(Path(int8, "model.onnx"), tmp_path / "copy.onnx")
        model = onnx.load(theirs)
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.float16), "half"))
        onnx.save(model, tmp_path / "half.onnx")

        found = [foreign.onnx_file(Path(path)).precision for path in (copy, theirs, tmp_path / "half.onnx")]

        assert found == [Precision.INT8, Precision.FP32, Precision.FP16]


class TestPictures:
    def test_want_a_preprocessing_that_somebody_says(self, tmp_path, photos, deploykit):
        side = stranger(tmp_path / "theirs.onnx", shape=("n", 3, 32, 32))

        assert deploykit("parity", side, side, "--data", photos).code == 2
        assert deploykit("parity", side, side, "--data", photos, *PREPROCESS).code == 0

    def test_of_another_size_than_the_sides_take_are_refused(self, theirs, photos, deploykit):
        outcome = deploykit("parity", theirs, theirs, "--data", photos, *PREPROCESS)

        assert outcome.code == 2
        assert "prepared, they are [3, 32, 32], and the sides take x ['batch', 3, 8, 8]" in outcome.err

    def test_with_labels_give_the_accuracy_of_both_and_every_class(self, network, labelled):
        found = compare_two(
            network, network, Said(weights="none"), images=labelled, labelled=True, rules=[parse_rule("drop <= 50 points")]
        )

        accuracy = found["decisions"]["accuracy"]
        assert accuracy["a"] == accuracy["b"]
        assert accuracy["interval_points"][0] == pytest.approx(-accuracy["interval_points"][1])
        assert [(row["class"], row["images"]) for row in found["decisions"]["classes"]] == [
            (x, 3) for x in ("ant", "bee", "cat", "dog")
        ]
        assert sum(3 * row["a"] for row in found["decisions"]["classes"]) == pytest.approx(12 * accuracy["a"])
        assert gate(found, "drop")["verdict"] == "pass"

    def test_that_flip_are_named_the_first_on_the_terminal_and_all_in_the_json(self, tmp_path, photos, deploykit):
        shape = ("n", 3, 32, 32)
        one, other = (stranger(tmp_path / f"{scale}.onnx", shape=shape, scale=scale) for scale in (1, -1))

        words = ("parity", one, other, "--data", photos, *PREPROCESS)
        text, facts = deploykit(*words).out, json.loads(deploykit(*words, "--json").out)

        flips = facts["decisions"]["disagreements"]
        assert len(flips) == facts["decisions"]["disagreement_count"] == 12
        lines = [f"{flip['image']}: {flip['a']} became {flip['b']}" for flip in flips]
        assert [line in text for line in lines] == [True] * 5 + [False] * 7
        assert "and 7 more: --json names them" in text

    def test_with_other_classes_than_there_are_outputs_are_refused(self, fp32, labelled, tmp_path):
        side = stranger(tmp_path / "theirs.onnx", shape=("n", 3, 32, 32))
        said = Said(preprocess={"crop": "32", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"})

        with pytest.raises(UsageError, match="the folder names 4 classes, and there are 5 outputs"):
            compare_two(side, side, said, images=labelled, labelled=True)

    def test_a_rule_that_has_nothing_to_be_judged_on_is_refused_before_anything_runs(self, fp32, photos):
        rules = [parse_rule(text) for text in ("drop <= 1 points", "latency <= 5 ms")]

        with pytest.raises(UsageError) as refused:
            compare_two(fp32, fp32, Said(), images=photos, rules=rules)

        assert refused.value.problems == (
            "'latency <= 5 ms' is about time: deploykit benchmark judges it",
            "'drop <= 1 points' needs labels: --labelled",
        )

    def test_too_few_for_a_rule_end_with_exit_code_5(self, fp32, photos):
        found = compare_two(fp32, fp32, Said(), images=photos, rules=[parse_rule("agreement >= 99 %")])

        assert found["exit_code"] == 5
        assert gate(found, "agreement")["verdict"] == "cannot tell"


class TestWhatIsNotANumber:
    @pytest.mark.parametrize("fill", [np.nan, np.inf])
    def test_fails_and_names_the_layer(self, theirs, tmp_path, fill):
        found = compare_two(theirs, stranger(tmp_path / "broken.onnx", fill=fill), Said())

        told = gate(found, "every answer")
        assert (found["exit_code"], told["verdict"]) == (3, "fail")
        assert told["reason"].startswith("B answers ")
        assert told["reason"].endswith("the first layer with one is head (MatMul)")
        json.dumps(found, allow_nan=False)

    def test_fails_whichever_side_has_it_and_names_the_first_of_its_layers(self, fp32, tmp_path):
        model = onnx.load(Path(fp32, "model.onnx"))
        layers = [node for node in model.graph.node if node.op_type == "Conv"]
        (weights,) = [value for value in model.graph.initializer if value.name == layers[1].input[1]]
        weights.CopyFrom(numpy_helper.from_array(np.full(tuple(weights.dims), np.nan, np.float32), weights.name))
        onnx.save(model, tmp_path / "broken.onnx")

        found = compare_two(str(tmp_path / "broken.onnx"), fp32, Said())

        reason = (
            f"A answers 8 inputs with NaN or infinity, the first is sample 0; the first layer with one is {layers[1].name} (Conv)"
        )
        assert gate(found, "every answer")["reason"] == reason
        assert found["decisions"]["disagreements"][0]["a_margin"] is None
        json.dumps(found, allow_nan=False)

    def test_fails_on_both_sides_alike_and_both_are_named(self, tmp_path):
        broken = stranger(tmp_path / "broken.onnx", fill=np.nan)

        found = compare_two(broken, broken, Said())

        layer = "the first layer with one is head (MatMul)"
        assert found["exit_code"] == 3
        assert gate(found, "every answer")["reason"] == "; ".join(
            f"{side} answers 18 inputs with NaN or infinity, the first is noise 0; {layer}" for side in "AB"
        )

    def test_is_counted_in_all_chunks_of_the_pictures(self, theirs, tmp_path, photos, monkeypatch):
        monkeypatch.setattr(crosscheck, "_CHUNK", 5)
        side = stranger(tmp_path / "fine.onnx", shape=("n", 3, 32, 32))
        broken = stranger(tmp_path / "broken.onnx", shape=("n", 3, 32, 32), fill=np.nan)
        said = Said(preprocess={"crop": "32", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"})

        found = compare_two(side, broken, said, images=photos)

        assert gate(found, "every answer")["reason"].startswith("B answers 12 inputs with NaN or infinity, the first is ")

    def test_is_found_in_a_pytorch_network_by_its_module(self):
        network = networks.model("residual").module
        network.body[1].second[0].weight.data[0] = torch.nan

        assert nonfinite._in_module(network, networks.images(1)) == "the first layer with one is body.1.second.0 (Conv2d)"


class TestStress:
    def test_has_a_row_for_every_kind(self, rows):
        threads = f"1 and {max(2, available_cores())} threads"
        checks = [f"deploykit's own check of a {kind} input" for kind in ("non-contiguous", "mis-typed")]
        own = ["batch 1 against batch 16", "5 runs of the same input", threads, *checks]

        assert [row["kind"] for row in rows if not row["side"]] == ["all zeros", "all ones", "extremes"]
        for side in "AB":
            assert [row["kind"] for row in rows if row["side"] == side] == own

    def test_passes_for_what_answers_alike(self, rows):
        assert {row["verdict"] for row in rows} == {"pass"}

    def test_says_that_wrong_arrays_were_refused(self, rows):
        told = [row["reason"] for row in rows if row["kind"].endswith(("contiguous input", "typed input"))]

        assert len(told) == 4
        assert all(reason.startswith("refused: input 'image'") for reason in told)

    def test_makes_no_gate_of_what_deploykit_refuses_itself_and_still_tells_it(self, theirs, deploykit):
        found = json.loads(deploykit("parity", theirs, theirs, "--stress", "--json").out)

        assert [row["side"] for row in found["stress"] if row["is_own_check"]] == ["A", "A", "B", "B"]
        assert not [one["rule"] for one in found["gates"] if "own check" in one["rule"]]
        assert "own check of a mis-typed input for B: refused: " in " ".join(
            deploykit("parity", theirs, theirs, "--stress").out.split()
        )

    def test_says_where_a_kind_means_nothing(self, tmp_path):
        fixed = stranger(tmp_path / "fixed.onnx", shape=(2, 3, SIZE, SIZE))

        found = compare_two(fixed, fixed, Said(), stressed=True)

        row = next(row for row in found["stress"] if row["kind"].startswith("batch 1"))
        assert (row["verdict"], row["reason"]) == (None, "means nothing: its batch is fixed at 2")
        assert not [one["rule"] for one in found["gates"] if "batch 1" in one["rule"]]

    def test_names_the_layer_of_an_input_that_makes_nan_and_of_the_same_nan_each_time(self, theirs, tmp_path):
        model = onnx.load(theirs)
        (answer,) = (node for node in model.graph.node if node.name == "answer")
        answer.input[0] = "roots"
        model.graph.node.insert(3, helper.make_node("Sqrt", ["floats"], ["roots"], "root"))
        onnx.save(model, tmp_path / "roots.onnx")

        found = compare_two(theirs, str(tmp_path / "roots.onnx"), Said(), stressed=True)

        blamed = "; B answers 1 inputs with NaN or infinity, the first is all ones 0; the first layer with one is root (Sqrt)"
        assert next(row["reason"] for row in found["stress"] if row["kind"] == "all ones").endswith(blamed)
        (again,) = (row for row in found["stress"] if row["kind"].startswith("5 runs") and row["side"] == "B")
        assert again["verdict"] == "fail"
        assert again["reason"].endswith("; the first layer with one is root (Sqrt)")

    def test_fails_a_side_that_mis_reads_what_it_is_fed_and_ends_with_exit_code_3(self, theirs, monkeypatch):
        class Misreading:
            """Takes memory as it lies."""

            def feed(self, inputs):
                (array,) = inputs.values()
                self.fed = np.frombuffer(array.tobytes()[: array.size * 4], np.float32)

            def execute(self):
                pass

            def fetch(self):
                return {"y": self.fed.reshape(-1, 3 * SIZE * SIZE)[:, :5].copy()}

            def close(self):
                pass

        opened = sides.open_sides((theirs, theirs), Said(), NO_BUNDLES)
        misread = tuple(replace(side, open=lambda threads: Misreading()) for side in opened)
        monkeypatch.setattr(crosscheck, "open_sides", lambda *_words, **_options: misread)

        found = compare_two(theirs, theirs, Said(), stressed=True)

        failed = [(one["rule"], one["reason"]) for one in found["gates"] if one["verdict"] == "fail"]
        kinds = ("non-contiguous", "mis-typed")
        own = {f"{side}: deploykit's own check of a {kind} input" for side in "AB" for kind in kinds}
        assert ("B: deploykit's own check of a mis-typed input", "mis-read, and answered") in failed
        assert {rule for rule, _ in failed} <= own
        assert found["exit_code"] == 3

    def test_fails_a_side_whose_answers_change_from_run_to_run(self, theirs):
        side, _ = sides.open_sides((theirs, theirs), Said(), NO_BUNDLES)
        pairs = pairing.pair(side, side, cast=False)
        opened = side.open(1)

        class Drifting:
            """Each answer is one more than the last."""

            feed, execute, runs = opened.feed, opened.execute, 0

            def fetch(self):
                self.runs += 1
                return {name: value + self.runs for name, value in opened.fetch().items()}

        assert stress._again(side, Drifting(), pairs, [foreign.noise(pairs.specs[0], 4)]).verdict is Verdict.FAIL


class TestMeasures:
    @few
    @given(arrays.arrays(np.float32, (2, 5, 3), elements=st.floats(-1e6, 1e6, width=32)))
    def test_a_histogram_counts_every_value_once(self, pair):
        rows = measures.histogram(*pair)

        assert sum(row["count"] for row in rows) == pair[0].size
        assert rows[0]["count"] == int((pair[0] == pair[1]).sum())

    @pytest.mark.parametrize(("share", "below"), [(0.0, 0.0), (5e-4, 1e-3), (0.05, 0.1), (2.0, None)])
    def test_a_difference_is_counted_in_its_decade_of_the_largest_answer(self, share, below):
        wanted = np.array([[2.0, 1.0]], np.float32)

        rows = measures.histogram(wanted + np.array([[0, 2 * share]], np.float32), wanted)

        assert sum(row["count"] for row in rows if row["below"] == below) == (2 if share == 0 else 1)

    def test_the_limit_is_that_of_the_less_precise_side(self):
        limits = [
            measures.limit_for(Precision.FP32, other, tolerance=None, quantization_db=None).relative
            for other in (Precision.FP32, Precision.FP16, Precision.BF16)
        ]

        assert limits == [parity.FLOAT_LIMIT[one] for one in (Precision.FP32, Precision.FP16, Precision.BF16)]

    def test_five_first_classes_agree_in_any_order_and_are_not_told_of_fewer_classes(self):
        logits = np.arange(7, dtype=np.float32)[None]
        swapped = logits[:, [0, 1, 2, 3, 4, 6, 5]]

        found = [
            measures.decisions(parity.compare(b, a, ("x",), None), a, b, None, str)["top5_agreement"]
            for a, b in ((logits, swapped), (logits, -logits), (logits[:, :5], logits[:, :5]))
        ]

        assert found == [1.0, 0.0, None]


class TestTheCommandLine:
    def test_names_the_cpu_features_that_it_ran_on(self, theirs, deploykit):
        text = deploykit("parity", theirs, theirs).out
        facts = json.loads(deploykit("parity", theirs, theirs, "--json").out)

        assert f"({', '.join(cpu_features())})" in text
        assert tuple(facts["machine"]["features"]) == cpu_features()

    def test_tells_sides_errors_histogram_and_gates(self, fp32, int8, deploykit):
        outcome = deploykit("parity", fp32, int8, "--stress")

        assert outcome.code == 0
        for told in (
            "fp32",
            "int8",
            "max|d| / max|A|",
            "SQNR dB",
            "differences of logits: ",
            "every answer is a number",
            "extremes",
        ):
            assert told in outcome.out

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (("A.onnx",), "parity compares two things, and 1 is named"),
            (("A.onnx", "B.onnx", "C.onnx"), "parity compares two things, and 3 are named"),
            (("A.onnx", "B.onnx", "--isa", "haswell"), "2 things are named; emulated CPUs are compared on one graph"),
            (("A.onnx", "--isa", "haswell", "--stress"), "--stress is for parity A B"),
            (("A.onnx", "--isa", "haswell", "--tolerance", "0"), "--tolerance is for parity A B"),
            (("A.onnx", "B.onnx", "--arm-root", "x"), "--arm-root is for --isa"),
            (("A.onnx", "B.onnx", "--layout", "C=nhwc"), "--layout names a side, A or B, and nchw or nhwc"),
            (("A.onnx", "B.onnx", "--preprocess", "crop"), "--preprocess 'crop' is not of the form KEY=VALUE"),
            (("A.onnx", "B.onnx", "--gate", "much <= 3"), "these are no gate rules"),
            (("A.onnx", "B.onnx", "--labelled"), "there is no A.onnx"),
        ],
    )
    def test_says_what_is_wrong_with_its_words(self, deploykit, words, told):
        outcome = deploykit("parity", *words)

        assert outcome.code == 2
        assert told in outcome.err

    def test_says_that_nothing_is_relative_to_answers_that_are_all_zero_and_not_that_they_are_not_finite(
        self, tmp_path, deploykit
    ):
        zeros = stranger(tmp_path / "zeros.onnx", scale=0)

        outcome = deploykit("parity", zeros, zeros)

        assert outcome.code == 0
        assert "not finite" not in outcome.out
        assert "none" in outcome.out.partition("SQNR dB")[2].partition("differences")[0]

    def test_writes_its_gates_for_continuous_integration(self, theirs, tmp_path, deploykit):
        outcome = deploykit("parity", theirs, theirs, "--junit", tmp_path / "gates.xml")

        assert outcome.code == 0
        assert "every answer is a number" in (tmp_path / "gates.xml").read_text()


class TestBenchmarkingAStrangersFile:
    QUICK = ("--processes", 1, "--queries", 2, "--warmup", 0, "--offline-seconds", 0)

    def test_builds_it_and_names_it_by_its_file(self, theirs, tmp_path, deploykit):
        outcome = deploykit("benchmark", theirs, *self.QUICK, "--output", tmp_path / "base.json", "--json")

        found = json.loads(outcome.out)
        assert [engine["label"] for engine in found["engines"]] == ["theirs.onnx"]
        about = json.loads((tmp_path / "base.json").read_text())["settings"]["engines"]["theirs.onnx"]
        assert about["model"] == f"sha256 {artifact.digest_file(Path(theirs))}"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "theirs.onnx"]

    def test_refuses_the_baseline_of_another_file_of_that_name(self, theirs, tmp_path, deploykit):
        base = tmp_path / "base.json"
        deploykit("benchmark", theirs, *self.QUICK, "--output", base)
        stranger(Path(theirs), scale=2)

        outcome = deploykit("benchmark", theirs, *self.QUICK, "--baseline", base)

        assert outcome.code == 2

    def test_wants_a_size_where_the_file_leaves_it_open(self, tmp_path, deploykit):
        dynamic = stranger(tmp_path / "dynamic.onnx", shape=("n", 3, "h", "w"))

        assert "--size PIXELS" in deploykit("benchmark", dynamic, *self.QUICK).err
        assert deploykit("benchmark", dynamic, *self.QUICK, "--size", 16).code == 0
