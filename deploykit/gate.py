"""Gate rules: one line of text that says what must hold before an engine ships.

    disagreements <= 2          images on which the engine and FP32 PyTorch choose another class
    agreement >= 99 %           the share of images on which they choose the same class
    drop <= 0.5 points          top-1 accuracy lost, in percentage points, on labelled images
    latency <= 5 ms             median compute latency of one query
    slowdown <= 5 %             how much longer that takes than the baseline's: the FP32 engine's, or another run's

A count is decided exactly. Everything else is an estimate from a sample of images or processes, so it is judged by its
95 % interval: wholly inside the limit passes, wholly outside fails, anything else cannot be told from so few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from math import ceil, exp, isfinite, lgamma, log, log1p, sqrt

_RULE = re.compile(
    r"\s*(?P<metric>\w+)\s*(?P<operator><=|>=)\s*(?P<limit>\d{1,9}(?:\.\d{1,9})?)\s*(?P<unit>%|points|ms)?\s*", re.ASCII
)
_METRICS = {
    "disagreements": ("<=", None),
    "agreement": (">=", "%"),
    "drop": ("<=", "points"),
    "latency": ("<=", "ms"),
    "slowdown": ("<=", "%"),
}
# Gates that hold without a rule, by the words that reports and CI look for.
REALISED, ANSWERS = "every layer meant for int8 runs in it", "B answers like A"
_OF_TIME = ("latency", "slowdown")
_AT_MOST_100 = ("agreement", "drop")
_MANY_IMAGES = 10**7
_MANY_PROCESSES = 1_000
_TAIL = 0.025  # of each end of a 95 % interval
_MOST_TERMS, _CONVERGED = 100_000, 1e-12
_Z95 = 1.959963984540054  # standard normal quantile of 97.5 %


class Verdict(str, Enum):
    """What a gate says. `cannot tell` is neither: more images or processes, or an undisturbed run, would decide it."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    FAIL = "fail"
    CANNOT_TELL = "cannot tell"


EXIT_CODES = {Verdict.PASS: 0, Verdict.FAIL: 3, Verdict.CANNOT_TELL: 5, None: 0}


@dataclass(frozen=True)
class Rule:
    """One parsed gate rule; `limit` is in the unit that its metric has above, and `str` of it is what `parse_rule` reads."""

    metric: str
    limit: float

    @property
    def is_of_time(self) -> bool:
        """Whether a benchmark judges it, and not a comparison of answers."""
        return self.metric in _OF_TIME

    def __str__(self) -> str:
        operator, unit = _METRICS[self.metric]
        limit = f"{Decimal(str(self.limit)).normalize():f}"  # every digit, and never an exponent: it can be parsed again
        return f"{self.metric} {operator} {limit}{f' {unit}' if unit else ''}"


@dataclass(frozen=True)
class PairedCounts:
    """How two classifiers did on the same images.

    `disagreements` counts images with another top-1 class. With labels, `lost` counts images only the reference got
    right and `gained` those only the engine got right; both are None without labels.
    """

    images: int
    disagreements: int
    lost: int | None = None
    gained: int | None = None


@dataclass(frozen=True)
class Timing:
    """What a benchmark says about a rule's metric, in the rule's unit, with its 95 % interval over fresh processes.

    `doubts` are the reasons why the run is not valid. `processes` are `times` as many as each engine was asked to have.
    """

    observed: float
    interval: tuple[float, float]
    processes: int
    doubts: tuple[str, ...]
    times: int = 1


@dataclass(frozen=True)
class GateResult:
    """A rule, the verdict on it, and the reason in words; `observed` and its 95 % `interval` are in the rule's unit.

    `observed` is None where nothing was, `interval` for an exact count.
    """

    rule: str
    verdict: Verdict
    observed: float | None
    interval: tuple[float, float] | None
    reason: str


