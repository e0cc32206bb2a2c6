"""Faults planted into good engines: from which size on each kind is caught and named, and how often good engines alarm.

usage: python benchmarks/planted_faults.py RUN --images PHOTOS [--pool AA_TRIALS.json] [--trials 6] [--clean 200] [--good RUN ...]
           [--output DIR]

RUN is the output folder of `deploykit export cifar_resnet20 --weights FILE --to onnxruntime --to tensorrt --int8 --calibrate
PHOTOS`, PHOTOS a folder with a sub-folder for each class. A fault is planted into a copy of a graph, of an engine or of recorded
processes, and what the command line would say is judged: caught is exit code 3 (or 2: refused before anything runs), named is a
message that says which layer, which classes, which stale engine, which opset, which key of the preprocessing.

Faults with a magnitude are mutations: a layer and a channel drawn at random, the magnitude in steps over three decades. The
detection limit of a kind is one step above the smallest magnitude from which on every trial of one half was caught and named;
the other half says whether that holds. The benchmark's faults are planted into recorded processes of a quiet machine
(`aa_trials.py`): from some process on the machine's clock is slower.

Clean comparisons are of graphs and engines without a fault, of RUN and of those that --good names, made the same way from other
networks; each one is on pictures drawn for it alone, and those of answers have the rule `agreement >= 98 %` beside the gates that
need none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import _faults
import numpy as np
import onnx
from _plot import detection_plot
from _results import write

from deploykit import artifact, build
from deploykit.artifact import read_artifact
from deploykit.benchmark.conditions import Conditions
from deploykit.benchmark.report import BenchmarkReport, Process
from deploykit.bisect import command as bisection
from deploykit.crosscheck import Said, compare_two
from deploykit.errors import DeploykitError
from deploykit.gate import Rule, parse_rule
from deploykit.machine import Machine

IMAGES, SUBSETS = 16, 8
EACH = 10


@dataclass(frozen=True)
class Trial:
    """One planted fault, or none: its kind, magnitude (None: it has none), where it is, what was said and in how many seconds."""

    kind: str
    magnitude: float | None
    where: str
    caught: bool
    named: bool
    said: str
    seconds: float


@dataclass(frozen=True)
class Material:
    """The good ones, folders of pictures to compare on, a place for bad ones, and chance."""

    run: Path
    subsets: tuple[Path, ...]
    scratch: Path
    random: np.random.Generator

    @property
    def images(self) -> Path:
        """A folder of pictures, drawn anew."""
        return self.subsets[self.random.integers(len(self.subsets))]

    def model(self, name: str) -> onnx.ModelProto:
        """A copy of the graph in a folder of the run."""
        return onnx.load(read_artifact(self.run / name).path)

    def stranger(self, model: onnx.ModelProto) -> Path:
        """The graph as a file from elsewhere."""
        path = self.scratch / "faulty.onnx"
        onnx.save(model, path)
        return path

    def artifact(self, name: str, model: onnx.ModelProto | None = None, **changed: Any) -> Path:
        """A copy of an artifact's folder, with another graph or other words in its manifest, sealed again."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.run / name, folder)
        found = read_artifact(folder)
        if model is not None:
            onnx.save(model, found.path)
        artifact.write_manifest(folder, replace(found, **changed))
        return folder

    def any_layer(self, model: onnx.ModelProto) -> onnx.NodeProto:
        """A layer with weights, drawn at random."""
        found = _faults.layers(model)
        return found[self.random.integers(len(found))]

    def quantized_layer(self, model: onnx.ModelProto) -> onnx.NodeProto:
        """The same, of those that are in int8."""
        given = {name: node.op_type for node in model.graph.node for name in node.output}
        found = [node for node in _faults.layers(model) if all(given.get(name) == "DequantizeLinear" for name in node.input[:2])]
        return found[self.random.integers(len(found))]


