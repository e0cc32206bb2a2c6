"""A bundle: what is in it, what its identity depends on, who signed it, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import hostile_bundles
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit import agent, artifact, bundle
from deploykit.artifact import Artifact, Format, Precision, Preprocess, Samples, TensorSpec
from deploykit.bundle import Blob, Manifest, archive, device_half, pack, signature
from deploykit.errors import UsageError
from deploykit.gate import EXIT_CODES, Verdict
from deploykit.runtimes import REGISTRY

RECIPE = """
name = "tiny"
gate = ["latency <= 500 ms"]
[model]
name = "lenet5"
weights = "none"
"""


def tiny_model(folder: Path, *, key: str = "key", seed: int = 0, op: str = "Add") -> Artifact:
    """A float graph that adds its input to itself, or what else `op` does with it, with golden samples."""
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 2, 2])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 2, 2])]
    graph = helper.make_graph([helper.make_node(op, ["image", "image"], ["logits"])], "g", inputs, outputs)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    pixels = np.random.default_rng(seed).random((3, 1, 2, 2), np.float32)
    wanted = {"Add": np.add, "Mul": np.multiply, "Sub": np.subtract}[op](pixels, pixels)

    def fill(place: Path) -> Artifact:
        (place / "model.onnx").write_bytes(content)
        Samples({"image": pixels}, {"logits": wanted}, {"logits": wanted}).save(place / "samples.npz")
        ends = (TensorSpec("image", "float32", ("batch", 1, 2, 2)),), (TensorSpec("logits", "float32", ("batch", 1, 2, 2)),)
        how = Preprocess(None, (2, 2), (0.5,), (0.5,), "L")
        kinds = (Format.ONNX, Precision.FP32, *ends, how, ("cat", "dog"))
        facts = {"model": "tiny", "images": f"/home/{key}"}
        return Artifact(place / "model.onnx", "export", "", *kinds, "", (), {}, {"torch": key}, facts)

    return artifact.make(folder, key, fill)


def expect_wrong_answers(run: Path) -> None:
    """Golden samples that the graph of `run` does not answer, in a manifest that has their digests."""
    made = artifact.read_artifact(run / "export-onnx")
    golden = made.samples()
    wrong = {"logits": golden.expected["logits"] + 1}
    Samples(golden.inputs, wrong, wrong).save(made.folder / "samples.npz")
    artifact.write_manifest(made.folder, made)


def tiny_run(
    folder: Path, *, key: str = "key", seed: int = 0, op: str = "Add", recipe: str = RECIPE, verdict: str = "pass"
) -> Path:
    """What `pack` needs of a finished run."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe)
    result = {"schema": 1, "name": "tiny", "verdict": verdict, "exit_code": EXIT_CODES[Verdict(verdict)], "made": key}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "report.html").write_text(f"<p>{key}</p>")
    tiny_model(folder / "export-onnx", key=key, seed=seed, op=op)
    return folder


def ssh_key(path: Path) -> Path:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("wants ssh-keygen (Debian package openssh-client)")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)], check=True)
    return path


def allowed(key: Path, name: str = "builder@example.org") -> Path:
    path = key.with_suffix(".signers")
    path.write_text(f"{name} {key.with_suffix('.pub').read_text()}")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    return ssh_key(tmp_path_factory.mktemp("keys") / "builder")


@pytest.fixture(scope="module")
def good(run, key, tmp_path_factory) -> Path:
    """A packed and signed bundle."""
    return pack.pack(run, tmp_path_factory.mktemp("bundle") / "good.bundle", release=3, key=key).path


