"""The float graph with activations as outputs, in the layout in which ONNX Runtime computes them.

ONNX Runtime keeps the channels of images in blocks (NCHWc) while it convolves, and turns every tensor that somebody wants
to see back into rows of pixels. Who only counts values does not mind their order: over ResNet-50, whose activations are
all looked at, that saves a seventh of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from deploykit.runtimes import onnxruntime

# ONNX Runtime's blocks have 8 or 16 channels, and where the last one is not full, zeros fill it that no layer computed.
_BLOCK = 16


@dataclass(frozen=True)
class Exposed:
    """A session of the graph; `source` is its input, `batch` the size of it when that is fixed.

    The values of a tensor are found in the output that `outputs` names, in any order but with the images first.
    """

    session: onnxruntime.OnnxSession
    source: str
    batch: int | None
    outputs: Mapping[str, str]


def expose(model: Path, tensors: Sequence[str], *, threads: int) -> Exposed:
    """Optimise the graph for this CPU with `tensors` as outputs, and open it; one run takes `threads` cores."""
    graph = onnx.load(model, load_external_data=False)
    source = graph.graph.input[0]
    known = {value.name for value in (source, *graph.graph.output)}
    graph.graph.output.extend(_output(name) for name in tensors if name not in known)
    dimension = source.type.tensor_type.shape.dim[0]
    with TemporaryDirectory() as folder:
        path = Path(folder, "graph.onnx")
        onnxruntime.write_optimized(graph.SerializeToString(), path)
        del graph
        blocked = _without_reorders(path)
        session = onnxruntime.open_optimized(path, threads=threads)
    outputs = {name: blocked.get(name, name) for name in tensors}
    return Exposed(session, source.name, dimension.dim_value if dimension.HasField("dim_value") else None, outputs)


def _without_reorders(path: Path) -> dict[str, str]:
    """Make what a ReorderOutput reads an output in its place; which for which. The file at `path` is replaced."""
    optimised = onnx.load(path, load_external_data=False)
    graph = optimised.graph
    outputs = {value.name for value in graph.output}
    read = {name for node in graph.node for name in node.input}
    found = {node.output[0]: node for node in graph.node if node.op_type == "ReorderOutput" and node.output[0] in outputs}
    blocked = {name: node.input[0] for name, node in found.items() if _channels(node) % _BLOCK == 0}
    for name in blocked.keys() - read:
        graph.node.remove(found[name])
    kept = [value for value in graph.output if value.name not in blocked]
    del graph.output[:]
    graph.output.extend([*kept, *(_output(name) for name in dict.fromkeys(blocked.values()))])
    onnx.save(optimised, path)
    return blocked


def _channels(reorder: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in reorder.attribute if attribute.name == "channels")


def _output(name: str) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
