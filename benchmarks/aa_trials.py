"""How often the benchmark calls an engine different from itself, and how often it finds a true slowdown of 8 %.

usage: python benchmarks/aa_trials.py [--pool 60] [--trials 200] [--output DIR]

Two pools of fresh processes are measured by the benchmark itself, one on the machine as it is and one with a neighbour that
takes a core for random fractions of a second; in each, one engine runs twice as often as the other (the A/A arm), in random
order. A trial draws, without replacement, 10 processes for the baseline, 10 for its second measurement and 10 for what is
compared with it, and asks the benchmark's own statistics. A/A: the third group is the same engine. Slowdown: it is a network
with 27 convolutions where the baseline has 25. Under the neighbour, processes are not measured again and no verdict on the
run is used (it would say "invalid" every time, which is printed too), so this tests the statistics alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _results import write

from deploykit import benchmark
from deploykit.artifact import Artifact, read_artifact
from deploykit.benchmark.report import BenchmarkReport
from deploykit.benchmark.statistics import Difference, difference, noise_floor
from deploykit.benchmark.validity import disturbances
from deploykit.jsonable import to_json

EACH = 10
NEIGHBOUR = """
import random, time
while True:
    end = time.perf_counter() + random.uniform(0.05, 1.0)
    while time.perf_counter() < end: pass
    time.sleep(random.uniform(0.05, 1.0))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=60, help="processes of the slower engine; of the other twice as many")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--slowdowns", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        engines = {name: _engine(name, Path(scratch, name)) for name in ("quick", "slow")}
        quiet = _pool(engines, arguments.pool)
        with _neighbour():
            noisy = _pool(engines, arguments.pool)
    found = {
        name: _study(report, arguments.trials // 2, arguments.slowdowns) for name, report in (("quiet", quiet), ("noisy", noisy))
    }
    for name, study in found.items():
        print(f"{name}: {study['said']}")
    write("aa_trials", {"found": found, "quiet": _raw(quiet), "noisy": _raw(noisy)}, arguments.output)


def _engine(name: str, folder: Path) -> Artifact:
    factory = f"{Path(__file__).with_name('_chains.py')}:{name}"
    command = [sys.executable, "-m", "deploykit", "export", factory, "--to", "onnxruntime", "--weights", "none"]
    settings = ["crop=64", "resize=64", "channels='RGB'", "mean=[0.5,0.5,0.5]", "std=[0.5,0.5,0.5]"]
    command += [word for text in settings for word in ("--set", f"preprocess.{text}")]
    subprocess.run([*command, "--set", "benchmark.enabled=false", "--output", str(folder)], check=True, capture_output=True)
    return read_artifact(folder / "build-onnxruntime-fp32")


def _pool(engines: dict[str, Artifact], processes: int) -> BenchmarkReport:
    return benchmark.benchmark(
        engines, processes=processes, queries=30, warmup=10, offline_batches=[1], offline_seconds=0, seed=0
    )


@contextmanager
def _neighbour() -> Iterator[None]:
    child = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        child.kill()
        child.wait()


def _study(report: BenchmarkReport, trials: int, slowdowns: int) -> dict[str, Any]:
    generator = random.Random(0)
    quick = [process.median_ns for process in report.processes if process.label == "quick"]
    slow = [process.median_ns for process in report.processes if process.label == "slow"]
    same = [_trial(generator.sample(quick, 3 * EACH), None, seed) for seed in range(trials)]
    slower = [_trial(generator.sample(quick, 2 * EACH), generator.sample(slow, EACH), seed) for seed in range(slowdowns)]
    truth = statistics.median(slow) / statistics.median(quick)
    visible = statistics.median(trial.smallest_visible for trial in same)
    disturbed = sum(bool(disturbances(process.conditions)) for process in report.processes)
    said = (
        f"{sum(trial.is_different for trial in same)} of {trials} A/A comparisons called different; "
        f"a slowdown of {100 * (truth - 1):.1f} % (median of {len(slow)} over {len(quick)} processes) found "
        f"{sum(trial.is_different and trial.ratio > 1 for trial in slower)} times of {slowdowns}; "
        f"noise floor {100 * statistics.median(trial.floor for trial in same):.1f} %, smallest visible difference "
        f"{100 * visible:.1f} % (medians over trials); {disturbed} of {len(report.processes)} processes disturbed; "
        f"this pool as one run is {report.verdict}"
    )
    return {"said": said, "same": [to_json(trial) for trial in same], "slower": [to_json(trial) for trial in slower]}


def _trial(baseline: Sequence[float], other: Sequence[float] | None, seed: int) -> Difference:
    first, again = baseline[:EACH], baseline[EACH : 2 * EACH]
    mine = baseline[2 * EACH :] if other is None else other
    return difference(mine, [*first, *again], noise_floor(first, again, seed), seed)


def _raw(report: BenchmarkReport) -> list[dict[str, Any]]:
    """Every process with its median; the single queries would be megabytes."""
    return [
        {**asdict(replace(process, latency_ns=(), end_to_end_ns=())), "median_ns": process.median_ns}
        for process in report.processes
    ]


if __name__ == "__main__":
    main()
