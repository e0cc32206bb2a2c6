"""What networks take on this GPU, in every precision and on every runtime that loads, beside what the card itself can do.

usage: python benchmarks/gpu.py [NETWORK ...] [--minutes 7] [--output DIR]

ResNet-50, MobileNetV2 and EfficientNet-B0 with random weights, batches of 1, 8 and 64, FP32, TF32, FP16 and BF16. Engines are
measured in fresh processes: as many rounds of all of them, each in random order, as fit into the time. A process measures the
batches in random order too, each by the host's clock with and without copies, and once more by CUDA events. Operations are two
for each multiply-accumulate; bytes are those of weights and of what kernels read and write, after fusion. Both are set beside
ceilings that are measured on the card: a large matrix product in each precision, and a large copy.

What does not run is said with the reason. Without a GPU it ends with exit code 4.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _results import write

from deploykit import build, runtimes
from deploykit.artifact import Artifact, Precision, read_artifact, write_manifest
from deploykit.benchmark.conditions import Watch
from deploykit.benchmark.scenarios import single_stream
from deploykit.errors import CapabilityError, DeploykitError
from deploykit.jsonable import to_json
from deploykit.recipe import OFFERS, ExportTable, ModelTable, TensorRtTable
from deploykit.runtimes import cudart

NETWORKS = ("resnet50", "mobilenet_v2", "efficientnet_b0")
RUNTIMES = ("onnxruntime_cuda", "torchscript_cuda", "tensorrt")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
BATCHES = (1, 8, 64)
QUERIES, WARMUP = 40, 10
SIDE, COPIED_BYTES = 8192, 1 << 30  # of the matrices and the copy that say what the card can do
REPEATS = 20
LONGEST_S = 240.0  # of one process


@dataclass
class Work:
    """Engines by (network, runtime, precision), and all that does not run, with the reason."""

    engines: dict[tuple[str, str, str], Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=["build", "ceilings", "measure"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(CHILDREN[arguments.child](json.loads(sys.stdin.read()))))
        return
    end = time.monotonic() + 60 * arguments.minutes
    reasons = {name: runtimes.why_not(name) for name in RUNTIMES}
    if all(reasons.values()):
        told = "; ".join(f"{name}: {why.partition(' (')[0]}" for name, why in reasons.items())
        print(f"nothing to measure, since no runtime finds a GPU here ({told})", file=sys.stderr)
        sys.exit(CapabilityError.exit_code)
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(missing=[f"{name}: {why}" for name, why in reasons.items() if why])
        wanted = [name for name, why in reasons.items() if not why]
        ceilings = measured_ceilings(work)
        sizes = made(arguments.networks, wanted, Path(scratch), work, end)
        samples = rounds(work, end, arguments.seed)
    found = {"ceilings": ceilings, "networks": sizes, "samples": samples, "missing": work.missing, "seed": arguments.seed}
    for line in told_of(found):
        print(line)
    write("gpu", {"queries": QUERIES, "warmup": WARMUP, **found}, arguments.output)


def measured_ceilings(work: Work) -> dict[str, Any]:
    """Operations and bytes a second that the card reaches; empty where PyTorch does not find it."""
    if why := runtimes.why_not("torchscript_cuda"):
        work.missing.append(f"ceilings of the card, which are measured by PyTorch: {why}")
        return {}
    return child("ceilings", {}, LONGEST_S, "ceilings of the card", work) or {}


def made(networks: Sequence[str], wanted: Sequence[str], folder: Path, work: Work, end: float) -> dict[str, Any]:
    """Export every network once in each form, and build its engines; what a network's kernels compute and move, for one image."""
    asked: dict[str, list[dict[str, str]]] = {name: [] for name in wanted}
    sizes = {}
    for network in networks:
        models, sizes[network] = exported(network, folder, work)
        for runtime in wanted:
            for precision in PRECISIONS:
                offer = OFFERS[runtime]
                if precision not in offer.floats:
                    work.missing.append(f"{network} {runtime} {precision}: {offer.no_other}")
                    continue
                form = "onnx-fp16" if offer.made_of == "onnx" and precision == "fp16" else offer.made_of
                if form in models:
                    to = folder / f"{network}-{runtime}-{precision}"
                    asked[runtime].append({"model": str(models[form].folder), "precision": precision, "to": str(to)})
    for runtime, requests in asked.items():  # a process for each, so that one that crashes takes nothing else along
        request = {"runtime": runtime, "engines": requests}
        found = child("build", request, min(LONGEST_S, end - time.monotonic()), f"engines of {runtime}", work) or {}
        for one in requests:
            network = Path(one["to"]).name.partition("-")[0]
            why = found.get(one["to"], "its process did not come so far")
            if why:
                work.missing.append(f"{network} {runtime} {one['precision']}: {why}")
            else:
                work.engines[network, runtime, one["precision"]] = Path(one["to"])
    return sizes


