"""An ONNX file -> a serialized engine (a plan), by calls that are the same in TensorRT 10.3 to 11.4.

Networks are strongly typed: precision is in the graph, and no flag here changes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import tensorrt as trt

from deploykit.artifact import Artifact, TensorSpec
from deploykit.errors import CapabilityError, StageError, UsageError, printable
from deploykit.jsonable import JSON
from deploykit.progress import Progress, silent
from deploykit.runtimes.tensorrt import timing_cache
from deploykit.runtimes.tensorrt.callbacks import Log, Monitor
from deploykit.runtimes.tensorrt.compatibility import Hardware

_Result = TypeVar("_Result")
FACT = "tensorrt"  # of a graph: what its recipe's table of that name says, which travels to a device with the graph
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # of each dynamic input: smallest, best, largest


@dataclass(frozen=True)
class Options:
    """How an engine is built; its precision is in the graph.

    batch: smallest, best and largest batch of a model with a dynamic one; other sizes are refused when they are fed.
    workspace_bytes: the most scratch memory a layer may use; None is a quarter of what is free, since boards share one memory.
    optimization_level: 0 builds fast, 5 tries the most tactics; 3 is TensorRT's default.
    timing_cache: the folder of the files with what was timed before; None uses none.
    dla_core: run on this core what can; what cannot goes to the GPU with `gpu_fallback`, and fails the build without.
    version_compatible: the engine runs on later TensorRT versions too. It holds code of its own, so load only trusted ones.
    hardware: on which other GPUs it runs, at some cost in speed.
    """

    batch: tuple[int, int, int] = (1, 1, 32)
    workspace_bytes: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    dla_core: int | None = None
    gpu_fallback: bool = True
    version_compatible: bool = False
    hardware: Hardware = "this"

    @classmethod
    def of(cls, model: Artifact) -> Options:
        """What the recipe asked for that made `model`; without one TensorRT's own defaults, with this user's timing cache.

        Raises UsageError when the manifest, which may be a stranger's, says something else.
        """
        asked = model.facts.get(FACT, {})
        try:
            return cls._read(cast(Mapping[str, Any], asked))
        except (TypeError, ValueError, AttributeError) as error:
            what = f"the manifest of {printable(model.folder)} has no options for TensorRT that can be used"
            raise UsageError(what, why=f"{type(error).__name__}: {error}") from error

    @classmethod
    def _read(cls, asked: Mapping[str, Any]) -> Options:
        def number(name: str) -> int | None:
            value = asked.get(name)
            return None if value is None else _whole(name, value)

        workspace, level, hardware = number("workspace_mib"), number("optimization_level"), asked.get("hardware", "this")
        if hardware not in get_args(Hardware):
            raise ValueError(f"hardware is {str(hardware)[:80]!r}")
        sizes = [_whole("batch", size) for size in asked.get("batch", cls.batch)]
        smallest, best, largest = sizes * 3 if len(sizes) == 1 else sizes
        return cls(
            batch=(smallest, best, largest),
            workspace_bytes=None if workspace is None else workspace << 20,
            optimization_level=cls.optimization_level if level is None else level,
            timing_cache=timing_cache.default_folder() if asked.get("timing_cache", True) is True else None,
            dla_core=number("dla_core"),
            gpu_fallback=asked.get("gpu_fallback", True) is True,
            version_compatible=asked.get("version_compatible") is True,
            hardware=hardware,
        )

    def __post_init__(self) -> None:
        smallest, best, largest = self.batch
        problems = []
        if not 1 <= smallest <= best <= largest:
            problems.append(f"batch {self.batch}: smallest, best and largest have to ascend from 1")
        if not 0 <= self.optimization_level <= 5:
            problems.append(f"optimization_level {self.optimization_level} is not between 0 and 5")
        if self.dla_core is not None and smallest != largest:
            problems.append(f"batch {self.batch}: a DLA core runs one size only; make the three equal")
        if problems:
            raise UsageError("TensorRT cannot build with these options", problems=problems)


def _whole(name: str, value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{name} is {str(value)[:80]!r}")
    return value


@dataclass(frozen=True)
class Plan:
    """A built engine: its bytes, its optimization profile, and what is worth knowing of the build."""

    content: bytes
    profile: Shapes
    facts: Mapping[str, JSON]


def build(
    path: Path,
    inputs: Sequence[TensorSpec],
    options: Options,
    log: Log,
    *,
    workspace_bytes: int,
    cache_file: Path | None,
    threads: int = 0,
    tf32: bool = True,
    progress: Progress = silent,
) -> Plan:
    """Build the ONNX file at `path`. Ctrl-C ends the build when TensorRT next asks, after a step that may take seconds.
    Without `tf32`, which TensorRT allows itself by default, products of float32 have all of their bits.

    Raises StageError with TensorRT's last ERROR lines when it fails, UsageError with all of the parser's errors when it does not
    read the file, CapabilityError when the machine has no such DLA core.
    """
    with log.constructing("builder"):
        builder = trt.Builder(log)
    if threads:
        builder.max_threads = threads
    network = _parsed(builder, path, log, for_dla=options.dla_core is not None)
    config = _configured(builder, options, workspace_bytes, log)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = {spec.name: _shapes(spec, options.batch) for spec in inputs if _is_dynamic(spec)}
    if profile:
        _add_profile(builder, config, profile, log)
    cache = None if cache_file is None else timing_cache.attach(config, cache_file, log)
    content = _serialized(builder, network, config, log, progress)
    facts: dict[str, JSON] = {"warnings": list(log.warnings())}
    if cache is not None:
        saved = timing_cache.save(config, cache, log)
        facts["timing_cache"] = {"path": printable(cache.path), "began": cache.began, "not_saved": saved}
    if options.dla_core is not None:
        facts["dla"] = _split(network, config, options.dla_core, log)
    return Plan(content, profile, facts)


def _parsed(builder: trt.Builder, path: Path, log: Log, *, for_dla: bool) -> trt.INetworkDefinition:
    """The network of a file; from the file and not its bytes, so that external weights are found beside it."""
    # Looked up by name: the numbers of these flags moved between 10 and 11, where every network is strongly typed.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = log.made("network", builder.create_network(flags))
    with log.constructing("ONNX parser"):
        parser = trt.OnnxParser(network, log)
    # On by default; version- and hardware-compatible engines need it.
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    # From 10.16 on: shapes and layers are changed where a DLA core wants others ("Strongly Typed Networks for DLA", 11.4.1).
    if for_dla and hasattr(trt.OnnxParserFlag, "ADJUST_FOR_DLA"):
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    if not parser.parse_from_file(str(path)):
        found = [_text(log.made("parser error", parser.get_error(index))) for index in range(parser.num_errors)]
        raise UsageError(
            f"TensorRT does not read {printable(path)}",
            problems=found or log.errors(),
            fix=f"deploykit inspect {printable(path)} --rules tensorrt",
        )
    return network


def _text(error: trt.ParserError) -> str:
    return f"{error.node_operator()} {printable(error.node_name())}: {error.desc()} ({error.code().name})"


def _is_dynamic(spec: TensorSpec) -> bool:
    return any(isinstance(size, str) for size in spec.shape)


def _shapes(spec: TensorSpec, batch: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, best and largest shape of an input whose first dimension, and no other, is dynamic."""
    rest = tuple(size for size in spec.shape[1:] if isinstance(size, int))
    if len(rest) + 1 != len(spec.shape):
        raise UsageError(
            f"input {spec.name!r} has shape {list(spec.shape)}: only the batch may be dynamic",
            fix="export it with a fixed height and width",
        )
    smallest, best, largest = ((size, *rest) for size in batch)
    return smallest, best, largest


