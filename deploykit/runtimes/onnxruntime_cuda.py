"""ONNX Runtime on the first GPU, by its CUDA execution provider alone: a node that would run on the CPU is an error.

The engine is the portable graph; ONNX Runtime optimizes it each time it is opened. Precision is that of the graph, but for TF32,
which is an option of the provider. None of this has run on a GPU: docs/runtimes.md says what was checked, and how.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Artifact, Format, Precision, Tensors
from deploykit.errors import CapabilityError, DeploykitError, StageError, UsageError, printable
from deploykit.jsonable import JSON, to_json
from deploykit.machine import Machine
from deploykit.runtimes import LayerPrecision, Realised, check_inputs, cudart, on_gpu
from deploykit.runtimes.cudart import Cuda
from deploykit.runtimes.on_gpu import Card, Place
from deploykit.runtimes.onnx_nodes import Node, read_nodes
from deploykit.runtimes.onnxruntime import DTYPES, VERSION, content_of, traced

import onnxruntime  # isort: skip  # after deploykit's own module of that name, which switches telemetry off

LAYERS = "layers.json"
_PROVIDER = "CUDAExecutionProvider"
_FATAL_ONLY = 4  # errors are raised, and a graph that is not captured is none
_NO_GRAPH = "-1"  # the run option gpu_graph_id: neither capture nor replay
_MOST_GRAPHS = 8  # shapes whose buffers are kept, since a captured graph holds their addresses and cannot be given back alone
_NO_FALLBACK = "session.disable_cpu_ep_fallback"
_WHICH_NODES = "session.record_ep_graph_assignment_info"
_FELL_BACK = "assigned to the default CPU EP"
_NOT_CAPTURED = "captur"  # in whatever ONNX Runtime and CUDA say of a graph that they do not capture


@dataclass(frozen=True)
class _Tensor:
    """An input or output of one shape: room on the device, and as much pinned memory."""

    name: str
    address: int
    host: NDArray[np.uint8]
    array: NDArray[np.generic]


@dataclass(eq=False)
class _Buffers:
    """What one set of input shapes runs on. `outputs` is None where a run alone tells their shapes: ONNX Runtime allocates."""

    binding: Any
    options: Any
    inputs: list[_Tensor]
    outputs: list[_Tensor] | None
    memory: ExitStack


class OnnxCudaSession:
    """A `Session` on bound device memory. ONNX Runtime captures a CUDA graph in the first execute of a shape and
    launches it later; `graph_refused` says why it does not.

    The first eight shapes have graphs, and keep their buffers. Graphs are for the thread that opened the session, because ONNX
    Runtime keeps them by thread, and captures so that no other thread may take device memory meanwhile; executes in other threads
    enqueue kernel by kernel.
    """

    def __init__(self, session: Any, cuda: Cuda, stream: int, opened: ExitStack, *, graph_refused: str = "") -> None:
        self._session, self._cuda, self._stream = session, cuda, stream
        self.graph_refused = graph_refused
        self._expected = [(item.name, DTYPES.get(item.type, item.type), item.shape) for item in session.get_inputs()]
        self._results = [(item.name, DTYPES.get(item.type, item.type), item.shape) for item in session.get_outputs()]
        sizes = {size for _, _, shape in self._expected for size in shape if isinstance(size, str)}
        unknown = [
            name for name, _, shape in self._results if any(not isinstance(size, int) and size not in sizes for size in shape)
        ]
        self._is_open = bool(unknown)
        if unknown and not graph_refused:
            self.graph_refused = f"the shape of output {unknown[0]!r} depends on the data"
        self._thread = threading.get_ident()
        self._known: dict[tuple[tuple[int, ...], ...], _Buffers] = {}
        self._now: _Buffers | None = None
        self._resources = opened

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs to the device, by way of pinned memory."""
        check_inputs(inputs, self._expected)
        self._now = buffers = self._buffers({name: inputs[name].shape for name, _, _ in self._expected})
        for tensor in buffers.inputs:
            tensor.array[...] = inputs[tensor.name]
            self._cuda.to_device(tensor.address, tensor.host, self._stream)
        self._cuda.synchronize(self._stream)

    def execute(self) -> None:
        """Run once; the GPU is idle when this returns. Raises StageError with ONNX Runtime's words when it cannot."""
        self._run()
        self._cuda.synchronize(self._stream)

    def fetch(self) -> Tensors:
        """The outputs of the last execute, copied."""
        buffers = self._fed()
        if buffers.outputs is None:
            names = [name for name, _, _ in self._results]
            return {name: np.array(value) for name, value in zip(names, buffers.binding.copy_outputs_to_cpu(), strict=True)}
        for tensor in buffers.outputs:
            self._cuda.to_host(tensor.host, tensor.address, self._stream)
        self._cuda.synchronize(self._stream)
        return {tensor.name: np.array(tensor.array) for tensor in buffers.outputs}

    def gpu_times(self, queries: int) -> list[int]:
        """Nanoseconds on the GPU, by CUDA events around each of so many executes of what was fed: without copies.

        ONNX Runtime waits in a run until it is done, so what the host takes from there to the second event is in it, too.
        """
        self.execute()
        found = []
        with self._cuda.event() as start, self._cuda.event() as end:
            for _ in range(queries):
                self._cuda.record(start, self._stream)
                self._run()
                self._cuda.record(end, self._stream)
                found.append(self._cuda.elapsed_ns(start, end))
        return found

    def close(self) -> None:
        """Give all memory back; the session cannot be used afterwards."""
        buffers = {*self._known.values(), *([self._now] if self._now is not None else [])}
        # What ONNX Runtime still does is on our stream, and its graphs hold our addresses: first it, then they.
        for one in buffers:
            del one.binding
        del self._session
        self._known, self._now = {}, None
        for one in buffers:
            one.memory.close()
        self._resources.close()

    def _fed(self) -> _Buffers:
        if self._now is None:
            raise UsageError("nothing was fed", fix="feed the session before it executes")
        return self._now

    def _run(self) -> None:
        buffers = self._fed()
        is_elsewhere = threading.get_ident() != self._thread
        options = _run_options(_NO_GRAPH) if is_elsewhere else buffers.options
        try:
            self._session.run_with_iobinding(buffers.binding, options)
        except Exception as error:  # onnxruntime's classes share no base below Exception
            if self.graph_refused or is_elsewhere or _NOT_CAPTURED not in str(error):
                raise StageError("ONNX Runtime failed while running the model on the GPU", why=str(error).strip()) from error
            # What is really broken shows again without a graph.
            self.graph_refused = " ".join(str(error).split())
            for one in (buffers, *self._known.values()):
                one.options = _run_options(_NO_GRAPH)
            self._run()

    def _buffers(self, shapes: Mapping[str, tuple[int, ...]]) -> _Buffers:
        """Those for inputs of these shapes: kept ones where there are some, since a graph is tied to their addresses."""
        key = tuple(shapes.values())
        if self._now is not None and self._now not in self._known.values():
            self._now.memory.close()
            self._now = None
        if key in self._known:
            return self._known[key]
        # ONNX Runtime keeps the outputs that it allocated in the binding, and refuses them for others: a new one each time.
        is_kept = not self._is_open and len(self._known) < _MOST_GRAPHS
        made = self._taken(shapes, str(len(self._known) + 1) if is_kept and not self.graph_refused else _NO_GRAPH)
        if is_kept:
            self._known[key] = made
        return made

    def _taken(self, shapes: Mapping[str, tuple[int, ...]], graph_id: str) -> _Buffers:
        sizes = {
            name: size
            for input, _, shape in self._expected
            for name, size in zip(shape, shapes[input], strict=True)
            if isinstance(name, str)
        }
        binding = self._session.io_binding()
        with ExitStack() as taking:
            inputs = [self._tensor(name, dtype, shapes[name], taking) for name, dtype, _ in self._expected]
            for tensor in inputs:
                array = tensor.array
                binding.bind_input(tensor.name, "cuda", 0, array.dtype.type, array.shape, tensor.address)
            outputs = None
            if self._is_open:
                for name, _, _ in self._results:
                    binding.bind_output(name, "cuda", 0)
            else:
                outputs = [
                    self._tensor(name, dtype, tuple(sizes.get(size, size) for size in shape), taking)
                    for name, dtype, shape in self._results
                ]
                for tensor in outputs:
                    array = tensor.array
                    binding.bind_output(tensor.name, "cuda", 0, array.dtype.type, array.shape, tensor.address)
            return _Buffers(binding, _run_options(graph_id), inputs, outputs, taking.pop_all())

    def _tensor(self, name: str, dtype: str, shape: Sequence[int], taking: ExitStack) -> _Tensor:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = taking.enter_context(self._cuda.memory(size))
        host = taking.enter_context(self._cuda.pinned(size))[:size]
        return _Tensor(name, address, host, host.view(dtype).reshape(shape))