def exported(network: str, folder: Path, work: Work) -> tuple[dict[str, Artifact], dict[str, Any]]:
    """A network's portable files, and its size: multiply-accumulates, elements of weights and of what kernels read and write."""
    from deploykit import export, models
    from deploykit.quantize import half
    from deploykit.targets import layers

    model = models.load(ModelTable(name=network, weights="none"))
    found: dict[str, Artifact] = {}
    noise = np.random.default_rng(0).standard_normal((2, *model.preprocess.shape), dtype=np.float32)
    writers = {"onnx": export.onnx_model, "torchscript": export.torchscript_model}
    for form in ("onnx", "torchscript", "onnx-fp16"):
        place = folder / f"{network}.{form}"
        place.mkdir()
        try:
            if form == "onnx-fp16":
                artifact = half.to_fp16(found["onnx"], place)
            else:
                artifact = writers[form](model, noise, None, ExportTable(formats=(form,)), place)  # type: ignore[arg-type]
            write_manifest(place, artifact)
            found[form] = read_artifact(place)
        except (DeploykitError, KeyError) as error:
            work.missing.append(f"{network} as {form}: {one_line(error)}")
    if "onnx" not in found:
        return found, {}
    kernels = layers.read(found["onnx"].path)
    moved = sum(layer.read + layer.written for layer in kernels.layers)
    return found, {"macs": kernels.macs, "weights": kernels.weights, "activations": moved, "kernels": len(kernels.layers)}


def rounds(work: Work, end: float, seed: int) -> list[dict[str, Any]]:
    """Each engine in a fresh process, all in random order, again and again until the time is over."""
    shuffle, longest = random.Random(seed), 0.0
    samples: list[dict[str, Any]] = []
    failed: set[tuple[str, str, str]] = set()
    number = 0
    while work.engines.keys() - failed:
        order = sorted(work.engines.keys() - failed)
        shuffle.shuffle(order)
        for key in order:
            started = time.monotonic()
            if started + longest > end:
                done = len({(sample["network"], sample["runtime"], sample["precision"]) for sample in samples})
                if done < len(work.engines) - len(failed):
                    work.missing.append(f"{len(work.engines) - len(failed) - done} engines: the time was over (--minutes)")
                return samples
            request = {"engine": str(work.engines[key]), "batches": BATCHES, "seed": seed + len(samples)}
            limit = min(LONGEST_S, end - started)
            answer = child("measure", request, limit, f"{' '.join(key)} in round {number + 1}", work)
            longest = max(longest, time.monotonic() - started)
            if answer is None:
                failed.add(key)
            else:
                samples.append(dict(zip(("network", "runtime", "precision"), key, strict=True)) | {"round": number, **answer})
        number += 1
    return samples


def child(kind: str, request: Mapping[str, Any], limit_s: float, what: str, work: Work) -> dict[str, Any] | None:
    """What a fresh process answers; None, and the reason with what is missing, when it fails."""
    command = [sys.executable, __file__, "--child", kind]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=max(limit_s, 1.0), check=False
        )
        if done.returncode == 0:
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return answer
        said = done.stderr.strip().splitlines()
        work.missing.append(f"{what}: exit code {done.returncode}, {said[-1] if said else 'and it said nothing'}")
    except subprocess.TimeoutExpired:
        work.missing.append(f"{what}: it was not done after {limit_s:.0f} s")
    return None