class TestPacking:
    def test_it_holds_what_a_device_needs_and_what_people_read(self, good):
        manifest = bundle.check(good).manifest

        assert set(manifest.portable) == {
            *(f"models/onnxruntime-fp32/{name}" for name in ("model.onnx", "samples.npz", "manifest.json")),
            *("classes.json", "preprocess.json", "recipe.toml", "device.pyz"),
        }
        assert set(manifest.beside) == {"reports/result.json", "reports/report.html", "sbom.cdx.json"}
        assert (manifest.name, manifest.release, manifest.gate) == ("tiny", 3, ("latency <= 500 ms",))
        assert manifest.models == ("onnxruntime-fp32",)

    def test_it_is_an_uncompressed_zip_that_any_tool_reads(self, good):
        with zipfile.ZipFile(good) as packed:
            assert packed.testzip() is None
            assert {info.compress_type for info in packed.infolist()} == {zipfile.ZIP_STORED}
            assert packed.namelist()[:2] == ["bundle.json", "bundle.json.sig"]

    def test_the_same_run_packed_twice_is_the_same_file(self, run, tmp_path):
        paths = [pack.pack(run, tmp_path / f"{count}.bundle", release=1).path for count in range(2)]

        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_the_identity_is_that_of_what_answers_and_not_of_reports_versions_or_numbers(self, run, tmp_path):
        other = tiny_run(tmp_path / "other", key="made elsewhere")

        first = pack.pack(run, tmp_path / "first.bundle", release=1).manifest
        second = pack.pack(other, tmp_path / "second.bundle", release=2).manifest

        assert first.id == second.id
        assert first.beside != second.beside

    def test_other_golden_samples_or_another_gate_make_another_identity(self, run, tmp_path):
        first = pack.pack(run, tmp_path / "first.bundle", release=1).manifest
        other = pack.pack(tiny_run(tmp_path / "other", seed=1), tmp_path / "other.bundle", release=1).manifest

        assert len({first.id, other.id, replace(first, gate=()).id, replace(first, name="x").id}) == 4

    def test_a_timing_cache_rides_beside_the_identity(self, run, tmp_path):
        (tmp_path / "orin.cache").write_bytes(b"timings")

        plain = pack.pack(run, tmp_path / "plain.bundle", release=1).manifest
        packed = pack.pack(run, tmp_path / "cached.bundle", release=1, timing_caches=[tmp_path / "orin.cache"]).manifest

        assert packed.beside["timing-caches/orin.cache"].size == 7
        assert packed.id == plain.id

    def test_a_folder_holds_the_same_as_a_file(self, run, tmp_path):
        file = pack.pack(run, tmp_path / "file.bundle", release=1)
        folder = pack.pack(run, tmp_path / "folder", release=1, as_folder=True)

        assert bundle.check(folder.path) == bundle.check(file.path)

    def test_the_bill_of_materials_names_every_portable_file_by_digest(self, good):
        with bundle.opened(good) as opened:
            blob = opened.manifest.beside["sbom.cdx.json"]
            document = json.loads(b"".join(bundle.pieces(opened, blob)))

            listed = {part["name"]: part["hashes"][0]["content"] for part in document["components"] if "hashes" in part}
            assert listed == {name: blob.sha256 for name, blob in opened.manifest.portable.items()}
        assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
        assert "pkg:pypi/numpy@" in str(document)

    def test_what_is_no_finished_run_is_refused_and_leaves_nothing(self, tmp_path):
        (tmp_path / "run").mkdir()

        with pytest.raises(UsageError, match=r"is not a finished run\n  why: it has no recipe\.toml"):
            pack.pack(tmp_path / "run", tmp_path / "x.bundle", release=1)

        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    @pytest.mark.parametrize(("verdict", "code"), [("fail", 3), ("cannot tell", 5)])
    def test_a_run_whose_gates_did_not_pass_is_packed_only_when_that_is_said_and_the_bundle_keeps_it(
        self, tmp_path, deploykit, verdict, code
    ):
        run, path = tiny_run(tmp_path / "run", verdict=verdict), tmp_path / "x.bundle"

        refused = deploykit("pack", run, "--release", 1, "--output", path)
        assert (refused.code, path.exists()) == (2, False)
        assert f"its gates say: {verdict} (exit code {code})" in refused.err
        packed = deploykit("pack", run, "--release", 1, "--output", path, "--failed-gates")

        assert (packed.code, f"its gates said: {verdict}" in packed.out) == (0, True)
        assert bundle.check(path).manifest.verdict == verdict
        assert f"its gates said: {verdict}" in deploykit("verify", path).out

    @pytest.mark.parametrize(
        "content",
        ["", "{}", "[]", '{"verdict": "pass"}', '{"verdict": "pass", "exit_code": 3}', '{"verdict": "good", "exit_code": 0}'],
    )
    def test_a_result_that_does_not_say_what_the_gates_said_is_refused(self, tmp_path, content):
        run = tiny_run(tmp_path / "run")
        (run / "result.json").write_text(content)

        with pytest.raises(UsageError, match=r"result\.json is no result of a run"):
            pack.pack(run, tmp_path / "x.bundle", release=1, failed_gates=True)

    def test_a_run_without_gates_says_so(self, run, tmp_path):
        other = shutil.copytree(run, tmp_path / "run")
        (other / "result.json").write_text('{"verdict": null, "exit_code": 0}')

        assert pack.pack(other, tmp_path / "x.bundle", release=1).manifest.verdict == ""

    @pytest.mark.parametrize(
        ("table", "missing"),
        [
            ("[quantize]", "quantize-onnxruntime"),
            ('[quantize]\n[build]\nruntimes = ["tensorrt"]\nfloat_type = "fp16"', "quantize-tensorrt-fp16"),
            ('[build]\nruntimes = ["tensorrt"]\nfloat_type = "fp16"', "export-onnx-fp16"),
        ],
    )
    def test_the_graph_of_the_recipe_is_packed_and_no_other_one_in_its_place(self, tmp_path, table, missing):
        recipe = f'{RECIPE}[data]\ncalibrate = "images"\n{table}\n'
        run = tiny_run(tmp_path / "run", recipe=recipe)

        with pytest.raises(UsageError, match=f"has no graph for (.|\n)*its recipe makes {missing}, which is not there"):
            pack.pack(run, tmp_path / "x.bundle", release=1)

        tiny_model(run / missing, op="Mul")
        manifest = pack.pack(run, tmp_path / "x.bundle", release=1).manifest
        digest = artifact.digest_file(run / missing / "model.onnx")
        assert [blob.sha256 for name, blob in manifest.portable.items() if name.endswith(".onnx")] == [digest]

    def test_a_graph_that_the_recipe_does_not_make_stays_where_it_is(self, tmp_path):
        run = tiny_run(tmp_path / "run")
        tiny_model(run / "quantize-onnxruntime", op="Mul")

        manifest = pack.pack(run, tmp_path / "x.bundle", release=1).manifest

        made = artifact.digest_file(run / "export-onnx" / "model.onnx")
        assert manifest.portable["models/onnxruntime-fp32/model.onnx"].sha256 == made

    def test_only_a_bundle_is_written_over(self, run, tmp_path):
        path, mine = tmp_path / "x.bundle", tmp_path / "mine.txt"
        mine.write_text("mine")
        pack.pack(run, path, release=1)

        assert pack.pack(run, path, release=2).manifest == bundle.check(path).manifest
        with pytest.raises(UsageError, match="is there already, and is no bundle"):
            pack.pack(run, mine, release=1)
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(UsageError, match="it is no plain file"):
            pack.pack(run, tmp_path / "link", release=1)
        for folder in (tmp_path, mine):
            with pytest.raises(UsageError, match=r"it is a folder|is there already"):
                pack.pack(run, folder, release=1, as_folder=True)
        assert mine.read_text() == "mine"

    def test_two_timing_caches_of_one_name_are_refused(self, run, tmp_path):
        caches = [tmp_path / "one" / "orin.cache", tmp_path / "other" / "Orin.cache"]
        for cache in caches:
            cache.parent.mkdir()
            cache.write_text(str(cache))

        with pytest.raises(UsageError, match=r"two timing caches are called Orin\.cache"):
            pack.pack(run, tmp_path / "x.bundle", release=1, timing_caches=caches)

    def test_a_graph_with_data_outside_of_it_is_not_packed(self, tmp_path):
        run = tiny_run(tmp_path / "run")
        folder = run / "export-onnx"
        made = artifact.read_artifact(folder)
        made.path.write_bytes(hostile_bundles.graph("weights.bin"))
        artifact.write_manifest(folder, made)

        with pytest.raises(UsageError, match=r"model\.onnx: w lies in 'weights\.bin'"):
            pack.pack(run, tmp_path / "x.bundle", release=1)

        assert [path.name for path in tmp_path.iterdir()] == ["run"]


