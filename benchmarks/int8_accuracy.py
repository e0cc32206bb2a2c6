"""Accuracy of our INT8 beside `onnxruntime.quantization.quantize_static` and NNCF on OpenVINO, on trained networks.

usage: python benchmarks/int8_accuracy.py --images DIR --checkpoint NETWORK[@PIXELS]=FILE [--checkpoint ...]
           [--ours NAME=TABLE.KEY=VALUE,...] [--set TABLE.KEY=VALUE] [--judge held-out|test] [--nncf-python PYTHON] [--output DIR]

DIR holds `train/<class>/` and `test/<class>/`. Everybody gets the same FP32 ONNX file and the same 256 preprocessed
training images to calibrate on. `--judge held-out` judges on training images that are not among them (networks may have
been trained on these: compare variants, do not quote the accuracy), for choosing settings; `--judge test` on the whole
test folder, to be read once, at the end. PIXELS resizes the images to the size a network was trained at.

Each --ours is one variant of ours made by `deploykit export` with those settings; without any there is one with the
defaults. "onnxruntime rules" is the built engine; "tensorrt rules" is the graph for TensorRT executed literally.
Rivals are compared with ours of the same kind: `quantize_static` with uint8 activations, on ONNX Runtime with all
optimisations, and NNCF beside the engine; `quantize_static` with symmetric int8, executed literally, beside TensorRT's
graph. All rivals use int8 weights by channel, and run in processes of their own. The column "int8" says how many of the
convolutions and matrix products are quantized: ours leaves a few sensitive layers in float by default, the rivals none, so
`--ours all-int8=quantize.target_sqnr_db=0` is the comparison of like with like.

How NNCF has to be run to be at its best (3.4 on OpenVINO 2026.4; agreement with FP32 on 1,000 to 2,000 held-out images):
- `Core.read_model` keeps the biases of an ONNX file behind ShapeOf and Reshape, where NNCF does not find them: default, full
  and no bias correction then make the very same model, without a word. `openvino.convert_model` folds them.
- Fast bias correction, the default, compares a layer's true mean output with what it makes of a constant patch for each
  channel. On float weights that should be no difference; at the borders it is one: 2.5 % of the output's standard deviation
  on 16 x 16 maps, 9 % on 2 x 2 (3 x 3 convolutions of ResNet-18 at 64 pixels). ResNet-18 agrees on 97.8 % with it, on 99.1 %
  with full bias correction, on 99.1 % with none.
- A range is by default the mean over calibration items of each item's extremes, so that it clips more the fewer images an
  item has, and batches of calibration images are another setting: ResNet-18 without bias correction answers with 22 dB
  after items of 1 image, with 35 dB after items of 64. Here items are one image; `min/max` below takes the
  extremes of all images, as the others do.
- On CPUs with bf16, OpenVINO computes float layers in it unless INFERENCE_PRECISION_HINT says f32: half a point of agreement
  on MobileNetV3, 0.2 to 0.35 % of the decisions of FP32 models.
- `subset_size` counts items. Too few ruin MobileNetV2 and leave ResNet-18 whole (1 image: 35 and 96 %; 4: 80 and 97 %; all
  256: 98 and 98 %). Images without mean and std ruin both (47 and 51 %).
- Without VNNI (ONEDNN_MAX_CPU_ISA=AVX2), sums of uint8 times int8 saturate: MobileNetV2 agrees on 97.0 %, not 98.9 %.

`quantize_static` builds its entropy histograms with as many bins as levels (128 and 128, no option reaches them), so it has
next to no range to choose from and decides like min/max on every image of these networks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
from _results import write
from numpy.typing import NDArray

from deploykit import data, recipe, runtimes
from deploykit.artifact import Artifact, read_artifact
from deploykit.export import torch_logits
from deploykit.gate import paired_difference_interval
from deploykit.runtimes import onnxruntime
from deploykit.sources import Sources

CALIBRATION_IMAGES, BATCH = 256, 50
# No layer is left in float for speed: that would be more accurate, and depends on the machine.
_ALWAYS = ("benchmark.enabled=false", "quantize.speed=false")
FP32 = "FP32 PyTorch"
ENGINE, GRAPH = "onnxruntime rules", "tensorrt rules"
# Each as (activation type, calibration method), and the kind of ours that it rivals.
STATIC = {
    f"quantize_static {activations} {method}": (kind, activations, method)
    for activations, kind in (("uint8", ENGINE), ("int8", GRAPH))
    for method in ("min/max", "entropy", "percentile")
}
# Each as (range estimator, bias correction).
NNCF = {
    "NNCF": ("default", "fast"),
    "NNCF full bias correction": ("default", "full"),
    "NNCF min/max": ("min/max", "fast"),
    "NNCF min/max, full bias correction": ("min/max", "full"),
}
STATIC_PEER = """
import json, os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnx, onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
model, images, judged, folder, activations, method, batch = sys.argv[1:]
signed, pre, out = activations == "int8", folder + "/pre.onnx", folder + "/int8.onnx"
quant_pre_process(model, pre, skip_symbolic_shape=True)
class Reader(CalibrationDataReader):
    def __init__(self): self.images = iter(np.load(images))
    def get_next(self): image = next(self.images, None); return None if image is None else {name: image[None]}
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
name = onnxruntime.InferenceSession(pre, options).get_inputs()[0].name
methods = {"min/max": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}
quantize_static(pre, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8, calibrate_method=methods[method],
                extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True, "CalibTensorRangeSymmetric": signed})