def build_engines(request: Mapping[str, Any]) -> dict[str, str]:
    """By the folder of each engine: nothing, or why there is none in it."""
    found = {}
    for one in request["engines"]:
        to, model = Path(one["to"]), read_artifact(Path(one["model"]))
        to.mkdir()
        try:
            write_manifest(to, built(replace(model, precision=Precision(one["precision"])), request["runtime"], to))
            found[one["to"]] = ""
        except DeploykitError as error:
            found[one["to"]] = one_line(error)
    return found


def built(model: Artifact, runtime: str, folder: Path) -> Artifact:
    if runtime == "tensorrt":
        # How its engines are built by default wants minutes for each.
        table = TensorRtTable(batch=BATCHES, optimization_level=2, timing_cache=False)
        model = replace(model, facts={**model.facts, "tensorrt": to_json(table)})
    return build.build(model, runtime, folder)


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """One engine at every batch: nanoseconds of each query, compute alone, with copies, copies to the device, and on the GPU."""
    engine = read_artifact(Path(request["engine"]))
    began = time.perf_counter_ns()
    session: Any = runtimes.get(str(engine.facts["runtime"])).load(engine)
    load_ns, found = time.perf_counter_ns() - began, {}
    batches = list(request["batches"])
    random.Random(request["seed"]).shuffle(batches)
    noise = np.random.default_rng(0)
    with Watch(gpu=bus_id()) as watch:
        for batch in batches:
            spec = engine.inputs[0]
            inputs = {spec.name: noise.standard_normal((batch, *map(int, spec.shape[1:])), dtype=np.float32)}
            single_stream(session, [inputs], queries=WARMUP)
            queries = single_stream(session, [inputs], queries=QUERIES)
            found[str(batch)] = {**to_json_of(queries), "gpu_ns": list(session.gpu_times(QUERIES))}
    refused = getattr(session, "graph_refused", "")
    session.close()
    return {"load_ns": load_ns, "batches": found, "graph_refused": refused, "conditions": to_json(watch.conditions)}


def to_json_of(queries: Any) -> dict[str, list[int]]:
    return {key: list(getattr(queries, key)) for key in ("compute_ns", "end_to_end_ns", "feed_ns")}


def bus_id() -> str:
    try:
        return cudart.load().bus_id()
    except DeploykitError:
        return ""


