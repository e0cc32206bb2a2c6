"""The command line: a command parses, calls one function, prints one result.

Results go to standard output, as JSON with `--json`; progress and errors go to standard error. Options take their
help, defaults and ranges from `recipe`. Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from deploykit import publish
from deploykit import recipe as recipes
from deploykit.errors import CapabilityError, DeploykitError, UsageError, printable, translating_os_errors
from deploykit.gate import EXIT_CODES, Rule, Verdict, parse_rule
from deploykit.recipe import Recipe

if TYPE_CHECKING:
    from deploykit.report.summary import Summary

_INTERRUPTED, _TERMINATED = 130, 143
_RUNS = Path("runs")
_FASTEST = "fastest"
_OF_TWO_SIDES = {"model__weights": "--weights", "gates": "--gate", "layouts": "--layout"} | {
    name: f"--{name}" for name in ("labelled", "tolerance", "stress", "preprocess", "size", "literal", "cast", "trust")
}


def main() -> NoReturn:
    """Run the command line and exit with the code that design and documentation promise."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        _tell_ci_of(UsageError(error.format_message()))
        sys.exit(2)
    except DeploykitError as error:
        click.echo(f"error: {error}", err=True)
        if "--json" in sys.argv:
            facts = {"what": error.what, "problems": error.problems, "why": error.why, "fix": error.fix}
            click.echo(json.dumps({"error": facts, "exit_code": error.exit_code}))
        _tell_ci_of(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; what a run had finished is kept, and the same command goes on from there", err=True)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        _tell_ci_of(error)
        raise


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="deploykit")
def cli() -> None:
    """From a PyTorch CNN to a verified engine on the device.

    Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 a gate failed, 4 this machine lacks what was required, 5 too few
    images or processes to decide a gate, 130 interrupted.
    """


def _recipe_option(flag: str, key: str, **overrides: Any) -> Callable[..., Any]:
    """A click option declared by the recipe's key: its help, default, range and choices."""
    _, item, hint = next(entry for entry in recipes.declared() if entry[0] == key)
    literals = [value for option in (hint, *typing.get_args(hint)) for value in typing.get_args(option) if isinstance(value, str)]
    if "type" in overrides:
        kind = overrides.pop("type")
    elif int in (hint, *typing.get_args(hint)):
        kind = click.IntRange(item.metadata["low"], item.metadata["high"])
    elif float in (hint, *typing.get_args(hint)):
        kind = click.FloatRange(item.metadata["low"], item.metadata["high"])
    else:
        kind = click.Choice(literals) if literals else str
    settings = {"help": item.metadata["help"], "default": None, "show_default": False} | overrides
    if settings["default"] is None and item.default not in (None, "") and not overrides.get("required"):
        settings["help"] += f"  [default: {item.default}]"
    return click.option(flag, key.replace(".", "__"), type=kind, **settings)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_output_option = click.option("--output", type=click.Path(path_type=Path), help="Folder of the results.")
_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Set any key of the recipe; the value in TOML syntax."
)
_skip_option = click.option("--skip-bad-images", is_flag=True, help="Leave out unreadable images, and count them.")


def _for_ci(kind: Literal["run", "benchmark", "parity"]) -> Callable[[Callable[..., Mapping[str, Any]]], Callable[..., int]]:
    """Options of a command that has gates. The command gives its result, which is told here: printed, and as what CI reads."""

    def decorate(command: Callable[..., Mapping[str, Any]]) -> Callable[..., int]:
        @click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the gates as JUnit XML.")
        @click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write a summary as Markdown.")
        @_json_option
        @functools.wraps(command)
        def told(*, junit: Path | None, markdown: Path | None, as_json: bool, **words: Any) -> int:
            _make_room(junit, markdown)
            start = perf_counter()
            found = command(**words)
            _tell_ci(_summary(kind, found, perf_counter() - start), junit, markdown)
            if as_json:
                click.echo(json.dumps(found))
            else:
                from deploykit.report import text

                click.echo({"run": text.run, "benchmark": text.benchmark, "parity": text.parity}[kind](found), nl=False)
            return int(found["exit_code"])

        return told

    return decorate


