"""The sections about the run itself: its stages, recipe and machine, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.report import units
from deploykit.report.markup import Child, element
from deploykit.report.parts import Column, Result, absent, chip, facts, table, words_of


def stages(result: Result) -> Child:
    """What ran, for how long, and where its files are."""
    ran: Sequence[Result] = result.get("stages") or ()
    if not ran:
        return absent("Stages", "none was recorded")
    columns = [Column("Stage"), Column("Status"), Column("Time", numeric=True), Column("Files"), Column("Result")]
    rows = [
        (
            words_of(stage.get("name")),
            chip(words_of(stage.get("status"), "unknown")),
            "none" if stage.get("seconds") is None else units.seconds(stage["seconds"]),
            element("code", stage["path"]) if stage.get("path") else "none",
            words_of(stage.get("summary"), "nothing to say"),
        )
        for stage in ran
    ]
    total = sum(stage.get("seconds") or 0.0 for stage in ran)
    return table(f"The run took {units.seconds(total)} in all", columns, rows)


def recipe(result: Result) -> Child:
    """The whole recipe, defaults included."""
    text = result.get("recipe")
    return element("pre", element("code", text)) if text else absent("Recipe", "none was recorded")


def machine(result: Result) -> Child:
    """Where the numbers were measured."""
    here: Result = result.get("machine") or {}
    if not here:
        return absent("Machine", "not recorded")
    versions: Result = here.get("versions") or {}
    return [
        facts(
            (
                ("CPU", f"{words_of(here.get('cpu'), 'unknown')} ({words_of(here.get('arch'), 'unknown')})"),
                ("Cores of this process", units.count(here.get("cores"))),
                ("CPU features", ", ".join(here.get("features") or ()) or "none that matter here"),
                ("Memory", units.memory(here.get("memory_bytes"))),
                ("GPU", words_of(here.get("gpu"), "none found")),
                ("System", words_of(here.get("system"), "unknown")),
                ("Python", words_of(here.get("python"), "unknown")),
            )
        ),
        element("h3", "Versions"),
        facts((name, str(version)) for name, version in versions.items()) if versions else absent("Versions", "not recorded"),
    ]


def reproduce(result: Result) -> Child:
    """The steps that give this page again."""
    return element(
        "ol",
        element("li", "Save the recipe above as ", element("code", "recipe.toml"), "; its seeds fix every random choice."),
        element("li", "Install the versions listed under Machine, on a machine like that one if latency is to be compared."),
        element("li", "Run", element("pre", element("code", words_of(result.get("command"), "deploykit run recipe.toml")))),
        element("li", "All numbers of this page, raw samples included, are in ", element("code", "result.json"), " beside it."),
    )
