"""What the stages are made from: a change in any of it makes them again, and what cannot be used is refused first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit import pipeline, workspace
from deploykit import recipe as recipes
from deploykit.errors import DataError
from deploykit.sources import Sources

USER_CODE = """
from torch import nn

from width import WIDTH


def build(num_classes=4):
    network = nn.Sequential(nn.Conv2d(3, WIDTH, 3), ACTIVATION(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 4))
    network.preprocess = {"crop": 16, "resize": 16, "mean": MEAN, "std": [0.5, 0.5, 0.5]}
    return network
"""


def pictures(folder: Path, count: int = 4, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def sources(**tables: dict[str, object]) -> Sources:
    content = {"name": "run", "model": {"name": "lenet5", "weights": "none"}, **tables}
    return Sources(recipes.parse(content, base=Path("/"), source="a test"))


def write_network(folder: Path, *, width: int = 4, activation: str = "nn.ReLU", mean: str = "[0.5, 0.5, 0.5]") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "width.py").write_text(f"WIDTH = {width}\n")
    (folder / "net.py").write_text(USER_CODE.replace("ACTIVATION", activation).replace("MEAN", mean))


class TestWhatADigestHolds:
    def test_the_bytes_of_every_picture(self, tmp_path):
        folder = str(pictures(tmp_path / "photos"))
        before = sources(data={"calibrate": folder}).digest

        (tmp_path / "photos" / "0.png").write_bytes((tmp_path / "photos" / "1.png").read_bytes())

        assert sources(data={"calibrate": folder}).digest != before

    def test_the_names_of_labelled_folders_because_they_are_the_labels(self, tmp_path):
        for name in ("ant", "bee"):
            pictures(tmp_path / "labelled" / name)
        before = sources(data={"validate": str(tmp_path / "labelled")}).digest

        (tmp_path / "labelled" / "bee").rename(tmp_path / "labelled" / "wasp")

        assert sources(data={"validate": str(tmp_path / "labelled")}).digest != before

    def test_the_bytes_of_the_checkpoint(self, tmp_path):
        checkpoint = tmp_path / "weights.pth"
        checkpoint.write_bytes(b"one")
        asked = {"model": {"name": "lenet5", "weights": str(checkpoint)}}
        before = sources(**asked).digest

        checkpoint.write_bytes(b"two")

        assert sources(**asked).digest != before

    def test_more_validation_pictures_do_not_train_again(self, tmp_path):
        train = tmp_path / "train"
        for name in ("ant", "bee"):
            pictures(train / name)
        asked = {"finetune": {}, "data": {"train": str(train), "validate": str(train)}}
        before = sources(**asked)

        pictures(tmp_path / "more")
        after = sources(finetune={}, data={"train": str(train), "validate": str(tmp_path / "more")})

        assert after.training_digest == before.training_digest
        assert after.digest != before.digest


class TestAUsersOwnCode:
    """Each run is a process of its own, as it is for a user: an imported module does not change."""

    def run(self, folder: Path, photos: Path, name: str = "net.py:build") -> dict[str, str]:
        words = ["export", name, "--to", "onnxruntime", "--calibrate", str(photos), "--set", "benchmark.enabled=false"]
        command = [sys.executable, "-m", "deploykit", *words, "--output", "out", "--json"]
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return {stage["name"]: stage["status"] for stage in json.loads(done.stdout)["stages"]}

    @pytest.mark.parametrize("name", ["net.py:build", "net:build"])
    def test_a_changed_neighbour_is_noticed(self, tmp_path, name):
        photos = pictures(tmp_path / "photos")
        write_network(tmp_path / "code")
        self.run(tmp_path / "code", photos, name)
        assert set(self.run(tmp_path / "code", photos, name).values()) == {"skipped"}

        write_network(tmp_path / "code", width=8)

        assert set(self.run(tmp_path / "code", photos, name).values()) == {"done"}

    def test_changed_preprocessing_reaches_the_engine_though_the_weights_are_the_same(self, tmp_path):
        photos = pictures(tmp_path / "photos")
        write_network(tmp_path / "code")
        self.run(tmp_path / "code", photos)

        write_network(tmp_path / "code", mean="[0.1, 0.1, 0.1]")
        stages = self.run(tmp_path / "code", photos)

        assert stages["build-onnxruntime-fp32"] == "done"
        manifest = json.loads((tmp_path / "code" / "out" / "build-onnxruntime-fp32" / "manifest.json").read_text())
        assert manifest["preprocess"]["mean"] == [0.1, 0.1, 0.1]


class TestWhatIsRefusedFirst:
    def test_a_class_of_one_image_cannot_be_trained_and_selected_on(self, tmp_path):
        pictures(tmp_path / "train" / "ant")
        pictures(tmp_path / "train" / "bee", count=1)

        with pytest.raises(DataError, match="classes with fewer than two images\n  - bee") as refused:
            _ = sources(finetune={}, data={"train": str(tmp_path / "train")}).train
        assert "held out" in refused.value.why

    def test_a_gate_is_not_judged_on_calibration_images_wherever_they_lie(self, tmp_path):
        pictures(tmp_path / "photos")
        for label in range(10):
            pictures(tmp_path / "labelled" / str(label), count=1, seed=label)
        tables = {"calibrate": str(tmp_path / "photos"), "validate": str(tmp_path / "labelled")}
        model = {"name": "lenet5", "weights": "default"}
        asked = sources(model=model, data=tables, quantize={}, gate=["drop <= 1 points"])
        asked.__dict__["untrained"] = sources().untrained  # what matters here are the pictures

        with pytest.raises(DataError, match=r"1 of 10 validation images are also calibration images") as refused:
            asked.check()
        assert "0/0.png" in refused.value.why


class TestAFolder:
    def test_a_run_that_was_killed_while_it_claimed_its_folder_can_be_repeated(self, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / ".lock").write_text("pid 1\n")
        (out / "recipe.toml.partial").write_text("name = ")
        content = {"name": "run", "model": {"name": "lenet5", "weights": "none"}, "build": {"runtimes": []}}

        pipeline.run(recipes.parse(content, base=Path("/"), source="a test"), out)

        assert (out / "report.html").is_file()
        assert not (out / "recipe.toml.partial").exists()

    def test_what_a_user_calls_partial_is_left_alone(self, tmp_path):
        content = {"name": "run", "model": {"name": "lenet5", "weights": "none"}, "build": {"runtimes": []}}
        asked = recipes.parse(content, base=Path("/"), source="a test")
        pipeline.run(asked, tmp_path / "out")
        (tmp_path / "out" / "backup.partial").write_text("mine")

        pipeline.run(asked, tmp_path / "out")
        workspace.clean(tmp_path / "out")

        assert (tmp_path / "out" / "backup.partial").read_text() == "mine"


def test_bad_headers_and_bad_pixels_are_told_in_one_round(tmp_path, deploykit):
    photos = pictures(tmp_path / "photos")
    (photos / "empty.png").write_bytes(b"")
    whole = (photos / "0.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    words = ["export", "lenet5", "--weights", "none", "--to", "onnxruntime", "--int8", "--calibrate", photos]

    outcome = deploykit(*words, "--output", tmp_path / "out")

    assert outcome.code == 2
    assert "2 of 6 images" in outcome.err
    assert {"empty.png", "cut.png"} <= {word.strip(":") for word in outcome.err.split()}
