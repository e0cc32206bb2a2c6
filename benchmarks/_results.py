"""Where benchmarks keep their raw samples: DIR/<machine>/<name>.json, with the machine and versions in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.jsonable import to_json
from deploykit.machine import Machine


def write(name: str, content: Mapping[str, Any], output: Path | None) -> None:
    """Write `content` under the machine's own folder; nothing when `output` is None."""
    if output is None:
        return
    path = path_of(name, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = Machine.probe()
    # What follows the kernel's version is the name of somebody's build.
    machine = replace(machine, system=machine.system.partition("-")[0])
    path.write_text(json.dumps({"machine": to_json(machine), **content}, indent=1) + "\n")
    print(f"raw samples: {path}")


def path_of(name: str, output: Path) -> Path:
    """Where a benchmark's raw samples from this machine lie below `output`."""
    machine = Machine.probe()
    features = "vnni" if machine.has_int8_dot_product else "no-vnni"
    folder = re.sub(r"[^a-z0-9]+", "-", f"{machine.cpu} {machine.cores} cores {features}".lower()).strip("-")
    return output / folder / f"{name}.json"