@cli.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@_output_option
@_set_option
@_skip_option
@_for_ci("run")
def run_command(recipe: Path, output: Path | None, overrides: tuple[str, ...], skip_bad_images: bool) -> Mapping[str, Any]:
    """Do everything that a recipe says.

    Fine-tune, export, quantize, build, parity, benchmark, report: a stage that is finished already is skipped. RECIPE is
    a file, or the name of a recipe that comes with deploykit, such as lenet_digits.
    """
    settings = _overrides(overrides)
    recipe = recipes.shipped(str(recipe)) or recipe
    if skip_bad_images:
        settings["data.skip_bad_images"] = "true"
    return _run(recipes.load(recipe, settings, overrides_base=Path.cwd()), output)


@cli.command("export")
@click.argument("model")
@click.option(
    "--to",
    "targets",
    multiple=True,
    required=True,
    type=click.Choice(["onnx", "torchscript", "onnxruntime", "openvino", "tensorrt", _FASTEST]),
    help="What to make; may be given several times. fastest: the engines of every CPU runtime here, and the best of them.",
)
@click.option("--fp32", is_flag=True, help="Keep everything in float32 (the default).")
@click.option("--fp16", is_flag=True, help="Type the graph in float16; with --int8, what stays float.")
@click.option("--int8", is_flag=True, help="Quantize to INT8 as well; needs --calibrate.")
@_recipe_option("--weights", "model.weights", metavar="default|none|FILE")
@_recipe_option("--weights-key", "model.weights_key", metavar="KEY")
@_recipe_option("--classes", "model.classes")
@_recipe_option("--cpu", "quantize.cpu")
@_recipe_option("--calibrate", "data.calibrate", metavar="DIR")
@_recipe_option("--calibration-images", "data.calibration_images")
@_recipe_option("--validate", "data.validate", metavar="DIR")
@click.option("--gate", type=click.FloatRange(0, 100), metavar="POINTS", help="Largest top-1 drop allowed; needs --validate.")
@_recipe_option("--batch", "export.batch", type=str, metavar="N|dynamic")
@_recipe_option("--engine", "build.engine")
@_recipe_option("--threads", "build.threads")
@_recipe_option("--processes", "benchmark.processes")
@_output_option
@_set_option
@_skip_option
@_for_ci("run")
def export_command(
    model: str,
    targets: tuple[str, ...],
    fp32: bool,
    fp16: bool,
    int8: bool,
    gate: float | None,
    output: Path | None,
    overrides: tuple[str, ...],
    skip_bad_images: bool,
    **values: Any,
) -> Mapping[str, Any]:
    """Export, quantize, build, prove, measure.

    MODEL is a torchvision classifier, a network of ours (`deploykit models` lists both), FILE.py:factory or
    module:factory. The equivalent recipe is written beside the result, so the command can be repeated and reviewed.
    """
    _refuse_meaningless(targets, fp32=fp32, fp16=fp16, int8=int8, cpu=values["quantize__cpu"])
    content: dict[str, Any] = {"name": _run_name(model), "model": {"name": model}}
    for key, value in values.items():
        if value is not None:
            table, _, name = key.partition("__")
            content.setdefault(table, {})[name] = int(value) if key == "export__batch" and value.isdecimal() else value
    formats = ["onnx"] if set(targets) - {"torchscript"} else []
    content.setdefault("export", {})["formats"] = formats + ["torchscript"] * ("torchscript" in targets)
    runtimes = [name for name in dict.fromkeys(targets) if name in ("onnxruntime", "openvino", "tensorrt")]
    if _FASTEST in targets:
        runtimes = [*runtimes, *(name for name in _cpu_runtimes() if name not in runtimes)]
        content["build"] = {**content.get("build", {}), "keep": "fastest"}
    content.setdefault("build", {}).update({"runtimes": runtimes, "float_type": "fp16" if fp16 else "fp32"})
    if int8:
        content.setdefault("quantize", {})
    if gate is not None:
        content["gate"] = [str(Rule("drop", gate))]
    if skip_bad_images:
        content.setdefault("data", {})["skip_bad_images"] = True
    here = Path.cwd()
    recipe = recipes.parse(content, base=here, source="the command line", overrides=_overrides(overrides), overrides_base=here)
    return _run(recipe, output)


