"""Fit the latency predictor and test it on what it was not fitted on: devices left out, networks left out.

python benchmarks/predictor.py rows PUBLISHED.csv   choose the rows by the rule, before anything is fitted
python benchmarks/predictor.py [--output DIR]       cross-validate on them, print every row, keep everything raw
python benchmarks/predictor.py store                fit on all of them and write deploykit/targets/constants.json
python benchmarks/predictor.py kernels [NAME ...]   count the kernels of classifiers and write deploykit/targets/kernels.json
python benchmarks/predictor.py operations           our operation counts beside torchvision's, all of its classifiers
python benchmarks/predictor.py others PUBLISHED.csv  the stored constants on published rows that are not in the list, all tiers
python benchmarks/predictor.py transfer             calibrate each device on a few of its networks, predict its others
python benchmarks/predictor.py time                 how long a prediction takes, by name and by file
"""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _described
import _results
import click
import numpy as np

from deploykit import targets
from deploykit.jsonable import to_json
from deploykit.targets import fit, known, latency
from deploykit.targets.fit import Row
from deploykit.targets.latency import Constants, Domain
from deploykit.targets.layers import Network

HERE = Path(__file__).parent
ROWS = HERE / "predictor_rows.json"
LARGE = 64  # images in a query that stands for "Offline (large batches)", where latency is a straight line of the batch
RULE = (
    "Tiers A and B; GPU alone (no DLA, and on Jetson no MLPerf Offline, which is GPU and DLAs); a device that deploykit/targets "
    "knows; a network that benchmarks/_described.py describes; square input; batch 1, 8, or large: Offline, or 16 and more, of "
    "which the largest. Mean or median latency, or throughput of a known batch. One row for each device, network, input, "
    "precision and batch: of the best tier, the fastest. FP32 counts as TF32 where the GPU has it, as TensorRT's default is."
)
DEVICES = {
    "T4": "t4",
    "TITAN RTX": "titan-rtx",
    "A2": "a2",
    "A30": "a30",
    "A30 MIG 1g.6gb": "a30-mig-1g",
    "A100": "a100",
    "A100-SXM-80GB": "a100",
    "A100-PCIe-80GB": "a100-pcie-80gb",
    "A100-PCIe-40GB": "a100-pcie-40gb",
    "H100-PCIe-80GB": "h100-pcie",
    "H100-SXM-80GB": "h100",
    "Jetson AGX Orin": "agx-orin-64gb",
    "Jetson AGX Orin 64GB": "agx-orin-64gb",
    "Jetson AGX Orin devkit": "agx-orin-64gb",
    "Jetson AGX Orin (Orin-X)": "agx-orin-64gb",
    "Jetson AGX Xavier": "agx-xavier",
    "Jetson AGX Xavier 32GB": "agx-xavier",
    "Jetson Orin Nano 8GB": "orin-nano-8gb",
    "Jetson Nano 4GB": "jetson-nano",
    "Jetson TX2": "jetson-tx2",
}
ROUNDED_GMACS = 0.0005  # what torchvision's figures are rounded by, at most
SAME = {"resnet50_v1.5": "resnet50"}
BY_FRAMEWORK = ("Paddle-TRT predictor", "torch2trt module call", "python, host timing")


@dataclass(frozen=True)
class Published:
    """One published measurement, as chosen."""

    device: str
    target: str
    network: str
    size: int
    precision: latency.Arithmetic
    batch: int
    latency_ms: float
    tier: str
    by_framework: bool
    conditions: str
    source: str

    @property
    def row(self) -> Row:
        board = targets.find(self.target)
        return Row(network(self.network, self.size), board, self.precision, self.batch, self.latency_ms * 1e6, self.by_framework)


@cache
def network(name: str, size: int) -> Network:
    return _described.network(name, size)


@click.group(invoke_without_command=True)
@click.option("--output", type=click.Path(path_type=Path), help="Folder of raw results.")
@click.pass_context
def main(context: click.Context, output: Path | None) -> None:
    if context.invoked_subcommand is None:
        validate(output)


@main.command("rows")
@click.argument("published", type=click.Path(path_type=Path))
def rows_command(published: Path) -> None:
    with published.open() as file:
        found = chosen(csv.DictReader(file))
    ROWS.write_text(json.dumps({"rule": RULE, "rows": [to_json(row) for row in found]}, indent=1) + "\n")
    click.echo(f"{len(found)} rows: {ROWS}")


