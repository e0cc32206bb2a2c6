"""Every network that has a name here, exported by both of torch's exporters and compared with PyTorch, one process a network.

usage: python benchmarks/zoo.py --images DIR [--work DIR] [--only NAME ...] [--threads 2] [--output benchmarks/results]
       python benchmarks/zoo.py --docs docs/zoo.md [--work DIR]

Weights are random, and made so that answers vary over images: BatchNorm is calibrated on the images, heads that torchvision
leaves at zero and layer scales of 1e-6 are not kept. A row fails where the logits' standard deviation over images is below a
tenth of their spread over images and classes: what is constant proves nothing. Rows in the work folder are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from _results import write

LIMIT = 1e-4  # max|d| / max|y| of every output
LEAST_VARIATION = 0.1
IMAGES = {"classify": 8, "segment": 2, "detect": 2, "clips": 2}
_GIB = 1 << 30
_INTRODUCTION = """\
Written by `benchmarks/zoo.py` from its results. {passed} of {rows} networks pass, {good} of torchvision's {classifiers}
classifiers among them: an ONNX file, run literally by ONNX Runtime, and a TorchScript file answer {images} photographs (2 where
the task is another one) within max|d| / max|y| = {limit:g} of PyTorch. Weights are random, made so that answers vary over
images: BatchNorm is calibrated on them, and the logits' standard deviation over images is at least {least:.0%} of their spread
over images and classes, else the row fails. Both of torch's exporters run on the same weights and inputs, and what passes is
kept. Times are of one process on two cores, shared with other work; ONNX is both exporters together. Memory is the largest
resident set, beside what the rule below predicts.
"""
_HEADER = """\
| network | parameters | exporter | ONNX | TorchScript | variation | nodes | ONNX, s | TorchScript, s | GiB | predicted |
|---|---|---|---|---|---|---|---|---|---|---|"""
_MEMORY = """\
An export is refused (exit 4) before its work where the memory that is free is less than 1 GiB, five times the weights, and
four times the largest tensor of the forward pass for as many images as run at once (`deploykit/export/memory.py`)."""


def main() -> None:
    arguments = _arguments()
    if arguments.one is not None:
        one(arguments.one, arguments.images, arguments.work)
        return
    if arguments.images is not None:
        _run(arguments)
    rows = _rows(arguments.work)
    write("zoo", {"limit": LIMIT, "images": IMAGES, "rows": rows}, arguments.output)
    if arguments.docs is not None:
        arguments.docs.write_text(document(rows))


def one(name: str, folder: Path, work: Path) -> None:
    """Export one network and compare; its row is written to WORK/NAME.json. Runs in a process of its own."""
    row: dict[str, Any] = {"name": name, "seconds": {}}
    try:
        _compare(name, folder, work / f"{name}.files", row)
    except Exception as error:  # whatever it is belongs into the row
        row["error"] = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(work / f"{name}.files", ignore_errors=True)
    row["passed"] = "error" not in row and row["variation"] >= LEAST_VARIATION
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (work / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")


def _compare(name: str, folder: Path, scratch: Path, row: dict[str, Any]) -> None:
    from deploykit import data, export, models
    from deploykit.export import memory
    from deploykit.recipe import ExportTable, ModelTable

    entry = next(entry for entry in models.catalogue() if entry.name == name)
    row |= {"task": entry.task, "parameters": entry.parameters}
    memory.require(name, 4 * entry.parameters)
    with _timed(row, "load"):
        model = models.load(ModelTable(name=name, weights="none"))
        if entry.task == "classify":
            _enliven(model.module)
    pictures = data.calibration_subset(data.folder(folder, labelled=False), IMAGES[entry.task], seed=0)
    inputs = next(pictures.batches(model.preprocess, len(pictures)))
    largest = memory.largest_tensor_bytes(model.module, inputs.shape)
    row["predicted_bytes"] = memory.need_bytes(memory.weight_bytes(model.module), largest)
    with _timed(row, "calibrate"):
        _vary(model, inputs, row)
    # Detectors have one exporter that writes them at all.
    settings = ExportTable(cross_check=entry.task != "detect", tolerance=LIMIT)
    for kind, make in (("onnx", export.onnx_model), ("torchscript", export.torchscript_model)):
        target = scratch / kind
        target.mkdir(parents=True)
        with _timed(row, kind):
            made = make(model, inputs, None, settings, target)
        row[kind] = made.facts["relative_error"]
        row[f"{kind}_bytes"] = sum(path.stat().st_size for path in target.iterdir() if path.suffix != ".npz")
        if kind == "onnx":
            row |= {key: made.facts[key] for key in ("exporter", "exporter_why", "exporters", "nodes") if key in made.facts}
        shutil.rmtree(target)


def _vary(model: Any, inputs: Any, row: dict[str, Any]) -> None:
    """Calibrate BatchNorm on the inputs (N, C, H, W), and note how much the answers vary over them."""
    import numpy as np

    from deploykit import export, models
    from deploykit.export.boxes import torch_boxes

    models.calibrate_batch_norm(model, np.array_split(inputs, 2))
    if model.task == "detect":
        row["boxes"] = [len(torch_boxes(model, picture)["boxes"]) for picture in inputs]
        row["variation"] = 1.0 if all(row["boxes"]) else 0.0
        return
    logits = export.torch_logits(model, inputs)
    row["variation"] = _variation(logits)
    if row["variation"] < LEAST_VARIATION and _centred(model.module, logits):
        row["head"] = f"its bias was centred on the images; the variation was {row['variation']:.2g}"
        row["variation"] = _variation(export.torch_logits(model, inputs))


def _enliven(module: Any) -> None:
    """Weights under which answers depend on the picture, where torchvision's initial ones do not.

    Networks without normalisation get He's initialisation and no bias, for the biases of PyTorch's defaults are all that is left
    behind a few layers. Heads of zeros (ViT) and layer scales of 1e-6 (ConvNeXt) get values of a trained network's size.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    is_normalised = any("Norm" in type(layer).__name__ for layer in module.modules())
    with torch.no_grad():
        for layer in layers:
            if not is_normalised:
                nn.init.kaiming_normal_(layer.weight)
            if not is_normalised and layer.bias is not None:
                layer.bias.zero_()
            if not layer.weight.any():
                nn.init.xavier_normal_(layer.weight)
        for name, parameter in module.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(0.5)