class TestTheZipapp:
    def test_it_is_small_and_the_same_each_time(self):
        assert len(device_half.zipapp()) <= device_half.MOST_BYTES
        assert device_half.zipapp() == device_half.zipapp()

    def test_it_imports_with_nothing_but_numpy_and_onnxruntime(self, tmp_path):
        (tmp_path / "device.pyz").write_bytes(device_half.zipapp())
        script = """
import importlib.util, sys, zipfile
allowed = {"numpy", "onnxruntime", "deploykit", "deploykit_device", "__main__"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and top not in ("flatbuffers", "google", "packaging"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.path[:] = [sys.argv[1], *[place for place in sys.path if place]]
import deploykit_device, deploykit.agent.commands, deploykit.benchmark.process, deploykit.runtimes.onnxruntime
names = [name for name in zipfile.ZipFile(sys.argv[1]).namelist() if name.startswith("deploykit/")]
assert all(m.__file__.startswith(sys.argv[1]) for n, m in sys.modules.items() if n.partition(".")[0] == "deploykit")
print(deploykit_device.load.__name__)
"""
        command = [sys.executable, "-c", script, str(tmp_path / "device.pyz")]

        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

        assert (done.returncode, done.stdout) == (0, "load\n"), done.stderr

    def test_it_holds_what_a_device_imports_and_nothing_of_the_workshop(self):
        with zipfile.ZipFile(io.BytesIO(device_half.zipapp())) as packed:
            names = {name.removesuffix(".py").removeprefix("deploykit/") for name in packed.namelist()}

        assert {"agent/commands", "infer", "slots", "parity", "benchmark/process", "data/pictures"} <= names
        assert "runtimes/onnxruntime" in names
        assert {"runtimes/cudart", "runtimes/tensorrt/builder", "runtimes/tensorrt/session"} <= names
        assert {f"runtimes/{name}" for name in REGISTRY if REGISTRY[name].rules is not None} <= {
            name.removesuffix("/__init__") for name in names
        }
        assert not [
            name for name in names if name.startswith(("cli", "quantize", "models", "bundle/pack", "data/folders", "recipe"))
        ]


