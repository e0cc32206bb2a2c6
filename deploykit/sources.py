"""Recipe -> the network and the pictures, each loaded when a stage first asks for it.

`digest` says what they are made from without loading torch, so that a finished run is recognised in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit import artifact, data
from deploykit.artifact import Artifact, Preprocess
from deploykit.data import Images, Splits
from deploykit.errors import DataError, UsageError, printable
from deploykit.jsonable import digest, to_json
from deploykit.progress import Progress, silent
from deploykit.recipe import Recipe

if TYPE_CHECKING:
    from deploykit.models import Model

NOISE = "noise"
# Enough for BatchNorm to see spatial statistics of many pictures, few enough for the activations of a large network.
_BATCH_NORM_BATCH, _BATCH_NORM_BATCH_LARGE, _LARGE = 16, 4, 320  # images, and pixels of a side
_ANY_PREPROCESS = Preprocess(resize=None, crop=(1, 1), mean=(0.0,) * 3, std=(1.0,) * 3, fit="stretch")


class Sources:
    """What a recipe's stages read: the network, with the weights of `finetuned` if that stage is done, and the pictures."""

    def __init__(self, recipe: Recipe, progress: Progress = silent, *, finetuned: Artifact | None = None) -> None:
        self.recipe, self.progress, self.finetuned = recipe, progress, finetuned

    @cached_property
    def model(self) -> Model:
        """The FP32 PyTorch network that is exported: fine-tuned if there is such a stage.

        Random weights get BatchNorm statistics from the calibration pictures: without them the activations of a deep
        network vanish or explode, and neither ranges nor parity would mean anything. What is no classifier gets them in any case,
        for its answers without them are one class everywhere, or no boxes.
        """
        from deploykit import models

        found = self.untrained
        if self.finetuned is not None:
            learned = models.with_weights(found, self.finetuned.path, origin=f"fine-tuned from {found.weights}")
            return replace(learned, notes=(*learned.notes, *self._said_of_evaluation()))
        pictures = self.calibration if found.task == "classify" else self.evaluation
        if found.is_random and pictures is not None:
            is_large = found.task != "classify" and max(found.preprocess.crop) > _LARGE
            size = _BATCH_NORM_BATCH_LARGE if is_large else _BATCH_NORM_BATCH
            models.calibrate_batch_norm(found, pictures.batches(found.preprocess, size))
        return found

    @cached_property
    def untrained(self) -> Model:
        """The network as its weights came, with a head for the classes it is to learn."""
        from deploykit import models

        if self.recipe.finetune is None:
            return models.load(self.recipe.model, self.recipe.preprocess)
        classes = self.train.classes
        found = models.load(self.recipe.model, self.recipe.preprocess, data_classes=classes)
        if found.task != "classify":
            why = f"its task is to {found.task}, and the pictures of data.train have one label each"
            raise UsageError(
                f"{found.name} cannot be fine-tuned here", why=why, fix="leave out [finetune], and name a checkpoint"
            )
        found = models.with_classes(found, classes, seed=self.recipe.finetune.seed)
        said = _channels_said(self.train.is_grey(), found.preprocess.channels)
        return replace(found, notes=(*found.notes, *said))

    @property
    def train(self) -> Images:
        """The labelled pictures to train on."""
        if self._splits is not None:
            return self._splits.train
        return self._train_and_held_out[0]

    @property
    def held_out(self) -> Images:
        """What fine-tuning selects the best epoch on; never the pictures that accuracy is reported for."""
        if self._splits is not None:
            return self._splits.calibration
        return self._train_and_held_out[1]

    @cached_property
    def calibration(self) -> Images | None:
        """The pictures to calibrate on."""
        chosen = self._chosen_for_calibration
        return None if chosen is None else self._checked(chosen, "calibration")

    @cached_property
    def evaluation(self) -> Images:
        """The pictures decisions are judged on: labelled ones if there are any, else the calibration's, else noise.

        After a training these are what the best epoch was chosen on, where the recipe names no others.
        """
        if self._splits is not None:
            return self._splits.test
        table = self.recipe.data
        if table.validate is not None:
            from deploykit.models.tasks import SCENES
            from deploykit.models.torchvision import imagenet_synsets

            model = self.untrained  # fine-tuning changes its weights, not its classes
            if model.task in SCENES:  # there is no folder for the classes of pixels and boxes
                return self._checked(data.folder(Path(table.validate), labelled=False, skip_bad=True), "validation")
            synsets = imagenet_synsets() if model.num_classes == len(imagenet_synsets()) else ()
            found = data.folder(Path(table.validate), classes=model.classes, synsets=synsets, labelled=True, skip_bad=True)
            if len(found.classes) != model.num_classes:
                raise DataError(
                    f"cannot tell the classes of the images in {found.origin}",
                    why=f"it has {len(found.classes)} sub-folders, {model.name} has {model.num_classes} classes, "
                    "and nothing says which is which",
                    fix="make one sub-folder for each class; their sorted names are taken in the order of the network's outputs",
                )
            return self._checked(found, "validation")
        if self._is_judged_on_held_out:
            return self.held_out
        if self.calibration is not None:
            return self.calibration
        from deploykit.models.tasks import noise_pictures

        return _noise(self.untrained, noise_pictures(self.untrained, self.recipe.export.samples))

    @property
    def _is_judged_on_held_out(self) -> bool:
        table = self.recipe.data
        is_trained = self.recipe.finetune is not None and table.train is not None
        return is_trained and table.name is None and table.validate is None

    def _said_of_evaluation(self) -> tuple[str, ...]:
        if not self._is_judged_on_held_out:
            return ()
        return (
            f"accuracy is that on the {len(self.held_out)} held-out images that the best epoch was chosen by, so expect a little "
            "less of new ones; data.validate names others",
        )

    def check(self) -> None:
        """Read every picture that this run will need, so that a bad one is found before the long work and not after it.

        Raises DataError when a gate would be judged on pictures that were calibrated on.
        """
        calibration, evaluation = self.calibration, self.evaluation
        if self.recipe.finetune is not None:
            _ = self.train
        if self.recipe.gate and calibration is not None:
            both = set(calibration.contents) & set(evaluation.contents)
            if both:
                known = [name for name, content in zip(evaluation.names, evaluation.contents, strict=True) if content in both]
                raise DataError(
                    f"{len(known)} of {len(evaluation)} validation images are also calibration images",
                    why=f"a gate must not be judged on what ranges were chosen from; the first is {known[0]}",
                    fix="keep the two folders apart",
                )

    @cached_property
    def digest(self) -> str:
        """What the network and all pictures are made from. Folder names are part of the pictures' names, so this settles
        the labels without knowing the network's classes."""
        pictures = (self._chosen_for_calibration, self._splits.test if self._splits else self._unlabelled_validation)
        weights = self._network_digest if self.finetuned is None else self.finetuned.identity
        return digest([weights, [found.digest if found is not None else None for found in pictures]])

    @cached_property
    def training_digest(self) -> str:
        """What fine-tuning starts from."""
        return digest([self._network_digest, self.train.digest, self.held_out.digest])

    @property
    def _network_digest(self) -> str:
        """The recipe's tables about the network, its checkpoint, and a user's code: torch is loaded only for the last."""
        table = self.recipe.model
        files = [Path(table.weights)] if Path(table.weights).is_file() else []
        if table.is_user_code:
            from deploykit.models import user

            _ = self.untrained  # what the code imports is known once it has run
            files += user.source_files(table.name)
        return digest(
            {
                "model": to_json(table),
                "preprocess": to_json(self.recipe.preprocess),
                "files": [artifact.digest_file(path) for path in files],
            }
        )

    @cached_property
    def _splits(self) -> Splits | None:
        table = self.recipe.data
        if table.name is None:
            return None
        if table.name == "digits":
            return data.digits(table.seed)
        from deploykit.data.named import named  # torchvision

        assert table.root is not None
        return named(table.name, Path(table.root), table.seed, download=table.download)

    @cached_property
    def _chosen_for_calibration(self) -> Images | None:
        table = self.recipe.data
        if self._splits is not None:
            found = self._splits.calibration
        elif table.calibrate is not None:
            found = data.folder(Path(table.calibrate), labelled=False, skip_bad=True)
        elif self.recipe.finetune is not None and table.train is not None:
            found = self.train
        else:
            return None
        return data.calibration_subset(found, table.calibration_images, table.seed)

    def _checked(self, images: Images, purpose: str) -> Images:
        """The pictures that can be used, each decoded once; the others are refused, or counted if the user allowed it.

        Folders are listed with bad headers left out, so that those and what does not decode are refused together.
        """
        skip_bad = self.recipe.data.skip_bad_images
        return images.checked(self.untrained.preprocess, skip_bad=skip_bad, progress=self._announced(purpose))

    def _announced(self, purpose: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(f"read {purpose} images", done, total)

    @cached_property
    def _unlabelled_validation(self) -> Images | None:
        path = self.recipe.data.validate
        return None if path is None else data.folder(Path(path), labelled=False, skip_bad=True)

    @cached_property
    def _train_and_held_out(self) -> tuple[Images, Images]:
        """What to train on and what to select on: two folders, or nine tenths and one of the same, of each class alike."""
        table = self.recipe.data
        assert table.train is not None
        found = data.folder(Path(table.train), labelled=True, skip_bad=True)
        # The network is not known yet, only the names of its classes; any preparation finds what cannot be decoded.
        found = found.checked(_ANY_PREPROCESS, skip_bad=table.skip_bad_images, progress=self._announced("training"))
        assert found.labels is not None
        if len(found.classes) < 2:
            why = f"{printable(table.train)} has the class {', '.join(found.classes)} alone"
            raise DataError("there is nothing to learn", why=why, fix="one sub-folder for each of two or more classes")
        if table.held_out is not None:
            return found, self._held_out_beside(found)
        lonely = [found.classes[label] for label in range(len(found.classes)) if (found.labels == label).sum() < 2]
        if lonely:
            raise DataError(
                f"{printable(table.train)} has classes with fewer than two images",
                problems=lonely,
                why="one image of each class is held out to select the best epoch on, and at least one must remain to train on",
            )
        rest, held_out = data.to_train_and_to_hold_out(found.labels, table.seed)
        return found.take(rest), found.take(held_out)

    def _held_out_beside(self, train: Images) -> Images:
        """The pictures of data.held_out, labelled by the classes of `train`."""
        table = self.recipe.data
        assert table.held_out is not None
        found = data.folder(Path(table.held_out), classes=train.classes, labelled=True, skip_bad=True)
        found = found.checked(_ANY_PREPROCESS, skip_bad=table.skip_bad_images, progress=self._announced("held-out"))
        both = set(found.contents) & set(train.contents)
        if both:
            known = next(name for name, content in zip(found.names, found.contents, strict=True) if content in both)
            raise DataError(
                f"{len(both)} images of {printable(table.held_out)} are also training images",
                why=f"the best epoch must not be chosen by what was learned; the first is {known}",
                fix="keep the two folders apart",
            )
        return found


def _channels_said(is_grey: bool, channels: str) -> tuple[str, ...]:
    """How pictures are made fit for the first layer, where they are not so by themselves."""
    if is_grey and channels == "RGB":
        return ("the pictures are grey, and the first layer takes three channels: all three get the same values",)
    if not is_grey and channels == "L":
        return ("the pictures are in colour, and the first layer takes one channel: they are turned to grey",)
    return ()


def _noise(model: Model, count: int) -> Images:
    """Pictures of seeded noise, for exports without any picture: answers can be compared, decisions mean nothing."""
    generator = np.random.default_rng(0)
    channels, (height, width) = len(model.preprocess.channels), model.preprocess.crop
    width *= 1 if model.preprocess.frames is None else 2  # room for the crop to move
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Images(
        names=tuple(f"noise/{index:02d}" for index in range(count)),
        labels=None,
        classes=(),
        skipped=(),
        origin=NOISE,
        sources=tuple(generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)),
    )
