"""Two graphs of one network -> the first layer of the second that is off by more than its own precision explains.

Errors that reach a layer from before say nothing about it. So every layer of the suspect runs alone, on the reference's own
activations, and what it then gets wrong is its own; `noise` says how much of that its scales and float roundings explain. A
second pass is the proof: the suspect with that one layer computed as the reference computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Tensors
from deploykit.bisect import blame, noise
from deploykit.bisect import graph as graphs
from deploykit.bisect.graph import Graph
from deploykit.bisect.layers import Layers
from deploykit.bisect.noise import Seen
from deploykit.bisect.opening import OnOnnxRuntime, Opening, Session
from deploykit.errors import StageError, UsageError, printable
from deploykit.progress import Progress, silent
from deploykit.runtimes import onnxruntime, padded

Images = NDArray[np.float32]
Batches = Callable[[], Iterable[Images]]

# In power: 12 dB. The loudest layers of clean networks are 9 dB beyond (docs/decisions.md): real roundings are not quite uniform
# and independent of each other.
MARGIN = 16.0
_MOST_DB = 200.0
_CURED = 0.5  # of the noise at the output is left


class Network(Protocol):
    """What watches a PyTorch network: the tensors of the graph that its modules gave for a batch."""

    def __call__(self, images: Images) -> Tensors:
        """By the names that they have in the graph."""


@dataclass(frozen=True)
class Layer:
    """One tensor that both graphs have, and the node that computes it.

    `own_db` is signal to noise when the layer runs alone on the reference's activations, None when the result has another
    shape, is not finite, or does not exist; then `failure` is what the runtime said. `explained_db` is what its precision
    explains, `excess_db` by how much it is noisier than that, in the channel that stands out most where it has weights.
    `total_db` is signal to noise with all errors from before, None where the graph did not run or the result has another shape.
    """

    module: str
    node: str
    op: str
    tensor: str
    own_db: float | None
    explained_db: float
    excess_db: float
    channel: int | None
    total_db: float | None
    failure: str


@dataclass(frozen=True)
class Proof:
    """Signal to noise at the output in dB, and what it is when the layer alone is computed as in the reference.

    `before_db` is None when the graph did not run at all, `after_db` when it then still does not, or that was not tried. `cured`:
    at most half of the noise is left; `why` says why not.
    """

    before_db: float | None
    after_db: float | None
    cured: bool
    why: str


@dataclass(frozen=True)
class Bisection:
    """What was found. `layers` are all, in the order of the graph; `suspects` those beyond what their precision explains, of
    which the first is `culprit`; `hints` say what is different about it. `missing` are nodes of the reference that give no tensor
    here, `failure` is why the graph does not run, `passes` over the images were needed.
    """

    culprit: Layer | None
    hints: tuple[str, ...]
    proof: Proof | None
    suspects: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    missing: tuple[str, ...]
    failure: str
    output_db: float | None
    images: int
    passes: int


def bisect(
    a: Path,
    b: Path,
    batches: Batches,
    *,
    network: Network | None = None,
    opening: Opening | None = None,
    total: int = 0,
    progress: Progress = silent,
) -> Bisection:
    """Find the first layer of the graph at `b` that does not compute what that of the reference `a` does, and prove it.

    Tensors are the same when their names are. `batches()` gives preprocessed images (n, C, H, W), `total` of them, and is called
    once for each pass. With a `network`, from which `a` was exported, its modules say what is right where they give a tensor of
    `a`. `opening` says where the suspect runs, which is ONNX Runtime; the reference always runs there.

    Raises UsageError when the graphs have no tensors in common, there are no images, or the reference gives NaN or infinity.
    """
    reference = graphs.read(a)
    suspect = graphs.read(b, like=reference)
    anchors = graphs.common(reference, suspect)
    first = _Pass(reference, suspect, anchors, network, opening or OnOnnxRuntime())
    answers = [first.add(batch) for batch in _announced(batches(), "bisect", total, progress)]
    if not answers:
        raise UsageError("there is no image to compare on")
    layers = tuple(_layer(first, name) for name in anchors if name in suspect.producers)
    suspects = tuple(layer for layer in layers if layer.excess_db > 10 * math.log10(MARGIN))
    culprit = _blamed(reference, suspect, suspects[0], anchors) if suspects else None
    output = first.seen.get(reference.outputs[0])
    before = None if first.failure or output is None else _decibels(output.total, output.signal)
    proof, apart = None, graphs.other_opsets(reference, suspect)
    if culprit is not None and apart:
        proof = Proof(before, None, cured=False, why=apart)
    elif culprit is not None:
        again = _announced(batches(), "prove", total, progress)
        proof = _proof(first, culprit, before, zip(again, answers, strict=True))
    return Bisection(
        culprit=culprit,
        hints=() if culprit is None else blame.hints(reference, suspect, culprit.tensor, anchors, first.seen),
        proof=proof,
        suspects=suspects,
        layers=layers,
        missing=_missing(reference, suspect),
        failure=first.failure,
        output_db=before,
        images=sum(map(len, answers)),
        passes=1 if proof is None or apart else 2,
    )


class _Pass:
    """The three graphs that see every image: the reference, the suspect, and the suspect's layers each by itself."""

    def __init__(self, a: Graph, b: Graph, anchors: Sequence[str], network: Network | None, opening: Opening) -> None:
        self.a, self.b, self.anchors, self.network, self.opening = a, b, anchors, network, opening
        self.size = a.batch or b.batch
        self.seen: dict[str, Seen] = {name: Seen() for name in anchors}
        for node in b.proto.graph.node:
            if node.op_type == graphs.QUANTIZE and node.input[0] in self.seen:
                self.seen[node.input[0]].clipped[noise.representable(b, node)[1:]] = np.zeros(1)
        self.failure = ""
        self._reference = onnxruntime.reference(graphs.exposing(a, anchors), arena=False)
        self.alone = Layers(b, anchors, a.ranks, opening)
        self._whole: Session | None = None
        try:
            self._whole = opening(graphs.exposing(b, anchors))
        except (StageError, UsageError) as error:
            self.failure = error.why

    def add(self, images: Images) -> NDArray[np.float32]:
        """Run a batch, and return what the reference answers."""
        (source,) = self.a.inputs
        # A graph with a fixed batch sees the last images again where some are missing, and so they count again.
        self.size = self.size or (len(images) if self.opening.one_size else None)
        fed = np.ascontiguousarray(padded(images, self.size))
        wanted = {source: fed, **_run(self._reference, source, fed)}
        if self.network is not None:
            wanted |= {name: value for name, value in self.network(fed).items() if name in self.seen}
        _check_finite(self.a, {name: wanted[name] for name in self.anchors})
        own, total = self.alone.run(wanted), self._answered(source, fed)
        for name, seen in self.seen.items():
            seen.add(wanted[name], own.get(name), total.get(name))
            if name in self.alone.refused:
                seen.own = np.full(1, np.inf)
        return np.array(wanted[self.a.outputs[0]][: len(images)])

    def _answered(self, source: str, images: Images) -> Tensors:
        """What the whole suspect makes of a batch; nothing when it cannot run."""
        if self._whole is None:
            return {}
        try:
            return _run(self._whole, source, images)
        except StageError as error:
            self.failure, self._whole = error.why, None
            return {}