def chosen(lines: Iterable[dict[str, str]]) -> list[Published]:
    """The rows that the rule names."""
    best: dict[Hashable, Published] = {}
    for line in lines:
        found = admitted(line)
        if found is None:
            continue
        key = (found.target, found.network, found.size, found.precision, found.batch)
        kept = best.get(key)
        if kept is None or (found.tier, found.latency_ms) < (kept.tier, kept.latency_ms):
            best[key] = found
    # Of several large batches of one case, the largest; Offline is one of LARGE.
    most: dict[Hashable, int] = {}
    for row in best.values():
        if row.batch > 8:
            case = (row.target, row.network, row.size, row.precision)
            most[case] = max(most.get(case, 0), row.batch)
    return [row for row in best.values() if row.batch in (1, 8, most.get((row.target, row.network, row.size, row.precision)))]


def admitted(line: dict[str, str]) -> Published | None:
    device, name = line["device"], SAME.get(line["model"], line["model"])
    height, _, width = line["input_hw"].partition("x")
    is_named = device in DEVICES and name in _described.BUILDERS and line["tier"] in "AB"
    if not is_named or "DLA" in device or height != width or line["metric"] == "latency_p90":
        return None
    if not line["batch"] and (device.startswith("Jetson") or "Offline" not in line["conditions"]):
        return None
    batch = int(line["batch"] or LARGE)
    if batch not in (1, 8) and batch < 16:
        return None
    value = float(line["value"])
    board = targets.find(DEVICES[device])
    precision: Any = "tf32" if line["precision"] == "fp32" and board.rate("tf32") else line["precision"]
    return Published(
        device=device,
        target=board.name,
        network=name,
        size=int(height),
        precision=precision,
        batch=batch,
        latency_ms=1e3 * batch / value if line["metric"] == "throughput" else value,
        tier=line["tier"],
        by_framework=any(word in line["conditions"] for word in BY_FRAMEWORK),
        conditions=line["conditions"],
        source=line["source"],
    )


def stored_rows() -> list[Published]:
    return [Published(**row) for row in json.loads(ROWS.read_text())["rows"]]


@dataclass(frozen=True)
class HeldOut:
    """A row that was predicted by constants that were not fitted on it."""

    published: Published
    group: str
    predicted_ms: float
    log_spread: float
    roofline_ms: float
    scaled_ms: float

    @property
    def log_error(self) -> float:
        return float(np.log(self.predicted_ms / self.published.latency_ms))

    @property
    def is_covered(self) -> bool:
        return abs(self.log_error) <= self.log_spread


def cross_validated(rows: Sequence[Published], group_of: Callable[[Published], str], start: Constants) -> list[HeldOut]:
    """Each group predicted from all others; its interval from how far off the others were when they were left out."""
    found: list[tuple[Published, str, float, float, float]] = []
    for group in sorted({group_of(row) for row in rows}):
        inside = [row for row in rows if group_of(row) != group]
        constants, framework_us = fit.fitted([row.row for row in inside], start)
        for row in (row for row in rows if group_of(row) == group):
            one = row.row
            host = 1e3 * framework_us[one.target.is_jetson] * row.by_framework
            predicted = latency.total_ns(one.network, one.target, one.precision, one.batch, constants) + host
            found.append((row, group, predicted / 1e6, roofline_ms(one), scaled_ms(row, inside)))
    held = []
    for row, group, predicted_ms, roofline, scaled in found:
        others = [(np.log(ms / other.latency_ms), theirs) for other, theirs, ms, _, _ in found if theirs != group]
        spread = fit.spread([float(error) for error, _ in others], [theirs for _, theirs in others])
        held.append(HeldOut(row, group, predicted_ms, spread, roofline, scaled))
    return held


def roofline_ms(row: Row) -> float:
    """The first rival: each kernel at the peak rate or the full bandwidth, whichever is slower."""
    rate, bandwidth = row.target.rate(row.precision), 1e9 * row.target.value("bandwidth_gbs")
    width = latency.WIDTHS[row.precision]
    return sum(
        1e3 * max(2 * layer.macs * row.batch / rate, layer.bytes(width, row.batch) / bandwidth) for layer in row.network.layers
    )


