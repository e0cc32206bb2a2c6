"""The whole path of TensorRT on a fake one: build, timing cache, load, run, profile, and what becomes of every call that fails.

The fake has the classes and signatures of real versions and is executed by ONNX Runtime (fake_tensorrt.py, fake_cuda.py);
contracts/test_tensorrt_bindings.py holds these signatures against NVIDIA's bindings.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import networks
import numpy as np
import onnx
import onnx.parser
import pytest
from fake_cuda import ILLEGAL_ADDRESS, INVALID_VALUE, OUT_OF_MEMORY, FakeCuda, Faults
from fake_tensorrt import World, installed
from test_bundle import RECIPE, tiny_run
from trt_bindings import VERSIONS

from deploykit import agent, artifact, build, engines, infer, recipe, runtimes
from deploykit.artifact import Artifact, Format, Precision, Preprocess, Samples, TensorSpec
from deploykit.bundle import pack
from deploykit.crosscheck import Said, pairing, sides, stress
from deploykit.errors import CapabilityError, DeploykitError, StageError, UsageError
from deploykit.jsonable import to_json
from deploykit.runtimes import cudart, onnxruntime, run

TINY = """
<ir_version: 8, opset_import: ["" : 19]>
tiny (float[batch, 3, 4, 4] image) => (float[batch, 2, 4, 4] logits)
<float[2, 3, 1, 1] w = {1, 2, 3, 4, 5, 6}>
{
    [conv] c = Conv(image, w)
    [relu] logits = Relu(c)
}
"""
IMAGES = np.linspace(-1, 1, 5 * 48, dtype=np.float32).reshape(5, 3, 4, 4)


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def gpu() -> Iterator[Callable[..., tuple[ModuleType, World]]]:
    """Our runtime on a fake TensorRT and a fake GPU; what is still taken at the end of a test is a leak."""
    opened = []

    def start(version: str = "10.3.0", *, cuda: FakeCuda | None = None, **world: Any) -> tuple[ModuleType, World]:
        made = World(version, cuda or FakeCuda(), **world)
        fake = installed(made)
        runtime = fake.__enter__()
        opened.append((fake, made))
        return runtime, made

    yield start
    for fake, _ in reversed(opened):
        fake.__exit__(None, None, None)
    for _, world in opened:
        assert world.cuda.left() == []
        assert world.crash is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Artifact:
    """One convolution and a Relu."""
    return written(TINY, tmp_path_factory.mktemp("tiny"))


def written(text: str, folder: Path, precision: Precision = Precision.FP32) -> Artifact:
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    inputs, outputs = (
        (TensorSpec("image", "float32", ("batch", 3, 4, 4)),),
        (TensorSpec("logits", "float32", ("batch", 2, 4, 4)),),
    )
    answers = onnxruntime.reference(folder / "model.onnx")
    expected = run(answers, {"image": IMAGES})
    Samples({"image": IMAGES}, expected, expected).save(folder / "samples.npz")
    kinds = (Format.ONNX, precision, inputs, outputs, Preprocess(None, (4, 4), (0.0,) * 3, (1.0,) * 3), ())
    return artifact.write_manifest(folder, Artifact(folder / "model.onnx", "export", "", *kinds, "", (), {}, {}, {}))


def engine_of(runtime: ModuleType, model: Artifact, folder: Path, **options: Any) -> Artifact:
    folder.mkdir(exist_ok=True)
    return runtime.build(model, folder, threads=1, options=runtime.Options(**options))


@pytest.mark.parametrize("version", VERSIONS)
class TestEveryVersion:
    def test_an_int8_engine_answers_like_its_graph_and_says_what_runs_in_int8(self, version, gpu, portable, tmp_path):
        model = networks.quantized(portable("residual"), "tensorrt", networks.made(tmp_path / "int8"))
        runtime, world = gpu(version)

        engine = build.build(model, "tensorrt", networks.made(tmp_path / "engine"))
        session = runtime.load(engine)
        images = networks.images(4)
        answer = run(session, {"image": images})["logits"]
        session.close()

        wanted = run(onnxruntime.reference(model.path), {"image": images})["logits"]
        assert np.abs(answer - wanted).max() <= 0.02 * np.abs(wanted).max()
        found = runtime.realised(engine, model)
        assert {layer.name for layer in found.layers if layer.precision == "int8"} == set(model.facts["int8_layers"])
        assert world.flags == set()
        assert engine.facts["place"]["tensorrt"] == engine.tools["tensorrt"] == version

    def test_an_engine_has_no_threads_to_set_so_that_parity_says_so_and_judges_nothing(self, version, gpu, tiny, tmp_path):
        runtime, _ = gpu(version)
        engine = artifact.write_manifest(tmp_path / "engine", engine_of(runtime, tiny, tmp_path / "engine"))
        side, _ = sides.open_sides((str(engine.folder),) * 2, Said(), tmp_path)
        pairs = pairing.pair(side, side, cast=False)

        row = stress._threads(side, side.open(0), pairs, [IMAGES])

        assert (row.verdict, row.reason) == (None, "means nothing: engine of tensorrt has no threads to set")
        assert stress.gates([row]) == []

    def test_every_option_is_taken(self, version, gpu, tiny, tmp_path):
        runtime, world = gpu(version, dla_cores=1)
        hardware = "ampere and newer" if version == "10.3.0" else "same compute capability"

        engine = engine_of(
            runtime,
            tiny,
            tmp_path / "engine",
            batch=(2, 2, 2),
            workspace_bytes=1 << 20,
            optimization_level=5,
            timing_cache=tmp_path / "timings",
            dla_core=0,
            version_compatible=True,
            hardware=hardware,
        )
        session = runtime.load(engine)
        run(session, {"image": IMAGES[:2]})
        session.close()

        assert {flag.name for flag in world.flags} == {"GPU_FALLBACK", "VERSION_COMPATIBLE"}
        assert engine.settings["hardware"] == hardware
        assert engine.settings["workspace_bytes"] == 1 << 20


class TestBuilding:
    def test_all_errors_of_the_parser_are_told(self, gpu, tmp_path, tiny):
        runtime, _ = gpu()
        graph = onnx.parser.parse_model(TINY)
        for name in ("first", "second"):
            node = onnx.helper.make_node("DynamicQuantizeLinear", ["c"], [f"{name}_q", f"{name}_s", f"{name}_z"], name=name)
            graph.graph.node.append(node)
        onnx.save(graph, tmp_path / "model.onnx")

        with pytest.raises(UsageError) as refused:
            engine_of(runtime, replace(tiny, path=tmp_path / "model.onnx"), tmp_path / "engine")

        assert [problem.split()[1] for problem in refused.value.problems] == ["first:", "second:"]
        assert "DynamicQuantizeLinear first: No importer registered for op (UNSUPPORTED_NODE)" in refused.value.problems
        assert "--rules tensorrt" in str(refused.value)

    def test_a_failed_build_quotes_tensorrts_own_errors(self, gpu, tiny, tmp_path):
        runtime, _ = gpu(memory_needed=1 << 30)

        with pytest.raises(StageError, match=r"(?s)could not build the engine.*Could not find any implementation for node conv"):
            engine_of(runtime, tiny, tmp_path / "engine", workspace_bytes=1 << 20)

    def test_the_workspace_is_a_quarter_of_the_free_memory(self, gpu, tiny, tmp_path):
        runtime, _ = gpu(cuda=FakeCuda(memory_bytes=4 << 30), memory_needed=1 << 30)

        assert engine_of(runtime, tiny, tmp_path / "engine").settings["workspace_bytes"] == 1 << 30

    @pytest.mark.parametrize("batch", [(0, 1, 1), (2, 1, 4), (1, 5, 4)])
    def test_a_profile_that_does_not_ascend_is_refused(self, gpu, batch):
        runtime, _ = gpu()

        with pytest.raises(UsageError, match="have to ascend from 1"):
            runtime.Options(batch=batch)

    def test_only_the_batch_may_be_dynamic(self, gpu, tiny, tmp_path):
        runtime, _ = gpu()
        model = replace(tiny, inputs=(TensorSpec("image", "float32", ("batch", 3, "height", 4)),))

        with pytest.raises(UsageError, match="only the batch may be dynamic"):
            engine_of(runtime, model, tmp_path / "engine")

    def test_its_progress_is_told_in_order_and_inner_phases_are_not(self, gpu, tiny, tmp_path):
        runtime, _ = gpu()
        told: list[tuple[str, int, int]] = []
        (tmp_path / "engine").mkdir()

        runtime.build(tiny, tmp_path / "engine", threads=1, progress=lambda *what: told.append(what))

        tactics = [(done, total) for what, done, total in told if what == "TensorRT: Timing tactics"]
        assert tactics == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 3)]
        assert {what for what, _, _ in told} == {"TensorRT: Building Engine", "TensorRT: Timing tactics"}

    def test_ctrl_c_ends_it_at_the_next_step(self, gpu, tiny, tmp_path):
        steps = []

        def on_step(step: int) -> None:
            steps.append(step)
            if step == 0:
                os.kill(os.getpid(), signal.SIGINT)
                assert cancelled.wait(10)

        cancelled = threading.Event()
        runtime, _ = gpu(on_step=on_step)
        before = runtime.builder.Monitor

        class Watched(before):  # type: ignore[misc, valid-type]
            def __init__(self, progress: Any, flag: threading.Event) -> None:
                super().__init__(progress, flag)
                setter = flag.set
                flag.set = lambda: (setter(), cancelled.set())  # type: ignore[assignment, func-returns-value]

        runtime.builder.Monitor = Watched

        # Programs that a shell has put in the background ignore Ctrl-C, and tests may be one.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                engine_of(runtime, tiny, tmp_path / "engine")
        finally:
            signal.signal(signal.SIGINT, handler)

        assert steps == [0]
        assert list((tmp_path / "engine").iterdir()) == []

    def test_what_shows_the_progress_may_fail_and_its_error_is_raised_when_tensorrt_has_ended(self, gpu, tiny, tmp_path):
        runtime, world = gpu()
        (tmp_path / "engine").mkdir()

        def progress(what: str, done: int, total: int) -> None:
            raise ZeroDivisionError(what)

        with pytest.raises(ZeroDivisionError):
            runtime.build(tiny, tmp_path / "engine", threads=1, progress=progress)
        assert world.crash is None

    def test_the_recipe_of_the_graph_says_how_it_is_built(self, gpu, tiny, tmp_path):
        runtime, world = gpu("10.9.0.34", dla_cores=2)
        asked = {
            "batch": [4],
            "workspace_mib": 7,
            "optimization_level": 1,
            "timing_cache": False,
            "dla_core": 1,
            "gpu_fallback": True,
            "version_compatible": True,
            "hardware": "same compute capability",
        }

        engine = runtime.build(replace(tiny, facts={"tensorrt": asked}), networks.made(tmp_path / "engine"), threads=0)

        assert engine.settings["batch"] == [4, 4, 4]
        assert engine.settings["workspace_bytes"] == 7 << 20
        assert engine.settings["optimization_level"] == 1
        assert "timing_cache" not in engine.facts
        assert {flag.name for flag in world.flags} == {"GPU_FALLBACK", "VERSION_COMPATIBLE"}

    def test_what_the_recipe_may_say_is_what_the_options_are_with_the_same_defaults(self, gpu):
        runtime, _ = gpu()
        declared = {item.name: getattr(recipe.TensorRtTable(), item.name) for item in fields(recipe.TensorRtTable)}
        model = SimpleNamespace(facts={"tensorrt": to_json(recipe.TensorRtTable())}, folder=Path("bundle"))

        found = runtime.Options.of(model)

        assert replace(found, timing_cache=None) == runtime.Options()
        assert found == runtime.Options.of(SimpleNamespace(facts={}, folder=Path("bundle")))
        renamed = {"workspace_bytes" if name == "workspace_mib" else name for name in declared}
        assert renamed == {item.name for item in fields(runtime.Options)}

    @pytest.mark.parametrize(
        "asked",
        [{"batch": [1, 2]}, {"batch": "all"}, {"dla_core": "0"}, {"workspace_mib": True}, {"hardware": "any"}, ["batch"], 7],
    )
    def test_a_strangers_manifest_that_says_something_else_is_refused(self, gpu, asked):
        runtime, _ = gpu()

        with pytest.raises(UsageError, match="has no options for TensorRT that can be used"):
            runtime.Options.of(SimpleNamespace(facts={"tensorrt": asked}, folder=Path("bundle")))


class TestTimingCache:
    @pytest.fixture
    def again(self, tiny, tmp_path) -> Callable[..., Any]:
        """Build with the cache in one folder; what the engine's facts say of it, and how many layers were timed."""

        def build_(gpu: Any, version: str = "10.3.0", cuda: FakeCuda | None = None) -> tuple[Any, int]:
            runtime, world = gpu(version, cuda=cuda)
            engine = engine_of(runtime, tiny, tmp_path / "engine", timing_cache=tmp_path / "timings")
            return engine.facts["timing_cache"], world.timed

        return build_

    def test_what_was_timed_once_is_not_timed_again(self, gpu, again):
        first, timed = again(gpu)
        second, timed_again = again(gpu)

        assert (first["began"], timed) == ("absent", 2)
        assert (second["began"], timed_again) == ("used", 0)

    def test_every_version_device_and_clock_has_a_file_of_its_own(self, gpu, again, tmp_path):
        again(gpu)
        again(gpu, "10.9.0.34")
        again(gpu, cuda=FakeCuda(name="Orin (nvgpu)", capability=(8, 7)))
        again(gpu, cuda=FakeCuda(name="NVIDIA H200", capability=(9, 0)))

        assert sorted(path.name for path in (tmp_path / "timings").iterdir()) == [
            "10.3.0_nvidia-h200_sm9.0_16x1300MHz.cache",
            "10.3.0_orin-nvgpu_sm8.7_16x1300MHz.cache",
            "10.3.0_orin_sm8.7_16x1300MHz.cache",
            "10.9.0.34_orin_sm8.7_16x1300MHz.cache",
        ]

    def test_a_damaged_one_starts_empty_and_is_replaced(self, gpu, again):
        first, _ = again(gpu)
        path = Path(first["path"])
        path.write_bytes(path.read_bytes()[:-3])

        assert again(gpu)[0]["began"] == "damaged"
        assert again(gpu) == ({**first, "began": "used"}, 0)

    def test_one_of_another_version_starts_empty(self, gpu, again, tmp_path):
        other, _ = again(gpu, "11.0.0.114")
        first, _ = again(gpu)
        Path(first["path"]).write_bytes(Path(other["path"]).read_bytes())

        assert again(gpu)[0]["began"] == "of another TensorRT version or device"

    def test_it_appears_whole_or_not_at_all(self, gpu, again, tmp_path, monkeypatch):
        first, _ = again(gpu)
        before = Path(first["path"]).read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        found, _ = again(gpu)

        assert found["not_saved"] == "No space left on device"
        assert [path.read_bytes() for path in (tmp_path / "timings").iterdir()] == [before]

    def test_by_default_it_is_with_the_users_other_caches(self, gpu, tiny, tmp_path):
        runtime, _ = gpu()
        (tmp_path / "engine").mkdir()

        engine = runtime.build(tiny, tmp_path / "engine", threads=0)

        assert Path(engine.facts["timing_cache"]["path"]).parent == tmp_path / "caches" / "deploykit" / "tensorrt"

    def test_without_a_folder_there_is_none(self, gpu, tiny, tmp_path):
        runtime, _ = gpu()

        assert "timing_cache" not in engine_of(runtime, tiny, tmp_path / "engine").facts
        assert not (tmp_path / "caches").exists()


