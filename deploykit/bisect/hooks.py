"""A PyTorch network as the reference: what its modules give, by the names of the exported graph's tensors."""

from __future__ import annotations

from collections import defaultdict
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploykit.artifact import Tensors
from deploykit.bisect import graph as graphs
from deploykit.bisect.graph import Graph
from deploykit.models.tasks import network_of


class Watched:
    """A network whose innermost modules are watched while it runs; use it in a `with` statement, which ends that.

    A module's n-th call belongs to its n-th node in `graph`, the export of this network, if it has as many nodes as calls. Export
    folds a BatchNorm into the convolution before it, so what that BatchNorm makes of a convolution's result takes its place.
    """

    def __init__(self, module: nn.Module, graph: Graph) -> None:
        self._module = module
        self._nodes: dict[str, list[Any]] = defaultdict(list)
        for node in graph.proto.graph.node:
            self._nodes[graphs.module_of(node)].append(node)
        self._paths = {child: path for path, child in network_of(module).named_modules() if not list(child.children())}
        self._given: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._hooks = [child.register_forward_hook(self._hook) for child in self._paths]

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, images: NDArray[np.float32]) -> Tensors:
        """The tensors of the graph that modules gave for a batch (n, C, H, W)."""
        self._given.clear()
        with torch.inference_mode():
            self._module(torch.from_numpy(images))
        found: dict[str, NDArray[np.float32]] = {}
        for path, values in self._given.items():
            nodes = self._nodes[path]
            # A module that became several nodes gives one tensor; only one node for each call can be told from the others.
            if len(nodes) == len(values):
                found |= {node.output[0]: value.numpy() for node, value in zip(nodes, values, strict=True)}
        self._given.clear()
        return found

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.dtype != torch.float32:
            return
        # Copied, for a following in-place ReLU would write into it.
        value, path = output.clone(), self._paths[module]
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and path not in self._nodes:
            before = [given for given in self._given.values() if given and self._is(given[-1], inputs[0])]
            if before:
                before[-1][-1] = value
            return
        self._given[path].append(value)

    @staticmethod
    def _is(given: torch.Tensor, read: torch.Tensor) -> bool:
        return given.shape == read.shape and bool(torch.equal(given, read))
