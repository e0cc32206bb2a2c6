"""Networks that are no classifiers of pictures: segmenters, detectors, networks for clips, from their code to engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from conftest import Outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import models as torchvision_models
from torchvision.ops import boxes as ops

from deploykit import export, models, pipeline, recipe, runtimes, scenes
from deploykit.artifact import Preprocess, read_artifact
from deploykit.data.pictures import preprocess
from deploykit.errors import ModelError, StageError, UsageError
from deploykit.export import boxes
from deploykit.export.boxes import checked_boxes, torch_answer
from deploykit.models import tasks, torchvision_dense
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable
from deploykit.runtimes import onnxruntime, torchscript

TINY = """
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.segmentation.fcn import FCN, FCNHead

PREPROCESS = {"resize": 64, "crop": 64, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def conv(inside, outside, stride=2):
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class Features(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.names, self.out_channels = names, [16, 16]
        self.stem, self.first, self.second = conv(3, 8), conv(8, 16), conv(16, 16)

    def forward(self, x):
        x = self.first(self.stem(x))
        return OrderedDict([(self.names[0], x), (self.names[1], self.second(x))])


def finished(network, task, preprocess=PREPROCESS):
    # BatchNorm's statistics come from noise, so that answers depend on the picture.
    network.task, network.preprocess = task, preprocess
    frames = (preprocess["frames"],) if "frames" in preprocess else ()
    seen = torch.randn(8, 3, *frames, 64, 64).cumsum(-1) / 8
    for layer in network.modules():
        layer.training = isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d))
    with torch.no_grad():
        for _ in range(30):
            network(list(seen) if task == "detect" else seen)
    return network.eval()


def segmenter(num_classes=5):
    torch.manual_seed(0)
    return finished(FCN(Features(["aux", "out"]), FCNHead(16, num_classes)), "segment")


def detector(num_classes=5):
    torch.manual_seed(0)
    boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.4, 0.6])
    network = SSD(
        Features(["0", "1"]), boxes, (64, 64), num_classes, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        score_thresh=0.6, nms_thresh=0.5, detections_per_img=200, topk_candidates=100,
    )
    with torch.no_grad():
        for layer in network.head.classification_head.module_list:
            layer.weight *= 6
    return finished(network, "detect")


def clips(num_classes=4):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
    return finished(network, "clips", {**PREPROCESS, "frames": 4})


def blind():
    network = detector()
    network.score_thresh = 2.0
    return network


def coarse():
    torch.manual_seed(0)
    return finished(nn.Sequential(conv(3, 8), nn.Conv2d(8, 5, 1)), "segment")


def unknown():
    network = segmenter()
    network.task = "dream"
    return network


def boxes_alone():
    network = nn.Conv2d(3, 4, 1)
    network.task, network.preprocess = "detect", PREPROCESS
    return network
"""

Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], str]:
    """FILE.py:factory of one of the small networks."""
    path = tmp_path_factory.mktemp("tiny") / "tiny_tasks.py"
    path.write_text(TINY)
    return lambda factory: f"{path}:{factory}"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six pictures with blobs of several sizes, so that there is something to find at several places."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        random = np.random.default_rng(index)
        coarse = random.integers(0, 256, (3 + index, 4 + index, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def runs(tiny, pictures, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run that exported one of the small networks to ONNX, an engine and TorchScript, each made once."""

    @cache
    def run(factory: str) -> Path:
        content = {
            "name": factory,
            "model": {"name": tiny(factory)},
            "data": {"calibrate": str(pictures)},
            "export": {"formats": ["onnx", "torchscript"]},
            "benchmark": {"enabled": False},
        }
        folder = tmp_path_factory.mktemp("runs") / factory
        pipeline.run(recipe.parse(content, base=Path(), source="the test"), folder)
        return folder

    return run


def model_of(name: str, **settings: object) -> models.Model:
    return models.load(ModelTable(name=name, **settings))


def inputs_of(model: models.Model, folder: Path) -> np.ndarray:
    return np.stack([preprocess(Image.open(path), model.preprocess) for path in sorted(folder.iterdir())])


def exported(deploykit: Run, name: str, folder: Path, pictures: Path, *more: object) -> dict:
    outcome = deploykit(
        *("export", name, "--to", "onnxruntime", "--calibrate", pictures, "--output", folder),
        *("--set", "benchmark.enabled=false", "--json", *more),
    )
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


