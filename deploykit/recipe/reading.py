"""TOML, or a mapping -> a recipe that is checked: unknown keys, wrong types and values out of range are raised together.

Relative paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal

from deploykit.errors import RecipeError, is_utf8, printable
from deploykit.jsonable import to_json
from deploykit.recipe.meaning import contradictions
from deploykit.recipe.tables import BenchmarkTable, Recipe, declared, table_class

_SIZE_LIMIT_BYTES = 1 << 20


def load(
    path: Path,
    overrides: Mapping[str, str] | None = None,
    *,
    base: Path | None = None,
    overrides_base: Path | None = None,
) -> Recipe:
    """Read a TOML file; `overrides` maps `table.key` to a value in TOML syntax (bare words are text).

    Relative paths are relative to `base`, by default the recipe's folder; those in `overrides` to `overrides_base`, if given.

    Raises RecipeError with all problems at once: unreadable file, TOML syntax, unknown keys, types, ranges, meaning.
    """
    import tomllib  # not in Python 3.10, where the device half still imports this module's floor

    try:
        if path.stat().st_size > _SIZE_LIMIT_BYTES:
            raise RecipeError(f"{printable(path)} is not a recipe", why=f"it is larger than {_SIZE_LIMIT_BYTES} bytes")
        content: dict[str, Any] = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    except (ValueError, RecursionError) as error:  # TOML syntax, not UTF-8, a number of thousands of digits, deep nesting
        raise RecipeError(f"{printable(path)} is not valid TOML", why=str(error)) from error
    source = printable(path)
    return parse(content, base=base or path.parent, source=source, overrides=overrides, overrides_base=overrides_base)


def shipped(name: str) -> Path | None:
    """The file of a recipe that comes with deploykit, by its bare name; None when there is none of that name."""
    # Beside the package in a checkout, inside it in a wheel.
    for folder in (Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes"):
        path = folder / f"{name}.toml"
        if path.parent == folder and path.is_file():
            return path
    return None


def parse(
    content: Mapping[str, Any],
    *,
    base: Path,
    source: str,
    overrides: Mapping[str, str] | None = None,
    overrides_base: Path | None = None,
) -> Recipe:
    """Check a mapping and make a Recipe of it; `source` names it in messages.

    Relative paths are taken from `base`, those in `overrides` from `overrides_base`: what stands in a file is relative to
    the file, what is typed is relative to where it is typed.

    Raises RecipeError listing every problem with its table and key.
    """
    problems: list[str] = []
    paths = {name for name, item, _ in declared() if item.metadata.get("path")}
    for dotted, text in (overrides or {}).items():
        value = _toml_value(text)
        if dotted in paths and isinstance(value, str) and overrides_base is not None:
            value = _text(value, dotted, overrides_base.absolute(), problems)
        content = _overridden(content, dotted.split("."), value)
    values = _table(Recipe, content, "", base.absolute(), problems)
    if problems:
        raise RecipeError(f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)
    recipe = Recipe(**values)
    problems = list(contradictions(recipe))
    if problems:
        raise RecipeError(f"{source} asks for what cannot be done", problems=problems)
    return recipe


def benchmark_table(content: Mapping[str, Any], source: str) -> BenchmarkTable:
    """The benchmark table alone, checked like a whole recipe's. Raises RecipeError listing every problem."""
    problems: list[str] = []
    values = _table(BenchmarkTable, content, "benchmark", Path(), problems)
    if problems:
        raise RecipeError(f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)
    return BenchmarkTable(**values)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML, keys at their default included, so that it says everything; `parse` gives it back."""
    import tomli_w

    return tomli_w.dumps(typing.cast(Mapping[str, Any], _without_none(to_json(recipe))))


def _table(cls: type[Any], content: Any, where: str, base: Path, problems: list[str]) -> dict[str, Any]:
    name = f"[{where}]" if where else "the recipe"
    if not isinstance(content, Mapping):
        problems.append(f"{where}: expected a table, got {_quote(content)}")
        return {}
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    for key in content:
        if key not in known:
            problems.append(f"{name}: unknown key {key!r}{_nearest(key, known)}")
    values: dict[str, Any] = {}
    for key, item in known.items():
        dotted = f"{where}.{key}" if where else key
        table = table_class(hints[key])
        if key not in content:
            if item.default is MISSING:
                problems.append(f"{name}: {key!r} is missing ({item.metadata.get('help', 'a table')})")
        elif table is not None:
            inner = _table(table, content[key], dotted, base, problems)
            if not problems:
                values[key] = table(**inner)
        else:
            values[key] = _value(hints[key], item, content[key], dotted, base, problems)
    return values


def _value(hint: Any, item: Field[Any], value: Any, dotted: str, base: Path, problems: list[str]) -> Any:
    """One key's value in its declared type, or a problem."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            problems.append(f"{dotted}: expected a list, got {_quote(value)}")
            return ()
        return tuple(_value(arguments[0], item, entry, dotted, base, problems) for entry in value)
    options = [
        option for option in (arguments if origin in (types.UnionType, typing.Union) else (hint,)) if option is not type(None)
    ]
    for option in options:
        if typing.get_origin(option) is tuple:
            return _value(option, item, value, dotted, base, problems)
        if typing.get_origin(option) is Mapping and isinstance(value, Mapping):
            return _arguments(value, dotted, problems)
        if typing.get_origin(option) is Literal and any(
            value == word and type(value) is type(word) for word in typing.get_args(option)
        ):
            return value
        if option is float and type(value) in (int, float):
            return float(value) if _in_range(item, value, dotted, problems) else value
        if option is type(value):
            if option is int:
                _in_range(item, value, dotted, problems)
            if option is str:
                return _text(value, dotted, base if item.metadata["path"] else None, problems)
            return value
    problems.append(f"{dotted}: expected {' or '.join(map(_type_name, options))}, got {_quote(value)}")
    return value


