"""What is said of a file or folder, of every kind and of none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper

from deploykit import artifact
from deploykit.artifact import Artifact, Format, Precision, Preprocess, TensorSpec
from deploykit.errors import RecipeError, UsageError
from deploykit.inspect import as_text, inspect

RUN = {
    "name": "lenet_digits",
    "verdict": "pass",
    "exit_code": 0,
    "headline": ["2 of 540 images decided otherwise"],
    "model": {"name": "lenet5"},
    "gates": [],
    "report": "runs/lenet_digits/report.html",
    "command": "deploykit run recipes/lenet_digits.toml",
    "stages": [{"name": "finetune", "status": "done", "summary": "best accuracy 98.1 %"}],
    "machine": {"arch": "x86_64"},
}


def run(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "result.json").write_bytes(content)
    return folder


@pytest.fixture
def graph(tmp_path) -> Path:
    """A graph with one quantized activation and a weight of six values."""
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "weight")
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    zero = numpy_helper.from_array(np.uint8(128), "zero")
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["h"]),
        helper.make_node("QuantizeLinear", ["h", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])]
    quantized = [helper.make_tensor_value_info("q", TensorProto.UINT8, ["batch", 3])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [weight, scale, zero], value_info=quantized)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


class TestKinds:
    def test_an_artifact_is_checked_and_told_with_all_it_knows(self, tmp_path):
        def fill(folder: Path) -> Artifact:
            (folder / "model.onnx").write_bytes(b"graph")
            spec = (TensorSpec("x", "float32", ("batch", 2)),)
            how = Preprocess(None, (8, 8), (0.5,), (0.5,), "L")
            kinds = (Format.ONNX, Precision.INT8, spec, spec, how, ("cat", "dog"))
            return Artifact(folder / "model.onnx", "quantize-tensorrt", "", *kinds, "", (), {}, {}, {})

        made = artifact.make(tmp_path / "quantize-tensorrt", "key", fill)

        found = inspect(made.folder)

        assert found["kind"] == "artifact of stage quantize-tensorrt, every file as published"
        assert (found["format"], found["precision"], found["sha256"]) == ("onnx", "int8", made.sha256)
        made.path.write_bytes(b"other")
        with pytest.raises(UsageError, match=r"model\.onnx is not the file that was published"):
            inspect(made.folder)

    def test_a_run_is_told_in_short(self, tmp_path):
        found = inspect(run(tmp_path / "run", json.dumps(RUN).encode()))

        assert (found["kind"], found["verdict"]) == ("run", "pass")
        assert found["stages"] == {"finetune": "done, best accuracy 98.1 %"}
        assert "machine" not in found

    def test_a_graph_is_told_with_its_ends_its_operators_and_its_quantized_types(self, graph):
        found = inspect(graph)

        assert found["kind"] == "ONNX graph"
        assert found["bytes"] == graph.stat().st_size
        assert found["opset"] == {"": 19}
        assert found["inputs"] == {"x": "FLOAT [batch,2]"}
        assert found["constants"] == {"values": 8, "FLOAT": 2, "UINT8": 1}
        assert found["operators"] == {"MatMul": 1, "QuantizeLinear": 1, "DequantizeLinear": 1}
        assert found["quantize_linear"] == {"UINT8": 1}

    @pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
    def test_a_checkpoint_is_told_with_its_tensors(self, tmp_path, name):
        weights = {"head.weight": torch.zeros(3, 2), "head.bias": torch.zeros(3, dtype=torch.float16)}
        save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
        save(weights, tmp_path / name)

        found = inspect(tmp_path / name)

        assert (found["kind"], found["parameters"]) == ("checkpoint", 9)
        assert found["tensors"] == {"head.weight": "float32 [3, 2]", "head.bias": "float16 [3]"}

    def test_a_recipe_is_told_with_its_defaults(self, tmp_path):
        (tmp_path / "net.toml").write_text('name = "run"\n[model]\nname = "lenet5"\n')

        found = inspect(tmp_path / "net.toml")

        assert (found["kind"], found["name"], found["export"]["opset"]) == ("recipe", "run", 19)

    def test_everything_told_is_plain_json(self, graph):
        assert json.loads(json.dumps(inspect(graph))) == inspect(graph)


class TestRefusing:
    def test_code_is_not_run_to_be_looked_at(self, tmp_path):
        (tmp_path / "my net.py").write_text("raise SystemExit")

        with pytest.raises(UsageError, match="it is Python code") as refused:
            inspect(tmp_path / "my net.py")

        assert f"deploykit export '{tmp_path}/my net.py':FACTORY --to onnx" in str(refused.value)

    def test_nothing_is_nothing(self, tmp_path):
        with pytest.raises(UsageError, match=f"there is no {tmp_path / 'nothing'}"):
            inspect(tmp_path / "nothing")

    def test_a_folder_that_is_nothing_of_ours_says_what_it_lacks(self, tmp_path):
        with pytest.raises(
            UsageError, match=r"is a folder, but neither an artifact \(manifest\.json\) nor a run \(result\.json\)"
        ):
            inspect(tmp_path)

    @pytest.mark.parametrize(
        "content", [b"", b"garbage" * 100, b"\x00" * 100, b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n"]
    )
    def test_a_file_that_only_is_called_onnx_is_refused(self, tmp_path, content):
        (tmp_path / "net.onnx").write_bytes(content)

        with pytest.raises(UsageError, match=r"net\.onnx is not an ONNX file that can be read\n  why: "):
            inspect(tmp_path / "net.onnx")

    def test_a_graph_that_is_cut_short_is_refused(self, graph):
        graph.write_bytes(graph.read_bytes()[:-10])

        with pytest.raises(UsageError, match=r"net\.onnx is not an ONNX file"):
            inspect(graph)

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"stages": 5}', json.dumps({**RUN, "stages": [{}]}).encode()]
    )
    def test_a_result_that_is_damaged_is_refused(self, tmp_path, content):
        with pytest.raises(UsageError, match=r"result\.json is damaged\n  why: "):
            inspect(run(tmp_path / "run", content))

    @pytest.mark.parametrize("name", ["net.pth", "net.bin", "picture.png"])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"garbage" * 100)

        with pytest.raises(UsageError, match=name):
            inspect(tmp_path / name)

    def test_a_recipe_with_problems_lists_them(self, tmp_path):
        (tmp_path / "net.toml").write_text('name = "run"\n')

        with pytest.raises(RecipeError, match="'model' is missing"):
            inspect(tmp_path / "net.toml")

    def test_a_path_that_cannot_be_is_refused(self):
        with pytest.raises(UsageError, match=r"cannot read xxx(.|\n)*why: file name too long"):
            inspect(Path("x" * 5000))


class TestText:
    def test_facts_are_lines_with_nested_ones_indented(self):
        facts = {"kind": "run", "gates": [], "opset": {"": 19}, "shape": [1, 3], "layers": [{"name": "conv"}], "none": {}}

        assert as_text(facts) == (
            "kind: run\ngates: none\nopset:\n  : 19\nshape: 1, 3\nlayers:\n  0:\n    name: conv\nnone: none\n"
        )

    def test_every_fact_of_a_graph_has_a_line(self, graph):
        lines = as_text(inspect(graph)).splitlines()

        assert lines[0] == "kind: ONNX graph"
        assert "inputs:" in lines
        assert "  x: FLOAT [batch,2]" in lines
        assert "  MatMul: 1" in lines