class TestVerifying:
    def test_extra_missing_and_changed_files_are_told_apart(self, run, tmp_path):
        folder = pack.pack(run, tmp_path / "folder", release=1, as_folder=True).path
        files = bundle.check(folder).manifest.files
        (folder / files["classes.json"].entry).unlink()
        (folder / files["recipe.toml"].entry).write_bytes(b"x" * files["recipe.toml"].size)
        (folder / "blobs" / "note").write_text("hello")

        found = bundle.check(folder)

        assert (found.extra, found.missing, found.changed) == (("blobs/note",), ("classes.json",), ("recipe.toml",))
        assert not found.is_whole
        with pytest.raises(UsageError, match=r"extra: blobs/note\n  - missing: classes\.json\n  - changed: recipe\.toml"):
            bundle.require_whole(folder, found)

    def test_a_good_one_is_whole_and_says_who_signed_it(self, good, key):
        assert bundle.check(good).is_whole
        assert bundle.check(good).signer is None
        assert bundle.check(good, signers=allowed(key)).signer == "builder@example.org"

    def test_the_command_line_packs_verifies_and_inspects(self, run, key, tmp_path, deploykit):
        path = tmp_path / "tiny.bundle"

        packed = deploykit("pack", run, "--release", 7, "--sign", key, "--output", path, "--json")
        verified = deploykit("verify", path, "--signers", allowed(key), "--json")
        inspected = deploykit("inspect", path, "--json")

        assert (packed.code, json.loads(packed.out)["release"]) == (0, 7)
        assert (verified.code, json.loads(verified.out)["signer"]) == (0, "builder@example.org")
        assert json.loads(inspected.out)["kind"] == "bundle, every file as packed"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        verified = deploykit("verify", path)
        assert verified.code == 1
        assert verified.out.startswith("changed: ")


class TestSigning:
    def test_another_key_another_namespace_and_another_byte_are_refused(self, key, tmp_path):
        other, signers = ssh_key(tmp_path / "other"), allowed(key)
        command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", str(key)]
        elsewhere = subprocess.run(command, input=b"content", capture_output=True, check=True).stdout

        assert signature.signer(b"content", signature.sign(b"content", key), signers) == "builder@example.org"
        for content, signed in [
            (b"content", signature.sign(b"content", other)),
            (b"content", elsewhere),
            (b"Content", signature.sign(b"content", key)),
            (b"content", b""),
        ]:
            with pytest.raises(UsageError, match="is not signed by anybody in"):
                signature.signer(content, signed, signers)

    def test_a_key_that_is_not_there_and_one_that_is_none_are_refused(self, tmp_path):
        (tmp_path / "key").write_text("no key")

        with pytest.raises(UsageError, match="there is no key"):
            signature.sign(b"content", tmp_path / "nothing")
        with pytest.raises(UsageError, match="cannot sign\n  why: "):
            signature.sign(b"content", tmp_path / "key")

    def test_an_unsigned_bundle_is_refused_where_signers_are_known(self, run, key, tmp_path):
        path = pack.pack(run, tmp_path / "plain.bundle", release=1).path

        with pytest.raises(UsageError, match="is not signed"):
            bundle.check(path, signers=allowed(key))


