"""Commands that make something: run, finetune and export."""

from __future__ import annotations

import json
import os
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from deploykit import recipe as recipes
from deploykit.cli.ci import for_ci
from deploykit.cli.options import (
    argument_option,
    arguments_of,
    json_option,
    named_recipe,
    output_option,
    overrides_of,
    progress_bars,
    recipe_option,
    set_option,
    skip_option,
)
from deploykit.errors import CapabilityError, UsageError, printable
from deploykit.gate import Rule, parse_rule
from deploykit.recipe import Recipe

_RUNS = Path("runs")
_FASTEST = "fastest"
_PARTS = ("train", "training", "val", "valid", "validation", "test")  # what people call the parts of a data set


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@output_option
@set_option
@skip_option
@for_ci("run")
def run_command(recipe: Path, output: Path | None, overrides: tuple[str, ...], skip_bad_images: bool) -> Mapping[str, Any]:
    """Do everything that a recipe says.

    Fine-tune, export, quantize, build, parity, benchmark, report: a stage that is finished already is skipped. RECIPE is
    a file, or the name of a recipe that comes with deploykit, such as lenet_digits.
    """
    settings = overrides_of(overrides)
    if skip_bad_images:
        settings["data.skip_bad_images"] = "true"
    return _run(named_recipe(recipe, settings), output)


@click.command("finetune")
@click.argument("model")
@click.option(
    "--data",
    "images",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR|NAME",
    help="Labelled images, one sub-folder a class; or train/ and val/ with such sub-folders; or a data set: digits, mnist, "
    "fashion_mnist, emnist, cifar10, cifar100, imagenet.",
)
@recipe_option("--root", "data.root", metavar="DIR")
@click.option("--download", is_flag=True, help="Fetch the data set that --data names into --root when it is not there.")
@recipe_option("--weights", "model.weights", metavar="default|none|FILE")
@recipe_option("--mode", "finetune.mode")
@recipe_option("--epochs", "finetune.epochs")
@recipe_option("--batch", "finetune.batch")
@recipe_option("--learning-rate", "finetune.learning_rate")
@click.option("--augment", multiple=True, metavar="NAME", help="crop, flip, rotate, colour, trivial or rand; several add up.")
@click.option("--cache-features", is_flag=True, help="Compute what a frozen backbone gives its head once, and train on that.")
@output_option
@set_option
@skip_option
@json_option
def finetune_command(
    model: str,
    images: Path,
    augment: tuple[str, ...],
    cache_features: bool,
    download: bool,
    output: Path | None,
    overrides: tuple[str, ...],
    skip_bad_images: bool,
    as_json: bool,
    **values: Any,
) -> int:
    """Train a network on your images.

    MODEL is as in `deploykit export`. The checkpoint of the best epoch and a page with its curves are left in the output folder;
    `deploykit run` with the recipe there goes on to export. A training that was interrupted goes on from its last epoch. Several
    GPUs, or processes: torchrun --nproc-per-node N -m deploykit finetune ...; the batch is that of all of them together.
    """
    content: dict[str, Any] = {"name": f"{_run_name(model)}-finetune", "model": {"name": model}, "finetune": {}, "data": {}}
    for key, value in values.items():
        if value is not None:
            table, _, name = key.partition("__")
            content[table][name] = value
    content["finetune"] |= {"augment": list(augment), "cache_features": cache_features}
    content["data"] |= _data_of(images)
    if download:
        content["data"]["download"] = True
    content["data"]["skip_bad_images"] = skip_bad_images
    here = Path.cwd()
    recipe = recipes.parse(content, base=here, source="the command line", overrides=overrides_of(overrides), overrides_base=here)
    from deploykit import pipeline
    from deploykit.report import training

    out = output or _RUNS / recipe.name
    if "WORLD_SIZE" in os.environ:
        return _trained_together(recipe, out, as_json)
    with progress_bars() as progress:
        result = pipeline.train(recipe, out, progress=progress)
    click.echo(json.dumps(result) if as_json else training.as_text(result), nl=as_json)
    return int(result["exit_code"])


def _data_of(images: Path) -> dict[str, str]:
    """Keys of the recipe for what --data names. Raises UsageError where it cannot be told what are classes."""
    hint = next(hint for key, _, hint in recipes.declared() if key == "data.name")
    if str(images) in typing.get_args(typing.get_args(hint)[0]) and not images.exists():
        return {"name": str(images)}
    parts = {"train": images / "train", "held_out": images / "val"}
    if all(part.is_dir() for part in parts.values()):
        return {key: str(part) for key, part in parts.items()}
    if found := [name for name in _PARTS if (images / name).is_dir()]:
        why = f"it holds {' and '.join(found)}, which are parts of a data set rather than classes"
        raise UsageError(f"cannot tell the classes in {printable(images)}", why=why, fix="call the two parts train and val")
    return {"train": str(images)}


