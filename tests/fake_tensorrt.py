"""A TensorRT in memory, for tests: the classes and signatures of one real version, with what they do executed by ONNX Runtime.

`module` makes it from tests/data/tensorrt_signatures.json: a member that this version does not have does not exist, and a call
with a wrong keyword, number or type of arguments raises TypeError as pybind11 does. Like TensorRT, it returns None or False where
something fails and tells the reason to the logger only.
"""

# ruff: noqa: N802  # the members are called as TensorRT calls them

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import trt_bindings
from fake_cuda import FakeCuda

from deploykit import runtimes
from deploykit.runtimes import cudart

_MAGIC, _CACHE = b"PLAN", b"TIMINGS"
_REFUSED = ("QLinearConv", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul")
_TYPES = {
    "float": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "bool": "BOOL",
}
_ELEMENTS = {1: "float", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


@dataclass
class World:
    """What surrounds a fake TensorRT: its version, the GPU and its runtime, and what of it is wrong.

    dla_cores: how many it finds. memory_needed: the workspace without which no tactic fits. crash: set when an exception left a
    callback, which ends a real process. on_parse changes what is built, as an error of TensorRT's own would. built: the timings
    that builds used and made.
    """

    version: str
    cuda: FakeCuda
    dla_cores: int = 0
    memory_needed: int = 0
    refuses_capture: bool = False
    on_step: Callable[[int], None] = lambda step: None
    on_parse: Callable[[onnx.ModelProto], None] = lambda model: None
    crash: BaseException | None = None
    flags: set[str] = field(default_factory=set)
    cleared: set[str] = field(default_factory=set)
    parser_flags: set[str] = field(default_factory=set)
    runs_on: int | None = None
    timed: int = 0

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def tag(self) -> str:
        """What plans and timing caches are tied to."""
        return json.dumps([self.version, self.cuda.name, self.cuda.capability])


def module(world: World) -> types.ModuleType:
    """The fake as a module `tensorrt`."""
    told = _recorded(world.version)
    made = types.ModuleType("tensorrt")
    made.__version__ = world.version  # type: ignore[attr-defined]
    kinds: dict[str, Any] = {}
    for name in sorted(told, key=lambda name: (len(told[name].get("", {}).get("bases", ())), "." not in name)):
        if name:
            kinds[name] = _enum(name, told) if told[name][""]["kind"] == "enum" else _class(name, told, kinds, world)
            setattr(made, name, kinds[name]) if "." not in name else None
    for name, kind in kinds.items():
        outer, dot, inner = name.rpartition(".")
        if dot:
            setattr(kinds[outer], inner, kind)
            for member, value in vars(kind).items():
                if isinstance(value, kind):
                    setattr(kinds[outer], member, value)
    world.kinds = kinds  # type: ignore[attr-defined]
    return made


_recorded = cache(trt_bindings.recorded)


def _enum(name: str, told: Mapping[str, Any]) -> type:
    """pybind11's enums are no Python enums: plain objects with a name, a value and an int."""
    space = {"__int__": lambda self: self.value, "__repr__": lambda self: f"<{name}.{self.name}: {self.value}>"}
    kind = type(name.rpartition(".")[2], (), space)
    for number, member in enumerate(key for key, value in told[name].items() if value["kind"] == "member"):
        value = kind()
        value.name, value.value = member, number
        setattr(kind, member, value)
    return kind


def _class(name: str, told: Mapping[str, Any], kinds: Mapping[str, Any], world: World) -> type:
    behaviour = BEHAVIOURS.get(name, type("Nothing", (), {}))
    bases = tuple(kinds[base] for base in told[name][""]["bases"][:1] if base in kinds)
    space: dict[str, Any] = {"__bytes__": lambda self: self._content} if told[name][""]["buffer"] else {}
    for member, value in told[name].items():
        if value["kind"] == "property":
            space[member] = _property(name, member, value, behaviour, kinds, world)
        elif value["kind"] == "method" and member != "__init__":
            space[member] = _method(name, member, value, behaviour, told, kinds, world)
    signatures = told[name].get("__init__", {}).get("signatures")
    space["__init__"] = _constructor(name, signatures, behaviour, kinds, world)
    for private, value in vars(behaviour).items():
        if private.startswith("_") and not private.startswith("__"):
            space[private] = value

    def refuse(self: Any, attribute: str, value: Any) -> None:
        if type(self) is kind and not attribute.startswith("_") and attribute not in space:
            raise AttributeError(f"{name!r} object has no attribute {attribute!r}")
        object.__setattr__(self, attribute, value)

    kind = type(name, bases, space)
    kind.__setattr__ = refuse  # type: ignore[assignment]
    return kind


def _constructor(name: str, signatures: Any, behaviour: type, kinds: Mapping[str, Any], world: World) -> Callable[..., None]:
    def construct(self: Any, *arguments: Any, **keywords: Any) -> None:
        self._world, self._values, self._constructed = world, {}, True
        if not signatures:
            raise TypeError(f"{name}: No constructor defined!")
        given = _matched(f"{name}()", signatures, arguments, keywords, kinds)
        if name in ("Builder", "OnnxParser", "Runtime"):
            logger = next(value for value in given if isinstance(value, kinds["ILogger"]))
            if world.cuda.faults.strikes(f"{name}()"):
                _say(logger, "ERROR", f"fault in {name}")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger
        start = behaviour.__dict__.get("start")
        if start is not None:
            start(self, *given)

    return construct


def _method(
    name: str, member: str, value: Any, behaviour: type, told: Mapping[str, Any], kinds: Mapping[str, Any], world: World
) -> Callable[..., Any]:
    signatures = value["signatures"]

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = _matched(f"{name}.{member}", signatures, arguments, keywords, kinds)
        does = behaviour.__dict__.get(member)
        if does is None:
            raise AssertionError(f"the fake has no {name}.{member}")
        failure = _failure(name, member, signatures[0]["returns"], told)
        if failure is not None and world.cuda.faults.strikes(f"{name}.{member}"):
            _say(self._logger, "ERROR", f"fault in {name}.{member}")
            return failure()
        return does(self, *given)

    return call


def _failure(name: str, member: str, returns: str, told: Mapping[str, Any]) -> Callable[[], Any] | None:
    """How TensorRT answers when a call fails; None for what cannot."""
    if name in ("ILogger", "IProfiler", "IProgressMonitor"):
        return None
    if (name, member) == ("IExecutionContext", "infer_shapes"):
        return lambda: _raise(RuntimeError("infer_shapes error code: -1"))
    if (name, member) == ("IOptimizationProfile", "set_shape"):
        return lambda: _raise(ValueError("the shapes are inconsistent"))
    if trt_bindings.is_made(returns, told) or member == "get_engine_information":
        return lambda: None
    answers: dict[str, Any] = {"bool": False, "int": -1}
    return (lambda: answers[returns]) if returns in answers else None


def _raise(error: Exception) -> None:
    raise error


def _property(name: str, member: str, value: Any, behaviour: type, kinds: Mapping[str, Any], world: World) -> property:
    def get(self: Any) -> Any:
        computed = behaviour.__dict__.get(member)
        return computed(self) if computed is not None else self._values[member]

    def put(self: Any, given: Any) -> None:
        if given is not None and not _fits(given, value["type"], kinds):
            raise TypeError(f"{name}.{member} is {value['type']}, not {type(given).__name__}")
        self._values[member] = given

    return property(get, put if value["set"] else None)


def _matched(
    call: str, signatures: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any], kinds: Mapping[str, Any]
) -> list[Any]:
    """The arguments in the order of the first signature that takes them."""
    for signature in signatures:
        takes = signature["takes"]
        left, given = dict(keywords), list(arguments)
        if len(given) > len(takes):
            continue
        for name, _, has_default in takes[len(given) :]:
            if name in left and not name.startswith("arg"):
                given.append(left.pop(name))
            elif not has_default:
                break
        complete = len(given) >= sum(not has_default for _, _, has_default in takes)
        if not left and complete and all(_fits(value, kind, kinds) for value, (_, kind, _) in zip(given, takes, strict=False)):
            return given
    raise TypeError(f"{call}(): incompatible function arguments {arguments} {dict(keywords)}; supported: {signatures}")


def _fits(value: Any, kind: str, kinds: Mapping[str, Any]) -> bool:
    """Whether pybind11 would take it."""
    if kind in kinds and kind != "Dims":
        return isinstance(value, kinds[kind]) and (
            kinds[kind].__init__ is type(value).__init__ or getattr(value, "_constructed", False)
        )
    if "Dims" in kind or "Sequence" in kind or "List" in kind or "Tuple" in kind:
        return isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value)
    plain = {"str": str, "bytes": bytes, "bool": (bool, np.bool_), "float": (int, float)}
    if kind in plain:
        return isinstance(value, plain[kind])  # type: ignore[arg-type]
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind.lower().endswith("buffer"):
        return isinstance(value, (bytes, bytearray, memoryview))
    return True


