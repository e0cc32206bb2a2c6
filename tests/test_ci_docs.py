"""docs/ci.md, executed: its jobs and shell commands as written, on a tiny network in a folder like a clean clone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import guides
import pytest
import torch
from conftest import TINY_NETWORK
from guides import Work, environment, program

from deploykit import cli
from deploykit import recipe as recipes

PAGE = guides.page("ci")
RECIPE = """
name = "net"
gate = ["disagreements <= 12"]
[model]
name = "net.py:build"
weights = "net.pth"
[data]
calibrate = "photos"
validate = "labelled"
[quantize]
speed = false
target_sqnr_db = 0.0
[benchmark]
enabled = false
"""
QUICK = ("--processes", "2", "--queries", "3", "--warmup", "1", "--offline-seconds", "0")


def blocks(language: str) -> list[str]:
    return guides.blocks(PAGE, language)


def steps(job: str) -> list[str]:
    """The shell commands of a GitHub or GitLab job, or of a Jenkins pipeline, one a line."""
    lines = [line.strip() for line in job.splitlines()]
    commands = [
        re.sub(r"^(- run: |- |sh ')", "", line)
        for line in lines
        if re.match(r"(- run: |- pip|- deploykit|sh 'p|deploykit)", line)
    ]
    return commands


@pytest.fixture(scope="module")
def cloned(tmp_path_factory, photos, labelled) -> Callable[[], Work]:
    """A new clean clone; `deploykit` is the installed package, with small numbers for what a benchmark measures."""
    quick = f'[ "$1" = benchmark ] && set -- "$@" {" ".join(QUICK)}\nexec {sys.executable} -m deploykit "$@"'
    programs = program(tmp_path_factory.mktemp("programs") / "bin", quick)

    def clone() -> Work:
        folder = tmp_path_factory.mktemp("clone")
        (folder / "net.py").write_text(TINY_NETWORK)
        (folder / "recipe.toml").write_text(RECIPE)
        names: dict[str, object] = {}
        torch.manual_seed(0)
        exec(TINY_NETWORK, names)
        torch.save(names["build"]().state_dict(), folder / "net.pth")
        (folder / "photos").symlink_to(photos)
        (folder / "labelled").symlink_to(labelled)
        return Work(folder, environment(programs))

    return clone


@pytest.fixture(scope="module")
def clone(cloned) -> Work:
    """One clone for what goes on where an earlier command ended."""
    return cloned()


def counts(path: Path) -> tuple[int, int]:
    root = ElementTree.parse(path).getroot()
    return int(root.attrib["failures"]), int(root.attrib["errors"])


class TestTheJobs:
    def test_of_five_lines_runs_as_written_on_a_clean_clone_but_for_the_installation(self, cloned, tmp_path):
        job = blocks("yaml")[0]
        clone = cloned()
        install, *commands = steps(job)

        done = [clone.run(command, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(tmp_path / "step")) for command in commands]

        assert len(job[job.index("steps:") :].splitlines()) == 1 + 5
        assert install.startswith("pip install ")
        assert [(one.returncode, one.stderr) for one in done] == [(0, "")]
        assert "## deploykit net: PASS" in (tmp_path / "step").read_text()

    @pytest.mark.parametrize("job", [*blocks("yaml")[1:], *blocks("groovy")], ids=["github", "gitlab", "jenkins"])
    def test_of_every_system_run_as_written_but_for_the_installation_and_leave_what_it_collects(self, clone, job):
        installs = [command for command in steps(job) if "pip install " in command]
        commands = [command for command in steps(job) if "pip install " not in command]

        done = [clone.run(command) for command in commands]

        assert installs
        assert [one.returncode for one in done] == [0], done[0].stderr
        for name in ("gates.xml", "engine", *(["summary.md"] if "summary.md" in job else [])):
            assert (clone.folder / name).exists()
        assert counts(clone.folder / "gates.xml") == (0, 0)

    @pytest.mark.parametrize("job", blocks("yaml")[:2])
    def test_every_run_step_is_one_line_so_that_all_of_them_are_run_here(self, job):
        assert len(steps(job)) == job.count("run:")
        assert "run: |" not in job


class TestTheCommands:
    def test_all_run_as_written_and_their_exit_code_is_what_the_xml_says(self, clone):
        for command in blocks("sh"):
            done = clone.run(command)

            file = re.search(r"--junit (\S+)", command)
            if file is None:
                assert done.returncode == 0, done.stderr
            else:  # a rule of time may fail or not be decided here, whatever the engines are
                failures, errors = counts(clone.folder / file[1])
                assert done.returncode == (3 if failures else 5 if errors else 0), done.stderr
        assert (clone.folder / "base.json").is_file()

    @pytest.mark.parametrize(("code", "passes"), [(0, True), (5, True), (1, False), (2, False), (3, False), (4, False)])
    def test_the_one_that_lets_cannot_tell_pass_lets_nothing_else_pass(self, tmp_path, code, passes):
        (command,) = [command for command in blocks("sh") if "-eq 5" in command]
        ends = Work(tmp_path, environment(program(tmp_path / "bin", f"exit {code}")))

        assert (ends.run(command).returncode == 0) is passes


class TestThePage:
    def test_has_a_recipe_that_can_be_read(self, tmp_path):
        (recipe,) = blocks("toml")
        (tmp_path / "recipe.toml").write_text(recipe)

        rules = {str(rule) for rule in recipes.load(tmp_path / "recipe.toml").rules}

        assert rules == {"drop <= 0.5 points", "agreement >= 99 %", "slowdown <= 0 %"}

    def test_lists_the_exit_codes_of_the_command_line(self):
        listed = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)

        assert listed == re.findall(
            r"\b(\d+) (?=done|failed|usage|a gate|this|too few|interrupted)", " ".join(cli.cli.help.split())
        )

    def test_has_no_job_that_passes_when_a_gate_cannot_tell(self):
        assert not [job for job in (*blocks("yaml"), *blocks("groovy")) if "allow_failure" in job or "continue-on-error" in job]

    def test_lists_every_command_that_writes_junit(self):
        writing = [name for name, command in cli.cli.commands.items() if "junit" in {option.name for option in command.params}]

        assert sorted(writing) == ["benchmark", "bisect", "export", "parity", "run"]
        assert "`run`, `export`, `benchmark`, `parity` and `bisect`\nhave both" in PAGE
