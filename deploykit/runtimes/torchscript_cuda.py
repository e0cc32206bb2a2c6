"""Our TorchScript file on the first GPU, by PyTorch: weights in the precision of the engine, CUDA graphs, events, pinned memory.

What is taken of torch.cuda stands in `Gpu`, so that the very same session runs on PyTorch's CPU device in tests. None of this has
run on a GPU: docs/runtimes.md says what was checked, and how.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from deploykit.artifact import Artifact, Format, Precision, Tensors, TensorSpec
from deploykit.errors import StageError, UsageError
from deploykit.jsonable import JSON, to_json
from deploykit.machine import Machine
from deploykit.runtimes import LayerPrecision, Realised, check_inputs, on_gpu, pieces
from deploykit.runtimes.on_gpu import Card, Place
from deploykit.runtimes.torchscript import opened, without_deprecation

ENGINE = "engine.pt"
_HALVES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LAYERS = {
    **{"aten::_convolution": "Conv", "aten::conv2d": "Conv", "aten::conv3d": "Conv"},
    **{"aten::linear": "Gemm", "aten::addmm": "Gemm", "aten::matmul": "MatMul", "aten::mm": "MatMul"},
}
# TorchScript records types in the first run of a shape and compiles in the second; cuDNN searches its algorithms in both. Neither
# may happen while a graph is captured (PyTorch, "CUDA semantics": warm up on a side stream).
_WARM_UP = 3
# PyTorch's flags belong to the process, and sessions may run in several threads.
_SETTINGS = threading.Lock()
_MOST_SHAPES = 8  # whose buffers and graphs are kept


class Graph(Protocol):
    """A captured CUDA graph (torch.cuda.CUDAGraph)."""

    def replay(self) -> None:
        """Put it on the current stream."""

    def reset(self) -> None:
        """Give its memory back."""


class Gpu:
    """What a session takes of torch.cuda: the first GPU and a stream of its own, on which work runs in order."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def card(self) -> Card:
        """What GPU it is."""
        found = torch.cuda.get_device_properties(self.device)
        return Card(found.name, (found.major, found.minor), found.multi_processor_count)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory of the host, which the GPU reads and writes without a detour."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def put(self, work: Callable[[], object]) -> None:
        """Put work on the stream."""
        with torch.cuda.stream(self._stream):
            work()

    def synchronize(self) -> None:
        """Wait until all is done that was put on the stream. Raises what failed there."""
        self._stream.synchronize()

    def captured(self, work: Callable[[], None]) -> Graph:
        """What `work` puts on the stream, not run but recorded. Raises RuntimeError when something in it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        # By thread: what other sessions do meanwhile cannot spoil it. Twice on the stream: where a capture does not end
        # well, torch's own context leaves it the current one.
        with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def event(self) -> Any:
        """A moment on the stream, with its time."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self, event: Any) -> None:
        """Note the time when the stream comes to it."""
        event.record(self._stream)

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """Nanoseconds between two recorded events, after waiting for the second; CUDA resolves about half a microsecond."""
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return round(milliseconds * 1e6)

    def give_back(self) -> None:
        """Return to the driver what PyTorch keeps of memory that nobody uses."""
        torch.cuda.empty_cache()


@dataclass
class _Place:
    """What one set of input shapes runs on: pinned memory and memory of the device for each input, the answers, and the graph."""

    hosts: list[torch.Tensor]
    inputs: list[torch.Tensor]
    answers: list[torch.Tensor] = field(default_factory=list)
    graph: Graph | None = None
    is_settled: bool = False


