"""Activations as outputs in ONNX Runtime's own layout: the same values to the last bit, in whatever order."""

from __future__ import annotations

import gc
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploykit import runtimes
from deploykit.quantize import place
from deploykit.quantize.expose import Exposed, expose
from deploykit.runtimes import onnxruntime


def wanted(model: Path) -> list[str]:
    """What calibration observes, without the network's input."""
    known = [entry.rules for entry in runtimes.REGISTRY.values() if entry.rules is not None]
    return [name for name in place.tensors(ir.load(model).graph, known) if name != "image"]


def as_rows_of_pixels(model: Path, tensors: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """The same tensors as ordinary outputs of the optimised graph."""
    graph = onnx.load(model)
    known = {value.name for value in graph.graph.output}
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    return runtimes.run(onnxruntime.reference(graph.SerializeToString(), threads=1, optimise=True), {"image": images})


def run(exposed: Exposed, images: np.ndarray) -> dict[str, np.ndarray]:
    answered = runtimes.run(exposed.session, {exposed.source: images})
    return {name: answered[output] for name, output in exposed.outputs.items()}


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_every_value_is_the_same_to_the_last_bit_and_there_is_no_other(portable, name):
    model, images = portable(name).path, networks.images(3, seed=1)
    tensors = wanted(model)

    found = run(expose(model, tensors, threads=1), images)

    for tensor, rows in as_rows_of_pixels(model, tensors, images).items():
        if tensor in found:
            assert found[tensor].size == rows.size
            for mine, other in zip(found[tensor], rows, strict=True):  # image by image, and with them the padded ones
                assert np.array_equal(np.sort(mine, axis=None), np.sort(other, axis=None))
    assert list(found) == tensors


def nodes(folder: Path, model: Path, tensors: list[str]) -> list[str]:
    """The operators of the optimised graph with `tensors` as outputs."""
    graph = onnx.load(model)
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
    onnxruntime.write_optimized(graph.SerializeToString(), folder / "graph.onnx")
    return [node.op_type for node in onnx.load(folder / "graph.onnx", load_external_data=False).graph.node]


def convolution(folder: Path, channels: int) -> Path:
    values = {"w": networks.weights(channels, 3, 3, 3), "v": networks.weights(8, channels, 1, 1)}
    return networks.by_hand(folder / "source", "[first] c = Conv(image, w)  [second] logits = Conv(c, v)", values).path


def test_a_tensor_whose_channels_fill_their_blocks_stays_in_blocks(tmp_path):
    model = convolution(tmp_path, 32)
    if "ReorderOutput" not in nodes(tmp_path, model, ["c"]):
        pytest.skip("a CPU on which ONNX Runtime convolves in blocks of channels")

    found = expose(model, ["c"], threads=1).outputs

    assert found["c"] != "c"


@pytest.mark.parametrize("channels", [3, 20, 24])
def test_zeros_that_only_fill_a_block_of_channels_are_not_seen(tmp_path, channels):
    exposed = expose(convolution(tmp_path, channels), ["c"], threads=1)

    assert run(exposed, networks.images(2, 8))["c"].shape == (2, channels, 6, 6)


def test_a_tensor_that_is_the_networks_answer_or_its_input_is_an_output_once(tmp_path):
    model = convolution(tmp_path, 16)
    images = networks.images(2, 8)

    exposed = expose(model, ["logits", "c", "logits"], threads=1)

    assert np.array_equal(run(exposed, images)["logits"], as_rows_of_pixels(model, [], images)["logits"])


def test_the_input_and_a_fixed_batch_are_known(portable, tmp_path):
    fixed = networks.exported("lenet5", tmp_path, batch=5)

    one, other = (expose(artifact.path, ["image"], threads=1) for artifact in (portable("lenet5"), fixed))

    assert (one.source, one.batch) == ("image", None)
    assert (other.source, other.batch) == ("image", 5)


def test_nothing_is_left_on_the_disk(portable, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    exposed = expose(portable("residual").path, wanted(portable("residual").path), threads=1)

    gc.collect()
    assert list(tmp_path.iterdir()) == []
    run(exposed, networks.images(2))


def test_buffers_for_another_thread_hold_answers_of_their_own(portable):
    exposed = expose(portable("residual").path, ["body.1/Relu"], threads=1)
    first, second = networks.images(2, seed=1), networks.images(2, seed=2)
    alone = run(exposed, first)

    other = exposed.session.another()
    exposed.session.feed({"image": first})
    other.feed({"image": second})
    exposed.session.execute()
    other.execute()

    output = exposed.outputs["body.1/Relu"]
    assert np.array_equal(exposed.session.fetch()[output], alone["body.1/Relu"])
    assert not np.array_equal(other.fetch()[output], alone["body.1/Relu"])
