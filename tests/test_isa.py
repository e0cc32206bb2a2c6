"""INT8 for other CPUs than this one: the graphs, what is refused, and the proof by emulation (real qemu, real ONNX Runtime)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from deploykit import artifact, build, emulate, isa, recipe, runtimes
from deploykit.artifact import Artifact, TensorSpec
from deploykit.emulate import CPUS, Answered
from deploykit.errors import CapabilityError, RecipeError, StageError, UsageError
from deploykit.gate import Verdict
from deploykit.machine import Machine
from deploykit.quantize.ranges import Range, affine_int8, affine_uint8, weight_scales
from deploykit.runtimes import onnxruntime

few = settings(deadline=None, max_examples=100)
VNNI, AVX2, DOT_PRODUCT = ("avx2", "avx512_vnni"), ("avx2", "fma"), ("asimd", "asimddp")
SOURCE = TensorSpec("image", "float32", ("batch", 3, 8, 8))

emulated = pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="wants qemu: Debian package qemu-user")
on_x86 = pytest.mark.skipif(Machine.probe().arch != "x86_64", reason="wants an x86 CPU")
on_vnni = pytest.mark.skipif(not Machine.probe().has_int8_dot_product, reason="wants a CPU with an int8 dot product")


def published(graph: Artifact) -> Artifact:
    """With its manifest, as a finished stage leaves it."""
    return artifact.write_manifest(graph.folder, graph)


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Artifact:
    """A network whose weights are all positive: sums of products of 8 bits are as large as they get."""
    body = """
        [first] a = Conv<pads = [1, 1, 1, 1]>(image, w1)  [relu] b = Relu(a)
        [depth] c = Conv<pads = [1, 1, 1, 1], group = 8>(b, w2)  [last] d = Conv<pads = [1, 1, 1, 1]>(c, w3)
        [pool] e = GlobalAveragePool(d)  [flat] logits = Flatten(e)
    """
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (5, 8, 3, 3)}
    weights = {name: 1 + np.abs(networks.weights(*shape)) for name, shape in shapes.items()}
    return networks.by_hand(tmp_path_factory.mktemp("loud"), body, weights)


@pytest.fixture(scope="module")
def for_any(loud, tmp_path_factory) -> Artifact:
    return published(networks.quantized(loud, "onnxruntime", tmp_path_factory.mktemp("any"), cpu="any"))


@pytest.fixture(scope="module")
def with_8_bits(loud, tmp_path_factory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "cpu_features", lambda: VNNI)
        return published(networks.quantized(loud, "onnxruntime", tmp_path_factory.mktemp("this")))


@pytest.fixture(scope="module")
def for_arm64(loud, tmp_path_factory) -> Artifact:
    return published(networks.quantized(loud, "onnxruntime", tmp_path_factory.mktemp("arm64"), cpu="arm64"))


def stored(graph: Artifact) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in onnx.load(graph.path).graph.initializer}


def largest_weights(graph: Artifact) -> dict[str, int]:
    """The largest integer among the weights of each layer, by the layer's name."""
    suffix = "/weight/quantized"
    found = {name: values for name, values in stored(graph).items() if name.endswith(suffix)}
    return {name.removesuffix(suffix): int(np.abs(values.astype(int)).max()) for name, values in found.items()}


