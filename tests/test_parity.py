"""How far apart answers are, which decisions flipped, and when an engine is not faithful to its graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deploykit import parity
from deploykit.artifact import Precision, Samples
from deploykit.errors import UsageError
from deploykit.gate import Verdict

few = settings(deadline=None, max_examples=60)
six_answers = arrays.arrays(np.float32, (6, 3), elements=st.floats(-8, 8, width=16))
values = arrays.arrays(np.float32, (3, 4), elements=st.floats(-1024, 1024, width=16))


class TestTensorErrors:
    @few
    @given(values)
    def test_a_tensor_has_no_distance_to_itself(self, x):
        errors = parity.tensor_errors(x, x)

        assert (errors.max_abs, errors.mean_abs, errors.relative, errors.sqnr_db) == (0, 0, 0, math.inf)
        assert errors.cosine == pytest.approx(1)

    @few
    @given(values, values, st.sampled_from([2.0**-20, 0.5, 8.0, 2.0**20]))
    def test_relative_error_cosine_and_sqnr_do_not_depend_on_the_unit(self, x, y, unit):
        assume(y.any())
        one, other = parity.tensor_errors(x, y), parity.tensor_errors(x * np.float32(unit), y * np.float32(unit))

        assert other.max_abs == pytest.approx(unit * one.max_abs)
        assert other.relative == pytest.approx(one.relative)
        assert other.cosine == pytest.approx(one.cosine)
        assert other.sqnr_db == pytest.approx(one.sqnr_db)

    @few
    @given(values, st.integers(0, 11), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
    def test_one_value_that_is_not_finite_fails_every_limit(self, x, where, bad, in_actual):
        broken = x.copy()
        broken.flat[where] = bad

        errors = parity.tensor_errors(broken, x) if in_actual else parity.tensor_errors(x, broken)

        assert not errors.relative <= 1e9
        assert not errors.cosine >= -1
        assert not errors.sqnr_db >= -1e9

    def test_each_of_them_is_what_its_name_says(self):
        errors = parity.tensor_errors(np.array([3.0, 4.5]), np.array([3.0, 4.0]))

        assert (errors.max_abs, errors.mean_abs, errors.relative) == (0.5, 0.25, 0.125)
        assert errors.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
        assert errors.cosine == pytest.approx(27 / (5 * math.hypot(3.0, 4.5)))

    def test_anything_but_zero_is_infinitely_far_from_zero(self):
        errors = parity.tensor_errors(np.ones(2), np.zeros(2))

        assert (errors.relative, errors.cosine, errors.sqnr_db) == (math.inf, 0.0, -math.inf)


REFERENCE = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5], [1.0, 0.5, 0.0], [0.0, 0.0, 9.0]], np.float32)
NAMES = ["a.png", "b.png", "c.png", "d.png"]


class TestComparing:
    def engine(self) -> np.ndarray:
        changed = REFERENCE.copy()
        changed[1] = [0.0, 1.6, 1.7]
        return changed

    def test_a_flip_is_listed_with_its_image_and_the_lead_that_the_reference_gave(self):
        comparison = parity.compare(self.engine(), REFERENCE, NAMES, np.array([0, 1, 0, 2]))

        assert comparison.flips == (parity.Flip("b.png", label=1, reference=1, engine=2, reference_margin=0.5),)
        assert comparison.agreement == 0.75

    def test_accuracy_counts_what_was_lost_and_what_was_gained(self):
        lost = parity.compare(self.engine(), REFERENCE, NAMES, np.array([0, 1, 0, 2]))
        gained = parity.compare(self.engine(), REFERENCE, NAMES, np.array([0, 2, 0, 2]))

        assert (lost.accuracy.reference, lost.accuracy.engine, lost.accuracy.drop_points) == (1.0, 0.75, 25.0)
        assert (lost.counts.lost, lost.counts.gained) == (1, 0)
        assert (gained.accuracy.reference, gained.accuracy.engine, gained.accuracy.drop_points) == (0.75, 1.0, -25.0)
        assert (gained.counts.lost, gained.counts.gained) == (0, 1)

    def test_a_flip_between_two_wrong_classes_costs_no_accuracy(self):
        comparison = parity.compare(self.engine(), REFERENCE, NAMES, np.array([0, 0, 0, 2]))

        assert len(comparison.flips) == comparison.counts.disagreements == 1
        assert comparison.accuracy.drop_points == 0

    @few
    @given(six_answers, arrays.arrays(np.int64, 6, elements=st.integers(0, 2)))
    def test_the_interval_of_the_drop_holds_the_drop(self, engine, labels):
        reference = engine[:, ::-1].copy()

        accuracy = parity.compare(engine, reference, [*"abcdef"], labels).accuracy

        low, high = accuracy.interval_points
        assert low - 1e-6 <= accuracy.drop_points <= high + 1e-6
        assert accuracy.drop_points == pytest.approx(100 * (accuracy.reference - accuracy.engine))

    def test_without_labels_there_are_decisions_but_no_accuracy(self):
        comparison = parity.compare(self.engine(), REFERENCE, NAMES, None)

        assert comparison.accuracy is None
        assert comparison.flips[0].label is None
        assert comparison.counts.lost is None

    @pytest.mark.parametrize("other", [REFERENCE[:3], REFERENCE[:, :2]])
    def test_answers_of_another_shape_are_refused(self, other):
        with pytest.raises(UsageError, match="nothing to compare"):
            parity.compare(other, REFERENCE, NAMES, None)

    def test_no_image_at_all_is_refused(self):
        with pytest.raises(UsageError, match="nothing to compare"):
            parity.compare(REFERENCE[:0], REFERENCE[:0], [], None)


class TestConversion:
    def judged(self, precision: Precision, engine_error: float, quantization_error: float = 0.1) -> parity.Conversion:
        reference = np.ones((2, 4), np.float32)
        graph = reference + np.float32(quantization_error)
        samples = Samples({"image": np.zeros(2)}, {"logits": reference}, {"logits": graph})
        return parity.conversion({"logits": graph + np.float32(engine_error)}, samples, precision)

    @pytest.mark.parametrize(
        ("precision", "error", "verdict"),
        [
            (Precision.FP32, 1e-5, Verdict.PASS),
            (Precision.FP32, 1e-3, Verdict.FAIL),
            (Precision.FP16, 1e-3, Verdict.PASS),
            (Precision.FP16, 3e-2, Verdict.FAIL),
            (Precision.FP32, math.nan, Verdict.FAIL),
            (Precision.FP16, math.inf, Verdict.FAIL),
        ],
    )
    def test_a_float_engine_has_to_equal_its_graph_but_for_rounding(self, precision, error, verdict):
        found = self.judged(precision, error)

        assert found.verdict is verdict
        assert found.images == 2
        assert found.rule.startswith("max|d| / max|y| <= ")

    @pytest.mark.parametrize(
        ("error", "verdict"), [(0.09, Verdict.PASS), (0.13, Verdict.FAIL), (math.nan, Verdict.FAIL), (-math.inf, Verdict.FAIL)]
    )
    def test_an_int8_engine_may_not_be_further_from_its_graph_than_the_graph_is_from_float(self, error, verdict):
        found = self.judged(Precision.INT8, error)

        assert found.verdict is verdict
        assert found.rule == "SQNR >= 20.0 dB, that of the quantization"

    def test_an_int8_engine_of_a_graph_that_lost_nothing_may_still_round(self):
        assert self.judged(Precision.INT8, 5e-5, quantization_error=0.0).verdict is Verdict.PASS
        assert self.judged(Precision.INT8, 5e-3, quantization_error=0.0).verdict is Verdict.FAIL
