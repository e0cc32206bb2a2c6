"""How long `deploykit --help` takes: the median over fresh processes, beside Python starting and doing nothing.

usage: python benchmarks/startup.py [--processes 20] [--output DIR]
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter_ns

from _results import write

GOAL_S = 0.15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "deploykit --help": [sys.executable, "-m", "deploykit", "--help"],
    "deploykit export --help": [sys.executable, "-m", "deploykit", "export", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    raw: dict[str, list[int]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        subprocess.run(command, capture_output=True, check=True)  # fills the page cache
    for name in random.sample(list(COMMANDS) * arguments.processes, len(COMMANDS) * arguments.processes):
        start = perf_counter_ns()
        subprocess.run(COMMANDS[name], capture_output=True, check=True)
        raw[name].append(perf_counter_ns() - start)
    for name, samples in raw.items():
        print(f"{name:28} median {statistics.median(samples) / 1e9:.3f} s over {len(samples)} processes (goal {GOAL_S} s)")
    write("startup", {"wall_ns": raw}, arguments.output)


if __name__ == "__main__":
    main()
