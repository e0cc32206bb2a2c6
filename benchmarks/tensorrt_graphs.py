"""The graphs for TensorRT of six networks, in three precisions: what the linter says, how far their answers are off, how large.

usage: python benchmarks/tensorrt_graphs.py --images DIR [--network NAME ...] [--output DIR]

Each network is exported by `deploykit export NETWORK --to tensorrt --int8 --fp16 --weights none`, which leaves three graphs:
INT8 (what stays float is float32), FP16, and INT8 + FP16. ONNX Runtime executes them with all optimisations off, so that
Q/DQ is computed literally, on images of the folder; FP32 PyTorch is what they are compared with. A size is to be at most
1.02 times (the bytes of the layers' weights and biases in the type that the file stores + 200 kB); a BatchNorm that stays in
the graph, as DenseNet's before its ReLUs, is a layer.

Random weights: sizes, findings and errors are those of the graph, decisions mean nothing. Since such networks answer noise with
noise, no fixed number of dB says whether a graph is right; what its own precision explains does. The noise at the output may
be at most twice (3 dB) what is expected, which for FP16 is the noise of the same network in PyTorch's own float16, for INT8 the
sum of what each quantized tensor and each layer's weights cause alone (measured before the graph is written), and for INT8 +
FP16 the sum of both. Exit code 1 when one of it fails.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from _results import path_of, write

from deploykit import parity, quantize, recipe, runtimes
from deploykit.artifact import Artifact, read_artifact
from deploykit.progress import silent
from deploykit.quantize import lint
from deploykit.recipe import QuantizeTable
from deploykit.runtimes import onnxruntime
from deploykit.sources import Sources

NETWORKS = (
    *("resnet50", "mobilenet_v2", "googlenet", "densenet121", "efficientnet_b0"),
    f"{Path(__file__).parent / 'yolo_like.py'}:build",
)
GRAPHS = {"INT8": "quantize-tensorrt", "FP16": "export-onnx-fp16", "INT8 + FP16": "quantize-tensorrt-fp16"}
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")  # the last one where it stands before a ReLU
FACTOR, FIXED_BYTES = 1.02, 200_000
MOST_NOISE = (
    2.0  # times the expected one: roundings of independent tensors add up in power, and a few images say it to about 1 dB
)
SWEPT = 4


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
            expected = _expected(out)
            found += [_measured(network, label, read_artifact(out / name), expected[label]) for label, name in GRAPHS.items()]
        for row in found[-len(GRAPHS) :]:
            print("{network:16} {graph:12} findings {findings!s:24} {error}, {bytes:,} of {allowed_bytes:,} bytes".format(**row))
            sys.stdout.flush()
        # After each network, so that a long run that is stopped leaves what it has; networks that were not asked for stay.
        write("tensorrt_graphs", {"graphs": [*_others(arguments, found), *found]}, arguments.output)
    sys.exit(0 if all(row["passed"] for row in found) else 1)


def _others(arguments: argparse.Namespace, found: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The graphs of an earlier run whose networks are not among those that were found now."""
    if arguments.output is None or not (path := path_of("tensorrt_graphs", arguments.output)).is_file():
        return []
    now = {row["network"] for row in found}
    return [row for row in json.loads(path.read_text())["graphs"] if row["network"] not in now]


def _export(network: str, images: Path, out: Path) -> None:
    words = [
        *(sys.executable, "-m", "deploykit", "export", network, "--to", "tensorrt", "--int8", "--fp16", "--weights", "none"),
        *("--calibrate", str(images), "--calibration-images", "8", "--engine", "skip", "--output", str(out)),
    ]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def _expected(out: Path) -> dict[str, float]:
    """For each graph the noise at the output, as a share of the signal's power, that its precision explains."""
    fp16 = _noise_of_pytorch(out)
    model = read_artifact(out / next(name for name in ("equalize", "export-onnx") if (out / name).is_dir()))
    observations = read_artifact(out / "calibrate")
    calibrated = quantize._calibrated(model, observations, QuantizeTable(), "tensorrt", None, silent)
    case = quantize._case(calibrated, model.samples().inputs[model.inputs[0].name][:SWEPT], None)
    int8 = case.errors(silent).total(case.plan())
    return {"INT8": int8, "FP16": fp16, "INT8 + FP16": int8 + fp16}


def _noise_of_pytorch(out: Path) -> float:
    """The noise of the network in PyTorch's own float16, which rounds after each operator as the typed graph does."""
    network, model = Sources(recipe.load(out / "recipe.toml")).model.module.eval(), read_artifact(out / GRAPHS["FP16"])
    samples = model.samples()
    images, wanted = torch.from_numpy(samples.inputs[model.inputs[0].name]), samples.reference[model.outputs[0].name]
    with torch.inference_mode():
        again = torch.cat([network(image[None]) for image in images]).numpy()
        network.half()
        answers = torch.cat([network(image[None].half()).float() for image in images]).numpy()
    if not parity.tensor_errors(again, wanted).relative < 1e-4:
        raise SystemExit("the network that was loaded again is not the one that was exported")
    return float(((answers - wanted) ** 2).sum() / (wanted**2).sum())


def _measured(network: str, label: str, model: Artifact, expected: float) -> Mapping[str, Any]:
    findings: dict[str, int] = {}
    for finding in lint.lint(model.path, "tensorrt"):
        findings[f"{finding.severity}: {finding.rule}"] = findings.get(f"{finding.severity}: {finding.rule}", 0) + 1
    samples, output = model.samples(), model.outputs[0].name
    answers = runtimes.answers(onnxruntime.reference(model.path), model, runtimes.pieces(model, samples))
    errors = parity.tensor_errors(answers, samples.reference[output])
    weights, size = _weights_bytes(model.path), model.path.stat().st_size
    allowed = int(FACTOR * (weights + FIXED_BYTES))
    noise = float(((answers - samples.reference[output]) ** 2).sum() / (samples.reference[output] ** 2).sum())
    close = noise <= MOST_NOISE * expected
    return {
        "network": Path(network.partition(":")[0]).stem,
        "graph": label,
        "findings": findings or "none",
        "error": f"SQNR {errors.sqnr_db:.1f} dB ({-10 * math.log10(expected):.1f} expected), relative {errors.relative:.1e}",
        "noise": noise,
        "expected_noise": expected,
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
