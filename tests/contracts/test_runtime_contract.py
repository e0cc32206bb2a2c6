"""What every session promises, whatever runs behind it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fake_onnxruntime
import fake_torch_cuda
import networks
import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import World, installed
from guides import blocks, page

from deploykit import build, export, runtimes
from deploykit.artifact import Artifact
from deploykit.errors import UsageError
from deploykit.recipe import ExportTable
from deploykit.runtimes import Session, run


@pytest.fixture(scope="module")
def engines(portable, tmp_path_factory) -> Iterator[dict[str, Artifact]]:
    """One network for every runtime; those on a GPU are fakes, so what is held here is our sessions on top of them."""
    folder = tmp_path_factory.mktemp
    script = export.torchscript_model(
        networks.model("residual"), networks.images(8), None, ExportTable(formats=("torchscript",)), folder("torchscript")
    )
    cuda = FakeCuda()
    with (
        installed(World("10.3.0", cuda)),
        fake_onnxruntime.installed(fake_onnxruntime.World(cuda)),
        fake_torch_cuda.installed(fake_torch_cuda.World()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_CACHE_HOME", str(folder("caches")))
        registered_as_documented(patch, folder("documented"))
        names = ("onnxruntime", "openvino", "tensorrt", "plain", "onnxruntime_cuda")
        built = {name: build.build(portable("residual"), name, folder(name)) for name in names}
        cuda_script = build.build(script, "torchscript_cuda", folder("torchscript_cuda"))
        yield {**built, "torchscript": script, "torchscript_cuda": cuda_script}


def registered_as_documented(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The runtime of docs/runtimes.md and its line of the registry, as they stand on that page."""
    module, entry = blocks(page("runtimes"), "python")
    (folder / "plain_runtime.py").write_text(module)
    patch.syspath_prepend(folder)
    documented = eval(f"{{{entry}}}", {"Entry": runtimes.Entry})
    patch.setitem(runtimes.REGISTRY, "plain", replace(documented["plain"], module="plain_runtime"))


@pytest.fixture
def load(engines) -> Callable[[str], Session]:
    return lambda name: runtimes.get(name).load(engines[name])


@pytest.mark.parametrize(
    "name", ["onnxruntime", "openvino", "tensorrt", "torchscript", "plain", "onnxruntime_cuda", "torchscript_cuda"]
)
class TestEveryRuntime:
    def test_it_answers_like_pytorch(self, load, name):
        inputs = networks.images(4, seed=5)

        answer = run(load(name), {"image": inputs})["logits"]

        wanted = export.torch_logits(networks.model("residual"), inputs)
        assert np.abs(answer - wanted).max() <= 1e-5 * np.abs(wanted).max()

    def test_fetch_returns_a_copy_that_the_next_execute_does_not_change(self, load, name):
        session = load(name)
        first = run(session, {"image": networks.images(2, seed=1)})["logits"]
        kept = first.copy()

        run(session, {"image": networks.images(2, seed=2)})

        assert np.array_equal(first, kept)
        assert first.flags.writeable

    def test_feed_takes_a_copy_that_the_caller_may_overwrite(self, load, name):
        session, inputs = load(name), networks.images(2)
        wanted = run(session, {"image": inputs})["logits"]

        session.feed({"image": inputs})
        inputs[:] = 0
        session.execute()

        assert np.array_equal(session.fetch()["logits"], wanted)

    def test_what_was_fed_last_is_what_runs(self, load, name):
        session, first, last = load(name), {"image": networks.images(2, seed=1)}, {"image": networks.images(2, seed=2)}
        wanted = run(load(name), last)["logits"]

        session.feed(first)
        session.execute()
        session.feed(last)
        session.execute()

        assert np.array_equal(session.fetch()["logits"], wanted)

    def test_another_batch_size_may_follow_and_the_first_may_come_back(self, load, name):
        session, inputs = load(name), networks.images(5)
        wanted = run(session, {"image": inputs})["logits"]

        one = run(session, {"image": inputs[:1]})["logits"]
        again = run(session, {"image": inputs})["logits"]

        assert one.shape == (1, 5)
        assert one == pytest.approx(wanted[:1], rel=1e-5, abs=1e-6)
        assert np.array_equal(again, wanted)

    def test_the_same_input_gives_the_same_answer_bit_for_bit(self, load, name):
        session, inputs = load(name), {"image": networks.images(3)}

        assert run(session, inputs)["logits"].tobytes() == run(session, inputs)["logits"].tobytes()

    def test_execute_may_be_repeated_without_feeding_again(self, load, name):
        session = load(name)
        wanted = run(session, {"image": networks.images(2)})["logits"]

        session.execute()

        assert np.array_equal(session.fetch()["logits"], wanted)

    def test_all_that_is_wrong_with_an_array_is_said_at_once(self, load, name):
        wrong = networks.images(2).astype(np.float64)[:, :, ::2]

        with pytest.raises(UsageError) as refused:
            load(name).feed({"image": wrong})
        assert len(refused.value.problems) == 3
        for part in ("is float64, the model takes float32", "has shape [2, 3, 16, 32]", "is not contiguous"):
            assert part in str(refused.value)

    def test_a_missing_and_an_unknown_input_are_both_named(self, load, name):
        with pytest.raises(UsageError) as refused:
            load(name).feed({"picture": networks.images(1)})
        assert refused.value.problems == ("there is no input named 'picture'", "input 'image' is missing")

    def test_a_wrong_number_of_dimensions_is_refused(self, load, name):
        with pytest.raises(UsageError, match=r"has shape \[3, 32, 32\]"):
            load(name).feed({"image": networks.images(1)[0]})

    def test_the_byte_order_of_another_machine_is_refused(self, load, name):
        with pytest.raises(UsageError, match="byte order of another machine"):
            load(name).feed({"image": networks.images(1).astype(">f4")})

    def test_close_gives_the_model_back(self, load, name):
        def alive() -> int:
            gc.collect()
            kinds = ("InferenceSession", "CompiledModel", "InferRequest", "RecursiveScriptModule", "ReferenceEvaluator")
            return sum(type(thing).__name__ in kinds for thing in gc.get_objects())

        before = alive()
        session = load(name)
        run(session, {"image": networks.images(1)})
        assert alive() > before

        session.close()

        assert alive() == before


def test_the_documented_runtime_says_of_every_layer_that_it_does_not_run_in_int8(engines, portable):
    found = build.Engine.of("plain", portable("residual"), engines["plain"]).realised

    assert found is not None
    assert found.layers
    assert found.int8 == 0
