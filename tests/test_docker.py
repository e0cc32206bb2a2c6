"""The Dockerfiles, which cannot be built here: everything that they copy, install and run is looked for in the tree."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tomllib

from deploykit import workspace
from deploykit.agent.commands import parser
from deploykit.bundle import DEVICE_HALF
from deploykit.cli import cli

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
NVIDIAS = [DOCKER / f"{name}.Dockerfile" for name in ("jetson", "tensorrt")]
WHOLE = [DOCKER / f"{name}.Dockerfile" for name in ("gpu", "host", "tensorrt")]  # all of deploykit, from the tree
BY_TAG = [*NVIDIAS, *(DOCKER / f"{name}.Dockerfile" for name in ("gpu", "host"))]
BASES = {
    **{"tensorrt": "nvcr.io/nvidia/tensorrt", "jetson": "nvcr.io/nvidia/l4t-tensorrt"},
    **{"gpu": "python", "host": "python"},
}
INSTRUCTIONS = {
    *("ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENTRYPOINT", "CMD"),
    *("ENV", "USER", "EXPOSE", "VOLUME", "SHELL", "LABEL"),
}


def instructions(path: Path) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, comments gone and continued lines joined."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def only(path: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == word]


def comments(path: Path) -> str:
    return "\n".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))


def commands(path: Path) -> list[list[str]]:
    """The commands of RUN instructions, as lists of words, without the variables that are set for them."""
    text = " && ".join(only(path, "RUN"))
    return [[word for word in shlex.split(part) if not re.match("[A-Z_]+=", word)] for part in text.split("&&")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.split(".")[0])
class TestEach:
    def test_uses_instructions_that_are_known_and_begins_with_an_image(self, path):
        found = [word for word, _ in instructions(path)]

        assert set(found) <= INSTRUCTIONS
        assert next(word for word in found if word != "ARG") == "FROM"

    def test_copies_what_is_in_the_tree_or_the_device_half_that_a_run_leaves(self, path):
        (context,) = re.findall(rf"docker build --file docker/{path.name} --tag \S+ (\S+)", comments(path))
        for line in only(path, "COPY"):
            *sources, _ = [part for part in shlex.split(line) if not part.startswith("--")]
            for source in sources:
                assert source == DEVICE_HALF or list((ROOT / context).glob(source.rstrip("/"))), f"{source} is not in {context}"

    def test_starts_what_it_copied_or_what_is_installed(self, path):
        copied = [shlex.split(line)[-1] for line in only(path, "COPY")]
        (entry,) = only(path, "ENTRYPOINT")

        assert json.loads(entry)[0] in (*copied, "deploykit", "python3")

    def test_installs_debian_packages_that_there_are(self, path):
        wanted = [word for words in commands(path) if words[:2] == ["apt-get", "install"] for word in words[2:] if word[0] != "-"]
        if shutil.which("apt-cache") is None:
            pytest.skip("wants apt-cache (Debian package apt)")

        known = subprocess.run(["apt-cache", "show", "--no-all-versions", *wanted], capture_output=True, text=True, check=False)

        assert set(wanted) <= set(re.findall(r"^Package: (\S+)$", known.stdout, re.M))

    def test_every_command_of_its_comments_is_one_that_is_there(self, path):
        told = 0
        for line in comments(path).splitlines():
            words = shlex.split(line, comments=True) if line.strip().startswith(("deploykit", "docker")) else []
            if words[:1] == ["deploykit"]:
                options = {flag for option in cli.commands[words[1]].params for flag in option.opts}
                assert {word for word in words if word.startswith("--")} <= options
            if words[:2] == ["docker", "build"]:
                told += 1
                assert (ROOT / words[words.index("--file") + 1]) == path
        assert told == 1


@pytest.mark.parametrize("path", BY_TAG, ids=lambda path: path.stem.split(".")[0])
class TestThoseWithATag:
    def test_begin_with_one_by_a_tag(self, path):
        (argument,), (base,) = only(path, "ARG"), only(path, "FROM")
        name, _, tag = argument.partition("=")
        image, _, reference = base.partition(":")
        assert image == BASES[path.name.partition(".")[0]]
        assert reference == f"${{{name}}}"
        assert re.fullmatch(r"[\w.-]+", tag)
        assert tag != "latest"

    def test_say_that_they_were_never_built(self, path):
        assert "Never built and never run" in comments(path)

    def test_run_a_command_that_exists(self, path):
        (entry,), (command,) = only(path, "ENTRYPOINT"), only(path, "CMD")
        words = re.findall(r'"([^"]+)"', entry + command)
        if words[0] == "deploykit":
            scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
            assert scripts[words[0]] == "deploykit.cli:main"
            assert words[1] in cli.commands
        else:
            assert words[0] == "python3"
            assert words[1] in {copied.split()[-1] for copied in only(path, "COPY")}
            assert parser().parse_args(words[2:]).does.__name__ == words[2]


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem.split(".")[0])
class TestThoseWithAllOfDeploykit:
    def test_copy_what_is_in_the_tree_and_all_that_a_wheel_is_made_of(self, path):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        copied = {name for line in only(path, "COPY") for name in line.split()[:-1]}

        assert all((ROOT / name).exists() for name in copied)
        folders = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
        folders |= set(project["tool"]["setuptools"]["package-dir"].values())
        files = {project["project"]["readme"], "pyproject.toml", *project["project"].get("license-files", ["LICENSE"])}
        assert copied >= folders | files

    def test_install_extras_that_are_declared_one_onnxruntime_and_no_second_tensorrt(self, path):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (asked,) = re.findall(r"/opt/deploykit\[([\w,]+)\]", path.read_text())

        assert set(asked.split(",")) <= set(extras) - {"tensorrt"}
        assert len({"cpu", "gpu"} & set(asked.split(","))) == 1

    def test_install_what_the_packages_ask_for_with_a_python_that_they_take(self, path):
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
        found = re.search(r"PYTHON_TAG=([\d.]+)-", path.read_text())

        if found is not None:  # NVIDIA's images bring theirs
            assert tuple(map(int, found[1].split("."))) >= tuple(map(int, wanted.split(".")))


@pytest.mark.parametrize("name", ["gpu", "host"])
class TestThoseWhoseUserIsNotRoot:
    def test_make_the_user_and_a_folder_of_its_own_before_they_become_it(self, name):
        found = instructions(DOCKER / f"{name}.Dockerfile")
        place, user = next((index, rest) for index, (word, rest) in enumerate(found) if word == "USER")

        made = " ".join(rest for word, rest in found[:place] if word == "RUN")
        assert user != "root"
        assert f" {user} " in f"{made} "
        assert f"install -d -o {user}" in made
        assert not [word for word, _ in found[place:] if word in ("RUN", "COPY")]

    def test_write_caches_where_any_user_may(self, name):
        settings = " ".join(only(DOCKER / f"{name}.Dockerfile", "ENV"))
        (folder,) = only(DOCKER / f"{name}.Dockerfile", "WORKDIR")

        assert {f"HOME={folder}", f"XDG_CACHE_HOME={folder}/.cache"} <= set(settings.split())


class TestTheOneForAJetson:
    path = ROOT / "docker" / "jetson.Dockerfile"

    def test_copies_the_device_half_that_a_run_leaves(self):
        (copied,) = only(self.path, "COPY")

        assert copied.split()[0] == DEVICE_HALF
        assert workspace._OUR_NAMES.fullmatch(DEVICE_HALF)

    def test_has_what_the_device_half_imports(self):
        assert re.search(r'pip install .*"numpy>=1\.26', " ".join(only(self.path, "RUN")))


class TestTheStandInForADevice:
    path = DOCKER / "device.Dockerfile"

    def test_installs_the_runtime_that_pyproject_asks_for(self):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [word for words in commands(self.path) if "pip" in words for word in words if word.startswith("onnxruntime>")]

        assert asked
        assert set(asked) <= set(extras["cpu"])

    def test_it_serves_by_settings_that_sshd_takes(self, tmp_path):
        if not Path("/usr/sbin/sshd").is_file():
            pytest.skip("wants sshd (Debian package openssh-server)")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "host"], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)

        done = subprocess.run(
            ["/usr/sbin/sshd", "-t", "-f", DOCKER / "sshd_device.conf", "-h", tmp_path / "host"],
            capture_output=True,
            text=True,
            check=False,
        )

        assert (done.returncode, done.stderr) == (0, "")

    def test_its_script_is_a_shell_script(self):
        assert subprocess.run(["sh", "-n", DOCKER / "start_device.sh"], check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.split(".")[0])
def test_the_readme_builds_and_runs_each_as_its_own_comment_does(path):
    lines = [line.split("  #")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    build = re.search(rf"docker build --file docker/{path.name} --tag (\S+) \S+", comments(path))

    assert build is not None
    assert build[0] in lines
    assert [line for line in lines if line.startswith("docker run ") and build[1] in line.split()]
