"""Faults planted into ResNet-50, and whether `deploykit bisect` finds the layer: found or not, passes over the images, seconds.

usage: python benchmarks/bisect_faults.py [--network resnet50] [--pixels 224] [--images 16] [--seed 0] [--output DIR]

Random weights with calibrated BatchNorm, exported, and quantized by the rules of ONNX Runtime and of TensorRT on 16 images of
noise. Into a copy of each of the three graphs goes one fault at a time, at a layer drawn by `--seed`: one output channel's
weights shifted by one, a convolution padded at two sides only, the scale of a layer's weights times 1.25 (INT8) or its
weights times that (FP32), and RGB swapped in the first layer. A graph without a fault is bisected too, and nothing must be found.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from _results import write
from numpy.typing import NDArray
from onnx import numpy_helper

from deploykit import export, models, quantize
from deploykit.artifact import Artifact
from deploykit.bisect import bisect
from deploykit.recipe import ExportTable, ModelTable, PreprocessTable, QuantizeTable

BATCH, CALIBRATION_IMAGES, FACTOR = 4, 16, np.float32(1.25)
Images = NDArray[np.float32]
Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """One fault: where it was planted and what was found. `layer` and `found` are empty where there is none."""

    graph: str
    fault: str
    layer: str
    found: str
    passes: int
    before_db: float | None
    after_db: float | None
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        graphs = _graphs(arguments.network, arguments.pixels, Path(scratch))
        images = _pictures(arguments.images, arguments.pixels, seed=2)
        for label, graph in graphs.items():
            random = np.random.default_rng(arguments.seed)
            for fault, layer, model in _faulty(onnx.load(graph.path), random):
                path = Path(scratch, "faulty.onnx")
                onnx.save(model, path)
                rows.append(_bisected(graphs["FP32"].path, path, images, label, fault, layer))
                print(rows[-1], flush=True)
    hits = sum(row.found == row.layer for row in rows)
    print(f"{hits} of {len(rows)} right; at most {max(row.passes for row in rows)} passes over {len(images)} images")
    write(
        "bisect_faults", {"arguments": {**vars(arguments), "output": None}, "rows": [vars(row) for row in rows]}, arguments.output
    )


def _graphs(network: str, pixels: int, folder: Path) -> dict[str, Artifact]:
    model = models.load(ModelTable(name=network, weights="none"), PreprocessTable(crop=pixels))
    models.calibrate_batch_norm(model, [_pictures(CALIBRATION_IMAGES, pixels, seed=0)])
    for name in ("fp32", "observations", "onnxruntime", "tensorrt"):
        (folder / name).mkdir()
    images = _pictures(CALIBRATION_IMAGES, pixels, seed=1)
    fp32 = export.onnx_model(model, images[:2], None, ExportTable(), folder / "fp32")

    def batches(size: int) -> Iterator[Images]:
        return (images[start : start + size] for start in range(0, len(images), size))

    seen = quantize.calibrate(fp32, batches, folder / "observations", images=len(images))
    int8 = {name: quantize.quantize(fp32, seen, QuantizeTable(), name, folder / name) for name in ("onnxruntime", "tensorrt")}
    return {"FP32": fp32, "INT8, ONNX Runtime's rules": int8["onnxruntime"], "INT8, TensorRT's rules": int8["tensorrt"]}


def _faulty(model: onnx.ModelProto, random: np.random.Generator) -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """The graph as it is, then with each fault: what it is and the node it is in."""
    layers = [node.name for node in model.graph.node if node.op_type == "Conv"]
    padded = [node.name for node in model.graph.node if node.op_type == "Conv" and any(_attribute(node, "pads"))]
    yield "none", "", model
    for fault, among in (
        ("corrupted weights", layers),
        ("wrong pad", padded),
        ("wrong scale", layers),
        ("swapped RGB", layers[:1]),
    ):
        layer = str(random.choice(among))
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        _plant(changed, fault, layer)
        yield fault, layer, changed


def _plant(model: onnx.ModelProto, fault: str, layer: str) -> None:
    node = next(node for node in model.graph.node if node.name == layer)
    stored = {value.name for value in model.graph.initializer}
    if fault == "wrong pad":
        pads = _attribute(node, "pads")
        pads[:] = [0, 0, 2 * pads[0], 2 * pads[1]]
    elif fault == "wrong scale":
        name = f"{layer}/weight/scale"
        if f"{layer}/weight/quantized" not in stored:  # FP32, or integers that are made when the graph runs
            name = _weights(model, node)
        _change(model, name, lambda weights: weights * FACTOR)
    elif fault == "swapped RGB":
        _change(model, _weights(model, node), lambda weights: weights[:, ::-1])
    else:
        _change(model, _weights(model, node), _with_a_shifted_channel)


def _with_a_shifted_channel(weights: NDArray[Any]) -> NDArray[Any]:
    changed = weights.copy()
    changed[0] = np.roll(changed[0].reshape(-1), 1).reshape(changed[0].shape)
    return changed


def _weights(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """The stored weights of a layer, behind its Q/DQ if it has any."""
    producers = {name: node for node in model.graph.node for name in node.output}
    name = str(node.input[1])
    while name in producers:
        name = str(producers[name].input[0])
    return name


def _change(model: onnx.ModelProto, name: str, change: Change) -> None:
    value = next(value for value in model.graph.initializer if value.name == name)
    value.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(value))), name))


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((attribute.ints for attribute in node.attribute if attribute.name == name), [])


def _bisected(a: Path, b: Path, images: Images, graph: str, fault: str, layer: str) -> Row:
    start = perf_counter()
    found = bisect(a, b, lambda: (images[start : start + BATCH] for start in range(0, len(images), BATCH)))
    seconds = perf_counter() - start
    proof = found.proof
    return Row(
        graph=graph,
        fault=fault,
        layer=layer,
        found="" if found.culprit is None else found.culprit.node,
        passes=found.passes,
        before_db=found.output_db,
        after_db=None if proof is None else proof.after_db,
        seconds=seconds,
    )


def _pictures(count: int, pixels: int, *, seed: int) -> Images:
    """Smooth blobs with noise on them, normalised: (count, 3, pixels, pixels)."""
    random = np.random.default_rng(seed)
    coarse = np.kron(random.standard_normal((count, 3, 8, 8)), np.ones((1, 1, pixels // 8, pixels // 8)))
    return (coarse + 0.2 * random.standard_normal(coarse.shape)).astype(np.float32)


if __name__ == "__main__":
    main()
