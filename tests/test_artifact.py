"""An artifact is complete and undamaged, or it is not an artifact; nothing that is read is trusted."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from deploykit import artifact
from deploykit.artifact import MANIFEST, SAMPLES, Artifact, Format, Precision, Preprocess, Samples, TensorSpec
from deploykit.errors import UsageError
from deploykit.machine import Machine

KEY = "0" * 64
SAMPLE = Samples(
    inputs={"image": np.zeros((2, 1, 4, 4), np.float32)},
    reference={"logits": np.ones((2, 10), np.float32)},
    expected={"logits": np.ones((2, 10), np.float32)},
    labels=np.array([3, 4]),
)


def filled(folder: Path) -> Artifact:
    """What a stage does: write files, and say what they are."""
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "weights").mkdir()
    (folder / "weights" / "0.bin").write_bytes(b"weights")
    (folder / "empty").touch()
    SAMPLE.save(folder / SAMPLES)
    return Artifact(
        path=folder / "model.onnx",
        stage="export-onnx",
        key="",
        format=Format.ONNX,
        precision=Precision.FP32,
        inputs=(TensorSpec("image", "float32", ("batch", 1, 4, 4)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        preprocess=Preprocess(None, (4, 4), (0.5,), (0.25,), "L"),
        classes=("zero", "een", "двa", "\udcff"),
        sha256="",
        parents=("a" * 64,),
        settings={"opset": 19, "nested": {"list": [1, 2.5, None]}},
        tools={"onnx": "1.21"},
        facts={"relative_error": 1e-7},
        machine=Machine.probe(),
    )


@pytest.fixture
def made(tmp_path) -> Artifact:
    return artifact.make(tmp_path / "export-onnx", KEY, filled)


def edited(made: Artifact, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The artifact's folder after a change to its manifest."""
    path = made.folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return made.folder


def refused(folder: Path) -> str:
    """The message with which a folder is refused; `find` says then that it has to be made."""
    assert artifact.find(folder, KEY) is None
    with pytest.raises(UsageError) as caught:
        artifact.read_artifact(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


class TestRoundTrip:
    def test_what_was_made_is_found_and_read(self, made):
        assert artifact.find(made.folder, KEY) == artifact.read_artifact(made.folder) == made

    def test_nothing_of_it_is_lost(self, made, tmp_path):
        (tmp_path / "again").mkdir()
        wanted = filled(tmp_path / "again")

        assert made == replace(wanted, path=made.path, key=KEY, sha256=artifact.digest_file(made.path))

    def test_its_golden_samples_come_with_it(self, made):
        assert np.array_equal(made.samples().labels, [3, 4])

    def test_a_folder_may_be_moved(self, made, tmp_path):
        shutil.move(made.folder, tmp_path / "elsewhere")

        moved = artifact.read_artifact(tmp_path / "elsewhere")

        assert moved == replace(made, path=tmp_path / "elsewhere" / "model.onnx")

    def test_a_portable_one_names_no_machine(self, tmp_path):
        made = artifact.make(tmp_path / "a", KEY, lambda folder: replace(filled(folder), machine=None))

        assert artifact.read_artifact(made.folder).machine is None

    def test_every_file_beside_the_manifest_is_in_it_also_one_of_the_same_name_further_down(self, tmp_path):
        def fill(folder: Path) -> Artifact:
            (folder / "inner").mkdir()
            (folder / "inner" / MANIFEST).write_text("{}")
            return filled(folder)

        made = artifact.make(tmp_path / "a", KEY, fill)

        files = json.loads((made.folder / MANIFEST).read_text())["files"]
        assert set(files) == {"model.onnx", "weights/0.bin", "empty", SAMPLES, f"inner/{MANIFEST}"}

    def test_a_digest_is_that_of_the_bytes(self, tmp_path):
        (tmp_path / "abc").write_bytes(b"abc")

        # FIPS 180-2, appendix B.1
        assert artifact.digest_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


class TestMaking:
    def test_another_key_means_it_has_to_be_made_again(self, made):
        assert artifact.find(made.folder, "1" * 64) is None

    def test_a_stage_that_fails_leaves_what_was_there(self, made):
        def fails(folder: Path) -> Artifact:
            filled(folder)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            artifact.make(made.folder, "1" * 64, fails)

        assert artifact.find(made.folder, KEY) == made
        assert [path.name for path in made.folder.parent.iterdir()] == [made.folder.name]

    def test_a_stage_that_names_a_file_it_did_not_write_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyError):
            artifact.make(tmp_path / "a", KEY, lambda folder: replace(filled(folder), path=folder / "other.onnx"))

        assert not list(tmp_path.iterdir())

    def test_made_again_it_replaces_the_old_one_and_its_files(self, made):
        (made.folder / "stray").touch()

        again = artifact.make(made.folder, "1" * 64, filled)

        assert again == replace(made, key="1" * 64)
        assert not (made.folder / "stray").exists()


