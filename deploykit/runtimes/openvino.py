"""OpenVINO on the CPU: the engine is the model as compiled for one batch size, with the ONNX file for all other sizes.

This module runs on devices: standard library, numpy and openvino only, Python 3.10.
"""

from __future__ import annotations

import io
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from deploykit.artifact import Artifact, Format, Precision, Tensors, TensorSpec
from deploykit.errors import DeploykitError, StageError, UsageError, printable
from deploykit.jsonable import to_json
from deploykit.machine import Machine, available_cores, cpu_features
from deploykit.runtimes import LayerPrecision, Realised, check_inputs
from deploykit.runtimes.onnx_nodes import LAYERS, Node, external_tensors, layers_of, read_nodes

# `import openvino` (2026.4) sends an event to Google Analytics from a process that it forks, unless its telemetry package is
# missing: then it takes a stub. Others, such as NNCF, may import that package again afterwards.
_HIDDEN = "openvino_telemetry" not in sys.modules
if _HIDDEN:
    sys.modules["openvino_telemetry"] = cast(Any, None)
try:
    import openvino
finally:
    if _HIDDEN:
        del sys.modules["openvino_telemetry"]

# The compiled model as `export_model` writes it: OpenVINO's graph after all transformations. It gave the same bits and the
# same kernels as the compiled ONNX file, and loaded in a fifth of the time (ResNet-18 0.03 for 0.13 s).
ENGINE = "engine.blob"
SOURCE = "model.onnx"
KERNELS = "kernels.json"  # what was compiled: a loaded engine runs it, but has forgotten what is in a kernel of several layers
# How many batch sizes stay compiled; beyond it the one that was not used for longest goes.
_KEPT = 4
_INTEGERS = ("u8", "i8")
_PRECISIONS = {"u8": "int8", "i8": "int8", "f32": "fp32", "f16": "fp16", "bf16": "bf16"}
_KERNELS = ("Convolution", "FullyConnected", "MatMul")
_SNIPPETS = "Subgraph"  # several operators compiled into one kernel, matrix products among them
_Made = TypeVar("_Made")


class OpenVinoSession:
    """A `Session` on memory that belongs to OpenVINO, so that `execute` neither copies nor allocates.

    Every batch size is compiled for itself when it is first fed, because one model for all of them is slower: MobileNetV3-large
    2.1 instead of 1.5 ms, DenseNet-121 12.6 instead of 9.7.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], first: Any, compile_for: _Compile) -> None:
        self._inputs, self._outputs, self._compile_for = inputs, outputs, compile_for
        shapes = tuple(_first_shape(spec) for spec in inputs)
        self._request = first.create_infer_request()
        self._requests = {shapes: self._request}

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs into the memory of the model for their batch size, which is compiled where it is a new one."""
        check_inputs(inputs, [(spec.name, spec.dtype, spec.shape) for spec in self._inputs])
        shapes = tuple(inputs[spec.name].shape for spec in self._inputs)
        self._request = self._requests.pop(shapes, None) or self._compile_for(shapes).create_infer_request()
        self._requests[shapes] = self._request
        if len(self._requests) > _KEPT:
            del self._requests[next(iter(self._requests))]
        for name, array in inputs.items():
            self._request.get_tensor(name).data[...] = array

    def execute(self) -> None:
        """Run once; the CPU is idle when this returns. Raises StageError with OpenVINO's words when a kernel fails."""
        try:
            # Outputs that are shared are not copied; `start_async` and `wait` cost 50 microseconds more.
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise StageError("OpenVINO failed while running the model", why=_words(error)) from error

    def fetch(self) -> Tensors:
        """The outputs of the last execute, copied."""
        return {spec.name: np.array(self._request.get_tensor(spec.name).data) for spec in self._outputs}

    def close(self) -> None:
        """Free all compiled models; the session cannot be used afterwards."""
        del self._request, self._requests, self._compile_for


_Shapes = tuple[tuple[int, ...], ...]
_Compile = Callable[[_Shapes], Any]


