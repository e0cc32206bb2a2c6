"""Is INT8 really faster, and faster than what others make? Latency at batch 1 of our engines, FP32, and three rivals.

usage: python benchmarks/really_faster.py [NETWORK ...] --images DIR --nncf-python PYTHON [--processes 10] [--work DIR]
           [--output DIR]

For each network, random weights with calibrated BatchNorm, all from the same exported FP32 graph and the same 16 images:

    ours onnxruntime     the INT8 engine of `deploykit export NETWORK --to fastest --int8` for ONNX Runtime
    ours openvino        its INT8 engine for OpenVINO
    ours fastest         whichever of its engines that command kept, by its own benchmark (one of these two, or FP32)
    fp32 onnxruntime     the float graph, ONNX Runtime with all optimisations
    fp32 openvino        the float graph, OpenVINO, compiled for batch 1
    static onnxruntime   `quantize_static` (QDQ, uint8 activations, int8 weights by channel) on ONNX Runtime
    static openvino      the same file read by OpenVINO, compiled for batch 1
    nncf openvino        NNCF's default quantization on OpenVINO, compiled for batch 1; NNCF runs in its own environment

Every sample is the median of 30 queries in a fresh process with 2 threads, all of them in random order: a plain loop over the
library's own call, none of our code. The best rival is picked on half of its processes and compared on the other half, so
that picking is not part of the comparison. Files are kept in --work and made again only when they are missing.
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
from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from _results import write

NETWORKS = (
    *("resnet18", "resnet50", "vgg16", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"),
    *("densenet121", "googlenet", "squeezenet1_1", "shufflenet_v2_x1_0", "regnet_y_400mf", "convnext_tiny"),
)
IMAGES, QUERIES, WARMUP, THREADS = 16, 30, 5, 2
# OpenVINO's package sends usage data when it is imported; an empty module in its place keeps the benchmark on this machine.
LOOP = """
import json, os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np
kind, path, size, queries, warmup, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype="float32")
if kind == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    def query(): session.run(None, {name: image})
else:
    sys.modules["openvino_telemetry"] = None
    import openvino
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if path.endswith(".blob"):
        # The engine's own settings, as deploykit loads it: without them OpenVINO computes float layers in bf16 on some CPUs.
        manifest = json.load(open(os.path.join(os.path.dirname(path), "manifest.json")))
        compiled = core.import_model(open(path, "rb").read(), "CPU", manifest["settings"])
    else:
        model = core.read_model(path)
        model.reshape([1, 3, size, size])
        compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    def query(): request.infer({0: image})
for _ in range(warmup): query()
times = []
for _ in range(queries):
    start = time.perf_counter_ns(); query(); times.append(time.perf_counter_ns() - start)
