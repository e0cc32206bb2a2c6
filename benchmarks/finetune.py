"""What fine-tuning gains over training from scratch, what cached features save, what networks reach, and what an epoch costs.

usage: python benchmarks/finetune.py gain --images DIR --checkpoint FILE [--network mobilenet_v3_small] [--pixels 64] [--seeds 5]
           [--epochs 12] [--page FILE] [--output DIR]
       python benchmarks/finetune.py scratch --images DIR [--epochs 12] [--count 10000] [--page FILE] [--output DIR]
       python benchmarks/finetune.py features --images DIR [--network vgg16] [--pixels 224] [--count 200] [--output DIR]
       python benchmarks/finetune.py memory [--output DIR]
       python benchmarks/finetune.py overhead [--processes 5] [--output DIR]
       python benchmarks/finetune.py layouts [--processes 3] [--count 48] [--output DIR]

gain: DIR holds train/ and val/, each with a folder for each class; FILE are weights of the network for other classes. Fine-tuning
is the head on cached features and then everything; the rival is the same network from scratch, at the best of three learning
rates (chosen by its own mean over the seeds, which favours it), for twice as many epochs. Of each training the best epoch on val
counts. The interval is that of the paired differences of seeds (Student's t, 95 %).

scratch: DIR holds train/ and test/ of small colour pictures (CIFAR-10); LeNet-5 for colour and CIFAR's ResNet-20 from
random weights, the same number of epochs, the best epoch by a tenth of train; test is read once, with these weights.

features: seconds of an epoch of the head alone on COUNT images, with the backbone run in every epoch and on features that were
computed once, for the last layer and for the whole classifier block. The first epoch, which computes them, is not counted.

memory: in a process whose anonymous memory is limited, features larger than the limit are made, and the head learns from them;
the control, which reads the same file into memory, has to fail under the same limit.

overhead: seconds of a training step of ResNet-18 at 224 pixels by `deploykit finetune`, its progress bar on, and by a bare loop
of PyTorch over the same batches, in fresh processes that alternate.

layouts: seconds of a training step on this CPU of a network without depthwise convolutions and of one that is made of them, with
channels first and last, in float32 and in bfloat16 by autocast; batches of 16 at 160 pixels, COUNT pictures an epoch, each in
fresh processes in random order. `finetune.channels_last = "auto"` follows it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import random
import resource
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from _results import write
from PIL import Image
from torch import nn

from deploykit import data, finetune, models
from deploykit.artifact import Preprocess
from deploykit.cli.options import progress_bars
from deploykit.data.pictures import with_shorter_side
from deploykit.models import Model
from deploykit.recipe import FinetuneTable, ModelTable, PreprocessTable
from deploykit.report import training

RATES = (0.0003, 0.001, 0.003)
ORDERS, NUMBERS = {"channels first": False, "channels last": True}, {"float32": False, "bfloat16": True}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 10: 2.26}  # two-sided, by the number of pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gain", "scratch", "features", "memory", "overhead", "layouts"])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--network")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--count", type=int)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--processes", type=int, default=5, help="of each kind, for overhead and layouts")
    parser.add_argument("--page", type=Path, help="where to leave the page of the first fine-tuning")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        if arguments.what == "layouts":
            one_layout(arguments.network, arguments.kind, arguments.count)
        else:
            one_overhead(arguments.kind, arguments.count)
        return
    every = {"gain": gain, "scratch": scratch, "features": features, "memory": memory, "overhead": overhead, "layouts": layouts}
    every[arguments.what](arguments)


def gain(arguments: argparse.Namespace) -> None:
    network, pixels = arguments.network or "mobilenet_v3_small", arguments.pixels or 64
    how = PreprocessTable(resize=round(pixels * 1.14), crop=pixels)
    parts = [resized_once(data.folder(arguments.images / part, labelled=True), how) for part in ("train", "val")]
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        common: dict[str, Any] = {"augment": ("flip", "crop"), "seed": seed}
        table = FinetuneTable(mode="head first", cache_features=True, views=4, epochs=arguments.epochs, **common)
        page = arguments.page if seed == 0 else None
        model = ModelTable(name=network, weights=str(arguments.checkpoint), seed=seed)
        runs.setdefault("fine-tuned", []).append(learned(model, how, parts, table, page))
        for rate in RATES:
            table = FinetuneTable(epochs=2 * arguments.epochs, learning_rate=rate, **common)
            found = learned(ModelTable(name=network, weights="none", seed=seed), how, parts, table)
            runs.setdefault(f"from scratch at {rate:g}", []).append(found)
        print({name: [round(100 * one["accuracy"], 1) for one in found] for name, found in runs.items()}, flush=True)
    shares = {name: np.array([one["accuracy"] for one in found]) for name, found in runs.items()}
    best = max((name for name in shares if name != "fine-tuned"), key=lambda name: float(shares[name].mean()))
    differences = 100 * (shares["fine-tuned"] - shares[best])
    half = T_95[arguments.seeds] * differences.std(ddof=1) / len(differences) ** 0.5
    ours, theirs = (100 * shares[name].mean() for name in ("fine-tuned", best))
    print(f"{network}, {pixels} pixels: fine-tuned {ours:.1f} %, {best} {theirs:.1f} %")
    print(f"difference {differences.mean():+.1f} points ({differences.mean() - half:+.1f} to {differences.mean() + half:+.1f})")
    content = {"network": network, "pixels": pixels, "epochs": arguments.epochs, "best_rival": best}
    write(f"finetune_gain_{network}", {**content, "points": differences.tolist(), "half": half, "runs": runs}, arguments.output)


def resized_once(images: data.Images, how: PreprocessTable) -> data.Images:
    """The same set, every picture resized as preprocessing would do it in every epoch, which then changes nothing any more."""
    assert how.resize is not None
    resized = []
    for source in images.sources:
        assert isinstance(source, Path)
        picture = data.open_image(source).convert("RGB")
        resized.append(np.array(picture.resize(with_shorter_side(picture.size, how.resize), Image.Resampling.BILINEAR)))
    return replace(images, sources=tuple(resized))


def learned(
    model: ModelTable, how: PreprocessTable, parts: list[data.Images], table: FinetuneTable, page: Path | None = None
) -> dict[str, Any]:
    """The best accuracy on the second of `parts`, and every epoch, of one training on the first."""
    train, held_out = parts[:2]
    network = models.with_classes(models.load(model, how, data_classes=train.classes), train.classes, seed=table.seed)
    with tempfile.TemporaryDirectory() as folder:
        made = finetune.finetune(network, train, held_out, table, Path(folder), scratch=Path(folder, "scratch"))
        if page is not None:
            page.write_text(training.render(training.told(made, "", ""), made))
        found = {"accuracy": made.facts["best_val_accuracy"], "history": json.loads(Path(folder, finetune.HISTORY).read_text())}
    if len(parts) > 2:
        found["test_loss"], found["test_accuracy"] = finetune.evaluate(network, parts[2])
    return found


def scratch(arguments: argparse.Namespace) -> None:
    everything = data.calibration_subset(data.folder(arguments.images / "train", labelled=True), arguments.count or 10_000, 0)
    test = data.folder(arguments.images / "test", classes=everything.classes, labelled=True)
    held_out = range(9, len(everything), 10)  # a folder is sorted by class, so this is a tenth of each
    parts = [everything.take(sorted({*range(len(everything))} - {*held_out})), everything.take(held_out), test]
    runs = {}
    for network in ("lenet5_rgb", "cifar_resnet20"):
        table = FinetuneTable(epochs=arguments.epochs, batch=128, learning_rate=3e-3, augment=("flip",), shift=4)
        how = PreprocessTable(channels="RGB", crop=32)
        page = arguments.page and arguments.page.with_stem(f"{arguments.page.stem}_{network}")
        runs[network] = learned(ModelTable(name=network, weights="none"), how, parts, table, page)
        print(f"{network}: {100 * runs[network]['test_accuracy']:.1f} % of {len(test):,} test images", flush=True)
    write("finetune_scratch", {"images": len(parts[0]), "epochs": arguments.epochs, "runs": runs}, arguments.output)


def features(arguments: argparse.Namespace) -> None:
    network, pixels = arguments.network or "vgg16", arguments.pixels or 224
    everything = data.folder(arguments.images, labelled=True)
    images = data.calibration_subset(everything, arguments.count or 200, 0)
    seconds: dict[str, list[float]] = {}
    for head in ("last", "classifier"):
        for cached in (False, True):
            epochs = 4 if cached else 2
            kind = f"{head}, {'cached' if cached else 'plain'}"
            seconds[kind] = epoch_seconds(network, pixels, images, head, epochs, cached=cached)
            print(kind, seconds[kind], flush=True)
    for head in ("last", "classifier"):
        plain, cached_s = (float(np.median(seconds[f"{head}, {kind}"])) for kind in ("plain", "cached"))
        ratio = f"{plain:.2f} s an epoch, {cached_s:.4f} s cached: {plain / cached_s:.0f} times"
        print(f"{network}, {len(images)} images, head = {head}: {ratio}")
    write(
        "finetune_features", {"network": network, "pixels": pixels, "images": len(images), "seconds": seconds}, arguments.output
    )


def memory(arguments: argparse.Namespace) -> None:
    """Features four times as large as what the process may still allocate: the head learns, the control does not load them."""
    images, width, allowed = 4096, 65_536, 256 << 20
    generator = np.random.default_rng(0)
    pictures = tuple(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(images))
    labels = np.arange(images) % 2
    everything = data.Images(tuple(map(str, range(images))), labels, ("even", "odd"), (), "noise", pictures)
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, width, bias=False))
    how = Preprocess(resize=None, crop=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, fit="stretch")
    module = nn.Sequential(OrderedDict(body=body, head=nn.Linear(width, 2)))
    model = Model(module, "wide", how, everything.classes, 2, "random", is_random=True, notes=())
    table = FinetuneTable(mode="head", epochs=2, cache_features=True, batch=64)
    with tempfile.TemporaryDirectory() as folder:
        few = everything.take(range(64))
        train = partial(finetune.finetune, model, settings=table, held_out=few, scratch=Path(folder, "scratch"))
        train(train=few, folder=Path(folder))  # what torch and the threads take once is taken
        before = _private_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (before + allowed, before + allowed))
        train(train=everything, folder=Path(folder))
        file = max(Path(folder, "scratch").glob("features-*.npy"), key=lambda path: path.stat().st_size)
        size, grown = file.stat().st_size, _private_bytes() - before
        try:
            np.load(file)
        except MemoryError:
            control = "fails, as it has to"
        else:
            control = "was read: the limit does not limit"
    print(f"features of {size / 1e6:.0f} MB, {allowed / 1e6:.0f} MB allowed, {grown / 1e6:.0f} MB more taken; control: {control}")
    content = {"features_bytes": size, "allowed_bytes": allowed, "grown_bytes": grown, "control": control}
    write("finetune_memory", content, arguments.output)
    sys.exit(0 if control.startswith("fails") else 1)


def _private_bytes() -> int:
    """What RLIMIT_DATA counts: private writable memory, but no mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def overhead(arguments: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {"deploykit": [], "bare": []}
    for number in range(arguments.processes):
        for kind in ("deploykit", "bare") if number % 2 else ("bare", "deploykit"):
            command = [sys.executable, __file__, "overhead", "--kind", kind, "--count", str(arguments.count or 64)]
            seconds[kind].append(_last_number_on_a_terminal(command))
        print({kind: [round(value, 3) for value in values] for kind, values in seconds.items()}, flush=True)
    ratios = np.array(seconds["deploykit"]) / np.array(seconds["bare"])
    print(f"a step of deploykit takes {np.median(ratios):.3f} times that of the bare loop")
    write("finetune_overhead", {"seconds": seconds, "ratio": float(np.median(ratios))}, arguments.output)


def layouts(arguments: argparse.Namespace) -> None:
    kinds = [f"{order}, {number}" for order in ORDERS for number in NUMBERS]
    seconds = {name: {kind: list[float]() for kind in kinds} for name in ("resnet18", "mobilenet_v2")}
    chosen = random.Random(0)
    for _ in range(arguments.processes):
        runs = [(name, kind) for name in seconds for kind in kinds]
        chosen.shuffle(runs)
        for name, kind in runs:
            command = [
                sys.executable,
                __file__,
                "layouts",
                "--network",
                name,
                "--kind",
                kind,
                "--count",
                str(arguments.count or 48),
            ]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds[name][kind].append(float(said.split()[-1]))
            print(name, kind, f"{seconds[name][kind][-1]:.3f} s a step", flush=True)
    middles = {name: {kind: float(np.median(found)) for kind, found in each.items()} for name, each in seconds.items()}
    for name, each in middles.items():
        for kind, middle in each.items():
            print(f"{name}, {kind}: {middle:.3f} s a step, {middle / each[kinds[0]]:.2f} times {kinds[0]}")
    write("finetune_layouts", {"seconds": seconds, "medians": middles}, arguments.output)


def one_layout(network: str, kind: str, count: int) -> None:
    """Print seconds of a step at 160 pixels, batch 16, laid out and computed as `kind` says; the first step is not counted."""
    order, number = kind.split(", ")
    images = noise(count, side=160)
    model = models.load(ModelTable(name=network, weights="none"), PreprocessTable(crop=160, resize=160))
    model = models.with_classes(model, images.classes, seed=0)
    table = FinetuneTable(epochs=1, batch=16, channels_last=ORDERS[order], autocast=NUMBERS[number], device="cpu")
    print(step_seconds(model, images, table, count // 16 - 1))


def noise(count: int, *, side: int) -> data.Images:
    """Pictures in memory that are of two classes and show nothing."""
    generator = np.random.default_rng(0)
    pictures = tuple(generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count))
    return data.Images(tuple(map(str, range(count))), np.arange(count) % 2, ("even", "odd"), (), "noise", pictures)


def step_seconds(model: Model, images: data.Images, table: FinetuneTable, steps: int) -> float:
    """Mean seconds of the last so many steps of a fine-tuning: from one step's end to another's, for evaluation and the saving of
    an epoch are none of a bare loop's."""
    moments: list[float] = []
    with tempfile.TemporaryDirectory() as folder, progress_bars() as bars:

        def seen(what: str, done: int, total: int) -> None:
            if what.startswith("images"):
                moments.append(perf_counter())
            bars(what, done, total)

        finetune.finetune(model, images, images.take(range(2)), table, Path(folder), scratch=Path(folder, "s"), progress=seen)
    return (moments[-1] - moments[-steps - 1]) / steps


def _last_number_on_a_terminal(command: list[str]) -> float:
    """The last line of standard output as a number; standard error is a terminal, so that bars are drawn."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as child:
        os.close(theirs)
        drain = threading.Thread(target=_drained, args=(ours,))
        drain.start()
        assert child.stdout is not None
        lines = child.stdout.read().split()
        child.wait()
        drain.join()
    os.close(ours)
    return float(lines[-1])


def _drained(terminal: int) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while os.read(terminal, 65536):
            pass


def one_overhead(kind: str, count: int) -> None:
    """Print seconds of a step of ResNet-18 at 224 pixels, batch 16, over `count` pictures in memory, of the second epoch."""
    images = noise(count, side=256)
    model = models.with_classes(models.load(ModelTable(name="resnet18", weights="none")), images.classes, seed=0)
    table = FinetuneTable(epochs=2, batch=16)
    moments: list[float] = []
    if kind == "bare":
        optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-3, weight_decay=0.01)
        model.module.train()
        for epoch in range(2):
            moments.append(perf_counter())
            order = np.random.default_rng(epoch).permutation(count)
            for start, batch in zip(range(0, count, 16), images.take(order).batches(model.preprocess, 16), strict=True):
                labels = torch.from_numpy(order[start : start + 16] % 2)
                loss = nn.functional.cross_entropy(model.module(torch.from_numpy(batch)), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        moments.append(perf_counter())
        print((moments[2] - moments[1]) / (count / 16))
        return
    print(step_seconds(model, images, table, count // 16 - 1))


def epoch_seconds(network: str, pixels: int, images: data.Images, head: str, epochs: int, *, cached: bool) -> list[float]:
    """Seconds of each training epoch after the first; held-out is one image of every class."""
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
