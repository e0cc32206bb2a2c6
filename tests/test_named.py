"""Data sets by name: read as torchvision lays them out, split by the seed, never fetched unasked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from deploykit import data
from deploykit.cli import cli
from deploykit.data.named import named
from deploykit.errors import DataError, RecipeError


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the format of the files of MNIST: magic number, sizes, values."""
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """MNIST and EMNIST with 200 and 40 pictures: the class's number of bright rows."""
    folder = tmp_path_factory.mktemp("sets")
    for part, name, count in (("train", "train", 200), ("test", "t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pictures = np.zeros((count, 28, 28), np.uint8)
        for index, label in enumerate(labels):
            pictures[index, : 2 * label + 2] = 200
        for where, prefix, compress in (("MNIST", name, False), ("EMNIST", f"emnist-balanced-{part}", True)):
            raw = folder / where / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
                (raw / f"{prefix}-{kind}-ubyte").write_bytes(idx(array))
                if compress:
                    (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return folder


def test_a_tenth_of_each_class_is_held_out_by_the_seed_and_the_test_part_is_the_test(root):
    splits, again, other = (named("mnist", root, seed) for seed in (0, 0, 1))

    assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == [180, 20, 40]
    assert np.bincount(splits.calibration.labels).tolist() == [2] * 10
    assert splits.train.names == again.train.names != other.train.names
    assert not set(splits.train.names) & set(splits.calibration.names)
    assert splits.test.classes[3].startswith("3")


def test_emnist_is_turned_upright(root):
    upright = named("mnist", root, 0).test.sources[3]
    turned = named("emnist", root, 0).test.sources[3]

    assert np.array_equal(turned, np.asarray(upright).T)  # its files hold pictures transposed; these are MNIST's


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "emnist", "cifar10", "cifar100", "imagenet"])
def test_what_is_not_there_is_told_and_not_fetched(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} is not in(.|\n)*data.root"):
        named(name, tmp_path / "nothing", 0)

    assert not list(tmp_path.rglob("*.gz"))


def test_the_command_trains_on_it_and_says_what_becomes_of_grey_pictures(root, tmp_path):
    words = ["finetune", "lenet5_rgb", "--weights", "none", "--data", "mnist", "--root", str(root), "--epochs", "1", "--json"]

    answer = CliRunner().invoke(cli, [*words, "--output", str(tmp_path / "run")])

    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert (found["train_images"], found["val_images"]) == (180, 20)
    assert any("the pictures are grey, and the first layer takes three channels" in note for note in found["notes"])


def test_a_set_by_name_without_its_folder_is_refused(tmp_path):
    answer = CliRunner().invoke(cli, ["finetune", "lenet5", "--data", "mnist", "--output", str(tmp_path / "run")])

    assert isinstance(answer.exception, RecipeError)
    assert "data.name = 'mnist' lies in a folder: set data.root" in str(answer.exception)


def test_grey_is_what_no_header_calls_coloured(root):
    assert named("mnist", root, 0).train.is_grey()
    assert data.digits(0).train.is_grey()
