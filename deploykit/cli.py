"""The command line: a command parses, calls one function, prints one result.

Results go to standard output, as JSON with `--json`; progress and errors go to standard error. Options take their
help, defaults and ranges from `recipe`. Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from deploykit import recipe as recipes
from deploykit.errors import DeploykitError, UsageError, printable
from deploykit.gate import EXIT_CODES, Rule, Verdict, parse_rule
from deploykit.recipe import Recipe

_INTERRUPTED, _TERMINATED = 130, 143
_RUNS = Path("runs")


def main() -> NoReturn:
    """Run the command line and exit with the code that design and documentation promise."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except DeploykitError as error:
        click.echo(f"error: {error}", err=True)
        if "--json" in sys.argv:
            facts = {"what": error.what, "problems": error.problems, "why": error.why, "fix": error.fix}
            click.echo(json.dumps({"error": facts, "exit_code": error.exit_code}))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; what a run had finished is kept, and the same command goes on from there", err=True)
        sys.exit(_INTERRUPTED)


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


@cli.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@_output_option
@_set_option
@_skip_option
@_json_option
def run_command(recipe: Path, output: Path | None, overrides: tuple[str, ...], skip_bad_images: bool, as_json: bool) -> int:
    """Do everything that a recipe says.

    Fine-tune, export, quantize, build, parity, benchmark, report: a stage that is finished already is skipped. RECIPE is
    a file, or the name of a recipe that comes with deploykit, such as lenet_digits.
    """
    settings = _overrides(overrides)
    recipe = recipes.shipped(str(recipe)) or recipe
    if skip_bad_images:
        settings["data.skip_bad_images"] = "true"
    return _run(recipes.load(recipe, settings, overrides_base=Path.cwd()), output, as_json)


@cli.command("export")
@click.argument("model")
@click.option(
    "--to",
    "targets",
    multiple=True,
    required=True,
    type=click.Choice(["onnx", "torchscript", "onnxruntime", "tensorrt"]),
    help="What to make; may be given several times.",
)
@click.option("--fp32", is_flag=True, help="Keep everything in float32 (the default).")
@click.option("--fp16", is_flag=True, help="Type the graph in float16; with --int8, what stays float.")
@click.option("--int8", is_flag=True, help="Quantize to INT8 as well; needs --calibrate.")
@_recipe_option("--weights", "model.weights", metavar="default|none|FILE")
@_recipe_option("--weights-key", "model.weights_key", metavar="KEY")
@_recipe_option("--classes", "model.classes")
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
@_json_option
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
    as_json: bool,
    **values: Any,
) -> int:
    """Export, quantize, build, prove, measure.

    MODEL is a torchvision classifier, a network of ours (`deploykit models` lists both), FILE.py:factory or
    module:factory. The equivalent recipe is written beside the result, so the command can be repeated and reviewed.
    """
    _refuse_meaningless(targets, fp32=fp32, fp16=fp16, int8=int8)
    content: dict[str, Any] = {"name": _run_name(model), "model": {"name": model}}
    for key, value in values.items():
        if value is not None:
            table, _, name = key.partition("__")
            content.setdefault(table, {})[name] = int(value) if key == "export__batch" and value.isdecimal() else value
    formats = ["onnx"] if set(targets) - {"torchscript"} else []
    content.setdefault("export", {})["formats"] = formats + ["torchscript"] * ("torchscript" in targets)
    runtimes = [name for name in dict.fromkeys(targets) if name in ("onnxruntime", "tensorrt")]
    content.setdefault("build", {}).update({"runtimes": runtimes, "float_type": "fp16" if fp16 else "fp32"})
    if int8:
        content["quantize"] = {}
    if gate is not None:
        content["gate"] = [str(Rule("drop", gate))]
    if skip_bad_images:
        content.setdefault("data", {})["skip_bad_images"] = True
    here = Path.cwd()
    recipe = recipes.parse(content, base=here, source="the command line", overrides=_overrides(overrides), overrides_base=here)
    return _run(recipe, output, as_json)


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
@_json_option
def benchmark_command(
    engines: tuple[Path, ...],
    offline_batches: tuple[int, ...],
    output: Path | None,
    baseline: Path | None,
    fail_on: str | None,
    gates: tuple[str, ...],
    as_json: bool,
    **values: Any,
) -> int:
    """Measure engines in fresh processes, and compare.

    ENGINES are folders of engines, or runs with all their engines; the first is the baseline, unless there is a --baseline
    file. A run that something disturbed is invalid, and a gate then cannot tell.
    """
    from deploykit import timing

    rules = _rules_of_time(gates, fail_on)
    table = {key.partition("__")[2]: value for key, value in values.items() if value is not None}
    if offline_batches:
        table["offline_batches"] = list(offline_batches)
    settings = recipes.benchmark_table(table, "the command line")
    with _progress_bars() as progress:
        found = timing.measure(engines, settings, rules, baseline=baseline, output=output, progress=progress)
    if as_json:
        click.echo(json.dumps(found))
    else:
        from deploykit.report import text

        click.echo(text.benchmark(found), nl=False)
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
    from deploykit import pipeline

    removed = [printable(path) for path in pipeline.clean(folder, everything=everything)]
    if as_json:
        click.echo(json.dumps({"removed": removed}))
    else:
        click.echo("\n".join(f"removed {path}" for path in removed) or "nothing to remove")


