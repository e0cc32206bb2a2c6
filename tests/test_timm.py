"""timm's networks by name: their preprocessing is timm's own, and what deploykit cannot do of it is refused."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import networks
import numpy as np
import pytest
import torch
from PIL import Image

from deploykit import data, export, models
from deploykit.errors import CapabilityError, DeploykitError, ModelError
from deploykit.models import timm as ours
from deploykit.models.preprocess import resolve
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed (pip install timm)")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CONFIG = {"input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center", **IMAGENET}


def load(name: str, keys: PreprocessTable | None = None, weights: str = "none", **model: object) -> models.Model:
    classes = model.pop("data_classes", None)
    return models.load(ModelTable(name=name, weights=weights, **model), keys or PreprocessTable(), data_classes=classes)


def table(asked: PreprocessTable | None = None, **changes: Any) -> PreprocessTable:
    return ours.table({**CONFIG, **changes}, asked or PreprocessTable(), name="timm:net")


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class TestPreprocessing:
    def test_the_shorter_side_is_the_input_divided_by_crop_pct_and_rounded_down(self):
        assert (table().resize, table().crop) == (67, 64)  # 64 / 0.95 is 67.4
        assert (table(crop_pct=0.875).resize, table(crop_pct=1.0).resize) == (73, 64)

    def test_squash_without_a_crop_stretches_the_whole_picture(self):
        found = table(crop_mode="squash", crop_pct=1.0)

        assert (found.fit, found.resize, found.crop) == ("stretch", None, 64)
        assert resolve(found, PreprocessTable(), name="net")[0].resize == 64

    @pytest.mark.parametrize(
        ("changes", "asked", "problem"),
        [
            ({"crop_mode": "border"}, {"fit": "crop"}, "'border' with crop_pct 0.95: set preprocess.fit"),
            ({"crop_mode": "squash"}, {"fit": "stretch"}, "'squash' with crop_pct 0.95"),
            ({"interpolation": "lanczos"}, {"interpolation": "bicubic"}, "resizes with 'lanczos'"),
            ({"input_size": (3, 64, 96)}, {"crop": 64}, "its input is 64x96, and ours are square"),
            ({"input_size": (4, 64, 64)}, {"channels": "RGB"}, "4 channels"),
        ],
    )
    def test_what_deploykit_does_not_do_is_refused_unless_the_recipe_says_otherwise(self, changes, asked, problem):
        with pytest.raises(ModelError, match=problem):
            table(**changes)
        assert table(PreprocessTable(**asked), **changes).crop == 64

    @needs_timm
    @pytest.mark.parametrize("size", [(90, 70), (64, 200), (301, 299)])
    @pytest.mark.parametrize(
        "changes",
        [{}, {"crop_pct": 0.875, "interpolation": "bilinear"}, {"crop_pct": 1.0, "crop_mode": "squash"}, {"crop_pct": 0.9}],
        ids=["centre", "bilinear", "squash", "0.9"],
    )
    def test_a_picture_becomes_what_timms_own_transform_makes_of_it(self, size, changes):
        import timm.data

        theirs = timm.data.create_transform(**{**CONFIG, **changes}, is_training=False)(picture(*size)).numpy()

        how, _ = resolve(table(**changes), PreprocessTable(), name="net")
        np.testing.assert_allclose(data.preprocess(picture(*size), how), theirs, rtol=0, atol=1e-6)


@needs_timm
class TestNetworks:
    def test_a_network_brings_the_preprocessing_of_its_default_weights(self):
        model = load("timm:resnet18")

        assert (model.preprocess.crop, model.preprocess.resize, model.preprocess.interpolation) == ((224, 224), 235, "bicubic")
        assert model.num_classes == 1000
        assert model.classes[0] == "tench"

    def test_another_tag_brings_another_preprocessing(self):
        preprocess = load("timm:resnet18.tv_in1k").preprocess

        assert (preprocess.resize, preprocess.interpolation) == (256, "bilinear")

    def test_the_data_says_how_many_classes(self):
        assert load("timm:mobilenetv3_small_050", data_classes=["a", "b", "c"]).classes == ("a", "b", "c")

    def test_the_seed_alone_decides_random_weights(self):
        first, second = (load("timm:mobilenetv3_small_050", seed=1).module.state_dict() for _ in range(2))

        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_arguments_go_to_timm(self):
        model = load("timm:resnet18", PreprocessTable(channels="L", mean=(0.5,), std=(0.5,)), args={"in_chans": 1})

        assert model.module.conv1.in_channels == 1
        with pytest.raises(ModelError, match=r"timm cannot build resnet18(.|\n)*no_such_thing"):
            load("timm:resnet18", args={"no_such_thing": 1})

    def test_weights_come_by_their_option_and_not_as_arguments(self):
        reserved = {"pretrained": True, "checkpoint_path": "weights.pth", "pretrained_cfg": "a1_in1k", "scriptable": True}

        with pytest.raises(ModelError, match=r"--weights FILE") as refused:
            load("timm:resnet18", args={**reserved, "in_chans": 1})

        assert set(refused.value.problems) == {f"model.args.{name}" for name in reserved}

    @pytest.mark.parametrize("name", ["pretrained_cfg_overlay", "cache_dir", "exportable", "no_jit", "model_name"])
    def test_what_is_no_property_of_the_network_is_no_argument(self, name):
        with pytest.raises(ModelError, match=rf"model\.args\.{name}(.|\n)*--weights FILE"):
            load("timm:resnet18", args={name: None})

    def test_an_unknown_name_or_tag_is_answered_with_those_that_there_are(self):
        with pytest.raises(ModelError, match=r"no network 'resnet19'(.|\n)*resnet18"):
            load("timm:resnet19")
        with pytest.raises(ModelError, match=r"no weights 'nope' for resnet18(.|\n)*a1_in1k"):
            load("timm:resnet18.nope")

    def test_published_weights_are_taken_and_named_with_their_tag(self, monkeypatch):
        import timm
        import timm.models._builder as builder

        wanted = timm.create_model("mobilenetv3_small_050").state_dict()
        monkeypatch.setattr(builder, "load_state_dict_from_hf", lambda *_, **__: dict(wanted))

        model = load("timm:mobilenetv3_small_050", weights="default")

        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.module.state_dict().items())
        assert (model.weights, model.is_random) == ("timm mobilenetv3_small_050 (lamb_in1k)", False)

    def test_weights_that_cannot_be_fetched_say_from_where(self, monkeypatch, tmp_path):
        import timm.models._builder as builder

        def unreachable(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr(builder, "load_state_dict_from_hf", unreachable)

        with pytest.raises(DeploykitError, match=r"mobilenetv3_small_050(.|\n)*no route to host(.|\n)*--weights FILE") as caught:
            load("timm:mobilenetv3_small_050", weights="default")
        assert caught.value.exit_code == 1

    def test_a_checkpoint_of_timms_trainer_is_loaded(self, tmp_path):
        import timm

        trained = timm.create_model("mobilenetv3_small_050", num_classes=4).state_dict()
        torch.save({"epoch": 9, "arch": "mobilenetv3_small_050", "state_dict": trained, "version": 2}, tmp_path / "last.pth.tar")

        assert load("timm:mobilenetv3_small_050", weights=str(tmp_path / "last.pth.tar")).num_classes == 4

    def test_it_exports_and_answers_like_pytorch(self, tmp_path):
        model = load("timm:mobilenetv3_small_050", PreprocessTable(crop=64), classes=5)
        models.calibrate_batch_norm(model, [networks.images(16, 64)])

        made = export.onnx_model(model, networks.images(4, 64), None, ExportTable(), tmp_path)

        assert made.facts["relative_error"] < 1e-4

    def test_it_may_be_a_member_of_an_ensemble(self):
        model = load("ensemble:timm:mobilenetv3_small_050+squeezenet1_1", PreprocessTable(crop=64), args={"combine": "logits"})

        assert set(model.module.members) == {"timm_mobilenetv3_small_050", "squeezenet1_1"}


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(CapabilityError, match=r"deploykit\[timm\]"):
        load("timm:resnet18")