print(times)
"""
STATIC = """
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
os.remove(out + ".pre.onnx")
"""
NNCF = """
import sys
sys.modules["openvino_telemetry"] = None
import numpy as np, nncf, openvino
model, out, samples = sys.argv[1:4]
images = np.load(samples)["inputs/image"]
data = nncf.Dataset([image[None] for image in images])
quantized = nncf.quantize(openvino.Core().read_model(model), data, subset_size=len(images))
openvino.save_model(quantized, out, compress_to_fp16=False)
"""
OURS_ORT, OURS_OV, FASTEST = "ours onnxruntime", "ours openvino", "ours fastest"
FP32_ORT, FP32_OV = "fp32 onnxruntime", "fp32 openvino"
STATIC_ORT, STATIC_OV, NNCF_OV = "static onnxruntime", "static openvino", "nncf openvino"
RIVALS = (STATIC_ORT, STATIC_OV, NNCF_OV)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--nncf-python", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        for network in arguments.networks:
            files, kept, side = _make(network, arguments.images, arguments.nncf_python, work)
            raw, failed = _measure(files, side, arguments.processes)
            results[network] = {"latency_ns": raw, "failed": failed, "fastest": kept}
            _print(network, raw, kept, failed)
            # After each network, for all of them take half an hour.
            content = {"queries": QUERIES, "warmup": WARMUP, "threads": THREADS, "networks": results}
            write("really_faster", content, arguments.output)
    _print_means(results)


def _make(network: str, images: Path, nncf: Path, work: Path) -> tuple[dict[str, Path], str, int]:
    """The file of each variant, the label of the one that ours kept, and the side of the input."""
    run, rivals = work / f"{network}-ours", work / f"{network}-rivals"
    rivals.mkdir(parents=True, exist_ok=True)
    words = ["export", network, "--weights", "none", "--to", "fastest", "--int8", "--calibrate", str(images)]
    words += ["--calibration-images", str(IMAGES), "--set", f"export.samples={IMAGES}", "--set", "benchmark.offline_seconds=0"]
    words += ["--processes", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", *words, "--threads", str(THREADS), "--output", str(run), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    kept = str(json.loads(done.stdout)["fastest"]["label"])
    fp32, samples = run / "export-onnx" / "model.onnx", run / "export-onnx" / "samples.npz"
    static, quantized = rivals / "static.onnx", rivals / "nncf.xml"
    for made, python, script in ((static, sys.executable, STATIC), (quantized, str(nncf), NNCF)):
        if not made.exists():
            command = [python, "-W", "ignore", "-c", script, *map(str, (fp32, made, samples))]
            subprocess.run(command, check=True, capture_output=True)
    files = {
        OURS_ORT: run / "build-onnxruntime-int8" / "engine.onnx",
        OURS_OV: run / "build-openvino-int8" / "engine.blob",
        **{FP32_ORT: fp32, FP32_OV: fp32, STATIC_ORT: static, STATIC_OV: static, NNCF_OV: quantized},
    }
    manifest = json.loads((run / "export-onnx" / "manifest.json").read_text())
    return files, kept, manifest["inputs"][0]["shape"][2]


def _measure(files: Mapping[str, Path], side: int, processes: int) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
    """All latencies by variant and process; and of a variant that does not run, what it said."""
    raw: dict[str, list[list[int]]] = {name: [] for name in files}
    failed: dict[str, str] = {}
    for _ in range(processes):
        for name in random.sample(list(files), len(files)):
            if name in failed:
                continue
            numbers = map(str, (side, QUERIES, WARMUP, THREADS))
            command = [sys.executable, "-c", LOOP, name.split()[1], str(files[name]), *numbers]
            answer = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ})
            if answer.returncode:
                failed[name] = answer.stderr.strip()[-500:] or f"exit code {answer.returncode}"
            else:
                raw[name].append(json.loads(answer.stdout))
    return {name: found for name, found in raw.items() if name not in failed}, failed


def _print(network: str, raw: Mapping[str, list[list[int]]], kept: str, failed: Mapping[str, str]) -> None:
    medians = {name: _medians(found) for name, found in raw.items()}
    print(
        f"{network}: "
        + ", ".join(f"{name} {np.median(found) / 1e6:.2f}" for name, found in medians.items())
        + f" ms; kept {kept}"
    )
    for name in failed:
        print(f"  {name} does not run: {failed[name].splitlines()[-1]}")
    for label, (mine, theirs) in _pairs(medians, kept).items():
        ratio, low, high = _ratio(mine, theirs)
        print(f"  {label}: {ratio:.3f} (95 % {low:.3f} to {high:.3f})", flush=True)


def _pairs(medians: Mapping[str, np.ndarray], kept: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is compared with what: the best rival on the half of its processes that did not pick it."""
    wanted = ((OURS_ORT, FP32_ORT), (OURS_ORT, STATIC_ORT), (OURS_OV, FP32_OV))
    pairs = {f"{a} / {b}": (medians[a], medians[b]) for a, b in wanted if a in medians and b in medians}
    rivals = [name for name in RIVALS if name in medians]
    if rivals and _variant(kept) in medians:
        best = min(rivals, key=lambda name: float(np.median(medians[name][::2])))
        pairs[f"{FASTEST} / {best}"] = (medians[_variant(kept)], medians[best][1::2])
    return pairs


def _variant(kept: str) -> str:
    """Which of the measured files an engine's label stands for."""
    runtime, precision = kept.split()
    return f"{'ours' if precision == 'int8' else precision} {runtime}"


def _print_means(results: Mapping[str, Any]) -> None:
    logs: dict[str, list[float]] = {}
    for found in results.values():
        medians = {name: _medians(raw) for name, raw in found["latency_ns"].items()}
        for label, (mine, theirs) in _pairs(medians, found["fastest"]).items():
            kind = label if FASTEST not in label else "ours fastest / best rival"
            logs.setdefault(kind, []).append(log(float(np.median(mine) / np.median(theirs))))
    for label, values in logs.items():
        print(f"geometric mean over {len(values)}: {label} {exp(statistics.fmean(values)):.3f}, worst {exp(max(values)):.3f}")


def _medians(processes: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([statistics.median(process) for process in processes])


def _ratio(ours: np.ndarray, theirs: np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """Ratio of medians over processes, and its 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    picks = [np.median(x[generator.integers(0, len(x), (resamples, len(x)))], axis=1) for x in (ours, theirs)]
    low, high = np.percentile(picks[0] / picks[1], [2.5, 97.5])
    return float(np.median(ours) / np.median(theirs)), float(low), float(high)


if __name__ == "__main__":
    main()
