"""What is timed and what is not, that every sample comes from a process of its own, and which of them count."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import timings
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import benchmark, build
from deploykit.artifact import Artifact, read_artifact, write_manifest
from deploykit.benchmark import judge
from deploykit.benchmark.conditions import core_speeds
from deploykit.benchmark.report import BenchmarkReport, Process
from deploykit.benchmark.scenarios import NullSession, offline, single_stream
from deploykit.errors import DeploykitError, UsageError
from deploykit.gate import Verdict, parse_rule
from deploykit.jsonable import to_json
from deploykit.machine import Machine

few = settings(deadline=None, max_examples=20)
ONE = {"image": np.zeros((1, 3, 8, 8), np.float32)}
EIGHT = {"image": np.zeros((8, 3, 8, 8), np.float32)}
FEED, FETCH = 100, 1000
DISTURBED = {"others_ns": timings.SECOND}
SHORT = {"queries": 3, "warmup": 1, "offline_batches": [2, 4], "offline_seconds": 0.0}


class Clock:
    """A clock that stands still unless somebody works."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Session:
    """A session whose every step takes as long as it is told, in nanoseconds, and that remembers its steps."""

    def __init__(self, clock: Clock, *executes: int) -> None:
        self.clock, self.executes, self.steps, self.fed = clock, executes, [], []

    def feed(self, inputs):
        self.steps.append("feed")
        self.fed.append(inputs)
        self.clock.now += FEED

    def execute(self):
        done = self.steps.count("execute")
        self.steps.append("execute")
        self.clock.now += self.executes[done % len(self.executes)]

    def fetch(self):
        self.steps.append("fetch")
        self.clock.now += FETCH
        return {}

    def close(self):
        pass


class TestSingleStream:
    def test_compute_is_execute_alone(self):
        clock = Clock()

        found = single_stream(Session(clock, 5, 7, 11), [ONE], queries=4, clock=clock)

        assert found.compute_ns == (5, 7, 11, 5)

    def test_end_to_end_holds_the_copies_to_and_from_the_device(self):
        clock = Clock()

        found = single_stream(Session(clock, 5, 7), [ONE], queries=2, clock=clock)

        assert found.end_to_end_ns == (FEED + 5 + FETCH, FEED + 7 + FETCH)

    def test_what_lies_between_two_queries_is_not_counted(self):
        clock = Clock()

        class FromDisk(list):
            def __getitem__(self, index):
                clock.now += 1_000_000_007
                return super().__getitem__(index)

        found = single_stream(Session(clock, 5), FromDisk([ONE]), queries=2, clock=clock)

        assert found.end_to_end_ns == (FEED + 5 + FETCH,) * 2

    def test_every_query_is_fed_and_fetched_and_samples_come_round_again(self):
        clock = Clock()
        session, samples = Session(clock, 1), [dict(ONE), dict(ONE)]

        single_stream(session, samples, queries=3, clock=clock)

        assert session.steps == ["feed", "execute", "fetch"] * 3
        assert [fed is samples[index] for fed, index in zip(session.fed, (0, 1, 0), strict=True)] == [True] * 3

    @pytest.mark.parametrize(("samples", "queries"), [([], 1), ([ONE], 0)])
    def test_without_samples_or_queries_there_is_nothing_to_measure(self, samples, queries):
        with pytest.raises(UsageError, match="nothing to measure"):
            single_stream(Session(Clock(), 1), samples, queries=queries)

    def test_a_session_that_does_nothing_shows_what_the_harness_costs(self):
        ticks = iter(range(100))

        found = single_stream(NullSession(), [ONE], queries=3, clock=lambda: next(ticks))

        assert found.compute_ns == (1, 1, 1)


class TestOffline:
    def test_it_counts_images_over_the_time_in_execute(self):
        clock = Clock()

        per_second = offline(Session(clock, 10_000_000), EIGHT, seconds=0.05, clock=clock)

        assert per_second == pytest.approx(8 / 0.01)

    def test_the_batch_is_fed_once_and_run_once_before_the_clock_starts(self):
        clock = Clock()
        session = Session(clock, 999_000_000, 10_000_000, 10_000_000)

        per_second = offline(session, EIGHT, seconds=0.02, clock=clock)

        assert session.steps == ["feed", "execute", "execute", "execute"]
        assert per_second == pytest.approx(8 / 0.01)

    def test_a_batch_that_takes_longer_than_the_time_given_is_run_once_in_whole(self):
        clock = Clock()

        assert offline(Session(clock, 2_000_000_000), EIGHT, seconds=0, clock=clock) == pytest.approx(4)


