"""Where the suspect runs: its graphs, whole and layer by layer, opened in ONNX Runtime or in TensorRT."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import onnx

from deploykit import runtimes
from deploykit.artifact import Artifact, Tensors, TensorSpec
from deploykit.errors import CapabilityError, DeploykitError, StageError
from deploykit.runtimes import onnxruntime
from deploykit.runtimes.cudart import CudaError

if TYPE_CHECKING:
    from deploykit.runtimes.tensorrt.builder import Options
    from deploykit.runtimes.tensorrt.session import TensorRtSession


class Session(Protocol):
    """A graph that can run."""

    def feed(self, inputs: Tensors) -> None:
        """Give it the inputs."""

    def execute(self) -> None:
        """Run once."""

    def views(self) -> Tensors:
        """All outputs, which the next run may overwrite."""

    def close(self) -> None:
        """Give the memory back."""


class Opening(Protocol):
    """What opens graphs. With `one_size`, a graph takes the shapes alone that it is fed first."""

    one_size: bool

    def __call__(self, content: bytes) -> Session:
        """Open an ONNX file. Raises StageError or UsageError when it cannot run; some tell so only when they are fed."""


class OnOnnxRuntime:
    """Literally, without optimizations: what the graph means."""

    one_size = False

    def __call__(self, content: bytes) -> Session:
        """Open it; all activations are outputs, so memory is given back after each run. Raises StageError when it is refused."""
        try:
            return onnxruntime.reference(content, arena=False)
        except DeploykitError as error:
            raise StageError(error.what, why=error.why) from error


class OnTensorRt:
    """On TensorRT, strongly typed: outputs of the file are marked by its parser, so every tensor that is to be seen is one.

    A marked tensor is written out, so nothing is fused across it: it is TensorRT's arithmetic and its choice of kernels for each
    layer, not the very kernels of the engine. float32 is float32 here, without TF32, since the noise that is allowed is that of
    float32. `options` are those that the engine is built with. Everything that was opened is closed with this.
    """

    one_size = True

    def __init__(self, options: Options) -> None:
        self._options = options
        self._opened: list[_Built] = []

    def __call__(self, content: bytes) -> Session:
        """Remember the graph: it is built when the shapes of its inputs are known, which are those of the first images."""
        self._opened.append(_Built(content, self._options))
        return self._opened[-1]

    def close(self) -> None:
        """Close all engines."""
        for session in self._opened:
            session.close()


def on_tensorrt(suspect: Artifact | None) -> OnTensorRt:
    """TensorRT, with what the recipe asks for that made `suspect`. Raises CapabilityError where it does not run."""
    runtimes.get("tensorrt")
    from deploykit.runtimes import tensorrt
    from deploykit.runtimes.tensorrt.builder import Options

    if why := tensorrt.why_not():
        raise CapabilityError("nothing runs on TensorRT here", why=why, fix="bisect on the device, or without --runtime tensorrt")
    return OnTensorRt(Options() if suspect is None else Options.of(suspect))


class _Built:
    """An engine of a graph for the shapes of the first inputs."""

    def __init__(self, content: bytes, options: Options) -> None:
        self._content, self._options = content, options
        self._session: TensorRtSession | None = None

    def feed(self, inputs: Tensors) -> None:
        with _words():
            self._session = self._session or self._built({name: array.shape for name, array in inputs.items()})
            self._session.feed(inputs)

    def execute(self) -> None:
        with _words():
            assert self._session is not None
            self._session.execute()

    def views(self) -> Tensors:
        with _words():
            assert self._session is not None
            return self._session.fetch()

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None

    def _built(self, shapes: Mapping[str, tuple[int, ...]]) -> TensorRtSession:
        from deploykit.runtimes import tensorrt

        model = onnx.load_from_string(self._content)
        stored = {value.name for value in model.graph.initializer}
        for value in model.graph.input:
            if value.name not in stored:
                kind = value.type.tensor_type
                kind.shape.CopyFrom(onnx.helper.make_tensor_type_proto(kind.elem_type, shapes[value.name]).tensor_type.shape)
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        inputs = [TensorSpec(name, "float32", shape) for name, shape in shapes.items()]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            onnx.save(onnx.shape_inference.infer_shapes(model), path)
            return tensorrt.open_graph(path, inputs, self._options)


@contextmanager
def _words() -> Iterator[None]:
    """Whatever TensorRT refuses is a StageError whose `why` has all of its words, the parser's and the log's. A GPU that fails is
    the fault of no layer, and ends everything."""
    try:
        yield
    except CudaError as error:
        raise DeploykitError(error.what, why=error.why, fix="see whether the GPU has memory left, and try again") from error
    except DeploykitError as error:
        why = "; ".join([*error.problems, *filter(None, [error.why])])
        raise StageError(error.what, why=why or error.what) from error