def build(model: Artifact, folder: Path, *, threads: int) -> Artifact:
    """Compile `model` for this CPU and write the engine into `folder`: for its batch size, or for 1 where that is dynamic,
    with a copy of the ONNX file for the other sizes.

    Raises UsageError when tensors of the model lie in other files.
    """
    settings = _settings(threads or available_cores())
    content = model.path.read_bytes()
    compiled = _compiled(content, model.path, model.inputs, tuple(_first_shape(spec) for spec in model.inputs), settings)
    written: io.BytesIO = compiled.export_model()
    (folder / ENGINE).write_bytes(written.getbuffer())
    (folder / KERNELS).write_text(json.dumps([to_json(kernel) for kernel in kernels(compiled)], indent=1) + "\n")
    if _is_dynamic(model):
        (folder / SOURCE).write_bytes(content)
    return replace(
        model,
        path=folder / ENGINE,
        stage="build",
        format=Format.ENGINE,
        parents=(model.sha256,),
        settings=settings,
        tools={"openvino": openvino.__version__},
        facts={"runtime": "openvino"},
        machine=Machine.probe(),
    )


def load(engine: Artifact) -> OpenVinoSession:
    """Open an engine built by this OpenVINO version for this CPU; others are refused (UsageError)."""

    def compile_for(shapes: _Shapes) -> Any:
        source = engine.folder / SOURCE
        return _compiled(source.read_bytes(), source, engine.inputs, shapes, engine.settings)

    return OpenVinoSession(engine.inputs, engine.outputs, _imported(engine), compile_for)


def realised(engine: Artifact, model: Artifact) -> Realised:
    """Which kernel each Conv, Gemm and constant MatMul of `model` became, as the compiled graph said when it was built."""
    nodes = read_nodes(model.path)
    written = json.loads((engine.folder / KERNELS).read_text())
    found = [Kernel(**{**item, "gives": tuple(item["gives"]), "names": tuple(item["names"])}) for item in written]
    layers = tuple(_trace(layer, nodes, found, model) for layer in layers_of(model, nodes))
    return Realised(layers, kernels=_census(found))


@dataclass(frozen=True)
class Kernel:
    """One node of the compiled graph: its kind, its primitive, the type it computes on and those it gives, and the nodes of
    the ONNX file that it came from."""

    kind: str
    primitive: str
    takes: str
    gives: tuple[str, ...]
    names: tuple[str, ...]


def kernels(compiled: Any) -> list[Kernel]:
    """All nodes that run for each input: neither constants nor what is computed from constants alone."""
    found: list[Kernel] = []
    constants: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        sources = [value.get_source_output().get_node().get_friendly_name() for value in node.inputs()]
        if facts["layerType"] == "Const" or (sources and constants.issuperset(sources)):
            constants.add(node.get_friendly_name())
        elif facts["layerType"] not in ("Input", "Output"):
            gives, names = (tuple(facts[key].split(",")) for key in ("outputPrecisions", "originalLayersNames"))
            found.append(Kernel(facts["layerType"], facts["primitiveType"], facts["runtimePrecision"], gives, names))
    return found


def _census(running: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """Kernels by what they take and give; a layer whose result is float counts as int8 where it multiplies integers."""
    found: dict[str, Counter[str]] = {"int8": Counter(), "float": Counter(), "boundary": Counter()}
    for kernel in running:
        takes, gives = kernel.takes in _INTEGERS, set(kernel.gives) <= set(_INTEGERS)
        is_alike = takes == gives or kernel.kind in _KERNELS
        found["boundary" if not is_alike else "int8" if takes else "float"][kernel.kind] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items()}


def _trace(layer: Node, nodes: Sequence[Node], running: Sequence[Kernel], model: Artifact) -> LayerPrecision:
    kernel, precision = _kernel_of(layer, nodes, running)
    why = ""
    if model.precision is Precision.INT8 and precision != "int8":
        chosen = cast(Mapping[str, str], model.facts["float_layers"]).get(layer.name)
        why = chosen or "OpenVINO did not fuse the Q/DQ around it"
    return LayerPrecision(layer.name, layer.op, precision, kernel, why)


