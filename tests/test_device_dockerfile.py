"""What docker/device.Dockerfile names is there: sources of COPY, our own commands, Debian packages."""

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

from deploykit import cli

TREE = Path(__file__).parents[1]
DOCKER = TREE / "docker"
FILES = [DOCKER / "device.Dockerfile"]
WORDS = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "ENTRYPOINT", "CMD", "VOLUME", "SHELL", "LABEL"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction and the rest of its line, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines()) if word]


def commands(path: Path) -> list[list[str]]:
    """The commands of RUN instructions, as lists of words."""
    text = " && ".join(rest for word, rest in instructions(path) if word == "RUN")
    return [[word for word in shlex.split(part) if not re.match("[A-Z_]+=", word)] for part in text.split("&&")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
class TestADockerfile:
    def test_has_only_instructions_that_docker_knows_and_begins_with_an_image(self, path):
        found = [word for word, _ in instructions(path)]

        assert set(found) <= WORDS
        assert next(word for word in found if word != "ARG") == "FROM"

    def test_copies_what_is_in_the_tree(self, path):
        context = TREE / re.search(rf"docker build --file docker/{path.name} .* (\S+)$", path.read_text(), re.M)[1]
        for word, rest in instructions(path):
            if word == "COPY" and "--from=" not in rest:
                *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
                for source in sources:
                    assert list(context.glob(source.rstrip("/") or ".")), f"{source} is not in {context}"

    def test_starts_what_it_copied_or_what_is_installed(self, path):
        copied = [shlex.split(rest)[-1] for word, rest in instructions(path) if word == "COPY"]
        for word, rest in instructions(path):
            if word in ("ENTRYPOINT", "CMD") and rest.startswith("["):
                program = json.loads(rest)[0]
                assert program in (*copied, "deploykit", "python3", "bash", "sh"), program

    def test_installs_debian_packages_that_there_are(self, path):
        if shutil.which("apt-cache") is None:
            pytest.skip("wants apt-cache (Debian package apt)")
        wanted = [word for words in commands(path) if words[:2] == ["apt-get", "install"] for word in words[2:] if word[0] != "-"]

        known = subprocess.run(["apt-cache", "show", "--no-all-versions", *wanted], capture_output=True, text=True, check=False)

        assert set(wanted) <= set(re.findall(r"^Package: (\S+)$", known.stdout, re.M))

    def test_installs_the_runtime_that_pyproject_asks_for(self, path):
        extras = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [word for words in commands(path) if "pip" in words for word in words]

        for word in asked:
            if word.startswith("onnxruntime>"):
                assert word in extras["cpu"]

    def test_says_commands_of_ours_that_there_are(self, path):
        for name in re.findall(r"^# +deploykit ([a-z-]+)", path.read_text(), re.M):
            assert name in cli.cli.commands


def test_the_stand_in_serves_by_settings_that_sshd_takes(tmp_path):
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


def test_the_stand_ins_script_is_a_shell_script():
    assert subprocess.run(["sh", "-n", DOCKER / "start_device.sh"], check=False).returncode == 0
