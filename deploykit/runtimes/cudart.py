"""The part of the CUDA runtime that a session needs, by ctypes: device memory, pinned memory, streams, events, graphs.

What is taken is a context manager, so an `ExitStack` gives everything back, in reverse order, whatever fails in between.
Names and types of the functions are those of cuda_runtime_api.h; all of them are alike in CUDA 12 and 13.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import CapabilityError, StageError

_POINTER = POINTER(c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (POINTER(c_int),),
    "cudaSetDevice": (c_int,),
    "cudaDeviceGetPCIBusId": (c_void_p, c_int, c_int),
    "cudaDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cudaGetDeviceProperties": (c_void_p, c_int),
    "cudaMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
    "cudaMalloc": (_POINTER, c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (_POINTER, c_size_t, c_uint),
    "cudaFreeHost": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (_POINTER, c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, _POINTER),
    "cudaGraphInstantiateWithFlags": (_POINTER, c_void_p, c_ulonglong),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphExecDestroy": (c_void_p,),
    "cudaEventCreateWithFlags": (_POINTER, c_uint),
    "cudaEventDestroy": (c_void_p,),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventSynchronize": (c_void_p,),
    "cudaEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cudaGetLastError": (),
}
_TEXTS = ("cudaGetErrorName", "cudaGetErrorString")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
# Not the legacy default stream, which nothing can be captured on, and not synchronized with it either.
_NON_BLOCKING = 1  # cudaStreamNonBlocking
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what other threads of the process do cannot spoil a capture
_MULTIPROCESSORS, _CLOCK_KHZ, _MAJOR, _MINOR = 16, 13, 75, 76  # cudaDeviceAttr
# sizeof(cudaDeviceProp) is about 1 kB and differs between versions; it begins with `char name[256]` in all of them.
_PROPERTIES_BYTES, _NAME_BYTES, _BUS_ID_BYTES = 8192, 256, 64
_MEMORY_ALLOCATION, _DRIVER_TOO_OLD = 2, 35  # cudaErrorMemoryAllocation, cudaErrorInsufficientDriver
_FREQUENCIES = Path("/sys/class/devfreq")
_TEGRA_GPUS = ("gpu", "ga10b", "gv11b", "gp10b", "gm20b")


class CudaError(StageError):
    """A CUDA call that failed; `code` is its cudaError_t."""

    def __init__(self, call: str, code: int, said: str) -> None:
        fix = "use a smaller batch, or end what else uses this GPU's memory" if code == _MEMORY_ALLOCATION else ""
        super().__init__(f"the CUDA call {call} failed", why=f"{said} ({code})", fix=fix)
        self.code = code


@dataclass(frozen=True)
class Device:
    """One GPU, as far as an engine depends on it. `clock_khz` is the highest clock of the current power mode."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_khz: int