class TestHowManyGoldenSamplesThereAre:
    def of(self, side: int, task: tasks.Task = "classify", frames: int | None = None, **more: object) -> models.Model:
        base = networks.model("lenet5")
        shaped = replace(base.preprocess, crop=(side, side), frames=frames)
        return replace(base, preprocess=shaped, task=task, **more)

    @pytest.mark.parametrize(("side", "count"), [(32, 16), (224, 16), (240, 13), (299, 8), (380, 5), (600, 2), (2048, 2)])
    def test_as_many_as_have_the_pixels_of_16_pictures_of_224(self, side, count):
        assert tasks.golden_samples(self.of(side), None) == count

    def test_the_frames_of_a_clip_count(self):
        assert tasks.golden_samples(self.of(112, "clips", frames=16), None) == 4

    @pytest.mark.parametrize("asked", [1, 16, 300])
    def test_what_is_asked_for_is_what_there_is(self, asked):
        assert tasks.golden_samples(self.of(600), asked) == asked

    @pytest.mark.parametrize("asked", [None, 300])
    def test_answers_that_are_large_are_few_whatever_is_asked(self, asked):
        assert tasks.golden_samples(self.of(224, "segment", num_classes=81), asked) == 4
        assert tasks.golden_samples(self.of(800, "detect", outputs=("boxes", "masks")), asked) == 1

    def test_of_noise_there_is_enough_for_batch_norm(self):
        assert tasks.noise_pictures(self.of(600), None) == 2
        assert tasks.noise_pictures(self.of(600, "segment"), None) == 16
        assert tasks.noise_pictures(self.of(600, "detect"), 3) == 3


class TestLoading:
    @pytest.mark.parametrize(
        ("factory", "task", "outputs", "classes"),
        [
            ("segmenter", "segment", ("scores",), 5),
            ("detector", "detect", ("boxes", "labels", "scores"), 5),
            ("clips", "clips", ("logits",), 4),
        ],
    )
    def test_a_network_says_its_task_itself(self, tiny, factory, task, outputs, classes):
        found = model_of(tiny(factory))

        assert (found.task, found.outputs, found.num_classes) == (task, outputs, classes)

    def test_a_task_that_does_not_exist_is_refused(self, tiny):
        with pytest.raises(ModelError, match=r"(?s)'dream'.*classify, segment, detect, clips"):
            model_of(tiny("unknown"))

    def test_a_detector_has_to_answer_as_detectors_do(self, tiny):
        with pytest.raises(ModelError):
            model_of(tiny("boxes_alone"))

    def test_random_detectors_find_boxes_that_depend_on_the_picture(self, tiny, pictures):
        found = model_of(tiny("detector"), weights="none")
        seen = inputs_of(found, pictures)

        models.calibrate_batch_norm(found, [seen])

        answers = [torch_answer(found, picture) for picture in seen]
        assert min(len(answer["scores"]) for answer in answers) > 0
        assert len({answer["boxes"].tobytes() for answer in answers}) == len(answers)

    def test_a_picture_becomes_a_clip_by_a_crop_that_moves_across_it(self):
        how = Preprocess(None, (4, 4), (0.0,) * 3, (1.0,) * 3, frames=3)
        columns = np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None], (4, 10, 3))

        clip = preprocess(Image.fromarray(np.ascontiguousarray(columns)), how)

        assert clip.shape == how.shape == (3, 3, 4, 4)
        assert (clip[0, :, 0, 0] * 255).tolist() == [0, 3, 6]

    def test_fine_tuning_is_for_classifiers(self, deploykit, tiny, labelled, tmp_path):
        outcome = deploykit(
            *("export", tiny("segmenter"), "--to", "onnx", "--output", tmp_path / "run"),
            *("--set", "finetune.epochs=1", "--set", f"data.train={labelled}"),
        )

        assert outcome.code == 2
        assert "cannot be fine-tuned" in outcome.err


