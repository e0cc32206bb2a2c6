"""An ONNX graph written to disk: in one file, or above protobuf's limit with its weights in a file beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from deploykit.errors import StageError, is_utf8

# protobuf holds a message's size in 31 bits (protobuf.dev/programming-guides/proto-limits); the rest is for nodes and names.
LIMIT_BYTES = (1 << 31) - (16 << 20)
# What is smaller stays in the graph, where shape inference reads it.
_SMALL_BYTES = 4096


def write(model: ir.Model, path: Path, *, limit: int = LIMIT_BYTES) -> None:
    """Write the graph at `path` and check the file as it was written; above `limit` bytes of weights, these go to PATH.data.

    Raises StageError when the file is not valid ONNX.
    """
    is_large = sum(tensor.nbytes for tensor in model.graph.initializers.tensors()) > limit
    ir.save(model, path, external_data=f"{path.name}.data" if is_large else None, size_threshold_bytes=_SMALL_BYTES)
    try:
        # By its path it goes three times as fast, and no message may have 2 GiB; but the checker takes no path that is not UTF-8.
        onnx.checker.check_model(str(path) if is_large or is_utf8(path) else onnx.load(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError("the exported file is not valid ONNX", why=str(error).strip().partition("\n")[0]) from error
