"""Constants from measurements: least squares in ln(latency), robust, with a prior that keeps what data do not tell.

`fitted` fits all constants on many devices; `calibrated` a few factors on a few measurements of one. The interval comes from
residuals of measurements that the constants were not fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import UsageError
from deploykit.targets import Target
from deploykit.targets.latency import CALIBRATED, COVERAGE, Arithmetic, Constants, Kernels, arithmetics
from deploykit.targets.layers import Network

_STEPS = 40
_SMALL_STEP = 1e-5
_HUBER = 0.25  # residuals in ln(latency) beyond this pull linearly
_PRIOR = 1.0  # standard deviation of ln(constant) around its start
_CALIBRATION_PRIOR = 0.3  # of one part's factor around the device's own
_BETWEEN_NETWORKS = 0.3  # in ln(latency), what is left between networks of one device whose constants are known
_NOISE = 0.15  # of a measurement in ln(latency), beside which priors count
_FRAMEWORK_US = (150.0, 400.0)  # where the search for what a framework's call adds begins: beside a server's CPU, a board's

Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Row:
    """One measurement: `latency_ns` of a query of `batch` images. `by_framework`: timed around a framework's call."""

    network: Network
    target: Target
    precision: Arithmetic
    batch: int
    latency_ns: float
    by_framework: bool = False


class Rows:
    """Measurements as one array of kernels, so that all of them are predicted in a millisecond."""

    def __init__(self, rows: Sequence[Row]) -> None:
        if not rows:
            raise UsageError("there are no measurements to fit")
        each = [
            Kernels.of(row.network, row.target, arithmetics(row.network, row.target, row.precision), row.batch) for row in rows
        ]
        self._kernels = Kernels.joined(each)
        self._starts = np.cumsum([0, *(len(kernels.macs) for kernels in each[:-1])])
        timed = [row.by_framework * np.array([not row.target.is_jetson, row.target.is_jetson]) for row in rows]
        self._by_framework = np.array(timed, dtype=float)
        self.log_measured = np.log([row.latency_ns for row in rows])

    def log_predicted(
        self, constants: Constants, framework_us: Sequence[float] | NDArray[np.float64] = (0.0, 0.0)
    ) -> NDArray[np.float64]:
        """ln of each row's latency in nanoseconds.

        `framework_us` is added to those that a framework's call was timed for: beside a server's CPU, and on a Jetson.
        """
        sums = np.add.reduceat(self._kernels.times(constants), self._starts)
        return np.asarray(np.log(sums + 1e3 * constants.host_us + 1e3 * self._by_framework @ np.asarray(framework_us)))


def fitted(rows: Sequence[Row], start: Constants) -> tuple[Constants, tuple[float, float]]:
    """The constants that fit, and what a framework's call adds in microseconds, on servers and on boards.

    `log_spread` stays that of `start`.
    """
    data = Rows(rows)
    names = [item.name for item in fields(Constants) if item.name != "log_spread"]
    origin = np.log([*(getattr(start, name) for name in names), *_FRAMEWORK_US])

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.exp(point)
        constants = replace(start, **dict(zip(names, map(float, values[:-2]), strict=True)))
        return data.log_predicted(constants, values[-2:]) - data.log_measured

    found = np.exp(_search(residuals, origin, _PRIOR))
    return replace(start, **dict(zip(names, map(float, found[:-2]), strict=True))), (float(found[-2]), float(found[-1]))


def calibrated(rows: Sequence[Row], start: Constants) -> Constants:
    """The constants of one device, from a few measurements on it: one factor for all, and one for each part of CALIBRATED.

    The prior lets the common factor go where it will and keeps the others near it, so that what measurements do not tell apart
    stays together. The interval narrows with the number of networks n, from that of `start` by 1 / sqrt(n), down to what
    networks differ by on one device, and not below what the measurements themselves scatter by. Raises UsageError without any.
    """
    data = Rows(rows)

    def constants(point: NDArray[np.float64]) -> Constants:
        return start.scaled(**dict(zip(CALIBRATED, map(float, np.exp(point[0] + point[1:])), strict=True)))

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        return data.log_predicted(constants(point)) - data.log_measured

    origin = np.zeros(1 + len(CALIBRATED))
    prior = np.array([_PRIOR, *(_CALIBRATION_PRIOR for _ in CALIBRATED)])
    point = _search(residuals, origin, prior)
    scatter = float(np.sqrt(np.mean(residuals(point) ** 2))) * 1.28  # a normal distribution's 80 %
    networks = len({row.network.name for row in rows})
    between = max(_BETWEEN_NETWORKS, start.log_spread / networks**0.5)
    return replace(constants(point), log_spread=max(min(start.log_spread, between), scatter))


def spread(residuals: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Half the width of an interval in ln(latency) that holds COVERAGE of residuals, each group counting alike."""
    sizes = {group: groups.count(group) for group in set(groups)}
    ordered = sorted((abs(value), 1 / sizes[group]) for value, group in zip(residuals, groups, strict=True))
    total, so_far = sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        so_far += weight
        if so_far >= COVERAGE * total - 1e-9:
            return value
    raise UsageError("there are no residuals to take an interval from")


def _search(residuals: Function, origin: NDArray[np.float64], prior: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Levenberg-Marquardt on Huber's loss by reweighting, with a normal prior around `origin`."""
    point, damping = origin.copy(), 1e-2
    bend = np.broadcast_to((_NOISE / np.asarray(prior)) ** 2, origin.shape)

    def loss(at: NDArray[np.float64]) -> float:
        size = np.abs(residuals(at))
        huber = np.where(size < _HUBER, size**2, _HUBER * (2 * size - _HUBER))
        return float(huber.sum() + (bend * (at - origin) ** 2).sum())

    now = loss(point)
    for _ in range(_STEPS):
        here = residuals(point)
        slopes = np.stack([(residuals(point + step) - here) / _SMALL_STEP for step in _SMALL_STEP * np.eye(len(point))], axis=1)
        weights = np.minimum(1.0, _HUBER / np.maximum(np.abs(here), 1e-12))
        curvature = slopes.T @ (weights[:, None] * slopes) + np.diag(bend)
        downhill = -(slopes.T @ (weights * here)) - bend * (point - origin)
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), downhill)
        trial = loss(point + step)
        if trial < now:
            done = now - trial < 1e-9 * now
            point, now, damping = point + step, trial, max(1e-6, damping / 3)
            if done:
                break
        else:
            damping *= 4
            if damping > 1e6:
                break
    return point
