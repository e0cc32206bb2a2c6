"""Training: it learns, it keeps the best epoch, and the same seed gives the same weights."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from deploykit import finetune
from deploykit.artifact import Artifact, Format, Preprocess
from deploykit.data import Images
from deploykit.errors import CapabilityError, DeploykitError, StageError, UsageError
from deploykit.finetune import HISTORY, judging, loop
from deploykit.finetune.augment import Augmented, mixed
from deploykit.finetune.lesson import Lesson
from deploykit.finetune.schedule import share_of_peak
from deploykit.finetune.state import FILE
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

        def evaluate(model, *_):
            seen.append({name: value.clone() for name, value in model.module.state_dict().items()})
            return results[len(seen) - 1]

        monkeypatch.setattr(judging, "evaluate", evaluate)

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
        assert set(history[0]) == {"epoch", "learning_rate", "train_loss", "val_loss", "val_accuracy", "train_accuracy"}

    @pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "step"])
    def test_the_learning_rate_rises_to_its_peak_and_falls(self, schedule):
        table = FinetuneTable(schedule=schedule, warmup=0.1)

        shares = [share_of_peak(step, 100, table) for step in range(101)]

        assert max(shares) == pytest.approx(1)
        assert shares[:10] == sorted(shares[:10])
        assert shares[10:] == sorted(shares[10:], reverse=True)
        assert 0 < shares[0] <= 0.1
        assert shares[100] <= 0.0101

    def test_the_cosine_ends_at_zero_and_steps_are_tenths(self):
        assert share_of_peak(100, 100, FinetuneTable()) == pytest.approx(0)
        assert {round(share_of_peak(step, 99, FinetuneTable(schedule="step", warmup=0)), 6) for step in range(99)} == {
            1,
            0.1,
            0.01,
        }


HOW = Preprocess(resize=None, crop=(8, 8), mean=(0.5,), std=(0.25,), fit="stretch")


def prepared(pixels: np.ndarray) -> np.ndarray:
    """Bytes (N, C, H, W) as preprocessing leaves them."""
    return ((pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).astype(np.float32)


class TestAugmentation:
    def test_nothing_asked_for_is_no_work(self):
        batch = np.zeros((1, 1, 8, 8), np.float32)

        assert np.shares_memory(Augmented(FinetuneTable(), HOW)(batch, [0]).numpy(), batch)

    def test_a_shifted_picture_moves_by_at_most_the_given_pixels_and_keeps_its_size(self):
        pixels = np.arange(2 * 64, dtype=np.uint8).reshape(2, 1, 8, 8)

        moved = Augmented(FinetuneTable(shift=2), HOW)(prepared(pixels), range(2)).numpy()

        assert moved.shape == pixels.shape
        for before, after in zip(prepared(pixels), moved, strict=True):
            distance = np.abs(before[0] - after[0, 4, 4])
            y, x = np.unravel_index(distance.argmin(), distance.shape)
            assert distance.min() < 1e-6
            assert max(abs(y - 4), abs(x - 4)) <= 2

    def test_a_mirrored_picture_has_the_very_same_values(self):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 1, 8, 8), dtype=np.uint8)
        before = prepared(pixels)

        after = Augmented(FinetuneTable(augment=("flip",)), HOW)(before, range(32)).numpy()

        mirrored = [np.abs(one - other[:, :, ::-1]).max() < 1e-5 for one, other in zip(before, after, strict=True)]
        same = [np.abs(one - other).max() < 1e-5 for one, other in zip(before, after, strict=True)]
        assert all(one or other for one, other in zip(mirrored, same, strict=True))
        assert 0 < sum(mirrored) < 32

    @pytest.mark.parametrize("name", ["crop", "flip", "rotate", "colour", "trivial", "rand"])
    def test_every_preset_keeps_the_shape_and_draws_from_the_seed(self, name):
        how = replace(HOW, mean=(0.5,) * 3, std=(0.25,) * 3)
        batch = np.random.default_rng(0).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)

        def changed(seed: int) -> torch.Tensor:
            return Augmented(FinetuneTable(augment=(name,)), how)(batch, range(seed, seed + 4))

        assert changed(1).shape == batch.shape
        assert torch.equal(changed(1), changed(1))
        assert any(not torch.equal(changed(1), changed(seed)) for seed in range(2, 6))

    @pytest.mark.parametrize("mix", ["mixup", "cutmix"])
    def test_mixed_labels_are_shares_of_the_classes(self, mix):
        pictures, labels = mixed(FinetuneTable(mix=mix), 3)(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))

        assert pictures.shape == (4, 3, 8, 8)
        assert labels.shape == (4, 3)
        assert torch.allclose(labels.sum(1), torch.ones(4))


class TestEvaluating:
    def test_loss_and_accuracy_are_those_of_pytorch(self):
        model, images = network(), stripes(32, 1)

        loss, accuracy = finetune.evaluate(model, images)

        inputs = torch.from_numpy(np.concatenate(list(images.batches(model.preprocess, 8))))
        labels = torch.from_numpy(np.array(images.labels))
        logits = model.module(inputs).detach()
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert accuracy == float((logits.argmax(1) == labels).float().mean())


def named() -> Model:
    """The network above, which knows its two classes, so that its head is known."""
    return replace(network(), num_classes=2, classes=("vertical", "horizontal"))


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.module.state_dict().items()}


def changed(model: Model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])}


HEAD = {"head.weight", "head.bias"}


class TestWhatLearns:
    def test_the_head_alone_learns_and_batch_norm_below_it_keeps_its_statistics(self, tmp_path):
        model = named()
        before = weights_of(model)

        train(tmp_path, model, mode="head", epochs=2)

        assert changed(model, before) == HEAD

    def test_first_the_head_and_then_everything_at_a_lower_rate(self, tmp_path):
        model = named()
        before = weights_of(model)

        train(tmp_path, model, mode="head first", epochs=4, head_epochs=2, rest_rate=0.25, warmup=0)

        rates = [epoch["learning_rate"] for epoch in json.loads((tmp_path / HISTORY).read_text())]
        assert changed(model, before) > HEAD
        assert rates[2] == pytest.approx(rates[0] / 4)

    def test_what_freeze_names_stays_as_it_is(self, tmp_path):
        model = named()
        before = weights_of(model)

        train(tmp_path, model, freeze=("body*",), epochs=1)

        assert changed(model, before) == HEAD

    def test_what_unfreeze_names_learns_beside_the_head(self, tmp_path):
        model = named()
        before = weights_of(model)

        train(tmp_path, model, mode="head", unfreeze=("body",), epochs=1)

        assert changed(model, before) == set(before)

    def test_all_patterns_that_name_nothing_are_told_at_once(self, tmp_path):
        with pytest.raises(UsageError, match=r"finetune.freeze: stem(.|\n)*finetune.unfreeze: tail(.|\n)*modules are called"):
            train(tmp_path, named(), freeze=("stem",), unfreeze=("tail",))

    def test_nothing_left_to_learn_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="is left to learn"):
            train(tmp_path, named(), freeze=("*",))

    def test_every_parameter_may_learn_again_afterwards(self, tmp_path):
        model = named()

        train(tmp_path, model, mode="head", epochs=1)

        assert all(parameter.requires_grad for parameter in model.module.parameters())


class TestOptions:
    @pytest.mark.parametrize(
        "settings",
        [
            {"optimizer": "sgd"},
            {"optimizer": "sgd", "momentum": 0.0},
            {"schedule": "one-cycle"},
            {"clip_norm": 0.5},
            {"ema": 0.8},
            {"class_weights": "balanced"},
            {"mix": "mixup", "epochs": 8},
            {"augment": ("flip", "crop")},
            {"channels_last": True},
            {"autocast": True},
            {"deterministic": True},
        ],
        ids=str,
    )
    def test_it_learns_with_each_of_them(self, tmp_path, settings):
        assert train(tmp_path, named(), **{"epochs": 6, **settings}).facts["best_val_accuracy"] >= 0.9

    def test_what_is_kept_with_ema_is_the_average(self, tmp_path):
        one, average = (train(tmp_path / str(ema), named(), epochs=1, ema=ema) for ema in (None, 0.9))

        assert one.path.read_bytes() != average.path.read_bytes()

    def test_a_gradient_of_no_size_teaches_nothing(self, tmp_path):
        model = named()
        before = weights_of(model)

        train(tmp_path, model, epochs=1, optimizer="sgd", clip_norm=1e-6, weight_decay=0)

        moved = max(float((value.detach() - before[name]).abs().max()) for name, value in model.module.named_parameters())
        assert moved < 1e-6

    def test_patience_ends_a_training_that_does_not_improve(self, tmp_path, monkeypatch):
        monkeypatch.setattr(judging, "evaluate", lambda *_: (1.0, 0.5))

        train(tmp_path, epochs=9, patience=2)

        assert len(json.loads((tmp_path / HISTORY).read_text())) == 3

    def test_a_head_without_progress_ends_its_own_phase_and_not_the_training(self, tmp_path, monkeypatch):
        monkeypatch.setattr(judging, "evaluate", lambda *_: (1.0, 0.5))

        train(tmp_path, named(), mode="head first", head_epochs=5, epochs=10, patience=1, rest_rate=0.5, warmup=0)

        rates = [epoch["learning_rate"] for epoch in json.loads((tmp_path / HISTORY).read_text())]
        assert len(rates) == 4  # the first epoch and one without progress, of each phase
        assert rates[2] == pytest.approx(rates[0] / 2)

    def test_what_torch_refuses_is_told_and_no_traceback(self, tmp_path, monkeypatch):
        def without_memory(*_: Any) -> tuple[float, int]:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 3 GiB")

        monkeypatch.setattr(loop, "step", without_memory)

        with pytest.raises(StageError, match=r"tried to allocate 3 GiB(.|\n)*a smaller finetune.batch than 16"):
            train(tmp_path, named())

    def test_dropout_is_what_was_asked_for_and_a_network_without_any_is_refused(self, tmp_path):
        model = named()

        artifact = train(tmp_path / "with", model, dropout=0.3, epochs=1)

        assert [part.p for part in model.module.modules() if isinstance(part, nn.Dropout)] == [0.3]
        assert "dropout is 0.3" in artifact.facts["notes"]
        with pytest.raises(UsageError, match="has no dropout layer"):
            train(tmp_path / "without", networks.model(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), 16), dropout=0.3)

    @pytest.mark.parametrize(
        ("device", "groups", "autocast", "is_last"),
        [
            ("cpu", 1, False, False),
            ("cpu", 4, False, True),
            ("cpu", 1, True, False),
            ("cuda", 4, False, False),
            ("cuda", 1, True, True),
        ],
    )
    def test_maps_lie_as_they_are_faster_unless_it_is_said_how(self, device, groups, autocast, is_last):
        model = networks.model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=groups)), 16)

        def layout(**asked: Any) -> torch.memory_format:
            return Lesson(model, None, None, FinetuneTable(autocast=autocast, **asked), torch.device(device), None).layout

        assert layout() is (torch.channels_last if is_last else torch.contiguous_format)
        assert layout(channels_last=True) is torch.channels_last
        assert layout(channels_last=False) is torch.contiguous_format

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_gpu_that_is_not_there_is_no_guess(self, tmp_path):
        with pytest.raises(CapabilityError, match="there is no GPU to train on"):
            train(tmp_path, named(), device="cuda")

    def test_decisions_on_held_out_images_are_counted_by_class(self, tmp_path):
        artifact = train(tmp_path, named())

        confusion = np.array(artifact.facts["confusion"])
        assert confusion.sum() == 32
        assert confusion.trace() / 32 == artifact.facts["best_val_accuracy"]


class KilledError(Exception):
    """Stands for the end of a process."""


class TestAKilledTraining:
    @pytest.mark.parametrize("mode", ["all", "head", "head first"])
    @pytest.mark.parametrize("epoch", [1, 2, 3])
    def test_goes_on_to_the_very_same_weights(self, tmp_path, mode, epoch):
        table = FinetuneTable(
            mode=mode, head_epochs=2, epochs=4, batch=16, learning_rate=2e-2, ema=0.9, augment=("flip",), optimizer="sgd"
        )

        def trained(name: str, **options: Any) -> bytes:
            return finetune.finetune(
                named(), stripes(64, 0), stripes(32, 1), table, networks.made(tmp_path / name), **options
            ).path.read_bytes()

        def killing(what: str, done: int, total: int) -> None:
            if what == "finetune" and done == epoch:
                raise KilledError

        scratch = tmp_path / "scratch"
        with pytest.raises(KilledError):
            trained("killed", scratch=scratch, progress=killing)
        seen: list[int] = []

        resumed = trained("resumed", scratch=scratch, progress=lambda _, done, total: seen.append(done))

        assert seen[0] == epoch
        assert resumed == trained("whole")

    def test_begins_anew_with_other_settings_or_a_damaged_file(self, tmp_path):
        def epochs_done(**settings: Any) -> int:
            table, seen = FinetuneTable(**{"epochs": 2, **settings}), []
            folder = networks.made(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
            options = {"scratch": tmp_path / "scratch", "progress": lambda _, done, total: seen.append(done)}
            finetune.finetune(named(), stripes(16, 0), stripes(8, 1), table, folder, **options)
            return seen[0]

        assert epochs_done() == 0
        assert epochs_done() == 2
        assert epochs_done(batch=8) == 0
        (tmp_path / "scratch" / FILE).write_bytes(b"half a file")
        assert epochs_done(batch=8) == 0

    def test_what_was_good_is_kept_when_the_loss_is_not_a_number_any_more(self, tmp_path, monkeypatch):
        step = loop.step

        counted: list[int] = []

        def exploding(*case: Any) -> tuple[float, int]:
            counted.append(1)
            return step(*case) if len(counted) <= 6 else (float("nan"), 0)

        monkeypatch.setattr(loop, "step", exploding)
        table = FinetuneTable(epochs=3, batch=16)

        with pytest.raises(StageError, match=r"diverged in epoch 2(.|\n)*loss of step 3 is nan; the weights of epoch 1,"):
            finetune.finetune(named(), stripes(64, 0), stripes(8, 1), table, tmp_path, scratch=tmp_path / "scratch")

        kept = safetensors.torch.load_file(tmp_path / "scratch" / loop.BEST_SO_FAR)
        named().module.load_state_dict(kept)
        assert all(value.isfinite().all() for value in kept.values())


class TestCachedFeatures:
    def artifact(self, folder: Path, *, model: Model | None = None, **settings: Any) -> Artifact:
        table = FinetuneTable(**{"mode": "head", "epochs": 3, "batch": 16, "learning_rate": 2e-2, **settings})
        images = (stripes(64, 0), stripes(32, 1))
        return finetune.finetune(model or named(), *images, table, networks.made(folder), scratch=folder.parent / "scratch")

    def test_the_head_learns_the_same_as_with_the_backbone_in_every_epoch(self, tmp_path):
        plain = self.artifact(tmp_path / "plain")
        cached = self.artifact(tmp_path / "cached", cache_features=True)

        one, other = (safetensors.torch.load_file(found.path) for found in (plain, cached))
        assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)

    def test_the_backbone_sees_every_picture_once(self, tmp_path):
        model, seen = named(), []
        model.module.get_submodule("body").register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))

        self.artifact(tmp_path / "out", model=model, cache_features=True, epochs=5)

        assert sum(seen) == 64 + 32 + 32  # and the held-out pictures once more, for the table of decisions

    def test_features_are_mapped_and_found_again(self, tmp_path):
        self.artifact(tmp_path / "one", cache_features=True)
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("features-*.npy")}

        self.artifact(tmp_path / "two", cache_features=True, learning_rate=1e-2)

        assert len(made) == 2
        assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").glob("features-*.npy")}

    def test_other_weights_pictures_or_views_are_other_features(self, tmp_path):
        self.artifact(tmp_path / "one", cache_features=True)
        self.artifact(tmp_path / "views", cache_features=True, views=2, augment=("flip",))

        found = sorted((tmp_path / "scratch").glob("features-*.npy"))
        assert sorted(len(np.load(path, mmap_mode="r")) for path in found) == [32, 64, 128]

    def test_a_disk_that_is_too_small_for_them_is_an_error_and_leaves_nothing(self, tmp_path, monkeypatch):
        def full(*_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)

        with pytest.raises(DeploykitError, match="features-"):
            self.artifact(tmp_path / "out", cache_features=True)

        assert list((tmp_path / "scratch").iterdir()) == []

    def test_a_network_that_computes_something_behind_its_head_is_refused(self, tmp_path):
        model = named()
        behind = replace(model, module=nn.Sequential(model.module, nn.Tanh()))

        with pytest.raises(UsageError, match="the network's answer is not that layer's result"):
            self.artifact(tmp_path / "out", model=behind, cache_features=True)
