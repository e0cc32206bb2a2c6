"""Cross-layer equalization: channels of very different ranges in one tensor get similar ones; the float function stays.

One scale serves a whole activation tensor, so a channel whose values are a thousandth of the largest channel's is rounded
to zero. Factors s_i on the channels (see `pairs`) make them alike. Sources: M. Nagel, M. van Baalen, T. Blankevoort,
M. Welling, "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV 2019), who equalize the weights;
G. Xiao et al., "SmoothQuant" (ICML 2023), who take s_i = A_i ** -alpha from the activations' extremes A_i. Here alpha is
the one with the least predicted noise, the factors are powers of two, so that the float answers do not change by a bit,
and pairs that would gain little stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.artifact import SAMPLES, Artifact, Format, Precision
from deploykit.errors import StageError, UsageError
from deploykit.jsonable import JSON
from deploykit.progress import Progress, silent
from deploykit.quantize import observe
from deploykit.quantize.inputs import Inputs
from deploykit.quantize.pairs import Floats, Pair, as_read, pairs, scale, tensor_read, weights_by_input
from deploykit.runtimes import onnxruntime, padded
from deploykit.runtimes.onnx_nodes import require_one_file

IMAGES = 64
# Five well trained networks were predicted to gain up to 2.6 dB and gained nothing; see docs/decisions.md.
LEAST_GAIN_DB = 6.0
_EXPONENTS = np.linspace(0.1, 1.0, 10)
_TOLERANCE = 1e-4
# A channel this much fainter than the typical one counts as dead: its extreme is rounding and no signal.
_FAINTEST = 2.0**-20


@dataclass(frozen=True)
class Seen:
    """What was observed of each channel of a tensor: extremes (low <= 0 <= high) and mean square, each of shape (C,)."""

    low: Floats
    high: Floats
    power: Floats


@dataclass(frozen=True)
class Choice:
    """How a pair is best equalized: by 2 ** `exponents` (C,), which round A ** -`alpha`; and what that is to gain."""

    pair: Pair
    alpha: float
    exponents: NDArray[np.int64]
    gain_db: float


def equalize(
    model: Artifact,
    batches: Callable[[int], Iterable[NDArray[np.float32]]],
    folder: Path,
    *,
    least_gain_db: float = LEAST_GAIN_DB,
    names: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Write `model.onnx`, equalized where that is predicted to gain `least_gain_db`, and its golden samples into `folder`.

    `batches(n)` gives preprocessed images as (n, C, H, W) arrays, at most `IMAGES` of which are looked at; `names` are what
    messages call them. The result is FP32 like `model`, and the same file when nothing is worth it. Facts: `pairs` counts
    them, `equalized` describes those that were.

    Raises UsageError when `model` is no FP32 ONNX artifact in one file, DataError when images hold NaN or infinite values,
    StageError when activations do or the result does not answer like `model`.
    """
    if model.format is not Format.ONNX or model.precision is not Precision.FP32:
        raise UsageError(f"only an FP32 ONNX artifact can be equalized, not {model.precision.value} {model.format.value}")
    require_one_file(model.path)
    graph = ir.load(model.path)
    found = pairs(graph.graph)
    total = IMAGES if names is None else min(IMAGES, len(names))
    seen = (
        _observe(model, found, lambda size: Inputs(names, model.preprocess).passing(batches(size)), progress, total)
        if found
        else {}
    )
    # Once for each pair, in any order: what is observed does not depend on the factors of other pairs, and nor does a ratio
    # of noise to signal, because those of the next tensor scale both alike.
    chosen = [choice for pair in found if (choice := best(pair, seen)).gain_db >= least_gain_db]
    path = folder / "model.onnx"
    if chosen:
        for choice in chosen:
            scale(graph.graph, choice.pair, np.exp2(choice.exponents))
        ir.save(graph, path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        _save_samples(model, path)
    else:
        shutil.copyfile(model.path, path)
        shutil.copyfile(model.folder / SAMPLES, folder / SAMPLES)
    facts = {**model.facts, "pairs": len(found), "equalized": [_described(choice) for choice in chosen]}
    settings = {"least_gain_db": least_gain_db}
    return replace(model, path=path, stage="equalize", parents=(model.sha256,), settings=settings, facts=facts)


def best(pair: Pair, seen: Mapping[str, Seen]) -> Choice:
    """The alpha with the least predicted noise, and its gain over the pair as it is; `seen` holds the pair's `tensors`."""
    readers = [_Reader.of(node, pair.channels, seen[tensor_read(node)]) for node in pair.readers]
    extremes = _extremes([seen[name] for name in pair.tensors])
    before = _noise(readers, np.ones(pair.channels))
    choices = []
    for alpha in map(float, _EXPONENTS):
        exponents = _powers_of_two(extremes, alpha)
        gain = 10 * np.log10(before / _noise(readers, np.exp2(exponents))) if before > 0 else 0.0
        choices.append(Choice(pair, alpha, exponents, float(gain)))
    return max(choices, key=lambda choice: choice.gain_db)


@dataclass(frozen=True)
class _Reader:
    """A reading layer: of the weights between each output and each input channel, (O, C / groups), the sum of squares
    `power` and the largest magnitude `peak`; `taps` of them each. `seen` is what was observed of the tensor it reads."""

    node: ir.Node
    power: Floats
    peak: Floats
    taps: int
    seen: Seen

    @classmethod
    def of(cls, node: ir.Node, channels: int, seen: Seen) -> _Reader:
        weights = weights_by_input(node, channels)
        return cls(node, (weights**2).sum(axis=2), np.abs(weights).max(axis=2), weights.shape[2], seen)

    def noise_to_signal(self, factors: Floats) -> Floats:
        """Of every output channel that has a signal: the power of all rounding errors over that of the signal.

        The tensor has one step D. In channel i, which has factor s_i, rounding costs D^2 / 12 in units of s_i, but never
        more than the values themselves, E[x_i^2]. The weights of output o have one step d_o, and rounding one that reads
        channel i costs d_o^2 / 12 in units of 1 / s_i, but never more than the weight itself. So

            noise_o  = sum_i  |w_oi|^2 min((D / s_i)^2 / 12, E[x_i^2])  +  min(K (d_o s_i)^2 / 12, |w_oi|^2) E[x_i^2]
            signal_o = sum_i  |w_oi|^2 E[x_i^2]

        over the channels i that o reads, K weights w_oi for each, channels and errors taken as independent. D is an 8-bit
        step over the whole range, d_o is max_i |w_oi / s_i| / 127, and a factor on the output o itself cancels.
        """
        seen = self.seen
        step = ((factors * seen.high).max() - (factors * seen.low).min()) / 255
        rows, power = as_read(factors, self.node), as_read(seen.power, self.node)
        lost = as_read(np.minimum((step / factors) ** 2 / 12, seen.power), self.node)
        weight_step = (self.peak / rows).max(axis=1, keepdims=True) / 127
        weights_lost = np.minimum(self.taps * (weight_step * rows) ** 2 / 12, self.power)
        noise = (self.power * lost + weights_lost * power).sum(axis=1)
        signal = (self.power * power).sum(axis=1)
        return np.asarray(noise[signal > 0] / signal[signal > 0])


def _noise(readers: Sequence[_Reader], factors: Floats) -> float:
    """The mean ratio of noise to signal over all channels that the readers write; 0 when none has a signal.

    A mean of ratios, because how large a channel is says nothing: another pair may scale it.
    """
    ratios = np.concatenate([reader.noise_to_signal(factors) for reader in readers])
    return float(ratios.mean()) if len(ratios) else 0.0


def _extremes(seen: Sequence[Seen]) -> Floats:
    """A of each channel (C,): its largest magnitude as a share of its tensor's, the largest over all tensors."""
    magnitudes = [np.maximum(item.high, -item.low) for item in seen]
    return np.asarray(np.max([item / item.max() if item.any() else item for item in magnitudes], axis=0))


def _powers_of_two(extremes: Floats, alpha: float) -> NDArray[np.int64]:
    """log2 of the factors (C,): of A ** -alpha, rounded. The typical channel's is 0, and so is a dead one's.

    Rounding leaves a factor of up to 2 between channels, at most 3 dB; in return all products are exact.
    """
    found = np.zeros(extremes.shape, np.int64)
    if (extremes > 0).any():
        live = extremes > _FAINTEST * np.median(extremes[extremes > 0])
        wanted = -alpha * np.log2(extremes[live])
        found[live] = np.rint(wanted - np.median(wanted))
    return found


def _observe(
    model: Artifact,
    found: Sequence[Pair],
    batches: Callable[[int], Iterable[NDArray[np.float32]]],
    progress: Progress,
    total: int = IMAGES,
) -> dict[str, Seen]:
    """Extremes and mean squares of every tensor that a pair's readers read, over the first `total` images."""
    channels = {name: pair.channels for pair in found for name in pair.tensors}
    content, bytes_for_one = _with_outputs(model.path, list(channels))
    source, fixed = model.inputs[0].name, model.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else observe.batch_size(bytes_for_one)
    session = onnxruntime.reference(content, optimise=True)
    seen: dict[str, Seen] = {}
    done = 0
    for batch in _first(batches(size), total):
        session.feed({source: padded(batch, fixed)})
        session.execute()
        values = session.views()
        for name, count in channels.items():
            here = _statistics(values[name][: len(batch)], count)
            seen[name] = _joined(seen[name], here) if name in seen else here
        done += len(batch)
        progress("equalize", done, total)
    session.close()
    if done == 0:
        raise StageError("there was no image to equalize on")
    _check_finite(seen)
    return {name: replace(item, power=item.power / done) for name, item in seen.items()}


def _statistics(values: NDArray[np.float32], channels: int) -> Seen:
    """Of one batch (n, C, ...) or, flattened, (n, C * K): extremes, and the sum of its images' mean squares."""
    by_channel = values.reshape(len(values), channels, -1)
    low, high = by_channel.min(axis=(0, 2)), by_channel.max(axis=(0, 2))
    power = np.einsum("nck,nck->c", by_channel, by_channel, dtype=np.float64) / by_channel.shape[2]
    return Seen(np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64), power)


