"""docs/api.md and docs/api/ held against the code: every name is there, says what it is and has types; nothing is stale."""

from __future__ import annotations

import importlib
import inspect
import io
import runpy
import zipfile
from collections.abc import Iterator
from typing import Any

import griffe
import pytest
from guides import DOCS

from deploykit.bundle import device_half

API: dict[str, Any] = runpy.run_path(str(DOCS / "make_api_md.py"))
PACKAGE: griffe.Module = API["load"]()
NAMES: list[str] = API["names"]()
PAGES: dict[str, str] = API["texts"]()


def imported(name: str) -> object:
    """What a program gets for a name of the pages."""
    module, _, attribute = API["ON_DEVICES"].get(name, name).rpartition(".")
    return getattr(importlib.import_module(f"deploykit.{module}"), attribute)


def callables(thing: griffe.Object) -> Iterator[griffe.Function]:
    if isinstance(thing, griffe.Function):
        yield thing
    elif isinstance(thing, griffe.Class):
        yield from (member for member in API["members"](thing) if isinstance(member, griffe.Function))


def annotations(thing: griffe.Object) -> Iterator[object]:
    """The types in the declaration of a function or class, and of its members."""
    for function in callables(thing):
        yield from (parameter.annotation for parameter in function.parameters)
        yield function.returns
    if isinstance(thing, griffe.Class):
        yield from (member.annotation for member in thing.members.values() if isinstance(member, griffe.Attribute))


def target(path: str) -> griffe.Object:
    found = PACKAGE.modules_collection[path]
    return found.final_target if isinstance(found, griffe.Alias) else found


class TestThePages:
    def test_are_what_the_script_makes_of_the_code(self):
        written = {path.relative_to(DOCS).as_posix(): path.read_text() for path in (DOCS / "api.md", *(DOCS / "api").glob("*"))}

        assert written == PAGES, "run python docs/make_api_md.py"

    def test_are_short_enough_to_be_read(self):
        assert max(text.count("\n") for text in PAGES.values()) <= 800

    def test_name_each_name_once(self):
        assert len(NAMES) == len(set(NAMES))

    def test_link_nothing_outside_the_repository(self):
        assert not [name for name, text in PAGES.items() if "](http" in text]

    def test_tell_of_every_type_of_ours_in_a_signature(self):
        told = {API["of"](PACKAGE, name).path for name in NAMES} | {target(f"deploykit.{name}").path for name in API["TYPES"]}
        used: dict[str, str] = {}
        for name in NAMES:
            for annotation in annotations(API["of"](PACKAGE, name)):
                parts = annotation.iterate(flat=True) if isinstance(annotation, griffe.Expr) else ()
                for part in parts:
                    if isinstance(part, griffe.ExprName) and part.canonical_path.startswith("deploykit."):
                        used[target(part.canonical_path).path] = name

        # The tables of a recipe have a page of their own.
        types = {path for path in used if not path.startswith("deploykit.recipe.tables.")}
        assert not {path: used[path] for path in types - told if not isinstance(target(path), griffe.Module)}
        assert len(used) > 50  # the types were found at all


@pytest.mark.parametrize("name", NAMES)
class TestEveryName:
    def test_can_be_imported_and_says_what_it_is(self, name):
        documentation = inspect.getdoc(imported(name))

        assert documentation
        assert documentation.partition("\n")[0] in "".join(PAGES.values())

    def test_has_types_for_all_that_it_takes_and_gives(self, name):
        for function in callables(API["of"](PACKAGE, name)):
            untyped = [item.name for item in function.parameters if item.annotation is None and item.name not in ("self", "cls")]
            assert not untyped, function.path
            assert function.returns is not None, function.path


def test_a_device_imports_these_names_and_no_others():
    with zipfile.ZipFile(io.BytesIO(device_half.zipapp())) as archive:
        source = archive.read("deploykit_device.py").decode()

    listed = {name.partition(".")[2] for name in API["ON_DEVICES"]}
    assert listed == {name for name in ("load", "Network") if f'"{name}"' in source}
    assert source.partition("__all__ = ")[2].count('"') == 2 * len(listed)
