"""Tools that count instructions: valgrind's callgrind on this machine, and a plugin of qemu for any CPU that it emulates."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from deploykit import emulate
from deploykit.artifact import Tensors
from deploykit.benchmark.counted import BRACKET, DOOR, MARK
from deploykit.emulate import CPUS
from deploykit.errors import CapabilityError, StageError, UsageError
from deploykit.machine import cpu_features

CALLGRIND = "callgrind"
# What valgrind hands on of an x86 CPU: it knows no AVX-512 and no VNNI (valgrind 3.19, docs/html/manual-core.html, limitations).
_VALGRIND_KNOWS = ("sse4_1", "avx", "avx2", "fma")
# A hash seed changes the order of sets and with it what Python executes; threads would share the work in another way each time.
_STEADY = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
# qemu offers plugins no header in Debian, so what is used of its interface, version 1 (qemu 4.2 to 8.2), is declared here.
_PLUGIN = """
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
enum { ADD_U64 };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t amount);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*translated)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, void (*called)(plugin_id, unsigned, int64_t, uint64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));

__attribute__((visibility("default"))) int qemu_plugin_version = 1;
static uint64_t executed;
static FILE *output;

/* A block runs from its first instruction to its last, so it is enough to add up blocks. */
static void translated(plugin_id id, struct qemu_plugin_tb *block) {
  qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t which, uint64_t mark, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
  if ((uint32_t)which != MARK) return;
  fprintf(output, "%u %llu\\n", (unsigned)mark, (unsigned long long)executed);
  fflush(output);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int count, char **arguments) {
  if (count != 1 || strncmp(arguments[0], "output=", 7) || !(output = fopen(arguments[0] + 7, "w"))) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
"""

# Instrumented from the first query on alone: Python's start under callgrind takes a minute, and is none of what is counted.
_BRACKET = f"""
#include <valgrind/callgrind.h>
void {BRACKET}(void (*work)(void)) {{ work(); }}
void {DOOR}(void (*work)(void)) {{ CALLGRIND_START_INSTRUMENTATION; {BRACKET}(work); }}
"""


@dataclass(frozen=True)
class Counter:
    """A tool that counts, in its version, and the CPU that it emulates; only counts of equal ones can be compared.

    `name` is what the command line calls it, `tells` says what a count of it is good for.
    """

    name: str
    tool: str
    cpu: str
    tells: str


@dataclass(frozen=True)
class Counted:
    """Instructions of each query in one process, and the versions of what executed them."""

    instructions: tuple[int, ...]
    versions: Mapping[str, str]


def counter(name: str | None = None, *, arm_root: Path | None = None) -> Counter:
    """The counter of that name: `callgrind`, the default, or a CPU that `emulate` knows.

    Raises UsageError for any other name, and CapabilityError, with what to install, where a tool is missing.
    """
    if name in (None, CALLGRIND):
        tool = _version(_tool("valgrind", "valgrind"))
        _tool("cc", "gcc")
        features = [feature for feature in cpu_features() if feature in _VALGRIND_KNOWS]
        is_x86 = platform.machine() == "x86_64"
        tells = "kernels for AVX2: a CPU with VNNI or AVX-512 runs others" if is_x86 else "kernels as valgrind executes them"
        cpu = f"{platform.machine()}, emulated{' with ' * bool(features)}{', '.join(features)}"
        return Counter(CALLGRIND, tool, cpu, tells)
    if name not in CPUS:
        raise UsageError(f"{name!r} is no CPU that can be emulated", why=f"known are {', '.join(CPUS)}")
    cpu_found = CPUS[name]
    tool = _tool(f"qemu-{cpu_found.arch}", "qemu-user")
    _tool("cc", "gcc")
    emulate.python(cpu_found, arm_root)
    return Counter(name, _version(tool), f"{cpu_found.arch}, emulated as {cpu_found.model}", cpu_found.stands_for)


def count(graph: Path, inputs: Tensors, by: Counter, *, images_per_query: int, arm_root: Path | None = None) -> Counted:
    """Run an ONNX graph on all `inputs` (images first) in a fresh process on one thread, and count what each query executes.

    The graph is optimized in that process for the emulated CPU, as an engine is when it is built there.

    Raises StageError when the process fails, or when the tool saw another number of queries than ran.
    """
    with TemporaryDirectory(prefix="deploykit-") as scratch:
        folder = Path(scratch)
        np.savez(folder / "inputs.npz", *inputs.values())
        request: dict[str, Any] = {"graph": str(graph.absolute()), "inputs": str(folder / "inputs.npz"), "names": [*inputs]}
        command, environment = _command(by, folder, arm_root)
        is_callgrind = by.name == CALLGRIND
        request["images_per_query"] = images_per_query
        request["bracket"] = str(compiled("bracket", _BRACKET, folder, "-O0")) if is_callgrind else ""
        told = emulate.ask([*command, "-m", "deploykit.benchmark.counted"], request, environment, f"counting by {by.tool}")
        found = _dumped(folder) if is_callgrind else _marked(folder / "marks")
    if len(found) != told["queries"]:
        raise StageError(f"{by.tool} saw {len(found)} of {told['queries']} queries", why="what it counted cannot be believed")
    return Counted(tuple(found), {"onnxruntime": told["onnxruntime"], "python": told["python"]})


def _command(by: Counter, folder: Path, arm_root: Path | None) -> tuple[list[str], dict[str, str]]:
    """The command line of a Python that is counted, and its environment; what is counted is written into `folder`."""
    ours = {"PYTHONPATH": str(Path(__file__).parents[2].absolute()), "PYTHONSAFEPATH": "1", **_STEADY}
    if by.name == CALLGRIND:
        brackets = ["--instr-atstart=no", f"--toggle-collect={BRACKET}", f"--dump-after={BRACKET}"]
        files = f"--callgrind-out-file={folder / 'counted'}"
        return [_tool("valgrind", "valgrind"), "--quiet", "--tool=callgrind", *brackets, files, sys.executable], ours
    cpu = CPUS[by.name]
    plugin = compiled("count", _PLUGIN, folder, "-O2", f"-DMARK={MARK}u")
    (_, *rest), environment = emulate.python(cpu, arm_root)
    loads = ["-plugin", f"file={plugin},output={folder / 'marks'}"]
    return [_tool(f"qemu-{cpu.arch}", "qemu-user"), *loads, *rest], ours | environment


def compiled(name: str, text: str, folder: Path, *options: str) -> Path:
    """A shared library of some C, compiled for this machine into `folder`; what it does not define, whoever loads it has.

    Raises StageError with what the compiler says.
    """
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    source.write_text(text)
    command = [_tool("cc", "gcc"), "-shared", "-fPIC", *options, "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StageError(f"{name}.c, by which instructions are counted, does not compile", why=done.stderr.strip()[-2000:])
    return library


def _dumped(folder: Path) -> list[int]:
    """What callgrind wrote after each call of `BRACKET`, in order; what it wrote at the end is none of them.

    The format: https://valgrind.org/docs/manual/cl-format.html
    """
    found = {}
    for path in folder.glob("counted*"):
        with path.open(errors="replace") as lines:
            values = [
                line.partition(":") for line in lines if line.startswith(("part:", "desc: Trigger:", "summary:", "totals:"))
            ]
        told = {name: value.strip() for name, _, value in values}
        if told.get("desc", "").endswith(f"--dump-after={BRACKET}"):
            found[int(told["part"])] = int(told.get("totals") or told["summary"])
    return [found[part] for part in sorted(found)]


def _marked(path: Path) -> list[int]:
    """Instructions between each pair of marks: lines of 0 or 1, and what had been executed until then."""
    lines = [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.is_file() else []
    starts, ends = ([executed for mark, executed in lines if mark == which] for which in (0, 1))
    return [end - start for start, end in zip(starts, ends, strict=False)]


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH"))
    if found is None:
        why, fix = f"there is no {name} on the PATH", f"install the Debian package {package}"
        raise CapabilityError("instructions cannot be counted on this machine", why=why, fix=fix)
    return found


def _version(tool: str) -> str:
    """`valgrind-3.19.0`, or `qemu-aarch64 version 7.2.18`, as the tool says."""
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        raise CapabilityError(
            "instructions cannot be counted on this machine", why=f"{tool} does not run: {done.stderr.strip()[:500]}"
        )
    return done.stdout.splitlines()[0].partition(" (")[0].strip()
