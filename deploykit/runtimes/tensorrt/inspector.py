"""What an engine consists of, from the JSON of TensorRT's engine inspector.

TensorRT 10 writes a tensor's format and type as one text, `Format/Datatype`, TensorRT 11 as two. The precision of a layer is
read from the tensors that it takes, not from its name or its tactic. Sources: the fixtures of NVIDIA's trt-engine-explorer
(TensorRT v10.3.0), and "Migrating from TensorRT 10.x to 11.x", IEngineInspector.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from deploykit.artifact import Artifact, Precision
from deploykit.errors import StageError
from deploykit.runtimes import LayerPrecision, Realised
from deploykit.runtimes.onnx_nodes import Node

_TYPES = {
    "int8": r"\bint8\b",
    "uint8": r"\buint8\b",
    "bf16": r"\b(bf16|bfloat16|bfloat)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "fp8": r"\b(fp8|float8)",
    "fp32": r"\b(fp32|float|float32)\b",
    "int32": r"\bint32\b",
    "int64": r"\bint64\b",
    "int4": r"\bint4\b",
    "fp4": r"\b(fp4|float4)",
    "bool": r"\bbool\b",
}
_METADATA = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]*)\]")
_JOINTS = re.compile(r" \+ |\|\||\x1e|\x1f")
_PROFILE = re.compile(r" \[profile \d+\]$")
_BOUNDARY = ("quantize", "dequantize", "scaledquantize", "reformat", "noop")
_SYNCHRONIZATION = ("signal", "wait")  # between streams; they compute nothing


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine: the ONNX nodes in it, and the types and shapes of what it takes and gives."""

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    elements: int

    @property
    def is_boundary(self) -> bool:
        """Whether it only changes type or layout."""
        return self.kind.lower() in _BOUNDARY or self.name.startswith("Reformatting CopyNode")

    @property
    def precision(self) -> str:
        """What it computes on: the type of its first input, which is the data; the others are weights and residuals."""
        return self.takes[0] if self.takes else "unknown"


def read(text: str) -> list[EngineLayer]:
    """The layers in the order in which they run. Raises StageError when the text does not tell types.

    A synchronization between streams is not a layer.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError("TensorRT's engine inspector gave no list of layers", why=f"{type(error).__name__}: {error}") from error
    if not all(isinstance(layer, dict) for layer in layers):
        raise StageError(
            "TensorRT's engine inspector tells only names",
            why="the engine was built without ProfilingVerbosity.DETAILED",
            fix="build it with deploykit",
        )
    return [_layer(layer) for layer in layers if str(layer.get("Name", "")).lower() not in _SYNCHRONIZATION]


def realised(layers: Sequence[EngineLayer], wanted: Iterable[Node], model: Artifact) -> Realised:
    """What the layers of the exported graph run in, and a census of the engine's layers."""
    return Realised(tuple(_trace(node, layers, model) for node in wanted), _census(layers))


def source_of(layer: EngineLayer, wanted: Sequence[Node]) -> str:
    """The Conv, Gemm or MatMul that a layer computes; else the first node in it; empty for what TensorRT put in between."""
    if layer.is_boundary:
        return ""
    names = {node.name for node in wanted}
    return next((name for name in layer.nodes if name in names), layer.nodes[0] if layer.nodes else "")


def _layer(value: Mapping[str, Any]) -> EngineLayer:
    name = _PROFILE.sub("", str(value.get("Name", "")))
    inputs, outputs = value.get("Inputs") or [], value.get("Outputs") or []
    sizes = [_elements(tensor.get("Dimensions")) for tensor in outputs]
    return EngineLayer(
        name=name,
        kind=str(value.get("LayerType", "unknown")),
        tactic=str(value.get("TacticName") or value.get("TacticValue") or ""),
        nodes=_nodes(name, str(value.get("Metadata") or "")),
        takes=tuple(_type(tensor) for tensor in inputs),
        gives=tuple(_type(tensor) for tensor in outputs),
        elements=sum(sizes),
    )


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """The names of the ONNX nodes: from the metadata, which has them as they were, else from the layer's own name."""
    found = _METADATA.findall(metadata) or [part.strip() for part in _JOINTS.split(name)]
    return tuple(dict.fromkeys(found))


def _type(tensor: Mapping[str, Any]) -> str:
    # TensorRT 11 has both keys apart, and its Format may name the width of a vector, not a type.
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "").lower()
    return next((name for name, pattern in _TYPES.items() if re.search(pattern, text)), text or "unknown")


def _elements(dimensions: object) -> int:
    total = 1
    for size in cast(Sequence[int], dimensions) if isinstance(dimensions, list) else ():
        total *= max(0, int(size))
    return total


def _census(layers: Sequence[EngineLayer]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {"int8": Counter(), "float": Counter(), "boundary": Counter()}
    for layer in layers:
        kind = "boundary" if layer.is_boundary else "int8" if layer.precision == "int8" else "float"
        found[kind][layer.kind] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items()}


def _trace(node: Node, layers: Sequence[EngineLayer], model: Artifact) -> LayerPrecision:
    # A node's weights are folded away, but its input may be copied by a reformat that bears its name.
    within = [layer for layer in layers if node.name in layer.nodes and not layer.is_boundary]
    if not within:
        return LayerPrecision(node.name, node.op, "unknown", "", "no layer of the engine names it")
    layer = within[0]
    why = ""
    if model.precision is Precision.INT8 and layer.precision != "int8":
        chosen = cast(Mapping[str, str], model.facts["float_layers"]).get(node.name)
        why = chosen or "TensorRT did not fuse the Q/DQ around it"
        if chosen is None and len(layer.nodes) > 1:
            why += f"; it is one of {len(layer.nodes)} nodes in one layer, and only what that layer takes is known"
    return LayerPrecision(node.name, node.op, layer.precision, f"{layer.kind} {layer.tactic}".strip(), why)
