"""Several backbones as one network: how they are joined, what they see, and that the whole is one graph."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision import models as library

from deploykit import export, models
from deploykit.artifact import Preprocess
from deploykit.errors import ModelError
from deploykit.models import ensemble
from deploykit.models.architecture import Weights
from deploykit.models.state_dict import StateDict
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable

SMALL = "ensemble:lenet5_rgb+cifar_resnet20+inception_resnet_small"


def load(name: str = SMALL, weights: str = "none", keys: PreprocessTable | None = None, **model: object) -> models.Model:
    return models.load(ModelTable(name=name, weights=weights, **model), keys or PreprocessTable())


def pictures(model: models.Model, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *model.preprocess.shape, generator=torch.Generator().manual_seed(0))


class TestFeatures:
    def test_one_head_takes_the_features_of_all_members_side_by_side(self):
        model = load()

        assert model.module.head.in_features == 84 + 64 + 128
        assert (model.num_classes, model.classes) == (10, ())

    def test_the_answer_is_the_head_on_what_the_members_last_layers_would_have_got(self):
        model = load("ensemble:cifar_resnet20+inception_resnet_small", seed=5)
        x = pictures(model)

        parts = [model.module.inputs[name](x) if name in model.module.inputs else x for name in model.module.members]
        features = [member(part) for member, part in zip(model.module.members.values(), parts, strict=True)]

        assert [each.shape for each in features] == [(2, 64), (2, 128)]
        torch.testing.assert_close(model.module(x), model.module.head(torch.cat(features, 1)))

    def test_a_network_without_a_linear_layer_has_no_features(self):
        with pytest.raises(ModelError, match=r"network_in_network has no features(.|\n)*combine=logits"):
            load("ensemble:lenet5_rgb+network_in_network")

    def test_other_classes_change_the_head_alone(self):
        model = load(classes=7)

        assert model.num_classes == model.module.head.out_features == 7

    def test_a_new_head_is_the_one_that_joins_the_members(self):
        model = models.with_classes(load(), ["a", "b"], seed=0)

        assert model.module(pictures(model)).shape == (2, 2)
        assert "head is new: 2 classes instead of 10" in model.notes


class TestLogits:
    def test_the_answer_is_the_mean_of_the_members_answers(self):
        model = load("ensemble:cifar_resnet20+cifar_resnet20", args={"combine": "logits"})
        x = pictures(model)

        answers = [member(x) for member in model.module.members.values()]

        assert not torch.equal(*answers)
        torch.testing.assert_close(model.module(x), (answers[0] + answers[1]) / 2)

    def test_fine_tuning_for_other_classes_gives_every_member_a_new_head(self):
        model = models.with_classes(load(args={"combine": "logits"}), ["a", "b", "c"], seed=0)

        assert model.module(pictures(model)).shape == (2, 3)
        heads = "members.lenet5_rgb.fc2 and members.cifar_resnet20.linear and members.inception_resnet_small.fc"
        assert model.notes[-1] == f"{heads} are new: 3 classes instead of 10"

    def test_members_with_convolutional_heads_take_part(self):
        model = load("ensemble:lenet5_rgb+network_in_network", args={"combine": "logits"})

        assert model.module(pictures(model)).shape == (2, 10)


class TestWhatTheMembersSee:
    def test_a_member_gets_its_own_normalisation_from_the_shared_one(self):
        model = load("ensemble:cifar_resnet20+inception_resnet_small", args={"combine": "logits"})
        alone = load("inception_resnet_small").preprocess
        picture = torch.rand(1, 3, 32, 32)

        def normalised(how: Preprocess) -> torch.Tensor:
            return (picture - torch.tensor(how.mean).reshape(3, 1, 1)) / torch.tensor(how.std).reshape(3, 1, 1)

        (key,) = model.module.inputs
        torch.testing.assert_close(model.module.inputs[key](normalised(model.preprocess)), normalised(alone))

    def test_members_with_the_same_normalisation_share_the_picture_as_it_is(self):
        assert len(load("ensemble:cifar_resnet20+cifar_resnet32").module.inputs) == 0

    def test_the_largest_input_is_everybodys_and_the_others_are_named(self):
        model = load("ensemble:squeezenet1_1+alexnet_2012", args={"combine": "logits"}, classes=10)

        assert model.preprocess.crop == (227, 227)
        assert "all members see pictures of 227 pixels; made for another size: squeezenet1_1 (224)" in model.notes

    def test_torchvisions_switch_for_inception_is_kept_with_the_weights(self, tmp_path, monkeypatch):
        published = library.googlenet(init_weights=False, aux_logits=False, transform_input=True).eval()
        weights = Weights(StateDict.of(published.state_dict()), "published")
        monkeypatch.setattr(models.torchvision, "default_weights", lambda _: weights)
        name, small = "ensemble:googlenet+googlenet", PreprocessTable(crop=64)
        model = load(name, "default", small, args={"combine": "logits"})
        x = pictures(model)

        torch.save(model.module.state_dict(), tmp_path / "ensemble.pth")
        again = load(name, str(tmp_path / "ensemble.pth"), small, args={"combine": "logits"})

        for each in (model, again):
            seen: list[torch.Tensor] = []
            for member in each.module.members.values():
                member.conv1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            each.module(x)
            for one in seen:
                torch.testing.assert_close(one, published._transform_input(x), atol=1e-5, rtol=1e-5)
            assert not any("transform_input" in note for note in each.notes)

    def test_grey_and_colour_do_not_go_together(self):
        with pytest.raises(ModelError, match=r"not take the same channels(.|\n)*lenet5: L(.|\n)*lenet5_rgb: RGB"):
            load("ensemble:lenet5+lenet5_rgb")


class TestWeights:
    def test_published_weights_are_each_members_own_and_the_head_is_new(self, monkeypatch):
        published = library.squeezenet1_1().state_dict()
        weights = Weights(StateDict.of(published), "published")
        monkeypatch.setattr(models.torchvision, "default_weights", lambda _: weights)

        model = load("ensemble:squeezenet1_1+squeezenet1_1", "default", PreprocessTable(crop=64), args={"combine": "logits"})

        for member in model.module.members.values():
            assert torch.equal(member.state_dict()["classifier.1.weight"], published["classifier.1.weight"])
        assert model.weights == "the published weights of squeezenet1_1, squeezenet1_1"
        assert (model.is_random, model.classes[0]) == (False, "tench")

    def test_a_new_head_on_published_features_says_that_it_is_untrained(self, monkeypatch):
        published = library.shufflenet_v2_x0_5().state_dict()
        weights = Weights(StateDict.of(published), "published")
        monkeypatch.setattr(models.torchvision, "default_weights", lambda _: weights)

        model = load("ensemble:shufflenet_v2_x0_5+shufflenet_v2_x0_5", "default", PreprocessTable(crop=64))

        assert any("head on the members' features is new" in note for note in model.notes)
        assert model.classes == ()

    def test_members_without_published_weights_have_none_together(self):
        with pytest.raises(ModelError, match="no default weights"):
            load(SMALL, "default")

    def test_a_checkpoint_of_the_whole_is_loaded_with_its_number_of_classes(self, tmp_path):
        trained = load(classes=3, seed=9).module
        torch.save(trained.state_dict(), tmp_path / "ensemble.pth")

        model = load(weights=str(tmp_path / "ensemble.pth"))

        assert model.num_classes == 3
        torch.testing.assert_close(model.module(pictures(model)), trained.eval()(pictures(model)))


class TestNames:
    @pytest.mark.parametrize("name", ["ensemble:resnet18", "ensemble:", "ensemble:resnet18+"])
    def test_fewer_than_two_members_are_no_ensemble(self, name):
        with pytest.raises(ModelError, match=r"names no ensemble(.|\n)*resnet18\+densenet201"):
            load(name)

    @pytest.mark.parametrize("member", ["net.py:build", "ensemble:lenet5"])
    def test_code_of_ones_own_combines_networks_by_itself(self, member):
        with pytest.raises(ModelError, match=r"cannot be a member(.|\n)*factory"):
            load(f"ensemble:lenet5_rgb+{member}")

    def test_an_unknown_member_is_answered_with_the_nearest_name(self):
        with pytest.raises(ModelError, match=r"no model 'resnet19'(.|\n)*resnet18"):
            load("ensemble:resnet18+resnet19")

    def test_other_ways_to_combine_are_refused(self):
        with pytest.raises(ModelError, match=r"combined by 'vote'(.|\n)*combine=logits"):
            load(args={"combine": "vote"})
        with pytest.raises(ModelError, match=r"unexpected keyword argument 'mode'(.|\n)*ensemble\(combine"):
            load(args={"mode": "logits"})

    def test_a_detector_is_no_member(self):
        with pytest.raises(ModelError, match="members are classifiers"):
            load("ensemble:resnet18+fcn_resnet50")


class TestAsOneGraph:
    def test_averaged_logits_export_as_one_graph_that_answers_like_pytorch(self, tmp_path):
        model = load("ensemble:lenet5_rgb+lenet5_rgb", args={"combine": "logits"})

        made = export.onnx_model(model, networks.images(8), None, ExportTable(), tmp_path)

        assert made.facts["relative_error"] < 1e-5
        assert len(onnx.load(made.path).graph.input) == 1

    def test_joined_features_export_and_are_quantized_as_one_graph(self, tmp_path):
        model = load("ensemble:lenet5_rgb+inception_resnet_small")
        models.calibrate_batch_norm(model, [networks.images(32, seed=1)])

        portable = export.onnx_model(model, networks.images(8), None, ExportTable(), networks.made(tmp_path / "export"))
        int8 = networks.quantized(portable, "onnxruntime", tmp_path, target_sqnr_db=0.0)

        assert portable.facts["relative_error"] < 1e-5
        graph = onnx.load(int8.path).graph
        layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
        dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
        assert layers
        assert all(node.input[0] in dequantized and node.input[1] in dequantized for node in layers)

    def test_it_learns_as_one_network(self):
        model = load("ensemble:lenet5_rgb+cifar_resnet20")
        model.module.train()

        nn.functional.cross_entropy(model.module(pictures(model, 4)), torch.tensor([0, 1, 2, 3])).backward()

        assert all(parameter.grad is not None for parameter in model.module.parameters())


def test_resnet18_inception_v3_and_densenet201_join_in_4480_features():
    model = load("ensemble:resnet18+inception_v3+densenet201", keys=PreprocessTable(crop=96))

    assert model.module.head.in_features == 512 + 2048 + 1920
    assert model.num_classes == 1000
    assert ensemble.heads(model.module) == ()
    assert np.isfinite(model.module(pictures(model)).detach().numpy()).all()


def test_the_folder_of_a_run_is_called_after_the_members():
    from deploykit.cli.make import _run_name

    assert _run_name(SMALL) == "ensemble-lenet5_rgb+cifar_resnet20+inception_resnet_small"
    assert Path(_run_name("timm:hf-hub:timm/x")).name == _run_name("timm:hf-hub:timm/x")
