"""Accuracy of trained networks that were made hard to quantize: rescaled, so that float is as before and one scale for a
whole tensor is not enough. Plain min/max without equalization beside the default.

usage: python benchmarks/hard_networks.py --images DIR --checkpoint NETWORK=FILE [--checkpoint ...] [--size N] [--output DIR]

NETWORK is cifar_resnet20 (32, ...), resnet18 (34) or mobilenet_v2; DIR holds `train/<class>/` for calibration and
`test/<class>/` for the judgement. MobileNetV2 gets Relu for its Relu6, which alone keeps the function when it is rescaled.
Channels between two convolutions are multiplied by factors spread over three decades, or by 1000 in one channel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import write
from torch import nn

from deploykit import models
from deploykit.recipe import ModelTable, PreprocessTable

WAYS = ("as trained", "three decades", "one outlier x1000")
# What the recipe names as its network. The process that exports makes it again, so nothing has to be pickled.
FACTORY = """
import sys

sys.path.insert(0, {folder!r})
from hard_networks import rescaled


def build():
    return rescaled({network!r}, {checkpoint!r}, {size!r}, {way!r})
"""
PLAIN = ["--set", "quantize.equalize=false", "--set", "quantize.target_sqnr_db=0", "--set", "quantize.method=minmax"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", action="append", required=True, metavar="NETWORK=FILE")
    parser.add_argument("--size", type=int, help="pictures are resized to this; else as the network's preset says")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for text in arguments.checkpoint:
        network, _, checkpoint = text.partition("=")
        for way in WAYS:
            with tempfile.TemporaryDirectory() as scratch:
                values = {"network": network, "checkpoint": checkpoint, "size": arguments.size, "way": way}
                code = FACTORY.format(folder=str(Path(__file__).parent), **values)
                Path(scratch, "network.py").write_text(code)
                for how, words in (("plain min/max", PLAIN), ("default", [])):
                    result = _export(Path(scratch), arguments.images, words, Path(scratch, how.replace("/", "")))
                    found += [_kept(case, result, network, way, how) for case in result["parity"] if case["precision"] == "int8"]
                    print(_line(found[-1]), flush=True)
    write("hard_networks", {"cases": found}, arguments.output)


def rescaled(network: str, checkpoint: str, size: int | None, way: str) -> nn.Module:
    """The trained network with its preprocessing, made hard to quantize in one of `WAYS`."""
    model = models.load(ModelTable(name=network, weights=checkpoint), PreprocessTable(resize=size, crop=size))
    _without_bounds(model.module)
    _rescale(model.module, way)
    how = model.preprocess
    prepared = {"resize": how.resize, "crop": how.crop[0], "mean": list(how.mean), "std": list(how.std)}
    model.module.preprocess = {key: value for key, value in prepared.items() if value is not None}  # type: ignore[assignment]
    return model.module


def _without_bounds(module: nn.Module) -> None:
    """Relu for every Relu6."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU6):
            setattr(module, name, nn.ReLU())
        else:
            _without_bounds(child)


def _rescale(module: nn.Module, way: str) -> None:
    """Multiply what each BatchNorm writes, and divide the weights of the convolution that alone reads it."""
    random = np.random.default_rng(0)
    for norm, reader in _chained(module):
        factors = _factors(way, norm.num_features, random)
        norm.weight.data *= factors
        norm.bias.data *= factors
        reader.weight.data /= factors.reshape(-1, 1, 1, 1) if reader.groups > 1 else factors.reshape(1, -1, 1, 1)


def _factors(way: str, channels: int, random: np.random.Generator) -> torch.Tensor:
    factors = np.ones(channels)
    if way == "three decades":
        factors = 10 ** random.uniform(-1.5, 1.5, channels)
    elif way == "one outlier x1000":
        factors[random.integers(channels)] = 1000
    return torch.from_numpy(factors).float()


def _chained(module: nn.Module) -> Iterator[tuple[nn.BatchNorm2d, nn.Conv2d]]:
    """Inside residual blocks: each BatchNorm with a Relu behind it, and the convolution after that."""
    for block in module.modules():
        parts = dict(block.named_children())
        inside = parts.get("conv", nn.Identity())
        names = ("conv1", "bn1", "conv2")
        layers = [parts[name] for name in names] if parts.keys() >= set(names) else list(inside.modules())
        layers = [layer for layer in layers if isinstance(layer, (nn.BatchNorm2d, nn.Conv2d))]
        for norm, reader in zip(layers[1:-1:2], layers[2::2], strict=True):  # Conv, BatchNorm, Conv, BatchNorm, ...
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(reader, nn.Conv2d)
            yield norm, reader


def _export(scratch: Path, images: Path, words: list[str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "deploykit", "export", f"{scratch / 'network.py'}:build", *words]
    command += ["--validate", str(images / "test"), "--calibrate", str(images / "train"), "--calibration-images", "256"]
    command += [
        "--int8",
        "--to",
        "onnxruntime",
        "--set",
        "benchmark.enabled=false",
        "--set",
        "quantize.speed=false",
        "--output",
        str(folder),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1, 3):  # a ruined network may fail its gates, which is what is measured
        sys.exit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _kept(case: dict[str, Any], result: dict[str, Any], network: str, way: str, how: str) -> dict[str, Any]:
    stages = {stage["name"]: stage["summary"] for stage in result["stages"]}
    kept = {key: case[key] for key in ("label", "images", "agreement", "accuracy")}
    return {"network": network, "way": way, "quantized": how, **kept, "equalize": stages.get("equalize", "off")}


def _line(case: dict[str, Any]) -> str:
    mine, theirs = 100 * case["accuracy"]["engine"], 100 * case["accuracy"]["reference"]
    return (
        f"{case['network']:16} {case['way']:18} {case['quantized']:14} {case['label']:34} {mine:6.2f} % (FP32 {theirs:.2f} %), "
        f"same top-1 on {100 * case['agreement']:.2f} % of {case['images']}; equalize: {case['equalize']}"
    )


if __name__ == "__main__":
    main()
