"""What a command of the device half found, and what this device is: all that `probe` needs.

This module runs on devices: standard library, numpy and one runtime, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploykit import runtimes
from deploykit.machine import Machine, installed_version


@dataclass(frozen=True)
class Answer:
    """What a command found, as plain JSON values, and its exit code."""

    facts: Mapping[str, Any]
    code: int = 0


def probe(_asked: object = None) -> Answer:
    """What this device is: machine, versions, and which runtimes load."""
    names = ("onnxruntime", "openvino", "tensorrt")
    found = {name: runtimes.why_not(name) or "loads" for name in names if installed_version(runtimes.REGISTRY[name].package)}
    return Answer({"machine": Machine.probe(), "runtimes": found})