def scaled_ms(row: Published, inside: Sequence[Published]) -> float:
    """The second rival: the measured case nearest in operations, scaled by operations, and by peak rate where it must be.

    Nearest among those of the same device, precision and batch; where there are none, of the same precision and batch.
    """
    macs, board = network(row.network, row.size).macs, targets.find(row.target)
    same = [r for r in inside if (r.batch > 8, r.batch == 1, r.precision) == (row.batch > 8, row.batch == 1, row.precision)]
    same = same or [r for r in inside if (r.batch > 8, r.batch == 1) == (row.batch > 8, row.batch == 1)]
    near = [r for r in same if r.target == row.target] or same

    def work(r: Published) -> float:
        return network(r.network, r.size).macs * r.batch / targets.find(r.target).rate(r.precision)

    if not near:
        return float("nan")
    best = min(near, key=lambda r: abs(np.log(network(r.network, r.size).macs / macs)))
    return best.latency_ms * macs * row.batch / board.rate(row.precision) / work(best)


def percent(log_error: float) -> float:
    """|predicted / measured - 1| in percent."""
    return 100 * abs(float(np.exp(log_error)) - 1)


def summary(name: str, held: Sequence[HeldOut]) -> dict[str, float]:
    errors = [percent(row.log_error) for row in held]
    rivals = {
        rival: [100 * abs(getattr(row, rival) / row.published.latency_ms - 1) for row in held if getattr(row, rival) > 0]
        for rival in ("roofline_ms", "scaled_ms")
    }
    found = {"rows": len(held), "median": statistics.median(errors), "p90": float(np.percentile(errors, 90))}
    found["coverage"] = 100 * sum(row.is_covered for row in held) / len(held)
    groups = {row.group: [other.is_covered for other in held if other.group == row.group] for row in held}
    found["coverage, groups alike"] = 100 * statistics.mean(statistics.mean(covered) for covered in groups.values())
    for rival, values in rivals.items():
        found |= {f"{rival} median": statistics.median(values), f"{rival} p90": float(np.percentile(values, 90))}
    click.echo(
        f"{name:34} {len(held):4} rows   median {found['median']:5.1f} %   p90 {found['p90']:5.1f} %"
        f"   covered {found['coverage']:3.0f} %"
        f" ({found['coverage, groups alike']:.0f} % where groups count alike)"
        f"   | peak roofline {found['roofline_ms median']:5.1f}, {found['roofline_ms p90']:5.1f}"
        f"   | scaled by operations {found['scaled_ms median']:5.1f}, {found['scaled_ms p90']:5.1f}"
    )
    return found


def validate(output: Path | None) -> None:
    rows, start = stored_rows(), latency.Fit.stored().gpu_start
    click.echo(f"{RULE}\n")
    raw: dict[str, Any] = {"rule": RULE}
    for what, group_of in (
        ("device", lambda row: row.target),
        ("network", lambda row: row.network),
        ("architecture", lambda row: targets.find(row.target).compute_capability),
    ):
        held = cross_validated(rows, group_of, start)
        click.echo(f"leave one {what} out")
        for row in held:
            told = row.published
            click.echo(
                f"  {told.target:16} {told.network:20} {told.size:5} {told.precision} {told.batch:4} {told.tier}"
                f" {told.latency_ms:9.3f} ms, predicted {row.predicted_ms:9.3f} {percent(row.log_error):6.1f} %"
                f" {'' if row.is_covered else 'OUTSIDE'}"
            )
        raw[what] = {"rows": [to_json(row) for row in held]}
        raw[what]["all"] = summary(f"leave one {what} out: all", held)
        for tier in "AB":
            raw[what][tier] = summary(f"  tier {tier}", [row for row in held if row.published.tier == tier])
        for batch, named in ((1, "batch 1"), (8, "batch 8")):
            summary(f"  {named}", [row for row in held if row.published.batch == batch])
        summary("  large batches", [row for row in held if row.published.batch > 8])
        click.echo()
    _results.write("predictor", raw, output)