def _say(logger: Any, severity: str, message: str) -> None:
    logger.log(getattr(type(logger), severity), message)


def _new(maker: Any, kind: str, /, **private: Any) -> Any:
    """An object that only TensorRT makes."""
    world = maker._world
    made = object.__new__(world.kinds[kind])
    made._world, made._values, made._logger, made._constructed = world, {}, maker._logger, True
    for name, value in private.items():
        setattr(made, f"_{name}", value)
    return made


class _ILogger:
    def log(self, severity: Any, message: str) -> None:
        raise RuntimeError("Tried to call pure virtual function ILogger::log")


class _Builder:
    def num_DLA_cores(self) -> int:
        return self._world.dla_cores  # type: ignore[attr-defined]

    def create_network(self, flags: int = 0) -> Any:
        kinds = self._world.kinds["NetworkDefinitionCreationFlag"]  # type: ignore[attr-defined]
        return _new(self, "INetworkDefinition", typed=bool(flags >> int(kinds.STRONGLY_TYPED) & 1), model=None)

    def create_builder_config(self) -> Any:
        return _new(self, "IBuilderConfig", flags=set(), profiles=[], limits={}, cache=None)

    def create_optimization_profile(self) -> Any:
        return _new(self, "IOptimizationProfile", shapes={})

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        why = _why_not_built(network, config)
        if why or not _phases(config, self._world):  # type: ignore[attr-defined]
            _say(self._logger, "ERROR", why or "IBuilder::buildSerializedNetwork: build was cancelled")  # type: ignore[attr-defined]
            return None
        world, dla = self._world, config._values.get("default_device_type")  # type: ignore[attr-defined]
        world.flags = set(config._flags)
        if dla is not None and dla.name == "DLA":
            for index, node in enumerate(network._model.graph.node):
                device = "[DlaLayer]" if node.op_type == "Conv" else "[GpuLayer]"
                _say(self._logger, "INFO", f"{device} {node.op_type}: {node.name or index}")  # type: ignore[attr-defined]
        known = json.loads(config._cache._content) if config._cache is not None and config._cache._content else {}
        for node in network._model.graph.node:
            if node.name not in known:
                world.timed += 1
                known[node.name] = 0.1
        if config._cache is not None:
            config._cache._content = json.dumps(known)
        return _new(self, "IHostMemory", content=_plan(world, network, config))


