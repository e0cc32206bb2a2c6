"""The Dockerfiles, which cannot be built here: everything that they copy, install and run is looked for in the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tomllib

from deploykit import workspace
from deploykit.agent import _parser
from deploykit.bundle import DEVICE_HALF
from deploykit.cli import cli

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "docker" / f"{name}.Dockerfile" for name in ("jetson", "tensorrt")]
BASES = {"tensorrt": "nvcr.io/nvidia/tensorrt", "jetson": "nvcr.io/nvidia/l4t-tensorrt"}
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, comments gone and continued lines joined."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def only(path: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == word]


def comments(path: Path) -> str:
    return "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.split(".")[0])
class TestEach:
    def test_uses_instructions_that_are_known_and_begins_with_nvidias_image_by_a_tag(self, path):
        assert {word for word, _ in instructions(path)} <= INSTRUCTIONS
        (argument,), (base,) = only(path, "ARG"), only(path, "FROM")
        name, _, tag = argument.partition("=")
        image, _, reference = base.partition(":")
        assert image == BASES[path.name.partition(".")[0]]
        assert reference == f"${{{name}}}"
        assert re.fullmatch(r"[\w.-]+", tag)
        assert tag != "latest"

    def test_says_that_it_was_never_built(self, path):
        assert "Never built and never run" in comments(path)

    def test_runs_a_command_that_exists(self, path):
        (entry,), (command,) = only(path, "ENTRYPOINT"), only(path, "CMD")
        words = re.findall(r'"([^"]+)"', entry + command)
        if words[0] == "deploykit":
            scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
            assert scripts[words[0]] == "deploykit.cli:main"
            assert words[1] in cli.commands
        else:
            assert words[0] == "python3"
            assert words[1] in {copied.split()[-1] for copied in only(path, "COPY")}
            assert _parser().parse_args(words[2:]).does.__name__ == words[2]

    def test_every_command_of_its_comments_is_one_that_is_there(self, path):
        for line in comments(path).splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("deploykit", "docker")) else []
            if words[:1] == ["deploykit"]:
                options = {flag for option in cli.commands[words[1]].params for flag in option.opts}
                assert {word for word in words if word.startswith("--")} <= options
            if words[:2] == ["docker", "build"]:
                assert (ROOT / words[words.index("--file") + 1]) == path


class TestTheOneForAGpu:
    path = ROOT / "docker" / "tensorrt.Dockerfile"

    def test_copies_what_is_in_the_tree_and_all_that_a_wheel_is_made_of(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        copied = {name for line in only(self.path, "COPY") for name in line.split()[:-1]}

        assert all((ROOT / name).exists() for name in copied)
        folders = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
        folders |= set(project["tool"]["setuptools"]["package-dir"].values())
        files = {project["project"]["readme"], "pyproject.toml", *project["project"].get("license-files", ["LICENSE"])}
        assert copied >= folders | files

    def test_installs_extras_that_are_declared_and_no_second_tensorrt(self):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (asked,) = re.findall(r"/opt/deploykit\[([\w,]+)\]", self.path.read_text())

        assert set(asked.split(",")) <= set(extras) - {"tensorrt"}


class TestTheOneForAJetson:
    path = ROOT / "docker" / "jetson.Dockerfile"

    def test_copies_the_device_half_that_a_run_leaves(self):
        (copied,) = only(self.path, "COPY")

        assert copied.split()[0] == DEVICE_HALF
        assert workspace._OUR_NAMES.fullmatch(DEVICE_HALF)

    def test_has_what_the_device_half_imports(self):
        assert re.search(r'pip install .*"numpy>=1\.26', " ".join(only(self.path, "RUN")))
