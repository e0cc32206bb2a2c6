"""The names in a checkpoint brought to those of a network, where there is only one way to do it.

Training puts the network into other things: DataParallel (`module.`), torch.compile (`_orig_mod.`), Lightning (`model.` or
`net.`, beside a loss), weight averaging (`module.` and a counter, or the average beside the network), MMLab (`backbone.` and
`head.`). What they put before a name is taken off when the rest is exactly what the network calls its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

import torch

from deploykit.errors import ModelError
from deploykit.models.state_dict import StateDict

_COMPILED = "_orig_mod."
# torch.optim.swa_utils.AveragedModel and MMEngine's BaseAveragedModel count the averaged models beside them.
_COUNTERS = ("n_averaged", "steps")
_LISTED = 3

Adapt = Callable[[StateDict], StateDict]
Network = Mapping[str, torch.Tensor]


def unwrapped(
    state_dict: StateDict, network: Network, *, source: str, adapt: Adapt = lambda found: found
) -> tuple[StateDict, tuple[str, ...]]:
    """The weights under the network's own names, and notes on what was left out or put together.

    One prefix that all names share is taken off until the rest meets the network. Under several prefixes, one that holds
    all of the network's names is the network and the others are left out; where none does, all of them together may be it
    (a backbone and a head). `adapt` brings old names of a library up to date, and is applied to what is returned. Where no
    way leads to the network, the names stay as they are, so that messages show what the file holds.

    Raises ModelError, naming the prefixes, when more than one of them holds all of the network's names.
    """
    wanted = {name for name in network if _is_required(name)}
    plain = _without_counters(_without_compiled(state_dict, network), network)
    stripped = _without_shared_prefix(plain, network)
    if stripped is not None and wanted <= set(adapt(stripped)):
        return adapt(stripped), ()
    parts = {prefix: adapt(part) for prefix, part in _parts(plain, network).items()}
    whole = [prefix for prefix, part in parts.items() if prefix and wanted <= set(part)]
    if whole:
        _refuse_several(whole, parts, wanted, source)
        others = [name for name in plain if not name.startswith(whole[0])]
        return parts[whole[0]], (f"of {source} the weights under {whole[0]} were taken; left out: {_some(others)}",)
    joined = _joined(parts, wanted)
    if joined is not None:
        return joined, (f"{source}: {' and '.join(filter(None, parts))} were taken off the names of the weights",)
    return adapt(state_dict if stripped is None else stripped), ()


def hint(state_dict: StateDict, network: Network) -> str:
    """Why names do not fit when most of them do under one prefix: the rest has other names. Empty when that is not so."""
    wanted = {name for name in network if _is_required(name)}
    for prefix in _prefixes(state_dict):
        fitting = wanted & set(state_dict.below(prefix))
        lacking = [name for name in network if name in wanted - fitting]
        others = [name for name in state_dict if _is_required(name) and name.removeprefix(prefix) not in fitting]
        if len(fitting) > len(wanted) / 2 and lacking and others:
            return (
                f"under {prefix} it has {len(fitting)} of the network's {len(wanted)} weights; which of {_some(others)} are "
                f"{_some(lacking)} would be a guess: rename them in the file"
            )
    return ""


def _is_required(name: str) -> bool:
    """Files from before PyTorch 0.4.1 do not count batches, and nothing computes with the number."""
    return not name.endswith("num_batches_tracked")


def _refuse_several(whole: Sequence[str], parts: Mapping[str, StateDict], wanted: Set[str], source: str) -> None:
    """Raise ModelError when the prefixes lead to different weights; one module under two names is no choice."""
    first = parts[whole[0]]
    if all(torch.equal(parts[prefix][name], first[name]) for prefix in whole[1:] for name in wanted):
        return
    raise ModelError(
        f"{source} holds several networks that fit",
        problems=[f"{prefix} {len(parts[prefix])} tensors" for prefix in whole],
        why="one may be an average of the other, or its teacher",
        fix=f"say which with model.weights_key, such as {whole[0].rstrip('.')}",
    )


def _without_compiled(state_dict: StateDict, network: Network) -> StateDict:
    """Names without `_orig_mod.`, which torch.compile puts where it was applied, also in the middle of a name."""
    if any(_COMPILED in name for name in network) or not any(_COMPILED in name for name in state_dict):
        return state_dict
    tensors = {name.replace(_COMPILED, ""): tensor for name, tensor in state_dict.items()}
    if len(tensors) < len(state_dict):
        return state_dict
    versions = state_dict.versions
    if versions is not None:
        versions = {f"{name}.".replace(_COMPILED, "").rstrip("."): value for name, value in versions.items()}
    return StateDict(tensors, versions)


def _without_counters(state_dict: StateDict, network: Network) -> StateDict:
    tensors = {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in _COUNTERS or name in network or tensor.is_floating_point() or tensor.numel() != 1
    }
    return StateDict(tensors, state_dict.versions)


def _without_shared_prefix(state_dict: StateDict, network: Network) -> StateDict | None:
    """Names without the prefixes that all of them share, as soon as one is the network's; None when that never happens."""
    while state_dict:
        if any(name in network for name in state_dict):
            return state_dict
        prefixes = _prefixes(state_dict)
        if len(prefixes) != 1 or any("." not in name for name in state_dict):
            return None
        state_dict = state_dict.below(prefixes[0])
    return None


def _parts(state_dict: StateDict, network: Network) -> dict[str, StateDict]:
    """The weights under each first part of the names, without whatever else is before the network's names there.

    What has a name of the network's already is under the empty prefix.
    """
    own = {name: tensor for name, tensor in state_dict.items() if name in network}
    others = StateDict({name: tensor for name, tensor in state_dict.items() if name not in network}, state_dict.versions)
    parts = {"": StateDict(own, state_dict.versions)} if own else {}
    for prefix in _prefixes(others):
        below = _without_counters(others.below(prefix), network)
        parts[prefix] = _without_shared_prefix(below, network) or below
    return parts


def _prefixes(state_dict: StateDict) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] + "." for name in state_dict if "." in name))


def _joined(parts: Mapping[str, StateDict], wanted: Set[str]) -> StateDict | None:
    """All parts under the network's names, when each of those is in exactly one part and there are no others."""
    names = [name for part in parts.values() for name in part if _is_required(name)]
    if len(names) != len(set(names)) or set(names) != wanted:
        return None
    tensors = {name: tensor for part in parts.values() for name, tensor in part.items()}
    versions = {name: value for part in parts.values() for name, value in (part.versions or {}).items()}
    return StateDict(tensors, versions or None)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