EXPORT, ENGINE_FP32, ENGINE_INT8 = "export-onnx", "build-onnxruntime-fp32", "build-onnxruntime-int8"
INT8 = ("quantize-onnxruntime", "quantize-tensorrt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--pool", type=Path, help="raw processes of aa_trials.py")
    parser.add_argument("--trials", type=int, default=6, help="of each kind and magnitude; half of them set the limit")
    parser.add_argument("--steps", type=int, default=10, help="magnitudes of each kind, over three decades")
    parser.add_argument("--clean", type=int, default=200)
    parser.add_argument(
        "--good", type=Path, action="append", default=[], metavar="RUN", help="compare these without a fault, too"
    )
    parser.add_argument("--only", action="append", help="these kinds alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pool = None if arguments.pool is None else json.loads(arguments.pool.read_text())["quiet"]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as scratch:
        random = np.random.default_rng(arguments.seed)
        subsets = tuple(_subset(arguments.images, Path(scratch, f"images{i}"), random) for i in range(SUBSETS))
        material = Material(arguments.run.absolute(), subsets, Path(scratch), random)
        kinds = {**OPERATORS, **({"throttled run": lambda _, m: throttled(pool, m, random)} if pool else {})}
        chosen = [kind for kind in (*kinds, *SINGLE) if not arguments.only or kind in arguments.only]
        for kind in chosen:
            if kind in kinds:
                trials += _told(_swept(kind, kinds[kind], material, arguments.steps, arguments.trials))
            else:
                trials += _told(_each(kind, SINGLE[kind], material, arguments.trials))
            # A run of hours that is ended keeps what it found.
            write("planted_faults", {"trials": [asdict(trial) for trial in trials]}, arguments.output)
        runs = [arguments.run.absolute(), *(run.absolute() for run in arguments.good)]
        clean = [] if arguments.only else _told(_clean(material, runs, arguments.images, pool, arguments.clean))
    limits = {kind: _limit([trial for trial in trials if trial.kind == kind]) for kind in kinds}
    alarms = [trial for trial in clean if trial.caught]
    _summary(trials, limits, clean)
    facts = {
        "arguments": {key: getattr(arguments, key) for key in ("trials", "steps", "clean", "seed")},
        "limits": limits,
        "alarms": len(alarms),
        "of": len(clean),
    }
    write(
        "planted_faults", {**facts, "trials": [asdict(t) for t in trials], "clean": [asdict(t) for t in clean]}, arguments.output
    )
    if arguments.output is not None:
        detection_plot(
            {kind: _rates([t for t in trials if t.kind == kind]) for kind in kinds},
            limits,
            arguments.output / "planted_faults.svg",
        )
    missed = [trial for trial in trials if _is_missed(trial, limits)]
    sys.exit(1 if missed or len(alarms) > len(clean) // 100 else 0)


def bisected(a: Path, b: Path, images: Path, *needles: str) -> tuple[bool, bool, str]:
    """What `deploykit bisect A B --data` says: caught, named by one of the needles, and the words."""
    found = bisection.compare(str(a), b, images=images, count=IMAGES)
    culprit = found["culprit"]
    words = [] if culprit is None else [f"{culprit['node']} ({culprit['op']})", *found["hints"]]
    said = "; ".join([*words, *found["preprocessing"], *filter(None, [found["failure"]])])
    return found["exit_code"] == 3, any(needle in said for needle in needles), said


def compared(
    a: str | Path, b: str | Path, images: Path | None, *needles: str, rules: Sequence[Rule] = ()
) -> tuple[bool, bool, str]:
    """The same of `deploykit parity A B`; a side that is refused is caught."""
    try:
        found = compare_two(str(a), str(b), Said(), images=images, rules=rules)
    except DeploykitError as error:
        said = str(error).replace(f"{tempfile.gettempdir()}/", "")
        return True, any(needle in said for needle in needles), said
    bad = [f"{gate['rule']}: {gate['reason']}" for gate in found["gates"] if gate["verdict"] == "fail"]
    return found["exit_code"] == 3, any(needle in text for needle in needles for text in bad), "; ".join(bad)


def weights_in_fp32(at: Material, magnitude: float) -> tuple[str, bool, bool, str]:
    """Noise on one channel of a float graph."""
    model = at.model(EXPORT)
    where = _faults.noisy_channel(model, at.any_layer(model), magnitude, at.random)
    return where, *bisected(at.run / EXPORT, at.stranger(model), at.images, where)


def in_int8(at: Material, plant: Callable[..., str], magnitude: float) -> tuple[str, bool, bool, str]:
    """A fault in one quantized layer, by either runtime's rules, and what bisect says of it."""
    model = at.model(INT8[at.random.integers(2)])
    where = plant(model, at.quantized_layer(model), magnitude, at.random)
    return where, *bisected(at.run / EXPORT, at.stranger(model), at.images, where)


def weights_in_int8(at: Material, magnitude: float) -> tuple[str, bool, bool, str]:
    """Noise on one channel of integers."""
    return in_int8(at, _faults.noisy_channel, magnitude)


def scale_of_weights(at: Material, magnitude: float) -> tuple[str, bool, bool, str]:
    """One channel's scale."""
    return in_int8(at, _faults.wrong_weight_scale, magnitude)


def scale_of_activations(at: Material, magnitude: float) -> tuple[str, bool, bool, str]:
    """The scale of a layer's input, where it is dequantized."""
    return in_int8(at, _faults.wrong_activation_scale, magnitude)


def preprocessing(at: Material, magnitude: float) -> tuple[str, bool, bool, str]:
    """Pictures divided by another deviation inside the graph, INT8 by either rules."""
    model = at.model((EXPORT, *INT8)[at.random.integers(3)])
    _faults.wrong_deviation(model, magnitude)
    return "normalise", *bisected(at.run / EXPORT, at.stranger(model), at.images, "Mul normalise is not in the reference")


def stale_engine(at: Material, magnitude: float) -> tuple[str, bool, bool, str]:
    """The network was trained on after the engine was built: all weights moved by `magnitude` times their size."""
    model = at.model(EXPORT)
    for node in _faults.layers(model):
        _faults.weights_of(model, node, lambda w: w + magnitude * np.std(w) * at.random.standard_normal(w.shape).astype(w.dtype))
    engine = (ENGINE_FP32, ENGINE_INT8)[at.random.integers(2)]
    return engine, *compared(at.stranger(model), at.run / engine, at.images, "stale")


def throttled(
    pool: Sequence[Mapping[str, Any]], magnitude: float | None, random: np.random.Generator
) -> tuple[str, bool, bool, str]:
    """Recorded processes in a new order; from one in the middle half on, everything takes 1 + `magnitude` times as long."""
    report = _report(pool, random, 0.0 if magnitude is None else magnitude)
    said = report.verdict
    return "the clock", bool(report.doubts), "clock changed" in said or "slower from the first third" in said, said


OPERATORS: dict[str, Callable[[Material, float], tuple[str, bool, bool, str]]] = {
    "weights, FP32": weights_in_fp32,
    "weights, INT8": weights_in_int8,
    "scale of weights": scale_of_weights,
    "scale of activations": scale_of_activations,
    "preprocessing in the graph": preprocessing,
    "stale engine": stale_engine,
}
# The smallest magnitude; the largest is a thousand times that. Float against float shows far less than INT8 does.
_SMALLEST = {"weights, FP32": 1e-5, "stale engine": 1e-6}


def preprocessing_in_the_manifest(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """The engine was made for pictures prepared otherwise, and says so."""
    good = read_artifact(at.run / EXPORT).preprocess
    others: tuple[tuple[str, Any], ...] = (
        ("mean", tuple(1.01 * mean for mean in good.mean)),
        ("std", good.std[::-1]),
        ("interpolation", "nearest"),
        ("resize", 40),
    )
    for key, value in others:
        folder = at.artifact(ENGINE_INT8, preprocess=replace(good, **{key: value}))
        yield key, *compared(at.run / EXPORT, folder, at.images, f"{key}: ")


def preprocessing_in_the_weights(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """BGR where RGB is meant."""
    for name in (EXPORT, *INT8):
        model = at.model(name)
        _faults.weights_of(model, _faults.layers(model)[0], lambda weights: weights[:, ::-1])
        yield name, *bisected(at.run / EXPORT, at.stranger(model), at.images, "RGB and BGR were swapped")


def layout(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """Height and width of a kernel swapped, as a converter does that takes HWIO for OIHW; channels last, where first are fed."""
    for name in (EXPORT, *INT8):
        model = at.model(name)
        node = [node for node in _faults.layers(model) if node.op_type == "Conv"][at.random.integers(8)]
        _faults.weights_of(model, node, lambda weights: weights.transpose(0, 1, 3, 2))
        yield (
            str(node.name),
            *bisected(at.run / EXPORT, at.stranger(model), at.images, "height and width of its kernels are swapped"),
        )
    model = at.model(EXPORT)
    source = model.graph.input[0]
    for other in model.graph.node:
        other.input[:] = ["channels first" if name == source.name else name for name in other.input]
    model.graph.node.insert(
        0, onnx.helper.make_node("Transpose", [source.name], ["channels first"], "to NCHW", perm=[0, 3, 1, 2])
    )
    sizes = source.type.tensor_type.shape.dim
    for place, size in enumerate((32, 32, 3), start=1):
        sizes[place].dim_value = size
    yield "NHWC", *compared(at.run / EXPORT, at.stranger(model), None, "--layout B=nhwc")


def class_order(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """Two classes swapped, all moved by one, and names in another order."""
    classes = int(read_artifact(at.run / EXPORT).outputs[0].shape[1])
    for name in (EXPORT, *INT8):
        for how in ("two swapped", "moved by one"):
            order = np.roll(np.arange(classes), 1)
            if how == "two swapped":
                order = np.arange(classes)
                one, other = at.random.choice(classes, 2, replace=False)
                order[[one, other]] = order[[other, one]]
            model = at.model(name)
            _faults.other_rows(model, order)
            yield f"{name}, {how}", *compared(at.run / EXPORT, at.stranger(model), at.images, "in another order")
    names = tuple(f"kind {index}" for index in range(classes))
    sides = at.artifact(EXPORT, classes=names), at.artifact(ENGINE_INT8, classes=(*names[1:], names[0]))
    yield "names", *compared(*sides, at.images, "in another order")


def opset(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """A graph whose opset is not the one it was written in: too old for its operators, too new, or with another meaning."""
    for name, number in ((EXPORT, 6), (INT8[0], 9), (INT8[1], 12), (EXPORT, 99)):
        model = at.model(name)
        model.opset_import[0].version = number
        yield f"{name}, opset {number}", *compared(at.run / EXPORT, at.stranger(model), at.images, "opset")
    paths = {number: at.scratch / f"softmax{number}.onnx" for number in (12, 13)}
    for number, path in paths.items():
        onnx.save(_softmax(number), path)
    yield "softmax, opset 13 for 12", *compared(paths[12], paths[13], None, "opset")


def precision_not_realised(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """Layers that a manifest calls int8 and that lost the Q/DQ of their weights; from one to eight."""
    for count in (1, 2, 4, 8):
        name = INT8[0]
        model = at.model(name)
        quantized = {at.quantized_layer(model).name for _ in range(50)}
        chosen = sorted(quantized)[:: max(1, len(quantized) // count)][:count]
        for node in _faults.layers(model):
            if node.name in chosen:
                _faults.float_weights(model, node)
        graph = read_artifact(at.artifact(name, model))
        folder = at.scratch / "build"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        artifact.write_manifest(folder, build.build(graph, "onnxruntime", folder))
        caught, _, said = compared(graph.folder, folder, at.images)
        yield f"{count} layers", caught, "every layer meant for int8" in said and chosen[0] in said, said


def stale_graph(at: Material) -> Iterator[tuple[str, bool, bool, str]]:
    """The INT8 graph was made again and the engine was not."""
    model = at.model(INT8[0])
    _faults.noisy_channel(model, at.quantized_layer(model), 0.01, at.random)
    yield "another graph", *compared(at.artifact(INT8[0], model), at.run / ENGINE_INT8, at.images, "stale")


SINGLE: dict[str, Callable[[Material], Iterator[tuple[str, bool, bool, str]]]] = {
    "preprocessing in the manifest": preprocessing_in_the_manifest,
    "preprocessing in the weights": preprocessing_in_the_weights,
    "layout": layout,
    "class order": class_order,
    "opset": opset,
    "precision not realised": precision_not_realised,
    "stale engine, by its graph": stale_graph,
}


def magnitudes(kind: str, steps: int) -> list[float]:
    """So many steps over three decades."""
    smallest = _SMALLEST.get(kind, 1e-3)
    return [float(f"{value:.3g}") for value in np.geomspace(smallest, 1000 * smallest, steps)]


def _swept(
    kind: str, plant: Callable[[Material, float], tuple[str, bool, bool, str]], at: Material, steps: int, trials: int
) -> Iterator[Trial]:
    for magnitude in magnitudes(kind, steps):
        for _ in range(trials):
            start = perf_counter()
            where, caught, named, said = plant(at, magnitude)
            yield Trial(kind, magnitude, where, caught, caught and named, said[:600], perf_counter() - start)


def _each(
    kind: str, faults: Callable[[Material], Iterator[tuple[str, bool, bool, str]]], at: Material, trials: int
) -> Iterator[Trial]:
    for _ in range(max(1, trials // 3)):
        start = perf_counter()
        for where, caught, named, said in faults(at):
            yield Trial(kind, None, where, caught, caught and named, said[:600], perf_counter() - start)
            start = perf_counter()


def _clean(
    at: Material, runs: Sequence[Path], images: Path, pool: Sequence[Mapping[str, Any]] | None, count: int
) -> Iterator[Trial]:
    """Comparisons of engines without a fault, each on pictures of its own."""
    rules = (parse_rule("agreement >= 98 %"),)

    def parity(run: Path, pictures: Path, a: str, b: str) -> tuple[bool, bool, str]:
        return compared(run / a, run / b, pictures, rules=rules)

    def bisect(run: Path, pictures: Path, b: str) -> tuple[bool, bool, str]:
        return bisected(run / EXPORT, run / b if b != EXPORT else _copy(run / EXPORT, at.scratch / "clean.onnx"), pictures)

    pairs: list[tuple[str, Callable[[Path, Path], tuple[bool, bool, str]]]] = [
        ("parity, FP32 graph and its engine", partial(parity, a=EXPORT, b=ENGINE_FP32)),
        ("parity, INT8 graph and its engine", partial(parity, a=INT8[0], b=ENGINE_INT8)),
        ("parity, FP32 and INT8 engine", partial(parity, a=EXPORT, b=ENGINE_INT8)),
        ("parity, FP32 and TensorRT's graph", partial(parity, a=EXPORT, b=INT8[1])),
        ("bisect, ONNX Runtime's rules", partial(bisect, b=INT8[0])),
        ("bisect, TensorRT's rules", partial(bisect, b=INT8[1])),
        ("bisect, FP32", partial(bisect, b=EXPORT)),
    ]
    if pool is not None:
        pairs.append(("benchmark", lambda run, pictures: throttled(pool, None, at.random)[1:]))
    for number in range(count):
        kind, ask = pairs[number % len(pairs)]
        run = runs[number // len(pairs) % len(runs)]
        pictures = _subset(images, at.scratch / f"clean{number}", at.random)
        start = perf_counter()
        caught, _, said = ask(run, pictures)
        where = "" if kind == "benchmark" else str(read_artifact(run / EXPORT).facts.get("model", run.name))
        yield Trial(kind, 0.0, where, caught, False, said[:600], perf_counter() - start)
        shutil.rmtree(pictures)


def _copy(graph: Path, path: Path) -> Path:
    """The graph in a folder of a run as a file from elsewhere."""
    shutil.copyfile(read_artifact(graph).path, path)
    return path


def _report(pool: Sequence[Mapping[str, Any]], random: np.random.Generator, slower: float) -> BenchmarkReport:
    """Ten processes of each arm from the pool, in random order, as a run; slower from one of them on."""
    drawn: list[Mapping[str, Any]] = []
    for label, again in (("quick", False), ("quick", True), ("slow", False)):
        arm = [row for row in pool if (row["label"], row["again"]) == (label, again)]
        drawn += [arm[index] for index in random.choice(len(arm), EACH, replace=False)]
    order = random.permutation(len(drawn))
    begin = int(random.integers(len(drawn) // 4, 3 * len(drawn) // 4))
    processes = [_process(drawn[index], 1 + slower if place >= begin else 1.0) for place, index in enumerate(order)]
    return BenchmarkReport(tuple(processes), "quick", {"processes": EACH, "seed": 0}, Machine.probe())


def _process(row: Mapping[str, Any], factor: float) -> Process:
    conditions = {**row["conditions"], "fixed_work_ns": [round(factor * ns) for ns in row["conditions"]["fixed_work_ns"]]}
    latency = (round(factor * row["median_ns"]),)
    rest = {
        key: value
        for key, value in row.items()
        if key not in ("median_ns", "conditions", "latency_ns", "end_to_end_ns", "offline")
    }
    return Process(**rest, latency_ns=latency, end_to_end_ns=latency, offline=(), conditions=Conditions.from_json(conditions))


def _softmax(opset_number: int) -> onnx.ModelProto:
    """A network whose Softmax has no axis: over all but the batch until opset 12, over the last dimension from 13 on."""
    body = "y = Softmax(image) z = GlobalAveragePool(y) logits = Flatten(z)"
    text = (
        f'<ir_version: 7, opset_import: ["" : {opset_number}]> g (float[n, 3, 8, 8] image) => (float[n, 3] logits) {{ {body} }}'
    )
    return onnx.parser.parse_model(text)


def _subset(images: Path, folder: Path, random: np.random.Generator) -> Path:
    """So many pictures drawn from all, in a folder of their own."""
    found = sorted(path for path in images.rglob("*") if path.is_file())
    folder.mkdir()
    for index in random.choice(len(found), IMAGES, replace=False):
        shutil.copyfile(found[index], folder / f"{index:06d}{found[index].suffix}")
    return folder


def _told(trials: Iterator[Trial]) -> list[Trial]:
    found = []
    for trial in trials:
        size = "" if trial.magnitude is None else f"{trial.magnitude:.2g} "
        verdict = "named" if trial.named else "caught" if trial.caught else "silent"
        print(f"{trial.kind}, {size}{trial.where}: {verdict}: {trial.said[:160]}", flush=True)
        found.append(trial)
    return found


def _limit(trials: Sequence[Trial]) -> float | None:
    """One step above the smallest magnitude from which on every trial of the first half is named; None where there is none."""
    half = _halves(trials)[0]
    missed = max((trial.magnitude or 0.0 for trial in half if not trial.named), default=0.0)
    above = sorted({trial.magnitude for trial in half if trial.magnitude is not None and trial.magnitude > missed})
    return above[1] if len(above) > 1 else None


def _halves(trials: Sequence[Trial]) -> tuple[list[Trial], list[Trial]]:
    return list(trials[::2]), list(trials[1::2])


def _is_missed(trial: Trial, limits: Mapping[str, float | None]) -> bool:
    """Whether a fault at or above its kind's limit, or one without a magnitude, was not named."""
    limit = limits.get(trial.kind)
    return not trial.named and (trial.magnitude is None or (limit is not None and trial.magnitude >= limit))


def _rates(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    by = Counter(trial.magnitude for trial in trials)
    named = Counter(trial.magnitude for trial in trials if trial.named)
    return [(size, named[size] / by[size]) for size in sorted(size for size in by if size is not None)]


def _summary(trials: Sequence[Trial], limits: Mapping[str, float | None], clean: Sequence[Trial]) -> None:
    print()
    for kind, limit in limits.items():
        own = [trial for trial in trials if trial.kind == kind]
        if not own:
            continue
        other = [t for t in _halves(own)[1] if limit is not None and t.magnitude is not None and t.magnitude >= limit]
        held = f"{sum(trial.named for trial in other)} of {len(other)} of the other half at or above it are named"
        print(f"{kind}: limit {'none' if limit is None else f'{limit:.2g}'}; {held}")
    for kind in SINGLE:
        own = [trial for trial in trials if trial.kind == kind]
        if own:
            print(f"{kind}: {sum(trial.named for trial in own)} of {len(own)} named, {sum(trial.caught for trial in own)} caught")
    if clean:
        print(f"clean: {sum(trial.caught for trial in clean)} alarms of {len(clean)}")


if __name__ == "__main__":
    main()
