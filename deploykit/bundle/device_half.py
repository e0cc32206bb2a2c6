"""The device half as a zipapp: every module that runs on a device, and nothing else; the same sources make the same file."""

from __future__ import annotations

import ast
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Where the imports of a device begin: its two doors, and what is imported by name or inside a function.
_ROOTS = (
    *("agent", "agent.commands", "infer", "benchmark.process", "data.pictures"),
    *("runtimes.onnxruntime", "runtimes.openvino", "runtimes.tensorrt"),
)
MOST_BYTES = 200_000
# No syntax of a newer Python before the first line has spoken.
_MAIN = """import sys

if sys.version_info < (3, 10):
    sys.exit("device.pyz wants Python 3.10 or newer, and this is " + sys.version.split()[0])
from deploykit.agent import main

main()
"""
_API = '''"""Run the release that is current on this device: `net = load("/opt/deploykit/NAME/current"); net(array)`."""

from deploykit.infer import Network, load

__all__ = ["Network", "load"]
'''
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)


def modules(package: Path) -> list[Path]:
    """The files of the device half: everything that its doors import when they are imported, found by reading them."""
    found: set[Path] = set()
    left = [_file_of(package, name) for name in _ROOTS]
    while left:
        path = left.pop()
        if path is None or path in found:
            continue
        found.add(path)
        folders = [folder / "__init__.py" for folder in path.parents if folder.is_relative_to(package)]
        left += [folder for folder in folders if folder.parent.name != "data"]
        left += [_file_of(package, name) for name in _imported(ast.parse(path.read_bytes()))]
    return sorted(found)


def has(runtime: str) -> bool:
    """Whether engines of that runtime can be built and run by it."""
    return f"runtimes.{runtime}" in _ROOTS


def zipapp() -> bytes:
    """The device half as one file that Python runs: `python3 device.pyz COMMAND`, or `deploykit_device` from `sys.path`."""
    package = Path(__file__).parents[1]
    files = {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in modules(package)}
    files |= {"__main__.py": _MAIN.encode(), "deploykit_device.py": _API.encode()}
    # The package of pictures alone: the rest of `data` finds and splits data sets, which no device does.
    files["deploykit/data/__init__.py"] = b""
    packed = io.BytesIO()
    packed.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            # A fixed date and mode, for the digest is part of a bundle's identity.
            entry = zipfile.ZipInfo(name, _FIRST_DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[name])
    return packed.getvalue()


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names below `deploykit` that running a module imports, whether they are modules or what is in one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deploykit":
            inside = (node.module or "").removeprefix("deploykit").lstrip(".")
            yield inside
            yield from (f"{inside}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("deploykit.") for alias in node.names if alias.name.startswith("deploykit."))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _is_for_types(node):
            yield from _imported(node)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _file_of(package: Path, name: str) -> Path | None:
    """The file of a module below `deploykit`; None for what is no module of its own, such as a function."""
    place = package.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if name and path.is_file()), None)
