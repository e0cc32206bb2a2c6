"""ONNX Runtime on the CPU: the engine is its offline optimized graph together with the session settings.

This module runs on devices: standard library, numpy and onnxruntime only, Python 3.10.
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

# ONNX Runtime 1.31 from PyPI writes and may send usage data by default on Linux; it reads this when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime

from deploykit.artifact import Artifact, Format, Precision, Samples, Tensors
from deploykit.errors import DeploykitError, StageError, UsageError, printable
from deploykit.jsonable import JSON
from deploykit.machine import Machine, available_cores, cpu_features
from deploykit.runtimes import KernelTime, LayerPrecision, Realised, answers, check_inputs, pieces, run
from deploykit.runtimes.onnx_nodes import Node, external, layers_of, read_nodes

ENGINE = "engine.onnx"
VERSION: str = onnxruntime.__version__
# The first quantizes, per tensor, the float weights of a layer between a DequantizeLinear and a QuantizeLinear: exactly those
# layers that were kept in float. The second removes the Identity through which all float readers share one DequantizeLinear.
_NOT_OURS = ("WeightBiasQuantization", "EliminateIdentity")
SETTINGS = "session.json"
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
# Kernels that multiply integers; everything else that came from a Conv, Gemm or MatMul multiplies floats.
_INT8_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")
_LAYERS = ("Conv", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip", "Add", "Sigmoid", "HardSwish", "HardSigmoid", "Tanh", "LeakyRelu")
# What ONNX Runtime adds to the name of a node that it fused, re-laid out or copied.
_DECORATION = re.compile(r"^fused |(_nchwc|_token_\d+)+$")
_KERNEL = "_kernel_time"  # how events of a profile are called
# Warnings (severity 2) tell about the graph's own properties, such as an engine being tied to this CPU; errors raise.
_ERRORS_ONLY = 3


class OnnxSession:
    """A `Session` on bound buffers, so that `execute` neither copies nor allocates inputs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._expected = [(item.name, DTYPES.get(item.type, item.type), item.shape) for item in session.get_inputs()]
        self._outputs = [item.name for item in session.get_outputs()]
        sizes = {size for _, _, shape in self._expected for size in shape}
        # As many boxes as there are: answers to inputs of one size may differ in size.
        given = [size for item in session.get_outputs() for size in item.shape if not isinstance(size, int)]
        self._is_open = any(size not in sizes for size in given)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, onnxruntime.OrtValue] = {}

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs into buffers that belong to the session."""
        check_inputs(inputs, self._expected)
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes or self._is_open:
            # ONNX Runtime keeps the outputs it allocated in the binding and refuses them for another batch.
            for name in self._outputs:
                self._binding.bind_output(name, "cpu")
        if shapes == self._shapes:
            # The same memory again, as a program would have it that measures no allocation.
            for name, array in inputs.items():
                self._buffers[name].update_inplace(array)
            return
        for name, array in inputs.items():
            self._buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array))
            self._binding.bind_ortvalue_input(name, self._buffers[name])
        self._shapes = shapes

    def execute(self) -> None:
        """Run once; the CPU is idle when this returns. Raises StageError with ONNX Runtime's words when a kernel fails."""
        try:
            self._session.run_with_iobinding(self._binding)
        except RuntimeError as error:
            raise StageError("ONNX Runtime failed while running the model", why=str(error)) from error

    def fetch(self) -> Tensors:
        """The outputs of the last execute, copied."""
        return {name: np.array(value) for name, value in zip(self._outputs, self._binding.copy_outputs_to_cpu(), strict=True)}

    def views(self) -> Tensors:
        """The outputs of the last execute where they lie, not copied: gone with the next execute."""
        return {name: value.numpy() for name, value in zip(self._outputs, self._binding.get_outputs(), strict=True)}

    def another(self) -> OnnxSession:
        """The same loaded model with buffers of its own, for another thread: both may execute at once."""
        return OnnxSession(self._session)

    def close(self) -> None:
        """Free the session; it cannot be used afterwards."""
        del self._binding, self._buffers, self._session


def build(model: Artifact, folder: Path, *, threads: int) -> Artifact:
    """Optimise `model` for this CPU and write the optimized graph and its session settings into `folder`."""
    threads = threads or available_cores()
    settings: dict[str, JSON] = {"intra_op_num_threads": threads, "graph_optimization": "all, offline"}
    options = _options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / ENGINE)
    content = content_of(model.path)
    if isinstance(content, Path):  # above what one file holds, the engine too has its weights beside it
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{ENGINE}.data")
    try:
        _open(content, options, model.path, disabled=_NOT_OURS)
    except DeploykitError:
        # ONNX Runtime calls a full disk a failed serialization; one more file of that size makes the disk itself answer.
        (folder / "probe").write_bytes(bytes(model.path.stat().st_size))
        raise
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return replace(
        model,
        path=folder / ENGINE,
        stage="build",
        format=Format.ENGINE,
        parents=(model.sha256,),
        settings=settings,
        tools={"onnxruntime": onnxruntime.__version__},
        facts={"runtime": "onnxruntime"},
        machine=Machine.probe(),
    )


