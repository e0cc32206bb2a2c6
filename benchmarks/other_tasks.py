"""Segmenters, detectors and networks for clips: what each exporter makes of them, and how far ONNX Runtime, TorchScript and
INT8 are from PyTorch.

usage: python benchmarks/other_tasks.py --images DIR [--only NAME ...] [--crop N] [--count N] [--output benchmarks/results]

Weights are random, BatchNorm is calibrated on the pictures and class scores are spread out, so that boxes can be matched: what
`deploykit export NAME --weights none --calibrate DIR` does. Each network runs in its own process. --crop makes inputs smaller
than the published ones, for a machine that has little time; what is proved is the same graph.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from _results import write

COUNT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--crop", type=int, help="side of the input in pixels, where the network takes any")
    parser.add_argument("--count", type=int, default=COUNT, help="how many pictures")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(prove(arguments.one, arguments.images, crop=arguments.crop, count=arguments.count)))
        return
    from deploykit import models

    names = arguments.only or [entry.name for entry in models.catalogue() if entry.task != "classify"]
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--images", str(arguments.images), "--count", str(arguments.count)]
        command += ["--crop", str(arguments.crop)] if arguments.crop else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = {"name": name, "error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
        rows.append(json.loads(done.stdout) if done.returncode == 0 else failed)
        print(line(rows[-1]), flush=True)
    write("other_tasks", {"pictures": arguments.count, "crop": arguments.crop, "rows": rows}, arguments.output)


def prove(name: str, images: Path, *, crop: int | None = None, count: int = COUNT, int8: bool = True) -> dict[str, Any]:
    """One network of any task through export, ONNX Runtime and TorchScript: what was compared with PyTorch, or why nothing was.

    `runs` has a list of comparisons for each of onnxruntime, int8 and torchscript, or the error; `new` says what the new exporter
    makes of it.
    """
    from deploykit import models

    entry = next(entry for entry in models.catalogue() if entry.name == name)
    row: dict[str, Any] = {"name": name, "task": entry.task, "runs": {}, "seconds": {}}
    ways: dict[str, Mapping[str, Any]] = {
        "onnxruntime": {"export": {"formats": ["onnx"]}, "build": {"runtimes": ["onnxruntime"]}},
        "torchscript": {"export": {"formats": ["torchscript"]}, "build": {"runtimes": []}},
    }
    if int8:
        ways["int8"] = {**ways["onnxruntime"], "quantize": {"speed": False}}
    with tempfile.TemporaryDirectory() as scratch:
        for way, tables in ways.items():
            start = monotonic()
            row["runs"][way] = _run(name, images, tables, Path(scratch, way), crop, count)
            row["seconds"][way] = round(monotonic() - start, 1)
    row["new"] = new_exporter(name, images, crop=crop)
    return row


def new_exporter(name: str, images: Path, *, crop: int | None = None) -> str:
    """What torch's new exporter makes of a network: "writes it", or its error."""
    import numpy as np

    from deploykit import data, models
    from deploykit.errors import StageError
    from deploykit.export.exporters import exported
    from deploykit.recipe import ExportTable, ModelTable, PreprocessTable

    model = models.load(ModelTable(name=name, weights="none"), PreprocessTable(crop=crop))
    pictures = data.folder(images, labelled=False).take(range(2))
    inputs = next(pictures.batches(model.preprocess, 2))
    models.calibrate_batch_norm(model, [np.array(inputs)])
    settings = ExportTable(batch=1 if model.task == "detect" else "dynamic")
    try:
        exported(model, inputs, settings, "new", outputs=model.outputs)
    except StageError as error:
        return error.why
    return "writes it"


def line(row: Mapping[str, Any]) -> str:
    """One network in words."""
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    told = [f"{way}: {found if isinstance(found, str) else '; '.join(map(_told, found))}" for way, found in row["runs"].items()]
    return f"{row['name']} ({row['task']}): {' | '.join(told)} | new exporter: {row['new']}"


def _run(name: str, images: Path, tables: Mapping[str, Any], out: Path, crop: int | None, count: int) -> list[Any] | str:
    from deploykit import pipeline, recipe
    from deploykit.errors import DeploykitError

    content = {
        "name": name,
        "model": {"name": name, "weights": "none"},
        "data": {"calibrate": str(images), "calibration_images": count},
        "benchmark": {"enabled": False},
        **({"preprocess": {"crop": crop}} if crop else {}),
        **tables,
    }
    try:
        found = pipeline.run(recipe.parse(content, base=Path.cwd(), source="this script"), out)
    except DeploykitError as error:
        return " ".join(str(error).split())
    return [_case(case, found["engines"]) for case in found["parity"]]


def _case(case: Mapping[str, Any], engines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    realised = next((engine["realised"] for engine in engines if engine["label"] == case["label"]), None)
    kept = ("label", "precision", "agreement", "disagreement_count", "images", "parts", "unit", "measures")
    return {
        **{key: case[key] for key in kept if key in case},
        "relative": case["quantization"]["relative"],
        "sqnr_db": case["quantization"]["sqnr_db"],
        "conversion": None if case["conversion"] is None else case["conversion"]["verdict"],
        "int8": None if realised is None else f"{realised['int8']}/{realised['total']}",
    }


def _told(case: Mapping[str, Any]) -> str:
    parts = f"{case.get('parts', case['images'])} {case.get('unit', 'image')}s"
    relative = "not finite" if case["relative"] is None else f"{case['relative']:.1e}"
    told = f"{case['label']} {100 * case['agreement']:.3f} % of {parts}, {relative}, {case['int8'] or ''}"
    return f"{told}, {case.get('measures', '')}"


if __name__ == "__main__":
    main()
