"""PyTorch module -> ONNX graph by torch's two exporters, and which of them is right for which network.

The new one (torch.export) sees the whole program; the legacy one (TorchScript tracing) writes what one input made happen.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from torch import nn

from deploykit.errors import StageError
from deploykit.export.cleanup import BATCH, HEIGHT, WIDTH
from deploykit.export.reference import INPUT, OUTPUT
from deploykit.models import Model
from deploykit.recipe import ExportTable
from deploykit.runtimes.onnx_nodes import MODULE_KEY

Exporter = Literal["new", "legacy"]
OTHER: Mapping[Exporter, Exporter] = {"new": "legacy", "legacy": "new"}
# The networks for which the new exporter, the default of torch, is not the right one, each with the reason.
LEGACY: Mapping[str, str] = {}
_UNSUPPORTED = (
    re.compile(r"No ONNX function found for <OpOverload\(op='(?P<op>[\w.]+)', overload='(?P<overload>\w+)'\)>"),
    re.compile(r"Exporting the operator '(?P<op>[\w:]+)' to ONNX opset version \d+ is not supported"),
)


def choice(name: str, settings: ExportTable) -> tuple[Exporter, str]:
    """Which exporter `settings` mean for the network `name`, and why."""
    if settings.exporter != "auto":
        return settings.exporter, "as the recipe asks"
    if name in LEGACY:
        return "legacy", LEGACY[name]
    return "new", "the default of torch, and no exception of ours"


def exported(
    model: Model,
    samples: NDArray[np.float32],
    settings: ExportTable,
    exporter: Exporter = "new",
    *,
    outputs: Sequence[str] = (OUTPUT,),
) -> ir.Model:
    """The graph as that exporter writes it, float in and out. Raises StageError with the reason at the bottom of its error."""
    example = torch.from_numpy(example_inputs(samples, settings))
    try:
        with _quiet():
            return _EXPORTERS[exporter](model.module, example, settings, outputs)
    except Exception as error:  # torch.export and torch.onnx raise classes without a common base
        raise StageError(
            f"{model.name} cannot be exported to ONNX", why=_reason(error, model.module, example), fix=_advice(settings)
        ) from error


def folded(model: ir.Model) -> ir.Model:
    """The legacy exporter's graph without what depends on nothing but shapes that are known: it leaves chains of constants, and
    both branches of an If for every squeeze."""
    return onnxscript.optimizer.optimize(model, onnx_shape_inference=True)


def example_inputs(samples: NDArray[np.float32], settings: ExportTable) -> NDArray[np.float32]:
    """Inputs to trace on, (2 or the fixed batch, C, H, W): torch.export takes a batch of one for a constant."""
    size = 2 if settings.batch == "dynamic" else settings.batch
    return np.resize(samples, (size, *samples.shape[1:]))


def dynamic_axes(settings: ExportTable) -> dict[int, str]:
    """Which dimensions of the input are open by `settings`, with their names."""
    axes = {0: BATCH} if settings.batch == "dynamic" else {}
    return axes | ({2: HEIGHT, 3: WIDTH} if settings.size == "dynamic" else {})


def _by_new(module: nn.Module, example: torch.Tensor, settings: ExportTable, outputs: Sequence[str]) -> ir.Model:
    axes = dynamic_axes(settings)
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=settings.opset,
        input_names=[INPUT],
        output_names=list(outputs),
        dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None,
        verbose=False,
    )
    assert program is not None
    return program.model


def _by_legacy(module: nn.Module, example: torch.Tensor, settings: ExportTable, outputs: Sequence[str]) -> ir.Model:
    axes = dynamic_axes(settings)
    batched = {0: BATCH} if 0 in axes else {}
    # Into a folder, because above 2 GB this exporter writes the weights into files beside the graph.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "model.onnx")
        with _mute():
            torch.onnx.export(
                module,
                (example,),
                str(path),
                dynamo=False,
                opset_version=settings.opset,
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_axes={INPUT: axes, **dict.fromkeys(outputs, batched)} if axes else None,
            )
        model = ir.external_data.load_to_model(ir.load(path))
    paths = {name for name, _ in module.named_modules()}
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = _path_of(node.name or "", paths)
    passes.LiftConstantsToInitializersPass()(model)
    passes.ShapeInferencePass(data_prop=True)(model)
    return model


_EXPORTERS: Mapping[Exporter, Callable[[nn.Module, torch.Tensor, ExportTable, Sequence[str]], ir.Model]] = {
    "new": _by_new,
    "legacy": _by_legacy,
}


def _path_of(node: str, paths: set[str]) -> str:
    """The module's path from the name that the legacy exporter gives a node, such as /layer1/layer1.0/conv1/Conv.

    Each part is a module's own name, with its container's in front where it is a number.
    """
    path = ""
    for part in node.split("/")[1:-1]:
        inside = f"{path}." if path else ""
        fitting = [name for name in paths if name.startswith(inside) and _short_name(name) == part]
        if fitting:
            path = min(fitting, key=lambda name: (name.count("."), name))
    return path


def _short_name(path: str) -> str:
    """The last part of a path that is no number, with the numbers behind it."""
    parts = path.split(".")
    first = max((index for index, part in enumerate(parts) if not part.isnumeric()), default=0)
    return ".".join(parts[first:])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print: pages of a graph that failed, advice for their authors, deprecated APIs of torch."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        # TracerWarning is a Warning of its own; that a traced program is wrong is found by comparing.
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Without what C++ prints to the process's standard output, where results go: the legacy exporter's graph, when it fails."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _reason(error: BaseException, module: nn.Module, example: torch.Tensor) -> str:
    """What went wrong at the bottom; for an operator without a counterpart in ONNX, which it is and where it stands."""
    bottom = _bottom(error)
    for pattern in _UNSUPPORTED:
        found = pattern.search(str(bottom))
        if found:
            return f"ONNX has no operator for {_calls(module, example, found['op'].replace('::', '.'))} ({_first_lines(bottom)})"
    return _first_lines(bottom)


def _calls(module: nn.Module, example: torch.Tensor, operator: str) -> str:
    """An operator, or the one that torch made it of (aten.special_bessel_j0 becomes prims.bessel_j0), and the modules, by path,
    in whose forward it is called."""
    found: dict[str, dict[str, None]] = {}
    try:
        with _quiet():
            program = torch.export.export(module, (example,), strict=False)
    except Exception:  # what cannot be captured cannot be searched; the operator is known all the same
        return operator
    for node in program.graph.nodes:
        name = str(node.target).removesuffix(".default")
        if node.op == "call_function" and name.endswith(operator.rpartition(".")[2]):
            path, kind = next(reversed(node.meta["nn_module_stack"].values()))
            kind = kind if isinstance(kind, str) else kind.__name__
            found.setdefault(name, {})[f"module {path or '(the network itself)'} ({kind.rpartition('.')[2]})"] = None
    return ", ".join(f"{name}, which {' and '.join(modules)} uses" for name, modules in found.items()) or operator


def _advice(settings: ExportTable) -> str:
    if settings.size == "dynamic":
        return 'export.size = "fixed", where a layer needs to know its height and width'
    return "" if settings.cross_check or settings.exporter != "auto" else "--cross-check tries torch's other exporter as well"


def _bottom(error: BaseException) -> BaseException:
    """The exporters wrap what went wrong in their own words and advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_lines(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"