def ceilings(request: Mapping[str, Any]) -> dict[str, Any]:
    """Operations a second of a matrix product in each precision, bytes a second of a copy, and what the card is called."""
    import torch

    from deploykit.runtimes.torchscript_cuda import Gpu, exactly

    gpu, types = Gpu(), {"fp16": torch.float16, "bf16": torch.bfloat16}
    operations = {}
    for precision in PRECISIONS:
        matrix = gpu.memory((SIDE, SIDE), types.get(precision, torch.float32))
        gpu.put(matrix.normal_)  # zeros take less power, and a higher clock
        with exactly(tf32=precision == "tf32"):
            ns = fastest_ns(gpu, partial(torch.mm, matrix, matrix))
        operations[precision] = 2e9 * SIDE**3 / ns
    source, target = (gpu.memory((COPIED_BYTES,), torch.uint8) for _ in range(2))
    copied = 2e9 * COPIED_BYTES / fastest_ns(gpu, partial(target.copy_, source))  # read, and written
    card = gpu.card()
    return {
        "operations_per_second": operations,
        "bytes_per_second": copied,
        "card": to_json(card),
        "nvml_name": nvml_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def fastest_ns(gpu: Any, work: Any) -> int:
    times: list[int] = []
    for _ in range(REPEATS):
        gpu.put(work)
        start, end = gpu.event(), gpu.event()
        gpu.record(start)
        gpu.put(work)
        gpu.record(end)
        times.append(gpu.elapsed_ns(start, end))
    return min(times)


def nvml_name() -> str:
    try:
        import pynvml
    except ImportError:
        return "not known, for nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        place = bus_id()
        gpu = pynvml.nvmlDeviceGetHandleByPciBusId(place) if place else pynvml.nvmlDeviceGetHandleByIndex(0)
        return str(pynvml.nvmlDeviceGetName(gpu))
    except pynvml.NVMLError as error:
        return f"not known: {error}"


def told_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables, what was doubtful, and what did not run."""
    card = found["ceilings"]
    if card:
        rates = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in card["operations_per_second"].items())
        copied = card["bytes_per_second"] / 1e9
        yield f"{card['nvml_name']}: {rates} TFLOP/s in a product of {SIDE} x {SIDE}, {copied:,.0f} GB/s in a copy"
    for network, size in found["networks"].items():
        for batch in BATCHES:
            ran = [sample for sample in found["samples"] if sample["network"] == network]
            if not ran:
                continue
            yield ""
            yield f"{network}, batch {batch} (GPU, host and copied: medians over processes, in ms; share: of the card's ceiling)"
            yield f"{'':28}{'GPU':>9}{'host':>9}{'copied':>9}{'images/s':>10}{'TFLOP/s':>9}{'share':>8}{'GB/s':>8}{'share':>8}"
            for runtime in RUNTIMES:
                for precision in PRECISIONS:
                    same = [one for one in ran if (one["runtime"], one["precision"]) == (runtime, precision)]
                    if same:
                        yield row(f"{runtime} {precision}", same, size, precision, batch, card)
    yield from doubts(found["samples"])
    yield from (f"did not run: {line}" for line in found["missing"])


def row(label: str, same: Sequence[Mapping[str, Any]], size: Mapping[str, Any], precision: str, batch: int, card: Any) -> str:
    keys = ("gpu_ns", "compute_ns", "end_to_end_ns")
    medians = {key: [statistics.median(one["batches"][str(batch)][key]) for one in same] for key in keys}
    gpu, host, copied = (statistics.median(medians[key]) for key in keys)
    width = 2 if precision in ("fp16", "bf16") else 4
    operations = 2e9 * batch * size["macs"] / gpu if size else 0.0
    moved = 1e9 * width * (size["weights"] + batch * size["activations"]) / gpu if size else 0.0
    shares = ["", ""]
    if card and size:
        shares = [f"{operations / card['operations_per_second'][precision]:.1%}", f"{moved / card['bytes_per_second']:.1%}"]
    return (
        f"{label:28}{gpu / 1e6:9.3f}{host / 1e6:9.3f}{copied / 1e6:9.3f}{1e9 * batch / host:10,.0f}"
        f"{operations / 1e12:9.2f}{shares[0]:>8}{moved / 1e9:8,.0f}{shares[1]:>8}"
    )


def doubts(samples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Processes that a GPU's limits slowed down, sessions without a graph, and what nobody looked at."""
    yield ""
    counts = {(one["network"], one["runtime"], one["precision"]) for one in samples}
    yield f"{len(samples)} processes of {len(counts)} engines"
    held = [reason for one in samples for reason in one["conditions"]["throttled"][:1]]
    if held:
        yield f"doubtful: the GPU throttled in {len(held)} of {len(samples)} processes: {held[0]}"
    for why in sorted({one["conditions"]["gpu_unseen"] for one in samples} - {""}):
        yield f"clocks of the GPU were not watched: {why}"
    clocks = [clock for one in samples for clock in one["conditions"]["gpu_mhz"]]
    if clocks:
        yield f"the GPU's clock was {min(clocks)} to {max(clocks)} MHz"
    refused = {f"{one['network']} {one['runtime']} {one['precision']}": one["graph_refused"] for one in samples}
    yield from (f"no CUDA graph: {name}: {why}" for name, why in sorted(refused.items()) if why)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


CHILDREN = {"build": build_engines, "ceilings": ceilings, "measure": measure}

if __name__ == "__main__":
    main()
