"""The phases, epochs and steps of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deploykit import publish
from deploykit.errors import StageError, UsageError, printable
from deploykit.finetune import augment, auxiliary, judging, layers, state
from deploykit.finetune.augment import Augmented
from deploykit.finetune.features import Features, features
from deploykit.finetune.lesson import Lesson, Phase, digest_of
from deploykit.finetune.schedule import optimizer_of, share_of_peak
from deploykit.finetune.state import Epoch, State
from deploykit.jsonable import digest, to_json
from deploykit.recipe import FinetuneTable

BEST_SO_FAR = "best.safetensors"


def trained(lesson: Lesson) -> State:
    """All phases, from the start or from where a killed training stopped; `best` in what is returned is whole.

    The network is left with the last weights. Raises StageError when a loss is not finite.
    """
    module, settings, processes = lesson.model.module, lesson.settings, lesson.processes
    key = lesson.key  # of the weights as they are now
    module.to(lesson.device).to(memory_format=lesson.layout)
    start = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    found = state.load(lesson.scratch, key) if lesson.scratch is not None and processes.is_first else None
    now: State = processes.told(found) or State()
    module.load_state_dict({**start, **now.weights})
    if processes.count > 1 and lesson.device.type == "cuda":
        # A copy, for what is exported afterwards has to hold plain BatchNorm.
        module = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(module))  # type: ignore[no-untyped-call]
        lesson = replace(lesson, model=replace(lesson.model, module=module))
    average = None
    if settings.ema is not None:
        decay = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
        average = AveragedModel(module, multi_avg_fn=decay, use_buffers=True)
        average.load_state_dict({**average.state_dict(), **now.average})
    course = _Course(lesson, key, average, now, start)
    lesson.progress("finetune", len(now.history), settings.epochs)
    for index, phase in enumerate(lesson.phases):
        if index < len(now.started) - 1:
            continue
        if index == len(now.started):
            now.started.append(len(now.history) + 1)
        with _explained(lesson):
            _run_phase(course, phase)
    return replace(now, best={**start, **now.best})


@dataclass(frozen=True)
class _Course:
    """A lesson under way. `start` are all weights before the first step; `now` has those alone that may have changed."""

    lesson: Lesson
    key: str
    average: AveragedModel | None
    now: State
    start: Mapping[str, torch.Tensor]

    @property
    def module(self) -> nn.Module:
        """What learns."""
        return self.lesson.model.module

    @property
    def judged(self) -> nn.Module:
        """What is evaluated and kept."""
        if self.average is None:
            return self.module
        found: nn.Module = self.average.module
        return found


@dataclass
class _Sums:
    """Over the images that an epoch has seen so far: their losses, and how many were decided right in training."""

    loss: float = 0.0
    images: int = 0
    right: int = 0


@contextmanager
def _explained(lesson: Lesson) -> Iterator[None]:
    """What torch refuses while it trains (no memory left, no deterministic kernel) as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        batch = lesson.settings.batch
        fix = f"a smaller finetune.batch than {batch}" if isinstance(error, torch.OutOfMemoryError) else ""
        raise StageError(
            f"{lesson.model.name} cannot be trained so", why=str(error).strip().partition("\n")[0], fix=fix
        ) from error


