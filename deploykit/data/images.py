"""An ordered, immutable set of pictures, and the choice of a few of them for calibration."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploykit.artifact import Preprocess, digest_file
from deploykit.data.pictures import decode, has_colours, pillow_warnings_ignored, preprocess
from deploykit.errors import DataError, translating_os_errors
from deploykit.jsonable import digest as digest_json
from deploykit.machine import available_cores

_NAMED_IN_AN_ERROR = 10
_CHECKED_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Images:
    """An ordered set of pictures. Files stay on disk until they are asked for.

    `names` are relative and printable, for messages and reports. `labels` index `classes`; they are None, and
    `classes` is empty, when the set is unlabelled. `sources` are files, or uint8 arrays (H, W) or (H, W, 3).
    `skipped` lists the files that were left out because the user allowed it, each with its reason. `origin` says
    where the pictures are from: a folder, or the name of a built-in set.
    """

    names: tuple[str, ...]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    origin: str
    sources: tuple[Path | NDArray[np.uint8], ...]

    def __len__(self) -> int:
        return len(self.names)

    def __post_init__(self) -> None:
        if self.labels is not None:
            labels = np.array(self.labels, np.int64)
            labels.setflags(write=False)
            object.__setattr__(self, "labels", labels)

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """SHA-256 (hex) of every picture's bytes, in order."""
        return tuple(_digest(source) for source in self.sources)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over names, labels, classes and every file's bytes; it does not depend on where the folder lies.

        The bytes count because a flipped bit in a JPEG decodes without an error. Raises DeploykitError when a file
        cannot be read.
        """
        return digest_json(
            {
                "names": self.names,
                "labels": None if self.labels is None else self.labels.tolist(),
                "classes": self.classes,
                "contents": self.contents,
            }
        )

    def array(self, index: int, how: Preprocess) -> NDArray[np.float32]:
        """One network input, float32 (C, H, W). Raises DataError, naming the picture, when it cannot be used."""
        with pillow_warnings_ignored():
            return self._array(index, how)

    def batches(self, how: Preprocess, batch: int) -> Iterator[NDArray[np.float32]]:
        """All network inputs in order: float32 (B, C, H, W), C-contiguous; the last batch has what is left.

        The pictures of one batch are decoded on all cores. Memory does not depend on the number of pictures.
        Raises DataError, naming the first picture that cannot be used; `checked` finds all of them beforehand.
        """
        for outcomes in self._attempts(how, batch):
            yield np.stack([_array_or_raise(outcome) for outcome in outcomes])

    def checked(self, how: Preprocess, *, skip_bad: bool = False, progress: Callable[[int, int], None] | None = None) -> Images:
        """Decode and prepare every picture once, and return the set of those that can be used.

        Do this before long work: `folder` reads headers only, and a file cut short by a full disk has a good
        header. `progress` is called with (pictures done, pictures in all).

        Raises one DataError that counts all bad pictures and names the first ten, each with its reason, those that are in
        `skipped` already (`folder(skip_bad=True)` saw their headers) among them; with
        `skip_bad` only when none is left, and otherwise lists them in `skipped`.
        """
        good: list[int] = []
        bad: list[str] = []
        for outcomes in self._attempts(how, _CHECKED_AT_ONCE):
            for outcome in outcomes:
                index = len(good) + len(bad)
                if isinstance(outcome, DataError):
                    bad.append(f"{self.names[index]}: {outcome.why}")
                else:
                    good.append(index)
            if progress is not None:
                progress(len(good) + len(bad), len(self))
        bad = [*self.skipped, *bad]
        refuse_bad_images(bad, len(good) + len(bad), self.origin, skip_bad=skip_bad)
        return replace(self.take(good), skipped=tuple(bad))

    def thumbnail(self, index: int, side: int = 96) -> bytes:
        """A PNG whose longer side has `side` pixels; small pictures are enlarged with sharp pixels, not blurred."""
        with pillow_warnings_ignored():
            image = self._open(index)
        longer = max(image.size)
        size = max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer))
        resampling = Image.Resampling.NEAREST if longer < side else Image.Resampling.LANCZOS
        file = io.BytesIO()
        image.resize(size, resampling).save(file, "PNG")
        return file.getvalue()

    def is_grey(self, looked_at: int = 64) -> bool:
        """Whether none of some pictures, spread over the set, has colours by its header. Raises DataError as `array` does."""
        some = np.unique(np.linspace(0, len(self) - 1, min(looked_at, len(self))).astype(int)).tolist() if len(self) else []
        return not any(_has_colours(self.sources[int(index)]) for index in some)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Images:
        """The pictures at `indices`, in that order."""
        chosen = [int(index) for index in indices]
        return replace(
            self,
            names=tuple(self.names[index] for index in chosen),
            labels=None if self.labels is None else self.labels[chosen],
            sources=tuple(self.sources[index] for index in chosen),
        )

    def _open(self, index: int) -> Image.Image:
        source = self.sources[index]
        return decode(source) if isinstance(source, Path) else Image.fromarray(source)

    def _array(self, index: int, how: Preprocess) -> NDArray[np.float32]:
        try:
            return preprocess(self._open(index), how)
        except DataError as error:
            raise DataError(
                f"cannot use the picture {self.names[index]} of {self.origin}",
                why=error.why,
                fix="repair or remove it, or leave such files out with --skip-bad-images",
            ) from error

    def _attempts(self, how: Preprocess, size: int) -> Iterator[list[NDArray[np.float32] | DataError]]:
        """Every picture's array, or why it has none, in order and `size` at a time."""

        def attempt(index: int) -> NDArray[np.float32] | DataError:
            try:
                return self._array(index, how)
            except DataError as error:
                return error

        if size < 1:
            raise ValueError(f"a batch of {size} images")
        # Pillow decodes and resizes without the GIL. Work ahead of the consumer would be a thread beside the user's
        # own, and the filters of `warnings` cannot be held in two threads: see pillow_warnings_ignored.
        with ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(self), size):
                with pillow_warnings_ignored():
                    outcomes = list(pool.map(attempt, range(start, min(start + size, len(self)))))
                yield outcomes