if signed:
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session, pictures = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"]), np.load(judged)
answers = [session.run(None, {name: pictures[i:i + int(batch)]})[0] for i in range(0, len(pictures), int(batch))]
nodes = onnx.load(out).graph.node
made = {value: node.op_type for node in nodes for value in node.output}
layers = [node for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
int8 = sum(all(made.get(value) == "DequantizeLinear" for value in layer.input[:2]) for layer in layers)
print(json.dumps({"decisions": np.concatenate(answers).argmax(axis=1).tolist(), "layers": [int8, len(layers)],
                  "versions": {"onnxruntime": onnxruntime.__version__}}))
"""
NNCF_PEER = """
import json, logging, sys
import numpy as np, nncf, openvino
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
model, images, judged, ranges, correction, batch = sys.argv[1:]
nncf.set_log_level(logging.ERROR)
calibration, options = np.load(images), nncf.AdvancedQuantizationParameters()
if ranges == "min/max":
    options.activations_range_estimator_params = RangeEstimatorParametersSet.MINMAX
quantized = nncf.quantize(openvino.convert_model(model), nncf.Dataset([image[None] for image in calibration]),
                          subset_size=len(calibration), fast_bias_correction=correction == "fast", advanced_parameters=options)
hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
compiled, pictures = openvino.Core().compile_model(quantized, "CPU", hints), np.load(judged)
answers = [compiled(pictures[i:i + int(batch)])[0].copy() for i in range(0, len(pictures), int(batch))]
layers = [op for op in quantized.get_ops() if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")]
def source(op):
    made = op.input_value(0).get_node()
    return source(made) if made.get_type_name() in ("Reshape", "MaxPool") else made.get_type_name()
int8 = sum(source(op) == "FakeQuantize" for op in layers)
print(json.dumps({"decisions": np.concatenate(answers).argmax(axis=1).tolist(), "layers": [int8, len(layers)],
                  "versions": {"nncf": nncf.__version__, "openvino": openvino.__version__.partition("-")[0]}}))
"""


@dataclass(frozen=True)
class Answer:
    """The class that a variant gives to every image; how many of how many layers it computes in int8; tools and versions."""

    decisions: Sequence[int]
    layers: tuple[int, int]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Network:
    """One trained network; `pixels` is the side of its input, None what comes with its name."""

    name: str
    pixels: int | None
    checkpoint: str


@dataclass(frozen=True)
class Material:
    """What everybody is given: the FP32 graph, and float32 (N, C, H, W) arrays in .npy files; labels of those judged on."""

    model: Path
    calibration: Path
    judged: Path
    labels: tuple[int, ...]


def main() -> None:
    arguments = _arguments()
    if arguments.nncf_python is None:
        print("NNCF is skipped: --nncf-python names no Python that has nncf and openvino")
    studies = {}
    for network in arguments.checkpoint:
        with tempfile.TemporaryDirectory() as scratch:
            studies[network.name] = _study(network, arguments, Path(scratch))
        study = studies[network.name]
        _print_table(f"{network.name}, {study['images']} images", study["compared"])
    found = _means(list(studies.values()))
    _print_table(f"mean over {len(studies)} networks", found)
    content = {"judge": arguments.judge, "calibration_images": CALIBRATION_IMAGES, "mean": found, "networks": studies}
    write(f"int8_accuracy_{arguments.judge}", content, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", type=as_network, action="append", required=True, metavar="NETWORK[@PIXELS]=FILE")
    parser.add_argument("--ours", type=_variant, action="append", metavar="NAME=TABLE.KEY=VALUE,...")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="for all variants of ours")
    parser.add_argument("--judge", choices=("held-out", "test"), default="held-out")
    parser.add_argument("--held-out-images", type=int, default=2000)
    parser.add_argument("--nncf-python", type=Path, help="the Python of an environment with nncf and openvino")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    ours = arguments.ours or [("deploykit", [])]
    for names in ([network.name for network in arguments.checkpoint], [name for name, _ in ours]):
        if len(names) != len(set(names)):
            parser.error(f"each name is one row of the results, these are not different: {', '.join(names)}")
    arguments.ours = dict(ours)
    if arguments.nncf_python is not None and not arguments.nncf_python.is_file():
        parser.error(f"--nncf-python {arguments.nncf_python} is not a file")
    return arguments


def as_network(text: str) -> Network:
    found = re.fullmatch(r"(?P<name>[^=@]+)(?:@(?P<pixels>[1-9][0-9]{0,3}))?=(?P<file>.+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NETWORK=FILE or NETWORK@PIXELS=FILE")
    return Network(found["name"], int(found["pixels"]) if found["pixels"] else None, found["file"])


def _variant(text: str) -> tuple[str, list[str]]:
    name, _, settings = text.partition("=")
    if not name or "." in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=TABLE.KEY=VALUE,...")
    # A comma ends a setting only where another begins: values may be lists.
    return name, [setting for setting in re.split(r",(?=\w+\.\w+=)", settings) if setting]


def _study(network: Network, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What everybody decided on every image, and how that compares."""
    folders = {
        name: export(network, arguments.images, [*arguments.set, *settings], scratch / f"ours-{index}")
        for index, (name, settings) in enumerate(arguments.ours.items())
    }
    sources = _same_sources(folders)
    material = material_of(sources, next(iter(folders.values())), arguments, scratch)
    answers = {FP32: Answer(_decided(partial(torch_logits, sources.model), material.judged), (0, 0), {})}
    for name, folder in folders.items():
        answers |= {f"{name}, {kind}": answer for kind, answer in _ours(folder, material.judged)}
    answers |= _rivals(material, arguments.nncf_python, scratch)
    return {
        "versions": {tool: version for answer in answers.values() for tool, version in answer.versions.items()},
        "images": len(material.labels),
        "compared": _compared(answers, material.labels, list(folders)),
        # One text for each: indented, thousands of numbers would be a line each.
        "labels": json.dumps(material.labels, separators=(",", ":")),
        "decisions": {name: json.dumps(answer.decisions, separators=(",", ":")) for name, answer in answers.items()},
    }


def export(network: Network, images: Path, settings: Sequence[str], folder: Path) -> Path:
    classes = sum(path.is_dir() for path in (images / "train").iterdir())
    size = [] if network.pixels is None else [f"preprocess.resize={network.pixels}", f"preprocess.crop={network.pixels}"]
    words = ["export", network.name, "--weights", network.checkpoint, "--classes", str(classes), "--int8", "--json"]
    words += ["--to", "onnxruntime", "--to", "tensorrt", "--calibrate", str(images / "train")]
    words += ["--calibration-images", str(CALIBRATION_IMAGES), "--output", str(folder)]
    words += [word for setting in (*_ALWAYS, *size, *settings) for word in ("--set", setting)]
    done = subprocess.run([sys.executable, "-m", "deploykit", *words], capture_output=True, text=True)
    # 3: a gate failed, such as a layer that does not run in int8; its accuracy is a result all the same.
    if done.returncode not in (0, 3):
        sys.exit(done.stderr)
    for gate in json.loads(done.stdout)["gates"]:
        if gate["verdict"] == "fail":
            print(f"{network.name}: {gate['rule']}: failed, {gate['reason']}")
    return folder


def _same_sources(folders: Mapping[str, Path]) -> Sources:
    """The network and images of all variants. Ends the program when a setting gives one of them others."""
    recipes = {name: recipe.load(folder / "recipe.toml") for name, folder in folders.items()}
    first, *others = recipes.items()
    for name, other in others:
        if (other.model, other.preprocess, other.data) != (first[1].model, first[1].preprocess, first[1].data):
            sys.exit(f"--ours {name} has another network or other images than {first[0]}: that is no comparison")
    return Sources(first[1])


def material_of(sources: Sources, folder: Path, arguments: argparse.Namespace, scratch: Path) -> Material:
    calibration = sources.calibration
    assert calibration is not None
    if arguments.judge == "test":
        judged = data.folder(arguments.images / "test", labelled=True)
    else:
        known = set(calibration.contents)  # a picture may lie in the folder twice
        images = data.folder(arguments.images / "train", labelled=True)
        others = [index for index, content in enumerate(images.contents) if content not in known]
        if len(others) < arguments.held_out_images:
            sys.exit(f"--held-out-images {arguments.held_out_images}: only {len(others)} were not calibrated on")
        judged = images.take(np.sort(np.random.RandomState(0).permutation(others)[: arguments.held_out_images]))
    assert judged.labels is not None
    files = {"calibration": calibration, "judged": judged}
    for name, images in files.items():
        np.save(scratch / f"{name}.npy", np.concatenate(list(images.batches(sources.model.preprocess, BATCH))))
    model = read_artifact(folder / "export-onnx").path
    return Material(model, scratch / "calibration.npy", scratch / "judged.npy", tuple(judged.labels.tolist()))


def _ours(folder: Path, judged: Path) -> Iterator[tuple[str, Answer]]:
    engine, int8 = (read_artifact(folder / name) for name in ("build-onnxruntime-int8", "quantize-onnxruntime"))
    realised = onnxruntime.realised(engine, int8)
    yield ENGINE, Answer(_run(onnxruntime.load(engine), engine, judged), (realised.int8, len(realised.layers)), {})
    graph = read_artifact(folder / "quantize-tensorrt")
    quantized, floats = (len(cast(Sequence[str], graph.facts[key])) for key in ("int8_layers", "float_layers"))
    yield GRAPH, Answer(_run(onnxruntime.reference(graph.path), graph, judged), (quantized, quantized + floats), {})


def _run(session: runtimes.Session, made: Artifact, judged: Path) -> list[int]:
    decided = _decided(lambda batch: runtimes.answers(session, made, [batch]), judged)
    session.close()
    return decided


def _decided(answer: Callable[[NDArray[np.float32]], NDArray[np.float32]], judged: Path) -> list[int]:
    """The class that each image gets."""
    images = np.load(judged)
    answers = [answer(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    decided: list[int] = np.concatenate(answers).argmax(axis=1).tolist()
    return decided


def _rivals(material: Material, nncf_python: Path | None, scratch: Path) -> Iterator[tuple[str, Answer]]:
    given = [str(path) for path in (material.model, material.calibration, material.judged)]
    python = [sys.executable, "-W", "ignore", "-c", STATIC_PEER, *given, str(scratch)]
    commands = {name: [*python, activations, method] for name, (_, activations, method) in STATIC.items()}
    if nncf_python is not None:
        python = [str(nncf_python), "-W", "ignore", "-c", NNCF_PEER, *given]
        commands |= {name: [*python, ranges, correction] for name, (ranges, correction) in NNCF.items()}
    for name, command in commands.items():
        done = subprocess.run([*command, str(BATCH)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{name}: {done.stderr}")
        yield name, Answer(**json.loads(done.stdout.splitlines()[-1]))  # progress bars may come before it


def _compared(answers: Mapping[str, Answer], labels: Sequence[int], ours: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each: top-1 and agreement with FP32 in percent, int8 layers, and how many points ours has more with the interval."""
    found: dict[str, dict[str, Any]] = {}
    wanted = np.array(labels)
    right = {name: np.array(answer.decisions) == wanted for name, answer in answers.items()}
    for name, answer in answers.items():
        kinds = [kind for kind in (ENGINE, GRAPH) if _rivals_of(name, kind)]
        found[name] = {
            "top1": 100 * float(right[name].mean()),
            "agreement": 100 * float(np.equal(answer.decisions, answers[FP32].decisions).mean()),
            "int8_layers": list(answer.layers),
            "ours_minus_it": {
                mine: _difference(right[mine], right[name])
                for mine in (f"{variant}, {kind}" for kind in kinds for variant in ours)
                if mine != name
            },
        }
    return found


def _rivals_of(name: str, kind: str) -> bool:
    """Whether `name` is to be compared with ours of that kind."""
    if name in STATIC:
        return STATIC[name][0] == kind
    return name == FP32 or name.endswith(f", {kind}") or (name in NNCF and kind == ENGINE)


def _difference(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracy of ours minus theirs in percentage points on the same images, and its 95 % interval."""
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    low, high = paired_difference_interval(only_ours, only_theirs, len(ours))
    points = 100 * (only_ours - only_theirs) / len(ours)
    return {"points": points, "interval": [100 * low, 100 * high], "only_ours": only_ours, "only_theirs": only_theirs}


def _means(studies: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every number averaged over networks, layers summed; the intervals stay with the networks."""
    tables = [study["compared"] for study in studies]
    return {
        name: {
            "top1": fmean(table[name]["top1"] for table in tables),
            "agreement": fmean(table[name]["agreement"] for table in tables),
            "int8_layers": [sum(table[name]["int8_layers"][part] for table in tables) for part in (0, 1)],
            "ours_minus_it": {
                mine: {"points": fmean(table[name]["ours_minus_it"][mine]["points"] for table in tables)}
                for mine in row["ours_minus_it"]
            },
        }
        for name, row in tables[0].items()
    }


def _print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One table for each kind of ours: all that is compared with it, and by how much ours is ahead."""
    for kind in (ENGINE, GRAPH):
        members = {name: row for name, row in rows.items() if _rivals_of(name, kind)}
        columns = [column for column in rows[FP32]["ours_minus_it"] if column.endswith(f", {kind}")]
        print(f"\n{title}: {kind}\n{'':36}{'top-1':>7}{'agree':>8}{'int8':>9}", end="")
        print("".join(f"{column.removesuffix(f', {kind}') + ' minus it':>26}" for column in columns))
        for name, row in members.items():
            cells = "".join(f"{_cell(row['ours_minus_it'].get(column)):>26}" for column in columns)
            layers = "/".join(map(str, row["int8_layers"])) if name != FP32 else ""
            shown = f"{name.removesuffix(f', {kind}'):36}{row['top1']:7.2f}{row['agreement']:8.2f}{layers:>9}"
            print(shown + cells, flush=True)


def _cell(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    interval = difference.get("interval")
    return f"{difference['points']:+.2f}" + (f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")


if __name__ == "__main__":
    main()
