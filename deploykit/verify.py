"""Everything that was made, run over the same images as FP32 PyTorch, and judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from deploykit import export, parity, runtimes
from deploykit.artifact import Artifact, Format, Precision
from deploykit.build import Engine
from deploykit.data import Images
from deploykit.gate import GateResult, Rule, Verdict, judge, smallest_visible_drop
from deploykit.jsonable import to_json
from deploykit.models import Model
from deploykit.parity import Comparison, Conversion, Logits
from deploykit.progress import Progress, silent
from deploykit.report import pictures
from deploykit.report.text import REFERENCE
from deploykit.runtimes import Session, onnxruntime, torchscript
from deploykit.sources import NOISE

# Answers that vary less than this share of the largest one are float rounding, not decisions.
_CONSTANT = 1e-5
_BATCH = 16
_LISTED_FLIPS = 100


@dataclass(frozen=True)
class Case:
    """One thing to compare: a session for `artifact`. `is_engine` is False when the graph itself is executed literally."""

    label: str
    artifact: Artifact
    session: Session
    is_engine: bool


def verify(
    model: Model,
    images: Images,
    exports: Sequence[Artifact],
    engines: Sequence[Engine],
    rules: Sequence[Rule],
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare exports and engines with `model` on `images`, judge `rules` on every INT8 one, and return plain JSON values.

    Two gates need no rule: an engine must answer like its own graph, and every layer that was to run in int8 must.
    """
    batch = exports[0].inputs[0].shape[0]
    reference = _reference(model, images, batch, progress)
    name = pictures.class_namer(model, images)
    found: list[dict[str, Any]] = []
    gates: list[GateResult] = []
    int8_answers: list[Logits] = []
    for case in _cases(exports, engines):
        batches = _announced(images, model, case, progress)
        answers = runtimes.answers(case.session, case.artifact, batches)
        comparison = parity.compare(answers, reference, images.names, images.labels)
        conversion = _conversion(case)
        case.session.close()
        found.append(_as_json(case, comparison, conversion, name))
        if conversion is not None:
            gates.append(_conversion_gate(case, conversion))
        if not np.isfinite(answers).all():
            gates.append(_finite_gate(case.label, answers, images))
        if case.artifact.precision is Precision.INT8:
            int8_answers.append(answers)
            gates += [_labelled(case.label, judge(rule, comparison.counts)) for rule in rules]
    gates += [_realised_gate(engine) for engine in engines if engine.realised and engine.model.precision is Precision.INT8]
    return {
        "summary": _summary(found),
        "parity": found,
        "gates": to_json(gates),
        "visible_drop_points": smallest_visible_drop(len(images)),
        "evaluated_on": {"origin": images.origin, "images": len(images), "labelled": images.labels is not None},
        "random": model.is_random,
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "notes": [*model.notes, *_doubts(images, reference)],
        "samples": pictures.chosen(images, reference, int8_answers, name),
    }


def _doubts(images: Images, reference: Logits) -> list[str]:
    """What makes every comparison pass without proving anything: say so instead of looking good."""
    found = []
    if images.origin == NOISE:
        found.append("no pictures were given, so everything was compared on noise: answers can be, decisions mean nothing")
    elif images.labels is None:
        found.append("decisions were compared on the calibration images; labelled ones (--validate DIR) would say more")
    spread = float(np.ptp(reference, axis=0).max()) if len(reference) > 1 else 1.0
    if spread <= _CONSTANT * max(float(np.abs(reference).max()), float(np.finfo(np.float32).tiny)):
        found.append("FP32 PyTorch gives the same answer to every image, so agreement and errors prove nothing here")
    return found


def _reference(model: Model, images: Images, fixed: int | str, progress: Progress) -> Logits:
    answers, done = [], 0
    for batch in images.batches(model.preprocess, fixed if isinstance(fixed, int) else _BATCH):
        answers.append(export.torch_logits(model, batch, fixed))
        done += len(batch)
        progress("parity: PyTorch", done, len(images))
    return np.concatenate(answers)


def _announced(images: Images, model: Model, case: Case, progress: Progress) -> Iterator[NDArray[np.float32]]:
    fixed, done = case.artifact.inputs[0].shape[0], 0
    for batch in images.batches(model.preprocess, fixed if isinstance(fixed, int) else _BATCH):
        yield batch
        done += len(batch)
        progress(f"parity: {case.label}", done, len(images))


