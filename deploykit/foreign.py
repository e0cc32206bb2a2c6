"""A file that is not ours as an artifact: what it takes and answers is read from the file, and nothing else is known of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.artifact import SAMPLES, Artifact, Format, Precision, Preprocess, Samples, Tensors, TensorSpec, digest_file
from deploykit.errors import UsageError, printable
from deploykit.intake import door

FLOATS = ("float32", "float16", "float64")
_INTEGER_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QGemm", "ConvInteger", "MatMulInteger")
# By which a picture with its channels last is told: grey, RGB, RGBA.
_CHANNELS = (1, 3, 4)
_HALVES = {onnx.TensorProto.FLOAT16: Precision.FP16, onnx.TensorProto.BFLOAT16: Precision.BF16}


def onnx_file(path: Path) -> Artifact:
    """The ONNX file at `path`, with the inputs and outputs that its graph declares; `facts["model"]` is its digest.

    Its precision is INT8 where the graph quantizes anything, else that of most of its constants. No sample, no class name and no
    preprocessing comes with it: `preprocess` means nothing.

    Raises UsageError for a file that cannot be read, is no ONNX, keeps constants in other files, or whose inputs or outputs are
    no tensors.
    """
    graph = _graph(path)
    constants = {constant.name for constant in graph.initializer}
    taken = [value for value in graph.input if value.name not in constants]
    problems = [
        f"{kind} {printable(value.name)!r} is not a tensor of numbers"
        for kind, values in (("input", taken), ("output", graph.output))
        for value in values
        if _dtype(value) is None
    ]
    problems += ["it has no input"] * (not taken) + ["it has no output"] * (not graph.output)
    if problems:
        raise UsageError(f"{printable(path)} is no network that can be fed", problems=problems)
    inputs, outputs = (tuple(_spec(value) for value in values) for values in (taken, graph.output))
    return _artifact(path, Format.ONNX, _precision(graph), inputs, outputs)


def torchscript_file(path: Path, inputs: Sequence[TensorSpec]) -> Artifact:
    """The TorchScript file at `path`, of which the file does not say what it takes; its one output is called `output`."""
    return _artifact(path, Format.TORCHSCRIPT, Precision.FP32, tuple(inputs), (TensorSpec("output", "float32", ("batch",)),))


def opset(path: Path) -> int | None:
    """The version of ONNX's own operators that a file says it was written in; None where it names none."""
    model = onnx.load(path, load_external_data=False)
    return next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), None)


def is_open(spec: TensorSpec) -> bool:
    """Whether a dimension other than the first, the batch, is dynamic."""
    return any(not isinstance(size, int) for size in spec.shape[1:])


def settled(spec: TensorSpec, size: int | None, source: Path | str) -> TensorSpec:
    """`spec` with `size` for the height and the width where they are dynamic.

    Height and width are the last two of four dimensions, or those before a last one of 1, 3 or 4 channels. Raises UsageError
    when they are dynamic and there is no `size`, when another dimension but the first, the batch, is, and for an input that
    holds no floating-point numbers, which nothing here could make.
    """
    free = {place for place, one in enumerate(spec.shape) if place and not isinstance(one, int)}
    channels_last = len(spec.shape) == 4 and spec.shape[3] in _CHANNELS and 1 in free
    sides = {1, 2} if channels_last else {2, 3}
    told = f"{printable(source)}: input {printable(spec.name)!r} of {spec.dtype} {list(spec.shape)}"
    if spec.dtype not in FLOATS:
        raise UsageError(
            f"{told} cannot be fed", why=f"inputs are made as {', '.join(FLOATS)}, and nothing says what others mean"
        )
    if not spec.shape or (free and (len(spec.shape) != 4 or not free <= sides)):
        raise UsageError(f"{told} cannot be fed", why="at most the batch, the height and the width may be dynamic")
    if free and size is None:
        raise UsageError(f"{told} has no fixed size", fix="--size PIXELS is its height and width")
    rest = tuple(one if isinstance(one, int) else size or 0 for one in spec.shape[1:])
    return replace(spec, shape=(spec.shape[0], *rest))


def noise(spec: TensorSpec, count: int, *, seed: int = 0) -> NDArray[np.floating]:
    """`count` inputs of a settled `spec`, evenly spread over [-1, 1] and the same for the same seed."""
    shape = (count, *(int(size) for size in spec.shape[1:]))
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(spec.dtype)


def with_samples(model: Artifact, inputs: Tensors, folder: Path) -> Artifact:
    """A copy of the file in `folder`, which must exist, with `inputs` as its golden samples, whose answers are not known."""
    path = folder / "model.onnx"
    path.write_bytes(model.path.read_bytes())
    Samples(inputs, {}, {}).save(folder / SAMPLES)
    return replace(model, path=path)


def _graph(path: Path) -> onnx.GraphProto:
    elsewhere = door.onnx_file(path).external
    if elsewhere:
        named = ", ".join(map(printable, elsewhere[:3]))
        raise UsageError(
            f"{printable(path)} keeps {len(elsewhere)} of its constants in other files",
            why=f"a file from elsewhere could name any file of this machine; the first are {named}",
            fix="save it with its data inside: onnx.save(onnx.load(FILE), ANOTHER)",
        )
    door.rehearse(path)
    try:
        return onnx.load_model_from_string(path.read_bytes()).graph
    except Exception as error:  # protobuf raises classes without a common base for a file that is not ONNX
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{printable(path)} is not an ONNX file that can be read", why=why) from error


def _artifact(
    path: Path, form: Format, precision: Precision, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> Artifact:
    sha256 = digest_file(path)
    return Artifact(
        path=path,
        stage="foreign",
        key="",
        format=form,
        precision=precision,
        inputs=inputs,
        outputs=outputs,
        preprocess=Preprocess(None, (1, 1), (), ()),
        classes=(),
        sha256=sha256,
        parents=(),
        settings={},
        tools={},
        facts={"model": f"sha256 {sha256}"},
    )


def _precision(graph: onnx.GraphProto) -> Precision:
    if any(node.op_type in _INTEGER_OPS or node.op_type.startswith("QLinear") for node in graph.node):
        return Precision.INT8
    values = dict.fromkeys(_HALVES, 0)
    for constant in graph.initializer:
        values[constant.data_type] = values.get(constant.data_type, 0) + int(np.prod(constant.dims))
    most = max((kind for kind in (onnx.TensorProto.FLOAT, *_HALVES)), key=lambda kind: values.get(kind, 0))
    return _HALVES.get(most, Precision.FP32)


def _dtype(value: onnx.ValueInfoProto) -> str | None:
    """numpy's name of a tensor's type; None for what is no tensor of numbers."""
    kind = value.type.tensor_type.elem_type
    if not value.type.HasField("tensor_type") or kind in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        return None
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(kind).name
    except KeyError:
        return None


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    return TensorSpec(value.name, _dtype(value) or "", tuple(_dimensions(value.type.tensor_type.shape.dim)))


def _dimensions(dimensions: Iterable[onnx.TensorShapeProto.Dimension]) -> Iterable[int | str]:
    for position, dimension in enumerate(dimensions):
        fixed = dimension.HasField("dim_value") and dimension.dim_value > 0
        yield dimension.dim_value if fixed else dimension.dim_param or f"dimension {position}"