@pytest.fixture(scope="module")
def engine(portable, tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("engine")
    write_manifest(folder, build.build(portable("lenet5"), "onnxruntime", folder, threads=1))
    return read_artifact(folder)


@pytest.fixture(scope="module")
def ran(engine) -> BenchmarkReport:
    return benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT)


class TestAFreshProcess:
    def test_it_tells_every_sample(self, ran):
        for process in ran.processes:
            assert len(process.latency_ns) == len(process.end_to_end_ns) == SHORT["queries"]
            assert all(0 < inner < outer for inner, outer in zip(process.latency_ns, process.end_to_end_ns, strict=True))
            assert min(process.load_ns, process.first_ns, process.harness_ns) > 0

    def test_it_measures_throughput_for_every_batch_of_the_sweep(self, ran):
        assert [[batch for batch, _ in process.offline] for process in ran.processes] == [[2, 4]] * len(ran.processes)
        assert all(per_second > 0 for process in ran.processes for _, per_second in process.offline)

    def test_its_memory_is_its_own_and_not_what_the_process_that_started_it_has_held(self, ran):
        for process in ran.processes:
            assert 2**20 < process.idle_bytes <= process.peak_bytes < 200 * 2**20  # this one has held torch

    def test_its_conditions_are_watched(self, ran):
        for process in ran.processes:
            assert len(process.conditions.fixed_work_ns) == 3
            assert 0 < process.conditions.cpu_ns <= process.conditions.wall_ns * process.conditions.cores

    def test_what_it_tells_survives_json(self, ran):
        assert BenchmarkReport.from_json(json.loads(json.dumps(to_json(ran)))) == ran

    def test_an_engine_with_a_fixed_batch_is_measured_on_whole_batches(self, tmp_path):
        fixed = networks.exported("lenet5", tmp_path / "model", batch=3)
        folder = networks.made(tmp_path / "engine")
        write_manifest(folder, build.build(fixed, "onnxruntime", folder, threads=1))

        report = benchmark.benchmark({"a": read_artifact(folder)}, processes=1, seed=0, **SHORT)

        assert {process.images_per_query for process in report.processes} == {3}
        assert list(report.engine("a").per_second) == [3]

    def test_it_loads_neither_torch_nor_onnx_nor_click(self, engine):
        request = json.dumps({**SHORT, "engine": str(engine.folder)})
        command = [sys.executable, "-X", "importtime", "-m", "deploykit.benchmark.process"]

        child = subprocess.run(command, input=request, capture_output=True, text=True, check=True)

        imported = set(re.findall(r"^import time:.*\|\s+(\S+)$", child.stderr, re.MULTILINE))
        assert "onnxruntime" in imported
        assert not {"torch", "torchvision", "onnx", "onnx_ir", "click", "PIL"} & imported

    def test_one_that_fails_is_reported_with_its_own_words(self, engine, tmp_path):
        lost = replace(engine, path=tmp_path / "engine.onnx")

        with pytest.raises(DeploykitError, match=r"ended with exit code 1\n  why: .*is not a deploykit artifact"):
            benchmark.benchmark({"a": lost}, processes=1, seed=0, **SHORT)

    def test_one_that_crashes_is_reported_with_its_traceback(self, engine):
        with pytest.raises(DeploykitError, match=r"exit code 1\n  why: Traceback(.|\n)*TypeError"):
            benchmark.benchmark({"a": engine}, processes=1, seed=0, **{**SHORT, "queries": "many"})


Answer = Callable[[int], Mapping[str, Any]]


