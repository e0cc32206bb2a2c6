"""What is timed and what is not, which numbers may be stated, and that every sample comes from a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import benchmark, build
from deploykit.artifact import Artifact, read_artifact, write_manifest
from deploykit.benchmark import BenchmarkReport, Measured, offline, single_stream
from deploykit.errors import DeploykitError, UsageError

few = settings(deadline=None, max_examples=20)
latencies = st.lists(st.integers(1_000, 10_000_000), min_size=1, max_size=9)
ONE = {"image": np.zeros((1, 3, 8, 8), np.float32)}
EIGHT = {"image": np.zeros((8, 3, 8, 8), np.float32)}


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
        self.clock.now += 1_000_000_007

    def execute(self):
        done = self.steps.count("execute")
        self.steps.append("execute")
        self.clock.now += self.executes[done % len(self.executes)]

    def fetch(self):
        self.clock.now += 1_000_000_009
        return {}

    def close(self):
        pass


class TestSingleStream:
    def test_it_measures_execute_and_nothing_else(self):
        clock = Clock()

        found = single_stream(Session(clock, 5, 7, 11), [ONE], queries=4, clock=clock)

        assert found == [5, 7, 11, 5]

    def test_every_query_is_fed_anew_and_samples_come_round_again(self):
        clock = Clock()
        session, samples = Session(clock, 1), [dict(ONE), dict(ONE)]

        single_stream(session, samples, queries=3, clock=clock)

        assert session.steps == ["feed", "execute"] * 3
        assert [fed is samples[index] for fed, index in zip(session.fed, (0, 1, 0), strict=True)] == [True] * 3

    @pytest.mark.parametrize(("samples", "queries"), [([], 1), ([ONE], 0)])
    def test_without_samples_or_queries_there_is_nothing_to_measure(self, samples, queries):
        with pytest.raises(UsageError, match="nothing to measure"):
            single_stream(Session(Clock(), 1), samples, queries=queries)


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


def measured(label: str, *processes: list[int]) -> Measured:
    return Measured(label, 1, 8, tuple(map(tuple, processes)), (1.0,) * len(processes), (1,) * len(processes))


class TestNumbers:
    def test_the_median_is_that_of_the_processes_medians(self):
        found = measured("a", [1, 2, 90], [3, 4, 5], [10, 10, 10])

        assert found.process_medians_ns == [2, 4, 10]
        assert found.median_ns == 4

    @pytest.mark.parametrize("queries", [1, 63])
    def test_with_fewer_than_64_queries_no_p90_is_stated(self, queries):
        assert measured("a", list(range(queries))).p90_ns is None

    def test_the_p90_leaves_a_tenth_of_all_queries_above_it(self):
        assert measured("a", list(range(1, 51)), list(range(51, 101))).p90_ns == 90
        assert measured("a", list(range(64))).p90_ns == 57

    @few
    @given(st.lists(latencies, min_size=2, max_size=6), st.integers(0, 9))
    def test_the_interval_lies_within_the_processes_medians_and_holds_their_median(self, processes, seed):
        found = measured("a", *processes)

        low, high = BenchmarkReport((found,), (), {}).median_interval_ns("a", seed)

        assert min(found.process_medians_ns) <= low <= found.median_ns <= high <= max(found.process_medians_ns)

    @few
    @given(st.lists(latencies, min_size=2, max_size=6))
    def test_the_ratio_to_an_engine_twice_as_slow_is_one_half(self, processes):
        slow = [[2 * query for query in process] for process in processes]
        report = BenchmarkReport((measured("a", *processes), measured("b", *slow)), (), {})

        ratio, (low, high) = report.ratio("a", "b")

        assert ratio == 0.5
        assert low <= 0.5 <= high

    def test_processes_that_agree_leave_no_doubt(self):
        report = BenchmarkReport((measured("a", [4], [4]), measured("b", [8], [8])), (), {})

        assert report.median_interval_ns("a") == (4, 4)
        assert report.ratio("a", "b") == (0.5, (0.5, 0.5))

    def test_the_same_seed_gives_the_same_interval(self):
        report = BenchmarkReport((measured("a", [1], [5], [6], [40], [41]),), (), {})

        assert report.median_interval_ns("a", seed=3) == report.median_interval_ns("a", seed=3)


@pytest.fixture(scope="module")
def engine(portable, tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("engine")
    write_manifest(folder, build.build(portable("lenet5"), "onnxruntime", folder, threads=1))
    return read_artifact(folder)


SHORT = {"queries": 3, "warmup": 1, "offline_batch": 2, "offline_seconds": 0}


class TestProcesses:
    def test_each_engine_is_measured_in_fresh_processes_and_raw_samples_are_kept(self, engine):
        report = benchmark.benchmark({"a": engine, "b": engine}, processes=2, seed=0, **SHORT)

        assert sorted(report.order) == ["a", "a", "b", "b"]
        for found in report.engines:
            assert [len(process) for process in found.latency_ns] == [3, 3]
            assert len(found.offline_per_second) == len(found.load_ns) == 2
            assert all(query > 0 for process in found.latency_ns for query in process)
        assert report.settings == {**SHORT, "processes": 2, "seed": 0}

    @pytest.fixture
    def no_processes(self, monkeypatch) -> list[str]:
        """Processes that answer at once; the engine's folder of each request is listed."""
        requests: list[str] = []

        def answer(request):
            requests.append(request["engine"])
            return {
                "latency_ns": [len(requests)],
                "offline_per_second": 1.0,
                "load_ns": 1,
                "images_per_query": 1,
                "offline_batch": 8,
            }

        monkeypatch.setattr(benchmark, "_in_fresh_process", answer)
        return requests

    def test_their_order_is_random_but_seeded(self, engine, no_processes):
        engines = {"a": engine, "b": replace(engine, path=Path("/elsewhere/engine.onnx"))}

        orders = [benchmark.benchmark(engines, processes=8, seed=seed, **SHORT).order for seed in (1, 1, 2)]

        assert orders[0] == orders[1] != orders[2]
        assert sorted(orders[0]) == ["a"] * 8 + ["b"] * 8
        assert list(orders[0]) != sorted(orders[0])
        assert no_processes[:16] == [str(engines[label].folder) for label in orders[0]]

    def test_every_sample_goes_to_the_engine_that_gave_it(self, engine, no_processes):
        report = benchmark.benchmark({"a": engine, "b": engine}, processes=3, seed=1, **SHORT)

        for found in report.engines:
            places = [index + 1 for index, label in enumerate(report.order) if label == found.label]
            assert [process[0] for process in found.latency_ns] == places

    def test_a_process_that_fails_is_reported_with_its_own_words(self, engine, tmp_path):
        lost = replace(engine, path=tmp_path / "engine.onnx")

        with pytest.raises(DeploykitError, match=r"ended with exit code 1\n  why: .*is not a deploykit artifact"):
            benchmark.benchmark({"a": lost}, processes=1, seed=0, **SHORT)

    def test_a_process_that_crashes_is_reported_with_its_traceback(self, engine):
        with pytest.raises(DeploykitError, match=r"exit code 1\n  why: Traceback(.|\n)*TypeError"):
            benchmark.benchmark({"a": engine}, processes=1, seed=0, **{**SHORT, "queries": "many"})

    def test_the_process_loads_neither_torch_nor_onnx_nor_click(self, engine):
        request = json.dumps({**SHORT, "engine": str(engine.folder)})
        command = [sys.executable, "-X", "importtime", "-m", "deploykit.benchmark"]

        child = subprocess.run(command, input=request, capture_output=True, text=True, check=True, env={**os.environ})

        imported = set(re.findall(r"^import time:.*\|\s+(\S+)$", child.stderr, re.MULTILINE))
        assert "onnxruntime" in imported
        assert not {"torch", "torchvision", "onnx", "onnx_ir", "click", "PIL"} & imported

    def test_an_engine_with_a_fixed_batch_is_measured_on_whole_batches(self, tmp_path):
        fixed = networks.exported("lenet5", tmp_path / "model", batch=3)
        folder = networks.made(tmp_path / "engine")
        write_manifest(folder, build.build(fixed, "onnxruntime", folder, threads=1))

        report = benchmark.benchmark({"a": read_artifact(folder)}, processes=1, seed=0, **SHORT)

        assert len(report.engines[0].latency_ns[0]) == 3
