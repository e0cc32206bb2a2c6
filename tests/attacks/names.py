"""Files whose harm is in their name: what a shell would run, an option, another line, bytes that are no text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from attacks.generate import Attack, Door

_CALLED = {
    "space": "my weights",
    "quotes": "a'b\"c",
    "shell-dollar": "$(touch marker)",
    "shell-backtick": "`touch marker`",
    "shell-semicolon": "a;touch marker;b",
    "shell-pipe": "a|touch marker",
    "shell-glob": "*",
    "option": "-rf",
    "long-option": "--output",
    "format": "%s%n{0}",
    "line-break": "a\nerror: b",
    "carriage-return": "a\rb",
    "escape-sequence": "\x1b[2Ja",
    "bell": "a\x07",
    "other-direction": "a\u202egnp",
    "no-width": "a\u200b",
    "not-utf8": os.fsdecode(b"\xff\xfe"),
    "half-a-letter": os.fsdecode(b"caf\xc3"),
    "very-long": "a" * 240,
}
_NO_CONTENT: dict[Door, tuple[str, str]] = {
    "checkpoint": (".pth", "web page"),
    "graph": (".onnx", "is not an ONNX file"),
    "recipe": (".toml", "not valid TOML"),
}


def attacks() -> Iterator[Attack]:
    for door, (suffix, told) in _NO_CONTENT.items():
        for name, called in _CALLED.items():

            def make(folder: Path, _: Path, file: str = f"{called}{suffix}") -> Path:
                path = folder / file
                path.write_bytes(b"<!DOCTYPE html><html>")
                return path

            yield Attack(f"{door}-called-{name}", told, make, door=door)