class TestTheOrderOfProcesses:
    """Processes that answer at once: the number of the answer is the latency, so that each can be found again."""

    @pytest.fixture
    def engines(self, engine) -> dict[str, Artifact]:
        return {"a": engine, "b": replace(engine, path=Path("/elsewhere/engine.onnx"))}

    @pytest.fixture
    def run(self, engines, monkeypatch) -> Callable[..., tuple[BenchmarkReport, list[str]]]:
        def run(processes: int, seed: int = 0, disturbed: Callable[[int], bool] = lambda number: False, **options: Any):
            folders: list[str] = []

            def answer(request):
                folders.append(request["engine"])
                conditions = DISTURBED if disturbed(len(folders)) else {}
                told = to_json(timings.process("", len(folders), **conditions))
                return {key: value for key, value in told.items() if key not in ("label", "again")}

            monkeypatch.setattr(benchmark, "_in_fresh_process", answer)
            return benchmark.benchmark(engines, processes=processes, seed=seed, **SHORT, **options), folders

        return run

    def test_is_random_but_seeded(self, run):
        orders = [[(p.label, p.again) for p in run(8, seed)[0].processes] for seed in (1, 1, 2)]

        assert orders[0] == orders[1] != orders[2]
        assert orders[0] != sorted(orders[0])

    def test_holds_every_engine_as_often_and_the_baseline_twice(self, run):
        report, _ = run(4)

        arms = [(process.label, process.again) for process in report.processes]
        assert sorted(arms) == [("a", False)] * 4 + [("a", True)] * 4 + [("b", False)] * 4
        assert report.baseline == "a"

    def test_gives_every_sample_to_the_engine_it_came_from(self, run, engines):
        report, folders = run(5, seed=1)

        assert [process.latency_ns for process in report.processes] == [(number,) for number in range(1, 16)]
        assert folders == [str(engines[process.label].folder) for process in report.processes]

    def test_says_how_it_was_made_and_where(self, run):
        report, _ = run(2, seed=7)

        one = {"model": "lenet5", "input": [["batch", 3, 32, 32]], "threads": 1}
        made = {"processes": 2, "seed": 7, "engines": {"a": one, "b": one}, "core_speeds": core_speeds(os.sched_getaffinity(0))}
        assert report.settings == {**SHORT, **made}
        assert report.machine == Machine.probe()

    def test_measures_a_disturbed_process_again_at_the_end(self, run):
        for place in range(15):
            report, _ = run(5, disturbed=lambda number, place=place: number == place + 1)

            hit, last = report.processes[place], report.processes[-1]
            assert len(report.processes) == 16
            assert (last.label, last.again) == (hit.label, hit.again)
            assert hit not in report.counted
            assert last in report.counted

    def test_measures_again_at_most_half_as_many_as_were_asked_for(self, run):
        report, _ = run(4, disturbed=lambda number: True)

        assert len(report.processes) == 12 + 6
        assert len(report.counted) == 12

    def test_measures_again_what_was_disturbed_once_more(self, run):
        report, _ = run(5, disturbed=lambda number: number in (2, 16))

        assert len(report.processes) == 17
        assert len(report.counted) == 15

    def test_reports_its_progress_to_the_end(self, run):
        seen = []

        run(2, disturbed=lambda number: number == 1, progress=lambda *what: seen.append(what))

        assert seen == [("benchmark", done, 6 + (done > 0)) for done in range(8)]


