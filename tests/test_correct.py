"""Cross-layer equalization: which layers may share factors, that the float function stays, and what INT8 gains by it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from deploykit import data, export, pipeline, quantize, runtimes
from deploykit import recipe as recipes
from deploykit.artifact import SAMPLES, Artifact
from deploykit.errors import DataError, StageError, UsageError
from deploykit.quantize import correct
from deploykit.quantize.correct import Seen
from deploykit.quantize.pairs import Pair, pairs, scale
from deploykit.recipe import ExportTable, QuantizeTable
from deploykit.runtimes import onnxruntime

W = networks.weights


def found_in(source: Artifact) -> list[tuple[list[str], list[str]]]:
    """The names of each pair's producers and readers, sorted."""
    return [(named(pair.producers), named(pair.readers)) for pair in pairs(ir.load(source.path).graph)]


def named(nodes: Iterable[ir.Node]) -> list[str]:
    return sorted(str(node.name) for node in nodes)


def batches_of(pictures: np.ndarray):
    return lambda size: (pictures[start : start + size] for start in range(0, len(pictures), size))


def equalized(source: Artifact, folder: Path, pictures: np.ndarray | None = None, **options: object) -> Artifact:
    pictures = networks.images(32, source.inputs[0].shape[2], seed=1) if pictures is None else pictures
    return correct.equalize(source, batches_of(pictures), networks.made(folder), **options)


def answers_of(model: ir.Model | Path, inputs: np.ndarray) -> np.ndarray:
    content = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.reference(content)
    (answer,) = runtimes.run(session, {"image": inputs}).values()
    session.close()
    return answer


def constants(source: Artifact) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in onnx.load(source.path).graph.initializer}