def _add_profile(builder: trt.Builder, config: trt.IBuilderConfig, profile: Shapes, log: Log) -> None:
    made = log.made("optimization profile", builder.create_optimization_profile())
    for name, (smallest, best, largest) in profile.items():
        try:
            made.set_shape(name, smallest, best, largest)
        except (RuntimeError, ValueError) as error:
            raise log.failure(f"TensorRT refuses the shapes {smallest}, {best}, {largest} for input {name!r}") from error
    if config.add_optimization_profile(made) < 0:
        raise log.failure("TensorRT refuses the optimization profile")


def _configured(builder: trt.Builder, options: Options, workspace_bytes: int, log: Log) -> trt.IBuilderConfig:
    config = log.made("builder configuration", builder.create_builder_config())
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector tells names and no types
    _set_compatibility(config, options)
    if options.dla_core is not None:
        _use_dla(builder, config, options.dla_core, options.gpu_fallback)
    return config


def _set_compatibility(config: trt.IBuilderConfig, options: Options) -> None:
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    levels = trt.HardwareCompatibilityLevel
    if options.hardware == "ampere and newer":
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    elif options.hardware == "same compute capability":
        if not hasattr(levels, "SAME_COMPUTE_CAPABILITY"):
            raise CapabilityError(
                f"TensorRT {trt.__version__} cannot build for all GPUs of one compute capability",
                why="that came with TensorRT 10.9",
                fix='hardware = "ampere and newer", or build on each device',
            )
        config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY


def _use_dla(builder: trt.Builder, config: trt.IBuilderConfig, core: int, gpu_fallback: bool) -> None:
    cores = builder.num_DLA_cores
    if not 0 <= core < cores:
        raise CapabilityError(
            f"there is no DLA core {core} here",
            why=f"TensorRT {trt.__version__} finds {cores}. Xavier, Orin NX and AGX Orin have DLA cores; Orin Nano, Thor and "
            "other GPUs have none, and TensorRT 10.8 to 11.3 does not use them",
            fix="build for the GPU",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    if gpu_fallback:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _split(network: trt.INetworkDefinition, config: trt.IBuilderConfig, core: int, log: Log) -> dict[str, JSON]:
    """What runs on the DLA core and what fell back to the GPU, by the log; or, where it does not say, what could run there."""
    said = log.devices()
    if said["dla"] or said["gpu"]:
        return {"core": core, "source": "build log", "dla": list(said["dla"]), "gpu": list(said["gpu"])}
    layers = [log.made("layer", network.get_layer(index)) for index in range(network.num_layers)]
    able = {layer.name for layer in layers if config.can_run_on_DLA(layer)}
    names = [layer.name for layer in layers]
    on, off = [name for name in names if name in able], [name for name in names if name not in able]
    return {"core": core, "source": "can_run_on_DLA", "dla": list(on), "gpu": list(off)}


def _serialized(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, log: Log, progress: Progress
) -> bytes:
    cancelled = threading.Event()
    monitor = Monitor(progress, cancelled)
    config.progress_monitor = monitor
    plan = _interruptibly(lambda: builder.build_serialized_network(network, config), cancelled)
    if monitor.failed is not None:
        raise monitor.failed
    content = bytes(plan) if plan is not None else b""
    if not content:
        raise log.failure(
            "TensorRT could not build the engine", fix="on a small board: close other programs, or lower workspace_bytes"
        )
    return content


def _interruptibly(work: Callable[[], _Result], cancelled: threading.Event) -> _Result:
    """`work`, native code without the GIL, in a thread of its own, so that Ctrl-C reaches this one: it asks for the end of the
    work, which is waited for, and is raised then."""
    results: list[_Result] = []
    errors: list[Exception] = []
    finished, interrupted = threading.Event(), False

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, name="tensorrt build").start()
    while not finished.is_set():
        try:
            finished.wait()
        except KeyboardInterrupt:
            interrupted = True
            cancelled.set()
    if interrupted:
        raise KeyboardInterrupt
    if errors:
        raise StageError("TensorRT failed while it built the engine", why=str(errors[0])) from errors[0]
    return results[0]