def load(engine: Artifact) -> OnnxSession:
    """Open an engine built by this ONNX Runtime version for this CPU.

    The optimized graph may hold layouts and fused kernels of the CPU it was made on, so another CPU or another
    version is refused (UsageError).
    """
    arch, features = platform.machine(), cpu_features()
    there = engine.machine
    version = engine.tools.get("onnxruntime")
    if there is not None and ((there.arch, there.features) != (arch, features) or version != onnxruntime.__version__):
        raise UsageError(
            f"cannot load {printable(engine.path)} on this machine",
            why=f"it was built on {there.cpu} ({', '.join(there.features)}) with ONNX Runtime {version}; "
            f"here: {arch} ({', '.join(features)}) with {onnxruntime.__version__}",
            fix="build it here from the portable ONNX file",
        )
    options = _options(_threads(engine))
    # The optimizer has run offline; running it again only costs time at load.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxSession(_open(content_of(engine.path), options, engine.path))


def reference(model: Path | bytes, *, threads: int = 0, optimise: bool = False, arena: bool = True) -> OnnxSession:
    """Open an ONNX file with all optimisations off, where Q/DQ is executed literally: the meaning of the graph.

    `optimise` switches them on, for float graphs that only have to be evaluated fast. Without `arena`, memory is
    given back after each run, which matters when all activations are outputs.
    """
    options = _options(threads or available_cores())
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = arena
    content = model if isinstance(model, bytes) else content_of(model)
    return OnnxSession(_open(content, options, model if isinstance(model, Path) else Path("model.onnx")))


def optimized(model: Path, *, threads: int = 1) -> OnnxSession:
    """Open an ONNX file with the optimizations of `build`, done in memory for the CPU that this process runs on."""
    options = _options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return OnnxSession(_open(content_of(model), options, model, disabled=_NOT_OURS))


def write_optimized(content: bytes, path: Path) -> None:
    """Optimise a graph for this CPU and write it to `path`, its weights beside it."""
    options = _options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.weights")
    options.add_session_config_entry("session.disable_prepacking", "1")
    _open(content, options, path)


def open_optimized(path: Path, *, threads: int) -> OnnxSession:
    """Open what `write_optimized` wrote, whose files may then be removed.

    From a path, because ONNX Runtime maps the weights beside it into memory and does not copy them.
    """
    options = _options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxSession(_open(path, options, path))


def literally(model: Artifact, path: Path, samples: Samples) -> Samples:
    """The golden samples with `expected` as the graph at `path` answers them when it is executed literally.

    `model` says what the graph's input and output are.
    """
    from deploykit import scenes  # a device that only loads this module has no use for it, and pays for it at each start

    session = reference(path)
    if scenes.kind_of(model.outputs) == "boxes":
        expected = scenes.stacked([run(session, {model.inputs[0].name: piece}) for piece in pieces(model, samples)])
    else:
        expected = {model.outputs[0].name: answers(session, model, pieces(model, samples))}
    session.close()
    return replace(samples, expected=expected)


def realised(engine: Artifact, model: Artifact) -> Realised:
    """Which kernel each Conv, Gemm and constant MatMul of `model` became, read from the optimized graph.

    A layer is found again by its node name, which ONNX Runtime keeps through fusion and layout changes.
    """
    return traced(read_nodes(engine.path), model)


def traced(after: Sequence[Node], model: Artifact) -> Realised:
    """Which of the nodes that ONNX Runtime left of `model`, `after` its optimizations, each layer became."""
    before = read_nodes(model.path)
    return Realised(
        layers=tuple(_trace(node, before, after, model) for node in layers_of(model, before)),
        kernels=_census(after),
    )


