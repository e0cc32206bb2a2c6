"""MODEL -> its kernels, its predicted latency, and what of it fits a budget, for a device that nobody has yet.

`graphs` reads models, `measured` what was measured on a device; `report.forecast` draws.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploykit import targets
from deploykit.errors import UsageError, printable
from deploykit.forecast import measured as measurements
from deploykit.forecast.graphs import network_of
from deploykit.forecast.measured import PRECISIONS, arithmetic
from deploykit.machine import Machine
from deploykit.targets import Target, here, latency
from deploykit.targets.latency import Prediction
from deploykit.targets.layers import Network

__all__ = ["BATCHES", "Choice", "arithmetic", "budget_of", "network_of", "plan", "predict", "target_of"]

BATCHES = (1, 2, 4, 8, 16, 32)
_RELATIVES = 4
_UNITS_NS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}


@dataclass(frozen=True)
class Choice:
    """One way to keep a budget. `fits` when the whole interval is below it, `may fit` when the prediction itself is."""

    network: str
    prediction: Prediction
    fits: Literal["fits", "may fit", "does not fit"]


def predict(
    model: str | Network,
    target: Target,
    *,
    precision: str | None = None,
    batch: int = 1,
    size: int | None = None,
    measured: Path | None = None,
) -> Prediction:
    """The latency of a model on a target. Without `precision` it is the graph's own: INT8 with Q/DQ, otherwise FP32.

    `model` is the name of a network, an ONNX file, or the folder of an artifact or a bundle; `size` is the height and width where
    it leaves them open. `precision` is one of `fp32`, `tf32`, `fp16` and `int8`. `measured` is a file of measurements on that
    very device; then the constants are fitted on them.

    Raises UsageError for what cannot be read, ModelError for an unknown name.
    """
    network = network_of(model, size=size, precision=precision) if isinstance(model, str) else model
    wanted = arithmetic(precision or ("int8" if network.has_qdq else "fp32"), target)
    constants = None if measured is None else measurements.constants(measured, target)
    return latency.predict(network, target, wanted, batch=batch, constants=constants)


def plan(
    model: str,
    target: Target,
    budget_ns: float,
    *,
    size: int | None = None,
    relatives: bool = True,
    measured: Path | None = None,
) -> list[Choice]:
    """What keeps the budget, best first: precisions and batches of a network, and of its smaller relatives at batch 1.

    Every case is listed, also those that do not fit; an INT8 graph is only planned in INT8. `budget_ns` is for one query of a
    batch. Arguments and errors are those of `predict`.
    """
    constants = None if measured is None else measurements.constants(measured, target)
    network = network_of(model, size=size)
    kinds = ("int8",) if network.has_qdq else PRECISIONS
    usable = [arithmetic(each, target) for each in kinds if target.rate(each) > 0]
    cases = [(network, each, batch) for each in usable for batch in BATCHES]
    for name in _smaller(model) if relatives else ():
        cases += [(network_of(name), each, 1) for each in usable]
    found = []
    for one, each, batch in cases:
        predicted = latency.predict(one, target, each, batch=batch, constants=constants)
        found.append(Choice(one.name, predicted, _verdict(predicted, budget_ns)))
    order = ("fits", "may fit", "does not fit")
    return sorted(found, key=lambda choice: (order.index(choice.fits), -choice.prediction.images_per_second))


def budget_of(text: str) -> float:
    """Nanoseconds of a time such as `5ms`. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(us|µs|ms|s)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{printable(text)!r} is not a time", fix="--budget 5ms")
    return float(found[1]) * _UNITS_NS[found[2]]


def _verdict(predicted: Prediction, budget_ns: float) -> Literal["fits", "may fit", "does not fit"]:
    if predicted.interval_ns[1] <= budget_ns:
        return "fits"
    return "may fit" if predicted.latency_ns <= budget_ns else "does not fit"


def _smaller(model: str) -> Sequence[str]:
    """Names of the catalogue that begin like this one and have fewer operations, the nearest first."""
    if Path(model).exists():
        return ()
    from deploykit import models  # torch, which files do without

    entries = {entry.name: entry for entry in models.catalogue()}
    if model not in entries:
        return ()
    family = re.split(r"\d|_[a-z]+$", model)[0]
    own = entries[model]
    near = [
        entry
        for entry in entries.values()
        if re.split(r"\d|_[a-z]+$", entry.name)[0] == family and entry.task == own.task and entry.gmacs < 0.95 * own.gmacs
    ]
    return [entry.name for entry in sorted(near, key=lambda entry: -entry.gmacs)[:_RELATIVES]]


def target_of(name: str | None, mode: str | None = None, measured: Path | None = None) -> Target:
    """A target by name or file, in a power mode: `local` is this machine, and without a name it is what `measured` is about.

    Raises UsageError for a target or a mode that there is not, and a file that is none.
    """
    if name is None:
        if measured is None:
            raise UsageError("no target is named", fix="--target NAME; deploykit targets lists them, local is this machine")
        found = measurements.device_of(measured)
    else:
        found = here.of_machine(Machine.probe()) if name == here.NAME else targets.find(name)
    return found if mode is None else targets.in_mode(found, mode)