def calibration_subset(images: Images, count: int, seed: int) -> Images:
    """`count` pictures spread over the whole set, in its order; all of them when there are not more.

    The set is cut into `count` equal stretches and one picture is drawn from each. A folder is sorted, so classes,
    cameras and days lie together in it, and every large group gets its share also where there are no labels.
    The same set, count and seed give the same choice.
    """
    if count >= len(images):
        return images
    edges = np.arange(count + 1) * len(images) // count
    # RandomState, because numpy promises never to change its stream; that of default_rng may change (NEP 19).
    drawn = np.random.RandomState(seed).random_sample(count)
    return images.take(edges[:-1] + (drawn * np.diff(edges)).astype(np.int64))


def refuse_bad_images(bad: Sequence[str], total: int, origin: str, *, skip_bad: bool) -> None:
    """Raise one DataError about all `bad` images of `total`, unless they may be skipped and others are left."""
    if not bad or (skip_bad and len(bad) < total):
        return
    raise DataError(
        f"{len(bad)} of {total} images in {origin} cannot be used",
        problems=first_problems(bad),
        fix="choose a folder with pictures" if skip_bad else "repair or remove them, or leave them out with --skip-bad-images",
    )


def first_problems(problems: Sequence[str]) -> list[str]:
    """The first ten problems, and how many more there are."""
    more = len(problems) - _NAMED_IN_AN_ERROR
    return [*problems[:_NAMED_IN_AN_ERROR], *([f"and {more} more"] if more > 0 else [])]


def _array_or_raise(outcome: NDArray[np.float32] | DataError) -> NDArray[np.float32]:
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


def _has_colours(source: Path | NDArray[np.uint8]) -> bool:
    return has_colours(source) if isinstance(source, Path) else source.ndim == 3


def _digest(source: Path | NDArray[np.uint8]) -> str:
    if isinstance(source, Path):
        with translating_os_errors("read", source):
            return digest_file(source)
    return hashlib.sha256(repr(source.shape).encode() + source.tobytes()).hexdigest()
