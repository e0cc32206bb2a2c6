"""Everything that was made, run over the same images as FP32 PyTorch, and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from deploykit import export, parity, runtimes, scenes, viewing
from deploykit.artifact import Artifact, Format, Precision, Preprocess, Samples
from deploykit.build import Engine, realised_gate
from deploykit.data import Images
from deploykit.gate import GateResult, Rule, Verdict, judge, judge_parts, smallest_visible_drop, worst
from deploykit.jsonable import to_json
from deploykit.machine import available_cores
from deploykit.models import Model
from deploykit.models.tasks import SCENES
from deploykit.parity import Comparison, Conversion, Logits
from deploykit.progress import Progress, silent
from deploykit.quantize.sensitivity import decibels
from deploykit.report import pictures, units
from deploykit.runtimes import Session, onnxruntime, torchscript
from deploykit.sources import NOISE

# Answers that vary less than this share of the largest one are float rounding, not decisions.
_CONSTANT = 1e-5
_BATCH = 16
_KINDS = (("the activation", "activations"), ("the weights of", "weights"))


@dataclass(frozen=True)
class Case:
    """One thing to compare: `artifact`, which `open` runs. `is_engine` is False when the graph itself is executed literally.
    `model` is the graph that an engine was built from, whose facts say what was found out when it was quantized."""

    label: str
    artifact: Artifact
    open: Callable[[], Session]
    is_engine: bool
    model: Artifact

    @cached_property
    def session(self) -> Session:
        """Opened where it is first asked something: answers that are kept ask nothing."""
        return self.open()

    def close(self) -> None:
        """Give the session's memory back, if there was one."""
        if "session" in vars(self):
            self.session.close()


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

    Two gates need no rule: an engine must answer like its own graph, and every layer that was to run in int8 must. `gates` in
    the result has their verdicts and those of the rules, `parity` the errors and decisions of each export and engine by its
    `label`, `visible_drop_points` what so many images can show at all. An engine that was not built is left out.
    """
    if model.task in SCENES:
        return _verify_scenes(model, images, exports, engines, rules, progress)
    batch, golden = exports[0].inputs[0].shape[0], exports[0].samples()
    reference = _answers(
        images,
        model.preprocess,
        batch,
        _golden_of(golden, golden.reference),
        lambda pictures: export.torch_logits(model, pictures, batch),
        partial(progress, "parity: PyTorch"),
    )
    name = pictures.class_namer(model, images)
    found: list[dict[str, Any]] = []
    gates: list[GateResult] = []
    int8_answers: list[Logits] = []
    for case in _cases(exports, engines):
        answers = _answers_of(case, images, progress)
        comparison = parity.compare(answers, reference, images.names, images.labels)
        conversion = _conversion(case)
        case.close()
        found.append(_as_json(case, comparison, conversion, name))
        if conversion is not None:
            gates.append(_conversion_gate(case, conversion))
        if not np.isfinite(answers).all():
            broken = np.flatnonzero(~np.isfinite(answers).all(axis=1))
            gates.append(_finite_gate(case.label, [images.names[index] for index in broken], len(images)))
        if case.artifact.precision is Precision.INT8:
            int8_answers.append(answers)
            gates += [_labelled(case, judge(rule, comparison.counts)) for rule in rules]
    gates += [realised_gate(engine) for engine in engines if engine.realised and engine.model.precision is Precision.INT8]
    shown = pictures.chosen(images, reference, int8_answers, name)
    return _verified(model, images, found, gates, _doubts(images, decides=_decides(reference)), shown)


def _verify_scenes(
    model: Model,
    images: Images,
    exports: Sequence[Artifact],
    engines: Sequence[Engine],
    rules: Sequence[Rule],
    progress: Progress,
) -> dict[str, Any]:
    """`verify` where answers are about pixels or boxes: everything sees one picture after the other; no answer is kept."""
    cases = list(_cases(exports, engines))
    viewers = [viewing.Viewer.of(case.artifact, case.session) for case in cases]
    decides = viewing.show(model, images, viewers, progress)
    found: list[dict[str, Any]] = []
    gates: list[GateResult] = []
    for case, viewer in zip(cases, viewers, strict=True):
        conversion, decided = _conversion(case), viewer.tally.decided()
        case.close()
        errors = {"quantization": {**_finite(asdict(viewer.errors)), "images": len(images)}, **viewing.as_json(decided)}
        found.append({**_about(case, len(images), conversion), **errors})
        if conversion is not None:
            gates.append(_conversion_gate(case, conversion))
        if viewer.not_finite:
            gates.append(_finite_gate(case.label, viewer.not_finite, len(images)))
        if case.artifact.precision is Precision.INT8:
            parts, pairs = viewing.plural(decided.unit), viewing.counts(decided)
            gates += [_labelled(case, judge_parts(rule, parts, pairs)) for rule in rules]
    gates += [realised_gate(engine) for engine in engines if engine.realised and engine.model.precision is Precision.INT8]
    return _verified(model, images, found, gates, _doubts(images, decides=decides, is_scene=True), [])


def _verified(
    model: Model,
    images: Images,
    found: list[dict[str, Any]],
    gates: Sequence[GateResult],
    doubts: Sequence[str],
    shown: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "summary": _summary(found),
        "parity": found,
        "gates": to_json(gates),
        "visible_drop_points": smallest_visible_drop(len(images)),
        "evaluated_on": {"origin": images.origin, "images": len(images), "labelled": images.labels is not None},
        "random": model.is_random,
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "notes": [*model.notes, *doubts],
        "samples": shown,
    }


def judge_graph(
    candidate: Artifact, runtime: str, reference: Logits, images: Images, rules: Sequence[Rule], *, progress: Progress = silent
) -> Verdict:
    """The verdict of `rules` on an INT8 graph that has no engine yet: executed literally where its engine is not for this
    machine's CPU. `reference` are the answers of the float graph to the same `images`."""
    is_here = runtimes.REGISTRY[runtime].on_cpu and not runtimes.why_not(runtime, cast(runtimes.Cpu, candidate.facts["cpu"]))
    session = (
        onnxruntime.optimized(candidate.path, threads=available_cores()) if is_here else onnxruntime.reference(candidate.path)
    )
    answers = graph_answers(session, candidate, images, progress=progress)
    counts = parity.compare(answers, reference, images.names, images.labels).counts
    return worst(judge(rule, counts).verdict for rule in rules) or Verdict.PASS


