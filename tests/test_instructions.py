"""`deploykit benchmark --metric instructions`: what is counted, by what, what is refused, and how a gate decides (real tools)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networks
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import build
from deploykit.artifact import digest_file, read_artifact, write_manifest
from deploykit.benchmark import counted
from deploykit.emulate import CPUS
from deploykit.errors import CapabilityError, StageError, UsageError
from deploykit.gate import Verdict
from deploykit.machine import Machine
from deploykit.timing import counting, instructions
from deploykit.timing.counting import Counted, Counter
from deploykit.timing.instructions import Counts, Engine, More

few = settings(deadline=None, max_examples=50)
FP32, INT8 = "onnxruntime fp32", "onnxruntime int8"
BY = Counter("callgrind", "valgrind-3.19.0", "x86_64, emulated with avx2", "kernels for AVX2")

with_valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None or shutil.which("cc") is None, reason="wants the Debian packages valgrind and gcc"
)
with_qemu = pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None or shutil.which("cc") is None or Machine.probe().arch != "x86_64",
    reason="wants an x86 CPU and the Debian packages qemu-user and gcc",
)


@pytest.fixture(scope="module")
def run_folder(portable, tmp_path_factory) -> Path:
    """A run with an FP32 and an INT8 engine, and the graphs that they were built from."""
    run = tmp_path_factory.mktemp("run")
    fp32 = portable("lenet5")
    int8 = networks.quantized(fp32, "onnxruntime", networks.made(tmp_path_factory.mktemp("int8") / "int8"))
    for name, model in (("fp32", fp32), ("int8", int8)):
        graph = networks.made(run / f"graph-{name}")
        shutil.copy(model.path, graph / "model.onnx")
        folder = networks.made(run / f"build-onnxruntime-{name}")
        published = replace(model, sha256=digest_file(model.path))
        write_manifest(folder, build.build(published, "onnxruntime", folder, threads=2))
    return run


@pytest.fixture
def counts(monkeypatch) -> Callable[..., list[Path]]:
    """The next counts find these instructions for each process in turn; gives the graphs that were counted."""

    def found(*runs: int, by: Counter = BY) -> list[Path]:
        left, graphs = list(runs), []

        def count(graph: Path, inputs: Mapping[str, Any], *_: object, **__: object) -> Counted:
            graphs.append(graph)
            return Counted((left.pop(0),) * len(next(iter(inputs.values()))), {"onnxruntime": "1.31.1", "python": "3.11.2"})

        monkeypatch.setattr(counting, "counter", lambda name=None, arm_root=None: by)
        monkeypatch.setattr(counting, "count", count)
        return graphs

    return found


def counted_once(label: str, *of_processes: int, **about: object) -> Engine:
    return Engine(label, tuple((instructions,) for instructions in of_processes), about)


class TestTheBracket:
    @pytest.fixture(params=["callgrind", "qemu"])
    def told_apart(self, request, tmp_path) -> Callable[[Callable[[], None]], None]:
        if request.param == "qemu":
            return counted.between_marks
        if shutil.which("cc") is None or shutil.which("valgrind") is None:
            pytest.skip("wants the Debian packages valgrind and gcc")
        return counted.bracket_of(counting.compiled("bracket", counting._BRACKET, tmp_path))

    def test_does_the_work_exactly_once(self, told_apart):
        done = []

        told_apart(lambda: done.append(1))

        assert done == [1]

    def test_hands_an_error_on(self, told_apart):
        def fail() -> None:
            raise StageError("a kernel failed")

        with pytest.raises(StageError, match="a kernel failed"):
            told_apart(fail)


@pytest.fixture(scope="module")
def twice(portable) -> list[Counted]:
    """What callgrind counts in two processes."""
    graph = portable("lenet5")
    inputs = {"image": graph.samples().inputs["image"][:2]}
    by = counting.counter()
    return [counting.count(graph.path, inputs, by, images_per_query=1) for _ in range(2)]


@pytest.mark.slow
@with_valgrind
class TestCallgrind:
    """Two real processes under valgrind, fifty times slower than without."""

    def test_counts_every_query_of_a_process(self, twice):
        for found in twice:
            assert len(found.instructions) == 2
            assert min(found.instructions) > 100_000

    def test_counts_the_same_again_to_a_thousandth(self, twice):
        first, again = (np.mean(found.instructions) for found in twice)

        assert abs(first / again - 1) < 1e-3

    def test_counts_no_start_and_no_loading(self, twice):
        """Loading ONNX Runtime takes hundreds of millions of instructions, LeNet-5 at 32 pixels about a million."""
        assert max(twice[0].instructions) < 20_000_000

    def test_says_which_tool_and_which_cpu_it_was(self):
        by = counting.counter()

        assert by.tool.startswith("valgrind-")
        assert "avx512" not in by.cpu
        assert Machine.probe().arch in by.cpu


@pytest.mark.slow
@with_qemu
def test_a_plugin_of_qemu_counts_every_query_for_another_cpu(portable):
    graph = portable("lenet5")
    inputs = {"image": graph.samples().inputs["image"][:2]}
    by = counting.counter("nehalem")

    found = counting.count(graph.path, inputs, by, images_per_query=1)

    assert len(found.instructions) == 2
    assert 100_000 < min(found.instructions) < max(found.instructions) * 1.01 < 40_000_000
    assert by.tool.startswith("qemu-x86_64 version ")


class TestWhatIsMissing:
    @pytest.fixture
    def only(self, tmp_path, monkeypatch) -> Callable[..., None]:
        """Nothing is on the PATH but scripts of these names that answer a version."""
        monkeypatch.setenv("PATH", str(tmp_path))

        def put(*names: str) -> None:
            for name in names:
                (tmp_path / name).write_text("#!/bin/sh\necho 'a tool version 1 (of a package)'\n")
                (tmp_path / name).chmod(0o755)

        return put

    def test_valgrind_is_named_with_its_package(self, deploykit, run_folder, only):
        outcome = deploykit("benchmark", run_folder, "--metric", "instructions")

        assert outcome.code == 4
        assert "there is no valgrind on the PATH" in outcome.err
        assert "install the Debian package valgrind" in outcome.err

    @pytest.mark.parametrize(
        ("there", "package"), [((), "qemu-user"), (("qemu-x86_64-static",), "qemu-user"), (("qemu-x86_64",), "gcc")]
    )
    def test_so_is_what_qemu_wants(self, only, there, package):
        only(*there)

        with pytest.raises(CapabilityError, match=f"install the Debian package {package}$"):
            counting.counter("haswell")

    def test_an_arm_cpu_wants_its_root(self, only):
        only("qemu-aarch64", "cc")

        with pytest.raises(CapabilityError, match="--arm-root"):
            counting.counter("cortex-a76")

    def test_a_version_is_told_without_the_packages(self, only):
        only("valgrind", "cc")

        assert counting.counter().tool == "a tool version 1"

    def test_a_cpu_that_nobody_knows_is_refused(self):
        with pytest.raises(UsageError, match=f"'6502' is no CPU(.|\n)*known are {', '.join(CPUS)}"):
            counting.counter("6502")

    def test_a_tool_that_saw_other_queries_than_ran_is_not_believed(self, portable, monkeypatch):
        monkeypatch.setattr(counting.emulate, "ask", lambda *_: {"queries": 2, "onnxruntime": "1", "python": "3"})
        monkeypatch.setattr(counting, "_command", lambda *_: ([], {}))
        graph = portable("lenet5")

        with pytest.raises(StageError, match=r"saw 0 of 2 queries"):
            counting.count(graph.path, graph.samples().inputs, BY, images_per_query=1)


class TestTheFilesOfCallgrind:
    def written(self, folder: Path, name: str, part: int, trigger: str, total: int) -> None:
        folder.joinpath(name).write_text(
            f"version: 1\npart: {part}\ndesc: Trigger: {trigger}\nevents: Ir\nfn=(1) f\n1 {total}\ntotals: {total}\n"
        )

    def test_are_read_in_order_and_the_one_of_the_end_is_left_out(self, tmp_path):
        for part in (10, 2, 1):
            self.written(tmp_path, f"counted.{part}", part, "--dump-after=deploykit_counted", 100 * part)
        self.written(tmp_path, "counted.11", 11, "Program termination", 5)

        assert counting._dumped(tmp_path) == [100, 200, 1000]


class TestTheCommand:
    def test_compares_with_the_first_engine_and_counts_that_twice(self, deploykit, run_folder, counts):
        graphs = counts(1_000_000, 600_000, 1_000_100)

        told = json.loads(deploykit("benchmark", run_folder, "--metric", "instructions", "--json").out)

        assert [graph.parent.name for graph in graphs] == ["graph-fp32", "graph-int8", "graph-fp32"]
        assert [engine["label"] for engine in told["engines"]] == [FP32, INT8]
        assert told["compared"][0]["percent"] == pytest.approx(100 * (600_000 / 1_000_050 - 1))
        assert told["spread"] == pytest.approx(1e-4)
        assert (told["gates"], told["exit_code"]) == ([], 0)

    @pytest.mark.parametrize(
        ("instructions_of_b", "verdict", "code"),
        [(1_004_000, "pass", 0), (1_006_000, "fail", 3), (1_005_000, "cannot tell", 5), (500_000, "pass", 0)],
    )
    def test_fails_on_more_instructions_than_allowed(self, deploykit, run_folder, counts, instructions_of_b, verdict, code):
        counts(1_000_000, instructions_of_b, 1_000_010)

        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", "--fail-on", "0.5%", "--json")

        (gate,) = json.loads(outcome.out)["gates"]
        assert (gate["rule"], gate["verdict"], outcome.code) == (f"{INT8}: instructions <= 0.5 % more", verdict, code)

    def test_tells_in_words_what_a_count_is_and_what_it_is_not(self, deploykit, run_folder, counts):
        counts(1_000_000, 600_000, 1_000_000)

        text = deploykit("benchmark", run_folder, "--metric", "instructions").out

        assert "1,000,000" in text
        assert "-40.000 %" in text
        assert "counted by valgrind-3.19.0" in text
        assert "kernels for AVX2" in text
        assert "a count is no time" in text

    def test_tells_ci(self, deploykit, run_folder, counts, tmp_path):
        counts(1_000_000, 1_100_000, 1_000_000)
        junit, markdown = tmp_path / "gates.xml", tmp_path / "summary.md"

        words = ["--fail-on", "0.5%", "--junit", junit, "--markdown", markdown]
        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", *words)

        assert outcome.code == 3
        assert len(ElementTree.parse(junit).findall(".//failure")) == 1
        assert "+10.000 %" in markdown.read_text()

    def test_counts_a_strangers_file_itself(self, deploykit, portable, counts, tmp_path):
        path = Path(shutil.copy(portable("lenet5").path, tmp_path / "theirs.onnx"))
        graphs = counts(7, 7)

        told = json.loads(deploykit("benchmark", path, "--metric", "instructions", "--json").out)

        assert told["engines"][0]["label"] == "theirs.onnx"
        assert {graph.name for graph in graphs} == {"model.onnx"}

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (("--processes", 5), "--processes is about time"),
            (("--queries", 5), "--queries is about time"),
            (("--offline-batch", 5), "--offline-batch is about time"),
            (("--gate", "latency <= 5 ms"), "--gate 'latency <= 5 ms' is about time"),
            (("--scenario", "multi-stream"), "--scenario is about time"),
            (("--fail-on", "much"), "is no percentage, such as 5%"),
        ],
    )
    def test_refuses_what_is_about_time(self, deploykit, run_folder, words, why):
        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", *words)

        assert outcome.code == 2
        assert why in outcome.err

    @pytest.mark.parametrize("words", [("--isa", "haswell"), ("--arm-root", ".")])
    def test_refuses_another_cpu_for_times(self, deploykit, run_folder, words):
        outcome = deploykit("benchmark", run_folder, *words)

        assert outcome.code == 2
        assert "add --metric instructions" in outcome.err

    def test_refuses_a_limit_where_there_is_one_engine(self, deploykit, run_folder, counts):
        counts()

        outcome = deploykit("benchmark", run_folder / "build-onnxruntime-fp32", "--metric", "instructions", "--fail-on", "1%")

        assert outcome.code == 2
        assert "there is nothing to be compared with" in outcome.err

    def test_refuses_an_engine_without_the_graph_it_was_built_from(self, deploykit, run_folder, counts, tmp_path):
        counts()
        alone = shutil.copytree(run_folder / "build-onnxruntime-fp32", tmp_path / "alone" / "engine")

        outcome = deploykit("benchmark", alone, "--metric", "instructions")

        assert outcome.code == 2
        assert f"{FP32}: the graph that it was built from is not in a folder beside {alone}" in " ".join(outcome.err.split())

    def test_refuses_other_runtimes(self, deploykit, run_folder, counts, tmp_path):
        counts()
        folder = shutil.copytree(run_folder / "build-onnxruntime-fp32", tmp_path / "engine")
        found = read_artifact(folder)
        write_manifest(folder, replace(found, facts={**found.facts, "runtime": "openvino"}))

        outcome = deploykit("benchmark", folder, "--metric", "instructions")

        assert outcome.code == 2
        assert "its runtime is openvino, and instructions are counted for ONNX Runtime alone" in " ".join(outcome.err.split())

    def test_refuses_an_output_that_cannot_be_written_before_it_counts(self, deploykit, run_folder, counts, tmp_path):
        assert counts() == []

        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", "--output", tmp_path / "nowhere" / "counts.json")

        assert outcome.code == 2
        assert "there is no folder" in outcome.err


class TestBaselines:
    @pytest.fixture
    def baseline(self, deploykit, run_folder, counts, tmp_path) -> Path:
        path = tmp_path / "counts.json"
        counts(1_000_000, 600_000, 1_000_000)
        assert deploykit("benchmark", run_folder, "--metric", "instructions", "--output", path).code == 0
        return path

    def test_every_engine_is_compared_with_itself(self, deploykit, run_folder, counts, baseline):
        counts(1_002_000, 660_000, 1_002_000)

        words = ["--metric", "instructions", "--baseline", baseline, "--fail-on", "0.5%", "--json"]
        outcome = deploykit("benchmark", run_folder, *words)

        told = json.loads(outcome.out)
        assert [round(row["percent"], 9) for row in told["compared"]] == [0.2, 10]
        assert [gate["verdict"] for gate in told["gates"]] == ["pass", "fail"]
        assert outcome.code == 3

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"cpu": "x86_64, emulated with sse4_1"}, "cpu: x86_64, emulated with avx2 there, x86_64, emulated with sse4_1 here"),
            ({"tool": "valgrind-3.20.0"}, "tool: valgrind-3.19.0 there, valgrind-3.20.0 here"),
        ],
    )
    def test_one_of_another_cpu_or_tool_is_refused(self, deploykit, run_folder, counts, baseline, changed, why):
        counts(by=replace(BY, **changed))

        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", "--baseline", baseline)

        assert outcome.code == 2
        assert why in " ".join(outcome.err.split())

    def test_one_of_another_network_is_refused(self, deploykit, run_folder, counts, baseline):
        content = json.loads(baseline.read_text())
        content["engines"][0]["about"]["model"] = "resnet18"
        baseline.write_text(json.dumps(content))
        counts()

        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", "--baseline", baseline)

        assert outcome.code == 2
        assert "model: resnet18 there, lenet5 here" in " ".join(outcome.err.split())

    def test_another_version_of_what_ran_is_told_and_compared(self, deploykit, run_folder, counts, baseline):
        content = json.loads(baseline.read_text())
        content["versions"]["onnxruntime"] = "1.0"
        baseline.write_text(json.dumps(content))
        counts(1_000_000, 600_000, 1_000_000)

        outcome = deploykit("benchmark", run_folder, "--metric", "instructions", "--baseline", baseline)

        assert outcome.code == 0
        assert "onnxruntime was 1.0 in the baseline and is 1.31.1 now" in outcome.out

    def test_what_is_saved_can_be_loaded(self, tmp_path):
        found = Counts((counted_once("a", 1, 2, model="x"), counted_once("b", 3)), BY, {"python": "3"})

        instructions.save(found, tmp_path / "counts.json")

        assert instructions.load(tmp_path / "counts.json") == found

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "JSONDecodeError"),
            (b"[" * 100_000, "holds no instruction counts"),
            (b'{"schema": "deploykit benchmark 1"}', "its schema is 'deploykit benchmark 1'"),
            (b'{"schema": "deploykit instructions 1"}', "KeyError: 'engines'"),
            (b'{"schema": "deploykit instructions 1", "engines": []}', "it holds no engine"),
            (b'{"schema": "deploykit instructions 1", "engines": [{"label": "a", "runs": [[0]], "about": {}}]}', "no counts"),
            (b'{"schema": "deploykit instructions 1", "engines": [{"label": "a", "runs": [[]], "about": {}}]}', "no counts"),
        ],
    )
    def test_a_file_that_is_none_is_refused(self, tmp_path, content, why):
        (tmp_path / "counts.json").write_bytes(content)

        with pytest.raises(UsageError, match="holds no instruction counts") as refused:
            instructions.load(tmp_path / "counts.json")
        assert why in str(refused.value)

    def test_one_that_cannot_be_read_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            instructions.load(tmp_path / "nowhere.json")


class TestTheGate:
    @few
    @given(percent=st.floats(-99, 1000), spread=st.floats(0, 10), limit=st.floats(0, 100))
    def test_decides_only_outside_of_what_two_processes_differ(self, percent, spread, limit):
        found = instructions.judge(limit, More("b", "a", percent, spread))

        if abs(percent - limit) <= spread * (1 - 1e-9):
            assert found.verdict is (Verdict.CANNOT_TELL if percent + spread > limit else Verdict.PASS)
        elif abs(percent - limit) > spread * (1 + 1e-9) + 1e-12:
            assert found.verdict is (Verdict.PASS if percent < limit else Verdict.FAIL)

    def test_knows_the_spread_of_every_engine(self):
        found = Counts((counted_once("a", 100, 101), counted_once("b", 100, 103)), BY, {})

        assert found.spread == pytest.approx(0.03)
