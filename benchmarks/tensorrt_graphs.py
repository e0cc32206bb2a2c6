"""The graphs for TensorRT of six networks, in three precisions: what the linter says, how far their answers are off, how large.

usage: python benchmarks/tensorrt_graphs.py --images DIR [--network NAME ...] [--output DIR]

Each network is exported by `deploykit export NETWORK --to tensorrt --int8 --fp16 --weights none`, which leaves three graphs:
INT8 (what stays float is float32), FP16, and INT8 + FP16. ONNX Runtime executes them with all optimisations off, so that
Q/DQ is computed literally, on images of the folder; FP32 PyTorch is what they are compared with. A size is to be at most
1.02 times (the bytes of the layers' weights and biases in the type that the file stores + 200 kB).

Random weights: sizes, findings and errors are those of the graph, decisions mean nothing. Exit code 1 when one of it fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from _results import write

from deploykit import parity, runtimes
from deploykit.artifact import Artifact, Precision, read_artifact
from deploykit.quantize import lint
from deploykit.runtimes import onnxruntime

NETWORKS = (
    *("resnet50", "mobilenet_v2", "googlenet", "densenet121", "efficientnet_b0"),
    f"{Path(__file__).parent / 'yolo_like.py'}:build",
)
GRAPHS = {"INT8": "quantize-tensorrt", "FP16": "export-onnx-fp16", "INT8 + FP16": "quantize-tensorrt-fp16"}
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FACTOR, FIXED_BYTES = 1.02, 200_000
# How much noise a precision may make is a question for trained networks (int8_accuracy.py). These bounds were set when the first
# three networks had been seen (12 to 16 and 38 to 46 dB); they find a graph that is broken.
LEAST_SQNR_DB = {Precision.INT8: 10.0, Precision.FP16: 30.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="pictures to calibrate on and to compare on")
    parser.add_argument("--network", action="append", help="only this one")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for network in arguments.network or NETWORKS:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "run"
            _export(network, arguments.images, out)
            found += [_measured(network, label, read_artifact(out / name)) for label, name in GRAPHS.items()]
        for row in found[-len(GRAPHS) :]:
            print("{network:16} {graph:12} findings {findings!s:24} {error}, {bytes:,} of {allowed_bytes:,} bytes".format(**row))
    write("tensorrt_graphs", {"graphs": found, "passed": all(row["passed"] for row in found)}, arguments.output)
    sys.exit(0 if all(row["passed"] for row in found) else 1)


def _export(network: str, images: Path, out: Path) -> None:
    words = [
        *(sys.executable, "-m", "deploykit", "export", network, "--to", "tensorrt", "--int8", "--fp16", "--weights", "none"),
        *("--calibrate", str(images), "--calibration-images", "8", "--engine", "skip", "--output", str(out)),
    ]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def _measured(network: str, label: str, model: Artifact) -> Mapping[str, Any]:
    findings: dict[str, int] = {}
    for finding in lint.lint(model.path, "tensorrt"):
        findings[f"{finding.severity}: {finding.rule}"] = findings.get(f"{finding.severity}: {finding.rule}", 0) + 1
    samples, output = model.samples(), model.outputs[0].name
    answers = runtimes.answers(onnxruntime.reference(model.path), model, runtimes.pieces(model, samples))
    errors = parity.tensor_errors(answers, samples.reference[output])
    weights, size = _weights_bytes(model.path), model.path.stat().st_size
    allowed = int(FACTOR * (weights + FIXED_BYTES))
    close = errors.sqnr_db >= LEAST_SQNR_DB[model.precision]
    return {
        "network": Path(network.partition(":")[0]).stem,
        "graph": label,
        "findings": findings or "none",
        "error": f"SQNR {errors.sqnr_db:.1f} dB, max|d| / max|y| {errors.relative:.1e}",
        "sqnr_db": errors.sqnr_db,
        "relative": errors.relative,
        "images": len(answers),
        "int8_layers": len(model.facts.get("int8_layers", ())),  # type: ignore[arg-type]
        "weights_bytes": weights,
        "bytes": size,
        "allowed_bytes": allowed,
        "passed": not findings and close and size <= allowed,
    }


def _weights_bytes(path: Path) -> int:
    """The bytes of all weights and biases of layers, as they are stored; behind Q and DQ they are found too."""
    found: dict[str | None, int] = {}
    for node in ir.load(path).graph:
        for value in node.inputs[1:] if node.op_type in LAYERS else ():
            while value is not None and (producer := value.producer()) is not None and producer.op_type.endswith("Linear"):
                value = producer.inputs[0]
            if value is not None and value.const_value is not None:
                found[value.name] = value.const_value.nbytes
    return sum(found.values())


if __name__ == "__main__":
    main()
