"""Answers about pixels and boxes: what belongs together in two of them, how much is decided alike, and what a gate says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import parity, scenes
from deploykit.artifact import Precision, Samples, TensorSpec
from deploykit.gate import Verdict, clustered_interval, judge_parts, parse_rule

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(0, 12)


def boxes(count: int, seed: int = 0, **more: np.ndarray) -> dict[str, np.ndarray]:
    """So many boxes that overlap by less than half, on a grid of 100 pixels, in two classes."""
    random = np.random.default_rng(seed)
    corners = 100.0 * np.stack([np.arange(count) % 4, np.arange(count) // 4], 1) + random.uniform(0, 20, (count, 2))
    found = np.concatenate([corners, corners + random.uniform(30, 70, (count, 2))], 1).astype(np.float32)
    labels, scores = random.integers(1, 3, count), random.uniform(0.1, 1, count).astype(np.float32)
    return {"boxes": found, "labels": labels, "scores": scores, **more}


def rows(answer: dict[str, np.ndarray], order: np.ndarray | list[int]) -> dict[str, np.ndarray]:
    return {name: values[order] for name, values in answer.items()}


def scores_of(classes: list[list[int]], count: int = 3) -> dict[str, np.ndarray]:
    """A map (count, height, width) whose classes are these."""
    return {"scores": np.moveaxis(np.eye(count, dtype=np.float32)[np.array(classes)], -1, 0)}


def counted(*pictures: tuple[dict[str, np.ndarray], dict[str, np.ndarray]], kind: scenes.Kind = "boxes") -> scenes.Decided:
    tally = scenes.tally(kind)
    for index, (actual, wanted) in enumerate(pictures):
        tally.add(str(index), actual, wanted)
    return tally.decided()


class TestBoxes:
    @settings(deadline=None, max_examples=30)
    @given(COUNTS, SEEDS)
    def test_the_order_in_which_boxes_come_does_not_matter(self, count, seed):
        wanted = boxes(count, seed)
        actual = rows(wanted, np.random.default_rng(seed).permutation(count))

        pairs = scenes.matched(actual, wanted)

        assert len(pairs) == count
        assert np.array_equal(actual["boxes"][pairs[:, 0]], wanted["boxes"][pairs[:, 1]])

    @settings(deadline=None, max_examples=30)
    @given(COUNTS, COUNTS, SEEDS)
    def test_no_box_is_matched_twice_and_all_have_one_label(self, first, second, seed):
        actual, wanted = boxes(first, seed), boxes(second, seed // 2)

        pairs = scenes.matched(actual, wanted)

        assert len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == len(pairs)
        assert np.array_equal(actual["labels"][pairs[:, 0]], wanted["labels"][pairs[:, 1]])

    def test_of_two_that_overlap_the_nearer_one_is_taken(self):
        wanted = boxes(1)
        near, far = wanted["boxes"] + 2, wanted["boxes"] + 8
        actual = {"boxes": np.concatenate([far, near]), "labels": wanted["labels"].repeat(2), "scores": np.float32([0.9, 0.2])}

        assert scenes.matched(actual, wanted).tolist() == [[1, 0]]

    def test_the_highest_score_chooses_first(self):
        one = boxes(1)
        wanted = {name: values.repeat(2, axis=0) for name, values in one.items()} | {"scores": np.float32([0.2, 0.9])}

        assert scenes.matched(one, wanted).tolist() == [[0, 1]]

    @pytest.mark.parametrize(("moved", "matches"), [(0, 1), (3.2, 1), (3.4, 0)])
    def test_boxes_are_the_same_that_overlap_by_half(self, moved, matches):
        wanted = {"boxes": np.float32([[0, 0, 10, 10]]), "labels": np.array([1]), "scores": np.float32([0.5])}

        assert len(scenes.matched({**wanted, "boxes": wanted["boxes"] + np.float32([moved, 0, moved, 0])}, wanted)) == matches

    def test_boxes_of_two_classes_are_never_the_same(self):
        wanted = boxes(3)

        assert not len(scenes.matched({**wanted, "labels": 3 - wanted["labels"]}, wanted))

    def test_a_box_that_either_side_finds_alone_is_a_disagreement(self):
        wanted = boxes(8)

        found = counted((rows(wanted, [0, 1, 2, 3, 4, 5]), rows(wanted, [2, 3, 4, 5, 6, 7])))

        assert (found.parts, found.disagreements, found.agreement) == (8, 4, 0.5)

    def test_pictures_without_boxes_agree_about_nothing(self):
        found = counted((boxes(0), boxes(0)))

        assert (found.parts, found.agreement, found.measures["mean_iou"]) == (0, 1.0, None)

    @settings(deadline=None, max_examples=30)
    @given(COUNTS, SEEDS)
    def test_an_answer_agrees_with_itself_boxes_without_area_included(self, count, seed):
        random = np.random.default_rng(seed)
        answer = boxes(count, seed)
        is_flat = random.random((count, 2)) < 0.4
        answer["boxes"][:, 2:] = np.where(is_flat, answer["boxes"][:, :2], answer["boxes"][:, 2:])

        assert counted((answer, answer)).disagreements == 0

    def test_a_box_at_the_pictures_edge_is_the_same_with_a_sliver_of_area_and_without(self):
        flat = np.array([[10.0, 5.0, 10.0, 9.0]], np.float32)
        sliver = np.array([[10.0, 5.0, 10.00001, 9.0]], np.float32)

        assert scenes.overlaps(flat, sliver)[0, 0] == 1

    def test_a_box_without_area_is_not_another_one(self):
        wanted = {"boxes": np.float32([[5, 5, 5, 5]]), "labels": np.array([1]), "scores": np.float32([0.5])}

        assert not len(scenes.matched({**wanted, "boxes": np.float32([[5, 5, 5, 6]])}, wanted))

    def test_a_score_that_is_no_number_is_not_passed_by(self):
        wanted = boxes(3)
        actual = {**wanted, "scores": wanted["scores"] * np.float32([1, np.nan, 1])}

        assert np.isnan(counted((actual, wanted)).measures["score_difference"])

    def test_boxes_masks_and_keypoints_are_measured_where_they_match(self):
        wanted = {
            "boxes": np.float32([[0, 0, 10, 10]]),
            "labels": np.array([1]),
            "scores": np.float32([0.5]),
            "masks": np.float32([[[[0.9, 0.9], [0.1, 0.1]]]]),
            "keypoints": np.float32([[[2, 2, 1], [5, 5, 1]]]),
        }
        actual = {
            **wanted,
            "boxes": np.float32([[0, 0, 10, 8]]),
            "scores": np.float32([0.25]),
            "masks": np.float32([[[[0.9, 0.1], [0.1, 0.1]]]]),
            "keypoints": np.float32([[[5, 6, 1], [5, 5, 1]]]),
        }

        measures = counted((actual, wanted)).measures

        assert measures == pytest.approx(
            {"mean_iou": 0.8, "least_iou": 0.8, "score_difference": 0.25, "mask_iou": 0.5, "keypoint_distance": 0.25}
        )

    @settings(deadline=None, max_examples=30)
    @given(st.lists(COUNTS, min_size=1, max_size=4), SEEDS)
    def test_stacked_answers_come_apart_again(self, counts, seed):
        answers = [boxes(count, seed + index) for index, count in enumerate(counts)]

        again = scenes.unstacked(scenes.stacked(answers))

        assert all(np.array_equal(a[name], b[name]) for a, b in zip(answers, again, strict=True) for name in a)


class TestPixels:
    def test_a_pixel_has_the_class_with_the_highest_score(self):
        found = counted((scores_of([[0, 1], [1, 1]]), scores_of([[0, 0], [1, 1]])), kind="pixels")

        assert (found.unit, found.parts, found.disagreements) == ("pixel", 4, 1)

    def test_the_mean_iou_is_over_classes_that_occur_and_over_all_pictures(self):
        first = scores_of([[0, 1], [1, 1]]), scores_of([[0, 0], [1, 1]])
        second = scores_of([[1, 1], [1, 1]]), scores_of([[1, 1], [1, 1]])

        found = counted(first, second, kind="pixels")

        # class 0: 1 of 2; class 1: 2 + 4 of 3 + 4; class 2 does not occur
        assert found.measures["mean_iou"] == pytest.approx((1 / 2 + 6 / 7) / 2)

    def test_maps_of_other_sizes_are_not_compared(self):
        with pytest.raises(ValueError, match="maps of"):
            counted((scores_of([[0, 1]]), scores_of([[0], [1]])), kind="pixels")


class TestKinds:
    @pytest.mark.parametrize(
        ("specs", "kind"),
        [
            ([("logits", "float32", ("batch", 5))], None),
            ([("scores", "float32", ("batch", 5, 64, 64))], "pixels"),
            ([("depth", "float32", ("batch", 1, 64, 64))], None),
            ([("a", "float32", ("batch", 5, 8, 8)), ("b", "float32", ("batch", 5, 8, 8))], None),
            ([("boxes", "float32", ("n", 4)), ("labels", "int64", ("n",)), ("scores", "float32", ("n",))], "boxes"),
            ([("boxes", "float32", (1, "n", 4)), ("labels", "int64", (1, "n")), ("scores", "float32", (1, "n"))], None),
            ([("boxes", "float32", ("n", 4)), ("labels", "int64", ("n",)), ("scores", "float32", ("n", 5))], None),
        ],
    )
    def test_outputs_say_what_they_are_about(self, specs, kind):
        assert scenes.kind_of([TensorSpec(*spec) for spec in specs]) == kind


class TestGates:
    def test_pixels_of_one_picture_go_wrong_together_so_they_count_for_few(self):
        even = clustered_interval([(1000, 990)] * 20)
        uneven = clustered_interval([(1000, 1000)] * 19 + [(1000, 800)])

        assert sum(even) / 2 == pytest.approx(0.99, abs=0.002)
        assert uneven[1] - uneven[0] > 3 * (even[1] - even[0])

    def test_an_uneven_agreement_cannot_be_told_from_few_pictures(self):
        rule = parse_rule("agreement >= 98.5 %")

        assert judge_parts(rule, "pixels", [(10_000, 9_900)] * 20).verdict is Verdict.PASS
        assert judge_parts(rule, "pixels", [(10_000, 10_000)] * 19 + [(10_000, 8_000)]).verdict is Verdict.CANNOT_TELL
        assert judge_parts(rule, "pixels", [(10_000, 9_000)] * 20).verdict is Verdict.FAIL

    def test_a_single_picture_decides_nothing(self):
        assert judge_parts(parse_rule("agreement >= 90 %"), "pixels", [(10_000, 9_999)]).verdict is Verdict.CANNOT_TELL

    def test_a_single_picture_decides_nothing_where_all_is_alike_either(self):
        found = judge_parts(parse_rule("agreement >= 99 %"), "pixels", [(50_176, 50_176)])

        assert found.verdict is Verdict.CANNOT_TELL
        assert found.reason.endswith("about 368 images would decide it")

    @pytest.mark.parametrize("count", [2, 5, 40])
    def test_one_part_decided_otherwise_never_makes_a_gate_surer(self, count):
        alike = clustered_interval([(1000, 1000)] * count)
        nearly = clustered_interval([(1000, 1000)] * (count - 1) + [(1000, 999)])

        assert nearly[0] <= alike[0]

    def test_an_agreement_of_few_pictures_is_known_less_well(self):
        """Twice as many pictures with half of the parts each, alike in variance: the variance itself is known better."""
        few, many = clustered_interval([(1000, 990), (1000, 980)]), clustered_interval([(1000, 990), (1000, 980)] * 10)

        assert few[1] - few[0] > 5 * (many[1] - many[0])

    def test_no_boxes_at_all_cannot_be_judged(self):
        assert judge_parts(parse_rule("agreement >= 90 %"), "boxes", [(0, 0)]).verdict is Verdict.CANNOT_TELL

    def test_disagreements_are_counted(self):
        assert judge_parts(parse_rule("disagreements <= 2"), "boxes", [(10, 9), (5, 4)]).verdict is Verdict.PASS
        assert judge_parts(parse_rule("disagreements <= 1"), "boxes", [(10, 9), (5, 4)]).verdict is Verdict.FAIL

    def test_there_is_no_drop_without_labels(self):
        with pytest.raises(ValueError, match="labelled"):
            judge_parts(parse_rule("drop <= 1 points"), "boxes", [(10, 10)])


class TestErrors:
    @settings(deadline=None, max_examples=30)
    @given(st.integers(1, 5), SEEDS)
    def test_pieces_have_the_errors_of_the_whole(self, pieces, seed):
        random = np.random.default_rng(seed)
        actual, wanted = random.standard_normal((2, pieces, 3, 4)).astype(np.float32)
        running = parity.Running()

        for a, w in zip(actual, wanted, strict=True):
            running.add({"y": (a, w)})

        whole = parity.tensor_errors(actual, wanted)
        assert running.errors()["y"].max_abs == whole.max_abs
        assert running.errors()["y"].sqnr_db == pytest.approx(whole.sqnr_db)
        assert running.errors()["y"].cosine == pytest.approx(whole.cosine)

    @pytest.mark.parametrize(
        ("change", "verdict"),
        [
            (lambda found: found, Verdict.PASS),
            (lambda found: rows(found, [2, 0, 1, 3]), Verdict.PASS),
            (lambda found: {**found, "scores": found["scores"] * np.float32(1 + 1e-6)}, Verdict.PASS),
            (lambda found: {**found, "scores": found["scores"] + np.float32(0.01)}, Verdict.FAIL),
            (lambda found: {**found, "scores": found["scores"] * np.float32("nan")}, Verdict.FAIL),
            (lambda found: rows(found, [0, 1, 2]), Verdict.FAIL),
        ],
    )
    def test_a_float_engine_has_to_find_every_box_with_its_numbers(self, change, verdict):
        stacked = scenes.stacked([boxes(4)])

        assert parity.conversion_of_boxes([change(boxes(4))], Samples({}, stacked, stacked), Precision.FP32).verdict is verdict

    @pytest.mark.parametrize(("missed", "verdict"), [(1, Verdict.PASS), (2, Verdict.FAIL)])
    def test_an_int8_engine_may_differ_from_its_graph_as_the_graph_does_from_pytorch(self, missed, verdict):
        graph = rows(boxes(10), range(8))  # quantization leaves 8 of 10 boxes; 7 of 8 are more than that, 6 of 8 are less
        samples = Samples({}, scenes.stacked([boxes(10)]), scenes.stacked([graph]))

        assert parity.conversion_of_boxes([rows(graph, range(8 - missed))], samples, Precision.INT8).verdict is verdict
