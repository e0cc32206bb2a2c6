"""How a network's own preprocessing and the recipe's keys become one Preprocess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from deploykit import recipe
from deploykit.artifact import Preprocess
from deploykit.errors import ModelError, RecipeError
from deploykit.recipe import PreprocessTable


def resolve(own: PreprocessTable | None, asked: PreprocessTable, *, name: str) -> tuple[Preprocess, tuple[str, ...]]:
    """The network's own keys with the recipe's over them, and notes on what was decided.

    Absent everywhere, `channels` is RGB, `interpolation` bilinear and `fit` crop; `crop`, `mean` and `std` have no
    default. When the recipe changes `crop` and not `resize`, the picture keeps its field of view: `resize` stays in
    the proportion that the network has (256 for 224 becomes 366 for 320). Where the network has no `resize` to keep a
    proportion with, it becomes the crop's side. With `fit` "stretch" it is the crop's side always.

    Raises ModelError with all problems: missing keys, `mean` or `std` of another length than `channels`, a `resize`
    that is smaller than the crop or contradicts `fit`.
    """
    given = {item.name: value for item in fields(asked) if (value := getattr(asked, item.name)) is not None}
    base = own or PreprocessTable()
    merged = replace(base, **given)
    if merged.crop is None or merged.mean is None or merged.std is None:
        missing = [key for key in ("crop", "mean", "std") if getattr(merged, key) is None]
        raise ModelError(
            f"{name} does not say how a picture becomes its input: {', '.join(missing)} missing",
            fix=f"set {', '.join(f'preprocess.{key}' for key in missing)} in the recipe, or give the network an attribute "
            "`preprocess` with these keys",
        )
    fit, channels = merged.fit or "crop", merged.channels or "RGB"
    resize = asked.resize or _resize(base, merged.crop, fit)
    problems = [
        f"preprocess.{key} has {len(values)} value{'s' * (len(values) > 1)} for {len(channels)} "
        f"channel{'s' * (len(channels) > 1)} ({channels})"
        for key, values in (("mean", merged.mean), ("std", merged.std))
        if len(values) != len(channels)
    ]
    if fit == "stretch" and resize != merged.crop:
        problems.append(f'preprocess.fit = "stretch" resizes to the crop, {merged.crop}: remove preprocess.resize = {resize}')
    elif resize is not None and resize < merged.crop:
        problems.append(f"preprocess.resize = {resize} is smaller than preprocess.crop = {merged.crop}")
    if problems:
        raise ModelError(f"the preprocessing of {name} contradicts itself", problems=problems)
    notes: tuple[str, ...] = ()
    if asked.resize is None and fit == "crop" and resize != base.resize:
        notes = (f"preprocess.crop = {merged.crop} without preprocess.resize: the shorter side is resized to {resize} pixels",)
    return (
        Preprocess(
            resize=resize,
            crop=(merged.crop, merged.crop),
            mean=merged.mean,
            std=merged.std,
            channels=channels,
            interpolation=merged.interpolation or "bilinear",
            fit=fit,
            frames=merged.frames,
        ),
        notes,
    )


def of_network(attribute: object, *, name: str) -> PreprocessTable | None:
    """A network's attribute `preprocess`, checked as the recipe's table is; None when it is no mapping (a method, say).

    Raises ModelError listing unknown keys, wrong types and values out of range.
    """
    if not isinstance(attribute, Mapping):
        return None
    content = {"name": "network", "model": {"name": name}, "preprocess": dict(attribute)}
    try:
        return recipe.parse(content, base=Path(), source=f"the attribute `preprocess` of {name}").preprocess
    except RecipeError as error:
        raise ModelError(error.what, problems=error.problems) from error


def _resize(base: PreprocessTable, crop: int, fit: str) -> int | None:
    if fit == "stretch":
        return crop
    if crop == base.crop:
        return base.resize
    if base.crop is None or base.resize is None or base.fit == "stretch":
        return crop
    return max(crop, round(crop * base.resize / base.crop))
