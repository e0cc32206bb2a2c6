"""timm's networks by `timm:NAME`, with the preprocessing that their weights were published with."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision import models as library

from deploykit.errors import CapabilityError, DeploykitError, ModelError
from deploykit.models import arguments
from deploykit.models.architecture import Architecture, Weights
from deploykit.models.state_dict import StateDict
from deploykit.recipe import ModelTable, PreprocessTable

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_CHANNELS = {1: "L", 3: "RGB"}
_IMAGENET = 1000
# What `timm.create_model` takes that is no property of the network: weights from elsewhere, past every check of ours, and what
# we set ourselves.
_RESERVED = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("exportable", "scriptable", "no_jit", "model_name"),
)


def architecture(model: ModelTable, preprocess: PreprocessTable) -> Architecture:
    """timm's network of that name, with or without the tag of its weights (`timm:resnet50` or `timm:resnet50.a1_in1k`).

    `model.args` go to `timm.create_model`. Preprocessing is that of the tag's published configuration.
    Raises CapabilityError when timm is not installed, ModelError for unknown names and tags, for arguments that say where
    weights come from or how the network is built, and for a preprocessing that deploykit does not have and `preprocess` does not
    replace.
    """
    _refuse_reserved(model)
    timm = _library()
    name = model.name.partition(":")[2]
    published = _published(timm, name)
    config = timm.data.resolve_data_config({}, pretrained_cfg=published)
    given = dict(model.args or {})

    def build(classes: int | None) -> nn.Module:
        return _created(timm, name, given if classes is None else {**given, "num_classes": classes})

    has_weights = bool(published.get("hf_hub_id") or published.get("url"))
    return Architecture(
        name=model.name,
        build=build,
        preprocess=table(config, preprocess, name=model.name),
        default_weights=(lambda: _fetched(timm, name, published)) if has_weights else None,
        # timm takes every network with 1,000 outputs for ImageNet's classes, which it has in torchvision's order.
        classes=tuple(library.get_model_weights("resnet18").DEFAULT.meta["categories"]) if _is_imagenet(published) else (),
    )


def table(config: Mapping[str, Any], asked: PreprocessTable, *, name: str) -> PreprocessTable:
    """timm's data configuration as our keys (timm/data/transforms_factory.py: `transforms_imagenet_eval`).

    The shorter side is resized to floor(input / crop_pct), rounded down, before the centre is cropped. `squash` stretches
    the whole picture, which is our `fit` when nothing is cropped afterwards. Raises ModelError with everything in the
    configuration that we do not do and `asked` does not say otherwise.
    """
    channels, height, width = config["input_size"]
    crop_pct, crop_mode = config.get("crop_pct") or 0.875, config.get("crop_mode") or "center"
    problems = []
    if height != width and asked.crop is None:
        problems.append(f"its input is {height}x{width}, and ours are square: set preprocess.crop")
    if channels not in _CHANNELS and asked.channels is None:
        problems.append(f"its input has {channels} channels, and pictures have 1 or 3: set preprocess.channels")
    if config["interpolation"] not in _INTERPOLATIONS and asked.interpolation is None:
        problems.append(f"it resizes with {config['interpolation']!r}: set preprocess.interpolation to one of ours")
    is_squash = crop_mode == "squash" and crop_pct == 1
    if crop_mode != "center" and not is_squash and asked.fit is None:
        problems.append(f"it fits pictures by {crop_mode!r} with crop_pct {crop_pct:g}: set preprocess.fit to crop or stretch")
    if problems:
        raise ModelError(f"{name} wants a preprocessing that deploykit does not have", problems=problems)
    side = height if height == width else asked.crop or height
    return PreprocessTable(
        resize=None if is_squash else math.floor(side / crop_pct),
        crop=side,
        fit="stretch" if is_squash else "crop",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        channels="L" if channels == 1 else "RGB",
        interpolation=config["interpolation"] if config["interpolation"] in _INTERPOLATIONS else None,
    )


def _library() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise CapabilityError("timm is not installed", why=str(error), fix="pip install 'deploykit[timm]'") from error


def _refuse_reserved(model: ModelTable) -> None:
    problems = [f"model.args.{name}" for name in _RESERVED if name in (model.args or {})]
    if problems:
        raise ModelError(
            f"{model.name} takes arguments of the network alone",
            problems=problems,
            fix="--weights FILE, --weights default or --weights none says which weights it gets; its name is part of model.name",
        )


def _published(timm: Any, name: str) -> Mapping[str, Any]:
    """The configuration that timm publishes for a name. Raises ModelError when there is no such network or tag."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise ModelError(
            f"timm has no network {base!r}",
            why=f"the nearest names are {', '.join(near)}" if near else "",
            fix="timm.list_models() in Python lists all names",
        )
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
        raise ModelError(f"timm has no weights {tag!r} for {base}", why=f"it has {', '.join(tags) or 'none'}") from error
    return {} if published is None else dict(published.to_dict())


def _created(timm: Any, name: str, words: Mapping[str, Any]) -> nn.Module:
    """A new network. `exportable` takes those of timm's layers that exporters understand; the numbers are the same."""
    arguments.check(timm.create_model, {"model_name": name, **words}, name=f"timm:{name}")
    try:
        # What anything prints while a network is built stays out of stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            module: nn.Module = timm.create_model(name, exportable=True, **words)
    except Exception as error:  # networks of timm raise what their constructors trip over
        raise ModelError(f"timm cannot build {name}", why=f"{type(error).__name__}: {error}") from error
    return module


def _fetched(timm: Any, name: str, published: Mapping[str, Any]) -> Weights:
    """The published weights, from the cache of huggingface_hub or else from the network.

    Raises DeploykitError (exit 1) when they cannot be fetched.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = timm.create_model(name, pretrained=True)
    except Exception as error:  # huggingface_hub's and httpx's errors have no common base
        where = published.get("hf_hub_id") or published.get("url")
        raise DeploykitError(
            f"cannot fetch the weights of timm:{name} from {where}",
            why=(str(error).strip().splitlines() or [type(error).__name__])[0],
            fix="use --weights FILE with the file of the weights, or --weights none",
        ) from error
    tag = published.get("tag")
    return Weights(StateDict.of(module.state_dict()), f"timm {name}" + (f" ({tag})" if tag and tag not in name else ""))


def _is_imagenet(published: Mapping[str, Any]) -> bool:
    return published.get("num_classes") == _IMAGENET
