"""Any CNN by name as a Model: torchvision's and timm's networks, our own classics, ensembles of them, a user's own code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploykit.artifact import Preprocess, digest_file
from deploykit.errors import ModelError, printable
from deploykit.models import (
    arguments,
    batch_norm,
    classics,
    ensemble,
    script,
    tasks,
    timm,
    torchvision,
    torchvision_dense,
    user,
)
from deploykit.models.architecture import Architecture, Weights
from deploykit.models.checkpoint import fit, load_state_dict
from deploykit.models.head import with_classes
from deploykit.models.preprocess import of_network, resolve
from deploykit.recipe import ModelTable, PreprocessTable

__all__ = ["Entry", "Model", "calibrate_batch_norm", "catalogue", "load", "with_classes", "with_weights"]

_AS_IT_COMES = PreprocessTable()
_PROBED = 4  # images that a detector with random weights is made to find boxes on


@dataclass(frozen=True)
class Model:
    """A network that is ready to be exported: in eval mode, float32, on the CPU.

    `preprocess.shape` is its input (channels, height, width). A classifier answers with one tensor of (N, num_classes), and so
    does one of clips; a segmenter with (N, num_classes, height, width); a detector, which takes one picture, with a list
    of tensors for its boxes. `outputs` are the names of these tensors.
    `classes` has the names by index, or is empty when nobody said them. `weights` is where the weights come from, for
    people. `notes` are decisions on the way that the user must see.
    """

    module: nn.Module
    name: str
    preprocess: Preprocess
    classes: tuple[str, ...]
    num_classes: int
    weights: str
    is_random: bool
    notes: tuple[str, ...]
    task: tasks.Task = "classify"
    outputs: tuple[str, ...] = tasks.LOGITS


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue.

    `input_size` is (channels, height, width), of clips (channels, frames, height, width). `weights` names the default ones; None
    where there are none. `gmacs` are 10^9 multiply-accumulates for one input of that size.
    """

    name: str
    source: str
    parameters: int
    input_size: tuple[int, ...]
    weights: str | None
    gmacs: float
    task: tasks.Task = "classify"


def load(model: ModelTable, preprocess: PreprocessTable = _AS_IT_COMES, *, data_classes: Sequence[str] | None = None) -> Model:
    """Build the network, give it its weights, and check that it answers its own input with one row of logits.

    `data_classes` are the class names of the data set: they name the outputs when nothing better does, and their
    number is that of a network with random weights, unless `model.classes` says another. Random weights depend on
    `model.seed` alone, and torch's global generator is left as it was. `preprocess` overrides what comes with the
    weights, key by key; see `deploykit.models.preprocess.resolve` for the rules.

    Raises ModelError for unknown names, code and checkpoints that cannot be used, and preprocessing that does not
    belong to the network; DeploykitError (exit 1) when default weights cannot be fetched.
    """
    with _seeded(model.seed):
        architecture = _architecture(model, preprocess)
        module, weights = _weighted(architecture, model, data_classes)
    module, conversions = _deployable(module)
    keys = architecture.preprocess or of_network(getattr(module, "preprocess", None), name=model.name)
    settled, decisions = resolve(keys, preprocess, name=model.name)
    task = tasks.task_of(module, architecture.task, name=model.name)
    with _explained(architecture, settled):
        module, outputs = tasks.answering(module, task, shape=settled.shape, name=model.name)
        num_classes = _count_classes(module, settled, architecture, task)
    if model.classes not in (None, num_classes):
        raise ModelError(
            f"{model.name} has {num_classes} classes, the recipe says model.classes = {model.classes}",
            fix="change model.classes, or let the factory take num_classes",
        )
    return Model(
        module=module,
        name=model.name,
        preprocess=settled,
        classes=_class_names(architecture, num_classes, data_classes, is_random=weights.is_random),
        num_classes=num_classes,
        weights=weights.origin,
        is_random=weights.is_random,
        notes=(*architecture.notes, *weights.notes, *conversions, *decisions),
        task=task,
        outputs=outputs,
    )


def catalogue() -> list[Entry]:
    """Every network that has a name here, without building any of them."""
    own = [
        Entry(
            name,
            "deploykit",
            found.parameters,
            resolve(found.preprocess, PreprocessTable(), name=name)[0].shape,
            None,
            found.gmacs,
        )
        for name, found in classics.CLASSICS.items()
    ]
    classifiers = [Entry(name, "torchvision", *torchvision.facts(name)) for name in torchvision.names()]
    others = [
        Entry(name, "torchvision", *torchvision_dense.facts(name), torchvision_dense.task_of(name))
        for name in torchvision_dense.names()
    ]
    return own + classifiers + others


def with_weights(model: Model, path: Path, *, origin: str) -> Model:
    """The same network with the weights of a safetensors file of ours, which fit exactly; `model.module` is changed."""
    model.module.load_state_dict(load_state_dict(path))
    model.module.eval()
    return replace(model, weights=origin, is_random=False)


def calibrate_batch_norm(model: Model, batches: Iterable[NDArray[np.float32]]) -> None:
    """Give a network with random weights the BatchNorm statistics of `batches`, each (N, C, H, W); changes `model.module`.

    Without them its activations grow or fade from layer to layer, and measurements of INT8 on it mean nothing. A
    network without BatchNorm stays as it is. A detector is made to find boxes as well, see `tasks.spread_scores`.

    Raises ModelError when the weights are not random, DataError when there are fewer than two images.
    """
    if not model.is_random:
        raise ModelError(f"{model.name} keeps its BatchNorm statistics", why=f"they belong to its weights, {model.weights}")
    batches = iter(batches)
    first = list(islice(batches, 1))
    batch_norm.calibrate(model.module, chain(first, batches))
    if isinstance(model.module, tasks.Detector):
        tasks.spread_scores(model.module, torch.from_numpy(first[0][:_PROBED]))


