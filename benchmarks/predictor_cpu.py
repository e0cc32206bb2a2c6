"""The CPU of this machine as a target: calibrated on three networks, how far off are the predictions for others?

usage: python benchmarks/predictor_cpu.py [--work DIR] [--processes 5] [--output DIR]

All by the commands that a user has. Each network is exported with random weights and quantized on pictures of noise; three are
measured with `deploykit benchmark --calibrate-predictor`, and the others predicted with `deploykit predict --measured` and then
measured, FP32 and INT8, batch 1, on ONNX Runtime. The rivals are scaling by operations from the nearest of the three in the same
precision, and the prediction before calibration. Wants a machine that does nothing else: a disturbed run is refused for
calibration, and is marked among the others.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from _results import write
from PIL import Image

CALIBRATED = ("resnet34", "mobilenet_v3_large", "googlenet")
PREDICTED = ("resnet18", "resnet50", "mobilenet_v2", "vgg16", "efficientnet_b0", "squeezenet1_1")
GRAPHS = {"fp32": "export-onnx", "int8": "quantize-onnxruntime"}
# Latency does not depend on weights; so nothing is searched that is about accuracy, and every layer is INT8.
PLAIN = {
    **{"export.samples": "4", "benchmark.enabled": "false", "quantize.speed": "false", "quantize.target_sqnr_db": "0"},
    **{"quantize.rounding": "nearest", "quantize.equalize": "false"},
}


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), help="Keep exported networks there, and take those that are there.")
@click.option("--processes", default=5, show_default=True)
@click.option("--output", type=click.Path(path_type=Path))
def main(work: Path | None, processes: int, output: Path | None) -> None:
    with TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*CALIBRATED, *PREDICTED):
            export(name, folder)
        mine = folder / "mine.json"
        runs = [str(folder / name) for name in CALIBRATED]
        deploykit("benchmark", *runs, "--processes", processes, "--calibrate-predictor", mine)
        rows = [row for name in PREDICTED for row in compared(folder / name, mine, processes)]
        kept: dict[str, Any] = json.loads(mine.read_text())
        for row in kept["measurements"]:
            row["gmacs"] = sum(kernel["macs"] for kernel in row.pop("kernels")) / 1e9
    summary = {}
    for key in ("calibrated_ms", "plain_ms", "scaled_ms"):
        errors = [100 * abs(row[key] / row["measured_ms"] - 1) for row in rows]
        summary[key] = {"median": statistics.median(errors), "most": max(errors)}
        click.echo(f"{key:14} error: median {summary[key]['median']:5.1f} %, at most {summary[key]['most']:5.1f} %")
    covered = sum(row["interval_ms"][0] <= row["measured_ms"] <= row["interval_ms"][1] for row in rows)
    click.echo(f"{covered} of {len(rows)} in the calibrated interval")
    write("predictor_cpu", {"calibrated_on": kept, "rows": rows, "errors": summary, "covered": covered}, output)


def compared(run: Path, mine: Path, processes: int) -> list[dict[str, Any]]:
    """What is predicted of a network, and then measured."""
    told = {}
    for precision, graph in GRAPHS.items():
        words = ("predict", run / graph, "--precision", precision, "--json")
        told[precision] = (json.loads(deploykit(*words, "--measured", mine)), json.loads(deploykit(*words, "--target", "local")))
    found = json.loads(deploykit("benchmark", run, "--processes", processes, "--json"))
    rows = []
    for engine in found["engines"]:
        precision = "int8" if "int8" in engine["label"] else "fp32"
        own, plain = told[precision]
        row = {
            "network": run.name,
            "precision": precision,
            "measured_ms": engine["median_ns"] / 1e6,
            "calibrated_ms": own["latency_ns"] / 1e6,
            "interval_ms": [bound / 1e6 for bound in own["interval_ns"]],
            "plain_ms": plain["latency_ns"] / 1e6,
            "scaled_ms": scaled_ms(json.loads(mine.read_text())["measurements"], own, precision),
            "verdict": found["verdict"],
        }
        rows.append(row)
        click.echo(
            f"{row['network']:18} {precision}: measured {row['measured_ms']:8.2f} ms, predicted {row['calibrated_ms']:8.2f} "
            f"({100 * (row['calibrated_ms'] / row['measured_ms'] - 1):+.0f} %; {row['interval_ms'][0]:.2f} to "
            f"{row['interval_ms'][1]:.2f}), before calibration {row['plain_ms']:.2f}, by operations {row['scaled_ms']:.2f}"
            f"{'' if row['verdict'] == 'valid' else '   RUN NOT VALID'}"
        )
    return rows


def scaled_ms(measured: list[dict[str, Any]], prediction: dict[str, Any], precision: str) -> float:
    """By operations, from the nearest of the networks that were measured."""
    macs = sum(each["layer"]["macs"] for each in prediction["layers"])
    known = {
        sum(kernel["macs"] for kernel in row["kernels"]): float(row["latency_ms"])
        for row in measured
        if row["precision"] == precision and row["batch"] == 1
    }
    nearest = min(known, key=lambda each: abs(np.log(each / macs)))
    return float(known[nearest] * macs / nearest)


def export(name: str, folder: Path) -> None:
    if (folder / name / "result.json").exists():
        return
    noise = folder / "noise"
    if not noise.exists():
        noise.mkdir()
        generator = np.random.default_rng(0)
        for index in range(8):
            Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(noise / f"{index}.png")
    words = [word for key, value in PLAIN.items() for word in ("--set", f"{key}={value}")]
    deploykit(
        *("export", name, "--weights", "none", "--to", "onnxruntime", "--int8", "--calibrate", noise),
        *("--calibration-images", 8, *words, "--output", folder / name),
        codes=(0, 3),  # a gate of accuracy says nothing about random weights
    )


def deploykit(*words: object, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([sys.executable, "-m", "deploykit", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        sys.exit(f"deploykit {words[0]} {words[1]} ended with {done.returncode}:\n{done.stderr}{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
