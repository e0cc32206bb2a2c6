"""Accuracy of trained CIFAR ResNets in PyTorch, ONNX Runtime (FP32 and INT8), TorchScript, and by the TensorRT rules.

usage: python benchmarks/cifar_accuracy.py --images DIR --checkpoint NETWORK=FILE [--checkpoint ...] [--output DIR]

INT8 is plain min/max here; `int8_accuracy.py` compares what deploykit does by default with its peers. DIR holds
`train/<class>/` for calibration and `test/<class>/` for the judgement; all networks see the same test images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _results import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NETWORK=FILE")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = {}
    for text in arguments.checkpoint:
        network, _, checkpoint = text.partition("=")
        with tempfile.TemporaryDirectory() as scratch:
            common = ["--weights", checkpoint, "--validate", str(arguments.images / "test"), "--set", "benchmark.enabled=false"]
            calibrate = ["--int8", "--calibrate", str(arguments.images / "train"), "--calibration-images", "256"]
            plain = ("method=minmax", "equalize=false", "target_sqnr_db=0")  # the simplest INT8 there is
            calibrate += [word for setting in plain for word in ("--set", f"quantize.{setting}")]
            engines = _export(network, *common, *calibrate, "--to", "onnxruntime", "--to", "tensorrt", folder=Path(scratch, "a"))
            script = _export(network, *common, "--to", "torchscript", folder=Path(scratch, "b"))
        results[network] = [*engines["parity"], *script["parity"]]
        for case in results[network]:
            mine, theirs = 100 * case["accuracy"]["engine"], 100 * case["accuracy"]["reference"]
            agree = f"same top-1 on {100 * case['agreement']:.2f} %"
            print(
                f"{network:16} {case['label']:38} {mine:.2f} % (PyTorch {theirs:.2f} %), {agree} of {case['images']}", flush=True
            )
    kept = {
        name: [{key: case[key] for key in ("label", "images", "agreement", "accuracy")} for case in cases]
        for name, cases in results.items()
    }
    write("cifar_accuracy", {"networks": kept}, arguments.output)


def _export(network: str, *words: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "deploykit", "export", network, *words, "--output", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()
