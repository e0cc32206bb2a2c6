"""What a user gets for input that cannot be used: the reason, what to do, exit code 2, and nothing half-written.

What the machine itself refuses (a full disk, a folder that is read-only) is exit code 1.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from deploykit import recipe as recipes
from deploykit.artifact import read_artifact
from deploykit.cli import make


class TouchesAMarker:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's current directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(deploykit, work) -> Callable[..., str]:
    """Run a command line that must be refused, and give its message, on one line; `out` may be left empty at most."""

    def run(*words: object, code: int = 2) -> str:
        before = sorted(work.rglob("*"))
        outcome = deploykit(*words)
        assert (outcome.code, outcome.out) == (code, ""), outcome.err
        new = [path for path in work.rglob("*") if path not in before]
        assert [path for path in new if path.is_file() and path.name != ".lock"] == []
        return " ".join(outcome.err.split())

    return run


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system in memory with the given options."""
    places: list[Path] = []

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode != 0:
            pytest.skip("wants to mount a small file system, which needs root")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", place], check=True)


class TestModels:
    def test_an_unknown_name_is_answered_with_the_nearest_ones(self, refused):
        message = refused("export", "resnet51", "--to", "onnx")

        assert "there is no model 'resnet51'" in message
        assert "the nearest names are resnet50" in message
        assert "deploykit models lists all names" in message

    def test_a_file_without_a_factory_says_how_to_name_one(self, refused, network):
        assert "tiny_net.py:FACTORY" in refused("export", network.rpartition(":")[0], "--to", "onnx")

    def test_code_that_raises_is_shown_with_its_line(self, refused, work):
        (work / "net.py").write_text("def build():\n    return 1 / 0\n")

        message = refused("export", "net.py:build", "--to", "onnx")

        assert "ZeroDivisionError: division by zero" in message
        assert "net.py:2 in build" in message

    def test_a_network_without_default_weights_says_which_options_there_are(self, refused):
        message = refused("export", "lenet5", "--to", "onnx")

        assert "lenet5 has no default weights" in message
        assert "--weights none for random weights" in message


class TestWeights:
    def test_a_missing_file_is_named(self, refused):
        message = refused("export", "lenet5", "--weights", "nowhere.pth", "--to", "onnx")

        assert "nowhere.pth" in message
        assert "no such file" in message

    def test_a_directory_is_not_a_checkpoint(self, refused, photos):
        assert "it is a directory" in refused("export", "lenet5", "--weights", photos, "--to", "onnx")

    def test_a_truncated_file_is_named(self, refused, trained, tmp_path):
        (tmp_path / "cut.pth").write_bytes(trained.read_bytes()[:5000])

        assert "cut.pth" in refused("export", "lenet5", "--weights", tmp_path / "cut.pth", "--to", "onnx")

    def test_a_pickled_module_is_refused_with_what_to_save_instead(self, refused, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")

        message = refused("export", "lenet5", "--weights", tmp_path / "whole.pth", "--to", "onnx")

        assert "torch.nn.modules.linear.Linear" in message
        assert "model.state_dict()" in message

    def test_a_malicious_pickle_never_runs(self, refused, tmp_path):
        marker = tmp_path / "marker"
        torch.save({"weight": torch.ones(1), "payload": TouchesAMarker(marker)}, tmp_path / "evil.pth")
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(TouchesAMarker(marker)))

        for name in ("evil.pth", "evil.pkl"):
            assert "evil" in refused("export", "lenet5", "--weights", tmp_path / name, "--to", "onnx")

        assert not marker.exists()

    def test_a_wrong_number_of_classes_names_both(self, refused, trained):
        message = refused("export", "lenet5", "--weights", trained, "--classes", "7", "--to", "onnx")

        assert "10 classes" in message
        assert "the network has 7" in message

    def test_weights_of_another_network_are_named_tensor_by_tensor(self, refused, trained):
        message = refused("export", "cifar_resnet20", "--weights", trained, "--to", "onnx")

        assert "lenet5.pth does not fit" in message
        assert "unexpected: conv2" in message


