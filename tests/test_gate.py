"""What a gate rule may say, and when it passes, fails or cannot be told."""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import comb, inf, log, nan, sqrt

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from deploykit.gate import (
    EXIT_CODES,
    PairedCounts,
    Rule,
    Timing,
    Verdict,
    exact_interval,
    judge,
    judge_time,
    paired_difference_interval,
    parse_rule,
    smallest_visible_drop,
    student_t,
    worst,
)

Z95 = 1.959963984540054
PASS, FAIL, CANNOT_TELL = Verdict.PASS, Verdict.FAIL, Verdict.CANNOT_TELL
RULES = st.one_of(
    st.builds(Rule, st.just("disagreements"), st.integers(0, 999_999_999).map(float)),
    st.builds(Rule, st.sampled_from(["agreement", "drop"]), st.decimals(0, 100, places=9).map(float)),
    st.builds(Rule, st.sampled_from(["latency", "slowdown"]), st.decimals(0, 999_999, places=9).map(float)),
)
TABLES = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400)).filter(any)


def verdict(rule: str, counts: PairedCounts) -> Verdict:
    return judge(parse_rule(rule), counts).verdict


class TestRules:
    @settings(deadline=None)
    @hypothesis.given(rule=RULES)
    def test_a_rule_that_is_written_down_can_be_read_again(self, rule):
        assert parse_rule(str(rule)) == rule

    @pytest.mark.parametrize(
        "text",
        [
            "disagreements <= 1234567",
            "agreement >= 99.99999 %",
            "agreement >= 100 %",
            "drop <= 0.000000001 points",
            "drop <= 0.5 points",
            "latency <= 5 ms",
            "slowdown <= 250 %",
        ],
    )
    def test_a_rule_is_repeated_with_every_digit_and_without_an_exponent(self, text):
        assert str(parse_rule(text)) == text

    @pytest.mark.parametrize("text", ["drop<=0.5points", "  drop  <=  0.50  points  ", "drop <= 00.5 points\n"])
    def test_spaces_and_zeros_do_not_matter(self, text):
        assert parse_rule(text) == Rule("drop", 0.5)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "'' is not a gate rule such as 'drop <= 0.5 points', 'agreement >= 99 %', 'latency <= 5 ms'"),
            ("drop <= -1 points", "is not a gate rule"),
            ("drop <= nan points", "is not a gate rule"),
            ("drop <= 1e-3 points", "is not a gate rule"),
            ("drop <= ٣ points", "is not a gate rule"),
            ("drop < 1 points", "is not a gate rule"),
            ("drop <= 0.5 points and agreement >= 99 %", "is not a gate rule"),
            ("disagreements <= " + "9" * 400, "is not a gate rule"),
            ("loss <= 0.5 points", "unknown metric 'loss'; known are disagreements, agreement, drop, latency, slowdown"),
            ("drop <= 0.5", "write 'drop <= 0.5 points'"),
            ("drop <= 0.5 %", "write 'drop <= 0.5 points'"),
            ("drop >= 0.5 points", "write 'drop <= 0.5 points'"),
            ("agreement <= 99 %", "write 'agreement >= 99 %'"),
            ("disagreements <= 2 points", "write 'disagreements <= 2'"),
            ("latency <= 5", "write 'latency <= 5 ms'"),
            ("latency <= 5 s", "is not a gate rule"),
            ("slowdown <= 5 points", "write 'slowdown <= 5 %'"),
            ("slowdown <= -5 %", "is not a gate rule"),
            ("disagreements <= 2.5", "images are counted in whole numbers"),
            ("agreement >= 100.1 %", "no agreement is above 100 %"),
            ("drop <= 500 points", "no drop is above 100 points"),
        ],
    )
    def test_what_is_no_rule_is_quoted_with_the_reason(self, text, why):
        with pytest.raises(ValueError, match=why) as caught:
            parse_rule(text)

        assert str(caught.value).startswith(repr(text))


