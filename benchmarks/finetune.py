"""What fine-tuning gains over training from scratch, and what cached features save.

usage: python benchmarks/finetune.py gain --images DIR --checkpoint FILE [--network resnet18] [--pixels 64] [--seeds 5]
           [--epochs 12] [--output DIR]
       python benchmarks/finetune.py features --images DIR [--network vgg16] [--pixels 224] [--count 200] [--output DIR]

gain: DIR holds train/ and val/, each with a folder for each class; FILE are weights of the network for other classes. Fine-tuning
is the head on cached features and then everything; the rival is the same network from scratch, at the best of three learning
rates (chosen by its own mean over the seeds, which favours it), for twice as many epochs. The interval is that of the paired
differences of seeds (Student's t, 95 %).

features: seconds of an epoch of the head alone on COUNT images, with the backbone run in every epoch and on features that were
computed once, for the last layer and for the whole classifier block. The first epoch, which computes them, is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from _results import write

from deploykit import data, finetune, models
from deploykit.models import Model
from deploykit.recipe import FinetuneTable, ModelTable, PreprocessTable

RATES = (0.0003, 0.001, 0.003)
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}  # two-sided, by the number of pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gain", "features"])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--network")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    (gain if arguments.what == "gain" else features)(arguments)


def gain(arguments: argparse.Namespace) -> None:
    network, pixels = arguments.network or "resnet18", arguments.pixels or 64
    words = [
        network,
        "--data",
        str(arguments.images),
        "--augment",
        "flip",
        "--augment",
        "crop",
        "--epochs",
        str(arguments.epochs),
    ]
    for key, value in (("resize", round(pixels * 1.14)), ("crop", pixels)):
        words += ["--set", f"preprocess.{key}={value}"]
    tuned = ["--weights", str(arguments.checkpoint), "--mode", "head first", "--cache-features", "--set", "finetune.views=4"]
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        found.setdefault("fine-tuned", []).append(accuracy([*words, *tuned], seed))
        for rate in RATES:
            scratch = [*words, "--weights", "none", "--learning-rate", str(rate), "--epochs", str(2 * arguments.epochs)]
            found.setdefault(f"from scratch at {rate:g}", []).append(accuracy(scratch, seed))
        print({name: [round(100 * share, 1) for share in shares] for name, shares in found.items()}, flush=True)
    best = max((name for name in found if name != "fine-tuned"), key=lambda name: float(np.mean(found[name])))
    differences = 100 * (np.array(found["fine-tuned"]) - np.array(found[best]))
    half = T_95[arguments.seeds] * differences.std(ddof=1) / len(differences) ** 0.5
    tuned_percent, best_percent = (100 * np.mean(found[name]) for name in ("fine-tuned", best))
    print(f"{network}, {pixels} pixels: fine-tuned {tuned_percent:.1f} %, {best} {best_percent:.1f} %")
    print(f"difference {differences.mean():+.1f} points ({differences.mean() - half:+.1f} to {differences.mean() + half:+.1f})")
    write("finetune_gain", {"network": network, "pixels": pixels, "accuracy": found, "best_rival": best}, arguments.output)


def accuracy(words: list[str], seed: int) -> float:
    """Best accuracy on the held-out images of one training, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deploykit", "finetune", *words, "--output", f"{folder}/run", "--json"]
        command += ["--set", f"finetune.seed={seed}", "--set", f"model.seed={seed}"]
        return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["best_val_accuracy"])


def features(arguments: argparse.Namespace) -> None:
    network, pixels = arguments.network or "vgg16", arguments.pixels or 224
    everything = data.folder(arguments.images, labelled=True)
    images = data.calibration_subset(everything, arguments.count, 0)
    seconds: dict[str, list[float]] = {}
    for head in ("last", "classifier"):
        for cached in (False, True):
            epochs = 4 if cached else 2
            seconds[f"{head}, {'cached' if cached else 'plain'}"] = epoch_seconds(
                network, pixels, images, head, epochs, cached=cached
            )
    for head in ("last", "classifier"):
        plain, cached_s = (float(np.median(seconds[f"{head}, {kind}"])) for kind in ("plain", "cached"))
        ratio = f"{plain:.2f} s an epoch, {cached_s:.4f} s cached: {plain / cached_s:.0f} times"
        print(f"{network}, {len(images)} images, head = {head}: {ratio}")
    write(
        "finetune_features", {"network": network, "pixels": pixels, "images": len(images), "seconds": seconds}, arguments.output
    )


def epoch_seconds(network: str, pixels: int, images: data.Images, head: str, epochs: int, *, cached: bool) -> list[float]:
    """Seconds of each training epoch after the first, without its evaluation: held-out is one image of every class."""
    model: Model = models.load(ModelTable(name=network, weights="none"), PreprocessTable(crop=pixels, resize=pixels))
    model = models.with_classes(model, images.classes, seed=0)
    assert images.labels is not None
    few = images.take([int(np.flatnonzero(images.labels == label)[0]) for label in np.unique(images.labels)])
    table = FinetuneTable(mode="head", head=head, epochs=epochs, cache_features=cached, batch=32)  # type: ignore[arg-type]
    moments: list[float] = []

    def seen(what: str, _done: int, _total: int) -> None:
        if what == "finetune":
            moments.append(perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, "scratch") if cached else None
        finetune.finetune(model, images, few, table, Path(folder), scratch=scratch, progress=seen)
    return [float(step) for step in np.diff(moments)[1:]]


if __name__ == "__main__":
    main()
