"""The same INT8 file on other CPUs: on how many images it answers otherwise without VNNI and on ARM, and what 7-bit weights cost.

usage: python benchmarks/isa_table.py --images DIR --checkpoint NETWORK[@PIXELS]=FILE [--checkpoint ...]
           [--isa CPU ...] [--arm-root DIR] [--emulated-images 200] [--held-out-images 2000] [--output DIR]

DIR holds `train/<class>/`. All files of a network come from the same FP32 graph and the same 256 training images: ours as
`deploykit export --cpu any` and `--cpu this` write them, and `onnxruntime.quantization.quantize_static` with QDQ, uint8
activations, int8 weights by channel and min/max ranges. Run it on a CPU with an int8 dot product: its answers are what the
emulated ones are compared with, in integers of the last tensor that a file quantizes. All files run with all of ONNX Runtime's
optimizations. 200 images take an emulated process a minute or two.

The cost of 7 bits is how many held-out training images get the class that FP32 gives them, here and not emulated: all
with the networks' own training images, so compare files and do not quote the accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _results import write
from numpy.typing import NDArray

from deploykit import data, emulate, isa
from deploykit.artifact import Artifact, Preprocess, TensorSpec, read_artifact
from deploykit.emulate import CPUS
from deploykit.machine import Machine
from deploykit.recipe import load
from deploykit.runtimes import onnxruntime, run
from deploykit.sources import Sources

CALIBRATION_IMAGES, BATCH = 256, 50
RIVAL, OURS = "quantize_static by channel", {"any": "deploykit --cpu any", "this": "deploykit --cpu this"}
Images = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NETWORK[@PIXELS]=FILE")
    parser.add_argument("--isa", action="append", choices=list(CPUS), help="default: all, those of ARM with --arm-root")
    parser.add_argument("--arm-root", type=Path)
    parser.add_argument("--emulated-images", type=int, default=200)
    parser.add_argument("--held-out-images", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not Machine.probe().has_int8_dot_product:
        sys.exit("this CPU has no int8 dot product, so its own answers are nothing to compare with")
    found = {text.partition("=")[0]: _study(text, arguments) for text in arguments.checkpoint}
    write("isa_table", {"calibration_images": CALIBRATION_IMAGES, "networks": found}, arguments.output)


def _study(text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    network, _, checkpoint = text.partition("=")
    name, _, pixels = network.partition("@")
    with tempfile.TemporaryDirectory() as scratch:
        runs = {cpu: _export(name, pixels, checkpoint, cpu, arguments.images, Path(scratch, cpu)) for cpu in OURS}
        fp32 = read_artifact(runs["any"] / "export-onnx")
        judged, labels = _held_out(runs["any"], arguments.images, fp32.preprocess, arguments.held_out_images)
        files = {label: isa.graph_at(runs[cpu]).path for cpu, label in OURS.items()}
        files[RIVAL] = _static(fp32.path, _calibration(runs["any"]), Path(scratch, "static.onnx"))
        accuracy = _accuracies({"FP32": fp32.path, **files}, fp32, judged, labels)
        rows = {
            label: _on_every_cpu(file, fp32.inputs[0], fp32.outputs[0].name, judged[: arguments.emulated_images], arguments)
            for label, file in files.items()
        }
    _print(network, rows, accuracy)
    return {"cpus": rows, "held_out": accuracy}


def _export(name: str, pixels: str, checkpoint: str, cpu: str, images: Path, folder: Path) -> Path:
    classes = sum(path.is_dir() for path in (images / "train").iterdir())
    size = [f"preprocess.resize={pixels}", f"preprocess.crop={pixels}"] if pixels else []
    words = ["export", name, "--weights", checkpoint, "--classes", str(classes), "--int8", "--cpu", cpu, "--to", "onnxruntime"]
    words += ["--calibrate", str(images / "train"), "--calibration-images", str(CALIBRATION_IMAGES), "--output", str(folder)]
    words += [word for setting in ("benchmark.enabled=false", "quantize.speed=false", *size) for word in ("--set", setting)]
    done = subprocess.run([sys.executable, "-m", "deploykit", *words, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr or done.stdout)
    return folder


def _calibration(folder: Path) -> Images:
    sources = Sources(load(folder / "recipe.toml"))
    assert sources.calibration is not None
    return np.concatenate(list(sources.calibration.batches(sources.model.preprocess, BATCH)))


def _held_out(folder: Path, images: Path, how: Preprocess, count: int) -> tuple[Images, NDArray[np.int64]]:
    """Training images that nothing was calibrated on, shuffled, and their labels."""
    calibration = Sources(load(folder / "recipe.toml")).calibration
    assert calibration is not None
    known, every = set(calibration.contents), data.folder(images / "train", labelled=True)
    others = [index for index, content in enumerate(every.contents) if content not in known]
    chosen = every.take(np.random.RandomState(0).permutation(others)[:count])
    assert chosen.labels is not None
    return np.concatenate(list(chosen.batches(how, BATCH))), chosen.labels


def _static(model: Path, calibration: Images, path: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(calibration)

        def get_next(self) -> dict[str, Images] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image[None]}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
    return path


def _accuracies(files: Mapping[str, Path], fp32: Artifact, images: Images, labels: NDArray[np.int64]) -> dict[str, Any]:
    """Of each file on this machine: agreement with FP32 and top-1, in percent."""
    decided = {}
    for label, file in files.items():
        session = onnxruntime.optimized(file)
        answers = [run(session, {fp32.inputs[0].name: images[i : i + BATCH]}) for i in range(0, len(images), BATCH)]
        decided[label] = np.concatenate([answer[fp32.outputs[0].name] for answer in answers]).argmax(axis=1)
        session.close()
    return {
        label: {
            "images": len(labels),
            "agreement": 100 * float((mine == decided["FP32"]).mean()),
            "top1": 100 * float((mine == labels).mean()),
        }
        for label, mine in decided.items()
    }


def _on_every_cpu(
    file: Path, source: TensorSpec, logits: str, images: Images, arguments: argparse.Namespace
) -> dict[str, dict[str, int]]:
    names = arguments.isa or [name for name, cpu in CPUS.items() if cpu.arch == "x86_64" or arguments.arm_root]
    with tempfile.TemporaryDirectory() as scratch:
        exposed, integers = isa.exposing(file, Path(scratch, "exposed.onnx"))
        native = emulate.answers(exposed, source, images, None).outputs
        found = {}
        for name in names:
            there = emulate.answers(exposed, source, images, CPUS[name], arm_root=arguments.arm_root).outputs
            found[name] = asdict(isa.apart(there, native, logits, integers))
    return found


def _print(
    network: str, rows: Mapping[str, Mapping[str, Mapping[str, int]]], accuracy: Mapping[str, Mapping[str, float]]
) -> None:
    print(f"\n{network}: images that differ, most steps, images decided otherwise")
    names = list(next(iter(rows.values())))
    print(f"{'':28}" + "".join(f"{name:>18}" for name in names))
    for label, found in rows.items():
        cells = [f"{row['differ']}/{row['images']}, {row['most_steps']}, {row['flips']}" for row in found.values()]
        later = {name: row["changed_later"] for name, row in found.items() if row["changed_later"]}
        print(
            f"{label:28}" + "".join(f"{cell:>18}" for cell in cells) + (f"  changed later: {json.dumps(later)}" if later else "")
        )
    for label, shown in accuracy.items():
        told = f"agrees with FP32 on {shown['agreement']:.2f} % of {shown['images']}, top-1 {shown['top1']:.2f} %"
        print(f"{label:28} {told}", flush=True)


if __name__ == "__main__":
    main()