def build(model: Artifact, folder: Path, *, threads: int) -> Artifact:
    """Copy the graph into `folder` and open it once, so that what cannot run on this GPU is found out now; write down what its
    layers became. `threads` means nothing here.

    Raises CapabilityError where the card has no such precision, or the graph has nodes that would run on the CPU.
    """
    if model.precision is Precision.INT8:
        raise UsageError("onnxruntime_cuda has no INT8", why="its CUDA kernels compute in float between Q and DQ")
    cuda = cudart.load()
    card = _card(cuda)
    on_gpu.require(model.precision, card)
    path = folder / model.path.name  # under its own name, for it may name what lies beside it
    for source in (model.path, model.path.with_name(f"{model.path.name}.data")):
        if source.exists():
            shutil.copyfile(source, folder / source.name)
    tf32 = model.precision is Precision.TF32
    nodes, graph_refused = _proved(path, cuda, tf32)
    (folder / LAYERS).write_text(json.dumps(to_json(_realised(nodes, model))))
    return replace(
        model,
        path=path,
        stage="build",
        format=Format.ENGINE,
        parents=(model.sha256,),
        settings={"tf32": tf32},
        tools={"onnxruntime_cuda": VERSION},
        facts={
            "runtime": "onnxruntime_cuda",
            "place": to_json(Place(_version(), card)),
            "cuda_graph": graph_refused or "captured",
        },
        machine=Machine.probe(),
    )


