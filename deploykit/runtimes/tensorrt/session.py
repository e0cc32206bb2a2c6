"""A loaded engine: feed, execute, fetch on buffers of its own, by CUDA alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import numpy as np
import tensorrt as trt
from numpy.typing import NDArray

from deploykit.artifact import Tensors
from deploykit.errors import StageError, UsageError
from deploykit.runtimes import check_inputs
from deploykit.runtimes.cudart import Cuda, CudaError
from deploykit.runtimes.tensorrt.callbacks import LayerTimes, Log

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class _Tensor:
    """An input or output: the shape with -1 where it is dynamic, room for the largest on the device and in pinned memory."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    address: int
    host: NDArray[np.uint8]

    def view(self, shape: Sequence[int]) -> NDArray[np.generic]:
        """The pinned memory as an array of that shape."""
        return self.bytes(shape).view(self.dtype).reshape(shape)

    def bytes(self, shape: Sequence[int]) -> NDArray[np.uint8]:
        """As much of the pinned memory as an array of that shape takes."""
        return self.host[: math.prod(shape) * self.dtype.itemsize]


class TensorRtSession:
    """A `Session`. The first execute of a shape enqueues the layers one by one; then they are captured as a CUDA graph, which
    later executes launch. `graph_refused` says why there is none, where CUDA or TensorRT cannot capture the engine.

    Memory is taken once, for the largest shapes, so addresses never change and feeding another batch size allocates nothing.
    """

    def __init__(self, engine: trt.ICudaEngine, cuda: Cuda, log: Log, *, graphs: bool = True) -> None:
        self._engine, self._cuda, self._log, self._graphs = engine, cuda, log, graphs
        self.graph_refused = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: int | None = None
        self._graph_of = ExitStack()
        with ExitStack() as opening:
            self._stream = opening.enter_context(cuda.stream())
            self._context = log.made("execution context", engine.create_execution_context())
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
            largest = {name: _largest(engine, name) for name in given}
            self._resize(largest)
            self._inputs = [self._opened(name, largest[name], opening) for name in given]
            self._outputs = [self._opened(name, self._shape(name), opening) for name in names if name not in given]
            for tensor in (*self._inputs, *self._outputs):
                if not self._context.set_tensor_address(tensor.name, tensor.address):
                    raise log.failure(f"TensorRT refuses the memory for tensor {tensor.name!r}")
            opening.enter_context(self._graph_of)  # given back first, for it holds the addresses of the buffers
            self._resources = opening.pop_all()

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs to the device. Raises UsageError, with the profile, for a shape that the engine was not built for."""
        check_inputs(inputs, [(tensor.name, tensor.dtype.name, _any_where_dynamic(tensor.shape)) for tensor in self._inputs])
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            self._check_profile(shapes)
            self._resize(shapes)
        for tensor in self._inputs:
            tensor.view(shapes[tensor.name])[...] = inputs[tensor.name]
            self._cuda.to_device(tensor.address, tensor.bytes(shapes[tensor.name]), self._stream)
        self._cuda.synchronize(self._stream)

    def execute(self) -> None:
        """Run once; the GPU is idle when this returns. Raises StageError with TensorRT's words when it cannot."""
        self._start()
        self._cuda.synchronize(self._stream)
        # Only now: TensorRT finishes work of a new shape in its first enqueue, which cannot be captured.
        if self._graphs and self._graph is None and not self.graph_refused:
            self._capture()

    def fetch(self) -> Tensors:
        """The outputs of the last execute, copied."""
        shapes = {tensor.name: self._shape(tensor.name) for tensor in self._outputs}
        for tensor in self._outputs:
            self._cuda.to_host(tensor.bytes(shapes[tensor.name]), tensor.address, self._stream)
        self._cuda.synchronize(self._stream)
        return {tensor.name: np.array(tensor.view(shapes[tensor.name])) for tensor in self._outputs}

    def gpu_times(self, queries: int) -> list[int]:
        """Nanoseconds on the GPU, by CUDA events, of each of so many executes of what was fed: without copies and without the
        time that the host takes to launch the first kernel (trtexec calls it "GPU Compute Time")."""
        self.execute()
        found = []
        with self._cuda.event() as start, self._cuda.event() as end:
            for _ in range(queries):
                self._start()  # so that the GPU is still at work when the host launches the next one
                self._cuda.record(start, self._stream)
                self._start()
                self._cuda.record(end, self._stream)
                found.append(self._cuda.elapsed_ns(start, end))
        return found

    def layer_times(self, queries: int) -> Mapping[str, float]:
        """Median nanoseconds of each layer of the engine, in the order in which they run.

        For a session of its own: layers are timed one by one, which slows them down, and cannot be while a graph runs.
        """
        times = self._times = LayerTimes()  # TensorRT holds no reference, and the context goes on calling it
        self._context.profiler = times
        self._context.enqueue_emits_profile = False
        self._drop_graph()
        for _ in range(queries):
            self._enqueue()
            self._cuda.synchronize(self._stream)
            if not self._context.report_to_profiler():
                raise self._log.failure("TensorRT reports no times of layers")
        return {name: median(found) * 1e6 for name, found in times.milliseconds.items()}

    def layers(self) -> str:
        """What the engine consists of, in JSON, with the shapes of what was fed."""
        inspector = self._log.made("engine inspector", self._engine.create_engine_inspector())
        inspector.execution_context = self._context
        text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return text

    def close(self) -> None:
        """Give all memory back; the session cannot be used afterwards."""
        self._resources.close()
        del self._context, self._engine, self._inputs, self._outputs

    def _opened(self, name: str, largest: Sequence[int], opening: ExitStack) -> _Tensor:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            fix = "export it with float32 inputs and outputs; inside, the network may be of any type"
            raise UsageError(f"tensor {name!r} of the engine is {kind}, which numpy has no type for", fix=fix)
        dtype = np.dtype(_DTYPES[kind])
        size = math.prod(largest) * dtype.itemsize
        address = opening.enter_context(self._cuda.memory(size))
        host = opening.enter_context(self._cuda.pinned(size))
        return _Tensor(name, dtype, tuple(self._engine.get_tensor_shape(name)), address, host)

    def _resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._drop_graph()
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._log.failure(f"TensorRT refuses shape {list(shape)} for input {name!r}")
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._log.failure("TensorRT cannot infer the shapes of the outputs") from error
        if unknown:
            raise self._log.failure(f"TensorRT cannot infer the shapes of {', '.join(map(repr, unknown))}")
        self._shapes = dict(shapes)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise StageError(f"the shape of output {name!r} depends on the data: {list(shape)}")
        return shape

    def _check_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        problems = []
        for tensor in self._inputs:
            if -1 not in tensor.shape:
                continue
            smallest, best, largest = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(tensor.name, 0))
            shape = shapes[tensor.name]
            if any(not low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)):
                problems.append(
                    f"input {tensor.name!r} has shape {list(shape)}; the engine's profile is {list(smallest)} to "
                    f"{list(largest)}, best at {list(best)}"
                )
        if problems:
            raise UsageError("the engine was not built for this shape", problems=problems, fix="build it with another profile")

    def _start(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._log.failure("TensorRT failed while running the engine")

    def _capture(self) -> None:
        """Capture a graph, or note why there is none. What is really broken shows again when the layers are enqueued."""
        try:
            self._graph = self._graph_of.enter_context(self._cuda.graph(self._stream, self._enqueue))
        except CudaError as error:
            self.graph_refused = f"{error.what}: {error.why}"
        except StageError as error:
            self.graph_refused = "; ".join([error.what, *error.problems])

    def _drop_graph(self) -> None:
        self._graph = None
        self._graph_of.close()


def _largest(engine: trt.ICudaEngine, name: str) -> tuple[int, ...]:
    """The largest shape of an input: by the profile where it is dynamic."""
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape
    return tuple(engine.get_tensor_profile_shape(name, 0)[2])


def _any_where_dynamic(shape: Sequence[int]) -> list[int | str | None]:
    return [None if size < 0 else size for size in shape]
