"""Any two things that answer, fed the same inputs: how far their answers are apart, in numbers, in decisions, class by class.

A is what B is compared with. Inputs are pictures, the golden samples of the side that is ours, or generated ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import data, foreign, parity, scenes
from deploykit.artifact import Format, Precision, Preprocess
from deploykit.crosscheck import kin, measures, nonfinite, stress, views
from deploykit.crosscheck.pairing import Pairs, answers, pair
from deploykit.crosscheck.sides import LABELS, Said, Side, asked_size, given_preprocess, open_sides
from deploykit.data import Images
from deploykit.errors import UsageError, printable
from deploykit.gate import ANSWERS, EXIT_CODES, GateResult, PairedCounts, Rule, Verdict, judge, worst
from deploykit.jsonable import to_json
from deploykit.machine import Machine
from deploykit.models.torchvision import imagenet_synsets
from deploykit.progress import Progress, silent
from deploykit.report.units import plural
from deploykit.runtimes import Session

__all__ = ["LABELS", "Said", "compare_two"]

_GENERATED = "generated"
# Pictures decoded before they are fed to A and then to B: both on end, as threads that spin for one slow down the other.
_CHUNK = 64
_NOISES = 13


@dataclass(frozen=True)
class Fed:
    """What both sides are fed, in chunks of one array (N, C, H, W) for each input; `names` are of the images, in order."""

    origin: str
    names: tuple[str, ...]
    chunks: Iterable[Sequence[NDArray[np.floating]]]
    images: Images | None = None


@dataclass(frozen=True)
class Question:
    """The two sides, what of them belongs together, how pictures become inputs (None: nobody says), how near answers must be."""

    sides: tuple[Side, Side]
    pairs: Pairs
    how: Preprocess | None
    limit: measures.Limit


@dataclass(frozen=True)
class Answered:
    """The answers of both to everything, one array for each output, and how many seconds what took: reading the inputs and the
    inference of each side. `not_finite` says where answers are no numbers; it is empty when all are."""

    a: list[NDArray[np.floating]]
    b: list[NDArray[np.floating]]
    seconds: dict[str, float]
    not_finite: str


@dataclass(frozen=True)
class Judged:
    """What the answers mean, as JSON values, and the verdicts on them."""

    outputs: list[dict[str, Any]]
    decisions: dict[str, Any] | None
    gates: list[GateResult]


def compare_two(
    a: str,
    b: str,
    said: Said,
    *,
    images: Path | None = None,
    labelled: bool = False,
    rules: Sequence[Rule] = (),
    tolerance: float | None = None,
    stressed: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare what `a` and `b` name on the pictures in the folder `images`, else on golden samples or generated inputs.

    With `labelled` the folder's sub-folders are the classes. Judged are that all answers are numbers, that they are within the
    limit of the two precisions or `tolerance` (of max|d| / max|A|), that they belong together, `rules` of decisions, and with
    `stressed` the inputs that break engines. Plain JSON values: `gates`, `outputs`, `decisions`, `exit_code` 0, 3 or 5.

    `a` and `b` are the words of the command line: the name of a network, a file, the folder of an artifact, a run or a bundle.
    Raises UsageError before anything runs: for what does not answer, for inputs that do not match, for rules that have nothing
    to be judged on, for pictures without a preprocessing.
    """
    start = perf_counter()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="deploykit-")))
        asked = _question((a, b), said, tolerance, scratch, is_of_pictures=images is not None)
        kind = views.kind_of(asked.sides)
        if kind is not None:
            views.refuse_meaningless(kind, labelled=labelled, stressed=stressed)
        found = _found_images(images, labelled, asked)
        _check_rules(rules, found, asked.sides, kind)
        fed = _fed(found, asked)
        first, second = (stack.enter_context(closing(side.open(0))) for side in asked.sides)
        opened = perf_counter()
        if kind is None:
            answered = _answered(asked, (first, second), fed, progress)
            judged = _judged(asked, answered, fed, rules)
        else:
            answered, judged = _viewed(asked, (first, second), fed, rules, kind, progress)
        # How far answers may be apart was said by somebody who may well compare two networks.
        related = kind is None and tolerance is None and not answered.not_finite
        origin = kin.origin(asked.sides, (first, second), asked.pairs) if related else []
        precision, notes = kin.precision(asked.sides)
        answered.seconds.update(start=opened - start, compared=perf_counter() - opened)
        rows = stress.run(asked.sides, (first, second), asked.pairs, asked.limit, asked.how, progress) if stressed else []
    gates = [*origin, *judged.gates, *precision, *stress.gates(rows)]
    return {
        "sides": [_side(side) for side in asked.sides],
        "fed": {"origin": fed.origin, "images": len(fed.names), "labelled": labelled},
        "limit": {"rule": asked.limit.rule, "source": asked.limit.source},
        "outputs": judged.outputs,
        "decisions": judged.decisions,
        "stress": [{**asdict(row), "verdict": row.verdict and row.verdict.value, "is_gate": row.is_gate} for row in rows],
        "gates": [to_json(gate) for gate in gates],
        "seconds": answered.seconds,
        "machine": to_json(Machine.probe()),
        "notes": [*_notes(fed, judged.decisions is not None), *notes, *_next(asked, judged)],
        "exit_code": EXIT_CODES[worst(gate.verdict for gate in gates)],
    }


