"""noxfile.py and the workflow held against pyproject.toml: which Pythons and PyTorches are tried, and none passed over."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import requires, version
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tomllib
from guides import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


class FakeNox(ModuleType):
    """What a noxfile takes of nox: sessions stay functions, their parameters are kept beside them."""

    def __init__(self) -> None:
        super().__init__("nox")
        self.options, self.parameters, self.Session = SimpleNamespace(), {}, object

    def session(self, function: Callable[..., None]) -> Callable[..., None]:
        return function

    def parametrize(self, name: str, values: list[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
        self.parameters[name] = list(values)
        return lambda function: function


class FakeSession:
    """Notes what a session installs and runs."""

    def __init__(self, *posargs: str) -> None:
        self.posargs, self.installed, self.ran = posargs, [], []

    def install(self, *words: str) -> None:
        self.installed.append(words)

    def run(self, *words: str) -> None:
        self.ran.append(words)


@pytest.fixture
def nox(monkeypatch) -> FakeNox:
    fake = FakeNox()
    monkeypatch.setitem(sys.modules, "nox", fake)
    fake.file = runpy.run_path(str(ROOT / "noxfile.py"))
    return fake


def floor(package: str) -> str:
    """The oldest release that pyproject.toml allows."""
    (found,) = (line.removeprefix(f"{package}>=") for line in PROJECT["dependencies"] if line.startswith(f"{package}>="))
    return found


def minor(release: str) -> str:
    return ".".join(release.split(".")[:2])


class TestTheMatrix:
    def test_begins_with_the_oldest_of_each_that_is_allowed_and_knows_no_older_one(self, nox):
        torch, vision = nox.parameters["torch"], list(nox.file["TORCHVISION"].values())

        assert PROJECT["requires-python"] == f">={nox.parameters['python'][0]}"
        assert torch[0] == floor("torch")
        assert vision[0] == floor("torchvision")
        for releases in (nox.parameters["python"], torch, vision):
            assert releases == sorted(releases, key=lambda release: [*map(int, release.split("."))])

    def test_has_the_pythons_that_the_package_says_it_is_for(self, nox):
        told = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]

        assert nox.parameters["python"] == told

    def test_pairs_the_torch_and_torchvision_that_are_installed_here_as_torchvision_does(self, nox):
        torch = minor(version("torch"))
        if torch not in nox.file["TORCHVISION"]:
            pytest.skip(f"noxfile.py does not name torch {torch} yet")

        assert nox.file["TORCHVISION"][torch] == minor(version("torchvision"))
        wanted = next(line for line in requires("torchvision") if re.match(r"torch\b", line))
        assert minor(re.search(r"[\d.]+", wanted)[0]) <= torch


class TestASession:
    def test_fails_where_its_python_is_missing_and_runs_only_when_it_is_named(self, nox):
        assert nox.options.error_on_missing_interpreters is True
        assert nox.options.sessions == []

    def test_installs_both_in_one_step_so_that_they_fit_and_runs_what_make_test_runs(self, nox):
        session = FakeSession()

        nox.file["tests"](session, torch="2.13")

        assert session.installed == [("--editable", ".[dev]", "torch==2.13.*", "torchvision==0.28.*")]
        assert " ".join(("$(BIN)/" + session.ran[0][0], *session.ran[0][1:])) in (ROOT / "Makefile").read_text()

    def test_runs_the_files_that_were_named(self, nox):
        session = FakeSession("tests/test_export.py")

        nox.file["tests"](session, torch="2.11")

        assert session.ran == [("python", "-m", "pytest", "tests/test_export.py")]


class TestTheWorkflow:
    def test_runs_the_tests_with_every_python(self, nox):
        (told,) = re.findall(r"^ +python: \[(.*)\]$", WORKFLOW, re.MULTILINE)

        assert told.replace('"', "").split(", ") == nox.parameters["python"]

    def test_tries_the_corners_of_the_matrix_at_night(self, nox):
        pairs = set(re.findall(r'- \{python: "([\d.]+)", torch: "([\d.]+)"\}', WORKFLOW))
        pythons, torches = nox.parameters["python"], nox.parameters["torch"]

        assert {(python, torch) for python in (pythons[0], pythons[-1]) for torch in (torches[0], torches[-1])} <= pairs
        assert all(python in pythons and torch in torches for python, torch in pairs)
        for name in re.findall(r"tests/\w+\.py", WORKFLOW):
            assert (ROOT / name).is_file()

    def test_may_read_and_nothing_else_and_names_the_release_of_every_action(self):
        assert re.findall(r"permissions: (.*)", WORKFLOW) == ["{contents: read}"]
        for action in re.findall(r"uses: (\S+)", WORKFLOW):
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action)
