"""What each key of a recipe allows, but all of them together do not mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from deploykit.gate import Rule, parse_rule
from deploykit.recipe.tables import OFFERS, FinetuneTable, Recipe

_OF_A_GPU = frozenset({"tensorrt", "onnxruntime_cuda", "torchscript_cuda"})


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Each as a sentence that names the keys and what to do."""
    for text in recipe.gate:
        try:
            rule = parse_rule(text)
        except ValueError as error:
            yield f"gate: {error}"
            continue
        if rule.is_of_time:
            yield from _contradictions_of_time(recipe, rule)
            continue
        if recipe.quantize is None:
            yield f"gate {text!r} compares INT8 with FP32, but there is no [quantize] table"
        if recipe.data.validate is None and recipe.data.name is None:
            yield f"gate {text!r} needs labelled images that were not calibrated on: set data.validate (--validate DIR)"
        if recipe.model.weights == "none" and recipe.finetune is None:
            yield f'gate {text!r} judges decisions, and random weights (model.weights = "none") decide nothing'
    if Path(recipe.name).name != recipe.name or recipe.name == "..":
        yield f"name = {recipe.name!r} cannot be the name of a folder"
    if recipe.quantize is not None and recipe.quantize.percentile is not None and recipe.quantize.method != "percentile":
        yield f"quantize.percentile means nothing with method = {recipe.quantize.method!r}: leave it out or change the method"
    if recipe.finetune is not None and recipe.data.name is None and recipe.data.train is None:
        yield "[finetune] needs training images: set data.train or data.name"
    if recipe.finetune is not None:
        yield from _contradictions_of_training(recipe.finetune)
    if recipe.data.name not in (None, "digits") and recipe.data.root is None:
        yield f"data.name = {recipe.data.name!r} lies in a folder: set data.root (--root DIR)"
    if recipe.data.root is not None and recipe.data.name in (None, "digits"):
        yield "data.root is the folder of a data set by name: set data.name to it, or leave it out"
    if recipe.data.held_out is not None and recipe.data.train is None:
        yield "data.held_out is for images beside those of data.train: set that too, or leave it out"
    trains = recipe.finetune is not None and recipe.data.train is not None  # then training images are calibrated on
    if recipe.quantize is not None and recipe.data.name is None and recipe.data.calibrate is None and not trains:
        yield "[quantize] needs calibration images: set data.calibrate (--calibrate DIR) or data.name"
    if recipe.quantize is not None and not recipe.build.runtimes:
        yield "[quantize] follows the rules of a runtime: set build.runtimes (INT8 means another graph for each)"
    if recipe.quantize is not None and recipe.quantize.cpu != "this" and list(recipe.build.runtimes) == ["tensorrt"]:
        yield f"quantize.cpu = {recipe.quantize.cpu!r} means nothing for TensorRT, which runs on a GPU: leave it out"
    yield from _not_offered(recipe)
    if recipe.build.float32 and (recipe.build.float_type != "fp16" or all(made != "onnx" for made in _made_of(recipe))):
        yield (
            'build.float32 names what stays in float32 in an ONNX graph with build.float_type = "fp16" (--fp16), and all of it '
            "does without"
        )
    if recipe.build.float_type in ("fp16", "bf16") and recipe.export.input != "float":
        yield (
            f"export.input = {recipe.export.input!r} with build.float_type = {recipe.build.float_type!r}: scaling the bytes "
            "would be rounded to half precision, and it is to be exact; feed floats, or leave float_type at fp32"
        )
    yield from _contradictions_of_tensorrt(recipe)
    if recipe.export.size == "dynamic" and "openvino" in recipe.build.runtimes:
        yield 'export.size = "dynamic" with build.runtimes "openvino": its engines are compiled for the sizes of one input'
    if recipe.export.cross_check and recipe.export.exporter != "auto":
        yield f"export.cross_check runs both exporters, and export.exporter = {recipe.export.exporter!r} asks for one"
    if recipe.export.cross_check and "onnx" not in recipe.export.formats:
        yield 'export.cross_check is about ONNX: add "onnx" to export.formats'
    if recipe.build.keep == "fastest" and not recipe.benchmark.enabled:
        yield 'build.keep = "fastest" needs a benchmark, and benchmark.enabled is false'
    if recipe.build.keep == "fastest" and (recipe.build.engine == "skip" or not {*recipe.build.runtimes} - _OF_A_GPU):
        yield 'build.keep = "fastest" chooses among CPU engines: set build.runtimes, build.engine "auto" or "require"'
    if recipe.data.name is not None:
        for key in ("train", "calibrate", "validate"):
            if getattr(recipe.data, key) is not None:
                yield f"data.name = {recipe.data.name!r} brings its own parts: remove data.{key}"
    if not recipe.export.formats:
        yield "export.formats is empty: name onnx, torchscript or both"
    for key, names in (("export.formats", recipe.export.formats), ("build.runtimes", recipe.build.runtimes)):
        if len(set(names)) < len(names):
            yield f"{key} = {list(names)} names one of them twice"
    channels, statistics = recipe.preprocess.channels, ("mean", "std")
    for key in statistics:
        values = getattr(recipe.preprocess, key)
        if values is not None and channels is not None and len(values) != len(channels):
            yield f"preprocess.{key} has {len(values)} values for {len(channels)} channels ({channels})"


