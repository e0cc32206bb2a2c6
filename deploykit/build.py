"""Artifact -> Artifact: an engine for this machine, or the reason why there is none.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from deploykit import runtimes
from deploykit.artifact import SAMPLES, Artifact
from deploykit.gate import REALISED, GateResult, Verdict
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


def realised_gate(engine: Engine) -> GateResult:
    """Asked for INT8: every layer runs in it, but those that the recipe keeps in float, by name or by the SQNR it asks for.

    Raises ValueError when nothing was built, so nothing is known about it.
    """
    if engine.realised is None:
        raise ValueError(f"{engine.label} was not built")
    facts = cast(Mapping[str, Any], engine.model.facts)
    whys = facts.get("float_layers") or {}
    kept = facts.get("kept_float", whys)
    quantized = [layer.name for layer in engine.realised.layers if layer.precision == "int8" and layer.name in kept]
    floats = [layer for layer in engine.realised.layers if layer.precision != "int8" and layer.name not in kept]
    reason = f"{engine.realised.int8} of {len(engine.realised.layers)} layers run in int8"
    for why, names in _by_reason({name: whys.get(name, "") for name in kept}).items():
        reason += f"; kept in float, {why}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
    if floats:
        named = ", ".join(f"{layer.name} ({layer.why})" for layer in floats[:5])
        reason += f"; in float: {named}{', ...' * (len(floats) > 5)}; quantize.float_layers accepts that by name"
    if quantized:
        reason += f"; in int8 although they were to stay in float: {', '.join(quantized)}"
    verdict = Verdict.FAIL if floats or quantized else Verdict.PASS
    return GateResult(f"{engine.label}: {REALISED}", verdict, engine.realised.int8, None, reason)


def _by_reason(whys: Mapping[str, str]) -> dict[str, list[str]]:
    """The layers of each reason; what a search measured at a single layer stands beside that layer's name."""
    found: dict[str, list[str]] = {}
    for name, why in whys.items():
        reason, colon, measured = why.partition(": ")
        found.setdefault(reason, []).append(f"{name} ({measured})" if colon else name)
    return found
