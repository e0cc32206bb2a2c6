"""Preprocessing in the graph: a program feeds the camera's bytes, and the network reads what it was made for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from deploykit.artifact import Preprocess
from deploykit.runtimes.onnx_nodes import MODULE_KEY

_PREFIX = "preprocess"


def take_bytes(model: ir.Model, how: Preprocess) -> None:
    """Let the graph take uint8 pixels in the layout that `how.feeds` names, in place; its input keeps its name.

    Cast, Div by 255, Sub of the mean, Div by the deviation: the operations of `data.pictures.normalised` in its order, each
    rounded to float32, so that the values are the same bits. Folded into one Mul and one Add they would not be.
    """
    graph = model.graph
    floats = graph.inputs[0]
    assert floats.shape is not None
    assert floats.name is not None
    sizes = list(floats.shape)
    is_last = how.feeds == "uint8 NHWC"
    pixels = ir.Value(
        name=floats.name,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([sizes[index] for index in (0, 2, 3, 1)] if is_last else sizes),
    )
    prefix = _unused(graph)
    made: list[ir.Node] = []

    def then(op: str, inputs: list[ir.Value], attributes: dict[str, object], dtype: ir.DataType) -> ir.Value:
        again = sum(node.op_type == op for node in made)
        name = f"{prefix}/{op}" + (f"_{again}" if again else "")
        node = ir.node(op, inputs, attributes, name=name, metadata_props={MODULE_KEY: prefix})  # type: ignore[arg-type]
        value = node.outputs[0]
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(sizes)
        made.append(node)
        return value

    value = then("Transpose", [pixels], {"perm": [0, 3, 1, 2]}, ir.DataType.UINT8) if is_last else pixels
    value = then("Cast", [value], {"to": ir.DataType.FLOAT.value}, ir.DataType.FLOAT)
    for op, name, numbers in (("Div", "largest", (255.0,)), ("Sub", "mean", how.mean), ("Div", "std", how.std)):
        value = then(op, [value, _constant(graph, f"{prefix}.{name}", numbers)], {}, ir.DataType.FLOAT)
    floats.replace_all_uses_with(value, replace_graph_outputs=True)
    floats.name = f"{prefix}/unused"
    graph.inputs[0] = pixels
    graph.insert_before(graph.node(0), made)


class TakesBytes(nn.Module):
    """The same in front of a PyTorch module, for TorchScript."""

    def __init__(self, module: nn.Module, how: Preprocess) -> None:
        super().__init__()
        self.module = module
        self.is_last = how.feeds == "uint8 NHWC"
        self.largest, self.mean, self.std = (_column(numbers) for numbers in ((255.0,), how.mean, how.std))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (N, H, W, C) or (N, C, H, W) to what the module answers."""
        x = pixels.permute(0, 3, 1, 2) if self.is_last else pixels
        answer: torch.Tensor = self.module((x.contiguous().to(torch.float32) / self.largest - self.mean) / self.std)
        return answer


def _column(numbers: tuple[float, ...]) -> nn.Buffer:
    return nn.Buffer(torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1))


def _constant(graph: ir.Graph, name: str, numbers: tuple[float, ...]) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, np.float32).reshape(-1, 1, 1), name=name)
    shape = ir.Shape([len(numbers), 1, 1])
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _unused(graph: ir.Graph) -> str:
    """A name for the module of these nodes that none of the network's has."""
    names = {name for node in graph for name in [node.name or ""]}
    prefix = _PREFIX
    while any(name.startswith((f"{prefix}/", f"{prefix}.")) for name in names):
        prefix += "_"
    return prefix
