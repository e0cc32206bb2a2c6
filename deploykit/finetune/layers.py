"""Which layers learn: the head, what a pattern names, or everything; the others stay as they are, their statistics too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from deploykit.errors import UsageError
from deploykit.models import Model
from deploykit.models.ensemble import heads
from deploykit.models.head import last_layers
from deploykit.recipe import FinetuneTable


def head_of(model: Model, which: str) -> str:
    """The module path of the head: the last layer ("last"), or the outermost block of it that is not the whole network
    ("classifier").

    Raises ModelError when no layer is as wide as the network's answer, UsageError when several members of an ensemble have one,
    or a distilled network has two that are in no block of their own.
    """
    if members := heads(model.module):
        raise UsageError(
            f"{model.name} has {len(members)} heads, one in each member",
            why="their logits are averaged",
            fix="--arg combine=features, which has one head on all members, or finetune.mode = 'all'",
        )
    names = last_layers(model)
    blocks = {_block_of(model, name) for name in names}
    if which == "last" and len(names) == 1:
        return names[0]
    if which == "classifier" and len(blocks) == 1:
        return blocks.pop()
    raise UsageError(
        f"{model.name} has {len(names)} heads, {' and '.join(names)}",
        why="its answer is their mean",
        fix="finetune.mode = 'all'" + (", or finetune.head = 'classifier', which holds both" if len(blocks) == 1 else ""),
    )


def _block_of(model: Model, name: str) -> str:
    """The outermost module that holds a layer and is not the whole network."""
    parts = name.split(".")
    everything = sum(1 for _ in model.module.parameters())
    for depth in range(1, len(parts)):
        block = ".".join(parts[:depth])
        # A wrapper around the network is no part of it.
        if sum(1 for _ in model.module.get_submodule(block).parameters()) < everything:
            return block
    return name


def choose(model: Model, settings: FinetuneTable, *, head_only: bool) -> None:
    """Let the parameters learn that this phase trains, and no others; changes `requires_grad` in place.

    Raises UsageError when a pattern names no module, or nothing is left to learn.
    """
    module, head = model.module, head_of(model, settings.head) if head_only else ""
    refuse_unknown(model, {"freeze": settings.freeze, "unfreeze": settings.unfreeze})
    for name, parameter in module.named_parameters():
        owners = list(_owners(name))
        learns = not head_only or head in owners
        if _named(owners, settings.freeze):
            learns = False
        if _named(owners, settings.unfreeze):
            learns = True
        parameter.requires_grad_(learns)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(
            f"nothing of {model.name} is left to learn", why="finetune.freeze names every layer that would be trained"
        )


def train_mode(module: nn.Module) -> None:
    """Train mode for the modules that learn as a whole, eval mode for the rest.

    So BatchNorm of a frozen layer keeps its statistics, and dropout in front of a head that learns alone drops nothing.
    """
    module.eval()
    for part in _wholly_learning(module):
        part.train()


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a BatchNorm would look at the batch in train mode."""
    parts = [part for whole in _wholly_learning(module) for part in whole.modules()]
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)


def has_depthwise(module: nn.Module) -> bool:
    """Whether a convolution works on every channel alone."""
    parts = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    return any(part.groups == part.in_channels > 1 for part in parts)


def set_dropout(module: nn.Module, share: float) -> int:
    """Give every dropout layer this share; returns how many there are."""
    layers = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd)]
    for layer in layers:
        layer.p = share
    return len(layers)


def changing(module: nn.Module) -> set[str]:
    """The names in its state_dict of what training may change: what learns, and statistics where all of a module does."""
    names = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    whole = {id(part) for outermost in _wholly_learning(module) for part in outermost.modules()}
    for path, part in module.named_modules(remove_duplicate=False):
        if id(part) in whole:
            names |= {f"{path}.{name}".lstrip(".") for name, _ in part.named_buffers(recurse=False)}
    return names


def named(model: Model, patterns: Sequence[str], key: str) -> list[str]:
    """The module paths that patterns name, in the network's order. Raises UsageError for a pattern that names none."""
    names = [name for name, _ in model.module.named_modules() if name]
    refuse_unknown(model, {key: patterns})
    return [name for name in names if _named([name], patterns)]


def refuse_unknown(model: Model, patterns: Mapping[str, Sequence[str]]) -> None:
    """Raise one UsageError about all patterns, by the recipe's key, that name no module."""
    names = [name for name, _ in model.module.named_modules() if name]
    unknown = [
        f"finetune.{key}: {pattern}"
        for key, listed in patterns.items()
        for pattern in listed
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if unknown:
        fix = f"modules are called {', '.join(names[:4])}, ...; a pattern such as layer4.* names all below one"
        raise UsageError(f"these patterns name no module of {model.name}", problems=unknown, fix=fix)


def _wholly_learning(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of which every parameter learns."""
    learning = [parameter.requires_grad for parameter in module.parameters()]
    if learning and all(learning):
        yield module
    elif any(learning):
        for child in module.children():
            yield from _wholly_learning(child)


def _owners(parameter: str) -> Iterator[str]:
    """The paths of all modules that a parameter belongs to, innermost first: a.b.weight -> a.b, a."""
    parent = parameter.rpartition(".")[0]
    while parent:
        yield parent
        parent = parent.rpartition(".")[0]


def _named(owners: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(owner, pattern) for owner in owners for pattern in patterns)
