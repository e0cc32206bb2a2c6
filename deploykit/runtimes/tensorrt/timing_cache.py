"""What the builder has timed before, kept in one file for each TensorRT version, device and clock.

A tactic that won at one clock need not win at another, and TensorRT refuses what another version or device timed. The files
are as TensorRT writes them, so `trtexec --timingCacheFile` reads them too.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tensorrt as trt

from deploykit.runtimes.cudart import Device
from deploykit.runtimes.tensorrt.callbacks import Log


@dataclass(frozen=True)
class TimingCache:
    """The file of this version, device and clock, and whether what it held was used ("used", "absent", or why it was not)."""

    path: Path
    began: str


def default_folder() -> Path:
    """Where a program's caches belong (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "deploykit", "tensorrt")


def file_name(version: str, device: Device) -> str:
    """One name for each TensorRT version, device and clock."""
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    capability = "{}.{}".format(*device.compute_capability)
    return f"{version}_{name}_sm{capability}_{device.multiprocessors}x{device.clock_khz // 1000}MHz.cache"


def attach(config: trt.IBuilderConfig, path: Path, log: Log) -> TimingCache:
    """Let a build use what the file at `path` holds. A damaged file, or another version's or device's, starts an empty cache.

    Raises StageError when TensorRT does not even take an empty one.
    """
    began = "absent"
    try:
        content = path.read_bytes()
    except OSError as error:
        if path.exists():
            began = f"not readable: {error.strerror}"
    else:
        began = _taken(config, content)
        if began == "used":
            return TimingCache(path, began)
    empty = log.made("timing cache", config.create_timing_cache(b""))
    if not config.set_timing_cache(empty, ignore_mismatch=False):
        raise log.failure("TensorRT refuses an empty timing cache")
    return TimingCache(path, began)


def save(config: trt.IBuilderConfig, cache: TimingCache, log: Log) -> str:
    """Write what is now known. Returns why that was not possible; an engine is not thrown away for it."""
    known = log.made("timing cache", config.get_timing_cache())
    content = bytes(log.made("serialized timing cache", known.serialize()))
    try:
        cache.path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, not one that another build on this machine writes at the same time.
        descriptor, aside = tempfile.mkstemp(dir=cache.path.parent, prefix=cache.path.name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(aside).replace(cache.path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _taken(config: trt.IBuilderConfig, content: bytes) -> str:
    cache = config.create_timing_cache(content)
    if cache is None:
        return "damaged"
    return "used" if config.set_timing_cache(cache, ignore_mismatch=False) else "of another TensorRT version or device"
