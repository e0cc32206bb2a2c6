"""Latency of our INT8 beside ONNX Runtime's own `quantize_static` and FP32, all on ONNX Runtime, in one run.

usage: python benchmarks/int8_latency.py [MODEL ...] [--images DIR] [--processes 10] [--output DIR]

All come from the same FP32 graph and the same 32 calibration images. "engine" is the optimized graph that `build` leaves,
the others are portable files that ONNX Runtime optimizes when it loads them. `quantize_static` gets its best settings for
x86: its own pre-processing, QDQ, uint8 activations, int8 per-channel weights. Every sample is the median of a fresh
process, the order is random, and what is measured is the same loop over a session with all optimisations on and two
threads. Weights are random, which latency does not depend on. Without --images, pictures of noise are calibrated on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _results import write
from PIL import Image

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
QUERIES, WARMUP = 40, 10
# One loop for every engine: numpy in, numpy out, as a program without our code would run the file.
LOOP = """
import os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = {"image": np.random.default_rng(0).standard_normal((1, 3, int(sys.argv[2]), int(sys.argv[2])), dtype="float32")}
for _ in range(int(sys.argv[4])): session.run(None, inputs)
times = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter_ns(); session.run(None, inputs); times.append(time.perf_counter_ns() - start)
print(times)
"""
# In a process of its own: its calibration keeps every activation, which must not count as our memory or warm our caches.
PEER = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
model, out, samples = sys.argv[1:4]
quant_pre_process(model, out + ".pre.onnx", skip_symbolic_shape=True)
class Reader(CalibrationDataReader):
    def __init__(self): self.images = iter(np.load(samples)["inputs/image"])
    def get_next(self): image = next(self.images, None); return None if image is None else {"image": image[None]}
quantize_static(out + ".pre.onnx", out, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8, per_channel=True)
"""
OURS, PEERS, FP32, ENGINE = "deploykit int8", "quantize_static int8", "fp32", "deploykit int8 engine"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--images", type=Path)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or _noise(Path(scratch, "noise"))
        for model in arguments.models:
            results[model] = _measure(_make(model, images, Path(scratch, model)), arguments.processes)
            _print(model, results[model])
    write("int8_latency", {"queries": QUERIES, "warmup": WARMUP, "latency_ns": results}, arguments.output)


def _make(model: str, images: Path, folder: Path) -> tuple[dict[str, Path], int]:
    """The three files, and the side of the input."""
    words = ["export", model, "--weights", "none", "--to", "onnxruntime", "--int8", "--calibrate", str(images)]
    # As many golden samples as calibration images: what the peer is given below is what ours was calibrated on.
    words += ["--calibration-images", "32", "--set", "export.samples=32", "--set", "benchmark.enabled=false"]
    words += ["--set", "quantize.speed=false"]
    words += ["--output", str(folder)]
    subprocess.run([sys.executable, "-m", "deploykit", *words], check=True, capture_output=True)
    peer, fp32 = folder / "quantize_static.onnx", folder / "export-onnx" / "model.onnx"
    command = [sys.executable, "-W", "ignore", "-c", PEER, str(fp32), str(peer), str(folder / "export-onnx" / "samples.npz")]
    subprocess.run(command, check=True, capture_output=True)
    manifest = json.loads((folder / "export-onnx" / "manifest.json").read_text())
    files = {OURS: folder / "quantize-onnxruntime" / "model.onnx", PEERS: peer, FP32: fp32}
    files[ENGINE] = folder / "build-onnxruntime-int8" / "engine.onnx"
    return files, manifest["inputs"][0]["shape"][2]


def _measure(made: tuple[dict[str, Path], int], processes: int) -> dict[str, list[list[int]]]:
    files, side = made
    raw: dict[str, list[list[int]]] = {name: [] for name in files}
    for _ in range(processes):
        for name in random.sample(list(files), len(files)):
            command = [sys.executable, "-c", LOOP, str(files[name]), str(side), str(QUERIES), str(WARMUP)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
            raw[name].append(json.loads(answer.stdout))
    return raw


def _print(model: str, raw: dict[str, list[list[int]]]) -> None:
    medians = {name: np.array([statistics.median(process) for process in processes]) for name, processes in raw.items()}
    print(f"{model}: " + ", ".join(f"{name} {np.median(values) / 1e6:.2f} ms" for name, values in medians.items()))
    for ours, other in ((OURS, PEERS), (ENGINE, PEERS), (OURS, FP32)):
        ratio, low, high = _ratio(medians[ours], medians[other])
        print(f"  {ours} / {other}: {ratio:.3f} (95 % {low:.3f} to {high:.3f})", flush=True)


def _ratio(ours: np.ndarray, theirs: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Ratio of medians over processes, and its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    picks = [np.median(x[generator.integers(0, len(x), (resamples, len(x)))], axis=1) for x in (ours, theirs)]
    low, high = np.percentile(picks[0] / picks[1], [2.5, 97.5])
    return float(np.median(ours) / np.median(theirs)), float(low), float(high)


def _noise(folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(32):
        Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


if __name__ == "__main__":
    main()
