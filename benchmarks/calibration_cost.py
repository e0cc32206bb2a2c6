"""What calibration costs beside a plain FP32 pass over the same images, and beside ONNX Runtime's own entropy calibration.

usage: python benchmarks/calibration_cost.py MODEL.onnx --images DIR [--rounds 5] [--output DIR]

MODEL.onnx is an exported FP32 network with a dynamic batch (`deploykit export resnet50 --to onnx --weights none`). Images
are decoded beforehand into one file, which every process reads batch by batch. All run in fresh processes, in random order:

    plain      FP32 inference on ONNX Runtime, all optimisations, at the batch that turns out the fastest of 1, 4, 8, 16
    entropy    our whole calibration (observe every activation) and entropy ranges of every tensor for uint8
    mse        the same with ranges of the least squared error
    peer       onnxruntime.quantization's entropy calibrator over 32 images, one at a time (its memory grows with each)

Times leave out loading the model, which for ours is opening it with all activations exposed, and is told apart; memory is
the most that a process held beyond what it held with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _results import write

from deploykit.artifact import Preprocess
from deploykit.data import folders

COMMON = """
import json, os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
def memory(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
model, file, count, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
side = 3 * 224 * 224
stored = os.path.getsize(file) // (4 * side)
def batches(size):
    for start in range(0, count, size):
        wanted = [(index % stored) for index in range(start, min(count, start + size))]
        yield np.stack([np.fromfile(file, np.float32, side, offset=4 * side * i).reshape(3, 224, 224) for i in wanted])
def tell(start, loaded, opening=0.0):
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds - opening, "opening_s": opening, "mib": memory("VmHWM") - loaded}))
"""
PLAIN = """
import onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = len(os.sched_getaffinity(0))
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
loaded, start = memory("VmRSS"), time.perf_counter()
for images in batches(batch): session.run(None, {"image": images})
tell(start, loaded)
"""
OURS = """
from pathlib import Path
import onnx_ir as ir
from deploykit import quantize, runtimes
from deploykit.quantize import observe, optimal, place
graph = ir.load(model).graph
tensors = place.tensors(graph, [entry.rules for entry in runtimes.REGISTRY.values() if entry.rules])
lanes, size = observe.lanes_and_batch(quantize.bytes_for_one_image(graph, tensors), None)
session = runtimes.get("onnxruntime").reference(Path(model), optimise=True)
loaded = memory("VmRSS"); session.close()
opening, expose = 0.0, observe.expose
def timed(*arguments, **settings):
    global opening
    began = time.perf_counter(); exposed = expose(*arguments, **settings); opening += time.perf_counter() - began
    return exposed
observe.expose = timed
start = time.perf_counter()
seen = observe.observe(Path(model), tensors, batches(size), total=count, lanes=lanes)
for histogram in seen.values(): getattr(optimal, METHOD)(histogram, "uint8")
tell(start, loaded, opening)
"""
PEER = """
import tempfile, onnxruntime
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
class Reader(CalibrationDataReader):
    def __init__(self): self.images = batches(1)
    def get_next(self): image = next(self.images, None); return None if image is None else {"image": image}
calibrator = create_calibrator(model, None, tempfile.mktemp(suffix=".onnx"), calibrate_method=CalibrationMethod.Entropy)
calibrator.set_execution_providers(["CPUExecutionProvider"])
loaded, start = memory("VmRSS"), time.perf_counter()
calibrator.collect_data(Reader()); calibrator.compute_data()
tell(start, loaded)
"""
IMAGES, PEERS_IMAGES = 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = _decoded(arguments.images, Path(scratch, "images.f32"))
        run = partial(_run, arguments.model, file)
        tried = {batch: statistics.median(run(PLAIN, 32, batch)["seconds"] for _ in range(3)) for batch in (1, 4, 8, 16)}
        best = min(tried, key=tried.__getitem__)
        variants = {
            "plain": (PLAIN, IMAGES, best),
            **{method: (f"METHOD = {method!r}\n{OURS}", IMAGES, 0) for method in ("entropy", "mse")},
        }
        raw: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
        for _ in range(arguments.rounds):
            for name in random.sample(list(variants), len(variants)):
                raw[name].append(run(*variants[name]))
        for count in (64, 512):
            raw[f"entropy, {count} images"] = [run(variants["entropy"][0], count, 0) for _ in range(2)]
        raw[f"peer, {PEERS_IMAGES} images"] = [run(PEER, PEERS_IMAGES, 1)]
    _print(raw, best)
    write("calibration_cost", {"plain_batch": best, "plain_batches_s": tried, "raw": raw}, arguments.output)


def _decoded(folder: Path, file: Path) -> Path:
    how = Preprocess(resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = folders.folder(folder, labelled=False)
    with file.open("wb") as stream:
        for batch in images.take(range(min(IMAGES, len(images)))).batches(how, 16):
            np.ascontiguousarray(batch, np.float32).tofile(stream)
    return file


def _run(model: Path, file: Path, code: str, count: int, batch: int) -> dict[str, float]:
    words = [sys.executable, "-c", COMMON + code, str(model), str(file), str(count), str(batch)]
    child = subprocess.run(words, capture_output=True, text=True)
    if child.returncode != 0:
        sys.exit(child.stderr)
    answer: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _print(raw: dict[str, list[dict[str, Any]]], best: int) -> None:
    plain = statistics.median(entry["seconds"] for entry in raw["plain"])
    print(f"plain FP32 pass over {IMAGES} images, batch {best}: {plain:.2f} s")
    for name, entries in raw.items():
        seconds, mib = (statistics.median(entry[key] for entry in entries) for key in ("seconds", "mib"))
        opening = statistics.median(entry.get("opening_s", 0.0) for entry in entries)
        whole = (seconds + opening) / plain
        times = f", {seconds / plain:.2f} times the plain pass" if name in ("entropy", "mse") else ""
        times += f" ({whole:.2f} with {opening:.2f} s of opening)" if times else ""
        print(f"{name:24} {seconds:7.2f} s{times}; {mib:.0f} MiB beyond the loaded model")


if __name__ == "__main__":
    main()
