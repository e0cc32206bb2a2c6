"""What a GitHub workflow shows: annotations of what did not pass, and the summary of the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timings
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import timing
from deploykit.machine import Machine
from deploykit.report import github
from deploykit.report.summary import Gate, Status, Summary

few = settings(deadline=None, max_examples=100)
TEXTS = st.text(max_size=30) | st.text("%\r\n:,0AD253Cx", max_size=30)


def read(line: str) -> tuple[str, str, str]:
    """(level, title, message) as GitHub's runner reads a line: ActionCommand.cs in actions/runner."""
    assert line.startswith("::")
    assert "\n" not in line
    assert "\r" not in line
    head, _, message = line[2:].partition("::")
    level, _, properties = head.partition(" ")
    (title,) = properties.split(",")
    name, _, value = title.partition("=")
    assert name == "title"
    for escape, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ",")):
        value = value.replace(escape, character)
    for escape, character in (("%0D", "\r"), ("%0A", "\n")):
        message = message.replace(escape, character)
    return level, value.replace("%25", "%"), message.replace("%25", "%")


def gate(status: Status, number: int = 0, **changed: object) -> Gate:
    return Gate(f"e: rule {number}", status, "observed 3", **changed)


class TestAnAnnotation:
    @given(TEXTS, TEXTS)
    @few
    def test_is_one_line_that_the_runner_reads_as_it_was_meant(self, title, message):
        assert read(github.command("error", title, message)) == ("error", title, message)

    def test_has_the_gate_its_reason_and_the_offending_images(self):
        (line,) = github.annotate(Summary("net", (gate(Status.FAIL, details=("a.jpg: cat became dog",)),)))

        assert read(line) == ("error", "deploykit net: fail", "e: rule 0: observed 3\na.jpg: cat became dog")

    @pytest.mark.parametrize(
        ("status", "level"), [(Status.FAIL, "error"), (Status.ERROR, "error"), (Status.CANNOT_TELL, "warning")]
    )
    def test_is_an_error_for_a_failure_and_a_warning_for_what_cannot_be_told(self, status, level):
        (line,) = github.annotate(Summary("net", (gate(status),)))

        assert read(line)[0] == level

    @pytest.mark.parametrize("status", [Status.PASS, Status.NOT_JUDGED])
    def test_is_not_made_for_anything_else(self, status):
        assert list(github.annotate(Summary("net", (gate(status),)))) == []

    def test_comes_for_the_worst_first(self):
        gates = tuple(gate(status) for status in (Status.CANNOT_TELL, Status.PASS, Status.FAIL))

        assert [read(line)[0] for line in github.annotate(Summary("net", gates))] == ["error", "warning"]

    @pytest.mark.parametrize(("count", "shown"), [(10, 10), (11, 10), (40, 10)])
    def test_is_made_ten_times_at_most_and_the_last_says_how_many_are_left_out(self, count, shown):
        lines = list(github.annotate(Summary("net", tuple(gate(Status.FAIL, number) for number in range(count)))))

        assert len(lines) == shown
        assert read(lines[0])[2] == "e: rule 0: observed 3"
        assert read(lines[-1])[2] == ("e: rule 9: observed 3" if count == 10 else f"{count - 9} more gates did not pass")

    def test_is_no_longer_than_the_runner_shows(self):
        long = gate(Status.FAIL, details=("%" * 9_000,))

        message = read(next(github.annotate(Summary("net", (long,)))))[2]

        assert (len(message), message[-4:]) == (4096, "%...")


class TestTheSummaryOfAStep:
    SUMMARY = Summary("net", (gate(Status.FAIL),))

    def test_is_added_to_what_earlier_commands_of_the_step_wrote(self, tmp_path):
        (tmp_path / "summary").write_text("| a table |")

        github.append(tmp_path / "summary", self.SUMMARY)
        github.append(tmp_path / "summary", self.SUMMARY)

        lines = (tmp_path / "summary").read_text().splitlines()
        assert lines[:2] == ["| a table |", "## deploykit net: FAIL"]
        assert lines.count("## deploykit net: FAIL") == 2

    @pytest.mark.parametrize("left", [0, 1, 2, 100, 300, 10_000])
    def test_stays_below_a_mebibyte_above_which_github_shows_nothing(self, tmp_path, left):
        (tmp_path / "summary").write_bytes(b"x" * (2**20 - left))

        github.append(tmp_path / "summary", self.SUMMARY)

        assert (tmp_path / "summary").stat().st_size <= 2**20


