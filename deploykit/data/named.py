"""The data sets that books train on, by name, as torchvision reads them from a local folder; fetched only when asked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError

import numpy as np
from torchvision import datasets

from deploykit.data.images import Images
from deploykit.data.splits import Splits, to_train_and_to_hold_out
from deploykit.errors import DataError, DeploykitError, printable


def _emnist(root: str, train: bool, download: bool) -> Any:
    return datasets.EMNIST(root, "balanced", train=train, download=download)


def _imagenet(root: str, train: bool, download: bool) -> Any:
    return datasets.ImageNet(root, "train" if train else "val")


def _of(kind: Callable[..., Any]) -> Callable[[str, bool, bool], Any]:
    return lambda root, train, download: kind(root, train=train, download=download)


# Each: (root, whether the training part, whether to fetch it) -> torchvision's data set.
NAMES: Mapping[str, Callable[[str, bool, bool], Any]] = MappingProxyType(
    {
        "mnist": _of(datasets.MNIST),
        "fashion_mnist": _of(datasets.FashionMNIST),
        "emnist": _emnist,
        "cifar10": _of(datasets.CIFAR10),
        "cifar100": _of(datasets.CIFAR100),
        "imagenet": _imagenet,
    }
)


def named(name: str, root: Path, seed: int, *, download: bool = False) -> Splits:
    """The set `name` in `root`, laid out as torchvision lays it out, which also checks what it fetches by its digest.

    A tenth of each class of the training part, chosen by the seed, is held out and calibrated on; the test part (ImageNet's
    validation part) is the test. EMNIST is its balanced split of 47 classes, upright.

    Raises DataError when it is not there, DeploykitError (exit 1) when it cannot be fetched.
    """
    parts = [_images(name, root, train=train, download=download) for train in (True, False)]
    labels = parts[0].labels
    assert labels is not None
    rest, held_out = to_train_and_to_hold_out(labels, seed)
    return Splits(parts[0].take(rest), parts[0].take(held_out), parts[1])


def _images(name: str, root: Path, *, train: bool, download: bool) -> Images:
    # ImageNet may be given to nobody who did not agree to its terms, so torchvision does not fetch it.
    is_fetched = download and name != "imagenet"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = NAMES[name](str(root), train, is_fetched)
    except (URLError, ConnectionError) as error:
        fix = f"put torchvision's files into {printable(root)}"
        raise DeploykitError(f"cannot fetch {name}", why=str(error), fix=fix) from error
    except (RuntimeError, OSError) as error:
        fix = "data.root, or --root, names the folder that holds it"
        fix += "; --download fetches it there" if name != "imagenet" else ": the archives of ILSVRC-2012 and its development kit"
        raise DataError(f"{name} is not in {printable(root)}", why=str(error).strip().partition("\n")[0], fix=fix) from error
    part = "train" if train else "test"
    if name == "imagenet":
        sources: tuple[Any, ...] = tuple(Path(path) for path, _ in found.samples)
        names = tuple(printable(path.relative_to(root)) for path in sources)
        classes = tuple(words[0] for words in found.classes)
    else:
        pixels = np.asarray(found.data)
        sources = tuple(pixels.transpose(0, 2, 1) if name == "emnist" else pixels)
        names = tuple(f"{name}/{part}/{index:05d}" for index in range(len(sources)))
        classes = tuple(found.classes)
    labels = np.asarray([label for _, label in found.samples] if name == "imagenet" else found.targets, np.int64)
    return Images(names, labels, classes, (), f"{name} in {printable(root)}", sources)
