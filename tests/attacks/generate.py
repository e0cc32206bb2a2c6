"""All attacks, as functions that write them. As a script: `python -m attacks.generate FOLDER` writes each below FOLDER.

`told` is what deploykit says to it, as a regular expression; nothing but the right reason counts as refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Door = Literal["checkpoint", "graph", "picture", "classes", "recipe"]


@dataclass(frozen=True)
class Attack:
    """`make` gets a folder to write into and the marker that the attack tries to touch, and gives what is to be opened."""

    name: str
    told: str
    make: Callable[[Path, Path], Path]
    door: Door


def everything() -> Iterator[Attack]:
    from attacks import checkpoints, graphs, names, pictures, recipes

    yield from checkpoints.attacks()
    yield from graphs.attacks()
    yield from pictures.attacks()
    yield from recipes.attacks()
    yield from names.attacks()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for attack in everything():
        folder = root / attack.name.replace("/", "_")
        folder.mkdir(parents=True)
        sys.stdout.write(f"{attack.make(folder, root / 'marker')}\n")