class TestTorchvision:
    @pytest.mark.parametrize("name", torchvision_dense.names())
    def test_the_catalogue_counts_parameters_as_they_are_deployed(self, name):
        parameters, shape, _, _ = torchvision_dense.facts(name)
        table = PreprocessTable(crop=shape[-1])

        with torch.device("meta"):
            network = torchvision_dense.architecture(ModelTable(name=name, weights="none"), table).build(None)

        assert sum(value.numel() for value in network.parameters()) == parameters

    def test_every_task_is_in_the_catalogue(self):
        found = {entry.name: entry.task for entry in models.catalogue()}

        wanted = {"resnet18": "classify", "fcn_resnet50": "segment", "ssd300_vgg16": "detect", "r3d_18": "clips"}
        assert wanted.items() <= found.items()
        assert set(found.values()) == set(tasks.TASKS)

    def test_weights_that_were_published_with_the_auxiliary_head_fit_without_it(self, tmp_path):
        whole = torchvision_models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None)
        path = tmp_path / "weights.pth"
        torch.save({**whole.state_dict(), "aux_classifier.0.weight": torch.zeros(1)}, path)

        found = models.load(ModelTable(name="lraspp_mobilenet_v3_large", weights=str(path)), PreprocessTable(crop=64))

        assert (found.task, found.num_classes, found.classes[15]) == ("segment", 21, "person")

    @pytest.mark.parametrize(("name", "side"), [("ssd300_vgg16", 300), ("ssdlite320_mobilenet_v3_large", 320)])
    def test_a_network_that_resizes_inside_the_graph_has_one_size(self, name, side):
        table = ModelTable(name=name, weights="none")

        for crop in (None, side):
            torchvision_dense.architecture(table, PreprocessTable(crop=crop))
        with pytest.raises(ModelError, match=f"(?s)crop is 256.*set it to {side}"):
            torchvision_dense.architecture(table, PreprocessTable(crop=256))

    def test_ssdlite_finds_in_onnx_and_torchscript_the_boxes_of_pytorch(self, deploykit, pictures, tmp_path):
        outcome = deploykit(
            *("export", "ssdlite320_mobilenet_v3_large", "--to", "onnxruntime", "--to", "torchscript", "--weights", "none"),
            *("--classes", "3", "--calibrate", pictures, "--output", tmp_path / "run", "--json"),
            *("--set", "benchmark.enabled=false", "--set", "export.tolerance=1e-3"),
        )

        # Random weights make rounding larger than the limit of 1e-4 that gates have, so exit code 3 says nothing here.
        result = json.loads(outcome.out)
        assert [case["agreement"] for case in result["parity"]] == [1.0, 1.0]
        assert all(case["parts"] > 10 and case["quantization"]["relative"] < 1e-3 for case in result["parity"])
        assert result["model"]["num_classes"] == 3


