"""Model -> Model: training on the user's images, ending with the checkpoint that did best on held-out ones.

An epoch draws all its chance from the seed and its own number, so that a training that was killed goes on from its last
finished epoch to the very same weights.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from deploykit.artifact import Artifact, Format, Precision, TensorSpec
from deploykit.data import Images
from deploykit.finetune import augment, auxiliary, layers, loop, pictures
from deploykit.finetune.judging import Verdict, evaluate, verdict
from deploykit.finetune.lesson import Lesson, device_of, prepared
from deploykit.finetune.processes import ALONE, Processes
from deploykit.finetune.state import Epoch, State
from deploykit.jsonable import to_json
from deploykit.models import Model
from deploykit.progress import Progress, silent
from deploykit.recipe import FinetuneTable

__all__ = ["EXAMPLES", "HISTORY", "WEIGHTS", "assist", "evaluate", "finetune"]

WEIGHTS, HISTORY, EXAMPLES = "model.safetensors", "history.json", "examples.json"
_THUMBNAIL = 96


def finetune(
    model: Model,
    train: Images,
    held_out: Images,
    settings: FinetuneTable,
    folder: Path,
    *,
    scratch: Path | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Artifact:
    """Train as `settings` say, and write the best weights and the history into `folder`.

    "Best" is the highest accuracy on `held_out`, then the lowest loss. Both sets are labelled by `model.classes`. The
    same seed, torch version and thread count give the same weights on a CPU; on a GPU with `settings.deterministic`. With
    `scratch`, a folder that outlives a killed run, every finished epoch is kept there, and the next call goes on from it;
    features of a frozen backbone lie there too. This is the first of `processes`; the others `assist`.

    Raises DataError for images that cannot be read, UsageError for settings that do not fit the network, CapabilityError when
    there is no GPU and `settings` name one, StageError when the loss is not a number any more: what was good is in `scratch`.
    """
    lesson, ended = _trained(model, train, held_out, settings, scratch, progress, processes)
    model = lesson.model
    model.module.to(lesson.device)
    model.module.load_state_dict({name: ended.best[name] for name in model.module.state_dict()})
    found = verdict(model, held_out)
    sheets = pictures.draw(model, layers.named(model, settings.show, "show"), held_out, folder)
    model.module.cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(True)
    weights = {name: value.contiguous() for name, value in model.module.state_dict().items()}
    # Not save_file: its errors are its own (a full disk is no OSError), and the file can be read by its owner alone.
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights))
    (folder / HISTORY).write_text(json.dumps([asdict(epoch) for epoch in ended.history], indent=1) + "\n")
    shown = [{**one, "png": _thumbnail(held_out, one["index"]), "name": held_out.names[one["index"]]} for one in found.examples]
    (folder / EXAMPLES).write_text(json.dumps(shown) + "\n")
    return _artifact(lesson, ended.history, found, sheets, folder)


def assist(
    model: Model,
    train: Images,
    held_out: Images,
    settings: FinetuneTable,
    *,
    scratch: Path | None,
    processes: Processes,
) -> None:
    """Take this process's share of the training that the first of `processes` does with `finetune`; writes nothing.

    Raises what `finetune` raises.
    """
    _trained(model, train, held_out, settings, scratch, silent, processes)


def _trained(
    model: Model,
    train: Images,
    held_out: Images,
    settings: FinetuneTable,
    scratch: Path | None,
    progress: Progress,
    processes: Processes,
) -> tuple[Lesson, State]:
    model = prepared(model, settings, processes)
    layers.named(model, settings.show, "show")
    lesson = Lesson(model, train, held_out, settings, device_of(settings, processes), scratch, progress, processes)
    with _reproducible(lesson), auxiliary.attached(model, wanted=settings.aux_loss is not None, seed=settings.seed):
        return lesson, loop.trained(lesson)


@contextmanager
def _reproducible(lesson: Lesson) -> Iterator[None]:
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


def _thumbnail(images: Images, index: int) -> str:
    return base64.b64encode(images.thumbnail(index, side=_THUMBNAIL)).decode()


def _artifact(lesson: Lesson, history: list[Epoch], found: Verdict, sheets: list[dict[str, str]], folder: Path) -> Artifact:
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
            "channels_last": lesson.layout is torch.channels_last,
            "processes": lesson.processes.count,
            "augmentation": list(augment.names(lesson.settings)),
            "confusion": found.confusion,
            "sheets": sheets,
        },
    )
