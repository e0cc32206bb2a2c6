"""The pages of docs/, executed: their blocks of code, and a folder in which their commands run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    """docs/NAME.md."""
    return (DOCS / f"{name}.md").read_text()


def blocks(text: str, *languages: str) -> list[str]:
    """The blocks of code of a page in these languages ("" for those that name none), in order."""
    return [content for found, content in _BLOCK.findall(text) if found in languages]


@dataclass(frozen=True)
class Work:
    """A folder in which a reader types what a page says; `deploykit` is on the path."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """As a runner of GitHub runs a step: bash that stops at the first error."""
        words = ["bash", "-e", "-c", command]
        settings = {**self.environment, **environment}
        return subprocess.run(words, cwd=self.folder, env=settings, capture_output=True, text=True, timeout=280, check=False)


def program(folder: Path, text: str) -> Path:
    """A folder for the path, in which `deploykit` is this script."""
    folder.mkdir()
    (folder / "deploykit").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "deploykit").chmod(0o755)
    return folder


def environment(programs: Path) -> dict[str, str]:
    """That of a runner: `programs` come first, and nothing says that this is GitHub; one thread, for machines with few cores."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    return {**inherited, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