def _trained_together(recipe: Recipe, out: Path, as_json: bool) -> int:
    """One of the processes that torchrun started: the first does what it would do alone, the others help it to train."""
    from deploykit import pipeline
    from deploykit.finetune.lesson import device_of
    from deploykit.finetune.processes import joined, of_torchrun
    from deploykit.report import training

    processes = of_torchrun(os.environ)
    assert recipe.finetune is not None
    with joined(processes, on_gpu=device_of(recipe.finetune, processes).type == "cuda"):
        if not processes.is_first:
            pipeline.assist(recipe, out, processes)
            return 0
        with progress_bars() as progress:
            result = pipeline.train(recipe, out, progress=progress, processes=processes)
    click.echo(json.dumps(result) if as_json else training.as_text(result), nl=as_json)
    return int(result["exit_code"])


@click.command("export")
@click.argument("model")
@click.option(
    "--to",
    "targets",
    multiple=True,
    required=True,
    type=click.Choice(["onnx", "torchscript", *recipes.OFFERS, _FASTEST]),
    help="What to make; may be given several times. fastest: the engines of every CPU runtime here, and the best of them.",
)
@click.option("--fp32", is_flag=True, help="Keep everything in float32 (the default).")
@click.option("--tf32", is_flag=True, help="On a GPU: products of float32 rounded to ten bits.")
@click.option("--fp16", is_flag=True, help="Compute in float16; with --int8, what stays float.")
@click.option("--bf16", is_flag=True, help="Compute in bfloat16.")
@click.option("--int8", is_flag=True, help="Quantize to INT8 as well; needs --calibrate.")
@recipe_option("--weights", "model.weights", metavar="default|none|FILE")
@recipe_option("--weights-key", "model.weights_key", metavar="KEY")
@click.option("--trust", is_flag=True, help="Take weights from a TorchScript file, which runs the program in it.")
@argument_option
@recipe_option("--classes", "model.classes")
@recipe_option("--cpu", "quantize.cpu")
@recipe_option("--calibrate", "data.calibrate", metavar="DIR")
@recipe_option("--calibration-images", "data.calibration_images")
@recipe_option("--validate", "data.validate", metavar="DIR")
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="POINTS|RULE",
    help="Largest top-1 drop allowed, which needs --validate; or any rule, such as 'agreement >= 99 %' or 'latency <= 5 ms'.",
)
@recipe_option("--batch", "export.batch", type=str, metavar="N|dynamic")
@recipe_option("--size", "export.size")
@recipe_option("--exporter", "export.exporter")
@click.option("--cross-check", is_flag=True, help="Run both of torch's exporters on the same inputs, and keep what passes.")
@click.option(
    "--fuse-preprocess",
    type=click.Choice(["nhwc", "nchw"], case_sensitive=False),
    help="The file takes the camera's bytes, uint8 in this layout, and scales and normalises them itself, exactly.",
)
@recipe_option("--engine", "build.engine")
@recipe_option("--target", "build.target", metavar="NAME|FILE")
@recipe_option("--threads", "build.threads")
@recipe_option("--processes", "benchmark.processes")
@output_option
@set_option
@skip_option
@for_ci("run")
def export_command(
    model: str,
    targets: tuple[str, ...],
    fp32: bool,
    tf32: bool,
    fp16: bool,
    bf16: bool,
    int8: bool,
    gates: tuple[str, ...],
    trust: bool,
    words: tuple[str, ...],
    cross_check: bool,
    fuse_preprocess: str | None,
    output: Path | None,
    overrides: tuple[str, ...],
    skip_bad_images: bool,
    **values: Any,
) -> Mapping[str, Any]:
    """Export, quantize, build, prove, measure.

    MODEL is a network of torchvision or of ours (`deploykit models` lists them), timm:NAME, ensemble:NAME+NAME, FILE.py:factory
    or module:factory. The equivalent recipe is written beside the result, so the command can be repeated and reviewed.
    """
    floats = [name for name, asked in (("fp32", fp32), ("tf32", tf32), ("fp16", fp16), ("bf16", bf16)) if asked]
    _refuse_meaningless(targets, floats, int8=int8, cpu=values["quantize__cpu"])
    content: dict[str, Any] = {"name": _run_name(model), "model": {"name": model, "trust": trust}}
    for key, value in values.items():
        if value is not None:
            table, _, name = key.partition("__")
            content.setdefault(table, {})[name] = int(value) if key == "export__batch" and value.isdecimal() else value
    wanted = {
        "onnx" if name == _FASTEST else recipes.OFFERS[name].made_of if name in recipes.OFFERS else name for name in targets
    }
    content.setdefault("export", {})["formats"] = sorted(wanted)
    if cross_check:
        content["export"]["cross_check"] = True
    if fuse_preprocess is not None:
        content["export"]["input"] = f"uint8 {fuse_preprocess.upper()}"
    runtimes = [name for name in dict.fromkeys(targets) if name in recipes.OFFERS]
    if _FASTEST in targets:
        runtimes = [*runtimes, *(name for name in _cpu_runtimes() if name not in runtimes)]
        content["build"] = {**content.get("build", {}), "keep": "fastest"}
    content.setdefault("build", {}).update({"runtimes": runtimes, "float_type": floats[0] if floats else "fp32"})
    if int8:
        content.setdefault("quantize", {})
    if gates:
        content["gate"] = _rules_of(gates)
    if skip_bad_images:
        content.setdefault("data", {})["skip_bad_images"] = True
    here = Path.cwd()
    settings = arguments_of(words) | overrides_of(overrides)
    recipe = recipes.parse(content, base=here, source="the command line", overrides=settings, overrides_base=here)
    return _run(recipe, output)