class TestDla:
    def test_the_layers_that_fell_back_to_the_gpu_are_told(self, gpu, tiny, tmp_path):
        runtime, _ = gpu(dla_cores=2)

        engine = engine_of(runtime, tiny, tmp_path / "engine", dla_core=1, batch=(1, 1, 1))

        found = {"core": 1, "source": "build log", "dla": ["Conv: conv"], "gpu": ["Relu: relu"]}
        assert engine.facts["dla"] == found

    def test_the_engine_runs_on_the_core_that_it_was_built_for(self, gpu, tiny, tmp_path):
        runtime, world = gpu(dla_cores=2)
        engine = engine_of(runtime, tiny, tmp_path / "engine", dla_core=1, batch=(1, 1, 1))
        assert world.runs_on == 1
        world.runs_on = None

        runtime.load(engine).close()

        assert world.runs_on == 1

    @pytest.mark.parametrize(("version", "adjusted"), [("10.3.0", False), ("11.4.0.106", True)])
    def test_the_parser_adjusts_shapes_for_it_where_that_can_be_asked_for(self, gpu, tiny, tmp_path, version, adjusted):
        runtime, world = gpu(version, dla_cores=1)

        engine_of(runtime, tiny, tmp_path / "engine", dla_core=0, batch=(1, 1, 1))

        assert ("ADJUST_FOR_DLA" in world.parser_flags) == adjusted

    def test_without_fall_back_a_layer_that_it_cannot_run_fails_the_build(self, gpu, tiny, tmp_path):
        runtime, _ = gpu(dla_cores=1)

        with pytest.raises(StageError, match="GPU fallback is not enabled"):
            engine_of(runtime, tiny, tmp_path / "engine", dla_core=0, batch=(1, 1, 1), gpu_fallback=False)

    @pytest.mark.parametrize(("core", "cores"), [(0, 0), (2, 2), (-1, 2)])
    def test_a_core_that_is_not_there_is_an_error_that_says_which_boards_have_one(self, gpu, tiny, tmp_path, core, cores):
        runtime, _ = gpu(dla_cores=cores)

        with pytest.raises(CapabilityError, match=rf"finds {cores}. Xavier, Orin NX and AGX Orin have"):
            engine_of(runtime, tiny, tmp_path / "engine", dla_core=core, batch=(1, 1, 1))

    def test_it_runs_one_batch_size_only(self, gpu):
        runtime, _ = gpu()

        with pytest.raises(UsageError, match="a DLA core runs one size only"):
            runtime.Options(dla_core=0)


