"""The same INT8 graph on other CPUs: emulated, over the same images, and how far its answers are from those given here.

Logits are no measure for that: how far they move with one integer depends on the network. So the last tensor that the
graph quantizes becomes an output too, and its integers are compared. Sums of integers are exact; what differs is a kernel
that saturates, or one that rounds to another neighbour, which a deep network carries on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit import data, emulate, runtimes
from deploykit.artifact import MANIFEST, Artifact, Format, Precision, Tensors, TensorSpec, read_artifact
from deploykit.emulate import CPUS, Answered, Cpu
from deploykit.errors import StageError, UsageError, printable
from deploykit.gate import EXIT_CODES, Verdict, worst
from deploykit.progress import Progress, silent

# A kernel that rounds at another place may carry an integer to its neighbour; more is another answer.
MOST_STEPS = 1
# Float layers add in another order on another CPU; less than this share of the largest answer is that, and no integer.
_ROUNDING = 1e-5
_GRAPH = "quantize-onnxruntime"


@dataclass(frozen=True)
class Apart:
    """How far answers are from others to the same images.

    `differ` counts images whose integers in the last quantized tensor are not the same, and `most_steps` is the largest
    difference between two of them; `changed_later` counts images with the same integers and yet other logits, beyond float
    rounding; `flips` those with another class in first place.
    """

    images: int
    differ: int
    most_steps: int
    changed_later: int
    flips: int

    @property
    def verdict(self) -> Verdict:
        """Whether a graph that answers like this can be said to give the same answers."""
        return Verdict.FAIL if self.flips or self.changed_later or self.most_steps > MOST_STEPS else Verdict.PASS


def compare(
    path: Path,
    names: Sequence[str],
    *,
    images: Path | None = None,
    arm_root: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run the INT8 graph at `path` on each CPU of `names`, on its golden samples and on the pictures in the folder `images`.

    `path` is a run, the artifact of its quantization or the ONNX file in it. Answers are compared with those of this machine,
    or, where the graph is for arm64 CPUs and this machine is none, with those of the first of `names`. Plain JSON values.

    Raises UsageError for what is no INT8 graph for ONNX Runtime and for CPUs that are not known, CapabilityError when this
    machine cannot emulate one, StageError when a process fails or answers with NaN or infinite values.
    """
    graph = graph_at(path)
    cpus = _cpus(names, graph)
    fed = _fed(graph, images)
    with tempfile.TemporaryDirectory() as scratch:
        exposed, integers = exposing(graph.path, Path(scratch, "model.onnx"))
        found = _answers(exposed, graph.inputs[0], fed, cpus, arm_root, progress)
    _refuse_other_versions(found)
    wanted, *actual = found.values()
    rows = [apart(one.outputs, wanted.outputs, graph.outputs[0].name, integers) for one in actual]
    return {
        "graph": printable(graph.path),
        "cpu": _meant_for(graph),
        "weight_bits": graph.facts.get("weight_bits"),
        "last_quantized": integers,
        "against": _name(cpus[0]),
        "onnxruntime": wanted.onnxruntime,
        "compared": [
            {"isa": cpu.name, "stands_for": cpu.stands_for, **asdict(row), "verdict": row.verdict.value}
            for cpu, row in zip(cpus[1:], rows, strict=True)
            if cpu is not None
        ],
        "exit_code": EXIT_CODES[worst(row.verdict for row in rows)],
    }


def graph_at(path: Path) -> Artifact:
    """The INT8 graph for ONNX Runtime in a run, in the artifact of a quantization, or in the file of one.

    Raises UsageError when there is none.
    """
    folder = path.parent if path.is_file() else path
    folder = folder if (folder / MANIFEST).is_file() or not (folder / _GRAPH).is_dir() else folder / _GRAPH
    found = read_artifact(folder)
    if (found.format, found.precision, found.facts.get("rules")) != (Format.ONNX, Precision.INT8, "onnxruntime"):
        why = f"it is a {found.precision.value} {found.format.value} of stage {found.stage}"
        fix = f"name a run, or its {_GRAPH}; deploykit export MODEL --to onnxruntime --int8 makes one"
        raise UsageError(f"{printable(path)} is no INT8 graph for ONNX Runtime", why=why, fix=fix)
    return found