def worst(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The verdict on all: a failure outweighs what cannot be told. None when nothing was judged."""
    found = set(verdicts)
    return next((verdict for verdict in (Verdict.FAIL, Verdict.CANNOT_TELL, Verdict.PASS) if verdict in found), None)


def parse_rule(text: str) -> Rule:
    """Parse one rule. Raises ValueError with the reason when it is not one of the forms above."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a gate rule such as 'drop <= 0.5 points', 'agreement >= 99 %', 'latency <= 5 ms'")
    metric, operator, unit = match["metric"], match["operator"], match["unit"]
    if metric not in _METRICS:
        raise ValueError(f"{text!r}: unknown metric {metric!r}; known are {', '.join(_METRICS)}")
    if (operator, unit) != _METRICS[metric]:
        wanted = Rule(metric, float(match["limit"]))
        raise ValueError(f"{text!r}: write {str(wanted)!r}")
    if metric in _AT_MOST_100 and float(match["limit"]) > 100:
        raise ValueError(f"{text!r}: no {metric} is above 100 {unit}")
    if metric == "disagreements" and not float(match["limit"]).is_integer():
        raise ValueError(f"{text!r}: images are counted in whole numbers")
    return Rule(metric, float(match["limit"]))


def rule_in(told: str) -> Rule | None:
    """The rule that somebody wrote, without the engine before it, as in `onnxruntime int8: drop <= 0.5 points`; None for a gate
    that has to hold without a rule."""
    try:
        return parse_rule(told.rpartition(": ")[2])
    except ValueError:
        return None


def judge(rule: Rule, counts: PairedCounts) -> GateResult:
    """Judge a rule of answers, one of the first three above. Raises ValueError for a drop where there are no labels."""
    if rule.metric == "disagreements":
        verdict = Verdict.PASS if counts.disagreements <= rule.limit else Verdict.FAIL
        reason = f"{counts.disagreements} of {counts.images} images"
        return GateResult(str(rule), verdict, counts.disagreements, None, reason)
    if rule.metric == "agreement":
        observed = 100 * (counts.images - counts.disagreements) / counts.images
    elif counts.lost is None or counts.gained is None:
        raise ValueError(f"'{rule}' needs labelled images")
    else:
        observed = 100 * (counts.lost - counts.gained) / counts.images

    def interval(images: float) -> tuple[float, float]:
        return _interval(rule, counts, images)

    found = interval(counts.images)
    reason = f"observed {observed:.2f}, 95 % interval {found[0]:.2f} to {found[1]:.2f} on {counts.images} images"
    return _estimated(rule, observed, found, reason, interval, counts.images)


def judge_parts(rule: Rule, units: str, pictures: Sequence[tuple[int, int]]) -> GateResult:
    """Judge a rule about parts of pictures, called `units`: (parts, those decided alike) of each picture.

    Raises ValueError when a drop is asked for: parts have no labels.
    """
    parts, same = sum(all_of for all_of, _ in pictures), sum(alike for _, alike in pictures)
    if rule.metric == "disagreements":
        verdict = Verdict.PASS if parts - same <= rule.limit else Verdict.FAIL
        return GateResult(str(rule), verdict, parts - same, None, f"{parts - same:,} of {parts:,} {units}")
    if rule.metric != "agreement":
        raise ValueError(f"'{rule}' needs labelled images")
    if not parts:
        return GateResult(str(rule), Verdict.CANNOT_TELL, None, None, f"neither side found {units}, so nothing was compared")

    def interval(images: float) -> tuple[float, float]:
        low, high = clustered_interval(pictures, images / len(pictures))
        return 100 * low, 100 * high

    observed, found = 100 * same / parts, interval(len(pictures))
    low, high = found
    reason = f"observed {observed:.2f}, 95 % interval {low:.2f} to {high:.2f} on {parts:,} {units} of {len(pictures)} images"
    return _estimated(rule, observed, found, reason, interval, len(pictures))


