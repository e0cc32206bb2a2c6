"""Every network that has a name here, exported by both of torch's exporters and compared with PyTorch, one process a network.

usage: python benchmarks/zoo.py --images DIR [--output benchmarks/results] [--only NAME ...] [--again] [--docs docs/zoo.md]

Weights are random, and made so that answers vary over images: BatchNorm is calibrated on the images, heads that torchvision
leaves at zero and layer scales of 1e-6 are not kept. A row fails where the logits' standard deviation over images is below a
tenth of their spread over images and classes: what is constant proves nothing.

Small networks first, the largest last. Every row is kept as soon as it is there, and not made again; --again makes those again
that failed. Without --images nothing is run and --docs is written from the rows that are there.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

from _results import path_of, write

LIMIT = 1e-4  # max|d| / max|y| of every output
LEAST_VARIATION = 0.1
IMAGES = {"classify": 4, "segment": 2, "detect": 2, "clips": 2}
# BatchNorm of other tasks sees more: SSDlite's last maps are one pixel, and two values that are nearly the same, scaled to a
# deviation of one, are little but rounding (2.2e-4 between the file and PyTorch on two pictures).
_CALIBRATED = 8
# Networks of more parameters than that come last, with half the images.
_LARGE_PARAMETERS = 250_000_000
# What the last BatchNorm of a residual block scales by, in classifiers of more parameters than that and all that is none.
_DEEP_PARAMETERS, _BRANCH = 40_000_000, 0.3
# Networks of more multiply-accumulates than that get smaller pictures, unless they are built for one size.
_MOST_GMACS = 5.0
_SIDES = {"classify": 128, "segment": 256, "detect": 320, "clips": 112}
_OF_ONE_SIZE = ("vit_", "swin_", "maxvit_", "ssd", "s3d")
_GIB = 1 << 30
_INTRODUCTION = """\
Written by `benchmarks/zoo.py` from its results. {passed} of {rows} networks that were run pass, {good} of torchvision's
{classifiers} classifiers among them: an ONNX file, run by ONNX Runtime literally and with all of its optimizations, and a
TorchScript file answer photographs within max|d| / max|y| = {limit:g} of PyTorch, for each output (of detectors, over boxes that
belong together, and both sides find the same boxes). Weights are random, made so that answers vary over images: BatchNorm is
calibrated on them, and the logits' standard deviation over images is at least {least:.0%} of their spread over images and
classes, else the row fails. Residual branches of classifiers above {deep:,d} parameters, and of all that is none, have {branch:g}
of their strength, as training leaves them: with all of it, float32 alone moves answers by up to 1.1e-3. Both of torch's exporters
run on the same weights and inputs, and what passes is kept; of detectors the legacy one writes the file.

Classifiers get {classify} images, two above {large:,d} parameters; other tasks two, and eight to calibrate BatchNorm on. Inputs
are the published ones up to {gmacs:g} GMACs; above that at most {side} pixels ({segment} for segmenters, {detect} for detectors),
unless the network is built for one size. Times are CPU seconds of one thread: both exporters with clean-up and comparison, and
TorchScript. Memory is the largest resident set of the network's own process, beside what the rule below predicts.
"""
_COLUMNS = (
    *("network", "parameters", "input", "exporter", "ONNX", "optimized", "TorchScript", "variation", "nodes"),
    *("ONNX, s", "TorchScript, s", "GiB", "predicted"),
)
_MEMORY = """\
An export is refused (exit 4) before its work where the memory that is free is less than 1 GiB, five times the weights, and
fourteen times the largest tensor of the forward pass for as many images as run at once (`deploykit/export/memory.py`).
The column is what the rule said when the row was made: with four tensors, until the rows of EfficientNet corrected it."""


def main() -> None:
    arguments = _arguments()
    path = path_of(arguments.name, arguments.output)
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if arguments.images is not None:
        _run(arguments, rows)
    if arguments.docs is not None:
        arguments.docs.write_text(document(rows))


def one(name: str, folder: Path, count: int | None, threads: int, into: Any) -> None:
    """Export one network and compare; its row is sent `into` a connection. Runs in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    row: dict[str, Any] = {"name": name, "seconds": {}}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _compare(name, folder, count, Path(scratch), row)
    except Exception as error:  # whatever it is belongs into the row
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    row["passed"] = "error" not in row and row["variation"] >= LEAST_VARIATION
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    into.send(row)


