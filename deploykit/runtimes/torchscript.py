"""TorchScript: traced, frozen, saved, and run again. The only home of torch.jit, which torch 2.15 deprecates."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deploykit.artifact import Artifact, Tensors, TensorSpec
from deploykit.errors import StageError
from deploykit.runtimes import check_inputs


class TorchScriptSession:
    """A `Session` on a TorchScript file of ours, on the CPU."""

    def __init__(self, module: torch.jit.ScriptModule, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self._module, self._inputs, self._outputs = module, inputs, outputs
        self._fed: list[torch.Tensor] = []
        self._answers: list[torch.Tensor] = []

    def feed(self, inputs: Tensors) -> None:
        """Copy the inputs into tensors."""
        check_inputs(inputs, [(spec.name, spec.dtype, spec.shape) for spec in self._inputs])
        self._fed = [torch.from_numpy(np.array(inputs[spec.name])) for spec in self._inputs]

    def execute(self) -> None:
        """Run once. Raises StageError with torch's words when the program fails, as one with a frozen batch does."""
        try:
            with torch.inference_mode(), without_deprecation():
                answer = self._module(*self._fed)
        except RuntimeError as error:
            raise StageError("the TorchScript program failed", why=str(error).strip().splitlines()[-1]) from error
        self._answers = list(answer) if isinstance(answer, (tuple, list)) else [answer]

    def fetch(self) -> Tensors:
        """The outputs of the last execute, copied."""
        return {spec.name: np.array(value.numpy()) for spec, value in zip(self._outputs, self._answers, strict=True)}

    def close(self) -> None:
        """Drop the module."""
        del self._module


def write(module: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Trace `module` in eval mode on `example` (N, C, H, W), freeze it (BatchNorm folded) and save it at `path`."""
    with torch.no_grad(), without_deprecation():
        traced = torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]
        # optimize_for_inference would tie the file to this CPU (MKL-DNN layouts); freezing keeps it portable.
        content = io.BytesIO()
        torch.jit.save(torch.jit.freeze(traced), content)
    # Not saved to the path: on a full disk torch's own writer aborts the process.
    path.write_bytes(content.getbuffer())


def write_scripted(module: nn.Module, path: Path) -> None:
    """Compile `module` in eval mode with the control flow of its code, and save it at `path`. Raises StageError where it cannot.

    Not frozen: detectors remember whether they have warned, and what a program changes cannot be made a constant.
    """
    try:
        with without_deprecation():
            content = io.BytesIO()
            torch.jit.save(torch.jit.script(module), content)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise StageError("the network cannot be compiled to TorchScript", why=" ".join(lines[:3])) from error
    path.write_bytes(content.getbuffer())


def load(model: Artifact) -> TorchScriptSession:
    """Open a TorchScript file. Loading one runs the program in it: only what this run made and what the user trusts come here."""
    return TorchScriptSession(opened(model.path, torch.device("cpu")), model.inputs, model.outputs)


def opened(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """The program of a file, its weights on that device."""
    with without_deprecation():
        module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    return module


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Without torch's word that torch.jit will go."""
    with warnings.catch_warnings():
        # torch 2.15 says FutureWarning, earlier ones DeprecationWarning.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
        yield
