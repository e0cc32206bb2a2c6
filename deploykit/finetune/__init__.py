"""Model -> Model: training on the user's images, ending with the checkpoint that did best on held-out ones.

An epoch draws all its chance from the seed and its own number, so that a training that was killed goes on from its last
finished epoch to the very same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deploykit.artifact import Artifact, Format, Precision, Preprocess, TensorSpec
from deploykit.data import Images
from deploykit.errors import CapabilityError, StageError, UsageError
from deploykit.finetune import augment, layers, state
from deploykit.finetune.augment import Augmented
from deploykit.finetune.features import Features, features
from deploykit.finetune.schedule import optimizer_of, share_of_peak
from deploykit.finetune.state import Epoch, State
from deploykit.jsonable import digest, to_json
from deploykit.models import Model
from deploykit.progress import Progress, silent
from deploykit.recipe import FinetuneTable

WEIGHTS, HISTORY = "model.safetensors", "history.json"
_EVALUATION_BATCH = 64


def finetune(
    model: Model,
    train: Images,
    held_out: Images,
    settings: FinetuneTable,
    folder: Path,
    *,
    scratch: Path | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Train as `settings` say, and write the best weights and the history into `folder`.

    "Best" is the highest accuracy on `held_out`, then the lowest loss. Both sets are labelled by `model.classes`. The
    same seed, torch version and thread count give the same weights on a CPU; on a GPU with `settings.deterministic`. With
    `scratch`, a folder that outlives a killed run, every finished epoch is kept there, and the next call goes on from it;
    features of a frozen backbone lie there too.

    Raises DataError for images that cannot be read, UsageError for settings that do not fit the network, CapabilityError when
    there is no GPU and `settings` name one, StageError when the loss is not a number any more: what was good is in `scratch`.
    """
    model = _prepared(model, settings)
    lesson = _Lesson(model, train, held_out, settings, _device(settings), scratch, progress)
    with _reproducible(lesson):
        ended = _trained(lesson)
    model.module.to(lesson.device).load_state_dict(dict(ended.best))
    confused = _confusion(lesson)
    model.module.cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(True)
    # Not save_file: its errors are its own (a full disk is no OSError), and the file can be read by its owner alone.
    (folder / WEIGHTS).write_bytes(safetensors.torch.save({name: value.contiguous() for name, value in ended.best.items()}))
    (folder / HISTORY).write_text(json.dumps([asdict(epoch) for epoch in ended.history], indent=1) + "\n")
    return _artifact(lesson, ended.history, confused, folder)


def evaluate(model: Model, images: Images) -> tuple[float, float]:
    """Mean cross-entropy (nats) and top-1 accuracy (share) on labelled images."""
    return _judged(_logits(model, images), images)


@dataclass(frozen=True)
class _Phase:
    """Epochs in which the same layers learn, and the peak of their learning rate."""

    epochs: int
    head_only: bool
    peak: float


@dataclass(frozen=True)
class _Lesson:
    """One training: what learns, from what, how and where."""

    model: Model
    train: Images
    held_out: Images
    settings: FinetuneTable
    device: torch.device
    scratch: Path | None
    progress: Progress

    @cached_property
    def key(self) -> str:
        """What a resumed training has to have been made from."""
        made_of = [self.model.name, self.model.weights, _digest_of(self.model.module), self.train.digest, self.held_out.digest]
        return digest([*made_of, to_json(self.settings), to_json(self.model.preprocess), torch.__version__])

    @cached_property
    def head(self) -> str:
        return layers.head_of(self.model, self.settings.head)

    @cached_property
    def phases(self) -> list[_Phase]:
        table = self.settings
        if table.mode != "head first":
            return [_Phase(table.epochs, table.mode == "head", table.learning_rate)]
        first = _Phase(table.head_epochs, True, table.learning_rate)
        return [first, _Phase(table.epochs - table.head_epochs, False, table.learning_rate * table.rest_rate)]

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


def _prepared(model: Model, settings: FinetuneTable) -> Model:
    """The network with the dropout that is asked for. Raises UsageError when it has none."""
    if settings.dropout is None:
        return model
    if not layers.set_dropout(model.module, settings.dropout):
        raise UsageError(f"{model.name} has no dropout layer", why=f"finetune.dropout is {settings.dropout}", fix="leave it out")
    return replace(model, notes=(*model.notes, f"dropout is {settings.dropout:g}"))