def _why_not_built(network: Any, config: Any) -> str:
    world = network._world
    if network._model is None:
        return "Network must have at least one output"
    if not network._typed and world.major < 11:
        return "the test wants strongly typed networks"
    limit = next((value for kind, value in config._limits.items() if kind.name == "WORKSPACE"), 1 << 40)
    if limit < world.memory_needed:
        return f"Error Code 10: Internal Error (Could not find any implementation for node {network._model.graph.node[0].name}.)"
    dynamic = [name for name, shape in _inputs(network._model).items() if -1 in shape]
    if dynamic and not config._profiles:
        return "Network has dynamic or shape inputs, but no optimization profile has been defined."
    for name in dynamic:
        if name not in config._profiles[0]._shapes:
            return f"input {name} has no shape in the profile"
    flags = {flag.name for flag in config._flags}
    device = config._values.get("default_device_type")
    falls_back = any(node.op_type != "Conv" for node in network._model.graph.node)
    if device is not None and device.name == "DLA" and falls_back and "GPU_FALLBACK" not in flags:
        return "Layer is not supported by DLA, and GPU fallback is not enabled"
    return ""


def _phases(config: Any, world: World) -> bool:
    """Tell the monitor of nested phases, from another thread; whether it let the build go on."""
    monitor = config._values.get("progress_monitor")
    if monitor is None:
        return True
    going: list[bool] = [True]

    def tell() -> None:
        try:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Timing tactics", "Building Engine", 3)
            monitor.phase_start("one tactic", "Timing tactics", 100)
            for step in range(3):
                world.on_step(step)
                if not monitor.step_complete("Timing tactics", step):
                    going[0] = False
                    break
            monitor.phase_finish("one tactic")
            monitor.phase_finish("Timing tactics")
            monitor.phase_finish("Building Engine")
        except BaseException as error:
            world.crash = error

    teller = threading.Thread(target=tell)
    teller.start()
    teller.join()
    return going[0]


