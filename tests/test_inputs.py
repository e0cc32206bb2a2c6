"""Calibration images that cannot be right: what is refused, what is only said, and that photographs pass in silence."""

from __future__ import annotations

import networks
import numpy as np
import pytest

from deploykit.errors import DataError
from deploykit.quantize.inputs import FEW, Inputs


def photographs(count: int = FEW, seed: int = 0) -> np.ndarray:
    """Normalised like photographs: large soft structures of any brightness, (count, 3, 32, 32)."""
    return networks.images(count, seed=seed)


def warnings(images: np.ndarray, names: list[str] | None = None) -> list[str]:
    found = Inputs(names)
    for _ in found.passing(np.array_split(images, 4)):
        pass
    return found.warnings()


class TestWhatPasses:
    def test_batches_pass_unchanged_and_in_order(self):
        images = photographs()

        passed = list(Inputs().passing(np.split(images, 4)))

        assert np.array_equal(np.concatenate(passed), images)

    def test_photographs_make_no_warning(self):
        assert warnings(photographs()) == []

    def test_nor_do_those_for_a_network_that_wants_inputs_from_minus_one_to_one(self):
        assert warnings(0.5 * photographs()) == []

    def test_grey_images_with_few_pixels_make_no_warning(self):
        assert warnings(photographs()[:, :1, ::4, ::4]) == []

    def test_nor_do_images_of_little_contrast_that_differ_in_brightness(self):
        brightness = np.linspace(-1.5, 1.5, FEW, dtype=np.float32)[:, None, None, None]

        assert warnings(0.1 * photographs() + brightness) == []

    def test_no_image_makes_no_warning(self):
        assert Inputs().warnings() == []


class TestWhatIsRefused:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_images_that_hold_nan_or_infinite_values_are_named_all_at_once(self, bad):
        images = photographs(12)
        images[3, 0, 1, 2] = images[10, 2, 31, 31] = bad
        found = Inputs([f"{index}.jpg" for index in range(12)])

        with pytest.raises(DataError, match="2 of 12 calibration images hold NaN or infinite values") as refused:
            list(found.passing(np.split(images, 4)))
        assert refused.value.problems == ("3.jpg", "10.jpg")

    def test_after_one_of_them_nothing_passes_any_more(self):
        images = photographs(4)
        images[1] = np.nan
        passing = Inputs().passing(np.split(images, 4))

        assert np.array_equal(next(passing), images[:1])
        with pytest.raises(DataError, match="image 1"):
            next(passing)

    def test_of_many_the_first_five_are_named(self):
        with pytest.raises(DataError, match="and 7 more"):
            list(Inputs().passing([np.full((12, 3, 4, 4), np.nan, np.float32)]))


class TestWhatIsSaid:
    def test_fewer_than_32_images(self):
        assert warnings(photographs(FEW - 1)) == [f"only {FEW - 1} calibration images; ranges are more reliable from {FEW} on"]

    def test_images_of_one_colour_with_their_names_and_values(self):
        images = photographs()
        images[7], images[20] = -2.0, np.array([0.5, 1, 1.5], np.float32)[:, None, None]

        (found,) = warnings(images, [f"{index}.jpg" for index in range(FEW)])

        wanted = "7.jpg (-2.00, -2.00, -2.00), 20.jpg (0.50, 1.00, 1.50)"
        assert found == f"2 of {FEW} calibration images show one colour (as input): {wanted}"

    def test_an_image_with_the_faintest_structure_is_not_of_one_colour(self):
        images = photographs()
        images[7] = 0.05 * images[7]

        assert warnings(images) == []

    def test_images_that_are_nearly_alike(self):
        one = photographs(1)
        noise = np.random.default_rng(0).standard_normal((FEW, *one.shape[1:])).astype(np.float32)

        (found,) = warnings(one + 0.2 * noise)

        assert found.startswith(f"the {FEW} calibration images, image 0 to image {FEW - 1}, are nearly alike: they differ by ")

    def test_two_that_differ_are_not_alike(self):
        assert not [text for text in warnings(photographs(2)) if "alike" in text]

    @pytest.mark.parametrize(
        ("wrong", "quoted"),
        [
            (lambda images: 0.27 * images + 0.45, "deviation 0.2"),
            (lambda images: 65 * images + 115, "deviation 6"),
            (lambda images: (images - 0.45) / 0.22, "deviation 4."),
            (lambda images: (0.27 * images + 0.45 - 115) / 58, "mean -1.9"),
            (lambda images: 4 * images, "deviation 3.9"),
            (lambda images: images + np.array([0, 0, 2], np.float32)[:, None, None], "mean "),
        ],
        ids=["not normalised", "0 to 255", "normalised twice", "mean of 0 to 255", "deviation of another set", "one channel"],
    )
    def test_inputs_whose_mean_and_deviation_are_far_from_0_and_1(self, wrong, quoted):
        (found,) = warnings(wrong(photographs()).astype(np.float32))

        assert found.startswith("the network's inputs have mean ")
        assert quoted in found
        assert "check preprocess.mean and preprocess.std" in found

    def test_an_image_of_any_size_leaves_only_a_few_numbers(self):
        found = Inputs()

        list(found.passing([np.random.default_rng(0).standard_normal((2, 3, 225, 301)).astype(np.float32)]))

        assert [seen.shape for seen in (found.means[0], found.deviations[0], found.coarse[0])] == [(3,), (3,), (3, 8, 8)]