def _arguments(content: Mapping[str, Any], dotted: str, problems: list[str]) -> dict[str, Any]:
    """A table of arguments by name, whose values are of TOML's plain types."""
    problems += [f"{dotted}: {_quote(key)} cannot be the name of a parameter" for key in content if not key.isidentifier()]
    problems += [
        f"{dotted}.{key}: expected text, a finite number, true, false or a list of these, got {_quote(value)}"
        for key, value in content.items()
        if not _is_plain(value)
    ]
    return dict(content)


def _is_plain(value: Any) -> bool:
    """Whether a value can be written as TOML and as JSON: 64-bit whole numbers, no dates, no NaN."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return is_utf8(value) if isinstance(value, str) else isinstance(value, float) and abs(value) < float("inf")


def _text(value: str, dotted: str, base: Path | None, problems: list[str]) -> str:
    """Text as it is or, with a `base`, as a path taken from there."""
    if not value or "\0" in value:
        problems.append(f"{dotted}: {_quote(value)} names nothing; leave the key out, or give it a value")
    elif not is_utf8(value):
        problems.append(f"{dotted}: {printable(value)} is not UTF-8, and recipes are; rename it or make a link to it")
    elif base is not None:
        try:
            return _located(value, dotted, base)
        except RuntimeError:
            problems.append(f"{dotted}: {_quote(value)} starts with the home directory of a user that is not known here")
    return value


def _located(value: str, dotted: str, base: Path) -> str:
    """A path taken from `base`; words that are not paths, and the names of networks, stay as they are."""
    if dotted == "model.weights" and value in ("default", "none"):
        return value
    if dotted != "model.name":
        return str(base / Path(value).expanduser())
    file, _, factory = value.rpartition(":")
    return f"{base / Path(file).expanduser()}:{factory}" if file.endswith(".py") else value


def _in_range(item: Field[Any], value: Any, dotted: str, problems: list[str]) -> bool:
    low, high = item.metadata["low"], item.metadata["high"]
    # Written so that NaN, which compares false with everything, is out of every range.
    inside = (low is None or value >= low) and (high is None or value <= high)
    if not inside:
        problems.append(f"{dotted}: {_quote(value)} is not between {low} and {high}")
    return inside


def _overridden(content: Mapping[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of `content` with the value at that path; tables on the way are made."""
    head, *rest = keys
    if not rest:
        return {**content, head: value}
    inner = content.get(head, {})
    return {**content, head: _overridden(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _toml_value(text: str) -> Any:
    """A value in TOML's syntax; a bare word is text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is Mapping:
        return "a table"
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(option))
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(option, str(option))


def _quote(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write down whole numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
