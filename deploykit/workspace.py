"""The output folder of a run: whose it is, what may lie in it, and what is removed from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomllib

from deploykit import publish
from deploykit.errors import DeploykitError, UsageError, printable
from deploykit.recipe import Recipe, dump

RECIPE = "recipe.toml"
_OUR_NAMES = re.compile(
    r"recipe\.toml|result\.json|report\.html|training\.html|finetune(\.epochs)?|equalize|calibrate|parity|benchmark|fastest"
    r"|export-(onnx|torchscript)(-fp16)?|quantize-(onnxruntime|openvino|tensorrt)(-fp16)?"
    r"|device\.pyz|[\w.-]+\.bundle|\.packing-\w+"
    r"|build-(onnxruntime|openvino|tensorrt|onnxruntime_cuda|torchscript_cuda)-(fp32|tf32|fp16|bf16|int8)"
)


def clean(out: Path, *, everything: bool = False) -> list[Path]:
    """Remove what killed runs left in `out`, or with `everything` the whole run; returns what was removed.

    Raises UsageError when `out` is not the folder of a run, holds anything else, or another run is at work there.
    """
    for name in (RECIPE, publish.LOCK):  # the lock too, because a user's own recipe may well have that name
        if not (out / name).is_file():
            raise UsageError(f"{printable(out)} is not the output folder of a run", why=f"it has no {name}")
    with publish.lock(out):
        foreign = [name for name in _contents(out) if not _is_ours(out / name)]
        if everything and foreign:
            raise UsageError(
                f"{printable(out)} holds more than a run",
                why=f"it holds {', '.join(map(printable, foreign[:5]))}",
                fix="move that elsewhere first, or remove the folder yourself",
            )
        removed = [out] if everything else _leftovers(out)
        for path in removed:
            publish.remove(path)
    return removed


@contextmanager
def claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """Make `out` this recipe's folder, or refuse when it is another's. Left-overs of killed runs are removed.

    When the work is refused before any stage was done, the folder is nobody's again, so a corrected recipe may have it.
    """
    path, wanted = out / RECIPE, dump(recipe).encode()
    for leftover in _leftovers(out):
        publish.remove(leftover)
    foreign = [printable(name) for name in _contents(out) if name != RECIPE]
    is_new = not path.exists()
    if is_new and foreign:
        raise UsageError(
            f"the output folder {printable(out)} is not empty and not of a run",
            why=f"it holds {', '.join(foreign[:5])}",
            fix="choose another folder with --output",
        )
    if is_new:
        publish.write_file(path, wanted)
    elif path.read_bytes() != wanted:
        raise UsageError(
            f"the output folder {printable(out)} belongs to another recipe",
            problems=_differences(path.read_text(errors="replace"), wanted.decode())[:10],
            fix=f"choose another folder with --output, or remove that one with: deploykit clean --all {printable(out)}",
        )
    try:
        yield
    except DeploykitError:
        if is_new and _contents(out) == [RECIPE]:
            publish.remove(path)
        raise


def _is_ours(path: Path) -> bool:
    """Whether a run gave this name to an entry of its output folder, or to what a killed run left of it."""
    name = path.name
    for suffix in publish.UNFINISHED:
        name = name.removesuffix(suffix)
    return bool(_OUR_NAMES.fullmatch(name))


def _leftovers(out: Path) -> list[Path]:
    """What killed runs left, and nothing that a user happened to call `backup.partial`."""
    return [path for path in publish.leftovers(out) if _is_ours(path)]


def _contents(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name != publish.LOCK)


def _differences(old: str, new: str) -> list[str]:
    """What two recipes ask for differently, key by key."""
    try:
        there, here = _flat(tomllib.loads(old)), _flat(tomllib.loads(new))
    except tomllib.TOMLDecodeError:
        return ["the recipe there is damaged"]
    return [f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in here | there if there.get(key) != here.get(key)]


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