class TestLoading:
    def test_an_engine_is_refused_on_a_gpu_it_was_not_built_for(self, gpu, tiny, tmp_path):
        engine = engine_of(gpu()[0], tiny, tmp_path / "engine")
        runtime, world = gpu(cuda=FakeCuda(name="NVIDIA H200", capability=(9, 0)))

        with pytest.raises(UsageError) as refused:
            runtime.load(engine)

        assert "built for compute capability 8.7 (Orin, 16 SMs), TensorRT 10.3.0" in refused.value.why
        assert "here: compute capability 9.0 (NVIDIA H200, 16 SMs), TensorRT 10.3.0" in refused.value.why
        assert "Runtime()" not in world.cuda.faults.called  # TensorRT was not asked

    def test_what_has_to_be_built_again_is_told_without_touching_engine_or_gpu(self, gpu, tiny, tmp_path):
        engine = engine_of(gpu("10.3.0")[0], tiny, networks.made(tmp_path / "engine"))
        engine.path.unlink()
        assert runtimes.why_stale(engine) == []
        assert runtimes.preflight(engine) == "loads here"
        _, world = gpu("10.9.0.34", cuda=FakeCuda(name="NVIDIA H200", capability=(9, 0)))

        found = runtimes.why_stale(engine)

        assert found == ["an engine of TensorRT 10.3.0 does not run on 10.9.0.34", "the compute capability is another one"]
        assert runtimes.preflight(engine) == f"rebuild needed because {'; and '.join(found)}"
        assert {"cudaMalloc", "cudaStreamCreateWithFlags", "Runtime()"}.isdisjoint(world.cuda.faults.called)

    def test_its_manifest_tells_the_board_the_profile_and_the_graph(self, gpu, tiny, tmp_path, monkeypatch):
        runtime, _ = gpu()
        monkeypatch.setattr(runtime.board, "is_jetson", lambda *_: True)
        monkeypatch.setattr(runtime.board, "model", lambda *_: "NVIDIA Jetson Orin Nano")
        monkeypatch.setattr(runtime.board, "l4t", lambda *_: "36.4.3")
        monkeypatch.setattr(runtime.board, "current_mode", lambda *_: (2, "MAXN_SUPER"))

        engine = engine_of(runtime, tiny, networks.made(tmp_path / "engine"), batch=(1, 2, 4))

        told = {name: engine.facts["board"][name] for name in ("model", "l4t", "power_mode")}
        assert told == {"model": "NVIDIA Jetson Orin Nano", "l4t": "36.4.3", "power_mode": "MAXN_SUPER (2)"}
        assert engine.facts["profile"] == {"image": [[1, 3, 4, 4], [2, 3, 4, 4], [4, 3, 4, 4]]}
        assert engine.parents == (tiny.sha256,)
        assert (engine.settings["version_compatible"], engine.settings["hardware"]) == (False, "this")

    def test_an_engine_is_refused_by_another_version(self, gpu, tiny, tmp_path):
        engine = engine_of(gpu("10.3.0")[0], tiny, tmp_path / "engine")

        with pytest.raises(UsageError, match=r"an engine of TensorRT 10.3.0 does not run on 10.9.0.34"):
            gpu("10.9.0.34")[0].load(engine)

    def test_a_version_compatible_one_is_taken_by_a_later_version_and_not_by_an_earlier(self, gpu, tiny, tmp_path):
        engine = engine_of(gpu("10.9.0.34")[0], tiny, tmp_path / "engine", version_compatible=True)

        for version in ("10.13.3.9", "11.4.0.106"):
            gpu(version)[0].load(engine).close()
        with pytest.raises(UsageError, match=r"a version-compatible engine of TensorRT 10.9.0.34 does not run on 10.3.0"):
            gpu("10.3.0")[0].load(engine)

    def test_tensorrts_own_refusal_is_quoted(self, gpu, tiny, tmp_path):
        engine = engine_of(gpu()[0], tiny, tmp_path / "engine")
        runtime, _ = gpu(cuda=FakeCuda(capability=(8, 6)))
        device = {**engine.facts["place"]["device"], "compute_capability": [8, 6]}
        lied = replace(engine, facts={**engine.facts, "place": {**engine.facts["place"], "device": device}})

        with pytest.raises(
            StageError, match=r"(?s)does not load the engine.*expecting compute 8.6 got compute 8.7, please rebuild"
        ):
            runtime.load(lied)

    def test_a_damaged_plan_is_refused_in_tensorrts_words(self, gpu, tiny, tmp_path):
        runtime, _ = gpu()
        engine = engine_of(runtime, tiny, tmp_path / "engine")
        engine.path.write_bytes(b"PLAN" + b"\0" * 100)

        with pytest.raises(StageError, match="magicTag"):
            runtime.load(engine)

    def test_a_manifest_that_does_not_say_where_it_was_built_is_refused(self, gpu, tiny, tmp_path):
        runtime, _ = gpu()
        engine = engine_of(runtime, tiny, tmp_path / "engine")

        with pytest.raises(UsageError, match="does not say where it was built"):
            runtime.load(replace(engine, facts={"runtime": "tensorrt"}))


