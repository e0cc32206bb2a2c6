"""What a run makes, what it does again and what it does not, how it ends, and what is left when it is killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from deploykit import artifact, bundle, data, pipeline, publish
from deploykit import recipe as recipes
from deploykit.errors import UsageError
from deploykit.recipe import QuantizeTable, Recipe

QUICK = ["--processes", "2", "--set", "benchmark.queries=3", "--set", "benchmark.offline_seconds=0"]
SLOW_TOO = ["--set", "quantize.speed=false"]  # networks so small are faster in float
# Stage: the stages that read its files.
READERS = {
    "finetune": {"export-onnx", "export-torchscript", "parity"},
    "export-onnx": {"equalize", "build-onnxruntime-fp32", "parity"},
    "export-torchscript": {"parity"},
    "equalize": {"calibrate", "quantize-onnxruntime"},
    "calibrate": {"quantize-onnxruntime"},
    "quantize-onnxruntime": {"build-onnxruntime-int8"},
    "build-onnxruntime-fp32": {"parity", "benchmark"},
    "build-onnxruntime-int8": {"parity", "benchmark"},
    "parity": set(),
    "benchmark": set(),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, network: str, photos: Path) -> Path:
    """A finished run of the tiny network, quicker to do again than one on the digits."""
    content = {
        "name": "tiny",
        "model": {"name": network},
        "data": {"calibrate": str(photos)},
        "export": {"formats": ["onnx", "torchscript"]},
        "quantize": {"speed": False},
        "benchmark": {"processes": 2, "queries": 3, "offline_seconds": 0.0},
    }
    folder = tmp_path_factory.mktemp("exported") / "run"
    pipeline.run(recipes.parse(content, base=Path("/"), source="a test"), folder)
    return folder


def run_again(folder: Path) -> dict[str, str]:
    """Run the recipe that lies in `folder` once more; stage -> done or skipped."""
    found = pipeline.run(recipes.load(folder / "recipe.toml"), folder)
    return {stage["name"]: stage["status"] for stage in found["stages"]}


def downstream(stage: str) -> set[str]:
    """All stages that depend on this one, itself included."""
    return {stage}.union(*(downstream(reader) for reader in READERS[stage]))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in publish.leftovers(folder)]


def stages_on_disk(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/manifest.json") if not path.parent.name.endswith(publish.UNFINISHED))


def eventually(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class TestAWholeRun:
    def test_every_stage_leaves_an_artifact_with_a_manifest(self, finished):
        assert finished.outcome.code == 0, finished.outcome.err

        assert {path.name for path in stages_on_disk(finished.folder)} == set(READERS)
        for folder in stages_on_disk(finished.folder):
            assert artifact.read_artifact(folder).path.is_file()

    def test_recipe_result_and_report_lie_beside_the_artifacts_and_nothing_else(self, finished):
        files = {path.name for path in finished.folder.iterdir() if path.is_file()}

        assert files == {"recipe.toml", "result.json", "report.html", ".lock"}
        assert "<html" in (finished.folder / "report.html").read_text()

    def test_json_prints_exactly_the_result_and_nothing_else(self, finished):
        assert json.loads(finished.outcome.out) == json.loads((finished.folder / "result.json").read_text())
        assert finished.outcome.out.count("\n") == 1
        assert finished.outcome.err == ""

    def test_each_stage_reports_what_it_did(self, finished):
        result = json.loads(finished.outcome.out)

        assert [stage["name"] for stage in result["stages"]] == list(READERS)
        assert {stage["status"] for stage in result["stages"]} == {"done"}
        assert all(stage["summary"] and stage["seconds"] >= 0 for stage in result["stages"])

    def test_a_second_run_skips_every_stage_and_finds_the_same(self, finished, tmp_path, shell):
        folder = finished.copied_to(tmp_path / "run")
        first = json.loads(finished.outcome.out)

        second = json.loads(shell("run", folder / "recipe.toml", "--output", folder, "--json").out)

        assert {stage["status"] for stage in second["stages"]} == {"skipped"}
        for key in first.keys() - {"stages", "command", "out", "report"}:
            assert second[key] == first[key], key

    def test_a_finished_run_is_recognised_without_loading_torch(self, finished, tmp_path):
        folder = finished.copied_to(tmp_path / "run")
        program = (
            "import sys; from pathlib import Path; from deploykit import pipeline, recipe\n"
            f"folder = Path({str(folder)!r}); pipeline.run(recipe.load(folder / 'recipe.toml'), folder)\n"
            "sys.exit('torch' in sys.modules)"
        )

        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

    @pytest.mark.parametrize("stage", sorted(READERS.keys() - {"finetune"}))
    def test_one_changed_byte_makes_that_stage_again_and_no_stage_that_does_not_depend_on_it(self, exported, tmp_path, stage):
        folder = shutil.copytree(exported, tmp_path / "run")
        flip_last_byte(artifact.read_artifact(folder / stage).path)

        statuses = run_again(folder)

        assert statuses[stage] == "done"
        assert {name for name, status in statuses.items() if status == "done"} <= downstream(stage)
        assert artifact.read_artifact(folder / stage)

    @pytest.mark.parametrize("stage", ["finetune", "calibrate"])
    def test_a_stage_whose_folder_is_gone_is_made_again_with_the_same_bytes(self, finished, tmp_path, stage):
        folder = finished.copied_to(tmp_path / "run")
        before = artifact.read_artifact(folder / stage).sha256
        shutil.rmtree(folder / stage)

        statuses = run_again(folder)

        assert artifact.read_artifact(folder / stage).sha256 == before
        assert [name for name, status in statuses.items() if status == "done"] == [stage]

    def test_a_file_beside_the_main_one_counts_as_much(self, exported, tmp_path):
        folder = shutil.copytree(exported, tmp_path / "run")
        flip_last_byte(folder / "export-torchscript" / "samples.npz")

        assert run_again(folder)["export-torchscript"] == "done"

    def test_an_artifact_of_other_settings_is_not_taken_for_this_ones(self, exported, tmp_path):
        folder = shutil.copytree(exported, tmp_path / "run")
        (folder / "recipe.toml").write_text((folder / "recipe.toml").read_text().replace('"mse"', '"percentile"'))

        statuses = run_again(folder)

        done = {name for name, status in statuses.items() if status == "done"}
        assert done == {"quantize-onnxruntime", "build-onnxruntime-int8", "parity", "benchmark"}

    def test_progress_counts_every_piece_of_long_work_to_its_end(self, exported, tmp_path):
        folder = shutil.copytree(exported, tmp_path / "run")
        for stage in ("calibrate", "parity", "benchmark"):
            shutil.rmtree(folder / stage)
        seen: dict[str, tuple[int, int]] = {}

        pipeline.run(
            recipes.load(folder / "recipe.toml"), folder, progress=lambda what, done, total: seen.update({what: (done, total)})
        )

        assert {"parity: PyTorch", "parity: onnxruntime int8", "benchmark"} <= set(seen)
        assert all(done == total for done, total in seen.values())


class TestTheRecipeBesideTheResult:
    def test_it_asks_for_the_same_from_any_directory(self, tmp_path, monkeypatch, network, photos, deploykit):
        (tmp_path / "work" / "pictures").mkdir(parents=True)
        for path in photos.iterdir():
            shutil.copy(path, tmp_path / "work" / "pictures")
        shutil.copy(network.rpartition(":")[0], tmp_path / "work" / "net.py")
        monkeypatch.chdir(tmp_path / "work")
        words = ["net.py:build", "--to", "tensorrt", "--int8", "--calibrate", "pictures", "--engine", "skip", "--output", "out"]
        assert deploykit("export", *words).code == 0

        monkeypatch.chdir("/")
        again = deploykit("run", tmp_path / "work" / "out" / "recipe.toml", "--output", tmp_path / "work" / "out", "--json")

        assert again.code == 0
        assert {stage["status"] for stage in json.loads(again.out)["stages"]} <= {"skipped", "not built"}

    def test_it_is_the_recipe_that_was_run_with_every_default_written_out(self, finished, tiny_recipe):
        assert recipes.load(finished.folder / "recipe.toml") == recipes.load(tiny_recipe)
        assert "offline_batches = [\n    8,\n]" in (finished.folder / "recipe.toml").read_text()


class TestGates:
    """The last stages of the finished run, judged by other rules."""

    @pytest.fixture
    def judged(self, finished, tmp_path, deploykit):
        def run(gate: str, *words: str, percentile: float | None = None):
            folder = finished.copied_to(tmp_path / "run")
            table = QuantizeTable(speed=False)
            if percentile is not None:
                table = replace(table, method="percentile", percentile=percentile, most_float_percent=0.0)
            recipe = replace(recipes.load(folder / "recipe.toml"), gate=(gate,), quantize=table)
            # Beside the finished stages, so that only those run again that the change reaches.
            (folder / "recipe.toml").write_text(recipes.dump(recipe))
            return deploykit("run", folder / "recipe.toml", "--output", folder, *words)

        return run

    def test_one_that_fails_ends_with_3_and_says_what_was_observed(self, judged):
        outcome = judged("agreement >= 100 %", "--json", percentile=90.0)

        result = json.loads(outcome.out)
        gate = next(gate for gate in result["gates"] if "agreement" in gate["rule"])
        assert outcome.code == result["exit_code"] == 3
        assert (result["verdict"], gate["verdict"]) == ("fail", "fail")
        assert "95 % interval" in gate["reason"]

    def test_one_that_so_few_images_cannot_decide_ends_with_5_and_says_how_many_would(self, judged):
        outcome = judged("drop <= 0.1 points")

        assert outcome.code == 5
        assert "cannot tell" in outcome.out
        assert "images would decide it" in " ".join(outcome.out.split()) or "no number of images decides it" in outcome.out

    def test_the_result_and_the_report_of_a_failed_gate_are_there(self, judged, tmp_path):
        assert judged("agreement >= 100 %", percentile=90.0).code == 3

        assert json.loads((tmp_path / "run" / "result.json").read_text())["verdict"] == "fail"
        assert "FAIL" in (tmp_path / "run" / "report.html").read_text().upper()


class TestExport:
    def test_onnx_alone_makes_no_engine(self, network, tmp_path, deploykit):
        outcome = deploykit("export", network, "--to", "onnx", "--output", tmp_path / "out", "--json")

        result = json.loads(outcome.out)
        assert outcome.code == 0
        assert [stage["name"] for stage in result["stages"]] == ["export-onnx", "parity"]
        assert (result["engines"], result["benchmark"], result["calibration"]) == ([], None, None)
        assert result["evaluated_on"]["origin"] == "noise"

    def test_torchscript_alone_writes_no_onnx(self, network, tmp_path, deploykit):
        outcome = deploykit("export", network, "--to", "torchscript", "--output", tmp_path / "out", "--json")

        assert outcome.code == 0
        assert [found["path"] for found in json.loads(outcome.out)["exports"]] == ["export-torchscript/model.pt"]
        assert not list((tmp_path / "out").rglob("*.onnx"))

    def test_a_fixed_batch_is_in_the_graph_and_images_that_do_not_fill_it_count_as_often_as_all_others(
        self, network, photos, tmp_path, deploykit, exported
    ):
        words = [
            "--batch",
            "5",
            "--to",
            "onnxruntime",
            "--int8",
            "--calibrate",
            photos,
            *QUICK,
            *SLOW_TOO,
            "--output",
            tmp_path / "out",
        ]

        outcome = deploykit("export", network, *words, "--json")

        assert outcome.code == 0, outcome.err
        graph = onnx.load(tmp_path / "out" / "export-onnx" / "model.onnx").graph
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 5
        assert {case["images"] for case in json.loads(outcome.out)["parity"]} == {12}
        counted = [np.load(run / "calibrate" / "observations.npz")["counts"].sum(axis=1) for run in (tmp_path / "out", exported)]
        assert np.array_equal(*counted)

    def test_without_tensorrt_the_portable_half_is_made_and_the_result_says_why_there_is_no_engine(
        self, network, photos, tmp_path, deploykit
    ):
        words = ["--to", "tensorrt", "--int8", "--calibrate", photos, "--target", "orin-nano", "--output", tmp_path / "out"]

        outcome = deploykit("export", network, *words)

        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert outcome.code == 0
        assert (tmp_path / "out" / "quantize-tensorrt" / "model.onnx").is_file()
        assert [engine["built"] for engine in result["engines"]] == [False, False]
        assert "trtexec --onnx=quantize-tensorrt/model.onnx --stronglyTyped" in " ".join(outcome.out.split())
        assert "whether TensorRT takes the graph" in result["device"]["text"]
        assert "needs JetPack 6.1 (TensorRT 10.3.0, Python 3.10) or JetPack 7.2" in result["device"]["text"]
        assert set(result["device"]["lint"]) == {"export-onnx", "quantize-tensorrt"}
        packed = bundle.check(Path(result["device"]["bundle"]))
        assert packed.is_whole
        assert list(packed.manifest.models) == ["tensorrt-int8"]
        assert (tmp_path / "out" / "device.pyz").read_bytes()[:2] == b"#!"
        assert [line.split()[2] for line in result["device"]["commands"][1:]] == ["install", "build", "parity", "activate"]
        assert all(engine["why"] in " ".join(outcome.out.split()) for engine in result["engines"])

    def test_int8_and_fp16_together_type_the_rest_of_the_graph_in_half_precision(self, network, photos, tmp_path, deploykit):
        words = ["--to", "tensorrt", "--int8", "--fp16", "--calibrate", photos, "--output", tmp_path / "out"]

        outcome = deploykit("export", network, *words)

        assert outcome.code == 0, outcome.err
        graph = onnx.load(tmp_path / "out" / "quantize-tensorrt-fp16" / "model.onnx").graph
        types = {tensor.data_type for tensor in graph.initializer}
        assert onnx.TensorProto.FLOAT16 in types
        assert "QuantizeLinear" in {node.op_type for node in graph.node}

    def test_a_board_that_cannot_run_it_is_refused_before_any_work(self, network, photos, tmp_path, deploykit):
        words = ["--to", "tensorrt", "--int8", "--calibrate", photos, "--target", "xavier-nx", "--output", tmp_path / "out"]

        outcome = deploykit("export", network, *words)

        assert outcome.code == 4
        assert "has TensorRT 8.5.2" in outcome.err
        assert not (tmp_path / "out").exists()

    def test_a_required_engine_that_cannot_be_built_here_ends_with_4_before_any_work(self, network, photos, tmp_path, deploykit):
        words = ["--to", "tensorrt", "--int8", "--calibrate", photos, "--engine", "require", "--output", tmp_path / "out"]

        outcome = deploykit("export", network, *words)

        assert outcome.code == 4
        assert "a tensorrt engine is required and cannot be built here" in outcome.err
        assert "--engine auto" in outcome.err
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_random_weights_are_marked_in_every_report(self, photos, tmp_path, shell):
        words = ["--weights", "none", "--to", "onnxruntime", "--int8", "--calibrate", photos, *QUICK, *SLOW_TOO]

        outcome = shell("export", "cifar_resnet20", *words, cwd=tmp_path)

        assert outcome.code == 0, outcome.err
        folder = tmp_path / "runs" / "cifar_resnet20"
        assert json.loads((folder / "result.json").read_text())["model"]["random"] is True
        assert "RANDOM WEIGHTS" in outcome.out
        assert "random weights" in (folder / "report.html").read_text().lower()

    def test_decisions_of_random_weights_cannot_be_gated(self, labelled, tmp_path, deploykit):
        words = ["--weights", "none", "--to", "onnxruntime", "--int8", "--calibrate", labelled, "--validate", labelled]

        outcome = deploykit("export", "cifar_resnet20", *words, "--gate", "1", "--output", tmp_path / "out")

        assert outcome.code == 2
        assert 'random weights (model.weights = "none") decide nothing' in outcome.err
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_is_judged_on_labelled_photographs(self, trained, tmp_path, deploykit):
        pictures = data.digits(0).test
        for index in range(80):
            folder = tmp_path / ("digits" if index < 40 else "others") / pictures.classes[index % 10]
            folder.mkdir(parents=True, exist_ok=True)
            of_class = np.flatnonzero(pictures.labels == index % 10)
            Image.fromarray(pictures.sources[of_class[index // 10]]).save(folder / f"{index}.png")
        words = ["--weights", trained, "--to", "onnxruntime", "--int8", "--calibrate", tmp_path / "others", *QUICK, *SLOW_TOO]

        outcome = deploykit(
            "export", "lenet5", *words, "--validate", tmp_path / "digits", "--gate", "100", "--output", tmp_path / "out", "--json"
        )

        result = json.loads(outcome.out)
        assert outcome.code == 0, outcome.err
        assert result["evaluated_on"] == {"origin": str(tmp_path / "digits"), "images": 40, "labelled": True}
        assert all(case["accuracy"]["reference"] > 0.3 for case in result["parity"])
        assert "drop <= 100 points" in str(result["gates"])


class TestClean:
    def test_what_killed_runs_left_is_removed_and_the_run_is_kept(self, finished, tmp_path, deploykit):
        folder = finished.copied_to(tmp_path / "run")
        (folder / "parity.partial").mkdir()
        (folder / "parity.partial" / "parity.json").touch()
        (folder / "export-onnx.stale").mkdir()
        (folder / "result.json.partial").touch()

        outcome = deploykit("clean", folder, "--json")

        assert outcome.code == 0
        names = [Path(path).name for path in json.loads(outcome.out)["removed"]]
        assert names == ["export-onnx.stale", "parity.partial", "result.json.partial"]
        assert set(run_again(folder).values()) == {"skipped"}

    def test_there_may_be_nothing_to_remove(self, finished, tmp_path, deploykit):
        assert deploykit("clean", finished.copied_to(tmp_path / "run")).out == "nothing to remove\n"

    def test_all_removes_the_whole_run(self, finished, tmp_path, deploykit):
        folder = finished.copied_to(tmp_path / "run")

        assert deploykit("clean", "--all", folder).out == f"removed {folder}\n"
        assert not folder.exists()

    @pytest.mark.parametrize("words", [[], ["--all"]])
    def test_a_folder_that_no_run_wrote_is_refused_and_keeps_everything(self, tmp_path, deploykit, words):
        (tmp_path / "recipe.toml").write_text("name = 'the user wrote this'")
        (tmp_path / "thesis.txt").touch()

        outcome = deploykit("clean", *words, tmp_path)

        assert outcome.code == 2
        assert "is not the output folder of a run" in outcome.err
        assert {path.name for path in tmp_path.iterdir()} == {"recipe.toml", "thesis.txt"}

    def test_a_run_that_somebody_put_files_into_is_not_removed(self, finished, tmp_path, deploykit):
        folder = finished.copied_to(tmp_path / "run")
        (folder / "notes.txt").touch()

        outcome = deploykit("clean", "--all", folder)

        assert outcome.code == 2
        assert "holds more than a run" in outcome.err
        assert "notes.txt" in outcome.err
        assert (folder / "notes.txt").exists()

    def test_a_folder_that_does_not_exist_is_refused_and_not_made(self, tmp_path, deploykit):
        assert deploykit("clean", tmp_path / "nowhere").code == 2
        assert not (tmp_path / "nowhere").exists()


class TestInterruption:
    @pytest.fixture
    def endless(self, tiny_recipe, tmp_path):
        """A run that is fine-tuning for hours, in a process of its own."""
        words = ["run", tiny_recipe, "--set", "finetune.epochs=10000", "--output", tmp_path / "out"]
        command = [sys.executable, "-m", "deploykit", *words]
        # A shell has programs in the background ignore SIGINT, and their children inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            signal.signal(signal.SIGINT, before)
            yield process
            process.kill()

    @pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_ends_the_run_with_the_shells_code_and_leaves_nothing_half_written(self, endless, tmp_path, sent, code):
        eventually((tmp_path / "out" / "finetune.partial").exists)
        time.sleep(0.2)

        endless.send_signal(sent)

        out, err = endless.communicate(timeout=60)
        assert endless.returncode == code
        assert (out, b"Traceback" in err) == (b"", False)
        assert unfinished(tmp_path / "out") == []

    def test_a_second_run_in_the_same_folder_is_refused_with_the_process_that_has_it(
        self, endless, tiny_recipe, tmp_path, deploykit
    ):
        lock = tmp_path / "out" / ".lock"
        eventually(lambda: lock.is_file() and lock.read_text())

        second = deploykit("run", tiny_recipe, "--output", tmp_path / "out")
        clean = deploykit("clean", "--all", tmp_path / "out")

        assert (second.code, clean.code) == (2, 2)
        assert f"in use by another run (pid {endless.pid})" in second.err
        assert endless.poll() is None
        assert lock.exists()

    @pytest.mark.slow
    def test_a_killed_run_leaves_nothing_that_looks_finished_and_goes_on_where_it_stopped(self, network, photos, tmp_path, shell):
        moments = random.Random(7)
        words = [
            "export",
            network,
            "--to",
            "onnxruntime",
            "--int8",
            "--calibrate",
            photos,
            *QUICK,
            *SLOW_TOO,
            "--output",
            tmp_path / "out",
        ]
        command, recognised = [sys.executable, "-m", "deploykit", *words], 0

        for _ in range(4):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.uniform(0.3, 6))
            process.kill()
            process.wait()
            for folder in stages_on_disk(tmp_path / "out"):
                assert artifact.read_artifact(folder)
            assert len(stages_on_disk(tmp_path / "out")) >= recognised
            recognised = len(stages_on_disk(tmp_path / "out"))
        outcome = shell(*words, "--json")

        assert outcome.code == 0, outcome.err
        statuses = [stage["status"] for stage in json.loads(outcome.out)["stages"]]
        assert statuses == ["skipped"] * recognised + ["done"] * (len(statuses) - recognised)
        assert unfinished(tmp_path / "out") == []

    @pytest.mark.parametrize("stage", ["export-onnx", "quantize-onnxruntime", "benchmark"])
    def test_a_stage_that_was_killed_while_writing_is_made_again(self, exported, tmp_path, stage):
        folder = shutil.copytree(exported, tmp_path / "run")
        (folder / stage).rename(folder / f"{stage}.partial")
        (folder / f"{stage}.partial" / "manifest.json").unlink()

        statuses = run_again(folder)

        assert statuses[stage] == "done"
        assert unfinished(folder) == []


class TestTheOutputFolder:
    """Whose it is."""

    @pytest.fixture
    def recipe(self, network) -> Recipe:
        content = {"name": "tiny", "model": {"name": network}, "build": {"runtimes": []}}
        return recipes.parse(content, base=Path("/"), source="a test")

    def test_another_recipe_is_refused_with_what_differs(self, finished, tmp_path, recipe):
        folder = finished.copied_to(tmp_path / "run")

        with pytest.raises(UsageError, match=r"belongs to another recipe(.|\n)*gate(.|\n)*clean --all"):
            pipeline.run(recipe, folder)
        assert set(run_again(folder).values()) == {"skipped"}

    def test_a_folder_with_other_files_is_refused_and_they_are_named(self, tmp_path, recipe):
        (tmp_path / "thesis.txt").touch()

        with pytest.raises(UsageError, match=r"not empty and not of a run(.|\n)*thesis\.txt"):
            pipeline.run(recipe, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.txt"]

    def test_a_recipe_that_a_user_wrote_there_is_not_overwritten(self, tmp_path, recipe):
        (tmp_path / "recipe.toml").write_bytes(b"# the user's own \xff")

        with pytest.raises(UsageError, match="belongs to another recipe"):
            pipeline.run(recipe, tmp_path)
        assert (tmp_path / "recipe.toml").read_bytes() == b"# the user's own \xff"

    def test_a_run_that_was_refused_before_its_first_stage_does_not_keep_the_folder(self, network, tmp_path, deploykit):
        words = ["--to", "onnx", "--output", tmp_path / "out"]
        assert deploykit("export", network, "--weights", tmp_path / "mistyped.pth", *words).code == 2

        assert deploykit("export", network, *words).code == 0