@pytest.fixture
def on_github(monkeypatch, tmp_path) -> Path:
    """The file of the step's summary, as a runner names it."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step"))
    return tmp_path / "step"


@pytest.fixture
def slow(monkeypatch) -> None:
    """Every engine takes 9 ms."""

    def benchmark(engines, **_):
        medians = [9_000_000 + offset for offset in range(5)]
        return timings.report(dict.fromkeys(engines, medians), machine=Machine.probe())

    monkeypatch.setattr(timing, "benchmark", benchmark)


def annotations(text: str) -> list[tuple[str, str, str]]:
    return [read(line) for line in text.splitlines() if line.startswith("::")]


class TestInAWorkflow:
    @pytest.mark.parametrize("words", [(), ("--json",)])
    def test_a_gate_that_fails_is_annotated_on_standard_error_and_the_result_stays_what_it_is(
        self, deploykit, finished, on_github, slow, words
    ):
        engine = finished.folder / "build-onnxruntime-fp32"

        done = deploykit("benchmark", engine, "--gate", "latency <= 5 ms", *words)

        ((level, title, message),) = annotations(done.err)
        assert (done.code, level, title) == (3, "error", "deploykit benchmark: fail")
        assert message.startswith("onnxruntime fp32: latency <= 5 ms: observed 9 ms")
        assert annotations(done.out) == []
        if words:
            assert json.loads(done.out)["exit_code"] == 3

    def test_the_step_gets_a_summary(self, deploykit, finished, on_github, slow):
        deploykit("benchmark", finished.folder / "build-onnxruntime-fp32", "--gate", "latency <= 5 ms")

        assert on_github.read_text().startswith("\n## deploykit benchmark: FAIL\n")

    def test_gates_that_pass_are_not_annotated(self, deploykit, finished, on_github, slow):
        done = deploykit("benchmark", finished.folder / "build-onnxruntime-fp32", "--gate", "latency <= 50 ms")

        assert (done.code, done.err) == (0, "")
        assert "deploykit benchmark: PASS" in on_github.read_text()

    @pytest.mark.parametrize("words", [("run", "nowhere.toml"), ("run", "nowhere.toml", "--nonsense"), ("benchmark", "nowhere")])
    def test_an_error_is_one_annotation_and_a_summary(self, deploykit, on_github, words):
        done = deploykit(*words)

        ((level, title, _),) = annotations(done.err)
        assert (done.code, level, title) == (2, "error", f"deploykit {words[0]}: error")
        assert f"## deploykit {words[0]}: ERROR" in on_github.read_text()

    def test_commands_without_gates_annotate_nothing(self, deploykit, on_github):
        done = deploykit("inspect", "nowhere")

        assert done.code == 2
        assert annotations(done.err) == []
        assert not on_github.exists()

    def test_a_summary_that_cannot_be_written_is_a_warning_and_the_verdict_stays(
        self, deploykit, finished, on_github, slow, monkeypatch
    ):
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(on_github.parent / "nowhere" / "step"))

        done = deploykit("benchmark", finished.folder / "build-onnxruntime-fp32", "--gate", "latency <= 50 ms")

        ((level, _, message),) = annotations(done.err)
        assert (done.code, level) == (0, "warning")
        assert "cannot write the summary of the step" in message

    def test_without_a_file_for_it_there_is_no_summary(self, deploykit, on_github, monkeypatch):
        monkeypatch.delenv("GITHUB_STEP_SUMMARY")

        done = deploykit("benchmark", "nowhere")

        assert len(annotations(done.err)) == 1
        assert not on_github.exists()


@pytest.mark.parametrize("value", [None, "", "false"])
def test_elsewhere_nothing_is_annotated_and_no_summary_written(deploykit, on_github, monkeypatch, value):
    monkeypatch.setenv("GITHUB_ACTIONS", value) if value is not None else monkeypatch.delenv("GITHUB_ACTIONS")

    done = deploykit("benchmark", "nowhere")

    assert "::error" not in done.err
    assert not on_github.exists()
