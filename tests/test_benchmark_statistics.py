"""What may be said from the medians of fresh processes, tried on processes whose truth is known."""

from __future__ import annotations

import itertools
from math import exp, inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.benchmark.statistics import (
    Difference,
    difference,
    median_interval,
    noise_floor,
    percentile_bound,
    percentile_over,
)

few = settings(deadline=None, max_examples=20)
medians = st.lists(st.floats(1e3, 1e9), min_size=1, max_size=12)
seeds = st.integers(0, 2**32 - 1)
ratios = st.floats(0.2, 5)
# Between quiet processes of one engine, medians differ by a third of a per cent to some per cent.
NOISE = 0.02
PROCESSES = 10


def compared(truth: float, trial: int, processes: int = PROCESSES) -> Difference:
    """An engine `truth` times as slow as the baseline, both measured as a benchmark does: the baseline twice."""
    draw = np.random.default_rng(trial)
    first, again, other = (1e6 * np.exp(NOISE * draw.standard_normal(processes)) for _ in range(3))
    floor = noise_floor(list(first), list(again), seed=trial)
    return difference(list(truth * other), [*first, *again], floor, seed=trial)


def share_told_apart(truth: float, trials: int = 200) -> float:
    return sum(compared(truth, trial).is_different for trial in range(trials)) / trials


class TestTheIntervalOfAMedian:
    @few
    @given(medians, seeds)
    def test_lies_within_the_processes_and_holds_their_median(self, found, seed):
        low, high = median_interval(found, seed)

        assert min(found) <= low <= np.median(found) <= high <= max(found)

    @few
    @given(medians, seeds)
    def test_is_the_same_for_the_same_seed(self, found, seed):
        assert median_interval(found, seed) == median_interval(found, seed)

    def test_is_a_point_when_all_processes_agree(self):
        assert median_interval([7.0] * 5, 0) == (7, 7)

    def test_holds_the_truth_about_19_times_in_20(self):
        held = 0
        for trial in range(200):
            low, high = median_interval(list(np.random.default_rng(trial).normal(100, 2, PROCESSES)), trial)
            held += low <= 100 <= high

        assert 0.91 * 200 <= held < 200

    def test_is_narrower_from_more_processes(self):
        draw = np.random.default_rng(0)
        few_of_them, many = (median_interval(list(draw.normal(100, 2, count)), 0) for count in (10, 160))

        assert many[1] - many[0] < (few_of_them[1] - few_of_them[0]) / 2


class TestTheRatioOfTwoEngines:
    @few
    @given(medians, seeds)
    def test_to_one_that_is_twice_as_slow_is_one_half(self, found, seed):
        compared = difference(found, [2 * ns for ns in found], 0.0, seed)

        low, high = compared.interval
        assert compared.ratio == 0.5
        assert low <= 0.5 <= high
        assert compared.processes == len(found)

    @few
    @given(medians, medians, st.floats(0, 2), seeds)
    def test_the_interval_that_is_stated_is_never_narrower_than_the_bootstrap_nor_than_the_noise_floor(
        self, mine, theirs, floor, seed
    ):
        found = difference(mine, theirs, floor, seed)

        (low, high), (stated_low, stated_high) = found.interval, found.honest_interval
        assert stated_low <= min(low, found.ratio / (1 + floor))
        assert stated_high >= max(high, found.ratio * (1 + floor))

    @few
    @given(medians, medians, st.floats(0, 2), seeds)
    def test_a_noise_floor_never_makes_a_difference_of_none(self, mine, theirs, floor, seed):
        found = difference(mine, theirs, floor, seed)

        low, high = found.interval
        assert not (low <= 1 <= high and found.is_different)

    @pytest.mark.parametrize(("floor", "told"), [(0.04, True), (0.06, False)])
    @pytest.mark.parametrize("ratio", [1.05, 1 / 1.05])
    def test_less_than_the_noise_floor_is_no_difference_whichever_is_faster(self, ratio, floor, told):
        assert Difference(ratio, (ratio, ratio), floor, 10).is_different is told

    def test_without_a_known_noise_floor_nothing_is_a_difference(self):
        found = Difference(9.0, (8.0, 10.0), noise_floor([1.0], [], seed=0), 10)

        assert not found.is_different
        assert found.smallest_visible == inf


class TestTheNoiseFloor:
    @pytest.mark.parametrize("order", [list, sorted, lambda both: sorted(both, reverse=True)])
    @pytest.mark.parametrize("trial", range(3))
    def test_is_how_far_19_of_20_ways_to_split_the_processes_are_apart_however_they_came(self, trial, order):
        both = np.array(order(np.exp(NOISE * np.random.default_rng(trial).standard_normal(10))))
        splits = [(list(half), sorted(set(range(10)) - set(half))) for half in itertools.combinations(range(10), 5)]
        apart = [abs(np.log(np.median(both[left]) / np.median(both[right]))) for left, right in splits]

        floor = noise_floor(list(both[:5]), list(both[5:]), seed=trial)

        assert exp(np.percentile(apart, 92)) <= 1 + floor <= exp(np.percentile(apart, 98))

    @few
    @given(medians, medians, st.floats(0.01, 100), seeds)
    def test_has_no_unit(self, first, again, factor, seed):
        scaled = [[factor * ns for ns in group] for group in (first, again)]

        assert noise_floor(*scaled, seed) == pytest.approx(noise_floor(first, again, seed), rel=1e-6, abs=1e-9)

    def test_of_one_process_each_is_what_lies_between_them(self):
        assert noise_floor([100.0], [110.0], seed=0) == pytest.approx(0.1)
        assert noise_floor([110.0], [100.0], seed=0) == pytest.approx(0.1)

    def test_is_zero_when_all_agree(self):
        assert noise_floor([5.0] * 5, [5.0] * 5, seed=0) == 0

    def test_is_infinite_when_nothing_was_measured_again(self):
        assert noise_floor([1.0, 2.0], [], seed=0) == inf