class TestDamage:
    @pytest.mark.parametrize("name", ["model.onnx", "weights/0.bin", SAMPLES])
    def test_one_changed_byte_is_noticed(self, made, name):
        content = bytearray((made.folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (made.folder / name).write_bytes(content)

        message = refused(made.folder)

        assert f"{made.folder / name} is not the file that was published" in message
        assert "try: remove the directory and run again" in message

    @pytest.mark.parametrize("name", ["model.onnx", "weights/0.bin", SAMPLES])
    def test_a_file_that_is_cut_short_is_noticed(self, made, name):
        (made.folder / name).write_bytes((made.folder / name).read_bytes()[:-1])

        assert "is not the file that was published" in refused(made.folder)

    @pytest.mark.parametrize("name", ["model.onnx", "weights/0.bin", "empty", SAMPLES])
    def test_a_file_that_is_missing_is_noticed(self, made, name):
        (made.folder / name).unlink()

        assert f"{made.folder / name} is not the file" in refused(made.folder)

    def test_a_file_that_became_a_folder_is_noticed(self, made):
        (made.folder / "empty").unlink()
        (made.folder / "empty").mkdir()

        assert "is not the file" in refused(made.folder)

    @pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.9, 0.99])
    def test_a_manifest_that_is_cut_short_is_noticed(self, made, kept):
        path = made.folder / MANIFEST
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])

        refused(made.folder)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"[]", b"null", b"5", b'"text"', b"\xff\xfe", b"\x00" * 100, b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000],
    )
    def test_a_manifest_that_is_something_else_is_refused(self, made, content):
        (made.folder / MANIFEST).write_bytes(content)

        assert "is damaged" in refused(made.folder) or not content

    def test_a_manifest_that_is_huge_is_not_read(self, made):
        with (made.folder / MANIFEST).open("r+b") as file:
            file.truncate(1 << 40)

        assert "its manifest.json has 1099511627776 bytes" in refused(made.folder)

    @pytest.mark.parametrize("key", ["schema", "files", "path", "format", "inputs", "preprocess", "settings", "machine"])
    def test_a_manifest_without_one_of_its_keys_is_refused(self, made, key):
        message = refused(edited(made, lambda content: content.pop(key)))

        assert f"is damaged\n  why: KeyError: '{key}'" in message

    @pytest.mark.parametrize("value", [None, 5, "text", [1], {"a": 1}, [[1]], [{}]])
    @pytest.mark.parametrize("key", ["files", "path", "format", "precision", "inputs", "outputs", "preprocess"])
    def test_a_manifest_with_a_value_of_another_kind_is_refused(self, made, key, value):
        refused(edited(made, lambda content: content.update({key: value})))

    @pytest.mark.parametrize("value", [None, 5, "text", [1]])
    @pytest.mark.parametrize("key", ["settings", "tools", "facts"])
    def test_a_manifest_with_a_list_where_facts_belong_is_refused(self, made, key, value):
        assert f"TypeError: {key} is" in refused(edited(made, lambda content: content.update({key: value})))

    def test_a_newer_manifest_asks_for_a_newer_deploykit(self, made):
        message = refused(edited(made, lambda content: content.update(schema=2)))

        assert "has schema 2; this deploykit reads schema 1\n  try: use the deploykit version that wrote it" in message

    def test_the_main_file_is_one_of_those_that_are_checked(self, made):
        (made.folder / "evil.onnx").write_bytes(b"evil")

        assert "is damaged" in refused(edited(made, lambda content: content.update(path="evil.onnx")))

    def test_the_digest_is_that_of_the_main_file(self, made):
        assert "sha256 is not that of the main file" in refused(edited(made, lambda content: content.update(sha256="0" * 64)))

    def test_what_is_no_artifact_at_all_is_said_to_have_no_manifest(self, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "folder" / MANIFEST).mkdir(parents=True)

        for name in ("nothing", "file", "folder"):
            assert "is not a deploykit artifact\n  why: it has no manifest.json" in refused(tmp_path / name)


