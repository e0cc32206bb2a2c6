"""Readers of ONNX files that run in the child process of `deploykit.intake.child`, with the libraries that parse them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

from deploykit.intake.refused import Refused

# How ONNX Runtime and the C++ library say that there is no room.
_OF_MEMORY = ("alloc", "memory", "length_error", "max_size")
_OPEN = 64  # pixels
_MOST_FED = 4 << 20  # elements: 27 pictures of 224x224
_NUMPY = {f"tensor({kind})": name for kind, name in (("float", "float32"), ("float16", "float16"), ("double", "float64"))}
_NUMPY |= {f"tensor({kind})": kind for kind in ("uint8", "int8", "int32", "int64")}


def facts() -> Callable[[BinaryIO], dict[str, Any]]:
    """A reader that tells what a graph takes, answers and is made of. Imports onnx_ir before the limits begin."""
    import onnx
    import onnx_ir as ir

    def read(file: BinaryIO) -> dict[str, Any]:
        try:
            model = ir.from_proto(onnx.load_model_from_string(file.read()))
        except MemoryError:
            raise
        except Exception as error:  # protobuf and onnx_ir raise classes without a common base for a file that is not ONNX
            raise Refused(f"{type(error).__name__}: {error}") from error
        graph = model.graph
        operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in graph)
        constants = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
        return {
            "opset": dict(model.opset_imports),
            "ir_version": model.ir_version,
            "producer": model.producer_name,
            "inputs": {value.name: f"{value.dtype} {value.shape}" for value in graph.inputs},
            "outputs": {value.name: f"{value.dtype} {value.shape}" for value in graph.outputs},
            "constants": {
                "values": sum(math.prod(constant.shape.numpy()) for constant in constants),
                **Counter(str(value.dtype) for value in graph.initializers.values()),
            },
            "operators": dict(operators.most_common()),
            "quantize_linear": dict(
                Counter(str(node.outputs[0].dtype) for node in graph if node.op_type == "QuantizeLinear" and node.outputs)
            ),
        }

    return read


def rehearsal() -> Callable[[BinaryIO], str]:
    """A reader that opens a graph in ONNX Runtime, runs it once, and tells what ONNX Runtime has against it.

    Whoever opens the graph afterwards gets the same words from ONNX Runtime. What it has no memory for is Refused here, because
    there might be enough of it elsewhere.
    """
    import onnxruntime

    def read(file: BinaryIO) -> str:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            # Bytes, never a path: ONNX Runtime then finds no other file by what the graph says.
            session = onnxruntime.InferenceSession(file.read(), options, providers=["CPUExecutionProvider"])
            _run_once(session)
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime raises classes of its own that share no base below Exception
            told = str(error).strip()[:2000]
            if any(word in told.lower() for word in _OF_MEMORY):
                raise Refused(told, told="{} wants more memory than a network needs") from error
            return told or type(error).__name__
        return ""

    return read


def _run_once(session: Any) -> None:
    """On zeros, one image of a size that most networks take where a size is open; not when it takes very many at once."""
    import numpy as np

    fed = {}
    for taken in session.get_inputs():
        shape = [size if isinstance(size, int) else _OPEN if place > 1 else 1 for place, size in enumerate(taken.shape)]
        kind = _NUMPY.get(taken.type)
        if kind is None or math.prod(shape) > _MOST_FED:
            return
        fed[taken.name] = np.zeros(shape, kind)
    session.run(None, fed)
