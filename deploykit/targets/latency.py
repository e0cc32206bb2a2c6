"""How long a network takes on a target: each kernel by a roofline with a floor, the whole with an interval.

t(kernel) = floor + (t_compute^3 + t_memory^3)^(1/3), where
- floor = launch + ramp / clock: what a kernel takes that has nothing to do;
- t_compute = operations / (efficiency x peak) + drain x one tile on one SM, with channels padded to what the instructions
  take; efficiency is one constant for each kind of arithmetic, lower for narrow and shallow products;
- t_memory = bytes / (efficiency x bandwidth), where tensors that fit the cache come from there.
The constants are fitted on published measurements (`fit`) and stored with their fit in constants.json. Roofline: Williams,
Waterman, Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import UsageError
from deploykit.targets import Target
from deploykit.targets.layers import Layer, Network

Arithmetic = Literal["int8", "fp16", "tf32", "fp32"]
PRECISIONS: tuple[Arithmetic, ...] = ("int8", "fp16", "tf32", "fp32")
WIDTHS = {"int8": 1, "fp16": 2, "tf32": 4, "fp32": 4}
COVERAGE = 0.8  # of the intervals
CALIBRATED = ("launch", "memory", "depthwise", *PRECISIONS)  # what a few measurements of a device can tell

_STORED = Path(__file__).with_name("constants.json")
_TILE = 64
_SHARPNESS = 3.0
_CACHE_BYTES_PER_CLOCK = 32.0  # of each SM or core; between 20 (Turing) and 47 (A100) in published microbenchmarks
_PADDED = {"int8": 16, "fp16": 8, "tf32": 4, "fp32": 1}
_EDGE = 4  # channels that a first layer is padded to, whatever the precision
_STRANGE_SHARE = 0.05
# ONNX Runtime's integer kernels that our Q/DQ graphs use, beside convolutions and matrix products.
_INT8_ON_A_CPU = frozenset(
    {"Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Relu", "Clip"}
    | {"Resize", "Transpose", "Split", "Slice", "Gather"}
)
# TensorRT computes these in half precision between int8 layers: what it reads and writes is twice as wide.
_FLOAT_ON_A_GPU = frozenset(
    {"Swish", "HardSwish", "Mish", "Gelu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Elu", "Softmax"}
)
_PARTS: tuple[Literal["floor", "compute", "memory"], ...] = ("floor", "compute", "memory")


@dataclass(frozen=True)
class Constants:
    """What was fitted. `launch_us` and `ramp_kilocycles` make the floor of a kernel; `host_us` is once for an inference.

    Efficiencies are shares of peak rate by arithmetic, of `depthwise` convolutions (of the FP32 rate), and of bandwidth
    (`memory`). `drain` is in tiles. A product of `narrow` columns, or of a depth of `shallow` bytes, reaches half of the
    efficiency. `sag` is the power of (base clock / clock) by which a GPU slows down under load, for want of power.
    `log_spread` is the half width of an interval of 80 % in ln(latency).
    """

    launch_us: float
    ramp_kilocycles: float
    host_us: float
    int8: float
    fp16: float
    tf32: float
    fp32: float
    depthwise: float
    memory: float
    cache: float
    drain: float
    narrow: float
    shallow: float
    sag: float
    log_spread: float

    def scaled(self, **times: float) -> Constants:
        """The constants of a device where each part of CALIBRATED takes so many times as long; 1 for those left out."""
        efficiencies = {name: getattr(self, name) / times.get(name, 1.0) for name in CALIBRATED[1:]}
        floors = {name: getattr(self, name) * times.get("launch", 1.0) for name in ("launch_us", "ramp_kilocycles", "host_us")}
        return replace(self, **efficiencies, **floors)


@dataclass(frozen=True)
class Domain:
    """What the measurements cover: beyond it a prediction says so."""

    compute_capabilities: tuple[str, ...]
    precisions: tuple[str, ...]
    kinds: tuple[str, ...]
    least_gmacs: float
    most_gmacs: float
    most_batch: int


@dataclass(frozen=True)
class Fit:
    """The stored constants for GPUs and CPUs, where the search began, on what they were fitted, and how well they fit."""

    gpu: Constants
    gpu_start: Constants
    cpu: Constants
    domain: Domain
    facts: Mapping[str, Any]

    @classmethod
    def stored(cls) -> Fit:
        """What comes with this package."""
        content = json.loads(_STORED.read_text())
        domain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content["domain"].items()
        }
        gpu, start, cpu = (Constants(**content[name]) for name in ("gpu", "gpu_start", "cpu"))
        return cls(gpu, start, cpu, Domain(**domain), content["facts"])


@dataclass(frozen=True)
class LayerTime:
    """One kernel's share: its time, and what it is bound by."""

    layer: Layer
    arithmetic: Arithmetic
    time_ns: float
    bound: Literal["floor", "compute", "memory"]
    operations: int
    bytes: int


