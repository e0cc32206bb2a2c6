"""The arguments by name that a recipe gives to the function that builds a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from deploykit.errors import ModelError
from deploykit.recipe import SCHEMES

_LONGEST = 300


def check(factory: Callable[..., Any], given: Mapping[str, Any], *, name: str) -> None:
    """Raise ModelError, with the factory's signature, when it cannot be called with these arguments.

    What has no signature, as some builtins, passes: it says by itself what it does not like.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        way = f"give what it takes by --arg KEY=VALUE (model.args): {_described(signature, name)}"
        if "num_classes" not in given and requires(factory, "num_classes"):
            way = f"say how many classes there are: --classes N (model.classes); {_described(signature, name)}"
        raise ModelError(f"{name} cannot be called with {_listed(given)}", why=str(error), fix=way) from error


def none() -> dict[str, Any]:
    """What a published network takes: it is what its name says."""
    return {}


def takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    try:
        return name in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def requires(factory: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, and no default for it."""
    try:
        parameter = inspect.signature(factory).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _described(signature: inspect.Signature, name: str) -> str:
    """A function as one writes its definition, such as `build(width=32, num_classes=10)`."""
    scheme, _, rest = name.rpartition(":")
    text = f"{scheme if scheme in SCHEMES else rest}{signature}".replace("\n", " ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _listed(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in given.items()) or "no arguments"