class TestWhichLayersShareFactors:
    @pytest.mark.parametrize(
        "between",
        [
            "r = Relu(t)",
            "r = LeakyRelu<alpha = 0.1>(t)",
            "r = MaxPool<kernel_shape = [2, 2]>(t)",
            "r = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(t)",
            "r = GlobalAveragePool(t)",
            "r = Dropout(t)",
            "half = Constant<value = float {0.5}>() r = Dropout(t, half)",
            "u = Relu(t) v = MaxPool<kernel_shape = [2, 2]>(u) r = Identity(v)",
        ],
    )
    def test_a_convolution_and_what_reads_it_behind_operators_that_a_positive_factor_passes(self, tmp_path, between):
        source = networks.by_hand(
            tmp_path, f"[a] t = Conv(image, w) {between} [b] logits = Conv(r, v1)", {"w": W(4, 3, 1, 1), "v1": W(5, 4, 1, 1)}
        )

        assert found_in(source) == [(["a"], ["b"])]

    @pytest.mark.parametrize(
        ("between", "why"),
        [
            (
                "zero = Constant<value = float {0}>() six = Constant<value = float {6}>() r = Clip(t, zero, six)",
                "Relu6 has a bound",
            ),
            ("r = Sigmoid(t)", "a sigmoid is not linear"),
            ("r = HardSwish(t)", "nor is a hard-swish"),
            ("r = Concat<axis = 1>(t, t)", "channels move"),
            ("r = Transpose<perm = [0, 2, 3, 1]>(t)", "channels move"),
            ("s = Sigmoid(t) r = Relu(t) [c] other = Conv(s, v1)", "something else reads it"),
            ("r = Add(t, image)", "the input cannot be scaled"),
            ("m = ReduceMean<keepdims = 1>(t, axes) r = Add(t, m)", "a reduction mixes channels"),
        ],
    )
    def test_nothing_is_shared_across_anything_else(self, tmp_path, between, why):
        inside = {"r = Concat<axis = 1>(t, t)": 6, "r = Transpose<perm = [0, 2, 3, 1]>(t)": 8}.get(between, 3)
        weights = {"w": W(3, 3, 1, 1), "v1": W(5, inside, 1, 1), "axes": np.array([1])}

        source = networks.by_hand(tmp_path, f"[a] t = Conv(image, w) {between} [b] logits = Conv(r, v1)", weights)

        assert found_in(source) == [], why

    def test_a_result_that_is_also_the_networks_output_is_left_alone(self, tmp_path):
        source = networks.by_hand(
            tmp_path, "[a] logits = Conv(image, w) [b] more = Conv(logits, v1)", {"w": W(4, 3, 1, 1), "v1": W(5, 4, 1, 1)}
        )

        assert found_in(source) == []

    @pytest.mark.parametrize(
        "producer",
        [
            "v5 = Abs(v1) [b] u = Gemm<transB = 1>(f, v5)",
            "b2 = Abs(b1) [b] u = Gemm<transB = 1>(f, v1, b2)",
            "[b] u = Gemm<transB = 1>(f, v1, one)",
            "[b] u = Gemm<transA = 1, transB = 1>(g, v3)",
        ],
    )
    def test_weights_that_are_computed_and_a_bias_that_is_not_one_for_each_channel_cannot_take_factors(self, tmp_path, producer):
        weights = {"w": W(4, 3, 1, 1), "v1": W(4, 4), "b1": W(4), "one": W(1), "v3": W(4, 4)}
        body = f"a = GlobalAveragePool(image) c = Flatten(a) [a] f = Gemm<transB = 1>(c, v0) g = Transpose(f) {producer}"

        source = networks.by_hand(
            tmp_path, f"{body} [c] logits = Gemm<transB = 1>(u, v4)", {**weights, "v0": W(4, 3), "v4": W(5, 4)}
        )

        assert ["b"] not in [producers for producers, _ in found_in(source)]

    def test_all_readers_take_part_and_so_do_all_tensors_of_a_residual_stream(self, tmp_path):
        body = """
            [stem] s = Conv(image, w)  [in] t = Conv(s, v1)  u = Relu(t)  [out] v = Conv(u, v1)
            x = Add(s, v)  y = Relu(x)  [left] l = Conv(y, v1)  [right] r = Conv(y, v1)  logits = Add(l, r)
        """

        source = networks.by_hand(tmp_path, body, {"w": W(4, 3, 1, 1), "v1": W(4, 4, 1, 1)})

        assert found_in(source) == [(["out", "stem"], ["in", "left", "right"]), (["in"], ["out"])]

    def test_channels_that_become_stretches_of_columns_share_a_factor(self, tmp_path):
        body = "[a] t = Conv(image, w) f = Flatten(t) [b] logits = Gemm<transB = 1>(f, v1)"
        source = networks.by_hand(tmp_path, body, {"w": W(4, 3, 1, 1), "v1": W(5, 4 * 64)})
        graph = ir.load(source.path)

        scale(graph.graph, pairs(graph.graph)[0], np.array([1.0, 2.0, 4.0, 0.5]))

        assert found_in(source) == [(["a"], ["b"])]
        assert np.array_equal(answers_of(graph, networks.images(2, 8)), answers_of(source.path, networks.images(2, 8)))

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param("[b] u = Conv(image, w1)", id="one channel over all"),
            pytest.param("[b] v = Conv(image, w) p = GlobalAveragePool(v) u = Flatten(p)", id="channels over columns"),
        ],
    )
    def test_an_add_that_broadcasts_other_channels_is_left_alone(self, tmp_path, other):
        body = f"[a] t = Conv(image, w) {other} r = Add(t, u) [c] logits = Conv(r, v1)"

        source = networks.by_hand(tmp_path, body, {"w": W(4, 3, 1, 1), "w1": W(1, 3, 1, 1), "v1": W(5, 4, 1, 1)}, size=4)

        assert found_in(source) == []

    def test_an_add_of_channels_and_of_stretches_of_columns_is_left_alone(self, tmp_path):
        body = """
            [a] t = Conv(image, w) f = Flatten(t)  p = GlobalAveragePool(image) q = Flatten(p) [b] g = Gemm(q, v1)
            r = Add(f, g) [c] logits = Gemm(r, v2)
        """

        source = networks.by_hand(tmp_path, body, {"w": W(4, 3, 1, 1), "v1": W(3, 256), "v2": W(256, 5)})

        assert found_in(source) == []

    def test_a_trained_mobile_block_has_its_clip_and_hard_swish_left_alone(self, portable):
        assert found_in(portable("mobile")) == [(["body.squeeze/Conv"], ["body.excite/Conv"])]


