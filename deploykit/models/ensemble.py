"""Several backbones as one network: `ensemble:NAME+NAME`, by one head on all their features or by the mean of their logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from deploykit.artifact import Preprocess
from deploykit.errors import ModelError
from deploykit.models import arguments
from deploykit.models.architecture import Architecture, Weights
from deploykit.models.checkpoint import fit
from deploykit.models.preprocess import resolve
from deploykit.recipe import ModelTable, PreprocessTable

Combine = Literal["features", "logits"]


class Ensemble(nn.Module):
    """Members that see the same picture: (N, C, H, W) to (N, num_classes).

    `inputs` has, by the member's key, what gives a member its own normalisation where it is not the shared one. With a
    `head`, members give features, (N, width) each, which are concatenated; without one, their logits are averaged.
    """

    def __init__(self, members: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module], head: nn.Module | None) -> None:
        super().__init__()
        self.members, self.inputs = nn.ModuleDict(members), nn.ModuleDict(inputs)
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        answers = [member(self.inputs[name](x) if name in self.inputs else x) for name, member in self.members.items()]
        if self.head is None:
            # Not a stack and its mean: sums are what every runtime fuses and has int8 kernels for.
            mean: torch.Tensor = sum(answers[1:], start=answers[0]) / len(answers)
            return mean
        logits: torch.Tensor = self.head(torch.cat(answers, dim=1))
        return logits


class Renormalise(nn.Module):
    """Pictures normalised with one mean and standard deviation as if with another: (N, C, H, W) to the same shape.

    The numbers are stored with the weights, which were trained on what they make.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, shared: Preprocess, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = [ours / own for ours, own in zip(shared.std, std, strict=True)]
        shift = [(ours - own) / width for ours, own, width in zip(shared.mean, mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).reshape(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled and shifted."""
        return x * self.scale + self.shift


@dataclass(frozen=True)
class _Member:
    """One backbone: what is known about it, and its own preprocessing."""

    key: str
    architecture: Architecture
    preprocess: Preprocess


def architecture(
    model: ModelTable, preprocess: PreprocessTable, of_name: Callable[[ModelTable, PreprocessTable], Architecture]
) -> Architecture:
    """The ensemble of the networks that `model.name` lists, each as `of_name` knows it.

    `model.args` has `combine`: "features" (the default) concatenates what the members' last linear layers would get and puts
    one new linear layer on it; "logits" averages their answers. The picture is prepared as for the member with the largest
    input, and all members see it at that size. Default weights are each member's own.

    Raises ModelError for fewer than two members, users' code among them, other arguments, other numbers of channels.
    """
    combine = _combine(model)
    members = _members(model, preprocess, of_name)
    largest = max(members, key=lambda member: member.preprocess.crop)
    is_default = model.weights == "default"

    def build(classes: int | None) -> nn.Module:
        built = {member.key: _built(member, is_default, None if combine == "features" else classes) for member in members}
        inputs = {
            member.key: found
            for member in members
            if (found := _normalisation(built[member.key], member.preprocess, largest.preprocess)) is not None
        }
        if combine == "logits":
            return Ensemble(built, inputs, None)
        widths = [_behead(built[member.key], member) for member in members]
        return Ensemble(built, inputs, nn.Linear(sum(widths), classes or _own_classes(members)))

    return Architecture(
        name=model.name,
        build=build,
        preprocess=largest.architecture.preprocess,
        default_weights=_default_weights(members, combine),
        classes=_shared_classes(members) if combine == "logits" else (),
        notes=_notes(members, largest),
    )


def heads(module: nn.Module) -> tuple[str, ...]:
    """The members whose heads make the classes together; empty for what is no ensemble, or one with a head of its own."""
    if not isinstance(module, Ensemble) or module.head is not None:
        return ()
    return tuple(f"members.{key}" for key in module.members)


def _combine(model: ModelTable) -> Combine:
    def ensemble(combine: Combine = "features") -> None: ...

    given = dict(model.args or {})
    arguments.check(ensemble, given, name=model.name)
    combine: Combine = given.get("combine", "features")
    if combine not in ("features", "logits"):
        raise ModelError(f"{model.name} cannot be combined by {combine!r}", fix="--arg combine=features or combine=logits")
    return combine


def _members(
    model: ModelTable, preprocess: PreprocessTable, of_name: Callable[[ModelTable, PreprocessTable], Architecture]
) -> list[_Member]:
    names = model.name.partition(":")[2].split("+")
    if len(names) < 2 or not all(names):
        raise ModelError(f"{model.name!r} names no ensemble", fix="name two networks or more: ensemble:resnet18+densenet201")
    members = []
    for key, name in zip(_keys(names), names, strict=True):
        table = replace(model, name=name, args=None)
        if table.is_user_code or name.startswith("ensemble:"):
            raise ModelError(
                f"{name} cannot be a member of an ensemble", fix="write a factory that combines networks of your own"
            )
        found = of_name(table, preprocess)
        if found.task not in (None, "classify"):
            raise ModelError(f"{name} cannot be a member of an ensemble", why="members are classifiers")
        members.append(_Member(key, found, resolve(found.preprocess, PreprocessTable(), name=name)[0]))
    channels = {member.architecture.name: member.preprocess.channels for member in members}
    if len(set(channels.values())) > 1:
        problems = [f"{name}: {value}" for name, value in channels.items()]
        raise ModelError(f"the members of {model.name} do not take the same channels", problems=problems)
    return members


def _keys(names: Sequence[str]) -> list[str]:
    """The members' names as names of modules, which hold no dots; numbered where one occurs twice."""
    plain = [name.replace(".", "_").replace(":", "_") for name in names]
    counts, seen = Counter(plain), Counter[str]()
    keys = []
    for name in plain:
        seen[name] += 1
        keys.append(f"{name}_{seen[name]}" if counts[name] > 1 else name)
    return keys


def _built(member: _Member, is_default: bool, classes: int | None) -> nn.Module:
    """A member with its published weights, or random ones. Raises ModelError when nobody published any."""
    found = member.architecture
    if not is_default:
        return found.build(classes)
    assert found.default_weights is not None
    weights = found.default_weights()
    if weights.state_dict is None:
        return found.build(classes)
    return fit(found.build, weights.state_dict, source=weights.origin, classes=classes, adapt=found.adapt)[0]


def _normalisation(module: nn.Module, own: Preprocess, shared: Preprocess) -> Renormalise | None:
    """What a member needs to see a picture that is normalised for another; None where both are normalised alike.

    torchvision's Inception networks do that themselves, or not, by a switch that no checkpoint stores (`transform_input`);
    here it is among the weights, so that a checkpoint of the ensemble answers as the ensemble did.
    """
    switch = getattr(module, "transform_input", None)
    if isinstance(switch, bool):
        module.transform_input = False  # type: ignore[assignment]
        half = [0.5] * len(own.mean)
        return Renormalise(shared, half, half) if switch else Renormalise(shared, own.mean, own.std)
    if (own.mean, own.std) == (shared.mean, shared.std):
        return None
    return Renormalise(shared, own.mean, own.std)


def _behead(module: nn.Module, member: _Member) -> int:
    """Take the last linear layer away, so that the network answers with what that layer got; the number of features.

    Raises ModelError when the network does not end in a linear layer, or its answer is not that layer's input then.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    name, layer = layers[-1] if layers else ("", None)
    if layer is not None:
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, nn.Identity())
        module.eval()
        with torch.no_grad():
            answer = module(torch.zeros(1, *member.preprocess.shape))
        if isinstance(answer, torch.Tensor) and answer.shape == (1, layer.in_features):
            return layer.in_features
    raise ModelError(
        f"{member.architecture.name} has no features that a head could take",
        why="it does not end in a linear layer",
        fix="--arg combine=logits",
    )


def _default_weights(members: Sequence[_Member], combine: Combine) -> Callable[[], Weights] | None:
    """Each member's own; None when one has none."""
    if any(member.architecture.default_weights is None for member in members):
        return None
    origin = f"the published weights of {', '.join(member.architecture.name for member in members)}"
    new = ("the head on the members' features is new, with random weights: fine-tune it",) if combine == "features" else ()
    return lambda: Weights(None, origin, notes=new)


def _own_classes(members: Sequence[_Member]) -> int:
    """As many as the members were published with, or ten as our own classics have."""
    return len(_shared_classes(members)) or 10


def _shared_classes(members: Sequence[_Member]) -> tuple[str, ...]:
    names = {member.architecture.classes for member in members}
    return names.pop() if len(names) == 1 else ()


def _notes(members: Sequence[_Member], largest: _Member) -> tuple[str, ...]:
    side = largest.preprocess.crop[0]
    others = [
        f"{member.architecture.name} ({member.preprocess.crop[0]})" for member in members if member.preprocess.crop[0] != side
    ]
    sizes = (f"all members see pictures of {side} pixels; made for another size: {', '.join(others)}",) if others else ()
    # What members say about transform_input does not hold here: see `_normalisation`.
    own = [note for member in members for note in member.architecture.notes if not note.startswith("transform_input")]
    return (*dict.fromkeys(own), *sizes)