class TestOnADevice:
    def test_an_engine_that_an_update_of_jetpack_made_stale_is_built_again_when_that_is_asked_for(self, gpu, tmp_path, capsys):
        root, pixels = tmp_path / "device", np.ones((1, 2, 2), np.float32)
        text = RECIPE.replace('gate = ["latency <= 500 ms"]', "") + '[build]\nruntimes = ["tensorrt"]\n'
        bundle = pack.pack(tiny_run(tmp_path / "run", recipe=text), tmp_path / "net.bundle", release=1).path

        def device(verb: str, *words: object) -> dict[str, Any]:
            code = agent.run([verb, *map(str, words), "--root", str(root)])
            said: dict[str, Any] = json.loads(capsys.readouterr().out)
            assert code == 0, said
            return said

        gpu("10.3.0")
        id = device("install", bundle)["id"]
        for verb in ("build", "parity", "activate"):
            old = device(verb, id)["engine"]
        gpu("10.13.3.9")
        with pytest.raises(UsageError, match=r"(?s)rebuild needed because an engine of TensorRT 10.3.0 .*recover --rebuild"):
            infer.load(root / "current")

        (rebuilt,) = device("recover", "--rebuild")["rebuilt"]

        assert (rebuilt["left"], rebuilt["built"], rebuilt["activated"]) == (old, True, True)
        assert rebuilt["engine"] != old
        net = infer.load(root / "current")
        np.testing.assert_array_equal(net(pixels), 2 * pixels)
        net.close()

    def test_another_gpu_is_another_engine_even_where_no_tool_names_it(self, gpu):
        gpu(cuda=FakeCuda(name="Orin"))
        before = engines.machine_key("tensorrt")
        gpu(cuda=FakeCuda(name="Thor", capability=(11, 0)))

        assert engines.machine_key("tensorrt") != before