@cli.command("benchmark")
@click.argument("engines", nargs=-1, required=True, type=click.Path(path_type=Path))
@_recipe_option("--processes", "benchmark.processes")
@_recipe_option("--queries", "benchmark.queries")
@_recipe_option("--warmup", "benchmark.warmup")
@click.option("--offline-batch", "offline_batches", multiple=True, type=int, help="Images in one offline query; several sweep.")
@_recipe_option("--offline-seconds", "benchmark.offline_seconds")
@_recipe_option("--seed", "benchmark.seed")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the raw samples, which --baseline reads.")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="Compare with an earlier run of this machine.")
@click.option("--fail-on", metavar="PERCENT", help="Largest slowdown allowed, such as 5%; short for --gate 'slowdown <= 5 %'.")
@click.option("--gate", "gates", multiple=True, metavar="RULE", help="A rule of time, such as 'latency <= 5 ms'.")
@click.option(
    "--size", type=click.IntRange(1, 8192), metavar="PIXELS", help="Height and width where an ONNX file leaves them open."
)
@_for_ci("benchmark")
def benchmark_command(
    engines: tuple[Path, ...],
    offline_batches: tuple[int, ...],
    output: Path | None,
    baseline: Path | None,
    fail_on: str | None,
    gates: tuple[str, ...],
    size: int | None,
    **values: Any,
) -> Mapping[str, Any]:
    """Measure engines in fresh processes, and compare.

    ENGINES are folders of engines, runs with all their engines, or ONNX files of anybody, which are built for ONNX Runtime
    first. The first is the baseline, unless there is a --baseline file. A run that something disturbed is invalid, and a gate
    then cannot tell.
    """
    from deploykit import timing

    rules = _rules_of_time(gates, fail_on)
    table = {key.partition("__")[2]: value for key, value in values.items() if value is not None}
    if offline_batches:
        table["offline_batches"] = list(offline_batches)
    settings = recipes.benchmark_table(table, "the command line")
    with _progress_bars() as progress:
        return timing.measure(engines, settings, rules, baseline=baseline, output=output, size=size, progress=progress)