class TestExport:
    @pytest.mark.parametrize("factory", ["segmenter", "detector", "clips"])
    def test_files_and_engines_answer_like_pytorch(self, runs, factory):
        result = json.loads((runs(factory) / "result.json").read_text())

        assert result["exit_code"] == 0
        assert {case["label"] for case in result["parity"]} == {"torchscript fp32", "onnxruntime fp32"}
        assert [case["agreement"] for case in result["parity"]] == [1.0, 1.0]
        assert max(case["quantization"]["relative"] for case in result["parity"]) < 1e-4

    def test_a_detector_finds_another_number_of_boxes_on_another_picture(self, runs, tiny, pictures):
        name = tiny("detector")
        network = model_of(name)
        wanted = [torch_answer(network, picture) for picture in inputs_of(network, pictures)]

        for kind, load in (("onnx", lambda made: onnxruntime.reference(made.path)), ("torchscript", torchscript.load)):
            session = load(read_artifact(runs("detector") / f"export-{kind}"))
            found = [runtimes.run(session, {"image": picture[None]}) for picture in inputs_of(network, pictures)]

            assert [len(answer["scores"]) for answer in found] == [len(answer["scores"]) for answer in wanted]
        assert len({len(answer["scores"]) for answer in wanted}) > 1

    def test_names_of_layers_are_those_of_the_network(self, runs):
        for factory, layer in (("segmenter", "classifier.4/Conv"), ("detector", "backbone.second.0/Conv")):
            graph = onnx.load(runs(factory) / "export-onnx" / "model.onnx").graph
            assert layer in {node.name for node in graph.node}
            assert not any(node.name.startswith("network.") for node in graph.node)

    def test_golden_samples_of_a_detector_are_filled_up_and_come_apart(self, runs, tiny):
        name = tiny("detector")
        samples = read_artifact(runs("detector") / "export-onnx").samples()
        network = model_of(name)

        for picture, answer in zip(samples.inputs["image"], scenes.unstacked(samples.reference), strict=True):
            assert np.array_equal(answer["boxes"], torch_answer(network, picture)["boxes"])

    @pytest.mark.parametrize(
        ("factory", "setting", "said"),
        [
            ("detector", "export.batch=4", "takes one picture"),
            ("detector", 'export.input="uint8 NHWC"', "fed floats"),
            ("detector", "export.cross_check=true", "legacy exporter"),
            ("detector", 'export.exporter="new"', 'export.exporter = "new" for a detector'),
            ("clips", 'export.size="dynamic"', "one size"),
        ],
    )
    def test_what_a_task_does_not_have_is_refused(self, deploykit, tiny, pictures, tmp_path, factory, setting, said):
        outcome = deploykit(
            *("export", tiny(factory), "--to", "onnx", "--calibrate", pictures, "--output", tmp_path / "run", "--set", setting)
        )

        assert outcome.code == 2
        assert said in outcome.err

    @settings(deadline=None, max_examples=30)
    @given(count=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
    def test_boxes_are_clipped_while_traced_as_torchvision_clips_them_also_where_there_is_none(self, count, seed):
        corners = torch.from_numpy(np.random.default_rng(seed).uniform(-5, 15, (count, 4)).astype(np.float32))

        assert torch.equal(boxes._clipped(corners, (8, 10)), ops.clip_boxes_to_image(corners, (8, 10)))

    def test_a_detectors_file_says_which_exporter_wrote_it_and_why(self, runs):
        facts = read_artifact(runs("detector") / "export-onnx").facts

        assert (facts["exporter"], facts["boxes_compared"] > 0, "note" in facts) == ("legacy", True, False)
        assert "legacy exporter alone" in facts["exporter_why"]

    @pytest.mark.parametrize("write", [export.onnx_model, export.torchscript_model])
    def test_where_no_box_was_found_the_file_says_that_nothing_was_compared(self, tiny, tmp_path, write):
        made = write(model_of(tiny("blind")), np.zeros((2, 3, 64, 64), np.float32), None, ExportTable(), tmp_path)

        assert made.facts["boxes_compared"] == 0
        assert "nothing was compared" in made.facts["note"]

    @pytest.mark.parametrize("broken", ["boxes", "scores"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_boxes_that_are_no_numbers_are_refused_on_either_side(self, broken, value):
        good = {"boxes": np.float32([[0, 0, 9, 9]] * 2), "labels": np.array([1, 2]), "scores": np.float32([0.9, 0.8])}
        bad = {**good, broken: good[broken].copy()}
        bad[broken][1] = value

        for answers, reference, side in (([good, bad], [good, good], "the ONNX file"), ([good, bad], [good, bad], "PyTorch")):
            with pytest.raises(StageError, match=f"(?s)not finite.*{side}: {broken} of input 1"):
                checked_boxes("ONNX", answers, reference, 1e-4)

    @pytest.mark.parametrize("exporter", ["new", "legacy"])
    @pytest.mark.parametrize(
        ("size", "wanted"), [("fixed", (32, 32)), ("dynamic", ("output_height", "output_width"))], ids=["fixed", "dynamic"]
    )
    def test_a_segmenter_that_answers_with_a_coarser_map_says_so(self, tiny, tmp_path, exporter, size, wanted):
        pictures = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
        settings = ExportTable(exporter=exporter, size=size)

        made = export.onnx_model(model_of(tiny("coarse")), pictures, None, settings, tmp_path)

        assert made.outputs[0].shape == ("batch", 5, *wanted)
        assert made.samples().reference["scores"].shape == (2, 5, 32, 32)

    def test_a_segmenter_that_answers_pixel_for_pixel_has_open_sizes_of_its_input(self, tiny, tmp_path):
        pictures = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)

        made = export.onnx_model(model_of(tiny("segmenter")), pictures, None, ExportTable(size="dynamic"), tmp_path)

        assert made.outputs[0].shape == ("batch", 5, "height", "width")


class TestInt8:
    def test_a_segmenter_runs_in_int8(self, deploykit, tiny, pictures, tmp_path):
        result = exported(
            *(deploykit, tiny("segmenter"), tmp_path / "run", pictures, "--int8"),
            *("--set", "quantize.speed=false", "--set", "quantize.target_sqnr_db=0"),
        )

        int8 = next(case for case in result["parity"] if case["precision"] == "int8")
        assert result["engines"][1]["realised"]["int8"] == result["engines"][1]["realised"]["total"] == 5
        assert 0.8 < int8["agreement"] < 1
        assert int8["unit"] == "pixel"

    def test_of_a_detector_the_backbone_runs_in_int8_and_the_heads_stay_in_float(self, deploykit, tiny, pictures, tmp_path):
        result = exported(
            *(deploykit, tiny("detector"), tmp_path / "run", pictures, "--int8", "--set", "quantize.speed=false"),
        )

        layers = result["engines"][1]["realised"]["layers"]
        assert {layer["name"]: layer["precision"] for layer in layers if layer["name"].startswith("backbone")} == {
            "backbone.stem.0/Conv": "int8",
            "backbone.first.0/Conv": "int8",
            "backbone.second.0/Conv": "int8",
        }
        assert {layer["precision"] for layer in layers if layer["name"].startswith("head")} == {"fp32"}


class TestParity:
    @pytest.mark.parametrize(
        ("factory", "told"), [("segmenter", "pixels decided otherwise"), ("detector", "boxes decided otherwise")]
    )
    def test_a_network_and_its_file_are_compared_on_pictures(self, deploykit, runs, tiny, pictures, factory, told):

        outcome = deploykit("parity", tiny(factory), runs(factory) / "export-onnx", "--data", pictures)

        assert outcome.code == 0, outcome.out
        assert told in outcome.out

    def test_two_that_find_nothing_prove_nothing(self, deploykit, tiny, pictures, tmp_path):
        name = tiny("blind")
        inputs = np.zeros((1, 3, 64, 64), np.float32)
        export.onnx_model(model_of(name), inputs, None, ExportTable(), tmp_path)

        outcome = deploykit("parity", name, tmp_path / "model.onnx", "--data", pictures, "--json")

        gates = [gate for gate in json.loads(outcome.out)["gates"] if gate["rule"] == "B finds the boxes of A"]
        assert (outcome.code, [gate["verdict"] for gate in gates]) == (5, ["cannot tell"])
        assert "nothing was compared" in gates[0]["reason"]

    @pytest.mark.parametrize("factory", ["segmenter", "detector"])
    def test_other_weights_are_found_out(self, deploykit, runs, tiny, pictures, tmp_path, factory):
        path = runs(factory) / "export-onnx" / "model.onnx"
        model = onnx.load(path)
        weight = next(value for value in model.graph.initializer if value.name.endswith(".weight") and len(value.dims) == 4)
        array = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(array[::-1].copy(), weight.name))
        onnx.save(model, tmp_path / "other.onnx")

        outcome = deploykit("parity", tiny(factory), tmp_path / "other.onnx", "--data", pictures, "--json")

        assert outcome.code == 3
        assert json.loads(outcome.out)["decisions"]["agreement"] < 0.9

    def test_a_rule_about_agreement_is_judged_on_pixels(self, deploykit, runs, tiny, pictures):
        sides = tiny("segmenter"), runs("segmenter") / "export-onnx"

        outcome = deploykit("parity", *sides, "--data", pictures, "--gate", "agreement >= 99 %", "--json")

        gate = json.loads(outcome.out)["gates"][-1]
        assert (outcome.code, gate["verdict"]) == (0, "pass")
        assert "24,576 pixels of 6 images" in gate["reason"]

    @pytest.mark.parametrize(("option", "said"), [("--labelled", "sub-folders"), ("--stress", "one picture")])
    def test_options_for_classifiers_are_refused(self, deploykit, runs, tiny, pictures, option, said):

        outcome = deploykit("parity", tiny("detector"), runs("detector") / "export-onnx", "--data", pictures, option)

        assert outcome.code == 2
        assert said in outcome.err


def test_settings_that_mean_nothing_are_refused_together(tiny):
    settings = ExportTable(batch=3, size="dynamic")
    with pytest.raises(UsageError) as refused:
        export.onnx_model(model_of(tiny("detector")), np.zeros((1, 3, 64, 64), np.float32), None, settings, Path())

    assert len(refused.value.problems) == 2
