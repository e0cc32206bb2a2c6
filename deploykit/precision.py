"""The stages that give a graph another precision: calibration and INT8 for each runtime's rules, FP16, and TensorRT's linter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from deploykit import runtimes, scenes
from deploykit.artifact import Artifact, Format, Precision
from deploykit.data import Images, calibration_subset
from deploykit.errors import StageError, printable
from deploykit.gate import Verdict
from deploykit.machine import Machine
from deploykit.recipe import QuantizeTable, Recipe
from deploykit.work import Work

_PROBED = 32  # calibration images on which weights are rounded and the noise of INT8 is measured


def quantize(work: Work, model: Artifact) -> list[Artifact]:
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
        from deploykit import quantize as quantization

        images = work.sources.calibration
        assert images is not None
        how = model.preprocess
        made = quantization.calibrate(
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
        from deploykit import quantize as quantization
        from deploykit.stopwatch import stopwatch

        kind = scenes.kind_of(model.outputs)
        # Boxes come and go, so noise at them is no measure.
        decides = kind != "boxes" and (recipe.model.weights != "none" or recipe.finetune is not None)
        is_judged = decides and kind is None and any(not rule.is_of_time for rule in recipe.rules)
        timed = stopwatch(runtime, recipe.build.threads, progress=work.progress) if is_timed else nullcontext()
        with timed as watch:
            return quantization.quantize(
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


def typed(work: Work, model: Artifact) -> Artifact:
    """The model in the recipe's float type. FP16 is typed into an ONNX file; the rest a runtime makes of the same file."""
    asked = Precision(work.recipe.build.float_type)
    if asked is Precision.FP16 and model.format is Format.ONNX:
        return half(work, model)
    return model if model.precision is Precision.INT8 else replace(model, precision=asked)


def half(work: Work, model: Artifact) -> Artifact:
    """The same graph with everything that is float in half precision."""

    def make(folder: Path) -> Artifact:
        from deploykit.quantize import half as halving

        pictures, how = work.sources.calibration, model.preprocess
        return halving.to_fp16(
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


def lint(recipe: Recipe, models: Sequence[Artifact]) -> dict[str, dict[str, int]]:
    """By the name of each stage whose graph TensorRT gets: how often it breaks which of TensorRT's rules.

    Raises StageError when TensorRT would refuse one of them, or compute something else: we wrote it.
    """
    if "tensorrt" not in recipe.build.runtimes:
        return {}
    from deploykit.quantize import lint as linter

    found: dict[str, dict[str, int]] = {}
    for model in models:
        is_others = model.precision is Precision.INT8 and model.facts["rules"] != "tensorrt"
        if is_others or model.format is not Format.ONNX:
            continue
        findings = linter.lint(model.path, "tensorrt") if linter.has_rules_for(model.path, "tensorrt") else ()
        if linter.is_fatal(findings):
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