class TestRulesOfACpu:
    @pytest.mark.parametrize(
        ("cpu", "arch", "features", "activations", "bits"),
        [
            ("this", "x86_64", VNNI, "uint8", 8),
            ("this", "x86_64", ("avx_vnni",), "uint8", 8),
            ("this", "x86_64", AVX2, "uint8", 7),
            ("this", "x86_64", (), "uint8", 7),
            ("this", "aarch64", DOT_PRODUCT, "affine int8", 8),
            ("this", "aarch64", ("asimd",), "uint8", 8),
            ("any", "x86_64", VNNI, "uint8", 7),
            ("any", "aarch64", DOT_PRODUCT, "uint8", 7),
            ("arm64", "x86_64", VNNI, "affine int8", 8),
            ("arm64", "aarch64", ("asimd",), "affine int8", 8),
        ],
    )
    def test_onnx_runtime_gets_what_is_exact_there_and_fused(self, cpu, arch, features, activations, bits):
        found = runtimes.rules("onnxruntime", cpu, arch=arch, features=features)

        assert (found.activations, found.weight_bits) == (activations, bits)

    @pytest.mark.parametrize("cpu", ["this", "any", "arm64"])
    def test_a_gpu_has_the_same_for_all(self, cpu):
        assert runtimes.rules("tensorrt", cpu, arch="x86_64", features=()) == runtimes.REGISTRY["tensorrt"].rules

    def test_a_runtime_without_int8_has_none_for_any_cpu(self):
        with pytest.raises(UsageError, match="torchscript has no INT8"):
            runtimes.rules("torchscript", "any")

    def test_an_int8_graph_for_arm64_is_built_on_arm64_alone(self, monkeypatch):
        monkeypatch.setattr(runtimes.platform, "machine", lambda: "x86_64")
        assert (
            runtimes.why_not("onnxruntime", "arm64") == "the INT8 graph is for arm64 CPUs, and this one is x86_64: build it there"
        )
        assert runtimes.why_not("onnxruntime", "any") == ""
        assert "arm64" not in runtimes.why_not("tensorrt", "arm64")

        monkeypatch.setattr(runtimes.platform, "machine", lambda: "aarch64")
        assert runtimes.why_not("onnxruntime", "arm64") == ""


class TestWeights:
    @few
    @given(
        weights=arrays.arrays(np.float32, (4, 6), elements=st.floats(-1e6, 1e6, width=32)),
        bias=arrays.arrays(np.float32, 4, elements=st.floats(-1e6, 1e6, width=32)),
        bits=st.sampled_from([7, 8]),
    )
    def test_of_so_many_bits_fit_them_whatever_their_size(self, weights, bias, bits):
        scale = weight_scales(weights, 0, bias=bias, input_scale=0.1, bits=bits)

        integers = np.rint(weights.astype(np.float64) / scale[:, None])
        assert np.abs(integers).max() <= 2 ** (bits - 1) - 1
        # two products with the largest activation, in the 16 bits that an x86 CPU without VNNI adds them in
        assert bits == 8 or 2 * 255 * np.abs(integers).max() < 2**15

    def test_of_a_file_for_any_cpu_have_7_bits_and_use_them(self, portable, tmp_path):
        made = networks.quantized(portable("matmul_head"), "onnxruntime", tmp_path, cpu="any")

        assert set(largest_weights(made).values()) == {63}
        assert (made.facts["cpu"], made.facts["weight_bits"]) == ("any", 7)

    def test_of_depthwise_convolutions_keep_8_bits_because_no_kernel_of_theirs_saturates(self, for_any):
        assert largest_weights(for_any) == {"first": 63, "depth": 127, "last": 63}

    @on_x86
    @pytest.mark.parametrize(("features", "largest"), [(VNNI, 127), (AVX2, 63)])
    def test_of_a_file_for_this_cpu_have_the_bits_that_it_adds_up_exactly(self, loud, tmp_path, monkeypatch, features, largest):
        monkeypatch.setattr(runtimes, "cpu_features", lambda: features)

        made = networks.quantized(loud, "onnxruntime", tmp_path)

        assert largest_weights(made) == {"first": largest, "depth": 127, "last": largest}
        assert made.facts["cpu"] == "this"

    def test_of_7_bits_answer_like_float(self, for_any):
        samples = for_any.samples()

        errors = np.abs(samples.expected["logits"] - samples.reference["logits"])
        assert errors.max() < 0.02 * np.abs(samples.reference["logits"]).max()