def graph_answers(session: Session, model: Artifact, images: Images, *, progress: Progress = silent) -> Logits:
    """What an open graph answers to all images (images, classes); the session is closed."""
    fixed = model.inputs[0].shape[0]
    batches = images.batches(model.preprocess, fixed if isinstance(fixed, int) else _BATCH)
    done = 0

    def announced() -> Iterator[NDArray[np.float32]]:
        nonlocal done
        for batch in batches:
            yield batch
            done += len(batch)
            progress("gate", done, len(images))

    answers = runtimes.answers(session, model, announced())
    session.close()
    return answers


def _doubts(images: Images, *, decides: bool, is_scene: bool = False) -> list[str]:
    """What makes every comparison pass without proving anything: say so instead of looking good."""
    found = []
    if images.origin == NOISE:
        found.append("no pictures were given, so everything was compared on noise: answers can be, decisions mean nothing")
    elif images.labels is None and not is_scene:
        found.append("decisions were compared on the calibration images; labelled ones (--validate DIR) would say more")
    if not decides:
        nothing = "finds no box, or one class everywhere" if is_scene else "gives the same answer to every image"
        found.append(f"FP32 PyTorch {nothing}, so agreement and errors prove nothing here")
    return found


def _decides(reference: Logits) -> bool:
    """Whether answers to different images are different, by more than rounding."""
    spread = float(np.ptp(reference, axis=0).max()) if len(reference) > 1 else 1.0
    return spread > _CONSTANT * max(float(np.abs(reference).max()), float(np.finfo(np.float32).tiny))


def _answers(
    images: Images,
    how: Preprocess,
    fixed: int | str | None,
    golden: tuple[NDArray[Any], Logits] | None,
    ask: Callable[[NDArray[np.float32]], Logits],
    report: Callable[[int, int], None],
) -> Logits:
    """What `ask` answers to all images, in batches. `golden` are the first of them as they were fed, with the answers that were
    kept; a batch of nothing else is not computed again."""
    found, done = [], 0
    for batch in images.batches(how, fixed if isinstance(fixed, int) else _BATCH):
        piece = slice(done, done + len(batch))
        known = golden[1][piece] if golden is not None and np.array_equal(batch, golden[0][piece]) else None
        found.append(ask(batch) if known is None else known)
        done += len(batch)
        report(done, len(images))
    return np.concatenate(found)


def _answers_of(case: Case, images: Images, progress: Progress) -> Logits:
    # An engine's answers are always its own; those of a graph itself were kept when it was written.
    samples = None if case.is_engine else case.artifact.samples()
    return _answers(
        images,
        case.artifact.preprocess,
        case.artifact.inputs[0].shape[0],
        None if samples is None else _golden_of(samples, samples.expected),
        lambda batch: runtimes.answers(case.session, case.artifact, [batch]),
        partial(progress, f"parity: {case.label}"),
    )


def _golden_of(samples: Samples, answers: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], Logits]:
    (inputs,), (answered,) = samples.inputs.values(), answers.values()
    return inputs, answered