def _variation(logits: Any) -> float:
    """The standard deviation over images, averaged over classes, as a share of that over images and classes."""
    spread = float(logits.std())
    return float(logits.std(axis=0).mean()) / spread if spread > 0 else 0.0


def _centred(module: Any, logits: Any) -> bool:
    """Take the mean answer off the last layer's bias, so that what is compared is what depends on the picture."""
    import torch
    from torch import nn

    heads = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features == logits.shape[1]]
    if not heads or heads[-1].bias is None:
        return False
    with torch.no_grad():
        heads[-1].bias.sub_(torch.from_numpy(logits.mean(axis=0)))
    return True


class _timed:  # noqa: N801
    """Seconds of a block, in the row."""

    def __init__(self, row: dict[str, Any], what: str) -> None:
        self.seconds, self.what = row["seconds"], what

    def __enter__(self) -> None:
        self.start = monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.what] = round(monotonic() - self.start, 2)


def _run(arguments: argparse.Namespace) -> None:
    """Each network that has no row yet, the small ones first; every one in a fresh process."""
    from deploykit import models

    # Classifiers before the others, the small before the large.
    order = {entry.name: (entry.task != "classify", entry.parameters) for entry in models.catalogue()}
    names = arguments.only or sorted(order, key=lambda name: order[name])
    arguments.work.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, 1):
        path = arguments.work / f"{name}.json"
        if not path.is_file():
            _start(name, arguments)
        row = json.loads(path.read_text())
        verdict = "passes" if row["passed"] else "FAILS"
        seconds = sum(row["seconds"].values())
        error = (
            f"onnx {row['onnx']:.1e} by the {row['exporter']} exporter, torchscript {row['torchscript']:.1e}"
            if "onnx" in row and "torchscript" in row
            else row.get("error", "")
        )
        print(
            f"[{index}/{len(names)}] {name} {verdict}: {error}; {seconds:.0f} s, {row['peak_bytes'] / _GIB:.1f} GiB", flush=True
        )


def _start(name: str, arguments: argparse.Namespace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, __file__, "--one", name, "--images", str(arguments.images), "--work", str(arguments.work)]
    path = arguments.work / f"{name}.json"
    start = monotonic()
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=arguments.limit_s
        )
        why = f"its process ended with {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        why = f"it was not done after {arguments.limit_s} s"
    if not path.is_file():
        row = {"name": name, "passed": False, "error": why, "peak_bytes": 0, "seconds": {"all": round(monotonic() - start, 1)}}
        path.write_text(json.dumps(row, indent=1) + "\n")


def _rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]


def document(rows: list[dict[str, Any]]) -> str:
    """docs/zoo.md."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    passed = [row for row in rows if row["passed"]]
    yield "# Which networks export"
    yield ""
    ours = _torchvisions_classifiers()
    classifiers = [row for row in rows if row["name"] in ours]
    numbers = {"passed": len(passed), "rows": len(rows), "images": IMAGES["classify"], "limit": LIMIT, "least": LEAST_VARIATION}
    numbers |= {"good": sum(row["passed"] for row in classifiers), "classifiers": len(classifiers)}
    yield _INTRODUCTION.format(**numbers)
    yield _HEADER
    yield from (_line(row) for row in sorted(rows, key=lambda row: str(row["name"])))
    yield ""
    yield "## What did not pass, and why"
    yield ""
    failed = [f"- {row['name']}: {row.get('error', 'its answers hardly vary over images')}" for row in rows if not row["passed"]]
    yield from failed or ["Nothing."]
    differing = [row for row in passed if not all("passes" in finding for finding in row.get("exporters", {}).values())]
    yield from ["", "## Where the exporters differ", ""]
    yield from [f"- {row['name']}: {row['exporter_why']}" for row in differing] or ["Both exporters pass for every network."]
    centred = [str(row["name"]) for row in rows if "head" in row]
    if centred:
        yield from ["", f"The head's bias was centred on the images, to vary at all, in: {', '.join(centred)}."]
    yield from ["", "## Memory", ""]
    yield _MEMORY


def _torchvisions_classifiers() -> set[str]:
    from deploykit import models

    return {entry.name for entry in models.catalogue() if entry.source == "torchvision" and entry.task == "classify"}


def _line(row: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    seconds = row["seconds"]
    cells = [str(row["name"]), number("parameters", ",d"), str(row.get("exporter", "-")), number("onnx", ".1e")]
    cells += [number("torchscript", ".1e"), number("variation", ".2f"), number("nodes", "d")]
    cells += [f"{seconds[key]:.1f}" if key in seconds else "-" for key in ("onnx", "torchscript")]
    cells += [f"{row['peak_bytes'] / _GIB:.1f}", f"{row['predicted_bytes'] / _GIB:.1f}" if "predicted_bytes" in row else "-"]
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="where the rows are kept, one file a network")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=3600, help="the longest that one network may take")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the document about all rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