class TorchCudaSession:
    """A `Session`. The first execute of a shape runs it some times to settle, then captures a CUDA graph, which is launched from
    then on; `graph_refused` says why there is none. float32 goes in and comes out, whatever is computed in."""

    def __init__(
        self,
        module: torch.jit.ScriptModule,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        precision: Precision,
        gpu: Gpu,
    ) -> None:
        self._module, self._inputs, self._outputs, self._gpu = module, inputs, outputs, gpu
        self._half, self._tf32 = _HALVES.get(precision), precision is Precision.TF32
        self.graph_refused = ""
        self._places: dict[tuple[tuple[int, ...], ...], _Place] = {}
        self._now: _Place | None = None

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs to the device, by way of pinned memory."""
        check_inputs(inputs, [(spec.name, spec.dtype, spec.shape) for spec in self._inputs])
        place = self._now = self._place(tuple(inputs[spec.name].shape for spec in self._inputs))
        for spec, host in zip(self._inputs, place.hosts, strict=True):
            host.numpy()[...] = inputs[spec.name]

        def copy() -> None:
            for host, there in zip(place.hosts, place.inputs, strict=True):
                there.copy_(host, non_blocking=True)

        self._gpu.put(copy)
        self._gpu.synchronize()

    def execute(self) -> None:
        """Run once; the GPU is idle when this returns. Raises StageError with torch's words when the program fails."""
        place = self._fed()
        try:
            with self._exactly(place):
                if not place.is_settled:
                    self._settle(place)
                self._start(place)
                self._gpu.synchronize()
        except RuntimeError as error:
            raise StageError("the TorchScript program failed on the GPU", why=_last_line(error)) from error

    def fetch(self) -> Tensors:
        """The outputs of the last execute, copied by way of pinned memory."""
        answers = self._fed().answers
        hosts = [self._gpu.pinned(answer.shape, answer.dtype) for answer in answers]

        def copy() -> None:
            for host, answer in zip(hosts, answers, strict=True):
                host.copy_(answer, non_blocking=True)

        self._gpu.put(copy)
        self._gpu.synchronize()
        return {spec.name: np.array(host.numpy()) for spec, host in zip(self._outputs, hosts, strict=True)}

    def gpu_times(self, queries: int) -> list[int]:
        """Nanoseconds on the GPU, by CUDA events, of each of so many executes of what was fed: without copies, and with a
        captured graph without the time that the host takes to launch, since the GPU is still at work on one more when it comes to
        the first event; without one, a network of small kernels may have the host's launches in it."""
        self.execute()
        place, found = self._fed(), []
        start, end = self._gpu.event(), self._gpu.event()
        with self._exactly(place):
            for _ in range(queries):
                self._start(place)
                self._gpu.record(start)
                self._start(place)
                self._gpu.record(end)
                found.append(self._gpu.elapsed_ns(start, end))
        return found

    def close(self) -> None:
        """Drop the module and all buffers, and give their memory back."""
        for place in self._places.values():
            if place.graph is not None:
                place.graph.reset()
        self._places, self._now = {}, None
        del self._module
        self._gpu.give_back()

    def _fed(self) -> _Place:
        if self._now is None:
            raise UsageError("nothing was fed", fix="feed the session before it executes")
        return self._now

    def _place(self, shapes: tuple[tuple[int, ...], ...]) -> _Place:
        if shapes in self._places:
            return self._places[shapes]
        if len(self._places) == _MOST_SHAPES:
            oldest = self._places.pop(next(iter(self._places)))
            if oldest.graph is not None:
                oldest.graph.reset()
        types = [getattr(torch, spec.dtype) for spec in self._inputs]
        sizes = list(zip(shapes, types, strict=True))
        made = _Place([self._gpu.pinned(*size) for size in sizes], [self._gpu.memory(*size) for size in sizes])
        self._places[shapes] = made
        return made

    def _run(self, place: _Place) -> None:
        """One call of the program, from the buffers of the place to its answers."""
        with torch.inference_mode(), without_deprecation():
            given = [one.to(self._half) if self._half and one.is_floating_point() else one for one in place.inputs]
            answer = self._module(*given)
            answers = list(answer) if isinstance(answer, (tuple, list)) else [answer]
            place.answers = [one.float() if one.is_floating_point() else one for one in answers]

    def _exactly(self, place: _Place) -> AbstractContextManager[None]:
        """The process's settings while the program runs; a captured graph has its kernels, and asks for none."""
        return nullcontext() if place.graph is not None else exactly(tf32=self._tf32)

    def _start(self, place: _Place) -> None:
        self._gpu.put(place.graph.replay if place.graph is not None else lambda: self._run(place))

    def _settle(self, place: _Place) -> None:
        for _ in range(_WARM_UP):
            self._gpu.put(lambda: self._run(place))
            self._gpu.synchronize()
        if not self.graph_refused:
            try:
                place.graph = self._gpu.captured(lambda: self._run(place))
            except RuntimeError as error:  # what is really broken shows again when it is run without a graph
                self.graph_refused = _last_line(error)
        place.is_settled = True


