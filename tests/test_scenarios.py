"""Queries that come together, at random, or in several processes side by side: what their latency is and what is refused.

Clocks are fakes and processes are real; nothing here depends on how fast or busy a machine is.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import networks
import numpy as np
import pytest
import timings
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import benchmark, build, runtimes
from deploykit.artifact import Artifact, read_artifact, write_manifest
from deploykit.benchmark import conditions, judge
from deploykit.benchmark.report import BenchmarkReport, about
from deploykit.benchmark.scenarios import (
    SEARCH_QUERIES,
    Scenario,
    highest_rate,
    multi_stream,
    poisson_arrivals,
    server,
    side_by_side,
)
from deploykit.errors import DeploykitError, UsageError
from deploykit.jsonable import to_json
from deploykit.machine import Machine

few = settings(deadline=None, max_examples=30)
ONE = {"image": np.zeros((1, 3, 8, 8), np.float32)}
SHORT = {"queries": 3, "warmup": 1, "offline_batches": [2], "offline_seconds": 0.05}
FP32 = "onnxruntime fp32"
on_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")


class Clock:
    """A clock that stands still unless somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(1, round(1e9 * seconds))


class Session:
    """A session whose inference takes so long, and whose copies take no time."""

    def __init__(self, clock: Clock, *nanoseconds: int) -> None:
        self.clock, self.takes, self.fed, self.done = clock, nanoseconds, [], 0

    def feed(self, inputs):
        self.fed.append(inputs)

    def execute(self):
        self.clock.now += self.takes[self.done % len(self.takes)]
        self.done += 1

    def fetch(self):
        return {}

    def close(self):
        pass


class TogetherOnly(Session):
    """A session that executes only while as many others do, and ends at its own time after they all began."""

    def __init__(self, clock: Clock, barrier: threading.Barrier, nanoseconds: int) -> None:
        super().__init__(clock, nanoseconds)
        self.barrier, self.lock = barrier, threading.Lock()

    def execute(self):
        began = self.clock.now
        self.barrier.wait(10)
        with self.lock:
            self.clock.now = max(self.clock.now, began + self.takes[0])
        self.barrier.wait(10)


class TestMultiStream:
    def test_a_query_takes_as_long_as_its_slowest_sample(self):
        clock, barrier = Clock(), threading.Barrier(3)
        sessions = [TogetherOnly(clock, barrier, takes) for takes in (5, 30, 7)]

        found = multi_stream(sessions, [ONE], queries=2, clock=clock)

        assert found.compute_ns == (30, 30)

    def test_its_samples_are_the_next_ones_and_come_round_again(self):
        clock = Clock()
        sessions, inputs = [Session(clock, 1), Session(clock, 1)], [dict(ONE) for _ in range(3)]

        multi_stream(sessions, inputs, queries=3, clock=clock)

        fed = [[next(i for i, one in enumerate(inputs) if one is given) for given in session.fed] for session in sessions]
        assert fed == [[0, 2, 1], [1, 0, 2]]

    def test_an_error_of_one_of_them_is_that_of_the_query(self):
        class Broken(Session):
            def execute(self):
                raise DeploykitError("a kernel failed")

        with pytest.raises(DeploykitError, match="a kernel failed"):
            multi_stream([Session(Clock(), 1), Broken(Clock(), 1)], [ONE], queries=1)

    @pytest.mark.parametrize(("streams", "inputs", "queries"), [(0, [ONE], 1), (1, [], 1), (1, [ONE], 0)])
    def test_without_streams_samples_or_queries_there_is_nothing_to_measure(self, streams, inputs, queries):
        with pytest.raises(UsageError, match="nothing to measure"):
            multi_stream([Session(Clock(), 1)] * streams, inputs, queries=queries)


class TestArrivals:
    @few
    @given(rate=st.floats(0.1, 1e5), queries=st.integers(1, 50), seed=st.integers(0, 99))
    def test_come_one_after_the_other_and_the_same_for_the_same_seed(self, rate, queries, seed):
        found = poisson_arrivals(rate, queries, seed)

        assert found == poisson_arrivals(rate, queries, seed)
        assert list(found) == sorted(found)
        assert len(found) == queries

    def test_are_as_many_a_second_as_asked_for_and_as_irregular_as_poissons(self):
        found = poisson_arrivals(100, 20_000, 0)

        gaps = np.diff(found) / 1e9
        assert mean(gaps) == pytest.approx(0.01, rel=0.03)
        assert np.std(gaps) == pytest.approx(mean(gaps), rel=0.03)


def queue(arrivals: Sequence[int], takes: Sequence[int]) -> list[int]:
    """Latencies of one server, by Lindley's recursion (Proc. Cambridge Phil. Soc. 48, 1952)."""
    free, found = 0, []
    for arrival, taken in zip(arrivals, takes, strict=True):
        free = max(free, arrival) + taken
        found.append(free - arrival)
    return found