def _question(names: tuple[str, str], said: Said, tolerance: float | None, scratch: Path, *, is_of_pictures: bool) -> Question:
    sides = open_sides(names, said, scratch, is_of_pictures=is_of_pictures)
    pairs = pair(*sides, cast=said.cast, by_position=said.by_position, size=asked_size(said))
    limit = measures.limit_for(
        sides[0].precision, sides[1].precision, tolerance=tolerance, quantization_db=_quantization_db(sides)
    )
    return Question(sides, pairs, _preprocess(sides, said, is_needed=is_of_pictures), limit)


def _preprocess(sides: Sequence[Side], said: Said, *, is_needed: bool) -> Preprocess | None:
    """How pictures become inputs: as the side that is ours says, or as both say alike; else as --preprocess says.

    Raises UsageError when both say, and not the same.
    """
    own = [side.preprocess for side in sides if side.preprocess is not None]
    if len(own) == 2 and own[0] != own[1]:
        keys = [item.name for item in fields(Preprocess)]
        apart = [(key, *(getattr(one, key) for one in own)) for key in keys]
        told = [f"{key}: {mine} in A, {theirs} in B" for key, mine, theirs in apart if mine != theirs]
        raise UsageError("the two sides prepare pictures differently, so they would not see the same", problems=told)
    if not own:
        return given_preprocess(said) if is_needed else None
    return own[0]


def _found_images(folder: Path | None, labelled: bool, asked: Question) -> Images | None:
    """The pictures. Raises UsageError for what pictures cannot feed, DataError for pictures that cannot be used."""
    how, specs = asked.how, asked.pairs.specs
    if folder is None:
        if labelled:
            raise UsageError("--labelled is about pictures", fix="--data DIR, with one sub-folder for each class")
        return None
    if how is None:
        why = "neither side says how a picture becomes its input"
        raise UsageError(
            "cannot feed pictures", why=why, fix="--preprocess crop=224 --preprocess mean=[...] --preprocess std=[...]"
        )
    if len(specs) != 1 or specs[0].shape[1:] != how.shape:
        wanted = "; ".join(f"{printable(spec.name)} {list(spec.shape)}" for spec in specs)
        raise UsageError("pictures do not fit", why=f"prepared, they are {list(how.shape)}, and the sides take {wanted}")
    if not labelled:
        return data.folder(folder, labelled=False)
    classes = next((side.classes for side in asked.sides if side.classes), ())
    synsets = imagenet_synsets() if len(classes) == len(imagenet_synsets()) else ()
    found = data.folder(folder, classes=classes, synsets=synsets, labelled=True)
    for side in asked.sides:
        width = side.outputs[0].shape[-1] if len(side.outputs[0].shape) == 2 else None
        _check_classes(found, width if isinstance(width, int) else None)
    return found


def _check_classes(found: Images, width: int | None) -> None:
    """Raise UsageError where nothing says which of `width` outputs is which of the folder's classes."""
    if width is not None and len(found.classes) != width:
        why = f"the folder names {len(found.classes)} classes, and there are {width} outputs"
        raise UsageError(f"cannot tell which output is which class of {found.origin}", why=why, fix="leave out --labelled")


def _check_rules(rules: Sequence[Rule], found: Images | None, sides: Sequence[Side], kind: scenes.Kind | None) -> None:
    problems = [f"'{rule}' is about time: deploykit benchmark judges it" for rule in rules if rule.is_of_time]
    if found is None:
        problems += [f"'{rule}' is about decisions: --data DIR" for rule in rules if not rule.is_of_time]
    elif found.labels is None:
        problems += [f"'{rule}' needs labels: --labelled" for rule in rules if rule.metric == "drop"]
    if rules and len(sides[0].outputs) != 1 and kind is None:
        problems.append("decisions are judged on one output of (images, classes)")
    if problems:
        raise UsageError("there is nothing to judge these rules on", problems=problems)


