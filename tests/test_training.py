"""`deploykit finetune`: one command from a folder of images to a checkpoint, a page, and a recipe to go on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from deploykit import finetune as finetuning
from deploykit.cli import cli
from deploykit.errors import CapabilityError, DataError, StageError, UsageError
from deploykit.report import training

WORDS = ["--weights", "none", "--set", "preprocess.crop=32", "--set", "preprocess.channels='L'", "--learning-rate", "0.01"]

EIGHT = ["--epochs", "8", "--augment", "flip", "--set", "finetune.show=['conv*']"]


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """Pictures of bars that stand or lie: train/ with 24 of each, val/ with 8."""
    root = tmp_path_factory.mktemp("bars")
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for label, shape in (("lying", (32, 1)), ("standing", (1, 32))):
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                wave = np.broadcast_to(generator.integers(0, 2, shape) * 200, (32, 32)) + generator.integers(0, 50, (32, 32))
                Image.fromarray(wave.astype(np.uint8)).save(folder / f"{index:02d}.png")
    return root


def finetune(data: Path, output: Path, *words: str) -> Result:
    arguments = ["finetune", "lenet5", "--data", str(data), "--output", str(output), *WORDS, *words]
    return CliRunner().invoke(cli, arguments)


@pytest.fixture(scope="module")
def trained(bars, tmp_path_factory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("out") / "run"
    answer = finetune(bars, output, *EIGHT, "--json")
    assert answer.exception is None, answer.output
    return json.loads(answer.stdout), output


class TestARunThatTrains:
    def test_goes_on_to_int8_from_the_training_folder_without_another_file_by_hand(self, bars, tmp_path):
        recipe = tmp_path / "bars.toml"
        recipe.write_text(
            f'name = "bars"\n[model]\nname = "lenet5"\nweights = "none"\n[preprocess]\ncrop = 32\nchannels = "L"\n'
            f'[data]\ntrain = "{bars / "train"}"\n[finetune]\nepochs = 2\nlearning_rate = 0.01\n'
            "[quantize]\nspeed = false\n[benchmark]\nenabled = false\n"
        )
        answer = CliRunner().invoke(cli, ["run", str(recipe), "--output", str(tmp_path / "run"), "--json"])

        assert answer.exit_code == 0, answer.output
        found = json.loads(answer.stdout)
        done = [stage["name"] for stage in found["stages"]]
        assert (done[0], done[-1]) == ("finetune", "parity")
        assert {"calibrate", "quantize-onnxruntime", "build-onnxruntime-int8"} <= {*done}
        assert found["model"]["classes"] == ["lying", "standing"]
        assert found["calibration"]["images"] == 44  # a tenth of each class is held out
        assert found["model"]["weights"].startswith("fine-tuned from")
        assert "accuracy is that on the 4 held-out images that the best epoch was chosen by" in " ".join(found["model"]["notes"])


class TestTheCommand:
    def test_leaves_a_checkpoint_that_export_takes(self, trained, tmp_path):
        found, _ = trained
        words = [*WORDS[2:6], "--to", "onnx", "--output", str(tmp_path / "exported"), "--json"]

        answer = CliRunner().invoke(cli, ["export", "lenet5", "--weights", found["checkpoint"], *words])

        assert answer.exit_code == 0, answer.output
        assert found["best_val_accuracy"] >= 0.9

    def test_takes_the_two_folders_for_what_they_are_called(self, trained):
        found, _ = trained

        assert (found["train_images"], found["val_images"]) == (48, 16)
        assert found["classes"] == ["lying", "standing"]

    def test_splits_one_folder_by_itself(self, bars, tmp_path):
        found = json.loads(finetune(bars / "train", tmp_path / "run", "--epochs", "1", "--json").stdout)

        assert (found["train_images"], found["val_images"]) == (44, 4)

    def test_counts_every_held_out_image_once(self, trained):
        confusion = np.array(trained[0]["confusion"])

        assert confusion.sum(axis=1).tolist() == [8, 8]
        assert confusion.trace() / 16 == trained[0]["best_val_accuracy"]

    def test_the_same_again_is_skipped(self, bars, trained):
        before = (trained[1] / "finetune" / "model.safetensors").stat().st_mtime_ns

        finetune(bars, trained[1], *EIGHT)

        assert (trained[1] / "finetune" / "model.safetensors").stat().st_mtime_ns == before
        assert not (trained[1] / "finetune.epochs").exists()

    def test_the_page_says_how_each_class_went(self, trained):
        page = (trained[1] / "training.html").read_text()

        assert all(word in page for word in ("Learning curve", "training accuracy", "Each class", "Recall", "standing", "lying"))

    def test_the_page_shows_pictures_that_were_decided_and_what_the_layers_asked_for_see(self, trained):
        page = (trained[1] / "training.html").read_text()

        assert 12 + 3 <= page.count("<img") <= 16 + 3  # of 16 held-out pictures; the kernels of conv1, and the maps of both
        assert "conv1</code>: weights" in page
        assert "conv2</code>: maps of the first held-out picture" in page

    def test_says_that_the_best_epoch_was_chosen_by_the_pictures_it_is_judged_on(self, trained):
        found, _ = trained

        assert any("the best of 8 epochs was chosen by these held-out images" in note for note in found["notes"])

    def test_the_terminal_says_where_everything_is(self, trained):
        text = training.as_text(trained[0])

        assert f"checkpoint: {trained[0]['checkpoint']}" in text
        assert "held-out images right in epoch" in text


class TestBadData:
    def test_one_class_alone_is_nothing_to_learn(self, bars, tmp_path):
        shutil.copytree(bars / "train" / "lying", tmp_path / "one" / "lying")

        answer = finetune(tmp_path / "one", tmp_path / "run")

        assert isinstance(answer.exception, DataError)
        assert "there is nothing to learn\n  why:" in str(answer.exception)

    @pytest.mark.parametrize("parts", [("train", "test"), ("training", "validation"), ("train",)])
    def test_parts_of_a_data_set_are_not_taken_for_classes(self, bars, tmp_path, parts):
        for name in parts:
            shutil.copytree(bars / "val", tmp_path / "data" / name)

        answer = finetune(tmp_path / "data", tmp_path / "run")

        assert isinstance(answer.exception, UsageError)
        assert f"it holds {' and '.join(parts)}, which are parts of a data set rather than classes" in str(answer.exception)

    def test_a_held_out_class_that_is_not_trained_is_named(self, bars, tmp_path):
        shutil.copytree(bars, tmp_path / "bars")
        (tmp_path / "bars" / "val" / "standing").rename(tmp_path / "bars" / "val" / "leaning")

        answer = finetune(tmp_path / "bars", tmp_path / "run")

        assert isinstance(answer.exception, DataError)
        assert "leaning/ is none of the model's classes" in str(answer.exception)

    def test_what_was_learned_does_not_choose_the_best_epoch(self, bars, tmp_path):
        shutil.copytree(bars, tmp_path / "bars")
        shutil.copy(bars / "train" / "lying" / "00.png", tmp_path / "bars" / "val" / "lying" / "copy.png")

        answer = finetune(tmp_path / "bars", tmp_path / "run")

        assert "1 images of" in str(answer.exception)
        assert "are also training images" in str(answer.exception)

    def test_a_picture_cut_short_is_found_before_the_first_step(self, bars, tmp_path):
        shutil.copytree(bars, tmp_path / "bars")
        broken = tmp_path / "bars" / "train" / "lying" / "00.png"
        broken.write_bytes(broken.read_bytes()[:-60])

        answer = finetune(tmp_path / "bars", tmp_path / "run")

        assert isinstance(answer.exception, DataError)
        assert "lying/00.png" in str(answer.exception)

    def test_a_class_without_pictures_is_named(self, bars, tmp_path):
        shutil.copytree(bars, tmp_path / "bars")
        (tmp_path / "bars" / "train" / "empty").mkdir()

        answer = finetune(tmp_path / "bars", tmp_path / "run")

        assert isinstance(answer.exception, DataError)
        assert "empty/ holds no pictures" in str(answer.exception)

    def test_a_rate_that_is_far_too_high_ends_with_the_step_and_leaves_what_was_good(self, bars, tmp_path):
        words = ["--set", "finetune.optimizer='sgd'", "--learning-rate", "60", "--epochs", "9", "--batch", "48"]
        answer = finetune(bars, tmp_path / "run", *words)

        assert isinstance(answer.exception, StageError)
        assert answer.exception.exit_code == 1
        assert "training diverged in epoch" in str(answer.exception)
        assert not (tmp_path / "run" / "finetune").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_gpu_that_is_not_there_is_exit_4_before_a_picture_is_read(self, tmp_path):
        answer = finetune(tmp_path / "no pictures", tmp_path / "run", "--set", "finetune.device='cuda'")

        assert isinstance(answer.exception, CapabilityError)
        assert answer.exception.exit_code == 4
        assert "finetune.device" in answer.exception.fix
        assert not (tmp_path / "run").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_training_that_is_done_wants_its_gpu_no_more(self, bars, tmp_path, monkeypatch):
        words = ["--set", "finetune.device='cuda'", "--epochs", "1"]
        with monkeypatch.context() as there:
            there.setattr(finetuning, "device_of", lambda *_: torch.device("cpu"))
            there.setattr(finetuning.lesson, "device_of", lambda *_: torch.device("cpu"))
            assert finetune(bars, tmp_path / "run", *words).exception is None

        answer = finetune(bars, tmp_path / "run", *words)

        assert answer.exception is None, answer.output
        (tmp_path / "run" / "finetune").rename(tmp_path / "elsewhere")
        assert isinstance(finetune(bars, tmp_path / "run", *words).exception, CapabilityError)

    def test_settings_that_do_not_go_together_are_told_at_once(self, bars, tmp_path):
        answer = finetune(
            bars, tmp_path / "run", "--cache-features", "--set", "finetune.views=3", "--set", "finetune.mix='mixup'"
        )

        assert isinstance(answer.exception, UsageError)
        assert "finetune.cache_features needs a backbone that stays as it is" in str(answer.exception)
        assert "finetune.mix = 'mixup' mixes pictures" in str(answer.exception)