def _cases(exports: Sequence[Artifact], engines: Sequence[Engine]) -> Iterator[Case]:
    """TorchScript files; engines; and for graphs without an engine here, the graph itself on ONNX Runtime."""
    for made in exports:
        if made.format is Format.TORCHSCRIPT:
            yield Case("torchscript fp32", made, torchscript.load(made), is_engine=True)
        elif not any(engine.built for engine in engines):
            yield Case("onnx fp32", made, onnxruntime.reference(made.path), is_engine=False)
    for engine in engines:
        if engine.built is not None:
            yield Case(engine.label, engine.built, runtimes.get(engine.runtime).load(engine.built), is_engine=True)
        elif engine.model.precision is not Precision.FP32:
            session = onnxruntime.reference(engine.model.path)
            yield Case(f"{engine.label}{REFERENCE}", engine.model, session, is_engine=False)


def _conversion(case: Case) -> Conversion | None:
    if not case.is_engine:
        return None
    golden = case.artifact.samples()
    pieces = runtimes.pieces(case.artifact, golden)
    actual = {case.artifact.outputs[0].name: runtimes.answers(case.session, case.artifact, pieces)}
    return parity.conversion(actual, golden, case.artifact.precision)


def _finite_gate(label: str, answers: Logits, images: Images) -> GateResult:
    broken = np.flatnonzero(~np.isfinite(answers).all(axis=1)).tolist()
    reason = f"NaN or infinite on {len(broken)} of {len(images)} images, the first is {images.names[broken[0]]}"
    return GateResult(f"{label}: every answer is a number", Verdict.FAIL, len(broken), None, reason)


def _conversion_gate(case: Case, found: Conversion) -> GateResult:
    errors = found.errors
    apart = "identical" if errors.max_abs == 0 else f"max|d| / max|y| {errors.relative:.2g}, SQNR {errors.sqnr_db:.1f} dB"
    reason = f"{apart} on {found.images} golden samples"
    meaning = "PyTorch" if case.artifact.format is Format.TORCHSCRIPT else "its own graph"
    return GateResult(f"{case.label}: answers like {meaning} ({found.rule})", found.verdict, errors.relative, None, reason)


def _realised_gate(engine: Engine) -> GateResult:
    """Asked for INT8: every layer runs in it, but those that the recipe keeps in float, by name or by the SQNR it asks for."""
    assert engine.realised is not None
    facts = cast(Mapping[str, Any], engine.model.facts)
    kept, whys = facts["kept_float"], facts["float_layers"]
    quantized = [layer.name for layer in engine.realised.layers if layer.precision == "int8" and layer.name in kept]
    floats = [layer for layer in engine.realised.layers if layer.precision != "int8" and layer.name not in kept]
    reason = f"{engine.realised.int8} of {len(engine.realised.layers)} layers run in int8"
    if kept:
        reason += f"; kept in float: {', '.join(f'{name} ({whys[name]})' for name in kept[:5])}{', ...' * (len(kept) > 5)}"
    if floats:
        named = ", ".join(f"{layer.name} ({layer.why})" for layer in floats[:5])
        reason += f"; in float: {named}{', ...' * (len(floats) > 5)}; quantize.float_layers accepts that by name"
    if quantized:
        reason += f"; in int8 although they were to stay in float: {', '.join(quantized)}"
    verdict = Verdict.FAIL if floats or quantized else Verdict.PASS
    return GateResult(f"{engine.label}: every layer meant for int8 runs in it", verdict, engine.realised.int8, None, reason)


def _labelled(label: str, found: GateResult) -> GateResult:
    return GateResult(f"{label}: {found.rule}", found.verdict, found.observed, found.interval, found.reason)


def _as_json(case: Case, comparison: Comparison, conversion: Conversion | None, name: pictures.Namer) -> dict[str, Any]:
    flips = [
        {
            "image": flip.image,
            "label": None if flip.label is None else name(flip.label),
            "reference": name(flip.reference),
            "engine": name(flip.engine),
            "reference_margin": flip.reference_margin,
        }
        for flip in comparison.flips[:_LISTED_FLIPS]
    ]
    converted = None
    if conversion is not None:
        errors = _finite(asdict(conversion.errors))
        converted = {**errors, "images": conversion.images, "rule": conversion.rule, "verdict": conversion.verdict.value}
    return {
        "label": case.label,
        "precision": case.artifact.precision.value,
        "images": comparison.images,
        "conversion": converted,
        "quantization": {**_finite(asdict(comparison.errors)), "images": comparison.images},
        "agreement": comparison.agreement,
        "disagreement_count": len(comparison.flips),
        "disagreements": flips,
        "accuracy": None if comparison.accuracy is None else {**asdict(comparison.accuracy), "images": comparison.images},
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: an SQNR of identical tensors becomes null."""
    return {key: float(value) if np.isfinite(value) else None for key, value in values.items()}


def _summary(found: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{case['label']}: {case['disagreement_count']} of {case['images']} images decided otherwise" for case in found
    )