class TestPictures:
    @pytest.fixture
    def folder(self, photos, tmp_path) -> Path:
        return shutil.copytree(photos, tmp_path / "folder")

    @pytest.fixture
    def quantize(self, network) -> list[str]:
        return ["export", network, "--to", "onnxruntime", "--int8", "--engine", "skip"]

    def test_an_empty_folder_is_named(self, refused, quantize, tmp_path):
        (tmp_path / "empty").mkdir()

        assert f"there are no images in {tmp_path}/empty" in refused(*quantize, "--calibrate", tmp_path / "empty")

    def test_a_folder_that_does_not_exist_is_named(self, refused, quantize):
        message = refused(*quantize, "--calibrate", "nowhere")

        assert "cannot read the folder of images" in message
        assert "nowhere why: no such file or directory" in message

    def test_a_file_is_not_a_folder(self, refused, quantize, photos):
        assert "not a directory" in refused(*quantize, "--calibrate", photos / "00.jpg")

    def test_every_bad_file_among_good_ones_is_named_before_any_work(self, refused, quantize, folder):
        (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-300])
        (folder / "text.png").write_text("not a picture")
        (folder / "empty.jpg").touch()

        message = refused(*quantize, "--calibrate", folder)

        assert "text.png" in message
        assert "empty.jpg" in message
        assert "--skip-bad-images" in message
        (folder / "text.png").unlink()
        (folder / "empty.jpg").unlink()
        assert "cut.jpg" in refused(*quantize, "--calibrate", folder)

    def test_bad_files_are_left_out_only_when_that_is_allowed_and_are_counted(self, deploykit, quantize, folder, tmp_path):
        (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:-300])
        (folder / "text.png").write_text("not a picture")

        outcome = deploykit(*quantize, "--calibrate", folder, "--skip-bad-images", "--output", tmp_path / "out")

        assert outcome.code == 0, outcome.err
        assert "2 bad images were left out: " in outcome.out
        assert "cut.jpg" in outcome.out
        assert "text.png" in outcome.out
        assert "only 12 calibration images" in outcome.out

    def test_photographs_of_every_kind_can_be_used(self, deploykit, quantize, tmp_path):
        folder = tmp_path / "kinds"
        folder.mkdir()
        pixels = np.arange(40 * 30, dtype=np.uint8).reshape(40, 30)
        Image.fromarray(pixels).save(folder / "grey.png")
        Image.fromarray(np.stack([pixels] * 3, axis=-1)).convert("CMYK").save(folder / "print.jpg")
        Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / "deep.png")
        rotated = Image.fromarray(np.stack([pixels] * 3, axis=-1))
        exif = rotated.getexif()
        exif[0x0112] = 6
        rotated.save(folder / "rotated.jpg", exif=exif)
        rotated.convert("P").save(folder / "palette.png")

        outcome = deploykit(*quantize, "--calibrate", folder, "--output", tmp_path / "out")

        assert outcome.code == 0, outcome.err
        assert "only 5 calibration images" in outcome.out

    def test_labelled_folders_that_are_not_as_many_as_the_classes_are_refused(self, refused, trained, labelled):
        message = refused("export", "lenet5", "--weights", trained, "--to", "onnx", "--validate", labelled)

        assert "it has 4 sub-folders, lenet5 has 10 classes, and nothing says which is which" in message


class TestRecipes:
    def test_all_problems_are_reported_at_once(self, refused, work):
        (work / "bad.toml").write_text(
            'name = 3\ncolour = "red"\ngate = ["drop < 1"]\n[model]\nname = "lenet5"\nweight = "x"\n'
            '[export]\nbatch = 0\nopset = "new"\n[benchmark]\nprocesses = 0\nqueries = 1.5\n[build]\nengine = "maybe"\n'
        )

        message = refused("run", "bad.toml")

        assert "bad.toml has 8 problems" in message
        for problem in (
            "name: expected text, got 3",
            "unknown key 'colour'",
            "[model]: unknown key 'weight'; did you mean 'weights'?",
            "export.batch: 0 is not between 1 and 65536",
            "export.opset: expected 19, got 'new'",
            "benchmark.processes: 0 is not between 1 and 1000",
            "benchmark.queries: expected a whole number, got 1.5",
            "build.engine: expected 'auto' or 'require' or 'skip', got 'maybe'",
        ):
            assert problem in message

    def test_text_that_is_not_toml_is_refused_with_the_line(self, refused, work):
        (work / "bad.toml").write_text('name = "x"\n[model\n')

        message = refused("run", "bad.toml")

        assert "bad.toml is not valid TOML" in message
        assert "line 2" in message

    def test_bytes_that_are_not_text_are_refused(self, refused, work):
        (work / "bad.toml").write_bytes(b"\xff\xfe\x00")

        assert "bad.toml is not valid TOML" in refused("run", "bad.toml")

    def test_a_missing_recipe_is_named(self, refused):
        assert "cannot read the recipe nowhere.toml why: no such file or directory" in refused("run", "nowhere.toml")

    def test_a_folder_is_not_a_recipe(self, refused, photos):
        assert "is a directory" in refused("run", photos)

    @pytest.mark.parametrize("text", ["nonsense", "=3", ""])
    def test_set_says_its_form(self, refused, tiny_recipe, text):
        assert f"--set {text!r} is not of the form TABLE.KEY=VALUE" in refused("run", tiny_recipe, "--set", text)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("finetune.epochs=many", "finetune.epochs: expected a whole number, got 'many'"),
            ("finetune.epochs=0", "finetune.epochs: 0 is not between 1 and 10000"),
            ("finetune.epoch=1", "[finetune]: unknown key 'epoch'; did you mean 'epochs'?"),
            ("nothing.here=1", "unknown key 'nothing'"),
            ("data.seed.deep=1", "data.seed: expected a whole number, got {'deep': 1}"),
        ],
    )
    def test_what_set_sets_is_checked_like_the_recipe(self, refused, tiny_recipe, text, problem):
        assert problem in refused("run", tiny_recipe, "--set", text)