@dataclass(frozen=True)
class Prediction:
    """A latency of one query of `batch` images, with the interval that holds the measured one in 80 of 100 cases.

    `outside` are the reasons why the measurements do not cover this case; then nothing is known of the interval.
    """

    network: str
    target: str
    mode: str | None
    precision: Arithmetic
    batch: int
    latency_ns: float
    interval_ns: tuple[float, float]
    fixed_ns: float
    per_image_ns: float
    layers: tuple[LayerTime, ...]
    outside: tuple[str, ...]
    calibrated: bool

    @property
    def images_per_second(self) -> float:
        """Throughput of such queries one after another."""
        return self.batch / self.latency_ns * 1e9


def predict(
    network: Network,
    target: Target,
    precision: Arithmetic,
    *,
    batch: int = 1,
    fit: Fit | None = None,
    constants: Constants | None = None,
) -> Prediction:
    """The latency of a network. `constants` are those of a calibrated device, instead of the stored ones for its kind.

    In an INT8 graph with Q/DQ, layers that are not quantized count as FP16, on a CPU as FP32. Raises UsageError when the
    target has no arithmetic of that precision.
    """
    fit = fit or Fit.stored()
    require(target, precision)
    used = constants or (fit.gpu if target.kind == "gpu" else fit.cpu)
    times = layer_times(network, target, precision, batch, used)
    host = used.host_us * 1e3
    total = host + sum(time.time_ns for time in times)
    fixed, per_image = straight_line(network, target, precision, used)
    spread = float(np.exp(used.log_spread))
    return Prediction(
        network=network.name,
        target=target.name,
        mode=target.mode,
        precision=precision,
        batch=batch,
        latency_ns=total,
        interval_ns=(total / spread, total * spread),
        fixed_ns=fixed,
        per_image_ns=per_image,
        layers=times,
        outside=tuple(outside(network, target, precision, batch, fit, is_calibrated=constants is not None)),
        calibrated=constants is not None,
    )


def require(target: Target, precision: str) -> None:
    """Raise UsageError when a target has no arithmetic of that precision."""
    if target.rate(precision) <= 0:
        has = ", ".join(each for each in PRECISIONS if target.rate(each) > 0)
        why = {"int8": "its GPU has no int8 kernels" if target.kind == "gpu" else "its CPU has no int8 instructions"}
        raise UsageError(f"{target.title} cannot run {precision.upper()}", why=why.get(precision, ""), fix=f"it has {has}")


def layer_times(
    network: Network, target: Target, precision: Arithmetic, batch: int, constants: Constants
) -> tuple[LayerTime, ...]:
    """Each kernel's time."""
    used = arithmetics(network, target, precision)
    kernels = Kernels.of(network, target, used, batch)
    parts = dict(zip(_PARTS, kernels.parts(constants), strict=True))
    times = kernels.times(constants)
    return tuple(
        LayerTime(
            layer=layer,
            arithmetic=used[index],
            time_ns=float(times[index]),
            bound=max(_PARTS, key=lambda part, at=index: float(parts[part][at])),  # type: ignore[misc]
            operations=2 * layer.macs * batch,
            bytes=layer.bytes(WIDTHS[used[index]], batch),
        )
        for index, layer in enumerate(network.layers)
    )


def total_ns(network: Network, target: Target, precision: Arithmetic, batch: int, constants: Constants) -> float:
    """Latency alone."""
    kernels = Kernels.of(network, target, arithmetics(network, target, precision), batch)
    return constants.host_us * 1e3 + float(kernels.times(constants).sum())


