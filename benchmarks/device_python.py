"""The device half in a Python of a device: everything from install to infer, and what `probe` costs above importing the runtime.

usage: python benchmarks/device_python.py --python PYTHON [--times 20] [--output DIR]

PYTHON is one with numpy and onnxruntime alone, such as JetPack 6's: python3.10 -m venv DIR, and
DIR/bin/pip install 'onnxruntime==1.23.*' 'numpy==2.2.*'. `probe` and the bare import run in turn, in fresh processes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from _results import write

from deploykit.bundle import device_half, pack

LEFT_OUT = ("torch", "torchvision", "onnx", "click", "rich", "PIL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    python = str(arguments.python)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    tests = importlib.import_module("test_bundle")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        app, root = folder / "device.pyz", folder / "root"
        app.write_bytes(device_half.zipapp())
        run = tests.tiny_run(folder / "run", recipe=tests.RECIPE.replace('gate = ["latency <= 500 ms"]', "gate = []"))
        path = pack.pack(run, folder / "x.bundle", release=1).path
        np.save(folder / "x.npy", np.ones((1, 2, 2), np.float32))
        id = _answer(python, app, "install", str(path), "--root", str(root))["id"]
        for words in (["build", id], ["parity", id], ["activate", id], ["status"], ["infer", str(folder / "x.npy")], ["recover"]):
            print(f"{words[0]}: exit code {_answer(python, app, *words, '--root', str(root))['exit_code']}")
        absent = _python(python, f"import importlib.util as u; print([n for n in {LEFT_OUT!r} if u.find_spec(n)])")
        versions = _python(
            python, "import sys, numpy, onnxruntime as o; print(sys.version.split()[0], numpy.__version__, o.__version__)"
        )
        times: dict[str, list[float]] = {"probe": [], "import": []}
        cpu: dict[str, list[float]] = {"probe": [], "import": []}
        for _ in range(arguments.times):
            for name, command in {"probe": [python, str(app), "probe"], "import": [python, "-c", "import onnxruntime"]}.items():
                began, spent = time.monotonic(), _cpu_of_children()
                subprocess.run(command, check=True, capture_output=True)
                times[name].append(time.monotonic() - began)
                cpu[name].append(_cpu_of_children() - spent)
        size = app.stat().st_size
    above, cpu_above = (median(found["probe"]) - median(found["import"]) for found in (times, cpu))
    print(f"Python, numpy, onnxruntime {versions}; others found there: {absent}; zipapp {size} bytes")
    print(f"probe {above:.3f} s above importing the runtime, {cpu_above:.3f} s of CPU; medians of {arguments.times} processes")
    write("device_python", {"versions": versions, "bytes": size, "seconds": times, "cpu_seconds": cpu}, arguments.output)


def _cpu_of_children() -> float:
    """CPU time, in seconds, of all processes that have ended; unlike the clock's it does not grow when others want the cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _answer(python: str, app: Path, *words: str) -> dict[str, object]:
    done = subprocess.run([python, str(app), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{words}: {done.stdout}{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _python(python: str, script: str) -> str:
    return subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
