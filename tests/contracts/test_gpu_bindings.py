"""The GPU runtimes' calls against the real libraries: ONNX Runtime, PyTorch and nvidia-ml-py, on a machine without a GPU.

Every dotted name that the code takes of them is looked up in the library that is installed, and the arguments of every call are
bound to the signature that it has there. What ONNX Runtime refuses is provoked for real, by a provider other than the CPU's.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_onnxruntime
import fake_torch_cuda
import onnx.parser
import onnxruntime
import pynvml
import pytest
import torch

import deploykit
from deploykit.runtimes import onnxruntime_cuda, torchscript_cuda
from deploykit.telemetry import nvml

PACKAGE = Path(deploykit.__file__).parent
SOURCES = {
    "runtimes/onnxruntime_cuda.py": {"onnxruntime": onnxruntime},
    "runtimes/torchscript_cuda.py": {"torch": torch},
    "telemetry/nvml.py": {"nvml": pynvml},
}
# Members of what those libraries give, with the arguments that the code calls them with.
SESSION, BINDING, OPTIONS = onnxruntime.InferenceSession, onnxruntime.IOBinding, onnxruntime.SessionOptions
INSTANCES = [
    (SESSION.run_with_iobinding, ("binding", "options"), {}),
    (SESSION.io_binding, (), {}),
    (SESSION.get_providers, (), {}),
    (SESSION.get_inputs, (), {}),
    (SESSION.get_outputs, (), {}),
    (BINDING.bind_input, ("name", "cuda", 0, float, (1,), 1), {}),
    (BINDING.bind_output, ("name", "cuda", 0, float, (1,), 1), {}),
    (BINDING.bind_output, ("name", "cuda", 0), {}),
    (BINDING.copy_outputs_to_cpu, (), {}),
    (torch.cuda.Stream.synchronize, (), {}),
    (torch.cuda.Event.record, ("stream",), {}),
    (torch.cuda.Event.synchronize, (), {}),
    (torch.cuda.Event.elapsed_time, ("end",), {}),
    (torch.cuda.CUDAGraph.replay, (), {}),
    (torch.cuda.CUDAGraph.reset, (), {}),
    (torch.cuda.graph.__init__, ("graph",), {"stream": None, "capture_error_mode": "thread_local"}),
]
IDENTITY = '<ir_version: 9, opset_import: ["": 19]> g (float[n, 3] x) => (float[n, 3] y) { y = Add(x, x) }'


def dotted(node: ast.AST) -> str:
    """`a.b.c`; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inside = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inside}.{node.attr}" if inside else ""  # type: ignore[attr-defined]


def uses() -> Iterator[tuple[str, str, Any, ast.Call | None]]:
    """(file, dotted name, the library, the call or None) of all that the code takes of the libraries."""
    for name, libraries in SOURCES.items():
        tree = ast.parse((PACKAGE / name).read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            root, _, rest = dotted(node).partition(".")
            if isinstance(node, ast.Attribute) and id(node) not in inner and root in libraries:
                yield name, rest, libraries[root], calls.get(id(node))


USES = list(uses())


def found(library: Any, path: str) -> Any:
    for part in path.split("."):
        library = getattr(library, part)
    return library


@pytest.mark.parametrize(("file", "path", "library", "call"), USES, ids=[f"{use[0]}:{use[1]}" for use in USES])
def test_what_the_code_takes_of_a_library_is_there_and_is_called_as_it_wants(file, path, library, call):
    member = found(library, path)
    if call is None:
        return
    try:
        signature = inspect.signature(member.__init__ if inspect.isclass(member) else member)
    except ValueError:  # made by pybind11 or by torch's own macros: called in the other tests here
        return
    given = [None] * (len(call.args) + inspect.isclass(member))
    signature.bind(*given, **{keyword.arg: None for keyword in call.keywords if keyword.arg})


def test_enough_is_looked_up():
    counts = {file: sum(use[0] == file for use in USES) for file in SOURCES}

    assert counts["runtimes/onnxruntime_cuda.py"] >= 7
    assert counts["runtimes/torchscript_cuda.py"] >= 20
    assert counts["telemetry/nvml.py"] >= 8


@pytest.mark.parametrize(("member", "given", "named"), INSTANCES, ids=[str(each[0].__qualname__) for each in INSTANCES])
def test_methods_of_what_it_gives_take_these_arguments(member, given, named):
    inspect.signature(member).bind("self", *given, **named)


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without an NVIDIA GPU")


def test_the_names_of_nvml_are_those_of_the_library():
    for name in nvml._REASONS:
        assert isinstance(getattr(pynvml, name), int)
    assert issubclass(pynvml.NVMLError, Exception)


@NO_GPU
def test_nvml_without_a_driver_raises_its_own_error():
    with pytest.raises(pynvml.NVMLError_LibraryNotFound):
        pynvml.nvmlInit()


def test_a_cards_properties_have_these_names():
    properties = torch._C._CudaDeviceProperties

    assert {"name", "major", "minor", "multi_processor_count"} <= set(dir(properties))


@NO_GPU
def test_pinned_memory_is_asked_for_as_torch_wants_it():
    with pytest.raises(RuntimeError, match="NVIDIA driver"):  # and no TypeError for a keyword that it does not know
        torch.empty((2,), dtype=torch.float32, pin_memory=True)


def test_tf32_is_switched_where_torch_looks_for_it():
    for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        before = kind.fp32_precision
        for wanted in ("ieee", "tf32"):
            kind.fp32_precision = wanted
            assert kind.fp32_precision == wanted
        kind.fp32_precision = before


AZURE = pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="wants ONNX Runtime's provider without kernels, which its packages for CPUs have",
)


