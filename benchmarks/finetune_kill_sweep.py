"""SIGKILL at random moments of a training: does the same command reach the very same weights?

usage: python benchmarks/finetune_kill_sweep.py [--kills 20] [--epochs 6] [--seed 0] [--output DIR]

Each trial trains CIFAR's ResNet-20 in an empty folder (the head on cached features and then everything, with EMA and
augmentation), is killed at a moment drawn over the length of an undisturbed training, and is started again. The file of weights
has to be that of the undisturbed training, byte for byte, and no finished epoch is trained again. Where a training ended before
its moment, another one is drawn. Children are forked from one process that has loaded everything, so a trial takes the time of
a training alone.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
from _results import write
from PIL import Image

import deploykit.finetune
import deploykit.models
import deploykit.report.training  # noqa: F401  loaded here, so that the children have them
from deploykit import pipeline, recipe
from deploykit.artifact import digest_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        _draw(scratch / "pictures")
        asked = _recipe(scratch, arguments.epochs)
        for warm in ("cold", "whole"):  # the second is timed, when the disk has what is imported on the way
            start = monotonic()
            if _ended(_started(asked, scratch / warm)) != 0:
                sys.exit("the undisturbed training failed")
            length = monotonic() - start
        wanted = digest_file(scratch / "whole" / "finetune" / "model.safetensors")
        trials: list[dict[str, Any]] = []
        while (killed := sum(trial["was_killed"] for trial in trials)) < arguments.kills and len(trials) < 3 * arguments.kills:
            trials.append(_trial(asked, scratch / str(len(trials)), generator.uniform(0, length), wanted))
    failures = [trial for trial in trials if trial["problems"]]
    print(f"{len(trials)} trials over {length:.1f} s, {killed} killed before their end: {len(failures)} with problems")
    write("finetune_kill_sweep", {"length_s": length, "epochs": arguments.epochs, "trials": trials}, arguments.output)
    sys.exit(1 if failures or killed < arguments.kills else 0)


def _trial(asked: recipe.Recipe, folder: Path, delay_s: float, wanted: str) -> dict[str, Any]:
    child = _started(asked, folder)
    sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    was_killed = _ended(child) != 0
    before = _epochs_of(folder)
    code = _ended(_started(asked, folder))
    problems = [] if code == 0 else [f"the rerun ended with {code}"]
    if code == 0 and digest_file(folder / "finetune" / "model.safetensors") != wanted:
        problems.append("other weights than those of the undisturbed training")
    trained = _epochs_of(folder)
    if len(set(trained)) < len(trained):  # an epoch is logged when it is kept
        problems.append(f"finished epochs were trained again: {trained}")
    print(f"killed after {delay_s:5.1f} s, {len(before)} epochs done: {problems or 'the same weights'}", flush=True)
    return {"delay_s": delay_s, "was_killed": was_killed, "epochs_before": len(before), "problems": problems}


def _epochs_of(folder: Path) -> list[int]:
    log = folder.with_suffix(".log")
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def _started(asked: recipe.Recipe, folder: Path) -> int:
    """The id of a child that trains, and writes each finished epoch's number into a log."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        seen: list[int] = []

        def finished(what: str, done: int, _total: int) -> None:
            if what == "finetune":
                if seen:
                    os.write(log, f"{done}\n".encode())
                seen.append(done)

        pipeline.train(asked, folder, progress=finished)
        code = 0
    finally:
        os._exit(code)


def _ended(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _draw(root: Path) -> None:
    """Noisy bars that stand or lie."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 96), ("val", 32)):
        for label, shape in (("lying", (32, 1, 3)), ("standing", (1, 32, 3))):
            (root / part / label).mkdir(parents=True)
            for index in range(count // 2):
                bars = np.broadcast_to(generator.integers(0, 2, shape) * 90, (32, 32, 3)) + generator.integers(
                    0, 160, (32, 32, 3)
                )
                Image.fromarray(bars.astype(np.uint8)).save(root / part / label / f"{index:02d}.png")


def _recipe(scratch: Path, epochs: int) -> recipe.Recipe:
    pictures = {"train": str(scratch / "pictures" / "train"), "held_out": str(scratch / "pictures" / "val")}
    table = {"mode": "head first", "head_epochs": epochs // 3, "epochs": epochs, "cache_features": True, "views": 2, "ema": 0.9}
    content = {"name": "sweep", "model": {"name": "cifar_resnet20", "weights": "none"}, "data": pictures}
    table |= {"augment": ["flip", "crop"], "batch": 16}
    return recipe.parse({**content, "finetune": table}, base=scratch, source="the sweep")


if __name__ == "__main__":
    main()
