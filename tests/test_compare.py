"""`deploykit compare RUN_A RUN_B`: which run is better, what changed, and what is refused, by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, Page, _open_in_frame, full_result

from deploykit import parity, verify
from deploykit.artifact import Precision
from deploykit.errors import UsageError
from deploykit.gate import paired_difference_interval
from deploykit.report.compare import compare, load, render

few = settings(deadline=None, max_examples=50)
FP32, INT8 = "onnxruntime fp32", "onnxruntime int8"


def run(**latencies: list[int]) -> dict[str, Any]:
    """A whole run of six processes that were timed exactly; `fp32` and `int8` are the medians of their processes."""
    found = full_result()
    for engine in found["benchmark"]["engines"]:
        medians = latencies.get(engine["label"].rpartition(" ")[2], [1000, 1001, 1002, 998, 999, 1000])
        engine["latency_ns"] = [[median] * 3 for median in medians]
    found["parity"].append({**found["parity"][0], "label": FP32, "disagreements": [], "disagreement_count": 0})
    return found


def int8(found: dict[str, Any]) -> dict[str, Any]:
    return next(engine for engine in found["engines"] if engine["label"] == INT8)


def flip(image: str, label: str, reference: str, engine: str) -> dict[str, Any]:
    return {"image": image, "label": label, "reference": reference, "engine": engine}


def deciding(*flips: dict[str, Any]) -> dict[str, Any]:
    """A run whose INT8 engine decides these images otherwise than FP32 PyTorch."""
    found = run()
    found["parity"][0] |= {"disagreements": list(flips), "disagreement_count": len(flips)}
    return found


class TestLatency:
    @pytest.mark.parametrize(("times", "told"), [(2.0, "worse"), (0.5, "better"), (1.0, "no difference can be told")])
    def test_is_judged_by_the_interval_of_its_ratio(self, times, told):
        medians = [round(times * median) for median in (1000, 1001, 1002, 998, 999, 1000)]

        found = int8(compare(run(), run(int8=medians)))["latency"]

        assert found["told"] == told
        assert found["ratio"] == pytest.approx(times)
        assert found["interval"][0] < times < found["interval"][1]

    def test_less_than_either_baseline_shows_against_itself_is_no_difference(self):
        loud = run(int8=[1030] * 6)
        loud["benchmark"]["noise_floor"] = 0.05

        assert int8(compare(run(), loud))["latency"]["told"] == "no difference can be told"
        assert int8(compare(loud, run()))["latency"]["told"] == "no difference can be told"

    def test_of_two_machines_is_not_compared_and_every_difference_named(self):
        other = run()
        other["machine"] |= {"cpu": "a toaster", "cores": 1}

        found = int8(compare(run(), other))["latency"]

        assert (found["ratio"], found["told"]) == (None, "not compared")
        assert found["why"] == [
            "other machines, cpu: AMD EPYC 7763 64-Core Processor in A, a toaster in B",
            "other machines, cores: 2 in A, 1 in B",
        ]

    def test_of_another_number_of_threads_is_not_compared(self):
        other = run()
        other["benchmark"]["settings"]["threads"] = 1

        assert int8(compare(run(), other))["latency"]["why"] == ["other queries, threads: 2 in A, 1 in B"]

    @pytest.mark.parametrize("which", [0, 1])
    def test_of_an_invalid_run_is_told_and_not_judged(self, which):
        runs = [run(), run(int8=[9000] * 6)]
        runs[which]["benchmark"]["warnings"] = ["the clock changed"]

        found = int8(compare(*runs))["latency"]

        assert (found["ratio"], found["told"]) == (9, "not compared")
        assert found["why"] == [f"{'AB'[which]} is invalid: the clock changed"]

    @pytest.mark.parametrize(
        ("took", "why"),
        [
            (1_040_000, []),
            (1_200_000, ["the same fixed work took 1000 µs in A and 1200 µs in B: the machine's clock changed"]),
            (None, ["the machine's clock in B is not known: run it again"]),
        ],
    )
    def test_at_another_clock_is_told_and_not_judged(self, took, why):
        other = run(int8=[1200] * 6)
        other["benchmark"]["fixed_work_ns"] = took

        found = int8(compare(run(), other))["latency"]

        assert (found["told"], found["why"]) == ("not compared" if why else "worse", why)

    def test_of_too_few_processes_is_not_judged(self):
        found = int8(compare(run(int8=[1000] * 4), run(int8=[9000] * 6)))["latency"]

        assert found["told"] == "not compared"
        assert found["why"] == ["A has 4 processes, too few"]

    def test_that_nobody_measured_is_named(self):
        other = run() | {"benchmark": None}

        assert int8(compare(run(), other))["latency"]["why"] == ["B did not time it"]

    def test_without_a_noise_floor_nothing_is_called_different(self):
        other = run(int8=[9000] * 6)
        other["benchmark"]["noise_floor"] = None

        found = int8(compare(run(), other))["latency"]

        assert found["told"] == "not compared"
        json.dumps(found, allow_nan=False)


class TestDecisions:
    def test_are_paired_over_the_images_of_both(self):
        """Of four images: B loses one, gains one that A had lost, both err alike on one, and A alone on another."""
        a = deciding(flip("gained", "3", "3", "8"), flip("both", "4", "4", "9"))
        b = deciding(flip("lost", "5", "5", "6"), flip("lost too", "5", "5", "6"), flip("both", "4", "4", "9"))

        found = int8(compare(a, b))["accuracy"]

        assert found["lost"] == pytest.approx(100 * (2 - 1) / 540)
        assert found["interval"] == pytest.approx([100 * bound for bound in paired_difference_interval(2, 1, 540)])
        assert (found["otherwise"], found["told"], found["why"]) == (3, "no difference can be told", [])

    def test_that_change_between_two_wrong_answers_lose_nothing(self):
        found = int8(compare(deciding(flip("a", "3", "4", "8")), deciding()))["accuracy"]

        assert (found["lost"], found["otherwise"]) == (0, 1)

    @pytest.mark.parametrize(("swap", "told"), [(False, "worse"), (True, "better")])
    def test_that_many_images_lost_are_worse(self, swap, told):
        runs = [deciding(), deciding(*(flip(f"{number}", "3", "3", "8") for number in range(40)))]

        assert int8(compare(*(runs[::-1] if swap else runs)))["accuracy"]["told"] == told

    def test_of_hundreds_of_images_that_flipped_are_paired(self):
        """A run keeps every flip; pages show the first of them."""
        names = tuple(f"{number}.jpg" for number in range(540))
        reference = np.eye(2)[[0] * 540]
        run_of = []
        for flipped in (150, 300):
            compared = parity.compare(np.eye(2)[[1] * flipped + [0] * (540 - flipped)], reference, names, np.zeros(540, np.int64))
            made, engine = run(), SimpleNamespace(precision=Precision.INT8)
            case = verify.Case(INT8, engine, None, is_engine=True, model=engine)
            made["parity"][0] = json.loads(json.dumps(verify._as_json(case, compared, None, str)))
            run_of.append(made)

        found = int8(compare(*run_of))["accuracy"]

        assert (found["why"], found["lost"], found["told"]) == ([], pytest.approx(100 * 150 / 540), "worse")

    @few
    @given(st.lists(st.tuples(*[st.sampled_from("ab")] * 3), min_size=1, max_size=12))
    def test_lost_by_one_are_gained_by_the_other(self, answers):
        """(what PyTorch, A and B say) of each image, whose label is `a`."""
        runs = []
        for side in (1, 2):
            named = ((f"{place}", row[0], row[side]) for place, row in enumerate(answers))
            runs.append(deciding(*(flip(name, "a", said, mine) for name, said, mine in named if said != mine)))
        lost = sum((row[1] == "a") - (row[2] == "a") for row in answers)

        there, back = (int8(compare(*pair))["accuracy"]["lost"] for pair in (runs, runs[::-1]))

        assert there == -back == pytest.approx(100 * lost / 540)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda b: b["evaluated_on"].update(images=539), "other images: 540 of the digits' test part in A, 539 of"),
            (lambda b: b["model"].update(parameters=5), "another network, parameters: 61706 in A, 5 in B"),
            (lambda b: b["parity"][0]["accuracy"].update(reference=0.5), "FP32 PyTorch itself decides otherwise"),
            (lambda b: b["parity"][0].update(accuracy=None), "the images of B have no labels"),
            (lambda b: b["parity"][0].update(disagreement_count=900), "B names 2 of 900 images"),
            (lambda b: b.update(parity=[b["parity"][0] | {"label": "another"}]), "B did not compare it with PyTorch"),
            (lambda b: b["parity"][0]["disagreements"][0].update(label="7"), "the label of test/17"),
        ],
    )
    def test_about_something_else_are_not_paired_and_the_reason_is_named(self, change, why):
        b = run()
        change(b)

        found = int8(compare(run(), b))["accuracy"]

        assert (found["lost"], found["told"]) == (None, "not compared")
        assert any(why in reason for reason in found["why"])


class TestRuns:
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda b: b["model"].update(input=[3, 224, 224]), "input: [1, 32, 32] in A, [3, 224, 224] in B"),
            (lambda b: b["model"].update(num_classes=1000), "number of classes: 10 in A, 1000 in B"),
            (lambda b: b.update(engines=[b["engines"][0] | {"label": "x"}]), "no engine is in both: A has onnxruntime fp32"),
        ],
    )
    def test_that_have_nothing_in_common_are_refused(self, change, why):
        b = run()
        change(b)

        with pytest.raises(UsageError, match="these runs cannot be compared") as refused:
            compare(run(), b)
        assert why in str(refused.value)

    @pytest.mark.parametrize(
        ("fp32", "int8_", "verdict"),
        [
            (1000, 1000, "not to be told from A"),
            (1000, 500, "better"),
            (2000, 1000, "worse"),
            (2000, 500, "better in one way and worse in another"),
        ],
    )
    def test_have_one_verdict_over_all_engines(self, fp32, int8_, verdict):
        assert compare(run(), run(fp32=[fp32] * 6, int8=[int8_] * 6))["verdict"] == verdict

    @pytest.mark.parametrize(
        ("int8_", "change", "verdict", "tone"),
        [
            (500, lambda b: None, "better", "pass"),
            (500, lambda b: b["parity"][0].update(accuracy=None), "better (decisions not compared)", "unsure"),
            (1000, lambda b: b["parity"][0].update(accuracy=None), "not to be told from A (decisions not compared)", "unsure"),
            (2000, lambda b: b["parity"][0].update(accuracy=None), "worse (decisions not compared)", "fail"),
            (500, lambda b: b.update(benchmark=None), "not to be told from A (latency not compared)", "unsure"),
        ],
    )
    def test_that_are_compared_in_part_say_so_and_are_never_green(self, int8_, change, verdict, tone):
        a, b = run(), run(int8=[int8_] * 6)
        change(b)

        found = compare(a, b)

        assert found["verdict"] == verdict
        assert f'class="verdict {tone}"' in render(a, b, found)

    def test_are_told_apart_by_what_changed_around_them(self):
        b = run()
        b["machine"]["versions"] = {"deploykit": "0.2.0", "numpy": "2.3.1", "torch": "2.15.0", "openvino": "2026.1"}
        b["recipe"] = b["recipe"].replace("disagreements <= 2", "disagreements <= 5")

        changed = compare(run(), b)["changed"]

        assert changed == [
            "deploykit: 0.1.0 in A, 0.2.0 in B",
            "onnxruntime: 1.23.0 in A, not there in B",
            "openvino: not there in A, 2026.1 in B",
            "recipe: 2 lines",
        ]


class TestTheFile:
    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("", "is no result of a run"),
            ("[]", "it has no schema 1"),
            ("[" * 100_000, "is no result of a run"),
            ('{"schema": 2}', "it has no schema 1"),
            ('{"schema": 1, "name": "x"}', "it has no model, engines, parity, recipe, machine"),
        ],
    )
    def test_that_is_no_result_is_refused(self, tmp_path, content, why):
        (tmp_path / "result.json").write_text(content)

        with pytest.raises(UsageError, match=why):
            load(tmp_path)

    def test_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(UsageError, match=r"cannot read .*result\.json"):
            load(tmp_path)


class TestThePage:
    def page(self, a: dict[str, Any], b: dict[str, Any]) -> Page:
        return Page(render(a, b, compare(a, b)))

    def test_has_the_verdict_first_and_closes_every_element(self):
        found = self.page(run(), run(int8=[500] * 6))

        assert found.unbalanced == []
        assert found.text.index("B is better") < found.text.index("Ratio of median latencies")

    def test_names_what_was_not_compared(self):
        other = run()
        other["machine"]["cpu"] = "a toaster"

        assert "a toaster in B" in self.page(run(), other).text

    def test_shows_the_lines_of_the_recipe_that_differ(self):
        b = run()
        b["recipe"] = b["recipe"].replace("disagreements <= 2", "disagreements <= 5")

        text = self.page(run(), b).text

        assert '-gate = ["disagreements <= 2"' in text
        assert '+gate = ["disagreements <= 5"' in text

    def test_is_the_same_for_the_same_runs_and_leaves_them_unchanged(self):
        a, b = run(), run(int8=[500] * 6)
        before = copy.deepcopy((a, b))

        assert render(a, b, compare(a, b)) == render(a, b, compare(a, b))
        assert (a, b) == before

    def test_keeps_hostile_names_text(self):
        a, b = run(), run()
        b |= {"name": HOSTILE, "recipe": HOSTILE}
        b["machine"]["versions"] = {HOSTILE: HOSTILE}

        found = self.page(a, b)

        assert len(found.tags("script")) == 1
        assert HOSTILE in found.text

    @pytest.mark.parametrize("times", [1.0, 1e6])
    def test_fits_a_phone_and_a_tablet_and_logs_no_error(self, tmp_path: Path, times: float):
        browser = shutil.which("chromium") or shutil.which("chromium-browser")
        if browser is None:
            pytest.skip("needs a browser: the Debian package chromium")
        a, b = run(), run(int8=[round(1000 * times)] * 6)
        (tmp_path / "report.html").write_text(render(a, b, compare(a, b)), encoding="utf-8")

        dom, log = _open_in_frame(browser, tmp_path, widths=(380, 700, 1280))

        for width in (380, 700, 1280):
            assert f"width {width} of {width}" in dom
        assert "CONSOLE" not in log


class TestTheCommand:
    @pytest.fixture
    def runs(self, tmp_path) -> tuple[Path, Path]:
        folders = (tmp_path / "a", tmp_path / "b")
        for folder, found in zip(folders, (run(), run(int8=[500] * 6)), strict=True):
            folder.mkdir()
            (folder / "result.json").write_text(json.dumps(found))
        return folders

    def test_writes_a_page_and_says_the_verdict(self, deploykit, runs, tmp_path):
        outcome = deploykit("compare", *runs, "--output", tmp_path / "page.html")

        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith("B is better\n")
        assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")

    def test_takes_files_and_prints_json(self, deploykit, runs, tmp_path):
        files = [folder / "result.json" for folder in runs]

        outcome = deploykit("compare", *files, "--output", tmp_path / "page.html", "--json")

        assert json.loads(outcome.out)["verdict"] == "better"

    def test_refuses_a_page_that_cannot_be_written(self, deploykit, runs, tmp_path):
        outcome = deploykit("compare", *runs, "--output", tmp_path / "nowhere" / "page.html")

        assert outcome.code == 2
        assert "there is no folder" in outcome.err

    def test_writes_over_a_page_of_its_own_and_nothing_else(self, deploykit, runs, tmp_path):
        page, result = tmp_path / "page.html", runs[0] / "result.json"
        before = result.read_bytes()
        deploykit("compare", *runs, "--output", page)

        again = deploykit("compare", *runs, "--output", page)
        refused = deploykit("compare", *runs, "--output", result)

        assert (again.code, refused.code) == (0, 2)
        assert "is no page of deploykit" in refused.err
        assert result.read_bytes() == before

    def test_compares_real_runs(self, deploykit, finished, tmp_path):
        timed = [engine["realised"]["layers"] for engine in json.loads(finished.outcome.out)["engines"]]
        assert all(layer["ns"] > 0 for layers in timed for layer in layers)

        outcome = deploykit("compare", finished.folder, finished.folder, "--output", tmp_path / "page.html", "--json")

        assert outcome.code == 0, outcome.err
        for engine in json.loads(outcome.out)["engines"]:
            assert engine["accuracy"]["told"] in ("no difference can be told", "not compared")
            assert engine["latency"]["told"] == "not compared"  # two processes are too few