class TestOnnxRuntimesOwnWords:
    """`session.disable_cpu_ep_fallback` acts for every provider, so it is heard without CUDA, by one that has no kernels."""

    def opened(self, *providers: str, **entries: str) -> Any:
        options = onnxruntime_cuda._options()
        for key, value in entries.items():
            options.add_session_config_entry(f"session.{key}", value)
        content = onnx.parser.parse_model(IDENTITY).SerializeToString()
        return onnxruntime.InferenceSession(
            content, options, providers=list(providers), provider_options=[{}] * len(providers), enable_fallback=False
        )

    @AZURE
    def test_a_node_that_would_run_on_the_cpu_is_refused_in_the_words_that_we_know(self):
        with pytest.raises(Exception, match="CPU EP") as refused:
            self.opened("AzureExecutionProvider", disable_cpu_ep_fallback="1")

        assert onnxruntime_cuda._FELL_BACK in str(refused.value)
        assert str(refused.value) == fake_onnxruntime.FELL_BACK
        assert type(refused.value).__mro__[1] is Exception  # hence `except Exception`
        assert onnxruntime_cuda._NO_FALLBACK == "session.disable_cpu_ep_fallback"

    @AZURE
    def test_the_cpu_by_name_would_be_a_contradiction(self):
        with pytest.raises(Exception, match="Conflicting session configuration") as refused:
            self.opened("AzureExecutionProvider", "CPUExecutionProvider", disable_cpu_ep_fallback="1")
        assert str(refused.value) == fake_onnxruntime.CONTRADICTION

    @AZURE
    def test_which_nodes_fell_back_is_told_when_that_is_asked_for(self):
        if not hasattr(SESSION, "get_provider_graph_assignment_info"):
            pytest.skip("wants ONNX Runtime 1.24 or later")
        session = self.opened("AzureExecutionProvider", record_ep_graph_assignment_info="1")

        assert onnxruntime_cuda._WHICH_NODES == "session.record_ep_graph_assignment_info"
        (part,) = session.get_provider_graph_assignment_info()
        (node,) = part.get_nodes()
        assert (part.ep_name, node.op_type) == ("CPUExecutionProvider", "Add")
        assert isinstance(node.name, str)

    @pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="wants onnxruntime for CPUs")
    def test_a_provider_that_is_not_in_the_package_is_left_out_with_a_warning_only(self):
        with pytest.warns(UserWarning, match="^Specified provider 'CUDAExecutionProvider' is not in available"):
            session = self.opened("CUDAExecutionProvider")

        assert session.get_providers() == ["CPUExecutionProvider"]

    def test_the_keys_of_its_settings_are_in_the_library(self):
        library = Path(onnxruntime.__file__).parent / "capi" / "onnxruntime_pybind11_state.so"
        (path,) = [library] if library.exists() else sorted(library.parent.glob("onnxruntime_pybind11_state*.so"))
        content = path.read_bytes()

        for key in (
            onnxruntime_cuda._NO_FALLBACK,
            onnxruntime_cuda._WHICH_NODES,
            "session.optimized_model_external_initializers_file_name",
            "gpu_graph_id",
            "cannot use the graph capture feature",
        ):
            assert key.encode() in content, key

    def test_options_of_a_run_are_taken(self):
        assert isinstance(onnxruntime_cuda._run_options("-1"), onnxruntime.RunOptions)
        assert inspect.signature(onnxruntime.preload_dlls).parameters["cuda"].default is True


class TestFakes:
    def test_the_fake_gpu_is_called_as_the_real_one(self):
        names = [name for name, member in vars(torchscript_cuda.Gpu).items() if callable(member) and name != "__init__"]

        for name in names:
            real, fake = (
                list(inspect.signature(getattr(kind, name)).parameters)
                for kind in (torchscript_cuda.Gpu, fake_torch_cuda.FakeGpu)
            )
            assert real == fake, name

    def test_the_fake_onnx_runtime_takes_what_the_real_one_takes(self):
        for name in ("bind_input", "bind_output", "copy_outputs_to_cpu"):
            real, fake = (
                list(inspect.signature(getattr(kind, name)).parameters) for kind in (BINDING, fake_onnxruntime._Binding)
            )
            assert real == fake
