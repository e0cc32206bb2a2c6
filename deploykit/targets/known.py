"""The kernels of networks that have a name, counted before: building and exporting one takes longer than its prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploykit.targets.layers import Layer, Network

# One line for each network, so that a change of one is a change of one line. `benchmarks/predictor.py kernels` writes it.
STORED = Path(__file__).with_name("kernels.json")


def network(name: str) -> Network | None:
    """The network of that name, as torch exports it for one image; None for one that was not counted."""
    kernels = json.loads(STORED.read_text()).get(name)
    return None if kernels is None else Network.of(name, [_layer(*kernel) for kernel in kernels])


def _layer(name: str, kind: Any, operators: list[str], *sizes: Any) -> Layer:
    return Layer(name, kind, tuple(operators), *sizes)
