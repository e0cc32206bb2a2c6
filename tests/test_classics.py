"""Our own classics: the shapes and the numbers of parameters that their papers or authors published, and that they export."""

from __future__ import annotations

import networks
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from deploykit import export, models
from deploykit.errors import ModelError
from deploykit.models import alexnet, inception_resnet, lenet, network_in_network, torchvision
from deploykit.models.classics import CLASSICS
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(network: nn.Module, *shape: int) -> dict[str, tuple[int, ...]]:
    """The shape of what each module answers, without the batch, by its path."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, __, answer, name=name: found.update({name: tuple(answer.shape[1:])}))
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    return found


class TestLeNet5of1998:
    def test_it_has_the_60_000_parameters_of_the_paper_and_a_linear_layer(self):
        network = lenet.lenet5_1998()

        counts = {name: parameters(module) for name, module in network.named_children()}
        assert counts == {"c1": 156, "s2": 12, "c3": 1_516, "s4": 32, "c5": 48_120, "f6": 10_164, "output": 850}
        assert parameters(network) == 60_000 + 850

    def test_its_maps_have_the_papers_sizes(self):
        found = sizes(lenet.lenet5_1998(), 1, 32, 32)

        maps = {name: found[name] for name in ("c1", "s2", "c3", "s4", "c5", "f6", "")}
        assert maps == {
            **{"c1": (6, 28, 28), "s2": (6, 14, 14), "c3": (16, 10, 10), "s4": (16, 5, 5)},
            **{"c5": (120, 1, 1), "f6": (84,), "": (10,)},
        }

    def test_each_map_of_c3_sees_the_maps_of_table_1(self):
        network = lenet.SparseConvolution()
        seen = []
        for one in range(6):
            x = torch.zeros(2, 6, 5, 5)
            x[1, one] = 1.0
            quiet, loud = network(x)[:, :, 0, 0]
            seen.append("".join("X" if changed else "." for changed in quiet != loud))

        assert seen == [
            "X...XXX..XXXX.XX",
            "XX...XXX..XXXX.X",
            "XXX...XXX..X.XXX",
            ".XXX..XXXX..X.XX",
            "..XXX..XXXX.XX.X",
            "...XXX..XXXX.XXX",
        ]

    def test_the_squashing_function_meets_one_at_one(self):
        x = torch.tensor([-1.0, 0.0, 1.0, 100.0])

        torch.testing.assert_close(lenet.squashed(x), torch.tensor([-1.0, 0.0, 1.0, 1.7159]), atol=1e-4, rtol=0)

    def test_ink_and_paper_become_the_papers_numbers(self):
        preprocess = models.load(ModelTable(name="lenet5_1998", weights="none")).preprocess

        paper, ink = ((value - preprocess.mean[0]) / preprocess.std[0] for value in (0.0, 1.0))
        assert (paper, ink) == (pytest.approx(-0.1), pytest.approx(1.175))


class TestLeNet5inColour:
    def test_it_has_the_parameters_of_pytorchs_tutorial(self):
        model = models.load(ModelTable(name="lenet5_rgb", weights="none"))

        assert parameters(model.module) == 62_006
        assert model.preprocess.shape == (3, 32, 32)
        assert model.module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


class TestAlexNet:
    @pytest.mark.parametrize(("groups", "published"), [(1, 62_378_344), (2, 60_965_224)])
    def test_in_one_piece_or_in_two_it_has_the_known_number_of_parameters(self, groups, published):
        with torch.device("meta"):
            assert parameters(alexnet.alexnet_2012(groups=groups)) == published

    def test_its_maps_have_the_papers_sizes(self):
        with torch.device("meta"):
            features = alexnet.alexnet_2012().features
            maps = [tuple(x.shape[1:]) for x in walk(features, torch.zeros(1, 3, 227, 227))]

        assert maps[0] == (96, 55, 55)
        assert [maps[index] for index in (3, 4, 7, 8, 10, 12, 14)] == [
            *((96, 27, 27), (256, 27, 27), (256, 13, 13)),
            *((384, 13, 13), (384, 13, 13), (256, 13, 13), (256, 6, 6)),
        ]

    def test_normalisation_is_the_papers_formula(self):
        a = torch.rand(1, 9, 2, 3) * 40
        b = alexnet.normalisation()(a)

        for i in range(9):
            squares = (a[0, max(0, i - 2) : i + 3] ** 2).sum(0)
            torch.testing.assert_close(b[0, i], a[0, i] / (2 + 1e-4 * squares) ** 0.75)

    def test_another_number_of_groups_is_refused(self):
        with pytest.raises(ModelError, match=r"alexnet_2012(.|\n)*1 or 2 groups, not 3"):
            models.load(ModelTable(name="alexnet_2012", weights="none", args={"groups": 3}))


class TestNetworkInNetwork:
    def test_it_has_the_parameters_of_the_authors_definition(self):
        assert parameters(network_in_network.network_in_network()) == 966_986

    def test_its_maps_are_32_16_and_8_pixels_wide(self):
        found = sizes(network_in_network.network_in_network(), 3, 32, 32)

        maps = [found[name] for name in ("block1", "pool1", "block2", "pool2", "block3", "")]
        assert maps == [(96, 32, 32), (96, 16, 16), (192, 16, 16), (192, 8, 8), (10, 8, 8), (10,)]

    def test_pools_do_not_count_what_is_outside(self):
        pool = network_in_network.network_in_network().pool2

        assert pool(torch.ones(1, 1, 16, 16)).unique().tolist() == [1.0]

    def test_there_is_no_linear_layer(self):
        assert not [module for module in network_in_network.network_in_network().modules() if isinstance(module, nn.Linear)]


class TestSmallInceptionResNet:
    def test_it_has_the_parameters_of_its_description(self):
        network = inception_resnet.inception_resnet_small()

        assert f"{parameters(network):,}" in inception_resnet.InceptionResNet.__doc__

    def test_a_block_adds_a_share_of_its_branch_to_what_it_got(self):
        block = inception_resnet.Block(16).eval()
        x = torch.rand(1, 16, 4, 4)
        nn.init.zeros_(block.join.weight)
        nn.init.ones_(block.join.bias)

        torch.testing.assert_close(block(x), x + 0.2)

    def test_stages_halve_the_side_and_double_the_maps(self):
        found = sizes(inception_resnet.inception_resnet_small(), 3, 32, 32)

        assert [found[f"features.{index}"] for index in (0, 3, 6, 8)] == [(32, 32, 32), (64, 16, 16), (128, 8, 8), (128, 8, 8)]


class TestGoogLeNetOfThePaper:
    def built(self, **args: int) -> nn.Module:
        with torch.device("meta"):
            return torchvision.architecture(ModelTable(name="googlenet", weights="none", args=args)).build(None)

    def test_it_has_the_parameters_of_the_authors_network_but_for_batch_norm(self):
        network = self.built(kernel=5)

        maps = sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        assert parameters(network) - maps == 6_998_552

    def test_every_third_branch_has_a_5x5_kernel_and_the_same_size(self):
        network = self.built(kernel=5)

        blocks = [module for name, module in network.named_children() if name.startswith("inception")]
        assert [block.branch3[1].conv.kernel_size for block in blocks] == [(5, 5)] * 9
        assert network.eval()(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)

    def test_without_the_option_it_is_torchvisions(self):
        assert parameters(self.built()) == parameters(self.built(kernel=3)) == 6_624_904

    def test_nobody_published_weights_for_it(self):
        with pytest.raises(ModelError, match="googlenet has no default weights"):
            models.load(ModelTable(name="googlenet", args={"kernel": 5}))

    def test_another_kernel_is_refused(self):
        with pytest.raises(ModelError, match=r"no kernel of 4(.|\n)*kernel=5"):
            models.load(ModelTable(name="googlenet", weights="none", args={"kernel": 4}))


class TestTheirExport:
    @pytest.mark.parametrize("name", ["lenet5_rgb", "lenet5_1998", "network_in_network", "inception_resnet_small"])
    def test_onnx_answers_like_pytorch(self, tmp_path, name):
        model = models.load(ModelTable(name=name, weights="none"))
        inputs = np.ascontiguousarray(networks.images(8)[:, : model.preprocess.shape[0]])

        made = export.onnx_model(model, inputs, None, ExportTable(), tmp_path)

        assert made.facts["relative_error"] < 1e-5
        answer = onnxruntime.InferenceSession(str(made.path)).run(None, {"image": inputs[:3]})[0]
        np.testing.assert_allclose(answer, model.module(torch.from_numpy(inputs[:3])).detach().numpy(), atol=1e-5)

    def test_local_response_normalisation_answers_like_pytorch(self, tmp_path):
        layers = nn.Conv2d(3, 12, 5, stride=4), nn.ReLU(), alexnet.normalisation(), nn.Flatten(), nn.Linear(588, 5)
        inputs = 30 * networks.images(8)

        made = export.onnx_model(networks.model(nn.Sequential(*layers)), inputs, None, ExportTable(), tmp_path)

        assert made.facts["relative_error"] < 1e-5


def test_every_classic_is_loaded_by_its_name_and_answers_with_its_classes():
    for name, known in CLASSICS.items():
        if known.parameters < 2_000_000:
            model = models.load(ModelTable(name=name, weights="none"), PreprocessTable())
            assert parameters(model.module) == known.parameters
            assert model.num_classes == 10
            with torch.no_grad():
                answer = model.module(torch.rand(1, *model.preprocess.shape))
            assert answer.isfinite().all()


def walk(layers: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    """What each layer answers, in order."""
    answers = []
    for layer in layers:
        x = layer(x)
        answers.append(x)
    return answers