class TestTheExactInterval:
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17, 1998, table I, method 5.
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
    )
    def test_it_has_the_published_values(self, successes, trials, low, high):
        assert exact_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)

    @settings(deadline=None, max_examples=50)
    @hypothesis.given(trials=st.integers(1, 300), data=st.data())
    def test_its_ends_are_the_shares_under_which_so_few_or_so_many_have_a_chance_of_2_5_percent(self, trials, data):
        successes = data.draw(st.integers(0, trials))

        low, high = exact_interval(successes, trials)

        if successes > 0:
            assert chance(trials, low, range(successes, trials + 1)) == pytest.approx(0.025, rel=1e-6)
        if successes < trials:
            assert chance(trials, high, range(successes + 1)) == pytest.approx(0.025, rel=1e-6)

    @pytest.mark.parametrize("trials", [1, 10, 13, 25, 1000, 10**7])
    def test_all_and_none_reach_the_very_end(self, trials):
        assert exact_interval(trials, trials)[1] == 1
        assert exact_interval(0, trials)[0] == 0

    @settings(deadline=None, max_examples=50)
    @hypothesis.given(trials=st.integers(1, 10_000), data=st.data())
    def test_failures_have_the_mirror_image_of_the_interval_of_successes(self, trials, data):
        successes = data.draw(st.integers(0, trials))

        low, high = exact_interval(successes, trials)

        assert exact_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-9)

    @pytest.mark.parametrize("percent", ["90", "99", "99.9"])
    @pytest.mark.parametrize("images", [10, 17, 53, 100, 500])
    def test_of_engines_that_just_keep_a_rule_at_most_one_in_forty_is_failed(self, images, percent):
        rule, share = f"agreement >= {percent} %", 1 - float(percent) / 100
        failed = [flips for flips in range(images + 1) if verdict(rule, PairedCounts(images, flips)) is FAIL]

        assert chance(images, share, failed) <= 0.025

    @pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (5, 2.5706), (30, 2.0423), (10**6, 1.96)])
    def test_students_quantile_is_that_of_the_tables(self, freedom, quantile):
        assert student_t(freedom) == pytest.approx(quantile, abs=5e-5)


def chance(trials: int, share: float, counts: Iterable[int]) -> float:
    """Of so many successes, or any of them, in as many trials."""
    return sum(comb(trials, count) * share**count * (1 - share) ** (trials - count) for count in counts)


