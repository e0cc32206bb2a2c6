"""What an export may take and become: other sizes, bytes, weights beside the graph, LRN; and what is refused first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from deploykit import export, runtimes
from deploykit.artifact import Artifact, Preprocess
from deploykit.data import preprocess
from deploykit.data.pictures import normalised
from deploykit.errors import CapabilityError, StageError, UsageError
from deploykit.export import files, memory
from deploykit.models import Model
from deploykit.recipe import ExportTable
from deploykit.runtimes import get, onnxruntime

BYTES = ("uint8 NHWC", "uint8 NCHW")
HOW = Preprocess(None, (32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(artifact.path).graph


def operators(artifact: Artifact) -> list[str]:
    return [node.op_type for node in graph_of(artifact).node]


def sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


class Fixed(nn.Module):
    """A head over all positions, which fixes how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3, stride=4), nn.Linear(2 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).flatten(1))


class OverRows(nn.Module):
    """The formula of LocalResponseNorm, over rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = functional.avg_pool2d(functional.pad(x * x, (0, 0, 2, 2)), (5, 1), stride=1)
        return x / (0.5 * mean + 1) ** 0.75


class OverFive(nn.Module):
    """LocalResponseNorm's own steps, with a new axis in front of the channels (1) or behind them (2), padded with any value."""

    def __init__(self, axis: int, value: float) -> None:
        super().__init__()
        self.axis, self.value = axis, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = functional.pad((x * x).unsqueeze(self.axis), (0, 0, 0, 0, 2, 2), value=self.value)
        mean = functional.avg_pool3d(padded, (5, 1, 1), stride=1).squeeze(self.axis)
        return x / (0.5 * mean + 1) ** 0.75