def _plan(world: World, network: Any, config: Any) -> bytes:
    flags = {flag.name for flag in config._flags}
    level = config._values.get("hardware_compatibility_level")
    header = {
        "tag": world.tag(),
        "version": world.version,
        "capability": list(world.cuda.capability),
        "flags": sorted(flags),
        "hardware": level.name if level is not None else "NONE",
        "detailed": getattr(config._values.get("profiling_verbosity"), "name", "") == "DETAILED",
        "profile": config._profiles[0]._shapes if config._profiles else {},
    }
    body = json.dumps(header).encode()
    content = len(body).to_bytes(4, "little") + body + network._model.SerializeToString()
    return _MAGIC + hashlib.sha256(content).digest() + content


class _IHostMemory:
    def nbytes(self) -> int:
        return len(self._content)  # type: ignore[attr-defined]


class _INetworkDefinition:
    def num_layers(self) -> int:
        return len(self._model.graph.node)  # type: ignore[attr-defined]

    def get_layer(self, index: int) -> Any:
        layer = _new(self, "ILayer", op=self._model.graph.node[index].op_type)  # type: ignore[attr-defined]
        layer._values["name"] = self._model.graph.node[index].name  # type: ignore[attr-defined]
        return layer


class _IBuilderConfig:
    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._limits[pool] = size  # type: ignore[attr-defined]

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)  # type: ignore[attr-defined]

    def clear_flag(self, flag: Any) -> None:
        self._world.cleared.add(flag.name)  # type: ignore[attr-defined]

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)  # type: ignore[attr-defined]
        return len(self._profiles) - 1  # type: ignore[attr-defined]

    def can_run_on_DLA(self, layer: Any) -> bool:
        return bool(layer._op == "Conv")

    def create_timing_cache(self, content: Any) -> Any:
        content = bytes(content)
        if not content:
            return _new(self, "ITimingCache", tag=self._world.tag(), content="")  # type: ignore[attr-defined]
        magic, digest, rest = content[: len(_CACHE)], content[len(_CACHE) : len(_CACHE) + 32], content[len(_CACHE) + 32 :]
        if magic != _CACHE or hashlib.sha256(rest).digest() != digest:
            _say(self._logger, "ERROR", "the timing cache is damaged")  # type: ignore[attr-defined]
            return None
        tag, _, known = rest.decode().partition("\n")
        return _new(self, "ITimingCache", tag=tag, content=known)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._tag != self._world.tag() and not ignore_mismatch:  # type: ignore[attr-defined]
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class _ITimingCache:
    def serialize(self) -> Any:
        rest = f"{self._tag}\n{self._content}".encode()  # type: ignore[attr-defined]
        return _new(self, "IHostMemory", content=_CACHE + hashlib.sha256(rest).digest() + rest)