class TestServer:
    @few
    @given(
        gaps=st.lists(st.integers(0, 5_000_000), min_size=1, max_size=20),
        takes=st.lists(st.integers(1, 9_000_000), min_size=20, max_size=20),
    )
    def test_latency_is_from_the_arrival_with_the_wait_for_those_before_it(self, gaps, takes):
        arrivals = [sum(gaps[: place + 1]) for place in range(len(gaps))]

        class Ticking(Clock):
            """Somebody who looks at it all the time sees it move."""

            def __call__(self) -> int:
                self.now += 1
                return self.now

        clock = Ticking()
        found = server([Session(clock, *takes)], [ONE], arrivals, clock=clock, sleep=clock.sleep)

        assert list(found) == pytest.approx(queue(arrivals, takes[: len(gaps)]), abs=10 * len(gaps))

    def test_every_session_serves_and_every_query_is_answered_once(self):
        clock = Clock()
        barrier = threading.Barrier(2)

        class Both(Session):
            def execute(self):
                barrier.wait(10)  # passes only while the other one serves too

        sessions = [Both(clock, 1), Both(clock, 1)]

        found = server(sessions, [ONE], [0] * 6, clock=clock, sleep=clock.sleep)

        assert len(found) == 6
        assert [len(session.fed) for session in sessions] == [3, 3]

    @pytest.mark.parametrize(("sessions", "inputs", "arrivals"), [(0, [ONE], [1]), (1, [], [1]), (1, [ONE], [])])
    def test_without_sessions_samples_or_arrivals_there_is_nothing_to_measure(self, sessions, inputs, arrivals):
        with pytest.raises(UsageError, match="nothing to measure"):
            server([Session(Clock(), 1)] * sessions, inputs, arrivals)


class TestTheHighestRate:
    def found(self, limit: float, *, capacity: float = 1000.0, queries: int = SEARCH_QUERIES) -> float | None:
        """Of a system that answers in 1 ms up to `limit` a second and in 9 ms beyond."""
        found = highest_rate(lambda rate: [1_000_000 if rate <= limit else 9_000_000] * queries, 5_000_000, capacity=capacity)
        return None if found is None else found[0]

    @few
    @given(limit=st.floats(51, 1000))
    def test_is_found_to_three_per_cent_and_never_beyond(self, limit):
        rate = self.found(limit)

        assert rate is not None
        assert limit / 1.033 <= rate <= limit

    def test_is_none_where_the_slowest_is_too_fast(self):
        assert self.found(10) is None

    def test_is_none_where_the_queries_are_too_few_for_a_p99(self):
        assert self.found(500, queries=SEARCH_QUERIES - 1) is None

    def test_comes_with_the_latencies_at_that_rate(self):
        def serve(rate: float) -> list[int]:
            return [round(rate)] * SEARCH_QUERIES

        rate, latency = highest_rate(serve, 300, capacity=1000) or (0.0, ())

        assert latency == (round(rate),) * SEARCH_QUERIES

    def test_is_judged_by_a_bound_and_not_by_the_observed_percentile(self):
        """7 slow ones of 662 are 1.06 %: one of the slowest has to be allowed, so the bound is the slowest of all."""
        slow = [9_000_000] + [1_000_000] * (SEARCH_QUERIES - 1)

        assert highest_rate(lambda rate: slow, 5_000_000, capacity=1000) is None