@main.command("store")
def store_command() -> None:
    """Fit on all rows, take the interval from devices and networks left out, and write the constants."""
    stored, rows = latency.Fit.stored(), stored_rows()
    constants, framework_us = fit.fitted([row.row for row in rows], stored.gpu_start)
    ways = {
        "device": cross_validated(rows, lambda row: row.target, stored.gpu_start),
        "network": cross_validated(rows, lambda row: row.network, stored.gpu_start),
    }
    spread = max(fit.spread([row.log_error for row in held], [row.group for row in held]) for held in ways.values())
    facts = {f"leave one {what} out": summary(what, held) for what, held in ways.items()}
    sizes = [network(row.network, row.size).macs / 1e9 for row in rows]
    domain = Domain(
        compute_capabilities=tuple(sorted({targets.find(row.target).compute_capability for row in rows})),
        precisions=tuple(sorted({row.precision for row in rows})),
        kinds=("convolution", "depthwise", "matrix"),
        least_gmacs=round(min(sizes), 3),
        most_gmacs=round(max(sizes), 1),
        most_batch=max(row.batch for row in rows),
    )
    content = {
        "gpu": {**_rounded(constants), "log_spread": round(spread, 3)},
        "gpu_start": to_json(stored.gpu_start),
        "cpu": to_json(stored.cpu),
        "domain": to_json(domain),
        "facts": {"rows": len(rows), "framework_us": [round(each, 1) for each in framework_us], "rule": RULE, **facts},
    }
    path = Path(latency.__file__).with_name("constants.json")
    path.write_text(json.dumps(content, indent=1) + "\n")
    click.echo(f"{path}\n{json.dumps(content['gpu'])}")


def _rounded(constants: Constants) -> dict[str, float]:
    values: Any = to_json(constants)
    return {name: float(f"{value:.4g}") for name, value in values.items()}


@main.command("kernels")
@click.argument("names", nargs=-1)
@click.option("--most-gmacs", type=float, default=math.inf, help="Leave larger networks out.")
@click.option("--again", is_flag=True, help="Those too that are stored.")
def kernels_command(names: tuple[str, ...], most_gmacs: float, again: bool) -> None:
    """Of these networks, or of all classifiers; small ones first. What is stored counts as done, so it may be interrupted."""
    from deploykit import models
    from deploykit.forecast import graphs

    for entry in sorted(models.catalogue(), key=lambda entry: entry.gmacs):
        is_wanted = entry.name in names if names else entry.task == "classify" and entry.gmacs <= most_gmacs
        if is_wanted and (again or known.network(entry.name) is None):
            start = time.perf_counter()
            found = graphs.built(entry.name)
            keep(found)
            click.echo(
                f"{entry.name}: {len(found.layers)} kernels, {found.macs / 1e9:.3f} GMACs ({time.perf_counter() - start:.0f} s)"
            )


def keep(found: Network) -> None:
    """Store a network's kernels, in place of older ones of its name; one line for each network."""
    content = {**json.loads(known.STORED.read_text()), found.name: [astuple(layer) for layer in found.layers]}
    lines = [f"{json.dumps(name)}: {json.dumps(content[name], separators=(',', ':'))}" for name in sorted(content)]
    known.STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@main.command("operations")
@click.option("--most-gmacs", type=float, default=math.inf, help="Leave larger networks out, and say so.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of raw results.")
def operations_command(most_gmacs: float, output: Path | None) -> None:
    """torchvision counts multiply-accumulates of convolutions and matrix products and calls them operations.

    Its figures are rounded to a thousandth of 10^9; only what is farther off than that is a difference.
    """
    import torchvision
    from torchvision.models import get_model_weights, list_models

    from deploykit import forecast

    counted = {
        name: next((float(one.meta["_ops"]) for one in get_model_weights(name) if "_ops" in one.meta), 0.0)
        for name in list_models(module=torchvision.models)
    }
    errors: dict[str, float] = {}
    rows = []
    for name, wanted in sorted(counted.items(), key=lambda item: item[1]):
        if 0 < wanted <= most_gmacs:
            found = forecast.network_of(name).macs / 1e9
            beyond = max(0.0, abs(found - wanted) - ROUNDED_GMACS)
            errors[name] = 100 * math.copysign(beyond, found - wanted) / wanted
            rows.append({"network": name, "gmacs": found, "torchvision_gmacs": wanted, "percent": errors[name]})
            click.echo(f"{name:28} {found:9.4f} {wanted:9.3f} {errors[name]:6.2f} %")
    worst = max(errors, key=lambda name: abs(errors[name]))
    click.echo(f"{len(errors)} networks of {len(counted)}; farthest off: {worst}, {errors[worst]:.2f} %")
    _results.write("predictor_operations", {"rounded_gmacs": ROUNDED_GMACS, "rows": rows}, output)