def _run_phase(course: _Course, phase: Phase) -> None:
    """Its epochs that are still to come; `now` is brought up to date after each."""
    lesson, now, average = course.lesson, course.now, course.average
    settings, module = lesson.settings, course.module
    first = now.started[-1]
    last = first + phase.epochs - 1
    if len(now.history) >= last or _has_no_patience(now.history[first - 1 :], settings):
        return
    layers.choose(lesson.model, settings, head_only=phase.head_only)
    _check_batches(lesson)
    changing = layers.changing(module)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(learning, settings, phase.peak)
    if len(now.history) >= first:
        optimizer.load_state_dict(dict(now.optimizer))
    else:
        now.steps = 0
    cached = _cached(course) if settings.cache_features and phase.head_only else None
    net = module if cached is None else module.get_submodule(lesson.head)
    shared = lesson.processes.wrapped(net, lesson.device)
    for epoch in range(len(now.history) + 1, last + 1):
        rate, sums = _train_one_epoch(course, phase, epoch, (net, shared), optimizer, cached)
        lesson.processes.same_buffers(course.judged)
        val_loss, val_accuracy = _evaluated(course, cached)
        if not math.isfinite(val_loss):
            raise _diverged(course, epoch, f"the loss on the held-out images is {val_loss:g}")
        accuracy = None if settings.mix != "none" else sums.right / max(1, sums.images)
        now.history.append(Epoch(epoch, rate, sums.loss / max(1, sums.images), val_loss, val_accuracy, accuracy))
        if now.history[-1] == max(now.history, key=lambda one: one.rank):
            now.best = {**now.best, **_copied(course.judged, changing)}
        now.weights = {**now.weights, **_some(module.state_dict(), changing)}
        now.optimizer = optimizer.state_dict()
        if average is not None:
            of_average = {"n_averaged", *(f"module.{name}" for name in changing)}
            now.average = {**now.average, **_some(average.state_dict(), of_average)}
        _keep(course)
        lesson.progress("finetune", epoch, settings.epochs)
        if _has_no_patience(now.history[first - 1 :], settings):
            return


def _copied(module: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in _some(module.state_dict(), names).items()}


def _some(weights: Mapping[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if name in names}


def _keep(course: _Course) -> None:
    lesson = course.lesson
    if lesson.scratch is not None and lesson.processes.is_first:
        state.save(course.now, lesson.scratch, course.key)


def _has_no_patience(history: list[Epoch], settings: FinetuneTable) -> bool:
    """Whether so many epochs of a phase went by without a better one that its rest is not tried."""
    if settings.patience is None or not history:
        return False
    best = max(history, key=lambda one: (*one.rank, -one.epoch))
    return history[-1].epoch - best.epoch >= settings.patience


def _train_one_epoch(
    course: _Course,
    phase: Phase,
    epoch: int,
    nets: tuple[nn.Module, nn.Module],
    optimizer: torch.optim.Optimizer,
    cached: tuple[Features, Features] | None,
) -> tuple[float, _Sums]:
    """(the learning rate of its first step, what it saw). `nets` are what learns, and the same as all processes share it.

    Raises StageError when a loss is not finite.
    """
    lesson, now = course.lesson, course.now
    settings, processes = lesson.settings, lesson.processes
    assert lesson.train.labels is not None
    torch.manual_seed(lesson.seed(epoch) + processes.rank)
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(lesson.train))
    batches = [order[start : start + settings.batch] for start in range(0, len(order), settings.batch)]
    steps = phase.epochs * len(batches)
    net, shared = nets
    layers.train_mode(course.module)
    mix = augment.mixed(settings, lesson.model.num_classes)
    sums, first_rate = _Sums(), phase.peak * share_of_peak(now.steps, steps, settings)
    least = processes.count * (2 if layers.has_batch_norm(net) else 1)
    batches_kept = [batch if len(batch) >= least else batch[:0] for batch in batches]
    inputs = _inputs(lesson, batches_kept, epoch, None if cached is None else cached[0])
    for number, batch in enumerate(batches_kept, 1):
        for group in optimizer.param_groups:
            group["lr"] = phase.peak * share_of_peak(now.steps, steps, settings)
        now.steps += 1
        if not len(batch):
            continue  # BatchNorm has no variance over one image, and a process no share; the step counts for the schedule
        labels = torch.from_numpy(lesson.train.labels[processes.share(batch)])
        mixed, targets = mix(next(inputs), labels)
        loss, right = step(lesson, shared, mixed, targets, optimizer, batch)
        if not math.isfinite(loss):
            raise _diverged(course, epoch, f"the loss of step {number} is {loss:g}")
        if course.average is not None:
            course.average.update_parameters(course.module)
        sums.loss, sums.images, sums.right = sums.loss + loss * len(batch), sums.images + len(batch), sums.right + right
        lesson.progress(_said(epoch, settings, sums), sums.images, len(order))
    return first_rate, sums