def exposing(graph: Path, path: Path) -> tuple[Path, str]:
    """Write `graph` to `path` with the integers of the last activation that it quantizes as one more output; returns the name
    of that too. Raises UsageError when it quantizes none.
    """
    model = ir.load(graph)
    for node in reversed(list(model.graph)):
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].const_value is None:
            model.graph.outputs.append(node.outputs[0])
            ir.save(model, path)
            return path, str(node.outputs[0].name)
    raise UsageError(f"{printable(graph)} quantizes no activation")


def apart(actual: Tensors, wanted: Tensors, logits: str, integers: str) -> Apart:
    """Compare the outputs called `logits` (images, classes) and `integers` (images, ...) with others.

    Raises StageError when a logit is not a number.
    """
    mine, theirs = actual[logits], wanted[logits]
    if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        raise StageError("there are NaN or infinite answers, which have no distance")
    steps = np.abs(actual[integers].astype(np.int64) - wanted[integers]).reshape(len(theirs), -1).max(axis=1)
    moved = np.abs(mine.astype(np.float64) - theirs).max(axis=1) > _ROUNDING * np.abs(theirs).max()
    return Apart(
        images=len(theirs),
        differ=int((steps > 0).sum()),
        most_steps=int(steps.max()),
        changed_later=int((moved & (steps == 0)).sum()),
        flips=int((mine.argmax(axis=1) != theirs.argmax(axis=1)).sum()),
    )


def _cpus(names: Sequence[str], graph: Artifact) -> list[Cpu | None]:
    """What to run on, first what the others are compared with; None is this machine."""
    problems = [f"{name!r} is not known; known are {', '.join(CPUS)}" for name in names if name not in CPUS]
    chosen = [CPUS[name] for name in dict.fromkeys(names) if name in CPUS]
    is_for_arm64 = _meant_for(graph) == "arm64"
    fits_here = not runtimes.why_not("onnxruntime", _meant_for(graph))
    if is_for_arm64:
        problems += [f"the graph is for arm64 CPUs, and {cpu.name} is none" for cpu in chosen if cpu.arch != "aarch64"]
    if is_for_arm64 and not fits_here and len(chosen) < 2:
        problems.append("the graph is for arm64 CPUs, and this machine is none: name two of them with --isa")
    if fits_here and runtimes.rules("onnxruntime").weight_bits == 7 and graph.facts.get("weight_bits") != 7:
        problems.append("the graph has 8-bit weights, and this CPU no int8 dot product: its own answers saturate")
    if problems or not names:
        raise UsageError("nothing to compare with", problems=problems, fix="--isa haswell --isa nehalem")
    return [None, *chosen] if fits_here else [*chosen]


def _answers(
    graph: Path,
    source: TensorSpec,
    images: NDArray[np.float32],
    cpus: Sequence[Cpu | None],
    arm_root: Path | None,
    progress: Progress,
) -> dict[str, Answered]:
    """What each of the CPUs answers, by name."""
    found = {}
    for number, cpu in enumerate(cpus):
        progress("parity on other CPUs", number, len(cpus))
        found[_name(cpu)] = emulate.answers(graph, source, images, cpu, arm_root=arm_root)
    return found


def _refuse_other_versions(found: Mapping[str, Answered]) -> None:
    if len({answered.onnxruntime for answered in found.values()}) > 1:
        told = [f"{name}: ONNX Runtime {answered.onnxruntime}" for name, answered in found.items()]
        raise UsageError("these are other versions, not only other CPUs", problems=told, fix="install the same one everywhere")


def _meant_for(graph: Artifact) -> runtimes.Cpu:
    return cast(runtimes.Cpu, graph.facts.get("cpu", "this"))


def _name(cpu: Cpu | None) -> str:
    return "this machine" if cpu is None else cpu.name


def _fed(graph: Artifact, folder: Path | None) -> NDArray[np.float32]:
    """The golden inputs, then the pictures in `folder` as the network wants them."""
    golden = graph.samples().inputs[graph.inputs[0].name]
    if folder is None:
        return golden
    pictures = data.folder(folder, labelled=False)
    return np.concatenate([golden, *pictures.batches(graph.preprocess, 64)])
