"""Torch's two exporters: which one is taken, what each of them gives, and what is left behind when neither can."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploykit import export, recipe
from deploykit.errors import StageError
from deploykit.export import exporters
from deploykit.pipeline import run
from deploykit.recipe import ExportTable

BOTH = ("new", "legacy")


class Bessel(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class SeesTheTracer(nn.Module):
    """Answers otherwise under one exporter: torch.export says so, tracing does."""

    def __init__(self, tracer: str) -> None:
        super().__init__()
        self.tracer = tracer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        watched = torch.jit.is_tracing() if self.tracer == "legacy" else torch.compiler.is_exporting()
        y = x.mean((2, 3))
        return y + 1 if watched else y


class Chooses(nn.Module):
    """Control flow that torch can keep, over both of whose branches an exporter has to go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3))
        return torch.cond(y.sum() > 0, lambda y: self.head(y), lambda y: self.head(-y), (y,))


def with_bessel() -> nn.Module:
    return networks.Classifier(nn.Sequential(nn.Conv2d(3, 8, 3), Bessel()), 8)


def exported(module: nn.Module | str, folder: Path, **settings: object) -> onnx.GraphProto:
    return onnx.load(networks.exported(module, folder, **settings).path).graph


class TestTheChoice:
    def test_is_the_new_exporter_but_for_the_networks_of_our_own_table(self, monkeypatch):
        monkeypatch.setattr(exporters, "LEGACY", {"odd": "the new one loses its tail"})

        assert exporters.choice("plain", ExportTable())[0] == "new"
        assert exporters.choice("odd", ExportTable()) == ("legacy", "the new one loses its tail")

    @pytest.mark.parametrize("exporter", BOTH)
    def test_is_the_recipes_where_it_says_one(self, exporter):
        assert exporters.choice("any", ExportTable(exporter=exporter)) == (exporter, "as the recipe asks")

    def test_of_the_table_has_a_reason_for_every_network(self):
        assert all(len(reason.split()) > 3 for reason in exporters.LEGACY.values())

    def test_is_told_with_the_file(self, tmp_path):
        facts = networks.exported("lenet5", tmp_path, exporter="legacy").facts

        assert (facts["exporter"], facts["exporter_why"]) == ("legacy", "as the recipe asks")


class TestTheLegacyExporter:
    @pytest.mark.parametrize("name", ["residual", "mobile", "branches", "twice"])
    def test_gives_a_network_the_same_layers_under_the_same_names(self, name, portable, tmp_path):
        new = onnx.load(portable(name).path).graph

        legacy = exported(name, tmp_path, exporter="legacy")

        layers = [
            {node.name for node in graph.node if node.op_type in ("Conv", "Gemm", "BatchNormalization")}
            for graph in (new, legacy)
        ]
        assert layers[0] == layers[1]

    def test_names_parameters_that_it_folded_as_pytorch_does(self, tmp_path):
        names = {value.name for value in exported("residual", tmp_path, exporter="legacy").initializer}

        assert {"body.2.second.0.weight", "body.2.second.0.bias", "head.weight", "head.bias"} <= names
        assert not [name for name in names if "onnx::" in name]

    def test_leaves_nothing_but_the_module_path(self, tmp_path):
        graph = exported("mobile", tmp_path, exporter="legacy")

        assert {prop.key for node in graph.node for prop in node.metadata_props} == {"deploykit.module"}
        assert not any(node.doc_string for node in graph.node)


class TestCrossCheck:
    def test_keeps_what_our_table_says_where_both_pass_and_tells_of_both(self, tmp_path):
        made = networks.exported("residual", tmp_path, cross_check=True)

        assert made.facts["exporter"] == "new"
        assert set(made.facts["exporters"]) == set(BOTH)
        assert all(finding.startswith("passes, max|d| / max|y| ") for finding in made.facts["exporters"].values())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "samples.npz"]

    def test_gives_the_same_file_as_without(self, tmp_path, portable):
        made = networks.exported("residual", tmp_path, cross_check=True)

        assert made.path.read_bytes() == portable("residual").path.read_bytes()

    @pytest.mark.parametrize(("wrong", "right"), [("new", "legacy"), ("legacy", "new")])
    def test_keeps_the_one_that_answers_like_pytorch_and_says_what_the_other_did(self, wrong, right, tmp_path):
        made = networks.exported(SeesTheTracer(wrong), tmp_path, cross_check=True)

        assert made.facts["exporter"] == right
        assert f"{wrong}: " in made.facts["exporter_why"]
        assert "does not answer like PyTorch" in made.facts["exporter_why"]

    def test_raises_where_neither_passes_with_what_each_of_them_said(self, tmp_path):
        with pytest.raises(export.NoExporterError, match="neither of torch's exporters can do Classifier") as refused:
            networks.exported(with_bessel(), tmp_path, cross_check=True)

        assert set(refused.value.findings) == set(BOTH)
        assert not list(tmp_path.iterdir())


USERS = """
import torch
from torch import nn

class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.odd = nn.Conv2d(3, 4, 3), Odd()
    def forward(self, x):
        return self.odd(self.first(x)).mean((2, 3))

class Odd(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)

def strange():
    return Strange()
"""


WATCHED = """
import torch
from torch import nn

class Watched(nn.Module):
    task = "segment"
    def __init__(self, num_classes=7):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)
    def forward(self, x):
        y = self.conv(x)
        return y + 1 if torch.jit.is_tracing() or torch.compiler.is_exporting() else y
"""


