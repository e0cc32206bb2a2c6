"""Model -> Model: training on the user's images, ending with the checkpoint that did best on held-out ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from deploykit.artifact import Artifact, Format, Precision, TensorSpec
from deploykit.data import Images
from deploykit.errors import StageError, UsageError
from deploykit.jsonable import to_json
from deploykit.models import Model
from deploykit.progress import Progress, silent
from deploykit.recipe import FinetuneTable

WEIGHTS, HISTORY = "model.safetensors", "history.json"
_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images; accuracies are shares, losses are mean cross-entropy in nats."""

    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy: float


def finetune(
    model: Model, train: Images, held_out: Images, settings: FinetuneTable, folder: Path, *, progress: Progress = silent
) -> Artifact:
    """Train all layers with AdamW, warm-up and cosine decay, and write the best weights and the history into `folder`.

    "Best" is the highest accuracy on `held_out`, then the lowest loss. Both sets are labelled by `model.classes`. The
    same seed, torch version and thread count give the same weights. Raises DataError for images that cannot be read,
    UsageError when the network has BatchNorm and every step would see one image.
    """
    module = model.module
    assert train.labels is not None
    if _has_batch_norm(module) and min(settings.batch, len(train)) == 1:
        raise UsageError(
            f"{model.name} has BatchNorm, which cannot be trained on one image at a time",
            why=f"finetune.batch is {settings.batch}, and there are {len(train)} training images",
            fix="train on two or more images in one step",
        )
    history: list[Epoch] = []
    best: dict[str, torch.Tensor] = {}
    steps = settings.epochs * math.ceil(len(train) / settings.batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_peak(step, steps, settings.warmup))
    generator = np.random.default_rng(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # dropout
        for epoch in range(1, settings.epochs + 1):
            learning_rate = float(schedule.get_last_lr()[0])
            train_loss = _train_one_epoch(model, train, settings, optimizer, schedule, generator)
            val_loss, val_accuracy = evaluate(model, held_out)
            if not math.isfinite(train_loss) or not math.isfinite(val_loss):
                raise StageError(
                    f"training diverged in epoch {epoch}",
                    why=f"the loss is {train_loss:g} on the training images and {val_loss:g} on the held-out ones",
                    fix="a lower finetune.learning_rate, or a longer finetune.warmup",
                )
            history.append(Epoch(epoch, learning_rate, train_loss, val_loss, val_accuracy))
            if history[-1] == max(history, key=lambda one: (one.val_accuracy, -one.val_loss)):
                best = {name: value.detach().clone() for name, value in module.state_dict().items()}
            progress("finetune", epoch, settings.epochs)
    module.load_state_dict(best)
    module.eval()
    # Not save_file: its errors are its own (a full disk is no OSError), and the file can be read by its owner alone.
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(best))
    (folder / HISTORY).write_text(json.dumps([asdict(epoch) for epoch in history], indent=1) + "\n")
    return _artifact(model, train, held_out, settings, history, folder)


def evaluate(model: Model, images: Images) -> tuple[float, float]:
    """Mean cross-entropy (nats) and top-1 accuracy (share) on labelled images."""
    assert images.labels is not None
    model.module.eval()
    with torch.inference_mode():
        logits = torch.cat(
            [model.module(torch.from_numpy(batch)) for batch in images.batches(model.preprocess, _EVALUATION_BATCH)]
        )
    # torch.from_numpy wants a writable array; labels are read-only.
    labels = torch.from_numpy(np.array(images.labels))
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def _train_one_epoch(
    model: Model,
    train: Images,
    settings: FinetuneTable,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: np.random.Generator,
) -> float:
    assert train.labels is not None
    model.module.train()
    order = generator.permutation(len(train))
    total, seen = 0.0, 0
    for start, batch in zip(
        range(0, len(order), settings.batch), train.take(order).batches(model.preprocess, settings.batch), strict=True
    ):
        if len(batch) == 1 and _has_batch_norm(model.module):
            schedule.step()  # BatchNorm has no variance over one image; the step still counts for the schedule
            continue
        labels = torch.from_numpy(train.labels[order[start : start + len(batch)]])
        inputs = torch.from_numpy(_shifted(batch, settings.shift, generator))
        loss = F.cross_entropy(model.module(inputs), labels, label_smoothing=settings.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        total, seen = total + float(loss.detach()) * len(batch), seen + len(batch)
    return total / max(1, seen)


def _shifted(batch: NDArray[np.float32], most: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Every image moved by up to `most` pixels in both directions, its edge repeated."""
    if most == 0:
        return batch
    _, _, height, width = batch.shape
    padded = np.pad(batch, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    offsets = generator.integers(0, 2 * most + 1, (len(batch), 2))
    return np.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)])


def _share_of_peak(step: int, steps: int, warmup: float) -> float:
    """Linear rise, then half a cosine down to zero (Loshchilov and Hutter, ICLR 2017, without restarts)."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _artifact(
    model: Model, train: Images, held_out: Images, settings: FinetuneTable, history: list[Epoch], folder: Path
) -> Artifact:
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
        settings=to_json(settings),  # type: ignore[arg-type]
        tools={"torch": torch.__version__},
        facts={
            "model": model.name,
            "weights": model.weights,
            "notes": list(model.notes),
            "train_images": len(train),
            "val_images": len(held_out),
            "best_val_accuracy": max(epoch.val_accuracy for epoch in history),
        },
    )