class TestOptions:
    def test_a_gate_is_a_number_of_points_or_any_rule_and_there_may_be_several(self):
        words = (".5", "1", "agreement >= 99 %", "latency <= 5 ms")

        assert make._rules_of(words) == ["drop <= 0.5 points", "drop <= 1 points", *words[2:]]

    @pytest.mark.parametrize("name", ["x" * 300, "none"])
    def test_a_folder_of_images_that_cannot_be_there_is_refused(self, refused, name):
        assert "cannot read the folder of images" in refused("export", "lenet5", "--to", "onnx", "--calibrate", name)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--to", "torchscript", "--int8"], "--int8 --to torchscript: TorchScript holds no Q/DQ"),
            (["--to", "onnx", "--int8"], "--int8 --to onnx: Q/DQ follows a runtime's rules"),
            (
                ["--to", "tensorrt", "--to", "onnxruntime", "--fp16"],
                '(--fp16) with build.runtimes "onnxruntime", which has fp32: on a',
            ),
            (["--to", "openvino", "--tf32"], '(--tf32) with build.runtimes "openvino", which has fp32: its engines here'),
            (["--to", "tensorrt", "--bf16"], "graphs have opset 19, in which no convolution is of bfloat16"),
            (["--to", "onnxruntime_cuda", "--bf16"], "graphs have opset 19, in which no convolution is of bfloat16"),
            (["--to", "torchscript", "--fp16"], "(--fp16) is of engines, and no runtime is named"),
            (["--to", "torchscript_cuda", "--fp16", "--bf16"], "--fp16 --bf16: engines of one run compute in one float type"),
            (["--to", "onnxruntime_cuda", "--int8"], "it has no INT8, for its CUDA kernels compute in float between Q and DQ"),
            (["--to", "torchscript_cuda", "--int8"], "it has no INT8, for TorchScript holds no Q/DQ"),
            (["--to", "onnxruntime", "--fp32", "--int8"], "--fp32 together with another precision"),
            (["--to", "onnxruntime", "--int8"], "set data.calibrate (--calibrate DIR)"),
            (["--to", "onnxruntime", "--int8", "--calibrate", ".", "--gate", "1"], "set data.validate (--validate DIR)"),
            (["--to", "onnxruntime", "--gate", "1"], "compares INT8 with FP32, but there is no [quantize] table"),
            (["--to", "onnx", "--batch", "0"], "export.batch: 0 is not between 1 and 65536"),
            (["--to", "onnx", "--batch", "x"], "export.batch: expected a whole number or 'dynamic', got 'x'"),
            (["--to", "onnx", "--classes", "-1"], "Invalid value for '--classes'"),
            (["--to", "onnx", "--weights", ""], "model.weights"),
            (["--to", "coreml"], "'coreml' is not one of 'onnx', 'torchscript', 'onnxruntime', 'openvino', 'tensorrt'"),
            (["--to", "onnx", "--gate", "101"], "--gate 101: 'drop <= 101 points': no drop is above 100 points"),
            (["--to", "onnx", "--gate", "nonsense"], "--gate nonsense: 'nonsense' is not a gate rule such as 'drop <= 0.5"),
            (["--to", "onnx", "--gate", "nan"], "--gate nan: "),
            (["--to", "onnx", "--gate", "-1"], "--gate -1: "),
            (["--to", "onnx", "--unknown"], "No such option"),
            ([], "Missing option '--to'"),
        ],
    )
    def test_what_has_no_meaning_is_refused_with_the_reason(self, refused, words, message):
        assert message in refused("export", "lenet5", *words)


