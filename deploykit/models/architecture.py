"""What is known about a network before its weights are read: how to build it, its input, its published weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deploykit.models.state_dict import StateDict
from deploykit.models.tasks import Task
from deploykit.recipe import PreprocessTable

Build = Callable[[int | None], nn.Module]


@dataclass(frozen=True)
class Weights:
    """Weights as they come with an architecture.

    `state_dict` is None when building the network already put them there; `origin` names them for people.
    """

    state_dict: StateDict | None
    origin: str
    notes: tuple[str, ...] = ()
    is_random: bool = False


@dataclass(frozen=True)
class Architecture:
    """One network, from whatever source.

    `build` makes a new one with a number of classes; None means its own number. `preprocess` has the keys that the
    architecture decides, None where a user's network says nothing. `default_weights` is None when nobody published
    any. `adapt` brings checkpoints that older library versions wrote up to date. `classes` are the names that the
    published weights were trained on. `folder` is where a user's own code is, for messages about errors in it. `task` is None
    where the network itself says it, or nothing does. `answers_shapes`: its forward is known to run on shapes without values.
    """

    name: str
    build: Build
    preprocess: PreprocessTable | None
    default_weights: Callable[[], Weights] | None
    adapt: Callable[[StateDict], StateDict] = lambda state_dict: state_dict
    classes: tuple[str, ...] = ()
    takes_data_classes: bool = True
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    task: Task | None = None
    answers_shapes: bool = False