def straight_line(network: Network, target: Target, precision: Arithmetic, constants: Constants) -> tuple[float, float]:
    """t0 and t1 of t0 + batch x t1, in nanoseconds: through batch 1 and 8."""
    one, eight = (total_ns(network, target, precision, batch, constants) for batch in (1, 8))
    per_image = (eight - one) / 7
    return one - per_image, per_image


def outside(network: Network, target: Target, precision: str, batch: int, fit: Fit, *, is_calibrated: bool = False) -> list[str]:
    """Why the measurements do not cover a case; empty when they do."""
    domain, found = fit.domain, []
    if not is_calibrated and target.kind == "cpu":
        found.append("CPUs were measured on one machine alone; calibrate with measurements of yours")
    elif not is_calibrated and target.compute_capability not in domain.compute_capabilities:
        found.append(f"no GPU of compute capability {target.compute_capability} was measured")
    if not is_calibrated and target.kind == "gpu" and precision not in domain.precisions:
        found.append(f"nothing was measured in {precision.upper()}")
    gmacs = network.macs / 1e9
    if not domain.least_gmacs / 2 <= gmacs <= domain.most_gmacs * 2:
        found.append(f"the network has {gmacs:.3g} GMACs, those measured {domain.least_gmacs:.3g} to {domain.most_gmacs:.3g}")
    work = network.macs or 1
    strange = sum(layer.macs for layer in network.layers if layer.kind not in domain.kinds)
    if strange > _STRANGE_SHARE * work:
        found.append(f"{100 * strange / work:.0f} % of its arithmetic is of a kind that was not measured, such as attention")
    if network.unknown:
        found.append(f"operators that were not measured: {', '.join(network.unknown)}")
    if batch > 2 * domain.most_batch:
        found.append(f"batches were measured up to {domain.most_batch}")
    return found


def arithmetics(network: Network, target: Target, precision: Arithmetic) -> list[Arithmetic]:
    """What each kernel computes in: in an INT8 graph with Q/DQ, a product that is not quantized stays float.

    So does, in INT8 of any kind, what has no integer kernel: swish on a GPU, on a CPU norms too.
    """
    if precision != "int8":
        return [precision] * len(network.layers)
    stays: Arithmetic = "fp16" if target.kind == "gpu" and target.rate("fp16") > 0 else "fp32"

    def is_float(layer: Layer) -> bool:
        if layer.macs:
            return network.has_qdq and not layer.is_int8
        if target.kind == "gpu":
            return not _FLOAT_ON_A_GPU.isdisjoint(layer.operators)
        return not _INT8_ON_A_CPU.issuperset(layer.operators)

    return [stays if is_float(layer) else precision for layer in network.layers]


