"""What a frozen backbone gives its head, computed once and kept on disk, so that an epoch of the head takes no backbone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploykit import publish
from deploykit.errors import DeploykitError, UsageError, translating_os_errors
from deploykit.models import Model

_CLOSE = 1e-5  # of the largest logit: the head on a feature against the whole network, another order of sums


@dataclass(frozen=True)
class Features:
    """The head's inputs: (views * images, ...) float32 in a file that is mapped, not read, into memory."""

    values: NDArray[np.float32]
    images: int

    def batch(self, indices: NDArray[np.int64], view: int) -> torch.Tensor:
        """The head's inputs of these images, seen in one view."""
        return torch.from_numpy(np.array(self.values[view % (len(self.values) // self.images) * self.images + indices]))


def features(
    model: Model,
    head: str,
    batches: Callable[[int], Iterator[torch.Tensor]],
    images: int,
    path: Path,
    *,
    views: int = 1,
    progress: Callable[[int, int], None],
) -> Features:
    """Run the backbone over `batches(view)`, every view of all images in order, and keep what its head reads.

    `path` names what it is made from, so a file that is there is complete and is taken as it is. Memory does not depend on the
    number of images. Raises UsageError when the network computes something behind its head.
    """
    if not path.exists():
        aside = path.with_name(path.name + publish.PARTIAL)
        written = _write(model, head, batches, images, aside, views, progress)
        written.flush()
        del written
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(path)
    return Features(np.load(path, mmap_mode="r", allow_pickle=False), images)


def _write(
    model: Model,
    head: str,
    batches: Callable[[int], Iterator[torch.Tensor]],
    images: int,
    path: Path,
    views: int,
    progress: Callable[[int, int], None],
) -> np.memmap:
    module = model.module.eval()
    part = module.get_submodule(head)
    seen: list[torch.Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    found: np.memmap | None = None
    done = 0
    try:
        with torch.inference_mode():
            for view in range(views):
                for pictures in batches(view):
                    seen.clear()
                    answer = module(pictures)
                    if found is None:
                        _check_head_is_last(model, head, part, seen, answer)
                        shape = (views * images, *seen[0].shape[1:])
                        found = _mapped(path, shape)
                    found[done : done + len(pictures)] = seen[0].cpu().numpy()
                    done += len(pictures)
                    progress(done, views * images)
    finally:
        hook.remove()
    assert found is not None
    return found


def _mapped(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new file for this array, all of it allocated: writing to a map of a full disk would end the process without a word."""
    found = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    try:
        with translating_os_errors("write", path), path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except DeploykitError:
        path.unlink(missing_ok=True)
        raise
    return found


def _check_head_is_last(model: Model, head: str, part: nn.Module, seen: list[torch.Tensor], answer: torch.Tensor) -> None:
    alone = part(seen[0]) if len(seen) == 1 else None
    if alone is None or alone.shape != answer.shape or (alone - answer).abs().max() > _CLOSE * answer.abs().max():
        raise UsageError(
            f"features of {model.name} cannot be cached in front of {head}",
            why=f"the network calls it {len(seen)} times" if alone is None else "the network's answer is not that layer's result",
            fix='set finetune.cache_features = false, or choose the whole block with finetune.head = "classifier"',
        )