def profile(engine: Artifact, model: Artifact, inputs: Tensors, *, queries: int) -> list[KernelTime]:
    """Median time of every kernel over `queries` runs, after as many to warm up."""
    options = _options(_threads(engine))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        opened = _open(content_of(engine.path), options, engine.path)
        session = OnnxSession(opened)
        for _ in range(2 * queries):
            run(session, inputs)
        events = json.loads(Path(opened.end_profiling()).read_text())
        session.close()
    nodes = read_nodes(model.path)
    sources = {name: layer.name for layer in layers_of(model, nodes) for name in _names_after_fusion(layer, nodes)}
    names = {node.name for node in nodes}
    times: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith(_KERNEL):
            sizes = [np.prod(shape) for typed in event["args"]["output_type_shape"] for shape in typed.values()]
            key = (str(event["name"]).removesuffix(_KERNEL), str(event["args"]["op_name"]), int(sum(sizes)))
            times[key].append(1000 * int(event["dur"]))
    return [
        KernelTime(name, op, _source(name, op, sources, names), float(np.median(found[len(found) // 2 :])), elements)
        for (name, op, elements), found in times.items()
    ]


def _source(kernel: str, op: str, sources: Mapping[str, str], names: Collection[str]) -> str:
    """The node of the exported graph that a kernel computes; a fused layer's is the layer."""
    name = _DECORATION.sub("", kernel)
    if any(layer in op for layer in _LAYERS):
        return sources.get(name, "")
    return name if name in names and op not in ("QuantizeLinear", "DequantizeLinear") else ""


def _census(nodes: Sequence[Node]) -> dict[str, dict[str, int]]:
    """Kernels by what they run on; integers are followed from where they are made through what passes them on."""
    integers: set[str] = set()
    found: dict[str, Counter[str]] = {"int8": Counter(), "float": Counter(), "boundary": Counter()}
    for node in nodes:
        on_integers = any(name in integers for name in node.inputs)
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            kind, gives_integers = "boundary", node.op == "QuantizeLinear"
        elif node.op in _INT8_KERNELS or on_integers:
            # A float result needs no QuantizeLinear after it, so whatever reads it counts as float again.
            kind, gives_integers = "int8", not _gives_float(node)
        else:
            kind, gives_integers = "float", False
        found[kind][node.op] += 1
        if gives_integers:
            integers.update(node.outputs)
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items()}


def _gives_float(node: Node) -> bool:
    return node.op == "MatMulIntegerToFloat" or (node.op == "QGemm" and len(node.inputs) < 8)


def _trace(layer: Node, before: Sequence[Node], after: Sequence[Node], model: Artifact) -> LayerPrecision:
    names = _names_after_fusion(layer, before)
    kernels = [node for node in after if _DECORATION.sub("", node.name) in names and any(op in node.op for op in _LAYERS)]
    kernel = kernels[0].op if kernels else "fused"
    if kernel in _INT8_KERNELS:
        return LayerPrecision(layer.name, layer.op, "int8", kernel)
    if model.precision is not Precision.INT8:
        return LayerPrecision(layer.name, layer.op, model.precision.value, kernel)
    chosen = cast(Mapping[str, str], model.facts["float_layers"]).get(layer.name)
    return LayerPrecision(layer.name, layer.op, "fp32", kernel, chosen or "ONNX Runtime did not fuse the Q/DQ around it")


def _names_after_fusion(layer: Node, before: Sequence[Node]) -> set[str]:
    """A fused kernel is called after the layer, or after the Relu, Clip or residual Add that was fused into it."""
    names, reached = {layer.name}, set(layer.outputs)
    for node in before:
        if node.op in _FUSED and reached & set(node.inputs):
            names.add(node.name)
            reached |= set(node.outputs) if node.op == "Add" else set()
    return names


def _threads(engine: Artifact) -> int:
    return int(cast(int, engine.settings["intra_op_num_threads"]))


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return options


def content_of(path: Path) -> bytes | Path:
    """What is opened of a file: its bytes, or the path where its weights lie beside it, as in files of ours above 2 GB.

    Given bytes, ONNX Runtime refuses external data. So a path is given only where all of them are in PATH.data, in the same
    folder, no link, and within its size. Raises UsageError elsewhere.
    """
    content = path.read_bytes()
    try:
        outside = external(path, content)
    except UsageError:  # what is wrong with it is for ONNX Runtime to say
        return content
    if not outside:
        return content
    beside = path.with_name(f"{path.name}.data")
    size = beside.stat().st_size if beside.is_file() and not beside.is_symlink() else -1
    problems = [f"{item.tensor}: its data are in {item.location!r}" for item in outside if item.location != beside.name]
    problems += [
        f"{item.tensor}: bytes {item.offset} to {item.offset + item.length} of a file of {size}"
        for item in outside
        if item.offset < 0 or item.length < 0 or item.offset + item.length > size
    ]
    if problems or size < 0:
        raise UsageError(
            f"{printable(path)} keeps weights outside of it",
            problems=problems[:5],
            why=f"only {printable(beside.name)} beside it is read, a file and no link" + ("; there is none" if size < 0 else ""),
        )
    return path


def _open(
    content: bytes | Path, options: onnxruntime.SessionOptions, path: Path, *, disabled: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """Bytes for a file that is not our own: ONNX Runtime then refuses external data, by which a model reads foreign files."""
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except Exception as error:  # onnxruntime raises classes of its own that share no base below Exception
        raise DeploykitError(f"ONNX Runtime refuses {printable(path)}", why=str(error).strip()) from error
