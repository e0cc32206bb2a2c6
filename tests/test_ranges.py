"""From values to a histogram, from a histogram to a range, from a range to scale and zero point: laws on arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deploykit.quantize import observe
from deploykit.quantize.histogram import BINS, SAMPLE, Histogram, sample_of
from deploykit.quantize.optimal import MOST_OUTSIDE, Density, divergence, entropy, mse, squared_error
from deploykit.quantize.ranges import Range, affine_uint8, minmax, percentile, symmetric_int8, weight_scales

few = settings(deadline=None, max_examples=60)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
ends = st.tuples(st.floats(-(2.0**100), 2.0**100), st.floats(-(2.0**100), 2.0**100)).map(sorted)
tensors = arrays.arrays(np.float32, st.integers(1, 40), elements=floats)


def histogram(*batches: np.ndarray) -> Histogram:
    seen = Histogram()
    for batch in batches:
        seen.add(np.asarray(batch, np.float32))
    return seen


def same(first: Histogram, second: Histogram) -> bool:
    edges = (first.low, first.high, first.limit, first.zeros) == (second.low, second.high, second.limit, second.zeros)
    return edges and np.array_equal(first.counts, second.counts) and np.array_equal(first.drawn, second.drawn)


def activations(shape: tuple[int, ...], seed: int, *, relu: bool) -> np.ndarray:
    """Feature maps (N, C, H, W): some channels far larger than others, blobs and noise on them, larger values at borders."""
    generator, channels = np.random.default_rng(seed), np.random.default_rng(99)
    images, width, rows, columns = shape
    scale, bias = np.exp(channels.standard_normal((1, width, 1, 1))), channels.standard_normal((1, width, 1, 1))
    blobs = generator.standard_normal((images, width, -(-rows // 4), -(-columns // 4))).repeat(4, 2).repeat(4, 3)
    values = blobs[:, :, :rows, :columns] + 0.5 * generator.standard_normal(shape)
    values[:, :, 0], values[:, :, :, 0] = 1.6 * values[:, :, 0], 1.6 * values[:, :, :, 0]
    values[:, :, 0, 0] *= 2
    values = (values + bias) * scale
    return (np.maximum(values, 0) if relu else values).astype(np.float32)


def ends_of(kept: Range) -> tuple[float, float]:
    return kept.low, kept.high


def loss_of(loss, seen: Histogram, integers: str, kept: Range) -> float:
    density = Density.of(seen)
    assert density is not None
    return float(loss(density, integers, np.array([kept.low]), np.array([kept.high]))[0])


def literal_error(values: np.ndarray, integers: str, kept: Range) -> float:
    """The sum of squared errors of quantizing and dequantizing, done one by one."""
    parameters = (affine_uint8 if integers == "uint8" else symmetric_int8)(kept)
    limits, wide = np.iinfo(parameters.dtype), values.astype(np.float64)
    quantized = np.clip(np.rint(wide / parameters.scale) + parameters.zero_point, limits.min, limits.max)
    return float(((wide - (quantized - parameters.zero_point) * parameters.scale) ** 2).sum())


def drawn(name: str, count: int) -> np.ndarray:
    generator = np.random.default_rng(5)
    normal = generator.standard_normal(count)
    shapes = {
        "normal": normal,
        "shifted normal": normal + 1.5,
        "half-normal": np.abs(normal),
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(3 * normal + 1, 0, 6),
        "silu": 3 * normal / (1 + np.exp(-3 * normal)),
        "hard-swish": 2.5 * normal * np.clip(2.5 * normal + 3, 0, 6) / 6,
        "laplace": generator.laplace(size=count),
        "lognormal": generator.lognormal(0, 1, count),
        "two long tails": generator.lognormal(0, 1, count) * np.sign(normal),
        "bimodal": np.where(generator.random(count) < 0.7, normal / 2 - 2, 5 + normal),
        "negative": -0.1 - np.abs(normal),
        "pixels": (generator.integers(0, 256, count) / 255 - 0.45) / 0.22,
    }
    return shapes[name].astype(np.float32)


SHAPES = ("normal", "shifted normal", "half-normal", "relu", "relu6", "silu", "hard-swish", "laplace", "lognormal", "bimodal")
SHAPES += ("two long tails", "negative", "pixels")
# As ONNX Runtime lays out (3, 256, 28, 28): images, blocks of channels, rows, columns, channels of a block.
IN_BLOCKS = (3, 16, 28, 28, 16)


class TestHistogram:
    @few
    @given(st.lists(tensors, min_size=1, max_size=6), st.randoms(use_true_random=False))
    def test_the_order_of_the_batches_does_not_matter(self, batches, random):
        shuffled = random.sample(batches, len(batches))

        assert same(histogram(*batches), histogram(*shuffled))

    @few
    @given(st.lists(tensors, min_size=1, max_size=6))
    def test_how_images_are_batched_does_not_matter_while_every_value_is_sampled(self, batches):
        assert same(histogram(*batches), histogram(np.concatenate(batches)))

    @few
    @given(st.lists(tensors, min_size=1, max_size=6))
    def test_minimum_and_maximum_are_exact_and_every_value_is_counted(self, batches):
        seen, values = histogram(*batches), np.concatenate(batches)

        assert (seen.low, seen.high) == (values.min(), values.max())
        assert seen.counts.sum() == values.size

    @few
    @given(tensors)
    def test_a_value_lies_in_the_bin_that_says_so(self, values):
        seen = histogram(values)

        width = 2 * seen.limit / BINS
        for index in np.flatnonzero(seen.counts):
            low, high = (index - BINS // 2) * width, (index + 1 - BINS // 2) * width
            wide = values.astype(np.float64)
            assert seen.counts[index] == (((low <= wide) & (wide < high)).sum() if width else values.size)

    @few
    @given(st.lists(tensors, max_size=4), st.lists(tensors, max_size=4))
    def test_what_two_have_seen_is_what_one_would_have_seen(self, batches, others):
        one, other, before = histogram(*batches), histogram(*others), histogram(*others)

        one.include(other)

        assert same(one, histogram(*batches, *others))
        assert same(other, before)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite_are_refused_and_change_nothing(self, bad):
        seen, before = histogram([1.0, 2.0]), histogram([1.0, 2.0])

        with pytest.raises(ValueError, match="NaN or infinite"):
            seen.add(np.array([0.5, bad], np.float32))
        assert same(seen, before)

    @pytest.mark.parametrize("batches", [([1.5], [2.0]), ([1.5], [-2.0]), ([0.0], [2.0]), ([1e-40], [1.0], [3e38])])
    def test_a_value_at_the_very_edge_makes_the_histogram_grow(self, batches):
        assert same(histogram(*batches), histogram(*batches[::-1]))
        assert histogram(*batches).counts.sum() == len(batches)

    def test_an_all_zero_tensor_has_the_range_of_zero(self):
        seen = histogram(np.zeros(10))

        assert minmax(seen) == percentile(seen, 99.9) == Range(0.0, 0.0)

    @pytest.mark.parametrize("value", [1e-42, 3.7, -2.0, 3e38])
    def test_a_constant_tensor_has_the_range_from_zero_to_it(self, value):
        seen = histogram(np.full(10, value))

        wanted = Range.of(np.float32(value), np.float32(value))
        assert minmax(seen) == percentile(seen, 99.9) == wanted

    def test_what_was_saved_is_what_is_loaded(self, tmp_path):
        seen = {"a/Conv": histogram([1.0, -3.0]), "image": histogram([0.0])}

        observe.save(seen, tmp_path / "observations.npz")
        loaded = observe.load(tmp_path / "observations.npz")

        assert list(loaded) == list(seen)
        assert all(same(loaded[name], seen[name]) for name in seen)


class TestSampling:
    @few
    @given(st.integers(1, 10 * SAMPLE))
    def test_one_value_is_read_in_each_of_equal_stretches(self, size):
        positions, stretch = sample_of(size), -(-size // SAMPLE)

        assert np.array_equal(positions // stretch, np.arange(size // stretch))

    @pytest.mark.parametrize(
        "shape", [(16, 2048, 7, 7), (8, 256, 14, 14), (4, 64, 64, 64), (3, 3, 224, 224), (8, 56, 56, 96), IN_BLOCKS]
    )
    def test_no_row_column_or_channel_is_read_more_often_than_another(self, shape):
        read = np.unravel_index(sample_of(int(np.prod(shape))), shape)

        for places, size in zip(read, shape, strict=True):
            often = np.bincount(places, minlength=size)
            assert often.min() > 0
            assert often.std() < 2 * np.sqrt(often.mean())  # what independent draws would give, twice

    def test_of_a_large_tensor_the_extremes_are_exact_and_each_value_stands_for_its_stretch(self):
        values = np.random.default_rng(0).random((1, 64, 56, 56), np.float32)
        values[0, 17, 31, 29] = 9.0

        seen = histogram(values)

        assert (seen.low, seen.high) == (values.min(), 9.0)
        assert seen.counts.sum() == pytest.approx(values.size, rel=0.01)
        assert SAMPLE / 2 <= seen.drawn.sum() <= SAMPLE * 1.1

    def test_every_value_in_the_tails_counts_and_counts_once(self):
        values = np.random.default_rng(0).standard_normal(50 * SAMPLE).astype(np.float32)

        seen, everything = histogram(values), histogram(*values.reshape(50, -1))

        beyond = np.abs(np.arange(BINS) - BINS // 2) * 2 * seen.limit / BINS > 3.5
        assert everything.counts[beyond].sum() > 500
        assert np.array_equal(seen.counts[beyond], everything.counts[beyond])

    def test_fewer_may_be_sampled_and_tails_and_extremes_stay_exact(self):
        values = np.random.default_rng(0).standard_normal(50 * SAMPLE).astype(np.float32)
        seen, fewer = Histogram(), Histogram()

        seen.add(values)
        fewer.add(values, SAMPLE // 4)

        beyond = np.abs(np.arange(BINS) - BINS // 2) * 2 * seen.limit / BINS > 3.5
        assert fewer.drawn.sum() == pytest.approx(SAMPLE / 4 + seen.drawn[beyond].sum(), rel=0.3)
        assert fewer.counts.sum() == pytest.approx(values.size, rel=0.01)
        assert np.array_equal(fewer.counts[beyond], seen.counts[beyond])
        assert (fewer.low, fewer.high) == (seen.low, seen.high) == (values.min(), values.max())

    @pytest.mark.parametrize("value", [-1.5, 0.0, 1.5])
    def test_a_large_tensor_of_one_value_has_it_for_both_extremes(self, value):
        seen = histogram(np.full(3 * SAMPLE + 5, value))

        assert (seen.low, seen.high) == (value, value)
        assert seen.counts.sum() == pytest.approx(3 * SAMPLE, rel=0.01)
        assert np.count_nonzero(seen.counts) == 1

    @few
    @given(st.permutations(range(4)))
    def test_the_order_of_large_batches_does_not_matter_either(self, order):
        batches = [np.random.default_rng(seed).standard_normal(SAMPLE * 2 + seed) * 4.0**seed for seed in range(4)]

        assert same(histogram(*batches), histogram(*(batches[index] for index in order)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 1, 70_001, -1])
    @pytest.mark.parametrize("size", [5 * SAMPLE, 5 * SAMPLE + 3, 16 * SAMPLE + 2])  # stretches may leave a rest
    def test_a_value_that_is_not_finite_is_found_wherever_it_is(self, bad, place, size):
        values = np.ones(size, np.float32)
        values[place] = bad

        with pytest.raises(ValueError, match="NaN or infinite"):
            histogram(values)

    @pytest.mark.parametrize("shape", [(16, 512, 7, 7), (8, 49, 28, 28), (4, 96, 32, 32), (4, 32, 32, 96)])
    @pytest.mark.parametrize("relu", [True, False])
    def test_what_is_skipped_changes_no_range(self, shape, relu):
        batches = [activations(shape, seed, relu=relu) for seed in range(4)]
        seen = histogram(*batches)
        everything = histogram(*(piece for batch in batches for piece in np.array_split(batch.ravel(), batch.size // SAMPLE + 1)))

        assert minmax(seen) == minmax(everything)
        width = 2 * seen.limit / BINS
        for one, other in zip(*(ends_of(percentile(which, 99.99)) for which in (seen, everything)), strict=True):
            assert one == pytest.approx(other, abs=2 * width)
        for integers in ("uint8", "int8"):
            lost, least = (loss_of(squared_error, everything, integers, mse(which, integers)) for which in (seen, everything))
            assert lost <= 1.02 * least
            one, other = (loss_of(divergence, which, integers, minmax(which)) for which in (seen, everything))
            assert one == pytest.approx(other, abs=1e-3)  # nats; what chance adds to the sample alone is 1e-2
            lost, least = (loss_of(divergence, everything, integers, entropy(which, integers)) for which in (seen, everything))
            assert lost <= 1.2 * least + 2e-4


class TestRanges:
    @pytest.mark.parametrize("draw", ["random", "standard_normal", "standard_exponential"])
    @pytest.mark.parametrize("percent", [99.0, 99.9])
    def test_a_percentile_is_numpys_to_within_two_bins(self, draw, percent):
        values = getattr(np.random.default_rng(3), draw)(30_000).astype(np.float32)
        seen = histogram(*values.reshape(10, -1))

        kept = percentile(seen, percent)

        tail = (100 - percent) / 2
        low, high = np.percentile(values, [tail, 100 - tail])
        assert kept.low == pytest.approx(min(low, 0), abs=2 * 2 * seen.limit / BINS)
        assert kept.high == pytest.approx(high, abs=2 * 2 * seen.limit / BINS)

    @few
    @given(tensors, st.floats(90, 100))
    def test_a_percentile_never_leaves_the_exact_minimum_and_maximum(self, values, percent):
        seen = histogram(values)

        kept, whole = percentile(seen, percent), minmax(seen)

        assert whole.low <= kept.low <= 0 <= kept.high <= whole.high

    @few
    @given(tensors)
    def test_a_percentile_of_one_hundred_is_minmax(self, values):
        assert percentile(histogram(values), 100) == minmax(histogram(values))

    def test_a_percentile_cuts_an_outlier_that_minmax_keeps(self):
        seen = histogram(np.append(np.linspace(0, 1, 10_000), 100))

        assert minmax(seen).high == 100
        assert percentile(seen, 99.9).high == pytest.approx(1, abs=2 * seen.limit / BINS)

    def test_a_range_that_is_not_finite_is_refused(self):
        with pytest.raises(ValueError, match="not finite"):
            Range.of(0.0, np.inf)


@pytest.mark.parametrize("integers", ["uint8", "int8"])
class TestLeastSquaredError:
    @few
    @given(st.sampled_from(SHAPES), st.floats(0.05, 1), st.floats(0.05, 1))
    def test_the_expected_error_of_a_range_is_what_quantizing_all_values_gives(self, integers, name, low, high):
        values = drawn(name, 20_000)
        kept = Range.of(low * min(values.min(), 0), high * max(values.max(), 0))

        expected = loss_of(squared_error, histogram(values), integers, kept)

        assert expected == pytest.approx(literal_error(values, integers, kept), rel=0.03)

    def test_values_within_one_bin_count_as_evenly_spread(self, integers):
        values = np.random.default_rng(0).random(20_000).astype(np.float32)
        wide = Histogram(limit=1024.0)
        wide.add(values)

        expected = loss_of(squared_error, wide, integers, Range(0.0, 1.0))

        assert expected == pytest.approx(literal_error(values, integers, Range(0.0, 1.0)), rel=0.03)

    @pytest.mark.parametrize("name", SHAPES)
    def test_no_range_is_better_by_more_than_one_percent(self, integers, name):
        values = drawn(name, 20_000)
        low, high = min(values.min(), 0), max(values.max(), 0)
        shares = np.geomspace(0.1, 1, 24)
        ranges = [Range.of(left * low, right * high) for left in shares for right in shares if (low and high) or left == right]

        chosen = mse(histogram(values), integers)

        least = min(literal_error(values, integers, kept) for kept in ranges)
        assert literal_error(values, integers, chosen) <= 1.01 * least

    @few
    @given(tensors)
    def test_it_is_never_worse_than_minmax(self, integers, values):
        seen = histogram(values)
        if Density.of(seen) is None:
            return

        chosen, whole = (loss_of(squared_error, seen, integers, kept) for kept in (mse(seen, integers), minmax(seen)))

        assert chosen <= whole

    @pytest.mark.parametrize("outlier", [-60, 60])
    def test_a_single_outlier_among_many_values_is_clipped_and_does_not_move_the_other_end(self, integers, outlier):
        values = np.append(drawn("normal", 2_000_000), np.float32(outlier))

        kept = mse(histogram(*np.array_split(values, 70)), integers)

        far, near = (-kept.low, kept.high) if outlier < 0 else (kept.high, -kept.low)
        assert 3.6 < far < 20
        assert near > 3.6

    def test_among_few_it_is_kept(self, integers):
        assert mse(histogram(np.append(drawn("half-normal", 1000), np.float32(20))), integers).high > 18


def kl_as_published(seen: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds and their divergence as S. Migacz's slides have it: |x| in bins, 128 levels of equal numbers of bins.

    The mass outside goes to the last bin that is occupied; on an empty one, it makes a divergence infinite.
    """
    middle, width = BINS // 2, 2 * seen.limit / BINS
    bins = (seen.counts[middle:] + seen.counts[:middle][::-1]).astype(np.float64)
    bins[0] -= seen.zeros
    bins = bins[: int(np.ceil(max(-seen.low, seen.high) / width))]
    lost = []
    starts = np.arange(128, len(bins) + 1, 8)
    for size in starts:
        inside = bins[:size].copy()
        inside[np.flatnonzero(inside)[-1]] += bins[size:].sum()
        edges = np.arange(129) * size // 128
        occupied = bins[:size] > 0
        means = np.add.reduceat(bins[:size], edges[:-1]) / np.maximum(np.add.reduceat(occupied * 1.0, edges[:-1]), 1)
        quantized = np.repeat(means, np.diff(edges)) * occupied
        p, q = inside / inside.sum(), quantized / quantized.sum()
        used = p > 0
        lost.append((p[used] * np.log(p[used] / q[used])).sum())
    return starts * width, np.array(lost)