class TestTheReproduction:
    @pytest.fixture
    def failed(self, tmp_path) -> Path:
        """The folder of a run that failed."""
        (tmp_path / "net.py").write_text(USERS)
        content = {
            "name": "strange",
            "model": {"name": f"{tmp_path / 'net.py'}:strange", "weights": "none"},
            "preprocess": {"crop": 16, "mean": [0.5] * 3, "std": [0.25] * 3},
            "export": {"cross_check": True, "samples": 2},
        }
        asked = recipe.parse(content, base=tmp_path, source="a test")
        with pytest.raises(StageError, match=r"reproduce\.py shows it again") as refused:
            run(asked, tmp_path / "run")
        assert refused.value.exit_code == 1
        return tmp_path / "run"

    def test_is_a_small_folder_that_shows_it_again(self, failed):
        folder = failed / "reproduction"

        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, folder / "reproduce.py"], env=environment, capture_output=True, text=True, check=True
        )

        assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
        lines = {line.partition(":")[0]: line for line in done.stdout.splitlines() if line.startswith(BOTH)}
        assert "bessel" in lines["new"]
        assert "bessel" in lines["legacy"]
        assert "bessel" in (folder / "README.md").read_text()
        assert json.loads((folder / "network.json").read_text())["opset"] == 19
        assert not (failed / "export-onnx").exists()

    def test_runs_elsewhere_with_the_weights_that_were_copied(self, tmp_path):
        home = tmp_path / "home"
        home.mkdir()
        (home / "net.py").write_text("from part import Watched as watched")
        (home / "part.py").write_text(WATCHED)
        weights = nn.Conv2d(3, 4, 1).state_dict()
        torch.save({"model": {f"conv.{name}": value for name, value in weights.items()}}, home / "trained.pth")
        content = {
            "name": "watched",
            "model": {"name": f"{home / 'net.py'}:watched", "weights": str(home / "trained.pth"), "weights_key": "model"},
            "preprocess": {"crop": 16, "mean": [0.5] * 3, "std": [0.25] * 3},
            "export": {"cross_check": True, "samples": 2},
        }
        with pytest.raises(StageError, match=r"reproduce\.py shows it again"):
            run(recipe.parse(content, base=tmp_path, source="a test"), tmp_path / "run")
        folder = tmp_path / "elsewhere"
        shutil.move(tmp_path / "run" / "reproduction", folder)
        shutil.rmtree(home)

        command, environment = [sys.executable, folder / "reproduce.py"], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"^(?:new|legacy): max\|d\|", done.stdout, re.MULTILINE)) == 2
        said = json.loads((folder / "network.json").read_text())["model"]
        assert (said["name"], said["weights"], said["classes"]) == ("net.py:watched", "none", 4)
        assert [value.name for value in onnx.load(folder / "new.onnx").graph.output] == ["scores"]
        assert not [path.name for path in folder.glob("*.[jm][sd]*") if str(home) in path.read_text()]


class TestAUsersModel:
    @pytest.mark.parametrize("exporter", BOTH)
    def test_with_an_operator_that_onnx_lacks_is_refused_with_operator_and_module(self, exporter, tmp_path):
        with pytest.raises(StageError, match=r"special_bessel_j0, which module body\.1 \(Bessel\) uses"):
            networks.exported(with_bessel(), tmp_path, exporter=exporter)

    def test_with_control_flow_that_torch_can_keep_is_exported_with_both_branches(self, tmp_path):
        made = networks.exported(Chooses(), tmp_path)

        graph = onnx.load(made.path).graph
        assert "If" in [node.op_type for node in graph.node]
        assert made.facts["relative_error"] < 1e-5
        assert str(Path(torch.__file__).parents[1]).encode() not in made.path.read_bytes()
        assert b"test_exporters" not in made.path.read_bytes()

    def test_that_failed_hears_of_the_other_exporter(self, tmp_path):
        with pytest.raises(StageError, match="--cross-check tries torch's other exporter"):
            networks.exported(with_bessel(), tmp_path)


# Objects lie at other addresses in each process, and sets are ordered by them.
EXPORT = """
import hashlib, random, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from deploykit import export, models
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable
scattered = [bytes(size) for size in range(300) for _ in range(100)]
random.Random(int(sys.argv[1])).shuffle(scattered)
del scattered[::2]
for name in sys.argv[4:]:
    model = models.load(ModelTable(name=name, weights="none"), PreprocessTable(crop=int(sys.argv[3])))
    inputs = np.random.default_rng(0).standard_normal((2, *model.preprocess.shape)).astype(np.float32)
    folder = Path(sys.argv[2], name)
    folder.mkdir(parents=True)
    made = export.onnx_model(model, inputs, None, ExportTable(tolerance=1), folder)
    print(hashlib.sha256(made.path.read_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_exports_of_the_same_weights_are_equal_to_the_byte(tmp_path):
    def digests(seed: int) -> str:
        command = [sys.executable, "-c", EXPORT, str(seed), str(tmp_path / str(seed)), "64", "squeezenet1_1", "googlenet"]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    one, other = digests(1), digests(2)

    assert len(one.split()) == 2
    assert one == other


def test_the_order_of_a_graph_is_that_of_its_structure(portable):
    graph = onnx.load(portable("branches").path).graph

    known = {value.name for value in (*graph.input, *graph.initializer)}
    for node in graph.node:
        assert set(node.input) - {""} <= known
        known |= set(node.output)
        assert [item.name for item in node.attribute] == sorted(item.name for item in node.attribute)
    read = list(dict.fromkeys(name for node in graph.node for name in node.input))
    constants = [value.name for value in graph.initializer]
    assert constants == [name for name in read if name in set(constants)]
    assert np.all(np.diff([read.index(name) for name in constants]) > 0)
