"""Every stage in order, from a recipe to a report: read `run` first.

A stage whose inputs, settings and tool versions have the digest of a finished directory is skipped, so a run that was
killed goes on where it stopped, and running a finished recipe again takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from deploykit import artifact, benchmark, publish, runtimes, scenes, targets, timing, workspace
from deploykit.artifact import Artifact, Format, Precision
from deploykit.benchmark import judge
from deploykit.benchmark.report import BenchmarkReport
from deploykit.build import Engine, build
from deploykit.bundle import DEVICE_HALF, device_half
from deploykit.bundle.pack import pack
from deploykit.data import Images, calibration_subset
from deploykit.errors import CapabilityError, StageError, printable
from deploykit.gate import Verdict
from deploykit.jsonable import digest, to_json
from deploykit.machine import Machine, installed_version
from deploykit.progress import Progress, silent
from deploykit.recipe import QuantizeTable, Recipe
from deploykit.report import device, html
from deploykit.report.result import Stage, result
from deploykit.sources import Sources
from deploykit.targets import jetpack

if TYPE_CHECKING:
    from deploykit.finetune.processes import Processes

RESULT, REPORT, TRAINING = "result.json", "report.html", "training.html"
_TOOLS = (
    *("numpy", "pillow", "scikit-learn", "safetensors", "torch", "torchvision", "timm"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"),
)
_UNFINISHED_TRAINING = "finetune.epochs"  # what a training that is killed goes on from
_LAYERS = "layers.json"  # beside the benchmark: nanoseconds of each layer, by engine
_PROBED = 32  # calibration images on which weights are rounded and the noise of INT8 is measured


def run(
    recipe: Recipe, out: Path, *, command: str = "", progress: Progress = silent, clock: Callable[[], float] = perf_counter
) -> Mapping[str, Any]:
    """Do everything that `recipe` asks for in the folder `out`, and return the content of `result.json`.

    Raises UsageError for input that cannot be used, CapabilityError when a required engine cannot be built here,
    StageError when a stage's own check fails. A gate that fails is a result: see its `exit_code`.
    """
    _require_target(recipe)
    _require_engines(recipe)
    _require_gpu(recipe, out)
    with publish.lock(out), workspace.claimed(out, recipe):
        work = Work(recipe, out, Sources(recipe, progress), progress, clock)

        if recipe.finetune is not None:
            work = replace(work, sources=Sources(recipe, progress, finetuned=_finetune(work)))
        exports = [_export(work, kind) for kind in recipe.export.formats]
        portable = next((found for found in exports if found.format is Format.ONNX), None)
        models = [] if portable is None or not recipe.build.runtimes else [portable]
        if portable is not None and recipe.quantize is not None:
            models += _quantize(work, portable)
        models = [_half(work, model) if recipe.build.float_type == "fp16" else model for model in models]
        linted = _lint(recipe, models)
        engines = [engine for model in models for engine in _build(work, model)]
        compared = _verify(work, exports, engines)
        timed, layer_ns = _benchmark(work, engines)

        measured = None if timed is None else timing.of_run(timed, engines)
        rules_here = [rule for rule in recipe.rules if rule not in recipe.left_to_the_device]
        gates = [*compared["gates"], *map(to_json, timing.judge_run(rules_here, engines, timed))]
        chosen = None if recipe.build.keep == "all" else _fastest(work, engines, timed, gates)
        found = result(
            work.made,
            work.stages,
            engines,
            compared,
            measured,
            gates,
            layer_ns,
            fastest=chosen,
            recipe=recipe,
            command=command,
        )
        found["out"], found["report"] = printable(out), printable(out / REPORT)
        found["device"] = left = device.left(recipe, engines, out, linted, exit_code=found["exit_code"])
        publish.write_file(out / RESULT, json.dumps(found, indent=1).encode())
        publish.write_file(out / REPORT, html.render(found).encode())
        if left is not None and left["bundle"]:
            pack(out, out / device.bundle_name(recipe), release=0)
            publish.write_file(out / DEVICE_HALF, device_half.zipapp())
        return found


def train(
    recipe: Recipe,
    out: Path,
    *,
    progress: Progress = silent,
    clock: Callable[[], float] = perf_counter,
    processes: Processes | None = None,
) -> Mapping[str, Any]:
    """Only the training that `recipe` asks for, in the folder `out`, with a page of its own; `run` goes on from there.

    Of several `processes` this is the first, which alone writes; the others `assist`. Raises what `run` raises.
    """
    from deploykit.report import training

    _require_gpu(recipe, out)
    with publish.lock(out), workspace.claimed(out, recipe):
        made = _finetune(Work(recipe, out, Sources(recipe, progress), progress, clock), processes)
        found = training.told(made, printable(out), printable(out / TRAINING))
        publish.write_file(out / TRAINING, training.render(found, made).encode())
        return found


def assist(recipe: Recipe, out: Path, processes: Processes) -> None:
    """A further process of `train`: takes its share of the training, if there is one to do, and writes nothing.

    Raises what `train` raises.
    """
    from deploykit.finetune import assist

    assert recipe.finetune is not None
    if processes.told(None):
        sources = Sources(recipe)
        images = (sources.train, sources.held_out)
        assist(sources.untrained, *images, recipe.finetune, scratch=out / _UNFINISHED_TRAINING, processes=processes)


@dataclass
class Work:
    """One run: what its stages read, where they write, and what became of each."""

    recipe: Recipe
    out: Path
    sources: Sources
    progress: Progress
    clock: Callable[[], float]
    stages: list[Stage] = field(default_factory=list)
    made: dict[str, Artifact] = field(default_factory=dict)

    @cached_property
    def tools(self) -> Mapping[str, str | None]:
        """What makes the stages: versions, and the digest of this package's own code, which changes between versions."""
        package = Path(__file__).parent
        code = [artifact.digest_file(path) for path in sorted(package.rglob("*.py"))]
        return {"code": digest(code), **{tool: installed_version(tool) for tool in _TOOLS}}

    def stage(
        self,
        name: str,
        make: Callable[[Path], Artifact],
        *,
        settings: object = None,
        parents: Sequence[str],
        summary: Callable[[Artifact], str],
    ) -> Artifact:
        """The artifact of one stage: the finished one if it was made from the same, else one made now."""
        start = self.clock()
        key = digest({"stage": name, "settings": to_json(settings), "parents": list(parents), "tools": self.tools})
        final = self.out / name
        found = artifact.find(final, key)
        made = self.made[name] = found if found is not None else artifact.make(final, key, make)
        status = "done" if found is None else "skipped"
        self.stages.append(Stage(name, status, self.clock() - start, name, summary(made)))
        return made