def _fed(found: Images | None, asked: Question) -> Fed:
    how, pairs = asked.how, asked.pairs
    if found is not None and how is not None:
        chunks = ([batch] for batch in found.batches(how, _CHUNK))
        return Fed(found.origin, found.names, chunks, found)
    for side in asked.sides:
        if side.is_ours and side.model is not None:
            golden = side.model.samples().inputs
            arrays = [golden[name] for name in pairs.names(side)]
            return Fed(f"golden samples of {side.label}", tuple(f"sample {i}" for i in range(len(arrays[0]))), [arrays])
    kinds = stress.generated(pairs, how)
    made = [[foreign.noise(spec, _NOISES, seed=index) for index, spec in enumerate(pairs.specs)], *kinds.values()]
    names = [f"noise {index}" for index in range(_NOISES)]
    names += [f"{kind} {index}" for kind, arrays in kinds.items() for index in range(len(arrays[0]))]
    return Fed(_GENERATED, tuple(names), [[np.concatenate(arrays) for arrays in zip(*made, strict=True)]])


def _answered(asked: Question, sessions: tuple[Session, Session], fed: Fed, progress: Progress) -> Answered:
    """Both sides' answers, chunk by chunk, so that memory does not grow with the number of pictures but for the answers."""
    seconds = {"inputs": 0.0, "a": 0.0, "b": 0.0}
    found: list[list[list[NDArray[np.floating]]]] = [[], []]
    blamed, done = ["", ""], 0
    for chunk in _timed(fed.chunks, seconds):
        for which, (side, session) in enumerate(zip(asked.sides, sessions, strict=True)):
            answered, took = answers(side, session, asked.pairs, chunk)
            seconds[side.label.lower()] += took
            found[which].append(answered)
            if not blamed[which] and (broken := nonfinite.broken(answered)):
                blamed[which] = nonfinite.blame(side, asked.pairs, [array[broken[0] : broken[0] + 1] for array in chunk])
        done += len(chunk[0])
        progress("parity", done, len(fed.names))
    a, b = ([np.concatenate(parts) for parts in zip(*pieces, strict=True)] for pieces in found)
    told = [
        nonfinite.told(side, nonfinite.broken(values), fed.names, where)
        for side, values, where in zip(asked.sides, (a, b), blamed, strict=True)
        if where
    ]
    return Answered(a, b, seconds, "; ".join(told))


def _viewed(
    asked: Question, sessions: tuple[Session, Session], fed: Fed, rules: Sequence[Rule], kind: scenes.Kind, progress: Progress
) -> tuple[Answered, Judged]:
    """The same for pixels or boxes: every picture is answered by both, compared, and forgotten."""
    seconds = {"inputs": 0.0, "a": 0.0, "b": 0.0}
    seen = views.Views(asked.sides, sessions, asked.pairs, kind, scenes.tally(kind))
    done = 0
    for chunk in _timed(fed.chunks, seconds):
        for row in range(len(chunk[0])):
            seen.look(fed.names[done], [array[row : row + 1] for array in chunk], seconds)
            done += 1
            progress("parity", done, len(fed.names))
    answered = Answered([], [], seconds, seen.not_finite)
    outputs = views.outputs(seen, asked.limit)
    gates = [_finite_gate(answered), *(_limit_gate(output, asked.limit) for output in outputs), *views.gates(seen, rules)]
    return answered, Judged(outputs, views.decisions(seen), gates)


def _timed(
    chunks: Iterable[Sequence[NDArray[np.floating]]], seconds: dict[str, float]
) -> Iterator[Sequence[NDArray[np.floating]]]:
    iterator = iter(chunks)
    while True:
        start = perf_counter()
        chunk = next(iterator, None)
        seconds["inputs"] += perf_counter() - start
        if chunk is None:
            return
        yield chunk


def _quantization_db(sides: Sequence[Side]) -> float | None:
    """The SQNR of the quantization itself on the golden samples of an INT8 side of ours: the worse one of two."""
    found = []
    for side in sides:
        is_of_boxes = scenes.kind_of(side.outputs) == "boxes"  # which come and go: no noise is measured on them
        if side.is_ours and side.model is not None and side.precision is Precision.INT8 and not is_of_boxes:
            samples = side.model.samples()
            name = side.outputs[0].name
            found.append(parity.tensor_errors(samples.expected[name], samples.reference[name]).sqnr_db)
    return min(found, default=None)


def _output(
    names: tuple[str, str], mine: NDArray[np.floating], theirs: NDArray[np.floating], limit: measures.Limit
) -> dict[str, Any]:
    """One pair of outputs. Raises UsageError when they do not have one shape."""
    if mine.shape != theirs.shape:
        told = f"A: {printable(names[0])} {list(mine.shape)}; B: {printable(names[1])} {list(theirs.shape)}"
        raise UsageError("the answers have different shapes", why=told)
    errors, mean_relative = measures.tensor_errors(theirs, mine)
    return {
        "names": [printable(name) for name in names],
        "shape": ["batch", *mine.shape[1:]],
        **measures.errors_as_json(errors),
        "mean_relative": mean_relative,
        "identical": bool(np.array_equal(mine, theirs)),
        "holds": limit.holds(errors),
        "histogram": measures.histogram(theirs, mine),
    }


