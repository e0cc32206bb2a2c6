"""Any height and width: whether a network takes them, and whether its file answers like it there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploykit.artifact import Artifact, Preprocess
from deploykit.data.pictures import normalised
from deploykit.errors import DeploykitError, StageError
from deploykit.export.reference import checked_error, torch_logits
from deploykit.models import Model
from deploykit.recipe import ExportTable
from deploykit.runtimes import Session, run

# Multiples of what networks for 224 pixels divide their input by, so that the other size divides as evenly.
_STEPS = (32, 64)
_FIX = 'export.size = "fixed"; another fixed size by preprocess.crop, where the network takes one'


def other_size(fed: NDArray[Any], how: Preprocess) -> NDArray[Any]:
    """The first two inputs, as they are fed, with more rows and still more columns: pictures go on where they began."""
    rows, columns = (1, 2) if how.feeds == "uint8 NHWC" else (2, 3)
    more = [(0, 0)] * fed.ndim
    more[rows], more[columns] = ((0, step) for step in _STEPS)
    return np.ascontiguousarray(np.pad(fed[:2], more, mode="wrap"))


def require_any_size(model: Model, fed: NDArray[Any], how: Preprocess) -> None:
    """Raise StageError, with PyTorch's reason, when the network itself does not take another height and width."""
    inputs = normalised(other_size(fed, how), how)
    try:
        with torch.inference_mode():
            model.module(torch.from_numpy(inputs))
    except Exception as error:  # a forward raises whatever its author or torch chose
        height, width = inputs.shape[2:]
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise StageError(
            f"{model.name} has one input size only",
            why=f"at {height}x{width} PyTorch itself says {type(error).__name__}: {first}",
            fix=_FIX,
        ) from error


def check_other_size(
    what: str, model: Model, artifact: Artifact, session: Session, fed: NDArray[Any], settings: ExportTable
) -> None:
    """Compare an open file with PyTorch at another height and width; raises StageError when it answers otherwise, or not."""
    inputs = other_size(fed, artifact.preprocess)
    size = artifact.inputs[0].shape[0]
    inputs = np.resize(inputs, (size, *inputs.shape[1:])) if isinstance(size, int) else inputs
    wanted = torch_logits(model, normalised(inputs, artifact.preprocess))
    try:
        answer = run(session, {artifact.inputs[0].name: inputs})[artifact.outputs[0].name]
    except DeploykitError as error:
        raise StageError(f"the {what} file of {model.name} takes one size only", why=error.why or error.what, fix=_FIX) from error
    if answer.shape != wanted.shape:
        why = f"its answer has shape {answer.shape} where PyTorch's has {wanted.shape}"
        raise StageError(f"the {what} file of {model.name} does not hold at another size", why=why, fix=_FIX)
    checked_error(f"{what} (at another height and width)", answer, wanted, settings.tolerance)