def _architecture(model: ModelTable, preprocess: PreprocessTable) -> Architecture:
    if "num_classes" in (model.args or {}):
        raise ModelError(
            "model.args.num_classes is model.classes", fix="--classes N, which checkpoints and data sets set as well"
        )
    if model.is_user_code:
        return user.architecture(model)
    scheme = model.name.partition(":")[0]
    if scheme == "timm":
        return timm.architecture(model, preprocess)
    if scheme == "ensemble":
        return ensemble.architecture(model, preprocess, _architecture)
    if model.name in classics.CLASSICS:
        return classics.architecture(model, preprocess)
    if model.name in torchvision.names():
        return torchvision.architecture(model, preprocess.crop)
    if model.name in torchvision_dense.names():
        arguments.check(arguments.none, model.args or {}, name=model.name)
        return torchvision_dense.architecture(model, preprocess)
    known = [*classics.CLASSICS, *torchvision.names(), *torchvision_dense.names()]
    near = difflib.get_close_matches(model.name.lower().replace("-", ""), known, n=3)
    fix = "deploykit models lists all names"
    if model.name.endswith(".py"):
        fix = f"name the function that builds the network: {model.name}:FACTORY"
    raise ModelError(f"there is no model {model.name!r}", why=f"the nearest names are {', '.join(near)}" if near else "", fix=fix)


def _weighted(architecture: Architecture, model: ModelTable, data_classes: Sequence[str] | None) -> tuple[nn.Module, Weights]:
    """The network with the weights that `model.weights` asks for."""
    if model.weights == "none":
        data = len(data_classes) if data_classes and architecture.takes_data_classes else None
        return architecture.build(model.classes or data), Weights(None, f"random weights (seed {model.seed})", is_random=True)
    if model.weights != "default":
        weights = _from_file(Path(model.weights), model.weights_key, trust=model.trust)
    elif architecture.default_weights is not None:
        weights = architecture.default_weights()
    else:
        raise ModelError(
            f"{model.name} has no default weights",
            fix="use --weights FILE with a checkpoint, or --weights none for random weights",
        )
    if weights.state_dict is None:
        return architecture.build(model.classes), weights
    source = Path(model.weights).name if model.weights != "default" else weights.origin
    module, notes = fit(
        architecture.build, weights.state_dict, source=printable(source), classes=model.classes, adapt=architecture.adapt
    )
    return module, replace(weights, notes=weights.notes + notes)


def _from_file(path: Path, key: str | None, *, trust: bool) -> Weights:
    state_dict = load_state_dict(path, key, trust=trust)
    notes = (f"the program in {printable(path.name)} was run to read its weights",) if trust and script.is_script(path) else ()
    return Weights(state_dict, f"{printable(path.name)} (sha256 {digest_file(path)[:12]}...)", notes)


def _deployable(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """In eval mode, float32, on the CPU; a note when a user's network was in another float type."""
    floating = {str(value.dtype).removeprefix("torch.") for value in module.state_dict().values() if value.is_floating_point()}
    others = sorted(floating - {"float32"})
    notes = (f"the network was in {' and '.join(others)} and was converted to float32",) if others else ()
    return module.cpu().float().eval(), notes


@contextmanager
def _explained(architecture: Architecture, preprocess: Preprocess) -> Iterator[None]:
    """Turn what a network raises when it gets a black picture into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{architecture.name} cannot take an input of {'x'.join(map(str, preprocess.shape))}",
            why=user.explain(error, architecture.folder) if architecture.folder else str(error).strip().partition("\n")[0],
            fix="set preprocess.crop and preprocess.channels to what the network takes",
        ) from error


def _count_classes(module: nn.Module, preprocess: Preprocess, architecture: Architecture, task: tasks.Task) -> int:
    """The width of the network's answer to one black picture. Raises ModelError when it is not one of its task."""
    if isinstance(module, tasks.Detector):
        return tasks.count_classes(module)
    with torch.no_grad():
        if architecture.answers_shapes:
            state = {key: value.to("meta") for key, value in module.state_dict().items()}
            answer = torch.func.functional_call(module, state, (torch.zeros(1, *preprocess.shape, device="meta"),))
        else:
            answer = module(torch.zeros(1, *preprocess.shape))
    what, wanted = ("segmenter", "1xCLASSESxHEIGHTxWIDTH") if task == "segment" else ("classifier", "1xCLASSES")
    dimensions = 4 if task == "segment" else 2
    if not isinstance(answer, torch.Tensor) or answer.dim() != dimensions or answer.shape[0] != 1:
        got = "x".join(map(str, answer.shape)) if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
        returned = "(batch, classes, height, width)" if task == "segment" else "(batch, classes)"
        raise ModelError(
            f"{architecture.name} is not a {what} that deploykit can take",
            why=f"it answered one picture of {'x'.join(map(str, preprocess.shape))} with {got}, not with {wanted}",
            fix=f"let the factory wrap the network so that it returns one tensor of {returned}",
        )
    return int(answer.shape[1])


def _class_names(
    architecture: Architecture, num_classes: int, data_classes: Sequence[str] | None, *, is_random: bool
) -> tuple[str, ...]:
    """The weights' own names, then the data's; the other way round for random weights, which know no names."""
    known = (architecture.classes, tuple(data_classes or ()))
    for names in reversed(known) if is_random else known:
        if len(names) == num_classes:
            return names
    return ()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator at `seed`, and put it back: networks are built on the CPU."""
    # Without devices=[], fork_rng would look for GPUs, and warn where there are several.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
