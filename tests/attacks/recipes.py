"""Hostile recipes: what is no TOML, what never ends, and words that a shell would run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from attacks.generate import Attack

_LEAST = b'[model]\nname = "lenet5"\n'


def attacks() -> Iterator[Attack]:
    syntax, keys = "not valid TOML", "not a key|unknown|there is no|expected|is not|names nothing|must"
    contents: dict[str, tuple[str, bytes]] = {
        "nested": (syntax, b"name = " + b"[" * 100_000),
        "nested-tables": (syntax, b"name = " + b"{a=" * 100_000),
        "thousands-of-digits": (syntax, b"name = " + b"9" * 5000),
        "not-utf8": (syntax, b"name = '\xff'"),
        "binary": (syntax, bytes(range(256))),
        "key-twice": (syntax, _LEAST + b"name = 'resnet18'\n"),
        "table-twice": (syntax, _LEAST * 2),
        "cut": (syntax, b"[model]\nname = "),
        "utf16": (syntax, _LEAST.decode().encode("utf-16")),
        "yaml-tag": (syntax, b"name: !!python/object/apply:os.system ['touch marker']\n"),
        "yaml-aliases": (syntax, b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n"),
        "json": (syntax, b'{"model": {"name": "lenet5"}}'),
        "pickle": (syntax, b"cposix\nsystem\n(S'touch marker'\ntR."),
        "web-page": (syntax, b"<!DOCTYPE html>"),
        "escape-sequence": (keys, b'[model]\nname = "lenet5"\n"\\u001b[2J" = 1\n'),
        "unknown-table": (keys, _LEAST + b"[hooks]\nbefore = 'touch marker'\n"),
        "zero-byte": (keys, b'[model]\nname = "a\\u0000b"\n'),
        "other-type": (keys, b"[model]\nname = ['lenet5', 'resnet18']\n"),
        "date": (keys, b"[model]\nname = 1979-05-27\n"),
        "infinite": (keys, _LEAST + b"[export]\ntolerance = inf\n"),
        "not-a-number": (keys, _LEAST + b"[export]\ntolerance = nan\n"),
        "huge-number": (keys, _LEAST + b"classes = 0x" + b"f" * 5000 + b"\n"),
        "home-of-nobody": (keys, _LEAST + b'[data]\ntrain = "~nobody-of-that-name/x"\n[finetune]\n'),
    }
    for name, (told, content) in contents.items():

        def make(folder: Path, _: Path, content: bytes = content) -> Path:
            path = folder / "recipe.toml"
            path.write_bytes(content)
            return path

        yield Attack(f"recipe-{name}", told, make, door="recipe")
    yield Attack("recipe-of-a-terabyte", "larger than", lambda folder, _: _sparse(folder / "recipe.toml"), door="recipe")
    yield Attack("recipe-missing", "no such file", lambda folder, _: folder / "recipe.toml", door="recipe")
    yield Attack("recipe-folder", "is a directory", lambda folder, _: folder, door="recipe")


def _sparse(path: Path) -> Path:
    path.touch()
    os.truncate(path, 1 << 40)
    return path
