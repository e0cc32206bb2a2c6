"""Networks by name: where they come from, what they take, what they are called."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from textwrap import dedent
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as library

from deploykit import models
from deploykit.errors import DataError, DeploykitError, ModelError
from deploykit.models import cifar_resnet, lenet, torchvision
from deploykit.models.architecture import Architecture
from deploykit.models.checkpoint import StateDict
from deploykit.models.torchvision import imagenet_synsets
from deploykit.recipe import ModelTable, PreprocessTable

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
USER_INPUT = PreprocessTable(crop=8, mean=(0.5,), std=(0.5,), channels="L")


def load(name: str, weights: str = "none", keys: PreprocessTable | None = None, **model: object) -> models.Model:
    data_classes = model.pop("data_classes", None)
    return models.load(ModelTable(name=name, weights=weights, **model), keys or PreprocessTable(), data_classes=data_classes)


def code(path: Path, text: str) -> str:
    path.write_text(dedent(text))
    return str(path)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built_on_meta(architecture: Architecture) -> nn.Module:
    with torch.device("meta"):
        return architecture.build(None)


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network behind it."""

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/hub/checkpoints"


class TestSmallClassics:
    def test_lenet5_has_the_layers_of_the_paper(self):
        network = lenet.lenet5()

        widths = [module.weight.shape[0] for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        assert widths == [6, 16, 120, 84, 10]
        assert parameters(network) == 61_706
        assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)

    @pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
    def test_cifar_resnets_have_the_sizes_of_the_papers_table_6(self, depth, millions):
        with torch.device("meta"):
            network = cifar_resnet.cifar_resnet(depth)

        layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth
        assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)

    def test_option_a_keeps_every_second_pixel_and_adds_empty_channels_on_both_sides(self):
        block = cifar_resnet.Block(2, 4, stride=2).eval()
        nn.init.zeros_(block.bn2.weight)
        x = torch.rand(1, 2, 4, 4)

        y = block(x)

        assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
        assert not y[:, [0, 3]].any()

    def test_checkpoints_of_the_known_port_have_our_names(self):
        names = set(cifar_resnet.cifar_resnet(20).state_dict())

        assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.weight"} <= names

    def test_a_depth_that_is_not_6n_plus_2_is_no_cifar_resnet(self):
        with pytest.raises(ValueError, match="6n \\+ 2"):
            cifar_resnet.cifar_resnet(18)

    def test_they_have_no_default_weights(self):
        with pytest.raises(ModelError, match=r"lenet5 has no default weights(.|\n)*none"):
            load("lenet5", "default")

    def test_lenet5_takes_colour_when_asked(self):
        model = load("lenet5", keys=PreprocessTable(channels="RGB", mean=(0.5,) * 3, std=(0.5,) * 3))

        assert model.preprocess.shape == (3, 32, 32)
        assert model.module.conv1.in_channels == 3


class TestCatalogue:
    def test_it_lists_every_classifier_of_torchvision_and_ours(self):
        names = [entry.name for entry in models.catalogue()]

        assert set(library.list_models(module=library)) | {"lenet5", "cifar_resnet110"} <= set(names)
        assert len(names) == len(set(names))

    def test_it_builds_no_network(self, monkeypatch):
        for kind in (nn.Conv2d, nn.Linear):
            monkeypatch.setattr(kind, "__init__", lambda *_, **__: pytest.fail("a network was built"))

        assert models.catalogue()

    def test_our_own_sizes_are_those_of_the_networks(self):
        for entry in models.catalogue():
            if entry.source == "deploykit":
                module = load(entry.name).module
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    module(torch.zeros(1, *entry.input_size))
                assert entry.parameters == parameters(module)
                assert entry.gmacs == pytest.approx(counter.get_total_flops() / 2e9, rel=2e-3)

    @pytest.mark.parametrize("name", ["resnet50", "googlenet", "inception_v3"])
    def test_torchvisions_parameters_are_those_of_the_deployed_network(self, name):
        entry = next(entry for entry in models.catalogue() if entry.name == name)

        assert entry.parameters == parameters(built_on_meta(torchvision.architecture(ModelTable(name=name))))

    def test_an_entry_says_input_weights_and_work(self):
        entry = next(entry for entry in models.catalogue() if entry.name == "resnet50")

        assert entry == models.Entry(
            "resnet50", "torchvision", 25_557_032, (3, 224, 224), "ResNet50_Weights.IMAGENET1K_V2", 4.089
        )


