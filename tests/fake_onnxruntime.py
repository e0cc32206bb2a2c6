"""An ONNX Runtime with a CUDA execution provider, in memory: sessions on a fake GPU, what they refuse, and what they only log.

What it refuses it says in ONNX Runtime's own words. A session reads and writes the device memory that is bound to it, on the
stream that it was given, and computes by the real ONNX Runtime on the CPU. A graph that was captured goes on using the addresses
of its capture, whatever is bound later. Work is over when the stream is waited for, and not before.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as real
from fake_cuda import FakeCuda

from deploykit.runtimes import cudart, onnxruntime_cuda

CUDA = "CUDAExecutionProvider"
FELL_BACK = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but fallback to "
    "CPU EP has been explicitly disabled by the user."
)
CONTRADICTION = (
    "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Conflicting session configuration: explicitly added the CPU EP to the session, "
    "but also disabled fallback to the CPU EP via session configuration options."
)
NO_CAPTURE = (
    "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature as requested by the user as the model has "
    "control flow nodes which can't be supported by CUDAExecutionProvider"
)
CAPTURE_FAILED = "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 900: operation not permitted when stream is capturing"


class Fail(Exception):  # noqa: N818 - as ONNX Runtime calls it, and as there with no base but this
    """One of ONNX Runtime's own exceptions."""


@dataclass
class World:
    """What is wrong with this installation. `kernels_lack`: operators without a CUDA kernel. `refuses_capture`: where it does not
    capture, "opening" or "running". `fails`: what is raised when a session is created."""

    cuda: FakeCuda = field(default_factory=FakeCuda)
    cuda_version: str = "12.8"
    registers: bool = True
    loads: bool = True
    kernels_lack: tuple[str, ...] = ()
    refuses_capture: str = ""
    fails: str = ""
    printed: str = ""
    opened: list[dict[str, str]] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    captured: int = 0


class _Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.log_severity_level, self.graph_optimization_level, self.optimized_model_filepath = 2, None, ""

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class _RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


@dataclass(frozen=True)
class _Bound:
    element_type: Any
    shape: tuple[int, ...]
    address: int


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, _Bound] = {}
        self.outputs: dict[str, _Bound | None] = {}
        self.allocated: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = _Bound(element_type, tuple(shape), buffer_ptr)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = None if buffer_ptr is None else _Bound(element_type, tuple(shape), buffer_ptr)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return [self.allocated[name] for name in self.outputs]


