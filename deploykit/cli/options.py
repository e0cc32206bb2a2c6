"""Options that several commands have, and progress for people who watch."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from deploykit import recipe as recipes
from deploykit.errors import UsageError
from deploykit.recipe import Recipe


def recipe_option(flag: str, key: str, **overrides: Any) -> Callable[..., Any]:
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


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
output_option = click.option("--output", type=click.Path(path_type=Path), help="Folder of the results.")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Set any key of the recipe; the value in TOML syntax."
)
skip_option = click.option("--skip-bad-images", is_flag=True, help="Leave out unreadable images, and count them.")
argument_option = click.option(
    "--arg",
    "words",
    multiple=True,
    metavar="KEY=VALUE",
    help="An argument for the function that builds the network; the value in TOML syntax. May be given several times.",
)


def arguments_of(texts: tuple[str, ...]) -> dict[str, str]:
    """Arguments of the network as keys of the recipe."""
    return {f"model.args.{key}": value for key, value in pairs("--arg", texts, "width=64").items()}


def overrides_of(texts: tuple[str, ...]) -> dict[str, str]:
    """What --set says, by key. Raises UsageError for a text without an equals sign."""
    return pairs("--set", texts, "preprocess.crop=64", form="TABLE.KEY=VALUE")


def named_recipe(word: Path, settings: Mapping[str, str]) -> Recipe:
    """The recipe of that file, or the one that comes with deploykit by that bare name.

    A recipe of ours names the user's folders, so its paths are taken from where the user is and not from where it is installed.
    Raises RecipeError.
    """
    here, ours = Path.cwd(), recipes.shipped(str(word))
    return recipes.load(ours or word, settings, base=None if ours is None else here, overrides_base=here)


def pairs(option: str, texts: tuple[str, ...], example: str, *, form: str = "KEY=VALUE") -> dict[str, str]:
    """The texts after one option, each KEY=VALUE. Raises UsageError, with an example, for one that is not."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {text!r} is not of the form {form}", fix=f"{option} {example}")
        found[key.strip()] = value.strip()
    return found


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each piece of long work, on standard error; nothing when that is not a terminal.

    What is being done may be `things | details`: all details of one kind of thing share a bar, which shows how many it does in
    a second.
    """
    if not sys.stderr.isatty():
        from deploykit.progress import silent

        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            name, _, detail = what.partition(" | ")
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, detail="")
            task = next(one for one in bars.tasks if one.id == tasks[name])
            if done < task.completed:  # another epoch
                bars.reset(tasks[name])
            if detail and task.speed:
                detail += f", {task.speed:.0f} {name}/s"
            bars.update(tasks[name], completed=done, total=total, detail=detail)

        yield show