class Cuda:
    """A loaded CUDA runtime library, every call of which is checked. Raises CudaError in the library's words."""

    def __init__(self, library: Any) -> None:
        missing = [name for name in (*_SIGNATURES, *_TEXTS) if not hasattr(library, name)]
        if missing:
            raise CapabilityError(
                "this CUDA runtime is too old", why=f"it has no {', '.join(missing)}", fix="install CUDA 12 or 13"
            )
        # Without these, ctypes would cut a pointer to the 32 bits of a C int.
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, c_int
        for name in _TEXTS:
            function = getattr(library, name)
            function.argtypes, function.restype = (c_int,), c_char_p
        self._library = library

    def device_count(self) -> int:
        """How many GPUs this process can use."""
        count = c_int()
        self._call("cudaGetDeviceCount", byref(count))
        return count.value

    def device(self, frequencies: Path = _FREQUENCIES) -> Device:
        """The first GPU, which this thread uses from now on. Jetsons tell the clock of their power mode in `frequencies`."""
        self._call("cudaSetDevice", c_int(0))
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, c_int(0))
        name = properties.raw[:_NAME_BYTES].partition(b"\0")[0].decode(errors="replace")
        capability = self._attribute(_MAJOR), self._attribute(_MINOR)
        clock = _tegra_clock_khz(frequencies) or self._attribute(_CLOCK_KHZ)
        return Device(name, capability, self._attribute(_MULTIPROCESSORS), clock)

    def bus_id(self) -> str:
        """Where the first GPU is on the PCI bus, such as 0000:65:00.0; other libraries count GPUs in another order."""
        text = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._call("cudaDeviceGetPCIBusId", text, c_int(_BUS_ID_BYTES), c_int(0))
        return text.value.decode(errors="replace")

    def free_bytes(self) -> int:
        """How much memory of the GPU nobody uses; on a Jetson that is memory of the whole machine."""
        free, total = c_size_t(), c_size_t()
        self._call("cudaMemGetInfo", byref(free), byref(total))
        return free.value

    @contextmanager
    def memory(self, size_bytes: int) -> Iterator[int]:
        """The address of device memory; at least one byte, since CUDA answers 0 with a null pointer."""
        with self._taken("cudaMalloc", "cudaFree", c_size_t(max(1, size_bytes))) as address:
            yield address

    @contextmanager
    def pinned(self, size_bytes: int) -> Iterator[NDArray[np.uint8]]:
        """Page-locked host memory, which the GPU reads and writes without a detour."""
        with self._taken("cudaHostAlloc", "cudaFreeHost", c_size_t(max(1, size_bytes)), c_uint(0)) as address:
            yield np.ctypeslib.as_array((ctypes.c_uint8 * max(1, size_bytes)).from_address(address))

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A stream of its own; what is put on it runs in order."""
        with self._taken("cudaStreamCreateWithFlags", "cudaStreamDestroy", c_uint(_NON_BLOCKING)) as stream:
            yield stream

    @contextmanager
    def event(self) -> Iterator[int]:
        """A moment on a stream, with its time."""
        with self._taken("cudaEventCreateWithFlags", "cudaEventDestroy", c_uint(0)) as event:
            yield event

    def to_device(self, address: int, host: NDArray[np.uint8], stream: int) -> None:
        """Copy all of `host`, pinned memory, to the device, when the stream comes to it."""
        self._call(
            "cudaMemcpyAsync",
            c_void_p(address),
            c_void_p(host.ctypes.data),
            c_size_t(host.nbytes),
            c_int(_TO_DEVICE),
            c_void_p(stream),
        )

    def to_host(self, host: NDArray[np.uint8], address: int, stream: int) -> None:
        """Fill `host`, pinned memory, from the device, when the stream comes to it."""
        self._call(
            "cudaMemcpyAsync",
            c_void_p(host.ctypes.data),
            c_void_p(address),
            c_size_t(host.nbytes),
            c_int(_TO_HOST),
            c_void_p(stream),
        )

    def synchronize(self, stream: int) -> None:
        """Wait until all is done that was put on the stream. Raises what failed there."""
        self._call("cudaStreamSynchronize", c_void_p(stream))

    def record(self, event: int, stream: int) -> None:
        """Note the time when the stream comes to it."""
        self._call("cudaEventRecord", c_void_p(event), c_void_p(stream))

    def elapsed_ns(self, start: int, end: int) -> int:
        """Nanoseconds between two recorded events, after waiting for the second; CUDA resolves about half a microsecond."""
        self._call("cudaEventSynchronize", c_void_p(end))
        milliseconds = c_float()
        self._call("cudaEventElapsedTime", byref(milliseconds), c_void_p(start), c_void_p(end))
        return round(milliseconds.value * 1e6)

    @contextmanager
    def graph(self, stream: int, enqueue: Callable[[], None]) -> Iterator[int]:
        """What `enqueue` puts on the stream, not run but recorded, to be launched as one. Raises CudaError when something in it
        cannot be captured, and what `enqueue` raises; the stream is usable again in both cases."""
        recorded = self._captured(stream, enqueue)
        try:
            with self._taken(
                "cudaGraphInstantiateWithFlags", "cudaGraphExecDestroy", c_void_p(recorded), c_ulonglong(0)
            ) as graph:
                yield graph
        finally:
            self._call("cudaGraphDestroy", c_void_p(recorded))

    def launch(self, graph: int, stream: int) -> None:
        """Put a graph on the stream."""
        self._call("cudaGraphLaunch", c_void_p(graph), c_void_p(stream))

    def _captured(self, stream: int, enqueue: Callable[[], None]) -> int:
        recorded = c_void_p()
        self._call("cudaStreamBeginCapture", c_void_p(stream), c_int(_THREAD_LOCAL))
        try:
            enqueue()
        except BaseException:
            with suppress(CudaError):
                self._call("cudaStreamEndCapture", c_void_p(stream), byref(recorded))
            if recorded.value:
                self._call("cudaGraphDestroy", recorded)
            raise
        self._call("cudaStreamEndCapture", c_void_p(stream), byref(recorded))
        if not recorded.value:
            raise StageError("CUDA captured no graph")
        return recorded.value

    @contextmanager
    def _taken(self, take: str, give_back: str, *how: Any) -> Iterator[int]:
        """What `take` writes to its first argument, until the block ends. CUDA reports failures of earlier, asynchronous work
        from `give_back` too; the thing is gone all the same."""
        taken = c_void_p()

        self._call(take, byref(taken), *how)
        try:
            yield taken.value or 0
        finally:
            self._call(give_back, taken)

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cudaDeviceGetAttribute", byref(value), c_int(number), c_int(0))
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            # A failure that is over must not be found again by the next call; one that is not over comes back by itself.
            self._library.cudaGetLastError()
            said = ": ".join(getattr(self._library, text)(code).decode(errors="replace") for text in _TEXTS)
            raise CudaError(name, code, said)


def load() -> Cuda:
    """The CUDA runtime of this machine: the first that works with its driver. Raises CapabilityError when there is none."""
    tried = []
    for name in _candidates():
        try:
            found = Cuda(ctypes.CDLL(name))
            found.device_count()
        except CudaError as error:
            if error.code != _DRIVER_TOO_OLD:
                return found  # whoever calls it next gets the reason
            tried.append(f"{name}: {error.why}")
        except (OSError, CapabilityError) as error:
            tried.append(str(error))
        else:
            return found
    raise CapabilityError(
        "this machine has no CUDA runtime library that works here",
        problems=tried,
        fix="install CUDA 12 or 13; JetPack brings it, elsewhere pip install nvidia-cuda-runtime-cu12",
    )


def why_not() -> str:
    """Why CUDA cannot be used on this machine; empty when it can."""
    try:
        count = load().device_count()
    except (CapabilityError, CudaError) as error:
        return f"{error.what} ({error.why or '; '.join(error.problems)})"
    return "" if count else "the CUDA runtime finds no GPU"


def _candidates() -> list[str]:
    """By the names that the loader knows, then where NVIDIA's Python packages put them."""
    names = ["libcudart.so.13", "libcudart.so.12"]
    places = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")
    files = [Path(root, place, name) for root in sys.path for place in places for name in names]
    return [*names, "libcudart.so", *(str(file) for file in files if file.is_file())]


def _tegra_clock_khz(frequencies: Path) -> int:
    """The highest clock in kHz that a Jetson's power mode allows its GPU; 0 on machines that are none."""
    for node in sorted(frequencies.glob("*")):
        if any(name in node.name for name in _TEGRA_GPUS):
            with suppress(OSError, ValueError):
                return int((node / "max_freq").read_text()) // 1000
    return 0