def everything_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


class TestHostileBundles:
    def test_every_kind_is_refused_before_anything_is_executed_or_written(self, good, key, tmp_path, capsys):
        (tmp_path / "bundles").mkdir()
        hostile = hostile_bundles.all_of(good, tmp_path / "bundles", key)
        before, signers = everything_below(tmp_path), str(allowed(key))
        root, accepted = tmp_path / "device", []
        evil = Path("/tmp/evil").exists()

        for found in hostile:
            words = ["--signers", signers] if found.is_about_signing else []
            code = agent.run(["install", str(found.path), "--root", str(root), *words])
            said = json.loads(capsys.readouterr().out)
            if code not in (1, 2) or "error" not in said:
                accepted.append(found.name)

        with capsys.disabled():
            sys.stdout.write(f" {len(hostile)} hostile bundles refused ")
        assert len(hostile) >= 150
        assert accepted == []
        assert not root.exists()
        assert everything_below(tmp_path) == before
        assert Path("/tmp/evil").exists() == evil

    def test_a_good_one_is_not(self, good, key, tmp_path, capsys):
        assert agent.run(["install", str(good), "--root", str(tmp_path), "--signers", str(allowed(key))]) == 0


NAMES = st.from_regex(r"\A[a-z][a-z0-9]{0,5}(/[a-z][a-z0-9]{0,5}){0,3}\Z").filter(lambda name: not name.startswith("models/"))
BLOBS = st.builds(Blob, st.binary(min_size=32, max_size=32).map(bytes.hex), st.just(5))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refuses_or_reads(content: bytes) -> None:
    try:
        found = bundle.parse(content, "it")
    except UsageError:
        return
    assert bundle.dump(found) == content


class TestFuzzing:
    @FUZZ
    @given(st.dictionaries(NAMES, BLOBS, max_size=5), st.integers(0, 2**53 - 1))
    def test_what_is_written_is_read(self, files, release):
        manifest = Manifest("net", release, ("latency <= 5 ms",), files, verdict="pass")
        if not archive.twins(files):
            assert bundle.parse(bundle.dump(manifest), "it") == manifest

    @FUZZ
    @given(st.binary(max_size=200))
    def test_a_manifest_of_any_bytes_is_refused_and_nothing_worse(self, content):
        refuses_or_reads(content)

    @FUZZ
    @given(st.data())
    def test_a_manifest_with_any_value_anywhere_is_refused_or_canonical(self, data):
        blob = {"sha256": "0" * 64, "bytes": 1}
        value = {"schema": 1, "id": "0", "name": "x", "release": 1, "gate": [], "portable": {"a": blob}, "beside": {}}
        value["verdict"] = ""
        place = data.draw(st.sampled_from([value, value["portable"], blob]))
        place[data.draw(st.sampled_from([*place, "other"]))] = data.draw(JSON)
        if data.draw(st.booleans()) and isinstance(value["portable"], dict):
            value["portable"][data.draw(st.text(max_size=10))] = data.draw(JSON)

        refuses_or_reads(json.dumps(value).encode())
        refuses_or_reads((json.dumps(value, sort_keys=True, indent=1) + "\n").encode())

    @FUZZ
    @given(st.data())
    def test_an_archive_with_any_bytes_changed_is_refused_or_whole(self, good, tmp_path, data):
        content = bytearray(good.read_bytes())
        size = len(content)
        # The ends hold the headers, and the middle of a large blob is one case.
        place = data.draw(st.integers(0, 3000) | st.integers(size - 1500, size - 1) | st.integers(0, size - 1))
        piece = data.draw(st.binary(max_size=8))
        cut = data.draw(st.integers(0, 8) | st.integers(0, size))
        content[place : place + cut] = piece
        path = tmp_path / "fuzzed.bundle"
        path.write_bytes(content)

        try:
            found = bundle.check(path)
        except UsageError:
            return
        # Dates in the directory and checksums that nobody reads may differ; content may not.
        assert not found.is_whole or found.manifest == bundle.check(good).manifest