def clustered_interval(pictures: Sequence[tuple[int, int]], times: float = 1.0) -> tuple[float, float]:
    """95 % interval of the share of parts that are decided alike, from (parts, those decided alike) of each picture.

    Parts of one picture go wrong together, so they count for fewer than they are: the exact interval for as many as would have
    the variance that the ratio has between pictures, and fewer still where that variance is known from few of them (Korn and
    Graubard, Survey Methodology 24, 1998). Where all are decided alike the variance is that with one part decided otherwise. A
    single picture, which says nothing of it, counts as one part. `times` is how many times as many such pictures there were.
    """
    parts, same = sum(all_of for all_of, _ in pictures), sum(alike for _, alike in pictures)
    count, share = len(pictures), same / parts
    seen = list(pictures)
    if same == parts:
        at = next(index for index, (all_of, _) in enumerate(seen) if all_of)
        seen[at] = (seen[at][0], seen[at][1] - 1)
    effective = 1.0
    if count > 1:
        around = sum(alike for _, alike in seen) / parts
        spread = sum((alike - around * all_of) ** 2 for all_of, alike in seen)
        variance = count / (count - 1) * spread / parts**2
        alone = around * (1 - around) / variance if variance > 0 else float(parts)
        known = (student_t(max(1, parts - 1)) / student_t(count - 1)) ** 2
        effective = min(float(parts), max(1.0, alone * known))
    return exact_interval(share * effective * times, effective * times)


def judge_time(rule: Rule, found: Timing) -> GateResult:
    """Judge a rule of time. A run that is not valid, whatever its numbers say, cannot tell."""
    (low, high), unit = found.interval, _METRICS[rule.metric][1]
    reason = f"observed {found.observed:.4g} {unit}, 95 % interval {low:.4g} to {high:.4g} over {found.processes} processes"
    verdict = _verdict(rule, found.interval)
    if found.doubts:
        verdict, reason = Verdict.CANNOT_TELL, f"{reason}; the run is invalid: {'; '.join(found.doubts)}"
    elif verdict is Verdict.CANNOT_TELL:
        needed = _processes_to_decide(rule.limit, found)
        more = "no practical number of processes" if needed is None else f"about {needed} processes for each engine"
        reason += f"; {more} would decide it"
    return GateResult(str(rule), verdict, found.observed, found.interval, reason)


def exact_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % interval of a proportion (Clopper and Pearson, Biometrika 26, 1934), also where neither number is whole.

    Each of its ends is passed by the truth in at most 2.5 % of all samples, whatever the truth is. A score interval (Wilson)
    holds that on average alone: of engines that just keep `agreement >= 99 %` it fails up to 15 % on few images.
    """
    failures = trials - successes
    low = 0.0 if successes <= 0 else _bisect(lambda x: -_beta(x, successes, failures + 1), -_TAIL, 0.0, 1.0)
    high = 1.0 if failures <= 0 else _bisect(lambda x: -_beta(x, successes + 1, failures), _TAIL - 1, 0.0, 1.0)
    return low, high


def student_t(freedom: int) -> float:
    """The quantile of 97.5 % of Student's t with so many degrees of freedom."""
    # P(|T| > t) = I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2), DLMF 8.17.
    x = _bisect(lambda x: -_beta(x, freedom / 2, 0.5), -2 * _TAIL, 0.0, 1.0)
    return sqrt(freedom * (1 - x) / x)


