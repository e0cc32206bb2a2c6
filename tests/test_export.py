"""What the exported files are: the field's operators and names, nothing of this machine, and PyTorch's own answers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit import export
from deploykit.artifact import Artifact, Format
from deploykit.errors import StageError
from deploykit.recipe import ExportTable
from deploykit.runtimes import get, onnxruntime, run

FORMATS = {"onnx": export.onnx_model, "torchscript": export.torchscript_model}


class Doubled(nn.Module):
    """Answers its input's channel means; subclasses add what cannot be exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(x.mean((2, 3)))

    def late(self, y: torch.Tensor) -> torch.Tensor:
        return y * 2


class DependsOnValues(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return y * 2 if y.sum() > 0 else -y


class AnswersOtherwiseWhenTraced(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return y + 0.01 if torch.compiler.is_exporting() or torch.jit.is_tracing() else y


class Pairs(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return y, y


class Detections(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return {"boxes": y, "scores": y}


class DoublePrecision(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return y.double()


class NotANumber(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return torch.log(y - y - 1)


class ConstantBatch(Doubled):
    def late(self, y: torch.Tensor) -> torch.Tensor:
        return y + torch.zeros(2, 3) if len(y) == 2 else y


class Means(nn.Module):
    """Global pools with and without their dimensions, and a mean over channels, which is not a pool."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True))
        attention = torch.sigmoid(x.mean(1, keepdim=True))
        return (x * gate * attention).mean((-1, -2))


class Reshapes(nn.Module):
    """A reshape that flattens, and one that shuffles channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        grouped = torch.cat([x, x[:, :1]], 1).reshape(batch, 2, 2, height, width)
        shuffled = grouped.transpose(1, 2).reshape(batch, 4, height, width)
        return shuffled[:, :, :2, :2].reshape(batch, 16)


def export_to(folder: Path, kind: str, module: nn.Module | str, **settings: object) -> Artifact:
    return FORMATS[kind](networks.model(module), networks.images(8), None, ExportTable(**settings), folder)


def operators(artifact: Artifact) -> list[str]:
    return [node.op_type for node in onnx.load(artifact.path).graph.node]


@pytest.fixture
def residual(portable) -> Artifact:
    return portable("residual")


class TestTheOnnxFile:
    def test_it_is_opset_19_with_one_input_and_one_output_named_by_what_they_are(self, residual):
        file = onnx.load(residual.path)

        assert [(item.domain, item.version) for item in file.opset_import] == [("", 19)]
        assert [value.name for value in file.graph.input] == ["image"]
        assert [value.name for value in file.graph.output] == ["logits"]

    def test_it_passes_the_checker_with_shapes_inferred(self, residual):
        onnx.checker.check_model(onnx.load(residual.path), full_check=True)

    def test_batch_norm_is_folded_into_the_convolutions(self, residual):
        assert "BatchNormalization" not in operators(residual)

    def test_a_batch_norm_without_a_convolution_before_it_stays(self, tmp_path):
        body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3))

        artifact = networks.exported(networks.Classifier(body, 8), tmp_path)

        assert operators(artifact).count("BatchNormalization") == 1

    def test_nodes_and_their_results_are_named_by_the_pytorch_module(self, residual):
        nodes = onnx.load(residual.path).graph.node

        names = {node.name: node.metadata_props[0].value for node in nodes}
        assert names["body.2.second.0/Conv"] == "body.2.second.0"
        assert names["body.2.skip.0/Conv"] == "body.2.skip.0"
        assert names["body.1/Add"] == "body.1"
        assert names["head/Gemm"] == "head"
        assert all(node.output[0] in (node.name, "logits") for node in nodes)

    def test_a_module_called_twice_gives_two_names(self, portable):
        nodes = onnx.load(portable("twice").path).graph.node

        convolutions = [node.name for node in nodes if node.op_type == "Conv"]
        assert convolutions == ["body.stem.0/Conv", "body.shared/Conv", "body.shared/Conv_1"]

    def test_the_module_path_is_the_only_metadata(self, residual):
        file = onnx.load(residual.path)

        assert not file.metadata_props
        assert not file.graph.metadata_props
        assert not file.doc_string
        assert {prop.key for node in file.graph.node for prop in node.metadata_props} == {"deploykit.module"}
        values = [*file.graph.input, *file.graph.output, *file.graph.value_info, *file.graph.initializer]
        assert not any(value.doc_string or value.metadata_props for value in values)

    def test_it_holds_no_path_of_the_machine_that_wrote_it(self, residual):
        content = residual.path.read_bytes()

        for place in (b"site-packages", b".py", str(Path(torch.__file__).parents[1]).encode(), str(Path.home()).encode() + b"/"):
            assert place not in content

    @pytest.mark.parametrize("name", sorted(networks.NETWORKS))
    def test_every_small_network_answers_like_pytorch_for_any_batch(self, name, portable):
        model = networks.model(name)

        artifact = portable(name)

        session = onnxruntime.reference(artifact.path)
        for batch in (1, 3):
            inputs = networks.images(batch, seed=batch)
            wanted = export.torch_logits(model, inputs)
            # float32 rounds to 6e-8; a dozen layers of sums in another order stay below 1e-5 (bound of export: 1e-4)
            assert np.abs(run(session, {"image": inputs})["logits"] - wanted).max() <= 1e-5 * np.abs(wanted).max()

    def test_the_dynamic_dimension_is_called_batch_wherever_it_stands(self, residual):
        graph = onnx.load(residual.path).graph

        values = [*graph.input, *graph.output, *graph.value_info]
        sizes = {size.dim_param for value in values for size in value.type.tensor_type.shape.dim if size.dim_param}
        assert sizes == {"batch"}


class TestOperators:
    def test_means_over_both_spatial_axes_become_global_average_pools_and_other_means_stay(self, tmp_path):
        found = operators(networks.exported(Means(), tmp_path))

        assert found.count("GlobalAveragePool") == 2
        assert found.count("Flatten") == 1  # behind the pool that dropped its dimensions
        assert found.count("ReduceMean") == 1

    def test_a_mean_over_tokens_is_not_a_pool(self, portable):
        assert "ReduceMean" in operators(portable("attention"))

    def test_a_reshape_becomes_flatten_only_where_it_is_one(self, tmp_path):
        found = operators(networks.exported(Reshapes(), tmp_path))

        assert found.count("Reshape") == 2
        assert found[-1] == "Flatten"

    def test_a_reshape_that_is_no_flatten_is_left_alone_by_tidy(self):
        x = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4, 2, 2]))
        shape = ir.Value(name="shape", const_value=ir.tensor(np.array([-1, 4])))
        node = ir.node("Reshape", [x, shape])
        node.outputs[0].name, node.outputs[0].shape = "logits", ir.Shape(["4*batch", 4])
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[shape], opset_imports={"": 19}, name="g")

        export.tidy(ir.Model(graph, ir_version=10))

        assert [node.op_type for node in graph] == ["Reshape"]


