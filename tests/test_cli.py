"""The command line as such: help, exit codes, pipes, progress bars. What the commands do is in the other files."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
import tomllib

from deploykit import cli
from deploykit import recipe as recipes

COMMANDS = sorted(cli.cli.commands)


class TestHelp:
    def test_the_commands_are_listed_with_what_they_do(self, deploykit):
        outcome = deploykit("--help")

        assert (outcome.code, outcome.err) == (0, "")
        for name, command in cli.cli.commands.items():
            assert f"  {name} " in outcome.out
            assert " ".join(command.get_short_help_str().split()[:4]) in " ".join(outcome.out.split())

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_help_that_names_each_of_its_options(self, deploykit, name):
        outcome = deploykit(name, "-h")

        assert outcome.code == 0
        assert cli.cli.commands[name].help
        for parameter in cli.cli.commands[name].params:
            if isinstance(parameter, click.Option):
                assert parameter.help, parameter.name
                assert max(parameter.opts, key=len) in outcome.out

    def test_options_show_the_default_and_the_words_that_the_recipe_declares(self, deploykit):
        text = " ".join(deploykit("export", "--help").out.split())

        assert "[auto|require|skip]" in text
        assert "[default: dynamic]" in text
        assert "[default: 64]" in text
        assert "fresh processes for each engine" in text

    def test_without_a_command_the_help_is_shown_and_the_code_is_2(self, deploykit):
        outcome = deploykit()

        assert outcome.code == 2
        assert outcome.err.startswith("Usage: ")
        assert "Commands:" in outcome.err

    def test_the_version_is_that_of_the_package(self, deploykit):
        pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

        assert pyproject["project"]["version"] in deploykit("--version").out

    def test_help_comes_without_loading_anything_heavy(self):
        heavy = ("torch", "numpy", "onnx", "onnxruntime", "PIL", "sklearn")
        program = (
            "import sys; from deploykit.cli import cli; cli.main(['export', '--help'], standalone_mode=False)\n"
            f"sys.exit(' '.join(name for name in {heavy} if name in sys.modules))"
        )

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

        assert done.stderr.strip() == ""


class TestEntryPoints:
    def test_python_m_deploykit_is_the_installed_command(self, shell):
        (script,) = entry_points(group="console_scripts", name="deploykit")
        program = f"import sys; sys.argv[0] = 'deploykit'; from {script.module} import {script.attr}; {script.attr}()"

        installed = subprocess.run(
            [sys.executable, "-c", program, "doctor", "--json"], capture_output=True, text=True, check=False
        )
        module = shell("doctor", "--json")

        assert (installed.returncode, installed.stderr) == (module.code, module.err) == (0, "")
        assert json.loads(installed.stdout) == json.loads(module.out)

    def test_the_module_calls_itself_by_a_name_that_can_be_typed(self, shell):
        assert shell("--help").out.startswith("Usage: python -m deploykit [OPTIONS]")


class TestResults:
    @pytest.mark.parametrize("words", [["models", "resnet"], ["doctor"]])
    def test_json_is_one_document_and_text_is_not_json(self, deploykit, words):
        assert json.loads(deploykit(*words, "--json").out)
        with pytest.raises(json.JSONDecodeError):
            json.loads(deploykit(*words).out)

    def test_models_are_filtered_by_a_part_of_their_name(self, deploykit):
        found = json.loads(deploykit("models", "cifar", "--json").out)

        assert [entry["name"] for entry in found] == [f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110)]

    def test_no_model_of_that_name_is_a_mistake(self, deploykit):
        outcome = deploykit("models", "nonsense")

        assert (outcome.code, outcome.out) == (2, "")
        assert "no network's name holds 'nonsense'" in outcome.err

    def test_doctor_says_why_a_runtime_does_not_load(self, deploykit):
        runtimes = json.loads(deploykit("doctor", "--json").out)["runtimes"]

        assert runtimes["torchscript"] == "loads"
        assert runtimes["tensorrt"] == "loads" or "tensorrt" in runtimes["tensorrt"]

    def test_inspect_recognises_a_finished_run(self, deploykit, finished):
        found = json.loads(deploykit("inspect", finished.folder, "--json").out)

        assert (found["kind"], found["name"], found["exit_code"]) == ("run", "tiny", 0)

    def test_the_result_as_text_shows_stages_gates_and_the_report(self, deploykit, finished, tmp_path):
        folder = finished.copied_to(tmp_path / "run")

        text = deploykit("run", folder / "recipe.toml", "--output", folder).out

        for part in ("export-torchscript", "skipped", "disagreements <= 544", "int8 layers", f"report: {folder}/report.html"):
            assert part in text

    def test_results_go_into_a_folder_of_the_recipes_name_when_none_is_given(self, deploykit, network, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        assert deploykit("export", network, "--to", "onnx").code == 0

        assert recipes.load(tmp_path / "runs" / "tiny_net" / "recipe.toml").name == "tiny_net"

    def test_the_result_repeats_the_command_so_that_a_shell_can_run_it(self, deploykit, network, tmp_path):
        words = ["export", network, "--to", "onnx", "--output", str(tmp_path / "a folder"), "--json"]

        assert json.loads(deploykit(*words).out)["command"] == f"deploykit {' '.join(words)}".replace(words[-2], f"'{words[-2]}'")


class TestPipes:
    def test_a_reader_that_has_seen_enough_is_no_error_worth_a_traceback(self):
        reader, writer = os.pipe()
        os.close(reader)

        done = subprocess.run(
            [sys.executable, "-m", "deploykit", "models"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )

        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


class TestProgress:
    WORDS = ("--to", "onnxruntime", "--set", "benchmark.enabled=false", "--json")

    def test_nothing_is_drawn_when_standard_error_is_not_a_terminal(self, shell, network, photos, tmp_path):
        outcome = shell("export", network, *self.WORDS, "--calibrate", photos, "--output", tmp_path / "out")

        assert (outcome.code, outcome.err) == (0, "")

    def test_bars_are_drawn_on_a_terminal_and_the_result_stays_clean(self, network, photos, tmp_path):
        words = ["export", network, *self.WORDS, "--calibrate", photos, "--output", tmp_path / "out"]
        ours, theirs = pty.openpty()

        # Standard output goes to a file: nobody would empty a pipe while the terminal is being read.
        with (tmp_path / "result.json").open("w") as result:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploykit", *words],
                stdout=result,
                stderr=theirs,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            )
            os.close(theirs)
            drawn = _everything_from(ours)
            process.wait()

        assert process.returncode == 0
        assert "parity: PyTorch" in drawn
        assert "12/12" in drawn
        assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 0


def _everything_from(terminal: int) -> str:
    drawn = b""
    try:
        while piece := os.read(terminal, 4096):
            drawn += piece
    except OSError:  # how Linux says that the other side of a terminal is closed
        pass
    finally:
        os.close(terminal)
    return drawn.decode()