def _run(session: Session, source: str, images: Images) -> Tensors:
    """All outputs, where they lie until the next run."""
    session.feed({source: images})
    session.execute()
    return session.views()


def _check_finite(a: Graph, tensors: Tensors) -> None:
    """Raises UsageError that names the first of the reference's tensors that is not: nothing could be compared with it."""
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            giver = f"{printable(a.node_of(name).name)} of the reference" if name in a.producers else "an image"
            why = f"the tensor {printable(name)} holds them, and nothing can be compared with that"
            raise UsageError(f"{giver} gives NaN or infinity", why=why, fix="mend the reference first, or give other images")


def _layer(run: _Pass, tensor: str) -> Layer:
    node, found = run.a.node_of(tensor), run.seen[tensor]
    count = max(1, found.count)
    allowed = noise.explained(run.a, run.b, tensor, run.anchors, run.seen)
    own = found.own / count
    if not any(_is_by_channel(run.a.constants.get(name)) for name in node.input):
        # Without weights no channel can be wrong alone, and few values of each would only be a noisier measure.
        own, allowed = own.mean(keepdims=True), allowed.mean(keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(own > 0, own / noise.fitted(allowed, len(own)), 0)
    channel = int(excess.argmax())
    explained_db = _decibels(np.array(allowed.mean()), np.array(found.moments.mean()))
    below_db = _decibels(excess[channel], np.ones(1))
    return Layer(
        module=graphs.module_of(node),
        node=node.name,
        op=node.op_type,
        tensor=tensor,
        own_db=_decibels(found.own, found.signal),
        explained_db=0.0 if explained_db is None else explained_db,
        excess_db=_MOST_DB if below_db is None else -below_db,
        channel=channel if len(excess) > 1 else None,
        total_db=None if run.failure else _decibels(found.total, found.signal),
        failure=run.alone.refused.get(tensor, ""),
    )


def _is_by_channel(constant: NDArray[Any] | None) -> bool:
    return constant is not None and constant.ndim > 0 and bool(np.issubdtype(constant.dtype, np.floating))


def _blamed(a: Graph, b: Graph, layer: Layer, anchors: Sequence[str]) -> Layer:
    """The layer, or what the suspect has not in front of it: a lost Relu shows in whoever should have read it."""
    present = {node.name for node in b.proto.graph.node}
    lost = [node for node in a.cone(layer.tensor, anchors) if node.name not in present]
    if not lost:
        return layer
    return replace(layer, module=graphs.module_of(lost[0]), node=lost[0].name, op=lost[0].op_type)


def _to_cure(a: Graph, culprit: Layer, anchors: Sequence[str]) -> list[str]:
    """The tensors that the reference's form of the culprit takes part in; several where a node is missing that many read."""
    return [name for name in anchors if name in a.producers and any(node.name == culprit.node for node in a.cone(name, anchors))]


def _proof(run: _Pass, culprit: Layer, before_db: float | None, pairs: Iterable[tuple[Images, NDArray[np.float32]]]) -> Proof:
    """Run B with the culprit computed as in A, and compare with what the reference answered."""
    a, b, output = run.a, run.b, Seen()
    (source,), result = b.inputs, b.outputs[0]
    try:
        session = run.opening(graphs.cured(a, b, _to_cure(a, culprit, run.anchors), run.anchors))
        for images, wanted in pairs:
            answer = _run(session, source, np.ascontiguousarray(padded(images, run.size if run.opening.one_size else b.batch)))[
                result
            ]
            output.add(wanted, None, answer[: len(images)])
    except (StageError, UsageError) as error:
        return Proof(before_db, None, cured=False, why=f"something else stops it too, {error.why.strip()}")
    after = _decibels(output.total, output.signal)
    if after is not None and (before_db is None or after - before_db >= -10 * math.log10(_CURED)):
        return Proof(before_db, after, cured=True, why="")
    # Then not even the cure is what PyTorch computes, when it is the export that is wrong.
    why = "it is the layer of the export, which may itself not be PyTorch's" if run.network is not None else ""
    why = why or "the output hardly shows this layer's error, or shows others' as well"
    return Proof(before_db, after, cured=False, why=why)


def _missing(a: Graph, b: Graph) -> tuple[str, ...]:
    """Nodes whose float result the suspect does not have."""
    return tuple(node.name for node in a.proto.graph.node if node.output[0] in a.ranks and node.output[0] not in b.producers)


def _decibels(error: NDArray[np.float64], signal: NDArray[np.float64]) -> float | None:
    """Signal to noise; at most 200 dB, for JSON has no infinity, and None when the error is infinite."""
    loud, quiet = float(np.sum(error)), float(np.sum(signal))
    if not math.isfinite(loud):
        return None
    if loud <= 0:
        return _MOST_DB
    return max(-_MOST_DB, min(_MOST_DB, 10 * math.log10(max(quiet, 1e-300) / loud)))


def _announced(batches: Iterable[Images], what: str, total: int, progress: Progress) -> Iterator[Images]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        progress(what, done, total)
