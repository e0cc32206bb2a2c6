"""Training: it learns, it keeps the best epoch, and the same seed gives the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from deploykit import finetune
from deploykit.artifact import Artifact, Format
from deploykit.data import Images
from deploykit.errors import UsageError
from deploykit.finetune import HISTORY
from deploykit.models import Model
from deploykit.recipe import FinetuneTable


def stripes(count: int, seed: int) -> Images:
    """Noisy pictures with vertical stripes (class 0) or horizontal ones (class 1)."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    wave = np.where(np.arange(16) // 2 % 2, 170, 80)
    pictures = [(wave[None, :] if label == 0 else wave[:, None]) + generator.integers(-40, 40, (16, 16)) for label in labels]
    sources = tuple(np.repeat(picture[:, :, None], 3, 2).astype(np.uint8) for picture in pictures)
    return Images(tuple(map(str, range(count))), labels, ("vertical", "horizontal"), (), "stripes", sources)


def network() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return networks.model(networks.Classifier(nn.Sequential(networks.conv(3, 8), nn.Dropout(0.1)), 8, 2), 16)


def train(folder: Path, model: Model | None = None, count: int = 64, **settings: object) -> Artifact:
    table = FinetuneTable(**{"epochs": 4, "batch": 16, "learning_rate": 2e-2, **settings})
    return finetune.finetune(model or network(), stripes(count, 0), stripes(32, 1), table, networks.made(folder))


class TestTraining:
    def test_it_learns_what_can_be_learned(self, tmp_path):
        model = network()
        before = finetune.evaluate(model, stripes(32, 1))

        artifact = train(tmp_path, model)

        assert artifact.facts["best_val_accuracy"] == finetune.evaluate(model, stripes(32, 1))[1] >= 0.95 > before[1]

    def test_the_network_is_left_in_eval_mode_with_the_weights_that_were_written(self, tmp_path):
        model = network()

        artifact = train(tmp_path, model, epochs=2)

        written = safetensors.torch.load_file(artifact.path)
        assert artifact.format is Format.CHECKPOINT
        assert not any(part.training for part in model.module.modules())
        assert all(torch.equal(value, written[name]) for name, value in model.module.state_dict().items())

    @pytest.mark.parametrize(
        ("results", "best"),
        [
            ([(1.0, 0.5), (0.4, 0.9), (0.3, 0.7)], 2),
            ([(0.6, 0.9), (0.4, 0.9), (0.5, 0.9)], 2),
            ([(0.4, 0.9), (0.4, 0.9), (0.4, 0.9)], 1),
        ],
        ids=["the highest accuracy", "then the lowest loss", "then the first"],
    )
    def test_the_best_epoch_is_kept(self, tmp_path, monkeypatch, results, best):
        seen = []

        def evaluate(model, images):
            seen.append({name: value.clone() for name, value in model.module.state_dict().items()})
            return results[len(seen) - 1]

        monkeypatch.setattr(finetune, "evaluate", evaluate)

        artifact = train(tmp_path, epochs=3)

        written = safetensors.torch.load_file(artifact.path)
        assert [all(torch.equal(value, one[name]) for name, value in written.items()) for one in seen].index(True) == best - 1

    @pytest.mark.parametrize("shift", [0, 2])
    def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(self, tmp_path, shift):
        def weights(name: str, seed: int) -> bytes:
            torch.rand(len(name))
            return train(tmp_path / name, epochs=2, shift=shift, seed=seed).path.read_bytes()

        assert weights("one", 1) == weights("again", 1) != weights("other", 2)

    def test_torchs_own_generator_is_left_as_it_was(self, tmp_path):
        before = torch.get_rng_state()

        train(tmp_path, epochs=1)

        assert torch.equal(torch.get_rng_state(), before)

    def test_a_last_batch_of_one_image_is_no_obstacle_for_batch_norm(self, tmp_path):
        body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2))

        artifact = train(tmp_path, networks.model(body, 16), count=17, epochs=1)

        weights = safetensors.torch.load_file(artifact.path)
        assert all(torch.isfinite(value.float()).all() for value in weights.values())

    @pytest.mark.parametrize(("count", "batch"), [(16, 1), (1, 16)])
    def test_one_image_at_a_time_is_refused_with_batch_norm_and_fine_without(self, tmp_path, count, batch):
        with pytest.raises(UsageError, match=rf"BatchNorm(.|\n)*batch is {batch}, and there are {count} training images"):
            train(tmp_path / "with", count=count, batch=batch)

        train(tmp_path / "without", networks.model(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), 16), count=count, batch=batch)


class TestHistory:
    def test_it_has_a_line_for_each_epoch(self, tmp_path):
        train(tmp_path, epochs=3)

        history = json.loads((tmp_path / HISTORY).read_text())
        assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
        assert set(history[0]) == {"epoch", "learning_rate", "train_loss", "val_loss", "val_accuracy"}

    def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(self):
        shares = [finetune._share_of_peak(step, 100, 0.1) for step in range(101)]

        assert shares[9] == 1
        assert shares[:10] == sorted(shares[:10])
        assert shares[10:] == sorted(shares[10:], reverse=True)
        assert shares[100] == pytest.approx(0)
        assert shares[0] > 0


class TestShift:
    def test_a_picture_moves_by_at_most_the_given_pixels_and_keeps_its_size(self):
        batch = np.arange(2 * 64, dtype=np.float32).reshape(2, 1, 8, 8)

        moved = finetune._shifted(batch, 2, np.random.default_rng(0))

        assert moved.shape == batch.shape
        centres = moved[:, 0, 4, 4]
        for before, centre in zip(batch, centres, strict=True):
            y, x = np.argwhere(before[0] == centre)[0]
            assert abs(y - 4) <= 2
            assert abs(x - 4) <= 2

    def test_no_shift_is_no_work(self):
        batch = np.zeros((1, 1, 8, 8), np.float32)

        assert finetune._shifted(batch, 0, np.random.default_rng(0)) is batch


class TestEvaluating:
    def test_loss_and_accuracy_are_those_of_pytorch(self):
        model, images = network(), stripes(32, 1)

        loss, accuracy = finetune.evaluate(model, images)

        inputs = torch.from_numpy(np.concatenate(list(images.batches(model.preprocess, 8))))
        labels = torch.from_numpy(np.array(images.labels))
        logits = model.module(inputs).detach()
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert accuracy == float((logits.argmax(1) == labels).float().mean())