class TestWhatCanBeTold:
    """Simulated processes; a benchmark that cries wolf, or sleeps, fails here."""

    def test_an_engine_against_itself_is_called_different_at_most_one_time_in_twenty(self):
        assert share_told_apart(1.0, trials=400) <= 0.05

    @pytest.mark.parametrize("truth", [1.08, 1 / 1.08])
    def test_eight_per_cent_are_found_at_two_per_cent_of_noise(self, truth):
        assert share_told_apart(truth) >= 0.99

    def test_the_smallest_visible_difference_is_found_about_nine_times_in_ten(self):
        smallest = np.median([compared(1.0, trial).smallest_visible for trial in range(1000, 1200)])

        assert 0.8 <= share_told_apart(1 + smallest) <= 0.98
        assert share_told_apart(1 + smallest / 3) < 0.5

    def test_more_processes_make_smaller_differences_visible(self):
        few_of_them, many = (
            np.median([compared(1.0, trial, processes).smallest_visible for trial in range(20)]) for processes in (5, 20)
        )

        assert many < 0.7 * few_of_them


class TestPercentiles:
    # The fewest queries for t = 1, 5 and 10 of MLPerf Inference's early stopping at a confidence of 99 %; LoadGen itself
    # publishes 64 for p90 and 662 for p99 as the floors of single-stream (loadgen/early_stopping.cc).
    TABLE = (
        (50, (11, 22, 35)),
        (90, (64, 127, 197)),
        (95, (130, 259, 398)),
        (99, (662, 1307, 2010)),
        (99.9, (6636, 13105, 20140)),
    )

    @pytest.mark.parametrize(
        ("percentile", "queries", "t"), [(p, n, t) for p, row in TABLE for n, t in zip(row, (1, 5, 10), strict=True)]
    )
    def test_the_bound_discards_as_many_slow_queries_as_mlperf_allows(self, percentile, queries, t):
        assert percentile_bound(range(1, queries + 1), percentile) == queries - (t - 1)
        if t > 1:
            assert percentile_bound(range(1, queries), percentile) == (queries - 1) - (t - 2)

    @pytest.mark.parametrize(("percentile", "queries"), [(50, 11), (90, 64), (95, 130), (99, 662), (99.9, 6636)])
    def test_with_fewer_queries_than_it_takes_no_percentile_is_stated(self, percentile, queries):
        assert percentile_bound(range(queries - 1), percentile) is None
        assert percentile_bound(range(queries), percentile) == queries - 1

    @pytest.mark.parametrize("queries", [0, 1])
    def test_from_next_to_nothing_nothing_is_stated(self, queries):
        assert percentile_bound([5] * queries, 50) is None

    @few
    @given(st.lists(st.integers(1, 10**9), min_size=64, max_size=200), st.randoms(use_true_random=False))
    def test_the_order_of_the_queries_does_not_matter(self, queries, random):
        assert percentile_bound(random.sample(queries, len(queries)), 90) == percentile_bound(queries, 90)

    @few
    @given(st.lists(st.integers(1, 10**9), min_size=130, max_size=300))
    def test_the_bound_is_a_query_and_a_higher_percentile_never_has_a_lower_one(self, queries):
        bounds = [percentile_bound(queries, percentile) for percentile in (50, 90, 95)]

        assert set(bounds) <= set(queries)
        assert bounds == sorted(bounds)
        assert bounds[1] >= np.percentile(queries, 90, method="lower")

    @pytest.mark.parametrize("queries", [64, 130, 500])
    def test_the_true_percentile_is_above_the_bound_one_time_in_a_hundred_at_most(self, queries):
        draw = np.random.default_rng(queries)

        missed = sum(percentile_bound(list(draw.random(queries)), 90) < 0.9 for _ in range(1000))

        assert missed <= 15


class TestPercentilesOverProcesses:
    def test_are_the_largest_of_the_processes_own_where_each_has_enough_queries(self):
        fast, slow = list(range(1, 65)), list(range(1001, 1065))

        assert percentile_over([fast, slow], 90) == (1064, False)

    def test_are_of_the_queries_measured_where_one_process_has_too_few(self):
        processes = [list(range(1, 64)), list(range(1001, 1065))]

        assert percentile_over(processes, 90) == (percentile_bound([*processes[0], *processes[1]], 90), True)

    def test_are_none_where_even_all_queries_are_too_few(self):
        assert percentile_over([[5] * 30, [5] * 30], 90) == (None, False)

    def test_of_processes_that_differ_hold_for_a_further_process_where_pooled_ones_do_not(self):
        """One process in four is 20 % slower; of a slow one 90 % of the queries lie above what the pooled bound says."""
        draw = np.random.default_rng(0)
        processes = [list((1.2 if process % 4 == 0 else 1.0) * draw.normal(1000, 5, 200)) for process in range(4)]
        pooled = percentile_bound([query for queries in processes for query in queries], 50)

        bound, is_pooled = percentile_over(processes, 50)

        assert not is_pooled
        assert sum(query > pooled for query in processes[0]) == 200
        assert sum(query > bound for query in processes[0]) < 100
