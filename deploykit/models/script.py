"""Weights out of a TorchScript file, for users who trust it: loading one runs the program in it."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from deploykit.errors import ModelError, printable


def is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by the names of its members; a damaged one is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.rpartition("/")[2] == "constants.pkl" for member in archive.namelist())
    except Exception:  # zipfile raises anything for damaged archives, and who reads the file says what is wrong with it
        return False


def weights(path: Path) -> Mapping[str, torch.Tensor]:
    """The parameters and buffers of the module that was saved, by name. The program in the file runs.

    Raises ModelError when it is damaged, when torch cannot load it, or when it has no named weights, as a frozen one.
    """
    check_members(path)
    name = printable(path)
    try:
        with warnings.catch_warnings():
            # torch deprecates torch.jit: FutureWarning in 2.15, DeprecationWarning before.
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.")
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except Exception as error:  # the program may raise what it likes while it is loaded
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the TorchScript file {name}", why=why) from error
    found: Mapping[str, torch.Tensor] = module.state_dict()
    if not found:
        raise ModelError(
            f"{name} holds no weights by name",
            why="it was frozen: the weights are constants in its program",
            fix="take the file that it was frozen from, or compare it as it is: deploykit parity A B --trust",
        )
    return found


def check_members(path: Path) -> None:
    """Compare every member with its checksum: torch takes what its buffer happens to hold where one cannot be unpacked.

    Raises ModelError for a damaged file.
    """
    name = printable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # zipfile raises anything for damaged archives
        raise ModelError(f"cannot load the TorchScript file {name}", why=f"it is damaged: {error}") from error
    if bad is not None:
        raise ModelError(f"cannot load the TorchScript file {name}", why=f"it is damaged: {bad!r} has another checksum")
