"""Every stage in order, from a recipe to a report: read `run` first.

A stage whose inputs, settings and tool versions have the digest of a finished directory is skipped, so a run that was
killed goes on where it stopped, and running a finished recipe again takes seconds.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from deploykit import benchmark, precision, publish, runtimes, targets, timing, workspace
from deploykit.artifact import MANIFEST, Artifact, Format, Precision
from deploykit.benchmark import judge
from deploykit.benchmark.report import BenchmarkReport
from deploykit.build import Engine, build
from deploykit.bundle import DEVICE_HALF, device_half
from deploykit.bundle.pack import pack
from deploykit.errors import CapabilityError, printable
from deploykit.gate import Verdict
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.progress import Progress, silent
from deploykit.recipe import OFFERS, Recipe
from deploykit.report import device, html
from deploykit.report.result import Stage, result
from deploykit.sources import Sources
from deploykit.targets import jetpack
from deploykit.work import Work

if TYPE_CHECKING:
    from deploykit.finetune.processes import Processes

RESULT, REPORT, TRAINING = "result.json", "report.html", "training.html"
_UNFINISHED_TRAINING = "finetune.epochs"  # what a training that is killed goes on from
_LAYERS = "layers.json"  # beside the benchmark: nanoseconds of each layer, by engine


def run(
    recipe: Recipe, out: Path, *, command: str = "", progress: Progress = silent, clock: Callable[[], float] = perf_counter
) -> Mapping[str, Any]:
    """Do everything that `recipe` asks for in the folder `out`, and return the content of `result.json`.

    `exit_code` in it is 0, 3 when a gate failed, 5 when one cannot tell, and `verdict` says the same in words. `gates` has each
    rule with what was observed, `engines` and `exports` what was made and where, `parity` how far answers are apart,
    `benchmark` the times (None: it was not asked for). `command` is what the page tells people to run again.

    Raises UsageError for input that cannot be used and for an `out` in which another run works, CapabilityError when a required
    engine cannot be built here, StageError when a stage's own check fails, DeploykitError when the file system refuses.
    """
    _require_target(recipe)
    _require_engines(recipe)
    _require_gpu(recipe, out)
    with publish.lock(out), workspace.claimed(out, recipe):
        work = Work(recipe, out, Sources(recipe, progress), progress, clock)

        if recipe.finetune is not None:
            work = replace(work, sources=Sources(recipe, progress, finetuned=_finetune(work)))
        exports = [_export(work, kind) for kind in recipe.export.formats]
        made_of = {OFFERS[name].made_of for name in recipe.build.runtimes}
        models = [found for found in exports if found.format.value in made_of]
        portable = next((found for found in exports if found.format is Format.ONNX), None)
        if portable is not None and recipe.quantize is not None:
            models += precision.quantize(work, portable)
        models = [precision.typed(work, model) for model in models]
        linted = precision.lint(recipe, models)
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

    Returns plain JSON values. The recipe has to have a `[finetune]` table. Of several `processes` this is the first, which alone
    writes; the others `assist`. Raises what `run` raises.
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


@contextmanager
def _rarely_collecting() -> Iterator[None]:
    """With Python's cyclic collector at work after 100,000 new objects and not after 700: torch's exporter makes millions, few of
    which can go before it is done. For one stage alone, because onnx_ir's graphs are circles of few objects and much memory."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _export(work: Work, kind: str) -> Artifact:
    recipe, settings = work.recipe, work.recipe.export

    @_rarely_collecting()
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


def _build(work: Work, model: Artifact) -> list[Engine]:
    """The engines of one model: an INT8 graph is for the runtime whose rules it follows, a float file for each that takes it."""
    takers = [name for name in work.recipe.build.runtimes if OFFERS[name].made_of == model.format.value]
    names = [str(model.facts["rules"])] if model.precision is Precision.INT8 else takers
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
        shutil.copytree(engine.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
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
