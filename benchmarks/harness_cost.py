"""What the benchmark itself costs: its medians beside a plain loop over the same engine, and queries of nothing.

usage: python benchmarks/harness_cost.py ENGINE [ENGINE ...] [--processes 10] [--output DIR]

ENGINE is a folder that `build` left for ONNX Runtime. The plain loop opens the same file with the same threads, binds its
input and output once, and times `session.run_with_iobinding` with `time.perf_counter_ns`. Both run in fresh processes, in
random order.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _results import write

import deploykit
from deploykit.artifact import read_artifact

QUERIES, WARMUP = 200, 20
LOOP = """
import json, os, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
path, samples, threads, queries, warmup = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is the optimized graph
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
image = np.ascontiguousarray(np.load(samples)["inputs/image"][:1])
binding = session.io_binding()
binding.bind_ortvalue_input("image", onnxruntime.OrtValue.ortvalue_from_numpy(image))
binding.bind_output("logits", "cpu")
for _ in range(warmup): session.run_with_iobinding(binding)
times = []
for _ in range(queries):
    start = time.perf_counter_ns()
    session.run_with_iobinding(binding)
    times.append(time.perf_counter_ns() - start)
print(json.dumps({"median_ns": sorted(times)[len(times) // 2], "harness_ns": 0}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = {}
    for folder in arguments.engines:
        found[str(folder)] = _compare(folder, arguments.processes)
    write("harness_cost", {"queries": QUERIES, "warmup": WARMUP, "engines": found}, arguments.output)


def _compare(folder: Path, processes: int) -> dict[str, list[float]]:
    ran: dict[str, list[float]] = {"ours": [], "plain": [], "null": []}
    order = ["ours", "plain"] * processes
    random.Random(0).shuffle(order)
    for kind in order:
        answer = _ours(folder) if kind == "ours" else _plain(folder)
        ran[kind].append(answer["median_ns"])
        if kind == "ours":
            ran["null"].append(answer["harness_ns"])
    ours, plain = (statistics.median(ran[kind]) for kind in ("ours", "plain"))
    print(
        f"{folder.parent.name}/{folder.name}: ours {ours / 1e3:.2f} us, plain loop {plain / 1e3:.2f} us, difference "
        f"{(ours - plain) / 1e3:+.2f} us ({100 * (ours / plain - 1):+.2f} %); a null query {max(ran['null']):.0f} ns at most"
    )
    return ran


def _ours(folder: Path) -> dict[str, Any]:
    request = {
        "engine": str(folder.absolute()),
        "queries": QUERIES,
        "warmup": WARMUP,
        "offline_batches": [1],
        "offline_seconds": 0,
    }
    command = [sys.executable, "-m", "deploykit.benchmark.process"]
    here = Path(deploykit.__file__).parents[1]
    child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True, cwd=here)
    answer = json.loads(child.stdout)
    return {"median_ns": statistics.median(answer["latency_ns"]), "harness_ns": answer["harness_ns"]}


def _plain(folder: Path) -> dict[str, Any]:
    engine = read_artifact(folder)
    words = [
        str(engine.path),
        str(folder / "samples.npz"),
        str(engine.settings["intra_op_num_threads"]),
        str(QUERIES),
        str(WARMUP),
    ]
    child = subprocess.run([sys.executable, "-c", LOOP, *words], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer


if __name__ == "__main__":
    main()