class TestTheFloatFunction:
    @pytest.mark.parametrize("name", ["residual", "padded_shortcut", "branches", "twice", "variety", "lenet5", "mobile"])
    def test_powers_of_two_do_not_change_a_bit_of_any_answer(self, portable, name):
        graph = ir.load(portable(name).path)
        random = np.random.default_rng(3)

        for pair in pairs(graph.graph):
            scale(graph.graph, pair, np.exp2(random.integers(-10, 11, pair.channels)))

        assert np.array_equal(answers_of(graph, networks.images(4)), answers_of(portable(name).path, networks.images(4)))

    @given(factors=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8))
    @settings(max_examples=15, deadline=None)
    @pytest.mark.parametrize("name", ["residual", "twice", "variety", "lenet5"])
    def test_other_factors_change_it_by_rounding_alone(self, portable, name, factors):
        graph, inputs = ir.load(portable(name).path), networks.images(2)

        for pair in pairs(graph.graph):
            scale(graph.graph, pair, np.resize(factors, pair.channels))

        before = answers_of(portable(name).path, inputs)
        assert np.abs(answers_of(graph, inputs) - before).max() <= 2e-5 * np.abs(before).max()

    @pytest.mark.parametrize(("trans_b", "shape"), [(1, (6, 4)), (0, (4, 6))])
    def test_a_gemm_writes_and_reads_whichever_way_its_weights_lie(self, tmp_path, trans_b, shape):
        body = f"""
            [a] t = Conv(image, w)  g = GlobalAveragePool(t)  f = Flatten(g)
            [b] u = Gemm<transB = {trans_b}>(f, v1, b1)  r = Relu(u)  [c] logits = Gemm<transB = {trans_b}>(r, v2)
        """
        weights = {"w": W(4, 3, 1, 1), "v1": W(*shape), "b1": W(6), "v2": W(*((5, 6) if trans_b else (6, 5)))}
        source = networks.by_hand(tmp_path, body, weights)
        graph, inputs = ir.load(source.path), networks.images(3, 8)

        for pair in pairs(graph.graph):
            scale(graph.graph, pair, np.exp2(np.arange(pair.channels) - 2.0))

        assert found_in(source) == [(["a"], ["b"]), (["b"], ["c"])]
        assert np.array_equal(answers_of(graph, inputs), answers_of(source.path, inputs))

    def test_a_grouped_convolution_divides_each_weight_by_the_channel_it_reads(self, tmp_path):
        weights = {"w": W(4, 3, 1, 1), "v1": W(6, 2, 1, 1)}
        source = networks.by_hand(tmp_path, "[a] t = Conv(image, w) [b] logits = Conv<group = 2>(t, v1)", weights)
        graph = ir.load(source.path)

        scale(graph.graph, pairs(graph.graph)[0], np.array([1.0, 2.0, 4.0, 8.0]))

        found = graph.graph.initializers["v1"].const_value.numpy() / weights["v1"]
        assert found[:, :, 0, 0].tolist() == [[1, 0.5]] * 3 + [[0.25, 0.125]] * 3

    def test_weights_that_two_layers_share_are_scaled_for_one_of_them_alone(self, tmp_path):
        body = "[a] t = Conv(image, w) [b] u = Conv(t, w) [c] logits = Sigmoid(u)"
        source = networks.by_hand(tmp_path, body, {"w": W(3, 3, 1, 1)})
        graph = ir.load(source.path)

        scale(graph.graph, pairs(graph.graph)[0], np.array([1.0, 2.0, 4.0]))

        assert np.array_equal(answers_of(graph, networks.images(2, 8)), answers_of(source.path, networks.images(2, 8)))


def seen_of(values: np.ndarray) -> Seen:
    """What is observed of (N, C) values."""
    return Seen(np.minimum(values.min(0), 0), np.maximum(values.max(0), 0), (values.astype(np.float64) ** 2).mean(0))


def spread_values(decades: float, channels: int = 16) -> np.ndarray:
    """Magnitudes of normal numbers (4000, C), channels of sizes that differ by so many decades."""
    random = np.random.default_rng(5)
    return np.abs(random.standard_normal((4000, channels))) * np.logspace(-decades, 0, channels)