def _kernel_of(layer: Node, nodes: Sequence[Node], running: Sequence[Kernel]) -> tuple[str, str]:
    """The kernel that a layer became, and its precision.

    A kernel is called after the layer, with additions like /WithoutBiases; or after the network's output; or, where it took
    the bias from an Add, after that.
    """
    readers = [node.name for node in nodes if node.op not in LAYERS and set(layer.outputs) & set(node.inputs)]
    candidates = [kernel for kinds in (_KERNELS, (_SNIPPETS,)) for kernel in running if kernel.kind in kinds]
    for names in ([layer.name], layer.outputs, readers):
        for kernel in candidates:
            found = [own for own in kernel.names for name in names if own == name or own.startswith(f"{name}/")]
            if found:
                return f"{kernel.kind} {kernel.primitive}", _precision(kernel, found)
    return "fused", Precision.FP32.value


def _precision(kernel: Kernel, found: Sequence[str]) -> str:
    """What one layer of a kernel runs in. Matrix products of two precisions may be compiled into one kernel, whose type is
    that of the first; behind one of integers OpenVINO left the multiplication that dequantizes."""
    if kernel.kind == _SNIPPETS:
        return "int8" if any("/Dequantization" in own for own in found) else Precision.FP32.value
    return _PRECISIONS.get(kernel.takes, kernel.takes)


def _settings(threads: int) -> dict[str, Any]:
    """OpenVINO's properties, as the manifest of an engine has them: one query at a time, and nothing coarser than the graph
    says. By default it computes float layers in bfloat16 where the CPU can, and quantizes the inputs of some by itself."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


def _first_shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(1 if isinstance(size, str) else size for size in spec.shape)


def _is_dynamic(model: Artifact) -> bool:
    return any(_first_shape(spec) != spec.shape for spec in model.inputs)


def _compiled(content: bytes, path: Path, inputs: Sequence[TensorSpec], shapes: _Shapes, settings: Mapping[str, Any]) -> Any:
    """The ONNX file compiled for inputs of `shapes`."""
    # Given bytes, OpenVINO looks for external data in the current directory and above it.
    outside = external_tensors(path)
    if outside:
        raise UsageError(f"{printable(path)} has tensors in other files", problems=outside[:5], fix="export it as one file")

    def compile_() -> Any:
        core = openvino.Core()
        model = core.read_model(content)
        model.reshape({spec.name: list(shape) for spec, shape in zip(inputs, shapes, strict=True)})
        return core.compile_model(model, "CPU", dict(settings))

    return _in_our_words(path, compile_)


def _imported(engine: Artifact) -> Any:
    """The compiled model of an engine, opened on this machine. Raises UsageError on another one."""
    arch, features = platform.machine(), cpu_features()
    there, version = engine.machine, engine.tools.get("openvino")
    if there is not None and ((there.arch, there.features) != (arch, features) or version != openvino.__version__):
        raise UsageError(
            f"cannot load {printable(engine.path)} on this machine",
            why=f"it was built on {there.cpu} ({', '.join(there.features)}) with OpenVINO {version}; "
            f"here: {arch} ({', '.join(features)}) with {openvino.__version__}",
            fix="build it here from the portable ONNX file",
        )
    content = engine.path.read_bytes()
    return _in_our_words(engine.path, lambda: openvino.Core().import_model(content, "CPU", dict(engine.settings)))


def _in_our_words(path: Path, make: Callable[[], _Made]) -> _Made:
    try:
        return make()
    except Exception as error:  # RuntimeError, and on a damaged engine MemoryError and others
        raise DeploykitError(f"OpenVINO refuses {printable(path)}", why=_words(error)) from error


def _words(error: Exception) -> str:
    """OpenVINO's message without the lines that say where in its sources it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Exception from")]
    return " ".join(line for line in lines if line) or type(error).__name__