def _compare(name: str, folder: Path, count: int | None, scratch: Path, row: dict[str, Any]) -> None:
    from deploykit import data, export, models
    from deploykit.export import memory
    from deploykit.recipe import ExportTable

    entry = next(entry for entry in models.catalogue() if entry.name == name)
    row |= {"task": entry.task, "source": entry.source, "parameters": entry.parameters}
    memory.require(name, 4 * entry.parameters)
    with _timed(row, "load"):
        model = _loaded(entry)
    row["input"] = list(model.preprocess.shape)
    count = count or (2 if entry.parameters > _LARGE_PARAMETERS else IMAGES[entry.task])
    seen = count if entry.task == "classify" else max(count, _CALIBRATED)
    pictures = data.calibration_subset(data.folder(folder, labelled=False), seen, seed=0)
    calibration = next(pictures.batches(model.preprocess, len(pictures)))
    inputs = calibration[:count]
    row["images"] = len(inputs)
    largest = memory.largest_tensor_bytes(model.module, inputs.shape)
    row["predicted_bytes"] = memory.need_bytes(memory.weight_bytes(model.module), largest)
    with _timed(row, "calibrate"):
        if entry.task != "classify" or entry.parameters > _DEEP_PARAMETERS:
            _calm(model.module)
        if entry.task == "classify":
            _enliven(model.module, inputs)
        _vary(model, calibration, inputs, row)
    # Of detectors the one exporter writes the file, and what the other one says is asked for at the end.
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
            with _timed(row, "optimized"):
                row["optimized"] = _optimized(model, made, target, settings)
        for path in target.iterdir():
            path.unlink()
    if entry.task == "detect":
        with _timed(row, "new"):
            row["exporters"] = {"legacy": "passes", "new": _by_new(model, inputs)}


def _loaded(entry: Any) -> Any:
    """The network with random weights, and a large one with a smaller input than its own where it takes that."""
    import torchvision.models

    from deploykit import models
    from deploykit.recipe import ModelTable, PreprocessTable

    crop = None
    if entry.gmacs > _MOST_GMACS and not entry.name.startswith(_OF_ONE_SIZE):
        crop = min(entry.input_size[-1], _SIDES[entry.task])
    elif entry.name.startswith("vit_"):  # the smallest that weights were published for
        crop = min(each.transforms().crop_size[0] for each in torchvision.models.get_model_weights(entry.name))
    return models.load(ModelTable(name=entry.name, weights="none"), PreprocessTable(crop=crop))


def _optimized(model: Any, made: Any, folder: Path, settings: Any) -> float:
    """max|d| / max|y| of ONNX Runtime with all of its optimizations on, as it is used, from PyTorch."""
    from deploykit import export, scenes
    from deploykit.artifact import SAMPLES, Samples
    from deploykit.export.boxes import checked_boxes
    from deploykit.export.reference import checked_error
    from deploykit.runtimes import answers, onnxruntime, pieces, run

    golden = Samples.load(folder / SAMPLES)
    session = onnxruntime.optimized(made.path, threads=1)
    try:
        if model.task == "detect":
            found = [run(session, {export.INPUT: picture[None]}) for picture in golden.inputs[export.INPUT]]
            return checked_boxes("optimized ONNX", found, scenes.unstacked(golden.reference), settings.tolerance)
        reference = golden.reference[model.outputs[0]]
        return checked_error("optimized ONNX", answers(session, made, pieces(made, golden)), reference, settings.tolerance)
    finally:
        session.close()


def _by_new(model: Any, inputs: Any) -> str:
    """What torch's new exporter makes of a detector: that it writes a file, or its error."""
    from deploykit.errors import StageError
    from deploykit.export.exporters import exported
    from deploykit.recipe import ExportTable

    try:
        exported(model, inputs, ExportTable(batch=1), "new", outputs=model.outputs)
    except StageError as error:
        return str(error.why)
    return "writes a file, which is not compared"


def _vary(model: Any, calibration: Any, inputs: Any, row: dict[str, Any]) -> None:
    """Calibrate BatchNorm on pictures (N, C, H, W), and note how much the answers vary over some of them, the inputs."""
    import numpy as np

    from deploykit import export, models
    from deploykit.export.boxes import torch_boxes

    models.calibrate_batch_norm(model, np.array_split(calibration, 2))
    if model.task == "detect":
        row["boxes"] = [len(torch_boxes(model, picture)["boxes"]) for picture in inputs]
        row["variation"] = 1.0 if all(row["boxes"]) else 0.0
        return
    logits = export.torch_logits(model, inputs)
    row["variation"] = _variation(logits)
    if row["variation"] < LEAST_VARIATION and _centred(model.module, logits):
        row["head"] = f"its bias was centred on the images; the variation was {row['variation']:.2g}"
        row["variation"] = _variation(export.torch_logits(model, inputs))