class TestWhoseAFileIs:
    def test_the_main_file_is_the_artifacts_and_no_other_file_beside_it_is(self, made):
        other = made.folder / "theirs.onnx"
        other.write_bytes(b"theirs")

        found = [artifact.artifact_of(path) for path in (made.path, other, made.folder / MANIFEST, made.folder / "nothing")]

        assert found == [made, None, None, None]

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b'{"name": "a web app", "path": "x"}']
    )
    def test_a_manifest_of_somebody_else_makes_no_artifact_of_a_file(self, made, content):
        (made.folder / MANIFEST).write_bytes(content)

        assert artifact.artifact_of(made.path) is None

    def test_an_artifacts_file_that_was_changed_is_an_error_and_not_a_strangers(self, made):
        made.path.write_bytes(b"other")

        with pytest.raises(UsageError, match="is not the file that was published"):
            artifact.artifact_of(made.path)


class TestPathsThatEscape:
    @pytest.mark.parametrize("name", ["../secret", "weights/../../secret", "/etc/passwd", "..", "..\\secret", "a\0b"])
    def test_a_file_outside_the_folder_is_never_opened(self, made, name):
        secret = made.folder.parent / "secret"
        secret.write_text("secret")
        entry = {"sha256": artifact.digest_file(secret), "bytes": 6}
        folder = edited(made, lambda content: content["files"].update({name: entry}))

        assert "names a file outside its directory" in refused(folder)

    @pytest.mark.parametrize("name", ["../export-onnx/model.onnx", "weights/0.bin", ".", "..", "", "/etc/passwd"])
    def test_the_main_file_lies_in_the_folder_itself(self, made, name):
        assert "is damaged" in refused(edited(made, lambda content: content.update(path=name)))

    @pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "\udcff", "", "."])
    def test_a_name_that_no_file_can_have_is_refused(self, made, name):
        refused(edited(made, lambda content: content["files"].update({name: {"sha256": "", "bytes": 0}})))


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).filter(
    lambda name: not name.endswith(".npy")
)
ARRAYS = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(dtype),
    st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(0, 1000),
)
TENSORS = st.dictionaries(NAMES | st.sampled_from(["a/b", "labels", "file", "args", "/x/", "a.b:0"]), ARRAYS, max_size=3)


def same(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


class TestSamples:
    @settings(deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
    @hypothesis.given(inputs=TENSORS, reference=TENSORS, expected=TENSORS, labels=st.none() | st.lists(st.integers(0, 9)))
    def test_what_is_saved_is_loaded_whatever_the_tensors_are_called(self, tmp_path, inputs, reference, expected, labels):
        wanted = Samples(inputs, reference, expected, None if labels is None else np.array(labels, np.int64))

        wanted.save(tmp_path / SAMPLES)
        found = Samples.load(tmp_path / SAMPLES)

        assert same(found.inputs, inputs)
        assert same(found.reference, reference)
        assert same(found.expected, expected)
        assert (found.labels is None) == (labels is None)
        assert labels is None or same({"": found.labels}, {"": wanted.labels})

    def test_pickled_objects_are_refused_and_never_unpickled(self, tmp_path):
        marker = tmp_path / "marker"

        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (marker,)

        np.savez(tmp_path / SAMPLES, **{"inputs/x": np.array([Evil()], object)})
        (tmp_path / "bare.npz").write_bytes(pickle.dumps(Evil()))

        for name in (SAMPLES, "bare.npz"):
            with pytest.raises(ValueError, match="allow_pickle="):
                Samples.load(tmp_path / name)
        assert not marker.exists()


def test_the_shape_of_an_input_follows_from_its_preprocessing():
    grey = Preprocess(None, (28, 32), (0.5,), (0.5,), "L")

    assert (grey.shape, replace(grey, channels="RGB").shape) == ((1, 28, 32), (3, 28, 32))
