"""Every recipe that comes with deploykit, run as its user would: by name, in a folder with what its header asks for.

The pictures are few and small and the weights random, so that `--set` takes out what these cannot decide, and what takes minutes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY_NETWORK
from PIL import Image

from deploykit import bundle, cli
from deploykit import recipe as recipes
from deploykit.errors import RecipeError

FOLDER = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
PIXELS = {"preprocess.resize": "64", "preprocess.crop": "64"}
CALIBRATED = {"data.calibration_images": "8", "quantize.speed": "false"}
MEASURED = {"benchmark.processes": "1", "benchmark.queries": "3", "benchmark.offline_seconds": "0"}
UNMEASURED = {"benchmark.enabled": "false"}
RANDOM = {"model.weights": "none", "export.exporter": "legacy", **PIXELS, **CALIBRATED}
UNROUNDED = {"quantize.rounding": "nearest", "quantize.target_sqnr_db": "0"}
ANY_ANSWER = {"gate": '["disagreements <= 8"]'}
SETTINGS: dict[str, dict[str, str]] = {
    "ci_parity": {**CALIBRATED, **ANY_ANSWER},
    "efficientnet_b0_fallback": {**RANDOM, **MEASURED, "gate": "[]"},
    "ensemble": {
        **{**RANDOM, **UNMEASURED, **ANY_ANSWER, **UNROUNDED},
        **{"finetune.epochs": "2", "finetune.views": "1"},
    },
    "finetune_folder": {
        **{**RANDOM, **UNMEASURED, **ANY_ANSWER, **UNROUNDED},
        **{"finetune.epochs": "2", "finetune.head_epochs": "1"},
    },
    "jetson_orin_nano": {**RANDOM, "gate": '["latency <= 5 ms"]'},
    "mobilenet_v2_any_x86": {**RANDOM, **UNMEASURED, "gate": "[]"},
    "own_network": {**CALIBRATED, **UNMEASURED, **ANY_ANSWER},
    "resnet50_tensorrt": {**RANDOM, "gate": "[]"},
    "strange_checkpoint": {**PIXELS, **UNMEASURED},
}


@dataclass(frozen=True)
class Ran:
    """What `deploykit run NAME` answered, and where it left what it made."""

    result: dict[str, Any]
    folder: Path

    @property
    def passed(self) -> set[str]:
        return {gate["rule"].partition(": ")[2] for gate in self.result["gates"] if gate["verdict"] == "pass"}


def pictures(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((72, 72), Image.Resampling.BICUBIC).save(folder / f"{seed}-{index}.png")


@pytest.fixture(scope="module")
def supplied(tmp_path_factory) -> Path:
    """The folder of a user with everything that any recipe wants, small: see the headers."""
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("supplied")
    pictures(folder / "photos", 8, 0)
    for seed, name in enumerate(("n01440764", "n01443537", "n01484850", "n01491361"), 1):
        pictures(folder / "labelled" / name, 2, seed)
    for seed, name in enumerate(("ant", "bee"), 5):
        pictures(folder / "train" / name, 8, seed)
        pictures(folder / "test" / name, 2, seed + 2)
    (folder / "net.py").write_text(TINY_NETWORK)
    names: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(TINY_NETWORK, names)
    torch.manual_seed(0)
    torch.save(names["build"]().state_dict(), folder / "net.pth")
    wrapped = {f"module.{name}": value for name, value in resnet18(num_classes=4).state_dict().items()}
    averaged = {name: value.half() if value.is_floating_point() else value for name, value in wrapped.items()}
    torch.save({"epoch": 7, "state_dict": wrapped, "state_dict_ema": averaged}, folder / "last.ckpt")
    return folder


@pytest.fixture
def ran(supplied, monkeypatch, deploykit) -> Callable[..., Ran]:
    def run(name: str, *words: str) -> Ran:
        monkeypatch.chdir(supplied)
        settings = [word for key, value in SETTINGS[name].items() for word in ("--set", f"{key}={value}")]
        found = deploykit("run", name, *settings, *words, "--json")
        assert found.code == 0, found.err or found.out
        return Ran(json.loads(found.out), supplied / "runs" / name)

    return run


@pytest.mark.slow
class TestEachIsRun:
    def test_resnet50_to_tensorrt_leaves_graphs_by_its_rules_and_a_bundle_where_there_is_no_gpu(self, ran):
        found = ran("resnet50_tensorrt")

        if found.result["device"] is None:
            pytest.skip("wants a machine without TensorRT: on this one the engine was built")
        graph = onnx.load(found.folder / "quantize-tensorrt-fp16" / "model.onnx").graph
        assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
        assert "breaks none of TensorRT's rules" in found.result["device"]["text"]
        assert all("--optShapes=image:8x3x64x64" in engine["next"] for engine in found.result["engines"])
        bundle.require_whole(found.folder / "resnet50_tensorrt.bundle", bundle.check(found.folder / "resnet50_tensorrt.bundle"))

    def test_mobilenet_v2_for_any_x86_has_weights_whose_sums_saturate_nowhere(self, ran):
        found = ran("mobilenet_v2_any_x86")

        made = json.loads((found.folder / "quantize-onnxruntime" / "manifest.json").read_text())
        assert made["facts"]["weight_bits"] == 7
        assert "every layer meant for int8 runs in it" in found.passed

    def test_efficientnet_b0_ends_with_the_fastest_engine_of_int8_and_fp32_on_two_runtimes(self, ran):
        found = ran("efficientnet_b0_fallback")

        chosen = found.result["fastest"]
        assert {chosen["label"], *chosen["over"]} == {
            f"{runtime} {precision}" for runtime in ("onnxruntime", "openvino") for precision in ("fp32", "int8")
        }
        assert (found.folder / chosen["path"]).is_file()

    def test_a_folder_is_learned_and_the_network_that_learned_it_is_quantized(self, ran):
        found = ran("finetune_folder")

        assert found.result["model"]["classes"] == ["ant", "bee"]
        assert len(found.result["finetune"]["history"]) == 2
        assert found.result["evaluated_on"]["images"] == 4
        assert "disagreements <= 8" in found.passed

    def test_a_users_own_network_is_prepared_for_as_the_recipe_says(self, ran):
        found = ran("own_network")

        assert found.result["model"]["input"] == [3, 64, 64]
        assert not found.result["model"]["random"]
        assert found.result["parity"][-1]["accuracy"] is not None

    def test_a_strange_checkpoint_is_unwrapped_and_what_was_done_to_it_is_told(self, ran):
        found = ran("strange_checkpoint")

        assert found.result["model"]["notes"] == [
            "last.ckpt stores float16; the weights were converted to float32",
            "last.ckpt has 4 classes, so the network was built with 4",
        ]
        assert {made["format"] for made in found.result["exports"]} == {"onnx", "torchscript"}

    def test_a_jetson_gets_a_bundle_and_the_rule_of_latency_that_only_it_can_judge(self, ran):
        found = ran("jetson_orin_nano")

        packed = bundle.check(found.folder / "jetson_orin_nano.bundle").manifest
        assert packed.gate == ("latency <= 5 ms",)
        assert "The device is asked for latency <= 5 ms before it switches." in found.result["device"]["text"]
        assert "Orin Nano" in found.result["device"]["text"]
        assert found.result["gates"] == []

    def test_ci_asks_what_no_runner_decides_otherwise(self, ran, supplied):
        found = ran("ci_parity", "--junit", "gates.xml", "--markdown", "summary.md")

        assert {"disagreements <= 8", "every layer meant for int8 runs in it"} <= found.passed
        assert found.result["benchmark"] is None
        assert (supplied / "gates.xml").is_file()
        assert (supplied / "summary.md").is_file()

    def test_an_ensemble_is_one_graph_with_one_input_and_one_output(self, ran):
        found = ran("ensemble")

        graph = onnx.load(found.folder / "quantize-onnxruntime" / "model.onnx").graph
        assert ([one.name for one in graph.input], [one.name for one in graph.output]) == (["image"], ["logits"])
        assert len(found.result["finetune"]["history"]) == 2

    def test_none_is_left_out_here_but_the_demo_which_the_test_of_the_wheel_runs(self):
        assert sorted(SETTINGS) == [name for name in NAMES if name != "lenet_digits"]


@pytest.mark.parametrize("name", NAMES)
class TestEachHeader:
    def test_begins_with_the_sentence_that_people_say_and_the_command(self, name):
        first, *others = header(name).splitlines()

        assert re.match(r'"[A-Z].*', first)
        assert f"deploykit run {name}" in "\n".join(others)

    def test_names_commands_and_options_that_there_are(self, name):
        for line in header(name).splitlines():
            words = shlex.split(line, comments=True) if line.strip().startswith("deploykit ") else []
            if words:
                options = {flag for option in cli.cli.commands[words[1]].params for flag in option.opts}
                assert {word for word in words if word.startswith("--")} <= options

    def test_says_of_every_folder_and_file_that_the_recipe_names_what_it_has_to_be(self, name):
        recipe = recipes.load(FOLDER / f"{name}.toml")

        named = [recipe.model.name.rpartition(":")[0], recipe.model.weights, recipe.data.train, recipe.data.held_out]
        named += [recipe.data.calibrate, recipe.data.validate, recipe.data.root]
        told = {line.split()[0].rstrip("/") for line in header(name).partition("You supply")[2].splitlines()[1:] if line.split()}
        for path in filter(None, named):
            if Path(path).is_absolute():
                assert Path(path).name in told

    def test_lines_are_no_longer_than_a_page_of_text(self, name):
        assert max(map(len, (FOLDER / f"{name}.toml").read_text().splitlines())) <= 130


class TestByName:
    def test_paths_are_those_of_the_folder_where_the_user_is(self, tmp_path, monkeypatch, deploykit):
        monkeypatch.chdir(tmp_path)

        outcome = deploykit("run", "strange_checkpoint")

        assert outcome.code == 2
        assert str(tmp_path / "labelled") in outcome.err

    def test_paths_of_a_copy_are_those_of_the_folder_of_the_copy(self, tmp_path, monkeypatch, deploykit):
        (tmp_path / "mine.toml").write_text((FOLDER / "strange_checkpoint.toml").read_text())
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")

        assert str(tmp_path / "labelled") in deploykit("run", tmp_path / "mine.toml").err


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    return "\n".join(line.removeprefix("# ").removeprefix("#") for line in lines[: lines.index(f'name = "{name}"')])


class TestRecipeCheck:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_recipe_of_ours_is_good_and_every_key_is_told(self, name):
        found = CliRunner().invoke(cli.cli, ["recipe", "check", name, "--json"])

        assert found.exit_code == 0, found.exception
        assert json.loads(found.stdout)["export"]["tolerance"] > 0

    def test_all_that_is_wrong_is_told_at_once(self, tmp_path):
        (tmp_path / "recipe.toml").write_text('[model]\nname = "lenet5"\nwigths = "none"\n[quantize]\nmethod = "magic"\n')
        found = CliRunner().invoke(cli.cli, ["recipe", "check", str(tmp_path / "recipe.toml"), "--set", "export.batch=-1"])

        assert isinstance(found.exception, RecipeError)
        assert found.exception.exit_code == 2
        assert all(word in str(found.exception) for word in ("wigths", "magic", "export.batch"))