def gelu(order: str, factor: float = 0.5, scalar: bool = True) -> ir.Model:
    """x * (0.5 * (1 + erf(x / sqrt 2))), its products in the order that `order` writes, as a graph of its own."""
    half = "float half = {%s}" if scalar else "float[1] half = {%s}"
    text = f"""<ir_version: 10, opset_import: ["" : 19]> g (float[n] image) => (float[n] logits)
        <float root = {{1.4142135}}, float one = {{1.0}}, {half % factor}> {{
            d = Div(image, root)  e = Erf(d)  a = Add(e, one)  {order} }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def structure(model: ir.Model) -> list[tuple[str, ...]]:
    """Each operator with what makes its inputs; `tidy` gives other names."""
    return [
        (node.op_type, *(value.producer().op_type if value.producer() else value.name for value in node.inputs))
        for node in model.graph
    ]


EXPORTED = "h = Mul(half, a)  logits = Mul(image, h)"


class TestGelu:
    """PyTorch's exporter halves before it multiplies; runtimes look for the product that is halved."""

    @pytest.mark.parametrize("order", [EXPORTED, "h = Mul(a, half)  logits = Mul(h, image)"])
    @pytest.mark.parametrize("scalar", [True, False])
    def test_is_halved_last(self, order, scalar):
        model = gelu(order, scalar=scalar)

        export.tidy(model)

        last = list(model.graph)[-2:]
        assert [node.op_type for node in last] == ["Mul", "Mul"]
        assert {value.name for value in last[0].inputs} == {"image", last[0].inputs[1].name}
        assert last[0].inputs[1].producer().op_type == "Add"
        assert last[1].inputs[0] is last[0].outputs[0]
        assert last[1].inputs[1].const_value.numpy() == 0.5
        assert last[1].outputs[0].name == "logits"

    def test_answers_the_same_to_the_bit(self):
        before, after = gelu(EXPORTED), gelu(EXPORTED)
        numbers = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 3

        export.tidy(after)

        one, other = (
            run(onnxruntime.reference(ir.to_proto(model).SerializeToString()), {"image": numbers}) for model in (before, after)
        )
        assert structure(before) != structure(after)
        assert one["logits"].tobytes() == other["logits"].tobytes()

    @pytest.mark.parametrize(
        "model",
        [
            gelu(EXPORTED, factor=0.25),
            gelu("h = Mul(half, a)  p = Mul(image, h)  logits = Add(p, h)"),  # others read on the way
            gelu("h = Mul(a, a)  logits = Mul(image, h)"),
            gelu("h = Mul(half, a)  logits = Mul(h, h)"),
            gelu("h = Mul(half, a)  logits = Add(image, h)"),
            gelu("logits = Mul(half, a)"),
        ],
    )
    def test_anything_else_stays_as_it_was(self, model):
        before = structure(model)

        export.tidy(model)

        assert structure(model) == before

    def test_of_an_exported_network_is_one_kernel_of_the_engine(self, tmp_path):
        source = networks.exported(
            networks.Classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()), 8), networks.made(tmp_path / "a")
        )

        engine = get("onnxruntime").build(source, networks.made(tmp_path / "b"), threads=1)

        assert operators(source).count("Erf") == 1
        assert {"Gelu", "Erf"} & set(operators(engine)) == {"Gelu"}