@main.command("others")
@click.argument("published", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder of raw results.")
def others_command(published: Path, output: Path | None) -> None:
    """Rows that the list leaves out: tier C, other batches, whatever harness; nothing was fitted on them, nothing left out."""
    listed = {(row.target, row.network, row.size, row.precision, row.batch, row.latency_ms) for row in stored_rows()}
    rows = []
    with published.open() as file:
        for line in csv.DictReader(file):
            # To the rule, a row of tier C or of another batch looks like one of tier B and batch 1.
            found = admitted({**line, "tier": min(line["tier"], "B"), "batch": "1"}) if line["batch"] else None
            if found is None:
                continue
            factor = int(line["batch"]) if line["metric"] == "throughput" else 1
            row = replace(found, tier=line["tier"], batch=int(line["batch"]), latency_ms=found.latency_ms * factor)
            if (row.target, row.network, row.size, row.precision, row.batch, row.latency_ms) in listed:
                continue
            board = targets.find(row.target)
            if board.rate(row.precision) <= 0:
                click.echo(f"{row.target} has no {row.precision}: {row.network}")
                continue
            rows.append((row, latency.predict(network(row.network, row.size), board, row.precision, batch=row.batch)))
    told: list[dict[str, Any]] = []
    for row, predicted in rows:
        ms, (low, high) = predicted.latency_ns / 1e6, predicted.interval_ns
        is_covered = low <= 1e6 * row.latency_ms <= high
        told.append({"row": to_json(row), "predicted_ms": ms, "covered": is_covered, "outside": list(predicted.outside)})
        click.echo(
            f"{row.target:16} {row.network:18} {row.size:5} {row.precision} {row.batch:4} {row.tier} {row.latency_ms:9.3f} ms, "
            f"predicted {ms:9.3f} {percent(math.log(ms / row.latency_ms)):6.1f} % {'' if is_covered else 'OUTSIDE'} "
            f"{'; '.join(predicted.outside)}"
        )
    for name, some in (("all", told), ("that the data cover", [each for each in told if not each["outside"]])):
        errors = [percent(math.log(each["predicted_ms"] / each["row"]["latency_ms"])) for each in some]
        covered = 100 * statistics.mean(each["covered"] for each in some)
        click.echo(
            f"{name}: {len(some)} rows   median {statistics.median(errors):.1f} %   p90 {np.percentile(errors, 90):.1f} %"
            f"   covered {covered:.0f} %"
        )
    _results.write("predictor_others", {"rows": told}, output)


@main.command("transfer")
def transfer_command() -> None:
    """Each device with four networks and more: its own rows of some of them, drawn eight times, for the others."""
    stored, rows = latency.Fit.stored(), stored_rows()
    found: dict[int, list[tuple[float, bool]]] = {}
    for device in sorted({row.target for row in rows}):
        mine = [row for row in rows if row.target == device and not row.by_framework]
        names = sorted({row.network for row in mine})
        if len(names) < 4:
            continue
        constants, _ = fit.fitted([row.row for row in rows if row.target != device], stored.gpu_start)
        constants = replace(constants, log_spread=stored.gpu.log_spread)
        draws = [(0, set[str](), constants)]
        for count in (1, 2, 3, 5):
            for seed in range(8 if len(names) > count + 1 else 0):
                drawn = set(random.Random(seed).sample(names, count))
                draws.append((count, drawn, fit.calibrated([row.row for row in mine if row.network in drawn], constants)))
        for count, drawn, used in draws:
            for one in (row.row for row in mine if row.network not in drawn):
                error = math.log(latency.total_ns(one.network, one.target, one.precision, one.batch, used) / one.latency_ns)
                found.setdefault(count, []).append((error, abs(error) <= used.log_spread))
    for count, each in sorted(found.items()):
        errors = [percent(error) for error, _ in each]
        click.echo(
            f"{count} networks measured: {len(each):4} predictions   median {statistics.median(errors):5.1f} %"
            f"   p90 {np.percentile(errors, 90):5.1f} %   covered {100 * statistics.mean(ok for _, ok in each):3.0f} %"
        )


@main.command("time")
def time_command() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        model = _described.BUILDERS["resnet50"](224)
        for constant in model.graph.initializer:
            constant.raw_data = bytes(4 * math.prod(constant.dims))
        path.write_bytes(model.SerializeToString())
        for words in (["resnet50"], [str(path)]):
            start = time.perf_counter()
            command = [sys.executable, "-m", "deploykit", "predict", *words, "--target", "orin-nano", "--precision", "int8"]
            subprocess.run(command, check=True, capture_output=True)
            click.echo(f"deploykit predict {Path(words[0]).name}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