@dataclass(frozen=True)
class Kernels:
    """Kernels of one query, or of many, as arrays of equal length: what each does, and what its target has.

    Sizes are elements for one image as in `Layer`; `width` are bytes an element, `pad` the multiple that channels are
    rounded up to, `peak` and `plain` operations in a second at its own precision and in FP32, `near` and `far` bytes in a
    nanosecond from cache and from memory.
    """

    macs: NDArray[np.float64]
    weights: NDArray[np.float64]
    moved: NDArray[np.float64]
    columns: NDArray[np.float64]
    depth: NDArray[np.float64]
    is_depthwise: NDArray[np.float64]
    arithmetic: NDArray[np.float64]
    all_weights: NDArray[np.float64]
    batch: NDArray[np.float64]
    width: NDArray[np.float64]
    pad: NDArray[np.float64]
    peak: NDArray[np.float64]
    plain: NDArray[np.float64]
    units: NDArray[np.float64]
    clock_hz: NDArray[np.float64]
    base: NDArray[np.float64]
    far: NDArray[np.float64]
    near: NDArray[np.float64]
    cache: NDArray[np.float64]

    @classmethod
    def of(cls, network: Network, target: Target, used: Sequence[Arithmetic], batch: int) -> Kernels:
        """Those of one query of `batch` images."""
        layers, plain = network.layers, target.rate("fp32")
        units = target.value("sm") or target.value("cores")
        clock_hz = 1e6 * (target.value("gpu_mhz") or target.value("cpu_mhz"))
        widths = [WIDTHS[each] for each in used]
        columns: dict[str, Sequence[float] | float] = {
            "macs": [layer.macs for layer in layers],
            "weights": [layer.weights for layer in layers],
            "moved": [layer.read + layer.written for layer in layers],
            "columns": [layer.columns for layer in layers],
            "depth": [layer.depth for layer in layers],
            "is_depthwise": [layer.kind == "depthwise" for layer in layers],
            "arithmetic": [PRECISIONS.index(each) for each in used],
            "all_weights": sum(layer.weights * width for layer, width in zip(layers, widths, strict=True)),
            "batch": batch,
            "width": widths,
            "pad": [_PADDED[each] for each in used],
            "peak": [target.rate(each) or plain for each in used],
            "plain": plain,
            "units": units,
            "clock_hz": clock_hz,
            "base": min(1.0, 1e6 * target.value("base_mhz") / clock_hz or 1.0),
            "far": target.value("bandwidth_gbs"),
            "near": units * clock_hz / 1e9 * _CACHE_BYTES_PER_CLOCK,
            "cache": 1024 * target.value("l2_kib"),
        }
        return cls(**{name: np.broadcast_to(np.asarray(value, dtype=float), len(layers)) for name, value in columns.items()})

    @classmethod
    def joined(cls, several: Sequence[Kernels]) -> Kernels:
        """Those of many queries, one after another."""
        return cls(**{item.name: np.concatenate([getattr(one, item.name) for one in several]) for item in fields(cls)})

    def times(self, constants: Constants) -> NDArray[np.float64]:
        """Nanoseconds of each kernel."""
        floor, compute, memory = self.parts(constants)
        return np.asarray(floor + (compute**_SHARPNESS + memory**_SHARPNESS) ** (1 / _SHARPNESS))

    def parts(self, constants: Constants) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Floor, compute and memory time of each kernel in nanoseconds."""
        floor = constants.launch_us * 1e3 + 1e12 * constants.ramp_kilocycles / self.clock_hz
        return np.asarray(floor), self._compute(constants), self._memory(constants)

    def _compute(self, constants: Constants) -> NDArray[np.float64]:
        """Operations over the rate, and the tile that the last SM still works on when the others are done."""
        efficiency = np.array([getattr(constants, name) for name in PRECISIONS])[self.arithmetic.astype(int)]
        is_depthwise = self.is_depthwise > 0
        filled = self.columns / (self.columns + constants.narrow) * self.depth / (self.depth + constants.shallow / self.width)
        dense = self.peak * efficiency * np.where(self.macs > 0, filled, 1.0) * self.base**constants.sag
        rate = np.where(is_depthwise, self.plain * constants.depthwise, dense)
        pad = np.where(is_depthwise, 1.0, self.pad)
        padded = _padding(self.depth, np.where(self.depth < pad, _EDGE, pad)) * _padding(self.columns, pad)
        # Tiles that large are those of tensor cores; plain FP32 has smaller ones.
        is_tiled = self.arithmetic != PRECISIONS.index("fp32")
        tile = is_tiled * 2 * _TILE * np.clip(self.columns, 1, _TILE) * self.depth
        return np.asarray(1e9 * (2 * self.macs * self.batch * padded / rate + constants.drain * tile * self.units / rate))

    def _memory(self, constants: Constants) -> NDArray[np.float64]:
        """What fits the cache is read from it: activations of one layer, weights when those of all layers fit together."""
        cache = self.cache * constants.cache
        moved, weights = self.moved * self.width * self.batch, self.weights * self.width
        missed = moved * moved / (moved + cache) + weights * self.all_weights / (self.all_weights + cache)
        near = np.maximum(self.near, self.far)
        return np.asarray((missed / self.far + (moved + weights - missed) / near) / constants.memory)


def _padding(sizes: NDArray[np.float64], multiples: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times larger sizes get when each is rounded up to a multiple; 1 for a size of 0."""
    some = np.maximum(1.0, sizes)
    return np.asarray(np.where(sizes > 0, np.ceil(some / multiples) * multiples / some, 1.0))
