"""What a runtime is, which ones there are, and the quantization rules that each one states as a value.

The rules stand here and not in the runtimes' modules, because a laptop writes a TensorRT graph without TensorRT.
This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from deploykit.artifact import Artifact, Format, Samples, Tensors
from deploykit.errors import CapabilityError, UsageError
from deploykit.jsonable import JSON
from deploykit.machine import cpu_features, has_int8_dot_product, installed_version
from deploykit.progress import Progress, silent

Cpu = Literal["this", "any", "arm64"]
_ARM64 = ("aarch64", "arm64")  # what Linux and what macOS call it


LOADS = "loads here"  # what a preflight says of an engine that need not be built again
SLOW = "int8 is slower than float on this machine"  # why a layer is kept in float


class Session(Protocol):
    """One loaded model; feed, execute and fetch are apart so that what is being timed is visible."""

    def feed(self, inputs: Tensors) -> None:
        """Host to device. Raises UsageError on a missing, mis-typed, mis-shaped or non-contiguous array."""

    def execute(self) -> None:
        """Run once on what was fed; returns when the device is idle."""

    def fetch(self) -> Tensors:
        """Device to host: copies that a later execute does not change."""

    def close(self) -> None:
        """Give the memory and threads back."""


@dataclass(frozen=True)
class LayerPrecision:
    """What one layer of the exported graph really runs in: its kernel in the engine, and why if that is not int8."""

    name: str
    op: str
    precision: str
    kernel: str
    why: str = ""


@dataclass(frozen=True)
class Realised:
    """The precision of an engine as built: Conv, Gemm and MatMul layers one by one, and a census of all kernels.

    `kernels` counts by operator what runs on integers ("int8"), what on floats ("float"), and what stands between the
    two ("boundary": QuantizeLinear, DequantizeLinear).
    """

    layers: tuple[LayerPrecision, ...]
    kernels: Mapping[str, Mapping[str, int]]

    @property
    def int8(self) -> int:
        """How many of the layers run in int8."""
        return sum(layer.precision == "int8" for layer in self.layers)


@dataclass(frozen=True)
class KernelTime:
    """How long one kernel of an engine takes, in nanoseconds: the median over several runs.

    `source` is the node of the exported graph that it computes; empty for what the runtime put between the nodes.
    `elements` is how many numbers it writes.
    """

    name: str
    op: str
    source: str
    ns: float
    elements: int


class Runtime(Protocol):
    """What drives one library. A module satisfies this: its functions are these."""

    def build(self, model: Artifact, folder: Path, *, threads: int) -> Artifact:
        """Write an engine for this machine into `folder`; `threads` 0 means the cores this process may use."""

    def load(self, engine: Artifact) -> Session:
        """Open an engine that `build` made on a machine like this one. Raises UsageError, naming both, elsewhere."""

    def realised(self, engine: Artifact, model: Artifact) -> Realised:
        """What the layers of `model` became in `engine`."""


class ProfilingRuntime(Runtime, Protocol):
    """A runtime that can say what each kernel takes."""

    def profile(self, engine: Artifact, model: Artifact, inputs: Tensors, *, queries: int) -> list[KernelTime]:
        """Run `engine`, which was built from `model`, so often on `inputs`; its kernels in the order in which they run.

        A kernel is slower while it is timed, so a sum of these is no latency.
        """


class TellingRuntime(Protocol):
    """A runtime whose builds take minutes and say how far they are."""

    def build(self, model: Artifact, folder: Path, *, threads: int, progress: Progress = silent) -> Artifact:
        """As `Runtime.build`; Ctrl-C ends it at its next step."""


@dataclass(frozen=True)
class QdqRules:
    """How a runtime wants Q/DQ placed so that it fuses them into int8 kernels.

    - `activations`: "uint8" is affine (zero point anywhere), "affine int8" is the same less 128, "int8" is symmetric (zero point
      0, always explicit).
    - `bias`: "int32" is quantized with scale = activation scale * weight scale; "float" stays as it is.
    - `weights`: "int8" stores integers behind a DequantizeLinear; "float" keeps them in front of Q and DQ.
    - `outputs`: whether a layer's own output needs Q/DQ, or only the inputs of the layers that read it.
    - `add`: which inputs of a residual Add are quantized.
    - `share_concat_scale`: whether all inputs of a Concat and its output have one scale, so that it only copies.
    - `gates`: whether a map is multiplied by its gate, as in squeeze-and-excite, on integers.
    - `float_results`: whether an int8 Conv may give floats, so that where nothing reads integers its output needs no Q/DQ.
    - `weight_bits`: 8, or 7 where the CPU adds two products of uint8 and int8 into 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127
      saturates. Depthwise convolutions have 8 everywhere: their kernels widen first and saturate nowhere.
    - `group_channels`: a grouped convolution with fewer output channels in a group is written with several groups in one, zeros
      between them, until it has so many: the same integers from an integer product that computes so many columns at once.
    """

    activations: Literal["uint8", "affine int8", "int8"]
    bias: Literal["int32", "float"]
    weights: Literal["int8", "float"]
    outputs: bool
    add: Literal["both", "skip"]
    share_concat_scale: bool
    gates: bool = False
    float_results: bool = False
    weight_bits: Literal[7, 8] = 8
    group_channels: int = 1


@dataclass(frozen=True)
class Entry:
    """One registered runtime: its module, its package, what to do when it is missing, and its quantization rules (None: no
    INT8, and `no_int8` says why). `on_cpu` says whether INT8 depends on the CPU; `signed_on_arm64`, whether its kernels for ARM's
    int8 dot product multiply signed by signed and do less with signed activations; `profiles`, whether its module says what each
    kernel takes (`ProfilingRuntime`); `tells_progress`, whether its builds say how far they are (`TellingRuntime`); `threads`,
    what the settings of its engines call the number of threads (None: an engine has none); `builds`, whether it makes engines, or
    runs a portable file as it is; `runs_code`, whether loading one of its engines runs the program in it."""

    module: str
    package: str
    install: str
    rules: QdqRules | None
    on_cpu: bool = True
    signed_on_arm64: bool = False
    profiles: bool = False
    tells_progress: bool = False
    threads: str | None = "intra_op_num_threads"
    no_int8: str = "its format cannot hold Q/DQ"
    builds: bool = True
    runs_code: bool = False


REGISTRY: Mapping[str, Entry] = {
    # uint8 activations: on x86 signed ones with two readers, as at every residual, are not fused (docs/decisions.md). Its product
    # of integers there has 16 columns: a 3x3 convolution with 4 channels in a group took a third of the time with 16.
    "onnxruntime": Entry(
        "deploykit.runtimes.onnxruntime",
        "onnxruntime",
        "pip install 'deploykit[cpu]'",
        QdqRules(
            "uint8",
            bias="int32",
            weights="int8",
            outputs=True,
            add="both",
            share_concat_scale=True,
            gates=True,
            group_channels=16,
        ),
        signed_on_arm64=True,
        profiles=True,
    ),
    # Signed or unsigned activations, a float or int32 bias, and weights in integers or not become the same int8 kernels, as do
    # Concats with one scale or several. What costs time is Q/DQ that nothing needs: a Conv's result in front of a HardSwish
    # (MobileNetV3-large 2.6 instead of 2.0 ms), and a max pool in float because only its reader is quantized.
    "openvino": Entry(
        "deploykit.runtimes.openvino",
        "openvino",
        "pip install 'deploykit[openvino]'",
        QdqRules("uint8", bias="int32", weights="int8", outputs=True, add="both", share_concat_scale=False, float_results=True),
        threads="INFERENCE_NUM_THREADS",
    ),
    # Where there is no TensorRT, deploykit writes the graph and the reference answers, and the engine is built on the device.
    # TensorRT refuses uint8 data, asymmetric zero points and a DequantizeLinear on an int32 bias (onnx-tensorrt #850).
    # Its Conv + Add fusion takes the precision of the residual input, so only the skip branch carries Q/DQ.
    "tensorrt": Entry(
        "deploykit.runtimes.tensorrt",
        "tensorrt",
        "build it on a machine with an NVIDIA GPU and TensorRT 10.3 or later: JetPack has it, elsewhere pip install tensorrt",
        QdqRules("int8", bias="float", weights="float", outputs=False, add="skip", share_concat_scale=True),
        on_cpu=False,
        tells_progress=True,
        threads=None,
    ),
    "torchscript": Entry("deploykit.runtimes.torchscript", "torch", "pip install deploykit", None, builds=False),
    # On the first GPU. Between Q and DQ its CUDA kernels compute in float, so that an INT8 graph would be a slower float one.
    "onnxruntime_cuda": Entry(
        "deploykit.runtimes.onnxruntime_cuda",
        "onnxruntime",
        "on a machine with an NVIDIA GPU: pip uninstall onnxruntime, then pip install 'deploykit[gpu]'; the two packages "
        "overwrite each other's files",
        None,
        on_cpu=False,
        threads=None,
        no_int8="its CUDA kernels compute in float between Q and DQ",
    ),
    "torchscript_cuda": Entry(
        "deploykit.runtimes.torchscript_cuda",
        "torch",
        "on a machine with an NVIDIA GPU, install the build of PyTorch for its driver's CUDA (pytorch.org, Get Started)",
        None,
        on_cpu=False,
        threads=None,
        runs_code=True,
    ),
}


def rules(name: str, cpu: Cpu = "this", *, arch: str | None = None, features: Iterable[str] | None = None) -> QdqRules:
    """The quantization rules of a runtime for one kind of CPU; a runtime on a GPU has the same for all.

    "this" is the CPU with `arch` and `features`, by default the one that this process runs on. An x86 CPU without an int8
    dot product gets 7-bit weights, for with 8 its answers would be others than the graph's; so does "any". "arm64" is for
    CPUs with that dot product.

    Raises UsageError when the runtime has no INT8.
    """
    entry = REGISTRY[name]
    if entry.rules is None:
        raise UsageError(f"{name} has no INT8: {entry.no_int8}", fix="quantize for onnxruntime, openvino or tensorrt")
    if not entry.on_cpu:
        return entry.rules
    has_dot_product = has_int8_dot_product(cpu_features() if features is None else features)
    is_arm64 = cpu == "arm64" or (cpu == "this" and (platform.machine() if arch is None else arch) in _ARM64)
    # How ARM's kernels do grouped convolutions was not measured, so they stay as they are.
    found = replace(entry.rules, group_channels=1) if is_arm64 else entry.rules
    if cpu == "arm64" or (is_arm64 and has_dot_product):
        return replace(found, activations="affine int8") if entry.signed_on_arm64 else found
    # ARM kernels add two products into 16 bits only where these fit: 8-bit weights are exact there.
    if cpu == "any" or not (is_arm64 or has_dot_product):
        return replace(found, weight_bits=7)
    return found


def get(name: str) -> Runtime:
    """The module of a runtime in `REGISTRY`, imported. Raises CapabilityError with what to install where its library is not."""
    entry = REGISTRY[name]
    try:
        return cast(Runtime, importlib.import_module(entry.module))
    except ImportError as error:
        raise CapabilityError(f"{name} does not load on this machine", why=str(error), fix=entry.install) from error


def is_engine(artifact: Artifact) -> bool:
    """Whether it is an engine of a runtime that deploykit drives: a manifest from elsewhere may say anything."""
    entry = REGISTRY.get(str(artifact.facts.get("runtime")))
    return artifact.format is Format.ENGINE and entry is not None and entry.builds


def runs_code(artifact: Artifact) -> bool:
    """Whether loading it runs a program that is in it, whatever its manifest says: TorchScript, and an engine made of it."""
    entry = REGISTRY.get(str(artifact.facts.get("runtime")))
    is_program = artifact.format is Format.ENGINE and entry is not None and entry.runs_code
    return artifact.format is Format.TORCHSCRIPT or is_program


def threads_of(engine: Artifact) -> int | None:
    """How many threads an engine was built to use; None for what is no engine of a known runtime."""
    entry = REGISTRY.get(str(engine.facts.get("runtime")))
    threads = None if entry is None or entry.threads is None else engine.settings.get(entry.threads)
    return threads if isinstance(threads, int) else None


def why_not(name: str, cpu: Cpu = "this") -> str:
    """Why a runtime cannot be used on this machine, for a graph that was quantized for `cpu`; empty when it can."""
    if cpu == "arm64" and REGISTRY[name].on_cpu and platform.machine() not in _ARM64:
        return f"the INT8 graph is for arm64 CPUs, and this one is {platform.machine()}: build it there"
    try:
        module = get(name)
    except CapabilityError as error:
        return error.why
    # A runtime on a GPU may load on a machine that has none.
    found: Callable[[], str] | None = getattr(module, "why_not", None)
    return found() if found is not None else ""


def why_stale(engine: Artifact) -> list[str]:
    """Why an engine has to be built again before this machine can load it; none when it loads, as far as its manifest tells.

    Nothing of the engine is read, and no memory of a GPU taken. Raises UsageError when its manifest does not say where it was
    built.
    """
    name = str(engine.facts.get("runtime"))
    if why := why_not(name):
        return [f"no {name} here: {why}"]
    module = get(name)
    found: Callable[[Artifact], list[str]] | None = getattr(module, "why_stale", None)
    if found is not None:
        return found(engine)
    problems, built = [], engine.machine
    if built is not None and (built.arch, built.features) != (platform.machine(), cpu_features()):
        problems.append(f"it was built for {built.cpu} ({', '.join(built.features)}), and this CPU is another one")
    version = getattr(sys.modules[REGISTRY[name].package], "__version__", None)
    if version != engine.tools.get(name):
        problems.append(f"it was built by {name} {engine.tools.get(name)}, and {version} is here")
    return problems


def preflight(engine: Artifact) -> str:
    """Whether an engine loads on this machine, in words, by its manifest alone."""
    reasons = why_stale(engine)
    return f"rebuild needed because {'; and '.join(reasons)}" if reasons else LOADS


def place(name: str) -> JSON:
    """What an engine of a runtime depends on here beside the machine: the library's version, and the GPU that it would run on."""
    entry = REGISTRY[name]
    version = installed_version(entry.package)
    if version is not None and entry.on_cpu:
        return version
    try:
        module = get(name)
    except CapabilityError:
        return version
    # Packages of a GPU's or a board's maker may come without metadata, or under another name.
    version = version or getattr(sys.modules[entry.package], "__version__", None)
    found: Callable[[], JSON] | None = getattr(module, "gpu", None)
    return version if found is None else [version, found()]


