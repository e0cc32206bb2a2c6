"""What `deploykit parity A B` costs beside the inference that it contains: two ONNX files on the same pictures.

usage: python benchmarks/parity_cost.py A.onnx B.onnx --images PHOTOS [--count 64] [--crop 224] [--repeats 5] [--output DIR]

The alternative is a plain loop over `session.run` with ONNX Runtime's own defaults for all optimizations, on the same batches
of 16, first all of A and then all of B. Start (opening files and sessions) and decoding are left out on both sides. Loop and
parity alternate; the ratio is of their medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from _results import write
from numpy.typing import NDArray

from deploykit import data
from deploykit.artifact import Preprocess
from deploykit.crosscheck import Said, compare_two

BATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs=2, type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    first, second = arguments.sides
    loops, runs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        chosen = copied(arguments.images, arguments.count, Path(scratch))
        how = Preprocess(arguments.crop, (arguments.crop, arguments.crop), MEAN, STD)
        batches = list(data.folder(chosen, labelled=False).batches(how, BATCH))
        said = Said(preprocess={"crop": str(arguments.crop), "mean": str(list(MEAN)), "std": str(list(STD))})
        for _ in range(arguments.repeats):
            loops.append(sum(loop(side, batches) for side in (first, second)))
            seconds = compare_two(str(first), str(second), said, images=chosen)["seconds"]
            runs.append(seconds["compared"] - seconds["inputs"])
    ratio = statistics.median(runs) / statistics.median(loops)
    print(f"parity {statistics.median(runs):.3f} s, the loop {statistics.median(loops):.3f} s, ratio {ratio:.3f}")
    facts = {"images": arguments.count, "crop": arguments.crop, "parity_seconds": runs, "loop_seconds": loops, "ratio": ratio}
    write("parity_cost", facts, arguments.output)


def copied(images: Path, count: int, folder: Path) -> Path:
    """So many of the pictures, in a folder of their own."""
    found = data.folder(images, labelled=False)
    for index, source in enumerate(found.sources[:count]):
        assert isinstance(source, Path)
        shutil.copyfile(source, folder / f"{index:04d}{source.suffix}")
    return folder


def loop(path: Path, batches: list[NDArray[np.float32]]) -> float:
    """Seconds of a plain loop over all batches."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    start = perf_counter()
    for batch in batches:
        session.run(None, {name: batch})
    return perf_counter() - start


if __name__ == "__main__":
    main()