def _made_of(recipe: Recipe) -> list[str]:
    return [OFFERS[name].made_of for name in recipe.build.runtimes]


def _not_offered(recipe: Recipe) -> Iterator[str]:
    """What the runtimes of a recipe do not have: its float type, INT8, or the file that their engines are built from."""
    asked = recipe.build.float_type
    for made_of in sorted(set(_made_of(recipe)) - set(recipe.export.formats)):
        names = [name for name in recipe.build.runtimes if OFFERS[name].made_of == made_of]
        title = {"onnx": "ONNX", "torchscript": "TorchScript"}[made_of]
        yield f'build.runtimes = {names} are built from {title}: add "{made_of}" to export.formats'
    for name in recipe.build.runtimes:
        offer = OFFERS[name]
        if asked not in offer.floats:
            yield (
                f'build.float_type = "{asked}" (--{asked}) with build.runtimes "{name}", which has '
                f"{' and '.join(offer.floats)}: {offer.no_other}"
            )
        if recipe.quantize is not None and offer.no_int8:
            yield f'[quantize] (--int8) with build.runtimes "{name}": it has no INT8, for {offer.no_int8}'
    if not recipe.build.runtimes and asked != "fp32":
        yield f'build.float_type = "{asked}" (--{asked}) is of engines, and no runtime is named: set build.runtimes'


def _contradictions_of_training(table: FinetuneTable) -> Iterator[str]:
    if table.mode == "head first" and table.head_epochs >= table.epochs:
        yield f"finetune.head_epochs = {table.head_epochs} leaves none of the {table.epochs} epochs for the other layers"
    if table.cache_features and (table.mode == "all" or table.unfreeze):
        yield 'finetune.cache_features needs a backbone that stays as it is: mode = "head" or "head first", and no unfreeze'
    if table.cache_features and table.mix != "none":
        yield f"finetune.mix = {table.mix!r} mixes pictures, and with cache_features there are none: leave one of them out"
    if table.aux_loss is not None and table.mode == "head":
        yield 'finetune.aux_loss is for the layers below the auxiliary heads, and with mode = "head" they do not learn'
    if table.views > 1 and not table.cache_features:
        yield f"finetune.views = {table.views} is for cache_features; without it every epoch sees new views"


def _contradictions_of_tensorrt(recipe: Recipe) -> Iterator[str]:
    table, fixed = recipe.tensorrt, recipe.export.batch
    if recipe.build.jetpack is not None and (recipe.build.target is None or "tensorrt" not in recipe.build.runtimes):
        yield (
            f"build.jetpack = {recipe.build.jetpack!r} is about TensorRT on build.target (--target): set both, with "
            '"tensorrt" in build.runtimes, or leave it out'
        )
    if "tensorrt" not in recipe.build.runtimes:
        changed = [item.name for item in fields(table) if getattr(table, item.name) != item.default]
        for name in changed:
            yield f'tensorrt.{name} means nothing without a TensorRT engine: add "tensorrt" to build.runtimes, or leave it out'
        return
    if len(table.batch) not in (1, 3) or list(table.batch) != sorted(table.batch):
        yield f"tensorrt.batch = {list(table.batch)}: name smallest, best and largest batch in this order, or one size for all"
    if table.dla_core is not None and fixed == "dynamic" and len(set(table.batch)) != 1:
        yield f"tensorrt.dla_core with batches {list(table.batch)}: a DLA core runs one size; set export.batch to a number"
    if table.dla_core is None and not table.gpu_fallback:
        yield "tensorrt.gpu_fallback = false is about DLA: set dla_core, or leave it out"


def _contradictions_of_time(recipe: Recipe, rule: Rule) -> Iterator[str]:
    if not recipe.benchmark.enabled:
        yield f"gate '{rule}' needs a benchmark, and benchmark.enabled is false"
    if not recipe.build.runtimes:
        yield f"gate '{rule}' needs an engine to measure: set build.runtimes"
    if rule.metric == "slowdown" and recipe.quantize is None:
        yield f"gate '{rule}' compares INT8 with FP32, but there is no [quantize] table"