class TestSignedActivations:
    @few
    @given(low=st.floats(-1e3, 0), high=st.floats(0, 1e3))
    def test_are_the_unsigned_ones_less_128(self, low, high):
        unsigned, signed = affine_uint8(Range(low, high)), affine_int8(Range(low, high))

        assert (signed.scale, signed.zero_point, signed.dtype) == (unsigned.scale, unsigned.zero_point - 128, "int8")

    def test_make_a_file_for_arm64_that_means_the_same_to_the_last_bit(self, for_arm64, with_8_bits):
        signed, unsigned = for_arm64.samples().expected["logits"], with_8_bits.samples().expected["logits"]

        assert np.array_equal(signed, unsigned)
        assert {stored(graph)["image/zero_point"].dtype.name for graph in (for_arm64, with_8_bits)} == {"int8", "uint8"}


class TestWhatIsAskedFor:
    def test_another_cpu_for_tensorrt_alone_is_a_contradiction_among_the_others(self):
        content = {
            "name": "x",
            "model": {"name": "resnet18"},
            "data": {"calibrate": "photos"},
            "quantize": {"cpu": "any", "percentile": 99.0},
            "build": {"runtimes": ["tensorrt"]},
        }

        with pytest.raises(RecipeError) as refused:
            recipe.parse(content, base=Path(), source="it")

        assert "quantize.cpu = 'any' means nothing for TensorRT, which runs on a GPU: leave it out" in refused.value.problems
        assert len(refused.value.problems) == 2

    def test_a_cpu_without_int8_means_nothing(self, deploykit, network):
        outcome = deploykit("export", network, "--to", "onnxruntime", "--cpu", "any")

        assert outcome.code == 2
        assert "--cpu any without --int8: a float graph is the same for every CPU" in outcome.err

    @on_x86
    def test_a_run_for_arm64_makes_the_graph_and_says_why_there_is_no_engine_of_it(self, deploykit, network, photos, tmp_path):
        words = ["export", network, "--to", "onnxruntime", "--int8", "--calibrate", photos, "--cpu", "arm64"]
        words += ["--set", "benchmark.enabled=false", "--output", tmp_path / "out"]

        required, made = deploykit(*words, "--engine", "require"), deploykit(*words, "--json")

        assert required.code == 4
        assert "the INT8 graph is for arm64 CPUs" in required.err
        found = json.loads(made.out)
        assert made.code == 0
        assert {engine["label"]: engine["built"] for engine in found["engines"]} == {
            "onnxruntime fp32": True,
            "onnxruntime int8": False,
        }
        assert "the INT8 graph is for arm64 CPUs" in next(e["why"] for e in found["engines"] if not e["built"])

    @on_x86
    def test_a_finished_graph_for_this_cpu_is_made_again_on_another(self, deploykit, network, photos, tmp_path, monkeypatch):
        words = ["export", network, "--to", "onnxruntime", "--int8", "--calibrate", photos, "--engine", "skip"]
        words += ["--set", "benchmark.enabled=false", "--output", tmp_path / "out", "--json"]

        def quantized(features: tuple[str, ...]) -> tuple[str, object]:
            monkeypatch.setattr(runtimes, "cpu_features", lambda: features)
            stages = {stage["name"]: stage["status"] for stage in json.loads(deploykit(*words).out)["stages"]}
            folder = tmp_path / "out" / "quantize-onnxruntime"
            return stages["quantize-onnxruntime"], artifact.read_artifact(folder).facts["weight_bits"]

        assert [quantized(VNNI), quantized(VNNI), quantized(AVX2)] == [("done", 8), ("skipped", 8), ("done", 7)]