def _session_class(world: World) -> type:
    class InferenceSession:
        def __init__(
            self, content: Any, options: Any, providers: Any, provider_options: Any = None, enable_fallback: bool = True
        ) -> None:
            (self._given,) = provider_options
            assert all(isinstance(value, str) for value in self._given.values())
            if not world.registers:
                warnings.warn(f"Specified provider '{CUDA}' is not in available provider names.", stacklevel=2)
            if world.fails and enable_fallback:
                sys.stdout.write("*************** EP Error ***************")  # and goes on without the GPU
            elif world.fails:
                raise RuntimeError(world.fails)
            is_there = world.registers and world.loads and not world.fails
            is_strict = options.entries.get("session.disable_cpu_ep_fallback") == "1"
            if is_strict and "CPUExecutionProvider" in providers:
                raise Fail(CONTRADICTION)
            model = onnx.load(content) if isinstance(content, Path) else onnx.load_from_string(content)
            self._on_cpu = [node for node in model.graph.node if not is_there or node.op_type in world.kernels_lack]
            self._nodes = list(model.graph.node)
            if is_strict and self._on_cpu:
                raise Fail(FELL_BACK)
            if is_there and self._given["enable_cuda_graph"] == "1" and (self._on_cpu or world.refuses_capture == "opening"):
                raise Fail(NO_CAPTURE)
            self._providers = [*([CUDA] if is_there else []), "CPUExecutionProvider"]
            self._records = options.entries.get("session.record_ep_graph_assignment_info") == "1"
            self._session = _computing(content, options.optimized_model_filepath)
            self._graphs: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any]]] = {}
            self._thread = threading.get_ident()
            world.opened.append(dict(self._given))

        def get_providers(self) -> list[str]:
            return self._providers

        def get_inputs(self) -> Any:
            return self._session.get_inputs()

        def get_outputs(self) -> Any:
            return self._session.get_outputs()

        def get_provider_graph_assignment_info(self) -> list[Any]:
            assert self._records
            cpu = [types.SimpleNamespace(name=node.name, op_type=node.op_type) for node in self._on_cpu]
            others = [
                types.SimpleNamespace(name=node.name, op_type=node.op_type) for node in self._nodes if node not in self._on_cpu
            ]
            return [
                types.SimpleNamespace(ep_name=CUDA, get_nodes=lambda: others),
                types.SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: cpu),
            ]

        def io_binding(self) -> _Binding:
            return _Binding()

        def run_with_iobinding(self, binding: _Binding, run_options: _RunOptions) -> None:
            number, thread = run_options.entries.get("gpu_graph_id", "0"), threading.get_ident()
            inputs, outputs = dict(binding.inputs), dict(binding.outputs)
            if self._given["enable_cuda_graph"] == "1" and number != "-1":
                if thread != self._thread:
                    raise Fail(CAPTURE_FAILED)  # its capture is global: another thread took memory meanwhile
                if (thread, number) not in self._graphs:
                    if world.refuses_capture == "running":
                        raise Fail(CAPTURE_FAILED)
                    world.captured += 1
                    self._graphs[thread, number] = (inputs, outputs)
                inputs, outputs = self._graphs[thread, number]
            world.ran.append(number)
            world.cuda.put(int(self._given["user_compute_stream"]), lambda: self._compute(binding, inputs, outputs))

        def _compute(self, binding: _Binding, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
            feeds = {}
            for name, bound in inputs.items():
                dtype = np.dtype(bound.element_type)
                memory = world.cuda.bytes_at(bound.address, int(np.prod(bound.shape)) * dtype.itemsize)
                feeds[name] = np.frombuffer(memory, dtype).reshape(bound.shape)
            for (name, bound), value in zip(outputs.items(), self._session.run(list(outputs), feeds), strict=True):
                if bound is None:
                    binding.allocated[name] = value
                    continue
                assert (value.dtype, value.shape) == (np.dtype(bound.element_type), bound.shape)
                content = np.ascontiguousarray(value).tobytes()
                world.cuda.bytes_at(bound.address, len(content))[:] = content

    return InferenceSession


def _computing(content: Any, written: str) -> real.InferenceSession:
    options, level = real.SessionOptions(), real.GraphOptimizationLevel
    options.log_severity_level = 3
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if written else level.ORT_DISABLE_ALL
    if written:
        options.optimized_model_filepath = written
    return real.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def module(world: World) -> types.ModuleType:
    """The fake as a module `onnxruntime`."""
    made = types.ModuleType("onnxruntime")
    made.__file__, made.__version__ = "/nowhere/onnxruntime/__init__.py", real.__version__  # type: ignore[attr-defined]

    def preload_dlls() -> None:
        sys.stdout.write(f"{world.printed}\n")

    providers = [*([CUDA] if world.registers else []), "CPUExecutionProvider"]
    members: dict[str, Any] = {
        "cuda_version": world.cuda_version,
        "GraphOptimizationLevel": real.GraphOptimizationLevel,
        "InferenceSession": _session_class(world),
        "RunOptions": _RunOptions,
        "SessionOptions": _Options,
        "get_available_providers": lambda: providers,
        "preload_dlls": preload_dlls,
    }
    vars(made).update(members)
    return made


@contextmanager
def installed(world: World) -> Iterator[Any]:
    """deploykit's runtime with this fake in ONNX Runtime's place, on this fake's GPU."""
    before, load, why_not = onnxruntime_cuda.onnxruntime, cudart.load, cudart.why_not
    onnxruntime_cuda.onnxruntime = module(world)
    cudart.load = lambda: cudart.Cuda(world.cuda)
    cudart.why_not = lambda: "" if world.cuda.devices else "the CUDA runtime finds no GPU"
    try:
        yield onnxruntime_cuda
    finally:
        onnxruntime_cuda.onnxruntime, cudart.load, cudart.why_not = before, load, why_not
