"""What engines on a GPU without TensorRT depend on: the card and a library's version. And why other ones refuse them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from deploykit.artifact import Artifact, Precision
from deploykit.errors import CapabilityError, UsageError, printable

# TF32 and bfloat16 came with Ampere (NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities"); before it kernels would take
# float32 instead of TF32 without a word.
_SINCE = {Precision.TF32: (8, 0), Precision.BF16: (8, 0)}


@dataclass(frozen=True)
class Card:
    """The GPU that an engine runs on."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class Place:
    """A card, and the version of what drives it."""

    version: str
    card: Card

    @classmethod
    def of(cls, engine: Artifact) -> Place:
        """Where an engine was built. Raises UsageError when its manifest does not say."""
        try:
            told = cast(Mapping[str, Any], engine.facts["place"])
            card = told["card"]
            capability = tuple(map(int, card["compute_capability"]))
            version, name, count = str(told["version"]), str(card["name"]), int(card["multiprocessors"])
            return cls(version, Card(name, (capability[0], capability[1]), count))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            why = f"its manifest does not say where it was built ({type(error).__name__}: {error})"
            raise UsageError(f"cannot load {printable(engine.path)}", why=why, fix="build it with deploykit") from error

    def __str__(self) -> str:
        major, minor = self.card.compute_capability
        return f"{self.card.name} ({major}.{minor}, {self.card.multiprocessors} SMs) with {self.version}"


def require(precision: Precision, card: Card) -> None:
    """Raise CapabilityError where a card has no arithmetic of that precision."""
    since = _SINCE.get(precision, (0, 0))
    if card.compute_capability < since:
        major, minor = card.compute_capability
        raise CapabilityError(
            f"{card.name} has no {precision.value}",
            why=f"its compute capability is {major}.{minor}, and {precision.value} came with {since[0]}.{since[1]}",
            fix='build.float_type = "fp32" or "fp16"',
        )


def why_stale(engine: Artifact, here: Place) -> list[str]:
    """Why an engine has to be built again for what is `here`; none when it need not be. Raises UsageError as `Place.of`."""
    built = Place.of(engine)
    return [] if built == here else [f"it was built on {built}, and here is {here}"]


def check(engine: Artifact, here: Place) -> None:
    """Raise UsageError, naming both places, for an engine that was built elsewhere."""
    built = Place.of(engine)
    if built != here:
        raise UsageError(
            f"cannot load {printable(engine.path)} on this machine",
            why=f"it was built on {built}; here: {here}",
            fix="build it here from the portable file",
        )