class TestHowFarAnswersAreApart:
    logits = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]], np.float32)
    integers = np.array([[[0, 255]], [[7, 8]], [[9, 9]]], np.uint8)

    def apart(self, logits: np.ndarray | None = None, integers: np.ndarray | None = None) -> isa.Apart:
        actual = {"y": self.logits if logits is None else logits, "q": self.integers if integers is None else integers}
        return isa.apart(actual, {"y": self.logits, "q": self.integers}, "y", "q")

    def test_the_same_answers_are_not_apart(self):
        found = self.apart()

        assert (found, found.verdict) == (isa.Apart(3, 0, 0, 0, 0), Verdict.PASS)

    @pytest.mark.parametrize(("step", "verdict"), [(1, Verdict.PASS), (2, Verdict.FAIL)])
    def test_one_step_of_the_last_quantized_tensor_passes_and_two_do_not(self, step, verdict):
        integers, logits = self.integers.copy(), self.logits.copy()
        integers[1, 0, 0] -= step
        logits[1, 0] += 0.1

        found = self.apart(logits, integers)

        assert (found.differ, found.most_steps, found.changed_later) == (1, step, 0)
        assert found.verdict is verdict

    def test_unsigned_integers_do_not_wrap_around(self):
        integers = self.integers.copy()
        integers[0, 0] = (255, 0)

        assert self.apart(integers=integers).most_steps == 255

    def test_another_class_in_first_place_fails_however_near(self):
        logits, integers = self.logits.copy(), self.integers + np.uint8([[[0, 0]], [[1, 0]], [[0, 0]]])
        logits[1] = (1.0, 3.0)

        found = self.apart(logits, integers)

        assert (found.flips, found.most_steps, found.verdict) == (1, 1, Verdict.FAIL)

    def test_other_logits_from_the_same_integers_fail_but_for_float_rounding(self):
        rounded, other = self.logits + np.float32(1e-6), self.logits + np.float32(0.01)

        assert self.apart(rounded).verdict is Verdict.PASS
        assert (self.apart(other).changed_later, self.apart(other).verdict) == (3, Verdict.FAIL)

    def test_what_is_not_a_number_has_no_distance(self):
        with pytest.raises(StageError, match="NaN or infinite"):
            self.apart(self.logits * np.float32(np.nan))

    def test_the_last_quantized_activation_becomes_an_output_of_a_graph_that_is_else_the_same(self, for_any, tmp_path):
        path, name = isa.exposing(for_any.path, tmp_path / "exposed.onnx")

        before, after = onnx.load(for_any.path).graph, onnx.load(path).graph
        assert name == "d/quantized"
        assert [value.name for value in after.output] == ["logits", "d/quantized"]
        assert list(before.node) == list(after.node)

    def test_a_graph_that_quantizes_nothing_has_no_steps(self, loud, tmp_path):
        with pytest.raises(UsageError, match="quantizes no activation"):
            isa.exposing(loud.path, tmp_path / "exposed.onnx")