class TestNames:
    @pytest.mark.parametrize(("name", "near"), [("resnet5O", "resnet50"), ("MobileNet-v2", "mobilenet_v2"), ("lenet", "lenet5")])
    def test_an_unknown_name_is_answered_with_the_nearest(self, name, near):
        with pytest.raises(ModelError, match=rf"no model '{name}'(.|\n)*{near}(.|\n)*deploykit models"):
            load(name)

    def test_a_file_without_a_factory_is_told_how_to_name_one(self):
        with pytest.raises(ModelError, match=r"mynet\.py:FACTORY"):
            load("mynet.py")

    def test_a_detector_says_that_it_is_no_classifier(self):
        tasks = {entry.name: entry.task for entry in models.catalogue()}

        assert (tasks["ssd300_vgg16"], tasks["fcn_resnet50"], tasks["r3d_18"]) == ("detect", "segment", "clips")
        assert tasks["resnet18"] == "classify"


class TestTorchvision:
    def test_the_default_weights_are_taken_from_torchs_cache(self, torch_home):
        wanted = library.squeezenet1_1().state_dict()
        torch.save(wanted, torch_home / "squeezenet1_1-b8a52dc0.pth")

        model = load("squeezenet1_1", "default")

        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.module.state_dict().items())
        assert model.weights == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
        assert (model.is_random, model.num_classes, model.classes[0]) == (False, 1000, "tench")
        assert "SHA-256" in model.notes[0]

    def test_weights_that_cannot_be_fetched_name_file_url_and_place(self, torch_home):
        with pytest.raises(DeploykitError) as caught:
            load("squeezenet1_1", "default")

        assert caught.value.exit_code == 1
        text = str(caught.value)
        assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in text
        assert "no route to host" in text
        assert str(torch_home / "squeezenet1_1-b8a52dc0.pth") in text
        assert "--weights FILE" in text

    def test_a_download_writes_nothing_to_stdout(self, torch_home, capsys):
        with pytest.raises(DeploykitError):
            load("squeezenet1_1", "default")

        assert capsys.readouterr().out == ""

    def test_a_damaged_file_in_the_cache_is_named(self, torch_home):
        (torch_home / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"<html>captive portal")

        with pytest.raises(ModelError, match=r"squeezenet1_1-b8a52dc0\.pth(.|\n)*web page"):
            load("squeezenet1_1", "default")

    def test_the_preset_of_the_default_weights_is_the_preprocessing_for_any_weights(self):
        model = load("efficientnet_b1")

        assert (model.preprocess.resize, model.preprocess.crop) == (255, (240, 240))
        assert (model.preprocess.mean, model.preprocess.std) == (IMAGENET["mean"], IMAGENET["std"])
        assert (model.preprocess.interpolation, model.preprocess.channels) == ("bilinear", "RGB")

    def test_no_picture_is_computed_to_count_the_classes_of_a_torchvision_network(self):
        devices: set[str] = set()
        with torch.nn.modules.module.register_module_forward_pre_hook(
            lambda _, given: devices.update(str(value.device) for value in given)
        ):
            model = load("squeezenet1_1", classes=7)

        assert devices == {"meta"}
        assert model.num_classes == 7
        assert {str(value.device) for value in model.module.state_dict().values()} == {"cpu"}

    def test_a_checkpoint_with_ten_classes_makes_a_network_with_ten(self, tmp_path):
        torch.save(library.squeezenet1_1(num_classes=10).state_dict(), tmp_path / "ten.pth")

        model = load("squeezenet1_1", str(tmp_path / "ten.pth"), data_classes=list("abcdefghij"))

        digest = hashlib.sha256((tmp_path / "ten.pth").read_bytes()).hexdigest()
        assert (model.num_classes, model.classes) == (10, tuple("abcdefghij"))
        assert model.notes == ("ten.pth has 10 classes, so the network was built with 10",)
        assert model.weights == f"ten.pth (sha256 {digest[:12]}...)"

    def test_a_checkpoint_that_contradicts_model_classes_is_refused(self, tmp_path):
        torch.save(library.squeezenet1_1(num_classes=10).state_dict(), tmp_path / "ten.pth")

        with pytest.raises(ModelError, match=r"10 classes \(tensor classifier\.1\.weight\), the network has 5"):
            load("squeezenet1_1", str(tmp_path / "ten.pth"), classes=5)

    def test_auxiliary_heads_are_left_out_of_files_too(self, tmp_path):
        trained = library.googlenet(aux_logits=True, init_weights=False, num_classes=3)
        torch.save(trained.state_dict(), tmp_path / "own.pth")

        model = load("googlenet", str(tmp_path / "own.pth"), PreprocessTable(crop=64))

        assert model.num_classes == 3
        assert model.module.aux1 is None
        assert torch.equal(model.module.fc.weight, trained.fc.weight)
        assert any("auxiliary" in note for note in model.notes)

    @pytest.mark.parametrize(("weights", "transforms"), [("default", True), ("none", False), ("own.pth", False)])
    def test_inceptions_input_transform_belongs_to_the_published_weights(self, weights, transforms):
        architecture = torchvision.architecture(ModelTable(name="inception_v3", weights=weights))

        assert built_on_meta(architecture).transform_input is transforms
        assert any("transform_input is off" in note for note in architecture.notes) is (weights == "own.pth")

    def test_a_published_file_is_known_by_the_digest_in_its_name(self, tmp_path, monkeypatch):
        published = library.get_model_weights("googlenet").DEFAULT
        (tmp_path / "some.pth").write_bytes(b"not the published bytes")
        assert not torchvision.is_published(tmp_path / "some.pth", published)

        monkeypatch.setattr(torchvision, "digest_file", lambda _: "1378be20" + 56 * "0")
        assert torchvision.is_published(tmp_path / "some.pth", published)

    def test_old_names_in_densenet_files_are_understood(self):
        architecture = torchvision.architecture(ModelTable(name="densenet121"))
        wanted = built_on_meta(architecture).state_dict()
        old = {re.sub(r"(denselayer.*\.(?:norm|conv))(\d)", r"\1.\2", name): tensor for name, tensor in wanted.items()}

        assert "features.denseblock1.denselayer1.norm.1.weight" in old
        assert set(architecture.adapt(StateDict(old))) == set(wanted)

    def test_mnasnet_files_without_a_version_are_of_todays_layout(self, tmp_path):
        wanted = library.mnasnet0_5(num_classes=2).state_dict()
        torch.save(dict(wanted), tmp_path / "plain.pth")

        model = load("mnasnet0_5", str(tmp_path / "plain.pth"), PreprocessTable(crop=32), classes=2)

        assert torch.equal(model.module.state_dict()["layers.0.weight"], wanted["layers.0.weight"])

    def test_outputs_that_nobody_trained_are_named_by_the_data(self):
        names = [f"thing {index}" for index in range(1000)]

        assert load("squeezenet1_1", data_classes=names).classes == tuple(names)
        assert load("squeezenet1_1").classes[0] == "tench"

    def test_there_are_1000_synsets_in_class_order(self):
        synsets = imagenet_synsets()

        assert len(set(synsets)) == 1000
        assert list(synsets) == sorted(synsets)
        assert (synsets[0], synsets[207], synsets[999]) == ("n01440764", "n02099601", "n15075141")