class _IOptimizationProfile:
    def set_shape(self, name: str, smallest: Any, best: Any, largest: Any) -> None:
        if not all(0 < low <= middle <= high for low, middle, high in zip(smallest, best, largest, strict=True)):
            raise ValueError("The shape values are not ascending")
        self._shapes[name] = [list(smallest), list(best), list(largest)]  # type: ignore[attr-defined]


class _OnnxParser:
    def start(self, network: Any, logger: Any) -> None:
        self._network, self._found, self._flags = network, [], set()

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)
        self._world.parser_flags.add(flag.name)  # type: ignore[attr-defined]

    def num_errors(self) -> int:
        return len(self._found)

    def get_error(self, index: int) -> Any:
        name, op, text = self._found[index]
        return _new(self, "ParserError", name=name, op=op, text=text)

    def parse_from_file(self, path: str) -> bool:
        try:
            model = onnx.load(path)
            onnx.checker.check_model(model)
        except Exception as error:
            self._found = [("", "", f"Failed to parse the ONNX model: {type(error).__name__}")]
            return False
        self._network._world.on_parse(model)
        self._found = [
            (node.name, node.op_type, "No importer registered for op") for node in model.graph.node if node.op_type in _REFUSED
        ]
        self._network._model = model
        return not self._found


class _ParserError:
    def node_name(self) -> str:
        return self._name  # type: ignore[attr-defined]

    def node_operator(self) -> str:
        return self._op  # type: ignore[attr-defined]

    def desc(self) -> str:
        return self._text  # type: ignore[attr-defined]

    def code(self) -> Any:
        return self._world.kinds["ErrorCode"].UNSUPPORTED_NODE  # type: ignore[attr-defined]


class _Runtime:
    def deserialize_cuda_engine(self, plan: Any) -> Any:
        content = bytes(plan)
        world = self._world  # type: ignore[attr-defined]
        world.runs_on = self._values.get("DLA_core")  # type: ignore[attr-defined]
        start = len(_MAGIC) + 32
        if content[: len(_MAGIC)] != _MAGIC or hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
            return self._refuse("Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.")
        size = int.from_bytes(content[start : start + 4], "little")
        header = json.loads(content[start + 4 : start + 4 + size])
        if "VERSION_COMPATIBLE" in header["flags"] and self._values.get("engine_host_code_allowed") is not True:  # type: ignore[attr-defined]
            return self._refuse("Cannot deserialize engine with lean runtime: host code is not allowed")
        if "VERSION_COMPATIBLE" not in header["flags"] and header["version"] != world.version:
            return self._refuse(
                f"The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{header['version']} got {world.version}, please rebuild."
            )
        if header["hardware"] == "NONE" and header["capability"] != list(world.cuda.capability):
            there, here = (".".join(map(str, pair)) for pair in (header["capability"], world.cuda.capability))
            return self._refuse(
                f"The engine plan file is generated on an incompatible device, expecting compute {here} got compute "
                f"{there}, please rebuild."
            )
        model = onnx.load_from_string(content[start + 4 + size :])
        return _new(self, "ICudaEngine", header=header, model=model, profile=header["profile"])

    def _refuse(self, why: str) -> None:
        _say(self._logger, "ERROR", f"IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error ({why})")  # type: ignore[attr-defined]


