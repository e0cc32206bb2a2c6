"""The first layer whose result is not a number, in an ONNX graph or a PyTorch network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from deploykit import runtimes
from deploykit.artifact import Tensors
from deploykit.crosscheck.pairing import Pairs, fed
from deploykit.crosscheck.sides import Side
from deploykit.errors import DeploykitError, printable
from deploykit.runtimes import onnxruntime


def broken(answered: Sequence[NDArray[np.floating]]) -> list[int]:
    """The indices of the images that any output, one array for each, answers with NaN or infinity."""
    fine = [np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in answered]
    found: list[int] = np.flatnonzero(~np.logical_and.reduce(fine)).tolist()
    return found


def blame(side: Side, pairs: Pairs, image: Sequence[NDArray[np.floating]]) -> str:
    """Where the answer to one image, an array of one row for each input, stops being a number, in words."""
    return first_layer(side, fed(side, pairs, [runtimes.padded(array, side.batch) for array in image]))


def told(side: Side, rows: Sequence[int], names: Sequence[str], where: str) -> str:
    """Which images `side` answers with NaN or infinity, in words; `rows` are their indices, and `where` it begins."""
    return f"{side.label} answers {len(rows)} inputs with NaN or infinity, the first is {names[rows[0]]}; {where}"


def first_layer(side: Side, inputs: Tensors) -> str:
    """Where the first result that is not a number comes from, in words; what cannot be looked into is said too."""
    if side.module is not None:
        return _in_module(side.module, next(iter(inputs.values())))
    if side.model is not None and side.model.path.suffix == ".onnx":
        return _in_graph(side, inputs)
    return f"no layer can be named: {side.kind} cannot be looked into"


def _in_graph(side: Side, inputs: Tensors) -> str:
    assert side.model is not None
    model = onnx.load(side.model.path, load_external_data=False)
    declared = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output if name and name not in declared
    )
    try:
        session = onnxruntime.reference(model.SerializeToString())
        values = runtimes.run(session, inputs)
    except (DeploykitError, RuntimeError) as error:  # a graph of 2 GiB with its weights, an output that is no tensor
        return f"no layer can be named: {str(error).splitlines()[0]}"
    session.close()
    for node in model.graph.node:
        if any(not _finite(values[name]) for name in node.output if name in values):
            return f"the first layer with one is {printable(node.name) or 'a node without a name'} ({printable(node.op_type)})"
    return "executed literally, every layer gives numbers: it is what the optimizer made of the graph that does not"


def _in_module(module: torch.nn.Module, image: NDArray[np.floating]) -> str:
    found: list[str] = []

    def watch(name: str, kind: str) -> object:
        def look(_module: object, _inputs: object, output: object) -> None:
            if not found and isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"{name} ({kind})")

        return look

    hooks = [layer.register_forward_hook(watch(name, type(layer).__name__)) for name, layer in module.named_modules() if name]
    try:
        with torch.inference_mode():
            module(torch.from_numpy(np.array(image)))
    finally:
        for hook in hooks:
            hook.remove()
    return f"the first layer with one is {found[0]}" if found else "no layer alone gives one: it is between layers"


def _finite(values: NDArray[np.generic]) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