def _enliven(module: Any, inputs: Any) -> None:
    """Weights under which answers depend on the picture, where torchvision's initial ones do not; changes `module`.

    Networks without normalisation get layers whose outputs have no mean and one deviation over the inputs, which is what
    calibrated BatchNorm does for the others: behind a few layers of PyTorch's defaults nothing is left but biases. Heads of
    zeros (ViT) and layer scales of 1e-6 (ConvNeXt) get values of a trained network's size.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer in layers:
            if not layer.weight.any():
                nn.init.xavier_normal_(layer.weight)
        for name, parameter in module.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(0.5)
        if any("Norm" in type(layer).__name__ for layer in module.modules()):
            return
        hooks = [layer.register_forward_hook(_normalise) for layer in layers]
        module(torch.from_numpy(inputs))
        for hook in hooks:
            hook.remove()


def _calm(module: Any) -> None:
    """Let residual blocks add less than their input has, as training leaves them; changes `module`.

    With branches of full strength float32 alone moves the answers of FCN-ResNet50 by 8e-5 of the largest, and those of
    EfficientNet-B6 by 1.1e-3 (PyTorch against itself in float64); with these by 5e-6 and 2.2e-6. A detector's suppression of
    overlapping boxes makes more of such differences.
    """
    import torch
    from torchvision.models.efficientnet import FusedMBConv, MBConv
    from torchvision.models.regnet import ResBottleneckBlock
    from torchvision.models.resnet import BasicBlock, Bottleneck

    for block in module.modules():
        last = None
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        elif isinstance(block, (MBConv, FusedMBConv)) and block.use_res_connect:
            last = block.block[-1][1]
        elif isinstance(block, ResBottleneckBlock):
            last = block.f.c[1]
        if last is not None and last.weight is not None:
            torch.nn.init.constant_(last.weight, _BRANCH)


def _normalise(layer: Any, _inputs: object, output: Any) -> Any:
    """Make the layer's outputs (N, C, ...) have no mean, channel by channel, and a standard deviation of one; a forward hook."""
    others = [axis for axis in range(output.ndim) if axis != 1]
    mean = output.mean(dim=others)
    deviation = (output - mean.reshape(1, -1, *[1] * (output.ndim - 2))).std()
    layer.weight.div_(deviation)
    if layer.bias is None:
        return output / deviation
    layer.bias.sub_(mean).div_(deviation)
    return (output - mean.reshape(1, -1, *[1] * (output.ndim - 2))) / deviation


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
    """Seconds of CPU that a block took, in the row: they say more than the clock does where others work too."""

    def __init__(self, row: dict[str, Any], what: str) -> None:
        self.seconds, self.what = row["seconds"], what

    def __enter__(self) -> None:
        self.start = process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.what] = round(process_time() - self.start, 2)


def _run(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Each network that has no row yet, the small ones first; every one in a process of its own."""
    from deploykit import models

    order = {entry.name: (entry.parameters > _LARGE_PARAMETERS, entry.parameters) for entry in models.catalogue()}
    names = arguments.only or sorted(order, key=lambda name: order[name])
    _warm_up()
    for index, name in enumerate(names, 1):
        kept = next((row for row in rows if row["name"] == name), None)
        if kept is None or (arguments.again and not kept["passed"]):
            rows[:] = [row for row in rows if row["name"] != name]
            rows.append(_in_a_process(name, arguments))
            write(arguments.name, {"limit": LIMIT, "rows": rows}, arguments.output)
            print(f"[{index}/{len(names)}] {_told(rows[-1])}", flush=True)


def _told(row: dict[str, Any]) -> str:
    seconds, gib = sum(row["seconds"].values()), row["peak_bytes"] / _GIB
    verdict = "passes" if row["passed"] else "FAILS"
    errors = ", ".join(f"{key} {row[key]:.1e}" for key in ("onnx", "optimized", "torchscript", "variation") if key in row)
    return f"{row['name']} {verdict}: {row.get('error', errors)}; {seconds:.0f} s, {gib:.1f} GiB"


def _warm_up() -> None:
    """Load what every network's process needs, once: they are forked from this one, which starts no threads."""
    import onnxruntime  # noqa: F401
    import torch
    from onnxscript import optimizer  # noqa: F401

    from deploykit import data, export  # noqa: F401

    # The new exporter reads its own source for every export again, which is seconds.
    registration = importlib.import_module("torch.onnx._internal.exporter._registration")
    registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(registration.ONNXRegistry.from_torchlib))
    torch.set_num_threads(1)
    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
    torch.onnx.export(tiny.eval(), (torch.zeros(1, 3, 4, 4),), dynamo=True, opset_version=19, verbose=False)