def build(model: Artifact, folder: Path, *, threads: int) -> Artifact:
    """Write the program with its weights in the model's precision into `folder`, and run it once; `threads` means nothing here.

    Raises CapabilityError where the card has no such precision, StageError when the program cannot be computed in it.
    """
    if model.precision is Precision.INT8:
        raise UsageError("torchscript_cuda has no INT8", why="its format cannot hold Q/DQ")
    gpu = Gpu()
    card = gpu.card()
    on_gpu.require(model.precision, card)
    path = folder / ENGINE
    _write(model, path)
    engine = replace(
        model,
        path=path,
        stage="build",
        format=Format.ENGINE,
        parents=(model.sha256,),
        settings={"tf32": model.precision is Precision.TF32},
        tools={"torchscript_cuda": torch.__version__},
        facts={"runtime": "torchscript_cuda", "place": to_json(Place(_version(), card))},
        machine=Machine.probe(),
    )
    session = _opened(engine, gpu)
    try:
        session.feed({engine.inputs[0].name: pieces(engine, model.samples())[0]})
        session.execute()
        graph = session.graph_refused or "captured"
    finally:
        session.close()
    return replace(engine, facts={**engine.facts, "cuda_graph": graph})


def load(engine: Artifact) -> TorchCudaSession:
    """Open an engine. One that was built for another card or version is refused (UsageError).

    Loading one runs the program in it: only what this run made and what the user trusts come here.
    """
    gpu = Gpu()
    on_gpu.check(engine, Place(_version(), gpu.card()))
    return _opened(engine, gpu)


def realised(engine: Artifact, model: Artifact) -> Realised:
    """The layers of the program and the type of their weights, as the engine's file has them; needs no GPU.

    Which kernel of cuDNN or cuBLAS each one becomes, PyTorch decides when it runs.
    """
    graph = opened(engine.path, torch.device("cpu")).inlined_graph
    found, census = [], Counter[str]()
    for node in graph.nodes():
        kind = node.kind()
        if kind.startswith("aten::"):
            census[kind.removeprefix("aten::")] += 1
        if kind in _LAYERS:
            constants: list[Any] = [one.toIValue() for one in list(node.inputs())[1:]]
            types = [one.dtype for one in constants if isinstance(one, torch.Tensor)]
            precision = _NAMES.get(types[0], str(types[0])) if types else "unknown"
            if engine.precision is Precision.TF32 and precision == "fp32":
                precision = "tf32"
            found.append(LayerPrecision(node.output().debugName(), _LAYERS[kind], precision, kind))
    return Realised(tuple(found), {"int8": {}, "float": dict(sorted(census.items())), "boundary": {}})


def why_stale(engine: Artifact) -> list[str]:
    """Every reason why an engine has to be built again on this machine; none when it loads."""
    return on_gpu.why_stale(engine, Place(_version(), Gpu().card()))


def gpu() -> JSON:
    """What an engine depends on of the GPU here; None where there is none."""
    return None if why_not() else to_json(asdict(Gpu().card()))


def why_not() -> str:
    """Why no engine can be built or run on this machine; empty when it can."""
    if torch.version.cuda is None:
        return f"the PyTorch {torch.__version__} that is installed was built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is asked for below
        if torch.cuda.is_available():
            return ""
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            return f"PyTorch {torch.__version__} finds no GPU: {str(error).strip().splitlines()[0]}"
    return f"PyTorch {torch.__version__} finds no GPU"


def _version() -> str:
    return f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}"


def _opened(engine: Artifact, gpu: Gpu) -> TorchCudaSession:
    module = opened(engine.path, gpu.device)
    return TorchCudaSession(module, engine.inputs, engine.outputs, engine.precision, gpu)


def _write(model: Artifact, path: Path) -> None:
    """The program with weights in the type of the model's precision. A frozen one has constants, which `to` leaves."""
    half = _HALVES.get(model.precision)
    if half is None:
        shutil.copyfile(model.path, path)
        return
    module = opened(model.path, torch.device("cpu"))
    module.to(half)
    graph: Any = module.graph  # whose methods torch's stubs do not all have
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dtype == torch.float32:
            node.t_("value", node.t("value").to(half))
            node.output().inferTypeFrom(node.t("value"))
    with without_deprecation():
        path.write_bytes(module.save_to_buffer())


@contextmanager
def exactly(*, tf32: bool) -> Iterator[None]:
    """TF32 for products and convolutions as the engine says, and cuDNN's fastest algorithm as ONNX Runtime searches it, for this
    block alone: they are settings of the whole process, so of several threads one after the other is in such a block."""
    with _SETTINGS:
        yield from _set(tf32=tf32)


def _set(*, tf32: bool) -> Iterator[None]:
    backends: Any = torch.backends
    wanted = "tf32" if tf32 else "ieee"
    # Recurrent layers too: PyTorch refuses to read `allow_tf32` while these two of cuDNN differ.
    kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before, searched = [kind.fp32_precision for kind in kinds], backends.cudnn.benchmark
    try:
        for kind in kinds:
            kind.fp32_precision = wanted
        backends.cudnn.benchmark = True
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value
        backends.cudnn.benchmark = searched


def _last_line(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