def load(engine: Artifact) -> OnnxCudaSession:
    """Open an engine. One that was built for another card or version is refused (UsageError) before the GPU is touched."""
    cuda = cudart.load()
    on_gpu.check(engine, Place(_version(), _card(cuda)))
    return _opened(engine.path, cuda, tf32=engine.precision is Precision.TF32)


def realised(engine: Artifact, model: Artifact) -> Realised:
    """What each Conv, Gemm and MatMul of `model` became when the engine was built; needs no GPU."""
    told = json.loads((engine.folder / LAYERS).read_text())
    return Realised(tuple(LayerPrecision(**layer) for layer in told["layers"]), told["kernels"])


def why_stale(engine: Artifact) -> list[str]:
    """Every reason why an engine has to be built again on this machine; none when it loads."""
    return on_gpu.why_stale(engine, Place(_version(), _card(cudart.load())))


def gpu() -> JSON:
    """What an engine depends on of the GPU here; None where there is none."""
    return None if cudart.why_not() else to_json(asdict(_card(cudart.load())))


def why_not() -> str:
    """Why no engine can be built or run on this machine; empty when it can."""
    if not getattr(onnxruntime, "cuda_version", ""):
        return f"the ONNX Runtime {VERSION} that is installed was built for CPUs; onnxruntime-gpu has the CUDA execution provider"
    if why := cudart.why_not():
        return why
    said = _preloaded()
    if _PROVIDER not in onnxruntime.get_available_providers():
        return f"ONNX Runtime does not register its {_PROVIDER}{f' ({said})' if said else ''}"
    return _missing_libraries(said)


def _preloaded() -> str:
    """Load CUDA and cuDNN where NVIDIA's Python packages put them, as ONNX Runtime asks for; what it says of those it lacks."""
    with redirect_stdout(StringIO()) as printed, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        onnxruntime.preload_dlls()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("Failed")]
    return "; ".join([*lines, *(str(warning.message) for warning in warned)])


def _missing_libraries(said: str) -> str:
    """What the dynamic loader does not find for the provider's library: a session would run on the CPU, and only log that."""
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    tool = shutil.which("ldd")
    if tool is None or not library.is_file():
        return said
    answer = subprocess.run([tool, str(library)], capture_output=True, text=True, errors="replace", timeout=60, check=False)
    names = [line.split()[0] for line in answer.stdout.splitlines() if line.rstrip().endswith("=> not found")]
    missing = [name for name in names if not _is_loadable(name)]
    return f"the CUDA execution provider needs {', '.join(missing)}, which the loader does not find" if missing else ""


def _is_loadable(name: str) -> bool:
    try:
        ctypes.CDLL(name)  # what was loaded by its path is found by its name
    except OSError:
        return False
    return True


def _version() -> str:
    return f"ONNX Runtime {VERSION}"


def _card(cuda: Cuda) -> Card:
    device = cuda.device()
    return Card(device.name, device.compute_capability, device.multiprocessors)


