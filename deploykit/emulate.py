"""Other CPUs, emulated: a graph's answers from ONNX Runtime in a process that qemu-user runs for an instruction set.

Run as a module, it is that process: it reads a request as JSON from standard input, and answers in JSON.

This module runs on devices: standard library and numpy only, Python 3.10.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import runtimes
from deploykit.artifact import Tensors, TensorSpec
from deploykit.errors import CapabilityError, DeploykitError, StageError, UsageError, printable

_X86, _ARM64 = "x86_64", "aarch64"
# An emulated CPU is 100 to 300 times slower; what takes longer than this is too large a network or too many images.
_LONGEST_S = 3600
_BATCH = 8


@dataclass(frozen=True)
class Cpu:
    """An emulated CPU: what `deploykit parity --isa` calls it, qemu's architecture and `-cpu`, and what it stands for."""

    name: str
    arch: str
    model: str
    stands_for: str


# Not in here: x86 CPUs with AVX-512, which qemu's emulation lacks; it would run them as AVX2 under their name.
CPUS: Mapping[str, Cpu] = {
    cpu.name: cpu
    for cpu in (
        Cpu("haswell", _X86, "Haswell", "x86 with AVX2 and without VNNI"),
        Cpu("nehalem", _X86, "Nehalem", "x86 with SSE4.2 and without AVX"),
        Cpu("cortex-a72", _ARM64, "cortex-a72", "ARM without an int8 dot product: Raspberry Pi 4, Jetson TX2"),
        Cpu("cortex-a76", _ARM64, "cortex-a76", "ARM with an int8 dot product: Raspberry Pi 5, Jetson Orin"),
    )
}


@dataclass(frozen=True)
class Answered:
    """What a process answered: the graph's outputs by name (images first), and the version of its ONNX Runtime."""

    outputs: Tensors
    onnxruntime: str


def answers(
    graph: Path, source: TensorSpec, images: NDArray[np.float32], cpu: Cpu | None, *, arm_root: Path | None = None
) -> Answered:
    """The answers of an ONNX graph with one input, `source`, to `images` (N, C, H, W), computed on `cpu`; None is this machine.

    The graph is optimized there as an engine is. `arm_root` is a folder with a 64-bit ARM Python and ONNX Runtime in it.

    Raises CapabilityError when this machine cannot emulate that CPU, StageError when the process fails.
    """
    # This very package and, beside it, nothing from the folder that a user happens to be in.
    ours = {"PYTHONPATH": str(Path(__file__).parents[1].absolute()), "PYTHONSAFEPATH": "1"}
    command, environment = ([sys.executable], ours) if cpu is None else python(cpu, arm_root)
    environment = ours | environment
    with tempfile.TemporaryDirectory() as scratch:
        fed, found = Path(scratch, "images.npy"), Path(scratch, "outputs.npz")
        np.save(fed, images)
        request = {"graph": str(graph.absolute()), "input": source.name, "size": source.shape[0]}
        told = ask(
            [*command, "-m", "deploykit.emulate"],
            {**request, "images": str(fed), "outputs": str(found)},
            environment,
            "this machine" if cpu is None else f"{cpu.name}, emulated",
        )
        with np.load(found, allow_pickle=False) as arrays:
            return Answered({name: arrays[f"arr_{number}"] for number, name in enumerate(told["names"])}, told["onnxruntime"])


def python(cpu: Cpu, arm_root: Path | None) -> tuple[list[str], dict[str, str]]:
    """The command line of a Python on `cpu`, qemu first, and what its environment needs beside our own.

    Raises CapabilityError when this machine cannot emulate that CPU, UsageError when `arm_root` is no root.
    """
    tool = shutil.which(f"qemu-{cpu.arch}") or shutil.which(f"qemu-{cpu.arch}-static")
    if tool is None:
        why = f"there is no qemu-{cpu.arch} on the PATH"
        raise CapabilityError(f"{cpu.name} cannot be emulated", why=why, fix="install the Debian package qemu-user")
    if cpu.arch == _X86:
        if platform.machine() != _X86:
            why = f"an x86 CPU is emulated with this very Python, and this one is for {platform.machine()}"
            raise CapabilityError(f"{cpu.name} cannot be emulated", why=why, fix="use an x86 machine")
        # numpy's BLAS takes a Nehalem for a CPU with AVX here, and dies of it; the kernels for one run on all of them.
        return [tool, "-cpu", cpu.model, sys.executable], {"OPENBLAS_CORETYPE": "Nehalem"}
    if arm_root is None:
        why = "it takes a folder with a 64-bit ARM Python and ONNX Runtime in it"
        raise CapabilityError(
            f"{cpu.name} cannot be emulated", why=why, fix="`deploykit device emulate DIR` makes one for --arm-root"
        )
    pythons = sorted(arm_root.glob("usr/bin/python3.*[0-9]"))
    site = arm_root / "opt" / "site"
    if not pythons or not (site / "onnxruntime").is_dir():
        why = "usr/bin/python3.* or opt/site/onnxruntime is missing"
        raise UsageError(f"{printable(arm_root)} is no 64-bit ARM root", why=why, fix="deploykit device emulate makes one")
    ours = Path(__file__).parents[1]  # last: where deploykit is installed, this machine's own numpy lies beside it
    environment = {"PYTHONPATH": f"{site.absolute()}{os.pathsep}{ours}", "PYTHONDONTWRITEBYTECODE": "1"}
    return [tool, "-L", str(arm_root.absolute()), "-cpu", cpu.model, str(pythons[0].absolute())], environment


def ask(command: list[str], request: Mapping[str, Any], environment: Mapping[str, str], where: str) -> dict[str, Any]:
    """What the process `command` answers to `request`, both as JSON; `where` names it in errors.

    Raises StageError, with what the process said, when it fails, takes too long or gives no answer.
    """
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_LONGEST_S,
            env={**os.environ, **environment},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        fix = "give fewer images, or export at a smaller input size"
        raise StageError(f"{where}: no answer within {_LONGEST_S // 60} minutes", fix=fix) from error
    if done.returncode != 0:
        died = f"it died of {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
        raise StageError(f"{where}: the process failed", why=died or done.stderr.strip()[-2000:])
    try:
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise StageError(f"{where}: the process gave no answer", why=done.stderr.strip()[-2000:] or "it said nothing") from error
    return told


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the graph of a request on its images here, and write all outputs where it wants them."""
    from deploykit.runtimes import onnxruntime

    images, name, size = np.load(request["images"], allow_pickle=False), request["input"], request["size"]
    step = size if isinstance(size, int) else _BATCH
    session = onnxruntime.optimized(Path(request["graph"]))
    found: dict[str, list[NDArray[Any]]] = {}
    for start in range(0, len(images), step):
        some = images[start : start + step]
        for output, values in runtimes.run(session, {name: runtimes.padded(some, size)}).items():
            found.setdefault(output, []).append(values[: len(some)])
    np.savez(request["outputs"], *map(np.concatenate, found.values()))
    return {"names": [*found], "onnxruntime": onnxruntime.VERSION}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_answer(json.load(sys.stdin))) + "\n")
    except DeploykitError as error:
        sys.exit(str(error))