def _device(settings: FinetuneTable) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise CapabilityError("there is no GPU to train on", why='finetune.device is "cuda"', fix='finetune.device = "auto"')
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _reproducible(lesson: _Lesson) -> Iterator[None]:
    """torch's generators, and whether it insists on deterministic operations, are as before when the block ends."""
    before = torch.are_deterministic_algorithms_enabled()
    if lesson.settings.deterministic and lesson.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    devices = [lesson.device] if lesson.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.use_deterministic_algorithms(lesson.settings.deterministic or before)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _trained(lesson: _Lesson) -> State:
    """All phases, from the start or from where a killed training stopped."""
    module, settings, key = lesson.model.module, lesson.settings, lesson.key
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    module.to(lesson.device).to(memory_format=layout)
    now = (state.load(lesson.scratch, key) if lesson.scratch is not None else None) or State(module.state_dict())
    module.load_state_dict(dict(now.weights))
    average = None
    if settings.ema is not None:
        decay = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
        average = AveragedModel(module, multi_avg_fn=decay, use_buffers=True)
        if now.average:
            average.load_state_dict(dict(now.average))
    lesson.progress("finetune", len(now.history), settings.epochs)
    for index, phase in enumerate(lesson.phases):
        if index < len(now.started) - 1:
            continue
        if index == len(now.started):
            now.started.append(len(now.history) + 1)
        with _explained(lesson):
            _run_phase(lesson, phase, now, average, partial(_keep, lesson, key))
    return now