class TestRandomWeights:
    def test_the_seed_alone_decides_them(self):
        torch.manual_seed(7)
        first = load("lenet5", seed=1).module.state_dict()
        torch.manual_seed(8)
        second, third = load("lenet5", seed=1).module.state_dict(), load("lenet5", seed=2).module.state_dict()

        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["fc1.weight"], third["fc1.weight"])

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()

        load("lenet5")

        assert torch.equal(torch.get_rng_state(), before)

    def test_they_are_called_random(self):
        model = load("lenet5", seed=3)

        assert (model.weights, model.is_random) == ("random weights (seed 3)", True)
        assert not model.module.training

    def test_the_data_says_how_many_classes_unless_the_recipe_does(self):
        assert load("lenet5", data_classes=["a", "b", "c"]).classes == ("a", "b", "c")
        assert load("lenet5", data_classes=["a", "b", "c"], classes=4).num_classes == 4
        assert load("lenet5", data_classes=["a", "b", "c"], classes=4).classes == ()
        assert load("lenet5").num_classes == 10


class TestPreprocess:
    def test_every_key_of_the_recipe_overrides_what_comes_with_the_weights(self):
        keys = PreprocessTable(
            resize=70, crop=64, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), channels="RGB", interpolation="nearest", fit="crop"
        )

        preprocess = load("squeezenet1_1", keys=keys).preprocess

        assert (preprocess.resize, preprocess.crop, preprocess.interpolation) == (70, (64, 64), "nearest")
        assert (preprocess.mean, preprocess.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))

    def test_another_crop_keeps_the_field_of_view_and_says_so(self):
        model = load("squeezenet1_1", keys=PreprocessTable(crop=112))

        assert model.preprocess.resize == 128
        assert any("resized to 128" in note for note in model.notes)

    def test_the_same_crop_changes_nothing(self):
        assert load("squeezenet1_1", keys=PreprocessTable(crop=224)).preprocess == load("squeezenet1_1").preprocess
        assert load("cifar_resnet20", keys=PreprocessTable(crop=32)).preprocess.resize is None

    def test_stretching_needs_no_resize(self):
        assert load("squeezenet1_1", keys=PreprocessTable(fit="stretch")).preprocess.resize == 224

    @pytest.mark.parametrize(
        ("keys", "problem"),
        [
            (PreprocessTable(channels="L"), "preprocess.mean has 3 values for 1 channel"),
            (PreprocessTable(std=(1.0,)), "preprocess.std has 1 value for 3 channels"),
            (PreprocessTable(resize=64), "resize = 64 is smaller than preprocess.crop = 224"),
            (PreprocessTable(resize=256, fit="stretch"), "remove preprocess.resize"),
        ],
    )
    def test_keys_that_contradict_each_other_are_refused(self, keys, problem):
        with pytest.raises(ModelError, match=problem):
            load("squeezenet1_1", keys=keys)

    @pytest.mark.parametrize(
        "keys", [PreprocessTable(crop=8), PreprocessTable(channels="L", mean=(0.5,), std=(0.5,))], ids=["too small", "grey"]
    )
    def test_an_input_that_the_network_cannot_take_is_refused(self, keys):
        with pytest.raises(ModelError, match="squeezenet1_1 cannot take an input of"):
            load("squeezenet1_1", keys=keys)


