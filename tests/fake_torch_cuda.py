"""What a session takes of torch.cuda, on PyTorch's CPU device: a stream on which nothing is done before it is waited for.

A capture runs nothing, and is refused where the world says so; a clock goes on by a quarter of a millisecond for each thing done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from deploykit.runtimes import torchscript_cuda
from deploykit.runtimes.on_gpu import Card


@dataclass
class World:
    """The card, whether it captures graphs, what was asked of it, and how many graphs there are."""

    capability: tuple[int, int] = (9, 0)
    name: str = "H200"
    refuses_capture: bool = False
    did: list[str] = field(default_factory=list)
    graphs: int = 0


class FakeGraph:
    def __init__(self, gpu: FakeGpu, work: Callable[[], None]) -> None:
        self._gpu, self._work = gpu, work
        gpu.world.graphs += 1

    def replay(self) -> None:
        self._gpu.world.did.append("replay")
        self._work()

    def reset(self) -> None:
        self._gpu.world.graphs -= 1


class FakeGpu:
    world = World()

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._waiting: list[Callable[[], object]] = []
        self._clock = 0.0

    def card(self) -> Card:
        return Card(self.world.name, self.world.capability, 132)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.world.did.append("pinned")
        return torch.full(tuple(shape), 77, dtype=dtype)  # not zeros, which would hide what was never written

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(tuple(shape), 77, dtype=dtype)

    def put(self, work: Callable[[], object]) -> None:
        self._waiting.append(work)

    def synchronize(self) -> None:
        waiting, self._waiting = self._waiting, []
        for work in waiting:
            self._clock += 0.25
            work()

    def captured(self, work: Callable[[], None]) -> FakeGraph:
        assert not self._waiting, "a capture waits for what is on the stream"
        if self.world.refuses_capture:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nTry again.")
        return FakeGraph(self, work)

    def event(self) -> Any:
        return {}

    def record(self, event: Any) -> None:
        self.put(lambda: event.update(at=self._clock))

    def elapsed_ns(self, start: Any, end: Any) -> int:
        self.synchronize()
        return round((end["at"] - start["at"]) * 1e6)

    def give_back(self) -> None:
        self.world.did.append("give back")


@contextmanager
def installed(world: World) -> Iterator[Any]:
    """deploykit's runtime on a GPU of that world."""
    gpu, why_not, before = torchscript_cuda.Gpu, torchscript_cuda.why_not, FakeGpu.world
    torchscript_cuda.Gpu, torchscript_cuda.why_not = FakeGpu, lambda: ""  # type: ignore[assignment, misc]
    FakeGpu.world = world
    try:
        yield torchscript_cuda
    finally:
        torchscript_cuda.Gpu, torchscript_cuda.why_not, FakeGpu.world = gpu, why_not, before  # type: ignore[misc]
