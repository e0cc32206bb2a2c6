"""`deploykit benchmark`: what it takes, what it refuses before it measures, what it tells, and how it ends.

Verdicts are judged on reports that nobody measured, so that no test depends on how busy a machine is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import timings

from deploykit import build, timing
from deploykit.artifact import Artifact, digest_file, read_artifact, write_manifest
from deploykit.benchmark import judge
from deploykit.benchmark.report import BenchmarkReport, about
from deploykit.build import Engine
from deploykit.errors import UsageError
from deploykit.gate import Verdict, parse_rule
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.telemetry import board

QUICK = ("--processes", 5, "--queries", 3, "--warmup", 1, "--offline-seconds", 0)
FP32, INT8 = "onnxruntime fp32", "onnxruntime int8"
MS = 1_000_000
NOISE = {"others_ns": timings.SECOND}


@pytest.fixture(scope="module")
def run_folder(portable, tmp_path_factory) -> Path:
    """A run with an FP32 and an INT8 engine, and what a killed one leaves beside them."""
    run = tmp_path_factory.mktemp("run")
    int8 = networks.quantized(portable("lenet5"), "onnxruntime", networks.made(tmp_path_factory.mktemp("int8") / "int8"))
    for name, model in (("build-onnxruntime-fp32", portable("lenet5")), ("build-onnxruntime-int8", int8)):
        write_manifest(networks.made(run / name), build.build(model, "onnxruntime", run / name, threads=1))
    (run / "build-onnxruntime-fp16.partial").mkdir()
    shutil.copytree(run / "build-onnxruntime-int8", run / "build-onnxruntime-int8.stale")
    return run


@pytest.fixture
def fp32(run_folder) -> Path:
    return run_folder / "build-onnxruntime-fp32"


@pytest.fixture
def int8(run_folder) -> Path:
    return run_folder / "build-onnxruntime-int8"


def around(median_ns: int, spread: float = 0.001, count: int = 5) -> list[int]:
    """Medians of processes on either side of one."""
    return [round(median_ns * (1 + spread * offset)) for offset in np.linspace(-1, 1, count)]


@pytest.fixture
def measured(monkeypatch) -> Callable[..., None]:
    """The next benchmarks find these medians for each engine in turn, on this machine; `changed` are the conditions."""

    def found(*medians: Sequence[int], **changed: Any) -> None:
        def benchmark(engines: Mapping[str, Artifact], **settings: Any) -> BenchmarkReport:
            of_engines = dict(zip(engines, medians, strict=True))
            return timings.report(of_engines, machine=Machine.probe(), **changed)

        monkeypatch.setattr(timing, "benchmark", benchmark)

    return found


@pytest.fixture
def nothing_measured(monkeypatch) -> None:
    def benchmark(engines: object, **settings: object) -> BenchmarkReport:
        raise AssertionError("it measured what it had to refuse")

    monkeypatch.setattr(timing, "benchmark", benchmark)


@pytest.fixture
def refused(deploykit, nothing_measured) -> Callable[..., str]:
    """Words that have to be refused before anything is measured; the message without its line breaks."""

    def run(*words: object) -> str:
        outcome = deploykit("benchmark", *words)
        assert (outcome.code, outcome.out) == (2, "")
        return " ".join(outcome.err.split())

    return run


class TestTheCommand:
    """End to end, on a tiny engine in fresh processes: whatever the times and however busy the machine."""

    def test_one_engine_is_measured_told_as_a_table_and_compared_with_itself_later(self, deploykit, fp32, tmp_path):
        raw = tmp_path / "raw.json"

        first = deploykit("benchmark", fp32, *QUICK, "--output", raw)
        later = deploykit("benchmark", fp32, *QUICK, "--baseline", raw, "--fail-on", "99999999%", "--json")

        assert first.code == 0, first.err
        assert FP32 in first.out
        assert "against itself" in first.out
        assert "the run is " in first.out
        assert f"raw samples: {raw}" in first.out
        assert len(judge.load(raw).engine(FP32).processes) == 10
        told = json.loads(later.out)
        assert told["engines"][0]["label"] == FP32
        assert [len(latencies) for latencies in told["engines"][0]["latency_ns"]] == [3] * 10
        assert [entry["label"] for entry in told["ratios"]] == [f"{FP32} / its baseline"]
        assert told["gates"][0]["rule"] == f"{FP32}: slowdown <= 99999999 %"
        reason = told["gates"][0]["reason"]
        assert later.code == told["exit_code"] == (5 if "the run is invalid" in reason else 0)
        assert "the run is invalid" in reason or (told["warnings"], told["baseline_verdict"]) == ([], "valid")

    def test_a_run_folder_gives_all_its_engines_the_first_as_baseline(self, deploykit, run_folder):
        words = ["--processes", 1, "--queries", 2, "--offline-seconds", 0, "--offline-batch", 2, "--offline-batch", 3, "--json"]

        outcome = deploykit("benchmark", run_folder, *words)

        told = json.loads(outcome.out)
        assert outcome.code == 0
        assert [engine["label"] for engine in told["engines"]] == [FP32, INT8]
        assert told["baseline"] == FP32
        assert [entry["label"] for entry in told["ratios"]] == [f"{INT8} / {FP32}"]
        assert [point["batch"] for point in told["engines"][1]["offline"]] == [2, 3]
        assert told["engines"][1]["bytes"] == (run_folder / "build-onnxruntime-int8" / "engine.onnx").stat().st_size
        assert f"{INT8}: 1 processes, and an interval takes at least 5" in told["warnings"]
        assert sorted(set(told["settings"]["order"])) == [FP32, INT8]

    def test_its_result_is_json_that_any_reader_takes(self, deploykit, fp32, int8, measured):
        measured(around(MS), around(2 * MS))

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        json.loads(deploykit("benchmark", fp32, int8, "--json").out, parse_constant=refuse)


class TestEngines:
    def test_an_engine_may_be_named_by_its_folder_or_by_a_file_in_it(self, fp32, tmp_path):
        assert (
            timing.engines_at([fp32], tmp_path)
            == timing.engines_at([fp32 / "engine.onnx"], tmp_path)
            == {FP32: read_artifact(fp32)}
        )

    @pytest.mark.parametrize("beside", ["an engine", "another program's manifest"])
    def test_a_strangers_file_is_built_and_measured_itself_whatever_lies_beside_it(self, fp32, portable, tmp_path, beside):
        folder = tmp_path / "build"
        if beside == "an engine":
            shutil.copytree(fp32, folder)
        else:
            folder.mkdir()
            (folder / "manifest.json").write_text('{"name": "a web app", "icons": []}')
        path = Path(shutil.copy(portable("lenet5").path, folder / "theirs.onnx"))

        ((label, engine),) = timing.engines_at([path], tmp_path / "scratch").items()

        assert label == "theirs.onnx"
        assert engine.folder.is_relative_to(tmp_path / "scratch")
        assert engine.facts["model"] == f"sha256 {digest_file(path)}"

    def test_a_file_beside_an_engine_is_not_the_engine(self, refused, fp32):
        assert f"- {fp32}/session.json is neither an engine, nor a bundle, nor a run" in refused(fp32 / "session.json")

    def test_an_engine_that_was_changed_is_refused_and_not_taken_for_a_strangers_file(self, refused, fp32, tmp_path):
        copy = shutil.copytree(fp32, tmp_path / "copy")
        (copy / "engine.onnx").write_bytes((copy / "engine.onnx").read_bytes()[:-1])

        assert "engine.onnx is not the file that was published" in refused(copy / "engine.onnx")

    def test_an_engine_of_a_runtime_that_makes_none_is_refused_so_that_no_program_in_it_runs(self, refused, fp32, tmp_path):
        copy = shutil.copytree(fp32, tmp_path / "copy")
        found = read_artifact(copy)
        write_manifest(copy, replace(found, facts={**found.facts, "runtime": "torchscript"}))

        assert "copy is neither an engine, nor a bundle, nor a run" in refused(copy)

    def test_a_size_is_refused_where_nothing_leaves_it_open(self, refused, fp32):
        assert "--size 32 says nothing" in refused(fp32, "--size", 32)

    def test_two_engines_of_a_kind_are_told_apart_by_where_they_are(self, fp32, tmp_path):
        copy = shutil.copytree(fp32, tmp_path / "copy")

        assert list(timing.engines_at([fp32, copy], tmp_path)) == [f"{fp32}: {FP32}", f"{copy}: {FP32}"]

    def test_what_a_killed_run_left_is_no_engine(self, run_folder, tmp_path):
        assert list(timing.engines_at([run_folder], tmp_path)) == [FP32, INT8]

    def test_the_same_engine_twice_is_refused(self, refused, fp32):
        assert refused(fp32, fp32) == f"error: the same engine is named twice - {fp32}: {FP32}"

    def test_everything_that_is_no_engine_is_named(self, refused, portable, fp32, tmp_path):
        model = shutil.copytree(portable("lenet5").folder, tmp_path / "model")
        (tmp_path / "empty").mkdir()

        message = refused(tmp_path / "empty", fp32, tmp_path / "nowhere")

        assert f"- {tmp_path}/empty is neither an engine, nor a bundle, nor a run that has one" in message
        assert f"- {tmp_path}/nowhere is neither an engine, nor a bundle, nor a run that has one" in message
        assert str(fp32) not in message
        assert model.is_dir()

    def test_a_path_that_the_file_system_refuses_is_named(self, refused):
        assert "file name too long" in refused("x" * 5000)

    def test_engines_whose_queries_are_of_different_size_are_not_compared(self, refused, fp32, tmp_path):
        fixed = networks.exported("lenet5", tmp_path / "model", batch=3)
        folder = networks.made(tmp_path / "engine")
        write_manifest(folder, build.build(fixed, "onnxruntime", folder, threads=1))

        message = refused(fp32, folder)

        assert "these engines cannot be compared" in message
        assert f"- {fp32}: {FP32}: a query is one image" in message
        assert f"- {folder}: {FP32}: a query is 3 images" in message


class TestOptions:
    @pytest.mark.parametrize("text", ["5%", "5 %", "5", " 5 % ", "5.0%"])
    def test_fail_on_is_a_slowdown_in_per_cent(self, deploykit, fp32, int8, measured, text):
        measured(around(MS), around(2 * MS))

        told = json.loads(deploykit("benchmark", fp32, int8, "--fail-on", text, "--json").out)

        assert [gate["rule"] for gate in told["gates"]] == [f"{INT8}: slowdown <= 5 %"]

    @pytest.mark.parametrize("text", ["", "%", "soon", "-5%", "5%%", "5 ms", "nan"])
    def test_fail_on_anything_else_is_refused(self, refused, fp32, int8, text):
        message = refused(fp32, int8, "--fail-on", text)

        assert "these are no rules of time" in message
        assert f"--fail-on {text!r} is no percentage, such as 5%" in message

    def test_every_rule_that_is_none_of_time_is_named_at_once(self, refused, fp32):
        message = refused(fp32, "--gate", "drop <= 1 points", "--gate", "latency <= fast", "--gate", "latency <= 5 ms")

        assert "- 'drop <= 1 points' is about answers; `deploykit run` judges it" in message
        assert "- 'latency <= fast' is not a gate rule" in message
        assert "5 ms' is" not in message

    def test_a_slowdown_of_the_only_engine_is_refused(self, refused, fp32):
        message = refused(fp32, "--fail-on", "5%")

        assert f"there is nothing to be slower than why: {FP32} is the only engine" in message
        assert "--baseline FILE" in message

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (("--offline-batch", 0), "benchmark.offline_batches: 0 is not between 1 and 4096"),
            (("--offline-seconds", "nan"), "benchmark.offline_seconds: nan is not between 0 and 3600"),
            (("--offline-seconds", -1), "-1.0 is not in the range"),
            (("--processes", 0), "0 is not in the range"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, refused, fp32, words, why):
        assert why in refused(fp32, *words)

    def test_an_output_that_cannot_be_written_is_refused_before_the_minutes_it_would_cost(self, refused, fp32, tmp_path):
        assert f"there is no folder {tmp_path}/nowhere" in refused(fp32, "--output", tmp_path / "nowhere" / "raw.json")
        assert "it is a folder" in refused(fp32, "--output", tmp_path)

    def test_so_is_one_in_a_folder_that_may_not_be_written(self, refused, fp32, tmp_path, monkeypatch):
        raw = tmp_path / "raw.json"
        monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path, os.W_OK))  # root may all

        assert f"cannot write {raw} why: there is no right to write in {tmp_path}" in refused(fp32, "--output", raw)


class TestBaselines:
    @pytest.fixture
    def same(self, fp32, int8) -> dict[str, Any]:
        """What a baseline says about the engines that are measured here."""
        return {FP32: about(read_artifact(fp32)), INT8: about(read_artifact(int8))}

    @pytest.fixture
    def baseline(self, tmp_path, same) -> Callable[..., Path]:
        def write(medians: Mapping[str, Sequence[int]], **changed: Any) -> Path:
            path = tmp_path / "baseline.json"
            judge.save(timings.report(medians, **{"machine": Machine.probe(), "engines": same, **changed}), path)
            return path

        return write

    def test_what_is_saved_can_be_loaded(self, tmp_path):
        report = timings.report({"a": [1, 2], "b": [3, 4]}, clock_khz=(5, 6), energy_uj=7)

        judge.save(report, tmp_path / "raw.json")

        assert judge.load(tmp_path / "raw.json") == report

    def test_another_machines_is_refused_with_what_differs(self, refused, fp32, baseline):
        here = Machine.probe()
        path = baseline({FP32: around(MS)}, machine=replace(here, cpu="a toaster", cores=here.cores + 1, python="2.7"))

        message = refused(fp32, "--baseline", path)

        assert "the baseline was measured on another machine" in message
        assert f"- cpu: a toaster there, {here.cpu} here" in message
        assert f"- cores: {here.cores + 1} there, {here.cores} here" in message
        assert "python" not in message

    @pytest.mark.parametrize("others", [("a",), ("a", "b")])
    def test_one_of_other_engines_alone_is_refused(self, refused, int8, baseline, others):
        message = refused(int8, "--baseline", baseline({label: around(MS) for label in others}))

        assert f"the baseline does not hold '{INT8}' why: it holds {', '.join(others)}" in message

    @pytest.mark.parametrize(
        ("key", "there"), [("model", "resnet18"), ("input", [["batch", 3, 224, 224]]), ("threads", 8), ("threads", None)]
    )
    def test_one_of_another_network_input_or_number_of_threads_is_refused(self, refused, fp32, baseline, same, key, there):
        here = same[FP32][key]
        path = baseline({FP32: around(MS)}, engines={FP32: {**same[FP32], key: there}})

        message = refused(fp32, "--baseline", path)

        assert f"the baseline's '{FP32}' is something else - {key}: {there} there, {here} here try: measure a baseline" in message

    @pytest.mark.parametrize(("word", "number", "there"), [("--queries", 31, 30), ("--warmup", 6, 5)])
    def test_one_with_another_number_of_queries_or_another_warmup_is_refused(self, refused, fp32, baseline, word, number, there):
        message = refused(fp32, "--baseline", baseline({FP32: around(MS)}), word, number)

        assert "the baseline was measured with other settings" in message
        assert f"- {word.lstrip('-')}: {there} there, {number} here try: give the same ones" in message

    def test_one_that_does_not_say_what_was_measured_is_refused(self, refused, fp32, baseline):
        message = refused(fp32, "--baseline", baseline({FP32: around(MS)}, engines={}))

        assert "- model: None there, lenet5 here" in message
        assert "- threads: None there, 1 here" in message
        assert "measure a baseline of this engine" in message

    def test_one_whose_queries_were_of_another_size_is_refused(self, refused, fp32, tmp_path, same):
        report = timings.report({FP32: around(MS)}, machine=Machine.probe(), engines=same)
        batches = tuple(replace(process, images_per_query=4) for process in report.processes)
        judge.save(replace(report, processes=batches), tmp_path / "raw.json")

        assert f"- {FP32} in the baseline: a query is 4 images" in refused(fp32, "--baseline", tmp_path / "raw.json")

    def test_an_engine_is_compared_with_the_one_of_its_name_wherever_that_stands(self, deploykit, int8, baseline, measured):
        path = baseline({"a": around(7 * MS), INT8: around(MS)})
        measured(around(2 * MS))

        told = json.loads(deploykit("benchmark", int8, "--baseline", path, "--json").out)

        assert told["ratios"][0]["label"] == f"{INT8} / its baseline"
        assert told["ratios"][0]["ratio"] == 2
        assert told["ratios"][0]["different"] is True

    def test_every_engine_is_compared_with_itself(self, deploykit, run_folder, baseline, measured):
        path = baseline({INT8: around(MS), FP32: around(4 * MS)})
        measured(around(8 * MS), around(3 * MS))

        told = json.loads(deploykit("benchmark", run_folder, "--baseline", path, "--fail-on", "150%", "--json").out)

        assert [entry["ratio"] for entry in told["ratios"]] == [2, 3]
        assert [gate["verdict"] for gate in told["gates"]] == ["pass", "fail"]

    def test_one_that_was_disturbed_proves_nothing_and_says_so(self, deploykit, fp32, baseline, measured):
        path = baseline({FP32: around(MS)}, **NOISE)
        measured(around(9 * MS))

        outcome = deploykit("benchmark", fp32, "--baseline", path, "--fail-on", "5%")

        assert outcome.code == 5
        assert "the run is valid" in outcome.out
        assert f"the baseline is invalid: {FP32}: 10 of 10 processes were disturbed: other programs" in outcome.out

    def test_nor_does_a_quiet_one_when_this_run_was_disturbed(self, deploykit, fp32, baseline, measured):
        path = baseline({FP32: around(MS)})
        measured(around(9 * MS), **NOISE)

        outcome = deploykit("benchmark", fp32, "--baseline", path, "--fail-on", "5%")

        assert outcome.code == 5
        assert "the run is invalid" in outcome.out
        assert "the baseline is valid" in outcome.out

    @pytest.mark.parametrize("then", [{}, NOISE])
    @pytest.mark.parametrize("now", [{}, NOISE])
    def test_nothing_is_called_different_where_either_run_was_disturbed(self, deploykit, fp32, baseline, measured, then, now):
        path = baseline({FP32: around(MS)}, **then)
        measured(around(9 * MS), **now)

        told = json.loads(deploykit("benchmark", fp32, "--baseline", path, "--json").out)

        assert told["ratios"][0]["different"] is (not then and not now)

    @pytest.mark.parametrize(
        ("then", "now", "can_tell"),
        [
            (1_000_000, 1_040_000, True),
            (1_040_000, 1_000_000, True),
            (1_000_000, 1_060_000, False),
            (1_060_000, 1_000_000, False),
        ],
    )
    def test_at_another_clock_no_slowdown_can_be_told(self, then, now, can_tell):
        earlier, report = (timings.report({"a": around(MS)}, fixed_work_ns=(work,) * 3) for work in (then, now))
        assert earlier.doubts == report.doubts == ()

        found = judge.judge_since(parse_rule("slowdown <= 5 %"), report, earlier, "a")

        reason = (
            f"the same fixed work took {then // 1000} µs in the baseline and {now // 1000} µs now: the machine's clock changed"
        )
        assert found.verdict is (Verdict.PASS if can_tell else Verdict.CANNOT_TELL)
        assert found.reason.endswith(f"the run is invalid: {reason}") is not can_tell

    @pytest.mark.parametrize("works", [(1_000_000, 1_200_000), (1_200_000, 1_000_000)])
    def test_nothing_is_called_different_at_another_clock_and_the_table_says_why(
        self, deploykit, fp32, baseline, measured, works
    ):
        path = baseline({FP32: around(MS)}, fixed_work_ns=(works[0],) * 3)
        measured(around(round(1.2 * MS)), fixed_work_ns=(works[1],) * 3)

        words = ("benchmark", fp32, "--baseline", path, "--markdown", path.with_suffix(".md"))
        told = " ".join(deploykit(*words).out.split())

        why = f"the same fixed work took {works[0] // 1000} µs in the baseline and {works[1] // 1000} µs now"
        assert f"), cannot be told: {why}: the machine's clock changed; noise floor" in told
        assert f"| cannot be told: {why}" in path.with_suffix(".md").read_text()

    def test_a_ratio_has_the_larger_noise_floor_of_both_runs_beside_it(self, deploykit, fp32, baseline, measured):
        quiet, loud = timings.report({"a": around(MS)}), timings.report({"a": around(MS, 0.2)})
        path = baseline({FP32: around(MS, 0.2)})
        measured(around(MS))

        out = deploykit("benchmark", fp32, "--baseline", path).out

        for report, earlier in ((quiet, loud), (loud, quiet)):
            assert judge.since(report, earlier, "a").floor == loud.noise_floor > quiet.noise_floor
        assert f"no difference can be told; noise floor {100 * loud.noise_floor:.1f} %; the smallest" in out

    def test_one_of_another_power_mode_of_the_board_is_refused(self, refused, fp32, baseline, monkeypatch):
        path = baseline({FP32: around(MS)}, power_mode="15W")
        monkeypatch.setattr(board, "named_mode", lambda: "MAXN")

        message = refused(fp32, "--baseline", path)

        assert "the baseline was measured in another power mode of this board why: 15W there, MAXN here" in message

    def test_so_is_one_whose_power_mode_is_not_known_where_the_other_is(self):
        unknown, here = timings.report({"a": around(MS)}), timings.report({"a": around(MS)}, power_mode="MAXN")

        for report, earlier, why in (
            (here, unknown, "not known there, MAXN here"),
            (unknown, here, "MAXN there, not known here"),
        ):
            with pytest.raises(UsageError, match=why):
                judge.since(report, earlier, "a")
        assert judge.since(here, here, "a").ratio == 1

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "is no benchmark"),
            (b"\xff\xfe", "is no benchmark"),
            (b"[]", "is no benchmark"),
            (b"null", "is no benchmark"),
            (b"[" * 100_000, "is no benchmark"),
            (b'{"schema": "deploykit benchmark 99"}', "its schema is 'deploykit benchmark 99', not 'deploykit benchmark 1'"),
            (b'{"schema": "deploykit benchmark 1"}', "KeyError: 'processes'"),
        ],
    )
    def test_a_file_that_is_none_is_refused(self, refused, fp32, tmp_path, content, why):
        (tmp_path / "raw.json").write_bytes(content)

        assert why in refused(fp32, "--baseline", tmp_path / "raw.json")

    def test_so_is_one_that_is_too_large_to_be_one(self, refused, fp32, tmp_path):
        for size, why in ((64 << 20, "JSONDecodeError"), ((64 << 20) + 1, "it is larger than 67108864 bytes")):
            with (tmp_path / "raw.json").open("wb") as file:
                file.truncate(size)

            assert why in refused(fp32, "--baseline", tmp_path / "raw.json")

    @pytest.mark.parametrize("missing", ["processes", "baseline", "settings", "machine"])
    def test_so_is_one_with_a_part_missing(self, refused, fp32, tmp_path, missing):
        content = {"schema": "deploykit benchmark 1", **to_json(timings.report({"a": [1]}))}
        (tmp_path / "raw.json").write_text(json.dumps({key: value for key, value in content.items() if key != missing}))

        assert f"KeyError: '{missing}'" in refused(fp32, "--baseline", tmp_path / "raw.json")

    @pytest.mark.parametrize("engines", [None, "a", [], {"onnxruntime fp32": "lenet5"}, {"onnxruntime fp32": None}])
    def test_so_is_one_whose_engines_are_not_described(self, refused, fp32, tmp_path, engines):
        content = {"schema": "deploykit benchmark 1", **to_json(timings.report({FP32: [1]}))}
        (tmp_path / "raw.json").write_text(json.dumps({**content, "settings": {**content["settings"], "engines": engines}}))

        assert "its settings do not say what its engines are" in refused(fp32, "--baseline", tmp_path / "raw.json")

    @pytest.mark.parametrize("number", ["0", "-1", "NaN", "Infinity", "1e999", "9007199254740993", '"x"', "null", "[]"])
    def test_so_is_one_with_a_number_that_nobody_measured(self, refused, fp32, tmp_path, number):
        judge.save(timings.report({"a": [123456789]}), tmp_path / "raw.json")
        text = (tmp_path / "raw.json").read_text()
        (tmp_path / "raw.json").write_text(text.replace("[123456789]", f"[{number}]"))

        assert "is no benchmark" in refused(fp32, "--baseline", tmp_path / "raw.json")

    @pytest.mark.parametrize(("path", "why"), [("nowhere.json", "no such file"), (".", "is a directory")])
    def test_so_is_one_that_cannot_be_read(self, refused, fp32, tmp_path, path, why):
        assert why in refused(fp32, "--baseline", tmp_path / path)


class TestVerdicts:
    @pytest.mark.parametrize(
        ("slower", "spread", "verdict", "code"),
        [(1.02, 0.001, "pass", 0), (1.2, 0.001, "fail", 3), (1.05, 0.05, "cannot tell", 5), (0.5, 0.001, "pass", 0)],
    )
    def test_a_slowdown_is_judged_by_its_interval_and_ends_in_its_exit_code(
        self, deploykit, fp32, int8, measured, slower, spread, verdict, code
    ):
        measured(around(MS, spread), around(round(slower * MS), spread))

        outcome = deploykit("benchmark", fp32, int8, "--fail-on", "5%", "--json")

        told = json.loads(outcome.out)
        assert [gate["verdict"] for gate in told["gates"]] == [verdict]
        assert outcome.code == told["exit_code"] == code

    def test_the_baseline_against_itself_may_differ_more_than_the_interval_says(self, deploykit, fp32, int8, measured):
        measured(around(MS), around(round(1.03 * MS)), again=around(round(1.04 * MS)))

        outcome = deploykit("benchmark", fp32, int8, "--fail-on", "1%")

        assert outcome.code == 5
        assert "no difference can be told" in outcome.out

    def test_a_latency_is_judged_on_every_engine(self, deploykit, fp32, int8, measured):
        measured(around(MS), around(9 * MS))

        told = json.loads(deploykit("benchmark", fp32, int8, "--gate", "latency <= 5 ms", "--json").out)

        assert [(gate["rule"], gate["verdict"]) for gate in told["gates"]] == [
            (f"{FP32}: latency <= 5 ms", "pass"),
            (f"{INT8}: latency <= 5 ms", "fail"),
        ]
        assert told["exit_code"] == 3
        assert told["gates"][1]["observed"] == 9

    @pytest.mark.parametrize("rule", ["latency <= 100 ms", "slowdown <= 1 %"])
    def test_in_a_disturbed_run_no_rule_passes_or_fails(self, deploykit, fp32, int8, measured, rule):
        measured(around(MS), around(9 * MS), **NOISE)

        outcome = deploykit("benchmark", fp32, int8, "--gate", rule)

        assert outcome.code == 5
        assert f"{FP32}: 10 of 10 processes were disturbed: other programs used its cores" in outcome.out
        assert f"{INT8}: 5 of 5 processes were disturbed: other programs used its cores" in outcome.out

    def test_a_disturbed_run_without_a_rule_is_told_and_done(self, deploykit, fp32, measured):
        measured(around(MS), **NOISE)

        assert deploykit("benchmark", fp32).code == 0


class TestTheTable:
    def test_has_the_numbers_in_milliseconds_and_what_can_be_told(self, deploykit, fp32, int8, measured):
        measured(around(4 * MS), around(2 * MS))

        text = deploykit("benchmark", fp32, int8).out

        first = next(line for line in text.splitlines() if line.startswith(f" {FP32}") or line.startswith(FP32))
        assert "4 " in first
        assert "too few" in first
        assert "1,000 by 8" in first
        assert f"{INT8} / {FP32}: 0.500 (95 % 0.4" in text
        assert ", different; noise floor 0.1 %; the smallest difference that would be seen is 0.2 %" in text
        assert "Latency of one image, compute alone" in text
        assert "the run is valid" in text
        assert "measured again" not in text

    def test_counts_the_processes_that_were_measured_again(self, deploykit, fp32, monkeypatch):
        quiet = timings.report({FP32: around(MS)}, machine=Machine.probe())
        disturbed = timings.process(FP32, 77 * MS, **NOISE)
        monkeypatch.setattr(timing, "benchmark", lambda *_, **__: replace(quiet, processes=(disturbed, *quiet.processes)))

        assert "(1 disturbed ones were measured again)" in " ".join(deploykit("benchmark", fp32).out.split())


class TestARun:
    """Rules of time in a recipe, judged on the engines of a run."""

    @pytest.fixture
    def engines(self, run_folder, portable, tmp_path) -> list[Engine]:
        int8 = networks.quantized(portable("lenet5"), "onnxruntime", networks.made(tmp_path / "int8"))
        folders = (run_folder / "build-onnxruntime-fp32", run_folder / "build-onnxruntime-int8")
        return [
            Engine.of("onnxruntime", model, read_artifact(folder))
            for model, folder in zip((portable("lenet5"), int8), folders, strict=True)
        ]

    def test_they_are_judged_on_the_int8_engine_over_the_fp32_one_of_its_runtime(self, engines):
        report = timings.report({FP32: around(4 * MS), INT8: around(2 * MS)})
        rules = [parse_rule(text) for text in ("latency <= 3 ms", "slowdown <= 0 %", "drop <= 1 points")]

        found = timing.judge_run(rules, engines, report)

        assert [(judged.rule, judged.verdict) for judged in found] == [
            (f"{INT8}: latency <= 3 ms", Verdict.PASS),
            (f"{INT8}: slowdown <= 0 %", Verdict.PASS),
        ]

    def test_without_int8_every_engine_is_judged(self, engines):
        report = timings.report({FP32: around(4 * MS)})

        found = timing.judge_run([parse_rule("latency <= 3 ms")], engines[:1], report)

        assert [(judged.rule, judged.verdict) for judged in found] == [(f"{FP32}: latency <= 3 ms", Verdict.FAIL)]

    def test_an_engine_that_was_not_built_cannot_be_told_about(self, engines):
        absent = replace(engines[1], built=None, why="no GPU here")

        (found,) = timing.judge_run([parse_rule("slowdown <= 0 %")], [engines[0], absent], timings.report({FP32: around(MS)}))

        assert (found.verdict, found.reason) == (Verdict.CANNOT_TELL, "not measured: no GPU here")

    def test_an_int8_engine_without_a_fp32_one_has_nothing_to_be_slower_than(self, engines):
        (found,) = timing.judge_run([parse_rule("slowdown <= 0 %")], engines[1:], timings.report({INT8: around(MS)}))

        assert (found.verdict, found.reason) == (
            Verdict.CANNOT_TELL,
            "not measured: no FP32 engine was built to compare it with",
        )

    def test_what_was_measured_is_told_with_int8_over_fp32(self, engines):
        told = timing.of_run(timings.report({FP32: around(4 * MS), INT8: around(2 * MS)}), engines)

        assert [(entry["label"], entry["ratio"]) for entry in told["ratios"]] == [(f"{INT8} / {FP32}", 0.5)]
        assert told["verdict"] == "valid"

    def test_the_batches_that_were_measured_are_told_whatever_was_asked_for(self, engines):
        report = timings.report({FP32: around(4 * MS), INT8: around(2 * MS)})
        asked_for = replace(report, settings={**report.settings, "offline_batches": [1, 64]})

        told = timing.of_run(asked_for, engines)

        assert told["settings"]["offline_batches"] == [8] == [point["batch"] for point in told["engines"][0]["offline"]]

    def test_an_engine_that_is_not_in_the_report_is_a_usage_error(self, engines):
        with pytest.raises(UsageError, match="was not measured"):
            timing.of_run(timings.report({FP32: around(MS)}), engines)