def _in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a network, made in a fork of this process."""
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=one, args=(name, arguments.images, arguments.count, arguments.threads, theirs))
    child.start()
    theirs.close()
    try:
        if mine.poll(arguments.limit_s):
            row: dict[str, Any] = mine.recv()
            return row
        why = f"it was not done after {arguments.limit_s:g} s"
    except EOFError:
        child.join()
        why = f"its process ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return {"name": name, "passed": False, "error": why, "peak_bytes": 0, "seconds": {}}


def document(rows: list[dict[str, Any]]) -> str:
    """docs/zoo.md."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    passed = [row for row in rows if row["passed"]]
    yield "# Which networks export"
    yield ""
    ours = _torchvisions_classifiers()
    classifiers = [row for row in rows if row["name"] in ours]
    numbers = {"passed": len(passed), "rows": len(rows), "limit": LIMIT, "least": LEAST_VARIATION}
    numbers |= {"good": sum(row["passed"] for row in classifiers), "classifiers": len(ours)}
    numbers |= {"classify": IMAGES["classify"], "large": _LARGE_PARAMETERS, "gmacs": _MOST_GMACS}
    numbers |= {"deep": _DEEP_PARAMETERS, "branch": _BRANCH}
    numbers |= {"side": _SIDES["classify"], "segment": _SIDES["segment"], "detect": _SIDES["detect"]}
    yield _INTRODUCTION.format(**numbers)
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{'---|' * len(_COLUMNS)}"
    yield from (_line(row) for row in sorted(rows, key=lambda row: str(row["name"])))
    yield ""
    yield "## What did not pass, and why"
    yield ""
    failed = [f"- {row['name']}: {row.get('error', 'its answers hardly vary over images')}" for row in rows if not row["passed"]]
    yield from failed or ["Nothing."]
    left = sorted(_names() - {row["name"] for row in rows})
    if left:
        yield from ["", "## Not run yet", "", ", ".join(left) + "."]
    differing = [row for row in passed if not all("passes" in finding for finding in row.get("exporters", {}).values())]
    yield from ["", "## Where the exporters differ", ""]
    yield from [f"- {row['name']}: {row['exporter_why']}{_refusal(row)}" for row in differing] or [
        "Both exporters pass for every network."
    ]
    centred = [str(row["name"]) for row in rows if "head" in row]
    if centred:
        yield from ["", f"The head's bias was centred on the images, to vary at all, in: {', '.join(centred)}."]
    yield from ["", "## Memory", ""]
    yield _MEMORY


def _refusal(row: dict[str, Any]) -> str:
    """Of a detector, what the new exporter said: how it begins, and where in torchvision it was."""
    said = str(row["exporters"].get("new", "")) if row["task"] == "detect" else ""
    place = said.rpartition("Caused by: ")[2] if "Caused by: " in said else ""
    return f"; new: `{said[:120]}`{', ' + place if place else ''}" if said else ""


def _names() -> set[str]:
    from deploykit import models

    return {entry.name for entry in models.catalogue()}


def _torchvisions_classifiers() -> set[str]:
    from deploykit import models

    return {entry.name for entry in models.catalogue() if entry.source == "torchvision" and entry.task == "classify"}


def _line(row: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    seconds = row["seconds"]
    size = "x".join(map(str, row["input"])) if "input" in row else "-"
    cells = [str(row["name"]), number("parameters", ",d"), size, str(row.get("exporter", "-")), number("onnx", ".1e")]
    cells += [number("optimized", ".1e"), number("torchscript", ".1e"), number("variation", ".2f"), number("nodes", "d")]
    cells += [f"{seconds[key]:.1f}" if key in seconds else "-" for key in ("onnx", "torchscript")]
    cells += [f"{row['peak_bytes'] / _GIB:.1f}", f"{row['predicted_bytes'] / _GIB:.1f}" if "predicted_bytes" in row else "-"]
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of pictures")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the rows are kept")
    parser.add_argument("--count", type=int, help="how many pictures, instead of a few by the task")
    parser.add_argument("--name", default="zoo", help="what the file with the rows is called")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--again", action="store_true", help="make rows again that failed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=3600, help="the longest that one network may take")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the document about all rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
