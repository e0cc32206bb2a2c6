"""Checkpoints as people have them: read without running code, and fitted to a network without guessing."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from deploykit.errors import ModelError, like, printable
from deploykit.intake import door
from deploykit.models import script, stored
from deploykit.models.names import Adapt, hint, unwrapped
from deploykit.models.state_dict import StateDict

_LISTED = 10
# Entries of Lightning checkpoints that may hold tensors, such as weights of classes, and are never the network.
_SETTINGS = ("hyper_parameters", "datamodule_hyper_parameters")


def load_state_dict(path: Path, key: str | None = None, *, trust: bool = False) -> StateDict:
    """Read the weights in a checkpoint: .safetensors, or what `torch.save` wrote in either of its two formats.

    The weights may be the whole content or one of its entries (`state_dict`, `model`, ...); `key` says which when
    several entries are mappings of names to tensors: an entry, one inside another (`ema.state_dict`), or the first part
    of the names (`ema_model`). Nothing in the file is executed or unpickled, unless `trust` allows it: then the
    weights of a TorchScript file are taken as well.

    Raises ModelError, naming the file, when it is missing, damaged, of another kind, wants to run code, holds no
    weights or several, or when a weight is not a tensor, is NaN or infinite.
    """
    try:
        if not path.is_file():
            why = "it is a directory" if path.is_dir() else "it is not a file" if path.exists() else "there is no such file"
            raise ModelError(f"cannot read the weights {printable(path)}", why=why, fix="" if path.exists() else like(path))
        if trust and script.is_script(path):
            content: Any = script.weights(path)
        else:
            content = _read_safetensors(path) if path.suffix == ".safetensors" else stored.read(path)
    except OSError as error:
        raise ModelError(f"cannot read the weights {printable(path)}", why=(error.strerror or str(error)).lower()) from error
    chosen = _choose(content, key, printable(path))
    _check(chosen, printable(path))
    return StateDict.of(chosen)


def fit(
    build: Callable[[int | None], nn.Module],
    state_dict: StateDict,
    *,
    source: str,
    classes: int | None = None,
    adapt: Adapt = lambda found: found,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a network that takes all of `state_dict` and nothing else, and load it. Returns it with notes.

    `build` makes the network with a number of classes (None: its own). When the head is all that differs and `classes`
    is None, the network is built again with the checkpoint's number of classes. What training put before the names is
    taken off, see `names.unwrapped`; `adapt` brings names of older versions up to date. BatchNorm's
    `num_batches_tracked`, which files from before PyTorch 0.4.1 lack, may be missing. `source` names the checkpoint.

    Raises ModelError listing missing and unexpected names, other shapes and other kinds of number.
    """
    module = build(classes)
    original = state_dict
    state_dict, notes = unwrapped(original, module.state_dict(), source=source, adapt=adapt)
    difference = _load(module, state_dict)
    notes += _conversions(module, state_dict, source)
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
            f"{source} does not fit the network",
            problems=difference.problems(),
            why=hint(original, module.state_dict()) or "all weights must be there, and no others",
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
    # copy_ would cast quantized, integer and 8-bit float weights to float32 without their scale.
    mismatched = {
        name: f"{name} is {_describe(found)}, the network has {_describe(wanted)}"
        for name, (wanted, found) in shared.items()
        if wanted.shape != found.shape or _kind(wanted) != _kind(found)
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


def _kind(tensor: torch.Tensor) -> str:
    """What of a tensor's type can be converted without saying more: floating types of 16 bits and more among themselves."""
    if not tensor.is_floating_point():
        return "no float"
    return "8-bit float" if tensor.element_size() == 1 else "float"


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
    door.safetensors_file(path)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise ModelError(f"cannot read the weights {printable(path)}", why=f"damaged or not safetensors: {error}") from error


def _choose(content: Any, key: str | None, name: str) -> Mapping[str, Any]:
    """The mapping of names to tensors in what was read."""
    if not isinstance(content, Mapping):
        raise ModelError(f"{name} holds no weights", why=f"it holds a {_called(content)}, not names and tensors")
    candidates = _candidates(content)
    if key is not None:
        return _under(key, content, candidates, name)
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


def _candidates(content: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """The entries that hold weights; where there is none and the content holds none either, the entries of its entries."""
    found = {str(entry): value for entry, value in content.items() if entry not in _SETTINGS and _holds_weights(value)}
    if found or _holds_weights(content):
        return found
    return {
        f"{entry}.{inner}": value
        for entry, table in content.items()
        if isinstance(table, Mapping)
        for inner, value in table.items()
        if _holds_weights(value)
    }


def _under(key: str, content: Mapping[Any, Any], candidates: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The weights that `model.weights_key` means. Raises ModelError, naming those that there are."""
    found = _named(content, key.rstrip("."))
    if found is None and len(candidates) == 1:
        found = _named(next(iter(candidates.values())), key.rstrip("."))
    if found is None:
        known = ", ".join(candidates) or "no entry of the file"
        raise ModelError(f"{name} has no weights under {key!r}", why=f"{known} holds weights", fix="change model.weights_key")
    return found


def _named(content: Mapping[Any, Any], key: str) -> Mapping[str, Any] | None:
    """An entry, an entry of an entry (`ema.state_dict`), or what comes after a first part of the names (`ema_model`)."""
    entry = content.get(key)
    if _holds_weights(entry):
        return typing.cast(Mapping[str, Any], entry)
    head, _, rest = key.partition(".")
    inner = content.get(head)
    if rest and isinstance(inner, Mapping):
        return _named(inner, rest)
    if not _holds_weights(content):
        return None
    below = StateDict(content, getattr(content, "_metadata", None)).below(f"{key}.")
    return below if _holds_weights(below) else None


def _holds_weights(value: Any) -> bool:
    """Whether a value is a mapping with weights in it; random generators' states, for example, are not floating."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in value.values())
    )


def _check(state_dict: Mapping[str, Any], name: str) -> None:
    """Raise ModelError naming all values that are no tensors, or no numbers."""
    strangers = [f"{key} ({_called(value)})" for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
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


def _called(value: Any) -> str:
    return value.name if isinstance(value, stored.Opaque) else type(value).__name__


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _first(names: Iterable[str], separator: str = ", ") -> str:
    """The first few names; an ellipsis stands for the rest."""
    listed = list(names)
    return separator.join(listed[:_LISTED]) + (f"{separator}..." if len(listed) > _LISTED else "")
