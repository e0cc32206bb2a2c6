"""Whether a benchmark run may be believed: what disturbed it, from the kernel's accounts and from the samples themselves.

A process is disturbed when its own account says so, and is then measured again. A few disturbed ones that remain do no
harm, because what is stated are medians over processes; when they are more than a fifth, or when all of them drift, the
run proves nothing and says why.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import TYPE_CHECKING

from deploykit.benchmark.conditions import Conditions
from deploykit.benchmark.statistics import FEWEST_PROCESSES
from deploykit.telemetry.nvml import HELD

if TYPE_CHECKING:
    from deploykit.benchmark.report import Process

_DISTURBED_SHARE = 0.2
_WAITED_SHARE = 0.03
_OTHERS_SHARE = 0.05
_STOLEN_SHARE = 0.05
_TICK_NS = 10_000_000  # /proc/stat counts each core's time in jiffies, so a short window sees all or nothing of one
_THROTTLED_SHARE = 0.01
_SHORTEST_SLEEP_NS = 100_000_000  # two clocks are read one after the other, and a switch between them looks like sleep
_FIXED_WORK_SPREAD = 1.25
_SAME_CLOCK = 1.05
_DRIFT = 1.10
_ORDERS, _BY_CHANCE = 500, 0.01


def doubts(engines: Mapping[str, Sequence[Process]], order: Sequence[Process]) -> tuple[str, ...]:
    """Every reason not to believe a run: `engines` by label, and all processes in the `order` in which they ran."""
    return (
        *_too_few(engines),
        *_unseen([process.conditions for process in order]),
        *_disturbed(engines),
        *_clock([process.conditions for process in order]),
        *_throttled([process.conditions for process in order]),
        *(doubt for label, ran in engines.items() for doubt in drift_inside(label, [process.latency_ns for process in ran])),
        *_drift_over_the_run(engines, order),
    )


def other_clock(fixed_work_ns: Mapping[str, float]) -> list[str]:
    """Why latencies of two runs do not compare, from what the same fixed work took in each, by where it ran.

    No run knows whether the machine itself was slower in the other; the work that both did says so.
    """
    if max(fixed_work_ns.values()) <= _SAME_CLOCK * min(fixed_work_ns.values()):
        return []
    took = " and ".join(f"{ns / 1e3:.0f} µs {where}" for where, ns in fixed_work_ns.items())
    return [f"the same fixed work took {took}: the machine's clock changed"]


def _too_few(engines: Mapping[str, Sequence[Process]]) -> Iterable[str]:
    for label, processes in engines.items():
        if len(processes) < FEWEST_PROCESSES:
            yield f"{label}: {len(processes)} processes, and an interval takes at least {FEWEST_PROCESSES}"


def _unseen(all_conditions: Sequence[Conditions]) -> Iterable[str]:
    """Where neither account is kept, nobody looked for neighbours, and silence proves nothing."""
    blind = sum(conditions.waited_ns is None and conditions.others_ns is None for conditions in all_conditions)
    if blind:
        yield (
            f"nothing tells whether other programs ran in {blind} of {len(all_conditions)} processes: here are neither the time "
            "that threads waited for a core (schedstat) nor what others took of the cores (/proc/stat)"
        )


def _disturbed(engines: Mapping[str, Sequence[Process]]) -> Iterable[str]:
    """Engines of whose processes too many were disturbed, whatever the cause, with what the kernel counted."""
    for label, processes in engines.items():
        found = [causes for process in processes if (causes := disturbances(process.conditions))]
        if len(found) > _DISTURBED_SHARE * len(processes):
            names = dict.fromkeys(cause for causes in found for cause in causes)
            told = [
                f"{cause} ({100 * statistics.median(causes[cause] for causes in found if cause in causes):.0f} % of the time)"
                for cause in names
            ]
            yield f"{label}: {len(found)} of {len(processes)} processes were disturbed: {', '.join(told)}"


def disturbances(c: Conditions) -> dict[str, float]:
    """What disturbed one process beyond what a quiet machine shows, with its share of the time of its cores."""
    whole, coarse = c.wall_ns * c.cores, _TICK_NS * c.cores
    limits = (
        ("its threads waited for a core", c.waited_ns, whole, _WAITED_SHARE, 0),
        ("other programs used its cores", c.others_ns, whole, _OTHERS_SHARE, coarse),
        ("the hypervisor took its cores away", c.stolen_ns, whole, _STOLEN_SHARE, coarse),
        ("a CPU quota throttled it", c.throttled_ns, c.wall_ns, _THROTTLED_SHARE, 0),
        ("the machine slept", c.suspended_ns, c.wall_ns, 0, _SHORTEST_SLEEP_NS),
    )
    return {cause: spent / of for cause, spent, of, limit, error in limits if spent is not None and spent > limit * of + error}


def _clock(all_conditions: Sequence[Conditions]) -> Iterable[str]:
    """The same work takes the same time at the same clock; the frequency is not readable everywhere, the work is."""
    for_each = [statistics.median(conditions.fixed_work_ns) for conditions in all_conditions]
    ordered = sorted(for_each)
    low, high = ordered[len(ordered) // 10], ordered[-(len(ordered) // 10) - 1]
    if high > _FIXED_WORK_SPREAD * low:
        yield (
            f"the same fixed work took {low / 1e3:.0f} to {high / 1e3:.0f} µs: the clock changed (throttling), or the cores "
            "are shared"
        )


def _throttled(all_conditions: Sequence[Conditions]) -> Iterable[str]:
    """A board or GPU that slows down to protect itself measures its cooling, whichever process it happened in."""
    reasons = [reason for conditions in all_conditions for reason in conditions.throttled]
    if reasons:
        affected = sum(bool(conditions.throttled) for conditions in all_conditions)
        what = "GPU" if reasons[0].startswith(HELD) else "board"
        yield f"the {what} throttled in {affected} of {len(all_conditions)} processes: {reasons[0]}"


def drift_inside(label: str, processes: Iterable[Sequence[int]]) -> Iterable[str]:
    """Queries of one process, in their order, that get slower are throttled; ones that get faster were not warmed up."""
    ratios = [
        statistics.median(queries[-third:]) / statistics.median(queries[:third])
        for queries in processes
        if (third := len(queries) // 3)
    ]
    if not ratios:
        return
    ratio = statistics.median(ratios)
    if ratio > _DRIFT:
        yield f"{label}: queries get {100 * (ratio - 1):.0f} % slower while a process runs (throttling?)"
    elif ratio < 1 / _DRIFT:
        yield f"{label}: queries get {100 * (1 / ratio - 1):.0f} % faster while a process runs (more warm-up is needed)"


def _drift_over_the_run(engines: Mapping[str, Sequence[Process]], order: Sequence[Process]) -> Iterable[str]:
    """From the first third of the run to the last, over all engines; the order is random, so ratios survive it, times do not.

    A drift is more than what other orders of the same processes show: those of a very small network lie at two or three
    different latencies on a quiet machine, and thirds of few of them differ by chance.
    """
    typical = {label: statistics.median(p.median_ns for p in processes) for label, processes in engines.items()}
    relative = [process.median_ns / typical[process.label] for process in order]
    third = len(relative) // 3
    if third < FEWEST_PROCESSES:
        return
    ratio = statistics.median(relative[-third:]) / statistics.median(relative[:third])
    if not 1 / _DRIFT < ratio < _DRIFT and _is_ordered(relative):
        way = "slower" if ratio > 1 else "faster"
        yield f"everything got {100 * (max(ratio, 1 / ratio) - 1):.0f} % {way} from the first third of the run to the last"


def _is_ordered(times: Sequence[float]) -> bool:
    """Whether so much of a trend is rare (1 %) among other orders of the same times: a permutation test of their covariance
    with their place."""
    logs, middle = [log(time) for time in times], (len(times) - 1) / 2
    shuffle = random.Random(0)  # noqa: S311 - a sample of orders, not a secret

    def trend(order: Sequence[float]) -> float:
        return abs(sum((place - middle) * value for place, value in enumerate(order)))

    others = [trend(shuffle.sample(logs, len(logs))) for _ in range(_ORDERS)]
    return sum(other >= trend(logs) for other in others) <= _BY_CHANCE * _ORDERS
