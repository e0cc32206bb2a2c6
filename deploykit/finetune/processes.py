"""The processes of one training: each takes its share of every batch, and the first alone writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from numpy.typing import NDArray
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from deploykit.errors import StageError, UsageError

_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """One of `count` processes; `local_rank` counts those of one machine, which share its GPUs."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reads and writes the state of the training, and tells the result."""
        return self.rank == 0

    def share(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Every `count`-th of them, beginning with the rank's."""
        return indices[self.rank :: self.count]

    def told(self, value: Any) -> Any:
        """What the first process passes here, in all of them; values of our own processes, so pickle is no door."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def added(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sums over all processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def together(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all shares (see `share`) in their common order: (N / count, ...) to (N, ...)."""
        if self.count == 1:
            return rows
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, rows)
        found = rows.new_empty((sum(map(len, parts)), *rows.shape[1:]))
        for rank, part in enumerate(parts):
            found[rank :: self.count] = part
        return found

    def wrapped(self, net: nn.Module, device: torch.device) -> nn.Module:
        """The network whose gradients are averaged over all processes while they are computed; itself for one process."""
        if self.count == 1:
            return net
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)

    def same_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's statistics of BatchNorm, which each has from its own pictures."""
        if self.count > 1:
            for _, buffer in sorted(module.named_buffers()):
                distributed.broadcast(buffer, src=0)


ALONE = Processes()


def of_torchrun(environment: Mapping[str, str]) -> Processes:
    """What `torchrun` tells each process that it starts; one process alone where it started none.

    Raises UsageError for numbers that torchrun does not give.
    """
    values = [environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    try:
        rank, count, local_rank = map(int, values)
    except ValueError:
        rank, count, local_rank = -1, 0, 0
    if not 0 <= rank < count:
        raise UsageError(
            f"RANK = {values[0]!r} and WORLD_SIZE = {values[1]!r} in the environment are not those of torchrun",
            fix="unset them, or start with: torchrun --nproc-per-node N -m deploykit finetune ...",
        )
    return Processes(rank, count, local_rank)


@contextmanager
def joined(processes: Processes, *, on_gpu: bool) -> Iterator[None]:
    """Within the block the processes can talk: by NCCL between GPUs, by gloo between CPUs.

    Raises StageError when they do not find each other.
    """
    if processes.count == 1:
        yield
        return
    if on_gpu:
        torch.cuda.set_device(processes.local_rank)
    try:
        # The others wait while the first computes features; of a process that died, torchrun ends the others.
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise StageError(
            f"process {processes.rank} of {processes.count} cannot join the others",
            why=str(error).strip().partition("\n")[0],
            fix="start all of them with torchrun",
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()