def _joined(first: Seen, second: Seen) -> Seen:
    """Two batches together; powers are sums until all have been seen."""
    return Seen(np.minimum(first.low, second.low), np.maximum(first.high, second.high), first.power + second.power)


def _check_finite(seen: Mapping[str, Seen]) -> None:
    broken = [name for name, item in seen.items() if not np.isfinite([item.low, item.high, item.power]).all()]
    if broken:
        raise StageError(
            "equalization met activations that are NaN or infinite",
            problems=broken,
            why="the first of them in graph order is where it began",
            fix="check the weights and the preprocessing",
        )


def _with_outputs(path: Path, names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """The graph with these tensors as outputs, as a file's content, and what each takes for one image, in bytes."""
    graph = ir.load(path)
    by_name = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(by_name[name] for name in names)
    sizes = {name: [size for size in (by_name[name].shape or ()) if isinstance(size, int)] for name in names}
    return ir.to_proto(graph).SerializeToString(), {name: 4 * int(np.prod(size or [1])) for name, size in sizes.items()}


def _first(batches: Iterable[NDArray[np.float32]], count: int) -> Iterator[NDArray[np.float32]]:
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def _save_samples(model: Artifact, path: Path) -> None:
    """The golden samples as the equalized graph answers them. Raises StageError when it answers otherwise than before."""
    before = model.samples()
    after = onnxruntime.literally(model, path, before)
    for name, expected in before.expected.items():
        largest, error = float(np.abs(expected).max()), float(np.abs(after.expected[name] - expected).max())
        if not error <= _TOLERANCE * largest:
            raise StageError(
                "the equalized network does not answer like the original",
                why=f"max|d| is {error:.3g} and max|y| is {largest:.3g} on {len(expected)} golden samples",
                fix="quantize.equalize = false leaves the network as it is",
            )
    after.save(path.parent / SAMPLES)


def _described(choice: Choice) -> dict[str, JSON]:
    return {
        "producers": [node.name for node in choice.pair.producers],
        "readers": [node.name for node in choice.pair.readers],
        "alpha": round(choice.alpha, 2),
        "gain_db": round(choice.gain_db, 1),
    }
