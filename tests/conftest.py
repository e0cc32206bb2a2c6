"""What several test files share: the command line in a process of its own and in this one, and tiny input for it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
from PIL import Image

from deploykit import cli
from deploykit.artifact import Artifact

TINY_RECIPE = """
name = "tiny"
gate = ["disagreements <= 544"]

[model]
name = "lenet5"
weights = "none"
classes = 10

[data]
name = "digits"
calibration_images = 64

[finetune]
epochs = 1
learning_rate = 2e-3

[export]
formats = ["onnx", "torchscript"]

[quantize]
speed = false

[benchmark]
processes = 2
queries = 3
warmup = 1
offline_seconds = 0
"""

TINY_NETWORK = """
from torch import nn


class TinyNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, num_classes)
        self.preprocess = {"resize": 32, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.conv2(x).relu().mean((2, 3)))


def build(num_classes=4):
    return TinyNet(num_classes)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command line answered."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """`python -m deploykit WORDS` in a process of its own, as a user runs it."""

    def run(*words: str | bytes | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Outcome:
        command = [sys.executable, "-m", "deploykit", *words]
        done = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, timeout=120, check=False)
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def deploykit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """The same command line in this process, which has torch loaded already; a traceback fails the test by itself."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["deploykit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, before)
    gc.unfreeze()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs of 32 x 32 pixels."""
    return _photos(tmp_path_factory.mktemp("photos"), 12)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs in four sub-folders: one for each class of the tiny network."""
    root = tmp_path_factory.mktemp("labelled")
    for name in ("ant", "bee", "cat", "dog"):
        _photos(root / name, 3)
    return root


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A user's own network, as FILE.py:factory: two convolutions, four classes, exported in a second."""
    path = tmp_path_factory.mktemp("network") / "tiny_net.py"
    path.write_text(TINY_NETWORK)
    return f"{path}:build"


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 on the built-in digits for one epoch: every stage there is, in seconds."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE)
    return path


@dataclass(frozen=True)
class FinishedRun:
    """A run of the tiny recipe that nothing may change: copy it."""

    folder: Path
    outcome: Outcome

    def copied_to(self, folder: Path) -> Path:
        shutil.copytree(self.folder, folder)
        return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, shell: Callable[..., Outcome]) -> FinishedRun:
    """The tiny recipe, run from the command line with --json."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return FinishedRun(folder, shell("run", tiny_recipe, "--output", folder, "--json"))


@pytest.fixture(scope="session")
def trained(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of LeNet-5 as a training script leaves it, from the tiny recipe's fine-tuning."""
    import safetensors.torch
    import torch

    path = tmp_path_factory.mktemp("trained") / "lenet5.pth"
    torch.save({"epoch": 1, "state_dict": safetensors.torch.load_file(finished.folder / "finetune" / "model.safetensors")}, path)
    return path


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """The small networks of `networks.py` by name, each exported to ONNX once."""
    root = tmp_path_factory.mktemp("portable")
    return cache(lambda name: networks.exported(name, root / name))


def _photos(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(len(folder.name))
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index:02d}.jpg", quality=95)
    return folder