class TestOutputFolders:
    def test_a_file_is_not_an_output_folder(self, refused, network, work):
        (work / "out").touch()

        assert "out is a file, not a folder" in refused("export", network, "--to", "onnx", "--output", "out")

    def test_a_folder_below_a_file_cannot_be_made(self, refused, network, work):
        (work / "out").touch()

        assert "part of that path is a file" in refused("export", network, "--to", "onnx", "--output", "out/deep", code=1)

    def test_a_folder_with_other_files_is_refused(self, refused, network, work):
        (work / "thesis.txt").touch()

        message = refused("export", network, "--to", "onnx", "--output", ".")

        assert "not empty and not of a run why: it holds thesis.txt" in message

    def test_a_folder_of_another_recipe_is_refused_with_what_differs(self, deploykit, network, refused):
        assert deploykit("export", network, "--to", "onnx", "--output", "out").code == 0

        message = refused("export", network, "--to", "onnx", "--batch", "2", "--output", "out")

        assert "the output folder out belongs to another recipe" in message
        assert """export.batch: 'dynamic' there, 2 here""" in message
        assert "deploykit clean --all out" in message

    def test_a_read_only_folder_is_named(self, refused, network, mounted):
        place = mounted("readonly", "ro")

        message = refused("export", network, "--to", "onnx", "--output", place / "out", code=1)

        assert f"cannot lock: {place}/out" in message
        assert "read-only file system" in message

    @pytest.mark.parametrize("stage", ["export-onnx", "export-torchscript", "build-onnxruntime-fp32"])
    def test_a_disk_that_fills_up_in_a_stage_is_named_with_what_to_do(self, deploykit, network, mounted, work, stage):
        words = ["export", network, "--to", "onnxruntime", "--to", "torchscript", "--set", "benchmark.enabled=false", "--output"]
        assert deploykit(*words, "roomy").code == 0
        size = _bytes_before_half_of(work / "roomy", stage)
        place = mounted("small", f"size={size}")

        outcome = deploykit(*words, place / "out")

        assert (outcome.code, outcome.out) == (1, "")
        assert f"cannot write: {place}/out/{stage}" in outcome.err
        assert "no space left on device" in outcome.err
        assert "free some space, or choose another place with --output" in outcome.err
        assert not list(place.rglob("*.partial"))

    def test_a_disk_that_is_full_from_the_start_is_named(self, deploykit, network, mounted):
        place = mounted("small", "size=4k")
        (place / "filler").write_bytes(bytes(4096))

        outcome = deploykit("export", network, "--to", "onnx", "--output", place / "out")

        assert (outcome.code, outcome.out) == (1, "")
        assert f"{place}/out" in outcome.err
        assert "no space left on device" in outcome.err


def _bytes_before_half_of(run: Path, stage: str) -> int:
    """Room for the stages before this one, in pages, and for half of the first file that it writes."""

    def pages(path: Path) -> int:
        return -(-path.stat().st_size // 4096)

    names = ["export-onnx", "export-torchscript", "build-onnxruntime-fp32"]
    before = [path for name in names[: names.index(stage)] for path in (run / name).iterdir()]
    half = pages(read_artifact(run / stage).path) // 2
    return 4096 * (sum(map(pages, [run / "recipe.toml", run / ".lock", *before])) + half)


class TestNamesThatAreNotUtf8:
    @pytest.mark.parametrize("option", ["--weights", "--calibrate", "--validate"])
    def test_a_path_that_no_recipe_can_hold_is_refused_with_what_to_do(self, shell, network, work, option):
        outcome = shell("export", network, "--to", "onnx", option, b"caf\xe9", cwd=work)

        assert (outcome.code, outcome.out) == (2, "")
        assert "caf\\xe9 is not UTF-8, and recipes are; rename it or make a link to it" in outcome.err
        assert list(work.iterdir()) == []

    def test_an_output_folder_may_have_any_name(self, shell, network, work):
        outcome = shell("export", network, "--to", "onnx", "--output", b"caf\xe9", cwd=work)

        assert outcome.code == 0, outcome.err
        assert "report: caf\\xe9/report.html" in outcome.out
        assert recipes.load(Path(os.fsdecode(b"caf\xe9")) / "recipe.toml").export.formats == ("onnx",)


def test_the_same_messages_come_from_a_process_of_its_own_without_a_traceback(shell, work):
    outcome = shell("export", "resnet51", "--to", "onnx", cwd=work)

    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: there is no model 'resnet51'\n  why: ")
    assert "Traceback" not in outcome.err