class TestWhatIsCompared:
    @pytest.fixture
    def answered(self, monkeypatch) -> list[str]:
        """Every CPU answers at once, each with an ONNX Runtime of its own version when it says so; returns who was asked."""
        asked: list[str] = []

        def answers(graph, source, images, cpu, *, arm_root=None):
            asked.append(cpu.name if cpu else "this machine")
            outputs = {"logits": np.zeros((len(images), 5)), "d/quantized": np.zeros((len(images), 5), np.int8)}
            return Answered(outputs, "1.0" if arm_root is None or cpu is None else arm_root.name)

        monkeypatch.setattr(emulate, "answers", answers)
        return asked

    def test_a_run_stands_for_its_int8_graph(self, for_any, tmp_path):
        shutil.copytree(for_any.folder, tmp_path / "run" / "quantize-onnxruntime")

        found = [isa.graph_at(tmp_path / "run"), isa.graph_at(for_any.folder), isa.graph_at(for_any.path)]

        assert {graph.sha256 for graph in found} == {published(for_any).sha256}

    def test_a_float_graph_is_refused(self, loud):
        published(loud)

        with pytest.raises(UsageError, match=r"is no INT8 graph for ONNX Runtime\n  why: it is a fp32 onnx of stage export"):
            isa.graph_at(loud.folder)

    def test_golden_samples_come_first_and_then_the_images_of_the_folder(self, for_any, photos, answered):
        alone, more = (isa.compare(for_any.path, ["haswell"], images=folder) for folder in (None, photos))

        assert (alone["compared"][0]["images"], more["compared"][0]["images"]) == (4, 4 + 12)
        assert answered == ["this machine", "haswell"] * 2

    def test_a_cpu_that_is_named_twice_is_emulated_once(self, for_any, answered):
        found = isa.compare(for_any.path, ["haswell", "nehalem", "haswell"])

        assert [row["isa"] for row in found["compared"]] == ["haswell", "nehalem"]
        assert found["exit_code"] == 0

    def test_unknown_cpus_are_refused_all_at_once_with_the_known_ones(self, for_any, answered):
        with pytest.raises(UsageError) as refused:
            isa.compare(for_any.path, ["pentium", "haswell", "i486"])

        assert [problem.partition(";")[0] for problem in refused.value.problems] == [
            "'pentium' is not known",
            "'i486' is not known",
        ]
        assert "haswell, nehalem, cortex-a72, cortex-a76" in refused.value.problems[0]
        assert answered == []

    @on_x86
    def test_a_graph_for_arm64_is_compared_among_arm64_cpus(self, for_arm64, answered):
        found = isa.compare(for_arm64.path, ["cortex-a76", "cortex-a72"])

        assert (found["against"], [row["isa"] for row in found["compared"]]) == ("cortex-a76", ["cortex-a72"])
        assert answered == ["cortex-a76", "cortex-a72"]

    @on_x86
    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            (["haswell"], "the graph is for arm64 CPUs, and haswell is none"),
            (["cortex-a76"], "the graph is for arm64 CPUs, and this machine is none: name two of them with --isa"),
        ],
    )
    def test_a_graph_for_arm64_is_not_compared_with_what_it_is_not_for(self, for_arm64, answered, names, problem):
        with pytest.raises(UsageError) as refused:
            isa.compare(for_arm64.path, names)

        assert problem in refused.value.problems

    @on_x86
    def test_a_cpu_whose_own_answers_saturate_is_nothing_to_compare_with(self, with_8_bits, for_any, answered, monkeypatch):
        monkeypatch.setattr(runtimes, "cpu_features", lambda: AVX2)

        with pytest.raises(UsageError, match="this CPU no int8 dot product: its own answers saturate"):
            isa.compare(with_8_bits.path, ["nehalem"])

        assert isa.compare(for_any.path, ["nehalem"])["exit_code"] == 0

    def test_another_version_of_onnx_runtime_is_not_another_cpu(self, for_any, answered):
        with pytest.raises(UsageError, match=r"other versions(.|\n)*cortex-a76: ONNX Runtime 1\.2"):
            isa.compare(for_any.path, ["cortex-a76"], arm_root=Path("1.2"))


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    """Puts a script called qemu-x86_64 on the PATH, and nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(emulate.platform, "machine", lambda: "x86_64")

    def put(script: str) -> None:
        tool = tmp_path / "qemu-x86_64"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    return put


class TestEmulation:
    def answers(self, cpu: str, **options: object) -> Answered:
        return emulate.answers(Path("model.onnx"), SOURCE, networks.images(1, 8), CPUS[cpu], **options)

    def test_without_qemu_the_package_that_is_missing_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(CapabilityError, match=r"no qemu-x86_64 on the PATH\n  try: install the Debian package qemu-user"):
            self.answers("haswell")

    def test_an_x86_cpu_is_emulated_on_x86_alone(self, qemu, monkeypatch):
        qemu("exit 0")
        monkeypatch.setattr(emulate.platform, "machine", lambda: "aarch64")

        with pytest.raises(CapabilityError, match="with this very Python, and this one is for aarch64"):
            self.answers("haswell")

    def test_a_process_that_dies_is_named_with_its_signal(self, qemu):
        qemu("kill -ILL $$")

        with pytest.raises(StageError, match=r"haswell, emulated: the process failed\n  why: it died of SIGILL"):
            self.answers("haswell")

    def test_a_process_that_fails_is_quoted(self, qemu):
        qemu("echo no such instruction >&2; exit 1")

        with pytest.raises(StageError, match="no such instruction"):
            self.answers("haswell")

    def test_a_process_that_takes_too_long_is_ended(self, qemu, monkeypatch):
        qemu("while :; do :; done")
        monkeypatch.setattr(emulate, "_LONGEST_S", 0.2)

        with pytest.raises(StageError, match="no answer within"):
            self.answers("haswell")

    def test_an_arm_cpu_wants_a_root_with_a_python_and_onnx_runtime(self, tmp_path, monkeypatch):
        monkeypatch.setattr(emulate.shutil, "which", lambda name: f"/usr/bin/{name}")

        with pytest.raises(CapabilityError, match="--arm-root"):
            self.answers("cortex-a76")
        with pytest.raises(UsageError, match="is no 64-bit ARM root"):
            self.answers("cortex-a76", arm_root=tmp_path)

    def test_an_arm_python_finds_the_roots_own_packages_first(self, tmp_path, monkeypatch):
        tool = tmp_path / "qemu-aarch64"
        tool.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@" >&2\nexit 1\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for made in ("root/opt/site/onnxruntime", "root/usr/bin/python3.11"):
            networks.made(tmp_path / made)

        with pytest.raises(StageError) as failed:
            self.answers("cortex-a72", arm_root=tmp_path / "root")

        root, ours = tmp_path / "root", Path(emulate.__file__).parents[1]
        assert failed.value.why == (
            f"{root}/opt/site:{ours} -L {root} -cpu cortex-a72 {root}/usr/bin/python3.11 -m deploykit.emulate"
        )

    def test_the_answers_are_those_of_an_engine(self, portable, tmp_path):
        graph = networks.quantized(portable("lenet5"), "onnxruntime", tmp_path / "int8", float_layers=("conv2/Conv",))
        engine = build.build(graph, "onnxruntime", networks.made(tmp_path / "engine"), threads=1)
        images = networks.images(8)

        found = emulate.answers(graph.path, graph.inputs[0], images, None)

        assert np.array_equal(found.outputs["logits"], runtimes.answers(onnxruntime.load(engine), engine, [images]))

    def test_a_graph_with_a_fixed_batch_gets_whole_batches(self, loud, tmp_path):
        file = onnx.load(loud.path)
        file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        onnx.save(file, tmp_path / "fixed.onnx")
        images = networks.images(4, 8)

        fixed = emulate.answers(tmp_path / "fixed.onnx", replace(SOURCE, shape=(3, 3, 8, 8)), images, None)

        free = emulate.answers(loud.path, SOURCE, images, None)
        assert fixed.outputs["logits"] == pytest.approx(free.outputs["logits"], rel=1e-5)


@emulated
@on_x86
class TestOnACpuWithoutVnni:
    def test_a_graph_for_any_cpu_answers_alike(self, deploykit, for_any, photos):
        outcome = deploykit("parity", for_any.folder, "--isa", "haswell", "--isa", "nehalem", "--data", photos, "--json")

        assert outcome.code == 0
        for row in json.loads(outcome.out)["compared"]:
            assert {key: row[key] for key in ("images", "differ", "most_steps", "changed_later", "flips")} == {
                "images": 16,
                "differ": 0,
                "most_steps": 0,
                "changed_later": 0,
                "flips": 0,
            }

    @on_vnni
    def test_a_graph_with_8_bits_does_not(self, deploykit, with_8_bits):
        outcome = deploykit("parity", with_8_bits.path, "--isa", "haswell")

        assert outcome.code == 3
        assert "FAIL" in outcome.out
        assert "x86 with AVX2 and without VNNI" in outcome.out


def test_the_help_names_every_cpu_that_can_be_emulated(deploykit):
    text = deploykit("parity", "--help").out

    assert all(name in text for name in CPUS)