@cli.command("parity")
@click.argument("what", nargs=-1, required=True, metavar="A B | PATH")
@click.option(
    "--isa",
    "cpus",
    multiple=True,
    metavar="CPU",
    help="Emulate this CPU: haswell (AVX2 without VNNI), nehalem (SSE4.2), cortex-a72 or cortex-a76 (ARM "
    "without and with an int8 dot product). May be given several times; wants one PATH.",
)
@click.option("--data", "images", type=click.Path(path_type=Path), metavar="DIR", help="Images to compare on.")
@click.option(
    "--arm-root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with a 64-bit ARM Python and ONNX Runtime, as benchmarks/arm64_root.py makes it; for ARM CPUs.",
)
@click.option("--labelled", is_flag=True, help="The sub-folders of --data are the classes: compare the accuracy of both as well.")
@click.option("--gate", "gates", multiple=True, metavar="RULE", help="A rule of decisions, such as 'agreement >= 99 %'.")
@click.option("--tolerance", type=click.FloatRange(0, 1e9), help="Largest max|d| / max|A|, instead of that of the precisions.")
@click.option("--stress", is_flag=True, help="Feed what breaks engines as well: extremes, other batches, threads, wrong arrays.")
@_recipe_option("--weights", "model.weights", metavar="default|none|FILE")
@click.option(
    "--preprocess",
    multiple=True,
    metavar="KEY=VALUE",
    help="How a picture becomes an input, as in the recipe's table [preprocess].",
)
@click.option(
    "--size", type=click.IntRange(1, 8192), metavar="PIXELS", help="Height and width where an ONNX file leaves them open."
)
@click.option("--layout", "layouts", multiple=True, metavar="A|B=nhwc", help="This side has its channels last.")
@click.option("--literal", multiple=True, type=click.Choice(["A", "B"]), help="Execute this ONNX graph without any optimization.")
@click.option("--cast", is_flag=True, help="Feed each side its own floating-point type.")
@click.option("--trust", is_flag=True, help="Load TorchScript, which runs the program in it.")
@_for_ci("parity")
def parity_command(
    what: tuple[str, ...], cpus: tuple[str, ...], images: Path | None, arm_root: Path | None, **words: Any
) -> Mapping[str, Any]:
    """Prove that two things answer alike, or one graph on other CPUs.

    A and B are each an artifact's folder or file (ONNX, TorchScript, engine), anybody's ONNX or TorchScript file, or a PyTorch
    network by name or FILE.py:factory. Both are fed the images of --data, else golden samples, else generated inputs. Exit code
    3 when B's answers are further from A's than the precision of both explains, or when anything is not a number.

    With --isa, PATH is a run, or the artifact of its quantization. Its graph runs on ONNX Runtime here and in an emulator
    (qemu-user), on its golden samples and on the images of --data. Exit code 3 when an image is decided otherwise, or when
    answers are more than one step of the last quantized tensor apart.
    """
    if cpus:
        _refuse_beside_isa(what, words)
        from deploykit import isa

        with _progress_bars() as progress:
            return isa.compare(Path(what[0]), cpus, images=images, arm_root=arm_root, progress=progress)
    if len(what) != 2:
        fix = "deploykit parity A B, or deploykit parity PATH --isa haswell"
        raise UsageError(f"parity compares two things, and {len(what)} {'is' if len(what) == 1 else 'are'} named", fix=fix)
    if arm_root is not None:
        raise UsageError("--arm-root is for --isa")
    return _crosscheck((what[0], what[1]), images, **words)


@cli.command("bisect")
@click.argument("a")
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--data", "images", type=click.Path(path_type=Path), metavar="DIR", help="Images to compare on.")
@click.option("--images", "count", type=click.IntRange(1), default=32, help="At most so many of them.  [default: 32]")
@click.option("--weights", metavar="default|none|FILE", help="A is a PyTorch network, with these weights.")
@_json_option
def bisect_command(a: str, b: Path, images: Path | None, count: int, weights: str | None, as_json: bool) -> int:
    """Find the first layer of B that is wrong.

    A is right: an ONNX file, an artifact, or with --weights a network by name or FILE.py:factory. B is an ONNX file or artifact
    of the same network, in float or INT8. Each layer of B runs alone on A's activations; exit code 3 when one is off by more
    than its precision explains. Without --data, A's golden samples are compared, or else noise.
    """
    from deploykit.bisect import command, text

    with _progress_bars() as progress:
        found = command.compare(a, b, images=images, count=count, weights=weights, progress=progress)
    click.echo(json.dumps(found) if as_json else text.as_text(found), nl=as_json)
    return int(found["exit_code"])


@cli.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--rules",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    help="Check an ONNX file's Q/DQ by this runtime's rules instead; exit code 3 when it would be refused or computed wrong.",
)
@_json_option
def inspect_command(path: Path, rules: str | None, as_json: bool) -> int:
    """Say what a file or folder is.

    Knows artifacts, runs, ONNX graphs, checkpoints and recipes; nothing in them is executed.
    """
    if rules is not None:
        return _lint(path, rules, as_json)
    from deploykit import inspect

    found = inspect.inspect(path)
    click.echo(json.dumps(found, indent=1) if as_json else inspect.as_text(found), nl=as_json)
    return 0