class TestWhatIsObserved:
    @pytest.mark.parametrize("batches", [1, 3])
    @pytest.mark.parametrize("flattened", [False, True])
    def test_extremes_and_the_mean_square_of_each_channel_over_all_images(self, tmp_path, batches, flattened):
        reader = "f = Flatten(t) [b] logits = Gemm<transB = 1>(f, v2)" if flattened else "[b] logits = Conv(t, v1)"
        weights = {"w": W(4, 3, 1, 1), "v1": W(5, 4, 1, 1), "v2": W(5, 256)}
        source = networks.by_hand(tmp_path, f"[a] t = Conv(image, w) {reader}", weights)
        pictures = networks.images(12, 8)

        parts = np.split(pictures, batches)
        (seen,) = correct._observe(source, pairs(ir.load(source.path).graph), lambda _: parts, lambda *_: None).values()

        values = np.einsum("oc,nchw->nohw", weights["w"][:, :, 0, 0], pictures)
        assert seen.low == pytest.approx(values.min((0, 2, 3)), rel=1e-5)
        assert seen.high == pytest.approx(values.max((0, 2, 3)), rel=1e-5)
        assert seen.power == pytest.approx((values**2).mean((0, 2, 3)), rel=1e-5)

    def test_zero_is_in_the_range_of_a_channel_that_never_reaches_it(self):
        seen = correct._statistics(np.full((2, 1, 3), 5, np.float32), 1)

        assert (seen.low, seen.high, seen.power) == (0, 5, 2 * 25)


class TestThePrediction:
    def pair(self, folder: Path, weights: np.ndarray) -> Pair:
        constants = {"w": W(weights.shape[1], 3, 1, 1), "v1": weights}
        body = "[a] t = Conv(image, w) g = GlobalAveragePool(t) f = Flatten(g) [b] logits = Gemm<transB = 1>(f, v1)"
        return pairs(ir.load(networks.by_hand(folder, body, constants).path).graph)[0]

    @pytest.mark.parametrize("decades", [0.0, 1.0, 3.0])
    @pytest.mark.parametrize("compensated", [0.0, 0.5, 1.0])
    def test_it_is_the_noise_that_rounding_makes(self, tmp_path, decades, compensated):
        """`compensated` says how far weights are larger where values are smaller, as in a rescaled network."""
        values = spread_values(decades)
        weights = W(32, 16) / np.logspace(-decades, 0, 16) ** compensated
        pair = self.pair(tmp_path, weights.astype(np.float32))
        seen = seen_of(values)

        found = correct._Reader.of(pair.readers[0], 16, seen).noise_to_signal(np.ones(16)).mean()

        step, steps = values.max() / 255, np.abs(weights).max(1, keepdims=True) / 127
        rounded = np.rint(values / step) * step @ (np.rint(weights / steps) * steps).T
        true = values @ weights.T
        # The signal as predicted, of independent channels: positive values have a mean, which adds up or cancels.
        signal = (weights**2) @ seen.power
        measured = (((rounded - true) ** 2).mean(0) / signal).mean()
        assert 10 * np.log10(found / measured) == pytest.approx(0, abs=1)

    def test_alpha_is_one_where_each_output_reads_one_channel(self, tmp_path):
        body = "[a] t = Conv(image, w) [b] logits = Conv<group = 16>(t, v1)"
        source = networks.by_hand(tmp_path, body, {"w": W(16, 3, 1, 1), "v1": W(16, 1, 1, 1)})
        seen = seen_of(spread_values(3.0))

        found = correct.best(pairs(ir.load(source.path).graph)[0], {"t": seen})

        assert found.alpha == 1.0
        assert found.gain_db > 20
        alike = seen.high * np.exp2(found.exponents)
        assert alike.max() <= 2 * alike.min()
        assert abs(np.median(found.exponents)) <= 1, "the typical channel keeps its size"

    def test_channels_that_are_alike_gain_nothing(self, tmp_path):
        assert correct.best(self.pair(tmp_path, W(32, 16)), {"f": seen_of(spread_values(0.0))}).gain_db < 0.5

    def test_a_dead_channel_keeps_its_weights_and_does_not_disturb_the_others(self, tmp_path):
        values = spread_values(3.0)
        values[:, 3], values[:, 5] = 0, 1e-12

        found = correct.best(self.pair(tmp_path, W(32, 16)), {"f": seen_of(values)})

        assert found.exponents[[3, 5]].tolist() == [0, 0]
        assert np.ptp(found.exponents) >= 4
        assert np.isfinite(found.gain_db)

    def test_a_tensor_that_is_always_zero_is_left_alone(self, tmp_path):
        found = correct.best(self.pair(tmp_path, W(32, 16)), {"f": seen_of(np.zeros((4, 16)))})

        assert not found.exponents.any()
        assert found.gain_db == 0

    def test_it_does_not_depend_on_what_was_done_to_other_pairs(self, portable):
        pictures = networks.images(16, seed=1)

        def gains(model: ir.Model) -> list[float]:
            content = networks.made(root / f"{len(list(root.iterdir()))}") / "model.onnx"
            ir.save(model, content)
            found = pairs(ir.load(content).graph)
            seen = correct._observe(replace(portable("variety"), path=content), found, batches_of(pictures), lambda *_: None)
            return [correct.best(pair, seen).gain_db for pair in found]

        root = networks.made(portable("variety").folder.parent / "gains")
        model = ir.load(portable("variety").path)
        before = gains(ir.load(portable("variety").path))
        first = pairs(model.graph)[0]
        scale(model.graph, first, np.exp2(np.arange(first.channels) - 4.0))

        assert gains(model)[1:] == pytest.approx(before[1:], abs=1e-6)


