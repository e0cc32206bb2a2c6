"""TensorRT 10.3 to 11.4 on the first GPU: the engine is a serialized plan, beside it what it consists of.

This module runs on devices: standard library, numpy and tensorrt only, Python 3.10. The CUDA runtime is loaded by ctypes.
None of it has been run on TensorRT itself: docs/tensorrt.md says what was checked, and how.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from deploykit.artifact import Artifact, Format, Tensors, TensorSpec
from deploykit.errors import UsageError, printable
from deploykit.jsonable import JSON, to_json
from deploykit.machine import Machine
from deploykit.progress import Progress, silent
from deploykit.runtimes import KernelTime, Realised, cudart
from deploykit.runtimes.cudart import Cuda
from deploykit.runtimes.onnx_nodes import Node, layers_of, read_nodes
from deploykit.telemetry import board

try:
    import tensorrt as trt
except ImportError as error:
    # Both reasons at once: who installs the one only to read of the other has been sent round twice.
    also = cudart.why_not()
    raise ImportError(f"TensorRT's Python package does not load ({error}){'; and ' * bool(also)}{also}") from error

from deploykit.runtimes.tensorrt import builder, inspector, timing_cache
from deploykit.runtimes.tensorrt.builder import Options
from deploykit.runtimes.tensorrt.callbacks import Log
from deploykit.runtimes.tensorrt.compatibility import Hardware, Place, why_refused
from deploykit.runtimes.tensorrt.inspector import EngineLayer
from deploykit.runtimes.tensorrt.session import TensorRtSession

ENGINE = "engine.plan"
LAYERS = "layers.json"  # the engine inspector's words, written when the engine was built
_OLDEST = (10, 3)
_WORKSPACE_SHARE = 4  # a quarter of the free memory: on a board, builder, ONNX file and weights share it with everybody else


def build(
    model: Artifact, folder: Path, *, threads: int, options: Options | None = None, progress: Progress = silent
) -> Artifact:
    """Build an engine for this GPU into `folder`, load it once, and write down what it consists of.

    `threads` is the builder's. Without `options` it is built as the recipe asks that made the model; where that says nothing,
    with TensorRT's own defaults, for batches of 1 to 32 where the model has a dynamic one, and with this user's timing cache.
    """
    options = options or Options.of(model)
    cuda = cudart.load()
    device = cuda.device()
    workspace = options.workspace_bytes or cuda.free_bytes() // _WORKSPACE_SHARE
    cache = options.timing_cache and options.timing_cache / timing_cache.file_name(trt.__version__, device)
    log = Log()
    plan = builder.build(
        model.path,
        model.inputs,
        options,
        log,
        workspace_bytes=workspace,
        cache_file=cache,
        threads=threads,
        progress=progress,
    )
    (folder / ENGINE).write_bytes(plan.content)
    (folder / LAYERS).write_text(_inspected(plan.content, options, cuda, log))
    place = Place(platform.machine(), trt.__version__, device)
    return replace(
        model,
        path=folder / ENGINE,
        stage="build",
        format=Format.ENGINE,
        parents=(model.sha256,),
        settings=_settings(options, workspace, threads),
        tools={"tensorrt": trt.__version__},
        facts={
            "runtime": "tensorrt",
            "place": to_json(place),
            "board": _board(),
            "profile": to_json(plan.profile),
            **plan.facts,
        },
        machine=Machine.probe(),
    )


def load(engine: Artifact) -> TensorRtSession:
    """Open an engine. One that cannot run here is refused with the reasons (UsageError) before TensorRT sees it."""
    cuda = cudart.load()
    return _session(engine, cuda)


def open_graph(path: Path, inputs: Sequence[TensorSpec], options: Options) -> TensorRtSession:
    """Build the ONNX file at `path` for inputs of fixed shapes, and open it, for what it computes: float32 without TF32, no
    timing cache, no CUDA graph, and no engine is kept. All outputs of the file are outputs of the engine."""
    cuda, log = cudart.load(), Log()
    workspace = options.workspace_bytes or cuda.free_bytes() // _WORKSPACE_SHARE
    plan = builder.build(path, inputs, options, log, workspace_bytes=workspace, cache_file=None, tf32=False)
    host_code, core = options.version_compatible, options.dla_core
    return _opened(plan.content, cuda, log, graphs=False, host_code=host_code, dla_core=core)


def realised(engine: Artifact, model: Artifact) -> Realised:
    """What each Conv, Gemm and MatMul of `model` runs in, by the engine inspector when it was built; needs no GPU."""
    layers = inspector.read((engine.folder / LAYERS).read_text())
    return inspector.realised(layers, layers_of(model, read_nodes(model.path)), model)


def profile(engine: Artifact, model: Artifact, inputs: Tensors, *, queries: int) -> list[KernelTime]:
    """Median time of every layer of the engine over `queries` runs, after as many to warm up. No CUDA graph: it hides layers."""
    session = _session(engine, cudart.load(), graphs=False)
    try:
        session.feed(inputs)
        for _ in range(queries):
            session.execute()
        times = session.layer_times(queries)
        layers = {layer.name: layer for layer in inspector.read(session.layers())}
    finally:
        session.close()
    wanted = layers_of(model, read_nodes(model.path))
    return [_timed(name, ns, layers.get(name), wanted) for name, ns in times.items()]


def _timed(name: str, ns: float, layer: EngineLayer | None, wanted: Sequence[Node]) -> KernelTime:
    if layer is None:
        return KernelTime(name, "unknown", "", ns, 0)
    return KernelTime(name, layer.kind, inspector.source_of(layer, wanted), ns, layer.elements)


def why_stale(engine: Artifact) -> list[str]:
    """Every reason why an engine has to be built again on this machine; none when it loads. Neither the engine nor the GPU's
    memory is touched: what its manifest says is compared with what is here."""
    return _checked(engine, cudart.load())[0]


def gpu() -> JSON:
    """What an engine depends on of the GPU here; None where there is none."""
    if cudart.why_not():
        return None
    device = cudart.load().device()
    return [device.name, list(device.compute_capability), device.multiprocessors]


def why_not() -> str:
    """Why no engine can be built or run on this machine; empty when it can."""
    version = trt.__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        return (
            f"TensorRT {version} is installed, and deploykit needs 10.3 or later: older ones cannot take precision from the graph"
        )
    return cudart.why_not()


def _checked(engine: Artifact, cuda: Cuda) -> tuple[list[str], Place, Place]:
    """Why an engine does not load here, where it was built, and what is here."""
    settings = engine.settings
    here, built = Place(platform.machine(), trt.__version__, cuda.device()), _place(engine)
    hardware = cast(Hardware, settings.get("hardware", "this"))
    is_version_compatible = settings.get("version_compatible") is True
    return why_refused(built, here, version_compatible=is_version_compatible, hardware=hardware), built, here


def _session(engine: Artifact, cuda: Cuda, *, graphs: bool = True) -> TensorRtSession:
    settings = engine.settings
    is_version_compatible = settings.get("version_compatible") is True
    problems, built, here = _checked(engine, cuda)
    if problems:
        raise UsageError(
            f"cannot load {printable(engine.path)} on this machine",
            problems=problems,
            why=f"it was built for {built}; here: {here}",
            fix="build it here from the portable ONNX file",
        )
    core = settings.get("dla_core")
    return _opened(
        engine.path.read_bytes(),
        cuda,
        Log(),
        graphs=graphs,
        host_code=is_version_compatible,
        dla_core=core if isinstance(core, int) else None,
    )


def _opened(content: bytes, cuda: Cuda, log: Log, *, graphs: bool, host_code: bool, dla_core: int | None) -> TensorRtSession:
    with log.constructing("runtime"):
        runtime = trt.Runtime(log)
    if host_code:
        # A version-compatible plan holds code for the CPU: TensorRT runs it only when it is told to.
        runtime.engine_host_code_allowed = True
    if dla_core is not None:
        # Of the builder alone it has no effect: an engine runs on the core of its runtime, 0 by default (onnxruntime #26680).
        runtime.DLA_core = dla_core
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise log.failure("TensorRT does not load the engine", fix="build it again on this machine from the portable ONNX file")
    return TensorRtSession(engine, cuda, log, graphs=graphs)


def _inspected(content: bytes, options: Options, cuda: Cuda, log: Log) -> str:
    """What a new engine consists of; so one that does not load is found out when it is built."""
    session = _opened(content, cuda, log, graphs=False, host_code=options.version_compatible, dla_core=options.dla_core)
    try:
        text = session.layers()
        inspector.read(text)
        return text
    finally:
        session.close()


def _board() -> dict[str, JSON]:
    """What a Jetson is and at what it ran while tactics were timed; nothing on other machines. Not judged, but worth knowing."""
    if not board.is_jetson():
        return {}
    number, mode = board.current_mode()
    state = board.look()
    return {
        "model": board.model(),
        "l4t": board.l4t(),
        "power_mode": mode if number is None else f"{mode} ({number})",
        "gpu_hz": state.gpu_hz,
        "gpu_most_hz": state.gpu_most_hz,
    }


def _settings(options: Options, workspace_bytes: int, threads: int) -> dict[str, JSON]:
    asked = cast("dict[str, JSON]", to_json(options))
    del asked["timing_cache"]  # where it lies says nothing about the engine; the facts tell what became of it
    return {**asked, "workspace_bytes": workspace_bytes, "builder_threads": threads}


def _place(engine: Artifact) -> Place:
    try:
        return Place.from_json(cast(Mapping[str, Any], engine.facts["place"]))
    except (KeyError, TypeError, ValueError) as error:
        why = f"its manifest does not say where it was built ({type(error).__name__}: {error})"
        raise UsageError(f"cannot load {printable(engine.path)}", why=why, fix="build it with deploykit") from error