def _finetune(work: Work, processes: Processes | None = None) -> Artifact:
    settings = work.recipe.finetune
    assert settings is not None

    def make(folder: Path) -> Artifact:
        from deploykit.finetune import finetune
        from deploykit.finetune.lesson import device_of

        device_of(settings, *([] if processes is None else [processes]))
        sources = work.sources
        sources.check()
        images = (sources.train, sources.held_out)
        if processes is not None:
            started.append(processes.told(True))
        train = partial(finetune, sources.untrained, *images, settings, folder, scratch=scratch, progress=work.progress)
        return train() if processes is None else train(processes=processes)

    scratch = work.out / _UNFINISHED_TRAINING
    started: list[bool] = []
    made = work.stage(
        "finetune",
        make,
        settings=settings,
        parents=[work.sources.training_digest],
        summary=lambda made: f"best accuracy on held-out images {100 * cast(float, made.facts['best_val_accuracy']):.1f} %",
    )
    if processes is not None and not started:
        processes.told(False)  # there is nothing to train
    publish.remove(scratch)  # the stage is complete on disk
    return made


def _export(work: Work, kind: str) -> Artifact:
    recipe, settings = work.recipe, work.recipe.export

    def make(folder: Path) -> Artifact:
        from deploykit import export
        from deploykit.models.tasks import golden_samples

        work.sources.check()
        model, images = work.sources.model, work.sources.evaluation
        some = images.take(range(min(golden_samples(model, settings.samples), len(images))))
        golden = next(some.batches(replace(model.preprocess, feeds=settings.input), len(some)))
        write = export.onnx_model if kind == "onnx" else export.torchscript_model
        try:
            made = write(model, golden, some.labels, settings, folder)
        except export.NoExporterError as error:
            image = next(some.batches(model.preprocess, 1))
            raise export.reproduce(
                error, model, image, (recipe.model, recipe.preprocess), settings, work.out / "reproduction"
            ) from error
        inputs = {"images": images.origin, "skipped": list(images.skipped)}
        return replace(made, facts={**made.facts, **inputs})

    return work.stage(
        f"export-{kind}",
        make,
        settings=settings,
        parents=[work.sources.digest],
        summary=lambda made: f"{kind}, max|d| / max|y| against PyTorch {cast(float, made.facts['relative_error']):.1e}",
    )