class TestUserCode:
    NET = """
        import torch
        from torch import nn

        def build(num_classes=3):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        """

    def test_a_file_and_its_factory_make_a_network(self, tmp_path):
        model = load(f"{code(tmp_path / 'net.py', self.NET)}:build", "default", USER_INPUT)

        assert (model.num_classes, model.is_random) == (3, False)
        assert model.preprocess.resize == 8

    def test_a_module_in_the_current_directory_makes_a_network(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "userpackage").mkdir()
        code(tmp_path / "userpackage/nets.py", self.NET)

        assert load("userpackage.nets:build", keys=USER_INPUT).num_classes == 3

    def test_a_file_may_import_its_neighbours(self, tmp_path):
        code(tmp_path / "neighbour_blocks.py", "WIDTH = 64\n")
        path = code(
            tmp_path / "net.py", self.NET.replace("64", "WIDTH").replace("import torch\n", "from neighbour_blocks import WIDTH\n")
        )

        assert load(f"{path}:build", keys=USER_INPUT).num_classes == 3

    def test_a_factory_that_insists_on_num_classes_gets_that_of_the_weights(self, tmp_path):
        path = code(tmp_path / "net.py", self.NET.replace("num_classes=3", "num_classes"))
        torch.save({"1.weight": torch.ones(7, 64), "1.bias": torch.zeros(7)}, tmp_path / "net.pth")

        assert load(f"{path}:build", str(tmp_path / "net.pth"), USER_INPUT).num_classes == 7
        assert load(f"{path}:build", keys=USER_INPUT, classes=5).num_classes == 5
        with pytest.raises(
            ModelError, match=r"(?s)cannot be called with no arguments.*--classes N \(model.classes\); build\(num_classes"
        ):
            load(f"{path}:build", keys=USER_INPUT)

    def test_num_classes_is_passed_when_it_is_asked_for_and_taken(self, tmp_path):
        assert load(f"{code(tmp_path / 'net.py', self.NET)}:build", keys=USER_INPUT, classes=5).num_classes == 5

    def test_another_number_of_classes_than_asked_for_is_refused(self, tmp_path):
        path = code(tmp_path / "net.py", self.NET.replace("num_classes=3", "").replace("num_classes", "3"))

        assert load(f"{path}:build", keys=USER_INPUT, classes=3).num_classes == 3
        with pytest.raises(ModelError, match=r"has 3 classes(.|\n)*model.classes = 5"):
            load(f"{path}:build", keys=USER_INPUT, classes=5)

    def test_the_data_does_not_change_a_users_network(self, tmp_path):
        model = load(f"{code(tmp_path / 'net.py', self.NET)}:build", keys=USER_INPUT, data_classes=["a", "b"])

        assert (model.num_classes, model.classes) == (3, ())

    def test_a_checkpoint_gives_it_weights_and_classes(self, tmp_path):
        path = code(tmp_path / "net.py", self.NET)
        wanted = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)).state_dict()
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in wanted.items()}}, tmp_path / "best.pth")

        model = load(f"{path}:build", str(tmp_path / "best.pth"), USER_INPUT)

        assert torch.equal(model.module[1].weight, wanted["1.weight"])
        assert model.num_classes == 6

    def test_without_preprocessing_the_missing_keys_are_named(self, tmp_path):
        with pytest.raises(ModelError, match=r"preprocess\.crop, preprocess\.std in the recipe"):
            load(f"{code(tmp_path / 'net.py', self.NET)}:build", keys=PreprocessTable(mean=(0.5,)))

    def test_a_network_may_bring_its_preprocessing(self, tmp_path):
        text = """
            from torch import nn

            def build():
                network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
                network.preprocess = {"crop": 8, "resize": 9, "mean": (0.5,), "std": [0.25], "channels": "L"}
                return network
            """
        preprocess = load(f"{code(tmp_path / 'net.py', text)}:build", keys=PreprocessTable(std=(1.0,))).preprocess

        assert (preprocess.resize, preprocess.crop, preprocess.mean, preprocess.std) == (9, (8, 8), (0.5,), (1.0,))

    def test_preprocessing_with_unknown_keys_is_refused(self, tmp_path):
        text = """
            from torch import nn

            class Net(nn.Linear):
                preprocess = {"size": 8, "mean": "grey"}

                def __init__(self):
                    super().__init__(2, 2)
            """
        with pytest.raises(ModelError, match=r"unknown key 'size'(.|\n)*preprocess.mean"):
            load(f"{code(tmp_path / 'net.py', text)}:Net")

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("import torch\n\nraise RuntimeError('boom')\n", r"RuntimeError: boom, at .*net\.py:3"),
            ("def build():\n    x = 1\n    return x / 0\n", r"ZeroDivisionError: .*, at .*net\.py:3 in build"),
            ("def build(:\n", r"SyntaxError: .*, at .*net\.py:1"),
            ("import sys\nsys.exit('usage: train.py')\n", r"SystemExit: usage.*net\.py:2"),
            ("import surely_not_installed\n", r"No module named 'surely_not_installed', at .*net\.py:1"),
        ],
    )
    def test_errors_in_the_users_code_say_the_users_line(self, tmp_path, text, where):
        with pytest.raises(ModelError, match=where) as caught:
            load(f"{code(tmp_path / 'net.py', text)}:build")
        assert "deploykit/models" not in str(caught.value)

    def test_an_error_in_forward_says_the_users_line(self, tmp_path):
        text = """
            from torch import nn

            class Net(nn.Module):
                def forward(self, x):
                    return x.no_such_method()
            """
        with pytest.raises(ModelError, match=r"1x8x8(.|\n)*net\.py:6 in forward"):
            load(f"{code(tmp_path / 'net.py', text)}:Net", keys=USER_INPUT)

    def test_an_error_while_importing_a_module_says_the_users_line(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code(tmp_path / "broken_user_module.py", "x = 1\ny = x.z\n")

        with pytest.raises(ModelError, match=r"AttributeError.*broken_user_module\.py:2"):
            load("broken_user_module:build")

    def test_a_missing_factory_is_answered_with_what_the_file_defines(self, tmp_path):
        with pytest.raises(ModelError, match=r"has no 'biuld'(.|\n)*it defines build"):
            load(f"{code(tmp_path / 'net.py', self.NET)}:biuld")

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("def build():\n    return {}\n", "returned a dict"),
            ("from torch import nn\n\nbuild = nn.Linear(2, 2)\n", "is a Linear, not a factory"),
            ("build = 3\n", "is a int, not a factory"),
        ],
    )
    def test_what_is_not_a_factory_of_networks_is_refused(self, tmp_path, text, problem):
        with pytest.raises(ModelError, match=problem):
            load(f"{code(tmp_path / 'net.py', text)}:build")

    def test_a_file_or_module_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(ModelError, match=r"nowhere\.py(.|\n)*no such file"):
            load(f"{tmp_path}/nowhere.py:build")
        with pytest.raises(ModelError, match="no module surely_not_installed"):
            load("surely_not_installed.nets:build")

    def test_a_network_that_answers_with_several_tensors_is_refused(self, tmp_path):
        text = """
            from torch import nn

            class Net(nn.Module):
                def forward(self, x):
                    return x, x
            """
        with pytest.raises(ModelError, match="with a tuple, not with 1xCLASSES"):
            load(f"{code(tmp_path / 'net.py', text)}:Net", keys=USER_INPUT)

    def test_what_the_code_prints_stays_out_of_stdout(self, tmp_path, capsys):
        load(f"{code(tmp_path / 'net.py', 'print(1)' + chr(10) + dedent(self.NET))}:build", keys=USER_INPUT)

        assert capsys.readouterr().out == ""

    def test_a_half_precision_network_becomes_float32_with_a_note(self, tmp_path):
        model = load(f"{code(tmp_path / 'net.py', self.NET.replace('))', ')).half()'))}:build", keys=USER_INPUT)

        assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
        assert "the network was in float16 and was converted to float32" in model.notes

    def test_the_code_does_not_stay_on_the_import_path(self, tmp_path):
        before = list(sys.path)
        load(f"{code(tmp_path / 'net.py', self.NET)}:build", keys=USER_INPUT)

        assert sys.path == before