class Separable(nn.Module):
    """Stem, depthwise, pointwise, head: the pairs that MobileNets are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = networks.conv(3, 16), networks.conv(16, 16, groups=16)
        self.pointwise, self.pool, self.head = networks.conv(16, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.pointwise(self.depthwise(self.stem(x)))), 1))


def rescaled(network: Separable, how: str) -> Separable:
    """The same function: each channel times a factor, the weights that read it divided by it."""
    random = np.random.default_rng(2)
    copied = Separable()
    copied.load_state_dict(network.state_dict())
    for block, reader in (
        (copied.stem, copied.depthwise[0]),
        (copied.depthwise, copied.pointwise[0]),
        (copied.pointwise, copied.head),
    ):
        channels = block[1].num_features
        factors = 10 ** random.uniform(-1.5, 1.5, channels) if how == "three decades" else np.ones(channels)
        if how == "an outlier":
            factors[random.integers(channels)] = 1000
        factors = torch.from_numpy(factors).float()
        with torch.no_grad():
            block[1].weight *= factors
            block[1].bias *= factors
            reader.weight /= (
                factors.reshape(-1, 1, 1, 1)
                if reader is copied.depthwise[0]
                else factors.reshape(1, -1, *[1] * (reader.weight.ndim - 2))
            )
    return copied.eval()


@pytest.fixture(scope="module")
def digits():
    """(inputs, labels) of the built-in set's parts, as (N, 3, 8, 8) arrays."""
    how = replace(networks.model("lenet5").preprocess, crop=(8, 8))
    parts = data.digits(0)
    return {
        name: (next(part.batches(how, len(part))), part.labels)
        for name, part in (("train", parts.train), ("calibration", parts.calibration), ("test", parts.test))
    }


@pytest.fixture(scope="module")
def trained(digits) -> Separable:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Separable()
        inputs, labels = (torch.from_numpy(np.array(part)) for part in digits["train"])
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(12):
            for batch in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(inputs[batch]), labels[batch]).backward()
                optimizer.step()
    torch.set_num_threads(threads)
    return network.eval()


@pytest.fixture(scope="module")
def hard(trained, digits, tmp_path_factory):
    """The trained network as it is, and rescaled in two ways: each as an exported artifact."""
    inputs, labels = digits["train"]
    root = tmp_path_factory.mktemp("hard")

    def make(how: str) -> Artifact:
        module = trained if how == "as trained" else rescaled(trained, how)
        model = networks.model(module, size=8)
        return export.onnx_model(model, inputs[:8], labels[:8], ExportTable(), networks.made(root / how.replace(" ", "-")))

    return {how: make(how) for how in ("as trained", "three decades", "an outlier")}


