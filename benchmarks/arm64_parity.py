"""The same bundle on this machine and on a 64-bit ARM device: what its own parity says there, and on how many images it differs.

usage: python benchmarks/arm64_parity.py --device emulated://DIR --images DIR --checkpoint NETWORK[@PIXELS]=FILE [...]
           [--cpu any arm64] [--count 64] [--output DIR]

`deploykit device emulate DIR` makes such a device; any other address (ssh://jetson) does as well. Each network is exported with
INT8, packed, and taken through install, build, parity and activate there; then the current release answers training images as
a user's program would ask it, and here the same graph answers them with all of ONNX Runtime's optimizations. A difference is an
answer that is further off than float rounding explains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _results import write
from numpy.typing import NDArray

from deploykit import bundle, data, runtimes
from deploykit.artifact import read_artifact
from deploykit.isa import graph_at
from deploykit.machine import Machine
from deploykit.remote import Connection, connect
from deploykit.runtimes import onnxruntime

CALIBRATION_IMAGES = 256
ROUNDING = 1e-4  # of the largest answer
ASK = """
import sys
sys.path.insert(0, f"{sys.argv[1]}/current/device.pyz")
import numpy
from deploykit_device import load
net = load(f"{sys.argv[1]}/current")
numpy.save(sys.argv[3], net(numpy.load(sys.argv[2], allow_pickle=False)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NETWORK[@PIXELS]=FILE")
    parser.add_argument("--cpu", nargs="+", default=["any", "arm64"], choices=["any", "arm64", "this"])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for text in arguments.checkpoint:
            for cpu in arguments.cpu:
                rows.append(_row(text, cpu, arguments, Path(scratch)))
                _print(rows[-1])
    device = connect(arguments.device)
    machine = json.loads(_python(device, ["-c", "import platform, onnxruntime; print('\"' + onnxruntime.__version__ + '\"')"]))
    facts = {"device": arguments.device.partition(":")[0], "onnxruntime": machine, "rows": rows}
    write("arm64_parity", facts, arguments.output)
    sys.exit(0 if all(row["parity"] == "pass" for row in rows) else 1)


def _row(text: str, cpu: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    network, _, checkpoint = text.partition("=")
    name, _, pixels = network.partition("@")
    run, packed = scratch / f"{name}-{cpu}", scratch / f"{name}-{cpu}.bundle"
    _export(name, pixels, checkpoint, cpu, arguments.images, run)
    _deploykit("pack", str(run), "--release", "1", "--output", str(packed))
    graph = graph_at(run)
    chosen = data.folder(arguments.images / "train", labelled=True)
    order = np.random.RandomState(1).permutation(len(chosen.contents))[: arguments.count]
    fed = np.concatenate(list(chosen.take(order).batches(graph.preprocess, 64)))
    np.save(scratch / "images.npy", fed)
    here = _here(graph.path, graph.inputs[0].name, fed)
    there, said, seconds = _answered(connect(arguments.device), packed, scratch)
    samples = read_artifact(run / "export-onnx").samples()
    off = np.abs(here.astype(np.float64) - there).reshape(len(fed), -1).max(axis=1)
    return {
        "network": network,
        "cpu": cpu,
        "int8_layers": said["precision"]["int8"],
        "parity": said["parity"]["verdict"],
        "precision": said["precision"]["verdict"],
        "parity_report": said["parity"],
        "images": len(fed),
        "differ": int((off > ROUNDING * np.abs(here).max()).sum()),
        "largest": float(off.max()),
        "range": float(here.max() - here.min()),
        "flips": int((here.argmax(axis=1) != there.argmax(axis=1)).sum()),
        "golden": len(next(iter(samples.inputs.values()))),
        "seconds_there": seconds,
        "answers_here": np.asarray(here).tolist(),
        "answers_there": np.asarray(there).tolist(),
    }


def _here(graph: Path, name: str, images: NDArray[np.float32]) -> NDArray[Any]:
    session = onnxruntime.optimized(graph)
    found = [next(iter(runtimes.run(session, {name: images[at : at + 8]}).values())) for at in range(0, len(images), 8)]
    session.close()
    return np.concatenate(found)


def _export(name: str, pixels: str, checkpoint: str, cpu: str, images: Path, run: Path) -> None:
    classes = sum(path.is_dir() for path in (images / "train").iterdir())
    size = [f"preprocess.resize={pixels}", f"preprocess.crop={pixels}"] if pixels else []
    words = ["export", name, "--weights", checkpoint, "--classes", str(classes), "--int8", "--cpu", cpu, "--to", "onnxruntime"]
    words += ["--calibrate", str(images / "train"), "--calibration-images", str(CALIBRATION_IMAGES), "--output", str(run)]
    _deploykit(*words, *(word for text in ("benchmark.enabled=false", "quantize.speed=false", *size) for word in ("--set", text)))


def _deploykit(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "deploykit", *words], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):
        sys.exit(f"{' '.join(words)}: {done.stderr or done.stdout}")


def _python(device: Connection, words: list[str]) -> str:
    done = device.run(["python3", *words], silence_s=3600)
    if done.code not in (0, 3, 5):
        sys.exit(f"{device.name}: {' '.join(words)[:200]}: {done.stdout.decode()[-2000:]}{done.stderr.decode()[-2000:]}")
    return done.stdout.decode()


def _answered(device: Connection, packed: Path, scratch: Path) -> tuple[NDArray[Any], dict[str, Any], float]:
    """The answers of the release that a device activated, what parity said there, and the seconds that answering took."""
    place = "/opt/deploykit/parity"
    device.run(["rm", "-rf", place])
    device.run(["mkdir", "-p", place])
    app, root = f"{place}/device.pyz", f"{place}/root"
    with bundle.opened(packed) as opened:
        half = b"".join(bundle.pieces(opened, opened.manifest.portable[bundle.DEVICE_HALF]))
        (scratch / "device.pyz").write_bytes(half)
    for source, target in (("device.pyz", app), ("images.npy", f"{place}/images.npy"), (packed.name, f"{place}/it.bundle")):
        device.put(scratch / source, target)
    id = json.loads(_python(device, [app, "install", f"{place}/it.bundle", "--root", root]))["id"]
    _python(device, [app, "build", id, "--root", root])
    said = json.loads(_python(device, [app, "parity", id, "--root", root]))
    activated = json.loads(_python(device, [app, "activate", id, "--root", root]))
    if not activated.get("activated"):
        sys.exit(f"{device.name}: not activated: {json.dumps(activated)[:3000]}")
    began = time.monotonic()
    _python(device, ["-c", ASK, root, f"{place}/images.npy", f"{place}/answers.npy"])
    seconds = time.monotonic() - began
    device.get(f"{place}/answers.npy", scratch / "answers.npy")
    found: NDArray[Any] = np.load(scratch / "answers.npy", allow_pickle=False)
    device.run(["rm", "-rf", place])
    return found, said, seconds


def _print(row: dict[str, Any]) -> None:
    what = f"{row['network']} --cpu {row['cpu']}: {row['int8_layers']} layers in int8, parity there {row['parity']}"
    off = f"{row['differ']} of {row['images']} images differ, by at most {row['largest']:.3g} of {row['range']:.3g}"
    dot = "with" if Machine.probe().has_int8_dot_product else "without"
    print(f"{what}; {off}, {row['flips']} decided otherwise (this machine: {dot} an int8 dot product)", flush=True)


if __name__ == "__main__":
    main()
