"""Training by several processes that torchrun starts: the same weights as by one, and one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner
from PIL import Image

from deploykit import pipeline, recipe
from deploykit.cli import cli
from deploykit.errors import UsageError
from deploykit.finetune.processes import ALONE, Processes, of_torchrun

WORDS = ["lenet5", "--weights", "none", "--set", "preprocess.crop=32", "--epochs", "2", "--batch", "8", "--augment", "flip"]
WORDS += ["--set", "finetune.class_weights='balanced'", "--set", "finetune.optimizer='sgd'", "--json"]
FROZEN = ["cifar_resnet20", *WORDS[1:], "--set", "finetune.freeze=['*bn*']"]


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """Pictures of bars that stand or lie, more of one than of the other; their number is no multiple of the batch."""
    root = tmp_path_factory.mktemp("bars")
    generator = np.random.default_rng(0)
    for part, counts in (("train", (13, 8)), ("val", (5, 4))):
        for label, shape, count in (("lying", (32, 1), counts[0]), ("standing", (1, 32), counts[1])):
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                wave = np.broadcast_to(generator.integers(0, 2, shape) * 200, (32, 32)) + generator.integers(0, 50, (32, 32))
                Image.fromarray(wave.astype(np.uint8)).save(folder / f"{index:02d}.png")
    return root


def finetune(words: list[str], data: Path, out: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "deploykit", "finetune", *words, "--data", str(data), "--output", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize("words", [WORDS, FROZEN], ids=["no BatchNorm", "BatchNorm frozen"])
def test_two_processes_reach_the_weights_of_one_and_one_of_them_writes(bars, tmp_path, words):
    one = CliRunner().invoke(cli, ["finetune", *words, "--data", str(bars), "--output", str(tmp_path / "one")])
    two = finetune(words, bars, tmp_path / "two", *TWO)

    assert (one.exit_code, two.returncode) == (0, 0), two.stderr
    weights, other = (safetensors.torch.load_file(tmp_path / name / "finetune" / "model.safetensors") for name in ("one", "two"))
    assert max(float((weights[name] - other[name]).abs().max()) for name in weights) < 1e-5
    alone, together = json.loads(one.stdout), json.loads(two.stdout)
    assert [epoch["train_accuracy"] for epoch in alone["history"]] == [epoch["train_accuracy"] for epoch in together["history"]]
    assert alone["confusion"] == together["confusion"]


def test_a_whole_run_is_not_started_by_torchrun_and_the_error_says_what_to_do(bars, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "bars"\n[model]\nname = "lenet5"\n[data]\ntrain = "{bars / "train"}"\n[finetune]\n')
    answer = CliRunner().invoke(cli, ["run", str(path), "--output", str(tmp_path / "out")])

    assert isinstance(answer.exception, UsageError)
    assert "WORLD_SIZE is '2'" in str(answer.exception)
    assert "-m deploykit finetune MODEL --data DIR --output OUT" in str(answer.exception)
    assert not (tmp_path / "out").exists()


class Told(Processes):
    """The first of two processes, alone; what it would tell the other is kept."""

    messages: ClassVar[list[object]] = []

    def told(self, value: object) -> object:
        self.messages.append(value)
        return value


def test_the_others_are_told_when_everything_was_trained_before(bars, tmp_path):
    content = {"name": "bars", "model": {"name": "lenet5", "weights": "none"}, "preprocess": {"crop": 32}}
    content |= {"data": {"train": str(bars / "train")}, "finetune": {"epochs": 1}}
    asked = recipe.parse(content, base=tmp_path, source="a test")
    pipeline.train(asked, tmp_path / "out")

    pipeline.train(asked, tmp_path / "out", processes=Told())

    assert Told.messages == [False]


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, ALONE), ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Processes(1, 4, 1))],
    ids=["none started", "torchrun's"],
)
def test_the_processes_are_what_torchrun_says(environment, found):
    assert of_torchrun(environment) == found


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_other_numbers_are_refused(environment):
    with pytest.raises(UsageError, match=r"RANK = .* are not those of torchrun"):
        of_torchrun(environment)


def test_every_image_is_in_one_share():
    shares = [Processes(rank, 3).share(np.arange(10)) for rank in range(3)]

    assert sorted(np.concatenate(shares)) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
