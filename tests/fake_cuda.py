"""A CUDA runtime in memory, for tests: one stream after the other, nothing done before it is waited for.

It is called as ctypes calls the real one, and as the real one it checks nothing for its caller's convenience: memory that was
not taken, a copy beyond its end, or a stream that is gone makes every later call fail. Work on a stream runs only when the
stream or an event is waited for, so a result that is read too early is not there.
"""

# ruff: noqa: N802  # the functions are called as CUDA calls them

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OUT_OF_MEMORY, ILLEGAL_ADDRESS, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, NO_DEVICE = 2, 700, 900, 901, 100
INVALID_VALUE, INVALID_HANDLE = 1, 400
_NAMES = {
    INVALID_VALUE: ("cudaErrorInvalidValue", "invalid argument"),
    OUT_OF_MEMORY: ("cudaErrorMemoryAllocation", "out of memory"),
    NO_DEVICE: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    INVALID_HANDLE: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    ILLEGAL_ADDRESS: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    CAPTURE_UNSUPPORTED: ("cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"),
    CAPTURE_INVALIDATED: ("cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"),
}
Work = Callable[[], None]


@dataclass
class Faults:
    """Which call is to fail, the `at`-th of all, whether all later ones of CUDA fail too, and what was called."""

    at: int | None = None
    code: int = ILLEGAL_ADDRESS
    lasts: bool = False
    called: list[str] = field(default_factory=list)

    def strikes(self, name: str) -> bool:
        """Note a call, and say whether it is the one."""
        self.called.append(name)
        return len(self.called) - 1 == self.at


@dataclass
class Stream:
    waiting: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    invalidated: bool = False