def _quantize(work: Work, model: Artifact) -> list[Artifact]:
    """Equalize and calibrate once, then one Q/DQ file for the rules of each runtime."""
    settings = work.recipe.quantize
    assert settings is not None
    model = _equalize(work, model) if settings.equalize else model
    heads = cast(Sequence[str], model.facts.get("heads", ()))
    settings = replace(settings, float_layers=(*settings.float_layers, *heads))
    observations = _calibrate(work, model)
    return [_quantize_for(work, model, observations, settings, runtime) for runtime in work.recipe.build.runtimes]


def _calibrate(work: Work, model: Artifact) -> Artifact:
    def make(folder: Path) -> Artifact:
        from deploykit import quantize

        images = work.sources.calibration
        assert images is not None
        how = model.preprocess
        made = quantize.calibrate(
            model,
            lambda size: images.batches(how, size),
            folder,
            images=len(images),
            names=images.names,
            progress=work.progress,
        )
        return replace(
            made,
            facts={
                **made.facts,
                "skipped": list(images.skipped),
                "from": images.origin,
                "warnings": [*cast(list[str], made.facts["warnings"]), *_doubts(images, work.recipe)],
            },
        )

    return work.stage(
        "calibrate",
        make,
        parents=[model.identity, work.sources.digest],
        summary=lambda made: f"{made.facts['tensors']} activations over {made.facts['images']} images",
    )


def _quantize_for(work: Work, model: Artifact, observations: Artifact, settings: QuantizeTable, runtime: str) -> Artifact:
    """The Q/DQ file for one runtime's rules, measured and judged as the recipe asks."""
    recipe = work.recipe
    is_timed = settings.speed and settings.cpu == "this" and _is_built_here(recipe, runtime)

    def make(folder: Path) -> Artifact:
        from deploykit import quantize
        from deploykit.stopwatch import stopwatch

        kind = scenes.kind_of(model.outputs)
        # Boxes come and go, so noise at them is no measure.
        decides = kind != "boxes" and (recipe.model.weights != "none" or recipe.finetune is not None)
        is_judged = decides and kind is None and any(not rule.is_of_time for rule in recipe.rules)
        timed = stopwatch(runtime, recipe.build.threads, progress=work.progress) if is_timed else nullcontext()
        with timed as watch:
            return quantize.quantize(
                model,
                observations,
                settings,
                runtime,
                folder,
                images=(lambda: _probes(work, model)) if decides else None,
                judge=_judge(work, model, runtime) if is_judged else None,
                stopwatch=watch,
                progress=work.progress,
            )

    here = [Machine.probe().identity, recipe.build.threads] if is_timed else []
    return work.stage(
        f"quantize-{runtime}",
        make,
        # The rules too, for "this" CPU may be another next time.
        settings=[settings, runtimes.rules(runtime, settings.cpu), recipe.gate, *here],
        parents=[model.identity, observations.identity, *([work.sources.digest] if recipe.gate else [])],
        summary=_quantized,
    )


def _probes(work: Work, model: Artifact) -> NDArray[np.float32]:
    """A few calibration images, spread over the whole set: classes and days lie together in a folder."""
    images = work.sources.calibration
    assert images is not None
    some = calibration_subset(images, _PROBED, work.recipe.data.seed)
    return next(some.batches(model.preprocess, _PROBED))