@cli.command("models")
@click.argument("pattern", default="")
@_json_option
def models_command(pattern: str, as_json: bool) -> None:
    """List the networks that have a name.

    With PATTERN, those whose name holds it.
    """
    from deploykit import models
    from deploykit.jsonable import to_json
    from deploykit.report import text

    found = [entry for entry in models.catalogue() if pattern in entry.name]
    if not found:
        raise UsageError(f"no network's name holds {pattern!r}", fix="deploykit models lists all of them")
    click.echo(json.dumps([to_json(entry) for entry in found], indent=1) if as_json else text.models(found), nl=as_json)


@cli.command("doctor")
@_json_option
def doctor_command(as_json: bool) -> None:
    """Say what this machine has.

    Versions, CPU features, GPU, and which runtimes load, or why not.
    """
    from deploykit import runtimes
    from deploykit.jsonable import to_json
    from deploykit.machine import Machine
    from deploykit.report import text

    machine = Machine.probe()
    found = {name: runtimes.why_not(name) for name in runtimes.REGISTRY}
    if as_json:
        click.echo(
            json.dumps({"machine": to_json(machine), "runtimes": {name: why or "loads" for name, why in found.items()}}, indent=1)
        )
    else:
        click.echo(text.doctor(machine, found), nl=False)


@cli.command("clean")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Remove the whole run, not only what killed runs left behind.")
@_json_option
def clean_command(folder: Path, everything: bool, as_json: bool) -> None:
    """Remove what killed runs left behind.

    FOLDER is the output folder of a run.
    """
    from deploykit import workspace

    removed = [printable(path) for path in workspace.clean(folder, everything=everything)]
    if as_json:
        click.echo(json.dumps({"removed": removed}))
    else:
        click.echo("\n".join(f"removed {path}" for path in removed) or "nothing to remove")


def _run(recipe: Recipe, output: Path | None) -> Mapping[str, Any]:
    from deploykit import pipeline

    command = shlex.join(["deploykit", *(printable(word) for word in sys.argv[1:])])
    with _progress_bars() as progress:
        return pipeline.run(recipe, output or _RUNS / recipe.name, command=command, progress=progress)


def _make_room(junit: Path | None, markdown: Path | None) -> None:
    """Remove what an earlier run wrote, which a killed one would leave standing as if it were its own.

    Raises UsageError before there is any work when a file cannot be written, or is not ours to replace.
    """
    files = {"--junit": junit, "--markdown": markdown}
    asked = {option: path for option, path in files.items() if path is not None}
    problems = [f"{option} {printable(path)}: {why}" for option, path in asked.items() if (why := _why_not_replaceable(path))]
    if junit is not None and junit == markdown:
        problems.append(f"--junit and --markdown are the same file, {printable(junit)}")
    if problems:
        fix = "name new files, in a folder that is there"
        raise UsageError("what CI reads cannot be written", problems=problems, fix=fix)
    for path in asked.values():
        with translating_os_errors("replace", path):
            path.unlink(missing_ok=True)


def _why_not_replaceable(path: Path) -> str:
    """Why a file for CI cannot or must not be written; empty where there is none, an empty one, or one that we wrote before."""
    from deploykit.report import junit, markdown

    openings = (junit.OPENING, markdown.OPENING.encode())
    if (why := publish.why_not_writable(path)) or not path.exists():
        return why
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, openings)))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "" if not start or start.startswith(openings) else "a file is there that deploykit has not written"


def _summary(kind: Literal["run", "benchmark", "parity"], found: Mapping[str, Any], seconds: float) -> Summary:
    from deploykit.report import summary

    if kind == "run":
        return summary.of_run(found)
    return (summary.of_benchmark if kind == "benchmark" else summary.of_parity)(found, seconds=seconds)