def _session(model: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def _inputs(model: onnx.ModelProto) -> dict[str, list[int]]:
    constants = {item.name for item in model.graph.initializer}
    return {item.name: _shape(item) for item in model.graph.input if item.name not in constants}


def _shape(item: Any) -> list[int]:
    return [size.dim_value if size.HasField("dim_value") else -1 for size in item.type.tensor_type.shape.dim]


class _ICudaEngine:
    def _tensors(self) -> dict[str, Any]:
        graph = self._model.graph  # type: ignore[attr-defined]
        inputs = _inputs(self._model)  # type: ignore[attr-defined]
        return {item.name: item for item in (*graph.input, *graph.output) if item.name in inputs or item in list(graph.output)}

    def num_io_tensors(self) -> int:
        return len(self._tensors())

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors())[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._world.kinds["TensorIOMode"]  # type: ignore[attr-defined]
        return modes.INPUT if name in _inputs(self._model) else modes.OUTPUT  # type: ignore[attr-defined]

    def get_tensor_dtype(self, name: str) -> Any:
        element = _ELEMENTS[self._tensors()[name].type.tensor_type.elem_type]
        return getattr(self._world.kinds["DataType"], _TYPES.get(element, "BF16"))  # type: ignore[attr-defined]

    def get_tensor_shape(self, name: str) -> Any:
        return tuple(_shape(self._tensors()[name]))

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return [tuple(shape) for shape in self._profile[name]]  # type: ignore[attr-defined]

    def create_execution_context(self, *strategy: Any) -> Any:
        session = _session(self._model.SerializeToString())  # type: ignore[attr-defined]
        return _new(self, "IExecutionContext", owner=self, session=session, shapes={}, addresses={}, ready=None, reports=0)

    def create_engine_inspector(self) -> Any:
        return _new(self, "EngineInspector", owner=self)


class _IExecutionContext:
    def set_input_shape(self, name: str, shape: Any) -> bool:
        engine = self._owner  # type: ignore[attr-defined]
        limits = engine._profile.get(name)
        if limits and not all(low <= size <= high for low, size, high in zip(limits[0], shape, limits[2], strict=True)):
            _say(self._logger, "ERROR", "IExecutionContext::setInputShape: satisfyProfile failed")  # type: ignore[attr-defined]
            return False
        self._shapes[name] = tuple(shape)  # type: ignore[attr-defined]
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in _inputs(self._owner._model) if name not in self._shapes]  # type: ignore[attr-defined]

    def get_tensor_shape(self, name: str) -> Any:
        if name in self._shapes:  # type: ignore[attr-defined]
            return self._shapes[name]  # type: ignore[attr-defined]
        batch = next(iter(self._shapes.values()), (-1,))[0]  # type: ignore[attr-defined]
        return tuple(batch if size < 0 else size for size in self._owner.get_tensor_shape(name))  # type: ignore[attr-defined]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address  # type: ignore[attr-defined]
        return name in self._owner._tensors()  # type: ignore[attr-defined]

    def execute_async_v3(self, stream: int) -> bool:
        world, shapes = self._world, dict(self._shapes)  # type: ignore[attr-defined]
        captured = world.cuda.stream(stream).captured is not None
        profiler = self._values.get("profiler")  # type: ignore[attr-defined]
        why = ""
        if set(self._addresses) != set(self._owner._tensors()):  # type: ignore[attr-defined]
            why = "an address is not set"
        elif captured and (self._ready != shapes or profiler is not None or world.refuses_capture):  # type: ignore[attr-defined]
            world.cuda.stream(stream).invalidated = True
            why = "the engine cannot be captured now"
        if why:
            _say(self._logger, "ERROR", f"IExecutionContext::enqueueV3: {why}")  # type: ignore[attr-defined]
            return False
        self._ready = shapes
        world.cuda.put(stream, lambda: self._compute(shapes))
        if profiler is not None:
            self._reports = 1
        return True

    def _compute(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        cuda, feeds = self._world.cuda, {}  # type: ignore[attr-defined]
        for item in self._session.get_inputs():  # type: ignore[attr-defined]
            dtype = np.dtype("float32" if item.type == "tensor(float)" else item.type[7:-1])
            size = int(np.prod(shapes[item.name])) * dtype.itemsize
            memory = cuda.bytes_at(self._addresses[item.name], size)  # type: ignore[attr-defined]
            feeds[item.name] = np.frombuffer(memory, dtype).reshape(shapes[item.name])
        names = [item.name for item in self._session.get_outputs()]  # type: ignore[attr-defined]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):  # type: ignore[attr-defined]
            content = np.ascontiguousarray(value).tobytes()
            cuda.bytes_at(self._addresses[name], len(content))[:] = content  # type: ignore[attr-defined]

    def report_to_profiler(self) -> bool:
        profiler = self._values.get("profiler")  # type: ignore[attr-defined]
        if profiler is None or not self._reports:
            return False
        for layer in _layers(self._owner):  # type: ignore[attr-defined]
            profiler.report_layer_time(layer["Name"], 0.125)
        self._reports = 0
        return True


class _EngineInspector:
    def get_engine_information(self, form: Any) -> str:
        engine = self._owner  # type: ignore[attr-defined]
        layers = _layers(engine)
        if not engine._header["detailed"]:
            return json.dumps({"Layers": [layer["Name"] for layer in layers], "Bindings": []})
        names = list(engine._tensors())
        if engine._world.major >= 11:
            return json.dumps({"Layers": layers, "I/O Tensors": [{"Name": name} for name in names]})
        return json.dumps({"Layers": layers, "Bindings": names})


def _layers(engine: Any) -> list[dict[str, Any]]:
    """One layer for each node that computes; int8 where what it takes comes from a DequantizeLinear."""
    integers = {name for node in engine._model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    constants = {item.name for item in engine._model.graph.initializer}
    found = []
    for node in engine._model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant"):
            continue

        def tensor(name: str, type_: str) -> dict[str, Any]:
            apart = {"Format": "Row major linear", "Datatype": type_}
            joint = {"Format/Datatype": f"Row major linear {type_} format"}
            return {"Name": name, "Location": "Device", "Dimensions": [1, 8], **(apart if engine._world.major >= 11 else joint)}

        taken = [tensor(name, "Int8" if name in integers else "Float") for name in node.input if name not in constants]
        metadata = f"[ONNX Layer: {node.name}]\x1e"
        given = [tensor(name, "Float") for name in node.output]
        found.append({"Name": node.name, "LayerType": node.op_type, "Inputs": taken, "Outputs": given, "Metadata": metadata})
    return found


BEHAVIOURS: Mapping[str, type] = {
    "ILogger": _ILogger,
    "Builder": _Builder,
    "IBuilderConfig": _IBuilderConfig,
    "INetworkDefinition": _INetworkDefinition,
    "IOptimizationProfile": _IOptimizationProfile,
    "IHostMemory": _IHostMemory,
    "ITimingCache": _ITimingCache,
    "OnnxParser": _OnnxParser,
    "ParserError": _ParserError,
    "Runtime": _Runtime,
    "ICudaEngine": _ICudaEngine,
    "IExecutionContext": _IExecutionContext,
    "EngineInspector": _EngineInspector,
}


@contextmanager
def installed(world: World) -> Iterator[types.ModuleType]:
    """deploykit's TensorRT runtime, imported with this fake in TensorRT's place and on this fake's GPU."""
    name = "deploykit.runtimes.tensorrt"
    before = {key: value for key, value in sys.modules.items() if key == "tensorrt" or key.startswith(name)}
    load = cudart.load
    for key in before:
        del sys.modules[key]
    sys.modules["tensorrt"] = module(world)
    cudart.load = lambda: cudart.Cuda(world.cuda)  # the GPU may be changed while it is installed
    try:
        yield importlib.import_module(name)
    finally:
        cudart.load = load
        for key in [key for key in sys.modules if key == "tensorrt" or key.startswith(name)]:
            del sys.modules[key]
        sys.modules.update(before)
        vars(runtimes).pop("tensorrt", None)
