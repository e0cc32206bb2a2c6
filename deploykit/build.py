"""Artifact -> Artifact: an engine for this machine, or the reason why there is none.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from deploykit import runtimes
from deploykit.artifact import SAMPLES, Artifact
from deploykit.progress import Progress, silent
from deploykit.runtimes import Realised


@dataclass(frozen=True)
class Engine:
    """What became of one model for one runtime: the engine and what its layers run in, or why there is none."""

    runtime: str
    model: Artifact
    built: Artifact | None
    why: str
    realised: Realised | None

    @property
    def label(self) -> str:
        """Runtime and precision, as reports name it."""
        return f"{self.runtime} {self.model.precision.value}"

    @classmethod
    def of(cls, runtime: str, model: Artifact, built: Artifact) -> Engine:
        """A built engine, with the precision of its layers read from the engine itself."""
        return cls(runtime, model, built, "", runtimes.get(runtime).realised(built, model))


def build(model: Artifact, runtime: str, folder: Path, *, threads: int = 0, progress: Progress = silent) -> Artifact:
    """Build `model` for `runtime` into `folder`, its golden samples beside it; `threads` 0 means the cores this process may use.

    `progress` is told of what takes minutes, as TensorRT does.

    Raises CapabilityError when this machine cannot build for that runtime, DeploykitError when the runtime refuses it.
    """
    found = runtimes.get(runtime)
    if runtimes.REGISTRY[runtime].tells_progress:
        engine = cast(runtimes.TellingRuntime, found).build(model, folder, threads=threads, progress=progress)
    else:
        engine = found.build(model, folder, threads=threads)
    shutil.copyfile(model.folder / SAMPLES, folder / SAMPLES)
    return replace(engine, facts={**engine.facts, "model": model.facts.get("model")})
