"""Checkpoints as people have them: read without running code, and fitted to a network without guessing."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from deploykit.errors import ModelError, printable

_LISTED = 10
_KINDS = {
    b"\x89PNG": "it is a PNG image",
    b"\xff\xd8\xff": "it is a JPEG image",
    b"\x1f\x8b": "it is a gzip archive: unpack it first",
    b"\x89HDF": "it is an HDF5 file",
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
}


class StateDict(dict[str, torch.Tensor]):
    """Names to tensors, with the module versions that PyTorch keeps beside them (None: the file had none)."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], versions: Mapping[str, Any] | None = None) -> None:
        super().__init__(tensors)
        self.versions = versions
        if versions is not None:
            # Where nn.Module.load_state_dict looks for them: MNASNet and others read old layouts by version.
            self._metadata = dict(versions)

    @classmethod
    def of(cls, content: Mapping[str, torch.Tensor]) -> StateDict:
        """A mapping as `torch.load` gives it, apart from any computation that its tensors belonged to."""
        versions = getattr(content, "_metadata", None)
        tensors = {name: tensor.detach() for name, tensor in content.items()}
        return cls(tensors, versions if isinstance(versions, Mapping) else None)


def load_state_dict(path: Path, key: str | None = None) -> StateDict:
    """Read the weights in a checkpoint: .safetensors, or what `torch.save` wrote in either of its two formats.

    The weights may be the whole content or one of its entries (`state_dict`, `model`, ...); `key` says which when
    several entries are mappings of names to tensors. Nothing in the file is executed (`weights_only`).

    Raises ModelError, naming the file, when it is missing, damaged, of another kind, wants to run code, holds no
    weights or several, or when a weight is not a tensor, is NaN or infinite.
    """
    try:
        if not path.is_file():
            why = "it is a directory" if path.is_dir() else "it is not a file" if path.exists() else "there is no such file"
            raise ModelError(f"cannot read the weights {printable(path)}", why=why)
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except OSError as error:
        raise ModelError(f"cannot read the weights {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    chosen = _choose(content, key, printable(path))
    _check(chosen, printable(path))
    return StateDict.of(chosen)


def fit(
    build: Callable[[int | None], nn.Module], state_dict: StateDict, *, source: str, classes: int | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a network that takes all of `state_dict` and nothing else, and load it. Returns it with notes.

    `build` makes the network with a number of classes (None: its own). When the head is all that differs and `classes`
    is None, the network is built again with the checkpoint's number of classes. Leading names that all keys share
    (`module.`, `_orig_mod.`, `model.`) are taken off until they meet the network's. BatchNorm's
    `num_batches_tracked`, which files from before PyTorch 0.4.1 lack, may be missing. `source` names the checkpoint.

    Raises ModelError listing missing and unexpected names, other shapes and other kinds of number.
    """
    module = build(classes)
    state_dict = _without_wrapper(state_dict, module.state_dict())
    difference = _load(module, state_dict)
    notes = _conversions(module, state_dict, source)
    if difference.head is not None:
        head = difference.head
        if classes is not None:
            raise ModelError(_two_heads(source, head), fix=f"set model.classes = {head.found}, or leave it out")
        module = build(head.found)
        if _load(module, state_dict):
            raise ModelError(_two_heads(source, head), fix="let the factory that builds the network take num_classes")
        notes += (f"{source} has {head.found} classes, so the network was built with {head.found}",)
    elif difference:
        raise ModelError(
            f"{source} does not fit the network", problems=difference.problems(), why="all weights must be there, and no others"
        )
    return module, notes


@dataclass(frozen=True)
class _Head:
    """The tensor that shows another number of classes than the network's."""

    name: str
    found: int
    wanted: int


@dataclass(frozen=True)
class _Difference:
    """How a state_dict and a network differ; false when they do not."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    other: str = ""
    head: _Head | None = None

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched or self.other)

    def problems(self) -> list[str]:
        groups = (("missing", self.missing), ("unexpected", self.unexpected), ("different", self.mismatched))
        listed = [f"{len(names)} {what}: {_first(names, '; ')}" for what, names in groups if names]
        return [*listed, self.other] if self.other else listed


def _load(module: nn.Module, state_dict: StateDict) -> _Difference:
    """Load what fits, and say what does not.

    Names are compared by `nn.Module.load_state_dict` itself, so that modules which rename old keys are heard.
    """
    network = module.state_dict()
    shared = {name: (network[name], tensor) for name, tensor in state_dict.items() if name in network}
    # copy_ would cast quantized or integer weights to float without their scale.
    mismatched = {
        name: f"{name} is {_describe(found)}, the network has {_describe(wanted)}"
        for name, (wanted, found) in shared.items()
        if wanted.shape != found.shape or wanted.is_floating_point() != found.is_floating_point()
    }
    fitting = StateDict({name: tensor for name, tensor in state_dict.items() if name not in mismatched}, state_dict.versions)
    try:
        keys = module.load_state_dict(fitting, strict=False)
    except (RuntimeError, ValueError) as error:
        return _Difference((), (), tuple(mismatched.values()), other=str(error))
    missing = tuple(name for name in keys.missing_keys if name not in mismatched and not name.endswith("num_batches_tracked"))
    unexpected = tuple(keys.unexpected_keys)
    head = None if missing or unexpected else _head([(name, *shared[name]) for name in mismatched])
    return _Difference(missing, unexpected, tuple(mismatched.values()), head=head)


def _head(mismatched: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> _Head | None:
    """The first tensor's name and both numbers of classes, when all tensors differ by the same first dimensions only."""
    heads = [
        _Head(name, found.shape[0], wanted.shape[0])
        for name, wanted, found in mismatched
        if found.dim() and wanted.dim() and found.shape[1:] == wanted.shape[1:] and found.shape != wanted.shape
    ]
    numbers = {(head.found, head.wanted) for head in heads}
    return heads[0] if len(heads) == len(mismatched) and len(numbers) == 1 else None


def _two_heads(source: str, head: _Head) -> str:
    return f"{source} has {head.found} classes (tensor {head.name}), the network has {head.wanted}"


def _without_wrapper(state_dict: StateDict, network: Mapping[str, torch.Tensor]) -> StateDict:
    """Names without what DataParallel, torch.compile, Lightning and weight averaging put before them.

    Left as they are when that never meets the network's names, so that messages show what the file holds.
    """
    # torch.optim.swa_utils.AveragedModel counts beside the network that it wraps.
    tensors = {name: tensor for name, tensor in state_dict.items() if name != "n_averaged" or name in network}
    stripped, removed = dict(tensors), ""
    while stripped and not any(name in network for name in stripped):
        prefixes = {name.partition(".")[0] + "." for name in stripped}
        if len(prefixes) > 1 or any("." not in name for name in stripped):
            return state_dict
        (prefix,) = prefixes
        removed += prefix
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
    versions = state_dict.versions
    if versions is not None and removed:
        versions = {name[len(removed) :]: value for name, value in versions.items() if f"{name}.".startswith(removed)}
    return StateDict(stripped, versions)


def _conversions(module: nn.Module, state_dict: StateDict, source: str) -> tuple[str, ...]:
    """A note on weights that were stored in another float type than the network's."""
    network = module.state_dict()
    stored = {
        str(tensor.dtype).removeprefix("torch.")
        for name, tensor in state_dict.items()
        if name in network and tensor.is_floating_point() and tensor.dtype != torch.float32
    }
    return (f"{source} stores {' and '.join(sorted(stored))}; the weights were converted to float32",) if stored else ()


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise ModelError(f"cannot read the weights {printable(path)}", why=f"damaged or not safetensors: {error}") from error


def _read_pickle(path: Path) -> Any:
    name = printable(path)
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _refuse_other_archives(path)
        else:
            _refuse_other_kinds(path)
        with warnings.catch_warnings():
            # torch warns about pickle protocols; what follows from them is an error, handled below.
            warnings.simplefilter("ignore")
            # Files from before PyTorch 1.6 refuse to be mapped; mapping the others keeps memory at one copy.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, ModelError):
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            # Without torch's own text, which recommends weights_only=False.
            raise ModelError(
                f"cannot read the weights {name}", why="it is damaged, or a pickle that torch.save did not write"
            ) from error
        raise ModelError(
            f"refused to load {name}: it wants {wanted.group(1)}",
            why="it holds Python objects besides weights, and unpickling those can run any code",
            fix="save the weights alone, where you trust the file: torch.save(model.state_dict(), FILE)",
        ) from error
    except Exception as error:  # damaged archives and pickles raise anything: EOFError, KeyError, UnicodeDecodeError, ...
        raise ModelError(f"cannot read the weights {name}", why=f"truncated or damaged: {_line(error)}") from error


def _refuse_other_archives(path: Path) -> None:
    """A zip must be a checkpoint: torch.load would hand a TorchScript archive to another reader."""
    name = printable(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.rpartition("/")[2] for member in archive.namelist()}
    if "constants.pkl" in members:
        kind = "a TorchScript archive"
    elif members & {"archive_format", "serialized_exported_program.json"}:
        kind = "an exported program (.pt2)"
    elif "data.pkl" not in members:
        raise ModelError(f"cannot read the weights {name}", why="it is a zip archive without a checkpoint in it")
    else:
        return
    raise ModelError(
        f"cannot take weights from {name}",
        why=f"it is {kind}: a finished program, which deploykit would have to run",
        fix="save the network's weights: torch.save(model.state_dict(), FILE), and name the network's code",
    )


def _refuse_other_kinds(path: Path) -> None:
    """Whatever is neither a zip nor a pickle of protocol 2 or later."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x80"):
        return
    why = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "")
    if not start:
        why = "it is empty"
    elif start.startswith(b"PK"):
        why = "it is truncated: the end of the archive is missing"
    elif start.lstrip().startswith(b"<"):
        why = "it is a web page or XML: the download went wrong"
    raise ModelError(
        f"{printable(path)} is not a checkpoint",
        why=why or f"it starts with {start[:16]!r}",
        fix="give a file that torch.save or safetensors wrote",
    )


def _choose(content: Any, key: str | None, name: str) -> Mapping[str, Any]:
    """The mapping of names to tensors in what was read."""
    if not isinstance(content, Mapping):
        raise ModelError(f"{name} holds no weights", why=f"it holds a {type(content).__name__}, not names and tensors")
    candidates: dict[str, Mapping[str, Any]] = {entry: value for entry, value in content.items() if _holds_weights(value)}
    if key is not None:
        if key in candidates:
            return candidates[key]
        found = ", ".join(map(str, candidates)) or "no entry of the file"
        raise ModelError(f"{name} has no weights under {key!r}", why=f"{found} holds weights", fix="change model.weights_key")
    if len(candidates) > 1:
        listed = [f"{entry}: {len(value)} tensors" for entry, value in candidates.items()]
        raise ModelError(
            f"{name} holds several sets of weights",
            problems=listed,
            fix=f"set model.weights_key, such as {next(iter(candidates))}",
        )
    if candidates:
        return next(iter(candidates.values()))
    if _holds_weights(content):
        return content
    raise ModelError(f"{name} holds no weights", why=f"its entries are {_first([str(entry) for entry in content]) or 'none'}")


def _holds_weights(value: Any) -> bool:
    """Whether a value is a mapping with weights in it; random generators' states, for example, are not floating."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in value.values())
    )


def _check(state_dict: Mapping[str, Any], name: str) -> None:
    """Raise ModelError naming all values that are no tensors, or no numbers."""
    strangers = [f"{key} ({type(value).__name__})" for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise ModelError(f"{name} holds values that are not tensors", problems=[f"{len(strangers)}: {_first(strangers)}"])
    # float() because some of the 8-bit types have no isfinite.
    floating = {key: value for key, value in state_dict.items() if value.is_floating_point()}
    broken = [key for key, value in floating.items() if not bool(torch.isfinite(value.float()).all())]
    if broken:
        raise ModelError(
            f"{name} holds NaN or infinite weights",
            problems=[f"{len(broken)}: {_first(broken)}"],
            why="the training diverged, or float16 overflowed",
        )


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _first(names: Iterable[str], separator: str = ", ") -> str:
    """The first few names; an ellipsis stands for the rest."""
    listed = list(names)
    return separator.join(listed[:_LISTED]) + (f"{separator}..." if len(listed) > _LISTED else "")


def _line(error: Exception) -> str:
    """The first line of an error's text, or its type when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
