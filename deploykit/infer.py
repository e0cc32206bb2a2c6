"""The release that is current on this device, as a function from an array to an array that follows every switch.

    from deploykit_device import load
    net = load("/opt/deploykit/my-net/current")
    logits = net(array)

This module runs on devices: standard library, numpy and one runtime, Python 3.10. A picture's file needs Pillow.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit import runtimes, slots
from deploykit.artifact import Artifact, Tensors, TensorSpec, read_artifact
from deploykit.errors import CapabilityError, UsageError, printable
from deploykit.gate import Verdict
from deploykit.runtimes import Session


@dataclass(frozen=True)
class Opened:
    """An engine that is loaded, the release it belongs to, and the descriptor that keeps this from being collected."""

    id: str
    engine: Artifact
    session: Session
    held: int

    def close(self) -> None:
        """Free the session, and let the release go."""
        self.session.close()
        os.close(self.held)


class Network:
    """What `load` gives; call it with an array. Threads may share it: calls wait for each other."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock = root, threading.Lock()
        self._opened = open_current(root)

    def __call__(self, array: NDArray[Any]) -> NDArray[Any] | Tensors:
        """The answer of the current release: an array, or where the network has several outputs, arrays by name.

        `array` is one input or a batch of them. Where scaling and normalising are in the graph that is uint8 pixels, height,
        width, channels; else the normalised float32 tensor, channels first. One input gives an answer without a batch.
        After a switch the next call loads the new release first; when that cannot be loaded the call raises, and the old one
        still answers after a rollback.

        Raises UsageError when the array does not fit.
        """
        with self._lock:
            self._follow()
            return answer(self._opened, array)

    @property
    def release(self) -> str:
        """The identity of the release that answered last."""
        return self._opened.id

    @property
    def classes(self) -> tuple[str, ...]:
        """What the answers' last dimension means."""
        return self._opened.engine.classes

    def close(self) -> None:
        """Free the session; it cannot be called afterwards."""
        self._opened.close()

    def _follow(self) -> None:
        if slots.current(self._root) != self._opened.id:
            before, self._opened = self._opened, open_current(self._root)
            before.close()


def load(path: str | os.PathLike[str]) -> Network:
    """The network at `.../current` on a device.

    Raises UsageError when there is no current release, or its engine is not for this machine and runtime any more, with the
    command that builds it again; CapabilityError where its runtime is not there any more.
    """
    link = Path(path)
    if link.name != slots.CURRENT:
        raise UsageError(f"{printable(link)} is not the link of a current release", fix=f"name .../{slots.CURRENT}")
    return Network(link.parent)


def open_current(root: Path) -> Opened:
    """Load the engine of the current release. Raises UsageError when there is none, or it has to be built again first,
    CapabilityError where its runtime is not there any more."""
    id = slots.current(root)
    if id is None:
        raise UsageError(f"{printable(root)} has no current release", fix="activate one")
    held = slots.hold(root, id)
    try:
        running = slots.read_health(root, id).running
        if running is None or not running.verdicts or set(running.verdicts.values()) != {Verdict.PASS}:
            raise UsageError(f"the release {id} has no engine that passed here", fix="run build, parity and activate")
        engine = read_artifact(root / slots.ENGINES / id / running.engine)
        if engine.identity != running.identity:
            why = "it is another one than was activated"
            raise UsageError(f"the engine {running.engine} cannot be used", why=why, fix="run parity and activate again")
        session = _opened(root, id, engine)
    except BaseException:
        os.close(held)
        raise
    return Opened(id, engine, session, held)


def rebuild_command(root: Path) -> str:
    """What has to be run on this device when an engine is stale."""
    half = root / slots.CURRENT / "device.pyz"
    return f"`python3 {printable(half)} recover --rebuild --root {printable(root)}`"


def _opened(root: Path, id: str, engine: Artifact) -> Session:
    name = str(engine.facts["runtime"])
    runtime = runtimes.get(name)
    if why := runtimes.why_not(name):
        raise CapabilityError(f"the release {id} cannot run here", why=why, fix=runtimes.REGISTRY[name].install)
    found = runtimes.preflight(engine)
    if found != runtimes.LOADS:
        raise UsageError(f"the engine {engine.folder.name} does not load here", why=found, fix=f"run {rebuild_command(root)}")
    return runtime.load(engine)


def answer(opened: Opened, array: NDArray[Any]) -> NDArray[Any] | Tensors:
    """The engine's answer to one input or a batch. Raises UsageError when the array does not fit."""
    engine, source = opened.engine, _only_input(opened.engine)
    rank = len(source.shape)
    if not isinstance(array, np.ndarray) or array.ndim not in (rank - 1, rank):
        what = f"an array with {array.ndim} dimensions" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise UsageError(f"{what} is no input of this network", why=f"one input has {rank - 1} dimensions, a batch {rank}")
    batch = array[None] if array.ndim == rank - 1 else array
    if not len(batch):
        raise UsageError("the batch is empty")
    if engine.preprocess.feeds == "uint8 NCHW" and batch.ndim == 4 and batch.shape[-1] == len(engine.preprocess.channels):
        batch = np.moveaxis(batch, -1, 1)  # pixels come as pictures have them
    count, size = len(batch), source.shape[0]
    fed = np.ascontiguousarray(runtimes.padded(batch, size))
    found = {name: value[:count] for name, value in runtimes.run(opened.session, {source.name: fed}).items()}
    if batch.ndim != array.ndim:
        found = {name: value[0] for name, value in found.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def _only_input(engine: Artifact) -> TensorSpec:
    if len(engine.inputs) != 1:
        names = ", ".join(spec.name for spec in engine.inputs)
        raise UsageError("a device answers for networks with one input", why=f"this one has {len(engine.inputs)}: {names}")
    return engine.inputs[0]


def read_input(path: Path, engine: Artifact) -> NDArray[Any]:
    """An input from a file: a numpy array (.npy) as it is, or a picture, preprocessed as the network wants it.

    Raises UsageError when it cannot be read, CapabilityError for a picture where there is no Pillow.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {printable(path)}")
    if path.suffix == ".npy":
        try:
            # Not np.load, which also opens archives of arrays, whatever they are called.
            with path.open("rb") as file:
                found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise UsageError(f"{printable(path)} is no numpy array", why=str(error)) from error
        return found
    try:
        from deploykit.data.pictures import open_image, preprocess
    except ImportError as error:
        raise CapabilityError("a picture cannot be decoded here", why=str(error), fix="install Pillow, or give a .npy") from error
    return preprocess(open_image(path), engine.preprocess)