def _run(recipe: Recipe, output: Path | None) -> Mapping[str, Any]:
    _refuse_several_processes(recipe)
    from deploykit import pipeline

    command = shlex.join(["deploykit", *(printable(word) for word in sys.argv[1:])])
    with progress_bars() as progress:
        return pipeline.run(recipe, output or _RUNS / recipe.name, command=command, progress=progress)


def _refuse_several_processes(recipe: Recipe) -> None:
    """Of a whole run that torchrun starts several times, each would write the same folder."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    fix = "start it without torchrun"
    if recipe.finetune is not None:
        fix = (
            "train first: torchrun --nproc-per-node N -m deploykit finetune MODEL --data DIR --output OUT; then "
            "deploykit run OUT/recipe.toml --output OUT takes what was trained"
        )
    why = f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}: torchrun starts several processes, and training alone is shared by them"
    raise UsageError("a run is one process", why=why, fix=fix)


def _cpu_runtimes() -> list[str]:
    """The runtimes that build INT8 engines for a CPU and load here. Raises CapabilityError when none does."""
    from deploykit import runtimes

    known = [name for name, entry in runtimes.REGISTRY.items() if entry.on_cpu and entry.rules is not None]
    why = {name: runtimes.why_not(name) for name in known}
    if all(why.values()):
        problems = [f"{name}: {reason}" for name, reason in why.items()]
        raise CapabilityError("no CPU engine can be built here", problems=problems, fix="pip install 'deploykit[cpu]'")
    return [name for name in known if not why[name]]


def _refuse_meaningless(targets: tuple[str, ...], floats: Sequence[str], *, int8: bool, cpu: str | None) -> None:
    """Combinations of a format and a precision that mean nothing; what a runtime cannot do, its recipe refuses."""
    problems = []
    if "fp32" in floats and (len(floats) > 1 or int8):
        problems.append("--fp32 together with another precision: FP32 is made anyway, as what INT8 is compared with")
    elif len(floats) > 1:
        problems.append(f"{' '.join(f'--{name}' for name in floats)}: engines of one run compute in one float type")
    if int8 and "torchscript" in targets:
        problems.append("--int8 --to torchscript: TorchScript holds no Q/DQ; INT8 lives in an ONNX graph")
    if int8 and set(targets) <= {"onnx", "torchscript"}:
        problems.append(
            "--int8 --to onnx: Q/DQ follows a runtime's rules; use --to onnxruntime, openvino or tensorrt (--engine skip)"
        )
    if cpu is not None and not int8:
        problems.append(f"--cpu {cpu} without --int8: a float graph is the same for every CPU")
    if problems:
        raise UsageError("that combination has no meaning", problems=problems)


def _rules_of(gates: Sequence[str]) -> list[str]:
    """Each `--gate` as a rule: a number alone is a drop in points. Raises UsageError that names all that are neither."""
    rules, problems = [], []
    for gate in gates:
        try:
            rules.append(str(Rule("drop", float(gate))))
        except ValueError:
            rules.append(gate)
        try:
            parse_rule(rules[-1])
        except ValueError as error:
            problems.append(f"--gate {gate}: {error}")
    if problems:
        fix = "a number of points, such as --gate 0.5, or a rule in quotes"
        raise UsageError("these are no gates", problems=problems, fix=fix)
    return rules


def _run_name(model: str) -> str:
    """The name of a run: the network's with its scheme, or that of the user's file or module."""
    scheme, _, rest = model.partition(":")
    if rest and scheme in recipes.SCHEMES:
        return printable(f"{scheme}-{rest}".replace("/", "-"))
    return printable(Path(model.rpartition(":")[0] or model).name.removesuffix(".py")) or "export"