class TestWhatCounts:
    def test_a_slow_process_counts_when_nothing_disturbed_it(self):
        report = timings.report({"a": [10, 10, 10, 10, 9000]})

        assert report.counted == report.processes
        assert max(report.engine("a").medians_ns) == 9000

    def test_time_on_an_emulated_cpu_proves_nothing_and_opens_no_gate(self):
        latencies = {"a": [10, 10, 10, 10, 10]}
        real, emulated = (timings.report(latencies, machine=replace(timings.HERE, cpu=cpu)) for cpu in ("A76", "A76, emulated"))

        assert judge.judge(parse_rule("latency <= 1 ms"), real, "a").verdict is Verdict.PASS
        assert judge.judge(parse_rule("latency <= 1 ms"), emulated, "a").verdict is Verdict.CANNOT_TELL
        assert "the CPU is an emulated one (A76, emulated), on which time means nothing" in emulated.verdict

    def test_a_disturbed_process_counts_where_there_are_too_few_others(self):
        ran = [timings.process("a", n, again=again, **DISTURBED) for again in (False, True) for n in (1, 2)]
        ran.append(timings.process("a", 3))

        report = BenchmarkReport(tuple(ran), "a", {"processes": 2, "seed": 0}, timings.HERE)

        assert [(process.again, process.latency_ns) for process in report.counted] == [
            *((False, (1,)), (True, (1,)), (True, (2,)), (False, (3,))),
        ]

    @few
    @given(st.lists(st.lists(st.integers(1, 10**9), min_size=1, max_size=9), min_size=1, max_size=6))
    def test_the_median_is_that_of_the_processes_medians(self, latencies):
        ran = [timings.process("a", *found, again=again) for found in latencies for again in (False, True)]
        report = BenchmarkReport(tuple(ran), "a", {"processes": len(latencies), "seed": 0}, timings.HERE)

        assert report.engine("a").median_ns == np.median([np.median(found) for found in latencies])
        assert report.engine("a").end_to_end_ns == 2 * report.engine("a").median_ns

    def test_the_baseline_comes_first_and_holds_both_of_its_measurements(self):
        report = timings.report({"b": [1, 2], "a": [5, 6]}, again=[3, 4])

        assert [engine.label for engine in report.engines] == ["b", "a"]
        assert report.engine("b").medians_ns == [1, 2, 3, 4]

    def test_an_engine_is_compared_with_the_baseline_unless_another_is_named(self):
        report = timings.report({"a": [10] * 5, "b": [20] * 5, "c": [80] * 5})

        assert report.difference("c").ratio == 8
        assert report.difference("c", "b").ratio == 4
        assert report.difference("a").ratio == 1

    def test_percentiles_are_those_of_all_queries_of_all_processes(self):
        ran = [timings.process("a", *range(start, start + 32), again=start > 1) for start in (1, 33)]
        report = BenchmarkReport(tuple(ran), "a", {"processes": 1, "seed": 0}, timings.HERE)

        assert report.engine("a").percentile_ns(90) == 64
        assert report.engine("a").percentile_ns(95) is None

    def test_what_was_not_measured_is_named_beside_what_was(self):
        with pytest.raises(UsageError, match=r"'z' was not measured\n  why: these were: a, b"):
            timings.report({"a": [1], "b": [2]}).engine("z")

    def test_a_quiet_run_is_valid_and_a_disturbed_one_says_why_it_is_not(self):
        assert timings.report({"a": [10] * 5}).verdict == "valid"
        assert timings.report({"a": [10] * 5}, **DISTURBED).verdict == (
            "invalid: a: 10 of 10 processes were disturbed: other programs used its cores (50 % of the time)"
        )


class TestRawSamplesOnDisk:
    @pytest.mark.parametrize("key", ["latency_ns", "end_to_end_ns"])
    @pytest.mark.parametrize("bad", [[], [0], [-5, 3], [float("nan")], ["soon"], None, [2**53 + 1], [1, 10**400]])
    def test_latencies_that_nobody_can_have_measured_are_refused(self, key, bad):
        told = to_json(timings.process("a", 1, 2))

        with pytest.raises((TypeError, ValueError)):
            Process.from_json({**told, key: bad})

    @pytest.mark.parametrize("key", ["latency_ns", "end_to_end_ns"])
    def test_a_hundred_days_can_be_measured(self, key):
        told = to_json(timings.process("a", 1, 2))

        assert getattr(Process.from_json({**told, key: [2**53]}), key) == (2**53,)

    @pytest.mark.parametrize("key", ["images_per_query", "load_ns", "first_ns", "idle_bytes", "peak_bytes"])
    def test_what_a_process_has_one_of_is_a_whole_number(self, key):
        told = to_json(timings.process("a", 1, 2))

        assert getattr(Process.from_json({**told, key: 3.0}), key) == 3
        for bad in ("soon", None, [1], float("nan"), float("inf")):
            with pytest.raises((TypeError, ValueError, OverflowError)):
                Process.from_json({**told, key: bad})

    @pytest.mark.parametrize(
        "bad", [{"cores": 0}, {"wall_ns": 0}, {"wall_ns": "long"}, {"fixed_work_ns": []}, {"fixed_work_ns": [0]}, {"mood": 1}]
    )
    def test_so_are_conditions(self, bad):
        told = to_json(timings.process("a", 1, 2))

        with pytest.raises((TypeError, ValueError)):
            Process.from_json({**told, "conditions": {**told["conditions"], **bad}})

    @pytest.mark.parametrize("settings", [{}, {"processes": 0, "seed": 1}, {"processes": 1, "seed": -1}, {"processes": 5}])
    def test_so_are_settings(self, settings):
        with pytest.raises((KeyError, ValueError)):
            BenchmarkReport.from_json({**to_json(timings.report({"a": [1]})), "settings": settings})

    def test_so_is_a_baseline_without_its_second_measurement(self):
        with pytest.raises(ValueError, match="its baseline 'a' was not measured twice"):
            BenchmarkReport.from_json(to_json(timings.report({"a": [1]}, again=[])))