class TestInstances:
    def test_only_queries_inside_the_window_count(self):
        clock = Clock()

        found = side_by_side(Session(clock, 10), [ONE], 25, seconds=50e-9, clock=clock)

        assert found.compute_ns == (10,) * 4  # from 30 to 70 of 25 to 75

    def test_a_window_without_any_is_refused(self):
        clock = Clock()

        with pytest.raises(UsageError, match="no query ended within"):
            side_by_side(Session(clock, 100), [ONE], 25, seconds=50e-9, clock=clock)

    def test_have_no_more_cores_than_a_containers_quota_allows(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        monkeypatch.setattr(benchmark, "available_cores", lambda: 3)

        assert benchmark.cores_of_instances(3) == [[0], [1], [2]]
        with pytest.raises(UsageError, match=r"4 instances want as many cores\n  why: this process may use 3"):
            benchmark.cores_of_instances(4)

    @pytest.mark.parametrize("file", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
    def test_are_refused_on_cores_of_several_kinds(self, monkeypatch, tmp_path, file):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
        monkeypatch.setattr(benchmark, "available_cores", lambda: 4)
        for core, speed in enumerate((1024, 990, 446, 446)):
            path = tmp_path / f"sys/devices/system/cpu/cpu{core}" / file
            path.parent.mkdir(parents=True)
            path.write_text(f"{speed}\n")

        with pytest.raises(UsageError, match="cores of several kinds") as refused:
            benchmark.cores_of_instances(2, root=tmp_path)
        assert "cores 0,1 are faster than 2,3 (1024 and 446 by the kernel)" in str(refused.value)
        assert "taskset --cpu-list 0,1" in str(refused.value)
        assert benchmark.cores_of_instances(1, root=tmp_path) == [[0, 1, 2, 3]]
        monkeypatch.setattr(benchmark, "available_cores", lambda: 2)
        assert benchmark.cores_of_instances(2, root=tmp_path) == [[0], [1]]

    def test_speeds_of_cores_are_recorded_with_what_was_measured(self, engine, tmp_path):
        report = benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT)

        assert report.settings["core_speeds"] == conditions.core_speeds(sorted(os.sched_getaffinity(0)))
        assert conditions.core_speeds([0], tmp_path) == []

    def test_have_cores_of_their_own_and_as_many_each(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 3, 5, 0, 1})
        monkeypatch.setattr(benchmark, "available_cores", lambda: 5)

        assert benchmark.cores_of_instances(2) == [[0, 1], [3, 5]]
        with pytest.raises(UsageError, match="6 instances want as many cores"):
            benchmark.cores_of_instances(6)

    def test_taken_together_throughput_adds_up_and_latencies_are_told_one_by_one(self):
        def told(latency: int, queries: int) -> dict[str, object]:
            process = replace(timings.process("", *[latency] * queries), images_per_query=2)
            return {key: value for key, value in to_json(process).items() if key not in ("label", "again")}

        found = benchmark.together([told(10, 2), told(30, 3)], seconds=0.5)

        assert found["latency_ns"] == [10, 30, 10, 30, 30]
        assert found["offline"] == [[2, 20.0]]
        assert found["instances"] == [(10, 8.0), (30, 12.0)]
        assert found["peak_bytes"] == 2 * (60 << 20)
        assert found["conditions"]["cores"] == 4
        assert found["conditions"]["wall_ns"] == timings.SECOND

    @pytest.mark.parametrize("key", ["waited_ns", "others_ns"])
    def test_what_disturbed_one_of_them_disturbed_all(self, key):
        def told(**changed: int) -> dict[str, object]:
            return {k: v for k, v in to_json(timings.process("", 5, **changed)).items() if k not in ("label", "again")}

        found = benchmark.together([told(), told(**{key: 7})], seconds=1)

        assert found["conditions"][key] == 7


