"""Engines on a GPU without TensorRT, by ONNX Runtime's CUDA provider and by TorchScript: what is refused, graphs, events, memory.

The GPU is a fake one in both; tests/contracts/test_gpu_bindings.py holds the calls against the real libraries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_onnxruntime
import fake_torch_cuda
import networks
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from fake_cuda import FakeCuda

from deploykit import build, export, pipeline, recipe, runtimes, timing
from deploykit.artifact import Artifact, Precision, read_artifact, write_manifest
from deploykit.benchmark import process
from deploykit.benchmark.report import Measured, Process
from deploykit.bundle import pack
from deploykit.crosscheck.sides import Said, open_sides
from deploykit.errors import CapabilityError, DeploykitError, StageError, UsageError
from deploykit.quantize import half
from deploykit.recipe import ExportTable
from deploykit.report import speed, text
from deploykit.runtimes import cudart, on_gpu, run, torchscript_cuda

IMAGES = networks.images(8)
DIGITS = np.random.default_rng(0).random((8, *networks.model("lenet5").preprocess.shape), np.float32)


def engine_of(runtime: str, model: Artifact, folder: Path, precision: Precision = Precision.FP32) -> Artifact:
    """An engine on the disk, as a run has it."""
    folder.mkdir(exist_ok=True, parents=True)
    write_manifest(folder, build.build(replace(model, precision=precision), runtime, folder))
    return read_artifact(folder)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Artifact:
    settings = ExportTable(formats=("torchscript",))
    folder = tmp_path_factory.mktemp("script")
    return write_manifest(folder, export.torchscript_model(networks.model("lenet5"), DIGITS, None, settings, folder))


@pytest.fixture
def ort() -> Iterator[Callable[..., Any]]:
    """ONNX Runtime on a fake GPU, as `World` describes it."""
    with ExitStack() as installed:

        def install(**told: Any) -> tuple[Any, fake_onnxruntime.World]:
            world = fake_onnxruntime.World(**told)
            return installed.enter_context(fake_onnxruntime.installed(world)), world

        yield install


@pytest.fixture
def gpu() -> Iterator[tuple[Any, fake_torch_cuda.World]]:
    """TorchScript on a fake GPU."""
    world = fake_torch_cuda.World()
    with fake_torch_cuda.installed(world) as runtime:
        yield runtime, world


class TestTheRegistry:
    def test_what_a_recipe_may_ask_for_is_said_of_every_runtime_that_builds(self):
        assert set(recipe.OFFERS) == {name for name, entry in runtimes.REGISTRY.items() if entry.builds}
        for name, offer in recipe.OFFERS.items():
            entry = runtimes.REGISTRY[name]
            assert bool(offer.no_int8) == (entry.rules is None)
            assert "-" not in name
            assert offer.no_other or len(offer.floats) == 4

    def test_int8_is_refused_with_the_reason_of_each(self, script, portable, ort, gpu):
        runtime, _ = ort()
        with pytest.raises(UsageError, match="onnxruntime_cuda has no INT8: its CUDA kernels compute in float between Q and DQ"):
            runtimes.rules("onnxruntime_cuda")
        with pytest.raises(UsageError, match="torchscript_cuda has no INT8: its format cannot hold Q/DQ"):
            runtimes.rules("torchscript_cuda")
        with pytest.raises(UsageError, match="compute in float between Q and DQ"):
            runtime.build(replace(portable("residual"), precision=Precision.INT8), Path("nowhere"), threads=0)
        with pytest.raises(UsageError, match="cannot hold Q/DQ"):
            gpu[0].build(replace(script, precision=Precision.INT8), Path("nowhere"), threads=0)

    def test_an_engine_that_is_a_program_is_told_from_others(self, script, portable, ort, gpu, tmp_path):
        ort()
        program = engine_of("torchscript_cuda", script, tmp_path / "a")
        graph = engine_of("onnxruntime_cuda", portable("residual"), tmp_path / "b")

        assert [runtimes.runs_code(one) for one in (script, program, graph)] == [True, True, False]
        assert [runtimes.is_engine(one) for one in (script, program, graph)] == [False, True, True]

    @pytest.mark.parametrize("precision", [Precision.TF32, Precision.BF16])
    def test_a_card_without_that_arithmetic_is_a_missing_capability(self, precision):
        with pytest.raises(CapabilityError, match=rf"T4 has no {precision.value}\n  why: its compute capability is 7.5") as found:
            on_gpu.require(precision, on_gpu.Card("T4", (7, 5), 40))
        assert found.value.exit_code == 4
        on_gpu.require(Precision.FP16, on_gpu.Card("T4", (7, 5), 40))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without an NVIDIA GPU")
    def test_here_both_say_what_is_missing(self):
        assert "was built for CPUs; onnxruntime-gpu has the CUDA execution provider" in runtimes.why_not("onnxruntime_cuda")
        assert "finds no GPU: " in runtimes.why_not("torchscript_cuda")
        assert runtimes.place("onnxruntime_cuda") is not None


class TestOnnxRuntime:
    @pytest.fixture
    def opened(self, ort, portable, tmp_path) -> Iterator[Callable[..., tuple[Any, fake_onnxruntime.World]]]:
        def open_(precision: Precision = Precision.FP32, **told: Any) -> tuple[Any, fake_onnxruntime.World]:
            runtime, world = ort(**told)
            session = runtime.load(engine_of("onnxruntime_cuda", portable("residual"), tmp_path / "engine", precision))
            sessions.append(session)
            world.ran.clear()
            return session, world

        sessions: list[Any] = []
        yield open_
        for session in sessions:
            session.close()

    def test_float32_is_float32_and_tf32_is_asked_for(self, ort, portable, tmp_path):
        runtime, world = ort()

        for name, precision in (("a", Precision.FP32), ("b", Precision.TF32)):
            engine = engine_of("onnxruntime_cuda", portable("residual"), tmp_path / name, precision)
            runtime.load(engine).close()
            assert engine.precision is precision

        assert [given["use_tf32"] for given in world.opened] == ["0", "0", "1", "1"]

    def test_a_layer_of_the_graph_is_found_in_what_was_left_of_it(self, ort, portable, tmp_path):
        ort()
        model = replace(portable("residual"), precision=Precision.TF32)
        built = engine_of("onnxruntime_cuda", model, tmp_path / "engine", Precision.TF32)

        found = build.Engine.of("onnxruntime_cuda", model, built)

        assert found.label == "onnxruntime_cuda tf32"
        assert found.realised is not None
        assert {layer.precision for layer in found.realised.layers} == {"tf32"}
        assert len(found.realised.layers) == 7
        assert found.realised.int8 == 0

    def test_layers_that_float16_leaves_in_float32_are_said_to_be(self, ort, portable, tmp_path):
        ort()
        (tmp_path / "half").mkdir()
        model = half.to_fp16(portable("residual"), tmp_path / "half", float32=("head/*",))
        model = write_manifest(tmp_path / "half", model)
        built = engine_of("onnxruntime_cuda", model, tmp_path / "engine", Precision.FP16)

        found = runtimes.get("onnxruntime_cuda").realised(built, model)

        assert [layer.precision for layer in found.layers if layer.name.startswith("head")] == ["fp32"]
        assert {layer.precision for layer in found.layers if not layer.name.startswith("head")} == {"fp16"}

    def test_from_the_second_execute_of_a_shape_on_a_graph_runs_and_reads_what_was_fed_last(self, opened):
        session, world = opened()

        first = [run(session, {"image": IMAGES[start : start + 2]})["logits"] for start in (0, 2)]
        other = run(session, {"image": IMAGES[:3]})["logits"]
        again = run(session, {"image": IMAGES[:2]})["logits"]

        assert world.ran == ["1", "1", "2", "1"]
        assert world.captured == 2
        assert np.array_equal(again, first[0])
        assert not np.array_equal(first[0], first[1])
        assert other.shape == (3, 5)
        assert session.graph_refused == ""

    def test_the_ninth_shape_has_no_graph_and_gives_its_buffers_back(self, opened):
        session, world = opened()
        for size in range(1, 9):
            run(session, {"image": np.repeat(IMAGES[:1], size, axis=0)})
        taken = len(world.cuda.left())

        for size in (9, 10, 11):
            found = run(session, {"image": np.repeat(IMAGES[:1], size, axis=0)})["logits"]
            assert found.shape == (size, 5)

        assert world.ran[-3:] == ["-1"] * 3
        assert len(world.cuda.left()) == taken + 4

    def test_a_graph_that_is_refused_when_it_is_opened_is_done_without_and_says_why(self, opened):
        session, world = opened(refuses_capture="opening")

        run(session, {"image": IMAGES[:2]})

        assert "cannot use the graph capture feature" in session.graph_refused
        assert world.ran == ["-1"]
        assert world.opened[-1]["enable_cuda_graph"] == "0"

    def test_a_graph_that_is_refused_while_it_runs_is_done_without_for_all_shapes(self, opened):
        session, world = opened(refuses_capture="running")

        first = run(session, {"image": IMAGES[:2]})["logits"]
        run(session, {"image": IMAGES[:3]})

        assert first.shape == (2, 5)
        assert "operation not permitted when stream is capturing" in session.graph_refused
        assert world.ran == ["-1", "-1"]

    def test_in_another_thread_it_runs_without_a_graph(self, opened):
        session, world = opened()
        wanted = run(session, {"image": IMAGES[:2]})["logits"]

        other = threading.Thread(target=session.execute)
        other.start()
        other.join()

        assert np.array_equal(session.fetch()["logits"], wanted)
        session.execute()
        assert world.ran == ["1", "-1", "1"]
        assert session.graph_refused == ""

    def test_what_is_put_on_the_device_is_there_when_feed_returns_and_over_when_execute_does(self, opened):
        session, world = opened()

        session.feed({"image": IMAGES[:2]})
        assert world.cuda.stream(session._stream).waiting == []
        session.execute()
        assert world.cuda.stream(session._stream).waiting == []

    def test_the_time_on_the_gpu_is_that_between_two_events(self, opened):
        session, world = opened()
        session.feed({"image": IMAGES[:2]})

        assert session.gpu_times(3) == [500_000] * 3  # a quarter of a millisecond for the model, and for an event
        assert "event" not in world.cuda.left()

    def test_close_gives_everything_back(self, ort, portable, tmp_path):
        runtime, world = ort()
        session = runtime.load(engine_of("onnxruntime_cuda", portable("residual"), tmp_path / "engine"))
        run(session, {"image": IMAGES[:1]})
        run(session, {"image": IMAGES[:2]})
        assert world.cuda.left() == [*["memory"] * 4, *["pinned"] * 4, "stream"]

        session.close()

        assert world.cuda.left() == []

    def test_a_session_that_was_fed_nothing_says_so(self, opened):
        session, _ = opened()

        with pytest.raises(UsageError, match="nothing was fed"):
            session.execute()

    def test_a_failing_kernel_is_told_in_the_librarys_words(self, opened):
        session, world = opened()
        session.feed({"image": IMAGES[:2]})
        session._session.run_with_iobinding = lambda binding, options: (_ for _ in ()).throw(
            fake_onnxruntime.Fail("[ONNXRuntimeError] : 1 : FAIL : CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR")
        )

        with pytest.raises(StageError, match=r"(?s)failed while running the model on the GPU.*CUDNN_STATUS_INTERNAL_ERROR"):
            session.execute()
        assert world.cuda.stream(session._stream).waiting == []

    def test_outputs_whose_size_the_data_decide_are_allocated_by_onnx_runtime(self, ort, tmp_path):
        text = (
            "<ir_version: 9, opset_import: ['': 19]> g (float[n, 3] x) => (int64[r, k] where, float[n, 3] twice) "
            "{ where = NonZero(x) twice = Add(x, x) }"
        )
        path = tmp_path / "model.onnx"
        onnx.save(onnx.parser.parse_model(text.replace("'", '"')), path)
        runtime, world = ort()
        session = runtime._opened(path, cudart.load(), tf32=False)

        for count in (1, 2):
            fed = np.zeros((2, 3), np.float32)
            fed.flat[:count] = 1
            found = run(session, {"x": fed})
            assert found["where"].shape == (2, count)
            assert np.array_equal(found["twice"], 2 * fed)
        assert "output 'where' depends on the data" in session.graph_refused
        assert world.ran == ["-1", "-1"]
        session.close()
        assert world.cuda.left() == []


class TestWhatOnnxRuntimeRefuses:
    def test_nodes_that_would_run_on_the_cpu_are_an_error_that_names_them(self, ort, portable, tmp_path):
        runtime, world = ort(kernels_lack=("GlobalAveragePool",))

        with pytest.raises(CapabilityError) as refused:
            runtime.build(portable("residual"), tmp_path, threads=0)

        assert refused.value.exit_code == 4
        assert "no CUDA kernel for all of" in refused.value.what
        (node,) = refused.value.problems
        assert node.endswith("(GlobalAveragePool)")
        assert world.cuda.left() == []

    def test_a_provider_that_does_not_load_is_an_error_and_not_a_session_on_the_cpu(self, ort, portable, tmp_path):
        runtime, world = ort(loads=False)

        with pytest.raises(CapabilityError, match="does not run on the GPU here") as refused:
            runtime.build(portable("residual"), tmp_path, threads=0)

        assert "it opened the session on CPUExecutionProvider" in refused.value.why
        assert world.cuda.left() == []

    def test_a_session_that_fell_back_without_a_word_is_found_out(self, ort, portable, tmp_path, monkeypatch):
        runtime, _ = ort(loads=False)
        monkeypatch.setattr(runtime, "_NO_FALLBACK", "session.something_else")  # as a version that does not know the entry

        with pytest.raises(CapabilityError, match="does not run on the GPU here"):
            runtime.build(portable("residual"), tmp_path, threads=0)

    def test_a_provider_that_cannot_be_created_is_not_replaced_by_the_cpu(self, ort, portable, tmp_path, capsys):
        runtime, _ = ort(fails="CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version")

        with pytest.raises(StageError, match=r"(?s)refuses .* on the GPU.*CUDA driver version is insufficient"):
            runtime.build(portable("residual"), tmp_path, threads=0)
        assert capsys.readouterr().out == ""

    def test_a_file_that_is_no_graph_is_refused_by_name(self, ort, tmp_path):
        runtime, world = ort()
        (tmp_path / "model.onnx").write_bytes(b"not a graph")

        with pytest.raises(DeploykitError, match=r"refuses .*model\.onnx"):
            runtime._opened(tmp_path / "model.onnx", cudart.load(), tf32=False)
        assert world.cuda.left() == []

    @pytest.mark.parametrize(
        ("told", "why"),
        [
            ({"cuda_version": ""}, "was built for CPUs; onnxruntime-gpu has the CUDA execution provider"),
            ({"cuda": FakeCuda(devices=0)}, "the CUDA runtime finds no GPU"),
            (
                {"registers": False, "printed": "Failed to load libcudnn.so.9: cannot open shared object file"},
                "does not register its CUDAExecutionProvider (Failed to load libcudnn.so.9: cannot open shared object file)",
            ),
            ({"printed": "Failed to load libcublasLt.so.12: no such file"}, "Failed to load libcublasLt.so.12: no such file"),
        ],
    )
    def test_why_it_does_not_load_here_is_said(self, ort, told, why):
        ort(**told)

        assert why in runtimes.why_not("onnxruntime_cuda")

    def test_where_all_is_there_there_is_no_reason(self, ort):
        ort()

        assert runtimes.why_not("onnxruntime_cuda") == ""

    def test_libraries_that_the_loader_does_not_find_are_named(self, ort, tmp_path, monkeypatch):
        runtime, _ = ort()
        capi = tmp_path / "onnxruntime" / "capi"
        capi.mkdir(parents=True)
        (capi / "libonnxruntime_providers_cuda.so").write_bytes(b"")
        runtime.onnxruntime.__file__ = str(capi.parent / "__init__.py")
        tool = tmp_path / "ldd"
        tool.write_text(
            "#!/bin/sh\necho '  libc.so.6 => /lib/libc.so.6 (0x1)'\necho '  libc.so.6 => not found'\n"
            "echo '  libnowhere.so.9 => not found'\n"
        )
        tool.chmod(0o755)
        monkeypatch.setattr(runtime.shutil, "which", lambda name: str(tool))

        # libc stands for a library that was loaded by its path, as NVIDIA's packages are.
        assert runtime.why_not() == "the CUDA execution provider needs libnowhere.so.9, which the loader does not find"

    def test_an_engine_of_another_card_or_version_is_refused_and_said_to_be_stale(self, ort, portable, tmp_path):
        ort(cuda=FakeCuda(name="H100", capability=(9, 0)))
        engine = engine_of("onnxruntime_cuda", portable("residual"), tmp_path / "engine")
        assert runtimes.preflight(engine) == runtimes.LOADS

        runtime, _ = ort(cuda=FakeCuda(name="A10", capability=(8, 6)))

        with pytest.raises(UsageError, match=r"built on H100 \(9\.0, 16 SMs\) with ONNX Runtime .*; here: A10 \(8\.6, 16 SMs\)"):
            runtime.load(engine)
        assert "rebuild needed because it was built on H100" in runtimes.preflight(engine)
        strange = replace(engine, facts={"runtime": "onnxruntime_cuda"})
        with pytest.raises(UsageError, match="does not say where it was built"):
            runtime.load(strange)


class TestTorchScript:
    @pytest.fixture
    def opened(self, gpu, script, tmp_path) -> Callable[..., Any]:
        return lambda precision=Precision.FP32: gpu[0].load(
            engine_of("torchscript_cuda", script, tmp_path / precision.value, precision)
        )

    @pytest.mark.parametrize(("precision", "limit"), [(Precision.FP16, 1e-2), (Precision.BF16, 1e-1)])
    def test_in_half_precision_weights_are_so_and_float32_goes_in_and_out(self, opened, script, precision, limit):
        session = opened(precision)
        wanted = script.samples().reference["logits"]

        answer = run(session, {"image": DIGITS})["logits"]

        assert answer.dtype == np.float32
        relative = np.abs(answer - wanted).max() / np.abs(wanted).max()
        assert 1e-5 < relative <= limit

    def test_what_the_weights_are_is_read_from_the_engine(self, gpu, script, tmp_path):
        found = {}
        for precision in (Precision.FP32, Precision.TF32, Precision.FP16, Precision.BF16):
            engine = engine_of("torchscript_cuda", script, tmp_path / precision.value, precision)
            found[precision] = build.Engine.of("torchscript_cuda", replace(script, precision=precision), engine).realised

        for precision, realised in found.items():
            assert {layer.precision for layer in realised.layers} == {precision.value}
            assert [layer.op for layer in realised.layers] == [*["Conv"] * 3, *["Gemm"] * 2]
            assert realised.kernels["float"]["_convolution"] == 3

    def test_the_flags_of_the_process_are_as_wanted_in_it_and_as_before_after_it(self, opened, monkeypatch):
        backends: Any = torch.backends

        def flags() -> list[Any]:
            kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
            return [*(kind.fp32_precision for kind in kinds), backends.cudnn.benchmark]

        before, seen = flags(), []
        for precision in (Precision.FP32, Precision.TF32):
            session = opened(precision)
            module = session._module
            session._module = lambda *given, module=module: (seen.append(flags()), module(*given))[1]
            run(session, {"image": DIGITS[:1]})

        # The last of each is the graph's replay, whose kernels were chosen when it was captured.
        assert seen[: len(seen) // 2 - 1] == [["ieee", "ieee", "ieee", True]] * 3
        assert seen[len(seen) // 2 : -1] == [["tf32", "tf32", "tf32", True]] * 3
        assert flags() == before

    def test_flags_come_back_when_the_program_fails(self, opened):
        session, before = opened(), torch.backends.cudnn.benchmark
        session.feed({"image": DIGITS[:1]})
        session._module = lambda *given: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory"))

        with pytest.raises(StageError, match=r"(?s)failed on the GPU.*out of memory"):
            session.execute()
        assert torch.backends.cudnn.benchmark is before

    def test_each_shape_is_warmed_up_captured_once_and_replayed(self, opened, gpu):
        session = opened()
        _, world = gpu
        world.did.clear()

        first = run(session, {"image": DIGITS[:2]})["logits"]
        session.execute()
        run(session, {"image": DIGITS[:3]})
        again = run(session, {"image": DIGITS[:2]})["logits"]

        assert world.did.count("replay") == 4
        assert world.graphs == 2
        assert np.array_equal(first, again)

    def test_buffers_stay_where_they_are_since_a_graph_reads_them_there(self, opened):
        session = opened()
        places = []
        for start in (0, 2):
            session.feed({"image": DIGITS[start : start + 2]})
            session.execute()
            places.append(session._now.inputs[0].data_ptr())

        assert places[0] == places[1]

    def test_the_ninth_shape_takes_the_place_of_the_oldest(self, opened, gpu):
        session = opened()
        for size in range(1, 10):
            run(session, {"image": np.repeat(DIGITS[:1], size, axis=0)})

        assert gpu[1].graphs == 8
        assert run(session, {"image": DIGITS[:1]})["logits"].shape == (1, 5)

    def test_a_program_that_cannot_be_captured_runs_without_a_graph_and_says_why(self, opened, gpu):
        gpu[1].refuses_capture = True
        session = opened()

        answer = run(session, {"image": DIGITS[:2]})["logits"]

        assert answer.shape == (2, 5)
        assert session.graph_refused == "Try again."
        assert gpu[1].graphs == 0

    def test_the_engine_says_whether_a_graph_was_captured(self, gpu, script, tmp_path):
        assert engine_of("torchscript_cuda", script, tmp_path / "a").facts["cuda_graph"] == "captured"
        gpu[1].refuses_capture = True
        assert engine_of("torchscript_cuda", script, tmp_path / "b").facts["cuda_graph"] == "Try again."

    def test_nothing_is_left_to_do_when_feed_and_execute_return(self, opened):
        session = opened()

        session.feed({"image": DIGITS[:2]})
        assert session._gpu._waiting == []
        session.execute()
        assert session._gpu._waiting == []

    def test_the_time_on_the_gpu_is_that_of_one_execute_while_another_is_still_at_work(self, opened):
        session = opened()
        session.feed({"image": DIGITS[:2]})

        assert session.gpu_times(3) == [500_000] * 3

    def test_close_resets_graphs_and_gives_memory_back(self, opened, gpu):
        session = opened()
        run(session, {"image": DIGITS[:2]})

        session.close()

        assert gpu[1].graphs == 0
        assert gpu[1].did[-1] == "give back"

    def test_a_session_that_was_fed_nothing_says_so(self, opened):
        with pytest.raises(UsageError, match="nothing was fed"):
            opened().execute()

    def test_an_engine_of_another_card_is_refused_and_said_to_be_stale(self, gpu, script, tmp_path):
        engine = engine_of("torchscript_cuda", script, tmp_path / "engine")

        gpu[1].name = "A100"

        with pytest.raises(UsageError, match=r"built on H200 \(9\.0, 132 SMs\) with PyTorch .*; here: A100"):
            gpu[0].load(engine)
        assert gpu[0].why_stale(engine)

    def test_a_card_that_is_too_old_is_refused_before_anything_is_written(self, gpu, script, tmp_path):
        gpu[1].capability, gpu[1].name = (7, 5), "T4"

        with pytest.raises(CapabilityError, match="T4 has no bf16"):
            gpu[0].build(replace(script, precision=Precision.BF16), tmp_path, threads=0)
        assert list(tmp_path.iterdir()) == []

    def test_a_program_that_is_not_of_one_type_is_refused_when_it_is_built(self, gpu, script, tmp_path):
        class Mixed(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.mm(x.flatten(1), torch.ones(x.flatten(1).shape[1], 5, dtype=torch.float32))

        from deploykit.runtimes import torchscript

        (tmp_path / "mixed").mkdir()
        torchscript.write_scripted(Mixed().eval(), tmp_path / "mixed" / "model.pt")
        script.samples().save(tmp_path / "mixed" / "samples.npz")
        mixed = replace(script, path=tmp_path / "mixed" / "model.pt", precision=Precision.FP16)

        with pytest.raises(StageError, match="failed on the GPU"):
            gpu[0].build(mixed, tmp_path, threads=0)


class TestARun:
    """The whole pipeline on fake GPUs. Fresh processes have none, so of a benchmark what one process does is done here."""

    @pytest.mark.parametrize(
        ("target", "float_type", "limit"),
        [
            ("onnxruntime_cuda", "tf32", "0.01"),
            ("onnxruntime_cuda", "fp16", "0.01"),
            ("torchscript_cuda", "bf16", "0.1"),
        ],
    )
    def test_an_engine_is_built_proved_and_named_by_what_it_computes_in(self, ort, gpu, tmp_path, target, float_type, limit):
        ort()
        content = {
            "name": "run",
            "model": {"name": "lenet5", "weights": "none"},
            "export": {"formats": [recipe.OFFERS[target].made_of], "samples": 2},
            "build": {"runtimes": [target], "float_type": float_type, "engine": "require"},
            "benchmark": {"enabled": False},
        }

        found = pipeline.run(recipe.parse(content, base=tmp_path, source="a test"), tmp_path / "out")

        label = f"{target} {float_type}"
        (engine,) = found["engines"]
        assert (engine["label"], engine["built"], found["exit_code"]) == (label, True, 0)
        assert engine["path"].startswith(f"build-{target}-{float_type}/")
        meaning = "PyTorch" if target == "torchscript_cuda" else "its own graph"
        assert f"{label}: answers like {meaning} (max|d| / max|y| <= {limit})" in [gate["rule"] for gate in found["gates"]]
        assert {layer["precision"] for layer in engine["realised"]["layers"]} == {float_type}
        assert "fp32" not in {case["precision"] for case in found["parity"] if case["label"] == label}

    def test_a_mixed_run_builds_each_engine_from_its_own_file(self, ort, gpu, tmp_path):
        ort()
        content = {
            "name": "run",
            "model": {"name": "lenet5", "weights": "none"},
            "export": {"formats": ["onnx", "torchscript"], "samples": 2},
            "build": {"runtimes": ["onnxruntime", "onnxruntime_cuda", "torchscript_cuda"], "engine": "require"},
            "benchmark": {"enabled": False},
        }

        found = pipeline.run(recipe.parse(content, base=tmp_path, source="a test"), tmp_path / "out")

        files = [engine["path"].rpartition("/")[2] for engine in found["engines"]]
        assert files == ["engine.onnx", "model.onnx", "engine.pt"]
        packed = pack.pack(tmp_path / "out", tmp_path / "run.bundle", release=1)
        assert list(packed.manifest.models) == ["onnxruntime-fp32"]  # devices have no other of these runtimes

    def test_what_no_device_has_makes_no_bundle(self, tmp_path, gpu):
        content = {
            "name": "run",
            "model": {"name": "lenet5", "weights": "none"},
            "export": {"formats": ["torchscript"], "samples": 2},
            "build": {"runtimes": ["torchscript_cuda"], "engine": "skip"},
        }
        pipeline.run(recipe.parse(content, base=tmp_path, source="a test"), tmp_path / "out")

        with pytest.raises(UsageError, match="has no graph to deploy"):
            pack.pack(tmp_path / "out", tmp_path / "run.bundle", release=1)

    def test_a_benchmark_tells_the_time_on_the_gpu_beside_that_of_the_host(self, gpu, script, tmp_path):
        engine = engine_of("torchscript_cuda", script, tmp_path / "engine")
        request = {"queries": 4, "warmup": 1, "offline_batches": [2], "offline_seconds": 0.0}

        answer = process.measure({**request, "engine": str(engine.folder)})
        server = process.measure({**request, "engine": str(engine.folder), "scenario": {"name": "multi-stream"}})

        assert answer["gpu_ns"] == [500_000] * 4
        assert len(answer["latency_ns"]) == 4
        assert "NVML Shared Library Not Found" in answer["conditions"]["gpu_unseen"]
        assert server["gpu_ns"] == []
        measured = Process.from_json({"label": "a", "again": False, **answer})
        assert Measured("a", (measured, measured)).gpu_ns == 500_000
        assert Measured("a", (replace(measured, gpu_ns=()),)).gpu_ns is None

    def test_an_engine_on_the_cpu_has_no_time_on_a_gpu(self, portable, tmp_path):
        engine = engine_of("onnxruntime", portable("residual"), tmp_path / "engine")
        request = {"queries": 2, "warmup": 0, "offline_batches": [1], "offline_seconds": 0.0}

        answer = process.measure({**request, "engine": str(engine.folder)})

        assert (answer["gpu_ns"], answer["conditions"]["gpu_unseen"]) == ([], "")

    def test_somebodys_engine_that_is_a_program_is_neither_measured_nor_compared_without_trust(self, gpu, script, tmp_path):
        engine = engine_of("torchscript_cuda", script, tmp_path / "engine")

        with pytest.raises(UsageError, match=r"engine\.pt is TorchScript, whose program runs when it is loaded: --trust"):
            timing.engines_at([engine.folder], tmp_path)
        with pytest.raises(UsageError, match="is TorchScript\n  why: loading it runs the program in it"):
            open_sides((str(engine.folder), str(script.folder)), Said(), tmp_path)

        assert list(timing.engines_at([engine.folder], tmp_path, trust=True)) == ["torchscript_cuda fp32"]
        first, _ = open_sides((str(engine.folder), str(script.folder)), Said(trust=True), tmp_path)
        assert (first.kind, first.has_threads) == ("engine of torchscript_cuda", False)

    def test_the_report_has_the_time_on_the_gpu_and_its_clock(self):
        told = {"power_modes": [], "gpu_mhz": [1965, 1980]}
        engines = [{"label": "torchscript_cuda fp16", "gpu_ns": 512_345}]

        assert "by CUDA events, without copies: torchscript_cuda fp16" in str(speed._on_the_gpu({"board": told}, engines))
        assert "Its clock was 1965 to 1980 MHz." in str(speed._on_the_gpu({"board": told}, engines))
        unseen = {**told, "gpu_mhz": None, "unseen": "nvidia-ml-py is not installed"}
        assert "not watched: nvidia-ml-py is not installed" in str(speed._on_the_gpu({"board": unseen}, engines))
        assert speed._on_the_gpu({}, [{"label": "onnxruntime fp32"}]) is None
        assert text._board(told) == ["the GPU under load at 1965 to 1980 MHz"]
        assert text._board(unseen) == [
            "clocks of the GPU and what held them down were not watched: nvidia-ml-py is not installed"
        ]


def test_settings_of_the_process_are_one_threads_at_a_time_and_put_back():
    kind, inside, leave = torch.backends.cudnn.conv, threading.Event(), threading.Event()
    before, seen = kind.fp32_precision, []

    def first() -> None:
        with torchscript_cuda.exactly(tf32=True):
            inside.set()
            leave.wait(10)
            seen.append(kind.fp32_precision)

    def second() -> None:
        inside.wait(10)
        with torchscript_cuda.exactly(tf32=False):
            seen.append(kind.fp32_precision)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    threads[1].join(0.1)  # time to come in, if it could
    leave.set()
    for thread in threads:
        thread.join(10)

    assert seen == ["tf32", "ieee"]
    assert kind.fp32_precision == before