class TestInt8:
    def agreement(self, source: Artifact, runtime: str, digits, folder: Path) -> float:
        """The share of test images that INT8 with plain min/max decides as float does."""
        pictures, inputs = digits["calibration"][0], digits["test"][0]
        seen = quantize.calibrate(source, batches_of(pictures), networks.made(folder / "calibrate"), images=len(pictures))
        settings = QuantizeTable(method="minmax")
        made = quantize.quantize(source, seen, settings, runtime, networks.made(folder / "quantize"))
        mine, float_ = (answers_of(artifact.path, inputs).argmax(1) for artifact in (made, source))
        return float((mine == float_).mean())

    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
    @pytest.mark.parametrize("how", ["three decades", "an outlier"])
    def test_what_a_rescaling_ruined_is_as_good_as_before(self, hard, digits, tmp_path, how, runtime):
        before = self.agreement(hard["as trained"], runtime, digits, tmp_path / "before")
        ruined = self.agreement(hard[how], runtime, digits, tmp_path / "ruined")

        made = equalized(hard[how], tmp_path / "equalized", digits["calibration"][0])

        assert before > 0.97
        assert ruined < 0.8
        assert self.agreement(made, runtime, digits, tmp_path / "after") > before - 0.015

    @pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
    def test_a_network_that_was_fine_as_it_is_loses_nothing(self, hard, digits, tmp_path, runtime):
        made = equalized(hard["as trained"], tmp_path / "equalized", digits["calibration"][0])

        before = self.agreement(hard["as trained"], runtime, digits, tmp_path / "before")
        assert self.agreement(made, runtime, digits, tmp_path / "after") > before - 0.01

    def test_the_facts_say_what_was_equalized_how_and_for_what(self, hard, digits, tmp_path):
        made = equalized(hard["three decades"], tmp_path, digits["calibration"][0])

        first, second, third = made.facts["equalized"]
        assert (first["producers"], first["readers"]) == (["stem.0/Conv"], ["depthwise.0/Conv"])
        assert (second["readers"], third["readers"]) == (["pointwise.0/Conv"], ["head/Gemm"])
        assert all(0 < pair["alpha"] <= 1 and pair["gain_db"] > 10 for pair in made.facts["equalized"])
        assert json.dumps(made.facts)

    def test_the_float_answers_are_the_same_to_the_last_bit(self, hard, digits, tmp_path):
        made = equalized(hard["three decades"], tmp_path, digits["calibration"][0])

        inputs = digits["test"][0]
        assert made.path.read_bytes() != hard["three decades"].path.read_bytes()
        assert np.array_equal(answers_of(made.path, inputs), answers_of(hard["three decades"].path, inputs))
        assert np.array_equal(made.samples().expected["logits"], hard["three decades"].samples().expected["logits"])

    def test_an_equalized_network_has_nothing_left_to_equalize(self, hard, digits, tmp_path):
        once = equalized(hard["three decades"], tmp_path / "once", digits["calibration"][0])

        twice = equalized(once, tmp_path / "twice", digits["calibration"][0])

        assert twice.facts["equalized"] == []
        assert twice.path.read_bytes() == once.path.read_bytes()

    def test_how_much_has_to_be_gained_can_be_chosen(self, hard, digits, tmp_path):
        all_of_them = equalized(hard["an outlier"], tmp_path / "a", digits["calibration"][0], least_gain_db=0.0)
        none = equalized(hard["an outlier"], tmp_path / "b", digits["calibration"][0], least_gain_db=200.0)

        assert len(all_of_them.facts["equalized"]) == 3
        assert none.facts["equalized"] == []