class TestSession:
    @pytest.fixture
    def opened(self, gpu, tiny, tmp_path) -> Callable[..., Any]:
        def open_(*, batch: tuple[int, int, int] = (1, 1, 4), **world: Any) -> tuple[Any, World]:
            runtime, made = gpu(**world)
            session = runtime.load(engine_of(runtime, tiny, tmp_path / "engine", batch=batch))
            sessions.append(session)
            return session, made

        sessions: list[Any] = []
        yield open_
        for session in sessions:
            session.close()

    def test_a_shape_outside_the_profile_is_refused_and_the_profile_is_quoted(self, opened):
        session, _ = opened(batch=(2, 2, 4))

        for size in (1, 5):
            with pytest.raises(UsageError) as refused:
                session.feed({"image": IMAGES[:size]})
            assert f"shape [{size}, 3, 4, 4]; the engine's profile is [2, 3, 4, 4] to [4, 3, 4, 4], best at [2, 3, 4, 4]" in str(
                refused.value
            )
        assert run(session, {"image": IMAGES[:3]})["logits"].shape == (3, 2, 4, 4)

    def test_from_the_second_execute_on_a_graph_is_launched(self, opened):
        session, world = opened()
        session.feed({"image": IMAGES[:2]})
        session.execute()
        enqueued = world.cuda.faults.called.count("IExecutionContext.execute_async_v3")

        session.execute()

        assert world.cuda.faults.called.count("IExecutionContext.execute_async_v3") == enqueued == 2  # the second was captured
        assert world.cuda.faults.called.count("cudaGraphLaunch") == 1

    def test_a_graph_runs_what_was_fed_last_and_is_captured_again_for_another_shape(self, opened, tiny):
        session, world = opened()
        reference = onnxruntime.reference(tiny.path)

        for size, offset in ((2, 0), (2, 1), (3, 0), (2, 2)):
            inputs = {"image": IMAGES[offset : offset + size]}
            for _ in range(2):
                wanted = run(reference, inputs)["logits"]
                assert run(session, inputs)["logits"] == pytest.approx(
                    wanted, rel=1e-6, abs=1e-6
                )  # other kernels than the reference's
        assert world.cuda.taken["executable graph"] == 3

    def test_an_engine_that_cannot_be_captured_runs_without_a_graph_and_says_why(self, opened):
        session, world = opened(refuses_capture=True)

        first = run(session, {"image": IMAGES[:2]})["logits"]
        second = run(session, {"image": IMAGES[:2]})["logits"]

        assert np.array_equal(first, second)
        assert "cannot be captured now" in session.graph_refused
        assert world.cuda.taken["executable graph"] == 0

    def test_the_copy_to_the_device_is_over_when_feed_returns(self, opened):
        session, world = opened()

        session.feed({"image": IMAGES[:2]})

        assert world.cuda.stream(session._stream).waiting == []  # else a benchmark would count it as part of the first execute

    def test_memory_is_taken_once(self, opened):
        session, world = opened()
        before = dict(world.cuda.taken)

        for size in (1, 4, 2):
            run(session, {"image": IMAGES[:size]})

        assert {kind: world.cuda.taken[kind] for kind in ("memory", "pinned", "stream")} == {
            kind: before[kind] for kind in ("memory", "pinned", "stream")
        }

    def test_close_gives_everything_back(self, gpu, tiny, tmp_path):
        runtime, world = gpu()
        session = runtime.load(engine_of(runtime, tiny, tmp_path / "engine"))
        run(session, {"image": IMAGES[:1]})
        assert world.cuda.left() == ["executable graph", "graph", "memory", "memory", "pinned", "pinned", "stream"]

        session.close()

        assert world.cuda.left() == []

    def test_the_time_on_the_gpu_is_that_between_two_events(self, opened):
        session, world = opened()
        session.feed({"image": IMAGES[:2]})

        assert session.gpu_times(3) == [500_000] * 3  # the fake's clock: a quarter of a millisecond for a kernel and for an event
        assert "event" not in world.cuda.left()

    def test_a_failure_of_a_kernel_is_told_by_the_execute_that_ran_it(self, opened):
        session, world = opened()
        session.feed({"image": IMAGES[:2]})
        context = session._context
        context._compute = lambda shapes: world.cuda.bytes_at(1, 1)

        with pytest.raises(
            StageError, match=r"cudaStreamSynchronize failed\n  why: cudaErrorIllegalAddress: an illegal memory access"
        ):
            session.execute()
        world.cuda.sticky = 0

    def test_too_little_memory_says_what_helps(self, gpu, tiny, tmp_path):
        runtime, _ = gpu(cuda=FakeCuda(memory_bytes=20 * 192))

        with pytest.raises(StageError, match=r"(?s)cudaMalloc failed.*out of memory.*try: use a smaller batch"):
            engine_of(runtime, tiny, tmp_path / "engine", batch=(1, 1, 30))