def _is_built_here(recipe: Recipe, runtime: str) -> bool:
    """Whether this machine builds INT8 engines for that runtime, and the recipe wants them."""
    return recipe.build.engine != "skip" and not runtimes.why_not(
        runtime, "this" if recipe.quantize is None else recipe.quantize.cpu
    )


def _judge(work: Work, model: Artifact, runtime: str) -> Callable[[Artifact], Verdict]:
    """The gate's rules about answers, for graphs that have no engine yet."""
    from deploykit import verify
    from deploykit.runtimes import onnxruntime

    images, rules = work.sources.evaluation, [rule for rule in work.recipe.rules if not rule.is_of_time]
    wanted = verify.graph_answers(onnxruntime.reference(model.path, optimise=True), model, images, progress=work.progress)
    return lambda candidate: verify.judge_graph(candidate, runtime, wanted, images, rules, progress=work.progress)


def _quantized(made: Artifact) -> str:
    found = cast(Mapping[str, Any], made.facts["search"])
    summary = f"{len(cast(list[str], made.facts['int8_layers']))} layers between Q/DQ"
    if made.facts["weight_bits"] != 8:
        summary += f", {made.facts['weight_bits']}-bit weights"
    slow = [name for name, why in cast(Mapping[str, str], made.facts["float_layers"]).items() if why == runtimes.SLOW]
    if slow:
        summary += f", {len(slow)} in float because that is faster here"
    if found["after_db"] is None:
        return f"{summary}; random weights: no search for sensitive layers"
    summary += f", SQNR {found['after_db']:.1f} dB"
    if found["kept"]:
        summary += f" ({found['before_db']:.1f} with all in int8; kept in float: {len(found['kept'])})"
    return summary


def _equalize(work: Work, model: Artifact) -> Artifact:
    """The same float network, channels of very different ranges scaled alike where that pays."""

    def make(folder: Path) -> Artifact:
        from deploykit.quantize import correct

        images = work.sources.calibration
        assert images is not None
        some = calibration_subset(images, correct.IMAGES, work.recipe.data.seed)
        return correct.equalize(
            model, lambda size: some.batches(model.preprocess, size), folder, names=some.names, progress=work.progress
        )

    return work.stage("equalize", make, parents=[model.identity, work.sources.digest], summary=_equalized)


def _equalized(made: Artifact) -> str:
    done = cast(Sequence[Mapping[str, float]], made.facts["equalized"])
    if not done:
        return f"not worth it for any of {made.facts['pairs']} pairs of layers: the file is the same"
    return f"{len(done)} of {made.facts['pairs']} pairs of layers, up to {max(pair['gain_db'] for pair in done):.0f} dB predicted"


def _half(work: Work, model: Artifact) -> Artifact:
    """The same graph with everything that is float in half precision."""

    def make(folder: Path) -> Artifact:
        from deploykit.quantize import half

        pictures, how = work.sources.calibration, model.preprocess
        return half.to_fp16(
            model,
            folder,
            float32=work.recipe.build.float32,
            batches=None if pictures is None else lambda size: pictures.batches(how, size),
            images=0 if pictures is None else len(pictures),
            progress=work.progress,
        )

    return work.stage(
        f"{model.folder.name}-fp16",
        make,
        parents=[model.identity, work.sources.digest],
        settings=list(work.recipe.build.float32),
        summary=_halved,
    )


def _halved(made: Artifact) -> str:
    facts, kept = made.facts, len(cast(Sequence[str], made.facts["float32_nodes"]))
    told = f"{facts['tensors']} float tensors in fp16, {facts['underflows']} weights become zero"
    if seen := cast(Mapping[str, Any], facts["activations"]):
        told += f", and so do {seen['lost']:,} of {seen['values']:,} activations of {seen['images']} images"
        told += f"; the largest is {seen['largest']:.4g}"
    return f"{told}, {kept} nodes stay in float32" if kept else told