def _beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22) and Lentz's method."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, the other end's converges fast
        return 1 - _beta(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    value, over, under = 1.0, 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = under
    for m in range(1, _MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            under, over = 1 / (1 + term * under), 1 + term / over
            value *= under * over
        if abs(under * over - 1) < _CONVERGED:
            break
    return front * value


def paired_difference_interval(lost: float, gained: float, images: float) -> tuple[float, float]:
    """95 % score interval of (lost - gained) / images for paired decisions.

    The interval holds every difference that the score test of Tango (Statistics in Medicine 17, 1998) does not
    reject. Unlike a bootstrap it stays honest when nothing flipped: 0 of n flips still allows about 3.8 / n.
    """

    def score(difference: float) -> float:
        # Tango's equation 3: the restricted maximum-likelihood estimate of P(gained), then the score statistic.
        a = 2 * images
        b = -lost - gained + (2 * images - lost + gained) * difference
        c = -gained * difference * (1 - difference)
        gained_share = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = images * (2 * gained_share + difference * (1 - difference))
        numerator = lost - gained - images * difference
        return numerator / sqrt(variance) if variance > 0 else 0.0 if numerator == 0 else float("inf") * numerator

    estimate = (lost - gained) / images
    return _bisect(score, _Z95, -1.0, estimate), _bisect(score, -_Z95, estimate, 1.0)


def smallest_visible_drop(images: int) -> float:
    """Percentage points that accuracy may have lost, at 95 %, when not one of `images` paired decisions flipped."""
    return 100 * paired_difference_interval(0, 0, images)[1]


def _interval(rule: Rule, counts: PairedCounts, images: float) -> tuple[float, float]:
    """95 % interval in percent of what `rule` limits, had the same shares been counted on so many images."""
    if rule.metric == "agreement":
        low, high = exact_interval((counts.images - counts.disagreements) * images / counts.images, images)
    else:
        assert counts.lost is not None
        assert counts.gained is not None
        lost, gained = counts.lost * images / counts.images, counts.gained * images / counts.images
        low, high = paired_difference_interval(lost, gained, images)
    return 100 * low, 100 * high


def _verdict(rule: Rule, interval: tuple[float, float]) -> Verdict:
    low, high = interval
    if rule.metric == "agreement":
        inside, outside = low >= rule.limit, high < rule.limit
    else:
        inside, outside = high <= rule.limit, low > rule.limit
    return Verdict.PASS if inside else Verdict.FAIL if outside else Verdict.CANNOT_TELL


def _estimated(
    rule: Rule,
    observed: float,
    found: tuple[float, float],
    reason: str,
    interval: Callable[[float], tuple[float, float]],
    images: int,
) -> GateResult:
    """A rule judged by the interval that was `found` on so many images; `interval` gives that of another number of them."""
    verdict = _verdict(rule, found)
    if verdict is Verdict.CANNOT_TELL and observed == rule.limit:
        reason += "; the observed value is the limit itself, so no number of images decides it"
    elif verdict is Verdict.CANNOT_TELL:
        reason += _how_many_would_decide(rule, interval, images)
    return GateResult(str(rule), verdict, observed, found, reason)


def _how_many_would_decide(rule: Rule, interval: Callable[[float], tuple[float, float]], images: int) -> str:
    """Found by trying: the interval of something rare shrinks faster than with the square root of the number of images."""

    def undecided(images: float) -> bool:
        return _verdict(rule, interval(images)) is Verdict.CANNOT_TELL

    few, enough = float(images), 2.0 * images
    while undecided(enough):
        if enough > _MANY_IMAGES:
            return f"; more than {_MANY_IMAGES} images would be needed to decide it"
        few, enough = enough, 2 * enough
    while enough - few > 1:
        middle = (few + enough) / 2
        few, enough = (middle, enough) if undecided(middle) else (few, middle)
    return f"; about {ceil(enough)} images would decide it"


def _processes_to_decide(limit: float, found: Timing) -> int | None:
    """How many processes shrink the interval until it ends short of `limit`: its width falls with their square root."""
    low, high = found.interval
    distance = abs(found.observed - limit)
    reach = high - found.observed if limit > found.observed else found.observed - low
    if distance == 0 or not isfinite(reach):
        return None
    needed = ceil(found.processes / found.times * (reach / distance) ** 2) + 1
    return needed if needed <= _MANY_PROCESSES else None


def _bisect(score: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The argument in [low, high] at which the falling function `score` passes `target`."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if score(middle) > target else (low, middle)
    return (low + high) / 2
