"""ONNX Runtime on the CPU: the engine is its offline optimized graph together with the session settings.

This module runs on devices: standard library, numpy and onnxruntime only, Python 3.10.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
from deploykit.runtimes import LayerPrecision, Realised, answers, check_inputs, pieces
from deploykit.runtimes.onnx_nodes import Node, read_nodes

ENGINE = "engine.onnx"
# It quantizes, per tensor, the float weights of a layer between a DequantizeLinear and a QuantizeLinear: exactly those
# layers that were kept in float.
_NOT_OURS = ("WeightBiasQuantization",)
SETTINGS = "session.json"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
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
# Warnings (severity 2) tell about the graph's own properties, such as an engine being tied to this CPU; errors raise.
_ERRORS_ONLY = 3


class OnnxSession:
    """A `Session` on bound buffers, so that `execute` neither copies nor allocates inputs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._expected = [(item.name, _DTYPES.get(item.type, item.type), item.shape) for item in session.get_inputs()]
        self._outputs = [item.name for item in session.get_outputs()]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, onnxruntime.OrtValue] = {}

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs into buffers that belong to the session."""
        check_inputs(inputs, self._expected)
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes == self._shapes:
            # The same memory again, as a program would have it that measures no allocation.
            for name, array in inputs.items():
                self._buffers[name].update_inplace(array)
            return
        # ONNX Runtime keeps the outputs it allocated in the binding and refuses them for another batch.
        for name in self._outputs:
            self._binding.bind_output(name, "cpu")
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
    try:
        _open(model.path.read_bytes(), options, model.path, disabled=_NOT_OURS)
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
    options = _options(int(cast(int, engine.settings["intra_op_num_threads"])))
    # The optimizer has run offline; running it again only costs time at load.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxSession(_open(engine.path.read_bytes(), options, engine.path))


def reference(model: Path | bytes, *, threads: int = 0, optimise: bool = False, arena: bool = True) -> OnnxSession:
    """Open an ONNX file with all optimisations off, where Q/DQ is executed literally: the meaning of the graph.

    `optimise` switches them on, for float graphs that only have to be evaluated fast. Without `arena`, memory is
    given back after each run, which matters when all activations are outputs.
    """
    options = _options(threads or available_cores())
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = arena
    content = model if isinstance(model, bytes) else model.read_bytes()
    return OnnxSession(_open(content, options, model if isinstance(model, Path) else Path("model.onnx")))


def literally(model: Artifact, path: Path, samples: Samples) -> Samples:
    """The golden samples with `expected` as the graph at `path` answers them when it is executed literally.

    `model` says what the graph's input and output are.
    """
    session = reference(path)
    answered = answers(session, model, pieces(model, samples))
    session.close()
    return replace(samples, expected={model.outputs[0].name: answered})


def realised(engine: Artifact, model: Artifact) -> Realised:
    """Which kernel each Conv, Gemm and constant MatMul of `model` became, read from the optimized graph.

    A layer is found again by its node name, which ONNX Runtime keeps through fusion and layout changes.
    """
    before, after = read_nodes(model.path), read_nodes(engine.path)
    return Realised(
        layers=tuple(_trace(node, before, after, model) for node in before if _is_layer(node, model)),
        kernels=_census(after),
    )


def _is_layer(node: Node, model: Artifact) -> bool:
    """In an INT8 graph what its quantization calls a layer; in a float graph whatever may be one."""
    if model.precision is not Precision.INT8:
        return node.op in _LAYERS
    facts = cast(Mapping[str, Sequence[str]], model.facts)
    return node.name in facts["int8_layers"] or node.name in facts["float_layers"]


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


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return options


def _open(
    content: bytes, options: onnxruntime.SessionOptions, path: Path, *, disabled: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """Bytes, not a path: ONNX Runtime then refuses external data, which is how a model reads foreign files."""
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except Exception as error:  # onnxruntime raises classes of its own that share no base below Exception
        raise DeploykitError(f"ONNX Runtime refuses {printable(path)}", why=str(error).strip()) from error
