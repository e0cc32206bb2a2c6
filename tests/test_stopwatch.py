"""What graphs take on this machine, and what whole runs make of it: real engines and processes, and stopwatches made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx_ir as ir
import pytest
import timings

from deploykit import artifact, build, pipeline, runtimes, stopwatch, workspace
from deploykit import recipe as recipes
from deploykit.artifact import Artifact, read_artifact
from deploykit.build import Engine
from deploykit.errors import CapabilityError, UsageError
from deploykit.progress import silent
from deploykit.quantize import place
from deploykit.quantize.speed import Costs, Race, Stopwatch
from deploykit.report import text
from deploykit.runtimes import SLOW, KernelTime
from deploykit.sources import Sources

QUICK = [
    "--processes",
    "2",
    "--set",
    "benchmark.queries=2",
    "--set",
    "benchmark.warmup=1",
    "--set",
    "benchmark.offline_seconds=0",
]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Callable[[str], tuple[Artifact, Artifact]]:
    """A network by name as finished artifacts: its float graph, and its INT8 graph for ONNX Runtime."""
    root = tmp_path_factory.mktemp("graphs")

    def make(name: str) -> tuple[Artifact, Artifact]:
        source = artifact.make(root / name, name, lambda folder: networks.exported(name, folder))
        return source, artifact.make(
            root / f"{name}-int8", name, lambda folder: networks.quantized(source, "onnxruntime", folder)
        )

    return make


class TestAProfile:
    @pytest.mark.parametrize("name", ["residual", "mobile"])  # with residual Adds; with hard-swish, a gate and a ReLU6
    def test_has_the_time_of_every_layer_in_float_and_in_int8(self, graphs, name):
        source, int8 = graphs(name)

        with stopwatch.stopwatch("onnxruntime", 1) as watch:
            assert watch.profile is not None
            costs = Costs.of(watch.profile(source), watch.profile(int8))

        layers = set(int8.facts["int8_layers"])
        assert layers == set(place.claimed(place.plan(ir.load(source.path).graph, runtimes.rules("onnxruntime"))))
        for found in (costs.floats, costs.integers):
            assert layers <= found.keys()
            assert all(ns > 0 for ns in found.values())
        assert costs.to_integers > 0 < costs.to_floats

    def test_says_of_each_kernel_what_it_computes_how_long_and_how_many_numbers_it_writes(self, graphs):
        _, int8 = graphs("residual")

        with stopwatch.stopwatch("onnxruntime", 1) as watch:
            assert watch.profile is not None
            found = watch.profile(int8)

        (first,) = [kernel for kernel in found if kernel.source == "body.0.0/Conv"]
        assert (first.op, first.elements) == ("QLinearConv", 8 * 32 * 32)
        assert [(kernel.elements, kernel.source) for kernel in found if kernel.op == "QuantizeLinear"] == [(3 * 32 * 32, "")]

    def test_is_not_to_be_had_of_a_runtime_that_does_not_tell(self):
        with stopwatch.stopwatch("openvino", 1) as watch:
            assert watch.profile is None


class TestARace:
    def test_measures_every_graph_in_fresh_processes_and_leaves_nothing(self, graphs, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        source, int8 = graphs("residual")
        seen: list[tuple[str, int, int]] = []

        with stopwatch.stopwatch("onnxruntime", 1, progress=lambda *step: seen.append(step)) as watch:
            race = watch.race({"int8": int8, "float": source})
            assert len(list(tmp_path.glob("*/*"))) == 2

        assert list(race.ns) == ["int8", "float"]
        assert all(1e3 < ns < 1e9 for ns in race.ns.values())
        assert race.floor >= 0
        assert seen[-1][0] == "race of INT8 graphs"
        assert list(tmp_path.iterdir()) == []

    def test_builds_an_engine_once_however_often_it_is_asked_for(self, graphs, monkeypatch):
        built: list[tuple[str, int]] = []

        def counting(model: Artifact, runtime: str, folder: Path, *, threads: int) -> Artifact:
            built.append((model.precision.value, threads))
            return build.build(model, runtime, folder, threads=threads)

        monkeypatch.setattr(stopwatch, "build", counting)
        source, int8 = graphs("residual")

        with stopwatch.stopwatch("onnxruntime", 1) as watch:
            assert watch.profile is not None
            for model in (source, int8, source):
                watch.profile(model)

        assert built == [("fp32", 1), ("int8", 1)]


@pytest.fixture
def recipe(network, photos) -> Callable[..., recipes.Recipe]:
    """A run of the tiny network with random weights."""

    def make(**tables: Any) -> recipes.Recipe:
        content: dict[str, Any] = {
            "name": "tiny",
            "model": {"name": network},
            "data": {"calibrate": str(photos)},
            "quantize": {},
            "benchmark": {"processes": 2, "queries": 2, "warmup": 1, "offline_seconds": 0.0},
        }
        for table, values in tables.items():
            content[table] = {**content.get(table, {}), **values}
        return recipes.parse(content, base=Path("/"), source="a test")

    return make


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """What stopwatches are asked for; each of them says that INT8 takes twice the time of float."""
    found: list[tuple[str, int]] = []

    def profile(model: Artifact) -> list[KernelTime]:
        slower = 2e6 if model.precision.value == "int8" else 1e6
        return [KernelTime(name, "", name, slower, 1) for name in ("conv1/Conv", "conv2/Conv", "head/Gemm")]

    def race(models: Mapping[str, Artifact]) -> Race:
        ns = {name: 2e6 - index for index, name in enumerate(models)}
        return Race(ns, 0.0, {name: (time, time) for name, time in ns.items()})

    @contextmanager
    def made_up(runtime: str, threads: int, *, progress: object) -> Iterator[Stopwatch]:
        found.append((runtime, threads))
        yield Stopwatch(profile, race)

    monkeypatch.setattr(stopwatch, "stopwatch", made_up)
    return found


class TestAWholeRun:
    def test_weighs_int8_against_float_for_every_runtime_that_is_built_here(self, asked, recipe, tmp_path):
        found = pipeline.run(recipe(build={"runtimes": ["onnxruntime", "tensorrt"], "threads": 1}), tmp_path / "out")

        assert asked == [("onnxruntime", 1)]
        candidates = {engine["label"]: engine["candidates"] for engine in found["engines"]}
        assert candidates["tensorrt int8"] == candidates["onnxruntime fp32"] == []
        assert [(way["name"], way["chosen"]) for way in candidates["onnxruntime int8"]] == [("int8", False), ("float", True)]
        (told,) = [stage["summary"] for stage in found["stages"] if stage["name"] == "quantize-onnxruntime"]
        assert told.startswith("0 layers between Q/DQ")
        assert "3 in float because that is faster here" in told
        (gate,) = [gate for gate in found["gates"] if gate["rule"].startswith("onnxruntime int8: every layer")]
        assert gate["verdict"] == "pass"
        assert gate["reason"] == f"0 of 3 layers run in int8; kept in float, {SLOW}: conv1/Conv, conv2/Conv, head/Gemm"

    @pytest.mark.parametrize("tables", [{"quantize": {"speed": False}}, {"build": {"engine": "skip"}}])
    def test_weighs_nothing_where_that_is_not_wanted_or_no_engine_is_built(self, asked, recipe, tables, tmp_path):
        benchmark = {"enabled": False}

        pipeline.run(recipe(**tables, benchmark=benchmark), tmp_path / "out")

        assert asked == []


@pytest.fixture(scope="module")
def fastest(tmp_path_factory, network, photos, shell) -> tuple[Path, Mapping[str, Any]]:
    """A run of the tiny network for the fastest engine, from the command line."""
    out = tmp_path_factory.mktemp("fastest") / "run"
    words = ["--int8", "--calibrate", photos, *QUICK, "--set", "quantize.speed=false", "--output", out, "--json"]
    outcome = shell("export", network, "--to", "fastest", *words)
    assert outcome.code == 0, outcome.err
    return out, json.loads(outcome.out)


class TestTheFastestEngine:
    def test_is_chosen_among_those_of_every_cpu_runtime_here_in_float_and_in_int8(self, fastest):
        _, found = fastest

        here = [name for name in ("onnxruntime", "openvino") if not runtimes.why_not(name)]
        labels = {f"{name} {precision}" for name in here for precision in ("fp32", "int8")}
        assert {engine["label"] for engine in found["engines"]} == labels
        assert found["fastest"]["over"].keys() == labels - {found["fastest"]["label"]}
        medians = {engine["label"]: engine["median_ns"] for engine in found["benchmark"]["engines"]}
        assert found["fastest"]["latency_ns"] == min(medians.values()) == medians[found["fastest"]["label"]]

    def test_lies_in_its_own_folder_loads_and_answers_like_the_one_it_was_copied_from(self, fastest):
        out, found = fastest
        copy = read_artifact(out / "fastest")
        (original,) = [engine for engine in found["engines"] if engine["label"] == found["fastest"]["label"]]

        session = runtimes.get(original["runtime"]).load(copy)
        answered = runtimes.run(session, dict(copy.samples().inputs))["logits"]

        assert copy.path == out / found["fastest"]["path"]
        assert copy.path.read_bytes() == (out / original["path"]).read_bytes()
        assert np.allclose(answered, copy.samples().expected["logits"], atol=0.1)

    def test_is_said_on_the_terminal_with_where_it_lies(self, fastest):
        out, found = fastest

        said = text.run(found)

        assert f"the fastest is kept: {found['fastest']['label']}, " in said
        assert f" ms: {out}/{found['fastest']['path']}\n" in said

    def test_comes_with_its_ratios_in_the_headline_never_narrower_than_the_noise(self, fastest):
        _, found = fastest

        (line,) = [line for line in found["headline"] if line.startswith("fastest: ")]
        floor = found["benchmark"]["noise_floor"]
        for label, over in found["fastest"]["over"].items():
            assert f"{over['ratio']:.3g} times {label} (95 % " in line
            assert over["interval"][0] <= over["ratio"] / (1 + floor) * 1.001
        assert line.endswith("; but the benchmark is invalid") == bool(found["benchmark"]["warnings"])

    def test_is_copied_again_only_when_it_changed_and_is_part_of_the_run(self, fastest):
        out, _ = fastest

        again = pipeline.run(recipes.load(out / "recipe.toml"), out)

        statuses = {stage["name"]: stage["status"] for stage in again["stages"]}
        assert statuses["fastest"] == statuses["benchmark"] == "skipped"
        assert recipes.load(out / "recipe.toml").build.keep == "fastest"
        assert workspace.clean(out) == []


class TestTheChoice:
    """Among two engines that exist, by times and verdicts that are made up."""

    @pytest.fixture
    def choose(self, fastest, tmp_path) -> Callable[..., Mapping[str, Any] | None]:
        run, _ = fastest
        recipe = recipes.load(run / "recipe.toml")
        (tmp_path / "out").mkdir()
        self.work = pipeline.Work(recipe, tmp_path / "out", Sources(recipe, silent), silent, lambda: 0.0)
        engines = []
        for precision, model in (("fp32", "export-onnx"), ("int8", "quantize-onnxruntime")):
            made = read_artifact(run / f"build-onnxruntime-{precision}")
            engines.append(Engine("onnxruntime", read_artifact(run / model), made, "", None))
        times = timings.report({"onnxruntime fp32": [100, 101] * 5, "onnxruntime int8": [50, 51] * 5})

        def make(*failed: str, verdict: str = "fail", timed: bool = True) -> Mapping[str, Any] | None:
            gates = [{"rule": f"{label}: drop <= 0.5 points", "verdict": verdict} for label in failed]
            gates.append({"rule": "onnxruntime fp32: answers like its own graph", "verdict": "pass"})
            return pipeline._fastest(self.work, engines, times if timed else None, gates)

        return make

    def test_is_the_one_with_the_lowest_median(self, choose):
        found = choose()

        assert found is not None
        assert (found["label"], found["latency_ns"]) == ("onnxruntime int8", 50.5)
        assert found["over"]["onnxruntime fp32"]["ratio"] == pytest.approx(0.5, rel=0.02)

    def test_is_none_that_failed_a_gate(self, choose):
        found = choose("onnxruntime int8")

        assert found is not None
        assert (found["label"], found["over"]) == ("onnxruntime fp32", {})

    def test_may_be_one_of_which_a_gate_cannot_tell(self, choose):
        found = choose("onnxruntime int8", verdict="cannot tell")

        assert found is not None
        assert found["label"] == "onnxruntime int8"

    def test_is_none_at_all_where_every_engine_failed_and_the_earlier_one_goes(self, choose):
        choose()
        assert (self.work.out / "fastest" / artifact.MANIFEST).is_file()

        assert choose("onnxruntime int8", "onnxruntime fp32") is None

        assert not (self.work.out / "fastest").exists()
        assert (self.work.stages[-1].status, self.work.stages[-1].summary) == ("not built", "every engine failed a gate")

    def test_is_none_where_nothing_could_be_measured(self, choose):
        assert choose(timed=False) is None

        assert self.work.stages[-1].summary == "no engine could be built here"


def test_the_fastest_of_no_runtime_is_refused_with_why_each_does_not_load(deploykit, network, monkeypatch):
    for name in ("onnxruntime", "openvino"):
        entry = replace(runtimes.REGISTRY[name], module=f"deploykit.runtimes.no_{name}")
        monkeypatch.setitem(runtimes.REGISTRY, name, entry)

    outcome = deploykit("export", network, "--to", "fastest", "--json")

    error = json.loads(outcome.out)["error"]
    assert outcome.code == CapabilityError.exit_code == 4
    assert error["what"] == "no CPU engine can be built here"
    assert [problem.partition(":")[0] for problem in error["problems"]] == ["onnxruntime", "openvino"]


def test_the_fastest_is_asked_of_each_cpu_runtime_here_once_beside_what_else_is_named(deploykit, network, monkeypatch):
    asked: list[recipes.Recipe] = []

    def run(recipe: recipes.Recipe, *_: object, **__: object) -> None:
        asked.append(recipe)
        raise UsageError("that is enough")

    monkeypatch.setattr(pipeline, "run", run)

    deploykit("export", network, "--to", "tensorrt", "--to", "onnxruntime", "--to", "fastest")

    (recipe,) = asked
    assert recipe.build.keep == "fastest"
    assert recipe.build.runtimes == ("tensorrt", "onnxruntime", *["openvino"] * (not runtimes.why_not("openvino")))