class TestPyTorchsAnswers:
    """docs/decisions.md, large pictures: PyTorch answers few of them at once faster than many."""

    @pytest.mark.parametrize(
        ("side", "batch", "seen"),
        [(28, "dynamic", [5]), (300, "dynamic", [2, 2, 1]), (500, "dynamic", [1] * 5), (300, 4, [4, 4])],
    )
    def test_are_those_of_pieces_of_four_pictures_of_224_pixels_or_of_the_fixed_batch(self, side, batch, seen):
        batches: list[int] = []
        module = Doubled()
        module.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
        pictures = np.random.default_rng(0).random((5, 3, side, side), np.float32)

        answers = export.torch_logits(replace(networks.model("lenet5"), module=module), pictures, batch)

        assert batches == seen
        assert answers == pytest.approx(2 * pictures.mean((2, 3)), rel=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
class TestEveryFormat:
    def test_the_golden_samples_hold_what_pytorch_and_the_file_answered(self, kind, tmp_path):
        model = networks.model("lenet5")

        artifact = FORMATS[kind](model, networks.images(8), np.arange(8), ExportTable(), tmp_path)

        samples = artifact.samples()
        assert np.array_equal(samples.inputs["image"], networks.images(8))
        assert np.array_equal(samples.reference["logits"], export.torch_logits(model, networks.images(8)))
        assert np.array_equal(samples.labels, np.arange(8))
        error = np.abs(samples.expected["logits"] - samples.reference["logits"]).max() / np.abs(samples.reference["logits"]).max()
        assert artifact.facts["relative_error"] == pytest.approx(error)
        assert artifact.outputs[0].shape == ("batch", 5)

    def test_a_fixed_batch_is_in_the_file_and_golden_samples_that_do_not_fill_it_are_padded(self, kind, tmp_path):
        artifact = export_to(tmp_path, kind, "lenet5", batch=3)

        assert artifact.inputs[0].shape == (3, 3, 32, 32)
        samples = artifact.samples()
        assert len(samples.expected["logits"]) == 8
        assert samples.expected["logits"] == pytest.approx(samples.reference["logits"], rel=1e-4, abs=1e-6)

    def test_a_dynamic_batch_takes_one_image_and_many(self, kind, tmp_path):
        artifact = export_to(tmp_path, kind, "lenet5")
        session = onnxruntime.reference(artifact.path) if artifact.format is Format.ONNX else get("torchscript").load(artifact)

        one = run(session, {"image": networks.images(1)})["logits"]
        many = run(session, {"image": networks.images(7)})["logits"]

        assert one.shape == (1, 5)
        assert many.shape == (7, 5)

    @pytest.mark.parametrize(
        ("module", "got"),
        [(Pairs(), "2 values"), (Detections(), "dict"), (DoublePrecision(), "a float64 tensor of shape (8, 3)")],
        ids=lambda value: type(value).__name__,
    )
    def test_what_does_not_answer_one_row_of_logits_is_refused(self, kind, module, got, tmp_path):
        with pytest.raises(StageError, match=f"does not answer like a classifier(.|\n)*got {re.escape(got)}"):
            export_to(tmp_path, kind, module)

    def test_a_file_that_answers_otherwise_than_pytorch_is_caught(self, kind, tmp_path):
        with pytest.raises(StageError, match=r"does not answer like PyTorch(.|\n)*on 8 real inputs; export.tolerance is 0.0001"):
            export_to(tmp_path, kind, AnswersOtherwiseWhenTraced())

    def test_the_tolerance_is_the_users(self, kind, tmp_path):
        artifact = export_to(tmp_path, kind, AnswersOtherwiseWhenTraced(), tolerance=0.5)

        assert 1e-4 < artifact.facts["relative_error"] < 0.5

    def test_answers_that_are_not_numbers_are_caught(self, kind, tmp_path):
        with pytest.raises(StageError, match="does not answer like PyTorch"):
            export_to(tmp_path, kind, NotANumber())


class TestWhatCannotBeExported:
    def test_a_forward_that_depends_on_values_is_refused_with_the_reason_and_not_the_exporters_advice(self, tmp_path):
        with pytest.raises(StageError, match=r"DependsOnValues cannot be exported to ONNX\n.*data-dependent") as refused:
            export_to(tmp_path, "onnx", DependsOnValues())

        assert "\x1b" not in str(refused.value)
        assert "step 1/3" not in str(refused.value)

    def test_a_forward_that_depends_on_values_is_warned_of_by_the_tracer_and_caught_by_comparing(self, tmp_path):
        with pytest.raises(StageError, match="forward depends on values"), pytest.warns(torch.jit.TracerWarning):
            export_to(tmp_path, "torchscript", DependsOnValues())

    def test_a_batch_that_becomes_a_constant_is_refused(self, tmp_path):
        with pytest.raises(StageError, match=r"cannot be exported(.|\n)*static shape of 2"):
            export_to(tmp_path, "onnx", ConstantBatch())

    def test_a_network_that_fails_leaves_no_file(self, tmp_path):
        with pytest.raises(StageError):
            export_to(tmp_path, "onnx", DependsOnValues())

        assert not list(tmp_path.iterdir())