class TestProfiling:
    @pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
    def test_every_layer_has_a_time_and_the_node_it_came_from(self, gpu, tiny, tmp_path, version):
        runtime, world = gpu(version)
        engine = engine_of(runtime, tiny, tmp_path / "engine")

        found = runtime.profile(engine, tiny, {"image": IMAGES[:2]}, queries=3)

        assert [(kernel.name, kernel.op, kernel.source, kernel.ns) for kernel in found] == [
            ("conv", "Conv", "conv", 125_000),
            ("relu", "Relu", "relu", 125_000),
        ]
        assert "cudaGraphLaunch" not in world.cuda.faults.called


class TestInspector:
    LAYER: ClassVar = {
        "Name": "conv1 + relu1 [profile 1]",
        "LayerType": "CaskConvolution",
        "TacticName": "sm80_xmma_fprop_i8i8",
        "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
    }
    REFORMAT: ClassVar = {"Name": "Reformatting CopyNode for Input Tensor 0 to conv1", "LayerType": "Reformat"}

    def read(self, gpu: Any, *layers: dict[str, Any]) -> Any:
        return gpu()[0].inspector.read(json.dumps({"Layers": layers, "Bindings": ["image"]}))

    @pytest.mark.parametrize(
        ("written", "type_"),
        [
            ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
            ({"Format/Datatype": "Row major linear FP32"}, "fp32"),
            ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "fp16"),
            ({"Format/Datatype": "Row major linear BFloat16 format"}, "bf16"),
            ({"Format": "Row major linear", "Datatype": "Half"}, "fp16"),
            ({"Format": "Row major Int8 packed", "Datatype": "Float"}, "fp32"),
            ({"Format": "Channel major", "Datatype": "Int8"}, "int8"),
            ({"Format": "Row major linear", "Datatype": "FP8"}, "fp8"),
            ({}, "unknown"),
        ],
    )
    def test_reads_the_types_of_both_formats(self, gpu, written, type_):
        tensor = {"Name": "x", "Dimensions": [1, 3, 8, 8], **written}

        (layer,) = self.read(gpu, {**self.LAYER, "Inputs": [tensor], "Outputs": [tensor]})

        assert (layer.precision, layer.gives, layer.elements) == (type_, (type_,), 192)
        assert (layer.name, layer.nodes) == ("conv1 + relu1", ("conv1", "relu1"))

    def test_finds_nodes_in_names_where_there_is_no_metadata(self, gpu):
        (layer,) = self.read(gpu, {"Name": "a/Conv + PWN(b/Sigmoid) || c/Conv", "LayerType": "Convolution"})

        assert layer.nodes == ("a/Conv", "PWN(b/Sigmoid)", "c/Conv")

    def test_counts_reformats_as_boundaries_and_leaves_out_waiting(self, gpu, tiny):
        runtime, _ = gpu()
        integers = [{"Name": "x", "Format/Datatype": "Row major Int8 format"}]
        layers = self.read(
            gpu,
            self.REFORMAT,
            {**self.LAYER, "Inputs": integers},
            {"Name": "signal"},
            {"Name": "Wait"},
            {"Name": "x", "LayerType": "Scale"},
        )

        found = runtime.inspector.realised(layers, [], tiny)

        assert found.kernels == {"int8": {"CaskConvolution": 1}, "float": {"Scale": 1}, "boundary": {"Reformat": 1}}

    def test_a_layer_that_no_layer_of_the_engine_names_is_unknown(self, gpu, tiny):
        runtime, _ = gpu()
        nodes = runtime.read_nodes(tiny.path)

        (found,) = runtime.inspector.realised(self.read(gpu, self.REFORMAT), nodes[:1], tiny).layers

        assert (found.precision, found.why) == ("unknown", "no layer of the engine names it")

    @pytest.mark.parametrize(
        ("text", "said"), [('{"Layers": ["conv1"]}', "tells only names"), ("", "no list of layers"), ("[]", "no list")]
    )
    def test_says_when_it_does_not_tell_types(self, gpu, text, said):
        with pytest.raises(StageError, match=said):
            gpu()[0].inspector.read(text)