def score_by_brute_force(lost: int, gained: int, images: int, difference: float) -> float:
    """The score statistic at P(lost) - P(gained) = difference, its nuisance parameter found by golden-section search."""

    def log_likelihood(share: float) -> float:
        parts = ((gained, share), (lost, share + difference), (images - lost - gained, 1 - 2 * share - difference))
        return sum((count * log(p) if p > 0 else -inf) for count, p in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    ratio = (sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (left, high) if log_likelihood(left) < log_likelihood(right) else (low, right)
    share = (low + high) / 2
    variance = images * (2 * share + difference - difference**2)
    return (lost - gained - images * difference) / sqrt(variance)


class TestTangosInterval:
    # The first is the example of airway hyper-responsiveness in Fagerland, Lydersen and Laake, "Recommended tests and
    # confidence intervals for paired binomial proportions", Statistics in Medicine 33, 2014: -0.517 to -0.026.
    # The second is the example of contact lenses in Tango's own paper: 1 of 44 pairs differs, -0.118 to 0.059.
    @pytest.mark.parametrize(("lost", "gained", "images", "low", "high"), [(1, 7, 21, -0.517, -0.026), (0, 1, 44, -0.118, 0.059)])
    def test_it_has_the_published_values(self, lost, gained, images, low, high):
        assert paired_difference_interval(lost, gained, images) == pytest.approx((low, high), abs=5e-4)

    @settings(deadline=None, max_examples=50)
    @hypothesis.given(table=TABLES)
    def test_its_ends_are_the_differences_that_the_score_test_just_does_not_reject(self, table):
        lost, gained, _ = table
        images = sum(table)

        low, high = paired_difference_interval(lost, gained, images)

        assert -1 <= low <= (lost - gained) / images <= high <= 1
        if low > -1 + 1e-9 and lost < images:
            assert score_by_brute_force(lost, gained, images, low) == pytest.approx(Z95, abs=1e-4)
        if high < 1 - 1e-9 and gained < images:
            assert score_by_brute_force(lost, gained, images, high) == pytest.approx(-Z95, abs=1e-4)

    @settings(deadline=None, max_examples=50)
    @hypothesis.given(table=TABLES)
    def test_what_one_lost_the_other_gained(self, table):
        lost, gained, _ = table

        low, high = paired_difference_interval(lost, gained, sum(table))

        assert paired_difference_interval(gained, lost, sum(table)) == pytest.approx((-high, -low), abs=1e-9)

    @pytest.mark.parametrize(("lost_share", "gained_share"), [(0.02, 0.02), (0.01, 0.0), (0.05, 0.02), (0.3, 0.1)])
    def test_it_holds_the_truth_about_95_times_in_100(self, lost_share, gained_share):
        draws, images, truth = random.Random(0), 200, lost_share - gained_share
        held = 0
        for _ in range(400):
            flips = [draws.random() for _ in range(images)]
            lost = sum(flip < lost_share for flip in flips)
            gained = sum(lost_share <= flip < lost_share + gained_share for flip in flips)
            low, high = paired_difference_interval(lost, gained, images)
            held += low <= truth <= high

        assert held >= 0.92 * 400

    @pytest.mark.parametrize("images", [1, 10, 500, 10**6])
    def test_without_a_single_flip_about_four_in_n_may_still_flip(self, images):
        # In closed form: z^2 / (n + z^2).
        wanted = Z95**2 / (images + Z95**2)

        assert paired_difference_interval(0, 0, images) == pytest.approx((-wanted, wanted))
        assert smallest_visible_drop(images) == pytest.approx(100 * wanted)

    def test_all_lost_is_all_lost(self):
        assert paired_difference_interval(10, 0, 10)[1] == 1
        assert paired_difference_interval(0, 10, 10)[0] == -1


class TestVerdicts:
    @pytest.mark.parametrize(("disagreements", "wanted"), [(0, PASS), (2, PASS), (3, FAIL)])
    def test_a_count_is_decided_exactly(self, disagreements, wanted):
        found = judge(parse_rule("disagreements <= 2"), PairedCounts(540, disagreements))

        assert (found.verdict, found.observed, found.interval) == (wanted, disagreements, None)
        assert found.reason == f"{disagreements} of 540 images"

    @pytest.mark.parametrize(
        ("images", "disagreements", "wanted"),
        [(1000, 0, PASS), (1000, 3, PASS), (1000, 10, CANNOT_TELL), (1000, 30, FAIL), (100, 0, CANNOT_TELL), (1, 1, FAIL)],
    )
    def test_an_agreement_is_judged_by_its_interval(self, images, disagreements, wanted):
        assert verdict("agreement >= 99 %", PairedCounts(images, disagreements)) is wanted

    @pytest.mark.parametrize(
        ("images", "lost", "gained", "wanted"),
        [
            (1000, 0, 0, PASS),
            (1000, 5, 5, CANNOT_TELL),
            (1000, 0, 20, PASS),
            (1000, 40, 0, FAIL),
            (100, 0, 0, CANNOT_TELL),
        ],
    )
    def test_a_drop_is_judged_by_its_interval(self, images, lost, gained, wanted):
        assert verdict("drop <= 0.5 points", PairedCounts(images, lost + gained, lost, gained)) is wanted

    @pytest.mark.parametrize("images", [1, 10, 13, 25, 1000])
    def test_an_engine_that_agrees_on_every_image_never_fails(self, images):
        assert verdict("agreement >= 100 %", PairedCounts(images, 0)) is CANNOT_TELL
        assert verdict("drop <= 0 points", PairedCounts(images, 0, 0, 0)) is CANNOT_TELL
        assert verdict("disagreements <= 0", PairedCounts(images, 0)) is PASS

    @settings(deadline=None, max_examples=50)
    @hypothesis.given(table=TABLES, limit=st.integers(0, 100))
    def test_one_more_lost_image_never_makes_a_verdict_better(self, table, limit):
        lost, gained, _ = table
        order = [PASS, CANNOT_TELL, FAIL]
        worse = PairedCounts(sum(table) + 1, lost + gained + 1, lost + 1, gained)
        counts = PairedCounts(sum(table) + 1, lost + gained, lost, gained)

        for rule in (Rule("drop", limit), Rule("agreement", limit), Rule("disagreements", limit)):
            assert order.index(judge(rule, worse).verdict) >= order.index(judge(rule, counts).verdict)

    def test_a_drop_needs_labels(self):
        with pytest.raises(ValueError, match=r"'drop <= 0\.5 points' needs labelled images"):
            judge(parse_rule("drop <= 0.5 points"), PairedCounts(100, 0))

    def test_the_reason_has_the_numbers(self):
        found = judge(parse_rule("drop <= 0.5 points"), PairedCounts(1000, 40, 40, 0))

        assert found.reason == "observed 4.00, 95 % interval 2.95 to 5.40 on 1000 images"
        assert found.observed == 4
        assert found.interval == pytest.approx((2.951, 5.403), abs=5e-3)


class TestHowManyImagesWouldDecide:
    def wanted(self, rule: str, counts: PairedCounts) -> int:
        """The number in the reason."""
        found = judge(parse_rule(rule), counts)
        assert found.verdict is CANNOT_TELL
        return int(found.reason.partition("; about ")[2].removesuffix(" images would decide it"))

    def test_without_a_flip_it_is_few(self):
        images = self.wanted("drop <= 0.5 points", PairedCounts(100, 0, 0, 0))

        assert images == 765
        assert verdict("drop <= 0.5 points", PairedCounts(images, 0, 0, 0)) is PASS
        assert verdict("drop <= 0.5 points", PairedCounts(images - 1, 0, 0, 0)) is CANNOT_TELL

    @pytest.mark.parametrize(
        ("rule", "images", "lost", "gained"),
        [
            ("drop <= 0.5 points", 100, 1, 1),
            ("drop <= 0.5 points", 1000, 8, 2),
            ("drop <= 2 points", 300, 5, 1),
            ("agreement >= 99 %", 100, 0, 0),
            ("agreement >= 99 %", 500, 3, 4),
            ("agreement >= 90 %", 20, 1, 0),
        ],
    )
    def test_so_many_images_of_the_same_kind_decide_it(self, rule, images, lost, gained):
        wanted = self.wanted(rule, PairedCounts(images, lost + gained, lost, gained))

        def times(factor: float) -> PairedCounts:
            more = [round(count * factor) for count in (lost, gained)]
            return PairedCounts(round(images * factor), sum(more), *more)

        assert verdict(rule, times(1.3 * wanted / images)) is not CANNOT_TELL
        assert verdict(rule, times(max(1, 0.7 * wanted / images))) is CANNOT_TELL

    @pytest.mark.parametrize(("images", "disagreements"), [(5, 1), (10, 3), (15, 12), (100, 7), (1000, 5)])
    def test_at_the_limit_itself_no_number_decides_it(self, images, disagreements):
        limit = 100 * (images - disagreements) / images

        found = judge(parse_rule(f"agreement >= {limit} %"), PairedCounts(images, disagreements))

        assert found.reason.endswith("the observed value is the limit itself, so no number of images decides it")

    def test_a_hair_from_the_limit_no_number_is_promised(self):
        found = judge(parse_rule("drop <= 0.333333333 points"), PairedCounts(300, 1, 1, 0))

        assert found.reason.endswith("; more than 10000000 images would be needed to decide it")


def timing(low: float, observed: float, high: float, processes: int = 10, doubts: tuple[str, ...] = ()) -> Timing:
    return Timing(observed, (low, high), processes, doubts)


class TestRulesOfTime:
    @pytest.mark.parametrize(
        ("rule", "of_time"),
        [
            ("latency <= 5 ms", True),
            ("slowdown <= 5 %", True),
            ("drop <= 1 points", False),
            ("agreement >= 1 %", False),
            ("disagreements <= 0", False),
        ],
    )
    def test_are_those_that_a_benchmark_judges(self, rule, of_time):
        assert parse_rule(rule).is_of_time is of_time

    @pytest.mark.parametrize("rule", ["latency <= 5 ms", "slowdown <= 5 %"])
    @pytest.mark.parametrize(
        ("low", "high", "wanted"),
        [(1, 4.9, PASS), (1, 5, PASS), (4.9, 5.1, CANNOT_TELL), (5, 6, CANNOT_TELL), (5.1, 6, FAIL)],
    )
    def test_are_judged_by_the_interval_over_processes(self, rule, low, high, wanted):
        found = judge_time(parse_rule(rule), timing(low, (low + high) / 2, high))

        assert (found.rule, found.verdict, found.interval) == (rule, wanted, (low, high))

    def test_an_engine_that_became_faster_passes(self):
        assert judge_time(parse_rule("slowdown <= 0 %"), timing(-12, -10, -8)).verdict is PASS

    @pytest.mark.parametrize(("low", "high"), [(1, 2), (4, 6), (8, 9)])
    def test_in_an_invalid_run_nothing_can_be_told_and_the_reasons_are_given(self, low, high):
        found = judge_time(parse_rule("latency <= 5 ms"), timing(low, (low + high) / 2, high, doubts=("noise", "heat")))

        assert found.verdict is CANNOT_TELL
        assert found.reason.endswith("over 10 processes; the run is invalid: noise; heat")

    def test_the_reason_has_the_numbers_in_the_unit_of_the_rule(self):
        reason = judge_time(parse_rule("latency <= 5 ms"), timing(1.25, 1.5, 1.75)).reason

        assert reason == "observed 1.5 ms, 95 % interval 1.25 to 1.75 over 10 processes"

    @pytest.mark.parametrize(("low", "observed", "high"), [(3, 4, 6), (4.5, 5.5, 6.5), (4.9, 4.95, 5.4)])
    def test_so_many_processes_would_decide_it(self, low, observed, high):
        rule = parse_rule("latency <= 5 ms")

        needed = int(judge_time(rule, timing(low, observed, high)).reason.split("about ")[1].split()[0])

        def with_processes(count: int) -> Verdict:
            shrink = sqrt(10 / count)
            return judge_time(
                rule, timing(observed - shrink * (observed - low), observed, observed + shrink * (high - observed))
            ).verdict

        assert with_processes(needed) is not CANNOT_TELL
        assert with_processes(int(0.9 * needed)) is CANNOT_TELL

    def test_it_is_the_number_to_ask_for_where_the_baseline_has_twice_as_many(self):
        once = timing(4.9, 4.95, 5.02, processes=10)
        twice = Timing(once.observed, once.interval, 20, (), times=2)

        assert [judge_time(parse_rule("latency <= 5 ms"), found).reason.partition("; ")[2] for found in (once, twice)] == [
            "about 21 processes for each engine would decide it"
        ] * 2

    @pytest.mark.parametrize(("reach", "told"), [(9.994, "about 1000 processes"), (9.996, "no practical number of processes")])
    def test_no_more_than_a_thousand_processes_are_advised(self, reach, told):
        found = judge_time(parse_rule("latency <= 5 ms"), timing(3, 4, 4 + reach))

        assert f"; {told} " in found.reason

    @pytest.mark.parametrize(("low", "observed", "high"), [(4, 5, 6), (4, 4.999999, 6), (-100, 0, inf), (nan, nan, nan)])
    def test_at_a_hair_from_the_limit_or_without_an_interval_no_number_is_promised(self, low, observed, high):
        found = judge_time(parse_rule("slowdown <= 5 %"), timing(low, observed, high))

        assert found.verdict is CANNOT_TELL
        assert found.reason.endswith("; no practical number of processes would decide it")


class TestTheWorstVerdict:
    @pytest.mark.parametrize(
        ("verdicts", "wanted", "code"),
        [
            ([], None, 0),
            ([PASS, PASS], PASS, 0),
            ([PASS, CANNOT_TELL], CANNOT_TELL, 5),
            ([CANNOT_TELL, FAIL, PASS], FAIL, 3),
        ],
    )
    def test_is_that_of_the_whole_and_gives_the_exit_code(self, verdicts, wanted, code):
        assert worst(iter(verdicts)) is wanted
        assert EXIT_CODES[wanted] == code