def _proved(path: Path, cuda: Cuda, tf32: bool) -> tuple[list[Node], str]:
    """The nodes that ONNX Runtime leaves of a graph on this GPU, and why it captures none; its own file of them is not kept."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, "optimized.onnx")
        session = _opened(path, cuda, tf32=tf32, written=written)
        try:
            return read_nodes(written), session.graph_refused
        finally:
            session.close()


def _realised(nodes: Sequence[Node], model: Artifact) -> Realised:
    """`traced`, with the layers that a graph in float16 keeps in float32."""
    found = traced(nodes, model)
    kept = model.facts.get("float32_nodes")
    names = kept if isinstance(kept, (list, tuple)) else ()
    return replace(found, layers=tuple(replace(one, precision="fp32") if one.name in names else one for one in found.layers))


def _opened(path: Path, cuda: Cuda, *, tf32: bool, written: Path | None = None) -> OnnxCudaSession:
    """A session that runs on the GPU or not at all, with CUDA graphs where ONNX Runtime takes them."""
    _preloaded()
    with ExitStack() as opening:
        stream = opening.enter_context(cuda.stream())
        graph_refused = ""
        try:
            session = _session(path, stream, tf32=tf32, graphs=True, written=written)
        except DeploykitError as error:
            if _NOT_CAPTURED not in error.why:
                raise
            graph_refused = error.why
            session = _session(path, stream, tf32=tf32, graphs=False, written=written)
        return OnnxCudaSession(session, cuda, stream, opening.pop_all(), graph_refused=graph_refused)


def _session(path: Path, stream: int, *, tf32: bool, graphs: bool, written: Path | None) -> Any:
    options = _options()
    options.add_session_config_entry(_NO_FALLBACK, "1")
    if written is not None:
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{written.name}.weights")
    provider = {
        "device_id": "0",
        "use_tf32": "1" if tf32 else "0",
        "enable_cuda_graph": "1" if graphs else "0",
        "user_compute_stream": str(stream),
    }
    try:
        session = _created(path, options, provider)
    except Exception as error:  # onnxruntime's classes share no base below Exception
        said = " ".join(str(error).split())
        if _FELL_BACK in said:
            raise _not_on_the_gpu(path, provider) from error
        raise StageError(f"ONNX Runtime refuses {printable(path)} on the GPU", why=said) from error
    if (providers := session.get_providers())[0] != _PROVIDER:
        raise _no_provider(providers)
    return session


def _created(path: Path, options: Any, provider: Mapping[str, str]) -> Any:
    # No CPU provider by name: together with the entry against fallback, ONNX Runtime refuses that as a contradiction. Nor its own
    # second try in Python, which opens the session on the CPU and prints that it did.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified provider")  # what is not there is told by get_providers
        return onnxruntime.InferenceSession(
            content_of(path), options, providers=[_PROVIDER], provider_options=[dict(provider)], enable_fallback=False
        )


def _not_on_the_gpu(path: Path, provider: Mapping[str, str]) -> DeploykitError:
    """Why some nodes would run on the CPU: all of them where the provider is not there, else those without a CUDA kernel."""
    options = _options()
    options.add_session_config_entry(_WHICH_NODES, "1")
    session = _created(path, options, {**provider, "enable_cuda_graph": "0"})
    providers = session.get_providers()
    if providers[0] != _PROVIDER:
        return _no_provider(providers)
    tell = getattr(session, "get_provider_graph_assignment_info", None)  # since ONNX Runtime 1.24
    parts = [] if tell is None else [part for part in tell() if part.ep_name != _PROVIDER]
    nodes = [f"{node.name or 'a node without a name'} ({node.op_type})" for part in parts for node in part.get_nodes()]
    return CapabilityError(
        f"ONNX Runtime has no CUDA kernel for all of {printable(path)}",
        why="the rest would run on the CPU, and what was measured would be neither",
        problems=nodes[:10],
        fix="--to tensorrt, torchscript_cuda or onnxruntime",
    )


def _no_provider(providers: Sequence[str]) -> CapabilityError:
    why = why_not() or f"it opened the session on {', '.join(providers)}, and logs why: a library of CUDA or cuDNN, or the driver"
    fix = "install CUDA and cuDNN in the versions of onnxruntime.ai's page on the CUDA execution provider"
    return CapabilityError("ONNX Runtime does not run on the GPU here", why=why, fix=fix)


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


def _run_options(graph_id: str) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options