def _judged(asked: Question, answered: Answered, fed: Fed, rules: Sequence[Rule]) -> Judged:
    outputs = [
        _output(names, mine, theirs, asked.limit)
        for names, mine, theirs in zip(asked.pairs.outputs, answered.a, answered.b, strict=True)
    ]
    decided, counts = _decisions(answered, fed, asked.sides)
    apart = kin.opsets(asked.sides)
    gates = [_finite_gate(answered), *(_limit_gate(output, asked.limit, apart) for output in outputs)]
    # Classes of generated inputs mean nothing, and all of them may be the same one.
    if decided is not None and fed.origin != _GENERATED and (order := kin.classes(asked.sides, answered.a[0], answered.b[0])):
        gates.append(order)
    if rules and counts is None:
        raise UsageError(
            "there is nothing to judge these rules on", why="the sides have no one floating-point output of (images, classes)"
        )
    return Judged(outputs, decided, gates + [judge(rule, counts) for rule in rules if counts is not None])


def _decisions(answered: Answered, fed: Fed, sides: Sequence[Side]) -> tuple[dict[str, Any] | None, PairedCounts | None]:
    """Decisions where the one output is floating-point (images, classes), and their counts; None and None elsewhere."""
    mine, theirs = answered.a[0], answered.b[0]
    if len(answered.a) != 1 or mine.ndim != 2 or mine.shape[1] < 2 or mine.shape != theirs.shape:
        return None, None
    if {mine.dtype.kind, theirs.dtype.kind} != {"f"}:
        return None, None
    labels = None if fed.images is None else fed.images.labels
    if fed.images is not None and labels is not None:
        _check_classes(fed.images, mine.shape[1])
    names = next((side.classes for side in sides if side.classes), () if fed.images is None else fed.images.classes)
    comparison = parity.compare(theirs, mine, fed.names, labels)

    def name(index: int) -> str:
        return names[index] if index < len(names) else f"class {index}"

    return measures.decisions(comparison, mine, theirs, labels, name), comparison.counts


def _finite_gate(answered: Answered) -> GateResult:
    verdict = Verdict.FAIL if answered.not_finite else Verdict.PASS
    return GateResult("every answer is a number", verdict, None, None, answered.not_finite or "no NaN and no infinity")


def _limit_gate(output: dict[str, Any], limit: measures.Limit, why: str = "") -> GateResult:
    """Whether an output is near enough; `why` is told where it is not."""
    if output["max_abs"] is None:
        told = "not finite"
    elif output["identical"]:
        told = "identical"
    else:
        decibels = "none" if output["sqnr_db"] is None else f"{output['sqnr_db']:.1f} dB"
        relative = "infinite" if output["relative"] is None else f"{output['relative']:.2g}"
        told = f"max|d| / max|A| {relative}, SQNR {decibels}"
    name = output["names"][0]
    reason = f"{told}; {limit.source}" + f"; {why}" * bool(why and not output["holds"])
    verdict = Verdict.PASS if output["holds"] else Verdict.FAIL
    return GateResult(f"{name}: {ANSWERS} ({limit.rule})", verdict, output["relative"], None, reason)


def _side(side: Side) -> dict[str, Any]:
    return {
        "label": side.label,
        "name": printable(side.name),
        "kind": side.kind,
        "precision": side.precision.value,
        "layout": side.layout,
        "inputs": [to_json(replace(spec, name=printable(spec.name))) for spec in side.inputs],
        "outputs": [to_json(replace(spec, name=printable(spec.name))) for spec in side.outputs],
        "sha256": None if side.model is None else side.model.sha256,
    }


def _next(asked: Question, judged: Judged) -> list[str]:
    """What names the layer, where two graphs are too far apart."""
    graphs = [side for side in asked.sides if side.model is not None and side.model.format is Format.ONNX]
    if len(graphs) < len(asked.sides) or all(output["holds"] for output in judged.outputs):
        return []
    return [f"deploykit bisect {' '.join(printable(side.name) for side in graphs)} names the layer"]


def _notes(fed: Fed, has_decisions: bool) -> list[str]:
    if fed.origin == _GENERATED:
        return ["no pictures were given and neither side brings samples: answers can be compared, decisions mean nothing"]
    if has_decisions and len(fed.names) < kin.FEWEST_IMAGES:
        few = f"{plural(len(fed.names), 'image')}, and it takes {kin.FEWEST_IMAGES}; --data gives more"
        return [f"whether B's classes are in the order of A's was not judged: there are only {few}"]
    if has_decisions:
        return []
    return ["there is no one floating-point output of (images, classes), so there are no decisions to compare"]
