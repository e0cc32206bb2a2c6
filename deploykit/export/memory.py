"""How much memory an export takes, said before the work instead of by the kernel in the middle of it.

The rule (`benchmarks/zoo.py` measures it): `BASE_BYTES` for the libraries, `_COPIES` times the weights (PyTorch's module,
the folded graph, the file's buffer, and what ONNX Runtime loads and prepares), and `_TENSORS` times the largest tensor of
the forward pass for as many images as run at once.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deploykit.errors import CapabilityError
from deploykit.machine import available_memory_bytes

BASE_BYTES = 1 << 30
_COPIES = 5
_TENSORS = 14


def need_bytes(weight_bytes: int, tensor_bytes: int = 0) -> int:
    """The largest resident set of an export with so many bytes of weights, and in the largest tensor of its forward pass."""
    return BASE_BYTES + _COPIES * weight_bytes + _TENSORS * tensor_bytes


def require(name: str, weight_bytes: int, tensor_bytes: int = 0, *, available: int | None = None) -> None:
    """Raise CapabilityError (exit 4) when an export of the network `name` needs more memory than this machine has now."""
    here = available_memory_bytes() if available is None else available
    needed = need_bytes(weight_bytes, tensor_bytes)
    if needed > here:
        raise CapabilityError(
            f"exporting {name} needs about {needed / 2**30:.1f} GiB of memory, and {here / 2**30:.1f} GiB are free here",
            why=f"{_COPIES} times its weights ({weight_bytes / 2**30:.2f} GiB), {_TENSORS} times the largest tensor of its "
            f"forward pass ({tensor_bytes / 2**30:.2f} GiB), and {BASE_BYTES / 2**30:.0f} GiB for the libraries",
            fix="a machine with more memory, or fewer golden samples (export.samples), which run at once",
        )


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


def largest_tensor_bytes(module: nn.Module, shape: tuple[int, ...]) -> int:
    """The largest result of any operator for inputs of `shape`, found without computing; 0 where that cannot be done."""
    state = {id(value): value.to("meta") for value in (*module.parameters(), *module.buffers())}
    sizes = _Sizes()
    try:
        # On a copy, without the weights: torchvision's detectors keep the anchors of the first input's device.
        copied = copy.deepcopy(module, dict(state))
        with torch.no_grad(), sizes:
            copied(torch.empty(shape, device="meta"))
    except Exception:  # a forward that looks at values, or holds tensors that are no parameters, cannot run on shapes alone
        # `torch.cond` compiles what it is given, and torch 2.11 (2.14 does not) keeps what broke off in here: without this the
        # network would never run again in this process.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        return 0
    return sizes.largest


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator's result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel() * value.element_size())
        return result
