"""Commands that look at what is there: inspect, models, doctor, and clean, which tidies it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deploykit.cli.options import json_option, named_recipe, overrides_of, set_option
from deploykit.errors import UsageError, like, printable
from deploykit.gate import EXIT_CODES, Verdict


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--rules",
    type=click.Choice(["onnxruntime", "openvino", "tensorrt"]),
    help="Check an ONNX file's Q/DQ by this runtime's rules instead; exit code 3 when it would be refused or computed wrong.",
)
@json_option
def inspect_command(path: Path, rules: str | None, as_json: bool) -> int:
    """Say what a file or folder is.

    Knows artifacts, runs, bundles, ONNX graphs, checkpoints and recipes; nothing in them is executed.
    """
    if rules is not None:
        return _lint(path, rules, as_json)
    from deploykit import inspect

    found = inspect.inspect(path)
    click.echo(json.dumps(found, indent=1) if as_json else inspect.as_text(found), nl=as_json)
    return 0


@click.command("models")
@click.argument("pattern", default="")
@click.option("--from", "source", type=click.Choice(["deploykit", "torchvision"]), help="Only networks from there.")
@click.option("--most-parameters", type=click.FloatRange(0), metavar="MILLIONS", help="Only networks with at most so many.")
@click.option("--most-gmacs", type=click.FloatRange(0), metavar="GMACS", help="At most so many 10^9 multiply-accumulates.")
@click.option("--with-weights", is_flag=True, help="Only networks that have default weights.")
@json_option
def models_command(
    pattern: str, source: str | None, most_parameters: float | None, most_gmacs: float | None, with_weights: bool, as_json: bool
) -> None:
    """List the networks that have a name.

    With PATTERN, those whose name holds it. timm's networks are not listed here: timm:NAME takes what timm.list_models() has.
    """
    from deploykit import models
    from deploykit.jsonable import to_json
    from deploykit.report import text

    named = [entry for entry in models.catalogue() if pattern in entry.name]
    if not named:
        raise UsageError(f"no network's name holds {pattern!r}", fix="deploykit models lists all of them")
    found = [
        entry
        for entry in named
        if source in (None, entry.source)
        and (most_parameters is None or entry.parameters <= most_parameters * 1e6)
        and (most_gmacs is None or entry.gmacs <= most_gmacs)
        and (entry.weights is not None or not with_weights)
    ]
    if not found:
        raise UsageError(f"none of {len(named)} networks is all of that", fix="leave one of the filters out")
    click.echo(json.dumps([to_json(entry) for entry in found], indent=1) if as_json else text.models(found), nl=as_json)


@click.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Say what this machine has.

    Versions, CPU features, GPU, and which runtimes load, or why not.
    """
    from deploykit import runtimes
    from deploykit.intake import child
    from deploykit.jsonable import to_json
    from deploykit.machine import Machine
    from deploykit.report import text
    from deploykit.targets import jetpack
    from deploykit.telemetry import board

    machine, given_up = Machine.probe(), child.gives_up()
    engines = jetpack.here(board.l4t() if board.is_jetson() else None, machine.versions.get("tensorrt"))
    found = {name: runtimes.why_not(name) for name in runtimes.REGISTRY}
    if as_json:
        loads = {name: why or "loads" for name, why in found.items()}
        click.echo(
            json.dumps(
                {"machine": to_json(machine), "runtimes": loads, "readers_give_up": given_up, "engines": engines}, indent=1
            )
        )
    else:
        click.echo(text.doctor(machine, found, given_up, engines), nl=False)


@click.command("clean")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Remove the whole run, not only what killed runs left behind.")
@json_option
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


def _lint(path: Path, runtime: str, as_json: bool) -> int:
    from deploykit.quantize import lint

    if not path.exists():
        raise UsageError(f"there is no {printable(path)}", fix=like(path))
    if not path.is_file():
        raise UsageError(f"--rules wants an ONNX file, and {printable(path)} is none", fix="name the model.onnx itself")
    found = lint.lint(path, runtime)
    code = EXIT_CODES[Verdict.FAIL] if lint.is_fatal(found) else 0
    facts = {"path": printable(path), **lint.as_facts(found, runtime), "exit_code": code}
    click.echo(json.dumps(facts, indent=1) if as_json else lint.as_text(found, runtime), nl=as_json)
    return code


@click.group("recipe")
def recipe_group() -> None:
    """Recipes: what runs are made of."""


@recipe_group.command("check")
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@json_option
def check_recipe_command(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Say whether a recipe can be run, without running it: all that is wrong with it at once, else every key with its value.

    RECIPE is a file, or the name of a recipe that comes with deploykit. Exit code 2 when anything is wrong.
    """
    import tomllib

    from deploykit import recipe as recipes

    filled = recipes.dump(named_recipe(recipe, overrides_of(overrides)))
    click.echo(json.dumps(tomllib.loads(filled), indent=1) if as_json else filled, nl=as_json)
    return 0
