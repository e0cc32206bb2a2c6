"""Recipe -> the network and the pictures, each loaded when a stage first asks for it.

`digest` says what they are made from without loading torch, so that a finished run is recognised in seconds.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit import artifact, data
from deploykit.artifact import Artifact
from deploykit.data import Images, Splits
from deploykit.jsonable import digest, to_json
from deploykit.progress import Progress, silent
from deploykit.recipe import Recipe

if TYPE_CHECKING:
    from deploykit.models import Model

# Enough for BatchNorm to see spatial statistics of many pictures, few enough for the activations of a large network.
_BATCH_NORM_BATCH = 16


class Sources:
    """What a recipe's stages read. `finetuned` is set by the pipeline once that stage is done."""

    def __init__(self, recipe: Recipe, progress: Progress = silent) -> None:
        self.recipe, self.progress = recipe, progress
        self.finetuned: Artifact | None = None

    @cached_property
    def model(self) -> Model:
        """The FP32 PyTorch network that is exported: fine-tuned if there is such a stage.

        Random weights get BatchNorm statistics from the calibration pictures: without them the activations of a deep
        network vanish or explode, and neither ranges nor parity would mean anything.
        """
        from deploykit import models

        table = self.recipe.model
        if self.finetuned is not None:
            classes = len(self.finetuned.classes) or None
            table = replace(table, weights=str(self.finetuned.path), weights_key=None, classes=classes)
            found = models.load(table, self.recipe.preprocess, data_classes=self.finetuned.classes)
            return replace(found, weights=f"fine-tuned from {self.finetuned.facts['weights']}")
        found = self.untrained
        if found.is_random and self.calibration is not None:
            pictures = self.calibration.batches(found.preprocess, _BATCH_NORM_BATCH)
            models.calibrate_batch_norm(found, pictures)
        return found

    @cached_property
    def untrained(self) -> Model:
        """The network as its weights came."""
        from deploykit import models

        classes = self.train.classes if self.recipe.finetune is not None else None
        return models.load(self.recipe.model, self.recipe.preprocess, data_classes=classes)

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
        """The pictures to calibrate on, every one of them decoded once: a bad one is found before long work starts."""
        chosen = self._chosen_for_calibration
        if chosen is None:
            return None
        return chosen.checked(
            self.untrained.preprocess,
            skip_bad=self.recipe.data.skip_bad_images,
            progress=lambda done, total: self.progress("read calibration images", done, total),
        )

    @cached_property
    def evaluation(self) -> Images:
        """The pictures decisions are judged on: labelled ones if there are any, else the calibration's, else noise."""
        if self._splits is not None:
            return self._splits.test
        table = self.recipe.data
        if table.validate is not None:
            from deploykit.models.torchvision import imagenet_synsets

            synsets = imagenet_synsets() if self.model.num_classes == len(imagenet_synsets()) else ()
            found = data.folder(
                Path(table.validate), classes=self.model.classes, synsets=synsets, labelled=True, skip_bad=table.skip_bad_images
            )
            return found.checked(
                self.model.preprocess,
                skip_bad=table.skip_bad_images,
                progress=lambda done, total: self.progress("read validation images", done, total),
            )
        return self.calibration if self.calibration is not None else _noise(self.model, self.recipe.export.samples)

    @property
    def digest(self) -> str:
        """What the network and all pictures are made from. Folder names are part of the pictures' names, so this settles
        the labels without knowing the network's classes."""
        table, tables = self.recipe.model, self.recipe.data
        named = (table.weights, table.name.rpartition(":")[0])
        pictures = [self._chosen_for_calibration, self._splits.test if self._splits else None]
        if tables.validate is not None:
            pictures.append(data.folder(Path(tables.validate), labelled=False, skip_bad=True))
        return digest(
            {
                "model": to_json(table),
                "preprocess": to_json(self.recipe.preprocess),
                "data": to_json(tables),
                "files": {name: artifact.digest_file(Path(name)) for name in named if Path(name).is_file()},
                "pictures": [found.digest if found is not None else None for found in pictures],
                "finetuned": self.finetuned.sha256 if self.finetuned is not None else None,
            }
        )

    @property
    def training_digest(self) -> str:
        """What fine-tuning starts from."""
        return digest([self.digest, self.train.digest, self.held_out.digest])

    @cached_property
    def _splits(self) -> Splits | None:
        return data.digits(self.recipe.data.seed) if self.recipe.data.name is not None else None

    @cached_property
    def _chosen_for_calibration(self) -> Images | None:
        table = self.recipe.data
        if self._splits is not None:
            found = self._splits.calibration
        elif table.calibrate is not None:
            found = data.folder(Path(table.calibrate), labelled=False, skip_bad=table.skip_bad_images)
        else:
            return None
        return data.calibration_subset(found, table.calibration_images, table.seed)

    @cached_property
    def _train_and_held_out(self) -> tuple[Images, Images]:
        """Nine tenths to train on and one tenth to select on, each class in the same proportion."""
        table = self.recipe.data
        assert table.train is not None
        found = data.folder(Path(table.train), labelled=True, skip_bad=table.skip_bad_images)
        assert found.labels is not None
        generator = np.random.default_rng(table.seed)
        held_out: list[int] = []
        for label in np.unique(found.labels):
            members = generator.permutation(np.flatnonzero(found.labels == label))
            held_out.extend(members[: max(1, len(members) // 10)].tolist())
        rest = sorted(set(range(len(found))) - set(held_out))
        return found.take(rest), found.take(sorted(held_out))


def _noise(model: Model, count: int) -> Images:
    """Pictures of seeded noise, for exports without any picture: answers can be compared, decisions mean nothing."""
    generator = np.random.default_rng(0)
    channels, height, width = model.preprocess.shape
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Images(
        names=tuple(f"noise/{index:02d}" for index in range(count)),
        labels=None,
        classes=(),
        skipped=(),
        origin="noise",
        sources=tuple(generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)),
    )
