"""The engines of a release on this device: which there are, what was said of them, and which one runs.

What is said is kept for each engine by `slots`, and counts for that engine alone: another version of the runtime, another CPU or
a file that changed is another engine. One that an update of the device has made stale stays beside the one that is built then.

This module runs on devices: standard library, numpy and one runtime, Python 3.10.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from deploykit import benchmark, bundle, parity, publish, runtimes, slots
from deploykit.artifact import Artifact, Precision, Samples, read_artifact
from deploykit.benchmark import judge as latency_judge
from deploykit.bundle import Manifest
from deploykit.errors import CapabilityError, UsageError, printable
from deploykit.gate import Verdict, parse_rule, worst
from deploykit.jsonable import digest, finite, to_json
from deploykit.machine import Machine


def find(root: Path, id: str, asked: str | None) -> Artifact:
    """The engine of a release that was named, or the only one for this machine."""
    folder = root / slots.ENGINES / slots.release_folder(root, id).name
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in found if not name.endswith(publish.UNFINISHED)]
    keys = {runtime: machine_key(runtime) for runtime in {name.partition("-")[0] for name in found}}
    names = [name for name in found if name == asked or (asked is None and name.endswith(f"-{keys[name.partition('-')[0]]}"))]
    if not names:
        raise UsageError(f"there is no engine of release {id} for this machine", fix="run build first")
    if len(names) > 1:
        raise UsageError(f"there are several engines of release {id}: {', '.join(names)}", fix="name one with --engine")
    return read_artifact(folder / names[0])


def checked(root: Path, id: str, asked: str | None) -> Artifact:
    """The engine to activate: the one that was named, or the only one for this machine."""
    if not slots.read_health(root, id).checked:
        raise UsageError(f"the release {id} has not been checked on this device", fix="run build and parity first")
    engine = find(root, id, asked)
    runtimes.get(str(engine.facts["runtime"])).load(engine).close()
    return engine


def judge(root: Path, id: str, engine: Artifact) -> Mapping[str, Any]:
    """The engine's identity and its parts: `parity` on the golden samples, and `precision`, what really runs in int8.

    It is kept, and an engine that was asked already is not asked again.
    """
    found = slots.read_health(root, id).checked.get(engine.folder.name)
    if found is None or found["identity"] != engine.identity:
        precision = _precision(engine, _model_of(root, id, engine))
        found = {"identity": engine.identity, "parity": _parity(engine), "precision": precision}
        keep(root, id, engine, found)
    return found


def measure(
    root: Path, id: str, engine: Artifact, rules: Sequence[str], *, processes: int, queries: int
) -> tuple[Mapping[str, Any], Verdict | None]:
    """What was said of the engine with `latency`, measured in fresh processes now and kept; and what `rules` say of it, None
    when there is none."""
    found = proven(root, id, engine)
    report = benchmark.benchmark(
        {id: engine}, processes=processes, queries=queries, warmup=5, seed=0, offline_batches=[1], offline_seconds=0.0
    )
    gates = [latency_judge.judge(parse_rule(text), report, id) for text in rules]
    latency = {"median_ns": report.engine(id).median_ns, "doubts": report.doubts, "gates": gates, "rules": rules}
    asked = {"processes": processes, "queries": queries}
    verdict = worst([gate.verdict for gate in gates])
    # Without a rule nothing was asked, and what was asked for nothing passes.
    found = {**found, "latency": to_json({**latency, **asked, "verdict": verdict or Verdict.PASS})}
    keep(root, id, engine, found)
    return found, verdict


def proven(root: Path, id: str, engine: Artifact) -> Mapping[str, Any]:
    """What was said of this engine, as it is now."""
    found = slots.read_health(root, id).checked.get(engine.folder.name)
    if found is None:
        raise UsageError(f"the engine {engine.folder.name} of release {id} has not been checked yet", fix="run parity first")
    if found["identity"] != engine.identity:
        raise UsageError(f"the engine of release {id} is another one than was checked", fix="run parity again")
    return found


def keep(root: Path, id: str, engine: Artifact, found: Mapping[str, Any]) -> None:
    """Write down what was said of one engine; what was said of others, and which one runs, stays."""
    health = slots.read_health(root, id)
    slots.write_health(root, id, replace(health, checked={**health.checked, engine.folder.name: found}))


def verdicts(id: str, found: Mapping[str, Any], manifest: Manifest) -> dict[str, Verdict]:
    """What was said of each part that this release has to pass."""
    if manifest.gate and "latency" not in found:
        raise UsageError(f"the release {id} has a latency budget and was not measured", fix="run benchmark first")
    parts = ("parity", "precision", *(["latency"] if manifest.gate else []))
    return {part: Verdict(found[part]["verdict"]) for part in parts}


def is_running(root: Path, id: str, asked: str | None) -> bool:
    """Whether a current release runs with the engine that was asked for: any, when none was, that is for this machine."""
    found = slots.read_health(root, id).running
    if found is None:
        return False
    key = machine_key(found.engine.partition("-")[0])
    return found.engine.endswith(f"-{key}") if asked is None else found.engine == asked


def run_with(root: Path, id: str, engine: Artifact, verdicts: Mapping[str, Verdict], *, is_trial: bool) -> None:
    """Let the release run with this engine: from now on when it is current, else from its activation on."""
    if is_trial and slots.current(root) == id:
        why = "a trial goes back to another release, and not to another engine"
        raise UsageError(f"the release {id} is current already", why=why, fix="leave --confirm-within out")
    found = slots.Running(engine.folder.name, engine.identity, verdicts)
    slots.write_health(root, id, replace(slots.read_health(root, id), running=found))


def running(root: Path, id: str) -> Artifact | None:
    """The engine that a release runs with; None where none was activated. Raises UsageError when it is damaged."""
    found = slots.read_health(root, id).running
    return None if found is None else read_artifact(root / slots.ENGINES / id / found.engine)


def origin(name: str) -> tuple[str, int]:
    """Which graph of the bundle an engine was built from, and with how many threads, by the name of its folder."""
    label, _, threads = name.rpartition("-")[0].rpartition("-")
    if not label or not threads.isdecimal():
        raise UsageError(f"{printable(name)[:80]!r} is no name of an engine", fix="run build, parity and activate again")
    return label, int(threads)


def machine_key(runtime: str) -> str:
    """Twelve digits for what an engine depends on: the runtime's version and the machine. Whatever makes an engine stale has to
    change them, for the next one is built beside it."""
    place = runtimes.place(runtime) if runtime in runtimes.REGISTRY else None
    return digest(to_json([runtime, place, Machine.probe().identity]))[:12]


def _parity(engine: Artifact) -> dict[str, Any]:
    """Conversion error on the golden samples: the engine against its own graph executed literally."""
    if len(engine.outputs) != 1:
        raise CapabilityError("parity on a device knows networks with one output", why=f"this one has {len(engine.outputs)}")
    samples = _samples(engine)
    session = runtimes.get(str(engine.facts["runtime"])).load(engine)
    try:
        answered = runtimes.answers(session, engine, runtimes.pieces(engine, samples))
    finally:
        session.close()
    found = parity.conversion({engine.outputs[0].name: answered}, samples, engine.precision)
    return cast(dict[str, Any], finite(to_json(found)))


def _samples(engine: Artifact) -> Samples:
    """The golden samples, which are as strange as whoever packed them. Pickles in them are refused, not opened."""
    try:
        found = engine.samples()
        names = {spec.name for spec in engine.outputs}
        if (
            not {spec.name for spec in engine.inputs} <= found.inputs.keys()
            or not names == found.expected.keys() == found.reference.keys()
        ):
            raise ValueError("they are not of this network's inputs and outputs")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"the golden samples of {engine.folder.name} cannot be used", why=str(error)) from error
    return found


def _precision(engine: Artifact, model: Artifact) -> dict[str, Any]:
    """Which layers run in int8, and those that were meant to and do not."""
    found = runtimes.get(str(engine.facts["runtime"])).realised(engine, model)
    if model.precision is not Precision.INT8:
        return {"verdict": Verdict.PASS.value, "int8": found.int8, "layers": len(found.layers), "in_float": []}
    kept = set(cast(Mapping[str, str], model.facts.get("kept_float", model.facts.get("float_layers", {}))))
    floats = [f"{layer.name}: {layer.why}" for layer in found.layers if layer.precision != "int8" and layer.name not in kept]
    verdict = Verdict.FAIL if floats else Verdict.PASS
    return {"verdict": verdict.value, "int8": found.int8, "layers": len(found.layers), "in_float": floats}


def _model_of(root: Path, id: str, engine: Artifact) -> Artifact:
    label, _ = origin(engine.folder.name)
    return read_artifact(slots.release_folder(root, id) / bundle.MODELS / label)