@contextmanager
def _explained(lesson: _Lesson) -> Iterator[None]:
    """What torch refuses while it trains (no memory left, no deterministic kernel) as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        batch = lesson.settings.batch
        fix = f"a smaller finetune.batch than {batch}" if isinstance(error, torch.OutOfMemoryError) else ""
        raise StageError(
            f"{lesson.model.name} cannot be trained so", why=str(error).strip().partition("\n")[0], fix=fix
        ) from error


def _run_phase(lesson: _Lesson, phase: _Phase, now: State, average: AveragedModel | None, keep: partial[None]) -> None:
    """Its epochs that are still to come; `now` is brought up to date after each."""
    settings, module = lesson.settings, lesson.model.module
    first = now.started[-1]
    last = first + phase.epochs - 1
    if len(now.history) >= last or _has_no_patience(now.history[first - 1 :], settings):
        return
    layers.choose(lesson.model, settings, head_only=phase.head_only)
    _check_batches(lesson)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(learning, settings, phase.peak)
    if len(now.history) >= first:
        optimizer.load_state_dict(dict(now.optimizer))
    else:
        now.steps = 0
    cached = _cached(lesson) if settings.cache_features and phase.head_only else None
    for epoch in range(len(now.history) + 1, last + 1):
        rate, loss = _train_one_epoch(lesson, phase, epoch, now, optimizer, average, cached)
        judged = module if average is None else average.module
        val_loss, val_accuracy = _evaluated(lesson, judged, cached)
        if not math.isfinite(val_loss):
            raise _diverged(lesson, epoch, f"the loss on the held-out images is {val_loss:g}")
        now.history.append(Epoch(epoch, rate, loss, val_loss, val_accuracy))
        if now.history[-1] == max(now.history, key=lambda one: (one.val_accuracy, -one.val_loss)):
            now.best = {name: value.detach().cpu().clone() for name, value in judged.state_dict().items()}
        now.weights, now.optimizer = module.state_dict(), optimizer.state_dict()
        now.average = {} if average is None else average.state_dict()
        keep(now)
        lesson.progress("finetune", epoch, settings.epochs)
        if _has_no_patience(now.history[first - 1 :], settings):
            return


def _keep(lesson: _Lesson, key: str, now: State) -> None:
    if lesson.scratch is not None:
        state.save(now, lesson.scratch, key)


def _has_no_patience(history: list[Epoch], settings: FinetuneTable) -> bool:
    """Whether so many epochs of a phase went by without a better one that its rest is not tried."""
    if settings.patience is None or not history:
        return False
    best = max(history, key=lambda one: (one.val_accuracy, -one.val_loss, -one.epoch))
    return history[-1].epoch - best.epoch >= settings.patience


def _train_one_epoch(
    lesson: _Lesson,
    phase: _Phase,
    epoch: int,
    now: State,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    cached: tuple[Features, Features] | None,
) -> tuple[float, float]:
    """(the learning rate of its first step, the mean loss). Raises StageError when a loss is not finite."""
    settings, module = lesson.settings, lesson.model.module
    assert lesson.train.labels is not None
    torch.manual_seed(_seed(settings, epoch))
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(lesson.train))
    steps = phase.epochs * math.ceil(len(order) / settings.batch)
    layers.train_mode(module)
    net = module if cached is None else module.get_submodule(lesson.head)
    mix = augment.mixed(settings, lesson.model.num_classes)
    total, seen, first_rate = 0.0, 0, phase.peak * share_of_peak(now.steps, steps, settings)
    for start, inputs in zip(
        range(0, len(order), settings.batch), _inputs(lesson, order, epoch, None if cached is None else cached[0]), strict=True
    ):
        for group in optimizer.param_groups:
            group["lr"] = phase.peak * share_of_peak(now.steps, steps, settings)
        now.steps += 1
        if len(inputs) == 1 and layers.has_batch_norm(net):
            continue  # BatchNorm has no variance over one image; the step still counts for the schedule
        labels = torch.from_numpy(lesson.train.labels[order[start : start + len(inputs)]])
        mixed, targets = mix(inputs, labels)
        loss = _step(lesson, net, mixed, targets, optimizer)
        if not math.isfinite(loss):
            raise _diverged(lesson, epoch, f"the loss of step {start // settings.batch + 1} is {loss:g}")
        if average is not None:
            average.update_parameters(module)
        total, seen = total + loss * len(inputs), seen + len(inputs)
    return first_rate, total / max(1, seen)


def _step(
    lesson: _Lesson, net: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, optimizer: torch.optim.Optimizer
) -> float:
    settings = lesson.settings
    with torch.autocast(lesson.device.type, torch.bfloat16, enabled=settings.autocast):
        logits = net(_on(lesson, inputs))
        loss = F.cross_entropy(
            logits, targets.to(lesson.device), weight=lesson.class_weights, label_smoothing=settings.label_smoothing
        )
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], settings.clip_norm)
    optimizer.step()
    return float(loss.detach())


def _inputs(lesson: _Lesson, order: NDArray[np.int64], epoch: int, cached: Features | None) -> Iterator[torch.Tensor]:
    """What one epoch trains on, in batches: augmented pictures, or features of them."""
    size = lesson.settings.batch
    if cached is not None:
        for start in range(0, len(order), size):
            yield cached.batch(order[start : start + size], epoch - 1)
        return
    change = Augmented(lesson.settings, lesson.model.preprocess)
    for batch in lesson.train.take(order).batches(lesson.seen_in_training, size):
        yield change(batch)


def _cached(lesson: _Lesson) -> tuple[Features, Features]:
    """Features of the training and of the held-out images, made now or by a training before."""
    if lesson.scratch is None:
        raise UsageError(
            "features can only be cached where there is a folder for them", fix="set finetune.cache_features = false"
        )
    lesson.scratch.mkdir(exist_ok=True)
    settings = lesson.settings

    def pictures(view: int) -> Iterator[torch.Tensor]:
        torch.manual_seed(_seed(settings, -1 - view))
        change = Augmented(settings, lesson.model.preprocess)
        for batch in lesson.train.batches(lesson.seen_in_training, _EVALUATION_BATCH):
            yield _on(lesson, change(batch))

    def plain(_view: int) -> Iterator[torch.Tensor]:
        for batch in lesson.held_out.batches(lesson.model.preprocess, _EVALUATION_BATCH):
            yield _on(lesson, torch.from_numpy(batch))

    found = []
    for name, images, batches, views in (
        ("train", lesson.train, pictures, settings.views),
        ("held-out", lesson.held_out, plain, 1),
    ):
        augmented = [settings.augment, settings.shift, settings.seed, views] if name == "train" else []
        backbone = _digest_of(lesson.model.module, but=lesson.head)
        key = digest([backbone, lesson.head, images.digest, to_json(lesson.model.preprocess), to_json(augmented)])
        path = lesson.scratch / f"features-{key[:24]}.npy"
        announced = partial(lesson.progress, f"features of the {name} images")
        found.append(features(lesson.model, lesson.head, batches, len(images), path, views=views, progress=announced))
    return found[0], found[1]


def _evaluated(lesson: _Lesson, module: nn.Module, cached: tuple[Features, Features] | None) -> tuple[float, float]:
    if cached is None:
        return evaluate(replace(lesson.model, module=module), lesson.held_out)
    head, seen = module.get_submodule(lesson.head).eval(), cached[1]
    with torch.inference_mode():
        every = np.split(np.arange(seen.images), range(_EVALUATION_BATCH, seen.images, _EVALUATION_BATCH))
        logits = torch.cat([head(_on(lesson, seen.batch(indices, 0))).float().cpu() for indices in every])
    return _judged(logits, lesson.held_out)


def _logits(model: Model, images: Images) -> torch.Tensor:
    """(N, classes) on the CPU, from a network on any device."""
    device = next(model.module.parameters()).device
    model.module.eval()
    with torch.inference_mode():
        batches = images.batches(model.preprocess, _EVALUATION_BATCH)
        return torch.cat([model.module(torch.from_numpy(batch).to(device)).float().cpu() for batch in batches])


def _judged(logits: torch.Tensor, images: Images) -> tuple[float, float]:
    assert images.labels is not None
    # torch.from_numpy wants a writable array; labels are read-only.
    labels = torch.from_numpy(np.array(images.labels))
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def _confusion(lesson: _Lesson) -> list[list[int]]:
    """How many held-out images of each class (row) were taken for each class (column) by the best weights."""
    assert lesson.held_out.labels is not None
    classes = lesson.model.num_classes
    decided = _logits(lesson.model, lesson.held_out).argmax(1).numpy()
    counts = np.bincount(lesson.held_out.labels * classes + decided, minlength=classes * classes)
    found: list[list[int]] = counts.reshape(classes, classes).tolist()
    return found


def _on(lesson: _Lesson, inputs: torch.Tensor) -> torch.Tensor:
    layout = torch.channels_last if lesson.settings.channels_last and inputs.dim() == 4 else torch.contiguous_format
    return inputs.to(lesson.device, memory_format=layout)


def _check_batches(lesson: _Lesson) -> None:
    size = min(lesson.settings.batch, len(lesson.train))
    if size == 1 and layers.has_batch_norm(lesson.model.module):
        raise UsageError(
            f"{lesson.model.name} has BatchNorm, which cannot be trained on one image at a time",
            why=f"finetune.batch is {lesson.settings.batch}, and there are {len(lesson.train)} training images",
            fix="train on two or more images in one step",
        )


def _diverged(lesson: _Lesson, epoch: int, why: str) -> StageError:
    kept = "" if lesson.scratch is None or epoch == 1 else f"; the {epoch - 1} epochs before are kept in {lesson.scratch}"
    fix = "a lower finetune.learning_rate, a longer finetune.warmup, or finetune.clip_norm"
    return StageError(f"training diverged in epoch {epoch}", why=f"{why}{kept}", fix=fix)


def _seed(settings: FinetuneTable, part: int) -> int:
    """A seed for one epoch (from 1) or one view of features (from -1 down)."""
    return int(np.random.SeedSequence([settings.seed, part & 0xFFFFFFFF]).generate_state(1, np.uint64)[0] >> 1)


def _digest_of(module: nn.Module, *, but: str | None = None) -> str:
    """Of every weight and buffer, those of the module `but` left out."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        if but is None or not name.startswith(f"{but}."):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy())
    return found.hexdigest()


def _artifact(lesson: _Lesson, history: list[Epoch], confusion: list[list[int]], folder: Path) -> Artifact:
    model = lesson.model
    return Artifact(
        path=folder / WEIGHTS,
        stage="finetune",
        key="",
        format=Format.CHECKPOINT,
        precision=Precision.FP32,
        inputs=(TensorSpec("image", "float32", ("batch", *model.preprocess.shape)),),
        outputs=(TensorSpec("logits", "float32", ("batch", model.num_classes)),),
        preprocess=model.preprocess,
        classes=model.classes,
        sha256="",
        parents=(),
        settings=to_json(lesson.settings),  # type: ignore[arg-type]
        tools={"torch": torch.__version__},
        facts={
            "model": model.name,
            "weights": model.weights,
            "notes": list(model.notes),
            "train_images": len(lesson.train),
            "val_images": len(lesson.held_out),
            "best_val_accuracy": max(epoch.val_accuracy for epoch in history),
            "device": str(lesson.device),
            "augmentation": list(augment.names(lesson.settings)),
            "confusion": confusion,
        },
    )
