"""What the PyTorch module answers, and how far the file's answers are from it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from deploykit.errors import StageError
from deploykit.models import Model
from deploykit.runtimes import padded

INPUT, OUTPUT = "image", "logits"
# What PyTorch is given at once: with more, the results of the first layers are larger than any cache (docs/decisions.md).
_PIXELS = 4 * 224 * 224


def torch_logits(model: Model, inputs: NDArray[np.float32], batch: int | str = "dynamic") -> NDArray[np.float32]:
    """What the FP32 PyTorch module answers: (N, C, H, W) -> (N, classes), or of a segmenter (N, classes, H, W).

    With a fixed `batch` the module only ever sees so many images, the last ones repeated where some are missing; else as many
    as are answered fastest.
    """
    wanted = ("N", "classes", "H", "W") if model.task == "segment" else ("N", "classes")
    size = batch if isinstance(batch, int) else max(1, _PIXELS // math.prod(inputs.shape[2:]))
    found = []
    for start in range(0, len(inputs), size):
        piece = inputs[start : start + size]
        with torch.inference_mode():
            answer = model.module(torch.from_numpy(padded(piece, size) if isinstance(batch, int) else piece))
        if not isinstance(answer, torch.Tensor) or answer.ndim != len(wanted) or answer.dtype != torch.float32:
            raise StageError(
                f"{model.name} does not answer like a {'segmenter' if model.task == 'segment' else 'classifier'}",
                why=f"expected one float32 tensor of ({', '.join(wanted)}), got {_describe(answer)}",
                fix="wrap it in a module whose forward returns the logits",
            )
        found.append(answer[: len(piece)].numpy())
    return np.concatenate(found)


def checked_error(what: str, answer: NDArray[np.float32], reference: NDArray[np.float32], tolerance: float) -> float:
    """max|d| / max|y|. Raises StageError above `tolerance`, and when anything is not finite."""
    scale = float(np.abs(reference).max())
    error = float(np.abs(answer - reference).max()) / scale if scale > 0 else float(np.abs(answer).max())
    if not np.isfinite(error) or error > tolerance:
        raise StageError(
            f"the {what} file does not answer like PyTorch",
            why=f"max|d| / max|y| is {error:.3g} on {len(reference)} real inputs; export.tolerance is {tolerance:g}",
            fix="a network whose forward depends on values of its input cannot be traced; rewrite that part",
        )
    return error


def _describe(answer: object) -> str:
    if isinstance(answer, torch.Tensor):
        return f"a {str(answer.dtype).removeprefix('torch.')} tensor of shape {tuple(answer.shape)}"
    if isinstance(answer, (tuple, list)):
        return f"{len(answer)} values"
    return type(answer).__name__