class TestEntropy:
    @pytest.mark.parametrize("name", ["half-normal", "relu", "laplace", "lognormal", "bimodal"])
    def test_with_many_values_it_is_the_published_definition(self, name):
        seen = histogram(*np.array_split(drawn(name, 2_000_000), 64))
        thresholds, lost = kl_as_published(seen)

        kept = entropy(seen, "int8")

        chosen = lost[np.argmin(np.abs(thresholds - max(-kept.low, kept.high)))]
        assert chosen <= 1.3 * lost.min() + 1e-3  # nats; noise in 4096 bins of two million values is 1e-3

    @pytest.mark.parametrize("integers", ["uint8", "int8"])
    @pytest.mark.parametrize("name", ["half-normal", "normal", "silu", "laplace", "lognormal", "bimodal"])
    def test_few_values_do_not_make_an_absurdly_small_range(self, name, integers):
        seen = histogram(drawn(name, 1000))

        lost, least = (loss_of(squared_error, seen, integers, method(seen, integers)) for method in (entropy, mse))

        assert lost <= 10 * least  # without what chance adds subtracted, a factor of 50 to 250

    @pytest.mark.parametrize("integers", ["uint8", "int8"])
    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("count", [10, 100, 1000, 100_000])
    def test_nearly_all_values_stay_inside(self, name, count, integers):
        values = drawn(name, count)
        seen = histogram(*np.array_split(values, count // SAMPLE + 1))

        kept = entropy(seen, integers)

        margin, half = 2 * seen.limit / BINS, 0.5 * affine_uint8(minmax(seen)).scale
        outside = (values < kept.low - margin - half) | (values > kept.high + margin + half)
        assert outside.sum() <= MOST_OUTSIDE * np.count_nonzero(values)

    def test_a_long_tail_is_cut(self):
        values = drawn("lognormal", 1_000_000)

        kept = entropy(histogram(*np.array_split(values, 32)), "int8")

        assert kept.high < 0.5 * values.max()

    def test_what_saturates_at_the_maximum_stays(self):
        assert entropy(histogram(drawn("relu6", 20_000)), "uint8") == Range(0.0, 6.0)


@pytest.mark.parametrize("method", [mse, entropy])
@pytest.mark.parametrize("integers", ["uint8", "int8"])
class TestSearchedRanges:
    @few
    @given(values=tensors)
    def test_they_never_leave_the_exact_minimum_and_maximum(self, method, integers, values):
        seen = histogram(values)

        kept, whole = method(seen, integers), minmax(seen)

        assert whole.low <= kept.low <= 0 <= kept.high <= whole.high

    @pytest.mark.parametrize("name", ["half-normal", "normal", "silu"])
    def test_a_tensor_a_thousand_times_as_large_has_a_range_as_large(self, method, integers, name):
        values = drawn(name, 20_000)

        one, other = (method(histogram(values * np.float32(factor)), integers) for factor in (1, 1024))

        assert (other.low, other.high) == pytest.approx((1024 * one.low, 1024 * one.high), rel=1e-6)

    def test_zeros_say_nothing_about_a_range(self, method, integers):
        values = drawn("lognormal", 20_000)

        with_zeros = method(histogram(values, np.zeros(SAMPLE), np.zeros(SAMPLE)), integers)

        assert with_zeros == method(histogram(values), integers)

    def test_the_other_integers_get_another_range(self, method, integers):
        seen = histogram(drawn("lognormal", 30_000))

        assert method(seen, "uint8") != method(seen, "int8")

    @pytest.mark.parametrize(
        "values",
        [[3.7], [-2.0], [0.1] * 40, [6.0] * 40, [0.0] * 39 + [5.0], [1e-42, 2e-42], [-1e-45], [3e38, -3e38], [1e-42, 3e38]],
        ids=str,
    )
    def test_a_few_values_are_all_kept(self, method, integers, values):
        seen = histogram(values)

        kept, whole = method(seen, integers), minmax(seen)

        assert kept.high - kept.low >= 0.95 * (whole.high - whole.low)

    def test_an_all_zero_tensor_has_the_range_of_zero(self, method, integers):
        assert method(histogram(np.zeros(10)), integers) == Range(0.0, 0.0)

    def test_where_nothing_was_counted_minimum_and_maximum_stand(self, method, integers):
        assert method(Histogram(low=-1.0, high=3.0, limit=4.0), integers) == Range(-1.0, 3.0)

    def test_the_smallest_and_the_largest_float_together_make_no_warning(self, method, integers):
        kept = method(histogram(np.array([-3.4e38, -1e-45, 1e-45, 3.4e38], np.float32)), integers)

        assert np.isfinite([kept.low, kept.high]).all()


@pytest.mark.parametrize("compute", [affine_uint8, symmetric_int8])
class TestScalesOfActivations:
    @few
    @given(ends)
    def test_they_are_positive_float32_with_a_zero_point_that_fits(self, compute, ends):
        parameters = compute(Range.of(*ends))

        limits = np.iinfo(parameters.dtype)
        assert parameters.scale > 0
        assert parameters.scale == np.float32(parameters.scale)
        assert limits.min <= parameters.zero_point <= limits.max

    @few
    @given(ends, arrays.arrays(np.float64, 8, elements=st.floats(0, 1)))
    def test_values_in_range_come_back_to_within_half_a_step_and_zero_exactly(self, compute, ends, values):
        kept = Range.of(*ends)
        parameters = compute(kept)
        inside = np.append(kept.low + values * (kept.high - kept.low), 0.0)

        limits = np.iinfo(parameters.dtype)
        integers = np.clip(np.rint(inside / parameters.scale) + parameters.zero_point, limits.min, limits.max)
        back = (integers - parameters.zero_point) * parameters.scale

        # half a step, and at the ends of an affine range another half because the zero point is rounded too
        steps = 1.0 if parameters.dtype == "uint8" else 0.5
        assert np.abs(back - inside).max() <= steps * parameters.scale * (1 + 1e-4)
        assert back[-1] == 0.0

    def test_a_tensor_that_is_always_zero_gets_a_scale_all_the_same(self, compute):
        assert compute(Range(0.0, 0.0)).scale == 1.0


class TestScalesOfWeights:
    @few
    @given(
        weights=arrays.arrays(np.float32, (4, 6), elements=st.floats(-1e6, 1e6, width=32)),
        bias=arrays.arrays(np.float32, 4, elements=st.floats(-1e6, 1e6, width=32)),
        input_scale=st.floats(2**-20, 2**20, width=32),
    )
    def test_weights_fit_int8_and_biases_fit_int32_whatever_their_size(self, weights, bias, input_scale):
        scale = weight_scales(weights, 0, bias=bias, input_scale=input_scale)

        assert scale.dtype == np.float32
        assert scale.shape == (4,)
        assert (scale > 0).all()
        assert np.abs(np.rint(weights.astype(np.float64) / scale[:, None])).max() <= 127
        assert np.abs(bias.astype(np.float64) / (scale * np.float32(input_scale))).max() < 2**31

    def test_without_a_bias_the_largest_weight_of_a_channel_is_127_steps(self):
        weights = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)

        assert weight_scales(weights, 0, bias=None, input_scale=1.0) == pytest.approx(np.array([2.0, 0.5]) / 127)
        assert weight_scales(weights, 1, bias=None, input_scale=1.0) == pytest.approx(np.array([1.0, 2.0]) / 127)

    def test_a_channel_without_weights_gets_scale_one(self):
        assert weight_scales(np.zeros((1, 3), np.float32), 0, bias=None, input_scale=0.1).tolist() == [1.0]
