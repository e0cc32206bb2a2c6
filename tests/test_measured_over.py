"""Calibrating the predictor for a device that is reached over a connection: what is measured there, and what is believed."""

from __future__ import annotations

import json
import shutil
import sys
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timings
from click.testing import CliRunner
from sshd import sshd
from test_agent import NO_GATE
from test_bundle import tiny_run
from test_forecast import copied

from deploykit import artifact, deploy, forecast
from deploykit.bundle import pack
from deploykit.cli import cli
from deploykit.deploy import How
from deploykit.errors import DeploykitError, UsageError
from deploykit.forecast import measured, over
from deploykit.recipe import BenchmarkTable
from deploykit.remote import Done
from deploykit.remote.process import Local

FEW = BenchmarkTable(processes=2, queries=5)


class Quiet(Local):
    """This machine, as if nobody else were at work on it; `says` changes what its device half answers to a benchmark.

    A release is measured once, and the answer is kept in `known`.
    """

    def __init__(self, known: dict[str, Done], **says: Any) -> None:
        super().__init__()
        self.known, self.says = known, says

    def run(self, words: Any, **more: Any) -> Done:
        if "benchmark" not in words:
            return super().run(words, **more)
        done = self.known.setdefault("done", self.known.get("done") or super().run(words, **more))
        answer = json.loads(done.stdout)
        answer["latency"]["doubts"] = []
        return replace(done, stdout=json.dumps({**answer, **self.says}).encode())


class Board(Local):
    """A device with these files, and no others."""

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__()
        self.files = files

    def run(self, words: Any, **more: Any) -> Done:
        lines = [f"{name} {b64encode(text.encode()).decode()}\n" for name, text in self.files.items()]
        return Done(0, "".join(lines).encode(), "")


@pytest.fixture(scope="module")
def installed(portable, tmp_path_factory) -> tuple[Path, Path]:
    """A bundle of a small network, deployed to this machine, and the folder of all releases."""
    folder = tmp_path_factory.mktemp("calibration")
    run = tiny_run(folder / "run", recipe=NO_GATE)
    shutil.rmtree(run / "export-onnx")
    artifact.make(run / "export-onnx", "key", lambda into: copied(portable("residual"), into))
    made = pack.pack(run, folder / "tiny.bundle", release=1)
    done = deploy.deploy(made.path, Local, How(root=str(folder / "all/tiny"), python=sys.executable), owner="me")
    assert done.activated, done
    return made.path, folder / "all"


@pytest.fixture(scope="module")
def known() -> dict[str, Done]:
    return {}


@pytest.fixture
def measure(installed, known, tmp_path) -> Callable[..., dict[str, Any]]:
    def run(roots: Path = installed[1], **says: Any) -> dict[str, Any]:
        place = {"roots": str(roots), "python": sys.executable}
        return over.measure(Quiet(known, **says), installed[:1], FEW, measured.File(tmp_path / "mine.json"), owner="me", **place)

    return run


