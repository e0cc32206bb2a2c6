"""What one export costs: wall time of the whole command, and the largest resident memory of any of its processes.

usage: python benchmarks/export_cost.py [MODEL] --images DIR [--weights none] [--to onnxruntime] [--output DIR]

With --weights FILE, a checkpoint, weights are also rounded on calibration images and the noise of INT8 is measured, which
random weights are spared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

from _results import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--to", default="onnxruntime")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        words = ["export", arguments.model, "--weights", arguments.weights, "--to", arguments.to, "--int8"]
        words += ["--calibrate", str(arguments.images), "--output", str(Path(scratch, "run"))]
        start = monotonic()
        child = subprocess.Popen([sys.executable, "-m", "deploykit", *words], stdout=subprocess.DEVNULL)
        peaks: dict[int, int] = {}
        while child.poll() is None:
            for pid in _family(child.pid):
                peaks[pid] = max(peaks.get(pid, 0), _peak_kib(pid))
            sleep(0.05)
        wall = monotonic() - start
    if child.returncode != 0:
        sys.exit(f"the export ended with {child.returncode}")
    print(
        f"{arguments.model} --to {arguments.to} --int8: {wall:.1f} s, at most {max(peaks.values()) / 1024:.0f} MiB in any process"
    )
    content = {"wall_s": wall, "peak_kib": sorted(peaks.values(), reverse=True)}
    kind = "" if arguments.weights == "none" else "_checkpoint"
    write(f"export_cost_{arguments.model}_{arguments.to}{kind}", content, arguments.output)


def _family(pid: int) -> list[int]:
    """The process and all that it started, read from /proc; those that end meanwhile are left out."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _family(int(child))
    return found


def _peak_kib(pid: int) -> int:
    """VmHWM: the largest resident set the process ever had, in KiB."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
