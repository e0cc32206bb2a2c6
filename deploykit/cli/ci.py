"""What a command with gates says to people and to CI: its result, JUnit, Markdown, and annotations on GitHub."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import click

from deploykit import publish
from deploykit.cli.options import json_option
from deploykit.errors import DeploykitError, UsageError, printable, translating_os_errors

if TYPE_CHECKING:
    from deploykit.report.summary import Summary


Kind = Literal["run", "benchmark", "parity", "bisect"]


def for_ci(kind: Kind) -> Callable[[Callable[..., Mapping[str, Any]]], Callable[..., int]]:
    """Options of a command that has gates. The command gives its result, which is told here: printed, and as what CI reads."""

    def decorate(command: Callable[..., Mapping[str, Any]]) -> Callable[..., int]:
        @click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write the gates as JUnit XML.")
        @click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write a summary as Markdown.")
        @json_option
        @functools.wraps(command)
        def told(*, junit: Path | None, markdown: Path | None, as_json: bool, **words: Any) -> int:
            make_room(junit, markdown)
            start = perf_counter()
            found = command(**words)
            tell(summary_of(kind, found, perf_counter() - start), junit, markdown)
            if as_json:
                click.echo(json.dumps(found))
            else:
                click.echo(_text_of(kind, found), nl=False)
            return int(found["exit_code"])

        return told

    return decorate


def _text_of(kind: Kind, found: Mapping[str, Any]) -> str:
    if kind == "bisect":
        from deploykit.bisect.text import as_text

        return as_text(found)
    from deploykit.report import text

    return {"run": text.run, "benchmark": text.benchmark, "parity": text.parity}[kind](found)


def make_room(junit: Path | None, markdown: Path | None) -> None:
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


def summary_of(kind: Kind, found: Mapping[str, Any], seconds: float) -> Summary:
    """What CI reads, of the result of one kind of command."""
    from deploykit.report import summary

    if kind == "run":
        return summary.of_run(found)
    return {"benchmark": summary.of_benchmark, "parity": summary.of_parity, "bisect": summary.of_bisect}[kind](
        found, seconds=seconds
    )


def tell(found: Summary, junit_file: Path | None, markdown_file: Path | None) -> None:
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


def tell_of(error: Exception) -> None:
    """The same for an error of a command that has gates, so that a page is never empty.

    Whatever goes wrong here is said beside it.
    """
    from deploykit.report import summary

    files = [_named("--junit"), _named("--markdown")]
    junit, markdown = (path if path and not _why_not_replaceable(path) else None for path in files)
    try:
        tell(summary.of_error(error, sys.argv[1]), junit, None if markdown == junit else markdown)
    except DeploykitError as another:
        click.echo(f"error: {another}", err=True)


def _named(option: str) -> Path | None:
    """The file after an option on the command line, which may be one that could not be parsed."""
    words = sys.argv[2:]
    after = [following for word, following in pairwise(words) if word == option]
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return next((Path(name) for name in (*after, *joined)), None)