class TestReleasesAreMeasuredOnTheDevice:
    def test_the_file_has_the_kernels_of_the_graph_that_ran_there_and_what_the_device_is(self, measure, installed, tmp_path):
        found = measure()

        kept = json.loads((tmp_path / "mine.json").read_text())["measurements"]
        network = forecast.graphs.of_bundle(installed[0], "onnxruntime-fp32")
        assert [(row["model"], row["precision"], row["batch"]) for row in kept] == [("tiny", "fp32", 1)]
        assert [kernel["name"] for kernel in kept[0]["kernels"]] == [layer.name for layer in network.layers]
        assert kept[0]["latency_ms"] == found["measured"][0]["latency_ms"] > 0
        assert forecast.target_of(None, measured=tmp_path / "mine.json") == forecast.target_of("local")

    def test_predictions_are_fitted_to_it(self, measure, installed, tmp_path):
        measure()
        network = forecast.graphs.of_bundle(installed[0], "onnxruntime-fp32")

        target = forecast.target_of("local")
        assert forecast.predict(network, target, precision="fp32", measured=tmp_path / "mine.json").calibrated

    def test_by_the_command_line_over_ssh(self, installed, tmp_path):
        bundle, roots = installed
        with sshd(tmp_path / "sshd") as server:
            words = ["benchmark", server.address, str(bundle), "--calibrate-predictor", str(tmp_path / "mine.json")]
            words += ["--roots", str(roots), "--python", sys.executable, "--ssh-config", str(server.config)]
            told = CliRunner().invoke(cli, [*words, "--processes", "2", "--queries", "5"])
        # Another program may be at work here, and then it is refused: by name, and with nothing written.
        if isinstance(told.exception, UsageError):
            assert "nothing is fitted on a run that is not valid" in str(told.exception)
            assert not (tmp_path / "mine.json").exists()
        else:
            assert told.exit_code == 0, told.output
            assert f"kept in {tmp_path / 'mine.json'}" in told.output

    def test_a_disturbed_run_is_refused(self, measure, tmp_path):
        with pytest.raises(UsageError, match=r"(?s)not valid.*a neighbour took the CPU"):
            measure(latency={"median_ns": 1000, "doubts": ["a neighbour took the CPU"]})
        assert not (tmp_path / "mine.json").exists()

    @pytest.mark.parametrize(
        "says",
        [
            {"engine": "onnxruntime-int8-0-abc"},
            {"engine": "../../x-0-abc"},
            {"latency": {"median_ns": -1, "doubts": []}},
            {"latency": {"median_ns": float("nan"), "doubts": []}},
            {"latency": None},
        ],
    )
    def test_what_a_device_says_is_not_taken_on_trust(self, measure, tmp_path, says):
        with pytest.raises(DeploykitError):
            measure(**says)
        assert not (tmp_path / "mine.json").exists()

    def test_bundles_that_are_not_installed_there_are_named_with_the_command(self, measure):
        with pytest.raises(
            UsageError, match=r"(?s)lacks 1 of the bundles.*deploykit deploy .*tiny.bundle local --root /nowhere/tiny"
        ):
            measure(Path("/nowhere"))


class TestWhatTheDeviceIs:
    def test_a_jetson_is_known_by_its_files_and_taken_in_its_power_mode(self):
        files = {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
            "var/lib/nvpmodel/status": "pmode:0003 fmode:quiet",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=3 NAME=7W >",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit Super\0",
            "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
        }

        found = over.target_of(Board(files), replace(timings.HERE, memory_bytes=8 << 30))

        assert (found.name, found.mode) == ("orin-nano-8gb-super", "7W")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("/etc/passwd", "x"),
            ("../etc/nvpmodel.conf", "x"),
            ("sys/class/devfreq/../../../x/max_freq", "1"),
            ("etc/shadow", "x"),
        ],
    )
    def test_a_file_that_was_not_asked_for_is_refused(self, name, content):
        with pytest.raises(DeploykitError, match="was not asked for"):
            over.target_of(Board({name: content}), timings.HERE)

    def test_what_it_reads_over_a_connection_is_what_this_machine_reads_itself(self):
        machine = timings.HERE

        assert over.target_of(Local(), machine) == forecast.here.of_machine(machine)


class TestTheCommandLine:
    def test_a_device_is_measured_for_the_predictor_alone(self):
        told = CliRunner().invoke(cli, ["benchmark", "ssh://board", "x.bundle"])

        assert "add --calibrate-predictor FILE" in str(told.exception)

    def test_options_that_a_device_does_not_know_are_refused_together(self):
        words = ["--calibrate-predictor", "x.json", "--gate", "latency <= 5 ms", "--scenario", "server", "--rate", "5"]
        told = CliRunner().invoke(cli, ["benchmark", "ssh://board", "x.bundle", *words])

        assert all(option in str(told.exception) for option in ("--gate", "--scenario", "--rate"))

    def test_options_about_a_device_want_one(self, tmp_path):
        told = CliRunner().invoke(cli, ["benchmark", str(tmp_path), "--python", "python3.10"])

        assert "--roots, --python and --ssh-config are about a device" in str(told.exception)
