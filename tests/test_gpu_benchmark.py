"""benchmarks/gpu.py: without a GPU it says so, and on fake ones it measures, tells, and says what it left out."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_onnxruntime
import fake_torch_cuda
import pytest
import timings
import torch

from deploykit import runtimes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Watch:
    """As the real one, which takes half a second to look at what its own tests look at."""

    def __init__(self, *, gpu: str) -> None:
        self.conditions = timings.conditions(gpu_unseen="nvidia-ml-py is not installed", gpu_mhz=(1965, 1980))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch) -> Any:
    """The script with two fake GPUs, small things to measure, and its processes run in this one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu")
    for name, value in (("SIDE", 8), ("COPIED_BYTES", 64), ("QUERIES", 4), ("WARMUP", 1), ("REPEATS", 2), ("BATCHES", (1, 2))):
        monkeypatch.setattr(module, name, value)

    def here(command: list[str], *, input: str, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        answer = module.CHILDREN[command[-1]](json.loads(input))
        return subprocess.CompletedProcess(command, 0, json.dumps(answer) + "\n", "")

    monkeypatch.setattr(module.subprocess, "run", here)
    monkeypatch.setattr(module, "Watch", Watch)
    yield module
    del sys.modules["gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without an NVIDIA GPU")
def test_without_a_gpu_it_ends_with_4_and_one_sentence():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, check=False)

    assert done.returncode == 4
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("nothing to measure, since no runtime finds a GPU here (onnxruntime_cuda: ")


def test_every_engine_is_measured_as_often_as_there_is_time_and_the_rest_is_named(gpu, tmp_path, monkeypatch):
    moments = iter(range(10_000))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(moments)))
    with fake_onnxruntime.installed(fake_onnxruntime.World()), fake_torch_cuda.installed(fake_torch_cuda.World()):
        assert not runtimes.why_not("onnxruntime_cuda")
        work = gpu.Work()
        card = gpu.measured_ceilings(work)
        sizes = gpu.made(["lenet5"], ["onnxruntime_cuda", "torchscript_cuda"], tmp_path, work, end=1e9)
        samples = gpu.rounds(work, next(moments) + 45.0, seed=0)

    engines = {(one["runtime"], one["precision"]) for one in samples}
    assert len(engines) == 7
    assert {one["round"] for one in samples} >= {0, 1}
    assert set(samples[0]["batches"]) == {"1", "2"}
    assert samples[0]["batches"]["1"]["gpu_ns"] == [500_000] * 4
    assert all(len(times) == 4 for times in samples[0]["batches"]["2"].values())
    first, second = ([one["runtime"] + one["precision"] for one in samples if one["round"] == each] for each in (0, 1))
    assert first[: len(second)] != second
    assert work.missing == ["lenet5 onnxruntime_cuda bf16: graphs have opset 19, in which no convolution is of bfloat16"]
    told = "\n".join(gpu.told_of({"ceilings": card, "networks": sizes, "samples": samples, "missing": work.missing}))
    assert set(card["operations_per_second"]) == {"fp32", "tf32", "fp16", "bf16"}
    for part in (
        "lenet5, batch 2",
        "torchscript_cuda bf16",
        "did not run: lenet5 onnxruntime_cuda bf16",
        "were not watched: nvidia-ml-py",
    ):
        assert part in told
    assert json.loads(json.dumps(samples)) == samples


def test_an_engine_that_fails_is_named_and_not_asked_again(gpu, tmp_path, monkeypatch):
    work = gpu.Work(engines={("a", "onnxruntime_cuda", "fp32"): tmp_path})
    failing = subprocess.CompletedProcess([], 1, "", "Traceback\nboom")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: failing)

    assert gpu.rounds(work, gpu.time.monotonic() + 100, seed=0) == []
    assert work.missing == ["a onnxruntime_cuda fp32 in round 1: exit code 1, boom"]


def test_what_takes_too_long_is_named(gpu, monkeypatch):
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired([], 1)

    monkeypatch.setattr(gpu.subprocess, "run", hang)
    work = gpu.Work()

    assert gpu.child("measure", {}, 5.0, "an engine", work) is None
    assert work.missing == ["an engine: it was not done after 5 s"]


def test_a_share_is_of_what_the_card_does_in_that_precision(gpu):
    one = {"batches": {"2": {"gpu_ns": [1_000_000], "compute_ns": [2_000_000], "end_to_end_ns": [4_000_000]}}}
    size = {"macs": 5_000_000, "weights": 1000, "activations": 2000}
    card = {"operations_per_second": {"fp16": 1e11}, "bytes_per_second": 1e9}

    found = gpu.row("a fp16", [one], size, "fp16", 2, card).split()

    # 2 images of 10 million operations in a millisecond; 5000 elements of two bytes.
    assert found == ["a", "fp16", "1.000", "2.000", "4.000", "1,000", "0.02", "20.0%", "0", "1.0%"]
