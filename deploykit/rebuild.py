"""Engines of a release, built on this device, and built again where an update of it has made them stale.

This module runs on devices: standard library, numpy and one runtime, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deploykit import artifact, bundle, engines, infer, publish, runtimes, slots
from deploykit import build as builder
from deploykit.artifact import Artifact, read_artifact
from deploykit.bundle import Manifest
from deploykit.errors import CapabilityError, DeploykitError, UsageError
from deploykit.gate import Verdict, worst

MEASURED = {"processes": 10, "queries": 30}  # of a benchmark, when nothing else is asked for
_BUILD_COPIES = 4  # the engine, its golden samples, and what the optimizer writes on the way


def built(root: Path, id: str, label: str, threads: int) -> tuple[Artifact, bool]:
    """The engine of a release's graph for this machine, and whether it was built just now."""
    runtime, model = label.partition("-")[0], read_artifact(slots.release_folder(root, id) / bundle.MODELS / label)
    publish.require_space(root, _BUILD_COPIES * model.path.stat().st_size)
    key = engines.machine_key(runtime)
    final = root / slots.ENGINES / id / f"{label}-{threads}-{key}"
    found = artifact.find(final, key)
    if found is not None:
        return found, False
    _refuse_replacing(root, id, final)
    slots.make_folder(final.parent)
    return artifact.make(final, key, lambda folder: builder.build(model, runtime, folder, threads=threads)), True


def label(manifest: Manifest, asked: str | None) -> str:
    """Which graph of a bundle to build: the one that was named, or the only one whose runtime is here."""
    if asked is not None:
        if asked not in manifest.models:
            raise UsageError(f"the bundle has no graph {asked!r}", why=f"it has {', '.join(manifest.models) or 'none'}")
        return asked
    why = {
        label: runtimes.why_not(label.partition("-")[0])
        for label in manifest.models
        if label.partition("-")[0] in runtimes.REGISTRY
    }
    able = [label for label, reason in why.items() if not reason]
    if not able:
        problems = [f"{label}: {reason}" for label, reason in why.items()]
        raise CapabilityError("no graph of the bundle can be built here", problems=problems)
    if len(able) > 1:
        raise UsageError(f"several graphs can be built here: {', '.join(able)}", fix="name one with --model")
    return able[0]


def preflight(root: Path, id: str) -> str:
    """Whether the engine of a release loads here, in words, with what to do where it does not."""
    try:
        engine = engines.running(root, id)
        if engine is None:
            return "no engine was activated"
        found = runtimes.preflight(engine)
    except DeploykitError as error:
        return f"{error.what}: {error.why}"
    return found if found == runtimes.LOADS else f"{found}; run {infer.rebuild_command(root)}"


def stale(root: Path, ids: Iterable[str]) -> dict[str, str]:
    """The releases among `ids` whose engine has to be built again before this machine can load it, each with the reasons.

    Raises UsageError when there is one while a release is on trial.
    """
    active = {id: engine for id in ids if (engine := engines.running(root, id)) is not None}
    found = {id: why for id, engine in active.items() if (why := runtimes.preflight(engine)) != runtimes.LOADS}
    trial = slots.read_state(root).trial
    if found and trial is not None and slots.previous(root) is not None:
        why = "building an engine may take longer than the trial, and the release could not be confirmed meanwhile"
        raise UsageError(f"the release {trial.id} is on trial", why=why, fix="confirm it, or roll back, then recover --rebuild")
    return found


def rebuilt(root: Path, manifest: Manifest) -> tuple[dict[str, Any], Verdict | None]:
    """Build the engine of a release anew, from the graph and with the threads of the one that it runs with, and let it run with
    the new one when that passes what the old one had to pass; what was found, and the verdict.

    After a power cut, what was built and judged before is not done again, and until the end the old one is what is written down.
    Raises CapabilityError when its runtime is not here any more, DeploykitError when that refuses to build it.
    """
    id = manifest.id
    before = slots.read_health(root, id)
    if before.running is None:
        raise UsageError(f"the release {id} has no engine that passed here", fix="run build, parity and activate")
    graph, threads = engines.origin(before.running.engine)
    engine, is_new = built(root, id, label(manifest, graph), threads)
    found = engines.judge(root, id, engine)
    # What was measured and is not good enough may have been so because of what ran beside it.
    if manifest.gate and found.get("latency", {}).get("verdict") != Verdict.PASS.value:
        asked = _asked_of(before.checked.get(before.running.engine, {}))
        found, _ = engines.measure(root, id, engine, manifest.gate, **asked)
    verdicts = engines.verdicts(id, found, manifest)
    verdict = worst(verdicts.values())
    if verdict is Verdict.PASS:
        engines.run_with(root, id, engine, verdicts, is_trial=False)
    facts = {"left": before.running.engine, "engine": engine.folder.name, "built": is_new}
    return {**facts, "activated": verdict is Verdict.PASS, **found}, verdict


def _asked_of(found: Mapping[str, Any]) -> dict[str, int]:
    """How an engine was measured, for another one to be measured in the same way."""
    latency = found.get("latency", {})
    settings = {name: latency.get(name) for name in MEASURED}
    return {name: value if isinstance(value, int) else MEASURED[name] for name, value in settings.items()}


def _refuse_replacing(root: Path, id: str, final: Path) -> None:
    """An engine that answers right now is not built over: between two renames there would be none."""
    if final.exists() and slots.current(root) == id:
        raise UsageError(f"the engine {final.name} of the current release is damaged", fix="roll back, then build it again")