def _cases(exports: Sequence[Artifact], engines: Sequence[Engine]) -> Iterator[Case]:
    """TorchScript files; engines; and for graphs without an engine here, the graph itself on ONNX Runtime."""
    for made in exports:
        if made.format is Format.TORCHSCRIPT:
            yield Case("torchscript fp32", made, partial(torchscript.load, made), is_engine=True, model=made)
        elif not any(engine.built for engine in engines):
            yield Case("onnx fp32", made, partial(onnxruntime.reference, made.path), is_engine=False, model=made)
    for engine in engines:
        if engine.built is not None:
            load = runtimes.get(engine.runtime).load
            yield Case(engine.label, engine.built, partial(load, engine.built), is_engine=True, model=engine.model)
        elif engine.model.stage != "export":  # which stands above for itself
            load = partial(onnxruntime.reference, engine.model.path)
            yield Case(f"{engine.label}{units.REFERENCE}", engine.model, load, is_engine=False, model=engine.model)


def _conversion(case: Case) -> Conversion | None:
    if not case.is_engine:
        return None
    golden = case.artifact.samples()
    if scenes.kind_of(case.artifact.outputs) == "boxes":
        inputs = golden.inputs[case.artifact.inputs[0].name]
        found = list(viewing.golden_answers(case.session, case.artifact, inputs))
        return parity.conversion_of_boxes(found, golden, case.artifact.precision)
    pieces = runtimes.pieces(case.artifact, golden)
    actual = {case.artifact.outputs[0].name: runtimes.answers(case.session, case.artifact, pieces)}
    return parity.conversion(actual, golden, case.artifact.precision)


def _finite_gate(label: str, broken: Sequence[str], images: int) -> GateResult:
    reason = f"NaN or infinite on {len(broken)} of {images} images, the first is {broken[0]}"
    return GateResult(f"{label}: every answer is a number", Verdict.FAIL, len(broken), None, reason)


def _conversion_gate(case: Case, found: Conversion) -> GateResult:
    errors = found.errors
    apart = "identical" if errors.max_abs == 0 else f"max|d| / max|y| {errors.relative:.2g}, SQNR {errors.sqnr_db:.1f} dB"
    reason = f"{apart} on {found.images} golden samples"
    meaning = "PyTorch" if case.model.format is Format.TORCHSCRIPT else "its own graph"
    return GateResult(f"{case.label}: answers like {meaning} ({found.rule})", found.verdict, errors.relative, None, reason)


def _labelled(case: Case, found: GateResult) -> GateResult:
    reason = found.reason if found.verdict is Verdict.PASS else found.reason + _blame(case.model)
    search = cast(Mapping[str, Any], case.model.facts.get("search") or {})
    if search.get("for_gate"):
        reason += f"; {units.plural(search['for_gate'], 'layer')} stayed in float for this gate, chosen on these very images"
    return GateResult(f"{case.label}: {found.rule}", found.verdict, found.observed, found.interval, reason)


def _blame(artifact: Artifact) -> str:
    """What causes most of the noise of an INT8 graph that did not pass, where that was measured."""
    search = cast(Mapping[str, Any], artifact.facts.get("search") or {})
    kept = {*cast(Mapping[str, str], artifact.facts.get("float_layers") or {}), *(search.get("spared") or ())}
    errors = search.get("errors") or {}
    alone = {f"{kind} {name}": power for kind, word in _KINDS for name, power in errors.get(word, {}).items() if name not in kept}
    worst_first = sorted(alone, key=lambda name: -alone[name])[:3]
    named = ", ".join(f"{name} ({decibels(alone[name]):.1f} dB alone)" for name in worst_first)
    already = units.plural(len(search.get("kept") or ()), "sensitive layer")
    much = f"{already} in float already, most of what noise is left" if search.get("kept") else "most of the noise"
    return f"; {much} comes from {named}" if named else ""


def _as_json(case: Case, comparison: Comparison, conversion: Conversion | None, name: pictures.Namer) -> dict[str, Any]:
    flips = [
        {
            "image": flip.image,
            "label": None if flip.label is None else name(flip.label),
            "reference": name(flip.reference),
            "engine": name(flip.engine),
            "reference_margin": flip.reference_margin,
        }
        for flip in comparison.flips  # all of them: another run's are paired with these
    ]
    return {
        **_about(case, comparison.images, conversion),
        "quantization": {**_finite(asdict(comparison.errors)), "images": comparison.images},
        "agreement": comparison.agreement,
        "disagreement_count": len(comparison.flips),
        "disagreements": flips,
        "accuracy": None if comparison.accuracy is None else {**asdict(comparison.accuracy), "images": comparison.images},
    }


def _about(case: Case, images: int, conversion: Conversion | None) -> dict[str, Any]:
    converted = None
    if conversion is not None:
        errors = _finite(asdict(conversion.errors))
        converted = {**errors, "images": conversion.images, "rule": conversion.rule, "verdict": conversion.verdict.value}
    return {"label": case.label, "precision": case.artifact.precision.value, "images": images, "conversion": converted}


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: an SQNR of identical tensors becomes null."""
    return {key: float(value) if np.isfinite(value) else None for key, value in values.items()}


def _summary(found: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(f"{case['label']}: {units.decided_otherwise(case)} decided otherwise" for case in found)
