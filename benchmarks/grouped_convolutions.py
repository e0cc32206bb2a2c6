"""How many groups of a grouped INT8 convolution should be written as one, for ONNX Runtime on this CPU?

usage: python benchmarks/grouped_convolutions.py [--processes 5] [--output DIR]

A 3x3 convolution with C channels in groups of W, as in ResNeXt and RegNet, is written with 1, 2, 4, ... of its groups in one and
zeros between them, so that all answers are the same integers (checked). Its kernel is timed by ONNX Runtime's own profile, one
thread, 40 runs, in a fresh process for every variant, all in random order; the float kernel is beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from _results import write

# Channels, height, channels in a group: stages of ResNeXt-50 32x4d, RegNetY-400MF and ResNeXt-101 32x8d.
SHAPES = ((128, 56, 4), (256, 28, 8), (512, 14, 16), (48, 56, 8), (208, 14, 8), (440, 7, 8), (104, 28, 8), (256, 56, 8))
AT_ONCE = (1, 2, 4, 5, 8, 13)
TIME = """
import json, os, sys, tempfile
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnx, onnxruntime
from onnx import parser, numpy_helper
channels, height, width, at_once, is_int8 = map(int, sys.argv[1:])
groups, rng = channels // width, np.random.default_rng(0)
apart = rng.integers(-127, 128, (groups // at_once, at_once, width, width, 3, 3)).astype(np.int8)
wide = np.zeros((groups // at_once, at_once, width, at_once, width, 3, 3), np.int8)
for index in range(at_once):
    wide[:, index, :, index] = apart[:, index]
weights = wide.reshape(channels, at_once * width, 3, 3)
conv = f"Conv<kernel_shape=[3,3], pads=[1,1,1,1], group={groups // at_once}>"
body = f'''xq = QuantizeLinear(x, xs, z) xd = DequantizeLinear(xq, xs, z) wd = DequantizeLinear<axis=0>(w, ws, wz)
    c = {conv}(xd, wd) cq = QuantizeLinear(c, cs, z) y = DequantizeLinear(cq, cs, z)''' if is_int8 else f"y = {conv}(x, w)"
model = parser.parse_model(f'''<ir_version: 9, opset_import: ["" : 19]>
    g (float[1,{channels},{height},{height}] x) => (float[1,{channels},{height},{height}] y) {{ {body} }}''')
constants = {"w": weights if is_int8 else weights * np.float32(0.01)}
if is_int8:
    constants |= {"xs": np.float32(0.02), "z": np.uint8(0), "cs": np.float32(2), "ws": np.full(channels, 0.01, np.float32),
                  "wz": np.zeros(channels, np.int8)}
model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level, options.enable_profiling = 1, 3, True
options.profile_file_prefix = os.path.join(tempfile.mkdtemp(), "profile")
session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
image = {"x": rng.random((1, channels, height, height), dtype=np.float32) * 5}
for _ in range(60):
    (answer,) = session.run(None, image)
events = json.load(open(session.end_profiling()))
kernels = [event for event in events if event["name"].endswith("_kernel_time") and "Conv" in event["args"]["op_name"]]
times = [event["dur"] for event in kernels]
print(json.dumps({"us": times[20:], "sum": float(answer.astype(np.float64).sum())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    variants = [
        (*shape, at_once, is_int8)
        for shape in SHAPES
        for at_once in AT_ONCE
        for is_int8 in (True, False)
        if shape[0] // shape[2] % at_once == 0 and (is_int8 or at_once == 1)
    ]
    order = variants * arguments.processes
    random.Random(0).shuffle(order)
    raw: dict[str, list[list[int]]] = {_label(variant): [] for variant in variants}
    answers: dict[str, set[float]] = {}
    for variant in order:
        words = [sys.executable, "-c", TIME, *(str(int(word)) for word in variant)]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        raw[_label(variant)].append(found["us"])
        if variant[4]:
            answers.setdefault(str(variant[:3]), set()).add(found["sum"])
    assert all(len(sums) == 1 for sums in answers.values()), "groups written as one answer otherwise"
    for label, processes in raw.items():
        print(f"{label:48s} {statistics.median(statistics.median(times) for times in processes):8.0f} us")
    write("grouped_convolutions", {"unit": "us", "raw": raw}, arguments.output)


def _label(variant: tuple[int, int, int, int, bool]) -> str:
    channels, height, width, at_once, is_int8 = variant
    kind = f"int8, {at_once} in one" if is_int8 else "float"
    return f"{channels}x{height}x{height} in groups of {width}, {kind}"


if __name__ == "__main__":
    main()