def _said(epoch: int, settings: FinetuneTable, sums: _Sums) -> str:
    right = "" if settings.mix != "none" else f", {100 * sums.right / sums.images:.1f} % right"
    return f"images | epoch {epoch} of {settings.epochs}, loss {sums.loss / sums.images:.3f}{right}"


def step(
    lesson: Lesson,
    net: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    batch: NDArray[np.int64],
) -> tuple[float, int]:
    """(mean loss, right decisions) of one step over all processes' shares of `batch`, whose images these indices name."""
    settings, processes = lesson.settings, lesson.processes
    targets = targets.to(lesson.device)
    with torch.autocast(lesson.device.type, torch.bfloat16, enabled=settings.autocast):
        logits, others = auxiliary.parts_of(net(lesson.on_device(inputs)))
        loss = _loss(lesson, logits, targets, batch)
        for other in others:
            loss = loss + (settings.aux_loss or 0.0) * _loss(lesson, other, targets, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_([one for group in optimizer.param_groups for one in group["params"]], settings.clip_norm)
    optimizer.step()
    right = float((logits.detach().argmax(1) == targets).sum()) if targets.dim() == 1 else 0.0
    summed, all_right = processes.added([float(loss.detach()), right], lesson.device)
    return summed / processes.count, round(all_right)


def _loss(lesson: Lesson, logits: torch.Tensor, targets: torch.Tensor, batch: NDArray[np.int64]) -> torch.Tensor:
    """Mean cross-entropy; of a share of a batch so that the mean over all processes is that of the whole batch."""
    settings, processes, weight = lesson.settings, lesson.processes, lesson.class_weights
    if processes.count == 1:
        return F.cross_entropy(logits, targets, weight=weight, label_smoothing=settings.label_smoothing)
    whole = float(len(batch))
    if weight is not None and targets.dim() == 1:
        assert lesson.train.labels is not None
        whole = float(weight[torch.from_numpy(lesson.train.labels[batch]).to(weight.device)].sum())
    summed = F.cross_entropy(logits, targets, weight=weight, label_smoothing=settings.label_smoothing, reduction="sum")
    return summed * (processes.count / whole)


def _inputs(lesson: Lesson, batches: list[NDArray[np.int64]], epoch: int, cached: Features | None) -> Iterator[torch.Tensor]:
    """What this process trains on, share by share: augmented pictures, or features of them."""
    shares = [lesson.processes.share(batch) for batch in batches if len(batch)]
    if cached is not None:
        for share in shares:
            yield cached.batch(share, epoch - 1)
        return
    change = Augmented(lesson.settings, lesson.model.preprocess)
    order = np.concatenate(shares) if shares else np.empty(0, np.int64)
    seeds = iter([lesson.seed(epoch, int(index)) for index in order])
    # All shares but the last are of one size, so the batches of a set in this order are the shares.
    for batch in lesson.train.take(order).batches(lesson.seen_in_training, max(1, len(shares[0]) if shares else 1)):
        yield change(batch, islice(seeds, len(batch)))


def _cached(course: _Course) -> tuple[Features, Features]:
    """Features of the training and of the held-out images, made now or by a training before; by the first process alone."""
    lesson = course.lesson
    if lesson.scratch is None:
        raise UsageError(
            "features can only be cached where there is a folder for them", fix="set finetune.cache_features = false"
        )
    lesson.scratch.mkdir(exist_ok=True)
    settings = lesson.settings

    def pictures(view: int) -> Iterator[torch.Tensor]:
        change = Augmented(settings, lesson.model.preprocess)
        seeds = iter([lesson.seed(-1 - view, index) for index in range(len(lesson.train))])
        for batch in lesson.train.batches(lesson.seen_in_training, judging.BATCH):
            yield lesson.on_device(change(batch, islice(seeds, len(batch))))

    def plain(_view: int) -> Iterator[torch.Tensor]:
        for batch in lesson.held_out.batches(lesson.model.preprocess, judging.BATCH):
            yield lesson.on_device(torch.from_numpy(batch))

    backbone = digest_of(course.module, but=lesson.head)
    made = []
    for name, images, batches, views in (
        ("train", lesson.train, pictures, settings.views),
        ("held-out", lesson.held_out, plain, 1),
    ):
        augmented = [settings.augment, settings.shift, settings.seed, views] if name == "train" else []
        key = digest([backbone, lesson.head, images.digest, to_json(lesson.model.preprocess), to_json(augmented)])
        path = lesson.scratch / f"features-{key[:24]}.npy"
        announced = partial(lesson.progress, f"features of the {name} images")
        make = partial(features, lesson.model, lesson.head, batches, len(images), path, views=views, progress=announced)
        found = make() if lesson.processes.is_first else None
        lesson.processes.wait()
        if found is None and not path.exists():
            raise StageError(
                f"process {lesson.processes.rank} does not see {printable(path)}",
                why="cached features are made by the first process, in its output folder",
                fix="an output folder that all machines share, or finetune.cache_features = false",
            )
        made.append(found or make())
    return made[0], made[1]


def _evaluated(course: _Course, cached: tuple[Features, Features] | None) -> tuple[float, float]:
    lesson = course.lesson
    if cached is None:
        return judging.evaluate(replace(lesson.model, module=course.judged), lesson.held_out, lesson.processes)
    head, seen = course.judged.get_submodule(lesson.head).eval(), cached[1]
    with torch.inference_mode():
        every = np.split(np.arange(seen.images), range(judging.BATCH, seen.images, judging.BATCH))
        logits = torch.cat([head(lesson.on_device(seen.batch(indices, 0))).float().cpu() for indices in every])
    return judging.judged(logits, lesson.held_out)


def _check_batches(lesson: Lesson) -> None:
    size = min(lesson.settings.batch, len(lesson.train))
    if size < lesson.processes.count:
        raise UsageError(
            f"{lesson.processes.count} processes cannot share a step of {size} images",
            why=f"finetune.batch is {lesson.settings.batch}, and there are {len(lesson.train)} training images",
            fix="fewer processes, or a larger finetune.batch: it is that of all of them together",
        )
    if size < 2 * lesson.processes.count and layers.has_batch_norm(lesson.model.module):
        raise UsageError(
            f"{lesson.model.name} has BatchNorm, which cannot be trained on one image at a time",
            why=f"finetune.batch is {lesson.settings.batch}, and there are {len(lesson.train)} training images",
            fix="train on two or more images in one step of each process",
        )


def _diverged(course: _Course, epoch: int, why: str) -> StageError:
    """The error, after the best weights so far were written where they can be taken from."""
    scratch, kept = course.lesson.scratch, ""
    if scratch is not None and course.now.history:
        path = scratch / BEST_SO_FAR
        if course.lesson.processes.is_first:
            best = {name: value.contiguous() for name, value in {**course.start, **course.now.best}.items()}
            publish.write_file(path, safetensors.torch.save(best))
        chosen = max(course.now.history, key=lambda one: one.rank)
        kept = f"; the weights of epoch {chosen.epoch}, the best before, are kept in {printable(path)}"
    fix = "a lower finetune.learning_rate, a longer finetune.warmup, or finetune.clip_norm"
    return StageError(f"training diverged in epoch {epoch}", why=f"{why}{kept}", fix=fix)
