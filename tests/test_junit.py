"""`--junit FILE`: JUnit XML as Jenkins, GitLab and the readers for GitHub take it, whatever a command ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import pytest
import timings
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import isa, parity, pipeline, publish, runtimes, timing, verify
from deploykit import recipe as recipes
from deploykit.artifact import read_artifact
from deploykit.crosscheck import measures
from deploykit.errors import DeploykitError, StageError, UsageError
from deploykit.machine import Machine
from deploykit.report import junit, summary
from deploykit.report.summary import Gate, Status, Summary, visible

few = settings(deadline=None, max_examples=50)
TEXTS = st.text(st.characters(), max_size=40)
GATES = st.builds(Gate, TEXTS, st.sampled_from(Status), TEXTS, st.lists(TEXTS, max_size=3).map(tuple), TEXTS, st.floats(0, 1e4))
SUMMARIES = st.builds(
    Summary, TEXTS, st.lists(GATES, min_size=1, max_size=6).map(tuple), st.floats(0, 1e5), facts=st.dictionaries(TEXTS, TEXTS)
)
ELEMENTS = {Status.FAIL: "failure", Status.CANNOT_TELL: "error", Status.ERROR: "error", Status.NOT_JUDGED: "skipped"}
# What junit-10.xsd of Jenkins' xUnit plug-in allows: (attributes that are required, and others), by element.
ATTRIBUTES = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}),
    "testsuite": ({"name", "tests", "failures", "errors"}, {"time", "skipped"}),
    "property": ({"name", "value"}, set()),
    "properties": (set(), set()),
    "testcase": ({"name"}, {"time", "classname"}),
    "failure": (set(), {"type", "message"}),
    "error": (set(), {"type", "message"}),
    "skipped": (set(), {"type", "message"}),
    "system-out": (set(), set()),
}


def parsed(found: Summary) -> Element:
    return ElementTree.fromstring(junit.render(found))


def cases(path: Path) -> dict[str, Element]:
    """The test cases of a file by name."""
    return {case.attrib["name"]: case for case in ElementTree.parse(path).iter("testcase")}


def outcome(case: Element) -> Element:
    (only,) = case
    return only


def gates(*found: Gate) -> Summary:
    return Summary("net", found)


class TestTheXml:
    @given(SUMMARIES)
    @few
    def test_has_only_what_the_schema_of_jenkins_knows(self, found):
        for element in parsed(found).iter():
            required, others = ATTRIBUTES[element.tag]
            assert required <= set(element.attrib) <= required | others
            assert re.fullmatch(r"\d+\.\d{3}", element.get("time", "0.000"))

    @given(SUMMARIES)
    @few
    def test_counts_what_is_in_it(self, found):
        root = parsed(found)

        for element in (root, root[0]):
            assert int(element.attrib["tests"]) == len(root.findall("*/testcase")) == len(found.gates)
            assert int(element.attrib["failures"]) == len(root.findall("*/testcase/failure"))
            assert int(element.attrib["errors"]) == len(root.findall("*/testcase/error"))
        assert int(root[0].attrib["skipped"]) == len(root.findall("*/testcase/skipped"))

    @given(SUMMARIES)
    @few
    def test_begins_as_our_own_files_are_told_by(self, found):
        assert junit.render(found).startswith(junit.OPENING)

    @given(SUMMARIES)
    @few
    def test_has_a_case_for_each_gate_that_says_what_became_of_it(self, found):
        for gate, case in zip(found.gates, parsed(found).iter("testcase"), strict=True):
            assert outcome(case).tag == ELEMENTS.get(gate.status, "system-out")

    @given(SUMMARIES)
    @few
    def test_keeps_every_text_or_shows_its_control_characters(self, found):
        root = parsed(found)

        properties = {item.attrib["name"]: item.attrib["value"] for item in root.iter("property")}
        assert properties == {visible(name): visible(value) for name, value in found.facts.items()}
        for gate, case in zip(found.gates, root.iter("testcase"), strict=True):
            assert outcome(case).text == visible("\n".join((f"{gate.rule}: {gate.reason}", *gate.details)))
            if outcome(case).tag != "system-out":
                assert outcome(case).attrib["message"] == visible(gate.reason)

    @given(st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff")))
    @few
    def test_changes_no_character_that_can_be_seen(self, text):
        assert outcome(next(parsed(gates(Gate("rule", Status.FAIL, text))).iter("testcase"))).attrib["message"] == text

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("a\0b", "a\\x00b"),
            ("\x1b[31m", "\\x1b[31m"),
            ("a\r\nb", "a\\x0d\nb"),
            ("\ud800\udfff", "\\ud800\\udfff"),
            ("\uffff", "\\uffff"),
        ],
    )
    def test_shows_what_xml_forbids_or_changes(self, text, shown):
        assert outcome(next(parsed(gates(Gate("rule", Status.FAIL, text))).iter("testcase"))).attrib["message"] == shown

    def test_calls_no_two_cases_alike_because_gitlab_reads_only_the_first(self):
        found = gates(*[Gate("e: latency <= 5 ms", Status.PASS, "fast")] * 2)

        names = [case.attrib["name"] for case in parsed(found).iter("testcase")]

        assert names == ["e: latency <= 5 ms", "e: latency <= 5 ms (2)"]

    def test_calls_a_gate_the_same_when_its_measured_limit_is_another(self):
        found = [gates(Gate(f"e: answers like its own graph (SQNR >= {db} dB)", Status.PASS, "")) for db in (27.1, 27.2)]

        names = [next(parsed(one).iter("testcase")).attrib["name"] for one in found]

        assert names == ["e: answers like its own graph"] * 2

    def test_has_the_message_in_the_content_too_because_gitlab_shows_nothing_else(self):
        (case,) = parsed(gates(Gate("e: drop <= 1 points", Status.FAIL, "observed 3", ("a.jpg: cat became dog",)))).iter(
            "testcase"
        )

        assert outcome(case).text == "e: drop <= 1 points: observed 3\na.jpg: cat became dog"


class TestARun:
    @pytest.fixture
    def judged(self, finished, tmp_path, deploykit) -> Callable[..., tuple[int, dict[str, Element]]]:
        """Exit code and test cases of the finished run, its last stages judged by another rule."""

        def run(gate: str, **quantize: object) -> tuple[int, dict[str, Element]]:
            folder = finished.copied_to(tmp_path / "run")
            recipe = recipes.load(folder / "recipe.toml")
            assert recipe.quantize is not None
            recipe = replace(recipe, gate=(gate,), quantize=replace(recipe.quantize, target_sqnr_db=0.0, **quantize))
            (folder / "recipe.toml").write_text(recipes.dump(recipe))
            outcome = deploykit("run", folder / "recipe.toml", "--output", folder, "--junit", tmp_path / "gates.xml")
            return outcome.code, cases(tmp_path / "gates.xml")

        return run

    def test_that_passes_has_a_case_for_each_gate_with_what_was_observed(self, deploykit, finished, tmp_path):
        folder = finished.copied_to(tmp_path / "run")

        done = deploykit("run", folder / "recipe.toml", "--output", folder, "--junit", tmp_path / "gates.xml")

        root = ElementTree.parse(tmp_path / "gates.xml").getroot()
        found = cases(tmp_path / "gates.xml")
        assert done.code == 0
        assert (root.attrib["tests"], root.attrib["failures"], root.attrib["errors"]) == ("5", "0", "0")
        assert "of 544 images" in outcome(found["onnxruntime int8: disagreements <= 544"]).text
        assert {case.attrib["classname"] for case in found.values()} == {"deploykit.tiny.parity"}

    def test_has_machine_versions_stages_and_the_verdict_on_the_benchmark_as_properties(self, deploykit, finished, tmp_path):
        folder = finished.copied_to(tmp_path / "run")

        deploykit("run", folder / "recipe.toml", "--output", folder, "--junit", tmp_path / "gates.xml")

        found = {item.attrib["name"]: item.attrib["value"] for item in ElementTree.parse(tmp_path / "gates.xml").iter("property")}
        assert {"cpu", "features", "cores", "system", "torch", "onnxruntime", "seconds parity"} <= set(found)
        assert found["benchmark"].startswith("invalid: ")
        assert float(found["seconds parity"]) >= 0

    def test_that_fails_ends_with_3_and_names_the_images_that_flipped(self, judged):
        code, found = judged("disagreements <= 0", method="percentile", percentile=90.0)

        failure = outcome(found["onnxruntime int8: disagreements <= 0"])
        assert (code, failure.tag) == (3, "failure")
        assert re.search(r"^digits/\d{4}: \d became \d$", failure.text, re.MULTILINE)

    def test_that_cannot_be_decided_ends_with_5_and_an_error_that_says_how_many_images_would(self, judged):
        code, found = judged("drop <= 0.1 points")

        error = outcome(found["onnxruntime int8: drop <= 0.1 points"])
        assert (code, error.tag, error.attrib["type"]) == (5, "error", "cannot tell")
        assert "images would decide it" in error.attrib["message"] or "no number of images" in error.attrib["message"]

    def test_without_a_gate_has_a_skipped_case_and_not_none(self, deploykit, network, tmp_path):
        done = deploykit("export", network, "--to", "onnx", "--output", tmp_path / "out", "--junit", tmp_path / "gates.xml")

        (case,) = cases(tmp_path / "gates.xml").values()
        assert (done.code, outcome(case).tag) == (0, "skipped")

    def test_lists_the_layers_that_do_not_run_in_int8_for_the_gate_that_all_do_alone(self, finished_result):
        layer = {"name": "fc1/Gemm", "op": "Gemm", "precision": "fp32", "kernel": "Gemm", "why": "not fused"}
        finished_result["engines"][1]["realised"]["layers"][0] = layer
        finished_result["gates"][-1]["verdict"] = "fail"
        finished_result["gates"][0]["verdict"] = "fail"

        of_torchscript, *_, of_int8 = summary.of_run(finished_result).gates

        assert of_int8.details == ("fc1/Gemm (Gemm) runs in fp32: not fused",)
        assert of_torchscript.details == ()

    @pytest.mark.parametrize("where", ["", " graph on the reference"])
    def test_says_how_to_find_the_layer_of_a_gate_of_answers_and_blames_no_layer_in_float(self, finished_result, where):
        layers = finished_result["engines"][1]["realised"]["layers"]
        layers[0] = {"name": "fc1/Gemm", "op": "Gemm", "precision": "fp32", "kernel": "Gemm", "why": "not fused"}
        failed = {"rule": f"onnxruntime int8{where}: drop <= 0.5 points", "verdict": "fail", "reason": "2 points"}
        finished_result["gates"][3] |= failed
        out = finished_result["out"]

        gate = summary.of_run(finished_result).gates[3]

        assert gate.reason == f"2 points; deploykit bisect {out}/export-onnx {out}/quantize-onnxruntime says which layer is off"
        assert not [line for line in gate.details if "fc1/Gemm" in line]

    def test_lists_nothing_for_a_gate_that_passed(self, finished_result):
        flip = {"image": "a.jpg", "label": None, "reference": "cat", "engine": "dog", "reference_margin": 1.0}
        finished_result["parity"][2] |= {"disagreements": [flip], "disagreement_count": 1}

        assert [gate.details for gate in summary.of_run(finished_result).gates] == [()] * 5

    def test_lists_no_more_than_a_hundred_lines_and_says_how_many_are_left_out(self, finished, finished_result):
        images, theirs = tuple(f"{index}.jpg" for index in range(150)), np.eye(2)[[1] * 140 + [0] * 10]
        engine = read_artifact(finished.folder / "build-onnxruntime-int8")
        case = verify.Case("onnxruntime int8", engine, None, is_engine=True, model=engine)
        compared = parity.compare(theirs, np.eye(2)[[0] * 150], images, None)
        flip = {"image": "of another engine.jpg", "label": None, "reference": "cat", "engine": "dog", "reference_margin": 1.0}
        finished_result["parity"][1] |= {"disagreements": [flip], "disagreement_count": 1}
        finished_result["parity"][2] = verify._as_json(case, compared, None, ("cat", "dog").__getitem__)
        finished_result["gates"][3]["verdict"] = "fail"

        found = summary.of_run(finished_result)

        details = found.gates[3].details
        assert len(details) == 101
        assert details[0] == "0.jpg: cat became dog"
        assert details[-1] == "and 40 more"
        assert "Images decided otherwise (the first 100 of 141)" in [table.title for table in found.tables]

    def test_gives_the_gates_of_a_stage_its_time_and_those_of_time_to_the_benchmark(self, finished_result):
        slow = {**finished_result["gates"][3], "rule": "onnxruntime int8: latency <= 5 ms"}
        finished_result["gates"].append(slow)
        finished_result["stages"] = [{"name": name, "seconds": time} for name, time in (("parity", 10.0), ("benchmark", 7.0))]

        found = summary.of_run(finished_result)

        assert [(gate.stage, gate.seconds) for gate in found.gates] == [("parity", 2.0)] * 5 + [("benchmark", 7.0)]
        assert found.seconds == 17.0


@pytest.fixture
def finished_result(finished) -> dict:
    """What the finished run printed, to be changed."""
    return json.loads(finished.outcome.out)


class TestABenchmark:
    """On engines and reports that nobody measured."""

    MS = 1_000_000

    @pytest.fixture
    def benchmarked(self, finished, tmp_path, deploykit, monkeypatch) -> Callable[..., tuple[int, Element]]:
        """Exit code and the only case of one engine that has this latency, against `latency <= 5 ms`."""

        def run(latency_ns: int, **changed: object) -> tuple[int, Element]:
            medians = [latency_ns + offset for offset in range(5)]

            def benchmark(engines, **_):
                return timings.report(dict.fromkeys(engines, medians), machine=Machine.probe(), **changed)

            monkeypatch.setattr(timing, "benchmark", benchmark)
            file = tmp_path / "gates.xml"
            engine = finished.folder / "build-onnxruntime-fp32"
            done = deploykit("benchmark", engine, "--gate", "latency <= 5 ms", "--junit", file, "--json")
            (case,) = cases(file).values()
            return done.code, case

        return run

    def test_that_is_fast_enough_passes(self, benchmarked):
        code, case = benchmarked(self.MS)

        assert (code, outcome(case).tag, case.attrib["classname"]) == (0, "system-out", "deploykit.benchmark")

    def test_that_is_too_slow_is_a_failure(self, benchmarked):
        code, case = benchmarked(9 * self.MS)

        assert (code, outcome(case).tag) == (3, "failure")
        assert outcome(case).attrib["message"].startswith("observed 9 ms")

    def test_that_was_disturbed_is_an_error_with_the_reason(self, benchmarked):
        code, case = benchmarked(self.MS, others_ns=timings.SECOND)

        assert (code, outcome(case).tag) == (5, "error")
        assert "the run is invalid" in outcome(case).attrib["message"]


class TestParityOnOtherCpus:
    def test_has_a_case_for_each_cpu(self, deploykit, tmp_path, monkeypatch):
        row = {
            "isa": "haswell",
            "stands_for": "AVX2",
            "images": 16,
            "differ": 9,
            "most_steps": 73,
            "changed_later": 0,
            "flips": 2,
        }
        found = {
            "graph": "model.onnx",
            "last_quantized": "fc",
            "against": "this machine",
            "onnxruntime": "1.31",
            "compared": [{**row, "verdict": "fail"}, {**row, "isa": "nehalem", "verdict": "pass"}],
            "exit_code": 3,
        }
        monkeypatch.setattr(isa, "compare", lambda *_, **__: found)

        done = deploykit("parity", "run", "--isa", "haswell", "--isa", "nehalem", "--junit", tmp_path / "cpus.xml")

        told = cases(tmp_path / "cpus.xml")
        assert done.code == 3
        assert [outcome(case).tag for case in told.values()] == ["failure", "system-out"]
        assert (
            "73 steps; 0 other answers from the same integers; 2 decided otherwise"
            in outcome(told["haswell: answers like this machine"]).attrib["message"]
        )


class TestParityOfTwo:
    def test_has_a_case_for_each_gate(self, deploykit, finished, photos, tmp_path):
        a, b = finished.folder / "export-onnx", finished.folder / "quantize-onnxruntime"

        done = deploykit("parity", a, b, "--data", photos, "--gate", "agreement >= 90 %", "--junit", tmp_path / "two.xml")

        found = cases(tmp_path / "two.xml")
        assert done.code == 5  # whatever three of twelve images are decided
        assert outcome(found["every answer is a number"]).tag == "system-out"
        assert outcome(found["agreement >= 90 %"]).attrib["type"] == "cannot tell"

    def test_names_the_images_that_flipped(self, finished):
        flip = {"image": "a.jpg", "label": None, "a": "cat", "b": "dog", "a_margin": 1.0}
        gate = {"observed": 1, "interval": None, "reason": "1 of 9 images"}
        found = {
            "sides": [{"label": label, "name": label, "kind": "a graph"} for label in "AB"],
            "decisions": {"disagreements": [flip], "disagreement_count": 1},
            "gates": [{**gate, "rule": rule, "verdict": "fail"} for rule in ("every answer is a number", "disagreements <= 0")],
            "machine": json.loads(finished.outcome.out)["machine"],
            "notes": [],
        }

        of_numbers, of_decisions = summary.of_parity(found, seconds=4.0).gates

        assert (of_numbers.details, of_decisions.details) == ((), ("a.jpg: cat became dog",))
        assert of_numbers.seconds + of_decisions.seconds == 4.0

    def test_of_two_graphs_that_are_apart_says_how_to_find_the_layer(self, finished):
        gate = {"rule": "logits: B answers like A (max|d| <= 1)", "observed": 1, "interval": None, "reason": "far"}
        found = {
            "sides": [{"label": label, "name": label, "kind": "a graph"} for label in "AB"],
            "decisions": None,
            "gates": [{**gate, "verdict": "fail"}],
            "machine": json.loads(finished.outcome.out)["machine"],
            "notes": ["deploykit bisect a.onnx b.onnx names the layer"],
        }

        (told,) = summary.of_parity(found, seconds=1.0).gates

        assert told.reason == "far; deploykit bisect a.onnx b.onnx names the layer"

    def test_names_a_hundred_of_the_images_that_flipped_and_says_how_many_are_left_out(self, finished):
        a, b = np.eye(2)[[0] * 150], np.eye(2)[[1] * 140 + [0] * 10]
        compared = parity.compare(b, a, tuple(f"{index}.jpg" for index in range(150)), None)
        found = {
            "sides": [{"label": label, "name": label, "kind": "a graph"} for label in "AB"],
            "decisions": measures.decisions(compared, a, b, None, str),
            "gates": [{"rule": "disagreements <= 0", "verdict": "fail", "observed": 140, "interval": None, "reason": "140"}],
            "machine": json.loads(finished.outcome.out)["machine"],
            "notes": [],
        }

        told = summary.of_parity(found, seconds=1.0)

        assert (len(told.gates[0].details), told.gates[0].details[-1]) == (101, "and 40 more")
        assert told.tables[0].title == "Images decided otherwise (the first 100 of 140)"


class TestAnError:
    """Is one test case, so that a page is never empty."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["run", "nowhere.toml"], "cannot read the recipe nowhere.toml"),
            (["run", "nowhere.toml", "--nonsense"], "No such option '--nonsense'."),
            (["run"], "Missing argument 'RECIPE'."),
            (["export", "lenet5", "--to", "nowhere"], "Invalid value for '--to': 'nowhere' is not one of"),
            (["benchmark", "nowhere"], "nothing to measure"),
            (["parity", "nowhere", "--isa", "haswell"], "nowhere"),
        ],
    )
    @pytest.mark.parametrize("form", ["--junit=gates.xml", "--junit gates.xml"])
    def test_of_usage_is_a_case_called_like_the_command(self, deploykit, tmp_path, monkeypatch, words, message, form):
        monkeypatch.chdir(tmp_path)

        done = deploykit(*words, *form.split())

        (case,) = cases(tmp_path / "gates.xml").values()
        assert (done.code, outcome(case).tag, case.attrib["name"]) == (2, "error", f"deploykit {words[0]}")
        assert message in outcome(case).attrib["message"]

    def test_has_every_problem_in_its_content(self, deploykit, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.toml").write_text('name = 3\ngate = ["drop < 1"]\n[model]\nname = "lenet5"\n')

        deploykit("run", "bad.toml", "--junit", "gates.xml")

        (case,) = cases(tmp_path / "gates.xml").values()
        assert "- name: expected text, got 3" in outcome(case).text

    @pytest.mark.parametrize(("error", "code"), [(StageError("the file is wrong", why="it is"), 1), (UsageError("no"), 2)])
    def test_of_a_stage_keeps_its_exit_code(self, deploykit, tiny_recipe, tmp_path, monkeypatch, error, code):
        monkeypatch.setattr(pipeline, "run", raising(error))

        done = deploykit("run", tiny_recipe, "--junit", tmp_path / "gates.xml")

        (case,) = cases(tmp_path / "gates.xml").values()
        assert done.code == code
        assert outcome(case).attrib["message"] == error.what

    def test_that_a_machine_lacks_something_ends_with_4(self, deploykit, tmp_path, monkeypatch):
        monkeypatch.setattr(runtimes, "why_not", lambda *_: "there is no GPU")
        words = ("export", "lenet5", "--weights", "none", "--to", "onnxruntime", "--engine", "require")

        done = deploykit(*words, "--output", tmp_path / "out", "--junit", tmp_path / "gates.xml")

        (case,) = cases(tmp_path / "gates.xml").values()
        assert done.code == 4
        assert "there is no GPU" in outcome(case).text

    def test_that_nobody_foresaw_is_a_case_and_a_traceback(self, deploykit, tiny_recipe, tmp_path, monkeypatch):
        monkeypatch.setattr(pipeline, "run", raising(ZeroDivisionError("division by zero")))

        with pytest.raises(ZeroDivisionError):
            deploykit("run", tiny_recipe, "--junit", tmp_path / "gates.xml")

        (case,) = cases(tmp_path / "gates.xml").values()
        assert outcome(case).attrib["message"] == "division by zero"


def raising(error: Exception) -> Callable[..., None]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


class TestTheFile:
    @pytest.mark.parametrize("option", ["--junit", "--markdown"])
    def test_is_refused_before_any_work_when_it_cannot_be_written(self, deploykit, tiny_recipe, tmp_path, monkeypatch, option):
        monkeypatch.setattr(pipeline, "run", raising(AssertionError("it worked before it refused")))
        (tmp_path / "link").symlink_to("elsewhere")

        for path, why in (
            (tmp_path, "it is a folder"),
            (tmp_path / "nowhere" / "gates.xml", f"there is no folder {tmp_path}/nowhere"),
            (tmp_path / "link", "it is no plain file"),
            (Path("/dev/null"), "it is no plain file"),
            (tmp_path / ("x" * 300), "file name too long"),
        ):
            done = deploykit("run", tiny_recipe, option, path)
            assert done.code == 2
            assert f"{option} {path}: {why}" in done.err
        assert sorted(tmp_path.iterdir()) == [tmp_path / "link"]

    @pytest.mark.parametrize("option", ["--junit", "--markdown"])
    @pytest.mark.parametrize(
        "words",
        [
            "run {option} {file}",
            "run {option}={file}",
            "run {file} {option} {file}",
            "run nowhere.toml --nonsense {option} {file}",
            "benchmark nowhere {option} {file}",
        ],
    )
    def test_that_deploykit_did_not_write_is_refused_and_left_as_it_is(self, deploykit, tiny_recipe, tmp_path, option, words):
        file = tmp_path / "recipe.toml"
        file.write_bytes(tiny_recipe.read_bytes())

        done = deploykit(*words.format(option=option, file=file).split())

        assert done.code == 2
        assert file.read_bytes() == tiny_recipe.read_bytes()
        if words.startswith(("run {file}", "benchmark")):
            assert f"{option} {file}: a file is there that deploykit has not written" in done.err

    @pytest.mark.parametrize("option", ["--junit", "--markdown"])
    def test_that_is_empty_or_an_earlier_one_is_replaced(self, deploykit, tmp_path, option):
        file = tmp_path / "page"
        file.touch()

        for command in ("benchmark", "run"):
            assert deploykit(command, "nowhere", option, file).code == 2
            assert f"deploykit {command}" in file.read_text()

    def test_of_both_options_is_refused(self, deploykit, tiny_recipe, tmp_path):
        done = deploykit("run", tiny_recipe, "--junit", tmp_path / "both", "--markdown", tmp_path / "both")

        assert done.code == 2
        assert "--junit and --markdown are the same file" in done.err

    def test_of_an_earlier_run_is_gone_when_the_work_starts_so_that_a_killed_one_does_not_seem_to_pass(
        self, deploykit, tiny_recipe, tmp_path, monkeypatch
    ):
        file = tmp_path / "gates.xml"
        file.write_bytes(junit.render(gates(Gate("e: drop <= 1 points", Status.PASS, "observed 0"))))

        def run(*_: object, **__: object) -> None:
            assert not file.exists()
            raise StageError("reached")

        monkeypatch.setattr(pipeline, "run", run)

        assert "reached" in deploykit("run", tiny_recipe, "--junit", file).err

    def test_that_could_not_be_written_after_all_is_an_error_and_the_json_stays_one_document(
        self, deploykit, finished, tmp_path, monkeypatch
    ):
        folder = finished.copied_to(tmp_path / "run")
        monkeypatch.setattr(pipeline, "run", lambda *_, **__: json.loads(finished.outcome.out))
        monkeypatch.setattr(publish, "write_file", raising(DeploykitError("the disk is full")))

        done = deploykit("run", folder / "recipe.toml", "--junit", tmp_path / "gates.xml", "--json")

        assert done.code == 1
        assert json.loads(done.out)["error"]["what"] == "the disk is full"
