"""What each step of our INT8 is worth, on trained networks: SQNR at the logits and agreement with FP32, by both rules.

usage: python benchmarks/int8_ablation.py --images DIR --checkpoint NETWORK[@PIXELS]=FILE [--checkpoint ...]
           [--held-out-images N] [--output DIR]

Each row has all the steps of those above it. Images are the same as in `int8_accuracy.py --judge held-out`: 256 training
images to calibrate on, and others of them to judge on. Speed decides nothing here (`quantize.speed = false`). ONNX Runtime
runs its graphs with all optimisations, and TensorRT's literally.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import numpy as np
from _results import write
from int8_accuracy import Material, Network, as_network, export, material_of
from numpy.typing import NDArray

from deploykit import recipe, runtimes
from deploykit.artifact import Artifact, read_artifact
from deploykit.runtimes import onnxruntime
from deploykit.sources import Sources

BATCH = 50
RULES = ("onnxruntime", "tensorrt")
ALWAYS = ("quantize.speed=false", "build.engine=skip")
# What is switched off until the row that is named after the step.
STEPS = {
    "least-squares ranges": "quantize.method=minmax",
    "equalization": "quantize.equalize=false",
    "rounding together": "quantize.rounding=nearest",
    "float fall-back": "quantize.target_sqnr_db=0",
}
Row = Mapping[str, Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", type=as_network, action="append", required=True, metavar="NETWORK[@PIXELS]=FILE")
    parser.add_argument("--held-out-images", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    parser.set_defaults(judge="held-out")
    arguments = parser.parse_args()
    found = {}
    for chosen in arguments.checkpoint:
        found[chosen.name] = _study(chosen, arguments)
        _print_table(chosen.name, found[chosen.name])
    first, *_ = found.values()
    mean = {
        row: {
            rule: {key: fmean(table[row][rule][key] for table in found.values()) for key in cells}
            for rule, cells in rules.items()
        }
        for row, rules in first.items()
    }
    _print_table(f"mean over {len(found)} networks", mean)
    write("int8_ablation", {"images": arguments.held_out_images, "mean": mean, "networks": found}, arguments.output)


def _rows() -> dict[str, list[str]]:
    """The settings of each row: what has not been switched on yet."""
    names = list(STEPS)
    rows = {"min/max": [*STEPS.values()]}
    return rows | {f"+ {name}": [STEPS[later] for later in names[index + 1 :]] for index, name in enumerate(names)}


def _study(chosen: Network, arguments: argparse.Namespace) -> dict[str, Row]:
    """Row name -> rules -> what was measured."""
    found: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        material: Material | None = None
        wanted: NDArray[np.float32] = np.empty(0, np.float32)
        for index, (name, settings) in enumerate(_rows().items()):
            folder = export(chosen, arguments.images, [*ALWAYS, *settings], Path(scratch) / str(index))
            if material is None:
                sources = Sources(recipe.load(folder / "recipe.toml"))
                material = material_of(sources, folder, arguments, Path(scratch))
                source = read_artifact(folder / "export-onnx")
                wanted = _answers(source, material, optimise=True)
            graphs = {rule: read_artifact(folder / f"quantize-{rule}") for rule in RULES}
            found[name] = {
                rule: _compared(_answers(graph, material, optimise=rule == "onnxruntime"), wanted, material.labels)
                | {"float_layers": len(graph.facts["float_layers"])}  # type: ignore[arg-type]
                for rule, graph in graphs.items()
            }
    return found


def _answers(graph: Artifact, material: Material, *, optimise: bool) -> NDArray[np.float32]:
    images = np.load(material.judged, mmap_mode="r")
    session = onnxruntime.reference(graph.path, optimise=optimise)
    batches = (np.ascontiguousarray(images[start : start + BATCH]) for start in range(0, len(images), BATCH))
    answers = runtimes.answers(session, graph, batches)
    session.close()
    return answers


def _compared(answers: NDArray[np.float32], wanted: NDArray[np.float32], labels: tuple[int, ...]) -> dict[str, float]:
    noise = ((answers.astype(np.float64) - wanted) ** 2).sum()
    decided, right = answers.argmax(axis=1), wanted.argmax(axis=1)
    return {
        "sqnr_db": float(10 * np.log10((wanted.astype(np.float64) ** 2).sum() / noise)),
        "agreement": 100 * float((decided == right).mean()),
        "drop": 100 * float((right == labels).mean() - (decided == labels).mean()),
    }


def _print_table(title: str, rows: Mapping[str, Row]) -> None:
    print(f"\n{title}\n{'':26}" + "".join(f"{rule:>40}" for rule in RULES))
    for name, row in rows.items():
        cells = (
            f"{found['sqnr_db']:.2f} dB {found['agreement']:.2f} % drop {found['drop']:+.2f}, {found['float_layers']:g} float"
            for found in (row[rule] for rule in RULES)
        )
        print(f"{name:26}" + "".join(f"{cell:>40}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
