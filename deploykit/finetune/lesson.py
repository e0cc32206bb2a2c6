"""One training: what learns, from what, how and where; and where its chance comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from deploykit.artifact import Preprocess
from deploykit.data import Images
from deploykit.errors import CapabilityError, UsageError
from deploykit.finetune import layers
from deploykit.finetune.processes import ALONE, Processes
from deploykit.jsonable import digest, to_json
from deploykit.models import Model
from deploykit.progress import Progress, silent
from deploykit.recipe import FinetuneTable


@dataclass(frozen=True)
class Phase:
    """Epochs in which the same layers learn, and the peak of their learning rate."""

    epochs: int
    head_only: bool
    peak: float


@dataclass(frozen=True)
class Lesson:
    """One training: what learns, from what, how and where."""

    model: Model
    train: Images
    held_out: Images
    settings: FinetuneTable
    device: torch.device
    scratch: Path | None
    progress: Progress = silent
    processes: Processes = ALONE

    @cached_property
    def key(self) -> str:
        """What a resumed training has to have been made from."""
        made_of = [self.model.name, self.model.weights, digest_of(self.model.module), self.train.digest, self.held_out.digest]
        made_of.append(str(self.processes.count))
        return digest([*made_of, to_json(self.settings), to_json(self.model.preprocess), torch.__version__])

    @cached_property
    def head(self) -> str:
        """The module path of what a training of the head trains."""
        return layers.head_of(self.model, self.settings.head)

    @cached_property
    def phases(self) -> list[Phase]:
        """In order."""
        table = self.settings
        if table.mode != "head first":
            return [Phase(table.epochs, table.mode == "head", table.learning_rate)]
        first = Phase(table.head_epochs, True, table.learning_rate)
        return [first, Phase(table.epochs - table.head_epochs, False, table.learning_rate * table.rest_rate)]

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        """n / (classes * n of the class), as scikit-learn's "balanced" has it; a class without images weighs nothing."""
        if self.settings.class_weights == "none":
            return None
        assert self.train.labels is not None
        counts = np.bincount(self.train.labels, minlength=self.model.num_classes)
        shares = np.divide(len(self.train), len(counts) * counts, out=np.zeros(len(counts)), where=counts > 0)
        return torch.from_numpy(shares.astype(np.float32)).to(self.device)

    @property
    def seen_in_training(self) -> Preprocess:
        """How pictures are prepared before augmentation: a random crop is taken from where the centre crop is taken from."""
        how = self.model.preprocess
        if "crop" in self.settings.augment and how.resize is not None and how.fit == "crop":
            return replace(how, crop=(max(how.resize, how.crop[0]), max(how.resize, how.crop[1])))
        return how

    def seed(self, part: int, *which: int) -> int:
        """A seed for one epoch (from 1) or one view of features (from -1 down), and for one of its pictures."""
        words = [self.settings.seed, part & 0xFFFFFFFF, *which]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)

    def on_device(self, inputs: torch.Tensor) -> torch.Tensor:
        """Where the network is, and laid out as it is."""
        return inputs.to(self.device, memory_format=self.layout if inputs.dim() == 4 else torch.contiguous_format)

    @cached_property
    def layout(self) -> torch.memory_format:
        """How maps lie in memory: as the settings say, or with "auto" as it is faster.

        On a CPU channels come last for networks with depthwise convolutions: that is what was measured
        (`python benchmarks/finetune.py layouts`). On a GPU with autocast: its tensor cores take halves in that order, and what
        comes in another one is transposed (NVIDIA, Deep Learning Performance: Convolutional Layers); this was not measured.
        """
        asked = self.settings.channels_last
        if asked == "auto":
            asked = self.settings.autocast if self.device.type == "cuda" else layers.has_depthwise(self.model.module)
        return torch.channels_last if asked else torch.contiguous_format


def prepared(model: Model, settings: FinetuneTable, processes: Processes) -> Model:
    """The network with the dropout that is asked for, and what has to be known about many processes.

    Raises UsageError when it has no dropout.
    """
    notes = []
    if settings.dropout is not None:
        if not layers.set_dropout(model.module, settings.dropout):
            raise UsageError(
                f"{model.name} has no dropout layer", why=f"finetune.dropout is {settings.dropout}", fix="leave it out"
            )
        notes.append(f"dropout is {settings.dropout:g}")
    if processes.count > 1 and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.module.modules()):
        share = settings.batch // processes.count
        notes.append(
            f"{processes.count} processes: where BatchNorm learns on a CPU, each sees the statistics of its own {share} of the "
            f"{settings.batch} images of a step, so results differ from those of one process; on GPUs SyncBatchNorm sees all"
        )
    return replace(model, notes=(*model.notes, *notes))


def device_of(settings: FinetuneTable, processes: Processes = ALONE) -> torch.device:
    """Where to train. Raises CapabilityError when that is not here."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise CapabilityError("there is no GPU to train on", why='finetune.device is "cuda"', fix='finetune.device = "auto"')
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.count == 1:
        return torch.device("cuda")
    if processes.local_rank >= torch.cuda.device_count():
        raise CapabilityError(
            f"there is no GPU for process {processes.local_rank} of this machine",
            why=f"it has {torch.cuda.device_count()}",
            fix='as many processes as GPUs (--nproc-per-node), or finetune.device = "cpu"',
        )
    return torch.device("cuda", processes.local_rank)


def digest_of(module: nn.Module, *, but: str | None = None) -> str:
    """Of every weight and buffer, those of the module `but` left out."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        if but is None or not name.startswith(f"{but}."):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
    return found.hexdigest()