class TestBatchNormCalibration:
    def batches(self, *sizes: int) -> list[np.ndarray]:
        generator = np.random.default_rng(0)
        return [generator.normal(3, 2, (size, 3, 32, 32)).astype(np.float32) for size in sizes]

    def test_statistics_become_the_average_over_the_batches(self):
        model, batches = load("cifar_resnet20"), self.batches(4, 4)

        models.calibrate_batch_norm(model, batches)

        with torch.no_grad():
            means = [model.module.conv1(torch.tensor(batch)).mean((0, 2, 3)) for batch in batches]
        torch.testing.assert_close(model.module.bn1.running_mean, sum(means) / 2, atol=1e-5, rtol=1e-5)
        assert model.module.bn1.momentum == 0.1

    def test_nothing_is_left_in_train_mode_and_no_gradient_was_computed(self):
        model = load("cifar_resnet20")

        models.calibrate_batch_norm(model, self.batches(2))

        assert not any(module.training for module in model.module.modules())
        assert all(parameter.grad is None for parameter in model.module.parameters())

    def test_only_batch_norm_is_in_train_mode_meanwhile(self):
        model = load("cifar_resnet20")
        seen: list[bool] = []
        model.module.pool.register_forward_hook(lambda module, *_: seen.append(module.training))

        models.calibrate_batch_norm(model, self.batches(2))

        assert seen == [False]

    def test_a_single_image_joins_its_neighbour(self):
        joined, together = load("cifar_resnet20"), load("cifar_resnet20")
        first, last = self.batches(3, 1)

        models.calibrate_batch_norm(joined, [first, last])
        models.calibrate_batch_norm(together, [np.concatenate([first, last])])

        assert torch.equal(joined.module.bn1.running_var, together.module.bn1.running_var)

    @pytest.mark.parametrize("sizes", [(), (0,), (1,), (1, 0)])
    def test_fewer_than_two_images_are_refused(self, sizes):
        with pytest.raises(DataError, match="at least two images"):
            models.calibrate_batch_norm(load("cifar_resnet20"), self.batches(*sizes))

    def test_trained_statistics_are_never_touched(self, tmp_path):
        torch.save(cifar_resnet.cifar_resnet(20).state_dict(), tmp_path / "net.pth")

        with pytest.raises(ModelError, match="keeps its BatchNorm statistics"):
            models.calibrate_batch_norm(load("cifar_resnet20", str(tmp_path / "net.pth")), self.batches(2))

    def test_a_network_without_batch_norm_stays_as_it_is(self):
        model = load("lenet5")

        models.calibrate_batch_norm(model, [])

        assert not model.module.training