def _tell_ci(found: Summary, junit_file: Path | None, markdown_file: Path | None) -> None:
    """Write the files that were asked for, and in a GitHub workflow the annotations and the summary of its step."""
    from deploykit.report import github, junit, markdown

    if junit_file is not None:
        publish.write_file(junit_file, junit.render(found))
    if markdown_file is not None:
        publish.write_file(markdown_file, markdown.render(found).encode())
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    # The runner reads commands from both streams (actions/runner, ScriptHandler.cs); standard output is for the result alone.
    for line in github.annotate(found):
        click.echo(line, err=True)
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    try:
        if step:
            github.append(Path(step), found)
    except OSError as error:
        # Nobody asked for this file by name, and a page that cannot be shown changes no verdict.
        click.echo(github.command("warning", "deploykit", f"cannot write the summary of the step: {error}"), err=True)


def _tell_ci_of(error: Exception) -> None:
    """The same for an error, so that a page is never empty; whatever goes wrong here is said beside it."""
    command = cli.commands.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is None or "junit" not in {parameter.name for parameter in command.params}:
        return
    from deploykit.report import summary

    files = [_named("--junit"), _named("--markdown")]
    junit, markdown = (path if path and not _why_not_replaceable(path) else None for path in files)
    try:
        _tell_ci(summary.of_error(error, sys.argv[1]), junit, None if markdown == junit else markdown)
    except DeploykitError as another:
        click.echo(f"error: {another}", err=True)


def _named(option: str) -> Path | None:
    """The file after an option on the command line, which may be one that could not be parsed."""
    words = sys.argv[2:]
    after = [following for word, following in pairwise(words) if word == option]
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return next((Path(name) for name in (*after, *joined)), None)


def _rules_of_time(gates: tuple[str, ...], fail_on: str | None) -> list[Rule]:
    """The rules on the command line. Raises UsageError with every one that is none, or is not one of time."""
    texts = [*gates, *([f"slowdown <= {fail_on.strip().removesuffix('%')} %"] if fail_on is not None else [])]
    rules, problems = _parsed(texts)
    problems += [f"'{rule}' is about answers; `deploykit run` judges it" for rule in rules if not rule.is_of_time]
    if problems:
        raise UsageError("these are no rules of time", problems=problems, fix="--gate 'latency <= 5 ms' --fail-on 5%")
    return rules


def _crosscheck(names: tuple[str, str], images: Path | None, **words: Any) -> Mapping[str, Any]:
    """`parity A B` as its options say."""
    from deploykit import crosscheck

    said = crosscheck.Said(
        weights=words["model__weights"] or "default",
        preprocess=_pairs("--preprocess", words["preprocess"], "crop=224"),
        size=words["size"],
        literal=words["literal"],
        layouts=_layouts(words["layouts"]),
        trust=words["trust"],
        cast=words["cast"],
    )
    with _progress_bars() as progress:
        return crosscheck.compare_two(
            *names,
            said,
            images=images,
            labelled=words["labelled"],
            rules=_rules(words["gates"]),
            tolerance=words["tolerance"],
            stressed=words["stress"],
            progress=progress,
        )


def _refuse_beside_isa(what: tuple[str, ...], words: Mapping[str, Any]) -> None:
    """Raise UsageError for a second path, and for options that are about two sides."""
    problems = [f"{len(what)} things are named; emulated CPUs are compared on one graph"] * (len(what) != 1)
    problems += [f"{_OF_TWO_SIDES[name]} is for parity A B" for name, value in words.items() if _is_said(value)]
    if problems:
        raise UsageError("--isa and these do not go together", problems=problems)


def _is_said(value: object) -> bool:
    """Whether an option was given; 0 is a value, although it equals False."""
    return value is not None and value is not False and value != ()


def _layouts(texts: tuple[str, ...]) -> dict[str, Any]:
    found = _pairs("--layout", texts, "B=nhwc")
    problems = [f"{key}={value}" for key, value in found.items() if key not in ("A", "B") or value not in ("nchw", "nhwc")]
    if problems:
        raise UsageError("--layout names a side, A or B, and nchw or nhwc", problems=problems)
    return found


def _rules(texts: tuple[str, ...]) -> list[Rule]:
    """The rules on the command line. Raises UsageError with every one that is none."""
    rules, problems = _parsed(texts)
    if problems:
        raise UsageError("these are no gate rules", problems=problems)
    return rules