class FakeCuda:
    """The library as `ctypes.CDLL` gives it: functions by name, each of which returns a cudaError_t.

    `missing` are functions that this version of the library does not have.
    """

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        devices: int = 1,
        name: str = "Orin",
        capability: tuple[int, int] = (8, 7),
        memory_bytes: int = 1 << 30,
        missing: tuple[str, ...] = (),
    ) -> None:
        self.faults = faults or Faults()
        self.devices, self.name, self.capability, self.memory_bytes = devices, name, capability, memory_bytes
        self.alive: dict[int, tuple[str, Any]] = {}
        self.taken: Counter[str] = Counter()
        self.sticky = 0
        self.synchronized = 0
        self._clock, self._next = 0.0, 0x1000
        for call in dir(type(self)):
            if call.startswith("_cuda") and call[1:] not in missing:
                setattr(self, call[1:], self._function(call[1:]))

    def left(self) -> list[str]:
        """The kinds of what was taken and not given back."""
        return sorted(kind for kind, _ in self.alive.values())

    def stream(self, handle: int) -> Stream:
        kind, thing = self.alive[handle]
        assert kind == "stream"
        return thing

    def put(self, handle: int, work: Work) -> None:
        """Put work on a stream, as a kernel's launch does; in a capture it is only noted."""
        stream = self.stream(handle)
        (stream.waiting if stream.captured is None else stream.captured).append(work)

    def bytes_at(self, address: int, size: int) -> memoryview:
        """Device or pinned memory that was taken; raises IndexError outside of it."""
        for start, (kind, thing) in self.alive.items():
            if kind in ("memory", "pinned") and start <= address and address + size <= start + len(thing):
                return memoryview(thing).cast("B")[address - start : address - start + size]
        raise IndexError(f"{size} bytes at {address:#x}")

    def _function(self, name: str) -> Callable[..., Any]:
        method = getattr(type(self), f"_{name}")

        def function(*arguments: Any) -> Any:
            _check(name, function.argtypes, arguments)
            if name.startswith("cudaGetError") or name == "cudaGetLastError":
                return method(self, *arguments)
            fails = self.faults.strikes(name)
            if fails and self.faults.lasts:
                self.sticky = self.faults.code
            if fails and name == "cudaStreamEndCapture":
                self.stream(arguments[0].value).invalidated = True  # the capture has ended all the same
            if (fails or self.sticky) and not name.endswith(("Free", "FreeHost", "Destroy", "EndCapture")):
                return self.sticky or self.faults.code
            # What gives back gives back, also when it reports what went wrong before.
            code = method(self, *arguments)
            return self.faults.code if fails else self.sticky or code

        return function

    def _take(self, kind: str, pointer: Any, thing: Any, address: int | None = None) -> int:
        self._next += 0x10
        handle = self._next if address is None else address
        self.alive[handle] = (kind, thing)
        self.taken[kind] += 1
        pointer._obj.value = handle
        return 0

    def _give(self, kind: str, handle: Any) -> int:
        if handle.value in self.alive and self.alive[handle.value][0] == kind:
            del self.alive[handle.value]
            return 0
        return INVALID_HANDLE

    def _cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0 if self.devices else NO_DEVICE

    def _cudaSetDevice(self, device: Any) -> int:
        return 0 if device.value < self.devices else NO_DEVICE

    def _cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        major, minor = self.capability
        value._obj.value = {75: major, 76: minor, 16: 16, 13: 1_300_000}[attribute.value]
        return 0

    def _cudaGetDeviceProperties(self, properties: Any, device: Any) -> int:
        ctypes.memset(properties, 0xFF, ctypes.sizeof(properties))
        properties.value = self.name.encode()
        return 0

    def _cudaDeviceGetPCIBusId(self, text: Any, size: Any, device: Any) -> int:
        text.value = b"0000:65:00.0"
        return 0

    def _cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value = total._obj.value = self.memory_bytes
        return 0

    def _memory(self, kind: str, pointer: Any, size: int) -> int:
        used = sum(len(thing) for name, thing in self.alive.values() if name == kind)
        if size == 0 or used + size > self.memory_bytes:
            return OUT_OF_MEMORY
        memory = (ctypes.c_uint8 * size)()
        ctypes.memset(memory, 0xA5, size)  # not zeros, which would hide what was never written
        return self._take(kind, pointer, memory, ctypes.addressof(memory))

    def _cudaMalloc(self, pointer: Any, size: Any) -> int:
        return self._memory("memory", pointer, size.value)

    def _cudaFree(self, pointer: Any) -> int:
        return self._give("memory", pointer)

    def _cudaHostAlloc(self, pointer: Any, size: Any, flags: Any) -> int:
        return self._memory("pinned", pointer, size.value)

    def _cudaFreeHost(self, pointer: Any) -> int:
        return self._give("pinned", pointer)

    def _cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        def copy() -> None:
            target, origin = ("memory", "pinned") if kind.value == 1 else ("pinned", "memory")
            for address, wanted in ((to.value, target), (source.value, origin)):
                self._require(address, wanted)
            self.bytes_at(to.value, size.value)[:] = self.bytes_at(source.value, size.value)

        self.put(stream.value, copy)
        return 0

    def _require(self, address: int, kind: str) -> None:
        if not any(
            name == kind and start <= address < start + len(thing)
            for start, (name, thing) in self.alive.items()
            if name in ("memory", "pinned")
        ):
            raise IndexError(f"{address:#x} is not {kind}")

    def _cudaStreamCreateWithFlags(self, pointer: Any, flags: Any) -> int:
        return self._take("stream", pointer, Stream())

    def _cudaStreamDestroy(self, stream: Any) -> int:
        return self._give("stream", stream)

    def _cudaStreamSynchronize(self, stream: Any) -> int:
        return self._run(stream.value)

    def _run(self, handle: int) -> int:
        stream = self.stream(handle)
        if stream.captured is not None:
            stream.invalidated = True
            return CAPTURE_UNSUPPORTED
        self.synchronized += 1
        waiting, stream.waiting = stream.waiting, []
        for work in waiting:
            self._clock += 0.25
            try:
                work()
            except IndexError:
                self.sticky = ILLEGAL_ADDRESS
        return self.sticky

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> int:
        found = self.stream(stream.value)
        found.captured, found.invalidated = [], False
        return 0

    def _cudaStreamEndCapture(self, stream: Any, pointer: Any) -> int:
        found = self.stream(stream.value)
        captured, found.captured = found.captured, None
        if captured is None or found.invalidated:
            return CAPTURE_INVALIDATED
        return self._take("graph", pointer, captured)

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: Any, flags: Any) -> int:
        return self._take("executable graph", pointer, list(self.alive[graph.value][1]))

    def _cudaGraphDestroy(self, graph: Any) -> int:
        return self._give("graph", graph)

    def _cudaGraphExecDestroy(self, graph: Any) -> int:
        return self._give("executable graph", graph)

    def _cudaGraphLaunch(self, graph: Any, stream: Any) -> int:
        if graph.value not in self.alive:
            return INVALID_HANDLE
        for work in self.alive[graph.value][1]:
            self.put(stream.value, work)
        return 0

    def _cudaEventCreateWithFlags(self, pointer: Any, flags: Any) -> int:
        return self._take("event", pointer, {})

    def _cudaEventDestroy(self, event: Any) -> int:
        return self._give("event", event)

    def _cudaEventRecord(self, event: Any, stream: Any) -> int:
        noted = self.alive[event.value][1]
        noted["stream"], noted["time"] = stream.value, None

        def note() -> None:
            noted["time"] = self._clock

        self.put(stream.value, note)
        return 0

    def _cudaEventSynchronize(self, event: Any) -> int:
        return self._run(self.alive[event.value][1]["stream"])

    def _cudaEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        times = [self.alive[event.value][1].get("time") for event in (start, end)]
        if None in times:
            return INVALID_HANDLE
        milliseconds._obj.value = times[1] - times[0]
        return 0

    def _cudaGetErrorName(self, code: int) -> bytes:
        return _NAMES.get(code, ("cudaErrorUnknown", ""))[0].encode()

    def _cudaGetErrorString(self, code: int) -> bytes:
        return _NAMES.get(code, ("", "unknown error"))[1].encode()

    def _cudaGetLastError(self) -> int:
        return self.sticky


def _check(name: str, types: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    """As ctypes does, less what it would convert: every argument is of exactly the declared type, or a pointer to it."""
    if len(types) != len(arguments):
        raise TypeError(f"{name} takes {len(types)} arguments, not {len(arguments)}")
    for wanted, given in zip(types, arguments, strict=True):
        if name.startswith("cudaGetError"):
            continue  # a plain int for c_int
        if hasattr(given, "_obj"):
            is_right = issubclass(wanted, ctypes._Pointer) and isinstance(given._obj, wanted._type_)
        else:
            is_right = isinstance(given, wanted) or (wanted is ctypes.c_void_p and isinstance(given, ctypes.Array))
        if not is_right:
            raise TypeError(f"{name}: {given!r} is no {wanted.__name__}")