class BakesItsSize(nn.Module):
    """Takes any size in PyTorch, and divides by the size that it was traced at."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x.shape[2] if not torch.jit.is_tracing() else int(x.shape[2])
        return x.sum((2, 3)) / side


@pytest.mark.parametrize("exporter", ["new", "legacy"])
class TestAnySize:
    @pytest.mark.parametrize("name", ["residual", "mobile", "branches", "fully_convolutional"])
    def test_of_a_network_that_pools_globally_is_open_in_the_file_and_true(self, exporter, name, tmp_path):
        made = networks.exported(name, tmp_path, size="dynamic", exporter=exporter)

        wanted = ["batch", 3, "height", "width"]
        assert list(made.inputs[0].shape) == wanted == sizes(graph_of(made).input[0])
        inputs = networks.images(3, 48)[:, :, :, :40].copy()
        answer = runtimes.run(onnxruntime.reference(made.path), {"image": inputs})["logits"]
        reference = export.torch_logits(networks.model(name), inputs)
        assert np.abs(answer - reference).max() <= 1e-5 * np.abs(reference).max()

    def test_is_refused_where_a_head_fixes_it_with_pytorchs_own_reason(self, exporter, tmp_path):
        with pytest.raises(
            StageError, match=r"Fixed has one input size only\n(.|\n)*shapes cannot be multiplied(.|\n)*\"fixed\""
        ):
            networks.exported(Fixed(), tmp_path, size="dynamic", exporter=exporter)


def test_a_file_that_keeps_the_size_it_was_traced_at_is_caught_at_another(tmp_path):
    with pytest.raises(StageError, match="at another height and width"):
        networks.exported(BakesItsSize(), tmp_path, size="dynamic", exporter="legacy")


def test_torchscript_takes_other_sizes_too_and_is_checked_at_one(tmp_path):
    made = export.torchscript_model(networks.model("residual"), networks.images(4), None, ExportTable(size="dynamic"), tmp_path)

    session = get("torchscript").load(made)
    inputs = networks.images(2, 64)
    wanted = export.torch_logits(networks.model("residual"), inputs)
    assert runtimes.run(session, {"image": inputs})["logits"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def a_network_for_bytes() -> Model:
    return replace(networks.model("residual"), preprocess=HOW)


def pictures(count: int = 6) -> list[Image.Image]:
    generator = np.random.default_rng(3)
    return [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def fed(layout: str) -> np.ndarray:
    return np.stack([preprocess(picture, replace(HOW, feeds=layout)) for picture in pictures()])


def floats() -> np.ndarray:
    return np.stack([preprocess(picture, HOW) for picture in pictures()])


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    """Layout -> a network whose file takes bytes, each exported once."""
    return {
        layout: export.onnx_model(
            a_network_for_bytes(), fed(layout), None, ExportTable(input=layout), tmp_path_factory.mktemp(layout.replace(" ", "-"))
        )
        for layout in BYTES
    }


@pytest.mark.parametrize("layout", BYTES)
class TestBytesIn:
    def test_a_picture_is_prepared_as_bytes_in_that_layout(self, layout):
        pixels = fed(layout)

        assert pixels.dtype == np.uint8
        assert pixels.shape == ((6, 32, 32, 3) if layout == "uint8 NHWC" else (6, 3, 32, 32))
        assert pixels.flags.c_contiguous
        assert normalised(pixels, replace(HOW, feeds=layout)).tobytes() == floats().tobytes()

    def test_the_file_takes_them_under_the_same_name_and_says_so(self, layout, of_bytes):
        made = of_bytes[layout]

        (source,) = graph_of(made).input
        assert (source.name, source.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
        assert list(made.inputs[0].shape) == sizes(source)
        assert made.inputs[0].dtype == "uint8"
        assert made.preprocess.feeds == layout

    @pytest.mark.parametrize("optimise", [False, True])
    def test_the_graph_normalises_to_the_very_bits_of_our_preprocessing(self, layout, of_bytes, optimise, tmp_path):
        model = ir.load(of_bytes[layout].path)
        first = next(node for node in model.graph if node.op_type == "Conv")
        model.graph.outputs.append(first.inputs[0])
        ir.save(model, tmp_path / "model.onnx")
        # All values of a byte in every channel.
        every = np.tile(np.arange(1024, dtype=np.uint8).reshape(1, 1, 32, 32), (1, 3, 1, 1))
        every = np.ascontiguousarray(every.transpose(0, 2, 3, 1)) if layout == "uint8 NHWC" else every

        session = onnxruntime.reference(tmp_path / "model.onnx", optimise=optimise)
        found = runtimes.run(session, {"image": every})[first.inputs[0].name]

        assert found.tobytes() == normalised(every, replace(HOW, feeds=layout)).tobytes()

    def test_answers_are_those_of_the_file_that_takes_floats(self, layout, of_bytes, tmp_path):
        plain = export.onnx_model(a_network_for_bytes(), floats(), None, ExportTable(), tmp_path)

        answer = runtimes.run(onnxruntime.reference(of_bytes[layout].path), {"image": fed(layout)})["logits"]

        wanted = runtimes.run(onnxruntime.reference(plain.path), {"image": floats()})["logits"]
        assert answer.tobytes() == wanted.tobytes()

    def test_golden_samples_hold_the_bytes(self, layout, of_bytes):
        samples = of_bytes[layout].samples()

        assert samples.inputs["image"].dtype == np.uint8
        assert samples.reference["logits"] == pytest.approx(samples.expected["logits"], rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
    def test_int8_is_calibrated_on_them_and_begins_behind_the_normalisation(self, layout, of_bytes, runtime, tmp_path):
        observed = networks.calibrated(of_bytes[layout], tmp_path / "calibrate", fed(layout))
        from deploykit import quantize
        from deploykit.recipe import QuantizeTable

        made = quantize.quantize(
            of_bytes[layout], observed, QuantizeTable(), runtime, networks.made(tmp_path / "int8"), images=lambda: fed(layout)
        )

        nodes = list(graph_of(made).node)
        kinds = [node.op_type for node in nodes]
        assert kinds.index("QuantizeLinear") > max(index for index, kind in enumerate(kinds) if kind == "Cast")
        assert made.preprocess.feeds == layout
        error = np.abs(made.samples().expected["logits"] - made.samples().reference["logits"]).max()
        assert error < 0.2 * np.abs(made.samples().reference["logits"]).max()
        assert not [line for line in observed.facts["warnings"] if "preprocess.mean" in line]

    def test_engines_take_them(self, layout, of_bytes, tmp_path):
        runtime = get("onnxruntime")

        engine = runtime.build(of_bytes[layout], tmp_path, threads=1)

        answer = runtimes.run(runtime.load(engine), {"image": fed(layout)})["logits"]
        assert answer == pytest.approx(of_bytes[layout].samples().expected["logits"], rel=1e-4, abs=1e-5)

    def test_torchscript_takes_them_as_well(self, layout, tmp_path):
        made = export.torchscript_model(a_network_for_bytes(), fed(layout), None, ExportTable(input=layout), tmp_path)

        answer = runtimes.run(get("torchscript").load(made), {"image": fed(layout)})["logits"]
        assert answer == pytest.approx(export.torch_logits(a_network_for_bytes(), floats()), rel=1e-5, abs=1e-6)

    def test_any_size_and_bytes_go_together(self, layout, tmp_path):
        made = export.onnx_model(a_network_for_bytes(), fed(layout), None, ExportTable(input=layout, size="dynamic"), tmp_path)

        open_sizes = ["batch", "height", "width", 3] if layout == "uint8 NHWC" else ["batch", 3, "height", "width"]
        assert sizes(graph_of(made).input[0]) == open_sizes == list(made.inputs[0].shape)


@pytest.mark.parametrize("exporter", ["new", "legacy"])
class TestOperators:
    @pytest.mark.parametrize(("size", "restored"), [(5, True), (3, True), (4, False)])
    def test_local_response_norm_is_lrn_where_its_window_is_centred_as_onnx_has_it(self, exporter, size, restored, tmp_path):
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(size, alpha=0.02, beta=0.6, k=2.0))

        made = networks.exported(networks.Classifier(body, 8), tmp_path, exporter=exporter)

        found = operators(made)
        assert ("LRN" in found) is restored
        assert ("AveragePool" in found) is not restored
        assert made.facts["relative_error"] < 1e-6

    def test_a_window_over_rows_is_no_local_response_norm(self, exporter, tmp_path):
        made = networks.exported(
            networks.Classifier(nn.Sequential(nn.Conv2d(3, 8, 3), OverRows()), 8), tmp_path, exporter=exporter
        )

        assert "LRN" not in operators(made)
        assert made.facts["relative_error"] < 1e-6

    @pytest.mark.parametrize(("axis", "value", "restored"), [(1, 0.0, True), (1, 0.5, False), (2, 0.0, False)])
    def test_of_five_axes_the_window_has_to_be_over_channels_padded_with_zeros(self, exporter, axis, value, restored, tmp_path):
        body = nn.Sequential(nn.Conv2d(3, 8, 3), OverFive(axis, value))

        made = networks.exported(networks.Classifier(body, 8), tmp_path, exporter=exporter)

        assert ("LRN" in operators(made)) is restored
        assert made.facts["relative_error"] < 1e-6

    def test_lrn_keeps_its_constants(self, exporter, tmp_path):
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(5, alpha=0.02, beta=0.6, k=2.0))

        made = networks.exported(networks.Classifier(body, 8), tmp_path, exporter=exporter)

        (node,) = [node for node in graph_of(made).node if node.op_type == "LRN"]
        numbers = {item.name: item.f or item.i for item in node.attribute}
        assert numbers == pytest.approx({"alpha": 0.02, "beta": 0.6, "bias": 2.0, "size": 5})
        assert node.name == "body.1/LRN"

    def test_hard_swish_is_one_operator_and_silu_a_sigmoid_with_its_product_behind_it(self, exporter, tmp_path):
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.SiLU())

        made = networks.exported(networks.Classifier(body, 8), tmp_path, exporter=exporter)

        assert operators(made) == ["Conv", "HardSwish", "Conv", "Sigmoid", "Mul", "GlobalAveragePool", "Flatten", "Gemm"]

    def test_constants_are_folded(self, exporter, tmp_path):
        class Constant(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * (torch.arange(1, 9, dtype=torch.float32).sqrt() / 3).reshape(1, 8, 1, 1)

        body = nn.Sequential(nn.Conv2d(3, 8, 3), Constant())

        made = networks.exported(networks.Classifier(body, 8), tmp_path, exporter=exporter)

        assert operators(made) == ["Conv", "Mul", "GlobalAveragePool", "Flatten", "Gemm"]


@pytest.fixture
def beside(portable, tmp_path) -> Artifact:
    """A small network written as one above 2 GB is: its weights in a file beside the graph."""
    source = portable("residual")
    folder = networks.made(tmp_path / "large")
    files.write(ir.load(source.path), folder / "model.onnx", limit=1000)
    return replace(source, path=folder / "model.onnx")


class TestWeightsBesideTheGraph:
    def test_are_in_one_file_of_that_name(self, beside):
        assert sorted(path.name for path in beside.folder.iterdir()) == ["model.onnx", "model.onnx.data"]
        assert beside.path.stat().st_size < (beside.folder / "model.onnx.data").stat().st_size

    def test_answer_as_in_one_piece(self, beside, portable):
        inputs = {"image": networks.images(3)}

        found = runtimes.run(onnxruntime.reference(beside.path), inputs)["logits"]

        assert found.tobytes() == runtimes.run(onnxruntime.reference(portable("residual").path), inputs)["logits"].tobytes()

    def test_make_an_engine_with_its_weights_beside_it(self, beside, tmp_path):
        runtime = get("onnxruntime")

        engine = runtime.build(beside, networks.made(tmp_path / "engine"), threads=1)

        assert (tmp_path / "engine" / "engine.onnx.data").is_file()
        assert runtimes.run(runtime.load(engine), {"image": networks.images(2)})["logits"].shape == (2, 5)

    def test_are_not_read_through_a_link(self, beside, tmp_path):
        data = beside.folder / "model.onnx.data"
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")

        with pytest.raises(UsageError, match="a file and no link"):
            onnxruntime.reference(beside.path)

    @pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", "other.data"])
    def test_are_not_read_from_anywhere_else(self, beside, location):
        model = onnx.load(beside.path, load_external_data=False)
        for value in model.graph.initializer:
            for entry in value.external_data:
                if entry.key == "location":
                    entry.value = location
        beside.path.write_bytes(model.SerializeToString())

        with pytest.raises(UsageError, match="keeps weights outside of it"):
            onnxruntime.reference(beside.path)

    def test_are_not_read_beyond_their_file(self, beside):
        data = beside.folder / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-8])

        with pytest.raises(UsageError, match="of a file of"):
            onnxruntime.reference(beside.path)

    def test_are_not_quantized(self, beside, tmp_path):
        with pytest.raises(UsageError, match="keeps its weights in another file"):
            networks.calibrated(beside, tmp_path / "calibrate")


class TestMemory:
    def test_what_a_network_needs_grows_with_its_weights_and_its_largest_tensor(self):
        assert memory.need_bytes(10**9) > memory.need_bytes(10**8) > 0
        assert memory.need_bytes(10**8, 10**9) > memory.need_bytes(10**8, 10**8)

    def test_is_refused_before_the_work_where_there_is_less(self):
        with pytest.raises(
            CapabilityError, match=r"exporting big needs about 17\.\d GiB of memory, and 8\.0 GiB are free"
        ) as refused:
            memory.require("big", int(2.5 * 2**30), 2**28, available=8 << 30)

        assert refused.value.exit_code == 4

    def test_the_largest_tensor_is_found_without_computing(self):
        module = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))

        assert memory.largest_tensor_bytes(module, (16, 3, 2048, 2048)) == 4 * 16 * 64 * 2048 * 2048
        assert all(value.device.type == "cpu" for value in module.parameters())

    def test_a_network_that_cannot_run_on_shapes_counts_by_its_weights(self):
        class LooksAtValues(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x.sum() > 0 else -x

        assert memory.largest_tensor_bytes(LooksAtValues(), (1, 3, 8, 8)) == 0

    def test_what_a_network_keeps_of_its_first_input_is_not_kept(self):
        class KeepsAGrid(nn.Module):
            grid: torch.Tensor | None = None

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if self.grid is None:
                    self.grid = torch.ones_like(x)
                return x + self.grid

        module = KeepsAGrid()

        assert memory.largest_tensor_bytes(module, (1, 3, 8, 8)) == 4 * 3 * 8 * 8
        assert module(torch.zeros(1, 3, 8, 8)).sum() == 3 * 8 * 8

    def test_an_export_asks(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1 << 20)

        with pytest.raises(CapabilityError, match="exporting lenet5 needs about"):
            networks.exported("lenet5", tmp_path)

        assert not list(Path(tmp_path).iterdir())