@pytest.fixture(scope="module")
def engine(portable, tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("engine")
    write_manifest(folder, build.build(portable("lenet5"), "onnxruntime", folder, threads=1))
    return read_artifact(folder)


class TestFreshProcesses:
    """Real ones, whatever the times."""

    @pytest.mark.parametrize(
        "scenario",
        [
            Scenario("multi-stream", streams=3),
            Scenario("server", rate=2000.0),
            Scenario("server", streams=2, rate=2000.0),
        ],
        ids=lambda scenario: f"{scenario.name} {scenario.streams}",
    )
    def test_tell_every_query_of_a_scenario(self, engine, scenario):
        report = benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT, scenario=scenario)

        for process in report.processes:
            assert len(process.latency_ns) == SHORT["queries"]
            assert process.offline == ()
        assert report.settings["scenario"] == to_json(scenario)
        assert BenchmarkReport.from_json(json.loads(json.dumps(to_json(report)))) == report

    def test_find_a_rate_and_the_latencies_at_it(self, engine):
        scenario = Scenario("server", bound_ns=10**12)  # what no query exceeds, so that the fastest that is tried holds

        process, *_ = benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT, scenario=scenario).processes

        assert process.rate_per_second > 0
        assert len(process.latency_ns) == SEARCH_QUERIES

    def test_say_when_no_rate_holds(self, engine):
        with pytest.raises(DeploykitError, match="no rate keeps the p99 below"):
            benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT, scenario=Scenario("server", bound_ns=1))

    @on_two_cores
    def test_run_side_by_side_as_one(self, engine):
        report = benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT, scenario=Scenario(instances=2))

        for process in report.processes:
            assert len(process.instances) == 2
            assert process.conditions.cores == 2 * (len(os.sched_getaffinity(0)) // 2)
            ((batch, per_second),) = process.offline
            assert (batch, per_second) == (1, pytest.approx(sum(each for _, each in process.instances)))
            assert len(process.latency_ns) == pytest.approx(per_second * SHORT["offline_seconds"])

    @on_two_cores
    def test_that_fail_side_by_side_are_reported_with_their_own_words(self, engine, tmp_path):
        lost = replace(engine, path=tmp_path / "engine.onnx")

        with pytest.raises(DeploykitError, match=r"exit code 1\n  why: .*is not a deploykit artifact"):
            benchmark.benchmark({"a": lost}, processes=1, seed=0, **SHORT, scenario=Scenario(instances=2))

    def test_tell_the_time_of_every_layer_of_engines_whose_runtime_tells_it(self, engine, portable, tmp_path):
        folder = shutil.copytree(portable("lenet5").folder, tmp_path / "model")
        model = write_manifest(folder, replace(portable("lenet5"), path=folder / "model.onnx"))
        silent = replace(engine, facts={**engine.facts, "runtime": "openvino"})

        found = benchmark.layer_times({"a": (engine, model), "b": (silent, model)}, queries=1)

        layers = {layer.name for layer in runtimes.get("onnxruntime").realised(engine, model).layers}
        assert found.keys() == {"a"}
        assert layers <= found["a"].keys()
        assert min(found["a"].values()) > 0
        assert benchmark.layer_times({"b": (silent, model)}) == {}

    def test_threads_that_wait_for_each_other_are_no_disturbance(self, engine):
        report = benchmark.benchmark({"a": engine}, processes=1, seed=0, **SHORT, scenario=Scenario("multi-stream", streams=2))

        assert {process.conditions.waited_ns for process in report.processes} == {None}


class TestTheCommand:
    QUICK = ("--processes", 1, "--queries", 3, "--warmup", 1)

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (("--scenario", "multi-stream", "--streams", 2), "Latency of the slowest of 2 queries at once, one image each"),
            (("--scenario", "server", "--rate", 500), "arrivals at random, 500 a second, 1 session,"),
            (("--scenario", "server", "--p99", 1e5), "queries a second (95 %"),
        ],
    )
    def test_says_what_was_measured(self, deploykit, engine, words, told):
        outcome = deploykit("benchmark", engine.folder, *words, *self.QUICK)

        assert outcome.code == 0, outcome.err
        assert told in " ".join(outcome.out.split())

    @on_two_cores
    def test_says_what_instances_did_together(self, deploykit, engine):
        words = ("--instances", 2, "--offline-seconds", 0.05, *self.QUICK)

        outcome = deploykit("benchmark", engine.folder, *words)

        assert outcome.code == 0, outcome.err
        assert "images/s together; median ms of each instance" in outcome.out

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (("--rate", 5), "--rate and --p99 are for --scenario server"),
            (("--p99", 5), "--rate and --p99 are for --scenario server"),
            (("--streams", 2), "--streams is for --scenario multi-stream and server"),
            (("--scenario", "server"), "wants --rate or --p99, and one of them"),
            (("--scenario", "server", "--rate", 5, "--p99", 5), "wants --rate or --p99, and one of them"),
            (("--scenario", "multi-stream", "--instances", 2), "--instances are single-stream each"),
            (("--scenario", "multi-stream", "--offline-batch", 2), "offline throughput is measured beside single-stream"),
            (("--instances", 2, "--offline-batch", 2), "--offline-batch means nothing to --instances"),
        ],
    )
    def test_refuses_options_that_mean_nothing(self, deploykit, engine, words, why):
        outcome = deploykit("benchmark", engine.folder, *words)

        assert (outcome.code, outcome.out) == (2, "")
        assert why in " ".join(outcome.err.split())

    def test_refuses_instances_with_more_threads_than_cores(self, deploykit, portable, tmp_path):
        cores = len(os.sched_getaffinity(0))
        folder = networks.made(tmp_path / "engine")
        write_manifest(folder, build.build(portable("lenet5"), "onnxruntime", folder, threads=cores + 1))

        outcome = deploykit("benchmark", folder, "--instances", cores) if cores > 1 else None

        if outcome is not None:
            assert outcome.code == 2
            assert f"it was built for {cores + 1} threads, and an instance has 1 of the cores" in " ".join(outcome.err.split())

    def test_refuses_a_gate_on_latencies_at_a_rate_that_is_searched(self, deploykit, engine):
        outcome = deploykit("benchmark", engine.folder, "--scenario", "server", "--p99", 5, "--gate", "latency <= 5 ms")

        assert outcome.code == 2
        assert "latencies at different rates do not compare" in " ".join(outcome.err.split())

    def test_refuses_the_baseline_of_another_scenario(self, deploykit, engine, tmp_path):
        path = tmp_path / "raw.json"
        judge.save(timings.report({FP32: [5] * 5}, machine=Machine.probe(), engines={FP32: about(engine)}), path)

        outcome = deploykit("benchmark", engine.folder, "--baseline", path, "--scenario", "multi-stream", "--streams", 2)

        assert outcome.code == 2
        assert "scenario: None there" in " ".join(outcome.err.split())
