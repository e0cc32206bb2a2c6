"""Which operators of a graph run as one kernel, as TensorRT and ONNX Runtime fuse them.

A convolution or matrix product takes the activations and residual additions that follow it; chains of pointwise operators
are one kernel; reshapes, constants and Q/DQ are none. A Concat is none where all that it joins is written by kernels, which
write into its place (NVIDIA TensorRT developer guide, layer fusion; onnxruntime docs, graph optimizations).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ACTIVATIONS = frozenset(
    {
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Elu",
        "Selu",
        "Softplus",
        "Mish",
        "Gelu",
    }
    | {"Swish"}
)
POINTWISE = ACTIVATIONS | frozenset(
    {"Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Sqrt", "Exp", "Log", "Erf", "Abs", "Neg", "Reciprocal", "Where", "Sum"}
    | {"BatchNormalization", "Equal", "Greater", "Less", "Not", "And", "Or", "Floor", "Ceil", "Round"}
)
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
_VIEWS = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear"}
)
_OF_SHAPES = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})
# x * sigmoid(x) is a kernel of its own, as TensorRT's PointWise and as ONNX Runtime's QuickGelu.
_AFTER_A_PRODUCT = (ACTIVATIONS - {"Swish", "HardSwish", "Mish", "Gelu"}) | {"Add", "Sum", "BatchNormalization"}


@dataclass(frozen=True)
class Operator:
    """One node of a graph; empty input names are optional inputs left out.

    `inputs` are named by the kernel that made them, `given` as the node itself names them: views in between change the shape.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()


@dataclass
class Group:
    """Operators that run as one kernel: what it reads, its constants, and what others read of it."""

    operators: list[Operator]
    inputs: set[str] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)
    is_int8: bool = False


def fused(
    operators: Sequence[Operator],
    constants: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    results: Iterable[str],
) -> list[Group]:
    """The kernels of a graph whose operators are in topological order; `results` are its outputs."""
    simple, known, through_int8 = _simplified(operators, constants)
    simple = _with_swishes(simple)
    uses = Counter(name for operator in simple for name in set(operator.inputs))
    uses.update(results)
    groups: list[Group] = []
    made_by: dict[str, int] = {}
    for operator in simple:
        data = [name for name in operator.inputs if name and name not in known]
        host = _host(operator, data, groups, made_by, uses, shapes)
        if host is None:
            groups.append(Group([operator]))
            host = len(groups) - 1
        else:
            groups[host].operators.append(operator)
        group = groups[host]
        group.inputs |= {name for name in data if made_by.get(name) != host}
        group.constants |= {name for name in operator.inputs if name in known and name in shapes}
        group.is_int8 |= operator.op in _PRODUCTS and bool(set(data) & through_int8)
        group.outputs = set(operator.outputs) if len(group.operators) > 1 else {name for name in operator.outputs if name}
        made_by.update(dict.fromkeys(operator.outputs, host))
    return [group for group in groups if not _is_free(group, made_by)]


def _host(
    operator: Operator,
    data: Sequence[str],
    groups: Sequence[Group],
    made_by: Mapping[str, int],
    uses: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
) -> int | None:
    """The kernel that takes an operator in: the last one that makes an input of it that nothing else reads."""
    if operator.op not in POINTWISE:
        return None
    found = [
        made_by[name]
        for name in data
        if name in made_by
        and uses[name] == 1
        and shapes.get(name) == shapes.get(operator.outputs[0])
        and _takes(groups[made_by[name]], operator)
    ]
    return max(found, default=None)


def _takes(group: Group, operator: Operator) -> bool:
    if group.operators[0].op in _PRODUCTS:
        return operator.op in _AFTER_A_PRODUCT
    return group.operators[0].op in POINTWISE


def _is_free(group: Group, made_by: Mapping[str, int]) -> bool:
    """Whether it costs no kernel: a Concat of what kernels write."""
    return group.operators[0].op == "Concat" and all(name in made_by for name in group.inputs)


def _simplified(
    operators: Sequence[Operator], constants: Collection[str]
) -> tuple[list[Operator], frozenset[str], frozenset[str]]:
    """Without views, Q/DQ, shape arithmetic and what follows from constants alone; the constants; what came through Q/DQ."""
    known, same, through = {*constants}, dict[str, str](), set[str]()
    kept = []
    for operator in operators:
        inputs = tuple(same.get(name, name) for name in operator.inputs)
        data = [name for name in inputs if name]
        if operator.op in _VIEWS and data:
            same.update(dict.fromkeys(operator.outputs, inputs[0]))
            if operator.op == "DequantizeLinear":
                through.add(inputs[0])
        elif operator.op in _OF_SHAPES or operator.op == "Constant" or all(name in known for name in data):
            known.update(operator.outputs)
        else:
            kept.append(replace(operator, inputs=inputs, given=operator.inputs))
    return kept, frozenset(known), frozenset(through)


def _with_swishes(operators: Sequence[Operator]) -> list[Operator]:
    """x * sigmoid(x), as exporters write SiLU, and x * hardsigmoid(x) as one operator of one input."""
    uses = Counter(name for operator in operators for name in set(operator.inputs))
    gates = {operator.outputs[0]: operator for operator in operators if operator.op in ("Sigmoid", "HardSigmoid")}
    swishes: dict[str, Operator] = {}
    merged: set[str] = set()
    for operator in operators:
        gate = next((gates[name] for name in operator.inputs if name in gates), None)
        if operator.op == "Mul" and gate is not None and gate.inputs[0] in operator.inputs and uses[gate.outputs[0]] == 1:
            swishes[operator.outputs[0]] = replace(operator, op="Swish", inputs=(gate.inputs[0],))
            merged.add(gate.outputs[0])
    return [swishes.get(operator.outputs[0], operator) for operator in operators if operator.outputs[0] not in merged]
