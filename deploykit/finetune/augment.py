"""Augmentation by torchvision's own transforms, on the bytes that preprocessing had before it normalised them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from deploykit.artifact import Preprocess
from deploykit.recipe import FinetuneTable

_MIRRORED = 0.5
_DEGREES = 15
_CROPPED = (0.5, 1.0)  # the share of the area that is left; torchvision's 0.08 is for long training from scratch
_JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05}


class Augmented:
    """Turns preprocessed pictures into changed ones, by the presets that the settings name."""

    def __init__(self, settings: FinetuneTable, how: Preprocess) -> None:
        presets: dict[str, Callable[[], v2.Transform]] = {
            "crop": lambda: v2.RandomResizedCrop(how.crop, scale=_CROPPED, antialias=True),
            "shift": lambda: v2.RandomCrop(how.crop, padding=settings.shift, padding_mode="edge"),
            "flip": lambda: v2.RandomHorizontalFlip(_MIRRORED),
            "rotate": lambda: v2.RandomRotation(_DEGREES, v2.InterpolationMode.BILINEAR),
            "colour": lambda: v2.ColorJitter(**_JITTER),
            "trivial": v2.TrivialAugmentWide,
            "rand": v2.RandAugment,
        }
        wanted = [*settings.augment, *(["shift"] if settings.shift else [])]
        self._change = v2.Compose([make() for name, make in presets.items() if name in wanted]) if wanted else None
        channels = (len(how.mean), 1, 1)
        self._mean, self._std = torch.tensor(how.mean).reshape(channels), torch.tensor(how.std).reshape(channels)

    def __call__(self, batch: NDArray, seeds: Iterable[int]) -> torch.Tensor:  # type: ignore[type-arg]
        """(B, C, H, W) normalised floats -> the same, every picture changed by what its own seed draws.

        So what becomes of a picture does not depend on the others of its batch, nor on the process that it is read in.
        torch's generator, which torchvision draws from, is left as it was.
        """
        floats = torch.from_numpy(batch)
        if self._change is None:
            return floats
        # Pictures were bytes before they were normalised, so this gives them back exactly.
        pixels = (floats * self._std + self._mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        before = torch.get_rng_state()
        changed = torch.stack([self._changed(picture, seed) for picture, seed in zip(pixels, seeds, strict=True)])
        torch.set_rng_state(before)
        return (changed.float().div_(255) - self._mean) / self._std

    def _changed(self, picture: torch.Tensor, seed: int) -> torch.Tensor:
        assert self._change is not None
        torch.default_generator.manual_seed(seed)
        changed: torch.Tensor = self._change(picture)
        return changed


def mixed(settings: FinetuneTable, classes: int) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Mixup or CutMix of a batch and its labels, which become shares of classes; nothing where the settings ask for none."""
    kinds: dict[str, Callable[[], v2.Transform]] = {
        "mixup": lambda: v2.MixUp(num_classes=classes, alpha=0.2),
        "cutmix": lambda: v2.CutMix(num_classes=classes, alpha=1.0),
    }
    if settings.mix == "none":
        return lambda pictures, labels: (pictures, labels)
    mixing = kinds[settings.mix]()
    return lambda pictures, labels: mixing(pictures, labels)


def names(settings: FinetuneTable) -> Sequence[str]:
    """Every augmentation that is on, for people."""
    return [*settings.augment, *([f"shift {settings.shift}"] if settings.shift else []), *({settings.mix} - {"none"})]
