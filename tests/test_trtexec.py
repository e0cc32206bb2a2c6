"""Times of trtexec: what its files say, what is refused, and that what we write is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import build
from deploykit.artifact import Artifact, read_artifact, write_manifest
from deploykit.benchmark import trtexec
from deploykit.errors import UsageError

few = settings(deadline=None, max_examples=50)
QUICK = ("--processes", 1, "--queries", 4, "--warmup", 1, "--offline-seconds", 0)


def query(start: float, h2d: float, compute: float, d2h: float) -> dict[str, float]:
    """One query as trtexec 10.3 writes it, milliseconds with six digits."""
    moments = [start, start + h2d, start + h2d + compute, start + h2d + compute + d2h]
    names = ["H2d", "Compute", "D2h"]
    row = {"startEnqMs": start, "endEnqMs": start + 0.01}
    for place, name in enumerate(names):
        row |= {f"start{name}Ms": moments[place], f"end{name}Ms": moments[place + 1]}
    row |= {"h2dMs": h2d, "computeMs": compute, "d2hMs": d2h, "latencyMs": h2d + compute + d2h}
    return {key: float(f"{value:.6g}") for key, value in row.items()}


@pytest.fixture
def file(tmp_path) -> Callable[..., Path]:
    def write(name: str, *computes: float) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps([query(3.0 * place, 0.25, compute, 0.125) for place, compute in enumerate(computes)]))
        return path

    return write


def five(file: Callable[..., Path], *computes: float) -> list[str]:
    """The words for five runs of one engine, a microsecond apart."""
    runs = [file(f"{run}.json", *(compute + run / 1000 for compute in computes)) for run in range(5)]
    return [word for path in runs for word in ("--times", f"int8={path}")]


@pytest.fixture(scope="module")
def engine(portable, tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("engine")
    write_manifest(folder, build.build(portable("lenet5"), "onnxruntime", folder, threads=1))
    return read_artifact(folder)


class TestReading:
    def test_tells_compute_from_the_copies_and_the_time_over_all(self, file):
        found = trtexec.read(file("a.json", 1.5, 2.5))

        assert found.compute_ns == (1_500_000, 2_500_000)
        assert found.copied_ns == (1_875_000, 2_875_000)
        assert found.median_ns == 2_000_000
        assert found.per_second == pytest.approx(2 / (3.0 + 2.875) * 1e3)

    def test_queries_that_overlap_are_more_a_second_than_one_over_their_latency(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text(json.dumps([query(0, 0, 2, 0), query(0.1, 0, 2, 0)]))

        found = trtexec.read(path)

        assert found.per_second > 1e9 / found.median_ns

    @pytest.mark.parametrize(
        ("values", "percent", "expected"),
        [([1], 99, 1), (range(1, 101), 99, 100), (range(1, 101), 90, 90), (range(1, 11), 95, 10), ([3, 1, 2], 50, 2)],
    )
    def test_its_percentile_is_a_value_that_was_measured(self, values, percent, expected):
        """In single precision 1 - 99 / 100 is less than a hundredth, so of 100 values none is above their p99."""
        assert trtexec.percentile(list(values), percent) == expected

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("", "Expecting value"),
            ("[]", "an empty one"),
            ("{}", "it is no list of queries"),
            ("[1]", "query 0 is no object"),
            ("[" * 100_000, ""),
            ('[{"computeMs": 1}]', "query 0 has no latencyMs, h2dMs, d2hMs, startH2dMs, endD2hMs"),
        ],
    )
    def test_a_file_that_is_none_is_refused(self, tmp_path, content, why):
        (tmp_path / "a.json").write_text(content)

        with pytest.raises(UsageError, match="holds no times of trtexec") as refused:
            trtexec.read(tmp_path / "a.json")
        assert why in str(refused.value)

    @pytest.mark.parametrize("number", ["-1", "0", "NaN", "Infinity", "1e99", '"x"', "null", "true"])
    def test_so_is_a_time_that_nobody_measured(self, file, number):
        path = file("a.json", 1.5, 2.5)
        path.write_text(path.read_text().replace('"computeMs": 2.5', f'"computeMs": {number}'))

        with pytest.raises(UsageError, match=r"query 1.*(computeMs|sum of its parts)"):
            trtexec.read(path)

    def test_so_is_a_latency_that_is_not_the_sum_of_its_parts(self, file):
        path = file("a.json", 1.5, 2.5)
        path.write_text(path.read_text().replace('"latencyMs": 2.875', '"latencyMs": 2.5'))

        with pytest.raises(UsageError, match=r"query 1: its latency of 2.5 ms is not the sum of its parts, 2.875 ms"):
            trtexec.read(path)

    def test_one_that_cannot_be_read_is_named(self, tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            trtexec.read(tmp_path / "nowhere.json")


class TestWriting:
    @few
    @given(st.lists(st.tuples(*[st.integers(1, 10**9)] * 3), min_size=1, max_size=20))
    def test_what_is_written_is_read_again(self, tmp_path_factory, parts):
        path = tmp_path_factory.mktemp("times") / "a.json"
        compute, copied, fed = [c for _, c, _ in parts], [sum(part) for part in parts], [h for h, _, _ in parts]

        trtexec.write(path, compute, copied, fed)

        found = trtexec.read(path)
        assert found.compute_ns == tuple(compute)
        assert found.copied_ns == tuple(copied)
        assert found.wall_ns == sum(copied)

    def test_it_has_every_field_of_trtexec(self, tmp_path):
        trtexec.write(tmp_path / "a.json", [5], [9], [3])

        ((row),) = json.loads((tmp_path / "a.json").read_text())
        assert set(row) == set(query(0, 1, 1, 1))
        assert (row["h2dMs"], row["computeMs"], row["d2hMs"]) == (3e-6, 5e-6, 1e-6)


class TestTheCommand:
    def told(self, outcome: Any) -> dict[str, Any]:
        assert outcome.err == ""
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    def test_one_run_is_told_and_proves_nothing(self, deploykit, file):
        outcome = deploykit("benchmark", "--times", file("resnet.json", *[1.5] * 70), "--gate", "latency <= 5 ms")

        assert outcome.code == 5
        text = " ".join(outcome.out.split())
        assert "resnet" in text
        assert "1.5" in text
        assert "resnet: 1 run of trtexec, and an interval takes at least 5" in text

    @pytest.mark.parametrize(("limit", "code"), [(5, 0), (1, 3)])
    def test_five_runs_of_an_engine_are_judged(self, deploykit, file, limit, code):
        words = five(file, 1.5)

        outcome = deploykit("benchmark", *words, "--gate", f"latency <= {limit} ms", "--json")

        told = self.told(outcome)
        assert outcome.code == told["exit_code"] == code
        assert [engine["label"] for engine in told["engines"]] == ["int8"]
        assert told["engines"][0]["median_ns"] == 1_502_000
        assert told["gates"][0]["reason"].endswith("; measured elsewhere, of unknown conditions")

    def test_they_are_of_no_known_machine_or_conditions(self, deploykit, file, tmp_path):
        outcome = deploykit("benchmark", *five(file, 1.5), "--json", "--markdown", tmp_path / "times.md")

        told = self.told(outcome)
        assert (told["machine"], told["verdict"]) == (None, "of unknown conditions")
        page = (tmp_path / "times.md").read_text()
        assert "| machine | not known: measured elsewhere |" in page
        assert "| cpu |" not in page

    def test_runs_whose_queries_get_slower_are_invalid(self, deploykit, file):
        outcome = deploykit("benchmark", *five(file, 1.5, 1.5, 1.8), "--gate", "latency <= 5 ms")

        assert outcome.code == 5
        assert "int8: queries get 20 % slower while a process runs (throttling?)" in " ".join(outcome.out.split())

    def test_a_percentile_is_stated_from_enough_queries_alone(self, deploykit, file):
        told = self.told(deploykit("benchmark", "--times", file("a.json", *[1.5] * 100), "--json"))

        assert told["engines"][0]["percentiles_ns"] == {"p90": 1_500_000, "p95": None, "p99": None}

    def test_a_slowdown_is_refused_because_there_is_no_noise_floor(self, deploykit, file):
        outcome = deploykit("benchmark", "--times", file("a.json", 1.5), "--times", file("b.json", 2.5), "--fail-on", "5%")

        assert outcome.code == 2
        assert "without one no difference can be told" in " ".join(outcome.err.split())

    def test_the_same_file_twice_is_refused(self, deploykit, file):
        path = file("a.json", 1.5)

        outcome = deploykit("benchmark", "--times", path, "--times", f"a={path}")

        assert outcome.code == 2
        assert "the same times are named twice" in outcome.err

    def test_a_path_with_an_equals_sign_is_a_path(self, deploykit, file, tmp_path):
        path = file("batch=8.json", 1.5)

        assert self.told(deploykit("benchmark", "--times", path, "--json"))["engines"][0]["label"] == "batch=8"

    @pytest.mark.parametrize(
        ("words", "why"),
        [
            (("engine",), "engine would be measured here"),
            (("--processes", 5), "--processes is about measuring"),
            (("--baseline", "x.json"), "--baseline is about measuring"),
            (("--metric", "instructions"), "--metric is about measuring"),
            (("--instances", 2), "--instances is about measuring"),
        ],
    )
    def test_nothing_is_measured_beside_times(self, deploykit, file, words, why):
        outcome = deploykit("benchmark", "--times", file("a.json", 1.5), *words)

        assert outcome.code == 2
        assert why in " ".join(outcome.err.split())

    def test_nothing_at_all_is_refused(self, deploykit):
        outcome = deploykit("benchmark")

        assert outcome.code == 2
        assert "nothing is named to be measured" in outcome.err

    def test_an_engine_that_was_measured_here_is_written_for_others_to_read(self, deploykit, engine, tmp_path):
        times, raw = tmp_path / "times.json", tmp_path / "raw.json"

        outcome = deploykit("benchmark", engine.folder, *QUICK, "--export-times", times, "--output", raw)

        assert outcome.code == 0, outcome.err
        processes = json.loads(raw.read_text())["processes"]
        found = trtexec.read(times)
        assert len(found.compute_ns) == 8  # of both arms of the baseline, and none of a process that was measured again
        assert set(found.compute_ns) <= {ns for process in processes for ns in process["latency_ns"]}

    def test_several_engines_do_not_fit_into_one_such_file(self, deploykit, engine, portable, tmp_path):
        outcome = deploykit("benchmark", engine.folder, portable("lenet5").path, "--export-times", tmp_path / "times.json")

        assert outcome.code == 2

    def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(self, deploykit, engine, tmp_path):
        outcome = deploykit("benchmark", engine.folder, "--export-times", tmp_path / "nowhere" / "times.json")

        assert outcome.code == 2
        assert "choose another file with --export-times" in " ".join(outcome.err.split())
