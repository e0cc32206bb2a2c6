"""The wheel has everything that a run needs, and works where there is no repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources with the setuptools that is installed, so nothing is downloaded or left behind."""
    pytest.importorskip("setuptools", minversion="77", reason="wants setuptools to build a wheel")
    source = tmp_path_factory.mktemp("source") / "deploykit"
    source.mkdir()
    for name in ("deploykit", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    program = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_module_of_the_package_is_in_it(names):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "deploykit").rglob("*.py")}

    assert modules <= names


def test_every_data_file_is_in_it(names):
    files = {path for path in (ROOT / "deploykit").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}

    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert {"deploykit/py.typed", "deploykit/models/imagenet_synsets.txt", "deploykit/report/page.css"} <= names


def test_the_recipes_are_in_it_as_a_package(names):
    assert {f"deploykit/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")} <= names


def test_the_licence_is_in_it(names):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_is_named_after_the_version_and_runs_on_any_platform(wheel):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert wheel.name == f"deploykit-{version}-py3-none-any.whl"


def test_tests_and_tools_are_not_in_it(names):
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"deploykit"}


@pytest.mark.slow
def test_a_recipe_out_of_the_wheel_runs_without_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    settings = ["benchmark.processes=2", "benchmark.queries=3", "benchmark.offline_seconds=0"]
    words = ["run", "lenet_digits", "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    # One thread: two that wait for each other actively make a small network's training crawl on a busy machine.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-m", "deploykit", *words],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    where = subprocess.run(
        [sys.executable, "-c", "import deploykit; print(deploykit.__file__)"],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert where.stdout.startswith(str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["gates"][3]["rule"] == "onnxruntime int8: disagreements <= 2"
    assert result["parity"][2]["accuracy"]["reference"] >= 0.97
    assert {stage["status"] for stage in result["stages"]} == {"done"}
    assert (tmp_path / "elsewhere" / result["report"]).is_file()