def _lint(recipe: Recipe, models: Sequence[Artifact]) -> dict[str, dict[str, int]]:
    """By the name of each stage whose graph TensorRT gets: how often it breaks which of TensorRT's rules.

    Raises StageError when TensorRT would refuse one of them, or compute something else: we wrote it.
    """
    if "tensorrt" not in recipe.build.runtimes:
        return {}
    from deploykit.quantize import lint

    found: dict[str, dict[str, int]] = {}
    for model in models:
        if model.precision is Precision.INT8 and model.facts["rules"] != "tensorrt":
            continue
        findings = lint.lint(model.path, "tensorrt") if lint.has_rules_for(model.path, "tensorrt") else ()
        if lint.is_fatal(findings):
            raise StageError(
                f"TensorRT would not take the graph {model.folder.name}",
                problems=[f"{finding.node}: {finding.what} ({finding.rule})" for finding in findings],
                fix=f"deploykit inspect {printable(model.path)} --rules tensorrt; please report it",
            )
        found[model.folder.name] = dict(Counter(finding.rule for finding in findings))
    return found


def _doubts(images: Images, recipe: Recipe) -> list[str]:
    """What the recipe asked of the calibration images and did not get; `quantize.calibrate` doubts the images themselves."""
    found = []
    if len(images) < recipe.data.calibration_images and recipe.data.name is None:
        found.append(f"{recipe.data.calibration_images} calibration images were asked for, the folder has {len(images)}")
    return found


def _build(work: Work, model: Artifact) -> list[Engine]:
    """The engines of one model: an INT8 graph is for the runtime whose rules it follows, a float graph for each."""
    settings = work.recipe.build
    names = [str(model.facts["rules"])] if model.precision is Precision.INT8 else list(settings.runtimes)
    return [_build_for(work, model, name) for name in names]


def _build_for(work: Work, model: Artifact, runtime: str) -> Engine:
    settings = work.recipe.build
    name = f"build-{runtime}-{model.precision.value}"
    why = 'the recipe says build.engine = "skip"' if settings.engine == "skip" else runtimes.why_not(runtime, _cpu_of(model))
    if why:
        work.stages.append(Stage(name, "not built", 0.0, "", why))
        return Engine(runtime, model, None, why, None)
    asked = {"tensorrt": to_json(work.recipe.tensorrt)} if runtime == "tensorrt" else {}
    wanted = replace(model, facts={**model.facts, **asked})
    built = work.stage(
        name,
        lambda folder: build(wanted, runtime, folder, threads=settings.threads, progress=work.progress),
        settings=[settings.threads, Machine.probe().identity, *asked.values()],
        parents=[model.identity],
        summary=lambda made: f"{made.path.stat().st_size / 1e6:.2f} MB",
    )
    return Engine.of(runtime, model, built)


def _cpu_of(model: Artifact) -> runtimes.Cpu:
    """The CPUs that a graph was quantized for; a float graph is for all of them."""
    return cast(runtimes.Cpu, model.facts["cpu"]) if model.precision is Precision.INT8 else "this"


def _verify(work: Work, exports: Sequence[Artifact], engines: Sequence[Engine]) -> Mapping[str, Any]:
    """Everything that was made against FP32 PyTorch on the same images, and the gates' verdicts."""

    def make(folder: Path) -> Artifact:
        from deploykit.verify import verify

        sources = work.sources
        rules = [rule for rule in work.recipe.rules if not rule.is_of_time]
        found = verify(sources.model, sources.evaluation, exports, engines, rules, progress=work.progress)
        (folder / "parity.json").write_text(json.dumps(found))
        return _report_artifact(exports[0], "parity", found["summary"], folder)

    made = work.stage(
        "parity",
        make,
        settings=work.recipe.gate,
        parents=[work.sources.digest, *_keys(exports, engines)],
        summary=lambda made: str(made.facts["summary"]),
    )
    return cast(Mapping[str, Any], json.loads(made.path.read_text()))