def _parsed(texts: Iterable[str]) -> tuple[list[Rule], list[str]]:
    """The rules, and what is wrong with each text that is none."""
    rules, problems = [], []
    for text in texts:
        try:
            rules.append(parse_rule(text))
        except ValueError as error:
            problems.append(str(error))
    return rules, problems


def _lint(path: Path, runtime: str, as_json: bool) -> int:
    from deploykit.quantize import lint

    if not path.exists():
        raise UsageError(f"there is no {printable(path)}")
    if not path.is_file():
        raise UsageError(f"--rules wants an ONNX file, and {printable(path)} is none", fix="name the model.onnx itself")
    found = lint.lint(path, runtime)
    code = EXIT_CODES[Verdict.FAIL] if lint.is_fatal(found) else 0
    facts = {"path": printable(path), **lint.as_facts(found, runtime), "exit_code": code}
    click.echo(json.dumps(facts, indent=1) if as_json else lint.as_text(found, runtime), nl=as_json)
    return code


def _cpu_runtimes() -> list[str]:
    """The runtimes that build INT8 engines for a CPU and load here. Raises CapabilityError when none does."""
    from deploykit import runtimes

    known = [name for name, entry in runtimes.REGISTRY.items() if entry.on_cpu and entry.rules is not None]
    why = {name: runtimes.why_not(name) for name in known}
    if all(why.values()):
        problems = [f"{name}: {reason}" for name, reason in why.items()]
        raise CapabilityError("no CPU engine can be built here", problems=problems, fix="pip install 'deploykit[cpu]'")
    return [name for name in known if not why[name]]


def _refuse_meaningless(targets: tuple[str, ...], *, fp32: bool, fp16: bool, int8: bool, cpu: str | None) -> None:
    """Combinations of a format and a precision that mean nothing, or that a runtime cannot do."""
    problems = []
    if fp32 and (fp16 or int8):
        problems.append("--fp32 together with another precision: FP32 is made anyway, as what INT8 is compared with")
    if int8 and "torchscript" in targets:
        problems.append("--int8 --to torchscript: TorchScript holds no Q/DQ; INT8 lives in an ONNX graph")
    if int8 and set(targets) <= {"onnx", "torchscript"}:
        problems.append(
            "--int8 --to onnx: Q/DQ follows a runtime's rules; use --to onnxruntime, openvino or tensorrt (--engine skip)"
        )
    if cpu is not None and not int8:
        problems.append(f"--cpu {cpu} without --int8: a float graph is the same for every CPU")
    if fp16 and "tensorrt" not in targets:
        problems.append("--fp16: only TensorRT has float16 kernels here; ONNX Runtime on a CPU would cast every layer to float32")
    elif fp16 and "onnxruntime" in targets:
        problems.append("--fp16 --to onnxruntime: on a CPU it has no float16 kernels and would cast every layer to float32")
    elif fp16 and "openvino" in targets:
        problems.append("--fp16 --to openvino: its engines here compute in float32 whatever the graph holds")
    if problems:
        raise UsageError("that combination has no meaning", problems=problems)


def _overrides(texts: tuple[str, ...]) -> dict[str, str]:
    return _pairs("--set", texts, "preprocess.crop=64", form="TABLE.KEY=VALUE")


def _pairs(option: str, texts: tuple[str, ...], example: str, *, form: str = "KEY=VALUE") -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {text!r} is not of the form {form}", fix=f"{option} {example}")
        found[key.strip()] = value.strip()
    return found


def _run_name(model: str) -> str:
    """The name of a run: the network's, or that of the user's file or module."""
    return printable(Path(model.rpartition(":")[0] or model).name.removesuffix(".py")) or "export"


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each piece of long work, on standard error; nothing when that is not a terminal."""
    if not sys.stderr.isatty():
        from deploykit.progress import silent

        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _terminate(_signal: int, _frame: object) -> NoReturn:
    """SIGTERM unwinds like an exception, so that half-written directories are removed."""
    sys.exit(_TERMINATED)
