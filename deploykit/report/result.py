"""What a run found, as the one JSON value that `--json` prints, `result.json` keeps and the page is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.artifact import Artifact, Format, Precision
from deploykit.build import Engine
from deploykit.gate import EXIT_CODES, Verdict, worst
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.recipe import Recipe, dump
from deploykit.report import device, units

SCHEMA = 1


@dataclass(frozen=True)
class Stage:
    """What became of one stage. `status` is done, skipped (it was finished before) or not built; `path` is its folder."""

    name: str
    status: str
    seconds: float
    path: str
    summary: str


def result(
    made: Mapping[str, Artifact],
    stages: Sequence[Stage],
    engines: Sequence[Engine],
    compared: Mapping[str, Any],
    measured: Mapping[str, Any] | None,
    gates: Sequence[Mapping[str, Any]],
    layer_ns: Mapping[str, Mapping[str, float]],
    *,
    fastest: Mapping[str, Any] | None = None,
    recipe: Recipe,
    command: str,
) -> dict[str, Any]:
    """Bring everything together. `made` maps stages to artifacts; `gates` are all that were judged; `layer_ns` holds the
    time of layers by engine, where it was measured; `fastest` says which engine
    was kept, where only one was wanted.

    `exit_code` is 0, 3 when a gate failed, or 5 when one cannot be decided.
    """
    exports = [found for found in made.values() if found.stage == "export"]
    portable = [found for found in made.values() if found.stage == "quantize"]
    first = exports[0]
    verdict = worst(Verdict(found["verdict"]) for found in gates)
    return {
        "schema": SCHEMA,
        "name": recipe.name,
        "verdict": None if verdict is None else verdict.value,
        "exit_code": EXIT_CODES[verdict],
        "headline": [*_headline(engines, compared, measured), *_kept(fastest, measured)],
        "fastest": fastest,
        "model": {
            "name": recipe.model.name,
            "weights": first.facts["weights"],
            "random": compared["random"],
            "parameters": compared["parameters"],
            "input": list(first.preprocess.shape),
            "classes": list(first.classes),
            "num_classes": first.facts.get("num_classes", first.outputs[0].shape[1]),
            "notes": compared["notes"],
        },
        "stages": [asdict(stage) for stage in stages],
        "finetune": _finetune(made["finetune"]) if "finetune" in made else None,
        "exports": [_export(found) for found in (*exports, *portable)],
        "calibration": _calibration(recipe, made["calibrate"]) if "calibrate" in made else None,
        "engines": [_engine(engine, recipe, layer_ns.get(engine.label, {})) for engine in engines],
        "parity": compared["parity"],
        "evaluated_on": compared["evaluated_on"],
        "gates": list(gates),
        "visible_drop_points": compared["visible_drop_points"],
        "benchmark": measured,
        "samples": compared["samples"],
        "recipe": dump(recipe),
        "machine": to_json(Machine.probe()),
        "command": command,
    }


def _headline(engines: Sequence[Engine], compared: Mapping[str, Any], measured: Mapping[str, Any] | None) -> list[str]:
    missing = {engine.runtime: engine.why for engine in engines if engine.built is None}
    lines = [f"no {runtime} engine was built: {why}" for runtime, why in missing.items()]
    for engine in engines:
        if engine.model.precision is Precision.INT8 and engine.realised is not None:
            lines.append(f"{engine.runtime} int8 {engine.realised.int8}/{len(engine.realised.layers)}")
            if not engine.realised.int8:
                lines.append(f"{engine.label} has no layer in int8: it is the float network under this name")
    for case in compared["parity"]:
        if case["precision"] == Precision.INT8.value:
            decided = f"{units.decided_otherwise(case)} decided otherwise than FP32 PyTorch"
            lines.append(f"{case['label']}: {decided}")
            if case["accuracy"] is not None:
                mine, theirs = 100 * case["accuracy"]["engine"], 100 * case["accuracy"]["reference"]
                lines.append(f"{case['label']}: accuracy {mine:.2f} % (FP32 {theirs:.2f} %)")
    for ratio in (measured or {}).get("ratios", []):
        low, high = ratio["interval"]
        slower = ": INT8 is slower here" if low > 1 else ""
        if measured is not None and measured["warnings"]:
            slower += "; but the benchmark is invalid"
        lines.append(f"latency {ratio['ratio']:.3g} times FP32 (95 % {low:.3g} to {high:.3g}){slower}")
    return lines


def _kept(fastest: Mapping[str, Any] | None, measured: Mapping[str, Any] | None) -> list[str]:
    """The engine that was kept, and what it takes of the others' time."""
    if fastest is None:
        return []
    times = [
        f"{found['ratio']:.3g} times {label} (95 % {found['interval'][0]:.3g} to {found['interval'][1]:.3g})"
        for label, found in fastest["over"].items()
    ]
    doubt = "; but the benchmark is invalid" if measured is not None and measured["warnings"] else ""
    return [f"fastest: {fastest['label']}, {fastest['latency_ns'] / 1e6:.3g} ms{': ' * bool(times)}{', '.join(times)}{doubt}"]


def _export(found: Artifact) -> dict[str, Any]:
    return {
        "format": found.format.value,
        "path": f"{found.folder.name}/{found.path.name}",
        "bytes": found.path.stat().st_size,
        "precision": found.precision.value,
        # What was compared with PyTorch is the float export; what was made of it is judged by parity.
        "relative_error": found.facts["relative_error"] if found.stage == "export" else None,
        "opset": found.facts.get("opset") if found.format is Format.ONNX else None,
    }


def _engine(engine: Engine, recipe: Recipe, layer_ns: Mapping[str, float]) -> dict[str, Any]:
    made = engine.built or engine.model
    realised = None
    if engine.realised is not None:
        layers = [{**asdict(layer), "ns": layer_ns.get(layer.name)} for layer in engine.realised.layers]
        int8, total = engine.realised.int8, len(layers)
        realised = {"int8": int8, "total": total, "kernels": dict(engine.realised.kernels), "layers": layers}
    return {
        "label": engine.label,
        "runtime": engine.runtime,
        "precision": engine.model.precision.value,
        "built": engine.built is not None,
        "why": engine.why,
        "next": device.trtexec(engine, recipe) if engine.built is None and engine.runtime == "tensorrt" else None,
        "path": f"{made.folder.name}/{made.path.name}",
        "bytes": made.path.stat().st_size,
        "realised": realised,
        "search": engine.model.facts.get("search"),
        "candidates": engine.model.facts.get("candidates") or [],
    }


def _calibration(recipe: Recipe, observations: Artifact) -> dict[str, Any]:
    assert recipe.quantize is not None
    facts = observations.facts
    return {
        "images": facts["images"],
        "from": facts["from"],
        "method": recipe.quantize.method,
        "skipped": facts["skipped"],
        "warnings": facts["warnings"],
    }


def _finetune(made: Artifact) -> dict[str, Any]:
    history = json.loads((made.folder / "history.json").read_text())
    return {"history": history, "train_images": made.facts["train_images"], "val_images": made.facts["val_images"]}