def _benchmark(work: Work, engines: Sequence[Engine]) -> tuple[BenchmarkReport | None, Mapping[str, Mapping[str, float]]]:
    """Latency and throughput of every engine that could be built here, and the time of their layers, where they tell it."""
    settings = work.recipe.benchmark
    built = {engine.label: engine.built for engine in engines if engine.built is not None}
    if not settings.enabled or not built:
        return None, {}

    def make(folder: Path) -> Artifact:
        report = benchmark.benchmark(built, **settings.measured(), progress=work.progress)
        judge.save(report, folder / "benchmark.json")
        pairs = {engine.label: (engine.built, engine.model) for engine in engines if engine.built is not None}
        publish.write_file(folder / _LAYERS, json.dumps(benchmark.layer_times(pairs)).encode())
        summary = "; ".join(f"{engine.label} {engine.median_ns / 1e6:.3f} ms" for engine in report.engines)
        return _report_artifact(next(iter(built.values())), "benchmark", f"{summary}; {report.verdict}", folder)

    made = work.stage(
        "benchmark",
        make,
        settings=[settings, Machine.probe().identity, _LAYERS],
        parents=[engine.identity for engine in built.values()],
        summary=lambda made: str(made.facts["summary"]),
    )
    return judge.load(made.path), json.loads((made.folder / _LAYERS).read_bytes())


def _fastest(
    work: Work, engines: Sequence[Engine], timed: BenchmarkReport | None, gates: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Copy the engine with the lowest median latency to a folder of its own; None, and no folder, where none may be chosen."""
    failed = {label for gate in gates if gate["verdict"] == Verdict.FAIL.value for label in [str(gate["rule"]).partition(":")[0]]}
    able = {engine.label: engine.built for engine in engines if engine.built is not None and engine.label not in failed}
    if timed is None or not able:
        publish.remove(work.out / "fastest")  # an earlier one, whose like fails now
        why = "no engine could be built here" if timed is None else "every engine failed a gate"
        work.stages.append(Stage("fastest", "not built", 0.0, "", why))
        return None
    ranking = sorted((timed.engine(label).median_ns, label) for label in able)
    (_, winner), others = ranking[0], [label for _, label in ranking[1:]]
    engine = able[winner]

    def copied(folder: Path) -> Artifact:
        shutil.copytree(engine.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(artifact.MANIFEST))
        return replace(engine, path=folder / engine.path.name)

    made = work.stage("fastest", copied, parents=[engine.identity], summary=lambda _: winner)
    beaten = {label: timing.ratio(label, timed.difference(winner, label), timed.doubts) for label in others}
    return {"label": winner, "path": f"{made.folder.name}/{made.path.name}", "latency_ns": ranking[0][0], "over": beaten}


def _report_artifact(about: Artifact, stage: str, summary: str, folder: Path) -> Artifact:
    """A stage's findings as an artifact: one JSON file, which is written already, and the line that sums it up."""
    path, facts = folder / f"{stage}.json", {"summary": summary}
    return replace(about, path=path, stage=stage, format=Format.REPORT, parents=(about.sha256,), settings={}, facts=facts)


def _keys(exports: Sequence[Artifact], engines: Sequence[Engine]) -> list[str]:
    return [found.identity for found in (*exports, *(engine.built or engine.model for engine in engines))]


def _require_target(recipe: Recipe) -> None:
    """Say it before the work and not on the device: the board that the engine is for cannot build or run it."""
    if recipe.build.target is None:
        return
    board = targets.find(recipe.build.target)
    if "tensorrt" not in recipe.build.runtimes:
        return
    problems = jetpack.refusals(
        board,
        int8=recipe.quantize is not None,
        float_type=recipe.build.float_type,
        dla_core=recipe.tensorrt.dla_core,
        opset=recipe.export.opset,
        jetpack=recipe.build.jetpack,
    )
    if problems:
        raise CapabilityError(f"{board.title} cannot run what the recipe asks for", problems=problems)


def _require_engines(recipe: Recipe) -> None:
    """Say it before the work and not after: this machine cannot build what is required."""
    if recipe.build.engine != "require":
        return
    for name in recipe.build.runtimes:
        why = runtimes.why_not(name, "this" if recipe.quantize is None else recipe.quantize.cpu)
        if why:
            fix = 'build.engine = "auto" (--engine auto) makes everything short of the engine'
            raise CapabilityError(f"a {name} engine is required and cannot be built here", why=why, fix=fix)


def _require_gpu(recipe: Recipe, out: Path) -> None:
    """Say it before a picture is read: the GPU that training asks for is not here. One that is done already needs none."""
    if recipe.finetune is None or recipe.finetune.device != "cuda" or (out / "finetune").is_dir():
        return
    from deploykit.finetune.lesson import device_of

    device_of(recipe.finetune)