def run(session: Session, inputs: Tensors) -> Tensors:
    """Feed, execute, fetch: arrays by name in, copies of the answers by name out. Raises what `Session.feed` raises."""
    session.feed(inputs)
    session.execute()
    return session.fetch()


def answers(session: Session, model: Artifact, batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The answers of a one-input, one-output `model` to all batches (n, C, H, W), in order: (images, classes).

    A model with a fixed batch gets its short last batch padded by repetition, and the padding's answers are dropped.
    """
    (source,), (result,) = model.inputs, model.outputs
    size = source.shape[0]
    found = []
    for batch in batches:
        found.append(run(session, {source.name: padded(batch, size)})[result.name][: len(batch)])
    return np.concatenate(found)


def padded(batch: NDArray[np.float32], size: int | str | None) -> NDArray[np.float32]:
    """The batch, its images repeated until there are `size` of them when that is a number."""
    return np.resize(batch, (size, *batch.shape[1:])) if isinstance(size, int) and len(batch) < size else batch


def pieces(model: Artifact, samples: Samples) -> list[NDArray[np.float32]]:
    """The golden inputs of a one-input model in batches it takes: all at once, or pieces of its fixed size."""
    inputs, size = samples.inputs[model.inputs[0].name], model.inputs[0].shape[0]
    step = size if isinstance(size, int) else len(inputs)
    return [inputs[start : start + step] for start in range(0, len(inputs), step)]


def check_inputs(inputs: Tensors, expected: Sequence[tuple[str, str, Sequence[int | str | None]]]) -> None:
    """Refuse what a runtime would mis-read: `expected` is (name, numpy dtype name, shape); text or None is any size.

    Raises UsageError with every problem.
    """
    problems = [f"there is no input named {name!r}" for name in inputs if name not in {item[0] for item in expected}]
    for name, dtype, shape in expected:
        if name not in inputs:
            problems.append(f"input {name!r} is missing")
            continue
        array = inputs[name]
        if array.dtype.name != dtype:
            problems.append(f"input {name!r} is {array.dtype.name}, the model takes {dtype}")
        elif not array.dtype.isnative:
            problems.append(f"input {name!r} has the byte order of another machine ({array.dtype.str})")
        if len(array.shape) != len(shape) or any(
            isinstance(want, int) and have != want for have, want in zip(array.shape, shape, strict=False)
        ):
            problems.append(f"input {name!r} has shape {list(array.shape)}, the model takes {list(shape)}")
        if not array.flags.c_contiguous:
            problems.append(f"input {name!r} is not contiguous (strides {array.strides}); copy it first")
    if problems:
        raise UsageError("the inputs do not fit the model", problems=problems)
