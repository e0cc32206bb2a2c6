"""How long `deploykit export NETWORK --to onnx` takes, beside a bare call of the exporter that it uses, in one run.

usage: python benchmarks/export_time.py [NETWORK ...] [--processes 3] [--output DIR]

The bare call is torch.onnx.export(dynamo=True) with the same opset and an open batch, in a process that has built the network
and does nothing else; what is counted is the call alone. The command, with a checkpoint of random weights and nothing more, is
counted whole, from its start to its end: Python, imports, the network and its weights, golden samples, PyTorch's answer, the
exporter, clean-up, ONNX Runtime's answer, parity, the report. Fresh processes in random order. CPU seconds are given beside the
clock's, because others may work on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from _results import write

FACTOR, EXTRA_S = 1.3, 10.0
NETWORKS = ("resnet50", "efficientnet_b7")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--processes", type=int, default=3, help="of each kind")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bare", metavar="NETWORK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        print(json.dumps(bare(arguments.bare)))
        return
    raw: dict[str, dict[str, list[dict[str, float]]]] = {name: {"bare": [], "command": []} for name in arguments.networks}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.networks:
            checkpoint(name, Path(scratch))
        _measure(raw, arguments.processes, Path(scratch))
    for name, samples in raw.items():
        for unit in ("wall_s", "cpu_s"):
            print(_told(name, unit, samples))
    write("export_time", {"factor": FACTOR, "extra_s": EXTRA_S, "samples": raw}, arguments.output)


def _measure(raw: dict[str, dict[str, list[dict[str, float]]]], processes: int, folder: Path) -> None:
    todo = [(name, kind) for name in raw for kind in ("bare", "command")] * processes
    for name, kind in random.sample(todo, len(todo)):
        sample = _bare_process(name) if kind == "bare" else command(name, folder / f"{name}.pth")
        raw[name][kind].append(sample)
        print(f"{name} {kind}: {sample['wall_s']:.1f} s, {sample['cpu_s']:.1f} s of CPU", flush=True)


def checkpoint(name: str, folder: Path) -> None:
    """Write the network's random weights to FOLDER/NAME.pth."""
    import torch

    from deploykit import models
    from deploykit.recipe import ModelTable

    model = models.load(ModelTable(name=name, weights="none"))
    torch.save(model.module.state_dict(), folder / f"{name}.pth")


def bare(name: str) -> dict[str, float]:
    """The seconds of one call of torch's exporter, in this process."""
    import torch

    from deploykit import models
    from deploykit.recipe import ExportTable, ModelTable

    model = models.load(ModelTable(name=name, weights="none"))
    example = torch.zeros(2, *model.preprocess.shape)
    with tempfile.TemporaryDirectory() as scratch:
        wall, cpu = perf_counter(), process_time()
        torch.onnx.export(
            model.module,
            (example,),
            str(Path(scratch, "model.onnx")),
            dynamo=True,
            opset_version=ExportTable().opset,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            external_data=False,
            verbose=False,
        )
        return {"wall_s": perf_counter() - wall, "cpu_s": process_time() - cpu}


def command(name: str, weights: Path) -> dict[str, float]:
    """The seconds of one whole command in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        words = ["export", name, "--to", "onnx", "--weights", str(weights), "--output", str(Path(scratch, "run"))]
        wall, cpu = perf_counter(), _children_cpu_s()
        subprocess.run([sys.executable, "-m", "deploykit", *words], check=True, capture_output=True)
        return {"wall_s": perf_counter() - wall, "cpu_s": _children_cpu_s() - cpu}


def _bare_process(name: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--bare", name], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _told(name: str, unit: str, samples: dict[str, list[dict[str, float]]]) -> str:
    alone, whole = (_median(samples[kind], unit) for kind in ("bare", "command"))
    limit = FACTOR * alone + EXTRA_S
    verdict = "within" if whole <= limit else "ABOVE"
    return f"{name} {unit}: command {whole:.1f}, bare call {alone:.1f}; {verdict} the limit of {limit:.1f}"


def _median(samples: Sequence[dict[str, Any]], unit: str) -> float:
    return float(statistics.median(sample[unit] for sample in samples))


if __name__ == "__main__":
    main()