def _run(recipe: Recipe, output: Path | None, as_json: bool) -> int:
    from deploykit import pipeline

    command = shlex.join(["deploykit", *(printable(word) for word in sys.argv[1:])])
    with _progress_bars() as progress:
        found = pipeline.run(recipe, output or _RUNS / recipe.name, command=command, progress=progress)
    if as_json:
        click.echo(json.dumps(found))
    else:
        from deploykit.report import text

        click.echo(text.run(found), nl=False)
    return int(found["exit_code"])


def _rules_of_time(gates: tuple[str, ...], fail_on: str | None) -> list[Rule]:
    """The rules on the command line. Raises UsageError with every one that is none, or is not one of time."""
    texts = [*gates, *([f"slowdown <= {fail_on.strip().removesuffix('%')} %"] if fail_on is not None else [])]
    rules, problems = [], []
    for text in texts:
        try:
            rules.append(parse_rule(text))
        except ValueError as error:
            problems.append(str(error))
    problems += [f"'{rule}' is about answers; `deploykit run` judges it" for rule in rules if not rule.is_of_time]
    if problems:
        raise UsageError("these are no rules of time", problems=problems, fix="--gate 'latency <= 5 ms' --fail-on 5%")
    return rules


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


def _refuse_meaningless(targets: tuple[str, ...], *, fp32: bool, fp16: bool, int8: bool) -> None:
    """Combinations of a format and a precision that mean nothing, or that a runtime cannot do."""
    problems = []
    if fp32 and (fp16 or int8):
        problems.append("--fp32 together with another precision: FP32 is made anyway, as what INT8 is compared with")
    if int8 and "torchscript" in targets:
        problems.append("--int8 --to torchscript: TorchScript holds no Q/DQ; INT8 lives in an ONNX graph")
    if int8 and set(targets) <= {"onnx", "torchscript"}:
        problems.append("--int8 --to onnx: Q/DQ follows a runtime's rules; use --to onnxruntime or --to tensorrt (--engine skip)")
    if fp16 and "tensorrt" not in targets:
        problems.append("--fp16: only TensorRT has float16 kernels here; ONNX Runtime on a CPU would cast every layer to float32")
    elif fp16 and "onnxruntime" in targets:
        problems.append("--fp16 --to onnxruntime: on a CPU it has no float16 kernels and would cast every layer to float32")
    if problems:
        raise UsageError("that combination has no meaning", problems=problems)


def _overrides(texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text!r} is not of the form TABLE.KEY=VALUE", fix="--set preprocess.crop=64")
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