class TestWhyNot:
    def test_there_is_no_reason_where_there_is_all_that_is_needed(self, gpu):
        gpu()

        assert runtimes.why_not("tensorrt") == ""

    def test_no_gpu(self, gpu):
        gpu(cuda=FakeCuda(devices=0))

        why = runtimes.why_not("tensorrt")

        assert why == "the CUDA call cudaGetDeviceCount failed (cudaErrorNoDevice: no CUDA-capable device is detected (100))"

    def test_a_tensorrt_that_is_too_old(self, gpu):
        runtime, _ = gpu()
        runtime.trt.__version__ = "8.6.2"

        assert runtimes.why_not("tensorrt").startswith("TensorRT 8.6.2 is installed, and deploykit needs 10.3 or later")

    def test_no_tensorrt(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)

        why = runtimes.why_not("tensorrt")

        assert why.startswith("TensorRT's Python package does not load (")

    def test_a_cuda_runtime_that_lacks_a_function(self):
        with pytest.raises(CapabilityError, match="it has no cudaGraphInstantiateWithFlags"):
            cudart.Cuda(FakeCuda(missing=("cudaGraphInstantiateWithFlags",)))


class TestCudart:
    def test_a_jetson_tells_the_clock_of_its_power_mode(self, tmp_path):
        node = tmp_path / "17000000.ga10b"
        node.mkdir()
        (node / "max_freq").write_text("612000000\n")

        assert cudart.Cuda(FakeCuda()).device(tmp_path).clock_khz == 612_000
        assert cudart.Cuda(FakeCuda()).device(tmp_path / "none").clock_khz == 1_300_000

    def test_a_device_is_what_an_engine_depends_on(self, tmp_path):
        assert cudart.Cuda(FakeCuda()).device(tmp_path) == cudart.Device("Orin", (8, 7), 16, 1_300_000)

    def test_bytes_come_back_as_they_went(self):
        library = FakeCuda()
        cuda = cudart.Cuda(library)

        with cuda.stream() as stream, cuda.memory(4) as address, cuda.pinned(4) as host:
            host[:] = [1, 2, 3, 4]
            cuda.to_device(address, host, stream)
            cuda.synchronize(stream)
            host[:] = 0
            cuda.to_host(host, address, stream)
            assert host.tolist() == [0] * 4  # not waited for
            cuda.synchronize(stream)
            assert host.tolist() == [1, 2, 3, 4]
        assert library.left() == []

    def test_what_is_enqueued_may_fail_and_the_stream_is_usable_again(self):
        library = FakeCuda()
        cuda = cudart.Cuda(library)

        def fails() -> None:
            raise ZeroDivisionError

        with cuda.stream() as stream:
            with pytest.raises(ZeroDivisionError), cuda.graph(stream, fails):
                pass
            cuda.synchronize(stream)
        assert library.left() == []


