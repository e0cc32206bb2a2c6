"""torchvision's image classifiers, with their published weights and preprocessing."""

from __future__ import annotations

import contextlib
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn
from torchvision import models

from deploykit.artifact import digest_file
from deploykit.errors import DeploykitError, printable
from deploykit.models import arguments, googlenet
from deploykit.models.architecture import Architecture, Weights
from deploykit.models.checkpoint import load_state_dict
from deploykit.models.state_dict import StateDict
from deploykit.recipe import ModelTable, PreprocessTable

# These two are trained with auxiliary heads, which answer in train mode only and have no place in an engine.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# torchvision's own number counts the auxiliary head.
_PARAMETERS = {"inception_v3": 23_834_568}


def names() -> list[str]:
    """All classifiers of the installed torchvision, sorted."""
    return sorted(models.list_models(module=models))


def architecture(model: ModelTable, side: int | None = None) -> Architecture:
    """The classifier `model.name`, which is one of `names()`.

    The preprocessing is that of the default weights, also when others are used: it is what the network was made for.
    A vision transformer is built for one input: `side` pixels, or else that of the default weights.
    GoogLeNet takes `model.args`, see `googlenet.options`; the others are what their name says and take none.
    """
    published = models.get_model_weights(model.name).DEFAULT
    changes = _changes(model)
    options, notes = _options(model, published)
    if model.name.startswith("vit_"):
        options["image_size"] = side or preprocess(published).crop
    options |= changes

    def build(classes: int | None) -> nn.Module:
        chosen = options if classes is None else {**options, "num_classes": classes}
        module: nn.Module = models.get_model(model.name, weights=None, **chosen)
        return module

    return Architecture(
        name=model.name,
        build=build,
        preprocess=preprocess(published),
        # Nobody published weights for a network that was changed by arguments.
        default_weights=None if changes else lambda: default_weights(published),
        adapt=lambda state_dict: _adapt(model.name, state_dict),
        classes=tuple(published.meta["categories"]),
        notes=notes,
        answers_shapes=True,
    )


def preprocess(published: Any) -> PreprocessTable:
    """The preset that belongs to an entry of torchvision's weights."""
    preset = published.transforms()
    return PreprocessTable(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        fit="crop",
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        channels="RGB",
        interpolation=preset.interpolation.value,
    )


def default_weights(published: Any) -> Weights:
    """Published weights, from torch's cache ($TORCH_HOME/hub/checkpoints) or else from the network.

    Raises DeploykitError (exit 1) when they cannot be fetched, ModelError when the cached file is not a checkpoint.
    """
    file = Path(urlsplit(published.url).path).name
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    if cached.is_file():
        notes: tuple[str, ...] = ()
        if not is_published(cached, published):
            notes = (f"{printable(cached)} does not have the SHA-256 that its name promises; it was used as it is",)
        return Weights(load_state_dict(cached), str(published), notes)
    try:
        # torch.hub writes "Downloading: ..." to stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            state_dict = published.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise DeploykitError(
            f"cannot fetch {file} from {published.url}",
            why=str(error),
            fix=f"put the file at {printable(cached)}, or use --weights FILE",
        ) from error
    return Weights(StateDict.of(state_dict), str(published))


def is_published(path: Path, published: Any) -> bool:
    """Whether a file is the published one: torchvision's file names carry the first digits of the SHA-256."""
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", published.url)
    return digits is None or (path.is_file() and digest_file(path).startswith(digits.group(1)))


def facts(name: str) -> tuple[int, tuple[int, int, int], str, float]:
    """Parameters as deployed, input (C, H, W), default weights and 10^9 multiply-accumulates, from torchvision's tables."""
    published = models.get_model_weights(name).DEFAULT
    side = published.transforms().crop_size[0]
    return _PARAMETERS.get(name, published.meta["num_params"]), (3, side, side), str(published), published.meta["_ops"]


def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC-2012 in the order of class indices, which is their sorted order.

    The list is the one of the challenge itself (image-net.org/challenges/LSVRC/2012, development kit).
    """
    return tuple(resources.files("deploykit.models").joinpath("imagenet_synsets.txt").read_text("ascii").split())


def _changes(model: ModelTable) -> dict[str, Any]:
    """What `model.args` change in torchvision's network. Raises ModelError when it takes no such argument."""
    options = googlenet.options if model.name == "googlenet" else arguments.none
    arguments.check(options, model.args or {}, name=model.name)
    return options(**(model.args or {}))


def _options(model: ModelTable, published: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments for torchvision's builder, and notes.

    `transform_input` shifts ImageNet's normalisation to the -1..1 that Inception was trained with. It belongs to the
    published weights and is not stored in a state_dict.
    """
    if model.name not in _AUXILIARY:
        return {}, ()
    is_random = model.weights == "none"
    transforms = model.weights == "default" or (not is_random and is_published(Path(model.weights), published))
    notes: tuple[str, ...] = ("the auxiliary heads are left out: they answer in training only",)
    if not transforms and not is_random:
        notes += (
            "transform_input is off, as torchvision has it for weights that are not its own; for weights that were "
            "fine-tuned from torchvision's, set preprocess.mean and preprocess.std to 0.5, which does the same",
        )
    return {"aux_logits": False, "init_weights": is_random, "transform_input": transforms}, notes


def _adapt(name: str, state_dict: StateDict) -> StateDict:
    """What torchvision itself does when it loads its own files, and what its networks do not do for themselves."""
    unwanted = _AUXILIARY.get(name, ())
    tensors = {key: value for key, value in state_dict.items() if not key.startswith(unwanted)} if unwanted else state_dict
    versions = state_dict.versions
    if name.startswith("densenet"):
        # Files from before PyTorch 0.4 say norm.1 where modules are now called norm1; the published ones still do.
        tensors = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)", r"\1", key): tensors[key] for key in tensors}
    if name.startswith("mnasnet") and versions is None:
        # MNASNet refuses a state_dict without a version; such files (safetensors, re-wrapped) are of today's layout.
        versions = {"": {"version": 2}}
    return StateDict(tensors, versions)