class TestTheStage:
    def test_it_looks_at_64_images_and_no_more(self, portable, tmp_path):
        def endless(size: int):
            for index in range(1000):
                assert index * size < 64
                yield networks.images(size, seed=index)

        assert correct.equalize(portable("lenet5"), endless, networks.made(tmp_path)).facts["pairs"] == 4

    @pytest.mark.parametrize(("names", "last"), [(None, 64), ([f"{index}.jpg" for index in range(12)], 12)])
    def test_progress_ends_with_the_last_image_that_is_looked_at(self, tmp_path, names, last):
        fixed = networks.exported("variety", tmp_path / "fixed", batch=5)
        told: list[tuple[str, int, int]] = []

        pictures = networks.images(100 if names is None else 12)
        equalized(fixed, tmp_path / "made", pictures, names=names, progress=lambda *words: told.append(words))

        assert told[0] == ("equalize", 5, last)
        assert told[-1] == ("equalize", last, last)

    def test_a_network_with_a_fixed_batch_sees_the_same(self, portable, tmp_path):
        fixed = networks.exported("variety", tmp_path / "fixed", batch=5)
        pictures = networks.images(9, seed=1)

        def choices(source: Artifact) -> list[correct.Choice]:
            found = pairs(ir.load(source.path).graph)
            seen = correct._observe(source, found, batches_of(pictures), lambda *_: None)
            return [correct.best(pair, seen) for pair in found]

        for one, other in zip(choices(fixed), choices(portable("variety")), strict=True):
            assert one.gain_db == pytest.approx(other.gain_db, abs=1e-3)

    def test_a_network_with_little_to_gain_keeps_every_byte(self, portable, tmp_path):
        source = portable("residual")

        made = equalized(source, tmp_path)

        assert made.path.read_bytes() == source.path.read_bytes()
        assert (tmp_path / SAMPLES).read_bytes() == (source.folder / SAMPLES).read_bytes()
        assert (made.facts["pairs"], made.facts["equalized"]) == (4, [])

    def test_a_network_without_pairs_needs_no_images(self, tmp_path):
        source = networks.by_hand(tmp_path / "source", "[a] logits = Conv(image, w)", {"w": W(5, 3, 1, 1)})

        made = correct.equalize(source, lambda _: iter(()), networks.made(tmp_path / "made"))

        assert made.path.read_bytes() == source.path.read_bytes()
        assert made.facts["pairs"] == 0

    def test_without_an_image_nothing_can_be_said(self, portable, tmp_path):
        with pytest.raises(StageError, match="no image to equalize on"):
            correct.equalize(portable("lenet5"), lambda _: iter(()), networks.made(tmp_path))

    def test_an_image_that_is_not_finite_is_refused_by_name(self, portable, tmp_path):
        pictures = networks.images(2)
        pictures[1, 0, 0, 0] = np.nan

        with pytest.raises(DataError, match=r"\n  - b\.jpg"):
            equalized(portable("lenet5"), tmp_path, pictures, names=["a.jpg", "b.jpg"])

    def test_activations_that_are_not_finite_are_named(self, tmp_path):
        body = "[a] t = Conv(image, w) [b] logits = Conv(t, v1)"
        source = networks.by_hand(tmp_path / "source", body, {"w": np.full((4, 3, 1, 1), 3e38, np.float32), "v1": W(5, 4, 1, 1)})

        with pytest.raises(StageError, match="NaN or infinite") as refused:
            equalized(source, tmp_path)
        assert refused.value.problems == ("t",)

    def test_only_a_float_onnx_file_can_be_equalized(self, portable, tmp_path):
        made = networks.quantized(portable("lenet5"), "onnxruntime", tmp_path)

        with pytest.raises(UsageError, match="only an FP32 ONNX artifact can be equalized, not int8 onnx"):
            equalized(made, tmp_path)

    def test_a_result_that_answers_otherwise_is_thrown_away(self, hard, digits, tmp_path):
        source = hard["three decades"]
        samples = source.samples()
        other = networks.made(tmp_path / "other")
        (other / "model.onnx").write_bytes(source.path.read_bytes())
        replace(samples, expected={"logits": samples.expected["logits"] * np.float32(1.001)}).save(other / SAMPLES)

        with pytest.raises(StageError, match="does not answer like the original"):
            equalized(replace(source, path=other / "model.onnx"), tmp_path / "made", digits["calibration"][0])

    def test_a_recipe_may_do_without_it(self, network, photos, tmp_path):
        content = {
            "name": "tiny",
            "model": {"name": network},
            "data": {"calibrate": str(photos)},
            "quantize": {"equalize": False},
            "benchmark": {"enabled": False},
        }

        found = pipeline.run(recipes.parse(content, base=Path("/"), source="a test"), tmp_path / "run")

        assert "equalize" not in [stage["name"] for stage in found["stages"]]
        assert not (tmp_path / "run" / "equalize").exists()