class TestFaults:
    """Every call of TensorRT and of CUDA fails once, in a whole life of an engine."""

    @staticmethod
    def life(runtime: ModuleType, model: Artifact, folder: Path) -> str:
        """Build, load, run in two shapes, time, profile; why there is no CUDA graph, if there is none."""
        engine = engine_of(runtime, model, folder, timing_cache=folder / "timings", dla_core=None)
        session = runtime.load(engine)
        try:
            for size in (2, 3):
                for _ in range(2):
                    run(session, {"image": IMAGES[:size]})
            session.gpu_times(2)
        finally:
            session.close()
        runtime.profile(engine, model, {"image": IMAGES[:1]}, queries=1)
        return session.graph_refused

    def test_each_ends_in_a_clear_error_and_everything_is_given_back(self, gpu, tiny, tmp_path, capsys):
        runtime, world = gpu()
        assert self.life(runtime, tiny, tmp_path / "clean") == ""
        calls = list(world.cuda.faults.called)
        silent = []
        for number, call in enumerate(calls):
            world.cuda = FakeCuda(Faults(at=number, code=OUT_OF_MEMORY if "lloc" in call else INVALID_VALUE))
            said = self.one(runtime, tiny, tmp_path / str(number))
            assert world.cuda.left() == [], (number, call)
            assert world.crash is None, (number, call)
            if not said:
                silent.append(call)

        assert silent == []
        assert len(calls) > 150
        with capsys.disabled():
            sys.stdout.write(f"\n{len(calls)} calls of a life failed once each, {len(set(calls))} different ones\n")

    def test_so_does_a_gpu_that_fails_and_does_not_recover(self, gpu, tiny, tmp_path):
        runtime, world = gpu()
        self.life(runtime, tiny, tmp_path / "clean")
        calls = [(number, call) for number, call in enumerate(world.cuda.faults.called) if call.startswith("cuda")]
        for number, call in calls:
            world.cuda = FakeCuda(Faults(at=number, code=ILLEGAL_ADDRESS, lasts=True))

            with pytest.raises(StageError, match="cudaErrorIllegalAddress: an illegal memory access was encountered"):
                self.life(runtime, tiny, tmp_path / str(number))
            assert world.cuda.left() == [], (number, call)

    def one(self, runtime: ModuleType, model: Artifact, folder: Path) -> str:
        """What a life with a fault says: its error, or why there is no graph."""
        try:
            return self.life(runtime, model, folder)
        except DeploykitError as error:
            return f"{error.what}: {error.why}{error.problems}" if error.why or error.problems else ""
